"""The command that takes over other tools' logs: import."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from apprentice import config as configuration
from apprentice import imports, licence, plugins
from apprentice.cli.terminal import Command, print_json, when
from apprentice.config import Config
from apprentice.errors import ConfigError
from apprentice.importers import Importer
from apprentice.imports import Forecast, Line, Summary
from apprentice.types import Store


def _import(parsed: argparse.Namespace) -> int:
    """Turn other tools' logs into Examples that teach, as far as the terms of who answered let them. With --dry-run, say
    what that would bring, what a first student would reach and what it would save, and change nothing."""
    if parsed.dry_run and parsed.remove:
        raise ConfigError(
            "--dry-run and --remove are two things", hint="a dry run without --remove says what the files bring"
        )
    config = configuration.load(parsed.config)
    importer: Importer = plugins.build("importers", parsed.importer.replace("-", "_"), **_settings(parsed))
    return asyncio.run(_taken(parsed, config, importer))


async def _taken(parsed: argparse.Namespace, config: Config, importer: Importer) -> int:
    task = config.task(parsed.task)
    rows = imports.read(
        importer,
        task,
        parsed.files,
        imports.Settings(
            gold=parsed.gold,
            few_shot=parsed.few_shot,
            pattern=parsed.input_pattern,
            model=parsed.model,
            provider=parsed.provider,
            at=parsed.at,
        ),
    )
    today = licence.day(time.time())
    forecast: Forecast | None = None
    store = _store(parsed, config)
    try:
        if parsed.remove:
            assert store is not None  # only a dry run does without one
            return _told_removed(parsed, await imports.take_back(store, task, rows))
        known = [] if store is None else await store.examples(task.name)
        tally = imports.Tally(config, task, (example.request_id or "" for example in known), today)
        if parsed.dry_run:
            for row in rows:
                tally.add(row)
            summary = tally.summary()
            forecast = await imports.forecast(config, task, tally.sample(), summary, today=today)
        else:
            assert store is not None
            summary = await imports.keep(store, task, rows, tally)
    finally:
        if store is not None:
            await store.close()
    if parsed.json:
        told = summary.model_dump(mode="json") | {"kept": not parsed.dry_run}
        print_json(told | {"forecast": None if forecast is None else forecast.model_dump(mode="json")})
    else:
        print("\n".join(map(_plain, _text(summary, forecast))))
    return 0


def _store(parsed: argparse.Namespace, config: Config) -> Store | None:
    """The store, which is made where there is none; None for a dry run without one."""
    if parsed.dry_run and config.store.backend == "sqlite" and not Path(config.store.path).exists():
        return None
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    return store


def _told_removed(parsed: argparse.Namespace, removed: int) -> int:
    if parsed.json:
        print_json({"task": parsed.task, "removed": removed})
    else:
        print(f"{parsed.task}: {removed:,} Examples removed; versions that learned from them stay")
    return 0


def _settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The importer's own settings: those that were given."""
    given = {"map": dict(parsed.map), "requests": parsed.requests, "function": parsed.function}
    given |= {"variant": parsed.variant, "delimiter": parsed.delimiter}
    return {name: value for name, value in given.items() if value}


def _text(found: Summary, forecast: Forecast | None) -> list[str]:
    lines = [
        f"{found.task}: {found.rows:,} rows, {found.usable:,} usable, {found.new:,} new; {found.inputs:,} different inputs; "
        f"{found.may_train:,} may train"
    ]
    lines += [f"  {line.rows:>9,}  {_line(line)}" for line in found.lines]
    if found.others:
        lines.append(f"  {found.others:>9,}  of other models or for other reasons")
    if found.refused:
        lines.append("  of no use:")
        lines += [f"  {rows:>9,}  {reason}" for reason, rows in found.refused.items()]
        lines += [f"             {shown}" for shown in found.shown]
    if found.first is not None and found.last is not None:
        rate = "" if found.rows_a_day is None else f", {found.rows_a_day:,.1f} rows a day"
        lines.append(f"  from       {when(found.first)} to {when(found.last)}{rate}")
    if found.cost is not None:
        lines.append(f"  cost       ${found.cost / 1e6:.6f} an answer, by {found.priced:,} rows")
    if forecast is None:
        lines.append(f"{found.new:,} Examples kept; `apprentice learn {found.task}` teaches with them")
    else:
        lines += _forecast_text(forecast)
        lines.append("nothing was kept: it was a dry run")
    return lines


def _line(line: Line) -> str:
    who = (
        "people"
        if not line.model and line.may_train
        else f"{line.model or 'no model told'}, {line.teacher or 'nobody told where'}"
    )
    return f"{who}: may train" if line.may_train else f"{who}: may not train: {line.reason}; {line.fix}"


def _forecast_text(found: Forecast) -> list[str]:
    if found.agreement is None:
        return [f"  student    not tried: {found.problem}"]
    lines = [
        f"  student    agrees with {found.agreement:.3f} [{found.lower:.3f}, {found.upper:.3f}] of {found.n:,} answers that it "
        f"had not seen; always the commonest answer: {found.majority:.3f}",
        f"  local      could answer {found.local_share or 0:.0%} at the agreement of {found.target:g} that the task asks for",
    ]
    if found.saving_a_month is not None:
        lines.append(
            f"  saving     about ${found.saving_a_month / 1e6:,.2f} a month at the rate and price of the log; no promise"
        )
    return lines


def _plain(text: str) -> str:
    """The line without what a log could do to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _pair(text: str) -> tuple[str, str]:
    target, sign, column = text.partition("=")
    if not (target and sign and column):
        raise argparse.ArgumentTypeError(f"{text!r} is not TARGET=COLUMN, such as input.text=question")
    return target, column


def _day(text: str) -> float:
    try:
        return imports.day_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


COMMANDS = (
    Command(
        "import",
        _import,
        "apprentice import --from litellm spend.jsonl --task classify --dry-run",
        (
            ("files", {"nargs": "+", "type": Path, "metavar": "FILE", "help": "plain or gzip"}),
            (
                "--from",
                {
                    "dest": "importer",
                    "required": True,
                    "metavar": "NAME",
                    "help": "openai-jsonl, litellm, langfuse, tensorzero, otel, csv, or one that is installed",
                },
            ),
            ("--task", {"required": True, "metavar": "NAME"}),
            ("--dry-run", {"action": "store_true", "help": "say what it would bring, and change nothing"}),
            ("--remove", {"action": "store_true", "help": "take back what the same command brought"}),
            (
                "--gold",
                {"action": "store_true", "help": "people wrote the answers: rows that name a model stay that model's"},
            ),
            (
                "--few-shot",
                {"action": "store_true", "help": "turns before the last message are examples, not a dialogue"},
            ),
            (
                "--input-pattern",
                {"default": "", "metavar": "FRAME", "help": 'of the prompts: "Sort this mail: {text}"'},
            ),
            ("--model", {"default": "", "metavar": "NAME", "help": "who answered, where a row does not tell"}),
            ("--provider", {"default": "", "metavar": "NAME[@HOST]", "help": "where, where a row does not tell"}),
            (
                "--date",
                {"dest": "at", "type": _day, "default": 0.0, "help": "when, where a row does not tell: 2026-03-01"},
            ),
            (
                "--map",
                {
                    "action": "append",
                    "default": [],
                    "type": _pair,
                    "metavar": "TARGET=COLUMN",
                    "help": "csv: input.text=question output.label=answer model=llm at=day; once for each",
                },
            ),
            ("--delimiter", {"metavar": "SIGN", "help": "csv: between cells, when no comma"}),
            ("--requests", {"metavar": "FILE", "help": "openai-jsonl: the file that a batch was made from"}),
            ("--function", {"metavar": "NAME", "help": "tensorzero: rows of this function alone"}),
            ("--variant", {"metavar": "NAME", "help": "tensorzero: rows of this variant alone"}),
        ),
    ),
)
