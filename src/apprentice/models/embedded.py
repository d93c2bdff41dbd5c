"""The embedded student at work: a checkpoint of the trainer `embedded`, answering in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from apprentice import fields, heads, plugins
from apprentice.calibration import Table, calibrate, checked
from apprentice.errors import ConfigError
from apprentice.models._learned import InProcess
from apprentice.types import Answer, Encoder, Json, Task


def build(checkpoint: str | Path) -> Embedded:
    """The student in a checkpoint's folder. Versions of one encoder share it, so a further one costs its heads only.

    Raises ConfigError when the folder is missing or damaged, or needs vectors of an encoder other than the one
    installed; MissingExtra without the extra `embedded`.
    """
    student, manifest = heads.load(Path(checkpoint))
    try:
        table = checked(manifest.get("calibration"))
    except ValueError as error:
        raise heads.damaged(Path(checkpoint), str(error)) from error
    made = manifest["encoder"]
    encoder: Encoder = plugins.build("encoders", made["plugin"])
    if encoder.name != made["name"]:
        raise ConfigError(
            f"the checkpoint {checkpoint} reads vectors of {made['name']}, but {encoder.name} is installed",
            hint="teach the task again, or install the encoder's former version",
        )
    return Embedded(student, table, manifest, encoder, Path(checkpoint).resolve().name)


class Embedded(InProcess):
    """Answers a task's inputs; several at once with `answer_many`, which is the faster for each."""

    def __init__(
        self, student: heads.Student, table: Table, manifest: dict[str, Json], encoder: Encoder, id: str
    ) -> None:
        self._student = student
        self._table = table
        self._encoder = encoder
        name = f"embedded:{id.removeprefix('sha256-')[:12]}"
        super().__init__(name, manifest["input_fields"], manifest["output_schema"])

    def answer_many(self, task: Task, inputs: Sequence[Json]) -> list[Answer]:
        """An answer an input, in order; `latency` is an even share. Raises what `answer` raises."""
        began = time.perf_counter()
        self._check(task)
        if not inputs:
            return []
        texts = [fields.render(self._input_schema, asked) for asked in inputs]
        answers = self._student.answers(self._encoder.encode(texts))
        latency = (time.perf_counter() - began) / len(inputs)
        return [
            Answer(output=output, model=self._name, latency=latency, confidence=round(calibrate(self._table, raw), 6))
            for output, raw in answers
        ]
