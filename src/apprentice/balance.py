"""PURE: the rows of a set -> how its labels are spread, and how far the newest differ from the others."""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from apprentice.types import Example, Json

SHOWN = 30  # labels of a field that are counted by name, the commonest ones
FEWEST = 20  # rows; a quarter with fewer says nothing about drift
_READ = 200  # characters of a text from which its writing is told


def described(examples: Sequence[Example]) -> dict[str, Json]:
    """The balance of each field that holds labels, its drift, and in what writing the inputs are.

    JSON: {"rows", "fields": {name: {"labels", "effective", "largest", "largest_share", "counts", "drift"}}, "writing":
    {name: share}}. `effective`: the number of equally frequent labels that would be as diverse, exp(-sum p ln p). The
    name of an output that is no object is "". `drift`: see `drift`; None where rows are too few.
    """
    ordered = sorted(examples, key=lambda example: example.at)
    columns = _labels([example.target for example in ordered])
    scripts = Counter(writing(example.input) for example in ordered)
    return {
        "rows": len(ordered),
        "fields": {name: _spread(values) | {"drift": drift(values)} for name, values in columns.items()},
        "writing": {name: count / len(ordered) for name, count in scripts.most_common()},
    }


def _labels(targets: Sequence[Json]) -> dict[str, list[str]]:
    """The values of each field that holds labels, as text: scalars of which most are not different."""
    if not targets:
        return {}
    names = dict.fromkeys(name for target in targets if isinstance(target, dict) for name in target) or {"": None}
    columns = {
        name: [target.get(name) if isinstance(target, dict) else None if name else target for target in targets]
        for name in names
    }
    return {
        name: texts
        for name, values in columns.items()
        if not any(isinstance(value, dict | list | float) for value in values)
        and len(set(texts := [json.dumps(value, ensure_ascii=False) for value in values])) <= max(len(texts) // 2, 2)
    }


def _spread(values: Sequence[str]) -> dict[str, Json]:
    counts = Counter(values)
    shares = [count / len(values) for count in counts.values()]
    largest, most = counts.most_common(1)[0]
    return {
        "labels": len(counts),
        "effective": math.exp(-sum(share * math.log(share) for share in shares)),
        "largest": json.loads(largest),
        "largest_share": most / len(values),
        "counts": dict(counts.most_common(SHOWN)),
    }


def drift(values: Sequence[str]) -> dict[str, Json] | None:
    """How far the newest quarter of these labels, the oldest first, differs from the others; None if they are too few.

    `total_variation`: half the sum of the differences of the shares, in [0, 1]; `psi`: the population stability index,
    the sum of (p - q) ln(p / q), with half a row added to each label. `by_chance`: what the first is expected to be
    where nothing changed, which with many labels is far from 0; `psi_by_chance` the same of the second.
    """
    quarter = len(values) // 4
    if quarter < FEWEST:
        return None
    old, new = Counter(values[:-quarter]), Counter(values[-quarter:])
    rest, labels = len(values) - quarter, old | new
    apart = 1 / quarter + 1 / rest
    shares = [(old[label] + new[label]) / len(values) for label in labels]
    smooth = [
        ((new[label] + 0.5) / (quarter + len(labels) / 2), (old[label] + 0.5) / (rest + len(labels) / 2))
        for label in labels
    ]
    return {
        "n": quarter,
        "against": rest,
        "total_variation": sum(abs(new[label] / quarter - old[label] / rest) for label in labels) / 2,
        # The mean of |N(0, s)| is s sqrt(2 / pi); chi-squared with a degree of freedom a label but one.
        "by_chance": sum(math.sqrt(2 / math.pi * share * (1 - share) * apart) for share in shares) / 2,
        "psi": sum((p - q) * math.log(p / q) for p, q in smooth),
        "psi_by_chance": (len(labels) - 1) * apart,
    }


def writing(value: Json) -> str:
    """The script of most letters of an input, as Unicode names it: "latin", "cyrillic", "cjk"; "" without a letter.

    >>> writing({"text": "Где моя карта?"})
    'cyrillic'
    """
    counts = Counter(map(_script, filter(str.isalpha, _start(value))))
    return min(counts, key=lambda name: (-counts[name], name), default="")


def _start(value: Json) -> str:
    if isinstance(value, str):
        return value[:_READ]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return "".join(map(_start, parts))


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "unknown").split(" ")[0].split("-")[0].lower()
