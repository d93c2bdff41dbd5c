"""The one HTTP boundary: one attempt of one call, and what became of it.

`send` makes exactly one attempt and always returns an Outcome; it raises nothing but the caller's own cancellation.
What became of it is read off the status and the provider's error code, never off prose, because money hangs on it:

    not_sent   no byte of the request left this machine (address, DNS, TCP, TLS, no free connection)
    rejected   the provider turned the request away before a model worked on it
    answered   a JSON object came back with a 2xx status; its usage says what it cost
    unknown    the request left, and nobody knows whether it was worked on and billed

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
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

import httpcore2
import httpx2

from apprentice.errors import ConfigError
from apprentice.types import Json, Seconds

MAX_BODY = 16 * 2**20  # bytes of an answer after decompression; a structured answer is thousands of times smaller
_LONGEST_RETRY_AFTER: Seconds = 86_400.0
# Servers close idle connections after five seconds and more (uvicorn: 5 s). Closing first avoids the race in which a
# request is written to a connection that the server is closing: its outcome would be unknown, which counts as spent.
_IDLE: Seconds = 4.0


@dataclass(frozen=True, slots=True)
class Request:
    """A POST of JSON. `timeout` is the total time until the last byte; `secret` is taken out of what comes back."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    timeout: Seconds
    secret: str = field(default="", repr=False)
    limit: int = MAX_BODY


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
    whatever goes wrong: Blocked for an address that must not be reached, TooLarge for a body over the limit.
    """

    async def exchange(self, request: Request, leaving: Callable[[], None]) -> Reply: ...

    async def close(self) -> None: ...


class Blocked(OSError):
    """The address, or the certificate it presents, must not be trusted with a request."""


class TooLarge(OSError):
    """The answer is larger than the limit."""


type Kind = Literal["not_sent", "rejected", "answered", "unknown"]


class Outcome(NamedTuple):
    """What became of one attempt. `body`: the JSON object that came back, if one did. `problem`: what was wrong."""

    kind: Kind
    retryable: bool = False
    status: int | None = None
    headers: Mapping[str, str] = {}
    body: dict[str, Json] | None = None
    retry_after: Seconds | None = None
    problem: str | None = None


async def send(client: Client, request: Request) -> Outcome:
    """What became of one attempt. The total deadline of the request holds, whatever the server does meanwhile."""
    left = False

    def leaving() -> None:
        nonlocal left
        left = True

    try:
        async with asyncio.timeout(request.timeout):
            reply = await client.exchange(request, leaving)
    except Blocked as error:
        return Outcome("not_sent", problem=str(error))
    except TimeoutError:
        return Outcome("unknown" if left else "not_sent", True, problem=f"no answer within {request.timeout:g} s")
    except OSError as error:
        # Only the kind of the failure is told: some libraries put addresses and headers into their messages.
        return Outcome("unknown" if left else "not_sent", True, problem=_told(error))
    return classify(_without(reply, request.secret))


def classify(reply: Reply) -> Outcome:
    """The outcome table: what a status and an error code say about money, and whether trying again may help.

    Sources: the error pages of OpenAI, Anthropic and Google. A 5xx is `unknown` because no provider says that it is
    free, except where the code says that the request was turned away for overload.
    """
    body = _json_object(reply.body)
    status = reply.status
    codes = _codes(body)
    if 200 <= status < 300:
        if body is None:
            return Outcome("unknown", True, status, reply.headers, problem=f"{status} without a JSON object")
        return Outcome("answered", False, status, reply.headers, body)
    kind: Kind = "rejected"
    if status in _TURNED_AWAY or 300 <= status < 400:
        retryable = status in (429, 529) and not codes & _MONEY_IS_GONE
    elif status >= 500 and codes & _OVERLOADED:
        retryable = True
    elif 400 <= status < 500 and status not in _AMBIGUOUS and _is_provider_error(body):
        retryable = False
    else:
        kind, retryable = "unknown", status in _AMBIGUOUS or (status >= 500 and status not in (501, 505))
    if reply.headers.get("x-should-retry") == "false":
        retryable = False
    wait = retry_after(reply.headers, time.time())
    return Outcome(kind, retryable, status, reply.headers, body, wait, _problem(status, codes, body))


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
    }
)


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


def check_url(url: str, *, allow_internal: bool) -> str:
    """The base address without a slash at its end. Raises ConfigError for one that a key must not be sent to."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading it is the check: it raises ValueError for a port out of range
    except ValueError as error:
        raise ConfigError(f"base_url: {error}") from error
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError("base_url contains characters that no address has", hint="write the host name in punycode")
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ConfigError(f"base_url {url!r} is no http(s) address", hint="such as https://api.example.com/v1")
    if parts.username is not None or parts.password is not None or "\\" in url:
        raise ConfigError("base_url contains a user name, a password or a backslash", hint="keys belong in api_key_env")
    if parts.query or parts.fragment:
        raise ConfigError(f"base_url {url!r} has a query or a fragment")
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
        if not allow_internal and not reached.is_global:
            raise Blocked(f"{address} is an internal address; set allow_internal: true to reach it")


# What cloud machines ask for their credentials, outside the link-local range: Alibaba, AWS over IPv6, Oracle.
_METADATA = frozenset({"100.100.100.200", "fd00:ec2::254", "192.0.0.192"})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
    return [inner for inner in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ()), nat64) if inner is not None]


def client(*, allow_internal: bool = False, connections: int = 100) -> Client:
    """The default client: pooled connections, bound to the event loop that first uses them."""
    return _Pool(allow_internal, connections)


class _Pool:
    """httpx2's connection pool, without the client on top of it.

    That way there are no redirects, cookies, proxies and .netrc to be switched off, and a call costs a third less.
    """

    def __init__(self, allow_internal: bool, connections: int) -> None:
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpx2.create_ssl_context(trust_env=False),
            max_connections=connections,
            keepalive_expiry=_IDLE,
            network_backend=_CheckedBackend(allow_internal),
        )

    async def exchange(self, request: Request, leaving: Callable[[], None]) -> Reply:
        async def trace(event: str, _: object) -> None:
            if event == "http11.send_request_headers.started":
                leaving()

        # The pool would write an IPv6 host without its brackets.
        own = {"host": urlsplit(request.url).netloc, "accept-encoding": "identity", "user-agent": "apprentice"}
        headers = list((own | dict(request.headers)).items())
        try:
            async with self._pool.stream(
                "POST", request.url, headers=headers, content=request.body, extensions={"trace": trace}
            ) as answer:
                # httpx2 undoes a compression that nobody asked for, piece by piece, so that the limit holds there too.
                response = httpx2.Response(answer.status, headers=answer.headers, stream=_Stream(answer))
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > request.limit:
                        raise TooLarge(f"the answer is larger than {request.limit} bytes")
                return Reply(answer.status, dict(response.headers), bytes(body))
        except _FAILURES as error:
            if _caused_by(error, ssl.SSLCertVerificationError):
                raise Blocked("the server's certificate is not trusted") from None
            raise ConnectionError(type(error).__name__) from None

    async def close(self) -> None:
        await self._pool.aclose()


class _Stream(httpx2.AsyncByteStream):
    def __init__(self, answer: httpcore2.Response) -> None:
        self._answer = answer

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._answer.aiter_stream()


class _CheckedBackend(httpcore2.AnyIOBackend):
    """Resolves a name itself, checks every address, and connects to one that was checked."""

    def __init__(self, allow_internal: bool) -> None:
        self._allow_internal = allow_internal

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError("the name does not resolve") from error
        addresses = [str(entry[4][0]) for entry in found]
        # All or none: a name with a public and an internal address is an attack or a mistake, never a choice of ours.
        for address in addresses:
            check_address(address, allow_internal=self._allow_internal)
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore2.ConnectError):
                return await super().connect_tcp(address, port, timeout, local_address, socket_options)
        return await super().connect_tcp(addresses[-1], port, timeout, local_address, socket_options)


_FAILURES = (
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.TimeoutException,
    httpcore2.UnsupportedProtocol,
    httpx2.DecodingError,
    UnicodeError,  # a host name or header that no encoding fits
)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


def _told(error: OSError) -> str:
    return str(error) if isinstance(error, TooLarge | ConnectionError) else type(error).__name__


def _without(reply: Reply, secret: str) -> Reply:
    """The reply without the key, which some servers repeat in their error messages."""
    if not secret or (needle := secret.encode()) not in reply.body:
        return reply
    return reply._replace(body=reply.body.replace(needle, b"[key]"))


def _json_object(body: bytes) -> dict[str, Json] | None:
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _is_provider_error(body: dict[str, Json] | None) -> bool:
    return body is not None and bool(body.get("error") or body.get("detail") or body.get("message"))


def _codes(body: dict[str, Json] | None) -> frozenset[str]:
    """Where providers put a code: OpenAI's type and code, Anthropic's type and details, Google's status."""
    error = body.get("error") if body else None
    if not isinstance(error, dict):
        return frozenset()
    details = error.get("details")
    found = [error.get("type"), error.get("code"), error.get("status")]
    found.append(details.get("error_code") if isinstance(details, dict) else None)
    return frozenset(code for code in found if isinstance(code, str))


def _problem(status: int, codes: frozenset[str], body: dict[str, Json] | None) -> str:
    error = (body or {}).get("error") or body or {}
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    told = " ".join([str(status), *sorted(codes)]) + (f": {message}" if isinstance(message, str) else "")
    # One line of printable characters: a provider must not be able to write a second line into a log.
    return "".join(character if character.isprintable() else " " for character in told)[:400]


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
