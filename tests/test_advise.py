"""What to do when a target is missed: curves with known parameters, and the whole on recorded answers."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import cli, plugins
from apprentice.advise import Advice, advise, fitted
from apprentice.config import Config
from apprentice.errors import TrainingError, UnknownTask
from apprentice.types import Answer, Decision, Json, Record, Store

from .conftest import YAML, right, texts

Configured = Callable[..., Config]
FAST = YAML.replace("tfidf", "wordllama")
SIZES = (100, 200, 300, 400)
KINDS = ["fruit", "animal", "tool"]


async def filled(config: Config, rows: list[tuple[str, str]], provider: str | None = None) -> Store:
    """A store with the remote's answers to these texts, one a minute, for 50 micro-dollars each."""
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    for number, (text, kind) in enumerate(rows):
        answer = Answer(output={"kind": kind}, model="gpt", cost=50, provider=provider or config.remote.teacher)
        decision = Decision(route="remote", reason="no_local_model", p=0.0)
        record = Record(
            request_id=f"r{number}",
            task="sort",
            at=1e6 + 60 * number,
            input={"text": text},
            decision=decision,
            remote=answer,
            served="remote",
        )
        await store.append(record)
    return store


def known(count: int) -> list[tuple[str, str]]:
    return [(text, right(text)) for text in texts(count)]


def riddles(count: int) -> list[tuple[str, str]]:
    """Half of them are answered by chance: nobody can learn more than two thirds."""
    dice = Random(1)
    return [(text, right(text) if number % 2 else dice.choice(KINDS)) for number, text in enumerate(texts(count))]


async def advised(config: Config, rows: list[tuple[str, str]], **asked: Any) -> Advice:
    store = await filled(config, rows)
    try:
        return await advise(config, "sort", store, now=2e6, **{"limit": 0.0} | asked)
    finally:
        await store.close()


# --- curves -----------------------------------------------------------------------------------------------------------


@given(st.floats(0.5, 1.0), st.floats(0.1, 3.0), st.integers(2, 40))
def test_a_curve_without_noise_is_found_again(a: float, b: float, c: int) -> None:
    means = [a - b / math.pow(n, c / 20) for n in SIZES]
    found = fitted(SIZES, means, 0.01)
    for n, mean in zip(SIZES, means, strict=True):
        assert found.at(n) == pytest.approx(mean, abs=1e-3)
    assert found.at(800) == pytest.approx(a - b / math.pow(800, c / 20), abs=0.02)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0.001, 0.1))
def test_no_curve_falls_or_ends_above_one(means: list[float], error: float) -> None:
    found = fitted(SIZES, means, error)
    assert found.a <= 1 + 1e-9
    assert found.b >= 0
    assert found.at(100) <= found.at(1000) + 1e-12


@given(st.floats(0.5, 0.99), st.floats(0.01, 0.4))
def test_the_examples_that_it_needs_reach_the_target_and_one_less_does_not(a: float, below: float) -> None:
    found = fitted(SIZES, [a - 2 / math.sqrt(n) for n in SIZES], 0.01)
    needed = found.needs(found.a - below)
    assert found.at(needed) == pytest.approx(found.a - below, abs=1e-6)
    assert found.needs(found.a) == found.needs(1.0) == math.inf


def test_one_point_far_off_moves_the_curve_less_than_its_distance_does() -> None:
    clean = [0.9 - 3 / math.sqrt(n) for n in (100, 200, 300, 400, 500, 600)]
    off = [mean - (0.2 if place == 2 else 0.0) for place, mean in enumerate(clean)]
    sizes = (100, 200, 300, 400, 500, 600)
    assert abs(fitted(sizes, off, 0.01).at(600) - clean[-1]) < 0.5 * abs(fitted(sizes, off, 10.0).at(600) - clean[-1])


# --- the whole --------------------------------------------------------------------------------------------------------


async def test_below_a_hundred_answers_it_says_that_they_are_too_few(configured: Configured) -> None:
    found = await advised(configured(text=FAST), known(99))
    assert (found.curve, found.points, found.majority) == (None, [], None)
    assert "99 answers are recorded; below 100 a learning curve says nothing" in found.why
    assert [rung.remedy for rung in found.ladder] == ["more data", "stay with the remote"]
    assert found.ladder[0].state == "unknown"
    assert found.ladder[0].examples == 1
    assert found.ladder[0].cost == 50
    assert found.ladder[0].days == pytest.approx(1 / 1440, rel=0.2, abs=0.01)


async def test_what_is_enough_is_said_with_what_it_would_come_to(configured: Configured) -> None:
    found = await advised(configured(text=FAST), known(160))
    assert found.target == 0.8
    assert (found.take, found.ladder[0].note) == ("more data", "there is enough")
    shown = [point.examples for point in found.points]
    assert shown == sorted(shown)
    assert shown[-1] == pytest.approx(4 * shown[0], abs=3)
    assert all(p.agreement.lower <= p.agreement.value <= p.agreement.upper for p in found.points)
    assert found.curve is not None
    assert found.curve.expected.lower <= found.curve.expected.value <= found.curve.asymptote.value + 1e-9
    assert found.majority is not None
    assert 0.2 < found.majority < 0.6 < found.points[-1].agreement.value


async def test_a_target_beyond_what_can_be_known_leaves_the_remote(configured: Configured) -> None:
    found = await advised(configured(text=FAST), riddles(180), target=0.95)
    assert found.curve is not None
    assert found.curve.expected.value < 0.85
    assert found.ladder[0].state == "misses"
    assert found.curve.needed is None
    assert found.take == "stay with the remote"
    assert "nothing that was measured reaches it" in found.why
    assert "another encoder" in [rung.remedy for rung in found.ladder]


async def test_a_copy_of_what_was_taught_is_no_question(configured: Configured) -> None:
    """Answers by chance cannot be learned; whoever asks for a copy of a taught row would call that knowledge."""
    dice = Random(5)
    words = [f"w{number}" for number in range(400)]
    rows = []
    for kind in dice.choices(KINDS, k=40):
        said = dice.sample(words, 30)
        rows += [(" ".join([*said, word]), kind) for word in dice.sample(words, 4)]
    found = await advised(configured(text=FAST), dice.sample(rows, len(rows)))
    assert found.points[-1].agreement.value < 0.45


async def test_gates_state_the_target(configured: Configured) -> None:
    text = FAST.replace(
        "    evaluator: exact_match\n", '    evaluator: exact_match\n    gates: ["agreement >= 0.97"]\n'
    )
    assert (await advised(configured(text=text), known(20))).target == 0.97


async def test_nothing_is_spent_and_nothing_is_written(configured: Configured) -> None:
    config = configured(text=FAST)
    store = await filled(config, known(120))
    try:
        before = [await store.count("sort"), await store.events(), await store.versions("sort"), await store.spending()]
        await advise(config, "sort", store, now=2e6, limit=0.0)
        after = [await store.count("sort"), await store.events(), await store.versions("sort"), await store.spending()]
    finally:
        await store.close()
    assert before == after
    assert not config.local.model_dir.exists()


async def test_other_encoders_and_an_election_are_measured_where_time_allows(configured: Configured) -> None:
    found = await advised(configured(text=FAST), riddles(100), limit=math.inf, target=0.99)
    by_name = {rung.remedy: rung for rung in found.ladder}
    assert list(by_name) == ["more data", "another encoder", "full fine-tuning", "an ensemble", "stay with the remote"]
    other, together = by_name["another encoder"], by_name["an ensemble"]
    assert other.expected is not None and together.expected is not None
    assert 0.3 < other.expected.value < 0.9
    assert "on the same rows" in other.note
    assert "members: [{settings: {encoder: " in together.change
    assert by_name["full fine-tuning"].state == "unknown"


async def test_a_task_that_does_not_exist_and_rows_that_may_not_train_are_errors(configured: Configured) -> None:
    config = configured(text=FAST)
    with pytest.raises(UnknownTask):
        await advise(config, "sorts", await filled(config, []), now=2e6)
    closed = config.model_copy(update={"remote": config.remote.model_copy(update={"permission": None})})
    store = await filled(closed, known(120), "openai@")
    try:
        with pytest.raises(TrainingError, match="no row that may train"):
            await advise(closed, "sort", store, now=2e6)
    finally:
        await store.close()


async def test_a_trainer_that_costs_money_is_not_asked(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    paid = {"fine_tune_backend": "openai", "fine_tune_settings": {"model": "gpt-4o-mini-2024-07-18"}}
    with pytest.raises(TrainingError, match="costs money"):
        await advised(configured(text=FAST, local=paid), known(120))


def test_the_command_prints_a_ladder_and_json(
    configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(text=FAST)
    file = tmp_path / "apprentice.yaml"
    file.write_text(FAST.replace("BASE_URL", "http://127.0.0.1:9"))
    asyncio.run((asyncio.run(filled(config, known(110)))).close())
    asked = ["advise", "sort", "--config", str(file), "--seconds", "0.1"]
    assert cli.main(asked) == 0
    said = capsys.readouterr().out
    assert "sort: 110 answers are recorded" in said
    assert "1. more data: " in said
    assert "\ntake: " in said
    assert cli.main([*asked, "--json", "--target", "0.6"]) == 0
    found: Json = json.loads(capsys.readouterr().out)
    assert (found["task"], found["target"]) == ("sort", 0.6)
    assert found["ladder"][-1]["remedy"] == "stay with the remote"
