"""How near two numbers are."""

from __future__ import annotations

import math

from apprentice.errors import ConfigError
from apprentice.evaluators import field as field_of
from apprentice.evaluators import fields_of, gap
from apprentice.types import Evaluator, Json, Score


def build(tolerance: float = 0.0, scale: float | None = None, field: str | None = None) -> Evaluator:
    """max(0, 1 - |answer - reference| / scale), and 1 within the tolerance. Symmetric. What is no number scores 0.

    `field`: the path of the number (`a.b` is b within a); without it the answer is the number itself, or an object of
    numbers, whose mean counts, with each field's score in `fields`. Without a `scale`, what is beyond the tolerance
    scores 0.
    Raises ConfigError for a negative tolerance and for a scale that is not above 0.
    """
    if not 0 <= tolerance < math.inf:
        raise ConfigError("evaluator 'numeric': tolerance should be a number of at least 0")
    if scale is not None and not 0 < scale < math.inf:
        raise ConfigError("evaluator 'numeric': scale should be a number above 0")

    def nearness(answer: Json, reference: Json) -> float:
        distance = gap(answer, reference)
        if distance <= tolerance:
            return 1.0
        return 0.0 if scale is None else max(0.0, 1.0 - distance / scale)

    async def evaluate(answer: Json, reference: Json) -> Score:
        if field is None and not (isinstance(answer, dict) and isinstance(reference, dict)):
            return Score(value=nearness(answer, reference))
        paths = [field] if field is not None else fields_of(answer, reference, None)
        scores = {path: nearness(field_of(answer, path), field_of(reference, path)) for path in paths}
        return Score(value=sum(scores.values()) / len(scores) if scores else 0.0, fields=scores)

    return evaluate
