"""Finds a plugin by name: a file of ours, or somebody else's entry point.

A plugin is one module with `build(**settings)`. Its file name is its name in the configuration; the signature of `build`
is the schema of its settings. Built-in plugins take the same path as everybody's; ours win over an entry point of the
same name, so that installing a package never changes what a configuration means.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, create_model

from apprentice.errors import ConfigError

type Kind = Literal["models", "trainers", "evaluators", "verifiers", "encoders", "importers", "redactors", "stores"]


def names(kind: Kind) -> list[str]:
    """The names that a configuration may use, sorted; nothing is imported for it but the folder."""
    folder = importlib.import_module(f"apprentice.{kind}")
    built_in = {module.name for module in pkgutil.iter_modules(folder.__path__) if not module.name.startswith("_")}
    return sorted(built_in | {point.name for point in entry_points(group=f"apprentice.{kind}")})


def find(kind: Kind, name: str) -> ModuleType:
    """The plugin's module.

    Raises ConfigError when there is none of that name (with the nearest names), and MissingExtra from the plugin itself
    when it needs a package that is not installed.
    """
    if (
        name.isidentifier()
        and not name.startswith("_")
        and importlib.util.find_spec(f"apprentice.{kind}.{name}") is not None
    ):
        return importlib.import_module(f"apprentice.{kind}.{name}")
    for point in entry_points(group=f"apprentice.{kind}", name=name):
        module = point.load()
        if not isinstance(module, ModuleType) or not hasattr(module, "build"):
            raise ConfigError(f"entry point {point.value!r} of {kind} {name!r} is not a module with `build`")
        return module
    known = names(kind)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"no {kind[:-1]} named {name!r}{meant}", hint=f"one of: {', '.join(known)}")


def check(kind: Kind, name: str, settings: Mapping[str, Any]) -> None:
    """Compare settings with the plugin's signature without building it.

    Raises ConfigError that names the key: unknown, missing, or of a type that the annotation of `build` does not allow.
    """
    _validated(kind, name, settings)


def build(kind: Kind, name: str, /, **settings: Any) -> Any:
    """The plugin, built with these settings. Raises what `find` and `check` raise."""
    return find(kind, name).build(**_validated(kind, name, settings))


def _validated(kind: Kind, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(find(kind, name).build, eval_str=True)
    fields: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return dict(settings)
        annotation = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (annotation, Field(default, alias=parameter.name))
    for key in settings:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{kind[:-1]} {name!r} has no setting {key!r}{meant}", hint=f"it takes: {', '.join(fields) or 'none'}"
            )
    shape = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())
    # Attributes with names of their own, because a setting may be called as something that a model has: schema, copy.
    model = create_model(f"{name}_settings", __config__=shape, **{f"of_{key}": field for key, field in fields.items()})
    try:
        # What the model built from the settings is handed on, so that "5" for an int is an error here, not in the plugin.
        valid = model.model_validate(dict(settings), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{kind[:-1]} {name!r}, setting {key!r}: {first['msg']}") from error
    return {key: getattr(valid, f"of_{key}") for key in settings}
