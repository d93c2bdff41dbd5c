"""PURE: raw confidence -> chance of agreement, by a table; and how good a confidence is, from pairs with a score.

A *pair* is (confidence, score), both in [0, 1]; its weight is 1/probability that the score was asked for.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from apprentice.types import Json

type Table = Sequence[Sequence[float]]  # rows [raw, calibrated], both strictly rising within [0, 1]
type Pairs = Sequence[tuple[float, float]]

SAME: Table = ((0.0, 0.0), (1.0, 1.0))  # changes nothing
_Z = 1.96  # of a two-sided interval of 95 %


class Ranking(NamedTuple):
    """AUROC with a 95 % interval: 1 where every better answer was given with more confidence, 1/2 for chance."""

    auroc: float
    lower: float
    upper: float


def checked(table: Json) -> Table:
    """The table if it can be applied. Raises ValueError that says what is wrong with it."""
    if not isinstance(table, list | tuple) or len(table) < 2:
        raise ValueError("a table of calibration needs two rows or more")
    for row in table:
        numbers = isinstance(row, list | tuple) and all(type(value) in (int, float) for value in row)
        if not numbers or len(row) != 2 or not all(0 <= value <= 1 for value in row):
            raise ValueError(f"{row!r} is no pair of numbers from 0 to 1")
    for before, after in pairwise(table):
        if not (before[0] < after[0] and before[1] < after[1]):
            raise ValueError(f"{list(after)!r} does not rise above {list(before)!r}")
    return table


def calibrate(table: Table, s: float) -> float:
    """The calibrated value of a raw confidence: linear between two rows, beyond the last row that row's value.

    >>> table = [[0.25, 0.5], [0.75, 1.0]]
    >>> calibrate(table, 0.5), calibrate(table, 0.1)
    (0.75, 0.5)
    """
    place = bisect_right(table, s, key=lambda row: row[0])
    if place in (0, len(table)):
        return table[max(place - 1, 0)][1]
    (left, low), (right, high) = table[place - 1], table[place]
    return min(low + (high - low) * ((s - left) / (right - left)), high)


def ece(pairs: Pairs, weights: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error, in [0, 1]: how far confidence and mean score lie apart, averaged over even bins.

    By chance alone it is above 0, and the more so the fewer pairs there are. Raises ValueError without any weight.
    Naeini, Cooper & Hauskrecht, Obtaining well calibrated probabilities using Bayesian binning, AAAI 2015.

    >>> round(ece([(0.9, 1.0), (0.9, 0.0), (0.2, 0.0)], [1, 1, 2], bins=10), 3)
    0.3
    """
    total = math.fsum(weights)
    if total <= 0:
        raise ValueError("a calibration error needs a pair with a weight")
    away = [0.0] * bins
    for (confidence, score), weight in zip(pairs, weights, strict=True):
        away[min(int(confidence * bins), bins - 1)] += weight * (confidence - score)
    return math.fsum(map(abs, away)) / total


def auroc(pairs: Pairs, weights: Sequence[float]) -> Ranking | None:
    """How well confidence ranks scores: the weighted share of two pairs of unequal score that it puts in the same order.

    A tie of confidence counts one half; None where all scores are equal. Scores of 0 and 1 make it the area under the
    ROC curve. The interval is DeLong's (DeLong, DeLong & Clarke-Pearson, Biometrics 44, 1988) as an infinitesimal
    jackknife, which takes weights and grades; one more row that says nothing keeps it open where the order is perfect.

    >>> auroc([(0.9, 1.0), (0.6, 0.0), (0.6, 1.0), (0.1, 0.0)], [1, 1, 1, 1]).auroc
    0.875
    """
    same, different = _concordance(pairs, weights)
    twice = math.fsum(map(math.prod, zip(weights, different, strict=True)))  # each two pairs from both their sides
    if twice <= 0:
        return None
    value = min(max(math.fsum(map(math.prod, zip(weights, same, strict=True))) / twice, 0.0), 1.0)
    shares = [2 * weight * other / twice for weight, other in zip(weights, different, strict=True)]
    pulls = [2 * w * (s - value * d) / twice for w, s, d in zip(weights, same, different, strict=True)]
    error = math.hypot(*pulls, max(shares) * (value - 0.5))
    return Ranking(value, max(value - _Z * error, 0.0), min(value + _Z * error, 1.0))


def _concordance(pairs: Pairs, weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """For each pair the weight of the others that stand to it as their scores do, and of all with another score."""
    ranks = {score: rank for rank, score in enumerate(sorted({score for _, score in pairs}), start=1)}
    of_score = [0.0] * (len(ranks) + 1)
    for (_, score), weight in zip(pairs, weights, strict=True):
        of_score[ranks[score]] += weight
    up_to = list(accumulate(of_score))
    same = [0.0] * len(pairs)
    passed = _Sums(len(ranks))  # the weight of those with less confidence, by rank of score

    def balance(rank: int) -> float:
        """Of those passed: with a lower score, less those with a higher one."""
        return passed.up_to(rank - 1) + passed.up_to(rank) - passed.up_to(len(ranks))

    groups: dict[float, list[int]] = {}
    for place, (confidence, _) in enumerate(pairs):
        groups.setdefault(confidence, []).append(place)
    for confidence in sorted(groups):
        tied = [(place, ranks[pairs[place][1]]) for place in groups[confidence]]
        for place, rank in tied:
            same[place] = up_to[-1] - up_to[rank] + balance(rank) / 2
        for place, rank in tied:
            passed.add(rank, weights[place])
        for place, rank in tied:  # ties count as passed for one half
            same[place] += balance(rank) / 2
    return same, [up_to[-1] - of_score[ranks[score]] for _, score in pairs]


class _Sums:
    """Sums of the first so many places, kept while places grow (P. Fenwick, Software: Practice & Experience 24, 1994)."""

    def __init__(self, size: int) -> None:
        self._tree = [0.0] * (size + 1)

    def add(self, place: int, weight: float) -> None:
        while place < len(self._tree):
            self._tree[place] += weight
            place += place & -place

    def up_to(self, place: int) -> float:
        total = 0.0
        while place:
            total += self._tree[place]
            place &= place - 1
        return total
