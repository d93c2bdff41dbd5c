"""Is an election better than its best voter? Agreement with the teacher, of single students and of ensembles of them.

    python -m benches.ensemble [--quick] [--json] [--data DIR]

Each embedded student learns from the first answers of a recording; 1,000 others are held against what they say alone, and
what they elect together, by weight (as the product does) and by heads. No bar: where an ensemble is no better, that is
what is shown. banking77 ships; `--data DIR` adds others.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

from apprentice import demo, plugins
from apprentice.types import Answer, Json, Trainer
from apprentice.voting import Ballot, vote
from benches import Figure, Options, run, shown
from benches.replay import recording
from benches.students import SETS, split, student, taught

ENCODERS = ("minilm", "wordllama", "tfidf", "e5")
SIZES = (250, 1000)


def by_weight(answers: Sequence[Answer]) -> Json:
    found = vote([Ballot(answer.output, answer.confidence) for answer in answers])
    assert found is not None
    return found.output["intent"]


def by_heads(answers: Sequence[Answer]) -> Json:
    """The commonest answer; of equally common ones the first that was the surest voter's."""
    said = [a.output["intent"] for a in sorted(answers, key=lambda answer: -(answer.confidence or 0))]
    return Counter(said).most_common(1)[0][0]


def measure(options: Options) -> list[Figure]:
    """Every single student, every pair and every three."""
    figures = []
    encoders = ENCODERS[:2] if options.quick else ENCODERS
    with tempfile.TemporaryDirectory() as folder:
        task = demo.settings("banking77", base_url="http://127.0.0.1:1", folder=Path(folder)).tasks[0].task
        for name in SETS if options.data and not options.quick else SETS[:1]:
            teach, examine = split(recording(name, options.data))
            examine = examine[: 200 if options.quick else None]
            for size in SIZES[: 1 if options.quick else None]:
                said: dict[str, list[Answer]] = {}
                for encoder in encoders:
                    trainer: Trainer = plugins.build("trainers", "embedded", encoder=encoder)
                    model = student(taught(trainer, task, teach[:size], Path(folder))[0])
                    said[encoder] = model.answer_many(task, [{"text": row.text} for row in examine])
                    options.say(f"{name}, {size}: {encoder}")
                for count in (1, 2, 3):
                    for names in combinations(encoders, count):
                        ballots = list(zip(*(said[encoder] for encoder in names), strict=True))
                        rules = {"": by_weight} if count == 1 else {"": by_weight, ", by heads": by_heads}
                        for title, rule in rules.items():
                            right = fmean(rule(b) == row.teacher for b, row in zip(ballots, examine, strict=True))
                            figures.append(shown(f"{name}, {size}: {' + '.join(names)}{title}", right))
    return figures


if __name__ == "__main__":
    sys.exit(run("ensemble", measure))
