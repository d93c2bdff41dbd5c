"""Who watches what the engine does: nobody, unless the configuration has a section `telemetry`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal, NamedTuple, Protocol

from apprentice import types
from apprentice.config import Remote, TaskConfig
from apprentice.sections import Telemetry
from apprentice.types import Answer, Micros, Record

type Purpose = types.Purpose | Literal["local", "canary"]
type Told = Callable[[Answer, Micros, bool], None]
"""Takes an answer, what it cost, and whether it is of use."""


class Asked(NamedTuple):
    """Which model is asked, and for what. `remote` is None for a local one, whose `model` is "task/version"."""

    task: str
    purpose: Purpose
    provider: str  # the name of the model plugin
    model: str
    remote: Remote | None = None


class Observer(Protocol):
    """Is told of things while they happen. It changes nothing, keeps nobody waiting, and raises nothing of its own."""

    def request(self, task: TaskConfig) -> AbstractContextManager[None]:
        """Around one request."""
        ...

    def call(self, asked: Asked) -> AbstractContextManager[Told]:
        """Around one call of one model; an exception that passes through it is why there is no answer."""
        ...

    def recorded(self, record: Record, *, again: bool = False) -> None:
        """What became of the request that is under way, as it is kept. `again`: it was answered before."""
        ...

    def continued(self, headers: Mapping[str, str]) -> AbstractContextManager[None]:
        """Around what belongs to something that began elsewhere, as the headers of a request say."""
        ...


class Nobody:
    """Watches nothing."""

    _quiet = nullcontext()
    _deaf = nullcontext[Told](lambda answer, cost, useful: None)

    def request(self, task: TaskConfig) -> AbstractContextManager[None]:
        return self._quiet

    def call(self, asked: Asked) -> AbstractContextManager[Told]:
        return self._deaf

    def recorded(self, record: Record, *, again: bool = False) -> None:
        return None

    def continued(self, headers: Mapping[str, str]) -> AbstractContextManager[None]:
        return self._quiet


@cache
def of(settings: Telemetry | None) -> Observer:
    """The process's observer for these settings. Raises MissingExtra, and ConfigError for variables that it cannot follow."""
    if settings is None:
        return Nobody()
    built: Observer = importlib.import_module("apprentice.telemetry").build(settings)
    return built
