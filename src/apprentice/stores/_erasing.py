"""Words leave rows that stay: because a person asks for it, or because their time is over. All within one transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import apsw

from apprentice.stores import (
    EVENT_COLUMNS,
    VERSION_COLUMNS,
    event_row,
    forgotten,
    from_text,
    read_version,
    runs,
    to_json,
    to_text,
)
from apprentice.stores._writer import Row, fetch, fetch_where, insert
from apprentice.types import Event, Forgotten, Json, Seconds, Version

_AT_ONCE = 500  # rows whose time is over, in one transaction


class _Row(NamedTuple):
    """A Record whose words go."""

    task: str  # as in the table, like the id
    seq: int
    request_id: str
    at: Seconds
    has_remote: int


def forget(
    connection: apsw.Connection, subject: str, at: Seconds, task: str | None, *, dry_run: bool
) -> list[Forgotten]:
    """What there is of a subject, by task; unless it is a dry run, it is gone, and stays away."""
    named = None if task is None else to_text(task)
    sql = "SELECT task, seq, request_id, at, has_remote FROM records WHERE subject = ? AND task = COALESCE(?, task)"
    rows = [_Row(*row) for row in fetch(connection, f"{sql} ORDER BY task, seq", (to_text(subject), named))]
    if not dry_run:
        tombstone = "ON CONFLICT DO UPDATE SET at = max(at, excluded.at)"
        insert(connection, "erased", "subject, task, at", [(to_text(subject), named or "", at)], tombstone)
    return [
        _forget_one(connection, list(some), at, dry_run=dry_run) for _, some in groupby(rows, key=lambda row: row.task)
    ]


def _forget_one(connection: apsw.Connection, rows: Sequence[_Row], at: Seconds, *, dry_run: bool) -> Forgotten:
    task = rows[0].task
    worth, corrections, labels = _taught(connection, rows)
    teaching = [row for row in rows if worth[row.request_id]]
    since = min((row.at for row in teaching), default=None)
    versions = [] if since is None else [made for made in _versions(connection, task) if made.created_at >= since]
    found = Forgotten(
        task=from_text(task),
        records=len(rows),
        corrections=corrections,
        labels=labels,
        versions=tuple(version.id for version in versions),
        teaching=since is not None and _is_taught(connection, task, at),
    )
    if not dry_run:
        _blank(connection, rows, worth)
        for version in found.versions:
            _taint(connection, task, version, at)
        if found.teaching:
            insert(connection, "taints", "task, at", [(task, at)], "ON CONFLICT DO UPDATE SET at = excluded.at")
    return found


def expire(connection: apsw.Connection, task: str, before: Seconds, *, imported: bool) -> int:
    """How many rows older than that were done; less than there are if there are many."""
    if imported:
        return _expire_examples(connection, task, before)
    sql = "SELECT task, seq, request_id, at, has_remote FROM records WHERE task = ? AND words AND at < ? LIMIT ?"
    rows = [_Row(*row) for row in fetch(connection, sql, (task, before, _AT_ONCE))]
    if rows:
        _blank(connection, rows, _taught(connection, rows)[0])
    sql = "SELECT id, inputs FROM batches WHERE task = ? AND words AND NOT open AND json_extract(body, '$.at') < ? LIMIT 10"
    batches = fetch(connection, sql, (task, before))
    for id, inputs in batches:
        nothing = json.dumps([None] * len(json.loads(inputs)))
        fetch(connection, "UPDATE batches SET inputs = ?, words = 0 WHERE id = ?", (nothing, id))
    return len(rows) + len(batches)


def _expire_examples(connection: apsw.Connection, task: str, before: Seconds) -> int:
    sql = """SELECT number FROM examples WHERE task = ? AND json_extract(body, '$.at') > 0
             AND json_extract(body, '$.at') < ? LIMIT ?"""
    numbers = fetch(connection, sql, (task, before, _AT_ONCE))
    connection.executemany("DELETE FROM examples WHERE number = ?", numbers)
    if numbers:
        _forget_labels(connection, task, [(before, len(numbers))])
    return len(numbers)


def keep_correction(connection: apsw.Connection, columns: str, row: Row) -> bool:
    """Whether it was kept: not about a request whose words are gone."""
    if has_no_words(connection, [row[0]]):
        return False
    insert(connection, "corrections", columns, [row])
    return True


def has_no_words(connection: apsw.Connection, request_ids: Sequence[str]) -> set[str]:
    """Those of the requests, by the ids in the table, whose words are gone."""
    found: set[str] = set()
    for some in runs(request_ids):
        places = ", ".join("?" * len(some))
        rows = fetch(
            connection, f"SELECT request_id FROM records WHERE request_id IN ({places}) AND NOT words", (*some,)
        )
        found.update(row[0] for row in rows)
    return found


def add_event(connection: apsw.Connection, event: Event) -> None:
    """Keep the Event; one about frozen prompts without those whose words are gone."""
    if event.name == "PROBED":
        records = [to_text(id) for id in event.evidence.get("records") or []]
        event = event.model_copy(update={"evidence": _without(event.evidence, has_no_words(connection, records))})
    again = "ON CONFLICT (task, key) WHERE key IS NOT NULL DO NOTHING"
    insert(connection, "events", EVENT_COLUMNS, [event_row(event)], again)


def taint_new(connection: apsw.Connection, version: Version) -> None:
    """Mark the version that was being made when something was erased that it may have learned from."""
    task = to_text(version.task)
    for (at,) in fetch(connection, "SELECT at FROM taints WHERE task = ?", (task,)):
        _taint(connection, task, version.id, at)
        fetch(connection, "DELETE FROM taints WHERE task = ?", (task,))


# --- what of it is where


def _taught(connection: apsw.Connection, rows: Sequence[_Row]) -> tuple[dict[str, int], int, int]:
    """From how many labels of each request one could learn, and how many corrections and labels there are in all."""
    worth = {row.request_id: row.has_remote for row in rows}
    ids = [from_text(id) for id in worth]
    corrections = list(fetch_where(connection, "SELECT request_id, action FROM corrections WHERE request_id", ids))
    last: dict[str, str] = dict(corrections)
    for id, action in last.items():
        worth[id] += action != "withdrawn"
    sql = "SELECT request_id, json_extract(body, '$.answer') IS NOT NULL FROM labels WHERE request_id"
    labels = list(fetch_where(connection, sql, ids))
    for id, is_answered in labels:
        worth[id] += is_answered
    return worth, len(corrections), len(labels)


def _blank(connection: apsw.Connection, rows: Sequence[_Row], worth: dict[str, int]) -> None:
    for row in rows:
        [(body,)] = fetch(connection, "SELECT body FROM records WHERE seq = ?", (row.seq,))
        record = forgotten(body)
        sql = "UPDATE records SET body = ?, words = 0, subject = NULL, idempotency_key = NULL, has_remote = 0 WHERE seq = ?"
        fetch(connection, sql, (to_json(record, f"record {record.request_id!r}"), row.seq))
    ids = {row.request_id for row in rows}
    for table in ("corrections", "labels"):
        connection.executemany(f"DELETE FROM {table} WHERE request_id = ?", [(id,) for id in ids])
    for task, some in groupby(rows, key=lambda row: row.task):
        _forget_labels(connection, task, [(row.at, worth[row.request_id]) for row in some])
        _forget_prompts(connection, task, ids)


def _forget_labels(connection: apsw.Connection, task: str, gone: Sequence[tuple[Seconds, int]]) -> None:
    """Versions remember how many labels there were: of those that are still there. Else teaching would wait for as many."""
    for version in _versions(connection, task):
        lost = sum(labels for at, labels in gone if at <= version.created_at)
        if lost and "labels" in version.metrics:
            metrics = version.metrics | {"labels": max(version.metrics["labels"] - lost, 0)}
            values = (to_json(metrics, f"version {version.id!r}: metrics"), task, to_text(version.id))
            fetch(connection, "UPDATE versions SET metrics = ? WHERE task = ? AND id = ?", values)


def _forget_prompts(connection: apsw.Connection, task: str, ids: set[str]) -> None:
    """Of the frozen prompts, those. When none is left, others are frozen."""
    for seq, evidence in fetch(
        connection, "SELECT seq, evidence FROM events WHERE name = 'PROBED' AND task = ?", (task,)
    ):
        before = json.loads(evidence)
        left = _without(before, ids)
        if not left.get("records"):
            fetch(connection, "DELETE FROM events WHERE seq = ?", (seq,))
        elif left != before:
            fetch(connection, "UPDATE events SET evidence = ? WHERE seq = ?", (to_json(left, "event 'PROBED'"), seq))


def _without(evidence: dict[str, Json], ids: set[str]) -> dict[str, Json]:
    records, answers = evidence.get("records") or [], evidence.get("answers")
    kept = [place for place, id in enumerate(records) if to_text(id) not in ids]
    told = {"records": [records[place] for place in kept]} if records else {}
    if answers is not None:
        told["answers"] = [answers[place] for place in kept]
    return evidence | told


def _versions(connection: apsw.Connection, task: str) -> list[Version]:
    sql = f"SELECT {VERSION_COLUMNS} FROM versions WHERE task = ? ORDER BY number"
    return [read_version(row) for row in fetch(connection, sql, (task,))]


def _is_taught(connection: apsw.Connection, task: str, at: Seconds) -> bool:
    """Whether a version may be in the making: a cycle runs, or somebody trains for money."""
    cycle = "SELECT 1 FROM leases WHERE name = ? AND owner IS NOT NULL AND until > ?"
    job = "SELECT 1 FROM ledger WHERE task = ? AND purpose = 'train' AND state = 'held'"
    name = to_text(f"learn/{from_text(task)}")
    return bool(fetch(connection, cycle, (name, at)) or fetch(connection, job, (task,)))


def _taint(connection: apsw.Connection, task: str, version: str, at: Seconds) -> None:
    message = (
        f"{version} may have learned from requests that were erased since: "
        f"`apprentice learn {from_text(task)}` makes one that has not; then remove the files of this one"
    )
    key = f"VERSION_TAINTED/{version}/erased/{at}"
    event = Event(
        name="VERSION_TAINTED", task=from_text(task), at=at, message=message, evidence={"version": version}, key=key
    )
    add_event(connection, event)
