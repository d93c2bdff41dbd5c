"""A whole model as a folder of safetensors from a base and a LoRA as PEFT writes it: W' = W + scale * B A.

The merged model has the base's very files, copied, in which the bytes of the touched tensors are replaced; so one tensor is
in memory at a time, whatever the size. Sums are made in float32 and rounded to the base's type, half to even.
Sources: https://huggingface.co/docs/safetensors; E. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR
2022; D. Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023 (`use_rslora`).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apprentice.errors import ConfigError, MissingExtra
from apprentice.weights._source import opened
from apprentice.weights._tensors import Tensor, read_safetensors

try:
    import numpy as np
except ModuleNotFoundError as error:
    raise MissingExtra("numpy", "gguf") from error

_PAIR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class _Place(NamedTuple):
    """Where a tensor is."""

    file: Path
    tensor: Tensor

    def read(self) -> Any:
        """Its numbers as float32."""
        with opened(self.file) as source:
            raw = source.at(self.tensor.start, self.tensor.size)
        return _widened(raw, self.tensor).reshape(self.tensor.shape)


def merge(base: Path, adapter: Path, into: Path) -> int:
    """Copy the base's files into the folder, and add the adapter to them; how many tensors were touched.

    Both folders are checked before. Raises ConfigError for an adapter that does not fit the base.
    """
    pairs, scale = _pairs(adapter), _scale(adapter)
    weights = sorted(base.glob("*.safetensors"))
    places = {tensor.name: _Place(file, tensor) for file in weights for tensor in _tensors(file)}
    for module, (a, b) in pairs.items():
        _check(module, places, a.tensor.shape, b.tensor.shape)
    for file in sorted(base.iterdir()):
        shutil.copyfile(file, into / file.name)
    for module, (a, b) in pairs.items():
        place = places[f"{module}.weight"]
        merged = place.read() + np.float32(scale) * (b.read() @ a.read())
        with (into / place.file.name).open("r+b") as draft:
            draft.seek(place.tensor.start)
            draft.write(_narrowed(merged, place.tensor))
    for file in into.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    return len(pairs)


def _pairs(adapter: Path) -> dict[str, tuple[_Place, _Place]]:
    """A and B by the module that they change."""
    file = adapter / WEIGHTS
    found: dict[str, dict[str, _Place]] = {}
    for tensor in _tensors(file):
        said = _PAIR.fullmatch(tensor.name)
        if said is None:
            raise ConfigError(f"{file}: {tensor.name!r} cannot be merged", hint="only a LoRA of linear layers can")
        found.setdefault(said[1], {})[said[2]] = _Place(file, tensor)
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _scale(adapter: Path) -> float:
    told = json.loads((adapter / CONFIG).read_bytes())
    if told.get("fan_in_fan_out"):
        raise ConfigError(f"{adapter}: an adapter of transposed layers (fan_in_fan_out) is not merged")
    rank = float(told["r"])
    return float(told.get("lora_alpha", 8)) / (math.sqrt(rank) if told.get("use_rslora") else rank)


def _check(module: str, places: dict[str, _Place], a: Sequence[int], b: Sequence[int]) -> None:
    place = places.get(f"{module}.weight")
    if place is None:
        raise ConfigError(f"the base has no tensor '{module}.weight', which the adapter changes")
    if place.tensor.dtype not in ("F32", "F16", "BF16"):
        raise ConfigError(f"'{module}.weight' is {place.tensor.dtype}", hint="give the base in F32, F16 or BF16")
    if (b[0], a[1]) != tuple(place.tensor.shape) or b[1] != a[0]:
        raise ConfigError(f"the adapter does not fit '{module}.weight': {b} x {a} for {place.tensor.shape}")


def _tensors(file: Path) -> list[Tensor]:
    with opened(file) as source:
        return read_safetensors(source)


def _widened(raw: bytes, tensor: Tensor) -> Any:
    if tensor.dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype not in ("F32", "F16", "F64"):
        raise ConfigError(f"{tensor.name!r} is {tensor.dtype}", hint="give it in F32, F16 or BF16")
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[tensor.dtype]).astype(np.float32)


def _narrowed(numbers: Any, tensor: Tensor) -> bytes:
    if not np.isfinite(numbers).all():
        raise ConfigError(f"{tensor.name!r} would not be finite with the adapter added")
    if tensor.dtype == "BF16":
        bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
        return bytes(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes())
    return bytes(numbers.astype({"F32": "<f4", "F16": "<f2"}[tensor.dtype]).tobytes())
