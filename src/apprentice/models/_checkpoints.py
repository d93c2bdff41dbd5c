"""What a generative trainer leaves behind: weights, how to read their confidence, and what they answered in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

from apprentice import weights
from apprentice.calibration import SAME, Table
from apprentice.calibration import checked as checked_table
from apprentice.errors import ConfigError
from apprentice.models._confidence import Rule
from apprentice.types import Json, Task

AGAIN = "teach the task again"


class Student(NamedTuple):
    """What a checkpoint's folder holds: weights, how to read their confidence, and what training saw them answer."""

    name: str
    path: Path  # of the weights
    kind: Literal["adapter", "model"]
    base: dict[str, Json]  # of an adapter: its base's file and sha256
    table: Table
    rule: Rule  # that the table was made for, with these fields
    fields: Sequence[str] | None
    task: Task
    probes: tuple[tuple[Json, Json], ...]  # input, output


def load(folder: str | Path) -> Student:
    """The student in a checkpoint's folder.

    Raises ConfigError when it is missing, damaged or not of this kind, UnsafeFile when its weights must not be opened.
    """
    folder = Path(folder)
    try:
        written = (folder / "manifest.json").read_bytes()
    except OSError as error:
        raise ConfigError(f"{folder} is no checkpoint: {error.strerror or error}", hint=AGAIN) from error
    if folder.resolve().name != f"sha256-{sha256(written).hexdigest()}":
        raise damaged(folder, "its manifest does not have the hash that names it")
    try:
        manifest = json.loads(written)
        kind, path = manifest["kind"], folder / manifest["file"]
        table = checked_table(manifest.get("calibration") or SAME)
        raw = manifest["confidence"]
        rule, fields = raw["rule"], raw["fields"]
        probes = tuple((probe["input"], probe["output"]) for probe in manifest["probe"])
        bares = [probe.get("base") for probe in manifest["probe"]]
        task = Task.model_validate(manifest["task"])
        base = manifest["base"] if kind == "adapter" else {}
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"its manifest cannot be read: {error}") from error
    if not probes or any(output is None for _, output in probes):
        raise damaged(folder, "its manifest has no probes, or one without an output")
    if kind == "adapter" and all(bare == output for (_, output), bare in zip(probes, bares, strict=True)):
        # Otherwise an adapter that was not applied would pass the probes.
        raise damaged(folder, "it answers every probe as its base does without it")
    if kind not in ("adapter", "model") or not path.resolve().is_relative_to(folder.resolve()):
        raise damaged(folder, "its manifest names no weights in the folder")
    for name, digest in files.items():
        if file_hash(folder / name) != digest:
            raise damaged(folder, f"{name} does not have the hash in the manifest")
    weights.check(path if path.suffix == ".gguf" else path.parent, expected=weights.Expected(kind=kind))
    named = folder.resolve().name.removeprefix("sha256-")[:12]
    return Student(named, path, kind, base, table, rule, fields, task, probes)


def damaged(folder: Path, why: str) -> ConfigError:
    """The error for a checkpoint whose content cannot be used."""
    return ConfigError(f"the checkpoint {folder} is damaged: {why}", hint=AGAIN)


def check_base(student: Student, base: Path) -> None:
    """Nothing, where the file is the base that an adapter was trained on. Raises ConfigError otherwise."""
    wanted = student.base.get("sha256")
    if file_hash(base) != wanted:
        raise ConfigError(
            f"the checkpoint {student.name} changes {student.base.get('file')} ({wanted}), and {base} is another file",
            hint="give the base that it was trained on in the setting `model`",
        )


_hashes: dict[tuple[str, int, int], str] = {}  # a base of gigabytes is read once a process, not once a version


def file_hash(path: Path) -> str:
    """The SHA-256 of a file. Raises ConfigError when it cannot be read."""
    try:
        about = path.stat()
        known = (str(path.resolve()), about.st_size, about.st_mtime_ns)
        if known not in _hashes:
            digest = sha256()
            with path.open("rb") as file:
                while piece := file.read(2**20):
                    digest.update(piece)
            _hashes[known] = digest.hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    return _hashes[known]
