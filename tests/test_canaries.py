"""A real run through every door with marked secrets and a marked customer: where their bytes are afterwards, and where not."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest

from apprentice import cli, worker
from apprentice.config import Config, load
from apprentice.testing.servers import Reply, asked, serve_openai
from apprentice.types import Event, Json

from .conftest import YAML, right, texts
from .gateway.conftest import Live, running
from .test_alerts import Receiver, status

KEY = "sk-live-CANARYKEY-5b1f7a90c3"
SECRET = "whsec_" + base64.b64encode(b"CANARYSECRET-of-a-webhook-7f3a").decode()
WORD = "quuxcanary"  # what a customer wrote
SECTIONS = """
alerts:
  webhooks: [{url_env: HOOK, secret_env: HOOK_SECRET, allow_internal: true, events: [info, warn, page]}]
  files: [{path: alerts.jsonl, events: [info, warn, page]}]
"""
FAILS = "refuse this one"
LIES = "answer this one in your own words"


class Sink(NamedTuple):
    """A place where something is told or kept."""

    name: str
    said: bytes


def answer(body: dict[str, Json]) -> Json | Reply:
    """A remote that now and then repeats in an error or an answer what it was sent."""
    if body["messages"][-1]["content"] == WORD:
        return Reply(f"as you say, {WORD}")
    text = asked(body)["text"]
    if FAILS in text:
        told = {"error": {"message": f"{text} with {KEY}", "code": "invalid_value", "type": text, "param": text}}
        return Reply(status=400, raw=json.dumps(told).encode())
    return {"kind": text} if LIES in text else {"kind": right(text)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CANARY_API_KEY", KEY)
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    return tmp_path / "apprentice.yaml"


def run(*words: str) -> int:
    return cli.main(words)


async def asked_and_told(live: Live) -> list[httpx2.Response]:
    """Every kind of request, good and bad, with the customer's word in it."""
    said: list[httpx2.Response] = []
    for text in texts(70):
        body = {"input": {"text": f"{text} for {WORD}"}}
        said.append(await live.client.post("/v1/tasks/sort/run", json=body))
    assert {one.status_code for one in said} == {200}
    number = said[0].json()["request_id"]
    chat = {"model": "task:sort", "messages": [{"role": "user", "content": f"the pear of {WORD}"}]}
    plain = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": WORD}]}
    bad: list[tuple[str, Json]] = [
        ("/v1/tasks/sort/run", {"input": {"text": f"{FAILS}, {WORD}"}}),
        ("/v1/tasks/sort/run", {"input": {"text": f"{LIES}, {WORD}"}}),
        ("/v1/tasks/sort/run", {"input": {"text": [WORD]}}),
        ("/v1/tasks/sort/run", {"input": WORD}),
        ("/v1/tasks/sort/batch", {"inputs": [{"text": f"{FAILS}, {WORD}"}, {"texts": WORD}]}),
        ("/v1/chat/completions", chat | {"stop": [WORD], "n": 2}),
        ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": [WORD]}]}),
        ("/v1/feedback", {"request_id": number, "metric_name": "demonstration", "value": {"kind": WORD}}),
        ("/v1/feedback", {"request_id": "nobody", "metric_name": "approved", "value": True, "comment": WORD}),
    ]
    said += [await live.client.post(path, json=body) for path, body in bad]
    said.append(await live.client.post("/v1/chat/completions", content=f'{{"model": {WORD}'))
    assert all(one.status_code >= 400 or "batch" in one.url.path for one in said[70:])
    good: list[tuple[str, Json]] = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", plain),
        ("/v1/feedback", {"request_id": number, "metric_name": "comment", "value": WORD, "comment": WORD}),
        (
            "/v1/feedback",
            {"request_id": number, "metric_name": "demonstration", "value": {"kind": "tool"}, "comment": WORD},
        ),
    ]
    for path, body in good:
        done = await live.client.post(path, json=body)
        assert done.status_code == 200, done.text
    return said


async def looked_at(live: Live, number: str) -> dict[str, httpx2.Response]:
    """Every page and list that is read."""
    async with httpx2.AsyncClient(base_url=live.url, timeout=60, trust_env=False) as browser:
        await browser.post("/dashboard/login", data={"key": live.key}, headers={"origin": live.url})
        pages = {
            path: await browser.get(path)
            for path in ("/dashboard", "/dashboard/tasks/sort", "/dashboard/tasks/sort/versions",
                         "/dashboard/tasks/sort/review", f"/dashboard/requests/{number}")
        }  # fmt: skip
    lists = ("/metrics", "/v1/status", "/v1/tasks/sort/status", "/v1/tasks/sort/versions", "/v1/tasks", "/v1/models")
    found = pages | {path: await live.client.get(path) for path in (*lists, "/openapi.json")}
    assert {path: one.status_code for path, one in found.items()} == dict.fromkeys(found, 200)
    return found


async def played(file: Path, receiver: Receiver, config: Config, live: Live) -> tuple[list[Sink], dict[str, bytes]]:
    """The whole run. What was told where; and what the pages that may show a customer's text show."""
    live.door._log = True
    said = await asked_and_told(live)
    assert await worker.once(config, "sort", force=True) is not None
    number = said[0].json()["request_id"]
    for name in ("ALARM", "TRAINING_FAILED"):
        told = Event(name=name, task="sort", at=1.0, message=f"{name} happened", evidence={"request": number})
        await live.store.add_event(told)
    post = worker.courier(config, live.store)
    receiver.answers = [status(500, body=f"{WORD} {KEY}".encode())]
    for _ in range(2):
        await post.deliver()
    read = await looked_at(live, number)
    shown = {
        path: read[path].content for path in read if re.match("/dashboard/(tasks/sort(/review)?$|requests/)", path)
    }
    assert WORD.encode() in shown[f"/dashboard/requests/{number}"]
    # Who wrote it may hear it again in what is answered to that very request; a key not even then.
    shown |= {f"{n}: {one.url.path}": one.content + str(one.headers).encode() for n, one in enumerate(said)}
    sinks = [Sink(path, one.content + str(one.headers).encode()) for path, one in read.items() if path not in shown]
    sinks += [Sink("webhook", got.body + str(got.headers).encode() + got.target.encode()) for got in receiver.got]
    assert len(receiver.got) > 1
    return sinks, shown


async def test_no_key_is_anywhere_and_a_customers_text_only_where_it_is_meant_to_be(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with (
        Receiver().listening() as receiver,
        serve_openai(answer, price=(150_000, 600_000), api_key=KEY) as provider,
    ):
        monkeypatch.setenv("HOOK", receiver.url)
        text = YAML.replace("BASE_URL", provider.url).replace("retries: 1", "retries: 0\n  api_key_env: CANARY_API_KEY")
        file.write_text(text.replace("local:", "local:\n  learn: 'off'") + SECTIONS)
        config = load(file)
        async with running(config, provider) as live:
            sinks, shown = await played(file, receiver, config, live)
            wal = [path.read_bytes() for path in (tmp_path / ".apprentice").glob("*-wal")]
            key = live.key
    assert all(KEY.encode() not in part and key.encode() not in part for part in wal)
    # The command line, as processes of our own would print it.
    commands = [
        ("report", "--json"), ("report", "--csv"), ("report", "--html", str(tmp_path / "report.html")), ("status",),
        ("status", "--json"), ("doctor", "--json"), ("versions", "sort", "--json"), ("keys", "list", "--json"),
        ("alerts", "--json"), ("check",), ("licence",), ("teachers",), ("replay", "sort", "--json"),
    ]  # fmt: skip
    capfd_before = capfd.readouterr()
    sinks += [Sink("standard output and error of the gateway", "".join(capfd_before).encode())]
    for words in commands:
        code = await asyncio.to_thread(run, *words, "--config", str(file))
        told = capfd.readouterr()
        assert code in (0, 1), (words, told.err)
        sinks.append(Sink(" ".join(words), f"{told.out}{told.err}".encode()))
    assert await asyncio.to_thread(run, "export", "sort", "--out", str(tmp_path / "out"), "--config", str(file)) == 0
    assert WORD.encode() in (tmp_path / "out" / "train.jsonl").read_bytes()
    sinks.append(Sink("export", "".join(capfd.readouterr()).encode()))
    logged = [f"{one.name} {one.getMessage()} {one.args}" for one in caplog.records if one.name != "asyncio"]
    sinks.append(Sink("logs", "\n".join(logged).encode()))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    meant = (tmp_path / ".apprentice", tmp_path / "out")
    sinks += [Sink(str(path), found) for path, found in kept.items() if not path.is_relative_to(meant[0])]
    sinks = [one for one in sinks if not one.name.startswith(str(meant[1]))]
    everything = [*sinks, *(Sink(str(path), found) for path, found in kept.items())]
    everything += [Sink(path, page) for path, page in shown.items()]
    assert any(WORD.encode() in found for path, found in kept.items() if path.name.startswith("apprentice.db"))
    for canary in (KEY, key, SECRET, SECRET.removeprefix("whsec_"), "CANARYKEY", "CANARYSECRET"):
        assert [one.name for one in everything if canary.encode() in one.said] == []
    assert [(one.name, around(one.said)) for one in sinks if WORD.encode() in one.said] == []


def around(said: bytes) -> bytes:
    found = re.search(rb".{0,80}" + WORD.encode() + rb".{0,40}", said, re.DOTALL)
    assert found is not None
    return found[0]
