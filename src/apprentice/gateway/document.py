"""The OpenAPI document, made from the operations that are served: it says what is true, and of whatever is served.

Source: https://spec.openapis.org/oas/v3.1.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

import apprentice
from apprentice.gateway import HEADER
from apprentice.gateway.desk import Gateway, Operation
from apprentice.gateway.refusals import Family
from apprentice.types import Json


class _Open(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OpenAIProblem(_Open):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(_Open):
    error: OpenAIProblem


class AnthropicProblem(_Open):
    type: str
    message: str


class AnthropicError(_Open):
    type: str
    error: AnthropicProblem
    request_id: str


class Problem(_Open):
    code: str
    message: str
    param: str | None
    hint: str | None
    request_id: str


class Error(_Open):
    error: Problem


ERRORS: dict[Family, type[BaseModel]] = {"openai": OpenAIError, "anthropic": AnthropicError, "native": Error}
_TOLD = {
    400: "the request is wrong; the field is named",
    401: "no key, or one that is none",
    403: "the key, or the page that asks, may not do this",
    404: "no such task, model, version or request",
    405: "no such method here",
    408: "the body came too slowly",
    409: "not possible now, or not in this state",
    413: "too large",
    415: "not JSON in UTF-8",
    421: "another host is meant",
    422: "the idempotency key was used with another body, or the model declined",
    429: "too many requests at once, or no money left",
    500: "a mistake of ours",
    502: "the remote gave no usable answer",
    503: "the remote or the store cannot be reached, or the gateway stops",
    504: "no answer within the time limit",
}
_ALWAYS = (401, 403, 404, 405, 421, 429, 500, 503)
_WITH_BODY = (400, 408, 409, 413, 415, 422, 502, 504)


def document(gateway: Gateway, operations: Sequence[Operation]) -> dict[str, Json]:
    """The document of these operations, with the configured tasks as the names that they take."""
    kinds: list[type[BaseModel]] = [*ERRORS.values()]
    kinds += [kind for one in operations for kind in (one.takes, one.gives) if kind is not None]
    modes: Any = [(kind, "validation") for kind in dict.fromkeys(kinds)]
    names, shared = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    references: dict[Any, Any] = {kind: schema for (kind, _), schema in names.items()}
    paths: dict[str, dict[str, Json]] = {}
    for one in operations:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = _operation(gateway, one, path, references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Apprentice",
            "version": apprentice.__version__,
            "description": (__doc__ or "").split("\n")[0],
        },
        "paths": paths,
        "components": {
            "schemas": shared.get("$defs", {}),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(gateway: Gateway, one: Operation, path: str, references: dict[Any, Any]) -> dict[str, Json]:
    error = {"application/json": {"schema": references[ERRORS[one.family]]}}
    statuses = [*_ALWAYS, *(_WITH_BODY if one.takes is not None else ())]
    if one.path.endswith(":path}"):
        statuses.append(400)
    plain = {"type": "object" if one.media == "application/json" else "string"}
    good = {one.media: {"schema": references[one.gives] if one.gives is not None else plain}}
    if one.streams:
        good["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Json] = {"200": {"description": one.summary, "content": good}}
    responses |= {str(status): {"description": _TOLD[status], "content": error} for status in sorted(set(statuses))}
    found: dict[str, Json] = {
        "operationId": one.run.__name__,
        "summary": one.summary,
        "responses": responses,
        "parameters": [*_in_path(gateway, path), *(_HEADERS if one.role == "call" else [])],
    }
    if one.role is not None:
        found["security"] = [{"bearer": []}, {"x-api-key": []}]
        found["description"] = "For every key." if one.role == "any" else f"For keys with the role `{one.role}`."
    if one.takes is not None:
        content: dict[str, Json] = {"schema": references[one.takes]}
        if one.examples is not None:
            content["example"] = one.examples(gateway)
        found["requestBody"] = {"required": True, "content": {"application/json": content}}
    return found


def _in_path(gateway: Gateway, path: str) -> list[Json]:
    schemas: dict[str, Json] = {
        "name": {"type": "string", "enum": [task.name for task in gateway.config.tasks]},
        "model": {"type": "string", "minLength": 1},
    }
    return [
        {"name": name, "in": "path", "required": True, "schema": schemas.get(name, {"type": "string"})}
        for name in re.findall(r"\{(\w+)\}", path)
    ]


_HEADERS: list[Json] = [
    {
        "name": "idempotency-key",
        "in": "header",
        "description": "the same key and body: the same answer, paid for once",
        "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]+$"},
    },
    {
        "name": f"{HEADER}capture",
        "in": "header",
        "description": "`off`: a request that names a model is not recorded, only paid for",
        "schema": {"type": "string", "enum": ["on", "off"]},
    },
]
