"""Bounds that may be looked at after every score: they hold the mean, and narrow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from apprentice.bounds import CELLS, interval, middle, tally


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=200))
def test_the_interval_holds_the_mean_and_narrows_with_repetition(scores: list[float]) -> None:
    counts = [0] * (CELLS + 1)
    for score in scores:
        counts[round(score * CELLS)] += 1
    low, high = interval(counts, counts, 0.05)
    assert low <= sum(scores) / len(scores) <= high
    more_low, more_high = interval([n * 4 for n in counts], [n * 4 for n in counts], 0.05)
    assert more_low >= low - 1e-6
    assert more_high <= high + 1e-6


@given(st.lists(st.floats(0, 1), min_size=1, max_size=100))
def test_scores_between_the_steps_are_counted_on_the_safe_side_of_either_bound(scores: list[float]) -> None:
    low, high = [0] * (CELLS + 1), [0] * (CELLS + 1)
    for score in scores:
        tally(low, high, score)
    mean = sum(scores) / len(scores)
    below, above = (sum(i * n for i, n in enumerate(counts)) / CELLS / len(scores) for counts in (low, high))
    assert below <= mean + 1e-6
    assert above >= mean - 1e-6
    assert abs(middle(low, high) - mean) <= 0.5 / CELLS + 1e-6
