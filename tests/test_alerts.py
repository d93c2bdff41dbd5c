"""Alerts: each is told at least once, signed, once a period, and nobody waits for a sink that is dead."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import csv
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

import apprentice
from apprentice import alerts, plugins, worker
from apprentice.alerts import Courier, Notice, Place, consider
from apprentice.cli import main
from apprentice.config import Config, parse
from apprentice.errors import ConfigError
from apprentice.gateway.meters import Meters
from apprentice.sections import EVENTS, Alerts, Command, File, Sink, Webhook
from apprentice.testing.servers import Reply, serve_openai
from apprentice.testing.stores import a_record
from apprentice.types import Event, Seconds, Store

from .conftest import YAML
from .gateway.conftest import running

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NOW: Seconds = 1_700_000_000.0
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

type Configured = Callable[..., Config]


# --- receivers, clocks, stores ----------------------------------------------------------------------------------------


class Got(NamedTuple):
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


class Receiver:
    """A loopback receiver that says what it is told to say, one raw answer a request; then that all is well."""

    def __init__(self) -> None:
        self.got: list[Got] = []
        self.connections = 0
        self.answers: list[bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Receiver]:
        open_: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            if (task := asyncio.current_task()) is not None:
                open_.add(task)
            try:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    await self._answer(reader, writer)
            finally:
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?token=t-0-k-e-n"
        try:
            yield self
        finally:
            server.close()
            for task in open_:
                task.cancel()
            await asyncio.gather(*open_, return_exceptions=True)
            await server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.got.append(Got(head[0], headers, body))
        answer = self.answers.pop(0) if self.answers else OK
        if callable(answer):
            await answer(writer)
        else:
            writer.write(answer)
            await writer.drain()


def status(code: int, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {code} Said", *headers, f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> Seconds:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    async with Receiver().listening() as listening:
        monkeypatch.setenv("HOOK", listening.url)
        monkeypatch.setenv("HOOK_SECRET", SECRET)
        yield listening


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store: Store = plugins.build("stores", "sqlite", path=tmp_path / "store.db")
    yield store
    await store.close()


HOOK = Webhook(url_env="HOOK", secret_env="HOOK_SECRET", allow_internal=True)


def courier(configured: Configured, store: Store, clock: Clock, *sinks: Sink, owner: str = "one") -> Courier:
    kinds: dict[str, tuple[Sink, ...]] = {
        "webhooks": tuple(sink for sink in sinks if isinstance(sink, Webhook)),
        "files": tuple(sink for sink in sinks if isinstance(sink, File)),
        "commands": tuple(sink for sink in sinks if isinstance(sink, Command)),
    }
    config = configured().model_copy(update={"alerts": Alerts().model_copy(update=kinds)})
    return Courier(config, store, clock=clock, owner=owner, dice=Random(7))


def event(name: str = "ALARM", at: Seconds = NOW, **evidence: Any) -> Event:
    return Event(name=name, task="sort", at=at, message=f"{name} happened", evidence=evidence)


async def place_of(made: Courier, number: int = 0) -> Place:
    return (await made.look())[number].place


# --- which events -----------------------------------------------------------------------------------------------------


def names_in_the_source() -> set[str]:
    """The literal names of events: of `Event(name=…)`, of `say`, `_say` and `report`, and of what a fold observes."""
    found: set[str] = set()
    for path in Path(apprentice.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            named = [given.value for given in node.keywords if given.arg == "name"] if called == "Event" else []
            said = node.args[:1] if called in ("say", "_say", "report", "Observation", "Step") else []
            given = node.args[2:3] if called in ("_tighten", "_give_back") else []
            for value in (*named, *said, *given):
                if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.isupper():
                    found.add(value.value)
    return found


def test_every_event_of_the_source_has_a_severity_and_every_end_ends_one() -> None:
    names = names_in_the_source()
    assert {"ALARM", "TRAINING_FAILED", "BUDGET_WARNING", "UNVERIFIED", "TEACHER_CHANGED", "EVALUATION_FAILED"} <= names
    assert names <= EVENTS.keys()
    for end, over in alerts.ENDS.items():
        assert EVENTS[end] == "info"
        assert {EVENTS[name] for name in over} <= {"page", "warn"}


def test_the_documents_name_each_severity_and_only_metrics_that_there_are() -> None:
    docs = Path(__file__).parents[1] / "docs"
    table = (docs / "operate.md").read_text().partition("| severity | events |")[2].partition("| info |")[0]
    for line in table.strip().splitlines()[1:]:
        severity, names = line.strip("| ").split(" | ")
        assert set(re.findall("[A-Z_]+", names)) == {name for name, of in EVENTS.items() if of == severity}
    counted = Meters()
    counted.count("GET", "/healthz", 200, 0.1)
    exposed = set(re.findall(r"^# TYPE (\w+)", counted.text([]).decode(), re.MULTILINE))
    panels = json.loads((docs / "grafana.json").read_text())["panels"]
    shown = {
        name for panel in panels for one in panel["targets"] for name in re.findall(r"apprentice_\w+", one["expr"])
    }
    assert len(shown) > 10
    assert {name.removesuffix("_bucket") for name in shown} <= exposed


def told(sink: Sink, events: list[Event], period: Seconds = 100.0) -> list[tuple[str, tuple[str, ...], int]]:
    place, found = Place(), []
    for number, one in enumerate(events, 1):
        notice, place = consider(place, sink, number, one, period)
        if notice is not None:
            found.append((notice.name, notice.recovered, notice.repeated))
        assert place.number == number
    return found


@pytest.mark.parametrize(
    ("sink", "names", "expected"),
    [
        ({}, ["ALARM", "PROMOTED", "TIGHTEN", "NEW_KIND"], ["ALARM", "TIGHTEN"]),
        ({"events": ("page",)}, ["ALARM", "TIGHTEN"], ["ALARM"]),
        ({"events": ("PROMOTED",)}, ["ALARM", "PROMOTED"], ["PROMOTED"]),
        ({"events": ("info",)}, ["ALARM", "MODE", "NEW_KIND"], ["MODE", "NEW_KIND"]),
        ({"tasks": ("other",)}, ["ALARM"], []),
        ({"tasks": ("sort",)}, ["ALARM"], ["ALARM"]),
        ({"events": ()}, ["ALARM"], []),
    ],
)
def test_a_sink_is_told_what_its_rules_name(sink: dict[str, Any], names: list[str], expected: list[str]) -> None:
    assert [name for name, _, _ in told(File(path=Path("x"), **sink), [event(name) for name in names])] == expected


def test_the_same_is_told_once_a_period_and_then_how_often_it_happened() -> None:
    ats = [0, 10, 99, 100, 150, 201]
    assert told(HOOK, [event(at=NOW + at) for at in ats]) == [("ALARM", (), 0), ("ALARM", (), 2), ("ALARM", (), 1)]


def test_another_task_window_or_model_is_not_the_same() -> None:
    windows = [event("BUDGET_WARNING", window=day, limit=5, reason="0.8") for day in ("day:1", "day:1", "day:2")]
    assert len(told(HOOK, windows)) == 2
    assert len(told(HOOK, [event(), event().model_copy(update={"task": "other"})])) == 2


def test_the_end_of_an_alert_is_told_whatever_its_severity_and_then_it_is_news_again() -> None:
    happened = [event("ALARM"), event("TIGHTEN"), event("CERTIFIED"), event("CERTIFIED"), event("ALARM")]
    expected = [("ALARM", (), 0), ("TIGHTEN", (), 0), ("CERTIFIED", ("ALARM", "TIGHTEN"), 0), ("ALARM", (), 0)]
    assert told(HOOK, happened) == expected
    assert told(HOOK, [event("CERTIFIED")]) == []  # nothing was wrong
    other = event("CERTIFIED").model_copy(update={"task": "other"})
    assert told(HOOK, [event("ALARM"), other]) == [("ALARM", (), 0)]
    broken = [event("CONTRACT_BROKEN", model=model) for model in ("a", "b")]
    assert told(HOOK, [*broken, event("MODEL_RESUMED", model="b")])[-1] == ("MODEL_RESUMED", ("CONTRACT_BROKEN",), 0)


def test_what_is_remembered_does_not_grow_for_ever() -> None:
    place = Place()
    for day in range(400):
        warning = event("BUDGET_WARNING", at=NOW + day * 86_400, window=f"day:{day}", limit=5, reason="0.8")
        _, place = consider(place, HOOK, day + 1, warning, 3600.0)
    assert len(place.told) <= 31


def test_no_customers_text_is_in_a_notice() -> None:  # F119: nothing of a subject is in the queue of a webhook
    evidence: dict[str, Any] = {
        "answers": [{"text": "canary-1"}],
        "said": "canary-2",
        "digest": "canary-3",
        "by": "canary-4",
        "version": "v3",
        "value": 0.5,
        "refused": {"openai forbids it": 7},
        "reason": "canary-5" * 100,
    }
    notice, _ = consider(Place(), HOOK, 1, event(**evidence), 0.0)
    assert notice is not None
    assert notice.evidence == {"version": "v3", "value": 0.5, "refused": {"openai forbids it": 7}}
    assert "canary" not in json.dumps([alerts.generic(notice), alerts.slack(notice)])


def test_a_slack_text_is_one_line_without_links_and_mentions() -> None:
    message = "<!channel> & <https://evil|x>\nALARM\x1b[0m"
    notice = Notice(id="msg_1", name="ALARM", severity="page", task="sort", at=NOW, message=message, repeated=2)
    said = alerts.slack(notice.model_copy(update={"recovered": ("TIGHTEN",)}))["text"]
    assert said == (
        "[page] ALARM sort: &lt;!channel&gt; &amp; &lt;https://evil|x&gt; ALARM [0m (over: TIGHTEN) "
        "(2 more since it was told last)"
    )


# --- signatures -------------------------------------------------------------------------------------------------------


def test_a_signature_is_that_of_standard_webhooks() -> None:
    made = alerts.signature([SECRET], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    other = "whsec_" + "A" * 40
    assert alerts.signature([SECRET, other], "m", 1, b"").split()[0] == alerts.signature([SECRET], "m", 1, b"")


@pytest.mark.parametrize("secrets", [[], ["short"], ["whsec_c2hvcnQ="], ["whsec_" + "A" * 200], ["not base64 !!!"]])
def test_a_secret_that_is_none_is_refused_without_repeating_it(secrets: list[str]) -> None:
    with pytest.raises(ValueError, match=r"secret|not set") as caught:
        alerts.signature(secrets, "m", 1, b"")
    assert not any(secret in str(caught.value) for secret in secrets)


def test_an_old_delivery_cannot_be_sent_as_a_new_one_and_two_secrets_may_overlap() -> None:  # F111
    old, new = SECRET, "whsec_" + "B" * 40
    during, after = (alerts.signature(secrets, "m", 1_000, b"{}").split() for secrets in ([new, old], [new]))
    assert len(during) == 2 and set(after) < set(during)
    assert alerts.signature([old], "m", 1_000, b"{}") in during
    for id, timestamp, body in (("m", 1_301, b"{}"), ("n", 1_000, b"{}"), ("m", 1_000, b"{ }")):
        assert not set(alerts.signature([new, old], id, timestamp, body).split()) & set(during)


# --- webhooks ---------------------------------------------------------------------------------------------------------


async def test_a_webhook_is_told_each_alert_in_order_and_signed(
    configured: Configured, store: Store, clock: Clock, receiver: Receiver
) -> None:
    made = courier(configured, store, clock, HOOK)
    for name in ("ALARM", "PROMOTED", "TIGHTEN"):
        await store.add_event(event(name))
    assert (await made.look())[0].waiting == 2
    await made.deliver()
    assert [json.loads(got.body)["type"] for got in receiver.got] == ["apprentice.alarm", "apprentice.tighten"]
    first = receiver.got[0]
    assert first.target == "POST /hook?token=t-0-k-e-n HTTP/1.1"
    assert first.headers["webhook-timestamp"] == f"{NOW:.0f}"
    signed = alerts.signature([SECRET], first.id, int(NOW), first.body)
    assert first.headers["webhook-signature"] == signed
    assert json.loads(first.body) == {
        "type": "apprentice.alarm",
        "timestamp": "2023-11-14T22:13:20Z",
        "data": {
            "name": "ALARM",
            "severity": "page",
            "task": "sort",
            "message": "ALARM happened",
            "evidence": {},
            "recovered": [],
            "repeated": 0,
        },
    }
    await made.deliver()
    assert len(receiver.got) == 2
    standing = (await made.look())[0]
    assert (standing.waiting, standing.place.delivered, standing.place.delivered_at) == (0, 2, NOW)


async def test_a_failure_is_tried_again_under_the_same_id_and_not_too_soon(
    configured: Configured, store: Store, clock: Clock, receiver: Receiver
) -> None:
    made = courier(configured, store, clock, HOOK)
    receiver.answers = [status(500, body=b"the secret of the receiver"), status(503, "retry-after: 600"), OK]
    await store.add_event(event())
    await made.deliver()
    place = await place_of(made)
    assert (place.problem, place.failed, place.delivered) == ("the receiver answered 500", 1, 0)
    assert 2.5 <= place.retry_at - NOW <= 5
    await made.deliver()
    assert len(receiver.got) == 1  # it is too soon
    clock.now = place.retry_at
    await made.deliver()
    place = await place_of(made)
    assert place.retry_at == clock.now + 600
    clock.now = place.retry_at
    await made.deliver()
    place = await place_of(made)
    assert (place.problem, place.failed, place.delivered, place.number) == (None, 0, 1, 1)
    assert len({got.id for got in receiver.got}) == 1
    assert {json.loads(got.body)["data"]["name"] for got in receiver.got} == {"ALARM"}


async def test_a_receiver_that_hangs_keeps_neither_the_other_sinks_nor_the_caller(  # F111
    configured: Configured, store: Store, clock: Clock, receiver: Receiver, tmp_path: Path
) -> None:
    released = asyncio.Event()

    async def hang(_: asyncio.StreamWriter) -> None:
        await released.wait()

    receiver.answers = [hang]
    log = tmp_path / "alerts.jsonl"
    made = courier(configured, store, clock, HOOK.model_copy(update={"timeout": 60.0}), File(path=log))
    await store.add_event(event())
    async with made.at_work(every=0.01):
        async with asyncio.timeout(30):
            while not (log.exists() and log.read_bytes()):
                await asyncio.sleep(0.01)
            await store.add_event(event("TIGHTEN"))
            while len(log.read_bytes().splitlines()) < 2:
                await asyncio.sleep(0.01)
    assert len(receiver.got) == 1
    released.set()


async def test_a_receiver_that_does_not_answer_in_time_has_failed(
    configured: Configured, store: Store, clock: Clock, receiver: Receiver
) -> None:
    async def hang(_: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    receiver.answers = [hang]
    made = courier(configured, store, clock, HOOK.model_copy(update={"timeout": 0.2}))
    await store.add_event(event())
    await made.deliver()
    assert (await place_of(made)).problem == "no answer within 0.2 s"


async def test_a_redirect_is_not_followed(  # F111
    configured: Configured, store: Store, clock: Clock, receiver: Receiver
) -> None:
    async with Receiver().listening() as elsewhere:
        receiver.answers = [status(302, f"location: {elsewhere.url}"), status(307, f"location: {elsewhere.url}")]
        made = courier(configured, store, clock, HOOK)
        await store.add_event(event())
        for code in (302, 307):
            await made.deliver()
            assert (await place_of(made)).problem == f"the receiver answered {code}"
            clock.now += 60
        assert elsewhere.connections == 0


async def test_an_answer_without_end_is_cut_off_and_not_kept(  # F111
    configured: Configured, store: Store, clock: Clock, receiver: Receiver
) -> None:
    async def flood(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n")
        while True:
            writer.write(b"canary" * 10_000)
            await writer.drain()

    receiver.answers = [flood]
    made = courier(configured, store, clock, HOOK)
    await store.add_event(event())
    await made.deliver()
    place = await place_of(made)
    assert place.problem == "the answer is larger than 65536 bytes"
    assert "canary" not in place.model_dump_json()


async def test_one_that_is_gone_is_asked_once_a_day(  # F111
    configured: Configured, store: Store, clock: Clock, receiver: Receiver
) -> None:
    receiver.answers = [status(410)]
    made = courier(configured, store, clock, HOOK)
    await store.add_event(event())
    await made.deliver()
    assert (await place_of(made)).retry_at == NOW + 86_400


async def test_an_internal_address_is_not_connected_to_unless_that_is_allowed(
    configured: Configured, store: Store, clock: Clock, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", receiver.url.replace("http:", "https:"))
    made = courier(configured, store, clock, HOOK.model_copy(update={"allow_internal": False}))
    await store.add_event(event())
    await made.deliver()
    assert (await place_of(made)).problem == "127.0.0.1 is an internal address; set allow_internal: true to reach it"
    assert receiver.connections == 0


@pytest.mark.parametrize(
    "address",
    [
        "",
        "hooks.example.com",
        "ftp://hooks.example.com/t-0-k-e-n",
        "https://t-0-k-e-n@hooks.example.com",
        "https://example.com\\@127.0.0.1/t-0-k-e-n",
        "https://hooks.example.com:99999/t-0-k-e-n",
        "https://hooks.example.com/t-0-k-e-n\r\nx: y",
        "https://hooks.example.com/t-0-k-e-n#there",
        "https://127。0。0。1/t-0-k-e-n",
        "https://[::1/t-0-k-e-n",
    ],
)
async def test_what_is_no_address_is_refused_without_repeating_it(
    address: str, configured: Configured, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", address)
    made = courier(configured, store, clock, Webhook(url_env="HOOK"))
    await store.add_event(event())
    await made.deliver()
    problem = (await place_of(made)).problem
    assert problem is not None
    assert "HOOK" in problem
    assert "t-0-k-e-n" not in problem


async def test_without_its_secret_a_webhook_is_not_told(
    configured: Configured, store: Store, clock: Clock, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", "whsec_very-secret")
    made = courier(configured, store, clock, HOOK)
    await store.add_event(event())
    await made.deliver()
    problem = (await place_of(made)).problem or ""
    assert problem.startswith("the environment variable HOOK_SECRET holds no secret such as whsec_")
    assert "very-secret" not in problem
    assert receiver.connections == 0


async def test_no_secret_and_no_address_is_in_the_store_or_on_the_terminal(
    configured: Configured, store: Store, clock: Clock, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.answers = [status(500, body=SECRET.encode())] * 6
    made = courier(configured, store, clock, HOOK)
    await store.add_event(event())
    for _ in range(6):
        await made.deliver()
        clock.now += 7200
    said = "".join(standing.model_dump_json() for standing in await made.look())
    said += "".join(one.model_dump_json() for one in await store.events())
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    for canary in (SECRET, SECRET.removeprefix("whsec_"), "t-0-k-e-n"):
        assert canary not in said
        assert canary.encode() not in kept


async def test_a_webhook_that_leads_back_to_our_own_gateway_is_no_loop(
    configured: Configured, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:  # F111
    async with serve_openai([Reply()]) as provider, running(configured(provider.url), provider) as live:
        monkeypatch.setenv("HOOK", f"{live.url}/v1/feedback")
        made = courier(
            configured, live.store, clock, Webhook(url_env="HOOK", allow_internal=True, events=("info", "page"))
        )
        await live.store.add_event(event())
        for _ in range(12):
            await made.deliver()
            clock.now += 3600
        names = [one.name for one in await live.store.events()]
        assert (names.count("ALARM"), names.count("ALERTS_STUCK")) == (1, 1)
        assert (await place_of(made)).problem == "the receiver answered 401"
        assert provider.requests == []


# --- dead sinks, and coming back --------------------------------------------------------------------------------------


async def test_a_sink_that_is_stuck_is_told_to_the_others_and_so_is_its_return(
    configured: Configured, store: Store, clock: Clock, receiver: Receiver, tmp_path: Path
) -> None:
    log = tmp_path / "alerts.jsonl"
    receiver.answers = [status(500)] * 5
    made = courier(configured, store, clock, HOOK, File(path=log))
    await store.add_event(event())
    for _ in range(7):
        await made.deliver()
        clock.now += 3600
    names = [json.loads(line)["data"]["name"] for line in log.read_bytes().splitlines()]
    assert names == ["ALARM", "ALERTS_STUCK", "ALERTS_RESUMED"]
    last = json.loads(log.read_bytes().splitlines()[-1])["data"]
    assert last["recovered"] == ["ALERTS_STUCK"]
    assert last["evidence"] == {"sink": "webhook HOOK"}
    assert [json.loads(got.body)["data"]["name"] for got in receiver.got[5:]] == names
    assert (await made.look())[0].waiting == 0


async def test_pauses_grow_to_an_hour_and_a_notice_is_given_up_after_days_only(
    configured: Configured, store: Store, clock: Clock, receiver: Receiver
) -> None:
    receiver.answers = [status(400)] * 200
    made = courier(configured, store, clock, HOOK)
    await store.add_event(event())
    pauses = []
    while (place := await place_of(made)).dropped == 0:
        await made.deliver()
        place = await place_of(made)
        pauses.append(place.retry_at - clock.now)
        clock.now = place.retry_at + (0 if len(pauses) < 16 else 20_000)  # nobody looks every time
    assert clock.now - NOW > 3 * 86_400
    assert place.number == 1
    assert all(pause <= 3600 for pause in pauses)
    assert min(pauses[12:]) >= 1800
    assert [one.name for one in await store.events()] == ["ALARM", "ALERTS_STUCK", "ALERTS_DROPPED"]
    receiver.answers, receiver.got = [], []
    await made.deliver()  # those behind it have their turn
    names = [json.loads(got.body)["data"]["name"] for got in receiver.got]
    assert names == ["ALERTS_STUCK", "ALERTS_DROPPED", "ALERTS_RESUMED"]


async def test_a_new_sink_begins_with_the_last_hour_and_misses_nothing_from_then_on(
    configured: Configured, store: Store, clock: Clock, tmp_path: Path
) -> None:
    for at in (NOW - 90_000, NOW - 3601, NOW - 60):
        await store.add_event(event(at=at))
    log = tmp_path / "alerts.jsonl"
    sink = File(path=log)
    await courier(configured, store, clock, sink).deliver()
    assert [json.loads(line)["timestamp"] for line in log.read_bytes().splitlines()] == ["2023-11-14T22:12:20Z"]
    late = File(path=tmp_path / "late.jsonl")
    await courier(configured, store, clock, late).deliver()
    await store.add_event(event("TIGHTEN", at=NOW))
    clock.now += 30 * 86_400  # nobody delivered for a month
    await courier(configured, store, clock, late, sink).deliver()
    for path in (log, late.path):
        assert json.loads(path.read_bytes().splitlines()[-1])["data"]["name"] == "TIGHTEN"


async def test_of_many_who_deliver_one_does(
    configured: Configured, store: Store, clock: Clock, tmp_path: Path, receiver: Receiver
) -> None:
    for number in range(20):
        await store.add_event(event("BUDGET_WARNING", window=f"day:{number}", limit=1, reason="0.8"))
    many = [courier(configured, store, clock, HOOK, owner=f"worker {number}") for number in range(8)]
    await asyncio.gather(*(one.deliver() for one in many))
    assert len(receiver.got) == len({got.id for got in receiver.got}) == 20


SENDER = """
import asyncio, sys, time
from pathlib import Path
from random import Random
from apprentice import plugins
from apprentice.alerts import Courier
from apprentice.config import Config

async def work() -> None:
    config = Config.model_validate_json(sys.stdin.read())
    store = plugins.build("stores", "sqlite", path=Path(sys.argv[1]))
    # Its own moment, so that the lease of the one that was killed before is over.
    clock = lambda: time.time() + float(sys.argv[2])
    await Courier(config, store, clock=clock, owner="sender", dice=Random(1)).deliver()

asyncio.run(work())
"""


async def test_what_was_being_sent_by_a_process_that_was_killed_is_sent_again_under_the_same_id(
    configured: Configured, store: Store, receiver: Receiver, tmp_path: Path
) -> None:
    clock = Clock()
    clock.now = 0.0
    sections = {"alerts": {"webhooks": (HOOK,), "period": 0.0}}
    config = configured(**sections)
    await store.save_state("alerts:webhook HOOK", 0, Place().model_dump_json())
    for number in range(4):
        await store.add_event(event(message=str(number)).model_copy(update={"message": str(number)}))
    running: list[asyncio.subprocess.Process] = []

    async def kill(_: asyncio.StreamWriter) -> None:
        running[-1].send_signal(signal.SIGKILL)

    async def kill_after(writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await writer.drain()
        running[-1].send_signal(signal.SIGKILL)

    receiver.answers = [kill, OK, kill, kill_after, kill_after, kill, OK]
    codes = []
    for number in range(12):
        sender = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SENDER, str(tmp_path / "store.db"), str(number * 120), stdin=asyncio.subprocess.PIPE
        )
        running.append(sender)
        await sender.communicate(config.model_dump_json().encode())
        codes.append(sender.returncode)
        if sender.returncode == 0:
            break
    assert codes[-1] == 0
    assert codes.count(-signal.SIGKILL) >= 3
    messages = [json.loads(got.body)["data"]["message"] for got in receiver.got]
    assert sorted(set(messages)) == ["0", "1", "2", "3"]  # none is lost
    assert messages == sorted(messages)
    assert len(messages) > 4  # some came twice
    assert len({got.id for got in receiver.got}) == 4  # and are known to have


# --- files and commands -----------------------------------------------------------------------------------------------


async def test_a_file_gets_a_line_each_and_half_a_line_is_closed_first(
    configured: Configured, store: Store, clock: Clock, tmp_path: Path
) -> None:
    log = tmp_path / "alerts.jsonl"
    made = courier(configured, store, clock, File(path=log))
    await store.add_event(event(message="two\nlines"))
    await made.deliver()
    assert log.stat().st_mode & 0o777 == 0o600
    with log.open("ab") as file:
        file.write(b'{"half": ')
    await store.add_event(event("TIGHTEN"))
    await made.deliver()
    lines = log.read_bytes().splitlines()
    assert [json.loads(lines[number])["data"]["name"] for number in (0, 2)] == ["ALARM", "TIGHTEN"]
    assert json.loads(lines[0])["id"].startswith("msg_")


async def test_a_file_that_cannot_be_written_is_a_failure(
    configured: Configured, store: Store, clock: Clock, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    made = courier(configured, store, clock, File(path=pipe), File(path=tmp_path / "no" / "folder"))
    await store.add_event(event())
    await made.deliver()
    assert (await place_of(made)).problem == "it is no regular file"
    assert (await place_of(made, 1)).problem == "cannot be written: No such file or directory"


async def test_a_command_finds_the_notice_on_its_input_and_no_key_in_its_environment(
    configured: Configured, store: Store, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    found = tmp_path / "found"
    script = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read() + str(dict(os.environ)))"
    made = courier(configured, store, clock, Command(run=(sys.executable, "-c", script, str(found))))
    await store.add_event(event())
    await made.deliver()
    said = found.read_text()
    assert json.loads(said.splitlines()[0])["data"]["name"] == "ALARM"
    assert "very-secret" not in said
    assert (await place_of(made)).delivered == 1


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (("false",), "ended with status 1"),
        (("sh", "-c", "sleep 1000 & wait"), "was not done within 0.3 s"),
        (("/no/such/command",), "cannot be started: No such file or directory"),
        (("echo", "; touch hacked"), None),
        (("true",), None),  # it does not read what it is told
    ],
)
async def test_a_command_that_fails_is_run_again_later(
    run: tuple[str, ...], problem: str | None, configured: Configured, store: Store, clock: Clock
) -> None:
    made = courier(configured, store, clock, Command(run=run, timeout=0.3 if problem and "within" in problem else 30))
    await store.add_event(event())
    await made.deliver()
    assert (await place_of(made)).problem == problem
    assert not Path("hacked").exists()


# --- worker, configuration, command line ------------------------------------------------------------------------------


async def test_a_worker_delivers_while_it_looks(configured: Configured, tmp_path: Path) -> None:
    log = tmp_path / "alerts.jsonl"
    config = configured(alerts={"files": (File(path=log),)})
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    try:
        working = asyncio.create_task(worker.forever(config, every=60.0))
        await store.add_event(Event(name="EMERGENCY", task="sort", at=4e9, message="look"))
        async with asyncio.timeout(60):
            while not (log.exists() and log.read_bytes()):
                await asyncio.sleep(0.01)
        working.cancel()
        await asyncio.wait([working])
    finally:
        await store.close()
    assert json.loads(log.read_bytes())["data"]["message"] == "look"


def test_a_text_alone_is_the_variable_or_the_path_and_unknown_names_are_errors(tmp_path: Path) -> None:
    text = YAML.replace("BASE_URL", "http://127.0.0.1:9")
    short = "alerts: {webhooks: [HOOK, {url_env: B, shape: slack, events: [page]}], files: [a.jsonl]}"
    config = parse(f"{text}\n{short}", tmp_path / "apprentice.yaml")
    assert [sink.label for sink in config.alerts.sinks] == ["webhook HOOK", "webhook B", "file a.jsonl"]
    assert config.alerts.files[0].path == tmp_path / "a.jsonl"
    assert Config.model_validate_json(config.model_dump_json()) == config
    for wrong, said in [
        ("{webhooks: ['https://hooks.example.com/x']}", "should be the NAME of an environment variable"),
        ("{webhooks: [A, A]}", "two sinks are called 'webhook A'"),
        ("{files: [{path: a, events: [ALRAM]}]}", "'ALRAM' is neither page, warn, info nor the name of an event"),
        ("{files: [{path: a, events: [ALRAM]}]}", "did you mean 'ALARM'"),
        ("{files: [{path: a, tasks: [srot]}]}", "no task is named 'srot'; did you mean 'sort'"),
        ("{commands: [{run: []}]}", "commands[0].run"),
        ("{commands: [{run: [x], timeout: 1000}]}", "commands[0].timeout"),
    ]:
        with pytest.raises(ConfigError) as caught:
            parse(f"{text}\nalerts: {wrong}")
        assert said in str(caught.value)


def test_the_command_shows_and_tries_the_sinks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    file = tmp_path / "apprentice.yaml"
    file.write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9") + "\nalerts: {webhooks: [HOOK], files: [a.jsonl]}")
    config = parse(file.read_text(), file)

    async def prepare() -> None:
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        await store.add_event(Event(name="ALARM", task="sort", at=4e9, message="look"))
        await store.close()

    asyncio.run(prepare())
    assert main(["alerts", "--test", "--config", str(file)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "webhook HOOK: the environment variable HOOK is not set"
    assert said[1] == "file a.jsonl: took the test notice"
    assert json.loads((tmp_path / "a.jsonl").read_text())["type"] == "apprentice.test"
    assert main(["alerts", "--json", "--config", str(file)]) == 0
    assert [one["waiting"] for one in json.loads(capsys.readouterr().out)] == [1, 1]
    assert main(["alerts", "--send", "--config", str(file)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("webhook HOOK: told nothing yet; 1 waiting")
    assert "the environment variable HOOK is not set (1 tries since" in said[1]
    assert said[2].startswith("file a.jsonl: told 1, the last 20")


async def test_a_report_goes_to_the_webhooks_and_to_a_spreadsheet(
    receiver: Receiver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "apprentice.yaml"
    sections = "alerts: {webhooks: [{url_env: HOOK, allow_internal: true}], files: [a.jsonl]}"
    file.write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9") + f"\n{sections}")
    store: Store = plugins.build("stores", "sqlite", path=parse(file.read_text(), file).store.path)
    await store.append(a_record("r1", at=NOW, cost=700))
    await store.close()
    assert await asyncio.to_thread(main, ["report", "--webhook", "--config", str(file)]) == 0
    assert capsys.readouterr().out == "sort: webhook HOOK: took the report\n"
    [got] = receiver.got
    data = json.loads(got.body)["data"]
    assert (data["name"], data["task"], data["evidence"]["requests"], data["evidence"]["cost"]) == (
        "REPORT",
        "sort",
        1,
        700,
    )
    assert not (tmp_path / "a.jsonl").exists()
    receiver.answers = [status(500)]
    assert await asyncio.to_thread(main, ["report", "--webhook", "--json", "--config", str(file)]) == 1
    assert json.loads(capsys.readouterr().out)[0]["problem"] == "the receiver answered 500"
    assert await asyncio.to_thread(main, ["report", "--csv", "--config", str(file)]) == 0
    [line] = csv.DictReader(capsys.readouterr().out.splitlines())
    assert (line["task"], line["day"], line["requests"]) == ("sort", "2023-11-14", "1")


def test_the_command_says_where_to_list_sinks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "apprentice.yaml"
    file.write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9") + "\nstore: {path: there.db}")
    (tmp_path / "there.db").touch()
    assert main(["alerts", "--config", str(file)]) == 2
    assert "`alerts:`" in capsys.readouterr().err
