"""The doors under attack: each fault by its number, over real sockets, and where memory and files count in a real process."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from apprentice import plugins
from apprentice.config import load
from apprentice.gateway import keys
from apprentice.gateway.app import OPERATIONS
from apprentice.gateway.desk import Operation
from apprentice.testing.servers import Reply, Server, serve_openai
from apprentice.types import Json, Store

from ..conftest import honest
from .conftest import Live, Serving, chat
from .test_serve import configure, free_port

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
MIB = 1024  # KiB, in which Linux counts memory


# --- a process of its own ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Process:
    """`apprentice serve` in a process of its own. `client` has a key with every role."""

    pid: int
    url: str
    client: httpx2.AsyncClient
    provider: Server
    folder: Path
    log: Path
    running: asyncio.subprocess.Process

    def memory(self, what: str = "VmRSS") -> int:
        """KiB that the process has in memory, or had at most (VmHWM) since the last `begin`."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))

    def begin(self) -> int:
        """What it has now; the most that it has is counted from here."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self.memory()

    def files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    async def opened(self) -> Store:
        store: Store = plugins.build("stores", "sqlite", path=load(self.folder / "apprentice.yaml").store.path)
        return store


@contextlib.asynccontextmanager
async def process(folder: Path, *options: str, files: int | None = None) -> AsyncIterator[Process]:
    """`files`: how many it may have open at first."""
    async with serve_openai(honest, price=(150_000, 600_000)) as provider:
        config = configure(folder, provider.url)
        store: Store = plugins.build("stores", "sqlite", path=load(config).store.path)
        secret = (await keys.create(store, "tests", frozenset(keys.ROLES), at=time.time())).secret
        await store.close()
        url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "apprentice.cli", "serve", "--config", str(config), "--port", str(port)]
        limit = [] if files is None else ["sh", "-c", f'ulimit -Sn {files} && exec "$@"', "sh"]
        log = folder / "log"
        with log.open("wb") as written:
            running = await asyncio.create_subprocess_exec(
                *limit, *command, *options, stderr=written, start_new_session=True
            )
        try:
            headers = {"authorization": f"Bearer {secret}"}
            async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
                async with asyncio.timeout(180):
                    while not await ready(client):
                        assert running.returncode is None, log.read_text()
                        await asyncio.sleep(0.05)
                yield Process(running.pid, url, client, provider, folder, log, running)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            await running.wait()


async def ready(client: httpx2.AsyncClient) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return (await client.get("/readyz")).status_code == 200
    return False


@pytest.fixture
def many_files() -> Iterator[int]:
    """As many files as this process may have; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def idle(url: str, number: int) -> Iterator[list[socket.socket]]:
    """So many connections on which nothing is ever sent."""
    place = ("127.0.0.1", int(url.rpartition(":")[2]))
    made: list[socket.socket] = []
    try:
        for _ in range(number):
            one = socket.socket()
            made.append(one)
            one.setblocking(False)
            one.connect_ex(place)
        yield made
    finally:
        for one in made:
            one.close()


# --- F105, F106: whose request it is ----------------------------------------------------------------------------------


def path_of(operation: Operation) -> str:
    return operation.path.replace("{name}", "sort").replace("{model:path}", "task:sort")


GUARDED = [operation for operation in OPERATIONS if operation.role is not None]


async def test_no_operation_answers_without_a_key_or_tells_what_there_is(serving: Serving) -> None:  # F105
    async with serving() as live, httpx2.AsyncClient(base_url=live.url, trust_env=False, timeout=60) as nobody:
        told = set()
        for operation in GUARDED:
            for name, key in (
                ("x-none", live.key),
                ("x-api-key", live.key[:-1]),
                ("authorization", f"bearer {live.key} ä"),
            ):
                headers = httpx2.Headers([(name.encode(), key.encode())])
                answer = await nobody.request(operation.method, path_of(operation), json={}, headers=headers)
                assert answer.status_code == 401, (operation.path, answer.text)
                error = answer.json()["error"]
                told.add(error["message"])
                assert answer.headers["www-authenticate"] == "Bearer"
                assert live.key[:-1] not in answer.text
        assert len(told) == 1
        assert live.provider.connections == 0


async def test_a_wrong_host_or_page_is_turned_away_at_every_operation_and_page(serving: Serving) -> None:  # F106
    paths = {(one.method, path_of(one)) for one in OPERATIONS} | {("GET", "/dashboard"), ("POST", "/dashboard/login")}
    evil = [({"host": "evil.example"}, 421), ({"host": "127.0.0.1.evil.example"}, 421), ({"host": "[::2]"}, 421)]
    evil += [({"host": "evil.example", "x-forwarded-host": "localhost", "forwarded": "host=localhost"}, 421)]
    evil += [({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": "file://"}, 403)]
    async with serving() as live:
        for method, path in sorted(paths):
            for headers, status in evil:
                answer = await live.client.request(method, path, headers=headers, json={})
                assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (status, None)
        whole = f"GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\nx-api-key: {live.key}\r\n"
        assert (await live.raw(f"{whole}Connection: close\r\n\r\n".encode())).split(b" ")[1] == b"400"
        twice = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nx-api-key: {live.key}\r\n"
        assert (await live.raw(f"{twice}Connection: close\r\n\r\n".encode())).split(b" ")[1] == b"400"
        assert live.provider.connections == 0


# --- F107: nothing in a request says where it goes --------------------------------------------------------------------

STEER: dict[str, Json] = {
    "base_url": "http://127.0.0.1:9/",
    "api_base": "http://127.0.0.1:9/",
    "api_key": "sk-1",
    "extra_headers": {"authorization": "Bearer sk-1"},
    "extra_body": {"base_url": "http://127.0.0.1:9/"},
    "user_config": {"model_list": []},
    "organization": "org-1",
    "proxy": "http://127.0.0.1:9/",
}
BODIES: dict[str, dict[str, Json]] = {
    CHAT: chat(),
    "/v1/messages": chat() | {"max_tokens": 9},
    "/v1/tasks/sort/run": {"input": {"text": "a pear"}},
    "/v1/tasks/sort/batch": {"inputs": [{"text": "a pear"}]},
    "/v1/feedback": {"request_id": "x", "metric_name": "approved", "value": True},
    "/v1/tasks/sort/promote": {"version": "v1"},
    "/v1/tasks/sort/rollback": {},
    "/v1/tasks/sort/mode": {"mode": "auto"},
    "/v1/erase": {"subject": "x"},
}


async def test_no_field_anywhere_says_where_a_request_goes_or_with_which_key(serving: Serving) -> None:  # F107
    assert set(BODIES) == {path_of(one) for one in OPERATIONS if one.takes is not None}
    async with serving() as live:
        for path, body in BODIES.items():
            for name, value in STEER.items():
                answer = await live.client.post(path, json=body | {name: value})
                assert (answer.status_code, name in answer.text) == (400, True), (path, answer.text)
        for name in ("http://127.0.0.1:9/v1", "openai/../x", "//x", "gpt-4o-mini@evil.example", "gpt-4o-mini#", "\\x"):
            for path in (CHAT, "/v1/messages"):
                answer = await live.client.post(path, json=BODIES[path] | {"model": name})
                assert answer.status_code in (400, 404), (name, answer.text)
        assert live.provider.connections == 0
        steered = {"x-base-url": "http://127.0.0.1:9", "openai-organization": "o", "x-forwarded-for": "1.2.3.4"}
        answer = await live.client.post(f"{CHAT}?base_url=http://127.0.0.1:9&api_key=k", json=chat(), headers=steered)
        assert (answer.status_code, len(live.provider.requests)) == (200, 1)
        seen = live.provider.requests[0]
        assert live.key not in json.dumps(seen.headers | {"body": seen.body, "path": seen.path})
        assert not set(steered) & set(seen.headers)


# --- F110: whatever the environment says ------------------------------------------------------------------------------


async def test_the_provider_is_asked_whatever_proxy_the_environment_names(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F110
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login someone password secret-canary")
    netrc.chmod(0o600)
    async with serve_openai([Reply({"kind": "fruit"})]) as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(netrc))
        monkeypatch.setenv("SSL_CERT_FILE", str(netrc))
        async with serving([Reply({"kind": "fruit"})]) as live:
            for model in ("task:sort", "gpt-4o-mini"):
                assert (await live.client.post(CHAT, json=chat() | {"model": model})).status_code == 200
            assert len(live.provider.requests) == 2
            assert "secret-canary" not in str(live.provider.requests) and "Basic" not in str(live.provider.requests)
        assert proxy.connections == 0


# --- F112: what a body may cost ---------------------------------------------------------------------------------------

LARGEST = 4 * 2**20


def filled(unit: str, head: str = '{"input": [', tail: str = "1]}") -> bytes:
    """A body of the largest size that is read, filled with one thing."""
    room = LARGEST - len(f"{head}{tail}".encode())
    return f"{head}{unit * (room // len(unit.encode()))}{tail}".encode()


GREEDY = {
    "members": ('{"input": {' + ",".join(f'"{number:x}":1' for number in range(420_000)) + "}}").encode(),
    "short members": filled('{"a":1},'),
    "numbers": filled("1.5,"),
    "texts": filled('"ab",'),
    "wide texts": filled('"\U0001f600a",'),
    "a wide text": filled("a", '{"input": {"text": "\U0001f600', '"}}'),
    "escapes": filled("\\u20ac", '{"input": {"text": "', '"}}'),
    "a deep value": b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number": b'{"input": ' + b"9" * (LARGEST - 12) + b"}",
    "messages": filled('{"role":"user","content":""},', '{"model": "task:sort", "messages": [', "1]}"),
}


async def endless() -> AsyncIterator[bytes]:
    for _ in range(1_024):
        yield b" " * 2**20


async def test_nothing_that_is_sent_takes_more_than_64_mib(tmp_path: Path) -> None:  # F112
    async with process(tmp_path) as server:
        for _ in range(5):
            assert (await server.client.post(CHAT, json=chat())).status_code == 200
        for name, body in GREEDY.items():
            assert len(body) <= LARGEST
            path = CHAT if name == "messages" else "/v1/tasks/sort/run"
            before = server.begin()
            answer = await server.client.post(path, content=body, headers=JSON)
            grown = server.memory("VmHWM") - before
            assert (answer.status_code in (400, 413), grown <= 64 * MIB) == (True, True), (
                name,
                grown,
                answer.text[:300],
            )
            assert len(answer.content) < 2_000
        before = server.begin()
        with contextlib.suppress(httpx2.TransportError):  # closed on us while we were still sending a gibibyte
            assert (await server.client.post(CHAT, content=endless(), headers=JSON)).status_code == 413
        bomb, packed = gzip.compress(b" " * (64 * 2**20)), JSON | {"content-encoding": "gzip"}
        assert (await server.client.post(CHAT, content=bomb, headers=packed)).status_code == 415
        assert server.memory("VmHWM") - before <= 64 * MIB
        assert (await server.client.post(CHAT, json=chat())).status_code == 200
        assert len(server.provider.requests) == 6


# --- F113: who sits there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1_500, pytest.param(5_000, marks=pytest.mark.slow)])
async def test_idle_connections_take_no_place_from_those_who_ask(
    tmp_path: Path, many_files: int, number: int
) -> None:  # F113
    async with process(tmp_path, files=1_024) as server:
        before = server.begin()
        with idle(server.url, min(number, many_files - 500)):
            for asked in range(10):
                async with httpx2.AsyncClient(
                    base_url=server.url, headers=server.client.headers, timeout=60, trust_env=False
                ) as client:
                    assert (await client.post(CHAT, json=chat(f"a pear {asked}"))).status_code == 200
            async with asyncio.timeout(60):
                while server.files() > 2_000 + 100:  # `connections`, and the files of the store
                    await asyncio.sleep(0.05)
        assert server.memory("VmHWM") - before <= 64 * MIB
        assert "Too many open files" not in server.log.read_text()


def long() -> Reply:
    """An answer that no buffer of a socket holds several times."""
    message = {"role": "assistant", "content": "x" * 2**20}
    usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    told = {"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini", "choices": [choice]}
    return Reply(raw=json.dumps(told | {"usage": usage}).encode())


async def test_who_never_takes_an_answer_keeps_no_place(serving: Serving) -> None:  # F113
    def answer(body: dict[str, Json]) -> Json | Reply:
        return long() if body["messages"][-1]["content"] == "much" else honest(body)

    async with serving(answer, patience=2.0, parallel=2) as live:
        host, port = live.url.removeprefix("http://").split(":")
        body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "much"}]})
        ask = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {live.key}\r\nContent-Type: application/json\r\n"
        ask += f"Content-Length: {len(body)}\r\n\r\n{body}"
        deaf = []
        for _ in range(4):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            one.connect((host, int(port)))
            one.sendall(ask.encode() * 30)
            deaf.append(one)
        try:
            async with asyncio.timeout(60):
                while live.door._busy < 2 or len(live.provider.requests) < 4:
                    await asyncio.sleep(0.01)
                while not await served(live):
                    await asyncio.sleep(0.05)
                while live.door._busy:
                    await asyncio.sleep(0.05)
            assert len(live.provider.requests) < 4 * 30  # what nobody takes is not asked for, either
        finally:
            for one in deaf:
                one.close()


async def served(live: Live) -> bool:
    """Whether one who comes anew is."""
    with contextlib.suppress(httpx2.TransportError):
        async with httpx2.AsyncClient(base_url=live.url, headers=live.client.headers, timeout=60) as client:
            answer = await client.post(CHAT, json=chat())
        assert answer.status_code in (200, 429), answer.text
        return answer.status_code == 200
    return False


# --- F115: told to stop while it works --------------------------------------------------------------------------------


@pytest.mark.slow
async def test_told_to_stop_under_load_each_request_is_answered_refused_or_never_taken(tmp_path: Path) -> None:  # F115
    statuses: list[int | None] = []
    async with process(tmp_path, "--grace", "20") as server:
        stopped = asyncio.Event()

        async def ask(number: int) -> None:
            async with httpx2.AsyncClient(
                base_url=server.url, headers=server.client.headers, timeout=60, trust_env=False
            ) as client:
                while not stopped.is_set():
                    try:
                        answer = await client.post(CHAT, json=chat(f"a pear {number} {len(statuses)}"))
                        statuses.append(answer.status_code)
                    except (httpx2.ConnectError, httpx2.RemoteProtocolError, httpx2.ReadError):
                        statuses.append(None)  # the port is closed, or the connection before anything was taken

        asking = [asyncio.create_task(ask(number)) for number in range(12)]
        async with asyncio.timeout(60):
            while statuses.count(200) < 24:
                await asyncio.sleep(0.01)
        server.running.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(server.running.wait(), 30) in (0, -signal.SIGTERM)
        stopped.set()
        await asyncio.gather(*asking)
        assert set(statuses) <= {200, 503, None}
        store = await server.opened()
        try:
            records = [record for _, record in await store.records("sort", limit=100_000)]
            assert {line.state for line in await store.spending()} == {"settled"}
            spent = (await store.spent(["total"]))["total"]
        finally:
            await store.close()
        assert len(records) == len(server.provider.requests) >= statuses.count(200) >= 24
        assert all(record.served == "remote" for record in records)
        assert server.provider.bill <= spent <= server.provider.bill + len(records)


# --- F118: what others write into our lines ---------------------------------------------------------------------------

EVIL = 'x"}\r\n{"level": "fatal"}\x1b[31m\u2028\x00'


async def test_no_text_from_outside_begins_a_line_or_colours_one(
    serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:  # F118
    error = {"error": {"message": EVIL, "code": EVIL, "type": EVIL, "param": EVIL}}
    replies = [Reply(status=400, raw=json.dumps(error).encode()), Reply({"kind": "fruit"}, model=EVIL), Reply(EVIL)]
    async with serving(replies, {"remote": {"retries": 0}}) as live:
        live.door._log = True
        answers: list[Any] = [await live.client.post(CHAT, json=chat() | {"model": "gpt-4o-mini"}) for _ in range(2)]
        answers += [await live.client.post(CHAT, json=chat("a pear", user=EVIL))]
        answers += [await live.client.post(CHAT, json=chat("a pear", metadata={EVIL: EVIL}))]
        answers += [
            await live.client.post("/v1/feedback", json={"request_id": EVIL, "metric_name": EVIL, "value": EVIL})
        ]
        answers += [await live.client.get("/v1/models/x%0A%7B%22level%22%3A%22fatal%22%7D%1b%5B31m%E2%80%A8")]
        found = [record for task in ("sort", "passthrough") for record in await live.records(task)]
        metrics = (await live.client.get("/metrics")).text
        lines = capsys.readouterr().err.splitlines()
    for answer in answers:
        if answer.status_code != 200:
            assert answer.json()["error"]["message"].isprintable(), answer.text
        assert all(value.isprintable() for value in answer.headers.values())
    assert {answer.status_code for answer in answers} <= {200, 400, 404, 502}
    for line in lines:
        assert isinstance(json.loads(line), dict) and line.isprintable(), line
    assert all(record.error is None or record.error.isprintable() for record in found)
    assert "fatal" not in metrics
