"""What the children that train decide for themselves: whether the base is held in 4 bits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from apprentice.trainers import _child

from .programs import NO_GPU, python_with

NAME = "someone/small-7B"
ROOM = 1000  # bytes, of a GPU
GPU = f"""
class cuda:
    @staticmethod
    def is_available():
        return True
    @staticmethod
    def get_device_properties(number):
        class found:
            total_memory = {ROOM}
        return found
"""
ASK = """
import runpy, sys
child = runpy.run_path(sys.argv[1])
print(child["in_four_bits"](sys.argv[2], {"quantise": "auto"}))
"""


def decided(folder: Path, base: str, **modules: str) -> tuple[str, bool]:
    """What a child with these modules writes to its log, and decides, about a base."""
    program = python_with(folder / "env", {f"{name}.py": text for name, text in modules.items()})
    told = subprocess.run(
        [program, "-I", "-c", ASK, _child.__file__, base],
        env={"PATH": os.environ["PATH"], "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return "\n".join(told[:-1]), json.loads(told[-1].lower())


def weighing(folder: Path, *sizes: int) -> str:
    """A folder with files of a base of so many bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for number, size in enumerate(sizes):
        (folder / f"model-{number}.safetensors").write_bytes(bytes(size))
    return str(folder)


def in_the_hubs_cache(folder: Path, *sizes: int) -> str:
    """The name of a base that lies in the Hub's local cache, as huggingface_hub keeps it."""
    kept = folder / "hub" / f"models--{NAME.replace('/', '--')}"
    weighing(kept / "snapshots" / "abc", *sizes)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    return NAME


def test_a_base_that_would_fill_the_gpu_is_held_in_4_bits_where_the_package_for_it_is_there(tmp_path: Path) -> None:
    log, four = decided(tmp_path, weighing(tmp_path / "base", 400, 300), torch=GPU, bitsandbytes="")
    assert four
    assert log.endswith("; in 4 bits")


def test_without_that_package_it_is_not_and_the_log_says_what_to_install(tmp_path: Path) -> None:
    log, four = decided(tmp_path, weighing(tmp_path / "base", 700), torch=GPU)
    assert not four
    assert log.endswith("not in 4 bits, for want of a package: pip install bitsandbytes")


def test_a_base_that_fits_stays_as_it_is(tmp_path: Path) -> None:
    log, four = decided(tmp_path, weighing(tmp_path / "base", 300), torch=GPU, bitsandbytes="")
    assert not four
    assert log.endswith("; not in 4 bits")


@pytest.mark.parametrize(("size", "expected"), [(700, True), (300, False)])
def test_a_name_of_the_hub_is_weighed_by_its_files_in_the_local_cache(
    tmp_path: Path, size: int, expected: bool
) -> None:
    base = in_the_hubs_cache(tmp_path, size)
    assert decided(tmp_path, base, torch=GPU, bitsandbytes="")[1] is expected


def test_a_base_whose_size_nobody_knows_stays_as_it_is_and_the_log_says_so(tmp_path: Path) -> None:
    log, four = decided(tmp_path, NAME, torch=GPU, bitsandbytes="")
    assert not four
    assert NAME in log and "not known" in log


def test_without_a_gpu_there_is_nothing_to_fill(tmp_path: Path) -> None:
    base = weighing(tmp_path / "base", 10 * ROOM)
    assert decided(tmp_path, base, torch=NO_GPU, bitsandbytes="") == ("", False)


def test_4_bits_by_name_need_no_look_at_the_gpu() -> None:
    assert _child.in_four_bits("anything", {"quantise": "4bit"})
    assert not _child.in_four_bits("anything", {"quantise": "none"})
