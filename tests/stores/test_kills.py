"""A process killed with SIGKILL in the middle of a call leaves a ledger that counts what it may have spent."""

from __future__ import annotations

import asyncio
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from benches.money import CONTEXT, POINTS, PRELOAD, QUICK, Round, assume, audit, play, start

from apprentice.errors import BudgetExhausted, BudgetHeld
from apprentice.stores.sqlite import build
from apprentice.testing.stores import a_hold
from apprentice.types import Cap

WINDOWS = ("total", "day:2026-11-21", "task:sort/total")
CAP = [Cap(window="total", limit=100)]
WORST, COST = 70, 20
KILLS = 6  # at each point: with the seven tests below more than forty


@pytest.fixture(autouse=True, scope="module")
def one_process_that_has_imported_everything() -> None:
    CONTEXT.set_forkserver_preload([*PRELOAD, "benches.money", __name__])


def one_call(pipe: Connection, path: Path, point: str, delay: float) -> None:
    """Reserve, tell the provider, hear from it, settle; but die at that point, or so many seconds after it began."""

    def here(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    async def within(name: str, work: asyncio.Task[None]) -> None:
        if name == point:
            await asyncio.wait([work], timeout=delay)
            here(name)
        await work

    async def call() -> None:
        store = build(path)
        await within("reserving", asyncio.ensure_future(store.reserve(a_hold("a", WORST, WINDOWS), CAP)))
        here("reserved")
        pipe.send("charge me")
        here("sent")
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        here("answered")
        await within("settling", asyncio.ensure_future(store.settle("a", COST, state="settled")))
        here("settled")

    asyncio.run(call())


async def look(path: Path) -> tuple[int, int]:
    """What the ledger counts, and what of it is an open hold; every window says the same."""
    store = build(path)
    try:
        spent = await store.spent(WINDOWS)
        assert len(set(spent.values())) == 1
        return spent["total"], sum(hold.worst for hold in await store.holds(2e9))
    finally:
        await store.close()


async def refused(path: Path, worst: int) -> type[Exception] | None:
    """How the next call fares."""
    store = build(path)
    try:
        await store.reserve(a_hold("next", worst, WINDOWS), CAP)
    except (BudgetExhausted, BudgetHeld) as error:
        return type(error)
    finally:
        await store.close()
    return None


DELAYS = [(point, delay) for point in ("reserving", "settling") for delay in (0.001, 0.002, 0.005, 0.2)]


@pytest.mark.parametrize(("point", "delay"), [*[(point, 0.0) for point in POINTS], *DELAYS])
def test_what_a_dead_process_may_have_spent_counts_until_it_is_assumed_and_after(
    tmp_path: Path, point: str, delay: float
) -> None:
    path = tmp_path / "store.db"
    asyncio.run(build(path).close())
    process, pipe = start(one_call, path, point, delay)
    charged = 0
    try:
        assert pipe.recv() == "charge me"
        charged = COST
        pipe.send("20 micro-dollars")
    except (EOFError, ConnectionError):
        assert charged or point in ("reserving", "reserved")
    process.join()
    assert process.exitcode == -signal.SIGKILL

    spent, held = asyncio.run(look(path))
    possible = {
        "reserving": [(0, 0), (WORST, WORST)],
        "settling": [(WORST, WORST), (COST, 0)],
        "settled": [(COST, 0)],
    }.get(point, [(WORST, WORST)])
    assert (spent, held) in possible
    assert charged <= spent
    if held:
        assert asyncio.run(refused(path, 31)) is BudgetHeld
    assert assume(path, "a") == (held > 0)
    assert asyncio.run(look(path)) == (spent, 0)
    assert asyncio.run(refused(path, 101 - spent)) is BudgetExhausted
    assert asyncio.run(refused(path, 100 - spent)) is None


@pytest.mark.parametrize("point", [*POINTS, "any"])
def test_processes_that_die_in_the_middle_of_many_calls_overspend_nothing(tmp_path: Path, point: str) -> None:
    scale = QUICK._replace(day=80_000, life=1e5, mortality=1 / 20, points=(point,))
    if point == "any":
        scale = scale._replace(life=0.1, mortality=0.0)
    path = tmp_path / "money.db"
    rounds: list[Round] = []
    kills = assumed = 0
    while kills < KILLS:
        rounds.append(Round(len(rounds), 2, scale.day))
        played = play(path, rounds[-1], scale)
        kills += played.kills
        assumed += played.assumed
    found = audit(path, rounds)
    assert found.charged > 0
    assert (found.overspend, found.booked_over, found.missing, found.short, found.twisted, found.held) == (0,) * 6
    if point in ("reserved", "sent", "answered"):
        assert assumed >= kills
