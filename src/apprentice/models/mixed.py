"""Two students at work on one answer: the embedded one for the closed fields, a generative one for the rest.

The second is told what the first decided, so that its text fits. A checkpoint is made by the trainer `mixed`; without
one, the generative model answers everything.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from apprentice import fields, heads, plugins
from apprentice.errors import ConfigError
from apprentice.models._learned import another_schema, misfit_of
from apprentice.types import Answer, Json, ManyModel, Model, Task


def build(
    checkpoint: str | Path | None = None,
    *,
    rest: dict[str, Any],
    model: str | None = None,
    log_dir: str | None = None,
) -> Mixed:
    """The students in a checkpoint's folder.

    `rest`: the generative one's `backend` (a server of our own: llama_cpp, vllm, ollama) and its settings, which `model`
    (its base model) and `log_dir` fill up.
    Raises ConfigError when the folder is missing or damaged or the settings are wrong; MissingExtra.
    """
    if checkpoint is None:
        return Mixed(_generative(rest, None, model, log_dir, None), None)
    folder = Path(checkpoint)
    manifest = heads.manifest_of(folder, heads.MIXED)
    try:
        parts = _Parts(**{name: manifest[name] for name in _Parts._fields})
        for part in (parts.closed_part, *([] if parts.rest_part is None else [parts.rest_part])):
            if Path(part).name != part:
                raise ValueError(f"{part!r} is no folder of its own")
    except (KeyError, TypeError, ValueError) as error:
        raise heads.damaged(folder, f"its manifest cannot be read: {error}") from error
    embedded: ManyModel = plugins.build("models", "embedded", checkpoint=folder / parts.closed_part)
    taught = None if parts.rest_part is None else folder / parts.rest_part
    # An untaught model's confidence is that in what is compared; a taught one's was calibrated for fields of its own.
    counted = parts.compared if taught is None and parts.compared else None
    generative = _generative(rest, taught, model, log_dir or str(folder.parent), counted)
    name = f"mixed:{folder.resolve().name.removeprefix('sha256-')[:12]}"
    return Mixed(generative, _Closed(name, embedded, parts))


class _Parts(NamedTuple):
    """What a manifest says about the two students."""

    output_schema: dict[str, Json]
    closed: list[str]  # fields of the one
    rest: list[str]  # fields of the other
    compared: list[str]  # of the rest, what the evaluator looks at
    closed_part: str  # folders in the checkpoint
    rest_part: str | None


class _Generative(Model, Protocol):
    """A model that says how much it may be asked and answer."""

    max_tokens: int

    def request_bytes(self, task: Task, input: Json) -> int: ...


class _Closed(NamedTuple):
    name: str
    model: ManyModel
    parts: _Parts


class _Asked(NamedTuple):
    """A task, and what each student is asked for it."""

    task: Task
    closed: Task
    rest: Task
    order: list[str]
    misfit: Callable[[Json], str | None]


class Mixed:
    """Answers a task's inputs; ready when the generative student is."""

    def __init__(self, rest: _Generative, closed: _Closed | None) -> None:
        self.max_tokens = rest.max_tokens
        self._rest = rest
        self._closed = closed
        self._asked: _Asked | None = None  # the last task

    async def answer(self, task: Task, input: Json) -> Answer:
        """Both students' fields in the schema's order; `output` is None where the second one's do not fit.

        Confidence: that in the closed fields, times that in the rest where the evaluator compares it and it is known.
        Raises what the generative student raises (ModelUnavailable while it is not ready), and ModelRejected when the
        task's output schema is not the one that was learned.
        """
        if self._closed is None:
            return await self._rest.answer(task, input)
        began = time.monotonic()
        asked = self._tasks(self._closed, task)
        decided = await self._closed.model.answer(asked.closed, input)
        written = await self._rest.answer(asked.rest, fields.told(input, decided.output))
        output, problem, sure = None, written.problem, decided.confidence
        if isinstance(written.output, dict):
            found = fields.chosen(written.output, self._closed.parts.rest) | decided.output
            output = fields.chosen(found, asked.order)
            if wrong := asked.misfit(output):
                output, problem = None, f"the answer does not fit the schema: {wrong}"
        elif written.output is not None:
            problem = "the answer is no object"
        if self._closed.parts.compared and sure is not None and written.confidence is not None:
            sure = round(sure * written.confidence, 6)
        changed = {
            "output": output,
            "problem": problem,
            "confidence": sure if output is not None else None,
            "model": f"{self._closed.name}+{written.model}",
            "latency": time.monotonic() - began,
        }
        return written.model_copy(update=changed)

    def request_bytes(self, task: Task, input: Json) -> int:
        """Never fewer than the tokens that the generative student is asked with. Blocks while the other one decides."""
        if self._closed is None:
            return self._rest.request_bytes(task, input)
        asked = self._tasks(self._closed, task)
        [decided] = self._closed.model.answer_many(asked.closed, [input])
        return self._rest.request_bytes(asked.rest, fields.told(input, decided.output))

    def state(self) -> object:
        """Where the generative student is in its life, as it says it itself."""
        state = getattr(self._rest, "state", None)
        return "ready" if state is None else state()

    async def ready(self) -> None:
        """Wait until both can answer. Raises ModelUnavailable that says why they cannot."""
        if (wait := getattr(self._rest, "ready", None)) is not None:
            await wait()

    async def close(self) -> None:
        """End the generative student's server, if it is ours."""
        if self._closed is not None:
            await self._closed.model.close()
        await self._rest.close()

    def _tasks(self, closed: _Closed, task: Task) -> _Asked:
        if self._asked is not None and self._asked.task is task:
            return self._asked
        parts = closed.parts
        if fields.plain(task.output_schema) != parts.output_schema:
            raise another_schema(closed.name, task)
        misfit = misfit_of(task)
        order = fields.names(task)
        following = fields.following(task, parts.closed, parts.rest)
        self._asked = _Asked(task, fields.only(task, parts.closed), following, order, misfit)
        return self._asked


def _generative(
    rest: dict[str, Any], checkpoint: Path | None, model: str | None, log_dir: str | None, counted: list[str] | None
) -> _Generative:
    settings = dict(rest)
    backend = settings.pop("backend", None)
    if not isinstance(backend, str):
        raise ConfigError(
            "model 'mixed': `rest` needs a `backend`", hint="rest: {backend: llama_cpp, model: base.gguf}"
        )
    known = inspect.signature(plugins.find("models", backend).build).parameters
    if not {"checkpoint", "model"} <= set(known) or "rest" in known:
        # What is asked here is booked nowhere, so it must not cost anything.
        raise ConfigError(
            f"model 'mixed': {backend!r} is no generative model on a server of our own",
            hint="backend: llama_cpp, vllm or ollama",
        )
    for name, value in {"checkpoint": checkpoint, "model": model, "log_dir": log_dir, "fields": counted}.items():
        if value is not None and name in known:
            settings.setdefault(name, value)
    built: _Generative = plugins.build("models", backend, **settings)
    return built
