"""Requests that name a configured model instead of a task: the client's own body, asked and paid for like any other call.

A hold is durable before a byte leaves; the answer and its cost are in a Record of the task `passthrough` before the client
has it. Nothing in a body says where it goes: that is the configuration's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from random import Random
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from apprentice import wire
from apprentice.calls import Calls, Provider
from apprentice.config import Config, Remote, TaskConfig
from apprentice.engine import new_id
from apprentice.errors import ConfigError, InvalidAnswer, ModelRejected
from apprentice.gateway.allowance import worst_of
from apprentice.models import Endpoint, Prepared, as_json, failed, mappings, readable, text_of, usage_of
from apprentice.types import Answer, Attempt, Json, Micros, Seconds, Store, Task

type Format = Literal["openai", "anthropic"]

NAME = "passthrough"
_LOOK = 100  # calls between two looks whether the model was suspended meanwhile


class Whole(BaseModel):
    """Any object: what is asked and answered here is the provider's affair."""

    model_config = ConfigDict(extra="allow")


_WHOLE = f"{__name__}:Whole"
_TASK = TaskConfig(name=NAME, description="requests that name a model", input_schema=_WHOLE, output_schema=_WHOLE)


class _Wire(NamedTuple):
    own: str
    path: str
    header: str
    scheme: str
    headers: Mapping[str, str]
    parts: str  # where a whole answer has its parts
    added: int  # tokens that the provider puts before a request with tools


_WIRES: dict[str, _Wire] = {
    "openai": _Wire("https://api.openai.com/v1", "/chat/completions", "authorization", "Bearer ", {}, "choices", 0),
    "anthropic": _Wire(
        "https://api.anthropic.com",
        "/v1/messages",
        "x-api-key",
        "",
        {"anthropic-version": "2023-06-01"},
        "content",
        1_024,
    ),
}
_NEW_NAMES = ("openai.com", "openai.azure.com")  # who know max_completion_tokens


class Unfit(ModelRejected):
    """The provider says that the client's request is wrong; nobody else's."""


class Relay:
    """One configured remote that speaks the client's format."""

    def __init__(self, config: Config, remote: Remote, store: Store) -> None:
        alone = remote.model_copy(update={"additional_providers": (), "weight": None})
        self.remote = alone
        self._provider = _Direct(alone)
        self._calls = Calls(
            config.model_copy(update={"remote": alone}),
            store,
            clock=time.time,
            new_id=new_id,
            dice=Random(),  # noqa: S311  (pauses between retries, not secrecy)
        )
        self._calls.providers = [self._provider]
        self._asked = 0
        host = urlsplit(remote.base_url or _WIRES[remote.provider].own).hostname or ""
        new = any(host == name or host.endswith(f".{name}") for name in _NEW_NAMES)
        self._limit = "max_completion_tokens" if remote.provider == "openai" and new else "max_tokens"

    async def open(self) -> None:
        await self._calls.open()

    def body(self, told: dict[str, Json], max_tokens: int | None) -> dict[str, Json]:
        """The client's body as it leaves: our model, and a limit to what it can cost."""
        return told | {"model": self.remote.model, self._limit: max_tokens or self.remote.max_tokens}

    def worst(self, body: dict[str, Json]) -> Micros:
        """The most that all attempts together can cost."""
        return (self.remote.retries + 1) * worst_of(self._provider, _TASK, body)

    async def ask(self, body: dict[str, Json], *, deadline: Seconds, attempts: list[Attempt]) -> Answer:
        """The provider's whole answer as `output`, while its hold is being `settled`. `deadline`: a moment of the event loop.

        Raises what `Calls.ask` does."""
        self._asked += 1
        if self._asked % _LOOK == 0:
            await self._calls.look(_TASK, gap=0.0, level=None)
        return await self._calls.ask(_TASK, body, purpose="serve", deadline=deadline, attempts=attempts, later=True)

    async def settled(self, attempts: list[Attempt]) -> None:
        """Return when the ledger has what these attempts did cost. Raises StoreError."""
        await self._calls.settled(attempts)

    async def close(self) -> None:
        await self._calls.close()


class _Direct(Provider):
    """The remote without a task's prompt around what is asked."""

    def model(self) -> Any:
        if self._model is None:
            self._model = _Model(self.remote)
        return self._model


class _Model:
    def __init__(self, remote: Remote) -> None:
        self._wire = _WIRES[remote.provider]
        self._name = f"{remote.provider}/{remote.model}"
        self._read = _USAGES[remote.provider]
        self._endpoint = Endpoint(
            self._name,
            remote.base_url or self._wire.own,
            self._wire.path,
            api_key=os.environ.get(remote.api_key_env) if remote.api_key_env is not None else None,
            header=self._wire.header,
            scheme=self._wire.scheme,
            headers=self._wire.headers,
            timeout=remote.timeout,
            client=None,
            allow_internal=remote.allow_internal,
        )

    def request_bytes(self, task: Task, input: dict[str, Json]) -> int:
        return self.prepare(task, input).bytes

    def prepare(self, task: Task, input: dict[str, Json]) -> Prepared:
        """The client's body, written once."""
        request = as_json(input).encode()
        return Prepared(len(request) + (self._wire.added if "tools" in input else 0), partial(self._answer, request))

    async def answer(self, task: Task, input: dict[str, Json]) -> Answer:
        return await self.prepare(task, input).answer()

    async def _answer(self, request: bytes) -> Answer:
        started = time.monotonic()
        outcome = await self._endpoint.ask(request)
        number = wire.request_id(outcome.headers, outcome.body or {})
        name = self._name + (f" (request {number})" if number else "")
        if outcome.kind != "answered":
            if outcome.kind == "rejected" and outcome.status in (400, 413, 422):
                raise Unfit(f"{name}: {outcome.problem}", outcome="rejected", retryable=False)
            raise failed(outcome, name)
        body = outcome.body or {}
        usage = usage_of(body.get("usage"), self._read)
        if not mappings(body.get(self._wire.parts)) and body.get(self._wire.parts) != []:
            raise InvalidAnswer(
                f"{name}: the answer has no {self._wire.parts}", outcome="answered" if usage else "unknown", usage=usage
            )
        return Answer(
            output=body,
            model=readable(text_of(body.get("model"))),
            usage=usage,
            provider_request_id=readable(number),
            latency=time.monotonic() - started,
        )

    async def close(self) -> None:
        await self._endpoint.close()


class Relays:
    """The configured remotes by the names under which a client may ask for them."""

    def __init__(self, config: Config, store: Store) -> None:
        if any(task.name == NAME for task in config.tasks):
            raise ConfigError(
                f"a task is named {NAME!r}, which is where requests that name a model are recorded",
                hint="give the task another name",
            )
        remotes = [config.remote, *config.remote.additional_providers]
        self._relays = [Relay(config, remote, store) for remote in remotes if remote.provider in _WIRES]

    async def open(self) -> None:
        for relay in self._relays:
            await relay.open()

    def names(self) -> list[tuple[str, str]]:
        """(model, provider), the names that a client may use."""
        return list(dict.fromkeys((relay.remote.model, relay.remote.provider) for relay in self._relays))

    def find(self, name: str, format: Format) -> Relay | str | None:
        """The remote of that name, as "model" or "provider/model"; the provider's name if it speaks another format."""
        found = [r for r in self._relays if name in (r.remote.model, f"{r.remote.provider}/{r.remote.model}")]
        fits = [relay for relay in found if relay.remote.provider == format]
        return fits[0] if fits else found[0].remote.provider if found else None

    async def close(self) -> None:
        for relay in self._relays:
            await relay.close()


def _openai_usage(found: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = found["prompt_tokens"], found["completion_tokens"]
    return {
        "input_tokens": prompt,
        # Some compatible servers leave the reasoning out; it is in the total, and it is billed.
        "output_tokens": max(completion, (found.get("total_tokens") or 0) - prompt),
        "cached_tokens": (found.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    }


def _anthropic_usage(found: dict[str, Any]) -> dict[str, Any]:
    read = found.get("cache_read_input_tokens") or 0
    return {
        "input_tokens": found["input_tokens"] + (found.get("cache_creation_input_tokens") or 0) + read,
        "output_tokens": found["output_tokens"],
        "cached_tokens": read,
    }


_USAGES = {"openai": _openai_usage, "anthropic": _anthropic_usage}
