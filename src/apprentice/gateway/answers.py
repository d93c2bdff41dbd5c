"""What a client is answered when all went well, made in as few steps as there can be: it is most of what the gateway sends."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from apprentice.gateway import HEADER

type Lines = list[tuple[bytes, bytes]]
"""Header lines, as they are sent."""

_JSON, _EVENTS = b"application/json", b"text/event-stream; charset=utf-8"


class Answer(Response):
    """A 200 with these bytes and lines, which starlette need not look at."""

    def __init__(self, body: bytes, lines: Lines, media: bytes) -> None:
        self.status_code, self.background, self.body = 200, None, body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", media), *lines]


def as_json(value: Any, lines: Lines) -> Answer:
    """The value as JSON. Of numbers that JSON does not have, which a provider may send as 1e999, nothing is left but null."""
    return Answer(to_json(value, inf_nan_mode="null"), lines, _JSON)


def as_events(text: str, lines: Lines) -> Answer:
    """A stream of events that is complete already."""
    return Answer(text.encode(), lines, _EVENTS)


def line(name: str, value: str) -> tuple[bytes, bytes]:
    """One of our own header lines."""
    return f"{HEADER}{name}".encode(), value.encode("latin-1")
