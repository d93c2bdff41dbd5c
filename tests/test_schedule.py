"""When a cycle is due by the calendar: tables, and what must hold for every moment and zone."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.decide import scheduled

DAY = 86_400.0
ZONES = [ZoneInfo(name) for name in ("UTC", "Europe/Berlin", "America/New_York", "Pacific/Auckland", "Asia/Kathmandu")]
moments = st.floats(0, 4e9)
schedules = st.sampled_from(["monthly", "quarterly", "every 1d", "every 30d", "every 365d"])


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("schedule", "last", "due"),
    [
        ("monthly", "2026-11-21 14:30", "2026-12-21 14:30"),
        ("monthly", "2026-12-21 14:30", "2027-01-21 14:30"),
        ("monthly", "2027-01-31 00:00", "2027-02-28 00:00"),
        ("monthly", "2028-01-31 00:00", "2028-02-29 00:00"),  # a leap year
        ("monthly", "2028-02-29 12:00", "2028-03-29 12:00"),
        ("monthly", "2027-08-31 23:59", "2027-09-30 23:59"),
        ("quarterly", "2026-11-30 08:00", "2027-02-28 08:00"),
        ("quarterly", "2027-11-30 08:00", "2028-02-29 08:00"),
        ("quarterly", "2027-03-31 08:00", "2027-06-30 08:00"),
        ("quarterly", "2099-12-31 08:00", "2100-03-31 08:00"),
        ("every 30d", "2026-11-21 14:30", "2026-12-21 14:30"),
        ("every 1d", "2028-02-28 10:00", "2028-02-29 10:00"),
        ("every 365d", "2027-06-01 00:00", "2028-05-31 00:00"),
    ],
)
def test_a_cycle_is_due_from_this_second_on_and_not_before(schedule: str, last: str, due: str) -> None:
    assert scheduled(schedule, at(last), at(due))
    assert not scheduled(schedule, at(last), at(due) - 1)


@pytest.mark.parametrize(
    ("zone", "last", "due"),
    [
        ("Europe/Berlin", "2026-03-15 09:00", "2026-04-15 09:00"),  # summer time began: an hour less has passed
        ("Europe/Berlin", "2026-10-15 09:00", "2026-11-15 09:00"),
        ("America/New_York", "2027-02-14 02:30", "2027-03-14 02:30"),  # a time that no clock shows on that day
        ("Pacific/Auckland", "2027-01-31 23:00", "2027-02-28 23:00"),
        ("Asia/Kathmandu", "2027-05-31 00:15", "2027-06-30 00:15"),
    ],
)
def test_a_month_is_counted_on_the_clocks_of_the_zone(zone: str, last: str, due: str) -> None:
    assert scheduled("monthly", at(last, zone), at(due, zone), ZoneInfo(zone))
    assert not scheduled("monthly", at(last, zone), at(due, zone) - 1, ZoneInfo(zone))


def test_midnight_in_one_zone_is_another_day_in_another() -> None:
    last = at("2027-01-30 23:30")  # the last of January already in Berlin, and February is short
    assert scheduled("monthly", last, at("2027-02-28 00:30", "Europe/Berlin"), ZoneInfo("Europe/Berlin"))
    assert not scheduled("monthly", last, at("2027-02-28 00:30", "Europe/Berlin"))
    assert scheduled("monthly", last, at("2027-02-28 23:30"))


def test_nothing_is_due_without_a_schedule_or_before_the_first_cycle() -> None:
    assert not scheduled(None, 0.0, 4e9)
    assert not scheduled("monthly", None, 4e9)


@pytest.mark.parametrize("text", ["", "yearly", "Monthly", "every 0d", "every 30", "every 30 d", "every -1d", "30d"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no schedule such as 'monthly', 'quarterly' or 'every 30d'"):
        scheduled(text, 0.0, 4e9)


@given(schedule=schedules, last=moments, waited=st.floats(0, 4e9), more=st.floats(0, 1e9), zone=st.sampled_from(ZONES))
def test_what_is_due_stays_due(schedule: str, last: float, waited: float, more: float, zone: ZoneInfo) -> None:
    if scheduled(schedule, last, last + waited, zone):
        assert scheduled(schedule, last, last + waited + more, zone)


@given(last=moments, zone=st.sampled_from(ZONES))
def test_a_month_takes_28_to_31_days_and_a_quarter_89_to_92(last: float, zone: ZoneInfo) -> None:
    hour = 3600.0  # clocks are put forward or back by as much
    for schedule, least, most in (("monthly", 28, 31), ("quarterly", 89, 92)):
        assert not scheduled(schedule, last, last + least * DAY - hour - 1, zone)
        assert scheduled(schedule, last, last + most * DAY + hour + 1, zone)


@given(last=moments, zone=st.sampled_from(ZONES))
def test_twelve_months_on_end_are_never_later_than_a_year(last: float, zone: ZoneInfo) -> None:
    """Days that a month lacks move the date forward, never beyond the same day of the next year."""
    began = moment = datetime.fromtimestamp(last, zone).replace(hour=12)
    for _ in range(12):
        moment = next(
            day
            for day in (moment + timedelta(days=days) for days in range(27, 33))
            if scheduled("monthly", moment.timestamp(), day.timestamp(), zone)
        )
    length = 366 if calendar.isleap(began.year if began.month <= 2 else began.year + 1) else 365
    assert timedelta(days=length - 3) <= moment - began <= timedelta(days=length)


@given(days=st.integers(1, 9999), last=moments, off=st.floats(-1e6, 1e6))
def test_a_day_is_24_hours_in_every_zone(days: int, last: float, off: float) -> None:
    now = last + days * DAY + off
    assert scheduled(f"every {days}d", last, now, ZONES[1]) == scheduled(f"every {days}d", last, now, UTC)
    assert scheduled(f"every {days}d", last, now) == (now >= last + days * DAY)
