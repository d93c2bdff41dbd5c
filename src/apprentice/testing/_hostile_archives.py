"""The archives of `hostile`: what must not be unpacked."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

type Build = Callable[[Path, Path], Path]


def _tar(*members: tuple[tarfile.TarInfo, bytes], packed: bool = False) -> Build:
    def build(folder: Path, canary: Path) -> Path:
        path = folder / ("a.tar.gz" if packed else "a.tar")
        with tarfile.open(path, "w:gz" if packed else "w") as archive:
            for member, content in members:
                archive.addfile(member, io.BytesIO(content))
        return path

    return build


def _member(name: str, *, type: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = type, size, link
    return member


def _zip(*members: tuple[str, int, bytes]) -> Build:
    """A zip archive of names, Unix modes and contents."""

    def build(folder: Path, canary: Path) -> Path:
        with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, mode, content in members:
                info = zipfile.ZipInfo(name)
                info.external_attr = mode << 16
                archive.writestr(info, content, zipfile.ZIP_DEFLATED)
        return folder / "a.zip"

    return build


def _sparse(name: str, start: bytes, size: int) -> Build:
    def build(folder: Path, canary: Path) -> Path:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)
        return folder / name

    return build


def _repeated(start: bytes, block: bytes, times: int) -> Build:
    """A gzip file of a start and a block many times over; compressed once, so that it is quickly made."""

    def build(folder: Path, canary: Path) -> Path:
        squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
        first = squeeze.compress(start) + squeeze.flush(zlib.Z_FULL_FLUSH)
        again = squeeze.compress(block) + squeeze.flush(zlib.Z_FULL_FLUSH)
        header = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
        (folder / "a.tar.gz").write_bytes(header + first + again * times)
        return folder / "a.tar.gz"

    return build


def _raw(name: str, content: bytes) -> Build:
    def build(folder: Path, canary: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def archives() -> dict[str, Build]:
    """What must not be unpacked, by a name that says what is wrong with it."""
    return _names() | _tars() | _zips()


def _names() -> dict[str, Build]:
    names = {
        "a path upwards": "../canary",
        "a path upwards within": "a/../../canary",
        "a path from the root": "/tmp/canary",  # noqa: S108 - what it says, nothing is written
        "a path of another system": "C:\\canary",
        "a path upwards of another system": "..\\canary",
        "a name with a control character": "a\nb",
        "a name of blanks": " ",
        "a name of 5,000 letters": "a" * 5_000,
        "a path of 300 folders": "a/" * 300 + "a",
    }
    made: dict[str, Build] = {}
    for said, name in names.items():
        made[f"tar: {said}"] = _tar((_member(name, size=2), b"{}"))
        made[f"zip: {said}"] = _zip((name, stat.S_IFREG | 0o644, b"{}"))
    return made


def _tars() -> dict[str, Build]:
    plain = _member("a.json", size=2), b"{}"
    heads = b"".join(_member(f"{number}.json").tobuf() for number in range(1_000))
    long_names = _member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=512).tobuf() + b"a" * 512
    linked = _member("a", type=tarfile.SYMTYPE, link="/tmp")  # noqa: S108 - where it would lead
    zeros = bytes(32 * 2**20)
    made: dict[str, Build] = {}
    for said, kind in (
        ("hard link", tarfile.LNKTYPE),
        ("character device", tarfile.CHRTYPE),
        ("pipe", tarfile.FIFOTYPE),
    ):
        made[f"tar: a {said}"] = _tar(plain, (_member("b", type=kind, link="a.json"), b""))
    return made | {
        "tar: a block device": _tar((_member("sda", type=tarfile.BLKTYPE), b"")),
        "tar: a link": _tar((linked, b"")),
        "tar: a file through a link": _tar((linked, b""), (_member("a/canary", size=2), b"{}")),
        "tar: a name twice": _tar(plain, plain),
        "tar: names that differ in case only": _tar(plain, (_member("A.json", size=2), b"{}")),
        "tar: a file that is a folder too": _tar((_member("a", size=2), b"{}"), (_member("a/b", size=2), b"{}")),
        "tar: cut": _raw("a.tar", _member("a", size=5_000).tobuf() + bytes(512)),
        "tar: 300 files": _tar(*((_member(f"{number}.json"), b"") for number in range(300))),
        "tar.gz: a million files": _repeated(b"", heads, 1_000),
        "tar.gz: 10 GiB of zeros": _repeated(_member("a", size=10 * 2**30).tobuf(), zeros, 320),
        "tar.gz: 40 files of a megabyte of zeros": _tar(
            *((_member(f"{number}.json", size=2**20), bytes(2**20)) for number in range(40)), packed=True
        ),
        "tar: a hole of 10 GiB": _tar((_member("a", type=tarfile.GNUTYPE_SPARSE, size=0), b"")),
        "tar: a header of 200 MB": _sparse(
            "a.tar", _member("x", type=tarfile.XHDTYPE, size=200 * 2**20).tobuf(), 2**28
        ),
        "tar: long names without end": _raw("a.tar", long_names * 2_000),
        "tar.gz: cut": _raw("a.tar.gz", b"\x1f\x8b\x08" + bytes(20)),
        "tar: a pickle": _raw("a.tar", b"\x80\x04N." * 1_000),
        "tar: empty file": _raw("a.tar", b""),
    }


def _zips() -> dict[str, Build]:
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        for number in range(5_000):
            archive.writestr(f"{number}.json", b"")
    rare = io.BytesIO()
    with zipfile.ZipFile(rare, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.json", b"{}")
    return {
        "zip: compressed in a rare way": _raw("a.zip", rare.getvalue()),
        "zip: a link": _zip(("a", stat.S_IFLNK | 0o777, b"/etc/passwd")),
        "zip: a device": _zip(("a", stat.S_IFCHR | 0o600, b"")),
        "zip: names that differ in case only": _zip(("a.json", 0, b"{}"), ("A.json", 0, b"[]")),
        "zip: a file that is a folder too": _zip(("a", 0, b"{}"), ("a/b", 0, b"{}")),
        "zip: 5,000 files that are said to be one": _raw(
            "a.zip", many.getvalue()[:-14] + b"\1\0\1\0" + many.getvalue()[-10:]
        ),
        "zip: one part of two": _raw("a.zip", many.getvalue()[:-14] + b"\1\0" + many.getvalue()[-12:]),
        "zip: 5,000 files": _raw("a.zip", many.getvalue()),
        "zip: 100 MB of zeros": _zip(("a", 0, bytes(100_000_000))),
        "zip: cut": _raw("a.zip", many.getvalue()[:-10]),
        "zip: a comment behind it": _raw("a.zip", many.getvalue()[:-2] + b"\x02\x00PK"),
        "zip: only the magic": _raw("a.zip", b"PK\x03\x04"),
        "7z": _raw("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(100)),
        "xz": _raw("a.tar.xz", b"\xfd7zXZ\0" + bytes(100)),
    }
