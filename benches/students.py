"""The embedded student: what it learns from how many answers, how long an answer takes, and what teaching costs.

Each set is split once (by the seed) into rows that teach and 1,000 rows that examine; agreement is with the recorded
answer of the teacher, never with gold. The trainer and the student are the product's own, with their defaults; beside
each encoder stands the rule that always says the most frequent answer. For the default encoder also: how well confidence
ranks right answers (AUROC), and the least share of requests, the least sure first, that must be left to the teacher for an
agreement of 0.85. banking77 ships; `--data DIR` adds others.

Speed: one request at a time through the student's `answer`, texts that were never seen, nothing else running. "First"
training encodes every text; "next" finds their vectors on disk, as every later cycle does. `--quick` holds no time to a bar.

Updating: what an urgent cycle costs that goes on from the champion, beside teaching in full, with as many new texts to
encode in both; and on how many rows that examine the two students say the same. `--quick` teaches, times and examines few.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean, median, quantiles

from apprentice import demo, plugins
from apprentice.calibration import auroc
from apprentice.demo import Row
from apprentice.trainers import Updater
from apprentice.types import Checkpoint, Example, ManyModel, Task, Trainer
from benches import Figure, Options, at_most, run, shown
from benches.replay import recording

ENCODERS = ("minilm", "tfidf")
SETS = ("banking77", "nc_rt_polarity", "ocl_hatespeech")
SIZES = (250, 550, 1000, 2250)
PROMISE = 0.85
EXAMINED = 1000
WORDS = (6, 12)
TIMED = 200  # texts for each length
TAUGHT = 4000
UPDATED = (2000, 1900)  # examples, and how many of them the champion knows
FEW = 250  # texts that teach, are timed or examine, in the short form


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows that teach and rows that examine; no text is in both."""
    unique = list({row.text: row for row in rows}.values())
    Random(0).shuffle(unique)
    return unique[:-EXAMINED], unique[-EXAMINED:]


def taught(trainer: Trainer, task: Task, rows: Sequence[Row], into: Path) -> tuple[Checkpoint, float]:
    """A checkpoint, and the seconds that it took."""
    began = time.perf_counter()
    checkpoint = trainer.train(task, examples(rows), into=into, seed=0)
    return checkpoint, time.perf_counter() - began


def examples(rows: Sequence[Row]) -> list[Example]:
    """As `learn` makes them from recorded answers."""
    return [
        Example(input={"text": row.text}, target={"intent": row.teacher}, source="remote", request_id=str(number))
        for number, row in enumerate(rows)
    ]


def student(checkpoint: Checkpoint) -> ManyModel:
    model: ManyModel = plugins.build("models", "embedded", checkpoint=str(checkpoint.path))
    return model


def examined(model: ManyModel, task: Task, rows: Sequence[Row]) -> list[tuple[float, float]]:
    """A pair a row: how sure the student was, and 1 where it agreed with the teacher."""
    answers = model.answer_many(task, [{"text": row.text} for row in rows])
    return [
        (answer.confidence or 0.0, float(answer.output["intent"] == row.teacher))
        for answer, row in zip(answers, rows, strict=True)
    ]


def left_to_the_teacher(pairs: Sequence[tuple[float, float]]) -> float:
    """The least share, least sure first, so that what is said, by whom ever, agrees as often as promised."""
    wrong, allowed = sum(1 - right for _, right in pairs), (1 - PROMISE) * len(pairs)
    for place, (_, right) in enumerate(sorted(pairs)):
        if wrong <= allowed:
            return place / len(pairs)
        wrong -= 1 - right
    return 1.0


def learning(name: str, task: Task, options: Options, into: Path) -> list[Figure]:
    """Agreement with the teacher after so many of its answers."""
    rows = recording(name, options.data)
    teach, examine = split(rows)
    examine = examine[: FEW if options.quick else None]
    figures = []
    for size in [size for size in SIZES if size <= len(teach)][: 1 if options.quick else None]:
        usual = Counter(row.teacher for row in teach[:size]).most_common(1)[0][0]
        figures.append(shown(f"{name}, {size}: most frequent", sum(r.teacher == usual for r in examine) / len(examine)))
        for encoder in ENCODERS:
            trainer: Trainer = plugins.build("trainers", "embedded", encoder=encoder)
            model = student(taught(trainer, task, teach[:size], into)[0])
            pairs = examined(model, task, examine)
            figures.append(shown(f"{name}, {size}: {encoder}", fmean(right for _, right in pairs)))
            options.say(f"{figures[-1].name} {figures[-1].value:.3f}")
            if encoder == ENCODERS[0]:
                ranking = auroc(pairs, [1.0] * len(pairs))
                figures.append(shown(f"{name}, {size}: {encoder}, AUROC", ranking.auroc if ranking else float("nan")))
                figures.append(shown(f"{name}, {size}: {encoder}, left to the teacher", left_to_the_teacher(pairs)))
    return figures


async def seconds_each(model: ManyModel, task: Task, texts: Sequence[str]) -> list[float]:
    """How long each text waits for its answer, one after the other."""
    found = []
    for text in texts:
        began = time.perf_counter()
        await model.answer(task, {"text": text})
        found.append(time.perf_counter() - began)
    return found


def speed(task: Task, options: Options, into: Path) -> list[Figure]:
    """What teaching and answering cost with the default encoder."""
    rows = recording("banking77", None)
    trainer: Trainer = plugins.build("trainers", "embedded")
    rows = [*rows, *rows][: FEW if options.quick else TAUGHT]
    checkpoint, first = taught(trainer, task, rows, into)
    _, following = taught(trainer, task, rows, into)
    figures = [
        shown(f"teach {len(rows)} examples, first time", first, "s"),
        shown(f"teach {len(rows)} examples, next time", following, "s"),
        shown("checkpoint", sum(file.stat().st_size for file in checkpoint.path.iterdir()) / 1e6, "MB"),
    ]
    model = student(checkpoint)
    texts = [row.text for row in rows]
    for words in WORDS:
        # a mark in front, so that no text was encoded before; it adds one token
        unseen = [f"+ {text}" for text in texts if len(text.split()) == words][: 20 if options.quick else TIMED]
        found = asyncio.run(seconds_each(model, task, unseen))
        p50 = f"answer of {words} words, p50"
        figures.append(
            shown(p50, 1000 * median(found), "ms") if options.quick else at_most(p50, 1000 * median(found), 5, "ms")
        )
        figures.append(shown(f"answer of {words} words, p95", 1000 * quantiles(found, n=20)[-1], "ms"))
    articles = [
        " ".join(texts[place : place + 17]) for place in range(0, 17 * (2 if options.quick else 40), 17)
    ]  # of 200 words
    began = time.perf_counter()
    model.answer_many(task, [{"text": text} for text in articles])
    hourly = 3600 * len(articles) / (time.perf_counter() - began)
    return [*figures, shown("articles of 200 words", hourly, "an hour")]


def updating(task: Task, options: Options, into: Path) -> list[Figure]:
    """What an update costs beside a full training that learns the same, and how far the two agree."""
    trainer: Updater = plugins.build("trainers", "embedded")
    teach, examine = split(recording("banking77", None))
    examine = examine[: FEW if options.quick else None]
    size, known = (FEW, FEW - 20) if options.quick else UPDATED
    rows = examples(teach[:size])
    base = trainer.train(task, rows[:known], into=into / "full", seed=0)
    shutil.copytree(into / "full", into / "update")  # with the vectors of what is known
    began = time.process_time()
    full = trainer.train(task, rows, into=into / "full", seed=0)
    between = time.process_time()
    updated = trainer.update(task, rows, base=base.path, into=into / "update", seed=0, licence={})
    ended = time.process_time()
    inputs = [{"text": row.text} for row in examine]
    said = [student(checkpoint).answer_many(task, inputs) for checkpoint in (full, updated)]
    same = fmean(one.output == other.output for one, other in zip(*said, strict=True))
    right = [fmean(right for _, right in examined(student(made), task, examine)) for made in (base, full, updated)]
    return [
        shown("full teaching, processor time", between - began, "s"),
        at_most("update, processor time", ended - between, (between - began) / 2, "s")
        if not options.quick
        else shown("update, processor time", ended - between, "s"),
        shown("update says what full teaching says", same),
        *(shown(f"{name}, agreement", value) for name, value in zip(("base", "full", "update"), right, strict=True)),
    ]


def measure(options: Options) -> list[Figure]:
    """Speed first, while the machine is cool; then what each encoder learns."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder)
        task = demo.settings("banking77", base_url="http://127.0.0.1:1", folder=into).tasks[0].task
        figures = [*speed(task, options, into), *updating(task, options, into)]
        for name in SETS if options.data and not options.quick else SETS[:1]:
            figures += learning(name, task, options, into)
    return figures


if __name__ == "__main__":
    sys.exit(run("students", measure))
