"""A server process that we own: it starts, says when it is ready, keeps its log small, and never outlives us.

Between us and the command stands a supervisor, this very file run as a script. It holds one end of a pipe; when the
other end closes, because we stopped the command or because we died (kill -9 included), it ends the command's whole
process group: SIGTERM, and after a grace SIGKILL. On Linux the command also dies with a supervisor that is killed. The
file imports nothing but the standard library, so that a supervisor starts in a moment and stays small. POSIX only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LOG_CAP = 4 * 2**20  # bytes of a log and its predecessor together
_EVERY = 0.05  # seconds between two looks at a process
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl(2)


class Died(OSError):
    """The command could not be started, ended, or was not ready in time; the message has the last lines of its log."""


class Progress(NamedTuple):
    """How far a start has come: seconds since it, bytes of memory in use (0 where unknown), the last line of the log."""

    seconds: float
    memory: int
    line: str


class Process:
    """A command that runs until it ends, is stopped, or this process is gone. Made by `start`."""

    def __init__(self, name: str, supervisor: subprocess.Popen[bytes], pid: int, log: Path) -> None:
        self.pid = pid  # also the id of its process group
        self.log = log
        self._name = name
        self._supervisor = supervisor
        self._began = time.monotonic()

    @property
    def alive(self) -> bool:
        return self._supervisor.poll() is None

    async def wait(self) -> Died:
        """Why it ended, once it has."""
        status = await self._end()
        by: int = -status if status < 0 else status - 128  # below 0: the supervisor itself was killed
        how = f"was ended by {signal.Signals(by).name}" if by in set(signal.Signals) else f"ended with status {status}"
        return self._died(how)

    async def ready(
        self,
        check: Callable[[], Awaitable[bool]],
        *,
        timeout: float,
        tell: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        """Return once `check` says True; it is asked again and again, and `tell` is told how far the start has come.

        Raises Died when the command ends first, or is not ready within `timeout` seconds, in which case it is stopped.
        """
        try:
            async with asyncio.timeout(timeout):
                while self.alive and not await check():
                    tell(Progress(time.monotonic() - self._began, memory(self.pid), self.tail(1)))
                    await asyncio.sleep(_EVERY)
        except TimeoutError:
            await self.stop()
            raise self._died(f"was not ready within {timeout:g} s") from None
        if not self.alive:
            raise await self.wait()

    async def stop(self) -> None:
        """End it and everything it started in its group; returns when they are gone. It can be called twice."""
        self._let_go()
        await self._end()

    async def _end(self) -> int:
        while (status := self._supervisor.poll()) is None:  # noqa: ASYNC110 - no event tells it on every system
            await asyncio.sleep(_EVERY)
        self._let_go()
        return status

    def _let_go(self) -> None:
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()

    def tail(self, lines: int = 8) -> str:
        """The last lines of its log that say something, at most 300 characters of each."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 16_384))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:  # nothing was written, or a full log is just being replaced
            return ""
        said = [line.strip()[:300] for line in text.splitlines() if line.strip()]
        return "\n".join(said[-lines:])

    def _died(self, how: str) -> Died:
        tail = self.tail()
        return Died(f"{self._name} {how}" + (f"; its log {self.log} ends:\n{tail}" if tail else ""))


async def start(
    argv: Sequence[str], *, log: Path, env: Mapping[str, str], name: str = "", cap: int = LOG_CAP, grace: float = 5.0
) -> Process:
    """The running command. `env` is its whole environment; what it writes goes to `log`, never more than `cap` bytes.

    A log that is half of `cap` long becomes LOG.old, whose content is forgotten. `grace`: seconds between SIGTERM and
    SIGKILL. Raises Died when there is no such command.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    order = json.dumps({"argv": list(argv), "env": dict(env), "log": str(log), "cap": cap, "grace": grace})
    name = name or Path(argv[0]).name
    # -I -S: no packages, nothing from the environment. Its own session: Ctrl-C at a terminal reaches only us.
    # Not asyncio's subprocess: that kills what was forgotten, and a supervisor that is killed cannot end anything.
    supervisor = subprocess.Popen(  # noqa: ASYNC220, S603 - returns at once; the command is the operator's
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment({}),
        start_new_session=True,
    )
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    try:
        supervisor.stdin.write(order.encode() + b"\n")
        supervisor.stdin.flush()
        with supervisor.stdout as told:
            line = await asyncio.to_thread(told.readline)
        began = json.loads(line or b'{"problem": "its supervisor ended"}')
    except BaseException:
        supervisor.stdin.close()
        await asyncio.shield(asyncio.to_thread(supervisor.wait))
        raise
    if "problem" in began:
        supervisor.stdin.close()
        supervisor.wait()  # it said so with its last breath
        raise Died(f"{name} cannot be started: {began['problem']}")
    return Process(name, supervisor, began["pid"], log)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """What a server of ours may know of our environment: paths and language, never a key; and `more`."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | dict(more)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens at right now. Who is slower than another user of it fails to start, and tries again."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def memory(pid: int) -> int:
    """Bytes of memory that a process holds, 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def group_memory(group: int) -> int:
    """Bytes of memory that all processes of a group hold, what they share counted once; 0 where the system does not say.

    A server may be several processes, of which the first is the smallest. Source: proc_pid_smaps(5), Pss.
    """
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                found += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, ValueError, IndexError):  # it ended meanwhile
            continue
    return found


class Running(NamedTuple):
    """A command of ours that runs now, whichever process of this user started it. `memory` in bytes."""

    pid: int
    argv: tuple[str, ...]
    memory: int


def running() -> list[Running]:
    """The commands that supervisors of this installation look after; none where the system does not say (only Linux does)."""
    parents: dict[int, int] = {}
    said: dict[int, tuple[str, ...]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            said[int(folder.name)] = tuple((folder / "cmdline").read_text("utf-8", "replace").rstrip("\0").split("\0"))
        except (OSError, ValueError, IndexError):  # it ended meanwhile, or is none of our business
            continue
    ours = {pid for pid, argv in said.items() if argv[1:] == ("-I", "-S", __file__)}
    return [Running(pid, said[pid], group_memory(pid)) for pid in sorted(said) if parents[pid] in ours]


def available_memory() -> int | None:
    """Bytes that a new process can have without swapping; None where the system does not say (only Linux does)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


# --- the supervisor ---------------------------------------------------------------------------------------------------


class _Log:
    """A file that never grows beyond half of `cap`; then it becomes the old one."""

    def __init__(self, path: Path, cap: int) -> None:
        self._path = path
        self._half = max(1, cap // 2)
        self._file = path.open("ab")

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the server; its words are lost
            while data:
                if (room := self._half - self._file.tell()) <= 0:
                    self._file.close()
                    self._path.replace(f"{self._path}.old")
                    self._file = self._path.open("ab")
                    continue
                self._file.write(data[:room])
                self._file.flush()
                data = data[room:]


def _supervise() -> int:
    """Run the command of the order on stdin until it ends, or until stdin does. Returns its status as a shell has it."""
    order = json.loads(_line(0))
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)
    ended: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: ended.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        log = _Log(Path(order["log"]), order["cap"])
        child = subprocess.Popen(  # noqa: S603 - the command is the operator's
            order["argv"],
            env=order["env"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent  # noqa: PLW1509 - there are no threads here
            if sys.platform == "linux"
            else None,
        )
    except OSError as error:
        _say({"problem": f"{error.strerror or error}: {error.filename or order['argv'][0]}"})
        return 127
    _say({"pid": child.pid})
    assert child.stdout is not None
    out = child.stdout.fileno()
    os.set_blocking(out, False)
    with selectors.DefaultSelector() as seen:
        for source in (0, out, wake):
            seen.register(source, selectors.EVENT_READ)
        deadline: float | None = None
        while child.poll() is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            for key, _ in seen.select(left):
                data = os.read(key.fd, 2**16)
                if key.fd == out:
                    log.write(data)
                if not data:
                    seen.unregister(key.fd)
                    if key.fd == 0:
                        ended.append(0)
            if deadline is not None and time.monotonic() >= deadline:
                _signal_group(child.pid, signal.SIGKILL)
                deadline = time.monotonic() + 1
            elif ended and deadline is None:
                _signal_group(child.pid, signal.SIGTERM)
                deadline = time.monotonic() + order["grace"]
    _signal_group(child.pid, signal.SIGKILL)  # what it started and left behind
    with contextlib.suppress(BlockingIOError):
        while data := os.read(out, 2**16):
            log.write(data)
    status = child.returncode
    return 128 - status if status < 0 else status


def _line(descriptor: int) -> bytes:
    found = b""
    while not found.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        found += byte
    return found


def _say(value: dict[str, object]) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_supervise())
