"""A function of the user's own."""

from __future__ import annotations

import inspect
import math

from apprentice.errors import ConfigError
from apprentice.schemas import imported
from apprentice.types import Evaluator, Json, Score


def build(function: str) -> Evaluator:
    """What `module:function` says of (answer, reference): a number from 0 to 1, or a Score. Sync or async.

    A sync function runs on the event loop, so it should be quick. Whether it is symmetric is up to its author.
    Raises ConfigError here when it cannot be imported, and when called for a result that is no score and for a function
    that fails.
    """
    try:
        judge = imported(function)
    except ConfigError as error:
        raise ConfigError(f"evaluator 'custom', setting 'function': {error}", hint=error.hint) from error
    if not callable(judge):
        raise ConfigError(f"evaluator 'custom', setting 'function': {function!r} is not a function")

    async def evaluate(answer: Json, reference: Json) -> Score:
        try:
            result = judge(answer, reference)
            if inspect.isawaitable(result):
                result = await result
        except Exception as error:
            raise ConfigError(f"the evaluator {function!r} failed: {type(error).__name__}: {error}") from error
        if isinstance(result, Score):
            return result
        if isinstance(result, int | float) and math.isfinite(result) and 0 <= result <= 1:
            return Score(value=float(result))
        raise ConfigError(f"the evaluator {function!r} returned {result!r}; should be a number from 0 to 1, or a Score")

    return evaluate
