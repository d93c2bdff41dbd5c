"""vLLM at work: one base model, many tasks' adapters on it, behind a server process of our own or one that runs anyway.

Its log-probabilities are those after the grammar: how the model chose among what it was allowed to say.
Sources: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html, …/features/structured_outputs.html and
…/features/lora.html. A server of somebody else's takes adapters only where it was started with `--enable-lora` and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and reads them from a path on its own disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from apprentice import process, weights, wire
from apprentice.errors import ConfigError, ModelError, ModelRejected, ModelUnavailable
from apprentice.models import mapping, mappings, name_of, shape, text_of
from apprentice.models._checkpoints import Student, load
from apprentice.models._confidence import Rule
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

_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that `--max-lora-rank` may say; 16 without it
_INTERNAL = {"HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}


def build(
    checkpoint: str | Path | None = None,
    model: str | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    binary: str = "vllm",
    port: int = 0,
    context: int | None = None,
    parallel: int | None = None,
    concurrency: int | None = None,
    flags: list[str] | None = None,
    env: dict[str, str] | None = None,
    guided: Literal["response_format", "structured_outputs"] = "response_format",
    max_tokens: int = 512,
    confidence: Rule = "margin",
    samples: int = 0,
    fields: list[str] | None = None,
    timeout: float = 30,
    start_timeout: float = 900,
    recheck: float = 30,
    log_dir: str | None = None,
    client: wire.Client | None = None,
    allow_internal: bool = False,
) -> Local:
    """A model behind vLLM's server; nothing is started or loaded before the first question.

    `model`: the base as the server names it, or its folder. `checkpoint`: a folder with an adapter (as PEFT writes it),
    which is loaded into the server and unloaded by `close`; or with a whole model, for a server of ours. `base_url`: a
    server that runs anyway, without `/v1`; without it `binary serve MODEL` is started with `flags`, and with `env` as
    the only variables besides paths. `context`: tokens of one prompt and its answer; `parallel`: how many are answered at
    once; `concurrency`: how many questions it is sent at once, `parallel` without it; the others wait here. `guided`: how
    the schema is asked for; only newer servers know `structured_outputs`. The other settings are those of the model
    `llama_cpp`. Raises ConfigError for settings that do not fit together.
    """
    folder = None if checkpoint is None else Path(checkpoint)
    if model is None and (folder is None or base_url is not None):
        raise ConfigError("model 'vllm' needs `model`: the name under which the server knows its base")
    if base_url is None and shutil.which(binary) is None:
        raise ConfigError(f"model 'vllm': there is no program {binary!r}", hint="pip install vllm, or set base_url")
    if guided not in ("response_format", "structured_outputs"):
        raise ConfigError(f"model 'vllm': guided: {guided!r}", hint="response_format, or structured_outputs")
    served = f"apprentice-{folder.name.removeprefix('sha256-')[:12]}" if folder is not None else model
    assert served is not None
    speaker = _Vllm(model, served, max_tokens, guided)
    options = [*(["--max-model-len", str(context)] if context else []), *(flags or [])]
    options += ["--max-num-seqs", str(parallel)] if parallel else []
    speaker.launch = (binary, options, process.environment(_INTERNAL | (env or {})))
    log = log_of(speaker.name, log_dir, folder)
    settings = Settings(
        fields, confidence, samples, timeout, start_timeout, recheck, port, log, 20, concurrency or parallel
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


class _Vllm:
    def __init__(self, base: str | None, served: str, max_tokens: int, guided: str) -> None:
        self.name = f"vllm:{served}"
        self.max_tokens = max_tokens
        self.launch: tuple[str, list[str], dict[str, str]] = ("vllm", [], {})
        self._base = base
        self._served = served  # what requests ask for: the base, or the adapter
        self._adapter: Path | None = None
        self._rank = 0  # of the adapter
        self._guided = guided

    def take(self, folder: Path | None) -> Student | None:
        """The checkpoint's student, checked; from now on its weights are served."""
        if folder is None:
            return None
        student = load(folder)
        if student.kind == "adapter":
            self._adapter = student.path.resolve().parent  # as PEFT writes it; what else is there vLLM does not read
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                if not (self._adapter / name).is_file():
                    raise ConfigError(f"{self.name}: {self._adapter} has no {name}", hint="vLLM reads adapters of PEFT")
            self._rank = weights.check(self._adapter / "adapter_model.safetensors").rank or 0
            self._base = self._base or str(student.base["file"])
        else:
            whole = student.path.resolve()
            self._base = str(whole if whole.suffix == ".gguf" else whole.parent)
        return student

    def command(self, port: int) -> Command:
        binary, options, env = self.launch
        assert self._base is not None
        if Path(self._base).exists():  # else it is a name, which the server looks for in its own cache
            weights.check(Path(self._base))
        name = self._base if self._adapter is not None else self._served
        argv = [binary, "serve", self._base, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
        if self._adapter is not None:
            argv += ["--enable-lora", "--max-lora-rank", str(next((r for r in _RANKS if r >= self._rank), self._rank))]
        return Command([*argv, *options], env)

    def needs(self) -> int | None:
        """None: the server decides what it keeps in memory."""
        return None

    async def is_up(self, api: Api) -> bool:
        return (await api.get("/health")).status == 200

    async def enter(self, api: Api) -> bool:
        """Load the adapter, unless the server has it: its name is the hash of its content."""
        known = await self._names(api)
        if self._served in known:
            return False
        if self._adapter is None:
            raise ModelUnavailable(f"{self.name}: the server has no such model; it has {', '.join(known)}"[:400])
        order = {"lora_name": self._served, "lora_path": str(self._adapter)}
        outcome = await api.post("/v1/load_lora_adapter", order)
        if outcome.status == 200:  # told in a sentence, not in JSON
            return True
        if outcome.status == 404 and "error" not in (outcome.body or {}):
            raise ModelRejected(
                f"{self.name}: the server takes no adapters while it runs",
                hint="start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
            )
        if self._served in await self._names(api):  # somebody else was faster
            return False
        if outcome.status is not None and await self.is_up(api):
            raise ModelRejected(
                f"{self.name}: the server does not load the adapter {self._adapter}: {outcome.problem}",
                hint="it has to find that folder on its own disk, and to allow its rank: --max-lora-rank",
            )
        body_of(outcome, self.name)
        raise AssertionError("a failure has no body")

    async def leave(self, api: Api) -> None:
        if self._adapter is not None:
            await api.post("/v1/unload_lora_adapter", {"lora_name": self._served})

    async def identity(self, api: Api) -> dict[str, Json]:
        entry = next((entry for entry in await self._models(api) if entry.get("id") == self._served), {})
        asked = {"model": self._served, "prompt": CONTINUED, "max_tokens": 4, "temperature": 0, "logprobs": 0}
        outcome = await api.post("/v1/completions", asked)
        if (error := self.failure(outcome)) is not None:
            raise error
        choice = next(iter(mappings(body_of(outcome, self.name).get("choices"))), {})
        told = mapping(choice.get("logprobs"))
        return {
            **{name: entry.get(name) for name in ("root", "max_model_len")},
            "continues": choice.get("text"),
            "logprobs": [float(value) for value in told.get("token_logprobs") or []],
        }

    def request(self, task: Task, input: Json, *, seed: int | None = None) -> tuple[str, Json]:
        schema = shape(task.output_schema).schema
        body: dict[str, Json] = {
            "model": self._served,
            "messages": messages(task, input),
            "max_tokens": self.max_tokens,
            "temperature": 0 if seed is None else 0.7,
            "logprobs": True,
            "top_logprobs": ALTERNATIVES,
        }
        if self._guided == "response_format":
            form = {"name": name_of(task), "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        else:
            body["structured_outputs"] = {"json": schema}
        if seed is not None:
            body["seed"] = seed
        return "/v1/chat/completions", body

    def read(self, body: dict[str, Json]) -> Said:
        return read_chat(body)

    def unread(self, sent: Json, said: Said) -> str | None:
        """None: a prompt that does not fit is an error of this server."""
        return None

    def failure(self, outcome: wire.Outcome) -> ModelError | None:
        if outcome.status != 404:
            return None
        return ModelUnavailable(f"{self.name}: the server no longer has this model", outcome="rejected")

    async def _names(self, api: Api) -> list[str]:
        return [text_of(entry.get("id")) for entry in await self._models(api)]

    async def _models(self, api: Api) -> list[dict[str, Json]]:
        return mappings(body_of(await api.get("/v1/models"), self.name).get("data"))
