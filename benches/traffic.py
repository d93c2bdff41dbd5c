"""What `benches.gateway` measures with, each in a process of its own: an upstream, a load, and bare clients.

    python benches/traffic.py upstream PORT                     an OpenAI-compatible server that answers at once
    python benches/traffic.py load URL KEY MODEL WIDTH SECONDS  so many connections, each asks as soon as it is answered;
                                                                what they say: the lines of stdin in turn, or always the same
    python benches/traffic.py client KIND URL WIDTH SECONDS     a client library in this interpreter

The last two print one JSON object. Only the standard library is needed, and for `client` the library of that name (aiohttp,
httpx2, litellm), so that any interpreter that has one can be measured. The upstream's answer takes the milliseconds that
`GET /delay/MS` said last; `GET /calls` tells how many it was asked for.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import cycle
from statistics import median
from typing import Any

SAID = json.dumps({"kind": "fruit"})
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "bench",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": SAID, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 40, "completion_tokens": 8, "total_tokens": 48},
    }
).encode()
TEXT = "please look at the pear number 1"


def body(model: str, *, says: str = TEXT) -> bytes:
    """A request of the kind that every chat client sends."""
    return json.dumps({"model": model, "messages": [{"role": "user", "content": says}]}).encode()


def _whole(data: bytearray) -> tuple[bytes, bytes] | None:
    """The head and the body of the first message, which is taken out of the data; None while it is not all there."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(data[:end])
    place = head.lower().find(b"\r\ncontent-length:")
    size = 0 if place < 0 else int(head[place + 17 :].split(b"\r\n", 1)[0])
    if len(data) < end + 4 + size:
        return None
    rest = bytes(data[end + 4 : end + 4 + size])
    del data[: end + 4 + size]
    return head, rest


class Upstream(asyncio.Protocol):
    """One connection of the upstream."""

    calls = 0
    delay = 0.0

    def __init__(self) -> None:
        self._data = bytearray()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (found := _whole(self._data)) is not None:
            self._answer(found[0])

    def _answer(self, head: bytes) -> None:
        if head.startswith(b"POST"):
            Upstream.calls += 1
            if Upstream.delay:
                asyncio.get_running_loop().call_later(Upstream.delay, self._send, ANSWER)
            else:
                self._send(ANSWER)
            return
        path = head.split(b" ", 2)[1]
        if path.startswith(b"/delay/"):
            Upstream.delay = int(path.removeprefix(b"/delay/")) / 1000
        self._send(json.dumps({"calls": Upstream.calls}).encode())

    def _send(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (len(answer), answer)
            )


async def upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=2_048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class _Asking(asyncio.Protocol):
    """One connection of the load: it asks, waits for the whole answer, and asks again until it is over."""

    def __init__(self, requests: Iterator[bytes], until: float, took: list[float], bad: list[str]) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._requests, self._until, self._took, self._bad = requests, until, took, bad
        self._data = bytearray()
        self._transport: Any = None
        self._asked = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        request = next(self._requests)
        self._asked = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if (found := _whole(self._data)) is None:
            return
        now = time.perf_counter()
        if found[0].startswith(b"HTTP/1.1 200"):
            self._took.append(now - self._asked)
        else:
            self._bad.append(found[0].split(b"\r\n", 1)[0].decode() + " " + found[1].decode()[:200])
        if now < self._until:
            self._ask()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if time.perf_counter() < self._until:
            self._bad.append(f"the connection was closed: {error}")
        if not self.done.done():
            self.done.set_result(None)


async def load(url: str, key: str, model: str, width: int, seconds: float, says: list[str]) -> dict[str, Any]:
    """What so many connections had answered. Times in milliseconds."""
    host, path = url.removeprefix("http://").split("/", 1)
    head = (
        f"POST /{path.rstrip('/')}/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        "content-type: application/json\r\ncontent-length: "
    )
    bodies = [body(model, says=text) for text in says]
    requests = cycle([f"{head}{len(asked)}\r\n\r\n".encode() + asked for asked in bodies])
    took: list[float] = []
    bad: list[str] = []
    began = time.perf_counter()
    name, port = host.split(":")

    def asking() -> _Asking:
        return _Asking(requests, began + seconds, took, bad)

    connect = asyncio.get_running_loop().create_connection
    made = await asyncio.gather(*(connect(asking, name, int(port)) for _ in range(width)))
    await asyncio.wait([protocol.done for _, protocol in made], timeout=seconds + 60)
    return _told(took, time.perf_counter() - began) | {"bad": len(bad), "first_bad": bad[0] if bad else None}


def _told(took: list[float], seconds: float) -> dict[str, Any]:
    took.sort()
    return {
        "count": len(took),
        "seconds": seconds,
        "p50": median(took) * 1000 if took else float("nan"),
        "p99": took[int(len(took) * 0.99)] * 1000 if took else float("nan"),
    }


async def spin(ask: Callable[[], Awaitable[object]], width: int, seconds: float) -> dict[str, Any]:
    """`ask` again and again by so many at once, in this process: how often, how long, and its CPU in seconds."""
    took: list[float] = []

    async def one(until: float) -> None:
        while time.perf_counter() < until:
            before = time.perf_counter()
            await ask()
            took.append(time.perf_counter() - before)

    await asyncio.gather(*(one(time.perf_counter() + seconds / 4) for _ in range(width)))  # warm
    took.clear()
    used, began = os.times(), time.perf_counter()
    await asyncio.gather(*(one(began + seconds) for _ in range(width)))
    now = os.times()
    cpu = now.user + now.system - used.user - used.system
    return _told(took, time.perf_counter() - began) | {"cpu": cpu, "bad": 0}


async def client(kind: str, url: str, width: int, seconds: float) -> dict[str, Any]:
    """The cost of a call with a client library that does nothing else."""
    module: Any = importlib.import_module(kind)
    asked = body("bench")
    target = f"{url}/chat/completions"
    headers = {"content-type": "application/json", "authorization": "Bearer none"}
    if kind == "aiohttp":
        async with module.ClientSession(connector=module.TCPConnector(limit=width)) as session:

            async def with_aiohttp() -> None:
                async with session.post(target, data=asked, headers=headers) as answer:
                    json.loads(await answer.read())

            return await spin(with_aiohttp, width, seconds)
    if kind == "httpx2":
        async with module.AsyncClient(limits=module.Limits(max_connections=width), trust_env=False) as session:

            async def with_httpx() -> None:
                answer = await session.post(target, content=asked, headers=headers)
                json.loads(answer.content)

            return await spin(with_httpx, width, seconds)

    async def with_litellm() -> None:
        messages = [{"role": "user", "content": TEXT}]
        await module.acompletion(model="openai/bench", messages=messages, api_base=url, api_key="none")

    return await spin(with_litellm, width, seconds)


def main(words: list[str]) -> None:
    match words:
        case ["upstream", port]:
            asyncio.run(upstream(int(port)))
        case ["load", url, key, model, width, seconds]:
            says = sys.stdin.read().splitlines() or [TEXT]
            print(json.dumps(asyncio.run(load(url, key, model, int(width), float(seconds), says))))
        case ["client", kind, url, width, seconds]:
            print(json.dumps(asyncio.run(client(kind, url, int(width), float(seconds)))))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
