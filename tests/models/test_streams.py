"""An answer that comes as a stream is the same Answer, and one that does not come whole is none."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import plugins, wire
from apprentice.errors import ModelError, ModelRefused, OutcomeUnknown, OutOfMoney
from apprentice.testing.models import TASK
from apprentice.testing.servers import Reply, serve_anthropic, serve_google, serve_openai, serve_responses
from apprentice.types import Answer, Json, Model, Usage

DIALECTS: dict[str, tuple[dict[str, Json], Any]] = {
    "openai": ({"name": "openai"}, serve_openai),
    "openai responses": ({"name": "openai", "api": "responses"}, serve_responses),
    "anthropic": ({"name": "anthropic"}, serve_anthropic),
    "google": ({"name": "google"}, serve_google),
}


class Streaming:
    """A client that answers with one stream, whatever it is asked."""

    def __init__(self, body: bytes, **headers: str) -> None:
        self.body = body
        self._headers = {"content-type": "text/event-stream"} | headers

    async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
        leaving()
        return wire.Reply(200, self._headers, self.body)

    async def close(self) -> None:
        return None


def built(dialect: str, **settings: Any) -> Model:
    own = dict(DIALECTS[dialect][0])
    model: Model = plugins.build("models", own.pop("name"), model="m", **own, **settings)
    return model


def frames(events: list[Json], end: str = "\n") -> bytes:
    data = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {part}{end}{end}" for part in data).encode()


async def told(dialect: str, body: bytes, **headers: str) -> Answer:
    return await built(dialect, stream=True, client=Streaming(body, **headers)).answer(TASK, {"text": "x"})


async def failure(dialect: str, body: bytes) -> OutcomeUnknown:
    with pytest.raises(OutcomeUnknown) as caught:
        await told(dialect, body)
    return caught.value


async def cut_everywhere(dialect: str, body: bytes) -> AsyncIterator[OutcomeUnknown]:
    """What becomes of the stream, cut before each of its bytes."""
    client = Streaming(body)
    model = built(dialect, stream=True, client=client)
    for cut in range(len(body)):
        client.body = body[:cut]
        with pytest.raises(OutcomeUnknown) as caught:
            await model.answer(TASK, {"text": "x"})
        yield caught.value


# --- one answer of each format, event by event ------------------------------------------------------------------------


def chunk(content: Json, reason: Json = None, index: int = 0, **more: Json) -> dict[str, Json]:
    delta = {"content": content} if content is not None else {}
    return {"id": "c-1", "model": "m-1", "choices": [{"index": index, "delta": delta, "finish_reason": reason}]} | more


def block(index: int, kind: str, **more: Json) -> list[Json]:
    """A block of Anthropic's, its start and one piece."""
    start, piece, name = {
        "text": ({"type": "text", "text": ""}, "text_delta", "text"),
        "tool": ({"type": "tool_use", "id": "t", "name": "label", "input": {}}, "input_json_delta", "partial_json"),
        "thinking": ({"type": "thinking", "thinking": ""}, "thinking_delta", "thinking"),
    }[kind]
    said = [
        {"type": "content_block_delta", "index": index, "delta": {"type": piece, name: part}} for part in more["said"]
    ]
    return [{"type": "content_block_start", "index": index, "content_block": start}, *said]


CHAT_USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
CHAT: list[Json] = [chunk(""), chunk('{"label"'), chunk(': "ham"}'), chunk(None, "stop"), "[DONE]"]
MESSAGE_START: Json = {
    "type": "message_start",
    "message": {"id": "msg_1", "model": "m-1", "content": [], "usage": {"input_tokens": 10, "output_tokens": 1}},
}
MESSAGE_DELTA: Json = {
    "type": "message_delta",
    "delta": {"stop_reason": "tool_use"},
    "usage": {"output_tokens": 5, "input_tokens": None},
}
MESSAGE_STOP: Json = {"type": "message_stop"}
MESSAGES: list[Json] = [
    MESSAGE_START,
    *block(0, "tool", said=['{"label"', ': "ham"}']),
    {"type": "content_block_stop", "index": 0},
    MESSAGE_DELTA,
    MESSAGE_STOP,
]
RESPONSE: dict[str, Json] = {"id": "resp_1", "model": "m-1", "status": "in_progress", "error": None, "output": []}
COMPLETED: dict[str, Json] = RESPONSE | {
    "status": "completed",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": '{"label": "ham"}'}]}],
    "usage": {"input_tokens": 10, "output_tokens": 5},
}
RESPONSES: list[Json] = [
    {"type": "response.created", "response": RESPONSE},
    {"type": "response.output_text.delta", "delta": '{"label": "ham"}'},
    {"type": "response.completed", "response": COMPLETED},
]


def part(text: str, reason: Json = None, index: int = 0, **more: Json) -> dict[str, Json]:
    found = {"content": {"parts": [{"text": text}]}, "index": index}
    named = {"modelVersion": "m-1", "responseId": "r-1", "usageMetadata": {"promptTokenCount": 10}}
    return named | {"candidates": [found | ({"finishReason": reason} if reason else {})]} | more


GOOGLE_USAGE = {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15}
GOOGLE: list[Json] = [part('{"label"'), part(': "ham"}'), part("", "STOP", usageMetadata=GOOGLE_USAGE)]
WHOLE: dict[str, list[Json]] = {
    "openai": [*CHAT[:-1], {"id": "c-1", "choices": [], "usage": CHAT_USAGE}, "[DONE]"],
    "openai responses": RESPONSES,
    "anthropic": MESSAGES,
    "google": GOOGLE,
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("dialect", WHOLE)
async def test_a_stream_is_read_whatever_its_line_ends_and_comments(dialect: str, end: str) -> None:  # F50
    body = b"\xef\xbb\xbf: hello" + end.encode() * 2 + frames(WHOLE[dialect], end) + b": bye"
    answer = await told(dialect, body)
    assert (answer.output, answer.model, answer.problem) == ({"label": "ham"}, "m-1", None)
    assert answer.usage == Usage(input_tokens=10, output_tokens=5)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("dialect", WHOLE)
async def test_a_stream_cut_at_any_byte_is_unknown_and_has_no_usage(dialect: str, end: str) -> None:
    async for error in cut_everywhere(dialect, frames(WHOLE[dialect], end)):
        assert (error.outcome, error.usage, error.retryable) == ("unknown", None, True)
        assert '{"label":"ham"}'.startswith(error.text.replace(" ", "")), "what was said until then is kept"


class Keeping:
    """A client that keeps the bytes of the last answer."""

    def __init__(self) -> None:
        self.body = b""
        self._client = wire.client(allow_internal=True)

    async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
        reply = await self._client.exchange(request, leaving)
        self.body = reply.body
        return reply

    async def close(self) -> None:
        await self._client.close()


@pytest.mark.parametrize("finish", ["complete", "truncated", "refused"])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_servers_stream_cut_at_any_byte_is_unknown(dialect: str, finish: Any) -> None:
    client = Keeping()
    async with DIALECTS[dialect][1]([Reply({"label": "hämatit"}, finish=finish, piece=8)]) as server:
        model = built(dialect, stream=True, client=client, base_url=server.url, allow_internal=True)
        try:
            await model.answer(TASK, {"text": "x"})
        except ModelRefused:
            assert finish == "refused"
    await client.close()
    assert client.body.endswith(b"\n")
    async for error in cut_everywhere(dialect, client.body):
        assert (error.outcome, error.usage) == ("unknown", None)


@pytest.mark.parametrize("dialect", WHOLE)
async def test_a_stream_without_any_one_of_its_last_events_is_never_an_answer(dialect: str) -> None:
    last = {"openai": 3, "openai responses": 1, "anthropic": 2, "google": 1}[dialect]
    for missing in range(1, last + 1):
        events = [event for number, event in enumerate(reversed(WHOLE[dialect]), 1) if number != missing][::-1]
        if (
            dialect == "openai" and missing == 2
        ):  # only the usage is missing: the answer is whole, its bill is not known
            assert (await told(dialect, frames(events))).usage is None
        else:
            assert (await failure(dialect, frames(events))).usage is None


async def test_only_the_first_of_interleaved_choices_counts() -> None:  # F50
    chat = [chunk('{"label"'), chunk("other", index=1), chunk(': "ham"}'), chunk(None, "stop", index=1)]
    assert (await failure("openai", frames([*chat, "[DONE]"]))).text == '{"label": "ham"}'
    assert (await told("openai", frames([*chat, chunk(None, "stop"), "[DONE]"]))).output == {"label": "ham"}
    parts = [part('{"label"'), part("other", "STOP", index=1), part(': "ham"}')]
    assert (await failure("google", frames(parts))).text == '{"label": "ham"}'
    assert (await told("google", frames([*parts, part("", "STOP")]))).output == {"label": "ham"}


async def test_interleaved_blocks_are_put_together_by_their_index() -> None:  # F50
    thinking, text = block(0, "thinking", said=["hm", "m"]), block(1, "text", said=["Let ", "me see."])
    tool = block(2, "tool", said=['{"label"', ': "ham"}'])
    mixed = [event for group in zip(thinking, text, tool, strict=True) for event in group]
    answer = await told("anthropic", frames([MESSAGE_START, *mixed, MESSAGE_DELTA, MESSAGE_STOP]))
    assert answer.output == {"label": "ham"}
    assert answer.usage == Usage(input_tokens=10, output_tokens=5)


async def test_a_usage_after_the_end_still_counts() -> None:  # F50
    body = frames([*CHAT, {"choices": [], "usage": CHAT_USAGE}])
    assert (await told("openai", body)).usage == Usage(input_tokens=10, output_tokens=5)


async def test_a_usage_that_grows_from_event_to_event_counts_at_the_end_only() -> None:
    grown = CHAT_USAGE | {"completion_tokens": 1, "total_tokens": 11}
    events = [chunk('{"label": "ham"}', usage=grown), chunk(None, "stop", usage=CHAT_USAGE), "[DONE]"]
    assert (await told("openai", frames(events))).usage == Usage(input_tokens=10, output_tokens=5)
    assert (await failure("openai", frames([events[0], {"error": {"code": "x"}}]))).usage is None


@pytest.mark.parametrize(
    ("dialect", "events", "error"),
    [
        ("openai", [*CHAT[:-1], {"choices": [], "usage": CHAT_USAGE}], {"error": {"code": "server_error"}}),
        ("anthropic", MESSAGES[:-1], {"type": "error", "error": {"type": "server_error"}}),
        ("google", GOOGLE, {"error": {"code": 500, "status": "server_error"}}),
        (
            "openai responses",
            RESPONSES[:-1],
            {"type": "response.failed", "response": COMPLETED | {"error": {"code": "server_error"}}},
        ),
    ],
)
async def test_an_error_within_a_stream_books_the_usage_that_was_told(
    dialect: str, events: list[Json], error: Json
) -> None:  # F48
    found = await failure(dialect, frames([*events, error, *WHOLE[dialect]]))
    assert (found.outcome, found.retryable) == ("answered", True)
    assert found.usage == Usage(input_tokens=10, output_tokens=5)
    assert json.loads(found.text) == {"label": "ham"}
    assert "server_error" in str(found)


async def test_counts_before_the_end_are_not_the_bill() -> None:
    """A message's first count is of one token, and Google's grow from event to event: booking them would be too little."""
    start = [MESSAGE_START, *block(0, "tool", said=['{"label"'])]
    parts = [part('{"label"', usageMetadata=GOOGLE_USAGE)]
    for dialect, events in (("anthropic", start), ("google", parts)):
        found = await failure(dialect, frames([*events, {"error": {"type": "overloaded_error"}}]))
        assert (found.outcome, found.usage, found.text) == ("unknown", None, '{"label"')


async def test_an_account_without_money_is_told_within_a_stream_too() -> None:  # F45
    with pytest.raises(OutOfMoney) as caught:
        await told("openai", frames([chunk("{"), {"error": {"code": "insufficient_quota"}}]))
    assert (caught.value.outcome, caught.value.retryable, caught.value.text) == ("unknown", False, "{")


async def test_a_stream_that_is_no_json_is_unknown() -> None:
    for broken in ("{", "[]", "DONE", '{"a": NaN}'):
        assert (await failure("openai", frames([CHAT[0], broken, *CHAT[1:]]))).outcome == "unknown"
    assert (await failure("openai", frames(CHAT).replace(b"ham", b"h\xffm"))).outcome == "unknown"


async def test_a_server_that_does_not_stream_is_understood_all_the_same() -> None:
    whole = {"model": "m-1", "choices": [{"message": {"content": '{"label": "ham"}'}, "finish_reason": "stop"}]}
    media = {"content-type": "application/json"}
    assert (await told("openai", json.dumps(whole).encode(), **media)).output == {"label": "ham"}


async def test_the_input_of_a_tool_that_is_no_json_is_kept_as_it_came_and_flagged() -> None:  # F62
    for said in ('{"label": "ha', '{"label": __import__("os")}', '{"label": NaN}', '{"label": 1e999}'):
        body = frames([MESSAGE_START, *block(0, "tool", said=[said[:5], said[5:]]), MESSAGE_DELTA, MESSAGE_STOP])
        answer = await told("anthropic", body)
        assert (answer.output, answer.text, answer.problem) == (None, said, "the answer is not JSON")
        assert answer.usage == Usage(input_tokens=10, output_tokens=5)


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"label": "ünï \U0001f600 \u2028"}),
        Reply("I would rather talk about it."),
        Reply(""),
        Reply('{"label": "ham"}'),
        Reply('{"label": "ha', finish="truncated"),
        Reply("I cannot.", finish="refused"),
        Reply("half", finish="filtered"),
        Reply("", finish="filtered"),
    ],
    ids=lambda reply: f"{reply.content}-{reply.finish}",
)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_says_what_the_same_answer_says_in_one_piece(dialect: str, reply: Reply) -> None:  # F54
    found: list[Any] = []
    usage = Usage(input_tokens=30, output_tokens=4, cached_tokens=20)
    sent = Reply(reply.content, finish=reply.finish, usage=usage, model="m-2026", piece=3)
    async with DIALECTS[dialect][1]([sent]) as server:
        for stream in (False, True):
            model = built(dialect, stream=stream, base_url=server.url, allow_internal=True)
            try:
                answer = await model.answer(TASK, {"text": "x"})
                assert answer.provider_request_id
                found.append(answer.model_copy(update={"latency": 0.0, "provider_request_id": ""}))
            except ModelRefused as error:
                found.append((error.outcome, error.usage, error.text))
            await model.close()
    assert found[0] == found[1]
    assert "stream" not in json.dumps(server.requests[0].body) + server.requests[0].path
    assert "stream" in json.dumps(server.requests[1].body) + server.requests[1].path


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data(), dialect=st.sampled_from(sorted(WHOLE)))
async def test_whatever_comes_is_an_answer_or_an_error_of_ours(data: st.DataObject, dialect: str) -> None:
    def bend(value: Json) -> Json:
        """The value with any part of it replaced by anything."""
        if data.draw(st.integers(0, 9)) == 0:
            return data.draw(JSON)
        if isinstance(value, dict):
            return {key: bend(inner) for key, inner in value.items()}
        return [bend(inner) for inner in value] if isinstance(value, list) else value

    body = frames([event if event == "[DONE]" else bend(event) for event in WHOLE[dialect]])
    try:
        answer = await told(dialect, body)
    except ModelError as error:
        assert error.outcome in ("answered", "answered_no_usage", "unknown")
    else:
        answer.model_dump_json()
        assert answer.output is None or answer.problem is None


# --- what is told beside the answer -----------------------------------------------------------------------------------


async def test_an_error_names_the_attempt_as_the_provider_does() -> None:
    async with serve_anthropic([Reply(status=500, code="api_error")]) as server:
        model = built("anthropic", base_url=server.url, allow_internal=True)
        with pytest.raises(OutcomeUnknown, match=r"^anthropic/m \(request req_0\): 500 api_error"):
            await model.answer(TASK, {"text": "x"})
        await model.close()
    assert "(request resp_1)" in str(await failure("openai responses", frames(RESPONSES[:2])))
    assert "(request r-1)" in str(await failure("google", frames(GOOGLE[:1])))


async def test_a_model_knows_how_long_the_rate_limits_ask_it_to_wait() -> None:
    spent = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}
    few = {"x-ratelimit-remaining-tokens": "99", "x-ratelimit-reset-tokens": "60s"}
    error = {"error": {"code": "rate_limit_exceeded"}}
    async with serve_openai(
        [
            Reply({"label": "ham"}, headers=spent),
            Reply({"label": "ham"}, headers=few),
            Reply(status=429, raw=json.dumps(error).encode(), headers=spent),
            Reply({"label": "ham"}),
        ]
    ) as server:
        model: Any = built("openai", base_url=server.url, allow_internal=True, max_tokens=100)
        assert model.pause() == 0
        await model.answer(TASK, {"text": "x"})
        assert 60 < model.pause() <= 360
        await model.answer(TASK, {"text": "x"})
        assert 0 < model.pause() <= 60
        with pytest.raises(ModelError) as caught:
            await model.answer(TASK, {"text": "x"})
        assert caught.value.retry_after == 360
        assert 60 < model.pause() <= 360
        await model.answer(TASK, {"text": "x"})
        assert model.pause() == 0
        await model.close()
