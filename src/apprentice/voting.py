"""PURE: several answers to one question -> the one that most give, and how far they agree.

Outputs are equal where their canonical texts are. Where every answer is an object, each field is voted on by itself, so
that the right parts of answers that are wrong elsewhere come together.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

from apprentice.fields import ABSENT, symbol_of
from apprentice.types import Json

FORMAT = "apprentice-ensemble-1"
"""Of a checkpoint that holds the checkpoints of those who vote."""

_UNSAID = 0.5  # how sure one is taken to be who does not say it


class Ballot(NamedTuple):
    """A valid answer, and how sure its giver was of it, in [0, 1]; None: that was not said."""

    output: Json
    confidence: float | None = None


class Outcome(NamedTuple):
    """What was elected, and the share of all voters, each counting as much as it was sure, who are for it, in [0, 1]."""

    output: Json
    agreement: float


def vote(
    ballots: Sequence[Ballot | None],
    fits: Callable[[Json], bool] = lambda _: True,
    counted: Container[str] | None = None,
) -> Outcome | None:
    """The output with the most weight behind it; None where nobody has an answer.

    None for a voter who has none: it is for nothing, but one of all. A ballot weighs as much as its giver was sure; of
    equal ones the earlier wins. An object put together from fields is elected only if `fits` says that it is an answer,
    else one of the ballots as a whole is; of its fields the least agreed counts, of those `counted` (None: all).

    >>> vote([Ballot("spam", 0.9), Ballot("ham", 0.5), Ballot("spam", 0.6)])
    Outcome(output='spam', agreement=0.5)
    """
    valid = [ballot for ballot in ballots if ballot is not None]
    if not valid:
        return None
    if all(isinstance(ballot.output, dict) for ballot in valid):
        names = list(dict.fromkeys(name for ballot in valid for name in ballot.output))
        fields = {name: _elected(valid, len(ballots), name) for name in names}
        output = {name: found.output for name, found in fields.items() if found.output is not _LEFT_OUT}
        least = [found.agreement for name, found in fields.items() if counted is None or name in counted]
        if any(symbol_of(output) == symbol_of(ballot.output) for ballot in valid) or fits(output):
            return Outcome(output, min(least, default=_elected(valid, len(ballots)).agreement))
    return _elected(valid, len(ballots))


_LEFT_OUT = object()  # stands for the value of a field that an answer lacks


def _elected(valid: Sequence[Ballot], voters: int, name: str | None = None) -> Outcome:
    weights: dict[str, float] = {}
    values: dict[str, Json] = {}
    for output, confidence in valid:
        value = output if name is None else output.get(name, _LEFT_OUT)
        symbol = ABSENT if value is _LEFT_OUT else symbol_of(value)
        weights[symbol] = weights.get(symbol, 0.0) + (_UNSAID if confidence is None else confidence)
        values.setdefault(symbol, value)
    best = max(weights, key=lambda symbol: weights[symbol])
    return Outcome(values[best], min(weights[best] / voters, 1.0))
