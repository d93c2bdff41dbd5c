"""HTTP/1.1 as the gateway speaks it: what may be read in two ways is refused, who is slow is let go, and nobody keeps a place.

The parser is llhttp, at its strictest, in uvicorn's protocol. Sources: RFC 9112 (framing, and what a server has to refuse),
https://llhttp.org.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from apprentice.gateway import Settings
from apprentice.gateway.reading import WHOLE

_MOST_HEAD = 64 * 1024  # bytes of a head, of trailers, or around the pieces of a body
_MOST_WAITING = 32  # requests of a connection that sends them before it has answers
_REFUSED = "Invalid HTTP request received."


class Patient(HttpToolsProtocol):
    """One connection, which waits only so long for the head of a request and for its answer to be taken, and makes room
    where idle clients sit."""

    patience = Settings().patience
    most = Settings().connections
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _fed = 0  # bytes since a head was whole, or a piece of a body came
    _over = False  # what comes now is not read any more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = self._joined = _Joined(transport, self.loop.call_soon)
        if len(self.connections) > self.most:
            leaves = next((one for one in self.connections if one is not self and _is_idle(one)), self)
            leaves.transport.abort()
            self.connections.discard(leaves)  # many may come before this one is gone: each needs a place of its own
        self._wait()

    # --- what comes ---------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self._unset_keepalive_if_required()
        self._fed += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self._go_on(data[stopped.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response(_REFUSED)
        if self._fed > _MOST_HEAD:
            self.send_400_response(_REFUSED)
        if not _is_idle(self):
            self._stop()
        elif self._late is None:
            self._wait()

    def on_header(self, name: bytes, value: bytes) -> None:
        # RFC 9110 section 5.5: white space around a value is no part of it. llhttp knows no coding with a tab after it.
        super().on_header(name, value.strip(b" " if name.lower() == b"transfer-encoding" else b" \t"))

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
        self.scope["headers"] = self.headers[:]  # trailers will be added to the other list
        return super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._fed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.scope["extensions"] = {WHOLE: {}}
        super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return True  # so that nothing is begun with a request whose body llhttp leaves to another protocol

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

    def on_response_complete(self) -> None:
        self._joined.flush()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.transport.abort()  # closing waits for what is still unread

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._stop()
        self._read()
        super().connection_lost(exc)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        self._late = self.loop.call_later(self.patience, self._give_up)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up(self) -> None:
        self._late = None
        if _is_idle(self):
            self.transport.abort()


def _is_idle(connection: Any) -> bool:
    """No request of it is being answered; half a head may have come."""
    return connection.cycle is None or connection.cycle.response_complete


class _Joined(asyncio.Transport):
    """A transport that sends the head and the body of an answer at once: to send is what an answer costs most."""

    def __init__(self, inside: asyncio.Transport, soon: Callable[[Callable[[], None]], object]) -> None:
        super().__init__()
        self._inside, self._soon = inside, soon
        self._parts: list[bytes] = []

    def write(self, data: Any) -> None:
        if not self._parts:
            self._soon(self.flush)
        self._parts.append(data)

    def flush(self) -> None:
        """Send what was written. It is done by the next turn of the loop in any case."""
        if self._parts:
            whole = b"".join(self._parts)
            self._parts.clear()
            self._inside.write(whole)

    def close(self) -> None:
        self.flush()
        self._inside.close()

    def abort(self) -> None:
        self._parts.clear()
        self._inside.abort()

    def is_closing(self) -> bool:
        return self._inside.is_closing()
