"""Whether an answer fits a JSON Schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apprentice.errors import ConfigError, MissingExtra
from apprentice.types import Json, Verdict

try:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError, ValidationError, best_match
    from referencing import Registry
    from referencing.exceptions import NoSuchResource, Unresolvable
except ImportError as error:
    raise MissingExtra("jsonschema", "jsonschema") from error
