"""Commands that change what serves: versions lists, promote, rollback and ramp change; each is kept with who and why."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apprentice import lineage
from apprentice.cli.terminal import Argument, Command, print_json, when, with_store
from apprentice.config import Config
from apprentice.errors import ConfigError
from apprentice.lineage import Lineage
from apprentice.types import Store, Version


def _versions(parsed: argparse.Namespace) -> int:
    """List the versions of a task: which serves, which is tried out, and everything that became of them."""

    async def look(config: Config, store: Store) -> Lineage:
        return await lineage.read(store, config.task(parsed.task).name)

    found = with_store(parsed, look)
    if parsed.json:
        print_json(
            {
                "versions": [_shown(version, found) for version in found.versions],
                "history": [made._asdict() for made in found.history],
                "trial": None if found.trial is None else found.trial.numbers(),
            }
        )
        return 0
    for version in found.versions:
        print(_line(version, found))
    if found.versions:
        print("\n".join(_about(found.versions[-1])))
    if found.trial is not None:
        numbers = ", ".join(f"{name} {value}" for name, value in found.trial.numbers().items())
        print(f"tried out: {numbers}")
    for made in found.history:
        print(
            f"{when(made.at)}  {made.version} {made.state}" + (f" by {made.by}" if made.by else "") + _reason(made.why)
        )
    return 0


def _reason(why: str) -> str:
    return f": {why}" if why else ""


def _shown(version: Version, found: Lineage) -> dict[str, Any]:
    shown = version.model_dump(mode="json", exclude={"metrics": {"confidences", "frozen"}})
    return shown | {"tainted": version.id in found.tainted, "files": Path(version.path).exists()}


def _line(version: Version, found: Lineage) -> str:
    agreement = (version.metrics.get("examination") or {}).get("agreement")
    marks = [
        *([f"agreement {agreement:.3f} held out"] if agreement is not None else []),
        *(["certified"] if version.certified_at is not None else []),
        *(["TAINTED"] if version.id in found.tainted else []),
        *([] if Path(version.path).exists() else ["files are gone"]),
    ]
    about = f"{version.id:6} {version.state:9} {when(version.created_at)}  {version.trained_on} examples"
    return ", ".join([about, *marks])


def _about(version: Version) -> list[str]:
    """What the newest version was examined against, and what the rows are like from which it was taught."""
    examined, rows = version.metrics.get("examination") or {}, version.metrics.get("set") or {}
    beside = {
        "always the commonest answer": examined.get("majority"),
        "the answer to the most similar input": (examined.get("nearest") or {}).get("agreement"),
        "untaught": (examined.get("untrained") or {}).get("agreement"),
        "champion": (examined.get("champion") or {}).get("agreement"),
    }
    told = [f"{name} {value:.3f}" for name, value in beside.items() if value is not None]
    lines = [f"{version.id} beside: {', '.join(told)}"] if told else []
    for part in ("frozen", *(examined.get("writing") or {})):
        found = examined.get("frozen") if part == "frozen" else examined["writing"][part]
        if found:
            champion = "" if found["champion"] is None else f", champion {found['champion']:.3f}"
            lines.append(f"{version.id} {part}: agreement {found['agreement']:.3f} on {found['n']} held out{champion}")
    for reason, count in (rows.get("left_out") or {}).items():
        lines.append(f"{version.id} set: {count} rows left out, {reason}")
    for name, field in (rows.get("fields") or {}).items():
        lines.append(f"{version.id} set: {name or 'output'}: {_balance(field)}")
    return lines


def _balance(field: Mapping[str, Any]) -> str:
    drift = field["drift"]
    told = f"{field['labels']} labels, as diverse as {field['effective']:.1f} equally frequent ones"
    told += f", {field['largest']!r} is {field['largest_share']:.0%}"
    if drift is None:
        return told
    return f"{told}; newest quarter: {drift['total_variation']:.3f} apart ({drift['by_chance']:.3f} by chance)"


def _promote(parsed: argparse.Namespace) -> int:
    """Make a version the champion, whatever speaks against it."""

    async def change(config: Config, store: Store) -> Version:
        about = {"by": parsed.by, "why": parsed.why}
        return await lineage.change(config, store, parsed.task, parsed.version, at=time.time(), **about)

    return _done(parsed, with_store(parsed, change))


def _rollback(parsed: argparse.Namespace) -> int:
    """Serve a version again that served before; without one, the champion's predecessor."""

    async def change(config: Config, store: Store) -> Version:
        about = {"by": parsed.by, "why": parsed.why}
        return await lineage.rollback(config, store, parsed.task, parsed.version, at=time.time(), **about)

    return _done(parsed, with_store(parsed, change))


def _ramp(parsed: argparse.Namespace) -> int:
    """Try a version out beside the champion, or stop doing so."""
    if (parsed.version is None) == (not parsed.abort):
        raise ConfigError("ramp takes a version, or --abort", hint="apprentice ramp classify v3")

    async def change(config: Config, store: Store) -> Version:
        at, by, why = time.time(), parsed.by, parsed.why
        if parsed.abort:
            return await lineage.abort(config, store, parsed.task, at=at, by=by, why=why)
        return await lineage.change(config, store, parsed.task, parsed.version, at=at, state="canary", by=by, why=why)

    return _done(parsed, with_store(parsed, change))


def _done(parsed: argparse.Namespace, version: Version) -> int:
    if parsed.json:
        print_json(version.model_dump(mode="json", exclude={"metrics": {"confidences", "frozen"}}))
    else:
        print(f"{parsed.task}: {version.id} is {version.state}")
    return 0


_WHO: tuple[Argument, ...] = (
    ("--by", {"default": "", "metavar": "NAME", "help": "who says so; default: the account"}),
    ("--why", {"default": "", "metavar": "TEXT"}),
)
_TASK: Argument = ("task", {})

COMMANDS = (
    Command("versions", _versions, "apprentice versions classify", (_TASK,)),
    Command(
        "promote", _promote, "apprentice promote classify v3 --why 'checked by hand'", (_TASK, ("version", {}), *_WHO)
    ),
    Command("rollback", _rollback, "apprentice rollback classify", (_TASK, ("version", {"nargs": "?"}), *_WHO)),
    Command(
        "ramp",
        _ramp,
        "apprentice ramp classify v3",
        (
            _TASK,
            ("version", {"nargs": "?"}),
            ("--abort", {"action": "store_true", "help": "stop trying out what is tried out"}),
            *_WHO,
        ),
    ),
)
