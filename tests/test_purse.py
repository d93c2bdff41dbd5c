"""Money that others hold is waited for in order; what is spent, warned of, broken or left behind is said, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from apprentice import plugins
from apprentice.config import Config
from apprentice.errors import BudgetExhausted, BudgetHeld, ConfigError
from apprentice.purse import Purse, resume, suspended_models
from apprentice.types import Event, Hold, Seconds, Store

type Configured = Callable[..., Config]
NOON = 1_795_176_000.0  # 2026-11-20 12:00 UTC


class Till:
    """A purse over a real store, with a clock that is set by hand."""

    def __init__(self, config: Config, store: Store) -> None:
        self.now = NOON
        self.config = config
        self.store = store
        self.purse = Purse(config, store, clock=lambda: self.now)
        self._ids = count()

    async def reserve(self, worst: int, *, wait: Seconds | None = None, **more: Any) -> Hold:
        def make(at: Seconds, windows: tuple[str, ...]) -> Hold:
            name = f"{id(self)}-{next(self._ids)}"
            return Hold(attempt_id=name, task="sort", purpose="serve", model="m", worst=worst, windows=windows, at=at)

        until = None if wait is None else asyncio.get_running_loop().time() + wait
        return await self.purse.reserve(self.config.tasks[0], make, until=until, **more)

    async def spend(self, cost: int) -> None:
        hold = await self.reserve(cost)
        await self.purse.settle(hold, cost, state="settled")
        await self.purse.watch(self.config.tasks[0])

    async def said(self, name: str) -> list[Event]:
        return [event for event in await self.store.events() if event.name == name]


@asynccontextmanager
async def till(config: Config, path: Path) -> AsyncIterator[Till]:
    store: Store = plugins.build("stores", "sqlite", path=path / "ledger.db")
    try:
        opened = Till(config, store)
        await opened.purse.open()
        yield opened
    finally:
        await store.close()


@pytest.fixture
def of(configured: Configured, tmp_path: Path) -> Callable[..., Any]:
    """A till for these caps in micro-dollars."""

    def make(on_exhausted: str = "degrade", wait: float = 5.0, **caps: int) -> Any:
        limits = {name: Decimal(cap) / 1_000_000 for name, cap in caps.items()}
        return till(configured(budget={**limits, "on_exhausted": on_exhausted, "wait": wait}), tmp_path)

    return make


async def test_money_that_others_hold_is_waited_for_in_the_order_of_coming(of: Any) -> None:
    async with of(total=100) as here:
        first = await here.reserve(100)
        order: list[int] = []

        async def one(number: int) -> None:
            hold = await here.reserve(100, wait=30)
            order.append(number)
            await here.purse.settle(hold, 0, state="released")

        waiting = [asyncio.create_task(one(number)) for number in range(5)]
        await asyncio.sleep(0)
        await here.purse.settle(first, 0, state="released")
        await asyncio.gather(*waiting)
        assert order == [0, 1, 2, 3, 4]


async def test_money_that_another_process_frees_is_found_too(of: Any, configured: Configured, tmp_path: Path) -> None:
    async with of(total=100) as here, of(total=100) as there:
        held = await there.reserve(100)
        waiting = asyncio.create_task(here.reserve(60, wait=30))
        await asyncio.sleep(0)
        await there.purse.settle(held, 40, state="settled")
        assert (await waiting).worst == 60


async def test_the_wait_ends_with_the_deadline_and_with_the_configured_time(of: Any) -> None:
    async with of(total=100, wait=0.0) as here:
        await here.reserve(100)
        with pytest.raises(BudgetHeld):
            await here.reserve(1)
    async with of(total=200) as here:
        await here.reserve(100)
        with pytest.raises(BudgetHeld):
            await here.reserve(1, wait=-1.0)


async def test_spent_money_is_not_waited_for_unless_requests_are_to_queue(of: Any) -> None:
    async with of(daily=100) as here:
        await here.spend(100)
        with pytest.raises(BudgetExhausted):
            await here.reserve(1)
    async with of(daily=100, on_exhausted="queue") as here:
        waiting = asyncio.create_task(here.reserve(1, wait=30))
        await asyncio.sleep(0)
        here.now += 86_400  # a new day
        assert (await waiting).windows[3] == "day:2026-11-21"


async def test_a_caller_who_goes_away_while_waiting_leaves_no_hold_and_lets_the_next_one_go(of: Any) -> None:  # F18
    async with of(total=100) as here:
        first = await here.reserve(100)
        gone, next_one = (asyncio.create_task(here.reserve(100, wait=30)) for _ in range(2))
        while not here.purse._line.locked():
            await asyncio.sleep(0)
        gone.cancel()
        await here.purse.settle(first, 0, state="released")
        assert (await next_one).worst == 100
        assert len(await here.store.holds(2e9)) == 1


async def test_what_is_kept_back_for_audits_is_there_when_the_rest_is_not(of: Any) -> None:
    async with of(daily=10_000) as here:
        task = here.config.tasks[0]
        for _ in range(3):
            await here.spend(100)
        await here.purse.foresee(task, gap=5.0, level=0.1)  # half a day of one request in 5 s, a twentieth audited
        reserve = round(0.05 * 17_280 * 0.5 * 100)
        assert reserve > 10_000 - 300  # more than there is
        with pytest.raises(BudgetExhausted):
            await here.reserve(100, for_audits=True)
        assert (await here.reserve(100)).worst == 100


async def test_a_warning_is_said_once_at_each_mark_and_an_exhausted_cap_once(of: Any) -> None:
    async with of(total=1000) as here:
        for _ in range(10):
            await here.spend(100)
        for _ in range(3):
            with pytest.raises(BudgetExhausted):
                await here.reserve(1)
        marks = [event.evidence["reason"] for event in await here.said("BUDGET_WARNING")]
        assert marks == ["80%", "95%"]
        [said] = await here.said("BUDGET_EXHAUSTED")
        assert said.evidence == {"window": "total", "limit": 1000, "spent": 1000, "worst": 1}


async def test_a_cap_that_will_be_reached_before_its_window_ends_is_foretold_with_the_moment(of: Any) -> None:
    async with of(daily=1000) as here:
        await here.spend(600)  # at noon
        [said] = await here.said("BUDGET_WARNING")
        assert said.evidence["reason"] == "forecast"
        assert "2026-11-20 20:00" in said.message  # 400 more, at 50 an hour


async def test_a_clock_that_goes_back_opens_no_window_again(of: Any) -> None:  # F21
    async with of(daily=100) as here:
        await here.spend(100)
        here.now -= 86_400
        with pytest.raises(BudgetExhausted):
            await here.reserve(1)
    async with of(daily=100) as again:  # a new process, on a machine whose clock is wrong
        again.now = NOON - 86_400
        with pytest.raises(BudgetExhausted):
            await again.reserve(1)


async def test_holds_of_the_dead_count_as_spent_and_those_of_the_living_stay(of: Any) -> None:  # F3, F4
    async with of(total=1000) as here:
        await here.reserve(300)
        here.now += 3600
        young = await here.reserve(200)
    async with of(total=1000) as later:
        later.now = NOON + 3600
        await later.purse.sweep()
        assert [hold.attempt_id for hold in await later.store.holds(2e9)] == [young.attempt_id]
        [line] = [line for line in await later.store.spending() if line.state == "assumed"]
        assert line.cost == 300


async def test_a_bill_above_the_hold_is_booked_as_it_is_and_the_model_stays_suspended_until_a_person_speaks_for_it(
    of: Any,
) -> None:  # F9
    async with of(total=1000) as here:
        hold = await here.reserve(100)
        await here.purse.settle(hold, 250, state="settled")
        assert await here.store.spent(["total"]) == {"total": 250}
        [said] = await here.said("CONTRACT_BROKEN")
        assert (said.evidence["billed"], said.evidence["worst"]) == (250, 100)
        assert await suspended_models(here.store) == {"m": "sort"}
        with pytest.raises(ConfigError) as refused:
            await resume(here.store, "other", at=NOON)
        assert refused.value.hint == "suspended: m"
        await resume(here.store, "m", at=NOON)
        assert await suspended_models(here.store) == {}
