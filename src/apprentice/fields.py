"""Which fields an output has, what they hold, and how values and inputs are written as text for a student.

A *symbol* is a field's value as canonical JSON text, so that equal values are equal texts. Nothing here learns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from apprentice.errors import CannotLearn, ConfigError
from apprentice.types import Json, Task

ABSENT = ""  # symbol of a field that an output leaves out; no JSON text is empty
_MANY = 1_000_000  # items of a list without a limit
_DEFINITIONS = ("$defs", "definitions")
_HUGE = 1e15  # a number beyond it is no measurement; float64 no longer tells its neighbours apart


@dataclass(frozen=True)
class Field:
    """One output field as a head sees it. `name` is None when the output is no object but the value itself."""

    name: str | None
    kind: Literal["category", "integer", "number", "list"]
    required: bool = True
    nullable: bool = False
    counts: bool = True  # part of the confidence and of the agreement
    choices: tuple[str, ...] | None = None  # the symbols that the schema allows, in its order; for a list, of its items
    types: tuple[str, ...] = ()  # of a category without choices
    bounds: tuple[int, int] = (0, _MANY)  # items of a list
    step: float | None = None  # multipleOf

    @property
    def title(self) -> str:
        return "the output" if self.name is None else f"output field {self.name!r}"

    def symbol(self, output: Json) -> str | None:
        """The field's value in an output as canonical JSON text, ABSENT, or None when it does not fit the schema."""
        if self.name is None:
            value = output
        elif not isinstance(output, dict):
            return None
        elif self.name not in output:
            return None if self.required else ABSENT
        else:
            value = output[self.name]
        if value is None:
            return "null" if self.nullable else None
        return self._fitting(value)

    def _fitting(self, value: Json) -> str | None:
        if self.kind == "list":
            if not isinstance(value, list) or not self.bounds[0] <= len(value) <= self.bounds[1]:
                return None
            items = [symbol_of(item) for item in value]
            fits = all(item in self.choices for item in items) if self.choices else all(type(i) is str for i in value)
            return text_of(value) if fits else None
        if self.kind == "category":
            symbol = symbol_of(value)
            fits = symbol in self.choices if self.choices else bool(_types(value) & set(self.types))
            return symbol if fits else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_HUGE <= value <= _HUGE:
            return None
        if self.kind == "integer":
            return text_of(int(value)) if value == int(value) else None
        return text_of(value)


def of(task: Task, counted: Sequence[str] | None = None) -> tuple[Field, ...]:
    """The fields of a task's output, in the schema's order.

    `counted`: the fields that make up confidence and agreement; without it, those that the evaluator compares. A field
    that is not counted is answered too if it can be learned, and left out if the schema allows that.
    Raises CannotLearn that names the field: free text, objects, lists of anything but categories.
    """
    schema = _resolved(task.output_schema, task.output_schema)
    if schema.get("type") != "object" and "properties" not in schema:
        if counted:
            raise ConfigError(f"task {task.name!r}: fields names {counted[0]!r}, but the output is no object")
        return (_field(task, None, schema, required=True, counts=True),)
    properties = _properties(task)
    for name in counted or ():
        if name not in properties:
            known = ", ".join(properties) or "no fields"
            raise ConfigError(f"task {task.name!r}: fields names {name!r}, but the output has {known}")
    found = []
    for name, given in properties.items():
        required = name in schema.get("required", ())
        counts = given.get("x-compared", True) if counted is None else name in counted
        try:
            inner = _resolved(given, task.output_schema)
            found.append(_field(task, name, inner, required=required, counts=counts))
        except CannotLearn:
            if required or counts:
                raise
    if not any(field.counts for field in found):
        raise _unlearnable(task, "the output", "is an object without stated fields", "state them in output_schema")
    return tuple(found)


def _properties(task: Task) -> dict[str, dict[str, Json]]:
    properties: dict[str, dict[str, Json]] = _resolved(task.output_schema, task.output_schema).get("properties") or {}
    return properties


def names(task: Task) -> list[str]:
    """Of the output's fields, in the schema's order."""
    return list(_properties(task))


def closed(task: Task) -> tuple[list[str], list[str]]:
    """The names of the output fields that the embedded student can learn, and of the others; both in the schema's order."""
    found: tuple[list[str], list[str]] = ([], [])
    for name, given in _properties(task).items():
        try:
            _field(task, name, _resolved(given, task.output_schema), required=True, counts=True)
            found[0].append(name)
        except CannotLearn:
            found[1].append(name)
    return found


def compared(task: Task, names: Sequence[str]) -> list[str]:
    """Those of the output fields that the evaluator looks at."""
    properties = _properties(task)
    return [name for name in names if properties[name].get("x-compared", True)]


def only(task: Task, names: Sequence[str]) -> Task:
    """The same task with these fields of its output alone."""
    schema = _resolved(task.output_schema, task.output_schema)
    part = {key: task.output_schema[key] for key in _DEFINITIONS if key in task.output_schema} | {
        "type": "object",
        "properties": {name: given for name, given in schema["properties"].items() if name in names},
        "required": [name for name in schema.get("required", ()) if name in names],
        "additionalProperties": False,
    }
    examples = tuple({**example, "output": chosen(example["output"], names)} for example in task.examples)
    return task.model_copy(update={"output_schema": part, "examples": examples})


def chosen(output: Json, names: Sequence[str]) -> Json:
    """The output with these fields alone; what is no object stays as it is.

    >>> chosen({"kind": "bill", "reply": "Thank you."}, ["kind"])
    {'kind': 'bill'}
    """
    return {name: output[name] for name in names if name in output} if isinstance(output, dict) else output


def following(task: Task, decided: Sequence[str], names: Sequence[str]) -> Task:
    """The task of writing the fields `names` when the fields `decided` are known; its inputs are made by `told`."""
    inner = {"input": task.input_schema, "decided": {"type": "object"}}
    lifted = {key: task.input_schema[key] for key in _DEFINITIONS if key in task.input_schema}
    examples = tuple(
        {
            "input": told(example["input"], chosen(example["output"], decided)),
            "output": chosen(example["output"], names),
        }
        for example in task.examples
    )
    note = (
        'You are given {"input": …, "decided": …}: what was asked, and the fields of the answer that are decided already. '
        f"Do not repeat those. Answer with what is left ({', '.join(names)}), so that it fits what was decided."
    )
    return only(task, names).model_copy(
        update={
            "instructions": "\n\n".join(part for part in (task.instructions, note) if part),
            "input_schema": {"type": "object", "properties": inner, "required": list(inner), **lifted},
            "examples": examples,
        }
    )


def told(input: Json, decided: Json) -> Json:
    """An input of the task that `following` makes."""
    return {"input": input, "decided": decided}


def _field(task: Task, name: str | None, schema: dict[str, Json], *, required: bool, counts: bool) -> Field:
    title = "the output" if name is None else f"output field {name!r}"
    nullable, schema = _without_null(schema, task.output_schema)
    inner = _resolved(schema.get("items") or {}, task.output_schema) if schema.get("type") == "array" else {}
    if schema.get("x-free-text") or inner.get("x-free-text"):
        fix = "list its values as an enumeration, let the evaluator compare it, or name a trainer that writes text"
        raise _unlearnable(task, title, "is free text", fix)
    field = Field(name, "category", required, nullable, counts)
    given = schema.get("type")
    kinds: list[str] = given if isinstance(given, list) else [str(given)]
    if "enum" in schema or "const" in schema:
        choices = [symbol_of(value) for value in schema.get("enum", [schema.get("const")]) if value is not None]
        nullable = nullable or None in schema.get("enum", [schema.get("const")])
        return replace(field, choices=tuple(dict.fromkeys(choices)), nullable=nullable)
    if schema.get("type") in ("integer", "number"):
        return replace(field, kind=schema["type"], step=schema.get("multipleOf"))
    if set(kinds) <= {"string", "boolean", "integer", "number"}:
        return replace(field, types=tuple(sorted(kinds)))
    if schema.get("type") == "array":
        if "enum" not in inner and inner.get("type") != "string":
            fix = "make its items strings or an enumeration, or name a trainer that writes text"
            raise _unlearnable(task, title, "is a list of something else than categories", fix)
        allowed = tuple(symbol_of(value) for value in inner["enum"]) if "enum" in inner else None
        bounds = (schema.get("minItems", 0), schema.get("maxItems", _MANY))
        return replace(field, kind="list", choices=allowed, bounds=bounds)
    what = f"is of the type {schema['type']!r}" if "type" in schema else "has no type"
    raise _unlearnable(task, title, what, "make it a category, a number or a list of categories, or drop it")


def _unlearnable(task: Task, title: str, what: str, fix: str) -> CannotLearn:
    return CannotLearn(f"task {task.name!r}: {title} {what}, which the embedded student cannot learn", hint=fix)


def _resolved(schema: Json, root: Mapping[str, Json]) -> dict[str, Json]:
    """The schema behind local references (`#/$defs/NAME`), with what stands beside the reference."""
    for _ in range(10):
        if not isinstance(schema, dict):
            return {}
        if isinstance(only := schema.get("allOf"), list) and len(only) == 1:
            schema = {key: value for key, value in schema.items() if key != "allOf"} | only[0]
        elif str(schema.get("$ref", "")).startswith("#/"):
            target: Json = root
            for part in schema["$ref"][2:].split("/"):
                target = target.get(part) if isinstance(target, dict) else None
            schema = (target or {}) | {key: value for key, value in schema.items() if key != "$ref"}
        else:
            return schema
    return {}


_MARKS = ("x-free-text", "x-compared")


def plain(schema: Json) -> Json:
    """The schema without our own marks: what a student learned does not depend on them.

    >>> plain({"type": "string", "x-free-text": True})
    {'type': 'string'}
    """
    if isinstance(schema, dict):
        return {key: plain(value) for key, value in schema.items() if key not in _MARKS}
    return [plain(value) for value in schema] if isinstance(schema, list) else schema


def _without_null(schema: dict[str, Json], root: Mapping[str, Json]) -> tuple[bool, dict[str, Json]]:
    if isinstance(kinds := schema.get("type"), list) and "null" in kinds:
        rest = [kind for kind in kinds if kind != "null"]
        return True, schema | {"type": rest[0] if len(rest) == 1 else rest}
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        rest = [option for option in options if option != {"type": "null"}]
        beside = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf")}
        if len(rest) == 1:
            return len(rest) < len(options), beside | _resolved(rest[0], root)
    return False, schema


def text_of(value: Json) -> str:
    """Canonical JSON text: equal values give equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def symbol_of(value: Json) -> str:
    """A category as canonical JSON text; 1.0 is 1, as JSON Schema has it."""
    return text_of(int(value) if isinstance(value, float) and value.is_integer() else value)


def _types(value: Json) -> set[str]:
    """The JSON Schema types of a scalar."""
    names = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}}
    return names.get(type(value), set())


def render(input_schema: Mapping[str, Json], input: Json) -> str:
    r"""An input as the one text that the student reads.

    A single text is read as it is; otherwise a line "key: value" a field, in the schema's order, then in the
    alphabet's. What is empty is left out.

    >>> render({"properties": {"text": {}, "tier": {}}}, {"tier": 2, "text": "late again", "metadata": {}})
    'text: late again\ntier: 2'
    """
    if not isinstance(input, dict):
        return input if isinstance(input, str) else _readable(input)
    known = input_schema.get("properties") or {}
    order = [key for key in known if key in input] + sorted(key for key in input if key not in known)
    filled = [(key, input[key]) for key in order if input[key] not in (None, "", [], {})]
    if len(filled) == 1 and isinstance(filled[0][1], str):
        return filled[0][1]
    return "\n".join(f"{key}: {value if isinstance(value, str) else _readable(value)}" for key, value in filled)


def _readable(value: Json) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
