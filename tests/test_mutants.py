"""The tests of money bite: each of these small mistakes in the product makes one of them fail.

A mistake is made in a copy of the source; the tests run against the copy. `make test` tries two, drawn by a seed that
changes with the source; `make slow` tries all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import Phase, settings

settings.register_profile("mutants", phases=[Phase.generate])  # the first counterexample will do; nobody reads it

ROOT = Path(__file__).parents[1]
LIMIT = "tests/stores/test_ledger.py::test_a_limit_holds_to_the_micro_dollar"
PROMISE = "tests/stores/test_contract.py::test_store_keeps_the_promise"
BOOKED = f"{PROMISE}[sqlite-a_hold_is_booked_in_all_windows_or_none]"
ENDS = f"{PROMISE}[sqlite-a_hold_ends_once]"
OPEN = f"{PROMISE}[sqlite-an_open_hold_outlives_its_process]"
WRITER = "tests/stores/test_writer.py"
SQLITE = "tests/stores/test_sqlite.py"
BUDGET = "tests/test_budget.py"
WIRE = "tests/test_wire.py tests/test_wire_outcomes.py"


class Mutant(NamedTuple):
    """A mistake: in this file the text `old` (which is there once) became `new`; one of `tests` has to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(file: str, *mutants: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(name, file, old, new, tuple(tests.split())) for name, old, new, tests in mutants]


MUTANTS = [
    *_of(
        "stores/__init__.py",
        (
            "open holds do not count",
            "if amount.spent + amount.held + hold.worst <= cap.limit:",
            "if amount.spent + hold.worst <= cap.limit:",
            LIMIT,
        ),
        (
            "the call itself does not count",
            "if amount.spent + amount.held + hold.worst <= cap.limit:",
            "if amount.spent + amount.held < cap.limit:",
            LIMIT,
        ),
        (
            "one micro-dollar over the limit",
            "if amount.spent + amount.held + hold.worst <= cap.limit:",
            "if amount.spent + amount.held + hold.worst <= cap.limit + 1:",
            LIMIT,
        ),
        (
            "the last micro-dollar cannot be spent",
            "if amount.spent + amount.held + hold.worst <= cap.limit:",
            "if amount.spent + amount.held + hold.worst < cap.limit:",
            LIMIT,
        ),
        ("one cap with room is enough", "                continue\n", "                break\n", LIMIT),
        (
            "said to be exhausted while waiting helps",
            "if amount.spent + hold.worst > cap.limit:",
            "if amount.spent + hold.worst >= cap.limit:",
            LIMIT,
        ),
        ("an attempt may be reserved twice", "if hold.attempt_id in self.entries:", "if False:", BOOKED),
        ("a cap may limit a window that is not booked", "if cap.window not in hold.windows:", "if False:", BOOKED),
        (
            "a hold is booked in its first window only",
            "        windows = dict.fromkeys(hold.windows)\n",
            "        windows = dict.fromkeys(hold.windows[:1])\n",
            LIMIT,
        ),
        ("an attempt may be settled twice", 'if entry.state != "held":', "if False:", ENDS),
        (
            "an unknown outcome costs nothing",
            'booked = max(cost, worst) if state == "assumed" else cost',
            "booked = cost",
            ENDS,
        ),
        (
            "no more is booked than was held",
            'booked = max(cost, worst) if state == "assumed" else cost',
            'booked = worst if state == "assumed" else min(cost, worst)',
            ENDS,
        ),
        ("a hold is freed by what the call cost", "amount.held -= worst", "amount.held -= booked", LIMIT),
        ("only the last call counts", "amount.spent += booked", "amount.spent = booked", LIMIT),
        (
            "an altered window is believed",
            "if amount.seal(window) != seal:",
            "if False:",
            f"{SQLITE}::test_an_altered_window_is_an_error_and_never_room",
        ),
    ),
    *_of(
        "stores/_writer.py",
        (
            "a transaction begins without the lock",
            'self._connection.execute("BEGIN IMMEDIATE")',
            'self._connection.execute("BEGIN")',
            f"{SQLITE}::test_a_writer_that_does_not_queue_makes_us_wait_and_then_fail",
        ),
        (
            "a settlement leaves the row open",
            "SET state = column2, cost = column3, seal",
            "SET cost = column3, seal",
            ENDS,
        ),
        (
            "what is spent in a window is not written",
            "SET spent = excluded.spent, held = excluded.held, seal",
            "SET held = excluded.held, seal",
            ENDS,
        ),
        (
            "a window without a row is empty, whatever became of the row",
            "if len(found) < len(set(windows)):",
            "if False:",
            f"{SQLITE}::test_an_altered_window_is_an_error_and_never_room",
        ),
        (
            "writing goes on after a failed fsync",
            "if lost or code in FSYNC_CODES or isinstance(known, StoreCorrupt):",
            "if isinstance(known, StoreCorrupt):",
            f"{SQLITE}::test_a_failed_fsync_ends_writing_until_somebody_looks",
        ),
        (
            "a loop waits for a slow disk",
            "if self._takes >= SOON or len(writes) > FEW",
            "if len(writes) > FEW",
            f"{WRITER}::test_a_loop_waits_for_a_quick_disk_itself_and_never_for_a_slow_one",
        ),
        (
            "what a loop could not write is forgotten",
            "self._give([write for write in writes if not write.done])",
            "pass",
            f"{WRITER}::test_the_loop_goes_on_while_another_process_has_its_turn",
        ),
    ),
    *_of(
        "stores/sqlite.py",
        (
            "a commit is not on the disk when it is acknowledged",
            'connection.pragma("synchronous", "FULL")',
            'connection.pragma("synchronous", "NORMAL")',
            "tests/stores/test_faults.py::test_a_fault_at_any_operation_leaves_calls_whole_or_undone[power-all]",
        ),
        (
            "a hold of this very moment is old",
            "WHERE state = 'held' AND at < ?",
            "WHERE state = 'held' AND at <= ?",
            OPEN,
        ),
        (
            "open holds are not shown as spent",
            "window: amount.spent + amount.held for window",
            "window: amount.spent for window",
            OPEN,
        ),
    ),
    *_of(
        "budget.py",
        (
            "the worst case is rounded down",
            "return -(-(max(rates.fresh, rates.cached) * request_bytes",
            "return +(+(max(rates.fresh, rates.cached) * request_bytes",
            BUDGET,
        ),
        (
            "the worst case forgets a dear cache",
            "max(rates.fresh, rates.cached) * request_bytes",
            "rates.fresh * request_bytes",
            BUDGET,
        ),
        (
            "the worst case forgets the answer",
            "* request_bytes + rates.output * max_tokens)",
            "* request_bytes + rates.output)",
            BUDGET,
        ),
        (
            "the clock re-opens a window",
            "datetime.fromtimestamp(max(at, seen), zone)",
            "datetime.fromtimestamp(at, zone)",
            BUDGET,
        ),
        (
            "the week of New Year is another one",
            'f"week:{year:04}-W{week:02}"',
            'f"week:{day.year:04}-W{week:02}"',
            BUDGET,
        ),
        ("limits are rounded up", "limit=math.floor(_exact(limit,", "limit=math.ceil(_exact(limit,", BUDGET),
        ("a task's limits are those of all tasks", "(own, found[4:])", "(own, found[:4])", BUDGET),
        ("a price may be negative", "not number.is_finite()) or number < 0:", "not number.is_finite()):", BUDGET),
        ("a cost is rounded down", "return -(-(rates.fresh * uncached", "return +(+(rates.fresh * uncached", BUDGET),
    ),
    *_of(
        "wire.py",
        (
            "an error of the server is free",
            'kind, retryable = "unknown", status in _AMBIGUOUS',
            'kind, retryable = "rejected", status in _AMBIGUOUS',
            WIRE,
        ),
        (
            "a request that took too long is free",
            "_AMBIGUOUS = frozenset({408, 409, 425})",
            "_AMBIGUOUS = frozenset({409, 425})",
            WIRE,
        ),
        (
            "whoever says 400 is the provider",
            "not in _AMBIGUOUS and _is_provider_error(body):",
            "not in _AMBIGUOUS:",
            WIRE,
        ),
        (
            "an answer that is cut is free",
            'return Outcome("unknown", True, status, headers, problem=f"{status} without',
            'return Outcome("rejected", True, status, headers, problem=f"{status} without',
            WIRE,
        ),
        (
            "a connection that breaks after the request left is free",
            'return Outcome("unknown" if left else "not_sent", True, problem=_told(error))',
            'return Outcome("not_sent", True, problem=_told(error))',
            WIRE,
        ),
        (
            "a time-out after the request left is free",
            'return Outcome("unknown" if left else "not_sent", True, problem=f"no answer',
            'return Outcome("not_sent", True, problem=f"no answer',
            WIRE,
        ),
    ),
]
NAMES = [mutant.name for mutant in MUTANTS]


def ran(mutant: Mutant, folder: Path, *, mutate: bool = True) -> tuple[int, str]:
    """The exit status and the output of the mutant's tests against a copy of the source, with the mistake or without."""
    source = folder / "src"
    shutil.copytree(ROOT / "src", source)
    if mutate:
        file = source / "apprentice" / mutant.file
        text = file.read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.name}: the text should be in {mutant.file} once"
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    command += ["-p", __name__, "--hypothesis-profile", "mutants", *mutant.tests]
    found = os.environ | {"PYTHONPATH": str(source), "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "examples")}
    done = subprocess.run(command, cwd=ROOT, env=found, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def killed(mutant: Mutant, folder: Path) -> bool:
    """Whether a test failed. A copy on which no test runs is nobody's merit, and raises AssertionError."""
    status, output = ran(mutant, folder)
    assert status in (0, 1), output
    return status == 1


def test_two_mistakes_are_noticed(tmp_path: Path) -> None:
    seed = zlib.crc32(b"".join((ROOT / "src/apprentice" / m.file).read_bytes() for m in MUTANTS))
    drawn = Random(seed).sample(MUTANTS, 2)
    living = [mutant.name for number, mutant in enumerate(drawn) if not killed(mutant, tmp_path / str(number))]
    assert living == []


def test_without_a_mistake_nothing_is_noticed(tmp_path: Path) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.tests == (ENDS,))
    status, output = ran(mutant, tmp_path, mutate=False)
    assert status == 0, output


def test_every_mistake_is_one_of_its_own_and_can_be_made() -> None:
    assert len(set(NAMES)) == len({mutant[1:4] for mutant in MUTANTS}) == len(MUTANTS) >= 25
    for mutant in MUTANTS:
        text = (ROOT / "src/apprentice" / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.name}: the text should be in {mutant.file} once"
        assert mutant.new != mutant.old


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_mistake_is_noticed(name: str, tmp_path: Path) -> None:
    assert killed(MUTANTS[NAMES.index(name)], tmp_path)
