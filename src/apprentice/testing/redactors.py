"""What every redactor promises, as checks that a third party runs over its own.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check(Case(my_redactor.build(), {"write to ann@example.com": "ann@example.com"}, ("nothing of the kind",)))

A broken promise raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from apprentice.types import Finding, Redactor


class Case(NamedTuple):
    """A redactor, texts with the words in them that it is made to find, and texts that it is made to leave alone."""

    redactor: Redactor
    found: Mapping[str, str]
    left: Sequence[str]


type Check = Callable[[Case], None]

HOSTILE: tuple[str, ...] = (
    "",
    " ",
    "\0",
    "half a pair: \ud800",
    "<EMAIL_1> and <EMAIL_2>",
    "@" * 5_000,
    "a" * 20_000,
    "a@" * 5_000,
    "1" * 20_000,
    "1 2 " * 2_000,
    "eyJ" * 2_000,
    "://a:" * 2_000,
    "-----BEGIN PRIVATE KEY-----" * 200,
    "𝕥ext \u202e with \u200b marks 👩‍👩‍👧",
)


def _texts(case: Case) -> list[str]:
    return [*case.found, *case.left, *HOSTILE]


def what_it_is_made_for_is_found(case: Case) -> None:
    assert case.found, "the case should have a text with something in it"
    for text, words in case.found.items():
        spans = [text[finding.start : finding.end] for finding in case.redactor(text)]
        assert words in spans, f"{words!r} is not found in {text!r}, but {spans}"


def other_texts_are_left_alone(case: Case) -> None:
    for text in case.left:
        assert not list(case.redactor(text)), f"something is found in {text!r}"


def findings_lie_in_the_text_in_order_and_apart(case: Case) -> None:
    for text in _texts(case):
        end = 0
        for finding in case.redactor(text):
            assert isinstance(finding, Finding), f"{finding!r} is no Finding"
            assert end <= finding.start < finding.end <= len(text), f"{finding} in a text of {len(text)}, after {end}"
            assert finding.kind.isidentifier() and finding.kind.isupper(), f"{finding.kind!r} is no word in capitals"
            end = finding.end


def the_same_text_gives_the_same(case: Case) -> None:
    for text in _texts(case):
        assert list(case.redactor(text)) == list(case.redactor(text)), f"{text[:80]!r} gives two things"


def placeholders_are_left_alone(case: Case) -> None:
    for text in case.found:
        for finding in reversed(case.redactor(text)):
            text = f"{text[: finding.start]}<{finding.kind}_1>{text[finding.end :]}"
        assert not list(case.redactor(text)), f"something is found in {text!r}, which is redacted"


CHECKS: tuple[Check, ...] = (
    what_it_is_made_for_is_found,
    other_texts_are_left_alone,
    findings_lie_in_the_text_in_order_and_apart,
    the_same_text_gives_the_same,
    placeholders_are_left_alone,
)
