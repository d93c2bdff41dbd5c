"""The OpenAPI document is true: requests made from it never end in a 5xx, and answers are what it says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from apprentice.testing.servers import Reply

from .conftest import Live, Serving

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


async def schemathesis(live: Live, folder: Path, examples: int, *options: str) -> tuple[int, str]:
    """What the tool says after so many requests an operation and phase."""
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{live.url}/openapi.json",
        "--header", f"Authorization: Bearer {live.key}", "--checks", CHECKS, "--max-examples", str(examples),
        "--seed", "1", "--no-color", "--mode", "all", "--generation-database", "none",
        *options,
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


@pytest.mark.parametrize(
    ("examples", "least"), [(6, 80), pytest.param(220, 5_000, marks=pytest.mark.slow)], ids=["quick", "full"]
)
async def test_no_request_made_from_the_document_ends_in_a_5xx(
    serving: Serving, tmp_path: Path, examples: int, least: int
) -> None:
    async with serving([Reply({"kind": "fruit"})]) as live:
        options = ("--phases", "examples,fuzzing") if examples < 100 else ()
        code, said = await schemathesis(live, tmp_path, examples, *options)
        text = (await live.client.get("/metrics")).text
    print(said[-2_000:])  # with -rP: how many cases of each operation there were
    assert code == 0, said[-5_000:]
    lines = [line for line in text.splitlines() if line.startswith("apprentice_http_requests_total")]
    assert sum(float(line.rpartition(" ")[2]) for line in lines) >= least
    assert not [line for line in lines if 'status="5' in line]
