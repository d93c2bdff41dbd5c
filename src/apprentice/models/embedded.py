"""The embedded student at work: a checkpoint of the trainer `embedded`, answering in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from apprentice import fields, heads, plugins
from apprentice.calibration import Table, calibrate, checked
from apprentice.errors import ConfigError
from apprentice.models._learned import another_schema
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


class Embedded:
    """Answers a task's inputs; several at once with `answer_many`, which is the faster for each."""

    def __init__(
        self, student: heads.Student, table: Table, manifest: dict[str, Json], encoder: Encoder, id: str
    ) -> None:
        self._student = student
        self._table = table
        self._encoder = encoder
        self._name = f"embedded:{id.removeprefix('sha256-')[:12]}"
        self._input_schema: dict[str, Json] = {"properties": dict.fromkeys(manifest["input_fields"])}
        self._output_schema = manifest["output_schema"]
        self._fitting: dict[str, Json] | None = None  # the schema that was compared last, and fits

    async def answer(self, task: Task, input: Json) -> Answer:
        """The student's answer, computed in a thread: a long text takes a tenth of a second, and others need the loop.

        Raises ModelRejected when the task's output schema is not the one that the student learned.
        """
        return (await asyncio.to_thread(self.answer_many, task, [input]))[0]

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

    async def close(self) -> None:
        """Nothing to give back: the encoder belongs to the process."""

    def _check(self, task: Task) -> None:
        if task.output_schema is self._fitting:
            return
        if fields.plain(task.output_schema) != self._output_schema:
            raise another_schema(self._name, task)
        self._fitting = task.output_schema
