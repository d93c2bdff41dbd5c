"""Who is let in: the right host, no foreign web page, a key with the role, not more at once than there is room for.

Host and Origin are looked at before anything else and on every method: a web page in the browser of somebody on this
machine can reach a loopback port as well as a program can.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from apprentice.engine import new_id
from apprentice.errors import ApprenticeError
from apprentice.gateway import HEADER, Settings
from apprentice.gateway.desk import Call, Gateway, Operation
from apprentice.gateway.keys import EVERYBODY, Key
from apprentice.gateway.reading import read
from apprentice.gateway.refusals import Family, Refusal
from apprentice.types import Seconds

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_IDEMPOTENCY = re.compile(r"[!-~]{1,200}")
_TAG = f"{HEADER}tag-"
_MOST_TAGS = 32
_LONGEST_TAG = 500


class Door:
    """The application behind its door. `closing`: what comes now is told to come back later."""

    def __init__(self, inside: Starlette, settings: Settings, *, log: bool = False) -> None:
        self.inside = inside
        self.closing = False
        self._settings = settings
        self._names = settings.names
        self._log = log
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def empty(self) -> None:
        """Return when nothing is in flight."""
        await self._quiet.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.inside(scope, receive, send)
        started, number, family = time.perf_counter(), new_id(), family_of(scope["path"])
        scope["apprentice"] = number
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        gateway: Gateway | None = getattr(self.inside.state, "gateway", None)
        self._busy += 1
        self._quiet.clear()
        if gateway is not None:
            gateway.meters.in_flight.set(self._busy)
        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal.response(family, number)(scope, receive, sent)
            else:
                await self.inside(scope, receive, sent)
        except Exception as error:  # noqa: BLE001  (whatever it is, the client gets an answer, and no text of ours)
            _tell({"error": type(error).__name__, "request": number, "at": _where(error)})
            if status == 0:
                await Refusal(500, "internal_error", "something went wrong here").response(family, number)(
                    scope, receive, sent
                )
        finally:
            self._busy -= 1
            if self._busy == 0:
                self._quiet.set()
            self._count(gateway, scope, status, time.perf_counter() - started)

    def _count(self, gateway: Gateway | None, scope: Scope, status: int, seconds: Seconds) -> None:
        operation = scope.get("apprentice.operation", "none")
        if gateway is not None:
            gateway.meters.in_flight.set(self._busy)
            gateway.meters.count(scope["method"], operation, status, seconds)
        if self._log:
            key = scope.get("apprentice.key")
            told = {"method": scope["method"], "path": scope["path"], "status": status, "ms": round(seconds * 1e3, 2)}
            _tell(told | {"key": key, "request": scope["apprentice"]})

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        name = found[1].strip("[]").lower().rstrip(".") if found is not None else ""
        if name not in self._names:
            return Refusal(421, "wrong_host", "this gateway is not called so", hint="apprentice serve --name NAME")
        for origin in headers.getlist("origin"):
            own = urlsplit(origin).netloc.lower() == hosts[0].lower() and origin.startswith(("http://", "https://"))
            if not own and origin.lower().rstrip("/") not in self._settings.origins:
                return Refusal(403, "wrong_origin", "web pages of other places may not call this gateway")
        if self.closing:
            close = {"connection": "close"}
            return Refusal(503, "stopping", "the gateway is stopping", wait=1.0, retryable=True, headers=close)
        if self._busy > self._settings.parallel and scope["path"] not in ("/healthz", "/readyz"):
            message = f"more than {self._settings.parallel} requests at once"
            return Refusal(429, "too_many_requests", message, wait=1.0, retryable=True)
        return None


def family_of(path: str) -> Family:
    """Whose errors a path is answered with."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    return "openai" if path.startswith(("/v1/chat", "/v1/models")) else "native"


class Visit:
    """One request at one operation, from its key to its answer."""

    def __init__(self, gateway: Gateway, operation: Operation, request: Request) -> None:
        self._gateway, self._operation, self._request = gateway, operation, request

    async def response(self) -> Response:
        """The answer, or the refusal in the shape of the operation's family."""
        number = self._request.scope["apprentice"]
        self._request.scope["apprentice.operation"] = self._operation.path
        try:
            return await self._operation.run(self._gateway, await self._call(number))
        except Refusal as refusal:
            return refusal.response(self._operation.family, number)
        except ApprenticeError as error:
            told = self._gateway.refusal(error, self._request.path_params.get("name", ""), param=None)
            if told.status >= 500:
                _tell({"error": type(error).__name__, "request": number})
            return told.response(self._operation.family, number)

    async def _call(self, number: str) -> Call:
        headers, operation = self._request.headers, self._operation
        key = await self._key()
        tags, capture, idempotency = _tags(headers), _capture(headers), _idempotency(headers)
        body = None
        if operation.takes is not None:
            body = await read(self._request, operation.takes, self._gateway.settings)
        return Call(
            id=number,
            key=key,
            path=self._request.path_params,
            body=body,
            tags=tags if key is EVERYBODY else tags | {"key": key.name},
            idempotency=idempotency,
            capture=capture,
        )

    async def _key(self) -> Key:
        """Who asks. Raises Refusal, the same for every key that is none."""
        role = self._operation.role
        if role is None or self._gateway.settings.keyless:
            return EVERYBODY
        secret = _secret(self._request.headers)
        key = await self._gateway.keyring.find(secret)
        if key is None:
            raise Refusal(
                401,
                "invalid_api_key",
                "a key is needed, as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                headers={"www-authenticate": "Bearer"},
            )
        self._request.scope["apprentice.key"] = key.id
        if role != "any" and role not in key.roles:
            raise Refusal(403, "wrong_role", f"this needs a key with the role {role}")
        return key


def _secret(headers: Headers) -> str:
    """The one key in the headers; nothing where there is none, or more than one."""
    found = []
    for value in headers.getlist("authorization"):
        scheme, _, secret = value.partition(" ")
        found.append(secret if scheme.lower() == "bearer" else "")
    found += headers.getlist("x-api-key")
    return found[0] if len(found) == 1 or (len(set(found)) == 1 and len(headers.getlist("authorization")) <= 1) else ""


def _tags(headers: Headers) -> dict[str, str]:
    found = {name.removeprefix(_TAG): value for name, value in headers.items() if name.startswith(_TAG)}
    if len(found) > _MOST_TAGS:
        raise Refusal(400, "invalid_request", f"at most {_MOST_TAGS} tags", param=f"{_TAG}*")
    for name, value in found.items():
        if not name or len(name) > 64 or len(value) > _LONGEST_TAG or not value.isprintable():
            message = f"{_TAG}{name[:64]}: should be 1 to {_LONGEST_TAG} printable characters"
            raise Refusal(400, "invalid_request", message, param=f"{_TAG}{name[:64]}")
    return found


def _capture(headers: Headers) -> bool:
    value = headers.get(f"{HEADER}capture", "on")
    if value not in ("on", "off"):
        raise Refusal(400, "invalid_request", f"{HEADER}capture: should be on or off", param=f"{HEADER}capture")
    return value == "on"


def _idempotency(headers: Headers) -> str | None:
    values = headers.getlist("idempotency-key")
    if not values:
        return None
    if len(values) > 1 or not _IDEMPOTENCY.fullmatch(values[0]):
        message = "idempotency-key: should be 1 to 200 letters, digits and signs of ASCII"
        raise Refusal(400, "invalid_request", message, param="idempotency-key")
    return values[0]


def of_routing(error: HTTPException, scope: Mapping[str, object]) -> Refusal:
    """What starlette's own 404 and 405 are told as."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return Refusal(error.status_code, code, f"{error.detail}", headers=error.headers)


def _where(error: BaseException) -> str:
    """The last place in our code, without any value: texts of errors may be customers' texts."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        found = f"{trace.tb_frame.f_globals.get('__name__', '')}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _tell(told: Mapping[str, object]) -> None:
    """One line of JSON on standard error: nothing that a client wrote can begin a second one."""
    print(json.dumps(told), file=sys.stderr, flush=True)  # noqa: T201
