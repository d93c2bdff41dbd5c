"""Values to HTML. Every text that anybody wrote goes through a template that escapes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from apprentice.dashboard.charts import Chart, chart
from apprentice.dashboard.views import TaskView, happenings
from apprentice.report import WHY
from apprentice.types import Json, Micros, Seconds, Version

_PHASES = {"cold_start": "cold start", "reinforcement": "reinforcement", "steady": "steady"}


def static(name: str) -> str:
    """A file that the pages need as it is: `style.css` or `keys.js`."""
    return resources.files("apprentice.dashboard").joinpath("static", name).read_text(encoding="utf-8")


def report(tasks: Sequence[TaskView], *, now: Seconds) -> str:
    """One page that needs nothing else: styles and charts are in it, and it asks no other place for anything."""
    # The style sheet is our own file and holds no `<`; escaping it would only spoil its quotation marks.
    return render("report.html", tasks=tasks, now=now, style=Markup(static("style.css")))  # noqa: S704


def render(template: str, **values: Any) -> str:
    """The page of a template. A value that a template needs and does not get is an error."""
    return _environment().get_template(template).render(**values)


def charts(task: TaskView) -> list[Chart]:
    """Agreement, sampling with remote share, deferral level and cost over the task's requests."""
    name, points, audited = task.report.task, task.report.trajectory, task.stretches
    ends = [point.last for point in points]
    spent = _sums([point.cost for point in points])
    return [
        chart(
            f"agreement-{name}",
            "Agreement of the local model with the remote",
            [one.last for one in audited],
            [("agreement", [one.agreement for one in audited])],
            band=[(one.lower, one.upper) for one in audited],
            level=(task.promised, "promised"),
        ),
        chart(
            f"asked-{name}",
            "Who is asked",
            ends,
            [("remote share", [p.remote_share for p in points]), ("sampling rate", [p.sampling_rate for p in points])],
        ),
        chart(
            f"level-{name}",
            "Deferral level: the least sure share that goes to the remote",
            [one.last for one in audited],
            [("level", [one.level for one in audited])],
        ),
        chart(
            f"money-{name}",
            "Money so far",
            ends,
            [("spent", [one / 1e6 for one in spent]), ("saved", [p.saved / 1e6 for p in points])],
            unit="dollars",
        ),
    ]


def _sums(costs: Sequence[Micros]) -> list[Micros]:
    total, found = 0, []
    for cost in costs:
        total += cost
        found.append(total)
    return found


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("apprentice.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "money": _money,
        "share": _share,
        "when": _when,
        "pretty": pretty,
        "brief": _brief,
        "examined": _examined,
        "happenings": happenings,
    }
    made.globals |= {"charts": charts, "why": WHY, "phases": _PHASES}
    return made


def _money(amount: Micros, digits: int = 4) -> str:
    return f"{'-' if amount < 0 else ''}${abs(amount) / 1e6:,.{digits}f}"


def _share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _when(at: Seconds | None) -> str:
    return "–" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def pretty(value: Json) -> str:
    """The value as JSON over several lines."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def _brief(value: Json, most: int = 120) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _examined(version: Version) -> dict[str, Json]:
    """What the version measured on held-out rows when it was made; nothing where it was not examined."""
    return version.metrics.get("examination") or {}
