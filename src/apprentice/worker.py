"""Runs teaching cycles: one in a process that the engine starts, or all that are due, for ever.

    python -m apprentice.worker --once TASK < configuration.json
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time

from apprentice import decide, plugins
from apprentice.config import Config
from apprentice.errors import ApprenticeError, StoreBusy
from apprentice.learn import learn
from apprentice.types import Seconds, Store, Version


async def once(config: Config, task: str) -> Version:
    """The version that one cycle made. Raises what `learn` raises."""
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    try:
        return await learn(config, task, store, clock=time.time, owner=owner())
    finally:
        await store.close()


async def due(config: Config, store: Store) -> list[str]:
    """The tasks that have learned enough since their last version for another cycle."""
    found = []
    for task in config.tasks:
        labels = await store.count(task.name, labelled=True)
        before = max((v.metrics.get("labels", 0) for v in await store.versions(task.name)), default=0)
        first = task.confidence_thresholds.phase1_to_phase2
        local = task.local or config.local
        if decide.needs_training(labels - before, before, local.fine_tune_batch_size, first):
            found.append(task.name)
    return found


async def forever(config: Config, *, every: Seconds) -> None:
    """Teach whatever is due, looking again every so many seconds."""
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    try:
        while True:
            for task in await due(config, store):
                try:
                    await learn(config, task, store, clock=time.time, owner=owner())
                except StoreBusy:
                    continue  # another worker is at it
            await asyncio.sleep(every)
    finally:
        await store.close()


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
    except StoreBusy as error:
        print(error, file=sys.stderr)  # noqa: T201  (this is a command)
        return 0
    except ApprenticeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"{version.id}: {version.state}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
