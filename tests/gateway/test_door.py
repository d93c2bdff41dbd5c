"""Who is let in, and what a port can be made to swallow. The numbers are those of the faults that are meant."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
from decimal import Decimal
from typing import Any, cast

import httpx2
import pytest

from apprentice.errors import ConfigError
from apprentice.gateway import Settings, keys
from apprentice.gateway.keys import Keyring
from apprentice.gateway.reading import parsed
from apprentice.gateway.refusals import Refusal
from apprentice.testing.servers import Reply
from apprentice.types import Event, Json, Store

from .conftest import Live, Serving, chat

CHAT = "/v1/chat/completions"


def without_key(live: Live) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=live.url, timeout=60, trust_env=False)


# --- keys (105)


async def test_every_key_that_is_none_is_a_401_alike_and_is_never_repeated(  # F105
    serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving() as live:
        gone = await live.new_key("gone", "call")
        await keys.revoke(live.store, "gone", at=2.0)
        while await live.gateway.keyring.find(gone) is not None:
            await asyncio.sleep(0.05)
        key = live.key
        tries: list[list[tuple[str, str]]] = [
            [],
            [("authorization", "Bearer apk-wrong-canary")],
            [("authorization", f"Bearer  {key}")],
            [("authorization", f"Bearer {key}x")],
            [("authorization", key)],
            [("authorization", f"Basic {key}")],
            [("authorization", f"Bearer {key}"), ("authorization", f"Bearer {key}")],
            [("authorization", f"Bearer {key}"), ("x-api-key", "apk-wrong-canary")],
            [("authorization", f"Bearer {gone}")],
            [("authorization", "Bearer " + "k" * 4_000)],
            [("authorization", "Bearer ä".encode().decode("latin-1"))],
            [("cookie", f"key={key}")],
        ]
        answers = []
        for headers in tries:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
            body = json.dumps(chat())
            head = f"POST {CHAT}?api_key={key} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            answers.append(await live.raw(head.encode("latin-1")))
        assert {answer.split(b" ")[1] for answer in answers} == {b"401"}
        assert len({answer.rpartition(b"\r\n\r\n")[2] for answer in answers}) == 1
        huge = await live.raw(
            f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {'k' * 2**20}\r\n\r\n".encode()
        )
        assert huge == b"" or huge.split(b" ")[1] in (b"400", b"401", b"431")
        said = "".join(capsys.readouterr())
        for secret in (key, gone, "canary"):
            assert all(secret.encode() not in answer for answer in answers)
            assert secret not in said
        assert live.provider.requests == []


async def test_a_role_allows_its_own_and_nothing_else(serving: Serving) -> None:
    wanted: dict[str, tuple[str, str, Json]] = {
        "call": ("POST", CHAT, chat()),
        "feedback": ("POST", "/v1/feedback", {"request_id": "x", "metric_name": "approved", "value": True}),
        "operate": ("GET", "/v1/status", None),
    }
    async with serving() as live, without_key(live) as client:
        made = {role: await live.new_key(role, role) for role in keys.ROLES}
        for role, (method, path, body) in wanted.items():
            for holder, key in made.items():
                answer = await client.request(method, path, json=body, headers={"x-api-key": key})
                assert (answer.status_code == 403) == (holder != role), (role, holder, answer.text)
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 200


async def test_a_new_key_works_and_a_revoked_one_does_not_within_a_moment(serving: Serving) -> None:
    async with serving() as live, without_key(live) as client:
        assert (await client.get("/v1/models", headers={"x-api-key": live.key})).status_code == 200
        key = (await keys.create(live.store, "late", frozenset({"call"}), at=1.0)).secret

        async def reaches(status: int) -> None:
            async with asyncio.timeout(20):
                while (await client.get("/v1/models", headers={"x-api-key": key})).status_code != status:
                    await asyncio.sleep(0.05)

        await reaches(200)
        await keys.revoke(live.store, "late", at=2.0)
        await reaches(401)


async def test_the_store_keeps_no_key(serving: Serving) -> None:
    async with serving() as live:
        await live.client.post(CHAT, json=chat())
        found = [path.read_bytes() for path in live.config.store.path.parent.iterdir()]
        assert not any(live.key.encode() in content for content in found)
        [key] = await keys.known(live.store)
        assert (key.name, len(key.digest)) == ("tests", 64)
        assert await Keyring(live.store).find(live.key) == key


class _Slow:
    """The store, which counts how often its events are read, and is slow at it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reads = 0
        self.gate = asyncio.Event()

    async def events(self, *given: Any, **named: Any) -> list[Event]:
        self.reads += 1
        await self.gate.wait()
        return await self._store.events(*given, **named)


async def test_the_keys_are_read_once_for_all_who_come_together_and_again_a_second_later(serving: Serving) -> None:
    async with serving() as live:
        slow, now = _Slow(live.store), 0.0
        ring = Keyring(cast(Store, slow), clock=lambda: now)
        asked = [asyncio.create_task(ring.find(live.key)) for _ in range(64)]
        asked += [asyncio.create_task(ring.find("apk-none")) for _ in range(64)]
        while not slow.reads:
            await asyncio.sleep(0)
        asked.pop().cancel()  # one who goes away takes nothing from the others
        slow.gate.set()
        found = await asyncio.gather(*asked)
        assert [key is not None for key in found] == [True] * 64 + [False] * 63
        assert slow.reads == 1
        now = 0.99
        assert await ring.find(live.key) is not None and slow.reads == 1
        assert await ring.find("apk-none") is None and slow.reads == 2  # which may be new
        await keys.revoke(live.store, "tests", at=2.0)
        now = 1.98
        assert await ring.find(live.key) is not None and slow.reads == 2
        now = 1.99
        assert await ring.find(live.key) is None


async def test_names_of_keys_are_unique_and_revoking_needs_one(serving: Serving) -> None:
    async with serving() as live:
        with pytest.raises(ConfigError, match="already"):
            await keys.create(live.store, "tests", frozenset({"call"}), at=1.0)
        with pytest.raises(ConfigError, match="no key 'nobody'"):
            await keys.revoke(live.store, "nobody", at=1.0)
        with pytest.raises(ConfigError, match="printable"):
            await keys.create(live.store, "a\nb", frozenset({"call"}), at=1.0)


async def test_a_keys_own_limit_holds_in_a_crowd_and_others_are_not_touched(serving: Serving) -> None:
    async with serving() as live, without_key(live) as client:
        first = await live.client.post(CHAT, json=chat())
        cost = round(float(first.headers["x-apprentice-cost-usd"]) * 1e6)
        configured = live.config.task("sort")
        worst = live.gateway.allowances.worst(configured, {"text": "please look at the pear number 1"})
        limit = worst + 3 * cost
        poor = await live.new_key("poor", "call", daily=str(Decimal(limit) / 10**6))
        headers = {"x-api-key": poor}

        async def ask(number: int) -> httpx2.Response:
            return await client.post(CHAT, json=chat(f"please look at the pear number {number % 10}"), headers=headers)

        answers = await asyncio.gather(*(ask(number) for number in range(12)))
        while (answer := await ask(50)).status_code == 200:
            answers.append(answer)
        paid = sum(round(float(a.headers["x-apprentice-cost-usd"]) * 1e6) for a in answers if a.status_code == 200)
        assert 0 < paid <= limit, answer.text
        assert answer.status_code == 429 and answer.json()["error"]["type"] == "insufficient_quota"
        assert limit - paid < worst + cost  # nearly all of it can be used
        assert (await live.client.post(CHAT, json=chat())).status_code == 200


async def test_a_request_that_fails_costs_its_key_what_it_cost(serving: Serving) -> None:
    async with serving([Reply("prose")], {"remote": {"retries": 0}}) as live, without_key(live) as client:
        key = await live.new_key("poor", "call", total="1")
        answer = await client.post(CHAT, json=chat(), headers={"x-api-key": key})
        assert answer.status_code == 502
        [record] = await live.records()
        holder = next(one for one in await keys.known(live.store) if one.name == "poor")
        window = f"task:key:{holder.id}/total"
        assert (await live.store.spent([window]))[window] == record.cost > 0


# --- Host and Origin (106)


async def test_another_host_or_another_page_is_refused_on_every_method(serving: Serving) -> None:
    async with serving() as live:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            await only_its_own_host_and_page(live, method)


async def only_its_own_host_and_page(live: Live, method: str) -> None:
    port = live.url.rpartition(":")[2]
    good = f"Authorization: Bearer {live.key}\r\nConnection: close\r\n"
    cases = [
        ("Host: evil.example\r\n", b"421"),
        ("Host: localhost.evil.example\r\n", b"421"),
        ("Host: evil@localhost\r\n", b"421"),
        ("Host: evil.example\r\nX-Forwarded-Host: localhost\r\n", b"421"),
        ("Host: localhost\r\nOrigin: http://evil.example\r\n", b"403"),
        ("Host: localhost\r\nOrigin: null\r\n", b"403"),
        (f"Host: localhost:{port}\r\nOrigin: http://localhost:1\r\n", b"403"),
    ]
    for lines, status in cases:
        answer = await live.raw(f"{method} /v1/models HTTP/1.1\r\n{lines}{good}\r\n".encode())
        assert answer.split(b" ")[1] == status, (lines, answer)
    own = f"Host: localhost:{port}\r\nOrigin: http://localhost:{port}\r\n"
    answer = await live.raw(f"{method} /v1/models HTTP/1.1\r\n{own}{good}\r\n".encode())
    assert answer.split(b" ")[1] == (b"200" if method in ("GET", "HEAD") else b"405")
    no_host = await live.raw(f"{method} /v1/models HTTP/1.0\r\n{good}\r\n".encode())
    assert no_host.split(b" ")[1] == b"400"


async def test_a_host_of_ones_own_is_let_in_and_no_page_reads_an_answer(serving: Serving) -> None:
    async with serving(hosts=frozenset({"Gateway.Example"}), origins=frozenset({"https://board.example"})) as live:
        headers = {"host": "gateway.example:443", "origin": "https://board.example"}
        answer = await live.client.get("/v1/models", headers=headers)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


def test_without_keys_it_listens_on_loopback_only() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert Settings(host=host, keyless=True).keyless
    for host in ("0.0.0.0", "10.0.0.1", "::", "example.com"):
        with pytest.raises(ConfigError, match="spend your money"):
            Settings(host=host, keyless=True)


async def test_without_keys_whoever_reaches_it_may_do_everything_but_no_web_page(serving: Serving) -> None:
    async with serving(keyless=True) as live, without_key(live) as client:
        assert (await client.get("/v1/status")).status_code == 200
        assert (await client.post(CHAT, json=chat())).status_code == 200
        for strange in ("http://[", "null", "http://"):
            assert (await client.get("/healthz", headers={"origin": strange})).status_code == 403
        evil = {"origin": "http://evil.example"}
        assert (await client.post(CHAT, json=chat(), headers=evil)).status_code == 403
        plain = {"content-type": "text/plain"}
        assert (await client.post(CHAT, content=json.dumps(chat()), headers=plain)).status_code == 415


# --- bodies (107 is in test_openai; 112)


BOMB = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"\xef\xbb\xbf{}", 400),
        (json.dumps(chat()).encode("utf-16"), 400),
        (b"\xff\xfe", 400),
        (b'{"model": "task:sort", "model": "task:sort"}', 400),
        (b'{"model": NaN}', 400),
        (b'{"model": 1e999}', 400),
        (b'{"model": ' + b"9" * 5_000 + b"}", 400),
        (b"[" * 90 + b"]" * 90, 400),
        (BOMB[:100_000], 400),
        (BOMB + b" ", 400),
        (b"[" + b"[]," * 200_000 + b"[]]", 413),
        (b'{"messages": [' + b"1," * 1_000_000 + b"1]}", 400),
        (b" " * (4 * 2**20 + 1), 413),
        (b'{"model": "task:sort", "messages": [{"role": "user", "content": "half \\ud800"}]}', 400),
    ],
)
async def test_a_body_that_is_no_honest_json_is_refused_within_its_memory(  # F112
    serving: Serving, body: bytes, status: int
) -> None:
    async with serving() as live:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = await live.client.post(CHAT, content=body, headers={"content-type": "application/json"})
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert answer.status_code == status, answer.text
        assert grown <= 64 * 1024, f"{grown} KiB"
        assert live.provider.requests == []


GARBAGE = [
    "Content-Length: -1\r\n\r\n",
    "Content-Length: x\r\n\r\n",
    "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "Content-Length: 2\r\n\r\n{}",
]


async def test_garbage_around_a_body_is_the_clients_mistake(serving: Serving) -> None:  # F112
    async with serving() as live:
        for lines in GARBAGE:
            kind = "" if lines.startswith("Content-Length: 2\r") else "Content-Type: application/json\r\n"
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {live.key}\r\n{kind}"
            answer = await live.raw(f"{head}Connection: close\r\n{lines}".encode())
            assert re.match(rb"HTTP/1.1 (400|415|501) ", answer), (lines, answer)
            assert (await live.client.get("/healthz")).status_code == 200


async def test_a_gigabyte_that_is_announced_or_sent_in_pieces_is_refused_without_being_kept(serving: Serving) -> None:
    async with serving(max_body=100_000) as live:

        async def endless() -> Any:
            for _ in range(64):
                yield b" " * 65_536

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        head = {"content-type": "application/json"}
        try:
            answer = await live.client.post(CHAT, content=endless(), headers=head)
            assert answer.status_code == 413
        except httpx2.TransportError:
            pass  # it was closed on the client while it was still sending
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= 64 * 1024
        assert (await live.client.get("/healthz")).status_code == 200
        assert parsed(b"[[]]") == [[]]
        with pytest.raises(Refusal, match="twice"):
            parsed(b'{"a": {"b": 1, "b": 2}}')


# --- time and room (113)


async def test_who_is_slow_is_let_go_and_others_are_served(serving: Serving) -> None:
    async with serving(patience=0.5) as live:
        begun = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {live.key}\r\n"
        half = begun + "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        nothing, no_head, no_body = await asyncio.gather(
            live.raw(b""), live.raw(begun.encode()), live.raw(half.encode())
        )
        assert (nothing, no_head) == (b"", b"")
        assert no_body.startswith(b"HTTP/1.1 408 ")
        assert (await live.client.post(CHAT, json=chat())).status_code == 200


async def test_idle_connections_make_room_for_new_ones(serving: Serving) -> None:
    async with serving(connections=20) as live:
        host, port = live.url.removeprefix("http://").split(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(100)]
        try:
            async with httpx2.AsyncClient(base_url=live.url, trust_env=False) as client:
                assert (await client.get("/healthz")).status_code == 200
        finally:
            for _, writer in idle:
                writer.close()


async def test_more_at_once_than_there_is_room_for_is_told_to_come_back(serving: Serving) -> None:
    gate = asyncio.Event()
    reply = Reply({"kind": "fruit"}, wait=gate)
    async with serving([reply], parallel=2) as live:
        asked = [asyncio.create_task(live.client.post(CHAT, json=chat(f"a pear {n}"))) for n in range(2)]
        while len(live.provider.requests) < 2:
            await asyncio.sleep(0.01)
        answer = await live.client.post(CHAT, json=chat("a pear 3"))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.headers["x-should-retry"] == "true"
        assert (await live.client.get("/readyz")).status_code == 200
        gate.set()
        assert [(await task).status_code for task in asked] == [200, 200]


async def test_an_answer_that_takes_too_long_is_a_504_and_counts_as_spent(serving: Serving) -> None:
    gate = asyncio.Event()
    async with serving([Reply({"kind": "fruit"}, wait=gate)], timeout=0.3) as live:
        answer = await live.client.post(CHAT, json=chat())
        gate.set()
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert await live.spent() > 0


# --- what is told (118)


async def test_what_a_client_writes_begins_no_line_of_its_own(
    serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving() as live:
        live.door._log = True
        evil = 'x\n{"level": "fatal"}\x1b[31m\u2028'
        answers = [
            await live.client.post(CHAT, json=chat() | {"model": f"task:{evil}"}),
            await live.client.post(CHAT, json=chat() | {evil: 1}),
            await live.client.post("/v1/tasks/x%0A%1b[31m/run", json={"input": 1}),
            await live.client.get("/x%0A%7B%22level%22%7D"),
        ]
        lines = capsys.readouterr().err.splitlines()
    assert {answer.status_code for answer in answers} <= {400, 404}
    for answer in answers:
        assert answer.json()["error"]["message"].isprintable()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert not any("\x1b" in line for line in lines)
    assert os.linesep not in json.loads(lines[0])["path"] or len(lines) >= 4


async def test_paths_and_methods_that_are_none_are_told_in_our_shape(serving: Serving) -> None:
    async with serving() as live:
        answer = await live.client.get("/v2/anything")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        answer = await live.client.delete(CHAT)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["type"] == "invalid_request_error"
