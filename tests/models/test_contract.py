"""Every file in models/ keeps the promises that apprentice.testing.models publishes."""

from __future__ import annotations

import contextlib
import json
import pkgutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

import apprentice.models
from apprentice import export, plugins, wire
from apprentice.errors import InvalidInput, OutcomeUnknown
from apprentice.models import _MARK, as_json, prepared
from apprentice.testing.local_servers import serve_llama_cpp, serve_ollama, serve_vllm
from apprentice.testing.models import (
    CHECKS,
    ODD_TEXTS,
    REMOTE_CHECKS,
    STREAM_CHECKS,
    TASK,
    Build,
    Case,
    RemoteCase,
    ScriptedModel,
    Serve,
)
from apprentice.testing.servers import asked, serve_anthropic, serve_google, serve_openai, serve_responses
from apprentice.types import Example, Json, Model

FILES = sorted(module.name for module in pkgutil.iter_modules(apprentice.models.__path__) if module.name[0] != "_")
PAIRS: list[tuple[Json, Json]] = [
    ({"text": "win a prize"}, {"label": "spam"}),
    ({"text": "lunch at noon"}, {"label": "ham"}),
    ({"text": "ünï \U0001f600"}, {"label": "ham"}),
]


def built(name: str, **settings: Json) -> Build:
    def build(*, base_url: str, api_key: str, max_tokens: int = 1024, timeout: float = 10, **more: Any) -> Model:
        model: Model = plugins.build(
            "models",
            name,
            model="m-1",
            base_url=base_url,
            api_key=api_key,
            max_tokens=max_tokens,
            timeout=timeout,
            allow_internal=True,
            **settings,
            **more,
        )
        return model

    return build


def by_text(body: dict[str, Json]) -> Json:
    return next((output for given, output in PAIRS if given == asked(body)), {"label": "odd"})


def behind(build: Build, serve: Callable[..., Any]) -> Callable[[Path], AbstractAsyncContextManager[Case]]:
    @contextlib.asynccontextmanager
    async def case(_: Path) -> AsyncIterator[Case]:
        async with serve(by_text) as server:
            yield Case(build(base_url=server.url, api_key="k"), TASK, PAIRS)

    return case


@contextlib.asynccontextmanager
async def recorded(_: Path) -> AsyncIterator[Case]:
    rows = [{"text": given["text"], "teacher": output["label"]} for given, output in PAIRS]
    yield Case(plugins.build("models", "recorded", rows=rows, answer_field="label"), TASK, PAIRS)


@contextlib.asynccontextmanager
async def embedded(folder: Path) -> AsyncIterator[Case]:
    examples = [Example(input=given, target=output, source="remote") for given, output in PAIRS * 10]
    trainer = plugins.build("trainers", "embedded", encoder="tfidf")
    checkpoint = trainer.train(TASK, examples, into=folder, seed=0)
    yield Case(plugins.build("models", "embedded", checkpoint=str(checkpoint.path)), TASK, PAIRS)


@contextlib.asynccontextmanager
async def ensemble(folder: Path) -> AsyncIterator[Case]:
    examples = [Example(input=given, target=output, source="remote") for given, output in PAIRS * 10]
    members = [{"settings": {"encoder": "tfidf", "c": c}} for c in (5.0, 20.0)]
    checkpoint = plugins.build("trainers", "ensemble", members=members).train(TASK, examples, into=folder, seed=0)
    yield Case(plugins.build("models", "ensemble", checkpoint=str(checkpoint.path)), TASK, PAIRS)


@contextlib.asynccontextmanager
async def exported(folder: Path) -> AsyncIterator[Case]:
    examples = [Example(input=given, target=output, source="remote") for given, output in PAIRS * 10]
    checkpoint = plugins.build("trainers", "embedded", encoder="wordllama").train(TASK, examples, into=folder, seed=0)
    export.write(export.Order(checkpoint.path, TASK, "v1", "onnx", folder / "exported"))
    yield Case(plugins.build("models", "onnx", checkpoint=folder / "exported"), TASK, PAIRS)


@contextlib.asynccontextmanager
async def mixed(folder: Path) -> AsyncIterator[Case]:
    """The embedded student's label with a generative one's reply, which says what was decided."""
    properties = {"label": {"enum": ["spam", "ham"]}, "reply": {"type": "string"}}
    output = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    shown = tuple({**shown, "output": {**shown["output"], "reply": "it is spam"}} for shown in TASK.examples)
    task = TASK.model_copy(update={"output_schema": output, "examples": shown})
    pairs = [(given, {**output, "reply": f"it is {output['label']}"}) for given, output in PAIRS]
    marked = task.model_copy(
        update={
            "output_schema": output | {"properties": properties | {"reply": {"type": "string", "x-free-text": True}}}
        }
    )
    examples = [Example(input=given, target=output, source="remote") for given, output in pairs * 10]
    trainer = plugins.build("trainers", "mixed", closed={"encoder": "tfidf"})
    checkpoint = trainer.train(marked, examples, into=folder, seed=0)
    async with serve_llama_cpp(lambda body: {"reply": f"it is {asked(body)['decided']['label']}"}) as server:
        rest = {"backend": "llama_cpp", "base_url": server.url}
        model = plugins.build("models", "mixed", checkpoint=str(checkpoint.path), rest=rest)
        await model.ready()
        yield Case(model, task, pairs)


def on_a_server(name: str, serve: Callable[..., Any]) -> Callable[[Path], AbstractAsyncContextManager[Case]]:
    @contextlib.asynccontextmanager
    async def case(_: Path) -> AsyncIterator[Case]:
        async with serve(by_text) as server:
            model = plugins.build("models", name, model="base", base_url=server.url)
            await model.ready()
            yield Case(model, TASK, PAIRS)

    return case


LOCAL = {"llama_cpp": serve_llama_cpp, "vllm": serve_vllm, "ollama": serve_ollama}
WIRES: dict[str, tuple[Build, Serve]] = {
    "openai": (built("openai"), serve_openai),
    "openai responses": (built("openai", api="responses"), serve_responses),
    "anthropic": (built("anthropic"), serve_anthropic),
    "google": (built("google"), serve_google),
}
STREAMS: dict[str, tuple[Build, Serve]] = {
    "openai": (built("openai", stream=True), serve_openai),
    "openai responses": (built("openai", api="responses", stream=True), serve_responses),
    "anthropic": (built("anthropic", stream=True), serve_anthropic),
    "google": (built("google", stream=True), serve_google),
}
CASES = (
    {name: behind(*wire) for name, wire in WIRES.items()}
    | {f"{name} stream": behind(*wire) for name, wire in STREAMS.items()}
    | {"recorded": recorded, "embedded": embedded, "onnx": exported, "ensemble": ensemble, "mixed": mixed}
    | {name: on_a_server(name, serve) for name, serve in LOCAL.items()}
)


def test_every_file_is_held_to_the_contract() -> None:
    assert set(CASES) >= set(FILES), "a new file needs an entry in CASES that builds it without a key and a network"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
async def test_a_model_keeps_its_contract(name: str, check: Callable[[Case], Any], tmp_path: Path) -> None:
    async with CASES[name](tmp_path) as case:
        await check(case)
        await case.model.close()


class Told:
    """A client that keeps what it is sent, and answers with nothing of use."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
        leaving()
        self.bodies.append(request.body)
        return wire.Reply(200, {}, b"[]")

    async def close(self) -> None:
        return None


ODD_TASKS = (
    TASK,
    TASK.model_copy(update={"examples": (), "instructions": "half \ud83d", "output_schema": {"type": "integer"}}),
    TASK.model_copy(update={"description": f"say {_MARK}", "instructions": '"}]\\ \n'}),
)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_built_once_a_task_is_what_the_dialect_says_of_each_request(name: str, stream: bool) -> None:
    told = Told()
    build = (STREAMS if stream else WIRES)[name][0]
    model: Any = build(base_url="https://example.com", api_key="k", client=told)  # type: ignore[call-arg]
    for task in ODD_TASKS:
        for text in (*ODD_TEXTS, _MARK, as_json(_MARK)):
            whole = as_json(model._dialect.body(task, {"text": text})).encode()
            request = prepared(model, task, {"text": text})
            with contextlib.suppress(OutcomeUnknown):
                await request.answer()
            with contextlib.suppress(OutcomeUnknown):
                await model.answer(task, {"text": text})
            sent, again = told.bodies[-2:]
            assert sent == again
            assert json.loads(sent) == json.loads(whole)
            assert request.bytes == model.request_bytes(task, {"text": text}) >= len(sent)
    for number in range(1_000):  # a task that is new each time fills no memory
        model.request_bytes(TASK.model_copy(update={"name": f"t{number}"}), {})
    assert len(model._forms) <= 100
    with pytest.raises(InvalidInput):
        prepared(model, TASK, {"text": float("nan")})


async def test_a_model_that_prepares_nothing_is_measured_and_asked() -> None:
    model = ScriptedModel([{"label": "ham"}])
    request = prepared(model, TASK, {"text": "x"})
    assert (request.bytes, model.asked) == (1, [])
    assert (await request.answer()).output == {"label": "ham"}
    assert model.asked == [{"text": "x"}]


@pytest.mark.parametrize("check", REMOTE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", WIRES)
async def test_a_provider_tells_the_truth(name: str, check: Callable[[RemoteCase], Any]) -> None:
    await check(RemoteCase(*WIRES[name]))


@pytest.mark.parametrize("check", STREAM_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", STREAMS)
async def test_a_provider_tells_the_truth_in_a_stream(name: str, check: Callable[[RemoteCase], Any]) -> None:  # F48
    await check(RemoteCase(*STREAMS[name]))
