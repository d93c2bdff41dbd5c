from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.balance import FEWEST, described, drift, writing
from apprentice.types import Example, Json


def examples(targets: list[Json], text: str = "hello") -> list[Example]:
    return [Example(input={"text": text}, target=t, source="remote", at=float(n)) for n, t in enumerate(targets)]


def test_equally_frequent_labels_are_as_many_as_there_are_and_one_that_swallows_the_others_is_seen() -> None:
    even = described(examples([{"kind": kind} for kind in "abcd" * 25]))["fields"]["kind"]
    assert (even["labels"], even["largest_share"]) == (4, 0.25)
    assert even["effective"] == pytest.approx(4)
    skewed = described(examples([{"kind": "a"}] * 97 + [{"kind": kind} for kind in "bcd"]))["fields"]["kind"]
    assert (skewed["labels"], skewed["largest"], skewed["largest_share"]) == (4, "a", 0.97)
    assert skewed["effective"] < 1.3
    assert skewed["counts"] == {'"a"': 97, '"b"': 1, '"c"': 1, '"d"': 1}


def test_only_fields_that_hold_labels_are_counted() -> None:
    targets = [
        {"kind": "ab"[n % 2], "text": f"free {n}", "price": n / 7, "tags": ["x"], "urgent": True} for n in range(80)
    ]
    assert list(described(examples(targets))["fields"]) == ["kind", "urgent"]
    assert list(described(examples(["yes", "no"] * 40))["fields"]) == [""]
    assert described([]) == {"rows": 0, "fields": {}, "writing": {}}


def test_labels_that_stay_as_they_were_are_as_far_apart_as_chance_has_it_and_others_farther() -> None:
    dice = Random(3)
    same = [drift(dice.choices("abcdefghij", k=800)) for _ in range(40)]
    means = [
        sum(found[name] for found in same if found is not None) / len(same)
        for name in ("total_variation", "by_chance", "psi", "psi_by_chance")
    ]
    assert means[0] == pytest.approx(means[1], rel=0.15)
    assert means[2] == pytest.approx(means[3], rel=0.25)
    moved = drift([*dice.choices("abcde", k=600), *dice.choices("fghij", k=200)])
    assert moved is not None and moved["total_variation"] == pytest.approx(1) and moved["psi"] > 5
    assert (moved["n"], moved["against"]) == (200, 600)


def test_too_few_rows_say_nothing_about_drift() -> None:
    assert drift(["a"] * (4 * FEWEST - 1)) is None
    assert drift(["a"] * (4 * FEWEST)) is not None


@given(st.lists(st.sampled_from("abcdefg"), min_size=80, max_size=200))
def test_the_distance_is_between_none_and_all(labels: list[str]) -> None:
    found = drift(labels)
    assert found is not None
    assert 0 <= found["total_variation"] <= 1 + 1e-9 and found["psi"] >= -1e-9


def test_drift_goes_by_when_a_row_became_known_and_not_by_its_place() -> None:
    rows = examples([{"kind": "old"}] * 150 + [{"kind": "new"}] * 50)
    mixed = Random(1).sample(rows, len(rows))
    found = described(mixed)["fields"]["kind"]["drift"]
    assert found["total_variation"] == 1.0


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"text": "Where is my card?", "n": 3}, "latin"),
        ({"text": ["Где", "моя карта"]}, "cyrillic"),
        ("我的卡在哪里", "cjk"),
        ({"n": 12}, ""),
    ],
)
def test_the_writing_of_an_input_is_that_of_most_of_its_letters(value: Json, name: str) -> None:
    assert writing(value) == name
