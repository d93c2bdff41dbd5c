"""The services keep every trainer's contract: what they make is asked at the service, which has learned."""

from __future__ import annotations

from pathlib import Path

import pytest

from apprentice import plugins
from apprentice.testing.trainers import CHECKS, Case, Check
from apprentice.types import Checkpoint, Model

from .services import OWN, serving, trainer


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", OWN)
async def test_trainer_keeps_the_promise(name: str, check: Check, tmp_path: Path) -> None:
    with serving(name, looks=0) as service:
        base = service.url + ("/inference/v1" if name == "fireworks" else "")

        def serve(checkpoint: Checkpoint) -> Model:
            model: Model = plugins.build(
                "models", "openai", model=checkpoint.manifest["model"], base_url=base, allow_internal=True
            )
            return model

        await check(Case(trainer(name, service), serve), tmp_path)
