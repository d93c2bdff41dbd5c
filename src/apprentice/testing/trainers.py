"""What every trainer promises, as checks that a third party runs over its own.

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(check, tmp_path):
    await check(Case(my_trainer.build(), lambda checkpoint: my_model.build(checkpoint=str(checkpoint.path))), tmp_path)

Each check is given a trainer, how to serve what it makes, and a folder that no other check uses. A broken promise
raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from apprentice.errors import CannotLearn, TrainingError
from apprentice.types import Checkpoint, Example, Model, Task, Trainer


class Case(NamedTuple):
    """The trainer under test, and a task that it may refuse (None: it learns whatever there is)."""

    trainer: Trainer
    serve: Callable[[Checkpoint], Model]
    unlearnable: Task | None = None


type Check = Callable[[Case, Path], Awaitable[None]]

THINGS = {
    "fruit": ("apple", "pear", "plum", "cherry", "grape", "melon"),
    "animal": ("horse", "otter", "badger", "heron", "weasel", "tiger"),
    "tool": ("hammer", "chisel", "wrench", "pliers", "spanner", "drill"),
}
TASK = Task(
    name="sort",
    description="Say what kind of thing is meant.",
    input_schema={"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    output_schema={
        "type": "object",
        "properties": {"kind": {"enum": [*THINGS, "stone"]}},
        "required": ["kind"],
        "additionalProperties": False,
    },
)


def examples(count: int = 72, *, weight: float = 1.0) -> list[Example]:
    """The kinds of eighteen things, in sentences that are all different; no stone among them."""
    named = [(thing, kind) for kind, things in THINGS.items() for thing in things]
    return [
        Example(
            input={"text": f"please look at the {named[number % 18][0]}, number {number}"},
            target={"kind": named[number % 18][1]},
            source="teacher",
            weight=weight,
            request_id=f"r{number}",
        )
        for number in range(count)
    ]


async def it_learns_what_it_is_shown(case: Case, into: Path) -> None:
    """The model plugin serves the checkpoint, and knows sentences that it has not seen."""
    checkpoint = case.trainer.train(TASK, examples(), into=into, seed=0)
    asked = [{"text": f"could you fetch the {thing}?"} for things in THINGS.values() for thing in things]
    kinds = [kind for kind, things in THINGS.items() for _ in things]
    assert sum(a == b for a, b in zip(await _kinds(case, checkpoint, asked), kinds, strict=True)) >= 15


async def the_same_examples_give_the_same_id(case: Case, into: Path) -> None:
    """In any order, in another folder; and other examples, or other targets, another id."""
    first = case.trainer.train(TASK, examples(), into=into / "a", seed=0)
    again = case.trainer.train(TASK, examples()[::-1], into=into / "b", seed=0)
    assert first.id == again.id
    assert first.id.startswith("sha256-")
    assert len(first.id) == len("sha256-") + 64
    assert _bytes(first) == _bytes(again)
    assert case.trainer.train(TASK, examples(60), into=into / "a", seed=0).id != first.id


async def a_checkpoint_lies_under_the_folder_by_its_id(case: Case, into: Path) -> None:
    """And nothing else does: a second run of the same finds it there, and no draft stays behind."""
    checkpoint = case.trainer.train(TASK, examples(), into=into, seed=0)
    assert checkpoint.path == into / checkpoint.id
    before = _bytes(checkpoint)
    assert case.trainer.train(TASK, examples(), into=into, seed=0) == checkpoint
    assert _bytes(checkpoint) == before
    assert _names(into) == [checkpoint.id]


async def a_label_never_seen_is_never_predicted(case: Case, into: Path) -> None:
    """The schema allows a stone, the examples have none."""
    checkpoint = case.trainer.train(TASK, examples(), into=into, seed=0)
    said = await _kinds(case, checkpoint, [{"text": text} for text in ("stone", "the stone", "a grey stone", "")])
    assert set(said) <= set(THINGS)


async def weights_decide_between_contradictions(case: Case, into: Path) -> None:
    """What a person corrected outweighs a model's label."""
    wrong = [example.model_copy(update={"target": {"kind": "tool"}}) for example in examples()]
    for heavy, light, kind in ((examples(weight=20.0), wrong, "fruit"), (examples(), _weighing(wrong, 20.0), "tool")):
        checkpoint = case.trainer.train(TASK, [*heavy, *light], into=into, seed=0)
        assert await _kinds(case, checkpoint, [{"text": "please look at the apple"}]) == [kind]


async def little_data_is_enough_to_begin(case: Case, into: Path) -> None:
    """One example, one label only: the answer is that label."""
    for some in (examples(1), examples(5)):
        checkpoint = case.trainer.train(TASK, some, into=into, seed=0)
        assert await _kinds(case, checkpoint, [{"text": "anything"}]) == ["fruit"]


async def no_examples_are_a_training_error(case: Case, into: Path) -> None:
    """And nothing is written."""
    try:
        case.trainer.train(TASK, [], into=into, seed=0)
    except TrainingError:
        assert _names(into) == []
        return
    raise AssertionError("it trained on nothing")


async def what_it_cannot_learn_is_refused_before_money_is_spent(case: Case, into: Path) -> None:
    """`check` says so, with a hint; `train` does not try."""
    case.trainer.check(TASK)
    if case.unlearnable is None:
        return
    for attempt in (
        case.trainer.check,
        lambda task: case.trainer.train(task, examples(), into=into, seed=0),
    ):
        try:
            attempt(case.unlearnable)
        except CannotLearn as error:
            assert case.unlearnable.name in str(error), "the message names the task"
            assert error.hint, "the error says what to do"
        else:
            raise AssertionError("a task that cannot be learned was taken")


CHECKS: tuple[Check, ...] = (
    it_learns_what_it_is_shown,
    the_same_examples_give_the_same_id,
    a_checkpoint_lies_under_the_folder_by_its_id,
    a_label_never_seen_is_never_predicted,
    weights_decide_between_contradictions,
    little_data_is_enough_to_begin,
    no_examples_are_a_training_error,
    what_it_cannot_learn_is_refused_before_money_is_spent,
)


async def _kinds(case: Case, checkpoint: Checkpoint, asked: Sequence[dict[str, str]]) -> list[str]:
    model = case.serve(checkpoint)
    try:
        return [(await model.answer(TASK, given)).output["kind"] for given in asked]
    finally:
        await model.close()


def _weighing(rows: Sequence[Example], weight: float) -> list[Example]:
    return [row.model_copy(update={"weight": weight}) for row in rows]


def _names(folder: Path) -> list[str]:
    """What lies under the folder; files whose name begins with a dot are the trainer's own."""
    return sorted(path.name for path in folder.glob("[!.]*"))


def _bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(checkpoint.path.iterdir())}
