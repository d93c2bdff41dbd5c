"""Work that can wait: a file of inputs is answered in batches of the main remote's provider, at a part of the price.

A batch outlives the process that sent it. Its row in the store says how far it has come, each step is one durable write,
and every step may be done again: whoever looks next, the same process or another one, goes on where the last one stopped.

    prepared   its row is kept, then its money is held; then, with a mark before a byte leaves, it is sent
    submitted  the provider's id is known; its results are looked for, and become Records with the ids of the requests
    ended      the Records are kept and their sum is known: the hold is settled with it, and the batch is closed
    failed     it never became one, or nobody can find out: the hold is released, or counts as spent

A creation that nobody heard of again is looked for at the provider before it is made once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apprentice import budget, privacy, promotion
from apprentice.calls import Provider
from apprentice.config import Config, TaskConfig
from apprentice.engine import new_id
from apprentice.errors import (
    BudgetError,
    ConfigError,
    InvalidInput,
    InvalidRequest,
    ModelError,
    StoreError,
    UnknownTask,
)
from apprentice.models import BatchModel, Limits, Sought
from apprentice.purse import Purse, suspended_models
from apprentice.report import mean_cost
from apprentice.request import validated
from apprentice.types import (
    Answer,
    Attempt,
    Batch,
    Decision,
    Event,
    Hold,
    Json,
    Lease,
    Micros,
    Record,
    Seconds,
    Store,
    Usage,
)

_MOST = 10_000  # requests in one batch: beyond that a row of the store and a hold become unwieldy
_ENVELOPE = 512  # bytes around each request in a batch, at most
_LEASE: Seconds = 20.0  # renewed every fourth of it; a process that dies is replaced after this long
_SHOWS: Seconds = 60.0  # after so long a batch that was created shows in the provider's list
_GIVEN_UP: Seconds = 29 * 86_400.0  # batches end within a day or two, and results are kept for about a month
_PAGE = 1_000  # Records read at a time
_TOLD = 5  # lines of a file whose faults are named


class Plan(NamedTuple):
    """What a file of inputs comes to: the batches to be sent, and how many inputs need not be."""

    task: str
    batches: list[Batch]
    answered: int  # by a Record of the task
    waiting: int  # for a batch that is open
    repeated: int  # further up in the file
    left: int  # beyond the limit
    expected: Micros | None  # by what the task's answers cost on average; None before the first one

    @property
    def size(self) -> int:
        """Inputs to be sent."""
        return sum(len(batch.inputs) for batch in self.batches)

    @property
    def worst(self) -> Micros:
        """What they can cost at most."""
        return sum(batch.worst for batch in self.batches)


def read_inputs(task: TaskConfig, path: Path) -> list[Json]:
    """The inputs in a file, one JSON value a line; empty lines are passed over.

    Raises ConfigError for a file that cannot be read, InvalidInput that names line and field of what is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="name a file that can be read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from error
    inputs: list[Json] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            inputs.append(task.validate_input(json.loads(line)))
        except InvalidRequest as error:
            wrong.append(f"line {number}: {error}")
        except (ValueError, RecursionError) as error:
            wrong.append(f"line {number}: is not JSON: {error}")
    if wrong:
        more = [f"and {len(wrong) - _TOLD} more"] if len(wrong) > _TOLD else []
        raise InvalidInput(f"{path}: " + "; ".join([*wrong[:_TOLD], *more]), hint="nothing was sent")
    return inputs


def split(sizes: Sequence[int], limits: Limits) -> Iterator[slice]:
    """Runs of requests, of these sizes in bytes, that fit into a batch; one that never does goes alone.

    >>> [(run.start, run.stop) for run in split([4, 4, 4, 20, 1], Limits(requests=2, bytes=10))]
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    start, filled = 0, 0
    for number, size in enumerate(sizes):
        if number > start and (number - start >= limits.requests or filled + size > limits.bytes):
            yield slice(start, number)
            start, filled = number, 0
        filled += size
    if sizes:
        yield slice(start, len(sizes))


class Bulk:
    """The batches of a configuration and a store. Any number of processes may have one: each batch is led by one of them.

    `owner`: who holds a lease, a name that a person can find the process by.
    """

    def __init__(self, config: Config, store: Store, *, clock: Callable[[], Seconds], owner: str) -> None:
        """Raises PriceUnknown."""
        self._config = config
        self._store = store
        self._clock = clock
        self._owner = owner
        self._purse = Purse(config, store, clock=clock)
        self._main = Provider(config.remote)
        others = [Provider(remote) for remote in config.remote.additional_providers]
        self._providers = {provider.name: provider for provider in [*others, self._main]}

    async def open(self) -> None:
        """Learn from the ledger what others spent. Raises StoreError."""
        await self._purse.open()

    async def close(self) -> None:
        for provider in self._providers.values():
            await provider.close()

    async def plan(self, task_name: str, inputs: Sequence[Json], *, limit: int | None = None) -> Plan:
        """What it takes to have these inputs answered, without those that are or will be. Nothing is sent or spent.

        Inputs that differ only in case, white space or Unicode form count as the same. `limit`: so many at most. Raises
        ConfigError for a provider without batches.
        """
        task, model = self._config.task(task_name), _batching(self._main)
        answered = await self._answered(task_name)
        open_ones = await self._store.batches(task_name, open=True)
        waiting = {promotion.fingerprint(input) for batch in open_ones for input in batch.inputs}
        fresh: dict[str, Json] = {}
        redactor = privacy.redactor(self._config, task)
        counts = {"answered": 0, "waiting": 0, "repeated": 0}
        for input in inputs:
            input = privacy.Veil(redactor).hide(input)  # a batch is kept before it is sent
            key = promotion.fingerprint(input)
            places: Mapping[str, Any] = {"answered": answered, "waiting": waiting, "repeated": fresh}
            where = next((name for name, keys in places.items() if key in keys), None)
            if where is None:
                fresh[key] = input
            else:
                counts[where] += 1
        chosen = list(fresh.values())[:limit]
        mean, share = await mean_cost(self._store, task_name), self._main.remote.batch_price
        return Plan(
            task=task_name,
            batches=self._batches(task, model, chosen),
            **counts,
            left=len(fresh) - len(chosen),
            expected=None if mean is None else math.ceil(mean * float(share) * len(chosen)),
        )

    async def send(self, plan: Plan) -> list[Batch]:
        """The batches of a plan, as they are after they were sent. One that could not be sent now is tried again when it
        is collected, and is the last: those after it are not begun.

        Raises BudgetError when the caps leave no room; what was sent before stays sent.
        """
        sent: list[Batch] = []
        for batch in plan.batches:
            async with self._leading(batch) as lease:
                assert lease is not None  # nobody else knows of it yet
                await self._store.keep_batch(batch, lease=lease)
                sent.append(await self._advanced(batch, lease, only_send=True))
            if sent[-1].state == "prepared":
                break
        return sent

    async def collect(self, task_name: str | None = None) -> list[Batch]:
        """Every batch that was open, of one task or of all, as it is after one look. `problem` says what was in the way.

        A batch that another process is looking at stays as it is. Raises StoreError.
        """
        seen: list[Batch] = []
        for one in await self._store.batches(task_name, open=True):
            async with self._leading(one) as lease:
                if lease is None:
                    seen.append(one)
                    continue
                # As it is since nobody else can change it.
                for batch in await self._store.batches(task_name, open=True):
                    if batch.id == one.id:
                        try:
                            seen.append(await self._advanced(batch, lease))
                        except BudgetError as error:
                            seen.append(batch.model_copy(update={"state": "failed", "problem": str(error)}))
        return seen

    async def cancel(self, task_name: str) -> int:
        """Ask the provider to end the task's batches early, and return how many. They are collected like any other."""
        asked = 0
        for batch in await self._store.batches(task_name, open=True):
            if batch.state == "submitted" and batch.remote_id is not None:
                await _batching(self._provider(batch)).cancel(batch.remote_id)
                asked += 1
        return asked

    # --- the steps of a batch -----------------------------------------------------------------------------------------

    async def _advanced(self, batch: Batch, lease: Lease, *, only_send: bool = False) -> Batch:
        """The batch after as many steps as can be taken now."""
        try:
            task = self._config.task(batch.task)
            if batch.state == "prepared":
                batch = await self._sent(batch, task, lease)
            elif batch.state == "submitted" and not only_send:
                batch = await self._gathered(batch, task, lease)
        except (ModelError, ConfigError, UnknownTask) as error:
            if self._clock() - batch.at <= _GIVEN_UP:
                return batch.model_copy(update={"problem": str(error)})  # it is looked at again
            batch = await self._failed(batch, lease, f"given up: {error}", assumed=True)
        return batch if batch.end is None else await self._settled(batch, lease)

    async def _sent(self, batch: Batch, task: TaskConfig, lease: Lease) -> Batch:
        provider = self._provider(batch)
        model = _batching(provider)
        if provider.name in await suspended_models(self._store):
            raise ConfigError(f"{provider.name} is suspended", hint="apprentice resume")
        if not any(hold.attempt_id == batch.id for hold in await self._store.holds(math.inf)):
            await self._held(batch, task, lease)
        if batch.sent_at is not None:
            others = [one.remote_id for one in await self._store.batches() if one.remote_id is not None]
            found = await model.find(Sought(batch.id, len(batch.inputs), batch.at, frozenset(others)))
            if len(found) > 1:
                problem = f"its creation had no answer, and {len(found)} batches at the provider may be it"
                return await self._failed(batch, lease, problem, assumed=True)
            if found:
                return await self._kept(batch, lease, state="submitted", remote_id=found[0])
            if self._clock() - batch.sent_at < _SHOWS:
                return batch.model_copy(update={"problem": "its creation had no answer; it is looked for again"})
        batch = await self._kept(batch, lease, sent_at=self._clock())
        requests = dict(zip(batch.request_ids, batch.inputs, strict=True))
        try:
            remote_id = await model.submit(task.task, batch.id, requests)
        except ModelError as error:
            if error.outcome in ("not_sent", "rejected"):
                batch = await self._kept(batch, lease, sent_at=None)
                if not error.retryable:
                    return await self._failed(batch, lease, str(error), assumed=False)
            raise
        return await self._kept(batch, lease, state="submitted", remote_id=remote_id)

    async def _held(self, batch: Batch, task: TaskConfig, lease: Lease) -> None:
        try:
            await self._purse.reserve(task, lambda at, windows: _hold(batch, at, windows))
        except (BudgetError, asyncio.CancelledError) as error:
            # Nothing is held then. It is not tried again: whoever sends the file again finds these inputs unanswered.
            problem = str(error) or "cancelled before its money was held"
            await asyncio.shield(self._kept(batch, lease, state="failed", problem=problem, open=False))
            raise

    async def _gathered(self, batch: Batch, task: TaskConfig, lease: Lease) -> Batch:
        model = _batching(self._provider(batch))
        assert batch.remote_id is not None  # a submitted batch has one
        if not await model.ended(batch.remote_id):
            return batch
        answers = await model.results(task.task, batch.remote_id, batch.request_ids)
        at = self._clock()  # one moment for all, or the task would seem to be asked a thousand times a second
        records = [self._record(batch, number, answers[key], task, at) for number, key in enumerate(batch.request_ids)]
        kept: list[Record] = []
        for start in range(0, len(records), _PAGE):
            kept += await asyncio.gather(*map(self._recorded, records[start : start + _PAGE]))
        cost = sum(record.cost for record in kept)
        labels = sum(record.served is not None for record in kept)
        message = f"{labels:,} of {len(kept):,} inputs were answered by {batch.model} for {cost / 1e6:.6f} US dollars"
        await self._say("BATCH_ENDED", batch, message, {"labels": labels, "inputs": len(kept), "cost": cost})
        return await self._kept(batch, lease, state="ended", end="settled", cost=cost)

    async def _recorded(self, record: Record) -> Record:
        """The Record in the store: this one, or the one that was kept before the process died."""
        try:
            await self._store.append(record)
        except StoreError:
            before = await self._store.record(record.request_id)
            if before is None:
                raise
            return before
        return record

    async def _settled(self, batch: Batch, lease: Lease) -> Batch:
        """Closed, with its hold settled. The second time changes nothing in the ledger."""
        assert batch.end is not None  # who calls has found out
        await self._purse.settle(_hold(batch, batch.at, ()), batch.cost, state=batch.end)
        with contextlib.suppress(StoreError, UnknownTask):  # what was not said is said after the next call
            await self._purse.watch(self._config.task(batch.task))
        return await self._kept(batch, lease, open=False)

    async def _failed(self, batch: Batch, lease: Lease, problem: str, *, assumed: bool) -> Batch:
        cost = batch.worst if assumed else 0
        counts = f"; its worst case of {cost / 1e6:.6f} US dollars counts as spent" if assumed else ""
        await self._say("BATCH_FAILED", batch, problem + counts, {"inputs": len(batch.inputs), "cost": cost})
        end = "assumed" if assumed else "released"
        return await self._kept(batch, lease, state="failed", end=end, cost=cost, problem=problem)

    async def _kept(self, batch: Batch, lease: Lease, **changes: object) -> Batch:
        """The batch with these changes, which are durable. Raises StoreError for who no longer leads it."""
        changed = batch.model_copy(update=changes)
        await self._store.keep_batch(changed, lease=lease)
        return changed

    async def _say(self, name: str, batch: Batch, message: str, evidence: dict[str, Json]) -> None:
        evidence |= {"batch": batch.id, "model": batch.model, "remote_id": batch.remote_id}
        key = f"{name}/{batch.id}"
        at = self._clock()
        event = Event(name=name, task=batch.task, at=at, message=message, evidence=evidence, key=key)
        await self._store.add_event(event)

    @contextlib.asynccontextmanager
    async def _leading(self, batch: Batch) -> AsyncIterator[Lease | None]:
        """The right to take the batch's next steps; None while another process has it."""
        lease = await self._store.acquire(f"batch/{batch.id}", self._owner, self._clock(), _LEASE)
        if lease is None:
            yield None
            return

        async def renew(held: Lease) -> None:
            while True:
                await asyncio.sleep(_LEASE / 4)
                with contextlib.suppress(StoreError):  # a lease that is lost is noticed by the next step
                    await self._store.renew(held, self._clock(), _LEASE)

        keeper = asyncio.create_task(renew(lease))
        try:
            yield lease
        finally:
            keeper.cancel()
            await self._store.release(lease)

    # --- what the steps are about -------------------------------------------------------------------------------------

    def _provider(self, batch: Batch) -> Provider:
        found = self._providers.get(batch.model)
        if found is None:
            raise ConfigError(
                f"batch {batch.id} is at {batch.model}, which is not configured",
                hint="add it to `remote.additional_providers` until its batches are collected",
            )
        return found

    async def _answered(self, task: str) -> set[str]:
        """The fingerprints of the inputs that the remote has answered."""
        found: set[str] = set()
        after = 0
        while page := await self._store.records(task, after=after, limit=_PAGE, labelled=True):
            found |= {promotion.fingerprint(record.input) for _, record in page}
            after = page[-1][0]
        return found

    def _batches(self, task: TaskConfig, model: BatchModel, inputs: Sequence[Json]) -> list[Batch]:
        sizes = [model.request_bytes(task.task, input) for input in inputs]
        limits = model.batch_limits._replace(requests=min(_MOST, model.batch_limits.requests))
        price, share = self._main.price, self._main.remote.batch_price
        worsts = [math.ceil(budget.worst_case(price, size, model.max_tokens) * share) for size in sizes]
        return [
            Batch(
                id=new_id(),
                task=task.name,
                model=self._main.name,
                at=self._clock(),
                inputs=tuple(inputs[run]),
                worsts=tuple(worsts[run]),
            )
            for run in split([size + _ENVELOPE for size in sizes], limits)
        ]

    def _record(self, batch: Batch, number: int, found: Answer | ModelError, task: TaskConfig, at: Seconds) -> Record:
        usage: Usage | None = found.usage
        answer: Answer | None = None
        if isinstance(found, ModelError):
            outcome, problem = found.outcome, f"{type(found).__name__}: {found}"
        else:
            answer = validated(task, found)
            outcome, problem = "answered" if usage else "answered_no_usage", answer.problem or ""
        provider = self._provider(batch)
        if usage is not None:
            cost = math.ceil(provider.cost(usage) * provider.remote.batch_price)
        else:  # nobody says what it cost: the worst case counts, as for any call
            cost = 0 if outcome in ("not_sent", "rejected") else batch.worsts[number]
        attempt = Attempt(
            attempt_id=batch.id,
            model=batch.model,
            purpose="batch",
            outcome=outcome,
            cost=cost,
            problem=problem or None,
        )
        record = Record(
            request_id=batch.request_ids[number],
            task=batch.task,
            at=at,
            input=batch.inputs[number],
            decision=Decision(route="remote", reason="batch", p=1.0),
            remote=None if answer is None else answer.model_copy(update={"cost": cost}),
            served="remote" if answer is not None and answer.output is not None else None,
            attempts=(attempt,),
            cost=cost,
            error=problem or None,
        )
        return privacy.Veil(privacy.redactor(self._config, task)).kept(record)


def _hold(batch: Batch, at: Seconds, windows: tuple[str, ...]) -> Hold:
    return Hold(
        attempt_id=batch.id,
        task=batch.task,
        purpose="batch",
        model=batch.model,
        worst=batch.worst,
        windows=windows,
        at=at,
    )


def _batching(provider: Provider) -> BatchModel:
    model = provider.model()
    if not isinstance(model, BatchModel):
        raise ConfigError(f"{provider.name} takes no batches", hint="openai, anthropic and google do")
    return model
