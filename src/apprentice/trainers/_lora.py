"""What the trainers of LoRAs here have in common: settings and their ranges, sizes, and a recipe made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from apprentice import weights
from apprentice.errors import ConfigError
from apprentice.trainers._training import Recipe, interpreter, passed
from apprentice.trainers._wholes import ARCHITECTURES as WHOLE
from apprentice.types import Json

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

type Tier = Literal["slm", "small", "medium"]


class Preset(NamedTuple):
    """What a size means. `latency_ms`: what an answer is to take at p95, which the manifest says as the version's target;
    a gate of the task can hold it to that."""

    base: str
    latency_ms: int
    learning_rate: float


TIERS: dict[Tier, Preset] = {  # all of them Apache-2.0; their makers publish them as GGUF as well
    "slm": Preset("Qwen/Qwen2.5-0.5B-Instruct", 50, 2e-4),
    "small": Preset("Qwen/Qwen2.5-1.5B-Instruct", 200, 2e-4),
    "medium": Preset("Qwen/Qwen2.5-7B-Instruct", 1000, 2e-4),
}
_LARGE = 17e9  # bytes of a file that is served: 32 billion parameters fill them even in 4 bits
_RANGES: dict[str, Callable[[Any], bool]] = {
    "rank": lambda value: 1 <= value <= 512,
    "alpha": lambda value: value >= 1,
    "dropout": lambda value: 0 <= value < 1,
    "targets": lambda value: value is None or len(value) > 0,
    "learning_rate": lambda value: value is None or 0 < value <= 1,
    "batch_size": lambda value: value >= 1,
    "accumulate": lambda value: value >= 1,
    "epochs": lambda value: 1 <= value <= 100,
    "max_length": lambda value: value >= 16,
    "warmup": lambda value: 0 <= value < 1,
    "weight_decay": lambda value: value >= 0,
    "patience": lambda value: value >= 0,
    "held": lambda value: 0 <= value <= 0.5,
    "checkpoint_every": lambda value: value >= 1,
    "threads": lambda value: value is None or value >= 1,
    "beta": lambda value: value > 0,
    "preference_rate": lambda value: 0 < value <= 1,
    "preference_epochs": lambda value: 1 <= value <= 100,
    "least_pairs": lambda value: value >= 1,
}
_TOLD = (  # to the child, as they are, by trainers that have them
    "tier", "rank", "alpha", "dropout", "batch_size", "accumulate", "epochs", "max_length", "warmup", "weight_decay",
    "patience", "checkpoint_every", "quantise", "dtype",
)  # fmt: skip
_PREFERRED = ("beta", "preference_rate", "preference_epochs")  # told as well where preferences are learned
_OF_LORA = ("rank", "alpha", "dropout", "targets")  # not told where all numbers are learned
_FULL_RATE = 2e-5  # all numbers at once take smaller steps than a few new ones beside them


def recipe(
    trainer: str,
    given: Mapping[str, Any],
    *,
    needed: Sequence[str],
    extra: str,
    env: Mapping[str, str],
    ready: Callable[[str], None] | None = None,
    resumes: bool = True,
) -> Recipe:
    """What these settings of `build` come to: `_NAME_run.py` beside this file, in an interpreter that has `needed`.

    `ready`: given the interpreter, raises where it cannot train here. Raises ConfigError, MissingExtra.
    """
    for name, fine in _RANGES.items():
        if name in given and not fine(given[name]):
            raise ConfigError(f"trainer {trainer!r}: {name} is out of range: {given[name]!r}", hint="see `build`")
    base, served, rate = _base(trainer, given["base_model"], given["gguf"], given["tier"])
    full, method = given.get("full", False), given.get("method", "sft")
    settings: dict[str, Json] = {name: given[name] for name in _TOLD if name in given}
    settings |= {
        "method": method,
        "targets": sorted(given["targets"] or ATTENTION),
        "learning_rate": given["learning_rate"] or (_FULL_RATE if full else rate),
    }
    if method == "dpo":
        settings |= {name: given[name] for name in _PREFERRED}
    if full:
        _check_full(trainer, given, served)
        settings = {name: value for name, value in settings.items() if name not in _OF_LORA}
        settings |= {"full": True, "gguf": str(served), "quantise": "none"}
    known = passed(given.get("pass_env") or (), trainer) | dict(env)
    if "report_to" in given:
        settings["report_to"] = given["report_to"] or []
    if given["threads"] is not None:
        known["OMP_NUM_THREADS"] = str(given["threads"])
    apart = {"bitsandbytes": "quantise: 4bit"} if given.get("quantise") == "4bit" else {}
    program = interpreter(given["python"], needed, extra=extra, trainer=trainer, apart=apart)
    script = str(Path(__file__).with_name(f"_{trainer}_run.py"))
    return Recipe(
        trainer,
        base,
        served,
        settings,
        command=lambda folder: [program, "-I", script, str(folder)],  # -I: modules beside it have names of packages
        env=known,
        counted=given["fields"],
        rule=given["confidence"],
        held=given["held"],
        serving=dict(given["serving"] or {}),
        ready=None if ready is None else lambda: ready(program),
        resumes=resumes,
        kind="model" if full else "adapter",
        least_pairs=given["least_pairs"] if method == "dpo" else None,
        latency_ms=None if given["tier"] is None else TIERS[given["tier"]].latency_ms,
    )


def _check_full(trainer: str, given: Mapping[str, Any], served: Path) -> None:
    """Raise ConfigError where a whole model cannot be trained with these settings, or not be served afterwards."""
    if given["quantise"] == "4bit":
        raise ConfigError(
            f"trainer {trainer!r}: quantise: 4bit is for adapters, not for full: true", hint="leave it out"
        )
    if given["method"] != "sft":
        raise ConfigError(
            f"trainer {trainer!r}: method: dpo teaches an adapter, and full: true a whole model", hint="one of them"
        )
    if served.is_file() and (architecture := weights.check(served).architecture) not in WHOLE:
        raise ConfigError(
            f"trainer {trainer!r}: full: true knows {', '.join(WHOLE)}, and {served} is a {architecture!r}",
            hint="full: false trains an adapter",
        )


def _base(trainer: str, base_model: str | None, gguf: str | None, tier: Tier | None) -> tuple[str, Path, float]:
    """What is trained, what is served, and how fast to learn."""
    if tier is not None and base_model is not None:
        raise ConfigError(
            f"trainer {trainer!r}: `tier` names a base, and so does `base_model`", hint="give one of them"
        )
    base = TIERS[tier].base if tier is not None else base_model or gguf
    served = gguf or (base if base is not None and base.endswith(".gguf") else None)
    if base is None or served is None:
        raise ConfigError(
            f"trainer {trainer!r}: `gguf` is missing: the base as a file that llama.cpp serves",
            hint="gguf: base.gguf; it is trained, too, where no `base_model` is given",
        )
    path = Path(served)
    large = tier is None and path.is_file() and path.stat().st_size >= _LARGE
    return base, path, 1e-4 if large else TIERS[tier].learning_rate if tier is not None else 2e-4
