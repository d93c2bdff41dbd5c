"""Anthropic's messages. The answer is the input of a tool that the model is made to call.

Source: https://docs.anthropic.com/en/api/messages and …/docs/build-with-claude/tool-use.
"""

from __future__ import annotations

from typing import Any

from apprentice import wire
from apprentice.errors import ModelRefused
from apprentice.models import (
    Endpoint,
    as_json,
    checked,
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
    client: wire.Client | None = None,
    allow_internal: bool = False,
) -> Anthropic:
    """A model behind Anthropic's messages.

    `timeout`: seconds for the whole call. `temperature: null` sends none. `base_url` ends before `/v1/messages`. Raises
    ConfigError for an address that a key must not be sent to.
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
    return Anthropic(endpoint, model, max_tokens, {} if temperature is None else {"temperature": temperature})


class Anthropic:
    """One attempt a call. `max_tokens` and `request_bytes` bound what it can cost."""

    def __init__(self, endpoint: Endpoint, model: str, max_tokens: int, settings: dict[str, Json]) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self._endpoint = endpoint
        self._settings = settings

    def request_bytes(self, task: Task, input: Json) -> int:
        """Size of the serialised request and of the provider's own prompt: never fewer than the tokens billed."""
        return len(self._body(task, input)) + _TOOL_PROMPT

    async def answer(self, task: Task, input: Json) -> Answer:
        """The model's answer. Raises ModelError (ModelRefused with its usage) when there is none."""
        body, latency = await self._endpoint.ask(self._body(task, input))
        return self._read(task, body, latency)

    async def close(self) -> None:
        await self._endpoint.close()

    def _body(self, task: Task, input: Json) -> bytes:
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
        return as_json(
            {
                "model": self.model,
                "max_tokens": self.max_tokens,
                "system": system(task),
                "messages": messages,
                "tools": [{"name": tool, "description": "Give the answer.", "input_schema": asked.schema}],
                "tool_choice": {"type": "tool", "name": tool, "disable_parallel_tool_use": True},
                **self._settings,
            }
        ).encode()

    def _read(self, task: Task, body: dict[str, Json], latency: Seconds) -> Answer:
        usage = usage_of(body.get("usage"), _usage)
        content = body.get("content")
        blocks = [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []
        calls = [block.get("input") for block in blocks if block.get("type") == "tool_use"]
        text = "".join(block["text"] for block in blocks if isinstance(block.get("text"), str))
        reason = body.get("stop_reason")
        if reason == "refusal":
            raise ModelRefused(
                f"{self._endpoint.name}: the model declined",
                outcome="answered" if usage else "answered_no_usage",
                usage=usage,
                text=readable(text),
            )
        if calls:
            text = as_json(calls[0])
            value, problem = checked(calls[0], text)
        else:
            value, problem = parse(text) if blocks else (None, "the provider sent no content")
        value = shape(task.output_schema).unwrap(value)
        finish: FinishState = "truncated" if reason in _CUT else "complete"
        model = readable(body.get("model")) or self.model
        return settle(text, value, problem, finish=finish, usage=usage, model=model, latency=latency)


def _usage(found: dict[str, Any]) -> dict[str, Any]:
    read = found.get("cache_read_input_tokens") or 0
    written = found.get("cache_creation_input_tokens") or 0
    return {
        "input_tokens": found["input_tokens"] + written + read,  # Anthropic counts them apart
        "output_tokens": found["output_tokens"],
        "cached_tokens": read,
    }
