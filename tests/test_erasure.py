"""What a subject said is gone for good when that is asked for, and what everybody said when its time is over."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import apsw
import pytest

from apprentice import cli, feedback, lineage, plugins
from apprentice.config import Config
from apprentice.engine import Apprentice
from apprentice.erasure import erase, expire
from apprentice.errors import InvalidInput, InvalidRequest, StoreError, UnknownTask
from apprentice.learn import due
from apprentice.sections import Retention
from apprentice.stores import MIGRATIONS, digest, migrate
from apprentice.testing.servers import Reply, asked, serve_openai
from apprentice.testing.stores import a_batch, a_hold, a_record, a_version
from apprentice.types import Answer, Correction, Event, Example, Json, Label, Record, Score, Store
from apprentice.worker import once

from .conftest import YAML, honest
from .test_canary import Told, told, versions

type Configured = Callable[..., Config]

CANARY = "canary-of-ann-0815"
DAY = 86_400.0
CONTEXT = get_context("forkserver")


@pytest.fixture(autouse=True, scope="module")
def one_process_that_has_imported_everything() -> None:
    CONTEXT.set_forkserver_preload([__name__])


def files_with(folder: Path, words: str = CANARY) -> list[str]:
    """The files below a folder in which these words are: the store's, its log's, anybody's."""
    every = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.name for path in every if words.encode() in path.read_bytes())


async def opened(path: Path) -> Store:
    store: Store = plugins.build("stores", "sqlite", path=path)
    return store


def said(number: int, *, by: str | None = None, words: str = "", at: float | None = None, **more: Any) -> Record:
    """A Record of a request that both models answered."""
    tags = {} if by is None else {"subject": digest(by)}
    input = {"text": f"please look at the apple {number} {words}"}
    answer = Answer(output={"kind": f"fruit {words}"}, text=words, problem=words or None, confidence=0.5)
    values: dict[str, Any] = {
        "at": float(number) if at is None else at,
        "input": input,
        "tags": tags,
        "local": answer,
        "remote": answer,
        "served": "remote",
        "score": Score(value=1.0, fields={words or "kind": 1.0}),
        "error": f"local: {words}" if words else None,
        "idempotency_key": f"key {words} {number}" if words else None,
    }
    return a_record(f"r{number}", **values | more)


# --- erasing ----------------------------------------------------------------------------------------------------------


async def test_every_word_of_a_subject_is_gone_from_every_file_and_what_others_said_stays(tmp_path: Path) -> None:
    """P22, F119: no byte of it in the database, its log and its index, while the store is open and after."""
    store = await opened(tmp_path / "s.db")
    try:
        for number in range(1, 121):
            ann = number % 3 == 0
            words = f"{CANARY} " * (1 + number * 7 % 300) if ann else "of somebody else"
            await store.append(said(number, by="ann" if ann else "bob", words=words))
        for number in (3, 4):
            word = Correction(
                request_id=f"r{number}", task="sort", at=200.0, action="corrected", target={"kind": CANARY}
            )
            await store.add_correction(word.model_copy(update={"comment": CANARY} if number == 3 else {"target": "x"}))
        await store.add_label(
            Label(
                request_id="r6", task="sort", at=201.0, input={"text": CANARY}, answer=Answer(output={"kind": CANARY})
            )
        )
        told: dict[str, Json] = {"records": ["r3", "r4"], "answers": [{"kind": CANARY}, {"kind": "tool"}], "round": 1}
        await store.add_event(Event(name="PROBED", task="sort", at=202.0, message="asked again", evidence=told))
        before, spent = await store.changes(0), await store.spending()
        assert files_with(tmp_path) != []

        found = await store.forget(digest("ann"), 300.0, dry_run=True)
        assert [(one.task, one.records, one.corrections, one.labels) for one in found] == [("sort", 40, 1, 1)]
        assert (await store.record("r3")) == said(3, by="ann", words=f"{CANARY} " * 22) and files_with(tmp_path) != []
        assert await store.forget(digest("ann"), 300.0) == found
        await store.scrub()

        assert files_with(tmp_path) == []
        assert await store.changes(0) == before and await store.spending() == spent  # the controller sees no difference
        record, other = await store.record("r3"), await store.record("r4")
        assert record is not None and record.input is None and record.tags == {} and record.cost == said(3).cost
        assert other is not None and other.input["text"].endswith("of somebody else")
        assert [word.request_id for word in await store.corrections("sort")] == ["r4"]
        assert await store.labels("sort") == []
        [event] = await store.events("sort", names=["PROBED"])
        assert event.evidence == {"records": ["r4"], "answers": [{"kind": "tool"}], "round": 1}
        assert len(await store.records("sort", labelled=True)) == 80 == await store.count("sort", labelled=True)
        assert await store.forget(digest("ann"), 301.0) == []  # there is nothing left
    finally:
        await store.close()
    assert files_with(tmp_path) == []


async def test_one_task_may_be_meant_or_all(tmp_path: Path) -> None:
    store = await opened(tmp_path / "s.db")
    try:
        for number, task in enumerate(("sort", "route", "sort"), start=1):
            await store.append(said(number, by="ann", words=CANARY, task=task))
        assert [(one.task, one.records) for one in await store.forget("nobody", 9.0)] == []
        assert [(one.task, one.records) for one in await store.forget(digest("ann"), 9.0, task="sort")] == [("sort", 2)]
        kept = await store.record("r2")
        assert kept is not None and kept.input is not None
        await store.append(said(4, by="ann", words=CANARY, task="route", at=8.0))  # of the other task nothing was asked
        await store.append(said(5, by="ann", words=CANARY, task="sort", at=8.0))
        assert [(await store.record(f"r{n}")).input is None for n in (4, 5)] == [False, True]  # type: ignore[union-attr]
        assert [(one.task, one.records) for one in await store.forget(digest("ann"), 9.0)] == [("route", 2)]
    finally:
        await store.close()


async def test_versions_that_may_have_learned_from_it_are_listed_and_marked(tmp_path: Path) -> None:  # F119
    store = await opened(tmp_path / "s.db")
    try:
        for made_at in (5.0, 15.0, 25.0):
            await store.add_version(a_version(created_at=made_at, metrics={"labels": 100}))
        await store.append(said(10, by="ann", words=CANARY))
        await store.append(said(11, by="ann", words=CANARY))
        await store.append(said(12, by="eve", words=CANARY, remote=None, served="local", score=None))
        [found] = await store.forget(digest("ann"), 30.0)
        assert found.versions == ("v2", "v3") and not found.teaching
        assert (await lineage.read(store, "sort")).tainted == {"v2", "v3"}
        labels = {version.id: version.metrics["labels"] for version in await store.versions("sort")}
        assert labels == {
            "v1": 100,
            "v2": 98,
            "v3": 98,
        }  # of what is still there, so that teaching does not wait for it
        [found] = await store.forget(digest("eve"), 31.0)
        assert found.records == 1 and found.versions == ()  # nobody could learn from what only the student said
    finally:
        await store.close()


@pytest.mark.parametrize("how", ["cycle", "job"])
async def test_the_version_that_is_being_made_is_marked_when_it_is_there(how: str, tmp_path: Path) -> None:
    store = await opened(tmp_path / "s.db")
    try:
        await store.append(said(1, by="ann", words=CANARY))
        if how == "cycle":
            assert await store.acquire("learn/sort", "somebody", 5.0, 20.0) is not None
        else:
            await store.reserve(a_hold("job@1", 100, task="sort", purpose="train"), [])
        [found] = await store.forget(digest("ann"), 6.0)
        assert found.teaching and found.versions == ()
        made = await store.add_version(a_version(created_at=9.0))
        after = await store.add_version(a_version(created_at=19.0))
        assert (await lineage.read(store, "sort")).tainted == {made.id} and after.id != made.id
    finally:
        await store.close()


async def test_what_is_said_later_about_what_was_erased_is_not_kept(tmp_path: Path) -> None:
    store = await opened(tmp_path / "s.db")
    try:
        await store.append(said(1, by="ann", words=CANARY))
        await store.append(said(2, by="bob"))
        await store.forget(digest("ann"), 6.0)
        with pytest.raises(StoreError, match="was erased"):
            word = Correction(request_id="r1", task="sort", at=7.0, action="corrected", target=CANARY)
            await store.add_correction(word)
        assert not await store.add_label(Label(request_id="r1", task="sort", at=7.0, input=CANARY))
        told: dict[str, Json] = {"records": ["r1", "r2"], "answers": [CANARY, "tool"]}
        await store.add_event(Event(name="PROBED", task="sort", at=8.0, message="asked again", evidence=told))
        [event] = await store.events("sort", names=["PROBED"])
        assert event.evidence == {"records": ["r2"], "answers": ["tool"]}
        await store.scrub()
    finally:
        await store.close()
    assert files_with(tmp_path) == []


async def test_a_request_under_way_is_answered_and_its_words_do_not_come_back(
    configured: Configured, tmp_path: Path
) -> None:
    """F119: the tombstone is older than the Record, and newer than the request."""
    goes_on = asyncio.Event()

    def slow(body: dict[str, Json]) -> Reply:
        waits = CANARY in asked(body)["text"]
        return Reply(honest(body), wait=goes_on if waits else None)

    async with serve_openai(slow) as server:
        config = configured(server.url, local={"learn": "off"})
        async with Apprentice(config) as app:
            tags = {"subject": "ann"}
            before = await app.arun("sort", {"text": f"an apple of {CANARY[:-1]}"}, tags=tags)
            run = asyncio.create_task(
                app.arun("sort", {"text": f"a horse {CANARY}"}, tags=tags, idempotency_key=f"k {CANARY}")
            )
            while len(server.requests) < 2:
                await asyncio.sleep(0.01)
            [found] = await app.aerase("ann")
            assert found.records == 1 and files_with(tmp_path, CANARY[:-1]) == []
            goes_on.set()
            result = await run
            assert result.output == {"kind": "animal"}
            assert files_with(tmp_path, CANARY[:-1]) == []
            for request in (before, result):
                record = await app._store.record(request.request_id)
                assert record is not None and record.input is None and record.cost == request.cost > 0
            with pytest.raises(InvalidRequest, match="not captured"):
                await app.afeedback(result.request_id, corrected={"kind": "tool"})
            later = await app.arun("sort", {"text": "a hammer, asked anew"}, tags=tags)
            record = await app._store.record(later.request_id)
            assert record is not None and record.input == {"text": "a hammer, asked anew"}
            assert record.tags == {"subject": digest("ann")}
            assert [event.name for event in await app._store.events("sort", names=["ERASED"])] == ["ERASED"]
    assert files_with(tmp_path, CANARY[:-1]) == []


async def test_what_an_evaluator_says_about_answers_stays_with_the_record(
    configured: Configured, tmp_path: Path
) -> None:
    """Events are the queue of the webhooks: nothing that was said may wait there."""

    async def repeats(answer: Json, reference: Json) -> Score:
        raise ValueError(f"cannot compare {answer} of {CANARY}")

    async with serve_openai(honest) as server:
        config = configured(server.url, local={"learn": "off"})
        await versions(config, 1)
        async with Apprentice(config) as app:
            await app.arun("sort", {"text": "an apple to begin with"})
            told(app, {"v1": Told()})
            live = app._tasks["sort"]
            live.champion, live.evaluator = None, repeats
            for number in range(2):
                await app.arun("sort", {"text": f"a horse {number}"}, tags={"subject": "ann"})
            [event] = await app._store.events("sort", names=["EVALUATION_FAILED"])
            assert event.message == "not compared: ValueError"
            assert files_with(tmp_path) != []  # the Record says more
            await app.aerase("ann")
    assert files_with(tmp_path) == []


async def test_data_sets_of_open_jobs_and_the_log_of_the_cycle_are_gone_others_stay(  # F119
    configured: Configured, tmp_path: Path
) -> None:
    config = configured(local={"learn": "off"})
    task = config.local.model_dir / "sort"
    for job, row in {"open": {"checkpoint": None}, "done": {"checkpoint": "sha256-x"}, "new": None}.items():
        folder = task / ".training" / job
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text(CANARY if job != "done" else "made long ago")
        if row is not None:
            (folder / "row.json").write_text(json.dumps(row))
    (task / ".jobs").mkdir()
    (task / ".jobs" / "j.jsonl").write_text(CANARY)
    (task / ".jobs" / "j.json").write_text("{}")  # what it may cost is not forgotten
    (task / "learn.log").write_text(CANARY)
    store = await opened(config.store.path)
    try:
        await store.append(said(1, by="ann", words=CANARY))
        assert len(await erase(config, store, "ann", at=5.0, dry_run=True)) == 1
        assert len(files_with(tmp_path)) > 4
        assert len(await erase(config, store, "ann", at=5.0)) == 1
        assert files_with(tmp_path) == []
        assert (task / ".training" / "done" / "train.jsonl").exists() and (task / ".jobs" / "j.json").exists()
        with pytest.raises(UnknownTask):
            await erase(config, store, "ann", at=5.0, task="sorts")
        with pytest.raises(InvalidInput, match="subject"):
            await erase(config, store, "", at=5.0)
    finally:
        await store.close()


async def test_bytes_that_were_deleted_before_deleting_overwrote_them_go_too(tmp_path: Path) -> None:
    store = await opened(tmp_path / "s.db")
    try:
        old = apsw.Connection(str(tmp_path / "s.db"))
        old.pragma("secure_delete", False)
        rows = [("sort", f"import-{number}", CANARY * 50) for number in range(100)]
        old.executemany("INSERT INTO examples (task, id, body) VALUES (?, ?, ?)", rows)
        old.execute("DELETE FROM examples")
        old.close()
        await store.scrub(rebuild=False)
        assert files_with(tmp_path) == ["s.db"]
        await store.scrub()
        assert files_with(tmp_path) == []
    finally:
        await store.close()


async def test_a_reader_in_the_way_is_waited_for(tmp_path: Path) -> None:
    """While somebody reads an old state of the file, the log cannot be emptied; as soon as they are done, it is."""
    store = await opened(tmp_path / "s.db")
    try:
        await store.append(said(1, by="ann", words=CANARY))
        reader = apsw.Connection(str(tmp_path / "s.db"), flags=apsw.SQLITE_OPEN_READONLY)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM records").fetchall()
        await store.forget(digest("ann"), 5.0)
        scrub = asyncio.create_task(store.scrub())
        assert await store.append(said(2, by="bob")) == 2  # nobody else waits meanwhile
        assert not scrub.done()
        reader.execute("COMMIT")
        reader.close()
        await scrub
        assert files_with(tmp_path) == []
    finally:
        await store.close()


def erases(pipe: Connection, path: Path) -> None:
    """Erase, and say when each step begins."""

    async def run() -> None:
        store = await opened(path)
        pipe.send("forget")
        await store.forget(digest("ann"), 500.0)
        pipe.send("scrub")
        await store.scrub()
        pipe.send("done")

    asyncio.run(run())


@pytest.mark.parametrize(("step", "seed"), [("forget", 1), ("forget", 2), ("scrub", 3), ("scrub", 4), ("done", 5)])
async def test_killed_in_the_middle_all_or_nothing_is_erased_and_a_repeat_leaves_nothing(
    step: str, seed: int, configured: Configured, tmp_path: Path
) -> None:
    config = configured(local={"learn": "off"})
    store = await opened(config.store.path)
    for number in range(60):
        await store.append(said(number, by="ann", words=f"{CANARY} " * 100))
    await store.close()
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=erases, args=(theirs, config.store.path))
    child.start()
    assert child.pid is not None
    while ours.recv() != step:
        pass
    for _ in range(random.Random(seed).randrange(20_000)):  # somewhere within the step
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    store = await opened(config.store.path)
    try:
        words = {record.input is None for _, record in await store.records("sort")}
        assert len(words) == 1  # all of them, or none
        assert (step == "forget") or words == {True}
        await erase(config, store, "ann", at=600.0)
        assert files_with(tmp_path) == []
        assert {record.input for _, record in await store.records("sort")} == {None}
    finally:
        await store.close()


async def test_a_store_from_before_knows_its_subjects_after_it_was_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    old = apsw.Connection(str(path))
    migrate(old, MIGRATIONS[:10])
    columns = "request_id, task, at, level, p, audit, reason, cost, has_remote, body"
    records = [
        said(1, words=CANARY).model_copy(update={"tags": {"subject": "ann"}}),
        said(2, words="else").model_copy(update={"tags": {"channel": "mail"}}),
        said(3).without_words(),
    ]
    for record in records:
        row = (record.request_id, "sort", record.at, 1.0, 1.0, 0, "learning", record.cost, 1, record.model_dump_json())
        old.execute(f"INSERT INTO records ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    old.close()
    store = await opened(path)
    try:
        assert await store.expire("sort", 0.5) == 0
        assert [one.records for one in await store.forget(digest("ann"), 9.0)] == [1]
        assert await store.expire("sort", 99.0) == 1  # the third one had no words
    finally:
        await store.close()


# --- retention --------------------------------------------------------------------------------------------------------


async def test_words_whose_time_is_over_go_and_the_state_stays(configured: Configured, tmp_path: Path) -> None:
    config = configured(local={"learn": "off"}).model_copy(update={"retention": Retention(inputs=90, imported=400)})
    now = 1_000 * DAY
    store = await opened(config.store.path)
    try:
        old_ones = [said(number, at=now - 100 * DAY, words=CANARY) for number in range(1, 601)]
        young = [said(number, at=now - 10 * DAY, words="young") for number in range(601, 701)]
        await asyncio.gather(*map(store.append, [*old_ones, *young]))
        await store.append(said(900, at=now - 100 * DAY, words=CANARY, task="passthrough"))
        word = Correction(request_id="r1", task="sort", at=now, action="corrected", target={"kind": CANARY})
        await store.add_correction(word)
        old = {"task": "sort", "at": now - 100 * DAY}
        await store.keep_batch(a_batch("closed", inputs=({"text": CANARY},), worsts=(1,), open=False, **old))
        await store.keep_batch(a_batch("open", inputs=({"text": "waiting"},), worsts=(1,), open=True, **old))
        rows = [("a", 500.0, CANARY), ("b", 300.0, "young"), ("c", None, "of no day")]
        for id, days, text in rows:
            made = 0.0 if days is None else now - days * DAY
            row = Example(input={"text": text}, target={"kind": "x"}, source="gold", request_id=id, at=made)
            await store.add_examples("sort", [row])
        metrics = {"labels": await feedback.known(store, "sort")}
        await store.add_version(a_version(created_at=now - DAY, state="rejected", metrics=metrics))
        before = await store.changes(0)
        task = config.task("sort")
        assert not await due(config, task, store, now=now)

        assert await expire(config, store, now=now) == 603
        assert await store.changes(0) == before
        assert files_with(tmp_path) == []
        assert len(await store.records("sort", labelled=True)) == 100
        assert [example.request_id for example in await store.examples("sort")] == ["b", "c"]
        assert await store.corrections("sort") == []
        batches = {batch.id: batch.inputs for batch in await store.batches("sort")}
        assert batches == {"closed": (None,), "open": ({"text": "waiting"},)}
        [version] = await store.versions("sort")
        assert version.metrics["labels"] == 102 == await feedback.known(store, "sort")
        assert not (await lineage.read(store, "sort")).tainted  # nobody asked for it to be unlearned
        assert not await due(config, task, store, now=now)  # nothing is new by it
        size = config.local.fine_tune_batch_size
        await asyncio.gather(*(store.append(said(1000 + number, at=now)) for number in range(size)))
        assert await due(config, task, store, now=now)  # and what is new is noticed
        assert await expire(config, store, now=now) == 0
    finally:
        await store.close()


async def test_nothing_goes_where_no_time_is_set_and_a_task_may_have_its_own(configured: Configured) -> None:
    config = configured(local={"learn": "off"})
    store = await opened(config.store.path)
    try:
        await store.append(said(1, at=1.0, words=CANARY))
        assert await expire(config, store, now=10_000 * DAY) == 0
        kept = config.model_copy(update={"retention": Retention(inputs=20_000)})
        assert await expire(kept, store, now=10_000 * DAY) == 0
        task = config.task("sort").model_copy(update={"retention": Retention(inputs=1)})
        assert await expire(kept.model_copy(update={"tasks": (task,)}), store, now=10_000 * DAY) == 1
    finally:
        await store.close()


async def test_the_worker_looks_whose_time_is_over(configured: Configured, tmp_path: Path) -> None:
    config = configured(local={"learn": "off"}).model_copy(update={"retention": Retention(inputs=1)})
    store = await opened(config.store.path)
    await store.append(said(1, at=time.time() - 3 * DAY, words=CANARY))
    await store.append(said(2, at=time.time(), words="young"))
    await store.close()
    assert await once(config, "sort") is None
    assert files_with(tmp_path) == [] and files_with(tmp_path, "young") != []


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_was_erased_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "apprentice.yaml"
    file.write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))

    async def fill() -> None:
        store = await opened(tmp_path / ".apprentice" / "apprentice.db")
        await store.append(said(1, by="ann", words=CANARY))
        await store.append(said(2, by="ann", words=CANARY))
        await store.add_version(a_version(created_at=3.0))
        await store.close()

    asyncio.run(fill())
    command = ["erase", "--config", str(file), "--subject", "ann"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out == (
        "sort: 2 requests would be erased\n  v1 may have learned from them: teach again with `apprentice learn sort`, "
        "then remove its files\n"
    )
    assert cli.main([*command, "--json", "--task", "sort"]) == 0
    [told] = json.loads(capsys.readouterr().out)["erased"]
    assert told["records"] == 2 and told["versions"] == ["v1"]
    assert files_with(tmp_path) == []
    assert cli.main(["versions", "sort", "--config", str(file)]) == 0
    assert "TAINTED" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "no request of this subject has words\n"
