"""Every file in src/apprentice/trainers keeps the contract; a new one needs an entry in CASES."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest

import apprentice.trainers
from apprentice import plugins
from apprentice.testing.trainers import CHECKS, TASK, Case, Check
from apprentice.types import Checkpoint, Model

NAMES = [module.name for module in pkgutil.iter_modules(apprentice.trainers.__path__) if module.name[0] != "_"]
FREE_TEXT = {"type": "object", "properties": {"reply": {"type": "string", "x-free-text": True}}, "required": ["reply"]}


def embedded(encoder: str) -> Case:
    def serve(checkpoint: Checkpoint) -> Model:
        model: Model = plugins.build("models", "embedded", checkpoint=str(checkpoint.path))
        return model

    unlearnable = TASK.model_copy(update={"name": "write", "output_schema": FREE_TEXT})
    return Case(plugins.build("trainers", "embedded", encoder=encoder), serve, unlearnable)


CASES = {"embedded": [lambda: embedded("minilm"), lambda: embedded("tfidf")]}


def test_every_trainer_has_a_case() -> None:
    assert set(CASES) == set(NAMES)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "number"), [(name, number) for name in CASES for number in range(len(CASES[name]))])
async def test_trainer_keeps_the_promise(name: str, number: int, check: Check, tmp_path: Path) -> None:
    await check(CASES[name][number](), tmp_path)
