"""Providers on loopback: real sockets, the provider's wire format, scripted behaviour, and a bill of their own.

A request that asks for a stream gets the same answer in events; one in a batch gets it when the batch ends.

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
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import unquote

import h11

from apprentice.errors import ModelRejected
from apprentice.models import shape
from apprentice.testing.batches import COUNTERS, Batching, Counter, Worked
from apprentice.testing.formats import FORMATS, Said, asked, text_of
from apprentice.types import FinishState, Json, Micros, Model, Task, Usage

__all__ = [
    "PRICE",
    "Answerer",
    "Batching",
    "Reply",
    "Seen",
    "Server",
    "asked",
    "serve_anthropic",
    "serve_google",
    "serve_openai",
    "serve_recorded",
    "serve_responses",
]

type Answerer = Callable[[dict[str, Json]], Json | Reply | Awaitable[Json | Reply]]
"""The body of a request -> what the model says, or a whole Reply. May be asynchronous."""

PRICE: tuple[Micros, Micros] = (2_500_000, 10_000_000)  # micro-dollars for a million tokens: input, output
_LARGEST = 64 * 2**20  # bytes of a request


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a server. Without arguments it is an empty text with status 200.

    `content`: what the model says; a text goes out as it is, any other value as JSON. `code`: the provider's error code
    for a status that is no success; for Google also the reason of a `finish`. `cached`: tokens of the request that are
    read from a cache, `reasoning`: tokens thought before the answer; both count. `usage`: reported instead of the true
    count (the bill keeps the true one); `silent` reports none. `raw`: the whole body, instead of the provider's format.
    `length`: what Content-Length claims. `wait`: seconds, or an event to await, before the first byte. `drip`: seconds
    between two bytes. `cut`: close after that many bytes of head and body; `reset`: close with a TCP reset. `end`: the
    body is over after that many bytes, and HTTP finds nothing wrong with it. `billed`: whether it counts on the bill;
    None means when the status is a success.

    In a stream, `piece`: characters of the content in one event. `fails`: the error `code` as an event after so many
    pieces, and nothing more.
    """

    content: Json = ""
    status: int = 200
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    finish: FinishState = "complete"
    cached: int = 0
    reasoning: int = 0
    usage: Usage | None = None
    silent: bool = False
    model: str | None = None
    raw: bytes | None = None
    length: int | None = None
    wait: float | asyncio.Event | None = None
    drip: float = 0.0
    cut: int | None = None
    reset: bool = False
    end: int | None = None
    billed: bool | None = None
    piece: int = 16
    fails: int | None = None


class Seen(NamedTuple):
    """One request that arrived whole, and what it cost on the server's own bill, in millionths of a micro-dollar.

    Tokens read from a cache cost what any input costs.
    """

    path: str
    headers: dict[str, str]
    body: dict[str, Json]
    status: int
    usage: Usage
    charge: int


class Server:
    """A running server. `requests` grows with each request that arrived whole, `batched` with each in a batch that was
    worked on, at half the price; `counter.jobs` are the batches, and `batching` says how they fare."""

    def __init__(self, name: str, answer: Answerer, price: tuple[Micros, Micros], api_key: str | None) -> None:
        wire = FORMATS[name]
        self.requests: list[Seen] = []
        self.batched: list[Seen] = []
        self.batching = Batching()
        self.counter: Counter = COUNTERS[name](wire, self._work)
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
        return -(-sum(seen.charge for seen in [*self.requests, *self.batched]) // 1_000_000)

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

    async def _respond(self, request: h11.Request, raw: bytes) -> tuple[Reply, dict[str, str], list[bytes]]:
        headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
        target = request.target.decode("latin-1")
        body = _object(raw) or {}
        if self.counter.takes(target):
            return await self._respond_of_batches(request.method.decode(), target, headers, body, raw)
        reply = self._refuse(request.method, target, headers, body)
        if reply is None:
            reply = await self._said(body)
        usage, charge = self._charged(raw, reply)
        number = len(self.requests)
        self.requests.append(Seen(target, headers, body, reply.status, usage, charge))
        if isinstance(reply.wait, asyncio.Event):
            await reply.wait.wait()
        elif reply.wait is not None:
            await asyncio.sleep(reply.wait)
        head, parts = self._render(number, reply, target, body, usage)
        return reply, self._wire.headers(number) | head | dict(reply.headers), parts

    async def _respond_of_batches(
        self, method: str, target: str, headers: dict[str, str], body: dict[str, Json], raw: bytes
    ) -> tuple[Reply, dict[str, str], list[bytes]]:
        number = len(self.requests)
        if self._key is not None and self._wire.key(headers) != self._key:
            reply = Reply(status=self._wire.wrong_key[0], code=self._wire.wrong_key[1])
        else:
            host = self.url.removesuffix(self._wire.base)
            told = await self.counter.serve(self.batching, method, target, headers, raw, host)
            raw_body = told.body if told.status < 300 else None
            reply = Reply(status=told.status, code=told.code, raw=raw_body, cut=0 if told.lost else None)
        self.requests.append(Seen(target, headers, body, reply.status, Usage(input_tokens=0, output_tokens=0), 0))
        head, parts = self._render(number, reply, target, body, self.requests[-1].usage)
        return reply, self._wire.headers(number) | head, parts

    async def _work(self, body: dict[str, Json]) -> Worked:
        """What a request in a batch comes to, and its place on the bill."""
        reply = await self._said(body)
        number = len(self.batched)
        usage, charge = self._charged(json.dumps(body, separators=(",", ":")).encode(), reply)
        self.batched.append(Seen("", {}, body, reply.status, usage, charge // 2))
        if reply.status >= 300:
            return Worked(reply.status, self._wire.error(reply.status, reply.code, number))
        told = None if reply.silent else reply.usage or usage
        model = reply.model or body.get("model") or ""
        said = Said(number, body, model, reply.content, reply.finish, reply.code, told, reply.piece)
        return Worked(reply.status, self._wire.answer(said))

    async def _said(self, body: dict[str, Json]) -> Reply:
        said = self._answer(body)
        said = await said if inspect.isawaitable(said) else said
        return _limited(said if isinstance(said, Reply) else Reply(said), self._wire.limit(body))

    def _charged(self, raw: bytes, reply: Reply) -> tuple[Usage, int]:
        """The true counts of a request and its answer, and what they cost, in millionths of a micro-dollar."""
        usage = _count(raw, reply)
        billed = reply.billed if reply.billed is not None else reply.status < 300
        charge = usage.input_tokens * self._price[0] + usage.output_tokens * self._price[1] if billed else 0
        return usage, charge

    def _refuse(self, method: bytes, target: str, headers: dict[str, str], body: dict[str, Json]) -> Reply | None:
        wire = self._wire
        turned_away = None
        if method != b"POST" or self._route(target) is None:
            turned_away = wire.unknown_path
        elif self._key is not None and wire.key(headers) != self._key:
            turned_away = wire.wrong_key
        elif not wire.is_valid(body) or not wire.limit(body):
            turned_away = wire.malformed
        return None if turned_away is None else Reply(status=turned_away[0], code=turned_away[1])

    def _route(self, target: str) -> dict[str, str | None] | None:
        match = self._wire.path.fullmatch(target) or self._wire.path.fullmatch(target.partition("?")[0])
        return None if match is None else {name: value and unquote(value) for name, value in match.groupdict().items()}

    def _render(
        self, number: int, reply: Reply, target: str, body: dict[str, Json], usage: Usage
    ) -> tuple[dict[str, str], list[bytes]]:
        """The head's part on the body, and the body: several parts if it is a stream."""
        wire = self._wire
        plain = {"content-type": "application/json"}
        if reply.raw is not None:
            return plain, [reply.raw]
        if reply.status >= 300:
            return plain, [json.dumps(wire.error(reply.status, reply.code, number)).encode()]
        route = self._route(target) or {}
        told = None if reply.silent else reply.usage or usage
        model = reply.model or route.get("model") or body.get("model") or ""
        said = Said(number, body, model, reply.content, reply.finish, reply.code, told, reply.piece)
        if not (route.get("stream") or body.get("stream") is True):
            return plain, [json.dumps(wire.answer(said), ensure_ascii=False).encode()]
        events = wire.stream(said)
        sent = [*events.opening, *events.pieces, *events.closing]
        if reply.fails is not None:
            sent = [*events.opening, *events.pieces[: reply.fails], wire.fault(reply.code, number)]
        return {"content-type": wire.media, "transfer-encoding": "chunked"}, wire.frames(sent)


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
    async with Server("openai", _scripted(answer), price, api_key).running(host, port) as server:
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
    async with Server("anthropic", _scripted(answer), price, api_key).running(host, port) as server:
        yield server


@contextlib.asynccontextmanager
async def serve_responses(
    answer: Answerer | Sequence[Json | Reply],
    *,
    price: tuple[Micros, Micros] = PRICE,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[Server]:
    """A server that speaks OpenAI's responses at `server.url`; the arguments of `serve_openai`."""
    async with Server("responses", _scripted(answer), price, api_key).running(host, port) as server:
        yield server


@contextlib.asynccontextmanager
async def serve_google(
    answer: Answerer | Sequence[Json | Reply],
    *,
    price: tuple[Micros, Micros] = PRICE,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[Server]:
    """A server that speaks Gemini's generateContent below `server.url`, at `/v1beta/models/MODEL:generateContent`.

    The arguments of `serve_openai`; a wrong key is answered with 400, as Google does.
    """
    async with Server("google", _scripted(answer), price, api_key).running(host, port) as server:
        yield server


@contextlib.asynccontextmanager
async def serve_recorded(
    model: Model,
    task: Task,
    *,
    format: str = "openai",
    price: tuple[Micros, Micros] = PRICE,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[Server]:
    """A server that answers from another model, such as a recording.

    `format`: openai, responses, anthropic or google. An input that the model rejects (it is not in the recording) is
    answered with 404, a last turn that is no JSON with 400.
    """

    async def answer(body: dict[str, Json]) -> Reply:
        try:
            said = await model.answer(task, asked(body))
        except ModelRejected:
            return Reply(status=404, code="not_in_the_recording")
        except ValueError:
            return Reply(status=400, code="not_json")
        return Reply(said.text if said.output is None else shape(task.output_schema).wrap(said.output))

    async with Server(format, answer, price, None).running(host, port) as server:
        yield server


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


async def _deliver(writer: asyncio.StreamWriter, reply: Reply, headers: dict[str, str], parts: list[bytes]) -> bool:
    """Write the reply as it was scripted. Returns whether the connection may be used again."""
    if reply.end is not None:
        parts = [b"".join(parts)[: reply.end]]
    by_hand = "transfer-encoding" in reply.headers
    if reply.length is not None or "transfer-encoding" not in headers:
        headers.pop("transfer-encoding", None)
        headers["content-length"] = str(sum(map(len, parts)) if reply.length is None else reply.length)
    elif not by_hand:
        parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in [*filter(None, parts), b""]]
    status = f"HTTP/1.1 {reply.status} {_PHRASES.get(reply.status, 'Status')}\r\n"
    head = status + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    data = b"".join([head.encode("latin-1"), *parts])[: reply.cut]
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
    return reply.cut is None and not reply.reset and reply.length is None and not by_hand


_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def _scripted(answer: Answerer | Sequence[Json | Reply]) -> Answerer:
    if callable(answer):
        return answer
    replies = list(answer)

    def next_reply(_: dict[str, Json]) -> Json | Reply:
        return replies.pop(0) if len(replies) > 1 else replies[0]

    return next_reply


def _limited(reply: Reply, most: int) -> Reply:
    """The reply cut to the tokens that the request allows, as a provider does it; thoughts come first."""
    text = text_of(reply.content).encode()
    if reply.raw is not None or _tokens(text) + reply.reasoning <= most:
        return reply
    reasoning = min(reply.reasoning, most)
    kept = text[: (most - reasoning) * 4].decode(errors="ignore")
    return replace(reply, content=kept, reasoning=reasoning, finish="truncated")


def _count(request: bytes, reply: Reply) -> Usage:
    """What the request and its answer really are, in tokens."""
    asked_for = _tokens(request)
    return Usage(
        input_tokens=asked_for,
        output_tokens=_tokens(text_of(reply.content).encode()) + reply.reasoning,
        cached_tokens=min(reply.cached, asked_for),
        reasoning_tokens=reply.reasoning,
    )


def _tokens(data: bytes) -> int:
    """Four bytes a token, rounded up: never more tokens than bytes."""
    return -(-len(data) // 4)


def _object(raw: bytes) -> dict[str, Json] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
