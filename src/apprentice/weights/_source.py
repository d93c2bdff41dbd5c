"""Bytes and names that nobody has vouched for: read in bounded pieces, refused with one error."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from apprentice.errors import UnsafeFile
from apprentice.types import Json

_FEW_FILES = 1_000
_DEEP = 24  # objects and lists within each other; an index or a configuration has four
_NODES = 400_000  # values in one JSON document
_JSON_BYTES = 4 * 2**20
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)  # an open string runs to the end: linear, always
_NAME = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9 _.+=@,()-]*")
_LONGEST_NAME = 200


def refused(what: object, why: str) -> UnsafeFile:
    """The error for a file that must not be handed to any library."""
    return UnsafeFile(f"{what} is refused: {why}")


class Source:
    """One open file of a known size, read in pieces that its reader asks for."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.size = size
        self.name = name
        self._file = file

    def at(self, offset: int, length: int) -> bytes:
        """Exactly these bytes, or the file is refused."""
        if offset + length > self.size:
            raise self.refused("it is cut short")
        self._file.seek(offset)
        found = self._file.read(length)
        if len(found) != length:
            raise self.refused("it is cut short, or changes while it is read")
        return found

    def refused(self, why: str) -> UnsafeFile:
        return refused(self.name, why)


class Entry(NamedTuple):
    """A file of a folder, by its name in there."""

    name: str
    path: Path
    size: int


@contextmanager
def opened(path: Path, *, follow: bool = False) -> Iterator[Source]:
    """The regular file at a path. A pipe or a device is refused and never waited for; a link too, unless `follow`."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    except OSError as error:
        raise refused(path, error.strerror or str(error)) from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise refused(path, "it is no regular file")
        yield Source(file, found.st_size, str(path))


def entries(folder: Path) -> list[Entry]:
    """The files of a folder by name, nothing opened.

    Refused: links of both kinds, pipes, devices, folders within, too many files, names that one file system keeps apart
    and another does not, names that are not plain.
    """
    found: list[Entry] = []
    try:
        with os.scandir(folder) as scan:
            for item in scan:
                if len(found) == _FEW_FILES:
                    raise refused(folder, f"it has more than {_FEW_FILES:,} files")
                about = item.stat(follow_symlinks=False)
                if not stat.S_ISREG(about.st_mode):
                    kind = "a link" if stat.S_ISLNK(about.st_mode) else "no regular file"
                    raise refused(folder, f"{item.name!r} in it is {kind}")
                if about.st_nlink > 1:
                    raise refused(folder, f"{item.name!r} in it has a second name elsewhere (a hard link)")
                found.append(Entry(item.name, Path(item.path), about.st_size))
    except OSError as error:
        raise refused(folder, error.strerror or str(error)) from error
    seen: dict[str, str] = {}
    for entry in found:
        check_name(folder, entry.name, seen)
    return sorted(found)


def check_name(where: object, name: str, seen: dict[str, str]) -> None:
    """Refuse a name that is not plain, or that means a file in `seen` where upper and lower case are one."""
    parts = name.split("/")
    if len(name) > _LONGEST_NAME or not all(_NAME.fullmatch(part) and part.strip(". ") for part in parts):
        raise refused(where, f"{name[:_LONGEST_NAME]!r} is no plain name")
    other = seen.get(name.casefold())
    if other is not None:
        raise refused(where, f"{name!r} is there twice" if other == name else f"{name!r} and {other!r} are twins")
    seen[name.casefold()] = name


def read_json(source: Source, *, most: int = _JSON_BYTES) -> Json:
    """The JSON document in a file of at most `most` bytes; see `parsed`."""
    if source.size > most:
        raise source.refused(f"it has {source.size:,} bytes, of at most {most:,}")
    return parsed(source.at(0, source.size), source)


def parsed(raw: bytes, source: Source) -> Json:
    """A JSON text (RFC 8259) with bounded depth and count, without duplicate keys, NaN and infinity."""
    bare = _STRING.sub(b"", raw)
    if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > _NODES:
        raise source.refused(f"its JSON has more than {_NODES:,} values")
    depth = 0
    for bracket in re.finditer(rb"[\[\]{}]", bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > _DEEP:
            raise source.refused(f"its JSON is nested deeper than {_DEEP}")
    try:
        found: Json = json.loads(
            raw.decode(), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite_number
        )
    except (ValueError, RecursionError) as error:
        raise source.refused(f"its JSON cannot be used: {str(error)[:200]}") from error
    return found


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
