"""Model files come in here: from a path, from a model hub, or into Ollama. What is kept is whole, safe and named by content.

    MODEL_DIR/base/sha256-….gguf      a file, or sha256-…/, a folder; beside it sha256-….json says what it was called
    MODEL_DIR/base/.partial-…/        what was fetched so far; the next attempt goes on from there

A hub is asked in pieces (RFC 9110 section 14), each through the address checks of `wire`, so that memory stays small and
a cut costs one piece. Its address is told by a person, never guessed. It may send us to another host only after it has
said the SHA-256 of the file, and no key goes there. Nothing is kept without a hash that somebody named beforehand.
Source: https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from hashlib import sha1, sha256
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from apprentice import weights, wire
from apprentice.errors import ConfigError, ModelRejected, ModelUnavailable, UnsafeFile
from apprentice.types import Json, Seconds, Value

type Tell = Callable[[str, int, int], None]
"""Name of a file, bytes that are there, bytes in all."""

MOST = 64 * 10**9  # bytes of one model, where nobody says otherwise
_PIECE = 8 * 2**20
_PATIENCE: Seconds = 120.0  # for a piece
_TRIES = 5  # attempts in a row that bring nothing
_HOPS = 5
_PAUSE: Seconds = 0.2  # before the second attempt, twice that before the third
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::((?:\w[\w.+-]*/)*\w[\w.+-]*\.(?:gguf|safetensors)))?", re.ASCII)
_PLAIN = re.compile(r"\w[\w.+-]*", re.ASCII)
_BESIDE = frozenset(
    {
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "adapter_config.json",
    }
)  # files that belong to safetensors; everything else of a repository stays there
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}", re.ASCII), re.compile(r"[0-9a-f]{40}", re.ASCII)
_NO_MORE = "it was given up; what was fetched is kept, and the next attempt goes on from there"


class Pulled(Value):
    """A model that is kept. `name`: what it was called where it came from; `path`: what `base_model` may say."""

    name: str
    source: str
    path: str
    digest: str
    size: int
    kind: str
    architecture: str | None
    quantisation: str


def address(told: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The hub's address: what was told, else the variable HF_ENDPOINT. Raises ConfigError where neither says one."""
    found = told or environment.get("HF_ENDPOINT")
    if not found:
        raise ConfigError(
            "no model hub is known", hint="say --hub https://HOST, or set the environment variable HF_ENDPOINT"
        )
    return found


async def from_path(path: Path, base: Path) -> Pulled:
    """A file, a flat folder or an archive, checked and copied under `base`. Raises UnsafeFile; ConfigError without it."""
    return await asyncio.to_thread(_from_path, path, base)


def _from_path(path: Path, base: Path) -> Pulled:
    if not path.exists():
        raise ConfigError(f"there is no {path}", hint="a path, or a name on a model hub such as org/name:file.gguf")
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=base) as room:
        draft = Path(room) / path.name
        if not path.is_dir() and path.suffix not in (".gguf", ".safetensors"):
            weights.unpack(path, draft)
        else:
            weights.digest(path)  # refuses what is no file: a pipe would never end
            if path.is_dir():
                shutil.copytree(path, draft, symlinks=True)
            else:
                shutil.copyfile(path, draft)
        return _keep(draft, base, path.name, str(path.absolute()))


def _keep(draft: Path, base: Path, name: str, source: str) -> Pulled:
    """The checked draft at its place. It is looked at where only we write, so that what was checked is what is kept."""
    contents, digest = weights.check(draft), weights.digest(draft)
    target = base / (digest if draft.is_dir() else digest + draft.suffix)
    if not target.exists():
        for file in draft.iterdir() if draft.is_dir() else (draft,):
            with file.open("rb") as content:
                os.fsync(content.fileno())  # else a power cut might leave the name without the content
        draft.rename(target)
    pulled = Pulled(
        name=name,
        source=source,
        path=str(target),
        digest=digest,
        size=contents.size,
        kind=contents.kind,
        architecture=contents.architecture,
        quantisation=contents.quantisation,
    )
    with tempfile.NamedTemporaryFile("w", prefix=".draft-", dir=base, delete=False) as about:
        about.write(pulled.model_dump_json(indent=1))
    Path(about.name).replace(base / f"{digest}.json")
    return pulled


def kept(base: Path) -> list[Pulled]:
    """What was pulled under `base` and is still there, by name."""
    found = []
    for about in base.glob("sha256-*.json"):
        try:
            pulled = Pulled.model_validate_json(about.read_bytes())
        except ValueError:  # not ours, or damaged: the file beside it is listed as any other
            continue
        if Path(pulled.path).exists():
            found.append(pulled)
    return sorted(found, key=lambda pulled: pulled.name)


# --- from a hub -------------------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """What is wanted of a hub. `name`: org/name, or org/name:file. `most`: bytes of all files together; `piece`: at once."""

    hub: str
    name: str
    revision: str = "main"
    sha256: str | None = None
    most: int = MOST
    allow_internal: bool = False
    key: str = ""
    piece: int = _PIECE


def _silent(name: str, there: int, total: int) -> None:
    """Nobody watches."""


async def from_hub(order: Order, base: Path, *, tell: Tell = _silent, client: wire.Client | None = None) -> Pulled:
    """The model of that name, fetched, compared with its hash, checked, and kept under `base`.

    A name without a file means the only GGUF file of the repository, else its safetensors with what belongs to them.
    Raises ConfigError for what cannot be meant, UnsafeFile for what must not be kept, ModelRejected where the hub
    refuses, ModelUnavailable where trying again may help.
    """
    found = _NAME.fullmatch(order.name)
    if found is None:
        raise ConfigError(f"{order.name!r} is no name on a model hub", hint="org/name, or org/name:file.gguf")
    if order.sha256 is not None and not _SHA256.fullmatch(order.sha256):
        raise ConfigError("a SHA-256 has 64 digits of 0-9a-f")
    near = order.allow_internal or urlsplit(order.hub).hostname in ("127.0.0.1", "localhost", "::1")
    fetcher = _Fetcher(order, wire.check_url(order.hub, allow_internal=near), near, tell, client)
    try:
        repository, file = found[1], found[2]
        revision, files = await fetcher.files(repository, file)
        where = f"{fetcher.hub}/{repository}/resolve/{quote(revision, safe='')}"
        work = base / f".partial-{sha256(f'{where} {files}'.encode()).hexdigest()[:16]}"
        work.mkdir(parents=True, exist_ok=True)
        for name in files:
            await fetcher.fetch(f"{where}/{quote(name)}", work / Path(name).name)
    finally:
        await fetcher.close()
    for about in work.glob("*.about"):
        about.unlink()
    draft = work if len(files) > 1 else work / Path(files[0]).name
    try:
        return await asyncio.to_thread(_keep, draft, base, order.name, where)
    finally:  # a hostile file is not kept either
        await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)


class _Part(NamedTuple):
    """A piece of a file, and what is known of the file by now."""

    data: bytes
    start: int
    total: int
    tag: str  # of this very content
    hashes: frozenset[str]  # that the hub itself said


class _Draft:
    """A file that grows piece by piece, over several attempts; beside it stands of which content it is the beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._about = path.with_name(path.name + ".about")

    def first(self) -> int:
        """The first byte to ask for: the next one, or the last one of a whole file, to hear whose it is."""
        size = self._path.stat().st_size if self._path.exists() else 0
        return size - 1 if size and self._told()[1] == str(size) else size

    def take(self, part: _Part) -> int:
        """How many bytes there are with this piece. What belongs to another content is thrown away."""
        size = self._path.stat().st_size if self._path.exists() else 0
        same = self._told() == (part.tag, str(part.total))
        if size == part.total and same:
            return size
        if size and (part.start != size or not same):
            self._path.unlink()
            size = 0
        if part.start == size:
            if part.total - size > shutil.disk_usage(self._path.parent).free:
                raise ConfigError(f"{self._path.name} has {part.total:,} bytes, which the disk does not have")
            self._about.write_text(f"{part.tag}\n{part.total}")
            with self._path.open("ab") as file:
                file.write(part.data)
                size = file.tell()
        return size

    def _told(self) -> tuple[str, str]:
        tag, _, total = (self._about.read_text() if self._about.exists() else "").partition("\n")
        return tag, total


class _Fetcher:
    def __init__(self, order: Order, hub: str, near: bool, tell: Tell, client: wire.Client | None) -> None:
        self.hub = hub
        self._order = order
        self._near = near
        self._tell = tell
        self._client = client or wire.client(allow_internal=near)
        self._owned = client is None
        self._left = order.most

    async def close(self) -> None:
        if self._owned:
            await self._client.close()

    async def files(self, repository: str, file: str | None) -> tuple[str, list[str]]:
        """The revision as a commit, where the hub tells it, and the files to fetch."""
        if file is not None:
            return self._order.revision, [file]
        url = f"{self.hub}/api/models/{repository}/revision/{quote(self._order.revision, safe='')}"
        reply, _ = await self._asked(url, {}, wire.MAX_BODY)
        try:
            told = json.loads(reply.body)
            names = [str(sibling["rfilename"]) for sibling in told["siblings"]]
            revision = str(told.get("sha") or self._order.revision)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelRejected(f"{self.hub}: what it says about {repository} cannot be read") from error
        ggufs = [name for name in names if name.endswith(".gguf") and _PLAIN.fullmatch(name)]
        if len(ggufs) == 1:
            chosen = ggufs
        elif ggufs:
            raise ConfigError(
                f"{repository} has several GGUF files: {', '.join(ggufs[:20])}", hint=f"say {repository}:{ggufs[0]}"
            )
        else:
            chosen = sorted(
                name for name in names if _PLAIN.fullmatch(name) and (name.endswith(".safetensors") or name in _BESIDE)
            )
        if not any(name.endswith((".gguf", ".safetensors")) for name in chosen):
            raise UnsafeFile(f"{repository} has neither a GGUF file nor safetensors")
        if len(chosen) > 1 and self._order.sha256 is not None:
            raise ConfigError(f"{repository} has {len(chosen)} files", hint="--sha256 is for one: say org/name:file")
        return revision, chosen

    async def fetch(self, url: str, into: Path) -> None:
        """The whole file, compared with what the hub or a person said of it."""
        draft, failures = _Draft(into), 0
        while True:
            try:
                part = await self._part(url, draft.first())
            except (OSError, TimeoutError) as error:
                failures += 1
                if failures == _TRIES or isinstance(error, wire.Blocked | wire.TooLarge):
                    why = str(error) or type(error).__name__
                    raise ModelUnavailable(f"{self.hub}, {into.name}: {why}", hint=_NO_MORE) from error
                await asyncio.sleep(_PAUSE * 2 ** (failures - 1))
                continue
            failures = 0
            if part.total > self._left:
                raise ConfigError(
                    f"{into.name} has {part.total:,} bytes, and {self._left:,} are allowed", hint="raise --max-gb"
                )
            there = draft.take(part)
            self._tell(into.name, there, part.total)
            if there == part.total:
                break
        self._left -= there
        await asyncio.to_thread(self._compare, into, part)

    def _compare(self, path: Path, part: _Part) -> None:
        hashes = {self._order.sha256} if self._order.sha256 is not None else part.hashes
        if not hashes:
            path.unlink()
            raise UnsafeFile(f"{path.name}: the hub says no hash of it", hint="say the right one: --sha256")
        size = path.stat().st_size
        found = sha256()
        blob = sha1(b"blob %d\0" % size, usedforsecurity=False)  # how git names a small file
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
                blob.update(piece)
        if not hashes <= {found.hexdigest(), blob.hexdigest()}:
            path.unlink()
            raise UnsafeFile(f"{path.name} has the SHA-256 {found.hexdigest()}, not {', '.join(map(str, hashes))}")

    async def _part(self, url: str, have: int) -> _Part:
        asked = {"range": f"bytes={have}-{have + self._order.piece - 1}"}
        reply, hashes = await self._asked(url, asked, max(_PIECE, self._order.piece))
        tag = reply.headers.get("etag", "")
        if reply.status == 206 and (found := _RANGE.fullmatch(reply.headers.get("content-range", ""))):
            start, end, total = map(int, found.groups())
            if start == have and end - start + 1 == len(reply.body) and reply.body:
                return _Part(reply.body, start, total, tag, hashes)
            raise ConnectionError("the piece is not the one that was asked for")
        if reply.status == 200:  # small, or from a server that knows no pieces
            return _Part(reply.body, 0, len(reply.body), tag, hashes)
        raise ConnectionError(f"status {reply.status}")

    async def _asked(self, url: str, headers: dict[str, str], most: int) -> tuple[wire.Reply, frozenset[str]]:
        """The answer behind all redirects, and the hashes that the hub itself said on the way."""
        hashes: frozenset[str] = frozenset()
        home = urlsplit(self.hub).netloc
        for _ in range(_HOPS):
            own = urlsplit(url).netloc == home
            key = {"authorization": f"Bearer {self._order.key}"} if own and self._order.key else {}
            request = wire.Request(url, headers | key, b"", _PATIENCE, limit=most, method="GET")
            async with asyncio.timeout(_PATIENCE):
                reply = await self._client.exchange(request, lambda: None)
            if own:
                hashes |= _hashes(reply.headers)
            if reply.status in (301, 302, 303, 307, 308):
                url = self._next(url, reply.headers.get("location", ""), hashes)
                continue
            if reply.status in (408, 425, 429) or reply.status >= 500:
                raise ConnectionError(f"status {reply.status}")
            if reply.status >= 400 and reply.status != 416:
                raise ModelRejected(
                    f"{urlsplit(url).netloc} answers {reply.status} to {urlsplit(url).path}",
                    hint="is the name right? Models behind a login need their key in the variable HF_TOKEN",
                )
            return reply, hashes
        raise ModelRejected(f"{self.hub} sends us from one address to another more than {_HOPS} times")

    def _next(self, url: str, location: str, hashes: frozenset[str]) -> str:
        """Where a redirect leads, if it may. The address itself is checked when it is connected to."""
        there, here = urlsplit(urljoin(url, location)), urlsplit(url)
        plain = there.scheme == "https" or (there.scheme == "http" and here.scheme == "http" and self._near)
        if not location or not plain or there.username is not None or not there.hostname:
            raise ModelRejected(f"{here.netloc} sends us to an address that is not followed")
        known = self._order.sha256 is not None or any(map(_SHA256.fullmatch, hashes))
        if there.netloc != urlsplit(self.hub).netloc and not known:
            raise ModelRejected(
                f"{here.netloc} sends us to {there.netloc} without saying the file's hash", hint="say it: --sha256"
            )
        return there.geturl()


def _hashes(headers: Mapping[str, str]) -> frozenset[str]:
    """SHA-256 of a large file, or git's name of a small one. A linked one is the file's, where both are said."""
    said = headers.get("x-linked-etag") or headers.get("etag") or ""
    text = said.removeprefix("W/").strip('"').lower()
    return frozenset({text} if _SHA256.fullmatch(text) or _SHA1.fullmatch(text) else ())


# --- into Ollama ------------------------------------------------------------------------------------------------------


async def into_ollama(
    name: str, base_url: str, *, tell: Tell = _silent, silence: Seconds = 600.0, allow_internal: bool = False
) -> Json:
    """What Ollama says once it has fetched the model. A pull that was cut goes on when it is asked for again.

    `tell` hears of each layer by the first digits of its digest; `silence`: the longest without a word of it. Raises
    ModelUnavailable where trying again may help, else ModelRejected. Source: https://docs.ollama.com/api/pull.
    """
    near = allow_internal or urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
    url = wire.check_url(base_url, allow_internal=near)
    client = wire.client(allow_internal=near)
    body = json.dumps({"model": name, "stream": True}).encode()
    headers = {"content-type": "application/json"}
    request = wire.Request(f"{url}/api/pull", headers, body, silence, tell=_Layers(tell).heard)
    try:
        outcome = await wire.send(client, request)
    finally:
        await client.close()
    if outcome.kind == "answered" and outcome.body is not None and outcome.body.get("status") == "success":
        return outcome.body
    refused = outcome.status is not None and 400 <= outcome.status < 500
    kind = ModelRejected if refused else ModelUnavailable
    why = outcome.problem or "it stopped before the end"
    raise kind(f"Ollama at {url} could not pull {name}: {why}", hint=_NO_MORE, outcome="rejected")


class _Layers:
    """Reads what Ollama says of a pull: several lines a second, for each layer how many of its bytes are there."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._there: dict[str, int] = {}

    def heard(self, line: bytes) -> None:
        """Tell what is new in a line. What is no report of bytes is left to whoever reads how it ends."""
        try:
            told = json.loads(line)
            layer, total, there = str(told["digest"]), int(told["total"]), int(told.get("completed") or 0)
        except (ValueError, KeyError, TypeError):
            return
        if self._there.get(layer) != there:
            self._there[layer] = there
            self._tell(layer.removeprefix("sha256:")[:12], there, total)
