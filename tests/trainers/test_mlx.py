"""The trainer on MLX: what it is told, how its adapter is turned, and (slow, with mlx-lm) what it makes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apprentice import plugins
from apprentice.errors import ConfigError, MissingExtra
from apprentice.testing.tiny import write_tiny
from apprentice.testing.trainers import TASK, examples
from apprentice.trainers import _mlx_run
from apprentice.trainers._training import Trained
from apprentice.types import Json

from .folders import as_folder
from .programs import python_with

PYTHON = os.environ.get("APPRENTICE_MLX_PYTHON")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLD: dict[str, Any] = {
    "base": "base", "rank": 8, "alpha": 24, "dropout": 0.2, "targets": ["q_proj", "up_proj"], "batch_size": 4,
    "accumulate": 3, "epochs": 5, "max_length": 333, "learning_rate": 0.002, "warmup": 0.25, "weight_decay": 0.07,
    "seed": 9,
}  # fmt: skip


READ = """
import json, sys
from mlx_lm import lora
from mlx_lm.tuner.utils import build_schedule
config = json.load(sys.stdin)
steps = config["iters"] // config["grad_accumulation_steps"]
schedule = build_schedule(config["lr_schedule"])
rates = [float(schedule(step)) for step in range(steps + 1)]
print(json.dumps({"unknown": sorted(set(config) - set(lora.CONFIG_DEFAULTS)), "rates": rates}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx")
    as_folder(write_tiny(folder / "tiny.gguf"), folder / "base")
    python_with(folder / "env", {"mlx_lm.py": "", "mlx.py": ""})
    return folder


def trainer(place: Path, **settings: Any) -> Trained:
    usual = {"gguf": str(place / "tiny.gguf"), "base_model": str(place / "base")}
    usual |= {"python": str(place / "env" / "bin" / "python")}
    made: Trained = plugins.build("trainers", "mlx", **usual | settings)
    return made


def test_each_setting_has_its_place() -> None:
    found = _mlx_run.config_of(TOLD, Path("job"), 48)
    expected = {
        "model": "base", "fine_tune_type": "lora", "mask_prompt": True, "num_layers": -1, "batch_size": 4,
        "grad_accumulation_steps": 3, "iters": 60, "max_seq_length": 333, "optimizer": "adamw",
        "optimizer_config": {"adamw": {"weight_decay": 0.07}}, "seed": 9, "data": "job/checkpoints",
        "lora_parameters": {
            "rank": 8, "scale": 3.0, "dropout": 0.2, "keys": ["self_attn.q_proj", "mlp.up_proj"]
        },
        "lr_schedule": {"name": "linear_schedule", "arguments": [0.002, 0.0, 15], "warmup": 5},
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(("rows", "batch", "iterations"), [(1, 1, 6), (3, 3, 6), (4, 4, 6), (7, 4, 6), (13, 4, 15)])
def test_few_rows_still_make_whole_batches_and_whole_steps(rows: int, batch: int, iterations: int) -> None:
    found = _mlx_run.config_of(TOLD, Path("job"), rows)
    assert (found["batch_size"], found["iters"]) == (batch, iterations)
    assert found["iters"] % TOLD["accumulate"] == 0
    schedule = found["lr_schedule"]
    assert schedule["arguments"][2] + schedule["warmup"] == iterations // TOLD["accumulate"]


def test_the_adapter_is_turned_and_changes_a_weight_by_the_same(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    a, b = dice.normal(size=(16, 8)).astype("f"), dice.normal(size=(8, 12)).astype("f")
    module = "model.layers.0.self_attn.q_proj"
    save_file({f"{module}.lora_a": a, f"{module}.lora_b": b}, tmp_path / "adapters.safetensors")
    _mlx_run.as_peft(tmp_path / "adapters.safetensors", TOLD, tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    turned = [found[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB"]
    assert [tensor.shape for tensor in turned] == [(8, 16), (12, 8)]
    theirs = 3.0 * (a @ b).T  # as mlx-lm fuses it, with its scale
    np.testing.assert_allclose(about["lora_alpha"] / about["r"] * turned[1] @ turned[0], theirs, rtol=1e-5)


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    save_file({"model.norm.weight": np.ones(3, "f")}, tmp_path / "adapters.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        _mlx_run.as_peft(tmp_path / "adapters.safetensors", TOLD, tmp_path)
    save_file({}, tmp_path / "adapters.safetensors")
    with pytest.raises(ValueError, match="trained nothing"):
        _mlx_run.as_peft(tmp_path / "adapters.safetensors", TOLD, tmp_path)


def test_steps_are_told_in_steps_not_in_batches(tmp_path: Path) -> None:
    tell = _mlx_run._Tell(tmp_path / "progress.jsonl", 6, 3)
    tell.on_val_loss_report({"iteration": 0, "val_loss": 9.0})
    for iteration in (3, 6):
        tell.on_train_loss_report({"iteration": iteration, "train_loss": 1 / iteration})
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [(line["step"], line["steps"]) for line in lines] == [(0, 2), (1, 2), (2, 2)]
    assert (lines[0]["held_loss"], lines[2]["loss"], lines[2]["eta"]) == (9.0, 1 / 6, 0.0)


def test_an_interpreter_without_mlx_is_said_with_the_extra(place: Path) -> None:
    with pytest.raises(MissingExtra, match="'mlx_lm' is not installed") as raised:
        trainer(place, python=None)
    assert raised.value.hint == "pip install 'apprentice[mlx]'"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"base_model": None}, "base_model"), ({"targets": ["lm_head"]}, "lm_head"), ({"rank": 0}, "rank")],
)
def test_settings_that_are_wrong_are_said_at_once(place: Path, wrong: dict[str, Json], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        trainer(place, **wrong)


class TestTheRealLibrary:
    """Where APPRENTICE_MLX_PYTHON names an interpreter that has it."""

    __test__ = bool(PYTHON)

    @pytest.mark.slow
    def test_it_knows_every_setting_and_its_rate_rises_and_falls(self) -> None:
        config = _mlx_run.config_of(TOLD, Path("job"), 48)
        order = json.dumps(config)
        ended = subprocess.run([str(PYTHON), "-I", "-c", READ], input=order, capture_output=True, text=True, check=True)
        read = json.loads(ended.stdout.splitlines()[-1])
        assert read["unknown"] == []
        rates, steps = read["rates"], config["iters"] // TOLD["accumulate"]
        top = rates.index(max(rates))
        assert (len(rates), round(max(rates), 6)) == (steps + 1, TOLD["learning_rate"])
        assert 0 < top < steps / 2
        assert rates[-1] < max(rates) / 10
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)

    @pytest.mark.slow
    def test_it_teaches_a_tiny_model(self, place: Path, tmp_path: Path) -> None:
        quick = {"epochs": 5, "learning_rate": 3e-3, "batch_size": 8, "accumulate": 1, "targets": ALL}
        serving = {"threads": 1, "context": 512, "max_tokens": 24}
        made = trainer(place, python=PYTHON, serving=serving, **quick).train(TASK, examples(), into=tmp_path, seed=0)
        assert made.manifest["outcome"]["loss"][1] < 1 < made.manifest["outcome"]["loss"][0]
        assert made.manifest["metrics"]["json_validity"] == 1.0
        assert made.manifest["probe"][0]["output"] != made.manifest["probe"][0]["base"]
