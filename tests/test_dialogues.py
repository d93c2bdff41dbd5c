"""Conversations for fine-tuning: what is written is read back, whatever is in it."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apprentice import dialogues
from apprentice.dialogues import Pair
from apprentice.errors import InvalidInput, TrainingError
from apprentice.types import Example, Json, Task

TASK = Task(
    name="sort",
    description="Say what it is.",
    instructions="Be brief.",
    input_schema={"type": "object"},
    output_schema={"type": "object"},
    examples=({"input": {"text": "a plum"}, "output": {"kind": "fruit"}},),
)
NUMBER = TASK.model_copy(update={"output_schema": {"type": "integer"}, "examples": ()})
texts = st.text(st.characters(codec="utf-8") | st.sampled_from("\x85\u2028\u2029\r\n\x0b\x1c\x00🙂"))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def example(input: Json, target: Json, weight: float = 1.0, id: str | None = None) -> Example:
    return Example(input=input, target=target, source="remote", weight=weight, request_id=id)


@pytest.mark.parametrize("task", [TASK, NUMBER], ids=["object", "wrapped"])
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first draw makes a table of all characters
@given(pairs=st.lists(st.tuples(values, values), max_size=4))
def test_rows_are_read_back_as_they_were_written(task: Task, pairs: list[tuple[Json, Json]]) -> None:
    examples = [example(given, target) for given, target in pairs]
    for format, text in (
        ("chat", dialogues.chat(task, examples)),
        ("completion", dialogues.completion(task, examples)),
    ):
        rows = dialogues.read(task, text, format)  # type: ignore[arg-type]
        assert [(dialogues.input_of(row), row.answer) for row in rows] == pairs
        assert len(text.splitlines()) == len(pairs)  # whatever a reader takes for the end of a line
    rejecting = [example(given, target).model_copy(update={"rejected": given}) for given, target in pairs]
    beside = dialogues.completion(task, rejecting, rejected=True)
    rows = dialogues.read(task, beside, "completion")
    assert [(dialogues.input_of(row), row.answer, row.rejected) for row in rows] == [
        (row.input, row.target, row.rejected if dialogues.is_pair(row) else None) for row in rejecting
    ]
    pairing = [Pair(given, target, given) for given, target in pairs]
    read = dialogues.read(task, dialogues.preferences(task, pairing), "dpo")
    assert [Pair(dialogues.input_of(row), row.answer, row.rejected) for row in read] == pairing


def test_a_conversation_holds_what_is_asked_the_examples_and_the_answer() -> None:
    [line] = dialogues.chat(TASK, [example({"text": "an otter"}, {"kind": "animal"})]).splitlines()
    assert json.loads(line) == {
        "messages": [
            {"role": "system", "content": f"Say what it is.\n\nBe brief.\n\n{dialogues.FORM}"},
            {"role": "user", "content": '{"text":"a plum"}'},
            {"role": "assistant", "content": '{"kind":"fruit"}'},
            {"role": "user", "content": '{"text":"an otter"}'},
            {"role": "assistant", "content": '{"kind":"animal"}'},
        ]
    }
    [line] = dialogues.preferences(NUMBER, [Pair("x", 1, 2)]).splitlines()
    told = json.loads(line)
    assert told["preferred_output"] == [{"role": "assistant", "content": '{"value":1}'}]
    assert told["non_preferred_output"] == [{"role": "assistant", "content": '{"value":2}'}]
    assert [message["role"] for message in told["input"]["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        "{}",
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "1"}, {"role": "user", "content": "1"}]}',
        '{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "1"}]}',
        '{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "no JSON"}]}',
        '{"messages": 7}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_row_is_named(line: str) -> None:
    good = dialogues.chat(TASK, [example(1, {"kind": "a"})])
    with pytest.raises(TrainingError, match="line 2"):
        dialogues.read(TASK, good + line, "chat")


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(InvalidInput):
        dialogues.chat(TASK, [example(float("nan"), 1)])


def test_the_heaviest_target_stays_and_weights_become_repetition() -> None:
    rows = [example("a", 1), example("a", 1), example("a", 2, 5.0), example("b", 3, 0.2), example("c", 4, 99.0)]
    found = dialogues.weighed(rows)
    assert [(row.input, row.target) for row in found] == [("a", 2)] * 5 + [("b", 3)] + [("c", 4)] * 10
    assert dialogues.weighed(rows[::-1]) == found
    many = [example("a", 1)] * 6 + [example("a", 2, 5.0)]
    assert [(row.target, row.weight) for row in dialogues.weighed(many)] == [(1, 1.0)]  # six said so


def test_an_answer_that_was_rejected_stays_with_the_target_that_was_better() -> None:
    wrong = example("a", 1, 2.0).model_copy(update={"rejected": 9})
    for rows in ([wrong, example("a", 1, 3.0)], [example("a", 1, 3.0), wrong], [wrong, example("a", 2)]):
        assert {(row.target, row.rejected) for row in dialogues.weighed(rows)} == {(1, 9)}
    [kept] = dialogues.weighed([wrong.model_copy(update={"weight": 0.4}), example("a", 2)])
    assert (kept.target, kept.rejected) == (2, None)  # it was better than 9 for another target only


def test_a_pair_is_two_different_answers() -> None:
    rows = [example("a", {"k": 1, "l": 2}), example("b", 2)]
    rows += [row.model_copy(update={"rejected": told}) for row, told in zip(rows, ({"l": 2, "k": 1}, 3), strict=True)]
    assert [dialogues.is_pair(row) for row in rows] == [False, False, False, True]
    assert dialogues.pairs(rows) == [Pair("b", 2, 3)]


@settings(deadline=None)
@given(
    st.lists(st.builds(example, st.sampled_from("ab"), st.integers(0, 2), st.floats(0.1, 20)), max_size=6), st.randoms()
)
def test_the_order_of_examples_does_not_matter(rows: list[Example], dice: object) -> None:
    rows = [row.model_copy(update={"rejected": place % 3}) if place % 2 else row for place, row in enumerate(rows)]
    mixed = list(rows)
    dice.shuffle(mixed)  # type: ignore[attr-defined]
    assert dialogues.weighed(mixed) == dialogues.weighed(rows)
