"""Every file in src/apprentice/encoders keeps the contract; a new one is found by itself."""

from __future__ import annotations

import pkgutil

import pytest

import apprentice.encoders
from apprentice import plugins
from apprentice.testing.encoders import CHECKS, Check
from apprentice.types import Encoder

NAMES = [module.name for module in pkgutil.iter_modules(apprentice.encoders.__path__) if module.name[0] != "_"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_encoder_keeps_the_promise(name: str, check: Check) -> None:
    def build() -> Encoder:
        encoder: Encoder = plugins.build("encoders", name)
        return encoder

    check(build)
