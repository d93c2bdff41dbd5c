"""The child that fine-tunes with mlx-lm. A script with one argument, the job's folder (see _training.py).

It imports nothing of ours. A run that was killed starts again: mlx-lm keeps weights, but neither optimizer nor place in
the data. Source of the settings: https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md (MIT).
"""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_ours = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_child.py"))))


def main() -> None:
    """Train from the beginning, and leave the result."""
    import mlx_lm
    import numpy as np
    import yaml
    from mlx_lm import lora
    from mlx_lm.tuner.datasets import load_dataset

    folder = Path(sys.argv[1]).resolve()
    told = json.loads((folder / "settings.json").read_bytes())
    own = folder / "checkpoints"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    rows, held = _conversations(folder, "train"), _conversations(folder, "held", into="valid")
    config = config_of(told, folder, rows)
    if held < config["batch_size"]:  # mlx-lm looks at whole batches only
        (own / "valid.jsonl").unlink()
    (folder / "mlx.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    args = SimpleNamespace(**lora.CONFIG_DEFAULTS | config)
    np.random.seed(told["seed"])  # mlx-lm shuffles with it
    model, tokenizer = mlx_lm.load(told["base"])
    shown, looked_at, _ = load_dataset(args, tokenizer)
    tell = _Tell(folder / "progress.jsonl", config["iters"], told["accumulate"])
    lora.train_model(args, model, shown, looked_at, tell)
    draft = folder / ".result"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    as_peft(own / "adapters.safetensors", told, draft)
    outcome = {
        "steps": tell.steps,
        "loss": [tell.losses[0], tell.losses[-1]],
        "held_loss": tell.held[-1] if tell.held else None,
        "made_with": {name: version(name) for name in ("mlx", "mlx-lm")},
    }
    where = getattr(tokenizer, "name_or_path", told["base"])
    _ours.leave(folder, told, _ours.config_of(told["base"] if Path(told["base"]).is_dir() else where), outcome)


def config_of(told: Mapping[str, Any], folder: Path, rows: int) -> dict[str, Any]:
    """What mlx-lm is to do. An iteration of it is one batch; `accumulate` of them make a step."""
    own = folder / "checkpoints"
    batch = min(told["batch_size"], rows)
    an_epoch = rows // batch
    steps = max(1, math.ceil(an_epoch * told["epochs"] / told["accumulate"]))
    warm = min(round(told["warmup"] * steps), steps - 1)
    return {
        "model": told["base"],
        "train": True,
        "data": str(own),
        "adapter_path": str(own),
        "fine_tune_type": "lora",
        "mask_prompt": True,  # only the answer is learned
        "num_layers": -1,
        "lora_parameters": {
            "rank": told["rank"],
            "scale": told["alpha"] / told["rank"],
            "dropout": told["dropout"],
            "keys": [_place(name) for name in told["targets"]],
        },
        "batch_size": batch,
        "grad_accumulation_steps": told["accumulate"],
        "iters": steps * told["accumulate"],
        "max_seq_length": told["max_length"],
        "optimizer": "adamw",
        "optimizer_config": {"adamw": {"weight_decay": told["weight_decay"]}},
        "learning_rate": told["learning_rate"],
        "lr_schedule": {
            "name": "linear_schedule",
            "arguments": [told["learning_rate"], 0.0, steps - warm],
            "warmup": warm,
        },
        "seed": told["seed"],
        "val_batches": -1,
        "steps_per_eval": an_epoch,
        "steps_per_report": told["accumulate"],
        "save_every": steps * told["accumulate"],
    }


def _place(target: str) -> str:
    return f"mlp.{target}" if target in ("gate_proj", "up_proj", "down_proj") else f"self_attn.{target}"


def _conversations(folder: Path, name: str, into: str | None = None) -> int:
    """How many rows there are, which now lie as whole conversations as well."""
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    with (folder / "checkpoints" / f"{into or name}.jsonl").open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps({"messages": [*line["prompt"], *line["completion"]]}) + "\n")
    return len(lines)


def as_peft(path: Path, told: Mapping[str, Any], draft: Path) -> None:
    """The adapter as PEFT has it: named otherwise, and both matrices turned."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    found = {}
    for name, tensor in load_file(path).items():
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b"):
            raise ValueError(f"{name!r} is no part of a LoRA")
        turned = np.ascontiguousarray(tensor.astype(np.float32).T)
        found[f"base_model.model.{module}.lora_{part[-1].upper()}.weight"] = turned
    if not found:
        raise ValueError("mlx-lm has trained nothing: the base has none of the targets")
    save_file(found, draft / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": told["rank"],
        "lora_alpha": told["alpha"],
        "lora_dropout": told["dropout"],
        "target_modules": list(told["targets"]),
        "bias": "none",
        "inference_mode": True,
    }
    (draft / "adapter_config.json").write_text(json.dumps(about))


class _Tell:
    """Tells how far mlx-lm has come. Its callback has two methods."""

    def __init__(self, path: Path, iterations: int, accumulate: int) -> None:
        self._path = path
        self._accumulate = accumulate
        self._all = iterations // accumulate
        self._began = time.monotonic()
        self.steps = 0
        self.losses: list[float] = []
        self.held: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.steps = train_info["iteration"] // self._accumulate
        self.losses.append(float(train_info["train_loss"]))
        each = (time.monotonic() - self._began) / self.steps
        line = {"step": self.steps, "steps": self._all, "loss": self.losses[-1]}
        _ours.append(self._path, line | {"eta": round(each * (self._all - self.steps), 1)})

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self.held.append(float(val_info["val_loss"]))
        _ours.append(self._path, {"step": self.steps, "steps": self._all, "held_loss": self.held[-1]})


if __name__ == "__main__":
    main()
