"""Commands of the gateway: serve, keys."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from apprentice import config as configuration
from apprentice import plugins
from apprentice.cli.terminal import Command, above_zero, positive, print_json, when
from apprentice.errors import ConfigError, MissingExtra
from apprentice.gateway import PORT, Settings, keys
from apprentice.types import Json, Store


def _serve(parsed: argparse.Namespace) -> int:
    """Answer OpenAI's and Anthropic's clients, and our own interface, over HTTP."""
    try:
        from apprentice.gateway.server import serve
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "starlette", "gateway") from error
    config = configuration.load(parsed.config)
    settings = Settings(
        host=parsed.host,
        port=parsed.port,
        hosts=frozenset(parsed.name),
        origins=frozenset(parsed.origin),
        keyless=parsed.i_trust_every_local_program,
        max_body=parsed.max_body,
        parallel=parsed.parallel,
        timeout=parsed.timeout,
        grace=parsed.grace,
    )
    if not settings.keyless and not asyncio.run(_with_store(parsed, keys.known)):
        print("no key can use it yet: apprentice keys create NAME --role call", file=sys.stderr)
    url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}"

    def heard() -> None:
        print(f"apprentice at {url}, base URL for clients: {url}/v1", file=sys.stderr, flush=True)

    serve(config, settings, source=parsed.config, workers=parsed.workers, log=parsed.log, heard=heard)
    return 0


def _keys(parsed: argparse.Namespace) -> int:
    """Make, list or revoke the keys of the gateway. A new key is shown once."""
    run: dict[str, Callable[[argparse.Namespace], int]] = {"create": _create, "list": _list, "revoke": _revoke}
    if (parsed.name is None) != (parsed.action == "list"):
        takes = "no name" if parsed.action == "list" else "a name"
        said = "" if parsed.action == "list" else " NAME"
        raise ConfigError(f"keys {parsed.action} takes {takes}", hint=f"apprentice keys {parsed.action}{said}")
    return run[parsed.action](parsed)


def _create(parsed: argparse.Namespace) -> int:
    limits = {
        window: getattr(parsed, window)
        for window in ("total", "daily", "weekly", "monthly")
        if getattr(parsed, window) is not None
    }
    roles = frozenset(parsed.role or ["call"])
    made = asyncio.run(
        _with_store(parsed, lambda store: keys.create(store, parsed.name, roles, at=time.time(), limits=limits))
    )
    if parsed.json:
        print_json(_shown(made.key) | {"key": made.secret})
    else:
        print(made.secret)
        print(f"{_line(made.key)}; the key is not shown again", file=sys.stderr)
    return 0


def _list(parsed: argparse.Namespace) -> int:
    found = asyncio.run(_with_store(parsed, keys.known))
    if parsed.json:
        print_json([_shown(key) for key in found])
    else:
        for key in found:
            print(_line(key))
    return 0


def _revoke(parsed: argparse.Namespace) -> int:
    key = asyncio.run(_with_store(parsed, lambda store: keys.revoke(store, parsed.name, at=time.time())))
    if parsed.json:
        print_json(_shown(key))
    else:
        print(f"{key.id}  {key.name} is revoked; running gateways follow within a second")
    return 0


def _shown(key: keys.Key) -> dict[str, Json]:
    limits = {window: float(limit) for window, limit in key.limits.items()}
    return {"id": key.id, "name": key.name, "roles": sorted(key.roles), "limits": limits, "at": key.at}


def _line(key: keys.Key) -> str:
    limits = "".join(f", {window} ${limit}" for window, limit in key.limits.items())
    return f"{key.id}  {key.name}: {', '.join(sorted(key.roles))}{limits}, since {when(key.at)}"


async def _with_store[T](parsed: argparse.Namespace, act: Callable[[Store], Awaitable[T]]) -> T:
    """Unlike other commands these make the store: a key may be the first thing in it."""
    config = configuration.load(parsed.config)
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    try:
        return await act(store)
    finally:
        await store.close()


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65_535:
        raise argparse.ArgumentTypeError(f"{text} is no port from 0 to 65535")
    return value


def _limit(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal(-1)
    if not amount.is_finite() or amount < 0 or amount >= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of US dollars")
    return amount


def _caps() -> tuple[tuple[str, dict[str, Any]], ...]:
    told = "the most that requests with this key may cost"
    return tuple(
        (f"--{window}", {"type": _limit, "metavar": "USD", "help": f"{told}, {kind}"})
        for window, kind in (("daily", "a day"), ("weekly", "a week"), ("monthly", "a month"), ("total", "ever"))
    )


_DEFAULTS = Settings()

COMMANDS = (
    Command(
        "serve",
        _serve,
        "apprentice serve --port 8411",
        (
            ("--host", {"default": _DEFAULTS.host, "help": "default: %(default)s, which only this machine reaches"}),
            ("--port", {"type": _port, "default": PORT, "help": "default: %(default)s"}),
            ("--name", {"action": "append", "default": [], "metavar": "HOST", "help": "a host name that clients use"}),
            (
                "--origin",
                {"action": "append", "default": [], "metavar": "ORIGIN", "help": "web pages that may call it"},
            ),
            ("--workers", {"type": positive, "default": 1, "metavar": "N", "help": "processes; default: %(default)s"}),
            (
                "--parallel",
                {
                    "type": positive,
                    "default": _DEFAULTS.parallel,
                    "metavar": "N",
                    "help": "requests at once in a process; default: %(default)s",
                },
            ),
            (
                "--max-body",
                {
                    "type": positive,
                    "default": _DEFAULTS.max_body,
                    "metavar": "BYTES",
                    "help": "default: %(default)s",
                },
            ),
            (
                "--timeout",
                {
                    "type": above_zero,
                    "default": _DEFAULTS.timeout,
                    "metavar": "SECONDS",
                    "help": "for one answer; default: %(default)s",
                },
            ),
            (
                "--grace",
                {
                    "type": above_zero,
                    "default": _DEFAULTS.grace,
                    "metavar": "SECONDS",
                    "help": "for what is in flight when it is told to stop; default: %(default)s",
                },
            ),
            ("--log", {"action": "store_true", "help": "one line of JSON a request, on standard error"}),
            (
                "--i-trust-every-local-program",
                {"action": "store_true", "help": "ask for no key; on a loopback address only"},
            ),
        ),
    ),
    Command(
        "keys",
        _keys,
        "apprentice keys create billing --role call --daily 5",
        (
            ("action", {"choices": ("create", "list", "revoke")}),
            ("name", {"nargs": "?", "help": "of the key"}),
            (
                "--role",
                {
                    "action": "append",
                    "choices": keys.ROLES,
                    "help": "call: ask; feedback: correct; operate: see and change what serves; default: call",
                },
            ),
            *_caps(),
        ),
    ),
)
