"""Redactors: a text -> where in it something is that must not be kept. What they share: which of two findings wins."""

from __future__ import annotations

from collections.abc import Iterable

from apprentice.types import Finding


def apart(found: Iterable[Finding]) -> list[Finding]:
    """The findings in the order of the text, none over another: of two that overlap, the one that was found first wins.

    >>> apart([Finding(4, 9, "KEY"), Finding(0, 6, "PHONE"), Finding(10, 12, "PHONE")])
    [Finding(start=4, end=9, kind='KEY'), Finding(start=10, end=12, kind='PHONE')]
    """
    ranked = sorted((finding.start, finding.end, rank, finding) for rank, finding in enumerate(found))
    kept: list[tuple[int, Finding]] = []
    for start, _, rank, finding in ranked:
        while kept and kept[-1][1].end > start and kept[-1][0] > rank:
            kept.pop()
        if not kept or kept[-1][1].end <= start:
            kept.append((rank, finding))
    return [finding for _, finding in kept]
