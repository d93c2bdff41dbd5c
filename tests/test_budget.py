"""Worst cases bound, sums are exact, windows follow the calendar of a zone, caps are what was configured."""

from __future__ import annotations

import doctest
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import budget
from apprentice.errors import ConfigError, PriceUnknown
from apprentice.types import Cap, Usage

BERLIN = ZoneInfo("Europe/Berlin")


class Price(NamedTuple):
    input: Any
    output: Any
    cached: Any = None


rates = st.decimals(min_value=0, max_value=1_000, allow_nan=False, allow_infinity=False, places=6)
prices = st.builds(Price, rates, rates, st.none() | rates)
counts = st.integers(0, 10**7)


def at(year: int, month: int, day: int, hour: int = 12, minute: int = 0, zone: Any = UTC) -> float:
    return datetime(year, month, day, hour, minute, tzinfo=zone).timestamp()


def test_examples_in_the_documentation_are_right() -> None:
    assert doctest.testmod(budget).failed == 0


@given(prices, counts, counts, st.data())
def test_no_call_within_its_bounds_costs_more_than_the_worst_case(
    price: Price, size: int, max_tokens: int, data: st.DataObject
) -> None:
    max_tokens += 1
    input_tokens = data.draw(st.integers(0, size))
    usage = Usage(
        input_tokens=input_tokens,
        cached_tokens=data.draw(st.integers(0, input_tokens)),
        output_tokens=data.draw(st.integers(0, max_tokens)),
    )
    assert 0 <= budget.cost(price, usage) <= budget.worst_case(price, size, max_tokens)


@given(prices, counts, counts, counts)
def test_cost_is_the_exact_sum_rounded_up_once(price: Price, input_tokens: int, cached: int, output: int) -> None:
    usage = Usage(input_tokens=input_tokens + cached, cached_tokens=cached, output_tokens=output)
    cached_price = price.input if price.cached is None else price.cached
    exact = (
        Fraction(price.input) * input_tokens + Fraction(cached_price) * cached + Fraction(price.output) * output
    )  # dollars per million tokens are micro-dollars per token
    assert exact <= budget.cost(price, usage) < exact + 1


@pytest.mark.parametrize(
    ("price", "size", "max_tokens", "expected"),
    [
        (Price(Decimal("2.5"), Decimal(10)), 1_000, 100, 3_500),
        (Price(Decimal("0.0000001"), Decimal(0)), 1, 1, 1),  # rounded up, never to nothing
        (Price(Decimal(0), Decimal(0)), 1_000_000, 1_000_000, 0),  # free because somebody said so
        (Price(Decimal(1), Decimal(1), Decimal("1.25")), 100, 1, 126),  # writing to a cache may cost more than input
        (Price(Decimal("0.1"), Decimal("0.2")), 1, 1, 1),  # 0.1 + 0.2 is not a third of a micro-dollar more
        (Price(1, 2), 10**12, 10**12, 3 * 10**12),
    ],
)
def test_worst_case_of(price: Price, size: int, max_tokens: int, expected: int) -> None:
    assert budget.worst_case(price, size, max_tokens) == expected


def test_a_usage_with_more_cached_than_input_tokens_is_not_billed_below_zero() -> None:
    usage = Usage(input_tokens=5, cached_tokens=10, output_tokens=0)
    assert budget.cost(Price(Decimal(10), Decimal(10), Decimal(1)), usage) == 10


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("input", None),
        ("output", None),
        *product(
            ("input", "output", "cached"),
            (Decimal("NaN"), Decimal("sNaN"), Decimal(-1), Decimal("Infinity"), "3", 0.5, True),
        ),
    ],
)
def test_a_price_that_is_no_price_is_refused_and_never_zero(field: str, bad: Any) -> None:  # F10
    price = Price(Decimal(1), Decimal(1))._replace(**{field: bad})
    with pytest.raises(PriceUnknown):
        budget.worst_case(price, 10, 10)
    with pytest.raises(PriceUnknown):
        budget.cost(price, Usage(input_tokens=0, output_tokens=0))


@pytest.mark.parametrize("max_tokens", [0, -1, "5", 1.5, None, True])
def test_a_call_without_an_end_is_refused(max_tokens: Any) -> None:  # F13
    with pytest.raises(ConfigError, match="max_tokens"):
        budget.worst_case(Price(Decimal(1), Decimal(1)), 10, max_tokens)


@pytest.mark.parametrize("size", [-1, 1.5, "10", None])
def test_a_request_without_a_size_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="request_bytes"):
        budget.worst_case(Price(Decimal(1), Decimal(1)), size, 10)


@given(st.integers(0, 10**18))
def test_whole_micros_survive_the_way_through_dollars(amount: int) -> None:
    assert budget.micros(Decimal(amount).scaleb(-6)) == amount


@pytest.mark.parametrize("bad", [Decimal(-1), Decimal("NaN"), 0.1, None])
def test_an_amount_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError):
        budget.micros(bad)


@pytest.mark.parametrize(
    ("moment", "zone", "month", "week", "day"),
    [
        (at(2026, 11, 21), UTC, "2026-11", "2026-W47", "2026-11-21"),
        (at(2025, 12, 31), UTC, "2025-12", "2026-W01", "2025-12-31"),  # the week of a year that has not begun
        (at(2027, 1, 1), UTC, "2027-01", "2026-W53", "2027-01-01"),  # and of one that is over
        (at(2026, 11, 20, 23, 30), BERLIN, "2026-11", "2026-W47", "2026-11-21"),  # tomorrow already, over there
        (at(2026, 10, 24, 21, 59), BERLIN, "2026-10", "2026-W43", "2026-10-24"),  # still summer time
        (at(2026, 10, 25, 22, 59), BERLIN, "2026-10", "2026-W43", "2026-10-25"),  # a day of 25 hours
        (0.0, UTC, "1970-01", "1970-W01", "1970-01-01"),
        (-1.0, UTC, "1969-12", "1970-W01", "1969-12-31"),
    ],
)
def test_windows_follow_the_calendar_of_the_zone(moment: float, zone: Any, month: str, week: str, day: str) -> None:
    overall = ("total", f"month:{month}", f"week:{week}", f"day:{day}")
    assert budget.windows("sort", moment, zone) == (*overall, *(f"task:sort/{window}" for window in overall))


@given(st.floats(0, 4e9), st.floats(0, 4e9))
def test_a_clock_that_goes_back_reopens_no_window(seen: float, now: float) -> None:
    assert budget.windows("sort", now, UTC, seen=seen) == budget.windows("sort", max(now, seen), UTC)


@given(st.text(max_size=20), st.text(max_size=20), st.floats(0, 4e9), st.floats(0, 4e9))
def test_windows_of_two_tasks_are_never_the_same(one: str, other: str, first: float, second: float) -> None:
    shared = set(budget.windows(one, first, UTC)) & set(budget.windows(other, second, UTC))
    assert one == other or not any(window.startswith("task:") for window in shared)


@pytest.mark.parametrize("moment", [float("nan"), float("inf"), 1e18, -1e18])
def test_a_clock_without_a_date_is_refused(moment: float) -> None:
    with pytest.raises(ConfigError, match="clock"):
        budget.windows("sort", moment, UTC)


@given(
    st.sampled_from(["UTC", "Europe/Berlin", "America/Havana", "America/New_York", "Asia/Beirut", "Pacific/Apia"]),
    st.integers(int(at(2012, 1, 1)), int(at(2037, 1, 1))),
    st.floats(0, 1),
)
def test_all_moments_of_a_day_have_the_same_windows_and_no_others_have(name: str, moment: float, share: float) -> None:
    zone = ZoneInfo(name)
    windows = budget.windows("sort", moment, zone)
    begin, end = budget.span(windows[3], zone)
    assert begin <= moment < end
    other = min(begin + share * (end - begin), end - 1e-3)  # less than a microsecond is none to a calendar
    assert budget.windows("sort", other, zone) == windows
    assert budget.windows("sort", begin, zone) == windows
    assert budget.windows("sort", end, zone)[3] != windows[3] != budget.windows("sort", begin - 0.001, zone)[3]


def test_caps_are_those_that_were_configured() -> None:  # F23
    overall: dict[str, Decimal | int] = {
        "total": Decimal("1000"),
        "monthly": 100,
        "weekly": Decimal("25.5"),
        "daily": Decimal("0.0000019"),
    }
    found = budget.caps("sort", at(2026, 11, 21), UTC, overall=overall, own={"daily": Decimal(0)})
    assert {cap.window: cap.limit for cap in found} == {
        "total": 1_000_000_000,
        "month:2026-11": 100_000_000,
        "week:2026-W47": 25_500_000,
        "day:2026-11-21": 1,  # rounded down: a limit never grows
        "task:sort/day:2026-11-21": 0,
    }
    assert budget.caps("sort", 0.0, UTC, overall={}, own={}) == []
    assert budget.caps("sort", 0.0, UTC, overall={}, own={"total": Decimal("1e12")})[0].limit == 10**18
    assert budget.caps("sort", 0.0, UTC, overall={}, own={"total": Decimal("1e-9")})[0].limit == 0


@given(st.floats(0, 4e9))
def test_every_cap_is_on_a_window_that_the_call_is_booked_in(moment: float) -> None:
    limits = dict.fromkeys(("total", "monthly", "weekly", "daily"), Decimal(1))
    found = budget.caps("a/day:x", moment, BERLIN, overall=limits, own=limits)
    assert sorted(cap.window for cap in found) == sorted(budget.windows("a/day:x", moment, BERLIN))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"dayly": Decimal(1)}, "did you mean 'daily'"),
        ({"hourly": Decimal(1)}, "no limit 'hourly'"),
        ({"daily": Decimal(-1)}, "daily"),
        ({"daily": Decimal("NaN")}, "daily"),
        ({"daily": 0.1}, "daily"),
        ({"daily": None}, "daily"),
    ],
)
def test_a_limit_that_is_none_is_refused_by_its_name(limits: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        budget.caps("sort", 0.0, UTC, overall=limits, own={})


@pytest.mark.parametrize(
    ("window", "moment", "share"),
    [
        ("day:2026-11-21", at(2026, 11, 21, 6), 0.25),
        ("task:a/b/day:2026-11-21", at(2026, 11, 21, 18), 0.75),
        ("week:2026-W47", at(2026, 11, 19), 0.5),
        ("month:2026-12", at(2027, 1, 1, 0), 1.0),
        ("month:2026-02", at(2026, 2, 15, 0), 0.5),
        ("day:2026-11-21", at(2026, 11, 20), 0.0),
        ("day:2026-11-21", at(2026, 11, 30), 1.0),
        ("total", at(2026, 11, 30), 0.0),
    ],
)
def test_elapsed_share_of(window: str, moment: float, share: float) -> None:
    assert budget.elapsed(window, moment, UTC) == share


def test_a_day_of_25_hours_is_half_over_after_12_and_a_half() -> None:
    midnight = datetime(2026, 10, 25, tzinfo=BERLIN).timestamp()
    assert budget.elapsed("day:2026-10-25", midnight + timedelta(hours=12.5).total_seconds(), BERLIN) == 0.5


@pytest.mark.parametrize("window", ["", "day", "day:", "day:2026-02-30", "year:2026", "week:2026-W54", "total:1"])
def test_a_text_that_names_no_window_is_refused(window: str) -> None:
    with pytest.raises(ConfigError, match="window"):
        budget.elapsed(window, 0.0, UTC)


@given(st.integers(0, 10**15), st.floats(0.001, 1))
def test_a_forecast_is_never_below_what_is_spent(spent: int, share: float) -> None:
    found = budget.forecast(spent, share)
    assert found is not None
    assert found >= spent
    assert budget.forecast(spent, 1.0) == spent


def test_there_is_no_forecast_before_the_window_begins() -> None:
    assert budget.forecast(5, 0.0) is None


# --- can the caps pay for the contract? -------------------------------------------------------------------------------

shares = st.floats(0, 1)


@given(
    st.integers(0, 10**10),
    st.integers(0, 10**10),
    st.floats(0, 1e5),
    st.floats(0, 1e6),
    st.floats(0, 1e5),
    shares,
    shares,
)
def test_what_a_cap_is_said_to_pay_for_is_what_it_has_room_for(
    limit: int, spent: int, left: float, requests_per_day: float, cost: float, floor: float, level: float
) -> None:
    def plan(level: float, limit: int = limit) -> budget.Payable:
        cap = Cap(window="day:x", limit=limit)
        [found] = budget.payable(
            [cap],
            {"day:x": spent},
            {"day:x": left},
            requests_per_day=requests_per_day,
            cost=cost,
            floor=floor,
            level=level,
        )
        return found

    def price(level: float) -> float:
        return (floor + (1 - floor) * level) * requests_per_day * left / 86_400 * cost

    found, room = plan(level), max(0, limit - spent)
    assert (found.window, found.needed) == ("day:x", level)
    assert 0 <= found.affordable <= 1
    assert 0 <= found.audits <= 1
    if found.affordable > 0:
        assert price(found.affordable) <= room * (1 + 1e-9) + 1e-6
        assert found.audits == 1, "the audits are paid before any deferral"
    if price(level) < room * (1 - 1e-9):
        assert found.enough
    if price(level) > room * (1 + 1e-9) + 1e-6:
        assert not found.enough
    more = plan(level, limit + 1000)
    assert more.affordable >= found.affordable
    assert more.audits >= found.audits


@pytest.mark.parametrize(
    ("limit", "spent", "left", "level", "affordable", "audits"),
    [
        (1_000_000, 0, 86_400.0, 0.0, 0.902 / 4.802, 1.0),  # 10,000 requests of 490 micro-dollars are 4.9 dollars
        (1_000_000, 900_000, 86_400.0, 0.3, 0.002 / 4.802, 1.0),
        (1_000_000, 951_000, 86_400.0, 0.0, 0.0, 0.5),  # half of the audits, and nothing else
        (1_000_000, 2_000_000, 86_400.0, 0.0, 0.0, 0.0),
        (1_000_000, 2_000_000, 0.0, 1.0, 1.0, 1.0),  # the window is over: nothing comes any more
        (490, 0, float("inf"), 1.0, 1.0, 1.0),  # a total is judged by the next request
        (489, 0, float("inf"), 1.0, 479.2 / 480.2, 1.0),
    ],
)
def test_payable(limit: int, spent: int, left: float, level: float, affordable: float, audits: float) -> None:
    [found] = budget.payable(
        [Cap(window="w", limit=limit)],
        {"w": spent},
        {"w": left},
        requests_per_day=10_000,
        cost=490,
        floor=0.02,
        level=level,
    )
    assert found.affordable == pytest.approx(affordable, abs=1e-9)
    assert found.audits == pytest.approx(audits)
    assert found.enough == (found.audits == 1 and found.affordable >= level)


@pytest.mark.parametrize(
    ("window", "moment", "seconds"),
    [
        ("day:2026-11-21", at(2026, 11, 21, 6), 64_800.0),
        ("day:2026-11-21", at(2026, 11, 22, 6), 0.0),
        ("task:a/b/week:2026-W47", at(2026, 11, 22), 43_200.0),
        ("month:2026-12", at(2026, 12, 31), 43_200.0),
        ("total", at(2026, 11, 30), float("inf")),
    ],
)
def test_what_is_left_of(window: str, moment: float, seconds: float) -> None:
    assert budget.left(window, moment, UTC) == seconds
