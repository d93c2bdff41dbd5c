from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from apprentice import schemas
from apprentice.errors import ConfigError
from apprentice.types import Json


class Ticket(BaseModel):
    """A model that a configuration may name."""

    text: str
    day: int = 1


NOT_A_MODEL = "text"


def properties(given: Json, *, output: bool = False) -> dict[str, Json]:
    schema, problems = schemas.compiled(given, output=output)
    assert problems == []
    inner: dict[str, Json] = schema["properties"]
    return inner


def misfit(given: Json, value: Json) -> str | None:
    schema, problems = schemas.compiled(given, output=True)
    assert problems == []
    return schemas.check_of(given, schema)(value)


@pytest.mark.parametrize(
    ("shorthand", "schema"),
    [
        ("str", {"type": "string"}),
        ("int", {"type": "integer"}),
        ("float", {"type": "number"}),
        ("bool", {"type": "boolean"}),
        ("dict", {"type": "object"}),
        ("list", {"type": "array"}),
        ("list[str]", {"type": "array", "items": {"type": "string"}}),
        ("list[ list[int] ]", {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        ("dict[str, int]", {"type": "object", "additionalProperties": {"type": "integer"}}),
        ("dict[str, dict[str, bool?]]", None),
        ("int?", {"type": ["integer", "null"]}),
        ("list[str]?", {"type": ["array", "null"], "items": {"type": "string"}}),
        ("list[int?]", {"type": "array", "items": {"type": ["integer", "null"]}}),
        (["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        ([1, 2, 3], {"type": "integer", "enum": [1, 2, 3]}),
        (["a", "b", None], {"type": ["string", "null"], "enum": ["a", "b", None]}),
        ("enum[a, b c]", {"type": "string", "enum": ["a", "b c"]}),
        ("enum[a, b]?", {"type": ["string", "null"], "enum": ["a", "b", None]}),
        ("list[enum[a, b]]", {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}),
        (
            {"b": "str"},
            {
                "type": "object",
                "properties": {"b": {"type": "string"}},
                "required": ["b"],
                "additionalProperties": False,
            },
        ),
        ([{"b": "str"}], None),
    ],
)
def test_the_shorthand_means_this_json_schema(shorthand: Json, schema: Json) -> None:
    found = properties({"a": shorthand})["a"]
    jsonschema.Draft202012Validator.check_schema(found)
    assert schema is None or found == schema


def test_what_may_be_null_may_be_left_out_of_an_input_and_is_asked_for_in_an_output() -> None:
    given = {"a": "int?", "b": "str"}
    assert schemas.compiled(given, output=False)[0]["required"] == ["b"]
    assert schemas.compiled(given, output=True)[0]["required"] == ["a", "b"]
    assert misfit(given, {"b": ""}) is None
    assert misfit(given, {"a": None, "b": ""}) is None
    assert misfit(given, {"a": 1}) == "b: is missing"


@pytest.mark.parametrize(
    ("shorthand", "said"),
    [
        ("integr", "did you mean 'int'"),
        ("string", "did you mean 'str'"),
        ("number", "did you mean 'float'"),
        ("xyz", "one of str, int"),
        ("list[strr]", "did you mean 'str'"),
        ("dict[int, str]", "dict[str, TYPE]"),
        ("str | int", "unknown type"),
        ("", "unknown type"),
        ("?", "unknown type"),
        ("enum[]", "different texts"),
        ("enum[a, a]", "different texts"),
        ([], "different texts"),
        (["a", 1], "different texts"),
        ([True, False], "different texts"),
        ([1.5], "different texts"),
        ({}, "at least one field"),
        (5, "should be a type"),
        (None, "should be a type"),
        ({"b": {"c": "wat"}}, "unknown type 'wat'"),
    ],
)
def test_a_wrong_shorthand_says_where_and_what_would_be_right(shorthand: Json, said: str) -> None:
    _, problems = schemas.compiled({"fine": "str", "a": shorthand}, output=True)
    assert len(problems) == 1
    place, text = problems[0]
    assert place[0] == "a"
    assert said in text


@pytest.mark.parametrize(
    ("shorthand", "value"),
    [
        ("int", 5),
        ("float", 5),
        ("float", 5.5),
        ("list[str]", ["a"]),
        ("dict", {"anything": [1]}),
        ("dict[str, int]", {"x": 1}),
        ([1, 2], 2),
        ([{"b": "int"}], [{"b": 1}, {"b": 2}]),
        ("str", ""),
    ],
)
def test_values_of_the_type_fit(shorthand: Json, value: Json) -> None:
    assert misfit({"a": shorthand}, {"a": value}) is None


@pytest.mark.parametrize(
    ("shorthand", "value", "said"),
    [
        ("int", "5", "a: should be int, not str"),
        ("int", 5.0, "a: should be int, not float"),
        ("int", True, "a: should be int, not bool"),
        ("float", True, "a: should be float, not bool"),
        ("float", "5", "a: should be float, not str"),
        ("bool", 1, "a: should be bool, not int"),
        ("str", None, "a: should be str, not null"),
        ("list[str]", ["a", 1], "a[1]: should be str, not int"),
        ("list", {"x": 1}, "a: should be list, not dict"),
        ("dict[str, int]", {"x": "1"}, "a.x: should be int, not str"),
        (["spam", "ham"], "spma", "a: 'spma' is not one of spam, ham; did you mean 'spam'?"),
        ([1, 2], True, "a: should be int, not bool"),
        ({"b": "int"}, {"c": 1, "b": 1}, "a.c: unknown key"),
        ({"bee": "int"}, {"bee": 1, "beee": 1}, "a.beee: unknown key; did you mean 'bee'?"),
        ([{"b": "int"}], [{"b": 1}, {}], "a[1].b: is missing"),
    ],
)
def test_what_does_not_fit_names_the_field_and_the_type(shorthand: Json, value: Json, said: str) -> None:
    assert misfit({"a": shorthand}, {"a": value}) == said


def types(depth: int = 2) -> st.SearchStrategy[Json]:
    simple: st.SearchStrategy[Json] = st.sampled_from(
        ["str", "int", "bool", "dict", "list", "str?", "list[int]", "dict[str, bool]", ["x", "y"], [1, 2, None]]
    )
    if depth == 0:
        return simple
    inner = st.dictionaries(st.sampled_from("abc"), types(depth - 1), min_size=1, max_size=3)
    return simple | inner | inner.map(lambda fields: [fields])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["", "x", "y"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("abc"), types(), min_size=1, max_size=3), VALUES)
def test_the_shorthand_accepts_exactly_what_its_json_schema_accepts(given: Json, value: Json) -> None:
    schema, problems = schemas.compiled(given, output=False)
    assert problems == []
    fits = schemas.check_of(given, schema)(value) is None
    assert fits == jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": "x\ud800"}, "a: contains half a surrogate pair"),
        ({"a": [{"b": "\udfff"}]}, "a[0].b: contains half a surrogate pair"),
        ({"\ud800": 1}, "contains half a surrogate pair"),
        ({"a": math.nan}, "a: nan is no number"),
        ({"a": [1, math.inf]}, "a[1]: inf is no number"),
        ({"a": 10**400}, "a: is too large a number"),
        ({1: "a"}, "the key 1 should be text"),
        ({"a": (1, 2)}, "a: should be JSON, not tuple"),
        ({"a": b"x"}, "a: should be JSON, not bytes"),
        ({"a": object()}, "a: should be JSON, not object"),
    ],
)
def test_what_json_cannot_carry_is_unsound(value: Any, said: str) -> None:
    assert said in (schemas.unsound(value) or "")


def test_a_value_that_is_nested_without_end_is_unsound() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert "nested" in (schemas.unsound({"a": endless}) or "")


@given(st.recursive(st.none() | st.booleans() | st.text(alphabet=st.characters(codec="utf-8")), st.lists))
def test_what_json_can_carry_is_sound(value: Json) -> None:
    assert schemas.unsound({"a": value, "b\0": "\0\u2028"}) is None


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [math.nan, -math.inf, 1e301, 10**400, 2**60, True, 0, 1.0, None, "", " ", "é", "x\ud800", [], {}, ("x",), b"x"]
)
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "str": st.sampled_from(["", " ", "words", "é\u2028"]),
    "str?": st.sampled_from([None, "words"]),
    "int": st.integers(),
    "float": st.floats() | st.integers(),
    "bool": st.booleans(),
    "enum[x, y]": st.sampled_from(["x", "y"]),
    "list[int?]": st.lists(st.none() | st.integers(0, 9) | ODD, max_size=2),
    "dict": st.dictionaries(st.text(max_size=1), ODD, max_size=2),
    "dict[str, bool]": st.dictionaries(st.text(max_size=1), st.booleans(), max_size=2),
}


@given(st.data())
def test_the_quick_check_of_a_value_says_what_the_thorough_ones_say(data: st.DataObject) -> None:
    fields = data.draw(st.dictionaries(st.sampled_from("abcd"), st.sampled_from(sorted(RIGHT)), min_size=1))
    shorthand: dict[str, Json] = {**fields, "rows": [fields]}
    row = {name: data.draw(RIGHT[kind] | ODD) for name, kind in fields.items() if data.draw(st.integers(0, 9))}
    value: Any = row | {"rows": data.draw(st.sampled_from([[], [row], [row, row], (), None]))}
    if data.draw(st.integers(0, 9)) == 0:
        value |= {data.draw(st.sampled_from(["e", "\ud800", 1])): data.draw(ODD)}
    schema, problems = schemas.compiled(shorthand, output=False)
    assert problems == []
    thorough = schemas.unsound(value) or schemas.check_of(shorthand, schema)(value)
    assert schemas.whole_check(shorthand, schema)(value) == thorough
    with_texts = thorough or schemas.all_empty(schema, value)
    assert schemas.whole_check(shorthand, schema, texts=True)(value) == with_texts


def test_usual_values_are_seen_to_be_good_at_a_glance_and_others_never_are() -> None:
    shorthand: Json = {"text": "str", "n": "int?", "kind": ["x", "y"], "rows": [{"share": "float", "flag": "bool"}]}
    schema, _ = schemas.compiled(shorthand, output=False)
    good = {"text": "é", "kind": "x", "rows": [{"share": 0.5, "flag": True}]}
    glance = schemas._glance_of(shorthand, schema, texts=True)
    assert glance(good) and glance(good | {"n": None, "rows": []}) and not glance(good | {"n": True})
    odd: Json = {"\ud800": "str"}
    assert not schemas._glance_of(odd, schemas.compiled(odd, output=True)[0], texts=False)({"\ud800": "a"})
    full = {"type": "object", "properties": {"text": {"type": "string"}}}
    assert not schemas._glance_of(full, full, texts=False)({"text": "words"})  # its keywords may ask for anything


def test_a_schema_that_is_deeper_than_a_value_may_be_accepts_none_of_them() -> None:
    deep = "list[" * 70 + "int" + "]" * 70
    schema, _ = schemas.compiled({"a": deep}, output=False)
    value: list[Any] = [1]
    for _ in range(69):
        value = [value]
    assert "nested" in (schemas.whole_check({"a": deep}, schema)({"a": value}) or "")


def test_a_pydantic_model_is_a_schema_and_is_strict() -> None:
    given = f"{__name__}:Ticket"
    assert properties(given)["text"]["type"] == "string"
    assert misfit(given, {"text": "x"}) is None
    assert "day" in (misfit(given, {"text": "x", "day": "5"}) or "")
    assert misfit(given, {}) == "text: is missing"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("nowhere.at_all:Ticket", "cannot be imported"),
        (f"{__name__}:Tickett", "did you mean 'Ticket'"),
        (f"{__name__}:NOT_A_MODEL", "is not a pydantic model"),
        ("Ticket", "module:name"),
        ("__import__('os'):system", "module:name"),
    ],
)
def test_a_model_that_is_not_there_is_named(reference: str, said: str) -> None:
    _, problems = schemas.compiled(reference, output=True)
    assert said in problems[0][1]
    with pytest.raises(ConfigError):
        schemas.check_of(reference, {})


def test_only_type_object_makes_a_full_json_schema() -> None:
    full = {"type": "object", "properties": {"type": {"type": "string"}}}
    assert schemas.compiled(full, output=True)[0] == full
    assert schemas.compiled({"type": "str", "properties": "list"}, output=True)[0]["required"] == ["type", "properties"]
    _, problems = schemas.compiled({"$schema": "https://json-schema.org/draft/2020-12/schema"}, output=True)
    assert "type: object" in problems[0][1]


def test_free_text_is_marked_where_nothing_compares_it_exactly() -> None:
    given = {"why": "str", "label": ["a", "b"], "tags": "list[str]?", "in": {"note": "str?", "n": "int"}, "kind": "str"}
    marked = schemas.mark_free_text(schemas.compiled(given, output=True)[0], lambda at: at == "kind")

    def places(schema: dict[str, Json], at: str = "") -> Iterator[str]:
        if schema.get("x-free-text"):
            yield at
        for name, inner in schema.get("properties", {}).items():
            yield from places(inner, f"{at}.{name}".removeprefix("."))

    assert list(places(marked)) == ["why", "tags", "in.note"]


def test_a_field_is_looked_for_with_the_nearest_name() -> None:
    schema, _ = schemas.compiled({"label": "str", "in": {"note": "str"}, "open": "dict"}, output=True)
    assert schemas.no_such_field(schema, "in.note") is None
    assert schemas.no_such_field(schema, "open.anything") is None
    assert "did you mean 'label'" in (schemas.no_such_field(schema, "lable") or "")
    assert "it has note" in (schemas.no_such_field(schema, "in.x") or "")
