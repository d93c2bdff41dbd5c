"""What every operation stands on: one Apprentice, one store, and how a request of a key is answered, once, and paid for."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

from pydantic import BaseModel
from starlette.responses import Response

from apprentice import budget
from apprentice.config import Budget, Config
from apprentice.engine import Apprentice, new_id
from apprentice.errors import ApprenticeError, BudgetExhausted, IdempotencyConflict
from apprentice.gateway import HEADER, Settings
from apprentice.gateway.allowance import Allowances
from apprentice.gateway.answers import CONFIDENCE, VERSION, Lines, lines_of
from apprentice.gateway.keys import Key, Keyring, Role
from apprentice.gateway.meters import Meters
from apprentice.gateway.once import Once
from apprentice.gateway.refusals import Family, Refusal, refusal_of
from apprentice.gateway.relay import NAME, Relay, Relays, Unfit
from apprentice.privacy import Veil, redactor, veil_for
from apprentice.request import cost_nothing
from apprentice.types import (
    Answer,
    Attempt,
    Decision,
    Json,
    Micros,
    Record,
    Result,
    Seconds,
    Store,
    Usage,
)

_NONE = Usage(input_tokens=0, output_tokens=0)
_RELAYED = Decision(route="remote", reason="no_local_model", p=0.0)
WORDS_A_MINUTE = 600  # of feedback that one key may give in one process: what people say, and not more


class Call(NamedTuple):
    """One request as an operation sees it. `idempotency` is what the client wrote; `capture`: whether it is recorded."""

    id: str
    key: Key
    path: Mapping[str, str] = {}
    body: Any = None
    tags: Mapping[str, str] = {}
    idempotency: str | None = None
    capture: bool = True
    headers: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that the gateway does. `role` None: no key is asked for; "any": a key of any role will do.

    `takes` is what the body has to be, `gives` what a 200 is (None: a text of the type `media`). `streams`: with `stream` in
    the body the answer is a stream of events.
    """

    method: Literal["GET", "POST"]
    path: str
    role: Role | Literal["any"] | None
    run: Callable[[Gateway, Call], Awaitable[Response]]
    summary: str
    takes: type[BaseModel] | None = None
    gives: type[BaseModel] | None = None
    family: Family = "native"
    media: str = "application/json"
    streams: bool = False
    examples: Callable[[Gateway], Json] | None = None  # of the body


class Answered(NamedTuple):
    """One answer, and the Record of it: at what moment, with how many tokens."""

    output: Json
    request_id: str
    at: Seconds
    usage: Usage
    lines: Lines
    result: Result | None = None


class Pace:
    """How much of a minute's allowance each key has left, filled up evenly."""

    def __init__(self, a_minute: int) -> None:
        self._most = float(a_minute)
        self._left: dict[str, tuple[float, Seconds]] = {}

    def take(self, key: str, now: Seconds) -> bool:
        """Whether the key may do it once more at that moment."""
        left, at = self._left.get(key, (self._most, now))
        left = min(self._most, left + (now - at) * self._most / 60)
        self._left[key] = (left - 1 if left >= 1 else left, now)
        return left >= 1


class Gateway:
    """The engine and the store behind the operations. One a process."""

    def __init__(
        self,
        config: Config,
        settings: Settings,
        app: Apprentice,
        store: Store,
        *,
        clock: Callable[[], Seconds] = time.time,
    ) -> None:
        self.config = config
        self.settings = settings
        self.app = app
        self.store = store
        self.keyring = Keyring(store)
        self.relays = Relays(config, store)
        self.allowances = Allowances(config, store)
        self.meters = Meters()
        self.pace = Pace(WORDS_A_MINUTE)
        self.started_at = time.time()
        self.ready = False
        self._clock = clock
        self._redactor = redactor(config)  # of what is relayed; tasks have theirs in the engine
        owner = f"gateway {socket.gethostname()}:{os.getpid()}:{new_id()[-8:]}"
        self._once = Once(store, owner, settings.timeout + settings.grace, clock)

    async def answer(self, call: Call, task: str, input: Json, *, param: str, name: str | None = None) -> Answered:
        """The task's answer to the input, of which the client wrote as `param`. Raises Refusal.

        `name` tells inputs of one call apart where it has several.
        """
        if not call.capture and (call.idempotency is not None or call.key.limits):
            message = "a request with an idempotency key, or of a key with limits, has to be recorded"
            raise Refusal(400, "capture_needed", message, param=f"{HEADER}capture")
        try:
            if call.idempotency is None and not call.key.limits:
                result = await self._ask(call, task, input, None)
            else:
                result = await self._ask_once(call, task, input, name or "")
        except ApprenticeError as error:
            raise self.refusal(error, task, param=param) from error
        return Answered(result.output, result.request_id, result.at, result.usage or _NONE, _lines(result), result)

    async def _ask(self, call: Call, task: str, input: Json, key: str | None) -> Result:
        return await self.app.arun(
            task,
            input,
            idempotency_key=key,
            deadline=self.settings.timeout,
            tags=dict(call.tags),
            capture=call.capture,
        )

    async def _ask_once(self, call: Call, task: str, input: Json, name: str) -> Result:
        """The same within the limits of the API key, and once for each idempotency key."""
        asked = None if call.idempotency is None else f"{call.key.id}/{name}/{call.idempotency}"
        configured = self.config.task(task)
        configured.validate_input(input)
        async with self._once.turn(task, asked) as (key, before):
            worst = 0 if before or not call.key.limits else self.allowances.worst(configured, input)
            if before is None and call.key.limits and key is None:
                key = f"{call.key.id}//{new_id()}"  # by which the Record is found when there is no Result
            try:
                async with self.allowances.held(call.key, worst) as bill:
                    try:
                        return await self._ask(call, task, input, key)
                    finally:
                        if call.key.limits and key is not None:
                            bill.cost = 0 if before else await asyncio.shield(self._cost(task, key))
            except IdempotencyConflict as error:
                raise await self._conflict(task, key, input, error) from error

    async def relay(self, call: Call, to: Relay, body: dict[str, Json]) -> Answered:
        """The model's own answer to the client's body. Raises Refusal."""
        asked = None if call.idempotency is None else f"{call.key.id}//{call.idempotency}"
        if asked is not None and not call.capture:
            raise Refusal(
                400, "capture_needed", "an answer that is not recorded cannot be repeated", param="idempotency-key"
            )
        before = None
        try:
            veil = await veil_for(self._redactor, body)
            if asked is None:
                record = await self._relayed(call, to, body, None, veil)
            else:
                async with self._once.turn(NAME, asked, share=False) as (key, before):
                    hidden = veil.hide(body)  # as it was kept the first time
                    record = before or await self._relayed(call, to, body, key, veil)
        except ApprenticeError as error:
            raise self.refusal(error, NAME, param=None) from error
        if record.remote is None:
            raise Refusal(409, "idempotency_conflict", f"the first request with this key failed: {record.error}")
        if before is not None and before.input != hidden:
            raise _reused()
        output, usage = veil.show(record.remote.output), record.remote.usage or _NONE
        return Answered(output, record.request_id, record.at, usage, lines_of(record, "remote"))

    async def _relayed(self, call: Call, to: Relay, body: dict[str, Json], key: str | None, veil: Veil) -> Record:
        at, started, attempts = self._clock(), time.perf_counter(), list[Attempt]()

        def record(answer: Answer | None, problem: str | None = None) -> Record:
            return Record(
                request_id=call.id,
                task=NAME,
                at=at,
                input=body,
                decision=_RELAYED,
                remote=answer,
                served=None if answer is None else "remote",
                attempts=tuple(attempts),
                cost=sum(attempt.cost for attempt in attempts),
                latency=time.perf_counter() - started,
                idempotency_key=None if problem is not None and cost_nothing(attempts) else key,
                tags=dict(call.tags),
                error=problem,
            )

        try:
            answer = await self._paid(call, to, body, attempts)
        except (asyncio.CancelledError, Exception) as error:
            if attempts:  # what was paid for is recorded, also when nobody waits for it any more
                failed = record(None, f"{type(error).__name__}: {error}")
                await asyncio.shield(self._written(veil.kept(failed) if call.capture else None, to, attempts))
            raise
        made = record(answer)
        await self._written(veil.kept(made) if call.capture else None, to, attempts)
        return made

    async def _paid(self, call: Call, to: Relay, body: dict[str, Json], attempts: list[Attempt]) -> Answer:
        """The answer, within the limits of the API key."""
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        if not call.key.limits:
            return await to.ask(body, deadline=deadline, attempts=attempts)
        async with self.allowances.held(call.key, to.worst(body)) as bill:
            try:
                return await to.ask(body, deadline=deadline, attempts=attempts)
            finally:
                bill.cost = sum(attempt.cost for attempt in attempts)

    async def _written(self, record: Record | None, to: Relay, attempts: list[Attempt]) -> None:
        try:
            if record is not None:
                await self.store.append(record)
        finally:
            await to.settled(attempts)

    def refusal(self, error: ApprenticeError, task: str, *, param: str | None) -> Refusal:
        """What the client is told."""
        if isinstance(error, Unfit):
            return Refusal(400, "rejected_by_provider", str(error))
        window = self._new_money(task) if isinstance(error, BudgetExhausted) else None
        return refusal_of(error, param=param, window=window)

    def _new_money(self, task: str) -> Seconds | None:
        """Seconds until the first of the capped windows is over; None where no cap has an end."""
        zone, now = ZoneInfo(self.config.budget.timezone), time.time()
        own = next((one.budget for one in self.config.tasks if one.name == task), None) or Budget()
        caps = budget.caps(task, now, zone, overall=self.config.budget.limits, own=own.limits)
        ends = [budget.left(cap.window, now, zone) for cap in caps]
        return min((end for end in ends if end < float("inf")), default=None)

    async def _cost(self, task: str, key: str) -> Micros:
        """What the Record with this key did cost; nothing where there is none, because then nothing was sent."""
        record = await self.store.record_by_key(task, key)
        return 0 if record is None else record.cost

    async def _conflict(self, task: str, key: str | None, input: Json, error: IdempotencyConflict) -> Exception:
        before = None if key is None else await self.store.record_by_key(task, key)
        return _reused() if before is not None and before.input != input else error

    async def open(self) -> None:
        """Everything that needs the event loop. Raises ConfigError, StoreError."""
        await self.relays.open()
        self.ready = True

    async def close(self) -> None:
        self.ready = False
        await self.relays.close()
        await self.allowances.close()
        await self.store.close()


def _lines(result: Result) -> Lines:
    found = lines_of(result, result.source)
    if result.version is not None:
        found.append((VERSION, result.version.encode("latin-1")))
    if result.confidence is not None:
        found.append((CONFIDENCE, b"%.6f" % result.confidence))
    return found


def _reused() -> Refusal:
    message = "the idempotency key was used before, with another body"
    return Refusal(422, "idempotency_key_reused", message, param="idempotency-key", hint="use a fresh key")
