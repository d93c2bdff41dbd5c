"""The loopback servers: a bill of their own, and behaviour as scripted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from apprentice import plugins
from apprentice.errors import ModelError, ModelRejected
from apprentice.testing.formats import FORMATS
from apprentice.testing.models import TASK, ScriptedModel
from apprentice.testing.servers import (
    Reply,
    Server,
    asked,
    serve_anthropic,
    serve_google,
    serve_openai,
    serve_recorded,
    serve_responses,
)
from apprentice.types import Json, Model, Usage

SERVERS = [("openai", serve_openai), ("anthropic", serve_anthropic)]
WIRES: dict[str, Any] = {
    "openai": serve_openai,
    "responses": serve_responses,
    "anthropic": serve_anthropic,
    "google": serve_google,
}
INPUT = json.dumps({"text": "x"})
BODIES: dict[str, dict[str, Json]] = {
    "openai": {"model": "m", "messages": [{"role": "user", "content": INPUT}]},
    "responses": {"model": "m", "input": INPUT},
    "anthropic": {"model": "m", "messages": [{"role": "user", "content": INPUT}], "max_tokens": 99},
    "google": {"contents": [{"role": "user", "parts": [{"text": INPUT}]}]},
}
PATHS = {"openai": "/v1/chat/completions", "responses": "/v1/responses", "anthropic": "/v1/messages"}
KEYS = {"anthropic": "x-api-key", "google": "x-goog-api-key"}


def request_of(
    name: str, *, stream: bool = False, key: str = "k", **changes: Json
) -> tuple[str, bytes, dict[str, str]]:
    """The path, body and headers of a small request."""
    method = "streamGenerateContent?alt=sse" if stream else "generateContent"
    path = PATHS.get(name, f"/v1beta/models/m:{method}")
    body = BODIES[name] | ({} if name == "google" else {"stream": stream}) | changes
    header = {KEYS.get(name, "authorization"): key if name in KEYS else f"Bearer {key}"}
    return path, json.dumps(body).encode(), header


async def post(server: Server, name: str, **how: Any) -> httpx2.Response:
    path, body, headers = request_of(name, **how)
    host = urlsplit(server.url).netloc
    async with httpx2.AsyncClient() as client:
        return await client.post(f"http://{host}{path}", content=body, headers=headers)


def raw_request(name: str, **how: Any) -> bytes:
    path, body, headers = request_of(name, **how)
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{key}: {value}" for key, value in headers.items()), "\r\n"]).encode() + body


async def raw_answer(server: Server, name: str, **how: Any) -> bytes:
    """All bytes that come back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(server.url).port)
    writer.write(raw_request(name, **how))
    try:
        return await reader.read()
    finally:
        writer.close()


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


@pytest.mark.parametrize("name", WIRES)
async def test_a_recording_is_served_in_every_format(name: str) -> None:
    recorded = plugins.build("models", "recorded", rows=[{"text": "x", "teacher": "ham"}], answer_field="label")
    async with serve_recorded(recorded, TASK, format=name) as server:
        answer = await post(server, name)
        assert answer.status_code == 200
        assert "ham" in answer.text
        streamed = await post(server, name, stream=True)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        told = json.loads(json.dumps(BODIES[name]).replace(json.dumps(INPUT), '"no JSON"'))
        assert (await post(server, name, **told)).status_code == 400


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_bill_is_the_true_count_in_integers_whatever_was_told_or_seen(name: str, stream: bool) -> None:
    size = len(request_of(name, stream=stream)[1])
    said = {"label": "a label of some length", "n": 12}
    output = -(-len(json.dumps(said)) // 4) + 5
    charge = -(-size // 4) * 3 + output * 7  # tokens read from a cache are input like any other
    replies = [
        Reply(said, reasoning=5, cached=4),
        Reply(said, reasoning=5, usage=Usage(input_tokens=1, output_tokens=1)),
        Reply(said, reasoning=5, silent=True),
        Reply(said, reasoning=5, fails=1, code="server_error"),
        Reply(said, reasoning=5, finish="refused"),
    ]
    async with WIRES[name](replies, price=(3, 7)) as server:
        for _ in replies:
            assert (await post(server, name, stream=stream)).status_code == 200
    assert [seen.charge for seen in server.requests] == [charge] * len(replies)
    assert server.requests[0].usage == Usage(
        input_tokens=-(-size // 4), output_tokens=output, cached_tokens=4, reasoning_tokens=5
    )
    assert server.bill == 1  # millionths, rounded up once


@pytest.mark.parametrize("name", WIRES)
async def test_a_stream_cut_at_any_byte_gives_those_bytes_and_is_billed_whole(name: str) -> None:
    async def answer(cut: int) -> tuple[bytes, int]:
        async with WIRES[name]([Reply({"label": "ünï \U0001f600"}, piece=3, cut=cut)]) as server:
            return await raw_answer(server, name, stream=True), server.bill

    whole, bill = await answer(1_000_000)
    assert whole.endswith(b"\r\n0\r\n\r\n")
    for cut in (0, 1, 20, *range(100, len(whole), len(whole) // 30)):
        assert await answer(cut) == (whole[:cut], bill)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_body_may_end_early_and_http_finds_nothing_wrong(name: str, stream: bool) -> None:
    said = Reply({"label": "ünï"}, piece=3)
    async with WIRES[name]([said]) as server:
        whole, bill = (await post(server, name, stream=stream)).content, server.bill
    for end in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        async with WIRES[name]([replace(said, end=end)]) as server:
            assert (await post(server, name, stream=stream)).content == whole[:end]
            assert (server.bill, server.requests[0].status) == (bill, 200)


@pytest.mark.parametrize("name", WIRES)
async def test_a_stream_may_drip_and_is_billed_when_nobody_waits_for_it(name: str) -> None:
    async with WIRES[name](["hello", Reply("hello", drip=0.0001), Reply("hello", drip=9.0)]) as server:
        whole = await post(server, name, stream=True)
        dripped = await post(server, name, stream=True)
        assert dripped.content == re.sub(rb"(chatcmpl-|resp_|msg_|response-)0", rb"\g<1>1", whole.content)
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(server.url).port)
        writer.write(raw_request(name, stream=True))
        await reader.readexactly(1)  # and then it goes away
        writer.close()
    assert len({seen.charge for seen in server.requests}) == 1
    assert len(server.requests) == 3


@pytest.mark.parametrize("name", WIRES)
async def test_an_error_ends_a_stream_in_the_providers_form(name: str) -> None:
    async with WIRES[name]([Reply("abcdefgh", piece=2, fails=2, code="overloaded")]) as server:
        answer = await post(server, name, stream=True)
    assert "abcdefgh" not in answer.text
    last = json.loads(answer.text.strip().split("data: ")[-1])
    assert "overloaded" in json.dumps(last)
    assert ['"ab"' in answer.text, '"cd"' in answer.text, '"ef"' in answer.text] == [True, True, False]
    assert "[DONE]" not in answer.text


async def test_a_connection_serves_on_after_a_stream() -> None:
    async with serve_openai(["one", "two"]) as server, httpx2.AsyncClient() as client:
        for text in ("one", "two"):
            _, body, headers = request_of("openai", stream=True)
            answer = await client.post(f"{server.url}/chat/completions", content=body, headers=headers)
            assert text in answer.text
        assert server.connections == 1


@pytest.mark.parametrize("name", WIRES)
async def test_each_answer_has_an_id_and_the_headers_that_were_scripted(name: str) -> None:
    limits = {"retry-after": "7", "x-ratelimit-remaining-requests": "0"}
    async with WIRES[name](["a", "b", Reply(status=429, code="too_many", headers=limits)]) as server:
        first, second, third = [await post(server, name) for _ in range(3)]
    own = {"openai": "x-request-id", "responses": "x-request-id", "anthropic": "request-id"}
    ids = (
        [first.json()["responseId"], second.json()["responseId"]]
        if name == "google"
        else [answer.headers[own[name]] for answer in (first, second, third)]
    )
    assert len(set(ids)) == len(ids)
    if name == "anthropic":
        assert third.json()["request_id"] == ids[2]
    assert (third.status_code, third.json()["error"].get("code", 429)) == (429, 429 if name in KEYS else "too_many")
    assert {key: third.headers[key] for key in limits} == limits


@pytest.mark.parametrize("name", WIRES)
async def test_a_key_of_its_own_a_path_of_its_own_and_a_body_of_its_own(name: str) -> None:
    async with WIRES[name](["a"], api_key="right") as server:
        assert (await post(server, name, key="right")).status_code == 200
        assert (await post(server, name, key="wrong")).status_code == FORMATS[name].wrong_key[0]
        path, body, headers = request_of(name, key="right")
        host = f"http://{urlsplit(server.url).netloc}"
        async with httpx2.AsyncClient(headers=headers) as client:
            assert (await client.get(f"{host}{path}")).status_code == 404
            assert (await client.post(f"{host}/other", content=body)).status_code == 404
            assert (await client.post(f"{host}{path}", content=b"[]")).status_code == 400
    assert [seen.status for seen in server.requests] == [200, FORMATS[name].wrong_key[0], 404, 404, 400]
    assert server.bill == -(-server.requests[0].charge // 1_000_000)


async def test_google_finds_the_model_in_the_path() -> None:
    async with serve_google(["a"]) as server:
        body = request_of("google")[1]
        async with httpx2.AsyncClient() as client:
            for path in ("v1beta/models/gemini-9", "v1/models/org%2Fmy%20model"):
                answer = await client.post(f"{server.url}/{path}:generateContent", content=body)
                assert answer.status_code == 200
                assert answer.json()["modelVersion"] in ("gemini-9", "org/my model")
            no_sse = await client.post(f"{server.url}/v1beta/models/m:streamGenerateContent", content=body)
            assert no_sse.status_code == 404


async def test_thoughts_take_their_share_of_the_limit_first() -> None:
    async with serve_google([Reply("x" * 400, reasoning=6), Reply("x" * 400, reasoning=60)]) as server:
        limited = {"generationConfig": {"maxOutputTokens": 8}}
        first, second = [(await post(server, "google", **limited)).json() for _ in range(2)]
    assert first["candidates"][0] == {
        "content": {"parts": [{"text": "x" * 8}], "role": "model"},
        "index": 0,
        "finishReason": "MAX_TOKENS",
    }
    assert (first["usageMetadata"]["thoughtsTokenCount"], first["usageMetadata"]["candidatesTokenCount"]) == (6, 2)
    assert second["candidates"][0]["content"] == {"role": "model"}
    assert [seen.usage.output_tokens for seen in server.requests] == [8, 8]


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
