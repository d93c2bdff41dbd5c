"""Evaluators: (answer, reference) -> Score. What they share: when two JSON values are the same, and where a field is.

Answers come from models, so nothing here trusts their shape, size or depth: no recursion, no conversion that overflows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from apprentice.types import Json


def same(left: Json, right: Json, *, fold: bool = False) -> bool:
    """Whether two JSON values are equal: 1 equals 1.0, true does not equal 1, the order of keys does not matter.

    With `fold`, texts are compared without regard to case and to the amount of white space.

    >>> same({"a": 1, "b": [True]}, {"b": [True], "a": 1.0})
    True
    """
    pairs = [(left, right)]  # a stack of its own, because an answer may be nested deeper than Python recurses
    while pairs:
        a, b = pairs.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                return False
            pairs.extend((value, b[key]) for key, value in a.items())
        elif isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                return False
            pairs.extend(zip(a, b, strict=True))
        elif scalar(a, fold=fold) != scalar(b, fold=fold):
            return False
    return True


def scalar(value: Json, *, fold: bool = False) -> tuple[str, object]:
    """A key that is equal for the same scalars only; a list or an object is equal to nothing but itself."""
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int | float):
        return ("nan", None) if value != value else ("number", value)  # only a NaN differs from itself
    if isinstance(value, str):
        return "text", " ".join(value.casefold().split()) if fold else value
    return ("null", None) if value is None else (type(value).__name__, id(value))


def field(value: Json, path: str) -> Json:
    """The value at `a.b`, that is b within a; None where there is none.

    >>> field({"a": {"b": 3}}, "a.b")
    3
    """
    for part in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def fields_of(answer: Mapping[str, Json], reference: Mapping[str, Json], chosen: Iterable[str] | None) -> list[str]:
    """The chosen paths; without a choice all keys that either side has, those of the reference first."""
    return list(chosen) if chosen is not None else list(dict.fromkeys([*reference, *answer]))


def gap(left: Json, right: Json) -> float:
    """How far two numbers are apart: 0 for the same, inf where one is no number or does not fit a float."""
    if not all(isinstance(side, int | float) and not isinstance(side, bool) for side in (left, right)):
        return math.inf
    if same(left, right):
        return 0.0
    try:
        distance = abs(float(left) - float(right))
    except OverflowError:
        return math.inf
    return math.inf if math.isnan(distance) else distance
