"""Fine-tunes a language model here with TRL and PEFT, in a child process that may have an environment of its own."""

from __future__ import annotations

from typing import Literal

from apprentice.trainers import _lora
from apprentice.trainers._lora import Tier
from apprentice.trainers._training import Trained
from apprentice.types import Json

_NEEDED = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "gguf", "safetensors")


def build(
    base_model: str | None = None,
    gguf: str | None = None,
    tier: Tier | None = None,
    method: Literal["sft", "dpo"] = "sft",
    full: bool = False,
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
    """A trainer for any task: a LoRA on a language model, or all of it, served by the model plugin llama_cpp.

    `base_model`: a folder with safetensors, a GGUF file (which is read as such), or a name in the local cache of the
    Hub; `gguf`: the same model as a GGUF file to be served, which is also what is trained without `base_model`. `tier`: a
    size instead of a base. `method`: "dpo" learns the right answers as "sft" does, and then, for `preference_epochs` at
    the rate `preference_rate`, to prefer them to the local answers that people or the remote corrected; a larger `beta`
    keeps it nearer to what it was, and fewer than `least_pairs` such answers are an error. `full`: all numbers of the
    model are learned instead of a LoRA, with about 16 bytes of memory for each. `rank`, `alpha`, `dropout`, `targets`: of
    the LoRA; the projections of attention without `targets`. `learning_rate`: 2e-4, 1e-4 where the GGUF file has 17 GB
    and more, 2e-5 with `full`. `batch_size` x `accumulate` conversations make a step. `max_length` in tokens; `warmup`:
    share of the steps. `held`: share of the examples that is kept back, for calibration and to stop when their loss has
    not fallen for `patience` looks (0: never), one each `checkpoint_every` steps. `quantise`: the base in 4 bits, "auto"
    where it would fill a GPU; that needs the package bitsandbytes, which the extra does not bring: "4bit" without it is an
    error, "auto" says so in the log and goes on without. `dtype`: of the base, "auto" float32 on a CPU. `report_to`:
    trackers that TRL speaks to, `pass_env`: the variables that they need, which the child gets beside paths and language.
    `python`: the interpreter of an environment that has torch. `threads`: of a CPU. `fields` and `confidence` as llama_cpp
    has them, and `serving`: its other settings, with which probes are recorded.
    Raises ConfigError for settings out of range, MissingExtra where the interpreter lacks a package.
    """
    return Trained(_lora.recipe("huggingface", locals(), needed=_NEEDED, extra="train", env={}))
