"""vLLM serves many tasks' adapters on one base; what it forgets is loaded again, what was changed is not served.

vLLM cannot be installed beside the other packages of this project, so the server here is a double over real sockets;
test_vllm_real.py asks a true one where there is one. The first test drives the double with the official OpenAI client,
which vLLM documents as its client.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import openai
import pytest

from apprentice import plugins, wire
from apprentice.errors import ConfigError, ModelRejected, ModelUnavailable
from apprentice.models._local import Local
from apprentice.testing.local_servers import LocalServer, serve_vllm, write_checkpoint
from apprentice.testing.models import CHECKS, TASK, Case
from apprentice.types import Json

GIVEN: Json = {"text": "win a prize"}
SPAM: Json = {"label": "spam"}
HAM: Json = {"label": "ham"}


def built(server: LocalServer, **settings: Any) -> Local:
    model: Local = plugins.build("models", "vllm", **{"model": "base", "base_url": server.url} | settings)
    return model


def checkpoint(tmp_path: Path, output: Json, bare: Json = None) -> str:
    """An adapter as PEFT writes it that answers every probe like this."""
    (tmp_path / "base.bin").write_bytes(b"base")
    given = [(GIVEN, output)]
    file = "adapter/adapter_model.safetensors"
    return str(write_checkpoint(tmp_path, TASK, given, base=tmp_path / "base.bin", bare=bare, file=file))


def name_of(folder: str) -> str:
    return f"apprentice-{Path(folder).name.removeprefix('sha256-')[:12]}"


async def test_the_double_satisfies_the_official_client() -> None:
    async with (
        serve_vllm(lambda _: SPAM) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client,
    ):
        said = await client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hello"}], max_tokens=50, logprobs=True, top_logprobs=2
        )
        assert said.choices[0].message.content == '{"label":"spam"}'
        assert said.choices[0].logprobs is not None
        assert said.choices[0].logprobs.content is not None
        assert [entry.id async for entry in client.models.list()] == ["base"]
        plain = await client.completions.create(model="base", prompt="One", max_tokens=4, logprobs=0)
        assert plain.choices[0].logprobs is not None
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="nothing", prompt="One")


@pytest.mark.parametrize("guided", ["response_format", "structured_outputs"])
async def test_it_asks_for_the_schema_in_each_form(guided: str) -> None:
    async with serve_vllm(lambda _: SPAM) as server:
        model = built(server, guided=guided, max_tokens=64)
        await model.ready()
        answer = await model.answer(TASK, GIVEN)
        await model.close()
    assert (answer.output, answer.model) == (SPAM, "base")
    assert answer.usage is not None
    assert answer.confidence == pytest.approx(0.809675)
    asked = server.questions()[-1]
    assert (asked["temperature"], asked["max_tokens"], asked["logprobs"]) == (0, 64, True)
    schema = TASK.output_schema
    form = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "label", "schema": schema, "strict": True}},
        "structured_outputs": {"json": schema},
    }
    assert asked[guided] == form[guided]


async def test_tasks_share_a_base_and_unload_their_own_adapter(tmp_path: Path) -> None:
    spam, ham = checkpoint(tmp_path, SPAM), checkpoint(tmp_path, HAM)
    said = {name_of(spam): SPAM, name_of(ham): HAM, "base": {"label": "?"}}
    async with serve_vllm(lambda body: said[body["model"]]) as server:
        models = [built(server, checkpoint=folder) for folder in (spam, ham)]
        for model in models:
            await model.ready()
        answers = [await model.answer(TASK, GIVEN) for model in models]
        assert [answer.output for answer in answers] == [SPAM, HAM]
        assert set(server.adapters) == {name_of(spam), name_of(ham)}
        assert all((Path(place) / "adapter_model.safetensors").exists() for place in server.adapters.values())
        await models[0].close()
        assert set(server.adapters) == {name_of(ham)}
        assert (await models[1].answer(TASK, GIVEN)).output == HAM
        await models[1].close()
    assert not server.adapters


async def test_an_adapter_that_the_server_forgot_is_loaded_again(tmp_path: Path) -> None:  # F65
    folder = checkpoint(tmp_path, SPAM)
    async with serve_vllm(lambda body: HAM if body["model"] == "base" else SPAM) as server:
        model = built(server, checkpoint=folder)
        await model.ready()
        server.adapters.clear()  # it was restarted
        with pytest.raises(ModelUnavailable, match="no longer has this model"):
            await model.answer(TASK, GIVEN)
        await model.ready(timeout=20)
        assert (await model.answer(TASK, GIVEN)).output == SPAM
        await model.close()


async def test_a_server_that_takes_no_adapters_says_how_it_would(tmp_path: Path) -> None:
    async with serve_vllm(lambda _: SPAM, lora=False) as server:
        model = built(server, checkpoint=checkpoint(tmp_path, SPAM))
        with pytest.raises(ModelUnavailable, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            await model.ready()
        await model.close()


@pytest.mark.parametrize(("bare", "why"), [(None, "that it answered with"), (SPAM, "as its base does without it")])
async def test_a_checkpoint_that_is_not_what_was_trained_is_refused(tmp_path: Path, bare: Json, why: str) -> None:
    """It answers a probe otherwise, or its adapter changes nothing."""
    async with serve_vllm(lambda _: HAM) as server:
        model = built(server, checkpoint=checkpoint(tmp_path, SPAM, bare=bare))
        with pytest.raises(ModelUnavailable, match=why):
            await model.ready()
        with pytest.raises(ModelUnavailable, match=why):
            await model.answer(TASK, GIVEN)
        await model.close()
        assert not server.adapters, "the server forgets it"


async def test_an_adapter_that_the_server_cannot_load_is_told_once(tmp_path: Path) -> None:
    """Its rank is too high for the server, or the folder is not on the server's disk."""
    folder = Path(checkpoint(tmp_path, SPAM))
    async with serve_vllm(lambda _: SPAM) as server:
        server.max_rank = 2
        model = built(server, checkpoint=str(folder))
        with pytest.raises(ModelUnavailable, match="rank 4 is greater than max_lora_rank 2"):
            await model.ready()
        await model.close()
        model = built(server, checkpoint=str(folder))
        await model.needs()  # the checkpoint has been read
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(ModelUnavailable, match=r"No adapter found for .* on its own disk"):
            await model.ready()
        await model.close()
        orders = [seen for seen in server.requests if seen.path == "/v1/load_lora_adapter"]
    assert len(orders) == 2, "trying again changes nothing"


async def test_an_adapter_that_somebody_else_loads_meanwhile_is_used(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, SPAM)
    async with serve_vllm(lambda body: HAM if body["model"] == "base" else SPAM) as server:
        models = [built(server, checkpoint=folder) for _ in range(4)]
        server.together["/v1/load_lora_adapter"] = asyncio.Barrier(4)
        await asyncio.gather(*(model.ready() for model in models))
        server.together.clear()
        assert sum(model.brought for model in models) == 1
        assert [(await model.answer(TASK, GIVEN)).output for model in models] == [SPAM] * 4
        await asyncio.gather(*(model.close() for model in models))


async def test_hostile_weights_are_refused_before_a_server_hears_of_them(tmp_path: Path) -> None:
    (tmp_path / "base.bin").write_bytes(b"base")
    file, cut = "adapter/adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{}"
    folder = write_checkpoint(tmp_path, TASK, [(GIVEN, SPAM)], base=tmp_path / "base.bin", file=file, weights=cut)
    async with serve_vllm(lambda _: SPAM) as server:
        model = built(server, checkpoint=str(folder))
        with pytest.raises(ModelUnavailable, match=r"adapter_model\.safetensors is refused"):
            await model.ready()
        await model.close()
        assert not server.requests


async def test_an_adapter_without_what_peft_writes_is_nothing_for_vllm(tmp_path: Path) -> None:
    (tmp_path / "base.bin").write_bytes(b"base")
    folder = write_checkpoint(tmp_path, TASK, [(GIVEN, SPAM)], base=tmp_path / "base.bin")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["files"]["adapter_model.safetensors"]
    (folder / "adapter_model.safetensors").unlink()
    written = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(written)
    folder = folder.rename(tmp_path / f"sha256-{sha256(written).hexdigest()}")
    async with serve_vllm(lambda _: SPAM) as server:
        model = built(server, checkpoint=str(folder))
        with pytest.raises(ModelUnavailable, match=r"has no adapter_model\.safetensors"):
            await model.ready()
        await model.close()


async def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = Path(checkpoint(tmp_path, SPAM))
    for name, content, why in (
        ("adapter/adapter_model.safetensors", b"changed", "does not have the hash in the manifest"),
        ("manifest.json", b"{}", "does not have the hash that names it"),
    ):
        (folder / name).write_bytes(content)
        async with serve_vllm(lambda _: SPAM) as server:
            model = built(server, checkpoint=str(folder))
            with pytest.raises(ModelUnavailable, match=why):
                await model.ready()
            await model.close()


async def test_a_table_for_another_confidence_is_refused(tmp_path: Path) -> None:
    async with serve_vllm(lambda _: SPAM) as server:
        folder = checkpoint(tmp_path, SPAM)
        differing: list[dict[str, Any]] = [{"confidence": "logprob"}, {"fields": ["label"]}]
        for settings in differing:
            model = built(server, checkpoint=folder, **settings)
            with pytest.raises(ModelUnavailable, match="was calibrated for the confidence 'margin'"):
                await model.ready()
            await model.close()


async def test_tasks_that_share_a_base_are_each_checked_with_their_own_schema() -> None:
    other = TASK.model_copy(update={"output_schema": {"type": "object", "properties": {"x": {"type": "string"}}}})
    async with serve_vllm(lambda body: {"x": "y"} if "'x'" in str(body["response_format"]) else SPAM) as server:
        model = built(server)
        await model.ready()
        answers = await asyncio.gather(*(model.answer(task, GIVEN) for task in (TASK, other, TASK, other)))
        await model.close()
    assert [answer.output for answer in answers] == [SPAM, {"x": "y"}] * 2


async def test_a_task_whose_schema_changed_is_rejected(tmp_path: Path) -> None:
    other = TASK.model_copy(update={"output_schema": {"type": "object", "properties": {"x": {"type": "string"}}}})
    async with serve_vllm(lambda body: HAM if body["model"] == "base" else SPAM) as server:
        model = built(server, checkpoint=checkpoint(tmp_path, SPAM))
        await model.ready()
        with pytest.raises(ModelRejected, match="another output schema"):
            await model.answer(other, GIVEN)
        await model.close()


async def test_a_name_that_the_server_does_not_know_is_told() -> None:  # F65
    async with serve_vllm(lambda _: SPAM) as server:
        model = built(server, model="other")
        with pytest.raises(ModelUnavailable, match="has no such model; it has base"):
            await model.ready(timeout=0.3)
        await model.close()


async def test_out_of_memory_in_the_middle_is_unavailable_and_passes() -> None:  # F65
    async with serve_vllm(lambda _: SPAM) as server:
        model = built(server)
        await model.ready()
        server.dies = 1
        with pytest.raises(ModelUnavailable):
            await model.answer(TASK, GIVEN)
        await model.ready(timeout=20)
        assert (await model.answer(TASK, GIVEN)).output == SPAM
        await model.close()


async def test_a_prompt_beyond_the_context_is_rejected_with_its_length() -> None:  # F65
    async with serve_vllm(lambda _: SPAM) as server:
        model = built(server)
        await model.ready()
        with pytest.raises(ModelRejected, match="maximum context length is 4096 tokens") as error:
            await model.answer(TASK, {"text": "word " * 5000})
        assert not error.value.retryable
        answer = await model.answer(TASK, GIVEN)
        assert answer.output == SPAM
        assert answer.usage is not None
        server.context = answer.usage.input_tokens + 2  # the prompt fits, and leaves too little room for the answer
        answer = await model.answer(TASK, GIVEN)
        assert (answer.output, answer.finish) == (None, "truncated")
        await model.close()


async def test_another_model_under_the_same_name_is_not_served() -> None:  # F65
    async with serve_vllm(lambda _: SPAM) as server:
        model = built(server, recheck=0.0)
        await model.ready()
        await model.answer(TASK, GIVEN)
        server.weights = "second"
        with pytest.raises(ModelUnavailable, match="another model answers under the same name"):
            await model.answer(TASK, GIVEN)
        assert model.state().stage == "failed"
        await model.close()


async def test_the_same_model_is_recognised_although_its_numbers_waver() -> None:
    async with serve_vllm(lambda _: SPAM) as server:
        model = built(server, recheck=0.0)
        await model.ready()
        exact = server.continuation
        server.continuation = lambda: [(text, logprob - 0.03) for text, logprob in exact()]  # type: ignore[method-assign]
        assert (await model.answer(TASK, GIVEN)).output == SPAM
        await model.close()


async def test_the_key_travels_in_a_header_and_shows_nowhere() -> None:
    key = "sk-CANARY-4711-do-not-leak"
    async with serve_vllm(lambda _: SPAM) as server:
        model = built(server, api_key=key)
        await model.ready()
        await model.answer(TASK, GIVEN)
        assert key not in repr(model) + str(vars(model)) + str([seen.body for seen in server.requests])
        await model.close()


VLLM = """#!{python}
import asyncio, os, sys
from apprentice.testing.local_servers import serve_vllm

async def main():
    print(sys.argv[1:], sorted(os.environ), flush=True)
    async with serve_vllm(lambda body: {{"label": "spam"}}, port=int(sys.argv[sys.argv.index("--port") + 1])) as server:
        server.model = sys.argv[sys.argv.index("--served-model-name") + 1]
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_server_of_ours_is_started_with_what_was_set(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(VLLM.format(python=sys.executable))
    program.chmod(0o755)
    model: Local = plugins.build(
        "models",
        "vllm",
        model="smollm",
        binary=str(program),
        context=512,
        parallel=4,
        flags=["--dtype", "bfloat16"],
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
        log_dir=str(tmp_path / "logs"),
    )
    await model.ready()
    pid = model.pid
    assert (await model.answer(TASK, GIVEN)).output == SPAM
    await model.close()
    assert not Path(f"/proc/{pid}").exists()
    log = (tmp_path / "logs" / "vllm-smollm.log").read_text()
    for part in (
        "'serve', 'smollm'",
        "'--max-model-len', '512'",
        "'--max-num-seqs', '4'",
        "'bfloat16'",
        "KVCACHE_SPACE",
    ):
        assert part in log


async def test_while_it_loads_it_says_what_the_server_says(tmp_path: Path) -> None:
    program, go = tmp_path / "vllm", tmp_path / "go"
    os.mkfifo(go)
    wait = f"print('Loading weights took \\x1b[1mlong', flush=True); open({str(go)!r}).read()"
    program.write_text(
        VLLM.format(python=sys.executable).replace("asyncio.run(main())", f"{wait}\nasyncio.run(main())")
    )
    program.chmod(0o755)
    model: Local = plugins.build("models", "vllm", model="smollm", binary=str(program))
    with pytest.raises(ModelUnavailable, match="still loading"):
        await model.answer(TASK, GIVEN)
    while str(model.state()) != "still loading: Loading weights took [1mlong":
        await asyncio.sleep(0.01)
    go.write_text("go on")
    await model.ready()
    assert str(model.state()) == "ready"
    await model.close()


async def test_the_first_answers_may_take_as_long_as_the_start(tmp_path: Path) -> None:
    """A server compiles its grammar, and warms up, with the first questions that it is asked."""
    patience: list[tuple[str, float]] = []

    class Watched(wire.Client):
        def __init__(self) -> None:
            self._client = wire.client(allow_internal=True)

        async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
            patience.append((request.url.rpartition("/")[2], request.timeout))
            return await self._client.exchange(request, leaving)

        async def close(self) -> None:
            await self._client.close()

    client = Watched()
    async with serve_vllm(lambda body: HAM if body["model"] == "base" else SPAM) as server:
        settings = {"timeout": 7, "start_timeout": 70, "client": client}
        model = built(server, checkpoint=checkpoint(tmp_path, SPAM), **settings)
        await model.ready()
        assert {seconds for path, seconds in patience if path != "health"} == {70.0}
        await model.answer(TASK, GIVEN)
        assert patience[-1] == ("completions", 7.0)
        await model.close()
    await client.close()


def test_settings_that_do_not_fit_are_told() -> None:
    with pytest.raises(ConfigError, match="needs `model`"):
        plugins.build("models", "vllm", base_url="http://127.0.0.1:8000")
    with pytest.raises(ConfigError, match="guided"):
        plugins.build("models", "vllm", model="base", base_url="http://127.0.0.1:8000", guided="guided_json")
    with pytest.raises(ConfigError, match="no program 'no-such-vllm'"):
        plugins.build("models", "vllm", model="base", binary="no-such-vllm")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_it_keeps_the_contract(check: Callable[[Case], Any]) -> None:
    async with serve_vllm(lambda _: SPAM) as server:
        server.context = 100_000
        model = built(server)
        await model.ready()
        await check(Case(model, TASK, [(GIVEN, SPAM)]))
        await model.close()
