"""The official SDKs as clients of the servers' batches: what they read is what was asked, answered and billed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest
from google import genai
from google.genai import types as google

from apprentice.testing.batches import Batching
from apprentice.testing.servers import Reply, Server, serve_anthropic, serve_google, serve_openai, serve_responses
from apprentice.types import Json

HI: Any = [{"role": "user", "content": "hi"}]


def odd(body: dict[str, Json]) -> Json | Reply:
    """Refuses the request that asks for it."""
    return Reply(status=400, code="INVALID_ARGUMENT") if "bad" in json.dumps(body) else "ünï"


def half(server: Server) -> int:
    usages = [seen.usage for seen in server.batched if seen.status < 300]
    return sum(usage.input_tokens * 1_250_000 + usage.output_tokens * 5_000_000 for usage in usages)


@pytest.mark.parametrize(("serve", "url"), [(serve_openai, "/v1/chat/completions"), (serve_responses, "/v1/responses")])
async def test_openai_sends_a_file_and_reads_what_came_of_it(serve: Any, url: Any) -> None:
    asking = "messages" if serve is serve_openai else "input"
    texts = {"a": "hi", "b": "bad", "c": "hi"}
    lines = [
        {
            "custom_id": key,
            "method": "POST",
            "url": url,
            "body": {"model": "m", asking: [{"role": "user", "content": t}]},
        }
        for key, t in texts.items()
    ]
    async with (
        serve(odd, api_key="right") as server,
        openai.AsyncOpenAI(api_key="right", base_url=server.url, max_retries=0) as client,
    ):
        content = "\n".join(map(json.dumps, lines)).encode()
        file = await client.files.create(file=("requests.jsonl", content), purpose="batch")
        assert (file.purpose, file.bytes, file.filename) == ("batch", len(content), "requests.jsonl")
        made = await client.batches.create(
            input_file_id=file.id, endpoint=url, completion_window="24h", metadata={"a": "b"}
        )
        assert (made.status, made.input_file_id, made.endpoint) == ("validating", file.id, url)
        assert (await client.batches.retrieve(made.id)).status == "in_progress"
        assert server.bill == 0
        ended = await client.batches.retrieve(made.id)
        assert (ended.status, ended.errors) == ("completed", None)
        assert ended.request_counts is not None
        assert (ended.request_counts.total, ended.request_counts.completed) == (3, 2)
        assert ended.output_file_id is not None
        assert ended.error_file_id is not None
        good, bad = [
            [json.loads(line) for line in (await client.files.content(name)).text.splitlines()]
            for name in (ended.output_file_id, ended.error_file_id)
        ]
        assert [(line["custom_id"], line["response"]["status_code"]) for line in [*good, *bad]] == [
            ("c", 200),
            ("a", 200),
            ("b", 400),
        ]
        assert "ünï" in json.dumps(good[0]["response"]["body"], ensure_ascii=False)
        assert sum(seen.charge for seen in server.batched) == half(server)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").batches.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve("another")
        with pytest.raises(openai.BadRequestError):
            await client.batches.create(input_file_id="none", endpoint=url, completion_window="24h")


async def test_openai_lists_its_batches_and_cancels_one() -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": HI}}
    async with serve_openai(["x"]) as server, openai.AsyncOpenAI(api_key="k", base_url=server.url) as client:
        file = await client.files.create(file=json.dumps(line).encode(), purpose="batch")
        for _ in range(5):
            await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        assert [batch.id async for batch in client.batches.list(limit=2)] == [f"batch_{n}" for n in (4, 3, 2, 1, 0)]
        assert (await client.batches.cancel("batch_3")).status == "cancelling"
        assert (await client.batches.retrieve("batch_3")).status == "cancelled"
        server.batching = Batching(looks=0, end="failed")
        assert (await client.batches.retrieve("batch_2")).status == "failed"
        server.batching = Batching(looks=0, end="expired")
        expired = await client.batches.retrieve("batch_1")
        assert (expired.status, expired.output_file_id) == ("expired", None)
        assert expired.error_file_id is not None
        told = json.loads((await client.files.content(expired.error_file_id)).text)
        assert (told["response"], told["error"]["code"]) == (None, "batch_expired")
        assert server.bill == 0


async def test_anthropic_sends_a_batch_and_reads_its_results() -> None:
    def request(key: str, text: str) -> Any:
        return {
            "custom_id": key,
            "params": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": text}]},
        }

    async with (
        serve_anthropic(odd, api_key="right") as server,
        anthropic.AsyncAnthropic(api_key="right", base_url=server.url, max_retries=0) as client,
    ):
        batches = client.messages.batches
        made = await batches.create(requests=[request("a", "hi"), request("b", "bad"), request("c", "hi")])
        assert (made.processing_status, made.request_counts.processing, made.results_url) == ("in_progress", 3, None)
        assert (await batches.retrieve(made.id)).ended_at is None
        ended = await batches.retrieve(made.id)
        assert (ended.processing_status, ended.request_counts.succeeded, ended.request_counts.errored) == (
            "ended",
            2,
            1,
        )
        found: dict[str, Any] = {one.custom_id: one.result async for one in await batches.results(made.id)}
        assert {key: one.type for key, one in found.items()} == {"a": "succeeded", "b": "errored", "c": "succeeded"}
        assert found["a"].message.content[0].text == "ünï"
        assert found["b"].error.error.type == "INVALID_ARGUMENT"
        assert found["a"].message.usage.input_tokens == server.batched[0].usage.input_tokens
        assert sum(seen.charge for seen in server.batched) == half(server)
        for wrong in ([request("a", "x"), request("a", "y")], [request("no spaces", "x")], []):
            with pytest.raises(anthropic.BadRequestError):
                await batches.create(requests=wrong)
        with pytest.raises(anthropic.AuthenticationError):
            await client.with_options(api_key="wrong").messages.batches.retrieve(made.id)


async def test_anthropic_lists_its_batches_and_cancels_one() -> None:
    params: Any = {"model": "m", "max_tokens": 9, "messages": HI}
    async with (
        serve_anthropic(["x"]) as server,
        anthropic.AsyncAnthropic(api_key="k", base_url=server.url, max_retries=0) as client,
    ):
        batches = client.messages.batches
        for _ in range(5):
            await batches.create(requests=[{"custom_id": "a", "params": params}, {"custom_id": "b", "params": params}])
        assert [batch.id async for batch in batches.list(limit=2)] == [f"msgbatch_{n}" for n in (4, 3, 2, 1, 0)]
        assert (await batches.cancel("msgbatch_4")).processing_status == "canceling"
        server.batching.answered = 1
        ended = await batches.retrieve("msgbatch_4")
        assert (ended.request_counts.succeeded, ended.request_counts.canceled) == (1, 1)
        server.batching = Batching(looks=0, end="expired")
        assert (await batches.retrieve("msgbatch_3")).request_counts.expired == 2
        assert [one.result.type async for one in await batches.results("msgbatch_3")] == ["expired", "expired"]


async def test_google_makes_a_batch_lists_it_and_reads_its_answers() -> None:
    async with serve_google(odd, api_key="right") as server:
        client = genai.Client(api_key="right", http_options=google.HttpOptions(base_url=server.url))
        batches = client.aio.batches
        try:
            source: Any = [{"contents": text, "metadata": {"key": key}} for key, text in (("a", "hi"), ("b", "bad"))]
            made = await batches.create(model="gemini", src=source, config={"display_name": "mine"})
            assert (made.name, made.display_name, made.state) == (
                "batches/0",
                "mine",
                google.JobState.JOB_STATE_PENDING,
            )
            assert (await batches.get(name="batches/0")).state == google.JobState.JOB_STATE_RUNNING
            ended = await batches.get(name="batches/0")
            assert (ended.state, ended.model) == (google.JobState.JOB_STATE_SUCCEEDED, "models/gemini")
            assert ended.dest is not None
            first, second = ended.dest.inlined_responses or []
            assert first.response is not None
            assert (first.response.text, first.metadata) == ("ünï", {"key": "a"})
            assert second.error is not None
            assert second.error.code == 400
            assert sum(seen.charge for seen in server.batched) == half(server)
            for _ in range(4):
                await batches.create(model="gemini", src=source, config={"display_name": "mine"})
            pager = await batches.list(config={"page_size": 2})
            assert [job.name async for job in pager] == [f"batches/{n}" for n in (4, 3, 2, 1, 0)]
            await batches.cancel(name="batches/4")
            assert (await batches.get(name="batches/4")).state == google.JobState.JOB_STATE_CANCELLED
            server.batching = Batching(looks=0, end="expired")
            assert (await batches.get(name="batches/3")).state == google.JobState.JOB_STATE_EXPIRED
        finally:
            await client.aio.aclose()
            client.close()


async def test_a_lost_creation_is_a_batch_all_the_same_and_a_refused_one_is_none() -> None:
    params: Any = {"model": "m", "max_tokens": 9, "messages": HI}
    async with (
        serve_anthropic(["x"]) as server,
        anthropic.AsyncAnthropic(api_key="k", base_url=server.url, max_retries=0) as client,
    ):
        server.batching = Batching(lost=1, refused=[(429, "rate_limit_error")])
        batches = client.messages.batches
        with pytest.raises(anthropic.RateLimitError):
            await batches.create(requests=[{"custom_id": "a", "params": params}])
        assert server.counter.jobs == []
        with pytest.raises(anthropic.APIConnectionError):
            await batches.create(requests=[{"custom_id": "a", "params": params}])
        assert [batch.id async for batch in batches.list()] == ["msgbatch_0"]


async def test_a_batch_waits_for_looks_and_not_for_time() -> None:
    params: Any = {"model": "m", "max_tokens": 9, "messages": HI}
    async with serve_anthropic(["x"]) as server, anthropic.AsyncAnthropic(api_key="k", base_url=server.url) as client:
        server.batching.looks = 5
        batches = client.messages.batches
        await batches.create(requests=[{"custom_id": "a", "params": params}])
        states = [(await batches.retrieve("msgbatch_0")).processing_status for _ in range(7)]
        assert states == ["in_progress"] * 5 + ["ended"] * 2
        assert len(server.batched) == 1
        await asyncio.gather(*(batches.retrieve("msgbatch_0") for _ in range(5)))
        assert len(server.batched) == 1
