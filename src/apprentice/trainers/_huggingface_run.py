"""The child that fine-tunes with TRL and PEFT. A script with one argument, the job's folder (see _training.py).

It imports nothing of ours, because it may run in an environment that has torch and not us. Everything that it goes on from
is safetensors and JSON: what transformers would write and read with pickle is replaced here. With the method "dpo", the
right answers are learned first, and then to prefer them; what came of the first lies in checkpoints/taught.
"""

from __future__ import annotations

import gc
import json
import random
import runpy
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers
import trl
from safetensors.torch import load_file, save_file

_WHOLE = "whole.json"  # written last: a checkpoint without it was interrupted
type _Start = Callable[[], tuple[Any, Any, Any]]  # model, tokenizer, and the settings of the adapter that it is to get

_ours = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_child.py"))))


def main(made: Callable[[str, dict[str, Any]], tuple[Any, Any, Any]] | None = None) -> None:
    """Go on from the last whole checkpoint, or begin, and leave the result.

    `made`: gives model, tokenizer and, where the model has no adapter yet, the settings of one.
    """
    folder = Path(sys.argv[1])
    told = json.loads((folder / "settings.json").read_bytes())
    base = _ours.base_folder(folder, told)

    def start() -> tuple[Any, Any, Any]:
        transformers.set_seed(told["seed"])
        found = (made or _made)(base, told)
        transformers.set_seed(told["seed"])  # the adapter's first numbers do not depend on what was loaded before
        return found

    draft = folder / ".result"
    if told["method"] == "sft":
        config, outcome = _shown(folder, told, start, draft / "model" if told.get("full") else draft)
    else:
        taught = folder / "checkpoints" / "taught"
        if not taught.is_dir():
            _show_first(folder, told, start, taught)
        config, outcome = _preferred(folder, told, start, taught, draft)
    _ours.leave(folder, told, config, outcome)


def _shown(folder: Path, told: dict[str, Any], start: _Start, into: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json of the base, and what came of learning the right answers, which lies in `into`."""
    model, tokenizer, lora = start()
    config = model.config
    rows, held = _rows(folder / "train.jsonl"), _rows(folder / "held.jsonl")
    trainer = _Showing(
        model=model,
        args=trl.SFTConfig(
            **_arguments(folder / "checkpoints", told, looked_at=held is not None),
            learning_rate=told["learning_rate"],
            num_train_epochs=told["epochs"],
            packing=False,
            completion_only_loss=True,
        ),
        train_dataset=rows,
        eval_dataset=held,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=_callbacks(folder, told, looked_at=held is not None),
    )
    return config.to_dict(), _trained(trainer, into)


def _show_first(folder: Path, told: dict[str, Any], start: _Start, taught: Path) -> None:
    """What preferences are learned on top of: the adapter that has learned the right answers, in `taught`."""
    draft = taught.with_name(".taught")
    _, outcome = _shown(folder, told, start, draft)
    (draft / "outcome.json").write_text(json.dumps(outcome))
    _ours.sync(draft)
    draft.rename(taught)
    gc.collect()  # of the model, before there is a second one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _preferred(
    folder: Path, told: dict[str, Any], start: _Start, taught: Path, into: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `_shown`, of learning to prefer the right answers to the local model's own wrong ones (Rafailov et al., Direct
    Preference Optimization, 2023). What they are measured against is the adapter in `taught`."""
    before = json.loads((taught / "outcome.json").read_bytes())
    model, tokenizer, lora = start()
    config = model.config
    model = model if lora is None else peft.get_peft_model(model, lora)
    peft.set_peft_model_state_dict(model, load_file(taught / "adapter_model.safetensors"))
    rows, held = _pairs(folder / "train.jsonl"), _pairs(folder / "held.jsonl")
    trainer = _Preferring(
        model=model,
        args=trl.DPOConfig(
            **_arguments(folder / "checkpoints" / "preferences", told, looked_at=held is not None),
            learning_rate=told["preference_rate"],
            num_train_epochs=told["preference_epochs"],
            beta=told["beta"],
        ),
        train_dataset=rows,
        eval_dataset=held,
        processing_class=tokenizer,
        callbacks=_callbacks(folder, told, looked_at=held is not None, before=before["steps"]),
    )
    outcome = _trained(trainer, into)
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
    after = {key: outcome[key] for key in ("steps", "loss", "held_loss", "best_step")}
    after |= {"pairs": len(rows), "margin": [margins[0], margins[-1]] if margins else None}
    return config.to_dict(), before | {"steps": before["steps"] + outcome["steps"], "preferences": after}


def _callbacks(folder: Path, told: dict[str, Any], *, looked_at: bool, before: int = 0) -> list[Any]:
    tell = _Tell(folder / "progress.jsonl", before)
    return [tell, *([transformers.EarlyStoppingCallback(told["patience"])] if looked_at and told["patience"] else [])]


def _trained(trainer: Any, into: Path) -> dict[str, Any]:
    """What came of it, from its last whole checkpoint on; the weights lie in `into`."""
    last = _last(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    shutil.rmtree(into, ignore_errors=True)
    trainer.save_model(str(into))
    logged = trainer.state.log_history
    losses = [line["loss"] for line in logged if "loss" in line]
    return {
        "steps": trainer.state.global_step,
        "loss": [losses[0], losses[-1]] if losses else None,
        "held_loss": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "made_with": {one.__name__: one.__version__ for one in (torch, transformers, peft, trl)},
    }


def _made(base: str, told: dict[str, Any]) -> tuple[Any, Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
    return _model(base, told), tokenizer, None if told.get("full") else _lora(told)


def _model(base: str, told: dict[str, Any]) -> Any:
    """The base; in 4 bits where that is asked for, or where it fills most of the GPU otherwise."""
    settings: dict[str, Any] = {"dtype": _ours.dtype_of(told), "local_files_only": True, "use_safetensors": True}
    if _ours.in_four_bits(base, told):
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **settings)
    return peft.prepare_model_for_kbit_training(model) if "quantization_config" in settings else model


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _rows(path: Path) -> Any:
    """The right answers."""
    lines = [{name: line[name] for name in ("prompt", "completion")} for line in _lines(path)]
    return datasets.Dataset.from_list(lines) if lines else None


def _pairs(path: Path) -> Any:
    """The right answers that have a wrong one beside them."""
    lines = [
        {"prompt": line["prompt"], "chosen": line["completion"], "rejected": line["rejected"]}
        for line in _lines(path)
        if "rejected" in line
    ]
    return datasets.Dataset.from_list(lines) if lines else None


def _lora(told: dict[str, Any]) -> Any:
    return peft.LoraConfig(
        r=told["rank"],
        lora_alpha=told["alpha"],
        lora_dropout=told["dropout"],
        target_modules=told["targets"],
        task_type="CAUSAL_LM",
    )


def _arguments(own: Path, told: dict[str, Any], *, looked_at: bool) -> dict[str, Any]:
    """What both ways of learning are told. `own`: for checkpoints; `looked_at`: something is kept back."""
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(own),
        "per_device_train_batch_size": told["batch_size"],
        "per_device_eval_batch_size": told["batch_size"],
        "gradient_accumulation_steps": told["accumulate"],
        "warmup_steps": told["warmup"],
        "weight_decay": told["weight_decay"],
        "max_length": told["max_length"],
        "optim": "adamw_torch",
        "seed": told["seed"],
        "use_cpu": not gpu,
        "bf16": _ours.dtype_of(told) is torch.bfloat16 or (gpu and told["dtype"] == "auto"),
        "gradient_checkpointing": gpu,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": told["checkpoint_every"],
        "save_total_limit": 3,  # so that the one before is there until this one is whole
        "eval_strategy": "steps" if looked_at else "no",
        "eval_steps": told["checkpoint_every"] if looked_at else None,
        "load_best_model_at_end": looked_at,
        "metric_for_best_model": "eval_loss" if looked_at else None,
        "greater_is_better": False if looked_at else None,
        "report_to": told["report_to"] or "none",
        "disable_tqdm": True,
    }


class _Checkpoints:
    """Of a trainer of transformers: they hold no pickle, and are known to be whole."""

    args: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any

    def _save_checkpoint(self, *args: Any, **named: Any) -> None:
        super()._save_checkpoint(*args, **named)  # type: ignore[misc]
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)
        _ours.sync(folder)
        (folder / _WHOLE).write_text(json.dumps({"step": self.state.global_step}))
        _ours.sync(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        found = self.optimizer.state_dict()
        tensors = {
            f"{place}.{name}": value.contiguous()
            for place, state in found["state"].items()
            for name, value in state.items()
        }
        save_file(tensors, Path(output_dir) / "optimizer.safetensors")
        beside = {"groups": found["param_groups"], "scheduler": self.lr_scheduler.state_dict()}
        (Path(output_dir) / "optimizer.json").write_text(json.dumps(beside))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        beside = json.loads((Path(checkpoint) / "optimizer.json").read_bytes())
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(Path(checkpoint) / "optimizer.safetensors").items():
            place, _, name = name.partition(".")
            state.setdefault(int(place), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": beside["groups"]})
        self.lr_scheduler.load_state_dict(beside["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        dice = {"cpu": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            dice["cuda"] = torch.cuda.random.get_rng_state()
        save_file(dice, Path(output_dir) / "dice.safetensors")
        name, keys, *rest = np.random.get_state()
        beside = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
        (Path(output_dir) / "dice.json").write_text(json.dumps(beside))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        beside = json.loads((Path(checkpoint) / "dice.json").read_bytes())
        version, numbers, gauss = beside["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, keys, *rest = beside["numpy"]
        np.random.set_state((name, np.array(keys, np.uint32), *rest))
        dice = load_file(Path(checkpoint) / "dice.safetensors")
        torch.random.set_rng_state(dice["cpu"])
        if "cuda" in dice and torch.cuda.is_available():
            torch.cuda.random.set_rng_state(dice["cuda"])


class _Showing(_Checkpoints, trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer by examples."""


class _Preferring(_Checkpoints, trl.DPOTrainer):  # type: ignore[misc]
    """TRL's trainer by preferences."""


class _Tell(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells how far it has come, a line each time that there is something to tell. `before`: steps taken before it."""

    def __init__(self, path: Path, before: int) -> None:
        self._path = path
        self._before = before
        self._began: tuple[float, int] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = self._began or (time.monotonic(), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        began, first = self._began or (time.monotonic(), state.global_step)
        done = state.global_step - first
        each = (time.monotonic() - began) / done if done else None
        line = {"step": self._before + state.global_step, "steps": self._before + state.max_steps}
        line |= {"eta": None if each is None else round(each * (state.max_steps - state.global_step), 1)}
        line |= {ours: logs[theirs] for ours, theirs in _NAMES.items() if theirs in logs}
        _ours.append(self._path, line)


_NAMES = {"loss": "loss", "held_loss": "eval_loss", "margin": "rewards/margins"}


def _last(checkpoints: Path) -> Path | None:
    """The latest whole checkpoint; what was interrupted is deleted."""
    found = {}
    for path in checkpoints.glob("checkpoint-*"):
        if (path / _WHOLE).exists():
            found[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    return found[max(found)] if found else None


if __name__ == "__main__":
    main()
