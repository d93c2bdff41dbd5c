"""What a key may spend: a purse of its own in the ledger, beside the caps that every call has to fit in anyhow.

The worst case of a whole request (each remote, each retry) is held in the key's windows before it begins, and settled with
what it did cost. The hold of a process that dies counts as spent, like every other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from zoneinfo import ZoneInfo

from apprentice import budget
from apprentice.calls import Provider
from apprentice.config import Config, TaskConfig
from apprentice.engine import new_id
from apprentice.gateway.keys import Key
from apprentice.types import Hold, Json, Micros, Seconds, Store


@dataclass(slots=True)
class Bill:
    """What a request did cost. None: nobody knows yet, and then its worst case counts."""

    cost: Micros | None = None


class Allowances:
    """The purses of keys. Keys without limits have none, and cost no write."""

    def __init__(self, config: Config, store: Store, *, clock: Callable[[], Seconds] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._zone = ZoneInfo(config.budget.timezone)
        self._providers = [Provider(config.remote), *map(Provider, config.remote.additional_providers)]
        self._latest: Seconds = 0.0  # a clock that goes back must not re-open a window

    def worst(self, task: TaskConfig, input: Json) -> Micros:
        """The most that one request of the task can cost: every attempt at every remote, and a repeated first one."""
        return sum(
            (provider.remote.retries + 1 + (number == 0)) * worst_of(provider, task, input)
            for number, provider in enumerate(self._providers)
        )

    @contextlib.asynccontextmanager
    async def held(self, key: Key, worst: Micros) -> AsyncIterator[Bill]:
        """The worst case, held in the key's windows; the Bill is settled at the end.

        Raises BudgetExhausted when the key's limits leave no room, BudgetHeld while its own requests in flight fill them.
        """
        bill = Bill()
        if not key.limits:
            yield bill
            return
        self._latest = max(self._latest, self._clock())
        owner = f"key:{key.id}"
        hold = Hold(
            attempt_id=new_id(),
            task=owner,
            purpose="serve",
            model=owner,
            worst=worst,
            windows=own_windows(key, self._latest, self._zone),
            at=self._latest,
        )
        booking = asyncio.ensure_future(
            self._store.reserve(hold, budget.caps(owner, self._latest, self._zone, overall={}, own=key.limits))
        )
        try:
            await asyncio.shield(booking)
        except asyncio.CancelledError:
            await asyncio.wait([booking])
            if booking.exception() is None:
                await self._store.settle(hold.attempt_id, 0, state="released")
            raise
        try:
            yield bill
        finally:
            if bill.cost is None:
                end = self._store.settle(hold.attempt_id, hold.worst, state="assumed")
            else:
                end = self._store.settle(hold.attempt_id, bill.cost, state="settled")
            await asyncio.shield(end)

    async def close(self) -> None:
        for provider in self._providers:
            await provider.close()


def own_windows(key: Key, at: Seconds, zone: ZoneInfo) -> tuple[str, ...]:
    """The windows of the key alone. Its name is no task's: those begin with a letter and have no colon."""
    name = f"key:{key.id}"
    return tuple(window for window in budget.windows(name, at, zone) if window.startswith(f"task:{name}/"))


def worst_of(provider: Provider, task: TaskConfig, input: Json) -> Micros:
    """The most that one attempt can cost."""
    size = provider.model().request_bytes(task.task, input)
    return budget.worst_case(provider.price, size, provider.remote.max_tokens)
