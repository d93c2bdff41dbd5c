"""Bytes on a socket: what may be read in two ways is refused, and what comes in a strange way is read in the right one."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import pytest
import uvicorn
from uvicorn.server import ServerState

from apprentice.gateway.protocol import Patient

HOST = "Host: localhost\r\n"
NEXT = f"GET /next HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n"
FIVE = "Content-Length: 5\r\n\r\nhello"
CHUNKED = "Transfer-Encoding: chunked\r\n\r\n"
GET = f"GET /first HTTP/1.1\r\n{HOST}"
POST = f"POST /first HTTP/1.1\r\n{HOST}"


class Seen(NamedTuple):
    path: str
    body: bytes
    headers: dict[bytes, bytes]


class Place:
    """A port, and what reached the application behind it. `gate` keeps answers back."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.seen: list[Seen] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        self.seen.append(Seen(scope["path"], body, dict(scope["headers"])))
        await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    @property
    def paths(self) -> list[str]:
        return [one.path for one in self.seen]

    async def say(self, *parts: str) -> list[str]:
        """The statuses that come back until the connection is closed. Each part is sent when the one before was read."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        got = b""
        try:
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(30):
                    for part in parts:
                        writer.write(part.encode("latin-1"))
                        await writer.drain()
                    while data := await reader.read(65_536):
                        got += data
        finally:
            writer.close()
        return re.findall(r"HTTP/1\.1 (\d+) ", got.decode())


def configured(app: Any, **given: Any) -> uvicorn.Config:
    """uvicorn's settings for our protocol, with these of its attributes changed."""
    return uvicorn.Config(
        app,
        http=type("Changed", (Patient,), given),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_level="critical",
        access_log=False,
        date_header=False,
        server_header=False,
    )


@contextlib.asynccontextmanager
async def listening(app: Any = None, **given: Any) -> AsyncIterator[Place]:
    """A place, and the application at it if it is not the place's own."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        found = Place(opened.getsockname()[1])
        served = uvicorn.Server(configured(app or found.app, **given))
        task = asyncio.create_task(served.serve(sockets=[opened]))
        while not served.started:
            await asyncio.sleep(0.01)
        yield found
        found.gate.set()
        served.should_exit = True
        await task


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    async with listening() as found:
        yield found


REFUSED = {
    "the length twice": POST + "Content-Length: 5\r\n" + FIVE,
    "two lengths": POST + "Content-Length: 6\r\n" + FIVE,
    "a list of lengths": POST + "Content-Length: 5, 5\r\n\r\nhello",
    "a length with a sign": POST + "Content-Length: +5\r\n\r\nhello",
    "a length below zero": POST + "Content-Length: -1\r\n\r\n",
    "a length in hex": POST + "Content-Length: 0x5\r\n\r\nhello",
    "no length in it": POST + "Content-Length: \r\n\r\nhello",
    "a length beyond all bounds": POST + "Content-Length: 99999999999999999999999\r\n\r\nhello",
    "a length with a space": POST + "Content-Length: 5 5\r\n\r\nhello",
    "a length and pieces": POST + "Content-Length: 5\r\n" + CHUNKED + "0\r\n\r\n",
    "pieces and a length": POST + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "compressed pieces": POST + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "pieces, compressed": POST + "Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "another coding": POST + "Transfer-Encoding: identity\r\n\r\n",
    "pieces twice": POST + "Transfer-Encoding: chunked\r\n" + CHUNKED + "0\r\n\r\n",
    "nearly pieces": POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "pieces behind a tab": POST + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "pieces before a tab": POST + "Transfer-Encoding: chunked\t\r\n\r\n0\r\n\r\n",
    "pieces in HTTP/1.0": POST.replace("1.1", "1.0") + CHUNKED + "0\r\n\r\n",
    "a space before the colon": POST + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded line": GET + "X-A: b\r\n c\r\n\r\n",
    "a folded coding": POST + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a folded first line": f"GET /first HTTP/1.1\r\n X: y\r\n{HOST}\r\n",
    "a name with a space": GET + "X A: b\r\n\r\n",
    "no name": GET + ": b\r\n\r\n",
    "no colon": GET + "abc\r\n\r\n",
    "a zero": GET + "X-A: a\x00b\r\n\r\n",
    "half a line end": GET + "X-A: a\rb: c\r\n\r\n",
    "the other half": "GET /first HTTP/1.1\nHost: localhost\n\n",
    "the other half inside": "GET /first HTTP/1.1\r\nHost: localhost\nX-A: b\r\n\r\n",
    "no version": "GET /first\r\n\r\n",
    "an old version": f"GET /first HTTP/0.9\r\n{HOST}\r\n",
    "a new version": f"GET /first HTTP/2.0\r\n{HOST}\r\n",
    "no version that there is": f"GET /first HTTP/1.2\r\n{HOST}\r\n",
    "a beginning of HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no method that there is": f"FIRST /first HTTP/1.1\r\n{HOST}\r\n",
    "another server's address": f"GET http://evil/first HTTP/1.1\r\n{HOST}\r\n",
    "no path": f"GET first HTTP/1.1\r\n{HOST}\r\n",
    "a place in a page": f"GET /first#x HTTP/1.1\r\n{HOST}\r\n",
    "a way through": f"CONNECT evil:443 HTTP/1.1\r\n{HOST}\r\n",
    "a byte that no path has": f"GET /\xe4 HTTP/1.1\r\n{HOST}\r\n",
    "a TLS hello": "\x16\x03\x01\x02\x00\x01",
}
BROKEN = {
    "no size": "zz\r\nhello\r\n",
    "a space in it": "5 \r\nhello\r\n0\r\n\r\n",
    "in C": "0x5\r\nhello\r\n0\r\n\r\n",
    "below zero": "-5\r\nhello\r\n0\r\n\r\n",
    "beyond all bounds": "fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "more than it says": "5\r\nhelloXX0\r\n\r\n",
    "half a line end": "5;a\nhello\r\n0\r\n\r\n",
    "only half line ends": "5\nhello\n0\n\n",
}


async def test_a_head_that_can_be_read_in_two_ways_is_a_400_and_the_last_word(place: Place) -> None:
    for name, request in REFUSED.items():
        assert (name, await place.say(request + NEXT), place.paths) == (name, ["400"], [])


async def test_white_space_around_a_value_is_no_part_of_it(place: Place) -> None:
    chunked = "Transfer-Encoding: chunked \r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    assert await place.say(POST + "X-A: \tb c \t\r\n" + chunked + NEXT) == ["200", "200"]
    assert place.seen[0].body == b"hello" and place.seen[0].headers[b"x-a"] == b"b c"


async def test_a_broken_piece_of_a_body_is_a_400_and_the_last_word(place: Place) -> None:
    for name, body in BROKEN.items():
        assert (name, await place.say(POST + CHUNKED + body + NEXT), place.paths) == (name, ["400"], [])


RIGHT = {
    "a length": (POST + FIVE, b"hello"),
    "pieces": (POST + "Transfer-Encoding: cHuNkEd\r\n\r\n2;a=b\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", b"hello"),
    "h2c offered": (
        POST + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n" + FIVE,
        b"hello",
    ),
    "in pieces": (POST + "Connection: Upgrade\r\nUpgrade: h2c\r\n" + CHUNKED + "5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "a socket offered": (GET + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b""),
    "GET with a body": (GET + FIVE, b"hello"),
    "a line before": (f"\r\n{GET}\r\n", b""),
}


async def test_what_is_right_is_read_whole_and_what_follows_too(place: Place) -> None:
    for name, (request, body) in RIGHT.items():
        for parts in ([request + NEXT], [request, NEXT], list(request + NEXT)):
            place.seen.clear()
            assert (name, await place.say(*parts)) == (name, ["200", "200"])
            assert [(one.path, one.body) for one in place.seen] == [("/first", body), ("/next", b"")], name


async def test_what_comes_after_a_body_is_no_header(place: Place) -> None:
    trailers = "x-api-key: k\r\nhost: evil\r\n"
    assert await place.say(f"{POST}{CHUNKED}5\r\nhello\r\n0\r\n{trailers}\r\n{NEXT}") == ["200", "200"]
    assert place.seen[0].headers == {b"host": b"localhost", b"transfer-encoding": b"chunked"}


async def test_what_is_not_understood_is_no_answer_to_what_was_asked_before(place: Place) -> None:
    place.gate.clear()
    asked = asyncio.create_task(place.say(f"{GET}\r\n", "\x00\x01"))
    while not place.seen:
        await asyncio.sleep(0.01)
    place.gate.set()
    assert await asked == ["200"]
    assert await place.say(f"{GET}\r\n\x00\x01") == ["200"]
    # Whoever sends a second one before the first is answered, and breaks it, gets neither; and neither is begun.
    assert await place.say(f"{GET}\r\n{POST}{CHUNKED}zz\r\n") == []
    assert place.paths == ["/first"] * 2


async def test_a_client_that_waits_for_permission_gets_it(place: Place) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
    writer.write(f"{POST}Expect: 100-continue\r\nContent-Length: 5\r\n\r\n".encode())
    async with asyncio.timeout(30):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello")
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
    writer.close()
    assert place.seen[0].body == b"hello"


async def test_who_waits_for_permission_and_is_refused_may_send_nothing_more() -> None:
    refused = [start((b"content-length", b"0"), status=401), piece(b"")]
    answer = await answer_to(f"{POST}Expect: 100-continue\r\nContent-Length: 5\r\n\r\n", refused)
    assert answer == b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n" + CLOSED + b"\r\n"
    async with listening(saying(refused)) as place:
        assert await place.say(f"{POST}Expect: 100-continue\r\n{FIVE}{NEXT}") == ["401", "401"]  # it has come already


_TOLD: ContextVar[str] = ContextVar("told", default="")


async def test_what_one_request_notes_in_its_context_is_not_seen_by_the_next() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(_TOLD.get())
        _TOLD.set(scope["path"])
        while (await receive())["more_body"]:
            pass
        await send(start(TWO))
        await send(piece(b"ok"))

    async with listening(app) as place:
        assert await place.say(f"{GET}\r\n" * 2 + NEXT) == ["200"] * 3
        # More than is kept of a body, so that reading pauses, and goes on when the application asks for more.
        large = f"{POST}Content-Length: 300000\r\n\r\n{'a' * 300_000}"
        assert await place.say(large, large, NEXT) == ["200"] * 3
    assert seen == [""] * 6


LONG = [f"X-{number}: {'a' * 60_000}\r\n" for number in range(16)]


ENDLESS = {
    "lines": [GET, *LONG, "\r\n"],
    "a line": [GET, "X-A: ", *LONG],
    "a path": ["GET /", *("a" * 60_000 for _ in range(16)), f" HTTP/1.1\r\n{HOST}\r\n"],
    "trailers": [POST, CHUNKED, "5\r\nhello\r\n0\r\n", *LONG, "\r\n"],
    "around a piece": [POST, CHUNKED, "5;", *("a" * 60_000 for _ in range(16)), "\r\nhello\r\n0\r\n\r\n"],
}


async def test_nobody_makes_it_keep_more_than_a_head(place: Place) -> None:
    for name, parts in ENDLESS.items():
        answered = await place.say(*parts)
        assert (name, answered in ([], ["400"]), place.paths) == (name, True, [])


async def test_who_sends_hundreds_of_requests_at_once_is_let_go(place: Place) -> None:
    place.gate.clear()
    assert await place.say(f"{GET}\r\n" * 500) == []
    assert len(place.seen) <= 1
    place.gate.set()
    assert await place.say(f"{GET}\r\n" * 30 + NEXT) == ["200"] * 31


# --- answers


def start(*lines: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": lines}


def piece(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def saying(messages: Sequence[dict[str, Any]]) -> Any:
    """An application that says this and nothing else."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


TWO = (b"content-length", b"2")
CLOSED = b"connection: close\r\n"
TOLD = {
    "at once": ([start(TWO), piece(b"ok")], b"200 OK\r\ncontent-length: 2\r\n" + CLOSED + b"\r\nok"),
    "in two": (
        [start(TWO), piece(b"o", more=True), piece(b"k")],
        b"200 OK\r\ncontent-length: 2\r\n" + CLOSED + b"\r\nok",
    ),
    "in pieces": (
        [start(), piece(b"", more=True), piece(b"hello", more=True), piece(b" you", more=True), piece(b"")],
        b"200 OK\r\n" + CLOSED + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n4\r\n you\r\n0\r\n\r\n",
    ),
    "nothing": ([start(status=204), piece(b"")], b"204 No Content\r\n" + CLOSED + b"\r\n"),
    "the last one": ([start((b"connection", b"Close"), TWO), piece(b"ok")],
                     b"200 OK\r\nconnection: Close\r\ncontent-length: 2\r\n\r\nok"),
    "two lines of one name": (
        [start((b"set-cookie", b"a\tb"), (b"set-cookie", b"\xe4"), TWO), piece(b"ok")],
        b"200 OK\r\nset-cookie: a\tb\r\nset-cookie: \xe4\r\ncontent-length: 2\r\n" + CLOSED + b"\r\nok",
    ),
}  # fmt: skip


async def answer_to(request: str, messages: Sequence[dict[str, Any]]) -> bytes:
    """Everything that comes back until the connection is closed."""
    async with listening(saying(messages)) as place, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
        writer.write(request.encode())
        try:
            return await reader.read()
        finally:
            writer.close()


async def test_an_answer_leaves_as_it_was_told_and_says_where_it_ends() -> None:
    for name, (messages, expected) in TOLD.items():
        assert (name, await answer_to(NEXT, messages)) == (name, b"HTTP/1.1 " + expected)


async def test_head_is_answered_with_a_head() -> None:
    for messages in ([start(TWO), piece(b"ok")], [start(TWO), piece(b"o", more=True), piece(b"k")]):
        answer = await answer_to(NEXT.replace("GET", "HEAD"), messages)
        assert answer == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n" + CLOSED + b"\r\n"


async def test_an_answer_that_does_not_fit_its_head_is_not_taken_for_a_whole_one() -> None:
    for body in (b"", b"a", b"abc"):
        assert await answer_to(f"{GET}\r\n", [start(TWO), piece(body)]) == b""
        assert b"ab" not in await answer_to(f"{GET}\r\n", [start(TWO), piece(b"", more=True), piece(body)])


async def test_no_line_of_a_head_begins_another_one() -> None:
    for line in [(b"x-a", b"b\r\nx-evil: c"), (b"x-a", b"b\nc"), (b"x-a\r\nx-evil", b"b"), (b"x-a", b"\x00")]:
        answer = await answer_to(f"{GET}\r\n", [start(line, TWO), piece(b"ok")])
        assert answer.startswith(b"HTTP/1.1 500 ") and b"evil" not in answer


class _Sent(asyncio.Transport):
    """A transport that notes what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = self.aborted = False

    def write(self, data: Any) -> None:
        self.sent.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True


async def test_the_head_of_an_answer_is_sent_with_its_body_and_what_follows_waits_for_nothing() -> None:
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start((b"content-length", b"6")))
        await send(piece(b"ok", more=True))
        await gate.wait()
        await send(piece(b"more", more=False))
        gate.clear()

    transport, connection = _Sent(), Patient(configured(app), ServerState(), {})
    connection.connection_made(transport)
    connection.data_received(f"{GET}\r\n".encode())
    assert transport.sent == [b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nok"]
    gate.set()
    async with asyncio.timeout(10):
        while gate.is_set():
            await asyncio.sleep(0)
    assert transport.sent[1:] == [b"more"]
    connection.connection_lost(None)


# --- time


LATE = {
    "nothing": [],
    "half a head": [GET],
    "nothing after an answer": [f"{GET}\r\n"],
    "half a head after an answer": [f"{GET}\r\n", GET],
    "half a head beside a request": [f"{GET}\r\n{GET}"],
}


async def test_who_sends_no_head_is_let_go_before_and_after_an_answer() -> None:
    async with listening(patience=0.2) as place:
        for name, parts in LATE.items():
            place.seen.clear()
            expected = ["200"] if f"{GET}\r\n" in "".join(parts) else []
            assert (name, await place.say(*parts)) == (name, expected)


async def test_an_answer_may_take_longer_than_a_head() -> None:
    async with listening(patience=0.05) as place:
        place.gate.clear()
        asked = asyncio.create_task(place.say(f"{GET}\r\n"))
        while not place.seen:
            await asyncio.sleep(0.01)
        assert await place.say() == [] == await place.say()  # others are let go meanwhile, one after the other
        assert not asked.done()
        place.gate.set()
        assert await asked == ["200"]


async def test_the_rest_of_the_last_answer_may_take_as_long_as_a_head_however_long_the_answer_took() -> None:
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await gate.wait()
        await send(start(TWO))
        await send(piece(b"ok"))

    transport, connection = _Sent(), Patient(configured(app), ServerState(), {})
    connection.patience = 0.5
    connection.connection_made(transport)
    connection.data_received(NEXT.encode())
    late = asyncio.get_running_loop().time() + 0.6
    async with asyncio.timeout(30):
        while asyncio.get_running_loop().time() < late:
            await asyncio.sleep(0.01)
        gate.set()
        while not transport.closed:
            await asyncio.sleep(0)
        connection._look()  # its time may come at any moment
        assert (transport.closed, transport.aborted) == (True, False)
        while not transport.aborted:  # for the client takes nothing
            await asyncio.sleep(0.01)
    connection.connection_lost(None)


async def test_nobody_keeps_a_place_by_not_taking_half_an_answer() -> None:
    for messages in ([start(TWO), piece(b"o", more=True), start()], [start(TWO), start()]):
        transport, connection = _Sent(), Patient(configured(saying(messages)), ServerState(), {})
        connection.patience = 0.05
        connection.connection_made(transport)
        connection.data_received(f"{GET}\r\n".encode())
        async with asyncio.timeout(30):
            while not transport.aborted:
                await asyncio.sleep(0.01)
        connection.connection_lost(None)
