"""OpenAI's chat completions, and every server that speaks them (vLLM, Together, Fireworks, DeepSeek, LiteLLM, …).

With `api: responses`, OpenAI's responses instead; nothing is stored there. Sources:
https://platform.openai.com/docs/api-reference/chat/create, …/responses/create and …/guides/structured-outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from apprentice import wire
from apprentice.models import (
    Endpoint,
    Hosted,
    Reading,
    as_json,
    mapping,
    mappings,
    name_of,
    shape,
    system,
    text_of,
    turns,
    usage_of,
)
from apprentice.types import Json, Task

_OWN = "https://api.openai.com/v1"
# These hosts know max_completion_tokens, and their reasoning models take nothing else. Other servers are sent the older
# max_tokens: one that ignored a name it does not know would write without a limit.
_NEW_NAMES = ("openai.com", "openai.azure.com")

# Why a text ended before its end, as the servers of this format say it; `length` is max_tokens.
_CUT = frozenset({"length", "model_length", "max_tokens", "insufficient_system_resource", "abort", "error"})
_FINAL = ("response.completed", "response.incomplete", "response.failed")


def build(
    model: str,
    api_key: str | None = None,
    base_url: str | None = None,
    max_tokens: int = 1024,
    timeout: float = 60,
    temperature: float | None = 0,
    stream: bool = False,
    api: Literal["chat", "responses"] = "chat",
    client: wire.Client | None = None,
    allow_internal: bool = False,
) -> Hosted:
    """A model behind one of OpenAI's wire formats.

    `timeout`: seconds for the whole call. `temperature: null` sends none, which reasoning models require. `stream: true`
    has the answer sent piece by piece; it is still given whole. `base_url` ends before `/chat/completions` or
    `/responses`. Raises ConfigError for an address that a key must not be sent to.
    """
    endpoint = Endpoint(
        f"openai/{model}",
        base_url or _OWN,
        "/responses" if api == "responses" else "/chat/completions",
        api_key=api_key,
        header="authorization",
        scheme="Bearer ",
        timeout=timeout,
        client=client,
        allow_internal=allow_internal,
    )
    settings: dict[str, Json] = {"model": model}
    if temperature is not None:
        settings["temperature"] = temperature
    if stream:
        settings["stream"] = True
    if api == "responses":
        dialect: _Responses | _Chat = _Responses(settings | {"max_output_tokens": max_tokens, "store": False})
    else:
        if stream:
            settings["stream_options"] = {"include_usage": True}
        host = urlsplit(base_url or _OWN).hostname or ""
        own = any(host == name or host.endswith(f".{name}") for name in _NEW_NAMES)
        dialect = _Chat(settings | {"max_completion_tokens" if own else "max_tokens": max_tokens})
    return Hosted(endpoint, dialect, model=model, max_tokens=max_tokens)


def _form(task: Task) -> dict[str, Json]:
    schema = shape(task.output_schema).schema
    return {"name": name_of(task), "schema": schema, "strict": is_strict(schema)}


def _conversation(task: Task, input: Json) -> list[Json]:
    wrap = shape(task.output_schema).wrap
    return [
        {"role": role, "content": as_json(wrap(value) if role == "assistant" else value)}
        for role, value in turns(task, input)
    ]


class _Chat:
    def __init__(self, settings: dict[str, Json]) -> None:
        self._settings = settings

    def body(self, task: Task, input: Json) -> dict[str, Json]:
        return {
            **self._settings,
            "messages": [{"role": "system", "content": system(task)}, *_conversation(task, input)],
            "response_format": {"type": "json_schema", "json_schema": _form(task)},
        }

    def read(self, body: dict[str, Json]) -> Reading:
        choice = next(iter(mappings(body.get("choices"))), {})
        message = mapping(choice.get("message"))
        text, declined = text_of(message.get("content")), text_of(message.get("refusal"))
        reason = text_of(choice.get("finish_reason"))
        refusal = "the model declined" if declined else "stopped by the content filter"
        return Reading(
            text=declined or text,
            model=text_of(body.get("model")),
            usage=usage_of(body.get("usage"), _chat_usage),
            finish="truncated" if reason in _CUT else "complete",
            refusal=refusal if declined or reason == "content_filter" else None,
            problem=f"the answer was cut off: {reason}" if reason in _CUT and reason != "length" else None,
        )

    def join(self, events: Sequence[Json]) -> tuple[dict[str, Json], bool]:
        body: dict[str, Json] = {}
        usage: Json = None
        said: dict[str, list[str]] = {"content": [], "refusal": []}
        reason: Json = None
        for event in mappings(events):
            body |= {key: event[key] for key in ("id", "model") if event.get(key)}
            usage = event.get("usage") or usage
            for choice in mappings(event.get("choices")):
                if choice.get("index", 0) == 0:  # one choice is asked for; others may be sent in between all the same
                    for part, pieces in said.items():
                        pieces.append(text_of(mapping(choice.get("delta")).get(part)))
                    reason = choice.get("finish_reason") or reason
        message = {part: "".join(pieces) for part, pieces in said.items()}
        # Some servers count along from event to event: before the end, that is not yet what is billed.
        body |= {"choices": [{"message": message, "finish_reason": reason}], "usage": usage if reason else None}
        return body, reason is not None and "[DONE]" in events


class _Responses:
    def __init__(self, settings: dict[str, Json]) -> None:
        self._settings = settings

    def body(self, task: Task, input: Json) -> dict[str, Json]:
        return {
            **self._settings,
            "instructions": system(task),
            "input": _conversation(task, input),
            "text": {"format": {"type": "json_schema", **_form(task)}},
        }

    def read(self, body: dict[str, Json]) -> Reading:
        messages = [item for item in mappings(body.get("output")) if item.get("type") == "message"]
        parts = [part for message in messages for part in mappings(message.get("content"))]
        text, declined = ("".join(text_of(part.get(kind)) for part in parts) for kind in ("text", "refusal"))
        status = text_of(body.get("status"))
        reason = text_of(mapping(body.get("incomplete_details")).get("reason"))
        refusal = "the model declined" if declined else "stopped by the content filter"
        cut = None if reason == "max_output_tokens" else f"the answer was cut off: {reason or status or 'no status'}"
        return Reading(
            text=declined or text,
            model=text_of(body.get("model")),
            usage=usage_of(body.get("usage"), _responses_usage),
            finish="complete" if status == "completed" else "truncated",
            refusal=refusal if declined or reason == "content_filter" else None,
            problem=None if status == "completed" else cut,
        )

    def join(self, events: Sequence[Json]) -> tuple[dict[str, Json], bool]:
        body: dict[str, Json] = {}
        said: list[str] = []
        for event in mappings(events):
            if isinstance(event.get("response"), dict):
                body = event["response"]
            if event.get("type") in _FINAL:
                return body, True
            if event.get("type") == "response.output_text.delta":
                said.append(text_of(event.get("delta")))
        content = [{"type": "output_text", "text": "".join(said)}]
        return body | {"output": [{"type": "message", "content": content}], "usage": None}, False


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


def _chat_usage(found: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = found["prompt_tokens"], found["completion_tokens"]
    # Some compatible servers leave the reasoning out of `completion_tokens`; it is in the total, and it is billed.
    total = found.get("total_tokens") or 0
    return {
        "input_tokens": prompt,
        "output_tokens": max(completion, total - prompt),
        "cached_tokens": (found.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        "reasoning_tokens": (found.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0,
    }


def _responses_usage(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": found["input_tokens"],
        "output_tokens": found["output_tokens"],
        "cached_tokens": (found.get("input_tokens_details") or {}).get("cached_tokens") or 0,
        "reasoning_tokens": (found.get("output_tokens_details") or {}).get("reasoning_tokens") or 0,
    }
