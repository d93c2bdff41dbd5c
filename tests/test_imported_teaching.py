"""What was imported teaches: by the terms of whoever answered, after what was recorded here, and without a cold start."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from apprentice import feedback, imports
from apprentice.config import Config
from apprentice.importers import Imported
from apprentice.imports import Settings, Tally
from apprentice.learn import due, learn
from apprentice.report import report
from apprentice.selection import select
from apprentice.types import Example

from .conftest import right, texts
from .test_imports import AT, TODAY, brought, log, one, stored
from .test_learn import answered

type Configured = Callable[..., Config]

DEEPSEEK: dict[str, Any] = {"model": "deepseek-chat", "provider": "openai@api.deepseek.com", "at": AT}
CLAUDE: dict[str, Any] = {"model": "claude-sonnet-4-5", "provider": "anthropic@", "at": AT}


@pytest.mark.parametrize(
    ("told", "gold", "may_train", "reason"),
    [
        (DEEPSEEK, False, True, ""),
        (DEEPSEEK | {"model": ""}, False, False, "nobody recorded by which model it was answered"),
        (DEEPSEEK | {"at": 0.0}, False, False, "nobody recorded when it was answered"),
        (DEEPSEEK | {"provider": "?@?"}, False, False, "the terms of the service at ? are not known"),
        (CLAUDE, False, False, "forbidden by Anthropic"),
        ({"model": "qwen3-32b", "provider": "vllm@", "at": AT}, False, True, ""),
        ({"model": "gpt-4o-mini", "provider": "openai@127.0.0.1", "at": AT}, False, True, ""),  # by its permission
        ({}, True, True, ""),
        (CLAUDE, True, False, "forbidden by Anthropic"),
    ],
)
def test_the_licence_gate_judges_each_row_by_who_answered_it_where(
    configured: Configured, told: dict[str, Any], gold: bool, may_train: bool, reason: str
) -> None:
    config = configured()
    tally = Tally(config, config.task("sort"), (), TODAY)
    tally.add(one(config.task("sort"), "a pear", "fruit", Settings(gold=gold), **told))
    [line] = tally.summary().lines
    assert (line.rows, line.may_train) == (1, may_train)
    assert reason in line.reason


async def test_a_task_with_a_log_has_a_version_before_its_first_request(configured: Configured, tmp_path: Path) -> None:
    config = configured()
    async with stored(config) as store:
        assert not await due(config, config.task("sort"), store)
    assert (await brought(config, log(tmp_path / "a.jsonl", 90))).may_train == 90
    async with stored(config) as store:
        assert await feedback.known(store, "sort") == 90
        version = await learn(config, "sort", store, clock=lambda: AT + 1e7, owner="a")
        assert version is not None
        assert (version.state, version.metrics["labels"]) == ("champion", 90)
        assert version.trained_on + version.metrics["held_out"]["n"] == 90
        assert len(version.metrics["confidences"]) == 90  # thresholds need inputs, and no request was made yet
        assert version.metrics["licence"]["by"][0]["model"] == "gpt-4o-mini"
        assert not await due(config, config.task("sort"), store)
        [told] = await report(config, store)
        assert (told.requests, told.cost, told.spending) == (0, 0, [])


async def test_answers_of_a_closed_provider_teach_nothing(configured: Configured, tmp_path: Path) -> None:
    config = configured()
    path = log(tmp_path / "a.jsonl", 60, custom_llm_provider="anthropic", model="claude-sonnet-4-5", api_base="")
    assert (await brought(config, path)).may_train == 0
    open = log(tmp_path / "b.jsonl", 60, seed=3, custom_llm_provider="deepseek", model="deepseek-chat", api_base="")
    assert (await brought(config, open)).may_train == 60
    async with stored(config) as store:
        version = await learn(config, "sort", store, clock=lambda: AT + 1e7, owner="a")
        assert version is not None
        assert {group["model"] for group in version.metrics["licence"]["by"]} == {"deepseek-chat"}
        assert sum(version.metrics["licence"]["refused"].values()) > 0


def example(text: str, kind: str, at: float, *, gold: bool = False) -> Example:
    told: dict[str, Any] = {"source": "gold"} if gold else {"source": "remote", "model": "gpt"}
    return Example(input={"text": text}, target={"kind": kind}, request_id=f"import-{text}-{kind}", at=at, **told)


def test_what_was_recorded_here_replaces_what_was_imported_and_people_replace_models() -> None:
    imported = [
        example("new", "later", 9.0),
        example("new", "earlier", 1.0),
        example("known", "imported", 900.0),
        example("said", "model", 900.0),
        example("said", "person", 1.0, gold=True),
    ]
    records = [(1, answered(1, "known", "recorded")), (2, answered(2, "said", "recorded"))]
    found = select(records, (), 3.0, imported=imported)
    rows = {row.input["text"]: row for row in (*found.training, *found.held_out)}
    assert {text: row.target["kind"] for text, row in rows.items()} == {
        "new": "later",
        "known": "recorded",
        "said": "person",
    }
    assert rows["said"].weight == 3.0
    assert found.labels == 7


def test_rows_are_held_out_alike_whether_they_were_imported_or_recorded() -> None:
    imported = [example(text, right(text), 1.0 + number) for number, text in enumerate(texts(200))]
    records = [(number, answered(number, text, right(text))) for number, text in enumerate(texts(200))]
    of_log, of_records = select([], imported=imported), select(records)
    assert {row.input["text"] for row in of_log.held_out} == {row.input["text"] for row in of_records.held_out}


async def test_a_dry_run_tries_a_student_on_answers_of_whom_nobody_here_asks(configured: Configured) -> None:
    config = configured(local={"fine_tune_settings": {"encoder": "tfidf", "folds": 2}})
    task = config.task("sort")
    tally = Tally(config, task, (), TODAY)
    rows = [Imported(input=text, output=right(text), **DEEPSEEK | {"at": AT + n}) for n, text in enumerate(texts(60))]
    for found in imports.examples(task, rows, Settings()):
        tally.add(found)
    told = await imports.forecast(config, task, tally.sample(), tally.summary(), today=date(2026, 11, 21))
    assert told.n == 60 and told.agreement is not None and told.agreement > 0.8
