"""Training jobs and money: held before, settled after, once, whoever dies on the way; and never two remote jobs."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apprentice import jobs, plugins
from apprentice.config import Config
from apprentice.errors import BudgetExhausted, StoreError, TrainingError
from apprentice.purse import Purse
from apprentice.testing.finetuning import Service
from apprentice.testing.trainers import TASK, examples
from apprentice.types import Checkpoint, Example, Lease, Store, Trainer

from .conftest import YAML
from .trainers.services import OWN, QUICK, serving, trainer

type Configured = Callable[..., Config]


@dataclass
class Place:
    """A store with a purse, and a folder for models."""

    config: Config
    store: Store
    purse: Purse
    into: Path
    lease: Lease

    async def train(self, mine: Trainer, rows: list[Example] | None = None, *, token: int | None = None) -> Checkpoint:
        return await jobs.train(
            self.config.tasks[0],
            mine,
            examples() if rows is None else rows,
            into=self.into,
            seed=0,
            licence={"rows": 1},
            lease=self.lease if token is None else self.lease._replace(token=token),
            store=self.store,
            purse=self.purse,
        )

    async def spent(self) -> dict[str, int]:
        return {line.state: line.cost for line in await self.store.spending() if line.purpose == "train"}


@pytest.fixture
def at(configured: Configured, tmp_path: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def open_place(monthly: str = "1000.00") -> AsyncIterator[Place]:
        config = configured(text=YAML + f"budget: {{monthly: {monthly}, wait: 0}}\n")
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        try:
            purse = Purse(config, store, clock=time.time)
            lease = await store.acquire("learn/sort", "tests", time.time(), 60.0)
            assert lease is not None
            yield Place(config, store, purse, tmp_path / "models", lease)
        finally:
            await store.close()

    return open_place


@pytest.mark.parametrize("name", OWN)
async def test_the_worst_case_is_held_while_it_trains_and_the_bill_is_what_stays(at: Any, name: str) -> None:
    held: list[int] = []
    async with at() as here:
        with serving(name) as service:
            loop = asyncio.get_running_loop()

            def look(_: int) -> None:
                found = asyncio.run_coroutine_threadsafe(here.store.holds(math.inf), loop).result(5)
                held.extend(hold.worst for hold in found if hold.purpose == "train")

            service.before = look
            made = await here.train(trainer(name, service))
            assert held
            assert min(held) >= service.bill
            assert len(held) == len(service.asked)  # before every byte that left
            assert await here.spent() == {"settled": service.bill}
            assert made.manifest["cost"] == service.bill
            assert await here.store.holds(math.inf) == []
            service.before = lambda number: None
            await here.train(trainer(name, service))
            assert await here.spent() == {"settled": service.bill}  # the same rows are not paid for again


async def test_a_job_that_costs_more_than_the_caps_leave_is_not_begun(at: Any) -> None:
    async with at("1.00") as here:
        with serving("openai") as service:
            dear = trainer("openai", service, price_per_million=10**6)
            with pytest.raises(BudgetExhausted):
                await here.train(dear)
            assert service.asked == []
            assert await here.spent() == {}


async def test_a_failed_job_frees_what_it_did_not_cost_and_the_next_attempt_is_another_one(at: Any) -> None:
    async with at() as here:
        broken = {"code": "invalid", "message": "line 1", "param": "training_file"}
        with serving("openai", end="failed", broken=broken) as service:
            with pytest.raises(TrainingError, match="line 1"):
                await here.train(trainer("openai", service))
            assert await here.spent() == {"released": 0}
            service.end = "succeeded"
            await here.train(trainer("openai", service))
            assert await here.spent() == {"released": 0, "settled": service.bill}


async def test_a_cancelled_cycle_leaves_the_job_and_its_hold_to_the_next(at: Any) -> None:
    async with at() as here:
        with serving("openai", looks=10**6) as service:
            created = asyncio.Event()
            loop = asyncio.get_running_loop()

            def tell(_: int) -> None:
                if service.jobs:
                    loop.call_soon_threadsafe(created.set)

            service.after = tell
            cycle = asyncio.create_task(here.train(trainer("openai", service)))
            await asyncio.wait_for(created.wait(), 10)
            cycle.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(cycle, 10)
            [hold] = await here.store.holds(math.inf)
            await here.purse.sweep()  # a week of runtime leaves it alone, too
            assert await here.store.holds(math.inf) == [hold]
            service.looks = 0
            await here.train(trainer("openai", service), examples(60))
            assert (len(service.jobs), await here.spent()) == (1, {"settled": service.bill})


async def test_an_older_token_cannot_go_on_with_a_job(at: Any) -> None:
    async with at() as here:
        with serving("openai") as service:
            heir = trainer("openai", service)
            heir.quote(TASK, examples(), into=here.into, seed=0, token=9)
            with pytest.raises(TrainingError, match="taken over"):
                await here.train(trainer("openai", service), token=8)
            assert service.asked == []


async def test_a_folder_that_was_lost_does_not_stop_training(at: Any, tmp_path: Path) -> None:
    async with at() as here:
        with serving("openai") as service:
            first = await here.train(trainer("openai", service))
            here.into = tmp_path / "elsewhere"
            second = await here.train(trainer("openai", service))
            assert (first.id, service.creations) == (second.id, 1)
            assert await here.store.holds(math.inf) == []
            assert (await here.spent())["settled"] == 2 * service.bill  # nobody knows that it is paid: never too little


async def test_a_trainer_that_nobody_bills_holds_nothing(at: Any) -> None:
    async with at() as here:
        made = await here.train(plugins.build("trainers", "embedded", encoder="tfidf"))
        assert made.path.is_dir()
        assert await here.spent() == {}


def write_job(into: Path, name: str, lines: str | None, **row: Any) -> None:
    folder = into / ".training" / name
    folder.mkdir(parents=True)
    (folder / "row.json").write_text(json.dumps({"name": name, "checkpoint": None} | row))
    if lines is not None:
        (folder / "progress.jsonl").write_text(lines)


def test_a_training_is_shown_while_it_goes_on_with_what_its_own_job_told_last(tmp_path: Path) -> None:
    lease = Lease("learn/sort", "tests", 7, 0.0)
    assert jobs.running(tmp_path / "nowhere") is None
    write_job(tmp_path, "older", '{"step": 9, "steps": 9, "loss": 9}\n', token=6)
    write_job(tmp_path, "done", '{"step": 8, "steps": 8, "loss": 8}\n', token=7, checkpoint="sha256-8")
    write_job(tmp_path, "silent", None, token=7)
    with jobs.shown(tmp_path, trainer="huggingface", since=5.0, lease=lease):
        now = jobs.running(tmp_path)
        assert now == jobs.Training(trainer="huggingface", since=5.0, token=7)
        lines = '{"step": 1, "steps": 40, "loss": 2.5, "eta": 90.5}\n{"step": 2, "lo\n{"step": 3, "held_loss": 1.5}\n[3]\n{"st'
        write_job(tmp_path / ".parts", "ours", lines, token=7)
        now = jobs.running(tmp_path)
        assert now is not None and now.told_at is not None
        assert (now.step, now.steps, now.loss, now.held_loss, now.eta) == (3, 40, 2.5, 1.5, 90.5)
        told = tmp_path / ".parts" / ".training" / "ours" / "progress.jsonl"
        assert now.told_at == told.stat().st_mtime
        told.write_text('{"step": 4, "steps": 40, "loss": NaN, "eta": Infinity}\n')
        now = jobs.running(tmp_path)
        assert now is not None and (now.step, now.loss, now.eta) == (4, None, None)
        (told.with_name("row.json")).write_text("{")
        assert jobs.running(tmp_path) == jobs.Training(trainer="huggingface", since=5.0, token=7)
        (tmp_path / ".training.json").write_text('{"of": "another version"}')
        assert jobs.running(tmp_path) is None
    assert jobs.running(tmp_path) is None


def test_who_trains_next_is_shown_although_the_one_before_still_hangs(tmp_path: Path) -> None:
    older, newer = (Lease("learn/sort", "tests", token, 0.0) for token in (1, 2))
    with jobs.shown(tmp_path, trainer="embedded", since=1.0, lease=older):
        with jobs.shown(tmp_path, trainer="embedded", since=2.0, lease=newer):
            assert [now.token for now in [jobs.running(tmp_path)] if now is not None] == [2]
        assert jobs.running(tmp_path) is None
    assert jobs.running(tmp_path) is None


async def test_a_ledger_that_cannot_be_written_starts_no_job(at: Any) -> None:
    async with at() as here:
        with serving("openai") as service:
            await here.store.close()
            with pytest.raises(StoreError):
                await here.train(trainer("openai", service))
            assert service.asked == []


KILLED = """
import json, os, signal, sys
from pathlib import Path
from apprentice import plugins
from apprentice.testing.trainers import TASK, examples
from apprentice.trainers import _remote

name, settings, into, count, when = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
write, left = _remote.replace_file, [count]

def killing(path, content):
    left[0] -= 1
    if left[0] == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
    if left[0] == 0 and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)

_remote.replace_file = killing
plugins.build("trainers", name, **settings).train(TASK, examples(), into=Path(into), seed=0)
"""


def child(name: str, service: Service, into: Path, *, write: int = 0, when: str = "") -> subprocess.Popen[bytes]:
    settings = json.dumps({"base_url": service.url, "api_key_env": None, **QUICK, **OWN[name]})
    command = [sys.executable, "-c", KILLED, name, settings, str(into), str(write), when]
    return subprocess.Popen(command, env=dict(os.environ))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("write", "when"), [(1, "after"), (3, "before"), (4, "before"), (4, "after"), (5, "before")])
def test_a_process_killed_around_a_write_is_followed_by_one_that_makes_no_second_job(
    tmp_path: Path, name: str, write: int, when: str
) -> None:
    with serving(name) as service:
        killed = child(name, service, tmp_path, write=write, when=when)
        assert killed.wait(60) == -signal.SIGKILL
        made = trainer(name, service).train(TASK, examples(), into=tmp_path, seed=0)
        assert (len(service.jobs), len(service.files)) == (1, 1)
        assert made.manifest["cost"] == service.bill


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_fifty_kills_make_no_second_remote_job(tmp_path: Path, name: str) -> None:  # F63
    """At random requests, as they arrive and before their answers leave, and at random writes; five on each dataset."""
    dice, kills = random.Random(63), 0
    for round in range(10):
        into = tmp_path / str(round)
        with serving(name, looks=40) as service:
            for _ in range(5):
                if dice.random() < 0.4:
                    victim = child(name, service, into, write=dice.randint(1, 5), when=dice.choice(["before", "after"]))
                else:
                    at = len(service.asked) + dice.randint(1, 4)
                    ready: list[subprocess.Popen[bytes]] = []

                    def kill(number: int, at: int = at, ready: list[subprocess.Popen[bytes]] = ready) -> None:
                        if number == at:
                            while not ready:  # the child may ask before its Popen is here
                                time.sleep(0.001)
                            ready[0].kill()

                    setattr(service, dice.choice(["before", "after"]), kill)
                    victim = child(name, service, into)
                    ready.append(victim)
                kills += victim.wait(60) == -signal.SIGKILL
                service.before = service.after = lambda number: None
            trainer(name, service).train(TASK, examples(), into=into, seed=0)
            assert (len(service.jobs), len(service.files)) == (1, 1)
    assert kills == 50
