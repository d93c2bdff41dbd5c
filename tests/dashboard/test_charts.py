"""Points become coordinates inside the picture; gaps stay gaps."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from apprentice.dashboard.charts import HEIGHT, WIDTH, chart

_values = st.lists(st.none() | st.floats(0, 1), max_size=30)


@given(_values)
def test_every_known_value_is_drawn_once_and_inside_the_picture(values: list[float | None]) -> None:
    made = chart("a", "A", [10 * (n + 1) for n in range(len(values))], [("agreement", values)])
    [line] = made.lines
    drawn = [float(n) for path in line.paths for n in re.findall(r"[\d.]+", path)]
    drawn += [n for dot in line.dots for n in dot]
    assert len(drawn) == 2 * sum(value is not None for value in values)
    assert all(0 <= x <= WIDTH for x in drawn[::2])
    assert all(0 <= y <= HEIGHT for y in drawn[1::2])
    assert len(made.rows) == len(values)


def test_a_gap_breaks_the_line_and_a_lonely_point_is_a_dot() -> None:
    made = chart("a", "A", [1, 2, 3, 4], [("agreement", [0.5, 0.5, None, 1.0])])
    assert (len(made.lines[0].paths), len(made.lines[0].dots)) == (1, 1)
    assert made.said == "agreement: 50.0% at first, 100.0% at last"


def test_a_higher_value_is_higher_and_zero_is_at_the_bottom() -> None:
    made = chart("a", "A", [1, 2], [("agreement", [0.0, None]), ("other", [1.0, None])])
    (_, low), (_, high) = made.lines[0].dots[0], made.lines[1].dots[0]
    assert (low, high) == (made.bottom, made.top)


def test_losses_are_drawn_below_zero() -> None:
    made = chart("a", "A", [1, 2], [("saved", [-2.0, 1.0])], unit="dollars")
    assert [tick.text for tick in made.y_ticks] == ["$-2.00", "$0.00", "$1.00"]
    assert made.rows[0] == ("1", "$-2.0000")


def test_nothing_known_is_said_so() -> None:
    assert chart("a", "A", [], [("agreement", [])]).said == "nothing is known yet"
