"""What would go wrong, before it does: the machine, the store, the money, the local servers. Values only, no rendering.

Nothing is spent and nothing is started: files are looked at, the store is read, servers that run on this machine are asked
for their version. What is looked at comes in as `Around`, so that another machine can be described.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import math
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

import apsw

from apprentice import budget, plugins, wire
from apprentice import config as configuration
from apprentice.calls import price_of
from apprentice.config import Config, Local, Remote, TaskConfig
from apprentice.errors import ApprenticeError, ConfigError, PriceUnknown, StoreError
from apprentice.purse import LONG_HOLDS, lost_before, suspended_models
from apprentice.stores import (
    APPLICATION_ID,
    LEDGER_COLUMNS,
    MIGRATIONS,
    Amount,
    check_sqlite,
    migrate,
    read_amount,
    read_entry,
)
from apprentice.types import Json, Seconds, Store, Value

type State = Literal["ok", "warning", "problem"]
type Product = Literal["ollama", "llama.cpp", "vllm"]

# Their locks fail or lie, and a write-ahead log needs memory shared by all processes: https://sqlite.org/wal.html
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "ceph", "fuse.ceph", "glusterfs", "fuse.glusterfs", "lustre",
}  # fmt: skip
_PASSING = {
    "overlay": "a container's own layer",
    "tmpfs": "memory",
    "ramfs": "memory",
}  # gone with the container, the power
_LITTLE_SPACE, _NO_SPACE = 2**30, 100 * 2**20  # bytes free on the disk
_LARGE_LOG = 64 * 2**20  # bytes of the write-ahead log; it is written back at 4 MiB where nobody reads for long
_ANSWER: Seconds = 0.5  # a server on this machine answers sooner
_PATIENCE: Seconds = 10.0  # for a program that is asked for its version
_PROGRAMS: dict[str, Product] = {"ollama": "ollama", "llama-server": "llama.cpp", "vllm": "vllm"}


class Finding(Value):
    """One thing that was looked at. A problem is what will fail or lose something; a warning is what may."""

    subject: str
    state: State
    message: str
    fix: str = ""


class Advisory(NamedTuple):
    """Versions of a local server that should not be run."""

    product: Product
    first: tuple[int, ...]  # the first version that has the fault
    fixed: tuple[int, ...]  # the first one that does not have it any more
    about: str
    source: str
    published: str


# Looked up in November 2026. The worst of each product only: what is fixed in `fixed` is not all that was ever wrong.
ADVISORIES = (
    Advisory(
        "ollama",
        (0,),
        (0, 17, 1),
        "CVE-2026-7482: a model file that lies about its size sends the server's memory, with keys and prompts, elsewhere",
        "https://github.com/advisories/GHSA-x8qc-fggm-mpqg",
        "2026-05",
    ),
    Advisory(
        "ollama",
        (0,),
        (0, 1, 47),
        "CVE-2024-45436: an archive writes files outside the model's folder",
        "https://nvd.nist.gov/vuln/detail/CVE-2024-45436",
        "2024-08",
    ),
    Advisory(
        "vllm",
        (0, 8, 3),
        (0, 14, 1),
        "CVE-2026-22778: a request with a video overwrites the server's memory and may run code",
        "https://github.com/vllm-project/vllm/security/advisories/GHSA-4r2x-xpjr-7cvv",
        "2026-02",
    ),
    Advisory(
        "vllm",
        (0, 10, 2),
        (0, 11, 1),
        "CVE-2025-62164: a request with prompt embeddings overwrites the server's memory",
        "https://github.com/vllm-project/vllm/security/advisories/GHSA-mrw7-hf4f-83pf",
        "2025-11",
    ),
    Advisory(
        "llama.cpp",
        (0,),
        (8941,),  # fixed on 2026-04-23, in this build at the latest
        "CVE-2026-21869: a request with a negative n_discard overwrites the server's memory",
        "https://github.com/ggml-org/llama.cpp/security/advisories/GHSA-8947-pfff-2f3c",
        "2026-01",
    ),
    Advisory(
        "llama.cpp",
        (0,),
        (5721,),
        "CVE-2025-52566: a prompt overwrites the server's memory in the tokenizer",
        "https://nvd.nist.gov/vuln/detail/CVE-2025-52566",
        "2025-06",
    ),
)


class Address(NamedTuple):
    """Where a server of this kind may listen."""

    product: Product
    url: str


USUAL = (
    Address("ollama", "http://127.0.0.1:11434"),
    Address("llama.cpp", "http://127.0.0.1:8080"),
    Address("vllm", "http://127.0.0.1:8000"),
)


@dataclass(frozen=True, slots=True)
class Around:
    """The machine that is looked at."""

    mounts: str | None = None  # as in /proc/self/mountinfo; None: this system does not tell
    memory: str | None = None  # as in /proc/meminfo
    memory_left: int | None = None  # bytes that a container may still take; None: no limit
    path: str | None = None  # where programs are looked for; None: the PATH of this process
    servers: tuple[Address, ...] = USUAL

    @classmethod
    def here(cls) -> Around:
        """This machine."""
        limit, used = (_text(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        left = int(limit) - int(used) if limit and used and limit.strip().isdigit() else None
        return cls(mounts=_text("/proc/self/mountinfo"), memory=_text("/proc/meminfo"), memory_left=left)


async def examine(source: Path, *, now: Seconds, around: Around | None = None) -> list[Finding]:
    """What was found with the configuration in this file, on this machine. A file that cannot be used is a finding, too."""
    around = Around.here() if around is None else around
    found = [*_runtime(), *_extras()]
    config: Config | None = None
    try:
        config = configuration.load(source)
    except ConfigError as error:
        found.append(Finding(subject="configuration", state="problem", message=str(error), fix=error.hint or ""))
    else:
        found += _configuration(config)
        found += _prices(config)
        found += _caps(config, now)
        found += await _store(config, now, around)
    devices = await asyncio.to_thread(_devices, around)
    found += [*_machine(around), *devices.findings]
    found += await asyncio.to_thread(_programs, around)
    found += await _local(config, around, devices.free)
    return found


# --- what is installed ------------------------------------------------------------------------------------------------


def _runtime() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding(subject="python", state="ok", message=f"Python {version} on {platform.system()} {platform.machine()}")
    try:
        check_sqlite(apsw.sqlite_lib_version())
    except StoreError as error:
        yield Finding(subject="sqlite", state="problem", message=str(error), fix=error.hint or "")
    else:
        yield Finding(subject="sqlite", state="ok", message=f"SQLite {apsw.sqlite_lib_version()}")


def _extras() -> Iterator[Finding]:
    """Optional packages: none of them is needed before the configuration asks for it, which then is a problem of its own."""
    needed: dict[str, list[str]] = {}
    told = (
        metadata.requires("apprentice") if _is_installed("apprentice") else None
    )  # None: it runs from a folder of sources
    for requirement in told or []:
        package, marker = re.match(r"[\w.-]+", requirement), re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if package and marker:
            needed.setdefault(marker[1], []).append(package[0])
    for extra, packages in needed.items():
        missing = [name for name in packages if not _is_installed(name)]
        if missing:
            message, fix = f"not installed: {', '.join(missing)}", f"pip install 'apprentice[{extra}]', if you need it"
            yield Finding(subject=f"extra {extra}", state="ok", message=message, fix=fix)
        else:
            yield Finding(subject=f"extra {extra}", state="ok", message="installed")


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


# --- the configuration and its money ----------------------------------------------------------------------------------


def _configuration(config: Config) -> Iterator[Finding]:
    missing = configuration.missing(config)
    for problem in missing:
        yield Finding(subject="configuration", state="problem", message=f"missing: {problem}")
    try:
        configuration.check_learnable(config)
    except ConfigError as error:
        yield Finding(subject="configuration", state="problem", message=str(error), fix=error.hint or "")
    else:
        if not missing:
            tasks = ", ".join(task.name for task in config.tasks)
            yield Finding(subject="configuration", state="ok", message=f"{config.source}: {tasks}")


def _remotes(config: Config) -> list[Remote]:
    return [config.remote, *config.remote.additional_providers]


def _prices(config: Config) -> Iterator[Finding]:
    for remote in [*_remotes(config), *config.teachers]:
        subject = f"price of {remote.provider}/{remote.model}"
        try:
            price = price_of(remote)
        except PriceUnknown as error:
            yield Finding(subject=subject, state="problem", message=str(error), fix=error.hint or "")
        else:
            said = f"at most ${price.input} for a million tokens of input, ${price.output} of output"
            where = "price table" if remote.price is None else "configuration"
            yield Finding(subject=subject, state="ok", message=f"{said} ({where})")


def _caps(config: Config, now: Seconds) -> Iterator[Finding]:
    """Whether each cap has room for a call at all: the shortest request of a task, at its worst case."""
    priced = []
    for remote in _remotes(config):
        with contextlib.suppress(PriceUnknown):  # said already
            priced.append((remote, price_of(remote)))
    if not priced:
        return
    zone = ZoneInfo(config.budget.timezone)
    for task in config.tasks:
        own = task.budget.limits if task.budget is not None else {}
        caps = budget.caps(task.name, now, zone, overall=config.budget.limits, own=own)
        size = _shortest(task)
        worsts = [budget.worst_case(price, size, remote.max_tokens) for remote, price in priced]
        subject = f"caps of {task.name}"
        if not caps:
            message = "no cap is set: nothing bounds what is spent"
            yield Finding(subject=subject, state="warning", message=message, fix="set `budget: {daily: …}`")
        for cap in caps:
            limit, least = f"{cap.window}: ${cap.limit / 1e6:.6f}", f"${min(worsts) / 1e6:.6f}"
            if cap.limit < min(worsts):
                message = f"{limit} is less than one call can cost, {least} and more: the remote is never asked"
                fix = "raise the cap, or lower `max_tokens`"
                yield Finding(subject=subject, state="problem", message=message, fix=fix)
            elif cap.limit < worsts[0]:
                message = (
                    f"{limit} has no room for the first remote, whose call can cost ${worsts[0] / 1e6:.6f} and more"
                )
                yield Finding(
                    subject=subject, state="warning", message=message, fix="raise the cap, or lower `max_tokens`"
                )
            else:
                message = f"{limit} has room for {cap.limit // worsts[0]:,} calls at once at their worst case, or fewer"
                yield Finding(subject=subject, state="ok", message=message)


def _shortest(task: TaskConfig) -> int:
    """Bytes that every request of the task has, whatever its input."""
    said = [task.description, task.instructions, *(json.dumps(example) for example in task.examples)]
    return sum(len(text.encode()) for text in said)


# --- the store --------------------------------------------------------------------------------------------------------


async def _store(config: Config, now: Seconds, around: Around) -> list[Finding]:
    if config.store.backend != "sqlite":
        message = f"{config.store.backend}: only a store of the backend sqlite is looked at"
        return [Finding(subject="store", state="ok", message=message)]
    path = config.store.path.absolute()
    found = [*_place(path, around.mounts), *_access(path)]
    if not path.exists():
        return [
            *found,
            Finding(subject="store", state="ok", message=f"{path}: not there yet, the first request makes it"),
        ]
    file = await asyncio.to_thread(inside, path)
    found += file
    if all(finding.state != "problem" for finding in file):
        found += await _books(config, path, now)
    return found


def _place(path: Path, mounts: str | None) -> Iterator[Finding]:
    """The disk under the store, or under where it will be."""
    folder = next(parent for parent in path.parents if parent.exists())
    kind = None if mounts is None else file_system(folder.resolve(), mounts)
    subject = "store's file system"
    if kind is None:
        yield Finding(subject=subject, state="ok", message="not checked: this system does not list its mounts")
    elif kind in _NETWORK:
        message = f"{folder} is on {kind}, a network share: its locks cannot be trusted with a database"
        yield Finding(
            subject=subject, state="problem", message=message, fix="name a path on a local disk: `store.path`"
        )
    elif kind in _PASSING:
        message = (
            f"{folder} is on {kind}, {_PASSING[kind]}: what is recorded and spent may be forgotten at the next start"
        )
        yield Finding(
            subject=subject, state="warning", message=message, fix="name a path on a disk that stays: `store.path`"
        )
    else:
        yield Finding(subject=subject, state="ok", message=f"{folder} is on {kind}")
    free = shutil.disk_usage(folder).free
    state: State = "problem" if free < _NO_SPACE else "warning" if free < _LITTLE_SPACE else "ok"
    fix = "" if state == "ok" else "make room: a full disk fails requests before they cost anything"
    yield Finding(subject="disk", state=state, message=f"{_bytes(free)} free under {folder}", fix=fix)


def file_system(path: Path, mounts: str) -> str | None:
    """The kind of file system that a path is on, by the text of /proc/self/mountinfo; None where it does not say.

    >>> file_system(Path("/data/a.db"), "36 35 98:0 / / rw - ext4 /dev/a rw\\n37 36 0:9 / /data rw shared:1 - nfs4 host:/x rw")
    'nfs4'
    """
    best: tuple[int, str] | None = None
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.partition(" ")[0]
        if len(fields) < 5 or not kind:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if path.is_relative_to(point) and (best is None or len(Path(point).parts) >= best[0]):
            best = len(Path(point).parts), kind  # of two at one place, the later one covers the earlier
    return None if best is None else best[1]


def _access(path: Path) -> Iterator[Finding]:
    """Who may read and write the store, and whether locks work beside it."""
    folder = path.parent
    for some in [path, *(Path(f"{path}{ending}") for ending in ("-wal", "-shm", "-lock"))]:
        if some.exists() and (mode := stat.S_IMODE(some.stat().st_mode)) & 0o077:
            message = f"{some} has mode {mode:04o}: others on this machine may read what was asked and answered"
            yield Finding(subject="permissions", state="problem", message=message, fix=f"chmod 600 {some}")
    if not folder.exists():
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o022:
        message = f"{folder} has mode {mode:04o}: others may replace the store"
        yield Finding(subject="permissions", state="problem", message=message, fix=f"chmod 700 {folder}")
    elif mode & 0o055:
        message = f"{folder} has mode {mode:04o}: others see that there is a store, and cannot read it"
        yield Finding(subject="permissions", state="ok", message=message, fix=f"chmod 700 {folder}, if they should not")
    if not (os.access(folder, os.W_OK | os.X_OK) and (not path.exists() or os.access(path, os.R_OK | os.W_OK))):
        message = f"this user may not write {path} and beside it"
        yield Finding(subject="permissions", state="problem", message=message, fix="run as the owner of the folder")
        return
    yield _locks(folder)


def _locks(folder: Path) -> Finding:
    """Whether a lock keeps others out. The store's own files are not touched: closing one drops the locks on it."""
    fix = "name a path on a local disk: `store.path`"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file, Path(file.name).open("rb") as other:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Finding(subject="locks", state="ok", message=f"locks work in {folder}")
    except OSError as error:
        return Finding(subject="locks", state="problem", message=f"no lock can be had in {folder}: {error}", fix=fix)
    message = f"two could have the same lock in {folder}: two processes would damage the store"
    return Finding(subject="locks", state="problem", message=message, fix=fix)


def inside(path: Path) -> list[Finding]:
    """The file itself: whose it is, its schema, each of its pages, each amount of money."""
    restore = "keep the damaged file, and restore a backup made with the backup API"
    try:
        with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
            connection.set_busy_timeout(5000)
            connection.pragma("cell_size_check", True)
            version = int(connection.pragma("user_version"))
            if connection.pragma("application_id") != APPLICATION_ID:
                message, fix = f"{path} is the database of another program, or empty", "name another file: `store.path`"
                return [Finding(subject="store", state="problem", message=message, fix=fix)]
            if version > len(MIGRATIONS):
                message = f"{path} has schema {version}, this apprentice knows {len(MIGRATIONS)}: it will not open it"
                return [Finding(subject="store", state="problem", message=message, fix="upgrade apprentice")]
            wrong = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(5)") if row[0] != "ok"]
            wrong = wrong or _altered(connection, version) or _unbalanced(connection)
    except apsw.BusyError:
        message, fix = f"{path}: another process held it for 5 seconds", "look which one: `lsof`"
        return [Finding(subject="store", state="warning", message=message, fix=fix)]
    except apsw.Error as error:
        wrong = [str(error)]
    if wrong:
        message = f"{path} is damaged: {'; '.join(wrong)}"
        return [Finding(subject="store", state="problem", message=message, fix=restore)]
    later = "" if version == len(MIGRATIONS) else f" of {len(MIGRATIONS)}, brought up to date when it is opened next"
    message = f"{path}: whole, {_bytes(path.stat().st_size)}, schema {version}{later}; the ledger adds up"
    return [Finding(subject="store", state="ok", message=message), *_log(path)]


def _altered(connection: apsw.Connection, version: int) -> list[str]:
    """What of our schema is missing or not as we made it: SQLite checks no schema of a file opened for reading only."""
    with contextlib.closing(apsw.Connection(":memory:")) as ours:
        migrate(ours, MIGRATIONS[:version])
        altered = _schema(ours) - _schema(connection)
    return [f"the schema of {name.decode()!r} is not as it was made" for name, _ in sorted(altered)]


def _schema(connection: apsw.Connection) -> set[tuple[bytes, bytes]]:
    """The statement that makes each table, index and trigger; versions of SQLite write an altered one with other spaces."""
    made = connection.execute("SELECT CAST(name AS BLOB), CAST(sql AS BLOB) FROM sqlite_schema WHERE sql IS NOT NULL")
    return {(name, b" ".join(sql.split())) for name, sql in made}


def _unbalanced(connection: apsw.Connection) -> list[str]:
    """What is wrong in the ledger: a row whose checksum does not fit, or a window that is not the sum of its attempts."""
    sums: dict[str, Amount] = {}
    try:
        for row in connection.execute(f"SELECT {LEDGER_COLUMNS} FROM ledger"):  # noqa: S608  (our own column names)
            entry = read_entry(row)
            for window in dict.fromkeys(entry.hold.windows):
                amount = sums.setdefault(window, Amount())
                if entry.state == "held":
                    amount.held += entry.hold.worst
                else:
                    amount.spent += entry.cost
        booked = dict(read_amount(*row) for row in connection.execute("SELECT key, spent, held, seal FROM windows"))
    except (ApprenticeError, ValueError, TypeError) as error:
        return [str(error)]
    rows = booked.pop("", Amount()).spent  # the row that counts the others
    wrong = [name for name in sums.keys() | booked.keys() if sums.get(name, Amount()) != booked.get(name)]
    return (
        [f"what was spent in {', '.join(sorted(wrong)[:3])} is not the sum of its attempts"]
        if wrong
        else ([f"the ledger has {len(booked)} windows, and should have {rows}"] if len(booked) != rows else [])
    )


def _log(path: Path) -> Iterator[Finding]:
    log = Path(f"{path}-wal")
    size = log.stat().st_size if log.exists() else 0
    if size > _LARGE_LOG:
        message = f"{log} has {_bytes(size)}: somebody reads for so long that it cannot be written back"
        yield Finding(subject="write-ahead log", state="warning", message=message, fix="end what holds it open: `lsof`")


async def _books(config: Config, path: Path, now: Seconds) -> list[Finding]:
    """What the store says of money that hangs, of the clock, and of models that broke their word."""
    try:
        store: Store = plugins.build("stores", "sqlite", path=path)
        try:
            lost = [hold for hold in await store.holds(lost_before(config, now)) if hold.purpose not in LONG_HOLDS]
            days = [line.day for line in await store.spending(since=now - 2 * 86_400) if line.day]
            suspended = await suspended_models(store)
        finally:
            await store.close()
    except StoreError as error:
        return [Finding(subject="store", state="problem", message=str(error), fix=error.hint or "")]
    found = []
    if lost:
        held = sum(hold.worst for hold in lost)
        message = f"{len(lost)} calls of processes that died hold ${held / 1e6:.6f}; it counts as spent from the next start on"
        found.append(Finding(subject="holds", state="warning", message=message))
    today = datetime.fromtimestamp(now, ZoneInfo(config.budget.timezone)).date().isoformat()
    if days and max(days) > today:
        message = (
            f"the ledger has the day {max(days)}, and this clock says {today}: caps count for the later one until then"
        )
        found.append(Finding(subject="clock", state="problem", message=message, fix="set the clock of this machine"))
    else:
        found.append(Finding(subject="clock", state="ok", message=f"{today} in {config.budget.timezone}"))
    for model in suspended:
        message = f"{model} is not asked any more: it billed more than a call could cost"
        fix = f"correct `price` or `max_tokens`, then: apprentice resume {model}"
        found.append(Finding(subject="models", state="problem", message=message, fix=fix))
    return found


# --- the machine ------------------------------------------------------------------------------------------------------


def available(memory: str | None, left: int | None = None) -> int | None:
    """Bytes that a new program may take, by the text of /proc/meminfo and what the container leaves; None: nobody says.

    >>> available("MemTotal: 100 kB\\nMemAvailable:    64 kB\\n", 1000)
    1000
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", memory or "", re.MULTILINE)
    limits = [int(found[1]) * 1024] if found else []
    return min([*limits, *([max(0, left)] if left is not None else [])], default=None)


def _machine(around: Around) -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(subject="cpu", state="ok", message=f"{usable} CPU{'s' if usable > 1 else ''} may be used")
    free = available(around.memory, around.memory_left)
    message = "not known on this system" if free is None else f"{_bytes(free)} available"
    yield Finding(subject="memory", state="ok", message=message)


@dataclass(slots=True)
class _Devices:
    findings: list[Finding] = field(default_factory=list)
    free: int = 0  # bytes of the memory of all of them


def _devices(around: Around) -> _Devices:
    program = shutil.which("nvidia-smi", path=around.path)
    if program is None:
        return _Devices([Finding(subject="gpu", state="ok", message="none (nvidia-smi is not on the PATH)")])
    said = _said(program, "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")
    found = _Devices()
    for line in (said or "").splitlines():
        name, *rest = (part.strip() for part in line.split(","))
        if len(rest) == 3 and rest[1].isdigit():
            free = int(rest[1]) * 2**20
            found.free += free
            message = f"{name}: {_bytes(free)} of {rest[0]} MiB free, driver {rest[2]}"
            found.findings.append(Finding(subject="gpu", state="ok", message=message))
    if not found.findings:
        message, fix = f"{program} names no GPU: {(said or 'it did not answer').strip()}", "look at the driver"
        found.findings.append(Finding(subject="gpu", state="warning", message=message, fix=fix))
    return found


def _said(program: str, *arguments: str) -> str | None:
    """What the program printed; None if it failed, or took too long."""
    try:
        ran = subprocess.run(  # noqa: S603  (found on the PATH under a fixed name, with fixed arguments)
            [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (ran.stdout + ran.stderr).decode(errors="replace") if ran.returncode == 0 else None


# --- local servers ----------------------------------------------------------------------------------------------------


def version_of(product: Product, text: str) -> tuple[int, ...] | None:
    """The version in what a server or its program says; llama.cpp counts builds.

    >>> version_of("ollama", "ollama version is 0.17.1"), version_of("llama.cpp", "version: 8941 (c78fb90)")
    ((0, 17, 1), (8941,))
    """
    pattern = r"(?:\bb|version:\s*)(\d+)\b" if product == "llama.cpp" else r"\b(\d+(?:\.\d+)+)"
    found = re.search(pattern, text)
    return None if found is None else tuple(int(part) for part in found[1].split("."))


def advised(product: Product, version: tuple[int, ...]) -> list[Advisory]:
    """The known faults of this version."""
    return [one for one in ADVISORIES if one.product == product and one.first <= version < one.fixed]


def _judged(subject: str, product: Product, said: str, message: str) -> Iterator[Finding]:
    version = version_of(product, said)
    if version is None:
        yield Finding(subject=subject, state="ok", message=f"{message}, its version is not known")
        return
    name = f"b{version[0]}" if product == "llama.cpp" else ".".join(map(str, version))
    faults = advised(product, version)
    if not faults:
        yield Finding(subject=subject, state="ok", message=f"{message}, version {name}")
    for fault in faults:
        fixed = f"b{fault.fixed[0]}" if product == "llama.cpp" else ".".join(map(str, fault.fixed))
        about = f"{fault.about} ({fault.published}, {fault.source})"
        yield Finding(
            subject=subject,
            state="warning",
            message=f"{message}, version {name}: {about}",
            fix=f"upgrade to {fixed} or later",
        )


def _programs(around: Around) -> list[Finding]:
    found: list[Finding] = []
    for name, product in _PROGRAMS.items():
        if (program := shutil.which(name, path=around.path)) is not None:
            found += _judged(f"program {name}", product, _said(program, "--version") or "", program)
    return found


class _Running(NamedTuple):
    address: Address
    said: str  # its version, as it says it
    models: list[tuple[str, int | None]]  # names, and bytes of their files


async def _local(config: Config | None, around: Around, devices: int) -> list[Finding]:
    """The servers that run, and whether the models that are configured, or that they have, fit into the memory."""
    client = wire.client(allow_internal=True)
    try:
        looked = await asyncio.gather(*(_ask(client, address) for address in around.servers))
    finally:
        await client.close()
    running = [server for server in looked if server is not None]
    found: list[Finding] = []
    for server in running:
        subject, where = f"server {server.address.product}", server.address.url
        found += _judged(subject, server.address.product, server.said, f"runs at {where}")
    if not running:
        ports = ", ".join(address.url for address in around.servers)
        found.append(Finding(subject="local servers", state="ok", message=f"none at {ports}"))
    memory = available(around.memory, around.memory_left)
    room = None if memory is None else max(memory, devices)
    known = {name: size for server in running for name, size in server.models}
    wanted = dict(_configured(config)) if config is not None else {}
    for name, size in (known | {name: known.get(name, size) for name, size in wanted.items()}).items():
        found.append(_fit(name, size, room, wanted=name in wanted))
    return found


def _configured(config: Config) -> Iterator[tuple[str, int | None]]:
    """The local models of the configuration that a server or a library runs, with the bytes of their files."""
    for local in [config.local, *(task.local for task in config.tasks if task.local is not None)]:
        if local.backend != "embedded" and local.base_model is not None:
            file = _file(local)
            yield local.base_model, None if file is None else file.stat().st_size


def _file(local: Local) -> Path | None:
    texts = [local.base_model, *local.settings.values()]
    return next(
        (Path(text) for text in texts if isinstance(text, str) and text.endswith(".gguf") and Path(text).is_file()),
        None,
    )


def _fit(name: str, size: int | None, room: int | None, *, wanted: bool) -> Finding:
    subject = f"model {name}"
    need = needs(name, file_bytes=size)
    if need is None:
        return Finding(subject=subject, state="ok", message="how much memory it needs cannot be told from its name")
    if room is None:
        return Finding(subject=subject, state="ok", message=f"needs about {_bytes(need)}")
    message = f"needs about {_bytes(need)}, you have {_bytes(room)}"
    if need <= room:
        return Finding(subject=subject, state="ok", message=f"fits: {message}")
    fix = "take a smaller model, or a stronger quantization"
    return Finding(subject=subject, state="problem" if wanted else "ok", message=f"{message}: it does not fit", fix=fix)


# Bits a weight, by what its name or file says. The k-quantizations as measured on an 8B model:
# https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md
_BITS = {
    "q2": 3.2, "q3": 4.0, "q4": 4.9, "q5": 5.8, "q6": 6.6, "q8": 8.5, "int4": 4.5, "awq": 4.5, "gptq": 4.5, "fp8": 8.5,
    "int8": 8.5, "f16": 16.0, "fp16": 16.0, "bf16": 16.0, "f32": 32.0,
}  # fmt: skip
_USUAL_BITS = 4.9  # Q4_K_M, which Ollama gives where a name says nothing
_CONTEXT = 4096  # tokens
_CACHE = 48 * 1024  # bytes of keys and values a token, for 10^9 weights, in 16 bits; it grows with their square root
_RUNTIME = 512 * 2**20  # what a server takes beside weights and cache


def needs(name: str, *, file_bytes: int | None = None, context: int = _CONTEXT) -> int | None:
    """Bytes of memory that a model takes while it serves, roughly; None where its name does not say how large it is.

    Weights (those of the file, else parameters times bits), keys and values of one context, and half a GiB.

    >>> round(needs("llama3.1:8b") / 1e9, 1), needs("mystery")
    (6.0, None)
    """
    billions = _billions(name)
    if billions is None and file_bytes is None:
        return None
    lowered = name.lower()
    bits = next(
        (value for word, value in _BITS.items() if re.search(rf"(?<![a-z0-9]){word}(?![0-9])", lowered)), _USUAL_BITS
    )
    weights = file_bytes if file_bytes is not None else math.ceil((billions or 0.0) * 1e9 * bits / 8)
    size = billions if billions is not None else weights * 8 / bits / 1e9
    return weights + math.ceil(context * _CACHE * math.sqrt(size)) + _RUNTIME


def _billions(name: str) -> float | None:
    """Parameters in 10^9, as names say them: 8b, 0.5b, 135m, 8x7b."""
    found = re.search(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    if found is None:
        return None
    return int(found[1] or 1) * float(found[2]) * (1.0 if found[3] == "b" else 0.001)


async def _ask(client: wire.Client, address: Address) -> _Running | None:
    """The server at that address, if one of this kind answers there."""

    async def get(path: str) -> dict[str, Json]:
        outcome = await wire.send(client, wire.Request(f"{address.url}{path}", {}, b"", _ANSWER, method="GET"))
        return outcome.body if outcome.kind == "answered" and isinstance(outcome.body, dict) else {}

    match address.product:
        case "ollama":
            version, tags = (await get("/api/version")).get("version"), await get("/api/tags")
            models = tags.get("models")
            listed = [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []
            sizes = [(str(one.get("name")), _count(one.get("size"))) for one in listed]
            return _Running(address, version, sizes) if isinstance(version, str) else None
        case "llama.cpp":
            if "status" not in await get("/health"):
                return None
            props = await get("/props")
            name = props.get("model_path")
            path = name if isinstance(name, str) else ""
            return _Running(address, str(props.get("build_info", "")), [(Path(path).name, None)] if path else [])
        case "vllm":
            version = (await get("/version")).get("version")
            return _Running(address, version, []) if isinstance(version, str) else None


def _count(value: Json) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _bytes(count: int) -> str:
    """As people say it, in decimal units like the file sizes of models.

    >>> _bytes(6_200_000_000), _bytes(900)
    ('6.2 GB', '900 bytes')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def worst(found: list[Finding]) -> State:
    """The gravest state among the findings."""
    order: tuple[State, ...] = ("problem", "warning")
    return next((state for state in order if any(one.state == state for one in found)), "ok")
