"""Tensors by name, type, shape and place, and what can be told of their numbers without a library.

Sources: https://huggingface.co/docs/safetensors (format), Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
2021 (the pairs), IEEE 754-2019 (what is no finite number).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from apprentice.types import Json
from apprentice.weights._source import Source, parsed

MOST_TENSORS = 20_000
_HEADER = 4 * 2**20  # bytes; the format allows 100 MB, 20,000 tensors need three
_LONGEST_NAME = 256
_MOST_DIMENSIONS = 8
_LARGEST = 2**40  # of one dimension
_PIECE = 2**20
_WHOLE = 256 * 2**20  # bytes of floating point numbers that are all looked at
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4,
    "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_HIGHEST = bytes([0x7F, 0xFF])
_FIVE_BITS = bytes([*range(0x7C, 0x80), *range(0xFC, 0x100)])
# The last byte of a number that is not finite (little endian: sign and the upper exponent). Exact for one byte and F16;
# for the others it takes in numbers beyond 1e38 too (F64: 1e303), which no model holds.
_NOT_FINITE = {
    "F8_E4M3": _HIGHEST, "F8_E5M2": _FIVE_BITS, "F16": _FIVE_BITS, "BF16": _HIGHEST, "F32": _HIGHEST, "F64": _HIGHEST,
}  # fmt: skip
_FORMER = {b"\x80": "a pickle", b"PK": "a zip archive, as torch.save writes", b"\x93NUMPY": "a NumPy file"}
_FORMER |= {b"\x7fELF": "a program", b"MZ": "a program", b"#!": "a script", b"\x1f\x8b": "compressed", b"GGUF": "GGUF"}
_LORA = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_LORA_GGUF = re.compile(r"(.+)\.lora_([ab])")


class Tensor(NamedTuple):
    """One tensor; `start` counts from the begin of the file, `size` in bytes, `shape` outermost first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_safetensors(source: Source) -> list[Tensor]:
    """The tensors of a safetensors file, in the order of their bytes; only its header is read.

    Refused: a header longer than 4 MiB, JSON with duplicate keys, unknown types, shapes that do not fit their bytes,
    overlaps, gaps, bytes behind the last tensor, no or empty tensors.
    """
    start = source.at(0, min(8, source.size))
    length = int.from_bytes(start, "little")
    if source.size < 10 or length > min(_HEADER, source.size - 8) or source.at(8, 1) != b"{":
        said = next((said for magic, said in _FORMER.items() if start.startswith(magic)), None)
        raise source.refused(f"it is {said}" if said else "it has no safetensors header, or one that is too long")
    raw = source.at(8, length).rstrip(b" ")
    header = parsed(raw, source)
    if not isinstance(header, dict):
        raise source.refused("its header is no JSON object")
    about = header.pop("__metadata__", None)
    if about is not None and not (isinstance(about, dict) and all(type(value) is str for value in about.values())):
        raise source.refused("its __metadata__ is more than text")
    if not 0 < len(header) <= MOST_TENSORS:
        raise source.refused(f"it has {len(header):,} tensors, of 1 to {MOST_TENSORS:,}")
    tensors = [_tensor(name, told, 8 + length, source) for name, told in header.items()]
    tensors.sort(key=lambda tensor: tensor.start)
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise source.refused(
                f"{tensor.name!r} {'overlaps' if tensor.start < end else 'leaves a gap to'} another tensor"
            )
        end += tensor.size
    if end != source.size:
        raise source.refused(f"its tensors end at byte {end:,}, the file at {source.size:,}")
    return tensors


def _tensor(name: str, told: Json, base: int, source: Source) -> Tensor:
    if not 0 < len(name) <= _LONGEST_NAME or not (name.isascii() and name.isprintable()):
        raise source.refused(f"{name[:40]!r} is no name of a tensor")
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise source.refused(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = told["dtype"], _whole_numbers(told["shape"]), _whole_numbers(told["data_offsets"])
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise source.refused(f"{name!r} has the unknown type {str(dtype)[:40]!r}")
    if shape is None or len(shape) > _MOST_DIMENSIONS or not all(0 < length <= _LARGEST for length in shape):
        raise source.refused(f"{name!r} has no usable shape")
    if offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _SIZES[dtype]:
        raise source.refused(f"the bytes of {name!r} do not fit its shape")
    return Tensor(name, dtype, shape, base + offsets[0], offsets[1] - offsets[0])


def _whole_numbers(told: Json) -> tuple[int, ...] | None:
    if not isinstance(told, list) or not all(type(item) is int and item >= 0 for item in told):
        return None
    return tuple(item for item in told if isinstance(item, int))


def check_numbers(source: Source, tensors: Sequence[Tensor]) -> bool:
    """Refuse NaN, infinity and absurd numbers. True when every floating point number was looked at.

    Beyond 256 MiB of them it looks at evenly spread pieces of 1 MiB, 256 MiB in all, always the same ones, and says
    False. Quantised blocks are not looked into.
    """
    floats = [tensor for tensor in tensors if tensor.dtype in _NOT_FINITE]
    total = sum(tensor.size for tensor in floats)
    every = max(1, math.ceil(total / _WHOLE))
    count = 0
    for tensor in floats:
        for offset in range(0, tensor.size, _PIECE):
            count += 1
            if (count - 1) % every:
                continue
            piece = source.at(tensor.start + offset, min(_PIECE, tensor.size - offset))
            width = _SIZES[tensor.dtype]
            last = piece[width - 1 :: width]
            if len(last.translate(None, _NOT_FINITE[tensor.dtype])) != len(last):
                raise source.refused(f"{tensor.name!r} holds NaN, infinity or a number beyond all measure")
    return every == 1


def check_pairs(source: Source, tensors: Sequence[Tensor], rank: int | None, *, gguf: bool = False) -> int:
    """The rank of a LoRA adapter whose tensors are pairs A [rank, in] and B [out, rank], and nothing else.

    `rank`: the one that it must have; None: any, the same for all pairs.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        match = (_LORA_GGUF if gguf else _LORA).fullmatch(tensor.name)
        if match is None or len(tensor.shape) != 2 or match[2].upper() in halves.setdefault(match[1], {}):
            raise source.refused(f"{tensor.name!r} of shape {list(tensor.shape)} is no part of a LoRA pair")
        halves[match[1]][match[2].upper()] = tensor
    for name, pair in halves.items():
        if len(pair) != 2:
            raise source.refused(f"{name!r} has one half of a LoRA pair")
        found = pair["A"].shape[0]
        rank = found if rank is None else rank
        if not found == pair["B"].shape[1] == rank:
            shapes = f"A {list(pair['A'].shape)} and B {list(pair['B'].shape)}"
            raise source.refused(f"{name!r} has {shapes}, which is no pair of rank {rank}")
    assert rank is not None, "there is at least one tensor"
    return rank
