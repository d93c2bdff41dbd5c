"""The rules of the ledger, on any sequence of operations: windows add up, caps hold, a refusal changes nothing."""

from __future__ import annotations

import doctest
from copy import deepcopy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from apprentice import stores
from apprentice.errors import ApprenticeError, BudgetError
from apprentice.stores import Amount, Books, from_text, next_version_id, runs, to_text
from apprentice.testing.stores import a_hold
from apprentice.types import Cap

NAMES = st.sampled_from(["a", "b", "c", "d"])
AMOUNTS = st.integers(0, 20) | st.integers(0, 10**15)
KEYS = st.lists(st.sampled_from(["total", "day", "week", "task:x/total"]), max_size=4)
RESERVE = st.tuples(
    st.just("reserve"), NAMES, AMOUNTS, KEYS, st.dictionaries(st.sampled_from(["total", "day"]), AMOUNTS)
)
SETTLE = st.tuples(st.just("settle"), NAMES, st.integers(-1, 30), st.sampled_from(["settled", "assumed", "released"]))


def amounts(books: Books, window: str) -> tuple[int, int]:
    amount = books.amounts.get(window, Amount())
    return amount.spent, amount.held


def test_examples_in_the_documentation_are_right() -> None:
    assert doctest.testmod(stores).failed == 0


@given(st.lists(RESERVE | SETTLE, max_size=40))
def test_windows_are_the_sums_of_the_attempts_and_a_refusal_changes_nothing(operations: list[tuple[Any, ...]]) -> None:
    books = Books({}, {})
    for operation in operations:
        before = deepcopy(books)
        try:
            if operation[0] == "reserve":
                _, name, worst, keys, limits = operation
                taken = {window: worst + sum(amounts(before, window)) for window in limits}
                books.reserve(a_hold(name, worst, keys), [Cap(window=key, limit=limits[key]) for key in limits])
                assert all(taken[window] <= limits[window] for window in limits)
            else:
                books.settle(*operation[1:])
        except BudgetError:
            assert books == before
            assert any(taken[window] > limits[window] for window in limits)
        except ApprenticeError:
            assert books == before
        for window, amount in books.amounts.items():
            entries = [entry for entry in books.entries.values() if window in entry.hold.windows]
            assert amount.held == sum(entry.hold.worst for entry in entries if entry.state == "held")
            assert amount.spent == sum(entry.cost for entry in entries)
    assert books.changed_entries == books.entries.keys()
    assert books.changed_windows == books.amounts.keys()


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_comes_back_from_what_a_database_can_keep(text: str) -> None:
    kept = to_text(text)
    assert from_text(kept) == text
    assert "\0" not in kept
    kept.encode()


@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=())))
def test_two_texts_are_kept_as_two(one: str, other: str) -> None:
    assert (to_text(one) == to_text(other)) == (one == other)


@given(st.lists(st.integers(), max_size=300))
def test_runs_are_all_rows_in_order_and_of_few_sizes(rows: list[int]) -> None:
    found = list(runs(rows))
    assert [row for some in found for row in some] == rows
    assert {len(some) for some in found} <= {1, 2, 4, 8, 16, 32, 64}
    assert len(found) <= len(rows) // 64 + 6


@given(st.lists(st.text(max_size=4) | st.from_regex(r"v[0-9]{1,3}", fullmatch=True), max_size=8))
def test_a_new_version_takes_no_id_that_is_taken(taken: list[str]) -> None:
    assert next_version_id(taken) not in taken
