"""A remote that changed under the same name is noticed, soon and once; one that did not change never is."""

from __future__ import annotations

import asyncio
import contextlib
import doctest
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import plugins, probe
from apprentice.config import Config
from apprentice.engine import Apprentice
from apprentice.testing.servers import Reply, Server, asked, serve_openai
from apprentice.testing.stores import a_record
from apprentice.types import Answer, Attempt, Event, Json, Spending, Store

from .conftest import honest, texts

Configured = Callable[..., Config]
DAY = 86_400.0
TURNED = {"fruit": "animal", "animal": "tool", "tool": "fruit"}

losses = st.lists(st.floats(0, 1), max_size=40)


def test_examples_in_the_documentation_are_right() -> None:
    assert doctest.testmod(probe).failed == 0


# --- the test of one round --------------------------------------------------------------------------------------------


@given(losses, losses, st.floats(0.05, 1))
def test_two_rounds_are_one_long_round(first: list[float], second: list[float], allowed: float) -> None:
    between, _ = probe.step([], first, allowed)
    assert probe.step(between, second, allowed) == probe.step([], first + second, allowed)


@given(losses, st.floats(0.05, 1))
def test_wealth_is_never_lost_for_good_and_less_disagreement_is_never_more_evidence(
    disagreements: list[float], allowed: float
) -> None:
    wealth, value = probe.step([], disagreements, allowed)
    assert all(w > 0 for w in wealth)
    assert probe.step([], [loss / 2 for loss in disagreements], allowed)[1] <= value


@pytest.mark.parametrize("allowed", [0.05, 0.2, 0.5])
def test_a_remote_at_the_boundary_alarms_no_more_often_than_promised(allowed: float) -> None:
    """The promise is 100 probes between two false alarms; looking once in 20 probes, it is thousands."""
    dice = Random(1)
    probes = alarms = 0
    for _ in range(200):
        wealth: list[float] = []
        for _ in range(20):
            wealth, value = probe.step(wealth, [float(dice.random() < allowed) for _ in range(20)], allowed)
            probes += 20
            if value >= probe.ALARM_AT:
                alarms += 1
                wealth = []
    assert alarms <= probes / 1000
    assert alarms < probes / probe.ALARM_AT


@pytest.mark.parametrize(("allowed", "share"), [(0.05, 0.35), (0.2, 0.6)])
def test_a_clear_change_is_seen_within_two_rounds(allowed: float, share: float) -> None:
    dice = Random(2)
    seen = 0
    for _ in range(200):
        wealth: list[float] = []
        values = []
        for _ in range(2):
            wealth, value = probe.step(wealth, [float(dice.random() < share) for _ in range(20)], allowed)
            values.append(value)
        seen += max(values) >= probe.ALARM_AT
    assert seen >= 190


# --- rounds over real sockets -----------------------------------------------------------------------------------------


class Teacher:
    """A remote that may change its mind: from some moment on it answers this share of the texts otherwise."""

    def __init__(self) -> None:
        self.turned = 0.0
        self.noise = 0.0
        self.dice = Random(0)
        self.gate: asyncio.Event | None = None
        self.down = False

    def __call__(self, body: dict[str, Json]) -> Json:
        answer = honest(body)["kind"]
        text = asked(body)["text"]
        if self.down:
            return Reply(status=503, code="server_is_overloaded")
        if Random(text).random() < self.turned or self.dice.random() < self.noise:
            answer = TURNED[answer]
        return Reply({"kind": answer}, wait=self.gate if "please" in text else None)


class Clock:
    """Says what time it is, as the test wants."""

    def __init__(self) -> None:
        self.now = 1_795_218_000.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def scene(quiet: Configured) -> AsyncIterator[tuple[Clock, Teacher, Server, Config]]:
    """A remote that listens, and a task that asks it."""
    teacher = Teacher()
    async with serve_openai(teacher) as server:
        yield Clock(), teacher, server, quiet(server.url)


async def opened(config: Config) -> Store:
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    return store


async def events(config: Config, name: str) -> list[Event]:
    store = await opened(config)
    try:
        return [event for event in await store.events("sort", limit=10_000) if event.name == name]
    finally:
        await store.close()


async def paid(config: Config) -> list[Spending]:
    """The ledger's lines of probes."""
    store = await opened(config)
    try:
        return [line for line in await store.spending() if line.purpose == "probe"]
    finally:
        await store.close()


async def begin(app: Apprentice, n: int = 25) -> None:
    """So many requests, none of which is due for anything."""
    for text in texts(n):
        await app.arun("sort", {"text": text})
    await app.idle()


async def rounds(app: Apprentice, clock: Clock, n: int) -> None:
    """A request a day, which brings a round with it."""
    for _ in range(n):
        clock.now += DAY
        await app.arun("sort", {"text": "look, a pear"})
        await app.idle()


@pytest.fixture
def quiet(configured: Configured) -> Configured:
    """A task that nobody teaches: its remote is asked and probed only."""

    def make(url: str = "http://127.0.0.1:9", **sections: dict[str, Json]) -> Config:
        return configured(url, **{"local": {"learn": "off"}, "remote": {"retries": 0}} | sections)

    return make


async def test_the_first_inputs_are_asked_again_once_a_day_and_paid_for_as_probes(quiet: Configured) -> None:
    clock = Clock()
    async with serve_openai(Teacher()) as server:
        config = quiet(server.url)
        async with Apprentice(config, clock=clock) as app:
            await begin(app)
            assert len(server.requests) == 25
            await rounds(app, clock, 1)
            assert len(server.requests) == 25 + 1 + 20
            again = [asked(seen.body)["text"] for seen in server.requests[26:]]
            assert sorted(again) == sorted(texts(20))
            await app.arun("sort", {"text": "look, a plum"})  # the same day: nothing is due
            await app.idle()
            assert len(server.requests) == 47
    [event] = await events(config, "PROBED")
    told = event.evidence
    assert (told["round"], told["n"], told["agreement"], told["allowed"]) == (1, 20, 1.0, 0.2)
    assert told["served"] == ["gpt-4o-mini"]
    assert len(told["wealth"]) == 5
    store = await opened(config)
    try:
        first = [record.request_id for _, record in await store.records("sort", limit=20)]
        assert sorted(told["records"]) == sorted(first)
        assert sum(record.cost for _, record in await store.records("sort")) + told["cost"] == sum(
            line.cost for line in await store.spending()
        )
    finally:
        await store.close()
    [line] = await paid(config)
    assert (line.attempts, line.state, line.cost) == (20, "settled", told["cost"])


async def test_a_remote_that_changed_is_noticed_within_two_rounds_and_once(quiet: Configured) -> None:
    async with scene(quiet) as (clock, teacher, _server, config), Apprentice(config, clock=clock) as app:
        await begin(app)
        await rounds(app, clock, 1)
        assert await events(config, "TEACHER_CHANGED") == []
        teacher.turned = 0.7
        await rounds(app, clock, 2)
        [changed] = await events(config, "TEACHER_CHANGED")
        assert changed.key == f"TEACHER_CHANGED/{changed.evidence['round']}"
        assert changed.evidence["value"] >= 100
        assert f"{1 - changed.evidence['agreement']:.0%} disagree" in changed.message
        await rounds(app, clock, 5)  # as it is now, it stays
        assert [event.key for event in await events(config, "TEACHER_CHANGED")] == [changed.key]
        last = (await events(config, "PROBED"))[-1].evidence
        assert (last["agreement"], last["round"]) == (1.0, 8)
        teacher.turned = 0.0  # changed back: that is another change
        await rounds(app, clock, 2)
        assert len(await events(config, "TEACHER_CHANGED")) == 2


async def test_the_fresh_answers_are_kept_with_the_round_that_found_the_change(quiet: Configured) -> None:
    async with scene(quiet) as (clock, teacher, _server, config), Apprentice(config, clock=clock) as app:
        await begin(app)
        teacher.turned = 1.0
        await rounds(app, clock, 1)
    [told] = [event.evidence for event in await events(config, "PROBED")]
    store = await opened(config)
    try:
        for id, answer in zip(told["records"], told["answers"], strict=True):
            record = await store.record(id)
            assert record is not None and record.remote is not None
            assert answer == {"kind": TURNED[record.remote.output["kind"]]}
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("noise", "number"),
    [(0.0, 4), (0.06, 8), *(pytest.param(noise, 20, marks=pytest.mark.slow) for noise in (0.0, 0.06))],
)
async def test_a_remote_that_did_not_change_is_left_in_peace_for_many_rounds(
    quiet: Configured, noise: float, number: int
) -> None:
    async with scene(quiet) as (clock, teacher, _server, config), Apprentice(config, clock=clock) as app:
        teacher.noise = noise
        await begin(app)
        await rounds(app, clock, number)
    assert await events(config, "TEACHER_CHANGED") == []
    found = await events(config, "PROBED")
    assert [event.evidence["round"] for event in found] == list(range(1, number + 1))
    assert (min(event.evidence["agreement"] for event in found) < 1) == (noise > 0)


async def test_two_processes_do_not_probe_at_the_same_time_nor_one_after_the_other(quiet: Configured) -> None:
    async with (
        scene(quiet) as (clock, teacher, server, config),
        Apprentice(config, clock=clock) as one,
        Apprentice(config, clock=clock) as two,
    ):
        await begin(one)
        await two.arun("sort", {"text": "look, an otter"})
        await two.idle()
        before = len(server.requests)
        clock.now += DAY
        teacher.gate = asyncio.Event()
        await one.arun("sort", {"text": "look, a pear"})
        await arrived(server, before + 2)  # the first probe is under way
        await two.arun("sort", {"text": "look, a plum"})
        await two.idle()
        teacher.gate.set()
        await one.idle()
        clock.now += DAY / 20  # the second one looks again
        await two.arun("sort", {"text": "look, a grape"})
        await two.idle()
        assert len(server.requests) == before + 3 + 20
        clock.now += DAY
        await asyncio.gather(*(app.arun("sort", {"text": "look, a melon"}) for app in (one, two)))
        await asyncio.gather(one.idle(), two.idle())
        assert len(server.requests) == before + 3 + 20 + 2 + 20
    assert [event.evidence["round"] for event in await events(config, "PROBED")] == [1, 2]


async def test_a_restart_between_rounds_goes_on_with_the_evidence_so_far(quiet: Configured) -> None:
    async with scene(quiet) as (clock, teacher, server, config):
        async with Apprentice(config, clock=clock) as app:
            await begin(app)
            teacher.turned = 0.3
            await rounds(app, clock, 1)
        [first] = await events(config, "PROBED")
        async with Apprentice(config, clock=clock) as app:
            await rounds(app, clock, 1)
        second = (await events(config, "PROBED"))[-1]
    told = second.evidence
    assert (first.evidence["round"], told["round"]) == (1, 2)
    assert max(first.evidence["wealth"]) > 1
    again = [asked(seen.body)["text"] for seen in server.requests[-20:]]
    disagreements = [float(Random(text).random() < 0.3) for text in again]
    assert told["wealth"] == probe.step(first.evidence["wealth"], disagreements, 0.2)[0]
    assert told["wealth"] != probe.step([], disagreements, 0.2)[0]
    assert told["records"] == first.evidence["records"]


KILLED = """
import asyncio, sys
from apprentice.config import Config
from apprentice.engine import Apprentice

async def main():
    config = Config.model_validate_json(sys.stdin.read())
    async with Apprentice(config, clock=lambda: float(sys.argv[1])) as app:
        await app.arun("sort", {"text": "look, a pear"})
        await app.idle()

asyncio.run(main())
"""


async def test_a_process_that_is_killed_within_a_round_leaves_it_to_the_next_one(quiet: Configured) -> None:
    async with scene(quiet) as (clock, teacher, server, config):
        async with Apprentice(config, clock=clock) as app:
            await begin(app)
        clock.now += DAY
        teacher.gate = asyncio.Event()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, str(clock.now), stdin=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(config.model_dump_json().encode())
        process.stdin.close()
        await arrived(server, 27, process)  # its request, and its first probe
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        teacher.gate = None
        async with Apprentice(config, clock=clock) as app:
            await rounds(app, clock, 1)
    [event] = await events(config, "PROBED")
    assert (event.evidence["round"], event.evidence["n"]) == (1, 20)
    assert {line.state: line.attempts for line in await paid(config)} == {"held": 1, "settled": 20}


async def test_closing_ends_a_round_settles_what_was_sent_and_the_round_is_for_somebody_an_hour_later(
    quiet: Configured,
) -> None:
    async with scene(quiet) as (clock, teacher, server, config):
        async with Apprentice(config, clock=clock) as app:
            await begin(app)
            clock.now += DAY
            teacher.gate = asyncio.Event()
            await app.arun("sort", {"text": "look, a pear"})
            await arrived(server, 27)
        assert {line.state: line.attempts for line in await paid(config)} == {"assumed": 1}
        teacher.gate = None
        async with Apprentice(config, clock=clock) as app:
            await app.arun("sort", {"text": "look, a plum"})
            await app.idle()
        assert len(server.requests) == 28, "short-lived processes do not pay for a beginning each"
        clock.now += 3600
        async with Apprentice(config, clock=clock) as app:
            await app.arun("sort", {"text": "look, a plum"})
            await app.idle()
    assert len(await events(config, "PROBED")) == 1


async def test_caps_that_leave_no_room_skip_the_round_and_it_is_said_once(quiet: Configured) -> None:
    async with scene(quiet) as (clock, _teacher, _server, config):
        async with Apprentice(config, clock=clock) as app:
            await begin(app)
            # Room for the request, and none for a probe and the request that may come next to it.
            provider = app._calls.providers[0]
            size = provider.model().request_bytes(config.tasks[0].task, {"text": "look, a pear"})
            input, output = provider.price.input, provider.price.output
        worst = Decimal(-(-(input * size + output * 64) // 1)).scaleb(-6)
        store = await opened(config)
        try:
            spent = Decimal((await store.spent(["total"]))["total"]).scaleb(-6)
        finally:
            await store.close()
        poor = config.model_copy(update={"budget": config.budget.model_copy(update={"total": spent + worst * 2})})
        clock.now += DAY
        async with Apprentice(poor, clock=clock) as app:
            for hours in (0, 2, 2):
                clock.now += hours * 3600
                assert (await app.arun("sort", {"text": "look, a pear"})).source == "remote"
                await app.idle()
        [event] = await events(config, "PROBED")
        assert event.evidence["n"] == 0
        assert "BudgetExhausted" in event.evidence["problem"] and "BudgetExhausted" in event.message
        assert await paid(config) == []
        async with Apprentice(config, clock=clock) as app:  # there is money again
            clock.now += 3600
            await app.arun("sort", {"text": "look, a pear"})
            await app.idle()
    assert [event.evidence["round"] for event in await events(config, "PROBED")] == [0, 1]


async def test_a_remote_that_is_down_is_not_a_changed_one(quiet: Configured) -> None:
    async with scene(quiet) as (clock, teacher, server, config), Apprentice(config, clock=clock) as app:
        await begin(app)
        before = len(server.requests)
        clock.now += DAY
        teacher.gate = gate = asyncio.Event()
        await app.arun("sort", {"text": "look, a pear"})
        await arrived(server, before + 2)
        teacher.down = True
        gate.set()
        await app.idle()
        [event] = await events(config, "PROBED")
        assert (event.evidence["n"], event.evidence["agreement"]) == (1, 1.0)
        assert "ModelUnavailable" in event.evidence["problem"]
        assert len(server.requests) == before + 3  # nor is it asked on
        teacher.down = False
        await rounds(app, clock, 1)
    assert [event.evidence["n"] for event in await events(config, "PROBED")] == [1, 20]
    assert await events(config, "TEACHER_CHANGED") == []


async def test_a_forced_remote_is_not_probed_nor_is_one_without_enough_prompts(quiet: Configured) -> None:
    clock = Clock()
    async with serve_openai(Teacher()) as server:
        config = quiet(server.url)
        async with Apprentice(config, clock=clock) as app:
            await begin(app, 15)
            await rounds(app, clock, 2)  # one more different input: sixteen are too few
            assert len(server.requests) == 17
            await begin(app, 25)
            await app.mode("sort", "remote")
            await rounds(app, clock, 2)
            assert len(server.requests) == 17 + 25 + 2
            await app.mode("sort", "auto")
            await rounds(app, clock, 1)
            assert len(server.requests) == 17 + 25 + 2 + 1 + 20
    assert len(await events(config, "PROBED")) == 1


async def test_a_long_past_of_the_same_few_inputs_is_read_bit_by_bit(quiet: Configured) -> None:
    async with scene(quiet) as (clock, _teacher, server, config):
        model = f"{config.remote.provider}/{config.remote.model}"
        by = Attempt(attempt_id="a1", model=model, purpose="serve", outcome="answered", cost=1)
        answer = Answer(output={"kind": "fruit"}, model=model)
        store = await opened(config)
        said = ["a pear, as ever"] * 2_600 + texts(30)
        for at in range(0, len(said), 500):
            made = [
                a_record(f"r{at + n}", input={"text": text}, local=None, remote=answer, attempts=(by,), at=clock.now)
                for n, text in enumerate(said[at : at + 500])
            ]
            await asyncio.gather(*map(store.append, made))
        await store.close()
        async with Apprentice(config, clock=clock) as app:
            await rounds(app, clock, 1)
            assert len(server.requests) == 1
            await rounds(app, clock, 1)
            assert len(server.requests) == 2 + 20


async def test_no_prompts_is_no_probing(quiet: Configured) -> None:
    clock = Clock()
    async with serve_openai(Teacher()) as server:
        config = quiet(server.url, sampling={"probe_prompts": 0})
        async with Apprentice(config, clock=clock) as app:
            await begin(app)
            await rounds(app, clock, 2)
        assert len(server.requests) == 27
    assert await events(config, "PROBED") == []


async def test_a_question_that_was_put_otherwise_is_frozen_anew_and_accuses_nobody(quiet: Configured) -> None:
    async with scene(quiet) as (clock, teacher, _server, config):
        async with Apprentice(config, clock=clock) as app:
            await begin(app)
            await rounds(app, clock, 1)
        teacher.turned = 1.0
        task = config.tasks[0].model_copy(update={"instructions": "Say what it is not."})
        async with Apprentice(config.model_copy(update={"tasks": (task,)}), clock=clock) as app:
            await rounds(app, clock, 2)
    assert [event.evidence["n"] for event in await events(config, "PROBED")] == [20, 0, 20]
    assert await events(config, "TEACHER_CHANGED") == []


async def arrived(server: Server, requests: int, process: asyncio.subprocess.Process | None = None) -> None:
    """Wait until the server has read so many requests; for a process that sends them, only while it lives."""
    async with asyncio.timeout(120):
        while len(server.requests) < requests:
            assert process is None or process.returncode is None, "it ended before it had sent them"
            await asyncio.sleep(0.005)
