"""Teachers: models that label requests from whose answers nobody may learn.

They are asked in their order (primary, backup, secondary), those alone that the licence gate admits and whose price is
known; one request after the other, each attempt with its own hold, each Label durable before the next is asked.

A Label is no Record: nobody was served with it, no test counts it, and the requests stay as many as they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from random import Random
from statistics import fmean
from typing import NamedTuple

from apprentice import budget, feedback, licence, nearness, promotion
from apprentice.calls import Calls, Provider
from apprentice.config import Config, Remote, TaskConfig
from apprentice.errors import (
    ApprenticeError,
    BudgetError,
    ConfigError,
    DeadlineExceeded,
    InvalidAnswer,
    InvalidRequest,
    ModelError,
    ModelRefused,
    PriceUnknown,
    StoreError,
)
from apprentice.types import (
    Answer,
    Attempt,
    Event,
    Example,
    Json,
    Label,
    Micros,
    Record,
    Seconds,
    Store,
    TermsClass,
    Usage,
    Value,
)

_ROLES = ("primary", "backup", "secondary")
_LOOK_BACK = 10_000  # of the newest Records, among which unlabelled ones are looked for
_TYPICAL = 1_000  # of the newest remote answers, whose tokens are what a request takes
_GIVE_UP = 5  # requests one after the other without a label: what is wrong will not pass

type Excluded = Callable[[Sequence[Json]], Sequence[bool]]
"""Which of these inputs must not be labelled, because they are kept from training. Called in a thread."""


class Ranked(Value):
    """One configured teacher in its place, and what speaks for and against its labels for one task today."""

    role: str  # primary, backup, secondary
    model: str  # "provider/model", as in the ledger
    teacher: str  # "provider@host"
    terms: TermsClass
    may_train: bool
    why: str  # the basis, or the reason why not
    per_1000: Micros | None = None  # requests, with the tokens that the remote's answers take; None: not known
    problem: str = ""  # what is in the way of a price

    @property
    def may_label(self) -> bool:
        return self.may_train and not self.problem

    @property
    def licence(self) -> str:
        """What its answers may be used for, in one line."""
        return f"{self.terms}, {'may label' if self.may_train else 'may not label'}: {self.why}"


class Plan(NamedTuple):
    """What labelling would come to. Nothing is sent or spent for it."""

    task: str
    model: str  # who is asked first
    rows: list[Record]
    left: int  # beyond the limit
    worst: Micros  # if the first one answers all of them, without a retry
    expected: Micros | None


class Labelled(Value):
    """What labelling came to. `problem`: why it ended before all were asked."""

    task: str
    labels: int = 0
    useless: int = 0  # requests for which no teacher had an answer of use
    cost: Micros = 0
    by: Mapping[str, int] = {}  # labels, by the model that gave them
    problem: str | None = None


# --- what others read -------------------------------------------------------------------------------------------------


def examples(labels: Iterable[Label]) -> list[Example]:
    """The training rows that teachers' labels are; the licence gate still judges each of them."""
    return [
        Example(
            input=label.input,
            target=label.answer.output,
            source="teacher",
            request_id=label.request_id,
            model=label.answer.model,
            teacher=label.answer.provider,
            at=label.at,
        )
        for label in labels
        if label.answer is not None and label.answer.output is not None
    ]


def near_any(apart: Iterable[Sequence[Json]], near: float) -> Excluded:
    """What keeps an input from being labelled that is near one of those, of benchmarks say."""
    others = [input for inputs in apart for input in inputs]
    return lambda inputs: nearness.alike(inputs, others, near)


# --- the teachers of a configuration ----------------------------------------------------------------------------------


class Teachers:
    """The teachers of a configuration over a store. Any number of processes may have one: one of them labels a task.

    `owner`: who holds a lease, a name that a person can find the process by.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        *,
        clock: Callable[[], Seconds],
        new_id: Callable[[], str],
        dice: Random,
        owner: str,
    ) -> None:
        self.config = config
        self.store = store
        self.clock = clock
        self.new_id = new_id
        self.dice = dice
        self.owner = owner

    async def listed(self, task_name: str) -> list[Ranked]:
        """Every configured teacher in its order, as it stands for this task today. Asks nobody."""
        usage = await _typical(self.store, self.config.task(task_name).name)
        today = licence.day(self.clock())
        return [_ranked(number, remote, task_name, today, usage) for number, remote in enumerate(self.config.teachers)]

    async def plan(self, task_name: str, *, limit: int | None = None, excluded: Excluded | None = None) -> Plan:
        """What it takes to label what is unlabelled, the newest requests first. Nothing is sent or spent.

        Raises ConfigError where no teacher may label, or a key is missing.
        """
        task = self.config.task(task_name)
        chosen = await self._chosen(task_name)
        found = await self._unlabelled(task, excluded)
        rows = found[:limit]
        async with self.asking([chosen[0][1]]) as calls:
            most = worst(calls.providers[0], task, [record.input for record in rows])
        each = chosen[0][0].per_1000
        expected = None if each is None else math.ceil(each * len(rows) / 1000)
        return Plan(task_name, chosen[0][0].model, rows, len(found) - len(rows), most, expected)

    async def label(self, task_name: str, *, limit: int, excluded: Excluded | None = None) -> Labelled:
        """What came of asking the teachers for so many labels at most, one request after the other, the newest first.

        The first teacher in order is asked, the next one where it has no valid answer. It ends early, and says why, when
        the caps leave no room, another process labels the task, or five requests in a row came to nothing. What was
        labelled stays. Raises ConfigError where no teacher may label or a key is missing, StoreError.
        """
        task = self.config.task(task_name)
        remotes = [remote for _, remote in await self._chosen(task_name)]
        patience = sum(2 * remote.timeout for remote in remotes)  # for one request
        name = f"label/{task_name}"
        lease = await self.store.acquire(name, self.owner, self.clock(), 2 * patience)
        if lease is None:
            return Labelled(task=task_name, problem="another process is labelling this task")
        turn = _Round(task, {_name(remote) for remote in remotes}, patience)
        try:
            async with self.asking(remotes) as calls:
                for record in (await self._unlabelled(task, excluded))[:limit]:
                    if await self.store.renew(lease, self.clock(), 2 * patience) is None:
                        turn.problem = "another process took over"
                    elif turn.in_vain == _GIVE_UP:
                        turn.problem = f"{_GIVE_UP} requests in a row came to nothing: {turn.said}"
                    else:
                        await self._label_one(calls, record, turn)
                    if turn.problem is not None:
                        break
        finally:
            await self.store.release(lease)
        return await self._say_labelled(turn)

    # --- labelling ----------------------------------------------------------------------------------------------------

    async def _chosen(self, task_name: str) -> list[tuple[Ranked, Remote]]:
        """The teachers that may label, in their order."""
        ranked = list(zip(await self.listed(task_name), self.config.teachers, strict=True))
        chosen = [(one, remote) for one, remote in ranked if one.may_label]
        if not chosen:
            said = "; ".join(f"{one.model}: {one.problem or one.licence}" for one, _ in ranked) or "none is configured"
            raise ConfigError(
                f"no teacher may label {task_name!r}: {said}",
                hint="name one under `teachers:` whose terms allow it; `apprentice licence` explains",
            )
        return chosen

    async def _unlabelled(self, task: TaskConfig, excluded: Excluded | None) -> list[Record]:
        """Requests that were answered, and from whose answers nobody may learn: one an input, the newest first.

        Not what is held out, which teaches nothing; nor what no longer fits the task's input.
        """
        known = await self._taught(task)
        found: dict[str, Record] = {}
        for _, record in reversed(await self.store.records(task.name, limit=_LOOK_BACK, newest=True)):
            key = promotion.fingerprint(record.input)
            if record.served is None or key in known or key in found or promotion.held_out(key):
                continue
            if fits(task, record.input):
                found[key] = record
        if excluded is None:
            return list(found.values())
        apart = await asyncio.to_thread(excluded, [record.input for record in found.values()])
        return [record for record, is_apart in zip(found.values(), apart, strict=True) if not is_apart]

    async def _taught(self, task: TaskConfig) -> set[str]:
        """The fingerprints of inputs that have something to learn from, or about which teachers had nothing to say."""
        known = {promotion.fingerprint(label.input) for label in await self.store.labels(task.name)}
        for request_id in feedback.current(await self.store.corrections(task.name)):
            if (record := await self.store.record(request_id)) is not None:
                known.add(promotion.fingerprint(record.input))
        rule = _Rule(self.config, task.name, licence.day(self.clock()))
        for _, record in await self.store.records(task.name, labelled=True):
            if record.remote is not None and rule.may_train(record.remote, record.at):
                known.add(promotion.fingerprint(record.input))
        return known

    async def _label_one(self, calls: Calls, record: Record, turn: _Round) -> None:
        """Ask for one label, and keep it before anything else is done: what a kill can lose is this one answer."""
        attempts: list[Attempt] = []
        answer: Answer | None = None
        heard = False
        try:
            until = asyncio.get_running_loop().time() + turn.patience
            answer = await calls.ask(turn.task, record.input, purpose="label", deadline=until, attempts=attempts)
        except BudgetError as error:
            turn.problem = str(error)
        except (ModelError, DeadlineExceeded) as error:
            turn.said = f"{type(error).__name__}: {error}"
            gave = {attempt.model for attempt in attempts if attempt.outcome.startswith("answered")}
            # Every teacher was paid for an answer of no use: asking again would cost the same again.
            heard = isinstance(error, ModelRefused) or (isinstance(error, InvalidAnswer) and gave >= turn.names)
        finally:
            turn.cost += sum(attempt.cost for attempt in attempts)
        turn.in_vain = 0 if answer is not None else turn.in_vain + 1
        if answer is None:
            turn.useless += heard
        else:
            turn.by[answer.model] += 1
        if answer is not None or heard:
            await self.store.add_label(
                Label(
                    request_id=record.request_id,
                    task=turn.task.name,
                    at=self.clock(),
                    input=record.input,
                    answer=answer,
                    attempts=tuple(attempts),
                )
            )

    async def _say_labelled(self, turn: _Round) -> Labelled:
        labels = sum(turn.by.values())
        found = Labelled(
            task=turn.task.name,
            labels=labels,
            useless=turn.useless,
            cost=turn.cost,
            by=dict(turn.by),
            problem=turn.problem,
        )
        if labels or turn.cost:
            who = ", ".join(f"{count:,} by {model}" for model, count in turn.by.most_common()) or "none"
            message = f"{labels:,} requests were labelled ({who}) for {turn.cost / 1e6:.6f} US dollars"
            message += f"; {turn.useless:,} got no answer of use" if turn.useless else ""
            await self.say("LABELLED", found.task, message, found.model_dump(mode="json"))
        if turn.problem is not None:
            await self.say_stopped(found.task, turn.problem)
        return found

    async def say_stopped(self, task: str, problem: str) -> None:
        """Record why there are no more labels, once a day and reason."""
        key = f"LABELLING_STOPPED/{licence.day(self.clock())}/{problem[:200]}"
        await self.say("LABELLING_STOPPED", task, problem, {}, key=key)

    async def say(self, name: str, task: str, message: str, told: dict[str, Json], *, key: str | None = None) -> None:
        """Record an Event; with a `key`, once."""
        at = self.clock()
        await self.store.add_event(Event(name=name, task=task, at=at, message=message, evidence=told, key=key))

    @contextlib.asynccontextmanager
    async def asking(self, remotes: Sequence[Remote]) -> AsyncIterator[Calls]:
        """Calls of these remotes, in this order, from the same purse as any. Raises ConfigError for a missing key."""
        calls = Calls(self.config, self.store, clock=self.clock, new_id=self.new_id, dice=self.dice)
        # Their order is the operator's: no dice draw who of them comes first.
        calls.providers = [Provider(remote.model_copy(update={"weight": None})) for remote in remotes]
        try:
            await calls.open()
            yield calls
        finally:
            await calls.close()


async def before_cycle(
    config: Config,
    task_name: str,
    store: Store,
    *,
    limit: int,
    clock: Callable[[], Seconds],
    new_id: Callable[[], str],
    dice: Random,
    owner: str,
    excluded: Excluded | None = None,
) -> Labelled | None:
    """What labelling before a teaching cycle came to; None where nothing is configured, or the cycle has its labels.

    `limit`: labels since the last version, at most. What is in the way is recorded as LABELLING_STOPPED, once a day, and
    teaching goes on with what there is. Raises StoreError.
    """
    if limit < 1 or not config.teachers:
        return None
    since = max((version.created_at for version in await store.versions(task_name)), default=-math.inf)
    left = limit - sum(label.at > since for label in await store.labels(task_name))
    if left < 1:
        return None
    teachers = Teachers(config, store, clock=clock, new_id=new_id, dice=dice, owner=owner)
    try:
        return await teachers.label(task_name, limit=left, excluded=excluded)
    except StoreError:
        raise
    except ApprenticeError as error:
        await teachers.say_stopped(task_name, str(error))
        return Labelled(task=task_name, problem=str(error))


@dataclass(slots=True)
class _Round:
    """One round of labelling, as far as it has come."""

    task: TaskConfig
    names: set[str]  # of the teachers
    patience: Seconds
    by: Counter[str] = field(default_factory=Counter)
    useless: int = 0
    in_vain: int = 0  # requests without a label since the last one
    said: str = ""  # what was wrong with the last of those
    cost: Micros = 0
    problem: str | None = None


class _Rule:
    """Whether a remote answer may train today, as the gate will say when rows are selected."""

    def __init__(self, config: Config, task: str, today: date) -> None:
        asked = [config.remote, *config.remote.additional_providers, *config.teachers]
        self._known = {remote.teacher: _as_teacher(remote) for remote in asked}
        self._task = task
        self._today = today

    def may_train(self, answer: Answer, at: Seconds) -> bool:
        row = Example(input=None, target=None, source="remote", model=answer.model, teacher=answer.provider, at=at)
        told = answer.provider or not answer.model  # else recorded before answers said where they were asked: anybody's
        each = [self._known.get(answer.provider)] if told else [*self._known.values()]
        return all(licence.judge(row, one, task=self._task, today=self._today).may_train for one in each)


def _as_teacher(remote: Remote) -> licence.Teacher:
    return licence.Teacher("teacher", remote.provider, remote.model, remote.host, remote.permission)


def _name(remote: Remote) -> str:
    return f"{remote.provider}/{remote.model}"


def _ranked(number: int, remote: Remote, task: str, today: date, usage: Usage | None) -> Ranked:
    where = remote.provider, remote.model, remote.host, today
    ruling = licence.gate(*where, task=task, permission=remote.permission, today=today)
    found = Ranked(
        role=_ROLES[min(number, len(_ROLES) - 1)],
        model=_name(remote),
        teacher=ruling.teacher,
        terms=ruling.terms,
        may_train=ruling.may_train,
        why=" ".join((ruling.basis or ruling.reason).split()),
    )
    try:
        provider = Provider(remote)
    except PriceUnknown as error:
        return found.model_copy(update={"problem": str(error)})
    return found.model_copy(update={"per_1000": None if usage is None else 1000 * provider.cost(usage)})


async def _typical(store: Store, task: str) -> Usage | None:
    """The tokens of a request of the task, the mean of the newest remote answers; None before the first."""
    records = await store.records(task, limit=_TYPICAL, labelled=True, newest=True)
    used = [
        record.remote.usage for _, record in records if record.remote is not None and record.remote.usage is not None
    ]
    if not used:
        return None
    return Usage(
        input_tokens=math.ceil(fmean(usage.input_tokens for usage in used)),
        output_tokens=math.ceil(fmean(usage.output_tokens for usage in used)),
    )


def worst(provider: Provider, task: TaskConfig, inputs: Sequence[Json]) -> Micros:
    """What these inputs cost at most, one call each."""
    model, most = provider.model(), provider.remote.max_tokens
    sizes = [model.request_bytes(task.task, input) for input in inputs]
    return sum(budget.worst_case(provider.price, size, most) for size in sizes)


def fits(task: TaskConfig, input: Json) -> bool:
    """Whether the task can be asked with the input: its schema may be another one since it was recorded."""
    try:
        task.validate_input(input)
    except InvalidRequest:
        return False
    return True
