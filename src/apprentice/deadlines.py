"""The deadlines of what an event loop waits for, with one timer for all of them.

Nearly everything ends long before its deadline. A timer for each, set and taken back, costs as much as reading an answer.
"""

from __future__ import annotations

import asyncio
import threading

from apprentice.types import Seconds


class Watch:
    """The deadlines of one event loop.

    Each is an `asyncio.timeout(None)` that was entered; as with any other, TimeoutError is raised where it is left.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._ends: dict[asyncio.Timeout, Seconds] = {}
        self._timer: asyncio.TimerHandle | None = None

    def put(self, limit: asyncio.Timeout, left: Seconds) -> None:
        """So many seconds are left from now on. To be put again, or dropped, before the limit is left."""
        self._ends[limit] = end = self.loop.time() + left
        if self._timer is None or end < self._timer.when():
            self._ring_at(end)

    def drop(self, limit: asyncio.Timeout) -> None:
        """It is over before its deadline, or too late."""
        self._ends.pop(limit, None)

    def _ring_at(self, end: Seconds) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(end, self._ring)

    def _ring(self) -> None:
        self._timer, now = None, self.loop.time()
        for limit in [limit for limit, end in self._ends.items() if end <= now]:
            self.drop(limit)
            limit.reschedule(now)
        if self._ends:
            self._ring_at(min(self._ends.values()))


class _Here(threading.local):
    watch: Watch | None = None


_HERE = _Here()


def here() -> Watch:
    """That of the event loop which runs here."""
    loop = asyncio.get_running_loop()
    if _HERE.watch is None or _HERE.watch.loop is not loop:
        _HERE.watch = Watch(loop)
    return _HERE.watch
