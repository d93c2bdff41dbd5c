"""Which remote is asked, how often, and when not: over real sockets, with the server's own count as the judge."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pytest

from apprentice import plugins
from apprentice.calls import Calls
from apprentice.config import Config, Price, Remote
from apprentice.engine import new_id
from apprentice.errors import BudgetExhausted, ModelUnavailable, OutOfMoney
from apprentice.testing.servers import Reply, serve_openai
from apprentice.throttle import FAILURES, RETRIES, SAVED
from apprentice.types import Answer, Attempt, Store, Usage
from tests.conftest import honest

type Configured = Callable[..., Config]


class Asking:
    """The remotes of a configuration."""

    def __init__(self, config: Config, store: Store) -> None:
        self.config, self.store = config, store
        self.calls = Calls(config, store, clock=lambda: 1.8e9, new_id=new_id, dice=Random(3))
        self.attempts: list[Attempt] = []

    async def ask(self) -> Answer:
        task, input = self.config.tasks[0], {"text": "a pear"}
        return await self.calls.ask(task, input, purpose="serve", deadline=None, attempts=self.attempts)


@asynccontextmanager
async def asking(config: Config, tmp_path: Path) -> AsyncIterator[Asking]:
    store: Store = plugins.build("stores", "sqlite", path=tmp_path / "calls.db")
    opened = Asking(config, store)
    await opened.calls.open()
    try:
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
