"""Functions that a user might name in `evaluator: {name: custom, function: …}`."""

from __future__ import annotations

from typing import Any

from apprentice.evaluators import same
from apprentice.types import Json, Score

NOT_A_FUNCTION = 5


def overlap(answer: Json, reference: Json) -> float:
    if not isinstance(answer, dict) or not isinstance(reference, dict):
        return float(same(answer, reference))
    keys = answer.keys() | reference.keys()
    return sum(same(answer.get(key), reference.get(key)) for key in keys) / len(keys) if keys else 1.0


async def patient(answer: Json, reference: Json) -> Score:
    return Score(value=0.25, fields={"tone": 0.25})


def exact(answer: Json, reference: Json) -> bool:
    return bool(answer == reference)


def percent(answer: Json, reference: Json) -> float:
    return 85.0


def words(answer: Json, reference: Json) -> Any:
    return "good"


def unnumbered(answer: Json, reference: Json) -> float:
    return float("nan")


def failing(answer: Json, reference: Json) -> float:
    return float(answer["nowhere"])
