"""OpenAI's own client against a live gateway."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from typing import Any

import openai
import pytest

from apprentice.testing.servers import Reply
from apprentice.types import Json

from .conftest import Live, Serving, chat


def sdk(live: Live, **more: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=live.key, base_url=f"{live.url}/v1", **({"max_retries": 0} | more))


ASK: Any = chat()


async def test_a_task_is_asked_like_a_model_and_answers_with_its_output_as_json(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        raw = await client.chat.completions.with_raw_response.create(**ASK)
        said = raw.parse()
        [record] = await live.records()
    [choice] = said.choices
    assert json.loads(choice.message.content or "") == {"kind": "fruit"}
    assert (choice.finish_reason, said.model, said.object) == ("stop", "task:sort", "chat.completion")
    assert said.usage is not None and record.remote is not None and record.remote.usage is not None
    assert said.usage.prompt_tokens == record.remote.usage.input_tokens > 0
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    assert record.tags == {"key": "tests"}
    assert {
        name: raw.headers.get(f"x-apprentice-{name}") for name in ("request-id", "source", "phase", "cost-usd")
    } == {
        "request-id": record.request_id,
        "source": "remote",
        "phase": "cold_start",
        "cost-usd": f"{record.cost / 1e6:.6f}",
    }


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_plain_model_name_says_all_that_there_is_to_say_of_its_answer(
    serving: Serving, key: str | None
) -> None:
    async with serving([Reply("hello")]) as live, sdk(live) as client:
        more = {} if key is None else {"idempotency-key": key}
        ask = ASK | {"model": "gpt-4o-mini"}
        create = client.chat.completions.with_raw_response.create
        answers = [await create(**ask, extra_headers=more) for _ in range(1 if key is None else 2)]
        [record] = await live.records("passthrough")
    for answer in answers:
        own = {name: value for name, value in answer.headers.items() if name.startswith("x-apprentice-")}
        assert own == {
            "x-apprentice-request-id": record.request_id,
            "x-apprentice-source": "remote",
            "x-apprentice-phase": record.decision.phase,
            "x-apprentice-cost-usd": f"{record.cost / 1e6:.6f}",
        }


async def test_a_stream_is_the_same_answer_in_pieces(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        whole = await client.chat.completions.create(**ASK)
        stream = await client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    told = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert told[0].delta.role == "assistant"
    assert told[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    "content",
    ['{"text": "a pear"}', "a pear", [{"type": "text", "text": "a "}, {"type": "text", "text": "pear"}], '["a pear"]'],
)
async def test_the_input_is_the_last_message_of_the_user_as_json_or_the_text_of_a_task_of_one_text(
    serving: Serving, content: Json
) -> None:
    async with serving() as live:
        body = chat("something else")
        body["messages"] += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": content}]
        answer = await live.client.post("/v1/chat/completions", json=body)
        [record] = await live.records()
    assert answer.status_code == 200, answer.text
    assert record.input == {"text": '["a pear"]' if content == '["a pear"]' else "a pear"}


async def test_models_are_the_tasks_and_the_configured_remotes(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        names = [model.id async for model in client.models.list()]
        assert names == ["task:sort", "gpt-4o-mini"]
        assert (await client.models.retrieve("task:sort")).owned_by == "apprentice"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
            await client.models.retrieve("gpt-9")


async def test_a_plain_model_name_is_passed_through_held_recorded_and_paid_for(serving: Serving) -> None:
    async with serving([Reply("hello")]) as live, sdk(live) as client:
        messages: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
        said = await client.chat.completions.create(
            model="gpt-4o-mini", messages=messages, temperature=0.5, max_tokens=7, seed=3
        )
        stream = await client.chat.completions.create(model="openai/gpt-4o-mini", messages=messages, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        first, second = await live.records("passthrough")
        spent, seen, bill = await live.spent(), live.provider.requests, live.provider.bill
    assert (said.choices[0].message.content, "".join(pieces)) == ("hello", "hello")
    assert seen[0].body == {
        "model": "gpt-4o-mini",
        "messages": messages,
        "temperature": 0.5,
        "seed": 3,
        "max_tokens": 7,
    }
    assert seen[1].body["max_tokens"] == 64  # what is configured bounds what it can cost
    assert "stream" not in seen[1].body
    assert first.input == seen[0].body
    assert first.cost + second.cost == spent
    assert abs(spent - bill) <= 2  # each is rounded up


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"base_url": "http://evil"}, "base_url"),
        ({"api_base": "http://evil"}, "api_base"),
        ({"api_key": "sk-1"}, "api_key"),
        ({"extra_headers": {"a": "b"}}, "extra_headers"),
        ({"user_config": {}}, "user_config"),
        ({"model": "http://169.254.169.254/"}, "model"),
        ({"model": "openai/../x"}, "model"),
        ({"model": "openai//x"}, "model"),
        ({"model": ""}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"model": "gpt-4o-mini", "max_tokens": 65}, "max_tokens"),
        ({"n": 8}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"model": "gpt-4o-mini", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "system", "content": "only"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages"),
    ],
)
async def test_what_a_body_must_not_say_is_a_400_that_names_the_field_and_connects_nowhere(
    serving: Serving, change: dict[str, Json], field: str
) -> None:
    async with serving() as live:
        answer = await live.client.post("/v1/chat/completions", json=chat() | change)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith(field)
        assert answer.headers["x-should-retry"] == "false"
        assert live.provider.connections == 0
        assert await live.spent() == 0


async def test_unknown_tasks_and_models_are_not_found(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        for name, hint in (("task:sotr", "did you mean 'sort'"), ("gpt-9", "task:sort, gpt-4o-mini")):
            with pytest.raises(openai.NotFoundError, match=hint):
                await client.chat.completions.create(model=name, messages=ASK["messages"])


@pytest.mark.parametrize(
    ("reply", "kind", "status"),
    [
        (Reply("prose"), openai.InternalServerError, 502),
        (Reply(status=429, code="rate_limit_exceeded", headers={"retry-after": "30"}), openai.InternalServerError, 503),
        (Reply(status=429, code="insufficient_quota"), openai.InternalServerError, 503),
        (Reply("no", finish="refused"), openai.UnprocessableEntityError, 422),
        (Reply(status=401, code="invalid_api_key"), openai.InternalServerError, 502),
    ],
)
async def test_what_the_remote_did_wrong_is_told_as_such(
    serving: Serving, reply: Reply, kind: type[openai.APIStatusError], status: int
) -> None:
    async with serving([reply], {"remote": {"retries": 0}}) as live, sdk(live) as client:
        with pytest.raises(kind) as told:
            await client.chat.completions.create(**ASK)
        [record] = await live.records()
    assert told.value.status_code == status
    assert record.error
    if reply.headers:
        assert told.value.response.headers["retry-after"] == "30"


async def test_a_relayed_request_that_the_provider_finds_wrong_is_the_clients_mistake(serving: Serving) -> None:
    reply = Reply(status=400, code="invalid_request_error")
    async with serving([reply]) as live, sdk(live) as client:
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="gpt-4o-mini", messages=ASK["messages"])
        assert await live.spent() == 0
        [record] = await live.records("passthrough")
    assert record.served is None and record.error


async def test_money_that_is_gone_is_a_429_that_says_when_there_is_more_and_is_not_retried(serving: Serving) -> None:
    async with serving(sections={"budget": {"daily": Decimal(0)}}) as live, sdk(live, max_retries=2) as client:
        for model in ("task:sort", "gpt-4o-mini"):
            with pytest.raises(openai.RateLimitError) as told:
                await client.chat.completions.create(model=model, messages=ASK["messages"])
            assert told.value.type == "insufficient_quota"
            assert 0 < int(told.value.response.headers["retry-after"]) <= 86_400
        assert live.provider.requests == []


async def test_capture_off_pays_and_keeps_nothing_of_what_was_said(serving: Serving) -> None:
    async with serving([Reply("hello")]) as live, sdk(live) as client:
        off = {"x-apprentice-capture": "off"}
        raw = await client.chat.completions.with_raw_response.create(
            model="gpt-4o-mini", messages=ASK["messages"], extra_headers=off
        )
        assert await live.records("passthrough") == []
        assert await live.spent() == round(float(raw.headers["x-apprentice-cost-usd"]) * 1e6) > 0
        again = off | {"idempotency-key": "k"}
        with pytest.raises(openai.BadRequestError, match="has to be recorded"):
            await client.chat.completions.create(**ASK, extra_headers=again)


async def test_a_task_with_capture_off_answers_and_counts_and_keeps_no_word(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        text = "please look at the canaryword pear"
        said = await client.chat.completions.create(**chat(text), extra_headers={"x-apprentice-capture": "off"})
        assert json.loads(said.choices[0].message.content or "") == {"kind": "fruit"}
        assert said.usage is not None and said.usage.total_tokens > 0
        [record] = await live.records()
        assert (record.input, record.remote and record.remote.output, record.served) == (None, None, "remote")
        assert record.cost == await live.spent() > 0
        assert "canaryword" not in record.model_dump_json() and "fruit" not in record.model_dump_json()
        assert await live.store.count("sort", labelled=True) == 0
        body = {"request_id": record.request_id, "metric_name": "approved", "value": True}
        assert (await live.client.post("/v1/feedback", json=body)).status_code == 400


async def test_a_tag_of_a_header_is_in_the_record(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        await client.chat.completions.create(**ASK, extra_headers={"X-Apprentice-Tag-Team": "billing"})
        [record] = await live.records()
    assert record.tags == {"team": "billing", "key": "tests"}


async def test_an_asynchronous_crowd_gets_each_its_own_answer(serving: Serving) -> None:
    async with serving() as live, sdk(live) as client:
        words = ["pear", "otter", "chisel"] * 8

        async def ask(number: int, word: str) -> str:
            said = await client.chat.completions.create(**chat(f"the {word} number {number}"))
            return str(json.loads(said.choices[0].message.content or "")["kind"])

        kinds = await asyncio.gather(*(ask(number, word) for number, word in enumerate(words)))
        assert len(await live.records()) == len(words)
    assert kinds == ["fruit", "animal", "tool"] * 8
