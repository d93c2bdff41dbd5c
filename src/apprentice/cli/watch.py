"""Commands that show what is and what was, and change nothing: status, report, replay, explain, plan."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import textwrap
import time
from pathlib import Path

from apprentice import config as configuration
from apprentice.cli.alerts import tell_reports
from apprentice.cli.terminal import Command, above_zero, dollars, mode_text, print_json, share, when, with_store
from apprentice.config import Config
from apprentice.dashboard import views
from apprentice.errors import ConfigError, MissingExtra
from apprentice.jobs import Training
from apprentice.report import (
    WHY,
    CalibrationLine,
    DayLine,
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
from apprentice.types import Store

_DAYS = 14  # of a report that are printed; `--json` has all
_PAIRS = {"answers": "local and remote numbers", "confidence": "confidence and score"}


def _status(parsed: argparse.Namespace) -> int:
    """Show where each task stands, and how far a training has come that goes on."""

    async def read(config: Config, store: Store) -> list[TaskStatus]:
        return await status(config, store, now=time.time(), task=parsed.task)

    found = with_store(parsed, read)
    if parsed.json:
        print_json([task.model_dump(mode="json") for task in found])
    else:
        print("\n\n".join(_status_text(task) for task in found))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    """Show what each task cost, saved and agreed, over time."""
    asked = [name for name in ("html", "csv", "webhook") if getattr(parsed, name)]
    if len(asked) > 1:
        raise ConfigError(f"--{asked[0]} and --{asked[1]} are two reports", hint="ask for one at a time")
    if parsed.html is not None:
        return _page(parsed)
    if parsed.webhook:
        return tell_reports(parsed)
    found = with_store(parsed, report)
    if parsed.csv:
        return _table(found)
    if parsed.json:
        print_json([task.model_dump(mode="json") for task in found])
    else:
        print("\n\n".join(_report_text(task) for task in found))
    return 0


def _table(tasks: list[TaskReport]) -> int:
    """A line of comma-separated values for each task and day."""
    columns = [name for name in DayLine.model_fields if name != "purposes"]
    writer = csv.writer(sys.stdout)
    writer.writerow(["task", *(f"{name}_micro_usd" if name.endswith("_cost") else name for name in columns)])
    writer.writerows([task.task, *(getattr(day, name) for name in columns)] for task in tasks for day in task.days)
    return 0


def _page(parsed: argparse.Namespace) -> int:
    """Write the report as one page that needs no other file."""
    try:
        from apprentice.dashboard import pages
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "jinja2", "gateway") from error
    now = time.time()
    page = pages.report(with_store(parsed, lambda config, store: views.read(config, store, now=now)), now=now)
    try:
        parsed.html.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {parsed.html}: {error.strerror}", hint="--html FILE: another place") from error
    if parsed.json:
        print_json({"html": str(parsed.html)})
    else:
        print(f"written to {parsed.html}; it holds what customers wrote as labels, and the events")
    return 0


def _replay(parsed: argparse.Namespace) -> int:
    """Show each decision of a task and why, its state built again from the Records; `--json`: one object a line."""

    async def tell(config: Config, store: Store) -> None:
        async for line in replay(config, store, parsed.task):
            if parsed.json:
                print_json(line.model_dump(mode="json"))
            else:
                print(_step_text(line) if isinstance(line, Step) else _ending_text(line))

    with_store(parsed, tell)
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    """Tell one request: who answered and why, both answers, the state just before it, the money."""

    async def read(config: Config, store: Store) -> Explanation:
        return await explain(config, store, parsed.request_id)

    found = with_store(parsed, read)
    if parsed.json:
        print_json(found.model_dump(mode="json"))
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
    if cost is None and (cost := with_store(parsed, lambda _, store: mean_cost(store, task.name))) is None:
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
        print_json({"task": task.name} | found.model_dump(mode="json"))
    else:
        print(_plan_text(task.name, found, wanted=parsed.delay))
    return 0


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
        lines.append(f"  mode        {mode_text(task.mode)}")
    if task.training is not None:
        lines.append(f"  training    {_training_text(task.training)}")
    lines += [
        f"  spend       {_spend_text(window)}" for window in task.spend if window.limit is not None or window.spent
    ]
    lines += [f"  {when(event.at)}  {event.name}: {event.message}" for event in task.events[-5:]]
    return "\n".join(lines)


def _step_text(step: Step) -> str:
    made = step.decision
    behind = {0: "", None: "  (the replayed state says otherwise)"}.get(step.lag, f"  ({step.lag} behind)")
    score = "" if step.score is None else f", score {step.score:.2f}"
    said = [f"{step.seq:>7}           {name}: {message}" for name, message in step.events.items()]
    line = (
        f"{step.seq:>7}  {step.request_id[-8:]}  {step.served or 'nobody':6}  {made.reason:14}  p {made.p:6.1%}  "
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
        f"Request {record.request_id} of {record.task}, {when(record.at)} (number {found.seq}): "
        + (f"the {record.served} model was served" if record.served else f"nobody answered ({record.error})")
        + f", because {WHY[made.reason]}.",
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
    said = " ".join(part for part in parts if part)
    # A provider's name of its model, or its error, must not move the cursor of who reads it.
    return "".join(character if character.isprintable() else " " for character in said)


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


def _training_text(now: Training) -> str:
    said = [f"{now.trainer}, since {when(now.since)}"]
    if now.step is not None:
        said.append(f"step {now.step:,}" + (f" of {now.steps:,}" if now.steps else ""))
    if now.loss is not None:
        said.append(f"loss {now.loss:.4g}")
    if now.held_loss is not None:
        said.append(f"{now.held_loss:.4g} on kept-back examples")
    if now.eta is not None:
        said.append(f"about {now.eta / 60:,.0f} min left" if now.eta >= 90 else f"about {now.eta:.0f} s left")
    return ", ".join(said) + ("" if now.told_at is None else f" (told {when(now.told_at)})")


def _spend_text(window: Spend) -> str:
    limit = "" if window.limit is None else f" of ${window.limit / 1e6:.2f}"
    ahead = "" if window.reached_at is None else f", reached on {when(window.reached_at)} at this rate"
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
    lines += _days_text(task)
    lines += _spending_text(task)
    lines += [f"  {v.id}: {v.state}, trained on {v.trained_on:,}" for v in task.versions]
    lines += map(_calibration_text, task.calibration)
    if (found := task.teachers) is not None:
        lines += [
            f"  teacher {one.model}: {one.quality:.1%} right against gold, {one.itself:.1%} with itself (the ceiling)"
            for one in found.teachers
            if one.quality is not None and one.itself is not None
        ]
        lines += [f"  {pair.one} and {pair.other} agree on {pair.agreement:.1%} (the ceiling)" for pair in found.pairs]
    return "\n".join(lines)


def _days_text(task: TaskReport) -> list[str]:
    """A line for each of the last days."""
    if not task.days:
        return []
    lines = ["  day         requests  asked remote  served locally     remote      local  all-remote"]
    for day in task.days[-_DAYS:]:
        costs = "".join(f"{f'${cost / 1e6:.4f}':>11}" for cost in (day.remote_cost, day.local_cost))
        beside = ", ".join(f"{name} ${cost / 1e6:.4f}" for name, cost in day.purposes.items() if name != "serve")
        lines.append(
            f"  {day.day}  {day.requests:>8,}  {day.asked_remote:>12,}  {day.served_locally:>14,}{costs}"
            f"{f'${day.all_remote_cost / 1e6:.4f}':>12}" + (f"  ({beside})" if beside else "")
        )
    return lines


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


COMMANDS = (
    Command("status", _status, "apprentice status --json", (("task", {"nargs": "?"}),)),
    Command(
        "report",
        _report,
        "apprentice report --html report.html",
        (
            ("--html", {"type": Path, "metavar": "FILE", "help": "write one page for a browser, with charts, instead"}),
            ("--csv", {"action": "store_true", "help": "a line for each task and day, for a spreadsheet"}),
            ("--webhook", {"action": "store_true", "help": "send the sums of each task to the webhooks of `alerts:`"}),
        ),
    ),
    Command("replay", _replay, "apprentice replay classify", (("task", {}),)),
    Command("explain", _explain, "apprentice explain 3f0c5e…", (("request_id", {}),)),
    Command(
        "plan",
        _plan,
        "apprentice plan --delay 500 --drop 0.3 --requests-per-day 20000 --cost 0.002",
        (
            ("--task", {"metavar": "NAME", "help": "which task; not needed where there is one only"}),
            ("--delay", {"type": above_zero, "required": True, "metavar": "N", "help": "requests, at most"}),
            ("--drop", {"type": share, "required": True, "help": "share of wrong answers to notice, say 0.3"}),
            ("--requests-per-day", {"type": above_zero, "required": True, "metavar": "N"}),
            ("--cost", {"type": dollars, "help": "US dollars of one remote call; default: the recorded mean"}),
            (
                "--local-share",
                {
                    "type": share,
                    "default": 0.6,
                    "help": "an assumption: the share that the local model may answer; default: %(default)s",
                },
            ),
        ),
    ),
)
