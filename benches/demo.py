"""The demo's figures: the shipped recording through the whole product, for five seeds of the sampling.

    python -m benches.demo [--quick] [--json]

Each seed is `apprentice demo --json` in a process of its own; nothing is shared between them. `--quick` plays the first
600 requests of one seed, whose figures inform and have no bars.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import fmean
from typing import Any

from benches import Figure, Options, at_least, at_most, run, shown

SEEDS = range(5)
SHOWN = (
    "remote_share",
    "remote_share_last_quarter",
    "served_agreement",
    "served_accuracy",
    "remote_accuracy",
    "wall_s",
)


def played(seed: int, requests: int | None) -> dict[str, Any]:
    """What the demo printed."""
    command = [sys.executable, "-m", "apprentice.cli", "demo", "--json", "--seed", str(seed)]
    more = [] if requests is None else ["--requests", str(requests)]
    found: dict[str, Any] = json.loads(
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
    )
    return found


def measure(options: Options) -> list[Figure]:
    """The default seed, which people see, against the bars; the mean of five, whose paths differ widely, against wider ones."""
    if options.quick:
        first = played(0, 600)
        return [shown(name, first[name]) for name in SHOWN]
    all_seeds = []
    for seed in SEEDS:
        found = played(seed, None)
        options.say(f"seed {seed}: " + ", ".join(f"{name} {found[name]:.3f}" for name in SHOWN))
        all_seeds.append(found)
    means = {name: fmean(found[name] for found in all_seeds) for name in SHOWN}
    figures: list[Figure] = []
    first = all_seeds[0]
    figures += [
        at_most("default seed: remote share", first["remote_share"], 0.40, "share"),
        at_most("default seed: remote share, last quarter", first["remote_share_last_quarter"], 0.30, "share"),
        at_least("default seed: served accuracy", first["served_accuracy"], 0.82, "share"),
        at_least("default seed: served agreement", first["served_agreement"], 0.85, "share"),
        shown("default seed: the remote's own accuracy", first["remote_accuracy"], "share"),
        at_most("default seed: wall", first["wall_s"], 120, "s"),
        at_most("mean of five: remote share", means["remote_share"], 0.45, "share"),
        at_most("mean of five: remote share, last quarter", means["remote_share_last_quarter"], 0.35, "share"),
        at_least("mean of five: served accuracy", means["served_accuracy"], 0.82, "share"),
        at_least("mean of five: served agreement", means["served_agreement"], 0.85, "share"),
    ]
    return figures


if __name__ == "__main__":
    sys.exit(run("demo", measure))
