"""Commands that answer requests: run, label."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from apprentice import config as configuration
from apprentice import plugins
from apprentice.bulk import Bulk, Plan, read_inputs
from apprentice.cli.terminal import Command, above_zero, code_of, json_of, positive, print_json, promise
from apprentice.config import Config
from apprentice.engine import Apprentice
from apprentice.errors import BudgetError, ConfigError, DeadlineExceeded, InvalidRequest, ModelError
from apprentice.types import Batch, Json, Store
from apprentice.worker import owner


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


def _label(parsed: argparse.Namespace) -> int:
    """Have a file of inputs, one JSON value a line, answered in the provider's batches, at a part of the price."""
    config = configuration.load(parsed.config)
    task = config.task(parsed.task)
    if parsed.file is None and not parsed.collect and not parsed.cancel:
        raise ConfigError("there is nothing to label", hint="name a file of inputs, or say --collect")
    inputs = None if parsed.file is None else read_inputs(task, parsed.file)

    async def opened() -> int:
        store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
        try:
            bulk = Bulk(config, store, clock=time.time, owner=owner())
            try:
                await bulk.open()
                plan = None if inputs is None else await bulk.plan(task.name, inputs, limit=parsed.limit)
                return await _label_all(bulk, store, plan, parsed)
            finally:
                await bulk.close()
        finally:
            await store.close()

    return asyncio.run(opened())


async def _label_all(bulk: Bulk, store: Store, plan: Plan | None, parsed: argparse.Namespace) -> int:
    """Send what is planned, then look until all is collected, unless told not to."""
    batches: dict[str, Batch] = {}
    if plan is not None and not parsed.json:
        print(_plan_text(plan), flush=True)
    if plan is not None and not parsed.dry_run:
        _tell(batches, await bulk.send(plan), parsed)
    unsent = 0 if plan is None else len(plan.batches) - len(batches)
    cancelled = await bulk.cancel(parsed.task) if parsed.cancel else 0
    waits = not (parsed.dry_run or parsed.no_wait or parsed.collect)
    if parsed.collect or waits:
        _tell(batches, await bulk.collect(parsed.task), parsed)
    while waits and await store.batches(parsed.task, open=True):
        await asyncio.sleep(parsed.every)
        _tell(batches, await bulk.collect(parsed.task), parsed)
    labels = await store.count(parsed.task, labelled=True)
    if parsed.json:
        found = {"task": parsed.task, "labels": labels, "cancelled": cancelled, "unsent_batches": unsent}
        print_json(found | _plan_json(plan) | {"batches": [_batch_json(batch) for batch in batches.values()]})
    else:
        if cancelled:
            print(f"{cancelled} batches are asked to end early")
        if unsent and not parsed.dry_run:
            print(f"{unsent} batches were not begun: run the same command again")
        print(f"{parsed.task}: {labels:,} labelled inputs in all")
    failed = any(batch.state == "failed" for batch in batches.values())
    return 5 if failed or (unsent and not parsed.dry_run) else 0


def _tell(known: dict[str, Batch], seen: Iterable[Batch], parsed: argparse.Namespace) -> None:
    """Note how the batches are by now, and say what is new about them."""
    for batch in seen:
        before, known[batch.id] = known.get(batch.id), batch
        if batch == before or parsed.json:
            continue
        state = batch.state if batch.open or batch.state == "failed" else f"done, ${batch.cost / 1e6:.6f}"
        problem = f": {batch.problem}" if batch.problem else ""
        print(f"  {batch.id[-8:]}  {len(batch.inputs):,} inputs  {state}{problem}", flush=True)


def _plan_text(plan: Plan) -> str:
    done = [(plan.answered, "answered before"), (plan.waiting, "on their way"), (plan.repeated, "repeated")]
    passed = "".join(f", {count:,} {name}" for count, name in [*done, (plan.left, "beyond the limit")] if count)
    about = "" if plan.expected is None else f", about ${plan.expected / 1e6:.6f} by the answers so far"
    number = f"{len(plan.batches)} batch{'' if len(plan.batches) == 1 else 'es'}"
    return f"{plan.task}: {plan.size:,} inputs to send in {number}{passed}; at most ${plan.worst / 1e6:.6f}{about}"


def _plan_json(plan: Plan | None) -> dict[str, Json]:
    if plan is None:
        return {}
    counts = {name: getattr(plan, name) for name in ("size", "answered", "waiting", "repeated", "left")}
    expected = None if plan.expected is None else plan.expected / 1e6
    return counts | {"worst_usd": plan.worst / 1e6, "expected_usd": expected}


def _batch_json(batch: Batch) -> dict[str, Json]:
    shown = batch.model_dump(mode="json", include={"id", "remote_id", "model", "state", "open", "problem"})
    return shown | {"inputs": len(batch.inputs), "cost_usd": batch.cost / 1e6, "worst_usd": batch.worst / 1e6}


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
    Command(
        "label",
        _label,
        "apprentice label classify inputs.jsonl --dry-run",
        (
            ("task", {}),
            (
                "file",
                {"type": Path, "nargs": "?", "help": "inputs that have no answer yet are sent, others passed over"},
            ),
            ("--dry-run", {"action": "store_true", "help": "say how many and what they cost at most; send nothing"}),
            ("--limit", {"type": positive, "metavar": "N", "help": "send so many inputs at most"}),
            ("--no-wait", {"action": "store_true", "help": "return when the batches are sent"}),
            ("--collect", {"action": "store_true", "help": "fetch what has ended, and return"}),
            (
                "--cancel",
                {"action": "store_true", "help": "end the task's batches early; what was answered is paid for"},
            ),
            (
                "--every",
                {
                    "type": above_zero,
                    "default": 60.0,
                    "metavar": "SECONDS",
                    "help": "between looks; default: %(default)s",
                },
            ),
        ),
    ),
)
