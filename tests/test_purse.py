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
from apprentice.config import Budget, Config, load
from apprentice.errors import BudgetError, BudgetExhausted, BudgetHeld, ConfigError
from apprentice.purse import Purse, resume, suspended_models
from apprentice.types import Event, Hold, Purpose, Seconds, Store
from tests.conftest import YAML

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

    async def reserve(
        self, worst: int, *, wait: Seconds | None = None, purpose: Purpose = "serve", **more: Any
    ) -> Hold:
        def make(at: Seconds, windows: tuple[str, ...]) -> Hold:
            name = f"{id(self)}-{next(self._ids)}"
            return Hold(attempt_id=name, task="sort", purpose=purpose, model="m", worst=worst, windows=windows, at=at)

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


@pytest.mark.parametrize(("own", "overall"), [(50, 1000), (1000, 50)])
async def test_a_call_that_one_of_two_caps_has_no_room_for_is_booked_in_neither(
    configured: Configured, tmp_path: Path, own: int, overall: int
) -> None:  # F2
    def dollars(amount: int) -> Decimal:
        return Decimal(amount).scaleb(-6)

    config = configured(budget={"daily": dollars(overall)})
    task = config.tasks[0].model_copy(update={"budget": Budget(total=dollars(own))})
    async with till(config.model_copy(update={"tasks": (task,)}), tmp_path) as here:
        windows = (await here.reserve(50)).windows
        for worst, refused in ((1, BudgetHeld), (51, BudgetExhausted)):
            with pytest.raises(refused):
                await here.reserve(worst, wait=-1.0)
            assert await here.store.spent(windows) == dict.fromkeys(windows, 50)


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


async def test_what_is_left_of_a_hold_can_be_reserved_as_soon_as_its_settling_has_begun(of: Any) -> None:
    async with of(total=100) as here:
        closing = here.purse.settle(await here.reserve(100), 40, state="settled")
        assert (await here.reserve(60, wait=-1.0)).worst == 60
        await closing


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


async def test_a_caller_who_goes_away_while_a_hold_is_booked_leaves_none_behind(of: Any) -> None:  # F18
    async with of(total=100) as here:
        for pauses in (1, 2, 3, 4, 0):
            gone = asyncio.create_task(here.reserve(100))
            for _ in range(pauses):
                await asyncio.sleep(0)
            if gone.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await gone
            else:  # the store was quicker
                assert pauses > 2
                await here.purse.settle(gone.result(), 0, state="released")
            assert await here.store.holds(2e9) == []
        assert (await here.reserve(100)).worst == 100


async def test_the_windows_and_caps_of_a_day_hold_until_its_midnight_and_not_beyond(of: Any) -> None:
    async with of(daily=100, monthly=150) as here:
        here.now = NOON + 12 * 3600 - 0.001
        await here.spend(100)
        with pytest.raises(BudgetExhausted):
            await here.reserve(1)
        here.now += 0.001
        assert (await here.reserve(50)).windows[3] == "day:2026-11-21"
        with pytest.raises(BudgetHeld):  # the month goes on
            await here.reserve(1, wait=-1.0)


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


async def test_a_call_over_midnight_is_booked_in_the_day_in_which_it_was_reserved(of: Any) -> None:  # F19
    async with of(daily=100) as here:
        here.now = NOON + 43_200 - 0.1  # 23:59:59.9
        hold = await here.reserve(80)
        here.now = NOON + 43_200 + 5
        new = await here.reserve(100)  # the new day is whole
        with pytest.raises(BudgetHeld):
            await here.reserve(1, wait=-1.0)
        await here.purse.settle(hold, 70, state="settled")
        await here.purse.settle(new, 90, state="settled")
        assert await here.store.spent(["day:2026-11-20", "day:2026-11-21"]) == {
            "day:2026-11-20": 70,
            "day:2026-11-21": 90,
        }
        with pytest.raises(BudgetExhausted):
            await here.reserve(11)  # what the old day has left over is not the new one's
        assert (await here.reserve(10)).windows[3] == "day:2026-11-21"


async def test_a_cap_below_what_is_spent_stops_calls_and_a_raised_one_lets_them_go(of: Any) -> None:  # F22
    async with of(total=1000) as first:
        await first.spend(600)
        last = await first.reserve(300)
        async with of(total=500) as lower:  # a new configuration, while the old one still runs
            for _ in range(2):
                with pytest.raises(BudgetExhausted):
                    await lower.reserve(1)
            assert await lower.store.spent(["total"]) == {"total": 900}
            await first.purse.settle(last, 250, state="settled")  # what was begun under the old cap ends in order
            with pytest.raises(BudgetExhausted):
                await lower.reserve(1)
            async with of(total=900, on_exhausted="queue") as raised:
                assert (await raised.reserve(50)).worst == 50
                waiting = asyncio.create_task(raised.reserve(100, wait=0.05))
                with pytest.raises(BudgetError):
                    await waiting
            async with of(total=1000) as raised:
                assert (await raised.reserve(100)).worst == 100
                assert await raised.store.spent(["total"]) == {"total": 1000}


async def test_a_job_that_the_month_cannot_pay_is_not_begun_and_one_of_a_week_keeps_its_hold(of: Any) -> None:  # F25
    async with of(monthly=1000) as here:
        await here.spend(700)
        with pytest.raises(BudgetExhausted):
            await here.reserve(301, purpose="train")
        job = await here.reserve(300, purpose="train")
        here.now += 7 * 86_400
        await here.purse.sweep()
        async with of(monthly=1000) as another:
            another.now = here.now
            await another.purse.open()
            await another.purse.sweep()
            assert await another.store.holds(2e9) == [job]
            with pytest.raises(BudgetHeld):
                await another.reserve(1, wait=-1.0)
        await here.purse.settle(job, 250, state="settled")
        assert await here.store.spent(["month:2026-11"]) == {"month:2026-11": 950}
        assert (await here.reserve(50)).worst == 50


async def test_a_batch_that_a_provider_has_for_a_day_keeps_its_hold(of: Any) -> None:
    async with of(total=1000) as here:
        batch, dead = await here.reserve(300, purpose="batch"), await here.reserve(200)
        here.now += 86_400
        await here.purse.sweep()
        assert await here.store.holds(2e9) == [batch]
        assert dead.worst == 200
        assert await here.store.spent(["total"]) == {"total": 500}


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


# --- caps that are changed while a process runs ---------------------------------------------------------------------------


class File:
    """The configuration's file, as a person edits it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "apprentice.yaml"

    def says(self, budget: str, own: str = "{}", description: str = "Say what kind of thing is meant") -> None:
        text = YAML.replace("BASE_URL", "http://127.0.0.1:9").replace("Say what kind of thing is meant", description)
        text = text.replace("    evaluator:", f"    budget: {own}\n    evaluator:")
        self.writes(f"{text}budget: {budget}\n")

    def writes(self, text: str) -> None:
        other = self.path.with_suffix(".new")
        other.write_text(text)
        other.replace(self.path)

    def read(self) -> Config:
        return load(self.path)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path)


async def test_calls_that_wait_go_when_the_cap_is_raised_in_the_file(file: File, tmp_path: Path) -> None:  # F22
    file.says("{total: 0.0001, on_exhausted: queue, wait: 30}")
    async with till(file.read(), tmp_path) as here:
        await here.spend(100)
        waiting = [asyncio.create_task(here.reserve(50)) for _ in range(2)]
        while not here.purse._line.locked():
            await asyncio.sleep(0)
        file.says("{total: 0.0002, on_exhausted: queue, wait: 30}")
        assert [hold.worst for hold in await asyncio.gather(*waiting)] == [50, 50]
        [said] = await here.said("BUDGET_CHANGED")
        assert (said.evidence["old"]["total"], said.evidence["new"]["total"]) == ("0.0001", "0.0002")
        assert said.message == "the budget of all tasks was changed in the file: total 0.0001 -> 0.0002"


async def test_a_cap_that_is_lowered_in_the_file_below_what_is_spent_stops_calls_and_no_process(
    file: File, tmp_path: Path
) -> None:  # F22
    file.says("{daily: 1, on_exhausted: refuse}")
    async with till(file.read(), tmp_path) as here:
        await here.spend(600)
        begun = await here.reserve(300)
        file.says("{daily: 0.0005, on_exhausted: refuse}")
        for _ in range(2):
            with pytest.raises(BudgetExhausted):
                await here.reserve(1)
        await here.purse.settle(begun, 250, state="settled")
        await here.purse.watch(here.config.tasks[0])
        await here.purse.foresee(here.config.tasks[0], gap=5.0, level=0.1)
        assert await here.store.spent(["total"]) == {"total": 850}
        file.says("{on_exhausted: refuse}")  # no cap any more
        assert (await here.reserve(5000)).worst == 5000
        assert [said.evidence["new"]["daily"] for said in await here.said("BUDGET_CHANGED")] == ["0.0005", None]


async def test_the_cap_of_one_task_and_what_is_done_at_the_end_of_the_money_follow_the_file(
    file: File, tmp_path: Path
) -> None:
    file.says("{on_exhausted: refuse, wait: 30}", own="{total: 0.0001}")
    async with till(file.read(), tmp_path) as here:
        await here.spend(100)
        with pytest.raises(BudgetExhausted):
            await here.reserve(1)
        file.says("{on_exhausted: queue, wait: 30}", own="{total: 0.0001}")
        waiting = asyncio.create_task(here.reserve(40))
        while not here.purse._line.locked():
            await asyncio.sleep(0)
        assert here.purse.budget.on_exhausted == "queue"
        file.says("{on_exhausted: queue, wait: 30}", own="{total: 0.00014}")
        assert (await waiting).worst == 40
        assert [said.evidence["budget"] for said in await here.said("BUDGET_CHANGED")] == ["all", "sort"]


@pytest.mark.parametrize("wrong", ["budget: {daily: [", "budget: {daily: -1}\n", "", None])
async def test_a_file_that_cannot_be_used_leaves_the_caps_and_is_said_once_a_change(
    file: File, tmp_path: Path, wrong: str | None
) -> None:
    file.says("{daily: 0.0001}")
    async with till(file.read(), tmp_path) as here:
        await here.spend(60)
        if wrong is None:
            file.path.unlink()
        else:
            file.writes(wrong)
        for _ in range(3):
            with pytest.raises(BudgetExhausted):
                await here.reserve(41)
        [said] = await here.said("CONFIG_INVALID")
        assert str(file.path) in said.message and "the former caps stay" in said.message
        file.says("{daily: 0.0002}")
        assert (await here.reserve(41)).worst == 41
        file.writes("tasks: 7")
        assert (await here.reserve(41)).worst == 41
        assert len(await here.said("CONFIG_INVALID")) == 2


async def test_an_edit_of_anything_else_changes_no_cap_that_the_program_has_set(file: File, tmp_path: Path) -> None:
    file.says("{daily: 100, weekly: 100}")
    config = file.read()
    stricter = config.model_copy(update={"budget": Budget(daily=Decimal("0.0001"))})
    async with till(stricter, tmp_path) as here:
        await here.spend(100)
        file.says("{daily: 100, weekly: 100}", description="Another text, which needs a restart")
        with pytest.raises(BudgetExhausted):
            await here.reserve(1)
        file.says("{daily: 100, weekly: 0.00009}")
        with pytest.raises(BudgetExhausted):
            await here.reserve(1)
        assert here.purse.budget.limits == {"daily": Decimal("0.0001"), "weekly": Decimal("0.00009")}


async def test_a_cap_that_was_raised_is_said_to_be_used_up_again(file: File, tmp_path: Path) -> None:
    file.says("{total: 0.0001}")
    async with till(file.read(), tmp_path) as here:
        for cap in (100, 200):
            file.says(f"{{total: {cap / 1e6:.6f}}}")
            await here.spend(100)
            for _ in range(2):
                with pytest.raises(BudgetExhausted):
                    await here.reserve(1)
            assert [said.evidence["limit"] for said in await here.said("BUDGET_EXHAUSTED")][-1] == cap
        assert len(await here.said("BUDGET_EXHAUSTED")) == 2
        assert [said.evidence["limit"] for said in await here.said("BUDGET_WARNING")] == [100, 100, 200, 200]


async def test_a_change_is_recorded_once_however_many_processes_follow_it(file: File, tmp_path: Path) -> None:
    file.says("{daily: 0.0001}")
    config = file.read()
    async with till(config, tmp_path) as here, till(config, tmp_path) as there:
        file.says("{daily: 0.0002}")
        await asyncio.gather(*(here.reserve(1) for _ in range(20)), *(there.reserve(1) for _ in range(20)))
        assert len(await here.said("BUDGET_CHANGED")) == 1
        assert await here.store.spent(["total"]) == {"total": 40}


async def test_a_file_that_was_broken_before_the_process_began_is_said_by_the_first_call(
    file: File, tmp_path: Path
) -> None:
    file.says("{daily: 0.0001}")
    config = file.read()
    file.writes("tasks: 7")
    async with till(config, tmp_path) as here:
        await here.spend(100)
        assert len(await here.said("CONFIG_INVALID")) == 1
        with pytest.raises(BudgetExhausted):
            await here.reserve(1)
