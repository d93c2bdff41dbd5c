"""What goes to OpenAI's responses and what is made of them, beyond the promises of every provider."""

from __future__ import annotations

import json
from typing import Any

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError, ModelRefused, OutcomeUnknown
from apprentice.testing.models import TASK
from apprentice.testing.servers import serve_responses
from apprentice.types import Answer, Json, Task
from tests.models.test_openai import Caught


def message(*parts: Json, **more: Json) -> dict[str, Json]:
    return {"type": "message", "role": "assistant", "content": list(parts)} | more


def text(said: Json) -> dict[str, Json]:
    return {"type": "output_text", "text": said, "annotations": []}


def response(*items: Json, status: Json = "completed", why: Json = None, **usage: Json) -> dict[str, Json]:
    return {
        "id": "resp_1",
        "model": "m-1",
        "status": status,
        "error": None,
        "incomplete_details": {"reason": why} if why else None,
        "output": list(items),
        "usage": {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15} | usage,
    }


HAM = message(text('{"label": "ham"}'))


async def answered(answer: dict[str, Json], task: Task = TASK) -> Answer:
    model = plugins.build("models", "openai", model="m", api="responses", client=Caught(**answer))
    found: Answer = await model.answer(task, {"text": "x"})
    return found


async def sent(task: Task = TASK, **settings: Any) -> tuple[str, dict[str, Json]]:
    caught = Caught(**response(HAM))
    model = plugins.build("models", "openai", model="m", api="responses", client=caught, **settings)
    await model.answer(task, {"text": "x"})
    assert caught.request is not None
    assert model.request_bytes(task, {"text": "x"}) == len(caught.request.body)
    return caught.request.url, caught.body


async def test_the_request_has_instructions_examples_the_schema_and_a_limit_and_is_not_stored() -> None:
    url, body = await sent(TASK.model_copy(update={"instructions": "Be strict."}), max_tokens=77)
    assert url == "https://api.openai.com/v1/responses"
    assert body["instructions"].startswith("Say which label fits the text.\n\nBe strict.\n\n")
    assert [(turn["role"], json.loads(turn["content"])) for turn in body["input"]] == [
        ("user", {"text": "you won"}),
        ("assistant", {"label": "spam"}),
        ("user", {"text": "x"}),
    ]
    assert body["text"] == {
        "format": {"type": "json_schema", "name": "label", "schema": TASK.output_schema, "strict": True}
    }
    assert (body["model"], body["max_output_tokens"], body["store"], body["temperature"]) == ("m", 77, False, 0)
    assert set(body) == {"model", "instructions", "input", "text", "max_output_tokens", "store", "temperature"}


async def test_null_sends_no_temperature() -> None:
    assert "temperature" not in (await sent(temperature=None))[1]


def test_another_interface_than_these_two_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="api"):
        plugins.build("models", "openai", model="m", api="assistants")


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        (response(HAM), {"label": "ham"}),
        (response({"type": "reasoning", "summary": []}, HAM), {"label": "ham"}),
        (response({"type": "reasoning", "content": [text("no")]}, HAM), {"label": "ham"}),
        (response(message(text('{"label"'), text(': "ham"}'))), {"label": "ham"}),
        (response(message(text("prose"))), None),
        (response(message()), None),
        (response(message(text(None), None, 5)), None),
        (response(None, "x"), None),
        (response(), None),
        ({"output": "x", "status": "completed"}, None),
        ({}, None),
    ],
)
async def test_the_answer_is_the_text_of_the_message(answer: dict[str, Json], output: Json) -> None:
    found = await answered(answer)
    assert found.output == output
    assert (found.problem is None) == (output is not None)


async def test_the_model_that_served_is_the_one_that_openai_names() -> None:  # F55
    assert (await answered(response(HAM))).model == "m-1"


async def test_usage_holds_everything_that_is_billed() -> None:
    details = {"input_tokens_details": {"cached_tokens": 4}, "output_tokens_details": {"reasoning_tokens": 3}}
    usage = (await answered(response(HAM, **details))).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens) == (10, 5, 4, 3)
    for nonsense in ({"output_tokens": None}, {"input_tokens": -1}, {"input_tokens_details": {"cached_tokens": 11}}):
        assert (await answered(response(HAM, **nonsense))).usage is None


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ("incomplete", "max_output_tokens"),
        ("incomplete", None),
        ("in_progress", None),
        ("cancelled", None),
        (None, None),
    ],
)
async def test_what_is_not_completed_is_no_output_even_if_it_is_json(status: Json, why: Json) -> None:
    found = await answered(response(HAM, status=status, why=why))
    assert (found.output, found.finish) == (None, "truncated")
    assert found.problem
    assert found.usage is not None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (response(message({"type": "refusal", "refusal": "I cannot."})), "I cannot."),
        (response(message(text("half")), status="incomplete", why="content_filter"), "half"),
        (response(status="incomplete", why="content_filter"), ""),
    ],
)
async def test_a_refusal_and_a_filter_carry_their_bill(answer: dict[str, Json], said: str) -> None:  # F54
    with pytest.raises(ModelRefused) as caught:
        await answered(answer)
    assert (caught.value.outcome, caught.value.text) == ("answered", said)
    assert caught.value.usage.output_tokens == 5


async def test_a_failed_response_is_no_answer_and_what_it_told_was_billed_is_booked() -> None:
    failed = response(HAM, status="failed") | {"error": {"code": "server_error", "message": "x"}}
    with pytest.raises(OutcomeUnknown, match="server_error") as caught:
        await answered(failed)
    assert (caught.value.outcome, caught.value.text) == ("answered", '{"label": "ham"}')
    assert caught.value.usage.output_tokens == 5


async def test_it_speaks_to_a_server_of_its_format() -> None:
    async with serve_responses([{"label": "ham"}], api_key="sk-key-of-a-test") as server:
        settings = {"model": "m", "api_key": "sk-key-of-a-test", "base_url": server.url, "allow_internal": True}
        for stream in (False, True):
            model = plugins.build("models", "openai", api="responses", stream=stream, **settings)
            assert (await model.answer(TASK, {"text": "x"})).output == {"label": "ham"}
            await model.close()
    assert [seen.body.get("stream") for seen in server.requests] == [None, True]
