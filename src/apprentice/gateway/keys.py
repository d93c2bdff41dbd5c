"""Who may use the gateway. A key is 256 random bits; the store keeps its SHA-256 in an Event, never the key.

No password hash: what nobody can guess need not be slow to check. That a key was made or revoked is part of the history.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Literal, NamedTuple, get_args

from pydantic import Field

from apprentice.errors import ConfigError
from apprentice.types import Event, Seconds, Store, Value

type Role = Literal["call", "feedback", "operate"]
ROLES: tuple[Role, ...] = get_args(Role.__value__)

_MADE, _REVOKED = "KEY_CREATED", "KEY_REVOKED"
_MOST = 10_000  # events about keys that are read
_FRESH: Seconds = 1.0  # for so long a process relies on what it read
_AGAIN: Seconds = 0.1  # but for a key that it does not know, which may be new
_PREFIX = "apk-"
_LONGEST = 200  # characters; what is longer is no key of ours


class Key(Value):
    """What is kept of a key. `limits`: US dollars by window (total, daily, weekly, monthly)."""

    id: str
    name: str
    digest: str  # SHA-256 of the key, in hex
    roles: frozenset[Role] = Field(min_length=1)
    limits: Mapping[str, Decimal] = {}
    at: Seconds = 0.0


EVERYBODY = Key(id="everybody", name="everybody", digest="", roles=frozenset(ROLES))  # where no key is asked for


class NewKey(NamedTuple):
    """A key that was just made. `secret` is told once and kept nowhere."""

    key: Key
    secret: str


async def create(
    store: Store, name: str, roles: frozenset[Role], *, at: Seconds, limits: Mapping[str, Decimal] | None = None
) -> NewKey:
    """A new key, durable in the store. Raises ConfigError for a name that another key has."""
    if not name or len(name) > 100 or not name.isprintable():
        raise ConfigError("the name of a key should be 1 to 100 printable characters")
    if any(key.name == name for key in await known(store)):
        raise ConfigError(f"there is a key named {name!r} already", hint="revoke it, or choose another name")
    secret = _PREFIX + secrets.token_urlsafe(32)
    digest = _digest(secret)
    key = Key(id=digest[:12], name=name, digest=digest, roles=roles, limits=limits or {}, at=at)
    message = f"key {key.id} ({name}) may {', '.join(sorted(roles))}"
    evidence = key.model_dump(mode="json") | {"roles": sorted(roles)}
    await store.add_event(Event(name=_MADE, task="", at=at, message=message, evidence=evidence))
    return NewKey(key, secret)


async def revoke(store: Store, name: str, *, at: Seconds) -> Key:
    """The key of that name or id, after it stopped working. Raises ConfigError when there is none."""
    keys = await known(store)
    key = next((key for key in keys if name in (key.name, key.id)), None)
    if key is None:
        raise ConfigError(f"no key {name!r}", hint=f"keys: {', '.join(key.name for key in keys) or 'none'}")
    event = Event(
        name=_REVOKED, task="", at=at, message=f"key {key.id} ({key.name}) is revoked", evidence={"id": key.id}
    )
    await store.add_event(event)
    return key


async def known(store: Store) -> list[Key]:
    """The keys that work, in the order in which they were made."""
    found: dict[str, Key] = {}
    for event in await store.events("", names=[_MADE, _REVOKED], limit=_MOST):
        if event.name == _MADE:
            found[event.evidence["id"]] = Key.model_validate(event.evidence)
        else:
            found.pop(event.evidence["id"], None)
    return list(found.values())


class Keyring:
    """The keys of a store as one process knows them, at most a second behind."""

    def __init__(self, store: Store, *, clock: Callable[[], Seconds] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._keys: dict[str, Key] = {}  # by digest
        self._read_at: Seconds | None = None
        self._reading: asyncio.Task[None] | None = None

    async def find(self, secret: str) -> Key | None:
        """The key with this secret. How long that takes depends on its SHA-256, and says nothing about how near a guess is."""
        digest = _digest(secret) if len(secret) <= _LONGEST else ""
        if self._is_older(_FRESH):
            await self._renew()
        if digest not in self._keys and self._is_older(_AGAIN):
            await self._renew()
        return self._keys.get(digest)

    def _is_older(self, age: Seconds) -> bool:
        return self._read_at is None or self._clock() - self._read_at >= age

    async def _renew(self) -> None:
        if self._reading is None:  # all who come meanwhile wait for the same
            self._reading = asyncio.ensure_future(self._read())
        await asyncio.shield(self._reading)

    async def _read(self) -> None:
        began = self._clock()
        try:
            self._keys = {key.digest: key for key in await known(self._store)}
            self._read_at = began
        finally:
            self._reading = None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
