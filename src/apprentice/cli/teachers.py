"""The command for teachers: who they are, have them label what is unlabelled, compare them."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from random import Random

from apprentice import comparison
from apprentice import config as configuration
from apprentice.cli.terminal import Command, positive, print_json, with_store
from apprentice.comparison import Comparison, Measured, Prepared
from apprentice.config import Config
from apprentice.engine import new_id
from apprentice.errors import ConfigError
from apprentice.selection import benchmarks
from apprentice.teachers import Labelled, Plan, Ranked, Teachers, near_any
from apprentice.types import Json, Store
from apprentice.worker import owner


def _teachers(parsed: argparse.Namespace) -> int:
    """Teachers: list them in their order, have them label unlabelled requests of a task, compare them on people's words."""
    acts: dict[str, Callable[[argparse.Namespace], int]] = {"list": _list, "label": _label, "compare": _compare}
    if parsed.action != "list" and parsed.task is None:
        raise ConfigError(f"teachers {parsed.action} needs a TASK", hint=f"apprentice teachers {parsed.action} TASK")
    return acts[parsed.action](parsed)


def _opened[T](parsed: argparse.Namespace, act: Callable[[Teachers], Awaitable[T]]) -> T:
    async def read(config: Config, store: Store) -> T:
        made = Teachers(config, store, clock=time.time, new_id=new_id, dice=Random(), owner=owner())  # noqa: S311 (retries)
        return await act(made)

    return with_store(parsed, read)


def _list(parsed: argparse.Namespace) -> int:
    config = configuration.load(parsed.config)
    names = [task.name for task in config.tasks] if parsed.task is None else [config.task(parsed.task).name]

    async def read(teachers: Teachers) -> dict[str, list[Ranked]]:
        return {name: await teachers.listed(name) for name in names}

    found = _opened(parsed, read)
    if parsed.json:
        print_json({name: [_ranked_json(one) for one in ranked] for name, ranked in found.items()})
    else:
        print("\n\n".join(_list_text(name, ranked) for name, ranked in found.items()))
    return 0


def _ranked_json(one: Ranked) -> dict[str, Json]:
    shown = one.model_dump(mode="json", exclude={"per_1000"})
    price = None if one.per_1000 is None else one.per_1000 / 1e6
    return shown | {"may_label": one.may_label, "per_1000_usd": price}


def _list_text(name: str, ranked: list[Ranked]) -> str:
    if not ranked:
        return f"{name}: no teacher is configured (`teachers:`)"
    lines = [f"{name}:"]
    for one in ranked:
        price = one.problem or "price per 1,000 requests not known before the first remote answer"
        price = price if one.per_1000 is None else f"${one.per_1000 / 1e6:.4f} per 1,000 requests"
        lines += [f"  {one.role:9}  {one.model}  ({one.teacher})  {price}", f"             {one.licence}"]
    return "\n".join(lines)


def _label(parsed: argparse.Namespace) -> int:
    async def act(teachers: Teachers) -> tuple[Plan, Labelled | None]:
        config, task = teachers.config, teachers.config.task(parsed.task)
        apart = near_any(benchmarks(task).values(), (task.local or config.local).near_duplicates)
        plan = await teachers.plan(parsed.task, limit=parsed.limit, excluded=apart)
        if not parsed.json:
            print(_plan_text(plan), flush=True)
        if parsed.dry_run or not plan.rows:
            return plan, None
        return plan, await teachers.label(parsed.task, limit=parsed.limit, excluded=apart)

    plan, done = _opened(parsed, act)
    if parsed.json:
        told: dict[str, Json] = {
            "task": plan.task,
            "model": plan.model,
            "rows": len(plan.rows),
            "left": plan.left,
            "worst_usd": plan.worst / 1e6,
            "expected_usd": None if plan.expected is None else plan.expected / 1e6,
        }
        if done is not None:
            told |= done.model_dump(mode="json", exclude={"cost"}) | {"cost_usd": done.cost / 1e6}
        print_json(told)
    elif done is not None:
        print(_labelled_text(done))
    return 5 if done is not None and done.problem is not None else 0


def _plan_text(plan: Plan) -> str:
    about = "" if plan.expected is None else f", about ${plan.expected / 1e6:.6f} by the answers so far"
    left = f", {plan.left:,} beyond the limit" if plan.left else ""
    return f"{plan.task}: {len(plan.rows):,} requests to label{left}; {plan.model} costs at most ${plan.worst / 1e6:.6f}{about}"


def _labelled_text(done: Labelled) -> str:
    lines = [f"{done.labels:,} labelled for ${done.cost / 1e6:.6f}"]
    lines += [f"  {count:,} by {model}" for model, count in done.by.items()]
    if done.useless:
        lines.append(f"  {done.useless:,} got no answer of use, and are not asked again")
    if done.problem is not None:
        lines.append(f"  ended early: {done.problem}")
    return "\n".join(lines)


def _compare(parsed: argparse.Namespace) -> int:
    async def act(teachers: Teachers) -> tuple[Prepared, Comparison | None]:
        prepared = await comparison.prepare(teachers, parsed.task, rows=parsed.rows)
        if not parsed.json:
            print(_prepared_text(prepared), flush=True)
        if not await _agreed(parsed):
            return prepared, None
        return prepared, await comparison.compare(teachers, prepared)

    prepared, found = _opened(parsed, act)
    if parsed.json:
        told = {"task": parsed.task, "worst_usd": prepared.worst / 1e6, "rows": len(prepared.gold)}
        told |= {} if found is None else found.model_dump(mode="json") | {"ceiling": found.ceiling}
        print_json(told)
    else:
        print("nothing was asked" if found is None else comparison_text(found))
    return 0 if found is None or found.problem is None else 4


async def _agreed(parsed: argparse.Namespace) -> bool:
    """Whether to pay for it: `--yes`, or what a person at the terminal answers."""
    if parsed.yes:
        return True
    if parsed.json or not sys.stdin.isatty():
        return False
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return (await asyncio.to_thread(sys.stdin.readline)).strip().lower() in ("y", "yes")


def _prepared_text(prepared: Prepared) -> str:
    calls = comparison.REPEATS * len(prepared.gold) * len(prepared.teachers)
    return (
        f"{prepared.task.name}: {len(prepared.teachers)} teachers answer {len(prepared.gold):,} rows "
        f"{comparison.REPEATS} times: {calls:,} calls for at most ${prepared.worst / 1e6:.6f} (--yes asks them)"
    )


def comparison_text(found: Comparison) -> str:
    """A line for each teacher and each pair, and what follows from it."""
    lines = [f"{found.task}: {found.rows:,} rows of gold, ${found.cost / 1e6:.6f}"]
    lines.append("  teacher    right against gold      with itself  per 1,000   p50      terms")
    lines += [_measured_text(one) for one in found.teachers]
    lines += [
        f"  {pair.one} and {pair.other} agree on {pair.agreement:.1%} of {pair.rows:,} rows" for pair in found.pairs
    ]
    if found.ceiling is not None:
        lines.append(
            f"  ceiling: two teachers agree on {found.ceiling:.1%}; a student of one cannot be expected to do better"
        )
    lines.append(f"  {'proposed: ' if found.proposal else ''}{found.reason}")
    if found.problem is not None:
        lines.append(f"  cut short: {found.problem}")
    return "\n".join(lines)


def _measured_text(one: Measured) -> str:
    if one.quality is None or one.lower is None or one.upper is None or one.itself is None or one.per_1000 is None:
        return f"  {one.role:9}  no answer ({one.problem or 'not asked'})  {one.model}"
    p50 = "–" if one.p50 is None else f"{one.p50 * 1000:.0f} ms"
    terms = f"{one.terms}{'' if one.may_train else ', may not label'}"
    return (
        f"  {one.role:9}  {one.quality:6.1%} [{one.lower:.1%}, {one.upper:.1%}]  {one.itself:11.1%}  "
        f"${one.per_1000 / 1e6:8.4f}  {p50:>7}  {terms}  {one.model}"
        + (f"; {one.rows:,} rows, then {one.problem}" if one.problem else "")
    )


_ACTIONS = {
    "list": "in their order, with licence and price",
    "label": "have them answer requests from whose answers nobody may learn",
    "compare": "all answer the same rows of gold, twice; a switch is proposed where one is better in everything",
}

COMMANDS = (
    Command(
        "teachers",
        _teachers,
        "apprentice teachers label classify --dry-run",
        (
            (
                "action",
                {
                    "nargs": "?",
                    "default": "list",
                    "choices": tuple(_ACTIONS),
                    "help": "; ".join(f"{k}: {v}" for k, v in _ACTIONS.items()),
                },
            ),
            ("task", {"nargs": "?", "metavar": "TASK", "help": "list: default all"}),
            (
                "--limit",
                {"type": positive, "default": 100, "metavar": "N", "help": "label: at most; default: %(default)s"},
            ),
            ("--dry-run", {"action": "store_true", "help": "label: say what it would come to; send nothing"}),
            (
                "--rows",
                {"type": positive, "default": 100, "metavar": "N", "help": "compare: at most; default: %(default)s"},
            ),
            ("--yes", {"action": "store_true", "help": "compare: pay for it without being asked"}),
        ),
    ),
)
