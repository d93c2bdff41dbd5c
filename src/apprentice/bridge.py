"""Synchronous callers, asynchronous core: one event loop for both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

from apprentice.errors import ApprenticeError


class Bridge:
    """Runs everything on one event loop: the caller's, when it entered `async with`, else one in a thread of its own.

    One loop, because the HTTP client, the store and the locks belong to the loop that they were first used on.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()

    def adopt(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use the caller's loop from now on, unless one is in use already."""
        with self._guard:
            if self._loop is None:
                self._loop = loop

    async def here[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` on the loop, from whichever loop the caller is on."""
        if asyncio.get_running_loop() is self._loop:  # it runs, so it is open; and which loop it is never changes
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._home(work)))

    def wait[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Block until `work` is done on the loop."""
        loop = self._home(work)
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            work.close()
            raise ApprenticeError(
                "a blocking call inside the event loop that runs this Apprentice would wait for itself",
                hint="inside `async with Apprentice(…) as app`, use `await app.arun(…)`",
            )
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # a KeyboardInterrupt must not leave the request running
            raise

    def stop(self) -> None:
        """End the thread, if there is one."""
        with self._guard:
            loop, thread = self._loop, self._thread
            self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _home(self, work: Coroutine[Any, Any, Any]) -> asyncio.AbstractEventLoop:
        with self._guard:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="apprentice", daemon=True)
                self._thread.start()
            if self._loop.is_closed():
                work.close()  # nobody will await it
                raise ApprenticeError("this Apprentice is closed", hint="make a new one")
            return self._loop
