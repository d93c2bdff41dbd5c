"""Do corrections make the student better than its teacher? A few hundred of them, with several weights.

    python -m benches.gold [--quick] [--json]

The shipped recording is played as `benches.replay` does it, and 300 rows, drawn from the first three quarters of the stream,
are corrected (or approved) by the gold labels that come with it, each right after its request. Judged is the last quarter,
in which nothing was corrected: what was served against the gold labels, beside the remote's own answers to the same rows.
Mean of five seeds of order, draw and sampling. The quick form plays 800 requests of one seed; its figures inform.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random
from statistics import fmean

from apprentice import confidence, demo, plugins
from apprentice.config import Config
from apprentice.demo import Row
from apprentice.types import Answer, Correction, Decision, Encoder, Record
from benches import Figure, Options, at_least, run, shown
from benches.controller import Product
from benches.replay import Student, accuracy, play, recording

TASK, CORRECTED, SEEDS = "banking77", 300, 5
WEIGHTS = (1.0, 2.0, 5.0, 10.0, 20.0)


class Corrected(Student):
    """A student whose people correct some requests."""

    def __init__(self, rows: list[Row], config: Config, seed: int, corrected: list[int]) -> None:
        super().__init__(rows, config, seed)
        self.words = [(number, rows[number]) for number in sorted(corrected)]

    def gold(self, now: int) -> list[tuple[Record, Correction]]:
        return [(self._record(number, row), self._word(number, row)) for number, row in self.words if number <= now]

    def _record(self, number: int, row: Row) -> Record:
        answer = Answer(output={"intent": row.teacher}, model="recorded")
        decision = Decision(route="remote", reason="learning", p=1.0)
        return Record(
            request_id=str(number),
            task=TASK,
            at=1.0 + number,
            input=self.inputs[number],
            decision=decision,
            remote=answer,
        )

    def _word(self, number: int, row: Row) -> Correction:
        return Correction(
            request_id=str(number), task=TASK, at=1.0 + number, action="corrected", target={"intent": row.gold}
        )


def played(rows: list[Row], seed: int, weight: float | None) -> tuple[float, float, float]:
    """Over the last quarter: accuracy of what was served, of the remote, and the remote share. No weight: no corrections."""
    order = list(rows)
    Random(seed).shuffle(order)
    last = len(order) - len(order) // 4
    corrected = [] if weight is None else Random(seed + 1000).sample(range(last), min(CORRECTED, last))
    with tempfile.TemporaryDirectory(prefix="apprentice-gold-") as folder:
        config = demo.settings(TASK, base_url="http://127.0.0.1", folder=Path(folder))
        local = config.local.model_copy(update={"gold_weight": weight or 1.0})
        config = config.model_copy(update={"local": local})
        task = config.tasks[0]
        rule = Product(confidence.settings(task.confidence_thresholds, task.sampling or config.sampling))
        found = play("product", order, rule, config, seed, student=Corrected(order, config, seed, corrected))
    served = accuracy(found.served[last:], order[last:], balanced=False)
    return served, accuracy([row.teacher for row in order[last:]], order[last:], balanced=False), found.last


def measure(options: Options) -> list[Figure]:
    """Each weight over the same seeds, and no corrections at all beside them."""
    rows = recording(TASK, None)[: 800 if options.quick else None]
    seeds = range(1 if options.quick else SEEDS)
    encoder: Encoder = plugins.build("encoders", "minilm")
    encoder.encode([row.text for row in rows])  # once: the encoder remembers them
    figures: list[Figure] = []
    for weight in (None, 5.0) if options.quick else (None, *WEIGHTS):
        title = "no corrections" if weight is None else f"{CORRECTED} corrections of weight {weight:g}"
        runs = [played(rows, seed, weight) for seed in seeds]
        served, remote, share = (fmean(values) for values in zip(*runs, strict=True))
        options.say(f"{title}: served {served:.4f}, the remote {remote:.4f}, remote share {share:.3f}: {runs}")
        name = f"{title}: accuracy of the last quarter, less the remote's"
        if weight == 5.0 and not options.quick:
            figures.append(at_least(name, served - remote, 0.0001, "share"))
        else:
            figures.append(shown(name, served - remote, "share"))
        figures += [
            shown(f"{title}: accuracy of the last quarter", served, "share"),
            shown(f"{title}: remote share of the last quarter", share, "share"),
        ]
    return figures


if __name__ == "__main__":
    sys.exit(run("gold", measure))
