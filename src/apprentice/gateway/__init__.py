"""The HTTP door: what OpenAI's and Anthropic's clients speak, an interface of our own, and whatever operates it.

`app.build` makes the ASGI application, `server.serve` runs it. Both need the extra `gateway`; keys need nothing but a store.
"""

from __future__ import annotations

import ipaddress

from pydantic import Field, field_validator, model_validator

from apprentice.errors import ConfigError
from apprentice.types import Seconds, Value

PORT = 8411
HEADER = "x-apprentice-"  # what our request and response headers begin with


class Settings(Value):
    """How the gateway listens, and what it lets in. Sizes are bytes, times are seconds."""

    host: str = "127.0.0.1"
    port: int = Field(default=PORT, ge=0, le=65_535)
    hosts: frozenset[str] = frozenset()  # names by which clients may call it, besides its own address and localhost
    origins: frozenset[str] = frozenset()  # web pages that may call it, besides its own
    keyless: bool = False  # every program that reaches the port may do everything
    max_body: int = Field(default=4 * 2**20, ge=1)
    parallel: int = Field(default=256, ge=1)  # requests that are worked on at the same time, in one process
    connections: int = Field(default=2_000, ge=1)  # in one process
    timeout: Seconds = Field(default=120.0, gt=0)  # for the answer to one request
    patience: Seconds = Field(default=15.0, gt=0)  # for the head of a request, and then for its body
    grace: Seconds = Field(default=30.0, ge=0)  # for what is in flight when it is told to stop

    @field_validator("hosts", "origins")
    @classmethod
    def _in_lower_case(cls, names: frozenset[str]) -> frozenset[str]:
        return frozenset(name.lower().rstrip("/") for name in names)

    @model_validator(mode="after")
    def _keys_are_needed(self) -> Settings:
        if self.keyless and not is_loopback(self.host):
            raise ConfigError(
                f"without keys, everybody who reaches {self.host} could spend your money",
                hint="listen on 127.0.0.1, or make a key: apprentice keys create NAME --role call",
            )
        return self

    @property
    def names(self) -> frozenset[str]:
        """The host names that a request may be for."""
        own = {self.host.lower()} if self.host not in ("0.0.0.0", "::", "") else set()  # noqa: S104 - not listened on here
        return self.hosts | own | {"localhost", "127.0.0.1", "::1"}


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
