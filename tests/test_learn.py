from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from apprentice import feedback, jobs, lineage, plugins, worker
from apprentice import learn as teaching
from apprentice.config import Config, TaskConfig
from apprentice.errors import ConfigError, StoreError, TrainingError
from apprentice.learn import due, learn
from apprentice.promotion import fingerprint, held_out
from apprentice.selection import choose, gold, permit, select
from apprentice.testing.local_servers import serve_vllm, write_checkpoint
from apprentice.types import Answer, Checkpoint, Correction, Decision, Json, Lease, Record, Score, Store, Version

from .conftest import YAML, right, texts

Configured = Callable[..., Config]
FAST = YAML.replace("tfidf", "wordllama")


def quick(configured: Configured) -> Configured:
    """With the encoder that is the quickest to learn by, for tests in which it does not matter which one it is."""

    def make(*given: Any, text: str = FAST, **sections: Any) -> Config:
        return configured(*given, text=text, **sections)

    return make


@pytest.fixture
def configured(configured: Configured) -> Configured:
    return quick(configured)


def answered(number: int, text: str, kind: str | None) -> Record:
    """A request that the remote answered; without a kind, one whose answer was of no use."""
    return Record(
        request_id=f"r{number}",
        task="sort",
        at=1.0 + number,  # 0 would mean that nobody knows
        input={"text": text},
        decision=Decision(route="remote", reason="no_local_model", p=0.0),
        remote=Answer(output=None if kind is None else {"kind": kind}, model="gpt"),
        served=None if kind is None else "remote",
    )


async def filled(config: Config, n: int) -> Store:
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    await asyncio.gather(*(store.append(answered(i, text, right(text))) for i, text in enumerate(texts(n))))
    return store


def test_the_newest_answer_to_an_input_counts_and_one_input_in_ten_is_held_out() -> None:
    records = [(i, answered(i, text, right(text))) for i, text in enumerate(texts(400))]
    records += [(400, answered(400, "a pear", "tool")), (401, answered(401, "A  PEAR", "fruit"))]
    records += [(402, answered(402, "an otter", None))]
    found = select(records)
    assert found.labels == 402
    rows = [*found.training, *found.held_out]
    assert len(rows) == 401
    assert [row.target for row in rows if "pear" in row.input["text"].lower() and row.request_id == "r401"]
    assert not [row for row in rows if row.request_id in ("r400", "r402")]
    assert all(held_out(fingerprint(row.input)) for row in found.held_out)
    assert not any(held_out(fingerprint(row.input)) for row in found.training)


async def test_a_cycle_makes_a_champion_with_its_history_and_the_next_is_not_due(configured: Configured) -> None:
    config = configured()
    store = await filled(config, 80)
    try:
        version = await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert version is not None
        assert (version.id, version.state, version.metrics["labels"]) == ("v1", "champion", 80)
        assert version.trained_on == len(select(await store.records("sort")).training)
        assert len(version.metrics["confidences"]) == 80
        assert [event.name for event in await store.events("sort")] == ["PROMOTED"]
        assert not await due(config, config.task("sort"), store)
        assert await learn(config, "sort", store, clock=lambda: 6.0, owner="a") is None
        again = await learn(config, "sort", store, clock=lambda: 6.0, owner="a", force=True)
        assert again is not None and again.checkpoint == version.checkpoint  # the same rows make the same weights
    finally:
        await store.close()


async def test_while_it_trains_it_is_shown_with_the_trainer_and_since_when(configured: Configured) -> None:
    config = configured()
    store = await filled(config, 80)
    seen = []

    async def watch() -> None:
        """In each turn of the loop, so that a training in a thread cannot pass unseen."""
        while True:
            seen.append(jobs.running(config.local.model_dir / "sort"))
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    try:
        assert await learn(config, "sort", store, clock=lambda: 5.0, owner="a") is not None
        assert {now for now in seen if now is not None} == {jobs.Training(trainer="embedded", since=5.0, token=1)}
        assert seen[-1] is None
    finally:
        watching.cancel()
        await store.close()


async def test_a_candidate_that_is_worse_is_rejected_and_the_champion_stays(configured: Configured) -> None:
    config = configured()
    store = await filled(config, 150)
    try:
        first = await learn(config, "sort", store, clock=lambda: 1.0, owner="a")
        assert first is not None
        # From now on the remote is wrong about what is trained on, and right about what is held out.
        wrong = {"fruit": "tool", "animal": "fruit", "tool": "animal"}
        for number, text in enumerate(texts(300, seed=9)):
            sound = held_out(fingerprint({"text": text}))
            kind = right(text) if sound else wrong[right(text)]
            await store.append(answered(1000 + number, text, kind))
        second = await learn(config, "sort", store, clock=lambda: 2.0, owner="a", force=True)
        assert second is not None and second.state == "rejected"
        assert "worse than the champion" in second.metrics["reason"]
        assert [v.state for v in await store.versions("sort")] == ["champion", "rejected"]
    finally:
        await store.close()


async def test_the_next_worker_waits_for_the_lease_of_one_that_died(configured: Configured) -> None:  # F78
    config = configured()
    store = await filled(config, 60)
    try:
        now = 100.0
        assert await store.acquire("learn/sort", "a worker that died", now, 20.0) is not None
        cycle = asyncio.create_task(learn(config, "sort", store, clock=lambda: now, owner="b"))
        done, _ = await asyncio.wait([cycle], timeout=1.2)
        assert not done
        now = 121.0
        version = await cycle
        assert version is not None and version.state == "champion"
    finally:
        await store.close()


async def test_a_lease_that_was_taken_over_promotes_nothing(configured: Configured) -> None:  # F78
    config = configured()
    store = await filled(config, 60)
    try:
        version = await learn(config, "sort", store, clock=lambda: 1.0, owner="a")
        assert version is not None
        old = await store.acquire("learn/sort", "a", 2.0, 1.0)
        new = await store.acquire("learn/sort", "b", 10.0, 20.0)
        assert old is not None and new is not None
        with pytest.raises(StoreError):
            await store.promote("sort", version.id, 11.0, lease=old)
    finally:
        await store.close()


async def test_nothing_to_learn_from_is_an_error_that_says_so(configured: Configured) -> None:
    config = configured()
    store = await filled(config, 0)
    try:
        with pytest.raises(TrainingError, match="no recorded answer"):
            await learn(config, "sort", store, clock=lambda: 1.0, owner="a", force=True)
        silent = config.model_copy(update={"local": config.local.model_copy(update={"fine_tune_backend": None})})
        await store.append(answered(1, "a pear", "fruit"))
        await store.append(answered(2, "a plum", "fruit"))
        with pytest.raises(TrainingError, match="nothing is configured") as caught:
            await learn(silent, "sort", store, clock=lambda: 1.0, owner="a", force=True)
        assert caught.value.hint
    finally:
        await store.close()


async def test_a_champion_that_learned_another_schema_does_not_stop_the_next_one(configured: Configured) -> None:
    store = await filled(configured(), 60)
    try:
        assert await learn(configured(), "sort", store, clock=lambda: 1.0, owner="a") is not None
        wider = configured(text=FAST.replace("[fruit, animal, tool]", "[fruit, animal, tool, other]"))
        version = await learn(wider, "sort", store, clock=lambda: 2.0, owner="a", force=True)
        assert version is not None and version.state == "champion"
        assert "v1 can no longer answer" in version.metrics["reason"]
    finally:
        await store.close()


async def test_losing_the_lease_ends_the_cycle_and_the_worker_goes_on_with_the_other_tasks(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:  # F78
    monkeypatch.setattr(teaching, "_LEASE", 0.2)
    one = configured()
    config = one.model_copy(update={"tasks": (*one.tasks, one.tasks[0].model_copy(update={"name": "other"}))})
    store = await filled(config, 60)
    for number, text in enumerate(texts(60)):
        await store.append(answered(1000 + number, text, right(text)).model_copy(update={"task": "other"}))
    train = teaching.train

    async def robbed(config: Config, task: TaskConfig, *more: Any, **named: Any) -> Checkpoint:
        if task.name == "sort":
            assert await store.acquire("learn/sort", "a thief", time.time() + 100, 1000) is not None
            await asyncio.Event().wait()
        return await train(config, task, *more, **named)

    monkeypatch.setattr(teaching, "train", robbed)
    working = asyncio.create_task(worker.forever(config, every=0.01))
    try:
        async with asyncio.timeout(20):
            while not await store.versions("other"):
                assert not working.done()
                await asyncio.sleep(0.02)
        assert await store.versions("sort") == []
        [failed] = await store.events("sort")
        assert failed.name == "TRAINING_FAILED" and "took over" in failed.message
    finally:
        working.cancel()
        await asyncio.wait([working])
        await store.close()


def planted(number: int, text: str, provider: str, model: str) -> Record:
    record = answered(number, text, right(text))
    assert record.remote is not None
    remote = record.remote.model_copy(update={"provider": provider, "model": model})
    return record.model_copy(update={"remote": remote, "request_id": f"p{number}"})


async def test_a_row_that_may_not_train_never_does_and_the_version_proves_it(configured: Configured) -> None:  # F104
    config = configured()
    store = await filled(config, 60)
    try:
        names = {"claude": ("anthropic@", "claude-sonnet-4-5"), "nobody": ("elsewhere@api.example.com", "gpt")}
        for number, text in enumerate(texts(40, seed=7)):
            await store.append(planted(number, text, *names["claude" if number % 2 else "nobody"]))
        version = await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert version is not None
        proof = version.metrics["licence"]
        assert version.trained_on == proof["rows"]
        assert all(group["teacher"] == "openai@own server" for group in proof["by"])
        assert sum(proof["refused"].values()) + proof["rows"] == sum(
            not held_out(fingerprint({"text": text})) for text in {*texts(60), *texts(40, seed=7)}
        )
        assert Path(version.path, "manifest.json").read_text().count("claude") == 0
        [said] = await store.events("sort", names=["ROWS_REFUSED"])
        assert said.evidence["refused"] == proof["refused"]
    finally:
        await store.close()


async def test_without_a_permission_nothing_is_learned_and_the_command_that_explains_is_named(
    configured: Configured,
) -> None:
    config = configured(remote={"permission": None})
    store = await filled(config, 60)
    try:
        with pytest.raises(TrainingError, match="may not train") as raised:
            await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert raised.value.hint is not None and "apprentice licence" in raised.value.hint
        assert await store.versions("sort") == []
    finally:
        await store.close()


async def test_a_permission_that_ends_between_selection_and_start_stops_the_job(configured: Configured) -> None:
    granted = configured().remote.permission
    assert granted is not None
    config = configured(remote={"permission": granted.model_copy(update={"until": date(1970, 1, 1)})})
    store = await filled(config, 60)
    clock = iter([5.0, 5.0, 86_400.0 * 2])
    try:
        chosen = select(await store.records("sort", labelled=True))
        selection = await permit(config, config.task("sort"), chosen, store, lambda: next(clock))
        next(clock)
        with pytest.raises(TrainingError, match="not those that were selected"):
            lease = Lease("learn/sort", "a", 1, 1e9)
            await teaching.train(config, config.task("sort"), selection, 0, lambda: next(clock), store, lease)
    finally:
        await store.close()


async def test_an_approved_answer_is_still_the_remotes_and_its_terms_count(configured: Configured) -> None:
    config = configured(remote={"permission": None})
    store = await filled(config, 40)
    try:
        numbers = [n for n, text in enumerate(texts(40)) if not held_out(fingerprint({"text": text}))]
        await feedback.give(config, store, f"r{numbers[0]}", "approved", at=2.0)
        kind = next(kind for kind in ("fruit", "tool") if kind != right(texts(40)[numbers[1]]))
        await feedback.give(config, store, f"r{numbers[1]}", "corrected", at=2.0, target={"kind": kind})
        chosen = select(await store.records("sort", labelled=True), await gold(store, "sort"))
        selection = await permit(config, config.task("sort"), chosen, store, lambda: 5.0)
        assert [(row.request_id, row.terms) for row in selection.training] == [(f"r{numbers[1]}", "own")]
    finally:
        await store.close()


async def test_a_version_that_misses_a_stated_gate_is_rejected_by_name_and_what_was_measured_is_kept(
    configured: Configured,
) -> None:
    stated = FAST.replace(
        "evaluator:", 'gates: ["agreement >= 0.05", "size_mb <= 0"]\n    slices: [text]\n    evaluator:'
    )
    config = configured(text=stated)
    store = await filled(config, 80)
    try:
        version = await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert version is not None and version.state == "rejected"
        assert "gate size_mb <= 0" in version.metrics["reason"] and "agreement" not in version.metrics["reason"]
        found = version.metrics["examination"]
        assert found["n"] == version.metrics["held_out"]["n"] == sum(part["n"] for part in found["slices"].values())
        assert found["json_validity"] == 1.0 and found["p95_latency_ms"] > 0 and found["size_mb"] > 0
        assert found["majority"] < found["agreement"] and found["champion"] is None
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('gates: ["beauty >= 1"]', "known: agreement"),
        ('gates: ["agreement > 1"]', "is no gate such as"),
        ("slices: [colour]", "colour"),
    ],
)
def test_a_gate_or_slice_that_does_not_exist_is_refused_with_what_does(
    configured: Configured, line: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(text=YAML.replace("evaluator:", f"{line}\n    evaluator:"))


async def test_a_candidate_is_tried_out_while_the_champion_serves_unless_it_has_seen_twice_as_much(
    configured: Configured,
) -> None:
    config = configured()
    store = await filled(config, 80)
    try:
        first = await learn(config, "sort", store, clock=lambda: 1.0, owner="a")
        assert first is not None
        for number, text in enumerate(texts(60, seed=3)):  # audits that it passes: it serves from some of them on
            row = answered(1000 + number, text, right(text))
            update = {"version": "v1", "local": Answer(output={"kind": right(text)}, confidence=0.9)}
            score = Score(value=1.0)
            learning = Decision(route="both", reason="learning", p=1.0, audit=True)
            await store.append(row.model_copy(update=update | {"score": score, "decision": learning}))
        assert (await lineage.standing(config, config.task("sort"), store)).phase == "steady"
        second = await learn(config, "sort", store, clock=lambda: 2.0, owner="a", force=True)
        assert second is not None and second.state == "canary"
        assert (await store.events("sort"))[-1].name == "CANARY_STARTED"
        for number, text in enumerate(texts(170, seed=4)):
            await store.append(answered(2000 + number, text, right(text)))
        third = await learn(config, "sort", store, clock=lambda: 3.0, owner="a", force=True)
        assert third is not None and third.state == "champion"
        assert [version.state for version in await store.versions("sort")] == ["retired", "rejected", "champion"]
    finally:
        await store.close()


async def test_a_correction_makes_the_next_cycle_go_on_from_the_champion(configured: Configured) -> None:
    config = configured()
    store = await filled(config, 80)
    try:
        first = await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert first is not None
        plain = await learn(config, "sort", store, clock=lambda: 6.0, owner="a", force=True)
        row = next(e for e in select(await store.records("sort")).training if e.target["kind"] != "tool")
        assert row.request_id is not None
        word = Correction(request_id=row.request_id, task="sort", at=7.0, action="corrected", target={"kind": "tool"})
        await store.add_correction(word)
        second = await learn(config, "sort", store, clock=lambda: 8.0, owner="a", force=True)
        assert plain is not None and second is not None
        manifests = [json.loads((Path(v.path) / "manifest.json").read_text()) for v in (first, plain, second)]
        assert [manifest.get("updated_from") for manifest in manifests] == [None, None, plain.checkpoint]
        for number, text in enumerate(texts(40, seed=9)):  # too many for an update
            await store.append(answered(1000 + number, text, right(text)))
        third = await learn(config, "sort", store, clock=lambda: 9.0, owner="a", force=True)
        assert third is not None
        assert "updated_from" not in json.loads((Path(third.path) / "manifest.json").read_text())
    finally:
        await store.close()


async def test_what_a_size_aims_at_is_said_beside_what_was_measured_and_decides_nothing(configured: Configured) -> None:
    config = configured()
    task, store = config.task("sort"), await filled(config, 80)
    try:
        version = await learn(config, "sort", store, clock=lambda: 1.0, owner="a")
        assert version is not None and "aims at" not in version.metrics["reason"]
        selection = await choose(config, task, store, [])
        for aim, ending in ((1e-6, "its size aims at 1e-06 ms (missed)"), (1e9, "its size aims at 1e+09 ms")):
            target = {"p95_latency_ms": aim}
            checkpoint = Checkpoint(id=version.checkpoint, path=Path(version.path), manifest={"target": target})
            found = await teaching.examine(config, task, selection, checkpoint, store)
            assert found.screening.promote
            assert found.measured["target"] == target
            assert f"p95 latency is {found.measured['p95_latency_ms']:.3g} ms, {ending}" in found.screening.reason
            assert found.screening.reason.endswith(ending)
    finally:
        await store.close()


async def test_the_base_model_is_examined_untaught_once_for_the_same_rows(
    configured: Configured, tmp_path: Path
) -> None:
    untaught = {"kind": "fruit"}

    def answer(body: dict[str, Json]) -> Json:
        return {"kind": "fruit"} if body["model"].startswith("apprentice-") else untaught

    async with serve_vllm(answer) as server:
        settings = {"base_url": server.url, "model": "base"}
        config = configured(local={"backend": "vllm", "settings": settings, "fine_tune_backend": None})
        task = config.task("sort")
        (tmp_path / "base.bin").write_bytes(b"base")
        probes: list[tuple[Json, Json]] = [({"text": "hello"}, {"kind": "fruit"})]
        folder = write_checkpoint(tmp_path, task.task, probes, base=tmp_path / "base.bin")
        checkpoint = Checkpoint(id=folder.name, path=folder, manifest={})
        store = await filled(config, 120)
        try:
            selection = await choose(config, task, store, [])
            first = (await teaching.examine(config, task, selection, checkpoint, store)).measured["untrained"]
            fruit = [row.target == {"kind": "fruit"} for row in selection.held_out]
            assert (first["n"], first["json_validity"]) == (len(fruit), 1.0)
            assert first["agreement"] == sum(fruit) / len(fruit)
            metrics: dict[str, Json] = {"examination": {"untrained": first}}
            about: dict[str, Any] = {"task": "sort", "checkpoint": "c", "path": "p", "state": "rejected"}
            await store.add_version(Version(id="", trained_on=1, created_at=1.0, metrics=metrics, **about))
            untaught["kind"] = "tool"  # were it asked again, it would be found otherwise
            again = await teaching.examine(config, task, selection, checkpoint, store)
            assert again.measured["untrained"] == first
            other = task.model_copy(update={"instructions": "Look closely."})
            asked = await teaching.examine(config, other, selection, checkpoint, store)
            assert asked.measured["untrained"]["agreement"] != first["agreement"]
        finally:
            await store.close()


async def test_a_schedule_makes_a_cycle_due_when_its_time_has_passed_and_anything_is_new(
    configured: Configured,
) -> None:
    day = 86_400.0
    config = configured(local={"schedule": "every 30d"})
    task = config.task("sort")
    store = await filled(config, 80)
    try:
        assert await learn(config, "sort", store, clock=lambda: 5.0, owner="a") is not None
        assert not await due(config, task, store, now=5.0 + 31 * day)  # nothing is new
        await store.append(answered(1000, "another plum", "fruit"))
        assert not await due(config, task, store, now=5.0 + 30 * day - 1)
        assert await due(config, task, store, now=5.0 + 30 * day)
        assert not await due(configured(), task, store, now=5.0 + 30 * day)
        assert await learn(config, "sort", store, clock=lambda: 5.0 + 30 * day, owner="a") is not None
        assert not await due(config, task, store, now=5.0 + 61 * day)
    finally:
        await store.close()


async def test_a_cycle_that_was_killed_before_its_version_was_promoted_is_run_again(
    configured: Configured,
) -> None:  # F73
    config = configured()
    store = await filled(config, 80)
    try:
        left = Version(
            id="", task="sort", checkpoint="sha256-0", path="nowhere", state="candidate", trained_on=72, created_at=1.0
        )
        await store.add_version(left.model_copy(update={"metrics": {"labels": 80}}))
        assert await due(config, config.task("sort"), store)
        made = await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert made is not None and made.state == "champion"
        assert not await due(config, config.task("sort"), store)
    finally:
        await store.close()
