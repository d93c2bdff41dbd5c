"""The command line. Every command takes `--json`, prints results on standard output and everything else on standard error.

Exit codes: 0 done, 1 something went wrong that no other code says, 2 the command line or the configuration is wrong,
3 the request is wrong, 4 the budget, 5 a model, 6 the store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apprentice import config as configuration
from apprentice import decide, plugins, worker
from apprentice.config import Config
from apprentice.demo import demo
from apprentice.engine import Apprentice
from apprentice.errors import ApprenticeError, BudgetError, ConfigError, InvalidRequest, ModelError, StoreError
from apprentice.report import Spend, TaskReport, TaskStatus, report, status
from apprentice.types import Json, Store

_CODES: list[tuple[type[ApprenticeError], int]] = [
    (ConfigError, 2),
    (InvalidRequest, 3),
    (BudgetError, 4),
    (ModelError, 5),
    (StoreError, 6),
    (ApprenticeError, 1),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parsed = parser().parse_args(arguments)
    try:
        code: int = parsed.command(parsed)
    except ApprenticeError as error:
        return _fail(error, as_json=getattr(parsed, "json", False))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0  # the reader of our output has seen enough
    return code


class Command(NamedTuple):
    """One command: its help is the docstring of `run`."""

    name: str
    run: Callable[[argparse.Namespace], int]
    example: str
    arguments: tuple[tuple[str, dict[str, Any]], ...] = ()
    configured: bool = True  # whether it reads a configuration file


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
        made.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        for name, settings in command.arguments:
            made.add_argument(name, **settings)
        if command.configured:
            file: dict[str, Any] = {"type": Path, "default": Path("apprentice.yaml"), "metavar": "FILE"}
            made.add_argument("--config", help="default: %(default)s", **file)
    return top


# --- commands ----------------------------------------------------------------------------------------------------------


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
        _print_json(summary.model_dump())
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
    parsed.file.write_text(text, encoding="utf-8")
    if parsed.json:
        _print_json({"file": str(parsed.file)})
    else:
        print(f"wrote {parsed.file}; look it over, then: apprentice check --config {parsed.file}")
    return 0


def _check(parsed: argparse.Namespace) -> int:
    """Check a configuration without spending anything."""
    config = configuration.load(parsed.config)
    configuration.check_learnable(config)
    missing = configuration.missing(config)
    promises = {task.name: _promise(config, task.name) for task in config.tasks}
    if parsed.json:
        _print_json({"file": str(parsed.config), "tasks": list(promises), "missing": missing, "promises": promises})
        return 0
    print(f"{parsed.config}: good, {len(config.tasks)} task{'s' if len(config.tasks) != 1 else ''}")
    for name, promise in promises.items():
        print(f"  {name}: {promise}")
    for warning in missing:
        print(f"  missing: {warning}", file=sys.stderr)
    return 0


def _schema(parsed: argparse.Namespace) -> int:
    """Print the JSON Schema of apprentice.yaml, for editors."""
    _print_json(configuration.json_schema(), indent=None if parsed.json else 2)
    return 0


def _run(parsed: argparse.Namespace) -> int:
    """Answer one request, or JSON lines from standard input."""
    config = configuration.load(parsed.config)
    return asyncio.run(_run_all(config, parsed.task, parsed.input, parsed.deadline))


async def _run_all(config: Config, task: str, given: str, deadline: float | None) -> int:
    """One JSON line out for each line in; a line that fails says so in its place, and the exit code is the last failure's."""
    code = 0
    async with Apprentice(config) as app:
        for text in _lines(given):
            try:
                result = await app.arun(task, _json(text), deadline=deadline)
            except (InvalidRequest, ModelError) as error:
                if given != "-":
                    raise
                code = _code(error)
                _print_json({"error": type(error).__name__, "message": str(error), "hint": error.hint})
                continue
            _print_json(
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


def _status(parsed: argparse.Namespace) -> int:
    """Show where each task stands."""

    async def read(config: Config, store: Store) -> list[TaskStatus]:
        return await status(config, store, now=time.time())

    found = _with_store(parsed, read)
    if parsed.json:
        _print_json([task.model_dump(mode="json") for task in found])
    else:
        print("\n\n".join(_status_text(task) for task in found))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    """Show what each task cost, saved and agreed, over time."""
    found = _with_store(parsed, report)
    if parsed.json:
        _print_json([task.model_dump(mode="json") for task in found])
    else:
        print("\n\n".join(_report_text(task) for task in found))
    return 0


def _learn(parsed: argparse.Namespace) -> int:
    """Run one teaching cycle of a task now."""
    version = asyncio.run(worker.once(configuration.load(parsed.config), parsed.task, force=True))
    assert version is not None  # a forced cycle makes a version or raises
    if parsed.json:
        _print_json(version.model_dump(mode="json", exclude={"metrics": {"confidences"}}))
    else:
        print(f"{version.id}: {version.state}, trained on {version.trained_on} examples: {version.metrics['reason']}")
    return 0


def _worker(parsed: argparse.Namespace) -> int:
    """Run teaching cycles as they become due, until stopped."""
    asyncio.run(worker.forever(configuration.load(parsed.config), every=parsed.every))
    return 0


# --- text for people ---------------------------------------------------------------------------------------------------


def _status_text(task: TaskStatus) -> str:
    now = task.confidence
    lines = [
        f"{task.task}",
        f"  phase       {now.phase}, {task.requests:,} requests, {task.labels:,} remote answers",
        f"  version     {_version_text(task)}",
        f"  agreement   {_agreement_text(task)}",
        f"  sampling    {now.sampling_rate:.1%} of requests are audited, the least sure {now.level:.0%} go to the remote",
    ]
    lines += [
        f"  spend       {_spend_text(window)}" for window in task.spend if window.limit is not None or window.spent
    ]
    lines += [f"  {_when(event.at)}  {event.name}: {event.message}" for event in task.events[:5]]
    return "\n".join(lines)


def _version_text(task: TaskStatus) -> str:
    if task.version is None:
        return "none yet"
    certified = "certified" if task.confidence.certified else "not certified"
    return f"{task.version.id}, trained on {task.version.trained_on:,} examples, {certified}"


def _agreement_text(task: TaskStatus) -> str:
    now = task.confidence
    if now.agreement is None:
        return "not known yet"
    return (
        f"{now.agreement:.1%} [{now.lower:.1%}, {now.upper:.1%}] of the local model with the remote, on {now.audits} audits"
        " (agreement is not accuracy)"
    )


def _spend_text(window: Spend) -> str:
    limit = "" if window.limit is None else f" of ${window.limit / 1e6:.2f}"
    return f"{window.window}: ${window.spent / 1e6:.4f}{limit}"


def _report_text(task: TaskReport) -> str:
    lines = [
        f"{task.task}: {task.requests:,} requests, {task.remote_calls:,} asked the remote ({task.remote_share:.1%}), "
        f"{task.served_locally:,} served locally, {task.failed:,} failed",
        f"  cost ${task.cost / 1e6:.4f}; all-remote it would have been about ${task.all_remote_cost / 1e6:.4f}, "
        f"so ${task.saved / 1e6:.4f} saved",
        "  requests          remote  audited  agreement  cost",
    ]
    for point in task.trajectory:
        agreement = "      –" if point.agreement is None else f"{point.agreement:7.1%}"
        lines.append(
            f"  {point.first:>7,}–{point.last:<8,} {point.remote_share:6.1%}  {point.sampling_rate:6.1%}    {agreement}"
            f"  ${point.cost / 1e6:.4f}  {point.phase}"
        )
    lines += [f"  {v.id}: {v.state}, trained on {v.trained_on:,}" for v in task.versions]
    return "\n".join(lines)


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _promise(config: Config, task: str) -> str:
    return decide.promise(config.sampling.min_floor, config.task(task).confidence_thresholds.phase2_to_phase3)


# --- input and output --------------------------------------------------------------------------------------------------


def _with_store[T](parsed: argparse.Namespace, read: Callable[[Config, Store], Awaitable[T]]) -> T:
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


def _lines(given: str) -> Iterable[str]:
    return (line for line in sys.stdin if line.strip()) if given == "-" else [given]


def _json(text: str) -> Json:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the input is not JSON: {error}", hint="""say --input '{"text": "…"}'""") from error


def _given(value: str | None, flag: str, prompt: str) -> str:
    """The flag's value, else what a person answers."""
    if value is not None:
        return value
    if not sys.stdin.isatty():
        raise ConfigError(f"{flag} is needed where nobody can be asked")
    return input(prompt).strip()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def _print_json(value: Any, *, indent: int | None = None) -> None:
    print(json.dumps(value, ensure_ascii=True, indent=indent), flush=True)


def _code(error: ApprenticeError) -> int:
    return next(code for kind, code in _CODES if isinstance(error, kind))


def _fail(error: ApprenticeError, *, as_json: bool) -> int:
    if as_json:
        _print_json({"error": type(error).__name__, "message": str(error), "hint": error.hint})
    else:
        print(f"apprentice: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
    return _code(error)


COMMANDS = (
    Command(
        "demo",
        _demo,
        "apprentice demo --requests 1000",
        (
            ("--task", {"default": "banking77", "help": "which recording; default: %(default)s"}),
            ("--requests", {"type": _positive, "metavar": "N", "help": "only the first N requests"}),
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
    Command("schema", _schema, "apprentice schema > schema.json", configured=False),
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
    Command("status", _status, "apprentice status --json"),
    Command("report", _report, "apprentice report"),
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


if __name__ == "__main__":
    raise SystemExit(main())
