"""WordLlama, the fast preset: the mean of the vectors of a text's tokens, 256 numbers, offline, on the CPU.

For millions of texts (`make bench-encoders`). Knows what English words mean, not what their order does, and reads on where the
others stop: up to 20,000 characters.
Source: https://github.com/dleemiller/WordLlama (l2_supercat_256: token vectors of large language models, projected and
trained as sentence vectors), MIT; both files, 18 MB, are read from the package wordllama. Its own code is not run: it looks
for them where they are not, then on the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apprentice.encoders import Memory
from apprentice.errors import ConfigError, MissingExtra
from apprentice.types import Encoder

try:
    import numpy as np
    import safetensors
    import safetensors.numpy
    import tokenizers
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "safetensors", "fast") from error

_WEIGHTS, _TOKENIZER = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"
_START = 1  # the token <s>, which stands for a text without a token
_REMEMBERED = 5_000  # texts, 1 KB each


def build() -> Encoder:
    """The encoder; one instance a process, because it holds 33 MB.

    Raises MissingExtra when the extra `fast` is not installed, ConfigError when the package holds other files.
    """
    return _shared()


@cache
def _shared() -> _WordLlama:
    found = find_spec("wordllama")  # finds the folder and runs nothing in it
    if found is None or not found.submodule_search_locations:
        raise MissingExtra("wordllama", "fast")
    return _WordLlama(Path(found.submodule_search_locations[0]))


class _WordLlama:
    dimension = 256

    def __init__(self, folder: Path) -> None:
        try:
            weights, vocabulary = (folder / _WEIGHTS).read_bytes(), (folder / _TOKENIZER).read_bytes()
            self._vectors = safetensors.numpy.load(weights)["embedding.weight"].astype(np.float32)
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise ConfigError(
                f"encoder 'wordllama': the package wordllama is not as expected: {error}",
                hint='pip install "wordllama==0.4.0.post1"',
            ) from error
        self.name = f"wordllama-256-{sha256(weights + vocabulary).hexdigest()[:16]}"
        self._tokenizer = tokenizers.Tokenizer.from_buffer(vocabulary)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._memory = Memory(_REMEMBERED)

    def encode(self, texts: Sequence[str]) -> Any:
        rows = self._memory.rows(texts, self._encode)
        return np.stack(rows) if rows else np.empty((0, self.dimension), np.float32)

    def _encode(self, texts: list[str]) -> list[Any]:
        return [self._vector(text) for text in texts]

    def _vector(self, text: str) -> Any:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids or [_START]
        mean = self._vectors[ids].mean(axis=0)
        return mean / np.linalg.norm(mean)
