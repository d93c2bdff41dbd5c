from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from apprentice import config, jobs, plugins
from apprentice.errors import CannotLearn, ConfigError, TrainingError
from apprentice.testing.local_servers import write_checkpoint
from apprentice.testing.trainers import TASK, examples
from apprentice.trainers.mixed import Mixed
from apprentice.types import Checkpoint, Example, Json, Task

TEXT = {"type": "string", "x-free-text": True}


def task(**properties: Json) -> Task:
    return TASK.model_copy(update={"output_schema": {"type": "object", "properties": properties, "required": ["kind"]}})


KIND = TASK.output_schema["properties"]["kind"]
ANSWER = task(kind=KIND, reply=TEXT | {"x-compared": False}, urgent={"type": "boolean"})


def rows(count: int = 72) -> list[Example]:
    said = {"urgent": True, "reply": "Here you are."}
    return [row.model_copy(update={"target": {**row.target, **said}}) for row in examples(count)]


def trainer(**settings: Json) -> Mixed:
    built: Mixed = plugins.build("trainers", "mixed", **{"closed": {"encoder": "tfidf"}} | settings)
    return built


class Writer:
    """A trainer of generative models that only writes down what it was given."""

    def __init__(self) -> None:
        self.given: list[Example] = []
        self.task = ANSWER

    def check(self, task: Task) -> None:
        if task.name == "odd":
            raise CannotLearn("task 'odd' is odd", hint="another")

    def train(
        self,
        task: Task,
        examples: Sequence[Example],
        *,
        into: Path,
        seed: int,
        licence: Mapping[str, Json] = MappingProxyType({}),
    ) -> Checkpoint:
        self.given, self.task = list(examples), task
        path = write_checkpoint(into, task, [(examples[0].input, examples[0].target)])
        return Checkpoint(id=path.name, path=path, manifest={})


def test_the_manifest_names_the_fields_and_the_parts(tmp_path: Path) -> None:
    checkpoint = trainer().train(ANSWER, rows(), into=tmp_path, seed=0, licence={"rows": 72})
    written = json.loads((checkpoint.path / "manifest.json").read_text())
    assert (written["closed"], written["rest"], written["compared"]) == (["kind", "urgent"], ["reply"], [])
    assert written["rest_part"] is None
    assert written["licence"] == {"rows": 72}
    assert written["examples"] == 72
    assert [path.name for path in checkpoint.path.iterdir() if path.is_dir()] == [written["closed_part"]]
    assert "x-free-text" not in json.dumps(written)
    assert set(checkpoint.manifest["out_of_fold"]) == {row.request_id for row in rows()}
    assert checkpoint.manifest["calibration"] == written["calibration"]


def test_confidence_that_is_not_the_embedded_parts_alone_is_not_told_for_it(tmp_path: Path) -> None:
    """Where the evaluator compares the rest too, nobody knows yet how sure the generative student would have been."""
    both = task(kind=KIND, reply=TEXT)
    manifest = trainer().train(both, rows(), into=tmp_path, seed=0).manifest
    assert manifest["compared"] == ["reply"]
    assert not {"out_of_fold", "calibration"} & set(manifest)
    closed = {"encoder": "tfidf", "fields": ["kind"]}
    assert trainer(closed=closed).train(both, rows(), into=tmp_path, seed=0).manifest["compared"] == []


def test_closed_fields_that_are_not_compared_are_learned_all_the_same(tmp_path: Path) -> None:
    only_reply = task(kind=KIND | {"x-compared": False}, reply=TEXT)
    manifest = trainer().train(only_reply, rows(), into=tmp_path, seed=0).manifest
    assert (manifest["closed"], manifest["compared"]) == (["kind"], ["reply"])
    assert 0.8 < manifest["metrics"]["agreement"] <= 1


@pytest.mark.parametrize(
    ("properties", "why", "hint"),
    [
        ({"reply": TEXT, "parts": {"type": "object"}}, "no field", "llama_cpp"),
        ({"kind": KIND, "urgent": {"type": "boolean"}}, "every field", "backend: embedded"),
    ],
)
def test_what_one_student_can_do_alone_is_refused_with_its_name(
    properties: dict[str, Json], why: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(CannotLearn, match=f"'sort': {why}") as caught:
        trainer().check(task(**properties))
    assert hint in (caught.value.hint or "")
    with pytest.raises(CannotLearn, match=why):
        trainer().train(task(**properties), rows(), into=tmp_path, seed=0)
    with pytest.raises(CannotLearn, match="no field"):
        trainer().check(TASK.model_copy(update={"output_schema": {"type": "string"}}))


def test_what_turns_out_to_be_free_text_is_left_to_the_other_student(tmp_path: Path) -> None:
    plain = task(kind=KIND, note={"type": "string"}, reply=TEXT)
    varied = [row.model_copy(update={"target": {**row.target, "note": row.input["text"]}}) for row in rows(240)]
    manifest = trainer().train(plain, varied, into=tmp_path, seed=0).manifest
    assert (manifest["closed"], manifest["rest"]) == (["kind"], ["note", "reply"])
    same = [row.model_copy(update={"target": {**row.target, "note": "none"}}) for row in rows(240)]
    assert trainer().train(plain, same, into=tmp_path, seed=0).manifest["closed"] == ["kind", "note"]
    only_text = task(note={"type": "string"}, reply=TEXT).model_copy()
    with pytest.raises(CannotLearn, match="no field"):
        trainer().train(only_text, varied, into=tmp_path, seed=0)


def test_a_generative_student_learns_the_rest_with_the_closed_fields_decided(tmp_path: Path) -> None:
    writer = Writer()
    mixed = Mixed(plugins.build("trainers", "embedded", encoder="tfidf"), writer, everything=True)
    odd = Example(input={"text": "?"}, target="no object", source="remote")
    checkpoint = mixed.train(ANSWER, [*rows(), odd], into=tmp_path, seed=0)
    first = rows()[0]
    assert len(writer.given) == 72
    assert writer.given[0].input == {
        "input": first.input,
        "decided": {"kind": first.target["kind"], "urgent": True},
    }
    assert writer.given[0].target == {"reply": "Here you are."}
    assert writer.task.output_schema["properties"] == {"reply": {"type": "string"}}, "without our marks, as it is asked"
    assert writer.given[0].request_id == first.request_id
    assert checkpoint.manifest["left_out"] == 1
    parts = [checkpoint.manifest["closed_part"], checkpoint.manifest["rest_part"]]
    assert sorted(path.name for path in checkpoint.path.iterdir()) == sorted(["manifest.json", *parts])
    again = mixed.train(ANSWER, [*rows(), odd], into=tmp_path, seed=0)
    assert again == checkpoint
    assert [path.name for path in (tmp_path / ".parts").glob("[!.]*")] == [], "what is there already is not kept twice"
    with pytest.raises(TrainingError, match="generative student"):
        mixed.update(ANSWER, rows(), base=checkpoint.path, into=tmp_path, seed=0)
    with pytest.raises(CannotLearn, match="odd"):
        mixed.check(ANSWER.model_copy(update={"name": "odd"}))


def test_a_damaged_part_is_replaced_by_teaching_again(tmp_path: Path) -> None:
    checkpoint = trainer().train(ANSWER, rows(), into=tmp_path, seed=0)
    weights = checkpoint.path / checkpoint.manifest["closed_part"] / "weights.npy"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert trainer().train(ANSWER, rows(), into=tmp_path, seed=0) == checkpoint
    assert weights.read_bytes() == whole


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"closed": {"encoder": "minlm"}}, "minilm"),
        ({"closed": {"d": 1}}, "'d'"),
        ({"rest": "embedded"}, "writes no text"),
        ({"rest": "nobody"}, "'nobody'"),
        ({"rest": "openai", "rest_settings": {"model": "gpt-4.1-mini"}}, "costs money"),
        ({"rest_settings": {"epochs": 1}}, "names none"),
    ],
)
def test_settings_that_are_wrong_are_named(settings: dict[str, Json], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer(**settings)


def test_a_configuration_is_checked_before_anything_is_paid() -> None:
    text = """\
tasks:
  - {name: answer, description: d, input_schema: {text: str}, match_fields: [kind], output_schema: %s}
remote: {provider: openai, model: m}
local:
  backend: mixed
  fine_tune_backend: mixed
  settings: {rest: {backend: llama_cpp, model: base.gguf}}
  fine_tune_settings: {closed: {encoder: tfidf}}
"""
    config.check_learnable(config.parse(text % "{kind: 'enum[a, b]', reply: str}"))
    with pytest.raises(ConfigError, match=r"tasks\[0\] \(answer\): .*every field"):
        config.check_learnable(config.parse(text % "{kind: 'enum[a, b]'}"))


def test_a_led_training_leads_and_stops_the_generative_students_job(
    tmp_path: Path,
) -> None:
    class Led(Writer):
        """With a job of its own."""

        told: tuple[object, ...] = ()

        def lead(self, token: int) -> None:
            self.told += (token,)

        def stop(self) -> None:
            self.told += ("stop",)

    led = Led()
    made = Mixed(plugins.build("trainers", "embedded", encoder="tfidf"), led, everything=True)
    assert isinstance(made, jobs.LedTrainer)
    made.lead(7)
    made.stop()
    assert led.told == (7, "stop")
    with pytest.raises(TrainingError, match="waited for no longer"):
        made.train(ANSWER, rows(), into=tmp_path, seed=0)
    assert not led.given
    alone = trainer()
    alone.lead(7)  # there is no generative student to lead
    assert alone.train(ANSWER, rows(), into=tmp_path, seed=0).path.is_dir()
