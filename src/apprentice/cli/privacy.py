"""The command that makes the store forget somebody."""

from __future__ import annotations

import argparse
import time

from apprentice.cli.terminal import Command, print_json, with_store
from apprentice.config import Config
from apprentice.erasure import erase
from apprentice.types import Forgotten, Store


def _erase(parsed: argparse.Namespace) -> int:
    """Erase every word of the requests that were tagged with a subject, and say which versions learned from them."""

    async def forget(config: Config, store: Store) -> list[Forgotten]:
        return await erase(config, store, parsed.subject, at=time.time(), task=parsed.task, dry_run=parsed.dry_run)

    found = with_store(parsed, forget)
    if parsed.json:
        print_json({"dry_run": parsed.dry_run, "erased": [one.model_dump(mode="json") for one in found]})
        return 0
    for one in found:
        print(_line(one, "would be" if parsed.dry_run else "were"))
    if not found:
        print("no request of this subject has words")
    return 0


def _line(one: Forgotten, verb: str) -> str:
    again = f"teach again with `apprentice learn {one.task}`, then remove its files"
    about = [f"{one.records:,} requests {verb} erased"]
    about += [f"{one.corrections:,} corrections"] if one.corrections else []
    about += [f"{one.labels:,} teachers' labels"] if one.labels else []
    lines = [f"{one.task}: {', '.join(about)}"]
    if one.versions:
        lines.append(f"  {', '.join(one.versions)} may have learned from them: {again}")
    if one.teaching:
        lines.append("  the version that is being made may learn from them, and will be marked")
    return "\n".join(lines)


COMMANDS = (
    Command(
        "erase",
        _erase,
        "apprentice erase --subject customer-4711 --dry-run",
        (
            ("--subject", {"required": True, "metavar": "ID", "help": "the value of the tag `subject`"}),
            ("--task", {"help": "of this task only; otherwise of all"}),
            ("--dry-run", {"action": "store_true", "help": "only say what there is"}),
        ),
    ),
)
