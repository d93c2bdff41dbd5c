"""What every trainer promises, as checks that a third party runs over its own.

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(check, tmp_path):
    await check(Case(my_trainer.build(), lambda checkpoint: my_model.build(checkpoint=str(checkpoint.path))), tmp_path)

UPDATE_CHECKS are for a trainer that has `update` as well. Each check is given a trainer, how to serve what it makes, and a
folder that no other check uses. A broken promise raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from apprentice.errors import CannotLearn, TrainingError
from apprentice.trainers import Updater
from apprentice.types import Answer, Checkpoint, Example, Json, Model, Task, Trainer

_NO_PROOF: Mapping[str, Json] = MappingProxyType({})


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


class Case(NamedTuple):
    """The trainer under test, and a task that it may refuse (None: it learns whatever there is).

    `task`: one that it learns, with the input of TASK and all of its output; `beside`: what every target has beside that.
    """

    trainer: Trainer
    serve: Callable[[Checkpoint], Model]
    unlearnable: Task | None = None
    task: Task = TASK
    beside: Mapping[str, Json] = MappingProxyType({})

    def rows(self, count: int = 72, *, weight: float = 1.0) -> list[Example]:
        """`examples`, as far as this case's task asks."""
        return [
            row.model_copy(update={"target": {**row.target, **self.beside}}) for row in examples(count, weight=weight)
        ]


type Check = Callable[[Case, Path], Awaitable[None]]


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
    checkpoint = case.trainer.train(case.task, case.rows(), into=into, seed=0)
    assert await _right(case, checkpoint) >= 15


async def the_same_examples_give_the_same_id(case: Case, into: Path) -> None:
    """In any order, in another folder; and other examples, or other targets, another id."""
    first = case.trainer.train(case.task, case.rows(), into=into / "a", seed=0)
    again = case.trainer.train(case.task, case.rows()[::-1], into=into / "b", seed=0)
    assert first.id == again.id
    assert first.id.startswith("sha256-")
    assert len(first.id) == len("sha256-") + 64
    assert _bytes(first) == _bytes(again)
    assert case.trainer.train(case.task, case.rows(60), into=into / "a", seed=0).id != first.id


async def a_checkpoint_lies_under_the_folder_by_its_id(case: Case, into: Path) -> None:
    """And nothing else does: a second run of the same finds it there, and no draft stays behind."""
    checkpoint = case.trainer.train(case.task, case.rows(), into=into, seed=0)
    assert checkpoint.path == into / checkpoint.id
    before = _bytes(checkpoint)
    assert case.trainer.train(case.task, case.rows(), into=into, seed=0) == checkpoint
    assert _bytes(checkpoint) == before
    assert _names(into) == [checkpoint.id]


async def a_label_never_seen_is_never_predicted(case: Case, into: Path) -> None:
    """The schema allows a stone, the examples have none."""
    checkpoint = case.trainer.train(case.task, case.rows(), into=into, seed=0)
    said = await _kinds(case, checkpoint, [{"text": text} for text in ("stone", "the stone", "a grey stone", "")])
    assert set(said) <= set(THINGS)


async def weights_decide_between_contradictions(case: Case, into: Path) -> None:
    """What a person corrected outweighs a model's label."""
    right, wrong = case.rows(), [_called(row, "tool") for row in case.rows()]
    for heavy, light, kind in ((case.rows(weight=20.0), wrong, "fruit"), (right, _weighing(wrong, 20.0), "tool")):
        checkpoint = case.trainer.train(case.task, [*heavy, *light], into=into, seed=0)
        assert await _kinds(case, checkpoint, [{"text": "please look at the apple"}]) == [kind]


async def little_data_is_enough_to_begin(case: Case, into: Path) -> None:
    """One example, one label only: the answer is that label."""
    for some in (case.rows(1), case.rows(5)):
        checkpoint = case.trainer.train(case.task, some, into=into, seed=0)
        assert await _kinds(case, checkpoint, [{"text": "anything"}]) == ["fruit"]


async def no_examples_are_a_training_error(case: Case, into: Path) -> None:
    """And nothing is written."""
    try:
        case.trainer.train(case.task, [], into=into, seed=0)
    except TrainingError:
        assert _names(into) == []
        return
    raise AssertionError("it trained on nothing")


async def what_it_cannot_learn_is_refused_before_money_is_spent(case: Case, into: Path) -> None:
    """`check` says so, with a hint; `train` does not try."""
    case.trainer.check(case.task)
    if case.unlearnable is None:
        return
    for attempt in (
        case.trainer.check,
        lambda task: case.trainer.train(task, case.rows(), into=into, seed=0),
    ):
        try:
            attempt(case.unlearnable)
        except CannotLearn as error:
            assert case.unlearnable.name in str(error), "the message names the task"
            assert error.hint, "the error says what to do"
        else:
            raise AssertionError("a task that cannot be learned was taken")


# --- a trainer with `update` ------------------------------------------------------------------------------------------


async def an_update_is_a_checkpoint_like_any_other(case: Case, into: Path) -> None:
    """By its id beside its base, which it names and leaves as it was; the model plugin serves it."""
    base = case.trainer.train(case.task, case.rows(64), into=into, seed=0)
    before = _bytes(base)
    updated = _updater(case).update(case.task, case.rows(), base=base.path, into=into, seed=0, licence={"rows": 72})
    assert updated.path == into / updated.id
    assert updated.manifest["updated_from"] == base.id != updated.id
    assert updated.manifest["licence"] == {"rows": 72}
    assert _bytes(base) == before
    assert _names(into) == sorted([base.id, updated.id])
    assert await _right(case, updated) >= 15


async def the_same_base_and_examples_give_the_same_update(case: Case, into: Path) -> None:
    """In any order, in another folder; another base gives another."""
    bases = [case.trainer.train(case.task, case.rows(count), into=into / "bases", seed=0) for count in (64, 66)]
    first, again, other = (
        _updater(case).update(case.task, rows, base=base.path, into=into / folder, seed=0, licence=_NO_PROOF)
        for rows, base, folder in (
            (case.rows(), bases[0], "a"),
            (case.rows()[::-1], bases[0], "b"),
            (case.rows(), bases[1], "a"),
        )
    )
    assert first.id == again.id
    assert _bytes(first) == _bytes(again)
    assert other.id != first.id


async def an_update_answers_as_a_full_training_does(case: Case, into: Path) -> None:
    """To 97 of 100 questions that neither has seen."""
    base = case.trainer.train(case.task, case.rows(80), into=into, seed=0)
    asked = [{"text": f"{doing} {given['text']}"} for doing in ("Hello,", "now", "") for given in _asked()]
    updated = _updater(case).update(case.task, case.rows(90), base=base.path, into=into, seed=0, licence=_NO_PROOF)
    full = case.trainer.train(case.task, case.rows(90), into=into, seed=0)
    one, other = await _kinds(case, updated, asked), await _kinds(case, full, asked)
    assert sum(a == b for a, b in zip(one, other, strict=True)) >= 0.97 * len(asked)


async def an_update_learns_a_label_that_its_base_never_saw(case: Case, into: Path) -> None:
    """And forgets one that no example has any more."""
    rows = case.rows(108)
    known = [row for row in rows if row.target["kind"] != "tool"]
    stone = [_called(row, "stone") if place < 3 else row for place, row in enumerate(known)]
    base = case.trainer.train(case.task, stone, into=into, seed=0)
    tools = [row for row in rows if row.target["kind"] == "tool"][: len(known) // 5]
    updated = _updater(case).update(case.task, [*known, *tools], base=base.path, into=into, seed=0, licence=_NO_PROOF)
    assert (await _kinds(case, updated, _asked("tool"))).count("tool") >= 5
    assert "stone" not in await _kinds(case, updated, [*_asked(), {"text": "stone"}, {"text": "the grey stone"}])


async def an_update_takes_a_correction_to_heart(case: Case, into: Path) -> None:
    """What a person said about a row outweighs what its base had learned about the same input."""
    rows = [_called(row, "tool") if "apple" in row.input["text"] else row for row in case.rows()]
    base = case.trainer.train(case.task, rows, into=into, seed=0)
    asked = [{"text": "could you fetch the apple?"}]
    assert await _kinds(case, base, asked) == ["tool"]
    corrected = _weighing([row for row in case.rows() if "apple" in row.input["text"]], 20.0)
    others = [row for row in rows if "apple" not in row.input["text"]]
    updated = _updater(case).update(
        case.task, [*others, *corrected], base=base.path, into=into, seed=0, licence=_NO_PROOF
    )
    assert await _kinds(case, updated, asked) == ["fruit"]


async def confidence_in_a_row_is_from_before_it_was_learned(case: Case, into: Path) -> None:
    """`out_of_fold`, where a trainer tells it: as the base had it, and for rows new to the base what the base says."""
    base = case.trainer.train(case.task, case.rows(64), into=into, seed=0)
    updated = _updater(case).update(case.task, case.rows(), base=base.path, into=into, seed=0, licence=_NO_PROOF)
    told = updated.manifest.get("out_of_fold")
    assert (told is None) == ("out_of_fold" not in base.manifest)
    if told is None:
        return
    assert set(told) == {row.request_id for row in case.rows()}
    assert {row.request_id: told[row.request_id] for row in case.rows(64)} == base.manifest["out_of_fold"]
    new = case.rows()[64:]
    for row, answer in zip(new, await _answers(case, base, [row.input for row in new]), strict=True):
        assert answer.confidence is not None
        assert abs(told[row.request_id] - answer.confidence) < 1e-3


async def what_needs_full_teaching_is_refused(case: Case, into: Path) -> None:
    """A quarter more examples than the base, in one step or in several; a task that was changed; a base that is none."""
    base = case.trainer.train(case.task, case.rows(60), into=into, seed=0)
    step = _updater(case).update(case.task, case.rows(74), base=base.path, into=into, seed=0, licence=_NO_PROOF)
    kinds = case.task.output_schema["properties"] | {"kind": {"enum": [*THINGS, "stone", "water"]}}
    wider = case.task.model_copy(update={"output_schema": case.task.output_schema | {"properties": kinds}})
    before = _names(into)
    for task, count, folder in (
        (case.task, 75, base.path),
        (case.task, 75, step.path),
        (wider, 60, base.path),
        (case.task, 60, into / "sha256-nothing"),
        (case.task, 0, base.path),
    ):
        try:
            _updater(case).update(task, case.rows(count), base=folder, into=into, seed=0, licence=_NO_PROOF)
        except TrainingError as error:
            assert error.hint, "the error says what to do"
            continue
        raise AssertionError(f"it went on from {folder} with {count} examples")
    assert _names(into) == before


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

UPDATE_CHECKS: tuple[Check, ...] = (
    an_update_is_a_checkpoint_like_any_other,
    the_same_base_and_examples_give_the_same_update,
    an_update_answers_as_a_full_training_does,
    an_update_learns_a_label_that_its_base_never_saw,
    an_update_takes_a_correction_to_heart,
    confidence_in_a_row_is_from_before_it_was_learned,
    what_needs_full_teaching_is_refused,
)


async def _kinds(case: Case, checkpoint: Checkpoint, asked: Sequence[dict[str, str]]) -> list[str]:
    return [answer.output["kind"] for answer in await _answers(case, checkpoint, asked)]


async def _answers(case: Case, checkpoint: Checkpoint, asked: Sequence[dict[str, str]]) -> list[Answer]:
    model = case.serve(checkpoint)
    try:
        if (wait := getattr(model, "ready", None)) is not None:
            await wait()
        return [await model.answer(case.task, given) for given in asked]
    finally:
        await model.close()


def _asked(*kinds: str) -> list[dict[str, str]]:
    """Sentences that no example has, about the things of these kinds; of all without any."""
    return [{"text": f"could you fetch the {thing}?"} for kind in kinds or THINGS for thing in THINGS[kind]]


async def _right(case: Case, checkpoint: Checkpoint) -> int:
    kinds = [kind for kind, things in THINGS.items() for _ in things]
    return sum(a == b for a, b in zip(await _kinds(case, checkpoint, _asked()), kinds, strict=True))


def _called(row: Example, kind: str) -> Example:
    return row.model_copy(update={"target": {**row.target, "kind": kind}})


def _updater(case: Case) -> Updater:
    assert isinstance(case.trainer, Updater), "these checks are for a trainer with `update`"
    return case.trainer


def _weighing(rows: Sequence[Example], weight: float) -> list[Example]:
    return [row.model_copy(update={"weight": weight}) for row in rows]


def _names(folder: Path) -> list[str]:
    """What lies under the folder; files whose name begins with a dot are the trainer's own."""
    return sorted(path.name for path in folder.glob("[!.]*"))


def _bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    files = sorted(path for path in checkpoint.path.rglob("*") if path.is_file())
    return {str(path.relative_to(checkpoint.path)): path.read_bytes() for path in files}
