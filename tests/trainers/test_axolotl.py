"""The trainer on Axolotl: what that is told, what is read from its log, and (slow, with Axolotl) what it makes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice import dialogues, plugins
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.testing.tiny import write_tiny
from apprentice.testing.trainers import TASK, examples
from apprentice.trainers import _axolotl_run
from apprentice.trainers._training import Trained
from apprentice.types import Json

from .folders import as_folder
from .programs import NO_GPU, python_with

PYTHON = os.environ.get("APPRENTICE_AXOLOTL_PYTHON")
SERVING: dict[str, Json] = {"threads": 1, "context": 512, "max_tokens": 24}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# In the place of Axolotl: it reads its file, says what Axolotl says, and leaves the adapter that a Llama would get.
PROGRAM = """
import json, os, sys
from pathlib import Path
import numpy as np, yaml
from safetensors.numpy import save_file

told = yaml.safe_load(Path(sys.argv[1]).read_text())
print(json.dumps(sorted(os.environ)), flush=True)
if told["learning_rate"] == 0.5:
    sys.exit("ValueError: the learning rate is far too large")
steps = 6
for step in range(1, steps + 1):
    logged = {"loss": str(3 / step), "grad_norm": "1.0", "memory/max_active (GiB)": "0", "epoch": str(3 * step / steps)}
    print(f"  {step}/{steps} [00:01<?, ?it/s]\\r     {logged}", flush=True)
print(str({"eval_loss": "0.7", "eval_runtime": "0.1", "epoch": "3"}))
print(str({"train_runtime": "7.4", "train_loss": "1.2", "epoch": "3"}))
dice, out, tensors = np.random.default_rng(told["seed"]), Path(told["output_dir"]), {}
for layer in range(4):
    for module, rows in (("q_proj", 128), ("v_proj", 64), ("o_proj", 128)):
        name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
        tensors[f"{name}.lora_A.weight"] = dice.normal(size=(told["lora_r"], 128)).astype("f")
        tensors[f"{name}.lora_B.weight"] = dice.normal(size=(128 if rows == 128 else 64, told["lora_r"])).astype("f")
out.mkdir()
save_file(tensors, out / "adapter_model.safetensors")
about = {"lora_alpha": told["lora_alpha"], "r": told["lora_r"], "target_modules": told["lora_target_modules"]}
(out / "adapter_config.json").write_text(json.dumps(about))
"""


READ = """
import json, sys, yaml
from axolotl.utils.schemas.config import AxolotlInputConfig
config = yaml.safe_load(sys.stdin)
unknown = sorted(set(config) - set(AxolotlInputConfig.model_fields))
read = AxolotlInputConfig(**config).model_dump(mode="json", include=set(config))
print(json.dumps({"unknown": unknown, "read": read}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base, as GGUF and as safetensors, and an interpreter that has the program above."""
    folder = tmp_path_factory.mktemp("axolotl")
    as_folder(write_tiny(folder / "tiny.gguf"), folder / "base")
    known = {f"{name}-1.0.dist-info/METADATA": f"Name: {name}\nVersion: 1.0\n" for name in ("axolotl", "torch", "peft")}
    known |= {"transformers-1.0.dist-info/METADATA": "Name: transformers\nVersion: 1.0\n"}
    modules = {"axolotl/__init__.py": "", "axolotl/cli/__init__.py": "", "axolotl/cli/train.py": PROGRAM}
    python_with(folder / "env", modules | known | {"torch.py": NO_GPU, "peft.py": "", "transformers.py": ""})
    return folder


def trainer(place: Path, **settings: Any) -> Trained:
    usual = {"gguf": str(place / "tiny.gguf"), "base_model": str(place / "base"), "serving": SERVING}
    usual |= {"python": str(place / "env" / "bin" / "python")}
    made: Trained = plugins.build("trainers", "axolotl", **usual | settings)
    return made


def job(into: Path) -> Path:
    [found] = (into / ".training").iterdir()
    return found


def test_each_setting_has_its_place_in_the_file(place: Path, tmp_path: Path) -> None:
    settings = {"rank": 8, "alpha": 24, "dropout": 0.2, "targets": ["q_proj", "v_proj"], "learning_rate": 0.5}
    settings |= {"batch_size": 3, "accumulate": 5, "epochs": 7, "max_length": 333, "warmup": 0.25, "weight_decay": 0.07}
    settings |= {"patience": 2, "checkpoint_every": 11, "dtype": "float32"}
    with pytest.raises(TrainingError, match="far too large"):  # by then it is written
        trainer(place, **settings).train(TASK, examples(), into=tmp_path, seed=9)
    written = yaml.safe_load((job(tmp_path) / "axolotl.yml").read_text())
    own = str((job(tmp_path) / "checkpoints").resolve())
    expected = {
        "base_model": str(place / "base"), "adapter": "lora", "lora_r": 8, "lora_alpha": 24, "lora_dropout": 0.2,
        "lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 0.5, "micro_batch_size": 3,
        "gradient_accumulation_steps": 5, "num_epochs": 7, "sequence_len": 333, "warmup_ratio": 0.25,
        "weight_decay": 0.07, "early_stopping_patience": 2, "eval_steps": 11, "save_steps": 11, "seed": 9,
        "bf16": False, "chat_template": "tokenizer_default", "sample_packing": False, "save_only_model": True,
        "output_dir": f"{own}/out", "lora_mlp_kernel": False,
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected
    assert written["datasets"][0]["path"] == f"{own}/train.jsonl"
    assert written["test_datasets"][0]["path"] == f"{own}/held.jsonl"


def test_it_learns_the_last_answer_of_the_very_conversations(tmp_path: Path) -> None:
    task = TASK.model_copy(update={"examples": ({"input": {"text": "an axe"}, "output": {"kind": "tool"}},)})
    (tmp_path / "train.jsonl").write_text(dialogues.completion(task, examples(6)))
    (tmp_path / "checkpoints").mkdir()
    assert _axolotl_run._conversations(tmp_path, "train") == 6
    written = [json.loads(line) for line in (tmp_path / "checkpoints" / "train.jsonl").read_text().splitlines()]
    bare = [
        {"messages": [{key: message[key] for key in ("role", "content")} for message in line["messages"]]}
        for line in written
    ]
    assert "".join(dialogues.as_json(line) + "\n" for line in bare) == dialogues.chat(task, examples(6))
    for line in written:
        assert [message["train"] for message in line["messages"]] == [False, False, False, False, True]
    described = _axolotl_run._dataset(tmp_path / "train.jsonl")
    assert (described["roles_to_train"], described["message_field_training"]) == ([], "train")


def test_nothing_kept_back_is_nothing_to_stop_by(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="far too large"):
        trainer(place, held=0.0, learning_rate=0.5).train(TASK, examples(), into=tmp_path, seed=0)
    written = yaml.safe_load((job(tmp_path) / "axolotl.yml").read_text())
    assert written["save_strategy"] == "no"
    assert written.keys().isdisjoint(
        {"test_datasets", "eval_steps", "early_stopping_patience", "load_best_model_at_end"}
    )


def test_its_log_becomes_progress_and_its_adapter_a_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "CANARY")
    checkpoint = trainer(place).train(TASK, examples(24), into=tmp_path, seed=0)
    lines = [json.loads(line) for line in (job(tmp_path) / "progress.jsonl").read_text().splitlines()]
    assert [(line["step"], line["steps"], line["loss"]) for line in lines[:6]] == [
        (step, 6, 3 / step) for step in range(1, 7)
    ]
    assert (lines[6]["step"], lines[6]["held_loss"], lines[7]["eta"]) == (6, 0.7, 0.0)
    outcome = checkpoint.manifest["outcome"]
    assert (outcome["steps"], outcome["loss"], outcome["held_loss"]) == (6, [3.0, 0.5], 0.7)
    assert outcome["made_with"]["axolotl"] == "1.0"
    assert (checkpoint.path / "adapter_model.safetensors").exists()
    assert not (job(tmp_path) / "checkpoints").exists(), "what people wrote does not outlive the job"
    seen = json.loads((job(tmp_path) / "log").read_text().splitlines()[0])
    assert {"AXOLOTL_DO_NOT_TRACK", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"} <= set(seen)
    assert "OPENAI_API_KEY" not in seen, "it is offline, sends no telemetry and has no key"


def test_lines_of_a_real_log_are_understood() -> None:
    bar = "  4%|▍         | 1/24 [00:00<00:09,  2.36it/s]      "
    logged = "{'loss': '44.09', 'grad_norm': '48.81', 'learning_rate': '0', 'ppl': '1.408e+19', 'epoch': '0.125'}"
    held = "{'eval_loss': '0.8869', 'eval_runtime': '0.1337', 'epoch': '3'}\n"
    assert list(_axolotl_run.logged_in(bar + logged + bar + held)) == [
        {"loss": 44.09, "epoch": 0.125},
        {"eval_loss": 0.8869, "epoch": 3.0},
    ]
    ended = "{'train_runtime': '7.411', 'train_loss': '6.437', 'epoch': '3'}"
    assert list(_axolotl_run.logged_in(f"[INFO] config: {{'seed': 0}} {ended}")) == []


def test_a_failure_shows_what_axolotl_said_and_what_happens_next(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the learning rate is far too large") as raised:
        trainer(place, learning_rate=0.5).train(TASK, examples(), into=tmp_path, seed=0)
    assert raised.value.hint == "the next cycle starts again"
    assert "axolotl ended with 1" in str(raised.value)
    assert not list(tmp_path.glob("sha256-*"))


def test_an_interpreter_without_axolotl_is_said_with_the_extra(place: Path) -> None:
    with pytest.raises(MissingExtra, match="'axolotl' is not installed") as raised:
        trainer(place, python=None)
    assert raised.value.hint == "pip install 'apprentice[axolotl]'"


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"dropout": 1.0}, {"gguf": None}, {"report_to": ["x"]}, {"tier": "slm"}], ids=str
)
def test_settings_that_are_wrong_are_said_at_once(place: Path, wrong: dict[str, Json]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        trainer(place, **wrong)


class TestTheRealProgram:
    """Where APPRENTICE_AXOLOTL_PYTHON names an interpreter that has it."""

    __test__ = bool(PYTHON)

    @pytest.mark.slow
    @pytest.mark.parametrize("looked_at", [True, False])
    def test_its_own_schema_knows_every_setting_and_reads_it_as_it_was_meant(self, looked_at: bool) -> None:
        told = {"rank": 8, "alpha": 24, "dropout": 0.2, "targets": ["q_proj", "v_proj"], "learning_rate": 0.002}
        told |= {"batch_size": 3, "accumulate": 5, "epochs": 7, "max_length": 333, "warmup": 0.25, "weight_decay": 0.07}
        told |= {"patience": 2, "checkpoint_every": 11, "seed": 9}
        config = _axolotl_run.config_of(told, Path("job"), "base", looked_at=looked_at)
        text = yaml.safe_dump(config, sort_keys=False)
        ended = subprocess.run([str(PYTHON), "-I", "-c", READ], input=text, capture_output=True, text=True, check=True)
        read = json.loads(ended.stdout.splitlines()[-1])
        assert read["unknown"] == []
        sets = {"datasets", "test_datasets"}  # to which it adds what it takes for granted
        assert {key: read["read"][key] for key in config.keys() - sets} == {
            key: value for key, value in config.items() if key not in sets
        }
        for name in sets & config.keys():
            [written], [understood] = config[name], read["read"][name]
            assert {key: understood[key] for key in written} == written

    @pytest.mark.slow
    def test_it_teaches_a_tiny_model(self, place: Path, tmp_path: Path) -> None:
        quick = {"epochs": 15, "learning_rate": 3e-3, "batch_size": 8, "accumulate": 1, "targets": ALL, "threads": 1}
        made = trainer(place, python=PYTHON, **quick).train(TASK, examples(), into=tmp_path, seed=0)
        assert made.manifest["outcome"]["loss"][1] < 1 < made.manifest["outcome"]["loss"][0]
        assert made.manifest["metrics"]["agreement"] > made.manifest["metrics"]["base_agreement"]
        assert made.manifest["metrics"]["json_validity"] == 1.0
