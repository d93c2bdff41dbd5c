"""The same prompts again: has the remote changed under the same name?

When agreement falls, either the local model got worse or the remote became another one; the comparison of the two cannot
tell which. So the first inputs of a task are frozen together with the remote's answers to them, and from time to time the
remote is asked all of them again. Its disagreement with its own past is tested against what its noise explains: an
e-detector in CUSUM form (Shin, Ramdas & Rinaldo, E-detectors, NEJSDS) over single probes, looked at after each round.

Everything that is known is in the last event PROBED of the task, so that a restart or another process goes on from there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

from apprentice import promotion
from apprentice.calls import Calls, answered_by
from apprentice.config import Config, TaskConfig
from apprentice.errors import BudgetError, DeadlineExceeded, ModelError, ModelUnavailable, OutcomeUnknown
from apprentice.types import Answer, Attempt, Evaluator, Event, Json, Lease, Seconds, Store

BETS = (0.3, 0.7, 1.5, 3.0, 5.0)
ALARM_AT = 100.0  # probes between two false alarms, on average, at least
_LARGEST = 1e6  # wealth is cut here: smaller wealth is always valid, and no float overflows
_UNKNOWN = 0.20  # disagreement that is allowed while nobody knows how noisy the remote is
_LEAST = 0.05  # and at least, however sure it has been of itself
_REPEATS = 20  # second answers before its noise is known
_HOUR: Seconds = 3600.0
_PAGE = 64
_PAGES = 40  # at a look: a task that is asked the same few things has millions of Records, and not enough prompts


def step(wealth: Sequence[float], disagreements: Iterable[float], allowed: float) -> tuple[list[float], float]:
    """The wealth of each bet after these probes, and its mean: 100 says that the remote has changed.

    `disagreements` in [0, 1] are tested against a mean of at most `allowed`, in (0, 1]; no wealth yet is an empty one.
    While the mean is no larger, it takes 100 probes on average to reach 100, or more.

    >>> step([], [1.0, 1.0, 1.0, 1.0], 0.05)[1] > 100 > step([], [0.0, 1.0] * 10, 0.5)[1]
    True
    """
    bets = [min(bet, 0.95 / allowed) for bet in BETS]  # so that no factor reaches zero
    now = list(wealth) or [1.0] * len(bets)
    for loss in disagreements:
        now = [min(max(w, 1.0) * (1 + bet * (loss - allowed)), _LARGEST) for w, bet in zip(now, bets, strict=True)]
    return now, sum(now) / len(now)


def allowed(repeats: int, lower: float | None) -> float:
    """The disagreement with its past that the remote's own noise explains.

    `lower` bounds its agreement with itself from below, known from so many second answers.

    >>> allowed(19, 0.9), round(allowed(20, 0.9), 2), allowed(500, 0.99)
    (0.2, 0.1, 0.05)
    """
    return max(_LEAST, 1 - lower) if lower is not None and repeats >= _REPEATS else _UNKNOWN


@dataclass(slots=True)
class _Frozen:
    """The frozen prompts, and what is known of them."""

    records: list[str]  # request ids
    last: Seconds  # of the last round; before the first one, when the newest of the Records was made
    answers: list[Json] | None = None  # frozen since then; None: those of the Records. A None within: the next answer
    round: int = 0  # rounds so far
    wealth: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Heard:
    """What came of one round."""

    answers: dict[str, Answer] = field(default_factory=dict)  # by request id, in the order asked
    attempts: list[Attempt] = field(default_factory=list)
    problem: str | None = None  # why not all were asked, or compared


class Probes:
    """The frozen prompts of one task, put to its first remote again and again. One per task and process."""

    def __init__(
        self,
        config: Config,
        task: TaskConfig,
        evaluator: Evaluator,
        store: Store,
        calls: Calls,
        *,
        clock: Callable[[], Seconds],
        new_id: Callable[[], str],
    ) -> None:
        sampling = task.sampling or config.sampling
        self._task = task
        self._remote = config.remote
        self._prompts = sampling.probe_prompts
        self._every = sampling.probe_hours * _HOUR
        self._evaluator = evaluator
        self._store = store
        self._calls = calls
        self._clock = clock
        self._new_id = new_id
        self._model = f"{config.remote.provider}/{config.remote.model}"
        self._asked_as = _asked_as(config, task)
        self._next: Seconds = 0.0  # nothing is to be done before
        self._found: dict[str, tuple[str, Seconds]] = {}  # id and moment of the first Records, by their inputs
        self._read = 0  # the last Record looked at for those

    def due(self, labels: int) -> bool:
        """Whether it is time to look, given how many remote answers were recorded. Cheap: asked after each request."""
        return 0 < self._prompts <= labels and self._clock() >= self._next

    async def round(self, allowed: float) -> None:
        """Ask all frozen prompts again if that is due, and record what came of it. One process does it at a time.

        What the caps refuse or a remote that is down cuts short is said in the event. A round without any answer, or that
        was cancelled, is tried again after a twenty-fourth of the time between two. Raises StoreError.
        """
        self._next = self._clock() + self._every / 24
        if not await self._ready():
            return
        patience = 2 * self._remote.timeout  # for one probe: the call, and the wait for its turn
        seconds = 2 * patience
        lease = await self._store.acquire(f"probe/{self._task.name}", self._new_id(), self._clock(), seconds)
        if lease is None:
            return
        done = True
        try:
            frozen = await self._ready()  # as the process before us left it
            if frozen is not None:
                done = False
                heard = await self._ask(frozen, lease, patience)
                done = heard is not None and await self._judge(frozen, heard, allowed)
        finally:
            if done:
                await self._store.release(lease)
            else:  # kept for a while: processes that end too soon must not pay for one beginning after the other
                await self._store.renew(lease, self._clock(), self._every / 24)

    async def _ready(self) -> _Frozen | None:
        """The frozen prompts if it is time to ask them; else None, and the time is noted."""
        frozen = await self._frozen()
        if frozen is None:
            return None
        due = frozen.last + self._every
        if self._clock() < due:
            self._next = due
            return None
        return frozen

    async def _frozen(self) -> _Frozen | None:
        """As the last round left them, else as the first Records have them; None while those are too few."""
        if (event := await self._last()) is None:
            return await self._freeze()
        told = event.evidence
        frozen = _Frozen(told["records"], told["last"], told["answers"], told["round"], told["wealth"])
        if told["asked_as"] != self._asked_as:  # another model, or asked in other words: its past says nothing
            frozen.answers, frozen.wealth = [None] * len(frozen.records), []
        frozen.records = frozen.records[: self._prompts]
        return frozen

    async def _last(self) -> Event | None:
        events = await self._store.events(self._task.name, names=["PROBED"], limit=1)
        return events[0] if events else None

    async def _freeze(self) -> _Frozen | None:
        """The first Records with different inputs that the remote in use answered. The next look goes on where this ends."""
        for _ in range(_PAGES):
            if len(self._found) >= self._prompts:
                break
            page = await self._store.records(self._task.name, after=self._read, limit=_PAGE, labelled=True)
            for seq, record in page:
                self._read = seq
                if len(self._found) < self._prompts and answered_by(record.attempts, "serve") == self._model:
                    self._found.setdefault(promotion.fingerprint(record.input), (record.request_id, record.at))
            if len(page) < _PAGE:
                break
        if len(self._found) < self._prompts:
            return None
        return _Frozen([id for id, _ in self._found.values()], max(at for _, at in self._found.values()))

    async def _ask(self, frozen: _Frozen, lease: Lease, patience: Seconds) -> _Heard | None:
        """One call for each prompt, one after the other; None when another process took over meanwhile."""
        heard = _Heard()
        order = list(frozen.records)
        Random(frozen.round).shuffle(order)  # noqa: S311  (no prompt is always the last one; the same in each process)
        for id in order:
            if await self._store.renew(lease, self._clock(), 2 * patience) is None:
                return None
            record = await self._store.record(id)
            if record is None or record.input is None:  # erased since it was frozen
                continue
            until = asyncio.get_running_loop().time() + patience
            try:
                heard.answers[id] = await self._calls.ask(
                    self._task, record.input, purpose="probe", deadline=until, attempts=heard.attempts
                )
            except (BudgetError, DeadlineExceeded, ModelUnavailable, OutcomeUnknown) as error:
                heard.problem = f"{type(error).__name__}: {error}"
                break
            except ModelError:
                continue  # a refusal, or no valid answer: a missing label
        return heard

    async def _judge(self, frozen: _Frozen, heard: _Heard, allowed: float) -> bool:
        """Compare with the past, and record PROBED; before it TEACHER_CHANGED, where that is what it says.

        Whether that was a round: without any answer there was none.
        """
        scores, answers = await self._compare(frozen, heard)
        wealth, value = step(frozen.wealth, [1 - score for score in scores], allowed)
        agreement = sum(scores) / len(scores) if scores else None
        asked = bool(heard.answers)
        number = frozen.round + asked
        evidence: dict[str, Json] = {
            "round": number,
            "n": len(scores),
            "agreement": agreement,
            "allowed": allowed,
            "value": round(value, 3),
            "served": sorted({answer.model for answer in heard.answers.values()}),
            "problem": heard.problem,
            "cost": sum(attempt.cost for attempt in heard.attempts),
            "records": frozen.records,
        }
        changed = value >= ALARM_AT and agreement is not None
        if changed:
            wealth = []
            answers = [heard.answers[id].output if id in heard.answers else None for id in frozen.records]
            message = (
                f"{self._model} answers {len(scores)} frozen prompts otherwise than before: {1 - (agreement or 0):.0%} "
                f"disagree, and its own noise explains {allowed:.0%}. It was changed under the same name: comparisons "
                "with it mean something else now. Look whether its answers are still what you want, and retrain"
            )
            await self._say("TEACHER_CHANGED", f"TEACHER_CHANGED/{number}", message, evidence)
        now = self._clock()
        if asked:
            self._next = now + self._every
            message = f"{len(scores)} frozen prompts were asked again"
            message += "" if agreement is None else f": {agreement:.0%} agreement with the answers before"
        else:
            message = f"the frozen prompts could not be asked again: {heard.problem or 'no valid answer came'}"
        state = {
            "answers": answers,
            "wealth": wealth,
            "asked_as": self._asked_as,
            "last": now if asked else frozen.last,
        }
        key = f"PROBED/{number}" if asked else f"PROBED/{number + 1}/skipped"
        await self._say("PROBED", key, message, evidence | state)
        return asked

    async def _compare(self, frozen: _Frozen, heard: _Heard) -> tuple[list[float], list[Json] | None]:
        """How far each answer agrees with the frozen one; and the frozen ones, with those that were waited for."""
        answers = None if frozen.answers is None else list(frozen.answers)
        scores = []
        for id, answer in heard.answers.items():
            place = frozen.records.index(id)
            if answers is None:
                record = await self._store.record(id)
                before = None if record is None or record.remote is None else record.remote.output
            elif answers[place] is None:
                answers[place] = answer.output
                continue
            else:
                before = answers[place]
            try:
                scores.append((await self._evaluator(answer.output, before)).value)
            except Exception as error:  # noqa: BLE001  (an evaluator may be anybody's)
                heard.problem = f"not compared: {type(error).__name__}: {error}"
        return scores, answers

    async def _say(self, name: str, key: str, message: str, evidence: dict[str, Json]) -> None:
        task, at = self._task.name, self._clock()
        await self._store.add_event(Event(key=key, name=name, task=task, at=at, message=message, evidence=evidence))


def _asked_as(config: Config, task: TaskConfig) -> str:
    """The same for the same question to the same model: what else an answer depends on, apart from the input."""
    remote = config.remote.model_dump(mode="json", include={"provider", "model", "temperature", "settings"})
    text = json.dumps([remote, task.task.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
