"""The pages over HTTP: who may see and change what, and what a browser is told besides. Mounted by the gateway.

Whoever looks has pasted a key once; a signed cookie stands for it until it is revoked, or for twelve hours. Every change is
a form with a token of that session, from a page of our own.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qs, quote, urlsplit

from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from apprentice import lineage
from apprentice.config import Config
from apprentice.dashboard import pages, views
from apprentice.dashboard.views import TaskView
from apprentice.errors import ApprenticeError, ConfigError, InvalidRequest, UnknownRequest, UnknownTask
from apprentice.feedback import current
from apprentice.types import METRICS, Correction, Json, Record, Seconds, Store, Version

PATH = "/dashboard"
_COOKIE = "apprentice_session"
_SESSION = 12 * 3600  # seconds
_FRESH: Seconds = 5.0  # for so long the overview may be behind: it reads every Record
_PATIENCE: Seconds = 15.0  # for the body of a form
_LARGEST = 1_100_000  # bytes of a form: a correction of a megabyte, and what is around it
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "same-origin",  # `no-referrer` would make a form's Origin null
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_STATIC = {"style.css": "text/css", "keys.js": "text/javascript"}


class Key(Protocol):
    """A key of the gateway."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def roles(self) -> frozenset[str]: ...


class Keyring(Protocol):
    async def find(self, secret: str) -> Key | None: ...


class Engine(Protocol):
    """What of `Apprentice` the pages change."""

    async def afeedback(
        self, request_id: str, *, corrected: Json = None, withdrawn: bool = False, by: str = "", comment: str = ""
    ) -> Correction: ...
    async def apromote(self, task: str, version: str, *, by: str = "", why: str = "") -> Version: ...
    async def arollback(self, task: str, version: str | None = None, *, by: str = "", why: str = "") -> Version: ...


class Access(Protocol):
    @property
    def keyless(self) -> bool: ...


class Gateway(Protocol):
    """What the pages need of the gateway that serves them: `request.app.state.gateway`."""

    config: Config
    store: Store

    @property
    def settings(self) -> Access: ...
    @property
    def keyring(self) -> Keyring: ...
    @property
    def app(self) -> Engine: ...


type Known = Callable[[Store], Awaitable[Sequence[Key]]]


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who looks. `token` is what a form of this session carries; `leaves`: there is something to log out of."""

    name: str
    roles: frozenset[str]
    token: str
    leaves: bool = True

    @property
    def by(self) -> str:
        return f"key:{self.name}"


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of a visitor. `form` holds what was sent with it."""

    request: Request
    gateway: Gateway
    visitor: Visitor
    form: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Mapping[str, str]:
        return self.request.path_params

    def page(self, template: str, *, status: int = 200, **values: object) -> Response:
        return HTMLResponse(pages.render(template, visitor=self.visitor, **values), status)

    def back(self, otherwise: str) -> Response:
        """To the page that the form was on. Only to one of ours."""
        wanted = self.form.get("back", "")
        return RedirectResponse(wanted if _is_ours(wanted) else otherwise, 303)


class Refused(Exception):
    """What is shown instead of a page."""

    def __init__(self, status: int, title: str, message: str) -> None:
        super().__init__(message)
        self.status, self.title, self.message = status, title, message


def routes(known: Known, *, secret: str | None = None) -> list[BaseRoute]:
    """The pages below /dashboard. `known`: the keys of a store that work.

    `secret` signs the sessions; processes that serve one port need the same. Without one it is made up, and sessions end
    with the process.
    """
    desk = _Desk(known, secret or secrets.token_urlsafe(32))
    task, request = f"{PATH}/tasks/{{name}}", f"{PATH}/requests/{{id}}"
    return [
        Route(f"{PATH}/static/{{file}}", _static, methods=["GET"]),
        Route(f"{PATH}/login", desk.login, methods=["GET", "POST"]),
        Route(f"{PATH}/logout", desk.endpoint(_logout), methods=["POST"]),
        Route(PATH, desk.endpoint(desk.overview), methods=["GET"]),
        Route(task, desk.endpoint(desk.task), methods=["GET"]),
        Route(f"{task}/review", desk.endpoint(_review, "feedback"), methods=["GET"]),
        Route(f"{task}/versions", desk.endpoint(_versions), methods=["GET"]),
        Route(f"{task}/versions/{{version}}/{{how}}", desk.endpoint(_change, "operate"), methods=["GET", "POST"]),
        Route(request, desk.endpoint(_request), methods=["GET"]),
        Route(f"{request}/say", desk.endpoint(_say, "feedback"), methods=["POST"]),
    ]


class _Desk:
    """Sessions, and what is known of all tasks for some seconds."""

    def __init__(self, known: Known, secret: str) -> None:
        self._known = known
        self._sessions = URLSafeTimedSerializer(secret, salt="apprentice-session")
        self._secret = secret.encode()
        self._read: tuple[Seconds, list[TaskView]] | None = None
        self._reading = asyncio.Lock()

    def endpoint(
        self, run: Callable[[Visit], Awaitable[Response]], role: str | None = None
    ) -> Callable[[Request], Awaitable[Response]]:
        """The page for whoever may see it: a key with `role`; without one, with feedback or operate."""

        async def visited(request: Request) -> Response:
            visitor = await self._visitor(request)
            if visitor is None:
                return _told(RedirectResponse(f"{PATH}/login", 303))
            try:
                if role is not None and role not in visitor.roles:
                    raise Refused(403, "Not with this key", f"This needs a key with the role {role}.")
                form = await _form(request) if request.method == "POST" else {}
                if request.method == "POST" and not hmac.compare_digest(form.get("token", ""), visitor.token):
                    raise Refused(403, "Not from here", "This form is not from a page of this session. Load it again.")
                return _told(await run(Visit(request, request.app.state.gateway, visitor, form)))
            except (Refused, ApprenticeError) as error:
                return _refusal(error, visitor)

        return visited

    async def login(self, request: Request) -> Response:
        """The form for a key, and the session that it begins."""
        if request.method == "GET":
            return _told(HTMLResponse(pages.render("login.html", visitor=None, problem="")))
        gateway: Gateway = request.app.state.gateway
        try:
            key = await gateway.keyring.find((await _form(request)).get("key", "").strip())
        except (Refused, ApprenticeError) as error:
            return _refusal(error, None)
        if key is None or not _may_look(key):
            problem = "This is no key of this gateway with the role feedback or operate."
            return _told(HTMLResponse(pages.render("login.html", visitor=None, problem=problem), 403))
        answer = RedirectResponse(PATH, 303)
        cookie = self._sessions.dumps([key.id, secrets.token_urlsafe(16)])
        encrypted = request.headers.get("origin", "").startswith("https://")
        answer.set_cookie(_COOKIE, str(cookie), path=PATH, httponly=True, samesite="strict", secure=encrypted)
        return _told(answer)

    async def _visitor(self, request: Request) -> Visitor | None:
        """Who has the session, while the key works."""
        gateway: Gateway = request.app.state.gateway
        if gateway.settings.keyless:
            return Visitor(
                "everybody", frozenset({"call", "feedback", "operate"}), self._token("everybody"), leaves=False
            )
        cookie = request.cookies.get(_COOKIE, "")
        try:
            id, _ = self._sessions.loads(cookie, max_age=_SESSION)
        except BadSignature:
            return None
        key = next((key for key in await self._known(gateway.store) if key.id == id), None)
        if key is None or not _may_look(key):
            return None
        return Visitor(key.name, frozenset(key.roles), self._token(cookie))

    def _token(self, session: str) -> str:
        return hmac.digest(self._secret, f"form/{session}".encode(), "sha256").hex()

    async def _tasks(self, gateway: Gateway) -> list[TaskView]:
        """Every task, read once for all who ask at the same time."""
        async with self._reading:
            if self._read is None or time.monotonic() - self._read[0] > _FRESH:
                found = await views.read(gateway.config, gateway.store, now=time.time())
                self._read = time.monotonic(), found
            return self._read[1]

    async def overview(self, visit: Visit) -> Response:
        return visit.page("overview.html", tasks=await self._tasks(visit.gateway))

    async def task(self, visit: Visit) -> Response:
        name = visit.gateway.config.task(visit.path["name"]).name
        tasks = await self._tasks(visit.gateway)
        return visit.page("task.html", task=next(task for task in tasks if task.report.task == name))


# --- pages ---------------------------------------------------------------------------------------------------------------


async def _request(visit: Visit) -> Response:
    record = await _record(visit)
    served = record.remote if record.served == "remote" else record.local
    said = await _said(visit, record)
    target = said.target if said is not None else served.output if served is not None else None
    back = visit.request.query_params.get("back", "")
    return _asking(visit, record, said, target=pages.pretty(target), back=back if _is_ours(back) else "")


def _asking(
    visit: Visit,
    record: Record,
    said: Correction | None,
    *,
    target: str,
    back: str,
    comment: str = "",
    problem: str = "",
    status: int = 200,
) -> Response:
    return visit.page(
        "request.html",
        status=status,
        record=record,
        said=said,
        target=target,
        comment=comment,
        problem=problem,
        back=back,
    )


async def _say(visit: Visit) -> Response:
    """Keep what a person said; what cannot be kept is shown again, with the reason."""
    record, app, form = await _record(visit), visit.gateway.app, visit.form
    comment, by = form.get("comment", ""), visit.visitor.by
    try:
        match form.get("action"):
            case "approved":
                await app.afeedback(record.request_id, by=by, comment=comment)
            case "withdrawn":
                await app.afeedback(record.request_id, withdrawn=True, by=by, comment=comment)
            case "corrected":
                target = _target(form.get("target", ""))
                await app.afeedback(record.request_id, corrected=target, by=by, comment=comment)
            case _:
                raise Refused(400, "Not understood", "A form says corrected, approved or withdrawn.")
    except InvalidRequest as error:
        said = await _said(visit, record)
        back = form.get("back", "")
        return _asking(
            visit,
            record,
            said,
            target=form.get("target", ""),
            back=back if _is_ours(back) else "",
            comment=comment,
            problem=str(error),
            status=400,
        )
    return visit.back(f"{PATH}/requests/{quote(record.request_id, safe='')}")


def _target(text: str) -> Json:
    try:
        target = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the right output is not JSON: {error}") from error
    if target is None:
        raise InvalidRequest("null is no output that could be learned")
    return target


async def _review(visit: Visit) -> Response:
    task = visit.gateway.config.task(visit.path["name"])
    found = await views.queue(visit.gateway.store, task, after=visit.request.query_params.get("after", ""))
    return visit.page("review.html", name=task.name, found=found)


async def _versions(visit: Visit) -> Response:
    task = visit.gateway.config.task(visit.path["name"]).name
    found = await lineage.read(visit.gateway.store, task)
    champions = [made.version for made in found.history if made.state == "champion"]
    before = next((version for version in reversed(champions) if version != champions[-1]), None)
    return visit.page("versions.html", name=task, found=found, before=before, metrics=METRICS)


async def _change(visit: Visit) -> Response:
    """Ask whether it is meant, and do it."""
    name, version, how = visit.gateway.config.task(visit.path["name"]).name, visit.path["version"], visit.path["how"]
    found = await visit.gateway.store.versions(name)
    if how not in ("promote", "rollback") or all(one.id != version for one in found):
        raise Refused(404, "Not found", "There is no such version of this task.")
    if visit.request.method == "GET":
        champion = next((one.id for one in found if one.state == "champion"), None)
        return visit.page("confirm.html", name=name, version=version, champion=champion, how=how)
    app, why = visit.gateway.app, visit.form.get("why", "")[:1_000]
    change = app.apromote if how == "promote" else app.arollback
    await change(name, version, by=visit.visitor.by, why=why)
    return visit.back(f"{PATH}/tasks/{quote(name, safe='')}/versions")


async def _logout(visit: Visit) -> Response:
    answer = RedirectResponse(f"{PATH}/login", 303)
    answer.delete_cookie(_COOKIE, path=PATH, httponly=True, samesite="strict")
    return answer


async def _static(request: Request) -> Response:
    name = request.path_params["file"]
    if name not in _STATIC:
        return _told(Response("not found", 404))
    return _told(Response(pages.static(name), media_type=_STATIC[name]))


async def _record(visit: Visit) -> Record:
    record = await visit.gateway.store.record(visit.path["id"])
    if record is None:
        raise UnknownRequest("no such request is recorded")
    visit.gateway.config.task(record.task)  # of a task that is no longer configured nothing is shown
    return record


async def _said(visit: Visit, record: Record) -> Correction | None:
    words = await visit.gateway.store.corrections(record.task, request_id=record.request_id)
    return current(words).get(record.request_id)


# --- what a browser may send and is told ---------------------------------------------------------------------------------


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form that a page of ours sent. Raises Refused."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
    if origin is None or urlsplit(origin).netloc.lower() != request.headers["host"].lower() or site != "same-origin":
        raise Refused(403, "Not from here", "Forms are taken from the pages of this gateway only.")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Refused(415, "Not understood", "This is no form.")
    sent = bytearray()
    try:
        async with asyncio.timeout(_PATIENCE):
            async for part in request.stream():
                sent += part
                if len(sent) > _LARGEST:
                    raise Refused(413, "Too large", "This is more than a form may hold.")
        fields = parse_qs(sent.decode(), keep_blank_values=True, max_num_fields=20, errors="strict")
    except TimeoutError as error:
        raise Refused(408, "Too slow", "The form did not arrive in time.") from error
    except ValueError as error:
        raise Refused(400, "Not understood", "This is no form.") from error
    return {name: values[-1].replace("\r\n", "\n") for name, values in fields.items()}


def _may_look(key: Key) -> bool:
    return bool({"feedback", "operate"} & key.roles)


def _is_ours(path: str) -> bool:
    """Whether it is a path of a page, and no address of another place."""
    return path.startswith(f"{PATH}/") and path.isascii() and path.isprintable() and "\\" not in path


def _refusal(error: Refused | ApprenticeError, visitor: Visitor | None) -> Response:
    if isinstance(error, Refused):
        status, title, hint = error.status, error.title, None
    else:
        status, title = next(found for kind, found in _STATUSES if isinstance(error, kind))
        hint = error.hint
    page = pages.render("refused.html", visitor=visitor, title=title, message=str(error), hint=hint)
    return _told(HTMLResponse(page, status))


def _told(answer: Response) -> Response:
    answer.headers.update(_HEADERS)
    return answer


_STATUSES: tuple[tuple[type[ApprenticeError], tuple[int, str]], ...] = (
    (UnknownTask, (404, "Not found")),
    (UnknownRequest, (404, "Not found")),
    (InvalidRequest, (400, "Not possible")),
    (ConfigError, (409, "Not possible")),
    (ApprenticeError, (503, "Not possible now")),
)
