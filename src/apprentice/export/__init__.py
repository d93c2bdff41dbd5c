"""A version leaves the house: one folder that other programs can serve, with its licence, origin and hashes beside it.

    gguf         model.gguf, base and adapter in one file; or adapter.gguf alone
    ollama       the same with a Modelfile
    safetensors  the merged model as transformers, vLLM and others read it
    onnx         the embedded student as one graph, with its tokenizer; the model plugin `onnx` serves it

A folder is there whole or not at all, and never replaces anything but an earlier export. Nothing leaves this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

from apprentice import weights
from apprentice.dialogues import system
from apprentice.errors import ConfigError
from apprentice.models import _checkpoints
from apprentice.types import Json, Task, Value
from apprentice.weights._gguf import read_gguf
from apprentice.weights._source import opened

type Format = Literal["gguf", "ollama", "safetensors", "onnx"]

FORMATS: tuple[Format, ...] = ("gguf", "ollama", "safetensors", "onnx")
_MANIFEST, _CARD = "manifest.json", "README.md"
_EXPORT = "apprentice-export-1"
_PEFT = ("adapter_config.json", "adapter_model.safetensors")
TYPES = ("same", "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
CONTEXT = 4096
_SPARE = 64 * 2**20  # bytes of disk beside the weights
_CHATML = ("<|im_start|>", "<|im_end|>")
_CHATML_TEMPLATE = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


class Order(NamedTuple):
    """What is exported, as what, and where to.

    `base`: of an adapter, its base model where the checkpoint cannot say where it is: a GGUF file, for safetensors a folder.
    `type`: of the numbers in merged GGUF tensors, "same" for the base's. `licence`: of the base, where its files do not say.
    """

    checkpoint: Path
    task: Task
    version: str
    format: Format
    to: Path
    base: Path | None = None
    type: str | None = None
    adapter_only: bool = False
    licence: str | None = None
    context: int = CONTEXT
    force: bool = False


class Exported(Value):
    """What was written. `files`: SHA-256 by name; `commands`: how to use it; `notes`: what to know about it."""

    path: str
    format: Format
    files: dict[str, str]
    size: int
    licence: str | None
    commands: tuple[str, ...]
    notes: tuple[str, ...]


class _Part(NamedTuple):
    """What one format says of itself when its files are there."""

    manifest: dict[str, Json]
    base: str
    licence: str | None
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def write(order: Order) -> Exported:
    """The folder `order.to`. Raises ConfigError for what cannot be exported so, a folder in the way or a full disk.

    UnsafeFile for weights that must not be opened, MissingExtra without the packages of the format.
    """
    to = order.to.absolute()
    _check_place(to, force=order.force)
    manifest = _manifest(order.checkpoint)
    try:
        return _written(order, manifest, to)
    except OSError as error:
        raise ConfigError(f"{to} cannot be written: {error.strerror or error}", hint="another --to") from error


def _written(order: Order, manifest: Mapping[str, Json], to: Path) -> Exported:
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=to.parent) as room:
        draft = Path(room) / "draft"
        draft.mkdir()
        part = _MAKERS[order.format](order, manifest, draft)
        hashes = {path.name: _hash(path) for path in sorted(draft.iterdir())}
        about = {
            "format": _EXPORT,
            **part.manifest,
            "task": order.task.name,
            "version": order.version,
            "checkpoint": order.checkpoint.name,
            "base": part.base,
            "licence": {"base": part.licence, "rows": manifest.get("licence") or {}},
            "examples": manifest.get("examples"),
            "files": hashes,
        }
        _put(draft / _MANIFEST, json.dumps(about, indent=1).encode())
        _put(draft / _CARD, _card(order, part, manifest, hashes).encode())
        if order.format == "safetensors":
            weights.check(draft, expected=weights.Expected(kind="model"))
        _move(draft, to, Path(room) / "former")
    return Exported(
        path=str(to),
        format=order.format,
        files=hashes,
        size=sum(file.stat().st_size for file in to.iterdir()),
        licence=part.licence,
        commands=part.commands,
        notes=part.notes,
    )


# --- the formats ------------------------------------------------------------------------------------------------------


def _as_onnx(order: Order, manifest: Mapping[str, Json], draft: Path) -> _Part:
    if "heads" not in manifest:
        raise ConfigError(
            f"{order.checkpoint.name} is no embedded student, and only those have an ONNX form",
            hint="export a generative one --as gguf, ollama or safetensors",
        )
    from apprentice.export import _onnx

    made = _onnx.made(order.checkpoint)
    _check_room(draft, len(made.model) + len(made.tokenizer))
    _put(draft / "model.onnx", made.model)
    _put(draft / "tokenizer.json", made.tokenizer)
    encoder = made.manifest["encoder"]["name"]
    use = f"plugins.build('models', 'onnx', checkpoint={str(order.to)!r})"
    told = {"format": "apprentice-onnx-1", **made.manifest}
    return _Part(told, encoder, made.licence, (use,), ("needs onnxruntime and tokenizers: apprentice[onnx]",))


def _as_gguf(order: Order, manifest: Mapping[str, Json], draft: Path) -> _Part:
    student = _generative(order)
    notes: tuple[str, ...] = ()
    if order.adapter_only:
        _adapter(order, student, draft)
        base = str(student.base.get("file"))
        command = f"llama-server -m {base} --lora {order.to / 'adapter.gguf'}"
        return _Part({"kind": "adapter"}, base, order.licence, (command,))
    if student.kind == "model":
        _check_room(draft, student.path.stat().st_size)
        _copy(student.path, draft / "model.gguf")
        base = order.checkpoint.name
    else:
        base, notes = _merged_gguf(order, student, draft)
    licence = order.licence or _licence_of(draft / "model.gguf")
    return _Part({"kind": "model"}, base, licence, (f"llama-server -m {order.to / 'model.gguf'}",), notes)


def _merged_gguf(order: Order, student: _checkpoints.Student, draft: Path) -> tuple[str, tuple[str, ...]]:
    if order.type not in (None, *TYPES):
        raise ConfigError(f"there is no type {order.type!r} to merge to", hint=f"one of: {', '.join(TYPES)}")
    adapter = _gguf_adapter(order, student)
    base = order.base or Path(student.base["file"])
    _checkpoints.check_base(student, base)
    weights.check(base, expected=weights.Expected(kind="model"))
    weights.check(adapter, expected=weights.Expected(kind="adapter"))
    from apprentice.export import _gguf

    merge = _gguf.Merge(base, adapter, order.type)
    _check_room(draft, merge.size)
    merged = merge.write(draft / "model.gguf")
    weights.check(draft / "model.gguf", expected=weights.Expected(kind="model"))
    note = f"{merged.touched} tensors merged ({', '.join(merged.types)}), {merged.copied} copied as they are"
    return f"{base.name} (sha256 {student.base.get('sha256')})", (note,)


def _as_ollama(order: Order, manifest: Mapping[str, Json], draft: Path) -> _Part:
    part = _as_gguf(order, manifest, draft)
    name = re.sub(r"[^a-z0-9._-]+", "-", f"apprentice-{order.task.name}-{order.version}".lower())
    lines = ["FROM ./model.gguf"]
    if order.adapter_only:
        lines = [f"FROM {part.base}", "ADAPTER ./adapter.gguf"]
    else:
        found = weights.check(draft / "model.gguf")
        lines.append(f"PARAMETER num_ctx {min(order.context, found.context or order.context)}")
        if found.template is not None and all(mark in found.template for mark in _CHATML):
            lines += [f"TEMPLATE {_quoted(_CHATML_TEMPLATE)}", f'PARAMETER stop "{_CHATML[1]}"']
    lines += ["PARAMETER temperature 0", f"SYSTEM {_quoted(system(order.task))}"]
    if part.licence is not None:
        lines.append(f"LICENSE {_quoted(part.licence)}")
    _put(draft / "Modelfile", ("\n".join(lines) + "\n").encode())
    commands = (f"ollama create {name} -f {order.to / 'Modelfile'}", f"ollama run {name}")
    return part._replace(commands=commands)


def _as_safetensors(order: Order, manifest: Mapping[str, Json], draft: Path) -> _Part:
    student = _generative(order)
    folder = student.path.parent
    if student.kind != "adapter" or not all((folder / name).is_file() for name in _PEFT):
        raise ConfigError(
            f"{order.checkpoint.name} has no adapter as PEFT writes it ({', '.join(_PEFT)})",
            hint="export it --as gguf; what is GGUF already is not turned back",
        )
    told = json.loads((folder / _PEFT[0]).read_bytes())
    base = order.base or Path(str(told.get("base_model_name_or_path")))
    if not (base / "config.json").is_file():
        raise ConfigError(
            f"the base is not a folder with config.json and safetensors: {base}", hint="--base FOLDER of the base model"
        )
    from apprentice.export import _safetensors

    with tempfile.TemporaryDirectory(dir=draft.parent) as alone:  # beside it may lie the same adapter as GGUF
        for name in _PEFT:
            shutil.copyfile(folder / name, Path(alone) / name)
        weights.check(
            Path(alone), expected=weights.Expected(kind="adapter", base=str(told.get("base_model_name_or_path")))
        )
        weights.check(base, expected=weights.Expected(kind="model"))
        _check_room(draft, sum(file.stat().st_size for file in base.iterdir()))
        touched = _safetensors.merge(base, Path(alone), draft)
    licence = order.licence or _licence_in(base)
    (draft / _CARD).unlink(missing_ok=True)  # the base's card is not this model's
    (draft / _MANIFEST).unlink(missing_ok=True)
    command = f"vllm serve {order.to}"
    return _Part({"kind": "model"}, base.name, licence, (command,), (f"{touched} tensors merged",))


_MAKERS: dict[Format, Callable[[Order, Mapping[str, Json], Path], _Part]] = {
    "gguf": _as_gguf,
    "ollama": _as_ollama,
    "safetensors": _as_safetensors,
    "onnx": _as_onnx,
}


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Json]:
    try:
        found = json.loads((folder / _MANIFEST).read_bytes())
    except OSError as error:
        raise ConfigError(f"{folder} is no checkpoint: {error.strerror or error}", hint=_checkpoints.AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise _checkpoints.damaged(folder, "its manifest is no JSON") from error
    if not isinstance(found, dict):
        raise _checkpoints.damaged(folder, "its manifest is no object")
    return found


def _generative(order: Order) -> _checkpoints.Student:
    manifest = _manifest(order.checkpoint)
    if "heads" in manifest:
        raise ConfigError(
            f"{order.checkpoint.name} is an embedded student, no language model", hint="export it --as onnx"
        )
    if manifest.get("kind") not in ("adapter", "model"):
        kind = manifest.get("kind") or manifest.get("format")
        raise ConfigError(
            f"{order.checkpoint.name} is of the kind {kind!r}, and has no weights that could leave by themselves",
            hint="export a version of the trainer `embedded`, or one that is an adapter or a whole model",
        )
    return _checkpoints.load(order.checkpoint)


def _gguf_adapter(order: Order, student: _checkpoints.Student) -> Path:
    beside = student.path.parent / "adapter.gguf"
    adapter = student.path if student.path.suffix == ".gguf" else beside
    if not adapter.is_file():
        raise ConfigError(
            f"{order.checkpoint.name} has its adapter as safetensors only",
            hint="--as safetensors, or --adapter-only --base FOLDER with the base's config.json",
        )
    return adapter


def _adapter(order: Order, student: _checkpoints.Student, draft: Path) -> None:
    """adapter.gguf in the draft: copied, or made of what PEFT wrote."""
    if student.kind != "adapter":
        raise ConfigError(f"{order.checkpoint.name} is a whole model, no adapter", hint="leave out --adapter-only")
    if student.path.suffix == ".gguf":
        _copy(student.path, draft / "adapter.gguf")
        return
    config = (order.base or Path()) / "config.json"
    if order.base is None or not config.is_file():
        raise ConfigError("an adapter as PEFT writes it needs its base's config.json", hint="--base FOLDER")
    from apprentice.trainers._adapters import lora_to_gguf

    try:
        lora_to_gguf(student.path.parent, json.loads(config.read_bytes()), draft / "adapter.gguf")
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{order.checkpoint.name}: {error}") from error
    weights.check(draft / "adapter.gguf", expected=weights.Expected(kind="adapter"))


def _licence_of(path: Path) -> str | None:
    """What a GGUF file says of its licence."""
    with opened(path) as source:
        found = read_gguf(source)
    said = found.text("general.license.name") or found.text("general.license")
    link = found.text("general.license.link")
    return f"{said} ({link})" if said and link else said


def _licence_in(base: Path) -> str | None:
    """What a folder's card says in its head, else the file that holds the licence."""
    card = base / _CARD
    head = card.read_text(errors="replace") if card.is_file() else ""
    said = re.match(r"---\n(?:.*\n)*?license: *([\w.+-]+) *\n", head)
    if said is not None:
        return said[1]
    return next((f"see the file {name}" for name in _LICENCE_FILES if (base / name).is_file()), None)


# --- writing ----------------------------------------------------------------------------------------------------------


def _check_place(to: Path, *, force: bool) -> None:
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not to.is_dir() or not _is_export(to):
        raise ConfigError(f"{to} is there already, and is no export", hint="choose another folder")
    if not force:
        raise ConfigError(f"{to} holds an export already", hint="--force replaces it")


def _is_export(folder: Path) -> bool:
    try:
        told = json.loads((folder / _MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("format") in (_EXPORT, "apprentice-onnx-1")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _SPARE > free:
        raise ConfigError(f"the export takes {needed:,} bytes, and the disk has {free:,} free", hint="another --to")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as written:
        os.fsync(written.fileno())


def _put(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _hash(path: Path) -> str:
    found = sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()


def _move(draft: Path, to: Path, former: Path) -> None:
    """The draft at its place; what was there goes with the room."""
    if to.exists():
        to.rename(former)
    try:
        draft.rename(to)
    except OSError:
        if former.exists():
            former.rename(to)
        raise
    descriptor = os.open(to.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- words ------------------------------------------------------------------------------------------------------------


def _quoted(text: str) -> str:
    if '"""' in text:
        raise ConfigError('a Modelfile cannot hold a text with """ in it', hint="change the task's description")
    return f'"""{text}"""'


def _card(order: Order, part: _Part, manifest: Mapping[str, Json], hashes: Mapping[str, str]) -> str:
    """README.md: what it is, where it is from, under which terms, and how it is used."""
    lines = [f"# {order.task.name}, {order.version}", "", order.task.description, "", "## Origin", ""]
    lines += [f"- made of: {part.base}", f"- checkpoint: {order.checkpoint.name}"]
    if (count := manifest.get("examples")) is not None:
        lines.append(f"- learned from {count} examples")
    lines += [f"- {note}" for note in part.notes]
    lines += ["", "## Licence", ""]
    lines.append(f"- the model it is made of: {part.licence or 'not stated; ask whoever gave it to you'}")
    rows = manifest.get("licence") or {}
    for group in rows.get("by", []):
        told = (f"{group.get(key)}" for key in ("teacher", "model", "terms", "basis"))
        lines.append(f"- {group.get('rows')} training rows: {', '.join(told)}")
    if not rows:
        lines.append("- training rows: the checkpoint holds no proof of their terms")
    lines += ["", "## Use", "", "```", *part.commands, "```", "", "## Files", "", "SHA-256, and name:", "", "```"]
    return "\n".join([*lines, *(f"{digest}  {name}" for name, digest in hashes.items()), "```", ""])
