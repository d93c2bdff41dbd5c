"""The trainer on TRL and PEFT: what it is told, and (slow, with torch) what it makes, also when it is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import gguf as gguf_files
import numpy as np
import pytest

from apprentice import dialogues, plugins, process, weights
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.testing.tiny import write_tiny
from apprentice.testing.trainers import TASK, THINGS, examples
from apprentice.trainers._lora import TIERS
from apprentice.trainers._training import Trained
from apprentice.types import Checkpoint, Example, Json

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


def test_4_bits_by_name_need_a_package_that_no_extra_has_and_that_is_said_at_once(
    python: Callable[..., str], gguf: str
) -> None:
    told = {"gguf": gguf, "python": python("bitsandbytes")}
    with pytest.raises(ConfigError, match="quantise: 4bit needs the package 'bitsandbytes'") as raised:
        plugins.build("trainers", "huggingface", quantise="4bit", **told)
    assert raised.value.hint == "pip install bitsandbytes"
    found = plugins.build("trainers", "huggingface", gguf=gguf, python=python(), quantise="4bit")
    assert settings_of(found)["quantise"] == "4bit"


def test_the_defaults_are_those_of_the_table(python: Callable[..., str], gguf: str) -> None:
    found = settings_of(plugins.build("trainers", "huggingface", gguf=gguf, python=python()))
    assert found == {
        "method": "sft", "tier": None, "rank": 16, "alpha": 32, "dropout": 0.05,
        "targets": ["k_proj", "o_proj", "q_proj", "v_proj"], "learning_rate": 2e-4, "batch_size": 4, "accumulate": 4,
        "epochs": 3, "max_length": 2048, "warmup": 0.1, "weight_decay": 0.01, "patience": 3, "checkpoint_every": 50,
        "quantise": "auto", "dtype": "auto", "report_to": [],
    }  # fmt: skip


def test_preferences_and_whole_models_say_more_and_less(python: Callable[..., str], gguf: str) -> None:
    usual = plugins.build("trainers", "huggingface", gguf=gguf, python=python())._recipe
    dpo = plugins.build("trainers", "huggingface", gguf=gguf, python=python(), method="dpo", least_pairs=7)._recipe
    more = {"method": "dpo", "beta": 0.1, "preference_rate": 5e-6, "preference_epochs": 1}
    assert dpo.settings == {**usual.settings, **more}
    assert (usual.least_pairs, dpo.least_pairs, dpo.kind) == (None, 7, "adapter")
    full = plugins.build("trainers", "huggingface", gguf=gguf, python=python(), full=True)._recipe
    rest = {key: usual.settings[key] for key in usual.settings.keys() - {"rank", "alpha", "dropout", "targets"}}
    assert full.settings == {**rest, "full": True, "gguf": gguf, "quantise": "none", "learning_rate": 2e-5}
    assert (full.kind, full.made, full.least_pairs) == ("model", "model/model.gguf", None)


def test_a_whole_model_of_an_architecture_that_cannot_be_served_is_refused_before_it_is_trained(
    python: Callable[..., str], tmp_path: Path
) -> None:
    gemma = write_other(tmp_path / "gemma.gguf", "gemma2")
    with pytest.raises(ConfigError, match="full: true knows llama, qwen2, qwen3") as raised:
        plugins.build("trainers", "huggingface", gguf=str(gemma), python=python(), full=True)
    assert "gemma2" in str(raised.value)
    plugins.build("trainers", "huggingface", gguf=str(gemma), python=python())


def write_other(path: Path, architecture: str) -> Path:
    """A GGUF file that says it is of that architecture."""
    writer = gguf_files.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("tier", "latency"), [("slm", 50), ("small", 200), ("medium", 1000)])
def test_a_tier_names_base_latency_and_learning_rate(
    python: Callable[..., str], gguf: str, tier: Any, latency: int
) -> None:
    trainer = plugins.build("trainers", "huggingface", tier=tier, gguf=gguf, python=python())
    assert trainer._recipe.base == TIERS[tier].base
    assert TIERS[tier].latency_ms == trainer._recipe.latency_ms == latency
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
        ({"method": "rl"}, "method"),
        ({"full": True, "method": "dpo"}, "method"),
        ({"full": True, "quantise": "4bit"}, "quantise"),
        ({"beta": 0}, "beta"),
        ({"least_pairs": 0}, "least_pairs"),
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
    for name in ("_child.py", "_huggingface_run.py", "_adapters.py", "_wholes.py", "_turn.py"):
        text = (folder / name).read_text()
        assert "import apprentice" not in text
        assert "from apprentice" not in text
        assert "torch.load" not in text
        assert "pickle." not in text


# --- with torch ---------------------------------------------------------------------------------------------------------


def preferred() -> list[Example]:
    """The examples, each with an answer of another kind that was rejected."""
    kinds = list(THINGS)
    return [
        row.model_copy(update={"rejected": {"kind": kinds[(kinds.index(row.target["kind"]) + 1) % 3]}})
        for row in examples()
    ]


PREFERENCES: dict[str, Json] = {"method": "dpo", "least_pairs": 20, "preference_rate": 3e-4, "preference_epochs": 2}
WAYS: dict[str, tuple[dict[str, Json], Callable[[], list[Example]]]] = {
    "lora": ({}, examples),
    "full": ({"full": True, "learning_rate": 1e-3}, examples),
    "dpo": (PREFERENCES, preferred),
}


class Calm:
    """What comes of each way when nobody disturbs it; each is taught once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Checkpoint] = {}

    def __call__(self, way: str) -> Checkpoint:
        if way not in self._made:
            settings, rows = WAYS[way]
            trainer = tiny(self._folder, **settings)
            self._made[way] = trainer.train(TASK, rows(), into=self._folder / way, seed=0)
        return self._made[way]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    return Calm(tmp_path_factory.mktemp("calm"))


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kills"), [("lora", (1, 12, 31)), ("full", (1, 40)), ("dpo", (60, 125))])
def test_it_learns_and_what_was_killed_comes_to_the_same_bytes_without_pickles(
    way: str, kills: tuple[int, ...], calm: Calm, tmp_path: Path
) -> None:  # F66
    undisturbed = calm(way)
    metrics, outcome = undisturbed.manifest["metrics"], undisturbed.manifest["outcome"]
    assert metrics["agreement"] >= 0.5  # a model of random numbers has nothing right before it is taught
    assert outcome["loss"][1] < 0.1 < outcome["loss"][0]
    settings, rows = WAYS[way]
    # The path of the base is in the manifest: what is compared byte for byte has the very same base.
    trainer, into = tiny(calm._folder, **settings), tmp_path / "rough"
    for wanted in kills:
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(trainer.train, TASK, rows(), into=into, seed=0)
            while not made.done() and max(taken(into), default=0) < wanted:
                time.sleep(0.01)
            for one in process.running():
                if str(into) in " ".join(one.argv):
                    os.kill(one.pid, signal.SIGKILL)
            with pytest.raises(TrainingError, match="SIGKILL"):
                made.result(120)
        left = [path for path in into.rglob("checkpoint-*/*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
        assert not [path for path in left if (path.parent / "whole.json").exists()]
    again = trainer.train(TASK, rows(), into=into, seed=0)
    assert again.id == undisturbed.id
    assert content(again) == content(undisturbed)
    order = taken(into)
    assert max(before - after + 1 for before, after in pairwise(order)) <= 5


@pytest.mark.slow
def test_a_run_stops_when_what_is_kept_back_gets_no_better(tmp_path: Path) -> None:
    dice, kinds = random.Random(0), list(THINGS)
    noise = [row.model_copy(update={"target": {"kind": dice.choice(kinds)}}) for row in examples()]
    made = tiny(tmp_path, patience=2, checkpoint_every=2, held=0.2).train(TASK, noise, into=tmp_path / "it", seed=0)
    [told] = (tmp_path / "it").glob(".training/*/progress.jsonl")
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    held = {line["step"]: line["held_loss"] for line in lines if "held_loss" in line}
    outcome = made.manifest["outcome"]
    assert outcome["steps"] == max(held) < 50 < lines[0]["steps"]
    assert outcome["held_loss"] == min(held.values()) == held[outcome["best_step"]]
    assert sum(step > outcome["best_step"] for step in held) == 2


@pytest.mark.slow
def test_preferences_make_right_answers_likelier_beside_wrong_ones_than_learning_them_alone(calm: Calm) -> None:
    outcome = calm("dpo").manifest["outcome"]["preferences"]
    assert outcome["margin"][1] > outcome["margin"][0]
    assert outcome["loss"][1] < outcome["loss"][0]
    lines = dialogues.completion(TASK, preferred(), rejected=True).splitlines()
    pairs = [{**line, "chosen": line.pop("completion")} for line in map(json.loads, lines)]
    order = {"base": calm("dpo").manifest["base"]["file"], "pairs": pairs}
    order |= {"adapters": [str(calm(way).path) for way in ("lora", "dpo")]}
    judge = [torch_python(), "-I", str(Path(__file__).with_name("judge.py"))]
    told = subprocess.run(judge, input=json.dumps(order), capture_output=True, text=True, check=True).stdout
    alone, beside = json.loads(told.splitlines()[-1])
    assert fmean(beside) > fmean(alone) + 1.0
    assert sum(after > before for before, after in zip(alone, beside, strict=True)) >= 0.75 * len(pairs)


@pytest.mark.slow
async def test_a_whole_model_answers_as_it_did_in_training_without_its_base(calm: Calm) -> None:
    made = calm("full")
    assert made.manifest["kind"] == "model"
    folder = made.path / "model"
    assert weights.check(folder / "model.safetensors").parameters == weights.check(folder / "model.gguf").parameters
    model = plugins.build("models", "llama_cpp", checkpoint=str(made.path), **QUICK["serving"])
    try:
        await model.ready()
        for probe in made.manifest["probe"]:
            assert (await model.answer(TASK, probe["input"])).output == probe["output"] != probe["base"]
    finally:
        await model.close()


def content(checkpoint: Checkpoint) -> dict[str, bytes]:
    files = [path for path in checkpoint.path.rglob("*") if path.is_file()]
    return {path.relative_to(checkpoint.path).as_posix(): path.read_bytes() for path in files}


def taken(into: Path) -> list[int]:
    told = [path.read_text().splitlines() for path in into.glob(".training/*/progress.jsonl")]
    lines = [json.loads(line) for lines in told for line in lines if line.endswith("}")]
    return [line["step"] for line in lines if "loss" in line]
