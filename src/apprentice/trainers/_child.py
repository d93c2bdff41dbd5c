"""What the children that train have in common. They run this file by its path: they import nothing of ours.

A child may have an environment of its own, which has a fine-tuning library and not us (see _training.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import runpy
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_KEPT = ("adapter_config.json", "adapter_model.safetensors")
_FILLS = 0.6  # of the GPU's memory: a base that is larger leaves too little for learning
_WHOLE = (  # of a whole model, beside its safetensors
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip


def base_folder(folder: Path, told: Mapping[str, Any]) -> str:
    """Where the base is, as safetensors: a GGUF file is written as such once. With torch and transformers."""
    import transformers

    if not told["base"].endswith(".gguf"):
        return str(told["base"])
    target = folder / "base"
    if not target.is_dir():
        path = Path(told["base"])
        at = {"gguf_file": path.name, "local_files_only": True}
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype_of(told), **at)
        model.hf_quantizer, model.is_quantized = None, False  # it is no longer
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        draft = folder / ".base"
        shutil.rmtree(draft, ignore_errors=True)
        model.to(dtype_of(told)).save_pretrained(draft)
        transformers.AutoTokenizer.from_pretrained(path.parent, **at).save_pretrained(draft)
        sync(draft)
        draft.rename(target)
    return str(target)


def dtype_of(told: Mapping[str, Any]) -> Any:
    """The numbers that a base is held in. All of them learned, 16 bits are too few to add small steps to."""
    import torch

    if told["dtype"] == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and not told.get("full") else torch.float32
    return getattr(torch, told["dtype"])


def in_four_bits(base: str, told: Mapping[str, Any]) -> bool:
    """Whether the base is held in 4 bits: as asked for, or because it would fill most of the GPU otherwise. With torch."""
    if told["quantise"] != "auto":
        return bool(told["quantise"] == "4bit")
    import torch

    if not torch.cuda.is_available():
        return False
    size, room = _size(base), torch.cuda.get_device_properties(0).total_memory
    about = f"quantise: auto: the base has {size / 1e9:.1f} GB, the GPU {room / 1e9:.1f}"
    if not size:
        about, wanted = f"quantise: auto: no safetensors of {base} are found: its size is not known", False
    else:
        wanted = bool(size > _FILLS * room)
    there = importlib.util.find_spec("bitsandbytes") is not None
    missing = ", for want of a package: pip install bitsandbytes" if wanted and not there else ""
    print(f"{about}; {'in' if wanted and there else 'not in'} 4 bits{missing}", flush=True)  # noqa: T201 - to the log
    return wanted and there


def _size(base: str) -> int:
    """Bytes of the base's safetensors, in its folder or in the Hub's local cache; 0: there are none."""
    folder = Path(base)
    if not folder.is_dir():
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(base, "config.json")
        if not isinstance(found, str):
            return 0
        folder = Path(found).parent
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def config_of(base: str) -> dict[str, Any]:
    """What the base's config.json says."""
    if Path(base).is_dir():
        return dict(json.loads((Path(base) / "config.json").read_bytes()))
    import transformers

    return dict(transformers.AutoConfig.from_pretrained(base, local_files_only=True).to_dict())


def append(path: Path, line: Mapping[str, Any]) -> None:
    """One more line of progress."""
    half = path.exists() and not path.read_bytes().endswith(b"\n")  # the one before us was killed in the middle
    with path.open("ab") as file:
        file.write(b"\n" * half + json.dumps(line).encode() + b"\n")


def leave(folder: Path, told: Mapping[str, Any], config: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
    """Publish what lies in FOLDER/.result: an adapter as PEFT has it, and beside it as GGUF; or, with `full`, in
    FOLDER/.result/model a whole model in both forms. `config`: of the base."""
    draft = folder / ".result"
    if told.get("full"):
        _leave_whole(draft / "model", told)
    else:
        _leave_adapter(draft, told, config)
    (draft / "outcome.json").write_text(json.dumps(outcome))
    sync(draft)
    peak = max(resource.getrusage(whose).ru_maxrss for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    told_last = {"step": outcome["steps"], "eta": 0.0, "peak_memory": peak * (1 if sys.platform == "darwin" else 1024)}
    append(folder / "progress.jsonl", told_last)
    draft.rename(folder / "result")


def _leave_adapter(draft: Path, told: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    _clear(draft, lambda name: name in _KEPT)
    about = json.loads((draft / "adapter_config.json").read_bytes())
    about |= {"base_model_name_or_path": told["base"], "target_modules": sorted(about["target_modules"])}
    (draft / "adapter_config.json").write_text(json.dumps(about, indent=1, sort_keys=True))
    write = runpy.run_path(str(Path(__file__).with_name("_adapters.py")))["lora_to_gguf"]
    write(draft, config, draft / "adapter.gguf")


def _leave_whole(draft: Path, told: Mapping[str, Any]) -> None:
    _clear(draft, lambda name: name in _WHOLE or (name.startswith("model") and name.endswith(".safetensors")))
    write = runpy.run_path(str(Path(__file__).with_name("_wholes.py")))["model_to_gguf"]
    write(draft, Path(told["gguf"]), draft / "model.gguf")


def _clear(folder: Path, keeps: Callable[[str], bool]) -> None:
    for path in folder.iterdir():
        if not keeps(path.name):
            path.unlink() if path.is_file() else shutil.rmtree(path)


def sync(folder: Path) -> None:
    """What lies in the folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
