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
from collections.abc import Mapping, Sequence

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apprentice.engine import new_id
from apprentice.errors import ApprenticeError
from apprentice.gateway import HEADER, Settings
from apprentice.gateway.desk import Call, Gateway, Operation
from apprentice.gateway.keys import EVERYBODY, Key
from apprentice.gateway.reading import Heads, read
from apprentice.gateway.refusals import Family, Refusal
from apprentice.observer import Observer
from apprentice.types import Seconds

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_IDEMPOTENCY = re.compile(r"[!-~]{1,200}")
_TAG, _CAPTURE = f"{HEADER}tag-".encode(), f"{HEADER}capture".encode()
_MOST_TAGS = 32
_LONGEST_TAG = 500


class Door:
    """The application behind its door. `closing`: what comes now is told to come back later.

    `operations` whose path has no parameter are run here; everything else is the affair of `inside`.
    """

    def __init__(
        self,
        inside: Starlette,
        settings: Settings,
        *,
        operations: Sequence[Operation] = (),
        watching: Observer | None = None,
        log: bool = False,
    ) -> None:
        self.inside = inside
        self.gateway: Gateway | None = None  # while the application is open
        self.closing = False
        self._settings = settings
        self._names = settings.names
        self._operations = {(one.method, one.path): one for one in operations if "{" not in one.path}
        self._watching = watching
        self._log = log
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def busy(self) -> int:
        """How many requests are in flight."""
        return self._busy

    async def empty(self) -> None:
        """Return when nothing is in flight."""
        await self._quiet.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.inside(scope, receive, send)
        started, number = time.perf_counter(), new_id()
        scope["apprentice"], scope["apprentice.heads"] = number, Heads(scope["headers"])
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._busy += 1
        self._quiet.clear()
        try:
            if self._watching is None:
                await self._answer(scope, receive, sent)
            else:
                with self._watching.continued(Headers(scope=scope)):
                    await self._answer(scope, receive, sent)
        except Exception as error:  # noqa: BLE001  (whatever it is, the client gets an answer, and no text of ours)
            _tell({"error": type(error).__name__, "request": number, "at": _where(error)})
            if status == 0:
                refusal = Refusal(500, "internal_error", "something went wrong here")
                await refusal.response(family_of(scope["path"]), number)(scope, receive, sent)
        finally:
            self._busy -= 1
            if self._busy == 0:
                self._quiet.set()
            self._count(scope, status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.inside
        if (refusal := self._refusal(scope)) is not None:
            answer = refusal.response(family_of(scope["path"]), scope["apprentice"])
        elif self.gateway and (operation := self._operations.get((scope["method"], scope["path"]))):
            answer = await visit(self.gateway, operation, scope, receive)
        await answer(scope, receive, send)

    def _count(self, scope: Scope, status: int, seconds: Seconds) -> None:
        if self.gateway is not None:
            self.gateway.meters.count(scope["method"], scope.get("apprentice.operation", "none"), status, seconds)
        if self._log:
            key = scope.get("apprentice.key")
            told = {"method": scope["method"], "path": scope["path"], "status": status, "ms": round(seconds * 1e3, 2)}
            _tell(told | {"key": key, "request": scope["apprentice"]})

    def _refusal(self, scope: Scope) -> Refusal | None:
        heads: Heads = scope["apprentice.heads"]
        hosts = heads.all(b"host")
        if len(hosts) != 1:
            return Refusal(400, "wrong_host", "there should be one Host")
        found = _HOST.fullmatch(hosts[0])
        name = found[1].strip("[]").lower().rstrip(".") if found is not None else ""
        if name not in self._names:
            return Refusal(421, "wrong_host", "this gateway is not called so", hint="apprentice serve --name NAME")
        for origin in heads.all(b"origin"):
            own = origin.lower() in (f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https"))
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


async def visit(
    gateway: Gateway, operation: Operation, scope: Scope, receive: Receive, path: Mapping[str, str] | None = None
) -> Response:
    """One request at one operation, from its key to its answer, or the refusal in the shape of the operation's family."""
    number: str = scope["apprentice"]
    scope["apprentice.operation"] = operation.path
    path = path or {}
    try:
        return await operation.run(gateway, await _call(gateway, operation, scope, receive, path))
    except Refusal as refusal:
        return refusal.response(operation.family, number)
    except ApprenticeError as error:
        told = gateway.refusal(error, path.get("name", ""), param=None)
        if told.status >= 500:
            _tell({"error": type(error).__name__, "request": number})
        return told.response(operation.family, number)


async def _call(
    gateway: Gateway, operation: Operation, scope: Scope, receive: Receive, path: Mapping[str, str]
) -> Call:
    heads: Heads = scope["apprentice.heads"]
    key = await _key(gateway, operation, scope, heads)
    tags, capture, idempotency = _tags(heads), _capture(heads), _idempotency(heads)
    if key is not EVERYBODY:
        tags["key"] = key.name
    body = None if operation.takes is None else await read(scope, receive, operation.takes, gateway.settings)
    return Call(scope["apprentice"], key, path, body, tags, idempotency, capture)


async def _key(gateway: Gateway, operation: Operation, scope: Scope, heads: Heads) -> Key:
    """Who asks. Raises Refusal, the same for every key that is none."""
    role = operation.role
    if role is None or gateway.settings.keyless:
        return EVERYBODY
    key = await gateway.keyring.find(_secret(heads))
    if key is None:
        raise Refusal(
            401,
            "invalid_api_key",
            "a key is needed, as `Authorization: Bearer KEY` or `x-api-key: KEY`",
            headers={"www-authenticate": "Bearer"},
        )
    scope["apprentice.key"] = key.id
    if role != "any" and role not in key.roles:
        raise Refusal(403, "wrong_role", f"this needs a key with the role {role}")
    return key


def _secret(heads: Heads) -> str:
    """The one key in the headers; nothing where there is none, or more than one."""
    told, plain = heads.all(b"authorization"), heads.all(b"x-api-key")
    found = []
    for value in told:
        scheme, _, secret = value.partition(" ")
        found.append(secret if scheme.lower() == "bearer" else "")
    found += plain
    return found[0] if len(found) == 1 or (len(set(found)) == 1 and len(told) <= 1) else ""


def _tags(heads: Heads) -> dict[str, str]:
    found = {
        name.removeprefix(_TAG).decode("latin-1"): values[-1] for name, values in heads.items() if name.startswith(_TAG)
    }
    if len(found) > _MOST_TAGS:
        raise Refusal(400, "invalid_request", f"at most {_MOST_TAGS} tags", param=f"{HEADER}tag-*")
    for name, value in found.items():
        if not name or len(name) > 64 or len(value) > _LONGEST_TAG or not value.isprintable():
            field = f"{HEADER}tag-{name[:64]}"
            message = f"{field}: should be 1 to {_LONGEST_TAG} printable characters"
            raise Refusal(400, "invalid_request", message, param=field)
    return found


def _capture(heads: Heads) -> bool:
    value = heads.first(_CAPTURE, "on")
    if value not in ("on", "off"):
        raise Refusal(400, "invalid_request", f"{HEADER}capture: should be on or off", param=f"{HEADER}capture")
    return value == "on"


def _idempotency(heads: Heads) -> str | None:
    values = heads.all(b"idempotency-key")
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
