"""A whole GGUF model from a base and a LoRA: the tensors that the adapter touches are made anew, all else is copied.

W' = W + scale * B A with scale = alpha / rank, in float32. A touched tensor of fewer than eight bits becomes Q8_0: what an
adapter adds is smaller than the steps between numbers of four bits, and much of it would be lost in them. Metadata and
untouched tensors are the base's, byte for byte. Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; E. Hu
et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, section 4.1.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from apprentice.errors import ConfigError, MissingExtra

try:
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Type
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "gguf", "gguf") from error

_KEPT = ("F32", "F16", "BF16", "Q8_0")  # a touched tensor stays what it is; anything coarser becomes Q8_0


class _Pair(NamedTuple):
    """What an adapter adds to one tensor, by its two factors."""

    a: Any
    b: Any
    scale: float

    def change(self, shape: tuple[int, ...], name: str) -> Any:
        """scale * B A, which has the tensor's shape. Raises ConfigError where it has not."""
        a, b = np.asarray(self.a, np.float32), np.asarray(self.b, np.float32)
        if b.shape[-1] != a.shape[-2] or (*b.shape[:-1], a.shape[-1]) != shape:
            raise ConfigError(
                f"the adapter does not fit {name!r} of the base: {b.shape} x {a.shape} for {shape}",
                hint="export the adapter alone: --adapter-only",
            )
        return np.float32(self.scale) * (b @ a)


class Merged(NamedTuple):
    """How many tensors were made anew and how many copied; `types`: of those made anew, from what to what."""

    touched: int
    copied: int
    types: tuple[str, ...]


class Merge:
    """A base and an adapter, opened; `size` is how many bytes the merged file will have."""

    def __init__(self, base: Path, adapter: Path, type: str | None) -> None:
        """`type`: what touched tensors become, "same" for what they are. Raises ConfigError where the two do not fit."""
        self._reader = gguf.GGUFReader(base)
        self._pairs = _pairs(adapter)
        named = {tensor.name for tensor in self._reader.tensors}
        if strange := sorted(self._pairs.keys() - named):
            raise ConfigError(f"{base.name} has no tensor {strange[0]!r}, which the adapter changes")
        self._types = {
            tensor.name: _becomes(tensor, type) if tensor.name in self._pairs else tensor.tensor_type
            for tensor in self._reader.tensors
        }
        self._alignment = int(self._reader.alignment)
        self.size = len(self._head()) + sum(self._room(tensor) for tensor in self._reader.tensors)

    def write(self, path: Path) -> Merged:
        """The merged file, synchronised; one tensor is in memory at a time."""
        changed = []
        with path.open("xb") as file:
            file.write(self._head())
            for tensor in self._reader.tensors:
                if (pair := self._pairs.get(tensor.name)) is None:
                    self._put(file, tensor.data)
                    continue
                whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
                whole = whole + pair.change(whole.shape, tensor.name)
                self._put(file, gguf.quants.quantize(whole, self._types[tensor.name]))
                changed.append(f"{tensor.tensor_type.name} -> {self._types[tensor.name].name}")
            file.flush()
            os.fsync(file.fileno())
        return Merged(len(changed), len(self._reader.tensors) - len(changed), tuple(sorted(set(changed))))

    def _put(self, file: BinaryIO, data: Any) -> None:
        raw = np.ascontiguousarray(data)
        file.write(memoryview(raw.reshape(-1).view(np.uint8)))
        file.write(bytes(-raw.nbytes % self._alignment))

    def _room(self, tensor: Any) -> int:
        size = self._bytes(tensor)
        return size + -size % self._alignment

    def _bytes(self, tensor: Any) -> int:
        numbers, width = gguf.GGML_QUANT_SIZES[self._types[tensor.name]]
        return int(tensor.n_elements) // int(numbers) * int(width)

    def _head(self) -> bytes:
        """All before the first tensor: the base's own bytes, and then names, shapes, types and places."""
        tensors = self._reader.tensors
        described, offset = [], 0
        for tensor in tensors:
            name = tensor.name.encode()
            shape = [int(length) for length in tensor.shape]
            form = f"<I{len(shape)}QIQ"
            described.append(struct.pack("<Q", len(name)) + name)
            described.append(struct.pack(form, len(shape), *shape, int(self._types[tensor.name]), offset))
            offset += self._room(tensor)
        start = self._reader.data[: int(tensors[0].field.offset)].tobytes()
        head = start + b"".join(described)
        return head + bytes(-len(head) % self._alignment)


def _pairs(adapter: Path) -> Mapping[str, _Pair]:
    reader = gguf.GGUFReader(adapter)
    told = reader.get_field("adapter.lora.alpha")
    alpha = None if told is None else float(told.contents())
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        for tensor in reader.tensors
    }
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            b = tensors[name.removesuffix("a") + "b"]
            found[name.removesuffix(".lora_a")] = _Pair(a, b, 1.0 if not alpha else alpha / b.shape[-1])
    return found


def _becomes(tensor: Any, wanted: str | None) -> Any:
    """What a touched tensor becomes. Raises ConfigError for a type that cannot be made, or not of rows of this length."""
    here: str = tensor.tensor_type.name
    name = here if wanted == "same" else wanted if wanted is not None else here if here in _KEPT else "Q8_0"
    numbers, _ = gguf.GGML_QUANT_SIZES[Type[name]]
    if int(tensor.shape[0]) % int(numbers):
        raise ConfigError(
            f"{tensor.name!r} has rows of {int(tensor.shape[0])}, which {name} cannot hold", hint="F16 can"
        )
    try:
        gguf.quants.quantize(np.zeros((1, int(numbers)), np.float32), Type[name])
    except NotImplementedError as error:  # the package reads more types than it writes
        raise ConfigError(
            f"{tensor.name!r} cannot be made {name} here", hint="merge to Q8_0 or F16, then run llama-quantize"
        ) from error
    return Type[name]
