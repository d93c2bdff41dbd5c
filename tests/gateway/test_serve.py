"""`apprentice serve` and `apprentice keys` as processes: signals, several workers, what is refused at the start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from apprentice import cli, plugins
from apprentice.gateway import Settings
from apprentice.gateway.server import listen
from apprentice.testing.servers import Reply, Server, serve_openai
from apprentice.types import Store

from ..conftest import YAML, honest
from .conftest import chat

CHAT = "/v1/chat/completions"


def configure(folder: Path, url: str) -> Path:
    path = folder / "apprentice.yaml"
    path.write_text(YAML.replace("BASE_URL", url).replace("local:", "local:\n  learn: 'off'"))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def process(config: Path, *options: str, key: str = "") -> AsyncIterator[tuple[Any, httpx2.AsyncClient]]:
    """`apprentice serve` in a process of its own, once it is ready, and a client for it."""
    port = free_port()
    command = [sys.executable, "-m", "apprentice.cli", "serve", "--config", str(config), "--port", str(port), *options]
    running = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, start_new_session=True)
    headers = {"authorization": f"Bearer {key}"}
    try:
        async with httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60, trust_env=False
        ) as client:
            async with asyncio.timeout(180):
                while True:
                    with contextlib.suppress(httpx2.TransportError):
                        if (await client.get("/readyz")).status_code == 200:
                            break
                    assert running.returncode is None, (await running.stderr.read()).decode()  # type: ignore[union-attr]
                    await asyncio.sleep(0.05)
            yield running, client
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)  # its workers with it
        await running.communicate()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    said = capsys.readouterr()
    return code, said.out, said.err


async def new_key(config: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    words = ("keys", "create", "tests", *options, "--config", str(config), "--json")
    code, out, _ = await asyncio.to_thread(run, capsys, *words)
    assert code == 0
    key: str = json.loads(out)["key"]
    return key


async def opened(folder: Path) -> Store:
    store: Store = plugins.build("stores", "sqlite", path=folder / ".apprentice" / "apprentice.db")
    return store


def test_keys_are_made_listed_and_revoked_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(configure(tmp_path, "http://127.0.0.1:9"))
    code, key, told = run(capsys, "keys", "create", "billing", "--daily", "5", "--config", config)
    assert code == 0 and re.fullmatch(r"apk-[\w-]{43}\n", key) and key.strip() not in told
    code, out, _ = run(capsys, "keys", "create", "ops", "--role", "operate", "--role", "feedback", "--config", config)
    assert code == 0
    code, out, _ = run(capsys, "keys", "list", "--config", config)
    assert re.search(r"billing: call, daily \$5, since", out) and "ops: feedback, operate" in out
    assert key.strip() not in out
    assert run(capsys, "keys", "create", "ops", "--config", config)[0] == 2
    assert run(capsys, "keys", "revoke", "billing", "--config", config)[0] == 0
    assert run(capsys, "keys", "revoke", "billing", "--config", config)[0] == 2
    assert run(capsys, "keys", "revoke", "--config", config)[0] == 2
    code, out, _ = run(capsys, "keys", "list", "--json", "--config", config)
    assert [one["name"] for one in json.loads(out)] == ["ops"]
    with pytest.raises(SystemExit):
        run(capsys, "keys", "create", "x", "--daily", "-1", "--config", config)


def test_what_cannot_be_served_is_said_before_anything_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(tmp_path, "http://127.0.0.1:9")
    trust = "--i-trust-every-local-program"
    code, _, told = run(capsys, "serve", "--host", "0.0.0.0", trust, "--config", str(config))
    assert code == 2 and "spend your money" in told
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, told = run(capsys, "serve", "--port", port, "--config", str(config))
        assert code == 2 and "cannot listen" in told
    config.write_text(config.read_text().replace("name: sort", "name: passthrough"))
    code, _, told = run(capsys, "serve", trust, "--config", str(config))
    assert code == 2 and "another name" in told


async def test_told_to_stop_it_finishes_what_is_in_flight_and_takes_nothing_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = asyncio.Event()
    async with serve_openai([Reply({"kind": "fruit"}, wait=gate)]) as provider:
        config = configure(tmp_path, provider.url)
        async with process(config, key=await new_key(config, capsys)) as (running, client):
            asked = [asyncio.create_task(client.post(CHAT, json=chat(f"a pear {n}"))) for n in range(5)]
            await seen(provider, 5)
            running.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                while True:
                    try:
                        answer = await client.get("/readyz")
                    except httpx2.TransportError:
                        break
                    assert answer.status_code in (200, 503)
            gate.set()
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers] == [200] * 5
            assert await asyncio.wait_for(running.wait(), 30) in (0, -signal.SIGTERM)
    store = await opened(tmp_path)
    try:
        assert len(await store.records("sort")) == 5
        assert {line.state for line in await store.spending()} == {"settled"}
    finally:
        await store.close()


async def seen(provider: Server, number: int) -> None:
    async with asyncio.timeout(60):
        while len(provider.requests) < number:
            await asyncio.sleep(0.01)


async def test_what_does_not_finish_within_the_grace_is_settled_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve_openai([Reply({"kind": "fruit"}, wait=asyncio.Event())]) as provider:
        config = configure(tmp_path, provider.url)
        key = await new_key(config, capsys, "--total", "1")
        async with process(config, "--grace", "1", key=key) as (running, client):
            asked = [
                asyncio.create_task(client.post(CHAT, json=chat() | {"model": model}))
                for model in ("task:sort", "gpt-4o-mini")
            ]
            await seen(provider, 2)
            running.send_signal(signal.SIGTERM)
            await asyncio.wait_for(running.wait(), 30)
            for task in asked:
                with contextlib.suppress(httpx2.TransportError):
                    assert (await task).status_code >= 500
    store = await opened(tmp_path)
    try:
        assert {line.state for line in await store.spending()} <= {"assumed", "settled"}
        records = [record for task in ("sort", "passthrough") for _, record in await store.records(task)]
        assert [(record.served, record.cost > 0) for record in records] == [(None, True)] * 2
        windows = [f"task:key:{one}/total" for one in await key_ids(store)]
        assert sum((await store.spent(windows)).values()) >= (await store.spent(["total"]))["total"] > 0
    finally:
        await store.close()


async def key_ids(store: Store) -> list[str]:
    return [event.evidence["id"] for event in await store.events(names=["KEY_CREATED"])]


async def test_no_part_of_an_answer_waits_for_an_acknowledgement_of_the_part_before() -> None:
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with listen(Settings(port=0)) as opened:
        async with await asyncio.start_server(connected, sock=opened):
            reader, writer = await asyncio.open_connection(*opened.getsockname())
            assert await told
            await reader.read()
            writer.close()


async def test_several_processes_serve_one_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serve_openai(honest) as provider:
        config = configure(tmp_path, provider.url)
        key = await new_key(config, capsys, "--role", "call", "--role", "operate")
        async with process(config, "--workers", "2", key=key) as (running, client):
            workers: set[str] = set()
            sent = 0
            async with asyncio.timeout(120):
                while len(workers) < 2:
                    # A new connection each time: the kernel deals them out.
                    async with httpx2.AsyncClient(
                        base_url=client.base_url, headers=client.headers, timeout=60
                    ) as fresh:
                        answer = await fresh.post(CHAT, json=chat(f"a pear {sent}"))
                        assert answer.status_code == 200, answer.text
                        sent += 1
                        text = (await fresh.get("/metrics")).text
                        workers |= set(re.findall(r'apprentice_http_in_flight\{worker="(\d+)"\}', text))
            assert f'apprentice_requests_total{{task="sort"}} {float(sent)}' in text
            assert str(os.getpid()) not in workers and str(running.pid) not in workers
            running.send_signal(signal.SIGTERM)
            await asyncio.wait_for(running.wait(), 60)
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(int(worker), 0)
    store = await opened(tmp_path)
    try:
        assert len(await store.records("sort")) == sent == len(provider.requests)
    finally:
        await store.close()
