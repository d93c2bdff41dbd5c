"""A version that is tried out beside the champion, through a real store and engine; the local models are told what to say."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from apprentice import cli, lineage, plugins
from apprentice.confidence import State
from apprentice.config import Config
from apprentice.engine import Apprentice
from apprentice.errors import ConfigError
from apprentice.learn import due, learn
from apprentice.testing.servers import serve_openai
from apprentice.types import Answer, Event, Json, Model, Result, Store, Task, Version
from apprentice.worker import once

from .conftest import honest, right, texts
from .test_learn import FAST, answered, quick

Configured = Callable[..., Config]


@pytest.fixture
def configured(configured: Configured) -> Configured:
    return quick(configured)


class Told:
    """A local model that is right about every request, or wrong about those whose number ends in one of these digits."""

    def __init__(self, wrong: str = "", fails: bool = False) -> None:
        self.wrong, self.fails, self.asked = tuple(wrong), fails, 0

    async def answer(self, task: Task, input: Json) -> Answer:
        self.asked += 1
        if self.fails:
            raise RuntimeError("exploded")
        kind = right(input["text"])
        if self.wrong and input["text"].endswith(self.wrong):
            kind = "tool" if kind == "fruit" else "fruit"
        return Answer(output={"kind": kind}, confidence=0.9)

    async def close(self) -> None:
        return None


async def opened(config: Config) -> Store:
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    return store


async def versions(config: Config, n: int = 2) -> None:
    """Versions "v1" to "vN", with "v1" the champion."""
    store = await opened(config)
    for number in range(1, n + 1):
        made = Version(
            id="",
            task="sort",
            checkpoint=f"c{number}",
            path=f"/{number}",
            state="candidate",
            trained_on=100,
            created_at=1.0,
            metrics={"confidences": [i / 100 for i in range(100)], "labels": 10**6},
        )
        await store.add_version(made)
    await store.promote("sort", "v1", 1.0)
    await store.close()


def told(app: Apprentice, models: dict[str, Model]) -> None:
    """Have these models answer for the versions of that name."""
    app._tasks["sort"].shelf._build = lambda version: models[version.id]


async def tried(config: Config, models: dict[str, Model], n: int) -> tuple[Apprentice, list[str]]:
    """The engine, closed, after `n` requests with "v2" as canary; and the names of what happened to it."""
    await versions(config)
    async with Apprentice(config, seed=1) as app:
        told(app, models)
        await app._store.promote("sort", "v2", 2.0, state="canary")
        app._tasks["sort"].champion = None  # loaded before the models were told
        for text in texts(n):
            await app.arun("sort", {"text": text})
        events = await app._store.events("sort", limit=1000)
        return app, [event.name for event in events if event.name.startswith("CANARY")]


async def folded(config: Config) -> State:
    """The live state that another process arrives at."""
    async with Apprentice(config, seed=2) as other:
        live = other._tasks["sort"]
        return live.state


async def test_a_canary_that_is_better_is_stepped_up_and_becomes_champion_by_itself(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, local={"learn": "off"})
        app, said = await tried(config, {"v1": Told(wrong="037"), "v2": Told()}, 120)
    assert said == ["CANARY_STEP", "CANARY_STEP", "CANARY_PROMOTED"]
    live = app._tasks["sort"]
    assert live.state == await folded(config)
    assert live.champion is not None and live.champion.id == "v2"
    assert live.ramp.trial is None and live.standing.canary is None
    store = await opened(config)
    found = await lineage.read(store, "sort")
    records = [record for _, record in await store.records("sort")]
    await store.close()
    assert [(made.version, made.state) for made in found.history] == [
        ("v1", "champion"),
        ("v2", "canary"),
        ("v2", "champion"),
    ]
    assert found.history[-1].by == lineage.BY_ITSELF and "audits beside the champion" in found.history[-1].why
    pairs = [record for record in records if record.rival is not None]
    assert {record.rival_version for record in pairs} == {"v2"} and {record.version for record in pairs} == {"v1"}
    assert all(record.decision.audit for record in pairs)


async def test_a_canary_that_breaks_is_gone_in_one_step_and_nobody_was_served_worse(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, local={"learn": "off"})
        broken = Told(fails=True)
        _, said = await tried(config, {"v1": Told(), "v2": broken}, 40)
    assert said == ["CANARY_ABORTED"]
    store = await opened(config)
    records = [record for _, record in await store.records("sort")]
    states = {version.id: version.state for version in await store.versions("sort")}
    await store.close()
    assert states == {"v1": "champion", "v2": "rejected"}
    assert all(record.served is not None and record.error is None for record in records if record.rival is not None)
    assert broken.asked < 20  # and not once after the verdict
    assert records[-1].rival is None


async def test_its_share_is_drawn_by_a_coin_of_its_own_and_what_it_answers_is_no_evidence(
    configured: Configured,
) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, local={"learn": "off"}, sampling={"min_floor": 0.5, "repeat_share": 0})
        await versions(config)
        models: dict[str, Model] = {"v1": Told(), "v2": Told()}
        async with Apprentice(config, seed=1) as app:
            told(app, models)
            live = app._tasks["sort"]
            live.champion = None
            more = iter(texts(2000))
            for _ in range(150):
                await app.arun("sort", {"text": next(more)})
            assert live.standing.phase == "steady"
            await app._store.promote("sort", "v2", 2.0, state="canary")
            await app.arun("sort", {"text": next(more)})
            assert live.ramp.trial is not None
            seen: list[tuple[float, Result]] = []
            while live.ramp.trial is not None and len(seen) < 1000:
                share, before = live.standing.canary_share, live.state.audits
                result = await app.arun("sort", {"text": next(more)})
                seen.append((share, result))
                if result.decision.reason == "canary":
                    assert result.version == "v2" and live.state.audits == before
            served = [result for _, result in seen if result.decision.reason == "canary"]
            alone = [result for _, result in seen if result.source == "local"]
            assert 0 < len(served) < len(alone)
            assert [share for share, _ in seen] == sorted(share for share, _ in seen)
            assert {0.05, 0.25, 0.5} <= {share for share, _ in seen}


async def test_a_restart_makes_the_trial_again_from_the_records(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, local={"learn": "off"})
        app, _ = await tried(config, {"v1": Told(wrong="03"), "v2": Told(wrong="12")}, 25)
        trial = app._tasks["sort"].ramp.trial
        assert trial is not None and trial.audits > 10 and trial.verdict is None
        store = await opened(config)
        assert (await lineage.ramp(store, "sort")).trial == trial
        task = config.task("sort")
        assert not await due(config, task, store)  # not while one is tried out
        await store.promote("sort", "v2", 3.0, state="rejected")
        await store.close()


async def test_a_person_promotes_rolls_back_and_tries_out_and_the_history_says_who(configured: Configured) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, local={"learn": "off"})
        async with Apprentice(config, seed=1) as app:
            for text in texts(60):
                await app.arun("sort", {"text": text})
            first = await once(config, "sort", force=True)
            for text in texts(80, seed=3):
                await app.arun("sort", {"text": text})
            second = await once(config, "sort", force=True)
            assert first is not None and second is not None and second.state == "champion"
            result = await app.arun("sort", {"text": "a pear"})
            back = await app.arollback("sort", by="ann", why="a feeling")
            assert back.id == "v1" and app._tasks["sort"].shelf.serving is not None
            assert app._tasks["sort"].shelf.serving.version.id == "v1"
            assert (await app.apromote("sort", "v2", by="bob")).state == "champion"
            assert [version.state for version in await app.aversions("sort")] == ["retired", "champion"]
            assert result.request_id
            with pytest.raises(ConfigError, match="no version 'v9'"):
                await app.apromote("sort", "v9")
            shutil.rmtree(Path(first.path))
            with pytest.raises(ConfigError, match="can no longer be loaded"):  # F75
                await app.arollback("sort")
            assert app._tasks["sort"].shelf.serving.version.id == "v2"
            history = [(m.version, m.state, m.by) for m in await app._store.promotions("sort")]
            assert history[-2:] == [("v1", "champion", "ann"), ("v2", "champion", "bob")]
            assert len(history) == 4  # what was refused is no part of it
            names = [event.name for event in await app._store.events("sort", limit=1000)]
            assert names.count("ROLLED_BACK") == 2


async def test_the_command_line_lists_versions_and_changes_what_serves(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "apprentice.yaml").write_text(FAST.replace("BASE_URL", "http://127.0.0.1:9"))
    config = configured()
    store = await opened(config)
    for number, text in enumerate(texts(60)):
        await store.append(answered(number, text, right(text)))
    await learn(config, "sort", store, clock=lambda: 1.0, owner="a", force=True)
    await learn(config, "sort", store, clock=lambda: 2.0, owner="a", force=True)
    await store.add_event(Event(name="VERSION_TAINTED", task="sort", at=1.0, message="", evidence={"version": "v1"}))
    await store.close()

    async def run(*words: str) -> tuple[int, str]:
        code = await asyncio.to_thread(cli.main, words)
        said = capsys.readouterr()
        return code, said.out + said.err

    assert await run("ramp", "sort") == (
        2,
        "apprentice: ramp takes a version, or --abort\n  apprentice ramp classify v3\n",
    )
    assert await run("rollback", "sort", "--by", "ann", "--why", "odd") == (0, "sort: v1 is champion\n")
    assert await run("ramp", "sort", "v2") == (0, "sort: v2 is canary\n")
    assert (await run("ramp", "sort", "v1"))[0] == 2
    code, said = await run("versions", "sort", "--json")
    found = json.loads(said)
    assert (code, found["trial"]["share"]) == (0, 0.05)
    assert [(v["id"], v["state"], v["tainted"]) for v in found["versions"]] == [
        ("v1", "champion", True),
        ("v2", "canary", False),
    ]
    assert await run("ramp", "sort", "--abort") == (0, "sort: v2 is rejected\n")
    assert (await run("ramp", "sort", "--abort"))[0] == 2
    assert await run("promote", "sort", "v2") == (0, "sort: v2 is champion\n")
    shutil.rmtree(config.local.model_dir)
    code, said = await run("rollback", "sort")
    assert code == 2 and "can no longer be loaded" in said
    _, said = await run("versions", "sort")
    assert "TAINTED" in said and "files are gone" in said and "v1 champion by ann: odd" in said
    assert said.count("v2 champion") == 2  # the two times that it became it
