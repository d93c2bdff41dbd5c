"""One Idempotency-Key, one answer, one bill: within a process, between processes, and after one that died.

A key belongs to the API key that it came with, and is good for a day. What was recorded under it is repeated. Until then
two leases say what is known: a short one that somebody works on it, and one for the day, taken before anything is sent and
given back when it is certain how it ended. Whoever finds only the second one knows that a process died, and sends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple

from apprentice.errors import StoreError
from apprentice.gateway.refusals import Refusal
from apprentice.types import Lease, Record, Seconds, Store

DAY: Seconds = 86_400.0  # for which a key is good
_SLOTS = 65_536  # short leases: enough that two keys hardly share one, and no more rows than that


class Turn(NamedTuple):
    """Whose turn it is: the name under which to record the answer, and the Record if there is one already."""

    key: str | None
    before: Record | None


@dataclass(slots=True)
class _Shared:
    """What the requests of this process with the same key have together."""

    key: str
    taken: asyncio.Task[list[Lease]]
    users: int = 0
    certain: bool = True  # how it ended


class Once:
    """The idempotency keys of one process. `longest`: seconds that a request may take, from its first byte to its last."""

    def __init__(self, store: Store, owner: str, longest: Seconds, clock: Callable[[], Seconds]) -> None:
        self._store, self._owner, self._longest, self._clock = store, owner, longest, clock
        self._shared: dict[str, _Shared] = {}

    @contextlib.asynccontextmanager
    async def turn(self, task: str, key: str | None, *, share: bool = True) -> AsyncIterator[Turn]:
        """The right to answer the request with this key, or what was answered. Without a key everybody has it.

        With `share` the requests of this process come in together, and the engine lets them wait for each other. Raises
        Refusal 409: while another one works on it, and where nobody knows what became of the first one.
        """
        if key is None:
            yield Turn(None, None)
            return
        if (before := await self._recorded(task, key)) is not None:
            yield Turn(before.idempotency_key, before)
            return
        name = hashlib.sha256(f"{task}/{key}".encode()).hexdigest()
        shared = self._shared.get(name)
        if shared is None:
            taken = asyncio.ensure_future(self._take(name))
            shared = self._shared[name] = _Shared(f"{key}/{self._days()}", taken)
        elif not share:
            raise _in_flight()
        shared.users += 1
        try:
            await asyncio.shield(shared.taken)
            # Another process may have answered between the first look and the lease.
            before = await self._recorded(task, key)
            yield Turn(shared.key if before is None else before.idempotency_key, before)
        except (StoreError, asyncio.CancelledError):
            shared.certain = False  # nobody can say whether it is recorded
            raise
        finally:
            shared.users -= 1
            if shared.users == 0:
                del self._shared[name]
                await asyncio.shield(self._give_back(shared))

    async def _take(self, name: str) -> list[Lease]:
        """Both leases. Raises Refusal."""
        now, slot = self._clock(), int(name[:8], 16) % _SLOTS
        short = await self._store.acquire(f"idempotency/{slot}", self._owner, now, self._longest)
        if short is None:
            raise _in_flight()
        long = await self._store.acquire(f"unanswered/{name[:32]}", self._owner, now, DAY)
        if long is None:
            await self._store.release(short)
            raise _unknown()
        return [long, short]

    async def _give_back(self, shared: _Shared) -> None:
        await asyncio.wait([shared.taken])
        if shared.taken.cancelled() or shared.taken.exception() is not None:
            return
        long, short = shared.taken.result()
        if shared.certain:
            await self._store.release(long)
        await self._store.release(short)

    async def _recorded(self, task: str, key: str) -> Record | None:
        """The Record under this key, of the last day."""
        for day in (self._days(), self._days() - 1):
            found = await self._store.record_by_key(task, f"{key}/{day}")
            if found is not None and self._clock() - found.at < DAY:
                return found
        return None

    def _days(self) -> int:
        return int(self._clock() // DAY)


def _in_flight() -> Refusal:
    message = "the first request with this idempotency key is not answered yet"
    return Refusal(409, "idempotency_in_flight", message, param="idempotency-key", wait=1.0, retryable=True)


def _unknown() -> Refusal:
    message = (
        "the first request with this idempotency key was interrupted, and its outcome is unknown: it may have been answered "
        "and paid for; for 24 hours after it nothing is sent again under this key"
    )
    return Refusal(409, "outcome_unknown", message, param="idempotency-key", hint="a fresh key asks anew")
