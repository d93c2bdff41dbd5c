"""A recording answers what was recorded, and nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError, ModelRejected
from apprentice.testing.models import TASK
from apprentice.types import Answer, Json

ROWS: list[dict[str, Json]] = [
    {"text": "a", "teacher": None},
    {"text": "a", "teacher": "first"},
    {"text": "a", "teacher": "second"},
    {"text": "b", "teacher": {"label": "whole"}},
    {"text": {"y": 1, "x": [2]}, "teacher": 7},
    {"text": "unread", "teacher": None},
]


async def said(input: Json, **settings: Any) -> Answer:
    answer: Answer = await plugins.build("models", "recorded", **({"rows": ROWS} | settings)).answer(TASK, input)
    return answer


async def test_an_input_is_known_by_its_text_or_by_its_json() -> None:
    assert (await said("a")).output == "first"
    assert (await said({"text": "a"})).output == "first"
    assert (await said({"text": "a", "more": 1})).output == "first"
    assert (await said({"x": [2], "y": 1})).output == 7
    assert (await said({"text": {"x": [2], "y": 1}})).output == 7


async def test_an_answer_may_be_put_into_a_field() -> None:
    assert (await said("a", answer_field="label")).output == {"label": "first"}


async def test_an_unknown_input_is_rejected_and_costs_nothing() -> None:
    for unknown in ("z", {"text": "z"}, {"other": "a"}, 5):
        with pytest.raises(ModelRejected, match="not in the recording") as caught:
            await said(unknown)
        assert (caught.value.outcome, caught.value.retryable) == ("rejected", False)


async def test_a_recorded_answer_costs_nothing() -> None:
    usage = (await said("a")).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (0, 0)


async def test_an_answer_that_could_not_be_read_has_no_output() -> None:
    answer = await said("unread")
    assert answer.output is None
    assert answer.problem


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
async def test_a_recording_is_read_from_a_file(name: str, tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    model = plugins.build("models", "recorded", path=str(tmp_path / name))
    assert (await model.answer(TASK, "a")).output == "first"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "either"),
        ({"path": "x", "rows": []}, "either"),
        ({"path": "/nowhere/at/all.jsonl"}, "cannot be read"),
        ({"rows": [{"text": "a"}]}, "line 1: there is no field 'teacher'"),
        ({"rows": [{"text": "a", "teacher": 1}], "input_key": "question"}, "line 1: there is no field 'question'"),
        ({"row": []}, "did you mean 'rows'"),
    ],
)
def test_a_recording_that_cannot_be_used_is_a_configuration_error(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        plugins.build("models", "recorded", **settings)


@pytest.mark.parametrize("content", [b"{", b"\x1f\x8b\x08garbage", b"\xff\xfe", b"5\n"])
def test_a_file_that_is_no_recording_is_a_configuration_error(content: bytes, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError):
            plugins.build("models", "recorded", path=str(tmp_path / name))
