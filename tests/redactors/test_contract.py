"""Every file in redactors/ keeps the promises of a redactor; a new file is found by itself."""

from __future__ import annotations

import pytest

from apprentice import plugins
from apprentice.testing.redactors import (
    CHECKS,
    Case,
    Check,
    findings_lie_in_the_text_in_order_and_apart,
    other_texts_are_left_alone,
    placeholders_are_left_alone,
    the_same_text_gives_the_same,
    what_it_is_made_for_is_found,
)
from apprentice.types import Finding, Redactor

FOUND = {"write to ann@example.com today": "ann@example.com"}
LEFT = ("where is my parcel?", "order 4711 of 2026-11-21", "")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", plugins.names("redactors"))
def test_contract(name: str, check: Check) -> None:
    check(Case(plugins.build("redactors", name), FOUND, LEFT))


def blind(text: str) -> list[Finding]:
    return []


def eager(text: str) -> list[Finding]:
    return [Finding(0, len(text), "ALL")] if text else []


def beyond(text: str) -> list[Finding]:
    return [Finding(0, len(text) + 1, "EMAIL")]


def twice(text: str) -> list[Finding]:
    return [Finding(0, 1, "EMAIL"), Finding(0, 1, "EMAIL")] if text else []


class Moody:
    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, text: str) -> list[Finding]:
        self.asked += 1
        return [Finding(0, 1, "EMAIL")] if text and self.asked % 2 else []


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (blind, what_it_is_made_for_is_found),
        (eager, other_texts_are_left_alone),
        (beyond, findings_lie_in_the_text_in_order_and_apart),
        (twice, findings_lie_in_the_text_in_order_and_apart),
        (Moody(), the_same_text_gives_the_same),
        (eager, placeholders_are_left_alone),
    ],
)
def test_a_redactor_that_breaks_a_promise_is_caught(broken: Redactor, check: Check) -> None:
    with pytest.raises(AssertionError):
        check(Case(broken, FOUND, LEFT))
