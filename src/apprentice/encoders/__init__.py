"""What encoders share: the text they read, the cores they read it with, and the memory that spares a second reading.

An encoder is one file with `build(**settings)` that gives a `types.Encoder`. Its `name` says exactly what made the
vectors (weights included), because a student can only read the vectors that it learned from.
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from threading import Lock
from typing import Any

from apprentice.errors import InvalidInput

LONGEST = 20_000
"""Characters of a text that are read; more than any encoder here has tokens for."""


def readable(text: str) -> str:
    """The text as every tokenizer takes it: its first LONGEST characters, with `?` for a lone surrogate.

    >>> readable("half " + chr(0xD83D))
    'half ?'
    """
    return text[:LONGEST].encode("utf-8", "replace").decode()


def cores() -> int:
    """How many cores this process may use, at least 1: those that the system gives it, fewer where OMP_NUM_THREADS says so."""
    if sys.version_info >= (3, 13):
        given = os.process_cpu_count()
    else:
        given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    limit = int(wanted) if wanted.isdecimal() else 0  # libraries pass over what is no number, and so does this
    return max(1, min(given or 1, limit or given or 1))


def each[Row](texts: Sequence[str], encode: Callable[[str], Row], threads: int) -> list[Row]:
    """`encode(text)` of every text, in order; several texts are spread over `threads` threads, one text is read in this one.

    A text is never cut or joined with others, so a row is bit for bit what it is alone. Gains by as many cores where
    `encode` lets other threads run, as native code does. The threads end with the call: a process may fork afterwards.
    """
    if threads == 1 or len(texts) < 2:
        return [encode(text) for text in texts]
    with ThreadPoolExecutor(min(threads, len(texts)), thread_name_prefix="encoder") as pool:
        return list(pool.map(encode, texts))


class Memory:
    """The vectors of the last `size` texts, so that a process encodes a text once. Keeps digests, never the texts."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = Lock()

    def rows(self, texts: Sequence[str], encode: Callable[[list[str]], Sequence[Any]]) -> list[Any]:
        """A row a text, in order; `encode` is asked once, for the texts that are not remembered.

        Raises InvalidInput when it is given one text instead of several, which would be read letter by letter.
        """
        if isinstance(texts, str):
            raise InvalidInput("an encoder takes a list of texts, not one text", hint="encode([text])")
        read = [readable(text) for text in texts]
        keys = [blake2b(text.encode(), digest_size=16).digest() for text in read]
        found: dict[bytes, Any] = {}
        with self._lock:
            for key in keys:
                if key in self._rows:
                    self._rows.move_to_end(key)
                    found[key] = self._rows[key]
        missing = {key: text for key, text in zip(keys, read, strict=True) if key not in found}
        if missing:
            found.update(zip(missing, encode(list(missing.values())), strict=True))
            with self._lock:
                self._rows.update((key, found[key]) for key in missing)
                while len(self._rows) > self._size:
                    self._rows.popitem(last=False)
        return [found[key] for key in keys]
