"""One teaching cycle: select and permit (selection.py) -> train -> examine -> promote or drop.

It shares only the store with the engine. A lease makes sure that a task is taught by one process at a time; its token is
checked again when the version is promoted, so that a worker that was thought dead cannot publish over its successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import NamedTuple
from zoneinfo import ZoneInfo

from apprentice import balance, decide, feedback, fields, jobs, licence, lineage, nearness, plugins, promotion
from apprentice.config import Config, Local, TaskConfig
from apprentice.errors import ConfigError, ModelError, StoreError, TrainingError
from apprentice.evaluators import field
from apprentice.purse import Purse
from apprentice.request import validated
from apprentice.selection import Selection, choose, gold, key_of, label, lawful, permit, ruling, select, teachers
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

__all__ = [
    "Examination",
    "Selection",
    "due",
    "examine",
    "gold",
    "lawful",
    "learn",
    "permit",
    "promote",
    "select",
    "teachers",
    "train",
]

_LEASE: Seconds = 20.0  # renewed every fourth of it; a worker that dies is replaced after this long
_LOOK: Seconds = 0.5  # between two looks whether somebody else's lease has ended
_SLICES = 20  # values of one field that are looked at, the commonest ones
_TIMED = 30  # held-out rows that are answered one by one, to see how long that takes
_KNOWN = 2_000  # rows in training, the newest, in which the most similar input is looked for
_ASKED = 200  # held-out rows, the newest, for which it is
_RECENT = 300  # inputs on which the candidate's confidence is looked at, to fix its deferral thresholds


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
        if not force and not await due(config, task, store, now=clock()):
            return None  # whoever taught before us has seen the same answers
        await label(config, task, store, clock, owner, seed)
        corrected = await gold(store, task_name)
        selection = await choose(config, task, store, corrected)
        if not selection.training:
            raise TrainingError(f"task {task_name!r} has no recorded answer to learn from yet")
        selection = await permit(config, task, selection, store, clock)
        base = await going_on(task, selection, corrected, store)
        checkpoint = await train(config, task, selection, seed, clock, store, lease, base=base)
        examination = await examine(config, task, selection, checkpoint, store)
        return await promote(task_name, selection, checkpoint, examination, store, lease, clock)


async def due(config: Config, task: TaskConfig, store: Store, *, now: Seconds = 0.0) -> bool:
    """Whether enough was recorded since the last cycle for another one, or anything and the schedule says that it is time.

    `now`: for the schedule; without it none is due by that.
    """
    labels = await feedback.known(store, task.name)
    versions = await store.versions(task.name)
    # A candidate is one whose cycle was killed before it was promoted: nothing came of it, so another cycle is due.
    ended = [version for version in versions if version.state != "candidate"]
    before = max((version.metrics.get("labels", 0) for version in ended), default=0)
    local = task.local or config.local
    urgent = decide.is_urgent(versions, await store.events(task.name, names=sorted(decide.URGENT)))
    if not urgent and any(version.state == "canary" for version in versions):
        # It is about to say whether what was learned last is any better; unless so much is known that nobody asks it.
        champion = next((version for version in versions if version.state == "champion"), None)
        return promotion.outgrown(labels, before, lineage.examples_of(champion))
    first = task.confidence_thresholds.phase1_to_phase2
    last = max((version.created_at for version in versions), default=None)
    if labels > before and decide.scheduled(local.schedule, last, now, ZoneInfo(config.budget.timezone)):
        return True
    return decide.needs_training(labels - before, before, local.fine_tune_batch_size, first, urgent=urgent)


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
    urgent = await _is_urgent(task, versions, store)
    said = any(word.at > champion.created_at for _, word in corrected)
    return Path(champion.path) if urgent or said else None


async def _is_urgent(task: TaskConfig, versions: Sequence[Version], store: Store) -> bool:
    return decide.is_urgent(versions, await store.events(task.name, names=sorted(decide.URGENT)))


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
    again = licence.sift(selection.chosen, ruling(config, task, licence.day(clock())))
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
    rows = selection.training
    with jobs.shown(into, trainer=local.fine_tune_backend, since=clock(), lease=lease):
        if base is not None and isinstance(trainer, Updater):
            with contextlib.suppress(TrainingError):  # only teaching in full will do; it says again what else is wrong
                return await asyncio.to_thread(
                    trainer.update, task.learnable_task, rows, base=base, into=into, seed=seed, licence=proof
                )
        return await jobs.train(
            task,
            trainer,
            rows,
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
    """What candidate and champion do on the held-out rows, and the candidate's confidence on recent inputs.

    The rolling hold-out decides, its gold rows before all others. On the frozen one the candidate may not be clearly worse
    either, unless something has happened (decide.URGENT): then the oldest rows tell of a time that is over.
    """
    name, settings = task.evaluator_settings
    evaluate = plugins.build("evaluators", name, **settings)
    local = task.local or config.local
    examples, rolling, frozen = examined(selection, local.holdout_rolling)
    rows = held_out_rows(task, [examples[row] for row in rolling])
    versions = await store.versions(task.name)
    champion = next((version for version in versions if version.state == "champion"), None)
    old: promotion.Measured | None = None
    unusable = ""
    if champion is not None:
        try:
            old, _ = await _measure(task, local, champion.path, examples, evaluate)
        except (ConfigError, ModelError) as error:  # its files are gone, or the task's schema was changed since
            unusable = f"{champion.id} can no longer answer: {error}"
    recent: list[Record | Example] = [r for _, r in await store.records(task.name, limit=_RECENT, newest=True)]
    if len(recent) < _RECENT:  # a young task that began with another tool's log
        recent += (await store.examples(task.name))[len(recent) - _RECENT :]
    new, confidences = await _measure(
        task, local, checkpoint.path, examples, evaluate, recent=recent, checkpoint=checkpoint
    )
    little_at_stake, longest = True, None
    if champion is not None and old is not None:
        twice = len(selection.training) + len(selection.held_out) >= promotion.TWICE * lineage.examples_of(champion)
        little_at_stake = twice or (await lineage.standing(config, task, store)).phase != "steady"
        if frozen != rolling and not await _is_urgent(task, versions, store):
            longest = promotion.on(new, frozen).scores, promotion.on(old, frozen).scores
    candidate, before = promotion.on(new, rolling), None if old is None else promotion.on(old, rolling)
    gates = [Gate.parse(gate) for gate in task.gates]
    screening = promotion.judge(candidate, before, rows, gates=gates, holdout_decides=little_at_stake, frozen=longest)
    if unusable and screening.promote:
        screening = screening._replace(reason=unusable)
    measured = promotion.measures(candidate, rows)
    measured["champion"] = None if before is None else promotion.measures(before, rows)
    measured["frozen"] = _agreements(new, old, frozen)
    written = [balance.writing(examples[row].input) for row in rolling]
    if len(set(written)) > 1:
        same = {name: [row for row, said in zip(rolling, written, strict=True) if said == name] for name in written}
        measured["writing"] = {name: _agreements(new, old, which) for name, which in same.items()}
    measured |= await _baselines(task, local, selection, [examples[row] for row in rolling], evaluate, versions)
    if target := checkpoint.manifest.get("target"):  # said, and not held to: gates are for that
        measured["target"] = target
        said = _aimed(target["p95_latency_ms"], measured["p95_latency_ms"])
        screening = screening._replace(reason=f"{screening.reason}; {said}")
    return Examination(screening, confidences, measured)


def _aimed(target: float, found: float | None) -> str:
    """What a size aims at, in milliseconds, beside what was measured here."""
    measured = "was not measured" if found is None else f"is {found:.3g} ms"
    missed = found is not None and found > target
    return f"p95 latency {measured}, its size aims at {target:g} ms{' (missed)' if missed else ''}"


def _agreements(
    new: promotion.Measured, old: promotion.Measured | None, which: Sequence[int]
) -> dict[str, Json] | None:
    """Of candidate and champion on these rows; None without rows."""
    if not which:
        return None
    before = None if old is None else fmean(old.scores[row] for row in which)
    return {"n": len(which), "agreement": fmean(new.scores[row] for row in which), "champion": before}


def examined(selection: Selection, newest: int) -> tuple[list[Example], list[int], list[int]]:
    """The held-out rows that are examined; which of them are the rolling hold-out, the newest, and which the frozen one."""
    kept = set(selection.frozen)
    is_frozen = [key_of(example) in kept for example in selection.held_out]
    start = len(selection.held_out) - newest
    which = [row for row, frozen in enumerate(is_frozen) if frozen or row >= start]
    places = range(len(which))
    rolling = [place for place in places if which[place] >= start]
    return [selection.held_out[row] for row in which], rolling, [place for place in places if is_frozen[which[place]]]


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
    path: str | Path | None,
    examples: list[Example],
    evaluate: Evaluator,
    *,
    recent: list[Record | Example] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[promotion.Measured, list[float]]:
    """What the version at this path does; None: the model that has learned nothing.

    With `checkpoint`, its confidences on the recent inputs as well.
    """
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
        size=0 if path is None else await asyncio.to_thread(_size, Path(path)),
    )
    return found, confidences


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


async def _baselines(
    task: TaskConfig,
    local: Local,
    selection: Selection,
    examples: list[Example],
    evaluate: Evaluator,
    versions: Sequence[Version],
) -> dict[str, Json]:
    """What a version has to beat to have learned anything: the commonest answer, that to the most similar input, and what
    the model says that has learned nothing, where there is one."""
    training, asked = selection.training[-_KNOWN:], examples[-_ASKED:]
    found: dict[str, Json] = {"majority": None, "nearest": None, "untrained": None}
    if not training or not examples:
        return found
    counts = Counter(canonical(example.target) for example in selection.training)
    always = json.loads(counts.most_common(1)[0][0])
    found["majority"] = fmean([(await evaluate(always, example.target)).value for example in examples])
    if fields.closed(task.task)[0]:  # free text is not answered by what was said to somebody else
        known, inputs = ([example.input for example in some] for some in (training, asked))
        likest = await asyncio.to_thread(nearness.nearest, known, inputs)
        scores = [
            0.0 if row is None else (await evaluate(training[row].target, example.target)).value
            for row, example in zip(likest, asked, strict=True)
        ]
        found["nearest"] = {"n": len(scores), "agreement": fmean(scores)}
    found["untrained"] = await _untrained(task, local, selection.held_out[:_TIMED], evaluate, versions)
    return found


async def _untrained(
    task: TaskConfig, local: Local, examples: list[Example], evaluate: Evaluator, versions: Sequence[Version]
) -> dict[str, Json] | None:
    """What the base model does on the oldest held-out rows; None where the backend has none. Measured once for the same."""
    if "model" not in inspect.signature(plugins.find("models", local.backend).build).parameters:
        return None
    asked = [[example.input, example.target] for example in examples]
    about = [local.backend, local.base_model, local.settings, task.task.model_dump(mode="json"), asked]
    of = sha256(canonical(about).encode()).hexdigest()[:16]
    for version in reversed(versions):
        before: dict[str, Json] = (version.metrics.get("examination") or {}).get("untrained") or {}
        if before.get("of") == of and "problem" not in before:
            return before
    try:
        measured, _ = await _measure(task, local, None, examples, evaluate)
    except (ConfigError, ModelError) as error:
        return {"of": of, "n": 0, "agreement": None, "problem": str(error)}
    valid = fmean(text is not None for text in measured.said)
    return {"of": of, "n": len(examples), "agreement": fmean(measured.scores), "json_validity": valid}


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
                "frozen": list(selection.frozen),
                "set": dict(selection.about),
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


async def _confidences(
    task: TaskConfig, candidate: Model, recent: Sequence[Record | Example], checkpoint: Checkpoint
) -> list[float]:
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
