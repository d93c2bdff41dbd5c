"""The ledger against processes that spend, die and lose answers, and a judge who keeps a bill of his own.

1, 8 and 32 processes reserve, call and settle in one store until their caps are used up: of a task and of all tasks, by
day, month and in total; each is the tightest in its turn. The judge is a provider in a process of its own. He charges
up to the worst case, before he answers, and only his bill says what was spent: one call in eight is never answered or
without a price, some are answered twice. Processes are killed with SIGKILL, at named moments of a call and at any
moment, and others take their place. Then the same with the product's own calls, over real sockets.

`--data DIR` keeps the store and the bills there and goes on with them: an interrupted run loses nothing. `--quick`
spends less, and holds no time to a bar.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import apsw

from apprentice import budget
from apprentice.calls import Calls
from apprentice.config import parse
from apprentice.errors import BudgetError, BudgetExhausted, BudgetHeld, ModelError
from apprentice.stores.sqlite import SqliteStore, build
from apprentice.testing.servers import Reply, serve_openai
from apprentice.types import Attempt, Cap, Hold, Json, Micros, Seconds
from benches import Figure, Options, at_least, at_most, run, shown

TASKS = {"sort": 0.6, "tag": 0.3, "sum": 0.1}  # and how much of the traffic is theirs
WORST: Micros = 2_000  # the dearest call
IN_FLIGHT = 64  # calls at the same time, over all processes
POINTS = ("reserving", "reserved", "sent", "answered", "settling", "settled")
"""Where a process may kill itself: within a reservation, after it, with the request sent, … within a settlement, after it."""

CONTEXT = get_context("forkserver")  # one process has imported everything; the others are its copies, in milliseconds
PRELOAD = ["apprentice.calls", "apprentice.models.openai", "apprentice.stores.sqlite", "apprentice.testing.servers"]


class Scale(NamedTuple):
    """How much of everything."""

    reservations: int
    processes: tuple[int, int, int]  # on the three days of a month
    day: Micros  # cap of a day
    mortality: float  # share of the calls in which the process kills itself
    life: Seconds  # mean time between two kills by somebody else
    calls: int  # over sockets, about
    kills: int
    points: tuple[str, ...] = POINTS


FULL = Scale(1_000_000, (1, 8, 32), 22_000_000, 1 / 800, 0.5, 24_000, 500)
QUICK = Scale(5_000, (2, 8, 8), 600_000, 1 / 60, 0.25, 400, 20)


# --- what is allowed --------------------------------------------------------------------------------------------------


class Round(NamedTuple):
    """One day on which so many processes spend until nothing is left."""

    number: int
    processes: int
    day: Micros

    @property
    def at(self) -> Seconds:
        month, day = divmod(self.number, 3)
        return datetime(2027 + month // 12, month % 12 + 1, day + 1, 12, tzinfo=UTC).timestamp()

    def caps(self, task: str) -> list[Cap]:
        """Two days and a half can be spent in a month; in every second one the total allows a little less."""
        month = self.number // 3
        total = self.day * 49 * (month // 2) // 10 + self.day * (49 if month % 2 else 26) // 10
        dollars = {"total": total, "monthly": self.day * 5 // 2, "daily": self.day}
        overall = {name: Decimal(limit).scaleb(-6) for name, limit in dollars.items()}
        own = {"daily": overall["daily"] / 2}
        return budget.caps(task, self.at, UTC, overall=overall, own=own)

    def windows(self, task: str) -> tuple[str, ...]:
        return budget.windows(task, self.at, UTC)


# --- the judge --------------------------------------------------------------------------------------------------------


def verdict(dice: Random, worst: Micros) -> tuple[Micros, str]:
    """What a call is charged, and what is said about it: a price, or nothing, or that it was turned away."""
    charge = worst if dice.random() < 0.1 else dice.randint(0, worst)
    luck = dice.random()
    if luck < 0.10:
        return 0, "rejected"
    if luck < 0.22:
        return charge, "unknown"  # lost on its way, or without a price: for the ledger it is the same
    return charge, f"answered {charge}"


def judge(pipe: Connection, bill: Path, seed: int) -> None:
    """Charge every call that arrives whole, in `bill`, until told to stop or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the bill is finished, whatever happens to the others
    asyncio.run(_judge(pipe, bill, Random(seed)))


async def _judge(pipe: Connection, bill: Path, dice: Random) -> None:
    visits: set[asyncio.Task[None]] = set()

    with bill.open("a", encoding="utf-8") as file:

        async def visited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if (task := asyncio.current_task()) is not None:
                visits.add(task)
                task.add_done_callback(visits.discard)
            try:
                while (line := await reader.readline()).endswith(b"\n"):
                    name, worst = line.decode().split()
                    charge, said = verdict(dice, int(worst))
                    if charge:
                        file.write(f"{name} {charge}\n")
                    twice = f"{name} answered {charge // 2}\n" if dice.random() < 0.08 and charge else ""
                    if not writer.is_closing():
                        writer.write(f"{name} {said}\n{twice}".encode())
            except ConnectionError:
                pass  # the process was killed
            finally:
                writer.close()

        async with await asyncio.start_server(visited, "127.0.0.1", 0) as server:
            pipe.send(server.sockets[0].getsockname()[1])
            await asyncio.get_running_loop().run_in_executor(None, _told, pipe)
            server.close()
            await asyncio.gather(*visits, return_exceptions=True)
    with contextlib.suppress(OSError):  # the parent is no more
        pipe.send("done")


def _told(pipe: Connection) -> None:
    """Returns when the parent speaks, or is no more."""
    pipe.poll(None)


class Line:
    """A process's connection to the judge."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._waiting: dict[str, asyncio.Future[list[str]]] = {}
        self.again: dict[str, list[Micros]] = defaultdict(list)  # further answers to a call that was answered
        self._reading = asyncio.create_task(self._read(reader))

    def send(self, name: str, worst: Micros) -> asyncio.Future[list[str]]:
        """The request leaves now; the future is the answer."""
        self._waiting[name] = asyncio.get_running_loop().create_future()
        self._writer.write(f"{name} {worst}\n".encode())
        return self._waiting[name]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            name, *said = line.decode().split()
            if name in self._waiting:
                self._waiting.pop(name).set_result(said)
            else:
                self.again[name].append(int(said[1]))

    async def close(self) -> None:
        self._writer.close()
        await self._reading


# --- those who spend --------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What one process saw."""

    share: float = 1.0  # of the tightest cap that was used when the first call was refused
    waits: Counter[int] = field(default_factory=Counter)  # reservations, by how many tenths of a millisecond they took


class Spender:
    """Calls the judge until nothing is left; or dies on the way."""

    def __init__(self, store: SqliteStore, line: Line, some: Round, name: str, scale: Scale) -> None:
        self._store = store
        self._line = line
        self._round = some
        self._name = name
        self._dice = Random(name)
        self._scale = scale
        self._windows = {task: some.windows(task) for task in TASKS}
        self._caps = {task: some.caps(task) for task in TASKS}
        self._refused = False
        self._number = 0
        self.report = Report()

    async def spend(self) -> None:
        """Call for one task or another, until the caps of all are used up."""
        tasks = dict(TASKS)
        while tasks:
            task = self._dice.choices(list(tasks), list(tasks.values()))[0]
            try:
                await self._call(task)
            except BudgetExhausted as refusal:
                self._look(refusal)
                tasks.pop(task, None)
            except BudgetHeld as refusal:
                self._look(refusal)
                await asyncio.sleep(0.002)

    def _look(self, refusal: BudgetError) -> None:
        """What the first refusal says of its window, at its very moment; a look of ours would come later."""
        if not self._refused:
            self._refused = True
            limit, spent, held = map(int, re.findall(r"(?:limit|spent|held) (\d+)", str(refusal)))
            self.report.share = (spent + held) / limit

    async def _call(self, task: str) -> None:
        self._number += 1
        worst = self._dice.randint(1, WORST)
        name = f"{self._round.number}/{task}/{self._name}/{self._number}"
        doom = self._dice.choice(self._scale.points) if self._dice.random() < self._scale.mortality else None
        hold = Hold(
            attempt_id=name,
            task=task,
            purpose="serve",
            model="judge",
            worst=worst,
            windows=self._windows[task],
            at=self._round.at,
        )
        begun = time.perf_counter()
        await self._or_die(doom == "reserving", self._store.reserve(hold, self._caps[task]))
        self.report.waits[int(1e4 * (time.perf_counter() - begun))] += 1
        self._die(doom == "reserved")
        if self._dice.random() < 0.03:  # it never left
            return await self._store.settle(name, 0, state="released")
        answer = self._line.send(name, worst)
        self._die(doom == "sent")
        said = await answer
        self._die(doom == "answered")
        await self._or_die(doom == "settling", self._settle(name, worst, said))
        self._die(doom == "settled")
        return None

    async def _settle(self, name: str, worst: Micros, said: Sequence[str]) -> None:
        settle = self._store.settle
        match said:
            case ["answered", cost]:
                first = settle(name, int(cost), state="settled")
            case ["rejected"]:
                first = settle(name, 0, state="released")
            case _:
                first = settle(name, worst, state="assumed")
        again = [settle(name, cost, state="settled") for cost in self._line.again.pop(name, [])]
        await asyncio.gather(first, *again)

    async def _or_die(self, doomed: bool, work: Coroutine[Any, Any, None]) -> None:
        if not doomed:
            return await work
        done, _ = await asyncio.wait([asyncio.ensure_future(work)], timeout=self._dice.uniform(0, 0.01))
        for task in done:
            task.result()  # who is refused lives on
        return self._die(True)

    def _die(self, doomed: bool) -> None:
        if doomed:
            os.kill(os.getpid(), signal.SIGKILL)


def _die_with_the_parent(pipe: Connection) -> None:
    """It says nothing to those who spend: what can be read is the end. Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.get_running_loop().add_reader(pipe.fileno(), os.kill, os.getpid(), signal.SIGKILL)


def spender(pipe: Connection, path: Path, name: str, port: int, some: Round, scale: Scale) -> None:
    """A process of `Spender`s that share a store; sends its Report at the end."""

    async def work() -> None:
        _die_with_the_parent(pipe)
        store = build(path)
        line = Line(*await asyncio.open_connection("127.0.0.1", port))
        one = Spender(store, line, some, name, scale)
        await asyncio.gather(*[one.spend() for _ in range(IN_FLIGHT // some.processes)])
        await line.close()
        for late, costs in line.again.items():
            for cost in costs:
                await store.settle(late, cost, state="settled")
        await store.close()
        pipe.send(one.report)

    asyncio.run(work())


# --- keeping them alive -----------------------------------------------------------------------------------------------


def start(target: Callable[..., None], *arguments: object) -> tuple[ForkServerProcess, Connection]:
    """A process, and the pipe to it."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


async def _assume(path: Path, owner: str) -> int:
    store = build(path)
    try:
        dead = [hold for hold in await store.holds(float("inf")) if owner in hold.attempt_id]
        await asyncio.gather(*[store.settle(hold.attempt_id, hold.worst, state="assumed") for hold in dead])
        return len(dead)
    finally:
        await store.close()


def assume(path: Path, owner: str) -> int:
    """Count the open holds of a dead process as spent, with their worst case. How many there were."""
    return asyncio.run(_assume(path, owner))


class Crowd:
    """So many processes of one kind; whoever is killed is replaced, and his holds are assumed."""

    def __init__(self, path: Path, target: Callable[..., None], arguments: tuple[object, ...]) -> None:
        self._path = path
        self._target = target
        self._arguments = arguments
        self._run = f"{time.time_ns():x}"
        self._started = 0
        self._alive: dict[Connection, tuple[str, ForkServerProcess]] = {}
        self.kills = 0
        self.assumed = 0
        self.reports: list[Any] = []

    def _start(self) -> None:
        self._started += 1
        name = f"{self._run}-{self._started}"
        process, pipe = start(self._target, self._path, name, *self._arguments)
        self._alive[pipe] = (name, process)

    def work(self, processes: int, life: Seconds, dice: Random) -> None:
        """Until all have reported. `life`: mean time between two kills, besides those that they do themselves."""
        for _ in range(processes):
            self._start()
        next_kill = time.monotonic() + dice.expovariate(1 / life)
        try:
            while self._alive:
                for pipe in connection.wait(list(self._alive), timeout=max(0.0, next_kill - time.monotonic())):
                    self._hear(pipe)
                if time.monotonic() >= next_kill and self._alive:
                    dice.choice(list(self._alive.values()))[1].kill()
                    next_kill = time.monotonic() + dice.expovariate(1 / life)
        finally:
            for _, process in self._alive.values():
                process.kill()

    def _hear(self, pipe: Any) -> None:
        try:
            self.reports.append(pipe.recv())
            return
        except (EOFError, OSError):
            name, process = self._alive.pop(pipe)
            pipe.close()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            self.kills += 1
            self.assumed += assume(self._path, f"/{name}/")
            self._start()
        elif process.exitcode != 0:
            raise SystemExit(f"a process of the bench failed with {process.exitcode}")


class Played(NamedTuple):
    """A round that is over."""

    processes: int
    reserved: int
    seconds: Seconds
    kills: int
    assumed: int
    share: float  # of the tightest cap, when the first call was refused
    used: float  # of the tightest cap, at the end
    waits: dict[str, int]


async def _used(path: Path, caps: Iterable[Cap]) -> float:
    store = build(path)
    try:
        limits = {cap.window: cap.limit for cap in caps}
        spent = await store.spent(list(limits))
        return max(spent[window] / limit for window, limit in limits.items())
    finally:
        await store.close()


def _booked(path: Path, some: Round) -> int:
    """How many reservations of this round are in the ledger."""
    ledger = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    sql = "SELECT count(*) FROM ledger WHERE attempt_id BETWEEN ? AND ?"
    [(rows,)] = ledger.execute(sql, (f"{some.number}/", f"{some.number}0"))
    ledger.close()
    return int(rows)


def play(path: Path, some: Round, scale: Scale) -> Played:
    """One round: a judge, and processes that spend until nothing is left."""
    dice = Random(some.number)
    process, pipe = start(judge, path.with_name(f"bill-{some.number}-{time.time_ns():x}"), dice.randrange(2**32))
    crowd = Crowd(path, spender, (pipe.recv(), some, scale))
    begun = time.perf_counter()
    try:
        crowd.work(some.processes, scale.life, dice)
        seconds = time.perf_counter() - begun
    finally:  # the bill is written to its end, whatever happens
        pipe.send("stop")
        pipe.recv()
        process.join()
    waits: Counter[int] = Counter()
    for report in crowd.reports:
        waits += report.waits
    return Played(
        some.processes,
        _booked(path, some),
        seconds,
        crowd.kills,
        crowd.assumed,
        min(report.share for report in crowd.reports),
        asyncio.run(_used(path, [cap for task in TASKS for cap in some.caps(task)])),
        {str(tenth): number for tenth, number in waits.items()},
    )


# --- the audit --------------------------------------------------------------------------------------------------------


@dataclass
class Audit:
    """The judge's bills against the ledger, row by row, read past the product."""

    rows: int = 0
    missing: int = 0  # charged calls without a row
    short: int = 0  # rows that book less than the judge charged
    held: int = 0  # rows that are still open
    twisted: int = 0  # windows that say another amount than their rows
    overspend: Micros = 0  # by the judge's bills, over all caps
    booked_over: Micros = 0  # by the ledger, over all caps
    charged: Micros = 0


def _bills(folder: Path) -> Iterator[tuple[str, Micros]]:
    for file in sorted(folder.glob("bill-*")):
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                name, charge = line.split()
                yield name, int(charge)


def _over(spent: Counter[tuple[int, str]], rounds: Iterable[Round]) -> Micros:
    """The most by which a cap was ever exceeded, round after round."""
    worst, so_far = 0, Counter[str]()
    for some in rounds:
        for task in TASKS:
            for window in some.windows(task):
                so_far[window] += spent[some.number, task]
        limits = {cap.window: cap.limit for task in TASKS for cap in some.caps(task)}
        worst = max(worst, *(so_far[window] - limit for window, limit in limits.items()))
    return max(0, worst)


def audit(path: Path, rounds: Sequence[Round]) -> Audit:
    """Compare every bill with the row of its call, and every window with its rows."""
    found = Audit()
    charges: Counter[str] = Counter()
    charged, booked = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    for name, charge in _bills(path.parent):
        charges[name] += charge
        number, task, _ = name.split("/", 2)
        charged[int(number), task] += charge
    found.charged = charges.total()
    sums: dict[str, list[Micros]] = defaultdict(lambda: [0, 0])
    ledger = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    for name, windows, worst, state, cost in ledger.execute(
        "SELECT attempt_id, windows, worst, state, cost FROM ledger"
    ):
        found.rows += 1
        found.held += state == "held"
        found.short += cost < charges.pop(name, 0) and state != "held"
        number, task, _ = name.split("/", 2)
        booked[int(number), task] += cost
        for window in json.loads(windows):
            sums[window][state == "held"] += worst if state == "held" else cost
    found.missing = len(charges)
    for key, *amounts in ledger.execute("SELECT key, spent, held FROM windows WHERE key <> ''"):
        found.twisted += sums.pop(key, None) != amounts
    ledger.close()
    found.twisted += len(sums)
    found.overspend, found.booked_over = _over(charged, rounds), _over(booked, rounds)
    return found


# --- over sockets -----------------------------------------------------------------------------------------------------

AT: Seconds = 1_795_218_000.0
YAML = """
tasks:
  - {{name: sort, description: Say what kind of thing is meant, evaluator: exact_match,
     input_schema: {{text: str}}, output_schema: {{kind: [fruit, animal, tool]}}, budget: {{total: {task:f}}}}}
remote: {{provider: openai, model: sim, base_url: "{url}", allow_internal: true, timeout: 20, retries: 1,
  max_tokens: 64, concurrency: 64, price: {{input: 2.5, output: 10}}}}
local: {{backend: embedded, fine_tune_settings: {{encoder: tfidf}}}}
budget: {{total: {total:f}, daily: {total:f}}}
"""


def provider(pipe: Connection, seed: int) -> None:
    """A server in OpenAI's format whose answers are cut, reset, sent twice or without usage; sends its bill at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dice = Random(seed)
    content: dict[str, Json] = {"kind": "fruit"}
    said: dict[str, Json] = {
        "model": "sim",
        "choices": [{"message": {"content": json.dumps(content)}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 500, "completion_tokens": 16},  # more than it charges, less than the worst case
    }
    whole = json.dumps(said).encode()
    again = whole + b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(whole), whole)

    def answer(_: dict[str, Json]) -> Reply:
        luck = dice.random()
        if luck < 0.06:
            return Reply(content, cut=dice.randrange(200))
        if luck < 0.12:
            return Reply(content, cut=dice.randrange(200), reset=True)
        if luck < 0.20:
            return Reply(content, raw=again, length=len(whole))
        if luck < 0.24:
            return Reply(content, silent=True)
        if luck < 0.28:
            return Reply(status=500, code="server_error", billed=True)
        if luck < 0.34:
            return Reply(status=429, code="rate_limit_exceeded")
        return Reply(content)

    async def serve() -> None:
        async with serve_openai(answer) as server:
            pipe.send(server.url)
            await asyncio.get_running_loop().run_in_executor(None, _told, pipe)
            pipe.send((server.bill, len(server.requests), sum(seen.charge > 0 for seen in server.requests)))

    asyncio.run(serve())


def caller(pipe: Connection, path: Path, name: str, yaml: str, callers: int) -> None:
    """The product's own calls, until nothing is left. Sends the number of attempts."""

    async def work() -> None:
        _die_with_the_parent(pipe)
        config = parse(yaml)
        store = build(path)
        numbers = iter(range(10**9))
        calls = Calls(
            config, store, clock=lambda: AT, new_id=lambda: f"sockets/{name}/{next(numbers)}", dice=Random(name)
        )
        attempts: list[Attempt] = []

        async def call(number: int) -> None:
            while True:
                try:
                    text = f"the thing number {number} of {name}"
                    await calls.ask(config.tasks[0], {"text": text}, purpose="serve", deadline=None, attempts=attempts)
                except BudgetExhausted:
                    return
                except BudgetHeld:
                    await asyncio.sleep(0.005)
                except ModelError:
                    continue

        await asyncio.gather(*[call(number) for number in range(callers)])
        await calls.close()
        await store.close()
        pipe.send(len(attempts))

    asyncio.run(work())


def sockets(folder: Path, scale: Scale, quick: bool) -> list[Figure]:
    """The product's calls against a provider that loses and repeats answers, with kills, until the cap is used up."""
    path = folder / f"sockets-{time.time_ns():x}.db"
    process, pipe = start(provider, 0)
    dollars = Decimal(scale.calls) * 700 / 1_000_000  # what a call books, about
    yaml = YAML.format(url=pipe.recv(), total=dollars, task=dollars * 2)
    crowd = Crowd(path, caller, (yaml, 16))
    begun = time.perf_counter()
    crowd.work(2 if quick else 4, 2 * scale.life, Random(1))
    seconds = time.perf_counter() - begun
    pipe.send("stop")
    bill, requests, charged = pipe.recv()
    process.join()
    ledger = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    sql = "SELECT count(*), sum(cost), sum(state IN ('settled', 'assumed')), sum(state = 'held') FROM ledger"
    [(rows, booked, paid, held)] = ledger.execute(sql)
    ledger.close()
    cap = budget.micros(dollars)
    return [
        at_least("sockets: calls that arrived", requests, 200 if quick else 20_000),
        at_most("sockets: overspend by the server's bill", max(0, bill - cap), 0, "micros"),
        at_most("sockets: charged but not booked", max(0, bill - booked), 0, "micros"),
        at_most("sockets: charged calls without a row", max(0, charged - paid), 0),
        at_least("sockets: used share of the cap", booked / cap, 0.99),
        at_most("sockets: holds left", held, 0),
        shown("sockets: share of the cap on the bill", bill / cap),
        shown("sockets: kills", crowd.kills),
        shown("sockets: attempts a second", rows / seconds),
    ]


# --- the figures ------------------------------------------------------------------------------------------------------


def percentile(waits: Counter[int], share: float) -> float:
    """Milliseconds within which that share of the reservations was made."""
    rest = share * waits.total()
    for tenth in sorted(waits):
        rest -= waits[tenth]
        if rest <= 0:
            return (tenth + 1) / 10
    return float("nan")


def timing(played: Sequence[Played], quick: bool) -> list[Figure]:
    """How long a reservation takes with `IN_FLIGHT` calls at the same time; bars only where nobody is killed."""
    figures = []
    for processes, calm in sorted({(one.processes, not one.kills) for one in played}):
        some = [one for one in played if (one.processes, not one.kills) == (processes, calm)]
        waits: Counter[int] = Counter()
        for one in some:
            waits.update({int(tenth): number for tenth, number in one.waits.items()})
        p99 = percentile(waits, 0.99)
        bar = {8: 60.0, 32: 250.0}.get(processes)
        name = f"{processes} processes{'' if calm else ' with kills'}"
        figures += [
            shown(f"{name}: reservation, p50", percentile(waits, 0.5), "ms"),
            shown(f"{name}: reservation, p99", p99, "ms")
            if quick or bar is None or not calm
            else at_most(f"{name}: reservation, p99", p99, bar, "ms"),
            shown(f"{name}: reservations a second", sum(o.reserved for o in some) / sum(o.seconds for o in some)),
        ]
    return figures


def spent(folder: Path, scale: Scale, options: Options) -> list[Figure]:
    """Rounds until there are enough reservations, then the audit."""
    path, notes = folder / "money.db", folder / "rounds.json"
    played = [Played(*one) for one in json.loads(notes.read_text())] if notes.exists() else []
    rounds = [Round(number, scale.processes[number % 3], scale.day) for number in range(len(played))]
    if path.exists():
        assume(path, "")  # of a run that was interrupted
    while sum(one.reserved for one in played) < scale.reservations:
        number = len(played)
        rounds.append(Round(number, scale.processes[number % 3], scale.day))
        calm = number // 3 % 2 == 0
        played.append(play(path, rounds[-1], scale._replace(mortality=0.0, life=1e5) if calm else scale))
        draft = notes.with_suffix(".draft")
        draft.write_text(json.dumps(played))
        draft.replace(notes)
        one, total = played[-1], sum(one.reserved for one in played)
        options.say(
            f"round {number + 1}: {one.processes} processes, {one.reserved} reservations in {one.seconds:.0f} s, "
            f"{one.kills} kills, {total} in all"
        )
    found = audit(path, rounds)
    return [
        at_least("reservations", found.rows, scale.reservations),
        at_most("overspend by the judge's bill", found.overspend, 0, "micros"),
        at_most("overspend by the ledger", found.booked_over, 0, "micros"),
        at_most("charged calls without a row", found.missing, 0),
        at_most("calls booked below their charge", found.short, 0),
        at_most("windows that are not the sum of their rows", found.twisted, 0),
        at_most("holds left", found.held, 0),
        at_least("used share at the first refusal, least", min(one.share for one in played), 0.99),
        at_least("used share at the end, least", min(one.used for one in played), 0.99),
        at_least("kills", sum(one.kills for one in played), scale.kills),
        shown("holds of the dead that were assumed", sum(one.assumed for one in played)),
        *timing(played, options.quick),
    ]


def measure(options: Options) -> list[Figure]:
    """First without the network, then with it."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    scale = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.data or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        figures = spent(folder, scale, options)
        return figures + sockets(Path(scratch), scale, options.quick)


if __name__ == "__main__":
    sys.exit(run("money", measure))
