"""The four wire formats as values: a stream says what the whole answer says, and no request is taken that is none."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.testing.formats import FORMATS, Said, asked, text_of
from apprentice.types import FinishState, Json, Usage

NAMES = list(FORMATS)
SCHEMA = {"type": "object"}
FITTING: dict[str, dict[str, Json]] = {
    "openai": {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "{}"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    },
    "responses": {"input": "{}", "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
    "anthropic": {"messages": [{"role": "user", "content": "{}"}], "max_tokens": 9},
    "google": {
        "contents": [{"role": "user", "parts": [{"text": "{}"}]}],
        "generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA},
    },
}


def said_of(content: Json = "", finish: FinishState = "complete", piece: int = 16, **changes: Any) -> Said:
    values: dict[str, Any] = {
        "number": 3,
        "body": {},
        "model": "m",
        "code": "",
        "usage": Usage(input_tokens=9, output_tokens=7),
    }
    return Said(content=content, finish=finish, piece=piece, **values | changes)


def whole_text(name: str, body: dict[str, Json]) -> str:
    """What an answer in one piece says, read off the wire format by hand."""
    if name == "openai":
        message = body["choices"][0]["message"]
        return str(message["content"] if message["refusal"] is None else message["refusal"])
    if name == "responses":
        parts = [part for item in body["output"] if item["type"] == "message" for part in item["content"]]
        return "".join(part["text"] if part["type"] == "output_text" else part["refusal"] for part in parts)
    if name == "anthropic":
        return "".join(
            json.dumps(block["input"], ensure_ascii=False) if block["type"] == "tool_use" else block["text"]
            for block in body["content"]
        )
    parts = [part for one in body.get("candidates", []) for part in one["content"].get("parts", [])]
    return "".join(part["text"] for part in parts)


def piece_text(name: str, event: dict[str, Json]) -> str:
    """What one event of a stream adds to the text."""
    if name == "openai":
        deltas = [choice["delta"] for choice in event["choices"]]
        return "".join((delta.get("content") or "") + (delta.get("refusal") or "") for delta in deltas)
    if name == "responses":
        return str(event.get("delta", ""))
    if name == "anthropic":
        delta = event.get("delta", {})
        return str(delta.get("text", "") + delta.get("partial_json", ""))
    return whole_text("google", event)


def usage_in(name: str, event: dict[str, Json]) -> Json:
    if name == "responses":
        return event.get("response", {}).get("usage")
    return event.get("usageMetadata" if name == "google" else "usage")


@given(
    name=st.sampled_from(NAMES),
    content=st.text() | st.dictionaries(st.text(), st.integers() | st.text()),
    finish=st.sampled_from(get_args(FinishState)),
    piece=st.integers(1, 40),
    tools=st.booleans(),
    reasoning=st.integers(0, 7),
)
def test_a_stream_says_what_the_whole_answer_says(
    name: str, content: Json, finish: FinishState, piece: int, tools: bool, reasoning: int
) -> None:
    body = {"stream_options": {"include_usage": True}} | ({"tools": [{"name": "t"}]} if tools else {})
    usage = Usage(input_tokens=9, output_tokens=7, cached_tokens=4, reasoning_tokens=reasoning)
    said = said_of(content, finish, piece, body=body, usage=usage)
    whole, stream = FORMATS[name].answer(said), FORMATS[name].stream(said)
    events = [*stream.opening, *stream.pieces, *stream.closing]
    assert "".join(piece_text(name, event) for event in events) == whole_text(name, whole) == text_of(content)
    assert all(0 < len(piece_text(name, event)) <= piece for event in stream.pieces)
    counts = [found for found in (usage_in(name, event) for event in events) if found is not None]
    assert counts[-1] == whole["usageMetadata" if name == "google" else "usage"]


@pytest.mark.parametrize("name", NAMES)
def test_who_tells_no_usage_tells_none_anywhere(name: str) -> None:
    said = said_of("x" * 99, usage=None, body={"stream_options": {"include_usage": True}})
    stream = FORMATS[name].stream(said)
    events = [FORMATS[name].answer(said), *stream.opening, *stream.pieces, *stream.closing]
    assert [usage_in(name, event) for event in events] == [None] * len(events)
    assert "oken" not in json.dumps(events).replace("max_output_tokens", "")


def test_openai_counts_a_stream_only_where_it_is_asked_to() -> None:
    stream = FORMATS["openai"].stream(said_of("x"))
    assert not [event for event in [*stream.opening, *stream.pieces, *stream.closing] if "usage" in event]
    counted = FORMATS["openai"].stream(said_of("x", body={"stream_options": {"include_usage": True}}))
    assert counted.closing[-1]["choices"] == []
    assert counted.closing[-1]["usage"]["total_tokens"] == 16
    assert [event["usage"] for event in [*counted.opening, *counted.pieces, *counted.closing[:-1]]] == [None] * 3


@pytest.mark.parametrize(
    ("name", "finish", "path", "reason"),
    [
        ("openai", "truncated", ("choices", 0, "finish_reason"), "length"),
        ("openai", "filtered", ("choices", 0, "finish_reason"), "content_filter"),
        ("openai", "refused", ("choices", 0, "message", "refusal"), "no"),
        ("responses", "truncated", ("incomplete_details", "reason"), "max_output_tokens"),
        ("responses", "filtered", ("incomplete_details", "reason"), "content_filter"),
        ("responses", "refused", ("output", 0, "content", 0), {"type": "refusal", "refusal": "no"}),
        ("responses", "refused", ("status",), "completed"),
        ("anthropic", "complete", ("stop_reason",), "end_turn"),
        ("anthropic", "truncated", ("stop_reason",), "max_tokens"),
        ("anthropic", "refused", ("stop_reason",), "refusal"),
        ("google", "complete", ("candidates", 0, "finishReason"), "STOP"),
        ("google", "truncated", ("candidates", 0, "finishReason"), "MAX_TOKENS"),
        ("google", "filtered", ("candidates", 0, "finishReason"), "SAFETY"),
    ],
)
def test_how_it_ended_is_said_in_the_providers_words(
    name: str, finish: FinishState, path: tuple[Any, ...], reason: Json
) -> None:
    found: Json = FORMATS[name].answer(said_of("no", finish))
    for step in path:
        found = found[step]
    assert found == reason


def test_google_blocks_a_prompt_without_a_candidate_and_names_the_scripted_reason() -> None:
    blocked = FORMATS["google"].answer(said_of("", "filtered", code="BLOCKLIST"))
    assert blocked["promptFeedback"] == {"blockReason": "BLOCKLIST"}
    assert "candidates" not in blocked
    assert FORMATS["google"].stream(said_of("", "filtered", code="BLOCKLIST")).closing == [blocked]
    said = FORMATS["google"].answer(said_of("the number is", "filtered", code="SPII"))
    assert said["candidates"][0]["finishReason"] == "SPII"


def test_thoughts_that_leave_no_room_leave_no_message() -> None:
    spent = said_of("", "truncated", usage=Usage(input_tokens=1, output_tokens=7, reasoning_tokens=7))
    assert [item["type"] for item in FORMATS["responses"].answer(spent)["output"]] == ["reasoning"]
    google = FORMATS["google"].answer(spent)
    assert google["candidates"][0]["content"] == {"role": "model"}
    assert (google["usageMetadata"]["thoughtsTokenCount"], google["usageMetadata"]["candidatesTokenCount"]) == (7, 0)


def test_the_events_of_a_response_are_numbered_through_also_the_error() -> None:
    wire = FORMATS["responses"]
    stream = wire.stream(said_of("some words", piece=4))
    frames = wire.frames([*stream.opening, *stream.pieces, wire.fault("server_error", 0)])
    numbers = [json.loads(frame.split(b"data: ")[1])["sequence_number"] for frame in frames]
    assert numbers == list(range(len(frames)))


@pytest.mark.parametrize("name", NAMES)
def test_each_event_is_one_frame_that_no_content_can_break(name: str) -> None:
    wire = FORMATS[name]
    stream = wire.stream(said_of("a\n\ndata: {}\r\n\u2028\x85event: x\n", piece=3))
    events = [*stream.opening, *stream.pieces, *stream.closing]
    frames = wire.frames(events)
    end = b"\r\n\r\n" if name == "google" else b"\n\n"
    for frame in frames:
        assert frame.endswith(end)
        assert end not in frame[: -len(end)]
    assert len(frames) == len(events) + (name == "openai")
    assert (frames[-1] == b"data: [DONE]\n\n") == (name == "openai")


@pytest.mark.parametrize("name", NAMES)
def test_a_fitting_request_is_taken(name: str) -> None:
    assert FORMATS[name].is_valid(FITTING[name])
    assert FORMATS[name].limit(FITTING[name]) > 0
    assert asked(FITTING[name]) == {}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("openai", {"messages": None}),
        ("openai", {"messages": ["hello"]}),
        ("openai", {"messages": [{"role": "model", "content": "x"}]}),
        ("openai", {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
        ("openai", {"max_completion_tokens": 0}),
        ("openai", {"max_tokens": "many"}),
        ("responses", {"input": None}),
        ("responses", {"text": {"format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}}),
        ("responses", {"max_output_tokens": -1}),
        ("anthropic", {"messages": [{"role": "system", "content": "x"}]}),
        ("anthropic", {"max_tokens": None}),
        ("google", {"contents": "x"}),
        ("google", {"contents": [{"role": "assistant", "parts": []}]}),
        ("google", {"generationConfig": {"responseJsonSchema": {}}}),
        ("google", {"generationConfig": {"responseMimeType": "text/plain", "responseSchema": {}}}),
        (
            "google",
            {
                "generationConfig": {
                    "responseMimeType": "application/json",
                    "responseSchema": {},
                    "responseJsonSchema": {},
                }
            },
        ),
        ("google", {"generationConfig": {"maxOutputTokens": 0}}),
    ],
)
def test_what_the_provider_would_turn_away_is_turned_away(name: str, changes: dict[str, Json]) -> None:
    wire, body = FORMATS[name], FITTING[name] | changes
    assert not (wire.is_valid(body) and wire.limit(body))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": '{"text": "x"}'}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": '{"text": "x"}'}]}]},
        {"contents": [{"role": "model", "parts": []}, {"role": "user", "parts": [{"text": '{"text": "x"}'}]}]},
        {"input": '{"text": "x"}'},
        {"input": [{"role": "user", "content": '{"text": "x"}'}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": '{"text": "x"}'}]}]},
    ],
)
def test_the_input_is_found_in_each_format(body: dict[str, Json]) -> None:
    assert asked(body) == {"text": "x"}


@pytest.mark.parametrize(
    "body", [{}, {"messages": []}, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {"input": "hello"}]
)
def test_a_request_without_an_input_says_so(body: dict[str, Json]) -> None:
    with pytest.raises(ValueError, match=r"no text|Expecting value"):
        asked(body)
