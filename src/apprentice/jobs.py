"""Training that costs money and time: its worst case is held before it begins, and settled when the job has ended.

A job outlives the process that began it. How far it has come stands in its row, in the model folder; what it may cost
stands in the ledger, under the same name; who may go on with it holds the lease under which its task is taught. So
whoever teaches the task next finishes the job that is open, and settles what an earlier one left to be settled.

That something trains now, a file beside the jobs says to other processes, with a lock that no dead process holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from apprentice.config import TaskConfig
from apprentice.errors import StoreError
from apprentice.purse import Purse
from apprentice.trainers import progress
from apprentice.types import Attempt, Checkpoint, Example, Hold, Json, Lease, Seconds, Store, Task, Trainer, Value

_ENDS: dict[str, Literal["settled", "assumed", "released"]] = {
    "answered": "settled",
    "rejected": "released",
    "unknown": "assumed",
}
_NOW = ".training.json"  # in the folder that is trained into
_BOOKED_AGAIN = 100  # times that one job can be paid for: its folder was lost, and with it what it had come to


class Training(Value):
    """A training that goes on now. None: its trainer does not tell that, or not yet."""

    trainer: str
    since: Seconds
    token: int  # of the lease under which the task is taught
    step: int | None = None
    steps: int | None = None
    loss: float | None = None  # of the last steps
    held_loss: float | None = None  # of examples that are kept back
    eta: Seconds | None = None  # that were left, about, when it was told
    told_at: Seconds | None = None


@contextmanager
def shown(into: Path, *, trainer: str, since: Seconds, lease: Lease) -> Iterator[None]:
    """Inside of it, `running` tells of this training; no longer than this process lives, and until the next one begins."""
    with tempfile.NamedTemporaryFile(prefix=".draft-", dir=into, delete=False) as file:
        with contextlib.suppress(OSError):  # of a file system without locks: it trains there, and is not shown
            fcntl.flock(file, fcntl.LOCK_EX)
        file.write(Training(trainer=trainer, since=since, token=lease.token).model_dump_json().encode())
        file.flush()
        Path(file.name).replace(into / _NOW)
        yield


def running(into: Path) -> Training | None:
    """What is trained into this folder now, by whichever process, and how far it has come. Reads files alone.

    None as well where this process may not read them, or another version of this program wrote them.
    """
    try:
        with (into / _NOW).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                now = Training.model_validate_json(file.read())
            else:
                return None  # who wrote it has ended, or was killed
    except (OSError, ValueError):
        return None
    told = [job for job in progress(into) if job.token == now.token and job.at is not None]
    if not told:
        return now
    last = max(told, key=lambda job: job.at or 0.0)
    numbers = {name: getattr(last, name) for name in ("step", "steps", "loss", "held_loss", "eta")}
    return now.model_copy(update={**numbers, "told_at": last.at})


@runtime_checkable
class PaidTrainer(Trainer, Protocol):
    """A trainer whose training somebody bills. All of it blocks, and is safe to be done again."""

    def quote(
        self,
        task: Task,
        examples: Sequence[Example],
        *,
        into: Path,
        seed: int,
        token: int = ...,
        licence: Mapping[str, Json] = ...,
    ) -> Hold | None:
        """What is to be held before `train` with the same arguments, under the name of the job, without windows and
        moment; None when nothing will be spent any more. Holders of a lease with an older token write nothing from then on.
        """
        ...

    def bill(self, job: str, *, into: Path) -> Attempt | None:
        """What an ended job came to; None while it goes on, and for a job that is not known."""
        ...

    def stop(self) -> None:
        """Let `train` end soon with TrainingError. The job goes on."""
        ...


@runtime_checkable
class LedTrainer(Trainer, Protocol):
    """A trainer whose job is a folder here, that a later cycle goes on with. Nobody bills it."""

    def lead(self, token: int) -> None:
        """What `train` makes from now on is made under the lease of that token: holders of older ones publish nothing."""
        ...

    def stop(self) -> None:
        """Let `train` end soon with TrainingError. The job stays."""
        ...


async def train(
    task: TaskConfig,
    trainer: Trainer,
    examples: Sequence[Example],
    *,
    into: Path,
    seed: int,
    licence: Mapping[str, Json],
    lease: Lease,
    store: Store,
    purse: Purse,
) -> Checkpoint:
    """What the trainer makes of the examples, in a thread; its money is held before, and settled after.

    Raises what the trainer raises, and BudgetError before anything is sent. Cancelled, it stops waiting: the job and its
    hold stay for who comes next.
    """
    learnable = task.learnable_task
    if isinstance(trainer, LedTrainer):
        trainer.lead(lease.token)
        begun = asyncio.to_thread(trainer.train, learnable, examples, into=into, seed=seed, licence=licence)
        return await _waited(asyncio.create_task(begun), trainer.stop)
    if not isinstance(trainer, PaidTrainer):
        made: Checkpoint = await asyncio.to_thread(
            trainer.train, learnable, examples, into=into, seed=seed, licence=licence
        )
        return made
    await purse.open()
    # Reconciled first: what an earlier job left to be settled may be the room that this one needs.
    await _settled(trainer, task, into, store, purse)
    quote = await asyncio.to_thread(
        trainer.quote, learnable, examples, into=into, seed=seed, token=lease.token, licence=licence
    )
    if quote is not None and not any(_job(hold) == quote.attempt_id for hold in await _holds(task, store)):
        await _hold(task, quote, purse)
    work = asyncio.create_task(
        asyncio.to_thread(trainer.train, learnable, examples, into=into, seed=seed, licence=licence)
    )
    try:
        return await _waited(work, trainer.stop)
    finally:
        if work.done():
            await _settled(trainer, task, into, store, purse)


async def _waited(work: asyncio.Task[Checkpoint], stop: Callable[[], None]) -> Checkpoint:
    """What the thread makes. Cancelled, it is told to stop, and waited for."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop()
        await asyncio.wait([work])
        raise


async def _hold(task: TaskConfig, quote: Hold, purse: Purse) -> None:
    """Book the quote under its name, or under "NAME@2" and so on where the ledger has closed that one."""

    def named(name: str) -> Callable[[Seconds, tuple[str, ...]], Hold]:
        return lambda at, windows: quote.model_copy(update={"attempt_id": name, "at": at, "windows": windows})

    for number in range(1, _BOOKED_AGAIN):
        try:
            await purse.reserve(task, named(quote.attempt_id if number == 1 else f"{quote.attempt_id}@{number}"))
        except StoreError as error:
            if error.retryable or "in the ledger already" not in str(error) or number + 1 == _BOOKED_AGAIN:
                raise
        else:
            return


async def _settled(trainer: PaidTrainer, task: TaskConfig, into: Path, store: Store, purse: Purse) -> None:
    """Close the holds of jobs that have ended. What is done twice changes nothing in the ledger."""
    for hold in await _holds(task, store):
        bill = await asyncio.to_thread(trainer.bill, _job(hold), into=into)
        if bill is not None:
            await purse.settle(hold, bill.cost, state=_ENDS[bill.outcome])


async def _holds(task: TaskConfig, store: Store) -> list[Hold]:
    return [hold for hold in await store.holds(math.inf) if hold.purpose == "train" and hold.task == task.name]


def _job(hold: Hold) -> str:
    return hold.attempt_id.partition("@")[0]
