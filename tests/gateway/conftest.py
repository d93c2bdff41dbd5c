"""A live gateway: real sockets in front, a provider on loopback behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from apprentice import plugins
from apprentice.config import Config
from apprentice.gateway import Settings, keys
from apprentice.gateway.app import build
from apprentice.gateway.desk import Gateway
from apprentice.gateway.door import Door
from apprentice.gateway.keys import ROLES, Role
from apprentice.gateway.server import Server, listen, server
from apprentice.testing.servers import Server as Provider
from apprentice.testing.servers import serve_openai
from apprentice.types import Json, Record, Store

from ..conftest import honest


@dataclass(slots=True)
class Live:
    """A gateway that serves. `key` has every role; `client` sends it."""

    url: str
    key: str
    client: httpx2.AsyncClient
    store: Store
    provider: Provider
    config: Config
    server: Server

    @property
    def door(self) -> Door:
        found = self.server.config.loaded_app
        assert isinstance(found, Door)
        return found

    @property
    def gateway(self) -> Gateway:
        found: Gateway = self.door.inside.state.gateway
        return found

    async def new_key(self, name: str, *roles: Role, **limits: str) -> str:
        amounts = {window: Decimal(limit) for window, limit in limits.items()}
        made = await keys.create(self.store, name, frozenset(roles), at=time.time(), limits=amounts)
        while await self.gateway.keyring.find(made.secret) is None:
            await asyncio.sleep(0.01)
        return made.secret

    async def records(self, task: str = "sort") -> list[Record]:
        return [record for _, record in await self.store.records(task)]

    async def spent(self) -> int:
        return (await self.store.spent(["total"]))["total"]

    async def raw(self, request: bytes) -> bytes:
        """What comes back for these bytes, until the gateway closes the connection."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        got = b""
        try:
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(30):
                    writer.write(request)
                    await writer.drain()
                    while part := await reader.read(65_536):
                        got += part
            return got
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


type Serving = Callable[..., contextlib.AbstractAsyncContextManager[Live]]


@pytest.fixture
def serving(configured: Callable[..., Config]) -> Serving:
    """`async with serving() as live`: keyword arguments are settings of the gateway, `answer` is what the provider says."""

    @contextlib.asynccontextmanager
    async def start(answer: Any = honest, sections: dict[str, Any] | None = None, **given: Any) -> AsyncIterator[Live]:
        async with serve_openai(answer, price=(150_000, 600_000)) as provider:
            config = configured(provider.url, **({"local": {"learn": "off"}} | (sections or {})))
            async with running(config, provider, **given) as live:
                yield live

    return start


@contextlib.asynccontextmanager
async def running(
    config: Config, provider: Provider, *, name: str = "tests", clock: Callable[[], float] = time.time, **given: Any
) -> AsyncIterator[Live]:
    settings = Settings(**({"port": 0} | given))
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    made = await keys.create(store, name, frozenset(ROLES), at=time.time())
    opened: socket.socket = listen(settings)
    url = f"http://127.0.0.1:{opened.getsockname()[1]}"
    served = server(build(config, settings, seed=1, clock=clock), settings)
    task = asyncio.create_task(served.serve(sockets=[opened]))
    try:
        while not served.started and not task.done():
            await asyncio.sleep(0.01)
        assert served.started
        headers = {"authorization": f"Bearer {made.secret}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
            yield Live(url, made.secret, client, store, provider, config, served)
    finally:
        served.should_exit = True
        await task
        opened.close()
        await store.close()


def chat(text: Json = "please look at the pear number 1", **more: Json) -> dict[str, Json]:
    """A request for a chat completion of the task."""
    return {"model": "task:sort", "messages": [{"role": "user", "content": text}]} | more
