"""What is told of the past: the same Records give the same state, and each decision can be explained from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import confidence, plugins, report
from apprentice.config import Config
from apprentice.engine import Apprentice
from apprentice.errors import InvalidRequest, UnknownTask
from apprentice.report import Ending, Step
from apprentice.testing.servers import serve_openai
from apprentice.types import Confidence, Evidence, Result, Store

from .conftest import YAML, honest, texts

Configured = Callable[..., Config]


@asynccontextmanager
async def opened(config: Config) -> AsyncIterator[Store]:
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    try:
        yield store
    finally:
        await store.close()


async def replayed(config: Config) -> tuple[list[Step], Ending]:
    async with opened(config) as store:
        lines = [line async for line in report.replay(config, store, "sort")]
    *steps, end = lines
    assert isinstance(end, Ending)
    return [step for step in steps if isinstance(step, Step)], end


async def play(config: Config, *, together: int = 1, n: int = 120) -> tuple[list[Result], list[Confidence]]:
    """Answers, and what the engine said of the task before each (before each group, where several go together)."""
    results, before = [], []
    async with Apprentice(config, seed=3) as app:
        questions = texts(n, seed=5)
        for first in range(0, n, together):
            before.append(await app.confidence("sort"))
            some = questions[first : first + together]
            results += await asyncio.gather(*(app.arun("sort", {"text": text}) for text in some))
            await app.idle()
    return results, before


async def test_the_records_alone_give_every_decision_and_the_state_of_the_engine(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        results, before = await play(config)
    assert {result.decision.phase for result in results} == {"cold_start", "reinforcement", "steady"}
    steps, end = await replayed(config)
    assert [step.decision for step in steps] == [result.decision for result in results]
    assert (end.records, end.exact, end.lagging, end.unexplained) == (120, 120, 0, 0)
    assert (end.snapshot, end.differs) == (120, [])
    assert "CERTIFIED" in {name for step in steps for name in step.events}

    async with opened(config) as store:
        for number in (0, 45, 80, 119):
            found = await report.explain(config, store, results[number].request_id)
            assert found.before == before[number]
            assert (found.seq, found.lag, found.record.decision) == (number + 1, 0, results[number].decision)


async def test_requests_at_the_same_time_are_decided_on_an_earlier_state_and_said_to_be(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, local={"fine_tune_batch_size": 5000})
        await play(config, together=8, n=160)
    steps, end = await replayed(config)
    assert end.unexplained == 0 and end.lagging > 0
    assert max(step.lag or 0 for step in steps) < 8
    assert end.differs == []


async def test_a_decision_that_no_state_says_and_a_state_that_no_records_give_are_shown(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        await play(config, n=60)
    async with opened(config) as store:
        [(seq, last)] = await store.records("sort", limit=1, newest=True)
        odd = last.decision.model_copy(update={"p": 0.123})
        await store.append(last.model_copy(update={"request_id": "odd", "decision": odd}))
        saved = await store.load_state("sort")
        assert saved is not None
        state = confidence.State.from_json(saved[1])
        state.labels += 1
        await store.save_state("sort", seq, state.to_json())
        explained = await report.explain(config, store, "odd")
    steps, end = await replayed(config)
    assert [step.request_id for step in steps if step.lag is None] == ["odd"]
    assert explained.lag is None
    assert end.unexplained == 1
    assert end.differs == ["labels"]


async def test_status_follows_a_running_engine_and_a_state_of_another_format_is_built_again(
    configured: Configured,
) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        async with Apprentice(config, seed=3) as app:
            for text in texts(70):
                await app.arun("sort", {"text": text})
                await app.idle()
            alive = await app.confidence("sort")
            async with opened(config) as store:
                [running] = await report.status(config, store, now=0.0)
        async with opened(config) as store:
            await store.save_state("sort", 70, '{"format": -1}')
            [rebuilt] = await report.status(config, store, now=0.0)
        async with Apprentice(config, seed=3) as app:
            again = await app.confidence("sort")
    assert alive.labels > 0
    assert running.confidence == rebuilt.confidence == again == alive


async def test_a_request_or_a_task_that_is_not_there_is_said_to_be(configured: Configured) -> None:
    config = configured()
    async with opened(config) as store:
        with pytest.raises(InvalidRequest, match="nope"):
            await report.explain(config, store, "nope")
        with pytest.raises(UnknownTask):
            await anext(report.replay(config, store, "sotr"))
        assert await replayed(config) == (
            [],
            Ending(task="sort", records=0, exact=0, lagging=0, unexplained=0, snapshot=None, differs=[]),
        )


@given(
    delay=st.floats(1, 1e5),
    drop=st.floats(0.1, 1),
    share=st.floats(0.05, 1),
    cost=st.floats(1, 1e5),
    cold=st.integers(1, 1000),
)
def test_a_plan_keeps_its_delay_and_its_money_adds_up(
    delay: float, drop: float, share: float, cost: float, cold: int
) -> None:
    found = report.plan(delay=delay, drop=drop, requests_per_day=1000, cost=cost, local_share=share, cold_start=cold)
    assert found.delay == pytest.approx(delay) if found.floor < 1 else found.delay >= delay
    a_day = 1000 * cost
    assert 30 * (share * a_day - found.audit_cost_per_day) == pytest.approx(found.saving_per_month, abs=31)
    if found.break_even is None:
        assert found.floor == 1
    else:
        served = found.break_even - cold  # requests after the cold start
        assert share * served >= (cold + share * found.floor * served) * (1 - 1e-9)
        assert share * (served - 1) <= (cold + share * found.floor * (served - 1)) * (1 + 1e-9)


@pytest.mark.parametrize("theta", [0.5, 0.8, 0.85, 0.95])
def test_no_student_is_certified_before_the_end_of_the_planned_cold_start(configured: Configured, theta: float) -> None:
    config = configured(text=YAML.replace("phase2_to_phase3: 0.80", f"phase2_to_phase3: {theta}"))
    [task] = config.tasks
    settings = confidence.settings(task.confidence_thresholds, config.sampling)
    state = confidence.State()
    confidence.start_version(state, settings, "v1", [])
    audits = 0
    while not state.certified:
        audits += 1
        confidence.observe(state, settings, Evidence(audits, "sort", 1.0, "v1", 1.0, 1.0, True, None, 1.0, "remote"))
    assert report.cold_start(config, task) == 40 + audits


async def test_the_mean_cost_is_that_of_the_remote_answers(configured: Configured) -> None:
    async with serve_openai(honest, price=(150_000, 600_000)) as server:
        config = configured(server.url)
        async with opened(config) as store:
            assert await report.mean_cost(store, "sort") is None
        results, _ = await play(config, n=10)
    async with opened(config) as store:
        assert await report.mean_cost(store, "sort") == pytest.approx(sum(r.cost for r in results) / 10)
