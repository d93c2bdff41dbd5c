"""PURE: what is known of a task, as people see it: the agreement with its bounds, and every detector."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import StatisticsError, correlation, fmean

from apprentice.bounds import interval, middle
from apprentice.confidence import Settings, State, standing
from apprentice.types import Confidence


def summary(state: State, settings: Settings) -> Confidence:
    """Everything that can be said of the task: `standing`, the agreement with its bounds, and every detector.

    The bounds form a confidence sequence over the audits of this version: with probability 1 - alpha they hold at every
    moment at once. They speak of the average since the version started; whether it is good *now* is what `drift` says.
    """
    now = standing(state, settings)
    if state.version is None:
        return now
    if state.drift == "none" and (state.burst or max(fmean(m) for m in (state.contract, state.guard, state.trend)) > 5):
        now = now.model_copy(update={"drift": "suspected"})
    lower, upper = interval(state.low, state.high, settings.alpha) if state.audits else (None, None)
    detail = {
        "contract": fmean(state.contract),
        "guard": fmean(state.guard),
        "trend": fmean(state.trend),
        "emergency": fmean(state.emergency),
        "coaching": fmean(state.coaching),
        "answers_concordance": fmean(state.answers),
        "confidence_concordance": fmean(state.ranking),
        "input_shift": state.shift,
        "burst": float(state.burst),
    }
    for level, row in zip(settings.levels, state.wealth, strict=False):
        detail[f"certificate_{level:g}"] = fmean(row)
    detail |= _correlations("answers", state.numbers)
    detail |= _correlations("confidence", list(zip(state.surety, state.window, strict=True)))
    if sum(state.repeats_low):
        detail["repeat_lower"], detail["repeat_upper"] = interval(state.repeats_low, state.repeats_high, settings.alpha)
    everything = _weighted(state, 0)
    if everything is not None:
        detail["agreement_all"] = everything
    return now.model_copy(
        update={
            "agreement": middle(state.low, state.high) if state.audits else None,
            "ceiling": middle(state.repeats_low, state.repeats_high) if sum(state.repeats_low) else None,
            "lower": lower,
            "upper": upper,
            "window": fmean(state.window) if state.window else None,
            "served_agreement": _weighted(state, state.rung),
            "detail": detail,
        }
    )


def _correlations(of: str, pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of the last pairs, to be shown: far too noisy to act on."""
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    try:
        straight, ranked = correlation(first, second), correlation(first, second, method="ranked")
    except StatisticsError:  # fewer than two, or all the same: there is none
        return {}
    return {f"{of}_pearson": straight, f"{of}_spearman": ranked}


def _weighted(state: State, rung: int) -> float | None:
    """Agreement over the requests at or above a level's threshold, from every label whose probability is known.

    Each band of confidence weighs as much as it had requests, labelled or not (post-stratified Hajek); deferrals alone
    would speak for the hard requests only.
    """
    weight, hits = sum(state.weight[rung:]), sum(state.hits[rung:])
    if weight <= 0:
        return None
    pooled = hits / weight
    total = mass = 0.0
    for seen, w, h in zip(state.seen[rung:], state.weight[rung:], state.hits[rung:], strict=True):
        total += seen * (h / w if w > 0 else pooled)
        mass += seen
    return total / mass if mass else pooled
