"""Every file in src/apprentice/stores keeps the contract; a new one is found by itself."""

from __future__ import annotations

import inspect
import pkgutil
from pathlib import Path

import pytest

import apprentice.stores
from apprentice import plugins
from apprentice.testing.stores import CHECKS, HOSTILE, Check
from apprentice.types import Store

NAMES = [module.name for module in pkgutil.iter_modules(apprentice.stores.__path__) if module.name[0] != "_"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
# F2: a_hold_is_booked_in_all_windows_or_none; F6: a_hold_ends_once; F23: amounts_are_exact; F42: hostile strings
async def test_store_keeps_the_promise(name: str, check: Check, tmp_path: Path) -> None:
    def build(path: Path) -> Store:
        store: Store = plugins.build("stores", name, path=path)
        return store

    await check(build, tmp_path / "store")


@pytest.mark.parametrize("name", NAMES)
def test_store_implements_every_method_of_the_protocol_with_its_parameters(name: str, tmp_path: Path) -> None:
    returned = inspect.signature(plugins.find("stores", name).build, eval_str=True).return_annotation
    for method, promised in inspect.getmembers(Store, inspect.isfunction):
        if not method.startswith("_"):
            offered = inspect.signature(getattr(returned, method))
            assert list(offered.parameters) == list(inspect.signature(promised).parameters), method
    assert len(set(HOSTILE)) >= 40
