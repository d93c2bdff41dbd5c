"""What every provider shares: how a task becomes a prompt, and how an answer becomes JSON.

A model plugin is one file with `build(**settings)`. It makes one attempt a call; retries, money and the validation
against the task's schema belong to whoever calls it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import SecretStr

from apprentice import wire
from apprentice.errors import ConfigError, InvalidInput, ModelError, ModelRejected, ModelUnavailable, OutcomeUnknown
from apprentice.types import Answer, FinishState, Json, Seconds, Task, Usage

FORM = "Answer with one JSON value that fits the given schema, and with nothing else."


class Endpoint:
    """Where a provider is asked, and with which key. No repr, error or log shows the key.

    `header` and `scheme` say how the key travels: `{header: scheme + key}`. Raises ConfigError for an address that a
    key must not be sent to and for a key that no header can carry.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        path: str,
        *,
        api_key: str | None,
        header: str,
        scheme: str = "",
        headers: Mapping[str, str] | None = None,
        timeout: Seconds,
        client: wire.Client | None,
        allow_internal: bool,
    ) -> None:
        if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or not api_key.strip()):
            raise ConfigError(f"{name}: api_key is empty, or has characters that no key has (a line break, say)")
        self.name = name
        self._url = wire.check_url(base_url, allow_internal=allow_internal) + path
        self._key = SecretStr(api_key or "")
        self._header = header
        self._scheme = scheme
        self._headers = {"content-type": "application/json", **(headers or {})}
        self._timeout = timeout
        self._client = client or wire.client(allow_internal=allow_internal)
        self._owned = client is None

    async def ask(self, body: bytes) -> tuple[dict[str, Json], Seconds]:
        """What the provider answered to one attempt, and how long it took. Raises ModelError for anything else."""
        key = self._key.get_secret_value()
        headers = self._headers | ({self._header: self._scheme + key} if key else {})
        started = time.monotonic()
        outcome = await wire.send(self._client, wire.Request(self._url, headers, body, self._timeout, key))
        if outcome.kind != "answered" or outcome.body is None:
            raise failed(outcome, self.name)
        return outcome.body, time.monotonic() - started

    async def close(self) -> None:
        """Close the connections; those of a client that was handed in are its owner's."""
        if self._owned:
            await self._client.close()


class Turn(NamedTuple):
    """One message before the answer: what was asked, or what was answered to an example."""

    role: Literal["user", "assistant"]
    value: Json


class Shape(NamedTuple):
    """The schema to ask a provider for. Providers demand an object; anything else is wrapped as {"value": …}."""

    schema: dict[str, Json]
    wrapped: bool

    def wrap(self, value: Json) -> Json:
        return {"value": value} if self.wrapped else value

    def unwrap(self, value: Json) -> Json:
        """The value inside. A model that answers without the wrapping is understood as well."""
        return value["value"] if self.wrapped and isinstance(value, dict) and set(value) == {"value"} else value


def shape(schema: dict[str, Json]) -> Shape:
    """What to ask a provider for so that it answers with an object.

    >>> shape({"type": "integer"}).schema["properties"]
    {'value': {'type': 'integer'}}
    """
    if _names_object(schema):
        return Shape(schema, wrapped=False)
    # Definitions are looked up from the root, so they move there with it.
    lifted: dict[str, Json] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    inner = {key: part for key, part in schema.items() if key not in lifted and key != "$schema"}
    return Shape(
        {
            "type": "object",
            "properties": {"value": inner},
            "required": ["value"],
            "additionalProperties": False,
            **lifted,
        },
        wrapped=True,
    )


def system(task: Task) -> str:
    """The system message: what is asked, how, and in which form."""
    return "\n\n".join(part for part in (task.description, task.instructions, FORM) if part)


def turns(task: Task, input: Json) -> list[Turn]:
    """The examples as turns of a conversation, and the input as the last one."""
    found: list[Turn] = []
    for example in task.examples:
        found += [Turn("user", example["input"]), Turn("assistant", example["output"])]
    return [*found, Turn("user", input)]


def as_json(value: Json) -> str:
    """The value as JSON text on one line, with as few bytes as JSON allows, that UTF-8 can carry.

    Also a bare text is written as JSON, so that nothing in it can be taken for a part of the prompt. Raises
    InvalidInput for what JSON cannot say (NaN, objects of Python).
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        # Half of a surrogate pair has no UTF-8; escaped, it travels as it is.
        return text if text.isascii() or _is_utf8(text) else json.dumps(value, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"the value is not JSON: {type(error).__name__}") from error


def parse(text: str) -> tuple[Json, str | None]:
    """(value, None) for JSON text, also inside one ```json fence; (None, problem) for anything else.

    >>> parse('```json\\n{"label": "spam"}\\n```')
    ({'label': 'spam'}, None)
    """
    inside = _FENCE.fullmatch(text)
    try:
        value = json.loads(inside[1] if inside else text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None, "the answer is empty" if not text.strip() else "the answer is not JSON"
    return checked(value, text)


def checked(value: Json, text: str) -> tuple[Json, str | None]:
    """(value, None), or (None, problem) when a text in it is half a character, which no store and no wire can keep."""
    if (text.isascii() and "\\u" not in text) or _is_utf8(json.dumps(value, ensure_ascii=False)):
        return value, None
    return None, "the answer contains half of a surrogate pair"


def readable(text: Json) -> str:
    """The text, with a question mark for what UTF-8 cannot carry; an empty one for what is no text."""
    return text.encode(errors="replace").decode() if isinstance(text, str) else ""


def settle(
    text: str,
    value: Json,
    problem: str | None,
    *,
    finish: FinishState,
    usage: Usage | None,
    model: str,
    latency: Seconds,
) -> Answer:
    """The Answer: without an output when the model was cut off, because half an answer may still be valid JSON."""
    if finish == "truncated":
        value, problem = None, "the answer was cut off at max_tokens"
    elif value is None and problem is None:
        problem = "the answer is null"
    return Answer(
        output=value, text=readable(text), model=model, usage=usage, finish=finish, latency=latency, problem=problem
    )


def failed(outcome: wire.Outcome, name: str) -> ModelError:
    """The error for an attempt that brought no answer; it carries what became of the attempt and of the money."""
    problem = f"{name}: {outcome.problem}"
    if outcome.kind == "unknown":
        return OutcomeUnknown(problem, outcome="unknown", retry_after=outcome.retry_after, retryable=outcome.retryable)
    kind = ModelUnavailable if outcome.retryable else ModelRejected
    return kind(
        problem, outcome="not_sent" if outcome.kind == "not_sent" else "rejected", retry_after=outcome.retry_after
    )


def usage_of(found: Json, read: Callable[[dict[str, Any]], dict[str, Any]]) -> Usage | None:
    """What `read` makes of the usage object, or None when it is missing or no set of counts that can be true."""
    if not isinstance(found, dict):
        return None
    try:
        usage = Usage.model_validate(read(found), strict=True)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    possible = usage.cached_tokens <= usage.input_tokens <= _MOST_TOKENS and usage.output_tokens <= _MOST_TOKENS
    return usage if possible else None


def name_of(task: Task) -> str:
    """The task's name in the letters that providers allow for a schema or a tool."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", task.name)[:64] or "answer"


_MOST_TOKENS = 10**12  # a thousand million pages: beyond that a count is nonsense, and money would not fit the ledger
_FENCE = re.compile(r"\s*```(?:json|JSON)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names_object(schema: dict[str, Json]) -> bool:
    """Whether the root is an object, also through one reference into its own definitions (pydantic writes such)."""
    reference = schema.get("$ref")
    if isinstance(reference, str):
        target: Any = schema
        for part in reference.removeprefix("#/").split("/"):
            target = target.get(part) if isinstance(target, dict) else None
        return isinstance(target, dict) and target.get("type") == "object"
    return schema.get("type") == "object"
