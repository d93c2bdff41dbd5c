"""Trainers: examples in, a checkpoint out.

A trainer is one file with `build(**settings)` that gives a `types.Trainer`. What is written goes through `keep`, so
that a checkpoint is there whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def keep(into: Path, name: str, files: Mapping[str, bytes]) -> Path:
    """The folder `into/name` with these files, durable. Killed at any moment, it leaves the whole folder or none of it.

    A folder that is there already with the same content is left alone; one that was damaged is replaced.
    """
    target = into / name
    if _holds(target, files):
        return target
    into.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=into))
    try:
        for name, content in files.items():
            with (draft / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync(draft)
        if target.exists() and not _holds(target, files):
            shutil.rmtree(target)
        try:
            draft.rename(target)
        except OSError:
            if not _holds(target, files):  # otherwise another process was faster with the same content
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


def _holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    return all((folder / name).is_file() and (folder / name).read_bytes() == content for name, content in files.items())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
