"""PURE: hold-out results -> promote or reject, and how a task's rows are split to get them."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from apprentice.types import Json

HOLDOUT_SHARE = 10  # one input in ten is held out


class Screening(NamedTuple):
    """Whether a candidate may take the champion's place, and why, with the numbers that decided it."""

    promote: bool
    reason: str
    candidate: float
    champion: float | None
    n: int


def screen(candidate: Sequence[float], champion: Sequence[float] | None) -> Screening:
    """Promote unless the candidate is worse than the champion by more than two standard errors.

    Both are scores in [0, 1] on the same held-out inputs, in the same order. This only screens: the hold-out is used again
    and again, so it certifies nothing. Quality is certified on the stream, by the new version's own certificate.

    >>> screen([1.0, 1.0, 0.0, 1.0], None).promote
    True
    >>> screen([0.0] * 50, [1.0] * 50).promote
    False
    """
    mean = fmean(candidate) if candidate else 0.0
    if champion is None:
        return Screening(True, "there is no version before it", mean, None, len(candidate))
    if len(candidate) != len(champion):
        raise ValueError("both need a score for each held-out input")
    before = fmean(champion) if champion else 0.0
    differences = [new - old for new, old in zip(candidate, champion, strict=True)]
    if len(differences) < 2:
        return Screening(True, "too few held-out rows to tell them apart", mean, before, len(differences))
    error = stdev(differences) / math.sqrt(len(differences))
    loss = -fmean(differences)
    if loss > 2 * error and loss > 0:
        reason = f"worse than the champion by {loss:.3f} on {len(differences)} held-out rows (allowed: {2 * error:.3f})"
        return Screening(False, reason, mean, before, len(differences))
    return Screening(True, "not worse than the champion on the held-out rows", mean, before, len(differences))


def fingerprint(input: Json) -> str:
    """The same for inputs that differ only in case, white space or Unicode form; 64 hex digits.

    >>> fingerprint({"text": "Where is  my card?"}) == fingerprint({"text": "where is my card?"})
    True
    """
    text = json.dumps(_normal(input), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _normal(value: Json) -> Json:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    return [_normal(item) for item in value] if isinstance(value, list) else value


def held_out(print_of_input: str) -> bool:
    """Whether an input of this fingerprint is kept from training: one in ten, for ever, however the data grows."""
    return int(print_of_input[:8], 16) % HOLDOUT_SHARE == 0
