"""Hashed character n-grams: no weights to load, nothing to fit, any language; knows spelling, not meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apprentice.encoders import Memory
from apprentice.errors import ConfigError, MissingExtra
from apprentice.types import Encoder

try:
    import numpy as np
    from sklearn.feature_extraction.text import HashingVectorizer
except ModuleNotFoundError as error:
    raise MissingExtra("scikit-learn" if error.name == "sklearn" else "numpy", "embedded") from error

_REMEMBERED = 1_000  # texts; reading one again costs a fraction of a millisecond


def build(dimension: int = 4096) -> Encoder:
    """The encoder. `dimension`: length of a vector; below about 1,000 unlike n-grams often share a place.

    Raises ConfigError for fewer than 2, MissingExtra when the extra `embedded` is not installed.
    """
    if dimension < 2:
        raise ConfigError("encoder 'tfidf': dimension should be at least 2")
    return _Ngrams(dimension)


class _Ngrams:
    def __init__(self, dimension: int) -> None:
        self.name = f"tfidf-{dimension}"
        self.dimension = dimension
        self._vectorizer = HashingVectorizer(
            analyzer="char_wb", ngram_range=(2, 5), n_features=dimension, norm=None, dtype=np.float32
        )
        self._memory = Memory(_REMEMBERED)

    def encode(self, texts: Sequence[str]) -> Any:
        rows = self._memory.rows(texts, self._encode)
        return np.stack(rows) if rows else np.empty((0, self.dimension), np.float32)

    def _encode(self, texts: list[str]) -> list[Any]:
        counts = self._vectorizer.transform(texts)
        rows = []
        for place in range(len(texts)):
            row = counts[place].toarray()[0]
            row = np.sign(row) * np.sqrt(np.abs(row))  # the tenth "the" says less than the first
            length = np.linalg.norm(row)
            if length == 0:  # a text without a letter still is a direction: a place that all such texts share
                row[0], length = 1.0, 1.0
            rows.append(row / length)
        return rows
