"""OpenAI's chat completions and its list of models, as its clients speak them.

Source: https://platform.openai.com/docs/api-reference/chat/create, …/chat-streaming and …/models/list.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.responses import JSONResponse, Response

from apprentice.config import TaskConfig
from apprentice.gateway.answers import as_events, as_json
from apprentice.gateway.conversation import (
    MOST_MESSAGES,
    TASK,
    Body,
    Number,
    StreamOptions,
    Text,
    as_text,
    choose,
    event,
    input_of,
    mapping,
    pieces,
)
from apprentice.gateway.desk import Answered, Call, Gateway, Operation
from apprentice.gateway.refusals import Refusal
from apprentice.gateway.relay import Relay
from apprentice.models import mappings
from apprentice.types import Json

_LIMITS = ("max_tokens", "max_completion_tokens")
# What says how the gateway answers, and not the model.
_OURS = {"model", "stream", "stream_options", "metadata", "store", "service_tier", *_LIMITS}


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Body):
    """A function of the client. Tools of the provider's own have fees that nobody can bound."""

    type: Literal["function"]
    function: Function


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Text], Field(max_length=1_000)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Chat(Body):
    """A request for a chat completion."""

    model: str = Field(min_length=1, max_length=200)
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    n: Literal[1] | None = None
    response_format: dict[str, Any] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logit_bias: dict[str, Number] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class Loose(BaseModel):
    """A part of an answer: what a provider adds to its format is handed on."""

    model_config = ConfigDict(extra="allow")


class Said(Loose):
    role: Literal["assistant"]
    content: str | None = None
    refusal: str | None = None


class Choice(Loose):
    index: int
    message: Said
    finish_reason: str | None


class Counted(Loose):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(Loose):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Counted | None = None


class Listed(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    type: Literal["model"] = "model"
    display_name: str
    created_at: str


class Models(BaseModel):
    """The list in OpenAI's shape and in Anthropic's, which have no field in common."""

    object: Literal["list"] = "list"
    data: list[Listed]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


async def chat(gateway: Gateway, call: Call) -> Response:
    body: Chat = call.body
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "invalid_request", "stream_options: is for streams only", param="stream_options")
    to = choose(gateway, body.model, "openai")
    if isinstance(to, Relay):
        answered = await gateway.relay(call, to, to.body(_outgoing(body), _limit(body, to)))
        completion = answered.output
    else:
        completion, answered = await _ask(gateway, call, to, body)
    lines = [*answered.lines, (b"x-request-id", answered.request_id.encode())]
    if not body.stream:
        return as_json(completion, lines)
    counted = body.stream_options is not None and body.stream_options.include_usage
    return as_events(_stream(completion, counted=counted), lines)


async def _ask(gateway: Gateway, call: Call, task: TaskConfig, body: Chat) -> tuple[dict[str, Json], Answered]:
    if body.tools:
        raise Refusal(400, "invalid_request", "tools: a task answers with its output, and calls no tool", param="tools")
    said = (message.content for message in body.messages if message.role == "user")
    answered = await gateway.answer(call, task.name, input_of(task, said), param="messages")
    usage = answered.usage
    return {
        "id": f"chatcmpl-{answered.request_id}",
        "object": "chat.completion",
        "created": int(answered.at),
        "model": body.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": as_text(answered.output), "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        },
    }, answered


def _outgoing(body: Chat) -> dict[str, Json]:
    return body.model_dump(mode="json", exclude_none=True, exclude=_OURS)


def _limit(body: Chat, to: Relay) -> int | None:
    """How many tokens the client allows. Raises Refusal for more than the configuration reserves money for."""
    given = {name: getattr(body, name) for name in _LIMITS if getattr(body, name) is not None}
    for name, limit in given.items():
        if limit > to.remote.max_tokens:
            message = f"{name}: {limit:,} is more than the {to.remote.max_tokens:,} that are configured for the model"
            raise Refusal(400, "invalid_request", message, param=name)
    return min(given.values(), default=None)


def _stream(completion: Json, *, counted: bool) -> str:
    """The completion as the events of a stream."""
    head = {key: completion[key] for key in ("id", "created", "model", "system_fingerprint") if key in completion}
    head["object"] = "chat.completion.chunk"
    empty: dict[str, Json] = {"usage": None} if counted else {}
    found: list[str] = []

    def tell(index: int, delta: dict[str, Json], reason: Json = None) -> None:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        found.append(event(head | {"choices": [choice]} | empty))

    for choice in mappings(completion.get("choices")):
        index, message = choice.get("index", 0), mapping(choice.get("message"))
        tell(index, {"role": "assistant", "content": ""})
        for part in ("content", "refusal"):
            for piece in pieces(message.get(part) or ""):
                tell(index, {part: piece})
        for number, tool in enumerate(mappings(message.get("tool_calls"))):
            tell(index, {"tool_calls": [{"index": number} | tool]})
        tell(index, {}, choice.get("finish_reason") or "stop")
    if counted:
        found.append(event(head | {"choices": [], "usage": completion.get("usage")}))
    return "".join([*found, "data: [DONE]\n\n"])


async def models(gateway: Gateway, call: Call) -> Response:
    listed = _listed(gateway)
    names = [model.id for model in listed]
    page = Models(data=listed, first_id=names[0] if names else None, last_id=names[-1] if names else None)
    return JSONResponse(page.model_dump())


async def model(gateway: Gateway, call: Call) -> Response:
    name = call.path["model"]
    for listed in _listed(gateway):
        if listed.id == name:
            return JSONResponse(listed.model_dump())
    raise Refusal(404, "model_not_found", f"no model {name!r}", param="model")


def _listed(gateway: Gateway) -> list[Listed]:
    at = datetime.datetime.fromtimestamp(gateway.started_at, datetime.UTC).isoformat(timespec="seconds")
    found = [(f"{TASK}{task.name}", "apprentice", task.description) for task in gateway.config.tasks]
    found += [(name, provider, name) for name, provider in gateway.relays.names()]
    created = int(gateway.started_at)
    return [
        Listed(id=name, created=created, owned_by=owner, display_name=shown[:200], created_at=at)
        for name, owner, shown in found
    ]


def _example(gateway: Gateway) -> Json:
    task = gateway.config.tasks[0]
    text = as_text(dict.fromkeys(task.task.input_schema.get("properties", {}), "…"))
    return {"model": f"{TASK}{task.name}", "messages": [{"role": "user", "content": text}]}


OPERATIONS = (
    Operation(
        "POST",
        "/v1/chat/completions",
        "call",
        chat,
        "Ask a task (`task:NAME`) or a configured model",
        takes=Chat,
        gives=Completion,
        family="openai",
        streams=True,
        examples=_example,
    ),
    Operation("GET", "/v1/models", "any", models, "What can be asked", gives=Models, family="openai"),
    Operation("GET", "/v1/models/{model:path}", "any", model, "One of them", gives=Listed, family="openai"),
)
