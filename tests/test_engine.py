from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import apsw
import pytest

from apprentice import plugins
from apprentice.config import Config
from apprentice.engine import Apprentice
from apprentice.errors import (
    ApprenticeError,
    BudgetExhausted,
    ConfigError,
    DeadlineExceeded,
    IdempotencyConflict,
    InvalidAnswer,
    InvalidInput,
    ModelRefused,
    ModelRejected,
    ModelUnavailable,
    OutcomeUnknown,
    StoreFull,
    StoreTooNew,
    UnknownTask,
)
from apprentice.testing.servers import Reply, Server, serve_openai
from apprentice.types import Answer, Json, Record, Store, Task

from .conftest import YAML, honest, right, texts
from .stores.test_sqlite import Disk

Configured = Callable[..., Config]


async def stored(config: Config) -> list[Record]:
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    try:
        return [record for _, record in await store.records("sort")]
    finally:
        await store.close()


async def booked(config: Config) -> dict[str, int]:
    """What the ledger says, by the state of the attempts."""
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    try:
        found: dict[str, int] = {}
        for line in await store.spending():
            found[line.state] = found.get(line.state, 0) + line.cost
        return found
    finally:
        await store.close()


async def test_a_cold_task_is_answered_by_the_remote_and_recorded_with_its_price(configured: Configured) -> None:
    async with serve_openai(honest, price=(150_000, 600_000)) as server:
        config = configured(server.url)
        async with Apprentice(config) as app:
            result = await app.arun("sort", {"text": "a ripe pear"}, tags={"team": "a"})
        [record] = await stored(config)
    assert (result.output, result.source) == ({"kind": "fruit"}, "remote")
    assert record.request_id == result.request_id
    assert record.tags == {"team": "a"}
    assert record.decision.reason == "no_local_model"
    assert record.cost == result.cost > 0
    assert abs(record.cost - server.bill) <= 1  # ours is rounded up to a micro-dollar


@pytest.mark.parametrize(
    ("task", "input", "error", "said"),
    [
        ("sort", {"text": ""}, InvalidInput, "text"),
        ("sort", {"text": "  \n"}, InvalidInput, "text"),
        ("sort", {}, InvalidInput, "text"),
        ("sort", {"text": 5}, InvalidInput, "text"),
        ("sort", {"text": "x", "colour": "red"}, InvalidInput, "colour"),
        ("sort", {"text": "half \ud800"}, InvalidInput, "surrogate"),
        ("sort", "just a text", InvalidInput, "dict"),
        ("sort", {"text": "x" * 2_000_001}, InvalidInput, "max_input_bytes"),
        ("sotr", {"text": "x"}, UnknownTask, "sort"),
    ],
)
async def test_what_cannot_be_asked_is_refused_before_anything_is_sent_or_booked(
    configured: Configured, task: str, input: Json, error: type[Exception], said: str
) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        async with Apprentice(config) as app:
            with pytest.raises(error, match=said):
                await app.arun(task, input)
        assert server.requests == []
        assert await booked(config) == {}
        assert await stored(config) == []


@pytest.mark.parametrize("text", ["a pear\0", "a pear " + "x" * 1_000_000, "a pear 🍐 \u202e"])
async def test_strange_but_sound_text_is_sent_and_recorded_as_it_is(configured: Configured, text: str) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        async with Apprentice(config) as app:
            assert (await app.arun("sort", {"text": text})).output == {"kind": "fruit"}
    [record] = await stored(config)
    assert record.input == {"text": text}


@pytest.mark.parametrize(
    ("reply", "error", "state"),
    [
        (Reply("I think it is a fruit."), InvalidAnswer, "settled"),
        (Reply('{"kind": "fru'), InvalidAnswer, "settled"),
        (Reply({"kind": "metal"}), InvalidAnswer, "settled"),
        (Reply({"sort": "fruit"}), InvalidAnswer, "settled"),
        (Reply('{"kind": "fruit"}', finish="truncated"), InvalidAnswer, "settled"),
        (Reply("no", finish="refused"), ModelRefused, "settled"),
        (Reply(status=401, code="invalid_api_key"), ModelRejected, "released"),
        (Reply("prose", silent=True), InvalidAnswer, "assumed"),
    ],
)
async def test_a_useless_answer_is_an_error_that_is_recorded_and_paid_for_as_the_provider_says(
    configured: Configured, reply: Reply, error: type[Exception], state: str
) -> None:
    async with serve_openai([reply]) as server:
        config = configured(server.url, remote={"retries": 0})
        async with Apprentice(config) as app:
            with pytest.raises(error):
                await app.arun("sort", {"text": "a pear"})
    [record] = await stored(config)
    assert record.served is None
    assert record.error is not None and record.error.startswith(error.__name__)
    assert list(await booked(config)) == [state]
    assert record.cost == (await booked(config))[state]


async def test_an_overloaded_remote_is_asked_again_and_only_the_answer_is_paid(configured: Configured) -> None:
    overloaded = Reply(status=503, code="server_is_overloaded", headers={"retry-after": "0"})
    async with serve_openai([overloaded, {"kind": "fruit"}]) as server:
        config = configured(server.url)
        async with Apprentice(config) as app:
            result = await app.arun("sort", {"text": "a pear"})
        assert len(server.requests) == 2
    [record] = await stored(config)
    assert [attempt.outcome for attempt in record.attempts][-1] == "answered"
    assert result.cost == sum(attempt.cost for attempt in record.attempts)


async def test_the_next_provider_is_asked_when_the_first_one_is_down(configured: Configured) -> None:
    async with serve_openai([Reply(status=401, code="invalid_api_key")]) as broken, serve_openai(honest) as good:
        config = configured(broken.url)
        second = config.remote.model_copy(update={"base_url": good.url})
        remote = config.remote.model_copy(update={"additional_providers": (second,)})
        async with Apprentice(config.model_copy(update={"remote": remote})) as app:
            assert (await app.arun("sort", {"text": "a pear"})).output == {"kind": "fruit"}
        assert (len(broken.requests), len(good.requests)) == (1, 1)


async def test_one_idempotency_key_is_one_call_also_for_concurrent_requests(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        async with Apprentice(config) as app:
            asking = [app.arun("sort", {"text": "a pear"}, idempotency_key="k") for _ in range(20)]
            results = await asyncio.gather(*asking)
            again = await app.arun("sort", {"text": "a pear"}, idempotency_key="k")
            with pytest.raises(IdempotencyConflict):
                await app.arun("sort", {"text": "an otter"}, idempotency_key="k")
        assert len(server.requests) == 1
    assert {result.request_id for result in [*results, again]} == {results[0].request_id}
    assert len(await stored(config)) == 1


async def test_a_thousand_requests_at_once_are_each_answered_and_recorded_once(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, local={"learn": "off"})
        asked = texts(1000)
        async with Apprentice(config) as app:
            results = await asyncio.gather(*(app.arun("sort", {"text": text}) for text in asked))
        assert [result.output["kind"] for result in results] == [right(text) for text in asked]
        assert len(server.requests) == 1000
    records = await stored(config)
    assert len({record.request_id for record in records}) == len(records) == 1000
    assert sum(record.cost for record in records) == sum(result.cost for result in results)
    assert list(await booked(config)) == ["settled"]


async def test_a_cancelled_request_is_recorded_and_its_hold_counts_as_spent(configured: Configured) -> None:
    never = asyncio.Event()
    async with serve_openai([Reply({"kind": "fruit"}, wait=never)]) as server:
        config = configured(server.url)
        async with Apprentice(config) as app:
            asking = asyncio.create_task(app.arun("sort", {"text": "a pear"}))
            await arrived(server)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
    [record] = await stored(config)
    assert record.error == "cancelled by the caller"
    assert list(await booked(config)) == ["assumed"]


async def test_a_deadline_ends_the_call_and_its_hold_counts_as_spent(configured: Configured) -> None:
    never = asyncio.Event()
    async with serve_openai([Reply({"kind": "fruit"}, wait=never)]) as server:
        config = configured(server.url)
        async with Apprentice(config) as app:
            with pytest.raises(DeadlineExceeded):
                await app.arun("sort", {"text": "a pear"}, deadline=0.2)
    assert list(await booked(config)) == ["assumed"]


async def test_a_deadline_that_passes_before_the_call_is_sent_costs_nothing(configured: Configured) -> None:
    never = asyncio.Event()
    async with serve_openai([Reply({"kind": "fruit"}, wait=never)]) as server:
        config = configured(server.url, remote={"concurrency": 1})
        async with Apprentice(config) as app:
            with pytest.raises(DeadlineExceeded):
                await app.arun("sort", {"text": "a plum"}, deadline=-1)
            first = asyncio.create_task(app.arun("sort", {"text": "a pear"}, deadline=0.4))
            await arrived(server)
            with pytest.raises(DeadlineExceeded, match="before the call could be sent"):
                await app.arun("sort", {"text": "an otter"}, deadline=0.1)  # waits for the only call in flight
            with pytest.raises(DeadlineExceeded):
                await first
        assert len(server.requests) == 1
    assert sorted(record.cost > 0 for record in await stored(config)) == [False, False, True]
    assert (await booked(config)).keys() == {"released", "assumed"}


async def test_a_request_that_is_cancelled_before_it_is_sent_leaves_no_hold(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        async with Apprentice(config) as app:
            await app.confidence("sort")  # opened
            for steps in range(8):
                asking = asyncio.create_task(app.arun("sort", {"text": "a pear"}))
                for _ in range(steps):
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.wait([asking])
        assert server.requests == []
    assert set(await booked(config)) == {"released"}


async def test_a_model_plugin_that_breaks_its_promise_leaves_no_hold_and_is_recorded(configured: Configured) -> None:
    config = configured()
    async with Apprentice(config) as app:
        await app._calls.close()
        app._calls.providers[0]._model = Broken()
        with pytest.raises(OutcomeUnknown, match="KeyError"):
            await app.arun("sort", {"text": "a pear"})
    [record] = await stored(config)
    assert [attempt.outcome for attempt in record.attempts] == ["unknown"]
    assert list(await booked(config)) == ["assumed"]


class Broken:
    """A plugin that raises what no plugin may raise."""

    def request_bytes(self, task: Task, input: Json) -> int:
        return 10

    async def answer(self, task: Task, input: Json) -> Answer:
        raise KeyError("choices")

    async def close(self) -> None:
        return None


@pytest.mark.parametrize("inside", [True, False])
async def test_closing_waits_for_the_requests_in_flight(configured: Configured, inside: bool) -> None:
    gate = asyncio.Event()
    async with serve_openai([Reply({"kind": "fruit"}, wait=gate)] * 3) as server:
        config = configured(server.url)
        app = Apprentice(config)
        if inside:
            await app.__aenter__()
        asking = [asyncio.create_task(app.arun("sort", {"text": f"a pear {i}"})) for i in range(3)]
        await arrived(server, 3)
        closing = [asyncio.create_task(app.aclose()) for _ in range(2)]
        await asyncio.wait(closing, timeout=0.2)
        gate.set()
        assert [result.source for result in await asyncio.gather(*asking)] == ["remote"] * 3
        async with asyncio.timeout(10):
            await asyncio.gather(*closing)
        with pytest.raises(ApprenticeError, match="closed"):
            await app.arun("sort", {"text": "a pear"})
    assert len(await stored(config)) == 3
    assert list(await booked(config)) == ["settled"]


async def test_one_key_in_two_processes_is_one_answer_and_both_costs_are_recorded(configured: Configured) -> None:
    gate = asyncio.Event()
    async with serve_openai([Reply({"kind": "fruit"}, wait=gate)] * 2) as server:
        config = configured(server.url)
        async with Apprentice(config) as one, Apprentice(config) as two:
            asking = [
                asyncio.create_task(app.arun("sort", {"text": "a pear"}, idempotency_key="k")) for app in (one, two)
            ]
            await arrived(server, 2)
            with pytest.raises(DeadlineExceeded, match="not answered yet"):
                await one.arun("sort", {"text": "a pear"}, idempotency_key="k", deadline=0.1)
            gate.set()
            first, second = await asyncio.gather(*asking)
    assert first == second
    records = await stored(config)
    assert sorted(record.idempotency_key or "" for record in records) == ["", "k"]
    assert sum(record.cost for record in records) == (await booked(config))["settled"]


async def test_a_store_of_a_newer_version_is_refused_when_opening(configured: Configured) -> None:
    config = configured()
    async with Apprentice(config) as app:
        await app.confidence("sort")
    file = apsw.Connection(str(config.store.path))
    file.pragma("user_version", 1_000_000)
    file.close()
    with pytest.raises(StoreTooNew) as caught:
        async with Apprentice(config):
            pass
    assert caught.value.hint


async def arrived(server: Server, requests: int = 1) -> None:
    """Wait until the server has read so many requests."""
    async with asyncio.timeout(10):
        while len(server.requests) < requests:
            await asyncio.sleep(0.005)


# --- doors -------------------------------------------------------------------------------------------------------------


async def test_run_works_inside_a_running_loop_and_in_threads(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        app = Apprentice(configured(server.url))
        outputs: list[Json] = []

        def ask(text: str) -> None:
            outputs.append(app.run("sort", {"text": text}).output)

        def from_inside_a_loop() -> None:
            async def inside() -> None:
                ask("a pear")  # blocking, in a thread whose loop is running, as in a notebook
                outputs.append((await app.arun("sort", {"text": "an otter"})).output)

            asyncio.run(inside())

        threads = [threading.Thread(target=from_inside_a_loop), *(threading.Thread(target=ask, args=("a drill",)),) * 1]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        await asyncio.to_thread(app.close)
    assert sorted(output["kind"] for output in outputs) == ["animal", "fruit", "tool"]


async def test_a_blocking_run_in_its_own_loop_is_an_error_that_says_what_to_do(configured: Configured) -> None:
    async with Apprentice(configured()) as app:
        with pytest.raises(ApprenticeError, match="wait for itself") as caught:
            app.run("sort", {"text": "a pear"})
    assert caught.value.hint is not None and "arun" in caught.value.hint


async def test_the_decorator_asks_the_task_with_the_arguments(configured: Configured) -> None:
    async with serve_openai(honest) as server:

        def use() -> tuple[Any, Any]:
            with Apprentice(configured(server.url)) as app:

                @app.task("sort")
                def sort(text: str) -> Any:
                    """What kind of thing."""

                @app.task("sort")
                async def asort(text: str = "a heron") -> Any: ...

                with pytest.raises(ConfigError, match="colour"):

                    @app.task("sort")
                    def wrong(colour: str) -> Any: ...

                return sort("a pear"), asyncio.run(asort())

        assert await asyncio.to_thread(use) == ({"kind": "fruit"}, {"kind": "animal"})


async def test_what_is_missing_to_serve_fails_before_the_first_request(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        async with Apprentice(configured(remote={"api_key_env": "NO_SUCH_KEY"})):
            pass
    with pytest.raises(ConfigError, match="nowhere"):
        async with Apprentice(configured(local={"backend": "nowhere"})):
            pass
    with pytest.raises(ConfigError, match=r"tasks\[0\].*kind") as unlearnable:
        text = YAML.replace("{kind: [fruit, animal, tool]}", "{kind: str}").replace(
            "exact_match", "semantic_similarity"
        )
        async with Apprentice(configured(text=text)):
            pass
    assert unlearnable.value.hint
    with pytest.raises(ApprenticeError, match="price") as caught:
        async with Apprentice(configured(remote={"model": "no-such-model"})):
            pass
    assert type(caught.value).__name__ == "PriceUnknown"


async def test_a_remote_that_is_not_there_costs_nothing(configured: Configured) -> None:
    config = configured("http://127.0.0.1:9", remote={"retries": 0})
    async with Apprentice(config) as app:
        with pytest.raises(ModelUnavailable):
            await app.arun("sort", {"text": "a pear"})
    assert await booked(config) == {"released": 0}


async def test_a_cap_stops_calls_before_they_are_sent(configured: Configured) -> None:
    async with serve_openai(honest, price=(150_000, 600_000)) as server:
        config = configured(server.url, budget={"daily": Decimal("0.0002")}, local={"learn": "off"})
        async with Apprentice(config) as app:
            with pytest.raises(BudgetExhausted):
                for text in texts(50):
                    await app.arun("sort", {"text": text})
        assert 0 < server.bill <= 200
        records = await stored(config)
        assert len(records) == len(server.requests) + 1
    assert records[-1].error is not None and records[-1].error.startswith("BudgetExhausted")


async def test_a_full_disk_fails_the_request_before_it_is_sent_and_space_heals_it(configured: Configured) -> None:
    disk = Disk()
    try:
        async with serve_openai(honest) as server:
            config = configured(server.url)
            async with Apprentice(config) as app:
                await app.arun("sort", {"text": "a pear"})
                disk.fail = lambda act, _: apsw.FullError() if act == "write" else None
                for text in ("an otter", "a drill"):
                    with pytest.raises(StoreFull) as caught:
                        await app.arun("sort", {"text": text})
                    assert caught.value.retryable
                assert len(server.requests) == 1, "nothing is sent that cannot be booked"
                disk.fail = lambda act, _: None
                assert (await app.arun("sort", {"text": "a heron"})).output == {"kind": "animal"}
            assert [record.input["text"] for record in await stored(config)] == ["a pear", "a heron"]
            assert list(await booked(config)) == ["settled"]
    finally:
        disk.unregister()
