from __future__ import annotations

import doctest
import math
from itertools import combinations
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice import calibration
from apprentice.calibration import SAME, auroc, calibrate, checked, ece

digits = st.integers(0, 1000).map(lambda number: number / 1000)
pairs = st.lists(st.tuples(digits, st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=30)
weights = st.lists(st.sampled_from([1.0, 2.0, 50.0, 1 / 3]), min_size=30, max_size=30)


@st.composite
def tables(draw: st.DrawFn) -> list[list[float]]:
    size = draw(st.integers(2, 20))
    columns = [sorted(draw(st.sets(digits, min_size=size, max_size=size))) for _ in range(2)]
    return [list(row) for row in zip(*columns, strict=True)]


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(calibration).failed == 0


# --- the table --------------------------------------------------------------------------------------------------------


@given(tables(), st.lists(digits, min_size=2, unique=True))
def test_a_table_keeps_the_rank_of_what_it_covers_and_never_turns_it_round(
    table: list[list[float]], raw: list[float]
) -> None:
    for one, other in zip(sorted(raw), sorted(raw)[1:], strict=False):
        low, high = calibrate(table, one), calibrate(table, other)
        assert 0 <= low <= high <= 1
        if table[0][0] <= one and other <= table[-1][0]:
            assert low < high


@given(tables())
def test_a_table_goes_through_its_rows_and_is_flat_beyond_them(table: list[list[float]]) -> None:
    assert [calibrate(table, raw) for raw, _ in table] == [value for _, value in table]
    assert (calibrate(table, 0.0), calibrate(table, 1.0)) == (table[0][1], table[-1][1])


@given(st.floats(0, 1))
def test_the_table_of_nothing_known_changes_nothing(raw: float) -> None:
    assert calibrate(SAME, raw) == raw


@given(tables())
def test_a_rising_table_is_accepted_as_it_is(table: list[list[float]]) -> None:
    assert checked(table) == table


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (None, "two rows"),
        ({"0": 1}, "two rows"),
        ([[0, 0]], "two rows"),
        ([[0, 0], [1]], "no pair"),
        ([[0, 0], [1, 1, 1]], "no pair"),
        ([[0, 0], 1], "no pair"),
        ([[0, 0], [1, "1"]], "no pair"),
        ([[0, 0], [1, True]], "no pair"),
        ([[0, 0], [1, 1.5]], "no pair"),
        ([[0, 0], [1, math.nan]], "no pair"),
        ([[0, 0], [0.5, 0.5], [0.5, 0.6]], "does not rise"),
        ([[0, 0.5], [1, 0.5]], "does not rise"),
        ([[0, 0.6], [1, 0.5]], "does not rise"),
    ],
)
def test_a_table_that_cannot_be_applied_is_refused_with_the_reason(table: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        checked(table)


# --- how good a confidence is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "weights", "expected"),
    [
        ([(1.0, 1.0), (0.0, 0.0)], [1, 1], 0.0),
        ([(1.0, 0.0), (0.0, 1.0)], [1, 1], 1.0),
        ([(0.8, 1.0), (0.8, 0.0)], [4, 1], 0.0),
        ([(0.8, 1.0), (0.8, 0.0)], [1, 1], 0.3),
        ([(0.65, 0.5), (0.35, 0.5)], [1, 3], 0.15),  # too sure in one bin does not make up for another
    ],
)
def test_the_calibration_error_is_the_distance_of_confidence_and_score_bin_by_bin(
    given: list[tuple[float, float]], weights: list[float], expected: float
) -> None:
    assert ece(given, weights, bins=10) == pytest.approx(expected)


def test_a_calibration_error_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        ece([], [])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([(0.9, 1.0), (0.1, 0.0)], 1.0),
        ([(0.1, 1.0), (0.9, 0.0)], 0.0),
        ([(0.5, 1.0), (0.5, 0.0)], 0.5),
        ([(0.9, 1.0), (0.5, 0.7), (0.1, 0.2)], 1.0),  # graded scores
        ([(0.9, 0.7), (0.5, 1.0), (0.1, 0.2)], 2 / 3),
        ([(0.9, 0.7), (0.5, 0.7), (0.1, 0.2)], 1.0),  # equal scores are not compared
    ],
)
def test_the_ranking_counts_pairs_in_the_same_order(given: list[tuple[float, float]], expected: float) -> None:
    found = auroc(given, [1.0] * len(given))
    assert found is not None
    assert found.auroc == pytest.approx(expected)


@pytest.mark.parametrize("given", [[], [(0.3, 1.0)], [(0.3, 1.0), (0.9, 1.0)], [(0.3, 0.5), (0.9, 0.5)]])
def test_without_two_different_scores_there_is_no_ranking(given: list[tuple[float, float]]) -> None:
    assert auroc(given, [1.0] * len(given)) is None


@given(pairs, weights)
def test_the_ranking_is_that_of_all_pairs_compared_one_by_one(
    given: list[tuple[float, float]], weights: list[float]
) -> None:
    weights = weights[: len(given)]
    hits = total = 0.0
    for (one, w), (other, v) in combinations(zip(given, weights, strict=True), 2):
        if one[1] != other[1]:
            turn = (one[0] - other[0]) * (one[1] - other[1])
            total += w * v
            hits += w * v * (0.5 if turn == 0 else turn > 0)
    found = auroc(given, weights)
    assert (found is None) == (total == 0)
    if found is not None:
        assert found.auroc == pytest.approx(hits / total, abs=1e-9)
        assert 0 <= found.lower <= found.auroc <= found.upper <= 1


@given(pairs, tables())
def test_a_rising_table_over_all_confidences_leaves_the_ranking_as_it_is(
    given: list[tuple[float, float]], table: list[list[float]]
) -> None:
    table[0][0], table[-1][0] = 0.0, 1.0
    after = [(calibrate(table, confidence), score) for confidence, score in given]
    assert auroc(after, [1.0] * len(given)) == auroc(given, [1.0] * len(given))


@settings(max_examples=20)
@given(st.integers(2, 9), st.integers(2, 9))
def test_a_perfect_order_of_few_pairs_claims_no_certainty(wrong: int, right: int) -> None:
    found = auroc([(0.1, 0.0)] * wrong + [(0.9, 1.0)] * right, [1.0] * (wrong + right))
    assert found is not None
    assert (found.auroc, found.upper) == (1.0, 1.0)
    assert found.lower < 0.9


def test_the_interval_is_delongs_where_scores_are_right_and_wrong() -> None:
    """Against the textbook: variances of the placements of right and of wrong answers, each over its count."""
    dice = Random(1)
    right = [dice.gauss(0.6, 0.15) for _ in range(300)]
    wrong = [dice.gauss(0.5, 0.15) for _ in range(100)]
    found = auroc([(c, 1.0) for c in right] + [(c, 0.0) for c in wrong], [1.0] * 400)
    assert found is not None
    of_right = [sum(other < c for other in wrong) / 100 for c in right]
    of_wrong = [sum(other > c for other in right) / 300 for c in wrong]
    spread = [sum((v - found.auroc) ** 2 for v in some) / len(some) ** 2 for some in (of_right, of_wrong)]
    assert (found.upper - found.lower) / (2 * 1.96) == pytest.approx(math.sqrt(sum(spread)), rel=0.02)


def test_the_interval_holds_about_as_often_as_it_says_also_with_unequal_weights() -> None:
    """Right answers have the confidence 1 - u^2, wrong ones u: the true AUROC is P(1 - u^2 > v) = 2/3."""
    dice, held = Random(7), 0
    for _ in range(300):
        given = [(1 - dice.random() ** 2, 1.0) for _ in range(90)] + [(dice.random(), 0.0) for _ in range(60)]
        found = auroc(given, [dice.choice([1.0, 4.0]) for _ in given])
        assert found is not None
        held += found.lower <= 2 / 3 <= found.upper
    assert 0.91 <= held / 300 <= 0.99
