"""Commands that teach: learn, worker."""

from __future__ import annotations

import argparse
import asyncio

from apprentice import config as configuration
from apprentice import worker
from apprentice.cli.terminal import Command, print_json


def _learn(parsed: argparse.Namespace) -> int:
    """Run one teaching cycle of a task now."""
    version = asyncio.run(worker.once(configuration.load(parsed.config), parsed.task, force=True))
    assert version is not None  # a forced cycle makes a version or raises
    if parsed.json:
        print_json(version.model_dump(mode="json", exclude={"metrics": {"confidences"}}))
    else:
        print(f"{version.id}: {version.state}, trained on {version.trained_on} examples: {version.metrics['reason']}")
    return 0


def _worker(parsed: argparse.Namespace) -> int:
    """Run teaching cycles as they become due, until stopped."""
    asyncio.run(worker.forever(configuration.load(parsed.config), every=parsed.every))
    return 0


COMMANDS = (
    Command("learn", _learn, "apprentice learn classify", (("task", {}),)),
    Command(
        "worker",
        _worker,
        "apprentice worker",
        (
            (
                "--every",
                {"type": float, "default": 60.0, "metavar": "SECONDS", "help": "between looks; default: %(default)s"},
            ),
        ),
    ),
)
