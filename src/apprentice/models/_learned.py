"""What students share: they answer one task, with the output schema that they learned, and their outputs are checked by it."""

from __future__ import annotations

from collections.abc import Callable

from apprentice import plugins
from apprentice.errors import MissingExtra, ModelRejected
from apprentice.types import Json, Task

type Misfit = Callable[[Json], str | None]


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
