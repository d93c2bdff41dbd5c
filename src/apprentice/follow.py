"""The live states of all tasks follow the store: a fold over what any process recorded there, in the store's order."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping

from apprentice import lineage
from apprentice.errors import ConfigError
from apprentice.live import Live
from apprentice.types import Changes, Evidence, Seconds, Store, Version

_SNAPSHOT_EVERY = 500  # Records between two snapshots of a live state


class Follower:
    """One for all tasks of an Apprentice, on one event loop. What a failing store does not take is tried again next time."""

    def __init__(self, tasks: Mapping[str, Live], store: Store, clock: Callable[[], Seconds]) -> None:
        self._tasks = tasks
        self._store = store
        self._clock = clock
        self._under_way: asyncio.Event | None = None  # one fold at a time; set when it is over

    async def reach(self, live: Live, seq: int) -> None:
        """Return when the task has folded its Record of this number. Raises StoreError.

        Requests whose Records were written together ask at the same moment, and the first one's fold is everybody's.
        """
        while seq > live.seq:
            if self._under_way is not None:
                await self._under_way.wait()
            else:
                await self.catch_up()  # it begins after the Record was written, so it finds all that there is to find
                break

    async def catch_up(self) -> None:
        """Fold what was recorded until now, by whichever process. Raises StoreError."""
        while self._under_way is not None:
            await self._under_way.wait()
        self._under_way = over = asyncio.Event()
        try:
            if await self._fold():
                await self._fold()
        finally:
            self._under_way = None
            over.set()

    async def _fold(self) -> bool:
        """Whether a trial ended by it, so that there is more to fold."""
        changes = await self._store.changes(min(live.seq for live in self._tasks.values()))
        last = changes.evidence[-1].seq if changes.evidence else 0
        rows: dict[str, list[Evidence]] = defaultdict(list)
        for row in changes.evidence:
            rows[row.task].append(row)
        for name, live in self._tasks.items():
            await self._fold_task(live, rows.get(name, []), changes, last)
        trials = [live.ramp.trial for live in self._tasks.values()]
        return any(trial is not None and trial.verdict is not None for trial in trials)

    async def _fold_task(self, live: Live, rows: list[Evidence], changes: Changes, last: int) -> None:
        name = live.config.name
        new = [row for row in rows if row.seq > live.seq]
        promotions = [made for made in changes.promotions if made.task == name]
        if new or promotions:
            if {made.version for made in promotions} - live.known.keys():
                live.know(await self._store.versions(name))
            live.fold(new, promotions)
        live.seq = max(live.seq, last)
        live.mode = changes.modes.get(name)
        champion = changes.champions.get(name)
        if champion is not None and (live.champion is None or champion.id != live.champion.id):
            self._adopt(live, champion)
        await self._try_out(live, changes.canaries.get(name))
        if live.unsaid:
            await self._say(live)
        if (trial := live.ramp.trial) is not None and trial.verdict is not None:
            await lineage.settle(self._store, name, trial, self._clock())
        if live.seq - live.saved_at >= _SNAPSHOT_EVERY:
            await self.save(live)

    async def save(self, live: Live) -> None:
        """Keep a snapshot, so that a restart folds only what came after it."""
        await self._store.save_state(live.config.name, live.seq, live.state.to_json())
        live.saved_at = live.seq

    async def _say(self, live: Live) -> None:
        """Record what the fold found."""
        while live.unsaid:
            event, version = live.unsaid[0]
            await self._store.add_event(event)
            if event.name == "CERTIFIED" and version is not None:
                await self._store.certify(event.task, version, event.at)
            live.unsaid.popleft()

    def _adopt(self, live: Live, champion: Version) -> None:
        """Serve another version from the next request on; requests in flight finish with the one they began with.

        One that cannot be loaded is reported once, and the remote answers: the version before it is no longer watched.
        """
        try:
            live.shelf.put(champion)
        except ConfigError as error:
            live.report("VERSION_UNUSABLE", self._clock(), champion.id, str(error))
        live.champion, live.urgent = champion, False

    async def _try_out(self, live: Live, canary: Version | None) -> None:
        """Have the canary beside the champion. One that cannot be loaded is no longer tried out, by anybody."""
        before, live.canary = live.canary, canary
        if (before and before.id) == (canary and canary.id):
            return
        try:
            live.shelf.try_out(canary)
        except ConfigError as error:
            assert canary is not None
            why = f"it cannot be loaded: {error}"
            await lineage.drop(self._store, live.config.name, canary.id, live.ramp.number, at=self._clock(), why=why)
