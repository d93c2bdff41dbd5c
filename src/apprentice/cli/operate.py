"""Commands for whoever runs it: mode and resume change what is served, doctor looks whether anything is wrong."""

from __future__ import annotations

import argparse
import asyncio
import time

from apprentice.cli.terminal import Command, duration, mode_text, print_json, with_store
from apprentice.config import Config
from apprentice.doctor import Finding, examine, worst
from apprentice.lineage import set_mode
from apprentice.purse import resume
from apprentice.types import Mode, Store


def _mode(parsed: argparse.Namespace) -> int:
    """Let the remote alone answer a task, for a time or until `auto`."""

    async def change(config: Config, store: Store) -> Mode:
        config.task(parsed.task)
        return await set_mode(store, parsed.task, parsed.mode, at=time.time(), seconds=parsed.seconds)

    mode = with_store(parsed, change)
    if parsed.json:
        print_json({"task": parsed.task} | mode.model_dump(mode="json"))
    else:
        print(f"{parsed.task}: {mode_text(mode)}")
    return 0


def _resume(parsed: argparse.Namespace) -> int:
    """Ask a model again that was suspended because it billed more than its price list allows."""

    async def change(_: Config, store: Store) -> None:
        await resume(store, parsed.model, at=time.time())

    with_store(parsed, change)
    if parsed.json:
        print_json({"model": parsed.model, "suspended": False})
    else:
        print(f"{parsed.model} is asked again")
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    """Find what would go wrong: the machine, the store, prices and caps, local servers. Spends and starts nothing."""
    found = asyncio.run(examine(parsed.config, now=time.time()))
    if parsed.json:
        print_json([finding.model_dump(mode="json") for finding in found])
    else:
        print("\n".join(map(_finding_text, found)))
        counts = {state: sum(finding.state == state for finding in found) for state in ("problem", "warning")}
        print(", ".join(f"{count} {state}{'' if count == 1 else 's'}" for state, count in counts.items()))
    return int(worst(found) == "problem")


def _finding_text(finding: Finding) -> str:
    fix = f"\n{'':9}-> {finding.fix}" if finding.fix else ""
    return f"{finding.state:8} {finding.subject}: {finding.message}{fix}"


COMMANDS = (
    Command(
        "mode",
        _mode,
        "apprentice mode classify remote --for 2h",
        (
            ("task", {}),
            ("mode", {"choices": ("remote", "auto")}),
            (
                "--for",
                {
                    "dest": "seconds",
                    "type": duration,
                    "metavar": "TIME",
                    "help": "90s, 30m, 2h, 7d; else until `auto`",
                },
            ),
        ),
    ),
    Command("doctor", _doctor, "apprentice doctor --config FILE"),
    Command("resume", _resume, "apprentice resume openai/gpt-4o-mini", (("model", {}),)),
)
