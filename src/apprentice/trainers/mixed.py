"""Teaches two students one task: the embedded one its closed fields, and a generative one, if it is to learn, the rest.

The generative student learns, and is asked later, with the closed fields decided already (`fields.following`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from apprentice import fields, heads, plugins
from apprentice.errors import CannotLearn, ConfigError, TrainingError
from apprentice.trainers import Updater, keep
from apprentice.types import Checkpoint, Example, Json, Task, Trainer

_NO_PROOF: Mapping[str, Json] = MappingProxyType({})
_PARTS = ".parts"  # where the parts are made; what their trainers keep for the next cycle stays there


def build(
    closed: dict[str, Any] | None = None, rest: str | None = None, rest_settings: dict[str, Any] | None = None
) -> Mixed:
    """A trainer for outputs of which the embedded student can learn some fields, and not all.

    `closed`: settings of the trainer `embedded`. `rest`: a trainer for the other fields, with `rest_settings`; without
    one, the generative model is asked as it is. Raises ConfigError for settings that are wrong, MissingExtra.
    """
    closed = dict(closed or {})
    if rest is None and rest_settings:
        raise ConfigError("trainer 'mixed': rest_settings are for a trainer, and `rest` names none")
    if rest in ("embedded", "mixed"):
        raise ConfigError(f"trainer 'mixed': {rest!r} writes no text", hint="name a trainer of generative models")
    embedded: Updater = plugins.build("trainers", "embedded", **closed)
    generative: Trainer | None = None if rest is None else plugins.build("trainers", rest, **rest_settings or {})
    if hasattr(generative, "quote"):  # whoever lets this trainer work asks it alone for its price
        raise ConfigError(f"trainer 'mixed': {rest!r} costs money, which is not booked for a part of a training")
    return Mixed(embedded, generative, everything=closed.get("fields") is None)


class _Split(NamedTuple):
    """A task in two, and what each part learns from."""

    closed: list[str]
    rest: list[str]
    compared: list[str]  # of the rest, what the evaluator looks at
    closed_task: Task
    rest_task: Task


class Mixed:
    """`everything`: confidence is in all fields that the evaluator compares, not only in some closed ones."""

    def __init__(self, embedded: Updater, generative: Trainer | None, *, everything: bool) -> None:
        self._embedded = embedded
        self._generative = generative
        self._everything = everything
        self._stopped = threading.Event()

    def check(self, task: Task) -> None:
        split = self._split(task, *fields.closed(task))
        self._embedded.check(split.closed_task)
        if self._generative is not None:
            self._generative.check(split.rest_task)

    def lead(self, token: int) -> None:
        """The generative student's job is led under that token, if its trainer has jobs (jobs.LedTrainer)."""
        if self._generative is not None and hasattr(self._generative, "lead"):
            self._generative.lead(token)

    def stop(self) -> None:
        """Let `train` end soon: the generative student's job stays for the next cycle."""
        self._stopped.set()
        if self._generative is not None and hasattr(self._generative, "stop"):
            self._generative.stop()

    def train(
        self, task: Task, examples: Sequence[Example], *, into: Path, seed: int, licence: Mapping[str, Json] = _NO_PROOF
    ) -> Checkpoint:
        """A checkpoint under `into`, named by its content, with a folder for each part.

        A field that may be closed by its schema but is free text by its examples is left to the generative student.
        Raises CannotLearn when no field or every field is closed, and what the parts' trainers raise.
        """
        split = self._sorted(task, examples)
        drafts = into / _PARTS
        closed = self._embedded.train(
            split.closed_task, _closed_rows(split, examples), into=drafts, seed=seed, licence=licence
        )
        if self._stopped.is_set():
            raise TrainingError(
                f"task {task.name!r}: the training is waited for no longer", hint="the next cycle begins it again"
            )
        rest = None
        if self._generative is not None:
            rows = _rest_rows(split, examples)
            rest = self._generative.train(split.rest_task, rows, into=drafts, seed=seed, licence=licence)
        return _kept(into, task, split, closed, rest, {"licence": dict(licence)})

    def update(
        self,
        task: Task,
        examples: Sequence[Example],
        *,
        base: Path,
        into: Path,
        seed: int,
        licence: Mapping[str, Json] = _NO_PROOF,
    ) -> Checkpoint:
        """What `train` gives for these examples, nearly, from what the embedded part of `base` has learned.

        Raises what `train` raises; and TrainingError where only `train` will do: the generative student learns as well,
        or the embedded one has to be taught in full.
        """
        split = self._sorted(task, examples)
        try:
            manifest = heads.manifest_of(base, heads.MIXED)
        except ConfigError as error:
            raise TrainingError(f"{base} cannot be continued: {error}", hint="teach it in full") from error
        if self._generative is not None or manifest["rest_part"] is not None or manifest["closed"] != split.closed:
            raise TrainingError(
                f"{base.name} has a generative student or fields of its own to be taught", hint="teach it in full"
            )
        closed = self._embedded.update(
            split.closed_task,
            _closed_rows(split, examples),
            base=base / manifest["closed_part"],
            into=into / _PARTS,
            seed=seed,
            licence=licence,
        )
        about = {"updated_from": base.resolve().name, "licence": dict(licence)}
        return _kept(into, task, split, closed, None, about)

    def _sorted(self, task: Task, examples: Sequence[Example]) -> _Split:
        """The task in two by its schema and by what the examples hold."""
        split = self._split(task, *fields.closed(task))
        free = []
        for field in fields.of(split.closed_task):
            symbols = [field.symbol(example.target) for example in examples]
            if heads.varied(field, [symbol for symbol in symbols if symbol is not None]):
                free.append(field.name)
        closed = [name for name in split.closed if name not in free]
        return self._split(task, closed, [name for name in fields.names(task) if name not in closed]) if free else split

    def _split(self, task: Task, closed: list[str], rest: list[str]) -> _Split:
        if not closed:
            raise CannotLearn(
                f"task {task.name!r}: no field of the output is closed, so the embedded student has nothing to learn",
                hint="use a generative backend alone, say: backend: llama_cpp",
            )
        if not rest:
            raise CannotLearn(
                f"task {task.name!r}: every field of the output is closed, so there is nothing left to write",
                hint="use the embedded student alone: backend: embedded, fine_tune_backend: embedded",
            )
        compared = fields.compared(task, rest) if self._everything else []
        closed_task = fields.only(task, closed)
        if not fields.compared(task, closed):  # then how sure it is of all of them is the best that there is
            schema = fields.plain(closed_task.output_schema)
            closed_task = closed_task.model_copy(update={"output_schema": schema})
        # Without our marks, as it will be asked.
        bare = task.model_copy(update={"output_schema": fields.plain(task.output_schema)})
        return _Split(closed, rest, compared, closed_task, fields.following(bare, closed, rest))


def _closed_rows(split: _Split, examples: Sequence[Example]) -> list[Example]:
    return [row.model_copy(update={"target": fields.chosen(row.target, split.closed)}) for row in examples]


def _rest_rows(split: _Split, examples: Sequence[Example]) -> list[Example]:
    """Examples of writing the rest when the closed fields are decided rightly."""
    return [
        row.model_copy(
            update={
                "input": fields.told(row.input, fields.chosen(row.target, split.closed)),
                "target": fields.chosen(row.target, split.rest),
            }
        )
        for row in examples
        if isinstance(row.target, dict)
    ]


def _kept(
    into: Path, task: Task, split: _Split, closed: Checkpoint, rest: Checkpoint | None, about: Mapping[str, Json]
) -> Checkpoint:
    learned = closed.manifest
    manifest: dict[str, Json] = {
        "format": heads.MIXED,
        "task": task.name,
        "output_schema": fields.plain(task.output_schema),
        "closed": split.closed,
        "rest": split.rest,
        "compared": split.compared,
        "closed_part": closed.id,
        "rest_part": None if rest is None else rest.id,
        **{key: learned[key] for key in ("examples", "left_out", "metrics")},
        **about,
    }
    if not split.compared:  # then the confidence served is the embedded part's
        manifest["calibration"] = learned["calibration"]
    written = json.dumps(manifest, indent=1).encode()
    name = f"sha256-{sha256(written).hexdigest()}"
    parts = {part.id: part.path for part in (closed, rest) if part is not None}
    path = keep(into, name, {"manifest.json": written}, parts)
    if not split.compared:
        manifest["out_of_fold"] = learned["out_of_fold"]
    return Checkpoint(id=name, path=path, manifest=manifest)
