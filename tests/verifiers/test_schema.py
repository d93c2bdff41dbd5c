from __future__ import annotations

import socket
from typing import Any

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError
from apprentice.types import Json


def build(**schema: Json) -> Any:
    return plugins.build("verifiers", "schema", schema=schema)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": {"b": [1, "x"]}}, "a.b[1]: 'x' is not of type 'integer'"),
        ({}, "'a' is a required property"),
        ({"a": {"b": []}, "c": 1}, "'c' was unexpected"),
    ],
)
def test_the_problem_begins_with_the_path_of_the_field(value: Json, said: str) -> None:
    inner = {"type": "object", "properties": {"b": {"type": "array", "items": {"type": "integer"}}}}
    problem = build(type="object", properties={"a": inner}, required=["a"], additionalProperties=False).problem(value)
    assert said in problem


def test_references_within_the_schema_work() -> None:
    schema = build(
        **{"type": "object", "$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}
    )
    assert schema.problem({"a": 1}) is None
    assert schema.problem({"a": "1"})


def test_a_problem_does_not_repeat_a_large_value() -> None:
    assert len(build(type="object", properties={"a": {"type": "integer"}}).problem({"a": "x" * 100_000})) < 200


@pytest.mark.parametrize("schema", [{"type": "objekt"}, {"properties": 5}, {"type": "object", "required": "a"}])
def test_what_is_no_json_schema_is_a_config_error(schema: dict[str, Json]) -> None:
    with pytest.raises(ConfigError, match="is no JSON Schema"):
        build(**schema)


@pytest.mark.parametrize(
    "reference",
    ["http://127.0.0.1:1/x.json", "file:///etc/passwd", "other.json", "https://json-schema.org/draft/2020-12/schema"],
)
def test_a_reference_to_elsewhere_is_refused_and_never_followed(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connects: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda *address: connects.append(address))
    with pytest.raises(ConfigError, match="should refer to a part of this schema"):
        build(type="object", properties={"a": {"anyOf": [{"$ref": reference}]}})
    assert connects == []


def test_a_reference_to_a_part_that_is_not_there_is_a_config_error_when_it_is_met() -> None:
    with pytest.raises(ConfigError, match="does not contain"):
        build(type="object", properties={"a": {"$ref": "#/$defs/nowhere"}}).problem({"a": 1})


def test_a_schema_that_refers_to_itself_without_end_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="without end"):
        build(**{"type": "object", "$ref": "#"}).problem({})
