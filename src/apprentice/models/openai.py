"""OpenAI's chat completions, and every server that speaks them (vLLM, Together, Fireworks, DeepSeek, LiteLLM, …).

With `api: responses`, OpenAI's responses instead; nothing is stored there. Sources:
https://platform.openai.com/docs/api-reference/chat/create, …/responses/create, …/batch and …/guides/structured-outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from apprentice import wire
from apprentice.models import (
    Batched,
    Call,
    Endpoint,
    Limits,
    Reading,
    Results,
    Sought,
    as_json,
    mapping,
    mappings,
    name_of,
    one_text,
    result,
    shape,
    system,
    text_of,
    turns,
    unanswered,
    usage_of,
)
from apprentice.types import Json, Seconds, Task

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
) -> Batched:
    """A model behind one of OpenAI's wire formats.

    `timeout`: seconds for the whole call. `temperature: null` sends none, which reasoning models require. `stream: true`
    has the answer sent piece by piece; it is still given whole. `base_url` ends before `/chat/completions` or
    `/responses`. Raises ConfigError for an address that a key must not be sent to.
    """
    path = "/responses" if api == "responses" else "/chat/completions"
    endpoint = Endpoint(
        f"openai/{model}",
        base_url or _OWN,
        path,
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
    return Batched(endpoint, dialect, _Batches(f"/v1{path}"), model=model, max_tokens=max_tokens)


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
    says_input_as_text = True

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
    says_input_as_text = True

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


class _Batches:
    """A file of requests is sent, then a batch is made of it; its answers are in one file, its errors in another."""

    limits = Limits(50_000, 200_000_000)

    def __init__(self, url: str) -> None:
        self._url = url  # that each request would go to on its own

    async def submit(self, call: Call, name: str, requests: Mapping[str, dict[str, Json]]) -> str:
        lines = (
            as_json({"custom_id": key, "method": "POST", "url": self._url, "body": body})
            for key, body in requests.items()
        )
        boundary = f"apprentice-{name}"  # a name that nobody knew when the inputs were written
        form = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}.jsonl"\r\n'
            "Content-Type: application/jsonl\r\n\r\n" + "\n".join(lines) + f"\r\n--{boundary}--\r\n"
        )
        file = await call("/files", form.encode(), media=f"multipart/form-data; boundary={boundary}")
        asked = {
            "input_file_id": one_text(mapping(file.body).get("id"), "id of the file"),
            "endpoint": self._url,
            "completion_window": "24h",
            "metadata": {_NAME: name},
        }
        made = await call("/batches", as_json(asked).encode())
        return one_text(mapping(made.body).get("id"), "id of the batch")

    async def find(self, call: Call, sought: Sought) -> list[str]:
        after = ""
        while True:
            page = mapping((await call(f"/batches?limit=100{after}")).body)
            batches = mappings(page.get("data"))
            found = [
                text_of(one.get("id")) for one in batches if mapping(one.get("metadata")).get(_NAME) == sought.name
            ]
            oldest = batches[-1].get("created_at") if batches else None
            before = isinstance(oldest, int) and oldest < sought.since - _CLOCKS
            if found or before or not batches or page.get("has_more") is not True:
                return found
            after = f"&after={quote(text_of(batches[-1].get('id')), safe='')}"

    async def ended(self, call: Call, batch: str) -> bool:
        return (await self._batch(call, batch)).get("status") in ("completed", "expired", "cancelled", "failed")

    async def results(self, call: Call, batch: str, ids: Sequence[str]) -> Results:
        job = await self._batch(call, batch)
        status = text_of(job.get("status"))
        listed: dict[str, wire.Outcome] = {}
        for file in (job.get("output_file_id"), job.get("error_file_id")):
            if file is not None:
                lines = (await call(f"/files/{quote(text_of(file), safe='')}/content", lines=True)).lines
                listed |= {text_of(line.get("custom_id")): _result(line) for line in lines or ()}
        if status == "completed":
            return Results(listed, wire.Outcome("unknown", problem="the batch has no result for it"))
        # What was answered before a batch expired or was cancelled is listed, and only that is charged; a batch that
        # failed was not begun.
        errors = [text_of(error.get("message")) for error in mappings(mapping(job.get("errors")).get("data"))]
        return Results(listed, unanswered(f"the batch is {status}{': ' if errors else ''}{'; '.join(errors[:3])}"))

    async def cancel(self, call: Call, batch: str) -> None:
        await call(f"/batches/{quote(batch, safe='')}/cancel", b"{}")

    async def _batch(self, call: Call, batch: str) -> dict[str, Json]:
        return mapping((await call(f"/batches/{quote(batch, safe='')}")).body)


_NAME = "apprentice"  # the key of our name in a batch's metadata
_CLOCKS: Seconds = 600.0  # how far the provider's clock and ours may be apart


def _result(line: dict[str, Json]) -> wire.Outcome:
    response = line.get("response")
    if not isinstance(response, dict):
        error = mapping(line.get("error"))
        return unanswered(f"{text_of(error.get('code'))}: {text_of(error.get('message'))}")
    status = response.get("status_code")
    return result(status if isinstance(status, int) else 0, response.get("body"))


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
