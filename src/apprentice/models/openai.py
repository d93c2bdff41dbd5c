"""OpenAI's chat completions, and every server that speaks them (vLLM, Together, Fireworks, DeepSeek, LiteLLM, …).

Source: https://platform.openai.com/docs/api-reference/chat/create and …/guides/structured-outputs.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from apprentice import wire
from apprentice.errors import ModelRefused
from apprentice.models import (
    Endpoint,
    as_json,
    name_of,
    parse,
    readable,
    settle,
    shape,
    system,
    turns,
    usage_of,
)
from apprentice.types import Answer, FinishState, Json, Seconds, Task

_OWN = "https://api.openai.com/v1"
# These hosts know max_completion_tokens, and their reasoning models take nothing else. Other servers are sent the older
# max_tokens: one that ignored a name it does not know would write without a limit.
_NEW_NAMES = ("openai.com", "openai.azure.com")


def build(
    model: str,
    api_key: str | None = None,
    base_url: str | None = None,
    max_tokens: int = 1024,
    timeout: float = 60,
    temperature: float | None = 0,
    client: wire.Client | None = None,
    allow_internal: bool = False,
) -> OpenAI:
    """A model behind OpenAI's wire format.

    `timeout`: seconds for the whole call. `temperature: null` sends none, which reasoning models require. `base_url`
    ends before `/chat/completions`. Raises ConfigError for an address that a key must not be sent to.
    """
    endpoint = Endpoint(
        f"openai/{model}",
        base_url or _OWN,
        "/chat/completions",
        api_key=api_key,
        header="authorization",
        scheme="Bearer ",
        timeout=timeout,
        client=client,
        allow_internal=allow_internal,
    )
    host = urlsplit(base_url or _OWN).hostname or ""
    own = any(host == name or host.endswith(f".{name}") for name in _NEW_NAMES)
    settings: dict[str, Json] = {"max_completion_tokens" if own else "max_tokens": max_tokens}
    if temperature is not None:
        settings["temperature"] = temperature
    return OpenAI(endpoint, model, max_tokens, settings)


class OpenAI:
    """One attempt a call. `max_tokens` and `request_bytes` bound what it can cost."""

    def __init__(self, endpoint: Endpoint, model: str, max_tokens: int, settings: dict[str, Json]) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self._endpoint = endpoint
        self._settings = settings

    def request_bytes(self, task: Task, input: Json) -> int:
        """Size of the serialised request: no tokenizer makes more tokens than there are bytes."""
        return len(self._body(task, input))

    async def answer(self, task: Task, input: Json) -> Answer:
        """The model's answer. Raises ModelError (ModelRefused with its usage) when there is none."""
        body, latency = await self._endpoint.ask(self._body(task, input))
        return self._read(task, body, latency)

    async def close(self) -> None:
        await self._endpoint.close()

    def _body(self, task: Task, input: Json) -> bytes:
        asked = shape(task.output_schema)
        messages = [{"role": "system", "content": system(task)}]
        for role, value in turns(task, input):
            messages.append({"role": role, "content": as_json(asked.wrap(value) if role == "assistant" else value)})
        form = {"name": name_of(task), "schema": asked.schema, "strict": is_strict(asked.schema)}
        return as_json(
            {
                "model": self.model,
                "messages": messages,
                "response_format": {"type": "json_schema", "json_schema": form},
                **self._settings,
            }
        ).encode()

    def _read(self, task: Task, body: dict[str, Json], latency: Seconds) -> Answer:
        usage = usage_of(body.get("usage"), _usage)
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        message = choice.get("message")
        message = message if isinstance(message, dict) else {}
        text = message.get("content")
        text = text if isinstance(text, str) else ""
        reason = choice.get("finish_reason")
        refusal = readable(message.get("refusal"))
        if refusal or reason == "content_filter":
            raise ModelRefused(
                f"{self._endpoint.name}: " + ("the model declined" if refusal else "stopped by the content filter"),
                outcome="answered" if usage else "answered_no_usage",
                usage=usage,
                text=refusal or readable(text),
            )
        value, problem = parse(text) if choice else (None, "the provider sent no choice")
        value = shape(task.output_schema).unwrap(value)
        finish: FinishState = "truncated" if reason == "length" else "complete"
        model = readable(body.get("model")) or self.model
        return settle(text, value, problem, finish=finish, usage=usage, model=model, latency=latency)


def is_strict(schema: Any) -> bool:
    """Whether OpenAI can promise this schema: its `strict` mode allows only some keywords, and demands closed objects.

    >>> is_strict({"type": "object", "properties": {}, "required": [], "additionalProperties": False})
    True
    >>> is_strict({"type": "object"})
    False
    """
    if not isinstance(schema, dict) or set(schema) - _STRICT:
        return False
    if schema.get("type") == "object" or "properties" in schema:
        properties = schema.get("properties", {})
        if schema.get("additionalProperties") is not False or set(schema.get("required", ())) != set(properties):
            return False
    elif not set(schema) & {"type", "enum", "const", "anyOf", "$ref"}:
        return False  # "anything" is not a shape it can promise
    if schema.get("type") == "array" and "items" not in schema:
        return False
    inner = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values(), *schema.get("anyOf", ())]
    return all(is_strict(part) for part in [*inner, *([schema["items"]] if "items" in schema else [])])


_STRICT = frozenset(
    {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref", "$defs"}
    | {"title", "description", "pattern", "format", "multipleOf", "minItems", "maxItems"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
)


def _usage(found: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = found["prompt_tokens"], found["completion_tokens"]
    # Some compatible servers leave the reasoning out of `completion_tokens`; it is in the total, and it is billed.
    total = found.get("total_tokens") or 0
    return {
        "input_tokens": prompt,
        "output_tokens": max(completion, total - prompt),
        "cached_tokens": (found.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        "reasoning_tokens": (found.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0,
    }
