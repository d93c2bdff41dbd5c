"""Anthropic's messages, as its clients speak them.

Source: https://docs.anthropic.com/en/api/messages, …/api/messages-streaming.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.responses import Response

from apprentice.gateway.answers import as_events, as_json
from apprentice.gateway.conversation import (
    MOST_MESSAGES,
    TASK,
    Body,
    Number,
    Text,
    as_text,
    choose,
    event,
    input_of,
    mapping,
    pieces,
)
from apprentice.gateway.desk import Call, Gateway, Operation
from apprentice.gateway.refusals import Refusal
from apprentice.gateway.relay import Relay
from apprentice.models import mappings
from apprentice.types import Json

_OURS = {"model", "stream", "max_tokens", "metadata", "service_tier"}


class ToolUse(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResult(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Text] | None = None
    is_error: StrictBool | None = None


type Block = Annotated[Text | ToolUse | ToolResult, Field(discriminator="type")]


class Message(Body):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(max_length=1_000)]


class Tool(Body):
    """A tool of the client. Tools of the provider's own have fees that nobody can bound."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]


class Metadata(Body):
    user_id: str | None = None


class Messages(Body):
    """A request for a message."""

    model: str = Field(min_length=1, max_length=200)
    max_tokens: int = Field(ge=1, le=10_000_000)
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    system: str | list[Text] | None = None
    stream: StrictBool | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: int | None = Field(default=None, ge=0)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: dict[str, Any] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")


class Part(Loose):
    type: str


class Counted(Loose):
    input_tokens: int
    output_tokens: int


class Written(Loose):
    """A message that was written."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Part]
    stop_reason: str | None
    stop_sequence: str | None = None
    usage: Counted


async def messages(gateway: Gateway, call: Call) -> Response:
    body: Messages = call.body
    to = choose(gateway, body.model, "anthropic")
    if isinstance(to, Relay):
        if body.max_tokens > to.remote.max_tokens:
            message = f"max_tokens: is more than the {to.remote.max_tokens:,} that are configured for the model"
            raise Refusal(400, "invalid_request", message, param="max_tokens")
        outgoing = body.model_dump(mode="json", exclude_none=True, exclude=_OURS)
        answered = await gateway.relay(call, to, to.body(outgoing, body.max_tokens))
        written = answered.output
    else:
        if body.tools:
            message = "tools: a task answers with its output, and calls no tool"
            raise Refusal(400, "invalid_request", message, param="tools")
        said = (_texts(message.content) for message in body.messages if message.role == "user")
        answered = await gateway.answer(call, to.name, input_of(to, said), param="messages")
        usage = answered.usage
        written = {
            "id": f"msg_{answered.request_id}",
            "type": "message",
            "role": "assistant",
            "model": body.model,
            "content": [{"type": "text", "text": as_text(answered.output)}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": usage.input_tokens - usage.cached_tokens,  # which it counts apart
                "output_tokens": usage.output_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": usage.cached_tokens,
            },
        }
    number = answered.request_id.encode()
    lines = [*answered.lines, (b"request-id", number), (b"x-request-id", number)]
    return as_events(_stream(written), lines) if body.stream else as_json(written, lines)


def _texts(content: str | list[Any]) -> str | list[Text]:
    return content if isinstance(content, str) else [part for part in content if isinstance(part, Text)]


def _stream(written: Json) -> str:
    """The message as the events of a stream."""
    usage = mapping(written.get("usage"))
    begun = written | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage | {"output_tokens": 0}}
    found = [event({"type": "message_start", "message": begun}, "message_start")]

    def tell(kind: str, index: int, **more: Json) -> None:
        found.append(event({"type": kind, "index": index} | more, kind))

    for index, block in enumerate(mappings(written.get("content"))):
        match block.get("type"):
            case "text":
                tell("content_block_start", index, content_block=block | {"text": ""})
                for piece in pieces(block.get("text") or ""):
                    tell("content_block_delta", index, delta={"type": "text_delta", "text": piece})
            case "tool_use":
                tell("content_block_start", index, content_block=block | {"input": {}})
                for piece in pieces(as_text(block.get("input"))):
                    tell("content_block_delta", index, delta={"type": "input_json_delta", "partial_json": piece})
            case _:
                tell("content_block_start", index, content_block=block)
        tell("content_block_stop", index)
    delta = {"stop_reason": written.get("stop_reason"), "stop_sequence": written.get("stop_sequence")}
    ended = {"type": "message_delta", "delta": delta, "usage": {"output_tokens": usage.get("output_tokens", 0)}}
    found.append(event(ended, "message_delta"))
    found.append(event({"type": "message_stop"}, "message_stop"))
    return "".join(found)


def _example(gateway: Gateway) -> Json:
    task = gateway.config.tasks[0]
    text = as_text(dict.fromkeys(task.task.input_schema.get("properties", {}), "…"))
    return {"model": f"{TASK}{task.name}", "max_tokens": 100, "messages": [{"role": "user", "content": text}]}


OPERATIONS = (
    Operation(
        "POST",
        "/v1/messages",
        "call",
        messages,
        "Ask a task (`task:NAME`) or a configured model",
        takes=Messages,
        gives=Written,
        family="anthropic",
        streams=True,
        examples=_example,
    ),
)
