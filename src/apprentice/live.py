"""One task as one process knows it: what serves it, and what is known of it, folded from the store's Records."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from apprentice import confidence, decide, lineage, probe
from apprentice.config import TaskConfig
from apprentice.promotion import Ramp, Step
from apprentice.shelf import Shelf
from apprentice.types import (
    Confidence,
    Evaluator,
    Event,
    Evidence,
    Mode,
    Promotion,
    Redactor,
    Result,
    Seconds,
    Version,
)


@dataclass(slots=True)
class Live:
    """One task as this process knows it."""

    config: TaskConfig
    shelf: Shelf
    settings: confidence.Settings
    evaluator: Evaluator
    probes: probe.Probes
    redactor: Redactor | None = None
    state: confidence.State = field(default_factory=confidence.State)
    seq: int = 0  # the last Record folded into `state`
    saved_at: int = 0  # the value of `seq` when the state was last written to the store
    ramp: Ramp = field(default_factory=Ramp)  # what is tried out beside the champion
    unaided: Confidence = field(default_factory=Confidence)  # what `state` says
    standing: Confidence = field(default_factory=Confidence)  # the same, with the canary
    known: dict[str, list[float]] = field(default_factory=dict)  # confidences on recent inputs, by version
    champion: Version | None = None  # the shelf is empty where it could not be loaded
    canary: Version | None = None
    mode: Mode | None = None  # what an operator asked for last
    unsaid: deque[tuple[Event, str | None]] = field(default_factory=deque)  # found by the fold, not recorded yet
    urgent: bool = False  # something was said of the version in force: its successor should not be waited for
    labels: int = 0  # remote answers recorded, whatever the version
    tried_at: int = 0  # how many there were when a teaching cycle was last started
    taught_at: Seconds | None = None  # when the last version was made, or a cycle was last started
    cycle: asyncio.Task[None] | None = None
    in_flight: dict[str, asyncio.Future[Result]] = field(default_factory=dict)  # by idempotency key
    look: asyncio.Task[None] | None = None  # at the caps and at the remote itself, in the background
    written: int = 0  # Records of this process since the last look at the caps

    def know(self, versions: Sequence[Version]) -> None:
        """Remember how sure each version was on recent inputs; the fold of a promotion needs it."""
        self.known = {version.id: version.metrics.get("confidences", []) for version in versions}

    def with_canary(self, now: Confidence) -> Confidence:
        """The standing as it is while a canary runs, if one does."""
        return lineage.with_canary(now, self.ramp, self.known)

    def report(self, name: str, at: Seconds, version: str | None, message: str) -> None:
        """Have an event recorded, once a version."""
        evidence = {"version": version}
        event = Event(
            key=f"{name}/{version}", name=name, task=self.config.name, at=at, message=message, evidence=evidence
        )
        self.unsaid.append((event, None))

    def fold(self, rows: list[Evidence], promotions: list[Promotion]) -> None:
        """Bring it up to date with Records and promotions of its task, and keep what became true by them to be recorded."""
        found: Iterator[tuple[Evidence, confidence.Observation | Step]] = chain(
            confidence.fold(self.state, self.settings, rows, promotions, self.known), self.ramp.fold(rows, promotions)
        )
        for row, seen in found:
            event = Event(
                key=f"{row.seq}/{seen.name}",  # each process that folds this row says the same; it is kept once
                name=seen.name,
                task=row.task,
                at=row.at,
                message=seen.message,
                evidence=seen.evidence,
            )
            self.unsaid.append((event, row.version))
            self.urgent = self.urgent or seen.name in decide.URGENT
        self.labels += sum(row.served == "remote" or row.score is not None for row in rows)
        self.stand()

    def stand(self) -> None:
        """Read off the state what `decide` needs."""
        self.unaided = confidence.standing(self.state, self.settings, self.unaided)
        self.standing = self.with_canary(self.unaided)
