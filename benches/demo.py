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
    """The default seed against the bars, then the mean of the five."""
    if options.quick:
        first = played(0, 600)
        return [shown(name, first[name]) for name in SHOWN]
    all_seeds = []
    for seed in SEEDS:
        found = played(seed, None)
        options.say(f"seed {seed}: " + ", ".join(f"{name} {found[name]:.3f}" for name in SHOWN))
        all_seeds.append(found)
    means = {name: fmean(found[name] for found in all_seeds) for name in SHOWN}
    figures = []
    for label, found in (("default seed", all_seeds[0]), ("mean of five", means)):
        figures += [
            at_most(f"{label}: remote share", found["remote_share"], 0.55, "share"),
            at_most(f"{label}: remote share, last quarter", found["remote_share_last_quarter"], 0.45, "share"),
            at_least(f"{label}: served accuracy", found["served_accuracy"], 0.81, "share"),
            at_least(f"{label}: served agreement", found["served_agreement"], 0.85, "share"),
            shown(f"{label}: the remote's own accuracy", found["remote_accuracy"], "share"),
            at_most(f"{label}: wall", found["wall_s"], 120, "s"),
        ]
    return figures


if __name__ == "__main__":
    sys.exit(run("demo", measure))
