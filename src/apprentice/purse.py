"""What every paid call asks for before it leaves, and gives back when it is over: holds, caps, waiting, warnings.

A hold is booked in all windows at once, or not at all. One that finds the caps filled by the holds of others waits for
them, in the order of coming; one that finds the money spent does not. Holds that a process left behind when it died count
as spent: nobody knows what became of their calls.

The caps are those of the configuration, and of its file as it is edited: see `Purse.follow`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

from apprentice import budget
from apprentice import config as configuration
from apprentice.config import Budget, Config, TaskConfig
from apprentice.errors import BudgetError, BudgetExhausted, BudgetHeld, ConfigError, StoreError
from apprentice.types import Cap, Event, Hold, Micros, Seconds, Store

_LOOK: Seconds = 0.25  # holds of other processes come free without a word
_WARN_AT = (0.80, 0.95)  # of a cap
_NOTICED = 0.02  # of the smallest cap: after so much spending the caps are looked at again
_RECENT: Seconds = 2 * 86_400.0  # how far back the ledger is read for the day that it has seen
_GRACE: Seconds = 60.0  # beyond the longest call; an older hold belongs to a process that died
_EVENTS = 10_000  # of the newest, among which a suspension is looked for
_REMEMBERED = 100  # calls in the running mean of what one costs
LONG_HOLDS = {"train", "batch"}  # purposes of jobs of hours, which have holds of hours
_FOLLOWED = ("total", "monthly", "weekly", "daily")  # of every `budget` section; and of the overall one besides:
_FOLLOWED_OVERALL = (*_FOLLOWED, "wait", "on_exhausted")


class _Day(NamedTuple):
    """The windows that calls of a task are booked in, and the caps on them, from one midnight to the next."""

    begin: Seconds
    end: Seconds
    windows: tuple[str, ...]
    caps: list[Cap]
    smallest: Micros  # of the caps that allow anything; 0 where there is none


type _Sections = dict[str | None, Budget]  # the `budget` of each task by its name, and the overall one
type _Mark = str | None  # of a file: another one, another file; None: there is none


class Purse:
    """The caps of a configuration over the ledger of a store. Safe under concurrency, on any number of processes."""

    def __init__(self, config: Config, store: Store, *, clock: Callable[[], Seconds]) -> None:
        self._config = config
        self._budgets = _sections(config)  # in force
        self._written = self._budgets  # as the file said when it was read last
        self._mark = _mark(config.source)  # of the file that was read last
        self._reading = asyncio.Lock()  # a change is read once, however many calls see it
        self._store = store
        self._clock = clock
        self._zone = ZoneInfo(config.budget.timezone)
        self._latest: Seconds = 0.0  # the latest moment seen: a clock that goes back must not re-open a window
        self._means: dict[str, float] = {}  # micro-dollars that an answer to a request costs, by task
        self._audits: dict[str, Mapping[str, Micros]] = {}  # what is kept back for audits, by task and window
        self._looked = False  # at the configuration's file, in this turn of the event loop: requests come many at once
        self._said: set[str] = set()  # keys of events that need not be said again
        self._unseen: Micros = 0  # spent by this process since the caps were looked at
        self._days: dict[str, _Day] = {}  # by task, the last one that was asked for
        self._line = asyncio.Lock()  # who waits for money stands here; its waiters are served in order
        self._freed = asyncio.Event()

    @property
    def budget(self) -> Budget:
        """The overall caps, and what is done when they are reached, as they are in force now."""
        return self._budgets[None]

    async def open(self) -> None:
        """Learn from the ledger what day it is at least, and count as spent what dead processes held."""
        await self._begin_to_follow()
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
        if not self._looked:
            self._looked = True
            loop.call_soon(self._look_again)
            await self.follow()
        patience = loop.time() + self.budget.wait
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
                await self.follow()
                try:
                    return await self._book(task, make, spare, for_audits)
                except BudgetError as error:
                    if not self._is_worth_waiting(error) or loop.time() >= until:
                        raise
                await self._wait(min(_LOOK, until - loop.time()))
        finally:
            self._line.release()

    def _look_again(self) -> None:
        self._looked = False

    async def follow(self) -> None:
        """Take over what was changed in the `budget` sections of the configuration's file since it was read.

        The caps of all tasks together and of each task follow, `wait` and `on_exhausted`; whatever else the file says needs
        a restart, also a task that is new in it. A cap below what is spent lets no new call go, a raised one lets waiting
        calls go. What the file did not change stays as the program set it. Recorded once a change: BUDGET_CHANGED with old
        and new limits; CONFIG_INVALID for a file that cannot be used, and the caps stay. Nothing happens for a
        configuration that came from no file. Raises StoreError.
        """
        source = self._config.source
        if source is None or _mark(source) == self._mark:
            return
        async with self._reading:
            if (mark := _mark(source)) == self._mark:
                return
            try:
                found = _sections(await asyncio.to_thread(configuration.load, source))
            except ConfigError as error:
                if mark == _mark(source):  # else somebody is just writing it: the next look sees the whole
                    message = f"the file was changed and cannot be used, the former caps stay: {error}"
                    evidence, key = {"file": str(source)}, f"CONFIG_INVALID/{mark}"
                    await self.say("CONFIG_INVALID", self._config.tasks[0].name, key, message, evidence)
                    self._mark = mark
                return
            after = {
                name: _followed(now, self._written.get(name), found.get(name), overall=name is None)
                for name, now in self._budgets.items()
            }
            for name, now in after.items():
                await self._say_changed(name, self._budgets[name], now, mark)
            self._budgets, self._written, self._mark = after, found, mark
            self._days.clear()
            self._freed.set()

    async def _begin_to_follow(self) -> None:
        """Read the file as it is now: only what is changed in it from now on is taken over, so that caps which a program
        has set differently stay."""
        source = self._config.source
        if source is None or (mark := _mark(source)) is None:
            return
        try:
            self._written, self._mark = _sections(await asyncio.to_thread(configuration.load, source)), mark
        except ConfigError:
            self._mark = None  # it was edited since: the first look says so

    def settle(
        self, hold: Hold, cost: Micros, *, state: Literal["settled", "assumed", "released"]
    ) -> asyncio.Task[None]:
        """Begin to close the hold with what the call did cost: the store has it before whatever is written from here on, and
        the task is done once it is durable. More than was held is booked as it is, and said. Raises StoreError.
        """
        if state == "settled" and hold.purpose == "serve":
            mean = self._means.get(hold.task, float(cost))
            self._means[hold.task] = mean + (cost - mean) / _REMEMBERED
        self._unseen += cost
        closing = asyncio.eager_task_factory(
            asyncio.get_running_loop(), self._store.settle(hold.attempt_id, cost, state=state)
        )
        if self._line.locked():  # who comes later books after this
            closing.add_done_callback(lambda _: self._freed.set())
        return closing if cost <= hold.worst else asyncio.create_task(self._say_broken(closing, hold, cost))

    async def _say_broken(self, closing: asyncio.Task[None], hold: Hold, cost: Micros) -> None:
        await closing
        message = (
            f"{hold.model} billed {cost} micro-dollars for a call that could cost {hold.worst} at most: it is booked, and "
            "the model is not asked any more until `apprentice resume` is told that its price and limits are right"
        )
        evidence = {"model": hold.model, "attempt": hold.attempt_id, "billed": cost, "worst": hold.worst}
        await self.say("CONTRACT_BROKEN", hold.task, f"CONTRACT_BROKEN/{hold.attempt_id}", message, evidence)

    def is_to_watch(self, task: TaskConfig) -> bool:
        """Whether so much was spent since the caps were looked at that `watch` has something to do."""
        smallest = self._day(task, self.now()).smallest
        return smallest > 0 and self._unseen >= _NOTICED * smallest

    async def watch(self, task: TaskConfig) -> None:
        """Say BUDGET_WARNING, once a window, limit and reason, when a cap is nearly used up or will be before it ends."""
        if not self.is_to_watch(task):
            return
        caps = [cap for cap in self.caps(task, self.now()) if cap.limit > 0]
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
            await self.say("INFEASIBLE", task.name, f"INFEASIBLE/{found.window}", message, evidence)

    async def sweep(self) -> None:
        """Count as spent what is held for longer than any call takes: the process that held it is dead."""
        for hold in await self._store.holds(lost_before(self._config, self._clock())):
            if hold.purpose not in LONG_HOLDS:
                await self._store.settle(hold.attempt_id, hold.worst, state="assumed")

    def caps(self, task: TaskConfig, now: Seconds) -> list[Cap]:
        """The caps that a call of the task has to fit in at that moment."""
        return self._day(task, now).caps

    def _day(self, task: TaskConfig, now: Seconds) -> _Day:
        """What holds at that moment. It is the same all day, and is worked out once a day."""
        known = self._days.get(task.name)
        if known is None or not known.begin <= now < known.end:
            windows = budget.windows(task.name, now, self._zone)
            own = self._budgets.get(task.name) or task.budget or Budget()
            caps = budget.caps(task.name, now, self._zone, overall=self.budget.limits, own=own.limits)
            smallest = min((cap.limit for cap in caps if cap.limit > 0), default=0)
            today = next(window for window in windows if window.startswith("day:"))
            known = self._days[task.name] = _Day(*budget.span(today, self._zone), windows, caps, smallest)
        return known

    async def say(self, name: str, task: str, key: str, message: str, evidence: Mapping[str, object]) -> None:
        """Record an Event, once a key and task, whichever process says it first. Raises StoreError."""
        if f"{task}/{key}" in self._said:
            return
        event = Event(name=name, task=task, at=self.now(), message=message, evidence=dict(evidence), key=key)
        await self._store.add_event(event)
        self._said.add(f"{task}/{key}")

    async def _book(
        self, task: TaskConfig, make: Callable[[Seconds, tuple[str, ...]], Hold], spare: int, for_audits: bool
    ) -> Hold:
        now = self.now()
        day = self._day(task, now)
        hold, caps = make(now, day.windows), day.caps
        kept = self._audits.get(task.name, {}) if for_audits else {}
        if spare or kept:
            caps = [
                cap.model_copy(update={"limit": max(0, cap.limit - spare * hold.worst - kept.get(cap.window, 0))})
                for cap in caps
            ]
        try:
            await self._store.reserve(hold, caps)
        except asyncio.CancelledError:
            await asyncio.shield(self._free(hold))
            raise
        except BudgetExhausted as error:
            if not spare and not for_audits:
                await self._exhausted(task, caps, hold, str(error))
            raise
        return hold

    async def _free(self, hold: Hold) -> None:
        """Give back what nobody waits for any more. A store serves it after the booking, which may have gone on."""
        with contextlib.suppress(StoreError):  # it was not booked; or it stays held, and counts as spent after a while
            await self.settle(hold, 0, state="released")

    async def _wait(self, seconds: Seconds) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._freed.wait()
        except TimeoutError:
            pass  # perhaps another process has freed some

    def _is_worth_waiting(self, error: BudgetError) -> bool:
        return isinstance(error, BudgetHeld) or self.budget.on_exhausted == "queue"

    async def _exhausted(self, task: TaskConfig, caps: list[Cap], hold: Hold, message: str) -> None:
        spent = await self._store.spent([cap.window for cap in caps])
        for cap in caps:
            if spent[cap.window] + hold.worst > cap.limit:
                evidence = {"window": cap.window, "limit": cap.limit, "spent": spent[cap.window], "worst": hold.worst}
                await self.say(
                    "BUDGET_EXHAUSTED", task.name, f"BUDGET_EXHAUSTED/{cap.window}/{cap.limit}", message, evidence
                )

    async def _warn(self, task: TaskConfig, cap: Cap, reason: str, message: str, spent: Micros) -> None:
        key = f"BUDGET_WARNING/{cap.window}/{cap.limit}/{reason}"
        evidence = {"window": cap.window, "limit": cap.limit, "spent": spent, "reason": reason}
        await self.say("BUDGET_WARNING", task.name, key, message, evidence)

    async def _say_changed(self, name: str | None, before: Budget, now: Budget, mark: _Mark) -> None:
        if before == now:
            return
        old, new = (values.model_dump(mode="json", include=set(_FOLLOWED_OVERALL)) for values in (before, now))
        changes = {field: (old[field], new[field]) for field in old if old[field] != new[field]}
        said = ", ".join(f"{field} {_text(was)} -> {_text(is_)}" for field, (was, is_) in changes.items())
        message = f"the budget {'of all tasks' if name is None else 'of this task'} was changed in the file: {said}"
        evidence = {"budget": name or "all", "old": old, "new": new}
        task = name or self._config.tasks[0].name
        await self.say("BUDGET_CHANGED", task, f"BUDGET_CHANGED/{name or ''}/{mark}", message, evidence)


def _mark(source: Path | None) -> _Mark:
    try:
        found = None if source is None else source.stat()
    except OSError:
        return None
    return None if found is None else f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"


def _sections(config: Config) -> _Sections:
    own: _Sections = {task.name: task.budget or Budget() for task in config.tasks}
    return own | {None: config.budget}


def _followed(now: Budget, was: Budget | None, new: Budget | None, *, overall: bool) -> Budget:
    """The section in force, with what differs between two readings of the file."""
    if was is None or new is None:
        return now
    fields = _FOLLOWED_OVERALL if overall else _FOLLOWED
    return now.model_copy(update={f: getattr(new, f) for f in fields if getattr(was, f) != getattr(new, f)})


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def lost_before(config: Config, now: Seconds) -> Seconds:
    """The moment before which a hold that is still open belongs to a process that died, unless it is a LONG_HOLD."""
    remotes = (config.remote, *config.remote.additional_providers, *config.teachers)
    return now - 2 * max(remote.timeout for remote in remotes) - _GRACE


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
