"""Unpacks an archive that nobody has vouched for: plain files with plain names, of bounded number and size.

tar, tar.gz and zip. Every byte is counted where it leaves the decompressor, so that what an archive says of itself
decides nothing; file modes, owners and times are not taken over. Sources: PEP 706, zip's APPNOTE 6.3.10.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from apprentice.weights._source import Source, check_name, opened, refused

_PIECE = 2**18
_SPARE = 2**20  # bytes that may stand between two files of a tar: headers, padding, long names
_SMALL = 16 * 2**20  # bytes that any archive may hold, however well they compress
_END = struct.Struct("<4s4H2LH")  # end of central directory: the counts are the 4th and 5th field, then size and offset
_DIRECTORY_ENTRY = 46 + 4 * 1024  # bytes of one entry in it, generously


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may hold. `ratio`: bytes out of it for a byte of it, beyond 16 MiB (weights hardly compress)."""

    files: int = 256
    size: int = 16 * 2**30
    ratio: int = 10


def unpack(archive: Path, into: Path, limits: Limits | None = None) -> Path:
    """The new folder `into` with the archive's files; killed or refused at any moment, it leaves none.

    Refused: names with `..`, absolute or otherwise not plain ones, twins, links, devices, pipes, sparse files, more or
    larger files than `limits` allows, encrypted or damaged archives, kinds other than tar, tar.gz and zip. What is in
    the files is not looked at: see `check`.
    Raises UnsafeFile for these, and when `into` is there; OSError when the disk does not take it.
    """
    limits = limits or Limits()
    if into.exists():
        raise refused(archive, f"{into} exists already")
    with opened(archive, follow=True) as source:
        start = source.at(0, min(4, source.size))
        into.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=into.parent))
        try:
            meter = _Meter(source, limits)
            write = _zip if start == b"PK\x03\x04" else _tar
            try:
                write(source, draft, meter)
            except (tarfile.TarError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile) as error:
                raise source.refused(f"it is damaged or no archive: {str(error)[:200]}") from error
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:  # the draft is ours alone
                raise source.refused("a file in it is a folder too") from error
            except (EOFError, ValueError, OverflowError, struct.error, NotImplementedError, RuntimeError) as error:
                raise source.refused(f"it is damaged or no archive: {str(error)[:200]}") from error
            _sync(draft)
            draft.rename(into)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return into


class _Meter:
    """Counts files and bytes against the limits."""

    def __init__(self, source: Source, limits: Limits) -> None:
        self.source = source
        self.limits = limits
        self.most = min(limits.size, max(_SMALL, source.size * limits.ratio))
        self._bytes = 0
        self._names: dict[str, str] = {}

    def name(self, name: str, *, folder: bool = False) -> None:
        if len(self._names) == self.limits.files:
            raise self.source.refused(f"it holds more than {self.limits.files:,} files")
        check_name(self.source.name, name.removesuffix("/") if folder else name, self._names)

    def count(self, length: int) -> None:
        self._bytes += length
        if self._bytes > self.most:
            raise self.source.refused(f"it holds more than {self.most:,} bytes")


class _Counted(io.RawIOBase):
    """A stream for tarfile; between two files it gives out no more than headers need."""

    def __init__(self, stream: IO[bytes], meter: _Meter) -> None:
        self.allowance = _SPARE
        self._stream = stream
        self._meter = meter

    def read(self, length: int = -1) -> bytes:
        self.allowance -= length
        if length < 0 or self.allowance < 0:
            raise self._meter.source.refused("its headers are larger than any file needs")
        found = self._stream.read(length)
        self._meter.count(len(found))
        return found


def _tar(source: Source, draft: Path, meter: _Meter) -> None:
    raw = io.BufferedReader(_Raw(source), _PIECE)
    packed = source.at(0, min(2, source.size)) == b"\x1f\x8b"
    stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if packed else raw
    counted = _Counted(stream, meter)
    with (
        closing(stream),
        tarfile.open(fileobj=cast("IO[bytes]", counted), mode="r|", bufsize=tarfile.RECORDSIZE) as tar,
    ):
        while (member := tar.next()) is not None:
            if member.isdir() and member.name == ".":
                continue
            member.name = member.name.removeprefix("./")
            meter.name(member.name, folder=member.isdir())
            if not (member.isreg() or member.isdir()) or member.issparse() or member.type == tarfile.CONTTYPE:
                raise source.refused(f"{member.name[:200]!r} in it is no plain file")
            tarfile.data_filter(member, str(draft))
            path = draft / member.name
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            else:
                if not 0 <= member.size <= meter.most:
                    raise source.refused(f"{member.name!r} in it is too large")
                counted.allowance += member.size
                content = tar.extractfile(member)
                assert content is not None, "it is a plain file"
                _write(path, content, member.size, source)
            counted.allowance = _SPARE


def _zip(source: Source, draft: Path, meter: _Meter) -> None:
    if source.size < _END.size:
        raise source.refused("it is cut short")
    end = _END.unpack(source.at(source.size - _END.size, _END.size))
    signature, _, _, here, count, size, offset, comment = end
    locator = source.at(source.size - _END.size - 20, 4) if source.size >= _END.size + 20 else b""
    if signature != b"PK\x05\x06" or comment or here != count or locator == b"PK\x06\x07":
        raise source.refused("it is no plain zip archive (no comment, one part, below 4 GiB)")
    if size > min(count, meter.limits.files) * _DIRECTORY_ENTRY or size + offset > source.size:
        raise source.refused(f"it lists more than {meter.limits.files:,} files")
    with zipfile.ZipFile(io.BufferedReader(_Raw(source), _PIECE)) as archive:
        for info in archive.infolist():
            meter.name(info.filename, folder=info.is_dir())
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            plain = info.flag_bits & 1 == 0 and info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not plain or kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.orig_filename != info.filename:
                raise source.refused(f"{info.filename[:200]!r} in it is no plain file")
            if info.is_dir():
                (draft / info.filename).mkdir(parents=True, exist_ok=True)
                continue
            meter.count(info.file_size)  # zipfile gives out no more than that, and checks the sum
            with archive.open(info) as content:
                _write(draft / info.filename, content, info.file_size, source)


def _write(path: Path, content: IO[bytes], size: int, source: Source) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        while piece := content.read(_PIECE):
            size -= len(piece)
            file.write(piece)
    if size:
        raise source.refused(f"{path.name!r} in it is cut short")


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Raw(io.RawIOBase):
    """A Source as a stream."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.size}[whence]
        if self._at < 0:
            raise ValueError("it points before its begin")
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._source.at(self._at, max(0, min(len(buffer), self._source.size - self._at)))
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
