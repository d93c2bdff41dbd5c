"""Ollama at work: a model that it has, or one that is made in it from a checkpoint.

Ollama shortens a prompt that is longer than `num_ctx` and says nothing, so `num_ctx` is always sent, `truncate: false`
asks newer servers to refuse instead, and what it says it read is compared with what was sent.
Source: https://docs.ollama.com/api.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from apprentice import process, wire
from apprentice.errors import ConfigError, ModelError, ModelUnavailable
from apprentice.models import mapping, mappings, shape, text_of, usage_of
from apprentice.models._checkpoints import Student, file_hash, load
from apprentice.models._confidence import Rule, tokens_of
from apprentice.models._local import (
    ALTERNATIVES,
    Api,
    Command,
    Local,
    Said,
    Settings,
    body_of,
    log_of,
    messages,
)
from apprentice.types import FinishState, Json, Task

_DENSEST = 6.0  # bytes a token, template included: prose has four to five, so more means that a part was not read


def build(
    checkpoint: str | Path | None = None,
    model: str | None = None,
    base_url: str | None = "http://127.0.0.1:11434",
    api_key: str | None = None,
    binary: str = "ollama",
    port: int = 0,
    context: int = 4096,
    keep_alive: str = "10m",
    concurrency: int | None = None,
    env: dict[str, str] | None = None,
    max_tokens: int = 512,
    confidence: Rule = "margin",
    samples: int = 0,
    fields: list[str] | None = None,
    timeout: float = 60,
    start_timeout: float = 600,
    recheck: float = 30,
    log_dir: str | None = None,
    client: wire.Client | None = None,
    allow_internal: bool = False,
) -> Local:
    """A model in Ollama; nothing is started or loaded before the first question.

    `model`: its name, for an adapter the name of its base. `checkpoint`: a folder with a GGUF adapter or model, from
    which a model named after its content is made in the server, where there is none yet. `base_url: null` starts
    `binary serve`, with `env` as the only variables besides paths (OLLAMA_MODELS, say). `context`: tokens of one prompt
    and its answer. `keep_alive`: how long the model stays in memory after an answer. `concurrency`: how many questions it
    is sent at once, all without it; the others wait here. `confidence` needs Ollama 0.12.11 unless it is `samples`. The
    other settings are those of the model `llama_cpp`.
    Raises ConfigError for settings that do not fit together.
    """
    folder = None if checkpoint is None else Path(checkpoint)
    if model is None and folder is None:
        raise ConfigError("model 'ollama' needs `model` or `checkpoint`", hint="model: llama3.2")
    if base_url is None and shutil.which(binary) is None:
        raise ConfigError(f"model 'ollama': there is no program {binary!r}", hint="https://ollama.com/download")
    served = f"apprentice-{folder.name.removeprefix('sha256-')[:12]}" if folder is not None else str(model)
    speaker = _Ollama(model, served, max_tokens, context, keep_alive, start_timeout)
    speaker.launch = (binary, process.environment(env or {}))
    log = log_of(speaker.name, log_dir, folder)
    settings = Settings(
        fields, confidence, samples, timeout, start_timeout, recheck, port, log, concurrency=concurrency
    )
    return Local(
        speaker,
        settings,
        base_url=base_url,
        api_key=api_key,
        client=client,
        allow_internal=allow_internal,
        student=lambda: speaker.take(folder),
    )


class _Ollama:
    def __init__(
        self, base: str | None, served: str, max_tokens: int, context: int, keep_alive: str, patience: float
    ) -> None:
        self.name = f"ollama:{served}"
        self.max_tokens = max_tokens
        self.launch: tuple[str, dict[str, str]] = ("ollama", {})
        self._base = base
        self._served = served
        self._context = context
        self._keep_alive = keep_alive
        self._patience = patience
        self._student: Student | None = None

    def take(self, folder: Path | None) -> Student | None:
        """The checkpoint's student, checked; `enter` makes it known to the server."""
        if folder is None:
            return None
        self._student = load(folder)
        if self._student.kind == "adapter" and self._base is None:
            raise ConfigError(
                f"{self.name}: the checkpoint is an adapter, and `model` does not say what Ollama calls its base",
                hint=f"model: the name of {self._student.base.get('file')} in `ollama list`",
            )
        return self._student

    def command(self, port: int) -> Command:
        binary, env = self.launch
        return Command([binary, "serve"], env | {"OLLAMA_HOST": f"127.0.0.1:{port}"})

    def needs(self) -> int | None:
        """None: the server decides what it keeps in memory."""
        return None

    async def is_up(self, api: Api) -> bool:
        return (await api.get("/api/version")).status == 200

    async def enter(self, api: Api) -> bool:
        """Make the model where it is missing, and have it loaded. Raises ModelUnavailable that says what to pull."""
        running = mappings(body_of(await api.get("/api/ps"), self.name).get("models"))
        before = {text_of(entry.get("model", entry.get("name"))) for entry in running}
        if (await api.post("/api/show", {"model": self._served})).status == 404 and self._student is not None:
            await self._create(api, self._student)
        asked = {"model": self._served, "keep_alive": self._keep_alive, "options": {"num_ctx": self._context}}
        outcome = await api.post(
            "/api/generate", asked | {"stream": False}, self._patience
        )  # without a prompt: it is loaded
        if (error := self.failure(outcome)) is not None:
            raise error
        body_of(outcome, self.name)
        return not before & {self._served, f"{self._served}:latest"}

    async def leave(self, api: Api) -> None:
        """Free its memory; the model stays in Ollama's store."""
        await api.post("/api/generate", {"model": self._served, "keep_alive": 0, "stream": False})

    async def identity(self, api: Api) -> dict[str, Json]:
        """The digest: Ollama names what it serves by its content."""
        names = (self._served, f"{self._served}:latest")
        listed = mappings(body_of(await api.get("/api/tags"), self.name).get("models"))
        found = [entry.get("digest") for entry in listed if entry.get("model", entry.get("name")) in names]
        if not found:
            raise self._missing(self._served)
        return {"digest": found[0]}

    def request(self, task: Task, input: Json, *, seed: int | None = None) -> tuple[str, Json]:
        options: dict[str, Json] = {"num_ctx": self._context, "num_predict": self.max_tokens}
        options |= {"temperature": 0} if seed is None else {"temperature": 0.7, "seed": seed}
        return "/api/chat", {
            "model": self._served,
            "messages": messages(task, input),
            "format": shape(task.output_schema).schema,
            "stream": False,
            "keep_alive": self._keep_alive,
            "truncate": False,
            "shift": False,
            "options": options,
            "logprobs": True,
            "top_logprobs": ALTERNATIVES,
        }

    def read(self, body: dict[str, Json]) -> Said:
        reason = text_of(body.get("done_reason"))
        finish: FinishState = "complete" if reason == "stop" and body.get("done") is True else "truncated"
        return Said(
            text=text_of(mapping(body.get("message")).get("content")),
            model=text_of(body.get("model")),
            usage=usage_of(
                body, lambda found: {"input_tokens": found["prompt_eval_count"], "output_tokens": found["eval_count"]}
            ),
            finish=finish,
            tokens=tokens_of(body.get("logprobs")),
            problem=None if reason in ("stop", "length") else f"the answer was cut off: {reason or 'no reason given'}",
        )

    def unread(self, sent: Json, said: Said) -> str | None:
        """Why it must be feared that Ollama shortened the prompt, or None. It keeps a prompt's end, and the system's."""
        size = sum(len(message["content"].encode("utf-8", "replace")) for message in sent["messages"])
        room = self._context - self.max_tokens
        if size <= room:  # no token is shorter than a byte
            return None
        if said.usage is None:
            return "Ollama does not say how much of the prompt it read"
        read = said.usage.input_tokens
        if read > room or size > read * _DENSEST:
            return f"the prompt did not fit: {read} tokens of it were read, with {size} bytes sent and num_ctx {self._context}"
        return None

    def failure(self, outcome: wire.Outcome) -> ModelError | None:
        return self._missing(self._served) if outcome.status == 404 else None

    def _missing(self, name: str) -> ModelUnavailable:
        command = f"ollama pull {self._base or name}"
        return ModelUnavailable(
            f"{self.name}: Ollama has no model {name!r}; run `{command}`", hint=command, outcome="rejected"
        )

    async def _create(self, api: Api, student: Student) -> None:
        digest = await asyncio.to_thread(file_hash, student.path)
        outcome = await api.upload(f"/api/blobs/sha256:{digest}", student.path, self._patience)
        if outcome.status not in (200, 201):  # a success has no body
            body_of(outcome, self.name)
        order: dict[str, Json] = {"model": self._served, "stream": False}
        if student.kind == "adapter":
            order |= {"from": self._base, "adapters": {student.path.name: f"sha256:{digest}"}}
        else:
            order["files"] = {student.path.name: f"sha256:{digest}"}
        made = await api.post("/api/create", order, self._patience)
        if made.status == 404:
            raise self._missing(str(self._base))
        body_of(made, self.name)
