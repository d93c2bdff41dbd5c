"""The live states of an Apprentice and its store: one look serves all who wait for it, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from apprentice.config import Config
from apprentice.engine import Apprentice
from apprentice.errors import StoreError
from apprentice.follow import Follower
from apprentice.live import Live
from apprentice.testing.stores import a_record
from apprentice.types import Changes, Store

Configured = Callable[..., Config]


class Watched:
    """The store, whose looks at what is new are counted; each ends when the gate is open, the first `failing` in an error."""

    def __init__(self, store: Store) -> None:
        self.looks = self.failing = 0
        self.gate = asyncio.Event()
        self._store = store

    async def changes(self, after: int) -> Changes:
        self.looks += 1
        found = await self._store.changes(after)
        await self.gate.wait()
        if self.failing:
            self.failing -= 1
            raise StoreError("the disk is gone")
        return found

    async def written(self, *names: str) -> list[int]:
        """The numbers of these Records, written together."""
        return await asyncio.gather(*(self._store.append(a_record(name)) for name in names))

    async def looked(self, times: int) -> None:
        async with asyncio.timeout(20):
            while self.looks < times:
                await asyncio.sleep(0)


type Scene = tuple[Follower, Live, Watched]


@pytest.fixture
async def scene(configured: Configured) -> AsyncIterator[Scene]:
    async with Apprentice(configured(local={"learn": "off"})) as app, asyncio.timeout(60):
        watched = Watched(app._store)
        cast(Any, app._follower)._store = watched
        yield app._follower, app._tasks["sort"], watched
        cast(Any, app._follower)._store = app._store


async def test_records_that_were_written_together_are_folded_with_one_look(scene: Scene) -> None:
    follower, live, store = scene
    numbers = await store.written(*(f"r{i}" for i in range(64)))
    store.gate.set()
    await asyncio.gather(*(follower.reach(live, number) for number in numbers))
    assert (store.looks, live.seq, live.state.requests) == (1, max(numbers), 64)
    await follower.reach(live, min(numbers))
    assert store.looks == 1


async def test_a_record_that_comes_while_others_are_folded_is_folded_next_and_once(scene: Scene) -> None:
    follower, live, store = scene
    early = asyncio.create_task(follower.reach(live, *await store.written("early")))
    await store.looked(1)
    late = [asyncio.create_task(follower.reach(live, number)) for number in await store.written("late", "later")]
    await asyncio.sleep(0)
    assert not early.done() and store.looks == 1  # one fold at a time
    store.gate.set()
    await asyncio.gather(early, *late)
    assert (store.looks, live.state.requests) == (2, 3)


async def test_a_fold_whose_caller_goes_away_is_made_by_the_next_who_waits(scene: Scene) -> None:
    follower, live, store = scene
    one, other = await store.written("one", "other")
    leaving, staying = (asyncio.create_task(follower.reach(live, number)) for number in (one, other))
    await store.looked(1)
    leaving.cancel()
    store.gate.set()
    await staying
    assert leaving.cancelled()
    assert (store.looks, live.seq, live.state.requests) == (2, max(one, other), 2)


async def test_a_store_that_fails_is_said_to_who_asked_it_and_the_next_one_asks_again(scene: Scene) -> None:
    follower, live, store = scene
    store.failing = 1
    numbers = await store.written("one", "other")
    store.gate.set()
    said = await asyncio.gather(*(follower.reach(live, number) for number in numbers), return_exceptions=True)
    assert [type(error) for error in said] == [StoreError, type(None)]
    assert (store.looks, live.state.requests) == (2, 2)


async def test_nobody_waits_for_a_record_that_was_deleted_meanwhile(scene: Scene) -> None:
    follower, live, store = scene
    store.gate.set()
    await follower.reach(live, live.seq + 1)
    assert store.looks == 1


async def test_what_is_changed_while_others_are_folded_is_followed_before_it_is_said_to_be_done(scene: Scene) -> None:
    follower, live, store = scene
    folding = asyncio.create_task(follower.reach(live, *await store.written("one")))
    await store.looked(1)
    await store._store.set_mode("sort", "remote", None, 5.0)
    following = asyncio.create_task(follower.catch_up())
    store.gate.set()
    await asyncio.gather(folding, following)
    assert live.mode is not None and live.mode.mode == "remote"
    assert store.looks == 2
