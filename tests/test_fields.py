from __future__ import annotations

import jsonschema
import pytest

from apprentice import fields
from apprentice.errors import CannotLearn, ConfigError
from apprentice.types import Json, Task


def task(output_schema: dict[str, Json]) -> Task:
    return Task(name="t", description="", input_schema={}, output_schema=output_schema)


def a_field(schema: dict[str, Json], *, required: bool = True) -> dict[str, Json]:
    return {"type": "object", "properties": {"x": schema}, "required": ["x"] if required else []}


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "string", "x-free-text": True}, "free text"),
        ({"type": "array", "items": {"type": "string"}, "x-free-text": True}, "free text"),
        ({"type": "object"}, "of the type 'object'"),
        ({"type": "object", "properties": {"y": {"type": "string"}}}, "of the type 'object'"),
        ({"type": "array"}, "list of something else"),
        ({"type": "array", "items": {"type": "object"}}, "list of something else"),
        ({"type": "array", "items": {"type": "number"}}, "list of something else"),
        ({}, "has no type"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_name(schema: dict[str, Json], why: str) -> None:
    with pytest.raises(CannotLearn, match=f"'t': output field 'x' .*{why}") as caught:
        fields.of(task(a_field(schema)))
    assert caught.value.hint


@pytest.mark.parametrize("schema", [{"type": "string", "x-free-text": True}, {"type": "object"}, {}])
def test_a_whole_output_that_cannot_be_learned_is_refused(schema: dict[str, Json]) -> None:
    with pytest.raises(CannotLearn, match="'t': the output "):
        fields.of(task(schema))


def test_a_field_that_does_not_count_is_left_out_if_it_may_be_and_refused_if_it_is_required() -> None:
    free = {"type": "string", "x-free-text": True}
    schema = {"type": "object", "properties": {"why": free, "kind": {"type": "string"}}, "required": ["kind"]}
    assert [field.name for field in fields.of(task(schema), ["kind"])] == ["kind"]
    with pytest.raises(CannotLearn, match="'why'"):
        fields.of(task(schema))
    with pytest.raises(CannotLearn, match="'why'"):
        fields.of(task(schema | {"required": ["kind", "why"]}), ["kind"])


def test_a_misspelt_counted_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'knd'.*has x"):
        fields.of(task(a_field({"type": "string"})), ["knd"])


def test_schemas_of_pydantic_are_understood() -> None:
    schema = {
        "$defs": {"Kind": {"enum": ["a", "b"], "type": "string"}},
        "type": "object",
        "properties": {
            "kind": {"$ref": "#/$defs/Kind"},
            "other": {"anyOf": [{"$ref": "#/$defs/Kind"}, {"type": "null"}], "default": None},
            "all": {"type": "array", "items": {"$ref": "#/$defs/Kind"}},
            "n": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        },
        "required": ["kind", "all"],
    }
    kind, other, several, n = fields.of(task(schema))
    assert kind.choices == other.choices == several.choices == ('"a"', '"b"')
    assert [f.nullable for f in (kind, other, several, n)] == [False, True, False, True]
    assert [f.required for f in (kind, other, several, n)] == [True, False, True, False]
    assert [f.kind for f in (kind, other, several, n)] == ["category", "category", "list", "integer"]


@pytest.mark.parametrize(
    ("schema", "fits", "misfits"),
    [
        ({"type": "string"}, ["", "a"], [1, None, ["a"], True]),
        ({"enum": ["a", 1, None]}, ["a", 1, 1.0, None], ["b", 2, True]),
        ({"const": "a"}, ["a"], ["b"]),
        ({"type": "boolean"}, [True, False], [0, "true"]),
        ({"type": "integer"}, [0, 3, 3.0], [3.5, True, "3", 10**400]),
        ({"type": "number"}, [0, 0.5], [float("nan"), float("inf"), "1", False]),
        ({"type": ["number", "null"]}, [1.5, None], ["1"]),
        ({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2}, [["a"]], [[], ["c"], "a"]),
    ],
)
def test_only_values_that_fit_the_schema_become_examples(
    schema: dict[str, Json], fits: list[Json], misfits: list[Json]
) -> None:
    (field,) = fields.of(task(a_field(schema)))
    assert all(field.symbol({"x": value}) is not None for value in fits)
    assert [value for value in misfits if field.symbol({"x": value}) is not None] == []
    assert field.symbol({}) is None
    assert field.symbol("no object") is None


@pytest.mark.parametrize(
    ("input", "text"),
    [
        ({"text": "hello"}, "hello"),
        ({"text": "hello", "metadata": {}}, "hello"),
        ({"metadata": {"b": 1, "a": "ü"}, "text": "hello"}, 'text: hello\nmetadata: {"a": "ü", "b": 1}'),
        ({"z": 1, "b": 2, "text": "t"}, "text: t\nb: 2\nz: 1"),
        ({"n": 3}, "n: 3"),
        ({}, ""),
        ("bare", "bare"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_an_input_is_one_text(input: Json, text: str) -> None:
    assert fields.render({"properties": {"text": {}, "metadata": {}}}, input) == text


# --- a task in two ----------------------------------------------------------------------------------------------------

MIXED = Task(
    name="answer",
    description="d",
    instructions="Be kind.",
    input_schema={"type": "object", "properties": {"text": {"$ref": "#/$defs/T"}}, "$defs": {"T": {"type": "string"}}},
    output_schema={
        "$ref": "#/$defs/Out",
        "$defs": {
            "Out": {
                "type": "object",
                "properties": {
                    "reply": {"type": "string", "x-free-text": True},
                    "kind": {"$ref": "#/$defs/Kind", "x-compared": True},
                    "parts": {"type": "array", "items": {"type": "object"}, "x-compared": False},
                    "score": {"type": "integer"},
                },
                "required": ["reply", "kind"],
            },
            "Kind": {"enum": ["a", "b"]},
        },
    },
    examples=({"input": {"text": "x"}, "output": {"kind": "a", "reply": "y"}},),
)


def test_a_task_falls_in_two_by_what_can_be_learned_closed() -> None:
    assert fields.names(MIXED) == ["reply", "kind", "parts", "score"]
    assert fields.closed(MIXED) == (["kind", "score"], ["reply", "parts"])
    assert fields.compared(MIXED, ["reply", "parts"]) == ["reply"]
    assert fields.closed(MIXED.model_copy(update={"output_schema": {"type": "string"}})) == ([], [])


def test_a_part_of_a_task_asks_for_its_fields_alone() -> None:
    part = fields.only(MIXED, ["kind", "score"])
    assert list(part.output_schema["properties"]) == ["kind", "score"]
    assert part.output_schema["required"] == ["kind"]
    assert part.output_schema["additionalProperties"] is False
    assert [field.name for field in fields.of(part)] == ["kind", "score"], "references still lead somewhere"
    assert part.examples == ({"input": {"text": "x"}, "output": {"kind": "a"}},)
    assert (part.name, part.instructions) == (MIXED.name, MIXED.instructions)


def test_the_second_part_is_told_what_the_first_decided() -> None:
    rest = fields.following(MIXED, ["kind", "score"], ["reply", "parts"])
    assert list(rest.output_schema["properties"]) == ["reply", "parts"]
    assert rest.examples == ({"input": {"input": {"text": "x"}, "decided": {"kind": "a"}}, "output": {"reply": "y"}},)
    assert rest.instructions.startswith("Be kind.\n\n")
    assert "(reply, parts)" in rest.instructions
    jsonschema.validate(fields.told({"text": "x"}, {"kind": "a"}), rest.input_schema)
