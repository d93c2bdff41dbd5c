from __future__ import annotations

import io
import json
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apprentice import cli, jobs
from apprentice.cli.terminal import when
from apprentice.types import Lease

from .conftest import YAML, texts

Run = Callable[..., tuple[int, str, str]]
CALM = YAML.replace("local:", "local:\n  learn: 'off'")  # teaches when it is told to


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in the test's folder: (exit code, output, what was said on standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = cli.main(arguments)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A remote that a process of its own serves, for all tests."""
    program = (
        "import asyncio\n"
        "from tests.conftest import honest\n"
        "from apprentice.testing.servers import serve_openai\n"
        "async def main():\n"
        "    async with serve_openai(honest) as server:\n"
        "        print(server.url, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.communicate()


@pytest.fixture
def folder(tmp_path: Path, url: str) -> Path:
    """The test's folder, with the configuration of the tests for that remote."""
    (tmp_path / "apprentice.yaml").write_text(CALM.replace("BASE_URL", url))
    return tmp_path


def test_init_writes_a_file_that_check_accepts(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(
        "init", "--task", "mail", "--description", "Sort mail", "--input", "{text: str}", "--output", "{label: [a, b]}"
    )
    assert code == 0 and "apprentice.yaml" in out
    code, out, _ = run("check", "--json")
    assert code == 0
    assert json.loads(out)["tasks"] == ["mail"]
    assert run("check")[0] == 0


def test_init_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "apprentice.yaml").write_text("mine")
    assert run("init", "--task", "mail", "--description", "d")[0] == 2
    assert (tmp_path / "apprentice.yaml").read_text() == "mine"


class Person(io.StringIO):
    """Somebody at a terminal who has typed this."""

    def isatty(self) -> bool:
        return True


def test_init_asks_for_what_no_flag_says(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Person("mail\nSort mail\n{text: str}\n{label: [a, b]}\n"))
    assert cli.main(["init", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"file": "apprentice.yaml"}
    assert "name of the task" in said.err
    assert json.loads(run("check", "--json")[1])["tasks"] == ["mail"]
    monkeypatch.setattr(sys, "stdin", Person("mail\n"))
    assert cli.main(["init", "--file", "other.yaml"]) == 2
    assert "--description" in capsys.readouterr().err


def test_init_says_where_it_cannot_write(run: Run) -> None:
    code, _, err = run(
        "init",
        "--task",
        "a",
        "--description",
        "b",
        "--input",
        "{t: str}",
        "--output",
        "{b: bool}",
        "--file",
        "no/x.yaml",
    )
    assert code == 2 and "no/x.yaml" in err


def test_init_says_what_it_needs_where_nobody_can_be_asked(run: Run) -> None:
    code, _, err = run("init", "--task", "mail")
    assert code == 2 and "--description" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "sort", "--input", '{"text": ""}'], 3),
        (["run", "sort", "--input", '{"txt": "a"}'], 3),
        (["run", "sort", "--input", "{"], 3),
        (["run", "sotr", "--input", '{"text": "a pear"}'], 3),
        (["run", "sort", "--input", '{"text": "a pear"}', "--config", "no.yaml"], 2),
        (["learn", "sort"], 1),
        (["nonsense"], 2),
        (["demo", "--requests", "0"], 2),
        (["demo", "--task", "nothing"], 2),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(run: Run, folder: Path, arguments: list[str], code: int) -> None:
    found, out, err = run(*arguments)
    assert found == code
    assert err and not out


def test_with_json_a_failure_is_an_object_too(run: Run, folder: Path) -> None:
    code, out, err = run("run", "sort", "--json", "--input", '{"text": ""}')
    assert (code, err) == (3, "")
    assert json.loads(out)["error"] == "InvalidInput"


def test_lines_in_lines_out_and_a_bad_line_stops_nobody(run: Run, folder: Path) -> None:
    lines = [json.dumps({"text": text}) for text in texts(3)]
    lines.insert(1, "not json")
    lines.insert(2, json.dumps({"text": ""}))
    lines.insert(3, "[" * 100_000)
    lines.insert(4, "9" * 5_000)
    code, out, _ = run("run", "sort", stdin="\n".join(lines) + "\n\n")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 3
    assert [line.get("error") for line in found] == [
        None,
        "InvalidRequest",
        "InvalidInput",
        *["InvalidRequest"] * 2,
        None,
        None,
    ]
    code, out, _ = run("status", "--json")
    [status] = json.loads(out)
    assert (status["requests"], status["confidence"]["phase"]) == (3, "cold_start")
    code, out, _ = run("report", "--json")
    [told] = json.loads(out)
    assert told["cost"] == sum(round(line["cost_usd"] * 1e6) for line in found if "cost_usd" in line) > 0
    for command in ("status", "report"):
        assert "sort" in run(command)[1]


def test_a_line_that_the_caps_or_the_deadline_refuse_stops_nobody(run: Run, folder: Path) -> None:
    lines = "\n".join(json.dumps({"text": text}) for text in texts(3))
    code, out, _ = run("run", "sort", "--deadline", "0", stdin=lines)
    assert code == 1
    assert [json.loads(line)["error"] for line in out.splitlines()] == ["DeadlineExceeded"] * 3
    file = folder / "apprentice.yaml"
    file.write_text(file.read_text() + "budget: {total: 0}\n")
    code, out, _ = run("run", "sort", stdin=lines)
    assert code == 4
    assert [json.loads(line)["error"] for line in out.splitlines()] == ["BudgetExhausted"] * 3


def test_learn_makes_a_version_at_once_and_status_shows_it(run: Run, folder: Path) -> None:
    run("run", "sort", stdin="\n".join(json.dumps({"text": text}) for text in texts(60)))
    code, out, _ = run("learn", "sort", "--json")
    assert code == 0 and json.loads(out)["state"] == "champion"
    code, out, _ = run("status")
    assert "reinforcement" in out and "v1" in out


def test_status_shows_how_far_a_training_is_that_goes_on(run: Run, folder: Path) -> None:
    run("run", "sort", stdin='{"text": "a pear"}')
    into = folder / "models" / "sort"
    job = into / ".training" / "a"
    job.mkdir(parents=True)
    (job / "row.json").write_text('{"name": "a", "token": 4}')
    with jobs.shown(into, trainer="huggingface", since=1.0, lease=Lease("learn/sort", "tests", 4, 0.0)):
        [line] = [line for line in run("status", "sort")[1].splitlines() if line.startswith("  training ")]
        assert line == f"  training    huggingface, since {when(1.0)}"
        told = job / "progress.jsonl"
        told.write_text('{"step": 120, "steps": 1400, "loss": 0.41234, "held_loss": 0.5, "eta": 605.0}\n')
        [line] = [line for line in run("status")[1].splitlines() if line.startswith("  training ")]
        assert line == (
            f"  training    huggingface, since {when(1.0)}, step 120 of 1,400, loss 0.4123, 0.5 on kept-back examples, "
            f"about 10 min left (told {when(told.stat().st_mtime)})"
        )
        [status] = json.loads(run("status", "sort", "--json")[1])
        assert (status["training"]["step"], status["training"]["loss"]) == (120, 0.41234)
    assert "training " not in run("status")[1]
    assert json.loads(run("status", "--json")[1])[0]["training"] is None
    code, _, err = run("status", "sorted")
    assert code != 0 and "'sort'" in err


def test_report_says_what_a_versions_confidence_is_worth(run: Run, folder: Path) -> None:
    lines = [json.dumps({"text": text}) for text in texts(90)]
    run("run", "sort", stdin="\n".join(lines[:60]))
    run("learn", "sort")
    assert "ECE" not in run("report")[1]
    run("run", "sort", stdin="\n".join(lines[60:]))
    [told] = json.loads(run("report", "--json")[1])
    text = run("report")[1]
    [found] = told["calibration"]
    assert found["version"] == "v1"
    assert 20 <= found["n"] <= 30
    assert f"  v1: confidence is off by {found['ece']:.3f} (ECE)" in text
    assert (f"AUROC of {found['auroc']:.3f}" if found["auroc"] is not None else "(ECE), on") in text


def test_replay_and_explain_tell_what_was_decided_and_why(run: Run, folder: Path) -> None:
    run("run", "sort", stdin="\n".join(json.dumps({"text": text}) for text in texts(45)))
    run("learn", "sort")
    run("run", "sort", stdin="\n".join(json.dumps({"text": text}) for text in texts(5, seed=2)))
    code, out, _ = run("replay", "sort", "--json")
    *steps, end = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [step["decision"]["reason"] for step in steps] == ["no_local_model"] * 45 + ["learning"] * 5
    assert (end["records"], end["exact"], end["differs"]) == (50, 50, [])
    code, out, _ = run("replay", "sort")
    assert code == 0 and len(out.splitlines()) == 52
    assert "equals the engine's" in out.splitlines()[-1]
    last = steps[-1]["request_id"]
    code, out, _ = run("explain", last)
    told = " ".join(out.split())
    for words in (last, "remote model was served", "both are asked", "100.0%", '"kind"', "Their score", "contract"):
        assert words in told
    code, out, _ = run("explain", last, "--json")
    found = json.loads(out)
    assert (code, found["seq"], found["lag"], found["before"]["phase"]) == (0, 50, 0, "reinforcement")
    assert run("explain", "nope")[0] == 3


def test_mode_is_shown_by_status_until_it_ends(run: Run, folder: Path) -> None:
    assert run("mode", "sort", "remote")[0] == 2  # no store yet
    run("run", "sort", "--input", '{"text": "a pear"}')
    code, out, _ = run("mode", "sort", "remote", "--for", "90s", "--json")
    mode = json.loads(out)
    assert (code, mode["mode"], mode["until"] - mode["at"]) == (0, "remote", 90)
    assert "the remote alone answers" in run("status")[1]
    assert run("mode", "sort", "auto")[0] == 0
    assert "the remote alone answers until" not in run("status")[1]
    assert run("mode", "sort", "auto", "--for", "2h")[0] == 2
    assert run("mode", "sotr", "auto")[0] == 3


@pytest.mark.parametrize("time", ["2", "h", "0s", "-1h", "2 h", "2w", "1e3s", "٢h"])
def test_a_time_that_is_none_is_refused(run: Run, tmp_path: Path, time: str) -> None:
    code, _, err = run("mode", "sort", "remote", f"--for={time}")
    assert code == 2 and "90s, 30m, 2h or 7d" in err


@pytest.mark.parametrize("second", ["--csv", "--webhook"])
def test_two_kinds_of_report_at_once_are_refused(run: Run, folder: Path, second: str) -> None:
    code, _, err = run("report", "--html", str(folder / "report.html"), second)
    assert code == 2 and f"--html and {second} are two reports" in err
    assert not (folder / "report.html").exists()


def test_check_names_a_model_that_would_be_refused_because_its_price_is_unknown(run: Run, folder: Path) -> None:
    known = (folder / "apprentice.yaml").read_text()
    assert json.loads(run("check", "--json")[1])["missing"] == []
    assert "good, 1 task" in run("check")[1]
    (folder / "apprentice.yaml").write_text(known.replace("model: gpt-4o-mini", "model: gpt-nowhere"))
    code, out, _ = run("check", "--json")
    assert code == 0
    (missing,) = json.loads(out)["missing"]
    assert "openai/gpt-nowhere" in missing and "price: {input: …, output: …}" in missing
    _, out, err = run("check")
    assert (
        "not ready to serve" in out
        and "gpt-nowhere" in err
        and run("run", "sort", "--input", '{"text": "a pear"}')[0] == 4
    )


@pytest.mark.parametrize("number", ["-1", "0", "nan", "inf"])
@pytest.mark.parametrize("arguments", [("worker", "--every"), ("advise", "sort", "--seconds")])
def test_seconds_that_cannot_pass_are_refused_before_anything_is_done(
    run: Run, folder: Path, arguments: tuple[str, ...], number: str
) -> None:
    code, out, err = run(*arguments[:-1], f"{arguments[-1]}={number}")
    assert (code, out) == (2, "") and f"{arguments[-1]}: {number} is not above 0" in err
    assert not (folder / ".apprentice").exists()


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_that_cannot_be_is_refused(run: Run, folder: Path, port: str) -> None:
    code, out, err = run("serve", f"--port={port}")
    assert (code, out) == (2, "") and f"--port: {port} is no port" in err


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (("explain", "nope"), "replay TASK --json"),
        (("keys", "create"), "keys create NAME"),
        (("keys", "list", "x"), "keys list"),
        (("models", "bench"), "models bench TASK"),
        (("models", "pull"), "models pull MODEL"),
        (("label", "sort", "nofile"), "name a file"),
        (("import", "--from", "litellm", "--task", "sort", "."), "name a file"),
        (("demo", "--data-dir", "."), "--data-dir"),
        (("feedback", "nope", "--corrected", "{"), "say --corrected"),
        (("run", "sort", "--input", "{"), "say --input"),
        (("export", "sort", "--out", "apprentice.yaml"), "--out DIR"),
    ],
)
def test_a_slip_of_the_command_line_is_not_blamed_on_the_configuration(
    run: Run, folder: Path, arguments: tuple[str, ...], fix: str
) -> None:
    run("run", "sort", "--input", '{"text": "a pear"}')
    code, _, err = run(*arguments)
    assert code in (2, 3) and fix in err and "apprentice check" not in err


@pytest.mark.parametrize("period", ["90", "90x", "-5d", "0d", "1.5d", "d", "100000d"])
def test_a_period_that_is_none_is_refused_with_one_that_is(run: Run, folder: Path, period: str) -> None:
    with (folder / "apprentice.yaml").open("a") as file:
        file.write(f'retention: {{inputs: "{period}"}}\n')
    code, _, err = run("check")
    assert code == 2 and "retention.inputs" in err and "such as 90d" in err


def test_an_address_is_announced_by_the_one_who_has_it(run: Run, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("serve", f"--port={port}")
    assert (code, out) == (2, "") and f"cannot listen on 127.0.0.1:{port}" in err
    assert "apprentice at" not in err


def test_plan_finds_the_floor_and_says_what_it_assumes(run: Run, folder: Path) -> None:
    wanted = ("--delay", "500", "--drop", "0.4", "--requests-per-day", "20000")
    code, out, _ = run("plan", *wanted, "--cost", "0.002", "--json")
    found = json.loads(out)
    assert (code, found["floor"], found["audits_per_day"], found["local_share"]) == (0, 0.02, 400, 0.6)
    assert found["saving_per_month"] == pytest.approx(30 * 20_000 * 0.6 * 0.98 * 2000)
    assert run("plan", *wanted)[0] == 2  # neither a price nor a store to take it from
    answered = json.loads(run("run", "sort", "--input", '{"text": "a pear"}')[1])
    code, out, _ = run("plan", *wanted, "--task", "sort", "--json")
    assert json.loads(out)["cost"] == pytest.approx(answered["cost_usd"] * 1e6)
    code, out, _ = run("plan", *wanted, "--local-share", "0.5")
    assert code == 0 and "min_floor 0.02" in out and "assumed" in out and "50%" in out
    assert "measured for drops of 30 %" in run("plan", *wanted[:2], "--drop", "0.1", *wanted[4:])[1]
    assert run("plan", *wanted[:2], "--drop", "1.5", *wanted[4:])[0] == 2


def test_run_says_on_a_terminal_what_the_floor_means(run: Run, folder: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ["run", "sort", "--input", '{"text": "a pear"}']
    process = subprocess.run(
        [sys.executable, "-m", "apprentice.cli", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=True,
    )  # fmt: skip
    os.close(theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    assert "served agreement of 80% is promised" in said
    assert json.loads(process.stdout)["output"] == {"kind": "fruit"}
    assert run(*arguments)[2] == ""  # nobody looks


def test_status_before_the_first_request_says_what_to_do(run: Run, tmp_path: Path) -> None:
    (tmp_path / "apprentice.yaml").write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))
    code, _, err = run("status")
    assert code == 2 and "apprentice run" in err


def test_licence_says_in_one_screen_whose_answers_serve_and_do_not_train_until_somebody_is_named(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "apprentice.yaml"
    text = """
tasks:
  - name: route_mail
    description: "Say which team a mail is for"
    input_schema: {text: str}
    output_schema: {team: str, urgent: bool}
    evaluator: structured_match
    match_fields: [team]
remote:
  provider: anthropic
  model: claude-sonnet-4-5-20250929
  additional_providers:
    - {provider: openai, model: gpt-4o}
local: {backend: ollama, base_model: "llama3.1:8b", fine_tune_backend: unsloth}
"""
    file.write_text(text)
    code, said, _ = run("licence")
    lines = said.splitlines()
    assert code == 0 and len(lines) <= 24 and max(map(len, lines)) <= 120
    assert lines[0].startswith("Answers of all models serve. They train a local model only where")
    verdicts = [line for line in lines if "serves;" in line]
    assert verdicts == [
        "remote: claude-sonnet-4-5-20250929 (anthropic@api.anthropic.com) serves; does not train [forbidden]",
        "additional: gpt-4o (openai@api.openai.com) serves; does not train [conditional]",
    ]
    flat = " ".join(said.split())
    for part in (
        "because: forbidden by Anthropic",
        "because: allowed on conditions only by OpenAI",
        "record that in its `permission: {basis, by, date, scope}`",
        "Nothing is learned until a permission or a teacher is named",
        "People's own labels always train.",
        "no legal advice",
    ):
        assert part in flat

    teacher = '{provider: openai, model: Qwen/Qwen3-32B, base_url: "http://127.0.0.1:9", allow_internal: true}'
    file.write_text(f"{text}teachers:\n  - {teacher}\n")
    code, said, _ = run("licence")
    assert code == 0 and "Nothing is learned" not in said and "serves; trains route_mail [permissive]" in said
    assert said.count("serves; does not train") == 2

    permission = '{basis: "a letter of 2 March", by: "the legal team", date: "2024-03-02", scope: "route_mail"}'
    file.write_text(text.replace("model: gpt-4o}", f"model: gpt-4o, permission: {permission}}}"))
    code, said, _ = run("licence")
    assert code == 0 and "Nothing is learned" not in said and "a letter of 2 March" in said
    assert said.count("serves; does not train") == 1 and "additional: gpt-4o" in said


def test_schema_is_a_json_schema_of_the_file(run: Run) -> None:
    schema: dict[str, Any] = json.loads(run("schema")[1])
    assert "tasks" in schema["properties"]
    assert json.loads(run("schema", "--json")[1]) == schema


def test_every_command_has_help_with_an_example(run: Run) -> None:
    code, out, _ = run("--help")
    commands = re.search(r"\n    (demo) ", out)
    assert code == 0 and commands is not None
    for command in (
        "demo",
        "init",
        "check",
        "schema",
        "run",
        "status",
        "report",
        "mode",
        "replay",
        "explain",
        "plan",
        "learn",
        "worker",
    ):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"example: apprentice {command}" in " ".join(out.split())


# --- label ------------------------------------------------------------------------------------------------------------


def inputs_file(folder: Path, n: int, name: str = "inputs.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(n)))
    return name


def test_label_says_what_it_would_cost_and_then_has_a_file_answered(run: Run, folder: Path) -> None:
    name = inputs_file(folder, 12)
    code, out, _ = run("label", "sort", name, "--dry-run", "--json")
    planned = json.loads(out)
    assert (code, planned["size"], planned["batches"], planned["labels"]) == (0, 12, [], 0)
    assert planned["worst_usd"] > 0
    code, out, _ = run("label", "sort", name, "--every", "0.01")
    assert code == 0
    assert "12 inputs to send in 1 batch; at most $" in out
    assert "done, $" in out and out.endswith("sort: 12 labelled inputs in all\n")
    code, out, _ = run("label", "sort", inputs_file(folder, 15), "--dry-run")
    assert "3 inputs to send in 1 batch, 12 answered before; at most $" in out and "by the answers so far" in out
    report = json.loads(run("report", "--json")[1])
    assert [line[2] for line in report[0]["spending"]] == ["batch"]
    first = json.loads(run("replay", "sort", "--json")[1].splitlines()[0])
    assert "in a batch" in run("explain", first["request_id"])[1]


def test_label_sends_now_and_collects_later(run: Run, folder: Path) -> None:
    name = inputs_file(folder, 9)
    code, out, _ = run("label", "sort", name, "--no-wait", "--limit", "5", "--json")
    sent = json.loads(out)
    assert (code, sent["size"], sent["left"], sent["labels"]) == (0, 5, 4, 0)
    assert [(batch["state"], batch["inputs"]) for batch in sent["batches"]] == [("submitted", 5)]
    for _ in range(3):
        code, out, _ = run("label", "sort", "--collect", "--json")
    assert (code, json.loads(out)["labels"], json.loads(out)["batches"]) == (0, 5, [])
    code, out, _ = run("label", "sort", name, "--dry-run", "--json")
    assert (json.loads(out)["size"], json.loads(out)["answered"]) == (4, 5)


def test_label_judges_the_whole_file_before_anything_is_sent(run: Run, folder: Path) -> None:
    name = inputs_file(folder, 3)
    with (folder / name).open("a") as file:
        file.write('{"txt": "x"}\n')
    code, _, err = run("label", "sort", name)
    assert code == 3
    assert "line 4" in err and "text: is missing" in err and "nothing was sent" in err
    assert not (folder / ".apprentice").exists()
    assert run("label", "sort")[0] == 2
    assert run("label", "sort", "nowhere.jsonl")[0] == 2


def test_label_ends_with_the_code_of_a_model_when_a_batch_fails(run: Run, tmp_path: Path) -> None:
    text = CALM.replace("BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    (tmp_path / "apprentice.yaml").write_text(
        text.replace("provider: openai", "provider: openai\n  price: {input: 1, output: 1}")
    )
    code, out, _ = run("label", "sort", inputs_file(tmp_path, 3), "--no-wait", "--json")
    assert [batch["state"] for batch in json.loads(out)["batches"]] == ["prepared"]
    assert code == 0  # it is tried again by whoever collects
    code, out, _ = run("label", "sort", "--cancel", "--collect", "--json")
    assert (code, json.loads(out)["cancelled"]) == (0, 0)
