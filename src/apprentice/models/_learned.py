"""What students share: they answer one task, with the output schema that they learned, and their outputs are checked by it."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import partial
from threading import Lock
from weakref import WeakKeyDictionary

from apprentice import fields, plugins
from apprentice.errors import MissingExtra, ModelRejected
from apprentice.types import Answer, Json, Task

type Misfit = Callable[[Json], str | None]

# Answers of a loop that are computed at a time: more threads than cores would only take them from the loop. asyncio has 32.
_AT_ONCE = min(os.cpu_count() or 1, 32)


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
        loop = asyncio.get_running_loop()
        if (line := _LINES.get(loop)) is None:
            line = _LINES[loop] = _Line()
        compute = partial(copy_context().run, self.answer_many, task, [input])  # a span that is open stays open
        return (await line.answers(loop, compute))[0]

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


class _Line:
    """The requests of a loop that wait for a core, of whichever student: a thread a core, and it goes on while any waits.

    Waking a thread for each request costs the loop twice as much where several come at once.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[asyncio.Future[list[Answer]], Callable[[], list[Answer]]]] = deque()
        self._threads = 0
        self._lock = Lock()  # so that no thread goes home while a request joins the line behind it

    async def answers(self, loop: asyncio.AbstractEventLoop, compute: Callable[[], list[Answer]]) -> list[Answer]:
        answered: asyncio.Future[list[Answer]] = loop.create_future()
        asked = answered, compute
        with self._lock:
            self._waiting.append(asked)
            more = self._threads < _AT_ONCE
            self._threads += more
        if more:
            try:
                loop.run_in_executor(None, self._work, loop)
            except RuntimeError:  # no thread is to be had: a line that counted on it would stand for ever
                with self._lock:
                    self._threads -= 1
                    if asked in self._waiting:
                        self._waiting.remove(asked)
                raise
        return await answered

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                answered, compute = self._waiting.popleft()
            if answered.cancelled():
                continue
            try:
                tell = partial(_settle, answered.set_result, compute())
            except StopIteration as error:  # no future takes it, and whoever asked would wait for ever
                stopped = RuntimeError("the student raised StopIteration")
                stopped.__cause__ = error
                tell = partial(_settle, answered.set_exception, stopped)
            except BaseException as error:  # noqa: BLE001 - a library's panic, too: who asked gets it, the others their answers
                tell = partial(_settle, answered.set_exception, error)
            loop.call_soon_threadsafe(tell, answered)


_LINES: WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = WeakKeyDictionary()


def _settle[Said](settle: Callable[[Said], None], said: Said, answered: asyncio.Future[list[Answer]]) -> None:
    if not answered.done():  # whoever asked may have given up meanwhile
        settle(said)


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
