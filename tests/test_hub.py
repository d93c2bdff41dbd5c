"""Model files from a hub on loopback, from paths and archives: whole, as hashed, safe, and named by their content."""

from __future__ import annotations

import asyncio
import json
import re
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path

import pytest

from apprentice import hub, weights
from apprentice.errors import ConfigError, ModelRejected, ModelUnavailable, UnsafeFile
from apprentice.hub import Order
from apprentice.testing import hostile
from apprentice.testing._hostile_gguf import KEYS, ggufs
from apprentice.testing.local_servers import serve_ollama
from apprentice.types import Json

SMALL = hostile.gguf(KEYS)
SAFE_MODEL = next(artefact for artefact in hostile.safe_files() if artefact.name == "model")


@dataclass
class Hub:
    """A model hub on loopback. Tests change its attributes while it runs."""

    files: dict[str, bytes]
    linked: bool = True  # the first answer is a redirect that says the file's SHA-256, as for large files
    tagged: bool = True  # the file itself has an ETag
    ranges: bool = True
    elsewhere: str = ""  # where redirects lead; to itself without it
    lie: bytes | None = None  # served instead of what was hashed
    cuts: int = 0  # so many pieces from now on end after ten bytes
    busy: int = 0  # so many requests from now on get 503
    url: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # path, range, authorization

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Hub]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()

    def pieces(self) -> list[str]:
        """The ranges of the files themselves that were asked for."""
        return [range for path, range, _ in self.asked if path.startswith("/cdn/")]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        path = lines[0].split(" ")[1]
        self.asked.append((path, headers.get("range", ""), headers.get("authorization", "")))
        status, told, body = self._answer(path, headers.get("range", ""))
        head = {"content-length": str(len(body)), "connection": "close"} | told
        if status in (200, 206) and path.startswith("/cdn/") and self.cuts:
            self.cuts -= 1
            body = body[:10]
        said = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        writer.write(f"HTTP/1.1 {status} -\r\n{said}\r\n".encode() + body)
        await writer.drain()
        writer.close()

    def _answer(self, path: str, range: str) -> tuple[int, dict[str, str], bytes]:
        if self.busy:
            self.busy -= 1
            return 503, {}, b""
        if path.startswith("/api/models/"):
            told: Json = {"sha": "c0ffee", "siblings": [{"rfilename": name} for name in self.files]}
            return 200, {}, json.dumps(told).encode()
        path = path.partition("?")[0]
        name = path.rpartition("/")[2]
        if name not in self.files:
            return 404, {}, b""
        content = self.files[name]
        if "/resolve/" in path and self.linked:
            there = f"{self.elsewhere}/cdn/{name}?signed=1"
            return 302, {"location": there, "x-linked-etag": f'"{sha256(content).hexdigest()}"'}, b""
        if "/resolve/" in path and self.elsewhere:
            return 302, {"location": f"{self.elsewhere}/cdn/{name}"}, b""
        git = sha1(b"blob %d\0" % len(content) + content)
        tag = (git if "/resolve/" in path else sha256(content)).hexdigest()
        content = content if self.lie is None else self.lie
        head = {"etag": f'"{tag}"'} if self.tagged else {}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", range)
        if found is None or not self.ranges:
            return 200, head, content
        first, last = int(found[1]), min(int(found[2]), len(content) - 1)
        return 206, head | {"content-range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]


def order(server: Hub, name: str = "org/small:small.gguf", **changes: str | int) -> Order:
    return Order(server.url, name)._replace(**changes)  # type: ignore[arg-type]


def left(folder: Path) -> list[str]:
    """What is in the folder beside what was kept."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("sha256-")] if folder.exists() else []


async def test_a_large_file_goes_on_where_it_was_cut_and_is_named_by_its_content(tmp_path: Path) -> None:
    content = SMALL
    async with Hub({"small.gguf": content}).running() as server:
        seen: list[tuple[int, int]] = []

        def tell(name: str, there: int, total: int) -> None:
            seen.append((there, total))
            if len(seen) == 3:
                server.cuts = 100

        with pytest.raises(ModelUnavailable) as error:
            await hub.from_hub(order(server, piece=64), tmp_path, tell=tell)
        assert "the next attempt goes on" in (error.value.hint or "")
        server.cuts = 2  # and twice more it is only a piece that is lost
        server.asked.clear()
        pulled = await hub.from_hub(order(server, piece=64), tmp_path, tell=tell)
        assert server.pieces()[0].startswith(f"bytes={seen[2][0]}-")
    assert seen[-1] == (len(content), len(content))
    assert [there for there, _ in seen] == sorted({there for there, _ in seen})
    assert pulled.digest == f"sha256-{sha256(content).hexdigest()}"
    assert Path(pulled.path) == tmp_path / f"{pulled.digest}.gguf"
    assert Path(pulled.path).read_bytes() == content
    assert (pulled.kind, pulled.architecture, pulled.size) == ("model", "llama", len(content))
    assert hub.kept(tmp_path) == [pulled]
    assert left(tmp_path) == []


async def test_a_file_that_was_changed_between_two_attempts_is_fetched_anew(tmp_path: Path) -> None:
    async with Hub({"small.gguf": SMALL}).running() as server:

        def cut(name: str, there: int, total: int) -> None:
            server.cuts = 100

        with pytest.raises(ModelUnavailable):
            await hub.from_hub(order(server, piece=64), tmp_path, tell=cut)
        server.files["small.gguf"], server.cuts = SMALL.replace(b"llama", b"gemma"), 0  # as long as before
        pulled = await hub.from_hub(order(server), tmp_path)
    assert pulled.digest == f"sha256-{sha256(server.files['small.gguf']).hexdigest()}"


@pytest.mark.parametrize("ranges", [True, False], ids=["pieces", "whole"])
@pytest.mark.parametrize("linked", [True, False], ids=["linked", "git"])
async def test_small_files_come_from_servers_with_and_without_pieces(
    tmp_path: Path, linked: bool, ranges: bool
) -> None:
    async with Hub({"small.gguf": SMALL}, linked=linked, ranges=ranges, busy=1).running() as server:
        pulled = await hub.from_hub(order(server), tmp_path)
    assert Path(pulled.path).read_bytes() == SMALL


async def test_what_does_not_have_its_hash_is_not_kept(tmp_path: Path) -> None:
    async with Hub({"small.gguf": SMALL}, lie=SMALL + b"\0").running() as server:
        with pytest.raises(UnsafeFile, match="has the SHA-256"):
            await hub.from_hub(order(server), tmp_path)
        server.lie = None
        with pytest.raises(UnsafeFile, match="has the SHA-256"):
            await hub.from_hub(order(server, sha256="0" * 64), tmp_path)
        assert hub.kept(tmp_path) == []
        pulled = await hub.from_hub(order(server), tmp_path)
    assert hub.kept(tmp_path) == [pulled]


async def test_a_hub_that_says_no_hash_needs_one_from_a_person(tmp_path: Path) -> None:
    async with Hub({"small.gguf": SMALL}, linked=False, tagged=False).running() as server:
        with pytest.raises(UnsafeFile, match="says no hash") as error:
            await hub.from_hub(order(server), tmp_path)
        assert "--sha256" in (error.value.hint or "")
        pulled = await hub.from_hub(order(server, sha256=sha256(SMALL).hexdigest()), tmp_path)
    assert Path(pulled.path).exists()


async def test_another_host_is_followed_only_after_the_hash_was_said_and_never_with_the_key(tmp_path: Path) -> None:
    async with Hub({"small.gguf": SMALL}).running() as store, Hub({"small.gguf": SMALL}).running() as server:
        server.elsewhere = store.url
        await hub.from_hub(order(server, key="hub-key-1234"), tmp_path)
        assert [key for _, _, key in server.asked] == ["Bearer hub-key-1234"]
        assert [key for _, _, key in store.asked] == [""]
        server.linked = False
        with pytest.raises(ModelRejected, match="without saying the file's hash"):
            await hub.from_hub(order(server), tmp_path / "other")
        await hub.from_hub(order(server, sha256=sha256(SMALL).hexdigest()), tmp_path / "other")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("http://169.254.169.254", ModelUnavailable),
        ("http://user:key@127.0.0.1:9", ModelRejected),
        ("file:///etc/passwd?", ModelRejected),
    ],
)
async def test_a_redirect_to_where_nobody_should_go_is_not_followed(
    tmp_path: Path, where: str, error: type[Exception]
) -> None:
    async with Hub({"small.gguf": SMALL}, elsewhere=where).running() as server:
        with pytest.raises(error, match=r"never connected to|not followed"):
            await hub.from_hub(order(server), tmp_path)
        server.elsewhere = f"{server.url}/org/small/resolve/main/small.gguf?"
        with pytest.raises(ModelRejected, match="from one address to another"):
            await hub.from_hub(order(server), tmp_path)


@pytest.mark.parametrize("name", list(ggufs())[::7])
async def test_a_hostile_file_is_fetched_and_refused_and_nothing_of_it_stays(tmp_path: Path, name: str) -> None:
    async with Hub({"small.gguf": ggufs()[name]}).running() as server:
        with pytest.raises((UnsafeFile, ModelUnavailable)):  # an empty file has no piece
            await hub.from_hub(order(server), tmp_path)
    assert hub.kept(tmp_path) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_repository_of_safetensors_comes_with_what_belongs_to_it_and_nothing_else(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    folder = SAFE_MODEL.build(made, tmp_path / "canary")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = {"pytorch_model.bin": b"x", "run.py": b"x", "../up.safetensors": b"x", "onnx/model.safetensors": b"x"}
    async with Hub(files | extra, linked=False).running() as server:
        pulled = await hub.from_hub(order(server, "org/model"), tmp_path / "base")
        assert all("/resolve/c0ffee/" in path for path, _, _ in server.asked[1:])
        with pytest.raises(ConfigError, match="files"):
            await hub.from_hub(order(server, "org/model", sha256="0" * 64), tmp_path / "base")
    assert pulled.digest == weights.digest(Path(pulled.path))
    assert not {path.name for path in Path(pulled.path).iterdir()} & set(extra)


async def test_of_several_files_one_has_to_be_named(tmp_path: Path) -> None:
    async with Hub({"a.gguf": SMALL, "b.gguf": SMALL}).running() as server:
        with pytest.raises(ConfigError, match=r"a\.gguf, b\.gguf") as error:
            await hub.from_hub(order(server, "org/small"), tmp_path)
        assert "org/small:a.gguf" in (error.value.hint or "")
        del server.files["b.gguf"]
        assert (await hub.from_hub(order(server, "org/small"), tmp_path)).name == "org/small"
        server.files = {"model.bin": b"x"}
        with pytest.raises(UnsafeFile, match="neither a GGUF file nor safetensors"):
            await hub.from_hub(order(server, "org/small"), tmp_path)


async def test_what_is_too_large_is_not_begun(tmp_path: Path) -> None:
    async with Hub({"small.gguf": SMALL}).running() as server:
        with pytest.raises(ConfigError, match="are allowed"):
            await hub.from_hub(order(server, most=len(SMALL) - 1), tmp_path)


@pytest.mark.parametrize(
    "name", ["small.gguf", "org/small:../x.gguf", "org/../small", "a/b:c.bin", "a/b:", "a/b/c", ""]
)
async def test_a_name_that_is_none_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name on a model hub"):
        await hub.from_hub(Order("http://127.0.0.1:9", name), tmp_path)


async def test_what_the_hub_does_not_have_is_told(tmp_path: Path) -> None:
    async with Hub({}).running() as server:
        with pytest.raises(ModelRejected, match="answers 404"):
            await hub.from_hub(order(server), tmp_path)


def test_the_hub_is_told_by_a_person_or_the_environment() -> None:
    assert hub.address("https://a", {"HF_ENDPOINT": "https://b"}) == "https://a"
    assert hub.address(None, {"HF_ENDPOINT": "https://b"}) == "https://b"
    with pytest.raises(ConfigError, match="no model hub is known") as error:
        hub.address(None, {})
    assert "HF_ENDPOINT" in (error.value.hint or "")


async def test_a_hub_in_the_clear_has_to_be_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in the clear"):
        await hub.from_hub(Order("http://hub.example", "a/b:c.gguf"), tmp_path)


# --- into Ollama --------------------------------------------------------------------------------------------------------


async def test_a_pull_into_ollama_tells_how_far_it_is() -> None:
    seen: list[tuple[str, int, int]] = []
    async with serve_ollama(lambda _: None) as server:
        said = await hub.into_ollama("base", server.url, tell=lambda *told: seen.append(told))
        assert server.requests[-1].body == {"model": "base", "stream": True}
    assert said == {"status": "success"}
    assert seen == [("797b70c4edf8", there, 4096) for there in (0, 1024, 4096)]


@pytest.mark.parametrize(
    ("last", "why"),
    [
        ([{"error": "max retries exceeded: EOF"}], "max retries exceeded: EOF"),
        ([{"status": "verifying sha256 digest"}], "stopped before the end"),
        ([], "without a JSON object"),
        ([{"digest": 7, "total": "many"}, ["odd"]], "without a JSON object"),
    ],
)
async def test_a_pull_that_did_not_come_to_its_end_is_no_success(last: list[Json], why: str) -> None:
    async with serve_ollama(lambda _: None) as server:
        server.pulls = [{"status": "pulling manifest"}, *last] if last else []
        with pytest.raises(ModelUnavailable, match=why) as error:
            await hub.into_ollama("base", server.url)
    assert "the next attempt goes on" in (error.value.hint or "")


async def test_what_ollama_cannot_find_or_nobody_serves_is_told() -> None:
    async with serve_ollama(lambda _: None) as server:
        with pytest.raises(ModelUnavailable, match=r"could not pull nothing.*file does not exist"):
            await hub.into_ollama("nothing", server.url)
    with pytest.raises(ModelUnavailable, match="could not pull base"):
        await hub.into_ollama("base", server.url)


# --- from paths ---------------------------------------------------------------------------------------------------------


async def test_files_folders_and_archives_are_copied_under_their_content(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(SMALL)
    with zipfile.ZipFile(tmp_path / "small.zip", "w") as archive:
        archive.write(tmp_path / "small.gguf", "small.gguf")
    made = tmp_path / "made"
    made.mkdir()
    folder = SAFE_MODEL.build(made, tmp_path / "canary")
    pulled = [await hub.from_path(path, tmp_path / "base") for path in (tmp_path / "small.gguf", folder)]
    again = await hub.from_path(tmp_path / "small.gguf", tmp_path / "base")
    unpacked = await hub.from_path(tmp_path / "small.zip", tmp_path / "base")
    assert again == pulled[0]
    assert [one.digest for one in pulled] == [weights.digest(tmp_path / "small.gguf"), weights.digest(folder)]
    assert (Path(unpacked.path) / "small.gguf").read_bytes() == SMALL
    assert left(tmp_path / "base") == []
    assert {one.digest for one in hub.kept(tmp_path / "base")} == {one.digest for one in (*pulled, unpacked)}


async def test_hostile_paths_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "cut.gguf").write_bytes(SMALL[:-9])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.gguf").symlink_to(tmp_path / "cut.gguf")
    for name in ("model.bin", "cut.gguf", "folder"):
        with pytest.raises(UnsafeFile):
            await hub.from_path(tmp_path / name, tmp_path / "base")
    assert list((tmp_path / "base").iterdir()) == []
    with pytest.raises(ConfigError, match="there is no"):
        await hub.from_path(tmp_path / "nothing.gguf", tmp_path / "base")


def test_a_damaged_note_beside_a_model_hides_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sha256-1.json").write_text("{")
    assert hub.kept(tmp_path) == []
