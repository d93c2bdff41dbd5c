"""Commands that teach: feedback, learn, worker."""

from __future__ import annotations

import argparse
import asyncio
import time

from apprentice import config as configuration
from apprentice import feedback, worker
from apprentice.cli.terminal import Command, Either, above_zero, json_of, print_json, with_store
from apprentice.config import Config
from apprentice.types import Correction, Store


def _feedback(parsed: argparse.Namespace) -> int:
    """Say that the answer to a request was right, or what would have been: it outweighs every model's label."""

    async def say(config: Config, store: Store) -> Correction:
        return await feedback.give(
            config,
            store,
            parsed.request_id,
            parsed.action or "corrected",
            at=time.time(),
            target=None if parsed.corrected is None else json_of(parsed.corrected, "corrected"),
            by=parsed.by,
            comment=parsed.comment,
        )

    said = with_store(parsed, say)
    if parsed.json:
        print_json(said.model_dump(mode="json"))
    else:
        print(f"{said.request_id}: {said.action}")
    return 0


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


def _action(name: str, about: str) -> dict[str, str]:
    return {"dest": "action", "action": "store_const", "const": name, "help": about}


COMMANDS = (
    Command(
        "feedback",
        _feedback,
        """apprentice feedback 3f0c5e… --corrected '{"label": "spam"}' --by ann""",
        (
            ("request_id", {}),
            Either(
                (
                    ("--corrected", {"metavar": "JSON", "help": "the whole right output"}),
                    ("--approve", _action("approved", "what was served is right")),
                    ("--withdraw", _action("withdrawn", "take back what was said")),
                )
            ),
            ("--by", {"default": "", "metavar": "NAME", "help": "who says so"}),
            ("--comment", {"default": ""}),
        ),
    ),
    Command("learn", _learn, "apprentice learn classify", (("task", {}),)),
    Command(
        "worker",
        _worker,
        "apprentice worker",
        (
            (
                "--every",
                {
                    "type": above_zero,
                    "default": 60.0,
                    "metavar": "SECONDS",
                    "help": "between looks; default: %(default)s",
                },
            ),
        ),
    ),
)
