"""A small program in the place of a fine-tuning library: steps, checkpoints, and an adapter that changes every answer.

What it makes depends on the settings and on each step, so that one that was lost or taken twice would show.
`settings.json`: `steps`, `effect` (0: an adapter that changes nothing), `fail_at` (a step), `halt_at` (a step to wait at),
`full` (a whole model, in which that adapter is merged). Each may be missing, as in the settings of a real trainer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

WIDTH, RANK = 128, 4
CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
# Looked for and not imported: that takes longer than all that is done here.
WRITERS = Path(str(importlib.util.find_spec("apprentice").origin)).parent / "trainers"  # type: ignore[union-attr]
USUAL = {"steps": 12, "effect": 1.0, "fail_at": None, "halt_at": 8}


def main() -> None:
    folder = Path(sys.argv[1])
    told = USUAL | json.loads((folder / "settings.json").read_bytes())
    step, numbers = restored(folder, told["seed"])
    while step < told["steps"]:
        step += 1
        if step == told["fail_at"]:
            sys.exit("the pupil gives up")
        while step == told["halt_at"] and (folder / "halt").exists():
            time.sleep(0.01)
        numbers = {
            name: value * 0.9 + np.random.default_rng(step).normal(size=value.shape) for name, value in numbers.items()
        }
        with (folder / "progress.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "steps": told["steps"], "loss": 1 / step, "eta": 0.0}) + "\n")
        if step % 5 == 0:
            keep(folder, step, numbers)
    draft = folder / ".result"
    draft.mkdir(exist_ok=True)
    scaled = {name: (value * told["effect"]).astype(np.float32) for name, value in numbers.items()}
    if told.get("full"):
        leave_whole(draft / "model", scaled, told)
    else:
        save_file(scaled, draft / "adapter_model.safetensors")
        (draft / "adapter_config.json").write_text(
            json.dumps({"lora_alpha": 8, "r": RANK, "base_model_name_or_path": told["base"]})
        )
        runpy.run_path(str(WRITERS / "_adapters.py"))["lora_to_gguf"](draft, CONFIG, draft / "adapter.gguf")
    seen = {"steps": step, "environment": sorted(os.environ), "offline": os.environ.get("HF_HUB_OFFLINE")}
    (draft / "outcome.json").write_text(json.dumps(seen))
    draft.rename(folder / "result")


def leave_whole(draft: Path, scaled: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    """The base with the adapter in it. `told["base"]` is a folder that `folders.as_folder` wrote."""
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(told["base"], draft)
    tensors = load_file(draft / "model.safetensors")
    for name in (name for name in scaled if name.endswith(".lora_A.weight")):
        place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        tensors[place] = tensors[place] + 8 / RANK * scaled[name.replace("lora_A", "lora_B")] @ scaled[name]
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    runpy.run_path(str(WRITERS / "_wholes.py"))["model_to_gguf"](draft, Path(told["gguf"]), draft / "model.gguf")


def restored(folder: Path, seed: int) -> tuple[int, dict[str, np.ndarray]]:
    steps = [int(path.stem) for path in (folder / "checkpoints").glob("*.safetensors")]
    if steps:
        return max(steps), load_file(folder / "checkpoints" / f"{max(steps)}.safetensors")
    dice = np.random.default_rng(seed)
    numbers = {}
    for layer in range(4):
        for module, rows in (("q_proj", WIDTH), ("v_proj", WIDTH // 2), ("o_proj", WIDTH)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            numbers[f"{name}.lora_A.weight"] = dice.normal(size=(RANK, WIDTH))
            numbers[f"{name}.lora_B.weight"] = dice.normal(size=(rows, RANK))
    return 0, numbers


def keep(folder: Path, step: int, numbers: dict[str, np.ndarray]) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    draft = folder / f".{step}"
    save_file(numbers, draft)
    draft.rename(folder / "checkpoints" / f"{step}.safetensors")


if __name__ == "__main__":
    main()
