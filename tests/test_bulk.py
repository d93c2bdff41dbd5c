"""Work that can wait: money is exact whatever happens between two steps, and no batch is made twice."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import plugins
from apprentice.bulk import Bulk, read_inputs, split
from apprentice.calls import Provider
from apprentice.config import Config, Price
from apprentice.engine import Apprentice
from apprentice.errors import BudgetExhausted, ConfigError, InvalidInput, StoreError
from apprentice.learn import due
from apprentice.models import Limits
from apprentice.purse import suspended_models
from apprentice.selection import select
from apprentice.testing.servers import (
    Reply,
    Server,
    asked,
    serve_anthropic,
    serve_google,
    serve_openai,
    serve_responses,
)
from apprentice.types import Batch, Event, Json, Record, Store, Usage

from .conftest import honest, right, texts

type Configured = Callable[..., Config]

PRICE = (2_000_000, 10_000_000)  # half of it is whole micro-dollars a token, so that no cent hides in a rounding
WIRES: dict[str, Any] = {"openai": serve_openai, "anthropic": serve_anthropic, "google": serve_google}
DAY = 86_400.0


class Died(BaseException):
    """The process is gone: nothing that it would have done any more is done."""


class Dying:
    """A store whose process dies just before or just after one of its calls, and can do nothing more."""

    def __init__(self, store: Store, call: str, *, after: bool, number: int = 1) -> None:
        self._store = store
        self._call = call
        self._after = after
        self._left = number
        self._dead = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            here = name == self._call or f"{name}:{args[0].state if name == 'keep_batch' else ''}" == self._call
            if self._dead:
                raise Died
            self._left -= here
            last = here and self._left == 0
            if last and not self._after:
                self._dead = True
                raise Died
            result = await method(*args, **kwargs)
            if last:
                self._dead = True
                raise Died
            return result

        return call


@dataclass
class Place:
    """A provider, a configuration, and a store that outlives whoever works on it."""

    server: Server
    config: Config
    store: Store
    now: float = field(default_factory=time.time)

    @asynccontextmanager
    async def bulk(self, store: Any = None) -> AsyncIterator[Bulk]:
        made = Bulk(self.config, store or self.store, clock=lambda: self.now, owner="test")
        try:
            await made.open()
            yield made
        finally:
            await made.close()

    async def send(self, inputs: list[Json], store: Any = None, **how: Any) -> list[Batch]:
        async with self.bulk(store) as bulk:
            return await bulk.send(await bulk.plan("sort", inputs, **how))

    async def collect(self, store: Any = None) -> list[Batch]:
        async with self.bulk(store) as bulk:
            return await bulk.collect("sort")

    async def finish(self) -> list[Batch]:
        """Look until nothing is open, with time passing in between."""
        for _ in range(20):
            if not await self.store.batches(open=True):
                return await self.store.batches()
            self.now += 100.0
            await self.collect()
        raise AssertionError("it never ends")

    async def ask(self, input: Json) -> None:
        """The same question without a batch."""
        provider = Provider(self.config.remote)
        await provider.model().answer(self.config.tasks[0].task, input)
        await provider.close()

    async def records(self) -> list[Record]:
        return [record for _, record in await self.store.records("sort")]

    async def ledger(self) -> int:
        return (await self.store.spent(["total"]))["total"]

    async def events(self, name: str) -> list[Event]:
        return await self.store.events("sort", names=[name])

    async def is_exact(self) -> None:
        """The provider's bill, the ledger and the Records say the same, and nothing is held."""
        assert await self.ledger() == self.server.bill
        assert await self.ledger() == sum(record.cost for record in await self.records())
        assert not await self.store.holds(float("inf"))


def inputs_of(n: int, seed: int = 0) -> list[Json]:
    return [{"text": text} for text in texts(n, seed)]


@pytest.fixture
def at(configured: Configured) -> Callable[..., Any]:
    """A Place at a provider that answers like this; `remote` and `budget` change those sections."""

    @asynccontextmanager
    async def place(
        wire: str = "openai",
        answer: Any = honest,
        remote: dict[str, Any] | None = None,
        budget: dict[str, Any] | None = None,
    ) -> AsyncIterator[Place]:
        async with WIRES[wire](answer, price=PRICE) as server:
            price = Price(input=Decimal(2), output=Decimal(10))
            sections = {"remote": {"provider": wire, "price": price} | (remote or {}), "budget": budget or {}}
            config = configured(server.url, **sections)
            store: Store = plugins.build("stores", "sqlite", path=config.store.path)
            try:
                yield Place(server, config, store)
            finally:
                await store.close()

    return place


# --- what a batch brings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
async def test_a_file_becomes_records_at_half_the_price(at: Any, wire: str) -> None:
    async with at(wire) as here:
        sent = await here.send(inputs_of(30))
        assert [(batch.state, len(batch.inputs)) for batch in sent] == [("submitted", 30)]
        assert await here.ledger() == sent[0].worst > 0  # held from the moment it was sent
        [batch] = await here.finish()
        assert (batch.state, batch.end, batch.open) == ("ended", "settled", False)
        await here.is_exact()
        assert 0 < batch.cost < sent[0].worst
        records = {record.request_id: record for record in await here.records()}
        assert list(batch.request_ids) == sorted(records, key=lambda name: int(name.rpartition("-")[2]))
        for key, input in zip(batch.request_ids, batch.inputs, strict=True):
            remote = records[key].remote
            assert remote is not None
            assert (records[key].input, remote.output) == (input, {"kind": right(input["text"])})
        await here.ask(batch.inputs[0])
        assert here.server.requests[-1].charge == 2 * here.server.batched[0].charge
        [event] = await here.events("BATCH_ENDED")
        assert (event.evidence["labels"], event.evidence["cost"]) == (30, batch.cost)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_provider_gets_the_requests_that_it_would_get_one_by_one(at: Any, wire: str, stream: bool) -> None:
    async with at(wire, remote={"settings": {"stream": stream}}) as here:
        await here.send(inputs_of(2))
        [batch] = await here.finish()
        await here.ask(batch.inputs[0])
        alone = here.server.requests[-1].body
        assert here.server.batched[0].body == {key: part for key, part in alone.items() if "stream" not in key}


async def test_responses_are_batched_too(at: Any) -> None:
    WIRES["responses"] = serve_responses
    try:
        async with at("responses", remote={"provider": "openai", "settings": {"api": "responses"}}) as here:
            await here.send(inputs_of(3))
            [batch] = await here.finish()
            assert (batch.state, await here.store.count("sort", labelled=True)) == ("ended", 3)
            await here.is_exact()
    finally:
        del WIRES["responses"]


async def test_what_is_answered_on_its_way_or_repeated_is_not_sent(at: Any) -> None:
    async with at() as here:
        inputs = inputs_of(10)
        await here.send(inputs[:4])
        await here.finish()
        await here.send(inputs[4:7])
        shouted = [{"text": text.upper() + "  "} for text in (input["text"] for input in inputs)]
        async with here.bulk() as bulk:
            plan = await bulk.plan("sort", [*inputs, *shouted], limit=2)
            assert (plan.answered, plan.waiting, plan.repeated, plan.left) == (8, 6, 3, 1)
            assert [list(batch.inputs) for batch in plan.batches] == [inputs[7:9]]
            assert plan.worst == plan.batches[0].worst
            assert plan.expected is not None
            assert 0 < plan.expected < plan.worst
            nothing = await bulk.plan("sort", inputs[:7])
            assert (nothing.size, nothing.worst, nothing.batches) == (0, 0, [])
        assert len(here.server.counter.jobs) == 2  # a plan sends nothing


async def test_before_the_first_answer_nothing_is_expected(at: Any) -> None:
    async with at() as here, here.bulk() as bulk:
        assert (await bulk.plan("sort", inputs_of(3))).expected is None


async def test_labels_of_a_batch_teach_and_prove_nothing(at: Any) -> None:
    async with at() as here:
        await here.send(inputs_of(60))
        await here.finish()
        task = here.config.tasks[0]
        assert await due(here.config, task, here.store)
        selection = select(await here.store.records("sort", labelled=True))
        assert (selection.labels, len(selection.training) + len(selection.held_out)) == (60, 60)
        config = here.config.model_copy(update={"local": here.config.local.model_copy(update={"learn": "off"})})
        async with Apprentice(config, clock=lambda: here.now) as app:
            before = await app.confidence("sort")
            assert (before.audits, before.labels, before.agreement) == (0, 0, None)
            assert app._tasks["sort"].labels == 60
            assert app._tasks["sort"].state.gap == 0  # sixty Records of one moment are no rate of requests
            await app.arun("sort", {"text": "an apple"})
            assert app._tasks["sort"].labels == 61


# --- a process that dies ----------------------------------------------------------------------------------------------

DEATHS = [
    ("keep_batch:prepared", False, 1),
    ("keep_batch:prepared", True, 1),  # its row is kept: its money is not held
    ("reserve", False, 1),
    ("reserve", True, 1),  # held, not sent
    ("keep_batch:prepared", False, 2),
    ("keep_batch:prepared", True, 2),  # the mark before it is sent
    ("keep_batch:submitted", False, 1),  # created: its id is not kept
    ("keep_batch:submitted", True, 1),
    ("append", False, 1),  # the results are here, no Record is
    ("append", True, 1),
    ("append", True, 5),  # between two Records
    ("add_event", False, 1),
    ("keep_batch:ended", False, 1),
    ("keep_batch:ended", True, 1),
    ("settle", False, 1),
    ("settle", True, 1),
    ("keep_batch:ended", False, 2),
    ("keep_batch:ended", True, 2),
]


@pytest.mark.parametrize(
    ("death", "wire"),
    [
        pytest.param(
            death,
            wire,
            id=f"{death[0]} {'after' if death[1] else 'before'} {death[2]}-{wire}",
            marks=[] if place % len(WIRES) == turn else pytest.mark.slow,
        )
        for place, death in enumerate(DEATHS)
        for turn, wire in enumerate(WIRES)
    ],
)
async def test_a_process_that_dies_anywhere_makes_no_second_batch_and_loses_no_money(
    at: Any, wire: str, death: tuple[str, bool, int]
) -> None:
    call, after, number = death
    inputs = inputs_of(7)
    async with at(wire) as here:
        dying = Dying(here.store, call, after=after, number=number)
        with pytest.raises(Died):
            await here.send(inputs, dying)
            for _ in range(3):
                await here.collect(dying)
        await here.finish()
        await here.send(inputs)  # whatever had not been begun; otherwise there is nothing to send
        batches = await here.finish()
        assert [batch.state for batch in batches] == ["ended"]
        assert len(here.server.counter.jobs) == 1
        assert len(here.server.batched) == len(inputs)
        assert sorted(record.input["text"] for record in await here.records()) == sorted(i["text"] for i in inputs)
        await here.is_exact()


async def test_a_price_that_changes_in_between_leaves_records_and_ledger_the_same(at: Any) -> None:
    async with at() as here:
        dying = Dying(here.store, "keep_batch:ended", after=False)
        await here.send(inputs_of(4))
        with pytest.raises(Died):
            for _ in range(3):
                await here.collect(dying)
        costs = sum(record.cost for record in await here.records())
        assert costs > 0
        dearer = here.config.remote.model_copy(update={"batch_price": Decimal(1)})
        here.config = here.config.model_copy(update={"remote": dearer})
        [batch] = await here.finish()
        assert (batch.cost, await here.ledger()) == (costs, costs)
        await here.is_exact()


KILLED = """
import asyncio, os, signal, sys, time
from pathlib import Path
from apprentice import plugins
from apprentice.bulk import Bulk
from apprentice.config import Config

class Killing:
    def __init__(self, store, call):
        self.store, self.call = store, call
    def __getattr__(self, name):
        method = getattr(self.store, name)
        async def call(*given, **named):
            if name == "keep_batch" and given[0].state == self.call or name == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return await method(*given, **named)
        return call

async def main(point, inputs):
    config = Config.model_validate_json(sys.stdin.read())
    store = plugins.build("stores", "sqlite", path=config.store.path)
    bulk = Bulk(config, Killing(store, point), clock=time.time, owner="killed")
    await bulk.open()
    await bulk.send(await bulk.plan("sort", [{"text": text} for text in inputs]))
    while True:
        await bulk.collect("sort")

asyncio.run(main(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.parametrize("point", ["submitted", "settle"])
async def test_a_process_killed_by_the_system_is_replaced(at: Any, point: str) -> None:
    async with at("anthropic") as here:
        command = [sys.executable, "-c", KILLED, point, *texts(3)]
        child = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, env=dict(os.environ))
        await child.communicate(here.config.model_dump_json().encode())
        assert child.returncode == -signal.SIGKILL
        assert len(here.server.counter.jobs) == 1
        assert len(await here.collect()) == 1  # nothing happens while the dead one may still be alive
        assert [batch.open for batch in await here.store.batches()] == [True]
        [batch] = await here.finish()
        assert (batch.state, len(here.server.counter.jobs)) == ("ended", 1)
        await here.is_exact()


@pytest.mark.parametrize("wire", WIRES)
async def test_a_creation_whose_answer_was_lost_is_found(at: Any, wire: str) -> None:
    async with at(wire) as here:
        here.server.batching.lost = 1
        [sent] = await here.send(inputs_of(5))
        assert (sent.state, sent.open) == ("prepared", True)
        assert sent.problem
        [batch] = await here.finish()
        assert (batch.state, len(here.server.counter.jobs)) == ("ended", 1)
        await here.is_exact()


async def test_what_no_list_shows_is_waited_for_before_it_is_made_again(at: Any) -> None:
    async with at() as here:
        here.server.batching.lost = 1
        await here.send(inputs_of(5))
        job = here.server.counter.jobs.pop()  # it does not show yet
        for _ in range(3):
            [batch] = await here.collect()
            assert (batch.state, batch.problem) == ("prepared", "its creation had no answer; it is looked for again")
        here.server.counter.jobs.append(job)
        await here.collect()
        await here.finish()
        assert len(here.server.counter.jobs) == 1
        await here.is_exact()


async def test_where_two_batches_may_be_it_a_person_is_told_and_nothing_is_sent_again(at: Any) -> None:
    async with at("anthropic") as here:
        task = here.config.tasks[0].task
        here.server.batching.lost = 1
        [sent] = await here.send(inputs_of(5))
        model = plugins.build("models", "anthropic", model="other", base_url=here.server.url, allow_internal=True)
        await model.submit(task, "somebody-else", {f"r{n}": input for n, input in enumerate(sent.inputs)})
        await model.close()
        [batch] = await here.finish()
        assert (batch.state, batch.end, batch.cost) == ("failed", "assumed", sent.worst)
        assert len(here.server.counter.jobs) == 2
        assert await here.ledger() == sent.worst >= here.server.bill
        [event] = await here.events("BATCH_FAILED")
        assert "may be it" in event.message
        assert not await here.store.holds(float("inf"))


async def test_a_batch_of_others_is_not_taken_for_ours_when_ours_is_known(at: Any) -> None:
    async with at("anthropic") as here:
        await here.send(inputs_of(5))
        here.server.batching.lost = 1
        await here.send(inputs_of(10)[5:])
        batches = await here.finish()
        assert [batch.state for batch in batches] == ["ended", "ended"]
        assert len({batch.remote_id for batch in batches}) == len(here.server.counter.jobs) == 2
        await here.is_exact()


async def test_of_many_who_look_at_once_one_collects(at: Any) -> None:
    async with at() as here:
        await here.send(inputs_of(20))
        here.server.batching.looks = 0
        await asyncio.gather(*(here.collect() for _ in range(5)))
        await here.finish()
        assert len(await here.records()) == 20
        await here.is_exact()


async def test_who_has_lost_a_batch_changes_nothing(at: Any) -> None:
    async with at() as here:
        [batch] = await here.send(inputs_of(2))
        old = await here.store.acquire(f"batch/{batch.id}", "old", here.now, 10.0)
        await here.store.acquire(f"batch/{batch.id}", "new", here.now + 11, 10.0)
        with pytest.raises(StoreError, match="is over"):
            await here.store.keep_batch(batch, lease=old)


# --- what goes wrong --------------------------------------------------------------------------------------------------


async def test_a_creation_that_is_turned_away_for_now_is_tried_again(at: Any) -> None:
    async with at() as here:
        here.server.batching.refused = [(429, "rate_limit_exceeded")] * 2
        [sent] = await here.send(inputs_of(5))
        assert (sent.state, sent.open) == ("prepared", True)
        [batch] = await here.finish()
        assert (batch.state, len(here.server.counter.jobs)) == ("ended", 1)
        await here.is_exact()


@pytest.mark.parametrize("wire", WIRES)
async def test_a_creation_that_is_refused_costs_nothing_and_is_said(at: Any, wire: str) -> None:
    async with at(wire) as here:
        here.server.batching.refused = [(403, "no")]
        [sent] = await here.send(inputs_of(5))
        assert (sent.state, sent.end, sent.open) == ("failed", "released", False)
        assert len(await here.events("BATCH_FAILED")) == 1
        await here.is_exact()
        [again] = await here.send(inputs_of(5))
        assert again.state == "submitted"


@pytest.mark.parametrize("wire", WIRES)
async def test_answers_that_are_none_are_recorded_with_their_price_and_teach_nothing(at: Any, wire: str) -> None:
    odd: list[Any] = [
        Reply("I will not.", finish="refused"),
        Reply({"kind": "fruit"}, finish="truncated"),
        {"kind": "no such kind"},
        "no JSON",
        Reply(status=400, code="invalid_request_error"),
    ]
    inputs = inputs_of(8)
    script = {input["text"]: reply for input, reply in zip(inputs, odd, strict=False)}

    def answer(body: dict[str, Json]) -> Any:
        return script.get(asked(body)["text"]) or honest(body)

    async with at(wire, answer) as here:
        await here.send(inputs)
        await here.finish()
        await here.is_exact()
        records = {record.input["text"]: record for record in await here.records()}
        for text in script:
            assert records[text].served is None
            assert records[text].error
            remote = records[text].remote
            assert remote is None or remote.output is None
        assert records[inputs[4]["text"]].cost == 0
        assert await here.store.count("sort", labelled=True) == 3
        [again] = await here.send(inputs)
        assert [input["text"] for input in again.inputs] == list(script)


async def test_an_answer_without_usage_counts_with_its_worst_case(at: Any) -> None:
    def answer(body: dict[str, Json]) -> Any:
        return Reply(honest(body), silent="number 1" in asked(body)["text"])

    async with at("openai", answer) as here:
        [sent] = await here.send(inputs_of(3))
        [batch] = await here.finish()
        records = {record.request_id: record.cost for record in await here.records()}
        assert records[batch.request_ids[1]] == sent.worsts[1]
        charges = [seen.charge // 1_000_000 for seen in here.server.batched]
        assert await here.ledger() == batch.cost == sum(records.values()) == charges[0] + sent.worsts[1] + charges[2]


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
async def test_of_a_batch_that_expired_what_was_answered_counts(at: Any, wire: str) -> None:
    async with at(wire) as here:
        here.server.batching.end, here.server.batching.answered = "expired", 4
        await here.send(inputs_of(10))
        await here.finish()
        assert await here.store.count("sort", labelled=True) == 4
        assert [record.cost for record in await here.records() if record.served is None] == [0] * 6
        await here.is_exact()
        here.server.batching.end = "completed"
        [again] = await here.send(inputs_of(10))
        assert len(again.inputs) == 6
        await here.finish()
        assert await here.store.count("sort", labelled=True) == 10
        await here.is_exact()


@pytest.mark.parametrize("end", ["expired", "failed"])
async def test_a_batch_of_google_that_ended_without_results_counts_as_spent(at: Any, end: Any) -> None:
    async with at("google") as here:
        here.server.batching.end = end
        [sent] = await here.send(inputs_of(10))
        [batch] = await here.finish()
        assert await here.ledger() == batch.cost == sent.worst == sum(record.cost for record in await here.records())
        assert not await here.store.holds(float("inf"))


async def test_a_file_that_openai_finds_wrong_costs_nothing(at: Any) -> None:
    async with at() as here:
        await here.send(inputs_of(3))
        here.server.counter.jobs[0].problem = "line 2 is no request"
        await here.finish()
        assert {record.error for record in await here.records()} == {
            "ModelRejected: openai/gpt-4o-mini: the batch is failed: line 2 is no request"
        }
        await here.is_exact()


@pytest.mark.parametrize("wire", WIRES)
async def test_a_request_that_the_results_leave_out_counts_with_its_worst_case(at: Any, wire: str) -> None:
    async with at(wire) as here:
        here.server.batching.unlisted = 2
        [sent] = await here.send(inputs_of(5))
        [batch] = await here.finish()
        answered = sum(seen.charge for seen in here.server.batched[:3]) // 1_000_000
        assert await here.ledger() == batch.cost == answered + sum(sent.worsts[3:])


async def test_a_batch_that_the_caps_have_no_room_for_is_not_sent(at: Any) -> None:
    async with at(budget={"total": Decimal("0.001"), "wait": 0.0}) as here:
        with pytest.raises(BudgetExhausted):
            await here.send(inputs_of(50))
        assert here.server.counter.jobs == []
        assert [(batch.state, batch.open) for batch in await here.store.batches()] == [("failed", False)]
        assert await here.ledger() == 0
        here.config = here.config.model_copy(update={"budget": here.config.budget.model_copy(update={"total": None})})
        [sent] = await here.send(inputs_of(50))
        assert len(sent.inputs) == 50


async def test_a_hold_of_days_is_left_to_who_collects(at: Any) -> None:
    async with at() as here:
        [sent] = await here.send(inputs_of(5))
        here.now += 3 * DAY
        async with here.bulk():  # opening a purse sweeps what dead processes held
            assert [hold.attempt_id for hold in await here.store.holds(float("inf"))] == [sent.id]
        await here.finish()
        await here.is_exact()


async def test_a_provider_that_bills_more_than_it_can_is_suspended(at: Any) -> None:
    def answer(body: dict[str, Json]) -> Reply:
        return Reply(honest(body), usage=Usage(input_tokens=10**6, output_tokens=10**6))

    async with at("openai", answer) as here:
        await here.send(inputs_of(2))
        [batch] = await here.finish()
        assert await here.ledger() == batch.cost == 2 * 6_000_000
        assert list(await suspended_models(here.store)) == ["openai/gpt-4o-mini"]
        [sent] = await here.send(inputs_of(4)[2:])
        assert sent.state == "prepared"
        assert "suspended" in (sent.problem or "")
        assert len(here.server.counter.jobs) == 1


async def test_batches_of_a_model_that_is_gone_wait_for_it_and_are_given_up_in_the_end(at: Any) -> None:
    async with at() as here:
        [sent] = await here.send(inputs_of(2))
        other = here.config.remote.model_copy(update={"model": "another"})
        here.config = here.config.model_copy(update={"remote": other})
        [batch] = await here.collect()
        assert "not configured" in (batch.problem or "")
        here.now += 30 * DAY
        [batch] = await here.collect()
        assert (batch.state, batch.end, batch.open) == ("failed", "assumed", False)
        assert await here.ledger() == sent.worst


async def test_a_batch_is_ended_early_and_what_was_answered_is_paid_for(at: Any) -> None:
    async with at() as here:
        here.server.batching.looks, here.server.batching.answered = 99, 3
        await here.send(inputs_of(8))
        async with here.bulk() as bulk:
            assert await bulk.cancel("sort") == 1
        await here.finish()
        assert await here.store.count("sort", labelled=True) == 3
        await here.is_exact()


async def test_a_model_without_batches_says_so(at: Any) -> None:
    rows = [{"text": "a", "teacher": "b"}]
    async with at() as here, here.bulk() as bulk:
        bulk._main._model = plugins.build("models", "recorded", rows=rows)
        with pytest.raises(ConfigError, match="takes no batches"):
            await bulk.plan("sort", inputs_of(1))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_judged_whole_and_names_line_and_field(configured: Configured, tmp_path: Path) -> None:
    task = configured().tasks[0]
    path = tmp_path / "inputs.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n{"text": "b\u2028c"}\r\n')
    assert read_inputs(task, path) == [{"text": "a"}, {"text": "b\u2028c"}]
    path.write_text('{"text": "a"}\n{"txt": "a"}\n{"text": 5}\nno\n{"text": NaN}\n' + "[]\n" * 5)
    with pytest.raises(InvalidInput) as error:
        read_inputs(task, path)
    for part in ("line 2: ", "line 3: ", "text", "line 4: is not JSON", "line 5: ", "and 4 more"):
        assert part in str(error.value)
    for wrong in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_inputs(task, wrong)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_inputs(task, path)


@given(
    sizes=st.lists(st.integers(1, 30), max_size=40),
    requests=st.integers(1, 9),
    most=st.integers(1, 40),
)
def test_a_split_keeps_all_in_order_within_the_limits(sizes: list[int], requests: int, most: int) -> None:
    runs = [sizes[run] for run in split(sizes, Limits(requests, most))]
    assert [size for run in runs for size in run] == sizes
    for run in runs:
        assert 1 <= len(run) <= requests
        assert sum(run) <= most or len(run) == 1
    for run, after in itertools.pairwise(runs):
        assert len(run) == requests or sum(run) + after[0] > most  # none is begun too early


async def test_a_large_file_goes_in_several_batches(at: Any) -> None:
    async with at() as here, here.bulk() as bulk:
        model = bulk._main.model()
        model.batch_limits = Limits(requests=4, bytes=10**9)
        sent = await bulk.send(await bulk.plan("sort", inputs_of(10)))
        assert [len(batch.inputs) for batch in sent] == [4, 4, 2]
        assert len({batch.id for batch in sent}) == len(here.server.counter.jobs) == 3
        await here.finish()
        assert await here.store.count("sort", labelled=True) == 10
        await here.is_exact()
