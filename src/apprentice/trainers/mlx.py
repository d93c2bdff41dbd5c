"""Fine-tunes a language model with MLX: LoRA on Apple's chips by mlx-lm, in a child process."""

from __future__ import annotations

from typing import Literal

from apprentice.errors import ConfigError
from apprentice.trainers import _lora
from apprentice.trainers._lora import ATTENTION, Tier
from apprentice.trainers._training import Trained
from apprentice.types import Json

_NEEDED = ("mlx_lm", "mlx", "yaml", "numpy", "gguf", "safetensors")
_KNOWN = (*ATTENTION, "gate_proj", "up_proj", "down_proj")  # the child knows where they are in a layer


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
    held: float = 0.1,
    python: str | None = None,
    threads: int | None = None,
    fields: list[str] | None = None,
    confidence: Literal["margin", "logprob"] = "margin",
    serving: dict[str, Json] | None = None,
) -> Trained:
    """A trainer for any task: a LoRA made by mlx-lm, served by the model plugin llama_cpp.

    The settings are those of the trainer `huggingface`, without preferences and `full`, and but for these: `base_model` is
    a folder with safetensors or a name in the local cache of the Hub (MLX trains no GGUF file), in 4 bits where it is so
    already; `targets` are projections of attention or of the layers after it; what is kept back never stops a training, its
    loss is looked at once an epoch. A training that was killed starts again.
    Raises ConfigError for settings out of range, MissingExtra where the interpreter lacks a package.
    """
    recipe = _lora.recipe("mlx", locals(), needed=_NEEDED, extra="mlx", env={}, resumes=False)
    if recipe.base.endswith(".gguf"):
        raise ConfigError(
            "trainer 'mlx': `base_model` is missing: MLX trains no GGUF file",
            hint="base_model: the folder with the safetensors of the same model, or its name on the Hub",
        )
    if unknown := set(targets or ()) - set(_KNOWN):
        raise ConfigError(
            f"trainer 'mlx': there is no target {min(unknown)!r}", hint=f"targets: some of {', '.join(_KNOWN)}"
        )
    return Trained(recipe)
