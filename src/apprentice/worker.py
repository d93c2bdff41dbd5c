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

from apprentice import plugins
from apprentice.config import Config
from apprentice.errors import ApprenticeError
from apprentice.learn import due, learn
from apprentice.types import Seconds, Store, Version


async def once(config: Config, task: str, *, force: bool = False) -> Version | None:
    """The version that one cycle made, None if none was due. Raises what `learn` raises."""
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    try:
        return await learn(config, task, store, clock=time.time, owner=owner(), force=force)
    finally:
        await store.close()


async def forever(config: Config, *, every: Seconds) -> None:
    """Teach whatever is due, looking again every so many seconds."""
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    try:
        while True:
            for task in config.tasks:
                if await due(config, task, store):
                    await learn(config, task.name, store, clock=time.time, owner=owner())
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
    except ApprenticeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  (this is a command)
        return 1
    print("no cycle is due" if version is None else f"{version.id}: {version.state}")  # noqa: T201  (this is a command)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
