"""What goes to Google and what is made of its answers, beyond the promises of every provider."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from apprentice import plugins, wire
from apprentice.errors import ModelRefused, ModelRejected, ModelUnavailable, OutcomeUnknown, OutOfMoney
from apprentice.testing.models import TASK
from apprentice.testing.servers import Reply, serve_google
from apprentice.types import Answer, Json, Task


class Caught:
    """A client that keeps the request and answers with one body."""

    def __init__(self, answer: Json, status: int = 200) -> None:
        self.request: wire.Request | None = None
        self._reply = wire.Reply(status, {}, json.dumps(answer).encode())

    async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
        self.request = request
        leaving()
        return self._reply

    async def close(self) -> None:
        return None


def candidate(*parts: Json, reason: Json = "STOP", **more: Json) -> dict[str, Json]:
    return {"content": {"parts": list(parts), "role": "model"}, "finishReason": reason, "index": 0} | more


def said(*candidates: Json, **usage: Json) -> dict[str, Json]:
    counted = {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15} | usage
    return {"candidates": list(candidates), "usageMetadata": counted, "modelVersion": "m-1", "responseId": "r-1"}


HAM = {"text": '{"label": "ham"}'}


async def answered(answer: Json, task: Task = TASK, status: int = 200) -> Answer:
    model = plugins.build("models", "google", model="m", client=Caught(answer, status))
    found: Answer = await model.answer(task, {"text": "x"})
    return found


async def sent(task: Task = TASK, model: str = "m", **settings: Any) -> wire.Request:
    caught = Caught(said(candidate(HAM)))
    built = plugins.build("models", "google", model=model, client=caught, **settings)
    await built.answer(task, {"text": "x"})
    assert caught.request is not None
    assert built.request_bytes(task, {"text": "x"}) == len(caught.request.body)
    return caught.request


async def test_the_request_has_instructions_examples_the_schema_and_a_limit() -> None:
    request = await sent(TASK.model_copy(update={"instructions": "Be strict."}), api_key="AIza-key", max_tokens=77)
    assert request.url == "https://generativelanguage.googleapis.com/v1beta/models/m:generateContent"
    assert request.headers["x-goog-api-key"] == "AIza-key"
    assert "AIza-key" not in request.url
    body = json.loads(request.body)
    [system] = body["systemInstruction"]["parts"]
    assert system["text"].startswith("Say which label fits the text.\n\nBe strict.\n\n")
    assert [(turn["role"], json.loads(turn["parts"][0]["text"])) for turn in body["contents"]] == [
        ("user", {"text": "you won"}),
        ("model", {"label": "spam"}),
        ("user", {"text": "x"}),
    ]
    assert body["generationConfig"] == {
        "responseMimeType": "application/json",
        "responseJsonSchema": TASK.output_schema,
        "maxOutputTokens": 77,
        "temperature": 0,
    }


async def test_the_temperature_is_zero_unless_told_and_null_sends_none() -> None:
    assert json.loads((await sent(temperature=0.7)).body)["generationConfig"]["temperature"] == 0.7
    assert "temperature" not in json.loads((await sent(temperature=None)).body)["generationConfig"]


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gemini-2.5-flash", "gemini-2.5-flash"),
        ("models/gemini-2.5-flash", "gemini-2.5-flash"),
        ("../../v1/x?key=", "..%2F..%2Fv1%2Fx%3Fkey%3D"),
        ("a b#c", "a%20b%23c"),
    ],
)
async def test_a_models_name_is_one_part_of_the_path(model: str, path: str) -> None:
    assert (await sent(model=model)).url.endswith(f"/v1beta/models/{path}:generateContent")


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        (said(candidate(HAM)), {"label": "ham"}),
        (said(candidate({"text": '{"label"'}, {"text": ': "ham"}'})), {"label": "ham"}),
        (said(candidate({"text": "Let me see.", "thought": True}, HAM)), {"label": "ham"}),
        (said(candidate(HAM), candidate({"text": "no"}, index=1)), {"label": "ham"}),
        (said(candidate({"text": "prose"})), None),
        (said(candidate({"text": '{"label": 1e999}'})), None),
        (said(candidate()), None),
        (said(candidate(None, "x", {"text": 5}, {})), None),
        (said({"finishReason": "STOP"}), None),
        (said(), None),
        (said(None, "x"), None),
        ({"candidates": "x", "promptFeedback": 5}, None),
        ({}, None),
    ],
)
async def test_the_answer_is_the_text_of_the_first_candidate(answer: Json, output: Json) -> None:
    found = await answered(answer)
    assert found.output == output
    assert (found.problem is None) == (output is not None)


async def test_what_is_no_object_is_wrapped_and_unwrapped_again() -> None:
    task = TASK.model_copy(update={"output_schema": {"type": "string"}, "examples": ()})
    assert (await answered(said(candidate({"text": '{"value": "ham"}'})), task)).output == "ham"


async def test_the_model_that_served_is_the_one_that_google_names() -> None:  # F55
    assert (await answered(said(candidate(HAM)))).model == "m-1"
    assert (await answered(said(candidate(HAM)) | {"modelVersion": None})).model == "m"


@pytest.mark.parametrize(
    ("told", "input_tokens", "output_tokens", "cached", "reasoning"),
    [
        ({}, 10, 5, 0, 0),
        ({"cachedContentTokenCount": 4}, 10, 5, 4, 0),
        ({"thoughtsTokenCount": 7, "totalTokenCount": 22}, 10, 12, 0, 7),
        ({"thoughtsTokenCount": 7}, 10, 12, 0, 7),
        ({"toolUsePromptTokenCount": 3, "totalTokenCount": 18}, 13, 5, 0, 0),
        ({"totalTokenCount": 40}, 10, 30, 0, 0),  # what is in the total is billed
        ({"totalTokenCount": None}, 10, 5, 0, 0),
        ({"candidatesTokenCount": None}, 10, 5, 0, 0),
    ],
)
async def test_usage_holds_everything_that_is_billed(
    told: dict[str, Json], input_tokens: int, output_tokens: int, cached: int, reasoning: int
) -> None:
    usage = (await answered(said(candidate(HAM), **told))).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (input_tokens, output_tokens)
    assert (usage.cached_tokens, usage.reasoning_tokens) == (cached, reasoning)


@pytest.mark.parametrize(
    "usage",
    [
        None, [], {}, {"promptTokenCount": 10}, {"candidatesTokenCount": 5, "totalTokenCount": 15},
        {"promptTokenCount": "10", "totalTokenCount": 15}, {"promptTokenCount": -1, "totalTokenCount": 15},
        {"promptTokenCount": 10, "totalTokenCount": 15, "cachedContentTokenCount": 11},
        {"promptTokenCount": 10, "totalTokenCount": 10**13},
    ],
)  # fmt: skip
async def test_a_usage_that_cannot_be_true_is_none(usage: Json) -> None:
    assert (await answered(said(candidate(HAM)) | {"usageMetadata": usage})).usage is None


@pytest.mark.parametrize("reason", ["MAX_TOKENS", "OTHER", "MALFORMED_FUNCTION_CALL", "SOMETHING_NEW", None, 5])
async def test_what_did_not_stop_by_itself_is_no_output_even_if_it_is_json(reason: Json) -> None:
    found = await answered(said(candidate(HAM, reason=reason)))
    assert (found.output, found.finish) == (None, "truncated")
    assert found.problem
    assert found.usage is not None


@pytest.mark.parametrize("reason", ["SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE"])
async def test_a_stopped_answer_is_a_refusal_with_its_bill(reason: str) -> None:  # F54
    with pytest.raises(ModelRefused, match=reason) as caught:
        await answered(said(candidate({"text": "half of it"}, reason=reason)))
    assert (caught.value.outcome, caught.value.text, caught.value.retryable) == ("answered", "half of it", False)
    assert caught.value.usage.output_tokens == 5


@pytest.mark.parametrize("reason", ["SAFETY", "OTHER", "BLOCKLIST", "PROHIBITED_CONTENT"])
async def test_a_blocked_request_is_a_refusal_with_its_bill(reason: str) -> None:  # F54
    blocked = {
        "promptFeedback": {"blockReason": reason},
        "usageMetadata": {"promptTokenCount": 9, "totalTokenCount": 9},
    }
    with pytest.raises(ModelRefused, match=reason) as caught:
        await answered(blocked)
    assert caught.value.outcome == "answered"
    assert (caught.value.usage.input_tokens, caught.value.usage.output_tokens) == (9, 0)
    with pytest.raises(ModelRefused) as caught:
        await answered({"promptFeedback": {"blockReason": reason}})
    assert (caught.value.outcome, caught.value.usage) == ("answered_no_usage", None)


async def test_a_400_and_a_500_of_google_are_free_and_a_503_is_not_known_to_be() -> None:
    for status, kind, outcome in (
        (400, ModelRejected, "rejected"),
        (500, ModelUnavailable, "rejected"),
        (503, OutcomeUnknown, "unknown"),
    ):
        async with serve_google([Reply(status=status, code="INTERNAL")]) as server:
            model = plugins.build("models", "google", model="m", base_url=server.url, allow_internal=True)
            with pytest.raises(kind, match="INTERNAL") as caught:
                await model.answer(TASK, {"text": "x"})
            await model.close()
        assert caught.value.outcome == outcome


async def test_a_quota_of_a_day_is_not_retried_and_one_of_a_minute_is_when_google_says() -> None:  # F45
    for id, kind in (("RequestsPerDayPerProject", OutOfMoney), ("RequestsPerMinutePerProject", ModelUnavailable)):
        details = [{"violations": [{"quotaId": id}]}, {"retryDelay": "34s"}]
        with pytest.raises(kind) as caught:
            await answered({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": details}}, status=429)
        assert (caught.value.outcome, caught.value.retry_after) == ("rejected", 34.0)


async def test_it_speaks_to_a_server_of_its_format() -> None:
    async with serve_google([{"label": "ham"}], api_key="AIza-key") as server:
        settings = {"model": "m", "api_key": "AIza-key", "base_url": server.url, "allow_internal": True}
        for stream in (False, True):
            model = plugins.build("models", "google", stream=stream, **settings)
            assert (await model.answer(TASK, {"text": "x"})).output == {"label": "ham"}
            await model.close()
    assert [seen.path.partition(":")[2] for seen in server.requests] == [
        "generateContent",
        "streamGenerateContent?alt=sse",
    ]
    assert all("AIza-key" not in seen.path for seen in server.requests)
