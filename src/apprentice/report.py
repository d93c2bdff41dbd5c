"""Values for people and machines: where a task stands, what it cost, what it saved. No rendering, nothing is changed.

Everything here is a query over what the store keeps; no model is loaded, no key is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, tzinfo
from decimal import Decimal
from zoneinfo import ZoneInfo

from apprentice import agreement, budget, calibration, comparison, confidence, decide, jobs, lineage
from apprentice.comparison import Comparison
from apprentice.config import Config, TaskConfig
from apprentice.errors import InvalidRequest
from apprentice.jobs import Training
from apprentice.promotion import Ramp
from apprentice.types import (
    Cap,
    Confidence,
    Decision,
    Event,
    Evidence,
    Micros,
    Mode,
    Phase,
    Promotion,
    Purpose,
    Reason,
    Record,
    Seconds,
    Source,
    Spending,
    Store,
    Value,
    Version,
)

_PAGE = 1000  # Records read at a time
_LAG = 256  # Records that a decision may be behind the store, at most, and still be recognised
_POINTS = 20  # points of a trajectory
_ENOUGH = 20  # audits of a version, before its confidences are judged

WHY: dict[Reason, str] = {
    "no_local_model": "there was no local model yet",
    "learning": "nothing is certified and both are asked",
    "audit": "the coin came up: both were asked, to compare them",
    "deferred": "the local model was not sure enough",
    "certified": "at the level in force the local model answers alone",
    "canary": "the version that is tried out answers a share of what is served alone",
    "forced": "an operator asked for the remote",
    "local_invalid": "the local answer did not fit the schema",
    "local_failed": "the local model failed",
    "remote_failed": "the remote failed, and the local model was sure enough",
    "budget": "the caps left no room for the remote",
    "batch": "nobody waited for it: the remote answered it in a batch",
}
"""What is said to people of who answered and why."""


class Spend(Value):
    """One window: what is spent or held in it, and what it may cost at most (None: no cap)."""

    window: str
    spent: Micros
    limit: Micros | None = None
    forecast: Micros | None = None  # at the end of the window, if it goes on as it began; None while that says nothing
    reached_at: Seconds | None = None  # when the limit is reached in that case; None: not in this window


class TaskStatus(Value):
    """Where one task stands now."""

    task: str
    requests: int
    labels: int  # remote answers recorded
    confidence: Confidence
    version: Version | None = None
    mode: Mode | None = None  # what an operator asked for, while it is in force
    training: Training | None = None  # the one that goes on now, by the files of the model folder of this machine
    spend: list[Spend]
    events: list[Event]


class Point(Value):
    """A stretch of a task's requests, `first` to `last` counted from 1."""

    first: int
    last: int
    phase: Phase  # at its last request
    remote_share: float
    sampling_rate: float  # mean probability of an audit
    agreement: float | None  # mean score of the audits in it
    cost: Micros
    saved: Micros  # up to its last request


class DayLine(Value):
    """What one day of a task cost, by where the money went. Days are those of `budget.timezone`."""

    day: str  # "2026-11-21"
    requests: int
    asked_remote: int  # requests for which the remote was asked
    served_locally: int
    remote_cost: Micros  # by the ledger: all purposes, what is held at its worst case
    purposes: dict[Purpose, Micros]  # the same, by purpose
    local_cost: Micros  # of computing the local answers, at `local.cost_per_hour`
    all_remote_cost: Micros  # one answer of the remote a request, as in the report


class CalibrationLine(Value):
    """How far a version's confidences are from what they say, and how well they rank its answers.

    Over its audits and deferrals, each weighted by one over the probability that it was asked for: it speaks of all
    requests that the version answered.
    """

    version: str
    n: int  # comparisons
    ece: float  # expected calibration error; above 0 by chance alone, and the more so the fewer comparisons there are
    auroc: float | None  # 1/2 is chance; None: all scores are equal
    auroc_lower: float | None  # of a 95 % interval
    auroc_upper: float | None


class TaskReport(Value):
    """What one task cost and what it would have cost, with its history."""

    task: str
    requests: int
    failed: int
    remote_calls: int  # requests for which the remote was asked
    remote_share: float
    served_locally: int
    cost: Micros
    local_cost: Micros  # of computing the local answers, at `local.cost_per_hour`
    all_remote_cost: Micros  # one answer of the remote a request: as paid, or estimated from the size of the input
    saved: Micros  # all_remote_cost without both costs
    break_even: int | None  # the request from which on what was saved stayed above 0, to a point of the trajectory
    spending: list[Spending]  # by day, purpose and model; probes and whatever else belongs to no request included
    days: list[DayLine]  # with a request or a paid call, the oldest first
    agreement: float | None  # on all audits, whatever the version. It is not accuracy
    versions: list[Version]
    calibration: list[CalibrationLine]  # of versions with 20 audits and more that had a confidence
    teachers: Comparison | None = None  # the last one: their agreement is the ceiling of what can be taught
    trajectory: list[Point]


class Step(Value):
    """One Record of a replay: what was decided, and whether the replayed state says the same."""

    seq: int
    request_id: str
    at: Seconds
    version: str | None
    decision: Decision
    served: Source | None
    score: float | None
    cost: Micros
    lag: int | None  # Records that the decision was behind the store; None: no state of late says the same
    events: dict[str, str]  # what became true by this Record


class Ending(Value):
    """How a replay came out."""

    task: str
    records: int
    exact: int  # decided as the state after the Record before says
    lagging: int  # decided as an earlier state says: requests at the same time, in this process or in another one
    unexplained: int
    snapshot: int | None  # the Record of the state that the engine saved last; None: there is nothing to compare with
    differs: list[str]  # fields in which the replayed state differs from the engine's; empty: they are equal


class Explanation(Value):
    """One request, and the state just before it was recorded."""

    record: Record
    seq: int
    lag: int | None  # as in Step
    before: Confidence
    events: dict[str, str]  # what became true by it


class Plan(Value):
    """What a floor of the sampling costs and brings, at the assumed share of requests that the local model answers."""

    drop: float  # share of wrong answers that is to be noticed
    delay: float  # requests within which it is, in 95 of 100 cases
    floor: float  # the `min_floor` for that
    requests_per_day: float
    cost: float  # micro-dollars of one remote call
    local_share: float  # an assumption, not a promise
    audits_per_day: float
    audit_cost_per_day: Micros  # of the audits that would otherwise not have asked the remote
    cold_start: int  # requests at the beginning that the remote answers, at least
    break_even: int | None  # requests until as many calls are saved as the cold start and the audits took; None: never
    saving_per_month: Micros  # against all-remote, over 30 days after the cold start


async def status(config: Config, store: Store, *, now: Seconds, task: str | None = None) -> list[TaskStatus]:
    """Where each task stands, in the order of the configuration; or the one of that name. Raises UnknownTask."""
    tasks = config.tasks if task is None else [config.task(task)]
    return [await _status(config, one, store, now) for one in tasks]


async def _status(config: Config, task: TaskConfig, store: Store, now: Seconds) -> TaskStatus:
    history = await _read(config, task, store)
    standing = agreement.summary(history.live(), history.settings)
    ramp = await lineage.ramp(store, task.name)
    mode = history.mode
    return TaskStatus(
        task=task.name,
        requests=await store.count(task.name),
        labels=await store.count(task.name, labelled=True),
        confidence=history.with_canary(standing, ramp),
        version=history.champion,
        mode=mode if mode is not None and mode.forces_remote(now) else None,
        training=await asyncio.to_thread(jobs.running, (task.local or config.local).model_dir / task.name),
        spend=await _spend(config, task, store, now),
        events=[_without_words(event) for event in await store.events(task.name, limit=10)],
    )


def _without_words(event: Event) -> Event:
    """The event without what a client wrote as feedback: a status goes to many who may not read requests."""
    if event.name != "FEEDBACK":
        return event
    evidence = {name: value for name, value in event.evidence.items() if name != "value"}
    return event.model_copy(update={"evidence": evidence})


@dataclass(slots=True)
class _History:
    """What the store says of one task: the last snapshot of its live state, and Evidence."""

    settings: confidence.Settings
    snapshot: tuple[int, confidence.State] | None
    rows: list[Evidence]
    promotions: list[Promotion]
    champion: Version | None
    mode: Mode | None
    known: dict[str, list[float]]

    def with_canary(self, now: Confidence, ramp: Ramp) -> Confidence:
        """The standing as it is while a canary runs, if one does."""
        return lineage.with_canary(now, ramp, self.known)

    def live(self) -> confidence.State:
        """The state that an engine has: the last snapshot, and the Records after it."""
        seq, state = self.snapshot or (0, confidence.State())
        rows = (row for row in self.rows if row.seq > seq)
        for _ in confidence.fold(state, self.settings, rows, self.promotions, self.known):
            pass  # what became true was recorded by the engine
        return state


async def _read(config: Config, task: TaskConfig, store: Store, *, whole: bool = False) -> _History:
    """The task's history since the last snapshot, or all of it."""
    snapshot = None
    if (saved := await store.load_state(task.name)) is not None:
        with contextlib.suppress(ValueError):  # of another format: like the engine, build it again from the Records
            snapshot = saved[0], confidence.State.from_json(saved[1])
    changes = await store.changes(0 if snapshot is None or whole else snapshot[0])
    versions = await store.versions(task.name)  # read last, so that each version in `changes` is among them
    return _History(
        settings=confidence.settings(task.confidence_thresholds, task.sampling or config.sampling),
        snapshot=snapshot,
        rows=[row for row in changes.evidence if row.task == task.name],
        promotions=[made for made in changes.promotions if made.task == task.name],
        champion=changes.champions.get(task.name),
        mode=changes.modes.get(task.name),
        known={version.id: version.metrics.get("confidences", []) for version in versions},
    )


async def report(config: Config, store: Store) -> list[TaskReport]:
    """What each task cost, in the order of the configuration."""
    return [await _report(config, task, store) for task in config.tasks]


async def _report(config: Config, task: TaskConfig, store: Store) -> TaskReport:
    total = await store.count(task.name)
    width = max(1, -(-total // _POINTS))
    hourly, zone = (task.local or config.local).cost_per_hour, ZoneInfo(config.budget.timezone)
    money, days = _Money(hourly), dict[str, _Day]()
    stretches: list[tuple[list[Record], _Money]] = []
    stretch: list[Record] = []
    number = failed = remote_calls = served_locally = 0
    scores: list[float] = []
    compared: dict[str, _Compared] = {}
    async for record in _all(task, store):
        number += 1
        stretch.append(record)
        money.add(record)
        days.setdefault(_day_of(record.at, zone), _Day(_Money(hourly))).add(record)
        failed += record.served is None
        remote_calls += asked_remote(record)
        served_locally += record.served == "local"
        if record.decision.audit and record.score is not None:
            scores.append(record.score.value)
        if record.version is not None:
            compared.setdefault(record.version, _Compared()).add(record)
        if len(stretch) == width or number == total:
            stretches.append((stretch, replace(money)))
            stretch = []
    prices = money.prices()
    points, last = [], 0
    for records, sum_of_money in stretches:
        last += len(records)
        points.append(_point(records, last, sum_of_money.saved(prices)))
    spending = [line for line in await store.spending() if line.task == task.name]
    return TaskReport(
        task=task.name,
        requests=number,
        failed=failed,
        remote_calls=remote_calls,
        remote_share=remote_calls / number if number else 0.0,
        served_locally=served_locally,
        cost=money.cost,
        local_cost=money.local_cost,
        all_remote_cost=money.all_remote(prices),
        saved=money.saved(prices),
        break_even=_break_even(points),
        spending=spending,
        days=_day_lines(days, spending, prices, hourly),
        agreement=sum(scores) / len(scores) if scores else None,
        versions=await store.versions(task.name),
        calibration=[some.line(version) for version, some in compared.items() if some.audits >= _ENOUGH],
        teachers=await comparison.last(store, task.name),
        trajectory=points,
    )


def _break_even(points: list[Point]) -> int | None:
    """The first request of the stretches at the end of which something was saved, without a later loss."""
    first = None
    for point in points:
        first = (first or point.first) if point.saved > 0 else None
    return first


@dataclass(slots=True)
class _Money:
    """Costs of the first requests of a task, and the sums of a line through (bytes of the input, cost of the answer)."""

    cost_per_hour: Decimal
    cost: Micros = 0
    seconds: float = 0.0  # of local computing
    paid: Micros = 0  # for the answers that are known
    known: int = 0
    bytes: int = 0
    squares: int = 0
    products: int = 0
    unknown: int = 0  # answered locally alone
    unknown_bytes: int = 0

    def add(self, record: Record) -> None:
        self.cost += record.cost
        if record.local is not None:
            self.seconds += record.local.latency
        size = len(json.dumps(record.input))
        if record.remote is not None:
            self.known += 1
            self.paid += record.remote.cost
            self.bytes += size
            self.squares += size * size
            self.products += size * record.remote.cost
        elif record.served is not None:
            self.unknown += 1
            self.unknown_bytes += size

    def prices(self) -> tuple[float, float]:
        """Micro-dollars of an answer, and of a byte asked besides: least squares; the mean where that makes no sense."""
        if self.known == 0:
            return 0.0, 0.0
        spread = self.known * self.squares - self.bytes**2
        slope = (self.known * self.products - self.bytes * self.paid) / spread if spread > 0 else 0.0
        start = (self.paid - slope * self.bytes) / self.known
        return (start, slope) if slope >= 0 and start >= 0 else (self.paid / self.known, 0.0)

    def all_remote(self, prices: tuple[float, float]) -> Micros:
        """What one answer of the remote to each request that was answered would have cost."""
        return self.paid + round(prices[0] * self.unknown + prices[1] * self.unknown_bytes)

    @property
    def local_cost(self) -> Micros:
        return math.ceil(Decimal(self.seconds) / 3600 * self.cost_per_hour * 1_000_000)

    def saved(self, prices: tuple[float, float]) -> Micros:
        return self.all_remote(prices) - self.cost - self.local_cost


@dataclass(slots=True)
class _Day:
    """The requests of one day."""

    money: _Money
    requests: int = 0
    asked_remote: int = 0
    served_locally: int = 0

    def add(self, record: Record) -> None:
        self.money.add(record)
        self.requests += 1
        self.asked_remote += asked_remote(record)
        self.served_locally += record.served == "local"


def _day_of(at: Seconds, zone: tzinfo) -> str:
    return datetime.fromtimestamp(at, zone).date().isoformat()


def _day_lines(
    days: dict[str, _Day], spending: list[Spending], prices: tuple[float, float], cost_per_hour: Decimal
) -> list[DayLine]:
    purposes: dict[str, dict[Purpose, Micros]] = {}
    for line in spending:
        costs = purposes.setdefault(line.day, {})
        costs[line.purpose] = costs.get(line.purpose, 0) + line.cost
    found = []
    for name in sorted({*days, *purposes} - {""}):
        day, costs = days.get(name) or _Day(_Money(cost_per_hour)), purposes.get(name, {})
        found.append(
            DayLine(
                day=name,
                requests=day.requests,
                asked_remote=day.asked_remote,
                served_locally=day.served_locally,
                remote_cost=sum(costs.values()),
                purposes=costs,
                local_cost=day.money.local_cost,
                all_remote_cost=day.money.all_remote(prices),
            )
        )
    return found


@dataclass(slots=True)
class _Compared:
    """Confidences of one version with their scores."""

    audits: int = 0
    pairs: list[tuple[float, float]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Count the Record if it has a comparison whose probability is known, as `confidence` does for its report."""
        made, sure = record.decision, None if record.local is None else record.local.confidence
        if sure is None or record.score is None:
            return
        if made.level >= 1 or (made.threshold is not None and sure < made.threshold):
            self.weights.append(1.0)  # deferred: asked for with certainty
        elif made.audit and made.p > 0:
            self.weights.append(1 / made.p)
        else:
            return
        self.pairs.append((sure, record.score.value))
        self.audits += made.audit

    def line(self, version: str) -> CalibrationLine:
        ranking = calibration.auroc(self.pairs, self.weights)
        return CalibrationLine(
            version=version,
            n=len(self.pairs),
            ece=calibration.ece(self.pairs, self.weights),
            auroc=None if ranking is None else ranking.auroc,
            auroc_lower=None if ranking is None else ranking.lower,
            auroc_upper=None if ranking is None else ranking.upper,
        )


def asked_remote(record: Record) -> bool:
    """Whether a remote was asked for this request, with or without success."""
    return bool(record.attempts) or record.remote is not None


def _point(stretch: list[Record], last: int, saved: Micros) -> Point:
    audited = [r.score.value for r in stretch if r.decision.audit and r.score is not None]
    return Point(
        first=last - len(stretch) + 1,
        last=last,
        phase=stretch[-1].decision.phase,
        remote_share=sum(map(asked_remote, stretch)) / len(stretch),
        sampling_rate=sum(r.decision.p for r in stretch) / len(stretch),
        agreement=sum(audited) / len(audited) if audited else None,
        cost=sum(r.cost for r in stretch),
        saved=saved,
    )


async def _all(task: TaskConfig, store: Store) -> AsyncIterator[Record]:
    after = 0
    while page := await store.records(task.name, after=after, limit=_PAGE):
        for after, record in page:  # noqa: B007  (the last one is where the next page begins)
            yield record


# --- replaying ---------------------------------------------------------------------------------------------------------


async def replay(config: Config, store: Store, task: str) -> AsyncIterator[Step | Ending]:
    """Every Record with what was decided and why, the state built again from nothing; at the end, whether it fits.

    Raises UnknownTask.
    """
    configured = config.task(task)
    history = await _read(config, configured, store, whole=True)
    past, rows = _Past(history), iter(history.rows)
    lags: list[int | None] = []
    async for record in _all(configured, store):
        if (row := next(rows, None)) is None:
            break  # recorded after the history was read
        past.reach(row)
        lags.append(past.lag(record))
        yield Step(
            seq=row.seq,
            request_id=record.request_id,
            at=record.at,
            version=record.version,
            decision=record.decision,
            served=record.served,
            score=row.score,
            cost=record.cost,
            lag=lags[-1],
            events=past.fold(row),
        )
    past.end()
    replayed, live = asdict(past.state), asdict(history.live())
    exact, unexplained = lags.count(0), lags.count(None)
    yield Ending(
        task=task,
        records=len(lags),
        exact=exact,
        lagging=len(lags) - exact - unexplained,
        unexplained=unexplained,
        snapshot=None if history.snapshot is None else history.snapshot[0],
        differs=[name for name, value in replayed.items() if value != live[name]],
    )


async def explain(config: Config, store: Store, request_id: str) -> Explanation:
    """One request, with the state of certificate and detectors just before it. Raises InvalidRequest for an unknown id."""
    record = await store.record(request_id)
    if record is None:
        raise InvalidRequest(
            f"there is no request {request_id!r}", hint="`apprentice replay TASK --json` lists whole ids"
        )
    history = await _read(config, config.task(record.task), store, whole=True)
    past = _Past(history)
    for row in history.rows:
        past.reach(row)
        if row.at == record.at and await _is_at(row, record, store):
            break
        past.fold(row)
    before = agreement.summary(past.state, history.settings)
    return Explanation(record=record, seq=row.seq, lag=past.lag(record), before=before, events=past.fold(row))


async def _is_at(row: Evidence, record: Record, store: Store) -> bool:
    found = await store.records(record.task, after=row.seq - 1, limit=1)
    return found[0][1].request_id == record.request_id


@dataclass(slots=True)
class _Past:
    """A task's state as it was before each Record, and what it said of late."""

    history: _History
    state: confidence.State = field(default_factory=confidence.State)
    ramp: Ramp = field(default_factory=Ramp)
    said: deque[Confidence] = field(default_factory=lambda: deque(maxlen=_LAG))

    def reach(self, row: Evidence) -> None:
        """Come to the Record: the versions promoted before it have started."""
        self._fold([], before=row.seq)
        now = confidence.standing(self.state, self.history.settings)
        self.said.append(self.history.with_canary(now, self.ramp))

    def fold(self, row: Evidence) -> dict[str, str]:
        """What becomes true by the Record."""
        return self._fold([row], before=row.seq)

    def end(self) -> None:
        """Come to the end of the history."""
        self._fold([])

    def _fold(self, rows: list[Evidence], before: float = math.inf) -> dict[str, str]:
        promotions = [made for made in self.history.promotions if made.after < before]
        found = confidence.fold(self.state, self.history.settings, rows, promotions, self.history.known)
        said = {seen.name: seen.message for _, seen in found}
        return said | {step.name: step.message for _, step in self.ramp.fold(rows, promotions)}

    def lag(self, record: Record) -> int | None:
        """How many Records ago the state last said what was decided."""
        return next((lag for lag, said in enumerate(reversed(self.said)) if _follows(record, said)), None)


def _follows(record: Record, said: Confidence) -> bool:
    made = record.decision
    if made.reason == "batch":
        return True  # nobody decided: a file said so
    again = decide.decide(
        said,
        has_local=record.version is not None,
        forced_remote=made.reason == "forced",
        coin=0.0 if made.audit else 1.0,  # which side it fell on is in the Record
    )
    if record.version is not None and record.version == said.canary:
        again = decide.try_out(again, said, coin=0.0)
    parts = ("p", "audit", "level", "threshold", "phase")
    return record.version in (None, said.version, said.canary) and all(
        getattr(again, part) == getattr(made, part) for part in parts
    )


# --- planning ----------------------------------------------------------------------------------------------------------


def plan(
    *, delay: float, drop: float, requests_per_day: float, cost: float, local_share: float, cold_start: int
) -> Plan:
    """What it takes to notice within `delay` requests that a share `drop` is served wrong, and what is left to save.

    `cost`: micro-dollars of one remote call. `local_share` is an assumption: the share of requests that the local model
    is let answer. A delay too short for any sampling gives the floor 1 and the delay of that.

    >>> plan(delay=500, drop=0.4, requests_per_day=1000, cost=2000, local_share=0.5, cold_start=100).break_even
    305
    """
    floor = decide.floor_for_delay(delay, drop)
    saved = local_share * (1 - floor)  # calls a request, once the local model serves
    return Plan(
        drop=drop,
        delay=decide.delay_for(floor, drop),
        floor=floor,
        requests_per_day=requests_per_day,
        cost=cost,
        local_share=local_share,
        audits_per_day=floor * requests_per_day,
        audit_cost_per_day=math.ceil(floor * local_share * requests_per_day * cost),
        cold_start=cold_start,
        break_even=math.ceil(cold_start + cold_start / saved) if saved > 0 else None,
        saving_per_month=math.floor(30 * requests_per_day * saved * cost),
    )


def cold_start(config: Config, task: TaskConfig) -> int:
    """Requests at the beginning of the task that the remote answers, at least: those that teach the first version, and
    the audits that certify one which is never wrong."""
    settings = confidence.settings(task.confidence_thresholds, task.sampling or config.sampling)
    audits, bets = 0, settings.wealth_bets
    while sum((1 + bet * settings.eps) ** audits for bet in bets) < len(bets) / settings.alpha:
        audits += 1
    return task.confidence_thresholds.phase1_to_phase2 + audits


async def mean_cost(store: Store, task: str) -> float | None:
    """Micro-dollars of a remote answer of the task, the mean of the last thousand; None before the first."""
    records = await store.records(task, limit=_PAGE, labelled=True, newest=True)
    costs = [record.remote.cost for _, record in records if record.remote is not None]
    return sum(costs) / len(costs) if costs else None


async def _spend(config: Config, task: TaskConfig, store: Store, now: Seconds) -> list[Spend]:
    zone = ZoneInfo(config.budget.timezone)
    own = task.budget.limits if task.budget is not None else {}
    limits = {cap.window: cap.limit for cap in budget.caps(task.name, now, zone, overall=config.budget.limits, own=own)}
    windows = budget.windows(task.name, now, zone)
    spent = await store.spent(windows)
    found = []
    for window in windows:
        limit, over = limits.get(window), budget.elapsed(window, now, zone)
        end = budget.forecast(spent[window], over) if over > 0 else None
        moment = None if limit is None else budget.reached(Cap(window=window, limit=limit), spent[window], now, zone)
        found.append(Spend(window=window, spent=spent[window], limit=limit, forecast=end, reached_at=moment))
    return found
