"""Who answers: tables of states, and what must hold for every one of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.decide import decide, defer, delay_for, floor_for_delay, is_urgent, needs_training, promise, try_out
from apprentice.types import Confidence, Event, Version

STEADY = Confidence(phase="steady", version="v1", level=0.2, threshold=0.4, sampling_rate=0.1)
LEARNING = Confidence(phase="reinforcement", version="v1", level=1.0, sampling_rate=1.0)
shares = st.floats(0, 1)
coins = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("state", "asked", "route", "reason", "p", "audit"),
    [
        (Confidence(), {"has_local": False, "coin": 0.0}, "remote", "no_local_model", 0.0, False),
        (STEADY, {"has_local": False, "coin": 0.0}, "remote", "no_local_model", 0.0, False),
        (LEARNING, {"has_local": True, "coin": 0.999}, "both", "learning", 1.0, True),
        (STEADY, {"has_local": True, "coin": 0.05}, "both", "audit", 0.1, True),
        (STEADY, {"has_local": True, "coin": 0.10}, "local", "certified", 0.1, False),
        (STEADY, {"has_local": True, "coin": 0.05, "forced_remote": True}, "remote", "forced", 0.0, False),
        (STEADY, {"has_local": True, "coin": 0.05, "remote_allowed": False}, "local", "budget", 0.0, False),
        (LEARNING, {"has_local": True, "coin": 0.05, "remote_allowed": False}, "local", "budget", 0.0, False),
    ],
)
def test_state_and_coin_decide_who_is_asked(
    state: Confidence, asked: dict[str, Any], route: str, reason: str, p: float, audit: bool
) -> None:
    decision = decide(state, **asked)
    assert (decision.route, decision.reason, decision.p, decision.audit) == (route, reason, p, audit)


@given(level=shares, rate=shares, coin=coins)
def test_an_audit_happens_exactly_where_the_coin_is_below_the_recorded_probability(
    level: float, rate: float, coin: float
) -> None:
    decision = decide(STEADY.model_copy(update={"level": level, "sampling_rate": rate}), has_local=True, coin=coin)
    assert decision.audit == (coin < decision.p)
    assert decision.audit == (decision.route == "both")


@pytest.mark.parametrize(
    ("confidence", "valid", "route", "reason"),
    [
        (0.39, True, "both", "deferred"),
        (0.40, True, "local", "certified"),
        (None, True, "both", "deferred"),
        (0.99, False, "both", "local_invalid"),
    ],
)
def test_an_unsure_or_invalid_local_answer_brings_in_the_remote(
    confidence: float | None, valid: bool, route: str, reason: str
) -> None:
    after = defer(decide(STEADY, has_local=True, coin=0.5), confidence, valid=valid)
    assert (after.route, after.reason) == (route, reason)
    assert after.audit is False


@given(coin=coins, first=coins)
def test_a_canary_answers_its_share_of_what_is_served_alone_and_no_audit(coin: float, first: float) -> None:
    standing = STEADY.model_copy(update={"canary": "v2", "canary_share": 0.25, "canary_threshold": 0.7})
    before = decide(standing, has_local=True, coin=first)
    after = try_out(before, standing, coin=coin)
    if before.audit or coin >= 0.25:
        assert after == before
    else:
        assert after == before.model_copy(update={"reason": "canary", "threshold": 0.7})
        assert defer(after, 0.6, valid=True).reason == "deferred"  # by its own threshold


def test_without_a_threshold_no_valid_answer_is_deferred() -> None:
    first = decide(STEADY.model_copy(update={"threshold": None, "level": 0.0}), has_local=True, coin=0.5)
    assert defer(first, None, valid=True) == first


def test_what_is_asked_of_the_remote_anyway_or_cannot_be_stays_as_it_was() -> None:
    audit = decide(STEADY, has_local=True, coin=0.0)
    poor = decide(STEADY, has_local=True, remote_allowed=False, coin=0.0)
    assert defer(audit, 0.0, valid=False) == audit
    assert defer(poor, 0.0, valid=True) == poor


@given(confidence=shares, coin=coins)
def test_deferral_never_changes_the_probability_or_the_audit(confidence: float | None, coin: float) -> None:
    before = decide(STEADY, has_local=True, coin=coin)
    after = defer(before, confidence, valid=True)
    assert (after.p, after.audit, after.level) == (before.p, before.audit, before.level)


@given(delay=st.floats(50, 1e5), drop=st.floats(0.1, 1))
def test_floor_and_delay_are_each_other_s_inverse(delay: float, drop: float) -> None:
    assert delay_for(floor_for_delay(delay, drop), drop) == pytest.approx(max(delay, 4 / drop))


@pytest.mark.parametrize("wrong", [(0, 0.5), (100, 0.0), (100, 1.1), (-1, 0.5)])
def test_a_delay_or_drop_that_means_nothing_is_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        floor_for_delay(*wrong)


def test_the_start_up_sentence_speaks_in_requests() -> None:
    assert "500 requests" in promise(0.02, 0.85)
    assert "2000 requests" in promise(0.005, 0.85)


@pytest.mark.parametrize(
    ("new", "trained_on", "due"),
    [(49, 0, False), (50, 0, True), (99, 50, False), (100, 50, True), (100, 1000, False)],
)
def test_training_is_due_when_there_is_enough_new_to_learn(new: int, trained_on: int, due: bool) -> None:
    assert needs_training(new, trained_on, batch_size=100, first=50) is due


def test_after_a_suspicion_a_batch_is_enough_until_there_is_a_new_version() -> None:
    assert not needs_training(100, 1000, batch_size=100, first=50)
    assert needs_training(100, 1000, batch_size=100, first=50, urgent=True)
    version = Version(
        id="v1", task="t", checkpoint="c", path="p", state="champion", trained_on=9, created_at=1.0, promoted_at=5.0
    )
    said = [Event(name=name, task="t", at=at, message="") for name, at in (("TIGHTEN", 4.0), ("INPUT_SHIFT", 6.0))]
    assert not is_urgent([version], said)
    assert is_urgent([version], [*said, Event(name="COACHING", task="t", at=6.0, message="")])
    assert not is_urgent([], [])
