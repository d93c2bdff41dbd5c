"""llama.cpp at work: a GGUF file, or an adapter on one, behind a server process of our own or one that runs anyway.

The server is `llama-server` where there is one, else the same server from the package xllamacpp. Its log-probabilities
are those before the grammar: what the model would have said of itself. Source: tools/server/README.md of llama.cpp.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from apprentice import process, weights, wire
from apprentice.errors import ConfigError, MissingExtra, ModelError, ModelRejected
from apprentice.models import mapping, name_of, shape
from apprentice.models._confidence import Rule, tokens_of
from apprentice.models._local import (
    ALTERNATIVES,
    CONTINUED,
    Api,
    Command,
    Local,
    Said,
    Settings,
    Student,
    body_of,
    check_base,
    load,
    log_of,
    messages,
    read_chat,
)
from apprentice.types import Json, Task

_OVERHEAD = 128 * 2**20  # bytes for buffers of a computation and the program itself


def build(
    checkpoint: str | Path | None = None,
    model: str | None = None,
    base_url: str | None = None,
    binary: str | None = None,
    port: int = 0,
    threads: int | None = None,
    context: int = 2048,
    parallel: int = 2,
    concurrency: int | None = None,
    flags: list[str] | None = None,
    max_tokens: int = 512,
    confidence: Rule = "margin",
    samples: int = 0,
    fields: list[str] | None = None,
    timeout: float = 30,
    start_timeout: float = 600,
    recheck: float = 30,
    log_dir: str | None = None,
    client: wire.Client | None = None,
    allow_internal: bool = False,
) -> Local:
    """A model behind llama.cpp's server; nothing is started before the first question.

    `checkpoint`: a folder with an adapter or a whole model; without one, `model` is asked as it is. `model`: a GGUF
    file, for an adapter its base. `base_url`: a server that runs anyway (with that model and adapter) instead of one of
    ours. `binary`: a llama-server; without it the one on the PATH, else the package xllamacpp. `context`: tokens of one
    prompt and its answer; `parallel`: how many are answered at once. `concurrency`: how many questions the server is sent
    at once, `parallel` without it; the others wait here. `threads`: all cores without it. `flags`: more arguments for a
    llama-server. `confidence`: by the distance to the next best token (margin), by the tokens' log-probabilities, or by
    how many of `samples` further answers agree; over the output `fields` that the evaluator compares.
    `recheck`: seconds after which a server of somebody else's is identified again. Raises ConfigError, and
    MissingExtra where there is no server to start.
    """
    if base_url is None:
        if checkpoint is None and model is None:
            raise ConfigError("model 'llama_cpp' needs `model`, `checkpoint` or `base_url`", hint="model: base.gguf")
        binary = _server(binary, flags)
    concurrency = parallel if concurrency is None else concurrency
    if min(context, parallel, concurrency, max_tokens) < 1:
        raise ConfigError("model 'llama_cpp': context, parallel, concurrency and max_tokens should be at least 1")
    folder = None if checkpoint is None else Path(checkpoint)
    shown = folder.name.removeprefix("sha256-")[:12] if folder is not None else Path(model or base_url or "").stem
    name = f"llama_cpp:{shown}"
    launch = _Launch(binary, threads or os.cpu_count() or 1, context, parallel, tuple(flags or ()))
    speaker = _LlamaCpp(name, None if model is None else Path(model), launch, max_tokens)
    log = log_of(name, log_dir, folder)
    settings = Settings(
        fields, confidence, samples, timeout, start_timeout, recheck, port, log, concurrency=concurrency
    )
    return Local(
        speaker,
        settings,
        base_url=base_url,
        client=client,
        allow_internal=allow_internal,
        student=lambda: speaker.take(folder, attached=base_url is not None),
    )


class _Launch(NamedTuple):
    binary: str | None
    threads: int
    context: int
    parallel: int
    flags: Sequence[str]


class _LlamaCpp:
    def __init__(self, name: str, model: Path | None, launch: _Launch, max_tokens: int) -> None:
        self.name = name
        self._model = model
        self._adapter: Path | None = None
        self._launch = launch
        self.max_tokens = max_tokens

    def take(self, folder: Path | None, *, attached: bool) -> Student | None:
        """The checkpoint's student, checked; from now on the server is started with its weights."""
        if folder is None:
            return None
        student = load(folder)
        if student.kind == "model":
            self._model = student.path
        else:
            self._adapter = student.path
            if not attached:
                self._model = self._model or Path(student.base["file"])
                check_base(student, self._model)
        return student

    def needs(self) -> int | None:
        if self._model is None or not self._model.exists():  # somebody else's server has it
            return None
        adapter = self._adapter.stat().st_size if self._adapter is not None else 0
        return memory_needed(self._model, self._launch.context, self._launch.parallel) + adapter

    def command(self, port: int) -> Command:
        assert self._model is not None
        for path in (self._model, self._adapter):
            if path is not None:
                weights.check(path)  # before C++ reads it
        binary, threads, context, parallel, flags = self._launch
        needed, available = memory_needed(self._model, context, parallel), process.available_memory()
        needed += self._adapter.stat().st_size if self._adapter is not None else 0
        if available is not None and needed > available:
            raise ConfigError(
                f"{self.name} needs about {needed / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} are free",
                hint="a smaller `context`, `parallel` or model",
            )
        model, adapter = str(self._model), None if self._adapter is None else str(self._adapter)
        if binary is None:
            order = {"model": model, "adapter": adapter, "port": port}
            order |= {"context": context, "parallel": parallel, "threads": threads}
            # -I: the folder of that file has modules named as other packages are.
            argv = [sys.executable, "-I", str(Path(__file__).with_name("_llama_server.py")), json.dumps(order)]
        else:
            argv = [binary, "-m", model, "--host", "127.0.0.1", "--port", str(port)]
            argv += ["-c", str(context * parallel), "-np", str(parallel), "-t", str(threads), "--threads-http", "64"]
            argv += [*(["--lora", adapter] if adapter else []), *flags]
        return Command(argv, process.environment({}), self._model.stat().st_size)

    async def is_up(self, api: Api) -> bool:
        return (await api.get("/health")).status == 200

    async def enter(self, api: Api) -> bool:
        """Nothing: it was started with what it serves."""
        return False

    async def leave(self, api: Api) -> None:
        """Nothing, likewise."""

    async def identity(self, api: Api) -> dict[str, Json]:
        props = body_of(await api.get("/props"), self.name)
        asked = {"prompt": CONTINUED, "n_predict": 4, "temperature": 0, "n_probs": 1, "cache_prompt": False}
        said = body_of(await api.post("/completion", asked), self.name)
        return {
            "model_path": props.get("model_path"),
            "context": mapping(props.get("default_generation_settings")).get("n_ctx"),
            "continues": [
                [token.text.decode("utf-8", "replace"), token.logprob]
                for token in tokens_of(said.get("completion_probabilities"))
            ],
        }

    def request(self, task: Task, input: Json, *, seed: int | None = None) -> tuple[str, Json]:
        form = {"name": name_of(task), "schema": shape(task.output_schema).schema, "strict": True}
        body: dict[str, Json] = {
            "messages": messages(task, input),
            "max_tokens": self.max_tokens,
            "temperature": 0 if seed is None else 0.7,
            "response_format": {"type": "json_schema", "json_schema": form},
            "logprobs": True,
            "top_logprobs": ALTERNATIVES,
        }
        if seed is not None:
            body["seed"] = seed
        return "/v1/chat/completions", body

    def read(self, body: dict[str, Json]) -> Said:
        return read_chat(body)._replace(model=self.name)  # it names its model by a path

    def unread(self, sent: Json, said: Said) -> str | None:
        """None: a prompt that does not fit is an error of this server."""
        return None

    def failure(self, outcome: wire.Outcome) -> ModelError | None:
        error = mapping((outcome.body or {}).get("error"))
        if error.get("type") != "exceed_context_size_error":
            return None
        return ModelRejected(
            f"{self.name}: the request has {error.get('n_prompt_tokens')} tokens, and the context {error.get('n_ctx')}",
            hint="a larger `context`, or shorter inputs",
            outcome="rejected",
        )


def _server(binary: str | None, flags: list[str] | None) -> str | None:
    """The llama-server to start, or None for the one in xllamacpp."""
    if (found := shutil.which(binary or "llama-server")) is not None:
        return found
    if binary is not None:
        raise ConfigError(f"model 'llama_cpp': there is no program {binary!r}")
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingExtra("xllamacpp", "llama-cpp")
    if flags:
        raise ConfigError("model 'llama_cpp': `flags` are for a llama-server, and there is none", hint="give `binary`")
    return None


# --- how much memory a model needs --------------------------------------------------------------------------------------


def memory_needed(path: str | Path, context: int, parallel: int) -> int:
    """Bytes that serving a GGUF file takes, about: its weights, keys and values of all contexts (16 bit), buffers.

    Raises ConfigError for what is no GGUF file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            about = _header(file)
        size = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no GGUF file: {error}") from error
    architecture = about.get("general.architecture")

    def number(name: str, otherwise: int) -> int:
        found = about.get(f"{architecture}.{name}")
        found = max(found, default=None) if isinstance(found, list) else found  # one number a layer
        return found if isinstance(found, int) else otherwise

    heads = number("attention.head_count", 1)
    width = number("embedding_length", 0) // max(heads, 1)
    cached = number("attention.key_length", width) + number("attention.value_length", width)
    token = 2 * number("block_count", 0) * number("attention.head_count_kv", heads) * cached
    return size + token * context * parallel + _OVERHEAD


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_LONGEST = 2**24  # items of a list, bytes of a text: beyond that it is no header


def _header(file: BinaryIO) -> dict[str, Json]:
    """What a GGUF file says about its model; lists of texts (a vocabulary) come out empty.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    def read(form: str) -> Json:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

    def text() -> str:
        return file.read(_limited(read("Q"))).decode()

    def value(kind: int) -> Json:
        if kind == _TEXT:
            return text()
        if kind == _LIST:
            inner, count = read("I"), _limited(read("Q"))
            if inner == _TEXT:
                for _ in range(count):
                    file.seek(_limited(read("Q")), os.SEEK_CUR)
                return []
            return [value(inner) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"a value of the unknown type {kind}")
        return read(_NUMBERS[kind])

    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin as one")
    read("I")  # the version
    read("Q")  # the number of tensors
    return {text(): value(read("I")) for _ in range(_limited(read("Q")))}


def _limited(count: int) -> int:
    if count > _LONGEST:
        raise ValueError("a number in its header is too large")
    return count
