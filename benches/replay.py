"""Recorded answers of real LLMs, replayed through the product's own controller, trainer and student.

Each set runs with the policy of the shipped demo.yaml, one for all. Beside the product, on the same requests, the same coins
and the same teaching cycle: the naive rule of a rolling mean, and three ways to spend the same number of remote calls:
at random, all of them first, and on the requests of which the student is least sure. Whatever asks the remote for
everything until the first version exists. Neither the recording nor the gold labels are looked at by what decides.

banking77 ships; `--data DIR` adds nc_rt_polarity, nc_openbook and ocl_hatespeech. Windows are of 1,000 requests, one at
each request. Seed 0 replays the order of the recording; further `--seeds` shuffle it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from apprentice import confidence, decide, demo, plugins, promotion, selection
from apprentice.config import Config, TaskConfig
from apprentice.demo import Row
from apprentice.types import Answer, Correction, Decision, Encoder, Evidence, ManyModel, Record, Trainer
from benches import Figure, Options, at_least, at_most, run, shown
from benches.controller import Naive, Product, Rule

SETS = ("banking77", "nc_rt_polarity", "nc_openbook", "ocl_hatespeech")
BALANCED = {"ocl_hatespeech"}  # 11 % of it is hate: there the accuracy of every class counts alike
type Bar = tuple[Callable[[str, float, float], Figure], float]
BARS: dict[str, dict[str, Bar]] = {  # beside the contract, which holds for every set
    "banking77": {"remote share": (at_most, 0.48), "last quarter": (at_most, 0.35), "accuracy": (at_least, 0.815)},
    "nc_openbook": {"last quarter": (at_least, 0.95)},  # a small encoder cannot learn it
}
WINDOW = 1000
RECENT = 300  # requests whose confidences set the thresholds of a new version, as in learn.py
QUICK = 450


def recording(name: str, folder: Path | None) -> list[Row]:
    """The requests of one recording in order: ours, or the online part of `NAME.jsonl.gz` or `*_NAME.jsonl.gz` in a folder."""
    if name == "banking77":
        return demo.recording(name, None)
    assert folder is not None
    found = sorted({*folder.glob(f"{name}.jsonl.gz"), *folder.glob(f"*_{name}.jsonl.gz")})
    if not found:
        raise SystemExit(f"no {name}.jsonl.gz in {folder}")
    with gzip.open(found[0], "rt", encoding="utf-8") as lines:
        raw = [json.loads(line) for line in lines]
    kept = [row for row in raw if row["teacher"] is not None]
    online = [row for row in kept if row.get("split") == "online"] or kept
    online.sort(key=lambda row: row.get("shuffled_order", row["order"]))
    return [Row(row["text"], row["teacher"], row["gold"]) for row in online]


# --- the student --------------------------------------------------------------------------------------------------------


class Student:
    """The teaching cycle of learn.py, in this process and without a store; it knows the answers that were paid for."""

    def __init__(self, rows: Sequence[Row], config: Config, seed: int) -> None:
        self.config, self.seed = config, seed
        self.task: TaskConfig = config.tasks[0]
        self.inputs = [{"text": row.text} for row in rows]
        self.records: list[tuple[int, Record]] = []
        self.tried_at = self.versions = 0
        self.urgent = False
        self.trained_on: list[int] = []
        self.said: list[str] = []  # what the version in force answers to each request of the stream
        self.sure: list[float] = []

    def heard(self, number: int, answer: str) -> None:
        """The remote answered request `number`."""
        remote = Answer(output={"intent": answer}, model="recorded")
        decision = Decision(route="remote", reason="learning", p=1.0, phase="cold_start")
        record = Record(
            request_id=str(number), task=self.task.name, at=1.0 + number, input=self.inputs[number],
            decision=decision, remote=remote, served="remote",
        )  # fmt: skip
        self.records.append((number, record))

    def gold(self, now: int) -> list[tuple[Record, Correction]]:
        """What people have said by request `now`: nothing, in these recordings."""
        return []

    def due(self) -> bool:
        batch, first = self.config.local.fine_tune_batch_size, self.task.confidence_thresholds.phase1_to_phase2
        new = len(self.records) - self.tried_at
        return decide.needs_training(new, self.tried_at, batch, first, urgent=self.urgent)

    def teach(self, now: int) -> list[float] | None:
        """One cycle; the new version's confidences on recent requests, or None when it was not promoted."""
        self.tried_at = len(self.records)
        chosen = selection.select(self.records, self.gold(now), self.config.local.gold_weight)
        permitted, _ = selection.lawful(self.config, self.task, chosen, datetime.now(UTC).date())
        trainer: Trainer = plugins.build("trainers", "embedded")
        into = self.config.local.model_dir / self.task.name
        into.mkdir(parents=True, exist_ok=True)
        checkpoint = trainer.train(
            self.task.learnable_task, permitted.training, into=into, seed=self.seed, licence=permitted.licence
        )
        model: ManyModel = plugins.build("models", self.config.local.backend, checkpoint=str(checkpoint.path))
        answers = model.answer_many(self.task.task, self.inputs)
        said = [str(answer.output["intent"]) for answer in answers]
        held_out = [(int(example.request_id or 0), example.target["intent"]) for example in permitted.held_out]
        champion = [float(self.said[n] == target) for n, target in held_out] if self.said else None
        if not promotion.screen([float(said[n] == target) for n, target in held_out], champion).promote:
            return None
        self.said, self.sure = said, [answer.confidence or 0.0 for answer in answers]
        self.versions += 1
        self.urgent = False
        self.trained_on.append(len(permitted.training))
        unseen = checkpoint.manifest["out_of_fold"]
        recent = range(max(0, now + 1 - RECENT), now + 1)
        return [float(unseen.get(str(number), self.sure[number])) for number in recent]


# --- other ways to spend the same number of calls -----------------------------------------------------------------------


class Spender:
    """Spends exactly `calls` of `requests`; the first ones until there is a student."""

    def __init__(self, calls: int, requests: int) -> None:
        self.calls, self.requests = calls, requests

    def start(self, version: str, confidences: list[float]) -> None:
        """Nothing to learn from a new version."""

    def ask(self, has_local: bool, confidence: float, coin: float) -> tuple[bool, Evidence]:
        share = self.calls / self.requests
        remote = self.calls > 0 and (share >= 1 or not has_local or self.wants(share, confidence, coin))
        self.calls, self.requests = self.calls - remote, self.requests - 1
        return remote, Evidence(0, "t", 0.0, None, 0.0, 0.0, False, confidence, None, "remote" if remote else "local")

    def wants(self, share: float, confidence: float, coin: float) -> bool:
        """Whether to ask the remote now; `share` is what is left to spend on each request that is to come."""
        return True

    def observe(self, evidence: Evidence) -> list[str]:
        return []

    def standing(self) -> tuple[float, float]:
        return -1.0, 0.0


class Spread(Spender):
    """By the coin, evenly."""

    def wants(self, share: float, confidence: float, coin: float) -> bool:
        return coin < share


class Margin(Spender):
    """The requests of which the student is least sure, evenly: below the quantile of its recent confidences."""

    def start(self, version: str, confidences: list[float]) -> None:
        self.recent = deque(confidences, maxlen=RECENT)

    def wants(self, share: float, confidence: float, coin: float) -> bool:
        below = sum(other < confidence for other in self.recent)
        self.recent.append(confidence)
        return below < share * len(self.recent)


# --- one run ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one rule did with one stream, request by request; `events` are for people."""

    name: str
    asked: list[bool] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)  # what was served, with what the remote would have said
    served: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def remote(self) -> float:
        return fmean(self.asked)

    @property
    def last(self) -> float:
        return fmean(self.asked[-(len(self.asked) // 4) :])

    @property
    def agreement(self) -> float:
        return fmean(self.agreed)

    @property
    def windows(self) -> NDArray[np.float64]:
        """Served agreement of every window of WINDOW requests."""
        sums = np.concatenate([[0], np.cumsum(self.agreed)])
        size = min(WINDOW, len(self.agreed))
        return np.asarray((sums[size:] - sums[:-size]) / size, dtype=np.float64)


def play(
    name: str,
    rows: Sequence[Row],
    rule: Rule,
    config: Config,
    seed: int,
    budget: int | None = None,
    student: Student | None = None,
) -> Run:
    """Every request in order. With a `budget`, a last version is taught when it is spent."""
    student, coins, out = student or Student(rows, config, seed), Random(seed), Run(name)
    for number, row in enumerate(rows):
        has_local = student.versions > 0
        said, sure = (student.said[number], student.sure[number]) if has_local else ("", 0.0)
        remote, evidence = rule.ask(has_local, sure, coins.random())
        if remote and has_local:
            evidence = evidence._replace(score=float(said == row.teacher))
        out.asked.append(remote)
        out.served.append(row.teacher if remote else said)
        out.agreed.append(remote or said == row.teacher)
        events = rule.observe(evidence)
        student.urgent = student.urgent or not decide.URGENT.isdisjoint(events)
        out.events += [f"{number}:{event}" for event in events]
        if remote:
            student.heard(number, row.teacher)
            if student.due() or len(student.records) == budget:
                confidences = student.teach(number)
                if confidences is not None:
                    out.events.append(f"{number}:v{student.versions}")
                    rule.start(f"v{student.versions}", confidences)
    out.versions = student.trained_on
    return out


def accuracy(served: Sequence[str], rows: Sequence[Row], balanced: bool) -> float:
    """Share of the rows with a gold label that were answered right; `balanced`: the mean over its classes."""
    hits: dict[str | None, list[bool]] = {}
    for said, row in zip(served, rows, strict=True):
        if row.gold is not None:
            hits.setdefault(row.gold if balanced else None, []).append(said == row.gold)
    return fmean(fmean(of_class) for of_class in hits.values())


def runs(name: str, rows: Sequence[Row], seed: int) -> Iterator[Run]:
    """The product first: what it spent is what the others may spend."""
    with tempfile.TemporaryDirectory(prefix="apprentice-replay-") as folder:
        config = demo.settings(name, base_url="http://127.0.0.1", folder=Path(folder))
        task = config.tasks[0]
        settings = confidence.settings(task.confidence_thresholds, task.sampling or config.sampling)
        first = play("product", rows, Product(settings), config, seed)
        yield first
        yield play("naive", rows, Naive(settings.floor), config, seed)
        calls, requests = sum(first.asked), len(rows)
        for title, kind in (("random", Spread), ("front-loading", Spender), ("margin", Margin)):
            yield play(title, rows, kind(calls, requests), config, seed, budget=calls)


# --- figures ------------------------------------------------------------------------------------------------------------


def _line(run: Run, theta: float, began: float) -> str:
    return (
        f"  {run.name:<14} remote {run.remote:.3f} last quarter {run.last:.3f}  agreement {run.agreement:.3f}"
        f" worst window {run.windows.min():.3f} below theta {(run.windows < theta).mean():.3f}"
        f"  accuracy {run.accuracy:.3f}  versions {run.versions}  [{time.perf_counter() - began:.0f} s]"
    )


def _set(name: str, rows: list[Row], seeds: int, options: Options) -> list[Figure]:
    encoder: Encoder = plugins.build("encoders", "minilm")
    encoder.encode([row.text for row in rows])  # once: the encoder remembers them
    theta = demo.settings(name, base_url="", folder=Path()).tasks[0].confidence_thresholds.phase2_to_phase3
    found: dict[str, list[Run]] = {}
    for seed in range(seeds):
        order = list(rows)
        if seed:
            Random(seed).shuffle(order)
        teacher = accuracy([row.teacher for row in order], order, name in BALANCED)
        options.say(f"{name}: {len(rows)} requests, seed {seed}; the remote alone: accuracy {teacher:.3f}")
        began = time.perf_counter()
        for one in runs(name, order, seed):
            one.accuracy = accuracy(one.served, order, name in BALANCED)
            options.say(_line(one, theta, began))
            if one.name == "product":
                options.say("    " + " ".join(one.events))
            found.setdefault(one.name, []).append(one)
            began = time.perf_counter()
    figures = [shown(f"{name}: requests", len(rows))]
    for title, several in found.items():
        figures += _figures(name, title, several, theta, options.quick)
    return figures


def _figures(name: str, title: str, several: list[Run], theta: float, quick: bool) -> list[Figure]:
    """Means over the seeds, and the worst window of them all; the product is held to its bars."""
    measured = {
        "remote share": fmean(one.remote for one in several),
        "last quarter": fmean(one.last for one in several),
        "agreement": fmean(one.agreement for one in several),
        "worst window": float(min(one.windows.min() for one in several)),
        "windows below theta": fmean(float((one.windows < theta).mean()) for one in several),
        "accuracy": fmean(one.accuracy for one in several),
    }
    bars: dict[str, Bar] = {}
    if title == "product":
        bars = {"agreement": (at_least, theta), "worst window": (at_least, theta - 0.03)}
        if not quick:
            bars |= BARS.get(name, {})
    figures = []
    for what, value in measured.items():
        full = f"{name}, {title}: {what}"
        if what in bars:
            holds, bar = bars[what]
            figures.append(holds(full, value, bar))
        else:
            figures.append(shown(full, value))
    return figures


def measure(options: Options, seeds: int) -> list[Figure]:
    """Every set that there is, one after the other."""
    names = SETS if options.data is not None and not options.quick else SETS[:1]
    figures = []
    for name in names:
        rows = recording(name, options.data)
        figures += _set(name, rows[:QUICK] if options.quick else rows, seeds, options)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """The bench's own option first, then those of every bench."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seeds", type=int, default=1)
    given, rest = parser.parse_known_args(argv)
    return run("replay", partial(measure, seeds=given.seeds), rest)


if __name__ == "__main__":
    sys.exit(main())
