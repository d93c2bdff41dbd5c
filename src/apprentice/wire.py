"""The one HTTP boundary: one attempt of one call, and what became of it.

`send` makes exactly one attempt and always returns an Outcome; it raises nothing but the caller's own cancellation.
What became of it is read off the status and the provider's error code, never off prose, because money hangs on it:

    not_sent   no byte of the request left this machine (address, DNS, TCP, TLS, no free connection)
    rejected   the provider turned the request away before a model worked on it
    answered   a JSON object, or a stream of them, came back with a 2xx status; its usage says what it cost
    unknown    the request left, and nobody knows whether it was worked on and billed

A stream of server-sent events is read whole, within the same deadline and size limit, and handed on event by event.
Whether it came to its proper end only its format can say: that belongs to who reads it.

Redirects are not followed, the environment's proxies and certificate files are ignored, TLS is always verified, and an
internal address is never connected to unless that was allowed. The connection is made to the very address that was
checked, so that a name that resolves differently a moment later changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import math
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

import httpx2
from pydantic_core import from_json

from apprentice import deadlines
from apprentice.connection import Careful, Connection, Reader, head_of
from apprentice.errors import ConfigError
from apprentice.types import Json, Seconds

MAX_BODY = 16 * 2**20  # bytes of an answer after decompression; a structured answer is thousands of times smaller
_PIECE = 2**20  # bytes of a file that is sent
_SHORTEST_SECRET = 8
_LONGEST_RETRY_AFTER: Seconds = 86_400.0


class Request(NamedTuple):
    """One request. `timeout` is the total time until the last byte; `secret` is taken out of what comes back.

    `free`: error statuses that this provider documents as not charged, beyond those that nobody charges for. `lines`: a
    success is a file of JSON lines. `file`: is sent piece by piece instead of `body`. `tell`: is given each line of a
    success as it comes; then only the last line is kept, and `timeout` is the longest silence between two of them.
    """

    url: str
    headers: Mapping[str, str]
    body: bytes
    timeout: Seconds
    secret: str = ""
    limit: int = MAX_BODY
    free: frozenset[int] = frozenset()
    method: Literal["POST", "GET"] = "POST"
    lines: bool = False
    file: Path | None = None
    tell: Callable[[bytes], None] | None = None

    def __repr__(self) -> str:  # no key, and no word of what is asked
        return f"Request({self.method} {self.url})"


class Reply(NamedTuple):
    """What came back. Names of headers are in lower case; values of repeated headers are joined by a comma."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@runtime_checkable
class Client(Protocol):
    """Exchanges bytes with a server. A faster implementation fits here.

    `exchange` calls `leaving()` before the first byte of the request is handed to the network: until then the attempt
    counts as not sent. It reads at most `request.limit` bytes of the body, follows no redirect, and raises OSError for
    whatever goes wrong: Blocked for an address that must not be reached, TooLarge for a body over the limit. It
    sends `request.file` where there is one, hands each line of a success to `request.tell`, and replies with the last.
    """

    async def exchange(self, request: Request, leaving: Callable[[], None]) -> Reply: ...

    async def close(self) -> None: ...


class Blocked(OSError):
    """The address, or the certificate it presents, must not be trusted with a request."""


class TooLarge(OSError):
    """The answer is larger than the limit."""


type Kind = Literal["not_sent", "rejected", "answered", "unknown"]


class Outcome(NamedTuple):
    """What became of one attempt. `body`: the JSON object that came back, if one did. `problem`: what was wrong.

    `events`: the data of a stream's events up to the first that tells of a failure: JSON objects, and the text "[DONE]".
    `no_money`: the account is empty or at its limit, so that waiting for minutes does not help. `lines`: the objects of a
    file of JSON lines, where one was asked for.
    """

    kind: Kind
    retryable: bool = False
    status: int | None = None
    headers: Mapping[str, str] = {}
    body: dict[str, Json] | None = None
    retry_after: Seconds | None = None
    problem: str | None = None
    events: tuple[Json, ...] | None = None
    no_money: bool = False
    lines: tuple[dict[str, Json], ...] | None = None


async def send(client: Client, request: Request) -> Outcome:
    """What became of one attempt. The deadline of the request holds, whatever the server does meanwhile."""
    left = False

    def leaving() -> None:
        nonlocal left
        left = True

    limit, watch = asyncio.timeout(None), deadlines.here()
    try:
        async with limit:
            watch.put(limit, request.timeout)
            reply = await client.exchange(_told_in_time(request, limit, watch), leaving)
    except Blocked as error:
        return Outcome("not_sent", problem=str(error))
    except TimeoutError:
        return Outcome("unknown" if left else "not_sent", True, problem=f"no answer within {request.timeout:g} s")
    except OSError as error:
        # Only the kind of the failure is told: some libraries put addresses and headers into their messages.
        return Outcome("unknown" if left else "not_sent", True, problem=_told(error))
    finally:
        watch.drop(limit)
    reply = _without(reply, request.secret)
    return _file(reply) if request.lines and 200 <= reply.status < 300 else classify(reply, request.free)


def _told_in_time(request: Request, limit: asyncio.Timeout, watch: deadlines.Watch) -> Request:
    """The same request; each line that is told puts the deadline off, and has no key in it."""
    tell = request.tell
    if tell is None:
        return request

    def told(line: bytes) -> None:
        watch.put(limit, request.timeout)
        tell(_clean(line, request.secret))

    return request._replace(tell=told)


def classify(reply: Reply, free: frozenset[int] = frozenset()) -> Outcome:
    """The outcome table: what a status and an error code say about money, and whether trying again may help.

    Sources: the error pages of OpenAI, Anthropic and Google. A 5xx is `unknown` because hardly a provider says that it
    is free: except where `free` has its status, or the code says that the request was turned away for overload. A
    failure told with a 2xx is `unknown`, too: the model may have worked until then.
    """
    status = reply.status
    if 200 <= status < 300:
        return _success(reply)
    body = _json_object(reply.body) or _only_event(reply)
    codes = _codes(_failure(body))
    no_money = status == 402 or _money_is_gone(codes)
    kind: Kind = "rejected"
    if status in _TURNED_AWAY or 300 <= status < 400:
        retryable = status in (429, 529) and not no_money
    elif status >= 500 and codes & _OVERLOADED:
        retryable = True
    elif status in free and _is_provider_error(body):
        retryable = status >= 500
    elif 400 <= status < 500 and status not in _AMBIGUOUS and _is_provider_error(body):
        retryable = False
    else:
        kind, retryable = "unknown", status in _AMBIGUOUS or (status >= 500 and status not in (501, 505))
    retryable = retryable and not _forbids_retry(reply)
    now = time.time()
    wait = retry_after(reply.headers, now)
    if wait is None and status == 429:
        wait = _retry_delay(_failure(body))
        wait = pause(reply.headers, now) or None if wait is None else wait
    problem = _problem(status, codes, body)
    return Outcome(kind, retryable, status, reply.headers, body, wait, problem, no_money=no_money)


def _file(reply: Reply) -> Outcome:
    """A file with a line that is no JSON object is damaged or cut: nothing of it is used."""
    read = [_json_object(line) for line in reply.body.split(b"\n") if line.strip()]
    lines = tuple(line for line in read if line is not None)
    if len(lines) < len(read):
        return Outcome(
            "unknown", True, reply.status, reply.headers, problem=f"{reply.status} with lines that are not JSON"
        )
    return Outcome("answered", False, reply.status, reply.headers, lines=lines)


def _success(reply: Reply) -> Outcome:
    status, headers = reply.status, reply.headers
    told: tuple[Json, ...] | None = None
    if _is_stream(reply):
        told = _data(reply.body)
        if told is None:
            return Outcome("unknown", True, status, headers, problem=f"{status} with a stream that is not JSON")
        failed = next((number for number, event in enumerate(told) if _failure(event)), None)
        if failed is None:
            return Outcome("answered", False, status, headers, events=told)
        body: dict[str, Json] | None = told[failed]
        told = told[: failed + 1]
    else:
        body = _json_object(reply.body)
        if body is None:
            return Outcome("unknown", True, status, headers, problem=f"{status} without a JSON object")
        if not _failure(body):
            return Outcome("answered", False, status, headers, body)
    codes = _codes(_failure(body))
    no_money = _money_is_gone(codes)
    retryable = not no_money and not _forbids_retry(reply)
    return Outcome("unknown", retryable, status, headers, body, None, _problem(status, codes, body), told, no_money)


# Statuses that whoever answers (the provider, its content network, a gateway) gives before a model is asked.
_TURNED_AWAY = frozenset(
    {401, 402, 403, 404, 405, 406, 410, 411, 413, 414, 415, 417, 421, 426, 428, 429, 431, 451, 529}
)
_AMBIGUOUS = frozenset({408, 409, 425})  # the request may have been worked on
_OVERLOADED = frozenset({"server_is_overloaded", "slow_down", "overloaded_error"})
_MONEY_IS_GONE = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "enforced_spend_limit_reached",
        "billing_error",
        "billing_hard_limit_reached",
        "BILLING_DISABLED",
    }
)


class Event(NamedTuple):
    """One server-sent event. Its `name` is "message" where the server gives none."""

    name: str
    data: str


def events(body: bytes) -> list[Event]:
    """The events of a whole stream, in order. WHATWG HTML, section 9.2 "Server-sent events".

    An event counts once the empty line after it is there, so that a stream which was cut never ends with half an event.
    Events without data, comments and unknown fields are left out. Raises ValueError for bytes that are not UTF-8.

    >>> events(b": hello\\n\\nevent: delta\\ndata: 1\\ndata: 2\\n\\ndata: cut")
    [Event(name='delta', data='1\\n2')]
    """
    text = body.decode("utf-8-sig")
    if text.endswith("\r") and "\r\n" in text:
        text = text[:-1]  # half of a line's end
    found: list[Event] = []
    data: list[str] = []
    name, start = "", 0
    for end in _LINE_END.finditer(text):  # what comes after the last one is half a line
        line, start = text[start : end.start()], end.end()
        field_name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                found.append(Event(name or "message", "\n".join(data)))
            name, data = "", []
        elif field_name == "data":
            data.append(value)
        elif field_name == "event":
            name = value
    return found


_LINE_END = re.compile(r"\r\n|\r|\n")


def retry_after(headers: Mapping[str, str], now: Seconds) -> Seconds | None:
    """How many seconds the server asks us to wait, 0 to 86,400, or None when it does not say so in any form we trust.

    `retry-after-ms` (milliseconds) comes before `retry-after`: seconds, also as a decimal, or an HTTP date, which is
    measured against the server's own `date` where it sends one. The longest of several values counts. Negative,
    infinite and unreadable values are ignored. RFC 9110 section 10.2.3.

    >>> retry_after({"retry-after": "2.5"}, now=0)
    2.5
    >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=45)
    15.0
    """
    millis = [wait / 1000 for wait in _numbers(headers.get("retry-after-ms", ""))]
    seconds = millis or _numbers(headers.get("retry-after", ""))
    if not seconds and (moment := _moment(headers.get("retry-after"))) is not None:
        server_now = _moment(headers.get("date"))
        seconds = [max(0.0, moment - (now if server_now is None else server_now))]
    return min(max(seconds), _LONGEST_RETRY_AFTER) if seconds else None


def pause(headers: Mapping[str, str], now: Seconds, *, tokens: int = 1) -> Seconds:
    """How many seconds to wait before the next call, 0 to 86,400, so that the provider does not turn it away.

    Read off what an answer says is left of the limits on requests and tokens: where less is left than one request or
    `tokens` tokens, it is the time until that limit is filled up again, the longest of all limits. What is missing or
    unreadable asks for no wait. `x-ratelimit-remaining-*` and `-reset-*` (durations such as 6m0s) are OpenAI's and many
    others', `anthropic-ratelimit-*-remaining` and `-reset` (RFC 3339) Anthropic's.

    >>> pause({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2.5s"}, now=0)
    62.5
    """
    longest = 0.0
    for limit in () if headers.keys().isdisjoint(_LEFT) else _LIMITS:
        left, reset = headers.get(limit.remaining), headers.get(limit.reset)
        if left is None or reset is None:
            continue
        if min(_numbers(left), default=math.inf) < (tokens if limit.of_tokens else 1):
            server_now = _moment(headers.get("date"))
            longest = max(longest, _until(reset, now if server_now is None else server_now))
    return min(longest, _LONGEST_RETRY_AFTER)


class _Limit(NamedTuple):
    remaining: str
    reset: str
    of_tokens: bool


_LIMITS = (
    *(
        _Limit(f"x-ratelimit-remaining-{of}", f"x-ratelimit-reset-{of}", of == "tokens")
        for of in ("requests", "tokens")
    ),
    *(
        _Limit(f"anthropic-ratelimit-{of}-remaining", f"anthropic-ratelimit-{of}-reset", of != "requests")
        for of in ("requests", "tokens", "input-tokens", "output-tokens")
    ),
)


_LEFT = frozenset(limit.remaining for limit in _LIMITS)


def request_id(headers: Mapping[str, str], body: Mapping[str, Json] | None) -> str:
    """The provider's own name for an attempt, by which its support finds it; empty where it gave none."""
    for told, names in ((headers, _IN_HEADERS), (body or {}, _IN_BODY)):
        for name in names:
            if (number := told.get(name)) and isinstance(number, str):
                return _line(number, 100)
    return ""


_IN_HEADERS = ("x-request-id", "request-id", "x-goog-request-id", "apim-request-id")
_IN_BODY = ("request_id", "id", "responseId")


def check_url(url: str, *, allow_internal: bool) -> str:
    """The base address without a slash at its end. Raises ConfigError for one that a key must not be sent to."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading it is the check: it raises ValueError for a port out of range
    except ValueError as error:
        raise ConfigError(f"base_url: {error}") from error
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError("base_url contains characters that no address has", hint="write the host name in punycode")
    if parts.username is not None or parts.password is not None or "\\" in url:
        raise ConfigError("base_url contains a user name, a password or a backslash", hint="keys belong in api_key_env")
    if parts.query or parts.fragment:
        raise ConfigError("base_url has a query or a fragment", hint="keys belong in api_key_env")
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ConfigError(f"base_url {url!r} is no http(s) address", hint="such as https://api.example.com/v1")
    if parts.scheme == "http" and not allow_internal:
        raise ConfigError(
            f"base_url {url!r} would send the key in the clear", hint="use https, or set allow_internal: true"
        )
    return url.rstrip("/")


def check_address(address: str, *, allow_internal: bool) -> None:
    """Nothing, for an address that may be connected to. Raises Blocked otherwise.

    Public unicast addresses are always allowed; loopback, private and carrier-grade ones where `allow_internal` is set.
    Never link-local (cloud metadata lives there), multicast, unspecified and reserved ones. An IPv4 address inside an
    IPv6 one (mapped, 6to4, Teredo, NAT64) is judged as the IPv4 address that the packet would reach.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    for reached in _embedded(ip) or (ip,):
        never = reached.is_link_local or reached.is_multicast or reached.is_unspecified or str(reached) in _METADATA
        if never or (reached.is_reserved and not reached.is_loopback):
            raise Blocked(f"{address} is an address that is never connected to")
        site = isinstance(reached, ipaddress.IPv6Address) and reached.is_site_local  # deprecated, and global for Python
        if not allow_internal and (site or not reached.is_global):
            raise Blocked(f"{address} is an internal address; set allow_internal: true to reach it")


# What cloud machines ask for their credentials, outside the link-local range: Alibaba, AWS over IPv6, Oracle.
_METADATA = frozenset({"100.100.100.200", "fd00:ec2::254", "192.0.0.192"})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
    return [inner for inner in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ()), nat64) if inner is not None]


def client(*, allow_internal: bool = False, connections: int = 100, reader: Callable[[], Reader] = Careful) -> Client:
    """The default client: pooled connections, bound to the event loop that first uses them. `reader`: what reads answers."""
    return _Pool(allow_internal, connections, reader)


class _Pool:
    """Connections that are used again while they are fresh, each with one request at a time.

    A reader knows the protocol and httpx2 the certificates and compressions; between them and the event loop is nothing, so
    that there are no redirects, cookies, proxies and .netrc to be switched off, and a call costs a tenth of a client's.
    """

    def __init__(self, allow_internal: bool, connections: int, reader: Callable[[], Reader]) -> None:
        self._allow_internal = allow_internal
        self._reader = reader
        self._tls = httpx2.create_ssl_context(trust_env=False)
        self._tls.set_alpn_protocols(["http/1.1"])
        self._slots = asyncio.Semaphore(connections)
        self._idle: dict[_Place, list[Connection]] = {}  # the freshest last
        self._closed = False

    async def exchange(self, request: Request, leaving: Callable[[], None]) -> Reply:
        async with self._slots:
            connection: Connection | None = None
            try:
                place, head = _start(request.method, request.url, tuple(request.headers.items()))
                head, body = _message(head, request)
                connection = self._fresh(place) or await self._connected(place)
                answer = await connection.ask(head, body, leaving)
                told = request.tell if 200 <= answer.status < 300 else None
                said = (
                    connection.whole(request.limit)
                    if told is None and "content-encoding" not in answer.headers
                    else None
                )
                if said is None:
                    said = await _read(_decoded(connection.body(), answer.headers), request.limit, told)
            except BaseException as error:
                if connection is not None:
                    connection.close()
                if isinstance(error, _FAILURES):
                    raise ConnectionError(type(error).__name__) from None
                raise
            if self._closed:  # while the answer came: nobody would close the connection any more
                connection.close()
            elif connection.ended():
                self._idle.setdefault(place, []).append(connection)
            return Reply(answer.status, answer.headers, said)

    async def close(self) -> None:
        self._closed = True
        for connection in [one for some in self._idle.values() for one in some]:
            connection.close()
        self._idle.clear()

    def _fresh(self, place: _Place) -> Connection | None:
        """A connection to the place that the server has not closed; what is too old is closed."""
        idle = self._idle.get(place, [])
        while idle and idle[0].is_old():
            idle.pop(0).close()
        while idle:  # none is older than the first one
            if (newest := idle.pop()).is_open():
                return newest
            newest.close()
        return None

    async def _connected(self, place: _Place) -> Connection:
        """A new connection, to an address that was checked. Raises Blocked, ConnectionError."""
        loop, (tls, host, port) = asyncio.get_running_loop(), place
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise ConnectionError("ConnectError") from None
        addresses = [str(entry[4][0]) for entry in found]
        # All or none: a name with a public and an internal address is an attack or a mistake, never a choice of ours.
        for address in addresses:
            check_address(address, allow_internal=self._allow_internal)
        secure: Any = {"ssl": self._tls, "server_hostname": host} if tls else {}
        for address in addresses:
            try:
                return (await loop.create_connection(lambda: Connection(self._reader()), address, port, **secure))[1]
            except ssl.SSLCertVerificationError:
                raise Blocked("the server's certificate is not trusted") from None
            except OSError:
                continue  # the next address may answer
        raise ConnectionError("ConnectError")


class _Place(NamedTuple):
    """Where a connection leads to."""

    tls: bool
    host: str
    port: int


@lru_cache(maxsize=128)  # a provider's requests begin alike, and are made often
def _start(method: str, url: str, given: tuple[tuple[str, str], ...]) -> tuple[_Place, bytes]:
    """Where a request goes, and its head but for the length of what follows it."""
    parts = urlsplit(url)
    headers = {"host": parts.netloc, "accept-encoding": "identity", "user-agent": "apprentice"}
    headers |= {name.lower(): value for name, value in given}
    if not headers.keys().isdisjoint(_FRAMING):
        raise ConnectionError("LocalProtocolError")  # a second word on where the body ends
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    tls = parts.scheme == "https"
    place = _Place(tls, parts.hostname or "", parts.port or (443 if tls else 80))
    return place, head_of(method, target, headers.items())


def _message(head: bytes, request: Request) -> tuple[bytes, bytes | AsyncIterator[bytes]]:
    """The whole head of a request, and what follows it."""
    if request.file is not None:
        size = request.file.stat().st_size
        return b"%bcontent-length: %d\r\n\r\n" % (head, size), _pieces(request.file, size)
    if request.method == "POST":
        return b"%bcontent-length: %d\r\n\r\n" % (head, len(request.body)), request.body
    return head + b"\r\n", b""


_FRAMING = frozenset({"content-length", "transfer-encoding"})


async def _pieces(path: Path, left: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while left:
            piece = await asyncio.to_thread(file.read, min(left, _PIECE))
            if not piece:
                raise ConnectionError("the file became shorter while it was sent")
            left -= len(piece)
            yield piece


def _decoded(chunks: AsyncIterator[bytes], headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body of an answer, with a compression undone that nobody asked for: piece by piece, so that the limit holds too."""
    if "content-encoding" not in headers:
        return chunks
    return httpx2.Response(200, headers=headers, stream=_Stream(chunks)).aiter_bytes()


async def _read(chunks: AsyncIterator[bytes], limit: int, tell: Callable[[bytes], None] | None) -> bytes:
    """All of them together. With `tell`, which is given each line that is not empty, only the last line. Raises TooLarge."""
    body, last = bytearray(), b""
    async for chunk in chunks:
        body += chunk
        if tell is not None and b"\n" in chunk:
            *lines, rest = bytes(body).split(b"\n")
            for line in filter(bytes.strip, lines):
                tell(line)
                last = line
            body = bytearray(rest)
        if len(body) > limit:
            raise TooLarge(f"the answer is larger than {limit} bytes")
    if tell is None:
        return bytes(body)
    if body.strip():
        last = bytes(body)
        tell(last)
    return last


class _Stream(httpx2.AsyncByteStream):
    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks


_FAILURES = (
    httpx2.DecodingError,
    UnicodeError,  # a host name or header that no encoding fits
)


def _told(error: OSError) -> str:
    return str(error) if isinstance(error, TooLarge | ConnectionError) else type(error).__name__


def _without(reply: Reply, secret: str) -> Reply:
    """The reply without the key, which some servers repeat in their error messages."""
    if len(secret) < _SHORTEST_SECRET or not (
        secret in "\n".join(reply.headers.values()) or secret.encode() in reply.body
    ):
        return reply
    headers = {name: value.replace(secret, "[key]") for name, value in reply.headers.items()}
    return Reply(reply.status, headers, _clean(reply.body, secret))


def _clean(body: bytes, secret: str) -> bytes:
    """A key of a few letters, as one's own servers have it, is no secret: taking it out would spoil words of the answer."""
    return body if len(secret) < _SHORTEST_SECRET else body.replace(secret.encode(), b"[key]")


def _json(body: bytes) -> Json:
    """The value of a JSON text. Raises ValueError, RecursionError."""
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError:  # it gives the same value or none: for halves of a surrogate pair, other encodings, 200 levels
        return _DECODER.decode(body.decode(json.detect_encoding(body), "surrogatepass"))


def _json_object(body: bytes) -> dict[str, Json] | None:
    try:
        value = _json(body)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and "error" in value[0]:
        value = value[0]  # so does Google where it speaks OpenAI's format
    return value if isinstance(value, dict) else None


def _is_stream(reply: Reply) -> bool:
    return reply.headers.get("content-type", "").lower().startswith("text/event-stream")


def _data(body: bytes) -> tuple[Json, ...] | None:
    """The data of a stream's events, or None when one of them is no JSON object and not OpenAI's mark of the end."""
    try:
        told = [event.data for event in events(body) if event.data.strip()]
    except ValueError:
        return None
    read = [data if data == "[DONE]" else _json_object(data.encode()) for data in told]
    return None if None in read else tuple(read)


def _only_event(reply: Reply) -> dict[str, Json] | None:
    """The error of a server that sends also its errors as a stream."""
    told = _data(reply.body) if _is_stream(reply) else None
    return told[0] if told and isinstance(told[0], dict) else None


def _failure(body: Json) -> Json:
    """What a body or an event tells about a failure, as an object or a text; None when it tells of none."""
    if not isinstance(body, dict):
        return None
    response = body.get("response")
    within = response.get("error") if isinstance(response, dict) else None
    return body.get("error") or within or (body if body.get("type") == "error" else None)


def _forbids_retry(reply: Reply) -> bool:
    return reply.headers.get("x-should-retry") == "false"


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _is_provider_error(body: dict[str, Json] | None) -> bool:
    return body is not None and bool(body.get("error") or body.get("detail") or body.get("message"))


def _codes(error: Json) -> frozenset[str]:
    """Where providers put a code: OpenAI's type and code, Anthropic's type and details, Google's status and details."""
    if not isinstance(error, dict):
        return frozenset()
    found = [error.get("type"), error.get("code"), error.get("status")]
    for detail in _details(error):
        found += [detail.get("error_code"), detail.get("reason")]
        violations = detail.get("violations")
        found += [v.get("quotaId") for v in violations if isinstance(v, dict)] if isinstance(violations, list) else []
    return frozenset(code for code in found if isinstance(code, str))


def _details(error: Json) -> list[dict[str, Json]]:
    """Anthropic has one object of details, Google a list of them."""
    details = error.get("details") if isinstance(error, dict) else None
    return [detail for detail in (details if isinstance(details, list) else [details]) if isinstance(detail, dict)]


def _money_is_gone(codes: frozenset[str]) -> bool:
    """Google names the quota of a day by an id such as GenerateRequestsPerDayPerProjectPerModel."""
    return bool(codes & _MONEY_IS_GONE) or any("PerDay" in code for code in codes)


def _retry_delay(error: Json) -> Seconds | None:
    """Google's RetryInfo, such as "34.5s"."""
    waits = [_duration(detail["retryDelay"]) for detail in _details(error) if isinstance(detail.get("retryDelay"), str)]
    return next((min(wait, _LONGEST_RETRY_AFTER) for wait in waits if wait is not None), None)


def _problem(status: int, codes: frozenset[str], body: dict[str, Json] | None) -> str:
    error = _failure(body) or body or {}
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return _line(" ".join([str(status), *sorted(codes)]) + (f": {message}" if isinstance(message, str) else ""), 400)


def _line(text: str, longest: int) -> str:
    """One line of printable characters: a provider must not be able to write a second line into a log."""
    text = text[:longest]
    return text if text.isprintable() else "".join(one if one.isprintable() else " " for one in text)


def _until(reset: str, now: Seconds) -> Seconds:
    """Seconds until a moment or for a duration; 0 for what is over, and for what is neither."""
    if (wait := _duration(reset)) is not None:
        return wait
    seconds = [number for number in _numbers(reset) if number <= _LONGEST_RETRY_AFTER]  # beyond, it is no duration
    if seconds:
        return max(seconds)
    try:
        moment = datetime.fromisoformat(reset.strip())
        return max(0.0, moment.timestamp() - now) if moment.tzinfo is not None else 0.0
    except (ValueError, OverflowError):
        return 0.0


def _duration(text: str) -> Seconds | None:
    """Seconds of a duration as Go writes it (1h2m3.5s, 20ms), or None."""
    text = text.strip()
    if len(text) > 100 or not _DURATION.fullmatch(text):
        return None
    return math.fsum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(text))


_UNITS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?)(ms|us|µs|ns|d|h|m|s)")
_DURATION = re.compile(f"(?:{_DURATION_PART.pattern})+")


def _numbers(value: str) -> list[float]:
    found = []
    for part in value.split(","):
        with contextlib.suppress(ValueError):
            found.append(float(part))
    return [number for number in found if math.isfinite(number) and number >= 0]


def _moment(value: str | None) -> Seconds | None:
    try:
        return parsedate_to_datetime(value).timestamp() if value else None
    except (ValueError, OverflowError):
        return None
