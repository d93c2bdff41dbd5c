"""Logs as the other tools write them, made up: three requests to sort a mail, and rows beside them that are of no use."""

from __future__ import annotations

import csv
import io
import json
from typing import NamedTuple

from apprentice.types import Json

SYSTEM = "Sort the mail. Answer with one JSON object."
ASKED: list[Json] = ['{"text":"where is my parcel?"}', '{"text":"the pear was ripe"}', '{"text":"Grüße, \\"quoted\\""}']
ANSWERED: list[Json] = ['{"kind":"tool"}', '{"kind": "fruit"}', '```json\n{"kind":"animal"}\n```']
ROWS = list(zip(ASKED, ANSWERED, strict=True))
MODEL = "deepseek-chat"
PLACE = "openai@api.deepseek.com"
AT = 1_772_359_200.0  # 2026-03-01T10:00:00Z, the first; the others follow by the hour


class Sample(NamedTuple):
    text: str
    settings: dict[str, Json] = {}  # noqa: RUF012  (nothing changes it)
    inputs: list[Json] = ASKED
    outputs: list[Json] = ANSWERED
    suffix: str = ".jsonl"
    model: str = MODEL
    provider: str = PLACE


def lines(*rows: Json) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)


def messages(asked: Json) -> list[Json]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def completion(number: int, answered: Json, *, finish: str = "stop") -> dict[str, Json]:
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": int(AT) + 3600 * number,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answered, "refusal": None},
                "logprobs": None,
                "finish_reason": finish,
            }
        ],
        "usage": {"prompt_tokens": 40, "completion_tokens": 8, "total_tokens": 48},
    }


def openai_pairs() -> Sample:
    rows = [
        {
            "provider": "deepseek",
            "request": {"model": MODEL, "messages": messages(asked), "temperature": 0},
            "response": completion(number, answered),
        }
        for number, (asked, answered) in enumerate(ROWS)
    ]
    cut = rows[0] | {"response": completion(9, '{"kind":', finish="length")}
    return Sample(lines(*rows, cut, rows[0] | {"response": {"error": {"message": "overloaded"}}}))


def openai_finetuning() -> Sample:
    rows = [{"messages": [*messages(asked), {"role": "assistant", "content": answered}]} for asked, answered in ROWS]
    return Sample(lines(*rows, {"messages": messages("no answer")}), model="", provider="?@?")


def openai_batch_requests() -> str:
    return lines(
        *(
            {
                "custom_id": f"row-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": MODEL, "messages": messages(asked), "max_tokens": 64},
            }
            for number, asked in enumerate(ASKED)
        )
    )


def openai_batch(requests: str) -> Sample:
    """Results; they come in another order than the requests."""
    rows = [
        {
            "id": f"batch_req_{number}",
            "custom_id": f"row-{number}",
            "response": {"status_code": 200, "request_id": f"r{number}", "body": completion(number, answered)},
            "error": None,
        }
        for number, (_, answered) in enumerate(ROWS)
    ]
    failed = {"id": "x", "custom_id": "row-1", "response": {"status_code": 500, "body": {}}, "error": None}
    return Sample(
        lines(*reversed(rows), failed, rows[0] | {"custom_id": "unknown"}),
        {"requests": requests},
        ASKED[::-1],
        ANSWERED[::-1],
        provider="?@?",
    )


def openai_responses() -> Sample:
    rows = [
        {
            "request": {"model": MODEL, "input": messages(asked)},
            "response": {
                "id": f"resp_{number}",
                "object": "response",
                "created_at": int(AT) + 3600 * number,
                "status": "completed",
                "model": MODEL,
                "output": [
                    {"type": "reasoning", "summary": []},
                    {
                        "type": "message",
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": answered, "annotations": []}],
                    },
                ],
                "usage": {"input_tokens": 40, "output_tokens": 8, "output_tokens_details": {"reasoning_tokens": 3}},
            },
        }
        for number, (asked, answered) in enumerate(ROWS)
    ]
    return Sample(lines(*rows), provider="?@?")


def litellm_payload() -> Sample:
    rows = [
        {
            "id": f"chatcmpl-{number}",
            "trace_id": f"t{number}",
            "call_type": "acompletion",
            "stream": False,
            "response_cost": 0.0000285,
            "status": "success",
            "custom_llm_provider": "deepseek",
            "total_tokens": 48,
            "prompt_tokens": 40,
            "completion_tokens": 8,
            "startTime": AT + 3600 * number + 0.25,
            "endTime": AT + 3600 * number + 1.5,
            "model": f"deepseek/{MODEL}",
            "model_group": "sorter",
            "api_base": "https://api.deepseek.com/beta",
            "metadata": {"user_api_key_hash": "88dc28"},
            "cache_hit": False,
            "request_tags": [],
            "messages": messages(asked),
            "response": completion(number, answered),
            "model_parameters": {"temperature": 0},
            "hidden_params": {"model_id": "1"},
        }
        for number, (asked, answered) in enumerate(ROWS)
    ]
    failed = rows[0] | {"status": "failure", "error_str": "429", "response": None}
    return Sample(lines(*rows, failed, rows[0] | {"call_type": "aembedding"}))


def litellm_spend() -> Sample:
    rows = [
        {
            "request_id": f"chatcmpl-{number}",
            "call_type": "acompletion",
            "api_key": "88dc28",
            "spend": 0.0000285,
            "total_tokens": 48,
            "prompt_tokens": 40,
            "completion_tokens": 8,
            "startTime": f"2026-03-01T{10 + number}:00:00.250000+00:00",
            "endTime": f"2026-03-01T{10 + number}:00:01+00:00",
            "model": MODEL,
            "custom_llm_provider": "deepseek",
            "api_base": "",
            "cache_hit": "False",
            "messages": json.dumps(messages(asked)) if number else {},
            "proxy_server_request": json.dumps({"model": "sorter", "messages": messages(asked)}),
            "response": json.dumps(completion(number, answered)),
            "status": "success",
        }
        for number, (asked, answered) in enumerate(ROWS)
    ]
    return Sample(lines(*rows, rows[0] | {"proxy_server_request": "{}"}, rows[0] | {"response": {}}))


def _observation(number: int, asked: Json, answered: Json) -> dict[str, Json]:
    return {
        "id": f"obs-{number}",
        "traceId": f"t{number}",
        "type": "GENERATION",
        "name": "sort",
        "startTime": f"2026-03-01T{10 + number}:00:00.000Z",
        "endTime": f"2026-03-01T{10 + number}:00:01.000Z",
        "level": "DEFAULT",
        "model": MODEL,
        "modelParameters": {"temperature": 0},
        "input": {"messages": messages(asked)} if number else messages(asked),
        "output": {"role": "assistant", "content": answered} if number else answered,
        "metadata": {"ls_provider": "deepseek"},
        "usageDetails": {"input": 40, "output": 8, "total": 48},
        "costDetails": {"input": 0.00002, "output": 0.0000085, "total": 0.0000285},
    }


def langfuse_api() -> Sample:
    rows = [_observation(number, asked, answered) for number, (asked, answered) in enumerate(ROWS)]
    return Sample(lines(*rows, rows[0] | {"type": "SPAN"}, rows[0] | {"level": "ERROR", "output": None}))


def langfuse_blob() -> Sample:
    """Names with "_", and what was asked and answered as text."""
    rows = [
        {
            "id": f"obs-{number}",
            "trace_id": f"t{number}",
            "type": "GENERATION",
            "start_time": f"2026-03-01 {10 + number}:00:00.000000",
            "input": json.dumps(messages(asked)),
            "output": json.dumps({"role": "assistant", "content": answered}),
            "provided_model_name": MODEL,
            "usage_details": {"input": 40, "output": 8, "total": 48},
            "cost_details": {"total": 0.0000285},
            "total_cost": 0.0000285,
            "metadata": {},
        }
        for number, (asked, answered) in enumerate(ROWS)
    ]
    return Sample(lines(*rows), provider="?@?")


def langfuse_table() -> Sample:
    rows = [_observation(number, asked, answered) for number, (asked, answered) in enumerate(ROWS)]
    cells = [
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows
    ]
    return Sample(table(*cells), suffix=".csv")


def tensorzero_json() -> Sample:
    rows = [
        {
            "id": f"019ca8eb-c{number}00-7000-8000-000000000000",
            "function_name": "sort",
            "variant_name": "baseline",
            "episode_id": f"019ca8eb-c{number}00-7000-8000-000000000001",
            "input": json.dumps(
                {
                    "system": SYSTEM,
                    "messages": [{"role": "user", "content": [{"type": "text", "text": asked}]}],
                }
            ),
            "output": json.dumps({"raw": answered, "parsed": None if number else {"kind": "tool"}}),
            "output_schema": "{}",
            "inference_params": "{}",
            "processing_time_ms": 900,
            "timestamp": f"2026-03-01 {10 + number}:00:00",
            "tags": {},
        }
        for number, (asked, answered) in enumerate(ROWS)
    ]
    other = rows[0] | {"function_name": "other"}
    empty = rows[0] | {"output": json.dumps({"raw": None, "parsed": None})}
    return Sample(
        lines(*rows, other, empty),
        {"function": "sort"},
        outputs=[{"kind": "tool"}, *ANSWERED[1:]],
        model="",
        provider="?@?",
    )


def tensorzero_model() -> Sample:
    rows = [
        {
            "id": f"019ca8eb-c{number}00-7000-8000-000000000002",
            "inference_id": f"019ca8eb-c{number}00-7000-8000-000000000000",
            "raw_request": "{}",
            "model_name": f"deepseek::{MODEL}",
            "model_provider_name": "deepseek",
            "input_tokens": 40,
            "output_tokens": 8,
            "system": SYSTEM,
            "input_messages": json.dumps([{"role": "user", "content": [{"type": "text", "text": asked}]}]),
            "output": json.dumps([{"type": "thought", "text": "a mail"}, {"type": "text", "text": answered}]),
            "finish_reason": "stop",
        }
        for number, (asked, answered) in enumerate(ROWS)
    ]
    return Sample(lines(*rows, rows[0] | {"finish_reason": "length"}))


def attribute(key: str, value: Json) -> Json:
    return {"key": key, "value": any_value(value)}


def any_value(value: Json) -> Json:
    """The value as OTLP's JSON has it."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [any_value(item) for item in value]}}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": [attribute(key, item) for key, item in value.items()]}}
    return {"stringValue": value}


def span(number: int, more: dict[str, Json], *, events: list[Json] | None = None, code: int = 1) -> Json:
    told = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "deepseek",
        "gen_ai.request.model": "deepseek-chat-latest",
        "gen_ai.response.model": MODEL,
        "gen_ai.response.id": f"chatcmpl-{number}",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": 8,
        "server.address": "api.deepseek.com",
    }
    return {
        "traceId": f"{number:032x}",
        "spanId": f"{number:016x}",
        "name": f"chat {MODEL}",
        "kind": 3,
        "startTimeUnixNano": str(int(AT + 3600 * number) * 10**9),
        "attributes": [attribute(key, value) for key, value in (told | more).items()],
        "events": events or [],
        "status": {"code": code},
    }


def spans(*found: Json) -> Json:
    return {"resourceSpans": [{"resource": {"attributes": []}, "scopeSpans": [{"scope": {}, "spans": list(found)}]}]}


def parts(role: str, text: Json) -> Json:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def otel_spans() -> Sample:
    """Messages as JSON text, as values, and in the event; a span of a tool is none of ours, and one that failed is no use."""
    said = [
        {
            "gen_ai.input.messages": [parts("system", SYSTEM), parts("user", asked)],
            "gen_ai.output.messages": [parts("assistant", answered) | {"finish_reason": "stop"}],
        }
        for asked, answered in ROWS
    ]
    event = {
        "name": "gen_ai.client.inference.operation.details",
        "attributes": [attribute(key, value) for key, value in said[2].items()],
    }
    tool = span(7, {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "search"})
    text = {key: json.dumps(value) for key, value in said[0].items()}
    return Sample(
        lines(
            spans(span(0, text), tool, span(1, said[1])),
            spans(span(2, {}, events=[event])),
            spans(span(3, text, code=2)),
            spans(span(4, {})),
        )
    )


def otel_events() -> Sample:
    """Earlier conventions: an event for each message, numbered attributes, and a log record."""
    messages = [
        {"name": "gen_ai.system.message", "attributes": [attribute("content", SYSTEM)]},
        {"name": "gen_ai.user.message", "attributes": [attribute("content", ASKED[0])]},
        {
            "name": "gen_ai.choice",
            "attributes": [attribute("message", json.dumps({"role": "assistant", "content": ANSWERED[0]}))],
        },
    ]
    numbered = {
        "gen_ai.prompt.0.role": "system",
        "gen_ai.prompt.0.content": SYSTEM,
        "gen_ai.prompt.1.role": "user",
        "gen_ai.prompt.1.content": ASKED[1],
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.content": ANSWERED[1],
    }
    record = span(
        2,
        {
            "gen_ai.input.messages": [parts("user", ASKED[2])],
            "gen_ai.output.messages": [parts("assistant", ANSWERED[2])],
        },
    )
    logs = [record | {"eventName": "gen_ai.client.inference.operation.details"}, record | {"eventName": "other"}]
    return Sample(
        lines(
            spans(span(0, {}, events=messages), span(1, numbered)),
            {"resourceLogs": [{"scopeLogs": [{"logRecords": logs}]}]},
        )
    )


def table(*rows: dict[str, Json], delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


TEXTS = ["where is my parcel?", "the pear, was ripe", 'Grüße, "quoted"']
KINDS = ["tool", "fruit", "animal"]


def csv_mapped() -> Sample:
    rows = [
        {
            "mail": text,
            "class": kind,
            "llm": MODEL,
            "where": "deepseek",
            "day": f"2026-03-0{number + 1}",
            "usd": "0.00003",
        }
        for number, (text, kind) in enumerate(zip(TEXTS, KINDS, strict=True))
    ]
    mapping = {
        "input.text": "mail",
        "output.kind": "class",
        "model": "llm",
        "provider": "where",
        "at": "day",
        "cost": "usd",
    }
    return Sample(
        table(*rows, rows[0] | {"class": " "}, delimiter=";"),
        {"map": mapping, "delimiter": ";"},
        [{"text": text} for text in TEXTS],
        [{"kind": kind} for kind in KINDS],
        ".csv",
    )


def csv_named() -> Sample:
    """Columns that are called as what they are need no mapping."""
    rows = [{"input": asked, "output": answered, "id": number} for number, (asked, answered) in enumerate(ROWS[:2])]
    return Sample(table(*rows), inputs=ASKED[:2], outputs=ANSWERED[:2], suffix=".csv", model="", provider="?@?")
