"""OpenTelemetry's spans and logs of generative AI, in OTLP's JSON, as the Collector's file exporter writes them.

Sources: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ (attributes `gen_ai.*`, and the event
`gen_ai.client.inference.operation.details`), its earlier events of one message each (`gen_ai.user.message`, `gen_ai.choice`,
`gen_ai.content.prompt`, `gen_ai.content.completion`), the numbered attributes of OpenLLMetry (`gen_ai.prompt.0.content`), and
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding. Prompts are there only where the program captures content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from apprentice.importers import (
    Imported,
    Importer,
    Log,
    Unusable,
    answered,
    asked,
    count,
    dollars,
    finished,
    mapping,
    mappings,
    moment,
    place_of,
    text_of,
    written,
)
from apprentice.types import Json, Usage

_OPERATIONS = ("chat", "text_completion", "generate_content", "")
_DETAILS = "gen_ai.client.inference.operation.details"
_NUMBERED = re.compile(r"gen_ai\.(prompt|completion)\.(\d{1,4})\.(role|content)")


def build() -> Importer:
    """An importer of lines of `resourceSpans` and `resourceLogs`; spans of anything but a model's answer are passed over."""
    return Log(_read)


def _read(row: Mapping[str, Json]) -> Iterator[Imported]:
    spans = [span for scope in _scopes(row, "Span") for span in mappings(scope.get("spans"))]
    logs = [record for scope in _scopes(row, "Log") for record in mappings(scope.get("logRecords"))]
    if not spans and not logs:
        raise Unusable("has no spans and no logs")
    details = [one for one in logs if one.get("eventName") == _DETAILS or _named(one) == _DETAILS]
    for found in (*spans, *details):
        try:
            told = _attributes(found.get("attributes"))
            answers = told.get("gen_ai.operation.name", "") in _OPERATIONS
            if answers and any(key.startswith("gen_ai.") for key in told):
                yield _answer(found, told)
        except Unusable as problem:
            yield Imported(problem=str(problem))


def _named(record: Mapping[str, Json]) -> str:
    """The name of an event as it was told before logs had `eventName`."""
    named = (one for one in mappings(record.get("attributes")) if one.get("key") == "event.name")
    return text_of(mapping(next(named, {}).get("value")).get("stringValue"))


def _scopes(row: Mapping[str, Json], kind: str) -> list[dict[str, Json]]:
    scopes = f"scope{kind}s"
    return [scope for resource in mappings(row.get(f"resource{kind}s")) for scope in mappings(resource.get(scopes))]


def _answer(span: Mapping[str, Json], told: dict[str, Json]) -> Imported:
    if mapping(span.get("status")).get("code") in (2, "STATUS_CODE_ERROR") or told.get("error.type"):
        raise Unusable("failed at the provider")
    prompt, answers = _said(span, told)
    if not prompt or not answers:
        raise Unusable("its prompt and answer were not captured")
    input, turns = asked(prompt)
    reasons = told.get("gen_ai.response.finish_reasons")
    for reason in (*(reasons if isinstance(reasons, list) else []), answers[0].get("finish_reason")):
        finished(reason)
    counts = [
        count(told.get(f"gen_ai.usage.{new}", told.get(f"gen_ai.usage.{old}")))
        for new, old in (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens"))
    ]
    cached = count(told.get("gen_ai.usage.cache_read.input_tokens")) or 0
    return Imported(
        input=input,
        turns=turns,
        output=answered(answers[0]),
        model=text_of(told.get("gen_ai.response.model"), told.get("gen_ai.request.model")),
        provider=place_of(
            text_of(told.get("gen_ai.provider.name"), told.get("gen_ai.system")), text_of(told.get("server.address"))
        ),
        at=moment(span.get("startTimeUnixNano", span.get("timeUnixNano"))),
        usage=None
        if counts[0] is None or counts[1] is None
        else Usage(input_tokens=counts[0], output_tokens=counts[1], cached_tokens=min(cached, counts[0])),
        cost=dollars(told.get("gen_ai.usage.cost")),
        id=text_of(told.get("gen_ai.response.id"), span.get("spanId")),
    )


def _said(span: Mapping[str, Json], told: dict[str, Json]) -> tuple[list[dict[str, Json]], list[dict[str, Json]]]:
    """The messages before the answer, and the answers: of the span, else of its events."""
    events = [
        (text_of(event.get("name")), _attributes(event.get("attributes"))) for event in mappings(span.get("events"))
    ]
    for attributes in (told, *(attributes for name, attributes in events if name == _DETAILS)):
        prompt = mappings(written(attributes.get("gen_ai.input.messages")))
        answers = mappings(written(attributes.get("gen_ai.output.messages")))
        if prompt and answers:
            return prompt, answers
    prompt, answers = _numbered(told)
    for name, attributes in events:
        if name == "gen_ai.content.prompt":
            prompt += _content(attributes.get("gen_ai.prompt"), "user")
        elif name == "gen_ai.content.completion":
            answers += _content(attributes.get("gen_ai.completion"), "assistant")
        elif name == "gen_ai.choice":
            message = mapping(written(attributes.get("message"))) or attributes
            answers.append(message | {"finish_reason": attributes.get("finish_reason")})
        elif name in ("gen_ai.user.message", "gen_ai.assistant.message", "gen_ai.system.message"):
            prompt.append({"role": name.split(".")[1], "content": attributes.get("content")})
    return prompt, answers


def _content(value: Json, role: str) -> list[dict[str, Json]]:
    found = written(value)
    return mappings(found) or ([{"role": role, "content": found}] if found not in (None, "") else [])


def _numbered(told: Mapping[str, Json]) -> tuple[list[dict[str, Json]], list[dict[str, Json]]]:
    sides: dict[str, dict[int, dict[str, Json]]] = {"prompt": {}, "completion": {}}
    for key, value in told.items():
        if (found := _NUMBERED.fullmatch(key)) is not None:
            sides[found[1]].setdefault(int(found[2]), {})[found[3]] = value
    prompt, answers = ([side[number] for number in sorted(side)] for side in sides.values())
    return prompt, answers


def _attributes(found: Json) -> dict[str, Json]:
    return {text_of(one.get("key")): _plain(one.get("value")) for one in mappings(found)}


def _plain(value: Json, depth: int = 0) -> Any:
    """The plain value of OTLP's AnyValue. Raises Unusable for one that is nested without end."""
    if depth > 64:
        raise Unusable("is nested too deeply")
    given = mapping(value)
    if "arrayValue" in given:
        return [_plain(item, depth + 1) for item in mappings(mapping(given["arrayValue"]).get("values"))]
    if "kvlistValue" in given:
        pairs = mappings(mapping(given["kvlistValue"]).get("values"))
        return {text_of(pair.get("key")): _plain(pair.get("value"), depth + 1) for pair in pairs}
    if "intValue" in given:
        return count(given["intValue"])
    return next((given[key] for key in ("stringValue", "doubleValue", "boolValue") if key in given), None)
