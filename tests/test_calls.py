"""Which remote is asked, how often, and when not: over real sockets, with the server's own count as the judge."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from copy import deepcopy
from datetime import UTC, datetime
from decimal import Decimal
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import apsw
import genai_prices
import pytest
from benches.money import CONTEXT, PRELOAD, start
from genai_prices.data_snapshot import DataSnapshot, get_snapshot, set_custom_snapshot

from apprentice import budget, plugins
from apprentice.calls import Calls, linear
from apprentice.config import Config, Price, Remote
from apprentice.engine import new_id
from apprentice.errors import (
    BudgetError,
    BudgetExhausted,
    ConfigError,
    DeadlineExceeded,
    ModelUnavailable,
    OutOfMoney,
    StoreBusy,
    StoreError,
)
from apprentice.testing.formats import FORMATS, Said
from apprentice.testing.servers import Reply, serve_openai
from apprentice.throttle import FAILURES, RETRIES, SAVED
from apprentice.types import Answer, Attempt, Json, Seconds, Spending, Store, Usage
from tests.conftest import YAML, honest
from tests.stores.test_sqlite import Disk, broken

type Configured = Callable[..., Config]


class Asking:
    """The remotes of a configuration."""

    def __init__(self, config: Config, store: Store) -> None:
        self.config, self.store = config, store
        self.calls = Calls(config, store, clock=lambda: 1.8e9, new_id=new_id, dice=Random(3))
        self.attempts: list[Attempt] = []

    async def ask(self, *, within: Seconds | None = None) -> Answer:
        task, input = self.config.tasks[0], {"text": "a pear"}
        until = None if within is None else asyncio.get_running_loop().time() + within
        return await self.calls.ask(task, input, purpose="serve", deadline=until, attempts=self.attempts)

    @property
    def worst(self) -> int:
        """The most that one call of the first remote can cost."""
        first = self.calls.providers[0]
        size = first.model().request_bytes(self.config.tasks[0].task, {"text": "a pear"})
        return budget.worst_case(first.price, size, first.remote.max_tokens)

    async def booked(self) -> list[tuple[str, int]]:
        """State and cost of what the ledger has, by state."""
        lines: list[Spending] = await self.store.spending()
        return sorted((line.state, line.cost) for line in lines)


@asynccontextmanager
async def asking(config: Config, tmp_path: Path, wait: float = 30.0) -> AsyncIterator[Asking]:
    store: Store = plugins.build("stores", "sqlite", path=tmp_path / "calls.db", wait=wait)
    opened = Asking(config, store)
    try:
        await opened.calls.open()
        yield opened
    finally:
        await opened.calls.close()
        await store.close()


def with_second(config: Config, base_url: str, **changes: Any) -> Config:
    second = config.remote.model_copy(update={"base_url": base_url, **changes})
    remote: Remote = config.remote.model_copy(update={"additional_providers": (second,)})
    return config.model_copy(update={"remote": remote})


async def test_a_provider_that_fails_again_and_again_is_left_alone_and_the_next_one_serves(
    configured: Configured, tmp_path: Path
) -> None:  # F47
    sick = Reply(status=503, code="server_is_overloaded", headers={"retry-after": "0"})
    async with (
        serve_openai(lambda _: sick) as down,
        serve_openai(honest) as up,
        asking(with_second(configured(down.url), up.url), tmp_path) as one,
    ):
        for _ in range(40):
            assert (await one.ask()).output == {"kind": "fruit"}
    assert len(up.requests) == 40
    assert len(down.requests) == FAILURES


async def test_in_an_outage_of_all_providers_attempts_are_few_and_the_error_says_so(
    configured: Configured, tmp_path: Path
) -> None:  # F47
    sick = Reply(status=503, code="server_is_overloaded", headers={"retry-after": "0"})
    async with serve_openai(lambda _: sick) as down, asking(configured(down.url), tmp_path) as one:
        for _ in range(40):
            with pytest.raises(ModelUnavailable):
                await one.ask()
        with pytest.raises(ModelUnavailable, match="not asked for a while") as said:
            await one.ask()
        assert said.value.outcome == "not_sent"
        assert said.value.retryable
        assert len(down.requests) <= (1 + RETRIES) * 40 + SAVED / 2
        assert await one.store.spent(["total"]) == {"total": 0}


async def test_a_provider_that_hangs_until_the_callers_give_up_is_left_alone_too(
    configured: Configured, tmp_path: Path
) -> None:  # F47
    never = Reply(wait=asyncio.Event())
    async with serve_openai(lambda _: never) as hanging, serve_openai(honest) as up:
        slow = configured(hanging.url, remote={"timeout": 0.2})
        async with asking(with_second(slow, up.url, timeout=20.0), tmp_path) as one:
            for _ in range(FAILURES):
                with pytest.raises(DeadlineExceeded):
                    await one.ask(within=0.15)
            assert (await one.ask(within=10.0)).output == {"kind": "fruit"}


async def test_a_provider_without_money_is_left_alone_and_others_are_used(
    configured: Configured, tmp_path: Path
) -> None:  # F45
    empty = Reply(status=429, code="insufficient_quota")
    async with serve_openai(lambda _: empty) as poor, serve_openai(honest) as rich:
        async with asking(with_second(configured(poor.url), rich.url), tmp_path) as one:
            for _ in range(5):
                await one.ask()
        async with asking(configured(poor.url), tmp_path) as alone:
            with pytest.raises(OutOfMoney):
                await alone.ask()
    assert len(rich.requests) == 5
    assert len(poor.requests) == 2


async def test_a_limit_that_the_provider_names_is_obeyed_before_the_next_call(
    configured: Configured, tmp_path: Path
) -> None:  # F44
    limits = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h"}
    first, second = Reply({"kind": "fruit"}, headers=limits), Reply({"kind": "fruit"})
    async with (
        serve_openai([first]) as busy,
        serve_openai(lambda _: second) as idle,
        asking(with_second(configured(busy.url), idle.url), tmp_path) as one,
    ):
        for _ in range(3):
            await one.ask()
    assert (len(busy.requests), len(idle.requests)) == (1, 2)


async def test_weights_share_the_first_call_and_no_weight_is_a_fallback(configured: Configured, tmp_path: Path) -> None:
    async with serve_openai(honest) as main, serve_openai(honest) as other:
        async with asking(with_second(configured(main.url), other.url, weight=1.0), tmp_path) as one:
            for _ in range(60):
                await one.ask()
        assert 15 <= len(main.requests) <= 45
        before = len(other.requests)
        async with asking(with_second(configured(main.url), other.url), tmp_path) as one:
            for _ in range(10):
                await one.ask()
        assert len(other.requests) == before


async def test_a_remote_that_the_cap_has_no_room_for_gives_way_to_a_cheaper_one(
    configured: Configured, tmp_path: Path
) -> None:
    dear = Price(input=Decimal(1000), output=Decimal(1000))
    async with serve_openai(honest) as main, serve_openai(honest) as other:
        config = with_second(configured(main.url, budget={"total": Decimal("0.01")}), other.url)
        dearer = config.remote.model_copy(update={"price": dear})
        async with asking(config.model_copy(update={"remote": dearer}), tmp_path) as one:
            assert (await one.ask()).output == {"kind": "fruit"}
        assert (len(main.requests), len(other.requests)) == (0, 1)
        lone = config.remote.model_copy(update={"price": dear, "additional_providers": ()})
        async with asking(config.model_copy(update={"remote": lone}), tmp_path) as one:
            with pytest.raises(BudgetExhausted):
                await one.ask()


async def test_a_provider_that_bills_more_than_it_may_is_not_asked_again_by_any_process(
    configured: Configured, tmp_path: Path
) -> None:  # F9
    greedy = Reply({"kind": "fruit"}, usage=Usage(input_tokens=10, output_tokens=10_000_000))
    async with serve_openai(lambda _: greedy) as server:
        async with asking(configured(server.url), tmp_path) as one:
            answer = await one.ask()
            assert await one.store.spent(["total"]) == {"total": answer.cost}
            with pytest.raises(ModelUnavailable, match="suspended"):
                await one.ask()
        async with asking(configured(server.url), tmp_path) as another:
            with pytest.raises(ModelUnavailable, match="suspended"):
                await another.ask()
    assert len(server.requests) == 1


async def test_calls_in_flight_never_exceed_what_is_configured(configured: Configured, tmp_path: Path) -> None:
    running: Counter[str] = Counter()
    most = 0

    async def slowly(body: Any) -> Any:
        nonlocal most
        running["now"] += 1
        most = max(most, running["now"])
        for _ in range(5):
            await asyncio.sleep(0)
        running["now"] -= 1
        return honest(body)

    async with (
        serve_openai(slowly) as server,
        asking(configured(server.url, remote={"concurrency": 3}), tmp_path) as one,
    ):
        await asyncio.gather(*(one.ask() for _ in range(30)))
    assert len(server.requests) == 30
    assert 1 <= most <= 3


# --- what a call costs when something goes wrong ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process_that_has_imported_everything() -> None:
    CONTEXT.set_forkserver_preload([*PRELOAD, "benches.money", __name__])


def one_asker(pipe: Connection, config: Config, path: Path) -> None:
    """Ask once, when told to, and tell how it ended."""

    async def ask() -> str:
        async with asking(config, path) as one:
            pipe.send("ready")
            await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
            try:
                await one.ask()
            except BudgetError as error:
                return type(error).__name__
            return "answered"

    pipe.send(asyncio.run(ask()))


@pytest.mark.usefixtures("one_process_that_has_imported_everything")
@pytest.mark.parametrize("number", [8, pytest.param(32, marks=pytest.mark.slow)])
async def test_of_many_processes_with_room_for_one_worst_case_exactly_one_sends_its_call(
    configured: Configured, tmp_path: Path, number: int
) -> None:  # F1
    loop = asyncio.get_running_loop()
    async with serve_openai(honest, price=(150_000, 600_000)) as server:
        price = Price(input=Decimal("0.15"), output=Decimal("0.6"))  # told, because the price table is slow to load
        config = configured(server.url, remote={"price": price})
        async with asking(config, tmp_path) as one:
            room = config.budget.model_copy(update={"total": Decimal(one.worst).scaleb(-6)})
        config = config.model_copy(update={"budget": room})
        askers = [start(one_asker, config, tmp_path) for _ in range(number)]
        for _, pipe in askers:
            assert await loop.run_in_executor(None, pipe.recv) == "ready"
        for _, pipe in askers:
            pipe.send("go")
        ends = Counter([await loop.run_in_executor(None, pipe.recv) for _, pipe in askers])
        for process, _ in askers:
            await loop.run_in_executor(None, process.join)
        assert ends["answered"] == 1
        assert ends.total() - ends["answered"] == ends["BudgetExhausted"] + ends["BudgetHeld"] == number - 1
        assert len(server.requests) == 1
        async with asking(config, tmp_path) as one:
            [(state, cost)] = await one.booked()
        assert state == "settled"
        assert server.bill <= cost <= server.bill + 1


@pytest.mark.parametrize(
    ("reply", "outcome", "state"),
    [
        (Reply({"kind": "fruit"}, silent=True), "answered_no_usage", "assumed"),
        (Reply({"kind": "fruit"}, usage=Usage(input_tokens=0, output_tokens=0)), "answered", "settled"),
    ],
)
async def test_an_answer_without_usage_costs_the_worst_case_and_says_so_and_one_of_zero_costs_nothing(
    configured: Configured, tmp_path: Path, reply: Reply, outcome: str, state: str
) -> None:  # F7
    async with serve_openai([reply]) as server, asking(configured(server.url), tmp_path) as one:
        answer = await one.ask()
        assert answer.cost == (one.worst if state == "assumed" else 0)
        assert [(attempt.outcome, attempt.cost) for attempt in one.attempts] == [(outcome, answer.cost)]
        assert await one.booked() == [(state, answer.cost)]


@pytest.fixture
def new_prices() -> Iterator[Callable[[Decimal], None]]:
    """Replaces the price table by one in which every price of the model is so many times what it was."""

    def change(factor: Decimal) -> None:
        providers = deepcopy(get_snapshot().providers)
        [model] = [
            model for one in providers if one.id == "openai" for model in one.models if model.id == "gpt-4o-mini"
        ]
        assert not isinstance(model.prices, list)
        for name in ("input_mtok", "output_mtok", "cache_read_mtok"):
            price = getattr(model.prices, name)
            assert isinstance(price, Decimal)
            setattr(model.prices, name, price * factor)
        set_custom_snapshot(DataSnapshot(providers=providers, from_auto_update=False))

    yield change
    set_custom_snapshot(None)


@pytest.mark.parametrize("name", ["openai", "anthropic", "google"])
def test_a_price_per_token_is_to_the_micro_dollar_what_the_price_table_says(name: str) -> None:
    dice = Random(0)
    [provider] = [one for one in get_snapshot().providers if one.id == name]
    tables = [model.get_prices(datetime.now(UTC)) for model in provider.models]
    found = [(table, price) for table in tables if (price := linear(table)) is not None]
    assert 10 < len(found) < len(tables)  # those with tiers are none
    for table, price in found:
        cached, fresh, output = (dice.randrange(10 ** dice.randrange(1, 7)) for _ in range(3))
        usage = Usage(input_tokens=fresh + cached, cached_tokens=cached, output_tokens=output)
        said = genai_prices.Usage(input_tokens=fresh + cached, output_tokens=output, cache_read_tokens=cached or None)
        assert budget.cost(price, usage) == budget.micros(table.calc_price(said)["total_price"])


@pytest.mark.parametrize(("factor", "suspended"), [(Decimal("0.5"), False), (Decimal(1000), True)])
async def test_a_price_that_changes_in_flight_leaves_the_hold_and_is_what_the_call_costs(
    configured: Configured,
    tmp_path: Path,
    new_prices: Callable[[Decimal], None],
    factor: Decimal,
    suspended: bool,
) -> None:  # F11
    gate = asyncio.Event()
    usage = Usage(input_tokens=400, output_tokens=40)
    async with (
        serve_openai([Reply({"kind": "fruit"}, usage=usage, wait=gate)]) as server,
        asking(configured(server.url), tmp_path) as one,
    ):
        worst = one.worst
        waiting = asyncio.create_task(one.ask())
        while not server.requests:
            await asyncio.sleep(0)
        new_prices(factor)
        assert await one.booked() == [("held", worst)]
        gate.set()
        cost = (await waiting).cost
        assert cost == budget.micros(factor * (Decimal("0.15") * 400 + Decimal("0.6") * 40) / 10**6)
        assert (cost > worst) == suspended  # more than was held is the truth all the same, and the last call
        assert await one.booked() == [("settled", cost)]
        assert one.calls.providers[0].throttle.suspended == suspended
        assert [event.name for event in await one.store.events()] == ["CONTRACT_BROKEN"] * suspended


@pytest.mark.parametrize("told", [{}, {"max_tokens": 77}])
async def test_every_call_says_how_long_its_answer_may_be(
    configured: Configured, tmp_path: Path, told: dict[str, int]
) -> None:  # F13
    async with serve_openai(honest) as server:
        config = configured(server.url)
        remote = Remote.model_validate(config.remote.model_dump(exclude={"max_tokens"}) | told)
        async with asking(config.model_copy(update={"remote": remote}), tmp_path) as one:
            await one.ask()
            longest = told.get("max_tokens", 1024)
            assert [seen.body["max_tokens"] for seen in server.requests] == [longest]
            assert one.worst >= longest * Decimal("0.6")


@pytest.mark.parametrize("provider", ["openai", "anthropic", "google"])
@pytest.mark.parametrize(
    "settings",
    [
        {"n": 8},
        {"best_of": 8},
        {"tools": [{"type": "web_search"}]},
        {"web_search_options": {}},
        {"candidateCount": 8},
        {"max_completion_tokens": 10**6},
        {"extra_body": {"n": 8}},
        {"stream": "true"},
    ],
    ids=lambda settings: next(iter(settings)),
)
async def test_a_setting_that_would_multiply_what_a_call_costs_is_refused_and_never_sent(
    configured: Configured, tmp_path: Path, provider: str, settings: dict[str, Json]
) -> None:  # F14
    models = {"openai": "gpt-4o-mini", "anthropic": "claude-sonnet-4-5", "google": "gemini-2.5-flash"}
    async with serve_openai(honest) as server:
        config = configured(server.url, remote={"provider": provider, "model": models[provider], "settings": settings})
        with pytest.raises(ConfigError) as refused:
            async with asking(config, tmp_path) as one:
                await one.ask()
        assert next(iter(settings)) in str(refused.value)
        assert server.connections == 0


@pytest.mark.parametrize(
    ("reply", "state"),
    [
        (Reply(cut=0), "assumed"),
        (Reply({"kind": "fruit"}, cut=150, reset=True), "assumed"),
        (Reply(status=500), "assumed"),
        (Reply(status=401, code="invalid_api_key"), "released"),
    ],
)
async def test_a_second_model_has_a_hold_of_its_own_and_the_first_stays_where_nobody_knows(
    configured: Configured, tmp_path: Path, reply: Reply, state: str
) -> None:  # F15
    async with serve_openai([reply]) as first, serve_openai(honest) as second:
        config = with_second(configured(first.url, remote={"retries": 0}), second.url, model="gpt-4o")
        async with asking(config, tmp_path) as one:
            answer = await one.ask()
            lost, found = one.attempts
            assert (lost.model, found.model) == ("openai/gpt-4o-mini", "openai/gpt-4o")
            assert lost.attempt_id != found.attempt_id
            assert lost.cost == (one.worst if state == "assumed" else 0)
            assert (found.outcome, found.cost) == ("answered", answer.cost)
            assert answer.cost > 0
            assert await one.booked() == sorted([(state, lost.cost), ("settled", answer.cost)])


@asynccontextmanager
async def stopping_after(share: float, sent: asyncio.Event) -> AsyncIterator[str]:
    """A server whose stream stops after this share of its chunks; 1 sends all but the end of the body."""
    wire = FORMATS["openai"]
    usage = Usage(input_tokens=400, output_tokens=40)
    events = wire.stream(Said(1, {}, "gpt-4o-mini", {"kind": "fruit"}, "complete", "", usage, 2))
    chunks = wire.frames([*events.opening, *events.pieces, *events.closing])

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for chunk in chunks[: max(1, round(share * len(chunks)))]:
            writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await writer.drain()
            await asyncio.sleep(0)
        sent.set()
        while await reader.read(2**16):  # the rest of the request, until the client goes away
            pass
        writer.close()

    listener = await asyncio.start_server(connected, "127.0.0.1")
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
async def test_a_caller_who_goes_away_in_the_middle_of_a_stream_pays_the_worst_case(
    configured: Configured, tmp_path: Path, share: float
) -> None:  # F17
    sent = asyncio.Event()
    async with stopping_after(share, sent) as url:
        config = configured(url, remote={"settings": {"stream": True}})
        async with asking(config, tmp_path) as one:
            waiting = asyncio.create_task(one.ask())
            await sent.wait()
            for _ in range(20):  # the client reads what has come
                await asyncio.sleep(0)
            assert await one.booked() == [("held", one.worst)]
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await one.booked() == [("assumed", one.worst)]
            assert [(attempt.outcome, attempt.cost) for attempt in one.attempts] == [("unknown", one.worst)]


@pytest.mark.parametrize(
    ("total", "goes"),
    [
        (None, True),  # no cap unless told
        (Decimal(0), False),
        (Decimal("0.000001"), False),
        (Decimal("999999999"), True),
    ],
)
async def test_a_cap_of_nothing_allows_nothing_and_no_cap_is_none(
    configured: Configured, tmp_path: Path, total: Decimal | None, goes: bool
) -> None:  # F23
    async with serve_openai(honest) as server:
        config = configured(server.url) if total is None else configured(server.url, budget={"total": total})
        async with asking(config, tmp_path) as one:
            if goes:
                await one.ask()
            else:
                with pytest.raises(BudgetExhausted):
                    await one.ask()
        assert len(server.requests) == goes


async def test_a_store_that_somebody_else_holds_fails_the_call_before_it_costs_anything(
    configured: Configured, tmp_path: Path
) -> None:  # F30
    async with serve_openai(honest) as server, asking(configured(server.url), tmp_path, wait=1.0) as one:
        other = apsw.Connection(str(tmp_path / "calls.db"))
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy) as busy:
            await one.ask()
        assert busy.value.retryable
        assert (server.connections, one.attempts) == (0, [])
        other.execute("ROLLBACK")
        answer = await one.ask()
        assert await one.booked() == [("settled", answer.cost)]
        other.close()


async def test_an_answer_may_be_given_while_its_hold_is_being_settled(configured: Configured, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        serve_openai([Reply({"kind": "fruit"}, wait=gate)]) as server,
        asking(configured(server.url), tmp_path) as one,
    ):
        task = one.config.tasks[0]
        waiting = asyncio.create_task(
            one.calls.ask(task, {"text": "a pear"}, purpose="serve", deadline=None, attempts=one.attempts, later=True)
        )
        while not server.requests:
            await asyncio.sleep(0)
        other = apsw.Connection(str(tmp_path / "calls.db"))
        other.execute("BEGIN IMMEDIATE")
        gate.set()
        answer = await waiting
        assert await one.booked() == [("held", one.worst)]
        other.execute("ROLLBACK")
        other.close()
        for _ in range(2):
            await one.calls.settled(one.attempts)
            assert await one.booked() == [("settled", answer.cost)]


async def test_a_store_that_somebody_else_holds_while_a_call_is_made_keeps_the_hold(
    configured: Configured, tmp_path: Path
) -> None:  # F30
    gate = asyncio.Event()
    async with (
        serve_openai([Reply({"kind": "fruit"}, wait=gate)]) as server,
        asking(configured(server.url), tmp_path, wait=1.0) as one,
    ):
        waiting = asyncio.create_task(one.ask())
        while not server.requests:
            await asyncio.sleep(0)
        other = apsw.Connection(str(tmp_path / "calls.db"))
        other.execute("BEGIN IMMEDIATE")
        gate.set()
        with pytest.raises(StoreBusy):
            await waiting
        [attempt] = one.attempts  # known to the caller, and to the ledger for as much as it may have cost
        assert 0 < attempt.cost <= one.worst
        assert await one.booked() == [("held", one.worst)]
        other.execute("ROLLBACK")
        other.close()


async def test_after_a_failed_fsync_no_paid_call_is_made_until_somebody_looks(
    configured: Configured, tmp_path: Path
) -> None:  # F33
    disk = Disk()
    try:
        async with serve_openai(honest) as server:
            async with asking(configured(server.url), tmp_path) as one:
                disk.fail = lambda act, _: broken(apsw.SQLITE_IOERR_FSYNC) if act == "sync" else None
                with pytest.raises(StoreError):
                    await one.ask()
                disk.fail = lambda _act, _name: None
                syncs = disk.syncs
                for _ in range(2):
                    with pytest.raises(StoreError, match="no more writes"):
                        await one.ask()
                assert (server.connections, disk.syncs) == (0, syncs), "the sync that failed is not tried again"
            async with asking(configured(server.url), tmp_path) as one:
                await one.ask()
            assert len(server.requests) == 1
    finally:
        disk.unregister()


# --- another model than the one that was asked ----------------------------------------------------------------------------

USAGE = Usage(input_tokens=400, output_tokens=40)


def served_by(model: str) -> Reply:
    return Reply({"kind": "fruit"}, usage=USAGE, model=model)


@pytest.mark.parametrize(
    ("configured_as", "served", "price"),
    [
        ("gpt-4o-mini", "gpt-4o-mini-2024-07-18", (Decimal("0.15"), Decimal("0.6"))),
        ("gpt-4o-mini-2024-07-18", "gpt-4o-mini", (Decimal("0.15"), Decimal("0.6"))),
        ("gpt-4o", "gpt-4o-2024-08-06", (Decimal("2.5"), Decimal(10))),
        ("gpt-4o-mini", "", (Decimal("0.15"), Decimal("0.6"))),
    ],
)
async def test_a_dated_snapshot_of_the_model_is_that_model(
    configured: Configured,
    tmp_path: Path,
    configured_as: str,
    served: str,
    price: tuple[Decimal, Decimal],
) -> None:  # F55
    async with (
        serve_openai(lambda _: served_by(served)) as server,
        asking(configured(server.url, remote={"model": configured_as}), tmp_path) as one,
    ):
        answer = await one.ask()
        assert answer.cost == budget.micros((price[0] * 400 + price[1] * 40) / 10**6)
        assert answer.model == (served or configured_as)
        assert await one.store.events() == []


@pytest.mark.parametrize(
    ("configured_as", "served", "dearer"),
    [
        ("gpt-4o-mini", "gpt-4.1-mini", (Decimal("0.4"), Decimal("1.6"))),  # dearer than what was asked
        ("gpt-4o", "gpt-4o-2024-05-13", (Decimal(5), Decimal(15))),  # an older snapshot with a price of its own
        ("gpt-4o", "gpt-4o-mini", (Decimal("2.5"), Decimal(10))),  # cheaper: nobody knows what is billed
    ],
)
async def test_another_model_is_said_once_and_costs_the_dearer_of_the_two_prices(
    configured: Configured, tmp_path: Path, configured_as: str, served: str, dearer: tuple[Decimal, Decimal]
) -> None:  # F55
    async with serve_openai(lambda _: served_by(served)) as server:
        config = configured(server.url, remote={"model": configured_as, "max_tokens": 1024})
        async with asking(config, tmp_path) as one:
            before = one.worst
            cost = budget.micros((dearer[0] * 400 + dearer[1] * 40) / 10**6)
            for _ in range(3):
                answer = await one.ask()
                assert (answer.model, answer.cost) == (served, cost)
            assert (one.worst > before) == (served != "gpt-4o-mini"), "the next call is bounded by the dearer one"
            [said] = await one.store.events()
            assert (said.name, said.evidence["configured"]) == ("MODEL_CHANGED", f"openai/{configured_as}")
            assert said.evidence["served"] == served
            prices = [said.evidence[key] for key in ("configured_price", "served_price")]
            assert max(Decimal(price["input"]) for price in prices) == dearer[0]
        async with asking(config, tmp_path) as another:
            await another.ask()
            assert len(await another.store.events()) == 1


async def test_another_model_of_unknown_price_is_booked_as_configured_and_said_to_be_unknown(
    configured: Configured, tmp_path: Path
) -> None:  # F55
    async with (
        serve_openai(lambda _: served_by("mystery-9000")) as server,
        asking(configured(server.url), tmp_path) as one,
    ):
        answer = await one.ask()
        assert answer.cost == budget.micros((Decimal("0.15") * 400 + Decimal("0.6") * 40) / 10**6)
        [said] = await one.store.events()
        assert (said.name, said.evidence["served_price"]) == ("MODEL_CHANGED", None)
        assert "its price is unknown" in said.message


@pytest.mark.parametrize(("served", "said"), [("mine-2026-01-01", 0), ("mine@latest", 0), ("yours", 1), ("gpt-4o", 1)])
async def test_a_configured_price_counts_whoever_answers(
    configured: Configured, tmp_path: Path, served: str, said: int
) -> None:  # F55
    price = Price(input=Decimal(1), output=Decimal(2))
    async with (
        serve_openai(lambda _: served_by(served)) as server,
        asking(configured(server.url, remote={"model": "mine", "price": price}), tmp_path) as one,
    ):
        assert (await one.ask()).cost == 400 + 2 * 40
        assert [event.name for event in await one.store.events()] == ["MODEL_CHANGED"] * said


async def test_another_model_that_costs_more_than_was_held_is_the_last_call(
    configured: Configured, tmp_path: Path
) -> None:  # F9, F55
    most = Reply({"kind": "fruit"}, usage=Usage(input_tokens=400, output_tokens=64), model="gpt-4-32k")
    async with serve_openai(lambda _: most) as server, asking(configured(server.url), tmp_path) as one:
        worst = one.worst
        answer = await one.ask()
        assert answer.cost == 60 * 400 + 120 * 64 > worst
        assert await one.booked() == [("settled", answer.cost)]
        assert {event.name for event in await one.store.events()} == {"MODEL_CHANGED", "CONTRACT_BROKEN"}
        with pytest.raises(ModelUnavailable, match="suspended"):
            await one.ask()
    assert len(server.requests) == 1


async def test_a_server_with_a_new_name_for_each_answer_fills_neither_memory_nor_store(
    configured: Configured, tmp_path: Path
) -> None:
    names = iter(range(1000))
    async with (
        serve_openai(lambda _: served_by(f"model-{next(names)}")) as server,
        asking(configured(server.url), tmp_path) as one,
    ):
        for _ in range(70):
            await one.ask()
        assert len(await one.store.events()) == 50


# --- a budget that is changed in the file -----------------------------------------------------------------------------------


async def test_a_look_now_and_then_follows_the_caps_in_the_file(configured: Configured, tmp_path: Path) -> None:  # F22
    file = tmp_path / "apprentice.yaml"
    text = YAML.replace("BASE_URL", "http://127.0.0.1:9")
    file.write_text(text + "budget: {daily: 1}\n")
    async with asking(configured(text=text + "budget: {daily: 1}\n"), tmp_path) as one:
        file.write_text(text + "budget: {daily: 0.25}\n")
        await one.calls.look(one.config.tasks[0], gap=1.0, level=None)
        assert one.calls.purse.budget.daily == Decimal("0.25")
        assert [event.name for event in await one.store.events()] == ["BUDGET_CHANGED"]


# --- a name that has no address -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [socket.EAI_NONAME, socket.EAI_AGAIN, None])
async def test_a_remote_whose_name_is_not_resolved_costs_nothing(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:  # F59
    real = socket.getaddrinfo
    over = threading.Event()

    def resolve(host: Any, *rest: Any, **more: Any) -> Any:
        if host != "api.example.com":
            return real(host, *rest, **more)
        if code is None:  # half a minute and longer
            over.wait(30)
        raise socket.gaierror(code or socket.EAI_AGAIN, "from the name server")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    remote = {"retries": 0, "timeout": 0.2 if code is None else 20.0}
    async with asking(configured("http://api.example.com/v1", remote=remote), tmp_path) as one:
        try:
            with pytest.raises(ModelUnavailable) as said:
                await one.ask()
            assert said.value.outcome == "not_sent"
            assert await one.booked() == [("released", 0)]
            assert await one.store.spent(["total"]) == {"total": 0}
        finally:
            over.set()
