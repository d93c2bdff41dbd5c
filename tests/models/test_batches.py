"""How the three providers are asked for batches: what may be lost on the way, and what nobody else gets to see."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from apprentice import plugins, wire
from apprentice.errors import ModelError, ModelRefused, ModelRejected, OutcomeUnknown
from apprentice.models import BatchModel, Sought
from apprentice.testing.batches import Batching
from apprentice.testing.models import TASK
from apprentice.testing.servers import (
    Reply,
    Server,
    asked,
    serve_anthropic,
    serve_google,
    serve_openai,
    serve_responses,
)
from apprentice.types import Answer, Json

KEY = "sk-a-key-that-nobody-may-see"
SERVERS: dict[str, tuple[str, Any, dict[str, Json]]] = {
    "openai": ("openai", serve_openai, {}),
    "responses": ("openai", serve_responses, {"api": "responses"}),
    "anthropic": ("anthropic", serve_anthropic, {}),
    "google": ("google", serve_google, {}),
}
INPUTS = {f"r-{number}": {"text": f"ünï \U0001f600\u2028 {number}"} for number in range(4)}
IDS = list(INPUTS)


def echo(body: dict[str, Json]) -> Json:
    return {"label": asked(body)["text"]}


@asynccontextmanager
async def batching(name: str, answer: Any = echo, **settings: Any) -> AsyncIterator[tuple[Server, BatchModel]]:
    plugin, serve, own = SERVERS[name]
    async with serve(answer, api_key=KEY) as server:
        given = {"base_url": server.url, "api_key": KEY, "allow_internal": True, "max_tokens": 99} | own | settings
        model = plugins.build("models", plugin, model="m-1", **given)
        assert isinstance(model, BatchModel)
        try:
            yield server, model
        finally:
            await model.close()


async def results(model: BatchModel, batch: str) -> dict[str, Answer | ModelError]:
    while not await model.ended(batch):
        pass
    return await model.results(TASK, batch, IDS)


def sought(**changes: Any) -> Sought:
    return Sought("b1", 4, time.time(), frozenset())._replace(**changes)


@pytest.mark.parametrize("name", SERVERS)
async def test_each_input_gets_its_own_answer(name: str) -> None:
    async with batching(name) as (server, model):
        batch = await model.submit(TASK, "b1", INPUTS)
        assert not await model.ended(batch)
        found = await results(model, batch)
        for key, input in INPUTS.items():
            answer = found[key]
            assert isinstance(answer, Answer)
            assert (answer.output, answer.problem) == ({"label": input["text"]}, None)
            assert answer.usage is not None
        usages = [answer.usage for answer in found.values() if isinstance(answer, Answer)]
        assert sorted(map(str, usages)) == sorted(str(seen.usage) for seen in server.batched)


@pytest.mark.parametrize("name", SERVERS)
async def test_the_key_travels_in_its_header_and_nowhere_else(name: str) -> None:
    async with batching(name) as (server, model):
        server.batching.refused = [(403, "no")]
        with pytest.raises(ModelRejected) as error:
            await model.submit(TASK, "b1", INPUTS)
        await results(model, await model.submit(TASK, "b1", INPUTS))
        await model.find(sought())
        assert len(server.requests) >= 5
        for seen in server.requests:
            assert [KEY in value for value in seen.headers.values()].count(True) == 1
            assert KEY not in seen.path + json.dumps(seen.body)
        assert KEY not in f"{error.value!r} {model!r} {vars(model)!r}"


@pytest.mark.parametrize("name", SERVERS)
async def test_a_refusal_an_error_and_a_cut_are_what_they_would_be_alone(name: str) -> None:
    odd: dict[str, Any] = {
        "r-0": Reply("I will not.", finish="refused"),
        "r-1": Reply({"label": "x"}, finish="truncated"),
        "r-2": Reply(status=400, code="INVALID_ARGUMENT"),
    }
    by_text = {INPUTS[key]["text"]: reply for key, reply in odd.items()}
    async with batching(name, lambda body: by_text.get(asked(body)["text"]) or echo(body)) as (_, model):
        found: dict[str, Any] = await results(model, await model.submit(TASK, "b1", INPUTS))
        assert isinstance(found["r-0"], ModelRefused)
        assert found["r-0"].usage is not None
        assert (found["r-1"].finish, found["r-1"].output) == ("truncated", None)
        assert isinstance(found["r-2"], ModelRejected)
        assert found["r-2"].outcome == "rejected"
        assert found["r-3"].output == {"label": INPUTS["r-3"]["text"]}


@pytest.mark.parametrize("name", SERVERS)
async def test_a_batch_is_found_on_any_page_and_no_other_one_is(name: str) -> None:
    async with batching(name) as (server, model):
        assert await model.find(sought()) == []
        mine = await model.submit(TASK, "b1", INPUTS)
        for number in range(150):
            await model.submit(TASK, f"other-{number}", {"r-0": INPUTS["r-0"]})
        assert len(server.counter.jobs) == 151
        assert await model.find(sought()) == [mine]
        assert await model.find(sought(name="b2", size=3)) == []


async def test_anthropic_tells_batches_apart_by_size_and_time_alone() -> None:
    async with batching("anthropic") as (server, model):
        first, second = [await model.submit(TASK, "b1", INPUTS) for _ in range(2)]
        assert await model.find(sought()) == [second, first]
        assert await model.find(sought(known=frozenset({first}))) == [second]
        assert await model.find(sought(since=time.time() + 3600)) == []
        for job in server.counter.jobs:
            job.created -= 7200
        assert await model.find(sought()) == []


async def test_results_are_fetched_from_the_configured_host_whatever_the_batch_says() -> None:
    async with batching("anthropic") as (server, model), serve_anthropic(["x"]) as thief:
        real = server.url
        batch = await model.submit(TASK, "b1", INPUTS)
        server.url = thief.url  # where it says that the results are
        found = await results(model, batch)
        server.url = real
        assert all(isinstance(answer, Answer) for answer in found.values())
        assert (thief.connections, thief.requests) == (0, [])


@pytest.mark.parametrize("name", SERVERS)
async def test_what_the_results_leave_out_is_unknown(name: str) -> None:
    async with batching(name) as (server, model):
        server.batching = Batching(looks=0, unlisted=1)
        found = await results(model, await model.submit(TASK, "b1", INPUTS))
        missing = found["r-3"]
        assert isinstance(missing, OutcomeUnknown)
        assert (missing.outcome, missing.usage) == ("unknown", None)


@pytest.mark.parametrize("name", ["openai", "responses", "anthropic"])
async def test_what_was_not_answered_before_the_end_is_free(name: str) -> None:
    for cancelled in (False, True):
        async with batching(name) as (server, model):
            server.batching = Batching(looks=0, end="expired", answered=1)
            batch = await model.submit(TASK, "b1", INPUTS)
            if cancelled:
                server.batching.looks = 99
                await model.cancel(batch)
            found = await results(model, batch)
            outcomes = [one.outcome for one in found.values() if isinstance(one, ModelError)]
            assert outcomes == ["rejected"] * 3
            assert len(server.batched) == 1


@pytest.mark.parametrize("end", ["expired", "failed"])
async def test_google_does_not_say_what_a_batch_without_results_costs(end: Any) -> None:
    async with batching("google") as (server, model):
        server.batching = Batching(looks=0, end=end)
        found = await results(model, await model.submit(TASK, "b1", INPUTS))
        assert {one.outcome for one in found.values() if isinstance(one, ModelError)} == {"unknown"}
        assert f"the batch is {end.upper()}" in str(found["r-0"])


@pytest.mark.parametrize("name", SERVERS)
async def test_a_lost_answer_is_unknown_and_no_batch_is_no_answer(name: str) -> None:
    async with batching(name) as (server, model):
        server.batching.lost = 1
        with pytest.raises(OutcomeUnknown):
            await model.submit(TASK, "b1", INPUTS)
        assert len(server.counter.jobs) == 1
        for ask in (model.ended, model.cancel):
            with pytest.raises(ModelRejected):
                await ask("../../elsewhere?x")
        assert all("/elsewhere" not in seen.path for seen in server.requests)


class Canned:
    """A client that gives the same answer to everything."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.asked: list[wire.Request] = []

    async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
        leaving()
        self.asked.append(request)
        return wire.Reply(200, {}, self.body)

    async def close(self) -> None:
        return None


def canned(name: str, body: Json | bytes) -> tuple[BatchModel, Canned]:
    client = Canned(body if isinstance(body, bytes) else json.dumps(body).encode())
    model: BatchModel = plugins.build("models", name, model="m", client=client)
    return model, client


@pytest.mark.parametrize("name", ["openai", "anthropic", "google"])
@pytest.mark.parametrize("odd", [{}, {"id": 5, "name": None}, {"data": "x", "operations": [None], "metadata": []}])
async def test_whatever_comes_back_is_read_or_unknown(name: str, odd: dict[str, Json]) -> None:
    model, _ = canned(name, odd)
    assert await model.ended("b") is False
    assert await model.find(sought()) == []
    with pytest.raises(OutcomeUnknown):
        await model.submit(TASK, "b1", INPUTS)
    found = await model.results(TASK, "b", IDS)
    assert all(isinstance(one, ModelError) for one in found.values())


@pytest.mark.parametrize("body", [b'{"custom_id": "r-0"}\n{"custom', b"<html>", b"[1]\n", b'{"a": NaN}'])
async def test_nothing_of_a_damaged_file_is_used(body: bytes) -> None:
    model, client = canned("anthropic", body)
    with pytest.raises(OutcomeUnknown) as error:
        await model.results(TASK, "b", IDS)
    assert error.value.retryable
    assert [asked.method for asked in client.asked] == ["GET"]


@pytest.mark.parametrize("prefix", ["BATCH", "JOB"])
@pytest.mark.parametrize(
    ("state", "ended"), [("PENDING", False), ("RUNNING", False), ("SUCCEEDED", True), ("EXPIRED", True), ("NEW", False)]
)
async def test_google_names_its_states_in_two_ways(prefix: str, state: str, ended: bool) -> None:
    model, client = canned("google", {"name": "batches/1", "metadata": {"state": f"{prefix}_STATE_{state}"}})
    assert await model.ended("batches/1") is ended
    assert client.asked[0].url.endswith("/v1beta/batches/1")


async def test_google_answers_without_a_key_are_taken_in_order() -> None:
    told = [{"error": {"code": 3, "message": "first"}}, {"error": {"code": 3, "message": "second"}}]
    model, _ = canned("google", {"done": True, "response": {"inlinedResponses": {"inlinedResponses": told}}})
    found = await model.results(TASK, "batches/1", IDS)
    assert ["first" in str(found["r-0"]), "second" in str(found["r-1"])] == [True, True]
    assert isinstance(found["r-2"], OutcomeUnknown)


@pytest.mark.parametrize(
    ("name", "requests", "size"),
    [("openai", 50_000, 200_000_000), ("anthropic", 100_000, 256_000_000), ("google", 10_000, 20_000_000)],
)
def test_a_batch_is_never_larger_than_the_provider_takes(name: str, requests: int, size: int) -> None:
    model, _ = canned(name, {})
    assert model.batch_limits.requests <= requests
    assert model.batch_limits.bytes <= size
