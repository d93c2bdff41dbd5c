"""What OpenTelemetry is told, by its own SDK: in memory as in a host program, and over OTLP on loopback."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import h11
import pytest
from opentelemetry import _logs as logs
from opentelemetry import metrics, trace
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.trace import SpanKind, StatusCode

from apprentice import telemetry
from apprentice.config import Config, missing
from apprentice.engine import Apprentice
from apprentice.errors import ConfigError, InvalidAnswer, ModelRejected, OutcomeUnknown
from apprentice.sections import Telemetry
from apprentice.testing.servers import Reply, serve_anthropic, serve_openai
from apprentice.types import Json

from .conftest import YAML, honest, texts
from .gateway.conftest import chat, running
from .test_canary import Told, told, versions

Configured = Callable[..., Config]

YAML = YAML + "telemetry: {}\n"
CONTENT = YAML.replace("telemetry: {}", "telemetry: {capture_content: true}")
OFF: dict[str, Json] = {"learn": "off"}
SECRET = "sk-canary-4711"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass(frozen=True, slots=True)
class Heard:
    """What the program around us has heard since the test began."""

    spans: InMemorySpanExporter
    logs: InMemoryLogRecordExporter
    reader: InMemoryMetricReader

    def forget(self) -> None:
        self.spans.clear()
        self.logs.clear()
        self.reader.get_metrics_data()

    def named(self, prefix: str) -> list[ReadableSpan]:
        return [span for span in self.spans.get_finished_spans() if span.name.startswith(prefix)]

    def verdicts(self) -> list[ReadableLogRecord]:
        return [one for one in self.logs.get_finished_logs() if one.log_record.event_name == "gen_ai.evaluation.result"]

    def points(self) -> dict[str, list[HistogramDataPoint]]:
        found: dict[str, list[HistogramDataPoint]] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    points = [p for p in metric.data.data_points if isinstance(p, HistogramDataPoint)]
                    found.setdefault(metric.name, []).extend(points)
        return found

    def words(self) -> str:
        """Everything that was told."""
        said = [span.to_json() for span in self.spans.get_finished_spans()]
        said += [one.to_json() for one in self.logs.get_finished_logs()]
        data = self.reader.get_metrics_data()
        return "\n".join([*said, "" if data is None else data.to_json()])


@cache
def program() -> Heard:
    """A host program that has set its providers; it can do so once in a process."""
    found = Heard(
        InMemorySpanExporter(),
        InMemoryLogRecordExporter(),  # type: ignore[no-untyped-call]
        InMemoryMetricReader({Histogram: AggregationTemporality.DELTA}),
    )
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(found.spans))
    trace.set_tracer_provider(tracers)
    loggers = LoggerProvider()
    loggers.add_log_record_processor(SimpleLogRecordProcessor(found.logs))
    logs.set_logger_provider(loggers)
    metrics.set_meter_provider(MeterProvider([found.reader]))
    return found


@pytest.fixture
def heard() -> Iterator[Heard]:
    found = program()
    found.forget()
    yield found
    found.forget()


def said(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def own(span: ReadableSpan) -> int:
    assert span.context is not None
    number: int = span.context.span_id
    return number


async def test_a_request_is_a_span_with_a_client_span_for_the_remote(configured: Configured, heard: Heard) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, YAML, local=OFF)
        async with Apprentice(config, seed=1) as app:
            result = await app.arun("sort", {"text": texts(1)[0]})
    [run], [call] = heard.named("run"), heard.named("chat")
    assert (run.name, run.kind, run.parent, run.status.status_code) == (
        "run sort",
        SpanKind.INTERNAL,
        None,
        StatusCode.UNSET,
    )
    assert said(run) == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "sort",
        "gen_ai.output.type": "json",
        "apprentice.task": "sort",
        "apprentice.request.id": result.request_id,
        "apprentice.source": "remote",
        "apprentice.phase": "cold_start",
        "apprentice.route": "remote",
        "apprentice.reason": "no_local_model",
        "apprentice.audit": False,
        "apprentice.audit.probability": result.decision.p,
        "apprentice.level": 1.0,
        "apprentice.cost_usd": result.cost / 1e6,
    }
    assert result.cost > 0
    assert (call.name, call.kind, parent(call)) == ("chat gpt-4o-mini", SpanKind.CLIENT, own(run))
    [seen] = server.requests
    assert said(call) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.response.model": "gpt-4o-mini",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.output.type": "json",
        "gen_ai.usage.input_tokens": seen.usage.input_tokens,
        "gen_ai.usage.output_tokens": seen.usage.output_tokens,
        "server.address": "127.0.0.1",
        "server.port": int(server.url.split(":")[2].split("/")[0]),
        "apprentice.task": "sort",
        "apprentice.purpose": "serve",
        "apprentice.cost_usd": result.cost / 1e6,
    } | {name: value for name, value in said(call).items() if name == "apprentice.provider_request_id"}


async def test_duration_and_tokens_are_histograms_with_the_buckets_of_the_conventions(
    configured: Configured, heard: Heard
) -> None:
    async with serve_openai(honest) as server:
        async with Apprentice(configured(server.url, YAML, local=OFF), seed=1) as app:
            for text in texts(3):
                await app.arun("sort", {"text": text})
        points = heard.points()
        tokens = [(seen.usage.input_tokens, seen.usage.output_tokens) for seen in server.requests]
    [seconds] = points["gen_ai.client.operation.duration"]
    assert (seconds.count, tuple(seconds.explicit_bounds)) == (3, telemetry.SECONDS)
    assert tuple(0.01 * 2**power for power in range(14)) == telemetry.SECONDS
    assert "gen_ai.token.type" not in (seconds.attributes or {})
    kinds = {(point.attributes or {})["gen_ai.token.type"]: point for point in points["gen_ai.client.token.usage"]}
    assert kinds["input"].sum == sum(given for given, _ in tokens)
    assert kinds["output"].sum == sum(got for _, got in tokens)
    assert tuple(kinds["input"].explicit_bounds) == telemetry.TOKENS == (
        1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864,
    )  # fmt: skip


async def test_a_synchronous_caller_and_tasks_at_the_same_time_each_have_their_own_trace(
    configured: Configured, heard: Heard
) -> None:
    tracer = trace.get_tracer("the program")
    async with serve_openai(honest) as server:
        config = configured(server.url, YAML, local=OFF)

        def call() -> None:
            with Apprentice(config, seed=1) as app, tracer.start_as_current_span("a request of the program"):
                app.run("sort", {"text": texts(1)[0]})

        await asyncio.to_thread(call)
        [outer], [run] = heard.named("a request"), heard.named("run")
        assert parent(run) == own(outer)
        heard.forget()
        async with Apprentice(config, seed=1) as app:
            await asyncio.gather(*(app.arun("sort", {"text": text}) for text in texts(5, seed=2)))
    runs, calls = heard.named("run"), heard.named("chat")
    assert len(runs) == len(calls) == 5
    assert {parent(span) for span in calls} == {own(span) for span in runs}
    assert len({span.context.trace_id for span in runs if span.context is not None}) == 5


async def test_each_attempt_is_a_span_and_says_why_the_next_one_was_made(configured: Configured, heard: Heard) -> None:
    busy = [Reply(status=503, code="overloaded"), Reply(status=503, code="overloaded")]
    async with serve_openai(busy) as first, serve_anthropic(honest) as second:
        config = configured(first.url, YAML, local=OFF)
        other = config.remote.model_copy(
            update={"provider": "anthropic", "model": "claude-sonnet-4-5-20250929", "base_url": second.url}
        )
        remote = config.remote.model_copy(update={"additional_providers": (other,)})
        async with Apprentice(config.model_copy(update={"remote": remote}), seed=1) as app:
            await app.arun("sort", {"text": texts(1)[0]})
    calls = sorted(heard.named("chat"), key=lambda span: span.start_time or 0)
    told = [(span.name, said(span).get("error.type"), span.status.status_code) for span in calls]
    assert told == [
        ("chat gpt-4o-mini", "OutcomeUnknown", StatusCode.ERROR),
        ("chat gpt-4o-mini", "OutcomeUnknown", StatusCode.ERROR),
        ("chat claude-sonnet-4-5-20250929", None, StatusCode.UNSET),
    ]
    assert said(calls[2])["gen_ai.provider.name"] == "anthropic"
    [run] = heard.named("run")
    assert {parent(span) for span in calls} == {own(run)}
    assert "error.type" not in said(run)
    failed = [
        (point.attributes or {}).get("gen_ai.request.model")
        for point in heard.points()["gen_ai.client.operation.duration"]
        if (point.attributes or {}).get("error.type") == "OutcomeUnknown"
    ]
    assert failed == ["gpt-4o-mini"]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(status=400, code="invalid_value"), ModelRejected),
        (Reply({"kind": "customer-said-plutonium"}), InvalidAnswer),
    ],
    ids=["rejected", "of no use"],
)
async def test_a_failure_is_told_by_its_class_and_never_by_its_text(
    configured: Configured, heard: Heard, reply: Reply, kind: type[Exception]
) -> None:
    async with (
        serve_openai(lambda _: reply) as server,
        Apprentice(configured(server.url, YAML, local=OFF), seed=1) as app,
    ):
        with pytest.raises(kind):
            await app.arun("sort", {"text": texts(1)[0]})
    [run], [call] = heard.named("run"), heard.named("chat")
    for span in (run, call):
        assert said(span)["error.type"] == kind.__name__
        assert (span.status.status_code, span.status.description, span.events) == (StatusCode.ERROR, None, ())
    assert "apprentice.source" not in said(run)
    assert said(call).get("gen_ai.usage.output_tokens", 0) == (
        server.requests[0].usage.output_tokens if reply.status == 200 else 0
    )


async def test_a_caller_who_goes_away_leaves_whole_spans(configured: Configured, heard: Heard) -> None:
    never = asyncio.Event()
    async with (
        serve_openai(lambda _: Reply({"kind": "tool"}, wait=never)) as server,
        Apprentice(configured(server.url, YAML, local=OFF), seed=1) as app,
    ):
        waiting = asyncio.create_task(app.arun("sort", {"text": texts(1)[0]}))
        while not server.requests:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert [said(span)["error.type"] for span in (*heard.named("chat"), *heard.named("run"))] == ["CancelledError"] * 2


async def test_an_audit_has_a_span_for_each_model_and_its_verdict_on_the_answer_that_was_judged(
    configured: Configured, heard: Heard
) -> None:
    async with serve_openai(honest) as server:
        config = configured(server.url, YAML.replace("repeat_share: 0", "repeat_share: 1"), local=OFF)
        await versions(config, 2)
        async with Apprentice(config, seed=1) as app:
            told(app, {"v1": Told(), "v2": Told(wrong="0123456789")})
            await app._store.promote("sort", "v2", 2.0, state="canary")
            app._tasks["sort"].champion = None
            for text in texts(20):  # the first one brings the news of the versions
                heard.forget()
                result = await app.arun("sort", {"text": text})
                if heard.named("chat sort/v2"):
                    break
    [run] = heard.named("run")
    by_purpose = {said(span)["apprentice.purpose"]: span for span in heard.named("chat")}
    assert {purpose: span.name for purpose, span in by_purpose.items()} == {
        "local": "chat sort/v1",
        "canary": "chat sort/v2",
        "serve": "chat gpt-4o-mini",
        "repeat": "chat gpt-4o-mini",
    }
    assert {parent(span) for span in by_purpose.values()} == {own(run)}
    local = by_purpose["local"]
    assert (local.kind, said(local)["gen_ai.provider.name"]) == (SpanKind.INTERNAL, "embedded")
    assert said(local)["apprentice.confidence"] == said(run)["apprentice.confidence"] == 0.9
    assert (said(run)["apprentice.audit"], said(run)["apprentice.version"], said(run)["apprentice.score"]) == (
        True,
        "v1",
        1.0,
    )
    found = {}
    for one in heard.verdicts():
        attributes = dict(one.log_record.attributes or {})
        who = str(attributes.pop("apprentice.evaluated"))
        found[who] = attributes
        assert one.log_record.span_id == own(by_purpose[who])
        assert one.log_record.trace_id == (run.context.trace_id if run.context else None)
    shared = {
        "gen_ai.evaluation.name": "exact_match",
        "apprentice.task": "sort",
        "apprentice.request.id": result.request_id,
        "apprentice.audit": True,
    }
    match = {"gen_ai.evaluation.score.value": 1.0, "gen_ai.evaluation.score.label": "match"}
    mismatch = {"gen_ai.evaluation.score.value": 0.0, "gen_ai.evaluation.score.label": "mismatch"}
    assert found == {
        "local": shared | match | {"apprentice.version": "v1"},
        "repeat": shared | match,
        "canary": shared | mismatch | {"apprentice.version": "v2"},
    }


async def test_a_probe_is_no_part_of_the_request_that_set_it_off(configured: Configured, heard: Heard) -> None:
    text = YAML.replace("repeat_share: 0", "repeat_share: 0\n  probe_prompts: 3\n  probe_hours: 1")
    minutes = itertools.count(1.8e9, 60)
    async with serve_openai(honest) as server:
        config = configured(server.url, text, local=OFF)
        async with Apprentice(config, seed=1, clock=lambda: next(minutes)) as app:
            for line in texts(60):
                await app.arun("sort", {"text": line})
                await app.idle()
    probes = [span for span in heard.named("chat") if said(span)["apprentice.purpose"] == "probe"]
    assert probes
    assert {span.parent for span in probes} == {None}


async def test_an_answer_that_is_given_again_says_so_and_costs_nothing(configured: Configured, heard: Heard) -> None:
    async with serve_openai(honest) as server, Apprentice(configured(server.url, YAML, local=OFF), seed=1) as app:
        for _ in range(2):
            await app.arun("sort", {"text": texts(1)[0]}, idempotency_key="once")
    first, second = heard.named("run")
    assert said(first)["apprentice.request.id"] == said(second)["apprentice.request.id"]
    assert said(first)["apprentice.cost_usd"] > 0
    assert (said(second)["apprentice.cost_usd"], said(second)["apprentice.again"]) == (0.0, True)
    assert "apprentice.again" not in said(first)
    assert len(heard.named("chat")) == 1


# --- what is never told -----------------------------------------------------------------------------------------------


async def everything(config: Config) -> None:
    """Requests of every kind: answered, audited, refused, captured and not."""
    await versions(config, 1)
    async with Apprentice(config, seed=1) as app:
        told(app, {"v1": Told(wrong="5")})
        app._tasks["sort"].champion = None  # it was looked for before the model was told
        for text in texts(8):
            await app.arun("sort", {"text": f"{text}, said the customer"}, tags={"note": "customer-tag"})
        await app.arun("sort", {"text": "a pear for the customer, unrecorded"}, capture=False)
        with pytest.raises(OutcomeUnknown):
            await app.arun("sort", {"text": "a pear for the customer who breaks things"})


def moody(body: dict[str, Json]) -> Json:
    if "breaks" in json.dumps(body):
        return Reply(status=500, code="server_error", raw=b'{"error": {"message": "the customer broke it"}}')
    return honest(body)


async def test_no_key_and_no_word_is_told_unless_it_is_asked_for(
    configured: Configured, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_KEY", SECRET)
    async with serve_openai(moody) as server:
        await everything(configured(server.url, YAML, local=OFF, remote={"api_key_env": "CANARY_KEY", "retries": 0}))
        assert SECRET in json.dumps([seen.headers for seen in server.requests])
    assert len(heard.named("run")) == 10 and heard.named("chat sort/v1") and heard.verdicts()
    words = heard.words()
    for never in (SECRET, "CANARY_KEY", "customer", "please look", "fruit", "animal"):
        assert never not in words


async def test_what_was_said_is_told_where_it_is_asked_for_except_of_requests_that_are_not_captured(
    configured: Configured, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_KEY", SECRET)
    async with serve_openai(moody) as server:
        await everything(configured(server.url, CONTENT, local=OFF, remote={"api_key_env": "CANARY_KEY", "retries": 0}))
    runs = [said(span) for span in heard.named("run")]
    spoken = [one for one in runs if "gen_ai.input.messages" in one]
    assert len(spoken) == len(runs) - 1
    asked = json.loads(spoken[0]["gen_ai.input.messages"])
    assert asked[0]["role"] == "user" and "said the customer" in asked[0]["parts"][0]["content"]
    answered = json.loads(spoken[0]["gen_ai.output.messages"])
    assert answered[0]["role"] == "assistant" and "kind" in json.loads(answered[0]["parts"][0]["content"])
    assert answered[0]["finish_reason"] == "stop"
    assert "gen_ai.output.messages" not in spoken[-1]  # nobody had an answer
    assert not [span for span in heard.named("chat") if "gen_ai.input.messages" in said(span)]
    assert SECRET not in heard.words() and "unrecorded" not in heard.words() and "customer-tag" not in heard.words()


# --- the gateway ------------------------------------------------------------------------------------------------------


async def test_the_gateway_continues_the_trace_of_its_client_and_remotes_hear_nothing_of_it(
    configured: Configured, heard: Heard
) -> None:
    async with serve_openai(honest) as provider:
        config = configured(provider.url, YAML, local=OFF)
        async with running(config, provider) as live:
            began = {"traceparent": PARENT}
            inputs = [{"text": text} for text in texts(3)]
            answers = [
                await live.client.post("/v1/chat/completions", json=chat(texts(1)[0]), headers=began),
                await live.client.post("/v1/tasks/sort/batch", json={"inputs": inputs}, headers=began),
                await live.client.post(
                    "/v1/chat/completions", json=chat(json.dumps(inputs[0])) | {"model": "gpt-4o-mini"}, headers=began
                ),
            ]
            assert [answer.status_code for answer in answers] == [200, 200, 200]
            runs, calls = heard.named("run"), heard.named("chat")
            heard.forget()
            await live.client.post("/v1/tasks/sort/run", json={"input": inputs[0]})
            [alone] = heard.named("run")
    assert len(runs) == 4 and len(calls) == 5  # what was relayed has no run of its own
    relayed = [span for span in calls if said(span)["apprentice.task"] == "passthrough"]
    assert {parent(span) for span in (*runs, *relayed)} == {0xB7AD6B7169203331}
    traces = {span.context.trace_id for span in (*runs, *calls) if span.context is not None}
    assert traces == {0x0AF7651916CD43DD8448EB211C80319C}
    assert alone.parent is None
    assert not {"traceparent", "tracestate", "baggage"} & {name for seen in provider.requests for name in seen.headers}


# --- over the wire ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Collector:
    """An OTLP/HTTP receiver. `posts`: (path, body) of what came."""

    url: str
    posts: list[tuple[str, bytes]] = field(default_factory=list)

    def at(self, path: str) -> list[bytes]:
        return [body for at, body in self.posts if at == path]


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    found = Collector("")

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        path, body = "", b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65_536))
            elif isinstance(event, h11.Request):
                path, body = event.target.decode(), b""
                assert dict(event.headers)[b"content-type"] == b"application/x-protobuf"
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                found.posts.append((path, body))
                head = h11.Response(status_code=200, headers=[("content-length", "0")])
                writer.write((connection.send(head) or b"") + (connection.send(h11.EndOfMessage()) or b""))
                connection.start_next_cycle()
            else:
                break
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield found


PROGRAM = """
import sys
from apprentice.config import load
from apprentice.engine import Apprentice
with Apprentice(load(sys.argv[1]), seed=1) as app:
    print(app.run("sort", {"text": "a pear for the customer"}).source)
"""


AUDITED = (
    PROGRAM
    + """
from apprentice import observer
from apprentice.types import Answer, Decision, Record, Score
watching, task, right = observer.of(app.config.telemetry), app.config.tasks[0], Answer(output={"kind": "fruit"})
decision = Decision(route="both", reason="audit", p=0.1, audit=True)
with watching.request(task):
    with watching.call(observer.Asked("sort", "local", "embedded", "sort/v1")) as told:
        told(right, 0, True)
    score = Score(value=0.5)
    record = Record(request_id="r", task="sort", at=1, input={}, decision=decision, version="v1", local=right, score=score)
    watching.recorded(record)
"""
)


async def child(code: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, env=kept | variables, stdout=-1, stderr=-1
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def written(tmp_path: Path, url: str, section: str) -> str:
    path = tmp_path / "apprentice.yaml"
    local = "  backend: embedded\n  fine_tune_batch_size: 60\n  fine_tune_settings: {encoder: tfidf}\n"
    assert local in YAML
    light = "  backend: recorded\n  fine_tune_backend: null\n"  # it is not asked, and loads nothing
    path.write_text(YAML.replace(local, light).replace("telemetry: {}", section).replace("BASE_URL", url))
    return str(path)


async def test_a_process_that_exports_sends_all_three_signals_by_otlp(tmp_path: Path) -> None:
    async with serve_openai(honest) as server, collecting() as collector:
        path = written(tmp_path, server.url, "telemetry: {export: true}")
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
        }
        code, out, err = await child(AUDITED, path, **variables)
    assert (code, out, err) == (0, "remote\n", "")
    [spans] = [ExportTraceServiceRequest.FromString(body) for body in collector.at("/v1/traces")]
    [resource] = spans.resource_spans
    about = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert about["service.name"] == "apprentice" and about["deployment.environment"] == "test"
    assert about["service.version"] and about["service.instance.id"]
    [scope] = resource.scope_spans
    assert scope.scope.name == "apprentice"
    assert sorted(span.name for span in scope.spans) == ["chat gpt-4o-mini", "chat sort/v1", "run sort", "run sort"]
    measured = ExportMetricsServiceRequest.FromString(collector.at("/v1/metrics")[-1])
    names = {metric.name for one in measured.resource_metrics for each in one.scope_metrics for metric in each.metrics}
    assert names == {"gen_ai.client.operation.duration", "gen_ai.client.token.usage"}
    [events] = [ExportLogsServiceRequest.FromString(body) for body in collector.at("/v1/logs")]
    [event] = events.resource_logs[0].scope_logs[0].log_records
    [judged] = [span for span in scope.spans if span.name == "chat sort/v1"]
    assert (event.event_name, event.span_id) == ("gen_ai.evaluation.result", judged.span_id)
    values = {one.key: one.value for one in event.attributes}
    assert values["gen_ai.evaluation.score.value"].double_value == 0.5
    assert values["gen_ai.evaluation.score.label"].string_value == "partial"
    assert b"customer" not in b"".join(body for _, body in collector.posts)


@pytest.mark.slow
async def test_the_variables_name_the_service_and_switch_signals_off(tmp_path: Path) -> None:
    async with serve_openai(honest) as server, collecting() as collector:
        path = written(tmp_path, server.url, "telemetry: {export: true}")
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_SERVICE_NAME": "mail",
        }
        code, _, err = await child(PROGRAM, path, **variables)
    assert (code, err, collector.at("/v1/metrics")) == (0, "", [])
    [spans] = [ExportTraceServiceRequest.FromString(body) for body in collector.at("/v1/traces")]
    assert [
        one.value.string_value for one in spans.resource_spans[0].resource.attributes if one.key == "service.name"
    ] == ["mail"]


async def test_a_collector_that_is_gone_costs_spans_and_no_request(tmp_path: Path) -> None:
    async with serve_openai(honest) as server:
        path = written(tmp_path, server.url, "telemetry: {export: true}")
        gone = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
        code, out, err = await child(PROGRAM, path, **gone)
    assert (code, out) == (0, "remote\n")
    assert "customer" not in err and "Traceback" not in err


# --- what is needed for it --------------------------------------------------------------------------------------------


async def test_without_the_section_no_package_is_looked_for_and_nothing_is_told(tmp_path: Path, heard: Heard) -> None:
    code = PROGRAM + "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    async with serve_openai(honest) as server:
        returned, out, err = await child(code, written(tmp_path, server.url, ""))
    assert (returned, out, err) == (0, "remote\n", "")


async def test_a_configuration_that_asks_for_it_without_the_extra_is_told_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
from apprentice.config import load
from apprentice.engine import Apprentice
from apprentice.errors import MissingExtra
for path, lacking in zip(sys.argv[1:], ("opentelemetry.exporter", "opentelemetry")):
    for name in [name for name in sys.modules if name.startswith(("opentelemetry", "apprentice.telemetry"))]:
        del sys.modules[name]
    sys.modules[lacking] = None
    try:
        Apprentice(load(path))
    except MissingExtra as error:
        print(error, error.hint)
"""
    paths = []
    for name, section in (("a", "telemetry: {export: true}"), ("b", "telemetry: {}")):
        (tmp_path / name).mkdir()
        paths.append(written(tmp_path / name, "http://127.0.0.1:9", section))
    _, out, err = await child(code, *paths)
    hint = "is not installed pip install 'apprentice[otel]'"
    assert (out.splitlines(), err) == (
        [f"the package 'opentelemetry-exporter-otlp-proto-http' {hint}", f"the package 'opentelemetry-api' {hint}"],
        "",
    )


def test_check_says_which_package_is_lacking(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(text=YAML)
    assert not [problem for problem in missing(config) if "telemetry" in problem]
    monkeypatch.setattr(sys, "path", [])
    expected = "telemetry: the package 'opentelemetry-api' is not installed (pip install 'apprentice[otel]')"
    assert [problem for problem in missing(config) if "telemetry" in problem] == [expected]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "grpc"),
    ],
)
def test_what_the_variables_ask_for_and_cannot_be_done_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=value) as raised:
        telemetry.build(Telemetry(export=True))
    assert "otlp" in str(raised.value.hint)


def test_the_names_are_those_of_the_conventions() -> None:
    """What the source says that begins with gen_ai. is in the published constants."""
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    known |= {value for name, value in vars(gen_ai_metrics).items() if name.startswith("GEN_AI_")}
    assert telemetry.__file__ is not None
    source = Path(telemetry.__file__).read_text()
    written = {part for part in source.split('"') if part.startswith("gen_ai.")}
    assert len(written) > 15
    assert written - known == {"gen_ai.evaluation.result"}  # events have no constants
    operations = {one.value for one in gen_ai_attributes.GenAiOperationNameValues}
    assert {"chat", "generate_content", "invoke_workflow"} <= operations
    assert set(telemetry._PROVIDERS.values()) <= {one.value for one in gen_ai_attributes.GenAiProviderNameValues}
