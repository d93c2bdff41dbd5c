"""The table that turns raw confidences into chances, fitted on answers of students that had not learned the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apprentice import heads
from apprentice.calibration import SAME, Table, auroc, calibrate, ece
from apprentice.errors import MissingExtra
from apprentice.types import Json

try:
    import numpy as np
    from scipy.optimize import isotonic_regression
except ModuleNotFoundError as error:
    raise MissingExtra("scikit-learn" if error.name == "scipy" else "numpy", "embedded") from error

type _Rule = Callable[[Any, Any, Any], Table]  # raw confidences, whether they were right, weights

_ENOUGH = 300  # pairs from which isotonic regression is tried
_TILT = 0.01  # every table rises by at least this much over its length: no two confidences become one
_APART = 0.001  # between the raw values of two rows
_ROWS = 32
_KNOTS = (0.001, 0.003, 0.01, 0.03, *(step / 16 for step in range(1, 16)), 0.97, 0.99, 0.997, 0.999)  # of a curve


def calibration(found: heads.OutOfFold | None, weights: Any, folds: Any) -> tuple[Table, dict[str, Json]]:
    """The table for raw confidences; by what rule, and its quality on rows of a fold that it was not fitted on.

    Platt scaling; from 300 rows on isotonic regression, where its Brier score is better by two standard errors. Always
    taken, it made the calibration error on unseen rows of banking77 larger, by .01 on average at 500 and 2,000 rows.
    """
    if found is None:
        return SAME, {}
    raw, right = np.clip(found.confidence, 0, 1), found.right.astype(float)

    def held_out(rule: _Rule) -> Any:
        chances = np.zeros(len(raw))
        for part in np.unique(folds):
            inside = folds != part
            table = rule(raw[inside], right[inside], weights[inside])
            chances[~inside] = [calibrate(table, float(value)) for value in raw[~inside]]
        return chances

    name, rule, chances = "platt", _platt, held_out(_platt)
    if len(raw) >= _ENOUGH:
        other = held_out(_isotonic)
        gain = weights * ((chances - right) ** 2 - (other - right) ** 2)
        if gain.mean() > 2 * gain.std() / np.sqrt(len(gain)):
            name, rule, chances = "isotonic", _isotonic, other
    pairs = list(zip(chances.tolist(), right.tolist(), strict=True))
    ranking = auroc(pairs, weights.tolist())
    quality = {"rule": name, "ece": ece(pairs, weights.tolist()), "auroc": ranking.auroc if ranking else None}
    return rule(raw, right, weights), {"calibration": quality}


def _platt(raw: Any, right: Any, weights: Any) -> Table:
    slope, offset = heads.weigh(_log_odds(raw), right, weights)
    knots = np.array([0.0, *_KNOTS, 1.0])
    return _rising(knots, 1 / (1 + np.exp(-slope * _log_odds(knots) - offset)))


def _log_odds(chances: Any) -> Any:
    chances = np.clip(chances, 1e-6, 1 - 1e-6)
    return np.log(chances) - np.log1p(-chances)


def _isotonic(raw: Any, right: Any, weights: Any) -> Table:
    """Lines between the centres of the blocks (Zadrozny & Elkan, KDD 2002, give each block one value).

    One right answer without confidence and one wrong one with all of it are added: nothing is ever certain.
    """
    raw, right, weights = np.append(raw, [0, 1]), np.append(right, [1, 0]), np.append(weights, [1, 1])
    place = np.unique(raw, return_inverse=True)[1]  # rows of one confidence are one
    mass = np.bincount(place, weights)
    rising = isotonic_regression(np.bincount(place, weights * right) / mass, weights=mass).x
    levels, block = np.unique(rising[place].round(9), return_inverse=True)
    centres = np.bincount(block, weights * raw) / np.bincount(block, weights)
    some = np.unique(np.linspace(0, len(levels) - 1, _ROWS).round().astype(int))
    levels, centres = levels[some], centres[some]
    return _rising(np.array([0, *centres, 1]), np.array([levels[0], *levels, levels[-1]]))


def _rising(raw: Any, chances: Any) -> Table:
    """A table from a curve that never falls, over [0, 1]: rows that lie too close are left out, and all is tilted."""
    rows = [[0.0, float(chances[0])]]
    for x, y in zip(raw.tolist()[1:-1], chances.tolist()[1:-1], strict=True):
        if rows[-1][0] + _APART <= x <= 1 - _APART:
            rows.append([x, y])
    rows.append([1.0, float(chances[-1])])
    return [[round(x, 6), round((1 - _TILT) * y + _TILT * x, 6)] for x, y in rows]
