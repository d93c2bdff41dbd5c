"""Google's generateContent, as the Gemini API serves it.

Source: https://ai.google.dev/api/generate-content, …/api/batch-api and …/gemini-api/docs/structured-output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from apprentice import wire
from apprentice.models import (
    Batched,
    Call,
    Endpoint,
    Limits,
    Reading,
    Results,
    Sought,
    as_json,
    mapping,
    mappings,
    one_text,
    result,
    shape,
    system,
    text_of,
    turns,
    unanswered,
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
) -> Batched:
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
    batches = _Batches(f"/v1beta/models/{name}:batchGenerateContent")
    return Batched(endpoint, _GenerateContent(settings), batches, model=model, max_tokens=max_tokens)


class _GenerateContent:
    says_input_as_text = True

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


class _Batches:
    """Requests and answers travel within the batch, which is an operation of Google's."""

    limits = Limits(10_000, 19_000_000)  # 20 MB in all; how many is not said

    def __init__(self, path: str) -> None:
        self._path = path

    async def submit(self, call: Call, name: str, requests: Mapping[str, dict[str, Json]]) -> str:
        inlined = [{"request": body, "metadata": {"key": key}} for key, body in requests.items()]
        asked = {"batch": {"displayName": name, "inputConfig": {"requests": {"requests": inlined}}}}
        return one_text(
            mapping((await call(self._path, as_json(asked).encode())).body).get("name"), "name of the batch"
        )

    async def find(self, call: Call, sought: Sought) -> list[str]:
        token = ""
        while True:
            page = mapping((await call(f"/v1beta/batches?pageSize=100{token}")).body)
            batches = [one for one in mappings(page.get("operations")) if _job(one).get("displayName") == sought.name]
            if batches or not page.get("nextPageToken"):
                return [text_of(one.get("name")) for one in batches]
            token = f"&pageToken={quote(text_of(page['nextPageToken']), safe='')}"

    async def ended(self, call: Call, batch: str) -> bool:
        operation = await self._operation(call, batch)
        return operation.get("done") is True or _state(operation) in _ENDED

    async def results(self, call: Call, batch: str, ids: Sequence[str]) -> Results:
        operation = await self._operation(call, batch)
        within = _job(operation).get("output") or operation.get("response")
        told = mappings(mapping(mapping(within).get("inlinedResponses")).get("inlinedResponses"))
        listed: dict[str, wire.Outcome] = {}
        for key, one in zip(ids, told, strict=False):  # they are in the order of the requests
            listed[text_of(mapping(one.get("metadata")).get("key")) or key] = _result(one)
        problem = text_of(mapping(operation.get("error")).get("message"))
        # Of a batch that failed, expired or was cancelled Google does not say what it charges.
        return Results(listed, wire.Outcome("unknown", problem=f"the batch is {_state(operation)} {problem}".strip()))

    async def cancel(self, call: Call, batch: str) -> None:
        await call(f"/v1beta/{_name(batch)}:cancel", b"{}")

    async def _operation(self, call: Call, batch: str) -> dict[str, Json]:
        return mapping((await call(f"/v1beta/{_name(batch)}", failed_jobs=True)).body)


_ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED", "PARTIALLY_SUCCEEDED"})


def _job(operation: dict[str, Json]) -> dict[str, Json]:
    return mapping(operation.get("metadata"))


def _state(operation: dict[str, Json]) -> str:
    """Such as SUCCEEDED: the interface says BATCH_STATE_SUCCEEDED, its own library JOB_STATE_SUCCEEDED."""
    return text_of(_job(operation).get("state")).rpartition("_STATE_")[2]


def _name(batch: str) -> str:
    return f"batches/{quote(batch.removeprefix('batches/'), safe='')}"


def _result(one: dict[str, Json]) -> wire.Outcome:
    if isinstance(one.get("response"), dict):
        return result(200, one["response"])
    error = mapping(one.get("error"))
    return unanswered(f"{error.get('code')} {text_of(error.get('message'))}")


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
