"""Fine-tunes a language model on a GPU here with Unsloth: LoRA with less memory, in an environment of its own."""

from __future__ import annotations

import subprocess
from typing import Literal

from apprentice.errors import ConfigError
from apprentice.trainers import _lora
from apprentice.trainers._lora import Tier
from apprentice.trainers._training import Trained, environment
from apprentice.types import Json

_NEEDED = ("unsloth", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "gguf", "safetensors")
_SILENT = {"UNSLOTH_DISABLE_STATISTICS": "1"}
_GPU = "import torch; print(torch.cuda.is_available() or (hasattr(torch, 'xpu') and torch.xpu.is_available()))"


def build(
    base_model: str | None = None,
    gguf: str | None = None,
    tier: Tier | None = None,
    method: Literal["sft", "dpo"] = "sft",
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    targets: list[str] | None = None,
    learning_rate: float | None = None,
    batch_size: int = 4,
    accumulate: int = 4,
    epochs: int = 3,
    max_length: int = 2048,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    patience: int = 3,
    held: float = 0.1,
    checkpoint_every: int = 50,
    quantise: Literal["auto", "4bit", "none"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    beta: float = 0.1,
    preference_rate: float = 5e-6,
    preference_epochs: int = 1,
    least_pairs: int = 50,
    report_to: list[str] | None = None,
    pass_env: list[str] | None = None,
    python: str | None = None,
    threads: int | None = None,
    fields: list[str] | None = None,
    confidence: Literal["margin", "logprob"] = "margin",
    serving: dict[str, Json] | None = None,
) -> Trained:
    """A trainer for any task: a LoRA made by Unsloth, served by the model plugin llama_cpp. Not yet run on a GPU.

    The settings are those of the trainer `huggingface`, but for `full`. `python`: the interpreter of an environment that
    has Unsloth.
    Raises ConfigError for settings out of range, MissingExtra where the interpreter lacks a package; `train` raises
    ConfigError, before it begins anything, where that interpreter finds no GPU.
    """
    recipe = _lora.recipe("unsloth", locals(), needed=_NEEDED, extra="unsloth", env=_SILENT, ready=_has_gpu)
    return Trained(recipe)


def _has_gpu(python: str) -> None:
    """Nothing, where torch finds a GPU. It is loaded for that, in a process of its own: seconds."""
    told = subprocess.run(  # noqa: S603 - the operator's own interpreter
        [python, "-I", "-c", _GPU], env=environment({}), capture_output=True, text=True, check=False
    )
    if told.returncode:
        raise ConfigError(f"trainer 'unsloth': torch cannot be loaded by {python}: {told.stderr[-300:]}")
    if told.stdout.strip() != "True":
        raise ConfigError(
            f"trainer 'unsloth' needs a GPU, and torch in {python} finds none",
            hint="fine_tune_backend: huggingface trains the same on a CPU",
        )
