"""What was said is not kept for ever: its time is over, or the person whom it is about asks for it.

Rows stay where something is counted by them, without a word of what was said: see `Record.without_words`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from apprentice.config import Config
from apprentice.errors import InvalidInput
from apprentice.stores import digest
from apprentice.types import Event, Forgotten, Seconds, Store

RELAYED = "passthrough"  # the task of requests that the gateway hands on as they are
_DAY: Seconds = 86_400.0


async def erase(
    config: Config, store: Store, subject: str, *, at: Seconds, task: str | None = None, dry_run: bool = False
) -> list[Forgotten]:
    """What was erased, by task: every word of requests with this `subject` among their tags. With `dry_run` nothing is.

    Afterwards it is in no row, in no byte of the store's files, and in no data set of an open training job, which begins
    anew; versions that may have learned from it are marked. Killed at any moment and repeated, it comes to the same. Raises
    UnknownTask, InvalidInput for a subject without a name, StoreError.
    """
    if not subject:
        raise InvalidInput("subject: is empty", hint="give the value of the tag `subject`")
    if task is not None and task != RELAYED:
        config.task(task)
    name = digest(subject)
    found = await store.forget(name, at, task=task, dry_run=True)
    if dry_run:
        return found
    # Before, because nobody knows whose sets those were when the rows are gone; and after, of a cycle that began in between.
    await asyncio.to_thread(_drop_sets, config, found)
    found = await store.forget(name, at, task=task)
    await asyncio.to_thread(_drop_sets, config, found)
    await store.scrub()
    for one in found:
        said = f"{one.records:,} requests of one subject were erased"
        said += f"; {', '.join(one.versions)} may have learned from them" if one.versions else ""
        told = one.model_dump(mode="json", exclude={"task"})
        await store.add_event(Event(name="ERASED", task=one.task, at=at, message=said, evidence=told))
    return found


async def expire(config: Config, store: Store, *, now: Seconds) -> int:
    """How many rows lost their words because they are older than `retention` says. Raises StoreError."""
    kept = {task.name: task.retention or config.retention for task in config.tasks} | {RELAYED: config.retention}
    done = 0
    for task, retention in kept.items():
        for days, imported in ((retention.inputs, False), (retention.imported, True)):
            while days is not None and (some := await store.expire(task, now - days * _DAY, imported=imported)):
                done += some
    if done:
        await store.scrub(rebuild=False)
    return done


def _drop_sets(config: Config, found: Iterable[Forgotten]) -> None:
    """Remove the data sets of jobs that are open. Which rows are in them is not looked at: they are made again."""
    for one in found:
        local = next((task.local for task in config.tasks if task.name == one.task), None) or config.local
        folder = local.model_dir / one.task
        for job in folder.glob(".training/*/"):
            if _is_open(job / "row.json"):
                shutil.rmtree(job, ignore_errors=True)
        for data in folder.glob(".jobs/*.jsonl"):
            data.unlink(missing_ok=True)
        if (log := folder / "learn.log").exists():
            os.truncate(log, 0)


def _is_open(row: Path) -> bool:
    try:
        return json.loads(row.read_bytes()).get("checkpoint") is None
    except (OSError, ValueError):
        return True  # of a job that is only beginning
