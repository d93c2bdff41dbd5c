"""Answers read by httptools (llhttp, the parser of Node), which the extra `gateway` brings: a tenth of what h11 costs.

What it accepts beyond h11 is refused here, so that it finds the same answer or none. (None where h11 is kinder: in lines
that end without a carriage return, and where the same length is given twice.)
"""

from __future__ import annotations

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from apprentice.connection import LONGEST_HEAD, Head, Unreadable, headers_of


class Reader:
    """See apprentice.connection.Reader. The methods `on_…` are called by the parser."""

    def __init__(self) -> None:
        self._parser = HttpResponseParser(self)
        self._endless = False  # the end of the connection is the end of the answer
        self.begin()

    def begin(self) -> None:
        self.head: Head | None = None
        self.pieces: list[bytes] = []
        self.complete = False
        self._headers: list[tuple[bytes, bytes]] = []
        self._idle = 0  # bytes that brought nothing of a body
        self._ready = False

    def feed(self, data: bytes) -> None:
        if self.complete:
            self._ready = False
            return
        before = len(self.pieces)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self._ready = False
            if not self.complete:  # else what follows the answer is no affair of whoever asked
                raise Unreadable("RemoteProtocolError") from None
        self._idle = 0 if len(self.pieces) > before else self._idle + len(data)
        if not self.complete and self._idle > LONGEST_HEAD:
            raise Unreadable("RemoteProtocolError")

    def end(self) -> None:
        if self.head is None or not (self.complete or self._endless):
            raise Unreadable("RemoteProtocolError")
        self.complete = True

    def is_ready(self) -> bool:
        return self._ready

    def on_message_begin(self) -> None:
        self._ready = False  # after a complete answer: nobody asked for another one

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head is None:  # else it comes after the body
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.head is not None:
            return
        found, self._headers = self._headers, []
        status = self._parser.get_status_code()
        if status == 101:
            raise Unreadable("nobody asked for another protocol")
        if status < 200:
            return  # the answer is still to come
        headers = headers_of(found)
        chunked = "transfer-encoding" in headers
        if chunked and any(name.lower() == b"transfer-encoding" and b"\t" in value for name, value in found):
            raise Unreadable("RemoteProtocolError")  # llhttp does not know it then, and headers_of() does
        self._endless = not chunked and "content-length" not in headers
        self.head = Head(status, headers)

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self.pieces.append(data)

    def on_message_complete(self) -> None:
        if self.head is not None and not self.complete:
            self.complete = True
            self._ready = self._parser.get_http_version() == "1.1" and self._parser.should_keep_alive()
