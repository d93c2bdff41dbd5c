"""Each bench runs in its short form, says what it found as one JSON object, and fails when a bar does not hold."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from benches import Figure, Options, at_least, at_most, money, replay, run, students, versions
from benches.replay import Margin, Spender, Spread, accuracy, recording

from apprentice.demo import Row
from apprentice.types import Evidence

ROOT = Path(__file__).parents[1]


MEASURES: dict[str, Callable[[Options], list[Figure]]] = {
    "replay": partial(replay.measure, seeds=1),
    "students": students.measure,
    "versions": versions.measure,
    "money": money.measure,
}


@cache
def short(bench: str) -> dict[str, Any]:
    """What `--quick --json` of a bench prints: in this process, which has imported everything, where it is all the same."""
    if bench in MEASURES:
        with redirect_stdout(StringIO()) as said:
            status = run(bench, MEASURES[bench], ["--quick", "--json"])
        printed, problem = said.getvalue(), ""
    else:
        command = [sys.executable, "-m", f"benches.{bench}", "--quick", "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        status, printed, problem = done.returncode, done.stdout, done.stderr
    assert printed, problem
    found: dict[str, Any] = json.loads(printed)
    assert status == 0, [figure for figure in found["figures"] if not figure["holds"]]
    return found


@pytest.mark.parametrize("bench", ["controller", "replay"])
def test_the_short_form_is_one_object_and_every_bar_holds(bench: str) -> None:
    found = short(bench)
    assert list(found) == ["bench", "commit", "machine", "seconds", "figures"]
    assert found["bench"] == bench
    assert all(list(figure) == list(Figure._fields) for figure in found["figures"])
    assert any(figure["bar"] is not None for figure in found["figures"])


def test_students_are_measured_beside_a_trivial_rule() -> None:
    values = {figure["name"]: figure["value"] for figure in short("students")["figures"]}
    trivial, minilm = values["banking77, 250: most frequent"], values["banking77, 250: minilm"]
    assert 0 < trivial < 0.1 < 0.6 < minilm < 1
    assert values["answer of 6 words, p50"] > 0


def test_nothing_but_memory_on_purpose_grows_with_the_requests() -> None:
    values = {figure["name"]: figure["value"] for figure in short("soak")["figures"]}
    assert [values[f"more {name}"] for name in ("descriptors", "threads", "tasks")] == [0, 0, 0]
    assert values["memory a request, upper end"] < 4000  # vectors and evidence that are kept up to a limit


def test_baselines_spend_exactly_what_the_product_spent() -> None:
    share = {
        figure["name"].removeprefix("banking77, ").removesuffix(": remote share"): figure["value"]
        for figure in short("replay")["figures"]
        if figure["name"].endswith(": remote share")
    }
    assert list(share) == ["product", "naive", "random", "front-loading", "margin"]
    assert 0.5 < share["product"] < 1  # two thirds of the short form are asked before there is a student
    assert {share[name] for name in ("random", "front-loading", "margin")} == {share["product"]}


def test_the_way_back_is_short_and_a_killed_cycle_is_finished_by_the_next() -> None:
    values = {figure["name"]: figure["value"] for figure in short("versions")["figures"]}
    assert values["rollbacks"] >= 5
    assert values["rollback, p50"] > 0
    assert values["processes killed"] == values["exactly one version"] == values["it is the champion"] == 1
    assert values["of another content than undisturbed"] == 0


def test_a_judge_with_a_bill_of_his_own_finds_nothing_overspent() -> None:
    values = {figure["name"]: figure["value"] for figure in short("money")["figures"]}
    assert values["reservations"] >= 5_000
    assert values["kills"] >= 20
    nothing = ["overspend by the judge's bill", "charged calls without a row", "calls booked below their charge"]
    assert [values[name] for name in nothing] == [0, 0, 0]
    assert 0.1 < values["sockets: share of the cap on the bill"] < 1  # it is another bill than ours


def test_whatever_the_gateway_answered_is_recorded_and_settled() -> None:
    values = {figure["name"]: figure["value"] for figure in short("gateway")["figures"]}
    assert values["apprentice: calls without a Record, or the reverse"] == 0
    assert values["apprentice: states in the ledger besides settled"] == 0
    assert all(
        values[f"{label}: rps at 64"] > 0 for label in ("apprentice", "apprentice, model by name", "upstream itself")
    )


@pytest.mark.parametrize(
    ("kind", "calls"), [(kind, calls) for kind in (Spender, Spread, Margin) for calls in (0, 37, 90)]
)
def test_a_baseline_spends_its_calls_and_no_more(kind: type[Spender], calls: int) -> None:
    rule = kind(calls, 90)
    rule.start("v1", [0.1, 0.5, 0.9])
    asked: list[bool] = []
    for number in range(90):
        remote, evidence = rule.ask(number >= 10, (number * 37 % 90) / 90, (number * 53 % 90) / 90)
        assert isinstance(evidence, Evidence)
        asked.append(remote)
    assert sum(asked) == calls
    assert all(asked[:10]) == (calls >= 10)


def test_margin_asks_where_the_student_is_least_sure() -> None:
    rule = Margin(20, 100)
    rule.start("v1", [number / 100 for number in range(100)])
    sure = [(number * 37 % 100) / 100 for number in range(100)]
    asked = [rule.ask(True, value, 0.0)[0] for value in sure]
    assert max(value for value, was in zip(sure, asked, strict=True) if was) < 0.4


def test_balanced_accuracy_counts_every_class_alike() -> None:
    rows = [Row("a", "no", "no")] * 9 + [Row("b", "yes", "yes")] + [Row("c", "no", None)]
    assert accuracy(["no"] * 11, rows, balanced=False) == 0.9
    assert accuracy(["no"] * 11, rows, balanced=True) == 0.5


def test_a_recording_is_its_online_part_in_its_order_without_unparsed_answers(tmp_path: Path) -> None:
    lines = [
        {"text": "b\u2028", "teacher": "x", "gold": "x", "split": "online", "order": 2},
        {"text": "a", "teacher": "y", "gold": None, "split": "online", "order": 1},
        {"text": "c", "teacher": None, "gold": "x", "split": "online", "order": 3},
        {"text": "d", "teacher": "x", "gold": "x", "split": "test", "order": 0},
    ]
    with gzip.open(tmp_path / "some_mail.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    assert recording("mail", tmp_path) == [Row("a", "y", None), Row("b\u2028", "x", "x")]
    with pytest.raises(SystemExit, match="letters"):
        recording("letters", tmp_path)


@pytest.mark.parametrize(("value", "status"), [(0.5, 0), (0.7, 1), (float("nan"), 1)])
def test_a_bench_fails_when_a_bar_does_not_hold(value: float, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(options: Options) -> list[Figure]:
        return [at_most("above", value, 0.6), at_least("below", 1.0, 0.6)]

    assert run("none", measure, ["--json"]) == status
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [figure["holds"] for figure in figures] == [status == 0, True]
