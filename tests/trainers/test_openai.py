"""OpenAI's fine-tuning: one job for one dataset whatever gets lost on the way, and money by the provider's count."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from apprentice import dialogues, plugins, weights
from apprentice.errors import ConfigError, PriceUnknown, TrainingError
from apprentice.testing.servers import serve_openai
from apprentice.testing.trainers import TASK, examples
from apprentice.types import Json, Task

from .services import serving, trainer


def rows_of(folder: Path) -> list[dict[str, Json]]:
    return [json.loads(path.read_text()) for path in sorted((folder / ".jobs").glob("*.json"))]


def test_the_checkpoint_refers_to_the_model_that_the_provider_keeps(tmp_path: Path) -> None:
    with serving("openai", looks=4) as service:
        made = trainer("openai", service).train(TASK, examples(), into=tmp_path, seed=3, licence={"admitted": 72})
        [job] = service.jobs
        assert (made.manifest["kind"], made.manifest["provider"]) == ("reference", "openai")
        assert made.manifest["model"] == f"ft:gpt-4.1-mini-2025-04-14:tests:sort:{job.id.removeprefix('ftjob-')}"
        assert (made.manifest["licence"], made.manifest["examples"]) == ({"admitted": 72}, 72)
        assert made.manifest["cost"] == math.ceil(job.tokens * 3) == service.bill
        assert made.id == weights.digest(made.path)
        assert json.loads((made.path / "manifest.json").read_text()) == made.manifest
        assert (job.asked["seed"], job.epochs, job.asked["suffix"]) == (3, 3, "sort")


async def test_it_is_taught_the_very_messages_that_it_will_be_asked(tmp_path: Path) -> None:
    for output in (TASK.output_schema, {"type": "integer"}, {"$ref": "#/$defs/T", "$defs": {"T": {"type": "object"}}}):
        shown = (
            {
                "input": {"text": "ü"},
                "output": {"kind": "tool"} if "type" not in output or output["type"] == "object" else 1,
            },
        )
        task = TASK.model_copy(update={"output_schema": output, "instructions": "Be brief.", "examples": shown})
        async with serve_openai([shown[0]["output"]]) as server:
            model = plugins.build("models", "openai", model="m", base_url=server.url, allow_internal=True)
            await model.answer(task, {"text": "what?"})
            await model.close()
            assert server.requests[0].body["messages"] == dialogues.prompt(task, {"text": "what?"})


def test_the_same_examples_are_not_paid_for_twice(tmp_path: Path) -> None:
    with serving("openai") as service:
        first = trainer("openai", service).train(TASK, examples(), into=tmp_path, seed=0)
        asked = len(service.asked)
        again = trainer("openai", service)
        assert again.quote(TASK, examples()[::-1], into=tmp_path, seed=0) is None
        assert again.train(TASK, examples()[::-1], into=tmp_path, seed=0) == first
        assert len(service.asked) == asked
        lost_folder = trainer("openai", service).train(TASK, examples(), into=tmp_path / "other", seed=0)
        assert (lost_folder.id, service.creations, service.posts("/files")) == (first.id, 1, 1)


@pytest.mark.parametrize("lost", [{"/files": 1}, {"/fine_tuning/jobs": 1}, {"/files": 2, "/fine_tuning/jobs": 1}])
def test_what_was_made_although_its_answer_was_lost_is_found_again(tmp_path: Path, lost: dict[str, int]) -> None:  # F63
    with serving("openai", lost=Counter(lost)) as service:
        made = trainer("openai", service).train(TASK, examples(), into=tmp_path, seed=0)
        assert (len(service.jobs), service.creations, len(service.files)) == (1, 1, 1)
        assert made.manifest["cost"] == service.bill


def test_a_job_that_does_not_show_yet_is_looked_for_before_it_is_made_again(tmp_path: Path) -> None:  # F63
    with serving("openai", lost=Counter({"/fine_tuning/jobs": 1}), hidden=5) as service:
        trainer("openai", service, hidden=30.0).train(TASK, examples(), into=tmp_path, seed=0)
        assert service.creations == 1


def test_a_creation_that_reached_nobody_is_made_again(tmp_path: Path) -> None:
    with serving("openai", refused=[503, 429, 500]) as service:
        trainer("openai", service).train(TASK, examples(), into=tmp_path, seed=0)
        assert len(service.jobs) == 1


@pytest.mark.parametrize(
    ("end", "broken", "outcome"),
    [
        ("failed", {"code": "server_error", "message": "it broke", "param": None}, "unknown"),
        ("failed", {"code": "invalid", "message": "line 3", "param": "training_file"}, "rejected"),
        ("cancelled", {}, "unknown"),
    ],
)
def test_a_job_without_a_model_is_an_error_and_its_cost_is_not_guessed_low(
    tmp_path: Path, end: Any, broken: dict[str, Json], outcome: str
) -> None:
    with serving("openai", end=end, broken=broken) as service:
        mine = trainer("openai", service)
        held = mine.quote(TASK, examples(), into=tmp_path, seed=0)
        assert held is not None
        assert mine.bill(held.attempt_id, into=tmp_path) is None
        with pytest.raises(TrainingError, match=end):
            mine.train(TASK, examples(), into=tmp_path, seed=0)
        bill = mine.bill(held.attempt_id, into=tmp_path)
        assert bill is not None
        assert (bill.outcome, bill.cost) == (outcome, 0 if outcome == "rejected" else held.worst)
        service.end = "succeeded"
        made = trainer("openai", service).train(TASK, examples(), into=tmp_path, seed=0)
        assert made.manifest["job"] == held.attempt_id.removesuffix("-0") + "-1"  # another attempt, under another name
        assert len(service.jobs) == 2


def test_tokens_that_nobody_counted_cost_the_worst_case(tmp_path: Path) -> None:
    with serving("openai", uncounted=True) as service:
        mine = trainer("openai", service)
        held = mine.quote(TASK, examples(), into=tmp_path, seed=0)
        assert held is not None
        assert mine.train(TASK, examples(), into=tmp_path, seed=0).manifest["cost"] == held.worst >= service.bill > 0


def test_the_worst_case_is_never_below_the_bill(tmp_path: Path) -> None:
    strange = [row.model_copy(update={"input": {"text": "🙂" * n + "\u2028"}}) for n, row in enumerate(examples(12))]
    with serving("openai") as service:
        mine = trainer("openai", service, epochs=7)
        held = mine.quote(TASK, strange, into=tmp_path, seed=0)
        mine.train(TASK, strange, into=tmp_path, seed=0)
        assert held is not None
        assert held.worst >= service.bill > 0


def test_a_price_that_is_not_configured_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with serving("openai") as service:
        mine = trainer("openai", service, price_per_million=None)
        for attempt in (mine.quote, mine.train):
            with pytest.raises(PriceUnknown):
                attempt(TASK, examples(), into=tmp_path, seed=0)
        assert service.asked == []


def test_an_open_job_is_finished_with_its_own_data_although_more_is_known(tmp_path: Path) -> None:
    with serving("openai", looks=10**6) as service:
        first = trainer("openai", service)
        timer = Timer(0.3, first.stop)
        timer.start()
        with pytest.raises(TrainingError, match="no longer"):
            first.train(TASK, examples(60), into=tmp_path, seed=0, licence={"rows": 60})
        [row] = rows_of(tmp_path)
        assert (row["end"], len(service.jobs)) == (None, 1)
        service.looks = 0
        second = trainer("openai", service)
        held = second.quote(TASK, examples(72), into=tmp_path, seed=0)
        assert held is not None
        assert held.attempt_id == row["name"]
        made = second.train(TASK, examples(72), into=tmp_path, seed=0, licence={"rows": 72})
        assert (made.manifest["examples"], made.manifest["licence"], len(service.jobs)) == (60, {"rows": 60}, 1)


def test_an_organisation_that_may_not_begin_jobs_is_told_why_and_pays_nothing(tmp_path: Path) -> None:
    with serving("openai") as service:
        service.before = lambda number: service.refused.append(403) if service.posts("/jobs") else None
        mine = trainer("openai", service)
        held = mine.quote(TASK, examples(), into=tmp_path, seed=0)
        with pytest.raises(TrainingError) as refused:
            mine.train(TASK, examples(), into=tmp_path, seed=0)
        assert "2027" in (refused.value.hint or "")
        assert held is not None
        bill = mine.bill(held.attempt_id, into=tmp_path)
        assert bill is not None
        assert (bill.outcome, bill.cost, service.jobs) == ("rejected", 0, [])


def test_the_dataset_does_not_stay_when_the_job_has_ended(tmp_path: Path) -> None:
    with serving("openai") as service:
        trainer("openai", service).train(TASK, examples(), into=tmp_path, seed=0)
        assert list(tmp_path.rglob("*.jsonl")) == []


def test_cancelling_is_asked_of_the_provider(tmp_path: Path) -> None:
    with serving("openai", looks=10**6) as service:
        first = trainer("openai", service)
        Timer(0.3, first.stop).start()
        with pytest.raises(TrainingError):
            first.train(TASK, examples(), into=tmp_path, seed=0)
        [name] = first.cancel(into=tmp_path)
        assert service.jobs[0].cancelled
        with pytest.raises(TrainingError, match="cancelled"):
            trainer("openai", service).train(TASK, examples(), into=tmp_path, seed=0)
        bill = first.bill(name, into=tmp_path)
        assert bill is not None
        assert bill.outcome == "unknown"


def test_a_worker_that_was_thought_dead_writes_nothing_any_more(tmp_path: Path) -> None:
    with serving("openai", looks=10**6) as service:
        zombie, heir = trainer("openai", service), trainer("openai", service)
        zombie.quote(TASK, examples(), into=tmp_path, seed=0, token=4)
        heir.quote(TASK, examples(), into=tmp_path, seed=0, token=5)
        with pytest.raises(TrainingError, match="taken over"):
            zombie.train(TASK, examples(), into=tmp_path, seed=0)
        assert service.asked == []
        service.looks = 0
        heir.train(TASK, examples(), into=tmp_path, seed=0)
        assert len(service.jobs) == 1


def test_a_key_is_read_from_its_variable_and_shown_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("openai", key="sk-right-and-secret") as service:
        mine = trainer("openai", service, api_key_env="TUNING_KEY")
        monkeypatch.delenv("TUNING_KEY", raising=False)
        with pytest.raises(ConfigError, match="TUNING_KEY"):
            mine.train(TASK, examples(), into=tmp_path, seed=0)
        monkeypatch.setenv("TUNING_KEY", "sk-wrong-and-secret")
        with pytest.raises(TrainingError) as refused:
            mine.train(TASK, examples(), into=tmp_path, seed=0)
        assert "wrong-and-secret" not in str(refused.value)
        monkeypatch.setenv("TUNING_KEY", "sk-right-and-secret")
        mine.train(TASK, examples(), into=tmp_path, seed=0)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"and-secret" not in written


def test_a_provider_that_is_away_leaves_the_job_open(tmp_path: Path) -> None:
    with serving("openai", looks=10**6) as service:
        service.before = lambda number: service.refused.append(503) if service.jobs else None
        with pytest.raises(TrainingError, match="looked after"):
            trainer("openai", service, patience=0.2).train(TASK, examples(), into=tmp_path, seed=0)
        service.before = lambda number: None
        service.refused.clear()
        service.looks = 0
        trainer("openai", service).train(TASK, examples(), into=tmp_path, seed=0)
        assert service.creations == 1


def test_a_row_that_was_damaged_is_said_and_not_trained_over(tmp_path: Path) -> None:
    with serving("openai") as service:
        mine = trainer("openai", service)
        held = mine.quote(TASK, examples(), into=tmp_path, seed=0)
        assert held is not None
        path = tmp_path / ".jobs" / f"{held.attempt_id}.json"
        path.write_text(path.read_text()[:50])
        with pytest.raises(TrainingError, match="cannot be read"):
            mine.train(TASK, examples(), into=tmp_path, seed=0)
        assert service.asked == []


def test_a_dataset_that_was_changed_under_an_open_job_is_not_sent(tmp_path: Path) -> None:
    with serving("openai") as service:
        mine = trainer("openai", service)
        held = mine.quote(TASK, examples(), into=tmp_path, seed=0)
        assert held is not None
        (tmp_path / ".jobs" / f"{held.attempt_id}.jsonl").write_text("{}")
        with pytest.raises(TrainingError, match="changed"):
            mine.train(TASK, examples(), into=tmp_path, seed=0)
        assert service.jobs == []


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"poll": 0.0}, {"price_per_million": -1}, {"price_per_million": "much"}, {"base_url": "ftp://x"}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with serving("openai") as service, pytest.raises(ConfigError):
        trainer("openai", service, **wrong)


def test_any_task_can_be_taught() -> None:
    with serving("openai") as service:
        trainer("openai", service).check(Task(name="t", description="d", input_schema={}, output_schema={}))
