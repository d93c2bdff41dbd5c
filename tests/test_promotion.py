from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from apprentice.promotion import fingerprint, held_out, screen

scores = st.lists(st.floats(0, 1), min_size=2, max_size=60)


@given(scores)
def test_the_first_version_is_always_promoted(candidate: list[float]) -> None:
    assert screen(candidate, None).promote


@given(scores)
def test_an_equal_candidate_is_promoted(found: list[float]) -> None:
    assert screen(found, found).promote


def test_a_clearly_worse_candidate_is_rejected_with_the_gap() -> None:
    found = screen([1.0] * 60 + [0.0] * 40, [1.0] * 90 + [0.0] * 10)
    assert not found.promote
    assert "0.300" in found.reason


def test_a_loss_within_two_standard_errors_is_no_reason_to_reject() -> None:
    assert screen([1.0] * 18 + [0.0] * 2, [1.0] * 19 + [0.0]).promote


def test_too_few_rows_reject_nobody() -> None:
    assert screen([0.0], [1.0]).promote
    assert screen([], []).promote


@given(st.text())
def test_case_and_white_space_do_not_move_an_input_between_training_and_hold_out(text: str) -> None:
    assert fingerprint({"text": f" {text} "}) == fingerprint({"text": f"  {text}\n "})


def test_one_input_in_ten_is_held_out() -> None:
    share = sum(held_out(fingerprint({"text": f"request {i}"})) for i in range(5000)) / 5000
    assert 0.085 <= share <= 0.115
