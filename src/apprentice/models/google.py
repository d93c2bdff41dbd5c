"""Google's generateContent, as the Gemini API serves it.

Source: https://ai.google.dev/api/generate-content and …/gemini-api/docs/structured-output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from apprentice import wire
from apprentice.models import (
    Endpoint,
    Hosted,
    Reading,
    as_json,
    mapping,
    mappings,
    shape,
    system,
    text_of,
    turns,
    usage_of,
)
from apprentice.types import Json, Task

_OWN = "https://generativelanguage.googleapis.com"
# "If your request fails with a 400 or 500 error, you won't be charged": https://ai.google.dev/gemini-api/docs/billing
_FREE = frozenset({400, 500})
_DECLINED = frozenset(
    {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE"}
    | {"IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"}
)


def build(
    model: str,
    api_key: str | None = None,
    base_url: str | None = None,
    max_tokens: int = 1024,
    timeout: float = 60,
    temperature: float | None = 0,
    stream: bool = False,
    client: wire.Client | None = None,
    allow_internal: bool = False,
) -> Hosted:
    """A model behind Google's generateContent.

    `max_tokens` bounds thoughts and answer together. `timeout`: seconds for the whole call. `temperature: null` sends
    none. `stream: true` has the answer sent piece by piece; it is still given whole. `base_url` ends before
    `/v1beta/models/…`. Raises ConfigError for an address that a key must not be sent to.
    """
    name = quote(model.removeprefix("models/"), safe="")
    endpoint = Endpoint(
        f"google/{model}",
        base_url or _OWN,
        f"/v1beta/models/{name}:" + ("streamGenerateContent?alt=sse" if stream else "generateContent"),
        api_key=api_key,
        header="x-goog-api-key",
        free=_FREE,
        timeout=timeout,
        client=client,
        allow_internal=allow_internal,
    )
    settings: dict[str, Json] = {"maxOutputTokens": max_tokens}
    if temperature is not None:
        settings["temperature"] = temperature
    return Hosted(endpoint, _GenerateContent(settings), model=model, max_tokens=max_tokens)


class _GenerateContent:
    def __init__(self, settings: dict[str, Json]) -> None:
        self._settings = settings

    def body(self, task: Task, input: Json) -> dict[str, Json]:
        asked = shape(task.output_schema)
        contents = []
        for role, value in turns(task, input):
            name, value = ("user", value) if role == "user" else ("model", asked.wrap(value))
            contents.append({"role": name, "parts": [{"text": as_json(value)}]})
        form = {"responseMimeType": "application/json", "responseJsonSchema": asked.schema}
        return {
            "systemInstruction": {"parts": [{"text": system(task)}]},
            "contents": contents,
            "generationConfig": {**form, **self._settings},
        }

    def read(self, body: dict[str, Json]) -> Reading:
        candidate = next(iter(mappings(body.get("candidates"))), {})
        reason = text_of(candidate.get("finishReason"))
        blocked = text_of(mapping(body.get("promptFeedback")).get("blockReason"))
        reading = Reading(
            text="".join(_texts(candidate)),
            model=text_of(body.get("modelVersion")),
            usage=usage_of(body.get("usageMetadata"), _usage),
        )
        if reason in _DECLINED:
            return reading._replace(refusal=f"stopped by the provider: {reason}")
        if blocked and not candidate:
            return reading._replace(refusal=f"the request was blocked: {blocked}")
        if reason == "MAX_TOKENS":
            return reading._replace(finish="truncated")
        if candidate and reason != "STOP":
            return reading._replace(
                finish="truncated", problem=f"the answer was cut off: {reason or 'no reason given'}"
            )
        return reading

    def join(self, events: Sequence[Json]) -> tuple[dict[str, Json], bool]:
        body: dict[str, Json] = {}
        texts: list[str] = []
        reason: Json = None
        for event in mappings(events):
            body |= {key: part for key, part in event.items() if key not in ("candidates", "error")}
            for candidate in mappings(event.get("candidates")):
                if candidate.get("index", 0) == 0:
                    texts += _texts(candidate)
                    reason = candidate.get("finishReason") or reason
        if texts or reason:
            body["candidates"] = [{"content": {"parts": [{"text": "".join(texts)}]}, "finishReason": reason}]
        ended = bool(reason or mapping(body.get("promptFeedback")).get("blockReason"))
        if not ended:
            body.pop("usageMetadata", None)  # it grows from event to event
        return body, ended


def _texts(candidate: dict[str, Json]) -> list[str]:
    """The parts of the answer, without what the model thought aloud."""
    parts = mappings(mapping(candidate.get("content")).get("parts"))
    return [text_of(part.get("text")) for part in parts if not part.get("thought")]


def _usage(found: dict[str, Any]) -> dict[str, Any]:
    # Google leaves out what is zero. Tools and thoughts are counted apart, and billed.
    prompt = found["promptTokenCount"] + (found.get("toolUsePromptTokenCount") or 0)
    thoughts = found.get("thoughtsTokenCount") or 0
    total = found.get("totalTokenCount")
    # Without a total, the count of the answer must be there: its absence is not a zero to book.
    answer = found["candidatesTokenCount"] if total is None else found.get("candidatesTokenCount") or 0
    return {
        "input_tokens": prompt,
        "output_tokens": max(answer + thoughts, (total or 0) - prompt),
        "cached_tokens": found.get("cachedContentTokenCount") or 0,
        "reasoning_tokens": thoughts,
    }
