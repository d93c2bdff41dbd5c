"""What the store keeps in memory is what is in the file, and nobody waits on the loop of others."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from apprentice.errors import BudgetExhausted, BudgetHeld, StoreBusy, StoreError, StoreFull
from apprentice.stores import RECORD_COLUMNS, record_row
from apprentice.stores.sqlite import build
from apprentice.testing.stores import HOSTILE, a_hold, a_record
from apprentice.types import Cap
from tests.stores.test_sqlite import Disk

WINDOWS = ("total", "day:2026-11-21")
CAPS = [Cap(window="total", limit=100)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


# --- the ledger, of which each process remembers a part


async def test_what_another_process_booked_counts_from_then_on(path: Path) -> None:
    one, other = build(path), build(path)
    await one.reserve(a_hold("a", 60, WINDOWS), CAPS)
    await one.reserve(a_hold("nothing", 0, WINDOWS), CAPS)
    with pytest.raises(BudgetHeld):
        await other.reserve(a_hold("b", 41, WINDOWS), CAPS)
    await other.settle("a", 30, state="settled")
    await one.reserve(a_hold("b", 70, WINDOWS), CAPS)
    await other.settle("b", 70, state="settled")
    await one.settle("a", 5, state="settled")  # it is over: the second end changes nothing
    with pytest.raises(BudgetExhausted):
        await one.reserve(a_hold("c", 1, WINDOWS), CAPS)
    assert await one.spent(WINDOWS) == await other.spent(WINDOWS) == dict.fromkeys(WINDOWS, 100)
    await other.reserve(a_hold("d", 1, ["day:2026-11-22"]), [])  # a new window: it looks whether none is missing
    await one.close()
    await other.close()


async def test_what_was_undone_is_not_remembered(path: Path) -> None:
    disk = Disk()
    try:
        store = build(path)
        await store.reserve(a_hold("a", 60, WINDOWS), CAPS)
        disk.fail = lambda act, _: apsw.FullError() if act == "write" else None
        ends = [store.settle("a", 10, state="settled"), store.reserve(a_hold("b", 40, WINDOWS), CAPS)]
        failed = await asyncio.gather(*ends, return_exceptions=True)
        assert [type(error) for error in failed] == [StoreFull] * 2
        disk.fail = lambda _act, _name: None
        assert await store.spent(WINDOWS) == dict.fromkeys(WINDOWS, 60)
        await store.reserve(a_hold("b", 40, WINDOWS), CAPS)
        await store.settle("a", 10, state="settled")
        assert await store.spent(WINDOWS) == dict.fromkeys(WINDOWS, 50)
        await store.close()
    finally:
        disk.unregister()


async def test_a_call_in_more_windows_than_are_remembered_is_booked_in_all(path: Path) -> None:
    store = build(path)
    windows = tuple(f"task:t{number}/total" for number in range(11_000))
    await store.reserve(a_hold("a", 60, windows), [])
    await store.settle("a", 1, state="settled")
    assert await store.spent(windows) == dict.fromkeys(windows, 1)
    await store.close()


# --- waiting


async def test_each_write_waits_its_own_time_for_another_process(path: Path) -> None:
    store, loop = build(path, wait=0.2), asyncio.get_running_loop()
    other = apsw.Connection(str(path))
    other.execute("BEGIN IMMEDIATE")

    async def waited(number: int) -> float:
        await asyncio.sleep(number * 0.07)
        before = loop.time()
        with pytest.raises(StoreBusy):
            await store.append(a_record(f"r{number}"))
        return loop.time() - before

    assert min(await asyncio.gather(*[waited(number) for number in range(4)])) >= 0.2
    other.execute("ROLLBACK")
    other.close()
    await store.append(a_record("in time"))
    assert [record.request_id for _, record in await store.records("sort")] == ["in time"]
    await store.close()


# --- who writes: the loop where that is sooner, else the thread


class Slow:
    """The disk of this machine, which takes `takes` seconds more for each sync; `by` are the threads that waited for it."""

    def __init__(self) -> None:
        self.takes = 0.0
        self.by: list[int] = []
        self._never = threading.Event()
        self._disk = Disk()
        self._disk.fail = self._act
        self.close = self._disk.unregister

    def _act(self, act: str, _name: str) -> None:
        if act == "sync":
            self.by.append(threading.get_ident())
            self._never.wait(self.takes)


@pytest.fixture
def slow() -> Iterator[Slow]:
    disk = Slow()
    yield disk
    disk.close()


async def test_a_loop_waits_for_a_quick_disk_itself_and_never_for_a_slow_one(path: Path, slow: Slow) -> None:
    store, here = build(path), threading.get_ident()
    for number in range(40):
        await store.append(a_record(f"quick {number}"))
    assert here in slow.by
    slow.takes = 0.02
    for number in range(2):
        await store.append(a_record(f"slower {number}"))
    slow.by.clear()
    for number in range(3):
        await store.append(a_record(f"slow {number}"))
    assert here not in slow.by
    assert len(slow.by) >= 3
    assert await store.count("sort") == 45
    await store.close()


async def test_many_writes_and_changes_of_many_rows_are_never_the_loops(path: Path, slow: Slow) -> None:
    store, here = build(path), threading.get_ident()
    for number in range(40):
        await store.append(a_record(f"quick {number}"))
    slow.by.clear()
    await asyncio.gather(*[store.append(a_record(f"many {number}")) for number in range(50)])
    await store.save_state("sort", 1, "any change")
    assert slow.by
    assert here not in slow.by
    await store.close()


@contextlib.contextmanager
def turn_of_another(path: Path) -> Iterator[None]:
    with Path(f"{path}-lock").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


async def test_the_loop_goes_on_while_another_process_has_its_turn(path: Path) -> None:
    store = build(path)
    for number in range(40):
        await store.append(a_record(f"quick {number}"))
    with turn_of_another(path):
        writing = asyncio.ensure_future(store.append(a_record("patient")))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not writing.done()
    assert await writing == 41
    await store.close()


async def test_what_a_loop_leaves_to_the_thread_is_written_before_the_store_closes(path: Path) -> None:
    store = build(path)
    for number in range(40):
        await store.append(a_record(f"quick {number}"))
    with turn_of_another(path):
        writing = asyncio.ensure_future(store.append(a_record("patient")))
        for _ in range(10):
            await asyncio.sleep(0)
        closing = asyncio.ensure_future(store.close())
        await asyncio.sleep(0)
    assert await writing == 41
    await closing


class Interrupted(list[Cap]):
    """Caps at which the interpreter is interrupted, as a person at the keyboard does it."""

    def __iter__(self) -> Iterator[Cap]:
        raise KeyboardInterrupt


def test_an_interrupt_in_the_middle_of_a_write_leaves_nothing_half_done(path: Path) -> None:
    loop, store = asyncio.new_event_loop(), build(path)
    for number in range(40):
        loop.run_until_complete(store.append(a_record(f"quick {number}")))
    append = loop.create_task(store.append(a_record("interrupted")))
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(store.reserve(a_hold("a", 1, WINDOWS), Interrupted()))
    with pytest.raises(StoreError, match="KeyboardInterrupt"):
        loop.run_until_complete(append)
    assert loop.run_until_complete(store.append(a_record("after"))) == 41
    assert loop.run_until_complete(store.spent(WINDOWS)) == dict.fromkeys(WINDOWS, 0)
    loop.run_until_complete(store.close())
    loop.close()


async def test_who_was_sent_away_is_not_remembered_however_many_wait(path: Path) -> None:
    store = build(path, wait=1.0)
    with turn_of_another(path):
        gone = asyncio.ensure_future(store.append(a_record("gone")))
        await asyncio.sleep(0.5)  # so much longer the second one has
        patient = asyncio.ensure_future(store.append(a_record("patient")))
        with pytest.raises(StoreBusy):
            await gone
        (waiting,) = store._writer._waiting.values()
        assert [write.done for write in waiting] == [False]
    assert await patient == 1
    await store.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
async def test_a_store_that_a_fork_carried_over_accepts_no_write_that_could_be_lost(path: Path) -> None:
    store = build(path)
    for number in range(40):
        await store.append(a_record(f"quick {number}"))
    if (child := os.fork()) == 0:
        try:
            store._writer.submit(record_row(a_record("carried")))
        except StoreError:
            os._exit(7)
        os._exit(0)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    await store.append(a_record("after"))
    await store.close()


class LockedDisk(apsw.VFS):
    """The disk of this machine, on which nobody new gets to read a file while it is `locked`."""

    def __init__(self) -> None:
        self.locked = False
        self.refused: list[int] = []  # the threads
        super().__init__("locked", "unix", makedefault=True)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> LockedFile:
        return LockedFile(self, name, flags)


class LockedFile(apsw.VFSFile):
    def __init__(self, disk: LockedDisk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self.disk = disk
        super().__init__("unix", name, flags)

    def xLock(self, level: int) -> None:
        if self.disk.locked:
            self.disk.refused.append(threading.get_ident())
            raise apsw.BusyError("scripted")
        super().xLock(level)

    def excepthook(self, *_: object) -> bool:
        """The error is raised again at the caller's; it need not be printed here as well."""
        return True


@pytest.fixture
def disk() -> Iterator[LockedDisk]:
    disk = LockedDisk()
    yield disk
    disk.unregister()


async def test_a_short_read_of_a_locked_file_lets_the_loop_go_on(path: Path, disk: LockedDisk) -> None:
    store = build(path, wait=5.0)
    await store.append(a_record("r1"))
    disk.locked = True
    reading = asyncio.ensure_future(store.record("r1"))
    while len(disk.refused) < 4:
        await asyncio.sleep(0)
    disk.locked = False
    assert disk.refused.count(threading.get_ident()) == 1  # it is tried again, but not by the thread of this loop
    assert await reading == a_record("r1")
    await store.close()


async def test_short_and_long_reads_of_several_loops_are_all_answered(path: Path) -> None:
    store = build(path)
    await asyncio.gather(*[store.append(a_record(f"r{number}", idempotency_key=f"k{number}")) for number in range(50)])
    answered: list[int] = []

    async def read() -> None:
        for number in range(8):
            long, short, kept = await asyncio.gather(
                store.records("sort"), store.record(f"r{number}"), store.record_by_key("sort", f"k{number}")
            )
            changes = await store.changes(40)
            assert len(long) == 50
            assert short == kept == long[number][1]
            assert [row.seq for row in changes.evidence] == list(range(41, 51))
            answered.append(number)

    threads = [threading.Thread(target=lambda: asyncio.run(read())) for _ in range(3)]
    for thread in threads:
        thread.start()
    await read()
    for thread in threads:
        thread.join()
    assert len(answered) == 4 * 8
    await store.close()


async def test_all_evidence_is_found_however_much_there_is(path: Path) -> None:
    store = build(path)
    for number in (256, 9):  # a page of the first read is full, and then there is more
        before = len((await store.changes(0)).evidence)
        await asyncio.gather(*[store.append(a_record(f"r{before + one}")) for one in range(number)])
        assert [row.seq for row in (await store.changes(0)).evidence] == list(range(1, before + number + 1))
        assert [row.seq for row in (await store.changes(before)).evidence] == list(
            range(before + 1, before + number + 1)
        )
    await store.close()


# --- how a Record is written


@pytest.mark.parametrize("text", HOSTILE)
def test_a_record_is_written_as_the_json_of_all_its_fields(text: str) -> None:
    record = a_record(text, input={text: [text, {text: text}]}, tags={text: text}, error=text)
    body = dict(zip(RECORD_COLUMNS.split(", "), record_row(record), strict=True))["body"]
    assert isinstance(body, str)
    assert body.isascii()
    assert json.loads(body) == json.loads(json.dumps(record.model_dump(mode="python")))


def test_a_record_without_an_end_is_an_error() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(StoreError, match="JSON"):
        record_row(a_record("r1", input=endless))
