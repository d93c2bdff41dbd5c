"""The embedded student as one ONNX file, answering in this process: no network, no GPU, no scikit-learn.

`apprentice models export TASK --as onnx` writes the folder. Its graph goes from the numbers of tokens to the place of the
answer in a list of symbols, and to the calibrated confidence; what a graph cannot say (the texts, the shape of the
output) stands in the manifest. Any program with an ONNX runtime and the tokenizer can do what this file does.
Source: https://onnx.ai/onnx/operators; https://huggingface.co/docs/tokenizers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from apprentice import fields
from apprentice.errors import ConfigError, MissingExtra
from apprentice.models import readable
from apprentice.models._learned import InProcess
from apprentice.types import Answer, Json, Task

try:
    import numpy as np
    import onnxruntime
    import tokenizers
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "onnxruntime", "onnx") from error

FORMAT = "apprentice-onnx-1"
MODEL, TOKENIZER = "model.onnx", "tokenizer.json"
_VALUE = "*"  # symbol of a field that a number or a list fills in
_AGAIN = "export the version again: apprentice models export TASK --as onnx"


def build(checkpoint: str | Path | None = None, model: str | None = None, threads: int = 1) -> Onnx:
    """The student in an exported folder. `checkpoint` or `model`: the folder; `threads`: how many cores several inputs may
    use; one input is read by one core.

    Raises ConfigError when the folder is missing, damaged or of another format; MissingExtra without the extra `onnx`.
    """
    folder = checkpoint or model
    if folder is None:
        raise ConfigError(
            "model 'onnx' needs `checkpoint` or `model`", hint="the folder of an export: model: ./sort-onnx"
        )
    if threads < 1:
        raise ConfigError("model 'onnx': threads should be at least 1")
    return Onnx(Path(folder), threads)


class Onnx(InProcess):
    """Answers a task's inputs; several at once with `answer_many`, which spreads them over the cores."""

    def __init__(self, folder: Path, threads: int) -> None:
        manifest, contents, digest = _read(folder)
        self._threads = threads
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only
        # The steps as they are written: in others, put together, the last bits would not be those of the student's encoder.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            self._fields = [_Decoded(told) for told in manifest["fields"]]
            self._longest = int(manifest["tokens"]["characters"])
            self._special = bool(manifest["tokens"]["special"])
            self._nothing = list(manifest["tokens"]["nothing"])  # what stands for a text without a token
            super().__init__(f"onnx:{digest[:12]}", manifest["input_fields"], manifest["output_schema"])
            self._tokenizer = tokenizers.Tokenizer.from_buffer(contents[TOKENIZER])
            self._session = onnxruntime.InferenceSession(contents[MODEL], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the two libraries raise plain Exception, and errors of their own
            raise _damaged(folder, f"it cannot be loaded: {str(error)[:300]}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]
        missing = {name for field in self._fields for name in field.needs} - set(self._outputs)
        if (
            missing
            or "confidence" not in self._outputs
            or [i.name for i in self._session.get_inputs()] != ["input_ids"]
        ):
            raise _damaged(folder, "its graph is not the one that its manifest describes")

    def answer_many(self, task: Task, inputs: Sequence[Json]) -> list[Answer]:
        """An answer an input, in order; `latency` is an even share. Raises what `answer` raises."""
        began = time.perf_counter()
        self._check(task)
        texts = [readable(fields.render(self._input_schema, asked)[: self._longest]) for asked in inputs]
        if self._threads == 1 or len(texts) < 2:
            said = [self._said(text) for text in texts]
        else:  # one by one all the same: products in int8 depend on their company
            with ThreadPoolExecutor(min(self._threads, len(texts))) as pool:
                said = list(pool.map(self._said, texts))
        latency = (time.perf_counter() - began) / max(len(inputs), 1)
        return [
            Answer(output=output, model=self._name, latency=latency, confidence=confidence)
            for output, confidence in said
        ]

    def _said(self, text: str) -> tuple[Json, float]:
        ids = self._tokenizer.encode(text, add_special_tokens=self._special).ids or self._nothing
        found = dict(zip(self._outputs, self._session.run(None, {"input_ids": np.array([ids], np.int64)}), strict=True))
        filled = [(field.name, field.symbol(found)) for field in self._fields]
        confidence = round(float(found["confidence"][0]), 6)
        if filled[0][0] is None:
            return json.loads(filled[0][1]), confidence
        return {name: json.loads(symbol) for name, symbol in filled if symbol != fields.ABSENT}, confidence


class _Decoded:
    """One field of the output: how what the graph says of it becomes a symbol."""

    def __init__(self, told: Mapping[str, Json]) -> None:
        self.name: str | None = told["name"]
        self._symbols: list[str] = told["symbols"]
        self._choice: str | None = told["choice"]  # the output with the place among them; None: there is only one
        self._number: dict[str, Json] | None = told.get("number")
        self._several: dict[str, Json] | None = told.get("several")
        filled = [part["output"] for part in (self._number, self._several) if part is not None]
        self.needs = [name for name in (self._choice, *filled) if name is not None]

    def symbol(self, found: Mapping[str, Any]) -> str:
        """The field's value as JSON text, empty for a field that is left out."""
        symbol = self._symbols[0 if self._choice is None else int(found[self._choice][0])]
        if symbol != _VALUE:
            return symbol
        if self._number is not None:
            return fields.text_of(_rounded(float(found[self._number["output"]][0]), self._number))
        assert self._several is not None, "a value is a number or a list"
        chances = [] if self._several["output"] is None else found[self._several["output"]][0].tolist()
        low, high = self._several["bounds"]
        count = min(max(sum(chance > 0.5 for chance in chances), low), high)
        surest = sorted(range(len(chances)), key=lambda place: -chances[place])[:count]
        return "[" + ",".join(self._several["symbols"][place] for place in sorted(surest)) + "]"


def _rounded(value: float, told: Mapping[str, Json]) -> float:
    if told["step"]:
        value = round(value / told["step"]) * told["step"]
    value = min(max(round(value, told["digits"]), told["low"]), told["high"])
    return int(value) if told["digits"] == 0 else value


def _read(folder: Path) -> tuple[dict[str, Json], dict[str, bytes], str]:
    """The manifest, the two files, and the SHA-256 of the manifest. Raises ConfigError."""
    try:
        written = (folder / "manifest.json").read_bytes()
        manifest = json.loads(written)
    except OSError as error:
        raise ConfigError(f"{folder} is no export: {error.strerror or error}", hint=_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, "its manifest is no JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        told = manifest.get("format") if isinstance(manifest, dict) else None
        raise ConfigError(f"{folder} has the format {told!r}, not {FORMAT!r}", hint=_AGAIN)
    contents = {}
    for name in (MODEL, TOKENIZER):
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise _damaged(folder, f"{name}: {error.strerror or error}") from error
        if sha256(contents[name]).hexdigest() != (manifest.get("files") or {}).get(name):
            raise _damaged(folder, f"{name} does not have the hash in the manifest")
    return manifest, contents, sha256(written).hexdigest()


def _damaged(folder: Path, why: str) -> ConfigError:
    return ConfigError(f"the export {folder} is damaged: {why}", hint=_AGAIN)
