"""What every evaluator promises, as checks that a third party runs over its own.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_contract(check):
        await check(Case(my_evaluator.build(), [{"label": "spam"}, {"label": "ham"}]))

A broken promise raises AssertionError.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

from apprentice.errors import ApprenticeError
from apprentice.types import Evaluator, Json, Score


class Case(NamedTuple):
    """An evaluator, and at least two different answers that it is made to compare."""

    evaluator: Evaluator
    answers: Sequence[Json]
    symmetric: bool = True  # False for one that says so in its docstring


type Check = Callable[[Case], Awaitable[None]]


def _nested(depth: int) -> Json:
    value: Json = []
    for _ in range(depth):
        value = [value]
    return value


# What a model may say instead of an answer. All of it comes out of a JSON parser, though no JSON text should hold it.
HOSTILE: tuple[Json, ...] = (
    None,
    True,
    False,
    0,
    -1,
    10**400,
    1e308,
    -1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    " ",
    "\0",
    "half a pair: \ud800",
    "\udfff",
    "word " * 20_000,
    "𝕥ext \u202e with \u200b marks 👩‍👩‍👧",
    [],
    [[]],
    [None, True, 1, 1.0, "1", [], {}],
    [1, 1, 1],
    [math.nan],
    _nested(10_000),
    {},
    {"": ""},
    {"a": {"b": {"c": None}}},
    {"__class__": "x", "a.b": 1},
)


def hostile(answers: Sequence[Json]) -> Iterator[Json]:
    """Hostile values by themselves, and in place of each field of the first answer."""
    yield from HOSTILE
    if isinstance(answers[0], dict):
        for key in answers[0]:
            yield {name: value for name, value in answers[0].items() if name != key}
            for value in HOSTILE:
                yield {**answers[0], key: value}


async def equal_answers_score_one(case: Case) -> None:
    for answer in case.answers:
        score = await case.evaluator(answer, copy.deepcopy(answer))
        assert score.value == 1.0, f"{answer!r} against itself scores {score.value}"


async def different_answers_can_score_below_one(case: Case) -> None:
    values = [(await case.evaluator(*pair)).value for pair in itertools.permutations(case.answers, 2)]
    assert values, "the case should have at least two answers"
    assert min(values) < 1.0, "no two of the answers are told apart"


async def scores_lie_between_zero_and_one(case: Case) -> None:
    for answer, reference in itertools.product(case.answers, repeat=2):
        score = await case.evaluator(answer, reference)
        assert isinstance(score, Score), f"{score!r} is no Score"
        for name, value in {"value": score.value, **score.fields}.items():
            assert 0.0 <= value <= 1.0, f"{name} of {answer!r} against {reference!r} is {value}"


async def scores_do_not_depend_on_the_side(case: Case) -> None:
    if not case.symmetric:
        return
    for answer, reference in itertools.combinations(case.answers, 2):
        there, back = await case.evaluator(answer, reference), await case.evaluator(reference, answer)
        assert math.isclose(there.value, back.value, abs_tol=1e-6), f"{answer!r} and {reference!r}: {there} and {back}"


async def the_same_pair_scores_the_same_also_at_the_same_time(case: Case) -> None:
    pairs = list(itertools.product(case.answers, repeat=2))
    alone = [await case.evaluator(*pair) for pair in pairs]
    together = await asyncio.gather(*(case.evaluator(*pair) for pair in pairs))
    for pair, first, second in zip(pairs, alone, together, strict=True):
        assert math.isclose(first.value, second.value, abs_tol=1e-6), f"{pair!r} scores {first}, then {second}"


async def hostile_answers_score_or_raise_an_error_of_ours(case: Case) -> None:
    for value in hostile(case.answers):
        for pair in ((value, case.answers[0]), (case.answers[0], value), (value, value)):
            try:
                score = await case.evaluator(*pair)
            except ApprenticeError:
                continue
            assert 0.0 <= score.value <= 1.0
            assert all(0.0 <= part <= 1.0 for part in score.fields.values())


async def answers_are_left_as_they_are(case: Case) -> None:
    before = copy.deepcopy(list(case.answers))
    for pair in itertools.product(case.answers, repeat=2):
        await case.evaluator(*pair)
    assert list(case.answers) == before, "the evaluator changed an answer"


CHECKS: tuple[Check, ...] = (
    equal_answers_score_one,
    different_answers_can_score_below_one,
    scores_lie_between_zero_and_one,
    scores_do_not_depend_on_the_side,
    the_same_pair_scores_the_same_also_at_the_same_time,
    hostile_answers_score_or_raise_an_error_of_ours,
    answers_are_left_as_they_are,
)
