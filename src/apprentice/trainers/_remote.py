"""Training at a provider: the steps of a job, each of them durable, and each safe to be done again.

    prepared   its row and its dataset are in the folder
    uploaded   the provider has the dataset
    created    the provider's id of the job is known; a creation is looked for by our name before it is made (again)
    ended      what it came to is known; of a success, the checkpoint is kept

Whoever goes on takes the row as the last one left it; a writer with an older token than the row's is refused.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from hashlib import sha256
from itertools import cycle, islice
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

from pydantic import Field

from apprentice import dialogues, weights, wire
from apprentice.errors import (
    ConfigError,
    ModelError,
    ModelRejected,
    ModelUnavailable,
    OutcomeUnknown,
    PriceUnknown,
    TrainingError,
    UnsafeFile,
)
from apprentice.trainers import keep, replace_file
from apprentice.types import Attempt, Checkpoint, Example, Hold, Json, Micros, Seconds, Task, Value

_NO_PROOF: Mapping[str, Json] = MappingProxyType({})
_LARGEST = 2**30  # bytes of one file of an adapter
_TIMEOUT: Seconds = 600.0  # for a file of hundreds of megabytes
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

type End = Literal["succeeded", "failed", "cancelled"]


class Row(Value):
    """A job, and how far it has come."""

    name: str  # of the job at the provider, and of its hold in the ledger
    key: str  # what it is about: the same examples, settings and seed have the same
    number: int  # of the attempt at that
    task: str
    model: str  # as in the ledger: "openai/gpt-4.1-mini-2025-04-14"
    base: str  # as the provider names it
    epochs: int
    seed: int
    examples: int
    data: str  # SHA-256 of the dataset
    rows: int  # lines of the dataset
    worst: Micros
    price: str  # dollars per million tokens, as it was when the job was begun
    licence: dict[str, Json] = Field(default_factory=dict)
    token: int = 0  # of the lease of who wrote it last
    dataset: str | None = None  # as the provider names it
    sent_at: Seconds | None = None  # when a creation was begun: from then on the provider may have it
    remote_id: str | None = None
    looked_at: Seconds | None = None
    state: str = "prepared"  # in the provider's words
    end: End | None = None
    outcome: Literal["answered", "rejected", "unknown"] = "unknown"
    cost: Micros = 0
    result: str = ""  # the model, as the provider names it
    problem: str = ""
    checkpoint: str | None = None

    @property
    def open(self) -> bool:
        """Whether something is left to be done."""
        return self.end is None or (self.end == "succeeded" and self.checkpoint is None)


class Look(NamedTuple):
    """What a look at a job found. `tokens`: trained on; `free`: it ended before anything was trained."""

    state: str
    end: End | None = None
    result: str = ""
    tokens: int | None = None
    free: bool = False
    problem: str = ""


class Service(Protocol):
    """How one provider trains. Methods raise ModelError; `Wire.call` does so for them."""

    kind: Literal["reference", "adapter"]
    provider: str
    hint: str | None  # for a job that could not be created
    least: int  # rows of a dataset
    hidden: Seconds  # after so long a job that was created shows where it is looked for

    async def upload(self, wire: Wire, row: Row, data: bytes) -> str: ...
    async def find(self, wire: Wire, row: Row) -> str | None: ...
    async def create(self, wire: Wire, row: Row) -> str: ...
    async def look(self, wire: Wire, row: Row) -> Look: ...
    async def cancel(self, wire: Wire, row: Row) -> None: ...
    async def files(self, wire: Wire, row: Row) -> dict[str, bytes]: ...


class Wire:
    """Where a provider is asked, and with which key: that of the environment's variable `key_env`."""

    def __init__(
        self, name: str, base_url: str, *, key_env: str | None, timeout: Seconds, allow_internal: bool
    ) -> None:
        self.name = name
        self._base = wire.check_url(base_url, allow_internal=allow_internal)
        self._key_env = key_env
        self._timeout = timeout
        self._allow_internal = allow_internal
        self._client = wire.client(allow_internal=allow_internal)

    async def call(self, path: str, body: bytes | None = None, *, media: str = "application/json") -> dict[str, Json]:
        """The JSON object that answers a POST of `body`, or a GET. Raises ModelError, ConfigError without the key."""
        return self.told(await self.ask(path, body, media=media))

    def told(self, outcome: wire.Outcome) -> dict[str, Json]:
        """The object that came back. Raises ModelError where there is none."""
        # A job that failed is told of with the key `error`, which elsewhere says that the call did.
        if outcome.body is not None and 200 <= (outcome.status or 0) < 300:
            return outcome.body
        raise _failed(outcome, self.name)

    async def ask(self, path: str, body: bytes | None = None, *, media: str = "application/json") -> wire.Outcome:
        """What became of one attempt. Raises ConfigError without the key."""
        key = self._key()
        headers = {"content-type": media} | ({"authorization": f"Bearer {key}"} if key else {})
        timeout = self._timeout if body is None or len(body) < 2**20 else max(self._timeout, _TIMEOUT)
        method: Literal["POST", "GET"] = "GET" if body is None else "POST"
        asked = wire.Request(self._base + path, headers, body or b"", timeout, key, method=method)
        return await wire.send(self._client, asked)

    async def download(self, url: str) -> bytes:
        """A file at an address that the provider told: it gets no key, and must be one that may be connected to."""
        parts = urlsplit(url)
        try:
            wire.check_url(parts._replace(query="").geturl(), allow_internal=self._allow_internal)
        except ConfigError as error:
            raise UnsafeFile(f"{self.name}: the address of a file is refused: {error}") from error
        timeout = max(self._timeout, _TIMEOUT)
        asked = wire.Request(url, {}, b"", timeout, limit=_LARGEST, method="GET")
        try:
            async with asyncio.timeout(timeout):
                reply = await self._client.exchange(asked, lambda: None)
        except (wire.Blocked, wire.TooLarge) as error:
            raise UnsafeFile(f"{self.name}: a file is not fetched: {error}") from error
        except (OSError, TimeoutError) as error:
            raise ModelUnavailable(f"{self.name}: a file could not be fetched: {type(error).__name__}") from error
        if reply.status != 200:
            # Signed addresses end after a while: the next look asks for new ones.
            raise ModelUnavailable(f"{self.name}: a file could not be fetched: status {reply.status}")
        return reply.body

    async def close(self) -> None:
        await self._client.close()

    def _key(self) -> str:
        if self._key_env is None:
            return ""
        key = os.environ.get(self._key_env, "")
        if not key or not key.isascii() or not key.isprintable():
            raise ConfigError(
                f"{self.name}: the environment variable {self._key_env} holds no key", hint=f"export {self._key_env}=…"
            )
        return key


class Remote:
    """A trainer that has a provider train. Besides a trainer's methods: `quote`, `bill`, `cancel`, `stop`."""

    def __init__(
        self,
        service: Service,
        *,
        base_url: str,
        key_env: str | None,
        allow_internal: bool,
        model: str,
        epochs: int,
        price: float | str | None,
        poll: Seconds,
        patience: Seconds,
        timeout: Seconds,
        settings: Mapping[str, Json] = MappingProxyType({}),
    ) -> None:
        """`price`: dollars per million tokens. `poll`: seconds between looks; `patience`: of failures before giving up
        for this time. `settings`: what else decides what is trained. Raises ConfigError."""
        if not 1 <= epochs <= 50:
            raise ConfigError(f"trainer {service.provider!r}: epochs should be 1 to 50")
        if not (poll > 0 and patience > 0 and timeout > 0):
            raise ConfigError(f"trainer {service.provider!r}: poll, patience and timeout should be above 0")
        wire.check_url(base_url, allow_internal=allow_internal)
        self.model = f"{service.provider}/{model}"
        self.kind = service.kind
        self._service = service
        self._at: dict[str, Any] = {"base_url": base_url, "key_env": key_env, "allow_internal": allow_internal}
        self._at["timeout"] = timeout
        self._base = model
        self._epochs = epochs
        self._price = _decimal(price, service.provider)
        self._poll = poll
        self._patience = patience
        self._settings = dict(settings)
        self._token = 0
        self._stopped = threading.Event()

    def check(self, task: Task) -> None:
        """Whatever JSON can say, a language model can be taught."""

    def quote(
        self,
        task: Task,
        examples: Sequence[Example],
        *,
        into: Path,
        seed: int,
        token: int = 0,
        licence: Mapping[str, Json] = _NO_PROOF,
    ) -> Hold | None:
        """What is to be held before `train` with the same arguments; None: nothing will be spent any more.

        Windows and moment are the caller's. `token`: of the lease; from here on, holders of older ones can write nothing.
        Raises PriceUnknown, TrainingError without examples.
        """
        self._token = token
        row = self._row(task, examples, into, seed, licence)
        if row.end is not None:
            return None
        return Hold(
            attempt_id=row.name, task=task.name, purpose="train", model=row.model, worst=row.worst, windows=(), at=0.0
        )

    def bill(self, job: str, *, into: Path) -> Attempt | None:
        """What the job of that name came to; None while it goes on, and for one that is not known here.

        Its outcome: "answered" with a cost that the provider's count says, "rejected" for nothing, "unknown" for all.
        """
        row = _Rows(into).read(job)
        if row is None or row.end is None:
            return None
        return Attempt(
            attempt_id=row.name,
            model=row.model,
            purpose="train",
            outcome=row.outcome,
            cost=row.cost,
            problem=row.problem or None,
        )

    def train(
        self, task: Task, examples: Sequence[Example], *, into: Path, seed: int, licence: Mapping[str, Json] = _NO_PROOF
    ) -> Checkpoint:
        """The checkpoint of the job, which is waited for. An open job of the folder is finished instead of a new one:
        `manifest["data"]` and `manifest["licence"]` are of the data that it was begun with.

        Raises TrainingError for a job that failed, or that cannot be asked about now (it stays open); UnsafeFile for
        weights that must not be kept; PriceUnknown; ConfigError without the key.
        """
        row = self._row(task, examples, into, seed, licence)
        rows = _Rows(into)
        if row.open or not (row.checkpoint and (into / row.checkpoint).is_dir()):
            row = _alone(self._finished(rows, row))
        if row.end != "succeeded" or row.checkpoint is None:
            made = row.remote_id or "not created"
            said = f"{row.model}: job {row.name} ({made}) {row.end}: {row.problem}"
            raise TrainingError(said, hint=self._service.hint if row.remote_id is None else None)
        manifest = json.loads((into / row.checkpoint / "manifest.json").read_bytes())
        return Checkpoint(id=row.checkpoint, path=into / row.checkpoint, manifest=manifest)

    def cancel(self, *, into: Path) -> list[str]:
        """Ask the provider to end the open jobs of this folder, and return their names. `train` then finds them ended."""
        rows = [row for row in _Rows(into).all() if row.end is None and row.remote_id is not None]

        async def ask() -> list[str]:
            at = Wire(self.model, **self._at)
            try:
                for row in rows:
                    await self._service.cancel(at, row)
            finally:
                await at.close()
            return [row.name for row in rows]

        return _alone(ask())

    def stop(self) -> None:
        """Let a `train` in another thread end with TrainingError soon. Its job goes on, and is found again."""
        self._stopped.set()

    # --- steps --------------------------------------------------------------------------------------------------------

    def _row(self, task: Task, examples: Sequence[Example], into: Path, seed: int, licence: Mapping[str, Json]) -> Row:
        """The job to go on with: an open one, one that has brought these examples' checkpoint, or a new one."""
        rows = _Rows(into)
        known = rows.all()
        for row in known:
            if row.open and row.model.partition("/")[0] == self._service.provider:
                return rows.keep(row.model_copy(update={"token": self._token}))
        if not examples:
            raise TrainingError(f"task {task.name!r}: there are no examples to learn from")
        taught = dialogues.weighed(examples)
        taught = list(islice(cycle(taught), max(len(taught), self._service.least)))
        data = dialogues.chat(task, taught).encode()
        digest = sha256(data).hexdigest()
        about = [self._at["base_url"], self.model, self._epochs, self._settings, task.name, seed, digest]
        key = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
        same = [row for row in known if row.key == key]
        for row in same:
            if row.end == "succeeded":
                return row
        if self._price is None:
            raise PriceUnknown(
                f"{self.model}: the price of training is not configured",
                hint="state `price_per_million` (US dollars per million tokens trained) in fine_tune_settings",
            )
        row = Row(
            name=f"apprentice-{key}-{len(same)}",
            key=key,
            number=len(same),
            task=task.name,
            model=self.model,
            base=self._base,
            epochs=self._epochs,
            seed=seed,
            examples=len(examples),
            data=digest,
            rows=len(taught),
            worst=ceil(len(data) * self._epochs * self._price),
            price=str(self._price),
            licence=dict(licence),
            token=self._token,
        )
        rows.write_data(row.name, data)
        return rows.keep(row)

    async def _finished(self, rows: _Rows, row: Row) -> Row:
        at = Wire(self.model, **self._at)
        failing: Seconds | None = None  # since when
        try:
            while True:
                wait = self._poll
                try:
                    before, row = row, await self._step(at, rows, row)
                    failing = None
                    if not row.open:
                        rows.forget_data(row)
                        return row
                    wait = 0.0 if row.state != before.state or row.dataset != before.dataset else wait
                except ModelError as error:
                    row = rows.read(row.name) or row  # with what was noted before the step failed
                    now = time.monotonic()
                    failing = now if failing is None else failing
                    if not error.retryable or now - failing > self._patience:
                        raise TrainingError(
                            f"job {row.name} cannot be looked after: {error}",
                            hint="it stays open; the next cycle goes on",
                        ) from error
                    wait = max(wait, error.retry_after or 0.0)
                if await asyncio.to_thread(self._stopped.wait, wait):
                    raise TrainingError(
                        f"job {row.name} is waited for no longer", hint="the next cycle goes on with it"
                    )
        finally:
            await at.close()

    async def _step(self, at: Wire, rows: _Rows, row: Row) -> Row:
        if row.end == "succeeded":
            return await self._kept(at, rows, row)
        if row.end is not None:
            return row
        try:
            if row.dataset is None:
                dataset = await self._service.upload(at, row, rows.data(row))
                return rows.keep(row.model_copy(update={"dataset": dataset, "state": "uploaded"}))
            if row.remote_id is None:
                return await self._created(at, rows, row)
        except ModelError as error:
            if error.outcome in ("not_sent", "rejected") and not error.retryable and row.sent_at is None:
                return rows.keep(row.model_copy(update=_ended("failed", "rejected", 0, str(error))))
            raise
        return rows.keep(self._seen(row, await self._service.look(at, row)))

    async def _created(self, at: Wire, rows: _Rows, row: Row) -> Row:
        found = await self._service.find(at, row)
        if found is None:
            if row.sent_at is not None and time.time() - row.sent_at < self._service.hidden:
                return row  # it may not show yet
            row = rows.keep(row.model_copy(update={"sent_at": time.time()}))
            try:
                found = await self._service.create(at, row)
            except ModelError as error:
                if error.outcome not in ("not_sent", "rejected"):
                    raise
                row = rows.keep(row.model_copy(update={"sent_at": None}))
                if error.retryable:
                    raise
                return rows.keep(row.model_copy(update=_ended("failed", "rejected", 0, str(error))))
        return rows.keep(row.model_copy(update={"remote_id": found, "state": "created"}))

    def _seen(self, row: Row, look: Look) -> Row:
        row = row.model_copy(update={"looked_at": time.time(), "state": look.state, "problem": look.problem})
        if look.end is None:
            return row
        if look.end == "succeeded" and not look.result:
            return row.model_copy(update={"problem": "it succeeded, and its model has no name yet"})
        if look.tokens is not None:
            outcome, cost = "answered", ceil(look.tokens * Decimal(row.price))
        else:
            outcome, cost = ("rejected", 0) if look.free else ("unknown", row.worst)
        return row.model_copy(update=_ended(look.end, outcome, cost, look.problem) | {"result": look.result})

    async def _kept(self, at: Wire, rows: _Rows, row: Row) -> Row:
        """With the checkpoint in its place. What must not be kept ends the job as failed: its cost stands."""
        into = rows.into
        draft = rows.folder / f"{row.name}.files"
        try:
            files = await self._service.files(at, row)
            files["manifest.json"] = json.dumps(_manifest(row, self._service), indent=1, sort_keys=True).encode()
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            for name, content in files.items():
                if not _PLAIN.fullmatch(name):
                    raise UnsafeFile(f"{row.model}: a file of the result is called {name[:80]!r}")
                (draft / name).write_bytes(content)
            if self._service.kind == "adapter":
                weights.check(draft, expected=weights.Expected(kind="adapter"))
            id = weights.digest(draft)
        except UnsafeFile as error:
            rows.keep(row.model_copy(update={"end": "failed", "problem": str(error)}))
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        keep(into, id, files)
        return rows.keep(row.model_copy(update={"checkpoint": id}))


def _manifest(row: Row, service: Service) -> dict[str, Json]:
    return {
        "kind": service.kind,
        "provider": service.provider,
        "model": row.result,
        "base_model": row.base,
        "task": row.task,
        "trainer": {"epochs": row.epochs, "seed": row.seed},
        "examples": row.examples,
        "data": row.data,
        "licence": row.licence,
        "job": row.name,
        "cost": row.cost,
    }


def _ended(end: End, outcome: str, cost: Micros, problem: str) -> dict[str, Any]:
    return {"end": end, "outcome": outcome, "cost": cost, "problem": problem}


class _Rows:
    """The jobs of one folder. Writers take turns, and none with an older token than the row's writes."""

    def __init__(self, into: Path) -> None:
        self.into = into
        self.folder = into / ".jobs"

    def all(self) -> list[Row]:
        found = [self.read(path.stem) for path in sorted(self.folder.glob("*.json"))]
        return sorted((row for row in found if row is not None), key=lambda row: (row.key, row.number))

    def read(self, name: str) -> Row | None:
        if not _PLAIN.fullmatch(name):
            return None
        path = self.folder / f"{name}.json"
        try:
            return Row.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            raise TrainingError(f"{path} cannot be read", hint="end the job at the provider, then delete it") from error

    def keep(self, row: Row) -> Row:
        """The row, durable. Raises TrainingError when somebody with a newer token leads the job."""
        with self._turn():
            before = self.read(row.name)
            if before is not None and before.token > row.token:
                raise TrainingError(f"another worker has taken over the job {row.name}")
            replace_file(self.folder / f"{row.name}.json", row.model_dump_json(indent=1).encode())
            _sync(self.folder)
        return row

    def data(self, row: Row) -> bytes:
        try:
            data = (self.folder / f"{row.name}.jsonl").read_bytes()
        except OSError as error:
            raise TrainingError(f"the dataset of the job {row.name} is gone") from error
        if sha256(data).hexdigest() != row.data:
            raise TrainingError(f"the dataset of the job {row.name} was changed since it was begun")
        return data

    def write_data(self, name: str, data: bytes) -> None:
        replace_file(self.folder / f"{name}.jsonl", data)

    def forget_data(self, row: Row) -> None:
        """What people wrote does not lie about longer than it is needed."""
        (self.folder / f"{row.name}.jsonl").unlink(missing_ok=True)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("ab") as lock:  # closing it gives the turn back, also when we are killed
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def multipart(boundary: str, fields: Mapping[str, str], name: str, data: bytes) -> tuple[bytes, str]:
    """A form with one file, and its media type. RFC 7578."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in fields.items()
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
    start = "".join([*parts, head, "Content-Type: application/jsonl\r\n\r\n"]).encode()
    return start + data + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def text(found: Json, name: str) -> str:
    """The text, or OutcomeUnknown where an answer has none: what was asked for may have been done."""
    if isinstance(found, str) and found:
        return found
    raise OutcomeUnknown(f"the answer has no {name}")


def mapping(found: Json) -> dict[str, Json]:
    """The value if it is an object, else an empty one: what came over a wire may have any shape."""
    return found if isinstance(found, dict) else {}


def _failed(outcome: wire.Outcome, name: str) -> ModelError:
    unknown = outcome.kind not in ("not_sent", "rejected")
    kind: type[ModelError] = OutcomeUnknown if unknown else ModelUnavailable if outcome.retryable else ModelRejected
    return kind(
        f"{name}: {outcome.problem}",
        outcome="unknown" if unknown else "not_sent" if outcome.kind == "not_sent" else "rejected",
        retry_after=outcome.retry_after,
        retryable=outcome.retryable,
    )


def _decimal(price: float | str | None, provider: str) -> Decimal | None:
    if price is None:
        return None
    try:
        found = Decimal(str(price))
    except InvalidOperation as error:
        raise ConfigError(f"trainer {provider!r}: price_per_million should be an amount, not {price!r}") from error
    if not found.is_finite() or found < 0:
        raise ConfigError(f"trainer {provider!r}: price_per_million should be 0 or more, not {price!r}")
    return found


def _alone[T](work: Coroutine[Any, Any, T]) -> T:
    """What it returns, on an event loop of its own, in a thread of its own: the caller's may have one."""
    with ThreadPoolExecutor(1, thread_name_prefix="apprentice-training") as pool:
        return pool.submit(asyncio.run, work).result()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
