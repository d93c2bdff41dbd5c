"""What serves a task: its versions, what is tried out, what served before, and how any of that is changed.

Every change is one row of the history and one Event, with who made it and why. An engine follows from its next request on.
"""

from __future__ import annotations

import contextlib
import getpass
import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from apprentice import confidence
from apprentice.config import Config, TaskConfig
from apprentice.errors import ConfigError
from apprentice.promotion import Ramp, Trial
from apprentice.shelf import load
from apprentice.types import Confidence, Event, Mode, Promotion, PromotionState, Seconds, Store, Version

BY_ITSELF = "apprentice"  # who did it, where nobody did


class Lineage(NamedTuple):
    """The versions of a task in the order in which they were made, and everything that became of them."""

    versions: list[Version]
    history: list[Promotion]
    tainted: frozenset[str]  # versions that learned from something that was taken back since
    trial: Trial | None  # of the canary


async def read(store: Store, task: str) -> Lineage:
    """What the store knows of the task's versions."""
    events = await store.events(task, names=["VERSION_TAINTED"], limit=10_000)
    return Lineage(
        versions=await store.versions(task),
        history=await store.promotions(task),
        tainted=frozenset(str(event.evidence.get("version")) for event in events),
        trial=(await ramp(store, task)).trial,
    )


async def ramp(store: Store, task: str, *, until: int | None = None) -> Ramp:
    """What is tried out in the task, with the evidence of the Records up to `until`: they are folded anew."""
    history = await store.promotions(task)
    if not history:
        return Ramp()
    if history[-1].state != "canary":
        return Ramp(number=history[-1].number)
    begun = history[-1]
    found = Ramp(number=begun.number - 1)
    rows = (await store.changes(begun.after)).evidence
    known = [row for row in rows if row.task == task and (until is None or row.seq <= until)]
    for _ in found.fold(known, [begun]):
        pass  # what became true was recorded when it did
    return found


def with_canary(now: Confidence, ramp: Ramp, known: Mapping[str, Sequence[float]]) -> Confidence:
    """The standing as it is while a canary runs, if one does. `known`: confidences on recent inputs, by version."""
    if (trial := ramp.trial) is None:
        return now
    return confidence.beside(now, trial.version, trial.share, known.get(trial.version, ()))


def examples_of(version: Version | None) -> int:
    """How many Examples a version was made of, those that it was examined on among them; 0 for none."""
    if version is None:
        return 0
    held_out = (version.metrics.get("held_out") or {}).get("n", 0)
    return version.trained_on + int((version.metrics.get("set") or {}).get("held_out", held_out))


async def standing(config: Config, task: TaskConfig, store: Store) -> Confidence:
    """The task's live state as an engine sees it: the last snapshot, and the Records after it."""
    settings = confidence.settings(task.confidence_thresholds, task.sampling or config.sampling)
    seq, state = 0, confidence.State()
    if (saved := await store.load_state(task.name)) is not None:
        with contextlib.suppress(ValueError):  # of another format: built again from the Records
            state, seq = confidence.State.from_json(saved[1]), saved[0]
    changes = await store.changes(seq)
    known = {version.id: version.metrics.get("confidences", []) for version in await store.versions(task.name)}
    rows = [row for row in changes.evidence if row.task == task.name]
    made = [promotion for promotion in changes.promotions if promotion.task == task.name]
    for _ in confidence.fold(state, settings, rows, made, known):
        pass
    return confidence.standing(state, settings)


async def change(
    config: Config,
    store: Store,
    task: str,
    version: str,
    *,
    at: Seconds,
    state: PromotionState = "champion",
    by: str = "",
    why: str = "",
) -> Version:
    """The version, after it became champion, or canary, or is no longer tried out. Nothing changes where it is that.

    Raises ConfigError for a version that does not exist or can no longer be loaded, before anything is changed.
    """
    versions = await store.versions(config.task(task).name)
    chosen = _named(versions, task, version)
    if state != "rejected":
        await _check_loads(config.task(task), config, chosen)
    before = next((v.id for v in versions if v.state == "champion"), None)
    by = by or whoever()
    if state == "canary" and before in (None, version):
        raise ConfigError(
            f"version {version!r} of task {task!r} cannot be tried out: it needs a champion beside it",
            hint="`apprentice promote` makes it champion",
        )
    if state == "rejected" and chosen.state != "canary":
        raise ConfigError(f"version {version!r} of task {task!r} is not being tried out")
    if await store.promote(task, version, at, state=state, by=by, why=why):
        name = {"champion": "PROMOTED", "canary": "CANARY_STARTED", "rejected": "CANARY_ABORTED"}[state]
        back = state == "champion" and any(
            p.version == version and p.state == state for p in await _former(store, task)
        )
        evidence = {"version": version, "before": before, "by": by, "why": why}
        message = f"{version}, by {by}" + (f": {why}" if why else "")
        await store.add_event(
            Event(name="ROLLED_BACK" if back else name, task=task, at=at, message=message, evidence=evidence)
        )
    return _named(await store.versions(task), task, version)


async def rollback(
    config: Config, store: Store, task: str, version: str | None = None, *, at: Seconds, by: str = "", why: str = ""
) -> Version:
    """Make a version champion that was it before; None: the one before the champion. Raises ConfigError."""
    config.task(task)
    if version is None:
        history = [made for made in await store.promotions(task) if made.state == "champion"]
        version = next((made.version for made in reversed(history) if made.version != history[-1].version), None)
        if version is None:
            raise ConfigError(
                f"task {task!r} has no version before its champion", hint="`apprentice versions` lists them"
            )
    return await change(config, store, task, version, at=at, by=by, why=why)


async def abort(config: Config, store: Store, task: str, *, at: Seconds, by: str = "", why: str = "") -> Version:
    """The version that is no longer tried out. Raises ConfigError when none is."""
    canary = next((v for v in await store.versions(config.task(task).name) if v.state == "canary"), None)
    if canary is None:
        raise ConfigError(f"no version of task {task!r} is being tried out", hint="`apprentice versions` lists them")
    return await change(config, store, task, canary.id, at=at, state="rejected", by=by, why=why)


async def settle(store: Store, task: str, trial: Trial, at: Seconds) -> None:
    """Write what a trial ended in, unless somebody has decided something else since it began."""
    state: Literal["champion", "rejected"] = "champion" if trial.verdict == "promote" else "rejected"
    why = f"after {trial.audits} audits beside the champion: N {trial.gain:.3g}, H {trial.loss:.3g}"
    await store.promote(task, trial.version, at, state=state, by=BY_ITSELF, why=why, expects=trial.number)


async def drop(store: Store, task: str, version: str, number: int, *, at: Seconds, why: str) -> None:
    """End what promotion `number` began for another reason than the evidence, once."""
    if await store.promote(task, version, at, state="rejected", by=BY_ITSELF, why=why, expects=number):
        evidence = {"version": version, "by": BY_ITSELF, "why": why}
        await store.add_event(
            Event(name="CANARY_ABORTED", task=task, at=at, message=f"{version}: {why}", evidence=evidence)
        )


def whoever() -> str:
    """The name of the account that runs this process, or its number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


async def _former(store: Store, task: str) -> list[Promotion]:
    return (await store.promotions(task))[:-1]


def _named(versions: Sequence[Version], task: str, name: str) -> Version:
    for version in versions:
        if version.id == name:
            return version
    known = ", ".join(version.id for version in versions) or "none"
    raise ConfigError(f"task {task!r} has no version {name!r}", hint=f"its versions: {known}")


async def _check_loads(task: TaskConfig, config: Config, version: Version) -> None:
    try:
        model = load(task.local or config.local, version.path)
    except ConfigError as error:
        raise ConfigError(
            f"version {version.id!r} of task {task.name!r} can no longer be loaded: {error}",
            hint="nothing was changed; choose another version, or restore its files",
        ) from error
    await model.close()


async def set_mode(
    store: Store, task: str, mode: Literal["remote", "auto"], *, at: Seconds, seconds: Seconds | None = None
) -> Mode:
    """The mode as every process on the store will see it; recorded as the event MODE, too. See `Apprentice.mode`."""
    if seconds is not None and (mode == "auto" or not 0 < seconds < math.inf):
        raise ConfigError(
            f"mode {mode!r} for {seconds!r} seconds means nothing",
            hint="`remote` takes a time above 0, or none: until `auto`, which takes none",
        )
    until = None if seconds is None else at + seconds
    await store.set_mode(task, mode, until, at)
    spell = "until `auto`" if until is None else f"for {seconds:g} seconds"
    message = f"the remote alone answers {spell}" if mode == "remote" else "the state of the task decides who answers"
    await store.add_event(
        Event(name="MODE", task=task, at=at, message=message, evidence={"mode": mode, "until": until})
    )
    return Mode(mode=mode, until=until, at=at)
