"""What a client is answered when all went well, made in as few steps as there can be: it is most of what the gateway sends."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from apprentice.gateway import HEADER
from apprentice.types import Record, Result

type Lines = list[tuple[bytes, bytes]]
"""Header lines, as they are sent."""

_JSON, _EVENTS = b"application/json", b"text/event-stream; charset=utf-8"
_REQUEST, _SOURCE, _PHASE, _COST, VERSION, CONFIDENCE = (
    f"{HEADER}{name}".encode() for name in ("request-id", "source", "phase", "cost-usd", "version", "confidence")
)


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


def lines_of(made: Result | Record, source: str) -> Lines:
    """Our own header lines, which say where an answer comes from."""
    return [
        (_REQUEST, made.request_id.encode("latin-1")),
        (_SOURCE, source.encode("latin-1")),
        (_PHASE, made.decision.phase.encode("latin-1")),
        (_COST, b"%.6f" % (made.cost / 1e6)),
    ]
