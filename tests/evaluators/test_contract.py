"""Every file in evaluators/ keeps the promises of an evaluator; a new file is found by itself."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice import plugins
from apprentice.testing.evaluators import (
    CHECKS,
    Case,
    Check,
    different_answers_can_score_below_one,
    equal_answers_score_one,
    hostile_answers_score_or_raise_an_error_of_ours,
    scores_do_not_depend_on_the_side,
)
from apprentice.types import Evaluator, Json, Score

LABELS: list[Json] = [
    {"label": "spam", "score": 1, "tags": ["a", "b"]},
    {"label": "ham", "score": 2.5, "tags": ["b", "a"]},
    {"label": "", "score": -3, "tags": []},
    {"label": "spam"},
]
NUMBERS: list[Json] = [{"score": 1}, {"score": 1.5}, {"score": -7}]
# Settings and answers, for those that need some; any other file is built without settings and compares LABELS.
CASES: dict[str, list[tuple[dict[str, Any], list[Json]]]] = {
    "exact_match": [({}, LABELS), ({"fold": True}, LABELS)],
    "structured_match": [
        ({}, LABELS),
        ({"match_fields": ["label", "tags"], "weights": {"tags": 3.0}, "lists": "jaccard"}, LABELS),
        ({"match_fields": ["a.b"]}, [{"a": {"b": 1}}, {"a": {"b": [1]}}, {"a": 1}]),
    ],
    "semantic_similarity": [
        ({}, LABELS),
        ({"fields": ["text"], "encoder": "tfidf"}, [{"text": "a red fox"}, {"text": "revenue rose"}]),
        ({}, ["the cat sat on the mat", "a cat was sitting on a rug", "revenue rose", ""]),
    ],
    "numeric": [
        ({"field": "score"}, NUMBERS),
        ({"scale": 2.0}, NUMBERS),
        ({"tolerance": 0.5, "scale": 10.0}, [1, 1.4, 3, 10**400]),
    ],
    "custom": [({"function": "tests.evaluators.judges:overlap"}, LABELS)],
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", plugins.names("evaluators"))
async def test_contract(name: str, check: Check) -> None:
    for settings, answers in CASES.get(name, [({}, LABELS)]):
        await check(Case(plugins.build("evaluators", name, **settings), answers))


async def constant(answer: Json, reference: Json) -> Score:
    return Score(value=1.0)


async def lopsided(answer: Json, reference: Json) -> Score:
    return Score(value=1.0 if len(str(answer)) >= len(str(reference)) else 0.0)


async def never_equal(answer: Json, reference: Json) -> Score:
    return Score(value=0.5)


async def trusting(answer: Json, reference: Json) -> Score:
    return Score(value=float(answer["label"] == reference["label"]))


@pytest.mark.parametrize(
    ("broken", "check", "error"),
    [
        (constant, different_answers_can_score_below_one, AssertionError),
        (lopsided, scores_do_not_depend_on_the_side, AssertionError),
        (never_equal, equal_answers_score_one, AssertionError),
        (trusting, hostile_answers_score_or_raise_an_error_of_ours, TypeError),
    ],
)
async def test_an_evaluator_that_breaks_a_promise_is_caught(
    broken: Evaluator, check: Check, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await check(Case(broken, LABELS))
