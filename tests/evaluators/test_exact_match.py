from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import plugins
from apprentice.evaluators import same
from apprentice.types import Json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (1, 1.0, 1.0),
        (True, 1, 0.0),
        (0, False, 0.0),
        ([True], [1], 0.0),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, 1.0),
        ([1, 2], [2, 1], 0.0),
        ([1], [1, 2], 0.0),
        ({"a": None}, {}, 0.0),
        ("Spam", "spam", 0.0),
        ("", None, 0.0),
        ([], {}, 0.0),
        (2**53, 2**53 + 1, 0.0),
        (float("nan"), float("nan"), 1.0),
    ],
)
async def test_equal_is_what_json_calls_equal(answer: Json, reference: Json, score: float) -> None:
    evaluate = plugins.build("evaluators", "exact_match")
    assert (await evaluate(answer, reference)).value == score
    assert (await evaluate({"x": [answer]}, {"x": [reference]})).value == score


async def test_folding_forgives_case_and_space_but_not_words() -> None:
    evaluate = plugins.build("evaluators", "exact_match", fold=True)
    assert (await evaluate({"a": " STRASSE  1\n"}, {"a": "straße 1"})).value == 1.0
    assert (await evaluate({"a": "street1"}, {"a": "street 1"})).value == 0.0


@given(JSON, JSON)
def test_sameness_is_symmetric_and_every_value_is_itself(left: Json, right: Json) -> None:
    assert same(left, left)
    assert same(left, right) == same(right, left)
    assert not (same(left, right) and not same(left, right, fold=True))
