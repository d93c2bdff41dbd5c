"""The embedded student: a sentence encoder that stays as it is, and heads that learn in seconds on one core."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from apprentice import heads, plugins
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.trainers import keep, replace_file
from apprentice.types import Checkpoint, Encoder, Example, Json, Task, Trainer

try:
    import numpy as np
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError as error:
    raise MissingExtra("scikit-learn" if error.name == "threadpoolctl" else "numpy", "embedded") from error


def build(encoder: str = "minilm", c: float = 30.0, folds: int = 5, fields: list[str] | None = None) -> Trainer:
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
    return _Embedded(encoder, c, folds, fields)


class _Embedded:
    def __init__(self, encoder: str, c: float, folds: int, counted: list[str] | None) -> None:
        self._encoder = encoder
        self._c = c
        self._folds = folds
        self._counted = counted

    def check(self, task: Task) -> None:
        heads.fields(task, self._counted)

    def train(self, task: Task, examples: Sequence[Example], *, into: Path, seed: int) -> Checkpoint:
        """A checkpoint under `into`, named by its content; `manifest["out_of_fold"]`: confidences by request id.

        An example whose target does not fit the task's output schema is left out and counted in the manifest.
        Raises CannotLearn for a task or a field by design, TrainingError when no example fits.
        """
        fields = heads.fields(task, self._counted)
        rows = []
        for example in sorted(examples, key=_content):
            symbols = [field.symbol(example.target) for field in fields]
            if None not in symbols:
                rows.append((example, [symbol for symbol in symbols if symbol is not None]))
        if not rows:
            raise TrainingError(
                f"task {task.name!r}: none of {len(examples)} examples has a target that fits the output schema",
                hint="compare output_schema with the recorded answers",
            )
        used = [example for example, _ in rows]
        encoder: Encoder = plugins.build("encoders", self._encoder)
        texts = [heads.render(task.input_schema, example.input) for example in used]
        vectors = _vectors(texts, encoder, into / f".vectors-{encoder.name}.npy")
        with threadpool_limits(1):  # sums in another order would give another id
            student, found = heads.learn(
                fields,
                vectors,
                [symbols for _, symbols in rows],
                [example.weight for example in used],
                _folds(texts, self._folds, seed),
                encode=encoder.encode,
                c=self._c,
            )
        about = {
            "task": task.name,
            "input_fields": list(task.input_schema.get("properties") or {}),
            "output_schema": heads.plain(task.output_schema),
            "encoder": {"plugin": self._encoder, "name": encoder.name, "dimension": encoder.dimension},
            "trainer": {"c": self._c, "folds": self._folds, "seed": seed},
            "examples": len(used),
            "left_out": len(examples) - len(used),
            "data": sha256("\n".join(map(_content, used)).encode()).hexdigest(),
            "metrics": _metrics(found),
        }
        held_out = _by_request(used, found)
        name, files = heads.files(student, about, {"oof.json": json.dumps(held_out).encode()})
        manifest = json.loads(files["manifest.json"])
        manifest["out_of_fold"] = {request: confidence for request, (confidence, _) in held_out.items()}
        return Checkpoint(id=name, path=keep(into, name, files), manifest=manifest)


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


def _metrics(found: heads.OutOfFold | None) -> dict[str, Json]:
    if found is None:
        return {}
    surest = np.argsort(-found.confidence, kind="stable")[: max(1, len(found.right) // 2)]
    return {
        "agreement": float(found.right.mean()),
        "agreement_of_surest_half": float(found.right[surest].mean()),
        "confidence": float(found.confidence.mean()),
        "fields": found.agreement,
    }


def _by_request(examples: Sequence[Example], found: heads.OutOfFold | None) -> dict[str, Any]:
    """request id -> [confidence, 1 for agreement and 0 for none], from students that had not seen the row."""
    if found is None:
        return {}
    return {
        example.request_id: [round(float(confidence), 6), int(right)]
        for example, confidence, right in zip(examples, found.confidence, found.right, strict=True)
        if example.request_id is not None
    }
