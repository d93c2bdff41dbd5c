"""Stores in memory, where there is room: what is cut off here is a process, never the power of the machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")
ROOM = 2**30


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder for one test; without the fsyncs of a disk, on which these tests would wait most of their time."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
    with tempfile.TemporaryDirectory(dir=MEMORY if roomy else None) as name:
        yield Path(name)
