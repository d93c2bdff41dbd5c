"""The official SDKs as clients of the loopback servers: what they read is what was scripted and what was billed.

So the servers speak what the providers speak, as far as the providers' own clients can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Literal

import anthropic
import httpx2
import openai
import pytest
from google import genai
from google.genai import errors as google_errors
from google.genai import types as google
from pydantic import BaseModel

from apprentice.testing.servers import (
    Reply,
    Server,
    serve_anthropic,
    serve_google,
    serve_openai,
    serve_responses,
)
from apprentice.types import Json

HI: Any = [{"role": "user", "content": "hi"}]
LONG = "a text of äöü and \U0001f600 in several pieces\n\ndata: x\u2028"
TOOL: Any = {"name": "label", "description": "d", "input_schema": {"type": "object", "properties": {}}}


class Label(BaseModel):
    """What a structured answer is read into."""

    label: Literal["spam", "ham"]


@contextlib.asynccontextmanager
async def openai_client(serve: Any, *replies: Json | Reply) -> AsyncIterator[tuple[Server, openai.AsyncOpenAI]]:
    async with (
        serve(list(replies), api_key="right") as server,
        openai.AsyncOpenAI(api_key="right", base_url=server.url, max_retries=0) as client,
    ):
        yield server, client


@contextlib.asynccontextmanager
async def anthropic_client(*replies: Json | Reply) -> AsyncIterator[tuple[Server, anthropic.AsyncAnthropic]]:
    async with (
        serve_anthropic(list(replies), api_key="right") as server,
        anthropic.AsyncAnthropic(api_key="right", base_url=server.url, max_retries=0) as client,
    ):
        yield server, client


@contextlib.asynccontextmanager
async def google_client(*replies: Json | Reply) -> AsyncIterator[tuple[Server, Any]]:
    async with serve_google(list(replies), api_key="right") as server:
        client = genai.Client(api_key="right", http_options=google.HttpOptions(base_url=server.url))
        try:
            yield server, client.aio.models
        finally:
            await client.aio.aclose()
            client.close()


async def into(got: list[Any], stream: AsyncIterator[Any]) -> None:
    """Everything that the stream gives, also when it ends in an error."""
    async for part in stream:
        got.append(part)  # noqa: PERF401  (an error would lose what an `extend` has taken)


def counted(server: Server) -> tuple[int, int, int, int]:
    usage = server.requests[-1].usage
    return usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens


async def test_the_clients_without_asyncio_are_served_as_well() -> None:
    def ask_openai(url: str) -> list[str | None]:
        with openai.OpenAI(api_key="k", base_url=url) as client:
            whole = client.chat.completions.create(model="m", messages=HI)
            stream = client.chat.completions.create(model="m", messages=HI, stream=True)
            return [whole.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in stream)]

    def ask_anthropic(url: str) -> list[str | None]:
        with anthropic.Anthropic(api_key="k", base_url=url) as client:
            whole: Any = client.messages.create(model="m", max_tokens=99, messages=HI)
            with client.messages.stream(model="m", max_tokens=99, messages=HI) as stream:
                return [whole.content[0].text, stream.get_final_text()]

    def ask_google(url: str) -> list[str | None]:
        with genai.Client(api_key="k", http_options=google.HttpOptions(base_url=url)) as client:
            whole = client.models.generate_content(model="m", contents="hi")
            stream = client.models.generate_content_stream(model="m", contents="hi")
            return [whole.text, "".join(part.text or "" for part in stream)]

    asking: list[tuple[Any, Any]] = [
        (serve_openai, ask_openai),
        (serve_anthropic, ask_anthropic),
        (serve_google, ask_google),
    ]
    for serve, ask in asking:
        async with serve([LONG]) as server:
            assert await asyncio.to_thread(ask, server.url) == [LONG, LONG]
            assert len(server.requests) == 2


async def test_a_client_that_tries_again_by_itself_shows_in_the_requests_and_pays_once() -> None:
    busy = Reply(status=429, code="rate_limit_exceeded", headers={"retry-after-ms": "1"})
    async with (
        serve_openai([busy, "a"]) as server,
        openai.AsyncOpenAI(api_key="k", base_url=server.url, max_retries=1) as client,
    ):
        await client.chat.completions.create(model="m", messages=HI)
    assert [(seen.status, seen.charge > 0) for seen in server.requests] == [(429, False), (200, True)]


# --- OpenAI, chat completions -----------------------------------------------------------------------------------------


def chat_usage(usage: Any) -> tuple[int, int, int, int]:
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens_details.cached_tokens,
        usage.completion_tokens_details.reasoning_tokens,
    )


async def test_openai_reads_a_chat_completion() -> None:
    async with openai_client(serve_openai, Reply(LONG, cached=3, reasoning=2), "b") as (server, client):
        answer = await client.chat.completions.create(model="gpt", messages=HI)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (LONG, "stop")
        assert (answer.model, answer.object, answer._request_id) == ("gpt", "chat.completion", "req_0")
        assert chat_usage(answer.usage) == counted(server)
        assert counted(server)[2:] == (3, 2)
        again = await client.chat.completions.create(model="gpt", messages=HI)
        assert again.id != answer.id


async def test_openai_parses_structured_output_and_a_refusal() -> None:
    replies = [{"label": "spam"}, Reply("I will not.", finish="refused"), Reply({"label": "ham"}, finish="truncated")]
    async with openai_client(serve_openai, *replies) as (server, client):
        answer = await client.chat.completions.parse(model="gpt", messages=HI, response_format=Label)
        assert answer.choices[0].message.parsed == Label(label="spam")
        refused = await client.chat.completions.parse(model="gpt", messages=HI, response_format=Label)
        assert (refused.choices[0].message.refusal, refused.choices[0].message.content) == ("I will not.", None)
        with pytest.raises(openai.LengthFinishReasonError) as cut:
            await client.chat.completions.parse(model="gpt", messages=HI, response_format=Label)
        assert cut.value.completion.usage is not None
        assert len(server.requests) == 3


async def test_openai_reads_a_chat_stream_with_its_usage_at_the_end() -> None:
    async with openai_client(serve_openai, Reply(LONG, piece=5, cached=1)) as (server, client):
        stream = await client.chat.completions.create(
            model="gpt", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
        assert "".join(texts) == LONG
        assert len(texts) == -(-len(LONG) // 5)
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
        assert chunks[-1].choices == []
        assert chat_usage(chunks[-1].usage) == counted(server)
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        uncounted = [
            chunk async for chunk in await client.chat.completions.create(model="gpt", messages=HI, stream=True)
        ]
        assert not any(chunk.usage for chunk in uncounted)


async def test_openai_streams_structured_output_and_a_refusal() -> None:
    replies = [Reply({"label": "ham"}, piece=3), Reply("I will not.", finish="refused", piece=3)]
    async with openai_client(serve_openai, *replies) as (_, client):
        async with client.chat.completions.stream(model="gpt", messages=HI, response_format=Label) as stream:
            deltas = [event.delta async for event in stream if event.type == "content.delta"]
            answer = await stream.get_final_completion()
        assert answer.choices[0].message.parsed == Label(label="ham")
        assert "".join(deltas) == '{"label": "ham"}'
        async with client.chat.completions.stream(model="gpt", messages=HI, response_format=Label) as stream:
            answer = await stream.get_final_completion()
        assert (answer.choices[0].message.refusal, answer.choices[0].message.parsed) == ("I will not.", None)


# --- OpenAI, responses ------------------------------------------------------------------------------------------------


def response_usage(usage: Any) -> tuple[int, int, int, int]:
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    return (
        usage.input_tokens,
        usage.output_tokens,
        usage.input_tokens_details.cached_tokens,
        usage.output_tokens_details.reasoning_tokens,
    )


async def test_openai_reads_a_response() -> None:
    async with openai_client(serve_responses, Reply(LONG, cached=3, reasoning=2), "x" * 999) as (server, client):
        answer = await client.responses.create(model="gpt", input="hi", instructions="be kind")
        assert (answer.output_text, answer.status, answer.model) == (LONG, "completed", "gpt")
        assert [item.type for item in answer.output] == ["reasoning", "message"]
        assert (answer.instructions, answer._request_id) == ("be kind", "req_0")
        assert response_usage(answer.usage) == counted(server)
        assert counted(server)[2:] == (3, 2)
        cut = await client.responses.create(model="gpt", input=HI, max_output_tokens=16)
        assert cut.status == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"
        assert cut.usage is not None
        assert (cut.usage.output_tokens, cut.output_text) == (16, "x" * 64)


async def test_openai_parses_a_structured_response_and_a_refusal() -> None:
    async with openai_client(serve_responses, {"label": "spam"}, Reply("I will not.", finish="refused")) as (_, client):
        answer = await client.responses.parse(model="gpt", input="hi", text_format=Label)
        assert answer.output_parsed == Label(label="spam")
        refused = await client.responses.parse(model="gpt", input="hi", text_format=Label)
        assert (refused.output_parsed, refused.output_text) == (None, "")
        parts = [part for item in refused.output if item.type == "message" for part in item.content]
        assert [part.refusal for part in parts if part.type == "refusal"] == ["I will not."]


@pytest.mark.parametrize(
    ("finish", "kind", "end"),
    [
        ("complete", "output_text", "completed"),
        ("refused", "refusal", "completed"),
        ("truncated", "output_text", "incomplete"),
        ("filtered", "output_text", "incomplete"),
    ],
)
async def test_openai_reads_the_events_of_a_response(finish: Any, kind: str, end: str) -> None:
    async with openai_client(serve_responses, Reply(LONG, finish=finish, piece=9, reasoning=1)) as (server, client):
        events: list[Any] = [e async for e in await client.responses.create(model="gpt", input="hi", stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == f"response.{kind}.delta") == LONG
    assert [event.type for event in events if ".delta" not in event.type] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        f"response.{kind}.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{end}",
    ]
    assert events[-1].response.status == end
    assert response_usage(events[-1].response.usage) == counted(server)


async def test_openai_puts_a_streamed_response_together() -> None:
    async with openai_client(serve_responses, Reply({"label": "ham"}, piece=4)) as (server, client):
        async with client.responses.stream(model="gpt", input="hi", text_format=Label) as stream:
            answer = await stream.get_final_response()
        assert answer.output_parsed == Label(label="ham")
        assert response_usage(answer.usage) == counted(server)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
async def test_openai_knows_the_errors_by_status(status: int, kind: type[openai.APIStatusError]) -> None:
    limits = {"x-ratelimit-remaining-tokens": "0", "retry-after-ms": "70"}
    reply = Reply(status=status, code="a_code", headers=limits)
    async with openai_client(serve_openai, reply) as (server, client):
        with pytest.raises(kind) as chat:
            await client.chat.completions.create(model="gpt", messages=HI, stream=True)
        assert server.bill == 0
    async with openai_client(serve_responses, reply) as (_, client):
        with pytest.raises(kind) as response:
            await client.responses.create(model="gpt", input="hi")
    for error in (chat.value, response.value):
        assert (error.status_code, error.code, error.request_id) == (status, "a_code", "req_0")
        assert {name: error.response.headers[name] for name in limits} == limits


@pytest.mark.parametrize("serve", [serve_openai, serve_responses])
async def test_openai_is_turned_away_with_a_wrong_key_and_a_wrong_path(serve: Any) -> None:
    async with openai_client(serve, "x") as (_, client):
        other = client.with_options(api_key="wrong")
        with pytest.raises(openai.AuthenticationError):
            await (
                other.chat.completions.create(model="m", messages=HI)
                if serve is serve_openai
                else other.responses.create(model="m", input="hi")
            )
        with pytest.raises(openai.NotFoundError):
            await client.models.list()


async def test_openai_meets_an_error_within_a_stream_and_a_cut() -> None:
    broken = Reply(LONG, piece=4, fails=3, code="server_error")
    async with openai_client(serve_openai, broken, Reply(LONG, piece=4, cut=1500)) as (server, client):
        got: list[Any] = []
        with pytest.raises(openai.APIError) as error:
            await into(got, await client.chat.completions.create(model="gpt", messages=HI, stream=True))
        assert "".join(chunk.choices[0].delta.content for chunk in got) == LONG[:12]
        assert error.value.code == "server_error"
        with pytest.raises(openai.APIConnectionError):
            await into(got, await client.chat.completions.create(model="gpt", messages=HI, stream=True))
        assert server.requests[0].charge == server.requests[1].charge > 0
    async with openai_client(serve_responses, broken) as (_, client):
        events: list[Any] = [e async for e in await client.responses.create(model="gpt", input="hi", stream=True)]
        assert (events[-1].type, events[-1].code) == ("error", "server_error")


# --- Anthropic --------------------------------------------------------------------------------------------------------


def message_usage(usage: Any) -> tuple[int, int, int]:
    read = usage.cache_read_input_tokens
    return usage.input_tokens + read + usage.cache_creation_input_tokens, usage.output_tokens, read


async def test_anthropic_reads_a_message() -> None:
    replies = [Reply(LONG, cached=3, model="claude-1"), Reply("no", finish="refused"), "x" * 999]
    async with anthropic_client(*replies) as (server, client):
        answer = await client.messages.create(model="claude", max_tokens=99, messages=HI)
        assert answer.content[0].type == "text"
        assert (answer.content[0].text, answer.stop_reason, answer.model) == (LONG, "end_turn", "claude-1")
        assert answer._request_id == "req_0"
        assert message_usage(answer.usage) == counted(server)[:3]
        refused = await client.messages.create(model="claude", max_tokens=99, messages=HI)
        assert (refused.stop_reason, refused.stop_details and refused.stop_details.type) == ("refusal", "refusal")
        cut = await client.messages.create(model="claude", max_tokens=4, messages=HI)
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 4)


async def test_anthropic_reads_a_tool_use_whole_and_streamed() -> None:
    async with anthropic_client(Reply({"label": "ünï"}, piece=3)) as (server, client):
        answer = await client.messages.create(model="claude", max_tokens=99, messages=HI, tools=[TOOL])
        async with client.messages.stream(model="claude", max_tokens=99, messages=HI, tools=[TOOL]) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_message()
        assert kinds.count("input_json") == 6
        for message in (answer, streamed):
            assert message.stop_reason == "tool_use"
            assert message.content[0].type == "tool_use"
            assert (message.content[0].name, message.content[0].input) == ("label", {"label": "ünï"})
        assert message_usage(streamed.usage) == counted(server)[:3]


async def test_anthropic_parses_structured_output() -> None:
    async with anthropic_client({"label": "ham"}) as (_, client):
        answer = await client.messages.parse(model="claude", max_tokens=99, messages=HI, output_format=Label)
        assert answer.parsed_output == Label(label="ham")


async def test_anthropic_reads_a_stream_with_usage_at_both_ends() -> None:
    async with anthropic_client(Reply(LONG, piece=5, cached=2)) as (server, client):
        async with client.messages.stream(model="claude", max_tokens=99, messages=HI) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            answer = await stream.get_final_message()
        assert (text, answer.stop_reason) == (LONG, "end_turn")
        assert message_usage(answer.usage) == counted(server)[:3]
        raw: Any = await client.messages.create(model="claude", max_tokens=99, messages=HI, stream=True)
        events = [event async for event in raw]
        assert message_usage(events[0].message.usage)[::2] == counted(server)[:3:2]
        assert events[-2].usage.output_tokens == counted(server)[1]
        assert [event.type for event in events if event.type != "content_block_delta"] == [
            "message_start",
            "content_block_start",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request_error", anthropic.BadRequestError),
        (401, "authentication_error", anthropic.AuthenticationError),
        (403, "permission_error", anthropic.PermissionDeniedError),
        (404, "not_found_error", anthropic.NotFoundError),
        (429, "rate_limit_error", anthropic.RateLimitError),
        (500, "api_error", anthropic.InternalServerError),
        (529, "overloaded_error", anthropic.InternalServerError),
    ],
)
async def test_anthropic_knows_the_errors_by_status(
    status: int, code: str, kind: type[anthropic.APIStatusError]
) -> None:
    limits = {"anthropic-ratelimit-requests-remaining": "0", "retry-after": "7"}
    async with anthropic_client(Reply(status=status, code=code, headers=limits)) as (server, client):
        with pytest.raises(kind) as raised:
            await client.messages.create(model="claude", max_tokens=9, messages=HI)
        error: Any = raised.value
        assert (error.status_code, error.body["error"]["type"], error.request_id) == (status, code, "req_0")
        assert {name: error.response.headers[name] for name in limits} == limits
        with pytest.raises(anthropic.AuthenticationError):
            await client.with_options(api_key="wrong").messages.create(model="claude", max_tokens=9, messages=HI)
        assert server.bill == 0


async def test_anthropic_meets_an_error_within_a_stream_and_a_cut() -> None:
    replies = [Reply(LONG, piece=4, fails=3, code="overloaded_error"), Reply(LONG, piece=4, cut=1500)]
    async with anthropic_client(*replies) as (server, client):
        got: list[str] = []
        with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
            async with client.messages.stream(model="claude", max_tokens=99, messages=HI) as stream:
                await into(got, stream.text_stream)
        assert "".join(got) == LONG[:12]
        with pytest.raises(httpx2.RemoteProtocolError):  # this SDK has no error of its own for it
            async with client.messages.stream(model="claude", max_tokens=99, messages=HI) as stream:
                await stream.get_final_message()
        assert server.requests[0].charge == server.requests[1].charge > 0


# --- Google -----------------------------------------------------------------------------------------------------------


def google_usage(usage: Any) -> tuple[int, int, int, int]:
    assert usage.total_token_count == usage.prompt_token_count + (usage.candidates_token_count or 0) + (
        usage.thoughts_token_count or 0
    )
    thoughts = usage.thoughts_token_count or 0
    said = (usage.candidates_token_count or 0) + thoughts
    return usage.prompt_token_count, said, usage.cached_content_token_count or 0, thoughts


async def test_google_reads_an_answer() -> None:
    replies = [Reply(LONG, cached=3, reasoning=2), Reply("my number is", finish="filtered", code="SPII"), "x" * 999]
    async with google_client(*replies) as (server, models):
        answer = await models.generate_content(model="gemini-9", contents="hi")
        assert (answer.text, answer.candidates[0].finish_reason) == (LONG, google.FinishReason.STOP)
        assert (answer.model_version, answer.response_id) == ("gemini-9", "response-0")
        assert google_usage(answer.usage_metadata) == counted(server)
        assert counted(server)[2:] == (3, 2)
        stopped = await models.generate_content(model="gemini-9", contents="hi")
        assert stopped.candidates[0].finish_reason == google.FinishReason.SPII
        config = google.GenerateContentConfig(max_output_tokens=4)
        cut = await models.generate_content(model="gemini-9", contents="hi", config=config)
        assert (cut.text, cut.candidates[0].finish_reason) == ("x" * 16, google.FinishReason.MAX_TOKENS)


@pytest.mark.parametrize("schema", [{"response_schema": Label}, {"response_json_schema": Label.model_json_schema()}])
async def test_google_parses_structured_output(schema: dict[str, Any]) -> None:
    config = google.GenerateContentConfig(response_mime_type="application/json", **schema)
    async with google_client({"label": "spam"}) as (_, models):
        answer = await models.generate_content(model="gemini-9", contents="hi", config=config)
        assert Label.model_validate(answer.parsed) == Label(label="spam")


async def test_google_reads_a_blocked_prompt_whole_and_streamed() -> None:
    async with google_client(Reply("", finish="filtered", code="PROHIBITED_CONTENT")) as (server, models):
        whole = await models.generate_content(model="gemini-9", contents="hi")
        (streamed,) = [part async for part in await models.generate_content_stream(model="gemini-9", contents="hi")]
        for answer in (whole, streamed):
            assert answer.candidates is None
            assert answer.prompt_feedback.block_reason == google.BlockedReason.PROHIBITED_CONTENT
            assert google_usage(answer.usage_metadata) == counted(server)


async def test_google_reads_a_stream() -> None:
    async with google_client(Reply(LONG, piece=5, cached=1, reasoning=2)) as (server, models):
        parts = [part async for part in await models.generate_content_stream(model="gemini-9", contents="hi")]
        assert "".join(part.text for part in parts) == LONG
        assert len(parts) == -(-len(LONG) // 5) + 1
        assert parts[-1].candidates[0].finish_reason == google.FinishReason.STOP
        assert [part.candidates[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert google_usage(parts[-1].usage_metadata) == counted(server)
        assert {part.usage_metadata.prompt_token_count for part in parts} == {counted(server)[0]}


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "INVALID_ARGUMENT", google_errors.ClientError),
        (403, "PERMISSION_DENIED", google_errors.ClientError),
        (404, "NOT_FOUND", google_errors.ClientError),
        (429, "RESOURCE_EXHAUSTED", google_errors.ClientError),
        (500, "INTERNAL", google_errors.ServerError),
        (503, "UNAVAILABLE", google_errors.ServerError),
    ],
)
async def test_google_knows_the_errors_by_status(status: int, code: str, kind: type[google_errors.APIError]) -> None:
    async with google_client(Reply(status=status, code=code)) as (server, models):
        with pytest.raises(kind) as whole:
            await models.generate_content(model="gemini-9", contents="hi")
        with pytest.raises(kind) as streamed:
            async for _ in await models.generate_content_stream(model="gemini-9", contents="hi"):
                raise AssertionError("an error has no parts")
        assert server.bill == 0
    for error in (whole.value, streamed.value):
        assert (error.code, error.status) == (status, code)


async def test_google_is_turned_away_with_a_wrong_key() -> None:
    async with serve_google(["x"], api_key="right") as server:
        client = genai.Client(api_key="wrong", http_options=google.HttpOptions(base_url=server.url))
        with pytest.raises(google_errors.ClientError) as error:
            await client.aio.models.generate_content(model="gemini-9", contents="hi")
        await client.aio.aclose()
        client.close()
        assert (error.value.code, error.value.status) == (400, "INVALID_ARGUMENT")


async def test_google_meets_an_error_within_a_stream_and_a_cut() -> None:
    replies = [Reply(LONG, piece=4, fails=3, code="UNAVAILABLE"), Reply(LONG, piece=4, cut=900)]
    async with google_client(*replies) as (server, models):
        got: list[Any] = []
        with pytest.raises(google_errors.ServerError, match="503 UNAVAILABLE"):
            await into(got, await models.generate_content_stream(model="gemini-9", contents="hi"))
        assert "".join(part.text for part in got) == LONG[:12]
        with pytest.raises(httpx2.RemoteProtocolError):  # this SDK has no error of its own for it
            await into(got, await models.generate_content_stream(model="gemini-9", contents="hi"))
        assert server.requests[0].charge == server.requests[1].charge > 0
