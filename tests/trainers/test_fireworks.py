"""Fireworks' fine-tuning: ids of ours make every step safe to repeat, and no file is kept that was not checked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from apprentice import weights
from apprentice.errors import ConfigError, TrainingError, UnsafeFile
from apprentice.testing.trainers import TASK, examples

from .services import adapter, serving, trainer


def test_the_checkpoint_is_the_checked_adapter(tmp_path: Path) -> None:
    with serving("fireworks", looks=4) as service:
        made = trainer("fireworks", service, lora_rank=16).train(TASK, examples(), into=tmp_path, seed=0)
        contents = weights.check(made.path)
        assert (contents.kind, made.id) == ("adapter", weights.digest(made.path))
        assert {
            path.name: path.read_bytes() for path in made.path.iterdir() if path.name != "manifest.json"
        } == adapter()
        [job] = service.jobs
        assert made.manifest["model"] == job.asked["outputModel"] == f"accounts/my-team/models/{job.id}"
        assert made.manifest["cost"] == service.bill > 0
        assert (job.asked["loraRank"], job.asked["epochs"], job.asked["evalAutoCarveout"]) == (16, 1, False)
        assert json.loads((made.path / "manifest.json").read_text()) == made.manifest
        assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [made.id]


@pytest.mark.parametrize(
    "lost",
    [
        {"/datasets": 1},
        {":upload": 1},
        {"/supervisedFineTuningJobs": 1},
        {"/datasets": 1, ":upload": 2, "/supervised": 1},
    ],
)
def test_lost_answers_lead_to_the_same_dataset_and_the_same_job(tmp_path: Path, lost: dict[str, int]) -> None:  # F63
    with serving("fireworks", lost=Counter(lost)) as service:
        trainer("fireworks", service).train(TASK, examples(), into=tmp_path, seed=0)
        assert (len(service.jobs), len(service.files)) == (1, 1)


def test_a_job_of_our_id_that_exists_is_ours(tmp_path: Path) -> None:  # F63
    with serving("fireworks") as service:
        first = trainer("fireworks", service).train(TASK, examples(), into=tmp_path / "a", seed=0)
        second = trainer("fireworks", service).train(TASK, examples(), into=tmp_path / "b", seed=0)
        assert (first.id, len(service.jobs)) == (second.id, 1)


def test_the_download_carries_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNING_KEY", "fw-right-and-secret")
    with serving("fireworks", key="fw-right-and-secret") as service:
        trainer("fireworks", service, api_key_env="TUNING_KEY").train(TASK, examples(), into=tmp_path, seed=0)
        signed = [asked for asked in service.asked if asked.path.startswith("/signed/")]
        assert len(signed) == 2
        assert not any("authorization" in asked.headers for asked in signed)


@pytest.mark.parametrize(
    "told",
    [
        {"adapter_model.safetensors": "http://169.254.169.254/latest/meta-data"},
        {"adapter_model.safetensors": "file:///etc/passwd"},
        {"adapter_model.safetensors": "http://user:word@127.0.0.1/x"},
        {"../../evil.safetensors": "SIGNED"},
        {"adapter_model.bin": "SIGNED"},
        {".hidden": "SIGNED"},
    ],
)
def test_addresses_and_names_that_must_not_be_are_refused(tmp_path: Path, told: dict[str, str]) -> None:
    with serving("fireworks") as service:
        signed = f"{service.url}/signed/0/adapter_model.safetensors?s=1"
        service.told_files = {name: signed if url == "SIGNED" else url for name, url in told.items()}
        mine = trainer("fireworks", service)
        held = mine.quote(TASK, examples(), into=tmp_path / "models", seed=0)
        with pytest.raises(UnsafeFile):
            mine.train(TASK, examples(), into=tmp_path / "models", seed=0)
        assert list((tmp_path / "models").glob("[!.]*")) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
        assert held is not None
        bill = mine.bill(held.attempt_id, into=tmp_path / "models")  # it was trained, and is paid for
        assert bill is not None
        assert (bill.outcome, bill.cost) == ("answered", service.bill)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "code"])
def test_an_adapter_that_is_not_safe_is_not_kept(tmp_path: Path, damage: str) -> None:
    files = adapter()
    if damage == "truncated":
        files["adapter_model.safetensors"] = files["adapter_model.safetensors"][:-1]
    elif damage == "pickle":
        files["adapter_model.bin"] = b"\x80\x04."
    else:
        told = json.loads(files["adapter_config.json"]) | {"auto_mapping": {"base_model_class": "os.system"}}
        files["adapter_config.json"] = json.dumps(told).encode()
    with serving("fireworks", adapter=files) as service:
        with pytest.raises(UnsafeFile):
            trainer("fireworks", service).train(TASK, examples(), into=tmp_path, seed=0)
        assert list(tmp_path.glob("[!.]*")) == []


@pytest.mark.parametrize(("code", "outcome"), [("INVALID_ARGUMENT", "rejected"), ("INTERNAL", "unknown")])
def test_a_failed_job_costs_nothing_only_where_nothing_was_trained(tmp_path: Path, code: str, outcome: str) -> None:
    with serving("fireworks", end="failed", broken={"code": code, "message": "no"}) as service:
        mine = trainer("fireworks", service)
        held = mine.quote(TASK, examples(), into=tmp_path, seed=0)
        with pytest.raises(TrainingError, match="failed"):
            mine.train(TASK, examples(), into=tmp_path, seed=0)
        assert held is not None
        bill = mine.bill(held.attempt_id, into=tmp_path)
        assert bill is not None
        assert (bill.outcome, bill.cost) == (outcome, 0 if outcome == "rejected" else held.worst)


@pytest.mark.parametrize("wrong", [{"account": "a/b"}, {"account": ""}, {"lora_rank": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with serving("fireworks") as service, pytest.raises(ConfigError):
        trainer("fireworks", service, **wrong)
