"""What is told of the past: the same Records give the same state, and each decision can be explained from it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import confidence, plugins, report
from apprentice.calibration import auroc
from apprentice.cli import main
from apprentice.config import Config, parse
from apprentice.engine import Apprentice
from apprentice.errors import InvalidRequest, UnknownTask
from apprentice.report import CalibrationLine, Ending, Step
from apprentice.testing.servers import serve_openai
from apprentice.types import Answer, Confidence, Decision, Evidence, Hold, Record, Result, Score, Store

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


class Lived(NamedTuple):
    """The store of an engine that taught a student and let it serve, for tests that only look; and what it answered."""

    config: Config
    results: list[Result]
    before: list[Confidence]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    async def live() -> Lived:
        async with serve_openai(honest) as server:
            folder = tmp_path_factory.mktemp("lived")
            config = parse(YAML.replace("BASE_URL", server.url), folder / "apprentice.yaml")
            return Lived(config, *await play(config))

    return asyncio.run(live())


async def test_the_records_alone_give_every_decision_and_the_state_of_the_engine(lived: Lived) -> None:
    config, results, before = lived
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
        await play(config, together=8, n=96)
    steps, end = await replayed(config)
    assert end.unexplained == 0 and end.lagging > 0
    assert max(step.lag or 0 for step in steps) < 8
    assert end.differs == []


async def test_a_decision_that_no_state_says_and_a_state_that_no_records_give_are_shown(
    lived: Lived, configured: Configured
) -> None:
    config = configured()
    Path(config.store.path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(lived.config.store.path, config.store.path)
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
            for text in texts(50):
                await app.arun("sort", {"text": text})
                await app.idle()
            alive = await app.confidence("sort")
            async with opened(config) as store:
                [running] = await report.status(config, store, now=0.0)
        async with opened(config) as store:
            await store.save_state("sort", 50, '{"format": -1}')
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


def compared(number: int, confidence: float | None, score: float | None, **made: Any) -> Record:
    """A request that v1 answered; `made`: its decision, an audit at one in ten where nothing else is said."""
    given = {"route": "both", "reason": "audit", "audit": True, "p": 0.1, "level": 0.2, "threshold": 0.5, **made}
    return Record(
        request_id=f"r{number}-{made}",
        task="sort",
        at=float(number),
        input={"text": "a pear"},
        decision=Decision(**given),
        version="v1",
        local=Answer(output={"kind": "fruit"}, confidence=confidence),
        score=None if score is None else Score(value=score),
    )


@asynccontextmanager
async def told(config: Config, records: list[Record]) -> AsyncIterator[list[CalibrationLine]]:
    async with opened(config) as store:
        for record in records:
            await store.append(record)
        [found] = await report.report(config, store)
        yield found.calibration


async def test_confidence_is_judged_on_audits_and_deferrals_by_how_rarely_they_were_asked_for(
    configured: Configured,
) -> None:
    deferral = {"reason": "deferred", "audit": False}
    records = [
        *(compared(number, 0.95, 1.0) for number in range(15)),  # ten requests each
        *(compared(number, 0.85, 0.0) for number in range(15, 20)),
        *(compared(number, 0.25, 0.0, **deferral) for number in range(20, 60)),  # one each
        compared(60, 0.25, 1.0),  # below the threshold: its comparison was certain, whatever the coin
        compared(61, 0.65, 0.0, audit=False, reason="local_invalid"),  # with a probability that nobody knows
        compared(62, 0.65, None),  # the remote failed
        compared(63, None, 1.0),
    ]
    async with told(configured(), records) as found:
        [line] = found
    pairs = [(0.95, 1.0)] * 15 + [(0.85, 0.0)] * 5 + [(0.25, 0.0)] * 40 + [(0.25, 1.0)]
    weights = [10.0] * 20 + [1.0] * 41
    ranking = auroc(pairs, weights)
    assert ranking is not None
    assert (line.version, line.n) == ("v1", 61)
    assert line.ece == pytest.approx((150 * 0.05 + 50 * 0.85 + 40 * 0.25 - 0.75) / 241)
    assert (line.auroc, line.auroc_lower, line.auroc_upper) == pytest.approx(ranking)


async def test_confidence_is_not_judged_on_a_handful_nor_ranked_where_all_scores_are_equal(
    configured: Configured,
) -> None:
    records = [compared(number, 0.9, 1.0) for number in range(19)]
    records += [compared(number, 0.3, 1.0, audit=False, reason="deferred") for number in range(19, 40)]
    async with told(configured(), records) as found:
        assert found == []
    async with told(configured(), [compared(40, 0.9, 1.0)]) as found:
        [line] = found
    assert (line.n, line.auroc, line.auroc_lower, line.auroc_upper) == (41, None, None, None)


async def test_a_student_at_work_is_judged_on_each_of_its_comparisons(lived: Lived) -> None:
    config = lived.config
    async with told(config, []) as found:
        [line] = [line for line in found if line.version == "v1"]
    async with opened(config) as store:
        rows = [record for _, record in await store.records("sort", limit=1000) if record.version == "v1"]
    scored = [row.decision for row in rows if row.score is not None]
    assert line.n == len([made for made in scored if made.audit or made.reason == "deferred"]) >= 20


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


# --- money ---------------------------------------------------------------------------------------------------------------


def asked(number: int, size: int, *, cost: int | None, latency: float = 0.0) -> Record:
    """A request of so many bytes; `cost` of the remote's answer, None where the local model answered alone."""
    local, remote = cost is None or latency > 0, cost is not None
    return Record(
        request_id=f"r{number}",
        task="sort",
        at=1.8e9 + number,
        input={"text": "x" * size},
        decision=Decision(route="remote" if remote else "local", reason="certified", p=0.0),
        local=Answer(output={"kind": "fruit"}, latency=latency) if local else None,
        remote=Answer(output={"kind": "fruit"}, cost=cost) if cost is not None else None,
        served="remote" if remote else "local",
        cost=cost or 0,
    )


async def reported(config: Config, records: list[Record]) -> report.TaskReport:
    async with opened(config) as store:
        for record in records:
            await store.append(record)
        [found] = await report.report(config, store)
        return found


async def test_all_remote_is_what_was_paid_and_an_estimate_by_size_for_the_rest(configured: Configured) -> None:
    paid = [asked(n, size, cost=500 + 3 * size) for n, size in enumerate([10, 50, 200, 80])]
    free = [asked(10 + n, size, cost=None) for n, size in enumerate([1000, 20])]
    found = await reported(configured(), [*paid, *free])
    assert found.all_remote_cost == sum(500 + 3 * size for size in (10, 50, 200, 80, 1000, 20))
    assert found.saved == 500 * 2 + 3 * 1020
    assert [point.saved for point in found.trajectory] == [0, 0, 0, 0, 3500, 4060]
    assert found.break_even == 5


async def test_local_computing_counts_against_what_was_saved(configured: Configured) -> None:
    records = [asked(0, 10, cost=500), *(asked(n, 10, cost=None, latency=0.5) for n in range(1, 11))]
    found = await reported(configured(local={"cost_per_hour": Decimal("7.2")}), records)
    assert found.local_cost == 10 * 1000  # half a second at 0.2 cents a second
    assert found.saved == 10 * 500 - 10 * 1000
    assert found.break_even is None


async def test_each_day_tells_what_went_to_the_remote_what_to_local_computing_and_what_all_remote_would_have_cost(
    configured: Configured,
) -> None:
    config = configured(local={"cost_per_hour": Decimal("7.2")}, budget={"timezone": "Pacific/Auckland"})
    midnight = 1_795_172_400.0  # between 2026-11-20 and 21, there
    records = [
        asked(0, 10, cost=500),
        asked(1, 10, cost=None, latency=0.5),
        asked(2, 10, cost=700, latency=0.25),  # an audit
        asked(3, 10, cost=None, latency=0.5),
    ]
    moments = (midnight - 60, midnight - 1, midnight, midnight + 80_000)
    records = [record.model_copy(update={"at": at}) for record, at in zip(records, moments, strict=True)]
    async with opened(config) as store:
        for number, (purpose, cost, day) in enumerate(
            [("serve", 500, "20"), ("serve", 700, "21"), ("probe", 40, "21"), ("probe", 30, "22"), ("serve", 0, "21")]
        ):
            windows = ("total", f"day:2026-11-{day}")
            hold = Hold(
                attempt_id=str(number), task="sort", purpose=purpose, model="m", worst=900, windows=windows, at=1.0
            )
            await store.reserve(hold, [])
            if cost:
                await store.settle(str(number), cost, state="settled")
    found = await reported(config, records)
    first, second, third = found.days
    assert [day.day for day in found.days] == ["2026-11-20", "2026-11-21", "2026-11-22"]
    assert (first.requests, first.asked_remote, first.served_locally) == (2, 1, 1)
    assert (first.remote_cost, first.local_cost, first.all_remote_cost) == (500, 1000, 500 + 600)  # the mean: 600
    assert second.purposes == {"serve": 700 + 900, "probe": 40}  # what is held counts with its worst case
    assert (second.remote_cost, second.local_cost, second.all_remote_cost) == (1640, 1500, 700 + 600)
    assert (third.requests, third.purposes, third.all_remote_cost) == (0, {"probe": 30}, 0)
    assert sum(day.all_remote_cost for day in found.days) == found.all_remote_cost
    assert sum(day.local_cost for day in found.days) == found.local_cost


def test_the_report_prints_the_last_fourteen_days(
    configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "apprentice.yaml").write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))
    day = 86_400.0
    records = [asked(number, 10, cost=500).model_copy(update={"at": 1.8e9 + number * day}) for number in range(20)]
    asyncio.run(reported(configured(), records))
    assert main(["report", "--config", str(tmp_path / "apprentice.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split() for line in lines if line.startswith("  2027-")]
    assert [line[0] for line in shown] == [f"2027-01-{number}" for number in range(21, 32)] + [
        f"2027-02-0{number}" for number in range(1, 4)
    ]
    assert shown[-1][1:] == [
        "1",
        "1",
        "0",
        "$0.0000",
        "$0.0000",
        "$0.0005",
    ]  # nothing in the ledger; what it answered for
    assert main(["report", "--json", "--config", str(tmp_path / "apprentice.yaml")]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert len(found["days"]) == 20
    assert found["days"][0]["day"] == "2027-01-15"


async def test_spending_is_told_by_day_purpose_and_model(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, sampling={"repeat_share": 1.0})
        await play(config, n=50)
    async with opened(config) as store:
        [found] = await report.report(config, store)
    assert {line.purpose for line in found.spending} == {"serve", "repeat"}
    assert sum(line.cost for line in found.spending) == found.cost
    assert sum(line.attempts for line in found.spending) == len(server.requests)


async def test_status_says_when_a_cap_will_be_reached(configured: Configured) -> None:
    noon = 1_795_176_000.0
    config = configured(budget={"daily": Decimal("0.001")})
    async with opened(config) as store:
        windows = ("total", "day:2026-11-20")
        hold = Hold(attempt_id="a", task="sort", purpose="serve", model="m", worst=600, windows=windows, at=noon)
        await store.reserve(hold, [])
        await store.settle("a", 600, state="settled")
        [found] = await report.status(config, store, now=noon)
    [day] = [line for line in found.spend if line.window == "day:2026-11-20"]
    assert (day.forecast, day.reached_at) == (1200, noon + 8 * 3600)
    [total] = [line for line in found.spend if line.window == "total"]
    assert (total.forecast, total.reached_at) == (None, None)
