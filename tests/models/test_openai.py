"""What goes to OpenAI and what is made of its answers, beyond the promises of every provider."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apprentice import plugins, wire
from apprentice.errors import ConfigError, ModelRefused, ModelUnavailable, OutcomeUnknown, OutOfMoney
from apprentice.models import as_json, parse, shape
from apprentice.models.openai import is_strict
from apprentice.testing.models import TASK
from apprentice.testing.servers import Reply, serve_openai
from apprentice.types import Answer, Json, Task


class Caught:
    """A client that keeps what it was given and answers with one message."""

    def __init__(self, **answer: Json) -> None:
        self.request: wire.Request | None = None
        self._answer = answer

    async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
        self.request = request
        return wire.Reply(200, {}, json.dumps(self._answer).encode())

    async def close(self) -> None:
        raise AssertionError("a client that was handed in is its owner's to close")

    @property
    def body(self) -> dict[str, Json]:
        assert self.request is not None
        found: dict[str, Json] = json.loads(self.request.body)
        return found


def said(content: Json, reason: str = "stop", **usage: Json) -> dict[str, Json]:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": reason}
    return {"choices": [choice], "model": "m-1", "usage": {"prompt_tokens": 10, "completion_tokens": 5} | usage}


async def sent(task: Task, input: Json, **settings: Any) -> dict[str, Json]:
    caught = Caught(**said("{}"))
    model = plugins.build("models", "openai", model="m", client=caught, **settings)
    await model.answer(task, input)
    await model.close()
    assert model.request_bytes(task, input) == len(caught.request.body if caught.request else b"")
    return caught.body


async def answered(task: Task = TASK, **answer: Json) -> Answer:
    model = plugins.build("models", "openai", model="m", client=Caught(**answer))
    found: Answer = await model.answer(task, {"text": "x"})
    return found


def returning(schema: dict[str, Json]) -> Task:
    return TASK.model_copy(update={"output_schema": schema, "examples": ()})


async def test_the_prompt_is_instructions_examples_and_the_input_as_json() -> None:
    task = TASK.model_copy(update={"instructions": "Be strict."})
    body = await sent(task, {"text": 'say "hi"\n'})
    system, *turns = body["messages"]
    assert system["role"] == "system"
    assert system["content"].startswith("Say which label fits the text.\n\nBe strict.\n\n")
    assert [(turn["role"], json.loads(turn["content"])) for turn in turns] == [
        ("user", {"text": "you won"}),
        ("assistant", {"label": "spam"}),
        ("user", {"text": 'say "hi"\n'}),
    ]


async def test_the_tasks_schema_is_asked_for_and_strictly_where_it_can_be() -> None:
    form = (await sent(TASK, {"text": "x"}))["response_format"]
    assert form == {
        "type": "json_schema",
        "json_schema": {"name": "label", "schema": TASK.output_schema, "strict": True},
    }
    loose = await sent(returning({"type": "object"}), {"text": "x"})
    assert loose["response_format"]["json_schema"]["strict"] is False


async def test_a_schemas_name_has_only_letters_that_are_allowed() -> None:
    body = await sent(TASK.model_copy(update={"name": "tri age/ü" + "x" * 99}), {"text": "x"})
    assert body["response_format"]["json_schema"]["name"] == ("tri_age__" + "x" * 99)[:64]


@pytest.mark.parametrize(
    ("base_url", "name"),
    [
        (None, "max_completion_tokens"),
        ("https://eu.api.openai.com/v1", "max_completion_tokens"),
        ("https://mine.openai.azure.com/openai/v1", "max_completion_tokens"),
        ("https://api.deepseek.com/v1", "max_tokens"),
        ("https://notopenai.com/v1", "max_tokens"),
    ],
)
async def test_the_limit_of_the_answer_has_the_name_that_the_server_knows(base_url: str | None, name: str) -> None:
    body = await sent(TASK, {"text": "x"}, base_url=base_url, max_tokens=77)
    assert {key: value for key, value in body.items() if "tokens" in key} == {name: 77}


async def test_the_temperature_is_zero_unless_told_and_null_sends_none() -> None:
    assert (await sent(TASK, {"text": "x"}))["temperature"] == 0
    assert (await sent(TASK, {"text": "x"}, temperature=0.7))["temperature"] == 0.7
    assert "temperature" not in await sent(TASK, {"text": "x"}, temperature=None)


async def test_without_a_key_no_authorization_is_sent() -> None:
    async with serve_openai([{"label": "ham"}]) as server:
        model = plugins.build("models", "openai", model="m", base_url=server.url, allow_internal=True)
        await model.answer(TASK, {"text": "x"})
        await model.close()
    assert "authorization" not in server.requests[0].headers


@pytest.mark.parametrize("key", ["", " ", "sk-1\n", "sk-1 ", " sk-1", "sk-\x00", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_a_configuration_error_that_hides_it(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plugins.build("models", "openai", model="m", api_key=key)
    assert "sk-" not in str(caught.value)
    assert "schl" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}},
        {"enum": ["a", "b"]},
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
        {"type": "array", "items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"type": "integer"}}},
        {},
    ],
)
async def test_what_is_no_object_is_wrapped_for_the_provider_and_unwrapped_again(schema: dict[str, Json]) -> None:
    asked = (await sent(returning(schema), {"text": "x"}))["response_format"]["json_schema"]["schema"]
    assert asked["type"] == "object"
    assert set(asked["properties"]) == {"value"}
    assert asked.get("$defs") == schema.get("$defs")
    for value in ("a", [1], {"value": 3, "more": 4}):
        assert (await answered(returning(schema), **said(json.dumps({"value": value})))).output == value
    assert (await answered(returning(schema), **said('"bare"'))).output == "bare"


def test_an_object_behind_a_reference_is_not_wrapped() -> None:
    schema = {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object"}}}
    assert shape(schema) == (schema, False)
    assert shape({"$ref": "#/$defs/gone", "$defs": {}}).wrapped
    assert shape({"$ref": "#/$defs/word", "$defs": {"word": {"type": "string"}}}).wrapped


@pytest.mark.parametrize(
    ("answer", "input_tokens", "output_tokens", "cached", "reasoning"),
    [
        (said("{}"), 10, 5, 0, 0),
        (said("{}", prompt_tokens_details={"cached_tokens": 4}), 10, 5, 4, 0),
        (said("{}", completion_tokens_details={"reasoning_tokens": 3}), 10, 5, 0, 3),
        (said("{}", prompt_tokens_details=None, completion_tokens_details={}), 10, 5, 0, 0),
        (said("{}", prompt_tokens_details=[]), 10, 5, 0, 0),
        (said("{}", total_tokens=15), 10, 5, 0, 0),
        # reasoning counted beside the completion, as some compatible servers do
        (said("{}", total_tokens=45, completion_tokens_details={"reasoning_tokens": 30}), 10, 35, 0, 30),
    ],
)
async def test_usage_holds_everything_that_is_billed(
    answer: dict[str, Json], input_tokens: int, output_tokens: int, cached: int, reasoning: int
) -> None:
    usage = (await answered(**answer)).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (input_tokens, output_tokens)
    assert (usage.cached_tokens, usage.reasoning_tokens) == (cached, reasoning)


@pytest.mark.parametrize(
    "usage",
    [
        None, [], "10", {}, {"prompt_tokens": 10}, {"prompt_tokens": "10", "completion_tokens": 5},
        {"prompt_tokens": 10.5, "completion_tokens": 5}, {"prompt_tokens": True, "completion_tokens": 5},
        {"prompt_tokens": -1, "completion_tokens": 5}, {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": 10**30, "completion_tokens": 5}, {"prompt_tokens": 10, "completion_tokens": 10**13},
        {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 11}},
    ],
)  # fmt: skip
async def test_a_usage_that_cannot_be_true_is_none(usage: Json) -> None:
    assert (await answered(**(said("{}") | {"usage": usage}))).usage is None


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ('{"label": "ham"}', {"label": "ham"}),
        ('  {"label": "ham"}\n', {"label": "ham"}),
        ('```json\n{"label": "ham"}\n```', {"label": "ham"}),
        ('```\n{"label": "ham"}\n```\n', {"label": "ham"}),
        ('{"label": "```json"}', {"label": "```json"}),
        ('Sure!\n```json\n{"label": "ham"}\n```', None),
        ('```json\n{"label": "ham"}', None),
        ('{"label": "ham"} {"label": "spam"}', None),
        ("{'label': 'ham'}", None),
        ('{"label": Infinity}', None),
        ('{"label": "\\ud800"}', None),
        ('{"label": "\\ud83d\\ude00"}', {"label": "\U0001f600"}),
        ("null", None),
        ("", None),
        ("[" * 100_000, None),
        ("9" * 5_000, None),
    ],
)
async def test_json_is_read_also_in_a_fence_and_nothing_else_is_guessed(text: str, output: Json) -> None:
    answer = await answered(**said(text))
    assert answer.output == output
    assert (answer.problem is None) == (output is not None)
    assert answer.text == text
    assert answer.usage is not None


@given(text=st.text())
def test_no_text_breaks_the_parser(text: str) -> None:
    value, problem = parse(text)
    assert value is None or problem is None


@given(
    digits=st.integers(1, 350),
    fraction=st.integers(0, 3),
    exponent=st.none() | st.integers(-400, 400),
    sign=st.booleans(),
)
@example(digits=250, fraction=0, exponent=99, sign=False)
def test_no_number_beyond_every_float_is_an_answer(
    digits: int, fraction: int, exponent: int | None, sign: bool
) -> None:
    part = f".{'1' * fraction}" if fraction else ""
    power = "" if exponent is None else f"e{'+' if sign and exponent >= 0 else ''}{exponent}"
    text = f"{'-' if sign else ''}{'9' * digits}{part}{power}"
    value, problem = parse(text)
    is_whole = not part and not power
    if is_whole or math.isfinite(float(text)):
        assert (value, problem) == (int(text) if is_whole else float(text), None)
    else:
        assert (value, problem) == (None, "the answer is not JSON")


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_every_value_survives_its_json(value: Json) -> None:
    assert json.loads(as_json(value).encode()) == value


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"choices": []}, {"choices": None}, {"choices": "x"}, {"choices": [None]}, {"choices": [{}]},
        {"choices": [{"message": None}]}, {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": {"content": [{"type": "text"}]}}]},
        {"choices": [{"message": {"content": 5}}], "model": 7},
    ],
)  # fmt: skip
async def test_an_answer_of_another_shape_has_no_output_and_no_usage(answer: dict[str, Json]) -> None:
    found = await answered(**answer)
    assert (found.output, found.usage, found.model) == (None, None, "m")
    assert found.problem


async def test_an_error_with_a_status_of_success_is_told_as_one() -> None:
    table = (("server_error", OutcomeUnknown, True), ("insufficient_quota", OutOfMoney, False))
    for code, kind, retryable in table:
        with pytest.raises(kind, match="in a 200") as caught:
            await answered(error={"message": "in a 200", "code": code})
        assert (caught.value.outcome, caught.value.retryable) == ("unknown", retryable)


async def test_a_cut_answer_is_no_output_even_if_it_is_json() -> None:
    for reason in ("length", "model_length", "insufficient_system_resource", "abort", "error"):
        answer = await answered(**said('{"label": "ham"}', reason))
        assert (answer.output, answer.finish) == (None, "truncated")
        assert "cut off" in str(answer.problem)


async def test_the_model_that_served_is_the_one_that_the_server_names() -> None:  # F55
    assert (await answered(**said("{}"))).model == "m-1"


@pytest.mark.parametrize(
    ("message", "reason", "text"),
    [
        ({"content": None, "refusal": "I cannot."}, "stop", "I cannot."),
        ({"content": "half of it"}, "content_filter", "half of it"),
        ({"content": None}, "content_filter", ""),
    ],
)
async def test_a_refusal_and_a_filter_carry_their_bill(message: dict[str, Json], reason: str, text: str) -> None:  # F54
    answer = said("") | {"choices": [{"message": message, "finish_reason": reason}]}
    with pytest.raises(ModelRefused) as caught:
        await answered(**answer)
    assert (caught.value.outcome, caught.value.text) == ("answered", text)
    assert caught.value.usage.output_tokens == 5
    with pytest.raises(ModelRefused) as caught:
        await answered(**answer | {"usage": None})
    assert (caught.value.outcome, caught.value.usage) == ("answered_no_usage", None)


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        (TASK.output_schema, True),
        ({"type": "object", "properties": {}, "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, False),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}, False),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}, False),
        ({"type": "array", "items": {"type": "object"}}, False),
        ({"type": "array"}, False),
        ({"type": "array", "items": {"enum": [1, 2]}}, True),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, True),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, False),
        ({"type": ["string", "null"]}, True),
        ({"type": "string", "minLength": 3}, False),
        ({"type": "integer", "minimum": 3}, True),
        ({"allOf": [{"type": "string"}]}, False),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}, False),
        ({"type": "object", "patternProperties": {}}, False),
        (True, False),
    ],
)
def test_strict_is_asked_for_only_where_openai_allows_it(schema: Json, strict: bool) -> None:
    assert is_strict(schema) is strict


async def test_money_that_is_gone_is_not_retried_and_a_rate_limit_is() -> None:  # F45, F46
    table = (("insufficient_quota", OutOfMoney, False), ("rate_limit_exceeded", ModelUnavailable, True))
    for code, kind, retryable in table:
        async with serve_openai([Reply(status=429, code=code)]) as server:
            model = plugins.build("models", "openai", model="m", base_url=server.url, allow_internal=True)
            with pytest.raises(kind, match=code) as caught:
                await model.answer(TASK, {"text": "x"})
            await model.close()
        assert caught.value.retryable is retryable
