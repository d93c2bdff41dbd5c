"""A LoRA as llama.cpp reads it. Imports nothing of ours: the child that trains, in an environment of its own, runs it.

Names and layout as in convert_lora_to_gguf.py of https://github.com/ggml-org/llama.cpp (MIT): a tensor keeps the name of
the weight that it changes, with ".lora_a" or ".lora_b" behind it, and what is done to the rows of a weight is done to
those of its B.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ARCHITECTURES = {  # what config.json calls them, and what GGUF does
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


def lora_to_gguf(adapter_dir: Path, config: Mapping[str, Any], into: Path) -> None:
    """Write a PEFT folder (adapter_config.json, adapter_model.safetensors) as one GGUF file, with numbers of 32 bits.

    `config`: of the base, as its config.json has it. Raises ValueError for an architecture, or a tensor, that is not known.
    """
    import gguf
    from safetensors.numpy import load_file

    architecture = _ARCHITECTURES.get(str(config["model_type"]))
    if architecture is None:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ValueError(f"adapters of {config['model_type']!r} cannot be written as GGUF, only of {known}")
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, int(config["num_hidden_layers"]))
    told = json.loads((adapter_dir / "adapter_config.json").read_bytes())
    if told.get("use_dora") or told.get("modules_to_save"):
        raise ValueError("GGUF has no place for DoRA, nor for whole modules beside an adapter")
    alpha = float(told["lora_alpha"])
    if told.get("use_rslora"):
        alpha *= float(told["r"]) ** 0.5  # alpha / sqrt(rank), where the reader divides by the rank
    writer = gguf.GGUFWriter(into, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in sorted(load_file(adapter_dir / "adapter_model.safetensors").items()):
        found = _NAME.fullmatch(name)
        target = found and names.get_name(found[1])
        if not found or target is None:
            raise ValueError(f"{name!r} is no part of a LoRA for {architecture}")
        tensor = tensor.astype("float32")
        if architecture == "llama" and found[2] == "B":
            tensor = _paired(tensor, found[1], config)
        writer.add_tensor(f"{target}.weight.lora_{found[2].lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _paired(tensor: Any, module: str, config: Mapping[str, Any]) -> Any:
    """The rows of queries and keys as llama.cpp's "llama" wants them: the halves of a head that are rotated together,
    side by side."""
    heads = int(config["num_attention_heads"])
    if module.endswith(".k_proj"):
        heads = int(config.get("num_key_value_heads") or heads)
    elif not module.endswith(".q_proj"):
        return tensor
    rows, columns = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
