"""One request on its way through the engine, and the Record and the Result that it becomes."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from apprentice.config import TaskConfig
from apprentice.errors import ConfigError, IdempotencyConflict, InvalidAnswer
from apprentice.privacy import NO_VEIL, Veil
from apprentice.shelf import Loaded
from apprentice.types import (
    Answer,
    Attempt,
    Decision,
    Evaluator,
    Json,
    Reason,
    Record,
    Result,
    Score,
    Seconds,
    Source,
)


@dataclass(slots=True)
class Request:
    """One request on its way through the engine."""

    id: str
    at: Seconds
    started: float
    input: Json
    key: str | None
    tags: dict[str, str]
    deadline: Seconds | None
    version: str | None
    decision: Decision
    model: Loaded | None = None  # the local model that it was decided with
    local: Answer | None = None
    remote: Answer | None = None
    score: Score | None = None
    repeat: Score | None = None
    canary: Loaded | None = None  # what is tried out, where it answers the same audit
    rival: Score | None = None
    rival_confidence: float | None = None
    attempts: list[Attempt] = field(default_factory=list)
    capture: bool = True  # whether what was said is kept
    veil: Veil = NO_VEIL  # over what must not be kept
    problem: str | None = None  # what went wrong on the way although there is an answer

    @property
    def sure(self) -> bool:
        """The local answer is valid and above the threshold, so that it could have been served alone."""
        if self.local is None or self.local.output is None or self.decision.level >= 1.0:
            return False
        threshold = self.decision.threshold
        return threshold is None or (self.local.confidence is not None and self.local.confidence >= threshold)

    @property
    def said(self) -> Json:
        """The input as it is kept, and as the local model is asked: it has learned from what was kept."""
        return self.veil.hide(self.input)

    def change(self, *, route: str, reason: Reason) -> None:
        self.decision = self.decision.model_copy(update={"route": route, "reason": reason})

    @property
    def served(self) -> tuple[Source, Answer] | None:
        if self.remote is not None:
            return "remote", self.remote
        if self.local is not None and self.local.output is not None and self.decision.route == "local":
            return "local", self.local
        return None

    def record(self, task: str, error: str | None) -> Record:
        served = self.served
        return Record(
            request_id=self.id,
            task=task,
            at=self.at,
            input=self.input,
            decision=self.decision,
            version=self.version,
            local=self.local,
            remote=self.remote,
            served=None if served is None or error is not None else served[0],
            score=self.score,
            repeat=self.repeat,
            rival=self.rival,
            rival_confidence=self.rival_confidence,
            rival_version=self.canary.version.id if self.canary is not None and self.rival is not None else None,
            attempts=tuple(self.attempts),
            cost=sum(attempt.cost for attempt in self.attempts),
            latency=time.perf_counter() - self.started,
            # A request that failed and reached no model leaves its key free: it can be asked again.
            idempotency_key=None if error is not None and cost_nothing(self.attempts) else self.key,
            tags=self.tags,
            error=error or self.problem,
        )


def cost_nothing(attempts: Sequence[Attempt]) -> bool:
    """Whether it is certain that no model worked on any of them."""
    return all(attempt.outcome in ("not_sent", "rejected") for attempt in attempts)


def input_of[**P](task: str, fields: Collection[str], function: Callable[P, Any]) -> Callable[P, dict[str, Json]]:
    """What makes the input of a task out of the function's arguments. Raises ConfigError for a parameter that is no field."""
    signature = inspect.signature(function)
    for parameter in signature.parameters:
        if parameter not in fields:
            raise ConfigError(f"task {task!r} has no input field {parameter!r}", hint=f"fields: {', '.join(fields)}")

    def bound(*args: P.args, **kwargs: P.kwargs) -> dict[str, Json]:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        return dict(arguments.arguments)

    return bound


def validated(task: TaskConfig, answer: Answer) -> Answer:
    """The local answer, without its output if that does not fit the task's output schema: it is never served then."""
    if answer.output is None:
        return answer
    try:
        task.validate_output(answer.output)
    except InvalidAnswer as error:
        return answer.model_copy(update={"output": None, "problem": str(error)})
    return answer


async def answer_locally(task: TaskConfig, loaded: Loaded, request: Request) -> Answer:
    """The local model's answer, with the words that the placeholders stand for. Raises what the model raises."""
    answer = await loaded.model.answer(task.task, request.said)
    if request.veil:
        answer = answer.model_copy(update={"output": request.veil.show(answer.output)})
    return validated(task, answer)


async def answer_beside(task: TaskConfig, canary: Loaded, request: Request) -> Answer | None:
    """The canary's answer; whatever goes wrong with it is an answer of no use. None: the caller's deadline came first."""
    try:
        async with asyncio.timeout_at(request.deadline) as limit:
            return await answer_locally(task, canary, request)
    except Exception as error:  # noqa: BLE001  (the champion and the remote can answer)
        if isinstance(error, TimeoutError) and limit.expired():
            return None
        return Answer(problem=f"{type(error).__name__}: {error}")


async def compare(evaluator: Evaluator, local: Answer, remote: Answer) -> Score | None:
    """None for a local answer that cannot be served: it is no disagreement that anybody would have seen."""
    return await evaluator(local.output, remote.output) if local.output is not None else None


def result_again(record: Record, input: Json, veil: Veil) -> Result:
    """The Result of a request that was answered before under the same idempotency key. `veil`: of this input."""
    if record.input != veil.hide(input):
        raise IdempotencyConflict(f"the idempotency key {record.idempotency_key!r} was used before, with another input")
    if record.served is None:
        raise IdempotencyConflict(
            f"the request with the idempotency key {record.idempotency_key!r} failed: {record.error}"
        )
    result = result_of(record)
    return result.model_copy(update={"output": veil.show(result.output)}) if veil else result


def result_of(record: Record) -> Result:
    answer = record.remote if record.served == "remote" else record.local
    assert record.served is not None and answer is not None  # a request without an answer ended in an error
    return Result(
        output=answer.output,
        source=record.served,
        request_id=record.request_id,
        version=record.version if record.served == "local" else None,
        confidence=record.local.confidence if record.local is not None else None,
        cost=record.cost,
        decision=record.decision,
        at=record.at,
        usage=answer.usage,
    )
