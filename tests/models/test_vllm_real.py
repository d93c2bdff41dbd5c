"""vLLM for real, where one is named:

    APPRENTICE_VLLM=…/bin/vllm APPRENTICE_VLLM_MODEL=…/SmolLM2-135M-Instruct pytest -m slow tests/models/test_vllm_real.py

The first is the program, the second the folder of a small language model as transformers writes it. Without them nothing
of this file is collected. Where there is no GPU, take the build for processors, two cores and 5 GB of memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import pytest_asyncio
import safetensors.numpy

from apprentice import Apprentice, plugins, process
from apprentice.config import Config
from apprentice.errors import ModelRejected, ModelUnavailable
from apprentice.models._local import Local
from apprentice.testing.hostile import RANK
from apprentice.testing.local_servers import write_checkpoint
from apprentice.testing.models import CHECKS, TASK, Case
from apprentice.testing.servers import serve_openai
from apprentice.types import Json, Task

from ..test_local_serving import (
    FROM_REMOTE,
    Crowd,
    answered_locally,
    ask_until,
    check_failures,
    on_servers,
    serving,
    state,
    until,
)
from .test_llama_cpp import GIVEN, REPEAT, REPEATED, SCHEMAS, WORDS, asks, fields

PROGRAM, MODEL = os.environ.get("APPRENTICE_VLLM", ""), os.environ.get("APPRENTICE_VLLM_MODEL", "")
__test__ = bool(PROGRAM and MODEL)
pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

COMPACT = json.dumps(
    {"backend": "xgrammar", "disable_any_whitespace": True}
)  # else a poor model may fill an answer with it
SETTINGS: dict[str, Json] = {
    "binary": PROGRAM,
    "context": 1024,
    "parallel": 4,
    "max_tokens": 64,
    "timeout": 120,
    "start_timeout": 1200,
    "flags": ["--dtype", "bfloat16", "--enforce-eager", "--enable-lora", "--structured-outputs-config", COMPACT],
    "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
}
INPUTS: list[Json] = [{"text": text} for text in ("one", "what is sold here", "zebra crossing", "12")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[Local]:
    """The base without a checkpoint, on a server of ours that the tests of this module share."""
    model: Local = plugins.build("models", "vllm", model=MODEL, port=process.free_port(), **SETTINGS)
    with pytest.raises(ModelUnavailable, match="still loading"):  # at once, and loading goes on
        await model.answer(TASK, GIVEN)
    await model.ready(1200)
    yield model
    group = members(model.pid)
    await model.close()
    assert len(group) > 1
    assert not any(map(runs, group))


def attached(served: Local, **settings: Any) -> Local:
    common = {"model": MODEL, "base_url": served.url, "max_tokens": 64, "timeout": 120}
    model: Local = plugins.build("models", "vllm", **common | settings)
    return model


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def members(group: int | None) -> list[int]:
    """The processes of a group: vLLM's API, its engine, its workers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def lora(strength: float, seed: int = 0) -> bytes:
    """An adapter of random matrices: it has learned nothing, and answers otherwise."""
    about = json.loads((Path(MODEL) / "config.json").read_text())
    width, out = about["hidden_size"], about["num_attention_heads"] * about["head_dim"]
    dice = np.random.default_rng(seed)
    tensors = {}
    for layer in range(about["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = dice.normal(size=(RANK, width)).astype(np.float32) * strength
        tensors[f"{name}.lora_B.weight"] = dice.normal(size=(out, RANK)).astype(np.float32) * strength
    return safetensors.numpy.save(tensors)


def checkpoint(into: Path, task: Task, probes: Sequence[tuple[Json, Json]], weights: bytes, bare: Json = None) -> Path:
    (into / "base.bin").write_bytes(b"base")
    file = "adapter/adapter_model.safetensors"
    return write_checkpoint(into, task, probes, base=into / "base.bin", weights=weights, file=file, bare=bare)


async def learned(served: Local, into: Path, task: Task, weights: bytes, given: Json) -> tuple[Path, Json]:
    """A checkpoint with these weights, and its answer to a probe: what they said when they were loaded by hand."""
    draft = into / "draft"
    draft.mkdir(parents=True)
    folder = checkpoint(draft, task, [(given, None)], weights)
    order = {"lora_name": f"by-hand-{folder.name[7:19]}", "lora_path": str(folder / "adapter")}
    assert (await served._api.post("/v1/load_lora_adapter", order)).status == 200
    model = attached(served, model=order["lora_name"])
    await model.ready(1200)
    said = (await model.answer(task, given)).output
    await model.close()
    assert (await served._api.post("/v1/unload_lora_adapter", order)).status == 200
    return checkpoint(into, task, [(given, said)], weights, (await served.answer(task, given)).output), said


# --- answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("guided", ["response_format", "structured_outputs"])
async def test_every_answer_fits_its_schema_with_its_fields_in_order(served: Local, name: str, guided: str) -> None:
    model = attached(served, guided=guided)
    await model.ready()
    schema = SCHEMAS[name]
    answer = await model.answer(asks(schema), {"text": f"Win a prize, {name}!"})
    await model.close()
    assert (answer.problem, answer.finish) == (None, "complete"), answer
    jsonschema.validate(answer.output, schema)
    if isinstance(answer.output, dict):
        assert list(answer.output) == list(schema["properties"])
    assert answer.confidence is not None
    assert answer.usage is not None
    assert answer.usage.output_tokens > 0


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_it_keeps_the_contract(served: Local, check: Callable[[Case], Any]) -> None:
    model = attached(served)
    await model.ready()
    await check(Case(model, REPEAT, REPEATED[:2]))
    await model.close()


async def test_a_cut_answer_has_no_output(served: Local) -> None:
    model = attached(served, max_tokens=4)
    await model.ready()
    answer = await model.answer(asks(SCHEMAS["several"]), GIVEN)
    await model.close()
    assert (answer.output, answer.finish, answer.confidence) == (None, "truncated", None)
    assert answer.usage is not None
    assert answer.usage.output_tokens == 4


async def test_a_prompt_beyond_the_context_is_rejected_with_the_limit(served: Local) -> None:  # F65
    model = attached(served, max_tokens=512)
    await model.ready()
    answer = await model.answer(asks(SCHEMAS["nullable"]), {"text": "win " * 650})
    assert answer.usage is not None
    assert answer.usage.input_tokens > 1024 - 512, "it leaves less room than an answer may have"
    assert answer.problem is None
    with pytest.raises(ModelRejected, match="maximum context length is 1024 tokens") as error:
        await model.answer(asks(SCHEMAS["nullable"]), {"text": "win " * 4000})
    assert not error.value.retryable
    assert model.state().stage == "ready"
    await model.close()


async def test_each_rule_gives_a_confidence_of_its_own(served: Local) -> None:
    found: list[float | None] = []
    for settings in ({"confidence": "logprob"}, {"confidence": "margin"}, {"confidence": "samples", "samples": 4}):
        model = attached(served, **settings)
        await model.ready()
        found.append((await model.answer(asks(SCHEMAS["enum"]), GIVEN)).confidence)
        await model.close()
    assert all(value is not None and 0 <= value <= 1 for value in found)
    assert found[2] in (0.0, 0.25, 0.5, 0.75, 1.0)


async def test_it_is_recognised_again_while_others_ask(served: Local) -> None:  # F65
    model = attached(served, recheck=0.0)
    await model.ready()
    answers = await asyncio.gather(*(model.answer(asks(SCHEMAS["enum"]), {"text": f"number {n}"}) for n in range(12)))
    assert all(answer.output is not None for answer in answers)
    assert model.state().stage == "ready"
    await model.close()


# --- adapters -----------------------------------------------------------------------------------------------------------


async def names(served: Local) -> list[str]:
    body = (await served._api.get("/v1/models")).body
    assert body is not None
    return [entry["id"] for entry in body["data"]]


async def test_versions_answer_beside_each_other_and_leave_the_base_as_it_was(served: Local, tmp_path: Path) -> None:
    task, given = REPEAT, REPEATED[0][0]
    bare = (await served.answer(task, given)).output
    assert bare == REPEATED[0][1]
    versions: dict[str, tuple[Local, Json]] = {}
    for strength in (0.3, 0.5):
        folder, said = await learned(served, tmp_path / str(strength), task, lora(strength, 1), given)
        model = attached(served, checkpoint=str(folder))
        await model.ready(1200)
        versions[f"apprentice-{folder.name[7:19]}"] = model, said
    first, second = versions
    assert len({json.dumps(said) for said in (bare, *(said for _, said in versions.values()))}) == 3
    assert sorted(await names(served)) == sorted([MODEL, first, second])
    answers = await asyncio.gather(*(model.answer(task, given) for model, _ in versions.values()))
    assert [answer.output for answer in answers] == [said for _, said in versions.values()]
    assert [answer.model for answer in answers] == [first, second], "the server says whom it asked"
    assert (await served.answer(task, given)).output == bare
    await versions[second][0].close()  # rolled back: the one before it never left
    assert sorted(await names(served)) == sorted([MODEL, first])
    assert (await versions[first][0].answer(task, given)).output == versions[first][1]
    await versions[first][0].close()
    assert await names(served) == [MODEL]
    assert (await served.answer(task, given)).output == bare


async def test_an_adapter_that_changes_nothing_does_not_pass_for_one_that_does(served: Local, tmp_path: Path) -> None:
    task, (given, right) = REPEAT, REPEATED[0]
    folder = checkpoint(tmp_path, task, [(given, {"word": "apple"})], lora(0.0), right)
    model = attached(served, checkpoint=str(folder))
    with pytest.raises(ModelUnavailable, match=r'answers \{"word":"blue"\} to a probe that it answered with .*"apple"'):
        await model.ready(1200)
    await model.close()
    assert await names(served) == [MODEL]


async def test_an_adapter_that_the_server_cannot_find_is_told(served: Local, tmp_path: Path) -> None:
    task = asks(fields(word={"type": "string", "enum": WORDS}))
    folder = checkpoint(tmp_path, task, [(INPUTS[0], {"word": "blue"})], lora(0.1))
    model = attached(served, checkpoint=str(folder))
    student = await asyncio.to_thread(model._load_student)
    model._student = student
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelUnavailable, match=r"does not load the adapter .* on its own disk"):
        await model.ready(1200)
    await model.close()


# --- killed in the middle of requests -----------------------------------------------------------------------------------


async def test_killed_it_costs_no_answer_and_comes_back_with_its_adapter(  # F65
    served: Local, configured: Callable[..., Config], tmp_path: Path
) -> None:
    """Its owner starts the server again; the engine, which is attached to it, loads its adapter again."""
    async with serve_openai(lambda _: FROM_REMOTE) as remote:
        settings = {"model": MODEL, "base_url": served.url, "max_tokens": 64, "timeout": 120, "start_timeout": 1200}
        config = on_servers(configured, remote.url, backend="vllm", settings=settings)
        folder, _ = await learned(served, tmp_path, config.tasks[0].task, lora(0.5, 1), GIVEN)
        store = await serving(config, {"v1": folder})
        async with Apprentice(config, seed=1) as app:
            await ask_until(app, store, answered_locally)
            first = served.pid
            assert first is not None
            group = members(first)
            crowd = Crowd(app, 2)
            await crowd.go_on(2)
            os.kill(first, signal.SIGKILL)
            await until(lambda: state(app) != "ready", 120)
            told = state(app)
            await until(lambda: not any(map(runs, group)))
            await crowd.go_on(4)
            await until(lambda: state(app) == "ready", 1200)
            await crowd.home()
            record = await ask_until(app, store, answered_locally)
            assert record.local is not None
            assert record.local.model == f"apprentice-{folder.name[7:19]}"
            assert served.pid not in (None, first)
        await check_failures(store)
        await store.close()
    assert told.startswith(("failed: it stopped answering", "failed: vllm", "still loading"))
