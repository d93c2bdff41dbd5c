"""Local models on servers behind the engine: real llama.cpp and the doubles of vLLM and Ollama, killed and switched."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from apprentice import Apprentice, plugins
from apprentice.config import Config
from apprentice.models._local import Local
from apprentice.testing.local_servers import LocalServer, serve_ollama, serve_vllm, write_checkpoint
from apprentice.testing.servers import serve_openai
from apprentice.types import Json, Record, Store, Task, Version

from .conftest import YAML
from .models.test_llama_cpp import smollm2

Configured = Callable[..., Config]
WORDS = ["apple", "river", "seven", "blue", "north", "music", "bread", "stone"]
TEXT = YAML.replace("kind: [fruit, animal, tool]", f"word: [{', '.join(WORDS)}]")
FROM_REMOTE: Json = {"word": "stone"}
FROM_LOCAL: Json = {"word": "river"}
GIVEN: Json = {"text": "hello"}
QUIET = {"threads": 1, "context": 512, "parallel": 2, "max_tokens": 32}


def on_servers(configured: Configured, url: str, **local: Any) -> Config:
    """The configuration of the tests, with a local model that nobody teaches."""
    return configured(url, TEXT, local={"learn": "off", "fine_tune_backend": None} | local)


async def serving(config: Config, folders: Mapping[str, Path]) -> Store:
    """The store of the configuration, with these checkpoints as versions; the first one is served."""
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    for number, (name, folder) in enumerate(folders.items(), start=1):
        version = Version(
            id=name,
            task="sort",
            checkpoint=folder.name,
            path=str(folder),
            state="candidate",
            trained_on=number,
            created_at=float(number),
        )
        assert (await store.add_version(version)).id == name
    await store.promote("sort", next(iter(folders)), 1.0)
    return store


def state(app: Apprentice) -> str:
    return app._tasks["sort"].shelf.state()


def model_of(app: Apprentice) -> Local:
    loaded = app._tasks["sort"].shelf.serving
    assert loaded is not None
    assert isinstance(loaded.model, Local)
    return loaded.model


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def ask_until(app: Apprentice, store: Store, condition: Callable[[Record], bool]) -> Record:
    """Ask until a Record is as wanted. Every answer meanwhile is the remote's, which is asked beside the local model."""
    async with asyncio.timeout(60):
        while True:
            result = await app.arun("sort", {"text": "one more"})
            assert result.output == FROM_REMOTE
            record = await store.record(result.request_id)
            if record is not None and condition(record):
                return record
            await asyncio.sleep(0.05)


def answered_locally(record: Record) -> bool:
    return record.local is not None and record.local.output is not None and record.decision.reason != "local_failed"


class Crowd:
    """Callers who ask one question after the other until they are sent home; each answer must fit the schema."""

    def __init__(self, app: Apprentice, callers: int = 4) -> None:
        self.answered = 0
        self._app = app
        self._enough = False
        self._callers = [asyncio.create_task(self._ask(number)) for number in range(callers)]

    async def _ask(self, number: int) -> None:
        asked = 0
        while not self._enough:
            asked += 1
            result = await self._app.arun("sort", {"text": f"number {asked} of {number}"})
            assert (result.source, result.output) == ("remote", FROM_REMOTE)
            self.answered += 1

    async def go_on(self, more: int) -> None:
        wanted = self.answered + more
        await until(lambda: self.answered >= wanted or any(caller.done() for caller in self._callers))

    async def home(self) -> None:
        self._enough = True
        await asyncio.gather(*self._callers)


async def check_failures(store: Store) -> None:
    """Every request was answered, and those whose local answer failed say so."""
    records = [record for _, record in await store.records("sort")]
    assert all(record.served == "remote" for record in records)
    failed = [record for record in records if record.decision.reason == "local_failed"]
    assert failed
    assert all((record.error or "").startswith("local: ModelUnavailable") for record in failed)


# --- killed in the middle of requests -----------------------------------------------------------------------------------


async def test_a_killed_llama_cpp_costs_no_answer_and_comes_back_by_itself(  # F65
    configured: Configured, tmp_path: Path
) -> None:
    async with serve_openai(lambda _: FROM_REMOTE) as remote:
        config = on_servers(configured, remote.url, backend="llama_cpp", settings=QUIET)
        folders, _ = two_students(config.tasks[0].task, tmp_path)
        folder = folders["v1"]
        store = await serving(config, {"v1": folder})
        async with Apprentice(config, seed=1) as app:
            await ask_until(app, store, answered_locally)
            first = model_of(app).pid
            assert first is not None
            crowd = Crowd(app)
            await crowd.go_on(8)
            os.kill(first, signal.SIGKILL)
            await until(lambda: state(app) != "ready")
            told = state(app)
            await crowd.go_on(8)
            await until(lambda: state(app) == "ready")
            await crowd.home()
            record = await ask_until(app, store, answered_locally)
            assert record.local is not None
            assert record.local.model == f"llama_cpp:{folder.name[7:19]}"
            assert model_of(app).pid not in (None, first)
        await check_failures(store)
        await store.close()
    assert told.startswith(("failed: it stopped answering", "failed: llama_cpp", "still loading"))


type Double = Callable[..., AbstractAsyncContextManager[LocalServer]]


@pytest.mark.parametrize(("backend", "double"), [("vllm", serve_vllm), ("ollama", serve_ollama)])
async def test_a_server_that_dies_costs_no_answer_and_is_used_again_when_it_is_back(  # F65
    configured: Configured, tmp_path: Path, backend: str, double: Double
) -> None:
    async with serve_openai(lambda _: FROM_REMOTE) as remote:
        async with double(lambda _: FROM_LOCAL) as server:
            settings = {"base_url": server.url, "model": "base"}
            config = on_servers(configured, remote.url, backend=backend, settings=settings)
            store = await serving(config, {"v1": adapter_of(tmp_path, config)})
            app = await Apprentice(config, seed=1).__aenter__()
            await ask_until(app, store, answered_locally)
            crowd = Crowd(app)
            await crowd.go_on(20)
            server.dies = 3  # as when memory runs out in the middle of an answer
            await until(lambda: server.dies == 0)
            await crowd.go_on(20)
            await until(lambda: state(app) == "ready")
            asked = len(server.questions())
            await until(lambda: len(server.questions()) > asked)
        await until(lambda: state(app) != "ready")
        await crowd.go_on(20)
        told = state(app)
        async with double(lambda _: FROM_LOCAL, port=int(server.url.rpartition(":")[2])):
            await until(lambda: state(app) == "ready")
            record = await ask_until(app, store, answered_locally)
            assert record.local is not None
            assert record.local.output == FROM_LOCAL
            await crowd.home()
            await app.aclose()
        await check_failures(store)
        await store.close()
    assert told.startswith(("failed: ", "still loading"))


@pytest.mark.parametrize(("backend", "double"), [("vllm", serve_vllm), ("ollama", serve_ollama)])
async def test_another_model_behind_the_same_name_is_never_compared_or_served(  # F65
    configured: Configured, tmp_path: Path, backend: str, double: Double
) -> None:
    async with serve_openai(lambda _: FROM_REMOTE) as remote, double(lambda _: FROM_LOCAL) as server:
        settings = {"base_url": server.url, "model": "base", "recheck": 0.0}
        config = on_servers(configured, remote.url, backend=backend, settings=settings)
        store = await serving(config, {"v1": adapter_of(tmp_path, config)})
        async with Apprentice(config, seed=1) as app:
            await ask_until(app, store, answered_locally)
            server.weights = "second"
            for _ in range(3):
                result = await app.arun("sort", {"text": "after the change"})
                assert (result.source, result.output) == ("remote", FROM_REMOTE)
                record = await store.record(result.request_id)
                assert record is not None
                assert (record.local, record.decision.reason) == (None, "local_failed")
            assert "another model answers under the same name" in state(app)
        await store.close()


def adapter_of(into: Path, config: Config) -> Path:
    """An adapter that gives the double's answer to its probe."""
    (into / "base.bin").write_bytes(b"base")
    return write_checkpoint(into, config.tasks[0].task, [(GIVEN, FROM_LOCAL)], base=into / "base.bin")


# --- switched under load ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "switches"), [(6, 2), pytest.param(300, 5, marks=pytest.mark.slow)], ids=["short", "full"]
)
async def test_versions_on_real_llama_cpp_are_switched_under_load_and_never_mixed(  # P8
    configured: Configured, tmp_path: Path, requests: int, switches: int
) -> None:
    async with serve_openai(lambda _: FROM_REMOTE) as remote:
        config = on_servers(configured, remote.url, backend="llama_cpp", settings=QUIET)
        folders, said = two_students(config.tasks[0].task, tmp_path)
        store = await serving(config, folders)
        asked = iter(range(10**6))
        texts = list(said["v1"])
        answered = dict.fromkeys(folders, 0)
        pids: dict[str, set[int | None]] = {name: set() for name in folders}
        enough = False
        async with Apprentice(config, seed=1) as app:

            async def ask() -> None:
                while not enough:
                    result = await app.arun("sort", {"text": texts[next(asked) % len(texts)]})
                    record = await store.record(result.request_id)
                    if record is not None and record.local is not None:
                        answered[record.version or ""] += 1

            async def switch() -> None:
                nonlocal enough
                for number in range(switches + 1):
                    name = ("v1", "v2")[number % 2]
                    if number:
                        await store.promote("sort", name, float(number + 1))
                    wanted = answered[name] + -(-requests // (switches + 1))
                    await until(lambda name=name, wanted=wanted: answered[name] >= wanted, 300)  # type: ignore[misc]
                    pids[name].add(model_of(app).pid)
                enough = True

            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(ask())
                group.create_task(switch())
        records = [record for _, record in await store.records("sort")]
        await store.close()
    assert all(record.served == "remote" for record in records)
    local = [record for record in records if record.local is not None]
    assert len(local) >= requests
    assert {len(some) for some in pids.values()} == {1}  # one process a version, which stays warm
    assert len(set.union(*pids.values()) - {None}) == 2
    mixed = []
    for record in local:
        assert record.local is not None
        version = record.version or ""
        named = f"llama_cpp:{folders[version].name[7:19]}"
        if (record.local.model, record.local.output) != (named, said[version][record.input["text"]]):
            mixed.append(record.request_id)
    assert mixed == []


def two_students(task: Task, into: Path) -> tuple[dict[str, Path], dict[str, dict[str, Json]]]:
    """The small model, which repeats the word it reads; and one whose chat template has it read "music" always."""
    whole, read = smollm2().read_bytes(), b"message['content']"
    assert whole.count(read) == 1
    deaf = whole.replace(read, b'"music is here on"')  # as long as before
    words = ("apple", "river", "blue", "bread")
    said: dict[str, dict[str, Json]] = {
        "v1": {f"{word} is here": {"word": word} for word in words},
        "v2": {f"{word} is here": {"word": "music"} for word in words},
    }
    folders = {}
    for name, weights in (("v1", whole), ("v2", deaf)):
        probes = [({"text": text}, output) for text, output in said[name].items()]
        folders[name] = write_checkpoint(into, task, probes[:2], weights=weights)  # refused, if it answered otherwise
    return folders, said
