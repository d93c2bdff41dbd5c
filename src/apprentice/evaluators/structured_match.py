"""The share of fields that match."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from apprentice.errors import ConfigError
from apprentice.evaluators import field, fields_of, same, scalar
from apprentice.types import Evaluator, Json, Score

type Lists = Literal["f1", "jaccard", "exact"]


def build(
    match_fields: list[str] | None = None, weights: dict[str, float] | None = None, lists: Lists = "f1"
) -> Evaluator:
    """The weighted mean of the fields' scores, with each field's score in `fields`. Symmetric.

    A field scores 1 when it is the same on both sides, else 0; a list of scalars by how much of it is shared, in any
    order. A field that is missing is the same as one that is null.

    `match_fields`: the paths that count (`a.b` is b within a); without them, all keys that either side has.
    `weights`: by path, 1 where left out. `lists`: f1 and jaccard give part of the score for a part of a list.
    Raises ConfigError for a weight that is negative or belongs to no field.
    """
    weights = weights or {}
    for path, weight in weights.items():
        if match_fields is not None and path not in match_fields:
            raise ConfigError(f"evaluator 'structured_match': weights.{path} is not one of match_fields")
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"evaluator 'structured_match': weights.{path} should be a number of at least 0")
    if match_fields is not None and not sum(weights.get(path, 1.0) for path in match_fields):
        raise ConfigError("evaluator 'structured_match': match_fields should have a field with a weight above 0")

    async def evaluate(answer: Json, reference: Json) -> Score:
        if not isinstance(answer, dict) or not isinstance(reference, dict):
            return Score(value=float(same(answer, reference)))
        paths = fields_of(answer, reference, match_fields)
        scores = {path: _similarity(field(answer, path), field(reference, path), lists) for path in paths}
        total = sum(weights.get(path, 1.0) for path in paths)
        if not total:
            return Score(value=float(same(answer, reference)), fields=scores)
        value = sum(score * weights.get(path, 1.0) for path, score in scores.items()) / total
        return Score(value=min(1.0, value), fields=scores)

    return evaluate


def _similarity(left: Json, right: Json, lists: Lists) -> float:
    if same(left, right):
        return 1.0
    if lists == "exact" or not _is_set(left) or not _is_set(right):
        return 0.0
    ours, theirs = Counter(map(scalar, left)), Counter(map(scalar, right))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if lists == "f1" else shared / (ours | theirs).total()


def _is_set(value: Json) -> bool:
    return isinstance(value, list) and not any(isinstance(item, list | dict) for item in value)
