"""Interpreters of environments that are not ours: real ones, with small modules in the place of large libraries."""

from __future__ import annotations

import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import yaml

NO_GPU = "class cuda:\n    @staticmethod\n    def is_available():\n        return False\nfloat32, bfloat16 = 'f', 'b'\n"


# An interpreter that has everything but `lacking`. Of a child it runs none: it says how it was asked, and what it knows, in
# the job's folder, and trains there as pupil.py does.
_UNDERSTUDY = """#!{python}
import json, os, runpy, sys
argv = sys.argv[1:]
if "-c" in argv:
    print(True if "cuda" in argv[argv.index("-c") + 1] else "{lacking}")
    sys.exit()
with open(os.path.join(argv[-1], "asked.json"), "w") as file:
    json.dump({{"argv": argv, "environment": dict(os.environ)}}, file)
sys.argv = ["{pupil}", argv[-1]]
runpy.run_path("{pupil}", run_name="__main__")
"""


def understudy(path: Path, *lacking: str) -> str:
    """The program at that path, which is asked as an interpreter with a fine-tuning library is."""
    pupil = Path(__file__).with_name("pupil.py")
    path.write_text(_UNDERSTUDY.format(python=sys.executable, lacking=" ".join(lacking), pupil=pupil))
    path.chmod(0o755)
    return str(path)


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
