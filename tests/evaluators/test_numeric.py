from __future__ import annotations

from typing import Any

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError
from apprentice.types import Json


@pytest.mark.parametrize(
    ("settings", "answer", "reference", "score"),
    [
        ({"scale": 10.0}, 7, 10, 0.7),
        ({"scale": 10.0}, 10, 7, 0.7),
        ({"scale": 10.0}, -5, 10, 0.0),
        ({"tolerance": 3.0, "scale": 10.0}, 7, 10, 1.0),
        ({"tolerance": 2.9}, 7, 10, 0.0),
        ({}, 7, 7.0, 1.0),
        ({"scale": 10.0}, "7", 7, 0.0),
        ({"scale": 10.0}, True, 1, 0.0),
        ({"scale": 10.0}, None, None, 0.0),
        ({"scale": 10.0}, 10**400, 1, 0.0),
        ({"scale": 10.0}, 10**400, 10**400, 1.0),
        ({"field": "a.b", "scale": 10.0}, {"a": {"b": 9}, "c": "x"}, {"a": {"b": 10}, "c": "y"}, 0.9),
        ({"field": "a"}, {}, {}, 0.0),
        ({"scale": 10.0}, {"a": 1, "b": 5}, {"a": 1, "b": 10}, 0.75),
    ],
)
async def test_nearness(settings: dict[str, Any], answer: Json, reference: Json, score: float) -> None:
    evaluate = plugins.build("evaluators", "numeric", **settings)
    assert (await evaluate(answer, reference)).value == pytest.approx(score)


async def test_each_field_has_its_score() -> None:
    evaluate = plugins.build("evaluators", "numeric", scale=10.0)
    assert (await evaluate({"a": 1, "b": 5}, {"a": 1, "b": 10})).fields == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize("settings", [{"tolerance": -1.0}, {"scale": 0.0}, {"scale": float("nan")}, {"scale": "5"}])
def test_settings_that_make_no_sense_are_config_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        plugins.build("evaluators", "numeric", **settings)
