"""What a key may spend: a purse of its own in the ledger, beside the caps that every call has to fit in anyhow.

The worst case of a whole request (each remote, each retry) is held in the key's windows before it begins, and settled with
what it did cost. The hold of a process that dies counts as spent, like every other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple
from zoneinfo import ZoneInfo

from apprentice import budget
from apprentice.calls import Provider
from apprentice.config import Config, TaskConfig
from apprentice.engine import new_id
from apprentice.errors import StoreError
from apprentice.gateway.keys import Key
from apprentice.types import Cap, Hold, Json, Micros, Seconds, Store

_MOST_KEYS = 1_000  # whose day is remembered


@dataclass(slots=True)
class Bill:
    """What a request did cost. None: nobody knows yet, and then its worst case counts."""

    cost: Micros | None = None


class _Day(NamedTuple):
    """The windows that requests of a key are booked in, and the caps on them, from one midnight to the next."""

    begin: Seconds
    end: Seconds
    limits: Mapping[str, Decimal]
    windows: tuple[str, ...]
    caps: list[Cap]


class Allowances:
    """The purses of keys. Keys without limits have none, and cost no write."""

    def __init__(self, config: Config, store: Store, *, clock: Callable[[], Seconds] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._zone = ZoneInfo(config.budget.timezone)
        self._providers = [Provider(config.remote), *map(Provider, config.remote.additional_providers)]
        self._days: dict[str, _Day] = {}  # by key, the last one that was asked for
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
        owner, day = f"key:{key.id}", self._day(key, self._latest)
        hold = Hold(
            attempt_id=new_id(),
            task=owner,
            purpose="serve",
            model=owner,
            worst=worst,
            windows=day.windows,
            at=self._latest,
        )
        try:
            await self._store.reserve(hold, day.caps)
        except asyncio.CancelledError:
            await asyncio.shield(self._free(hold))
            raise
        try:
            yield bill
        finally:
            if bill.cost is None:
                end = self._store.settle(hold.attempt_id, hold.worst, state="assumed")
            else:
                end = self._store.settle(hold.attempt_id, bill.cost, state="settled")
            await asyncio.shield(end)

    async def _free(self, hold: Hold) -> None:
        """Give back what nobody waits for any more. A store serves it after the booking, which may have gone on."""
        with contextlib.suppress(StoreError):  # it was not booked; or it stays held, and counts as spent after a while
            await self._store.settle(hold.attempt_id, 0, state="released")

    def _day(self, key: Key, now: Seconds) -> _Day:
        """What holds for the key at that moment. It is the same all day, and is worked out once a day."""
        known = self._days.get(key.id)
        if known is None or not known.begin <= now < known.end or known.limits != key.limits:
            if len(self._days) >= _MOST_KEYS:
                self._days.clear()
            caps = budget.caps(f"key:{key.id}", now, self._zone, overall={}, own=key.limits)
            span = budget.span(budget.windows("", now, self._zone)[3], self._zone)
            known = self._days[key.id] = _Day(*span, key.limits, own_windows(key, now, self._zone), caps)
        return known

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
