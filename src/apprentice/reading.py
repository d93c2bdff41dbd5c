"""YAML text -> plain data, with the line of each place in it.

YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema): `yes`, `on` and `2026-01-01` are text.
A subset: no anchors, aliases, tags or keys that are no text; at most MAX_BYTES. More than YAML in one thing, because
everybody writes it: within { }, `list[str]` needs no quotes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import yaml

from apprentice import schemas
from apprentice.errors import ConfigError
from apprentice.schemas import Place, Problem, said
from apprentice.types import Json

MAX_BYTES = 1_000_000


def read(text: str, name: str) -> tuple[Any, dict[Place, int]]:
    """The data in a text, and the line of each place in it. Raises ConfigError that says `name` and the line.

    >>> read("a: [1, x]", "file")[0]
    {'a': [1, 'x']}
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{name}: is larger than {MAX_BYTES:,} bytes")
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        problem = error.problem or "is not YAML"
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        raise ConfigError(f"{name}{line}: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: is not YAML: {error}") from error
    if node is None:
        raise ConfigError(f"{name}: is empty", hint="`apprentice init` writes a new one")
    reading = _Reading()
    data = reading.value(node)
    if reading.problems:
        give_up(name, reading.lines, reading.problems)
    return data, reading.lines


def give_up(name: str, lines: Mapping[Place, int], problems: list[Problem]) -> NoReturn:
    """Raise one ConfigError that tells all problems, in the order of the lines where they or what holds them stand."""
    placed = [(next(lines[at[:n]] for n in range(len(at), -1, -1) if at[:n] in lines), at, m) for at, m in problems]
    placed.sort(key=lambda found: found[0])
    raise ConfigError("\n".join(f"{name}:{line}: {said(schemas.path(at), problem)}" for line, at, problem in placed))


class _Loader(yaml.SafeLoader):
    """Composes nodes only. YAML 1.2's core schema, because 1.1 reads `no` as false and `1:30` as 90."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML leaves it open
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        if self.depth >= schemas.MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="is nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def scan_plain(self) -> yaml.ScalarToken:
        token: yaml.ScalarToken = super().scan_plain()
        if not self.flow_level or self.index != token.end_mark.index:
            return token
        # Within { }, YAML ends a plain text at a bracket, and PyYAML at a question mark, too.
        length = depth = 0
        while depth or (self.peek(length) == "[" and not length and token.value in ("list", "dict", "enum")):
            letter = self.peek(length)
            if letter in "\0\n{}":
                return token
            depth += (letter == "[") - (letter == "]")
            length += 1
        length += self.peek(length) == "?"
        more = self.prefix(length)
        self.forward(length)
        return yaml.ScalarToken(token.value + more, True, token.start_mark, self.get_mark())


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in (
    ("null", r"|~|null|Null|NULL"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)
_SCALARS: dict[str, Callable[[str], Json]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 0) if text[:2] in ("0x", "0o") else int(text),
    "float": float,
    "str": str,
}


class _Reading:
    """Plain data from YAML nodes, with the line of each place and whatever is wrong on the way."""

    def __init__(self) -> None:
        self.lines: dict[Place, int] = {}
        self.problems: list[Problem] = []

    def value(self, node: yaml.Node, at: Place = ()) -> Any:
        self.lines.setdefault(at, node.start_mark.line + 1)
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, at)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.value(child, (*at, index)) for index, child in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or tag not in _SCALARS:
            self.problems.append((at, f"the tag {node.tag!r} is not allowed"))
            return None
        try:
            value = _SCALARS[tag](node.value)
        except ValueError:
            self.problems.append((at, f"is no {tag} that can be used"))
            return None
        wrong = schemas.unsound(value)
        if wrong:
            self.problems.append((at, wrong))
        return value

    def _mapping(self, node: yaml.MappingNode, at: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            written = key_node.value if isinstance(key_node, yaml.ScalarNode) else "…"
            key = written.encode(errors="backslashreplace").decode()
            place = (*at, key)
            before = self.lines.get(place)
            self.lines[place] = key_node.start_mark.line + 1
            if key == "…" or key_node.tag != "tag:yaml.org,2002:str" or key != written:
                self.problems.append((place, "a key should be text; put it in quotes"))
            elif before is not None:
                self.problems.append((place, f"is there twice; the other one is in line {before}"))
            else:
                found[key] = self.value(value_node, place)
        return found
