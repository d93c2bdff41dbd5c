"""What a value should look like: the shorthand, JSON Schema or a pydantic model; and which values fit.

A schema is one of

- a mapping with `type: object`: a full JSON Schema (Draft 2020-12; needs the extra `jsonschema`),
- a text `module:Name`: a pydantic model,
- any other mapping: the shorthand, field name -> type, where a type is

      str int float bool dict list      as JSON has them; an int is a float, "5" is no int, true is no int
      list[TYPE]  dict[str, TYPE]       other readers of YAML want these in quotes within { }
      enum[a, b]  or a YAML list [a, b] one of these; a YAML list may hold whole numbers, and null when it may be null
      {field: TYPE, …}                  an object;  [{field: TYPE, …}] is a list of such objects
      TYPE?                             may be null or left out

  An object of the shorthand has no other keys than these.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from operator import call
from typing import Any

from pydantic import BaseModel, ValidationError

from apprentice import plugins
from apprentice.errors import ApprenticeError, ConfigError, MissingExtra
from apprentice.types import Json

type Place = tuple[str | int, ...]
type Problem = tuple[Place, str]
type Check = Callable[[Json], str | None]
"""A value -> what is wrong with it, beginning with the field's path, or None."""

_PLAIN = 2**53  # numbers up to here are the same in every reader of JSON; nan is not between any two
MAX_DEPTH = 64  # of a value and of a configuration; deeper is an attack or a mistake
_WORDS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array"}
_SPOKEN = {json_name: word for word, json_name in _WORDS.items()}
_TYPES: dict[str, type] = {"string": str, "boolean": bool, "object": dict, "array": list}
_FIELDS = {"$ref": "#/$defs/Fields"}
_FIELD = {
    "anyOf": [
        {"type": "string", "pattern": r"^(str|int|float|bool|dict|list|(list|dict|enum)\[.+\])( *\?)?$"},
        {"type": "array", "items": {"type": ["string", "integer", "null"]}, "minItems": 1},
        {"type": "array", "items": _FIELDS, "minItems": 1, "maxItems": 1},
        _FIELDS,
    ]
}
# How a schema is written, as JSON Schema: what an editor completes in a configuration.
DEFINITIONS: dict[str, Json] = {
    "Fields": {"type": "object", "additionalProperties": _FIELD, "minProperties": 1},
    "Shape": {
        "description": "Fields and their types, a full JSON Schema (type: object), or the text module:Model.",
        "anyOf": [
            {"type": "object", "properties": {"type": {"const": "object"}}, "required": ["type"]},
            _FIELDS,
            {"type": "string", "pattern": r"^[\w.]+:[\w.]+$"},
        ],
    },
}


# --- from what is given to JSON Schema ------------------------------------------------------------------------------


def compiled(given: Json, *, output: bool) -> tuple[dict[str, Json], list[Problem]]:
    """The JSON Schema of whatever a configuration may say, and what is wrong with it.

    Every field of an output is required, as the strict modes of providers demand; what may be left out may be null.

    >>> compiled({"text": "str"}, output=False)[0]["properties"]
    {'text': {'type': 'string'}}
    """
    problems: list[Problem] = []
    schema: dict[str, Json] = {}
    if isinstance(given, str):
        try:
            schema = _model(given).model_json_schema()
        except ConfigError as error:
            problems.append(((), with_hint(error)))
    elif not isinstance(given, Mapping):
        problems.append(((), "should be fields with their types, a JSON Schema, or the text module:PydanticModel"))
    elif is_full(given):
        schema = dict(given)
        try:
            check_of(given, schema)
        except MissingExtra:
            pass  # whether it is a good schema is seen where it is used; a file may be checked on another machine
        except ConfigError as error:
            problems.append(((), str(error)))
    elif "$schema" in given:
        problems.append(((), "a full JSON Schema should say `type: object` at its root"))
    else:
        schema = _object(given, (), problems, output=output)
    return schema, problems


def is_full(given: Json) -> bool:
    """Whether this is a full JSON Schema and not the shorthand, in which `object` is no type."""
    return isinstance(given, Mapping) and given.get("type") == "object"


def check_of(given: Json, schema: dict[str, Json]) -> Check:
    """How values are checked against what is given, of which `schema` is the JSON Schema.

    Raises MissingExtra when a full JSON Schema is given and jsonschema is not installed.
    """
    if isinstance(given, str):
        model = _model(given)
        return lambda value: _model_misfit(model, value)
    if is_full(given):
        check: Check = plugins.build("verifiers", "schema", schema=dict(given)).problem
        return check
    return lambda value: _misfit(schema, value, "")


def whole_check(given: Json, schema: dict[str, Json], *, texts: bool = False) -> Check:
    """The same as `check_of`, and whether a value is sound. `texts`: also whether there is anything in one of its texts."""
    fits, check = _glance_of(given, schema, texts=texts), check_of(given, schema)

    def problem(value: Json) -> str | None:
        if fits(value):
            return None
        return unsound(value) or check(value) or (all_empty(schema, value) if texts else None)

    return problem


def imported(reference: str) -> Any:
    """What `module:name` stands for. Raises ConfigError that names the module or the attribute that is not there."""
    module, _, name = reference.partition(":")
    if not name or not re.fullmatch(r"\w+(\.\w+)*", module):
        raise ConfigError(f"{reference!r} should be of the form module:name")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module!r} cannot be imported: {error}", hint="is its folder on PYTHONPATH?") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{module!r} has no {name!r}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def _model(reference: str) -> type[BaseModel]:
    found = imported(reference)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ConfigError(f"{reference!r} is not a pydantic model")
    return found


def _object(given: Mapping[Any, Any], at: Place, problems: list[Problem], *, output: bool) -> dict[str, Json]:
    if not given:
        problems.append((at, "should have at least one field"))
    properties = {str(name): _typed(value, (*at, name), problems, output=output) for name, value in given.items()}
    required = [name for name, schema in properties.items() if output or not _may_be_null(schema)]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _typed(value: Any, at: Place, problems: list[Problem], *, output: bool) -> dict[str, Json]:
    if isinstance(value, str):
        return _word(value.strip(), at, problems)
    if isinstance(value, Mapping):
        return _object(value, at, problems, output=output)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        return {"type": "array", "items": _object(value[0], (*at, 0), problems, output=output)}
    if isinstance(value, list):
        return _enumeration(value, at, problems)
    problems.append((at, f"should be a type such as str, int or [a, b], not {value!r}"))
    return {}


def _word(text: str, at: Place, problems: list[Problem]) -> dict[str, Json]:
    if text.endswith("?"):
        return _nullable(_word(text[:-1].rstrip(), at, problems))
    if text in _WORDS:
        return {"type": _WORDS[text]}
    generic = re.fullmatch(r"(list|dict|enum)\[(.*)\]", text)
    if generic is None:
        meant = repr(_SPOKEN[text]) if text in _SPOKEN else ""
        hint = f"; did you mean {meant}?" if meant else did_you_mean(text, [*_WORDS, "enum"])
        problems.append((at, f"unknown type {text!r}" + (hint or f"; one of {', '.join(_WORDS)}, list[…], enum[…]")))
        return {}
    inside = generic[2].strip()
    if generic[1] == "enum":
        return _enumeration([choice.strip() for choice in inside.split(",")], at, problems)
    if generic[1] == "list":
        return {"type": "array", "items": _word(inside, at, problems)}
    key, _, item = inside.partition(",")
    if key.strip() != "str":
        problems.append((at, f"{text!r} should be dict[str, TYPE]"))
    return {"type": "object", "additionalProperties": _word(item.strip() or "str", at, problems)}


def _enumeration(choices: list[Any], at: Place, problems: list[Problem]) -> dict[str, Json]:
    values = [choice for choice in choices if choice is not None]
    kinds = {type(choice) for choice in values}
    if kinds not in ({str}, {int}) or "" in values or len(set(values)) < len(values):
        problems.append((at, "an enumeration should be a list of different texts, or of different whole numbers"))
        return {}
    schema: dict[str, Json] = {"type": _WORDS[kinds.pop().__name__], "enum": values}
    return schema if len(values) == len(choices) else _nullable(schema)


def _nullable(schema: dict[str, Json]) -> dict[str, Json]:
    if not schema or _may_be_null(schema):
        return schema
    wider = schema | {"type": [schema["type"], "null"]}
    return wider | {"enum": [*schema["enum"], None]} if "enum" in schema else wider


def _may_be_null(schema: Mapping[str, Json]) -> bool:
    return isinstance(schema.get("type"), list)


# --- does a value fit? ----------------------------------------------------------------------------------------------


def unsound(value: Json, at: str = "", depth: int = 0) -> str | None:
    """Why the value cannot be written as JSON in UTF-8 and read back the same, or None."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        return None if is_utf8(value) else said(at, _HALF)
    if isinstance(value, int | float):
        if isinstance(value, float) and not math.isfinite(value):
            return said(at, f"{value} is no number that JSON has")
        return said(at, "is too large a number") if abs(value) > 1e300 else None
    if depth >= MAX_DEPTH:
        return said(at, f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return _first(unsound(item, f"{at}[{index}]", depth + 1) for index, item in enumerate(value))
    if isinstance(value, dict):
        for key, item in value.items():
            if wrong := _unsound_key(key, at) or unsound(item, _join(at, key), depth + 1):
                return wrong
        return None
    return said(at, f"should be JSON, not {type(value).__name__}")


_HALF = "contains half a surrogate pair, which no UTF-8 text can carry"


def is_utf8(text: str) -> bool:
    """Whether every store and every wire can carry the text: it has no half of a surrogate pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _unsound_key(key: Any, at: str) -> str | None:
    return unsound(key, at) if isinstance(key, str) else said(at, f"the key {short(key)} should be text")


def _misfit(schema: Mapping[str, Json], value: Json, at: str) -> str | None:
    """Why the value does not fit a schema of the shorthand. No general validator: it knows the keywords above."""
    kind = schema["type"]
    if isinstance(kind, list):
        if value is None:
            return None
        kind = kind[0]
    if not _is(kind, value):
        return said(at, f"should be {_SPOKEN[kind]}, not {kind_of(value)}")
    if "enum" in schema and value not in schema["enum"]:
        choices = [str(choice) for choice in schema["enum"] if choice is not None]
        shown = ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
        return said(at, f"{short(value)} is not one of {shown}{did_you_mean(str(value), choices)}")
    if kind == "object":
        return _object_misfit(schema, value, at)
    if kind == "array" and "items" in schema:
        return _first(_misfit(schema["items"], item, f"{at}[{index}]") for index, item in enumerate(value))
    return None


def _object_misfit(schema: Mapping[str, Json], value: dict[str, Json], at: str) -> str | None:
    properties = schema.get("properties", {})
    for name, inner in properties.items():
        if name not in value and not _may_be_null(inner):
            return said(_join(at, name), "is missing")
    others = schema.get("additionalProperties")
    for name, item in value.items():
        inner = properties.get(name, others)
        if inner is False:
            return said(_join(at, name), f"unknown key{did_you_mean(name, properties)}")
        wrong = _misfit(inner, item, _join(at, name)) if inner is not None else None
        if wrong:
            return wrong
    return None


def _is(kind: str, value: Json) -> bool:
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, _TYPES[kind])


def _model_misfit(model: type[BaseModel], value: Json) -> str | None:
    try:
        model.model_validate_json(
            json.dumps(value), strict=True
        )  # JSON's strict mode: a date may be text, an int may not
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return said(path(first["loc"]), message(first))
    return None


def all_empty(schema: Mapping[str, Json], value: Json) -> str | None:
    """The text fields of the schema, if there are any in the value and there is nothing in any of them; else None."""
    fields = schema.get("properties", {})
    texts = [name for name, field in fields.items() if field.get("type") == "string" and name in value]
    return f"{', '.join(texts)}: is empty" if texts and not any(value[name].strip() for name in texts) else None


# --- does it fit at a glance? ---------------------------------------------------------------------------------------

type _Glance = Callable[[Json], bool]


def _glance_of(given: Json, schema: Mapping[str, Json], *, texts: bool) -> _Glance:
    """What tells of most good values, quickly, that `whole_check` finds nothing wrong with them; its "no" is no verdict.

    Made once a schema. For a full JSON Schema and a pydantic model it never says yes.
    """
    if isinstance(given, str) or is_full(given):
        return _never
    fits = _glance(schema, 0)
    names = [name for name, field in schema.get("properties", {}).items() if field.get("type") == "string"]
    if not texts or not names:
        return fits
    return lambda value: fits(value) and any(value[name].strip() for name in names)


def _never(_: Json) -> bool:
    return False


def _glance(schema: Mapping[str, Json], depth: int) -> _Glance:
    kind = schema.get("type")
    if isinstance(kind, list):
        inner = _glance({**schema, "type": kind[0]}, depth)
        return lambda value: value is None or inner(value)
    if "enum" in schema:
        wanted = {"string": str, "integer": int}.get(str(kind))
        choices = frozenset(choice for choice in schema["enum"] if unsound(choice) is None)
        return lambda value: type(value) is wanted and value in choices
    match kind:
        case "string":
            return lambda value: type(value) is str and is_utf8(value)
        case "boolean":
            return lambda value: type(value) is bool
        case "integer":
            return lambda value: type(value) is int and -_PLAIN <= value <= _PLAIN
        case "number":
            return lambda value: type(value) in (int, float) and -_PLAIN <= value <= _PLAIN
        case "array" if "items" in schema and depth < MAX_DEPTH:
            item = _glance(schema["items"], depth + 1)
            return lambda value: type(value) is list and all(map(item, value))
        case "object" if schema.get("properties") and depth < MAX_DEPTH:
            return _object_glance(schema["properties"], depth + 1)
    return _never


def _object_glance(properties: Mapping[str, Mapping[str, Json]], depth: int) -> _Glance:
    fields = {name: _glance(field, depth) for name, field in properties.items() if unsound(name) is None}
    required = {name for name, field in properties.items() if not _may_be_null(field)}

    def fits(value: Json) -> bool:
        if type(value) is not dict or not required <= value.keys() <= fields.keys():
            return False
        return all(map(call, map(fields.__getitem__, value), value.values()))

    return fits


# --- the fields of a schema -----------------------------------------------------------------------------------------


def no_such_field(schema: Mapping[str, Json], field: str) -> str | None:
    """Why there can be no `a.b` (b within a) in values of this schema; None where there is or may be one."""
    for part in field.split("."):
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            return None  # an open object, or one behind a $ref: any field may be there
        if part not in properties:
            hint = did_you_mean(part, properties) or f"; it has {', '.join(properties)}"
            return f"output_schema has no field {field!r}{hint}"
        schema = properties[part]
    return None


def mark_free_text(schema: dict[str, Json], exact: Callable[[str], bool], at: str = "") -> dict[str, Json]:
    """The schema, with `"x-free-text": true` at each string or list of strings that is neither closed nor `exact`."""
    if isinstance(schema.get("properties"), dict):
        inner = {name: mark_free_text(field, exact, _join(at, name)) for name, field in schema["properties"].items()}
        return schema | {"properties": inner}
    text = schema.get("items", schema) if schema.get("type") in ("array", ["array", "null"]) else schema
    free = text.get("type") in ("string", ["string", "null"]) and not {"enum", "const"} & text.keys()
    return schema | {"x-free-text": True} if free and not exact(at) else schema


# --- what to say ----------------------------------------------------------------------------------------------------


def message(error: Any) -> str:
    """What pydantic found, in our words. A text is never shown, because it may be a secret."""
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    text, value = str(error["msg"]), error["input"]
    if text.startswith("Input should"):
        shown = isinstance(value, int | float) or error["type"] == "literal_error"
        return f"{text.removeprefix('Input ')}, not {short(value) if shown else kind_of(value)}"
    return re.sub("^(String|Tuple|List|Dictionary) should", "should", text).removesuffix(" after validation, not 0")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown word: the nearest known one, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def path(place: Place) -> str:
    """
    >>> path(("tasks", 0, "name"))
    'tasks[0].name'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def said(at: str, problem: str) -> str:
    return f"{at}: {problem}" if at else problem


def short(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def kind_of(value: Json) -> str:
    return "null" if value is None else type(value).__name__


def with_hint(error: ApprenticeError) -> str:
    hint = vars(error).get("hint")  # its own, which says more than the one of its class
    return f"{error} ({hint})" if hint else str(error)


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)
