from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apprentice import Apprentice, plugins
from apprentice.config import Config
from apprentice.errors import ConfigError, ModelUnavailable
from apprentice.learn import learn
from apprentice.shelf import Shelf, load
from apprentice.testing.servers import serve_openai
from apprentice.types import Answer, Json, Store, Task, Version

from .conftest import honest, texts
from .test_learn import filled


class Counting:
    """A model that knows when it is closed, and answers when it is told to."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self.closed = False
        self.go = asyncio.Event()

    async def answer(self, task: Task, input: Json) -> Answer:
        await self.go.wait()
        assert not self.closed
        return Answer(output=self.version.id, model=self.version.id)

    async def close(self) -> None:
        self.closed = True


class Slow(Counting):
    """One on a server that loads until it is told that it has."""

    def __init__(self, version: Version) -> None:
        super().__init__(version)
        self.asked = asyncio.Event()

    def state(self) -> str:
        return "still loading, 40 %"

    async def ready(self) -> None:
        self.asked.set()
        await self.go.wait()
        raise ModelUnavailable("the server died")


def version(number: int) -> Version:
    return Version(
        id=f"v{number}", task="sort", checkpoint="", path="", state="champion", trained_on=1, created_at=float(number)
    )


def model_of(shelf: Shelf) -> Any:
    assert shelf.serving is not None
    return shelf.serving.model


async def test_the_version_before_stays_warm_and_is_the_same_model_after_a_rollback() -> None:
    shelf = Shelf(Counting)
    shelf.put(version(1))
    first = model_of(shelf)
    shelf.put(version(2))
    second = model_of(shelf)
    assert not first.closed
    shelf.put(version(1))
    assert model_of(shelf) is first and not second.closed
    shelf.put(version(3))
    assert (first.closed, shelf.state()) == (False, "ready")
    await asyncio.gather(*shelf._closing)
    assert second.closed
    await shelf.close()
    assert first.closed and shelf.serving is None and shelf.state() == "no local model yet"


async def test_a_replaced_version_is_closed_when_its_last_request_is_over() -> None:
    shelf = Shelf(Counting)
    shelf.put(version(1))
    borrowed = shelf.borrow()
    assert borrowed is not None
    model: Any = borrowed.model
    answering = asyncio.create_task(model.answer(None, None))
    for number in (2, 3, 4):
        shelf.put(version(number))
    await asyncio.sleep(0)
    assert not model.closed
    model.go.set()
    assert (await answering).output == "v1"
    shelf.give_back(borrowed)
    await asyncio.gather(*shelf._closing)
    assert model.closed
    await shelf.close()


async def test_a_server_begins_to_load_at_once_and_its_failure_is_left_to_the_requests() -> None:
    shelf = Shelf(Slow)
    shelf.put(version(1))
    model = model_of(shelf)
    await model.asked.wait()
    assert shelf.state() == "still loading, 40 %"
    model.go.set()
    assert shelf.serving is not None and shelf.serving.loading is not None
    await shelf.serving.loading
    shelf.put(version(2))
    await model_of(shelf).asked.wait()
    await shelf.close()  # also while it loads
    assert model.closed


async def test_a_version_that_cannot_be_loaded_serves_nothing_and_the_next_one_does() -> None:
    def build(of: Version) -> Counting:
        if of.id == "v2":
            raise ConfigError("damaged")
        return Counting(of)

    shelf = Shelf(build)
    shelf.put(version(1))
    with pytest.raises(ConfigError):
        shelf.put(version(2))
    assert shelf.borrow() is None
    shelf.put(version(3))
    assert shelf.borrow() is not None
    await shelf.close()


async def test_withdrawing_serves_nothing_and_keeps_the_model_warm() -> None:
    shelf = Shelf(Counting)
    shelf.put(version(1))
    first = model_of(shelf)
    shelf.withdraw()
    assert shelf.borrow() is None
    shelf.put(version(1))
    assert model_of(shelf) is first
    await shelf.close()


def test_a_plugin_is_told_the_base_model_and_where_its_log_goes(tmp_path: Path) -> None:
    from apprentice.config import Local

    local = Local(backend="ollama", base_model="llama3.1:8b", model_dir=tmp_path)
    model = load(local, None)
    told = repr(vars(model))
    assert str(tmp_path / "logs") in told and "llama3.1" in told
    with pytest.raises(ConfigError, match="checkpoint"):
        load(Local(backend="embedded", model_dir=tmp_path), tmp_path / "nowhere")


async def _two_versions(config: Config) -> tuple[Version, Version]:
    store: Store = await filled(config, 60)
    try:
        one = await learn(config, "sort", store, clock=lambda: 1.0, owner="a")
        await asyncio.gather(*(store.append(record) for _, record in [(0, r) for r in _more(range(60, 100))]))
        other = await learn(config, "sort", store, clock=lambda: 2.0, owner="a", force=True)
    finally:
        await store.close()
    assert one is not None and other is not None and one.checkpoint != other.checkpoint
    return one, other


def _more(numbers: range) -> list[Any]:
    from .conftest import right
    from .test_learn import answered

    return [answered(n, text, right(text)) for n, text in zip(numbers, texts(len(numbers), seed=9), strict=True)]


@pytest.mark.parametrize(
    ("requests", "switches"), [(400, 10), pytest.param(10_000, 50, marks=pytest.mark.slow)], ids=["short", "full"]
)
async def test_a_request_sees_the_old_version_or_the_new_one_and_never_a_mix(  # P8
    configured: Callable[..., Config], requests: int, switches: int
) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, local={"learn": "off"})
        one, other = await _two_versions(config)
        names = {v.id: f"embedded:{v.checkpoint.removeprefix('sha256-')[:12]}" for v in (one, other)}
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        try:
            async with Apprentice(config) as app:
                asked = iter(texts(requests, seed=3))
                done = 0

                async def ask() -> None:
                    nonlocal done
                    for text in asked:
                        await app.arun("sort", {"text": text})
                        done += 1

                async def switch() -> None:
                    for number in range(switches):
                        while done < (number + 1) * requests // (switches + 1):
                            await asyncio.sleep(0.001)
                        await store.promote("sort", (one, other)[number % 2].id, float(number))

                await asyncio.gather(switch(), *(ask() for _ in range(8)))
            records = [record for _, record in await store.records("sort") if record.local is not None]
        finally:
            await store.close()
    assert {record.version for record in records} == set(names)
    mixed = [r.request_id for r in records if r.local is not None and names[r.version or ""] != r.local.model]
    assert mixed == []
