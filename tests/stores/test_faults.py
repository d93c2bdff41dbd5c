"""Every fault of the disk at every operation: what was said stays true, and money that nobody knows of counts as spent."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Awaitable, Buffer, Callable
from pathlib import Path
from random import Random
from typing import Literal

import apsw
import pytest

from apprentice.errors import BudgetError, StoreError
from apprentice.stores.sqlite import SqliteStore, build
from apprentice.testing.stores import a_hold, a_record
from apprentice.types import Cap

WINDOWS = ("total", "day:2026-11-21", "task:sort/total", "task:sort/day:2026-11-21")
CAPS = [Cap(window="total", limit=100)]

type Kind = Literal["full", "error", "short", "done", "dead", "power"]
KINDS: tuple[Kind, ...] = ("full", "error", "short", "done", "dead", "power")
"""No space; an input/output error; half is written, then no space; all is done, and an error is told; an error from then
on for ever; the same, and what was not synced is lost, but for any part of it."""


class FaultyDisk(apsw.VFS):
    """The disk of this machine, whose operation number `fault_at` fails in one way."""

    def __init__(self, kind: Kind, fault_at: int) -> None:
        self.kind = kind
        self.left = fault_at
        self.faults = 0
        self.unsynced: dict[str, list[tuple[int, bytes]]] = {}  # writes since the last sync
        self.synced: dict[str, bytes] = {}
        super().__init__("faulty", "unix", makedefault=True)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> FaultyFile:
        if self.fails():
            raise apsw.CantOpenError("scripted")
        return FaultyFile(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        if self.fails():
            raise self.error(apsw.SQLITE_IOERR_DELETE)
        super().xDelete(filename, syncdir)
        self.synced.pop(filename, None)
        self.unsynced.pop(filename, None)

    def excepthook(self, *_: object) -> bool:
        """The error is raised again at the caller's; it need not be printed here as well."""
        return True

    def fails(self) -> bool:
        """Whether this operation is to fail."""
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self.kind in ("dead", "power")):
            self.faults += 1
            return True
        return False

    def error(self, code: int) -> apsw.Error:
        error = apsw.exception_for(apsw.SQLITE_FULL if self.kind in ("full", "short") else code)
        assert isinstance(error, apsw.Error)
        return error

    def cut_the_power(self, dice: Random) -> None:
        """Leave of each file what was synced, and any of the writes since, the last of them perhaps in part."""
        for name, synced in self.synced.items():
            image = bytearray(synced)
            for offset, data in self.unsynced.get(name, []):
                if dice.random() < 0.5:
                    kept = data if dice.random() < 0.7 else data[: dice.randrange(len(data))]
                    image.extend(bytes(max(0, offset + len(kept) - len(image))))
                    image[offset : offset + len(kept)] = kept
            if Path(name).exists():
                Path(name).write_bytes(image)
            with contextlib.suppress(FileNotFoundError):
                Path(name.removesuffix("-wal") + "-shm").unlink()


class FaultyFile(apsw.VFSFile):
    def __init__(self, disk: FaultyDisk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self.disk = disk
        self.name = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        super().__init__("unix", name, flags)
        if disk.kind == "power" and self.name not in disk.synced:
            self.sync()

    def sync(self) -> None:
        self.disk.unsynced[self.name] = []
        self.disk.synced[self.name] = super().xRead(super().xFileSize(), 0)

    def xWrite(self, data: Buffer, offset: int) -> None:
        fails, whole = self.disk.fails(), bytes(data)
        if self.disk.kind == "power":
            self.disk.unsynced[self.name].append((offset, whole))
        if fails and self.disk.kind == "short":
            super().xWrite(whole[: len(whole) // 2], offset)
        if not fails or self.disk.kind == "done":
            super().xWrite(whole, offset)
        if fails:
            raise self.disk.error(apsw.SQLITE_IOERR_WRITE)

    def xSync(self, flags: int) -> None:
        fails = self.disk.fails()
        if not fails and self.disk.kind == "power":
            self.sync()  # for the others the power stays on, and nothing has to reach the disk
        if fails:
            raise self.disk.error(apsw.SQLITE_IOERR_FSYNC)

    def xTruncate(self, newsize: int) -> None:
        fails = self.disk.fails()
        if not fails or self.disk.kind == "done":
            super().xTruncate(newsize)
            if self.disk.kind == "power":
                self.sync()
        if fails:
            raise self.disk.error(apsw.SQLITE_IOERR_TRUNCATE)

    def xRead(self, amount: int, offset: int) -> bytes:
        if self.disk.kind in ("error", "dead", "power") and self.disk.fails():
            raise self.disk.error(apsw.SQLITE_IOERR_READ)
        return super().xRead(amount, offset)

    def excepthook(self, *_: object) -> bool:
        return True


# --- six calls, and what has to be true of them afterwards

CALLS: dict[str, Callable[[SqliteStore], Awaitable[object]]] = {
    "reserve a": lambda store: store.reserve(a_hold("a", 30, WINDOWS), CAPS),
    "append": lambda store: store.append(a_record("r", tags={"filler": "x" * 20_000})),
    "settle a": lambda store: store.settle("a", 4, state="settled"),
    "reserve b": lambda store: store.reserve(a_hold("b", 50, WINDOWS), CAPS),
    "assume b": lambda store: store.settle("b", 0, state="assumed"),
    "reserve c": lambda store: store.reserve(a_hold("c", 40, WINDOWS), CAPS),
}


async def attempt(path: Path) -> list[str]:
    """Open the store and make the six calls, whatever fails. Those that said that they were done."""
    done: list[str] = []
    try:
        store = build(path)
    except StoreError:
        return done
    for name, call in CALLS.items():
        with contextlib.suppress(StoreError, BudgetError):  # no room for c while the end of a is not known
            await call(store)
            done.append(name)
    with contextlib.suppress(StoreError):
        await store.close()
    return done


async def check(path: Path, done: list[str]) -> None:
    """What was said to be done is there; what was not said is there whole or not at all; and money adds up."""
    store = build(path)
    try:
        connection = apsw.Connection(str(path))
        assert connection.pragma("integrity_check") == "ok"
        found = connection.execute("SELECT attempt_id, state, cost FROM ledger")
        rows = {name: (state, cost) for name, state, cost in found}
        connection.close()
        held = {"a": ("held", 0), "b": ("held", 0), "c": ("held", 0)}
        closed = {"a": ("settled", 4), "b": ("assumed", 50)}
        for name, row in rows.items():
            assert row in (held[name], closed.get(name))
        for name in held:
            assert f"reserve {name}" not in done or name in rows
        assert "settle a" not in done or rows["a"] == closed["a"]
        assert "assume b" not in done or rows["b"] == closed["b"]
        records = await store.records("sort")
        assert [record for _, record in records] in ([], [a_record("r", tags={"filler": "x" * 20_000})])
        assert "append" not in done or records
        counted = sum({"a": 30, "b": 50, "c": 40}[name] if row[0] == "held" else row[1] for name, row in rows.items())
        assert await store.spent(WINDOWS) == dict.fromkeys(WINDOWS, counted)
        assert counted == sum(line.cost for line in await store.spending()) <= 100
        # What is left can be spent, and no more.
        await store.reserve(a_hold("rest", 100 - counted, WINDOWS), CAPS)
        with pytest.raises(BudgetError):
            await store.reserve(a_hold("more", 1, WINDOWS), CAPS)
    finally:
        await store.close()


async def all_faults(made: Path | None, folder: Path, kind: Kind, every: int = 1) -> int:
    """The calls, and what has to be true afterwards, with a fault at the first operation, the second … The last that hit.

    `every`: of so many operations one has this fault; with as many as there are kinds, each has one of them.
    """
    for fault_at in itertools.count(1 + KINDS.index(kind) % every, every):
        path = folder / f"{kind}-{fault_at}.db"
        if made is not None:
            shutil.copy(made, path)
        disk = FaultyDisk(kind, fault_at)
        try:
            done = await attempt(path)
        finally:
            disk.unregister()
        if kind == "power":
            disk.cut_the_power(Random(fault_at))
        assert disk.faults or done == list(CALLS), f"no fault, and done is {done}"
        await check(path, done)
        for file in folder.glob(f"{path.name}*"):
            file.unlink()
        if not disk.faults:
            return fault_at - every
    raise AssertionError("unreachable")


@pytest.fixture
async def made(tmp_path: Path) -> Path:
    """A store that was closed in order."""
    path = tmp_path / "made.db"
    await build(path).close()
    return path


each = pytest.mark.parametrize("every", [len(KINDS), pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])


@each
@pytest.mark.parametrize("kind", KINDS)
async def test_a_fault_at_any_operation_leaves_calls_whole_or_undone(
    made: Path, tmp_path: Path, kind: Kind, every: int
) -> None:
    assert await all_faults(made, tmp_path, kind, every) > 90 - every


@each
@pytest.mark.parametrize("kind", KINDS)
async def test_a_fault_while_the_store_is_made_leaves_a_store(tmp_path: Path, kind: Kind, every: int) -> None:
    assert await all_faults(None, tmp_path, kind, every) > 60 - every
