"""Commands that answer requests: run."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterable

from apprentice import config as configuration
from apprentice.cli.terminal import Command, code_of, json_of, print_json, promise
from apprentice.config import Config
from apprentice.engine import Apprentice
from apprentice.errors import BudgetError, DeadlineExceeded, InvalidRequest, ModelError


def _run(parsed: argparse.Namespace) -> int:
    """Answer one request, or JSON lines from standard input."""
    config = configuration.load(parsed.config)
    if sys.stderr.isatty():
        print(f"{parsed.task}: {promise(config, parsed.task)}", file=sys.stderr)
    return asyncio.run(_run_all(config, parsed.task, parsed.input, parsed.deadline))


async def _run_all(config: Config, task: str, given: str, deadline: float | None) -> int:
    """One JSON line out for each line in; a line that fails says so in its place, and the exit code is the last failure's."""
    code = 0
    async with Apprentice(config) as app:
        for text in _lines(given):
            try:
                result = await app.arun(task, json_of(text), deadline=deadline)
            except (InvalidRequest, BudgetError, ModelError, DeadlineExceeded) as error:
                if given != "-":
                    raise
                code = code_of(error)
                print_json({"error": type(error).__name__, "message": str(error), "hint": error.hint})
                continue
            print_json(
                {
                    "output": result.output,
                    "source": result.source,
                    "request_id": result.request_id,
                    "version": result.version,
                    "confidence": result.confidence,
                    "cost_usd": result.cost / 1e6,
                    "reason": result.decision.reason,
                }
            )
    return code


def _lines(given: str) -> Iterable[str]:
    return (line for line in sys.stdin if line.strip()) if given == "-" else [given]


COMMANDS = (
    Command(
        "run",
        _run,
        """apprentice run classify --input '{"text": "where is my card?"}'""",
        (
            ("task", {}),
            ("--input", {"default": "-", "metavar": "JSON", "help": "one input; `-` (the default) reads one a line"}),
            ("--deadline", {"type": float, "metavar": "SECONDS", "help": "for each request"}),
        ),
    ),
)
