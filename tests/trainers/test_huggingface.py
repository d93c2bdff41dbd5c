"""The trainer on TRL and PEFT: what it is told, and (slow, with torch) what it makes, also when it is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from apprentice import plugins, process
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.testing.tiny import write_tiny
from apprentice.testing.trainers import TASK, examples
from apprentice.trainers._lora import TIERS
from apprentice.trainers._training import Trained
from apprentice.types import Json

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUICK: dict[str, Json] = {
    "epochs": 15,
    "learning_rate": 3e-3,
    "batch_size": 8,
    "accumulate": 1,
    "targets": ALL,
    "patience": 0,
    "checkpoint_every": 5,
    "threads": 1,
    "serving": {"threads": 1, "context": 512, "max_tokens": 24},
}


def torch_python() -> str:
    """An interpreter with torch and what else the child needs."""
    named = os.environ.get("APPRENTICE_TRAIN_PYTHON")
    assert named or importlib.util.find_spec("torch"), "name an interpreter that has torch in APPRENTICE_TRAIN_PYTHON"
    return named or sys.executable


def tiny(folder: Path, **settings: Any) -> Trained:
    base = folder / "tiny.gguf"
    if not base.exists():
        write_tiny(base)
    made: Trained = plugins.build("trainers", "huggingface", gguf=str(base), python=torch_python(), **QUICK | settings)
    return made


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., str]:
    """An interpreter that says it has everything but these."""

    def make(*lacking: str) -> str:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\necho {' '.join(lacking)}\n")
        program.chmod(0o755)
        return str(program)

    return make


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    return str(write_tiny(tmp_path / "tiny.gguf"))


def settings_of(trainer: Trained) -> dict[str, Json]:
    return dict(trainer._recipe.settings)


def test_an_interpreter_without_torch_is_said_with_the_extra(python: Callable[..., str], gguf: str) -> None:
    with pytest.raises(MissingExtra, match="'torch' is not installed") as raised:
        plugins.build("trainers", "huggingface", gguf=gguf, python=python("torch", "trl"))
    assert raised.value.hint == "pip install 'apprentice[train]'"


def test_the_defaults_are_those_of_the_table(python: Callable[..., str], gguf: str) -> None:
    found = settings_of(plugins.build("trainers", "huggingface", gguf=gguf, python=python()))
    assert found == {
        "method": "sft", "tier": None, "rank": 16, "alpha": 32, "dropout": 0.05,
        "targets": ["k_proj", "o_proj", "q_proj", "v_proj"], "learning_rate": 2e-4, "batch_size": 4, "accumulate": 4,
        "epochs": 3, "max_length": 2048, "warmup": 0.1, "weight_decay": 0.01, "patience": 3, "checkpoint_every": 50,
        "quantise": "auto", "dtype": "auto", "report_to": [],
    }  # fmt: skip


@pytest.mark.parametrize(("tier", "latency"), [("slm", 50), ("small", 200), ("medium", 1000)])
def test_a_tier_names_base_latency_and_learning_rate(
    python: Callable[..., str], gguf: str, tier: Any, latency: int
) -> None:
    trainer = plugins.build("trainers", "huggingface", tier=tier, gguf=gguf, python=python())
    assert trainer._recipe.base == TIERS[tier].base
    assert TIERS[tier].latency_ms == latency
    assert (settings_of(trainer)["tier"], settings_of(trainer)["learning_rate"]) == (tier, 2e-4)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": []}, "targets"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"accumulate": 0}, "accumulate"),
        ({"epochs": 0}, "epochs"),
        ({"max_length": 1}, "max_length"),
        ({"warmup": 1.0}, "warmup"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"patience": -1}, "patience"),
        ({"held": 0.6}, "held"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"threads": 0}, "threads"),
        ({"gguf": None}, "gguf"),
        ({"tier": "slm", "base_model": "other"}, "tier"),
        ({"tier": "huge"}, "tier"),
        ({"quantise": "2bit"}, "quantise"),
        ({"method": "dpo"}, "method"),
        ({"pass_env": ["NOT_SET_ANYWHERE"]}, "NOT_SET_ANYWHERE"),
        ({"python": "no-such-python"}, "no-such-python"),
    ],
)
def test_settings_out_of_range_are_named(
    python: Callable[..., str], gguf: str, wrong: dict[str, Json], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        plugins.build("trainers", "huggingface", **{"gguf": gguf, "python": python()} | wrong)


def test_the_child_and_the_writer_of_adapters_import_nothing_of_ours() -> None:
    folder = Path(sys.modules[Trained.__module__].__file__ or "").parent
    for name in ("_child.py", "_huggingface_run.py", "_adapters.py", "_turn.py"):
        text = (folder / name).read_text()
        assert "import apprentice" not in text
        assert "from apprentice" not in text
        assert "torch.load" not in text
        assert "pickle." not in text


# --- with torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_and_what_was_killed_comes_to_the_same_bytes_without_pickles(tmp_path: Path) -> None:
    calm = tiny(tmp_path).train(TASK, examples(), into=tmp_path / "calm", seed=0)
    assert (
        calm.manifest["metrics"]["agreement"] >= 0.5
    )  # a model of random numbers has nothing right before it is taught
    assert calm.manifest["outcome"]["loss"][1] < 0.1 < calm.manifest["outcome"]["loss"][0]
    into = tmp_path / "rough"
    for wanted in (1, 12, 31):
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(tiny(tmp_path).train, TASK, examples(), into=into, seed=0)
            while not made.done() and max(taken(into), default=0) < wanted:
                time.sleep(0.01)
            for one in process.running():
                if str(into) in " ".join(one.argv):
                    os.kill(one.pid, signal.SIGKILL)
            with pytest.raises(TrainingError, match="SIGKILL"):
                made.result(120)
        left = [path for path in into.rglob("checkpoint-*/*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
        assert not [path for path in left if (path.parent / "whole.json").exists()]
    again = tiny(tmp_path).train(TASK, examples(), into=into, seed=0)
    assert again.id == calm.id
    assert {path.name: path.read_bytes() for path in again.path.iterdir()} == {
        path.name: path.read_bytes() for path in calm.path.iterdir()
    }
    order = taken(into)
    assert max(before - after + 1 for before, after in pairwise(order)) <= 5


def taken(into: Path) -> list[int]:
    told = [path.read_text().splitlines() for path in into.glob(".training/*/progress.jsonl")]
    lines = [json.loads(line) for lines in told for line in lines if line.endswith("}")]
    return [line["step"] for line in lines if "loss" in line]
