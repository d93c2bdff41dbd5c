"""One HTTP/1.1 connection to a server, for one request after the other, directly on the event loop's bytes.

Requests are written here, answers are read by a Reader: h11's (`Careful`), or another one that finds the same in the same
bytes for less (`apprentice.models._httptools`).
"""

from __future__ import annotations

import asyncio
import re
import select
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple, Protocol

import h11

from apprentice.types import Seconds

LONGEST_HEAD = 100 * 2**10  # bytes of an answer's status and headers
_MOST_UNREAD = 2**20  # bytes of an answer that wait for whoever reads it
# Servers close idle connections after five seconds and more (uvicorn: 5 s). Closing first avoids the race in which a
# request is written to a connection that the server is closing: its outcome would be unknown, which counts as spent.
_IDLE: Seconds = 4.0


class Head(NamedTuple):
    """What an answer begins with. Names of headers are in lower case; values of repeated ones are joined by a comma."""

    status: int
    headers: dict[str, str]


class Unreadable(ConnectionError):
    """What came is no answer in HTTP/1.1, or one that can be read in two ways."""


class Reader(Protocol):
    """Reads the answers that come over one connection, one after the other. Raises Unreadable.

    A head is at most LONGEST_HEAD bytes long, and so is all else that is neither its answer's body nor needed for it.
    """

    head: Head | None  # None: not all of it is there
    pieces: list[bytes]  # of the body, as they came; whoever takes them leaves an empty list
    complete: bool  # nothing more belongs to the answer

    def begin(self) -> None:
        """A request is sent: from here on its answer is read."""
        ...

    def feed(self, data: bytes) -> None:
        """Bytes that came, the more and the less of them, in their order."""
        ...

    def end(self) -> None:
        """No more will come."""
        ...

    def is_ready(self) -> bool:
        """Whether another request may follow: the answer is complete, and nothing came that does not belong to it."""
        ...


def headers_of(found: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers of an answer. Raises Unreadable where it is doubtful where the body ends: RFC 9112 section 6.3."""
    headers: dict[str, str] = {}
    for name, value in found:
        key, text = name.decode("latin-1").lower(), value.strip(b" \t").decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    coding = headers.get("transfer-encoding")
    if coding is not None and (coding.lower() != "chunked" or "content-length" in headers):
        raise Unreadable("RemoteProtocolError")
    return headers


class Careful:
    """A Reader by h11, which is there wherever httpx2 is."""

    # h11 reads no answer to what it has not sent itself. What was really asked is no matter, as long as it may have a body.
    _asked = h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")])

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_HEAD)
        self.head: Head | None = None
        self.pieces: list[bytes] = []
        self.complete = False

    def begin(self) -> None:
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        self.head, self.pieces, self.complete = None, [], False
        self._http.send(self._asked)
        self._http.send(h11.EndOfMessage())

    def feed(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            while not self.complete and (event := self._http.next_event()) is not h11.NEED_DATA:
                self._found(event)
        except h11.ProtocolError as error:
            raise Unreadable(type(error).__name__) from None

    def end(self) -> None:
        if not self.complete:
            self.feed(b"")

    def is_ready(self) -> bool:
        http = self._http
        return http.our_state is h11.DONE and http.their_state is h11.DONE and not http.trailing_data[0]

    def _found(self, event: Any) -> None:
        if isinstance(event, h11.Response):
            self.head = Head(event.status_code, headers_of(event.headers))
        elif isinstance(event, h11.Data):
            self.pieces.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            self.complete = True
        elif not isinstance(event, h11.InformationalResponse):
            raise Unreadable("no answer")


def head_of(method: str, target: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """The head of a request, but for the empty line after it. Raises Unreadable for what would end a line too early, and
    UnicodeEncodeError for what is not ASCII.

    >>> head_of("GET", "/", (("host", "example.com"),))
    b'GET / HTTP/1.1\\r\\nhost: example.com\\r\\n'
    """
    lines = [f"{method} {target} HTTP/1.1"]
    sound = _NAME.fullmatch(method) and _TARGET.fullmatch(target)
    for name, value in headers:
        sound = sound and _NAME.fullmatch(name) and _VALUE.fullmatch(value)
        lines.append(f"{name}: {value}")
    head = "\r\n".join([*lines, ""]).encode("ascii")
    if not sound:
        raise Unreadable("LocalProtocolError")
    return head


# RFC 9110 sections 5.1, 5.5 and 7.1. Space at either end of a value would be lost on the way.
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET = re.compile(r"[!-~]+")
_VALUE = re.compile(r"(?:[!-~](?:[ \t!-~]*[!-~])?)?")


class Connection(asyncio.Protocol):
    """Made by the event loop. What goes wrong on the way is OSError; then it can only be closed."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._transport: Any  # asyncio.Transport, or what another event loop has in its place
        self._waiting = select.poll()  # select() knows no descriptor beyond 1,023
        self._asked = False
        self._sent = False  # the whole request was given to the transport
        self._unread = 0  # bytes that came since the last ones were taken
        self._open = True
        self._full = False
        self._error: Unreadable | None = None
        self._change: asyncio.Future[None] | None = None  # what whoever reads or writes waits for
        self._idle_since = 0.0

    async def ask(self, head: bytes, body: bytes | AsyncIterator[bytes], leaving: Callable[[], None]) -> Head:
        """Send a request; the head of the answer."""
        self._reader.begin()
        self._asked, self._sent = True, False
        leaving()
        if isinstance(body, bytes):
            self._transport.write(head + body)
            self._sent = True
        else:
            self._transport.write(head)
            async for piece in body:
                while self._full and self._open:
                    await self._changed()
                if not self._open:
                    break  # perhaps the server said why before it closed
                self._transport.write(piece)
            else:
                self._sent = True
        while (found := self._reader.head) is None:
            await self._more()
        return found

    def whole(self, limit: int) -> bytes | None:
        """The rest of the answer, where all of it is there and has no more bytes than the limit."""
        pieces = self._reader.pieces
        if not self._reader.complete or sum(map(len, pieces)) > limit:
            return None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def body(self) -> AsyncIterator[bytes]:
        """The rest of the answer, piece by piece."""
        while not self._reader.complete or self._reader.pieces:
            if pieces := self._reader.pieces:
                self._reader.pieces = []
                self._unread = 0
                yield b"".join(pieces)
            else:
                await self._more()

    def ended(self) -> bool:
        """Make it ready for the next request, if it may have one; else close it. Whether it is ready."""
        # A server that answered before it had the whole request may never read the rest, and so no other request either.
        left = self._transport.get_write_buffer_size()
        if self._sent and not left and self._error is None and self._reader.is_ready():
            self._asked, self._idle_since = False, time.monotonic()
        else:
            self.close()
        return not self._transport.is_closing()

    def is_old(self) -> bool:
        """Whether it has waited so long that the server may be closing it."""
        return time.monotonic() - self._idle_since >= _IDLE

    def is_open(self) -> bool:
        """Whether it may have another request: what there is to read now is the server's goodbye, or what nobody asked."""
        return not self._transport.is_closing() and not self._waiting.poll(0)

    def close(self) -> None:
        self._transport.abort()

    def _more(self) -> Awaitable[None]:
        """What to wait for until there is more of the answer."""
        if self._error is not None:
            raise self._error
        if not self._open:
            raise ConnectionResetError("the connection was closed")
        self._unread = 0
        self._transport.resume_reading()
        return self._changed()

    def _changed(self) -> Awaitable[None]:
        self._change = asyncio.get_running_loop().create_future()
        return self._change

    def _tell(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    # what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._waiting.register(transport.get_extra_info("socket"), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if not self._asked:
            return self.close()  # it says something that nobody asked: it would be taken for the next answer
        if self._error is None:
            try:
                self._reader.feed(data)
            except Unreadable as error:
                self._error = error
        self._unread += len(data)
        if self._unread > _MOST_UNREAD:
            self._transport.pause_reading()
        return self._tell()

    def eof_received(self) -> None:
        if self._asked and self._error is None:
            try:
                self._reader.end()
            except Unreadable as error:
                self._error = error
            self._tell()

    def connection_lost(self, error: Exception | None) -> None:
        self._open = False
        self._tell()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._tell()
