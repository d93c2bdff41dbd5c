"""One SQLite file: the store of one machine, for any number of processes on it.

All writes that wait at one moment go into one transaction, and their callers go after its commit (an fsync costs 0.2 to 4 ms;
a hundred requests share it): in a thread, or in the loop itself where that is sooner (docs/adr/0029). Reads have their own
connection, and a thread for those that take a while.

Write-ahead log with `synchronous=FULL`: what a call has returned survives a power cut. Every transaction begins as
`BEGIN IMMEDIATE`, so that none ever has to upgrade from reading to writing (`SQLITE_BUSY_SNAPSHOT`, which no time-out
waits for). Processes queue for their turn at a lock of the operating system beside the database: SQLite's own waiting
polls with growing pauses, and of 32 processes lets some wait for seconds.

Statements are few and large on purpose: each gives the interpreter's lock away, and gets it back only after up to 5 ms
when the event loop is busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import apsw

from apprentice.errors import StoreBusy, StoreCorrupt, StoreError, StoreFull
from apprentice.stores import (
    APPLICATION_ID,
    BATCH_COLUMNS,
    CORRECTION_COLUMNS,
    EVENT_COLUMNS,
    EVIDENCE_COLUMNS,
    EXAMPLE_COLUMNS,
    LABEL_COLUMNS,
    LARGEST,
    LEDGER_COLUMNS,
    PROMOTION_COLUMNS,
    VERSION_COLUMNS,
    Amount,
    EndState,
    _erasing,
    batch_row,
    check_sqlite,
    correction_row,
    example_row,
    from_text,
    label_row,
    migrate,
    next_version_id,
    read_batch,
    read_correction,
    read_entry,
    read_event,
    read_evidence,
    read_example,
    read_label,
    read_mode,
    read_promotion,
    read_record,
    read_version,
    record_row,
    runs,
    to_text,
    version_row,
)
from apprentice.stores._writer import NO_SPACE, Booking, Row, Scrub, Writer, amounts_of, fetch, insert, translated
from apprentice.types import (
    Batch,
    Cap,
    Changes,
    Correction,
    Event,
    Example,
    Forgotten,
    Hold,
    Label,
    Lease,
    Micros,
    Promotion,
    PromotionState,
    Record,
    Seconds,
    Spending,
    Version,
)

PAGE = 256  # Records in one read, so that a long read neither blocks short ones nor holds up checkpoints


def build(path: str | Path, wait: Seconds = 30.0) -> SqliteStore:
    """Open the store in this file, or make it: the file with mode 0600, missing folders with mode 0700.

    `wait`: seconds that a call may wait for other processes before it fails with StoreBusy.
    Raises StoreCorrupt (no database, or another program's), StoreTooNew, StoreBusy, StoreFull, StoreError.
    """
    check_sqlite(apsw.sqlite_lib_version())
    path = Path(path).absolute()
    turn = _create(path)
    deadline = time.monotonic() + wait
    try:
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, turn)
            while True:  # two processes may make the same store: SQLite's time-out does not cover the change to WAL
                try:
                    writes = opened.enter_context(contextlib.closing(_connect(path, wait)))
                    store = SqliteStore(path, turn, writes, _connect(path, wait, reads=True), wait)
                    opened.pop_all()
                    return store
                except apsw.BusyError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(0.005)
    except apsw.Error as error:
        raise translated(error, path, 0) from error


class SqliteStore:
    """The Store in one SQLite file. Its methods may be called from any event loop."""

    def __init__(self, path: Path, turn: int, writes: apsw.Connection, reads: apsw.Connection, wait: Seconds) -> None:
        self._path = path
        self._reads = reads
        self._wait = wait
        self._reading = threading.Lock()  # one reads at a time
        self._live: tuple[list[Row], list[Version]] = [], []  # who serves: the rows, and what they say
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="apprentice-read")
        self._writer = Writer(path, turn, writes, wait)

    async def close(self) -> None:
        """Finish what waits, and close the file. Calls after it raise StoreError."""
        if self._writer.close():
            await asyncio.get_running_loop().run_in_executor(self._reader, self._end_reading)
            self._reader.shutdown(wait=False)
        await self._writer.end()

    # --- Records

    async def append(self, record: Record) -> int:
        """The Record's number. Raises IdempotencyConflict for a key used before, StoreError for a request_id."""
        return int(await self._writer.submit(record_row(record)))

    async def changes(self, after: int) -> Changes:
        """Evidence of every task with a number above `after`, in order; promotions since then; champions and modes of today."""
        page = await self._glance(partial(self._changes, after=after, since=after, limit=PAGE))
        evidence, limit = page.evidence, PAGE
        while len(page.evidence) == limit:
            limit = 16 * PAGE
            page = await self._read(partial(self._changes, after=evidence[-1].seq, since=after, limit=limit))
            evidence += page.evidence
        return page._replace(evidence=evidence)

    async def record(self, request_id: str) -> Record | None:
        return await self._glance(partial(_one_record, where="request_id = ?", values=(to_text(request_id),)))

    async def record_by_key(self, task: str, idempotency_key: str) -> Record | None:
        values = (to_text(task), to_text(idempotency_key))
        return await self._glance(partial(_one_record, where="task = ? AND idempotency_key = ?", values=values))

    async def records(
        self, task: str, *, after: int = 0, limit: int | None = None, labelled: bool = False, newest: bool = False
    ) -> list[tuple[int, Record]]:
        """The task's Records with a number above `after`, in order: the first `limit`, or with `newest` the last.

        `labelled`: only those with a valid output of the remote.
        """
        found: list[tuple[int, Record]] = []
        before = LARGEST
        while limit is None or len(found) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            page = await self._read(partial(_records, to_text(task), after, before, size, labelled, newest))
            found += page
            if len(page) < size:
                break
            if newest:
                before = page[-1][0]
            else:
                after = page[-1][0]
        return found[::-1] if newest else found

    async def count(self, task: str, *, labelled: bool = False) -> int:
        sql = "SELECT count(*) FROM records WHERE task = ?" + (" AND has_remote" if labelled else "")
        return int((await self._read(partial(fetch, sql=sql, values=(to_text(task),))))[0][0])

    async def save_state(self, task: str, seq: int, state: str) -> None:
        """Keep the state of the task as of Record `seq`; one of a later Record stays."""
        await self._change(
            """INSERT INTO states VALUES (?, ?, ?)
               ON CONFLICT (task) DO UPDATE SET seq = excluded.seq, state = excluded.state WHERE excluded.seq >= seq""",
            (to_text(task), seq, to_text(state)),
        )

    async def load_state(self, task: str) -> tuple[int, str] | None:
        sql = "SELECT seq, state FROM states WHERE task = ?"
        rows = await self._read(partial(fetch, sql=sql, values=(to_text(task),)))
        return (rows[0][0], from_text(rows[0][1])) if rows else None

    # --- Versions, Events, leases

    async def add_version(self, version: Version) -> Version:
        """The Version as kept; an empty id becomes the next of "v1", "v2", … Raises StoreError for a taken id."""
        added: Version = await self._writer.submit(partial(_add_version, version=version))
        return added

    async def versions(self, task: str) -> list[Version]:
        """All of the task, in the order in which they were added."""
        return await self._read(partial(_versions, where="task = ?", values=(to_text(task),)))

    async def promote(
        self,
        task: str,
        version: str,
        at: Seconds,
        *,
        state: PromotionState = "champion",
        by: str = "",
        why: str = "",
        expects: int | None = None,
        lease: Lease | None = None,
    ) -> bool:
        """Make the version the champion and retire the former one, or begin or end ("rejected") trying it out, at once.

        Any of it ends what was tried out before. False, and nothing changed, if the version is that already, or if
        `expects` is not the number of the task's last promotion. Raises StoreError for an unknown version, for a
        canary without a champion beside it, and when `lease` is no longer the current one of its name.
        """
        act = partial(_promote, task=task, version=version, at=at, state=state, by=by, why=why)
        return bool(await self._writer.submit(partial(act, expects=expects, lease=lease)))

    async def promotions(self, task: str) -> list[Promotion]:
        """Everything that became of the task's versions, in order."""
        return await self._read(partial(_promotions, where="task = ?", values=(to_text(task),)))

    async def certify(self, task: str, version: str, at: Seconds) -> None:
        """Note when the version was certified. Raises StoreError for an unknown version."""
        await self._writer.submit(partial(_certify, task=task, version=version, at=at))

    async def add_correction(self, correction: Correction) -> None:
        """Keep what a person said about a request, beside what was said before.

        Raises StoreError for a request whose words are gone.
        """
        act = partial(_erasing.keep_correction, columns=CORRECTION_COLUMNS, row=correction_row(correction))
        if not await self._writer.submit(act):
            raise StoreError(f"request {correction.request_id!r} was erased: nothing can be said about it any more")

    async def corrections(self, task: str, *, request_id: str | None = None) -> list[Correction]:
        """All that was said about the task's requests, or about one of them, in order."""
        where, values = "task = ?", [to_text(task)]
        if request_id is not None:
            where, values = f"{where} AND request_id = ?", [*values, to_text(request_id)]
        sql = f"SELECT {CORRECTION_COLUMNS} FROM corrections WHERE {where} ORDER BY number"
        return [read_correction(row) for row in await self._read(partial(fetch, sql=sql, values=tuple(values)))]

    async def add_label(self, label: Label) -> bool:
        """Keep what a teacher said; False, and nothing is changed, where the request has a Label already, or no words."""
        return bool(await self._writer.submit(partial(_add_label, label=label)))

    async def labels(self, task: str) -> list[Label]:
        """All of the task, in the order in which they were given."""
        sql = "SELECT body FROM labels WHERE task = ? ORDER BY number"
        return [read_label(body) for (body,) in await self._read(partial(fetch, sql=sql, values=(to_text(task),)))]

    async def add_examples(self, task: str, examples: Sequence[Example]) -> int:
        """Keep imported Examples, all or none; how many were not there before. Each is named by its `request_id`."""
        rows = [example_row(task, example) for example in examples]
        return int(await self._writer.submit(partial(_add_examples, rows=rows)))

    async def examples(self, task: str) -> list[Example]:
        """All that were imported for the task, in the order in which they were."""
        found: list[Example] = []
        after = 0
        while page := await self._read(partial(_examples, task=to_text(task), after=after)):
            found += [example for _, example in page]
            after = page[-1][0]
        return found

    async def count_examples(self, task: str) -> int:
        sql = "SELECT count(*) FROM examples WHERE task = ?"
        return int((await self._read(partial(fetch, sql=sql, values=(to_text(task),))))[0][0])

    async def remove_examples(self, task: str, ids: Sequence[str]) -> int:
        """Take these Examples out, all or none; how many of them there were."""
        return int(await self._writer.submit(partial(_remove_examples, task=to_text(task), ids=ids)))

    async def add_event(self, event: Event) -> None:
        """Keep the Event; a second one of the same task and key is the same Event, and is not kept."""
        await self._writer.submit(partial(_erasing.add_event, event=event))

    async def events(
        self, task: str | None = None, *, names: Sequence[str] | None = None, limit: int = 100
    ) -> list[Event]:
        """The last `limit` Events, of one task or of all, with one of these names or with any; the oldest of them first."""
        return await self._read(partial(_events, task=task, names=names, limit=max(limit, 0)))

    async def events_after(self, number: int, *, limit: int = 100) -> list[tuple[int, Event]]:
        """The first `limit` Events with a number above `number`, in order; who has seen one has seen all before it."""
        sql = f"SELECT {EVENT_COLUMNS}, seq FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
        rows = await self._read(partial(fetch, sql=sql, values=(number, max(limit, 0))))
        return [(row[-1], read_event(row[:-1])) for row in rows]

    async def set_mode(self, task: str, mode: Literal["remote", "auto"], until: Seconds | None, at: Seconds) -> None:
        """Keep what an operator wants for the task, instead of what was wanted before."""
        sql = "INSERT OR REPLACE INTO modes (task, mode, until, at) VALUES (?, ?, ?, ?)"
        await self._change(sql, (to_text(task), mode, until, at))

    async def keep_batch(self, batch: Batch, *, lease: Lease | None = None) -> None:
        """Keep the Batch as it is now; its inputs stay what they were.

        Raises StoreError for one that is no longer open, and when `lease` is no longer the current one of its name.
        """
        await self._writer.submit(partial(_keep_batch, batch=batch, lease=lease))

    async def batches(self, task: str | None = None, *, open: bool = False) -> list[Batch]:
        """Batches of one task or of all, in the order in which they were made; with `open`, those with something to do."""
        return await self._read(partial(_batches, task=task, open=open))

    async def forget(
        self, subject: str, at: Seconds, *, task: str | None = None, dry_run: bool = False
    ) -> list[Forgotten]:
        """Take the words out of the Records with that `subject` among their tags, of one task or of all; all or nothing.

        What people and teachers said about them goes, too. A Record that began at `at` or before and is appended later is
        kept without words. Versions that may have learned from them get the event VERSION_TAINTED. Old bytes may still lie in
        the file: see `scrub`. With `dry_run` nothing is changed.
        """
        act = partial(_erasing.forget, subject=subject, at=at, task=task, dry_run=dry_run)
        found: list[Forgotten] = await (self._read(act) if dry_run else self._writer.submit(act))
        return found

    async def expire(self, task: str, before: Seconds, *, imported: bool = False) -> int:
        """Take the words out of Records and batches before that moment, or remove the `imported` Examples; how many.

        A few hundred at a time: 0 says that all is done.
        """
        return int(
            await self._writer.submit(partial(_erasing.expire, task=to_text(task), before=before, imported=imported))
        )

    async def scrub(self, *, rebuild: bool = True) -> None:
        """Empty the log, and with `rebuild` write the file anew, so that no byte is in them that is in no row.

        Others wait meanwhile, which is seconds for each gigabyte. Raises StoreBusy when a reader does not let it.
        """
        await self._writer.submit(Scrub(rebuild))

    async def acquire(self, name: str, owner: str, now: Seconds, seconds: Seconds) -> Lease | None:
        """The lease until `now + seconds`, or None while somebody (also the same owner) has it."""
        act = partial(_acquire, name=name, owner=owner, now=now, until=now + seconds)
        lease: Lease | None = await self._writer.submit(act)
        return lease

    async def renew(self, lease: Lease, now: Seconds, seconds: Seconds) -> Lease | None:
        """The lease until `now + seconds`; None once it was released or somebody else has it."""
        later = lease._replace(until=now + seconds)
        act = partial(_write_lease, lease=lease, owner=lease.owner, until=later.until)
        return later if await self._writer.submit(act) else None

    async def release(self, lease: Lease) -> None:
        """Give the lease back; nothing happens if it is not current."""
        await self._writer.submit(partial(_write_lease, lease=lease, owner=None, until=0.0))

    # --- money

    async def reserve(self, hold: Hold, caps: Sequence[Cap]) -> None:
        """Book the worst case in all windows of the hold, or in none. Raises what `Books.reserve` raises."""
        await self._writer.submit(Booking(hold.attempt_id, hold.windows, lambda books: books.reserve(hold, caps)))

    async def settle(self, attempt_id: str, cost: Micros, *, state: EndState) -> None:
        """Replace the attempt's hold by what it cost; the second time changes nothing. See `Books.settle`."""
        await self._writer.submit(Booking(attempt_id, (), lambda books: books.settle(attempt_id, cost, state)))

    async def spent(self, windows: Sequence[str]) -> dict[str, Micros]:
        """What each window has taken, open holds included; 0 for one that nothing was ever booked in."""
        amounts = await self._read(partial(amounts_of, windows=windows))
        found = {window: amounts.get(window, Amount()) for window in windows}
        return {window: amount.spent + amount.held for window, amount in found.items()}

    async def spending(self, *, since: Seconds = 0.0) -> list[Spending]:
        """What was reserved at `since` or later, by day, task, purpose, model and state, in that order."""
        sql = """SELECT day, task, purpose, model, state, count(*), sum(iif(state = 'held', worst, cost)) FROM ledger
                 WHERE at >= ? GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5"""
        rows = await self._read(partial(fetch, sql=sql, values=(since,)))
        return [
            Spending(from_text(day), from_text(task), purpose, from_text(model), state, attempts, cost)
            for day, task, purpose, model, state, attempts, cost in rows
        ]

    async def holds(self, before: Seconds) -> list[Hold]:
        """Open holds that were reserved before that moment, the oldest first: a process may have died on them."""
        return await self._read(partial(_holds, before=before))

    # --- who writes, who reads

    async def _change(self, sql: str, values: Row) -> None:
        await self._writer.submit(partial(fetch, sql=sql, values=values))

    async def _read[T](self, act: Callable[[apsw.Connection], T]) -> T:
        if self._writer.closed:
            raise StoreError(f"{self._path}: the store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._read_long, act)

    async def _glance[T](self, act: Callable[[apsw.Connection], T]) -> T:
        """A read of few rows on the caller's own thread, in less time than the way to the other one and back.

        It never waits: a writer does not stand in a reader's way. Where somebody else reads, or the whole file is locked (it
        is being closed, or put in order after a crash), the other thread does it, like any long read.
        """
        if not self._writer.closed and self._reading.acquire(blocking=False):
            try:
                return self._ask(act)
            except StoreBusy:
                pass
            finally:
                self._reading.release()
        return await self._read(act)

    def _read_long[T](self, act: Callable[[apsw.Connection], T]) -> T:
        with self._reading:
            self._reads.set_busy_timeout(int(self._wait * 1000))
            try:
                return self._ask(act)
            finally:
                self._reads.set_busy_timeout(0)

    def _end_reading(self) -> None:
        with self._reading:
            self._reads.close()

    def _ask[T](self, act: Callable[[apsw.Connection], T]) -> T:
        try:
            return act(self._reads)
        except apsw.Error as error:
            raise translated(error, self._path, self._reads.system_errno) from error
        except (ValueError, TypeError) as error:  # what was written as text or JSON no longer is
            raise StoreCorrupt(f"{self._path}: damaged row: {error}") from error

    def _changes(self, connection: apsw.Connection, after: int, since: int, limit: int) -> Changes:
        # The limit stands in the text: with one for a question mark, SQLite prepares the statement anew each time.
        sql = f"SELECT {EVIDENCE_COLUMNS} FROM records WHERE seq > ? ORDER BY seq LIMIT {limit}"
        page = [read_evidence(row) for row in fetch(connection, sql, (after,))]
        promotions = _promotions(connection, "after >= ?", (since,))
        live = fetch(connection, _LIVE)
        if live != self._live[0]:  # nearly every time they are as they were
            self._live = live, [read_version(row) for row in live]
        champions = {version.task: version for version in self._live[1] if version.state == "champion"}
        canaries = {version.task: version for version in self._live[1] if version.state == "canary"}
        modes = fetch(connection, "SELECT task, mode, until, at FROM modes")
        return Changes(page, promotions, champions, dict(read_mode(*row) for row in modes), canaries)


# --- what runs inside the writer's transaction


def _add_version(connection: apsw.Connection, version: Version) -> Version:
    rows = fetch(connection, "SELECT id, number FROM versions WHERE task = ?", (to_text(version.task),))
    if not version.id:
        version = version.model_copy(update={"id": next_version_id([from_text(row[0]) for row in rows])})
    elif to_text(version.id) in [row[0] for row in rows]:
        raise StoreError(f"version {version.id!r} of task {version.task!r} is there already")
    number = max((row[1] for row in rows), default=0) + 1
    insert(connection, "versions", f"{VERSION_COLUMNS}, number", [(*version_row(version), number)])
    _erasing.taint_new(connection, version)
    return version


def _promote(
    connection: apsw.Connection,
    task: str,
    version: str,
    at: Seconds,
    state: PromotionState,
    by: str,
    why: str,
    expects: int | None,
    lease: Lease | None,
) -> bool:
    if lease is not None and not _is_current(connection, lease):
        raise StoreError(
            f"version {version!r} of task {task!r} is not promoted: lease {lease.name!r} (token {lease.token}) is over",
            hint="somebody else does this job now; leave it to them",
        )
    key = (to_text(task), to_text(version))
    states: dict[str, str] = dict(fetch(connection, "SELECT id, state FROM versions WHERE task = ?", key[:1]))
    if key[1] not in states:
        raise _no_version(task, version)
    last = fetch(connection, "SELECT MAX(number) FROM promotions WHERE task = ?", key[:1])[0][0]
    if (expects is not None and expects != last) or states[key[1]] == state:
        return False
    if state == "canary" and (states[key[1]] == "champion" or "champion" not in states.values()):
        raise StoreError(
            f"version {version!r} of task {task!r} cannot be tried out: it needs a champion beside it",
            hint="`apprentice promote` makes it champion",
        )
    if state == "rejected" and states[key[1]] != "canary":
        raise StoreError(f"version {version!r} of task {task!r} is not being tried out")
    move = "UPDATE versions SET state = ? WHERE task = ? AND state = ?"
    fetch(connection, move, ("rejected", key[0], "canary"))  # of whatever this makes, an earlier canary is no part
    if state == "champion":
        fetch(connection, move, ("retired", key[0], "champion"))
        fetch(connection, "UPDATE versions SET promoted_at = ? WHERE task = ? AND id = ?", (at, *key))
    fetch(connection, "UPDATE versions SET state = ? WHERE task = ? AND id = ?", (state, *key))
    after = fetch(connection, "SELECT COALESCE(MAX(seq), 0) FROM records")[0][0]
    row = (*key, after, state, at, to_text(by), to_text(why))
    insert(connection, "promotions", PROMOTION_COLUMNS.removeprefix("number, "), [row])
    return True


def _certify(connection: apsw.Connection, task: str, version: str, at: Seconds) -> None:
    sql = "UPDATE versions SET certified_at = ? WHERE task = ? AND id = ?"
    fetch(connection, sql, (at, to_text(task), to_text(version)))
    if connection.changes() == 0:
        raise _no_version(task, version)


def _no_version(task: str, version: str) -> StoreError:
    return StoreError(f"task {task!r} has no version {version!r}", hint="`apprentice status` lists the versions")


def _keep_batch(connection: apsw.Connection, batch: Batch, lease: Lease | None) -> None:
    if lease is not None and not _is_current(connection, lease):
        raise StoreError(f"batch {batch.id!r} is not changed: lease {lease.name!r} (token {lease.token}) is over")
    again = "ON CONFLICT (id) DO UPDATE SET open = excluded.open, body = excluded.body"
    insert(connection, "batches", BATCH_COLUMNS, [batch_row(batch)], again)


def _add_label(connection: apsw.Connection, label: Label) -> bool:
    if _erasing.has_no_words(connection, [to_text(label.request_id)]):
        return False
    insert(connection, "labels", LABEL_COLUMNS, [label_row(label)], "ON CONFLICT (request_id) DO NOTHING")
    return connection.changes() > 0


def _add_examples(connection: apsw.Connection, rows: Sequence[Row]) -> int:
    before = connection.total_changes()
    for some in runs(rows):
        insert(connection, "examples", EXAMPLE_COLUMNS, some, "ON CONFLICT (task, id) DO NOTHING")
    return connection.total_changes() - before


def _remove_examples(connection: apsw.Connection, task: str, ids: Sequence[str]) -> int:
    before = connection.total_changes()
    for id in ids:
        fetch(connection, "DELETE FROM examples WHERE task = ? AND id = ?", (task, to_text(id)))
    return connection.total_changes() - before


def _acquire(connection: apsw.Connection, name: str, owner: str, now: Seconds, until: Seconds) -> Lease | None:
    rows = fetch(connection, "SELECT owner, token, until FROM leases WHERE name = ?", (to_text(name),))
    if rows and rows[0][0] is not None and rows[0][2] > now:
        return None
    lease = Lease(name, owner, rows[0][1] + 1 if rows else 1, until)
    values = (to_text(name), to_text(owner), lease.token, until)
    fetch(connection, "INSERT OR REPLACE INTO leases (name, owner, token, until) VALUES (?, ?, ?, ?)", values)
    return lease


def _write_lease(connection: apsw.Connection, lease: Lease, owner: str | None, until: Seconds) -> bool:
    if not _is_current(connection, lease):
        return False
    values = (None if owner is None else to_text(owner), until, to_text(lease.name))
    fetch(connection, "UPDATE leases SET owner = ?, until = ? WHERE name = ?", values)
    return True


def _is_current(connection: apsw.Connection, lease: Lease) -> bool:
    sql = "SELECT 1 FROM leases WHERE name = ? AND owner = ? AND token = ?"
    return bool(fetch(connection, sql, (to_text(lease.name), to_text(lease.owner), lease.token)))


# --- reading


_LIVE = " UNION ALL ".join(  # each by its own index
    f"SELECT {VERSION_COLUMNS} FROM versions WHERE state = '{state}'" for state in ("champion", "canary")
)


def _promotions(connection: apsw.Connection, where: str, values: Row) -> list[Promotion]:
    sql = f"SELECT {PROMOTION_COLUMNS} FROM promotions WHERE {where} ORDER BY number"
    return [read_promotion(row) for row in fetch(connection, sql, values)]


def _versions(connection: apsw.Connection, where: str, values: Row) -> list[Version]:
    sql = f"SELECT {VERSION_COLUMNS} FROM versions WHERE {where} ORDER BY number"
    return [read_version(row) for row in fetch(connection, sql, values)]


def _one_record(connection: apsw.Connection, where: str, values: Row) -> Record | None:
    rows = fetch(connection, f"SELECT body FROM records WHERE {where}", values)
    return read_record(rows[0][0]) if rows else None


def _records(
    task: str, after: int, before: int, limit: int, labelled: bool, newest: bool, connection: apsw.Connection
) -> list[tuple[int, Record]]:
    chosen = "AND has_remote" if labelled else ""
    order = "DESC" if newest else "ASC"
    sql = f"SELECT seq, body FROM records WHERE task = ? AND seq > ? AND seq < ? {chosen} ORDER BY seq {order} LIMIT ?"
    return [(seq, read_record(body)) for seq, body in fetch(connection, sql, (task, after, before, max(limit, 0)))]


def _examples(connection: apsw.Connection, task: str, after: int) -> list[tuple[int, Example]]:
    sql = "SELECT number, body FROM examples WHERE task = ? AND number > ? ORDER BY number LIMIT ?"
    return [(number, read_example(body)) for number, body in fetch(connection, sql, (task, after, PAGE))]


def _batches(connection: apsw.Connection, task: str | None, open: bool) -> list[Batch]:
    wanted = [*(["open"] if open else []), *(["task = ?"] if task is not None else [])]
    where = f"WHERE {' AND '.join(wanted)}" if wanted else ""
    values = () if task is None else (to_text(task),)
    sql = f"SELECT body, inputs FROM batches {where} ORDER BY number"
    return [read_batch(row) for row in fetch(connection, sql, values)]


def _events(connection: apsw.Connection, task: str | None, names: Sequence[str] | None, limit: int) -> list[Event]:
    wanted: list[str] = []
    values: list[str] = []
    if task is not None:
        wanted.append("task = ?")
        values.append(to_text(task))
    if names is not None:
        wanted.append(f"name IN ({', '.join('?' * len(names))})")
        values += map(to_text, names)
    where = f"WHERE {' AND '.join(wanted)}" if wanted else ""
    sql = f"SELECT {EVENT_COLUMNS} FROM events {where} ORDER BY seq DESC LIMIT ?"
    return [read_event(row) for row in fetch(connection, sql, (*values, limit))][::-1]


def _holds(connection: apsw.Connection, before: Seconds) -> list[Hold]:
    sql = f"SELECT {LEDGER_COLUMNS} FROM ledger WHERE state = 'held' AND at < ? ORDER BY at"
    return [read_entry(row).hold for row in fetch(connection, sql, (before,))]


# --- opening


def _create(path: Path) -> int:
    """Make the file if there is none, for its owner alone, as its log will be. The descriptor of the lock beside it."""
    if path.is_dir():
        raise StoreError(f"{path} is a folder", hint=f"store.path names a file, such as {path / 'apprentice.db'}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except FileExistsError:
            # Not opened: closing any descriptor of a database drops this process's locks on it.
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
        return os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise StoreFull(f"{path}: {error}") from error
        raise StoreError(f"{path}: {error}", hint="the store needs a file and a folder that it may write to") from error


def _connect(path: Path, wait: Seconds, *, reads: bool = False) -> apsw.Connection:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.set_busy_timeout(0 if reads else int(wait * 1000))
        connection.pragma("cell_size_check", True)
        if reads:
            connection.pragma("query_only", True)
            return connection
        connection.pragma("synchronous", "FULL")
        connection.pragma("secure_delete", True)  # what is deleted is overwritten
        connection.pragma("fullfsync", True)  # macOS, where fsync alone does not reach the disk
        connection.pragma("checkpoint_fullfsync", True)
        if connection.pragma("application_id") not in (0, APPLICATION_ID):
            raise StoreCorrupt(f"{path} is the database of another program", hint="name another file")
        migrate(connection)
        if connection.pragma("journal_mode", "wal") != "wal":
            raise StoreError(f"{path}: no write-ahead log here", hint="the store needs a local disk, no network share")
    except BaseException:
        connection.close()
        raise
    return connection
