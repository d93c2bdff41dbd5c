"""One Idempotency-Key, one answer, one call of the remote, one bill (114); metrics and the document beside it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import pytest

from apprentice import plugins
from apprentice.gateway import keys
from apprentice.gateway.once import DAY, Once
from apprentice.gateway.refusals import Refusal
from apprentice.testing.servers import Reply, Server, asked, serve_openai
from apprentice.types import Json, Store

from ..conftest import right
from .conftest import Live, Serving, chat, running
from .test_serve import configure, new_key, process, seen

CHAT = "/v1/chat/completions"


def said(body: dict[str, Json]) -> str:
    content = body["messages"][-1]["content"]
    return str(asked(body)["text"]) if content.startswith("{") else content


def truthful(body: dict[str, Json]) -> Json:
    """A remote that knows the answer, however it is asked."""
    return {"kind": right(said(body))}


async def ask(live: Live, key: str, **more: Json) -> httpx2.Response:
    return await live.client.post(CHAT, json=chat() | more, headers={"idempotency-key": key})


@pytest.mark.parametrize("model", ["task:sort", "gpt-4o-mini"])
async def test_the_same_key_and_body_give_the_same_bytes_for_one_call(serving: Serving, model: str) -> None:  # F114
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


async def test_a_crowd_with_one_key_is_one_call(serving: Serving) -> None:  # F114
    async with serving() as live:
        answers = await asyncio.gather(*(ask(live, "k") for _ in range(30)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert len(live.provider.requests) == 1


async def test_of_two_processes_one_works_and_the_other_tells_its_client_to_come_back(serving: Serving) -> None:  # F114
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


async def test_idempotency_keys_belong_to_api_keys(serving: Serving) -> None:  # F114
    async with serving() as live:
        other = await live.new_key("other", "call")
        first = await ask(live, "k")
        second = await live.client.post(
            CHAT, json=chat("an otter"), headers={"idempotency-key": "k", "authorization": f"Bearer {other}"}
        )
        assert (first.status_code, second.status_code) == (200, 200)
        assert len(live.provider.requests) == 2


@pytest.mark.parametrize("key", ["", "x" * 201, "x" * 10_000, "with space", "tab\tbed"])
async def test_an_idempotency_key_that_is_none_is_refused(serving: Serving, key: str) -> None:  # F114
    async with serving() as live:
        answer = await ask(live, key)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "idempotency-key")


async def test_a_key_with_a_limit_pays_once_for_what_is_repeated(serving: Serving) -> None:
    async with serving() as live:
        key = await live.new_key("poor", "call", total="1")
        headers = {"idempotency-key": "k", "authorization": f"Bearer {key}"}
        answers = [await live.client.post(CHAT, json=chat(), headers=headers) for _ in range(3)]
        holder = next(one for one in await keys.known(live.store) if one.name == "poor")
        window = f"task:key:{holder.id}/total"
        cost = round(float(answers[0].headers["x-apprentice-cost-usd"]) * 1e6)
        assert (await live.store.spent([window]))[window] == cost


# --- failures: a key is free again where no model worked on its request ------------------------------------------------


@pytest.mark.parametrize("model", ["task:sort", "gpt-4o-mini"])
async def test_a_request_that_was_turned_away_leaves_its_key_free(serving: Serving, model: str) -> None:
    turned_away = Reply(status=401, code="invalid_api_key")
    async with serving([turned_away, Reply({"kind": "fruit"})]) as live:
        first = await ask(live, "k", model=model)
        assert first.status_code >= 400
        second, third = await ask(live, "k", model=model), await ask(live, "k", model=model)
        assert (second.status_code, third.content) == (200, second.content)
        assert len(live.provider.requests) == 2


@pytest.mark.parametrize("model", ["task:sort", "gpt-4o-mini"])
async def test_a_request_of_which_nobody_knows_whether_it_was_billed_is_never_sent_again(
    serving: Serving, model: str
) -> None:
    async with serving([Reply({"kind": "fruit"}, cut=30), Reply({"kind": "fruit"}, cut=30), Reply()]) as live:
        first = await ask(live, "k", model=model)
        calls = len(live.provider.requests)  # with the retries that belong to the one request
        assert first.status_code >= 500 and calls >= 1
        for _ in range(3):
            again = await ask(live, "k", model=model)
            assert (again.status_code, again.json()["error"]["code"]) == (409, "idempotency_conflict")
            assert again.headers["x-should-retry"] == "false"
        assert len(live.provider.requests) == calls


# --- a day ------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("model", ["task:sort", "gpt-4o-mini"])
async def test_a_key_is_good_for_a_day_and_then_as_good_as_new(serving: Serving, model: str) -> None:  # F114
    clock = Clock()
    async with serving(truthful, clock=clock) as live:
        first = await ask(live, "k", model=model)
        for later in (DAY / 2, DAY / 2 - 1):
            clock.now += later
            assert (await ask(live, "k", model=model)).content == first.content
        assert len(live.provider.requests) == 1
        clock.now += 2
        other = chat("please look at the otter number 2")["messages"]
        second = await ask(live, "k", model=model, messages=other)
        assert (second.status_code, len(live.provider.requests)) == (200, 2)
        assert (await ask(live, "k", model=model, messages=other)).content == second.content
        assert (await ask(live, "k", model=model)).status_code == 422
        assert len(live.provider.requests) == 2


async def test_what_was_interrupted_is_unknown_to_everybody_for_a_day(tmp_path: Path) -> None:
    store: Store = plugins.build("stores", "sqlite", path=tmp_path / "store.db")
    clock, begun, never = Clock(), asyncio.Event(), asyncio.Event()
    first, second = (Once(store, owner, 60, clock) for owner in ("first", "second"))

    async def work() -> None:
        async with first.turn("sort", "tests//k"):
            begun.set()
            await never.wait()

    task = asyncio.create_task(work())
    await begun.wait()
    with pytest.raises(Refusal) as refused:
        await stack(second)
    assert (refused.value.status, refused.value.code, refused.value.retryable) == (409, "idempotency_in_flight", True)
    task.cancel()
    await asyncio.wait([task])
    for later in (0.0, 61.0, DAY - 62):
        clock.now += later
        for once in (first, second):
            with pytest.raises(Refusal) as refused:
                await stack(once)
            assert (refused.value.status, refused.value.code, refused.value.retryable) == (
                409,
                "outcome_unknown",
                False,
            )
    clock.now += 2
    assert await stack(second) == f"tests//k/{int(clock.now // DAY)}"
    await store.close()


async def stack(once: Once) -> str | None:
    """The name under which this one would record its answer."""
    async with once.turn("sort", "tests//k") as (key, before):
        assert before is None
        return key


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def calls(provider: Server) -> Counter[str]:
    """How often the provider was asked for each text."""
    return Counter(said(request.body) for request in provider.requests)


async def heard(
    client: httpx2.AsyncClient, key: str, body: dict[str, Json], over: asyncio.Event
) -> httpx2.Response | None:
    """What a client hears in the end that comes again as long as it is told to; None when it is `over` before that."""
    async with asyncio.timeout(300):
        while not over.is_set():
            with contextlib.suppress(httpx2.TransportError):
                answer = await client.post(CHAT, json=body, headers={"idempotency-key": key})
                if answer.headers.get("x-should-retry") != "true":
                    return answer
            await asyncio.sleep(0.05)
    return None


async def settled(client: httpx2.AsyncClient, key: str, body: dict[str, Json]) -> httpx2.Response:
    answer = await heard(client, key, body, asyncio.Event())
    assert answer is not None
    return answer


async def test_a_killed_process_leaves_no_key_under_which_a_second_call_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # F114
    hang = asyncio.Event()

    async def answer(body: dict[str, Json]) -> Json | Reply:
        return Reply(truthful(body), wait=hang) if "otter" in said(body) else Reply({"kind": "fruit"})

    done, lost = chat("please look at the pear number 1"), chat("please look at the otter number 2")
    async with serve_openai(answer) as provider:
        config = configure(tmp_path, provider.url)
        key = await new_key(config, capsys)
        brief = ("--timeout", "3", "--grace", "1")
        models = ("task:sort", "gpt-4o-mini")
        async with process(config, *brief, key=key) as (running, client):
            answered = [await settled(client, "done", done | {"model": model}) for model in models]
            tasks = [asyncio.create_task(client.post(CHAT, json=lost | {"model": model}, headers={"idempotency-key": "lost"}))
                     for model in models]  # fmt: skip
            await seen(provider, 4)
            running.kill()
            for task in tasks:
                with pytest.raises(httpx2.TransportError):
                    await task
        async with process(config, *brief, key=key) as (_, client):
            for model, before in zip(models, answered, strict=True):
                assert before.status_code == 200
                assert (await settled(client, "done", done | {"model": model})).content == before.content
                assert (await settled(client, "done", lost | {"model": model})).status_code == 422
                told = await settled(client, "lost", lost | {"model": model})
                assert (told.status_code, told.json()["error"]["code"]) == (409, "outcome_unknown")
                assert "24 hours" in told.json()["error"]["message"]
            assert sum(calls(provider).values()) == 4
            hang.set()
            assert (await settled(client, "fresh", lost)).status_code == 200


@pytest.mark.slow
async def test_kills_at_any_moment_never_make_a_second_call_under_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # F114
    dice = Random(1)
    async with serve_openai(truthful) as provider:
        config = configure(tmp_path, provider.url)
        key = await new_key(config, capsys)
        bodies = {f"k{n}": chat(f"please look at the pear number {n}") for n in range(240)}
        for number, name in enumerate(bodies):
            bodies[name]["model"] = ("task:sort", "gpt-4o-mini")[number % 2]
        known: dict[str, httpx2.Response] = {}
        names = list(bodies)
        for round in range(12):
            async with process(config, "--timeout", "8", "--grace", "1", key=key) as (running, client):
                some, over = names[: 20 * (round + 1)], asyncio.Event()
                asking = [asyncio.create_task(heard(client, name, bodies[name], over)) for name in some]
                if round < 11:
                    least = len(provider.requests) + dice.randrange(1, 20)
                    while len(provider.requests) < least and not all(task.done() for task in asking):
                        await asyncio.sleep(0.001)
                    running.kill()
                    over.set()
                for name, answer in zip(some, await asyncio.gather(*asking), strict=True):
                    if answer is not None:
                        if name in known and known[name].status_code == 200:
                            assert answer.content == known[name].content
                        known[name] = answer
        assert set(known) == set(names)
        codes = Counter(answer.status_code for answer in known.values())
        # 409: it was under way when the process was killed, perhaps not even sent. 504: it took longer than it may.
        assert set(codes) <= {200, 409, 504} and codes[200] > 10, codes
        assert max(calls(provider).values()) == 1


@pytest.mark.slow
async def test_ten_thousand_duplicates_are_two_hundred_calls(serving: Serving) -> None:  # F114
    async with serving(truthful) as live, running(live.config, live.provider, name="second") as other:
        both = (live, on_behalf(other, live))
        slots = asyncio.Semaphore(64)
        bodies: dict[str, set[bytes]] = {}

        async def one(number: int) -> None:
            name = f"k{number % 200}"
            body = chat(
                f"please look at the pear number {number % 200}", model=("task:sort", "gpt-4o-mini")[number % 2]
            )
            async with slots:
                answer = await settled(both[number % 7 == 0].client, name, body)
            assert answer.status_code == 200
            bodies.setdefault(name, set()).add(answer.content)

        await asyncio.gather(*(one(number) for number in range(10_000)))
        assert len(bodies) == 200 and {len(some) for some in bodies.values()} == {1}
        assert len(live.provider.requests) == 200


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
