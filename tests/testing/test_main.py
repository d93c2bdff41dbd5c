"""`python -m apprentice.testing`: a recording answers in the format that was asked for."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest


async def test_a_recording_answers_in_the_format_that_was_asked_for(tmp_path: Path) -> None:
    recording = tmp_path / "recording.jsonl"
    recording.write_text(json.dumps({"text": "x", "teacher": {"label": "ham"}}) + "\n")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "apprentice.testing", str(recording), "--format", "google", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        url = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().split()[-1]
        body = {"contents": [{"role": "user", "parts": [{"text": '{"text": "x"}'}]}]}
        async with httpx2.AsyncClient() as client:
            answer = await client.post(f"{url}/v1beta/models/m:generateContent", json=body)
        assert json.loads(answer.json()["candidates"][0]["content"]["parts"][0]["text"]) == {"label": "ham"}
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize(
    ("arguments", "problem"), [(["a.jsonl", "--format", "smoke-signals"], "smoke-signals"), (["a.jsonl"], "a.jsonl")]
)
def test_a_format_or_a_recording_that_does_not_exist_ends_with_two(
    arguments: list[str], problem: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "apprentice.testing", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=60)
    assert ended.returncode == 2
    assert problem in ended.stderr
    assert "Traceback" not in ended.stderr
