"""What goes to Anthropic and what is made of its answers, beyond the promises of every provider."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from apprentice import plugins, wire
from apprentice.errors import ModelRefused
from apprentice.testing.models import TASK
from apprentice.testing.servers import serve_anthropic
from apprentice.types import Answer, Json, Task


class Caught:
    """A client that keeps the request and answers with one message."""

    def __init__(self, answer: dict[str, Json] | bytes) -> None:
        self.request: wire.Request | None = None
        self._answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
        self.request = request
        return wire.Reply(200, {}, self._answer)

    async def close(self) -> None:
        return None


def call(input: Json) -> dict[str, Json]:
    return {"type": "tool_use", "id": "t", "name": "label", "input": input}


def message(*blocks: Json, stop: str = "tool_use", **usage: Json) -> dict[str, Json]:
    counted = {"input_tokens": 10, "output_tokens": 5} | usage
    return {"type": "message", "model": "m-1", "content": list(blocks), "stop_reason": stop, "usage": counted}


async def answered(answer: dict[str, Json] | bytes, task: Task = TASK) -> Answer:
    model = plugins.build("models", "anthropic", model="m", client=Caught(answer))
    found: Answer = await model.answer(task, {"text": "x"})
    return found


async def test_the_request_forces_one_call_of_one_tool_with_the_tasks_schema() -> None:
    caught = Caught(message(call({})))
    model = plugins.build("models", "anthropic", model="m", api_key="k", client=caught, max_tokens=77)
    await model.answer(TASK, {"text": "x"})
    assert caught.request is not None
    assert caught.request.url == "https://api.anthropic.com/v1/messages"
    assert caught.request.headers["x-api-key"] == "k"
    assert caught.request.headers["anthropic-version"] == "2023-06-01"
    body = json.loads(caught.request.body)
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 77, 0)
    assert [(tool["name"], tool["input_schema"]) for tool in body["tools"]] == [("label", TASK.output_schema)]
    assert body["tool_choice"] == {"type": "tool", "name": "label", "disable_parallel_tool_use": True}
    assert body["system"].startswith(TASK.description)


async def test_examples_are_calls_with_results_so_that_the_api_accepts_them() -> None:
    caught = Caught(message(call({})))
    examples = tuple({"input": {"text": str(n)}, "output": {"label": str(n)}} for n in range(2))
    task = TASK.model_copy(update={"examples": examples})
    await plugins.build("models", "anthropic", model="m", client=caught).answer(task, {"text": "x"})
    messages = json.loads(caught.request.body if caught.request else b"")["messages"]
    assert [turn["role"] for turn in messages] == ["user", "assistant", "user", "assistant", "user"]
    for number in (0, 1):
        use, after = messages[2 * number + 1]["content"][0], messages[2 * number + 2]["content"][0]
        assert use["input"] == {"label": str(number)}
        assert (after["type"], after["tool_use_id"]) == ("tool_result", use["id"])
    assert json.loads(messages[4]["content"][1]["text"]) == {"text": "x"}


async def test_the_bound_covers_the_prompt_that_anthropic_adds_for_tools() -> None:
    caught = Caught(message(call({})))
    model = plugins.build("models", "anthropic", model="m", client=caught)
    await model.answer(TASK, {"text": "x"})
    assert caught.request is not None
    assert model.request_bytes(TASK, {"text": "x"}) >= len(caught.request.body) + 804  # its largest tool prompt


async def test_cached_tokens_are_part_of_the_input() -> None:
    answer = await answered(message(call({}), cache_read_input_tokens=100, cache_creation_input_tokens=20))
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.cached_tokens, answer.usage.output_tokens) == (130, 100, 5)


@pytest.mark.parametrize("usage", [{"input_tokens": None}, {"output_tokens": -1}, {"cache_read_input_tokens": "7"}])
async def test_a_usage_that_cannot_be_true_is_none(usage: dict[str, Json]) -> None:
    assert (await answered(message(call({}), **usage))).usage is None


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        (message(call({"label": "ham"})), {"label": "ham"}),
        (message({"type": "text", "text": "Let me see."}, call({"label": "ham"})), {"label": "ham"}),
        (message({"type": "text", "text": '{"label": "ham"}'}, stop="end_turn"), {"label": "ham"}),
        (message({"type": "text", "text": "Let me see."}, stop="end_turn"), None),
        (message(call({"label": "\ud800"})), None),
        (message(call(None)), None),
        (message(stop="end_turn"), None),
        (message(None, "x", {}, stop="end_turn"), None),
        ({"type": "message"}, None),
        ({}, None),
    ],
)
async def test_the_answer_is_the_input_of_the_tool(answer: dict[str, Json], output: Json) -> None:
    found = await answered(answer)
    assert found.output == output
    assert (found.problem is None) == (output is not None)


async def test_a_number_beyond_all_floats_is_no_json_and_flagged() -> None:  # F62
    whole = json.dumps(message(call({"label": "huge"}))).encode().replace(b'"huge"', b"1e999")
    found = await answered(whole)
    assert (found.output, found.problem) == (None, "the answer is not JSON")
    assert found.usage is not None


async def test_what_is_no_object_is_wrapped_and_unwrapped_again() -> None:
    task = TASK.model_copy(update={"output_schema": {"type": "string"}, "examples": ()})
    assert (await answered(message(call({"value": "ham"})), task)).output == "ham"


@pytest.mark.parametrize("stop", ["max_tokens", "model_context_window_exceeded", "pause_turn"])
async def test_a_cut_answer_is_no_output(stop: str) -> None:
    found = await answered(message(call({"label": "ham"}), stop=stop))
    assert (found.output, found.finish) == (None, "truncated")


async def test_a_refusal_carries_its_bill() -> None:  # F54
    with pytest.raises(ModelRefused) as caught:
        await answered(message({"type": "text", "text": "No."}, stop="refusal"))
    assert (caught.value.outcome, caught.value.text, caught.value.usage.input_tokens) == ("answered", "No.", 10)


async def test_it_speaks_to_a_server_of_its_format() -> None:
    async with serve_anthropic([{"label": "ham"}], api_key="k") as server:
        model = plugins.build("models", "anthropic", model="m", api_key="k", base_url=server.url, allow_internal=True)
        assert (await model.answer(TASK, {"text": "x"})).output == {"label": "ham"}
        await model.close()
    assert server.requests[0].headers["x-api-key"] == "k"
