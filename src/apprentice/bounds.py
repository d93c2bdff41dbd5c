"""PURE: bounds of a mean that hold at every moment at once, from counts alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

CELLS = 20
"""Scores are counted on a grid of this many steps from 0 to 1."""
_BETS = (0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.7, 0.9)  # as shares of the largest bet


def tally(low: list[int], high: list[int], score: float) -> None:
    """Count a score on the grid of `interval`, rounded to the safe side for either bound."""
    low[math.floor(score * CELLS + 1e-9)] += 1
    high[math.ceil(score * CELLS - 1e-9)] += 1


def middle(low: Sequence[int], high: Sequence[int]) -> float:
    """The mean of the counted scores, of which there is at least one."""
    return sum(i * (down + up) for i, (down, up) in enumerate(zip(low, high, strict=True))) / (2 * CELLS * sum(low))


def interval(low: Sequence[int], high: Sequence[int], alpha: float) -> tuple[float, float]:
    """Bounds of a mean of scores in [0, 1] that hold at every moment at once with probability 1 - alpha.

    `low` and `high` count the scores on an even grid from 0 to 1, rounded down and up. A bet against the mean m
    multiplies by 1 - c + c x / m; the mixture over c is a martingale when m is the mean, and does not depend on the
    order of the scores, so that counts are all that need be kept (betting confidence sequence, arXiv 2010.09686).

    >>> tuple(round(bound, 2) for bound in interval([10, 90], [10, 90], 0.05))
    (0.78, 0.97)
    """
    return _lowest(low, alpha / 2), 1 - _lowest(list(reversed(high)), alpha / 2)


def _lowest(counts: Sequence[int], alpha: float) -> float:
    """The largest m that the scores refute as their mean from below; 0 when none is."""
    cells = len(counts) - 1
    wanted = math.log(len(_BETS) / alpha)
    kept = [(i / cells, n) for i, n in enumerate(counts) if n]
    below, above = 0.0, 1.0
    for _ in range(24):
        mean = (below + above) / 2
        growth = [sum(n * math.log1p(c * (x / mean - 1)) for x, n in kept) for c in _BETS]
        top = max(growth)
        if top + math.log(sum(math.exp(g - top) for g in growth)) >= wanted:
            below = mean
        else:
            above = mean
    return below
