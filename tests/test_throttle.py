"""When a provider may be asked: never while it is known to be sick, and again as soon as one call says that it is not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.throttle import COOL, FAILURES, LONGEST, NO_MONEY, SAVED, Throttle


def sick(at: float = 0.0) -> Throttle:
    throttle = Throttle()
    for _ in range(FAILURES):
        throttle.leaves(at, retry=False)
        throttle.failed(at)
    return throttle


def test_a_healthy_provider_is_never_waited_for() -> None:
    throttle = Throttle()
    for now in range(100):
        assert throttle.wait(now) == 0
        throttle.leaves(now, retry=False)
        throttle.answered(now)


def test_failures_in_a_row_open_the_breaker_and_others_do_not() -> None:  # F47
    throttle = Throttle()
    for now in range(10 * FAILURES):
        throttle.leaves(now, retry=False)
        throttle.failed(now) if now % FAILURES else throttle.answered(now)
    assert throttle.wait(now) == 0
    assert sick().wait(0.0) == COOL


def test_one_call_probes_whether_it_is_back_and_the_others_go_elsewhere_meanwhile() -> None:  # F47
    throttle = sick()
    assert throttle.wait(COOL) == 0
    throttle.leaves(COOL, retry=False)
    assert throttle.wait(COOL) == math.inf
    throttle.answered(COOL + 1)
    assert throttle.wait(COOL + 1) == 0


def test_a_probe_that_fails_waits_twice_as_long_and_one_that_was_given_up_decides_nothing() -> None:
    throttle, now, waits = sick(), 0.0, []
    for _ in range(8):
        now += throttle.wait(now)
        throttle.leaves(now, retry=False)
        throttle.failed(now)
        waits.append(throttle.wait(now))
    assert waits[:3] == [2 * COOL, 4 * COOL, 8 * COOL]
    assert waits[-1] == LONGEST
    now += LONGEST
    throttle.leaves(now, retry=False)
    throttle.gave_up()
    assert throttle.wait(now) == 0


@pytest.mark.parametrize(("pause", "wait"), [(2.0, 2.0), (0.0, 0.0)])
def test_what_a_provider_asks_for_is_obeyed_before_the_next_call(pause: float, wait: float) -> None:  # F44
    one, other = Throttle(), Throttle()
    one.answered(5.0, pause)
    other.failed(5.0, pause)
    assert one.wait(5.0) == other.wait(5.0) == wait
    assert one.wait(5.0 + pause) == 0


def test_a_provider_without_money_is_left_alone_for_a_while() -> None:  # F45
    throttle = Throttle()
    throttle.failed(0.0, no_money=True)
    assert throttle.wait(1.0) == NO_MONEY - 1


def test_a_suspended_provider_is_never_asked() -> None:  # F9
    assert Throttle(suspended=True).wait(1e12) == math.inf


@given(st.integers(1, 400))
def test_in_an_outage_attempts_are_at_most_a_fifth_more_than_calls_beyond_what_was_saved(calls: int) -> None:
    throttle, attempts = Throttle(), 0
    for now in range(calls):
        throttle.leaves(now, retry=False)
        attempts += 1
        for _ in range(2):
            if throttle.may_retry():
                attempts += 1
    assert attempts <= 1.2 * calls + SAVED / 2
