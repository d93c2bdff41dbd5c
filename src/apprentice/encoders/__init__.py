"""What encoders share: the text they read, and the memory that spares them reading it twice.

An encoder is one file with `build(**settings)` that gives a `types.Encoder`. Its `name` says exactly what made the
vectors (weights included), because a student can only read the vectors that it learned from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
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
