"""Anthropic's own client against a live gateway."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import pytest

from apprentice.config import Config
from apprentice.testing.servers import Reply, serve_anthropic

from ..conftest import YAML
from .conftest import Live, Serving, running

ASK: Any = {
    "model": "task:sort",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "please look at the otter number 1"}],
}


def sdk(live: Live, **more: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(api_key=live.key, base_url=live.url, **({"max_retries": 0} | more))


async def test_a_task_answers_with_a_message_whole_and_streamed(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        whole = await client.messages.create(**ASK)
        async with client.messages.stream(**ASK) as stream:
            said = [text async for text in stream.text_stream]
            last = await stream.get_final_message()
        first, _ = await live.records()
    [block] = whole.content
    assert block.type == "text"
    assert json.loads(block.text) == {"kind": "animal"}
    assert "".join(said) == block.text
    assert [one.text for one in last.content if one.type == "text"] == [block.text]
    assert (whole.stop_reason, last.stop_reason) == ("end_turn", "end_turn")
    assert first.remote is not None and first.remote.usage is not None
    assert whole.usage.input_tokens == first.remote.usage.input_tokens
    assert last.usage.output_tokens == whole.usage.output_tokens > 0
    assert first.input == {"text": "please look at the otter number 1"}


async def test_the_models_are_listed_in_its_shape_too(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        assert [model.id async for model in client.models.list()] == ["task:sort", "gpt-4o-mini"]


async def test_errors_have_its_shape(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        with pytest.raises(anthropic.NotFoundError) as told:
            await client.messages.create(**ASK | {"model": "task:nothing"})
        assert told.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        assert told.value.request_id
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            await client.messages.create(**ASK | {"max_tokens": 0})
        with pytest.raises(anthropic.BadRequestError, match=r"openai's"):
            await client.messages.create(**ASK | {"model": "gpt-4o-mini"})
        with pytest.raises(anthropic.AuthenticationError):
            await client.with_options(api_key="wrong").messages.create(**ASK)
        answer = await live.client.get("/v1/messages")
        assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")


async def test_a_plain_model_name_is_passed_through_with_its_tools(configured: Callable[..., Config]) -> None:
    tools: Any = [{"name": "look", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}]
    call = {"id": "t1", "type": "tool_use", "name": "look", "input": {"at": "the moon, which is far away"}}
    whole = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5",
        "content": [{"type": "text", "text": "let me see"}, call],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 11, "output_tokens": 7},
    }
    text = YAML.replace("provider: openai", "provider: anthropic").replace("gpt-4o-mini", "claude-haiku-4-5")
    async with serve_anthropic([Reply(raw=json.dumps(whole).encode())]) as provider:
        config = configured(provider.url, text=text, local={"learn": "off"})
        async with running(config, provider) as live, sdk(live) as client:
            ask = ASK | {"model": "claude-haiku-4-5", "max_tokens": 50, "tools": tools}
            said = await client.messages.create(**ask)
            async with client.messages.stream(**ask) as stream:
                last = await stream.get_final_message()
            assert await live.spent() > 0
            [seen, _] = live.provider.requests
    assert said.to_dict() == whole
    first, tool = last.content
    assert first.type == "text" and first.text == "let me see"
    assert tool.type == "tool_use" and (tool.id, tool.name, tool.input) == ("t1", "look", call["input"])
    assert last.stop_reason == "tool_use"
    assert seen.body == {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": ASK["messages"], "tools": tools}
    assert seen.headers["anthropic-version"] == "2023-06-01"
