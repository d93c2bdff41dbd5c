"""Commands for the first hour: demo, init, check, licence, schema."""

from __future__ import annotations

import argparse
import asyncio
import sys
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from apprentice import config as configuration
from apprentice import licence, plugins
from apprentice.calls import price_of
from apprentice.cli.terminal import Command, positive, print_json, promise
from apprentice.config import Config
from apprentice.demo import demo
from apprentice.errors import ConfigError, PriceUnknown
from apprentice.licence import Line
from apprentice.selection import teachers


def _demo(parsed: argparse.Namespace) -> int:
    """Play the whole lifecycle on recorded answers of GPT-4."""
    out = None if parsed.json else sys.stdout
    summary = asyncio.run(
        demo(
            parsed.task,
            requests=parsed.requests,
            seed=parsed.seed,
            data=parsed.data_dir,
            keep=parsed.keep,
            out=out,
        )
    )
    if parsed.json:
        print_json(summary.model_dump())
    return 0


def _init(parsed: argparse.Namespace) -> int:
    """Write a commented apprentice.yaml for a new task; asks for what no flag says."""
    if parsed.file.exists():
        raise ConfigError(f"{parsed.file} exists already", hint="name another file with --file, or move it away")
    remote = {key: value for key in ("provider", "model") if (value := getattr(parsed, key)) is not None}
    text = configuration.init_text(
        _given(parsed.task, "--task", "name of the task (say route_mail): "),
        _given(parsed.description, "--description", "what it does, in one sentence: "),
        input_schema=_given(parsed.input, "--input", "fields of the input (say {text: str}): "),
        output_schema=_given(parsed.output, "--output", "fields of the output (say {label: [spam, ham]}): "),
        **remote,
    )
    configuration.parse(text, source=parsed.file)
    try:
        parsed.file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{parsed.file} cannot be written: {error.strerror}", hint="name another with --file"
        ) from error
    if parsed.json:
        print_json({"file": str(parsed.file)})
    else:
        print(f"wrote {parsed.file}; look it over, then: apprentice check --config {parsed.file}")
    return 0


def _check(parsed: argparse.Namespace) -> int:
    """Check a configuration without spending anything."""
    config = configuration.load(parsed.config)
    configuration.check_learnable(config)
    missing = configuration.missing(config) + _unpriced(config)
    today = datetime.now(UTC).date()
    asked = licence.explain(
        [teacher for _, teacher in teachers(config)], [task.name for task in config.tasks], today=today
    )
    mute = [f"{line.teacher.model} does not teach {', '.join(line.refused)}" for line in asked if line.refused]
    promises = {task.name: promise(config, task.name) for task in config.tasks}
    if parsed.json:
        print_json(
            {
                "file": str(parsed.config),
                "tasks": list(promises),
                "missing": missing,
                "promises": promises,
                "licence": mute,
            }
        )
        return 0
    found = "not ready to serve, see below" if missing else "good"
    print(f"{parsed.config}: {found}, {len(config.tasks)} task{'s' if len(config.tasks) != 1 else ''}")
    for name, promised in promises.items():
        print(f"  {name}: {promised}")
    for warning in missing:
        print(f"  missing: {warning}", file=sys.stderr)
    for warning in mute:
        print(f"  licence: {warning} (`apprentice licence` explains)", file=sys.stderr)
    return 0


def _unpriced(config: Config) -> list[str]:
    """Models that are never called, because nobody could say what a call costs; plugins that are missing have no price."""
    found = []
    for remote in (config.remote, *config.remote.additional_providers, *config.teachers):
        if remote.provider not in plugins.names("models"):
            continue
        try:
            price_of(remote)
        except PriceUnknown as error:
            found.append(f"{error}; {error.hint}")
    return list(dict.fromkeys(found))


def _licence(parsed: argparse.Namespace) -> int:
    """Show whose answers may train a local model, why, and what would change that."""
    config = configuration.load(parsed.config)
    today = datetime.now(UTC).date()
    asked = [teacher for _, teacher in teachers(config)]
    lines = licence.explain(asked, [task.name for task in config.tasks], today=today)
    if parsed.json:
        print_json(
            [
                {"role": line.teacher.role, "trains": line.trains, "refused": line.refused}
                | line.ruling.model_dump(mode="json")
                for line in lines
            ]
        )
    else:
        print(_licence_text(lines))
    return 0


def _licence_text(lines: Sequence[Line]) -> str:
    said = ["Answers of all models serve. They train a local model only where terms or a permission let them.", ""]
    for teacher, ruling, trains, refused in lines:
        verdict = f"trains {', '.join(trains)}" if trains else "does not train"
        verdict += f", but not {', '.join(refused)}" if trains and refused else ""
        said.append(f"{teacher.role}: {teacher.model} ({ruling.teacher}) serves; {verdict} [{ruling.terms}]")
        said += _indented("because: ", ruling.reason) if refused else _indented("basis: ", ruling.basis)
        said += [text for condition in ruling.conditions for text in _indented("- ", condition)]
        said += [text for source in ruling.sources for text in _indented("source: ", source)]
        said.append("")
    fixes = dict.fromkeys(line.ruling.fix.partition("; or")[0] for line in lines if line.refused)
    for fix in fixes:
        said += _indented("to change that: ", fix)
    if not any(line.trains for line in lines):
        said += _indented(
            "",
            "Nothing is learned until a permission or a teacher is named: under Apache-2.0 or MIT on a server of your own, "
            "or a service that allows it (DeepSeek). People's own labels always train.",
        )
    said.append(f"Table of terms: {licence.version()}; a reading of public terms, no legal advice.")
    return "\n".join(said)


def _indented(label: str, text: str) -> list[str]:
    indent = "  " if label else ""
    return textwrap.wrap(label + text, 110, initial_indent=indent, subsequent_indent=2 * indent, break_long_words=False)


def _schema(parsed: argparse.Namespace) -> int:
    """Print the JSON Schema of apprentice.yaml, for editors."""
    print_json(configuration.json_schema(), indent=None if parsed.json else 2)
    return 0


def _given(value: str | None, flag: str, prompt: str) -> str:
    """The flag's value, else what a person answers."""
    if value is not None:
        return value
    if not sys.stdin.isatty():
        raise ConfigError(f"{flag} is needed where nobody can be asked", hint="`apprentice init --help`")
    print(prompt, end="", file=sys.stderr, flush=True)
    try:
        return input().strip()
    except EOFError as error:
        raise ConfigError(f"no answer; {flag} says it, too", hint="`apprentice init --help`") from error


COMMANDS = (
    Command(
        "demo",
        _demo,
        "apprentice demo --requests 1000",
        (
            ("--task", {"default": "banking77", "help": "which recording; default: %(default)s"}),
            ("--requests", {"type": positive, "metavar": "N", "help": "only the first N requests"}),
            ("--seed", {"type": int, "default": 0, "help": "of the sampling; default: %(default)s"}),
            ("--data-dir", {"type": Path, "metavar": "DIR", "help": "take TASK.jsonl.gz from this folder"}),
            ("--keep", {"type": Path, "metavar": "DIR", "help": "keep the store and the models in this folder"}),
        ),
        configured=False,
    ),
    Command(
        "init",
        _init,
        "apprentice init --task route_mail",
        (
            ("--file", {"type": Path, "default": Path("apprentice.yaml"), "help": "default: %(default)s"}),
            ("--task", {"metavar": "NAME", "help": "the task's name"}),
            ("--description", {"help": "one sentence"}),
            ("--input", {"metavar": "FIELDS", "help": "as YAML, say '{text: str}'"}),
            ("--output", {"metavar": "FIELDS", "help": "as YAML, say '{label: [spam, ham]}'"}),
            ("--provider", {"help": "of the remote: anthropic, openai, …"}),
            ("--model", {"help": "as the provider names it"}),
        ),
        configured=False,
    ),
    Command("check", _check, "apprentice check --config FILE"),
    Command("licence", _licence, "apprentice licence --config FILE"),
    Command("schema", _schema, "apprentice schema > schema.json", configured=False),
)
