"""The child that fine-tunes with Axolotl. A script with one argument, the job's folder (see _training.py).

It writes what Axolotl is to do as a file, runs it, and tells from its log how far it has come. It imports nothing of ours.
A run that was killed starts again: to go on, Axolotl would read optimizer and dice by torch.load.
Source of the settings: https://docs.axolotl.ai/docs/config-reference.html and …/dataset-formats/conversation.html.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_ours = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_child.py"))))
_LOGGED = re.compile(r"\{'(?:eval_)?loss': [^{}]*\}")


def main() -> None:
    """Run Axolotl from the beginning, and leave the result."""
    import torch
    import yaml

    folder = Path(sys.argv[1]).resolve()
    told = json.loads((folder / "settings.json").read_bytes())
    own = folder / "checkpoints"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    base = _ours.base_folder(folder, told)
    looked_at = _conversations(folder, "held") > 0
    _conversations(folder, "train")
    config = config_of(told, folder, base, looked_at=looked_at)
    config["bf16"] = _ours.dtype_of(told) is torch.bfloat16
    if _ours.in_four_bits(base, told):
        config |= {"adapter": "qlora", "load_in_4bit": True}
    if not torch.cuda.is_available():  # they are written for GPUs, and chosen by default
        config |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    (folder / "axolotl.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    lines = list(_told(folder, told))
    losses = [line["loss"] for line in lines if "loss" in line]
    draft = folder / ".result"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(own / "out" / name, draft)
    outcome = {
        "steps": lines[-1]["step"],
        "loss": [losses[0], losses[-1]],
        "held_loss": min((line["held_loss"] for line in lines if "held_loss" in line), default=None),
        "made_with": {name: version(name) for name in ("axolotl", "torch", "transformers", "peft")},
    }
    _ours.leave(folder, told, _ours.config_of(base), outcome)


def config_of(told: Mapping[str, Any], folder: Path, base: str, *, looked_at: bool) -> dict[str, Any]:
    """What Axolotl is to do. `looked_at`: there are rows that are kept back."""
    own = folder / "checkpoints"
    config = {
        "base_model": base,
        "chat_template": "tokenizer_default",
        "datasets": [_dataset(own / "train.jsonl")],
        "dataset_prepared_path": str(own / "prepared"),
        "output_dir": str(own / "out"),
        "adapter": "lora",
        "lora_r": told["rank"],
        "lora_alpha": told["alpha"],
        "lora_dropout": told["dropout"],
        "lora_target_modules": list(told["targets"]),
        "sequence_len": told["max_length"],
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "micro_batch_size": told["batch_size"],
        "gradient_accumulation_steps": told["accumulate"],
        "num_epochs": told["epochs"],
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "learning_rate": told["learning_rate"],
        "warmup_ratio": told["warmup"],
        "weight_decay": told["weight_decay"],
        "fp16": False,
        "logging_steps": 1,
        "save_only_model": True,  # optimizer and dice would be pickles, and nobody reads them
        "save_total_limit": 3,
        "seed": told["seed"],
    }
    if not looked_at:
        return config | {"val_set_size": 0, "save_strategy": "no"}
    config |= {
        "test_datasets": [_dataset(own / "held.jsonl") | {"split": "train"}],
        "eval_steps": told["checkpoint_every"],
        "save_steps": told["checkpoint_every"],
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }
    return config | ({"early_stopping_patience": told["patience"]} if told["patience"] else {})


def _dataset(path: Path) -> dict[str, Any]:
    """Conversations of which only the answer at the end is learned, not those that a task gives as examples."""
    return {
        "path": str(path),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles_to_train": [],
        "message_field_training": "train",
        "train_on_eos": "turn",
    }


def _conversations(folder: Path, name: str) -> int:
    """How many rows there are, which now lie as whole conversations as well."""
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    with (folder / "checkpoints" / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for line in lines:
            messages = [message | {"train": False} for message in line["prompt"]]
            messages += [message | {"train": True} for message in line["completion"]]
            file.write(json.dumps({"messages": messages}) + "\n")
    return len(lines)


def _told(folder: Path, told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What Axolotl tells, while it runs, as lines of progress. Ends the program when it fails or tells nothing."""
    # A copy of the rows beside everybody's data would outlive the job.
    env = os.environ | {"HF_DATASETS_CACHE": str(folder / "checkpoints" / "cache")}
    argv = [sys.executable, "-I", "-m", "axolotl.cli.train", str(folder / "axolotl.yml")]
    # close_fds: the lock on the folder is held by all that are at work in it (_turn.py).
    began, step = time.monotonic(), 0
    with subprocess.Popen(  # noqa: S603 - the interpreter that runs this
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True, errors="replace", close_fds=False
    ) as run:
        assert run.stdout is not None
        for text in run.stdout:
            print(text, end="", flush=True)  # noqa: T201 - to the log
            for logged in logged_in(text):
                step += "loss" in logged
                steps = max(step, round(step * told["epochs"] / logged["epoch"])) if logged["epoch"] else step
                each = (time.monotonic() - began) / step if step else None
                line = {"step": step, "steps": steps, "eta": None if each is None else round(each * (steps - step), 1)}
                line |= {ours: logged[theirs] for ours, theirs in _NAMES.items() if theirs in logged}
                _ours.append(folder / "progress.jsonl", line)
                yield line
    if run.returncode:
        sys.exit(f"axolotl ended with {run.returncode}: what it said is above, what it was told in axolotl.yml")
    if not step:
        sys.exit("axolotl trained no step: see above, and axolotl.yml")


_NAMES = {"loss": "loss", "held_loss": "eval_loss"}


def logged_in(text: str) -> Iterator[dict[str, float]]:
    """The losses in a line of the log: loss or eval_loss, and epoch. One line is one step, because each is logged."""
    for found in _LOGGED.finditer(text):
        line = ast.literal_eval(found[0])
        yield {name: float(line[name]) for name in ("loss", "eval_loss", "epoch") if name in line}


if __name__ == "__main__":
    main()
