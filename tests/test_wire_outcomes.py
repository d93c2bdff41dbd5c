"""What an answer's status, codes, headers and events say: about money, about waiting, about another try."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import wire
from apprentice.types import Json

OK = b'{"choices": []}'


def openai(code: str, type_: str = "some_type") -> bytes:
    return json.dumps(
        {"error": {"message": "prose that says quota, rate limit and overloaded", "type": type_, "code": code}}
    ).encode()


def anthropic(type_: str, **details: str) -> bytes:
    return json.dumps({"type": "error", "error": {"type": type_, "message": "prose", "details": details}}).encode()


def google(code: int, status: str, *details: Json) -> bytes:
    error = {"code": code, "message": "prose that says quota and overloaded", "status": status, "details": [*details]}
    return json.dumps({"error": error}).encode()


def quota(id: str) -> dict[str, Json]:
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": id, "quotaValue": "15"}]}


def sse(*data: str, name: str = "") -> bytes:
    return "".join((f"event: {name}\n" if name else "") + f"data: {part}\n\n" for part in data).encode()


HTML = b"<html><body>rate_limit_exceeded insufficient_quota</body></html>"
type Rows = list[tuple[int, bytes, wire.Kind, bool]]
TABLE: Rows = [
    # success
    (200, OK, "answered", False),
    (201, OK, "answered", False),
    (200, b"{}", "answered", False),
    (200, b"\xef\xbb\xbf{}", "answered", False),
    (200, b"", "unknown", True),
    (200, HTML, "unknown", True),
    (200, b'{"choices": [', "unknown", True),
    (200, b"[]", "unknown", True),
    (200, b"null", "unknown", True),
    (200, b'{"a": NaN}', "unknown", True),
    (200, b'{"a": ' + b"9" * 5000 + b"}", "unknown", True),
    (200, b"[" * 100_000, "unknown", True),
    (200, b"\xff\xfe\xfa", "unknown", True),
    (200, b'{"choices": [], "error": null}', "answered", False),
    (200, openai("server_error"), "unknown", True),  # F48: told with a status of success
    (200, openai("insufficient_quota"), "unknown", False),
    (200, anthropic("overloaded_error"), "unknown", True),
    (200, anthropic("billing_error"), "unknown", False),
    (200, b'{"error": "no memory is left"}', "unknown", True),
    (200, b'{"status": "failed", "error": {"code": "server_error", "message": "x"}}', "unknown", True),
    (204, b"", "unknown", True),
    (202, b"", "unknown", True),
    # never followed
    (301, b"", "rejected", False),
    (302, HTML, "rejected", False),
    (307, b"", "rejected", False),
    (308, b"", "rejected", False),
    # the request, as OpenAI says it
    (400, openai("invalid_request_error"), "rejected", False),
    (400, openai("context_length_exceeded"), "rejected", False),
    (401, openai("invalid_api_key"), "rejected", False),
    (403, openai("unsupported_country_region_territory"), "rejected", False),
    (404, openai("model_not_found"), "rejected", False),
    (422, openai("invalid"), "rejected", False),
    (429, openai("rate_limit_exceeded"), "rejected", True),  # F46: the prose says quota
    (429, openai("slow_down"), "rejected", True),
    (429, openai("insufficient_quota"), "rejected", False),  # F45
    (429, openai("x", "insufficient_quota"), "rejected", False),
    (429, openai("credit_balance_exhausted"), "rejected", False),
    (429, openai("organization_spend_limit_exceeded"), "rejected", False),
    (429, openai("project_spend_limit_exceeded"), "rejected", False),
    (429, openai("organization_usage_limit_exceeded"), "rejected", False),
    (429, HTML, "rejected", True),
    (500, openai("server_error"), "unknown", True),
    (503, openai("server_is_overloaded"), "rejected", True),
    (503, openai("slow_down"), "rejected", True),
    (503, openai("x"), "unknown", True),
    (400, openai("unsupported_parameter"), "rejected", False),
    (400, openai("content_policy_violation"), "rejected", False),
    (400, openai("string_above_max_length"), "rejected", False),
    (403, openai("model_not_allowed"), "rejected", False),
    (413, openai("request_too_large"), "rejected", False),
    (415, openai("unsupported_media_type"), "rejected", False),
    (429, openai("tokens", "tokens"), "rejected", True),
    (429, openai("enforced_spend_limit_reached"), "rejected", False),
    (429, openai("billing_hard_limit_reached"), "rejected", False),
    (429, b"", "rejected", True),
    (429, b"[]", "rejected", True),
    (429, b'{"error": "slow down, insufficient_quota"}', "rejected", True),  # F46: a text is prose
    (429, b'{"error": {"code": 429, "type": null}}', "rejected", True),
    (500, b"", "unknown", True),
    (500, openai("slow_down"), "rejected", True),
    (502, openai("server_error"), "unknown", True),
    (503, b'{"error": "server_is_overloaded"}', "unknown", True),  # a text is prose
    # the request, as Anthropic says it
    (400, anthropic("invalid_request_error"), "rejected", False),
    (401, anthropic("authentication_error"), "rejected", False),
    (402, anthropic("billing_error"), "rejected", False),
    (403, anthropic("permission_error"), "rejected", False),
    (404, anthropic("not_found_error"), "rejected", False),
    (413, anthropic("request_too_large"), "rejected", False),
    (413, HTML, "rejected", False),  # F52: from a content network
    (429, anthropic("rate_limit_error"), "rejected", True),
    (429, anthropic("rate_limit_error", error_code="enforced_spend_limit_reached"), "rejected", False),
    (500, anthropic("api_error"), "unknown", True),
    (504, anthropic("timeout_error"), "unknown", True),
    (529, anthropic("overloaded_error"), "rejected", True),
    (529, HTML, "rejected", True),
    (500, anthropic("overloaded_error"), "rejected", True),
    (400, anthropic("billing_error"), "rejected", False),
    (429, anthropic("billing_error"), "rejected", False),
    (429, anthropic("rate_limit_error", error_code="acceleration"), "rejected", True),
    (500, anthropic("timeout_error"), "unknown", True),
    (502, anthropic("api_error"), "unknown", True),
    (503, anthropic("overloaded_error"), "rejected", True),
    (520, anthropic("overloaded_error"), "rejected", True),
    (529, b"", "rejected", True),
    # servers in OpenAI's format: Fireworks, Together, DeepSeek, vLLM, LiteLLM, and Google's own
    (402, openai("payment_required"), "rejected", False),
    (402, b'{"error": {"message": "Insufficient Balance", "type": "unknown_error", "code": "x"}}', "rejected", False),
    (402, HTML, "rejected", False),
    (412, openai("precondition_failed"), "rejected", False),
    (412, b"", "unknown", False),
    (400, b'{"detail": [{"loc": ["body"], "msg": "field required"}]}', "rejected", False),
    (422, b'{"detail": [{"loc": ["body"], "msg": "field required"}]}', "rejected", False),
    (404, b'{"detail": "Not Found"}', "rejected", False),
    (404, HTML, "rejected", False),
    (405, b"", "rejected", False),
    (400, b'[{"error": {"code": 400, "status": "INVALID_ARGUMENT"}}]', "rejected", False),
    (429, b'[{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}]', "rejected", True),
    (503, b'[{"error": {"code": 503, "status": "UNAVAILABLE"}}]', "unknown", True),
    (500, b'{"error": {"message": "CUDA out of memory", "type": "InternalServerError", "code": 500}}', "unknown", True),
    (507, b"", "unknown", True),
    (408, openai("request_timeout"), "unknown", True),
    (409, b"", "unknown", True),
    # others
    (400, b'{"detail": "no such field"}', "rejected", False),
    (400, b'{"object": "error", "message": "context", "code": 400}', "rejected", False),
    (400, HTML, "unknown", False),  # who says so is not the provider
    (400, b'{"error": {}}', "unknown", False),
    (408, openai("timeout"), "unknown", True),  # F61
    (409, openai("conflict"), "unknown", True),
    (425, b"", "unknown", True),
    (499, b"", "unknown", False),
    (501, b"", "unknown", False),
    (502, HTML, "unknown", True),
    (503, HTML, "unknown", True),
    (504, b"", "unknown", True),
    (520, HTML, "unknown", True),
    (524, HTML, "unknown", True),
    (600, b"", "unknown", True),
]
# Google documents that a 400 and a 500 are not charged; it alone.
FREE = frozenset({400, 500})
GOOGLE: Rows = [
    (400, google(400, "INVALID_ARGUMENT"), "rejected", False),
    (400, google(400, "FAILED_PRECONDITION"), "rejected", False),
    (400, google(400, "INVALID_ARGUMENT", {"reason": "API_KEY_INVALID"}), "rejected", False),
    (400, HTML, "unknown", False),  # who says so is not Google
    (401, google(401, "UNAUTHENTICATED"), "rejected", False),
    (402, google(402, "RESOURCE_EXHAUSTED"), "rejected", False),  # F45: what was paid in advance is used up
    (403, google(403, "PERMISSION_DENIED", {"reason": "BILLING_DISABLED"}), "rejected", False),
    (404, google(404, "NOT_FOUND"), "rejected", False),
    (413, HTML, "rejected", False),
    (429, google(429, "RESOURCE_EXHAUSTED"), "rejected", True),
    (429, google(429, "RESOURCE_EXHAUSTED", quota("GenerateRequestsPerMinutePerProjectPerModel")), "rejected", True),
    (429, google(429, "RESOURCE_EXHAUSTED", quota("GenerateRequestsPerDayPerProjectPerModel")), "rejected", False),
    (429, google(429, "RESOURCE_EXHAUSTED", quota("A"), quota("TokensPerDay-FreeTier")), "rejected", False),
    (429, google(429, "RESOURCE_EXHAUSTED", {"violations": [None, "PerDay"]}), "rejected", True),
    (429, google(429, "RESOURCE_EXHAUSTED", {"violations": "PerDay"}, "PerDay", None), "rejected", True),
    (429, HTML, "rejected", True),
    (499, google(499, "CANCELLED"), "rejected", False),
    (500, google(500, "INTERNAL"), "rejected", True),
    (500, google(500, "UNKNOWN"), "rejected", True),
    (500, HTML, "unknown", True),
    (500, b"", "unknown", True),
    (501, google(501, "UNIMPLEMENTED"), "unknown", False),
    (502, HTML, "unknown", True),
    (503, google(503, "UNAVAILABLE"), "unknown", True),
    (504, google(504, "DEADLINE_EXCEEDED"), "unknown", True),
    (200, google(503, "UNAVAILABLE"), "unknown", True),
    (200, b'{"candidates": []}', "answered", False),
]
STREAMED: Rows = [
    (200, sse('{"choices": []}', "[DONE]"), "answered", False),
    (200, sse('{"choices": []}'), "answered", False),  # whether it ended properly only its format tells
    (200, b"", "answered", False),
    (200, b": ping\n\n", "answered", False),
    (200, sse("", " "), "answered", False),
    (200, sse("{'no': 'JSON'}"), "unknown", True),
    (200, sse("[]"), "unknown", True),
    (200, sse('{"a": NaN}'), "unknown", True),
    (200, sse('{"choices": []}') + b"data: \xff\n\n", "unknown", True),
    (200, sse('{"choices": []}', openai("server_error").decode()), "unknown", True),  # F48
    (200, sse('{"choices": []}', openai("insufficient_quota").decode()), "unknown", False),
    (200, sse(anthropic("overloaded_error").decode(), name="error"), "unknown", True),
    (200, sse('{"type": "error", "code": "server_error", "message": "x"}'), "unknown", True),
    (200, sse('{"type": "error", "code": "insufficient_quota", "message": "x"}'), "unknown", False),
    (200, sse('{"type": "response.failed", "response": {"error": {"code": "server_error"}}}'), "unknown", True),
    (200, sse('{"type": "response.created", "response": {"error": null}}'), "answered", False),
    (200, sse(google(503, "UNAVAILABLE").decode()), "unknown", True),
    (429, sse(openai("insufficient_quota").decode()), "rejected", False),
    (429, sse(openai("rate_limit_exceeded").decode()), "rejected", True),
    (503, sse(openai("server_is_overloaded").decode()), "rejected", True),
    (400, sse(openai("invalid_request_error").decode()), "rejected", False),
    (400, sse("[DONE]"), "unknown", False),
]


@pytest.mark.parametrize(("status", "body", "kind", "retryable"), TABLE)
def test_the_outcome_is_read_off_status_and_code(status: int, body: bytes, kind: wire.Kind, retryable: bool) -> None:
    outcome = wire.classify(wire.Reply(status, {}, body))
    assert (outcome.kind, outcome.retryable, outcome.status) == (kind, retryable, status)


@pytest.mark.parametrize(("status", "body", "kind", "retryable"), GOOGLE)
def test_what_a_provider_documents_as_free_is_rejected(
    status: int, body: bytes, kind: wire.Kind, retryable: bool
) -> None:
    outcome = wire.classify(wire.Reply(status, {}, body), FREE)
    assert (outcome.kind, outcome.retryable, outcome.status) == (kind, retryable, status)
    without = wire.classify(wire.Reply(status, {}, body))
    assert without.kind == ("unknown" if status == 500 else kind)


@pytest.mark.parametrize(("status", "body", "kind", "retryable"), STREAMED)
def test_the_outcome_of_a_stream_is_read_off_its_events(
    status: int, body: bytes, kind: wire.Kind, retryable: bool
) -> None:
    outcome = wire.classify(wire.Reply(status, {"content-type": "text/event-stream; charset=utf-8"}, body))
    assert (outcome.kind, outcome.retryable, outcome.status) == (kind, retryable, status)


@given(status=st.integers(100, 999), body=st.binary(max_size=60), headers=st.dictionaries(st.text(), st.text()))
def test_no_answer_whatsoever_breaks_the_table(status: int, body: bytes, headers: dict[str, str]) -> None:
    outcome = wire.classify(wire.Reply(status, headers, body))
    assert (outcome.kind == "answered") <= (outcome.body is not None)
    assert outcome.problem is None or "\n" not in outcome.problem


def test_a_server_that_forbids_a_retry_is_obeyed() -> None:
    for status in (200, 408, 409, 429, 500, 503, 529):
        for body in (b"", openai("server_error"), openai("server_is_overloaded")):
            reply = wire.Reply(status, {"x-should-retry": "false"}, body)
            if body or status != 200:
                assert wire.classify(reply, FREE).retryable is False, reply
    assert wire.classify(wire.Reply(400, {"x-should-retry": "true"}, openai("x"))).retryable is False


def test_a_provider_cannot_write_a_second_line_into_a_log() -> None:
    body = b'{"error": {"message": "a\\nERROR forged \\u001b[31m\\ud800 \\u2028"}}'
    told = wire.classify(wire.Reply(400, {}, body)).problem
    assert told is not None
    assert told.isprintable()


DATE = "Wed, 21 Oct 2026 07:28:00 GMT"
AT = 1792567680.0


@pytest.mark.parametrize(
    ("headers", "wait"),
    [  # F44
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": " 3 "}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": DATE}, 20.0),
        ({"retry-after": "Wed, 21 Oct 2020 07:28:00 GMT"}, 0.0),
        ({"retry-after": DATE, "date": "Wed, 21 Oct 2026 07:27:55 GMT"}, 5.0),
        ({"retry-after": DATE, "date": "garbage"}, 20.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "NaN"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e309"}, None),
        ({"retry-after": "1e300"}, 86_400.0),
        ({"retry-after": "86400"}, 86_400.0),
        ({"retry-after": "99999999"}, 86_400.0),
        ({"retry-after": ""}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 99 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "2, 5"}, 5.0),  # two headers
        ({"retry-after": "-1, 5"}, 5.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "x", "retry-after": "7"}, 7.0),
        ({}, None),
    ],
)
def test_retry_after_is_understood_in_all_its_forms(headers: dict[str, str], wait: float | None) -> None:
    assert wire.retry_after(headers, AT - 20) == wait


@pytest.mark.parametrize(
    ("headers", "delay", "wait"),
    [
        ({}, "34.5s", 34.5),
        ({}, "0s", 0.0),
        ({}, "999999s", 86_400.0),
        ({}, "soon", None),
        ({}, 34, None),
        ({"retry-after": "7"}, "34s", 7.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9s"}, "soon", 9.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9s"}, "34s", 34.0),
    ],
)
def test_a_rate_limit_says_in_its_body_or_headers_when_it_is_over(
    headers: dict[str, str], delay: Json, wait: float | None
) -> None:
    body = google(429, "RESOURCE_EXHAUSTED", {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
    assert wire.classify(wire.Reply(429, headers, body)).retry_after == wait
    assert wire.classify(wire.Reply(500, {}, body)).retry_after is None


@given(value=st.text())
def test_no_retry_after_breaks_anything(value: str) -> None:
    wait = wire.retry_after({"retry-after": value, "retry-after-ms": value, "date": value}, 0.0)
    assert wait is None or 0 <= wait <= 86_400


def openai_limits(requests: str, tokens: str, reset: str = "6m0s") -> dict[str, str]:
    return {
        "x-ratelimit-remaining-requests": requests,
        "x-ratelimit-reset-requests": reset,
        "x-ratelimit-remaining-tokens": tokens,
        "x-ratelimit-reset-tokens": "20ms",
    }


def anthropic_limit(of: str, left: str, reset: str) -> dict[str, str]:
    return {f"anthropic-ratelimit-{of}-remaining": left, f"anthropic-ratelimit-{of}-reset": reset}


NOON = 1792584000.0  # 2026-10-21T12:00:00Z


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, 0.0),
        (openai_limits("1", "1000"), 0.0),
        (openai_limits("0", "1000"), 360.0),
        (openai_limits("0", "0"), 360.0),
        (openai_limits("5", "0"), 0.02),
        (openai_limits("5", "999"), 0.02),  # fewer than the call may need
        (openai_limits("0", "1000", "1s"), 1.0),
        (openai_limits("0", "1000", "59.56s"), 59.56),
        (openai_limits("0", "1000", "1h2m3.5s"), 3723.5),
        (openai_limits("0", "1000", "1d"), 86_400.0),
        (openai_limits("0", "1000", "9999h"), 86_400.0),
        (openai_limits("0", "1000", "250us"), 0.00025),
        (openai_limits("0", "1000", "12"), 12.0),  # seconds, as some servers write it
        (openai_limits("0", "1000", "12, 7"), 12.0),  # two headers
        (openai_limits("0", "1000", "1792584060"), 0.0),  # since 1970: no duration
        (openai_limits("0", "1000", "-5s"), 0.0),
        (openai_limits("0", "1000", "-5"), 0.0),
        (openai_limits("0", "1000", "NaN"), 0.0),
        (openai_limits("0", "1000", "1e309"), 0.0),
        (openai_limits("0", "1000", "1s2"), 0.0),
        (openai_limits("0", "1000", ""), 0.0),
        (openai_limits("0", "1000", "1s" * 99), 0.0),
        (openai_limits("-1", "-1"), 0.0),
        (openai_limits("none", ""), 0.0),
        (openai_limits("3, 0", "1000"), 360.0),
        ({"x-ratelimit-remaining-requests": "0"}, 0.0),
        ({"x-ratelimit-reset-requests": "6m"}, 0.0),
        (anthropic_limit("requests", "1", "2026-10-21T12:00:30Z"), 0.0),
        (anthropic_limit("requests", "0", "2026-10-21T12:00:30Z"), 30.0),
        (anthropic_limit("requests", "0", "2026-10-21T14:00:30.5+02:00"), 30.5),
        (anthropic_limit("requests", "0", "2026-10-21T11:59:00Z"), 0.0),
        (anthropic_limit("requests", "0", "2026-10-21T12:00:30"), 0.0),  # of which zone?
        (anthropic_limit("requests", "0", "0001-01-01T00:00:00+23:59"), 0.0),
        (anthropic_limit("requests", "0", "9999-12-31T23:59:59-23:59"), 86_400.0),
        (anthropic_limit("tokens", "999", "2026-10-21T12:00:30Z"), 30.0),
        (anthropic_limit("input-tokens", "0", "2026-10-21T12:00:30Z"), 30.0),
        (anthropic_limit("output-tokens", "1000", "2026-10-21T12:00:30Z"), 0.0),
        (
            anthropic_limit("tokens", "0", "2026-10-21T12:00:30Z")
            | anthropic_limit("requests", "0", "2026-10-21T12:00:10Z"),
            30.0,
        ),
        (
            anthropic_limit("requests", "0", "2026-10-21T12:00:30Z") | {"date": "Wed, 21 Oct 2026 12:00:20 GMT"},
            10.0,  # by the server's own clock
        ),
    ],
)
def test_the_next_call_waits_until_the_limits_allow_it(headers: dict[str, str], wait: float) -> None:
    assert wire.pause(headers, NOON, tokens=1000) == pytest.approx(wait)


@given(left=st.text() | st.integers().map(str), reset=st.text() | st.from_regex(r"[0-9hms.:TZ+-]+"))
def test_no_rate_limit_breaks_anything(left: str, reset: str) -> None:
    headers = openai_limits(left, left, reset) | anthropic_limit("requests", left, reset)
    assert 0 <= wire.pause(headers, 0.0) <= 86_400


@given(st.integers(0, 59), st.integers(0, 59), st.integers(0, 23), st.integers(0, 999))
def test_a_duration_is_the_sum_of_its_parts(seconds: int, minutes: int, hours: int, millis: int) -> None:
    told = openai_limits("0", "1", f"{hours}h{minutes}m{seconds}s{millis}ms")
    assert wire.pause(told, 0.0) == pytest.approx(hours * 3600 + minutes * 60 + seconds + millis / 1000)


@pytest.mark.parametrize(
    ("headers", "body", "id"),
    [
        ({"x-request-id": "req_1", "request-id": "req_2"}, {"id": "x"}, "req_1"),
        ({"request-id": "req_2"}, None, "req_2"),
        ({"x-request-id": ""}, {"request_id": "req_3", "id": "msg_1"}, "req_3"),
        ({}, {"id": "chatcmpl-1"}, "chatcmpl-1"),
        ({}, {"responseId": "r-1"}, "r-1"),
        ({}, {"id": 7, "responseId": None}, ""),
        ({"x-request-id": "a\nERROR forged" + "x" * 200}, {}, ("a ERROR forged" + "x" * 200)[:100]),
        ({}, None, ""),
    ],
)
def test_the_providers_own_name_of_an_attempt_is_found(headers: dict[str, str], body: Json, id: str) -> None:
    assert wire.request_id(headers, body) == id


@pytest.mark.parametrize(
    ("status", "body", "no_money"),
    [  # F45
        (402, b"", True),
        (402, google(402, "RESOURCE_EXHAUSTED"), True),
        (403, google(403, "PERMISSION_DENIED", {"reason": "BILLING_DISABLED"}), True),
        (429, openai("insufficient_quota"), True),
        (429, openai("x", "insufficient_quota"), True),
        (429, anthropic("rate_limit_error", error_code="enforced_spend_limit_reached"), True),
        (429, google(429, "RESOURCE_EXHAUSTED", quota("RequestsPerDay")), True),
        (200, openai("insufficient_quota"), True),
        (429, openai("rate_limit_exceeded"), False),
        (429, google(429, "RESOURCE_EXHAUSTED", quota("RequestsPerMinute")), False),
        (400, openai("invalid_request_error"), False),
        (200, OK, False),
        (500, HTML, False),
    ],
)
def test_an_account_without_money_is_told_apart(status: int, body: bytes, no_money: bool) -> None:
    outcome = wire.classify(wire.Reply(status, {}, body))
    assert outcome.no_money is no_money
    assert not (no_money and outcome.retryable)


# --- server-sent events -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "found"),
    [  # F50
        ("data: 1\n\n", [("message", "1")]),
        ("data: 1\r\n\r\n", [("message", "1")]),
        ("data: 1\r\r", [("message", "1")]),
        ("data: 1\r\n\ndata: 2\n\r\n", [("message", "1"), ("message", "2")]),
        ("\ufeffdata: 1\n\n", [("message", "1")]),
        ("\ufeff\ufeffdata: 1\n\n", []),
        (": a comment\n\n:\n\ndata: 1\n\n", [("message", "1")]),
        ("data: 1\n: within\ndata: 2\n\n", [("message", "1\n2")]),
        ("data:1\ndata:  2\ndata\ndata:\n\n", [("message", "1\n 2\n\n")]),
        ("event: delta\nid: 7\nretry: 10\ndata: 1\n\ndata: 2\n\n", [("delta", "1"), ("message", "2")]),
        ("event: ping\n\ndata: 1\n\n", [("message", "1")]),
        ("data: a:b\nDATA: 2\n data: 3\n\n", [("message", "a:b")]),
        ("data: \u2028 \x0b \x85 ü\n\n", [("message", "\u2028 \x0b \x85 ü")]),
        ("data: 1", []),
        ("data: 1\n", []),
        ("data: 1\r\n", []),
        ("data: 1\r\n\r", []),  # half of a line's end
        ("", []),
        ("\n\n\n", []),
    ],
)
def test_events_are_read_as_the_standard_says(stream: str, found: list[tuple[str, str]]) -> None:
    assert wire.events(stream.encode()) == found


ENDS = ["\n", "\r\n", "\r"]


@given(
    data=st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), min_size=1)),
    end=st.sampled_from(ENDS),
)
def test_every_stream_is_read_back_whole_and_cut_at_any_byte_never_more(data: list[str], end: str) -> None:  # F50
    stream = "".join(f"data: {part}{end}{end}" for part in data).encode()
    assert [event.data for event in wire.events(stream)] == data
    for cut in range(len(stream)):
        try:
            read = [event.data for event in wire.events(stream[:cut])]
        except UnicodeDecodeError:  # within a character
            continue
        assert read == data[: len(read)]
        assert len(read) < len(data)


@given(stream=st.binary())
def test_no_stream_whatsoever_breaks_the_table(stream: bytes) -> None:
    outcome = wire.classify(wire.Reply(200, {"content-type": "text/event-stream"}, stream))
    assert (outcome.kind == "answered") == (outcome.problem is None)


def test_a_line_of_ten_megabytes_is_one_event() -> None:  # F50
    text = json.dumps({"text": "x" * 10 * 2**20})
    [event] = wire.events(f"data: {text}\n\n".encode())
    assert event.data == text


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(_JSON, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]), st.booleans())
def test_every_json_object_is_read_as_the_same_value(value: Json, encoding: str, escaped: bool) -> None:
    text = json.dumps({"said": value}, ensure_ascii=escaped)
    outcome = wire.classify(wire.Reply(200, {}, text.encode(encoding, "surrogatepass")))
    assert (outcome.kind, outcome.body) == ("answered", {"said": value})


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a": 1, "a": 2}', 2),
        (b'{"a": -0.0}', -0.0),
        (b'{"a": 1e999}', float("inf")),
        (b'{"a": 12345678901234567890123456789}', 12345678901234567890123456789),
        (b'{"a": "\\ud83d\\ude00 \\ud800"}', "\U0001f600 \ud800"),
        (b'{"a": "\xed\xa0\x80"}', "\ud800"),
        (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", ...),
    ],
    ids=["twice", "minus zero", "a huge number", "a long number", "an escaped half", "a half", "deep"],
)
def test_what_one_reader_of_json_refuses_is_read_all_the_same(body: bytes, value: Json) -> None:
    outcome = wire.classify(wire.Reply(200, {}, body))
    assert outcome.body is not None
    assert value is ... or repr(outcome.body["a"]) == repr(value)


@pytest.mark.parametrize(
    "body", [b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1}x', b'{"a": "\xff"}', b'{"a": 01}', b"{"]
)
def test_what_is_no_json_is_no_answer(body: bytes) -> None:
    outcome = wire.classify(wire.Reply(200, {}, body))
    assert (outcome.kind, outcome.body) == ("unknown", None)
