"""llama.cpp at work: a GGUF file, or an adapter on one, behind a server process of our own or one that runs anyway.

The server is `llama-server` where there is one, else the same server from the package xllamacpp. Its log-probabilities
are those before the grammar: what the model would have said of itself. Source: tools/server/README.md of llama.cpp.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apprentice import process, weights, wire
from apprentice.errors import ConfigError, MissingExtra, ModelError, ModelRejected
from apprentice.models import mapping, name_of, shape
from apprentice.models._checkpoints import Student, check_base, load
from apprentice.models._confidence import Rule, tokens_of
from apprentice.models._local import (
    ALTERNATIVES,
    CONTINUED,
    Api,
    Command,
    Local,
    Said,
    Settings,
    body_of,
    log_of,
    messages,
    read_chat,
)
from apprentice.types import Json, Task

_OVERHEAD = 128 * 2**20  # bytes for buffers of a computation and the program itself


def build(
    checkpoint: str | Path | None = None,
    model: str | None = None,
    adapter: str | None = None,
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
    file, for an adapter its base. `adapter`: a GGUF file on `model` that is no checkpoint. `base_url`: a server that runs
    anyway (with that model and adapter) instead of one of ours. `binary`: a llama-server; without it the one on the PATH,
    else the package xllamacpp. `context`: tokens of one prompt and its answer; `parallel`: how many are answered at once.
    `concurrency`: how many questions the server is sent at once, `parallel` without it; the others wait here. `threads`:
    all cores without it. `flags`: more arguments for a llama-server. `confidence`: by the distance to the next best token
    (margin), by the tokens' log-probabilities, or by how many of `samples` further answers agree; over the output `fields`
    that the evaluator compares. `recheck`: seconds after which a server of somebody else's is identified again.
    Raises ConfigError, and MissingExtra where there is no server to start.
    """
    if base_url is None:
        if checkpoint is None and model is None:
            raise ConfigError("model 'llama_cpp' needs `model`, `checkpoint` or `base_url`", hint="model: base.gguf")
        binary = _server(binary, flags)
    if adapter is not None:
        _check_alone(model, checkpoint, base_url)
    if min(context, parallel, 1 if concurrency is None else concurrency, max_tokens) < 1:
        raise ConfigError("model 'llama_cpp': context, parallel, concurrency and max_tokens should be at least 1")
    folder = None if checkpoint is None else Path(checkpoint)
    name = f"llama_cpp:{_shown(folder, model or base_url or '')}"
    launch = _Launch(binary, threads or os.cpu_count() or 1, context, parallel, tuple(flags or ()))
    base, lora = (None if path is None else Path(path) for path in (model, adapter))
    speaker = _LlamaCpp(name, base, lora, launch, max_tokens)
    log = log_of(name, log_dir, folder)
    room = parallel if concurrency is None else concurrency
    settings = Settings(fields, confidence, samples, timeout, start_timeout, recheck, port, log, concurrency=room)
    return Local(
        speaker,
        settings,
        base_url=base_url,
        client=client,
        allow_internal=allow_internal,
        student=lambda: speaker.take(folder, attached=base_url is not None),
    )


def _check_alone(model: str | None, checkpoint: str | Path | None, base_url: str | None) -> None:
    """Raise ConfigError where an adapter has no model to be put on, or a server of ours cannot put it there."""
    if model is None or checkpoint is not None or base_url is not None:
        raise ConfigError(
            "model 'llama_cpp': `adapter` is put on `model` by a server of ours, and is no checkpoint",
            hint="model: base.gguf and adapter: adapter.gguf, without `checkpoint` and `base_url`",
        )


def _shown(folder: Path | None, otherwise: str) -> str:
    return Path(otherwise).stem if folder is None else folder.name.removeprefix("sha256-")[:12]


class _Launch(NamedTuple):
    binary: str | None
    threads: int
    context: int
    parallel: int
    flags: Sequence[str]


class _LlamaCpp:
    def __init__(self, name: str, model: Path | None, adapter: Path | None, launch: _Launch, max_tokens: int) -> None:
        self.name = name
        self._model = model
        self._adapter = adapter
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
        return self._needed(self._model)

    def command(self, port: int) -> Command:
        assert self._model is not None
        binary, threads, context, parallel, flags = self._launch
        needed, available = self._needed(self._model), process.available_memory()
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

    def _needed(self, path: Path) -> int:
        """Bytes, about. Both files are checked, before C++ reads them: raises UnsafeFile."""
        model = weights.check(path)
        if model.format != "gguf":
            raise ConfigError(f"{path} is no GGUF file", hint="convert it with llama.cpp's convert_hf_to_gguf.py")
        adapter = 0 if self._adapter is None else weights.check(self._adapter).size
        return memory_needed(model, self._launch.context, self._launch.parallel) + adapter

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


def memory_needed(model: weights.Contents, context: int, parallel: int) -> int:
    """Bytes that serving a model takes, about: its weights, keys and values of all contexts (16 bit), buffers."""
    heads = model.heads or 1
    width = (model.width or 0) // heads
    cached = (width if model.key_width is None else model.key_width) + (
        width if model.value_width is None else model.value_width
    )
    token = 2 * (model.blocks or 0) * (heads if model.kv_heads is None else model.kv_heads) * cached
    return model.size + token * context * parallel + _OVERHEAD
