"""The values that the pages show: a task with its history, one request, and what waits for a person. Nothing is rendered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from apprentice import alerts, bounds, confidence, lineage
from apprentice.config import Config, TaskConfig
from apprentice.feedback import current
from apprentice.lineage import Lineage
from apprentice.report import TaskReport, TaskStatus, report, status
from apprentice.types import Confidence, Correction, Event, Json, Record, Seconds, Store, Value

_PAGE = 1000  # Records read at a time
_ALPHA = 0.05
_LABELS = 12  # different answers of which a confusion table is still read
_SHOWN = 12  # pairs of different answers
_WAITING = 2000  # of the newest Records, among which the review queue looks


class Stretch(Value):
    """What the audits of a stretch of requests said. The bounds are of this stretch alone, at 95 %."""

    first: int
    last: int
    level: float  # mean share of the least sure that goes to the remote
    audits: int
    agreement: float | None
    lower: float | None
    upper: float | None


class Detector(Value):
    """One of the monitors of drift: it acts when its value reaches the threshold (None: it only shows)."""

    name: str
    meaning: str
    value: float
    acts_at: float | None


class Confusion(Value):
    """How often the local model (rows) said what, where the remote (columns) said what. Audits only."""

    labels: list[str]
    counts: list[list[int]]

    @property
    def most(self) -> int:
        return max(map(max, self.counts))


class Confused(Value):
    """One way in which the answers differ, where there are too many labels for a table of all."""

    local: str
    remote: str
    audits: int


class FieldLine(Value):
    """Agreement of one field of the output, over the audits that have it."""

    name: str
    audits: int
    agreement: float


@dataclass(frozen=True, slots=True)
class TaskView:
    """Everything that a page shows of one task."""

    description: str
    status: TaskStatus
    report: TaskReport
    promised: float  # `phase2_to_phase3`
    stretches: list[Stretch]
    detectors: list[Detector]
    lineage: Lineage
    confusion: Confusion | None
    confused: list[Confused]  # the most frequent first
    fields: list[FieldLine]
    recent: list[Record]  # the newest first


class Happening(NamedTuple):
    """An event, and for an alert that another event ends, whether one did."""

    event: Event
    state: Literal["open", "over"] | None


def happenings(tasks: Iterable[TaskView]) -> list[Happening]:
    """The last events of each task, the newest of all first. What came after one of them is among them, so `state` is exact."""
    found = [
        Happening(event, alerts.standing(event, task.status.events[number:]))
        for task in tasks
        for number, event in enumerate(task.status.events, 1)
    ]
    return sorted(found, key=lambda one: one.event.at, reverse=True)


async def read(config: Config, store: Store, *, now: Seconds) -> list[TaskView]:
    """The tasks in the order of the configuration. Reads every Record: seconds for a hundred thousand of them."""
    standing = {one.task: one for one in await status(config, store, now=now)}
    found = []
    for costs in await report(config, store):
        task = config.task(costs.task)
        settings = confidence.settings(task.confidence_thresholds, task.sampling or config.sampling)
        history = await _history(store, task.name, max(1, len(costs.trajectory)), costs.requests)
        found.append(
            TaskView(
                description=task.description,
                status=standing[task.name],
                report=costs,
                promised=settings.theta,
                stretches=history.stretches,
                detectors=_detectors(standing[task.name].confidence, settings),
                lineage=await lineage.read(store, task.name),
                confusion=_confusion(history.pairs),
                confused=_confused(history.pairs),
                fields=_field_lines(history.fields),
                recent=[record for _, record in await store.records(task.name, limit=10, newest=True)],
            )
        )
    return found


def _detectors(now: Confidence, settings: confidence.Settings) -> list[Detector]:
    known: tuple[tuple[str, str, float | None], ...] = (
        ("contract", "what is served falls below what is promised", settings.alarm_at),
        ("guard", "what is served comes close to what is promised", settings.guard_at),
        ("trend", "the version is worse than its own mean; more is audited", None),
        ("coaching", "agreement is below the coaching trigger", settings.page_at),
        ("emergency", "agreement is below the emergency threshold", settings.page_at),
        ("answers_concordance", "local numbers fall where remote ones rise", settings.page_at),
        ("confidence_concordance", "the local model is surest where it is wrong", settings.page_at),
        ("input_shift", "the local model is less sure than usual", settings.shift_at),
    )
    return [
        Detector(name=name, meaning=meaning, value=now.detail[name], acts_at=at)
        for name, meaning, at in known
        if name in now.detail
    ]


# --- what the audits said ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Open:
    """A stretch that is still being read."""

    first: int
    requests: int = 0
    level: float = 0.0
    audits: int = 0
    low: list[int] = field(default_factory=lambda: [0] * (bounds.CELLS + 1))
    high: list[int] = field(default_factory=lambda: [0] * (bounds.CELLS + 1))
    total: float = 0.0

    def add(self, record: Record) -> None:
        self.requests += 1
        self.level += record.decision.level
        if record.decision.audit and record.score is not None:
            self.audits += 1
            self.total += record.score.value
            bounds.tally(self.low, self.high, record.score.value)

    def close(self) -> Stretch:
        lower, upper = bounds.interval(self.low, self.high, _ALPHA) if self.audits else (None, None)
        return Stretch(
            first=self.first,
            last=self.first + self.requests - 1,
            level=self.level / self.requests,
            audits=self.audits,
            agreement=self.total / self.audits if self.audits else None,
            lower=lower,
            upper=upper,
        )


@dataclass(slots=True)
class _Read:
    stretches: list[Stretch] = field(default_factory=list)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    fields: dict[str, list[float]] = field(default_factory=dict)


async def _history(store: Store, task: str, points: int, total: int) -> _Read:
    found, width = _Read(), max(1, -(-total // points))
    open = _Open(first=1)
    number = 0
    async for record in _all(store, task):
        number += 1
        open.add(record)
        if open.requests == width:
            found.stretches.append(open.close())
            open = _Open(first=number + 1)
        if record.decision.audit and record.score is not None and record.local and record.remote:
            for name, value in _fields(record):
                found.fields.setdefault(name, []).append(value)
            labels = _label(record.local.output), _label(record.remote.output)
            if labels[0] is not None and labels[1] is not None:
                found.pairs[labels[0], labels[1]] += 1
    if open.requests:
        found.stretches.append(open.close())
    return found


async def _all(store: Store, task: str) -> AsyncIterator[Record]:
    after = 0
    while page := await store.records(task, after=after, limit=_PAGE):
        for after, record in page:  # noqa: B007  (the last one is where the next page begins)
            yield record


def _fields(record: Record) -> Iterable[tuple[str, float]]:
    """The evaluator's detail; where it gives none, which fields are equal."""
    assert record.score is not None and record.local is not None and record.remote is not None  # it was asked before
    if record.score.fields:
        return record.score.fields.items()
    local, remote = record.local.output, record.remote.output
    if not isinstance(local, dict) or not isinstance(remote, dict):
        return ()
    return [(name, float(local.get(name) == remote.get(name))) for name in {**local, **remote}]


def _label(output: Json) -> str | None:
    """The one value of an output that is a label; None for what is more than that."""
    if isinstance(output, dict) and len(output) == 1:
        output = next(iter(output.values()))
    if isinstance(output, bool):
        return json.dumps(output)
    return output if isinstance(output, str) and len(output) <= 60 else None


def _confusion(pairs: Counter[tuple[str, str]]) -> Confusion | None:
    labels = sorted({label for pair in pairs for label in pair})
    if not 2 <= len(labels) <= _LABELS:
        return None
    return Confusion(labels=labels, counts=[[pairs[local, remote] for remote in labels] for local in labels])


def _confused(pairs: Counter[tuple[str, str]]) -> list[Confused]:
    differ = Counter({pair: n for pair, n in pairs.items() if pair[0] != pair[1]})
    return [Confused(local=pair[0], remote=pair[1], audits=n) for pair, n in differ.most_common(_SHOWN)]


def _field_lines(fields: dict[str, list[float]]) -> list[FieldLine]:
    lines = [FieldLine(name=name, audits=len(all), agreement=sum(all) / len(all)) for name, all in fields.items()]
    return sorted(lines, key=lambda line: line.agreement)


# --- what waits for a person ------------------------------------------------------------------------------------------


class Waiting(NamedTuple):
    """A request about which nobody has spoken: the answers differ, or the local model was not sure."""

    record: Record
    why: str


class Queue(NamedTuple):
    """What is to be looked at now, how many wait in all, and how many were looked at before."""

    now: Waiting | None
    waiting: int
    judged: int


async def queue(store: Store, task: TaskConfig, *, after: str = "") -> Queue:
    """The first that waits among the newest Records, or the one behind the request `after`, which is passed over."""
    judged = current(await store.corrections(task.name))
    records = await store.records(task.name, limit=_WAITING, newest=True)
    found = sorted(_waiting(records, judged), key=lambda one: (one[0], -one[1]))
    ids = [waiting.record.request_id for _, _, waiting in found]
    start = ids.index(after) + 1 if after in ids else 0
    now = found[start][2] if start < len(found) else None
    return Queue(now=now, waiting=len(found), judged=len(judged))


def _waiting(
    records: Iterable[tuple[int, Record]], judged: dict[str, Correction]
) -> Iterable[tuple[int, int, Waiting]]:
    for seq, record in records:
        if record.request_id in judged or record.served is None:
            continue
        if record.score is not None and record.score.value < 1:
            yield 0, seq, Waiting(record, f"the answers differ, score {record.score.value:.2f}")
        elif record.decision.reason == "deferred":
            yield 1, seq, Waiting(record, "the local model was not sure enough")
