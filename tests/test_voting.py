"""What several voters elect: tables, and what must hold whoever votes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.types import Json
from apprentice.voting import Ballot, Outcome, vote

texts = st.sampled_from(["spam", "ham", "eggs"])
sure = st.one_of(st.none(), st.floats(0.01, 1))
records = st.fixed_dictionaries(
    {"kind": texts, "urgent": st.booleans()}, optional={"tags": st.lists(texts, max_size=2)}
)
ballots = st.one_of(
    st.lists(st.one_of(st.none(), st.builds(Ballot, texts, sure)), min_size=1, max_size=6),
    st.lists(st.one_of(st.none(), st.builds(Ballot, records, sure)), min_size=1, max_size=6),
)


@pytest.mark.parametrize(
    ("said", "elected", "agreement"),
    [
        ([("spam", 0.9), ("spam", 0.7)], "spam", 0.8),
        ([("spam", 0.9), ("ham", 0.6), ("ham", 0.6)], "ham", 0.4),  # two that are fairly sure outweigh one
        ([("spam", 0.9), ("ham", 0.3), ("ham", 0.3)], "spam", 0.3),  # and do not when they are guessing
        ([("spam", 0.5), ("ham", 0.5)], "spam", 0.25),
        ([("spam", 0.8), None, None], "spam", 0.8 / 3),  # who has no answer is for nothing
        ([("spam", None), ("ham", 0.4)], "spam", 0.25),
        ([(3, 0.6), (3.0, 0.6)], 3, 0.6),  # as JSON Schema has it, they are equal
        ([({"b": 1, "a": [2]}, 0.5), ({"a": [2], "b": 1}, 0.7)], {"b": 1, "a": [2]}, 0.6),
        ([(None, 0.9), ("spam", 0.1)], None, 0.45),  # null is an answer
    ],
)
def test_the_output_with_the_most_weight_is_elected(
    said: Sequence[tuple[Json, float | None] | None], elected: Json, agreement: float
) -> None:
    found = vote([None if one is None else Ballot(*one) for one in said])
    assert found is not None
    assert found.output == elected
    assert found.agreement == pytest.approx(agreement)


THREE = [
    Ballot({"kind": "spam", "tier": 1, "note": "x"}, 0.6),
    Ballot({"kind": "spam", "tier": 2}, 0.6),
    Ballot({"kind": "ham", "tier": 2}, 0.9),
]


def test_each_field_is_voted_on_by_itself_and_may_be_left_out() -> None:
    assert about(vote(THREE)) == ({"kind": "spam", "tier": 2}, 0.4)


def test_only_fields_that_count_make_up_the_agreement() -> None:
    assert about(vote(THREE, counted=["tier"])) == ({"kind": "spam", "tier": 2}, 0.5)


def test_fields_that_do_not_fit_together_are_not_elected() -> None:
    said: list[tuple[Json, float]] = [({"kind": "bill", "sum": 1}, 0.5), ({"kind": "bill", "sum": 3}, 0.4)]
    voters = [Ballot(*one) for one in [*said, ({"kind": "note", "sum": 2}, 0.8)]]
    assert about(vote(voters)) == ({"kind": "bill", "sum": 2}, 0.2667)
    assert about(vote(voters, lambda output: output["kind"] == "note")) == ({"kind": "note", "sum": 2}, 0.2667)


def about(found: Outcome | None) -> tuple[Json, float]:
    assert found is not None
    return found.output, round(found.agreement, 4)


def test_nobody_with_an_answer_elects_nothing() -> None:
    assert vote([]) is None
    assert vote([None, None]) is None


@given(ballots)
def test_agreement_is_a_share_and_no_value_is_made_up(given: list[Ballot | None]) -> None:
    found = vote(given)
    valid = [ballot.output for ballot in given if ballot is not None]
    if found is None:
        assert not valid
        return
    assert 0 < found.agreement <= 1
    if isinstance(found.output, dict):
        for name, value in found.output.items():
            assert any(output.get(name) == value for output in valid)
    else:
        assert found.output in valid


@given(ballots)
def test_one_more_for_what_was_elected_changes_nothing_and_one_without_an_answer_lowers_the_agreement(
    given: list[Ballot | None],
) -> None:
    found = vote(given)
    if found is None:
        return
    again = vote([*given, Ballot(found.output, 1.0)])
    less = vote([*given, None])
    assert again is not None and less is not None
    assert again.output == found.output
    assert less.output == found.output
    assert less.agreement < found.agreement <= again.agreement + 1e-12


@given(ballots, st.lists(records, min_size=1))
def test_what_is_elected_fits_or_was_said_as_a_whole(given: list[Ballot | None], allowed: list[Json]) -> None:
    found = vote(given, lambda output: output in allowed)
    valid = [ballot.output for ballot in given if ballot is not None]
    assert found is None or found.output in allowed or found.output in valid
