"""What providers send: four wire formats as values, whole and as a stream of events. No sockets and no scripts here.

Sources: https://platform.openai.com/docs/api-reference/chat and …/responses, https://docs.anthropic.com/en/api/messages,
https://ai.google.dev/api/generate-content, and the types of the official SDKs, which the tests hold against this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from apprentice.types import FinishState, Json, Usage

type Event = dict[str, Json]


class Said(NamedTuple):
    """What a model said to one request, before it takes a provider's form."""

    number: int  # of the request, for the ids
    body: dict[str, Json]  # the request
    model: str
    content: Json  # a text, or a value to be sent as JSON
    finish: FinishState
    code: str  # the provider's word for why, where it has several for one `finish`; may be empty
    usage: Usage | None  # None: the provider tells none
    piece: int  # characters in one event of a stream

    @property
    def text(self) -> str:
        return text_of(self.content)

    @property
    def pieces(self) -> list[str]:
        """The text as a stream sends it."""
        text = self.text
        return [text[start : start + self.piece] for start in range(0, len(text), self.piece)]


class Stream(NamedTuple):
    """The events of a streamed answer; an error may take the place of what follows any of the `pieces`."""

    opening: Sequence[Event]
    pieces: Sequence[Event]
    closing: Sequence[Event]


class Format(Protocol):
    """A provider's wire format."""

    base: str
    path: re.Pattern[str]  # of the whole target; a group `model` or `stream` says what other formats say in the body
    media: str  # the content type of a stream
    unknown_path: tuple[int, str]  # status and code of the three ways to be turned away
    wrong_key: tuple[int, str]
    malformed: tuple[int, str]

    def key(self, headers: Mapping[str, str]) -> str:
        """The key that a request came with, or an empty one."""
        ...

    def limit(self, body: dict[str, Json]) -> int:
        """The tokens that the request allows for the answer; 0 where it says nothing that this provider takes."""
        ...

    def is_valid(self, body: dict[str, Json]) -> bool:
        """Whether the provider would take this for a request."""
        ...

    def headers(self, number: int) -> dict[str, str]:
        """What this provider adds to the head of each answer."""
        ...

    def answer(self, said: Said) -> dict[str, Json]:
        """The body of an answer in one piece."""
        ...

    def stream(self, said: Said) -> Stream:
        """The same answer in events."""
        ...

    def error(self, status: int, code: str, number: int) -> dict[str, Json]:
        """The body of an answer with a status that is no success."""
        ...

    def fault(self, code: str, number: int) -> Event:
        """The event of an error within a stream."""
        ...

    def frames(self, events: Sequence[Event]) -> list[bytes]:
        """The events as they go over the wire, with what ends a stream that came to its end."""
        ...


def text_of(content: Json) -> str:
    """A text as it is, any other value as JSON."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def asked(body: dict[str, Json]) -> Json:
    """The input that a request of ours asks about: its last turn. Raises ValueError if that is not JSON."""
    turns = next((body[name] for name in ("messages", "contents", "input") if name in body), None)
    last = turns[-1] if isinstance(turns, list) and turns else turns
    content = last.get("content", last.get("parts")) if isinstance(last, dict) else last
    if isinstance(content, list):
        content = next((part["text"] for part in content if "text" in part), None)
    if not isinstance(content, str):
        raise ValueError("the request's last turn has no text")
    return json.loads(content)


def _limit(default: int, *told: Json) -> int:
    found = next((value for value in told if value is not None), default)
    return found if isinstance(found, int) and found > 0 else 0


def _turns(turns: Json, *roles: str) -> bool:
    """Whether these are turns of a conversation, each by one of `roles`."""
    return isinstance(turns, list) and all(isinstance(turn, dict) and turn.get("role") in roles for turn in turns)


def _part(value: Json, *names: str) -> Json:
    """What lies at this path of objects, or None."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _is_named_schema(form: Json) -> bool:
    return isinstance(_part(form, "name"), str) and isinstance(_part(form, "schema"), dict)


def _data(event: Event) -> str:
    return json.dumps(event, ensure_ascii=False)


def _named_frames(events: Sequence[Event]) -> list[bytes]:
    return [f"event: {event['type']}\ndata: {_data(event)}\n\n".encode() for event in events]


_CHAT_REASONS = {"complete": "stop", "truncated": "length", "filtered": "content_filter", "refused": "stop"}
_GOOGLE_REASONS = {"complete": "STOP", "truncated": "MAX_TOKENS", "filtered": "SAFETY", "refused": "PROHIBITED_CONTENT"}
_GOOGLE_STATUSES = {"RESOURCE_EXHAUSTED": 429, "INTERNAL": 500, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504}


class _OpenAI:
    """Chat completions."""

    base = "/v1"
    path = re.compile(r"/v1/chat/completions")
    media = "text/event-stream; charset=utf-8"
    unknown_path = (404, "not_found")
    wrong_key = (401, "invalid_api_key")
    malformed = (400, "invalid_request_error")

    def key(self, headers: Mapping[str, str]) -> str:
        return headers.get("authorization", "").removeprefix("Bearer ")

    def limit(self, body: dict[str, Json]) -> int:
        return _limit(16_384, body.get("max_completion_tokens"), body.get("max_tokens"))

    def is_valid(self, body: dict[str, Json]) -> bool:
        form = body.get("response_format")
        shaped = _part(form, "type") != "json_schema" or _is_named_schema(_part(form, "json_schema"))
        return shaped and _turns(body.get("messages"), "system", "developer", "user", "assistant", "tool")

    def headers(self, number: int) -> dict[str, str]:
        return {"x-request-id": f"req_{number}", "openai-version": "2020-10-01", "openai-processing-ms": "1"}

    def answer(self, said: Said) -> dict[str, Json]:
        refused = said.finish == "refused"
        message = {
            "role": "assistant",
            "content": None if refused else said.text,
            "refusal": said.text if refused else None,
        }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _CHAT_REASONS[said.finish]}
        answer = self._head(said, "chat.completion") | {"choices": [choice]}
        return answer if said.usage is None else answer | {"usage": self._usage(said.usage)}

    def stream(self, said: Said) -> Stream:
        # With `include_usage` each event has the field, empty but in the one that is added at the end.
        counted = said.usage is not None and _part(said.body, "stream_options", "include_usage") is True
        head = self._head(said, "chat.completion.chunk") | ({"usage": None} if counted else {})

        def event(delta: Json, reason: str | None = None) -> Event:
            return head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

        name = "refusal" if said.finish == "refused" else "content"
        opening = [event({"role": "assistant", "content": None if name == "refusal" else "", "refusal": None})]
        closing = [event({}, _CHAT_REASONS[said.finish])]
        if counted and said.usage is not None:
            closing.append(head | {"choices": [], "usage": self._usage(said.usage)})
        return Stream(opening, [event({name: piece}) for piece in said.pieces], closing)

    def error(self, status: int, code: str, number: int) -> dict[str, Json]:
        return {"error": {"message": "scripted", "type": code, "code": code, "param": None}}

    def fault(self, code: str, number: int) -> Event:
        return self.error(500, code, number)

    def frames(self, events: Sequence[Event]) -> list[bytes]:
        end = [] if "error" in events[-1] else ["[DONE]"]
        return [f"data: {data}\n\n".encode() for data in [*map(_data, events), *end]]

    def _head(self, said: Said, kind: str) -> dict[str, Json]:
        return {"id": f"chatcmpl-{said.number}", "object": kind, "created": 0, "model": said.model}

    def _usage(self, usage: Usage) -> dict[str, Json]:
        return {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        }


class _Responses:
    """OpenAI's responses. A model that reasoned has an item for it, before the message."""

    base = "/v1"
    path = re.compile(r"/v1/responses")
    media = "text/event-stream; charset=utf-8"
    unknown_path = (404, "not_found")
    wrong_key = (401, "invalid_api_key")
    malformed = (400, "invalid_request_error")

    def key(self, headers: Mapping[str, str]) -> str:
        return headers.get("authorization", "").removeprefix("Bearer ")

    def limit(self, body: dict[str, Json]) -> int:
        return _limit(128_000, body.get("max_output_tokens"))

    def is_valid(self, body: dict[str, Json]) -> bool:
        form = _part(body, "text", "format")
        shaped = _part(form, "type") != "json_schema" or _is_named_schema(form)
        given = body.get("input")
        return shaped and (isinstance(given, str) or _turns(given, "system", "developer", "user", "assistant"))

    def headers(self, number: int) -> dict[str, str]:
        return {"x-request-id": f"req_{number}", "openai-version": "2020-10-01", "openai-processing-ms": "1"}

    def answer(self, said: Said) -> dict[str, Json]:
        reasons = {"truncated": "max_output_tokens", "filtered": "content_filter"}
        reason = reasons.get(said.finish)
        answer = self._head(said) | {
            "status": "incomplete" if reason else "completed",
            "incomplete_details": {"reason": reason} if reason else None,
            "output": self._items(said),
        }
        return answer if said.usage is None else answer | {"usage": self._usage(said.usage)}

    def stream(self, said: Said) -> Stream:
        whole = self.answer(said)
        begun = self._head(said) | {"status": "in_progress", "output": [], "usage": None}
        opening: list[Event] = [{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")]
        closing: list[Event] = [{"type": f"response.{whole['status']}", "response": whole}]
        pieces: list[Event] = []
        for index, item in enumerate(whole["output"]):
            added: Event = {"type": "response.output_item.added", "output_index": index}
            done: Event = {"type": "response.output_item.done", "output_index": index, "item": item}
            if item["type"] == "reasoning":
                opening += [added | {"item": item}, done]
                continue
            part = item["content"][0]
            kind, name = ("refusal", "refusal") if part["type"] == "refusal" else ("output_text", "text")
            more: Event = {} if kind == "refusal" else {"logprobs": []}
            where: Event = {"item_id": item["id"], "output_index": index, "content_index": 0}
            opening += [
                added | {"item": item | {"status": "in_progress", "content": []}},
                {"type": "response.content_part.added", **where, "part": part | {name: ""}},
            ]
            pieces = [{"type": f"response.{kind}.delta", **where, **more, "delta": piece} for piece in said.pieces]
            closing[:0] = [
                {"type": f"response.{kind}.done", **where, **more, name: part[name]},
                {"type": "response.content_part.done", **where, "part": part},
                done,
            ]
        return Stream(opening, pieces, closing)

    def error(self, status: int, code: str, number: int) -> dict[str, Json]:
        return {"error": {"message": "scripted", "type": code, "code": code, "param": None}}

    def fault(self, code: str, number: int) -> Event:
        return {"type": "error", "code": code, "message": "scripted", "param": None}

    def frames(self, events: Sequence[Event]) -> list[bytes]:
        return _named_frames([event | {"sequence_number": number} for number, event in enumerate(events)])

    def _head(self, said: Said) -> dict[str, Json]:
        asked_for = {
            name: said.body.get(name) for name in ("instructions", "max_output_tokens", "temperature", "top_p")
        }
        return {
            "id": f"resp_{said.number}",
            "object": "response",
            "created_at": 0,
            "model": said.model,
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "text": said.body.get("text") or {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            **asked_for,
        }

    def _items(self, said: Said) -> list[dict[str, Json]]:
        items: list[dict[str, Json]] = []
        if said.usage is not None and said.usage.reasoning_tokens:
            items.append({"id": f"rs_{said.number}", "type": "reasoning", "summary": []})
        part: dict[str, Json] = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
        if said.finish == "refused":
            part = {"type": "refusal", "refusal": said.text}
        whole = said.finish in ("complete", "refused")
        if whole or said.text:
            status = "completed" if whole else "incomplete"
            kind: dict[str, Json] = {"id": f"msg_{said.number}", "type": "message", "role": "assistant"}
            items.append(kind | {"status": status, "content": [part]})
        return items

    def _usage(self, usage: Usage) -> dict[str, Json]:
        return {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.input_tokens + usage.output_tokens,
        }


class _Anthropic:
    """Messages. A value that is an object answers through the request's first tool, if it has one."""

    base = ""
    path = re.compile(r"/v1/messages")
    media = "text/event-stream; charset=utf-8"
    unknown_path = (404, "not_found_error")
    wrong_key = (401, "authentication_error")
    malformed = (400, "invalid_request_error")

    def key(self, headers: Mapping[str, str]) -> str:
        # Its own client may send a bearer instead of the older header.
        return headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")

    def limit(self, body: dict[str, Json]) -> int:
        return _limit(0, body.get("max_tokens"))  # it demands one

    def is_valid(self, body: dict[str, Json]) -> bool:
        return _turns(body.get("messages"), "user", "assistant")

    def headers(self, number: int) -> dict[str, str]:
        return {"request-id": f"req_{number}"}

    def answer(self, said: Said) -> dict[str, Json]:
        answer = self._head(said) | {"content": [self._block(said)], **self._ending(said), "stop_sequence": None}
        return answer if said.usage is None else answer | {"usage": self._usage(said.usage)}

    def stream(self, said: Said) -> Stream:
        block = self._block(said)
        tool = block["type"] == "tool_use"
        begun = self._head(said) | {"content": [], "stop_reason": None, "stop_sequence": None}
        ending: Event = {"type": "message_delta", "delta": {**self._ending(said), "stop_sequence": None}}
        if said.usage is not None:
            usage = self._usage(said.usage)
            begun["usage"] = usage | {"output_tokens": min(1, said.usage.output_tokens)}
            ending["usage"] = usage
        kind, name = ("input_json_delta", "partial_json") if tool else ("text_delta", "text")
        empty: Event = {"input": {}} if tool else {"text": ""}
        opening: list[Event] = [
            {"type": "message_start", "message": begun},
            {"type": "content_block_start", "index": 0, "content_block": block | empty},
            {"type": "ping"},
        ]
        pieces: list[Event] = [
            {"type": "content_block_delta", "index": 0, "delta": {"type": kind, name: piece}} for piece in said.pieces
        ]
        return Stream(opening, pieces, [{"type": "content_block_stop", "index": 0}, ending, {"type": "message_stop"}])

    def error(self, status: int, code: str, number: int) -> dict[str, Json]:
        return {"type": "error", "error": {"type": code, "message": "scripted"}, "request_id": f"req_{number}"}

    def fault(self, code: str, number: int) -> Event:
        return self.error(500, code, number)

    def frames(self, events: Sequence[Event]) -> list[bytes]:
        return _named_frames(events)

    def _head(self, said: Said) -> dict[str, Json]:
        return {"id": f"msg_{said.number}", "type": "message", "role": "assistant", "model": said.model}

    def _block(self, said: Said) -> dict[str, Json]:
        tools = said.body.get("tools")
        if isinstance(said.content, dict) and isinstance(tools, list) and tools:
            name = _part(tools[0], "name")
            return {"type": "tool_use", "id": f"toolu_{said.number}", "name": name, "input": said.content}
        return {"type": "text", "text": said.text}

    def _ending(self, said: Said) -> dict[str, Json]:
        if said.finish == "complete":
            return {"stop_reason": "tool_use" if self._block(said)["type"] == "tool_use" else "end_turn"}
        if said.finish == "truncated":
            return {"stop_reason": "max_tokens"}
        return {"stop_reason": "refusal", "stop_details": {"type": "refusal", "category": None, "explanation": None}}

    def _usage(self, usage: Usage) -> dict[str, Json]:
        return {
            "input_tokens": usage.input_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.output_tokens,
        }


class _Google:
    """Gemini's generateContent. What was filtered or refused without a word was stopped before the model: no candidate."""

    base = ""
    path = re.compile(
        r"/v1(?:beta)?/models/(?P<model>[^/:?]+):(?:generateContent|(?P<stream>streamGenerateContent)\?alt=sse)"
    )
    media = "text/event-stream"
    unknown_path = (404, "NOT_FOUND")
    wrong_key = (400, "INVALID_ARGUMENT")  # so it answers, instead of 401
    malformed = (400, "INVALID_ARGUMENT")

    def key(self, headers: Mapping[str, str]) -> str:
        return headers.get("x-goog-api-key", "")

    def limit(self, body: dict[str, Json]) -> int:
        return _limit(65_536, _part(body, "generationConfig", "maxOutputTokens"))

    def is_valid(self, body: dict[str, Json]) -> bool:
        config = body.get("generationConfig")
        schemas = [name for name in ("responseSchema", "responseJsonSchema") if _part(config, name) is not None]
        shaped = not schemas or (len(schemas) == 1 and _part(config, "responseMimeType") == "application/json")
        return shaped and _turns(body.get("contents"), "user", "model")

    def headers(self, number: int) -> dict[str, str]:
        return {}  # it names the answer in the body, as `responseId`

    def answer(self, said: Said) -> dict[str, Json]:
        if self._is_blocked(said):
            answer: dict[str, Json] = {"promptFeedback": {"blockReason": self._reason(said)}}
        else:
            answer = {"candidates": [self._candidate(said, said.text, self._reason(said))]}
        if said.usage is not None:
            answer["usageMetadata"] = self._usage(said.usage, blocked=self._is_blocked(said))
        return answer | self._tail(said)

    def stream(self, said: Said) -> Stream:
        if self._is_blocked(said):
            return Stream([], [], [self.answer(said)])
        known = self._tail(said)
        if said.usage is not None:
            known["usageMetadata"] = {"promptTokenCount": said.usage.input_tokens}
        pieces: list[Event] = [{"candidates": [self._candidate(said, piece, None)]} | known for piece in said.pieces]
        last: Event = {"candidates": [self._candidate(said, "", self._reason(said))]} | self._tail(said)
        if said.usage is not None:
            last["usageMetadata"] = self._usage(said.usage, blocked=False)
        return Stream([], pieces, [last])

    def error(self, status: int, code: str, number: int) -> dict[str, Json]:
        return {"error": {"code": status, "message": "scripted", "status": code}}

    def fault(self, code: str, number: int) -> Event:
        return self.error(_GOOGLE_STATUSES.get(code, 500), code, number)

    def frames(self, events: Sequence[Event]) -> list[bytes]:
        return [f"data: {_data(event)}\r\n\r\n".encode() for event in events]

    def _is_blocked(self, said: Said) -> bool:
        return said.finish in ("filtered", "refused") and not said.text

    def _reason(self, said: Said) -> str:
        return said.code or _GOOGLE_REASONS[said.finish]

    def _candidate(self, said: Said, text: str, reason: str | None) -> dict[str, Json]:
        # A model that spent everything on thoughts has content without parts.
        parts: dict[str, Json] = {} if said.finish == "truncated" and not text else {"parts": [{"text": text}]}
        candidate: dict[str, Json] = {"content": parts | {"role": "model"}, "index": 0}
        return candidate if reason is None else candidate | {"finishReason": reason}

    def _tail(self, said: Said) -> dict[str, Json]:
        return {"modelVersion": said.model, "responseId": f"response-{said.number}"}

    def _usage(self, usage: Usage, blocked: bool) -> dict[str, Json]:
        counts = {
            "promptTokenCount": usage.input_tokens,
            "candidatesTokenCount": usage.output_tokens - usage.reasoning_tokens,
            "totalTokenCount": usage.input_tokens + usage.output_tokens,
            "cachedContentTokenCount": usage.cached_tokens,
            "thoughtsTokenCount": usage.reasoning_tokens,
        }
        spoken = ("promptTokenCount", "totalTokenCount", *(() if blocked else ("candidatesTokenCount",)))
        return {name: count for name, count in counts.items() if count or name in spoken}


FORMATS: Mapping[str, Format] = {
    "openai": _OpenAI(),
    "responses": _Responses(),
    "anthropic": _Anthropic(),
    "google": _Google(),
}
