"""Providers on loopback: real sockets, the provider's wire format, scripted behaviour, and a bill of their own.

    async with serve_openai([Reply({"label": "spam"}), Reply(status=429, code="rate_limit_exceeded")]) as server:
        model = plugins.build("models", "openai", model="m", base_url=server.url, allow_internal=True)

The server keeps its own account of what it would charge. In a test of money that bill is the only judge: it also counts
the answers that were cut off, that came without usage, or that nobody waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple

import h11

from apprentice.errors import ModelRejected
from apprentice.models import shape
from apprentice.types import FinishState, Json, Micros, Model, Task, Usage

type Answerer = Callable[[dict[str, Json]], Json | Reply | Awaitable[Json | Reply]]
"""The body of a request -> what the model says, or a whole Reply. May be asynchronous."""

PRICE: tuple[Micros, Micros] = (2_500_000, 10_000_000)  # micro-dollars for a million tokens: input, output
_LARGEST = 64 * 2**20  # bytes of a request


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a server. Without arguments it is an empty text with status 200.

    `content`: what the model says; a text goes out as it is, any other value as JSON. `code`: the provider's error code
    for a status that is no success. `usage`: reported instead of the true count (the bill keeps the true one); `silent`
    reports none. `raw`: the whole body, instead of the provider's format. `length`: what Content-Length claims. `wait`:
    seconds, or an event to await, before the first byte. `drip`: seconds between two bytes. `cut`: close after that
    many bytes of head and body; `reset`: close with a TCP reset. `billed`: whether it counts on the bill; None means
    when the status is a success.
    """

    content: Json = ""
    status: int = 200
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    finish: FinishState = "complete"
    usage: Usage | None = None
    silent: bool = False
    model: str | None = None
    raw: bytes | None = None
    length: int | None = None
    wait: float | asyncio.Event | None = None
    drip: float = 0.0
    cut: int | None = None
    reset: bool = False
    billed: bool | None = None


class Seen(NamedTuple):
    """One request that arrived whole, and what it cost on the server's own bill, in millionths of a micro-dollar."""

    path: str
    headers: dict[str, str]
    body: dict[str, Json]
    status: int
    usage: Usage
    charge: int


class Server:
    """A running server. `requests` grows with each request that arrived whole."""

    def __init__(self, wire: _Format, answer: Answerer, price: tuple[Micros, Micros], api_key: str | None) -> None:
        self.requests: list[Seen] = []
        self.connections = 0  # accepted so far
        self.url = ""
        self._wire = wire
        self._answer = answer
        self._price = price
        self._key = api_key
        self._open: set[asyncio.Task[None]] = set()

    @property
    def bill(self) -> Micros:
        """What the provider would charge for everything so far, in micro-dollars, rounded up once."""
        return -(-sum(seen.charge for seen in self.requests) // 1_000_000)

    @contextlib.asynccontextmanager
    async def running(self, host: str, port: int) -> AsyncIterator[Server]:
        """The server, listening until the block ends; then every connection is closed."""
        listener = await asyncio.start_server(self._connected, host, port, limit=2**20)
        bound = listener.sockets[0].getsockname()[1]
        self.url = f"http://{host}:{bound}{self._wire.base}"
        try:
            yield self
        finally:
            listener.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)
            await listener.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if (task := asyncio.current_task()) is not None:
            self._open.add(task)
            task.add_done_callback(self._open.discard)
        rest = b""
        try:
            while (got := await _receive(reader, rest)) is not None:
                request, body, rest = got
                if not await _deliver(writer, *await self._respond(request, body)):
                    break
        except (ConnectionError, h11.RemoteProtocolError, asyncio.CancelledError):
            writer.transport.abort()  # the client went away, wrote no HTTP, or the server is being closed
        finally:
            writer.close()

    async def _respond(self, request: h11.Request, raw: bytes) -> tuple[Reply, bytes]:
        headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
        body = _object(raw) or {}
        reply = self._refuse(request, headers, body)
        if reply is None:
            said = self._answer(body)
            said = await said if inspect.isawaitable(said) else said
            reply = _limited(said if isinstance(said, Reply) else Reply(said), self._wire.limit(body))
        usage = Usage(input_tokens=_tokens(raw), output_tokens=_tokens(_text(reply.content).encode()))
        billed = reply.billed if reply.billed is not None else reply.status < 300
        charge = usage.input_tokens * self._price[0] + usage.output_tokens * self._price[1] if billed else 0
        self.requests.append(Seen(request.target.decode(), headers, body, reply.status, usage, charge))
        if isinstance(reply.wait, asyncio.Event):
            await reply.wait.wait()
        elif reply.wait is not None:
            await asyncio.sleep(reply.wait)
        return reply, self._render(reply, body, usage)

    def _refuse(self, request: h11.Request, headers: dict[str, str], body: dict[str, Json]) -> Reply | None:
        if request.method != b"POST" or request.target.decode() != self._wire.base + self._wire.path:
            return Reply(status=404, code="not_found")
        if self._key is not None and self._wire.key(headers) != self._key:
            return Reply(status=401, code="invalid_api_key")
        if not isinstance(body.get("messages"), list) or not self._wire.limit(body):
            return Reply(status=400, code="invalid_request_error")
        return None

    def _render(self, reply: Reply, body: dict[str, Json], usage: Usage) -> bytes:
        if reply.raw is not None:
            return reply.raw
        if reply.status >= 300:
            return json.dumps(self._wire.error(reply.code)).encode()
        told = None if reply.silent else reply.usage or usage
        return json.dumps(self._wire.answer(body, reply, told), ensure_ascii=False).encode()


@contextlib.asynccontextmanager
async def serve_openai(
    answer: Answerer | Sequence[Json | Reply],
    *,
    price: tuple[Micros, Micros] = PRICE,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[Server]:
    """A server that speaks OpenAI's chat completions at `server.url`.

    `answer`: a function of the request's body, or a list of replies, of which the last one repeats. `price`:
    micro-dollars for a million input and output tokens. `api_key`: any other key is answered with 401.
    """
    async with Server(_OPENAI, _scripted(answer), price, api_key).running(host, port) as server:
        yield server


@contextlib.asynccontextmanager
async def serve_anthropic(
    answer: Answerer | Sequence[Json | Reply],
    *,
    price: tuple[Micros, Micros] = PRICE,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[Server]:
    """A server that speaks Anthropic's messages at `server.url`; the arguments of `serve_openai`."""
    async with Server(_ANTHROPIC, _scripted(answer), price, api_key).running(host, port) as server:
        yield server


@contextlib.asynccontextmanager
async def serve_recorded(
    model: Model, task: Task, *, price: tuple[Micros, Micros] = PRICE, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Server]:
    """A server in OpenAI's wire format that answers from another model, such as a recording.

    An input that the model rejects (it is not in the recording) is answered with 404.
    """

    async def answer(body: dict[str, Json]) -> Reply:
        try:
            said = await model.answer(task, asked(body))
        except ModelRejected:
            return Reply(status=404, code="not_in_the_recording")
        return Reply(said.text if said.output is None else shape(task.output_schema).wrap(said.output))

    async with serve_openai(answer, price=price, host=host, port=port) as server:
        yield server


def asked(body: dict[str, Json]) -> Json:
    """The input that a request of ours asks about: its last user message. Raises ValueError if that is not JSON."""
    content = body["messages"][-1]["content"]
    if isinstance(content, list):
        content = next(block["text"] for block in content if block.get("type") == "text")
    return json.loads(content)


# --- wire formats -----------------------------------------------------------------------------------------------------


class _Format(NamedTuple):
    base: str
    path: str
    key: Callable[[Mapping[str, str]], str]
    limit: Callable[[dict[str, Json]], int]
    answer: Callable[[dict[str, Json], Reply, Usage | None], dict[str, Json]]
    error: Callable[[str], dict[str, Json]]


def _openai_answer(body: dict[str, Json], reply: Reply, usage: Usage | None) -> dict[str, Json]:
    reasons = {"complete": "stop", "truncated": "length", "filtered": "content_filter", "refused": "stop"}
    text = _text(reply.content)
    refused = reply.finish == "refused"
    answer: dict[str, Json] = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": reply.model or body.get("model"),
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": None if refused else text,
                    "refusal": text if refused else None,
                },
                "finish_reason": reasons[reply.finish],
            }
        ],
    }
    if usage is not None:
        answer["usage"] = {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        }
    return answer


def _anthropic_answer(body: dict[str, Json], reply: Reply, usage: Usage | None) -> dict[str, Json]:
    reasons = {"complete": "tool_use", "truncated": "max_tokens", "filtered": "refusal", "refused": "refusal"}
    block: dict[str, Json] = {"type": "text", "text": _text(reply.content)}
    tools = body.get("tools")
    if isinstance(reply.content, dict) and isinstance(tools, list) and tools:
        block = {"type": "tool_use", "id": "toolu_0", "name": tools[0]["name"], "input": reply.content}
    reason = reasons[reply.finish]
    answer: dict[str, Json] = {
        "id": "msg_0",
        "type": "message",
        "role": "assistant",
        "model": reply.model or body.get("model"),
        "content": [block],
        "stop_reason": "end_turn" if reason == "tool_use" and block["type"] == "text" else reason,
        "stop_sequence": None,
    }
    if usage is not None:
        answer["usage"] = {
            "input_tokens": usage.input_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.output_tokens,
        }
    return answer


_OPENAI = _Format(
    base="/v1",
    path="/chat/completions",
    key=lambda headers: headers.get("authorization", "").removeprefix("Bearer "),
    limit=lambda body: body.get("max_completion_tokens") or body.get("max_tokens") or 16_384,
    answer=_openai_answer,
    error=lambda code: {"error": {"message": "scripted", "type": code, "code": code, "param": None}},
)
_ANTHROPIC = _Format(
    base="",
    path="/v1/messages",
    key=lambda headers: headers.get("x-api-key", ""),
    limit=lambda body: body.get("max_tokens") or 0,  # it demands one
    answer=_anthropic_answer,
    error=lambda code: {"type": "error", "error": {"type": code, "message": "scripted"}, "request_id": "req_0"},
)


# --- bytes ------------------------------------------------------------------------------------------------------------


async def _receive(reader: asyncio.StreamReader, rest: bytes) -> tuple[h11.Request, bytes, bytes] | None:
    """The next request, its body, and what was read beyond it; None when the client is done."""
    # h11 only reads here: an answer may be scripted to break HTTP, which h11 would refuse to write. Hence a state for
    # each request instead of one for the connection.
    connection = h11.Connection(h11.SERVER)
    if rest:
        connection.receive_data(rest)
    request: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(2**18))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _LARGEST:
                raise ConnectionError("the request is too large")
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, bytes(body), connection.trailing_data[0]
        else:
            return None


async def _deliver(writer: asyncio.StreamWriter, reply: Reply, body: bytes) -> bool:
    """Write the reply as it was scripted. Returns whether the connection may be used again."""
    headers = {"content-type": "application/json"} | dict(reply.headers)
    chunked = "transfer-encoding" in headers
    if not chunked:
        headers["content-length"] = str(len(body) if reply.length is None else reply.length)
    status = f"HTTP/1.1 {reply.status} {_PHRASES.get(reply.status, 'Status')}\r\n"
    head = status + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    data = (head.encode("latin-1") + body)[: reply.cut]
    if reply.drip:
        for position in range(len(data)):
            writer.write(data[position : position + 1])
            await writer.drain()
            await asyncio.sleep(reply.drip)
    else:
        writer.write(data)
        await writer.drain()
    if reply.reset:
        # Lingering for no time turns the close into a reset.
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    return reply.cut is None and not reply.reset and reply.length is None and not chunked


_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def _scripted(answer: Answerer | Sequence[Json | Reply]) -> Answerer:
    if callable(answer):
        return answer
    replies = list(answer)

    def next_reply(_: dict[str, Json]) -> Json | Reply:
        return replies.pop(0) if len(replies) > 1 else replies[0]

    return next_reply


def _limited(reply: Reply, most: int) -> Reply:
    """The reply cut to the tokens that the request allows, as a provider does it."""
    text = _text(reply.content).encode()
    if reply.raw is not None or _tokens(text) <= most:
        return reply
    kept: dict[str, Any] = {name: getattr(reply, name) for name in Reply.__slots__}
    return Reply(**kept | {"content": text[: most * 4].decode(errors="ignore"), "finish": "truncated"})


def _tokens(data: bytes) -> int:
    """Four bytes a token, rounded up: never more tokens than bytes."""
    return -(-len(data) // 4)


def _text(content: Json) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _object(raw: bytes) -> dict[str, Json] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
