"""One teaching cycle: select -> permit -> train -> examine -> promote or drop.

It shares only the store with the engine. A lease makes sure that a task is taught by one process at a time; its token is
checked again when the version is promoted, so that a worker that was thought dead cannot publish over its successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import NamedTuple

from apprentice import decide, feedback, jobs, licence, lineage, plugins, promotion
from apprentice.config import Config, Local, Remote, TaskConfig
from apprentice.errors import ConfigError, ModelError, StoreError, TrainingError
from apprentice.evaluators import field
from apprentice.purse import Purse
from apprentice.request import validated
from apprentice.shelf import load, ready
from apprentice.trainers import Updater
from apprentice.types import (
    Answer,
    Checkpoint,
    Correction,
    Evaluator,
    Event,
    Example,
    Gate,
    Json,
    Lease,
    ManyModel,
    Model,
    PromotionState,
    Record,
    Seconds,
    Store,
    Version,
)

_LEASE: Seconds = 20.0  # renewed every fourth of it; a worker that dies is replaced after this long
_LOOK: Seconds = 0.5  # between two looks whether somebody else's lease has ended
_SLICES = 20  # values of one field that are looked at, the commonest ones
_TIMED = 30  # held-out rows that are answered one by one, to see how long that takes
_RECENT = 300  # inputs on which the candidate's confidence is looked at, to fix its deferral thresholds


class Selection(NamedTuple):
    """What a cycle may learn from, and what it is examined on. `labels` counts the recorded answers behind both.

    `licence`: the proof that `training` may train, of which `chosen` are the rows before the terms were looked at.
    """

    training: list[Example]
    held_out: list[Example]
    labels: int
    chosen: tuple[Example, ...] = ()
    licence: Mapping[str, Json] = {}


class Examination(NamedTuple):
    """What the examiner found: scores on the held-out rows, and the candidate's confidence on recent inputs.

    `measured`: everything of the candidate, by name; with the champion's and the majority's beside it.
    """

    screening: promotion.Screening
    confidences: list[float]
    measured: Mapping[str, Json] = {}


async def learn(
    config: Config,
    task_name: str,
    store: Store,
    *,
    clock: Callable[[], Seconds],
    owner: str,
    seed: int = 0,
    force: bool = False,
) -> Version | None:
    """The version that this cycle made, promoted or rejected (its `state` says which); None if no cycle was due.

    Waits while another process teaches this task; with `force`, a cycle is run although none is due. Raises TrainingError
    when there is nothing to learn from or the trainer cannot learn it.
    """
    task = config.task(task_name)
    async with _teaching(store, task_name, owner, clock) as lease:
        if not force and not await due(config, task, store):
            return None  # whoever taught before us has seen the same answers
        corrected = await gold(store, task_name)
        selection = select(
            await store.records(task_name, labelled=True), corrected, (task.local or config.local).gold_weight
        )
        if not selection.training:
            raise TrainingError(f"task {task_name!r} has no recorded answer to learn from yet")
        selection = await permit(config, task, selection, store, clock)
        base = await going_on(task, selection, corrected, store)
        checkpoint = await train(config, task, selection, seed, clock, store, lease, base=base)
        examination = await examine(config, task, selection, checkpoint, store)
        return await promote(task_name, selection, checkpoint, examination, store, lease, clock)


async def due(config: Config, task: TaskConfig, store: Store) -> bool:
    """Whether enough was recorded since the last cycle for another one."""
    labels = await feedback.known(store, task.name)
    versions = await store.versions(task.name)
    before = max((version.metrics.get("labels", 0) for version in versions), default=0)
    batch = (task.local or config.local).fine_tune_batch_size
    urgent = decide.is_urgent(versions, await store.events(task.name, names=sorted(decide.URGENT)))
    if not urgent and any(version.state == "canary" for version in versions):
        return False  # it is about to say whether what was learned last is any better
    first = task.confidence_thresholds.phase1_to_phase2
    return decide.needs_training(labels - before, before, batch, first, urgent=urgent)


async def gold(store: Store, task: str) -> list[tuple[Record, Correction]]:
    """The requests about which a person's word stands, with that word."""
    said = feedback.current(await store.corrections(task))
    found = [(await store.record(request), word) for request, word in said.items()]
    return [(record, word) for record, word in found if record is not None]


def select(
    records: Iterable[tuple[int, Record]], gold: Iterable[tuple[Record, Correction]] = (), gold_weight: float = 1.0
) -> Selection:
    """Examples from recorded remote answers: the newest answer to an input counts, one input in ten is held out.

    A person's word replaces whatever any model said about the same input, and weighs `gold_weight`.
    """
    newest: dict[str, Example] = {}
    labels = 0
    for _, record in records:
        if record.remote is None or record.remote.output is None:
            continue
        labels += 1
        newest[promotion.fingerprint(record.input)] = Example(
            input=record.input,
            target=record.remote.output,
            source="remote",
            request_id=record.request_id,
            model=record.remote.model,
            teacher=record.remote.provider,
            at=record.at,
        )
    for record, word in gold:
        labels += 1
        example = Example(
            input=record.input,
            target=word.target,
            source="gold",
            weight=gold_weight,
            request_id=record.request_id,
            at=word.at,
        )
        if record.remote is not None and not licence.authored(word.target, record.remote.output):
            # Approved, not written: it is still the remote's answer, and its terms count.
            whose = {"model": record.remote.model, "teacher": record.remote.provider, "at": record.at}
            example = example.model_copy(update=whose)
        newest[promotion.fingerprint(record.input)] = example
    held_out = [example for key, example in newest.items() if promotion.held_out(key)]
    training = [example for key, example in newest.items() if not promotion.held_out(key)]
    return Selection(training, held_out, labels)


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
    return permitted


def lawful(config: Config, task: TaskConfig, selection: Selection, today: date) -> tuple[Selection, licence.Sifted]:
    """The selection without the rows that may not train on that day, with the proof; and what became of each row."""
    chosen = tuple(selection.training)
    sifted = licence.sift(chosen, _ruling(config, task, today))
    proof = licence.proof(sifted, today=today)
    return selection._replace(training=sifted.examples, chosen=chosen, licence=proof), sifted


def _ruling(config: Config, task: TaskConfig, today: date) -> Callable[[Example], licence.Ruling]:
    asked = {remote.teacher: teacher for remote, teacher in teachers(config)}

    def rule(example: Example) -> licence.Ruling:
        known = asked.get(example.teacher)
        if known is None and example.model and not example.teacher:
            # Recorded before answers said where they were asked: any of the configured ones may have given it.
            each = [licence.judge(example, teacher, task=task.name, today=today) for teacher in asked.values()]
            return licence.strictest(each)
        return licence.judge(example, known, task=task.name, today=today)

    return rule


def teachers(config: Config) -> list[tuple[Remote, licence.Teacher]]:
    """Everyone whom this configuration asks, in its order, as the licence gate sees them."""
    roles = [("remote", config.remote)]
    roles += [("additional", remote) for remote in config.remote.additional_providers]
    roles += [("teacher", remote) for remote in config.teachers]
    return [(r, licence.Teacher(role, r.provider, r.model, r.host, r.permission)) for role, r in roles]


async def going_on(
    task: TaskConfig, selection: Selection, corrected: Iterable[tuple[Record, Correction]], store: Store
) -> Path | None:
    """The champion's checkpoint where the cycle should be quick: it is urgent, or people said something since then.

    None also where a row may not train: nobody can say that the champion learned nothing from it.
    """
    versions = await store.versions(task.name)
    champion = next((version for version in versions if version.state == "champion"), None)
    if champion is None or len(selection.training) < len(selection.chosen):
        return None
    urgent = decide.is_urgent(versions, await store.events(task.name, names=sorted(decide.URGENT)))
    said = any(word.at > champion.created_at for _, word in corrected)
    return Path(champion.path) if urgent or said else None


async def train(
    config: Config,
    task: TaskConfig,
    selection: Selection,
    seed: int,
    clock: Callable[[], Seconds],
    store: Store,
    lease: Lease,
    *,
    base: Path | None = None,
) -> Checkpoint:
    """A checkpoint of the configured trainer, in a thread, so that the lease goes on being renewed.

    `base`: a checkpoint to go on from where the trainer can do that; the manifest says then `updated_from`. The terms
    are looked at once more: raises TrainingError when a row may no longer train. What a service bills for training is
    held before and settled after: raises BudgetError.
    """
    again = licence.sift(selection.chosen, _ruling(config, task, licence.day(clock())))
    licence.check_proof(selection.licence, again)
    local = task.local or config.local
    if local.fine_tune_backend is None:
        raise TrainingError(
            f"nothing is configured to train a local model for {task.name!r}",
            hint="name a trainer in `local.fine_tune_backend`, say: embedded",
        )
    trainer = plugins.build("trainers", local.fine_tune_backend, **local.fine_tune_settings)
    if getattr(trainer, "kind", None) == "reference":
        raise ConfigError(
            f"what {local.fine_tune_backend!r} trains stays at its provider, and {local.backend!r} cannot serve it",
            hint="use a trainer that gives the weights; or train it from a program, and use the model as a `remote`",
        )
    into = local.model_dir / task.name
    into.mkdir(parents=True, exist_ok=True)
    proof = {key: value for key, value in selection.licence.items() if key != "judged"}  # the same rows, the same id
    if base is not None and isinstance(trainer, Updater):
        with contextlib.suppress(TrainingError):  # only teaching in full will do; what else is wrong, that says again
            return await asyncio.to_thread(
                trainer.update, task.learnable_task, selection.training, base=base, into=into, seed=seed, licence=proof
            )
    return await jobs.train(
        task,
        trainer,
        selection.training,
        into=into,
        seed=seed,
        licence=proof,
        lease=lease,
        store=store,
        purse=Purse(config, store, clock=clock),
    )


async def examine(
    config: Config, task: TaskConfig, selection: Selection, checkpoint: Checkpoint, store: Store
) -> Examination:
    """What candidate and champion do on the held-out rows, and the candidate's confidence on recent inputs."""
    name, settings = task.evaluator_settings
    evaluate = plugins.build("evaluators", name, **settings)
    rows = held_out_rows(task, selection.held_out)
    local = task.local or config.local
    champion = next((version for version in await store.versions(task.name) if version.state == "champion"), None)
    before: promotion.Measured | None = None
    unusable = ""
    if champion is not None:
        try:
            before, _ = await _measure(task, local, champion.path, selection.held_out, evaluate)
        except (ConfigError, ModelError) as error:  # its files are gone, or the task's schema was changed since
            unusable = f"{champion.id} can no longer answer: {error}"
    recent = [record for _, record in await store.records(task.name, limit=_RECENT, newest=True)]
    candidate, confidences = await _measure(
        task, local, checkpoint.path, selection.held_out, evaluate, recent=recent, checkpoint=checkpoint
    )
    little_at_stake = True
    if champion is not None and before is not None:
        had = champion.trained_on + int((champion.metrics.get("held_out") or {}).get("n", 0))
        twice = len(selection.training) + len(selection.held_out) >= promotion.TWICE * had
        little_at_stake = twice or (await lineage.standing(config, task, store)).phase != "steady"
    gates = [Gate.parse(gate) for gate in task.gates]
    screening = promotion.judge(candidate, before, rows, gates=gates, holdout_decides=little_at_stake)
    if unusable and screening.promote:
        screening = screening._replace(reason=unusable)
    measured = promotion.measures(candidate, rows)
    measured["majority"] = await _majority(selection, evaluate)
    measured["champion"] = None if before is None else promotion.measures(before, rows)
    return Examination(screening, confidences, measured)


def held_out_rows(task: TaskConfig, examples: list[Example]) -> promotion.HeldOut:
    """What the examiner knows of the held-out rows: the targets, the task's slices with their rows, and which are gold."""
    slices: dict[str, list[int]] = {}
    for path in task.slices:
        values = [canonical(field(example.input, path)) for example in examples]
        for value, _ in Counter(values).most_common(_SLICES):
            slices[f"{path}={value[:60]}"] = [row for row, found in enumerate(values) if found == value]
    gold = [row for row, example in enumerate(examples) if example.source == "gold"]
    return promotion.HeldOut([canonical(example.target) for example in examples], slices, gold)


async def _measure(
    task: TaskConfig,
    local: Local,
    path: str | Path,
    examples: list[Example],
    evaluate: Evaluator,
    *,
    recent: list[Record] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[promotion.Measured, list[float]]:
    """What the version at this path does; with `checkpoint`, its confidences on the recent inputs as well."""
    model = load(local, path)
    try:
        await ready(model)
        answers = await _answers(task, model, [example.input for example in examples])
        answers = [validated(task, answer) for answer in answers]
        latencies = []
        for example in examples[:_TIMED]:
            began = time.perf_counter()
            await model.answer(task.task, example.input)
            latencies.append(time.perf_counter() - began)
        confidences = [] if checkpoint is None else await _confidences(task, model, recent or [], checkpoint)
    finally:
        await model.close()
    scored = [
        None if answer.output is None else await evaluate(answer.output, example.target)
        for answer, example in zip(answers, examples, strict=True)
    ]
    names = dict.fromkeys(name for score in scored if score is not None for name in score.fields)
    found = promotion.Measured(
        scores=[0.0 if score is None else score.value for score in scored],
        said=[None if answer.output is None else canonical(answer.output) for answer in answers],
        fields={
            name: [
                0.0 if score is None else score.fields.get(name, 1.0) for score in scored
            ]  # neither has it: the same
            for name in names
        },
        latencies=latencies,
        cost=sum(answer.cost for answer in answers) / max(len(answers), 1),
        size=await asyncio.to_thread(_size, Path(path)),
    )
    return found, confidences


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


async def _majority(selection: Selection, evaluate: Evaluator) -> float | None:
    """The agreement of always giving the commonest answer: what a version has to beat to have learned anything."""
    if not selection.training or not selection.held_out:
        return None
    counts = Counter(canonical(example.target) for example in selection.training)
    always = json.loads(counts.most_common(1)[0][0])
    scores = [(await evaluate(always, example.target)).value for example in selection.held_out]
    return sum(scores) / len(scores)


def canonical(value: Json) -> str:
    """The value as text, the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


async def promote(
    task_name: str,
    selection: Selection,
    checkpoint: Checkpoint,
    examination: Examination,
    store: Store,
    lease: Lease,
    clock: Callable[[], Seconds],
) -> Version:
    """Write the version and what was found into the history, and promote it unless the examination says otherwise."""
    screening = examination.screening
    version = await store.add_version(
        Version(
            id="",
            task=task_name,
            checkpoint=checkpoint.id,
            path=str(checkpoint.path),
            state="candidate" if screening.promote else "rejected",
            # A job that was open is finished with the examples that it was begun with.
            trained_on=int(checkpoint.manifest.get("examples", len(selection.training))),
            created_at=clock(),
            metrics={
                "labels": selection.labels,
                "gold": sorted(e.request_id for e in selection.training if e.source == "gold" and e.request_id),
                "held_out": {"n": screening.n, "candidate": screening.candidate, "champion": screening.champion},
                "reason": screening.reason,
                "examination": dict(examination.measured),
                "licence": dict(selection.licence) | dict(checkpoint.manifest.get("licence", {})),
                "confidences": examination.confidences,
                "calibration": checkpoint.manifest.get("calibration"),
            },
        )
    )
    name = "REJECTED"
    if screening.promote:
        name = "CANARY_STARTED" if screening.canary else "PROMOTED"
        state: PromotionState = "canary" if screening.canary else "champion"
        why = screening.reason
        await store.promote(task_name, version.id, clock(), state=state, by=lineage.BY_ITSELF, why=why, lease=lease)
    await store.add_event(
        Event(
            name=name,
            task=task_name,
            at=clock(),
            message=f"{version.id}, trained on {version.trained_on} examples: {screening.reason}",
            evidence={"version": version.id, "held_out": version.metrics["held_out"]},
        )
    )
    return next(v for v in await store.versions(task_name) if v.id == version.id)


@asynccontextmanager
async def _teaching(store: Store, task_name: str, owner: str, clock: Callable[[], Seconds]) -> AsyncIterator[Lease]:
    """Hold the right to teach a task. Losing it (a suspended machine, say) ends the cycle with a TrainingError."""
    name = f"learn/{task_name}"
    while (lease := await store.acquire(name, owner, clock(), _LEASE)) is None:  # noqa: ASYNC110 - nobody tells us
        await asyncio.sleep(_LOOK)
    cycle = asyncio.current_task()

    async def keep(held: Lease | None) -> None:
        while held is not None:
            await asyncio.sleep(_LEASE / 4)
            try:
                held = await store.renew(held, clock(), _LEASE)
            except StoreError as error:
                held = held if error.retryable else None
        if cycle is not None:
            cycle.cancel()

    keeper = asyncio.create_task(keep(lease))
    try:
        yield lease
    except asyncio.CancelledError as error:
        if keeper.done() and cycle is not None and cycle.uncancel() == 0:
            raise TrainingError(f"another process took over teaching {task_name!r}") from error
        raise
    finally:
        keeper.cancel()
        await store.release(lease)


async def _confidences(task: TaskConfig, candidate: Model, recent: list[Record], checkpoint: Checkpoint) -> list[float]:
    """The candidate's confidence on recent inputs, sorted: what it would have said had it not learned from them.

    A model is surer of what it was trained on, so the trainer's out-of-fold confidence is taken for those rows where there
    is one; thresholds fixed on the inflated values would defer too much.
    """
    out_of_fold: dict[str, Json] = checkpoint.manifest.get("out_of_fold", {})
    unseen = [record.input for record in recent if record.request_id not in out_of_fold]
    found = [float(out_of_fold[record.request_id]) for record in recent if record.request_id in out_of_fold]
    found += [answer.confidence or 0.0 for answer in await _answers(task, candidate, unseen)]
    return sorted(round(value, 6) for value in found)


async def _answers(task: TaskConfig, model: Model, inputs: list[Json]) -> list[Answer]:
    if isinstance(model, ManyModel):
        return await asyncio.to_thread(model.answer_many, task.task, inputs)
    return [await model.answer(task.task, input) for input in inputs]
