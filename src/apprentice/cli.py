"""The command line. Every command takes `--json`, prints results on standard output and everything else on standard error.

Exit codes: 0 done, 1 something went wrong that no other code says, 2 the command line or the configuration is wrong,
3 the request is wrong, 4 the budget, 5 a model, 6 the store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apprentice import config as configuration
from apprentice import decide, plugins, worker
from apprentice.config import Config
from apprentice.demo import demo
from apprentice.engine import Apprentice, set_mode
from apprentice.errors import (
    ApprenticeError,
    BudgetError,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    ModelError,
    StoreError,
)
from apprentice.purse import resume
from apprentice.report import (
    CalibrationLine,
    Ending,
    Explanation,
    Plan,
    Spend,
    Step,
    TaskReport,
    TaskStatus,
    cold_start,
    explain,
    mean_cost,
    plan,
    replay,
    report,
    status,
)
from apprentice.types import Json, Mode, Reason, Store

_PAIRS = {"answers": "local and remote numbers", "confidence": "confidence and score"}

_WHY: dict[Reason, str] = {
    "no_local_model": "there was no local model yet",
    "learning": "nothing is certified and both are asked",
    "audit": "the coin came up: both were asked, to compare them",
    "deferred": "the local model was not sure enough",
    "certified": "at the level in force the local model answers alone",
    "forced": "an operator asked for the remote",
    "local_invalid": "the local answer did not fit the schema",
    "local_failed": "the local model failed",
    "remote_failed": "the remote failed, and the local model was sure enough",
    "budget": "the caps left no room for the remote",
}

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
        made.add_argument("--json", action="store_true", help="print JSON and nothing else")
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
    try:
        parsed.file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{parsed.file} cannot be written: {error.strerror}", hint="name another with --file"
        ) from error
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
    if sys.stderr.isatty():
        print(f"{parsed.task}: {_promise(config, parsed.task)}", file=sys.stderr)
    return asyncio.run(_run_all(config, parsed.task, parsed.input, parsed.deadline))


async def _run_all(config: Config, task: str, given: str, deadline: float | None) -> int:
    """One JSON line out for each line in; a line that fails says so in its place, and the exit code is the last failure's."""
    code = 0
    async with Apprentice(config) as app:
        for text in _lines(given):
            try:
                result = await app.arun(task, _json(text), deadline=deadline)
            except (InvalidRequest, BudgetError, ModelError, DeadlineExceeded) as error:
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


def _resume(parsed: argparse.Namespace) -> int:
    """Ask a model again that was suspended because it billed more than its price list allows."""

    async def change(_: Config, store: Store) -> None:
        await resume(store, parsed.model, at=time.time())

    _with_store(parsed, change)
    if parsed.json:
        _print_json({"model": parsed.model, "suspended": False})
    else:
        print(f"{parsed.model} is asked again")
    return 0


def _mode(parsed: argparse.Namespace) -> int:
    """Let the remote alone answer a task, for a time or until `auto`."""

    async def change(config: Config, store: Store) -> Mode:
        config.task(parsed.task)
        return await set_mode(store, parsed.task, parsed.mode, at=time.time(), seconds=parsed.seconds)

    mode = _with_store(parsed, change)
    if parsed.json:
        _print_json({"task": parsed.task} | mode.model_dump(mode="json"))
    else:
        print(f"{parsed.task}: {_mode_text(mode)}")
    return 0


def _replay(parsed: argparse.Namespace) -> int:
    """Show each decision of a task and why, its state built again from the Records; `--json`: one object a line."""

    async def tell(config: Config, store: Store) -> None:
        async for line in replay(config, store, parsed.task):
            if parsed.json:
                _print_json(line.model_dump(mode="json"))
            else:
                print(_step_text(line) if isinstance(line, Step) else _ending_text(line))

    _with_store(parsed, tell)
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    """Tell one request: who answered and why, both answers, the state just before it, the money."""

    async def read(config: Config, store: Store) -> Explanation:
        return await explain(config, store, parsed.request_id)

    found = _with_store(parsed, read)
    if parsed.json:
        _print_json(found.model_dump(mode="json"))
    else:
        print(textwrap.fill(_explanation_text(found), 100, break_long_words=False, break_on_hyphens=False))
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    """Find the min_floor for a wanted delay, what its audits cost, and what is left to save."""
    config = configuration.load(parsed.config)
    names = [task.name for task in config.tasks]
    if parsed.task is None and len(names) > 1:
        raise ConfigError("there are several tasks", hint=f"--task, one of: {', '.join(names)}")
    task = config.task(parsed.task or names[0])
    cost = parsed.cost
    if cost is None and (cost := _with_store(parsed, lambda _, store: mean_cost(store, task.name))) is None:
        raise ConfigError(f"no remote answer of {task.name!r} is recorded", hint="say what a call costs: --cost")
    found = plan(
        delay=parsed.delay,
        drop=parsed.drop,
        requests_per_day=parsed.requests_per_day,
        cost=cost,
        local_share=parsed.local_share,
        cold_start=cold_start(config, task),
    )
    if parsed.json:
        _print_json({"task": task.name} | found.model_dump(mode="json"))
    else:
        print(_plan_text(task.name, found, wanted=parsed.delay))
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
    shown = {
        kind: now.detail[f"{kind}_pearson"] for kind in ("answers", "confidence") if f"{kind}_pearson" in now.detail
    }
    if shown:
        said = (
            f"{r:+.2f} of {_PAIRS[kind]} (Spearman {now.detail[f'{kind}_spearman']:+.2f})" for kind, r in shown.items()
        )
        lines.append(f"  correlation {', '.join(said)}; too noisy to act on")
    if task.mode is not None:
        lines.append(f"  mode        {_mode_text(task.mode)}")
    lines += [
        f"  spend       {_spend_text(window)}" for window in task.spend if window.limit is not None or window.spent
    ]
    lines += [f"  {_when(event.at)}  {event.name}: {event.message}" for event in task.events[-5:]]
    return "\n".join(lines)


def _mode_text(mode: Mode) -> str:
    if mode.mode == "auto":
        return "auto: its state decides who answers"
    return "the remote alone answers until " + ("`auto`" if mode.until is None else _when(mode.until))


def _step_text(step: Step) -> str:
    made = step.decision
    behind = {0: "", None: "  (the replayed state says otherwise)"}.get(step.lag, f"  ({step.lag} behind)")
    score = "" if step.score is None else f", score {step.score:.2f}"
    said = [f"{step.seq:>7}           {name}: {message}" for name, message in step.events.items()]
    line = (
        f"{step.seq:>7}  {step.request_id[:8]}  {step.served or 'nobody':6}  {made.reason:14}  p {made.p:6.1%}  "
        f"level {made.level:4.0%}  {step.version or '–':4} {made.phase}{score}, ${step.cost / 1e6:.6f}{behind}"
    )
    return "\n".join([line, *said])


def _ending_text(end: Ending) -> str:
    lines = [
        f"{end.records:,} requests: {end.exact:,} decided as the state after the one before says, {end.lagging:,} as an "
        f"earlier state says (requests at the same time), {end.unexplained:,} as no replayed state says"
    ]
    if end.unexplained:
        lines.append("  (other settings then, or a version that began while requests were under way)")
    if end.snapshot is None:
        lines.append("no engine has saved a state yet: there is nothing to compare the replayed one with")
    else:
        same = f"differs in {', '.join(end.differs)} from" if end.differs else "equals"
        lines.append(f"the replayed state {same} the engine's (saved at {end.snapshot}, and the Records after it)")
    return "\n".join(lines)


def _explanation_text(found: Explanation) -> str:
    record, now, made = found.record, found.before, found.record.decision
    answers = [
        f"The {name} model{f' ({answer.model})' if answer.model else ''} said {json.dumps(answer.output)}"
        + (f" with confidence {answer.confidence:.3f}" if answer.confidence is not None else "")
        + (f" ({answer.problem})" if answer.problem else "")
        + "."
        for name, answer in (("local", record.local), ("remote", record.remote))
        if answer is not None
    ]
    level = f"level {now.level:.0%}" + (f" (below {now.threshold:.3f} defers)" if now.threshold is not None else "")
    bounds = "" if now.agreement is None else f", agreement {now.agreement:.1%} [{now.lower:.1%}, {now.upper:.1%}]"
    detectors = ", ".join(f"{name} {value:.3g}" for name, value in now.detail.items())
    parts = [
        f"Request {record.request_id} of {record.task}, {_when(record.at)} (number {found.seq}): "
        + (f"the {record.served} model was served" if record.served else f"nobody answered ({record.error})")
        + f", because {_WHY[made.reason]}.",
        f"The probability of an audit was {made.p:.1%}, fixed before the input was read"
        + ("; the coin came up." if made.audit else "; the coin did not come up."),
        f"It was asked {textwrap.shorten(json.dumps(record.input), 300)}.",
        *answers,
        f"Their score: {record.score.value:.3f}." if record.score is not None else "",
        f"Just before, the task was in {now.phase} with {now.version or 'no version'}, {level}, "
        f"{'certified' if now.certified else 'not certified'}, drift {now.drift}, {now.audits} audits{bounds}.",
        f"Certificates (20 is enough at 5 %) and detectors: {detectors}." if detectors else "",
        " ".join(f"It made true: {name}, {message}." for name, message in found.events.items()),
        f"It cost ${record.cost / 1e6:.6f} in {len(record.attempts)} attempt{'' if len(record.attempts) == 1 else 's'}"
        + "".join(f"; {a.model}: {a.outcome}, ${a.cost / 1e6:.6f}" for a in record.attempts)
        + ".",
        ""
        if found.lag == 0
        else "The decision was made on an earlier state than this one."
        if found.lag
        else "The replayed state does not say the same as the decision.",
    ]
    return " ".join(part for part in parts if part)


def _plan_text(name: str, found: Plan, *, wanted: float) -> str:
    day = f"{found.delay / found.requests_per_day:.2g} days"
    pays = "never as many" if found.break_even is None else f"after about {found.break_even:,} requests as many"
    lines = [
        f"{name}: min_floor {found.floor:.4g}",
        f"  notices     that {found.drop:.0%} of what is served is wrong within about {found.delay:,.0f} requests ({day}), "
        "in 95 of 100 cases",
        f"  audits      {found.audits_per_day:,.0f} a day; they add ${found.audit_cost_per_day / 1e6:.2f} a day",
        f"  break-even  {pays} calls are saved as the cold start (at least {found.cold_start:,}) and the audits took",
        f"  saving      ${found.saving_per_month / 1e6:,.2f} a month, at ${found.cost / 1e6:.6f} a call",
        f"  assumed     that the local model may answer {found.local_share:.0%} of the requests (--local-share)",
    ]
    if found.delay > wanted:
        lines.append(f"  note        {wanted:g} requests are too few for this drop, even if every one is audited")
    if found.drop < 0.3:
        lines.append("  note        measured for drops of 30 % and more; smaller ones take several times longer")
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
    ceiling = "" if now.ceiling is None else f"; the remote agrees with itself on {now.ceiling:.1%}"
    return (
        f"{now.agreement:.1%} [{now.lower:.1%}, {now.upper:.1%}] of the local model with the remote, on {now.audits} audits"
        f" (agreement is not accuracy){ceiling}"
    )


def _spend_text(window: Spend) -> str:
    limit = "" if window.limit is None else f" of ${window.limit / 1e6:.2f}"
    ahead = "" if window.reached_at is None else f", reached on {_when(window.reached_at)} at this rate"
    return f"{window.window}: ${window.spent / 1e6:.4f}{limit}{ahead}"


def _report_text(task: TaskReport) -> str:
    lines = [
        f"{task.task}: {task.requests:,} requests, {task.remote_calls:,} asked the remote ({task.remote_share:.1%}), "
        f"{task.served_locally:,} served locally, {task.failed:,} failed",
        f"  cost ${task.cost / 1e6:.4f}; all-remote it would have been about ${task.all_remote_cost / 1e6:.4f}, "
        f"so ${task.saved / 1e6:.4f} saved"
        + (f", ${task.local_cost / 1e6:.4f} of local computing taken off" if task.local_cost else "")
        + ("" if task.break_even is None else f"; it pays since request {task.break_even:,}"),
        "  requests          remote  audited  agreement  cost",
    ]
    for point in task.trajectory:
        agreement = "      –" if point.agreement is None else f"{point.agreement:7.1%}"
        lines.append(
            f"  {point.first:>7,}–{point.last:<8,} {point.remote_share:6.1%}  {point.sampling_rate:6.1%}    {agreement}"
            f"  ${point.cost / 1e6:.4f}  {point.phase}"
        )
    lines += _spending_text(task)
    lines += [f"  {v.id}: {v.state}, trained on {v.trained_on:,}" for v in task.versions]
    lines += map(_calibration_text, task.calibration)
    return "\n".join(lines)


def _spending_text(task: TaskReport) -> list[str]:
    """A line for each purpose and model, over all days."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for line in task.spending:
        calls, cost = sums.get((line.purpose, line.model), (0, 0))
        sums[line.purpose, line.model] = (calls + line.attempts, cost + line.cost)
    return [
        f"  {purpose:8} {model}: {calls:,} calls, ${cost / 1e6:.4f}" for (purpose, model), (calls, cost) in sums.items()
    ]


def _calibration_text(line: CalibrationLine) -> str:
    text = f"  {line.version}: confidence is off by {line.ece:.3f} (ECE)"
    if line.auroc is not None:
        text += f", ranks with an AUROC of {line.auroc:.3f} [{line.auroc_lower:.3f}, {line.auroc_upper:.3f}]"
    return f"{text}, on {line.n:,} comparisons"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _promise(config: Config, name: str) -> str:
    task = config.task(name)
    return decide.promise((task.sampling or config.sampling).min_floor, task.confidence_thresholds.phase2_to_phase3)


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
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the input is not JSON: {error}", hint="""say --input '{"text": "…"}'""") from error


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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def _duration(text: str) -> float:
    """Seconds of a time such as 90s, 30m, 2h or 7d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text, re.ASCII)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 30m, 2h or 7d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def _dollars(text: str) -> float:
    return _above_zero(text) * 1e6


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
                    "type": _duration,
                    "metavar": "TIME",
                    "help": "90s, 30m, 2h, 7d; else until `auto`",
                },
            ),
        ),
    ),
    Command("resume", _resume, "apprentice resume openai/gpt-4o-mini", (("model", {}),)),
    Command("replay", _replay, "apprentice replay classify", (("task", {}),)),
    Command("explain", _explain, "apprentice explain 3f0c5e…", (("request_id", {}),)),
    Command(
        "plan",
        _plan,
        "apprentice plan --delay 500 --drop 0.3 --requests-per-day 20000 --cost 0.002",
        (
            ("--task", {"metavar": "NAME", "help": "which task; not needed where there is one only"}),
            ("--delay", {"type": _above_zero, "required": True, "metavar": "N", "help": "requests, at most"}),
            ("--drop", {"type": _share, "required": True, "help": "share of wrong answers to notice, say 0.3"}),
            ("--requests-per-day", {"type": _above_zero, "required": True, "metavar": "N"}),
            ("--cost", {"type": _dollars, "help": "US dollars of one remote call; default: the recorded mean"}),
            (
                "--local-share",
                {
                    "type": _share,
                    "default": 0.6,
                    "help": "an assumption: the share that the local model may answer; default: %(default)s",
                },
            ),
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
                {"type": float, "default": 60.0, "metavar": "SECONDS", "help": "between looks; default: %(default)s"},
            ),
        ),
    ),
)


if __name__ == "__main__":
    raise SystemExit(main())
