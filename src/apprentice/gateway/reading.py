"""A request's body: read within its limits, as JSON and nothing else, into the model that the operation takes."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope

from apprentice import schemas
from apprentice.gateway import Settings
from apprentice.gateway.refusals import Refusal
from apprentice.types import Json

WHOLE = "apprentice.whole"  # an extension of ASGI: the body has come already, and nobody need watch the clock for it
_DEEPEST = schemas.MAX_DEPTH + 16  # of a body: a value may be as deep as a task's, and stands within something
_MOST_PARTS = 100_000  # arrays and objects: each takes memory a hundred times its two bytes
_MOST_COLONS = 250_000  # there is one in each member of an object, and a member takes two hundred bytes
_DRAINED = 16  # times the limit that is read and thrown away, so that a client hears why it is refused


class Heads(dict[bytes, list[str]]):
    """The header lines of one request by their names in lower case; those of one name in the order in which they came."""

    def __init__(self, lines: Iterable[tuple[bytes, bytes]]) -> None:
        super().__init__()
        for name, value in lines:
            if name in self:
                self[name].append(value.decode("latin-1"))
            else:
                self[name] = [value.decode("latin-1")]

    def all(self, name: bytes) -> Sequence[str]:
        return self.get(name, ())

    def first(self, name: bytes, default: str) -> str:
        return self[name][0] if name in self else default


async def read[B: BaseModel](scope: Scope, receive: Receive, kind: type[B], settings: Settings) -> B:
    """The body as that model. Raises Refusal: 408, 413, 415, and 400 that names the field."""
    heads: Heads = scope["apprentice.heads"]
    sort, _, parameters = heads.first(b"content-type", "").partition(";")
    if sort.strip().lower() != "application/json" or _charset(parameters) not in ("", "utf-8"):
        raise Refusal(415, "unsupported_media_type", "the body should be application/json in UTF-8")
    if heads.first(b"content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, "unsupported_encoding", "the body should not be compressed")
    told = heads.first(b"content-length", "0")
    if WHOLE in scope.get("extensions", ()):
        return valid(parsed(await _bytes(receive, told, settings.max_body)), kind)
    try:
        async with asyncio.timeout(settings.patience):
            raw = await _bytes(receive, told, settings.max_body)
    except TimeoutError:
        raise Refusal(
            408,
            "too_slow",
            f"the body did not arrive within {settings.patience:g} seconds",
            headers={"connection": "close"},
        ) from None
    return valid(parsed(raw), kind)


async def _bytes(receive: Receive, told: str, limit: int) -> bytes:
    too_large = int(told.lstrip("0") or "0") > limit if told.isascii() and told.isdigit() else False
    body, size, more = bytearray(), 0, True
    while more and size <= _DRAINED * limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "disconnected", "the client went away before its request was complete")
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        too_large = too_large or size > limit
        if too_large:
            body.clear()
        else:
            body += chunk
    if too_large:
        close = {"connection": "close"} if more else {}
        raise Refusal(413, "too_large", f"the body is larger than {limit:,} bytes", headers=close)
    return bytes(body)


def _charset(parameters: str) -> str:
    name, _, value = parameters.strip().lower().partition("=")
    return value.strip('"') if name == "charset" else ""


def parsed(raw: bytes) -> Json:
    """The JSON value in the bytes; what JSON or UTF-8 does not know, and what no honest client writes, is a Refusal.

    >>> parsed(b'{"a": 1}')
    {'a': 1}
    """
    parts = raw.count(b"[") + raw.count(b"{")
    if parts > _MOST_PARTS:
        raise Refusal(413, "too_many_parts", f"the body has more than {_MOST_PARTS:,} arrays and objects")
    if raw.count(b":") > _MOST_COLONS:
        raise Refusal(413, "too_many_parts", f"the body has more than {_MOST_COLONS:,} colons")
    try:
        value = _DECODER.decode(raw.decode())  # by ourselves, because json.loads would take UTF-16 as well
    except (ValueError, RecursionError) as error:
        problem = str(error) if isinstance(error, _NotAllowed) else "it is not JSON in UTF-8"
        raise Refusal(400, "invalid_json", f"the body cannot be used: {problem}") from None
    if parts > _DEEPEST and _depth(value) > _DEEPEST:
        raise Refusal(400, "invalid_json", f"the body cannot be used: it is nested more than {_DEEPEST} deep")
    return value


class _NotAllowed(ValueError):
    """What JSON allows, or nearly, and what is refused all the same."""


def _once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _NotAllowed("a key is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _NotAllowed(f"{name} is no number that JSON has")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise _NotAllowed("a number is too large")
    return number


def _short(digits: str) -> int:
    if len(digits) > 300:
        raise _NotAllowed("a number is too large")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite, parse_int=_short)


def _depth(value: Json) -> int:
    depth, level = 0, [value] if isinstance(value, dict | list) else []
    while level:
        depth += 1
        inside = (inner for item in level for inner in (item.values() if isinstance(item, dict) else item))
        level = [inner for inner in inside if isinstance(inner, dict | list)]  # not all: there may be a million numbers
    return depth


def valid[B: BaseModel](value: Json, kind: type[B]) -> B:
    """The value as that model. Raises Refusal that names the first field that is wrong."""
    try:
        return kind.model_validate(value, strict=True)
    except ValidationError as error:
        # Of the members of a union, the one that the value fits best is wrong in the deepest place.
        first = max(error.errors(include_url=False), key=lambda found: len(found["loc"]))
        at = schemas.path(tuple(_fields(first["loc"])))
        told = schemas.message(first)
        if first["type"] == "extra_forbidden":
            told += schemas.did_you_mean(str(first["loc"][-1]), kind.model_fields)
        raise Refusal(400, "invalid_request", schemas.said(at or "body", told), param=at or None) from None


def _fields(place: tuple[Any, ...]) -> list[str | int]:
    """The place without the names of types, which pydantic puts in for the members of a union."""
    return [
        part
        for part in place
        if isinstance(part, int) or (part.isidentifier() and part.islower() and part not in _TYPES)
    ]


_TYPES = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})
