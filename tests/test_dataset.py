"""`apprentice export`: what a task has recorded as files for fine-tuning elsewhere, and nothing that may not train."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from apprentice import cli, dialogues, feedback, plugins
from apprentice.config import Config, parse
from apprentice.selection import select
from apprentice.types import Answer, Decision, Record, Score, Store

from .conftest import YAML, right, texts

type Export = Callable[..., tuple[int, dict[str, Any]]]


def record(number: int, text: str) -> Record:
    """Answered by both; the local answer is wrong for every third."""
    kind = right(text)
    said = "tool" if number % 3 == 0 else kind
    return Record(
        request_id=f"r{number}",
        task="sort",
        at=1.0 + number,
        input={"text": text},
        decision=Decision(route="both", reason="audit", p=1.0),
        local=Answer(output={"kind": said}, model="student"),
        remote=Answer(output={"kind": kind}, model="gpt-4o-mini", provider="openai@127.0.0.1"),
        served="local",
        score=Score(value=float(said == kind)),
    )


async def fill(config: Config, n: int) -> None:
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    try:
        await asyncio.gather(*(store.append(record(i, text)) for i, text in enumerate(texts(n))))
        await feedback.give(config, store, "r0", "corrected", at=500.0, target={"kind": "animal"}, by="ann")
    finally:
        await store.close()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = YAML.replace("BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "apprentice.yaml").write_text(text)
    made = parse(text, tmp_path / "apprentice.yaml")
    Path(made.store.path).parent.mkdir(parents=True, exist_ok=True)
    asyncio.run(fill(made, 90))
    return made


@pytest.fixture
def export(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    def run(format: str, *, edit: Callable[[str], str] = str) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "apprentice.yaml"
        file.write_text(edit(file.read_text()))
        out = str(tmp_path / "out" / format)
        code = cli.main(["export", "sort", "--format", format, "--out", out, "--config", str(file), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_the_files_hold_what_teaching_would_learn_from_and_apart_what_it_holds_out(
    export: Export, config: Config, tmp_path: Path
) -> None:
    code, card = export("chat")
    task = config.tasks[0].task
    rows = {
        split: dialogues.read(task, (tmp_path / "out/chat" / f"{split}.jsonl").read_text(), "chat")
        for split in ("train", "test")
    }
    wanted = select((i, record(i, text)) for i, text in enumerate(texts(90)))
    assert {dialogues.input_of(row)["text"] for row in rows["train"]} == {e.input["text"] for e in wanted.training}
    assert {dialogues.input_of(row)["text"] for row in rows["test"]} == {e.input["text"] for e in wanted.held_out}
    every = [*rows["train"], *rows["test"]]
    assert [row.answer for row in every if dialogues.input_of(row)["text"] == texts(1)[0]] == [{"kind": "animal"}]
    assert (code, card["splits"]["train"]["rows"]) == (0, len(rows["train"]))


def test_the_card_says_where_the_rows_are_from_and_why_they_may_train(export: Export, tmp_path: Path) -> None:
    _, card = export("completion")
    assert card["source"] == {"remote": 89, "gold": 1}
    assert card["teacher"] == {"openai@own server: gpt-4o-mini": 89, "a person": 1}
    assert sum(card["terms"].values()) == sum(card["basis"].values()) == 90
    assert any("answers made up for tests" in basis for basis in card["basis"])
    for split, told in card["splits"].items():
        data = (tmp_path / "out/completion" / f"{split}.jsonl").read_bytes()
        assert (told["sha256"], told["bytes"]) == (sha256(data).hexdigest(), len(data))
    text = (tmp_path / "out/completion/README.md").read_text()
    for said in (card["splits"]["train"]["sha256"], "answers made up for tests", "a person", "gpt-4o-mini", '"kind"'):
        assert said in text


def test_pairs_prefer_the_right_answer_to_the_wrong_one(export: Export, config: Config, tmp_path: Path) -> None:
    _, card = export("dpo")
    text = "".join((tmp_path / "out/dpo" / f"{split}.jsonl").read_text() for split in ("train", "test"))
    rows = dialogues.read(config.tasks[0].task, text, "dpo")
    wrong = [t for n, t in enumerate(texts(90)) if n % 3 == 0 and (n == 0 or right(t) != "tool")]
    assert sorted(dialogues.input_of(row)["text"] for row in rows) == sorted(wrong)
    assert all(row.rejected == {"kind": "tool"} != row.answer for row in rows)
    assert sum(split["rows"] for split in card["splits"].values()) == len(wrong)


def without_permission(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "permission:" not in line).replace(
        "  base_url: http://127.0.0.1:9\n  allow_internal: true\n", ""
    )


def test_rows_that_may_not_train_are_left_out_and_counted(export: Export, tmp_path: Path) -> None:
    code, card = export("chat", edit=without_permission)
    assert (code, card["source"], card["teacher"]) == (0, {"gold": 1}, {"a person": 1})
    assert sum(card["refused"].values()) == 89
    assert "refused" in (tmp_path / "out/chat/README.md").read_text()


def test_where_no_row_is_left_nothing_is_written(export: Export, config: Config, tmp_path: Path) -> None:
    async def withdraw() -> None:
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        try:
            await feedback.give(config, store, "r0", "withdrawn", at=501.0)
        finally:
            await store.close()

    asyncio.run(withdraw())
    code, said = export("dpo", edit=without_permission)
    assert (code, said["error"]) == (1, "TrainingError")
    assert "90 rows because" in said["message"]
    assert not (tmp_path / "out").exists()


def test_a_task_that_is_not_configured_is_said(export: Export) -> None:
    code, said = export("chat", edit=lambda text: text.replace("name: sort", "name: other"))
    assert (code, said["error"]) == (3, "UnknownTask")


def test_a_folder_that_cannot_be_written_is_said(export: Export, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    code, said = export("chat")
    assert (code, said["error"]) == (2, "ConfigError")
