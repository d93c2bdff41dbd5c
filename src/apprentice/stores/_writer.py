"""Every write to a SQLite store: the thread that runs them, or the loop where that is sooner, and the statements."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import apsw

from apprentice.errors import ApprenticeError, IdempotencyConflict, StoreBusy, StoreCorrupt, StoreError, StoreFull
from apprentice.stores import (
    LEDGER_COLUMNS,
    RECORD_COLUMNS,
    Amount,
    Books,
    entry_row,
    forgotten,
    from_text,
    read_amount,
    read_entry,
    record_row,
    runs,
    to_text,
)
from apprentice.types import Seconds

type Row = tuple[Any, ...]

GROUP = 512  # writes with which a transaction begins at once; those of one turn of a loop stay together
WAL_PAGES = 1000  # 4 MiB, then what is in the log goes to the database
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
FSYNC_CODES = {apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC}
_END = "UPDATE ledger SET state = column2, cost = column3, seal = column4 FROM (VALUES {}) WHERE attempt_id = column1"
_WINDOW_AGAIN = "ON CONFLICT DO UPDATE SET spent = excluded.spent, held = excluded.held, seal = excluded.seal"
_COLUMNS = RECORD_COLUMNS.split(", ")
_TASK, _AT, _BODY, _SUBJECT = map(_COLUMNS.index, ("task", "at", "body", "subject"))
ALL_WINDOWS = ""  # the row of `windows` that counts the others
FEW = 8  # writes that a loop may bring to the disk itself
SOON: Seconds = 0.002  # what it takes to wake a thread and to be woken by it, about
COMMITS = 8  # of the last ones, in the running mean of how long one takes
KEPT = 10_000  # rows of the ledger in memory: far more than calls in flight and windows of a day


@dataclass(slots=True)
class Booking:
    attempt_id: str
    windows: tuple[str, ...]
    act: Callable[[Books], None]


@dataclass(frozen=True, slots=True)
class Scrub:
    """Leave no old byte in the log, and with `rebuild` none in the file. It is no transaction, and stands alone."""

    rebuild: bool


# A Record, of the ledger, of the file, any other change.
type _Job = Row | Booking | Scrub | Callable[[apsw.Connection], Any]


@dataclass(slots=True, eq=False)
class _Write:
    """One job on its way to the writer, and back to the loop where its caller waits."""

    job: _Job
    future: asyncio.Future[Any]
    until: Seconds  # of its loop
    result: Any = None
    error: Exception | None = None
    begun: bool = False  # from here on it is too late to give up
    done: bool = False


class Writer:
    """Through which every write goes, one transaction after the other: jobs that wait at the same time share one.

    A thread runs them. Where nobody else writes, the loop that submits a few rows writes them itself, for as long as the
    disk is quick: two threads that wake each other take longer than the disk does.

    All are held back until the commit is on the disk. A job that fails on its own account leaves the others alone;
    after a commit or an fsync that failed nobody knows what is on the disk, and no write is accepted any more.
    """

    def __init__(self, path: Path, turn: int, connection: apsw.Connection, wait: Seconds) -> None:
        self.closed = False
        self._ended: Future[None] = Future()
        self._path = path
        self._process = os.getpid()
        self._turn = turn
        self._connection = connection
        self._wait = wait
        self._inbox: queue.SimpleQueue[list[_Write] | None] = queue.SimpleQueue()
        self._new: dict[asyncio.AbstractEventLoop, list[_Write]] = {}  # not yet in the inbox
        self._gate = threading.Lock()  # guards `closed`, `_new` and `_idle` with the inbox, and `begun` with `done`
        self._idle = False  # the thread has nothing to do: it says so itself, and who gives it something takes it back
        self._using = threading.RLock()  # the connection; it knows whose it is
        self._takes: Seconds = SOON  # a commit, by the last ones
        self._broken: str | None = None
        self._log_pages = 0
        self._ledger = _Ledger(path, connection)
        self._waiting: dict[asyncio.AbstractEventLoop, set[_Write]] = {}  # each is touched in its own loop only
        connection.set_busy_timeout(0)
        connection.wal_autocheckpoint(0)  # it hides a failed fsync; `_checkpoint` does not
        connection.set_wal_hook(self._logged)
        threading.Thread(target=self._run, name="apprentice-write", daemon=True).start()

    def submit(self, job: _Job) -> asyncio.Future[Any]:
        """What comes of the job, in the loop that is running."""
        if os.getpid() != self._process:  # SQLite: what a fork carried over has no lock, and writes may be lost
            raise StoreError(
                f"{self._path}: the store was opened before this process was forked", hint="open it after the fork"
            )
        loop = asyncio.get_running_loop()
        write = _Write(job, loop.create_future(), loop.time() + self._wait)
        with self._gate:
            if self.closed:
                raise StoreError(f"{self._path}: the store is closed")
            new = self._new.setdefault(loop, [])
            new.append(write)
        if len(new) == 1:
            loop.call_soon(self._hand_over, loop)
        waiting = self._waiting.get(loop)
        if waiting is None:
            waiting = self._watch(loop)
        waiting.add(write)
        return write.future

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write what was submitted in this turn of the loop, or give it to the thread. One by one, each would wake it, and it
        would fight with the loop for the interpreter."""
        try:
            with self._gate:
                new = self._new.pop(loop, [])
                here = bool(new) and self._idle and self._is_soon(new) and self._using.acquire(blocking=False)
                if not here:
                    self._give(new)
            if here:
                self._write_here(new)
                self._using.release()
        except BaseException:  # an interrupt, which may come as soon as the lock is taken
            with contextlib.suppress(RuntimeError):  # it is not ours
                self._using.release()
            raise

    def _is_soon(self, writes: Sequence[_Write]) -> bool:
        """Whether to write them takes no longer than to wake the thread, which also brings the log into the database."""
        if self._takes >= SOON or len(writes) > FEW or self._log_pages >= WAL_PAGES:
            return False
        return all(isinstance(write.job, tuple | Booking) for write in writes)

    def _give(self, writes: list[_Write]) -> None:
        if writes:
            self._idle = False
            self._inbox.put(writes)

    def _write_here(self, writes: list[_Write]) -> None:
        """Write them in this turn of the loop. What must wait, because another process writes, is left to the thread."""
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._serve(writes)
        except OSError:
            pass  # another one has its turn; whatever else it is, the thread meets it, too
        except BaseException as error:  # of the main thread, where the loop may run: no transaction is left open
            self._fail_all(writes, error)
            raise
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
            self._resolve([write for write in writes if write.done])
            with self._gate:
                self._give([write for write in writes if not write.done])

    def close(self) -> bool:
        """Tell the thread to end after what waits. False if somebody has told it before."""
        with self._gate:
            if self.closed:
                return False
            self.closed = True
            for new in self._new.values():
                self._inbox.put(new)
            self._new.clear()
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

    def _watch(self, loop: asyncio.AbstractEventLoop) -> set[_Write]:
        """Who waits in this loop from now on; one timer for all of them, because nearly none ever waits so long."""
        for other in list(self._waiting):
            if other.is_closed():
                self._waiting.pop(other, None)
                with self._gate:
                    self._give(self._new.pop(other, []))  # what was submitted in its last turn
        loop.call_later(self._wait, self._give_up, loop)
        return self._waiting.setdefault(loop, set())

    def _give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send away who has waited too long, and look again when the next one will have."""
        waiting, now = self._waiting[loop], loop.time()
        for write in [write for write in waiting if write.until <= now]:
            with self._gate:
                if write.begun or write.done:
                    continue
                write.done = True
            waiting.discard(write)
            if not write.future.done():
                write.future.set_exception(self._too_long())
        self._hand_over(loop)  # an interrupt may have taken its turn away
        later = [write.until for write in waiting if write.until > now]
        if later:
            loop.call_at(min(later), self._give_up, loop)
        else:
            del self._waiting[loop]

    def _release(self, writes: Sequence[_Write]) -> None:
        """Wake the callers, once a loop: waking a loop is a system call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Write]] = {}
        for write in writes:
            by_loop.setdefault(write.future.get_loop(), []).append(write)
        for loop, some in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._resolve, some)

    def _resolve(self, writes: Sequence[_Write]) -> None:
        """Tell the callers, in their loop."""
        waiting: set[_Write] = self._waiting.get(asyncio.get_running_loop(), set())
        for write in writes:
            waiting.discard(write)
            if write.future.done():  # cancelled meanwhile; what was written stays written
                continue
            if write.error is not None:
                write.future.set_exception(write.error)
            else:
                write.future.set_result(write.result)

    def _run(self) -> None:
        waiting: list[_Write] = []
        ending = False
        while waiting or not ending or not self._inbox.empty():
            with self._gate:
                self._idle = not waiting and self._inbox.empty()
            ending = self._collect(waiting, ending)
            with self._using:
                if waiting:
                    try:
                        fcntl.flock(self._turn, fcntl.LOCK_EX)
                        ending = self._collect(waiting, ending)  # who came while we stood in the queue
                        self._serve(waiting)
                    except OSError as error:
                        self._fail_all(waiting, error)
                    finally:
                        fcntl.flock(self._turn, fcntl.LOCK_UN)
                self._release([write for write in waiting if write.done])
                waiting = [write for write in waiting if not write.done]
                self._checkpoint()
            if waiting:
                time.sleep(0.002)  # somebody has the file who does not queue: a person at it, a backup
        os.close(self._turn)
        try:
            self._connection.close()
        except apsw.Error as error:
            self._ended.set_exception(translated(error, self._path, 0))
        else:
            self._ended.set_result(None)

    def _collect(self, waiting: list[_Write], ending: bool) -> bool:
        """Add what has come in; sleep only if nothing waits. True when nobody new comes in."""
        with contextlib.suppress(queue.Empty):
            while len(waiting) < GROUP:
                writes = self._inbox.get(block=not waiting and not ending)
                if writes is None:
                    ending = True
                else:
                    waiting += writes
        return ending

    def _serve(self, waiting: list[_Write]) -> None:
        """Bring the writes to their end, or leave them as they are where somebody has the file."""
        if self._broken is not None:
            return _fail(waiting, StoreError(self._broken, hint="check the disk, then restart"))
        scrubs = [write for write in waiting if isinstance(write.job, Scrub)]
        if scrubs:
            rest = [write for write in waiting if not isinstance(write.job, Scrub)]
            self._scrub([write for write in scrubs if not write.done])
            if rest:
                self._serve(rest)
            waiting[:] = [*rest, *scrubs]
            return None
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except apsw.BusyError:
            return None
        except apsw.Error as error:
            return self._fail_all(waiting, error)
        with self._gate:
            waiting[:] = [write for write in waiting if not write.done]
            for write in waiting:
                write.begun = True
        return self._transact(waiting)

    def _scrub(self, scrubs: Sequence[_Write]) -> None:
        try:
            waits = [write for write in scrubs if isinstance(write.job, Scrub) and write.job.rebuild]
            if not all(write.result for write in waits):
                self._connection.execute("VACUUM")
            for write in waits:
                write.result = True  # when only the log is in the way, the file need not be rebuilt again
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:  # somebody reads
            return None
        except apsw.Error as error:
            return self._fail_all(scrubs, error)
        with self._gate:
            for write in scrubs:
                write.done = True
        self._log_pages = 0
        return None

    def _transact(self, waiting: Sequence[_Write]) -> None:
        committing = False
        try:
            self._work(waiting)
            committing, began = True, time.monotonic()
            self._connection.execute("COMMIT")
            self._takes += (time.monotonic() - began - self._takes) / COMMITS
        except Exception as error:  # noqa: BLE001 - whatever it is, the callers get it and the thread lives on
            self._fail_all(waiting, error, committing=committing)

    def _work(self, waiting: Sequence[_Write]) -> None:
        bookings: list[tuple[_Write, Booking]] = []
        appends: list[tuple[_Write, Row]] = []
        for write in waiting:
            write.done = True
            match write.job:
                case Booking() as booking:
                    bookings.append((write, booking))
                case tuple() as row:
                    appends.append((write, row))
                case Scrub():
                    raise AssertionError("it is no part of a transaction")
                case change:
                    with self._alone(write):
                        write.result = change(self._connection)
        if bookings:
            self._ledger.book(bookings)
        for some in runs(appends):
            self._append(self._unless_erased(some))

    def _append(self, some: Sequence[tuple[_Write, Row]]) -> None:
        try:
            insert(self._connection, "records", RECORD_COLUMNS, [row for _, row in some])
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

    def _unless_erased(self, some: Sequence[tuple[_Write, Row]]) -> Sequence[tuple[_Write, Row]]:
        """The Records; without words where their subject was erased after they had begun."""
        subjects = [from_text(row[_SUBJECT]) for _, row in some if row[_SUBJECT] is not None]
        if not subjects:
            return some
        rows = fetch_where(self._connection, "SELECT subject, task, at FROM erased WHERE subject", subjects)
        erased = {(subject, task): at for subject, task, at in rows}

        def kept(row: Row) -> Row:
            subject, task, at = (row[place] for place in (_SUBJECT, _TASK, _AT))
            until = max(erased.get((subject, ""), -math.inf), erased.get((subject, task), -math.inf))
            return row if at > until else record_row(forgotten(row[_BODY]))

        return [(write, kept(row)) for write, row in some]

    def _why_not(self, row: Row) -> ApprenticeError:
        values = dict(zip(_COLUMNS, row, strict=True))
        key = (values["task"], values["idempotency_key"])
        if fetch(self._connection, "SELECT 1 FROM records WHERE request_id = ?", (values["request_id"],)):
            return StoreError(f"request {from_text(values['request_id'])!r} is recorded already", hint="use a fresh id")
        if fetch(self._connection, "SELECT 1 FROM records WHERE task = ? AND idempotency_key = ?", key):
            return IdempotencyConflict(f"idempotency key {from_text(key[1])!r} of task {from_text(key[0])!r} is taken")
        return StoreError(f"request {from_text(values['request_id'])!r} does not fit the table of Records")

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

    def _fail_all(self, writes: Sequence[_Write], error: BaseException, *, committing: bool = False) -> None:
        # Named before anything else is asked of the connection, which forgets the system's error then.
        known = self._translated(error)
        self._ledger.forget()
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

    def _translated(self, error: BaseException) -> ApprenticeError:
        return translated(error, self._path, self._connection.system_errno)

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


class _Ledger:
    """The rows of the ledger that bookings need, from one transaction to the next.

    What the last ones used is as it is in the file, unless another connection has committed since: SQLite tells, and under
    the write lock nobody can come between.
    """

    def __init__(self, path: Path, connection: apsw.Connection) -> None:
        self._path = path
        self._connection = connection
        self._books = Books({}, {})
        self._rows: set[str] = set()  # windows that have a row
        self._as_of: int | None = None  # the state of the file that they are of; None: of none

    def forget(self) -> None:
        """Read everything anew the next time: the transaction is undone, or nobody knows."""
        self._as_of = None

    def book(self, some: Sequence[tuple[_Write, Booking]]) -> None:
        """Within a transaction, do what was booked; who cannot have it gets the error."""
        as_of = fetch(self._connection, "PRAGMA data_version")[0][0]
        if as_of != self._as_of or len(self._books.entries) + len(self._rows) > KEPT:
            self._books, self._rows, self._as_of = Books({}, {}), set(), as_of
        self._book(some)

    def _book(self, some: Sequence[tuple[_Write, Booking]]) -> None:
        try:
            self._load([booking for _, booking in some])
        except StoreCorrupt as error:
            if len(some) == 1:
                some[0][0].error = error
            else:  # a damaged row is the trouble of those who need it
                for one in some:
                    self._book([one])
            return
        known = set(self._books.entries)  # what has a row
        for write, booking in some:
            try:
                booking.act(self._books)
            except ApprenticeError as error:
                write.error = error
        self._save(known)

    def _load(self, some: Sequence[Booking]) -> None:
        entries, amounts = self._books.entries, self._books.amounts
        attempts = [booking.attempt_id for booking in some if booking.attempt_id not in entries]
        windows = set().union(*{booking.windows for booking in some})
        try:
            rows = fetch_where(self._connection, f"SELECT {LEDGER_COLUMNS} FROM ledger WHERE attempt_id", attempts)
            read = [read_entry(row) for row in rows]
            windows.update(*(entry.hold.windows for entry in read))
            if new := windows - amounts.keys():
                found = amounts_of(self._connection, [ALL_WINDOWS, *new])
                amounts.update(found)
                self._rows.update(found)
            entries.update((entry.hold.attempt_id, entry) for entry in read)
        except (ValueError, TypeError) as error:
            raise StoreCorrupt(f"{self._path}: damaged row in the ledger: {error}") from error

    def _save(self, known: set[str]) -> None:
        books = self._books
        rows = [entry_row(books.entries[attempt]) for attempt in books.changed_entries - known]
        for some in runs(rows):
            insert(self._connection, "ledger", LEDGER_COLUMNS, some)
        ended = [books.entries[attempt] for attempt in books.changed_entries & known]
        rows = [(to_text(entry.hold.attempt_id), entry.state, entry.cost, entry.seal) for entry in ended]
        for some in runs(rows):
            update(self._connection, _END, some)
        new = books.changed_windows - self._rows
        if new:
            books.amounts.setdefault(ALL_WINDOWS, Amount()).spent += len(new)
            books.changed_windows.add(ALL_WINDOWS)
        amounts = [(window, books.amounts[window]) for window in sorted(books.changed_windows)]
        rows = [(to_text(window), amount.spent, amount.held, amount.seal(window)) for window, amount in amounts]
        for some in runs(rows):
            insert(self._connection, "windows", "key, spent, held, seal", some, _WINDOW_AGAIN)
        self._rows |= books.changed_windows
        self._books = Books(
            {name: entry for name, entry in books.entries.items() if entry.state == "held"}, books.amounts
        )


def _fail(writes: Sequence[_Write], error: ApprenticeError) -> None:
    for write in writes:
        write.done = True
        write.error = type(error)(str(error), hint=error.hint)  # its own: a raised error collects the raiser's frames
        write.error.__cause__ = error.__cause__


# --- statements


def fetch(connection: apsw.Connection, sql: str, values: Row = ()) -> list[Row]:
    return connection.execute(sql, values).fetchall()


def fetch_where(connection: apsw.Connection, sql: str, keys: Sequence[str]) -> Iterator[Row]:
    """The rows whose last-named column is one of the keys."""
    for some in runs(sorted({to_text(key) for key in keys})):
        yield from fetch(connection, f"{sql} IN ({_places(len(some))})", tuple(some))


def insert(connection: apsw.Connection, table: str, columns: str, rows: Sequence[Row], conflict: str = "") -> None:
    update(connection, f"INSERT INTO {table} ({columns}) VALUES {{}} {conflict}", rows)


def update(connection: apsw.Connection, sql: str, rows: Sequence[Row]) -> None:
    """The statement, with the rows as VALUES between its braces."""
    connection.execute(sql.format(_row_places(len(rows), len(rows[0]))), tuple(chain.from_iterable(rows)))


@lru_cache(maxsize=256)  # a text for each table and size of a run
def _row_places(rows: int, values: int) -> str:
    return ", ".join([f"({_places(values)})"] * rows)


def _places(number: int) -> str:
    return ", ".join("?" * number)


def amounts_of(connection: apsw.Connection, windows: Sequence[str]) -> dict[str, Amount]:
    """The amount of each window; empty for one without a row, after a look that no row got lost.

    A damaged page can hide a row. Rows are few (days times tasks), and a window is new once, so all are counted then.
    """
    sql = "SELECT key, spent, held, seal FROM windows"
    found = dict(read_amount(*row) for row in fetch_where(connection, f"{sql} WHERE key", windows))
    if len(found) < len(set(windows)):
        found = dict(read_amount(*row) for row in fetch(connection, sql))
        expected = found[ALL_WINDOWS].spent if ALL_WINDOWS in found else 0
        if len(found.keys() - {ALL_WINDOWS}) != expected:
            raise StoreCorrupt(f"the ledger has {len(found) - 1} windows, and should have {expected}")
    return found


def translated(error: BaseException, path: Path, system_errno: int) -> ApprenticeError:
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
