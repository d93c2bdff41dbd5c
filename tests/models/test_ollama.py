"""Ollama is asked for a schema, told how much it may read, and not believed when it read less.

No real Ollama can be installed from a package registry. The server here is a double over real sockets, and the first
test drives it with the official client, which checks every answer against its own types.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ollama
import pytest

from apprentice import plugins
from apprentice.errors import ConfigError, ModelRejected, ModelUnavailable
from apprentice.models._local import Local
from apprentice.testing.local_servers import LocalServer, serve_ollama, write_checkpoint
from apprentice.testing.models import CHECKS, TASK, Case
from apprentice.types import Json

GIVEN: Json = {"text": "win a prize"}
SPAM: Json = {"label": "spam"}
SCHEMA = TASK.output_schema


def built(server: LocalServer, **settings: Any) -> Local:
    model: Local = plugins.build("models", "ollama", **{"model": "base", "base_url": server.url} | settings)
    return model


def by_model(server: LocalServer) -> Callable[[dict[str, Json]], Json]:
    """An adapter has learned that it is spam; the base says ham."""
    return lambda body: SPAM if body["model"] in server.adapters else {"label": "ham"}


async def test_the_double_satisfies_the_official_client(tmp_path: Path) -> None:
    async with serve_ollama(lambda _: SPAM) as server:
        client = ollama.AsyncClient(host=server.url)
        message = {"role": "user", "content": "hello"}
        said = await client.chat("base", [message], format=SCHEMA, logprobs=True, top_logprobs=2)
        assert said.message.content == '{"label":"spam"}'
        assert (said.done_reason, said.eval_count) == ("stop", 4)
        assert said.logprobs is not None
        assert said.logprobs[0].top_logprobs is not None
        assert [entry.model for entry in (await client.list()).models] == ["base:latest"]
        assert [entry.model for entry in (await client.ps()).models] == ["base:latest"]
        assert (await client.show("base")).details is not None
        (tmp_path / "adapter.gguf").write_bytes(b"weights")
        blob = await client.create_blob(tmp_path / "adapter.gguf")
        made = await client.create("mine", from_="base", adapters={"adapter.gguf": blob})
        assert made.status == "success"
        cut = await client.chat("mine", [message], options={"num_predict": 2})
        assert (cut.message.content, cut.done_reason) == ('{"label"', "length")
        with pytest.raises(ollama.ResponseError) as missing:
            await client.chat("nothing", [message])
        assert missing.value.status_code == 404
        await client._client.aclose()


async def test_it_asks_for_the_schema_and_for_its_context() -> None:
    async with serve_ollama(lambda _: SPAM) as server:
        model = built(server, context=1000, max_tokens=64, keep_alive="3m")
        await model.ready()
        answer = await model.answer(TASK, GIVEN)
        await model.close()
    assert answer.output == SPAM
    assert answer.usage is not None
    assert answer.confidence == pytest.approx(0.809675)
    asked = server.questions()[-1]
    assert asked["format"] == SCHEMA
    assert asked["options"] == {"num_ctx": 1000, "num_predict": 64, "temperature": 0}
    assert (asked["keep_alive"], asked["stream"], asked["truncate"]) == ("3m", False, False)
    assert not server.loaded, "closing frees its memory"


async def test_a_cut_answer_has_no_output() -> None:
    async with serve_ollama(lambda _: {"label": "very " * 50}) as server:
        model = built(server, max_tokens=8)
        await model.ready()
        answer = await model.answer(TASK, GIVEN)
        await model.close()
    assert (answer.output, answer.finish, answer.confidence) == (None, "truncated", None)
    assert "cut off" in (answer.problem or "")


@pytest.mark.parametrize("examples", [0, 40])
async def test_a_prompt_that_was_shortened_in_silence_is_never_served(examples: int) -> None:  # F65
    """Whether Ollama left out examples, or cut the last message."""
    task = TASK.model_copy(update={"examples": TASK.examples * examples})
    long = {"text": "word " * (2000 if examples == 0 else 1)}
    async with serve_ollama(lambda _: SPAM) as server:
        model = built(server, context=300, max_tokens=50)
        await model.ready()
        assert (await model.answer(TASK, GIVEN)).output == SPAM
        answer = await model.answer(task, long)
        await model.close()
    assert answer.output is None
    assert "did not fit" in (answer.problem or "")


async def test_a_newer_ollama_refuses_a_prompt_that_is_too_long() -> None:  # F65
    async with serve_ollama(lambda _: SPAM, knows_truncate=True) as server:
        model = built(server, context=300, max_tokens=50)
        await model.ready()
        with pytest.raises(ModelRejected, match="exceeds the context length"):
            await model.answer(TASK, {"text": "word " * 2000})
        assert (await model.answer(TASK, GIVEN)).output == SPAM
        await model.close()


async def test_a_missing_model_says_what_to_pull() -> None:  # F65
    async with serve_ollama(lambda _: SPAM) as server:
        model = built(server, model="llama9")
        with pytest.raises(ModelUnavailable, match="ollama pull llama9"):
            await model.ready(timeout=0.3)
        server.model = "llama9"  # somebody pulls it
        await model.ready(timeout=20)
        assert (await model.answer(TASK, GIVEN)).output == SPAM
        server.model = "base"  # and removes it
        with pytest.raises(ModelUnavailable, match="ollama pull llama9"):
            await model.answer(TASK, GIVEN)
        await model.close()


async def test_another_model_under_the_same_name_is_not_served() -> None:  # F65
    async with serve_ollama(lambda _: SPAM) as server:
        model = built(server, recheck=0.0)
        await model.ready()
        await model.answer(TASK, GIVEN)
        server.weights = "second"  # ollama pull brought a newer one
        with pytest.raises(ModelUnavailable, match="another model answers under the same name"):
            await model.answer(TASK, GIVEN)
        with pytest.raises(ModelUnavailable, match="another model"):
            await model.answer(TASK, GIVEN)
        assert model.state().stage == "failed"
        await model.close()


async def test_out_of_memory_in_the_middle_is_unavailable_and_passes() -> None:  # F65
    async with serve_ollama(lambda _: SPAM) as server:
        model = built(server)
        await model.ready()
        server.dies = 1
        with pytest.raises(ModelUnavailable):
            await model.answer(TASK, GIVEN)
        await model.ready(timeout=20)
        assert (await model.answer(TASK, GIVEN)).output == SPAM
        await model.close()


async def test_a_checkpoint_is_made_in_ollama_once(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"base")
    folder = write_checkpoint(tmp_path, TASK, [(GIVEN, SPAM)], base=tmp_path / "base.gguf")
    async with serve_ollama(lambda _: None) as server:
        server.answer = by_model(server)
        for _ in range(2):
            model = built(server, checkpoint=str(folder))
            await model.ready()
            answer = await model.answer(TASK, GIVEN)
            assert (answer.output, answer.model) == (SPAM, f"apprentice-{folder.name[7:19]}")
            await model.close()
        created = [seen.body for seen in server.requests if seen.path == "/api/create"]
    assert len(created) == 1
    assert created[0]["from"] == "base"
    assert list(created[0]["adapters"]) == ["adapter.gguf"]


async def test_a_whole_model_is_made_in_ollama(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TASK, [(GIVEN, SPAM)])
    async with serve_ollama(lambda _: SPAM) as server:
        model = built(server, checkpoint=str(folder), model=None)
        await model.ready()
        await model.close()
        created = next(seen.body for seen in server.requests if seen.path == "/api/create")
    assert list(created["files"]) == ["model.gguf"]


async def test_hostile_weights_are_refused_before_ollama_hears_of_them(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TASK, [(GIVEN, SPAM)], weights=b"GGUF and then nothing that is true")
    async with serve_ollama(lambda _: SPAM) as server:
        model = built(server, checkpoint=str(folder), model=None)
        with pytest.raises(ModelUnavailable, match=r"model\.gguf is refused"):
            await model.ready()
        await model.close()
        assert not server.requests


async def test_an_adapter_without_its_base_says_what_to_pull(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"base")
    folder = write_checkpoint(tmp_path, TASK, [(GIVEN, SPAM)], base=tmp_path / "base.gguf")
    async with serve_ollama(lambda _: SPAM) as server:
        model = built(server, checkpoint=str(folder), model="elsewhere")
        with pytest.raises(ModelUnavailable, match="ollama pull elsewhere"):
            await model.ready(timeout=0.3)
        await model.close()
        model = built(server, checkpoint=str(folder), model=None)
        with pytest.raises(ModelUnavailable, match="does not say what Ollama calls its base"):
            await model.ready()
        await model.close()


async def test_agreement_of_samples_is_a_confidence() -> None:
    async with serve_ollama(lambda body: {"label": "ham" if body["options"].get("seed", 0) > 3 else "spam"}) as server:
        model = built(server, confidence="samples", samples=4)
        await model.ready()
        answer = await model.answer(TASK, GIVEN)
        await model.close()
    assert (answer.output, answer.confidence) == (SPAM, 0.75)


OLLAMA = """#!{python}
import asyncio, os
from apprentice.testing.local_servers import serve_ollama

async def main():
    async with serve_ollama(lambda body: {{"label": "spam"}}, port=int(os.environ["OLLAMA_HOST"].split(":")[1])):
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_server_of_ours_is_started_and_ended(tmp_path: Path) -> None:
    import sys

    program = tmp_path / "ollama"
    program.write_text(OLLAMA.format(python=sys.executable))
    program.chmod(0o755)
    model: Local = plugins.build("models", "ollama", model="base", base_url=None, binary=str(program))
    await model.ready()
    pid = model.pid
    assert pid is not None
    assert (await model.answer(TASK, GIVEN)).output == SPAM
    await model.close()
    assert not Path(f"/proc/{pid}").exists()


def test_settings_that_do_not_fit_are_told() -> None:
    with pytest.raises(ConfigError, match="needs `model`"):
        plugins.build("models", "ollama")
    with pytest.raises(ConfigError, match="no program 'no-such-ollama'"):
        plugins.build("models", "ollama", model="base", base_url=None, binary="no-such-ollama")
    with pytest.raises(ConfigError, match="samples"):
        plugins.build("models", "ollama", model="base", confidence="samples")
    with pytest.raises(ConfigError, match="in the clear"):
        plugins.build("models", "ollama", model="base", base_url="http://10.0.0.7:11434")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_it_keeps_the_contract(check: Callable[[Case], Any]) -> None:
    async with serve_ollama(lambda _: SPAM) as server:
        model = built(server, context=100_000)
        await model.ready()
        await check(Case(model, TASK, [(GIVEN, SPAM)]))
        await model.close()
