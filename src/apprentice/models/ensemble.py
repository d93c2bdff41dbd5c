"""Several students vote on one answer: what most of them say is served, and how far they agree says how sure to be.

A checkpoint is made by the trainer `ensemble`; it holds a checkpoint for each member.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apprentice import fields, heads, plugins, voting
from apprentice.calibration import Table, calibrate, checked
from apprentice.errors import ConfigError, ModelError
from apprentice.models._learned import another_schema, misfit_of
from apprentice.types import Answer, Json, ManyModel, Model, Task

_IN_PROCESS = "embedded"  # what answers for a member that the settings say nothing of


def build(
    checkpoint: str | Path, *, members: list[dict[str, Any]] | None = None, log_dir: str | None = None
) -> Ensemble:
    """The students in a checkpoint's folder.

    `members`: for each student, in the trainer's order, the `backend` that serves it and that backend's settings; without
    it each is served by `embedded`. `log_dir`: where servers of ours write their logs.
    Raises ConfigError when the folder is missing or damaged or the settings are wrong; MissingExtra.
    """
    folder = Path(checkpoint)
    manifest = heads.manifest_of(folder, voting.FORMAT)
    try:
        parts = Parts(**{name: manifest[name] for name in Parts._fields})
        for part in parts.parts:
            if Path(part).name != part:
                raise ValueError(f"{part!r} is no folder of its own")
        table = checked(manifest.get("calibration"))
    except (KeyError, TypeError, ValueError) as error:
        raise heads.damaged(folder, f"its manifest cannot be read: {error}") from error
    # What serves a member stands in the configuration, never in a checkpoint: that may come from somebody else.
    given = members if members is not None else [{"backend": _IN_PROCESS}] * len(parts.parts)
    if len(given) != len(parts.parts):
        raise ConfigError(
            f"model 'ensemble': `members` names {len(given)} backends, and {folder} holds {len(parts.parts)} students",
            hint="name one for each that was taught, in that order",
        )
    built = [_member(settings, folder / part, log_dir) for settings, part in zip(given, parts.parts, strict=True)]
    name = f"ensemble:{folder.resolve().name.removeprefix('sha256-')[:12]}"
    kind = _InProcess if all(isinstance(model, ManyModel) for model in built) else Ensemble
    return kind(name, built, parts, table)


class Parts(NamedTuple):
    """What a manifest says about the students."""

    output_schema: dict[str, Json]
    parts: list[str]  # a folder each in the checkpoint
    counted: list[str] | None  # fields that make up the confidence; None: all


def _member(settings: dict[str, Any], checkpoint: Path, log_dir: str | None) -> Model:
    settings = dict(settings)
    backend = settings.pop("backend", None)
    if not isinstance(backend, str):
        raise ConfigError("model 'ensemble': each of `members` needs a `backend`", hint="backend: embedded")
    known = inspect.signature(plugins.find("models", backend).build).parameters
    if "checkpoint" not in known or "members" in known:
        # A model of somebody else's would cost money that is booked nowhere.
        raise ConfigError(
            f"model 'ensemble': {backend!r} serves no checkpoint of its own",
            hint="backend: embedded, mixed or a server",
        )
    if log_dir is not None and "log_dir" in known:
        settings.setdefault("log_dir", log_dir)
    built: Model = plugins.build("models", backend, checkpoint=checkpoint, **settings)
    return built


class _Asked(NamedTuple):
    """A task, and whether an output of it is one."""

    task: Task
    misfit: Callable[[Json], str | None]


class Ensemble:
    """Answers a task's inputs as long as one of its members does."""

    def __init__(self, name: str, members: Sequence[Model], parts: Parts, table: Table) -> None:
        self._name = name
        self._members = members
        self._parts = parts
        self._table = table
        self._asked: _Asked | None = None  # the last task
        self._failed: dict[int, str] = {}  # why a member had no answer when it was asked last

    async def answer(self, task: Task, input: Json) -> Answer:
        """What the members elect; `output` is None where no member has a valid answer.

        A member that fails or has no valid answer is for nothing, which lowers the confidence; `state` says why.
        Raises the last member's ModelError when every one fails, and ModelRejected when the task's output schema is not
        the one that was learned.
        """
        began = time.perf_counter()
        asked = self._known(task)
        said = await asyncio.gather(*(model.answer(task, input) for model in self._members), return_exceptions=True)
        return self._elected(asked, list(said), time.perf_counter() - began)

    def state(self) -> str:
        """Whether all members are there, in words; with the reason of each that is not."""
        waiting = [
            f"member {number}: {state()}"
            for number, model in enumerate(self._members, 1)
            if (state := getattr(model, "state", None)) is not None and str(state()) != "ready"
        ]
        missing = [f"member {number + 1} gave no answer: {why}" for number, why in sorted(self._failed.items())]
        return "; ".join([*waiting, *missing]) or "ready"

    async def ready(self) -> None:
        """Wait until every member can answer or has failed. Raises what the last of them raised where all have."""
        waits = [getattr(model, "ready", None) for model in self._members]
        found = await asyncio.gather(
            *(_no_wait() if wait is None else wait() for wait in waits), return_exceptions=True
        )
        problems = [problem for problem in found if problem is not None]
        for problem in problems:
            if not isinstance(problem, ModelError) or len(problems) == len(self._members):
                raise problem
        self._failed |= {number: str(problem) for number, problem in enumerate(found) if problem is not None}

    async def close(self) -> None:
        """Close every member, also after one that cannot be."""
        for problem in await asyncio.gather(*(model.close() for model in self._members), return_exceptions=True):
            if problem is not None:
                raise problem

    def _elected(self, asked: _Asked, said: Sequence[Answer | BaseException], latency: float) -> Answer:
        ballots: list[voting.Ballot | None] = []
        reasons: dict[int, str] = {}
        for number, answer in enumerate(said):
            ballot, reason = None, None
            if isinstance(answer, ModelError):
                reason = str(answer)
            elif isinstance(answer, BaseException):
                raise answer
            elif answer.output is None:
                reason = answer.problem or "it has no output"
            elif wrong := asked.misfit(answer.output):
                reason = f"the answer does not fit the schema: {wrong}"
            else:
                ballot = voting.Ballot(answer.output, answer.confidence)
            ballots.append(ballot)
            if reason is not None:
                reasons[number] = reason
        self._failed = reasons
        errors = [answer for answer in said if isinstance(answer, ModelError)]
        if len(errors) == len(said):
            raise errors[-1]
        found = voting.vote(ballots, lambda output: asked.misfit(output) is None, self._parts.counted)
        if found is None:
            problem = "; ".join(f"member {number + 1}: {why}" for number, why in reasons.items())
            return Answer(model=self._name, latency=latency, problem=problem)
        sure = round(calibrate(self._table, found.agreement), 6)
        return Answer(output=found.output, model=self._name, latency=latency, confidence=sure)

    def _known(self, task: Task) -> _Asked:
        if self._asked is not None and self._asked.task is task:
            return self._asked
        if fields.plain(task.output_schema) != self._parts.output_schema:
            raise another_schema(self._name, task)
        misfit = misfit_of(task)
        self._asked = _Asked(task, misfit)
        return self._asked


class _InProcess(Ensemble):
    """One whose members all answer many inputs at once."""

    def answer_many(self, task: Task, inputs: Sequence[Json]) -> list[Answer]:
        """An answer an input, in order; `latency` is an even share. Raises what `answer` raises."""
        began = time.perf_counter()
        asked = self._known(task)
        columns: list[Sequence[Answer | BaseException]] = []
        for model in self._members:
            assert isinstance(model, ManyModel)
            try:
                columns.append(model.answer_many(task, inputs))
            except ModelError as error:
                columns.append([error] * len(inputs))
        latency = (time.perf_counter() - began) / max(len(inputs), 1)
        return [self._elected(asked, said, latency) for said in zip(*columns, strict=True)]


async def _no_wait() -> None:
    """It can answer as soon as it is built."""
