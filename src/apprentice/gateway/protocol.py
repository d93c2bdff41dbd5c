"""HTTP/1.1 as the gateway speaks it: what may be read in two ways is refused, who is slow is let go, and nobody keeps a place.

The parser is llhttp, at its strictest, in uvicorn's protocol. Sources: RFC 9112 (framing, and what a server has to refuse),
https://llhttp.org.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextvars import Context
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from apprentice.gateway import Settings
from apprentice.gateway.reading import WHOLE
from apprentice.types import Seconds

_MOST_HEAD = 64 * 1024  # bytes of a head, of trailers, or around the pieces of a body
_MOST_WAITING = 32  # requests of a connection that sends them before it has answers
_REFUSED = "Invalid HTTP request received."
_CONTROLS = bytes({*range(32), 127} - {9})  # which are in no line of a head (RFC 9110 section 5.5)


class Patient(HttpToolsProtocol):
    """One connection, which waits only so long for the head of a request and for its answer to be taken, and makes room
    where idle clients sit."""

    patience = Settings().patience
    most = Settings().connections
    _watch: asyncio.TimerHandle | None = None
    _since: Seconds = 0.0  # while it is idle: when it began to wait for a head
    _silent = False  # nothing has come since the last answer
    _unread: asyncio.TimerHandle | None = None
    _fed = 0  # bytes since a head was whole, or a piece of a body came
    _over = False  # what comes now is not read any more
    _next: _Exchange | None = None  # begun when all that came with its head is read: its body may be there, or rubbish

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            leaves = next((one for one in self.connections if one is not self and _is_idle(one)), self)
            leaves.transport.abort()
            self.connections.discard(leaves)  # many may come before this one is gone: each needs a place of its own
        self._since = self.loop.time()
        self._watch = self.loop.call_later(self.patience, self._look)

    # --- what comes ---------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        if self._silent:
            self._silent, self._since = False, self.loop.time()
        self._fed += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self._go_on(data[stopped.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response(_REFUSED)
        if self._fed > _MOST_HEAD:
            self.send_400_response(_REFUSED)
        if self._next is not None:
            begun, self._next = self._next, None
            self._begin(begun, now=True)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        # RFC 9110 section 5.5: white space around a value is no part of it. llhttp knows no coding with a tab after it.
        value = value.strip(b" " if name == b"transfer-encoding" else b" \t")
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Raises ValueError, which is told as a 400, for what llhttp lets pass and another server may read in another way."""
        self._fed = 0
        coded = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0") or (coded and (coded != [b"chunked"] or version == "1.0")):
            raise ValueError("a framing that is not ours")
        if not self.url.startswith(b"/") or b"#" in self.url:
            raise ValueError("no path of this server")
        if len(self.pipeline) >= _MOST_WAITING:
            self._over = True
            return self.transport.abort()
        if self.parser.should_upgrade():
            return None  # nothing is begun with a request whose body llhttp leaves to another protocol
        raw_path, _, query = self.url.partition(b"?")
        path = raw_path.decode("ascii")
        self.scope |= {
            "method": self.parser.get_method().decode("ascii"),
            "http_version": version,
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers[:],  # trailers will be added to the other list
        }
        waits = not _is_idle(self)
        self.cycle = _Exchange(self, version == "1.1" and self.parser.should_keep_alive())
        if waits:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._next = self.cycle
        return None

    def on_body(self, body: bytes) -> None:
        self._fed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self.scope["extensions"] = {WHOLE: {}}
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def _should_upgrade(self) -> bool:
        return True  # so that uvicorn leaves a body alone that llhttp leaves to another protocol

    def _go_on(self, rest: bytes) -> None:
        """We speak no other protocol, and some clients offer one with each first request: the same one, without the offer."""
        method = self.parser.get_method()
        if self._over or method == b"CONNECT":
            return self.send_400_response(_REFUSED)
        lines = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        head = b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *lines, b"", b""])
        return self.data_received(head + rest)

    def send_400_response(self, msg: str) -> None:
        """Refuse what came. A request before it that is being answered still is, unless this one's body had begun; no other
        answer may look like its own."""
        if self._over:
            return
        self._over = True
        if _is_idle(self) or (self.cycle.more_body and not self.pipeline and not self.cycle.response_started):
            super().send_400_response(msg)
        elif self.cycle.more_body:
            self.transport.abort()
        else:
            self.cycle.keep_alive = False

    # --- what leaves --------------------------------------------------------------------------------------------------

    def _begin(self, exchange: RequestResponseCycle, *, now: bool) -> None:
        """Answer it, in a context of its own: that of whoever resumed reading is another request's. `now`: as far as nothing
        has to be waited for; else in a turn of its own."""
        if not self.transport.is_closing():
            task = asyncio.Task(exchange.run_asgi(self.app), loop=self.loop, context=Context(), eager_start=now)
            if not task.done():
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._silent, self._since = True, self.loop.time()  # or to wait for the rest to be taken
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._begin(self.pipeline.pop()[0], now=False)  # hundreds would be answered inside each other

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    # --- time ---------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Let go of who is late with a head, or does not take the rest before we close. One look after the other: a timer for
        each request would cost more."""
        waited = self.loop.time() - self._since if _is_idle(self) or self.transport.is_closing() else 0.0
        if waited < self.patience:
            self._watch = self.loop.call_later(self.patience - waited, self._look)
        else:
            self.transport.abort()  # closing would wait for what is still unread

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        for timer in (self._watch, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


def _is_idle(connection: Any) -> bool:
    """No request of it is being answered; half a head may have come."""
    return connection.cycle is None or connection.cycle.response_complete


class _Exchange(RequestResponseCycle):
    """One request and its answer, whose head leaves with the first piece of its body: to send is what an answer costs most.

    Source: ASGI 3.0, HTTP, section "Response Start".
    """

    def __init__(self, connection: Patient, keep_alive: bool) -> None:
        super().__init__(
            scope=connection.scope,
            transport=connection.transport,
            flow=connection.flow,
            logger=connection.logger,
            access_logger=connection.access_logger,
            access_log=False,
            default_headers=connection.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=connection.expect_100_continue,
            keep_alive=keep_alive,
            on_response=connection.on_response_complete,
        )
        self._head = b""  # what is kept back of the answer
        self._left: int | None = None  # bytes that its body still has; None: each piece says how long it is

    async def send(self, message: Any) -> None:
        """Raises RuntimeError for what is no answer in HTTP."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.start" and not self.response_started:
            self._head = self._opened(message["status"], message.get("headers", ()))
            self.response_started, self.waiting_for_100_continue = True, False
        elif kind == "http.response.body" and self.response_started and not self.response_complete:
            self._tell(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"{kind} has no place here")

    def _opened(self, status: int, given: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The head of the answer, and what it says about the body and the connection."""
        lines = [(name.lower(), value) for name, value in (*self.default_headers, *given)]
        told = dict(lines)
        if self.waiting_for_100_continue and self.more_body:
            self.keep_alive = False  # what comes next may be the body or another request (RFC 9110 section 10.1.1)
        if b"close" in told.get(b"connection", b"").lower().replace(b" ", b"").split(b","):
            self.keep_alive = False
        elif not self.keep_alive:
            lines.append((b"connection", b"close"))
        if self.scope["method"] == "HEAD" or status in (204, 304):
            self._left = 0
        elif b"content-length" in told:
            self._left = int(told[b"content-length"])
        elif b"transfer-encoding" not in told:
            lines.append((b"transfer-encoding", b"chunked"))
        head = b"".join([STATUS_LINE[status], *[b"%b: %b\r\n" % line for line in lines], b"\r\n"])
        # Each line ends with two, and so do the status and the head.
        if len(head) - len(head.translate(None, _CONTROLS)) > 2 * len(lines) + 4:
            raise RuntimeError("a line of the head is more than one")
        return head

    def _tell(self, body: bytes, more: bool) -> None:
        """Send a piece of the body; the last one ends the exchange."""
        if self.scope["method"] == "HEAD":
            body = b""
        if self._left is None:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body += b"" if more else b"0\r\n\r\n"
        else:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("a body that is not as long as its head says")
        self.transport.write(b"".join((self._head, body)))
        self._head = b""
        if not more:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()
