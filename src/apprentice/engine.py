"""`Apprentice.run` / `arun`: who answers, in the order of the design, and the only I/O of the request path.

    1 validate the input        4 ask the local model, which may defer
    2 read the live state       5 ask the remote: reserve, send, settle
    3 decide                    6 compare the pair    7 write the Record, then answer

The live state of a task is a fold over its Records in the order of the store, so that every process that shares the store
arrives at the same state, and a restart arrives at the state it left.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Literal, Self
from zoneinfo import ZoneInfo

from apprentice import agreement, confidence, decide, feedback, launch, lineage, observer, plugins, probe, promotion
from apprentice.bridge import Bridge
from apprentice.calls import Calls, answered_by
from apprentice.config import Config, TaskConfig, check_learnable, load, missing
from apprentice.erasure import erase, expire
from apprentice.errors import (
    ApprenticeError,
    BudgetError,
    ConfigError,
    DeadlineExceeded,
    IdempotencyConflict,
    InvalidRequest,
    ModelError,
    StoreError,
)
from apprentice.follow import Follower
from apprentice.live import Live
from apprentice.observer import Asked, Purpose, Told
from apprentice.privacy import Veil, redactor, veil_for
from apprentice.request import Request, answer_beside, answer_locally, compare, input_of, result_again, result_of
from apprentice.shelf import Loaded, Shelf
from apprentice.shelf import load as load_local
from apprentice.types import (
    Answer,
    Confidence,
    Correction,
    Decision,
    Evaluator,
    Event,
    Forgotten,
    Json,
    Record,
    Result,
    Score,
    Seconds,
    Store,
    Version,
)

_FORESEE_EVERY = 100  # Records between two looks whether the caps can pay for the contract


class Apprentice:
    """One call, `run(task, input)`; behind it the remote, the local model and everything that chooses between them.

    Usable as it is from synchronous code (`run` works inside a running event loop and in a notebook, too), as a context
    manager, or as an async context manager, which saves the hop between threads that `arun` otherwise makes.

    `seed` makes the sampling reproducible; leave it out in production. Raises ConfigError.
    """

    def __init__(
        self,
        config: Config | str | os.PathLike[str],
        *,
        seed: int | None = None,
        clock: Callable[[], Seconds] = time.time,
    ) -> None:
        self.config = config if isinstance(config, Config) else load(Path(config))
        self._clock = clock
        self._dice = Random(seed)  # noqa: S311  (sampling, not secrecy)
        self._observer = observer.of(self.config.telemetry)
        self._bridge = Bridge()
        self._opened = False
        self._closed = False
        self._tasks: dict[str, Live] = {}
        self._store: Store
        self._calls: Calls
        self._follower: Follower
        self._open_lock = asyncio.Lock()  # one opens or closes
        self._busy = 0  # requests in flight
        self._quiet = asyncio.Event()
        self._quiet.set()

    # --- the call -----------------------------------------------------------------------------------------------------

    async def arun(
        self,
        task: str,
        input: Json,
        *,
        idempotency_key: str | None = None,
        deadline: Seconds | None = None,
        tags: dict[str, str] | None = None,
        capture: bool = True,
    ) -> Result:
        """The answer to one request, durable in the store before it is returned.

        `deadline` is in seconds from now. The same `idempotency_key` with the same input gives the same Result and costs
        nothing. Raises UnknownTask, InvalidInput, IdempotencyConflict before anything is spent; BudgetError, ModelError,
        DeadlineExceeded when nobody could answer; StoreError when the request could not be recorded. `capture=False` keeps
        no word of the input and the answers: the Record has the decision, the scores and the cost, so that the contract
        counts it, and it neither trains nor can be corrected or repeated (InvalidRequest with an `idempotency_key`).
        """
        return await self._bridge.here(
            self._run(task, input, idempotency_key=idempotency_key, deadline=deadline, tags=tags or {}, capture=capture)
        )

    def run(
        self,
        task: str,
        input: Json,
        *,
        idempotency_key: str | None = None,
        deadline: Seconds | None = None,
        tags: dict[str, str] | None = None,
    ) -> Result:
        """The same as `arun`, for synchronous code. `tags` are kept with the Record; `subject` is whom it is about."""
        return self._bridge.wait(
            self._run(task, input, idempotency_key=idempotency_key, deadline=deadline, tags=tags or {})
        )

    def task[**P](self, name: str) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
        """Decorate a function so that calling it runs the task with its arguments as the input and returns the output.

        The function's parameters are the fields of the task's input; its body is not executed. An `async def` gives a
        coroutine. Raises ConfigError when the parameters do not fit the task's input schema.
        """
        fields = self.config.task(name).task.input_schema.get("properties", {})

        def decorate(function: Callable[P, Any]) -> Callable[P, Any]:
            bound = input_of(name, fields, function)
            if inspect.iscoroutinefunction(function):

                @wraps(function)
                async def asynchronous(*args: P.args, **kwargs: P.kwargs) -> Json:
                    return (await self.arun(name, bound(*args, **kwargs))).output

                return asynchronous

            @wraps(function)
            def synchronous(*args: P.args, **kwargs: P.kwargs) -> Json:
                return self.run(name, bound(*args, **kwargs)).output

            return synchronous

        return decorate

    async def confidence(self, task: str) -> Confidence:
        """The state of one task's quality estimate, bounds included."""

        async def read() -> Confidence:
            live = await self._live(task)
            return live.with_canary(agreement.summary(live.state, live.settings))

        return await self._bridge.here(read())

    async def mode(self, task: str, mode: Literal["remote", "auto"], *, seconds: Seconds | None = None) -> None:
        """Let the remote alone answer the task from now on, for so many seconds or until "auto".

        Durable, and shared: this process follows at once, every other one on the store from its second request on (its
        first one brings the news). Nothing is compared meanwhile, so a long spell ends with the quality unverified.
        Raises UnknownTask; ConfigError for seconds that are no time to come, or given with "auto".
        """

        async def change() -> None:
            await self._live(task)
            await lineage.set_mode(self._store, task, mode, at=self._clock(), seconds=seconds)
            await self._follower.catch_up()

        await self._bridge.here(change())

    async def afeedback(
        self, request_id: str, *, corrected: Json = None, withdrawn: bool = False, by: str = "", comment: str = ""
    ) -> Correction:
        """What a person says about a request: the right output, or (without one) that what was served is right.

        It is gold: it outweighs every model's label from the next teaching cycle on. `withdrawn` takes it back. Raises
        UnknownRequest, InvalidInput that names the field of `corrected`, InvalidRequest.
        """

        async def say() -> Correction:
            await self._open()
            action: Literal["corrected", "approved", "withdrawn"] = "approved" if corrected is None else "corrected"
            said = await feedback.give(
                self.config,
                self._store,
                request_id,
                "withdrawn" if withdrawn else action,
                at=self._clock(),
                target=corrected,
                by=by,
                comment=comment,
            )
            live = self._tasks[said.task]
            known = await feedback.known(self._store, said.task)
            live.tried_at -= max(live.labels - known, 0)  # what was erased since is in neither number
            live.labels = known
            self._maybe_learn(live)
            return said

        return await self._bridge.here(say())

    def feedback(
        self, request_id: str, *, corrected: Json = None, withdrawn: bool = False, by: str = "", comment: str = ""
    ) -> Correction:
        """The same as `afeedback`, for synchronous code."""
        return self._bridge.wait(
            self.afeedback(request_id, corrected=corrected, withdrawn=withdrawn, by=by, comment=comment)
        )

    async def aerase(self, subject: str, *, task: str | None = None, dry_run: bool = False) -> list[Forgotten]:
        """What was erased, by task: all words of the requests that were tagged with this `subject`, of one task or of all.

        Requests of the subject that are under way are kept without words; later ones are new. The versions that may have
        learned from it are marked. With `dry_run` nothing is changed. Raises UnknownTask, StoreError.
        """

        async def forget() -> list[Forgotten]:
            await self._open()
            return await erase(self.config, self._store, subject, at=self._clock(), task=task, dry_run=dry_run)

        return await self._bridge.here(forget())

    def erase(self, subject: str, *, task: str | None = None, dry_run: bool = False) -> list[Forgotten]:
        """The same as `aerase`, for synchronous code."""
        return self._bridge.wait(self.aerase(subject, task=task, dry_run=dry_run))

    async def aversions(self, task: str) -> list[Version]:
        """The task's versions in the order in which they were made; `state` says what became of each."""

        await self._bridge.here(self._live(task))
        return await self._bridge.here(self._store.versions(task))

    def versions(self, task: str) -> list[Version]:
        """The same as `aversions`, for synchronous code."""
        return self._bridge.wait(self.aversions(task))

    async def apromote(self, task: str, version: str, *, by: str = "", why: str = "") -> Version:
        """Serve this version from the next request on, whatever speaks against it; `by` and `why` are kept.

        Its certificate starts anew, at the level in force. Raises UnknownTask; ConfigError for a version that does not
        exist or can no longer be loaded.
        """
        return await self._bridge.here(self._change(task, lineage.change, version, by=by, why=why))

    def promote(self, task: str, version: str, *, by: str = "", why: str = "") -> Version:
        """The same as `apromote`, for synchronous code."""
        return self._bridge.wait(self.apromote(task, version, by=by, why=why))

    async def arollback(self, task: str, version: str | None = None, *, by: str = "", why: str = "") -> Version:
        """Serve a version again that served before; without one, the champion's predecessor. Raises what `apromote` does."""
        return await self._bridge.here(self._change(task, lineage.rollback, version, by=by, why=why))

    def rollback(self, task: str, version: str | None = None, *, by: str = "", why: str = "") -> Version:
        """The same as `arollback`, for synchronous code."""
        return self._bridge.wait(self.arollback(task, version, by=by, why=why))

    async def _change(
        self, task: str, how: Callable[..., Awaitable[Version]], version: str | None, **who: str
    ) -> Version:
        await self._live(task)
        made = await how(self.config, self._store, task, version, at=self._clock(), **who)
        await self._follower.catch_up()
        return made

    async def local_state(self, task: str) -> str:
        """Where the task's local model is in its life, in words: "ready", "still loading, 40 %", "failed: …"."""

        async def read() -> str:
            return (await self._live(task)).shelf.state()

        return await self._bridge.here(read())

    async def idle(self) -> None:
        """Return when nothing that this process started in the background is running: no teaching cycle, no probe."""

        async def wait() -> None:
            while running := [some for live in self._tasks.values() for some in (live.cycle, live.look) if some]:
                await asyncio.wait(running)

        await self._bridge.here(wait())

    # --- opening and closing ------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._bridge.adopt(asyncio.get_running_loop())
        await self._bridge.here(self._open())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        self._bridge.wait(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """Wait for the requests in flight, then close; a teaching cycle that runs in the background goes on."""
        await self._bridge.here(self._close())
        self._bridge.stop()

    def close(self) -> None:
        """The same as `aclose`, for synchronous code."""
        self._bridge.wait(self._close())
        self._bridge.stop()

    async def _open(self) -> None:
        """Open the store, build the remotes, and bring every task up to date. Raises ConfigError, StoreError."""
        async with self._open_lock:
            if self._closed:
                raise ApprenticeError("this Apprentice is closed", hint="make a new one")
            if self._opened:
                return
            if problems := missing(self.config):
                raise ConfigError("cannot serve: " + "; ".join(problems))
            check_learnable(self.config)
            evaluators = {task.name: self._evaluator(task) for task in self.config.tasks}
            async with contextlib.AsyncExitStack() as opening:
                self._store = plugins.build("stores", self.config.store.backend, path=self.config.store.path)
                opening.push_async_callback(self._store.close)
                self._calls = Calls(self.config, self._store, clock=self._clock, new_id=new_id, dice=self._dice)
                opening.push_async_callback(self._calls.close)
                await self._calls.open()
                self._tasks = {
                    task.name: await self._restore(task, evaluators[task.name]) for task in self.config.tasks
                }
                self._follower = Follower(self._tasks, self._store, self._clock)
                await self._follower.catch_up()
                for name, live in self._tasks.items():
                    live.labels = await feedback.known(self._store, name)
                opening.pop_all()
            self._opened = True

    async def _restore(self, task: TaskConfig, evaluator: Evaluator) -> Live:
        settings = confidence.settings(task.confidence_thresholds, task.sampling or self.config.sampling)
        probes = probe.Probes(self.config, task, evaluator, self._store, self._calls, clock=self._clock, new_id=new_id)
        shelf = Shelf(lambda version: load_local(task.local or self.config.local, version.path))
        live = Live(task, shelf, settings, evaluator, probes, redactor(self.config, task))
        if (saved := await self._store.load_state(task.name)) is not None:
            with contextlib.suppress(ValueError):  # of another format: it is built again from the Records
                live.state, live.seq = confidence.State.from_json(saved[1]), saved[0]
        live.ramp = await lineage.ramp(self._store, task.name, until=live.seq)
        versions = await self._store.versions(task.name)
        live.know(versions)
        live.stand()
        ended = [version for version in versions if version.state != "candidate"]  # see learn.due
        live.tried_at = max((version.metrics.get("labels", 0) for version in ended), default=0)
        live.taught_at = max((version.created_at for version in versions), default=None)
        return live

    def _evaluator(self, task: TaskConfig) -> Evaluator:
        name, settings = task.evaluator_settings
        built: Evaluator = plugins.build("evaluators", name, **settings)
        return built

    async def _close(self) -> None:
        async with self._open_lock:
            if self._closed or not self._opened:
                self._closed = True
                return
            self._closed = True  # from here on nobody new comes in
            await self._quiet.wait()
            try:
                for live in self._tasks.values():
                    if live.cycle is not None:
                        live.cycle.cancel()  # ends the waiting, not the worker
                    if live.look is not None:
                        live.look.cancel()
                        await asyncio.wait([live.look])  # what it has sent is settled first
                    await live.shelf.close()
                    await self._follower.save(live)
            finally:
                await self._calls.close()
                await self._store.close()

    async def _live(self, name: str) -> Live:
        live = self._tasks.get(name)
        if live is None or not self._opened or self._closed:
            self.config.task(name)  # UnknownTask, with the nearest names
            await self._open()
            live = self._tasks[name]
        return live

    # --- one request --------------------------------------------------------------------------------------------------

    async def _run(
        self,
        name: str,
        input: Json,
        *,
        idempotency_key: str | None,
        deadline: Seconds | None,
        tags: dict[str, str],
        capture: bool = True,
    ) -> Result:
        if not capture and idempotency_key is not None:
            raise InvalidRequest("an answer that is not kept cannot be repeated", hint="leave out one of the two")
        self.config.task(name).validate_input(input)
        until = None if deadline is None else asyncio.get_running_loop().time() + deadline
        live = await self._live(name)
        self._busy += 1
        self._quiet.clear()
        try:
            with self._observer.request(live.config):
                veil = await veil_for(live.redactor, input)
                if idempotency_key is None:
                    return await self._answer(live, input, None, until, tags, veil, capture)
                return await self._answer_once(live, input, idempotency_key, until, tags, veil)
        finally:
            self._busy -= 1
            if self._busy == 0:
                self._quiet.set()

    async def _answer_once(
        self, live: Live, input: Json, key: str, deadline: float | None, tags: dict[str, str], veil: Veil
    ) -> Result:
        """The answer to the first request with this key; whoever comes meanwhile waits for it."""
        loop = asyncio.get_running_loop()
        while (running := live.in_flight.get(key)) is not None:
            # Whatever it ends in, the store knows it then.
            await asyncio.wait([running], timeout=None if deadline is None else deadline - loop.time())
            if not running.done():
                raise DeadlineExceeded(f"the first request with the idempotency key {key!r} is not answered yet")
        live.in_flight[key] = done = loop.create_future()
        try:
            if (before := await self._store.record_by_key(live.config.name, key)) is not None:
                self._observer.recorded(before, again=True)
                return result_again(before, input, veil)
            return await self._answer(live, input, key, deadline, tags, veil)
        finally:
            del live.in_flight[key]
            done.cancel()

    async def _answer(
        self,
        live: Live,
        input: Json,
        key: str | None,
        deadline: float | None,
        tags: dict[str, str],
        veil: Veil,
        capture: bool = True,
    ) -> Result:
        at = self._clock()
        decision, loaded, canary = self._decide(live, at)
        request = Request(
            id=new_id(),
            at=at,
            started=time.perf_counter(),
            input=input,
            key=key,
            tags=tags,
            deadline=deadline,
            model=loaded,
            version=loaded.version.id if loaded is not None else None,
            decision=decision,
            canary=canary,
            capture=capture,
            veil=veil,
        )
        try:
            await (self._ask_both(live, request) if canary is None else self._ask_three(live, request, canary))
        except (asyncio.CancelledError, Exception) as error:
            gone = isinstance(error, asyncio.CancelledError)
            said = "cancelled by the caller" if gone else f"{type(error).__name__}: {error}"
            # What was paid for is recorded, also when nobody waits for it any more.
            await asyncio.shield(self._write(live, request, error=said))
            raise
        finally:
            for borrowed in (loaded, canary):
                if borrowed is not None:
                    live.shelf.give_back(borrowed)
        record = await self._write(live, request)
        if key is not None and record.idempotency_key is None:
            before = await self._store.record_by_key(live.config.name, key)
            return result_of(record) if before is None else result_again(before, input, veil)
        return result_of(record)

    def _decide(self, live: Live, at: Seconds) -> tuple[Decision, Loaded | None, Loaded | None]:
        """Who answers; the local model that it was decided with; and the canary, where it answers the same audit."""
        loaded = live.shelf.borrow()
        decision = decide.decide(
            live.standing,
            has_local=loaded is not None,
            forced_remote=live.mode is not None and live.mode.forces_remote(at),
            coin=self._dice.random(),
        )
        canary = live.shelf.borrow_beside() if live.standing.canary is not None and loaded is not None else None
        if canary is None or loaded is None:
            return decision, loaded, None
        decision = decide.try_out(decision, live.standing, coin=self._dice.random())
        if decision.audit:
            return decision, loaded, canary
        served, spare = (canary, loaded) if decision.reason == "canary" else (loaded, canary)
        live.shelf.give_back(spare)
        return decision, served, None

    async def _ask_three(self, live: Live, request: Request, canary: Loaded) -> None:
        beside = asyncio.create_task(self._ask_rival(live, request, canary))
        try:
            await self._ask_both(live, request)
            if request.local is not None and request.remote is not None and request.problem is None:
                await self._compare_rival(live, request, await beside, request.remote)
        finally:
            beside.cancel()
            await asyncio.wait([beside])

    async def _ask_rival(self, live: Live, request: Request, canary: Loaded) -> Answer | None:
        with self._observed(live, canary, "canary") as told:
            answer = await answer_beside(live.config, canary, request)
            told(answer or Answer(), 0, answer is not None and answer.output is not None)
        return answer

    async def _compare_rival(self, live: Live, request: Request, rival: Answer | None, remote: Answer) -> None:
        if rival is not None:
            try:
                request.rival = await compare(live.evaluator, rival, remote) or Score(value=0.0)
                request.rival_confidence = rival.confidence
            except Exception as error:  # noqa: BLE001  (the answer is there and paid for)
                self._not_compared(live, request, error)

    async def _ask_both(self, live: Live, request: Request) -> None:
        if request.decision.route != "remote":
            await self._ask_local(live, request)
        if request.decision.route != "local":
            try:
                await self._ask_remote(live, request)
            except BudgetError:
                if not self._may_serve_locally(live, request):
                    raise
                request.change(route="local", reason="budget")
            except ModelError:
                # An audit that failed is a missing label, and its local answer was sure enough to be served alone.
                # A deferred request is not: its local answer is below the certified level, so the error goes to the caller.
                if request.decision.reason != "audit" or not request.sure:
                    raise
                request.change(route="local", reason="remote_failed")
        if request.local is not None and request.remote is not None:
            try:
                request.score = await compare(live.evaluator, request.local, request.remote)
            except Exception as error:  # noqa: BLE001  (the answer is there and paid for)
                self._not_compared(live, request, error)

    async def _ask_remote(self, live: Live, request: Request) -> None:
        """The remote's answer; for a share of the audits, drawn by a coin of its own, it is asked twice at the same moment."""
        share = (live.config.sampling or self.config.sampling).repeat_share if request.decision.audit else 0.0
        if share <= 0 or self._dice.random() >= share:
            request.remote = await self._asked(live, request, "serve")
            return
        again = asyncio.create_task(self._ask_again(live, request))
        try:
            request.remote = await self._asked(live, request, "serve")
            second = await again
        finally:
            if not again.done():
                again.cancel()
                await asyncio.wait([again])  # what it cost is recorded with the request
        same = answered_by(request.attempts, "serve") == answered_by(request.attempts, "repeat")
        if second is not None and same:  # of another remote it says nothing
            try:
                request.repeat = await live.evaluator(second.output, request.remote.output)
            except Exception as error:  # noqa: BLE001  (the answer is there and paid for)
                self._not_compared(live, request, error)

    def _asked(self, live: Live, request: Request, purpose: Literal["serve", "repeat"]) -> Awaitable[Answer]:
        return self._calls.ask(
            live.config,
            request.input,
            purpose=purpose,
            deadline=request.deadline,
            attempts=request.attempts,
            for_audits=purpose == "serve" and request.decision.reason == "deferred",
            later=True,  # settled in the same group of writes as the Record, see _write
        )

    async def _ask_again(self, live: Live, request: Request) -> Answer | None:
        """A second answer, only to be compared with the first; a call that fails is a missing label."""
        with contextlib.suppress(ApprenticeError):
            return await self._asked(live, request, "repeat")
        return None

    def _not_compared(self, live: Live, request: Request, error: Exception) -> None:
        request.problem = f"not compared: {type(error).__name__}: {error}"
        # Not what the evaluator says: it may repeat the answers, and events are kept and told. The Record has it.
        live.report("EVALUATION_FAILED", request.at, request.version, f"not compared: {type(error).__name__}")

    async def _ask_local(self, live: Live, request: Request) -> None:
        assert request.model is not None  # decide() routes to the local model only where there is one
        try:
            with self._observed(live, request.model, "local") as told:
                async with asyncio.timeout_at(request.deadline) as limit:
                    answer = await answer_locally(live.config, request.model, request)
                told(answer, 0, answer.output is not None)
        except Exception as error:  # whatever else it is, the remote can answer
            if isinstance(error, TimeoutError) and limit.expired():
                raise DeadlineExceeded("the local model did not answer before the deadline") from error
            request.problem = f"local: {type(error).__name__}: {error}"
            request.change(route="remote", reason="local_failed")
            return
        request.local = answer
        request.decision = decide.defer(
            request.decision, request.local.confidence, valid=request.local.output is not None
        )

    def _observed(self, live: Live, loaded: Loaded, who: Purpose) -> contextlib.AbstractContextManager[Told]:
        name, backend = live.config.name, (live.config.local or self.config.local).backend
        return self._observer.call(Asked(name, who, backend, f"{name}/{loaded.version.id}"))

    def _may_serve_locally(self, live: Live, request: Request) -> bool:
        """Whether a request may be answered locally because the money is out: only where local answers are being served
        at all, and only if the operator did not ask for refusal."""
        serving = request.decision.phase == "steady" and request.local is not None and request.local.output is not None
        return serving and self._calls.purse.budget.on_exhausted == "degrade"

    async def _write(self, live: Live, request: Request, *, error: str | None = None) -> Record:
        record = request.record(live.config.name, error)
        kept = request.veil.kept(record)
        told = kept if request.capture else kept.without_words()
        self._observer.recorded(told)
        try:
            seq = await self._store.append(told)
        except IdempotencyConflict:
            # Another process answered this key meanwhile. Its answer counts; what ours cost is recorded without the key.
            record = record.model_copy(update={"idempotency_key": None})
            seq = await self._store.append(told.model_copy(update={"idempotency_key": None}))
        finally:
            await self._calls.settled(request.attempts)
        await self._follower.reach(live, seq)
        live.written += 1
        self._maybe_learn(live)
        self._maybe_look(live)
        return record

    # --- teaching, in a process of its own ----------------------------------------------------------------------------

    def _maybe_learn(self, live: Live) -> None:
        """Start a teaching cycle in the background when enough was learned about the task since the last one."""
        local = live.config.local or self.config.local
        if live.cycle is not None or self._closed or local.learn != "background" or local.fine_tune_backend is None:
            return
        new, batch = live.labels - live.tried_at, local.fine_tune_batch_size
        if new <= 0:
            return
        first = live.config.confidence_thresholds.phase1_to_phase2
        outgrown = promotion.outgrown(live.labels, live.tried_at, lineage.examples_of(live.champion))
        waits = live.canary is not None and not live.urgent and not outgrown  # for its verdict, see learn.due
        now, zone = self._clock(), ZoneInfo(self.config.budget.timezone)
        planned = decide.scheduled(local.schedule, live.taught_at, now, zone)
        trying = live.canary is not None and outgrown
        if not waits and (
            trying or planned or decide.needs_training(new, live.tried_at, batch, first, urgent=live.urgent)
        ):
            live.tried_at, live.taught_at = live.labels, now
            live.cycle = asyncio.create_task(self._teach(live))

    async def _teach(self, live: Live) -> None:
        try:
            code, said = await launch.teach(self.config, live.config.name)
            if code != 0 and not self._closed:
                await self._store.add_event(
                    Event(
                        name="TRAINING_FAILED",
                        task=live.config.name,
                        at=self._clock(),
                        message=f"the worker ended with code {code}; serving goes on as before",
                        evidence={"code": code, "said": said[-2000:]},
                    )
                )
            await self._follower.catch_up()
        finally:
            live.cycle = None

    # --- what is looked at now and then, in the background ------------------------------------------------------------

    def _maybe_look(self, live: Live) -> None:
        """Start a look when it is time for one: can the caps pay for the contract, is the remote still the same?"""
        if live.look is None and not self._closed and (live.written >= _FORESEE_EVERY or self._may_probe(live)):
            live.look = asyncio.create_task(self._look(live))

    def _may_probe(self, live: Live) -> bool:
        forced = live.mode is not None and live.mode.forces_remote(self._clock())
        return not forced and live.probes.due(live.labels)

    async def _look(self, live: Live) -> None:
        try:
            if live.written >= _FORESEE_EVERY:
                live.written = 0
                level = None if live.standing.phase == "cold_start" else live.standing.level
                await self._calls.look(live.config, gap=live.state.gap, level=level)
                await expire(self.config, self._store, now=self._clock())
            if self._may_probe(live):
                lower = agreement.summary(live.state, live.settings).detail.get("repeat_lower")
                await live.probes.round(probe.allowed(sum(live.state.repeats_low), lower))
            name = live.config.name
            live.urgent = decide.is_urgent(
                await self._store.versions(name), await self._store.events(name, names=sorted(decide.URGENT))
            )
        except StoreError:
            pass  # a store that fails is said to the requests, which need it, too; the next look tries again
        finally:
            live.look = None


def new_id() -> str:
    """A fresh id for a request or an attempt: 32 hex digits, of which the first twelve are the milliseconds since 1970.

    Those that are made one after the other lie beside each other in an index, which is much less to write than all over it
    (as in UUIDs of version 7, RFC 9562); 80 bits are chance.
    """
    try:
        chance = _chance.pop()
    except IndexError:
        drawn = os.urandom(10 * 512).hex()
        _chance.extend(drawn[at : at + 20] for at in range(20, len(drawn), 20))
        chance = drawn[:20]
    return f"{time.time_ns() // 1_000_000:012x}{chance}"


_chance: deque[str] = deque()  # drawn for many ids at once: each draw gives the interpreter away
os.register_at_fork(after_in_child=_chance.clear)
