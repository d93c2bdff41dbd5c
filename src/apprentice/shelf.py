"""The local models of one task: the one that answers, the canary beside it, and the one before it.

The last is kept warm, so that going back is instant.

A request borrows the model that it was decided with, and gives it back: a version that was replaced is closed when the
last request that began with it is over, never under one.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apprentice import plugins
from apprentice.config import Local
from apprentice.errors import ConfigError, ModelError
from apprentice.types import Model, Version


def load(local: Local, checkpoint: str | Path | None) -> Model:
    """The local model of a configuration with this checkpoint; None: what it is before it has learned anything.

    A plugin that takes `model` is told the base model, one that takes `log_dir` where its server's log goes. Raises
    ConfigError.
    """
    settings: dict[str, Any] = dict(local.settings)
    known = inspect.signature(plugins.find("models", local.backend).build).parameters
    if "model" in known and local.base_model is not None:
        settings.setdefault("model", local.base_model)
    if "log_dir" in known:
        settings.setdefault("log_dir", str(local.model_dir / "logs"))
    model: Model = plugins.build("models", local.backend, checkpoint=checkpoint, **settings)
    return model


async def ready(model: Model) -> None:
    """Wait until the model can answer; one that runs in this process always can. Raises ModelUnavailable, ConfigError."""
    if (wait := getattr(model, "ready", None)) is not None:
        await wait()


@dataclass(slots=True)
class Loaded:
    """A version with its model, and how many requests use it now."""

    version: Version
    model: Model
    users: int = 0
    loading: asyncio.Task[None] | None = None


class Shelf:
    """Safe on one event loop. `build` makes the model of a version; it may raise ConfigError."""

    def __init__(self, build: Callable[[Version], Model]) -> None:
        self.serving: Loaded | None = None
        self._build = build
        self.beside: Loaded | None = None  # what is tried out
        self._warm: Loaded | None = None  # what served before
        self._leaving: list[Loaded] = []  # still used by requests that began with them
        self._closing: set[asyncio.Task[None]] = set()

    def put(self, version: Version) -> None:
        """Serve this version from the next request on. One that was kept warm or tried out is there at once.

        A server begins to load here, and refuses answers until it has; what served before is closed only when a third
        version comes. Raises ConfigError for a version that cannot be loaded: nothing is served then.
        """
        before, warm = self.serving, self._warm
        self.serving = None
        if warm is not None and warm.version.id == version.id:
            self.serving, self._warm = warm, before
            return
        if before is not None:
            self._warm = before
            if warm is not None:
                self._drop(warm)
        if self.beside is not None and self.beside.version.id == version.id:
            self.serving, self.beside = self.beside, None
            return
        self.serving = self._load(version)

    def try_out(self, version: Version | None) -> None:
        """Have this version beside the one that serves; None: nothing. Raises ConfigError as `put` does."""
        before, self.beside = self.beside, None
        if before is not None:
            self._drop(before)
        if version is not None:
            self.beside = self._load(version)

    def _load(self, version: Version) -> Loaded:
        loaded = Loaded(version, self._build(version))
        loaded.loading = asyncio.create_task(_loading(loaded.model))
        return loaded

    def withdraw(self) -> None:
        """Serve nothing from the next request on."""
        if self.serving is not None:
            if self._warm is not None:
                self._drop(self._warm)
            self._warm, self.serving = self.serving, None

    def borrow(self) -> Loaded | None:
        """What answers a request that begins now; to be given back."""
        if self.serving is not None:
            self.serving.users += 1
        return self.serving

    def borrow_beside(self) -> Loaded | None:
        """The same of what is tried out, once it is loaded."""
        if self.beside is None or (self.beside.loading is not None and not self.beside.loading.done()):
            return None
        self.beside.users += 1
        return self.beside

    def give_back(self, loaded: Loaded) -> None:
        """The request that borrowed it is over."""
        loaded.users -= 1
        if loaded.users == 0 and loaded in self._leaving:
            self._leaving.remove(loaded)
            self._close(loaded)

    def state(self) -> str:
        """Where the model that serves is in its life, in words: "ready", "still loading, 40 %", "failed: …"."""
        if self.serving is None:
            return "no local model yet"
        state = getattr(self.serving.model, "state", None)
        return "ready" if state is None else str(state())

    async def close(self) -> None:
        """Close every model. No request may be in flight."""
        for loaded in (self.serving, self.beside, self._warm, *self._leaving):
            if loaded is not None:
                self._close(loaded)
        self.serving = self.beside = self._warm = None
        self._leaving.clear()
        await asyncio.gather(*self._closing)

    def _drop(self, loaded: Loaded) -> None:
        if loaded.users:
            self._leaving.append(loaded)
        else:
            self._close(loaded)

    def _close(self, loaded: Loaded) -> None:
        async def close() -> None:
            if loaded.loading is not None:
                loaded.loading.cancel()
                await asyncio.wait([loaded.loading])
            await loaded.model.close()

        task = asyncio.create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _loading(model: Model) -> None:
    """Begin to load. Whatever goes wrong is said to the requests that ask for an answer."""
    with contextlib.suppress(ModelError, ConfigError):
        await ready(model)
