"""Who answers a request, who else is asked, and with what probability that was drawn.

Pure: the state of the task comes in as a `Confidence`, chance as a number. The probability of an audit is fixed before
the input is read, and the coin knows nothing of it; that is what makes audits an unbiased sample.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo

from apprentice.types import Confidence, Decision, Event, Seconds, Version

_ALONE = Decision(route="remote", reason="no_local_model", p=0.0, phase="cold_start")


def decide(
    confidence: Confidence, *, has_local: bool, forced_remote: bool = False, remote_allowed: bool = True, coin: float
) -> Decision:
    """Who is asked first, before the input is read. `coin` is uniform in [0, 1) and drawn for this request alone.

    `p` is 0 where no comparison can come about: without a local model, without the remote, or by force.
    """
    level, threshold, phase = confidence.level, confidence.threshold, confidence.phase
    if not has_local:
        return _ALONE
    if not remote_allowed:
        return Decision(route="local", reason="budget", p=0.0, level=level, threshold=threshold, phase=phase)
    if forced_remote:
        return Decision(route="remote", reason="forced", p=0.0, level=level, threshold=threshold, phase=phase)
    if level >= 1:
        return Decision(route="both", reason="learning", p=1.0, audit=True, phase=phase)
    p = confidence.sampling_rate
    if coin < p:
        return Decision(route="both", reason="audit", p=p, audit=True, level=level, threshold=threshold, phase=phase)
    return Decision(route="local", reason="certified", p=p, level=level, threshold=threshold, phase=phase)


def try_out(decision: Decision, confidence: Confidence, *, coin: float) -> Decision:
    """The decision with the canary in the champion's place, for its share of what the champion would answer alone.

    `coin` is another one than that of the audit, so that audits remain a sample of all requests.
    """
    if decision.reason != "certified" or coin >= confidence.canary_share:
        return decision
    return decision.model_copy(update={"reason": "canary", "threshold": confidence.canary_threshold})


def defer(decision: Decision, confidence_of_answer: float | None, *, valid: bool) -> Decision:
    """The decision after the local answer: the remote as well, where that answer is invalid or not sure enough.

    An answer without a confidence counts as the least sure where a threshold is in force. Nothing changes where the
    remote is asked anyway, nor where the budget keeps it from being asked.
    """
    if decision.route != "local" or decision.reason == "budget":
        return decision
    if not valid:
        return decision.model_copy(update={"route": "both", "reason": "local_invalid"})
    threshold = decision.threshold
    if threshold is not None and (confidence_of_answer is None or confidence_of_answer < threshold):
        return decision.model_copy(update={"route": "both", "reason": "deferred"})
    return decision


def floor_for_delay(delay: float, drop: float) -> float:
    """The `min_floor` that notices, in 95 of 100 cases within `delay` requests, that a share `drop` is served wrong.

    For drops of 0.3 and more; measured, see docs: p95 is about 4 / (floor x drop).

    >>> floor_for_delay(500, 0.4)
    0.02
    """
    _positive(delay, drop)
    return min(4 / (delay * drop), 1.0)


def delay_for(floor: float, drop: float) -> float:
    """Requests until such a drop is noticed, in 95 of 100 cases, at this `min_floor`.

    >>> delay_for(0.02, 0.4)
    500.0
    """
    _positive(floor, drop)
    return 4 / (floor * drop)


def promise(floor: float, theta: float) -> str:
    """One sentence for the start-up log: what the configured floor and threshold mean in requests.

    >>> promise(0.02, 0.85)
    'served agreement of 85% is promised; a drop to 60% is noticed within about 500 requests, one to 25% within 267'
    """
    sentence = f"served agreement of {theta:.0%} is promised; a drop to 60% is noticed within about "
    return sentence + f"{delay_for(floor, 0.4):.0f} requests, one to 25% within {delay_for(floor, 0.75):.0f}"


def _positive(first: float, drop: float) -> None:
    if first <= 0 or not 0 < drop <= 1:
        raise ValueError(f"{first!r} must be above 0 and the drop {drop!r} in (0, 1]")


URGENT = frozenset({"ALARM", "EMERGENCY", "ANTI_CORRELATED", "TIGHTEN", "COACHING", "TEACHER_CHANGED"})
"""Events after which the version in force should be replaced soon."""


def is_urgent(versions: Sequence[Version], events: Sequence[Event]) -> bool:
    """Whether one of URGENT happened since the last version was promoted."""
    promoted = max((version.promoted_at for version in versions if version.promoted_at is not None), default=0.0)
    return any(event.name in URGENT and event.at > promoted for event in events)


def needs_training(new_examples: int, trained_on: int, batch_size: int, first: int, *, urgent: bool = False) -> bool:
    """Whether enough has been learned since the last version for a new one to be worth examining.

    The first version waits for `first` examples, the next ones for `batch_size` new ones or two fifths more than
    before, whichever is more: each version starts its evidence anew, so a late one must bring enough to pay for that.
    `urgent` (one of URGENT was said of the version in force): the batch is enough.

    >>> needs_training(100, 200, 100, 50), needs_training(100, 1000, 100, 50)
    (True, False)
    >>> needs_training(100, 1000, 100, 50, urgent=True)
    True
    """
    if trained_on == 0:
        return new_examples >= first
    return new_examples >= (batch_size if urgent else max(batch_size, 0.4 * trained_on))


_MONTHS = {"monthly": 1, "quarterly": 3}
_DAYS = re.compile(r"every ([1-9][0-9]{0,3})d", re.ASCII)


def scheduled(schedule: str | None, last: Seconds | None, now: Seconds, zone: tzinfo = UTC) -> bool:
    """Whether the next cycle of a schedule is due: "monthly", "quarterly", or "every 30d"; None is never due.

    `last`: when the last cycle ended; without one nothing is due, for the first version waits for examples. A month
    later is the same day and time on the clocks of `zone`, or the month's last day where it has no such day; a day is 24
    hours. Raises ValueError for what is no schedule.

    >>> january = datetime(2027, 1, 31, tzinfo=UTC).timestamp()
    >>> [scheduled("monthly", january, datetime(2027, 2, day, tzinfo=UTC).timestamp()) for day in (27, 28)]
    [False, True]
    """
    if schedule is None or last is None:
        return False
    if schedule in _MONTHS:
        return now >= _months_later(last, _MONTHS[schedule], zone)
    if (days := _DAYS.fullmatch(schedule)) is None:
        raise ValueError(f"{schedule!r} is no schedule such as 'monthly', 'quarterly' or 'every 30d'")
    return now >= last + timedelta(days=int(days[1])).total_seconds()


def _months_later(moment: Seconds, months: int, zone: tzinfo) -> Seconds:
    before = datetime.fromtimestamp(moment, zone)
    years, month = divmod(before.month - 1 + months, 12)
    year = before.year + years
    day = min(before.day, calendar.monthrange(year, month + 1)[1])
    return before.replace(year=year, month=month + 1, day=day).timestamp()
