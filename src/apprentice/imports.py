"""Other tools' logs become Examples: what each row asked and answered, as the task has it, and whose answer it was.

Examples that were imported stand beside the Records, in a table of their own: they teach, and are examined against, but were
no requests of this system. They count in no report, no certificate and no budget. An Example is named by its content, so
that a file may be imported again, after a kill say, and adds nothing twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import genai_prices

from apprentice import budget, licence, plugins, privacy, promotion
from apprentice.bounds import CELLS, interval, tally
from apprentice.config import Config, TaskConfig
from apprentice.errors import ApprenticeError, ConfigError, InvalidAnswer, InvalidRequest
from apprentice.importers import Imported, Importer, Unusable, moment, openable, place_of
from apprentice.jobs import PaidTrainer
from apprentice.models import parse
from apprentice.request import validated
from apprentice.selection import IMPORTED, Selection, lawful, ruling
from apprentice.shelf import load, ready
from apprentice.types import Answer, Checkpoint, Evaluator, Example, Json, ManyModel, Micros, Seconds, Store, Value

_ROWS = 500  # Examples kept in one transaction
_LINES = 20  # models and reasons that are told one by one
_SHOWN = 5  # rows of no use that are told one by one
_SAMPLE = 2_000  # rows from which a first student is tried
_FOLDS = 5
_FEWEST = 20  # rows with which that says anything
_DAY: Seconds = 86_400.0


class Settings(NamedTuple):
    """How rows become Examples. `model`, `provider` and `at` are for rows of a log that does not tell them itself."""

    gold: bool = False  # people wrote the answers
    few_shot: bool = False  # turns before the last message are examples, the same in every row
    pattern: str = ""  # the frame of the prompts: "Sort this mail: {text}"
    model: str = ""
    provider: str = ""  # "openai", or "openai@host"
    at: Seconds = 0.0


class Found(NamedTuple):
    """One row: an Example, or why it is none."""

    place: str
    example: Example | None = None
    reason: str = ""  # one of few sentences
    detail: str = ""  # with the field
    cost: float | None = None  # micro-dollars, by the log or by the price table


class Line(Value):
    """Answers of one model, asked at one place, and whether they may train today."""

    teacher: str
    model: str
    rows: int
    may_train: bool
    reason: str = ""  # why not
    fix: str = ""


class Summary(Value):
    """What files bring to a task. Rows are usable or refused; of the usable ones, those not known yet are new."""

    task: str
    rows: int
    usable: int
    new: int
    inputs: int  # different ones, among the new rows
    may_train: int  # of the new rows, by the terms of today
    lines: list[Line]  # of the new rows, the most frequent first
    others: int  # new rows that are in none of these lines
    refused: dict[str, int]  # rows by reason, the most frequent first
    shown: list[str]  # the first of them, with place and field
    first: Seconds | None  # of the usable rows whose day is known
    last: Seconds | None
    rows_a_day: float | None  # None: the days are not known, or all is of one moment
    cost: float | None  # micro-dollars of one answer, on average; None: nobody knows
    priced: int  # rows behind that


class Forecast(Value):
    """What a first student, taught on the new rows that may train, agrees with; cross-validated. No promise."""

    n: int  # rows that were asked of a student which had not seen them
    agreement: float | None = None
    lower: float | None = None  # 95 %
    upper: float | None = None
    majority: float | None = None  # of always giving the commonest answer
    local_share: float | None = None  # of the surest answers, as many as agree as well as `target` asks
    target: float
    saving_a_month: Micros | None = None  # over 30 days at the log's rate and price, less the audits at the floor
    problem: str = ""  # why it was not tried


# --- rows -> Examples -------------------------------------------------------------------------------------------------


class Frame:
    """The fixed text around the fields of a prompt: "Sort this mail: {text}\\nKind:". `{{` is a brace.

    The texts between fields are looked for from left to right, each at its first place: time grows with the prompt alone.
    """

    def __init__(self, pattern: str) -> None:
        """Raises ConfigError for a pattern without fields, with two fields side by side, or one that is there twice."""
        try:
            parts = [(text, name) for text, name, _, _ in string.Formatter().parse(pattern.replace("\\n", "\n"))]
        except ValueError as error:
            raise ConfigError(f"--input-pattern: {error}", hint="write a brace as {{") from error
        self._texts: list[str] = [""]
        self._names: list[str] = []
        for text, name in parts:
            self._texts[-1] += text
            if name is None:
                continue
            if not name or name in self._names or (self._names and not self._texts[-1]):
                wrong = "a field without a name" if not name else f"the field {name!r} twice, or beside another"
                raise ConfigError(f"--input-pattern: has {wrong}")
            self._names.append(name)
            self._texts.append("")
        if not self._names:
            raise ConfigError("--input-pattern: has no field", hint="such as: Sort this mail: {text}")

    def read(self, prompt: str) -> dict[str, str] | None:
        """The fields of a prompt; None for one that has another frame.

        >>> Frame("Sort: {text} [{language}]").read("Sort: where is it? [en]")
        {'text': 'where is it?', 'language': 'en'}
        """
        prompt = prompt.strip()
        start, end = self._texts[0].lstrip(), self._texts[-1].rstrip()
        if not (prompt.startswith(start) and prompt.endswith(end) and len(prompt) >= len(start) + len(end)):
            return None
        rest = prompt[len(start) : len(prompt) - len(end)]
        found: dict[str, str] = {}
        for name, text in zip(self._names, self._texts[1:-1], strict=False):
            found[name], there, rest = rest.partition(text)
            if not there:
                return None
        return found | {self._names[-1]: rest}


def examples(task: TaskConfig, rows: Iterable[Imported], settings: Settings) -> Iterator[Found]:
    """An Example for each row, or the reason why it is none. Raises ConfigError for a pattern that is no frame."""
    frame = Frame(settings.pattern) if settings.pattern else None
    elsewhere = place_of(settings.provider) if settings.provider else ""
    for row in rows:
        try:
            if row.problem:
                raise Unusable(row.problem)
            if row.turns and not settings.few_shot:
                raise Unusable("is a later turn of a conversation (--few-shot: the earlier ones are examples)")
            input = _input(task, row, frame)
            output = _output(task, row)
        except Unusable as problem:
            yield Found(row.place, reason=str(problem), detail=str(problem.__cause__ or ""))
            continue
        model = row.model or ("" if settings.gold else settings.model)
        own = settings.gold and not model  # what a person approved remains the answer of the model that the log names
        teacher = elsewhere if elsewhere and row.provider in ("", "?@?") else row.provider
        told = Example(
            input=input,
            target=output,
            source="gold" if settings.gold else "remote",
            model=model,
            teacher="" if own else teacher,
            at=row.at or settings.at,
        )
        yield Found(row.place, told.model_copy(update={"request_id": _name(told)}), cost=_cost(row, told))


def _name(example: Example) -> str:
    told = [example.input, example.target, example.source, example.model, example.teacher, example.at]
    return IMPORTED + hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _input(task: TaskConfig, row: Imported, frame: Frame | None) -> Json:
    found, cells = row.input, row.cells
    if frame is not None:
        found, cells = frame.read(found) if isinstance(found, str) else None, True
        if found is None:
            raise Unusable("its prompt does not have the frame of --input-pattern")
    schema = task.task.input_schema
    try:
        return _fitting(_candidates(schema, found, cells=cells), task.validate_input)
    except (InvalidRequest, InvalidAnswer) as error:
        raise Unusable("its prompt is no input of the task (--input-pattern takes it out of a frame)") from error


def _output(task: TaskConfig, row: Imported) -> Json:
    schema = task.task.output_schema
    try:
        return _fitting(_candidates(schema, row.output, cells=row.cells), task.validate_output)
    except InvalidAnswer as error:
        raise Unusable("its answer does not fit the output schema") from error


def _fitting(values: Sequence[Json], check: Callable[[Json], Json]) -> Json:
    """The first value that fits. Raises what is wrong with the first."""
    wrong: ApprenticeError | None = None
    for value in values:
        try:
            return check(value)
        except (InvalidRequest, InvalidAnswer) as error:
            wrong = wrong or error
    assert wrong is not None  # there is at least one value
    raise wrong


def _candidates(schema: Mapping[str, Json], found: Json, *, cells: bool) -> list[Json]:
    """What a logged value may mean: itself, the JSON in a text, or a text as the only text field of an object."""
    if not isinstance(found, str):
        return [_typed(schema, found) if cells else found]
    values: list[Json] = []
    value, problem = parse(found)
    if problem is None:
        values.append(value)
    texts = [name for name, part in (schema.get("properties") or {}).items() if "string" in _types(part)]
    if len(texts) == 1:
        values.append({texts[0]: found.strip()})
    return values or [found.strip()]


def _typed(schema: Mapping[str, Json], value: Json) -> Json:
    """The object with those of its cells as values whose fields are no texts."""
    if not isinstance(value, dict):
        return value
    typed: dict[str, Json] = {}
    for name, cell in value.items():
        part = (schema.get("properties") or {}).get(name, {})
        parsed, problem = parse(cell) if isinstance(cell, str) and "string" not in _types(part) else (None, "a text")
        typed[name] = _typed(part, cell) if isinstance(cell, dict) else cell if problem else parsed
    return typed


def _types(schema: Json) -> list[str]:
    if not isinstance(schema, dict):
        return []
    kinds = schema.get("type", "string" if "enum" in schema else [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _cost(row: Imported, example: Example) -> float | None:
    """Micro-dollars of the answer: by the log, else by the price table of today."""
    if row.cost is not None:
        return float(row.cost)
    if row.usage is None or not example.model:
        return None
    plugin, _, host = example.teacher.partition("@")
    address = f"https://{host}" if host not in ("", "?") else None
    counted = genai_prices.Usage(
        input_tokens=row.usage.input_tokens,
        output_tokens=row.usage.output_tokens,
        cache_read_tokens=row.usage.cached_tokens or None,
    )
    try:
        if address is not None:
            priced = genai_prices.calc_price(counted, model_ref=example.model, provider_api_url=address)
        else:
            provider = plugin if plugin != "?" else None
            priced = genai_prices.calc_price(counted, model_ref=example.model, provider_id=provider)
    except LookupError:
        return None
    return float(budget.micros(priced.total_price))


# --- what a file brings -----------------------------------------------------------------------------------------------


class Tally:
    """Counts rows as they pass, and keeps a sample of the Examples that may train: one an input, at most `_SAMPLE`."""

    def __init__(self, config: Config, task: TaskConfig, known: Iterable[str], today: date) -> None:
        """`known`: ids of the Examples that are kept already."""
        self._task = task
        self._today = today
        self._rule = ruling(config, task, today)
        self._redactor = privacy.redactor(config, task)
        self._known = set(known)
        self._rows = self._usable = self._new = self._priced = 0
        self._cost = 0.0
        self._first, self._last, self._dated = math.inf, -math.inf, 0
        self._groups: Counter[tuple[str, str]] = Counter()
        self._rulings: dict[tuple[str, str, str, date | None], licence.Ruling] = {}
        self._ruled: dict[tuple[str, str], Counter[tuple[bool, str, str]]] = {}
        self._refused: Counter[str] = Counter()
        self._shown: list[str] = []
        self._inputs: set[bytes] = set()
        self._sample: dict[str, Example] = {}
        self._highest = "g"  # above every fingerprint: those above the highest that was kept are passed over

    def add(self, found: Found) -> Example | None:
        """Count a row. Its Example, if it is one that is not known yet."""
        self._rows += 1
        if found.example is None:
            self._refused[found.reason] += 1
            if len(self._shown) < _SHOWN:
                self._shown.append(": ".join(part for part in (found.place, found.reason, found.detail) if part))
            return None
        example = found.example
        self._usable += 1
        if found.cost is not None:
            self._priced, self._cost = self._priced + 1, self._cost + found.cost
        if example.at:
            self._first, self._last = min(self._first, example.at), max(self._last, example.at)
            self._dated += 1
        assert example.request_id is not None  # `examples` names them
        if example.request_id in self._known:
            return None
        self._known.add(example.request_id)  # of the row as it was: by that it is found again
        veil = privacy.Veil(self._redactor)
        example = example.model_copy(update={"input": veil.hide(example.input), "target": veil.hide(example.target)})
        self._new += 1
        print_of_input = promotion.fingerprint(example.input)
        self._inputs.add(bytes.fromhex(print_of_input[:32]))
        ruling = self._ruling(example)
        group = (ruling.teacher or example.teacher, example.model)
        self._groups[group] += 1
        self._ruled.setdefault(group, Counter())[ruling.may_train, ruling.reason, ruling.fix] += 1
        if ruling.may_train:
            self._keep(print_of_input, example)
        return example

    def _ruling(self, example: Example) -> licence.Ruling:
        """What the gate says; it looks at nothing but these."""
        day = licence.day(example.at) if example.at else None
        key = (example.source, example.model, example.teacher, day)
        if key not in self._rulings:
            found = self._rule(example)
            if day is not None and day > self._today:  # the gate names the day: one reason for all of them
                found = found.model_copy(update={"reason": "the answer is dated later than today"})
            self._rulings[key] = found
        return self._rulings[key]

    def _keep(self, print_of_input: str, example: Example) -> None:
        before = self._sample.get(print_of_input)
        if print_of_input > self._highest or (before is not None and before.at > example.at):
            return
        self._sample[print_of_input] = example
        if len(self._sample) >= 2 * _SAMPLE:
            kept = sorted(self._sample)[:_SAMPLE]
            self._sample, self._highest = {name: self._sample[name] for name in kept}, kept[-1]

    def sample(self) -> list[Example]:
        """The newest answers to the inputs with the lowest fingerprints: as good as drawn by lot, and always the same."""
        return [self._sample[name] for name in sorted(self._sample)[:_SAMPLE]]

    def summary(self) -> Summary:
        span = self._last - self._first
        lines = [
            Line(teacher=teacher, model=model, rows=rows, may_train=may, reason=reason, fix=fix)
            for (teacher, model), _ in self._groups.most_common()
            for (may, reason, fix), rows in self._ruled[teacher, model].most_common()
        ]
        told = sorted(lines, key=lambda line: -line.rows)[:_LINES]
        return Summary(
            task=self._task.name,
            rows=self._rows,
            usable=self._usable,
            new=self._new,
            inputs=len(self._inputs),
            may_train=sum(line.rows for line in lines if line.may_train),
            lines=told,
            others=self._new - sum(line.rows for line in told),
            refused=dict(self._refused.most_common()),
            shown=self._shown,
            first=self._first if self._dated else None,
            last=self._last if self._dated else None,
            rows_a_day=(self._dated - 1) * _DAY / span if span > 0 else None,
            cost=self._cost / self._priced if self._priced else None,
            priced=self._priced,
        )


def read(importer: Importer, task: TaskConfig, paths: Iterable[Path], settings: Settings) -> Iterator[Found]:
    """The rows of the files, one file after the other; a place begins with the file's name. Raises ConfigError."""
    paths = list(paths)
    for path in paths:
        openable(path)  # all of them, before the first row is kept
    for path in paths:
        for found in examples(task, importer.rows(path), settings):
            yield found._replace(place=f"{path.name}: {found.place}")


async def keep(store: Store, task: TaskConfig, rows: Iterable[Found], tally: Tally) -> Summary:
    """Keep what is not known yet, durable; killed at any moment and repeated, it comes to the same. Raises StoreError."""
    waiting: list[Example] = []
    for found in rows:
        example = tally.add(found)
        if example is not None:
            waiting.append(example)
        if len(waiting) >= _ROWS:
            await store.add_examples(task.name, waiting)
            waiting = []
    if waiting:
        await store.add_examples(task.name, waiting)
    return tally.summary()


async def take_back(store: Store, task: TaskConfig, rows: Iterable[Found]) -> int:
    """Remove what these rows brought; how many Examples that were. What has learned from them stays as it is."""
    names = [found.example.request_id for found in rows if found.example is not None]
    return await store.remove_examples(task.name, [name for name in names if name is not None])


# --- a first student --------------------------------------------------------------------------------------------------


async def forecast(
    config: Config, task: TaskConfig, sample: Sequence[Example], summary: Summary, *, today: date
) -> Forecast:
    """How a first student would do: each fifth of the sample is asked of one that was taught on the others.

    With the configured trainer, local model and evaluator; weights are written to a folder that is gone afterwards. Nothing
    is spent: a trainer that bills is not tried.
    """
    target = task.confidence_thresholds.phase2_to_phase3
    selection, _ = lawful(config, task, Selection(training=list(sample), held_out=[], labels=len(sample)), today)
    rows = selection.training
    if len(rows) < _FEWEST:
        return Forecast(
            n=0, target=target, problem=f"{len(rows)} rows may train; {_FEWEST} are needed to try a student"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="apprentice-import-") as folder:
            pairs = await _crossed(config, task, rows, selection.licence, Path(folder))
    except ApprenticeError as error:
        return Forecast(n=0, target=target, problem=f"{error}" + (f" ({error.hint})" if error.hint else ""))
    low, high = [0] * (CELLS + 1), [0] * (CELLS + 1)
    for _, score, _ in pairs:
        tally(low, high, score)
    lower, upper = interval(low, high, 0.05)
    share = _share([(sure, score) for sure, score, _ in pairs], target)
    floor = (task.sampling or config.sampling).min_floor
    saving = None
    if summary.cost is not None and summary.rows_a_day is not None:
        saving = math.floor(30 * summary.rows_a_day * summary.cost * share * (1 - floor))
    return Forecast(
        n=len(pairs),
        agreement=sum(score for _, score, _ in pairs) / len(pairs),
        lower=lower,
        upper=upper,
        majority=sum(base for _, _, base in pairs) / len(pairs),
        local_share=share,
        target=target,
        saving_a_month=saving,
    )


async def _crossed(
    config: Config, task: TaskConfig, rows: Sequence[Example], proof: Mapping[str, Json], folder: Path
) -> list[tuple[float, float, float]]:
    """For each row the confidence and the score of a student that had not seen it, and the score of the commonest answer."""
    local = task.local or config.local
    if local.fine_tune_backend is None:
        raise ConfigError("nothing is configured to train a local model", hint="name one in `local.fine_tune_backend`")
    trainer = plugins.build("trainers", local.fine_tune_backend, **local.fine_tune_settings)
    if isinstance(trainer, PaidTrainer):
        raise ConfigError(f"training with {local.fine_tune_backend!r} costs money, and is not tried")
    name, settings = task.evaluator_settings
    evaluate: Evaluator = plugins.build("evaluators", name, **settings)
    pairs: list[tuple[float, float, float]] = []
    folds: list[list[Example]] = [[] for _ in range(_FOLDS)]
    for number, row in enumerate(rows):  # in the order of their fingerprints: which fold a row is in is chance
        folds[number % _FOLDS].append(row)
    for asked in folds:
        taught = [row for fold in folds if fold is not asked for row in fold]
        made: Checkpoint = await asyncio.to_thread(
            trainer.train, task.learnable_task, taught, into=folder, seed=0, licence=proof
        )
        model = load(local, made.path)
        try:
            await ready(model)
            inputs = [row.input for row in asked]
            if isinstance(model, ManyModel):
                answers: list[Answer] = await asyncio.to_thread(model.answer_many, task.task, inputs)
            else:
                answers = [await model.answer(task.task, input) for input in inputs]
        finally:
            await model.close()
        counts = Counter(json.dumps(row.target, sort_keys=True) for row in taught)
        commonest = json.loads(counts.most_common(1)[0][0])
        for row, answer in zip(asked, (validated(task, answer) for answer in answers), strict=True):
            score = 0.0 if answer.output is None else (await evaluate(answer.output, row.target)).value
            pairs.append((answer.confidence or 0.0, score, (await evaluate(commonest, row.target)).value))
    return pairs


def _share(pairs: Sequence[tuple[float, float]], target: float) -> float:
    """The largest share of the surest answers whose mean score is the target or more."""
    best, sum_of_scores = 0, 0.0
    ranked = sorted(pairs, key=lambda pair: -pair[0])
    for number, (sure, score) in enumerate(ranked, start=1):
        sum_of_scores += score
        last_of_equals = number == len(ranked) or ranked[number][0] < sure
        if last_of_equals and sum_of_scores >= target * number:
            best = number
    return best / len(ranked)


def day_of(text: str) -> Seconds:
    """The moment of a day or an instant in ISO 8601. Raises ValueError."""
    found = moment(text)
    if not found:
        raise ValueError(f"{text!r} is no day such as 2026-03-01")
    return found
