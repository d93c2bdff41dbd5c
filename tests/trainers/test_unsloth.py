"""The trainer on Unsloth, as far as a machine without a GPU can show it: settings, and what is said where it cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.testing.tiny import write_tiny
from apprentice.testing.trainers import TASK, examples
from apprentice.trainers._training import Trained

from .folders import as_folder
from .programs import NO_GPU, python_with

NAMES = ("transformers", "peft", "trl", "datasets", "accelerate")
GPU = NO_GPU.replace("False", "True")
# Where Unsloth would be asked for a model, it says what it was asked.
ASKED = """
import json, os, sys
FIRST = not {"trl", "transformers", "peft"} & set(sys.modules)
class FastLanguageModel:
    def from_pretrained(base, **told):
        told |= {"base": base, "compiled": os.environ["UNSLOTH_COMPILE_LOCATION"], "first": FIRST}
        sys.exit("ASKED " + json.dumps(told))
"""
TORCH = GPU + "manual_seed = lambda seed: None\n"
RUN = """
def set_seed(seed): pass
class TrainerCallback: pass
"""


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    return str(write_tiny(tmp_path / "tiny.gguf"))


def python(folder: Path, **modules: str) -> str:
    return python_with(folder, {f"{name}.py": "" for name in NAMES} | {f"{k}.py": text for k, text in modules.items()})


def trainer(gguf: str, python: str | None, **settings: Any) -> Trained:
    made: Trained = plugins.build("trainers", "unsloth", gguf=gguf, python=python, **settings)
    return made


def test_an_interpreter_without_unsloth_is_said_with_the_extra(gguf: str) -> None:
    with pytest.raises(MissingExtra, match="'unsloth' is not installed") as raised:
        trainer(gguf, None)
    assert raised.value.hint == "pip install 'apprentice[unsloth]'"


def test_a_machine_without_a_gpu_is_said_before_anything_is_begun(gguf: str, tmp_path: Path) -> None:
    program = python(tmp_path / "env", unsloth="", torch=NO_GPU)
    made = trainer(gguf, program)
    with pytest.raises(ConfigError, match="needs a GPU") as raised:
        made.train(TASK, examples(), into=tmp_path / "models", seed=0)
    assert "huggingface" in (raised.value.hint or "")
    assert not (tmp_path / "models").exists()


def test_a_torch_that_cannot_be_loaded_is_said_in_its_own_words(gguf: str, tmp_path: Path) -> None:
    made = trainer(gguf, python(tmp_path / "env", unsloth="", torch="raise OSError('libcudart is missing')"))
    with pytest.raises(ConfigError, match="libcudart is missing"):
        made.train(TASK, examples(), into=tmp_path / "models", seed=0)
    assert not (tmp_path / "models").exists()


def test_its_settings_are_those_of_the_trainer_on_trl(gguf: str, tmp_path: Path) -> None:
    program = python(tmp_path / "env", unsloth="", torch=GPU, bitsandbytes="")
    settings = {"rank": 8, "alpha": 24, "batch_size": 3, "learning_rate": 0.002, "quantise": "4bit", "report_to": ["x"]}
    mine = trainer(gguf, program, **settings)._recipe
    both = {"unsloth.py": "", "torch.py": GPU, "bitsandbytes.py": "", **{f"{name}.py": "" for name in NAMES}}
    other = plugins.build(
        "trainers", "huggingface", gguf=gguf, python=python_with(tmp_path / "env2", both), **settings
    )._recipe
    assert mine.settings == other.settings
    assert mine.env["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert list(mine.command(Path("job")))[2].endswith("_unsloth_run.py")


def test_unsloth_is_asked_for_just_this_base_and_comes_before_trl(gguf: str, tmp_path: Path) -> None:
    base = as_folder(Path(gguf), tmp_path / "base")
    tells = {
        "unsloth": ASKED,
        "torch": TORCH,
        "transformers": RUN,
        "trl": "class SFTTrainer: pass\nclass DPOTrainer: pass\n",
        "bitsandbytes": "",
    }
    program = python(tmp_path / "env", **tells)
    [site] = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "safetensors").mkdir()
    for name, text in (("__init__", ""), ("torch", "load_file = save_file = None\n")):
        (site / "safetensors" / f"{name}.py").write_text(text)
    made = trainer(gguf, program, base_model=str(base), quantise="4bit", max_length=333, dtype="bfloat16")
    with pytest.raises(TrainingError, match="ASKED"):
        made.train(TASK, examples(), into=tmp_path / "models", seed=5)
    [log] = (tmp_path / "models").glob(".training/*/log")
    told = json.loads(log.read_text().split("ASKED ")[1].splitlines()[0])
    assert told["base"] == str(base)
    assert (told["max_seq_length"], told["load_in_4bit"], told["random_state"]) == (333, True, 5)
    assert told["first"], "it changes TRL and transformers when it is imported"
    assert told["use_exact_model_name"] is told["local_files_only"] is True
    assert told["compiled"] == str(log.parent.resolve() / "checkpoints" / "compiled")


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"tier": "huge"}, {"epochs": 0}, {"quantise": "2bit"}], ids=str)
def test_settings_that_are_wrong_are_said_at_once(gguf: str, tmp_path: Path, wrong: dict[str, Any]) -> None:
    program = python(tmp_path / "env", unsloth="", torch=GPU)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        trainer(gguf, program, **wrong)
