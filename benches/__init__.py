"""The experiments behind the numbers in the documents: `python -m benches.NAME [--quick] [--json] [--data DIR]`.

Prints a table for people, or with `--json` one object and nothing else. Ends with 1 when a bar does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple


class Figure(NamedTuple):
    """One measured number, the bar it is held to (None: it only informs) and whether it holds."""

    name: str
    value: float
    unit: str
    bar: str | None
    holds: bool


class Options(NamedTuple):
    """How a bench was asked to run."""

    quick: bool
    data: Path | None
    say: Callable[[str], None]  # progress, for people; silent with --json


def at_most(name: str, value: float, bar: float, unit: str = "") -> Figure:
    """A figure that holds while it does not exceed its bar; one that is not a number never holds."""
    return Figure(name, value, unit, f"<= {bar:g}", value <= bar)


def at_least(name: str, value: float, bar: float, unit: str = "") -> Figure:
    """A figure that holds while it reaches its bar; one that is not a number never holds."""
    return Figure(name, value, unit, f">= {bar:g}", value >= bar)


def shown(name: str, value: float, unit: str = "") -> Figure:
    """A figure without a bar."""
    return Figure(name, value, unit, None, True)


def run(bench: str, measure: Callable[[Options], list[Figure]], argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status: 1 when a bar does not hold."""
    parser = argparse.ArgumentParser(prog=f"python -m benches.{bench}")
    parser.add_argument("--quick", action="store_true", help="the short form that the tests run")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of data that does not ship")
    given = parser.parse_args(argv)

    def say(line: str) -> None:
        if not given.json:
            print(line, file=sys.stderr, flush=True)

    started = time.perf_counter()
    figures = measure(Options(given.quick, given.data, say))
    seconds = round(time.perf_counter() - started, 1)
    if given.json:
        report = {"bench": bench, "commit": _commit(), "machine": _machine(), "seconds": seconds}
        print(json.dumps({**report, "figures": [figure._asdict() for figure in figures]}, ensure_ascii=False))
    else:
        print(_table(figures))
        print(f"{bench} at {_commit()}, {seconds} s on {_machine()}")
    return 0 if all(figure.holds for figure in figures) else 1


def _table(figures: Sequence[Figure]) -> str:
    width = max((len(figure.name) for figure in figures), default=0)
    lines = []
    for name, value, unit, bar, holds in figures:
        verdict = "" if bar is None else f"{bar:>10}  {'holds' if holds else 'DOES NOT HOLD'}"
        lines.append(f"{name:<{width}}  {value:>10.4g} {unit:<10} {verdict}".rstrip())
    return "\n".join(lines)


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _commit() -> str:
    """The commit that was measured, with a plus sign when the tree has changes; "unknown" outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
