"""Training on this machine: a job in a folder, done by a child process, and safe to be done again.

A job is `INTO/.training/NAME/`, and NAME the digest of all that decides what is learned: task, base, settings, seed and
the very bytes of the dataset.

    row.json          who leads the job (the token of a lease), how far it has come, and the proof of its licence
    settings.json     what the child is to do: `base`, `seed`, and the trainer's settings
    train.jsonl       a line an example: {"prompt": [messages], "completion": [message]}, just as it will be asked; where
                      preferences are learned, "rejected": [message] beside it, if one is known
    held.jsonl        the same, of examples that are kept back: to stop in time, and to calibrate
    rows.json         the kept-back examples and some others, as they were given
    log               what the child writes, at most 4 MiB
    progress.jsonl    what the child tells: {"step", "steps", "loss", "eta"}, eta in seconds; "held_loss" where it looked,
                      "margin" where preferences are learned: by how much more it has come to prefer the right answers
    checkpoints/      the child's own, to go on from; base/ likewise, what it made of the base to read it faster
    result/           what it made: adapter.gguf and more, or model/ with model.gguf and more; and outcome.json. It
                      appears at once and whole, by renaming

The child knows paths and language of our environment and no key, is told to stay offline, and ends when we do, however we
end. The next one goes on from its last whole checkpoint. A worker with an older token than the row's publishes nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from apprentice import dialogues, fields, plugins, process, weights
from apprentice.calibration import SAME, Table, auroc, calibrate, ece
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.trainers import JOBS, Progress, keep, progress, replace_file
from apprentice.types import Answer, Checkpoint, Example, Json, Seconds, Task, Value

_NO_PROOF: Mapping[str, Json] = MappingProxyType({})
_NO_ENV: Mapping[str, str] = MappingProxyType({})
_WHOLE = "model"  # in a result and in a checkpoint: the folder of a whole model
_LOOK: Seconds = 0.2  # between two looks at the child, at the row, and at whether we are to stop
_HELD = 0.1  # of the examples
_ASKED = 200  # kept-back examples that are asked, at most
_PROBES = 4  # that a checkpoint has, at most
_SOUGHT = 32  # examples among which those are sought that base and adapter answer differently
_DEVICES = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "HF_HOME")
_OFFLINE = MappingProxyType({
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "TOKENIZERS_PARALLELISM": "false",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one trainer does. All of `settings` is in the job's name: nothing that only decides where or how fast it runs.

    `command`: the child, given the job's folder; it leaves `result/` there. `kind`: of what it makes. `base`: what is
    trained, a folder, a file, or a name that the child understands. `served`: the same as a GGUF file, as llama.cpp
    serves it. `env`: what the child may know beside paths and language. `counted`, `rule`: of the confidence. `held`:
    share of the examples that is kept back.
    """

    name: str
    base: str
    served: Path
    settings: Mapping[str, Json]
    command: Callable[[Path], Sequence[str]]
    env: Mapping[str, str] = _NO_ENV
    counted: Sequence[str] | None = None
    rule: Literal["margin", "logprob"] = "margin"
    held: float = _HELD
    serving: Mapping[str, Json] = field(default_factory=dict)  # of the model plugin llama_cpp
    ready: Callable[[], None] | None = None  # raises where this machine cannot do it; asked before a job is begun
    resumes: bool = True  # from its last checkpoint; otherwise it starts again
    kind: Literal["adapter", "model"] = "adapter"
    least_pairs: int | None = None  # examples with a rejected answer that it needs; None: it learns by none
    latency_ms: int | None = None  # what an answer is to take at most, at p95; None: nothing is said of it

    @property
    def made(self) -> str:
        """The file below `result` that llama.cpp serves."""
        return "adapter.gguf" if self.kind == "adapter" else f"{_WHOLE}/model.gguf"


class Row(Value):
    """A job, and how far it has come."""

    name: str
    key: str  # of task, base, settings and seed: the same work on other examples has the same
    task: str
    data: str  # SHA-256 of both parts of the dataset
    examples: int
    licence: dict[str, Json] = Field(default_factory=dict)
    token: int = 0  # of the lease of who leads it
    checkpoint: str | None = None  # once it is kept


class Trained:
    """A trainer that trains in a child process. Beside a trainer's methods: `lead`, `stop`, `progress`."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises ConfigError where the base is missing."""
        if not recipe.served.is_file():
            raise ConfigError(
                f"trainer {recipe.name!r}: there is no file {str(recipe.served)!r}",
                hint="`gguf` is the base as llama.cpp serves it",
            )
        self._recipe = recipe
        self._token = 0
        self._stopped = threading.Event()

    def check(self, task: Task) -> None:
        """Whatever JSON can say, a language model can be taught."""

    def lead(self, token: int) -> None:
        """What is trained from now on is under the lease of that token: holders of older ones publish nothing."""
        self._token = token

    def stop(self) -> None:
        """Let a `train` in another thread end with TrainingError soon, and its child too. The next one goes on."""
        self._stopped.set()

    def progress(self, into: Path) -> list[Progress]:
        """How far the open jobs of this folder have come."""
        return progress(into)

    def train(
        self, task: Task, examples: Sequence[Example], *, into: Path, seed: int, licence: Mapping[str, Json] = _NO_PROOF
    ) -> Checkpoint:
        """The job's checkpoint, which is waited for. An open job with the same settings is finished instead of a new one
        if each of its lines is still among these examples: `manifest["licence"]` is then the one that it was begun with.

        Raises TrainingError without examples or with too few pairs, for a job that failed or whose lead was lost, and for
        weights that answer all as their base does; ConfigError, MissingExtra, UnsafeFile for a base that cannot be used.
        """
        if self._recipe.ready is not None:
            self._recipe.ready()
        task = task.model_copy(update={"output_schema": fields.plain(task.output_schema)})
        job = self._begun(task, examples, into, seed, licence)
        if job.row.checkpoint is not None:
            job.forget()
            return _checkpoint(into, job.row.checkpoint)
        if Path(self._recipe.base).exists():
            weights.check(Path(self._recipe.base))  # before a library reads it
        return _alone(self._made(job, task, into))

    async def _made(self, job: _Job, task: Task, into: Path) -> Checkpoint:
        await self._run(job)
        files = await _examined(self._recipe, job, task)
        parts = {_WHOLE: job.folder / "result" / _WHOLE} if self._recipe.kind == "model" else {}
        with job.turn():  # nobody takes the lead while it is published
            job.check()
            name = f"sha256-{sha256(files['manifest.json']).hexdigest()}"
            keep(into, name, files, parts)
            job.write(job.row.model_copy(update={"checkpoint": name}))
        job.forget()
        return _checkpoint(into, name)

    async def _run(self, job: _Job) -> None:
        """Wait for the child, until it is done, or we are to stop, or another worker leads."""
        result = job.folder / "result"
        if (result / self._recipe.made).is_file():
            return
        if (
            result.is_dir()
        ):  # killed when a whole model was published; the child makes it again from its last checkpoint
            shutil.rmtree(result)
        # -I: the folder of that file has modules named as other packages are.
        turn = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_turn.py")), str(job.folder)]
        argv = [*turn, str(job.row.token), *self._recipe.command(job.folder)]
        env = environment(self._recipe.env)
        try:
            child = await process.start(argv, log=job.folder / "log", env=env, name=self._recipe.name)
        except process.Died as error:
            raise TrainingError(f"job {job.row.name}: {error}") from error
        try:
            while child.alive:
                job.check()
                if self._stopped.is_set():
                    raise TrainingError(
                        f"job {job.row.name} is waited for no longer", hint="the next cycle goes on with it"
                    )
                await asyncio.sleep(_LOOK)
        finally:
            await child.stop()
        job.check()
        if not (result / self._recipe.made).is_file():
            hint = (
                "the next cycle goes on from its last checkpoint"
                if self._recipe.resumes
                else "the next cycle starts again"
            )
            raise TrainingError(f"job {job.row.name}: {await child.wait()}", hint=hint)

    def _begun(
        self, task: Task, examples: Sequence[Example], into: Path, seed: int, licence: Mapping[str, Json]
    ) -> _Job:
        """The job to go on with: an open one, the one of just these examples, or a new one."""
        if not examples:
            raise TrainingError(f"task {task.name!r}: there are no examples to learn from")
        recipe = self._recipe
        taught = dialogues.weighed(examples)
        held = _kept_back(taught, recipe.held, seed)
        kept_back = {example_key(example.input) for example in held}
        shown = [example for example in taught if example_key(example.input) not in kept_back]
        if recipe.least_pairs is not None:
            licence = {**licence, "rejected": _own_answers(task, shown, recipe.least_pairs)}
        paired = recipe.least_pairs is not None
        data = dialogues.completion(task, shown, rejected=paired), dialogues.completion(task, held, rejected=paired)
        settings = {**recipe.settings, "base": recipe.base, "seed": seed}
        about = [recipe.name, task.model_dump(mode="json"), _identity(recipe.base), settings]
        about += [weights.digest(recipe.served), list(recipe.counted or ()), recipe.rule, dict(recipe.serving)]
        key = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        digest = sha256("\0".join(data).encode()).hexdigest()
        name = sha256(f"{key}{digest}".encode()).hexdigest()[:24]
        row = Row(name=name, key=key, task=task.name, data=digest, examples=len(examples), licence=dict(licence))
        for folder in sorted((into / JOBS).glob("*/")):
            known = _row(folder)
            if known is None or known.key != key or known.checkpoint is not None or known.name == name:
                continue
            if _lines(folder) <= set("".join(data).splitlines()):
                return _Job(folder, known).led(self._token)
            # A row was corrected, withdrawn, or may no longer train: what was learned from it is not gone on with.
            _Job(folder, known).led(self._token).drop()
        folder = into / JOBS / name
        found = _row(folder)
        if found is not None and found.checkpoint is not None and (into / found.checkpoint / "manifest.json").is_file():
            return _Job(folder, found)
        if found is not None and found.checkpoint is None:
            return _Job(folder, found).led(self._token)
        rows = [example.model_dump(mode="json") for example in [*held, *shown[:_SOUGHT]]]
        files = {
            "settings.json": json.dumps(settings, indent=1, sort_keys=True),
            "train.jsonl": data[0],
            "held.jsonl": data[1],
            "rows.json": dialogues.as_json({"held": len(held), "rows": rows}),
        }
        for file, content in files.items():
            replace_file(folder / file, content.encode())
        return _Job(folder, row).led(self._token)


class _Job:
    """A folder, and its row as we know it."""

    def __init__(self, folder: Path, row: Row) -> None:
        self.folder = folder
        self.row = row

    def led(self, token: int) -> _Job:
        """The job, led under this token from now on. Raises TrainingError when somebody with a newer one leads it."""
        with self.turn():
            found = _row(self.folder)
            if found is not None and found.token > token:
                raise _lost(found)
            self.write(self.row.model_copy(update={"token": token}))
        return self

    def check(self) -> None:
        """Nothing, while we lead it. Raises TrainingError otherwise."""
        found = _row(self.folder)
        if found is None or found.token != self.row.token:
            raise _lost(self.row)

    def write(self, row: Row) -> None:
        replace_file(self.folder / "row.json", row.model_dump_json(indent=1).encode())
        self.row = row

    def forget(self) -> None:
        """What people wrote does not lie about longer than it is needed; log, progress and settings stay."""
        for name in ("train.jsonl", "held.jsonl", "rows.json"):
            (self.folder / name).unlink(missing_ok=True)
        for name in ("base", "checkpoints", "result"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def drop(self) -> None:
        shutil.rmtree(self.folder)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Writers of the row take turns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("ab") as lock:  # closing it gives the turn back, also when we are killed
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _lost(row: Row) -> TrainingError:
    return TrainingError(f"another worker has taken over the job {row.name}")


def _row(folder: Path) -> Row | None:
    try:
        return Row.model_validate_json((folder / "row.json").read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise TrainingError(f"{folder / 'row.json'} cannot be read", hint="delete the folder of the job") from error


def _lines(folder: Path) -> set[str]:
    """The dataset of a job."""
    try:
        found = [(folder / name).read_text("utf-8").splitlines() for name in ("train.jsonl", "held.jsonl")]
    except OSError as error:
        raise TrainingError(f"the dataset of {folder} is gone", hint="delete the folder of the job") from error
    return {line for lines in found for line in lines}


def _checkpoint(into: Path, name: str) -> Checkpoint:
    return Checkpoint(id=name, path=into / name, manifest=json.loads((into / name / "manifest.json").read_bytes()))


def example_key(input: Json) -> str:
    """The input as text, the same for equal inputs."""
    return json.dumps(input, sort_keys=True)


def _kept_back(taught: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Each once, by the hash of its input: which ones stays the same as the examples grow in number."""
    found = {}
    for example in taught:
        key = example_key(example.input)
        place = int.from_bytes(sha256(f"{seed}:{key}".encode("utf-8", "replace")).digest()[:8]) / 2**64
        if place < share:
            found[key] = example
    return list(found.values()) if len(found) < len({example_key(example.input) for example in taught}) else []


def _own_answers(task: Task, shown: Sequence[Example], needed: int) -> dict[str, Json]:
    """By what right rejected answers train, and how many there are. Raises TrainingError where they are too few."""
    found = len({example_key(example.input) for example in shown if dialogues.is_pair(example)})
    if found < needed:
        raise TrainingError(
            f"task {task.name!r}: method: dpo needs {needed} examples whose local answer was corrected, and there are {found}",
            hint="method: sft until there are more, or a smaller `least_pairs`",
        )
    return {
        "rows": found,
        "basis": "answers of the task's own local model, rejected by a person or beside the remote's",
    }


def _identity(base: str) -> str:
    """What tells this base from another one of the same name, as far as it lies here."""
    return weights.digest(Path(base)) if Path(base).exists() else base


# --- the child's surroundings -------------------------------------------------------------------------------------------


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """All that a child may know: paths, language, devices, that it is to stay offline; and `more`. Never a key."""
    return process.environment(
        {**{name: os.environ[name] for name in _DEVICES if name in os.environ}, **_OFFLINE, **more}
    )


def passed(names: Sequence[str], trainer: str) -> dict[str, str]:
    """The variables of our environment that an operator wants a child to have (for a tracker, say).

    Raises ConfigError for one that is not set.
    """
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f"trainer {trainer!r}: the environment variable {missing[0]} is not set")
    return {name: os.environ[name] for name in names}


def interpreter(
    python: str | None, modules: Sequence[str], *, extra: str, trainer: str, apart: Mapping[str, str] = _NO_ENV
) -> str:
    """The Python that the child runs in: this one, or that of another environment; it has these modules.

    `apart`: modules that no extra has, each with the setting that needs it. Raises MissingExtra for the first of the
    others that it lacks, ConfigError for one of these, or where there is no such program.
    """
    modules = [*modules, *apart]
    if python is None:
        lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    else:
        code = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
        found = shutil.which(python)
        if found is None:
            raise ConfigError(f"trainer {trainer!r}: there is no program {python!r}", hint="the setting `python`")
        python = str(Path(found).absolute())
        told = subprocess.run(  # noqa: S603 - the operator's own interpreter
            [python, "-I", "-c", code, *modules], env=environment({}), capture_output=True, text=True, check=False
        )
        if told.returncode:
            raise ConfigError(f"trainer {trainer!r}: {python} is no Python: {told.stderr[-300:]}")
        lacking = told.stdout.split()
    if lacking and lacking[0] in apart:
        raise ConfigError(
            f"trainer {trainer!r}: {apart[lacking[0]]} needs the package {lacking[0]!r}, not in {python or sys.executable}",
            hint=f"pip install {lacking[0]}",
        )
    if lacking:
        raise MissingExtra(lacking[0], extra)
    return python or sys.executable


def _alone[T](work: Coroutine[Any, Any, T]) -> T:
    """What it returns, on an event loop of its own, in a thread of its own: the caller's may have one."""
    with ThreadPoolExecutor(1, thread_name_prefix="apprentice-training") as pool:
        return pool.submit(asyncio.run, work).result()


# --- what it came to ----------------------------------------------------------------------------------------------------


async def _examined(recipe: Recipe, job: _Job, task: Task) -> dict[str, bytes]:
    """The files of the checkpoint, but for those of a whole model, with what a real server answers with them."""
    result = job.folder / "result"
    told = json.loads((job.folder / "rows.json").read_bytes())
    rows = [Example.model_validate(row) for row in told["rows"]]
    held, sought = rows[: told["held"]][:_ASKED], rows[told["held"] :]
    asked = [*held, *sought[: max(0, _SOUGHT - len(held))]]
    made = result / recipe.made
    weights.check(made, expected=weights.Expected(kind=recipe.kind))
    inputs = [row.input for row in asked]
    served = await _answers(recipe, made, task, inputs)
    bare = await _answers(recipe, None, task, inputs[:_SOUGHT])
    probes = _probes(asked, served, bare, job.row.name)
    pairs = [(answer.confidence or 0.0, float(_same(answer, row))) for answer, row in zip(served, held, strict=False)]
    table = platt(pairs)
    outcome = result / "outcome.json"
    paths = [path for path in sorted(result.rglob("*")) if path.is_file() and path != outcome]
    manifest: dict[str, Json] = {
        "kind": recipe.kind,
        "file": recipe.made,
        "base": {"file": str(recipe.served), "sha256": weights.digest(recipe.served).removeprefix("sha256-")},
        "task": task.model_dump(mode="json"),
        "probe": probes,
        "confidence": {"rule": recipe.rule, "fields": list(recipe.counted) if recipe.counted else None},
        "calibration": [list(row) for row in table],
        "out_of_fold": {
            row.request_id: round(calibrate(table, raw), 6)
            for row, (raw, _) in zip(held, pairs, strict=True)
            if row.request_id is not None
        },
        "trainer": {"name": recipe.name, **json.loads((job.folder / "settings.json").read_bytes())},
        "outcome": json.loads(outcome.read_bytes()),
        "examples": job.row.examples,
        "data": job.row.data,
        "licence": job.row.licence,
        "job": job.row.name,
        "metrics": _metrics(held, served, bare, pairs, table),
        "files": {path.relative_to(result).as_posix(): _hash(path) for path in paths},
    }
    if recipe.latency_ms is not None:
        manifest["target"] = {"p95_latency_ms": recipe.latency_ms}
    # A whole model is moved to where it is kept, an adapter is small.
    files = {path.name: path.read_bytes() for path in paths} if recipe.kind == "adapter" else {}
    return files | {"manifest.json": json.dumps(manifest, indent=1, sort_keys=True).encode()}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _probes(
    asked: Sequence[Example], served: Sequence[Answer], bare: Sequence[Answer], job: str
) -> list[dict[str, Json]]:
    """What is recorded to recognise the adapter by: first what its base answers otherwise. Raises TrainingError."""
    found = [
        {"input": row.input, "output": answer.output, "base": other.output}
        for row, answer, other in zip(asked, served, bare, strict=False)
        if answer.output is not None
    ]
    found = sorted(found, key=lambda probe: probe["output"] == probe["base"])[:_PROBES]
    if not found or found[0]["output"] == found[0]["base"]:
        raise TrainingError(
            f"job {job}: what was trained answers each of {len(bare)} questions as its base does, or not at all",
            hint="more examples, more epochs, or a larger learning rate",
        )
    return found


def _metrics(
    held: Sequence[Example],
    served: Sequence[Answer],
    bare: Sequence[Answer],
    pairs: Sequence[tuple[float, float]],
    table: Table,
) -> dict[str, Json]:
    """Of the examples that were kept back; `base_agreement`: of the first of them, without the adapter."""
    if not pairs:
        return {}
    even = [1.0] * len(pairs)
    base_right = [_same(answer, row) for answer, row in zip(bare, held, strict=False)]
    ranking = auroc(pairs, even)
    error = ece([(calibrate(table, raw), right) for raw, right in pairs], even)
    return {
        "agreement": sum(right for _, right in pairs) / len(pairs),
        "base_agreement": sum(base_right) / len(base_right),
        "json_validity": sum(answer.output is not None for answer in served[: len(pairs)]) / len(pairs),
        "held": len(pairs),
        "calibration": {"rule": "platt", "ece": error, "auroc": ranking.auroc if ranking else None},
    }


async def _answers(recipe: Recipe, made: Path | None, task: Task, inputs: Sequence[Json]) -> list[Answer]:
    """What llama.cpp answers, one question after the other: the same weights then give the same confidences.

    `made`: an adapter on the base, or a whole model in its place; without it the base is asked.
    """
    settings: dict[str, Json] = {
        "model": str(made if made is not None and recipe.kind == "model" else recipe.served),
        "adapter": str(made) if made is not None and recipe.kind == "adapter" else None,
        "fields": list(recipe.counted) if recipe.counted else None,
    }
    settings |= {"confidence": recipe.rule, "parallel": 1, **recipe.serving}
    model = plugins.build("models", "llama_cpp", **settings)
    try:
        await model.ready(patient=False)
        return [await model.answer(task, given) for given in inputs]
    finally:
        await model.close()


def _same(answer: Answer, row: Example) -> bool:
    return answer.output is not None and example_key(answer.output) == example_key(row.target)


_KNOTS = (0.0, 0.001, 0.003, 0.01, 0.03, *(step / 16 for step in range(1, 16)), 0.97, 0.99, 0.997, 0.999, 1.0)
_SUREST = 7.0  # log-odds: nothing is more certain than 0.999
_TILT = 0.01  # the table rises by at least this much over its length: no two confidences become one


def platt(pairs: Sequence[tuple[float, float]]) -> Table:
    """A table from raw confidences and whether they were right (1 or 0); the identity without any.

    Logistic regression on the log-odds, drawn to the identity as by one pair, so that a few pairs bend it little. Platt,
    Probabilistic outputs for support vector machines, 1999, whose targets keep it from certainty.
    """
    if not pairs:
        return SAME
    good = sum(right for _, right in pairs)
    high, low = (good + 1) / (good + 2), 1 / (len(pairs) - good + 2)
    points = [(_log_odds(raw), high if right else low) for raw, right in pairs]
    slope, offset = 1.0, 0.0
    for _ in range(50):  # Newton's steps; the penalty makes the curvature positive
        g1, g0, h11, h10, h00 = slope - 1.0, offset, 1.0, 0.0, 1.0
        for x, wanted in points:
            chance = 1 / (1 + math.exp(-max(-30.0, min(30.0, slope * x + offset))))
            g1, g0 = g1 + (chance - wanted) * x, g0 + chance - wanted
            bend = chance * (1 - chance)
            h11, h10, h00 = h11 + bend * x * x, h10 + bend * x, h00 + bend
        scale = h11 * h00 - h10 * h10
        step1, step0 = (h00 * g1 - h10 * g0) / scale, (h11 * g0 - h10 * g1) / scale
        shrink = min(1.0, 2.0 / max(abs(step1), abs(step0), 1e-12))
        slope, offset = slope - shrink * step1, offset - shrink * step0
    slope = max(slope, 0.0)
    chances = [1 / (1 + math.exp(-max(-_SUREST, min(_SUREST, slope * _log_odds(knot) + offset)))) for knot in _KNOTS]
    return [
        [round(knot, 6), round((1 - _TILT) * chance + _TILT * knot, 6)]
        for knot, chance in zip(_KNOTS, chances, strict=True)
    ]


def _log_odds(chance: float) -> float:
    chance = min(max(chance, 1e-6), 1 - 1e-6)
    return math.log(chance) - math.log1p(-chance)
