"""Runs teaching cycles: one in a process that the engine starts, or all that are due, for ever; then it collects batches, too.

Either way it delivers alerts meanwhile.

python -m apprentice.worker --once TASK < configuration.json
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from random import Random

from apprentice import feedback, plugins
from apprentice.alerts import Courier
from apprentice.bulk import Bulk
from apprentice.config import Config
from apprentice.erasure import expire
from apprentice.errors import ApprenticeError, StoreError
from apprentice.learn import due, learn
from apprentice.types import Event, Seconds, Store, Version


async def once(config: Config, task: str, *, force: bool = False) -> Version | None:
    """The version that one cycle made, None if none was due. Raises what `learn` raises."""
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    try:
        post = courier(config, store)
        async with post.at_work():
            version = await learn(config, task, store, clock=time.time, owner=owner(), force=force)
        await expire(config, store, now=time.time())
        await post.deliver()
        return version
    finally:
        await store.close()


async def forever(config: Config, *, every: Seconds) -> None:
    """Collect the batches that have ended and teach whatever is due, looking again every so many seconds.

    A cycle that fails is recorded as an event; it is tried again when more is known, and the other tasks go on.
    """
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    failed: dict[str, int] = {}  # by task: how many labels there were
    try:
        async with courier(config, store).at_work() as post:
            while not post.done():  # it ends only when the store fails, and says so where it was begun
                await collect(config, store)
                await expire(config, store, now=time.time())
                for task in config.tasks:
                    await _teach(config, task.name, store, failed)
                await asyncio.wait([post], timeout=every)
    finally:
        await store.close()


async def _teach(config: Config, task: str, store: Store, failed: dict[str, int]) -> None:
    labels = await feedback.known(store, task)
    if labels == failed.get(task) or not await due(config, config.task(task), store, now=time.time()):
        return
    try:
        await learn(config, task, store, clock=time.time, owner=owner())
    except StoreError:
        raise
    except ApprenticeError as error:
        failed[task] = labels
        said = f"{error}; serving goes on as before"
        await store.add_event(Event(name="TRAINING_FAILED", task=task, at=time.time(), message=said))


def courier(config: Config, store: Store) -> Courier:
    """What brings this store's events to the configured sinks, in this process."""
    dice = Random()  # noqa: S311 - it spreads the moments of retries
    return Courier(config, store, clock=time.time, owner=owner(), dice=dice)


async def collect(config: Config, store: Store) -> None:
    """Look once at every open batch. What is in the way of one is recorded as an event, once a day: teaching goes on."""
    waiting = await store.batches(open=True)
    if not waiting:
        return  # whoever sends none needs no key here
    at = time.time()
    try:
        bulk = Bulk(config, store, clock=time.time, owner=owner())
        try:
            await bulk.open()
            seen = await bulk.collect()
        finally:
            await bulk.close()
    except StoreError:
        raise
    except ApprenticeError as error:
        seen = [batch.model_copy(update={"problem": str(error)}) for batch in waiting]
    for batch in seen:
        if batch.open and batch.problem:
            key = f"BATCH_NOT_COLLECTED/{batch.id}/{at // 86_400:.0f}"
            said = f"batch {batch.id} is not collected yet: {batch.problem}"
            await store.add_event(Event(name="BATCH_NOT_COLLECTED", task=batch.task, at=at, message=said, key=key))


def owner() -> str:
    """Who holds a lease: a name that a person can find the process by."""
    return f"{socket.gethostname()}/{os.getpid()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m apprentice.worker", description=__doc__)
    parser.add_argument("--once", metavar="TASK", required=True, help="run one teaching cycle of this task")
    task = parser.parse_args(arguments).once
    try:
        config = Config.model_validate_json(sys.stdin.buffer.read())
        version = asyncio.run(once(config, task))
    except ApprenticeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  (this is a command)
        return 1
    print("no cycle is due" if version is None else f"{version.id}: {version.state}")  # noqa: T201  (this is a command)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
