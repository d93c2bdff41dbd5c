from __future__ import annotations

import asyncio
import json
import shutil
import time
from hashlib import sha256
from pathlib import Path

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError, ModelRejected
from apprentice.testing.trainers import TASK, examples
from apprentice.types import Checkpoint, Json


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    trained: Checkpoint = plugins.build("trainers", "embedded").train(
        TASK, examples(), into=tmp_path_factory.mktemp("models"), seed=0
    )
    return trained


async def test_an_answer_says_who_gave_it_what_it_cost_and_how_sure_it_is(checkpoint: Checkpoint) -> None:
    model = plugins.build("models", "embedded", checkpoint=checkpoint.path)
    answer = await model.answer(TASK, {"text": "please look at the otter"})
    assert answer.output == {"kind": "animal"}
    assert answer.model == "embedded:" + checkpoint.id.removeprefix("sha256-")[:12]
    assert answer.cost == 0
    assert answer.usage is None
    assert 0 < answer.latency < 5
    assert 0.5 < answer.confidence <= 1
    nonsense = await model.answer(TASK, {"text": "quarterly revenue"})
    assert nonsense.confidence < answer.confidence


async def test_many_at_once_are_answered_like_one_by_one(checkpoint: Checkpoint) -> None:
    model = plugins.build("models", "embedded", checkpoint=str(checkpoint.path))
    inputs = [{"text": text} for text in ("a plum", "", "the drill, please", "half \ud83d", "x" * 100_000, "a plum")]
    many = model.answer_many(TASK, inputs)
    for given, answer in zip(inputs, many, strict=True):
        one = await model.answer(TASK, given)
        assert one.output == answer.output
        assert one.confidence == pytest.approx(answer.confidence, abs=1e-4)
    assert model.answer_many(TASK, []) == []


async def test_the_loop_stays_free_while_a_long_text_is_read(checkpoint: Checkpoint) -> None:
    model = plugins.build("models", "embedded", checkpoint=str(checkpoint.path))
    answering = asyncio.create_task(model.answer(TASK, {"text": "apple pear " * 1000}))
    turns = 0
    while not answering.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10


async def test_a_task_whose_output_schema_was_changed_is_refused(checkpoint: Checkpoint) -> None:
    model = plugins.build("models", "embedded", checkpoint=str(checkpoint.path))
    changed = TASK.model_copy(update={"output_schema": {"type": "string"}})
    with pytest.raises(ModelRejected, match="another output schema") as caught:
        await model.answer(changed, {"text": "apple"})
    assert not caught.value.retryable
    assert caught.value.outcome == "not_sent"
    assert (await model.answer(TASK, {"text": "apple"})).output == {"kind": "fruit"}


async def test_the_trainers_mark_of_free_text_makes_no_other_schema(tmp_path: Path) -> None:
    properties = {"kind": {"type": "string"}, "why": {"type": "string"}}
    task = TASK.model_copy(update={"output_schema": {"type": "object", "properties": properties, "required": ["kind"]}})
    marked = properties | {"why": {"type": "string", "x-free-text": True}}
    learnable = TASK.model_copy(update={"output_schema": task.output_schema | {"properties": marked}})
    trainer = plugins.build("trainers", "embedded", encoder="tfidf", fields=["kind"])
    model = plugins.build(
        "models", "embedded", checkpoint=trainer.train(learnable, examples(), into=tmp_path, seed=0).path
    )
    assert (await model.answer(task, {"text": "please look at the apple"})).output == {"kind": "fruit"}


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing-here is no checkpoint"):
        plugins.build("models", "embedded", checkpoint=tmp_path / "nothing-here")


def test_a_damaged_checkpoint_is_not_served(checkpoint: Checkpoint, tmp_path: Path) -> None:
    broken = tmp_path / checkpoint.id
    shutil.copytree(checkpoint.path, broken)
    content = bytearray((broken / "weights.npy").read_bytes())
    content[-1] ^= 1
    (broken / "weights.npy").write_bytes(content)
    with pytest.raises(ConfigError, match=r"weights\.npy does not have the hash"):
        plugins.build("models", "embedded", checkpoint=broken)


def changed(checkpoint: Checkpoint, into: Path, **entries: Json) -> Path:
    """The checkpoint with other entries in its manifest, and all its hashes right."""
    manifest = json.loads((checkpoint.path / "manifest.json").read_text()) | entries
    written = json.dumps(manifest).encode()
    other = into / f"sha256-{sha256(written).hexdigest()}"
    shutil.copytree(checkpoint.path, other)
    (other / "manifest.json").write_bytes(written)
    return other


def test_vectors_of_another_encoder_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = checkpoint.manifest["encoder"] | {"name": "minilm-of-last-year"}
    with pytest.raises(ConfigError, match="reads vectors of minilm-of-last-year, but minilm-"):
        plugins.build("models", "embedded", checkpoint=changed(checkpoint, tmp_path, encoder=made))


@pytest.mark.parametrize("table", [None, [], [[0.0, 0.5], [1.0, 0.5]], [[0.0, 0.1], [1.0, "0.9"]]])
def test_a_damaged_table_of_calibration_is_not_served(checkpoint: Checkpoint, tmp_path: Path, table: Json) -> None:
    with pytest.raises(ConfigError, match=r"is damaged: .*(two rows|rise|pair)") as caught:
        plugins.build("models", "embedded", checkpoint=changed(checkpoint, tmp_path, calibration=table))
    assert "teach the task again" in (caught.value.hint or "")


async def test_confidence_is_what_the_table_makes_of_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    halved = changed(checkpoint, tmp_path, calibration=[[0.0, 0.0], [1.0, 0.5]])
    same = changed(checkpoint, tmp_path, calibration=[[0.0, 0.0], [1.0, 1.0]])
    for text in ("please look at the otter", "quarterly revenue"):
        one, other = [
            await plugins.build("models", "embedded", checkpoint=path).answer(TASK, {"text": text})
            for path in (halved, same)
        ]
        assert one.output == other.output
        assert one.confidence == pytest.approx(other.confidence / 2, abs=1e-6)


def test_a_further_version_costs_its_heads_only(checkpoint: Checkpoint) -> None:
    plugins.build("models", "embedded", checkpoint=checkpoint.path)
    began = time.process_time()
    plugins.build("models", "embedded", checkpoint=checkpoint.path)
    assert time.process_time() - began < 0.1, "loading the encoder takes longer"
