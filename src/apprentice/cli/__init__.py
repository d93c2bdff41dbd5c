"""The command line. Every command takes `--json`, prints results on standard output and everything else on standard error.

Exit codes: 0 done, 1 something went wrong that no other code says, 2 the command line or the configuration is wrong,
3 the request is wrong, 4 the budget, 5 a model, 6 the store.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apprentice.cli import (
    advise,
    alerts,
    answer,
    begin,
    dataset,
    imports,
    models,
    operate,
    privacy,
    serve,
    teach,
    teachers,
    versions,
    watch,
)
from apprentice.cli.terminal import Command, Either, fail
from apprentice.errors import ApprenticeError

COMMANDS: tuple[Command, ...] = (
    *begin.COMMANDS,
    *answer.COMMANDS,
    *watch.COMMANDS,
    *operate.COMMANDS,
    *privacy.COMMANDS,
    *alerts.COMMANDS,
    *teach.COMMANDS,
    *versions.COMMANDS,
    *advise.COMMANDS,
    *dataset.COMMANDS,
    *imports.COMMANDS,
    *models.COMMANDS,
    *teachers.COMMANDS,
    *serve.COMMANDS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parsed = parser().parse_args(arguments)
    try:
        code: int = parsed.command(parsed)
    except ApprenticeError as error:
        return fail(error, as_json=getattr(parsed, "json", False))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0  # the reader of our output has seen enough
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="apprentice",
        description="An expensive remote LLM teaches a small local model, and is withdrawn as the local one proves itself.",
        epilog="Begin with `apprentice demo`, then `apprentice init`. Exit codes: 0 done, 1 failed, 2 configuration, "
        "3 request, 4 budget, 5 model, 6 store.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        about = (command.run.__doc__ or "").strip()
        made = commands.add_parser(command.name, help=about, description=about, epilog=f"example: {command.example}")
        made.set_defaults(command=command.run)
        made.add_argument("--json", action="store_true", help="print JSON and nothing else")
        for argument in command.arguments:
            if isinstance(argument, Either):
                either = made.add_mutually_exclusive_group(required=True)
                for flag, settings in argument.flags:
                    either.add_argument(flag, **settings)
            else:
                name, settings = argument
                made.add_argument(name, **settings)
        if command.configured:
            file: dict[str, Any] = {"type": Path, "default": Path("apprentice.yaml"), "metavar": "FILE"}
            made.add_argument("--config", help="default: %(default)s", **file)
    return top
