from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest

from apprentice.models._learned import _AT_ONCE, InProcess
from apprentice.testing.trainers import TASK
from apprentice.types import Answer, Json, Task


class Student(InProcess):
    """Answers with what `compute` makes of the input."""

    def __init__(self, compute: Callable[[Json], Json]) -> None:
        super().__init__("student", ["text"], TASK.output_schema)
        self._compute = compute

    def answer_many(self, task: Task, inputs: Sequence[Json]) -> list[Answer]:
        return [Answer(output=self._compute(asked)) for asked in inputs]


async def asked(student: Student, inputs: Sequence[Json]) -> list[Json]:
    answers = await asyncio.gather(*(student.answer(TASK, given) for given in inputs))
    return [answer.output for answer in answers]


def test_each_of_many_requests_gets_its_own_answer_in_one_loop_after_the_other() -> None:
    student = Student(lambda given: given + 1)

    async def much() -> None:
        for width in (1, 300, 2, 300, 1):
            assert await asked(student, range(width)) == list(range(1, width + 1))

    for _ in range(3):
        asyncio.run(much())


async def test_as_many_are_computed_at_a_time_as_there_are_cores() -> None:
    full, over = threading.Barrier(_AT_ONCE), threading.Semaphore(_AT_ONCE)

    def compute(given: Json) -> Json:
        assert over.acquire(blocking=False), "one more than there are cores"
        full.wait(30)  # passed by so many at a time, and never by fewer
        over.release()
        return given

    inputs = list(range(6 * _AT_ONCE))
    assert await asked(Student(compute), inputs) == inputs


async def test_what_one_request_raises_reaches_whoever_asked_and_nobody_else() -> None:
    student = Student(lambda given: 12 // given)
    found = await asyncio.gather(*(student.answer(TASK, given) for given in (3, 0, 4)), return_exceptions=True)
    assert [getattr(one, "output", type(one)) for one in found] == [4, ZeroDivisionError, 3]
    assert await asked(student, [6]) == [2]


async def test_a_request_that_was_given_up_before_its_turn_is_not_computed() -> None:
    computed, go_on = [], threading.Event()

    def compute(given: Json) -> Json:
        computed.append(given)
        assert go_on.wait(30)
        return given

    student = Student(compute)
    tasks = [asyncio.create_task(student.answer(TASK, given)) for given in range(_AT_ONCE + 2)]
    while len(computed) < _AT_ONCE:
        await asyncio.sleep(0)
    tasks[0].cancel()  # is being computed
    tasks[-1].cancel()  # waits
    await asyncio.wait([tasks[0], tasks[-1]])
    go_on.set()
    assert [(await task).output for task in tasks[1:-1]] == list(range(1, _AT_ONCE + 1))
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert await asked(student, ["later"]) == ["later"]
    assert sorted(map(str, computed)) == sorted([*map(str, range(_AT_ONCE + 1)), "later"])


async def test_a_panic_of_a_library_reaches_whoever_asked_and_stops_nothing() -> None:
    class Panic(BaseException):
        """As the libraries that are written in Rust raise."""

    def compute(given: Json) -> Json:
        if given == "odd":
            raise Panic
        return given

    student = Student(compute)
    for _ in range(2 * _AT_ONCE):
        with pytest.raises(Panic):
            await student.answer(TASK, "odd")
    assert await asked(student, ["even"]) == ["even"]


async def test_an_iterator_that_ends_where_it_should_not_reaches_whoever_asked() -> None:
    student = Student(lambda given: next(iter(given)))
    async with asyncio.timeout(30):
        with pytest.raises(RuntimeError, match="StopIteration"):
            await student.answer(TASK, [])
        assert await asked(student, ["a"]) == ["a"]


async def test_without_a_thread_to_compute_in_every_request_is_told_so_and_none_waits() -> None:
    class Busy(ThreadPoolExecutor):
        """As where the system has no thread to give."""

        refuses = True

        def submit(self, *args: Any, **more: Any) -> Any:
            if self.refuses:
                raise RuntimeError("can't start new thread")
            return super().submit(*args, **more)

    busy, student = Busy(), Student(lambda given: given)
    asyncio.get_running_loop().set_default_executor(busy)
    async with asyncio.timeout(30):
        for _ in range(2 * _AT_ONCE):
            with pytest.raises(RuntimeError, match="thread"):
                await student.answer(TASK, "refused")
        busy.refuses = False
        assert await asked(student, ["later"]) == ["later"]


async def test_what_is_known_of_the_caller_is_known_where_the_answer_is_computed() -> None:
    span = ContextVar("span", default="none")
    span.set("open")
    assert await asked(Student(lambda _: span.get()), ["text"]) == ["open"]
