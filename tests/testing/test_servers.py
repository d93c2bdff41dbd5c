"""The loopback servers: a bill of their own, and behaviour as scripted."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

from apprentice import plugins
from apprentice.errors import ModelError, ModelRejected
from apprentice.testing.models import TASK, ScriptedModel
from apprentice.testing.servers import Reply, Server, asked, serve_anthropic, serve_openai, serve_recorded
from apprentice.types import Json, Model, Usage

SERVERS = [("openai", serve_openai), ("anthropic", serve_anthropic)]


def model_of(name: str, server: Server, **settings: Any) -> Model:
    built: Model = plugins.build("models", name, model="m", base_url=server.url, allow_internal=True, **settings)
    return built


@pytest.mark.parametrize(("name", "serve"), SERVERS)
async def test_the_bill_is_what_the_usage_says_at_the_servers_own_price(name: str, serve: Any) -> None:
    async with serve(lambda body: {"label": asked(body)["text"]}, price=(3_000_000, 7_000_000)) as server:
        model = model_of(name, server)
        answers = [await model.answer(TASK, {"text": "x" * length}) for length in (1, 10, 100)]
        await model.close()
    usages = [answer.usage for answer in answers if answer.usage is not None]
    assert server.bill == sum(3 * usage.input_tokens + 7 * usage.output_tokens for usage in usages)
    for seen, usage in zip(server.requests, usages, strict=True):
        assert seen.usage == usage
        assert usage.input_tokens <= int(seen.headers["content-length"])


async def test_a_fraction_of_a_micro_dollar_is_rounded_up_once() -> None:
    async with serve_openai([Reply({"label": "ham"})], price=(1, 0)) as server:
        model = model_of("openai", server)
        assert server.bill == 0
        for _ in range(3):
            await model.answer(TASK, {"text": "x"})
        await model.close()
        assert server.bill == 1


@pytest.mark.parametrize(("name", "serve"), SERVERS)
async def test_the_bill_counts_what_nobody_got_to_see_and_not_what_was_turned_away(name: str, serve: Any) -> None:
    async def bill(reply: Reply) -> int:
        async with serve([reply]) as server:
            model = model_of(name, server, timeout=0.2)
            with contextlib.suppress(ModelError):
                await model.answer(TASK, {"text": "x"})
            await model.close()
        assert len(server.requests) == 1
        return int(server.bill)

    whole = await bill(Reply({"label": "ham"}))
    assert whole > 0
    for hidden in (
        Reply({"label": "ham"}, cut=20),
        Reply({"label": "ham"}, silent=True),
        Reply({"label": "ham"}, wait=9.0),
    ):
        assert await bill(hidden) == whole
    assert await bill(Reply({"label": "ham"}, usage=Usage(input_tokens=0, output_tokens=0))) == whole
    assert await bill(Reply(status=429, code="rate_limit_exceeded")) == 0
    assert await bill(Reply(status=500, code="server_error")) == 0
    assert await bill(Reply(status=500, code="server_error", content={"label": "ham"}, billed=True)) == whole


@pytest.mark.parametrize(("name", "serve"), SERVERS)
async def test_replies_come_in_order_and_the_last_one_repeats(name: str, serve: Any) -> None:
    async with serve([{"label": "a"}, Reply({"label": "b"})]) as server:
        model = model_of(name, server)
        outputs = [(await model.answer(TASK, {"text": "x"})).output for _ in range(3)]
        await model.close()
    assert outputs == [{"label": "a"}, {"label": "b"}, {"label": "b"}]


async def test_an_answer_may_wait_for_an_event() -> None:
    go = asyncio.Event()
    async with serve_openai([Reply({"label": "a"}, wait=go)]) as server:
        model = model_of("openai", server)
        call = asyncio.ensure_future(model.answer(TASK, {"text": "x"}))
        done, _ = await asyncio.wait([call], timeout=0.1)
        assert not done
        go.set()
        assert (await call).output == {"label": "a"}
        await model.close()


@pytest.mark.parametrize(("name", "serve"), SERVERS)
async def test_a_wrong_key_is_turned_away(name: str, serve: Any) -> None:
    async with serve([{"label": "a"}], api_key="right") as server:
        model = model_of(name, server, api_key="wrong")
        with pytest.raises(ModelRejected, match="401"):
            await model.answer(TASK, {"text": "x"})
        await model.close()
        assert server.bill == 0


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n", b"404"),
        (b"POST /v1/other HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}", b"404"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}", b"400"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n{", b"400"),
        (b"no http at all\r\n\r\n", b""),
    ],
)
async def test_what_is_no_request_of_the_format_is_not_answered_by_the_model(head: bytes, status: bytes) -> None:
    def never(_: dict[str, Json]) -> Json:
        raise AssertionError("the model was asked")

    async with serve_openai(never) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))
        writer.write(head)
        try:
            line = await reader.readline()
        except ConnectionError:
            line = b""
        assert line.split(b" ")[1:2] == ([status] if status else [])
        writer.close()


async def test_two_requests_in_one_packet_get_two_answers() -> None:
    body = json.dumps({"messages": [], "max_tokens": 9}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with serve_openai(["one", "two"]) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))
        writer.write((head + body) * 2)
        assert b'"two"' not in await reader.readuntil(b'"content": "one"')
        await reader.readuntil(b'"content": "two"')
        writer.close()
    assert len(server.requests) == 2


async def test_a_recording_is_served_in_the_wire_format() -> None:
    recorded = plugins.build("models", "recorded", rows=[{"text": "a", "teacher": "ham"}], answer_field="label")
    async with serve_recorded(recorded, TASK) as server:
        model = model_of("openai", server)
        assert (await model.answer(TASK, {"text": "a"})).output == {"label": "ham"}
        with pytest.raises(ModelRejected, match="not_in_the_recording"):
            await model.answer(TASK, {"text": "z"})
        await model.close()
        assert server.bill > 0


async def test_a_recorded_value_that_is_no_object_is_served_wrapped() -> None:
    task = TASK.model_copy(update={"output_schema": {"type": "string"}, "examples": ()})
    async with serve_recorded(
        plugins.build("models", "recorded", rows=[{"text": "a", "teacher": "ham"}]), task
    ) as server:
        model = model_of("openai", server)
        assert (await model.answer(task, {"text": "a"})).output == "ham"
        await model.close()


async def test_a_scripted_model_says_what_it_was_told_and_remembers() -> None:
    model = ScriptedModel([{"label": "a"}, ModelRejected("no"), {"label": "c"}])
    assert (await model.answer(TASK, 1)).output == {"label": "a"}
    with pytest.raises(ModelRejected):
        await model.answer(TASK, 2)
    assert [(await model.answer(TASK, n)).output for n in (3, 4)] == [{"label": "c"}] * 2
    assert model.asked == [1, 2, 3, 4]
    assert (await ScriptedModel(lambda given: {"label": given}).answer(TASK, "x")).output == {"label": "x"}
    await model.close()
    assert model.closed
