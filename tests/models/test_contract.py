"""Every file in models/ keeps the promises that apprentice.testing.models publishes."""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

import apprentice.models
from apprentice import plugins
from apprentice.testing.models import CHECKS, REMOTE_CHECKS, TASK, Build, Case, RemoteCase, Serve
from apprentice.testing.servers import asked, serve_anthropic, serve_openai
from apprentice.types import Example, Json, Model

FILES = sorted(module.name for module in pkgutil.iter_modules(apprentice.models.__path__))
PAIRS: list[tuple[Json, Json]] = [
    ({"text": "win a prize"}, {"label": "spam"}),
    ({"text": "lunch at noon"}, {"label": "ham"}),
    ({"text": "ünï \U0001f600"}, {"label": "ham"}),
]


def built(name: str) -> Build:
    def build(*, base_url: str, api_key: str, max_tokens: int = 1024, timeout: float = 10) -> Model:
        model: Model = plugins.build(
            "models",
            name,
            model="m-1",
            base_url=base_url,
            api_key=api_key,
            max_tokens=max_tokens,
            timeout=timeout,
            allow_internal=True,
        )
        return model

    return build


def by_text(body: dict[str, Json]) -> Json:
    return next((output for given, output in PAIRS if given == asked(body)), {"label": "odd"})


def behind(name: str, serve: Callable[..., Any]) -> Callable[[Path], AbstractAsyncContextManager[Case]]:
    @contextlib.asynccontextmanager
    async def case(_: Path) -> AsyncIterator[Case]:
        async with serve(by_text) as server:
            yield Case(built(name)(base_url=server.url, api_key="k"), TASK, PAIRS)

    return case


@contextlib.asynccontextmanager
async def recorded(_: Path) -> AsyncIterator[Case]:
    rows = [{"text": given["text"], "teacher": output["label"]} for given, output in PAIRS]
    yield Case(plugins.build("models", "recorded", rows=rows, answer_field="label"), TASK, PAIRS)


@contextlib.asynccontextmanager
async def embedded(folder: Path) -> AsyncIterator[Case]:
    examples = [Example(input=given, target=output, source="remote") for given, output in PAIRS * 10]
    trainer = plugins.build("trainers", "embedded", encoder="tfidf")
    checkpoint = trainer.train(TASK, examples, into=folder, seed=0)
    yield Case(plugins.build("models", "embedded", checkpoint=str(checkpoint.path)), TASK, PAIRS)


SERVERS: dict[str, Serve] = {"openai": serve_openai, "anthropic": serve_anthropic}
CASES = {name: behind(name, serve) for name, serve in SERVERS.items()} | {"recorded": recorded, "embedded": embedded}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", FILES)
async def test_a_model_keeps_its_contract(name: str, check: Callable[[Case], Any], tmp_path: Path) -> None:
    assert name in CASES, f"models/{name}.py needs an entry in CASES that builds it without a key and without a network"
    async with CASES[name](tmp_path) as case:
        await check(case)
        await case.model.close()


@pytest.mark.parametrize("check", REMOTE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SERVERS)
async def test_a_provider_tells_the_truth(name: str, check: Callable[[RemoteCase], Any]) -> None:
    await check(RemoteCase(built(name), SERVERS[name]))
