from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package as pip would leave it: a module, and metadata that names it as a plugin, twice."""
    (tmp_path / "their_evaluators.py").write_text(
        "async def _one(answer, reference):\n    return 1.0\n\n\n"
        "def build(strength: int, name: str = 'x'):\n    return (strength, name)\n"
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[apprentice.evaluators]\ntheirs = their_evaluators\nexact_match = their_evaluators\n"
        "broken = their_evaluators:build\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "theirs"
    sys.modules.pop("their_evaluators", None)


def test_an_entry_point_is_a_plugin_like_ours(installed: str) -> None:
    assert installed in plugins.names("evaluators")
    assert plugins.build("evaluators", installed, strength=3) == (3, "x")


def test_an_installed_package_cannot_take_the_name_of_a_built_in(installed: str) -> None:
    assert plugins.find("evaluators", "exact_match").__name__ == "apprentice.evaluators.exact_match"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strength": "3"}, "'strength'"),
        ({}, "'strength'"),
        ({"strength": 3, "strenght": 4}, "did you mean 'strength'"),
        ({"strength": 3, "name": None}, "'name'"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(installed: str, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plugins.build("evaluators", installed, **settings)


def test_an_entry_point_that_is_no_module_is_refused(installed: str) -> None:
    with pytest.raises(ConfigError, match="not a module"):
        plugins.find("evaluators", "broken")


@pytest.mark.parametrize("name", ["exact_mach", "../sqlite", "exact.match", "", "__init__"])
def test_an_unknown_name_is_an_error_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plugins.find("evaluators", name)
    assert caught.value.hint is not None and "exact_match" in caught.value.hint


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(ConfigError, match="did you mean 'exact_match'"):
        plugins.find("evaluators", "exact_mach")
