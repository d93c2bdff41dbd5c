"""Trainers: examples in, a checkpoint out.

A trainer is one file with `build(**settings)` that gives a `types.Trainer`. What is written goes through `keep`, so
that a checkpoint is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

from apprentice.types import Checkpoint, Example, Json, Seconds, Task, Trainer

JOBS = ".training"
"""In the folder that is trained into: a folder for each job that is done on this machine."""

_NONE: Mapping[str, Path] = MappingProxyType({})


@runtime_checkable
class Updater(Trainer, Protocol):
    """A trainer that also goes on from a checkpoint, for much less than `train`, with nearly the same result."""

    def update(
        self, task: Task, examples: Sequence[Example], *, base: Path, into: Path, seed: int, licence: Mapping[str, Json]
    ) -> Checkpoint:
        """What `train` gives for these examples, nearly: all of them, not only those that are new to `base`.

        The same base, examples and seed give the same id; `manifest["updated_from"]` is the id of the base.
        Raises what `train` raises, and TrainingError where only `train` will do.
        """
        ...


class Progress(NamedTuple):
    """How far a job has come. `eta`: seconds that are left, about; `loss`: of the last steps; None: not told yet."""

    job: str
    step: int
    steps: int
    loss: float | None
    held_loss: float | None
    eta: Seconds | None
    at: Seconds | None  # when it was last told
    token: int  # of the lease of who leads the job


def progress(into: Path) -> list[Progress]:
    """How far the open jobs have come that are trained into this folder, or into one of its parts, as their files say.

    A job that ends meanwhile, or whose row cannot be read, is left out; a line that was not written whole is passed over.
    """
    found = []
    for pattern in (f"{JOBS}/*/row.json", f"*/{JOBS}/*/row.json"):
        for path in sorted(into.glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                row = _object(path.read_bytes())
                if row.get("checkpoint") is None:
                    found.append(_progress(path.parent, row.get("token", 0)))
    return found


def _progress(folder: Path, token: int) -> Progress:
    told: dict[str, Json] = {}
    at = None
    path = folder / "progress.jsonl"
    with contextlib.suppress(FileNotFoundError):
        at = path.stat().st_mtime
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # half a line, of a child that writes or was killed while it wrote
                told |= _object(line)
    step, steps, loss, held_loss, eta = (
        _number(told.get(name)) for name in ("step", "steps", "loss", "held_loss", "eta")
    )
    return Progress(folder.name, int(step or 0), int(steps or 0), loss, held_loss, eta, at, token)


def _object(text: bytes) -> dict[str, Json]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def _number(told: Json) -> float | None:
    """A number that JSON can say: a loss that has diverged is none."""
    return told if isinstance(told, int | float) and math.isfinite(told) else None


def keep(into: Path, name: str, files: Mapping[str, bytes], parts: Mapping[str, Path] = _NONE) -> Path:
    """The folder `into/name` with these files, durable. Killed at any moment, it leaves the whole folder or none of it.

    `parts`: folders on the same disk, themselves durable, that are moved into it under these names.
    A folder that is there already with the same content is left alone; one that was damaged is replaced.
    """
    target = into / name
    if _holds(target, files, parts):
        for part in parts.values():
            shutil.rmtree(part)
        return target
    into.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=into))
    try:
        for name, content in files.items():
            with (draft / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, part in parts.items():
            part.rename(draft / name)
        _sync(draft)
        moved = {name: draft / name for name in parts}
        if target.exists() and not _holds(target, files, moved):
            shutil.rmtree(target)
        try:
            draft.rename(target)
        except OSError:
            if not _holds(target, files, moved):  # otherwise another process was faster with the same content
                raise
        _sync(into)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def replace_file(path: Path, content: bytes) -> None:
    """The file with this content. Killed at any moment, it leaves the former file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".draft-", dir=path.parent, delete=False) as draft:
        draft.write(content)
        draft.flush()
        os.fsync(draft.fileno())
    Path(draft.name).replace(path)


def _holds(folder: Path, files: Mapping[str, bytes], parts: Mapping[str, Path]) -> bool:
    whole = all((folder / n).is_file() and (folder / n).read_bytes() == content for n, content in files.items())
    return whole and all(_equal(folder / name, part) for name, part in parts.items())


def _equal(folder: Path, other: Path) -> bool:
    names = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    return all((folder / name).is_file() and filecmp.cmp(folder / name, other / name, shallow=False) for name in names)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
