"""The ASGI application: every operation of the gateway, and whatever other doors hand in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from apprentice import observer, plugins
from apprentice.config import Config
from apprentice.dashboard.routes import routes as pages
from apprentice.engine import Apprentice
from apprentice.gateway import Settings, anthropic, health, keys, native, openai
from apprentice.gateway.desk import Call, Gateway, Operation
from apprentice.gateway.document import document
from apprentice.gateway.door import Door, family_of, of_routing, visit
from apprentice.types import Seconds, Store
from apprentice.worker import courier

OPERATIONS: tuple[Operation, ...] = (
    *openai.OPERATIONS,
    *anthropic.OPERATIONS,
    *native.OPERATIONS,
    *health.OPERATIONS,
)


def build(
    config: Config,
    settings: Settings | None = None,
    *,
    operations: Sequence[Operation] = (),
    routes: Sequence[BaseRoute] = (),
    seed: int | None = None,
    sessions: str | None = None,
    log: bool = False,
    clock: Callable[[], Seconds] = time.time,
) -> Door:
    """The application; the engine, the store and the remotes are opened and closed by its lifespan.

    `operations` are served, guarded and documented like our own. `routes` are only served: behind Host and Origin, but
    without a key, unless they look for one themselves; `request.app.state.gateway` is the Gateway. `sessions`
    signs those of the dashboard; processes on one port need the same. Raises ConfigError.
    """
    settings = settings or Settings()
    every = (*OPERATIONS, *operations)

    async def described(gateway: Gateway, call: Call) -> Response:
        return JSONResponse(document(gateway, every))

    every = (*every, Operation("GET", "/openapi.json", "any", described, "This document", gives=None))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with Apprentice(config, seed=seed, clock=clock) as engine:
            store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
            gateway = Gateway(config, settings, engine, store, clock=clock)
            gateway.meters.in_flight.set_function(lambda: door.busy)
            try:
                await gateway.open()
                app.state.gateway = door.gateway = gateway
                async with courier(config, store).at_work():
                    yield
            finally:
                gateway.ready = False
                await door.empty()  # what is being settled needs the store
                await gateway.close()

    async def routed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # it is registered for those
        return of_routing(error, request.scope).response(family_of(request.url.path), request.scope["apprentice"])

    inside = Starlette(
        routes=[
            *(Route(one.path, _endpoint(one), methods=[one.method]) for one in every),
            *pages(keys.known, secret=sessions),
            *routes,
        ],
        exception_handlers={HTTPException: routed},
        lifespan=lifespan,
    )
    watching = None if config.telemetry is None else observer.of(config.telemetry)
    door = Door(inside, settings, operations=every, watching=watching, log=log)
    return door


def _endpoint(operation: Operation) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        return await visit(request.app.state.gateway, operation, request.scope, request.receive, request.path_params)

    return endpoint
