"""`apprentice models`: what there is, pulled, loaded, unloaded, probed and measured, against doubles and a real server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from apprentice import cli, inventory, plugins, process
from apprentice.config import Config, load
from apprentice.testing import hostile
from apprentice.testing._hostile_gguf import KEYS
from apprentice.testing.local_servers import LocalServer, serve_llama_cpp, serve_ollama, serve_vllm, write_checkpoint
from apprentice.types import Json, Store, Version

from .conftest import YAML
from .models.test_llama_cpp import smollm2

Run = Callable[..., tuple[int, str, str]]
FRUIT: Json = {"kind": "fruit"}
GIVEN: Json = {"text": "an apple"}
EXAMPLES = """    examples:
      - {input: {text: an apple}, output: {kind: fruit}}
      - {input: {text: a hammer}, output: {kind: tool}}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in the test's folder: (exit code, output, what was said on standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["models", *arguments])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@contextmanager
def beside[T](server: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """The server on a loop of its own, because the command line runs one for itself."""
    loop, up, down = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    made: list[T] = []

    async def live() -> None:
        async with server as running:
            made.append(running)
            up.set()
            await down.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(live()))
    thread.start()
    try:
        assert up.wait(30)
        yield made[0]
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join()
        loop.close()


def configured(folder: Path, backend: str, **settings: Json) -> Config:
    """The configuration of the tests in the folder, with a local model of that backend that nobody teaches."""
    told = json.dumps(settings)
    text = YAML[: YAML.index("local:")].replace("BASE_URL", "http://127.0.0.1:9")
    text = text.replace("    evaluator:", f"{EXAMPLES}    evaluator:")
    local = f"local: {{backend: {backend}, learn: 'off', fine_tune_backend: null, settings: {told}}}\n"
    (folder / "apprentice.yaml").write_text(text + local)
    return load(folder / "apprentice.yaml")


def taught(folder: Path, config: Config, output: Json = FRUIT) -> Path:
    """A version that serves: an adapter that answers its probe like this."""
    (folder / "base.bin").write_bytes(b"base")
    made = write_checkpoint(folder / "models", config.tasks[0].task, [(GIVEN, output)], base=folder / "base.bin")

    async def keep() -> None:
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        version = Version(
            id="",
            task="sort",
            checkpoint=made.name,
            path=str(made),
            state="candidate",
            trained_on=1,
            created_at=1.0,
        )
        await store.promote("sort", (await store.add_version(version)).id, 1.0)
        await store.close()

    asyncio.run(keep())
    return made


def test_list_says_what_there_is_and_what_is_loaded_where(run: Run, tmp_path: Path) -> None:
    with beside(serve_vllm(lambda _: FRUIT)) as server:
        config = configured(tmp_path, "vllm", base_url=server.url, model="base")
        made = taught(tmp_path, config)
        (tmp_path / "small.gguf").write_bytes(hostile.gguf(KEYS))
        assert run("pull", "small.gguf")[0] == 0
        (config.local.model_dir / "base" / ".partial-1").mkdir()
        code, out, _ = run("list", "--json")
        assert code == 0
        found = json.loads(out)
        text = run("list")[1]
    assert [(b["backend"], b["model"], b["state"]) for b in found["bases"]] == [("vllm", "base", "on the server")]
    [student] = found["students"]
    assert (student["version"], student["state"], student["files"]) == ("v1", "champion", "here")
    assert student["checkpoint"] == made.name
    assert student["size"] > 7
    [listed] = found["servers"]
    assert (listed["state"], listed["loaded"], listed["tasks"]) == ("up", ["base"], ["sort"])
    assert [(file["state"], file["name"]) for file in found["files"]] == [
        ("partial", ".partial-1"),
        ("kept", "small.gguf"),
    ]
    for part in ("version  sort v1 champion", f"at {server.url} (sort): up, loaded: base", "kept, 0.0 MB"):
        assert part in text


def test_list_hashes_a_base_and_says_what_is_missing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(hostile.gguf(KEYS))
    configured(tmp_path, "llama_cpp", model=str(tmp_path / "small.gguf"))
    [base] = json.loads(run("list", "--json")[1])["bases"]
    assert (base["state"], base["digest"][:7], base["size"]) == ("here", "sha256-", 352)
    configured(tmp_path, "llama_cpp", model=str(tmp_path / "none.gguf"), base_url="http://127.0.0.1:9")
    found = json.loads(run("list", "--json")[1])
    assert found["bases"][0]["state"] == "missing"
    assert found["servers"][0]["state"].startswith("no answer")


async def test_list_knows_the_servers_that_somebody_owns(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(hostile.gguf(KEYS))
    config = configured(tmp_path, "llama_cpp", model=str(tmp_path / "small.gguf"))
    child = await process.start(["sleep", "600"], log=tmp_path / "log", env=process.environment({}))
    found = {one.pid: one for one in (await inventory.listed(config, None)).owned}
    await child.stop()
    assert found[child.pid].program == "sleep 600"
    assert found[child.pid].memory > 0
    assert child.pid not in {one.pid for one in process.running()}


@pytest.mark.parametrize(("backend", "serve"), [("vllm", serve_vllm), ("ollama", serve_ollama)])
def test_load_and_unload_change_what_a_server_that_runs_anyway_has(
    run: Run, tmp_path: Path, backend: str, serve: Callable[..., AbstractAsyncContextManager[LocalServer]]
) -> None:
    with beside(serve(lambda _: FRUIT)) as server:
        made = taught(tmp_path, configured(tmp_path, backend, base_url=server.url, model="base"))
        name = f"apprentice-{made.name[7:19]}"
        code, out, err = run("load", "sort")
        assert (code, f"loaded at {server.url}" in out) == (0, True)
        assert "sort v1: memory needed" in err
        assert name in json.loads(run("list", "--json")[1])["servers"][0]["loaded"][-1]
        assert run("bench", "sort", "--requests", "3")[0] == 0
        assert name in json.loads(run("list", "--json")[1])["servers"][0]["loaded"][-1]  # it was there before
        assert run("unload", "sort", "--json")[0] == 0
        assert not any(name in one for one in json.loads(run("list", "--json")[1])["servers"][0]["loaded"])
        assert json.loads(run("probe", "sort", "v1", "--json")[1])["verdict"] == "same"
        assert not any(name in one for one in json.loads(run("list", "--json")[1])["servers"][0]["loaded"])
    assert run("load", "sort")[0] == 5
    assert run("unload", "sort")[0] == 5


def test_probe_fails_where_another_answer_comes_than_was_taught(run: Run, tmp_path: Path) -> None:
    with beside(serve_vllm(lambda _: FRUIT)) as server:
        taught(tmp_path, configured(tmp_path, "vllm", base_url=server.url, model="base"), {"kind": "tool"})
        code, out, _ = run("probe", "sort", "--json")
        assert code == 5
        found = json.loads(out)
        assert (found["verdict"], "answered with" in found["why"]) == ("failed", True)
        code, out, _ = run("probe", "sort", "base")
        assert (code, "no probes" in out, "continues" in out) == (0, True, True)


def test_bench_measures_answers_tokens_and_validity(run: Run, tmp_path: Path) -> None:
    said: list[Json] = [FRUIT, "no JSON at all"]
    with beside(serve_llama_cpp(lambda _: said[len(server.questions()) % 2])) as server:
        configured(tmp_path, "llama_cpp", base_url=server.url)
        code, out, _ = run("bench", "sort", "--requests", "10", "--at-once", "2", "--json")
        assert code == 0
        found = json.loads(out)
        assert len(server.questions()) == 10
        text = run("bench", "sort", "--requests", "2")[1]
    assert (found["inputs"], found["requests"], found["failed"], found["valid"]) == ("examples", 10, 0, 0.5)
    assert 0 < found["p50"] <= found["p99"] <= found["seconds"]
    assert found["answers_per_second"] == pytest.approx(10 / found["seconds"])
    assert found["prompt_tokens_per_second"] > found["generated_tokens_per_second"] > 0
    for part in ("valid          50.0%", "prompt tokens", "p99"):
        assert part in text


def test_a_real_server_of_our_own_is_started_measured_and_ended(run: Run, tmp_path: Path) -> None:
    configured(tmp_path, "llama_cpp", model=str(smollm2()), threads=1, context=512, max_tokens=32)
    before = {one.pid for one in process.running()}
    code, out, err = run("bench", "sort", "base", "--requests", "4", "--json")
    assert code == 0
    assert "memory needed about 0.3 GB" in err
    found = json.loads(out)
    assert (found["valid"], found["failed"]) == (1.0, 0)
    assert found["memory"] > smollm2().stat().st_size / 2
    code, out, _ = run("load", "sort")
    assert (code, "was unloaded again" in out) == (0, True)
    assert run("unload", "sort")[0] == 2
    assert not {one.pid for one in process.running() if "_llama_server" in " ".join(one.argv)} - before


def test_ollama_pulls_by_itself(run: Run, tmp_path: Path) -> None:
    with beside(serve_ollama(lambda _: FRUIT)) as server:
        configured(tmp_path, "ollama", base_url=server.url, model="base")
        assert run("pull", "base", "--json")[0] == 0
        code, _, err = run("pull", "nothing")
    assert (code, "could not pull nothing" in err) == (5, True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pull"], 2, "needs a MODEL"),
        (["load"], 2, "needs a TASK"),
        (["pull", "org/name:file.gguf"], 2, "HF_ENDPOINT"),
        (["pull", "nothing", "--hub", "https://hub.example"], 2, "is no name on a model hub"),
        (["pull", "bad.gguf"], 2, "refused"),
        (["load", "sort"], 5, "no version yet"),
        (["probe", "sort", "v9"], 2, "no version 'v9'"),
        (["probe", "other"], 3, "other"),
        (["grow"], 2, "invalid choice"),
    ],
)
def test_what_cannot_be_done_is_told_with_its_exit_code(
    run: Run, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF no more")
    configured(tmp_path, "embedded")
    found, _, err = run(*arguments)
    assert (found, said in err) == (code, True), err


def test_quantiles_are_values_that_were_measured() -> None:
    values: list[Any] = [float(number) for number in range(1, 101)]
    assert [inventory.quantile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert inventory.quantile([7.0], 0.99) == 7.0
