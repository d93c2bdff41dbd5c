from __future__ import annotations

from typing import Any

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError

TICKET = {"category": "billing", "priority": 2, "confidence": 0.9}


async def test_only_the_match_fields_count_and_each_has_its_score() -> None:
    evaluate = plugins.build("evaluators", "structured_match", match_fields=["category", "priority"])
    score = await evaluate({**TICKET, "priority": 3, "confidence": 0.1}, TICKET)
    assert score.value == 0.5
    assert score.fields == {"category": 1.0, "priority": 0.0}


async def test_without_match_fields_every_key_of_either_side_counts() -> None:
    evaluate = plugins.build("evaluators", "structured_match")
    score = await evaluate({**TICKET, "extra": 1}, TICKET)
    assert score.value == 0.75
    assert score.fields["extra"] == 0.0


async def test_weights_count() -> None:
    evaluate = plugins.build(
        "evaluators", "structured_match", match_fields=["category", "priority"], weights={"category": 3.0}
    )
    assert (await evaluate({**TICKET, "priority": 3}, TICKET)).value == 0.75


async def test_a_field_may_be_within_another() -> None:
    evaluate = plugins.build("evaluators", "structured_match", match_fields=["a.b"])
    assert (await evaluate({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})).value == 1.0
    assert (await evaluate({"a": 1}, {"a": {"b": 1}})).value == 0.0


@pytest.mark.parametrize(
    ("lists", "answer", "score"),
    [
        ("f1", ["b", "a"], 1.0),  # the order of categories says nothing
        ("f1", ["a"], 2 / 3),
        ("jaccard", ["a"], 1 / 2),
        ("exact", ["a"], 0.0),
        ("f1", ["c"], 0.0),
        ("f1", [], 0.0),
        ("f1", ["a", "b", "b"], 4 / 5),
        ("f1", [["a"], "b"], 0.0),
        ("f1", "a", 0.0),
    ],
)
async def test_a_list_of_categories_scores_by_what_is_shared(lists: str, answer: Any, score: float) -> None:
    evaluate = plugins.build("evaluators", "structured_match", lists=lists)
    assert (await evaluate({"tags": answer}, {"tags": ["a", "b"]})).value == pytest.approx(score)


async def test_true_is_not_one_in_a_list_either() -> None:
    evaluate = plugins.build("evaluators", "structured_match")
    assert (await evaluate({"tags": [True]}, {"tags": [1]})).value == 0.0


async def test_what_is_no_object_matches_only_itself() -> None:
    evaluate = plugins.build("evaluators", "structured_match", match_fields=["category"])
    assert (await evaluate("billing", {"category": None})).value == 0.0
    assert (await evaluate([1], [1])).value == 1.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"match_fields": ["a"], "weights": {"b": 1.0}}, "weights.b"),
        ({"match_fields": ["a"], "weights": {"a": -1.0}}, "weights.a"),
        ({"match_fields": ["a"], "weights": {"a": 0.0}}, "above 0"),
        ({"match_fields": []}, "match_fields"),
        ({"lists": "f2"}, "lists"),
    ],
)
def test_settings_that_make_no_sense_are_config_errors(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        plugins.build("evaluators", "structured_match", **settings)
