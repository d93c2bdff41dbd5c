from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.nearness import NEAR, alike, groups, marks, nearest, split, texts, words
from apprentice.promotion import fingerprint, held_out
from apprentice.types import Json

WORDS = [f"w{n}" for n in range(60)]
rows = st.lists(st.lists(st.sampled_from(WORDS[:9]), min_size=1, max_size=12).map(" ".join), max_size=18, unique=True)


def near(one: Json, other: Json) -> bool:
    """By the definition, without any index."""
    a, b = marks(one), marks(other)
    return len(a & b) / len(a | b) >= NEAR - 1e-12 if a and b else False


def drawn(n: int, seed: int = 0) -> list[str]:
    """Sentences, a third of which are an earlier one with a word more, less or other; all different."""
    dice = Random(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        said = dice.choices(WORDS, k=dice.randint(4, 20))
        if found and dice.random() < 0.35:
            said = dice.choice(list(found)).split()
            place = dice.randrange(len(said))
            said[place : place + dice.randint(0, 1)] = [dice.choice(WORDS)] * dice.randint(0, 1)
        found[" ".join(said)] = None
    return list(found)


def sides(inputs: list[str]) -> list[str]:
    return list(split([fingerprint(text) for text in inputs], inputs, held_out=held_out))


@given(rows)
@settings(max_examples=300)
def test_nothing_in_training_is_near_anything_held_out(inputs: list[str]) -> None:
    found = split([str(n) for n in range(len(inputs))], inputs, held_out=lambda key: int(key) % 3 == 0)
    apart = {side: [text for text, said in zip(inputs, found, strict=True) if said == side] for side in found}
    for text in apart.get("training", []):
        assert not any(near(text, other) for other in apart.get("held_out", []))


@pytest.mark.parametrize("rows", [300, pytest.param(600, marks=pytest.mark.slow)])
def test_every_side_of_many_rows_is_what_comparing_each_pair_would_give(rows: int) -> None:
    inputs = drawn(rows)
    wanted: list[str] = []
    for number, text in enumerate(inputs):
        beside = {wanted[n] for n, other in enumerate(inputs[:number]) if wanted[n] != "between" and near(text, other)}
        own = "held_out" if held_out(fingerprint(text)) else "training"
        wanted.append("between" if len(beside) == 2 else beside.pop() if beside else own)
    found = sides(inputs)
    assert found == wanted
    moved = [
        side for side, text in zip(found, inputs, strict=True) if (side == "held_out") != held_out(fingerprint(text))
    ]
    assert len(moved) > rows // 30  # the copies were really there


def test_what_is_near_both_sides_goes_to_neither_and_leaves_both_as_they_were() -> None:
    middle = " ".join(WORDS[:12])
    inputs = [f"{middle} also then", f"so but {middle}", middle, f"{middle} also"]
    assert near(inputs[0], middle) and near(inputs[1], middle) and not near(inputs[0], inputs[1])
    found = split(["0", "1", "2", "3"], inputs, held_out=lambda key: key == "1")
    assert found == ["training", "held_out", "between", "training"]


@pytest.mark.parametrize("seed", range(3))
def test_a_side_never_changes_when_more_becomes_known(seed: int) -> None:
    inputs = drawn(500, seed)
    whole = sides(inputs)
    for size in (100, 137, 250, 499):
        assert sides(inputs[:size]) == whole[:size]


def test_what_is_fixed_is_held_out_and_what_is_near_it_never_trains() -> None:
    dice = Random(5)
    inputs = [" ".join(dice.choices(WORDS, k=15)) for _ in range(40)]
    keys = [fingerprint(text) for text in inputs]
    chosen = next(n for n, key in enumerate(keys) if n > 10 and not held_out(key))
    copy = inputs[chosen] + " please"
    found = split([fingerprint(copy), *keys], [copy, *inputs], held_out=lambda key: False, fixed={keys[chosen]})
    assert (found[0], found[chosen + 1]) == ("held_out", "held_out")
    assert found.count("training") == 39


def test_inputs_that_are_written_into_one_form_are_no_copies() -> None:
    form = " ".join(f"form{n}" for n in range(100))
    inputs = [f"{form} order {n} of {WORDS[n % 60]}" for n in range(400)]
    assert near(inputs[300], inputs[301])
    found = sides(inputs)
    assert found.count("training") > 330 and found.count("held_out") > 15


@given(rows)
@settings(max_examples=200)
def test_a_group_is_whatever_a_chain_of_near_inputs_reaches(inputs: list[str]) -> None:
    found = groups(inputs)
    reached = [{number} for number in range(len(inputs))]
    for one in range(len(inputs)):
        for other in range(one):
            if near(inputs[one], inputs[other]):
                both = reached[one] | reached[other]
                for member in both:
                    reached[member] = both
    firsts = list(dict.fromkeys(min(members) for members in reached))
    assert found == [firsts.index(min(members)) for members in reached]


def test_the_words_decide_and_not_case_punctuation_or_width() -> None:
    one, other = "Where's my card, please?", "WHERE S MY  CARD PLEASE"
    assert marks(one) == marks(other)
    assert split(["a", "b"], [one, other], held_out=lambda key: key == "a") == ["held_out", "held_out"]


def test_numbers_and_other_values_count_by_their_field() -> None:
    assert marks({"a": 1, "b": True}) != marks({"a": True, "b": 1})
    rows = [{"a": n % 3, "b": n % 5, "c": n % 7, "d": n % 2} for n in range(60)]
    assert set(split([str(n) for n in range(60)], rows, held_out=lambda key: int(key) % 10 == 0)) >= {"training"}
    assert list(texts({"b": ["two"], "a": "one", "c": 3})) == ["one", "two"]


def test_scripts_without_spaces_are_compared_letter_by_letter() -> None:
    assert words("我的卡在哪里") == list("我的卡在哪里")
    assert near("请问我的银行卡现在在哪里呢", "请问我的银行卡现在在哪里")


def test_an_input_that_is_or_holds_a_row_of_a_benchmark_is_found() -> None:
    question = "which of the three rivers is the longest one in europe"
    inputs: list[Json] = [
        {"text": "Which of the three rivers is the longest one in Europe?"},
        {"text": "how do I reset my password", "note": question},
        {"text": "how do I reset my password"},
        {"text": "europe"},
    ]
    assert alike(inputs, [question, "europe is a continent"]) == [True, True, False, False]
    assert alike(inputs, []) == [False] * 4


def test_the_most_similar_input_shares_the_rare_words() -> None:
    known = ["my card is lost", "my card is late", "the exchange rate is wrong", "my pin is blocked"]
    assert nearest(known, ["is my rate wrong", "lost it", "the pin", "xyz", ""]) == [2, 0, 3, None, None]
    assert nearest([], ["a"]) == [None]


@given(rows, rows)
def test_an_input_that_is_known_is_most_similar_to_itself(known: list[str], asked: list[str]) -> None:
    for text, found in zip(known, nearest(known, known), strict=True):
        assert found is not None and marks(known[found]) == marks(text)
    assert all(found is None or found < len(known) for found in nearest(known, asked))
