"""One HTTP/1.1 connection to a server, for one request after the other: h11 between a caller and the event loop's bytes."""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import h11

from apprentice.types import Seconds

_LONGEST_HEAD = 100 * 2**10  # bytes of an answer's status and headers
_MOST_UNREAD = 2**20  # bytes of an answer that wait for whoever reads it
# Servers close idle connections after five seconds and more (uvicorn: 5 s). Closing first avoids the race in which a
# request is written to a connection that the server is closing: its outcome would be unknown, which counts as spent.
_IDLE: Seconds = 4.0


class Connection(asyncio.Protocol):
    """Made by the event loop. What is wrong on the way is OSError or h11.ProtocolError; then it can only be closed."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)
        self._transport: asyncio.Transport
        self._asked = False
        self._unread = 0  # bytes that came since the last ones were read
        self._open = True
        self._full = False
        self._change: asyncio.Future[None] | None = None  # what whoever reads or writes waits for
        self._idle_since = 0.0

    async def ask(
        self, head: h11.Request, body: bytes | AsyncIterator[bytes], leaving: Callable[[], None]
    ) -> h11.Response:
        """Send a request; the head of the answer."""
        self._asked = True
        first = self._http.send(head) or b""
        leaving()
        if isinstance(body, bytes):
            data = (self._http.send(h11.Data(body)) or b"") if body else b""
            self._transport.write(b"".join((first, data, self._http.send(h11.EndOfMessage()) or b"")))
        else:
            self._transport.write(first)
            async for piece in body:
                while self._full and self._open:
                    await self._changed()
                if not self._open:
                    break  # perhaps the server said why before it closed
                self._transport.write(self._http.send(h11.Data(piece)) or b"")
            else:
                self._http.send(h11.EndOfMessage())
        while not isinstance(event := await self._event(), h11.Response):
            if not isinstance(event, h11.InformationalResponse):
                raise ConnectionError("no answer")
        return event

    async def body(self) -> AsyncIterator[bytes]:
        """The rest of the answer, piece by piece."""
        while isinstance(event := await self._event(), h11.Data):
            yield bytes(event.data)

    def ended(self) -> bool:
        """Make it ready for the next request, if it may have one; else close it."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE and not self._http.trailing_data[0]:
            self._http.start_next_cycle()
            self._asked, self._idle_since = False, time.monotonic()
        else:
            self.close()
        return not self._transport.is_closing()

    def is_fresh(self) -> bool:
        """Whether it may have another request: what there is to read now is the server's goodbye, or what nobody asked."""
        if self._transport.is_closing() or time.monotonic() - self._idle_since >= _IDLE:
            return False
        waiting = select.poll()  # select() knows no descriptor beyond 1,023
        waiting.register(self._transport.get_extra_info("socket"), select.POLLIN)
        return not waiting.poll(0)

    def close(self) -> None:
        self._transport.abort()

    async def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._unread = 0
            if not self._open:
                raise ConnectionResetError("the connection was closed")
            self._transport.resume_reading()
            await self._changed()
        return event

    async def _changed(self) -> None:
        self._change = asyncio.get_running_loop().create_future()
        try:
            await self._change
        finally:
            self._change = None

    def _tell(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    # what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._asked:
            return self.close()  # it says something that nobody asked: it would be taken for the next answer
        self._http.receive_data(data)
        self._unread += len(data)
        if self._unread > _MOST_UNREAD:
            self._transport.pause_reading()
        return self._tell()

    def eof_received(self) -> None:
        if self._asked:
            self._http.receive_data(b"")
            self._tell()

    def connection_lost(self, error: Exception | None) -> None:
        self._open = False
        self._tell()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._tell()
