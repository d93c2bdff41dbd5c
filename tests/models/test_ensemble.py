"""Students that vote: what is served when they agree, when they do not, and when one of them is not there."""

from __future__ import annotations

import asyncio
import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from apprentice import plugins, shelf
from apprentice.calibration import SAME
from apprentice.config import Local
from apprentice.errors import ConfigError, ModelRejected, ModelUnavailable
from apprentice.models.ensemble import Ensemble, Parts
from apprentice.testing.local_servers import serve_llama_cpp
from apprentice.testing.models import ScriptedModel
from apprentice.testing.trainers import TASK, examples
from apprentice.types import Answer, Checkpoint, Json, ManyModel, Task, Trainer

PAIR: list[dict[str, Any]] = [{"settings": {"encoder": "minilm", "c": c}} for c in (5.0, 20.0)]
GIVEN: Json = {"text": "please look at the otter"}
KIND = TASK.output_schema["properties"]["kind"]


def answering(**reply: Json) -> Task:
    output = {"kind": KIND, "reply": {"type": "string"} | reply}
    schema = {"type": "object", "properties": output, "required": list(output), "additionalProperties": False}
    return TASK.model_copy(update={"output_schema": schema})


ANSWER = answering()


def writing(url: str) -> dict[str, Any]:
    return {"rest": {"backend": "llama_cpp", "base_url": url}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: Checkpoint = plugins.build("trainers", "ensemble", members=PAIR).train(
        TASK, examples(), into=tmp_path_factory.mktemp("models"), seed=0
    )
    return made


@pytest.fixture
async def three(tmp_path: Path) -> Checkpoint:
    """Three that decide a kind and have a reply written."""
    rows = [row.model_copy(update={"target": {**row.target, "reply": "Here."}}) for row in examples(60)]
    async with serve_llama_cpp(lambda _: {"reply": "Here."}) as server:
        members = [
            {"trainer": "mixed", "settings": {"closed": {"encoder": "minilm", "c": c}}, "serve": writing(server.url)}
            for c in (5.0, 10.0, 20.0)
        ]
        trainer: Trainer = plugins.build("trainers", "ensemble", members=members, folds=2)
        task = answering(**{"x-free-text": True})
        return await asyncio.to_thread(trainer.train, task, rows, into=tmp_path, seed=0)


async def test_what_all_say_is_served_with_a_calibrated_confidence(checkpoint: Checkpoint) -> None:
    model = plugins.build("models", "ensemble", checkpoint=checkpoint.path)
    answer = await model.answer(TASK, GIVEN)
    assert answer.output == {"kind": "animal"}
    assert answer.model == f"ensemble:{checkpoint.id.removeprefix('sha256-')[:12]}"
    riddle = await model.answer(TASK, {"text": "xyzzy"})
    assert 0 < riddle.confidence < answer.confidence < 1
    assert model.state() == "ready"


async def test_many_inputs_are_answered_as_one_by_one(checkpoint: Checkpoint) -> None:
    model = plugins.build("models", "ensemble", checkpoint=checkpoint.path)
    assert isinstance(model, ManyModel)
    inputs: list[Json] = [GIVEN, {"text": "the plum"}, {"text": "xyzzy"}]
    many = model.answer_many(TASK, inputs)
    one = [await model.answer(TASK, given) for given in inputs]
    assert [(answer.output, answer.confidence) for answer in many] == [(a.output, a.confidence) for a in one]
    assert model.answer_many(TASK, []) == []


async def test_a_configuration_serves_it_as_any_other_backend(checkpoint: Checkpoint) -> None:
    model = shelf.load(Local(backend="ensemble", fine_tune_backend="ensemble"), checkpoint.path)
    assert (await model.answer(TASK, GIVEN)).output == {"kind": "animal"}
    await model.close()


async def test_a_member_that_fails_is_missed_and_its_reason_told(three: Checkpoint) -> None:
    async with serve_llama_cpp(lambda _: {"reply": "Fine."}) as server:
        async with serve_llama_cpp(lambda _: {"reply": "Fine."}) as other:
            members = [{"backend": "mixed", **writing(url)} for url in (server.url, other.url, server.url)]
            model = plugins.build("models", "ensemble", checkpoint=three.path, members=members)
            assert not isinstance(model, ManyModel)
            await model.ready()
            whole = await model.answer(ANSWER, GIVEN)
            assert whole.output == {"kind": "animal", "reply": "Fine."}
            assert "gave no answer" not in model.state()
        less = await model.answer(ANSWER, GIVEN)
        assert less.output == whole.output
        assert less.confidence < whole.confidence
        assert "member 2 gave no answer: " in model.state()
    with pytest.raises(ModelUnavailable):
        await model.answer(ANSWER, GIVEN)
    await model.close()


async def test_only_valid_answers_have_a_vote(three: Checkpoint) -> None:
    """Two write what the schema has no room for; the third is served."""
    async with serve_llama_cpp(lambda _: {"reply": 7}) as odd, serve_llama_cpp(lambda _: {"reply": "Fine."}) as server:
        members = [{"backend": "mixed", **writing(url)} for url in (odd.url, odd.url, server.url)]
        model = plugins.build("models", "ensemble", checkpoint=three.path, members=members)
        await model.ready()
        answer = await model.answer(ANSWER, GIVEN)
        assert answer.output == {"kind": "animal", "reply": "Fine."}
        assert "member 1 gave no answer" in model.state() and "member 2 gave no answer" in model.state()
        await model.close()
        model = plugins.build("models", "ensemble", checkpoint=three.path, members=[members[0]] * 3)
        await model.ready()
        answer = await model.answer(ANSWER, GIVEN)
        assert (answer.output, answer.confidence) == (None, None)
        assert "member 3" in (answer.problem or "")
        await model.close()


class Broken(ScriptedModel):
    """One that will never be ready, and says so at once."""

    async def ready(self) -> None:
        raise ModelUnavailable("its file is gone", outcome="not_sent")

    async def answer(self, task: Task, input: Json) -> Answer:
        raise ModelUnavailable("its file is gone", outcome="not_sent")


async def test_it_is_ready_when_one_member_is_and_says_why_when_none_is() -> None:
    one, broken = ScriptedModel([{"kind": "fruit"}]), Broken([])
    parts = Parts(TASK.output_schema, ["a", "b"], None)
    model = Ensemble("ensemble:x", [broken, one], parts, SAME)
    await model.ready()
    assert model.state() == "member 1 gave no answer: its file is gone"
    assert (await model.answer(TASK, GIVEN)).output == {"kind": "fruit"}
    none = Ensemble("ensemble:x", [broken, broken], parts, SAME)
    for ask in (none.ready(), none.answer(TASK, GIVEN)):
        with pytest.raises(ModelUnavailable, match="its file is gone"):
            await ask
    await model.close()
    assert one.closed and broken.closed


async def test_another_output_schema_than_was_learned_is_refused(checkpoint: Checkpoint) -> None:
    model = plugins.build("models", "ensemble", checkpoint=checkpoint.path)
    with pytest.raises(ModelRejected, match="another output schema") as caught:
        await model.answer(ANSWER, GIVEN)
    assert caught.value.outcome == "not_sent"
    with pytest.raises(ModelRejected):
        model.answer_many(ANSWER, [GIVEN])


@pytest.mark.parametrize(
    ("members", "wrong"),
    [
        ([{"backend": "embedded"}], "names 1 backends"),
        ([{"backend": "embedded"}, {}], "needs a `backend`"),
        ([{"backend": "embedded"}, {"backend": "ensemble"}], "no checkpoint of its own"),
        ([{"backend": "embedded"}, {"backend": "openai", "model": "x"}], "no checkpoint of its own"),
        ([{"backend": "embedded"}, {"backend": "embedded", "port": 1}], "port"),
    ],
)
def test_wrong_settings_are_named(checkpoint: Checkpoint, members: list[dict[str, Any]], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        plugins.build("models", "ensemble", checkpoint=checkpoint.path, members=members)


def test_a_damaged_checkpoint_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / checkpoint.id
    shutil.copytree(checkpoint.path, folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not have the hash"):
        plugins.build("models", "ensemble", checkpoint=folder)
    written = json.loads((checkpoint.path / "manifest.json").read_text())
    for change in ({"parts": ["../elsewhere", "x"]}, {"calibration": [[0, 0]]}, {"parts": 3}):
        text = json.dumps(written | change).encode()
        other = tmp_path / f"sha256-{sha256(text).hexdigest()}"
        other.mkdir()
        (other / "manifest.json").write_bytes(text)
        with pytest.raises(ConfigError, match="is damaged"):
            plugins.build("models", "ensemble", checkpoint=other)
    for part in folder.glob("sha256-*"):
        shutil.rmtree(part)
    shutil.copy(checkpoint.path / "manifest.json", folder / "manifest.json")
    with pytest.raises(ConfigError, match="is no checkpoint"):
        plugins.build("models", "ensemble", checkpoint=folder)
