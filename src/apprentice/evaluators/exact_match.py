"""Equal or not, as JSON."""

from __future__ import annotations

from apprentice.evaluators import same
from apprentice.types import Evaluator, Json, Score


def build(fold: bool = False) -> Evaluator:
    """1 for equal JSON values, else 0. Symmetric.

    `fold`: whether texts are equal that differ only in case or in the amount of white space.
    """

    async def evaluate(answer: Json, reference: Json) -> Score:
        return Score(value=float(same(answer, reference, fold=fold)))

    return evaluate
