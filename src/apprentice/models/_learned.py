"""What students share: they answer one task, with the output schema that they learned, and their outputs are checked by it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from apprentice import fields, plugins
from apprentice.errors import MissingExtra, ModelRejected
from apprentice.types import Answer, Json, Task

type Misfit = Callable[[Json], str | None]


class InProcess(ABC):
    """A student that answers by computing: there is no server, and no wait."""

    def __init__(self, name: str, input_fields: Sequence[str], output_schema: dict[str, Json]) -> None:
        self._name = name
        self._input_schema: dict[str, Json] = {"properties": dict.fromkeys(input_fields)}
        self._output_schema = output_schema
        self._fitting: dict[str, Json] | None = None  # the schema that was compared last, and fits

    async def answer(self, task: Task, input: Json) -> Answer:
        """The student's answer, computed in a thread: a long text takes a tenth of a second, and others need the loop.

        Raises ModelRejected when the task's output schema is not the one that the student learned.
        """
        return (await asyncio.to_thread(self.answer_many, task, [input]))[0]

    @abstractmethod
    def answer_many(self, task: Task, inputs: Sequence[Json]) -> list[Answer]:
        """An answer an input, in order; `latency` is an even share. Raises what `answer` raises."""

    async def close(self) -> None:  # noqa: B027 - not every student has something to give back
        """Nothing to give back: what it holds belongs to the process."""

    def _check(self, task: Task) -> None:
        if task.output_schema is self._fitting:
            return
        if fields.plain(task.output_schema) != self._output_schema:
            raise another_schema(self._name, task)
        self._fitting = task.output_schema


def another_schema(name: str, task: Task) -> ModelRejected:
    """The error of a student that is asked a task with another output schema than it learned."""
    return ModelRejected(
        f"{name} learned task {task.name!r} with another output schema",
        hint="teach the task again: its output_schema was changed since",
        outcome="not_sent",
    )


def misfit_of(task: Task) -> Misfit:
    """What tells how an output does not fit the task's schema, None where it does."""
    try:
        check: Misfit = plugins.build("verifiers", "schema", schema=task.output_schema).problem
    except MissingExtra:  # whoever asks checks the output as well, with what the task was configured with
        return anything
    return check


def anything(_: Json) -> None:
    """Fits."""
