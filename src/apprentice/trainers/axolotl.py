"""Fine-tunes a language model here with Axolotl: LoRA by the program of that name, in an environment of its own."""

from __future__ import annotations

from typing import Literal

from apprentice.trainers import _lora
from apprentice.trainers._lora import Tier
from apprentice.trainers._training import Trained
from apprentice.types import Json

_NEEDED = ("axolotl", "torch", "transformers", "peft", "yaml", "gguf", "safetensors")
_SILENT = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}


def build(
    base_model: str | None = None,
    gguf: str | None = None,
    tier: Tier | None = None,
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
    pass_env: list[str] | None = None,
    python: str | None = None,
    threads: int | None = None,
    fields: list[str] | None = None,
    confidence: Literal["margin", "logprob"] = "margin",
    serving: dict[str, Json] | None = None,
) -> Trained:
    """A trainer for any task: a LoRA made by Axolotl, served by the model plugin llama_cpp.

    The settings are those of the trainer `huggingface`, without preferences and `full`. `python`: the interpreter of an
    environment that has Axolotl.
    What Axolotl is told lies as axolotl.yml in the job's folder. A training that was killed starts again.
    Raises ConfigError for settings out of range, MissingExtra where the interpreter lacks a package.
    """
    recipe = _lora.recipe("axolotl", locals(), needed=_NEEDED, extra="axolotl", env=_SILENT, resumes=False)
    return Trained(recipe)
