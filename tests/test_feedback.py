from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apprentice import Apprentice, feedback, plugins
from apprentice.config import Config
from apprentice.errors import InvalidInput, InvalidRequest, UnknownRequest
from apprentice.learn import due, learn
from apprentice.promotion import fingerprint, held_out
from apprentice.selection import choose, gold, select
from apprentice.testing.servers import serve_openai
from apprentice.types import Json, Store, Version

from .conftest import honest, right, texts
from .test_learn import FAST, answered, filled

Configured = Callable[..., Config]


async def corrected(config: Config, store: Store, number: int, kind: str, at: float = 1.0) -> None:
    await feedback.give(config, store, f"r{number}", "corrected", at=at, target={"kind": kind}, by="ann")


async def test_a_correction_replaces_the_target_outweighs_labels_and_is_found_in_the_version(
    configured: Configured,
) -> None:
    config = configured()
    store = await filled(config, 80)
    try:
        asked = texts(80)
        train = next(n for n, text in enumerate(asked) if not held_out(fingerprint({"text": text})))
        other = next(kind for kind in ("fruit", "tool") if kind != right(asked[train]))
        await corrected(config, store, train, other)
        selection = select(await store.records("sort", labelled=True), await gold(store, "sort"), 5.0)
        [row] = [row for row in selection.training if row.source == "gold"]
        assert (row.target, row.weight, row.request_id, row.model) == ({"kind": other}, 5.0, f"r{train}", "")
        assert len(selection.training) + len(selection.held_out) == 80  # it replaced a label, it is no further row
        version = await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert version is not None and version.metrics["gold"] == [f"r{train}"]
    finally:
        await store.close()


async def test_what_was_held_out_is_examined_against_the_persons_word(configured: Configured) -> None:
    config = configured()
    store = await filled(config, 80)
    try:
        number = next(n for n, text in enumerate(texts(80)) if held_out(fingerprint({"text": text})))
        await corrected(config, store, number, "tool")
        selection = select(await store.records("sort", labelled=True), await gold(store, "sort"))
        assert [row.target for row in selection.held_out if row.request_id == f"r{number}"] == [{"kind": "tool"}]
    finally:
        await store.close()


async def test_a_candidate_that_is_better_at_the_remotes_answers_and_worse_on_gold_is_rejected(
    configured: Configured,
) -> None:
    config = configured(text=FAST)
    task = config.task("sort")
    store = await filled(config, 80)
    try:
        first = await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert first is not None and first.state == "champion"
        # From now on the remote is wrong, always in the same way, and people correct a few of the rows held out.
        wrong = {"fruit": "animal", "animal": "tool", "tool": "fruit"}
        said = texts(400, seed=9)
        await asyncio.gather(
            *(store.append(answered(n, text, wrong[right(text)])) for n, text in enumerate(said, 1000))
        )
        held = {row.request_id for row in (await choose(config, task, store, [])).held_out}
        numbers = [number for number in range(1000, 1400) if f"r{number}" in held][:10]
        for number in numbers:
            await corrected(config, store, number, right(said[number - 1000]))
        second = await learn(config, "sort", store, clock=lambda: 6.0, owner="a", force=True)
        assert second is not None and second.state == "rejected"
        assert second.metrics["reason"].startswith("gold: worse than the champion by")
        assert second.metrics["reason"].count("worse than the champion") == 1
        assert "on 10 held-out rows" in second.metrics["reason"]
        assert second.metrics["held_out"]["candidate"] > second.metrics["held_out"]["champion"]
        examined = second.metrics["examination"]
        assert examined["gold_agreement"] < examined["champion"]["gold_agreement"]
        assert [version.state for version in await store.versions("sort")] == ["champion", "rejected"]
    finally:
        await store.close()


async def test_corrections_count_as_something_to_learn_from(configured: Configured) -> None:
    config = configured()
    store = await filled(config, 80)
    try:
        assert await learn(config, "sort", store, clock=lambda: 5.0, owner="a") is not None
        assert not await due(config, config.task("sort"), store)
        for number in range(60):
            await corrected(config, store, number, "animal")
        assert await feedback.known(store, "sort") == 140
        assert await due(config, config.task("sort"), store)
    finally:
        await store.close()


async def test_taking_back_what_a_version_learned_marks_that_version(configured: Configured) -> None:  # F103
    config = configured()
    store = await filled(config, 80)
    try:
        number = next(n for n, text in enumerate(texts(80)) if not held_out(fingerprint({"text": text})))
        await corrected(config, store, number, "tool")
        version = await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert isinstance(version, Version)
        await feedback.give(config, store, f"r{number}", "withdrawn", at=9.0)
        assert feedback.current(await store.corrections("sort")) == {}
        [event] = await store.events("sort", names=["VERSION_TAINTED"])
        assert event.evidence == {"version": version.id, "request": f"r{number}"}
        assert not await gold(store, "sort")
    finally:
        await store.close()


async def test_the_same_word_twice_is_said_once_and_the_last_word_counts(configured: Configured) -> None:  # F102
    config = configured()
    store = await filled(config, 3)
    try:
        for kind in ("tool", "tool", "fruit"):
            await corrected(config, store, 1, kind)
        said = await store.corrections("sort")
        assert [word.target for word in said] == [{"kind": "tool"}, {"kind": "fruit"}]
        assert feedback.current(said)["r1"].target == {"kind": "fruit"}
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("request_id", "action", "target", "error", "said"),
    [
        ("nobody", "corrected", {"kind": "tool"}, UnknownRequest, "no request 'nobody'"),
        ("r0", "corrected", {"kind": "planet"}, InvalidInput, "kind"),
        ("r0", "corrected", {"kin": "tool"}, InvalidInput, "kin"),
        ("r0", "corrected", None, InvalidInput, "corrected"),
        ("r0", "corrected", {"kind": float("nan")}, InvalidInput, "not JSON"),
        ("r0", "corrected", {"kind": "x" * 2_000_000}, InvalidInput, "1,000,000 are allowed"),
        ("r0", "withdrawn", None, InvalidRequest, "nobody has corrected"),
        ("r1", "approved", None, InvalidRequest, "nothing to approve"),
    ],
)
async def test_a_wrong_word_names_the_field_and_changes_nothing(  # F102
    configured: Configured, request_id: str, action: Any, target: Json, error: type[Exception], said: str
) -> None:
    config = configured()
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    try:
        await store.append(answered(0, "a pear", "fruit"))
        await store.append(answered(1, "an otter", None))
        with pytest.raises(error, match=said):
            await feedback.give(config, store, request_id, action, at=1.0, target=target)
        assert await store.corrections("sort") == []
    finally:
        await store.close()


async def test_a_long_comment_is_refused(configured: Configured) -> None:
    config = configured()
    store = await filled(config, 1)
    try:
        with pytest.raises(InvalidInput, match="comment"):
            await feedback.give(config, store, "r0", "approved", at=1.0, comment="x" * 10_001)
    finally:
        await store.close()


async def test_an_approval_makes_gold_of_what_was_served(configured: Configured) -> None:
    async with serve_openai(honest) as server, Apprentice(configured(server.url)) as app:
        result = await app.arun("sort", {"text": "a pear"})
        said = await app.afeedback(result.request_id, by="ann")
        assert (said.action, said.target, said.by) == ("approved", {"kind": "fruit"}, "ann")
        assert (await app.afeedback(result.request_id, withdrawn=True)).action == "withdrawn"


def test_synchronous_code_and_the_command_line_correct_a_request(configured: Configured, tmp_path: Path) -> None:
    from apprentice import cli

    async def answer() -> str:
        async with serve_openai(honest) as server, Apprentice(configured(server.url)) as app:
            return (await app.arun("sort", {"text": "a pear"})).request_id

    request = asyncio.run(answer())
    config = configured()
    with Apprentice(config) as app:
        assert app.feedback(request, corrected={"kind": "tool"}).action == "corrected"
    from .conftest import YAML

    file = tmp_path / "apprentice.yaml"
    file.write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))
    assert cli.main(["feedback", request, "--approve", "--by", "bob", "--config", str(file)]) == 0
    assert cli.main(["feedback", request, "--corrected", json.dumps({"kind": "ox"}), "--config", str(file)]) == 3
