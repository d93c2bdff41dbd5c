"""Teaches several students one task, each with a trainer of its own, and finds out what it means when they agree."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from apprentice import fields, heads, plugins, voting
from apprentice.calibration import SAME, Table, calibrate
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.trainers import keep
from apprentice.trainers._calibration import calibration
from apprentice.types import Answer, Checkpoint, Example, Json, ManyModel, Model, Task, Trainer

try:
    import numpy as np
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError as error:
    raise MissingExtra("numpy" if error.name == "numpy" else "scikit-learn", "embedded") from error

_NO_PROOF: Mapping[str, Json] = MappingProxyType({})
_PARTS = ".parts"  # where the members are made; what their trainers keep for the next cycle stays there
_USUAL: tuple[dict[str, Any], ...] = ({"settings": {"encoder": "minilm"}}, {"settings": {"encoder": "tfidf"}})
_MEMBER = {"trainer", "settings", "backend", "serve", "seed"}
_TOO_FEW = 10  # examples of which a part can hardly be spared for calibration


def build(members: list[dict[str, Any]] | None = None, folds: int = 3) -> Ensemble:
    """A trainer for several students that vote.

    `members`: for each its `trainer` (`embedded` without one) with `settings`, the `backend` that serves what it makes
    (the trainer's name without one) with the settings `serve`, and `seed`, which is added to the cycle's; without any, the
    embedded student with the encoders minilm and tfidf. `folds`: into how many parts the examples are split, each to be
    answered by members that did not see it: so many times more is trained.
    Raises ConfigError for settings that are wrong, MissingExtra.
    """
    given = list(_USUAL) if members is None else members
    if len(given) < 2:
        raise ConfigError("trainer 'ensemble': `members` should name at least two: one alone has nobody to agree with")
    if folds < 2:
        raise ConfigError("trainer 'ensemble': folds should be at least 2")
    return Ensemble([_member(settings) for settings in given], folds)


class _Member(NamedTuple):
    """How one student is made and served."""

    trainer: Trainer
    backend: str
    serve: Mapping[str, Any]
    seed: int

    def model(self, checkpoint: Path) -> Model:
        built: Model = plugins.build("models", self.backend, checkpoint=checkpoint, **self.serve)
        return built


def _member(given: Mapping[str, Any]) -> _Member:
    if unknown := set(given) - _MEMBER:
        raise ConfigError(
            f"trainer 'ensemble': a member has no setting {min(unknown)!r}",
            hint=f"it takes: {', '.join(sorted(_MEMBER))}",
        )
    name = given.get("trainer", "embedded")
    if name == "ensemble":
        raise ConfigError("trainer 'ensemble': a member is one student, and 'ensemble' makes several")
    trainer: Trainer = plugins.build("trainers", name, **given.get("settings") or {})
    if hasattr(trainer, "quote"):  # whoever lets this trainer work asks it alone for its price
        raise ConfigError(f"trainer 'ensemble': {name!r} costs money, which is not booked for a part of a training")
    backend, seed = given.get("backend", name), given.get("seed", 0)
    plugins.find("models", backend)
    if type(seed) is not int:
        raise ConfigError(f"trainer 'ensemble': seed should be a whole number, not {seed!r}")
    return _Member(trainer, backend, given.get("serve") or {}, seed)


class Ensemble:
    def __init__(self, members: Sequence[_Member], folds: int) -> None:
        self._members = members
        self._folds = folds
        self._stopped = threading.Event()

    def check(self, task: Task) -> None:
        for member in self._members:
            member.trainer.check(task)

    def lead(self, token: int) -> None:
        """The jobs of members whose trainers have some are led under that token (jobs.LedTrainer)."""
        for member in self._members:
            if hasattr(member.trainer, "lead"):
                member.trainer.lead(token)

    def stop(self) -> None:
        """Let `train` end soon with TrainingError: the members' jobs stay for the next cycle."""
        self._stopped.set()
        for member in self._members:
            if hasattr(member.trainer, "stop"):
                member.trainer.stop()

    def train(
        self, task: Task, examples: Sequence[Example], *, into: Path, seed: int, licence: Mapping[str, Json] = _NO_PROOF
    ) -> Checkpoint:
        """A checkpoint under `into`, named by its content, with a folder for each member.

        `manifest["calibration"]` and `["out_of_fold"]`, as of the trainer `embedded`, come from what members that had not
        learned a row elected for it; with fewer than ten examples nothing is calibrated.
        Raises what the members' trainers raise, and ModelError where a member cannot be asked.
        """
        examples = sorted(examples, key=_content)
        into_parts = into / _PARTS
        parts = [
            member.trainer.train(task, examples, into=into_parts, seed=seed + member.seed, licence=licence)
            for member in self._members
        ]
        counted = _counted(task)
        elected = self._out_of_fold(task, examples, counted, seed=seed, licence=licence, kept=into_parts)
        table, metrics = _judged(examples, elected, counted)
        manifest: dict[str, Json] = {
            "format": voting.FORMAT,
            "task": task.name,
            "output_schema": fields.plain(task.output_schema),
            "parts": [part.id for part in parts],
            "counted": counted,
            "trainer": {"folds": self._folds, "seed": seed, "seeds": [member.seed for member in self._members]},
            "examples": max(int(part.manifest.get("examples", len(examples))) for part in parts),
            "calibration": [list(row) for row in table],
            "licence": dict(licence),
            "metrics": metrics,
        }
        written = json.dumps(manifest, indent=1).encode()
        name = f"sha256-{sha256(written).hexdigest()}"
        path = keep(into, name, {"manifest.json": written}, {part.id: part.path for part in parts})
        manifest["out_of_fold"] = _confidences(examples, elected, table)
        return Checkpoint(id=name, path=path, manifest=manifest)

    def _check_wanted(self, task: Task) -> None:
        if self._stopped.is_set():
            raise TrainingError(
                f"task {task.name!r}: the training is waited for no longer", hint="the next cycle begins it again"
            )

    def _out_of_fold(
        self,
        task: Task,
        examples: Sequence[Example],
        counted: Sequence[str] | None,
        *,
        seed: int,
        licence: Mapping[str, Json],
        kept: Path,
    ) -> list[voting.Outcome | None]:
        """What members that had not learned an example elect for it; None where that is not known."""
        elected: list[voting.Outcome | None] = [None] * len(examples)
        if len(examples) < _TOO_FEW:
            return elected
        folds = _folds(examples, self._folds, seed)
        for fold in range(self._folds):
            shown = [example for example, of in zip(examples, folds, strict=True) if of != fold]
            asked = [place for place, of in enumerate(folds) if of == fold]
            if not shown or not asked:
                continue
            inputs = [examples[place].input for place in asked]
            with tempfile.TemporaryDirectory(prefix=".draft-", dir=kept) as folder:
                columns: list[list[voting.Ballot | None]] = []
                for number, member in enumerate(self._members):
                    into = Path(folder) / str(number)
                    self._check_wanted(task)
                    try:
                        part = member.trainer.train(task, shown, into=into, seed=seed + member.seed, licence=licence)
                    except TrainingError:  # too little is left without this part
                        self._check_wanted(task)
                        columns.append([None] * len(inputs))
                        continue
                    columns.append(_ballots(_answers(member.model(part.path), task, inputs)))
            for place, ballots in zip(asked, zip(*columns, strict=True), strict=True):
                elected[place] = voting.vote(ballots, counted=counted)
        return elected


def _ballots(answers: Sequence[Answer]) -> list[voting.Ballot | None]:
    return [None if a.output is None else voting.Ballot(a.output, a.confidence) for a in answers]


def _answers(model: Model, task: Task, inputs: Sequence[Json]) -> list[Answer]:
    """What the model answers, and its end. One that is not asked in this process gets a loop in a thread of its own."""
    bare = task.model_copy(update={"output_schema": fields.plain(task.output_schema)})

    async def ask() -> list[Answer]:
        try:
            if (wait := getattr(model, "ready", None)) is not None:
                await wait()
            if isinstance(model, ManyModel):
                return model.answer_many(bare, inputs)
            return [await model.answer(bare, given) for given in inputs]
        finally:
            await model.close()

    with ThreadPoolExecutor(1, thread_name_prefix="ensemble") as pool:
        return pool.submit(asyncio.run, ask()).result()


def _counted(task: Task) -> list[str] | None:
    """The fields that the evaluator looks at; None: all there is."""
    names = fields.names(task)
    compared = fields.compared(task, names)
    return None if len(compared) == len(names) else compared


def _judged(
    examples: Sequence[Example], elected: Sequence[voting.Outcome | None], counted: Sequence[str] | None
) -> tuple[Table, dict[str, Json]]:
    """The table from agreement to chance, and what is known of answers to rows that were not learned."""
    known = [(found, example) for found, example in zip(elected, examples, strict=True) if found is not None]
    if not known:
        return SAME, {}
    right = np.array([_same(found.output, example.target, counted) for found, example in known])
    raw = np.array([found.agreement for found, _ in known])
    weights = np.array([example.weight for _, example in known], float)
    with threadpool_limits(1):  # sums in another order would give another id
        table, quality = calibration(heads.OutOfFold(raw, right, {}), weights, np.arange(len(raw)) % 5)
    return table, {"agreement": float(right.mean())} | quality


def _same(output: Json, target: Json, counted: Sequence[str] | None) -> bool:
    if counted is not None:
        output, target = fields.chosen(output, counted), fields.chosen(target, counted)
    return fields.text_of(output) == fields.text_of(target)


def _confidences(
    examples: Sequence[Example], elected: Sequence[voting.Outcome | None], table: Table
) -> dict[str, float]:
    return {
        example.request_id: round(calibrate(table, found.agreement), 6)
        for example, found in zip(examples, elected, strict=True)
        if example.request_id is not None and found is not None
    }


def _content(example: Example) -> str:
    """All that may change what is learned from an example; the order of the examples never does."""
    parts = [example.input, example.target, example.weight, example.source, example.request_id]
    return json.dumps(parts, sort_keys=True)


def _folds(examples: Sequence[Example], count: int, seed: int) -> list[int]:
    """A part an example, of even sizes; equal inputs are in one part, or one would be examined on what it learned."""
    texts = [fields.text_of(example.input) for example in examples]
    order = sorted(set(texts), key=lambda text: sha256(f"{seed}:{text}".encode()).digest())
    part = {text: place % count for place, text in enumerate(order)}
    return [part[text] for text in texts]
