"""What every store promises, as checks that a third party runs over its own.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_contract(check, tmp_path):
        await check(my_store.build, tmp_path / "store")

Each check is given `build`, which opens the store that a path names (the same path: the same store, as another process
would open it), and a path that no other check uses. A broken promise raises AssertionError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from apprentice.errors import (
    ApprenticeError,
    BudgetExhausted,
    BudgetHeld,
    IdempotencyConflict,
    StoreError,
)
from apprentice.types import (
    Answer,
    Attempt,
    Batch,
    Cap,
    Correction,
    Decision,
    Event,
    Evidence,
    Example,
    Hold,
    Json,
    Label,
    Mode,
    Record,
    Score,
    Spending,
    Store,
    Usage,
    Version,
)

type Build = Callable[[Path], Store]
type Check = Callable[[Build, Path], Awaitable[None]]

HOSTILE = (
    "x" * 10_000,
    "../../etc/passwd",
    "'; DROP TABLE records; --",
    '"quoted" `ticked` [bracketed]',
    "%00",
    "a\0b",
    "\0",
    "\0\0",
    " ",
    "  leading and trailing  ",
    "\t\r\n",
    "\\",
    "\\u0000",
    "\\\\u005c",
    "\x1b[31mred\x1b[0m",
    "\x7f\x80\x9f",
    "\ud800",
    "\udfff lone",
    "half \udcff of a pair",
    "😀👩‍👩‍👧‍👦",
    "\U0010ffff",
    "\ufeffmark",
    "\ufffd\uffff\ufffe",
    "\u202eright to left",
    "\u00e9",
    "e\u0301",
    "ＡＢＣ",
    "Upper",
    "upper",
    "UPPER",
    "ß",
    "ss",
    "İi̇",
    "1",
    "1.0",
    "1e3",
    "0x10",
    "NULL",
    "null",
    "true",
    "NaN",
    "?",
    ":name",
    "$1",
    "task:a/day:2026-11-21",
    "*%_?",
)
"""Strings that are ids, keys or tags to somebody. Twins (case, composition, width) are different strings."""


def a_record(request_id: str, task: str = "sort", **changes: Any) -> Record:
    """A Record of a request that both models answered, with what `changes` says otherwise.

    >>> a_record("r1", cost=12).cost
    12
    """
    answer = Answer(output={"label": "a"}, text='{"label":"a"}', model="big-1", cost=100, latency=0.5)
    values: dict[str, Any] = {
        "at": 1_750_000_000.25,
        "input": {"text": "naïve\0 \ud800 text", "numbers": [0, -1, 1.5, 2**60, None, True]},
        "decision": Decision(route="both", reason="audit", p=0.125, audit=True, level=0.5, threshold=0.75),
        "version": "v1",
        "local": Answer(output={"label": "b"}, model="student", confidence=0.625),
        "remote": answer.model_copy(update={"usage": Usage(input_tokens=10, output_tokens=2, cached_tokens=3)}),
        "served": "remote",
        "score": Score(value=0.5, fields={"label": 0.5}),
        "attempts": (Attempt(attempt_id="a1", model="big-1", purpose="serve", outcome="answered", cost=100),),
        "cost": 100,
        "latency": 0.75,
        "tags": {"team": "blue"},
    }
    return Record(request_id=request_id, task=task, **values | changes)


def a_hold(attempt_id: str, worst: int, windows: Sequence[str] = ("total",), **changes: Any) -> Hold:
    """A reservation of `worst` micro-dollars in these windows."""
    values: dict[str, Any] = {"task": "sort", "purpose": "serve", "model": "big-1", "at": 1_750_000_000.0}
    return Hold(attempt_id=attempt_id, worst=worst, windows=tuple(windows), **values | changes)


def a_batch(batch_id: str, **changes: Any) -> Batch:
    """A batch of one input that was not sent yet."""
    values: dict[str, Any] = {"task": "sort", "model": "big-1", "at": 1.0, "inputs": ({"text": "a"},), "worsts": (9,)}
    return Batch(id=batch_id, **values | changes)


def a_version(task: str = "sort", **changes: Any) -> Version:
    """A candidate without an id."""
    values: dict[str, Any] = {
        "id": "",
        "checkpoint": "sha256-" + "0" * 64,
        "path": "/checkpoints/0",
        "state": "candidate",
        "trained_on": 500,
        "created_at": 1_750_000_000.0,
        "metrics": {"agreement": 0.97, "confidences": [0.1, 0.9]},
    }
    return Version(task=task, **values | changes)


async def check_store(build: Build, directory: Path) -> None:
    """Run every check, each on a store of its own in `directory`. The first broken promise raises AssertionError."""
    for check in CHECKS:
        await check(build, directory / check.__name__)


# --- Records


async def records_come_back_as_they_were(build: Build, path: Path) -> None:
    wanted = [
        a_record("full"),
        a_record("bare", local=None, remote=None, score=None, served=None, version=None, attempts=(), error="down"),
        a_record("keyed", idempotency_key="k1"),
    ]
    async with _open(build, path) as store:
        numbers = [await store.append(record) for record in wanted]
        _true(numbers == sorted(set(numbers)) and numbers[0] > 0, f"numbers grow from above 0: {numbers}")
        for record in wanted:
            _same(await store.record(record.request_id), record, "a Record by its id")
        _same(await store.record("unknown"), None, "an unknown Record")
        _same(await store.record_by_key("sort", "k1"), wanted[2], "a Record by its key")
        _same(await store.record_by_key("other", "k1"), None, "the key of another task")
    async with _open(build, path) as store:
        _same([record for _, record in await store.records("sort")], wanted, "all Records after reopening")


async def a_request_id_is_recorded_once(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        await store.append(a_record("r1"))
        await _raises(StoreError, store.append(a_record("r1", task="other")))
        _same(await store.count("other"), 0, "Records of the task whose append failed")


async def an_idempotency_key_is_used_once_a_task(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        await store.append(a_record("r1", idempotency_key="k"))
        await _raises(IdempotencyConflict, store.append(a_record("r2", idempotency_key="k")))
        await store.append(a_record("r3", task="other", idempotency_key="k"))
        await store.append(a_record("r4"))
        await store.append(a_record("r5"))
        _same(await store.count("sort"), 3, "Records of the task")


async def one_failing_write_leaves_its_neighbours_alone(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        await store.append(a_record("r7"))
        appends = [store.append(a_record(f"r{number}")) for number in range(100)]
        holds = [store.reserve(a_hold(f"a{number}", 1), [Cap(window="total", limit=10)]) for number in range(50)]
        done = await asyncio.gather(*appends, *holds, store.promote("sort", "v9", 0.0), return_exceptions=True)
        failed = [number for number, result in enumerate(done[:100]) if isinstance(result, BaseException)]
        _same(failed, [7], "the append that was there before")
        _same(len([result for result in done[100:150] if result is None]), 10, "holds with room under the cap")
        _true(isinstance(done[150], StoreError), "an unknown version is not promoted")
        _same(await store.count("sort"), 100, "Records of the task")


async def records_are_found_by_task_number_and_label(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        numbers = await asyncio.gather(
            *[
                store.append(a_record(f"r{n}", task="sort" if n % 3 else "other", remote=None if n % 2 else _REMOTE))
                for n in range(1_200)
            ]
        )
        mine = sorted((number, f"r{n}", n % 2 == 0) for n, number in enumerate(numbers) if n % 3)

        async def ids(**options: Any) -> list[str]:
            found = await store.records("sort", **options)
            _same(sorted(found, key=lambda pair: pair[0]), found, "ascending numbers")
            return [record.request_id for _, record in found]

        everything = [name for _, name, _ in mine]
        labelled = [name for _, name, has_remote in mine if has_remote]
        middle = mine[len(mine) // 2][0]
        later = [name for number, name, _ in mine if number > middle]
        _same(await ids(), everything, "all")
        _same(await ids(limit=0), [], "none")
        _same(await ids(limit=7), everything[:7], "the first")
        _same(await ids(limit=600), everything[:600], "the first 600")
        _same(await ids(limit=7, newest=True), everything[-7:], "the last")
        _same(await ids(limit=600, newest=True), everything[-600:], "the last 600")
        _same(await ids(newest=True), everything, "all, from the end")
        _same(await ids(labelled=True), labelled, "labelled")
        _same(await ids(labelled=True, newest=True, limit=300), labelled[-300:], "the last labelled")
        _same(await ids(after=middle), later, "after a number")
        _same(await ids(after=middle, newest=True, limit=5), later[-5:], "the last after a number")
        _same(await store.count("sort"), len(everything), "count")
        _same(await store.count("sort", labelled=True), len(labelled), "count of labelled ones")
        _same(await store.count("unknown"), 0, "count of an unknown task")


async def an_answer_without_output_is_no_label(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        await store.append(a_record("r1", remote=Answer(text="sorry", problem="no JSON")))
        _same(await store.count("sort", labelled=True), 0, "labelled Records")


async def changes_tell_what_happened_since(build: Build, path: Path) -> None:
    async with _open(build, path) as store, _open(build, path) as other:
        _same(await store.changes(0), ([], [], {}, {}, {}), "an empty store")
        first = await store.append(a_record("r1"))
        second = await other.append(a_record("r2", task="other", version=None, local=None, score=None, served=None))
        third = await store.append(
            a_record(
                "r3",
                local=Answer(output={"n": 1, "s": "x"}),
                remote=Answer(output={"n": 2.5, "s": "y"}),
                repeat=Score(value=0.75),
                rival=Score(value=0.25),
                rival_version="v2",
            )
        )
        at = 1_750_000_000.25
        evidence = [
            Evidence(first, "sort", at, "v1", 0.5, 0.125, True, 0.625, 0.5, "remote"),
            Evidence(second, "other", at, None, 0.5, 0.125, True, None, None, None),
            Evidence(third, "sort", at, "v1", 0.5, 0.125, True, None, 0.5, "remote", (1.0, 2.5), 0.75, 0.25, "v2"),
        ]
        _same((await store.changes(0)).evidence, evidence, "all Evidence, of all tasks, in order")
        _same((await other.changes(first)).evidence, evidence[1:], "Evidence after the first")
        _same((await other.changes(third)).evidence, [], "nothing new")
        await store.add_version(a_version())
        _same((await other.changes(third)).champions, {}, "a candidate is no champion")
        await store.promote("sort", "v1", 5.0)
        champions = (await other.changes(third)).champions
        _same({task: version.id for task, version in champions.items()}, {"sort": "v1"}, "champions")


async def a_promotion_knows_the_record_that_it_came_after(build: Build, path: Path) -> None:
    """From the next Record on, evidence is about the new version: for every process, and after every restart."""
    async with _open(build, path) as store, _open(build, path) as other:
        for number in (1, 2):
            await store.add_version(a_version(checkpoint=f"sha256-{number:064d}"))
        await store.promote("sort", "v1", 5.0)
        first = await store.append(a_record("r1"))
        await other.promote("sort", "v2", 6.0)
        await other.promote("sort", "v2", 6.0)  # it is champion already
        second = await store.append(a_record("r2"))
        await store.promote("sort", "v1", 7.0)  # taken back
        wanted = [("sort", "v1", 0), ("sort", "v2", first), ("sort", "v1", second)]
        found = (await other.changes(0)).promotions
        _same([(p.task, p.version, p.after) for p in found], wanted, "all promotions, in order")
        _same(sorted({p.number for p in found}), [p.number for p in found], "numbers that rise")
        _same((await store.changes(first)).promotions, found[1:], "promotions since the first Record")
        _same((await store.changes(second)).promotions, found[2:], "promotions since the second")


async def a_canary_stands_beside_the_champion_until_one_row_ends_it(build: Build, path: Path) -> None:
    async with _open(build, path) as store, _open(build, path) as other:
        for number in (1, 2, 3):
            await store.add_version(a_version(checkpoint=f"sha256-{number:064d}"))
        await _raises(StoreError, store.promote("sort", "v1", 4.0, state="canary"))  # beside whom?
        await store.promote("sort", "v1", 5.0, by="it's\0", why="first")
        await _raises(StoreError, store.promote("sort", "v1", 5.0, state="canary"))
        await _raises(StoreError, store.promote("sort", "v2", 5.0, state="rejected"))
        first = await store.append(a_record("r1"))
        _same(await other.promote("sort", "v2", 6.0, state="canary"), True, "a canary begins")
        changes = await store.changes(first)
        _same([v.id for v in (changes.champions["sort"], changes.canaries["sort"])], ["v1", "v2"], "who is live")
        last = changes.promotions[-1].number
        ends = [
            one.promote("sort", "v2", 7.0, state=state, expects=last)
            for one in (store, other)
            for state in ("champion", "rejected")
        ]
        _same(sum(await asyncio.gather(*ends)), 1, "ends of one canary")
        _same(await other.promote("sort", "v3", 8.0, state="canary", expects=last), False, "a stale write")
        await store.promote("sort", "v1", 8.0)
        await store.promote("sort", "v2", 9.0, state="canary")
        await store.promote("sort", "v3", 9.0, state="canary")
        _same([v.state for v in await other.versions("sort")], ["champion", "rejected", "canary"], "one is tried out")
        await store.promote("sort", "v3", 10.0, state="rejected", by="ann", why="slow")
        history = await other.promotions("sort")
        _same((await other.changes(0)).promotions, history, "the history, with the Records and without")
        _same((await other.changes(0)).canaries, {}, "no canary is left")
        _same((history[0].by, history[0].why, history[0].at), ("it's\0", "first", 5.0), "who, why and when")
        told = [(p.version, p.state, p.after) for p in history[-3:]]
        wanted = [("v2", "canary", first), ("v3", "canary", first), ("v3", "rejected", first)]
        _same(told, wanted, "what became of the versions")


async def the_last_mode_of_a_task_is_seen_by_all(build: Build, path: Path) -> None:
    async with _open(build, path) as store, _open(build, path) as other:
        await store.set_mode("sort", "remote", None, 5.0)
        await store.set_mode("it's\0", "remote", 1_750_000_000.25, 6.0)
        wanted = {
            "sort": Mode(mode="remote", at=5.0),
            "it's\0": Mode(mode="remote", until=1_750_000_000.25, at=6.0),
        }
        _same((await other.changes(0)).modes, wanted, "the modes of two tasks")
        last = await store.append(a_record("r1"))
        await other.set_mode("sort", "auto", None, 7.0)
        wanted["sort"] = Mode(mode="auto", at=7.0)
        _same((await store.changes(last)).modes, wanted, "modes, whatever the Records")
    async with _open(build, path) as store:
        _same((await store.changes(last)).modes, wanted, "modes, after everybody closed the store")


async def hostile_strings_stay_what_they_are(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        for number, text in enumerate(HOSTILE):
            await store.append(a_record(text, task=text, version=text, idempotency_key=text, tags={text: text}))
            await store.save_state(text, number, text)
            await store.add_event(Event(name=text, task=text, at=1.0, message=text, evidence={text: text}, key=text))
            await store.add_version(a_version(text, id=text, path=text, checkpoint=text, metrics={text: text}))
            await store.promote(text, text, 1.0)
            await store.reserve(a_hold(text, number + 1, [text, text + "/2"], task=text, model=text), [])
    async with _open(build, path) as store:
        for number, text in enumerate(HOSTILE):
            record = a_record(text, task=text, version=text, idempotency_key=text, tags={text: text})
            _same(await store.record(text), record, "a Record by its id")
            _same(await store.record_by_key(text, text), record, "a Record by its key")
            _same([found for _, found in await store.records(text)], [record], "the Records of the task")
            _same(await store.load_state(text), (number, text), "the state of the task")
            event = Event(name=text, task=text, at=1.0, message=text, evidence={text: text}, key=text)
            _same(await store.events(text), [event], "the Events of the task")
            _same([version.path for version in await store.versions(text)], [text], "the versions of the task")
            _same(await store.spent([text]), {text: number + 1}, "the window")
        changes = await store.changes(0)
        _same([row.task for row in changes.evidence], list(HOSTILE), "the tasks of the Evidence")
        _same(set(changes.champions), set(HOSTILE), "the tasks with a champion")
        holds = await store.holds(2e9)
        _same({hold.attempt_id for hold in holds}, set(HOSTILE), "open holds")


# --- the rest of a task's life


async def an_older_state_does_not_replace_a_newer(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        _same(await store.load_state("sort"), None, "no state yet")
        await store.save_state("sort", 10, "ten")
        await store.save_state("sort", 9, "nine")
        _same(await store.load_state("sort"), (10, "ten"), "the newer state")
        await store.save_state("sort", 10, "ten again")
        _same(await store.load_state("sort"), (10, "ten again"), "the later state of the same number")


async def versions_are_numbered_and_one_is_champion(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        added = [await store.add_version(a_version(task)) for task in ("sort", "sort", "other")]
        _same([version.id for version in added], ["v1", "v2", "v1"], "ids")
        await _raises(StoreError, store.add_version(a_version(id="v2")))
        _same((await store.add_version(a_version(id="v9"))).id, "v9", "an id that was given")
        _same((await store.add_version(a_version())).id, "v10", "the id after it")
        for version, at in (("v1", 1.0), ("v2", 2.0), ("v2", 3.0)):
            await store.promote("sort", version, at)
        await _raises(StoreError, store.promote("sort", "v77", 4.0))
        await _raises(StoreError, store.certify("sort", "v77", 4.0))
        await store.certify("sort", "v2", 5.0)
        first, second, *_ = await store.versions("sort")
        _same((first.state, first.promoted_at), ("retired", 1.0), "the former champion")
        _same((second.state, second.promoted_at, second.certified_at), ("champion", 2.0, 5.0), "the champion")
        _same((await store.versions("other"))[0].state, "candidate", "the version of another task")
        await store.promote("sort", "v1", 6.0)
        states = {version.id: version.state for version in await store.versions("sort")}
        expected = {"v1": "champion", "v2": "retired", "v9": "candidate", "v10": "candidate"}
        _same(states, expected, "states after going back")
        _same(first.metrics, a_version().metrics, "metrics")


async def a_lease_has_one_holder(build: Build, path: Path) -> None:
    async with _open(build, path) as store, _open(build, path) as other:
        first = await store.acquire("learn/sort", "one", 100.0, 10.0)
        if first is None:
            raise AssertionError("a free lease is granted")
        _same((first.name, first.owner, first.until), ("learn/sort", "one", 110.0), "the lease")
        _same(await other.acquire("learn/sort", "two", 109.0, 10.0), None, "a lease that somebody has")
        renewed = await store.renew(first, 109.0, 10.0)
        _same(renewed, first._replace(until=119.0), "the lease, renewed")
        second = await other.acquire("learn/sort", "two", 119.0, 10.0)
        if second is None:
            raise AssertionError("a lease that is over is granted to the next")
        _true(second.token > first.token, "the token grows")
        _same(await store.renew(first, 120.0, 10.0), None, "a lease that somebody else has is not renewed")
        await store.release(first)
        _same(await store.acquire("learn/sort", "three", 121.0, 10.0), None, "an old lease releases nothing")
        await other.release(second)
        third = await store.acquire("learn/sort", "three", 121.0, 10.0)
        _true(third is not None and third.token > second.token, "a released lease is free, its token still grows")
        _same(await other.renew(second, 121.0, 10.0), None, "a released lease is not renewed")
        again = await store.acquire("learn/sort", "three", 131.0, 10.0)
        if third is None or again is None:
            raise AssertionError("a lease that is over is granted to the same owner")
        _same(await store.renew(third, 132.0, 10.0), None, "the old lease of the same owner is not renewed")
        _same(await store.renew(again, 132.0, 10.0), again._replace(until=142.0), "the new one is")
    racers = await _race(build, path, lambda store, n: store.acquire("race", f"p{n}", 1.0, 10.0))
    _same(len([lease for lease in racers if lease is not None]), 1, "leases of ten who ask at once")


async def an_old_lease_promotes_nothing(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        for _ in range(2):
            await store.add_version(a_version())
        old = await store.acquire("learn", "one", 1.0, 10.0)
        await store.promote("sort", "v1", 2.0, lease=old)
        new = await store.acquire("learn", "two", 20.0, 10.0)
        await _raises(StoreError, store.promote("sort", "v2", 21.0, lease=old))
        states = [version.state for version in await store.versions("sort")]
        _same(states, ["champion", "candidate"], "states after the refusal")
        await store.promote("sort", "v2", 22.0, lease=new)
        states = [version.state for version in await store.versions("sort")]
        _same(states, ["retired", "champion"], "states after the holder's promotion")


async def events_come_back_in_order_and_once_a_key(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        events = [
            Event(name="drift", task=task, at=float(number), message=f"m{number}", evidence={"n": number})
            for number, task in enumerate(["sort", "other"] * 5)
        ]
        for event in events:
            await store.add_event(event)
        for task, message in (("sort", "first"), ("sort", "second"), ("other", "third")):
            await store.add_event(Event(name="done", task=task, at=99.0, message=message, key="k"))
        _same([event.message for event in await store.events(limit=2)], ["first", "third"], "the last Events")
        _same((await store.events("sort"))[:5], [event for event in events if event.task == "sort"], "of one task")
        _same(await store.events("unknown"), [], "Events of an unknown task")
        of_name = await store.events("sort", names=["done", "never"], limit=1)
        _same([event.message for event in of_name], ["first"], "the last Event of a name")
        read: list[tuple[int, Event]] = []
        while page := await store.events_after(read[-1][0] if read else 0, limit=5):
            read += page
        _same([event for _, event in read], await store.events(), "Events, page by page")
        _same(len({number for number, _ in read}), 12, "numbers of Events")


async def a_batch_goes_on_where_it_was_left(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        inputs = tuple({"text": text} for text in HOSTILE)
        first = a_batch("b1", inputs=inputs, worsts=(7,) * len(inputs))
        await store.keep_batch(first)
        await store.keep_batch(a_batch("b2", task="other"))
        await store.keep_batch(a_batch("b3"))
    async with _open(build, path) as store:
        _same(await store.batches("sort", open=True), [first, a_batch("b3")], "open batches of a task, in order")
        sent = first.model_copy(update={"state": "submitted", "remote_id": "batch\0\ud800", "sent_at": 5.0})
        await store.keep_batch(sent)
        _same(await store.batches("sort"), [sent, a_batch("b3")], "a batch, changed")
        done = sent.model_copy(update={"state": "ended", "end": "settled", "cost": 2**53 + 1, "open": False})
        await store.keep_batch(done)
        _same([batch.id for batch in await store.batches(open=True)], ["b2", "b3"], "what is still open")
        _same((await store.batches())[0], done, "a batch that is done")
        await _raises(StoreError, store.keep_batch(sent))
        _same((await store.batches())[0], done, "a batch that is done, after somebody tried to change it")
        old = await store.acquire("batch/b3", "one", 1.0, 10.0)
        new = await store.acquire("batch/b3", "two", 20.0, 10.0)
        await _raises(StoreError, store.keep_batch(a_batch("b3", cost=1), lease=old))
        await store.keep_batch(a_batch("b3", cost=2), lease=new)
        _same([batch.cost for batch in await store.batches("sort", open=True)], [2], "what the lease's holder wrote")


# --- money


async def corrections_come_back_in_order_and_none_is_lost(build: Build, path: Path) -> None:
    said = [
        Correction(
            request_id="a", task="sort", at=1.0, action="corrected", target={"kind": "ox"}, by="Zoë \0", comment="'"
        ),
        Correction(request_id="b", task="sort", at=2.0, action="approved", target=None),
        Correction(request_id="a", task="other", at=3.0, action="corrected", target=[1, None]),
        Correction(request_id="a", task="sort", at=4.0, action="withdrawn"),
    ]
    async with _open(build, path) as store:
        for made in said:
            await store.add_correction(made)
    async with _open(build, path) as store:
        _same(await store.corrections("sort"), [said[0], said[1], said[3]], "the corrections of a task")
        _same(await store.corrections("sort", request_id="a"), [said[0], said[3]], "the corrections of a request")
        _same(await store.corrections("unknown"), [], "the corrections of an unknown task")


async def a_request_has_one_label_and_none_is_lost(build: Build, path: Path) -> None:
    attempt = Attempt(attempt_id="1", model="m", purpose="label", outcome="answered", cost=7)
    answer = Answer(output={"kind": "ox \0"}, model="m", provider="p@h", cost=7)
    said = [
        Label(request_id="a\0", task="sort", at=1.0, input="'", answer=answer, attempts=(attempt, attempt)),
        Label(request_id="b", task="sort", at=2.0, input={"text": "\ud800"}),
        Label(request_id="c", task="other", at=3.0, input=[None, 2**60], answer=answer),
    ]
    async with _open(build, path) as store:
        _same([await store.add_label(label) for label in said], [True] * 3, "whether a first label was kept")
        _same(await store.add_label(said[1].model_copy(update={"at": 9.0})), False, "whether a second one was")
    async with _open(build, path) as store:
        _same(await store.labels("sort"), said[:2], "the labels of a task")
        _same(await store.labels("unknown"), [], "the labels of an unknown task")


async def an_imported_example_is_kept_once_and_can_be_taken_out(build: Build, path: Path) -> None:
    def example(name: str, input: Json, at: float) -> Example:
        return Example(input=input, target={"kind": "ox \0"}, source="remote", request_id=name, model="m", at=at)

    made = [example(f"import-{number}", {"text": f"{number} \ud800"}, 500.0 - number) for number in range(300)]
    other = example("import-0", [None, 2**60], 1.0)
    async with _open(build, path) as store:
        _same(await store.add_examples("sort", made[:200]), 200, "how many were added")
        _same(await store.add_examples("sort", [*made, made[7]]), 100, "how many were new")
        _same(await store.add_examples("other\0", [other]), 1, "the same name in another task")
        _same(await store.add_examples("sort", []), 0, "none")
        await _raises(StoreError, store.add_examples("sort", [example("new", {}, 1.0), example("", {}, 1.0)]))
    async with _open(build, path) as store:
        _same(await store.examples("sort"), made, "the examples of a task, in their order")
        _same(await store.examples("other\0"), [other], "those of another one")
        _same(await store.examples("unknown"), [], "those of an unknown task")
        _same(await store.remove_examples("sort", ["import-3", "import-5", "unknown"]), 2, "how many were taken out")
        _same(await store.count_examples("sort"), 298, "how many are left")
        _same(await store.count("sort"), 0, "the requests of the task")
        _same((await store.changes(0)).evidence, [], "the evidence")


async def a_hold_is_booked_in_all_windows_or_none(build: Build, path: Path) -> None:
    day, week = "day:2026-11-21", "week:2026-W47"
    caps = [Cap(window=day, limit=100), Cap(window=week, limit=150)]
    async with _open(build, path) as store:
        await store.reserve(a_hold("a1", 100, [day, week, "total"]), caps)
        _same(await store.spent([day, week, "total", "x"]), {day: 100, week: 100, "total": 100, "x": 0}, "after one")
        next_day = "day:2026-11-22"
        caps = [Cap(window=next_day, limit=100), Cap(window=week, limit=150)]
        await _raises(BudgetHeld, store.reserve(a_hold("a2", 51, [next_day, week, "total"]), caps))
        _same(await store.spent([next_day, week, "total"]), {next_day: 0, week: 100, "total": 100}, "after a refusal")
        await store.reserve(a_hold("a2", 50, [next_day, week, "total"]), caps)
        _same(await store.spent([next_day, week, "total"]), {next_day: 50, week: 150, "total": 150}, "to the brim")
        await _raises(StoreError, store.reserve(a_hold("a2", 0, [week]), []))
        await _raises(StoreError, store.reserve(a_hold("a3", 0, [week]), [Cap(window="total", limit=9)]))
        await store.reserve(a_hold("a4", 0, [week]), [Cap(window=week, limit=150)])


async def a_refusal_says_whether_waiting_helps(build: Build, path: Path) -> None:
    caps = [Cap(window="total", limit=100)]
    async with _open(build, path) as store:
        await _raises(BudgetExhausted, store.reserve(a_hold("big", 101), caps))
        await _raises(BudgetExhausted, store.reserve(a_hold("none", 1), [Cap(window="total", limit=0)]))
        await store.reserve(a_hold("a1", 60), caps)
        await _raises(BudgetHeld, store.reserve(a_hold("a2", 60), caps))
        await store.settle("a1", 40, state="settled")
        await store.reserve(a_hold("a2", 60), caps)
        await store.settle("a2", 60, state="settled")
        await _raises(BudgetExhausted, store.reserve(a_hold("a3", 1), caps))
        await _raises(BudgetExhausted, store.reserve(a_hold("a4", 0), [Cap(window="total", limit=99)]))
        await store.reserve(a_hold("a3", 1), [Cap(window="total", limit=101)])  # the cap was raised


async def a_hold_ends_once(build: Build, path: Path) -> None:
    windows = ["total", "task:sort/total"]
    async with _open(build, path) as store, _open(build, path) as other:
        for name in ("settled", "assumed", "released", "more"):
            await store.reserve(a_hold(name, 1_000, windows), [])
        await asyncio.gather(
            *[one.settle("settled", cost, state="settled") for one, cost in ((store, 300), (other, 300)) * 3]
        )
        _same((await store.spent(windows))["total"], 3_300, "settled once, at what it cost")
        await store.settle("settled", 900, state="assumed")
        await store.settle("released", 0, state="released")
        await store.settle("released", 500, state="settled")
        _same(await other.spent(windows), dict.fromkeys(windows, 2_300), "released, and nothing after it")
        await store.settle("assumed", 0, state="assumed")
        await store.settle("assumed", 0, state="released")
        _same(await other.spent(windows), dict.fromkeys(windows, 2_300), "the worst case is assumed")
        await store.settle("more", 5_000, state="settled")
        _same(await other.spent(windows), dict.fromkeys(windows, 6_300), "the truth, beyond what was held")
        await _raises(StoreError, store.settle("never reserved", 1, state="settled"))
        await store.reserve(a_hold("odd", 10, windows), [])
        await _raises(StoreError, store.settle("odd", -1, state="settled"))
        await _raises(StoreError, store.settle("odd", 5, state="released"))


async def amounts_are_exact(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        large = 10**15 + 1
        await store.reserve(a_hold("large", large), [Cap(window="total", limit=large)])
        await _raises(BudgetHeld, store.reserve(a_hold("one more", 1), [Cap(window="total", limit=large)]))
        await store.settle("large", large, state="settled")

        async def pay(number: int) -> None:
            await store.reserve(a_hold(f"small {number}", 3), [])
            await store.settle(f"small {number}", 1, state="settled")

        await asyncio.gather(*[pay(number) for number in range(1_000)])
        _same(await store.spent(["total"]), {"total": large + 1_000}, "a large and a thousand small amounts")


async def an_open_hold_outlives_its_process(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        old = a_hold("old", 70, at=100.0, purpose="train")
        await store.reserve(old, [])
        await store.reserve(a_hold("new", 5, at=200.0), [])
    async with _open(build, path) as store:
        _same(await store.spent(["total"]), {"total": 75}, "what is held counts as spent")
        _same(await store.holds(200.0), [old], "holds from before that moment")
        await _raises(BudgetHeld, store.reserve(a_hold("next", 30), [Cap(window="total", limit=100)]))
        await store.settle("old", 0, state="assumed")
        _same(await store.holds(200.0), [], "holds after the old one was assumed")
        await _raises(BudgetExhausted, store.reserve(a_hold("next", 31), [Cap(window="total", limit=100)]))


async def spending_adds_up_to_the_windows(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        for number in range(12):
            day = f"day:2026-11-{20 + number % 2}"
            hold = a_hold(f"a{number}", 10, [day, "total"], at=float(number), task=("sort", "other")[number // 6])
            await store.reserve(hold, [])
            if number % 3:
                await store.settle(f"a{number}", 4, state="settled")
        lines = await store.spending()
        _same(sum(line.cost for line in lines), (await store.spent(["total"]))["total"], "the sum of all lines")
        first = [Spending("2026-11-20", "other", "serve", "big-1", "held", 1, 10)]
        _same(lines[:1], first, "the first line, by day, task, purpose, model and state")
        _same(sum(line.attempts for line in await store.spending(since=10.0)), 2, "attempts since a moment")


async def a_cap_holds_for_all_who_share_the_store(build: Build, path: Path) -> None:
    cap = [Cap(window="total", limit=105)]

    async def spend(store: Store, n: int) -> int:
        made = 0
        for turn in range(20):
            attempt = f"{n}/{turn}"
            try:
                await store.reserve(a_hold(attempt, 10), cap)
            except BudgetHeld:
                continue
            except BudgetExhausted:
                break
            await store.settle(attempt, 5 + turn % 6, state="settled")
            made += 5 + turn % 6
        return made

    spent = sum(await _race(build, path, spend))
    async with _open(build, path) as store:
        _same(await store.spent(["total"]), {"total": spent}, "what the ledger says was spent")
        _true(spent <= 105, f"spent {spent} of 105")
        _true(spent > 95, f"a refusal came with room for one more: spent {spent} of 105")


# --- being used


async def a_cancelled_caller_spoils_nothing(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        tasks = [asyncio.ensure_future(store.append(a_record(f"r{number}"))) for number in range(50)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        _true(all(isinstance(result, int) for result in done[1::2]), "those that were not cancelled are recorded")
        await store.append(a_record("after"))
        found = [record.request_id for _, record in await store.records("sort")]
        _true({f"r{number}" for number in range(1, 50, 2)} | {"after"} <= set(found), "recorded Records are there")


async def a_hold_of_a_cancelled_caller_can_be_given_back(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        for number in range(80):
            call = asyncio.ensure_future(store.reserve(a_hold(f"a{number}", 1), []))
            for _ in range(number % 4):  # cancelled before it begins, or later and later
                await asyncio.sleep(0)
            call.cancel()
            with suppress(StoreError):  # never reserved
                await store.settle(f"a{number}", 0, state="released")
            await asyncio.wait([call])
        _same(await store.spent(["total"]), {"total": 0}, "what was spent by callers who went away")


async def a_closed_store_says_so(build: Build, path: Path) -> None:
    async with _open(build, path) as store:
        append = asyncio.ensure_future(store.append(a_record("r1")))
        await asyncio.sleep(0)
        await store.close()
        await append
        await store.close()
        await _raises(StoreError, store.append(a_record("r2")))
        await _raises(StoreError, store.count("sort"))
    async with _open(build, path) as store:
        _same(await store.count("sort"), 1, "what waited when the store was closed")


CHECKS: tuple[Check, ...] = (
    records_come_back_as_they_were,
    a_request_id_is_recorded_once,
    an_idempotency_key_is_used_once_a_task,
    one_failing_write_leaves_its_neighbours_alone,
    records_are_found_by_task_number_and_label,
    an_answer_without_output_is_no_label,
    changes_tell_what_happened_since,
    a_promotion_knows_the_record_that_it_came_after,
    a_canary_stands_beside_the_champion_until_one_row_ends_it,
    the_last_mode_of_a_task_is_seen_by_all,
    hostile_strings_stay_what_they_are,
    an_older_state_does_not_replace_a_newer,
    versions_are_numbered_and_one_is_champion,
    a_lease_has_one_holder,
    an_old_lease_promotes_nothing,
    events_come_back_in_order_and_once_a_key,
    corrections_come_back_in_order_and_none_is_lost,
    a_request_has_one_label_and_none_is_lost,
    an_imported_example_is_kept_once_and_can_be_taken_out,
    a_hold_is_booked_in_all_windows_or_none,
    a_refusal_says_whether_waiting_helps,
    a_hold_ends_once,
    amounts_are_exact,
    an_open_hold_outlives_its_process,
    spending_adds_up_to_the_windows,
    a_cap_holds_for_all_who_share_the_store,
    a_cancelled_caller_spoils_nothing,
    a_hold_of_a_cancelled_caller_can_be_given_back,
    a_closed_store_says_so,
)
"""Every check, by the name of its promise."""

_REMOTE = Answer(output={"label": "a"})


@asynccontextmanager
async def _open(build: Build, path: Path) -> Any:
    store = build(path)
    try:
        yield store
    finally:
        await store.close()


async def _race[T](build: Build, path: Path, act: Callable[[Store, int], Awaitable[T]]) -> list[T]:
    stores = [build(path) for _ in range(5)]
    try:
        return list(await asyncio.gather(*[act(stores[number % 5], number) for number in range(10)]))
    finally:
        for store in stores:
            await store.close()


def _true(held: bool, promise: str) -> None:
    if not held:
        raise AssertionError(promise)


def _same(actual: object, wanted: object, what: str) -> None:
    if actual != wanted:
        raise AssertionError(f"{what}: {ascii(actual)[:2_000]} is not {ascii(wanted)[:2_000]}")


async def _raises(error: type[ApprenticeError], call: Awaitable[object]) -> None:
    try:
        result = await call
    except error:
        return
    raise AssertionError(f"{error.__name__} was due, and the call returned {result!a}")
