"""Points to the coordinates of a line chart. A template draws it; nothing here knows HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, HEIGHT = 360, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 24

type Point = tuple[float, float | None]  # None: nothing is known there, the line breaks


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """`paths` are runs of known points; `dots` are points with no neighbour, which no line would show."""

    name: str
    style: Literal["one", "two"]
    paths: tuple[str, ...]
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of up to two lines, with a band around the first one and a level line. `said` is it in words."""

    id: str
    title: str
    said: str
    lines: tuple[Line, ...]
    band: tuple[str, ...]
    level: Tick | None
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # the numbers as texts, for who cannot see it

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM


def chart(
    id: str,
    title: str,
    x: Sequence[int],
    series: Sequence[tuple[str, Sequence[float | None]]],
    *,
    unit: Literal["share", "dollars"] = "share",
    band: Sequence[tuple[float | None, float | None]] = (),
    level: tuple[float, str] | None = None,
) -> Chart:
    """The chart of `series` (name, values) over `x`, the numbers of the requests at which each stretch ends.

    Shares are drawn from 0 to 1; dollars from the least to the largest, 0 included. `band`: bounds of the first series.
    """
    known = [value for _, values in series for value in values if value is not None]
    bottom, top = (0.0, 1.0) if unit == "share" else (min(0.0, *known, 0.0), max(0.0, *known, 1e-6))
    last = max(x, default=1)
    at_x = [_LEFT + (WIDTH - _LEFT - _RIGHT) * (one / last) for one in x]

    def at_y(value: float) -> float:
        return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - bottom) / (top - bottom), 1)

    def text(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:.1%}" if unit == "share" else f"${value:,.4f}"

    places = (0.0, 0.5, 1.0) if unit == "share" else ((0.0, top) if bottom == 0 else (bottom, 0.0, top))
    return Chart(
        id=id,
        title=title,
        said=_said(series, text),
        lines=tuple(
            _line(name, "one" if n == 0 else "two", at_x, [None if v is None else at_y(v) for v in values])
            for n, (name, values) in enumerate(series)
        ),
        band=_band(at_x, [None if a is None or b is None else (at_y(a), at_y(b)) for a, b in band]),
        level=None if level is None else Tick(at_y(level[0]), level[1]),
        x_ticks=(Tick(_LEFT, "0"), Tick(WIDTH - _RIGHT, f"{last:,}")),
        y_ticks=tuple(Tick(at_y(y), f"{y:.0%}" if unit == "share" else f"${y:.2f}") for y in places),
        head=("up to request", *(name for name, _ in series), *(("from", "to") if band else ())),
        rows=tuple(
            (f"{one:,}", *(text(values[n]) for _, values in series), *(map(text, band[n]) if band else ()))
            for n, one in enumerate(x)
        ),
    )


def _said(series: Sequence[tuple[str, Sequence[float | None]]], text: object) -> str:
    assert callable(text)
    parts = []
    for name, values in series:
        known = [value for value in values if value is not None]
        if known:
            parts.append(f"{name}: {text(known[0])} at first, {text(known[-1])} at last")
    return "; ".join(parts) or "nothing is known yet"


def _runs[T](xs: Sequence[float], values: Sequence[T | None]) -> list[list[tuple[float, T]]]:
    """The points between gaps."""
    runs: list[list[tuple[float, T]]] = [[]]
    for x, value in zip(xs, values, strict=True):
        if value is not None:
            runs[-1].append((round(x, 1), value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _line(name: str, style: Literal["one", "two"], xs: Sequence[float], ys: Sequence[float | None]) -> Line:
    runs = _runs(xs, ys)
    return Line(
        name=name,
        style=style,
        paths=tuple("M" + " L".join(f"{x},{y}" for x, y in run) for run in runs if len(run) > 1),
        dots=tuple(run[0] for run in runs if len(run) == 1),
    )


def _band(xs: Sequence[float], edges: Sequence[tuple[float, float] | None]) -> tuple[str, ...]:
    if not edges:
        return ()
    drawn = []
    for run in _runs(xs, edges):
        if len(run) == 1:  # a bar, as wide as it takes to be seen
            (x, edge) = run[0]
            run = [(x - 2, edge), (x + 2, edge)]
        around = [f"{x},{low}" for x, (low, _) in run] + [f"{x},{high}" for x, (_, high) in reversed(run)]
        drawn.append("M" + " L".join(around) + " Z")
    return tuple(drawn)
