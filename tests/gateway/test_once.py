"""One Idempotency-Key, one answer, one call of the remote, one bill (114); metrics and the document beside it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from apprentice.testing.servers import Reply
from apprentice.types import Json

from .conftest import Live, Serving, chat, running

CHAT = "/v1/chat/completions"


async def ask(live: Live, key: str, **more: Json) -> httpx2.Response:
    return await live.client.post(CHAT, json=chat() | more, headers={"idempotency-key": key})


@pytest.mark.parametrize("model", ["task:sort", "gpt-4o-mini"])
async def test_the_same_key_and_body_give_the_same_bytes_for_one_call(serving: Serving, model: str) -> None:
    async with serving([Reply({"kind": "fruit"})]) as live:
        answers = [await ask(live, "k1", model=model) for _ in range(3)]
        streamed = await ask(live, "k1", model=model, stream=True)
        other = await ask(live, "k2", model=model)
        assert len({answer.content for answer in answers}) == 1
        assert answers[0].json()["choices"][0]["message"]["content"]
        assert answers[0].json()["id"] in streamed.text
        assert [answers[0].status_code, other.status_code] == [200, 200]
        assert len(live.provider.requests) == 2
        changed = await ask(live, "k1", model=model, messages=[{"role": "user", "content": "another pear"}])
        assert (changed.status_code, changed.json()["error"]["code"]) == (422, "idempotency_key_reused")


async def test_a_crowd_with_one_key_is_one_call(serving: Serving) -> None:
    async with serving() as live:
        answers = await asyncio.gather(*(ask(live, "k") for _ in range(30)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert len(live.provider.requests) == 1


async def test_of_two_processes_one_works_and_the_other_tells_its_client_to_come_back(serving: Serving) -> None:
    gate = asyncio.Event()
    async with (
        serving([Reply({"kind": "fruit"}, wait=gate)]) as live,
        running(live.config, live.provider, name="second") as other,
    ):
        for model in ("task:sort", "gpt-4o-mini"):
            gate.clear()
            calls = len(live.provider.requests)
            first = asyncio.create_task(ask(live, f"k-{model}", model=model))
            while len(live.provider.requests) == calls:
                await asyncio.sleep(0.01)
            second = await ask(on_behalf(other, live), f"k-{model}", model=model)
            assert (second.status_code, second.json()["error"]["code"]) == (409, "idempotency_in_flight")
            assert second.headers["x-should-retry"] == "true"
            gate.set()
            third = await ask(on_behalf(other, live), f"k-{model}", model=model)
            while third.status_code == 409:
                third = await ask(on_behalf(other, live), f"k-{model}", model=model)
            assert third.content == (await first).content
            assert len(live.provider.requests) == calls + 1


def on_behalf(other: Live, live: Live) -> Live:
    """The other gateway, asked with the first one's key: idempotency keys belong to API keys."""
    other.client.headers["authorization"] = f"Bearer {live.key}"
    return other


async def test_idempotency_keys_belong_to_api_keys(serving: Serving) -> None:
    async with serving() as live:
        other = await live.new_key("other", "call")
        first = await ask(live, "k")
        second = await live.client.post(
            CHAT, json=chat("an otter"), headers={"idempotency-key": "k", "authorization": f"Bearer {other}"}
        )
        assert (first.status_code, second.status_code) == (200, 200)
        assert len(live.provider.requests) == 2


@pytest.mark.parametrize("key", ["", "x" * 201, "x" * 10_000, "with space", "tab\tbed"])
async def test_an_idempotency_key_that_is_none_is_refused(serving: Serving, key: str) -> None:
    async with serving() as live:
        answer = await ask(live, key)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "idempotency-key")


async def test_a_key_with_a_limit_pays_once_for_what_is_repeated(serving: Serving) -> None:
    async with serving() as live:
        key = await live.new_key("poor", "call", total="1")
        headers = {"idempotency-key": "k", "authorization": f"Bearer {key}"}
        answers = [await live.client.post(CHAT, json=chat(), headers=headers) for _ in range(3)]
        holder = next(one for one in live.gateway.keyring._keys if one.name == "poor")
        window = f"task:key:{holder.id}/total"
        cost = round(float(answers[0].headers["x-apprentice-cost-usd"]) * 1e6)
        assert (await live.store.spent([window]))[window] == cost


async def test_metrics_tell_what_the_store_knows_and_what_this_process_did(serving: Serving) -> None:
    async with serving(sections={"budget": {}}) as live:
        await live.client.post(CHAT, json=chat())
        await live.client.post(CHAT, json=chat() | {"n": 2})
        text = (await live.client.get("/metrics")).text
        spent = await live.spent()
    lines = dict(line.rpartition(" ")[::2] for line in text.splitlines() if not line.startswith("#"))
    assert lines['apprentice_requests_total{task="sort"}'] == "1.0"
    assert lines['apprentice_phase{phase="cold_start",task="sort"}'] == "1.0"
    assert float(lines['apprentice_spent_usd{task="sort",window="total"}']) == spent / 1e6
    counted = [line for line in lines if line.startswith("apprentice_http_requests_total")]
    assert {'status="200"' in line for line in counted if CHAT in line} == {True, False}


async def test_ready_says_whether_the_store_answers(serving: Serving) -> None:
    async with serving() as live:
        assert (await live.client.get("/readyz")).json() == {"ready": True}
        assert (await live.client.get("/healthz")).json() == {"alive": True}
        live.gateway.ready = False
        answer = await live.client.get("/readyz")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        live.gateway.ready = True


async def test_the_document_has_every_operation_with_its_role(serving: Serving) -> None:
    async with serving() as live:
        found: Any = (await live.client.get("/openapi.json")).json()
    assert found["paths"]["/v1/tasks/{name}/run"]["post"]["parameters"][0]["schema"]["enum"] == ["sort"]
    assert "operate" in found["paths"]["/v1/tasks/{name}/mode"]["post"]["description"]
    assert "security" not in found["paths"]["/healthz"]["get"]
    assert {"/v1/chat/completions", "/v1/messages", "/v1/feedback", "/metrics", "/openapi.json"} <= set(found["paths"])
