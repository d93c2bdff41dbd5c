"""Whether an answer fits a JSON Schema, Draft 2020-12 (https://json-schema.org/draft/2020-12)."""

from __future__ import annotations

from apprentice.errors import ConfigError, MissingExtra
from apprentice.schemas import path, said, short
from apprentice.types import Json, Verdict

try:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError, best_match
    from referencing import Registry
    from referencing.exceptions import Unresolvable
except ImportError as error:
    raise MissingExtra("jsonschema", "jsonschema") from error


class SchemaVerifier:
    """An answer -> verified when it fits, refuted with the reason when not."""

    def __init__(self, schema: dict[str, Json]) -> None:
        # An empty registry retrieves nothing: a `$ref` to elsewhere is an error and never a request.
        self._validator = Draft202012Validator(schema, registry=Registry())

    async def __call__(self, answer: Json) -> Verdict:
        problem = self.problem(answer)
        return Verdict(state="verified") if problem is None else Verdict(state="refuted", evidence=problem)

    def problem(self, value: Json) -> str | None:
        """What is wrong with the value, beginning with the field's path, or None.

        Raises ConfigError for a schema that refers to one elsewhere, or to itself without end.
        """
        try:
            worst = best_match(self._validator.iter_errors(value))
        except Unresolvable as error:
            raise ConfigError(f"the JSON Schema refers to {error.ref!r}, which it does not contain") from error
        except RecursionError as error:
            raise ConfigError("the JSON Schema or the value is nested without end") from error
        if worst is None:
            return None
        return said(path(tuple(worst.absolute_path)), _shortened(worst.message, worst.instance))


def build(schema: dict[str, Json]) -> SchemaVerifier:
    """A verifier of answers. Raises ConfigError when `schema` is no JSON Schema or refers to one elsewhere."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        at = path(tuple(error.absolute_path))
        raise ConfigError(f"is no JSON Schema: {said(at, _shortened(error.message, error.instance))}") from error
    _refuse_elsewhere(schema)
    return SchemaVerifier(schema)


def _refuse_elsewhere(schema: dict[str, Json]) -> None:
    parts: list[Json] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            for key in ("$ref", "$dynamicRef"):
                reference = part.get(key)
                if isinstance(reference, str) and not reference.startswith("#"):
                    raise ConfigError(
                        f"{key} {short(reference)}: should refer to a part of this schema, such as #/$defs/x"
                    )
            parts.extend(part.values())
        elif isinstance(part, list):
            parts.extend(part)


def _shortened(message: str, value: Json) -> str:
    return message.replace(repr(value), short(value), 1)
