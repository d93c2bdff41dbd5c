"""Anthropic's messages. The answer is the input of a tool that the model is made to call.

Source: https://docs.anthropic.com/en/api/messages, …/api/creating-message-batches and …/docs/build-with-claude/tool-use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from apprentice import wire
from apprentice.errors import InvalidInput
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
    parse,
    result,
    shape,
    system,
    text_of,
    turns,
    unanswered,
    usage_of,
)
from apprentice.types import Json, Seconds, Task

_OWN = "https://api.anthropic.com"
_VERSION = "2023-06-01"
# Anthropic puts a prompt of its own before the tools and bills it: 313 to 804 tokens, by model (its page on tool use).
_TOOL_PROMPT = 1_024
_CUT = ("max_tokens", "model_context_window_exceeded", "pause_turn")


def build(
    model: str,
    api_key: str | None = None,
    base_url: str | None = None,
    max_tokens: int = 1024,
    timeout: float = 60,
    temperature: float | None = 0,
    stream: bool = False,
    client: wire.Client | None = None,
    allow_internal: bool = False,
) -> Batched:
    """A model behind Anthropic's messages.

    `timeout`: seconds for the whole call. `temperature: null` sends none. `stream: true` has the answer sent piece by
    piece; it is still given whole. `base_url` ends before `/v1/messages`. Raises ConfigError for an address that a key
    must not be sent to.
    """
    endpoint = Endpoint(
        f"anthropic/{model}",
        base_url or _OWN,
        "/v1/messages",
        api_key=api_key,
        header="x-api-key",
        headers={"anthropic-version": _VERSION},
        timeout=timeout,
        client=client,
        allow_internal=allow_internal,
    )
    settings: dict[str, Json] = {"model": model, "max_tokens": max_tokens}
    if temperature is not None:
        settings["temperature"] = temperature
    if stream:
        settings["stream"] = True
    return Batched(endpoint, _Messages(settings), _Batches(), model=model, max_tokens=max_tokens, added=_TOOL_PROMPT)


class _Messages:
    says_input_as_text = True

    def __init__(self, settings: dict[str, Json]) -> None:
        self._settings = settings

    def body(self, task: Task, input: Json) -> dict[str, Json]:
        tool, asked = name_of(task), shape(task.output_schema)
        messages: list[Json] = []
        results: list[Json] = []  # a tool call must be followed by its result, at the start of the next user message
        for number, (role, value) in enumerate(turns(task, input)):
            if role == "user":
                messages.append({"role": role, "content": [*results, {"type": "text", "text": as_json(value)}]})
                continue
            call = {"type": "tool_use", "id": f"toolu_{number}", "name": tool, "input": asked.wrap(value)}
            messages.append({"role": role, "content": [call]})
            results = [{"type": "tool_result", "tool_use_id": call["id"], "content": "ok"}]
        return {
            **self._settings,
            "system": system(task),
            "messages": messages,
            "tools": [{"name": tool, "description": "Give the answer.", "input_schema": asked.schema}],
            "tool_choice": {"type": "tool", "name": tool, "disable_parallel_tool_use": True},
        }

    def read(self, body: dict[str, Json]) -> Reading:
        blocks = mappings(body.get("content"))
        calls = [block for block in blocks if block.get("type") == "tool_use"]
        reason = body.get("stop_reason")
        return Reading(
            text=_said(calls[0]) if calls else "".join(text_of(block.get("text")) for block in blocks),
            model=text_of(body.get("model")),
            usage=usage_of(body.get("usage"), _usage),
            finish="truncated" if reason in _CUT else "complete",
            refusal="the model declined" if reason == "refusal" else None,
        )

    def join(self, events: Sequence[Json]) -> tuple[dict[str, Json], bool]:
        body: dict[str, Json] = {}
        usage: dict[str, Json] = {}
        blocks: dict[str, dict[str, Json]] = {}
        pieces: dict[str, list[str]] = {}
        reason: Json = None
        for event in mappings(events):
            number = str(event.get("index"))
            delta = mapping(event.get("delta"))
            match event.get("type"):
                case "message_start":
                    body = mapping(event.get("message"))
                    usage = mapping(body.get("usage"))
                case "content_block_start":
                    blocks[number] = mapping(event.get("content_block"))
                    pieces[number] = []
                case "content_block_delta":
                    pieces.setdefault(number, []).append(text_of(delta.get(_PIECES.get(str(delta.get("type")), ""))))
                case "message_delta":
                    reason = delta.get("stop_reason") or reason
                    told = mapping(event.get("usage"))
                    usage = usage | {key: count for key, count in told.items() if count is not None}
        content = [_whole(blocks.get(number, {}), "".join(said)) for number, said in pieces.items() if said or reason]
        ended = reason is not None and any(event.get("type") == "message_stop" for event in mappings(events))
        # The counts at the start are those of a message that has not been written yet.
        return body | {"content": content, "stop_reason": reason, "usage": usage if reason else None}, ended


_PIECES = {"text_delta": "text", "input_json_delta": "partial_json"}


class _Batches:
    """Batches have no names here. `results_url` is not followed: where results are is known, and nobody else gets the key."""

    limits = Limits(100_000, 256_000_000)

    async def submit(self, call: Call, name: str, requests: Mapping[str, dict[str, Json]]) -> str:
        asked = {"requests": [{"custom_id": key, "params": body} for key, body in requests.items()]}
        return one_text(mapping((await call(_PATH, as_json(asked).encode())).body).get("id"), "id of the batch")

    async def find(self, call: Call, sought: Sought) -> list[str]:
        earliest = sought.since - _CLOCKS
        found: list[str] = []
        after = ""
        while True:
            page = mapping((await call(f"{_PATH}?limit=100{after}")).body)
            batches = mappings(page.get("data"))
            recent = [one for one in batches if _moment(one.get("created_at")) >= earliest]
            for one in recent:
                size = sum(count for count in mapping(one.get("request_counts")).values() if isinstance(count, int))
                if size == sought.size and one.get("id") not in sought.known:
                    found.append(text_of(one.get("id")))
            if len(recent) < len(batches) or not batches or page.get("has_more") is not True:
                return found
            after = f"&after_id={quote(text_of(batches[-1].get('id')), safe='')}"

    async def ended(self, call: Call, batch: str) -> bool:
        job = mapping((await call(f"{_PATH}/{quote(batch, safe='')}")).body)
        return job.get("processing_status") == "ended"

    async def results(self, call: Call, batch: str, ids: Sequence[str]) -> Results:
        lines = (await call(f"{_PATH}/{quote(batch, safe='')}/results", lines=True)).lines
        listed = {text_of(line.get("custom_id")): _result(mapping(line.get("result"))) for line in lines or ()}
        return Results(listed, wire.Outcome("unknown", problem="the batch has no result for it"))

    async def cancel(self, call: Call, batch: str) -> None:
        await call(f"{_PATH}/{quote(batch, safe='')}/cancel", b"{}")


_PATH = "/v1/messages/batches"
_CLOCKS: Seconds = 600.0  # how far the provider's clock and ours may be apart


def _result(told: dict[str, Json]) -> wire.Outcome:
    kind = text_of(told.get("type"))
    if kind == "succeeded":
        return result(200, told.get("message"))
    if kind in ("errored", "canceled", "expired"):  # none of these is charged
        error = mapping(mapping(told.get("error")).get("error"))
        return unanswered(" ".join(filter(None, [kind, text_of(error.get("type")), text_of(error.get("message"))])))
    return wire.Outcome("unknown", problem=f"a result of the unknown type {kind!r}")


def _moment(told: Json) -> Seconds:
    """The moment; the end of all time for what is none, so that nothing is overlooked."""
    try:
        moment = datetime.fromisoformat(text_of(told))
    except ValueError:
        return float("inf")
    return moment.timestamp() if moment.tzinfo is not None else float("inf")


def _whole(block: dict[str, Json], said: str) -> dict[str, Json]:
    """A block of a stream as it is without streaming; a tool's input that is no JSON stays as it was sent."""
    if block.get("type") != "tool_use":
        return block | {"text": text_of(block.get("text")) + said}
    if not said:
        return block
    value, problem = parse(said)
    return block | ({"partial_json": said} if problem else {"input": value})


def _said(call: dict[str, Json]) -> str:
    """The tool's input as text; that of an input which is no JSON (a number beyond all floats) will be found to be none."""
    if "partial_json" in call:
        return text_of(call["partial_json"])
    try:
        return as_json(call.get("input"))
    except InvalidInput:
        return str(call.get("input"))


def _usage(found: dict[str, Any]) -> dict[str, Any]:
    read = found.get("cache_read_input_tokens") or 0
    written = found.get("cache_creation_input_tokens") or 0
    return {
        "input_tokens": found["input_tokens"] + written + read,  # Anthropic counts them apart
        "output_tokens": found["output_tokens"],
        "cached_tokens": read,
    }
