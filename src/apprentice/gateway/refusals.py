"""Every way in which a request can fail, as a status, and in the shape in which each API tells it.

A client's mistake is a 4xx that names the field; a 5xx is ours or a provider's. `x-should-retry` tells the SDKs, which
otherwise try each 429 and 5xx again, whether that makes sense. Sources: the error pages of OpenAI and Anthropic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from starlette.responses import JSONResponse

from apprentice.errors import (
    ApprenticeError,
    BudgetError,
    BudgetExhausted,
    ConfigError,
    DeadlineExceeded,
    IdempotencyConflict,
    InvalidRequest,
    ModelError,
    ModelRefused,
    ModelUnavailable,
    OutOfMoney,
    StoreError,
    UnknownRequest,
    UnknownTask,
)
from apprentice.types import Json, Seconds

type Family = Literal["openai", "anthropic", "native"]


class Refusal(Exception):
    """What is answered instead of an answer. `param`: the field that is wrong, or the header."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        hint: str | None = None,
        wait: Seconds | None = None,
        retryable: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.hint, self.wait = param, hint, wait
        self.retryable = retryable
        self.headers = dict(headers or {})

    def response(self, family: Family, request_id: str) -> JSONResponse:
        headers = self.headers | {
            "x-request-id": request_id,
            "request-id": request_id,
            "x-should-retry": "true" if self.retryable else "false",
        }
        if self.wait is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.wait)))
        return JSONResponse(self._body(family, request_id), self.status, headers)

    def _body(self, family: Family, request_id: str) -> dict[str, Json]:
        # A provider's or a client's text must not be able to write a second line into anybody's log.
        said = "".join(character if character.isprintable() else " " for character in self.message)
        if family == "anthropic":
            return {
                "type": "error",
                "error": {"type": _ANTHROPIC.get(self.status, "api_error"), "message": self._with_hint(said)},
                "request_id": request_id,
            }
        if family == "openai":
            kind = _OPENAI.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            if self.code == "budget_exhausted":
                kind = "insufficient_quota"
            message = self._with_hint(said)
            return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}
        error = {"code": self.code, "message": said, "param": self.param, "hint": self.hint, "request_id": request_id}
        return {"error": error}

    def _with_hint(self, said: str) -> str:
        return f"{said} ({self.hint})" if self.hint else said


_OPENAI = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
} | dict.fromkeys((400, 405, 408, 409, 415, 421, 422), "invalid_request_error")


def refusal_of(error: ApprenticeError, *, param: str | None = None, window: Seconds | None = None) -> Refusal:
    """The refusal that says what the engine raised. `param`: where the client wrote its input. `window`: seconds until
    there is new money, where that is known."""
    status, code = _status(error)
    wait = getattr(error, "retry_after", None)
    if isinstance(error, BudgetExhausted):
        wait = window
    elif wait is None and status in (429, 503) and error.retryable:
        wait = 1.0
    return Refusal(
        status,
        code,
        str(error),
        param=_PLACES.get(type(error), param) if isinstance(error, InvalidRequest) else None,
        hint=error.hint if status < 500 else None,  # what an operator should do is not for every client
        wait=wait,
        retryable=error.retryable and status in (429, 502, 503, 504),
    )


def _status(error: ApprenticeError) -> tuple[int, str]:
    return next(found for kind, found in _STATUSES if isinstance(error, kind))


_PLACES: dict[type[ApprenticeError], str] = {
    UnknownTask: "name",
    UnknownRequest: "request_id",
    IdempotencyConflict: "idempotency-key",
}

# The first kind that fits. A ConfigError is what an operator's wish comes to that the state of the task does not allow.
_STATUSES: tuple[tuple[type[ApprenticeError], tuple[int, str]], ...] = (
    (UnknownTask, (404, "model_not_found")),
    (UnknownRequest, (404, "request_not_found")),
    (IdempotencyConflict, (409, "idempotency_conflict")),
    (InvalidRequest, (400, "invalid_request")),
    (BudgetExhausted, (429, "budget_exhausted")),
    (BudgetError, (429, "budget_held")),
    (OutOfMoney, (503, "provider_out_of_money")),
    (ModelRefused, (422, "refused")),
    (ModelUnavailable, (503, "model_unavailable")),
    (ModelError, (502, "model_error")),
    (DeadlineExceeded, (504, "deadline_exceeded")),
    (StoreError, (503, "store_unavailable")),
    (ConfigError, (409, "not_possible")),
    (ApprenticeError, (500, "internal_error")),
)
