"""The SQLite store survives kills, full disks, failing disks and other processes; what it has said stays true."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Buffer, Callable, Iterator
from pathlib import Path

import apsw
import pytest

from apprentice import stores
from apprentice.errors import (
    BudgetError,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreTooNew,
)
from apprentice.stores.sqlite import SqliteStore, build
from apprentice.testing.stores import a_hold, a_record, check_store
from apprentice.types import Cap

WINDOWS = ("total", "day:2026-11-21", "task:sort/total", "task:sort/day:2026-11-21")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "store.db"


def child(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def loosen(path: Path) -> None:
    path.chmod(0o644)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def listed(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def content(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, data: bytes | bytearray) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def integrity(path: Path) -> str:
    connection = apsw.Connection(str(path))
    try:
        return str(connection.pragma("integrity_check"))
    finally:
        connection.close()


async def reconciled(store: SqliteStore) -> int:
    """What was spent, after a look that every window says the same as the sum of the attempts."""
    lines = await store.spending()
    spent = await store.spent(WINDOWS)
    assert set(spent.values()) == {sum(line.cost for line in lines)}
    return spent["total"]


# --- kills and other processes

STREAM = """
import asyncio, os, sys
from pathlib import Path
from apprentice.stores.sqlite import build
from apprentice.testing.stores import a_hold, a_record
windows = sys.argv[3].split(",")
async def one(store, n):
    for turn in range(10**6):
        name = f"{sys.argv[2]}/{n}/{turn}"
        await store.reserve(a_hold(name, 10, windows), [])
        os.write(1, f"held {name}\\n".encode())
        await store.append(a_record(name, tags={"filler": "x" * (turn % 50 * 100)}))
        os.write(1, f"recorded {name}\\n".encode())
        await store.settle(name, turn % 10, state="settled")
        os.write(1, f"settled {name} {turn % 10}\\n".encode())
async def main():
    store = build(Path(sys.argv[1]))
    await asyncio.gather(*[one(store, n) for n in range(8)])
asyncio.run(main())
"""


@pytest.mark.parametrize("kills", [3, pytest.param(12, marks=pytest.mark.slow)])
async def test_what_was_acknowledged_survives_kill_9(path: Path, kills: int) -> None:
    dice = random.Random(20261121)
    said: list[list[str]] = []
    for kill in range(kills):
        process = child(STREAM, path, kill, ",".join(WINDOWS))
        assert process.stdout is not None
        said += [process.stdout.readline().decode().split() for _ in range(dice.randint(1, 1_000))]
        process.kill()
        rest, _ = process.communicate()
        said += [line.split() for line in rest.decode().split("\n")[:-1]]
    assert integrity(path) == "ok"
    store = build(path)
    try:
        recorded = {record.request_id for _, record in await store.records("sort")}
        assert {words[1] for words in said if words[0] == "recorded"} <= recorded
        held = {words[1] for words in said if words[0] == "held"}
        settled = {words[1]: int(words[2]) for words in said if words[0] == "settled"}
        open_holds = {hold.attempt_id for hold in await store.holds(2e9)}
        assert held - open_holds >= settled.keys()
        assert not open_holds & settled.keys()
        # What was held and never settled counts in full, and nothing is booked that the ledger does not list.
        assert await reconciled(store) >= sum(settled.values()) + 10 * len((held & open_holds) - settled.keys())
        assert len(open_holds) <= kills * 8
    finally:
        await store.close()


SPEND = """
import asyncio, random, sys
from pathlib import Path
from apprentice.errors import BudgetExhausted, BudgetHeld
from apprentice.stores.sqlite import build
from apprentice.testing.stores import a_hold
from apprentice.types import Cap
async def main():
    dice = random.Random(int(sys.argv[2]))
    windows = sys.argv[3].split(",")
    caps = [Cap(window=window, limit=limit) for window, limit in zip(windows, (9000, 3000, 8000, 4000))]
    store, paid, turn = build(Path(sys.argv[1])), 0, 0
    while True:
        turn += 1
        name = f"{sys.argv[2]}/{turn}"
        try:
            await store.reserve(a_hold(name, 10, windows), caps)
        except BudgetHeld:
            await asyncio.sleep(0.001)
            continue
        except BudgetExhausted:
            break
        cost = dice.randint(0, 10)
        await store.settle(name, cost, state="settled")
        paid += cost
    await store.close()
    print(paid)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [4, pytest.param(8, marks=pytest.mark.slow)])
async def test_processes_at_once_never_overspend_and_use_nearly_all(path: Path, number: int) -> None:  # F1
    # They also make the store at the same time.
    processes = [child(SPEND, path, place, ",".join(WINDOWS)) for place in range(number)]
    paid = [int(process.communicate()[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    store = build(path)
    try:
        assert await reconciled(store) == sum(paid)
        assert 3_000 - 10 < sum(paid) <= 3_000
        assert await store.holds(2e9) == []
    finally:
        await store.close()


MIGRATE = """
import os, signal, sys
from pathlib import Path
import apsw
from apprentice.stores import MIGRATIONS, migrate
folder = Path(sys.argv[1])
steps = [*MIGRATIONS, ("CREATE TABLE later (a)", "INSERT INTO later VALUES (1)")]
def forked(act):
    pid = os.fork()
    if pid == 0:
        act()
        os._exit(0)
    return os.waitpid(pid, 0)[1]
def whole(path, limit):
    connection = apsw.Connection(str(path))
    left = limit
    def count(cursor, sql, bindings):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return True
    connection.exec_trace = count
    migrate(connection, steps)
    connection.exec_trace = None
    assert connection.execute("SELECT a FROM later").fetchall() == [(1,)]
    assert connection.pragma("user_version") == len(steps)
    connection.close()
killed = 0
while True:
    path = folder / f"{killed}.db"
    if forked(lambda: whole(path, killed)) == 0:
        break
    assert forked(lambda: whole(path, 10**9)) == 0, killed
    killed += int(sys.argv[2])
print(killed)
"""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_migration_killed_at_any_statement_is_finished_by_the_next_start(tmp_path: Path, every: int) -> None:  # F39
    process = child(MIGRATE, tmp_path, every)
    killed = int(process.communicate()[0])
    assert killed > sum(len(step) for step in stores.MIGRATIONS)


async def test_a_writer_that_does_not_queue_makes_us_wait_and_then_fail(path: Path) -> None:  # F30
    store = build(path, wait=0.3)
    other = apsw.Connection(str(path))
    other.execute("BEGIN IMMEDIATE")
    before = time.monotonic()
    with pytest.raises(StoreBusy):
        await store.append(a_record("given up"))
    assert 0.25 < time.monotonic() - before < 5
    assert await store.count("sort") == 0  # reading goes on
    waiting = asyncio.ensure_future(store.append(a_record("in time")))
    await asyncio.sleep(0.05)
    other.execute("ROLLBACK")
    await waiting
    assert [record.request_id for _, record in await store.records("sort")] == ["in time"]
    other.close()
    await store.close()


async def test_a_process_that_stands_still_at_the_head_of_the_queue_is_not_waited_for_forever(path: Path) -> None:
    store = build(path, wait=0.2)
    with path.with_name("store.db-lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreBusy):
            await store.append(a_record("given up"))
        with pytest.raises(StoreBusy):
            await store.close()
    await store.close()
    store = build(path)
    assert await store.count("sort") == 0
    await store.close()


async def test_every_transaction_that_writes_takes_the_write_lock_first(path: Path) -> None:  # F31
    said: list[tuple[str, bool]] = []

    def follow(connection: apsw.Connection) -> None:
        def trace(_cursor: object, sql: str, _bindings: object) -> bool:
            said.append((" ".join(sql.split()), connection.in_transaction))
            return True

        connection.exec_trace = trace

    apsw.connection_hooks.append(follow)
    try:
        await check_store(build, path.parent)
    finally:
        apsw.connection_hooks.remove(follow)
    begins = [sql for sql, _ in said if sql.startswith(("BEGIN", "SAVEPOINT")) and sql != "SAVEPOINT alone"]
    assert set(begins) == {"BEGIN IMMEDIATE"}
    inside = {sql.split()[0].upper() for sql, in_transaction in said if in_transaction}
    outside = {sql.split()[0].upper() for sql, in_transaction in said if not in_transaction}
    assert {"INSERT", "UPDATE", "CREATE"} <= inside
    assert outside == {"BEGIN", "SELECT", "PRAGMA"}


SIDE_DOOR = """
import asyncio, os, sys
from pathlib import Path
from apprentice.stores.sqlite import build
from apprentice.testing.stores import check_store
folder = Path(sys.argv[1])
found = set()
def look(event, arguments):
    if event != "open" or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path = Path(os.fsdecode(arguments[0]))
    new = arguments[2] & os.O_CREAT and arguments[2] & os.O_EXCL  # fails where there is a file
    if folder in path.parents and not path.is_dir() and not path.name.endswith("-lock") and not new:
        found.add(path.name)
sys.addaudithook(look)
asyncio.run(check_store(build, folder))
assert (folder / "a_hold_ends_once").exists()
print(*found)
(folder / "a_hold_ends_once").read_bytes()
print(*found)
"""


def test_nobody_but_sqlite_opens_a_database_whose_locks_would_go_with_it(tmp_path: Path) -> None:  # F35
    process = child(SIDE_DOOR, tmp_path)
    said, _ = process.communicate()
    assert (process.returncode, said) == (0, b"\na_hold_ends_once\n")  # and it is seen where somebody does


async def test_ten_thousand_calls_of_one_micro_dollar_cost_ten_thousand(path: Path) -> None:  # F24
    store = build(path)
    caps = [Cap(window=window, limit=10_000) for window in WINDOWS]
    for some in range(0, 10_000, 1_000):
        names = [f"a{number}" for number in range(some, some + 1_000)]
        await asyncio.gather(*[store.reserve(a_hold(name, 1, WINDOWS), caps) for name in names])
        await asyncio.gather(*[store.settle(name, 1, state="settled") for name in names])
    assert await reconciled(store) == 10_000
    with pytest.raises(BudgetError):
        await store.reserve(a_hold("one more", 1, WINDOWS), caps)
    await store.close()


# --- disks that fail


class Disk(apsw.VFS):
    """The disk of this machine, with what `fail` says going wrong: it sees ("write" or "sync", file name)."""

    def __init__(self) -> None:
        self.fail: Callable[[str, str], apsw.Error | None] = lambda _act, _name: None
        self.syncs = 0
        super().__init__("failing", "unix", makedefault=True)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> DiskFile:
        return DiskFile(self, name, flags)

    def act(self, act: str, name: str) -> None:
        self.syncs += act == "sync"
        if (error := self.fail(act, name)) is not None:
            raise error


class DiskFile(apsw.VFSFile):
    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self.disk = disk
        self.name = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        super().__init__("unix", name, flags)

    def xWrite(self, data: Buffer, offset: int) -> None:
        self.disk.act("write", self.name)
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self.disk.act("sync", self.name)
        super().xSync(flags)

    def excepthook(self, *_: object) -> bool:
        """The error is raised again at the caller's; it need not be printed here as well."""
        return True


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.unregister()


def broken(code: int) -> apsw.Error:
    error = apsw.exception_for(code)
    assert isinstance(error, apsw.Error)
    return error


async def test_a_full_disk_fails_the_write_and_heals_without_a_restart(path: Path, disk: Disk) -> None:  # F32
    store = build(path)
    await store.append(a_record("before"))
    disk.fail = lambda act, _: apsw.FullError() if act == "write" else None
    attempts = [store.append(a_record("full")), store.reserve(a_hold("full", 1), []), store.save_state("sort", 1, "s")]
    failed = await asyncio.gather(*attempts, return_exceptions=True)
    assert [type(error) for error in failed] == [StoreFull] * 3
    assert await store.count("sort") == 1
    disk.fail = lambda _act, _name: None
    await store.append(a_record("full"))
    await store.reserve(a_hold("full", 1), [])
    assert (await store.spent(["total"]), await store.load_state("sort")) == ({"total": 1}, None)
    await store.close()
    assert integrity(path) == "ok"


@pytest.mark.parametrize("code", [apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR])
async def test_a_failed_fsync_ends_writing_until_somebody_looks(path: Path, disk: Disk, code: int) -> None:  # F33
    store = build(path)
    await store.append(a_record("before"))
    disk.fail = lambda act, _: broken(code) if act == "sync" else None
    with pytest.raises(StoreError):
        await store.reserve(a_hold("a1", 1), [])
    disk.fail = lambda _act, _name: None
    for call in (store.append(a_record("after")), store.reserve(a_hold("a2", 1), [])):
        with pytest.raises(StoreError, match="no more writes"):
            await call
    assert await store.count("sort") == 1
    await store.close()
    store = build(path)
    await store.append(a_record("after a restart"))
    await store.close()
    assert integrity(path) == "ok"


async def test_a_failed_fsync_of_a_checkpoint_ends_writing_too(path: Path, disk: Disk) -> None:  # F33
    store = build(path)
    disk.fail = lambda act, name: broken(apsw.SQLITE_IOERR_FSYNC) if (act, name[-3:]) == ("sync", ".db") else None
    acknowledged = 0
    with pytest.raises(StoreError, match="no more writes"):
        while acknowledged < 1_000:
            await store.append(a_record(f"r{acknowledged}", tags={"filler": "x" * 20_000}))
            acknowledged += 1
    disk.fail = lambda _act, _name: None
    await store.close()
    store = build(path)
    assert await store.count("sort") == acknowledged > 0
    await store.close()


@pytest.mark.parametrize("kind", ["full", "error"])
async def test_a_fault_at_any_input_or_output_loses_nothing_that_was_said(
    tmp_path: Path, disk: Disk, kind: str
) -> None:  # F32, F33
    calls: list[tuple[str, Callable[[SqliteStore], Awaitable[object]]]] = [
        ("reserve", lambda store: store.reserve(a_hold("a", 10, WINDOWS), [Cap(window="total", limit=10)])),
        ("append", lambda store: store.append(a_record("r"))),
        ("settle", lambda store: store.settle("a", 4, state="settled")),
        ("state", lambda store: store.save_state("sort", 1, "s")),
    ]
    nth = failures = 0
    while failures == nth:
        left = nth = nth + 1

        def fail(act: str, _name: str) -> apsw.Error | None:
            nonlocal left
            left -= 1
            if left:
                return None
            return apsw.FullError() if kind == "full" else broken(apsw.SQLITE_IOERR_FSYNC)

        path = tmp_path / f"{nth}.db"
        store = build(path)
        disk.fail = fail
        done: list[str] = []
        for name, call in calls:
            try:
                await call(store)
                done.append(name)
            except StoreError:
                failures = nth
        disk.fail = lambda _act, _name: None
        with contextlib.suppress(StoreError):
            await store.close()
        store = build(path)
        total = (await store.spent(["total"]))["total"]
        assert total == await reconciled(store)
        if "settle" in done:
            assert total == 4
        elif "reserve" in done:
            assert total in (4, 10)  # a settlement that failed may still have reached the disk
        assert (await store.count("sort") == 1) >= ("append" in done)
        assert (await store.load_state("sort") == (1, "s")) >= ("state" in done)
        await store.close()
        assert integrity(path) == "ok"
    assert nth > 12  # at least a write and a sync for each call were hit


async def test_a_write_is_on_the_disk_before_its_caller_goes_on_and_many_share_one_sync(path: Path, disk: Disk) -> None:
    store = build(path)
    for number in range(5):
        before = disk.syncs
        await store.append(a_record(f"lone {number}"))
        assert disk.syncs > before
    before = disk.syncs
    await asyncio.gather(*[store.append(a_record(f"r{number}")) for number in range(400)])
    assert 1 <= disk.syncs - before < 40
    await store.close()


async def test_the_log_does_not_grow_without_end(path: Path) -> None:
    store = build(path)
    for turn in range(20):
        await asyncio.gather(
            *[store.append(a_record(f"{turn}/{number}", tags={"filler": "x" * 40_000})) for number in range(40)]
        )
    assert size(path) > 20_000_000
    assert size(path.with_name("store.db-wal")) < 12_000_000
    await store.close()
    assert size(path.with_name("store.db-wal")) == 0


# --- files that are not what they should be


async def test_only_the_owner_can_read_what_is_kept(path: Path) -> None:  # F43
    before = os.umask(0)
    try:
        store = build(path)
        await store.append(a_record("r1"))
        names = ("store.db", "store.db-lock", "store.db-shm", "store.db-wal")
        assert listed(path.parent) == list(names)
        assert [mode(path.with_name(name)) for name in names] == [0o600] * 4
        assert mode(path.parent) == 0o700
        await store.close()
    finally:
        os.umask(before)


@contextlib.contextmanager
def nobody_special(folder: Path) -> Iterator[None]:
    """Without the rights of an administrator, to whom no folder is read-only; what is in the folder is this user's."""
    if os.geteuid() != 0:
        yield
        return
    for file in [folder, *folder.rglob("*")]:
        os.chown(file, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("made", [False, True])
async def test_a_folder_that_cannot_be_written_to_is_refused(made: bool) -> None:  # F43
    with tempfile.TemporaryDirectory() as name:  # not pytest's, whose parents are closed to others
        path = Path(name) / "state" / "store.db"
        path.parent.mkdir(mode=0o700)
        if made:
            await build(path).close()
        with nobody_special(Path(name)):
            path.parent.chmod(0o500)
            before = listed(path.parent)
            try:
                with pytest.raises(StoreError) as refused:
                    build(path)
                assert "store.db" in str(refused.value)
                assert listed(path.parent) == before
            finally:
                path.parent.chmod(0o700)
            store = build(path)
            await store.reserve(a_hold("a1", 1), [])
            await store.close()


async def test_a_file_that_others_can_read_is_tightened(path: Path) -> None:
    await build(path).close()
    loosen(path)
    await build(path).close()
    assert mode(path) == 0o600


async def test_a_store_of_a_newer_apprentice_is_left_alone(path: Path) -> None:  # F39
    await build(path).close()
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", len(stores.MIGRATIONS) + 1)
    connection.close()
    before = content(path)
    with pytest.raises(StoreTooNew, match=f"schema {len(stores.MIGRATIONS) + 1}"):
        build(path)
    assert content(path) == before


@pytest.mark.parametrize("version", [0, 1, 99])
async def test_the_database_of_another_program_is_left_alone(path: Path, version: int) -> None:
    path.parent.mkdir()
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE theirs (a)")
    connection.pragma("user_version", version)
    connection.close()
    before = content(path)
    with pytest.raises(StoreCorrupt, match="another program"):
        build(path)
    assert content(path) == before


async def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    write(path, b"not a database at all " * 1_000)
    with pytest.raises(StoreCorrupt):
        build(path)


async def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "store.db", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(StoreError):
            build(path)


async def test_a_disk_on_which_processes_cannot_share_memory_is_refused(path: Path) -> None:
    vfs = apsw.VFS("no locks", "unix-none", makedefault=True)  # as SQLite treats a disk that knows no locks
    try:
        with pytest.raises(StoreError, match="no write-ahead log") as refused:
            build(path)
        assert "network" in str(refused.value.hint)
    finally:
        vfs.unregister()
    await build(path).close()


async def test_a_sqlite_that_corrupts_logs_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # F38
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.51.2")
    with pytest.raises(StoreError, match=r"3\.51\.2"):
        build(path)
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.51.3")
    await build(path).close()


async def test_what_is_recorded_cannot_be_changed_behind_the_store(path: Path) -> None:
    store = build(path)
    await store.append(a_record("r1"))
    await store.reserve(a_hold("a1", 5), [])
    await store.settle("a1", 5, state="settled")
    await store.close()
    connection = apsw.Connection(str(path))
    for statement in (
        "UPDATE records SET cost = 0",
        "DELETE FROM records",
        "UPDATE ledger SET cost = 0",
        "DELETE FROM ledger",
    ):
        with pytest.raises(apsw.ConstraintError):
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE windows SET spent = 0 WHERE key = 'total'",
        "UPDATE windows SET key = 'tital' WHERE key = 'total'",
        "DELETE FROM windows WHERE key = 'total'",
        "UPDATE windows SET spent = 2 WHERE key = ''",
        "DELETE FROM windows WHERE key = ''",
    ],
)
async def test_an_altered_window_is_an_error_and_never_room(path: Path, statement: str) -> None:
    store = build(path)
    await store.reserve(a_hold("a1", 100), [])
    await store.settle("a1", 100, state="settled")
    await store.close()
    connection = apsw.Connection(str(path))
    connection.execute(statement)
    connection.close()
    store = build(path)
    with pytest.raises(StoreCorrupt):
        await store.reserve(a_hold("a2", 10, ["total", "day:2026-11-22"]), [Cap(window="total", limit=105)])
    await store.append(a_record("r1"))  # what does not need the damaged row goes on
    await store.close()


async def test_a_flipped_byte_is_an_error_or_harmless_and_never_other_money(tmp_path: Path) -> None:  # F40
    sound = tmp_path / "sound.db"
    store = build(sound)
    for number in range(30):
        await store.reserve(a_hold(f"a{number}", 10, [*WINDOWS, f"day:2026-10-{number + 1}"]), [])
        await store.settle(f"a{number}", 7, state="settled")
    await store.close()
    sound_bytes = content(sound)
    places = [place for place, byte in enumerate(sound_bytes) if byte]  # most of the file is empty
    dice = random.Random(40)
    noticed = 0
    for turn in range(200):
        damaged = bytearray(sound_bytes)
        damaged[dice.choice(places)] ^= dice.randint(1, 255)
        path = tmp_path / f"{turn}.db"
        write(path, damaged)
        try:
            store = build(path)
        except StoreError:
            noticed += 1
            continue
        try:
            assert await store.spent(WINDOWS) == dict.fromkeys(WINDOWS, 210)
            with pytest.raises((BudgetError, StoreError)):
                await store.reserve(a_hold("one more", 10, WINDOWS), [Cap(window=name, limit=219) for name in WINDOWS])
        except StoreError:
            noticed += 1
        finally:
            with contextlib.suppress(StoreError):
                await store.close()
    assert noticed > 20


# --- loops and threads


async def test_a_store_serves_several_event_loops(path: Path) -> None:
    store = build(path)

    def other() -> None:
        async def append() -> None:
            await asyncio.gather(*[store.append(a_record(f"other {number}")) for number in range(50)])

        asyncio.run(append())

    thread = threading.Thread(target=other)
    thread.start()
    await asyncio.gather(*[store.append(a_record(f"mine {number}")) for number in range(50)])
    thread.join()
    assert await store.count("sort") == 100
    await store.close()


async def test_a_caller_whose_loop_is_gone_does_not_stop_the_others(path: Path) -> None:
    store = build(path)

    def other() -> None:
        async def start() -> None:
            task = asyncio.ensure_future(store.append(a_record("of a loop that is gone")))
            await asyncio.sleep(0)
            task.cancel()

        asyncio.run(start())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    await store.append(a_record("of a living one"))
    assert await store.record("of a living one") is not None
    await store.close()


async def test_closing_leaves_no_thread_and_no_file_open(path: Path) -> None:
    await build(path).close()  # what is opened once only

    def opened() -> list[str]:
        for thread in threading.enumerate():
            if thread.name.startswith("apprentice"):  # it has nothing left to do, but may not have ended yet
                thread.join(5)
                assert not thread.is_alive()
        return listed(Path("/dev/fd"))

    before = opened()
    for turn in range(3):
        store = build(path)
        await store.append(a_record(f"r{turn}"))
        await store.count("sort")
        await store.close()
    assert opened() == before


def test_a_folder_is_refused_with_a_name_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder") as caught:
        build(tmp_path)
    assert "apprentice.db" in str(caught.value.hint)


async def test_a_copied_file_is_a_store(path: Path) -> None:
    store = build(path)
    await store.append(a_record("r1"))
    await store.close()
    shutil.copy(path, path.with_name("copy.db"))
    copy = build(path.with_name("copy.db"))
    assert await copy.count("sort") == 1
    await copy.close()


async def test_a_record_that_is_no_json_fails_alone(path: Path) -> None:
    store = build(path)
    with pytest.raises(StoreError, match="JSON"):
        await store.append(a_record("odd", input={"a set": {1, 2}}))
    with pytest.raises(StoreError, match="cost"):
        await store.append(a_record("dear", cost=2**63))
    await store.append(a_record("even"))
    assert await store.count("sort") == 1
    await store.close()
