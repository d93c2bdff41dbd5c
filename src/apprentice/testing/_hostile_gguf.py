"""The GGUF files of `hostile`, and a writer that writes what it is told, true or not."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

RANK = 4
_HUGE = 2**64 - 1


class Key(NamedTuple):
    """One key of a GGUF file: its name, the number of its type, and its value's bytes."""

    name: str
    type: int
    value: bytes


class Block(NamedTuple):
    """What a GGUF file says of a tensor; `shape` innermost first."""

    name: str
    shape: Sequence[int]
    type: int
    offset: int


def _counted(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw)) + raw


def text(name: str, value: str) -> Key:
    """A key with a text."""
    return Key(name, 8, _counted(value))


def whole(name: str, value: int) -> Key:
    """A key with a whole number of 32 bits."""
    return Key(name, 4, struct.pack("<I", value))


def items(name: str, type: int, values: Sequence[bytes], *, count: int | None = None) -> Key:
    """A key with a list; `count`: how many items it says that it has."""
    return Key(name, 9, struct.pack("<IQ", type, len(values) if count is None else count) + b"".join(values))


KEYS: tuple[Key, ...] = (
    text("general.architecture", "llama"),
    whole("llama.context_length", 64),
    items("tokenizer.ggml.tokens", 8, [_counted("a"), _counted("b")]),
)
TENSORS = (Block("a", (8, 2), 0, 0), Block("b", (8,), 0, 64))
LORA_KEYS = (*KEYS, text("general.type", "adapter"), text("adapter.type", "lora"))
LORA_TENSORS = (Block("w.lora_a", (2, RANK), 0, 0), Block("w.lora_b", (RANK, 2), 0, 32))


def gguf(
    keys: Sequence[Key],
    tensors: Sequence[Block] = TENSORS,
    data: bytes | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """A GGUF file, true unless told otherwise; `data` is 96 bytes of zeros, or 64 for an adapter."""
    counts = len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count
    head = magic + struct.pack("<IQQ", version, *counts)
    for key in keys:
        head += _counted(key.name) + struct.pack("<I", key.type) + key.value
    for block in tensors:
        shape = struct.pack(f"<{len(block.shape)}Q", *block.shape)
        head += _counted(block.name) + struct.pack("<I", len(block.shape)) + shape
        head += struct.pack("<IQ", block.type, block.offset)
    default = bytes(64 if tensors == LORA_TENSORS else 96)
    return head + bytes(-len(head) % 32) + (default if data is None else data)


def ggufs() -> dict[str, bytes]:
    """Hostile GGUF files, by a name that says what is wrong with them."""
    return _counts() | _keyed() | _laid() | _meant()


def _with(*keys: Key) -> bytes:
    return gguf([*KEYS, *keys])


def _counts() -> dict[str, bytes]:
    true = gguf(KEYS)
    return {
        "empty file": b"",
        "another magic": gguf(KEYS, magic=b"GGML"),
        "a pickle": b"\x80\x04N." + bytes(64),
        "version 1": gguf(KEYS, version=1),
        "version 4": gguf(KEYS, version=4),
        "big endian": gguf(KEYS, version=3 << 24),
        "2^64-1 tensors": gguf(KEYS, tensor_count=_HUGE),
        "2^64-1 keys": gguf(KEYS, key_count=_HUGE),
        "no tensors": gguf(KEYS, (), b""),
        "no keys": gguf(()),
        "more keys than there are": gguf(KEYS, key_count=900),
        "cut in the keys": true[:60],
        "cut in the tensors": true[:-40],
        "bytes behind the tensors": true + bytes(64),
    }


def _keyed() -> dict[str, bytes]:
    return {
        "key of 2^64-1 bytes": gguf(KEYS[:1], magic=b"GGUF")[:24] + struct.pack("<Q", _HUGE) + bytes(200),
        "text of 2^64-1 bytes": _with(Key("x", 8, struct.pack("<Q", _HUGE))),
        "text of 2^63 bytes": _with(Key("x", 8, struct.pack("<Q", 2**63))),
        "text that is no UTF-8": _with(Key("x", 8, _counted(b"\xff"))),
        "a key twice": _with(whole("llama.context_length", 1)),
        "a key with a line end": _with(whole("a\nb", 1)),
        "unknown type of a value": _with(Key("x", 13, bytes(8))),
        "neither true nor false": _with(Key("x", 7, b"\x02")),
        "NaN as a value": _with(Key("x", 6, struct.pack("<f", float("nan")))),
        "lists within lists": _with(items("x", 9, [struct.pack("<IQ", 9, 1)] * 3)),
        "list of an unknown type": _with(items("x", 99, [])),
        "list of 2^61 numbers": _with(items("x", 10, [], count=2**61)),
        "list of 2^64-1 texts": _with(items("x", 8, [], count=_HUGE)),
        "two million texts": _with(items("x", 8, [bytes(8)] * 2_000_000)),
        "text of a list of 2^63 bytes": _with(items("x", 8, [struct.pack("<Q", 2**63)])),
        "token of 2^31 bytes": _with(items("x", 8, [struct.pack("<Q", 2**31)])),
    }


def _laid() -> dict[str, bytes]:
    def laid(*tensors: Block) -> bytes:
        return gguf(KEYS, tensors)

    first, second = TENSORS
    return {
        "five dimensions": laid(Block("a", (8, 1, 1, 1, 2), 0, 0), second),
        "no dimensions": laid(Block("a", (), 0, 0), second),
        "a dimension of 0": laid(Block("a", (8, 0), 0, 0), second),
        "shape that overflows 64 bits": laid(Block("a", (2**33, 2**33), 0, 0), second),
        "shape that overflows to the right size": laid(Block("a", (2**62 + 4, 4), 0, 0), second),
        "negative dimension": laid(Block("a", (_HUGE, 16), 0, 0), second),
        "unknown type of a tensor": laid(Block("a", (8, 2), 99, 0), second),
        "withdrawn type of a tensor": laid(Block("a", (32, 2), 4, 0), second),
        "row that is no whole block": laid(Block("a", (8, 8), 2, 0), second),
        "overlap": laid(first, Block("b", (8,), 0, 32)),
        "offset that is not aligned": laid(first, Block("b", (8,), 0, 65)),
        "gap": gguf(KEYS, (first, Block("b", (8,), 0, 96)), bytes(128)),
        "offset beyond the file": laid(first, Block("b", (8,), 0, 2**40)),
        "offset that overflows": laid(first, Block("b", (8,), 0, _HUGE - 31)),
        "two tensors of one name": laid(first, Block("a", (8,), 0, 64)),
        "a tensor's name of 10,000 letters": laid(Block("a" * 10_000, (8, 2), 0, 0), second),
        "a tensor's name with a zero": laid(Block("a\0b", (8, 2), 0, 0), second),
    }


def _meant() -> dict[str, bytes]:
    lora = list(LORA_TENSORS)
    return {
        "alignment 0": _with(whole("general.alignment", 0)),
        "alignment 24": _with(whole("general.alignment", 24)),
        "alignment 2^31": _with(whole("general.alignment", 2**31)),
        "alignment as text": _with(text("general.alignment", "32")),
        "no architecture": gguf(KEYS[1:]),
        "unknown architecture": gguf([text("general.architecture", "evil"), *KEYS[1:]]),
        "architecture that is a number": gguf([whole("general.architecture", 1), *KEYS[1:]]),
        "a part of several": _with(whole("split.count", 3)),
        "a billion blocks": _with(whole("llama.block_count", 10**9)),
        "neither model nor adapter": _with(text("general.type", "imatrix")),
        "fewer scores than tokens": _with(items("tokenizer.ggml.scores", 6, [bytes(4)])),
        "scores of one byte": _with(items("tokenizer.ggml.scores", 0, [b"a", b"b"])),
        "token types of another length": _with(items("tokenizer.ggml.token_type", 5, [bytes(4)] * 3)),
        "tokens that are numbers": gguf([*KEYS[:2], items("tokenizer.ggml.tokens", 4, [bytes(4)])]),
        "merges that are numbers": _with(items("tokenizer.ggml.merges", 4, [bytes(4)])),
        "a special token that is not there": _with(whole("tokenizer.ggml.bos_token_id", 2)),
        "NaN": gguf(KEYS, TENSORS, bytes(92) + struct.pack("<f", float("nan"))),
        "adapter with half a pair": gguf(LORA_KEYS, (lora[0],), bytes(32)),
        "adapter of two ranks": gguf(LORA_KEYS, (lora[0], Block("w.lora_b", (2, RANK), 0, 32)), bytes(64)),
        "adapter of an unknown kind": gguf([*LORA_KEYS[:-1], text("adapter.type", "evil")], lora, bytes(64)),
    }
