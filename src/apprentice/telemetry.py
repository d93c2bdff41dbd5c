"""Spans, verdicts and metrics for OpenTelemetry, as its conventions for generative AI say.

https://github.com/open-telemetry/semantic-conventions-genai, docs/gen-ai: spans, events, metrics (in development). Names that
they do not have begin with `apprentice.`. No input, output, key or text of an error is told, unless `capture_content`.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import NamedTuple
from urllib.parse import urlsplit

from apprentice.config import Remote, TaskConfig
from apprentice.errors import ConfigError, MissingExtra
from apprentice.observer import Asked, Observer, Told
from apprentice.sections import Telemetry
from apprentice.types import Answer, FinishState, Json, Micros, Record, Score, Usage

try:
    from opentelemetry import _logs as logs
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.context import Context, attach, detach
    from opentelemetry.trace import Span, SpanKind, StatusCode
except ModuleNotFoundError as error:
    raise MissingExtra("opentelemetry-api", "otel") from error

type _Attributes = dict[str, str | bool | int | float | list[str]]

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(4**power for power in range(14))
_PROVIDERS = {"google": "gcp.gemini"}  # what the conventions call them, where that differs from our plugin's name
_OPERATIONS = {"google": "generate_content"}  # all others: chat
_FINISHES: dict[FinishState, str] = {"complete": "stop", "truncated": "length", "filtered": "content_filter"}
_MOST_NAMES = 50  # names of models that answered, in metrics: a server may answer with a new one each time


def build(settings: Telemetry) -> Observer:
    """What tells OpenTelemetry. Raises MissingExtra; ConfigError for an OTEL_* variable that asks for what there is not."""
    return _OpenTelemetry(settings, _own() if settings.export else _of_the_program())


class _Providers(NamedTuple):
    tracers: trace.TracerProvider
    meters: metrics.MeterProvider
    loggers: logs.LoggerProvider


@dataclass(slots=True)
class _Seen:
    """One request on its way."""

    span: Span
    evaluator: str
    answers: dict[str, Context] = field(default_factory=dict)  # in which context who answered


_SEEN: ContextVar[_Seen | None] = ContextVar("seen", default=None)


class _OpenTelemetry:
    def __init__(self, settings: Telemetry, providers: _Providers) -> None:
        scope = ("apprentice", version("apprentice"))
        self._content = settings.capture_content
        self._tracer = providers.tracers.get_tracer(*scope)
        self._logger = providers.loggers.get_logger(*scope)
        meter = providers.meters.get_meter(*scope)
        self._seconds = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=TOKENS,
        )
        self._names: set[str] = set()

    @contextmanager
    def request(self, task: TaskConfig) -> Iterator[None]:
        attributes: _Attributes = {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.workflow.name": task.name,
            "gen_ai.output.type": "json",
            "apprentice.task": task.name,
        }
        with self._span(f"run {task.name}", SpanKind.INTERNAL, attributes) as span:
            before = _SEEN.set(_Seen(span, task.evaluator_settings[0]))
            try:
                yield
            finally:
                _SEEN.reset(before)

    @contextmanager
    def call(self, asked: Asked) -> Iterator[Told]:
        named = _named(asked)
        # A probe is started by a request and outlives it: it is no part of it.
        alone = asked.purpose == "probe"
        seen = None if alone else _SEEN.get()
        kind = SpanKind.INTERNAL if asked.remote is None else SpanKind.CLIENT
        name = f"{named['gen_ai.operation.name']} {asked.model}"
        measured, usage, started = dict(named), None, time.perf_counter()
        try:
            with self._span(name, kind, named | _parameters(asked.remote), Context() if alone else None) as span:
                if seen is not None:
                    seen.answers[asked.purpose] = trace.set_span_in_context(span)

                def told(answer: Answer, cost: Micros, useful: bool) -> None:
                    nonlocal usage
                    usage = answer.usage
                    span.set_attributes(_answered(answer, cost))
                    if not useful:
                        _failed(span, "InvalidAnswer")
                        measured["error.type"] = "InvalidAnswer"
                    if answer.model and (answer.model in self._names or len(self._names) < _MOST_NAMES):
                        self._names.add(answer.model)
                        measured["gen_ai.response.model"] = answer.model

                try:
                    yield told
                except BaseException as error:
                    usage = getattr(error, "usage", None)  # an answer of no use was paid for, too
                    span.set_attributes(_used(usage))
                    measured["error.type"] = type(error).__name__
                    raise
        finally:
            self._seconds.record(time.perf_counter() - started, measured)
            self._count(usage, {key: value for key, value in measured.items() if key != "error.type"})

    def _count(self, usage: Usage | None, measured: _Attributes) -> None:
        if usage is not None:
            self._tokens.record(usage.input_tokens, measured | {"gen_ai.token.type": "input"})
            self._tokens.record(usage.output_tokens, measured | {"gen_ai.token.type": "output"})

    def recorded(self, record: Record, *, again: bool = False) -> None:
        if (seen := _SEEN.get()) is None:
            return
        seen.span.set_attributes(_decided(record, again))
        if self._content:
            seen.span.set_attributes(_content(record))
        if not again:
            self._judged(seen, "local", record.score, record)
            self._judged(seen, "repeat", record.repeat, record)
            self._judged(seen, "canary", record.rival, record)

    def _judged(self, seen: _Seen, who: str, score: Score | None, record: Record) -> None:
        """Tell the verdict, in the context of the answer that it is about."""
        if score is None or who not in seen.answers:
            return
        told: _Attributes = {
            "gen_ai.evaluation.name": seen.evaluator,
            "gen_ai.evaluation.score.value": score.value,
            "gen_ai.evaluation.score.label": {1.0: "match", 0.0: "mismatch"}.get(score.value, "partial"),
            "apprentice.task": record.task,
            "apprentice.request.id": record.request_id,
            "apprentice.evaluated": who,
            "apprentice.audit": record.decision.audit,
        }
        version = record.rival_version if who == "canary" else record.version
        if who != "repeat" and version is not None:
            told["apprentice.version"] = version
        self._logger.emit(event_name="gen_ai.evaluation.result", attributes=told, context=seen.answers[who])

    @contextmanager
    def continued(self, headers: Mapping[str, str]) -> Iterator[None]:
        if trace.get_current_span().get_span_context().is_valid:  # somebody around us has looked at them already
            yield
            return
        before = attach(propagate.extract(headers))
        try:
            yield
        finally:
            detach(before)

    @contextmanager
    def _span(
        self, name: str, kind: SpanKind, attributes: _Attributes, context: Context | None = None
    ) -> Iterator[Span]:
        """A span that says of an error only what kind it is: the text may be a customer's."""
        with self._tracer.start_as_current_span(
            name, context, kind, attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                _failed(span, type(error).__name__)
                raise


# --- what is said -----------------------------------------------------------------------------------------------------


def _named(asked: Asked) -> _Attributes:
    """What tells one call from another, on spans and in metrics."""
    named: _Attributes = {
        "gen_ai.operation.name": _OPERATIONS.get(asked.provider, "chat"),
        "gen_ai.provider.name": _PROVIDERS.get(asked.provider, asked.provider),
        "gen_ai.request.model": asked.model,
        "apprentice.task": asked.task,
        "apprentice.purpose": asked.purpose,
    }
    if asked.remote is not None and asked.remote.base_url is not None and asked.remote.host is not None:
        parts = urlsplit(asked.remote.base_url)
        named["server.address"] = asked.remote.host
        named["server.port"] = parts.port or (443 if parts.scheme == "https" else 80)
    return named


def _parameters(remote: Remote | None) -> _Attributes:
    said: _Attributes = {"gen_ai.output.type": "json"}
    if remote is not None:
        said["gen_ai.request.max_tokens"] = remote.max_tokens
        if remote.temperature is not None:
            said["gen_ai.request.temperature"] = remote.temperature
    return said


def _answered(answer: Answer, cost: Micros) -> _Attributes:
    said: _Attributes = {
        "gen_ai.response.finish_reasons": [_finish(answer)],
        "apprentice.cost_usd": cost / 1e6,
    }
    if answer.model:
        said["gen_ai.response.model"] = answer.model
    if answer.provider_request_id:
        said["apprentice.provider_request_id"] = answer.provider_request_id
    if answer.confidence is not None:
        said["apprentice.confidence"] = answer.confidence
    return said | _used(answer.usage)


def _finish(answer: Answer) -> str:
    return _FINISHES.get(answer.finish, answer.finish)


def _used(usage: Usage | None) -> _Attributes:
    if usage is None:
        return {}
    found = {
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens or None,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
    }
    return {name: tokens for name, tokens in found.items() if tokens is not None}


def _content(record: Record) -> _Attributes:
    """What was asked and answered as far as it is kept, in the conventions' shape."""
    if record.input is None:
        return {}
    asked = {"role": "user", "parts": [{"type": "text", "content": _as_json(record.input)}]}
    told: _Attributes = {"gen_ai.input.messages": _as_json([asked])}
    if (answer := record.remote if record.served == "remote" else record.local) is not None and record.served:
        parts = [{"type": "text", "content": _as_json(answer.output)}]
        given = {"role": "assistant", "parts": parts, "finish_reason": _finish(answer)}
        told["gen_ai.output.messages"] = _as_json([given])
    return told


def _as_json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def _decided(record: Record, again: bool) -> _Attributes:
    decision = record.decision
    found = {
        "apprentice.request.id": record.request_id,
        "apprentice.source": record.served,
        "apprentice.version": record.version,
        "apprentice.phase": decision.phase,
        "apprentice.route": decision.route,
        "apprentice.reason": decision.reason,
        "apprentice.audit": decision.audit,
        "apprentice.audit.probability": decision.p,
        "apprentice.level": decision.level,
        "apprentice.confidence": None if record.local is None else record.local.confidence,
        "apprentice.score": None if record.score is None else record.score.value,
        "apprentice.cost_usd": 0.0 if again else record.cost / 1e6,
        "apprentice.again": again or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _failed(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


# --- where it goes ----------------------------------------------------------------------------------------------------


def _of_the_program() -> _Providers:
    return _Providers(trace.get_tracer_provider(), metrics.get_meter_provider(), logs.get_logger_provider())


@cache
def _own() -> _Providers:
    """Providers that send by OTLP over HTTP from threads of their own, and what is left when the process ends."""
    try:
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise MissingExtra("opentelemetry-exporter-otlp-proto-http", "otel") from error
    sent = {signal: _is_sent(signal) for signal in ("TRACES", "METRICS", "LOGS")}
    own = {"name": "apprentice", "version": version("apprentice"), "instance.id": str(uuid.uuid4())}
    resource = Resource.create({f"service.{key}": value for key, value in own.items()})
    resource = resource.merge(OTELResourceDetector().detect())  # what the variables say comes first
    tracers = TracerProvider(resource=resource)
    if sent["TRACES"]:
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    readers = [PeriodicExportingMetricReader(OTLPMetricExporter())] if sent["METRICS"] else []
    loggers = LoggerProvider(resource=resource)
    if sent["LOGS"]:
        loggers.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter()))
    return _Providers(tracers, MeterProvider(readers, resource=resource), loggers)


def _is_sent(signal: str) -> bool:
    """Whether the variables want this signal to be sent. Raises ConfigError where they want it sent in another way."""
    exporter = os.environ.get(f"OTEL_{signal}_EXPORTER") or "otlp"
    protocols = (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((os.environ[name] for name in protocols if os.environ.get(name)), "http/protobuf")
    if exporter == "none":
        return False
    if exporter != "otlp" or protocol != "http/protobuf":
        raise ConfigError(
            f"telemetry: {signal.lower()} should go by {exporter} ({protocol}), which `export: true` does not do",
            hint=f"set OTEL_{signal}_EXPORTER=otlp or none, and OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf",
        )
    return True
