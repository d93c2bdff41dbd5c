"""Runs the gateway: one process or several on one socket and one store, until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from pydantic import BaseModel
from uvicorn.supervisors import Multiprocess

from apprentice.config import Config, load
from apprentice.errors import ConfigError
from apprentice.gateway import Settings
from apprentice.gateway.app import build
from apprentice.gateway.door import Door
from apprentice.gateway.protocol import Patient

_QUEUE = 1_024  # connections that wait to be accepted, which is done in one go; five goes may pass until one is closed
_FILES = 256  # that a process needs besides its connections: the store, the remotes, the models
_VARIABLE = "APPRENTICE_GATEWAY"  # how a worker process learns what it serves, and with what it signs sessions


class Served(BaseModel):
    """What a worker process is told."""

    config: Path
    settings: Settings
    sessions: str
    log: bool


class Server(uvicorn.Server):
    """uvicorn, whose application refuses what comes after the signal to stop."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if isinstance(door := self.config.loaded_app, Door):
            door.closing = True
        super().handle_exit(sig, frame)


def server(app: Door | str, settings: Settings, *, workers: int = 1) -> Server:
    """A server of the application; its `run` or `serve` ends by SIGTERM or `should_exit`, after what is in flight."""
    most, queue = _room(settings.connections)
    protocol = type("Protocol", (Patient,), {"patience": settings.patience, "most": most})
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        workers=workers,
        factory=isinstance(app, str),
        loop="asyncio",
        http=protocol if not isinstance(app, str) else Patient,
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_level="critical",
        access_log=False,
        server_header=False,
        backlog=queue,
        proxy_headers=False,
        timeout_graceful_shutdown=int(settings.grace),
        timeout_worker_healthcheck=60,  # on a busy machine a worker takes seconds to begin, and is not to be replaced for it
    )
    return Server(config)


def _room(wanted: int) -> tuple[int, int]:
    """How many connections this process may have, and how many may wait, so that files are left for what else it does.

    Its limit of open files is raised as far as it may be; it is often 1,024. A process without a file to spare can
    neither accept nor ask anybody, and asyncio writes two thousand lines about it each second.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + 5 * _QUEUE + _FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted, _QUEUE
    soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= needed:
        return wanted, _QUEUE
    left = max(soft - _FILES, 32)
    return min(wanted, left // 2), min(_QUEUE, left // 16)


def listen(settings: Settings) -> socket.socket:
    """The socket, before any worker is started. Raises ConfigError when the address cannot be used."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # TCP by its name, or asyncio leaves Nagle's algorithm on, and the end of an answer waits 40 ms for an acknowledgement.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((settings.host, settings.port))
        opened.listen(_QUEUE)
    except OSError as error:
        opened.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", hint="another --port or --host"
        ) from error
    opened.set_inheritable(True)
    return opened


def serve(
    config: Config,
    settings: Settings,
    *,
    source: Path,
    workers: int = 1,
    log: bool = False,
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT. `source`: the configuration's file, which each worker reads.

    `heard` is called when the port is ours: whoever connects from then on is answered.

    Raises ConfigError and StoreError before anything is served.
    """
    asyncio.run(_opens(config, settings))
    with listen(settings) as opened:
        heard()
        if workers == 1:
            _calm()
            server(build(config, settings, log=log), settings).run(sockets=[opened])
            return
        told = Served(config=source.absolute(), settings=settings, sessions=secrets.token_urlsafe(32), log=log)
        os.environ[_VARIABLE] = told.model_dump_json()
        running = server(f"{__name__}:from_environment", settings, workers=workers)
        Multiprocess(running.config, sockets=[opened]).run()


async def _opens(config: Config, settings: Settings) -> None:
    """Open and close it once: what is wrong is raised here, and not in worker processes again and again."""
    inside = build(config, settings).inside
    async with inside.router.lifespan_context(inside):
        pass


def from_environment() -> Door:
    """The application of a worker process."""
    told = Served.model_validate_json(os.environ[_VARIABLE])
    Patient.patience, Patient.most = told.settings.patience, _room(told.settings.connections)[0]
    _calm()
    return build(load(told.config), told.settings, sessions=told.sessions, log=told.log)


def _calm() -> None:
    """Fewer, shorter pauses: what is loaded at the start stays, and most objects of a request die young."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
