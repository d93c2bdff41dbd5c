"""How fast is the way back, and what does kill -9 leave of a teaching cycle?

    python -m benches.versions [--quick] [--json]

Rollback: an engine answers requests without a pause from an embedded student; meanwhile `lineage.rollback`, which is what
the command does, is called through a connection of its own to one of the versions kept, each in its turn. Measured from
that call until the first request that this version served alone. The command as a process of its own is measured beside
it: most of that is Python starting.

Kills: `apprentice learn` teaches the embedded student in a process that is killed (SIGKILL) at a random moment; then the
worker's cycle is run as it would run later, with the clock ahead by the time of a lease, since a dead owner keeps it until
then. Whenever it was killed, there should be one version, promoted, of the same content as that of an undisturbed run,
and nothing half-written beside it. 50 of each; the quick form does a few, of a few intents, kills as soon as teaching has
begun, and holds no time to a bar.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

from apprentice import Apprentice, lineage, plugins
from apprentice import config as configuration
from apprentice.config import Config
from apprentice.demo import Row, recording
from apprentice.learn import learn
from apprentice.types import Answer, Decision, Record, Store, Version
from benches import Figure, Options, at_least, at_most, run, shown
from benches.soak import remote

TASK = "banking77"
ROWS = 160  # that teach
FEW = {"atm_support", "card_acceptance", "change_pin", "exchange_rate"}  # intents of the quick form: soon learned
KEPT = 4  # versions
ROLLBACKS, KILLS, COMMANDS = 50, 50, 5
CLIENTS = 4
LEASE = 60.0  # seconds; longer than a dead owner keeps a task


def rows(options: Options) -> int:
    """How many answers teach."""
    return 60 if options.quick else ROWS


def recorded(options: Options) -> list[Row]:
    """What is asked, and what the remote answers."""
    found = recording(TASK, None)
    return [row for row in found if row.teacher in FEW] if options.quick else found


def prepared(folder: Path, base_url: str) -> Config:
    """A configuration in a file, for the remote at this address."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = (files("apprentice") / "data" / "demo.yaml").read_text(encoding="utf-8")
    file = folder / "apprentice.yaml"
    at, first = ("\nremote:\n", f"\nremote:\n  base_url: {base_url}\n"), ("phase2: 300", "phase2: 50")
    file.write_text(shipped.replace(*at).replace(*first))
    config = configuration.load(file)
    assert config.remote.base_url == base_url
    return config


async def opened(config: Config) -> Store:
    Path(config.store.path).parent.mkdir(parents=True, exist_ok=True)
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    return store


async def fill(config: Config, options: Options, first: int, last: int) -> None:
    """Answers of the remote to so many requests, as they are recorded."""
    store = await opened(config)
    try:
        for number, row in enumerate(recorded(options)[first:last], first):
            answer = Answer(output={"intent": row.teacher}, model=config.remote.model, provider=config.remote.teacher)
            record = Record(
                request_id=f"r{number}",
                task=TASK,
                at=1.79e9 + number,
                input={"text": row.text},
                decision=Decision(route="remote", reason="learning", p=1.0),
                remote=answer,
                served="remote",
            )
            await store.append(record)
    finally:
        await store.close()


# --- the way back -----------------------------------------------------------------------------------------------------


async def rollbacks(config: Config, options: Options) -> list[Figure]:
    """Seconds from a rollback to the first answer of the version asked for, while requests go on."""
    store = await opened(config)
    last = 0
    for number in range(2 if options.quick else KEPT):
        first, last = last, rows(options) + 5 * number  # so that no two are of the same content
        await fill(config, options, first, last)
        version = await learn(config, TASK, store, clock=time.time, owner="bench", force=True)
        assert version is not None
        await lineage.change(config, store, TASK, version.id, at=time.time())
        options.say(f"{version.id} is there")
    kept = [version.id for version in await store.versions(TASK)]
    task = config.tasks[0]
    # A student that serves at once, and goes on: this is about how fast it is replaced, not about promises.
    easy = {"phase2_to_phase3": 0.2, "coaching_trigger": 0.1, "emergency_threshold": 0.05}
    thresholds = task.confidence_thresholds.model_copy(update=easy)
    task = task.model_copy(update={"confidence_thresholds": thresholds})
    local = config.local.model_copy(update={"learn": "off"})
    config = config.model_copy(update={"local": local, "tasks": (task,)})
    dice, found, commands = Random(0), [], []
    async with Apprentice(config, seed=0) as app:
        traffic = _Traffic(app, recorded(options))
        clients = [asyncio.create_task(traffic.go_on(number)) for number in range(CLIENTS)]
        for client in clients:
            client.add_done_callback(traffic.ended)
        try:
            serving = kept[-1]
            await traffic.served_by(serving)
            options.say(f"{serving} serves after {traffic.answered} requests")
            for _ in range(6 if options.quick else ROLLBACKS):
                serving = dice.choice([version for version in kept if version != serving])
                began = time.perf_counter()
                await lineage.rollback(config, store, TASK, serving, at=time.time(), by="bench")
                await traffic.served_by(serving)
                found.append(time.perf_counter() - began)
            for _ in range(0 if options.quick else COMMANDS):
                serving = dice.choice([version for version in kept if version != serving])
                began = time.perf_counter()
                await asyncio.to_thread(_command, config, "rollback", TASK, serving)
                await traffic.served_by(serving)
                commands.append(time.perf_counter() - began)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    await store.close()
    return [
        shown("rollbacks", len(found)),
        shown("requests answered meanwhile", traffic.answered),
        shown("rollback, p50", median(found), "s"),
        shown("rollback, longest", max(found), "s")
        if options.quick
        else at_most("rollback, longest", max(found), 1.0, "s"),
        *([shown("rollback by the command, longest", max(commands), "s")] if commands else []),
    ]


class _Traffic:
    """Clients that ask one request after the other, and which versions have served one since somebody waits for it."""

    def __init__(self, app: Apprentice, rows: list[Row]) -> None:
        self._app = app
        self._rows = rows
        self._seen: set[str | None] = set()
        self._news = asyncio.Event()
        self._failure: BaseException | None = None
        self.answered = 0

    async def go_on(self, client: int) -> None:
        for number in range(client, 10**9, CLIENTS):
            row = self._rows[number % len(self._rows)]
            result = await self._app.arun(TASK, {"text": f"{row.text} ({number})"})
            self.answered += 1
            if result.source == "local":
                self._seen.add(result.version)
            self._news.set()

    def ended(self, client: asyncio.Task[None]) -> None:
        """A client that fails is said to whoever waits."""
        if not client.cancelled():
            self._failure = client.exception()
            self._news.set()

    async def served_by(self, version: str) -> None:
        """Wait until this version has served a request by itself."""
        self._seen.clear()
        async with asyncio.timeout(120):
            while version not in self._seen:
                self._news.clear()
                await self._news.wait()
                if self._failure is not None:
                    raise self._failure


# --- kills ------------------------------------------------------------------------------------------------------------


class Left(NamedTuple):
    """What a store and its model folder hold after a cycle."""

    versions: list[Version]
    files: list[str]  # in the model folder, without what trainers keep for themselves


def _command(config: Config, *arguments: str) -> None:
    _checked(_started(config, *arguments))


def _started(config: Config, *arguments: str) -> subprocess.Popen[bytes]:
    code = "import sys; from apprentice.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments, "--config", str(config.source)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment())


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _checked(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}: {said.decode(errors='replace')}")


async def finish(config: Config) -> None:
    """A worker's cycle, later: it makes a version only if one is due."""
    store = await opened(config)
    try:
        await learn(config, TASK, store, clock=lambda: time.time() + LEASE, owner="later")
    finally:
        await store.close()


async def left(config: Config) -> Left:
    store = await opened(config)
    try:
        versions = await store.versions(TASK)
    finally:
        await store.close()
    folder = config.local.model_dir / TASK
    kept = (".vectors", ".training")  # of the folder itself, not of a version
    return Left(versions, sorted(path.name for path in folder.iterdir() if not path.name.startswith(kept)))


def kills(folder: Path, options: Options) -> list[Figure]:
    """How often what a kill left, and the next cycle finished, differs from what nobody disturbed."""
    config = prepared(folder / "model", "http://127.0.0.1:9")
    asyncio.run(fill(config, options, 0, rows(options)))
    shutil.copytree(folder / "model", folder / "calm")
    calm = configuration.load(folder / "calm" / "apprentice.yaml")
    began = time.perf_counter()
    if options.quick:
        asyncio.run(finish(calm))
    else:
        _command(calm, "learn", TASK)
    taken = time.perf_counter() - began
    [expected] = asyncio.run(left(calm)).versions
    dice = Random(0)
    counts: dict[str, Any] = dict.fromkeys(("killed", "late", "other", "versions", "champions", "drafts"), 0)
    count = 1 if options.quick else KILLS
    for number in range(count):
        here = folder / f"kill-{number}"
        shutil.copytree(folder / "model", here)
        config = configuration.load(here / "apprentice.yaml")
        process = _started(config, "learn", TASK)
        began = time.perf_counter()
        if options.quick:
            while process.poll() is None and not (config.local.model_dir / TASK).exists():
                time.sleep(0.001)
        else:
            with suppress(subprocess.TimeoutExpired):
                process.wait(taken * dice.random())
        moment = time.perf_counter() - began
        process.kill()
        process.communicate()
        counts["killed"] += process.returncode == -signal.SIGKILL
        counts["late"] += bool(asyncio.run(left(config)).versions) if (config.local.model_dir / TASK).exists() else 0
        asyncio.run(finish(config))
        found = asyncio.run(left(config))
        counts["versions"] += len(found.versions) == 1
        counts["champions"] += [version.state for version in found.versions] == ["champion"]
        counts["other"] += any(version.checkpoint != expected.checkpoint for version in found.versions)
        counts["drafts"] += found.files != [expected.checkpoint]
        options.say(f"kill {number} after {moment:.2f} of {taken:.2f} s: {process.returncode}, left {found.files}")
        shutil.rmtree(here)
    return [
        shown("one cycle, undisturbed", taken, "s"),
        at_least("processes killed", counts["killed"], 1 if options.quick else 0.7 * count),
        shown("of them after the version was there", counts["late"]),
        at_least("exactly one version", counts["versions"], count),
        at_least("it is the champion", counts["champions"], count),
        at_most("of another content than undisturbed", counts["other"], 0),
        shown("drafts left beside the checkpoint", counts["drafts"]),
    ]


def measure(options: Options) -> list[Figure]:
    """The way back first, then the kills."""
    with tempfile.TemporaryDirectory(prefix="apprentice-versions-") as name:
        folder = Path(name)
        (folder / "remote").mkdir()
        server, url = remote(folder / "remote", recorded(options))
        try:
            figures = asyncio.run(rollbacks(prepared(folder / "back", url), options))
        finally:
            server.terminate()
            server.communicate()
        return [*figures, *kills(folder, options)]


if __name__ == "__main__":
    sys.exit(run("versions", measure))
