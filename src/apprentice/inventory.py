"""The local models: what there is and where, what it takes to load one, whether it is the one that was taught, how fast.

Values only, no rendering. Listing reads files and asks servers what they have; `load`, `probe` and `bench` build the
model as the engine does. What a server of somebody else's had loaded before stays loaded, what it had not is unloaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from apprentice import doctor, hub, plugins, process, shelf, weights, wire
from apprentice.config import Config, Local, TaskConfig
from apprentice.errors import ConfigError, InvalidAnswer, ModelError, ModelUnavailable, NoLocalModel, UnsafeFile
from apprentice.types import Answer, Json, Model, Seconds, Store, Value, Version

_ANSWER: Seconds = 2.0  # a server that is there says sooner what it has
_START: Seconds = 1800.0  # for loading a model
_RETURN: Seconds = 60.0  # for coming back after a failure
_BASES = "base"  # the folder in `model_dir` for what was pulled


class Base(Value):
    """What is to be fine-tuned, and for which tasks. `digest` and `size`: of its file, where this machine has one."""

    backend: str
    model: str | None
    tasks: tuple[str, ...]
    state: Literal["here", "missing", "built in", "on the server"]
    path: str | None = None
    size: int | None = None
    digest: str | None = None


class Student(Value):
    """A version of a task. `files`: "gone" where its checkpoint is not there any more."""

    task: str
    version: str
    checkpoint: str
    path: str
    state: str
    files: Literal["here", "gone"]
    size: int


class Server(Value):
    """A server that runs anyway. `models`: what it offers; `loaded`: what is in its memory now."""

    backend: str
    url: str
    tasks: tuple[str, ...]
    state: str
    models: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()


class Owned(Value):
    """A server that an Apprentice of this user started and that runs now."""

    pid: int
    program: str
    memory: int


class File(Value):
    """Something in `model_dir/base`: pulled and whole, or the beginning of what is being fetched."""

    path: str
    name: str
    size: int
    state: Literal["kept", "partial", "unknown"]
    source: str = ""


class Inventory(Value):
    """All of them."""

    bases: tuple[Base, ...]
    students: tuple[Student, ...]
    servers: tuple[Server, ...]
    owned: tuple[Owned, ...]
    files: tuple[File, ...]


async def listed(config: Config, store: Store | None) -> Inventory:
    """What there is. Hashes the base models' files, which takes about a second a gigabyte. Raises StoreError."""
    students = []
    for task in config.tasks if store is not None else ():
        students += [_student(version) for version in await store.versions(task.name)]  # type: ignore[union-attr]
    used: dict[tuple[str, str | None], list[str]] = {}
    attached: dict[tuple[str, str], tuple[Local, list[str]]] = {}
    for task in config.tasks:
        local = local_of(config, task)
        used.setdefault((local.backend, base_of(local)), []).append(task.name)
        if (url := address(local)) is not None:
            attached.setdefault((local.backend, url), (local, []))[1].append(task.name)
    bases = [await asyncio.to_thread(_base, backend, model, tuple(tasks)) for (backend, model), tasks in used.items()]
    servers = await asyncio.gather(*(_server(url, local, names) for (_, url), (local, names) in attached.items()))
    owned = await asyncio.to_thread(process.running)
    return Inventory(
        bases=tuple(bases),
        students=tuple(students),
        servers=tuple(servers),
        owned=tuple(Owned(pid=one.pid, program=" ".join(one.argv)[:200], memory=one.memory) for one in owned),
        files=tuple(_files(bases_folder(config))),
    )


def bases_folder(config: Config) -> Path:
    """Where models that were pulled are kept."""
    return config.local.model_dir / _BASES


def local_of(config: Config, task: TaskConfig) -> Local:
    """The task's own section `local`, else the one of all tasks."""
    return task.local or config.local


def base_of(local: Local) -> str | None:
    """The base model, as the backend is told it."""
    found = local.settings.get("model", local.base_model)
    return found if isinstance(found, str) else None


def address(local: Local) -> str | None:
    """Where the backend's server is, if it runs anyway; None for one that we start, or that needs none."""
    parameter = inspect.signature(plugins.find("models", local.backend).build).parameters.get("base_url")
    found = None if parameter is None else local.settings.get("base_url", parameter.default)
    return found if isinstance(found, str) else None


def _student(version: Version) -> Student:
    folder = Path(version.path)
    here = folder.is_dir()
    return Student(
        task=version.task,
        version=version.id,
        checkpoint=version.checkpoint,
        path=version.path,
        state=version.state,
        files="here" if here else "gone",
        size=_size(folder) if here else 0,
    )


def _base(backend: str, model: str | None, tasks: tuple[str, ...]) -> Base:
    path = Path(model) if model is not None else None
    if path is not None and path.exists():
        return Base(
            backend=backend,
            model=model,
            tasks=tasks,
            state="here",
            path=str(path.absolute()),
            size=_size(path),
            digest=_digest(path),
        )
    if backend == "embedded":
        return Base(backend=backend, model=model, tasks=tasks, state="built in")
    looks_like_path = model is not None and (model.endswith((".gguf", ".safetensors")) or model.startswith(("/", ".")))
    return Base(backend=backend, model=model, tasks=tasks, state="missing" if looks_like_path else "on the server")


def _digest(path: Path) -> str | None:
    try:
        return weights.digest(path)
    except UnsafeFile:  # a folder with links or folders in it has no digest
        return None


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _files(folder: Path) -> list[File]:
    pulled = {Path(one.path).name: one for one in hub.kept(folder)}
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix == ".json" and path.name.startswith("sha256-"):
            continue
        if (known := pulled.get(path.name)) is not None:
            found.append(File(path=str(path), name=known.name, size=known.size, state="kept", source=known.source))
        else:
            partial = path.name.startswith((".partial-", ".draft-"))
            found.append(
                File(path=str(path), name=path.name, size=_size(path), state="partial" if partial else "unknown")
            )
    return found


async def _server(url: str, local: Local, tasks: Sequence[str]) -> Server:
    near = local.settings.get("allow_internal") is True or urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    client = wire.client(allow_internal=near)
    key = local.settings.get("api_key")
    headers = {"authorization": f"Bearer {key}"} if isinstance(key, str) and key else {}
    problem = ""

    async def names(path: str, entries: str, name: str) -> tuple[str, ...]:
        nonlocal problem
        request = wire.Request(f"{url.rstrip('/')}{path}", headers, b"", _ANSWER, str(key or ""), method="GET")
        outcome = await wire.send(client, request)
        if outcome.kind != "answered" or outcome.body is None:
            problem = outcome.problem or "it says nothing that can be read"
            return ()
        listed = outcome.body.get(entries)
        found = [entry.get(name) for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        return tuple(one for one in found if isinstance(one, str))

    try:
        if local.backend == "ollama":
            offered, loaded = await names("/api/tags", "models", "name"), await names("/api/ps", "models", "name")
        else:
            offered = loaded = await names("/v1/models", "data", "id")
    finally:
        await client.close()
    return Server(
        backend=local.backend,
        url=url,
        tasks=tuple(tasks),
        state=f"no answer: {problem}" if problem else "up",
        models=offered,
        loaded=loaded,
    )


# --- one model --------------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """A version of a task, or without one its base model."""

    task: TaskConfig
    local: Local
    version: Version | None

    @property
    def name(self) -> str:
        return self.version.id if self.version is not None else "base"


async def choose(config: Config, store: Store | None, task: str, version: str | None = None) -> Chosen:
    """That version of the task, without one the one that serves, "base" the base model.

    Raises UnknownTask; ConfigError for a version that there is not; NoLocalModel where nothing can be loaded yet.
    """
    found = config.task(task)
    local = local_of(config, found)
    versions = await store.versions(task) if store is not None else []
    if version in (None, "base"):
        serving = [one for one in versions if one.state == "champion"] if version is None else []
        if not serving and local.backend == "embedded":
            raise NoLocalModel(f"task {task!r} has no version yet, and `embedded` has no base", hint="teach it first")
        return Chosen(found, local, serving[-1] if serving else None)
    chosen = next((one for one in versions if one.id == version), None)
    if chosen is None:
        known = ", ".join(one.id for one in versions) or "none"
        raise ConfigError(f"task {task!r} has no version {version!r}", hint=f"there are: {known}")
    return Chosen(found, local, chosen)


class Memory(Value):
    """Bytes. None: nobody knows."""

    needs: int | None
    free: int | None


async def memory_of(chosen: Chosen) -> Memory:
    """What loading it would take, about, before anything is loaded. Raises ConfigError for unusable files."""
    model = _built(chosen)
    try:
        ask = getattr(model, "needs", None)
        needs: int | None = await ask() if ask is not None else None
    finally:
        await model.close()
    if needs is None and chosen.local.backend != "embedded" and chosen.local.base_model is not None:
        needs = doctor.needs(chosen.local.base_model)  # by its name
    return Memory(needs=needs, free=process.available_memory())


def _built(chosen: Chosen) -> Model:
    return shelf.load(chosen.local, None if chosen.version is None else chosen.version.path)


async def _ready(model: Model, seconds: Seconds, *, patient: bool) -> None:
    if _on_server(model):
        await model.ready(seconds, patient=patient)  # type: ignore[attr-defined]
    else:
        await shelf.ready(model)


def _on_server(model: Model) -> bool:
    """Whether it is one of ours that asks a server, and says what it brought there."""
    return hasattr(model, "brought")


@contextlib.asynccontextmanager
async def _loaded(chosen: Chosen, *, stays: bool = False) -> AsyncIterator[Model]:
    """The model, ready. In the end what this brought into a server of somebody else's is taken out, unless it `stays`."""
    model = _built(chosen)
    try:
        await _ready(model, _START, patient=False)
        yield model
    finally:
        if _on_server(model) and address(chosen.local) is not None:
            brought: bool = getattr(model, "brought", False)
            await model.close(leave=brought and not stays)  # type: ignore[call-arg]
        else:
            await model.close()


class Loaded(Value):
    """A version that was loaded, answered its probes, and (on a server of ours) was unloaded again."""

    task: str
    version: str
    url: str
    seconds: Seconds
    memory: int | None
    stays: bool


async def load(chosen: Chosen) -> Loaded:
    """Load it and have it answer its probes; on a server that runs anyway it stays loaded. Raises ModelUnavailable."""
    began = time.monotonic()
    stays = address(chosen.local) is not None
    async with _loaded(chosen, stays=True) as model:
        return Loaded(
            task=chosen.task.name,
            version=chosen.name,
            url=getattr(model, "url", ""),
            seconds=time.monotonic() - began,
            memory=_held(model),
            stays=stays,
        )


async def unload(chosen: Chosen) -> str:
    """The address of the server that has let it go. Raises ConfigError where no server runs anyway, ModelError."""
    url, model = address(chosen.local), _built(chosen)
    if url is None or not _on_server(model):
        await model.close()
        raise ConfigError(
            f"{chosen.task.name}: its server belongs to the process that asks it, and ends with it",
            hint="unload is for servers that run anyway: local.settings.base_url",
        )
    try:
        await model.unload()  # type: ignore[attr-defined]
    finally:
        await model.close()
    return url


def _held(model: Model) -> int | None:
    """Bytes that the model's own server holds; None for a server of somebody else's, or none."""
    pid = getattr(model, "pid", None)
    return None if pid is None else process.group_memory(pid) or None


class Probed(Value):
    """Whether a version answers as it did when it was taught. `fingerprint`: what tells this model from any other."""

    task: str
    version: str
    verdict: Literal["same", "no probes", "failed"]
    probes: int
    fingerprint: dict[str, Json]
    why: str = ""


async def probe(chosen: Chosen) -> Probed:
    """Load it, which has it answer its recorded probes; a wrong answer, or none, is the verdict "failed"."""
    task, version = chosen.task.name, chosen.name
    try:
        async with _loaded(chosen) as model:
            count: int = getattr(model, "probes", 0)
            fingerprint = dict(getattr(model, "identity", {}))
    except (ModelError, ConfigError) as error:
        return Probed(task=task, version=version, verdict="failed", probes=0, fingerprint={}, why=str(error))
    if chosen.version is not None:
        fingerprint["checkpoint"] = chosen.version.checkpoint
    return Probed(
        task=task, version=version, verdict="same" if count else "no probes", probes=count, fingerprint=fingerprint
    )


# --- how fast ---------------------------------------------------------------------------------------------------------


class Measured(Value):
    """What requests took. `valid`: the share with an output that fits the schema. Rates are per second of the whole run.

    Tokens are None where the model does not count them; `p50`, `p99` in seconds, of those that were answered.
    """

    task: str
    version: str
    inputs: Literal["recorded", "examples"]
    requests: int
    at_once: int
    failed: int
    valid: float
    seconds: Seconds
    answers_per_second: float
    prompt_tokens_per_second: float | None
    generated_tokens_per_second: float | None
    p50: Seconds | None
    p99: Seconds | None
    memory: int | None


async def bench(chosen: Chosen, store: Store | None, *, requests: int, at_once: int = 1) -> Measured:
    """Ask it recorded inputs (the task's examples where there are none), after it has loaded.

    Raises ConfigError where there is nothing to ask, ModelUnavailable where it cannot be loaded.
    """
    task = chosen.task
    recorded = await store.records(task.name, limit=requests, newest=True) if store is not None else []
    inputs = [record.input for _, record in recorded] or [example["input"] for example in task.task.examples]
    if not inputs:
        raise ConfigError(f"task {task.name!r} has no recorded inputs and no examples", hint="answer a request first")
    asked = iter([inputs[number % len(inputs)] for number in range(requests)])
    answers: list[Answer] = []
    took: list[float] = []
    failed = 0

    async def ask(model: Model) -> None:
        nonlocal failed
        for given in asked:
            began = time.monotonic()
            try:
                answers.append(await model.answer(task.task, given))
                took.append(time.monotonic() - began)
            except ModelUnavailable:
                failed += 1
                await _ready(model, _RETURN, patient=True)
            except ModelError:
                failed += 1

    async with _loaded(chosen) as model:
        began = time.monotonic()
        await asyncio.gather(*(ask(model) for _ in range(at_once)))
        seconds = time.monotonic() - began
        memory = _held(model)
    used = [answer.usage for answer in answers if answer.usage is not None]
    took.sort()
    return Measured(
        task=task.name,
        version=chosen.name,
        inputs="recorded" if recorded else "examples",
        requests=requests,
        at_once=at_once,
        failed=failed,
        valid=sum(_fits(task, answer) for answer in answers) / requests,
        seconds=seconds,
        answers_per_second=len(answers) / seconds,
        prompt_tokens_per_second=sum(usage.input_tokens for usage in used) / seconds if used else None,
        generated_tokens_per_second=sum(usage.output_tokens for usage in used) / seconds if used else None,
        p50=quantile(took, 0.5),
        p99=quantile(took, 0.99),
        memory=memory,
    )


def _fits(task: TaskConfig, answer: Answer) -> bool:
    if answer.output is None:
        return False
    try:
        task.validate_output(answer.output)
    except InvalidAnswer:
        return False
    return True


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of the values does not exceed; None of none.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5), quantile([], 0.5)
    (2.0, None)
    """
    rank = -(-len(ordered) * share // 1)
    return ordered[max(0, int(rank) - 1)] if ordered else None
