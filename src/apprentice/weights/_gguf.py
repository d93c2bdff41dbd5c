"""GGUF files: what is in one, after every length in it was bounded.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Stricter than that: no arrays within arrays, no big
endian files, no parts of a split model, tensors without gaps, tables of the tokenizer that fit each other.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from apprentice.weights._source import Source
from apprentice.weights._tensors import MOST_TENSORS, Tensor

_MOST_KEYS = 1_024
_HEADER = 32 * 2**20  # bytes before the tensors; a vocabulary of 262,144 takes a quarter of it
_MOST_ITEMS = 2**20  # of all lists of texts together; that vocabulary with its merges has three quarters of it
_LONGEST_KEY, _LONGEST_NAME, _LONGEST_ITEM = 256, 127, 2**16
_MOST_TEXT = 2**20  # bytes of all texts outside of lists
_MOST_LAYERS = 2**12
_LARGEST = 2**40  # of one dimension
_BUFFER = 2**18
_TEXT, _LIST, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_WHOLE = frozenset({0, 1, 2, 3, 4, 5, 10, 11})
_KEY = re.compile(r"[A-Za-z0-9_.-]+")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")
# Type in the file -> its name, numbers in a block, bytes of a block. 4, 5, 31 to 33 and 36 to 38 were withdrawn.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip


class Items(NamedTuple):
    """A list in the metadata: the type of its items, and how many; they themselves are passed over.

    `largest`: of whole numbers that may be one for each layer.
    """

    type: int
    length: int
    largest: int | None = None


@dataclass(frozen=True, slots=True)
class Gguf:
    """A file's metadata (texts, numbers, truth values, and lists by length) and its tensors."""

    keys: dict[str, str | int | float | bool | Items]
    tensors: list[Tensor]

    def text(self, key: str) -> str | None:
        value = self.keys.get(key)
        return value if isinstance(value, str) else None

    def whole(self, key: str) -> int | None:
        """A whole number; the largest, where there is one for each layer."""
        value = self.keys.get(key)
        value = value.largest if isinstance(value, Items) else value
        return value if type(value) is int else None

    def quantisation(self) -> str:
        """The type that takes most bytes."""
        sizes = Counter[str]()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.size
        return sizes.most_common(1)[0][0]


class _Cursor:
    """Walks through the part before the tensors; never beyond its bound, never holding more than a buffer of it."""

    def __init__(self, source: Source) -> None:
        self.at = 0
        self._source = source
        self._end = min(source.size, _HEADER)
        self._from, self._buffer = 0, b""

    def bytes(self, length: int) -> bytes:
        start = self.at - self._from
        if not 0 <= start <= len(self._buffer) - length:
            if self.at + length > self._end:
                raise self._source.refused("its metadata is cut short or beyond all measure")
            self._buffer = self._source.at(self.at, min(max(length, _BUFFER), self._end - self.at))
            self._from, start = self.at, 0
        self.at += length
        return self._buffer[start : start + length]

    def number(self, code: str) -> int:
        (found,) = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        assert isinstance(found, int), "asked for whole numbers only"
        return found

    def text(self, longest: int, what: str) -> str:
        length = self.number("Q")
        if length > longest:
            raise self._source.refused(f"{what} has {length:,} bytes, of at most {longest:,}")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self._source.refused(f"{what} is no UTF-8") from error

    def skip(self, length: int) -> None:
        self.at += length
        if self.at > self._end:
            raise self._source.refused("its metadata is cut short or beyond all measure")

    def skip_texts(self, count: int) -> None:
        for _ in range(count):
            length = int.from_bytes(self.bytes(8), "little")
            if length > _LONGEST_ITEM:
                raise self._source.refused(f"a text of a list has {length:,} bytes, of at most {_LONGEST_ITEM:,}")
            self.skip(length)


def read_gguf(source: Source) -> Gguf:
    """What a GGUF file of version 2 or 3 holds; its tensors are not read.

    Refused: counts and lengths beyond their bounds, duplicate keys and tensors, unknown types, tensors that overlap,
    leave gaps or leave the file, tables of the tokenizer that do not fit each other.
    """
    cursor = _Cursor(source)
    if source.size < 24 or cursor.bytes(4) != b"GGUF":
        raise source.refused("it is no GGUF file")
    version, tensor_count, key_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise source.refused(f"it is GGUF of version {version}; versions 2 and 3 are read")
    if not 0 < tensor_count <= MOST_TENSORS or not 0 < key_count <= _MOST_KEYS:
        raise source.refused(f"it has {tensor_count:,} tensors and {key_count:,} keys")
    keys = _keys(cursor, key_count, source)
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise source.refused("its alignment is no power of two from 8 to 65,536")
    _check_tokenizer(keys, source)
    tensors = [_tensor(cursor, source) for _ in range(tensor_count)]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise source.refused("two of its tensors have one name")
    return Gguf(keys, _placed(tensors, cursor.at, alignment, source))


def _keys(cursor: _Cursor, count: int, source: Source) -> dict[str, str | int | float | bool | Items]:
    keys: dict[str, str | int | float | bool | Items] = {}
    texts, items = _MOST_TEXT, _MOST_ITEMS
    for _ in range(count):
        key = cursor.text(_LONGEST_KEY, "a key")
        if not _KEY.fullmatch(key) or key in keys:
            raise source.refused(f"the key {key!r} is there twice" if key in keys else f"{key!r} is no key")
        kind = cursor.number("I")
        if kind == _TEXT:
            value = cursor.text(texts, f"the text of {key!r}")
            texts -= len(value)
            keys[key] = value
        elif kind == _LIST:
            found = Items(cursor.number("I"), cursor.number("Q"))
            if found.type == _TEXT:
                items -= found.length
                if items < 0:
                    raise source.refused(f"its lists have more than {_MOST_ITEMS:,} texts")
                cursor.skip_texts(found.length)
            elif found.type in _WHOLE and found.length <= _MOST_LAYERS:
                numbers = [cursor.number(_NUMBERS[found.type]) for _ in range(found.length)]
                found = found._replace(largest=max(numbers, default=None))
            elif found.type in _NUMBERS:
                cursor.skip(found.length * struct.calcsize(_NUMBERS[found.type]))
            else:
                raise source.refused(f"{key!r} is a list of the type {found.type}")
            keys[key] = found
        elif kind in _NUMBERS:
            (number,) = struct.unpack(f"<{_NUMBERS[kind]}", cursor.bytes(struct.calcsize(_NUMBERS[kind])))
            if kind == _BOOL and number > 1:
                raise source.refused(f"{key!r} is neither true nor false")
            if not math.isfinite(number):
                raise source.refused(f"{key!r} is no number")
            keys[key] = bool(number) if kind == _BOOL else number
        else:
            raise source.refused(f"{key!r} has the unknown type {kind}")
    return keys


def _check_tokenizer(keys: dict[str, str | int | float | bool | Items], source: Source) -> None:
    """Readers index one table with another's numbers: lengths must agree, and special tokens must exist."""
    tokens = keys.get("tokenizer.ggml.tokens", Items(_TEXT, 0))
    if not isinstance(tokens, Items) or tokens.type != _TEXT:
        raise source.refused("its tokens are no list of texts")
    for name, types in (("scores", {6}), ("token_type", {4, 5})):
        table = keys.get(f"tokenizer.ggml.{name}")
        if table is not None and not (
            isinstance(table, Items) and table.length == tokens.length and table.type in types
        ):
            raise source.refused(f"tokenizer.ggml.{name} does not fit the tokens")
    merges = keys.get("tokenizer.ggml.merges")
    if merges is not None and not (isinstance(merges, Items) and merges.type == _TEXT):
        raise source.refused("its merges are no list of texts")
    for key, value in keys.items():
        if not (key.startswith("tokenizer.ggml.") and key.endswith("_token_id")):
            continue
        none = value in (0xFFFF_FFFF, -1)  # how writers say that there is no such token
        if type(value) is not int or not (none or 0 <= value < tokens.length):
            raise source.refused(f"{key} is no token")


def _tensor(cursor: _Cursor, source: Source) -> Tensor:
    name = cursor.text(_LONGEST_NAME, "a tensor's name")
    if not _TENSOR_NAME.fullmatch(name):
        raise source.refused(f"{name!r} is no name of a tensor")
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= 4:
        raise source.refused(f"{name!r} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in TYPES:
        raise source.refused(f"{name!r} has the unknown type {kind}")
    dtype, numbers, width = TYPES[kind]
    if not all(0 < length <= _LARGEST for length in shape) or shape[0] % numbers:
        raise source.refused(f"{name!r} has no usable shape")
    return Tensor(name, dtype, tuple(reversed(shape)), offset, math.prod(shape) // numbers * width)


def _placed(tensors: list[Tensor], header: int, alignment: int, source: Source) -> list[Tensor]:
    """The tensors with their places in the file, in the order of their bytes."""
    base = -(-header // alignment) * alignment
    placed = [tensor._replace(start=base + tensor.start) for tensor in sorted(tensors, key=lambda tensor: tensor.start)]
    at = end = base
    for tensor in placed:
        if tensor.start != at:
            raise source.refused(f"{tensor.name!r} overlaps another tensor, leaves a gap or is not aligned")
        end = at + tensor.size
        at = -(-end // alignment) * alignment
    if not end <= source.size <= at:
        raise source.refused(f"its tensors end at byte {end:,}, the file at {source.size:,}")
    return placed
