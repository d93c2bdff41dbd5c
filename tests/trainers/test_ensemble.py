from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from apprentice import jobs, plugins
from apprentice.calibration import checked
from apprentice.errors import CannotLearn, ConfigError, TrainingError
from apprentice.testing.local_servers import serve_llama_cpp
from apprentice.testing.servers import asked
from apprentice.testing.trainers import TASK, examples
from apprentice.trainers.ensemble import Ensemble, _Member
from apprentice.types import Checkpoint, Example, Json, Task

PAIR: list[dict[str, Any]] = [{"settings": {"encoder": "minilm", "c": c}} for c in (5.0, 20.0)]
TEXT = {"type": "string", "x-free-text": True}


def trainer(members: list[dict[str, Any]] | None = PAIR, **settings: Json) -> Ensemble:
    built: Ensemble = plugins.build("trainers", "ensemble", members=members, **settings)
    return built


def puzzling(count: int) -> list[Example]:
    """One in three is about nothing that the text tells."""
    rows = examples(count)
    kinds = ["fruit", "animal", "tool"]
    for number in range(0, count, 3):
        update = {"input": {"text": f"number {number}, whatever it is"}, "target": {"kind": kinds[number // 3 % 3]}}
        rows[number] = rows[number].model_copy(update=update)
    return rows


def test_the_manifest_names_the_parts_and_holds_no_address(tmp_path: Path) -> None:
    checkpoint = trainer().train(TASK, examples(), into=tmp_path, seed=7, licence={"rows": 72})
    written = json.loads((checkpoint.path / "manifest.json").read_text())
    folders = sorted(path.name for path in checkpoint.path.iterdir() if path.is_dir())
    assert folders == sorted(written["parts"])
    assert len(folders) == 2
    assert written["trainer"] == {"folds": 3, "seed": 7, "seeds": [0, 0]}
    assert (written["licence"], written["examples"], written["counted"]) == ({"rows": 72}, 72, None)
    assert not {"backend", "serve", "members"} & set(written)
    for part in folders:
        plugins.build("models", "embedded", checkpoint=checkpoint.path / part)


def test_confidence_is_calibrated_on_rows_that_no_member_had_learned(tmp_path: Path) -> None:
    rows = puzzling(240)
    manifest = trainer().train(TASK, rows, into=tmp_path, seed=0).manifest
    table = manifest["calibration"]
    assert checked(json.loads(json.dumps(table))) == table
    assert set(manifest["out_of_fold"]) == {row.request_id for row in rows}
    known = [manifest["out_of_fold"][row.request_id] for row in rows]
    riddles, others = known[::3], [value for place, value in enumerate(known) if place % 3]
    assert sum(riddles) / len(riddles) < 0.6 < 0.9 < sum(others) / len(others)
    assert 0.66 < manifest["metrics"]["agreement"] < 0.85
    assert manifest["metrics"]["calibration"]["ece"] < 0.1


def test_a_seed_of_its_own_makes_a_member_another(tmp_path: Path) -> None:
    same, other = (
        trainer([PAIR[0], PAIR[0] | {"seed": seed}]).train(TASK, puzzling(60), into=tmp_path, seed=0) for seed in (0, 1)
    )
    assert len(set(same.manifest["parts"])) == 1
    assert len(set(other.manifest["parts"])) == 2
    for made in (same, other):
        plugins.build("models", "ensemble", checkpoint=made.path)


def test_without_members_two_encoders_are_taken(tmp_path: Path) -> None:
    checkpoint = trainer(None).train(TASK, examples(30), into=tmp_path, seed=0)
    made = [json.loads((checkpoint.path / part / "manifest.json").read_text()) for part in checkpoint.manifest["parts"]]
    assert [manifest["encoder"]["plugin"] for manifest in made] == ["minilm", "tfidf"]


def test_what_is_not_compared_does_not_make_an_answer_wrong(tmp_path: Path) -> None:
    properties = {
        "kind": TASK.output_schema["properties"]["kind"],
        "lucky": {"type": "boolean", "x-compared": False},
    }
    task = TASK.model_copy(update={"output_schema": {"type": "object", "properties": properties, "required": ["kind"]}})
    rows = [
        row.model_copy(update={"target": {**row.target, "lucky": number * 7 % 5 < 2}})
        for number, row in enumerate(examples())
    ]
    manifest = trainer().train(task, rows, into=tmp_path, seed=0).manifest
    assert manifest["counted"] == ["kind"]
    assert manifest["metrics"]["agreement"] > 0.9
    assert "x-compared" not in json.dumps(manifest)


async def test_members_on_servers_are_asked_as_well(tmp_path: Path) -> None:
    output = {"kind": TASK.output_schema["properties"]["kind"], "reply": TEXT}
    schema = {"type": "object", "properties": output, "required": list(output), "additionalProperties": False}
    task = TASK.model_copy(update={"output_schema": schema})
    rows = [row.model_copy(update={"target": {**row.target, "reply": "Here."}}) for row in examples(60)]
    async with serve_llama_cpp(lambda _: {"reply": "Here."}) as server:
        one = {
            "trainer": "mixed",
            "settings": {"closed": {"encoder": "minilm"}},
            "serve": {"rest": {"backend": "llama_cpp", "base_url": server.url}},
        }
        other = one | {"settings": {"closed": {"encoder": "minilm", "c": 5.0}}}
        made = await asyncio.to_thread(trainer([one, other], folds=2).train, task, rows, into=tmp_path, seed=0)
        questions = [question for question in server.questions() if "decided" in (asked(question) or {})]
    manifest = made.manifest
    assert manifest["metrics"]["agreement"] > 0.9
    assert len(manifest["out_of_fold"]) == 60
    assert len(questions) >= 120, "each of two members, about each row once"
    assert server.url not in json.dumps(manifest)


@pytest.mark.parametrize(
    ("members", "wrong"),
    [
        ([], "at least two"),
        ([PAIR[0]], "at least two"),
        ([PAIR[0], {"encoder": "tfidf"}], "no setting 'encoder'"),
        ([PAIR[0], {"settings": {"encodr": "tfidf"}}], "encodr"),
        ([PAIR[0], {"trainer": "ensemble"}], "makes several"),
        ([PAIR[0], {"trainer": "no_such"}], "no_such"),
        ([PAIR[0], {"backend": "no_such"}], "no_such"),
        ([PAIR[0], {"seed": "1"}], "whole number"),
        ([PAIR[0], {"trainer": "openai", "settings": {"model": "gpt-4o-mini-2024-07-18"}}], "costs money"),
    ],
)
def test_wrong_members_are_named(members: list[dict[str, Any]], wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(ConfigError, match=wrong):
        trainer(members)


def test_one_fold_is_refused() -> None:
    with pytest.raises(ConfigError, match="folds"):
        trainer(folds=1)


def test_what_a_member_cannot_learn_nobody_learns(tmp_path: Path) -> None:
    task = TASK.model_copy(update={"output_schema": {"type": "object", "properties": {"reply": TEXT}}})
    with pytest.raises(CannotLearn):
        trainer().check(task)
    with pytest.raises(TrainingError):
        trainer().train(TASK, [], into=tmp_path, seed=0)


def test_what_is_killed_between_two_parts_leaves_no_checkpoint(tmp_path: Path) -> None:
    """And the next run finds what it needs and makes the same."""
    whole = trainer().train(TASK, examples(), into=tmp_path / "whole", seed=0)
    into = tmp_path / "cut"
    plugins.build("trainers", "embedded", **PAIR[0]["settings"]).train(TASK, examples(), into=into / ".parts", seed=0)
    assert not list(into.glob("sha256-*"))
    assert trainer().train(TASK, examples(), into=into, seed=0).id == whole.id


class Led:
    """A trainer that has jobs: it does not train once it was stopped."""

    def __init__(self, student: Any) -> None:
        self.student = student
        self.told: list[object] = []
        self.halt: Ensemble | None = None

    def check(self, task: Task) -> None: ...

    def lead(self, token: int) -> None:
        self.told.append(token)

    def stop(self) -> None:
        self.told.append("stop")

    def train(self, *given: Any, **settings: Any) -> Checkpoint:
        if self.halt is not None and self.told.count("trained"):
            self.halt.stop()
            raise TrainingError("job x is waited for no longer")
        self.told.append("trained")
        made: Checkpoint = self.student.train(*given, **settings)
        return made


def test_members_with_jobs_are_led_and_a_stop_is_no_member_that_learned_too_little(tmp_path: Path) -> None:
    members = [Led(plugins.build("trainers", "embedded", encoder="tfidf")) for _ in range(2)]
    made = Ensemble([_Member(member, "embedded", {}, 0) for member in members], folds=2)
    assert isinstance(made, jobs.LedTrainer)
    made.lead(7)
    members[0].halt = made  # in the middle of the first fold
    with pytest.raises(TrainingError, match="waited for no longer"):
        made.train(TASK, examples(), into=tmp_path, seed=0)
    assert [member.told for member in members] == [[7, "trained", "stop"], [7, "trained", "stop"]]
    assert not list(tmp_path.glob("sha256-*"))
