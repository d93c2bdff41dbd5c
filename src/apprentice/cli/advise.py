"""The command that says what to do when a task's targets are missed: advise."""

from __future__ import annotations

import argparse
import time

from apprentice.advise import ROWS, Advice, Rung, advise
from apprentice.cli.terminal import Command, above_zero, positive, print_json, share, with_store
from apprentice.config import Config
from apprentice.types import Store


def _advise(parsed: argparse.Namespace) -> int:
    """Say what would reach a task's target: more answers, another encoder, an ensemble, or the remote. Spends nothing."""

    async def look(config: Config, store: Store) -> Advice:
        return await advise(
            config, parsed.task, store, now=time.time(), target=parsed.target, rows=parsed.rows, limit=parsed.seconds
        )

    found = with_store(parsed, look)
    if parsed.json:
        print_json(found.model_dump(mode="json"))
    else:
        print(_text(found))
    return 0


def _text(found: Advice) -> str:
    ceiling = "not known" if found.ceiling is None else f"{found.ceiling:.3f}"
    lines = [
        f"{found.task}: {found.labels:,} answers are recorded, {found.rows:,} rows were measured; target {found.target:g}",
        f"the remote agrees with itself: {ceiling}",
    ]
    if found.majority is not None:
        lines.append(f"always the commonest answer: {found.majority:.3f}")
    for point in found.points:
        a = point.agreement
        lines.append(f"  {point.examples:>7,} examples: agreement {a.value:.3f} ({a.lower:.3f} to {a.upper:.3f})")
    if (curve := found.curve) is not None:
        a = curve.expected
        lines.append(
            f"  with all of them: {a.value:.3f} ({a.lower:.3f} to {a.upper:.3f}); ends at {curve.asymptote.value:.3f}"
        )
    lines += [line for number, rung in enumerate(found.ladder, 1) for line in _rung(number, rung)]
    return "\n".join([*lines, f"take: {found.take} ({found.why})"])


def _rung(number: int, rung: Rung) -> list[str]:
    expected = "not measured" if rung.expected is None else f"{rung.expected.value:.3f}"
    costs = [
        *([f"{rung.examples:,} more examples", f"${rung.cost / 1e6:.2f}"] if rung.examples else []),
        *([f"{rung.days:g} days"] if rung.days is not None and rung.examples else []),
        *([f"{rung.seconds:.0f} s of teaching"] if rung.seconds else []),
    ]
    lines = [f"{number}. {rung.remedy}: {expected}, {rung.state}" + (f" ({', '.join(costs)})" if costs else "")]
    return [*lines, f"   {rung.change}", *([f"   {rung.note}"] if rung.note else [])]


COMMANDS = (
    Command(
        "advise",
        _advise,
        "apprentice advise classify",
        (
            ("task", {}),
            (
                "--target",
                {"type": share, "metavar": "SHARE", "help": "agreement to reach; default: what the task asks for"},
            ),
            (
                "--rows",
                {
                    "type": positive,
                    "default": ROWS,
                    "metavar": "N",
                    "help": "rows to measure at most; default: %(default)s",
                },
            ),
            (
                "--seconds",
                {"type": above_zero, "default": 60.0, "metavar": "N", "help": "to take, about; default: %(default)s"},
            ),
        ),
    ),
)
