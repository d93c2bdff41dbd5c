from __future__ import annotations

import asyncio
import contextlib
import threading
import unicodedata
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import apsw
import pytest

from apprentice import budget, confidence, plugins
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
    PriceUnknown,
    StoreFull,
    StoreTooNew,
    UnknownTask,
)
from apprentice.shelf import Loaded
from apprentice.testing.servers import Reply, Server, serve_openai
from apprentice.testing.stores import HOSTILE, a_version
from apprentice.types import Answer, Event, Json, Record, Store, Task

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
    assert record.remote is not None
    assert (result.at, result.usage) == (record.at, record.remote.usage)
    assert result.usage is not None
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
    assert all(result == results[0] for result in [*results, again])
    assert len(await stored(config)) == 1


@pytest.mark.parametrize("number", [250, pytest.param(1000, marks=pytest.mark.slow)])
async def test_many_requests_at_once_are_each_answered_and_recorded_once(configured: Configured, number: int) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, local={"learn": "off"})
        asked = texts(number)
        async with Apprentice(config) as app:
            results = await asyncio.gather(*(app.arun("sort", {"text": text}) for text in asked))
        assert [result.output["kind"] for result in results] == [right(text) for text in asked]
        assert len(server.requests) == number
    records = await stored(config)
    assert len({record.request_id for record in records}) == len(records) == number
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
            other = apsw.Connection(str(config.store.path))
            other.set_busy_timeout(10_000)
            for steps in range(8):
                other.execute("BEGIN IMMEDIATE")  # the hold is not booked yet
                asking = asyncio.create_task(app.arun("sort", {"text": "a pear"}))
                for _ in range(steps):
                    await asyncio.sleep(0)
                asking.cancel()
                other.execute("ROLLBACK")
                await asyncio.wait([asking])
            other.close()
        assert server.requests == []
    assert set(await booked(config)) == {"released"}


@pytest.mark.parametrize("error", [KeyError("choices"), TimeoutError("of a socket of its own")])
@pytest.mark.parametrize("deadline", [None, 60.0])
async def test_a_model_plugin_that_breaks_its_promise_leaves_no_hold_and_is_recorded(
    configured: Configured, error: Exception, deadline: float | None
) -> None:
    config = configured()
    async with Apprentice(config) as app:
        await app._calls.close()
        app._calls.providers[0]._model = Broken(error)
        with pytest.raises(OutcomeUnknown, match=type(error).__name__):
            await app.arun("sort", {"text": "a pear"}, deadline=deadline)
    [record] = await stored(config)
    assert [attempt.outcome for attempt in record.attempts] == ["unknown"]
    assert list(await booked(config)) == ["assumed"]


class Broken:
    """A plugin that raises what no plugin may raise."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def request_bytes(self, task: Task, input: Json) -> int:
        return 10

    async def answer(self, task: Task, input: Json) -> Answer:
        raise self._error

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


async def test_a_store_of_a_newer_version_is_refused_when_opening(configured: Configured) -> None:  # F39
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
) -> None:  # F10: the price as well
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


async def test_a_start_that_fails_leaves_no_thread_behind(configured: Configured) -> None:
    before = set(threading.enumerate())
    with pytest.raises(PriceUnknown):
        async with Apprentice(configured(remote={"model": "no-such-model"})):
            pass
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("apprentice-write"):
            thread.join(5)
            assert not thread.is_alive()


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


async def test_a_cap_below_what_is_spent_fails_requests_and_a_raised_one_lets_them_go(
    configured: Configured,
) -> None:  # F22
    async with serve_openai(honest, price=(150_000, 600_000)) as server:

        def capped(dollars: Decimal) -> Apprentice:
            return Apprentice(configured(server.url, budget={"total": dollars, "on_exhausted": "queue", "wait": 0.1}))

        async with capped(Decimal(1)) as before:
            spent = (await before.arun("sort", {"text": "a pear"})).cost
            async with capped(Decimal(spent - 1).scaleb(-6)) as lowered:
                for text in texts(3):
                    with pytest.raises(BudgetExhausted):
                        await lowered.arun("sort", {"text": text})
                assert len(server.requests) == 1
            async with capped(Decimal("0.5")) as raised:
                for text in texts(3):
                    assert (await raised.arun("sort", {"text": text})).output == {"kind": right(text)}
            assert (await before.arun("sort", {"text": "a pear"})).source == "remote"
    assert list(await booked(configured(server.url))) == ["settled"]
    assert [record.error is None for record in await stored(configured(server.url))] == [
        True,
        *[False] * 3,
        *[True] * 4,
    ]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
async def test_an_idempotency_key_is_taken_letter_by_letter(configured: Configured, text: str) -> None:  # F42
    async with serve_openai(honest) as server:
        twins = [text, *{f"{text} ", text.swapcase(), unicodedata.normalize("NFD", text)} - {text}]
        async with Apprentice(configured(server.url, local={"learn": "off"})) as app:
            first = [await app.arun("sort", {"text": "a pear"}, idempotency_key=key) for key in twins]
            again = [await app.arun("sort", {"text": "a pear"}, idempotency_key=key) for key in twins]
        assert again == first
        assert len({result.request_id for result in first}) == len(server.requests) == len(twins)
    assert [record.idempotency_key for record in await stored(configured(server.url))] == twins


async def test_a_full_disk_fails_the_request_before_it_is_sent_and_space_heals_it(
    configured: Configured,
) -> None:  # F32
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


# --- asked twice ------------------------------------------------------------------------------------------------------


class Knowing:
    """A local model that is right, so that a task is in reinforcement at once."""

    async def answer(self, task: Task, input: Json) -> Answer:
        return Answer(output={"kind": right(input["text"])}, model="knowing")

    async def close(self) -> None:
        return None


@contextlib.asynccontextmanager
async def learning(config: Config, share: float = 1.0, *, cold: bool = False, **more: Any) -> AsyncIterator[Apprentice]:
    """An Apprentice whose requests are all audits, of which this share is asked twice."""
    sampling = config.sampling.model_copy(update={"repeat_share": share})
    local = config.local.model_copy(update={"learn": "off"})
    async with Apprentice(config.model_copy(update={"sampling": sampling, "local": local}), **more) as app:
        await app.confidence("sort")
        live = app._tasks["sort"]
        if not cold:
            live.shelf.serving = Loaded(a_version(id="v0"), Knowing())  # another than is watched: nothing is certified
            confidence.start_version(live.state, live.settings, "v1", [])
        yield app


async def test_an_audit_asked_twice_is_scored_paid_and_counted_and_both_calls_are_made_at_once(
    configured: Configured,
) -> None:
    gate = asyncio.Event()
    async with serve_openai([Reply({"kind": "fruit"}, wait=gate)]) as server:
        config = configured(server.url)
        async with learning(config) as app:
            asking = asyncio.create_task(app.arun("sort", {"text": "a pear"}))
            await arrived(server, 2)  # neither waits for the other
            gate.set()
            result = await asking
            [record] = await stored(config)
            assert record.repeat is not None and record.repeat.value == 1.0
            assert sorted(attempt.purpose for attempt in record.attempts) == ["repeat", "serve"]
            assert {attempt.outcome for attempt in record.attempts} == {"answered"}
            assert record.cost == result.cost == sum(attempt.cost for attempt in record.attempts)
            assert await booked(config) == {"settled": record.cost}
            assert sum(app._tasks["sort"].state.repeats_low) == 1
            assert (await app._store.changes(0)).evidence[0].repeat == 1.0
        assert len(server.requests) == 2
    assert result.output == {"kind": "fruit"}


async def test_a_remote_that_contradicts_itself_is_found_out_and_the_caller_has_its_first_answer(
    configured: Configured,
) -> None:
    async with serve_openai([{"kind": "fruit"}, {"kind": "tool"}]) as server:
        config = configured(server.url, remote={"concurrency": 1})  # so that the first is the first
        async with learning(config) as app:
            assert (await app.arun("sort", {"text": "a pear"})).output == {"kind": "fruit"}
    [record] = await stored(config)
    assert record.remote is not None and record.remote.output == {"kind": "fruit"}
    assert record.score is not None and record.score.value == 1.0
    assert record.repeat is not None and record.repeat.value == 0.0


@pytest.mark.parametrize(
    "second",
    [
        Reply(status=503, code="server_is_overloaded", headers={"retry-after": "0"}),
        Reply(status=401, code="invalid_api_key"),
        Reply("prose"),
        Reply("no", finish="refused"),
        Reply({"kind": "fruit"}, reset=True, cut=0),
    ],
)
async def test_a_second_call_that_fails_is_a_missing_label_and_nothing_else(
    configured: Configured, second: Reply
) -> None:
    async with serve_openai([{"kind": "fruit"}, second]) as server:
        config = configured(server.url, remote={"concurrency": 1})
        async with learning(config) as app:
            result = await app.arun("sort", {"text": "a pear"})
        assert len(server.requests) == 2, "it is not tried again"
    [record] = await stored(config)
    assert (result.output, result.source, record.error, record.repeat) == ({"kind": "fruit"}, "remote", None, None)
    assert [attempt.purpose for attempt in record.attempts] == ["serve", "repeat"]
    assert record.cost == sum((await booked(config)).values())


async def test_a_second_call_that_hangs_ends_with_the_deadline_and_the_answer_is_there(configured: Configured) -> None:
    never = asyncio.Event()
    async with serve_openai([{"kind": "fruit"}, Reply(wait=never)]) as server:
        config = configured(server.url, remote={"concurrency": 1})
        async with learning(config) as app:
            result = await app.arun("sort", {"text": "a pear"}, deadline=0.5)
    assert result.output == {"kind": "fruit"}
    assert (await booked(config)).keys() == {"settled", "assumed"}


async def test_a_second_answer_of_another_remote_is_no_label(configured: Configured) -> None:
    async with serve_openai(["prose", {"kind": "fruit"}]) as first, serve_openai(honest) as other:
        config = configured(first.url, remote={"concurrency": 1})
        fallback = config.remote.model_copy(update={"base_url": other.url, "model": "gpt-4o"})
        remote = config.remote.model_copy(update={"additional_providers": (fallback,)})
        async with learning(config.model_copy(update={"remote": remote})) as app:
            assert (await app.arun("sort", {"text": "a pear"})).output == {"kind": "fruit"}
        assert (len(first.requests), len(other.requests)) == (2, 1)
    [record] = await stored(config)
    assert record.repeat is None


async def test_when_the_first_answer_does_not_come_the_second_call_is_called_off_and_recorded(
    configured: Configured,
) -> None:
    never = asyncio.Event()
    async with serve_openai([Reply(status=401, code="invalid_api_key"), Reply(wait=never)]) as server:
        config = configured(server.url)
        async with learning(config) as app:
            with pytest.raises((ModelRejected, DeadlineExceeded)):  # whichever of the two arrives first
                await app.arun("sort", {"text": "a pear"}, deadline=1)
    [record] = await stored(config)
    assert {attempt.purpose for attempt in record.attempts} == {"serve", "repeat"}
    assert record.cost == sum((await booked(config)).values())
    assert "held" not in await booked(config)


async def test_cancelling_a_request_that_is_asked_twice_ends_both_calls_and_both_are_recorded(
    configured: Configured,
) -> None:
    never = asyncio.Event()
    async with serve_openai([Reply({"kind": "fruit"}, wait=never)]) as server:
        config = configured(server.url)
        async with learning(config) as app:
            asking = asyncio.create_task(app.arun("sort", {"text": "a pear"}))
            await arrived(server, 2)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
    [record] = await stored(config)
    assert sorted(attempt.purpose for attempt in record.attempts) == ["repeat", "serve"]
    assert await booked(config) == {"assumed": record.cost}


async def test_a_second_call_is_not_made_where_the_caps_leave_room_for_the_requests_alone(
    configured: Configured,
) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, remote={"retries": 0})
        async with learning(config) as app:
            await app.arun("sort", {"text": "a pear"})
            model, price = app._calls.providers[0].model(), app._calls.providers[0].price
            worst = budget.worst_case(price, model.request_bytes(config.tasks[0].task, {"text": "a pear"}), 64)
        spent = (await booked(config))["settled"]
        # Room for the request and its second asking: not enough, because the next request must not go without.
        total = Decimal(spent + 2 * worst).scaleb(-6)
        async with learning(
            config.model_copy(update={"budget": config.budget.model_copy(update={"total": total})})
        ) as app:
            assert (await app.arun("sort", {"text": "a pear"})).source == "remote"
        assert len(server.requests) == 3
    first, second = await stored(config)
    assert first.repeat is not None
    assert (second.repeat, second.error, len(second.attempts)) == (None, None, 1)


async def test_only_audits_are_asked_twice_in_the_share_that_is_configured(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url)
        async with learning(config, share=0.25, seed=1) as app:
            for text in texts(80):
                await app.arun("sort", {"text": text})
            repeated = sum(record.repeat is not None for record in await stored(config))
            assert len(server.requests) == 80 + repeated
            assert 10 <= repeated <= 30
            app._tasks["sort"].shelf.withdraw()  # nobody to compare with: no audit
            for text in texts(20, seed=2):
                await app.arun("sort", {"text": text})
            assert len(server.requests) == 100 + repeated


async def test_without_second_askings_no_coin_is_thrown_for_them(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        async with learning(configured(server.url), share=0.0, seed=1) as app:
            for text in texts(5):
                await app.arun("sort", {"text": text})
            drawn = app._dice.random()
        assert len(server.requests) == 5
    dice = Random(1)
    assert drawn == [dice.random() for _ in range(6)][-1]


async def test_answers_that_cannot_be_compared_with_themselves_are_served_all_the_same(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judge_of_nothing.py").write_text("def score(answer, reference):\n    raise ValueError('never')\n")
    monkeypatch.syspath_prepend(tmp_path)
    async with serve_openai(honest) as server:
        config = configured(server.url)
        task = config.tasks[0].model_copy(
            update={"evaluator": {"name": "custom", "function": "judge_of_nothing:score"}}
        )
        async with learning(config.model_copy(update={"tasks": (task,)})) as app:
            assert (await app.arun("sort", {"text": "a pear"})).output == {"kind": "fruit"}
    [record] = await stored(config)
    assert record.repeat is None and "never" in str(record.error)


# --- caps that cannot pay ---------------------------------------------------------------------------------------------


async def test_caps_that_cannot_pay_for_the_contract_are_said_once_a_window(configured: Configured) -> None:
    now = [1_795_219_260.0]  # a minute after midnight
    async with serve_openai(honest) as server:
        config = configured(server.url, budget={"daily": Decimal("0.5"), "monthly": Decimal(10**6)})
        async with learning(config, share=0.0, clock=lambda: now[0]) as app:

            async def ask(n: int) -> list[Event]:
                for text in texts(n):
                    now[0] += 1.0
                    await app.arun("sort", {"text": text})
                await app.idle()
                return [event for event in await app._store.events("sort") if event.name == "INFEASIBLE"]

            assert await ask(99) == []
            [said] = await ask(1)
            assert said.key == f"INFEASIBLE/{said.evidence['window']}" == "INFEASIBLE/day:2026-11-21"
            assert (said.evidence["needed"], said.evidence["audits"]) == (1.0, 1.0)
            assert 0 < said.evidence["affordable"] < 1
            assert f"{said.evidence['affordable']:.0%} of the requests" in said.message
            assert await ask(100) == [said]
            now[0] += 86_400.0
            await app._calls.purse.foresee(config.tasks[0], gap=1.0, level=0.9)
            assert [event.evidence["needed"] for event in await ask(1)] == [1.0, 0.9]


@pytest.mark.parametrize(("daily", "cold"), [(Decimal(1), False), (Decimal("0.05"), True)])
async def test_caps_that_can_pay_are_not_spoken_of_nor_is_a_task_that_is_still_cold(
    configured: Configured, daily: Decimal, cold: bool
) -> None:
    now = [1_795_219_260.0]
    async with serve_openai(honest) as server:
        config = configured(server.url, budget={"daily": daily})
        async with learning(config, share=0.0, cold=cold, clock=lambda: now[0]) as app:
            for text in texts(100):
                now[0] += 20.0
                await app.arun("sort", {"text": text})
            await app.idle()
            assert await app._store.events("sort") == []
