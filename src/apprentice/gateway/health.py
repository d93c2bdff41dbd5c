"""Whether the gateway lives and serves, and its numbers for Prometheus."""

from __future__ import annotations

import asyncio
import time

from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse, Response

from apprentice.errors import StoreError
from apprentice.gateway.desk import Call, Gateway, Operation
from apprentice.gateway.refusals import Refusal
from apprentice.report import status
from apprentice.types import Seconds

_SOON: Seconds = 5.0  # within which a store that is all right answers


class Alive(BaseModel):
    alive: bool


class Ready(BaseModel):
    ready: bool


async def healthz(gateway: Gateway, call: Call) -> Response:
    return JSONResponse({"alive": True})


async def readyz(gateway: Gateway, call: Call) -> Response:
    try:
        async with asyncio.timeout(_SOON):
            if gateway.ready:
                await gateway.store.count(gateway.config.tasks[0].name)
                return JSONResponse({"ready": True})
    except (StoreError, TimeoutError) as error:
        raise Refusal(503, "not_ready", "the store does not answer", wait=1.0, retryable=True) from error
    raise Refusal(503, "not_ready", "the gateway is starting or stopping", wait=1.0, retryable=True)


async def metrics(gateway: Gateway, call: Call) -> Response:
    known = await status(gateway.config, gateway.store, now=time.time())
    return PlainTextResponse(gateway.meters.text(known), media_type="text/plain; version=0.0.4; charset=utf-8")


OPERATIONS = (
    Operation("GET", "/healthz", None, healthz, "The process lives", gives=Alive),
    Operation("GET", "/readyz", None, readyz, "It serves", gives=Ready),
    Operation("GET", "/metrics", "operate", metrics, "Numbers for Prometheus", media="text/plain"),
)
