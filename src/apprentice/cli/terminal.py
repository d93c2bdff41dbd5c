"""What every command shares: how it is declared, how it reads its arguments and prints what it found, and exit codes."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from apprentice import config as configuration
from apprentice import decide, plugins
from apprentice.config import Config
from apprentice.errors import ApprenticeError, BudgetError, ConfigError, InvalidRequest, ModelError, StoreError
from apprentice.types import Json, Mode, Store

_CODES: list[tuple[type[ApprenticeError], int]] = [
    (ConfigError, 2),
    (InvalidRequest, 3),
    (BudgetError, 4),
    (ModelError, 5),
    (StoreError, 6),
    (ApprenticeError, 1),
]


type Argument = tuple[str, dict[str, Any]]


class Either(NamedTuple):
    """Flags of which exactly one is needed."""

    flags: tuple[Argument, ...]


class Command(NamedTuple):
    """One command: its help is the docstring of `run`."""

    name: str
    run: Callable[[argparse.Namespace], int]
    example: str
    arguments: tuple[Argument | Either, ...] = ()
    configured: bool = True  # whether it reads a configuration file


def with_store[T](parsed: argparse.Namespace, read: Callable[[Config, Store], Awaitable[T]]) -> T:
    config = configuration.load(parsed.config)
    if not Path(config.store.path).exists() and config.store.backend == "sqlite":
        raise ConfigError(
            f"there is no store at {config.store.path} yet", hint="answer a request first: apprentice run"
        )

    async def opened() -> T:
        store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
        try:
            return await read(config, store)
        finally:
            await store.close()

    return asyncio.run(opened())


def print_json(value: Any, *, indent: int | None = None) -> None:
    print(json.dumps(value, ensure_ascii=True, indent=indent), flush=True)


def json_of(text: str, what: str = "input") -> Json:
    """The value of an argument named --`what`. Raises InvalidRequest."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the {what} is not JSON: {error}", hint=f"""say --{what} '{{"field": "…"}}'""") from error


def code_of(error: ApprenticeError) -> int:
    return next(code for kind, code in _CODES if isinstance(error, kind))


def fail(error: ApprenticeError, *, as_json: bool) -> int:
    if as_json:
        print_json({"error": type(error).__name__, "message": str(error), "hint": error.hint})
    else:
        print(f"apprentice: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
    return code_of(error)


def when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def duration(text: str) -> float:
    """Seconds of a time such as 90s, 30m, 2h or 7d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text, re.ASCII)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 30m, 2h or 7d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def dollars(text: str) -> float:
    return above_zero(text) * 1e6


def mode_text(mode: Mode) -> str:
    if mode.mode == "auto":
        return "auto: its state decides who answers"
    return "the remote alone answers until " + ("`auto`" if mode.until is None else when(mode.until))


def promise(config: Config, name: str) -> str:
    task = config.task(name)
    return decide.promise((task.sampling or config.sampling).min_floor, task.confidence_thresholds.phase2_to_phase3)
