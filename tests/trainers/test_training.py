"""Training in a child process: what the child is given, and what is left when child or worker are killed or taken over.

The child is a small program (pupil.py) on a tiny model; everything around it, llama.cpp included, is real.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice import jobs, plugins, process, report, weights
from apprentice.calibration import SAME, calibrate, checked
from apprentice.config import Config
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.purse import Purse
from apprentice.testing.local_servers import serve_llama_cpp
from apprentice.testing.tiny import write_tiny
from apprentice.testing.trainers import TASK, examples
from apprentice.trainers import _training
from apprentice.trainers._training import Recipe, Trained
from apprentice.types import Checkpoint, Example, Json, Store

from ..conftest import YAML
from .folders import as_folder

PUPIL = Path(__file__).with_name("pupil.py")
SERVING = {"threads": 1, "context": 512, "max_tokens": 24}
LAST = 12
ROWS = 24  # examples: of each that is held back a server is asked


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "tiny.gguf")


def pupil(base: Path, **changes: Json) -> Trained:
    settings = {"steps": LAST, "effect": 1.0, "fail_at": None, "halt_at": None} | changes

    def command(folder: Path) -> Sequence[str]:
        return [sys.executable, str(PUPIL), str(folder)]

    return Trained(Recipe("pupil", str(base), base, settings, command, serving=SERVING))


def folder_of(into: Path) -> Path:
    """The folder of the one job that there is."""
    [found] = (into / ".training").iterdir()
    return found


def files(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.path.iterdir()}


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def steps(into: Path) -> list[int]:
    told = [path.read_text().splitlines() for path in into.glob(".training/*/progress.jsonl")]
    return [json.loads(line)["step"] for lines in told for line in lines]


class Halted:
    """A training in a thread, whose child waits at step 8, after its checkpoint of step 5."""

    def __init__(self, trainer: Trained, into: Path, token: int = 0, rows: list[Example] | None = None) -> None:
        self.trainer, self.into = trainer, into
        self.trainer.lead(token)
        self._pool = ThreadPoolExecutor(1)
        rows = examples(ROWS) if rows is None else rows
        self.made: Future[Checkpoint] = self._pool.submit(
            self.trainer.train, TASK, rows, into=into, seed=0, licence={"rows": ROWS}
        )

    def __enter__(self) -> Halted:
        until(lambda: any(self.into.glob(".training/*/row.json")) or self.made.done())
        (folder_of(self.into) / "halt").touch()
        until(lambda: steps(self.into)[-1:] == [7] or self.made.done())
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on()
        self.trainer.stop()
        self._pool.shutdown()

    def go_on(self) -> None:
        (folder_of(self.into) / "halt").unlink(missing_ok=True)


# --- what a job is -----------------------------------------------------------------------------------------------------


async def served(checkpoint: Checkpoint, input: Json) -> Json:
    """What llama.cpp answers with the checkpoint."""
    model = plugins.build("models", "llama_cpp", checkpoint=str(checkpoint.path), **SERVING)
    try:
        await model.ready()
        return (await model.answer(TASK, input)).output
    finally:
        await model.close()


@pytest.fixture(scope="module")
def calm(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What comes of a job that nothing happened to, in a folder where nothing is changed. It was begun with keys about."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PROVIDER"):
            monkeypatch.setenv(name, "CANARY")
        into = tmp_path_factory.mktemp("calm")
        return pupil(base, halt_at=8).train(TASK, examples(ROWS), into=into, seed=0, licence={"rows": ROWS})


def test_a_job_ends_in_a_checkpoint_that_llama_cpp_serves_and_that_says_all_about_it(
    base: Path, calm: Checkpoint
) -> None:
    manifest = calm.manifest
    assert (manifest["kind"], manifest["file"], manifest["examples"]) == ("adapter", "adapter.gguf", ROWS)
    assert manifest["licence"] == {"rows": ROWS}
    assert manifest["trainer"] == {
        "name": "pupil", "base": str(base), "seed": 0, "steps": LAST, "effect": 1.0, "fail_at": None, "halt_at": 8
    }  # fmt: skip
    assert manifest["base"]["sha256"] == weights.digest(base).removeprefix("sha256-")
    assert manifest["probe"][0]["output"] != manifest["probe"][0]["base"]
    assert 0 < len(manifest["out_of_fold"]) == manifest["metrics"]["held"] < 20
    checked(manifest["calibration"])
    assert asyncio.run(served(calm, manifest["probe"][0]["input"])) == manifest["probe"][0]["output"]


def test_what_people_wrote_is_forgotten_when_the_job_is_done_and_its_log_is_kept(base: Path, calm: Checkpoint) -> None:
    into = calm.path.parent
    left = {path.name for path in folder_of(into).iterdir()}
    assert {"row.json", "settings.json", "log", "progress.jsonl"} <= left
    assert left.isdisjoint({"train.jsonl", "held.jsonl", "rows.json", "checkpoints", "result"})
    assert pupil(base, halt_at=8).train(TASK, examples(ROWS)[::-1], into=into, seed=0) == calm
    assert steps(into) == list(range(1, LAST + 1))  # it was not trained again


def test_a_checkpoint_that_was_deleted_is_trained_again_and_is_the_same(
    base: Path, calm: Checkpoint, tmp_path: Path
) -> None:
    into = tmp_path / "models"
    shutil.copytree(calm.path.parent, into)
    shutil.rmtree(into / calm.id)
    again = pupil(base, halt_at=8).train(TASK, examples(ROWS), into=into, seed=0, licence={"rows": ROWS})
    assert files(again) == files(calm)


async def test_it_is_taught_the_very_messages_that_a_server_is_asked(base: Path, tmp_path: Path) -> None:
    rows = examples(12)
    task = TASK.model_copy(
        update={"instructions": "Be brief.", "examples": ({"input": {"text": "an axe"}, "output": {"kind": "tool"}},)}
    )
    trainer = pupil(base, fail_at=1)
    with pytest.raises(TrainingError, match="the pupil gives up"):
        await asyncio.to_thread(trainer.train, task, rows, into=tmp_path, seed=0)
    lines = [(folder_of(tmp_path) / name).read_text().splitlines() for name in ("train.jsonl", "held.jsonl")]
    taught = [json.loads(line) for part in lines for line in part]
    assert len(taught) == 12
    async with serve_llama_cpp(lambda _: {"kind": "tool"}) as server:
        model = plugins.build("models", "llama_cpp", base_url=server.url)
        await model.ready()
        for row in rows:
            await model.answer(task, row.input)
        await model.close()
        asked = [question["messages"] for question in server.questions()]
    assert sorted(map(json.dumps, asked)) == sorted(json.dumps(line["prompt"]) for line in taught)
    assert {line["completion"][0]["content"] for line in taught} == {'{"kind":"fruit"}', '{"kind":"animal"}'}


def test_the_child_gets_paths_and_no_key_and_is_told_to_stay_offline(calm: Checkpoint) -> None:  # F77
    told = calm.manifest["outcome"]
    known = set(process.environment({})) | set(_training._DEVICES) | set(_training._OFFLINE) | {"LC_CTYPE"}
    assert set(told["environment"]) <= known
    assert told["offline"] == "1"
    kept = b"".join(path.read_bytes() for path in calm.path.parent.rglob("*") if path.is_file())
    assert b"CANARY" not in kept


def test_a_variable_is_passed_on_only_where_the_operator_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKER_KEY", "abc")
    assert _training.passed(["TRACKER_KEY"], "pupil") == {"TRACKER_KEY": "abc"}
    monkeypatch.delenv("TRACKER_KEY")
    with pytest.raises(ConfigError, match="TRACKER_KEY is not set"):
        _training.passed(["TRACKER_KEY"], "pupil")


def test_an_adapter_that_changes_no_answer_is_no_version(base: Path, tmp_path: Path) -> None:  # F74
    with pytest.raises(TrainingError, match="as its base does"):
        pupil(base, effect=0.0).train(TASK, examples(ROWS), into=tmp_path, seed=0)
    assert not list(tmp_path.glob("sha256-*"))


def test_nothing_to_learn_from_and_a_base_that_is_missing_are_said_before_anything_is_started(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="no examples"):
        pupil(base).train(TASK, [], into=tmp_path, seed=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no file"):
        pupil(tmp_path / "missing.gguf")


def test_the_interpreter_is_asked_what_it_has() -> None:
    assert _training.interpreter(None, ["json"], extra="train", trainer="t") == sys.executable
    assert _training.interpreter(sys.executable, ["json"], extra="train", trainer="t") == sys.executable
    for python in (None, sys.executable):
        with pytest.raises(MissingExtra) as raised:
            _training.interpreter(python, ["json", "no_such_package"], extra="train", trainer="t")
        assert raised.value.hint == "pip install 'apprentice[train]'"
        apart = {"no_such_package": "depth: 4"}
        with pytest.raises(ConfigError, match=f"depth: 4 needs the package 'no_such_package', not in {sys.executable}"):
            _training.interpreter(python, ["json"], extra="train", trainer="t", apart=apart)
    with pytest.raises(ConfigError, match="no program"):
        _training.interpreter("no-such-python", ["json"], extra="train", trainer="t")


# --- preferences, and whole models --------------------------------------------------------------------------------------


def corrected(count: int, wrong: int) -> list[Example]:
    """So many examples, the local answers to the first of which were wrong."""
    return [
        row.model_copy(update={"rejected": {"kind": "stone"}}) if number < wrong else row
        for number, row in enumerate(examples(count))
    ]


def preferring(base: Path, least: int, **changes: Json) -> Trained:
    recipe = pupil(base, **changes)._recipe
    return Trained(dataclasses.replace(recipe, least_pairs=least))


def test_rejected_answers_are_carried_and_counted_where_preferences_are_learned_and_only_there(
    base: Path, tmp_path: Path
) -> None:
    for name, trainer in (("dpo", preferring(base, 5, fail_at=1)), ("sft", pupil(base, fail_at=1))):
        with pytest.raises(TrainingError, match="gives up"):
            trainer.train(TASK, corrected(40, 12), into=tmp_path / name, seed=0, licence={"rows": 40})
    lines = {
        name: [
            json.loads(line)
            for part in ("train", "held")
            for line in (folder_of(tmp_path / name) / f"{part}.jsonl").read_text().splitlines()
        ]
        for name in ("dpo", "sft")
    }
    found = [line for line in lines["dpo"] if "rejected" in line]
    assert len(found) == 12
    assert all(line["rejected"] == [{"role": "assistant", "content": '{"kind":"stone"}'}] for line in found)
    assert [{key: line[key] for key in ("prompt", "completion")} for line in lines["dpo"]] == lines["sft"]
    licences = {name: json.loads((folder_of(tmp_path / name) / "row.json").read_bytes())["licence"] for name in lines}
    assert licences["sft"] == {"rows": 40}
    shown = [line for line in (folder_of(tmp_path / "dpo") / "train.jsonl").read_text().splitlines() if "stone" in line]
    assert licences["dpo"]["rejected"]["rows"] == len(shown) > 5
    assert "own local model" in licences["dpo"]["rejected"]["basis"]


def test_too_few_pairs_are_said_with_both_numbers_before_anything_is_begun(base: Path, tmp_path: Path) -> None:
    same = [row.model_copy(update={"rejected": row.target}) for row in examples(40)]
    for rows, known in ((corrected(40, 0), 0), (same, 0), ([*corrected(1, 1)] * 30, 1)):
        with pytest.raises(TrainingError, match=rf"needs 5 examples .* there are {known}$") as raised:
            preferring(base, 5).train(TASK, rows, into=tmp_path, seed=0)
        assert raised.value.hint is not None and "least_pairs" in raised.value.hint
    assert not list(tmp_path.iterdir())


def whole(base: Path, folder: Path) -> Trained:
    """The pupil that makes a whole model of the base, which lies in that folder as other libraries read it."""
    if not folder.exists():
        as_folder(base, folder)
    recipe = pupil(base, full=True, gguf=str(base), halt_at=8)._recipe
    return Trained(dataclasses.replace(recipe, kind="model", base=str(folder)))


def test_a_whole_model_is_kept_by_its_content_and_served_without_its_base_also_after_a_kill_while_it_was_moved(
    base: Path, tmp_path: Path
) -> None:  # F66
    gone = tmp_path / "gone.gguf"
    shutil.copyfile(base, gone)
    into = tmp_path / "models"
    with Halted(whole(gone, tmp_path / "base"), into) as halted:
        halted.trainer.stop()
        with pytest.raises(TrainingError, match="no longer"):
            halted.made.result(60)
    job = folder_of(into)
    (job / "result").mkdir()  # as it is left where the model was moved out of it, and the row was not yet written
    (job / "result" / "outcome.json").write_text("{}")
    made = whole(gone, tmp_path / "base").train(TASK, examples(ROWS), into=into, seed=0)
    assert steps(into)[7:9] == [6, 7], "it went on from its last checkpoint"
    gone.unlink()
    manifest = made.manifest
    assert (manifest["kind"], manifest["file"]) == ("model", "model/model.gguf")
    assert manifest["base"]["sha256"] == weights.digest(base).removeprefix("sha256-")
    assert {"model/model.gguf", "model/model.safetensors", "model/config.json"} <= manifest["files"].keys()
    assert manifest["probe"][0]["output"] != manifest["probe"][0]["base"]
    assert not (job / "result").exists()
    assert asyncio.run(served(made, manifest["probe"][0]["input"])) == manifest["probe"][0]["output"]


# --- killed, stopped, taken over ----------------------------------------------------------------------------------------


def test_a_child_that_fails_says_why_and_the_next_goes_on_from_its_checkpoint(
    base: Path, calm: Checkpoint, tmp_path: Path
) -> None:  # F66, F77
    with Halted(pupil(base, halt_at=8), tmp_path / "rough") as halted:
        [child] = [one.pid for one in process.running() if str(tmp_path / "rough") in " ".join(one.argv)]
        os.kill(child, signal.SIGKILL)
        with pytest.raises(TrainingError, match="SIGKILL"):
            halted.made.result(60)
    [row] = pupil(base, halt_at=8).progress(tmp_path / "rough")
    assert (row.step, row.steps) == (7, LAST)
    again = pupil(base, halt_at=8).train(TASK, examples(ROWS), into=tmp_path / "rough", seed=0, licence={"rows": ROWS})
    assert steps(tmp_path / "rough") == [1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11, 12]
    assert _weights(files(again)) == _weights(files(calm))


def test_a_child_that_ends_in_order_without_an_adapter_has_failed_and_the_next_one_makes_it(
    base: Path, tmp_path: Path
) -> None:  # F77
    for name, leaves in (("nothing", ""), ("half", "(folder / 'result').mkdir()")):
        code = f"import sys; from pathlib import Path; folder = Path(sys.argv[1]); {leaves}; print('all is well')"
        into = tmp_path / name

        def command(folder: Path, code: str = code) -> Sequence[str]:
            return [sys.executable, "-c", code, str(folder)]

        quiet = Trained(dataclasses.replace(pupil(base)._recipe, command=command))
        with pytest.raises(TrainingError, match="all is well") as raised:
            quiet.train(TASK, examples(ROWS), into=into, seed=0)
        assert raised.value.hint == "the next cycle goes on from its last checkpoint"
        assert not list(into.glob("sha256-*"))
    assert pupil(base).train(TASK, examples(ROWS), into=into, seed=0).path.is_dir()


WORKER = """
import sys
from pathlib import Path
from apprentice.testing.trainers import TASK, examples
from tests.trainers.test_training import ROWS, pupil
told = {"into": Path(sys.argv[2]), "seed": 0, "licence": {"rows": ROWS}}
pupil(Path(sys.argv[1]), halt_at=8).train(TASK, examples(ROWS), **told)
"""


def test_a_killed_worker_leaves_no_child_and_the_next_one_comes_to_the_same_checkpoint(
    base: Path, calm: Checkpoint, tmp_path: Path
) -> None:  # F77
    into = tmp_path / "rough"
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", WORKER, str(base), str(into)], cwd=root) as worker:
        until(lambda: any(into.glob(".training/*/row.json")))
        (folder_of(into) / "halt").touch()
        until(lambda: steps(into)[-1:] == [7])
        worker.kill()
    until(lambda: not [one for one in process.running() if str(into) in " ".join(one.argv)])
    (folder_of(into) / "halt").unlink()
    assert not (folder_of(into) / "result").exists()
    again = pupil(base, halt_at=8).train(TASK, examples(ROWS), into=into, seed=0, licence={"rows": ROWS})
    assert again.id == calm.id
    assert files(again) == files(calm)
    assert steps(into) == [1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11, 12]


def test_an_older_token_never_publishes_over_a_newer_one(base: Path, tmp_path: Path) -> None:  # F78
    with Halted(pupil(base, halt_at=8), tmp_path, token=1) as older, ThreadPoolExecutor(1) as pool:
        newer = pupil(base, halt_at=8)
        newer.lead(2)
        made = pool.submit(newer.train, TASK, examples(ROWS), into=tmp_path, seed=0)
        with pytest.raises(TrainingError, match="another worker has taken over"):
            older.made.result(60)
        assert not list(tmp_path.glob("sha256-*"))
        older.go_on()
        assert made.result(60).path.is_dir()
    late = pupil(base, halt_at=8)
    late.lead(1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sha256-*/*")}
    assert late.train(TASK, examples(ROWS), into=tmp_path, seed=0) == made.result()  # it is there: nothing is written
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("sha256-*/*")} == before
    with pytest.raises(TrainingError, match="another worker has taken over"):
        _led_by(tmp_path, 1)


def _led_by(into: Path, token: int) -> None:
    folder = folder_of(into)
    row = _training._row(folder)
    assert row is not None
    _training._Job(folder, row).led(token)


def test_two_children_never_work_in_one_folder(base: Path, tmp_path: Path) -> None:
    """The second waits for as long as the first one lives."""
    with Halted(pupil(base, halt_at=8), tmp_path, token=1) as older:
        folder = folder_of(tmp_path)
        row = _training._row(folder)
        assert row is not None
        turn = [sys.executable, "-I", "-S", str(Path(_training.__file__).with_name("_turn.py")), str(folder)]
        second = [*turn, str(row.token), sys.executable, "-c", "raise SystemExit(7)"]
        with subprocess.Popen(second) as waiting:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(0.5)
            older.go_on()
            # It finds the result, or, where that was taken already, that nobody is at work.
            assert waiting.wait(60) in (0, 7)
            assert older.made.result(60).path.is_dir()


def test_a_child_of_an_older_token_does_not_begin(base: Path, tmp_path: Path) -> None:
    with Halted(pupil(base, halt_at=8), tmp_path, token=5):
        folder = folder_of(tmp_path)
        _led_by(tmp_path, 6)
    turn = [sys.executable, "-I", "-S", str(Path(_training.__file__).with_name("_turn.py")), str(folder)]
    ended = subprocess.run(
        [*turn, "5", sys.executable, "-c", "raise SystemExit(7)"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr.strip()) == (1, "another worker has taken over this job")


def test_a_training_that_is_stopped_ends_its_child_and_is_gone_on_with(base: Path, tmp_path: Path) -> None:
    with Halted(pupil(base, halt_at=8), tmp_path) as halted:
        halted.trainer.stop()
        with pytest.raises(TrainingError, match="waited for no longer"):
            halted.made.result(60)
        assert not [one for one in process.running() if str(tmp_path) in " ".join(one.argv)]
    assert pupil(base, halt_at=8).train(TASK, examples(ROWS), into=tmp_path, seed=0).path.is_dir()
    assert steps(tmp_path)[7:9] == [6, 7]


def test_a_job_that_was_interrupted_is_finished_although_more_was_recorded_since(
    base: Path, tmp_path: Path
) -> None:  # F78
    with Halted(pupil(base, halt_at=8), tmp_path) as halted:
        halted.trainer.stop()
        with pytest.raises(TrainingError):
            halted.made.result(60)
    checkpoint = pupil(base, halt_at=8).train(
        TASK, examples(ROWS + 4), into=tmp_path, seed=0, licence={"rows": ROWS + 4}
    )
    assert (checkpoint.manifest["examples"], checkpoint.manifest["licence"]) == (ROWS, {"rows": ROWS})
    assert 1 not in steps(tmp_path)[1:]


def test_a_job_is_dropped_when_one_of_its_rows_may_no_longer_train(base: Path, tmp_path: Path) -> None:
    with Halted(pupil(base, halt_at=8), tmp_path) as halted:
        before = folder_of(tmp_path)
        halted.trainer.stop()
        with pytest.raises(TrainingError):
            halted.made.result(60)
    checkpoint = pupil(base, halt_at=8).train(
        TASK, examples(ROWS)[1:], into=tmp_path, seed=0, licence={"rows": ROWS - 1}
    )
    assert (checkpoint.manifest["examples"], checkpoint.manifest["licence"]) == (ROWS - 1, {"rows": ROWS - 1})
    assert not before.exists()


def test_weights_become_repetition_and_a_persons_word_replaces_a_models(base: Path, tmp_path: Path) -> None:
    heavy = [row.model_copy(update={"weight": 3.0, "target": {"kind": "tool"}}) for row in examples(6)]
    with pytest.raises(TrainingError, match="gives up"):
        pupil(base, fail_at=1).train(TASK, [*examples(12), *heavy], into=tmp_path, seed=0)
    folder = folder_of(tmp_path)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    held = [json.loads(line) for line in (folder / "held.jsonl").read_text().splitlines()]
    counts: dict[str, int] = {}
    for line in lines:
        key = line["prompt"][-1]["content"] + line["completion"][0]["content"]
        counts[key] = counts.get(key, 0) + 1
    assert {count for key, count in counts.items() if "tool" in key} == {3}
    assert {count for key, count in counts.items() if "tool" not in key} == {1}
    assert len(counts) + len(held) == 12
    shown = {line["prompt"][-1]["content"] for line in lines}
    assert shown.isdisjoint(line["prompt"][-1]["content"] for line in held)


# --- led by a cycle -----------------------------------------------------------------------------------------------------


async def test_a_cycle_leads_under_its_lease_and_stops_the_child_when_it_is_cancelled(
    configured: Callable[..., Config], base: Path, tmp_path: Path
) -> None:
    config, into = configured(), tmp_path / "models"
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    for _ in range(3):
        lease = await store.acquire("learn/sort", "tests", time.time(), 60.0)
        assert lease is not None
        await store.release(lease)
    lease = await store.acquire("learn/sort", "tests", time.time(), 60.0)
    assert lease is not None

    def begin() -> asyncio.Task[Checkpoint]:
        return asyncio.create_task(
            jobs.train(
                config.tasks[0], pupil(base, halt_at=8), examples(ROWS), into=into, seed=0, licence={}, lease=lease,
                store=store, purse=Purse(config, store, clock=time.time),
            )
        )  # fmt: skip

    cycle = begin()
    await asyncio.to_thread(until, lambda: any(into.glob(".training/*/row.json")))
    (folder_of(into) / "halt").touch()
    await asyncio.to_thread(until, lambda: steps(into)[-1:] == [7])
    assert json.loads((folder_of(into) / "row.json").read_bytes())["token"] == lease.token > 0
    cycle.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cycle
    assert not [one for one in process.running() if str(into) in " ".join(one.argv)]
    (folder_of(into) / "halt").unlink()
    assert (await begin()).path.is_dir()
    await store.close()


SHOWN = """
import asyncio
import sys
import time
from pathlib import Path
from apprentice import config, jobs, plugins
from apprentice.purse import Purse
from apprentice.testing.trainers import examples
from tests.trainers.test_training import ROWS, pupil
async def main():
    settings = config.load(Path(sys.argv[2]))
    store = plugins.build("stores", "sqlite", path=settings.store.path)
    lease = await store.acquire("learn/sort", "worker", time.time(), 60.0)
    into = settings.local.model_dir / "sort"
    into.mkdir(parents=True)
    with jobs.shown(into, trainer="pupil", since=5.0, lease=lease):
        await jobs.train(
            settings.tasks[0], pupil(Path(sys.argv[1]), halt_at=8), examples(ROWS), into=into, seed=0, licence={},
            lease=lease, store=store, purse=Purse(settings, store, clock=time.time),
        )
asyncio.run(main())
"""


def test_the_status_shows_a_training_of_another_process_for_as_long_as_that_lives(
    configured: Callable[..., Config], base: Path, tmp_path: Path
) -> None:
    config = configured()
    file = tmp_path / "apprentice.yaml"
    file.write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))
    into = config.local.model_dir / "sort"

    async def shown() -> jobs.Training | None:
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        [status] = await report.status(config, store, now=time.time(), task="sort")
        await store.close()
        return status.training

    argv = [sys.executable, "-c", SHOWN, str(base), str(file)]
    with subprocess.Popen(argv, cwd=Path(__file__).parents[2]) as worker:
        try:
            until(lambda: any(into.glob(".training/*/row.json")))
            (folder_of(into) / "halt").touch()
            until(lambda: steps(into)[-1:] == [7])
            now = asyncio.run(shown())
        finally:
            worker.kill()
    assert now is not None and now.told_at is not None
    assert (now.trainer, now.since, now.token) == ("pupil", 5.0, 1)
    assert (now.step, now.steps, now.loss, now.held_loss, now.eta) == (7, LAST, 1 / 7, None, 0.0)
    assert asyncio.run(shown()) is None  # although the job is open
    assert len(pupil(base).progress(into)) == 1
    until(lambda: not [one for one in process.running() if str(into) in " ".join(one.argv)])


# --- calibration --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0])), max_size=60))
def test_a_table_always_rises_and_is_never_certain(pairs: list[tuple[float, float]]) -> None:
    table = checked(_training.platt(pairs))
    if pairs:
        assert 0 < table[0][1] < table[-1][1] < 1
    else:
        assert table == SAME


def test_a_table_says_how_often_such_answers_were_right() -> None:
    sure = [(0.9, float(number % 4 > 0)) for number in range(400)]
    unsure = [(0.3, float(number % 5 == 0)) for number in range(400)]
    table = _training.platt([*sure, *unsure])
    assert math.isclose(calibrate(table, 0.9), 0.75, abs_tol=0.05)
    assert math.isclose(calibrate(table, 0.3), 0.2, abs_tol=0.05)


def _weights(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: content for name, content in found.items() if name != "manifest.json"}
