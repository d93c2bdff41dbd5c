"""What a task may learn from, and what its versions are examined on: recorded answers -> Selection.

One input in ten is held out, and what is nearly the same goes with it. The first ones held out stay frozen for the life
of a task. What may not train, by its terms or because it is near what is held out or a benchmark, is left out and counted.
"""

from __future__ import annotations

import asyncio
import csv
import heapq
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import NamedTuple

from apprentice import balance, feedback, licence, nearness, promotion
from apprentice.config import Config, Remote, TaskConfig
from apprentice.errors import ConfigError, TrainingError
from apprentice.teachers import before_cycle, near_any
from apprentice.teachers import examples as given_by_teachers
from apprentice.types import Correction, Event, Example, Json, Record, Seconds, Store, Version

BETWEEN = "near a row in training and one that is held out"
IMPORTED = "import-"  # so begin the ids of Examples that were no requests of this system
_KEY = 16  # hex digits of a fingerprint by which a frozen row is known
_WRONG = 0.5  # a local answer is wrong where it, or one of its fields, scores less than this against the remote's

type _Told = tuple[Seconds, str, Example]  # when it was told, of which input, what


class Selection(NamedTuple):
    """What a cycle may learn from, and what it is examined on. `labels` counts the recorded answers behind both.

    `licence`: the proof that `training` may train, of which `chosen` are the rows before the terms were looked at.
    `frozen`: the keys of those held out that stay so for ever. `left_out`: how many are on neither side, by reason.
    `about`: how many rows there are of what, and how `training` is balanced; see `balance.described`.
    """

    training: list[Example]
    held_out: list[Example]
    labels: int
    chosen: tuple[Example, ...] = ()
    licence: Mapping[str, Json] = {}
    frozen: tuple[str, ...] = ()
    left_out: Mapping[str, int] = {}
    about: Mapping[str, Json] = {}


async def choose(
    config: Config, task: TaskConfig, store: Store, corrected: Sequence[tuple[Record, Correction]]
) -> Selection:
    """The selection from everything that the store knows of a task. Raises ConfigError that names a benchmark's file."""
    local = task.local or config.local
    apart = await asyncio.to_thread(benchmarks, task)
    records = await store.records(task.name, labelled=True)
    frozen = frozen_rows(await store.versions(task.name))
    return await asyncio.to_thread(
        select,
        records,
        corrected,
        local.gold_weight,
        labels=given_by_teachers(await store.labels(task.name)),
        imported=await store.examples(task.name),
        near=local.near_duplicates,
        frozen=frozen,
        freeze=local.holdout_frozen,
        benchmarks=apart,
    )


async def label(
    config: Config, task: TaskConfig, store: Store, clock: Callable[[], Seconds], owner: str, seed: int
) -> None:
    """Have the teachers label what this cycle may otherwise not learn from, where that is configured.

    What is in the way is recorded, and the cycle goes on. Raises ConfigError that names a benchmark's file, StoreError.
    """
    local = task.local or config.local
    if not local.teacher_labels or not config.teachers:
        return
    apart = await asyncio.to_thread(benchmarks, task)
    await before_cycle(
        config,
        task.name,
        store,
        limit=local.teacher_labels,
        clock=clock,
        new_id=lambda: uuid.uuid4().hex,
        dice=Random(seed),  # noqa: S311  (pauses between retries)
        owner=owner,
        excluded=near_any(apart.values(), local.near_duplicates),
    )


async def gold(store: Store, task: str) -> list[tuple[Record, Correction]]:
    """The requests about which a person's word stands, with that word."""
    said = feedback.current(await store.corrections(task))
    found = [(await store.record(request), word) for request, word in said.items()]
    return [(record, word) for record, word in found if record is not None]


def frozen_rows(versions: Sequence[Version]) -> tuple[str, ...]:
    """The keys of the rows that were frozen when the last of these versions was made."""
    return next((tuple(made.metrics["frozen"]) for made in reversed(versions) if made.metrics.get("frozen")), ())


def key_of(example: Example) -> str:
    """By which a frozen row is known."""
    return promotion.fingerprint(example.input)[:_KEY]


# --- the split -------------------------------------------------------------------------------------------------------


def select(
    records: Iterable[tuple[int, Record]],
    gold: Iterable[tuple[Record, Correction]] = (),
    gold_weight: float = 1.0,
    *,
    labels: Iterable[Example] = (),
    imported: Sequence[Example] = (),
    near: float = nearness.NEAR,
    frozen: Sequence[str] = (),
    freeze: int = 0,
    benchmarks: Mapping[str, Sequence[Json]] | None = None,
) -> Selection:
    """Examples from recorded remote answers: the newest answer to an input counts, one input in ten is held out.

    A teacher's label replaces the remote's answers to the same input: it was asked for because those may not train. A
    person's word replaces whatever any model said about it, and weighs `gold_weight`. What was `imported` from other
    logs is replaced by what was recorded here, model by model and person by person. The local answer to the same request
    is the Example's `rejected` where a person said otherwise, or where it was scored as wrong beside the remote's. Inputs
    that are `near` each other are on one side; the order is that in which inputs became known. `frozen`: keys of rows that are
    held out whatever else, filled up with the first ones held out until they are `freeze`. `benchmarks`: inputs that no
    row in training may be near, by where they are from.
    """
    answers, words = _answers(records), _words(gold, gold_weight)
    taught, written = _imported(imported, gold_weight)
    given = [(row.at, promotion.fingerprint(row.input), row) for row in labels]
    # Answers are in the order of the store, which no later one changes; the others come in between, by their moment.
    order = heapq.merge(answers, sorted([*given, *words], key=itemgetter(0)), key=itemgetter(0))
    newest = {key: example for told in (taught, answers, given, written, words) for _, key, example in told}
    # What was imported comes first, whatever its moment: mostly it was there before the first request.
    rows = {key: newest[key] for key in map(promotion.fingerprint, (example.input for example in imported))}
    rows |= {key: newest[key] for _, key, _ in order}
    frozen = tuple(frozen)[:freeze]
    before = set(frozen)
    sides = nearness.split(
        list(rows),
        [example.input for example in rows.values()],
        held_out=promotion.held_out,
        fixed={key for key in rows if key[:_KEY] in before},
        near=near,
    )
    parts: dict[nearness.Side, list[Example]] = {"training": [], "held_out": [], "between": []}
    for side, example in zip(sides, rows.values(), strict=True):
        parts[side].append(example)
    frozen += tuple(key for key in map(key_of, parts["held_out"]) if key not in before)[: freeze - len(frozen)]
    training, left_out = _apart_from(parts["training"], benchmarks or {}, near)
    if parts["between"]:
        left_out[BETWEEN] = len(parts["between"])
    labels_in_all = len(answers) + len(given) + len(words) + len(imported)
    return Selection(training, parts["held_out"], labels_in_all, frozen=frozen, left_out=left_out)


def _imported(examples: Iterable[Example], weight: float) -> tuple[list[_Told], list[_Told]]:
    """What models and what people said in other logs, the oldest first."""
    told = sorted(
        ((example.at, promotion.fingerprint(example.input), example) for example in examples), key=itemgetter(0)
    )
    people = [(at, key, row.model_copy(update={"weight": weight})) for at, key, row in told if row.source == "gold"]
    return [one for one in told if one[2].source != "gold"], people


def _answers(records: Iterable[tuple[int, Record]]) -> list[_Told]:
    return [
        (
            record.at,
            promotion.fingerprint(record.input),
            Example(
                input=record.input,
                target=record.remote.output,
                source="remote",
                request_id=record.request_id,
                model=record.remote.model,
                teacher=record.remote.provider,
                at=record.at,
                rejected=_rejected(record, record.remote.output),
            ),
        )
        for _, record in records
        if record.remote is not None and record.remote.output is not None
    ]


def _words(gold: Iterable[tuple[Record, Correction]], weight: float) -> list[_Told]:
    found = []
    for record, word in gold:
        example = Example(
            input=record.input,
            target=word.target,
            source="gold",
            weight=weight,
            request_id=record.request_id,
            at=word.at,
            rejected=_rejected(record, word.target, corrected=word.action == "corrected"),
        )
        if record.remote is not None and not licence.authored(word.target, record.remote.output):
            # Approved, not written: it is still the remote's answer, and its terms count.
            whose = {"model": record.remote.model, "teacher": record.remote.provider, "at": record.at}
            example = example.model_copy(update=whose)
        found.append((word.at, promotion.fingerprint(record.input), example))
    return found


def _rejected(record: Record, target: Json, *, corrected: bool = False) -> Json:
    """The local answer that was judged wrong, and for which `target` is the better one; None where there is none.

    By a person who `corrected` the request, or by the score beside the remote's answer. It is our own output, whoever gave
    the target: so the terms of the target alone say whether the two may train.
    """
    local = record.local.output if record.local is not None else None
    if local is None or not licence.authored(target, local):
        return None
    scores = [] if record.score is None else [record.score.value, *record.score.fields.values()]
    return local if corrected or min(scores, default=1.0) < _WRONG else None


def _apart_from(
    training: list[Example], benchmarks: Mapping[str, Sequence[Json]], near: float
) -> tuple[list[Example], dict[str, int]]:
    """The rows that are near none of the benchmarks, and how many are near one of each."""
    left_out: dict[str, int] = {}
    for name, inputs in benchmarks.items():
        found = nearness.alike([example.input for example in training], inputs, near)
        if any(found):
            left_out[f"near a row of {name}"] = sum(found)
            training = [example for example, alike in zip(training, found, strict=True) if not alike]
    return training, left_out


# --- benchmarks ------------------------------------------------------------------------------------------------------


def benchmarks(task: TaskConfig) -> dict[str, list[Json]]:
    """The inputs in the task's benchmark files, by file. Raises ConfigError that names the field, the file and the line.

    A row of JSON or CSV is an input under `input`, or in the fields that the task's inputs have; otherwise each of its
    texts of three words and more is one.
    """
    found = {}
    for index, path in enumerate(task.benchmarks):
        at = f"task {task.name!r}: benchmarks[{index}]: {path}"
        try:
            inputs = [input for row in _rows(path) for input in _inputs(task, row)]
        except OSError as error:
            raise ConfigError(f"{at}: cannot be read: {error.strerror}", hint="correct or remove the path") from error
        except (ValueError, csv.Error, RecursionError) as error:
            raise ConfigError(f"{at}: {error}", hint="a file in UTF-8: .jsonl, .csv with a header, or .txt") from error
        if not inputs:
            raise ConfigError(f"{at}: has no text to keep training apart from", hint="remove it, or correct the file")
        found[str(path)] = inputs
    return found


def _rows(path: Path) -> Iterator[Json]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file, strict=True)
            return
        for number, line in enumerate(file, start=1):
            if line.strip() and path.suffix == ".txt":
                yield line
            elif line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: is not JSON: {error}") from error


def _inputs(task: TaskConfig, row: Json) -> list[Json]:
    if isinstance(row, dict):
        known = {name: row[name] for name in task.task.input_schema.get("properties", {}) if name in row}
        if "input" in row or known:
            return [known or row["input"]]
    return [text for text in nearness.texts(row) if len(nearness.words(text)) >= nearness.WORDS]


# --- the licence gate ------------------------------------------------------------------------------------------------


async def permit(
    config: Config, task: TaskConfig, selection: Selection, store: Store, clock: Callable[[], Seconds]
) -> Selection:
    """The selection without the rows that may not train, with the proof for the others; says ROWS_REFUSED if there are any.

    What is held out is only examined, which is no training. Raises TrainingError when no row is left.
    """
    today = licence.day(clock())
    permitted, sifted = lawful(config, task, selection, today)
    if sifted.refused:
        refused = f"{len(sifted.refused)} of {len(permitted.chosen)} rows may not train"
        reasons = "; ".join(f"{rows} because {why}" for why, rows in sifted.reasons.items())
        evidence = {"rows": len(permitted.chosen), "refused": sifted.reasons}
        key = f"ROWS_REFUSED/{today}/{sorted(sifted.reasons)}"  # once a day and for the same reasons
        await store.add_event(
            Event(
                name="ROWS_REFUSED",
                task=task.name,
                at=clock(),
                message=f"{refused}: {reasons}",
                evidence=evidence,
                key=key,
            )
        )
        if not sifted.admitted:
            raise TrainingError(f"task {task.name!r}: {refused}: {reasons}", hint="`apprentice licence` explains")
    return permitted._replace(about=await asyncio.to_thread(about, permitted))


def about(selection: Selection) -> dict[str, Json]:
    """How many rows there are of what, and how those in training are balanced."""
    counts = {
        "held_out": len(selection.held_out),
        "frozen": len(selection.frozen),
        "left_out": dict(selection.left_out),
    }
    return balance.described(selection.training) | counts


def lawful(config: Config, task: TaskConfig, selection: Selection, today: date) -> tuple[Selection, licence.Sifted]:
    """The selection without the rows that may not train on that day, with the proof; and what became of each row."""
    chosen = tuple(selection.training)
    sifted = licence.sift(chosen, ruling(config, task, today))
    proof = licence.proof(sifted, today=today)
    return selection._replace(training=sifted.examples, chosen=chosen, licence=proof), sifted


def ruling(config: Config, task: TaskConfig, today: date) -> Callable[[Example], licence.Ruling]:
    """Whether a row of this task may train on that day, by the terms of whom this configuration asks."""
    asked = {remote.teacher: teacher for remote, teacher in teachers(config)}

    def rule(example: Example) -> licence.Ruling:
        known = asked.get(example.teacher) or _elsewhere(example)
        if known is None and example.model and not example.teacher:
            # Recorded before answers said where they were asked: any of the configured ones may have given it.
            each = [licence.judge(example, teacher, task=task.name, today=today) for teacher in asked.values()]
            return licence.strictest(each)
        return licence.judge(example, known, task=task.name, today=today)

    return rule


def _elsewhere(example: Example) -> licence.Teacher | None:
    """Whom this configuration does not ask, where an imported log tells it; no permission was given for them."""
    provider, _, host = example.teacher.partition("@")
    if not provider or not (example.request_id or "").startswith(IMPORTED):
        return None
    return licence.Teacher("import", provider, example.model, host or None)


def teachers(config: Config) -> list[tuple[Remote, licence.Teacher]]:
    """Everyone whom this configuration asks, in its order, as the licence gate sees them."""
    roles = [("remote", config.remote)]
    roles += [("additional", remote) for remote in config.remote.additional_providers]
    roles += [("teacher", remote) for remote in config.teachers]
    return [(r, licence.Teacher(role, r.provider, r.model, r.host, r.permission)) for role, r in roles]
