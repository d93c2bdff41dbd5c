"""A store with a history, and a live gateway that serves the pages."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from apprentice import plugins
from apprentice.config import Config
from apprentice.dashboard.routes import routes
from apprentice.gateway import Settings, keys
from apprentice.gateway.app import build
from apprentice.gateway.keys import Role
from apprentice.gateway.server import listen, server
from apprentice.learn import learn
from apprentice.types import Answer, Decision, Record, Score, Store

from ..conftest import SORTS, right, texts

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def record(number: int, text: str, *, local: str | None = None, remote: str | None = None, **more: Any) -> Record:
    """A request as it is recorded: the remote was served where it answered, and both were compared where both did."""
    answers = {
        name: Answer(output={"kind": said}, model=f"{name}-model", cost=100 if name == "remote" else 0, confidence=sure)
        for name, said, sure in (("local", local, 0.5), ("remote", remote, None))
        if said is not None
    }
    both = local is not None and remote is not None
    decision = Decision(
        route="both" if both else "remote" if local is None else "local",
        reason="audit" if both else "no_local_model" if local is None else "certified",
        p=0.25,
        audit=both,
    )
    given: dict[str, Any] = {
        "request_id": f"r{number}",
        "task": "sort",
        "at": 1_000_000.0 + number,
        "input": {"text": text},
        "decision": decision,
        "served": "remote" if remote is not None else "local",
        "score": Score(value=float(local == remote)) if both else None,
        "cost": 100 if remote is not None else 0,
        "version": None if local is None else "v1",
    }
    return Record(**(given | answers | more))


async def history(config: Config, store: Store, n: int = 60) -> None:
    """Remote answers, two versions made of them with the first as champion, then audits of which every fifth differs."""
    for number, text in enumerate(texts(n)):
        await store.append(record(number, text, remote=right(text)))
    for at in (2_000_000.0, 2_000_001.0):
        await learn(config, "sort", store, clock=lambda at=at: at, owner="tests", force=True)  # type: ignore[misc]
    kinds = list(SORTS)
    for number, text in enumerate(texts(40, seed=1), n):
        kind = right(text)
        local = kinds[(kinds.index(kind) + 1) % 3] if number % 5 == 0 else kind
        await store.append(record(number, text, local=local, remote=kind))


@contextlib.asynccontextmanager
async def opened(config: Config) -> AsyncIterator[Store]:
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    try:
        yield store
    finally:
        await store.close()


@dataclass(slots=True)
class Live:
    """A gateway that serves; `browser` keeps cookies and does not follow redirects."""

    url: str
    browser: httpx2.AsyncClient
    store: Store
    config: Config

    async def key(self, *roles: Role) -> str:
        made = await keys.create(self.store, "-".join(roles) + str(time.time()), frozenset(roles), at=time.time())
        return made.secret

    async def post(self, path: str, *, origin: str | None = None, **fields: str) -> httpx2.Response:
        """A form as a browser sends it."""
        headers = {"origin": self.url if origin is None else origin}
        return await self.browser.post(path, data=fields, headers={k: v for k, v in headers.items() if v})

    async def login(self, *roles: Role) -> str:
        """Begin a session with a new key of these roles; the key."""
        secret = await self.key(*roles)
        answer = await self.post("/dashboard/login", key=secret)
        while answer.status_code == 403:  # the process rereads the keys every now and then
            await asyncio.sleep(0.02)
            answer = await self.post("/dashboard/login", key=secret)
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard")
        return secret

    async def token(self, path: str = "/dashboard") -> str:
        """What a form on this page carries."""
        found = re.search(r'name="token" value="([0-9a-f]+)"', (await self.browser.get(path)).text)
        assert found is not None
        return found[1]


type Serving = Callable[..., contextlib.AbstractAsyncContextManager[Live]]


@pytest.fixture
def serving(configured: Callable[..., Config]) -> Serving:
    """`async with serving() as live`: keyword arguments are settings of the gateway."""

    @contextlib.asynccontextmanager
    async def start(**given: Any) -> AsyncIterator[Live]:
        config = configured(local={"learn": "off"})
        async with (
            opened(config) as store,
            running(config, **given) as url,
            httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as browser,
        ):
            yield Live(url, browser, store, config)

    return start


@contextlib.asynccontextmanager
async def running(config: Config, **given: Any) -> AsyncIterator[str]:
    """The gateway with the pages, on a port of its own; its address."""
    settings = Settings(**({"port": 0} | given))
    listening = listen(settings)
    served = server(build(config, settings, routes=routes(keys.known), seed=1), settings)
    task = asyncio.create_task(served.serve(sockets=[listening]))
    try:
        while not served.started and not task.done():
            await asyncio.sleep(0.01)
        assert served.started
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        served.should_exit = True
        await task
        listening.close()
