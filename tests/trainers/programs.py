"""Interpreters of environments that are not ours: real ones, with small modules in the place of large libraries."""

from __future__ import annotations

import venv
from collections.abc import Mapping
from pathlib import Path

import yaml

NO_GPU = "class cuda:\n    @staticmethod\n    def is_available():\n        return False\nfloat32, bfloat16 = 'f', 'b'\n"


def python_with(folder: Path, modules: Mapping[str, str]) -> str:
    """The interpreter of a new environment that has these modules (path: text), and YAML, gguf and safetensors."""
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    for name, text in modules.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (site / "ours.pth").write_text(str(Path(yaml.__file__).parents[1]) + "\n")
    return str(folder / "bin" / "python")
