"""What the redactor `patterns` finds, and what it leaves alone."""

from __future__ import annotations

import string
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice import plugins
from apprentice.errors import ConfigError
from apprentice.types import Redactor


def built(**settings: object) -> Redactor:
    found: Redactor = plugins.build("redactors", "patterns", **settings)
    return found


ALL = built()
DICE = Random(7)


def letters(n: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(DICE.choices(alphabet, k=n))


def found(text: str, redactor: Redactor = ALL) -> list[tuple[str, str]]:
    return [(finding.kind, text[finding.start : finding.end]) for finding in redactor(text)]


PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{letters(64)}\n{letters(64)}\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("EMAIL", "ann@example.com"),
        ("EMAIL", "Ann.O'Neil+orders@mail.example.co.uk"),
        ("EMAIL", "jürgen@müller-söhne.de"),
        ("PHONE", "+49 30 1234567"),
        ("PHONE", "(212) 555-0147"),
        ("PHONE", "415-555-0132"),
        ("CARD", "4111111111111111"),
        ("CARD", "4111 1111 1111 1111"),
        ("CARD", "5500-0000-0000-0004"),
        ("CARD", "378282246310005"),
        ("IBAN", "DE89 3704 0044 0532 0130 00"),
        ("IBAN", "GB82WEST12345698765432"),
        ("IBAN", "de89370400440532013000"),
        ("KEY", "AKIA" + "IOSFODNN7EXAMPLE"),
        ("KEY", "ghp_" + letters(36)),
        ("KEY", "sk-proj-" + letters(48)),
        ("KEY", "sk-ant-api03-" + letters(80)),
        ("KEY", "AIza" + letters(35)),
        ("KEY", "apk-" + letters(43)),
        ("KEY", "sk_" + "live_" + letters(24)),
        ("KEY", "xoxb-123456789012-" + letters(24, string.ascii_lowercase)),
        ("KEY", f"eyJ{letters(40)}.eyJ{letters(900)}.{letters(43)}"),
        ("KEY", PEM),
    ],
)
def test_what_must_not_be_kept_is_found_whole_wherever_it_stands(kind: str, value: str) -> None:
    for frame in ("{}", "it is {}, thanks", "({})", "first\n{}\nlast", "x" * 500 + " {} " + "y " * 400):
        assert (kind, value) in found(frame.format(value)), frame[:20]


@pytest.mark.parametrize(
    "text",
    [
        "where is my parcel? I ordered it on 2026-11-21 at 10:45",
        "order 1234567890123456, invoice 20261121-0042",
        "4111 1111 1111 1112 fails the check",
        "9111111111111111 belongs to no card that pays",
        "DE00 3704 0044 0532 0130 00 fails the check",
        "ann at example dot com, @ann, a@b",
        "THE APARTMENTCOMPLEX IS BIG; a risk-based approach to task-oriented, brisk-and-long-walks",
        "<EMAIL_1> wrote to <PHONE_12>",
        "3.14159265358979 and 1,000,000.00 and 12 34 56",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert found(text) == []


def test_each_of_several_is_found_and_numbers_beside_a_card_do_not_hide_it() -> None:
    text = (
        "12 4111 1111 1111 1111 99 for ann@example.com, +49 30 1234567 or bob@example.com, DE89370400440532013000 BIC"
    )
    assert found(text) == [
        ("CARD", "4111 1111 1111 1111"),
        ("EMAIL", "ann@example.com"),
        ("PHONE", "+49 30 1234567"),
        ("EMAIL", "bob@example.com"),
        ("IBAN", "DE89370400440532013000"),
    ]


def test_a_key_that_is_cut_off_hides_the_rest() -> None:
    assert found(f"look: {PEM[:90]}") == [("KEY", PEM[:90])]


def test_only_the_kinds_that_are_asked_for_are_found() -> None:
    text = "ann@example.com, 4111111111111111"
    assert found(text, built(kinds=["card"])) == [("CARD", "4111111111111111")]
    assert found(text, built(kinds=[])) == []


def test_national_numbers_are_those_of_the_region() -> None:
    text = "ring 030 1234567 or (212) 555-0147"
    assert found(text, built(region="DE")) == [("PHONE", "030 1234567")]
    assert found(text, built(region="US")) == [("PHONE", "(212) 555-0147")]
    assert found(text, built(region=None)) == []
    with pytest.raises(ConfigError, match="no region 'ZZZ'"):
        built(region="ZZZ")
    with pytest.raises(ConfigError, match="kinds"):
        built(kinds=["mail"])


@given(before=st.text(max_size=40), after=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_an_address_between_spaces_is_found_whatever_is_around_it(before: str, after: str) -> None:
    assert ("EMAIL", "ann@example.com") in found(f"{before} ann@example.com {after}", built(kinds=["email"]))
