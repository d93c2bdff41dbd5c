"""The ledger of every store against a ledger that is a list: any calls, caps, clocks, restarts, by two who share a store."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from apprentice import budget, plugins
from apprentice.errors import BudgetExhausted, BudgetHeld, StoreError
from apprentice.testing.stores import a_hold
from apprentice.types import Cap, Store
from tests.stores.test_contract import NAMES

ZONE = ZoneInfo("Europe/Berlin")
START = datetime(2026, 12, 31, 20, tzinfo=ZONE).timestamp()  # four hours before a day, a month and a year are over
TASKS = ("sort", "tag")
LIMITS = ("total", "monthly", "weekly", "daily")

type State = Literal["held", "settled", "assumed", "released"]


@dataclass
class Row:
    task: str
    worst: int
    day: datetime
    state: State = "held"
    cost: int = 0

    @property
    def counts(self) -> int:
        return self.worst if self.state == "held" else self.cost


@dataclass
class Model:
    """All that a ledger is: its rows. Every sum is made anew, from the dates of the rows."""

    rows: dict[str, Row] = field(default_factory=dict)
    overall: dict[str, int] = field(default_factory=dict)
    own: dict[str, dict[str, int]] = field(default_factory=lambda: {task: {} for task in TASKS})

    def within(self, limit: str, day: datetime, task: str | None) -> list[Row]:
        form = {"total": "", "monthly": "%Y-%m", "weekly": "%G-%V", "daily": "%Y-%m-%d"}[limit]
        mine = (row for row in self.rows.values() if task in (None, row.task))
        return [row for row in mine if row.day.strftime(form) == day.strftime(form)]

    def verdict(self, task: str, worst: int, day: datetime) -> type[Exception] | None:
        found: set[type[Exception]] = set()
        for whose, limits in ((None, self.overall), (task, self.own[task])):
            for name, limit in limits.items():
                rows = self.within(name, day, whose)
                spent = sum(row.cost for row in rows if row.state != "held")
                if spent + worst > limit:
                    found.add(BudgetExhausted)
                elif sum(row.counts for row in rows) + worst > limit:
                    found.add(BudgetHeld)
        return BudgetExhausted if BudgetExhausted in found else BudgetHeld if found else None

    def pick(self, number: int) -> str:
        """An open call; now and then a closed one, or one that was never made."""
        still = [name for name, row in self.rows.items() if row.state == "held"]
        names = (still if number >= 15 and still else list(self.rows)) or ["never made"]
        return "never made" if number == 0 else names[number % len(names)]

    def settle(self, name: str, cost: int, state: State) -> None:
        row = self.rows[name]
        if row.state == "held":
            row.state = state
            row.cost = {"settled": cost, "assumed": max(cost, row.worst)}.get(state, 0)


def windows(task: str, day: datetime) -> dict[str, tuple[str, str | None]]:
    """Each window of a call, and which limit of whom it is for; by the calendar of the C library."""
    forms = {"total": "total", "monthly": "month:%Y-%m", "weekly": "week:%G-W%V", "daily": "day:%Y-%m-%d"}
    found: dict[str, tuple[str, str | None]] = {}
    for limit, form in forms.items():
        found[day.strftime(form)] = (limit, None)
        found[f"task:{task}/{day.strftime(form)}"] = (limit, task)
    return found


amounts = st.integers(0, 6)  # few, so that a limit is met to the micro-dollar
limits = st.dictionaries(st.sampled_from(LIMITS), st.integers(0, 15), max_size=2)
calls = st.lists(st.tuples(st.integers(0, 99), st.sampled_from(TASKS), amounts), min_size=1, max_size=6)
ends = st.lists(
    st.tuples(st.integers(0, 99), amounts, st.sampled_from(["settled", "settled", "assumed", "released"])),
    min_size=1,
    max_size=4,
)


class Ledger(RuleBasedStateMachine):
    """Rules that act on a store and on the model, and must be answered alike."""

    build: Callable[[Path], Store]

    @initialize()
    def open(self) -> None:
        self.model = Model()
        self.now = self.seen = START
        # In memory where there is such a place: the power stays on here.
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.runner = asyncio.Runner()
        self.stores = [self._open(), self._open()]

    def _open(self) -> Store:
        return type(self).build(Path(self.folder.name) / "store")

    def wait[T](self, call: Awaitable[T]) -> T:
        async def waited() -> T:
            return await call

        return self.runner.run(waited())

    def teardown(self) -> None:
        if hasattr(self, "stores"):
            for store in self.stores:
                self.wait(store.close())
            self.runner.close()
            self.folder.cleanup()

    # --- what happens

    @rule(who=st.integers(0, 1), calls=calls)
    def reserve(self, who: int, calls: list[tuple[int, str, int]]) -> None:
        """Calls that come together are answered as if they came one after the other."""
        self.seen = max(self.seen, self.now)
        day = datetime.fromtimestamp(self.seen, ZONE)
        wanted: list[type[Exception] | None] = []
        started = []
        for number, task, worst in calls:
            name = self.model.pick(number) if number < 5 else f"a{len(self.model.rows)}"
            verdict = StoreError if name in self.model.rows else self.model.verdict(task, worst, day)
            wanted.append(verdict)
            if verdict is None:
                self.model.rows[name] = Row(task, worst, day)
            booked = budget.windows(task, self.now, ZONE, seen=self.seen)
            overall = {limit: Decimal(amount).scaleb(-6) for limit, amount in self.model.overall.items()}
            own = {limit: Decimal(amount).scaleb(-6) for limit, amount in self.model.own[task].items()}
            caps = budget.caps(task, self.seen, ZONE, overall=overall, own=own)
            started.append(self.stores[who].reserve(a_hold(name, worst, booked, task=task, at=self.seen), caps))
        answers = self.wait(_together(started))
        assert [None if answer is None else type(answer) for answer in answers] == wanted

    @rule(who=st.integers(0, 1), ends=ends)
    def settle(self, who: int, ends: list[tuple[int, int, Any]]) -> None:
        """Also twice, and of calls that were never made."""
        wanted: list[type[Exception] | None] = []
        started = []
        for number, cost, state in ends:
            name = self.model.pick(number)
            known = name in self.model.rows and not (state == "released" and cost)
            wanted.append(None if known else StoreError)
            if known:
                self.model.settle(name, cost, state)
            started.append(self.stores[who].settle(name, cost, state=state))
        answers = self.wait(_together(started))
        assert [None if answer is None else type(answer) for answer in answers] == wanted

    @rule(limits=limits)
    def change_the_caps(self, limits: dict[str, int]) -> None:
        self.model.overall = limits

    @rule(task=st.sampled_from(TASKS), limits=limits)
    def change_the_caps_of_a_task(self, task: str, limits: dict[str, int]) -> None:
        self.model.own[task] = limits

    @rule(hours=st.sampled_from([-30, -24, -5, -1, 1, 3, 5, 24, 72, 31 * 24]))
    def move_the_clock(self, hours: int) -> None:
        self.now += 3600 * hours

    @rule(who=st.integers(0, 1))
    def reopen(self, who: int) -> None:
        self.wait(self.stores[who].close())
        self.stores[who] = self._open()

    @rule()
    def assume_what_is_old(self) -> None:
        """What somebody does for processes that died."""
        old = {
            name: row
            for name, row in self.model.rows.items()
            if row.state == "held" and row.day.timestamp() < self.seen
        }
        found = self.wait(self.stores[0].holds(self.seen))
        assert {hold.attempt_id: hold.worst for hold in found} == {name: row.worst for name, row in old.items()}
        for hold in found:
            self.wait(self.stores[1].settle(hold.attempt_id, 0, state="assumed"))
            self.model.settle(hold.attempt_id, 0, "assumed")

    # --- what is always true

    @invariant()
    def every_window_is_the_sum_of_its_calls(self) -> None:
        if not hasattr(self, "stores"):
            return
        wanted = {}
        for day in {row.day for row in self.model.rows.values()} | {datetime.fromtimestamp(self.seen, ZONE)}:
            for task in TASKS:
                for window, (limit, whose) in windows(task, day).items():
                    wanted[window] = sum(row.counts for row in self.model.within(limit, day, whose))
        for store in self.stores:
            assert self.wait(store.spent(list(wanted))) == wanted

    @invariant()
    def every_call_is_listed_once_with_how_it_ended(self) -> None:
        if not hasattr(self, "stores"):
            return
        wanted: dict[tuple[str, str, str], tuple[int, int]] = {}
        for row in self.model.rows.values():
            key = (row.day.strftime("%Y-%m-%d"), row.task, row.state)
            attempts, cost = wanted.get(key, (0, 0))
            wanted[key] = (attempts + 1, cost + row.counts)
        found = self.wait(self.stores[1].spending())
        assert {(line.day, line.task, line.state): (line.attempts, line.cost) for line in found} == wanted


async def _together(calls: Sequence[Awaitable[None]]) -> list[BaseException | None]:
    return await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize(
    ("spent", "held", "worst", "verdict"),
    [  # of a limit of 100
        (0, 0, 100, None),
        (0, 0, 101, BudgetExhausted),
        (40, 0, 60, None),
        (40, 0, 61, BudgetExhausted),
        (40, 10, 50, None),
        (40, 10, 51, BudgetHeld),
        (40, 10, 60, BudgetHeld),  # there is room as soon as the ten come back
        (40, 10, 61, BudgetExhausted),
        (0, 100, 1, BudgetHeld),
        (100, 0, 0, None),
        (99, 1, 0, None),
        (100, 0, 1, BudgetExhausted),
        (120, 0, 0, BudgetExhausted),  # a call cost more than its worst case
    ],
)
@pytest.mark.parametrize("name", NAMES)
async def test_a_limit_holds_to_the_micro_dollar(
    name: str, spent: int, held: int, worst: int, verdict: type[Exception] | None, tmp_path: Path
) -> None:
    store: Store = plugins.build("stores", name, path=tmp_path / "store")
    wide, tight = Cap(window="total", limit=1_000), Cap(window="day", limit=100)
    windows = ("total", "day")
    try:
        for number, amount in enumerate((spent // 2, spent - spent // 2)):  # two calls, which add up
            await store.reserve(a_hold(f"a{number}", 1, windows), [])
            await store.settle(f"a{number}", amount, state="settled")
        await store.reserve(a_hold("h", held, windows), [])
        for caps in ([wide, tight], [tight, wide]):
            try:
                await store.reserve(a_hold("next", worst, windows), caps)
            except (BudgetExhausted, BudgetHeld) as error:
                assert type(error) is verdict
            else:
                assert verdict is None
                break
        booked = worst if verdict is None else 0
        assert await store.spent(windows) == dict.fromkeys(windows, spent + held + booked)
    finally:
        await store.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_ledger_is_nothing_but_the_sum_of_its_calls(name: str) -> None:
    def build(path: Path) -> Store:
        store: Store = plugins.build("stores", name, path=path)
        return store

    machine = type("LedgerOf", (Ledger,), {"build": staticmethod(build)})
    slowly = settings(
        max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(machine, settings=slowly)
