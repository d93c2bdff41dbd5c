"""PURE. What a call may cost at most, what it did cost, the windows and caps it has to fit in, and what they can pay.

Money is an integer number of micro-dollars. A price of one US dollar per million tokens is one micro-dollar per token,
so the numbers of a price list are used as they are. Prices are exact (`Decimal`); everything that is booked is rounded
up, limits are rounded down: rounding never makes room.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta, tzinfo
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

from apprentice.errors import ConfigError, PriceUnknown
from apprentice.types import Cap, Micros, Seconds, Usage

_EARLY = 0.1  # share of a window: before that its rate says nothing of its end
_PREFIXES = {"total": "total", "monthly": "month:", "weekly": "week:", "daily": "day:"}


class Price(Protocol):
    """US dollars per million tokens, or micro-dollars per token. Cached input costs `cached`, or else like `input`."""

    @property
    def input(self) -> Decimal: ...
    @property
    def output(self) -> Decimal: ...
    @property
    def cached(self) -> Decimal | None: ...


def worst_case(price: Price, request_bytes: int, max_tokens: int) -> Micros:
    """The most that one call can cost, in micro-dollars, rounded up.

    No tokenizer makes more tokens than there are bytes, so `request_bytes` (the serialised request in UTF-8, and what
    the provider adds to it) bounds the input; `max_tokens`, sent with every request, bounds the output with its
    reasoning. Raises PriceUnknown for a price that is missing, negative or no number, ConfigError for a size that is
    no count.
    """
    rates = _rates(price)
    if type(request_bytes) is not int or request_bytes < 0:
        raise ConfigError(f"request_bytes should be a number of bytes, not {request_bytes!r}")
    if type(max_tokens) is not int or max_tokens < 1:
        raise ConfigError(f"max_tokens should be at least 1, not {max_tokens!r}")
    return -(-(max(rates.fresh, rates.cached) * request_bytes + rates.output * max_tokens) // rates.scale)


def cost(price: Price, usage: Usage) -> Micros:
    """What a call did cost by the provider's count, in micro-dollars, rounded up. Raises PriceUnknown."""
    rates, known = _rates(price), usage.cached_tokens
    uncached = max(0, usage.input_tokens - known)
    return -(-(rates.fresh * uncached + rates.cached * known + rates.output * usage.output_tokens) // rates.scale)


def micros(dollars: Decimal | int) -> Micros:
    """US dollars in micro-dollars, rounded up. Raises ConfigError for an amount that is negative or no number.

    >>> micros(Decimal("0.0000011"))
    2
    """
    return math.ceil(_exact(dollars, "an amount") * 1_000_000)


def windows(task: str, at: Seconds, zone: tzinfo, *, seen: Seconds = -math.inf) -> tuple[str, ...]:
    """The eight windows that a call of this task is booked in: total, month, ISO week and day, of all and of the task.

    `at` is when it is reserved, which decides, not when it ends; `seen` is the latest such moment before, so that a
    clock that goes back re-opens no window. Raises ConfigError when the clock shows no date that the calendar has.

    >>> from datetime import UTC
    >>> windows("sort", 1_795_218_000, UTC)[:4]
    ('total', 'month:2026-11', 'week:2026-W47', 'day:2026-11-20')
    """
    try:
        day = datetime.fromtimestamp(max(at, seen), zone).date()
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"the clock shows {at!r}, which is no date", hint="set the clock of this machine") from error
    year, week, _ = day.isocalendar()
    overall = (
        "total",
        f"month:{day.year:04}-{day.month:02}",
        f"week:{year:04}-W{week:02}",
        f"day:{day.isoformat()}",
    )
    return (*overall, *(f"task:{task}/{window}" for window in overall))


def caps(
    task: str, at: Seconds, zone: tzinfo, *, overall: Mapping[str, Decimal | int], own: Mapping[str, Decimal | int]
) -> list[Cap]:
    """The caps that a call of this task must fit in at that moment, for limits in US dollars.

    Limits are `total`, `monthly`, `weekly`, `daily`; one that is left out is no cap, and 0 allows nothing. `overall`
    holds for all tasks together, `own` for this one. Raises ConfigError for another name, or no amount.

    >>> from datetime import UTC
    >>> caps("sort", 1_795_218_000, UTC, overall={"daily": Decimal("0.25")}, own={})
    [Cap(window='day:2026-11-20', limit=250000)]
    """
    found = windows(task, at, zone)
    return [
        Cap(window=_window(name, some), limit=math.floor(_exact(limit, f"the limit {name!r}") * 1_000_000))
        for limits, some in ((overall, found[:4]), (own, found[4:]))
        for name, limit in limits.items()
    ]


def elapsed(window: str, at: Seconds, zone: tzinfo) -> float:
    """The share of a day, week or month that is over at that moment, 0 before and 1 after it; `total` never passes: 0.

    A day of 23 or 25 hours counts as it is long. Raises ConfigError for a text that names no window.

    >>> from datetime import UTC
    >>> elapsed("day:2026-11-20", 1_795_176_000, UTC)
    0.5
    """
    begin, end = span(window, zone)
    return 0.0 if end == math.inf else min(1.0, max(0.0, (at - begin) / (end - begin)))


def left(window: str, at: Seconds, zone: tzinfo) -> Seconds:
    """Seconds until a day, week or month is over, 0 after it; infinite for `total`. Raises ConfigError likewise.

    >>> from datetime import UTC
    >>> left("day:2026-11-20", 1_795_176_000, UTC)
    43200.0
    """
    return max(0.0, span(window, zone)[1] - at)


def span(window: str, zone: tzinfo) -> tuple[Seconds, Seconds]:
    """When a window begins and ends; `total` does neither. Raises ConfigError for a text that names no window.

    >>> from datetime import UTC
    >>> span("day:2026-11-20", UTC)
    (1795132800.0, 1795219200.0)
    """
    kind, _, name = window.rpartition("/")[2].partition(":")
    try:
        match kind:
            case "total" if not name:
                return -math.inf, math.inf
            case "day":
                first = date.fromisoformat(name)
                last = first + timedelta(days=1)
            case "week":
                first = date.fromisoformat(f"{name}-1")
                last = first + timedelta(days=7)
            case "month":
                first = date.fromisoformat(f"{name}-01")
                last = (first + timedelta(days=31)).replace(day=1)
            case _:
                raise ValueError(kind)
        begin, end = (datetime(day.year, day.month, day.day, tzinfo=zone).timestamp() for day in (first, last))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{window!r} names no window") from error
    return begin, end


def forecast(spent: Micros, elapsed_share: float) -> Micros | None:
    """What a window will have cost at its end if it goes on like this; None while nothing of it is over.

    >>> forecast(300, 0.25)
    1200
    """
    if not 0 < elapsed_share <= 1:
        return None
    return math.ceil(spent / Fraction(elapsed_share))


def reached(cap: Cap, spent: Micros, at: Seconds, zone: tzinfo) -> Seconds | None:
    """When a cap is reached if its window goes on as it began; None if it is not before the end, or too early to say.

    >>> from datetime import UTC
    >>> reached(Cap(window="day:2026-11-20", limit=1000), 600, 1_795_176_000, UTC) - 1_795_176_000
    28800.0
    """
    over = elapsed(cap.window, at, zone)
    if over < _EARLY or spent <= 0:
        return None
    end = span(cap.window, zone)[1]
    moment = at + (end - at) * over / (1 - over) * max(0.0, cap.limit / spent - 1) if over < 1 else at
    return moment if moment < end else None


class Payable(NamedTuple):
    """What one cap can still pay of a contract, until its window ends."""

    window: str
    needed: float  # share of the requests that has to be deferred to the remote
    affordable: float  # the largest share that can be paid, in [0, 1], once the audits are
    audits: float  # share of the audits that can be paid, in [0, 1]: they come first

    @property
    def enough(self) -> bool:
        return self.audits >= 1 and self.affordable >= self.needed


def payable(
    caps: Sequence[Cap],
    spent: Mapping[str, Micros],
    left: Mapping[str, Seconds],
    *,
    requests_per_day: float,
    cost: float,
    floor: float,
    level: float,
) -> list[Payable]:
    """For each cap, whether what it leaves pays for the audits and for the deferral `level` until its window ends.

    `spent` (open holds included) and `left` (seconds) are by window; `cost` is micro-dollars a call of the remote, `floor`
    the share of requests that is audited in any case, `level` the share that is deferred; one call serves a request that
    is both. A window that never ends is judged by the next request alone.

    >>> day = Cap(window="day:2026-11-20", limit=1_000_000)
    >>> payable([day], {}, {day.window: 86_400.0}, requests_per_day=10_000, cost=500, floor=0.02, level=0.3)
    [Payable(window='day:2026-11-20', needed=0.3, affordable=0.1836734693877551, audits=1.0)]
    """
    found = []
    for cap in caps:
        seconds = left[cap.window]
        requests = 1.0 if math.isinf(seconds) else requests_per_day * seconds / 86_400
        room = max(0, cap.limit - spent.get(cap.window, 0))
        reserve = floor * requests * cost
        affordable = _share(room - reserve, (1 - floor) * requests * cost)
        found.append(Payable(cap.window, level, affordable, _share(room, reserve)))
    return found


def _share(room: float, price: float) -> float:
    """How much of the price can be paid, in [0, 1]."""
    return min(1.0, max(0.0, room / price)) if price > 0 else float(room >= 0)


class _Rates(NamedTuple):
    """What a token of input, cached input and output costs, in whole numbers: micro-dollars times `scale`."""

    fresh: int
    cached: int
    output: int
    scale: int


def _rates(price: Price) -> _Rates:
    given = (price.input, price.input if price.cached is None else price.cached, price.output)
    try:
        return _scaled(*given)
    except TypeError:  # no Decimal that can be kept: not a number, or none at all
        return _scaled.__wrapped__(*given)


@lru_cache(maxsize=256, typed=True)  # prices are few; `typed`, because True is no price although it equals 1
def _scaled(input: Decimal, cached: Decimal, output: Decimal) -> _Rates:
    try:
        exact = _exact(input, "input"), _exact(cached, "cached"), _exact(output, "output")
    except ConfigError as error:
        raise PriceUnknown(f"the price cannot be used: {error}") from error
    scale = math.lcm(*(rate.denominator for rate in exact))
    fresh, kept, said = (rate.numerator * (scale // rate.denominator) for rate in exact)
    return _Rates(fresh, kept, said, scale)


def _exact(number: object, what: str) -> Fraction:
    # No float: 0.1 is not a tenth, and what is rounded up would show it.
    if not isinstance(number, Decimal | int) or isinstance(number, bool):
        raise ConfigError(f"{what} should be a decimal number, not {number!r}")
    if (isinstance(number, Decimal) and not number.is_finite()) or number < 0:
        raise ConfigError(f"{what} should be 0 or more, not {number}")
    return Fraction(number)


def _window(name: str, some: tuple[str, ...]) -> str:
    if name not in _PREFIXES:
        near = difflib.get_close_matches(name, _PREFIXES, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"a budget has no limit {name!r}{meant}", hint=f"one of: {', '.join(_PREFIXES)}")
    return next(window for window in some if window.rpartition("/")[2].startswith(_PREFIXES[name]))
