"""The house keeps its shape: plugins are reached by name only, modules and functions stay small, names say something."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

import apprentice

SOURCE = Path(apprentice.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
PLUGIN_FOLDERS = ("models", "trainers", "evaluators", "verifiers", "encoders", "importers", "stores")
PLUGINS = {
    f"apprentice.{path.parent.name}.{path.stem}"
    for path in MODULES
    if path.parent.name in PLUGIN_FOLDERS and not path.stem.startswith("_")  # what several files share is no plugin
}
SAY_NOTHING = {
    "util",
    "utils",
    "helper",
    "helpers",
    "manager",
    "common",
    "base",
    "misc",
    "service",
    "handler",
    "handlers",
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_imports_a_plugin_file(path: Path) -> None:
    assert not imported(path) & PLUGINS


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_stay_small_and_names_say_something(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 800
    assert path.stem not in SAY_NOTHING
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            inner = [
                n for n in ast.walk(node) if n is not node and isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            within = sum((n.end_lineno or n.lineno) - n.lineno + 1 for n in inner)
            assert node.end_lineno - node.lineno + 1 - within <= 60, f"{node.name} is long"


def test_every_plugin_file_has_a_build_and_a_test() -> None:
    tests = Path(__file__).parent
    for plugin in sorted(PLUGINS):
        _, folder, name = plugin.split(".")
        path = SOURCE / folder / f"{name}.py"
        assert any(isinstance(n, ast.FunctionDef) and n.name == "build" for n in ast.parse(path.read_text()).body), path
        assert (tests / folder / "test_contract.py").exists(), f"{folder} has no contract suite"


def test_core_dependencies_stay_five() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0].split("=")[0] for requirement in project["dependencies"]}
    assert names == {"pydantic", "httpx2", "PyYAML", "apsw", "genai-prices"}


def test_importing_apprentice_imports_no_optional_package() -> None:
    import subprocess
    import sys

    extras = ("numpy", "sklearn", "onnx", "onnxruntime", "jsonschema")
    code = f"import sys, apprentice; print([name for name in {extras} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
