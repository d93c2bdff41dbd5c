"""A whole fine-tuned model as llama.cpp reads it. Imports nothing of ours: the child that trains runs it.

Everything but the numbers is the base's, which is there as GGUF: its tokenizer, its template, its names. What is done to
the rows of queries and keys is as in convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp (MIT); _adapters.py
has it. Architectures whose other weights are changed on the way (Gemma's norms) are not among the known ones.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_KEPT = ("F32", "F16", "BF16", "Q8_0")  # a tensor of the base that is coarser becomes Q8_0: what was learned is finer
_COPIED = ("rope_freqs.weight",)  # computed from the configuration, not learned


def model_to_gguf(folder: Path, base: Path, into: Path) -> None:
    """Write a model of transformers (config.json, safetensors) as one GGUF file. `base`: what it was before, as GGUF.

    One tensor is in memory at a time. Raises ValueError where the two do not fit.
    """
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(base)
    config = json.loads((folder / "config.json").read_bytes())
    found = _Found(folder, config, reader)
    writer = gguf.GGUFWriter(into, found.architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            parts = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=parts)
    types = {
        tensor.name: tensor.tensor_type
        if tensor.name in _COPIED or tensor.tensor_type.name in _KEPT
        else gguf.GGMLQuantizationType.Q8_0
        for tensor in reader.tensors
    }
    for tensor in reader.tensors:
        together, width = gguf.GGML_QUANT_SIZES[types[tensor.name]]
        size = int(tensor.n_elements) // together * width
        writer.add_tensor_info(tensor.name, _shape(tensor), np.dtype("float32"), size, types[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        if tensor.name in _COPIED:
            writer.write_tensor_data(tensor.data)
        else:
            writer.write_tensor_data(gguf.quants.quantize(found.numbers(tensor), types[tensor.name]))
    writer.close()


class _Found:
    """The learned tensors, by their names in the base."""

    def __init__(self, folder: Path, config: dict[str, Any], reader: Any) -> None:
        import gguf

        beside = runpy.run_path(str(Path(__file__).with_name("_adapters.py")))
        self.architecture = str(reader.get_field("general.architecture").contents())
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"a whole {self.architecture!r} cannot be written as GGUF, only {', '.join(ARCHITECTURES)}"
            )
        self._config, self._paired = config, beside["_paired"]
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(kind, int(config["num_hidden_layers"]))
        self._places: dict[str, tuple[Path, str]] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - it is no dictionary
                    target = names.get_name(name, try_suffixes=(".weight", ".bias"))
                    if target is None:
                        raise ValueError(f"{name!r} has no place in a GGUF file of {self.architecture}")
                    self._places[target] = (path, name)
        if config.get("tie_word_embeddings"):  # one matrix, which a GGUF file may have twice
            self._places.setdefault("output.weight", self._places["token_embd.weight"])
        known = {tensor.name for tensor in reader.tensors}
        tied = {"output.weight"} if config.get("tie_word_embeddings") else set()
        if strange := sorted(self._places.keys() - known - tied) or sorted(known - self._places.keys() - {*_COPIED}):
            raise ValueError(f"only one of the model and its base as GGUF has {strange[0]!r}")

    def numbers(self, tensor: Any) -> Any:
        """What was learned in the place of a tensor of the base, with 32 bits."""
        path, name = self._places[tensor.name]
        with _opened(path) as file:
            found = file.get_tensor(name)
        found = (found if hasattr(found, "astype") else found.float().numpy()).astype("float32")
        if found.shape != _shape(tensor):
            raise ValueError(f"{name!r} is {found.shape}, and {tensor.name!r} of the base {_shape(tensor)}")
        if self.architecture == "llama" and found.ndim == 2:
            found = self._paired(found, name.removesuffix(".weight"), self._config)
        return found


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, "pt" if importlib.util.find_spec("torch") else "np")  # numpy knows no bfloat16


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(length) for length in reversed(tensor.shape))
