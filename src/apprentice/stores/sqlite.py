"""One SQLite file: the store of one machine, for any number of processes on it.

Every write goes through one thread, which puts all writes that wait at that moment into one transaction and lets their
callers go after the commit (an fsync costs 0.2 to 4 ms; a hundred requests share it). Reads have their own connection.

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
import errno
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import apsw

from apprentice.errors import ApprenticeError, IdempotencyConflict, StoreBusy, StoreCorrupt, StoreError, StoreFull
from apprentice.stores import (
    APPLICATION_ID,
    EVENT_COLUMNS,
    EVIDENCE_COLUMNS,
    LARGEST,
    LEDGER_COLUMNS,
    RECORD_COLUMNS,
    VERSION_COLUMNS,
    Amount,
    Books,
    EndState,
    Entry,
    check_sqlite,
    entry_row,
    event_row,
    from_text,
    migrate,
    next_version_id,
    read_amount,
    read_entry,
    read_event,
    read_evidence,
    read_mode,
    read_promotion,
    read_record,
    read_version,
    record_row,
    runs,
    to_text,
    version_row,
)
from apprentice.types import Cap, Changes, Event, Hold, Lease, Micros, Record, Seconds, Spending, Version

type Row = tuple[Any, ...]

GROUP = 512  # writes in one transaction
PAGE = 256  # Records in one read, so that a long read neither blocks short ones nor holds up checkpoints
WAL_PAGES = 1000  # 4 MiB, then what is in the log goes to the database
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
FSYNC_CODES = {apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC}
_ENTRY_AGAIN = "ON CONFLICT DO UPDATE SET state = excluded.state, cost = excluded.cost, seal = excluded.seal"
_WINDOW_AGAIN = "ON CONFLICT DO UPDATE SET spent = excluded.spent, held = excluded.held, seal = excluded.seal"
ALL_WINDOWS = ""  # the row of `windows` that counts the others


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
        raise _translated(error, path, 0) from error


class SqliteStore:
    """The Store in one SQLite file. Its methods may be called from any event loop."""

    def __init__(self, path: Path, turn: int, writes: apsw.Connection, reads: apsw.Connection, wait: Seconds) -> None:
        self._path = path
        self._reads = reads
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="apprentice-read")
        self._writer = _Writer(path, turn, writes, wait)

    async def close(self) -> None:
        """Finish what waits, and close the file. Calls after it raise StoreError."""
        if self._writer.close():
            await asyncio.get_running_loop().run_in_executor(self._reader, self._reads.close)
            self._reader.shutdown(wait=False)
        await self._writer.end()

    # --- Records

    async def append(self, record: Record) -> int:
        """The Record's number. Raises IdempotencyConflict for a key used before, StoreError for a request_id."""
        return int(await self._writer.submit(record_row(record)))

    async def changes(self, after: int) -> Changes:
        """Evidence of every task with a number above `after`, in order; promotions since then; champions and modes of today."""
        evidence, since = [], after
        while True:
            page = await self._read(partial(_changes, after=after, since=since))
            evidence += page.evidence
            if len(page.evidence) < 16 * PAGE:
                return page._replace(evidence=evidence)
            after = page.evidence[-1].seq

    async def record(self, request_id: str) -> Record | None:
        return await self._read(partial(_one_record, where="request_id = ?", values=(to_text(request_id),)))

    async def record_by_key(self, task: str, idempotency_key: str) -> Record | None:
        values = (to_text(task), to_text(idempotency_key))
        return await self._read(partial(_one_record, where="task = ? AND idempotency_key = ?", values=values))

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
        return int((await self._read(partial(_rows, sql=sql, values=(to_text(task),))))[0][0])

    async def save_state(self, task: str, seq: int, state: str) -> None:
        """Keep the state of the task as of Record `seq`; one of a later Record stays."""
        await self._change(
            """INSERT INTO states VALUES (?, ?, ?)
               ON CONFLICT (task) DO UPDATE SET seq = excluded.seq, state = excluded.state WHERE excluded.seq >= seq""",
            (to_text(task), seq, to_text(state)),
        )

    async def load_state(self, task: str) -> tuple[int, str] | None:
        sql = "SELECT seq, state FROM states WHERE task = ?"
        rows = await self._read(partial(_rows, sql=sql, values=(to_text(task),)))
        return (rows[0][0], from_text(rows[0][1])) if rows else None

    # --- Versions, Events, leases

    async def add_version(self, version: Version) -> Version:
        """The Version as kept; an empty id becomes the next of "v1", "v2", … Raises StoreError for a taken id."""
        added: Version = await self._writer.submit(partial(_add_version, version=version))
        return added

    async def versions(self, task: str) -> list[Version]:
        """All of the task, in the order in which they were added."""
        return await self._read(partial(_versions, where="task = ?", values=(to_text(task),)))

    async def promote(self, task: str, version: str, at: Seconds, *, lease: Lease | None = None) -> None:
        """Make the version the champion and retire the former one, at once. A champion stays as it is.

        Raises StoreError for an unknown version, and when `lease` is no longer the current one of its name.
        """
        await self._writer.submit(partial(_promote, task=task, version=version, at=at, lease=lease))

    async def certify(self, task: str, version: str, at: Seconds) -> None:
        """Note when the version was certified. Raises StoreError for an unknown version."""
        await self._writer.submit(partial(_certify, task=task, version=version, at=at))

    async def add_event(self, event: Event) -> None:
        """Keep the Event; a second one of the same task and key is the same Event, and is not kept."""
        sql = f"INSERT INTO events ({EVENT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
        await self._change(f"{sql} ON CONFLICT (task, key) WHERE key IS NOT NULL DO NOTHING", event_row(event))

    async def events(self, task: str | None = None, *, limit: int = 100) -> list[Event]:
        """The last `limit` Events, the oldest of them first."""
        return await self._read(partial(_events, task=None if task is None else to_text(task), limit=max(limit, 0)))

    async def set_mode(self, task: str, mode: Literal["remote", "auto"], until: Seconds | None, at: Seconds) -> None:
        """Keep what an operator wants for the task, instead of what was wanted before."""
        sql = "INSERT OR REPLACE INTO modes (task, mode, until, at) VALUES (?, ?, ?, ?)"
        await self._change(sql, (to_text(task), mode, until, at))

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
        await self._writer.submit(_Booking(hold.attempt_id, hold.windows, lambda books: books.reserve(hold, caps)))

    async def settle(self, attempt_id: str, cost: Micros, *, state: EndState) -> None:
        """Replace the attempt's hold by what it cost; the second time changes nothing. See `Books.settle`."""
        await self._writer.submit(_Booking(attempt_id, (), lambda books: books.settle(attempt_id, cost, state)))

    async def spent(self, windows: Sequence[str]) -> dict[str, Micros]:
        """What each window has taken, open holds included; 0 for one that nothing was ever booked in."""
        amounts = await self._read(partial(_amounts, windows=windows))
        found = {window: amounts.get(window, Amount()) for window in windows}
        return {window: amount.spent + amount.held for window, amount in found.items()}

    async def spending(self, *, since: Seconds = 0.0) -> list[Spending]:
        """What was reserved at `since` or later, by day, task, purpose, model and state, in that order."""
        sql = """SELECT day, task, purpose, model, state, count(*), sum(iif(state = 'held', worst, cost)) FROM ledger
                 WHERE at >= ? GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5"""
        rows = await self._read(partial(_rows, sql=sql, values=(since,)))
        return [
            Spending(from_text(day), from_text(task), purpose, from_text(model), state, attempts, cost)
            for day, task, purpose, model, state, attempts, cost in rows
        ]

    async def holds(self, before: Seconds) -> list[Hold]:
        """Open holds that were reserved before that moment, the oldest first: a process may have died on them."""
        return await self._read(partial(_holds, before=before))

    # --- the two threads

    async def _change(self, sql: str, values: Row) -> None:
        await self._writer.submit(partial(_rows, sql=sql, values=values))

    async def _read[T](self, act: Callable[[apsw.Connection], T]) -> T:
        if self._writer.closed:
            raise StoreError(f"{self._path}: the store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._reading, act)

    def _reading[T](self, act: Callable[[apsw.Connection], T]) -> T:
        try:
            return act(self._reads)
        except apsw.Error as error:
            raise _translated(error, self._path, self._reads.system_errno) from error
        except (ValueError, TypeError) as error:  # what was written as text or JSON no longer is
            raise StoreCorrupt(f"{self._path}: damaged row: {error}") from error


# --- one writer


@dataclass(frozen=True, slots=True)
class _Booking:
    attempt_id: str
    windows: tuple[str, ...]
    act: Callable[[Books], None]


type _Job = Row | _Booking | Callable[[apsw.Connection], Any]  # a Record, a change of the ledger, any other change


@dataclass(slots=True)
class _Write:
    """One job on its way to the writer, and back to the loop where its caller waits."""

    job: _Job
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None
    begun: bool = False  # from here on it is too late to give up
    done: bool = False


class _Writer:
    """The thread through which every write goes: jobs that wait at the same time share one transaction.

    All are held back until the commit is on the disk. A job that fails on its own account leaves the others alone;
    after a commit or an fsync that failed nobody knows what is on the disk, and no write is accepted any more.
    """

    def __init__(self, path: Path, turn: int, connection: apsw.Connection, wait: Seconds) -> None:
        self.closed = False
        self._ended: Future[None] = Future()
        self._path = path
        self._turn = turn
        self._connection = connection
        self._wait = wait
        self._inbox: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # guards `closed` with the inbox, and `begun` with `done`
        self._broken: str | None = None
        self._log_pages = 0
        connection.set_busy_timeout(0)
        connection.wal_autocheckpoint(0)  # it hides a failed fsync; `_checkpoint` does not
        connection.set_wal_hook(self._logged)
        threading.Thread(target=self._run, name="apprentice-write", daemon=True).start()

    async def submit(self, job: _Job) -> Any:
        loop = asyncio.get_running_loop()
        write = _Write(job, loop.create_future())
        with self._gate:
            if self.closed:
                raise StoreError(f"{self._path}: the store is closed")
            self._inbox.put(write)
        timer = loop.call_later(self._wait, self._give_up, write)
        try:
            return await write.future
        finally:
            timer.cancel()

    def close(self) -> bool:
        """Tell the thread to end after what waits. False if somebody has told it before."""
        with self._gate:
            if self.closed:
                return False
            self.closed = True
            self._inbox.put(None)
            return True

    async def end(self) -> None:
        """Wait until the thread has ended. Raises StoreBusy when another process does not let it."""
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._ended)), self._wait)
        except TimeoutError as error:
            raise self._too_long() from error

    def _too_long(self) -> StoreBusy:
        return StoreBusy(f"{self._path}: another process held the store for {self._wait:g} s")

    def _give_up(self, write: _Write) -> None:
        with self._gate:
            if write.begun or write.done:
                return
            write.done = True
        if not write.future.done():
            write.future.set_exception(self._too_long())

    def _run(self) -> None:
        waiting: list[_Write] = []
        ending = False
        while waiting or not ending:
            ending = self._collect(waiting, ending)
            if waiting:
                try:
                    fcntl.flock(self._turn, fcntl.LOCK_EX)
                    ending = self._collect(waiting, ending)  # who came while we stood in the queue
                    self._serve(waiting)
                except OSError as error:
                    self._fail_all(waiting, error)
                finally:
                    fcntl.flock(self._turn, fcntl.LOCK_UN)
            _release([write for write in waiting if write.done])
            waiting = [write for write in waiting if not write.done]
            self._checkpoint()
        os.close(self._turn)
        try:
            self._connection.close()
        except apsw.Error as error:
            self._ended.set_exception(_translated(error, self._path, 0))
        else:
            self._ended.set_result(None)

    def _collect(self, waiting: list[_Write], ending: bool) -> bool:
        """Add what has come in; sleep only if nothing waits. True when the last has come."""
        with contextlib.suppress(queue.Empty):
            while len(waiting) < GROUP and not ending:
                write = self._inbox.get(block=not waiting)
                if write is None:
                    return True
                waiting.append(write)
        return ending

    def _serve(self, waiting: list[_Write]) -> None:
        if self._broken is not None:
            return _fail(waiting, StoreError(self._broken, hint="check the disk, then restart"))
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except apsw.BusyError:  # by somebody who does not queue: a person at the file, a backup
            return time.sleep(0.002)
        except apsw.Error as error:
            return self._fail_all(waiting, error)
        with self._gate:
            waiting[:] = [write for write in waiting if not write.done]
            for write in waiting:
                write.begun = True
        return self._transact(waiting)

    def _transact(self, waiting: Sequence[_Write]) -> None:
        committing = False
        try:
            self._work(waiting)
            committing = True
            self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever it is, the callers get it and the thread lives on
            self._fail_all(waiting, error, committing=committing)

    def _work(self, waiting: Sequence[_Write]) -> None:
        bookings: list[tuple[_Write, _Booking]] = []
        appends: list[tuple[_Write, Row]] = []
        for write in waiting:
            write.done = True
            match write.job:
                case _Booking() as booking:
                    bookings.append((write, booking))
                case tuple() as row:
                    appends.append((write, row))
                case change:
                    with self._alone(write):
                        write.result = change(self._connection)
        if bookings:
            self._book(bookings)
        for some in runs(appends):
            self._append(some)

    def _append(self, some: Sequence[tuple[_Write, Row]]) -> None:
        try:
            _insert(self._connection, "records", RECORD_COLUMNS, [row for _, row in some])
        except apsw.ConstraintError:  # none of them is in
            if len(some) > 1:
                for one in some:
                    self._append([one])
            else:
                some[0][0].error = self._why_not(some[0][1])
            return
        last = self._connection.last_insert_rowid()  # AUTOINCREMENT under the write lock: the numbers have no gap
        for number, (write, _) in enumerate(some, start=last - len(some) + 1):
            write.result = number

    def _why_not(self, row: Row) -> ApprenticeError:
        values = dict(zip(RECORD_COLUMNS.split(", "), row, strict=True))
        key = (values["task"], values["idempotency_key"])
        if _rows(self._connection, "SELECT 1 FROM records WHERE request_id = ?", (values["request_id"],)):
            return StoreError(f"request {from_text(values['request_id'])!r} is recorded already", hint="use a fresh id")
        if _rows(self._connection, "SELECT 1 FROM records WHERE task = ? AND idempotency_key = ?", key):
            return IdempotencyConflict(f"idempotency key {from_text(key[1])!r} of task {from_text(key[0])!r} is taken")
        return StoreError(f"request {from_text(values['request_id'])!r} does not fit the table of Records")

    def _book(self, some: Sequence[tuple[_Write, _Booking]]) -> None:
        try:
            books = self._load(some)
        except StoreCorrupt as error:
            if len(some) == 1:
                some[0][0].error = error
            else:  # a damaged row is the trouble of those who need it
                for one in some:
                    self._book([one])
            return
        for write, booking in some:
            try:
                booking.act(books)
            except ApprenticeError as error:
                write.error = error
        self._save(books)

    def _load(self, some: Sequence[tuple[_Write, _Booking]]) -> Books:
        entries: dict[str, Entry] = {}
        attempts = [booking.attempt_id for _, booking in some]
        try:
            for row in _rows_where(self._connection, f"SELECT {LEDGER_COLUMNS} FROM ledger WHERE attempt_id", attempts):
                entry = read_entry(row)
                entries[entry.hold.attempt_id] = entry
            windows = {window for _, booking in some for window in booking.windows}
            windows.update(window for entry in entries.values() for window in entry.hold.windows)
            return Books(entries, _amounts(self._connection, [ALL_WINDOWS, *windows]))
        except (ValueError, TypeError) as error:
            raise StoreCorrupt(f"{self._path}: damaged row in the ledger: {error}") from error

    def _save(self, books: Books) -> None:
        rows = [entry_row(books.entries[attempt]) for attempt in books.changed_entries]
        for some in runs(rows):
            _insert(self._connection, "ledger", LEDGER_COLUMNS, some, _ENTRY_AGAIN)
        new = books.changed_windows - books.known_windows
        if new:
            books.amounts.setdefault(ALL_WINDOWS, Amount()).spent += len(new)
            books.changed_windows.add(ALL_WINDOWS)
        amounts = [(window, books.amounts[window]) for window in sorted(books.changed_windows)]
        rows = [(to_text(window), amount.spent, amount.held, amount.seal(window)) for window, amount in amounts]
        for some in runs(rows):
            _insert(self._connection, "windows", "key, spent, held, seal", some, _WINDOW_AGAIN)

    @contextlib.contextmanager
    def _alone(self, write: _Write) -> Iterator[None]:
        """What fails inside is undone, and is the trouble of this write only; unless the whole transaction is gone."""
        self._connection.execute("SAVEPOINT alone")
        try:
            yield
        except (ApprenticeError, apsw.ConstraintError, ValueError, TypeError, OverflowError) as error:
            self._connection.execute("ROLLBACK TO alone")
            write.error = self._translated(error)
        self._connection.execute("RELEASE alone")

    # --- when it goes wrong

    def _fail_all(self, writes: Sequence[_Write], error: Exception, *, committing: bool = False) -> None:
        # Named before anything else is asked of the connection, which forgets the system's error then.
        known = self._translated(error)
        code = getattr(error, "extendedresult", 0)
        lost = isinstance(error, apsw.IOError) and not isinstance(known, StoreFull) and committing
        if lost or code in FSYNC_CODES or isinstance(known, StoreCorrupt):
            self._broken = f"{self._path}: no more writes since a write failed: {known}"
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except apsw.Error as second:
            self._broken = self._broken or f"{self._path}: no more writes since one could not be undone: {second}"
        _fail(writes, known)

    def _translated(self, error: Exception) -> ApprenticeError:
        return _translated(error, self._path, self._connection.system_errno)

    def _logged(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK

    def _checkpoint(self) -> None:
        """Bring the log into the database, when it is long; after the callers have gone, so that none waits for it."""
        if self._log_pages < WAL_PAGES or self._broken is not None:
            return
        self._log_pages = 0
        try:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as error:
            known = self._translated(error)
            if not isinstance(known, StoreBusy | StoreFull):  # those leave the log as it is; the next one tries again
                self._broken = f"{self._path}: no more writes since a checkpoint failed: {known}"


def _fail(writes: Sequence[_Write], error: ApprenticeError) -> None:
    for write in writes:
        write.done = True
        write.error = type(error)(str(error), hint=error.hint)  # its own: a raised error collects the raiser's frames
        write.error.__cause__ = error.__cause__


def _release(writes: Sequence[_Write]) -> None:
    """Wake the callers, once a loop: waking a loop is a system call."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Write]] = {}
    for write in writes:
        by_loop.setdefault(write.future.get_loop(), []).append(write)
    for loop, some in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, some)


def _resolve(writes: Sequence[_Write]) -> None:
    for write in writes:
        if write.future.done():  # cancelled meanwhile; what was written stays written
            continue
        if write.error is not None:
            write.future.set_exception(write.error)
        else:
            write.future.set_result(write.result)


# --- what runs inside the writer's transaction


def _add_version(connection: apsw.Connection, version: Version) -> Version:
    rows = _rows(connection, "SELECT id, number FROM versions WHERE task = ?", (to_text(version.task),))
    if not version.id:
        version = version.model_copy(update={"id": next_version_id([from_text(row[0]) for row in rows])})
    elif to_text(version.id) in [row[0] for row in rows]:
        raise StoreError(f"version {version.id!r} of task {version.task!r} is there already")
    number = max((row[1] for row in rows), default=0) + 1
    _insert(connection, "versions", f"{VERSION_COLUMNS}, number", [(*version_row(version), number)])
    return version


def _promote(connection: apsw.Connection, task: str, version: str, at: Seconds, lease: Lease | None) -> None:
    if lease is not None and not _is_current(connection, lease):
        raise StoreError(
            f"version {version!r} of task {task!r} is not promoted: lease {lease.name!r} (token {lease.token}) is over",
            hint="somebody else does this job now; leave it to them",
        )
    key = (to_text(task), to_text(version))
    state = _rows(connection, "SELECT state FROM versions WHERE task = ? AND id = ?", key)
    if not state:
        raise _no_version(task, version)
    if state[0][0] == "champion":
        return
    _rows(connection, "UPDATE versions SET state = 'retired' WHERE task = ? AND state = 'champion'", key[:1])
    _rows(connection, "UPDATE versions SET state = 'champion', promoted_at = ? WHERE task = ? AND id = ?", (at, *key))
    last = "SELECT COALESCE(MAX(seq), 0) FROM records"
    _rows(connection, f"INSERT INTO promotions (task, version, after, at) VALUES (?, ?, ({last}), ?)", (*key, at))


def _certify(connection: apsw.Connection, task: str, version: str, at: Seconds) -> None:
    sql = "UPDATE versions SET certified_at = ? WHERE task = ? AND id = ?"
    _rows(connection, sql, (at, to_text(task), to_text(version)))
    if connection.changes() == 0:
        raise _no_version(task, version)


def _no_version(task: str, version: str) -> StoreError:
    return StoreError(f"task {task!r} has no version {version!r}", hint="`apprentice status` lists the versions")


def _acquire(connection: apsw.Connection, name: str, owner: str, now: Seconds, until: Seconds) -> Lease | None:
    rows = _rows(connection, "SELECT owner, token, until FROM leases WHERE name = ?", (to_text(name),))
    if rows and rows[0][0] is not None and rows[0][2] > now:
        return None
    lease = Lease(name, owner, rows[0][1] + 1 if rows else 1, until)
    values = (to_text(name), to_text(owner), lease.token, until)
    _rows(connection, "INSERT OR REPLACE INTO leases (name, owner, token, until) VALUES (?, ?, ?, ?)", values)
    return lease


def _write_lease(connection: apsw.Connection, lease: Lease, owner: str | None, until: Seconds) -> bool:
    if not _is_current(connection, lease):
        return False
    values = (None if owner is None else to_text(owner), until, to_text(lease.name))
    _rows(connection, "UPDATE leases SET owner = ?, until = ? WHERE name = ?", values)
    return True


def _is_current(connection: apsw.Connection, lease: Lease) -> bool:
    sql = "SELECT 1 FROM leases WHERE name = ? AND owner = ? AND token = ?"
    return bool(_rows(connection, sql, (to_text(lease.name), to_text(lease.owner), lease.token)))


def _insert(connection: apsw.Connection, table: str, columns: str, rows: Sequence[Row], conflict: str = "") -> None:
    places = ", ".join([f"({_places(len(rows[0]))})"] * len(rows))
    sql = f"INSERT INTO {table} ({columns}) VALUES {places} {conflict}"
    connection.execute(sql, [value for row in rows for value in row])


# --- reading


def _rows(connection: apsw.Connection, sql: str, values: Row = ()) -> list[Row]:
    return connection.execute(sql, values).fetchall()


def _rows_where(connection: apsw.Connection, sql: str, keys: Sequence[str]) -> Iterator[Row]:
    """The rows whose last-named column is one of the keys."""
    for some in runs(sorted({to_text(key) for key in keys})):
        yield from _rows(connection, f"{sql} IN ({_places(len(some))})", tuple(some))


def _places(number: int) -> str:
    return ", ".join("?" * number)


def _changes(connection: apsw.Connection, after: int, since: int) -> Changes:
    sql = f"SELECT {EVIDENCE_COLUMNS} FROM records WHERE seq > ? ORDER BY seq LIMIT ?"
    page = [read_evidence(row) for row in _rows(connection, sql, (after, 16 * PAGE))]
    sql = "SELECT number, task, version, after FROM promotions WHERE after >= ? ORDER BY number"
    promotions = [read_promotion(row) for row in _rows(connection, sql, (since,))]
    champions = {version.task: version for version in _versions(connection, "state = ?", ("champion",))}
    modes = _rows(connection, "SELECT task, mode, until, at FROM modes")
    return Changes(page, promotions, champions, dict(read_mode(*row) for row in modes))


def _versions(connection: apsw.Connection, where: str, values: Row) -> list[Version]:
    sql = f"SELECT {VERSION_COLUMNS} FROM versions WHERE {where} ORDER BY number"
    return [read_version(row) for row in _rows(connection, sql, values)]


def _one_record(connection: apsw.Connection, where: str, values: Row) -> Record | None:
    rows = _rows(connection, f"SELECT body FROM records WHERE {where}", values)
    return read_record(rows[0][0]) if rows else None


def _records(
    task: str, after: int, before: int, limit: int, labelled: bool, newest: bool, connection: apsw.Connection
) -> list[tuple[int, Record]]:
    chosen = "AND has_remote" if labelled else ""
    order = "DESC" if newest else "ASC"
    sql = f"SELECT seq, body FROM records WHERE task = ? AND seq > ? AND seq < ? {chosen} ORDER BY seq {order} LIMIT ?"
    return [(seq, read_record(body)) for seq, body in _rows(connection, sql, (task, after, before, max(limit, 0)))]


def _events(connection: apsw.Connection, task: str | None, limit: int) -> list[Event]:
    where, values = ("", ()) if task is None else ("WHERE task = ?", (task,))
    sql = f"SELECT {EVENT_COLUMNS} FROM events {where} ORDER BY seq DESC LIMIT ?"
    return [read_event(row) for row in _rows(connection, sql, (*values, limit))][::-1]


def _holds(connection: apsw.Connection, before: Seconds) -> list[Hold]:
    sql = f"SELECT {LEDGER_COLUMNS} FROM ledger WHERE state = 'held' AND at < ? ORDER BY at"
    return [read_entry(row).hold for row in _rows(connection, sql, (before,))]


def _amounts(connection: apsw.Connection, windows: Sequence[str]) -> dict[str, Amount]:
    """The amount of each window; empty for one without a row, after a look that no row got lost.

    A damaged page can hide a row. Rows are few (days times tasks), and a window is new once, so all are counted then.
    """
    sql = "SELECT key, spent, held, seal FROM windows"
    found = dict(read_amount(*row) for row in _rows_where(connection, f"{sql} WHERE key", windows))
    if len(found) < len(set(windows)):
        found = dict(read_amount(*row) for row in _rows(connection, sql))
        expected = found[ALL_WINDOWS].spent if ALL_WINDOWS in found else 0
        if len(found.keys() - {ALL_WINDOWS}) != expected:
            raise StoreCorrupt(f"the ledger has {len(found) - 1} windows, and should have {expected}")
    return found


# --- opening


def _create(path: Path) -> int:
    """Make the file if there is none, for its owner alone, as its log will be. The descriptor of the lock beside it."""
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
        connection.set_busy_timeout(int(wait * 1000))
        connection.pragma("cell_size_check", True)
        if reads:
            connection.pragma("query_only", True)
            return connection
        connection.pragma("synchronous", "FULL")
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


def _translated(error: Exception, path: Path, system_errno: int) -> ApprenticeError:
    code: int = getattr(error, "extendedresult", 0)
    match error:
        case ApprenticeError():
            return error
        case apsw.BusyError() | apsw.LockedError():
            known: ApprenticeError = StoreBusy(f"{path}: another process holds the store")
        case apsw.FullError():
            known = StoreFull(f"{path}: the disk is full")
        case apsw.IOError() if system_errno in NO_SPACE and code not in FSYNC_CODES:
            known = StoreFull(f"{path}: the disk is full")
        case apsw.CorruptError() | apsw.NotADBError() | apsw.FormatError():
            known = StoreCorrupt(f"{path}: {error}")
        case apsw.Error():
            name = apsw.mapping_extended_result_codes.get(code, type(error).__name__)
            known = StoreError(f"{path}: {error} ({name})")
        case _:
            known = StoreError(f"{path}: {type(error).__name__}: {error}")
    known.__cause__ = error
    return known
