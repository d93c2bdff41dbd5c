"""Teachers label what nobody may learn from otherwise: in order, within the caps, each answer once; and are compared."""

from __future__ import annotations

import asyncio
import contextlib
import doctest
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pytest

from apprentice import cli, comparison, feedback, plugins, teachers
from apprentice.comparison import Comparison, Measured, evidence, propose
from apprentice.config import Config, Price, Remote
from apprentice.engine import new_id
from apprentice.errors import BudgetError, ConfigError, TrainingError
from apprentice.learn import lawful, learn, select
from apprentice.promotion import fingerprint, held_out
from apprentice.report import report
from apprentice.teachers import Labelled, Teachers, before_cycle, examples, near_any
from apprentice.testing.servers import (
    Reply,
    Server,
    asked,
    serve_anthropic,
    serve_google,
    serve_openai,
)
from apprentice.types import Answer, Decision, Event, Hold, Json, Label, Record, Store, Version

from .conftest import YAML, honest, right, texts
from .test_bulk import PRICE, Died, Dying

type Configured = Callable[..., Config]

WIRES: dict[str, Any] = {"openai": serve_openai, "anthropic": serve_anthropic, "google": serve_google}
OPEN, CLOSED = "qwen3-32b", "gpt-4o"  # on an operator's own server the weights' licence counts
DOWN = Reply(status=503, code="server_is_overloaded")
NOW = 1_795_218_000.0
WRONG = {"fruit": "animal", "animal": "tool", "tool": "fruit"}


def local(number: int, text: str, **more: Any) -> Record:
    """A request that the local model answered alone."""
    fields = {
        "request_id": f"r{number}",
        "task": "sort",
        "at": NOW - 1000 + number,
        "input": {"text": text},
        "decision": Decision(route="local", reason="certified", p=0.02),
        "local": Answer(output={"kind": "tool"}, confidence=0.9),
        "served": "local",
    }
    return Record.model_validate(fields | more)


def remotely(number: int, text: str, model: str) -> Record:
    """A request that a remote at 127.0.0.1 answered."""
    answer = Answer(output={"kind": "tool"}, model=model, provider="openai@127.0.0.1")
    made = Decision(route="remote", reason="no_local_model", p=1.0)
    return local(number, text, local=None, remote=answer, served="remote", decision=made)


def taught(n: int, seed: int = 0) -> list[str]:
    """Texts that are not held out."""
    return [text for text in texts(4 * n + 20, seed) if not held_out(fingerprint({"text": text}))][:n]


@dataclass
class Place:
    """Teachers at their servers, a configuration that names them, and a store that outlives whoever works on it."""

    servers: list[Server]
    config: Config
    store: Store
    now: float = NOW

    def teachers(self, store: Any = None) -> Teachers:
        return Teachers(
            self.config,
            store or self.store,
            clock=lambda: self.now,
            new_id=new_id,
            dice=Random(0),
            owner="test",
        )

    async def filled(self, n: int) -> list[str]:
        found = taught(n)
        for number, text in enumerate(found):
            await self.store.append(local(number, text))
        return found

    async def labels(self) -> list[Label]:
        return await self.store.labels("sort")

    async def ledger(self) -> int:
        return (await self.store.spent(["total"]))["total"]

    async def bill(self) -> int:
        return sum(server.bill for server in self.servers)

    async def events(self, name: str) -> list[Event]:
        return await self.store.events("sort", names=[name])

    async def is_exact(self) -> None:
        """The providers' bills, the ledger and the Labels say the same, and nothing is held."""
        assert await self.ledger() == await self.bill() == sum(label.cost for label in await self.labels())
        assert not await self.store.holds(float("inf"))

    async def compare(self, rows: int = 100) -> Comparison:
        made = self.teachers()
        return await comparison.compare(made, await comparison.prepare(made, "sort", rows=rows))

    async def corrected(self, n: int) -> None:
        """So many requests with a person's word about each."""
        for number, text in enumerate(texts(n, seed=7)):
            await self.store.append(local(number, text))
            target = {"kind": right(text)}
            await feedback.give(self.config, self.store, f"r{number}", "corrected", at=NOW, target=target, by="ann")


@pytest.fixture
def at(configured: Configured) -> Callable[..., Any]:
    """A Place with these teachers, each (wire, model, how it answers, changes of its section)."""

    @asynccontextmanager
    async def place(
        *given: tuple[str, str, Any, dict[str, Any]], budget: dict[str, Any] | None = None, text: str = YAML
    ) -> AsyncIterator[Place]:
        async with contextlib.AsyncExitStack() as opened:
            servers, made = [], []
            for wire, model, answer, more in given:
                price = more.pop("tariff", PRICE)
                server = await opened.enter_async_context(WIRES[wire](answer, price=price))
                servers.append(server)
                fields: dict[str, Any] = {
                    "provider": wire,
                    "model": model,
                    "base_url": server.url,
                    "allow_internal": True,
                    "price": Price(input=Decimal(price[0]) / 10**6, output=Decimal(price[1]) / 10**6),
                    "max_tokens": 64,
                    "timeout": 20,
                    "retries": 0,
                }
                made.append(Remote.model_validate(fields | more))
            config = configured(text=text, budget=budget or {}).model_copy(update={"teachers": tuple(made)})
            store: Store = plugins.build("stores", "sqlite", path=config.store.path)
            opened.push_async_callback(store.close)
            yield Place(servers, config, store)

    return place


def says(kind: str) -> Callable[[dict[str, Json]], Json]:
    return lambda _: {"kind": kind}


# --- what labelling brings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
async def test_what_only_the_local_model_answered_gets_labels_that_teach(at: Any, wire: str) -> None:
    async with at((wire, OPEN, honest, {})) as here:
        await here.filled(12)
        done = await here.teachers().label("sort", limit=100)
        assert (done.labels, done.useless, done.problem) == (12, 0, None)
        rows = examples(await here.labels())
        assert {(row.source, row.model, row.teacher, row.at) for row in rows} == {
            ("teacher", OPEN, f"{wire}@127.0.0.1", NOW)
        }
        assert all(row.target == {"kind": right(row.input["text"])} for row in rows)
        selection = select(await here.store.records("sort", labelled=True))._replace(training=rows)
        permitted, sifted = lawful(here.config, here.config.tasks[0], selection, date(2026, 11, 21))
        assert (len(permitted.training), len(sifted.refused)) == (12, 0)
        assert {row.terms for row in permitted.training} == {"permissive"}
        await here.is_exact()
        assert done.cost == await here.ledger() > 0
        assert {(line.purpose, line.model, line.attempts) for line in await here.store.spending()} == {
            ("label", f"{wire}/{OPEN}", 12)
        }
        assert await here.store.count("sort") == 12  # a Label is no Record
        [event] = await here.events("LABELLED")
        assert Labelled.model_validate(event.evidence) == done
        assert (await here.teachers().label("sort", limit=100)).labels == 0
        assert len(here.servers[0].requests) == 12


async def test_only_what_nobody_may_learn_from_is_labelled_once_an_input_and_the_newest_first(at: Any) -> None:
    async with at(("openai", OPEN, honest, {})) as here:
        plain = taught(8)
        kept = next(text for text in texts(200) if held_out(fingerprint({"text": text})))
        records = [
            local(0, plain[0]),
            remotely(1, plain[1], CLOSED),  # its terms do not let it teach
            remotely(2, plain[2], OPEN),  # this one teaches already
            local(3, kept),  # held out
            local(4, plain[3], served=None, error="nobody answered"),
            local(5, plain[4]),  # a person said what is right
            local(6, plain[0].capitalize() + "  "),  # the same again
            local(7, plain[5], input={"words": plain[5]}),  # of an earlier schema
            local(8, plain[6]),  # near a row of a benchmark
            local(9, plain[7]),
            local(10, plain[2]),  # answered by one that teaches, before
        ]
        for record in records:
            await here.store.append(record)
        await feedback.give(here.config, here.store, "r5", "corrected", at=NOW, target={"kind": "tool"})

        excluded = near_any([[{"text": plain[6] + "!"}], [{"text": "nothing like any of them"}]], 0.8)
        plan = await here.teachers().plan("sort", limit=2, excluded=excluded)
        assert ([record.request_id for record in plan.rows], plan.left) == (["r9", "r6"], 1)
        await here.teachers().label("sort", limit=2, excluded=excluded)
        assert [label.request_id for label in await here.labels()] == ["r9", "r6"]
        await here.teachers().label("sort", limit=9, excluded=excluded)
        assert [label.request_id for label in await here.labels()] == ["r9", "r6", "r1"]
        assert len(here.servers[0].requests) == 3


async def test_a_plan_says_what_it_comes_to_and_sends_nothing(at: Any) -> None:
    async with at(("openai", OPEN, honest, {}), ("anthropic", "phi-4", honest, {})) as here:
        await here.filled(5)
        plan = await here.teachers().plan("sort", limit=3)
        assert (len(plan.rows), plan.left, plan.model, plan.expected) == (3, 2, f"openai/{OPEN}", None)
        assert not any(server.requests for server in here.servers)
        assert await here.ledger() == 0 and not await here.store.spending()
        await here.teachers().label("sort", limit=3)
        assert 0 < await here.ledger() < plan.worst


async def test_the_list_has_order_licence_and_price_and_asks_nobody(at: Any) -> None:
    unpriced = ("openai", "olmo-2", honest, {"price": None})
    given = [("openai", OPEN, honest, {}), ("openai", CLOSED, honest, {}), ("google", "phi-4", honest, {}), unpriced]
    async with at(*given) as here:
        listed = await here.teachers().listed("sort")
        assert [one.role for one in listed] == ["primary", "backup", "secondary", "secondary"]
        assert [one.may_label for one in listed] == [True, False, True, False]
        assert [one.terms for one in listed] == ["permissive", "conditional", "permissive", "permissive"]
        assert "not in the price table" in listed[3].problem and listed[0].per_1000 is None
        assert all("\n" not in one.licence for one in listed)
        answer = Answer(output={"kind": "tool"}, model=CLOSED, usage={"input_tokens": 100, "output_tokens": 10})
        await here.store.append(remotely(1, "a pear", CLOSED).model_copy(update={"remote": answer}))
        assert [one.per_1000 for one in await here.teachers().listed("sort")] == [300_000, 300_000, 300_000, None]
        assert not any(server.requests for server in here.servers)


# --- who is asked -----------------------------------------------------------------------------------------------------


async def test_a_teacher_whose_terms_forbid_it_or_whose_price_is_unknown_is_never_asked(at: Any) -> None:
    unpriced = ("openai", "olmo-2", honest, {"price": None})
    async with at(("openai", CLOSED, honest, {}), unpriced, ("anthropic", "phi-4", honest, {})) as here:
        await here.filled(6)
        assert (await here.teachers().label("sort", limit=10)).by == {"phi-4": 6}
        assert [len(server.requests) for server in here.servers] == [0, 0, 6]
        await here.is_exact()


async def test_where_no_teacher_may_label_it_says_why_of_each_and_sends_nothing(at: Any) -> None:
    unpriced = ("openai", "olmo-2", honest, {"price": None})
    async with at(("openai", CLOSED, honest, {}), unpriced) as here:
        await here.filled(3)
        for act in (here.teachers().label("sort", limit=3), here.teachers().plan("sort")):
            with pytest.raises(ConfigError, match=r"gpt-4o.*may not label.*olmo-2.*not in the price table"):
                await act
        assert not any(server.requests for server in here.servers)
    async with at() as here:
        with pytest.raises(ConfigError, match="none is configured"):
            await here.teachers().label("sort", limit=3)


async def test_a_permission_for_the_task_lets_a_closed_teacher_label(at: Any) -> None:
    said = {"basis": "a letter", "by": "ann", "date": "2026-01-01", "scope": "sort"}
    async with at(("openai", CLOSED, honest, {"permission": said})) as here:
        await here.filled(2)
        assert (await here.teachers().label("sort", limit=9)).labels == 2


async def test_a_missing_key_is_said_before_anybody_is_asked(at: Any) -> None:
    async with at(("openai", OPEN, honest, {}), ("anthropic", "phi-4", honest, {"api_key_env": "NO_SUCH_KEY"})) as here:
        await here.filled(2)
        with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
            await here.teachers().label("sort", limit=3)
        assert not here.servers[0].requests


async def test_they_are_asked_in_order_whatever_their_weights_and_each_attempt_has_its_own_hold(at: Any) -> None:
    def sick(body: dict[str, Json]) -> Json:
        number = int(asked(body)["text"].rpartition(" ")[2])
        return [honest(body), DOWN, Reply({"kind": "stone"})][number % 3]

    async with at(("openai", OPEN, sick, {"weight": 0.001}), ("anthropic", "phi-4", honest, {"weight": 1000})) as here:
        asked_for = await here.filled(9)
        done = await here.teachers().label("sort", limit=9)
        expected = {0: [OPEN], 1: [OPEN, "phi-4"], 2: [OPEN, "phi-4"]}
        wanted = [int(text.rpartition(" ")[2]) % 3 for text in asked_for][::-1]
        assert set(wanted) == {0, 1, 2} and done.labels == 9
        labels = await here.labels()
        for label, kind in zip(labels, wanted, strict=True):
            assert [attempt.model.rpartition("/")[2] for attempt in label.attempts] == expected[kind]
        attempts = [attempt for label in labels for attempt in label.attempts]
        assert len({attempt.attempt_id for attempt in attempts}) == len(attempts)
        assert done.by == {OPEN: wanted.count(0), "phi-4": 9 - wanted.count(0)}
        await here.is_exact()


# --- when there is no answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("useless", [Reply({"kind": "stone"}), Reply("", finish="refused")], ids=["invalid", "refused"])
async def test_what_teachers_have_no_answer_of_use_for_is_paid_once_and_not_asked_again(
    at: Any, useless: Reply
) -> None:
    def some(body: dict[str, Json]) -> Json:
        return useless if thing in asked(body)["text"] else honest(body)

    async with at(("openai", OPEN, some, {})) as here:
        found = await here.filled(30)
        thing = found[0].split()[4]
        odd = sum(thing in text for text in found)
        done = await here.teachers().label("sort", limit=100)
        assert (done.labels, done.useless, done.problem) == (30 - odd, odd, None)
        assert len(examples(await here.labels())) == 30 - odd
        await here.is_exact()
        assert (await here.teachers().plan("sort")).rows == []


async def test_teachers_that_are_down_end_it_and_are_asked_again_another_time(at: Any) -> None:
    replies: list[Any] = [DOWN] * 50
    async with at(("openai", OPEN, lambda body: replies.pop() if replies else honest(body), {})) as here:
        await here.filled(12)
        done = await here.teachers().label("sort", limit=100)
        assert done.labels == 0 and "5 requests in a row" in (done.problem or "")
        assert len(here.servers[0].requests) == 5 and await here.ledger() == 0
        [event] = await here.events("LABELLING_STOPPED")
        assert event.message == done.problem
        replies.clear()
        assert (await here.teachers().label("sort", limit=100)).labels == 12


async def test_money_that_runs_out_ends_it_and_nothing_that_was_labelled_is_lost(at: Any) -> None:
    async with at(("openai", OPEN, honest, {}), budget={"total": Decimal("0.01"), "wait": 0}) as here:
        await here.filled(40)
        done = await here.teachers().label("sort", limit=100)
        assert 0 < done.labels < 40 and "total" in (done.problem or "")
        assert await here.ledger() <= 10_000
        assert len(here.servers[0].requests) == done.labels == len(await here.labels())
        await here.is_exact()
        assert (await here.teachers().label("sort", limit=100)).labels == 0
        assert len(await here.events("LABELLING_STOPPED")) == len(await here.events("BUDGET_EXHAUSTED")) == 1
        here.config = here.config.model_copy(
            update={"budget": here.config.budget.model_copy(update={"total": Decimal(1)})}
        )
        assert (await here.teachers().label("sort", limit=100)).labels == 40 - done.labels
        await here.is_exact()


# --- a process that dies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["reserve", "settle", "add_label", "renew", "add_event"])
async def test_a_process_that_dies_loses_one_answer_at_most_and_counts_none_twice(
    at: Any, call: str, after: bool
) -> None:
    async with at(("openai", OPEN, honest, {})) as here:
        await here.filled(6)
        number = 1 if call == "add_event" else 3
        with pytest.raises(Died):
            await here.teachers(Dying(here.store, call, after=after, number=number)).label("sort", limit=100)
        here.now += 1000.0  # its lease is over, and what it held is given up
        done = await here.teachers().label("sort", limit=100)
        labels = await here.labels()
        assert done.problem is None and sorted(label.request_id for label in labels) == [f"r{n}" for n in range(6)]
        lost = len(here.servers[0].requests) - 6
        assert lost == (1 if (call, after) in {("settle", False), ("settle", True), ("add_label", False)} else 0)
        assert not await here.store.holds(float("inf"))
        attempts = sum(line.attempts for line in await here.store.spending())
        unsent = (call, after) == ("reserve", True)  # held, and nobody knows that it was not sent
        assert attempts == 6 + lost + unsent
        assert await here.ledger() >= await here.bill() >= sum(label.cost for label in labels)
        if (call, after) not in {("settle", False), ("reserve", True)}:  # those count with their worst case
            assert await here.ledger() == await here.bill()


async def test_a_command_that_is_killed_has_kept_every_label_but_the_one_that_it_waited_for(
    at: Any, tmp_path: Path
) -> None:
    asked_for_fourth = asyncio.Event()

    def answer(body: dict[str, Json]) -> Json:
        if len(here.servers[0].requests) != 3:
            return honest(body)
        asked_for_fourth.set()
        return Reply(honest(body), wait=asyncio.Event())  # for ever

    async with at(("openai", OPEN, answer, {})) as here:
        await here.filled(6)
        one = here.config.teachers[0].model_dump_json(exclude_defaults=True)
        text = YAML.replace("BASE_URL", here.servers[0].url)
        text += f"store: {{path: '{here.config.store.path}'}}\nteachers: [{one}]\n"
        (tmp_path / "killed.yaml").write_text(text)
        command = ["-m", "apprentice.cli", "teachers", "label", "sort", "--config", str(tmp_path / "killed.yaml")]
        process = await asyncio.create_subprocess_exec(sys.executable, *command)
        waited = [asyncio.create_task(asked_for_fourth.wait()), asyncio.create_task(process.wait())]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        assert asked_for_fourth.is_set(), "the command ended by itself"
        process.kill()
        await asyncio.wait(waited)
        assert len(await here.labels()) == 3
        here.now = time.time() + 1000.0
        done = await here.teachers().label("sort", limit=100)
        labels = await here.labels()
        assert done.labels == 3 and len({label.request_id for label in labels}) == 6
        assert len(here.servers[0].requests) == 7 and not await here.store.holds(float("inf"))
        assert sum(line.attempts for line in await here.store.spending()) == 7
        assert await here.ledger() >= await here.bill() > sum(label.cost for label in labels)


async def test_who_is_cancelled_while_a_teacher_answers_has_kept_what_came_before(at: Any) -> None:
    gate, seen = asyncio.Event(), asyncio.Event()

    def slow(body: dict[str, Json]) -> Json:
        if len(here.servers[0].requests) < 3 or gate.is_set():
            return honest(body)
        seen.set()
        return Reply(honest(body), wait=gate)

    async with at(("openai", OPEN, slow, {})) as here:
        await here.filled(6)
        work = asyncio.create_task(here.teachers().label("sort", limit=100))
        await seen.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        gate.set()
        assert len(await here.labels()) == 3
        assert not await here.store.holds(float("inf"))  # it counts as spent: nobody knows
        assert await here.ledger() >= await here.bill()
        assert (await here.teachers().label("sort", limit=100)).labels == 3  # the lease was given back


async def test_two_at_once_do_not_pay_for_the_same_label(at: Any) -> None:
    async with at(("openai", OPEN, honest, {})) as here:
        await here.filled(10)
        done = await asyncio.gather(*(here.teachers().label("sort", limit=100) for _ in range(3)))
        assert sorted(one.labels for one in done) == [0, 0, 10]
        assert [one.problem for one in done].count("another process is labelling this task") == 2
        assert len(here.servers[0].requests) == 10
        await here.is_exact()


async def test_who_lost_the_lease_asks_no_more(at: Any) -> None:
    taken = asyncio.Event()

    async def answer(body: dict[str, Json]) -> Json:
        if len(here.servers[0].requests) == 1 and not taken.is_set():
            taken.set()
            here.now += 1000.0
            assert await here.store.acquire("label/sort", "another", here.now, 1000.0) is not None
        return honest(body)

    async with at(("openai", OPEN, answer, {})) as here:
        await here.filled(6)
        done = await here.teachers().label("sort", limit=100)
        assert (done.labels, done.problem) == (2, "another process took over")


# --- before a cycle ---------------------------------------------------------------------------------------------------


async def before(here: Place, limit: int) -> Labelled | None:
    return await before_cycle(
        here.config,
        "sort",
        here.store,
        limit=limit,
        clock=lambda: here.now,
        new_id=new_id,
        dice=Random(0),
        owner="test",
    )


async def test_a_cycle_gets_so_many_labels_at_most_however_often_it_is_begun(at: Any) -> None:
    async with at(("openai", OPEN, honest, {})) as here:
        await here.filled(20)
        assert await before(here, 0) is None
        first = await before(here, 5)
        assert first is not None and first.labels == 5
        assert await before(here, 5) is None
        again = await before(here, 8)
        assert again is not None and again.labels == 3
        here.now += 10.0
        made = {"checkpoint": "sha256-0", "path": "p", "state": "candidate", "trained_on": 8}
        await here.store.add_version(Version(id="", task="sort", created_at=here.now, **made))
        here.now += 10.0
        next_one = await before(here, 8)
        assert next_one is not None and next_one.labels == 8
        await here.is_exact()


async def test_what_keeps_teachers_from_labelling_is_said_once_and_stops_no_cycle(at: Any) -> None:
    async with at(("openai", CLOSED, honest, {})) as here:
        await here.filled(3)
        for _ in range(2):
            found = await before(here, 5)
            assert found is not None and found.labels == 0 and "no teacher may label" in (found.problem or "")
        assert len(await here.events("LABELLING_STOPPED")) == 1
        assert not here.servers[0].requests


async def test_a_cycle_whose_remote_may_not_teach_learns_from_a_teacher_and_proves_it(at: Any) -> None:
    async with at(("anthropic", OPEN, honest, {})) as here:
        remote = here.config.remote.model_copy(update={"permission": None, "model": CLOSED})
        student = here.config.local.model_copy(update={"teacher_labels": 60})
        here.config = here.config.model_copy(update={"remote": remote, "local": student})
        for number, text in enumerate(texts(90)):
            await here.store.append(remotely(number, text, CLOSED))
        silent = here.config.model_copy(update={"teachers": ()})
        with pytest.raises(TrainingError, match="may not train"):
            await learn(silent, "sort", here.store, clock=lambda: here.now, owner="a")
        version = await learn(here.config, "sort", here.store, clock=lambda: here.now, owner="a")
        assert version is not None and version.state == "champion"
        assert version.trained_on == len(await here.labels()) == len(here.servers[0].requests) == 60
        assert version.metrics["labels"] == await feedback.known(here.store, "sort") == 150
        proof = json.dumps(version.metrics["licence"])
        assert "anthropic@own server" in proof and "openai" not in proof
        assert version.metrics["examination"]["agreement"] is not None
        await here.is_exact()


async def test_a_cycle_goes_on_where_no_teacher_answers(at: Any) -> None:
    async with at(("anthropic", OPEN, [DOWN], {})) as here:
        student = here.config.local.model_copy(update={"teacher_labels": 60})
        here.config = here.config.model_copy(update={"local": student})
        for number, text in enumerate(texts(60)):
            await here.store.append(remotely(number, text, here.config.remote.model))
        for number, text in enumerate(taught(10, seed=5), start=100):
            await here.store.append(local(number, text))
        version = await learn(here.config, "sort", here.store, clock=lambda: here.now, owner="a")
        assert version is not None and version.state == "champion"
        assert len(await here.events("LABELLING_STOPPED")) == 1


# --- comparing --------------------------------------------------------------------------------------------------------


def wrong_on(share: float, seed: int = 0) -> Callable[[dict[str, Json]], Json]:
    """A teacher that is wrong about this share of the texts, always about the same ones."""

    def answer(body: dict[str, Json]) -> Json:
        kind = honest(body)["kind"]
        return {"kind": WRONG[kind] if Random(f"{seed}{asked(body)['text']}").random() < share else kind}

    return answer


def moody(share: float) -> Callable[[dict[str, Json]], Json]:
    """One that is wrong in its second answer to this share of the texts."""
    seen: set[str] = set()

    def answer(body: dict[str, Json]) -> Json:
        text, kind = asked(body)["text"], honest(body)["kind"]
        second = text in seen
        seen.add(text)
        return {"kind": WRONG[kind] if second and Random(text).random() < share else kind}

    return answer


DEAR, CHEAP = (4_000_000, 20_000_000), (1_000_000, 5_000_000)


async def test_all_answer_the_same_gold_twice_and_the_figures_are_what_they_did(at: Any) -> None:
    given = [
        ("openai", OPEN, wrong_on(0.3), {"tariff": CHEAP}),
        ("anthropic", "phi-4", honest, {"tariff": DEAR}),
        ("google", CLOSED, wrong_on(0.3), {}),
    ]
    async with at(*given) as here:
        await here.corrected(50)
        found = await here.compare(rows=40)
        first, second, third = found.teachers
        assert found.rows == 40 and [len(server.requests) for server in here.servers] == [80, 80, 80]
        texts_of = {asked(seen.body)["text"] for seen in here.servers[1].requests}
        assert all({asked(seen.body)["text"] for seen in server.requests} == texts_of for server in here.servers)
        share = sum(Random(f"0{text}").random() >= 0.3 for text in texts_of) / 40
        assert 0.4 < share < 0.95
        assert first.quality == third.quality == pytest.approx(share) and second.quality == 1.0
        assert first.lower is not None and first.upper is not None and 0 < first.lower < share < first.upper < 1
        assert (first.itself, second.itself, third.itself) == (1.0, 1.0, 1.0)
        agreed = {(pair.one, pair.other): pair.agreement for pair in found.pairs}
        assert agreed == {
            (f"openai/{OPEN}", "anthropic/phi-4"): pytest.approx(share),
            (f"openai/{OPEN}", f"google/{CLOSED}"): 1.0,  # the same questions, the same mistakes
            ("anthropic/phi-4", f"google/{CLOSED}"): pytest.approx(share),
        }
        assert found.ceiling == pytest.approx((1 + 2 * share) / 3)
        for one, server in zip(found.teachers, here.servers, strict=True):
            assert one.cost == server.bill and one.per_1000 == pytest.approx(server.bill * 1000 / 80)
            assert one.p50 is not None and one.p50 > 0 and one.rows == 40
        assert found.cost == await here.ledger() == await here.bill()
        assert [one.may_train for one in found.teachers] == [True, True, False]
        assert not await here.store.holds(float("inf")) and not await here.labels()
        assert {line.purpose for line in await here.store.spending()} == {"judge"}
        assert await comparison.last(here.store, "sort") == found
        [told] = await report(here.config, here.store)
        assert told.teachers == found
        assert await comparison.last(here.store, "other") is None
        assert found.proposal is None  # the better one is dearer
        again = await here.compare(rows=40)
        assert {asked(seen.body)["text"] for seen in here.servers[1].requests} == texts_of  # the same rows again
        assert again.teachers[0].quality == first.quality


@pytest.mark.parametrize(
    ("primary", "backup", "dear", "cheap", "model", "proposed"),
    [
        (wrong_on(0.4), honest, DEAR, CHEAP, "phi-4", True),
        (wrong_on(0.4), honest, CHEAP, DEAR, "phi-4", False),  # dearer
        (wrong_on(0.05), honest, DEAR, CHEAP, "phi-4", False),  # no better than noise explains
        (wrong_on(0.6), "moody", DEAR, CHEAP, "phi-4", False),  # less steady
        (honest, wrong_on(0.4), DEAR, CHEAP, "phi-4", False),  # worse
        (wrong_on(0.4), honest, DEAR, CHEAP, CLOSED, False),  # it may not teach
    ],
    ids=["all", "price", "noise", "itself", "worse", "licence"],
)
async def test_a_switch_is_proposed_only_where_one_is_better_in_all_and_may_teach(
    at: Any, primary: Any, backup: Any, dear: Any, cheap: Any, model: str, proposed: bool
) -> None:
    other = moody(0.2) if backup == "moody" else backup
    async with at(("openai", OPEN, primary, {"tariff": dear}), ("anthropic", model, other, {"tariff": cheap})) as here:
        await here.corrected(40)
        found = await here.compare(rows=40)
        events = await here.events("TEACHER_SWITCH_PROPOSED")
        if proposed:
            assert (found.proposal, found.instead_of) == ("anthropic/phi-4", f"openai/{OPEN}")
            [event] = events
            assert event.message == found.reason and event.evidence["proposal"] == found.proposal
        else:
            assert found.proposal is None and not events
        assert len(await here.events("TEACHERS_COMPARED")) == 1
        await here.store.append(local(999, "an apple for nobody"))
        plan = await here.teachers().plan("sort")
        assert plan.model == f"openai/{OPEN}"  # nothing was switched


async def test_a_comparison_needs_gold_prices_teachers_and_room_before_anything_is_sent(at: Any) -> None:
    async with at(("openai", OPEN, honest, {}), budget={"total": Decimal("0.01"), "wait": 0}) as here:
        await here.corrected(29)
        with pytest.raises(ConfigError, match="29 rows") as caught:
            await here.compare()
        assert "apprentice feedback" in (caught.value.hint or "")
        await here.store.append(local(500, "one more pear"))
        await feedback.give(here.config, here.store, "r500", "corrected", at=NOW, target={"kind": "fruit"})
        with pytest.raises(ConfigError, match="and 20 are wanted"):
            await here.compare(rows=20)
        with pytest.raises(BudgetError, match="total"):
            await here.compare()
        unpriced = here.config.teachers[0].model_copy(update={"price": None})
        for others, said in (((unpriced,), "not in the price table"), ((), "no teacher is configured")):
            here.config = here.config.model_copy(update={"teachers": others})
            with pytest.raises(ConfigError, match=said):
                await here.compare()
        assert not here.servers[0].requests and await here.ledger() == 0


async def test_an_evaluator_that_cannot_compare_is_found_before_anything_is_sent(
    at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_judge.py").write_text("def compare(answer, reference):\n    raise ValueError('no idea')\n")
    text = YAML.replace("evaluator: exact_match", "evaluator: {name: custom, function: 'no_judge:compare'}")
    async with at(("openai", OPEN, honest, {}), text=text) as here:
        await here.corrected(30)
        with pytest.raises(TrainingError, match="no idea"):
            await here.compare()
        assert not here.servers[0].requests


async def test_invalid_answers_score_nothing_and_a_teacher_that_is_away_is_left_alone(at: Any) -> None:
    given: list[Any] = [
        ("openai", OPEN, lambda body: honest(body) if Random(str(body)).random() < 0.5 else {"kind": "stone"}, {}),
        ("anthropic", "phi-4", [DOWN], {}),
    ]
    async with at(*given) as here:
        await here.corrected(30)
        found = await here.compare()
        first, second = found.teachers
        assert first.rows == 30 and first.quality is not None and 0.1 < first.quality < 0.9
        assert first.itself == pytest.approx(first.quality)  # an answer that is invalid twice agrees with nothing
        assert second.rows == 0 and second.quality is None and "ModelUnavailable" in (second.problem or "")
        assert len(here.servers[1].requests) < 10
        assert found.pairs == () and found.ceiling is None and found.proposal is None
        assert found.cost == await here.ledger() == await here.bill()


async def test_money_that_others_take_meanwhile_cuts_a_comparison_short(at: Any) -> None:
    async def answer(body: dict[str, Json]) -> Json:
        if len(here.servers[0].requests) >= 20 and others:
            await here.store.reserve(others.pop(), [])
        return honest(body)

    hold = {"attempt_id": "o", "task": "sort", "purpose": "serve", "model": "m", "worst": 10**6, "windows": ("total",)}
    others = [Hold.model_validate(hold | {"at": NOW})]
    async with at(("openai", OPEN, answer, {}), budget={"total": Decimal(1), "wait": 0}) as here:
        await here.corrected(40)
        found = await here.compare()
        assert found.problem is not None and "total" in found.problem
        assert 0 < found.teachers[0].rows < 40
        assert found.cost == await here.ledger() - 10**6 == await here.bill()


def test_examples_in_the_documentation_are_right() -> None:
    assert doctest.testmod(comparison).failed == doctest.testmod(teachers).failed == 0


def test_equal_teachers_are_rarely_taken_for_different_ones() -> None:
    dice = Random(0)
    alarms = sum(evidence([dice.choice((-1.0, 0.0, 0.0, 1.0)) for _ in range(100)]) >= 20 for _ in range(2000))
    assert alarms <= 2000 / 20


def measured(model: str, **more: Any) -> Measured:
    usual = {"role": "primary", "terms": "permissive", "may_train": True, "rows": 50, "quality": 0.8, "itself": 0.9}
    return Measured.model_validate(usual | {"model": model, "per_1000": 100.0} | more)


@pytest.mark.parametrize(
    ("changes", "proof", "proposed"),
    [
        ({"quality": 0.9, "itself": 0.95, "per_1000": 50.0}, 20.0, True),
        ({"quality": 0.9, "itself": 0.95, "per_1000": 50.0}, 19.9, False),
        ({"quality": 0.9, "itself": 0.90, "per_1000": 50.0}, 99.0, False),
        ({"quality": 0.9, "itself": 0.95, "per_1000": 100.0}, 99.0, False),
        ({"quality": 0.9, "itself": 0.95, "per_1000": 50.0, "may_train": False}, 99.0, False),
        ({"quality": 0.9, "itself": 0.95, "per_1000": 50.0, "rows": 29}, 99.0, False),
        ({"quality": None, "itself": None, "per_1000": None}, 99.0, False),
    ],
)
def test_a_rival_has_to_be_better_in_quality_self_consistency_and_price(
    changes: dict[str, Any], proof: float, proposed: bool
) -> None:
    found = [measured("old"), measured("new", **changes)]
    assert (propose(found, lambda new, old: proof) is not None) == proposed


def test_the_evidence_has_to_suffice_for_each_rival_and_the_best_of_them_is_proposed() -> None:
    better = {"itself": 1.0, "per_1000": 1.0}
    found = [
        measured("old", itself=1.0),
        measured("a", quality=0.9, **better),
        measured("b", quality=0.95, itself=1.0, per_1000=0.5),
    ]
    assert propose(found, lambda new, old: 39.0) is None
    best = propose(found, lambda new, old: 40.0)
    assert best is not None and (best[0].model, best[1].model) == ("b", "old")
    shut = [measured("shut", may_train=False), *found[1:]]
    assert propose(shut, lambda new, old: 99.0) is not None  # "a" is the first that may label
    assert propose([measured("old", rows=3), *found[1:]], lambda new, old: 99.0) is None


# --- the command ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_a_thread(answer: Any) -> Iterator[Server]:
    """A server beside a command, which has an event loop of its own."""
    started: list[Any] = []
    up = threading.Event()

    async def serve() -> None:
        over = asyncio.Event()
        async with serve_openai(answer, price=PRICE) as server:
            started.extend((server, over, asyncio.get_running_loop()))
            up.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    up.wait()
    try:
        yield started[0]
    finally:
        started[2].call_soon_threadsafe(started[1].set)
        thread.join()


def test_the_command_lists_plans_labels_and_compares(
    tmp_path: Path, configured: Configured, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        code = cli.main(["teachers", *arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    async def fill(config: Config) -> None:
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        for number, text in enumerate(taught(45)):
            await store.append(local(number, text))
        for number in range(35):
            target = {"kind": "tool"}
            await feedback.give(config, store, f"r{number}", "corrected", at=NOW, target=target)
        await store.close()

    with in_a_thread(honest) as server:
        section = (
            f"teachers:\n  - {{provider: openai, model: {OPEN}, base_url: '{server.url}', allow_internal: true, "
            "max_tokens: 64, price: {input: 2, output: 10}}\n"
        )
        (tmp_path / "apprentice.yaml").write_text(YAML.replace("BASE_URL", server.url) + section)
        assert run()[0] == 2  # no store yet
        asyncio.run(fill(configured()))
        code, said = run()
        assert code == 0 and f"openai/{OPEN}" in said and "permissive, may label" in said
        assert json.loads(run("list", "sort", "--json")[1])["sort"][0]["may_label"] is True
        assert run("label")[0] == 2
        code, said = run("label", "sort", "--dry-run", "--limit", "4")
        assert code == 0 and "4 requests to label, 6 beyond the limit" in said and "at most $" in said
        code, said = run("compare", "sort")
        assert code == 0 and "70 calls for at most $" in said and "nothing was asked" in said
        assert not server.requests
        code, said = run("label", "sort", "--limit", "4", "--json")
        assert code == 0 and json.loads(said)["labels"] == 4 and len(server.requests) == 4
        code, said = run("label", "sort")
        assert code == 0 and "6 labelled for $" in said
        code, said = run("compare", "sort", "--yes")
        assert code == 0 and "35 rows of gold" in said and "proposed" not in said
        assert len(server.requests) == 80
        told = json.loads(run("compare", "sort", "--rows", "30", "--yes", "--json")[1])
        assert told["teachers"][0]["rows"] == 30 and told["ceiling"] is None
        assert run("compare", "sort", "--rows", "3")[0] == 2
