"""Values for people and machines: where a task stands, what it cost, what it saved. No rendering, nothing is changed.

Everything here is a query over what the store keeps; no model is loaded, no key is needed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from zoneinfo import ZoneInfo

from apprentice import budget, confidence
from apprentice.config import Config, TaskConfig
from apprentice.types import Confidence, Event, Micros, Phase, Record, Seconds, Store, Value, Version

_PAGE = 1000  # Records read at a time
_POINTS = 20  # points of a trajectory


class Spend(Value):
    """One window: what is spent or held in it, and what it may cost at most (None: no cap)."""

    window: str
    spent: Micros
    limit: Micros | None = None


class TaskStatus(Value):
    """Where one task stands now."""

    task: str
    requests: int
    labels: int  # remote answers recorded
    confidence: Confidence
    version: Version | None = None
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


class TaskReport(Value):
    """What one task cost and what it would have cost, with its history."""

    task: str
    requests: int
    failed: int
    remote_calls: int  # requests for which the remote was asked
    remote_share: float
    served_locally: int
    cost: Micros
    all_remote_cost: Micros  # estimate: the mean price of a remote answer times all requests
    saved: Micros
    agreement: float | None  # on all audits, whatever the version. It is not accuracy
    versions: list[Version]
    trajectory: list[Point]


async def status(config: Config, store: Store, *, now: Seconds) -> list[TaskStatus]:
    """Where each task stands, in the order of the configuration."""
    found = []
    for task in config.tasks:
        state, settings = await live_state(config, task, store)
        versions = await store.versions(task.name)
        found.append(
            TaskStatus(
                task=task.name,
                requests=await store.count(task.name),
                labels=await store.count(task.name, labelled=True),
                confidence=confidence.summary(state, settings),
                version=next((version for version in versions if version.state == "champion"), None),
                spend=await _spend(config, task, store, now),
                events=await store.events(task.name, limit=10),
            )
        )
    return found


async def live_state(config: Config, task: TaskConfig, store: Store) -> tuple[confidence.State, confidence.Settings]:
    """The state that an engine would be in, from the last snapshot and the Records after it."""
    settings = confidence.settings(task.confidence_thresholds, task.sampling or config.sampling)
    seq, state = 0, confidence.State()
    if (saved := await store.load_state(task.name)) is not None:
        seq, state = saved[0], confidence.State.from_json(saved[1])
    known = {version.id: version.metrics.get("confidences", []) for version in await store.versions(task.name)}
    changes = await store.changes(seq)
    confidence.fold(state, settings, [row for row in changes.evidence if row.task == task.name], known)
    if (champion := changes.champions.get(task.name)) is not None and champion.id != state.version:
        confidence.start_version(state, settings, champion.id, known[champion.id])
    return state, settings


async def report(config: Config, store: Store) -> list[TaskReport]:
    """What each task cost, in the order of the configuration."""
    return [await _report(task, store) for task in config.tasks]


async def _report(task: TaskConfig, store: Store) -> TaskReport:
    total = await store.count(task.name)
    width = max(1, -(-total // _POINTS))
    points: list[Point] = []
    stretch: list[Record] = []
    number = failed = remote_calls = answered = served_locally = 0
    cost = answered_cost = 0
    scores: list[float] = []
    async for record in _all(task, store):
        number += 1
        stretch.append(record)
        cost += record.cost
        failed += record.served is None
        remote_calls += asked_remote(record)
        served_locally += record.served == "local"
        if record.remote is not None:
            answered += 1
            answered_cost += record.remote.cost
        if record.decision.audit and record.score is not None:
            scores.append(record.score.value)
        if len(stretch) == width:
            points.append(_point(stretch, number))
            stretch = []
    if stretch:
        points.append(_point(stretch, number))
    # Requests that failed cost nothing more had everything been remote: the same attempts would have been made.
    all_remote = cost if answered == 0 else round(answered_cost / answered * (number - failed))
    return TaskReport(
        task=task.name,
        requests=number,
        failed=failed,
        remote_calls=remote_calls,
        remote_share=remote_calls / number if number else 0.0,
        served_locally=served_locally,
        cost=cost,
        all_remote_cost=all_remote,
        saved=all_remote - cost,
        agreement=sum(scores) / len(scores) if scores else None,
        versions=await store.versions(task.name),
        trajectory=points,
    )


def asked_remote(record: Record) -> bool:
    """Whether a remote was asked for this request, with or without success."""
    return bool(record.attempts) or record.remote is not None


def _point(stretch: list[Record], last: int) -> Point:
    audited = [r.score.value for r in stretch if r.decision.audit and r.score is not None]
    return Point(
        first=last - len(stretch) + 1,
        last=last,
        phase=stretch[-1].decision.phase,
        remote_share=sum(map(asked_remote, stretch)) / len(stretch),
        sampling_rate=sum(r.decision.p for r in stretch) / len(stretch),
        agreement=sum(audited) / len(audited) if audited else None,
        cost=sum(r.cost for r in stretch),
    )


async def _all(task: TaskConfig, store: Store) -> AsyncIterator[Record]:
    after = 0
    while page := await store.records(task.name, after=after, limit=_PAGE):
        for after, record in page:  # noqa: B007  (the last one is where the next page begins)
            yield record


async def _spend(config: Config, task: TaskConfig, store: Store, now: Seconds) -> list[Spend]:
    zone = ZoneInfo(config.budget.timezone)
    own = task.budget.limits if task.budget is not None else {}
    limits = {cap.window: cap.limit for cap in budget.caps(task.name, now, zone, overall=config.budget.limits, own=own)}
    windows = budget.windows(task.name, now, zone)
    spent = await store.spent(windows)
    return [Spend(window=window, spent=spent[window], limit=limits.get(window)) for window in windows]
