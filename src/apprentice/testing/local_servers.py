"""Servers of local models on loopback: llama.cpp, vLLM and Ollama, as far as the models of those names ask them.

    async with serve_ollama(lambda body: {"label": "spam"}) as server:
        model = plugins.build("models", "ollama", model="base", base_url=server.url)

They speak over real sockets and behave as those servers do where it hurts: they run out of memory in the middle of an
answer, forget what was loaded, are restarted with other weights under the same name, and shorten prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import h11

from apprentice.calibration import SAME, Table
from apprentice.testing import hostile
from apprentice.testing._hostile_gguf import KEYS, LORA_KEYS, LORA_TENSORS
from apprentice.testing.servers import Reply, _deliver, _receive
from apprentice.types import Json, Task

type Answerer = Callable[[dict[str, Json]], Json]
"""The body of a question -> what the model says; a text goes out as it is, any other value as JSON."""


class Seen(NamedTuple):
    """One request that arrived whole."""

    method: str
    path: str
    body: dict[str, Json]
    size: int


class Status(Exception):
    """Raised by a route: the server answers with this status and JSON body."""

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


_LAYER = {"status": "pulling 797b70c4edf8", "digest": f"sha256:797b70c4edf8{'0' * 52}", "total": 4096}
_PULLED: list[Json] = [
    {"status": "pulling manifest"},
    _LAYER,
    *(_LAYER | {"completed": there} for there in (1024, 4096, 4096)),
    {"status": "verifying sha256 digest"},
    {"status": "writing manifest"},
    {"status": "success"},
]


class _Lines(list[Json]):
    """An answer that goes out as JSON lines, each in a chunk of its own."""


@dataclass
class LocalServer:
    """What the three have in common. Tests change its attributes while it runs."""

    answer: Answerer
    model: str = "base"
    weights: str = "first"  # other weights have other log-probabilities, and another digest
    context: int = 4096  # tokens; four bytes are one
    logprob: float = -0.1  # of each token
    dies: int = 0  # so many questions from now on end in a connection reset, as when memory runs out
    up: bool = True  # else it is there, and still loading
    patched: Callable[[dict[str, Json]], dict[str, Json]] = lambda body: body  # changes an answer before it leaves
    requests: list[Seen] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)  # name -> where it is from
    max_rank: int = 16  # of an adapter that vLLM takes
    pulls: list[Json] = field(default_factory=lambda: list(_PULLED))  # what Ollama says of a pull, line by line
    blobs: set[str] = field(default_factory=set)  # digests of what was sent to Ollama
    loaded: set[str] = field(default_factory=set)  # what Ollama has in memory
    together: dict[str, asyncio.Barrier] = field(
        default_factory=dict
    )  # path -> who asks waits until so many have asked
    url: str = ""

    def questions(self) -> list[dict[str, Json]]:
        """The bodies of all questions to the model so far."""
        return [seen.body for seen in self.requests if seen.path.endswith(("/chat/completions", "/api/chat"))]

    def route(self, method: str, path: str, body: dict[str, Json], raw: bytes) -> Json:
        """What is answered, None for an empty body. Raises Status."""
        raise Status(404, {"error": f"no {method} {path}"})

    def continuation(self) -> list[tuple[str, float]]:
        """What these weights make of any prompt: four tokens with their log-probabilities."""
        digits = sha256(self.weights.encode()).digest()
        return [(f" {digit % 10}", -digit / 100) for digit in digits[:4]]

    def said(self, body: dict[str, Json]) -> str:
        if self.dies > 0:
            self.dies -= 1
            raise ConnectionResetError
        content = self.answer(body)
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))

    def tokens(self, text: str) -> list[Json]:
        """The text in pieces of four characters, as these servers tell their log-probabilities."""
        pieces = [text[start : start + 4] for start in range(0, len(text), 4)]

        def told(piece: str, logprob: float) -> dict[str, Json]:
            return {"token": piece, "bytes": list(piece.encode()), "logprob": logprob}

        other = math.log(max(1 - math.exp(self.logprob), 1e-9))
        return [told(p, self.logprob) | {"top_logprobs": [told(p, self.logprob), told("?", other)]} for p in pieces]

    @contextlib.asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[LocalServer]:
        """The server, listening until the block ends; then every connection is closed."""
        connections: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if (task := asyncio.current_task()) is not None:
                connections.add(task)
                task.add_done_callback(connections.discard)
            await self._connected(reader, writer)

        listener = await asyncio.start_server(connected, "127.0.0.1", port, limit=2**20)
        self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            listener.close()
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)
            await listener.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rest = b""
        try:
            while (got := await _receive(reader, rest)) is not None:
                request, raw, rest = got
                if (others := self.together.get(urlsplit(request.target.decode("latin-1")).path)) is not None:
                    await others.wait()
                status, content = self._respond(request, raw)
                head = {"content-type": "application/json"}
                if isinstance(content, list):
                    head = {"content-type": "application/x-ndjson", "transfer-encoding": "chunked"}
                reply = Reply(status=status, reset=content is None, cut=0 if content is None else None)
                if not await _deliver(writer, reply, head, content if isinstance(content, list) else [content or b""]):
                    break
        except (ConnectionError, h11.RemoteProtocolError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            writer.close()

    def _respond(self, request: h11.Request, raw: bytes) -> tuple[int, bytes | list[bytes] | None]:
        method, path = request.method.decode(), urlsplit(request.target.decode("latin-1")).path
        try:
            body = json.loads(raw) if raw else {}
        except ValueError:
            body = {}
        body = body if isinstance(body, dict) else {}
        self.requests.append(Seen(method, path, body, len(raw)))
        try:
            answer = self.route(method, path, body, raw)
        except Status as status:
            return status.status, json.dumps(status.body).encode()
        except ConnectionResetError:
            return 200, None
        if isinstance(answer, _Lines):
            return 200, [json.dumps(line).encode() + b"\n" for line in answer]
        return 200, b"" if answer is None else json.dumps(answer, ensure_ascii=False).encode()


def _count(text: str) -> int:
    return -(-len(text.encode()) // 4)


def _prompt(body: dict[str, Json]) -> int:
    return sum(_count(message["content"]) + 4 for message in body["messages"])


class _Chat(LocalServer):
    """Chat completions, as llama.cpp and vLLM answer them."""

    def chat(self, body: dict[str, Json]) -> Json:
        text, finish = self.said(body), "stop"
        if _count(text) > body["max_tokens"]:
            text, finish = text[: 4 * body["max_tokens"]], "length"
        choice: dict[str, Json] = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish,
        }
        if body.get("logprobs"):
            choice["logprobs"] = {"content": self.tokens(text)}
        prompt, said = _prompt(body), _count(text)
        usage = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
        told = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body.get("model", self.model)}
        return self.patched(told | {"choices": [choice], "usage": usage})


class _LlamaCpp(_Chat):
    def route(self, method: str, path: str, body: dict[str, Json], raw: bytes) -> Json:
        if not self.up:
            raise Status(503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})
        match method, path:
            case "GET", "/health":
                return {"status": "ok"}
            case "GET", "/v1/models":
                return {"object": "list", "data": [{"id": self.model, "object": "model", "owned_by": "llamacpp"}]}
            case "GET", "/props":
                return {"model_path": f"/models/{self.model}", "default_generation_settings": {"n_ctx": self.context}}
            case "POST", "/completion":
                told = [{"token": text, "logprob": logprob} for text, logprob in self.continuation()]
                return {"content": "".join(text for text, _ in self.continuation()), "completion_probabilities": told}
            case "POST", "/v1/chat/completions":
                if (prompt := _prompt(body)) >= self.context:
                    message = f"request ({prompt} tokens) exceeds the available context size ({self.context} tokens)"
                    error = {"code": 400, "message": message, "type": "exceed_context_size_error"}
                    raise Status(400, {"error": error | {"n_prompt_tokens": prompt, "n_ctx": self.context}})
                return self.chat(body)
        return super().route(method, path, body, raw)


class _Vllm(_Chat):
    lora = True  # started with what it takes to load adapters

    def route(self, method: str, path: str, body: dict[str, Json], raw: bytes) -> Json:
        match method, path:
            case "GET", "/health":
                if not self.up:
                    raise Status(500, {})
                return None
            case "GET", "/v1/models":
                about = {"object": "model", "created": 1, "owned_by": "vllm", "max_model_len": self.context}
                base: dict[str, Json] = about | {"id": self.model, "root": f"/models/{self.model}", "parent": None}
                added = [about | {"id": n, "root": path, "parent": self.model} for n, path in self.adapters.items()]
                return {"object": "list", "data": [base, *added]}
            case "POST", "/v1/load_lora_adapter" if self.lora:
                name, folder = body["lora_name"], body["lora_path"]
                if name in self.adapters:
                    raise self._error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
                config = Path(folder) / "adapter_config.json"
                if not config.exists():
                    message = f"Loading lora {name} failed: No adapter found for {folder}"
                    raise self._error(404, message, "NotFoundError")
                if (rank := json.loads(config.read_bytes())["r"]) > self.max_rank:
                    message = f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
                    raise self._error(500, message, "InternalServerError")
                self.adapters[body["lora_name"]] = body["lora_path"]
                return f"Success: LoRA adapter '{body['lora_name']}' added successfully."
            case "POST", "/v1/unload_lora_adapter" if self.lora:
                if self.adapters.pop(body["lora_name"], None) is None:
                    raise self._error(404, "cannot be found", "NotFoundError")
                return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."
            case "POST", "/v1/completions":
                self._known(body)
                said = self.continuation()
                told = {"tokens": [text for text, _ in said], "token_logprobs": [logprob for _, logprob in said]}
                choice = {
                    "index": 0,
                    "text": "".join(text for text, _ in said),
                    "logprobs": told,
                    "finish_reason": "length",
                }
                return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}
            case "POST", "/v1/chat/completions":
                self._known(body)
                if (prompt := _prompt(body)) >= self.context:
                    most = (
                        f"This model's maximum context length is {self.context} tokens. However, your prompt contains"
                    )
                    raise self._error(400, f"{most} at least {prompt} input tokens.", "BadRequestError")
                return self.chat(body | {"max_tokens": min(body["max_tokens"], self.context - prompt)})
        raise Status(404, {"detail": "Not Found"})

    def _known(self, body: dict[str, Json]) -> None:
        if body["model"] not in (self.model, *self.adapters):
            raise self._error(
                404, f"The model `{body['model']}` does not exist. Valid aliases: {self.model}.", "NotFoundError"
            )

    def _error(self, status: int, message: str, kind: str) -> Status:
        return Status(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})


class _Ollama(LocalServer):
    knows_truncate = False  # it obeys `truncate: false`, as newer ones do

    def route(self, method: str, path: str, body: dict[str, Json], raw: bytes) -> Json:
        if path.startswith("/api/blobs/sha256:") and method == "POST":
            if f"/api/blobs/sha256:{sha256(raw).hexdigest()}" != path:
                raise Status(400, {"error": "digest mismatch"})
            self.blobs.add(path.removeprefix("/api/blobs/"))
            return None
        match method, path:
            case "GET", "/api/version":
                return {"version": "0.12.11"}
            case "GET", "/api/tags":
                return {"models": [self._about(name) for name in (self.model, *self.adapters)]}
            case "GET", "/api/ps":
                loaded = [name for name in (self.model, *self.adapters) if name in self.loaded]
                expires = {"expires_at": "2030-01-01T00:00:00Z", "size_vram": 0, "context_length": self.context}
                return {"models": [self._about(name) | expires for name in loaded]}
            case "POST", "/api/create":
                return self._create(body)
            case "POST", "/api/pull":
                if body["model"] != self.model:
                    raise Status(500, {"error": "pull model manifest: file does not exist"})
                return _Lines(self.pulls) if body.get("stream") is not False else {"status": "success"}
            case "POST", "/api/show" | "/api/generate" | "/api/chat":
                name = body["model"].removesuffix(":latest")
                if name not in (self.model, *self.adapters):
                    raise Status(404, {"error": f"model '{body['model']}' not found"})
                if path == "/api/show":
                    return {"details": self._about(name)["details"], "model_info": {"general.architecture": "llama"}}
                (self.loaded.discard if body.get("keep_alive") == 0 else self.loaded.add)(name)
                if path == "/api/chat":
                    return self._chat(body)
                return self._done(body, "load" if name in self.loaded else "unload")
        raise Status(404, {"error": "404 page not found"})

    def _about(self, name: str) -> dict[str, Json]:
        digest = sha256(f"{name} {self.weights} {self.adapters.get(name)}".encode()).hexdigest()
        details = {"format": "gguf", "family": "llama", "parameter_size": "135M", "quantization_level": "Q4_1"}
        about = {"digest": digest, "size": 1, "modified_at": "2026-01-01T00:00:00Z", "details": details}
        return {"name": f"{name}:latest", "model": f"{name}:latest"} | about

    def _create(self, body: dict[str, Json]) -> Json:
        if "from" in body and body["from"] != self.model:
            raise Status(404, {"error": f"model '{body['from']}' not found"})
        blobs = {**body.get("adapters", {}), **body.get("files", {})}
        if not blobs or not set(blobs.values()) <= self.blobs:
            raise Status(400, {"error": "blob not found"})
        self.adapters[body["model"]] = json.dumps(blobs)
        return {"status": "success"}

    def _chat(self, body: dict[str, Json]) -> Json:
        messages, options = list(body["messages"]), body.get("options") or {}
        most = options.get("num_ctx", self.context)
        if _prompt(body) > most and self.knows_truncate and body.get("truncate") is False:
            raise Status(400, {"error": "the input length exceeds the context length"})
        while len(messages) > 2 and _prompt({"messages": messages}) > most:
            del messages[1]  # the system message and the last one are kept
        read = min(_prompt({"messages": messages}), most)
        text, reason = self.said(body | {"messages": messages}), "stop"
        if _count(text) > options.get("num_predict", 10**6):
            text, reason = text[: 4 * options["num_predict"]], "length"
        counts = {"prompt_eval_count": read, "eval_count": _count(text)}
        told = self._done(body, reason) | counts | {"message": {"role": "assistant", "content": text}}
        return self.patched(told | ({"logprobs": self.tokens(text)} if body.get("logprobs") else {}))

    def _done(self, body: dict[str, Json], reason: str) -> dict[str, Json]:
        return {"model": body["model"], "created_at": "2026-01-01T00:00:00Z", "done": True, "done_reason": reason}


def write_checkpoint(
    into: Path,
    task: Task,
    probes: Sequence[tuple[Json, Json]],
    *,
    weights: bytes | None = None,
    base: Path | None = None,
    bare: Json = None,
    calibration: Table = SAME,
    rule: str = "margin",
    file: str = "",
) -> Path:
    """A checkpoint's folder as a generative trainer writes it: an adapter of `base`, or without one a whole model.

    `probes`: inputs with the outputs that training saw; `bare`: what the base alone answered to each; `file`: a GGUF
    file, or the safetensors of an adapter; an adapter's folder is always one that PEFT might have written, too. Without
    `weights` they are small, safe and of no use.
    """
    kind = "model" if base is None else "adapter"
    file = file or f"{kind}.gguf"
    files, is_gguf = {}, file.endswith(".gguf")
    if is_gguf:
        plain = hostile.gguf(KEYS) if base is None else hostile.gguf(LORA_KEYS, LORA_TENSORS)
        files[file] = plain if weights is None else weights
    if base is not None:
        with tempfile.TemporaryDirectory() as room:
            for path in hostile.adapter(Path(room), weights=None if is_gguf else weights).iterdir():
                files[str(Path(file).with_name(path.name))] = path.read_bytes()
    manifest: dict[str, Json] = {
        "kind": kind,
        "file": file,
        "files": {name: sha256(content).hexdigest() for name, content in files.items()},
        "calibration": [list(row) for row in calibration],
        "confidence": {"rule": rule, "fields": None},
        "task": task.model_dump(mode="json"),
        "probe": [{"input": given, "output": output, "base": bare} for given, output in probes],
    }
    if base is not None:
        manifest["base"] = {"file": str(base), "sha256": sha256(base.read_bytes()).hexdigest()}
    written = json.dumps(manifest, indent=1).encode()
    folder = into / f"sha256-{sha256(written).hexdigest()}"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "manifest.json").write_bytes(written)
    return folder


@contextlib.asynccontextmanager
async def serve_llama_cpp(answer: Answerer, *, port: int = 0) -> AsyncIterator[LocalServer]:
    """A llama.cpp server at `server.url`: /health, /props, /completion and /v1/chat/completions."""
    async with _LlamaCpp(answer).running(port) as server:
        yield server


@contextlib.asynccontextmanager
async def serve_vllm(answer: Answerer, *, port: int = 0, lora: bool = True) -> AsyncIterator[LocalServer]:
    """A vLLM server at `server.url`, with `server.model` as its base. `lora`: it loads adapters while it runs."""
    server = _Vllm(answer)
    server.lora = lora
    async with server.running(port):
        yield server


@contextlib.asynccontextmanager
async def serve_ollama(answer: Answerer, *, port: int = 0, knows_truncate: bool = False) -> AsyncIterator[LocalServer]:
    """An Ollama at `server.url` that has `server.model`. It shortens long prompts and says nothing.

    `knows_truncate`: it obeys `truncate: false`, as newer ones do.
    """
    server = _Ollama(answer)
    server.knows_truncate = knows_truncate
    async with server.running(port):
        yield server
