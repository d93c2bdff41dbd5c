"""The demo looks at nothing that it did not pay for, and says what it did in the words that were agreed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apprentice import demo, plugins
from apprentice.errors import ConfigError
from apprentice.types import Record, Store

FEW = {"balance_not_updated_after_bank_transfer", "change_pin", "declined_card_payment", "exchange_rate",
       "card_acceptance", "country_support", "atm_support", "receiving_money"}  # fmt: skip
"""Intents that a student knows after the first version, of the short form."""


async def played(rows: list[demo.Row], folder: Path) -> list[Record]:
    config = await demo.play("banking77", rows, seed=0, folder=folder)
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    try:
        return [record for _, record in await store.records("banking77")]
    finally:
        await store.close()


def trace(records: list[Record]) -> list[object]:
    """Everything that depends on what was learned."""
    return [
        (r.decision, r.version, r.local and (r.local.output, r.local.confidence), r.served, r.cost) for r in records
    ]


@pytest.mark.parametrize("requests", [400, pytest.param(700, marks=pytest.mark.slow)], ids=["short", "full"])
async def test_nothing_looks_at_gold_labels_or_at_answers_that_were_not_paid_for(tmp_path: Path, requests: int) -> None:
    """Played again with every gold label wrong and every unpaid answer replaced, everything happens as before."""
    rows = [row for row in demo.recording("banking77", None) if requests == 700 or row.teacher in FEW][:requests]
    first = await played(rows, tmp_path / "first")
    paid = [record.remote is not None for record in first]
    assert sum(not was for was in paid) > 0, "no request was answered without the remote: the test would show nothing"
    poisoned = [
        row._replace(gold="poison", teacher=row.teacher if was else "poison")
        for row, was in zip(rows, paid, strict=True)
    ]
    second = await played(poisoned, tmp_path / "second")
    assert trace(second) == trace(first)
    assert not any("poison" in record.model_dump_json() for record in second)


def test_json_is_one_object_with_the_agreed_keys() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apprentice.cli", "demo", "--json", "--requests", "40", "--seed", "7"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert list(found) == [
        "task", "requests", "remote_calls", "remote_share", "remote_share_last_quarter", "served_agreement",
        "served_accuracy", "remote_accuracy", "always_local_accuracy", "spend_usd", "all_remote_usd", "phases", "versions",
        "wall_s",
    ]  # fmt: skip
    assert (found["requests"], found["remote_calls"], found["remote_share"]) == (40, 40, 1.0)
    assert found["phases"] == [{"phase": "cold_start", "from_request": 1}]
    assert found["spend_usd"] == pytest.approx(found["all_remote_usd"])


def test_a_recording_of_ones_own_is_found_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mail.jsonl").write_text('{"text": "a", "teacher": "x"}\n{"text": "b", "teacher": null}\n')
    assert demo.recording("mail", tmp_path) == [demo.Row("a", "x", None)]
    with pytest.raises(ConfigError, match="letters"):
        demo.recording("letters", tmp_path)
    (tmp_path / "empty.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match="teacher"):
        demo.recording("empty", tmp_path)


def test_the_shipped_recording_is_whole() -> None:
    rows = demo.recording("banking77", None)
    assert len(rows) == 4081
    assert len({row.gold for row in rows}) == 77
    assert round(sum(row.teacher == row.gold for row in rows) / len(rows), 3) == 0.826
