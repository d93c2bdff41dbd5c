"""The worker collects batches at each look, and goes on teaching when it cannot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from apprentice import plugins, worker
from apprentice.bulk import Bulk
from apprentice.config import Config
from apprentice.testing.servers import serve_openai
from apprentice.types import Json, Store

from .conftest import honest, texts

type Configured = Callable[..., Config]


async def sent(config: Config, store: Store) -> None:
    bulk = Bulk(config, store, clock=time.time, owner="test")
    inputs: list[Json] = [{"text": text} for text in texts(5)]
    await bulk.send(await bulk.plan("sort", inputs))
    await bulk.close()


async def test_a_worker_collects_what_has_ended(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        try:
            await sent(config, store)
            working = asyncio.create_task(worker.forever(config, every=0.01))
            async with asyncio.timeout(60):
                while await store.batches(open=True):
                    await asyncio.sleep(0.01)
            working.cancel()
            await asyncio.wait([working])
            assert await store.count("sort", labelled=True) == 5
            costs = [record.cost for _, record in await store.records("sort")]
            assert (await store.spent(["total"]))["total"] == sum(costs) > 0
        finally:
            await store.close()


async def test_a_worker_without_the_key_says_so_once_and_one_without_batches_needs_none(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        keyed: dict[str, Any] = {"remote": config.remote.model_copy(update={"api_key_env": "NO_SUCH_KEY"})}
        without = config.model_copy(update=keyed)
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        try:
            await worker.collect(without, store)
            assert await store.events() == []
            await sent(config, store)
            for _ in range(2):
                await worker.collect(without, store)
            assert [batch.open for batch in await store.batches()] == [True]
            [event] = await store.events()
            assert event.name == "BATCH_NOT_COLLECTED"
            assert "NO_SUCH_KEY is not set" in event.message
            monkeypatch.setenv("NO_SUCH_KEY", "there it is")
            for _ in range(2):
                await worker.collect(without, store)
            assert [batch.state for batch in await store.batches()] == ["ended"]
        finally:
            await store.close()
