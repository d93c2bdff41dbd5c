"""Hostile model files, by name: what a backend, a trainer or an importer has to refuse before a library opens it.

    for artefact in hostile.model_files():        # folders and files, more than two hundred
        path = artefact.build(empty_folder, canary)
        with pytest.raises(ConfigError):
            load(path)                            # built to expect hostile.BASE, and adapters of hostile.RANK
        assert not canary.exists()                # nothing in it ran

`archives` makes what must not be unpacked, `DIGESTS` lists what is no name of a version, and `safe_files` makes the true
files that the hostile ones differ from by one thing each: a loader that refuses these refuses for the wrong reason.
All is made from the standard library; some of it is sparse and looks larger than it is.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apprentice.testing._hostile_archives import archives as _archive_builds
from apprentice.testing._hostile_gguf import KEYS, LORA_KEYS, LORA_TENSORS, RANK, gguf, ggufs, text

__all__ = [
    "BASE", "DIGESTS", "RANK", "TEMPLATES", "Artefact", "adapter", "archives", "gguf", "model_files", "safe_files",
    "safetensors", "tensor",
]  # fmt: skip

BASE = "example/base-model"
DIGESTS = (
    "sha256:../../x", "sha256-../../x", "sha256:" + "0" * 64, "sha256-" + "A" * 64, "SHA256-" + "0" * 64, "0" * 64, "",
    "sha256-" + "0" * 63, "sha256-" + "0" * 65, "sha256-" + "0" * 64 + ":", "sha256-" + "0" * 64 + "\n",
    "sha256-" + "0" * 62 + "/.", "sha256-" + "g" * 64, " sha256-" + "0" * 64, "sha256-" + "٠" * 64, "sha512-" + "0" * 64,
    "sha256-" + "0" * 63 + "\0",
)  # fmt: skip
"""What no version may be called."""

type Build = Callable[[Path, Path], Path]
type Described = dict[str, dict[str, Any]]


class Artefact(NamedTuple):
    """`build` writes it into an empty folder and gives the path to load; what runs because of it makes the canary."""

    name: str
    build: Build


def model_files() -> Iterator[Artefact]:
    """Every hostile folder and file, by a name that says what is wrong with it."""
    made: dict[str, Build] = {}
    for name, content in _safetensors().items():
        made[f"safetensors: {name}"] = _with_weights(content)
    for magic, live in _PICKLES.items():
        made[f"safetensors: {magic} inside"] = _with_weights(live)
    for suffix in ("bin", "pt", "pth", "ckpt", "pkl", "pickle", "npy", "npz", "joblib"):
        made[f"pickle: adapter_model.{suffix} alone"] = _alone(f"adapter_model.{suffix}")
        made[f"pickle: weights.{suffix} beside an adapter"] = _beside(f"weights.{suffix}", _pickle)
    made |= _folders()
    for name, changes in _ADAPTER_CONFIGS.items():
        made[f"adapter_config: {name}"] = _with_config(changes)
    for name, raw in _ADAPTER_CONFIGS_RAW.items():
        made[f"adapter_config: {name}"] = _with_file("adapter_config.json", raw)
    made |= _models()
    for name, template in TEMPLATES.items():
        made[f"template in tokenizer_config.json: {name}"] = _with_tokenizer({"chat_template": template})
        made[f"template in GGUF: {name}"] = _gguf_file(gguf([*KEYS, text("tokenizer.chat_template", template)]))
    made["template in chat_template.jinja"] = _with_file("chat_template.jinja", TEMPLATES["subclasses"].encode())
    for name, content in ggufs().items():
        made[f"GGUF: {name}"] = _gguf_file(content)
    return (Artefact(name, build) for name, build in made.items())


def archives() -> Iterator[Artefact]:
    """Every hostile archive; unpacking must leave nothing behind, in its folder or elsewhere."""
    return (Artefact(name, build) for name, build in _archive_builds().items())


def safe_files() -> Iterator[Artefact]:
    """The true files that the hostile ones differ from by one thing: an adapter, a whole model, a GGUF file, archives."""

    def adapter_at(folder: Path, canary: Path) -> Path:
        return adapter(folder)

    yield Artefact("adapter", adapter_at)
    yield Artefact("model", lambda folder, canary: _model(folder))
    yield Artefact("GGUF", _gguf_file(gguf(KEYS)))
    yield Artefact("GGUF adapter", _gguf_file(gguf(LORA_KEYS, LORA_TENSORS)))


# --- true files, and what goes wrong in them --------------------------------------------------------------------------


def safetensors(header: Mapping[str, Any] | bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file; `length`: what it says of its header's length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    """How a header describes a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def adapter(folder: Path, *, weights: bytes | None = None, **changes: Any) -> Path:
    """A LoRA adapter's folder that is as it should be, apart from what is given."""
    config = _CONFIG | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(_true_weights() if weights is None else weights)
    return folder


_CONFIG: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": BASE, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "lora_alpha": 8, "lora_dropout": 0.0, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "peft_type": "LORA", "r": RANK, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
}  # fmt: skip
_A, _B = "base_model.model.layers.0.q_proj.lora_A.weight", "base_model.model.layers.0.q_proj.lora_B.weight"
_WIDTH = 16
_HALF = RANK * _WIDTH * 4  # bytes of one tensor


def _header(**changes: Any) -> Described:
    """A true header; `a` and `b` change what it says of its two tensors."""
    a = tensor("F32", (RANK, _WIDTH), 0, _HALF) | changes.get("a", {})
    b = tensor("F32", (_WIDTH, RANK), _HALF, 2 * _HALF) | changes.get("b", {})
    return {_A: a, _B: b}


def _numbers(dtype: str, last: bytes) -> bytes:
    """A pair of tensors of one type, the last number of which is given."""
    width = len(last)
    half = RANK * _WIDTH * width
    header = {_A: tensor(dtype, (RANK, _WIDTH), 0, half), _B: tensor(dtype, (_WIDTH, RANK), half, 2 * half)}
    return safetensors(header, bytes(2 * half - width) + last)


def _true_weights() -> bytes:
    return safetensors(_header(), _DATA)


_DATA = struct.pack("<f", 0.25) * (2 * RANK * _WIDTH)


def _says(**changes: Any) -> bytes:
    return safetensors(_header(**changes), _DATA)


def _raw_header(text: str) -> bytes:
    return safetensors(text.encode(), _DATA)


def _large_header(folder: Path, canary: Path) -> None:
    _sparse(folder / "adapter_model.safetensors", struct.pack("<Q", 100_000_000) + b"{" + b" " * 64, 100_000_100)


type Content = bytes | Callable[[Path, Path], bytes | None]


def _safetensors() -> dict[str, Content]:
    return _lengths() | _headers() | _described() | _numbered()


def _lengths() -> dict[str, Content]:
    true = _true_weights()
    return {
        "empty file": b"",
        "seven bytes": b"1234567",
        "no header": struct.pack("<Q", 0),
        "cut in the header": true[:40],
        "cut in the numbers": true[:-1],
        "a byte behind the tensors": true + b"\0",
        "a program behind the tensors": true + b"\x7fELF" + bytes(60),
        "overlap": _says(b={"data_offsets": [0, _HALF]}),
        "gap": safetensors(_header(b={"data_offsets": [_HALF + 4, 2 * _HALF + 4]}), _DATA + bytes(4)),
        "gap before the first": safetensors({_A: tensor("F32", (RANK, _WIDTH), 4, 4 + _HALF)}, _DATA[: _HALF + 4]),
        "header of 100 MB": _large_header,
        "header of 2^64-1 bytes": safetensors(_header(), _DATA, length=2**64 - 1),
        "header of 2^63 bytes": safetensors(_header(), _DATA, length=2**63),
        "header longer than the file": safetensors(_header(), _DATA, length=len(true)),
    }


def _headers() -> dict[str, Content]:
    header = json.dumps(_header())
    return {
        "no tensors": safetensors({}, b""),
        "metadata only": safetensors({"__metadata__": {"format": "pt"}}, b""),
        "metadata that is no text": safetensors({"__metadata__": {"a": {"b": 1}}} | _header(), _DATA),
        "a tensor twice": _raw_header(header[:-1] + f', "{_A}": ' + json.dumps(tensor("F32", (1,), 0, 4)) + "}"),
        "a field twice": _raw_header(header.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F16"', 1)),
        "nested 100,000 deep": _raw_header('{"a":' * 100_000),
        "lists nested 1,000,000 deep": _raw_header('{"a":' + "[" * 1_000_000),
        "a million values": _raw_header('{"a":[' + "{}," * 1_000_000 + "{}]}"),
        "a text that never ends": _raw_header('{"' + '\\"' * 500_000),
        "100,000 tensors": _raw_header("{" + ",".join(f'"{n}":0' for n in range(100_000)) + "}"),
        "header is a list": _raw_header("[1]"),
        "header starts with a blank": _raw_header(" " + header),
        "header is no UTF-8": safetensors(b'{"\xff": 1}', _DATA),
        "header in UTF-16": safetensors(header.encode("utf-16"), _DATA),
        "text behind the header": _raw_header(header + "{}"),
    }


def _described() -> dict[str, Content]:
    header = json.dumps(_header())
    return {
        "unknown type": _says(a={"dtype": "F33"}),
        "type that is no text": _says(a={"dtype": ["F32"]}),
        "negative length": _says(a={"shape": [-RANK, -_WIDTH]}),
        "length that is no whole number": _says(a={"shape": [RANK, 16.0]}),
        "length that is a truth value": _says(a={"shape": [True, _HALF // 4]}),
        "shape that overflows 64 bits": _says(a={"shape": [2**33, 2**33]}),
        "shape that overflows to the right size": _says(a={"shape": [2**62 + 16, 4]}),
        "shape of 1,000 dimensions": _says(a={"shape": [1] * 1_000 + [RANK * _WIDTH]}),
        "number of 5,000 digits": _raw_header(header.replace('"shape": [4', '"shape": [' + "9" * 5_000, 1)),
        "NaN as an offset": _raw_header(header.replace("[0,", "[NaN,", 1)),
        "offsets the wrong way round": _says(a={"data_offsets": [_HALF, 0]}),
        "offsets beyond the file": _says(b={"data_offsets": [2**40, 2**40 + _HALF]}),
        "three offsets": _says(a={"data_offsets": [0, 8, _HALF]}),
        "a field that the format does not know": _says(a={"code": "import os"}),
        "a tensor without a shape": _raw_header(json.dumps({_A: {"dtype": "F32", "data_offsets": [0, 4]}})),
        "a name of 10,000 letters": safetensors({"a" * 10_000: tensor("F32", (1,), 0, 4)}, bytes(4)),
        "a name with a control character": safetensors({"a\0.lora_A.weight": tensor("F32", (1,), 0, 4)}, bytes(4)),
        "a tensor without numbers": safetensors({_A: tensor("F32", (0, _WIDTH), 0, 0)}, b""),
    }


def _numbered() -> dict[str, Content]:
    extra = {"base_model.model.embed.weight": tensor("F32", (2, 2), 2 * _HALF, 2 * _HALF + 16)}
    wide = 2 * RANK
    return {
        "NaN in F32": _numbers("F32", struct.pack("<f", float("nan"))),
        "signalling NaN in F32": _numbers("F32", bytes.fromhex("010080ff")),
        "infinity in F32": _numbers("F32", struct.pack("<f", float("-inf"))),
        "NaN in F16": _numbers("F16", struct.pack("<e", float("nan"))),
        "infinity in F16": _numbers("F16", struct.pack("<e", float("-inf"))),
        "NaN in BF16": _numbers("BF16", bytes.fromhex("c07f")),
        "infinity in BF16": _numbers("BF16", bytes.fromhex("80ff")),
        "NaN in F64": _numbers("F64", struct.pack("<d", float("nan"))),
        "NaN in F8": _numbers("F8_E4M3", b"\xff"),
        "another rank than the configuration": safetensors(
            {_A: tensor("F32", (wide, 8), 0, _HALF), _B: tensor("F32", (8, wide), _HALF, 2 * _HALF)}, _DATA
        ),
        "ranks that differ within a pair": _says(b={"shape": [8, wide]}),
        "A turned round": _says(a={"shape": [_WIDTH, RANK]}),
        "half a pair": safetensors({_A: tensor("F32", (RANK, _WIDTH), 0, _HALF)}, _DATA[:_HALF]),
        "a pair of four dimensions": _says(a={"shape": [RANK, _WIDTH, 1, 1]}),
        "a whole layer beside the pairs": safetensors(_header() | extra, _DATA + bytes(16)),
        "magnitudes beside the pairs": safetensors(
            _header() | {"x.lora_magnitude_vector": tensor("F32", (4,), 2 * _HALF, 2 * _HALF + 16)}, _DATA + bytes(16)
        ),
    }


def _pickle(folder: Path, canary: Path) -> bytes:
    """A pickle that makes the canary when it is loaded."""
    return f"cos\nmkdir\n(V{canary}\ntR.".encode()


def _zipped_pickle(folder: Path, canary: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle(folder, canary))
    return packed.getvalue()


def _framed_pickle(folder: Path, canary: Path) -> bytes:
    body = _pickle(folder, canary)
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


def _numpy_pickle(folder: Path, canary: Path) -> bytes:
    header = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + _pickle(folder, canary)


_PICKLES: dict[str, Callable[[Path, Path], bytes]] = {
    "a pickle": _pickle,
    "a pickle of protocol 4": _framed_pickle,
    "a zipped pickle": _zipped_pickle,
    "a NumPy file of objects": _numpy_pickle,
    "a GGUF file": lambda folder, canary: gguf(KEYS),
    "a script": lambda folder, canary: f"#!/bin/sh\nmkdir '{canary}'\n".encode(),
}


def _with_weights(content: bytes | Callable[[Path, Path], bytes | None]) -> Build:
    def build(folder: Path, canary: Path) -> Path:
        adapter(folder)
        made = content if isinstance(content, bytes) else content(folder, canary)
        if made is not None:
            (folder / "adapter_model.safetensors").write_bytes(made)
        return folder

    return build


def _alone(name: str) -> Build:
    def build(folder: Path, canary: Path) -> Path:
        (folder / name).write_bytes(_pickle(folder, canary))
        return folder / name

    return build


def _beside(name: str, content: Callable[[Path, Path], bytes]) -> Build:
    def build(folder: Path, canary: Path) -> Path:
        adapter(folder)
        (folder / name).write_bytes(content(folder, canary))
        return folder

    return build


def _with_file(name: str, content: bytes) -> Build:
    return _beside(name, lambda folder, canary: content)


def _with_config(changes: Mapping[str, Any]) -> Build:
    return lambda folder, canary: adapter(folder, **changes)


def _sparse(path: Path, start: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


# --- folders ----------------------------------------------------------------------------------------------------------


def _folders() -> dict[str, Build]:
    def linked(folder: Path, canary: Path) -> None:
        (folder / "README.md").symlink_to("/etc/passwd")

    def linked_weights(folder: Path, canary: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder.parent / "elsewhere")
        (folder / "adapter_model.safetensors").symlink_to(folder.parent / "elsewhere")

    def two_names(folder: Path, canary: Path) -> None:
        (folder / "adapter_model.safetensors").hardlink_to(folder.parent / "other name")

    def hard_linked(folder: Path, canary: Path) -> None:
        (folder.parent / "other name").write_bytes(_true_weights())
        (folder / "adapter_model.safetensors").unlink()
        two_names(folder, canary)

    def piped(folder: Path, canary: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        os.mkfifo(folder / "adapter_model.safetensors")

    def nested(folder: Path, canary: Path) -> None:
        (folder / "code").mkdir()

    def twins(folder: Path, canary: Path) -> None:
        (folder / "Adapter_Config.json").write_text("{}")

    def many(folder: Path, canary: Path) -> None:
        for number in range(1_001):
            (folder / f"{number}.txt").touch()

    def odd(folder: Path, canary: Path) -> None:
        (folder / "READ\nME.md").touch()

    def no_weights(folder: Path, canary: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()

    def two_models(folder: Path, canary: Path) -> None:
        (folder / "other.gguf").write_bytes(gguf(KEYS))

    def renamed(folder: Path, canary: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")

    def unconfigured(folder: Path, canary: Path) -> None:
        (folder / "adapter_config.json").unlink()

    def large_prose(folder: Path, canary: Path) -> None:
        _sparse(folder / "README.md", b"#", 2**21)

    def large_table(folder: Path, canary: Path) -> None:
        _sparse(folder / "tokenizer.json", b"{", 2**34)

    def changed(change: Callable[[Path, Path], None]) -> Build:
        def build(folder: Path, canary: Path) -> Path:
            adapter(folder)
            change(folder, canary)
            return folder

        return build

    def bare_pipe(folder: Path, canary: Path) -> Path:
        os.mkfifo(folder / "model.gguf")
        return folder / "model.gguf"

    code = b"import pathlib; pathlib.Path('canary').touch()"
    return {
        "folder: empty": lambda folder, canary: folder,
        "folder: missing": lambda folder, canary: folder / "missing.gguf",
        "folder: a link out of it": changed(linked),
        "folder: weights are a link": changed(linked_weights),
        "folder: weights have a second name elsewhere": changed(hard_linked),
        "folder: weights are a pipe": changed(piped),
        "file: a pipe that nobody writes to": bare_pipe,
        "folder: a folder within": changed(nested),
        "folder: names that differ in case only": changed(twins),
        "folder: 1,003 files": changed(many),
        "folder: a name with a line end": changed(odd),
        "folder: no weights": changed(no_weights),
        "folder: weights of an adapter under another name": changed(renamed),
        "folder: weights without a configuration": changed(unconfigured),
        "folder: both adapter and model": _with_file("config.json", b'{"model_type": "llama"}'),
        "folder: prose of 2 MB": changed(large_prose),
        "folder: a vocabulary of 16 GiB": changed(large_table),
        "folder: two models": changed(two_models),
        "folder: Python code": _with_file("modeling.py", code),
        "folder: a path file": _with_file("evil.pth", code),
        "folder: a shared object": _with_file("kernel.so", b"\x7fELF" + bytes(60)),
        "folder: a program called README.md": _with_file("README.md", b"\x7fELF" + bytes(60)),
        "folder: a pickle called tokenizer.json": _beside("tokenizer.json", _framed_pickle),
        "folder: a torch archive called tokenizer.model": _beside("tokenizer.model", _zipped_pickle),
        "folder: a file that nobody knows": _with_file("notes", b"hello"),
        "folder: an archive": _with_file("more.zip", b"PK\x03\x04"),
    }


# --- settings ---------------------------------------------------------------------------------------------------------

_ADAPTER_CONFIGS: dict[str, dict[str, Any]] = {
    "auto_mapping": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "os"}},
    "megatron_config": {"megatron_config": {"a": 1}},
    "megatron_core of another module": {"megatron_core": "os"},
    "tokenizer_kwargs": {"tokenizer_kwargs": {"trust_remote_code": True}},
    "trust_remote_code": {"trust_remote_code": True},
    "unknown key": {"surprise": None},
    "another base": {"base_model_name_or_path": "example/other-model"},
    "base is an address": {"base_model_name_or_path": "https://example.com/model"},
    "base is a file address": {"base_model_name_or_path": "file:///etc"},
    "base is a path upwards": {"base_model_name_or_path": "../../model"},
    "base is a path from the root": {"base_model_name_or_path": "/etc/model"},
    "base is a path upwards within a name": {"base_model_name_or_path": f"{BASE}/../../x"},
    "base is a path of another system": {"base_model_name_or_path": "C:\\model"},
    "base is empty": {"base_model_name_or_path": ""},
    "base is null": {"base_model_name_or_path": None},
    "modules are a regular expression": {"target_modules": "(a+)+$"},
    "excluded modules are a regular expression": {"exclude_modules": "(a+)+$"},
    "layers are a regular expression": {"layers_pattern": "(a+)+$"},
    "ranks by regular expression": {"rank_pattern": {"(a+)+$": 8}},
    "factors by regular expression": {"alpha_pattern": {"(a+)+$": 8}},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "another kind": {"peft_type": "PROMPT_TUNING"},
    "a mixture of kinds": {"use_dora": True},
    "start values that read the base": {"init_lora_weights": "pissa_niter_1000000000"},
    "quantisation": {"loftq_config": {"loftq_bits": 4}},
    "layers copied a million times": {"layer_replication": [[0, 1_000_000]]},
    "revision is a path": {"revision": "../../x"},
    "rank 0": {"r": 0},
    "rank true": {"r": True},
    "rank as text": {"r": "4"},
    "rank a billion": {"r": 10**9},
    "rank of other weights": {"r": 2 * RANK},
    "factor negative": {"lora_alpha": -1},
    "dropout as text": {"lora_dropout": "__import__('os')"},
    "biases": {"bias": "all"},
}
_ADAPTER_CONFIGS_RAW: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "no rank": json.dumps({key: value for key, value in _CONFIG.items() if key != "r"}).encode(),
    "a key twice": json.dumps(_CONFIG)[:-1].encode() + b', "r": 4}',
    "nested 100,000 deep": b'{"a":' * 100_000,
    "10 MB": json.dumps(_CONFIG).encode() + b" " * 10_000_000,
    "infinity": json.dumps(_CONFIG | {"lora_alpha": float("inf")}).encode(),
    "a number beyond all measure": json.dumps(_CONFIG).replace('"lora_alpha": 8', '"lora_alpha": 1e999').encode(),
    "no UTF-8": b"\xff\xfe",
    "a pickle": b"\x80\x04N.",
}
TEMPLATES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('id') }}",
    "import through cycler": "{{ cycler.init.globals.os.popen('id').read() }}",
    "import through lipsum": "{{ lipsum['globals'] }}",
    "attr filter": "{{ messages|attr('pop')() }}",
    "str.format": "{{ '{0.real}'.format(1) }}",
    "str.format kept for later": "{% set m = '{0.real}'.format %}{{ m(1) }}",
    "str.format_map": "{{ '{a.real}'.format_map({'a': 1}) }}",
    "escaped underlines": r"{{ ''['\x5f\x5fclass\x5f\x5f'] }}",
    "underlines as Unicode": r"{{ ''['\u005fclass'] }}",
    "underlines in octal": r"{{ ''['\137class'] }}",
    "underlines by name": r"{{ ''['\N{LOW LINE}class'] }}",
    "another template": "{% include '/etc/passwd' %}",
    "another template's macros": "{%- import 'x' as y -%}",
    "a billion rounds": "{% for i in range(1000000000) %}x{% endfor %}",
    "a billion rounds, set apart": "{% for i in range(1_000_000_000) %}x{% endfor %}",
    "a text of a billion letters": "{{ 'x' * 1000000000 }}",
    "a power": "{{ 9**9**9 }}",
    "300,000 letters": "x" * 300_000,
}
"""Chat templates that leave a sandbox, read files or never end (CVE-2016-10745, CVE-2019-10906, CVE-2024-34359,
CVE-2024-56201, CVE-2024-56326, CVE-2025-27516)."""


def _model(folder: Path, files: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A whole model as it should be, apart from other files and fields of config.json."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 2} | changes))
    content = safetensors({"embed.weight": tensor("F32", (2, 2), 0, 16)}, bytes(16))
    (folder / "model.safetensors").write_bytes(content)
    for name, told in (files or {}).items():
        (folder / name).write_bytes(told if isinstance(told, bytes) else json.dumps(told).encode())
    return folder


def _with_tokenizer(told: Mapping[str, Any]) -> Build:
    return lambda folder, canary: _model(folder, {"tokenizer_config.json": told})


def _models() -> dict[str, Build]:
    second = safetensors({"other.weight": tensor("F32", (2, 2), 0, 16)}, bytes(16))
    index = {"weight_map": {"embed.weight": "model.safetensors", "other.weight": "../../x"}}
    again = safetensors({"embed.weight": tensor("F32", (2, 2), 0, 16)}, bytes(16))
    told_once = {"weight_map": {"embed.weight": "model.safetensors"}}
    named = [{"name": "default", "template": TEMPLATES["subclasses"]}]
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "auto_map": ({}, {"auto_map": {"AutoModel": "modeling.Evil"}}),
        "auto_map deep inside": ({}, {"text_config": {"a": [{"auto_map": {"AutoModel": "x--y.Evil"}}]}}),
        "custom_pipelines": ({}, {"custom_pipelines": {"x": {"impl": "x.Evil"}}}),
        "trust_remote_code": ({}, {"trust_remote_code": True}),
        "a kernel to fetch": ({}, {"_attn_implementation": "example/evil-kernel"}),
        "unknown architecture": ({}, {"model_type": "evil"}),
        "architecture that is no text": ({}, {"model_type": ["llama"]}),
        "code to generate with": ({"generation_config.json": {"custom_generate": "example/evil"}}, {}),
        "tokenizer auto_map": ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["t.Evil", None]}}}, {}),
        "tokenizer class is a path": ({"tokenizer_config.json": {"tokenizer_class": "../x:Evil"}}, {}),
        "tokenizer_config of 10 MB": ({"tokenizer_config.json": b"{}" + b" " * 10_000_000}, {}),
        "one template of several": ({"tokenizer_config.json": {"chat_template": named}}, {}),
        "template that is no text": ({"tokenizer_config.json": {"chat_template": 5}}, {}),
        "second file without an index": ({"other.safetensors": second}, {}),
        "index that points out": ({"other.safetensors": second, "model.safetensors.index.json": index}, {}),
        "a tensor in two files": ({"other.safetensors": again, "model.safetensors.index.json": told_once}, {}),
        "index that is no map": ({"other.safetensors": second, "model.safetensors.index.json": []}, {}),
        "weights as a pickle beside": ({"pytorch_model.bin": b"\x80\x04N."}, {}),
    }

    def made(files: dict[str, Any], told: dict[str, Any]) -> Build:
        return lambda folder, canary: _model(folder, files, **told)

    return {f"model: {name}": made(files, told) for name, (files, told) in changes.items()}


def _gguf_file(content: bytes) -> Build:
    def build(folder: Path, canary: Path) -> Path:
        (folder / "model.gguf").write_bytes(content)
        return folder / "model.gguf"

    return build
