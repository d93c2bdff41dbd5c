"""Every file in src/apprentice/trainers keeps the contract; a new one needs an entry in CASES."""

from __future__ import annotations

import contextlib
import pkgutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

import apprentice.trainers
from apprentice import plugins
from apprentice.testing.local_servers import serve_llama_cpp
from apprentice.testing.trainers import CHECKS, TASK, UPDATE_CHECKS, Case, Check
from apprentice.trainers import Updater
from apprentice.types import Checkpoint, Model, Task

from .services import serving, trainer
from .test_huggingface import QUICK, tiny

NAMES = [module.name for module in pkgutil.iter_modules(apprentice.trainers.__path__) if module.name[0] != "_"]
TEXT = {"type": "string", "x-free-text": True}
REPLY = {"reply": "Here you are."}


def answering(name: str, *, both: bool) -> Task:
    """A task that has a reply to write, beside what TASK asks or alone."""
    schema = TASK.output_schema
    properties = (schema["properties"] if both else {}) | {"reply": TEXT}
    output = schema | {"properties": properties, "required": list(properties)}
    return TASK.model_copy(update={"name": name, "output_schema": output})


def embedded(encoder: str) -> Callable[[], AbstractAsyncContextManager[Case]]:
    @contextlib.asynccontextmanager
    async def case() -> AsyncIterator[Case]:
        def serve(checkpoint: Checkpoint) -> Model:
            model: Model = plugins.build("models", "embedded", checkpoint=str(checkpoint.path))
            return model

        made = plugins.build("trainers", "embedded", encoder=encoder)
        yield Case(made, serve, answering("write", both=False))

    return case


@contextlib.asynccontextmanager
async def ensemble() -> AsyncIterator[Case]:
    def serve(checkpoint: Checkpoint) -> Model:
        model: Model = plugins.build("models", "ensemble", checkpoint=str(checkpoint.path))
        return model

    members = [{"settings": {"encoder": encoder}} for encoder in ("minilm", "tfidf")]
    yield Case(plugins.build("trainers", "ensemble", members=members), serve, answering("write", both=False))


@contextlib.asynccontextmanager
async def mixed() -> AsyncIterator[Case]:
    async with serve_llama_cpp(lambda _: REPLY) as server:

        def serve(checkpoint: Checkpoint) -> Model:
            rest = {"backend": "llama_cpp", "base_url": server.url}
            model: Model = plugins.build("models", "mixed", checkpoint=str(checkpoint.path), rest=rest)
            return model

        made = plugins.build("trainers", "mixed", closed={"encoder": "tfidf"})
        yield Case(made, serve, TASK, answering("answer", both=True), REPLY)


def remote(name: str) -> Callable[[], AbstractAsyncContextManager[Case]]:
    """A service that has learned what it was sent is asked itself."""

    @contextlib.asynccontextmanager
    async def case() -> AsyncIterator[Case]:
        with serving(name, looks=0) as service:
            base_url = service.url + ("/inference/v1" if name == "fireworks" else "")

            def serve(checkpoint: Checkpoint) -> Model:
                settings = {"model": checkpoint.manifest["model"], "base_url": base_url, "allow_internal": True}
                model: Model = plugins.build("models", "openai", **settings)
                return model

            yield Case(trainer(name, service), serve)

    return case


@contextlib.asynccontextmanager
async def huggingface() -> AsyncIterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        yield Case(tiny(Path(folder)), _served_by_llama_cpp)


def _served_by_llama_cpp(checkpoint: Checkpoint) -> Model:
    settings = {"checkpoint": str(checkpoint.path), "parallel": 1, **QUICK["serving"]}
    model: Model = plugins.build("models", "llama_cpp", **settings)
    return model


CASES: dict[str, list[Callable[[], AbstractAsyncContextManager[Case]]]] = {
    "axolotl": [],  # around its child all is as around huggingface's; the child has test_axolotl.py
    "embedded": [embedded("minilm"), embedded("tfidf")],
    "ensemble": [ensemble],
    "fireworks": [remote("fireworks")],
    "huggingface": [huggingface],
    "mixed": [mixed],
    "mlx": [],  # around its child all is as around huggingface's; the child has test_mlx.py
    "openai": [remote("openai")],
    "unsloth": [],  # around its child all is as around huggingface's; the child has test_unsloth.py
}
SLOW = {"huggingface"}  # they need torch, and minutes
PLACES = [
    pytest.param(name, number, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, cases in CASES.items()
    for number in range(len(cases))
]


def test_every_trainer_has_a_case() -> None:
    assert set(CASES) == set(NAMES)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "number"), PLACES)
async def test_trainer_keeps_the_promise(name: str, number: int, check: Check, tmp_path: Path) -> None:
    async with CASES[name][number]() as case:
        await check(case, tmp_path)


@pytest.mark.parametrize("check", UPDATE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "number"), PLACES)
async def test_a_trainer_that_updates_keeps_these_promises_too(
    name: str, number: int, check: Check, tmp_path: Path
) -> None:
    async with CASES[name][number]() as case:
        if isinstance(case.trainer, Updater):
            await check(case, tmp_path)
        else:
            assert not hasattr(case.trainer, "update"), "a trainer with `update` takes what Updater says"
