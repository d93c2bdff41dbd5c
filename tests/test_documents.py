"""What the documents show is what happens: their commands and programs are run, their configuration is loaded."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apprentice import config

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(name: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command: list[str], folder: Path, **more: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment() | more, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_two_commands_of_the_readme_are_targets_of_make() -> None:
    commands = re.findall(r"^    (make \w+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == ["make demo", "make test"]
    for command in commands:
        run([*command.split(), "--dry-run"], ROOT)


def test_make_demo_plays_a_part_of_the_recording() -> None:
    said = run(["make", "demo", "ARGS=--requests 30"], ROOT)
    assert "remote calls     30 (100.0%" in said


def test_the_readme_answers_a_request_with_its_own_configuration_and_program(tmp_path: Path) -> None:
    found = blocks("README.md")
    [text] = [body for kind, body in found if kind == "yaml"]
    config.parse(text)
    port = free_port()
    text = text.replace("api_key_env: OPENAI_API_KEY", f"base_url: http://127.0.0.1:{port}/v1\n  allow_internal: true")
    (tmp_path / "apprentice.yaml").write_text(text)
    rows = ["My invoice is wrong.", "Where is my parcel?"]
    teams = ["billing", "shipping"]
    lines = [f'{{"text": "{row}", "teacher": {{"team": "{team}"}}}}' for row, team in zip(rows, teams, strict=True)]
    (tmp_path / "recording.jsonl").write_text("\n".join(lines))
    server = subprocess.Popen(
        [sys.executable, "-m", "apprentice.testing", "recording.jsonl", "--port", str(port)],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert "127.0.0.1" in server.stdout.readline()
        [program] = [body for kind, body in found if kind == "python"]
        assert run([sys.executable, "-c", program], tmp_path).startswith("billing remote")
        commands = [body for kind, body in found if kind == "sh"]
        assert [c for c in commands if c.startswith("pip")] == ["pip install 'apprentice[embedded]'\n"]
        said = run(["bash", "-e", "-c", commands[-1]], tmp_path)
        assert '"team": "shipping"' in said
        assert "cold_start, 2 requests" in said
    finally:
        server.terminate()
        server.communicate()


def test_the_tutorial_ends_where_it_says(tmp_path: Path) -> None:
    port = str(free_port())
    programs = []
    for kind, body in blocks("docs/tutorial.md"):
        if kind == "sh":
            programs.append(body.replace("8417", port).replace("&\n", "> server.log 2>&1 & echo $! > server.pid\n"))
        elif kind == "python":
            programs.append(f"python - <<'PROGRAM'\n{body}PROGRAM\n")
    ready = "until grep -q 127.0.0.1 server.log; do :; done\n"
    script = "".join(program + (ready if "server.pid" in program else "") for program in programs)
    try:
        said = run(["bash", "-e", "-c", script], tmp_path)
    finally:
        if (tmp_path / "server.pid").exists():
            os.kill(int((tmp_path / "server.pid").read_text()), signal.SIGTERM)
    assert "missing" not in said  # on standard output; `check` warns on standard error
    assert "exit code 5" in said
    assert "steady" in said
    assert "{'team': 'billing'} by" in said
    assert "{'team': 'shipping'}" in said


@pytest.mark.parametrize("name", ["docs/extend.md"])
def test_the_evaluator_of_the_extension_page_passes_the_checks_it_names(name: str, tmp_path: Path) -> None:
    programs = [body for kind, body in blocks(name) if kind == "python"]
    run([sys.executable, "-c", "\n".join(programs)], tmp_path)


def test_the_reference_is_what_the_code_says() -> None:
    run([sys.executable, "docs/generate.py", "--check"], ROOT, COLUMNS="100")


def test_contributing_stays_short_and_the_readme_stays_a_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90
