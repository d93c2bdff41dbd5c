"""A server that we own is started, watched and ended with everything it started, whoever dies first."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from apprentice import process
from apprentice.process import Died, Progress

PYTHON = sys.executable
ENV = process.environment({})


async def never() -> bool:
    return False


async def always() -> bool:
    return True


def script(code: str) -> list[str]:
    return [PYTHON, "-u", "-c", code]


def said(path: Path, text: str) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return path.exists() and text in path.read_text()

    return check


def runs(pid: int) -> bool:
    """Whether the process is there; one that nobody has waited for yet is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


async def test_a_command_runs_until_it_is_stopped(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a.log"
    running = await process.start(script("print('up'); import time; time.sleep(600)"), log=log, env=ENV)
    await running.ready(said(log, "up"), timeout=20)
    assert runs(running.pid)
    assert running.tail() == "up"
    await running.stop()
    await running.stop()
    assert not running.alive
    assert not runs(running.pid)


async def test_the_environment_has_paths_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-CANARY-4711")
    code = "import os, sys; print(sorted(os.environ)); sys.exit('CANARY' in str(os.environ))"
    running = await process.start(script(code), log=tmp_path / "log", env=process.environment({"MINE": "1"}))
    assert "status 0" in str(await running.wait())
    assert "MINE" in running.tail()
    assert "PATH" in running.tail()
    assert "OPENAI" not in running.tail()


async def test_a_command_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(Died, match="cannot be started: No such file"):
        await process.start([str(tmp_path / "nothing")], log=tmp_path / "log", env=ENV)


async def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(Died, match="cannot be started: Is a directory"):
        await process.start(script("pass"), log=tmp_path / "log", env=ENV)


async def test_a_command_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    running = await process.start(script("print('no such model'); raise SystemExit(3)"), log=tmp_path / "log", env=ENV)
    with pytest.raises(Died, match=r"(?s)ended with status 3.*no such model"):
        await running.ready(never, timeout=60)


async def test_a_command_that_was_killed_is_told_by_the_signals_name(tmp_path: Path) -> None:  # F77
    running = await process.start(script("import time; time.sleep(600)"), log=tmp_path / "log", env=ENV)
    os.kill(running.pid, signal.SIGKILL)
    assert "SIGKILL" in str(await running.wait())
    with pytest.raises(Died, match="SIGKILL"):
        await running.ready(never, timeout=60)


async def test_a_command_that_never_gets_ready_is_stopped(tmp_path: Path) -> None:
    seen: list[Progress] = []
    code = "print('loading 40 %'); import time; time.sleep(600)"
    running = await process.start(script(code), log=tmp_path / "log", env=ENV)
    with pytest.raises(Died, match=r"(?s)was not ready within 2 s.*loading 40 %"):
        await running.ready(never, timeout=2, tell=seen.append)
    assert not runs(running.pid)
    assert seen[-1].line == "loading 40 %"
    assert seen[-1].seconds > 0
    assert seen[-1].memory > 0


async def test_a_check_that_hangs_is_cut_off_too(tmp_path: Path) -> None:
    async def hangs() -> bool:
        await asyncio.Event().wait()
        return True

    running = await process.start(script("import time; time.sleep(600)"), log=tmp_path / "log", env=ENV)
    with pytest.raises(Died, match="not ready"):
        await running.ready(hangs, timeout=0.2)


async def test_a_command_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:  # F77
    log = tmp_path / "log"
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(600)"
    running = await process.start(script(code), log=log, env=ENV, grace=0.2)
    await running.ready(said(log, "deaf"), timeout=20)
    await running.stop()
    assert not runs(running.pid)
    assert "SIGKILL" in str(await running.wait())


async def test_a_command_may_end_in_order_within_its_grace(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('x' * 300_000), print('bye'), sys.exit(0)))\n"
        "print('up'); time.sleep(600)"
    )
    running = await process.start(script(code), log=log, env=ENV, grace=60)
    await running.ready(said(log, "up"), timeout=20)
    await running.stop()
    assert running.tail(1) == "bye"
    assert "status 0" in str(await running.wait())


async def test_what_the_command_started_goes_with_it(tmp_path: Path) -> None:  # F77
    log = tmp_path / "log"
    code = (
        "import subprocess, sys, time\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(inner.pid); time.sleep(float(sys.argv[1]))"
    )
    left: list[int] = []
    for seconds in ("600", "0"):  # it is stopped; it ends by itself
        running = await process.start([*script(code), seconds], log=log, env=ENV)
        await running.ready(said(log, "\n"), timeout=20)
        await (running.stop() if seconds == "600" else running.wait())
        left.append(int(running.tail(1)))
    until(lambda: not any(map(runs, left)))


async def test_a_huge_log_stays_within_its_cap_and_keeps_its_end(tmp_path: Path) -> None:  # F77
    log = tmp_path / "log"
    code = "import sys\nfor i in range(40_000): print('line', i, 'x' * 80)\nprint('the end')"
    running = await process.start(script(code), log=log, env=ENV, cap=100_000)
    await running.wait()
    assert running.tail(1) == "the end"
    assert log.stat().st_size <= 50_000
    assert Path(f"{log}.old").stat().st_size == 50_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.old"]


OWNER = """
import asyncio, os, sys
from pathlib import Path
from apprentice import process

async def main():
    log = Path(sys.argv[1])
    running = await process.start([sys.executable, "-c", "import time; time.sleep(600)"], log=log, env=os.environ)
    print(running.pid, running._supervisor.pid, flush=True)
    if sys.argv[2] == "ends":
        return
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_no_child_outlives_its_owner(tmp_path: Path, how: str) -> None:  # F77
    """Whether the owner is killed with a signal that nobody can catch, or ends and forgets."""
    command = [PYTHON, "-W", "ignore", "-c", OWNER, str(tmp_path / "log"), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        child, supervisor = map(int, owner.stdout.readline().split())
        if how == "killed":
            assert runs(child)
            owner.kill()
        owner.wait()
    until(lambda: not runs(child) and not runs(supervisor))


async def test_a_supervisor_that_is_killed_takes_the_command_with_it(tmp_path: Path) -> None:
    running = await process.start(script("import time; time.sleep(600)"), log=tmp_path / "log", env=ENV)
    os.kill(running._supervisor.pid, signal.SIGKILL)
    until(lambda: not runs(running.pid))
    assert "SIGKILL" in str(await running.wait())


async def test_a_cancelled_start_leaves_nothing_behind(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    starting = asyncio.ensure_future(
        process.start([*script("import time; time.sleep(600)"), mark], log=tmp_path / "log", env=ENV)
    )
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting

    def left() -> list[Path]:
        return [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark in _read(path)]

    until(lambda: not left())


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_a_free_port_can_be_listened_at() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", process.free_port()))


def test_memory_is_told_where_the_system_tells_it() -> None:
    assert process.memory(os.getpid()) > 10**6
    assert process.memory(2**30) == 0
    available = process.available_memory()
    assert available is not None
    assert available > 10**6


async def test_the_memory_of_a_server_is_that_of_all_its_processes(tmp_path: Path) -> None:
    hold = "x = bytearray(40_000_000); x[::4096] = b'x' * len(x[::4096]); print('up', flush=True); import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}"
    running = await process.start(script(code), log=tmp_path / "log", env=ENV)

    async def both() -> bool:
        return (tmp_path / "log").exists() and (tmp_path / "log").read_text().count("up") == 2

    await running.ready(both, timeout=20)
    try:
        assert process.memory(running.pid) < 80_000_000 < process.group_memory(running.pid)
    finally:
        await running.stop()
    assert process.group_memory(running.pid) == 0
