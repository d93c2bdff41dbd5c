"""What every paid call asks for before it leaves, and gives back when it is over: holds, caps, waiting, warnings.

A hold is booked in all windows at once, or not at all. One that finds the caps filled by the holds of others waits for
them, in the order of coming; one that finds the money spent does not. Holds that a process left behind when it died count
as spent: nobody knows what became of their calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Literal
from zoneinfo import ZoneInfo

from apprentice import budget
from apprentice.config import Config, TaskConfig
from apprentice.errors import BudgetError, BudgetExhausted, BudgetHeld, ConfigError
from apprentice.types import Cap, Event, Hold, Micros, Seconds, Store

_LOOK: Seconds = 0.25  # holds of other processes come free without a word
_WARN_AT = (0.80, 0.95)  # of a cap
_NOTICED = 0.02  # of the smallest cap: after so much spending the caps are looked at again
_RECENT: Seconds = 2 * 86_400.0  # how far back the ledger is read for the day that it has seen
_GRACE: Seconds = 60.0  # beyond the longest call; an older hold belongs to a process that died
_EVENTS = 10_000  # of the newest, among which a suspension is looked for
_REMEMBERED = 100  # calls in the running mean of what one costs


class Purse:
    """The caps of a configuration over the ledger of a store. Safe under concurrency, on any number of processes."""

    def __init__(self, config: Config, store: Store, *, clock: Callable[[], Seconds]) -> None:
        self._config = config
        self._store = store
        self._clock = clock
        self._zone = ZoneInfo(config.budget.timezone)
        self._latest: Seconds = 0.0  # the latest moment seen: a clock that goes back must not re-open a window
        self._means: dict[str, float] = {}  # micro-dollars that an answer to a request costs, by task
        self._audits: dict[str, Mapping[str, Micros]] = {}  # what is kept back for audits, by task and window
        self._said: set[str] = set()  # keys of events that need not be said again
        self._unseen: Micros = 0  # spent by this process since the caps were looked at
        self._line = asyncio.Lock()  # who waits for money stands here; its waiters are served in order
        self._freed = asyncio.Event()
        remotes = (config.remote, *config.remote.additional_providers)
        self._longest = max(remote.timeout for remote in remotes)

    async def open(self) -> None:
        """Learn from the ledger what day it is at least, and count as spent what dead processes held."""
        # A clock that is ahead finds nothing newer, one that is behind finds all that it needs.
        recent = await self._store.spending(since=self._clock() - _RECENT)
        days = [datetime.fromisoformat(line.day) for line in recent if line.day]
        if days:
            self._latest = max(self._latest, max(days).replace(tzinfo=self._zone).timestamp())
        await self.sweep()

    def now(self) -> Seconds:
        """The moment by which windows are chosen. It never goes back."""
        self._latest = max(self._latest, self._clock())
        return self._latest

    async def reserve(
        self,
        task: TaskConfig,
        make: Callable[[Seconds, tuple[str, ...]], Hold],
        *,
        spare: int = 0,
        for_audits: bool = False,
        until: Seconds | None = None,
    ) -> Hold:
        """The hold, booked. It waits for the holds of others until `until` (a moment of the event loop), or
        `budget.wait` seconds, and with `on_exhausted: queue` for a new window as well.

        `spare`: worst cases of this call that must be left besides; `for_audits`: leave what audits will need. Raises
        BudgetHeld, BudgetExhausted. A caller who goes away meanwhile leaves no hold behind.
        """
        loop = asyncio.get_running_loop()
        patience = loop.time() + self._config.budget.wait
        until = patience if until is None else min(until, patience)
        if not self._line.locked():
            try:
                return await self._book(task, make, spare, for_audits)
            except BudgetError as error:
                if not self._is_worth_waiting(error) or loop.time() >= until:
                    raise
        try:
            async with asyncio.timeout_at(until):
                await self._line.acquire()
        except TimeoutError as error:
            raise BudgetHeld("the calls before this one still wait for money that others hold") from error
        try:
            while True:
                self._freed.clear()
                try:
                    return await self._book(task, make, spare, for_audits)
                except BudgetError as error:
                    if not self._is_worth_waiting(error) or loop.time() >= until:
                        raise
                await self._wait(min(_LOOK, until - loop.time()))
        finally:
            self._line.release()

    async def settle(self, hold: Hold, cost: Micros, *, state: Literal["settled", "assumed", "released"]) -> None:
        """Close the hold with what the call did cost. More than was held is booked as it is, and said."""
        if state == "settled" and hold.purpose == "serve":
            mean = self._means.get(hold.task, float(cost))
            self._means[hold.task] = mean + (cost - mean) / _REMEMBERED
        await self._store.settle(hold.attempt_id, cost, state=state)
        self._freed.set()
        self._unseen += cost
        if cost > hold.worst:
            message = (
                f"{hold.model} billed {cost} micro-dollars for a call that could cost {hold.worst} at most: it is booked, and "
                "the model is not asked any more until `apprentice resume` is told that its price and limits are right"
            )
            evidence = {"model": hold.model, "attempt": hold.attempt_id, "billed": cost, "worst": hold.worst}
            key = f"CONTRACT_BROKEN/{hold.attempt_id}"
            await self._say("CONTRACT_BROKEN", hold.task, key, message, evidence)

    async def watch(self, task: TaskConfig) -> None:
        """Say BUDGET_WARNING, once a window and reason, when a cap is nearly used up or will be before its window ends."""
        caps = [cap for cap in self.caps(task, self.now()) if cap.limit > 0]
        if not caps or self._unseen < _NOTICED * min(cap.limit for cap in caps):
            return
        spent = await self._store.spent([cap.window for cap in caps])
        for cap in caps:
            used = spent[cap.window] / cap.limit
            for share in _WARN_AT:
                if used >= share:
                    message = f"{cap.window}: {used:.0%} of the cap is used"
                    await self._warn(task, cap, f"{share:.0%}", message, spent[cap.window])
            moment = budget.reached(cap, spent[cap.window], self.now(), self._zone)
            if moment is not None:
                when = datetime.fromtimestamp(moment, self._zone)
                message = f"{cap.window}: at this rate the cap is reached on {when:%Y-%m-%d %H:%M}"
                await self._warn(task, cap, "forecast", message, spent[cap.window])
        self._unseen = 0

    async def foresee(self, task: TaskConfig, *, gap: Seconds, level: float) -> None:
        """Keep back what the audits of the task will need, and record INFEASIBLE, once a window, for each cap that cannot
        pay for them and this deferral level.

        `gap` is the mean time between two requests; a call costs what the last ones did, and before the first one nothing
        is said. When a cap is reached, `budget.on_exhausted` decides. Raises StoreError.
        """
        await self.watch(task)
        now = self.now()
        caps, cost = self.caps(task, now), self._means.get(task.name)
        if not caps or cost is None or gap <= 0:
            return
        requests_per_day = 86_400 / gap
        floor = (task.sampling or self._config.sampling).min_floor
        spent = await self._store.spent([cap.window for cap in caps])
        left = {cap.window: budget.left(cap.window, now, self._zone) for cap in caps}
        self._audits[task.name] = {
            window: round(floor * requests_per_day * seconds / 86_400 * cost)
            for window, seconds in left.items()
            if seconds < float("inf")
        }
        plan = budget.payable(caps, spent, left, requests_per_day=requests_per_day, cost=cost, floor=floor, level=level)
        for found in plan:
            if found.enough:
                continue
            pays = f"{found.affordable:.0%} of the requests" if found.audits >= 1 else "not even the audits"
            message = (
                f"{found.window}: {found.needed:.0%} of the requests need the remote, and the cap pays for {pays} "
                f"(about {requests_per_day:,.0f} a day, {cost / 1e6:.6f} US dollars each): raise it, or promise less"
            )
            evidence = found._asdict() | {"requests_per_day": requests_per_day, "cost": cost, "floor": floor}
            await self._say("INFEASIBLE", task.name, f"INFEASIBLE/{found.window}", message, evidence)

    async def sweep(self) -> None:
        """Count as spent what is held for longer than any call takes: the process that held it is dead."""
        for hold in await self._store.holds(self._clock() - 2 * self._longest - _GRACE):
            if hold.purpose != "train":  # a job of hours has a hold of hours
                await self._store.settle(hold.attempt_id, hold.worst, state="assumed")

    def caps(self, task: TaskConfig, now: Seconds) -> list[Cap]:
        """The caps that a call of the task has to fit in at that moment."""
        own = task.budget.limits if task.budget is not None else {}
        return budget.caps(task.name, now, self._zone, overall=self._config.budget.limits, own=own)

    async def _book(
        self, task: TaskConfig, make: Callable[[Seconds, tuple[str, ...]], Hold], spare: int, for_audits: bool
    ) -> Hold:
        now = self.now()
        hold = make(now, budget.windows(task.name, now, self._zone))
        kept = self._audits.get(task.name, {}) if for_audits else {}
        caps = [
            cap.model_copy(update={"limit": max(0, cap.limit - spare * hold.worst - kept.get(cap.window, 0))})
            for cap in self.caps(task, hold.at)
        ]
        booking = asyncio.create_task(self._store.reserve(hold, caps))
        try:
            await asyncio.shield(booking)
        except asyncio.CancelledError:
            await asyncio.shield(self._free(booking, hold))
            raise
        except BudgetExhausted as error:
            if not spare and not for_audits:
                await self._exhausted(task, caps, hold, str(error))
            raise
        return hold

    async def _free(self, booking: asyncio.Task[None], hold: Hold) -> None:
        await asyncio.wait([booking])
        if booking.exception() is None:
            await self.settle(hold, 0, state="released")

    async def _wait(self, seconds: Seconds) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._freed.wait()
        except TimeoutError:
            pass  # perhaps another process has freed some

    def _is_worth_waiting(self, error: BudgetError) -> bool:
        return isinstance(error, BudgetHeld) or self._config.budget.on_exhausted == "queue"

    async def _exhausted(self, task: TaskConfig, caps: list[Cap], hold: Hold, message: str) -> None:
        spent = await self._store.spent([cap.window for cap in caps])
        for cap in caps:
            if spent[cap.window] + hold.worst > cap.limit:
                evidence = {"window": cap.window, "limit": cap.limit, "spent": spent[cap.window], "worst": hold.worst}
                await self._say("BUDGET_EXHAUSTED", task.name, f"BUDGET_EXHAUSTED/{cap.window}", message, evidence)

    async def _warn(self, task: TaskConfig, cap: Cap, reason: str, message: str, spent: Micros) -> None:
        key = f"BUDGET_WARNING/{cap.window}/{reason}"
        evidence = {"window": cap.window, "limit": cap.limit, "spent": spent, "reason": reason}
        await self._say("BUDGET_WARNING", task.name, key, message, evidence)

    async def _say(self, name: str, task: str, key: str, message: str, evidence: Mapping[str, object]) -> None:
        if f"{task}/{key}" in self._said:
            return
        event = Event(name=name, task=task, at=self.now(), message=message, evidence=dict(evidence), key=key)
        await self._store.add_event(event)
        self._said.add(f"{task}/{key}")


async def suspended_models(store: Store) -> dict[str, str]:
    """The models that billed more than was possible and that nobody has spoken for since, with a task that each served."""
    found: dict[str, str] = {}
    for event in await store.events(names=["CONTRACT_BROKEN", "MODEL_RESUMED"], limit=_EVENTS):
        if event.name == "CONTRACT_BROKEN":
            found[event.evidence["model"]] = event.task
        else:
            found.pop(event.evidence["model"], None)
    return found


async def resume(store: Store, model: str, *, at: Seconds) -> None:
    """Let a suspended model ("provider/model") be asked again, by whichever process. Raises ConfigError for another."""
    suspended = await suspended_models(store)
    if model not in suspended:
        raise ConfigError(f"{model!r} is not suspended", hint=f"suspended: {', '.join(suspended) or 'none'}")
    message = f"{model} is asked again: a person said that its price and limits are right"
    task = suspended[model]
    await store.add_event(Event(name="MODEL_RESUMED", task=task, at=at, message=message, evidence={"model": model}))
