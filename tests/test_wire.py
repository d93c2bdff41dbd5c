"""The one HTTP boundary over real sockets: what became of an attempt, whatever server, network and names do."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
import ssl
import struct
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apprentice import wire
from apprentice.connection import Careful
from apprentice.errors import ConfigError
from apprentice.models._httptools import Reader
from apprentice.testing.servers import Reply, Server, serve_openai
from apprentice.types import Json

KEY = "sk-CANARY-0815-do-not-leak"
OK = b'{"choices": []}'

# A key and two certificates for `localhost`, made for these tests and trusted nowhere: valid until 2120, and expired in
# 2021.
PRIVATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQglJ/dM3SCax/tYB7u
OIp2o14XWZefRVc6eGl7YPBg/kChRANCAAQ03x9HiwHvr3Px45x7s0Rc9MYw28OE
Vkr6ZCbHOtD/Q8F7zuMnIWB5sR+zNjQThl3w3wC9jUmTbIKF5OURwXhz
-----END PRIVATE KEY-----
"""
VALID = """\
-----BEGIN CERTIFICATE-----
MIIBYjCCAQegAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABDTfH0eLAe+vc/Hj
nHuzRFz0xjDbw4RWSvpkJsc60P9DwXvO4ychYHmxH7M2NBOGXfDfAL2NSZNsgoXk
5RHBeHOjSDBGMBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAPBgNVHRMBAf8EBTADAQH/
MB0GA1UdDgQWBBTX1BA8EcSXn7wkbyibcL/D0QUo+DAKBggqhkjOPQQDAgNJADBG
AiEA2SXiioWTFSIwdnySG1qS+EDhyOXmLsvdhkKpnIJ5EM4CIQDKJYFlIpRAOBMF
ymWyzdzDkeTttxhXU6XPWtjH7IKnHA==
-----END CERTIFICATE-----
"""
EXPIRED = """\
-----BEGIN CERTIFICATE-----
MIIBXjCCAQWgAwIBAgIBAjAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwHhcNMjAwMTAxMDAwMDAwWhcNMjEwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAls
b2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ03x9HiwHvr3Px45x7
s0Rc9MYw28OEVkr6ZCbHOtD/Q8F7zuMnIWB5sR+zNjQThl3w3wC9jUmTbIKF5OUR
wXhzo0gwRjAUBgNVHREEDTALgglsb2NhbGhvc3QwDwYDVR0TAQH/BAUwAwEB/zAd
BgNVHQ4EFgQU19QQPBHEl5+8JG8om3C/w9EFKPgwCgYIKoZIzj0EAwIDRwAwRAIg
JdVorNaaC459fr9bzqO/GRA5iePjQ3LDqvrcv95/GOUCIHLc0Ho1qTUVM4WKl/f4
8Uz5n+JegG1L0QvTecVb5Bvs
-----END CERTIFICATE-----
"""


# --- over sockets -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[Careful, Reader], ids=["h11", "httptools"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[wire.Client]:
    made = wire.client(allow_internal=True, reader=request.param)
    yield made
    await made.close()


ASK = b'{"messages": [], "max_tokens": 9}'


def request(url: str, timeout: float = 5.0, body: bytes = ASK, **more: Any) -> wire.Request:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    return wire.Request(f"{url}/chat/completions", headers, body, timeout, KEY, **more)


@contextlib.asynccontextmanager
async def raw(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server that does what it is told with each connection; yields its port."""
    tasks: set[asyncio.Task[Any]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def reset(writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def test_an_answer_comes_back_as_it_was_sent(client: wire.Client) -> None:
    async with serve_openai([Reply(raw=OK)]) as server:
        outcome = await wire.send(client, request(server.url))
    assert (outcome.kind, outcome.status, outcome.body) == ("answered", 200, {"choices": []})


async def test_a_file_of_lines_is_read_whole_or_not_at_all(client: wire.Client) -> None:
    for raw_body, lines in (
        (b'{"a": 1}\n\n{"b": "\xe2\x80\xa8"}\r\n', ({"a": 1}, {"b": "\u2028"})),
        (b"", ()),
        (b'{"a": 1}\n{"b"', None),
        (b'{"a": 1}\n[]', None),
    ):
        async with serve_openai([Reply(raw=raw_body)]) as server:
            outcome = await wire.send(client, request(server.url, lines=True))
        assert (outcome.kind, outcome.lines) == ("unknown" if lines is None else "answered", lines)
    async with serve_openai([Reply(status=404, code="not_found")]) as server:
        outcome = await wire.send(client, request(server.url, lines=True))
        assert (outcome.kind, outcome.status) == ("rejected", 404)


async def test_a_file_is_sent_as_it_is_and_never_held_whole(client: wire.Client, tmp_path: Path) -> None:
    size, got = 64 * 2**20, [0, 0]
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        got[0] = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        while got[1] < got[0]:
            got[1] += len(await reader.read(2**18))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()

    async with raw(talk) as port:
        tracemalloc.start()
        try:
            outcome = await wire.send(client, request(f"http://127.0.0.1:{port}", 60, b"", file=tmp_path / "large"))
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (outcome.kind, got) == ("answered", [size, size])
    assert most < size / 4


async def test_a_file_that_cannot_be_read_was_not_sent(client: wire.Client, tmp_path: Path) -> None:
    async with serve_openai([Reply(raw=OK)]) as server:
        outcome = await wire.send(client, request(server.url, body=b"", file=tmp_path / "nothing"))
        assert (outcome.kind, outcome.problem, server.requests) == ("not_sent", "FileNotFoundError", [])


async def test_a_file_that_becomes_shorter_while_it_is_sent_is_no_success(client: wire.Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(64 * 2**20)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        path.write_bytes(b"")
        while await reader.read(2**18):
            pass

    async with raw(talk) as port:
        outcome = await wire.send(client, request(f"http://127.0.0.1:{port}", 60, b"", file=path))
    assert (outcome.kind, outcome.problem) == ("unknown", "the file became shorter while it was sent")


@contextlib.asynccontextmanager
async def saying(*chunks: bytes | asyncio.Event, ends: bool = True) -> AsyncIterator[str]:
    """A server that sends these chunks of one answer, each after the events before it."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for chunk in chunks:
            if isinstance(chunk, asyncio.Event):
                await chunk.wait()
                continue
            writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await writer.drain()
        if ends:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        else:
            await asyncio.Event().wait()

    async with raw(talk) as port:
        yield f"http://127.0.0.1:{port}"


async def test_lines_are_told_as_they_come_and_the_last_one_is_the_answer(client: wire.Client) -> None:
    heard: list[bytes] = []
    first, second = asyncio.Event(), asyncio.Event()

    def tell(line: bytes) -> None:
        heard.append(line)
        (first if len(heard) == 1 else second).set()  # the server goes on only when it was heard

    chunks = (b'{"a"', b": 1}\n", first, b'{"b": 2}\r\n\n{"c": 3}\n{"d', second, b'": 4}')
    async with saying(*chunks) as url:
        outcome = await wire.send(client, request(url, body=b"", tell=tell))
    assert heard == [b'{"a": 1}', b'{"b": 2}\r', b'{"c": 3}', b'{"d": 4}']
    assert (outcome.kind, outcome.body) == ("answered", {"d": 4})


async def test_each_line_puts_the_deadline_off_and_silence_ends_it(client: wire.Client) -> None:
    heard: list[bytes] = []
    waits = [asyncio.Event() for _ in range(12)]

    def tell(line: bytes) -> None:
        heard.append(line)
        asyncio.get_running_loop().call_later(0.25, waits[len(heard) - 1].set)

    chunks = [part for wait in waits for part in (b'{"a": 1}\n', wait)]
    async with saying(*chunks) as url:  # three seconds in all
        assert (await wire.send(client, request(url, timeout=2.0, body=b"", tell=tell))).kind == "answered"
    assert len(heard) == 12
    async with saying(b'{"a": 1}\n', ends=False) as url:
        outcome = await wire.send(client, request(url, timeout=0.2, body=b"", tell=lambda _: None))
    assert (outcome.kind, outcome.problem) == ("unknown", "no answer within 0.2 s")


async def test_told_lines_hold_no_key_and_need_no_room(client: wire.Client) -> None:
    heard: list[bytes] = []
    lines = [b'{"key": "%b", "n": %d}\n' % (KEY.encode(), n) for n in range(200)]
    async with saying(*lines) as url:
        outcome = await wire.send(client, request(url, body=b"", tell=heard.append, limit=100))
    assert (outcome.kind, outcome.body) == ("answered", {"key": "[key]", "n": 199})
    assert len(heard) == 200
    assert not any(KEY.encode() in line for line in heard)
    async with saying(b'{"a": "' + b"x" * 200) as url:
        outcome = await wire.send(client, request(url, body=b"", tell=heard.append, limit=100))
    assert (outcome.kind, len(heard)) == ("unknown", 200)


async def test_a_failures_lines_are_not_told(client: wire.Client) -> None:
    async with serve_openai([Reply(status=404, code="not_found")]) as server:
        heard: list[bytes] = []
        outcome = await wire.send(client, request(server.url, tell=heard.append))
    assert (outcome.status, outcome.body is None, heard) == (404, False, [])


async def test_a_get_carries_no_body(client: wire.Client) -> None:
    async with serve_openai([Reply(raw=OK)]) as server:
        asked = request(server.url, body=b"", method="GET")._replace(url=f"{server.url}/batches")
        outcome = await wire.send(client, asked)
        assert (outcome.kind, outcome.body and outcome.body["data"]) == ("answered", [])
        [seen] = server.requests
        assert (seen.path, seen.body) == ("/v1/batches", {})
        assert "content-length" not in seen.headers


async def test_connections_are_used_again(client: wire.Client) -> None:
    async with serve_openai([Reply(raw=OK)]) as server:
        for _ in range(5):
            await wire.send(client, request(server.url))
        assert (server.connections, len(server.requests)) == (1, 5)


async def test_a_connection_that_the_server_closed_is_not_used_again(client: wire.Client) -> None:
    async with serve_openai([Reply(raw=OK, length=len(OK))]) as server:  # closes after each answer
        for _ in range(5):
            assert (await wire.send(client, request(server.url))).kind == "answered"
            await asyncio.sleep(0.01)
        assert server.connections == 5


async def test_an_answer_that_comes_after_the_client_was_closed_leaves_no_connection_open(client: wire.Client) -> None:
    asked, go_on, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        asked.set()
        await go_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(OK), OK))
        with contextlib.suppress(ConnectionError):
            while await reader.read(100):
                pass
        closed.set()

    async with raw(late) as port:
        asking = asyncio.create_task(wire.send(client, request(f"http://127.0.0.1:{port}", body=b"{}")))
        await asked.wait()
        await client.close()
        go_on.set()
        assert (await asking).kind == "answered"
        await asyncio.wait_for(closed.wait(), 30)


async def test_the_total_deadline_holds_before_the_head_and_within_the_body(client: wire.Client) -> None:  # F58
    for reply in (Reply(raw=OK, wait=60.0), Reply(raw=OK, drip=0.05)):
        async with serve_openai([reply]) as server:
            async with asyncio.timeout(2):
                outcome = await wire.send(client, request(server.url, timeout=0.2))
        assert (outcome.kind, outcome.retryable) == ("unknown", True)


@pytest.fixture
async def held() -> AsyncIterator[tuple[Server, asyncio.Event, asyncio.Event]]:
    """A server that holds its first answer back, an event for the arrival, and one that lets the answer go."""
    arrived, go = asyncio.Event(), asyncio.Event()

    async def answer(_: dict[str, Json]) -> Reply:
        if arrived.is_set():
            return Reply(raw=b'{"second": 2}')
        arrived.set()
        await go.wait()
        return Reply(raw=b'{"first": 1}')

    async with serve_openai(answer) as server:
        yield server, arrived, go


async def test_a_request_that_waited_for_a_connection_in_vain_was_not_sent(held: Any) -> None:
    server, arrived, go = held
    client = wire.client(allow_internal=True, connections=1)
    first = asyncio.ensure_future(wire.send(client, request(server.url)))
    await arrived.wait()
    assert (await wire.send(client, request(server.url, timeout=0.1))).kind == "not_sent"
    go.set()
    assert (await first).body == {"first": 1}
    assert len(server.requests) == 1
    await client.close()


async def test_a_cancelled_attempts_connection_is_not_used_again(held: Any, client: wire.Client) -> None:
    server, arrived, go = held
    attempt = asyncio.ensure_future(wire.send(client, request(server.url)))
    await arrived.wait()
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    go.set()
    assert (await wire.send(client, request(server.url))).body == {"second": 2}
    assert server.connections == 2


async def test_a_reset_before_the_request_is_not_sent_and_later_unknown(client: wire.Client) -> None:  # F60
    async def at_once(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reset(writer)

    async def within(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1024)
        reset(writer)

    async def after(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        reset(writer)

    async with serve_openai([Reply(raw=OK)]) as server:
        pass
    assert (await wire.send(client, request(server.url))).kind == "not_sent"
    for talk, body in ((within, b" " * 8_000_000), (after, b"{}")):
        async with raw(talk) as port:
            assert (await wire.send(client, request(f"http://127.0.0.1:{port}", body=body))).kind == "unknown"
    async with raw(at_once) as port:  # accepted first: the request may have left before the reset arrived
        assert (await wire.send(client, request(f"http://127.0.0.1:{port}"))).kind in ("not_sent", "unknown")


async def test_an_answer_cut_at_any_byte_is_never_answered(client: wire.Client) -> None:
    async with serve_openai([Reply(raw=OK)]) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(ASK)
        writer.write(head + ASK)
        whole = len(await reader.readuntil(OK))
        writer.close()
    async with serve_openai([Reply(raw=OK, cut=cut) for cut in range(whole)]) as server:
        for cut in range(whole):
            assert (await wire.send(client, request(server.url))).kind == "unknown", cut


async def test_a_wrong_length_is_unknown(client: wire.Client) -> None:  # F53
    for length in (len(OK) - 3, len(OK) + 3):
        async with serve_openai([Reply(raw=OK, length=length)]) as server:
            assert (await wire.send(client, request(server.url))).kind == "unknown"
    async with serve_openai([Reply(raw=b"zz\r\n" + OK, headers={"transfer-encoding": "chunked"})]) as server:
        assert (await wire.send(client, request(server.url))).kind == "unknown"


async def test_an_answer_over_the_limit_is_cut_off(client: wire.Client) -> None:  # F53
    bomb = gzip.compress(bytes(64 * 2**20))
    assert len(bomb) < 100_000
    for reply in (Reply(raw=b" " * 300_000), Reply(raw=bomb, headers={"content-encoding": "gzip"})):
        async with serve_openai([reply]) as server:
            outcome = await wire.send(client, request(server.url, limit=100_000))
        assert (outcome.kind, outcome.problem) == ("unknown", "the answer is larger than 100000 bytes")


async def test_chunks_without_an_end_are_cut_off(client: wire.Client) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
            await writer.drain()

    async with raw(endless) as port:
        outcome = await wire.send(client, request(f"http://127.0.0.1:{port}", limit=1_000_000))
    assert outcome.problem == "the answer is larger than 1000000 bytes"


async def test_a_compression_that_nobody_asked_for_is_undone(client: wire.Client) -> None:
    async with serve_openai([Reply(raw=gzip.compress(OK), headers={"content-encoding": "gzip"})]) as server:
        assert (await wire.send(client, request(server.url))).body == {"choices": []}
        assert server.requests[0].headers["accept-encoding"] == "identity"
    async with serve_openai([Reply(raw=OK, headers={"content-encoding": "gzip"})]) as server:
        assert (await wire.send(client, request(server.url))).kind == "unknown"


async def test_a_stream_is_bounded_by_deadline_and_size_like_any_answer(client: wire.Client) -> None:  # F53, F58
    stream = {"content-type": "text/event-stream"}
    body = b'data: {"choices": []}\n\ndata: [DONE]\n\n'
    async with serve_openai([Reply(raw=body, headers=stream)]) as server:
        assert (await wire.send(client, request(server.url))).events == ({"choices": []}, "[DONE]")
        outcome = await wire.send(client, request(server.url, limit=len(body) - 1))
        assert (outcome.kind, outcome.problem) == ("unknown", f"the answer is larger than {len(body) - 1} bytes")
    async with serve_openai([Reply(raw=body, headers=stream, drip=0.05)]) as server:
        assert (await wire.send(client, request(server.url, timeout=0.2))).kind == "unknown"


async def test_a_stream_cut_by_its_connection_is_unknown(client: wire.Client) -> None:
    chunk = b'data: {"choices": []}\n\n'
    body = b"%x\r\n%b\r\n" % (len(chunk), chunk)
    headers = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
    replies = [Reply(raw=body[:cut], headers=headers) for cut in range(len(body) + 1)]
    async with serve_openai(replies) as server:
        for _ in replies:
            assert (await wire.send(client, request(server.url))).kind == "unknown"


async def test_what_a_server_says_unasked_is_never_taken_for_an_answer(client: wire.Client) -> None:
    """Neither after an answer, nor while the connection waits for its next request."""
    forged = b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n" + OK.replace(b"choices", b"forgery")
    connections = 0
    closed = asyncio.Event()

    def talk(at_once: bool) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await reader.readuntil(b"}")
            answer = b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n" + OK
            writer.write(answer + forged if at_once else answer)
            await writer.drain()
            if not at_once:
                await arrived.wait()
                writer.write(forged)
                await writer.drain()
            while await reader.read(100):
                pass
            closed.set()

        return said

    for at_once in (True, False):
        connections, arrived = 0, asyncio.Event()
        closed.clear()
        async with raw(talk(at_once)) as port:
            assert (await wire.send(client, request(f"http://127.0.0.1:{port}", body=b"{}"))).body == {"choices": []}
            arrived.set()
            await asyncio.wait_for(closed.wait(), 30)
            assert (await wire.send(client, request(f"http://127.0.0.1:{port}", body=b"{}"))).body == {"choices": []}
        assert connections == 2


async def test_a_server_that_answers_before_it_has_the_whole_file_is_heard(client: wire.Client, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(32 * 2**20))

    async def enough(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"error": {"message": "too large"}}'
        writer.write(b"HTTP/1.1 413 Large\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        while await reader.read(2**20):
            pass

    async with raw(enough) as port:
        outcome = await wire.send(client, request(f"http://127.0.0.1:{port}", 60, b"", file=tmp_path / "large"))
    assert (outcome.kind, outcome.status) == ("rejected", 413)


async def test_a_connection_on_which_a_request_is_still_leaving_has_no_other_one(client: wire.Client) -> None:
    """A server that turned the first request away unread would never come to the second one."""

    async def unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        large = b"content-length: 2\r\n" not in head
        status, body = (b"429 Wait", b'{"error": {}}') if large else (b"200 OK", OK)
        writer.write(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))
        await asyncio.Event().wait()

    async with raw(unread) as port:
        url = f"http://127.0.0.1:{port}"
        assert (await wire.send(client, request(url, body=bytes(32 * 2**20)))).kind == "rejected"
        assert (await wire.send(client, request(url, body=b"{}"))).kind == "answered"


async def test_a_redirect_is_not_followed(client: wire.Client) -> None:
    async with serve_openai([Reply(raw=OK)]) as target:
        for status in (301, 302, 303, 307, 308):
            elsewhere = Reply(status=status, headers={"location": f"{target.url}/chat/completions"}, raw=b"")
            async with serve_openai([elsewhere]) as server:
                outcome = await wire.send(client, request(server.url))
            assert (outcome.kind, outcome.retryable) == ("rejected", False)
        assert target.connections == 0


async def test_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # F110
    async with serve_openai([Reply(raw=OK)]) as proxy, serve_openai([Reply(raw=OK)]) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login someone password secret")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        client = wire.client(allow_internal=True)
        assert (await wire.send(client, request(server.url))).kind == "answered"
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        assert proxy.connections == 0
        await client.close()


# --- TLS --------------------------------------------------------------------------------------------------------------


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"}")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n" + OK)
    await writer.drain()


def context(folder: Path, certificate: str) -> ssl.SSLContext:
    (folder / "key.pem").write_text(PRIVATE)
    (folder / "cert.pem").write_text(certificate)
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return made


@pytest.mark.parametrize(
    ("host", "certificate", "trusted", "kind"),
    [
        ("localhost", VALID, True, "answered"),
        ("localhost", VALID, False, "not_sent"),  # self-signed
        ("localhost", EXPIRED, True, "not_sent"),
        ("127.0.0.1", VALID, True, "not_sent"),  # another host than the certificate says
    ],
)
async def test_a_certificate_that_does_not_fit_ends_the_attempt(
    host: str, certificate: str, trusted: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F57
    tls = context(tmp_path, certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))  # has no effect
    if trusted:
        trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        monkeypatch.setattr("httpx2.create_ssl_context", lambda **_: trust)
    client = wire.client(allow_internal=True)
    async with raw(hello, tls) as port:
        outcome = await wire.send(client, request(f"https://{host}:{port}", body=b"{}"))
    await client.close()
    assert (outcome.kind, outcome.retryable) == (kind, False)


# --- addresses --------------------------------------------------------------------------------------------------------

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
INTERNAL = [
    "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1", "::1",
    "fc00::1", "fd12::1", "fec0::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
    "2002:7f00:1::1", "2002:c0a8:1::", "192.0.2.1", "198.18.0.1",
]  # fmt: skip
NEVER = [
    "0.0.0.0", "::", "169.254.169.254", "fe80::1", "fe80::1%eth0", "224.0.0.1", "ff02::1", "255.255.255.255",
    "240.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "100.100.100.200", "fd00:ec2::254",
    "2002:a9fe:a9fe::1", "::ffff:0.0.0.0",
]  # fmt: skip


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("address", PUBLIC + INTERNAL + NEVER)
def test_an_address_is_judged_by_where_its_packets_go(address: str, allow: bool) -> None:
    if address in PUBLIC or (allow and address in INTERNAL):
        wire.check_address(address, allow_internal=allow)
    else:
        with pytest.raises(wire.Blocked):
            wire.check_address(address, allow_internal=allow)


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.1", "0x7f000001", "2130706433", "0", "0177.0.0.1", "[::1]", "[::]"]
)
async def test_an_internal_address_is_refused_in_every_spelling(host: str) -> None:  # F108
    client = wire.client()
    async with serve_openai([Reply(raw=OK)]) as server:
        port = server.url.split(":")[2]
        outcome = await wire.send(client, request(f"http://{host}:{port}"))
        assert (outcome.kind, outcome.retryable) == ("not_sent", False), outcome
        assert server.connections == 0
    await client.close()


@pytest.mark.parametrize(
    "host",
    [
        "localhost.", "127.0.0.1.", "127.0.1", "0x7f.1", "0X7F000001", "017700000001", "00.0.0.0", "127.0.0.1%2e",
        "%31%32%37.0.0.1", "LOCALHOST", "[::ffff:127.0.0.1]", "[::FFFF:7F00:1]", "[0:0:0:0:0:0:0:1]", "[::127.0.0.1]",
        "[64:ff9b::7f00:1]", "[fe80::1%25lo]", "127.0.0.1:80@127.0.0.1", "metadata.google.internal",
    ],
)  # fmt: skip
async def test_no_disguise_of_an_internal_address_is_connected_to(host: str) -> None:  # F108
    client = wire.client()
    async with serve_openai([Reply(raw=OK)]) as server:
        outcome = await wire.send(client, request(f"http://{host}:{place(server)}", timeout=2.0))
        assert outcome.kind == "not_sent", outcome
        assert server.connections == 0
    await client.close()


type Resolver = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, list[list[str]]], list[str]]]:
    """What names resolve to, look-up by look-up, and a log of the look-ups."""
    table: dict[str, list[list[str]]] = {}
    asked: list[str] = []
    real: Resolver = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **more: Any) -> list[tuple[Any, ...]]:
        if host not in table:
            return real(host, port, *rest, **more)
        asked.append(host)
        answers = table[host].pop(0) if len(table[host]) > 1 else table[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield table, asked


async def test_a_name_that_also_points_inside_is_refused(names: Any) -> None:  # F109
    table, _ = names
    client = wire.client()
    async with serve_openai([Reply(raw=OK)]) as server:
        port = server.url.split(":")[2]
        for answers in (["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["127.0.0.1"]):
            table["api.example.com"] = [answers]
            outcome = await wire.send(client, request(f"http://api.example.com:{port}"))
            assert (outcome.kind, outcome.retryable) == ("not_sent", False)
        assert server.connections == 0
    await client.close()


async def test_the_address_that_was_checked_is_the_one_connected_to(names: Any, client: wire.Client) -> None:  # F109
    table, asked = names
    async with serve_openai([Reply(raw=OK)]) as server:
        table["api.example.com"] = [["127.0.0.1"], ["169.254.169.254"]]
        port = server.url.split(":")[2]
        assert (await wire.send(client, request(f"http://api.example.com:{port}"))).kind == "answered"
        assert server.requests[0].headers["host"].startswith("api.example.com:")
    assert asked == ["api.example.com"]


async def test_the_next_address_is_tried_when_one_does_not_answer(names: Any, client: wire.Client) -> None:
    table, _ = names
    async with serve_openai([Reply(raw=OK)]) as server:
        table["api.example.com"] = [["127.0.0.2", "127.0.0.1"]]
        port = server.url.split(":")[2]
        assert (await wire.send(client, request(f"http://api.example.com:{port}"))).kind == "answered"


async def test_a_name_that_does_not_resolve_in_time_or_at_all_was_not_sent(
    monkeypatch: pytest.MonkeyPatch, client: wire.Client
) -> None:  # F59
    over = threading.Event()

    def slow(*_: Any, **__: Any) -> Any:
        over.wait(20)
        raise socket.gaierror(-2, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert (await wire.send(client, request("http://api.example.com", timeout=0.1))).kind == "not_sent"
    over.set()
    outcome = await wire.send(client, request("http://api.example.com"))
    assert (outcome.kind, outcome.retryable) == ("not_sent", True)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(socket.EAI_NONAME, id="NXDOMAIN"),
        pytest.param(socket.EAI_NODATA, id="no address"),
        pytest.param(socket.EAI_AGAIN, id="SERVFAIL"),
        pytest.param(socket.EAI_FAIL, id="a server that refuses for good"),
    ],
)
async def test_whatever_a_name_server_says_instead_of_an_address_the_request_was_not_sent(
    monkeypatch: pytest.MonkeyPatch, client: wire.Client, code: int
) -> None:  # F59
    def refuse(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(code, "from the name server")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    outcome = await wire.send(client, request("http://api.example.com"))
    assert (outcome.kind, outcome.retryable, outcome.problem) == ("not_sent", True, "ConnectError")


async def test_a_name_with_an_ipv6_address_alone_is_asked_there_and_nowhere_else(
    names: Any, client: wire.Client
) -> None:  # F59
    table, _ = names
    table["api.example.com"] = [["::1"]]
    async with serve_openai([Reply(raw=OK)]) as other:
        outcome = await wire.send(client, request(f"http://api.example.com:{place(other)}"))
        assert (outcome.kind, outcome.retryable, other.connections) == ("not_sent", True, 0)
    async with contextlib.AsyncExitStack() as stack:
        try:
            server = await stack.enter_async_context(serve_openai([Reply(raw=OK)], host="::1"))
        except OSError:
            return  # a machine without IPv6: that the request was not sent is all there is to see
        assert (await wire.send(client, request(f"http://api.example.com:{place(server)}"))).kind == "answered"
        assert server.connections == 1


def place(server: Server) -> str:
    """Its port and path, for another host."""
    return server.url.rpartition(":")[2]


@pytest.mark.parametrize(
    "url",
    [
        "http://api.openai.com/v1", "ftp://x/v1", "file:///etc/passwd", "api.openai.com/v1", "https://", "",
        "https://user:pw@api.example.com", "https://user@api.example.com", "https://api.example.com?x=1",
        "https://api.example.com/v1#x", "https://example.com\\@127.0.0.1", "https://exa mple.com", "https://a\nb.com",
        "https://127。0。0。1", "https://x:99999", "https://x:y", "https://[::1",
    ],
)  # fmt: skip
def test_an_address_that_no_key_must_be_sent_to_is_a_configuration_error(url: str) -> None:  # F108
    with pytest.raises(ConfigError):
        wire.check_url(url, allow_internal=False)


def test_an_address_with_a_key_in_it_is_not_repeated() -> None:
    for url in (f"http://example.com/v1?key={KEY}", f"ftp://example.com/#{KEY}", f"https://me:{KEY}@example.com/"):
        with pytest.raises(ConfigError) as refused:
            wire.check_url(url, allow_internal=False)
        assert KEY not in f"{refused.value} {refused.value.hint}"


def test_a_good_address_loses_its_last_slash() -> None:
    assert wire.check_url("https://api.example.com/v1/", allow_internal=False) == "https://api.example.com/v1"
    assert wire.check_url("http://10.0.0.5:8000/v1", allow_internal=True) == "http://10.0.0.5:8000/v1"


# --- secrets ----------------------------------------------------------------------------------------------------------


async def test_the_key_is_in_no_outcome_repr_or_log(client: wire.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}
    said = json.dumps({"said": KEY}).encode()
    replies = [Reply(status=401, raw=json.dumps(echo).encode()), Reply(raw=said), Reply(cut=30)]
    async with serve_openai(replies) as server:
        asked = request(server.url)
        outcomes = [await wire.send(client, asked) for _ in replies]
        outcomes.append(await wire.send(client, request("http://127.0.0.1:1")))
        assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in server.requests)
    assert [outcome.kind for outcome in outcomes] == ["rejected", "answered", "unknown", "not_sent"]
    shown = repr([asked, client, outcomes, [str(outcome.problem) for outcome in outcomes]]) + caplog.text
    assert "CANARY" not in shown


async def test_a_key_in_a_header_that_came_back_is_taken_out_too() -> None:
    echo = Reply(status=500, raw=b"{}", headers={"x-request-id": f"for {KEY}"})
    async with serve_openai([echo]) as server:
        client = wire.client(allow_internal=True)
        outcome = await wire.send(client, request(server.url))
        await client.close()
    assert wire.request_id(outcome.headers, {}) == "for [key]"


async def test_a_key_of_a_few_letters_does_not_spoil_the_answer() -> None:
    body = b'{"said": "none of the keys"}'
    async with serve_openai([Reply(raw=body)]) as server:
        client = wire.client(allow_internal=True)
        asked = wire.Request(f"{server.url}/chat/completions", {"authorization": "Bearer none"}, ASK, 5, "none")
        outcome = await wire.send(client, asked)
        await client.close()
    assert outcome.body == {"said": "none of the keys"}


async def test_a_client_of_ones_own_fits() -> None:
    class Fast:
        async def exchange(self, request: wire.Request, leaving: Callable[[], None]) -> wire.Reply:
            leaving()
            if request.url.endswith("lost"):
                raise ConnectionResetError
            return wire.Reply(200, {}, OK)

        async def close(self) -> None:
            return None

    assert isinstance(Fast(), wire.Client)
    assert (await wire.send(Fast(), wire.Request("x", {}, b"", 1))).kind == "answered"
    assert (await wire.send(Fast(), wire.Request("lost", {}, b"", 1))).kind == "unknown"
