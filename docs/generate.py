"""Writes docs/reference/ from the code: the command line, the configuration, the errors, the plugins and their settings.

python docs/generate.py            write
python docs/generate.py --check    fail if what is there is not what would be written
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args

from apprentice import config, errors, plugins
from apprentice.cli import parser
from apprentice.engine import Apprentice

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- written by docs/generate.py; edit the docstrings instead -->\n\n"


def command_line() -> str:
    top = parser()
    top.formatter_class = argparse.HelpFormatter
    lines = ["# Command line\n", _help(top)]
    [commands] = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    for name, command in commands.choices.items():
        lines += [f"\n## apprentice {name}\n", _help(command)]
    return "\n".join(lines)


def _help(command: argparse.ArgumentParser) -> str:
    # A fixed width: argparse otherwise wraps to the terminal that happens to run this.
    command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)  # type: ignore[assignment]
    return f"```\n{command.format_help()}```"


def configuration() -> str:
    schema = config.json_schema()
    lines = ["# Configuration\n", inspect.cleandoc(config.__doc__ or ""), ""]
    sections = {"apprentice.yaml": schema} | {
        name: part for name, part in schema["$defs"].items() if "properties" in part
    }
    for name, part in sections.items():
        lines += [
            f"\n## {name}\n",
            part.get("description", ""),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for key, field in part["properties"].items():
            default = (
                json.dumps(field["default"]) if "default" in field else ("" if key in part.get("required", []) else "–")
            )
            lines.append(
                f"| `{key}` | {_type(field)} | {_code(default)} | {field.get('description', '').replace(chr(10), ' ')} |"
            )
    return "\n".join(lines)


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name: str = field["$ref"].rsplit("/", 1)[-1]
        return name
    if "enum" in field:
        return ", ".join(_code(str(value)) for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(option) for option in field["anyOf"]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "anything"))


def _code(text: str) -> str:
    return f"`{text}`" if text not in ("", "–") else text


def every_error() -> str:
    lines = [
        "# Errors\n",
        "```text",
        *_tree(errors.ApprenticeError, 0),
        "```",
        "",
        "| error | retryable | meaning | hint |",
        "|---|---|---|---|",
    ]
    for kind in _kinds(errors.ApprenticeError):
        meaning = (inspect.getdoc(kind) or "").splitlines()[0]
        lines.append(f"| `{kind.__name__}` | {'yes' if kind.retryable else 'no'} | {meaning} | {kind.hint or ''} |")
    return "\n".join(lines)


def _kinds(kind: type[errors.ApprenticeError]) -> list[type[errors.ApprenticeError]]:
    return [
        kind,
        *(inner for sub in kind.__subclasses__() if sub.__module__ == errors.__name__ for inner in _kinds(sub)),
    ]


def _tree(kind: type[errors.ApprenticeError], depth: int) -> list[str]:
    below = [
        line for sub in kind.__subclasses__() if sub.__module__ == errors.__name__ for line in _tree(sub, depth + 1)
    ]
    return ["    " * depth + kind.__name__, *below]


def every_plugin() -> str:
    lines = ["# Plugins\n"]
    for kind in get_args(plugins.Kind.__value__):
        lines.append(f"\n## {kind}\n")
        for name in plugins.names(kind):
            module = plugins.find(kind, name)
            summary = (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ")
            lines += [
                f"### {name}\n",
                summary,
                "",
                "```python",
                f"build{inspect.signature(module.build)}",
                "```",
                "",
                inspect.getdoc(module.build) or "",
                "",
            ]
    return "\n".join(lines)


def api() -> str:
    lines = [
        "# Apprentice\n",
        "```python",
        f"Apprentice{inspect.signature(Apprentice)}",
        "```",
        "",
        inspect.getdoc(Apprentice) or "",
        "",
    ]
    for name, member in vars(Apprentice).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            kind = "async " if inspect.iscoroutinefunction(member) else ""
            lines += [
                f"## {name}\n",
                "```python",
                f"{kind}{name}{inspect.signature(member)}",
                "```",
                "",
                inspect.getdoc(member) or "",
                "",
            ]
    return "\n".join(lines)


PAGES = {
    "api.md": api,
    "cli.md": command_line,
    "configuration.md": configuration,
    "errors.md": every_error,
    "plugins.md": every_plugin,
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true")
    check = arguments.parse_args().check
    REFERENCE.mkdir(exist_ok=True)
    stale = []
    for name, page in PAGES.items():
        text = NOTE + page().rstrip() + "\n"
        path = REFERENCE / name
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}; run: python docs/generate.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
