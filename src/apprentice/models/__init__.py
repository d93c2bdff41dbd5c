"""What every provider shares: how a task becomes a prompt, and how an answer becomes JSON.

A model plugin is one file with `build(**settings)`. It makes one attempt a call; retries, money and the validation
against the task's schema belong to whoever calls it. A provider's file says where it is asked (Endpoint) and how it
speaks (Dialect); Hosted makes a model of the two, the same one whether the answer comes whole or as a stream. How it
takes what can wait is said by Batches; the answers in a batch are read by the same Dialect.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic_core import from_json

from apprentice import wire
from apprentice.connection import Careful, Reader
from apprentice.dialogues import FORM as FORM
from apprentice.dialogues import as_json as as_json
from apprentice.dialogues import is_object
from apprentice.dialogues import system as system
from apprentice.errors import (
    Became,
    ConfigError,
    ModelError,
    ModelRefused,
    ModelRejected,
    ModelUnavailable,
    OutcomeUnknown,
    OutOfMoney,
)
from apprentice.schemas import is_utf8
from apprentice.types import Answer, FinishState, Json, Model, Seconds, Task, Usage


class Endpoint:
    """Where a provider is asked, and with which key. No repr, error or log shows the key.

    `header` and `scheme` say how the key travels: `{header: scheme + key}`. `free`: error statuses that the provider
    documents as not charged. Raises ConfigError for an address that a key must not be sent to and for a key that no
    header can carry.
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
        free: frozenset[int] = frozenset(),
        timeout: Seconds,
        client: wire.Client | None,
        allow_internal: bool,
    ) -> None:
        if api_key is not None and not (
            api_key and api_key == api_key.strip() and api_key.isascii() and api_key.isprintable()
        ):
            raise ConfigError(f"{name}: api_key is empty, or has what no key has (a line break, a space at its end)")
        self.name = name
        self._base = wire.check_url(base_url, allow_internal=allow_internal)
        told = {"content-type": "application/json", **(headers or {})}
        if api_key:
            told[header] = scheme + api_key
        # All that the requests have in common.
        self._asked = wire.Request(self._base + path, told, b"", timeout, api_key or "", free=free)
        self._client = client or wire.client(allow_internal=allow_internal, reader=reader())
        self._owned = client is None

    def ask(self, body: bytes) -> Awaitable[wire.Outcome]:
        """What became of one attempt."""
        return wire.send(self._client, self._asked._replace(body=body))

    async def call(
        self,
        path: str,
        body: bytes | None = None,
        *,
        media: str = "application/json",
        lines: bool = False,
        failed_jobs: bool = False,
    ) -> wire.Outcome:
        """The answer to a call at another path: a POST of `body`, which is of the type `media`, or a GET.

        `lines`: a file of JSON lines is asked for. `failed_jobs`: the job that is asked about may have failed, and is told
        of all the same. Raises ModelError when there is no answer.
        """
        asked = self._asked._replace(
            url=self._base + path,
            headers={**self._asked.headers, "content-type": media},
            body=body or b"",
            timeout=max(self._asked.timeout, _LONGEST),
            limit=_LARGEST,
            method="GET" if body is None else "POST",
            lines=lines,
        )
        outcome = await wire.send(self._client, asked)
        told = failed_jobs and outcome.status == 200 and outcome.body is not None
        if outcome.kind != "answered" and not told:
            raise failed(outcome, self.name)
        return outcome

    async def close(self) -> None:
        """Close the connections; those of a client that was handed in are its owner's."""
        if self._owned:
            await self._client.close()


@cache
def reader() -> Callable[[], Reader]:
    """What reads the answers of models: the faster one where the package for it is installed. Both read the same."""
    if importlib.util.find_spec("httptools") is None:
        return Careful
    from apprentice.models._httptools import Reader

    return Reader


class Reading(NamedTuple):
    """What an answer says, in our words. `refusal`: why there is none. `problem`: why its text is not to be trusted."""

    text: str = ""
    model: str = ""
    usage: Usage | None = None
    finish: FinishState = "complete"
    refusal: str | None = None
    problem: str | None = None


class Dialect(Protocol):
    """How one provider speaks: three translations without side effects. Whatever came back, reading it raises nothing.

    One with an attribute `says_input_as_text` that is true promises that the requests of a task differ in one place alone:
    `as_json(input)`, as a text. What is around it is then built once a task.
    """

    def body(self, task: Task, input: Json) -> dict[str, Json]:
        """The request. Raises InvalidInput for what JSON cannot say."""
        ...

    def read(self, body: dict[str, Json]) -> Reading:
        """What a whole answer says."""
        ...

    def join(self, events: Sequence[Json]) -> tuple[dict[str, Json], bool]:
        """The body that the same answer has without streaming, and whether the stream came to its proper end.

        Of a stream that did not, the body has what was said until then, and a usage only where it is the final one.
        """
        ...


class Prepared(NamedTuple):
    """A request that is ready to be sent, once: never fewer `bytes` than the tokens billed for it, and what sends it."""

    bytes: int
    answer: Callable[[], Awaitable[Answer]]


def prepared(model: Any, task: Task, input: Json) -> Prepared:
    """The request to any model. One with a method `prepare` builds it once, others once to be measured and once to be sent."""
    if (prepare := getattr(model, "prepare", None)) is not None:
        made: Prepared = prepare(task, input)
        return made
    return Prepared(model.request_bytes(task, input), partial(model.answer, task, input))


class Limits(NamedTuple):
    """How much one batch may hold."""

    requests: int
    bytes: int


class Sought(NamedTuple):
    """What is known of a batch whose creation was begun, and whose name at the provider is not known."""

    name: str
    size: int  # requests
    since: Seconds  # when its creation was begun
    known: frozenset[str]  # batches of the provider that are others


class Results(NamedTuple):
    """What became of the requests of a batch: of each that is listed, by its id, and of each that is not."""

    listed: Mapping[str, wire.Outcome]
    unlisted: wire.Outcome


class Batches(Protocol):
    """How one provider takes batches. `call` is Endpoint.call; what it raises goes through."""

    limits: Limits

    async def submit(self, call: Call, name: str, requests: Mapping[str, dict[str, Json]]) -> str:
        """Create a batch of these bodies by id, and return how the provider calls it."""
        ...

    async def find(self, call: Call, sought: Sought) -> list[str]:
        """The batches at the provider that may be the one that is sought: where it tells names, one at most."""
        ...

    async def ended(self, call: Call, batch: str) -> bool:
        """Whether nothing will happen to it any more."""
        ...

    async def results(self, call: Call, batch: str, ids: Sequence[str]) -> Results:
        """Of a batch that has ended. `ids`: those of its requests, in their order."""
        ...

    async def cancel(self, call: Call, batch: str) -> None:
        """Ask the provider to end it early. What was answered until then is answered, and billed."""
        ...


@runtime_checkable
class BatchModel(Model, Protocol):
    """A model that also answers many inputs for less, within a day. Its methods raise ModelError."""

    max_tokens: int
    batch_limits: Limits

    def request_bytes(self, task: Task, input: Json) -> int: ...
    async def submit(self, task: Task, name: str, inputs: Mapping[str, Json]) -> str: ...
    async def find(self, sought: Sought) -> list[str]: ...
    async def ended(self, batch: str) -> bool: ...
    async def results(self, task: Task, batch: str, ids: Sequence[str]) -> dict[str, Answer | ModelError]: ...
    async def cancel(self, batch: str) -> None: ...


class Hosted:
    """A model behind somebody else's wire. One attempt a call; `max_tokens` and `request_bytes` bound what it can cost."""

    def __init__(
        self,
        endpoint: Endpoint,
        dialect: Dialect,
        *,
        model: str,
        max_tokens: int,
        added: int = 0,
    ) -> None:
        """`added`: the most tokens that the provider puts before a request of its own accord, and bills."""
        self.model = model
        self.max_tokens = max_tokens
        self._endpoint = endpoint
        self._dialect = dialect
        self._added = added
        self._ready_at: Seconds = 0.0
        self._forms: dict[int, _Form] = {}  # by the identity of the task, which the form keeps

    def request_bytes(self, task: Task, input: Json) -> int:
        """Never fewer than the tokens billed for a request: no tokenizer makes more tokens than there are bytes."""
        return len(self._request(task, input)) + self._added

    def prepare(self, task: Task, input: Json) -> Prepared:
        """The request, built once for `request_bytes` and `answer`."""
        request = self._request(task, input)
        return Prepared(len(request) + self._added, partial(self._answer, task, request))

    def pause(self) -> Seconds:
        """Seconds to wait before the next call, 0 or more, by what the last answer said of the provider's limits."""
        return max(0.0, self._ready_at - time.monotonic())

    async def answer(self, task: Task, input: Json) -> Answer:
        """The model's answer. Raises ModelError (ModelRefused with its usage) when there is none."""
        return await self._answer(task, self._request(task, input))

    async def _answer(self, task: Task, request: bytes) -> Answer:
        started = time.monotonic()
        outcome = await self._endpoint.ask(request)
        ended = time.monotonic()
        if outcome.status is not None:
            told = outcome.retry_after  # what it asks for itself counts more than what its limits let us think
            pause = wire.pause(outcome.headers, time.time(), tokens=self.max_tokens) if told is None else told
            self._ready_at = ended + pause
        return self._understood(task, outcome, ended - started)

    async def close(self) -> None:
        await self._endpoint.close()

    def _request(self, task: Task, input: Json) -> bytes:
        if (around := self._form(task).around) is None:
            return as_json(self._dialect.body(task, input)).encode()
        return around[0] + as_json(as_json(input)).encode() + around[1]

    def _form(self, task: Task) -> _Form:
        if (form := self._forms.get(id(task))) is None:
            if len(self._forms) >= _MOST_FORMS:
                self._forms.clear()
            form = self._forms[id(task)] = _Form(task, shape(task.output_schema), self._around(task))
        return form

    def _around(self, task: Task) -> tuple[bytes, bytes] | None:
        if not getattr(self._dialect, "says_input_as_text", False):
            return None
        parts = as_json(self._dialect.body(task, _MARK)).split(as_json(as_json(_MARK)))
        return (parts[0].encode(), parts[1].encode()) if len(parts) == 2 else None

    def _understood(self, task: Task, outcome: wire.Outcome, latency: Seconds) -> Answer:
        body, ended = outcome.body or {}, True
        if outcome.events is not None:
            body, ended = self._dialect.join(outcome.events)
        number = wire.request_id(outcome.headers, body)
        name = self._endpoint.name + (f" (request {number})" if number else "")
        if not 200 <= (outcome.status or 0) < 300:
            raise failed(outcome, name)
        reading = self._dialect.read(body)
        if outcome.kind == "answered" and not ended:
            # Its usage may be told already, but whoever cut the stream may have cut more: the worst case counts.
            reading = reading._replace(usage=None)
            outcome = outcome._replace(kind="unknown", retryable=True, problem="the stream ended before the answer did")
        if outcome.kind != "answered":
            raise failed(outcome, name, reading)
        if reading.refusal is not None:
            raise ModelRefused(
                f"{name}: {reading.refusal}",
                outcome="answered" if reading.usage else "answered_no_usage",
                usage=reading.usage,
                text=readable(reading.text),
            )
        value, problem = parse(reading.text)
        value = self._form(task).shape.unwrap(value)
        if reading.problem is not None:
            value, problem = None, reading.problem
        elif reading.finish == "truncated":  # half an answer may still be valid JSON
            value, problem = None, "the answer was cut off at max_tokens"
        elif value is None and problem is None:
            problem = "the answer is null"
        return Answer(
            output=value,
            text=readable(reading.text),
            model=readable(reading.model) or self.model,
            usage=reading.usage,
            provider_request_id=readable(number),
            finish=reading.finish,
            latency=latency,
            problem=problem,
        )


def one_text(found: Json, name: str) -> str:
    """The text, or OutcomeUnknown where an answer has none: what was asked for may have been done."""
    if isinstance(found, str) and found:
        return found
    raise OutcomeUnknown(f"the answer has no {name}")


def result(status: int, body: Json) -> wire.Outcome:
    """What became of one request in a batch, by the status and the body that it would have had on its own."""
    return wire.classify(wire.Reply(status, {}, json.dumps(body).encode()))


def unanswered(problem: str) -> wire.Outcome:
    """What became of a request in a batch that the provider did not answer, and does not charge."""
    return wire.Outcome("rejected", problem=problem)


class Batched(Hosted):
    """A hosted model that also takes batches."""

    def __init__(
        self,
        endpoint: Endpoint,
        dialect: Dialect,
        batches: Batches,
        *,
        model: str,
        max_tokens: int,
        added: int = 0,
    ) -> None:
        super().__init__(endpoint, dialect, model=model, max_tokens=max_tokens, added=added)
        self.batch_limits = batches.limits
        self._batches = batches

    async def submit(self, task: Task, name: str, inputs: Mapping[str, Json]) -> str:
        """The provider's id of a new batch that answers these inputs, each under its key."""
        # A batch has its answers written into a file: there is nothing to be streamed.
        requests = {key: _unstreamed(self._dialect.body(task, input)) for key, input in inputs.items()}
        return await self._batches.submit(self._endpoint.call, name, requests)

    async def find(self, sought: Sought) -> list[str]:
        """The batches that may be the one whose creation had a lost answer: none, it, or several."""
        return await self._batches.find(self._endpoint.call, sought)

    async def ended(self, batch: str) -> bool:
        """Whether the results of a batch can be read."""
        return await self._batches.ended(self._endpoint.call, batch)

    async def results(self, task: Task, batch: str, ids: Sequence[str]) -> dict[str, Answer | ModelError]:
        """For each of these ids the Answer, or what `answer` would have raised."""
        results = await self._batches.results(self._endpoint.call, batch, ids)
        return {key: self._result(task, results.listed.get(key, results.unlisted)) for key in ids}

    async def cancel(self, batch: str) -> None:
        """Ask the provider to end a batch early."""
        await self._batches.cancel(self._endpoint.call, batch)

    def _result(self, task: Task, outcome: wire.Outcome) -> Answer | ModelError:
        try:
            return self._understood(task, outcome, 0.0)
        except ModelError as error:
            return error


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


class _Form(NamedTuple):
    """What all requests of a task have in common."""

    task: Task  # as long as it is kept, no other one has its identity
    shape: Shape
    around: tuple[bytes, bytes] | None  # the input, as a text in JSON, stands between; None: it is built each time


def shape(schema: dict[str, Json]) -> Shape:
    """What to ask a provider for so that it answers with an object.

    >>> shape({"type": "integer"}).schema["properties"]
    {'value': {'type': 'integer'}}
    """
    if is_object(schema):
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


def turns(task: Task, input: Json) -> list[Turn]:
    """The examples as turns of a conversation, and the input as the last one."""
    found: list[Turn] = []
    for example in task.examples:
        found += [Turn("user", example["input"]), Turn("assistant", example["output"])]
    return [*found, Turn("user", input)]


def parse(text: str) -> tuple[Json, str | None]:
    """(value, None) for JSON text, also inside one ```json fence; (None, problem) for anything else.

    >>> parse('```json\\n{"label": "spam"}\\n```')
    ({'label': 'spam'}, None)
    """
    if _BEYOND.search(text) is None:
        try:
            return from_json(text, allow_inf_nan=False, cache_strings="keys"), None
        except (ValueError, TypeError):
            pass  # it gives the same value or none: not for a fence, half of a surrogate pair or 200 levels
    inside = _FENCE.fullmatch(text)
    try:
        value = _DECODER.decode(inside[1] if inside else text)
    except (ValueError, RecursionError):
        return None, "the answer is empty" if not text.strip() else "the answer is not JSON"
    return checked(value, text)


def checked(value: Json, text: str) -> tuple[Json, str | None]:
    """(value, None), or (None, problem) when a text in it is half a character, which no store and no wire can keep."""
    if (text.isascii() and "\\u" not in text) or is_utf8(json.dumps(value, ensure_ascii=False)):
        return value, None
    return None, "the answer contains half of a surrogate pair"


def readable(text: Json) -> str:
    """The text, with a question mark for what UTF-8 cannot carry; an empty one for what is no text."""
    if not isinstance(text, str):
        return ""
    return text if text.isascii() else text.encode(errors="replace").decode()


def failed(outcome: wire.Outcome, name: str, reading: Reading = Reading()) -> ModelError:  # noqa: B008 - immutable
    """The error for an attempt that brought no answer; it carries what became of the attempt and of the money.

    `reading`: what was said, and billed, until it failed.
    """
    problem = f"{name}: {outcome.problem}"
    unknown = outcome.kind not in ("not_sent", "rejected")
    kind: type[ModelError] = OutcomeUnknown if unknown else ModelUnavailable if outcome.retryable else ModelRejected
    became: Became = "not_sent" if outcome.kind == "not_sent" else "rejected"
    return (OutOfMoney if outcome.no_money else kind)(
        problem,
        outcome=("answered" if reading.usage else "unknown") if unknown else became,
        retry_after=outcome.retry_after,
        usage=reading.usage,
        text=readable(reading.text),
        retryable=outcome.retryable,
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


def mapping(value: Json) -> dict[str, Json]:
    """The value if it is an object, else an empty one: what came over a wire may have any shape."""
    return value if isinstance(value, dict) else {}


def mappings(value: Json) -> list[dict[str, Json]]:
    """The objects of a list, without what is none."""
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list | tuple) else []


def text_of(value: Json) -> str:
    """The value if it is a text, else an empty one."""
    return value if isinstance(value, str) else ""


def name_of(task: Task) -> str:
    """The task's name in the letters that providers allow for a schema or a tool."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", task.name)[:64] or "answer"


type Call = Callable[..., Awaitable[wire.Outcome]]  # Endpoint.call

_LONGEST: Seconds = 600.0  # for a file of hundreds of megabytes
_LARGEST = 512 * 2**20  # bytes of a file of results
_MOST_FORMS = 100  # tasks of one remote; whoever makes a new Task for each request must not fill the memory
_MARK = "\u2400 the input \u2400"  # stands for the input where a request is built to be taken apart
_MOST_TOKENS = 10**12  # a thousand million pages: beyond that a count is nonsense, and money would not fit the ledger
_BEYOND = re.compile(r"[0-9][eE]\+?[0-9]{3}|[0-9]{200}")  # in every text with a number beyond all floats (1e308)
_FENCE = re.compile(r"\s*```(?:json|JSON)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def _unstreamed(body: dict[str, Json]) -> dict[str, Json]:
    return {key: value for key, value in body.items() if key not in ("stream", "stream_options")}


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is beyond every float, and JSON could not say what it becomes")
    return number


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
