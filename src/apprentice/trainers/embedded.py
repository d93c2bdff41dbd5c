"""The embedded student: a sentence encoder that stays as it is, and heads that learn in seconds on one core."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from apprentice import fields, heads, plugins
from apprentice.calibration import Table, calibrate, checked
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.trainers import keep, replace_file
from apprentice.trainers._calibration import calibration
from apprentice.types import Checkpoint, Encoder, Example, Json, Task

try:
    import numpy as np
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError as error:
    raise MissingExtra("numpy" if error.name == "numpy" else "scikit-learn", "embedded") from error

_NO_PROOF: Mapping[str, Json] = MappingProxyType({})
_GROWN = 1.25  # so many times the examples of a calibration need another one
_SAME_AS_BASE = ("input_fields", "output_schema", "encoder", "trainer")
_ROWS_FILE = "rows.npy"
_ROW = np.dtype([("text", "<u8"), ("target", "<u8"), ("confidence", "<f8"), ("right", "<i1")])


def build(encoder: str = "minilm", c: float = 20.0, folds: int = 5, fields: list[str] | None = None) -> Embedded:
    """A trainer for outputs made of categories, numbers and lists of categories.

    `encoder`: an encoder plugin. `c`: inverse strength of the regularisation (on banking77 10 to 100 differ by less
    than .02 in agreement). `folds`: into how many parts the examples are split, each to be answered by a student that
    did not see it. `fields`: the output fields that make up the confidence (those that the evaluator compares); all
    without it.
    Raises ConfigError for an encoder that does not exist and for settings out of range, MissingExtra without the extra.
    """
    plugins.find("encoders", encoder)
    if not c > 0:
        raise ConfigError("trainer 'embedded': c should be above 0")
    if folds < 2:
        raise ConfigError("trainer 'embedded': folds should be at least 2")
    return Embedded(encoder, c, folds, fields)


class Embedded:
    def __init__(self, encoder: str, c: float, folds: int, counted: list[str] | None) -> None:
        self._encoder = encoder
        self._c = c
        self._folds = folds
        self._counted = counted

    def check(self, task: Task) -> None:
        fields.of(task, self._counted)

    def train(
        self, task: Task, examples: Sequence[Example], *, into: Path, seed: int, licence: Mapping[str, Json] = _NO_PROOF
    ) -> Checkpoint:
        """A checkpoint under `into`, named by its content; `manifest["out_of_fold"]`: confidences by request id, as a
        student that had not learned from the request would say them; `manifest["calibration"]`: the table behind them.

        An example whose target does not fit the task's output schema is left out and counted in the manifest.
        Raises CannotLearn for a task or a field by design, TrainingError when no example fits.
        """
        wanted = fields.of(task, self._counted)
        used, symbols = _fitting(task, examples, wanted)
        encoder: Encoder = plugins.build("encoders", self._encoder)
        texts = [fields.render(task.input_schema, example.input) for example in used]
        vectors = _vectors(texts, encoder, into / f".vectors-{encoder.name}.npy")
        weights, folds = [example.weight for example in used], _folds(texts, self._folds, seed)
        with threadpool_limits(1):  # sums in another order would give another id
            student, found = heads.learn(wanted, vectors, symbols, weights, folds, encode=encoder.encode, c=self._c)
            table, quality = calibration(found, np.array(weights, float), np.array(folds))
        # The served table on every row, although it was fitted on them: deferral thresholds are quantiles of these
        # values and are held against served ones; a rising table cannot make any row look better than another.
        unseen = [_Unseen() for _ in used]
        if found is not None:
            pairs = zip(_served(table, found.confidence), found.right.tolist(), strict=True)
            unseen = [_Unseen(confidence, int(right)) for confidence, right in pairs]
        about = self._about(task, encoder, used, seed) | {
            "left_out": len(examples) - len(used),
            "calibration": [list(row) for row in table],
            "licence": dict(licence),
            "metrics": (_metrics(unseen) | {"fields": found.agreement} if found is not None else {}) | quality,
        }
        return _kept(into, student, about, used, _marks(texts, symbols), unseen)

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
        """What `train` gives for the same examples, nearly, for a fraction of its time; from what `base` has learned.

        `examples`: all of them, not only those that are new to `base`, a checkpoint's folder. What only folds tell is
        taken over from it: the calibration, and the out-of-fold confidence of inputs that it had learned; for the others
        stands what it said before it learned them. `manifest["updated_from"]`: its id.
        Raises what `train` raises; and TrainingError where only `train` will do: the base cannot be read or has learned
        another task, or there are 25 % more examples than it was calibrated on.
        """
        wanted = fields.of(task, self._counted)
        used, symbols = _fitting(task, examples, wanted)
        encoder: Encoder = plugins.build("encoders", self._encoder)
        about = self._about(task, encoder, used, seed)
        before, manifest, seen = _base(base)
        told = manifest | {"trainer": manifest["trainer"] | {"seed": seed}}  # the seed moves the folds only
        changed = [name for name in _SAME_AS_BASE if told[name] != about[name]]
        if [head.field for head in before.heads] != list(wanted):
            changed.append("fields")
        if changed:
            raise _only_train(f"{base.name} was taught otherwise ({', '.join(changed)})")
        calibrated_on = int(manifest.get("calibrated_on") or manifest["examples"])
        if len(used) >= _GROWN * calibrated_on:
            raise _only_train(f"{base.name} was calibrated on {calibrated_on} examples, and there are {len(used)}")
        texts = [fields.render(task.input_schema, example.input) for example in used]
        marks = _marks(texts, symbols)
        vectors = _vectors(texts, encoder, into / f".vectors-{encoder.name}.npy")
        table = checked(manifest["calibration"])
        with threadpool_limits(1):
            student = heads.update(
                before, vectors, symbols, [example.weight for example in used], encode=encoder.encode, c=self._c
            )
            new = [place for place, (text, _) in enumerate(marks) if text not in seen.confidence]
            found = heads.examined(before, vectors[new], [symbols[place] for place in new])
        unseen = [_Unseen(seen.confidence.get(text), seen.right.get((text, target))) for text, target in marks]
        for place, confidence, right in zip(new, _served(table, found.confidence), found.right.tolist(), strict=True):
            unseen[place] = _Unseen(confidence, int(right))
        metrics = manifest["metrics"]
        about |= {
            "left_out": len(examples) - len(used),
            "calibration": manifest["calibration"],
            "calibrated_on": calibrated_on,
            "updated_from": base.resolve().name,
            "licence": dict(licence),
            "metrics": _metrics(unseen) | {key: metrics[key] for key in ("fields", "calibration") if key in metrics},
        }
        return _kept(into, student, about, used, marks, unseen)

    def _about(self, task: Task, encoder: Encoder, used: Sequence[Example], seed: int) -> dict[str, Json]:
        return {
            "task": task.name,
            "input_fields": list(task.input_schema.get("properties") or {}),
            "output_schema": fields.plain(task.output_schema),
            "encoder": {"plugin": self._encoder, "name": encoder.name, "dimension": encoder.dimension},
            "trainer": {"c": self._c, "folds": self._folds, "seed": seed},
            "examples": len(used),
            "data": sha256("\n".join(map(_content, used)).encode()).hexdigest(),
        }


class _Unseen(NamedTuple):
    """How sure a student that had not learned a row was of it, and whether it was right (1 or 0); None: not known."""

    confidence: float | None = None
    right: int | None = None


class _Seen(NamedTuple):
    """What a checkpoint says about the rows that it learned from, by text, and by text and target."""

    confidence: Mapping[int, float | None]
    right: Mapping[tuple[int, int], int | None]


def _only_train(why: str) -> TrainingError:
    return TrainingError(why, hint="teach it in full")


def _fitting(
    task: Task, examples: Sequence[Example], wanted: Sequence[fields.Field]
) -> tuple[list[Example], list[list[str]]]:
    """The examples whose target fits the output schema, in an order of their own, with a symbol a field."""
    used, rows = [], []
    for example in sorted(examples, key=_content):
        symbols = [field.symbol(example.target) for field in wanted]
        if None not in symbols:
            used.append(example)
            rows.append([symbol for symbol in symbols if symbol is not None])
    if not used:
        raise TrainingError(
            f"task {task.name!r}: none of {len(examples)} examples has a target that fits the output schema",
            hint="compare output_schema with the recorded answers",
        )
    return used, rows


def _served(table: Table, raw: Sequence[float]) -> list[float]:
    return [round(calibrate(table, float(value)), 6) for value in raw]


def _kept(
    into: Path,
    student: heads.Student,
    about: Mapping[str, Json],
    used: Sequence[Example],
    marks: Sequence[tuple[int, int]],
    unseen: Sequence[_Unseen],
) -> Checkpoint:
    held_out = {
        example.request_id: [row.confidence, row.right]
        for example, row in zip(used, unseen, strict=True)
        if example.request_id is not None and row.confidence is not None
    }
    rows = np.empty(len(used), _ROW)
    rows["text"], rows["target"] = zip(*marks, strict=True)
    rows["confidence"] = [np.nan if row.confidence is None else row.confidence for row in unseen]
    rows["right"] = [-1 if row.right is None else row.right for row in unseen]
    written = io.BytesIO()
    np.save(written, rows, allow_pickle=False)
    beside = {"oof.json": json.dumps(held_out).encode(), _ROWS_FILE: written.getvalue()}
    name, files = heads.files(student, about, beside)
    manifest = json.loads(files["manifest.json"])
    manifest["out_of_fold"] = {request: confidence for request, (confidence, _) in held_out.items()}
    return Checkpoint(id=name, path=keep(into, name, files), manifest=manifest)


def _base(folder: Path) -> tuple[heads.Student, dict[str, Json], _Seen]:
    """The student of a checkpoint, its manifest, and what it learned from. Raises TrainingError for what is none."""
    try:
        student, manifest = heads.load(folder)
        rows = np.load(folder / _ROWS_FILE, allow_pickle=False)
        if rows.dtype != _ROW or rows.ndim != 1:
            raise ValueError(f"{_ROWS_FILE} is no list of rows")
    except (ConfigError, OSError, ValueError, EOFError) as error:
        raise _only_train(f"{folder} cannot be continued: {error}") from error
    texts, targets = rows["text"].tolist(), rows["target"].tolist()
    confidence = [None if value != value else value for value in rows["confidence"].tolist()]
    right = [None if value < 0 else value for value in rows["right"].tolist()]
    pairs = zip(texts, targets, strict=True)
    return student, manifest, _Seen(dict(zip(texts, confidence, strict=True)), dict(zip(pairs, right, strict=True)))


def _marks(texts: Sequence[str], symbols: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """A number for each row's text, and one for its target: whether a row was learned before is told by them."""

    def mark(content: str) -> int:
        return int.from_bytes(sha256(content.encode("utf-8", "replace")).digest()[:8])

    return [(mark(text), mark("\n".join(row))) for text, row in zip(texts, symbols, strict=True)]


def _vectors(texts: Sequence[str], encoder: Encoder, kept: Path) -> Any:
    """A row a text. The rows are kept in a file for the next cycle, because encoding is most of what a cycle costs.

    Raises TrainingError when the file is damaged.
    """
    layout = np.dtype([("key", "S64"), ("row", "<f4", (encoder.dimension,))])
    known = {}
    if kept.exists():
        try:
            found = np.load(kept, allow_pickle=False)
            if found.dtype != layout or found.ndim != 1:
                raise ValueError("not vectors of this encoder")
        except (ValueError, EOFError, OSError) as error:
            raise TrainingError(f"{kept} cannot be read: {error}", hint="delete it: it only saves time") from error
        known = dict(zip(found["key"].tolist(), found["row"], strict=True))
    keys = [sha256(text.encode("utf-8", "replace")).hexdigest().encode() for text in texts]
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if missing:
        known.update(zip(missing, encoder.encode(list(missing.values())), strict=True))
        table = np.empty(len(set(keys)), layout)  # of these texts only: what is no longer trained on is forgotten here
        table["key"] = list(dict.fromkeys(keys))
        table["row"] = [known[key] for key in dict.fromkeys(keys)]
        written = io.BytesIO()
        np.save(written, table, allow_pickle=False)
        replace_file(kept, written.getvalue())
    return np.stack([known[key] for key in keys])


def _content(example: Example) -> str:
    """All that may change what is learned from an example; the order of the examples never does."""
    parts = [example.input, example.target, example.weight, example.source, example.request_id]
    return json.dumps(parts, sort_keys=True)


def _folds(texts: Sequence[str], count: int, seed: int) -> list[int]:
    """A part a text, of even sizes; equal texts are in one part, or one would be examined on what it learned."""
    order = sorted(set(texts), key=lambda text: sha256(f"{seed}:".encode() + text.encode("utf-8", "replace")).digest())
    part = {text: place % count for place, text in enumerate(order)}
    return [part[text] for text in texts]


def _metrics(unseen: Sequence[_Unseen]) -> dict[str, Json]:
    """Of the rows of which it is known what a student said before it learned them."""
    known = [(row.confidence, row.right) for row in unseen if row.confidence is not None and row.right is not None]
    if not known:
        return {}
    confidence, right = (np.array(column) for column in zip(*known, strict=True))
    surest = np.argsort(-confidence, kind="stable")[: max(1, len(right) // 2)]
    return {
        "agreement": float(right.mean()),
        "agreement_of_surest_half": float(right[surest].mean()),
        "confidence": float(confidence.mean()),
    }
