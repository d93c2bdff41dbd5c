"""What models on servers of our own share: a life in the background, recognition, probes, raw confidence.

A server is either *owned* (a child process of ours, started and restarted here) or *attached* (it runs anyway, and may
change behind our back). A plugin says how its server is started, asked and identified (Speaker); Local makes a model of
that. Nothing here costs money, so every failure is ModelUnavailable or ModelRejected and the remote can be asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import SecretStr

from apprentice import process, wire
from apprentice.calibration import SAME, calibrate
from apprentice.errors import (
    ApprenticeError,
    ConfigError,
    ModelError,
    ModelRejected,
    ModelUnavailable,
)
from apprentice.models import (
    as_json,
    mapping,
    mappings,
    parse,
    readable,
    reader,
    shape,
    system,
    text_of,
    turns,
    usage_of,
)
from apprentice.models._checkpoints import AGAIN, Student
from apprentice.models._confidence import Rule, Token, confidence, tokens_of
from apprentice.models._learned import Misfit, another_schema, anything, misfit_of
from apprentice.types import Answer, FinishState, Json, Seconds, Task, Usage

type Stage = Literal["idle", "loading", "ready", "failed", "closed"]

ALTERNATIVES = 5  # tokens told beside the one that was taken
_SAME: float = 0.05  # log-probabilities of one model differ by less, whatever else the server computes at that time
_BACK_OFF: Seconds = 0.5
_LONGEST_BACK_OFF: Seconds = 30.0
_SETTLED: Seconds = 60.0  # a server that lived that long starts again without delay
CONTINUED = "One, two, three, four,"  # every language model has an opinion on how this goes on


class State(NamedTuple):
    """Where a server is in its life. `share`: how much of the loading is done, by memory in use, 0 to 1.

    `why`: of a failure; where nobody knows how much there is to load, what the server says while it does.
    """

    stage: Stage
    why: str = ""
    share: float = 0.0

    def __str__(self) -> str:
        if self.stage == "loading":
            return f"still loading: {self.why}" if self.why else f"still loading, {self.share * 100:.0f} %"
        return f"{self.stage}: {self.why}" if self.why else self.stage


# --- a server's HTTP --------------------------------------------------------------------------------------------------


class Api:
    """A server that speaks JSON over HTTP. `url` is set when it is known: an owned server has a new one each time."""

    def __init__(
        self, timeout: Seconds, client: wire.Client | None, *, allow_internal: bool, api_key: str | None = None
    ) -> None:
        self.url = ""
        self.timeout = timeout
        self._key = SecretStr(api_key or "")
        self._client = client or wire.client(allow_internal=allow_internal, reader=reader())
        self._owned = client is None

    async def post(self, path: str, body: Json, timeout: Seconds | None = None) -> wire.Outcome:
        """What became of it. Raises InvalidInput for what JSON cannot say."""
        headers = {"content-type": "application/json"}
        return await self._send(wire.Request(self.url + path, headers, as_json(body).encode(), timeout or self.timeout))

    async def upload(self, path: str, file: Path, timeout: Seconds) -> wire.Outcome:
        """What became of a file that was sent as it is."""
        headers = {"content-type": "application/octet-stream"}
        return await self._send(wire.Request(self.url + path, headers, b"", timeout, file=file))

    async def get(self, path: str) -> wire.Outcome:
        return await self._send(wire.Request(self.url + path, {}, b"", self.timeout, method="GET"))

    async def _send(self, request: wire.Request) -> wire.Outcome:
        if key := self._key.get_secret_value():
            headers = {**request.headers, "authorization": f"Bearer {key}"}
            request = request._replace(headers=headers, secret=key)
        return await wire.send(self._client, request)

    async def close(self) -> None:
        if self._owned:
            await self._client.close()


def body_of(outcome: wire.Outcome, name: str) -> dict[str, Json]:
    """The JSON object of a success. Raises ModelUnavailable where trying again may help, else ModelRejected."""
    status = outcome.status
    if outcome.kind == "answered" and outcome.body is not None:
        return outcome.body
    refused = status is not None and 300 <= status < 500 and status not in (408, 425, 429)
    kind = ModelRejected if refused else ModelUnavailable
    raise kind(
        f"{name}: {outcome.problem}",
        outcome="not_sent" if outcome.kind == "not_sent" else "rejected",
        retry_after=outcome.retry_after,
    )


# --- what a plugin says of its server -----------------------------------------------------------------------------------


class Said(NamedTuple):
    """What a server's answer says, in our words. `problem`: why its text is not to be trusted."""

    text: str = ""
    model: str = ""
    usage: Usage | None = None
    finish: FinishState = "complete"
    tokens: tuple[Token, ...] = ()
    problem: str | None = None


class Command(NamedTuple):
    """How to start a server: the program with its arguments, its whole environment, and the memory it will fill."""

    argv: Sequence[str]
    env: Mapping[str, str]
    memory: int = 0


class Speaker(Protocol):
    """How one kind of server is started, asked and recognised."""

    name: str
    max_tokens: int

    def command(self, port: int) -> Command:
        """How to start it. Raises ConfigError where it cannot be; called for owned servers only, and may block."""
        ...

    def needs(self) -> int | None:
        """Bytes of memory that a server takes for it, about; None where nobody knows. May block. Raises ConfigError."""
        ...

    async def is_up(self, api: Api) -> bool:
        """Whether it is there and has loaded what it loads at its start."""
        ...

    async def enter(self, api: Api) -> bool:
        """Make it able to answer as our version (load an adapter, say); whether it was not before.

        Raises ModelError or ConfigError.
        """
        ...

    async def leave(self, api: Api) -> None:
        """Undo `enter`. Raises ModelError."""
        ...

    async def identity(self, api: Api) -> dict[str, Json]:
        """What tells this model from another one of the same name. Numbers may differ by 0.05. Raises ModelError."""
        ...

    def request(self, task: Task, input: Json, *, seed: int | None = None) -> tuple[str, Json]:
        """Path and body. `seed`: a sample instead of the likeliest answer."""
        ...

    def read(self, body: dict[str, Json]) -> Said: ...

    def unread(self, sent: Json, said: Said) -> str | None:
        """Why it must be feared that the server did not read the whole prompt, or None."""
        ...

    def failure(self, outcome: wire.Outcome) -> ModelError | None:
        """The error for a failure that only this kind of server knows to explain, else None."""
        ...


# --- the model ----------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What every model on a server of our own can be told."""

    fields: Sequence[str] | None = None  # that the evaluator compares; all without it
    rule: Rule = "margin"
    samples: int = 0
    timeout: Seconds = 30.0  # for one answer
    start_timeout: Seconds = 600.0
    recheck: Seconds = 30.0  # after which an attached server is identified again
    port: int = 0  # of an owned server; 0: a free one
    log: Path | None = None  # of an owned server; a file that is deleted in the end, without it
    grace: Seconds = 5.0
    concurrency: int | None = None  # questions that the server is asked at once; the others wait here for their turn


def log_of(name: str, log_dir: str | None, checkpoint: Path | None) -> Path | None:
    """Where an owned server's log is kept: in a folder that was named, or beside the checkpoint; None for neither."""
    folder = Path(log_dir) if log_dir is not None else None if checkpoint is None else checkpoint.parent
    return None if folder is None else folder / f"{name.replace(':', '-').replace('/', '-')}.log"


class Local:
    """A model on a server that is owned, or attached to where there is a `base_url`. Building it starts nothing."""

    def __init__(
        self,
        speaker: Speaker,
        settings: Settings,
        *,
        base_url: str | None,
        client: wire.Client | None = None,
        allow_internal: bool = False,
        api_key: str | None = None,
        student: Callable[[], Student | None] = lambda: None,
    ) -> None:
        """`student`: reads the checkpoint; called in a thread, because it hashes files."""
        if settings.rule == "samples" and settings.samples < 2:
            raise ConfigError(f"{speaker.name}: confidence: samples needs `samples` of at least 2")
        self.max_tokens = speaker.max_tokens
        self._speaker = speaker
        self._settings = settings
        self._attached = base_url is not None
        near = allow_internal or base_url is None or _is_this_machine(base_url)
        self._api = Api(settings.timeout, client, allow_internal=near, api_key=api_key)
        if base_url is not None:
            self._api.url = wire.check_url(base_url, allow_internal=near)
        self.brought = False  # whether the server did not have it loaded before us
        self._entered = False  # whether it has it loaded for us now
        self._load_student = student
        self._student: Student | None = None
        self._process: process.Process | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._identity: dict[str, Json] | None = None
        self._identified_at = -math.inf
        self._state = State("idle")
        self._changed = asyncio.Event()  # of the state
        self._suspect = asyncio.Event()  # a request failed as if the server were gone
        self._checking = asyncio.Lock()
        self._turns = asyncio.Semaphore(settings.concurrency) if settings.concurrency else None
        self._life: asyncio.Task[None] | None = None
        self._final = False
        self._checked: tuple[Json, Misfit] = (None, anything)  # the schema of the last task, and its check

    # --- its life

    def state(self) -> State:
        """Where the server is in its life, as of now."""
        return self._state

    @property
    def url(self) -> str:
        """Where the server is asked; empty before one of ours was started."""
        return self._api.url

    @property
    def pid(self) -> int | None:
        """The server's process, if it is ours and runs."""
        return self._process.pid if self._process is not None and self._process.alive else None

    async def ready(self, timeout: Seconds = 600.0, *, patient: bool = True) -> None:
        """Wait until it can answer. Raises ModelUnavailable that says why it cannot, or cannot yet.

        Without patience the first failure is raised, although it will be tried again.
        """
        self._begin()
        try:
            async with asyncio.timeout(timeout):
                while self._state.stage != "ready":
                    if self._final or (not patient and self._state.stage == "failed"):
                        raise self._unavailable()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise self._unavailable() from None

    @property
    def identity(self) -> dict[str, Json]:
        """What tells the model that answers from another one of the same name; empty before it was ready."""
        return dict(self._identity or {})

    @property
    def probes(self) -> int:
        """How many recorded answers it has to repeat before it is ready; 0 before it was."""
        return len(self._student.probes) if self._student is not None else 0

    async def needs(self) -> int | None:
        """Bytes of memory that it takes, about; None where nobody knows. Raises ConfigError for unusable files."""
        self._student = self._student or await asyncio.to_thread(self._load_student)
        return await asyncio.to_thread(self._speaker.needs)

    async def unload(self) -> None:
        """Have a server of somebody else's forget what it loaded for us. Raises ModelError, ConfigError."""
        self._student = self._student or await asyncio.to_thread(self._load_student)
        if not await self._speaker.is_up(self._api):
            raise ModelUnavailable(f"{self._speaker.name}: nothing answers at {self._api.url}", outcome="not_sent")
        await self._speaker.leave(self._api)

    async def close(self, *, leave: bool = True) -> None:
        """End the server if it is ours; nothing of it is left when this returns.

        A server of somebody else's forgets what it loaded for us, unless `leave` is False.
        """
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        if leave and self._attached and self._entered:
            self._entered = False
            with contextlib.suppress(ModelError):  # a server that is gone has nothing loaded
                await self._speaker.leave(self._api)
        self._become("closed", final=True)
        await self._stop()
        await self._api.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _begin(self) -> None:
        if self._life is None and not self._final:
            self._become("loading")
            self._life = asyncio.get_running_loop().create_task(self._live())

    async def _live(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._start()
                why = await self._lost()
            except (ModelUnavailable, OSError) as error:
                why = str(error)
            except ApprenticeError as error:  # trying again changes nothing
                hint = f" ({error.hint})" if error.hint else ""
                self._become("failed", f"{error}{hint}")
                await self._stop()
                self._become("failed", self._state.why, final=True)
                return
            self._become("failed", why)
            await self._stop()
            failures = 0 if time.monotonic() - began > _SETTLED else failures + 1
            if failures:
                await asyncio.sleep(min(_BACK_OFF * 2 ** (failures - 1), _LONGEST_BACK_OFF))
            self._become("loading", share=0.0)

    async def _start(self) -> None:
        """From nothing to ready: what the checkpoint says is read, the server started, recognised and examined."""
        if self._student is None:
            self._student = await asyncio.to_thread(self._load_student)
            self._suits(self._student)
        if self._attached:
            if not await self._speaker.is_up(self._api):
                raise ModelUnavailable(f"{self._speaker.name}: nothing answers at {self._api.url}", outcome="not_sent")
        else:
            await self._launch()
        self._api.timeout = self._settings.start_timeout  # its first answers warm it up, which can take minutes
        try:
            self.brought = await self._speaker.enter(self._api) or self.brought
            self._entered = True
            await self._identify()
            await self._examine()
        finally:
            self._api.timeout = self._settings.timeout
        self._suspect.clear()
        self._become("ready", share=1.0)

    def _suits(self, student: Student | None) -> None:
        """Nothing, where a student's table is for the confidence that is computed here. Raises ConfigError otherwise."""
        if student is None:
            return
        ours, theirs = self._settings.fields, student.fields
        if student.rule != self._settings.rule or (ours and sorted(ours)) != (theirs and sorted(theirs)):
            raise ConfigError(
                f"{self._speaker.name}: the checkpoint {student.name} was calibrated for the confidence {student.rule!r} "
                f"of the fields {theirs}, not {self._settings.rule!r} of {ours}",
                hint=f"set `confidence` and `fields` as they were, or {AGAIN}",
            )

    async def _launch(self) -> None:
        port = self._settings.port or process.free_port()
        command = await asyncio.to_thread(self._speaker.command, port)
        self._api.url = f"http://127.0.0.1:{port}"
        if self._folder is None and self._settings.log is None:
            self._folder = tempfile.TemporaryDirectory(prefix="apprentice-")
        folder = Path(self._folder.name) if self._folder is not None else Path()
        self._process = await process.start(
            command.argv,
            log=self._settings.log or folder / "log",
            env=command.env,
            name=self._speaker.name,
            grace=self._settings.grace,
        )

        def tell(progress: process.Progress) -> None:
            if command.memory:
                self._become("loading", share=min(progress.memory / command.memory, 0.99))
            else:
                self._become("loading", "".join(filter(str.isprintable, progress.line)))

        await self._process.ready(
            lambda: self._speaker.is_up(self._api), timeout=self._settings.start_timeout, tell=tell
        )

    async def _lost(self) -> str:
        """Why the server has to be started, or recognised, again."""
        ended = asyncio.ensure_future(self._process.wait()) if self._process is not None else None
        doubted = asyncio.ensure_future(self._suspect.wait())
        watched: set[asyncio.Future[Any]] = {task for task in (ended, doubted) if task is not None}
        try:
            while True:
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                if ended is not None and ended.done():
                    return str(ended.result())
                if self._attached or not await self._speaker.is_up(self._api):
                    return "it stopped answering"
                self._suspect.clear()
                self._become("ready", share=1.0)
                watched.discard(doubted)
                doubted = asyncio.ensure_future(self._suspect.wait())
                watched.add(doubted)
        finally:
            for task in watched:
                task.cancel()
            await asyncio.gather(*watched, return_exceptions=True)

    async def _stop(self) -> None:
        if self._process is not None:
            await asyncio.shield(self._process.stop())
            self._process = None

    async def _identify(self) -> None:
        """Compare the server's identity with the one it had first. Raises ModelRejected when it is another model."""
        found = await self._speaker.identity(self._api)
        if self._identity is None:
            self._identity = found
        elif changed := _differences(self._identity, found):
            raise ModelRejected(
                f"{self._speaker.name}: another model answers under the same name than before ({changed})",
                hint="restart Apprentice if that is meant",
                outcome="not_sent",
            )
        self._identified_at = time.monotonic()

    async def _examine(self) -> None:
        """Ask the checkpoint's probes, which also warms the server up. Raises ConfigError when training saw others."""
        student = self._student
        if student is None:
            return
        for given, output in student.probes:
            said = await self._said(*self._speaker.request(student.task, given))
            found = _output(said, student.task)[0]
            if found != output:
                raise ConfigError(
                    f"{self._speaker.name}: the checkpoint {student.name} answers {as_json(found)[:200]} to a probe that "
                    f"it answered with {as_json(output)[:200]} when it was trained",
                    hint=f"serve it with the base and the server that it was trained for, or {AGAIN}",
                )

    def _become(self, stage: Stage, why: str = "", *, share: float = 0.0, final: bool = False) -> None:
        self._state = State(stage, why, share)
        self._final = self._final or final
        self._changed.set()

    def _unavailable(self) -> ModelUnavailable:
        return ModelUnavailable(f"{self._speaker.name}: {self._state}", outcome="not_sent")

    # --- its answers

    def request_bytes(self, task: Task, input: Json) -> int:
        """Never fewer than the tokens of a request: no tokenizer makes more tokens than there are bytes."""
        return len(as_json(self._speaker.request(task, input)[1]).encode())

    async def answer(self, task: Task, input: Json) -> Answer:
        """The model's answer; `output` is None where it does not fit the task's schema.

        Raises ModelUnavailable at once while the server is not ready, ModelRejected when it will not take the request
        (a prompt that is longer than its context, say), InvalidInput for what JSON cannot say.
        """
        path, body = self._speaker.request(task, input)
        self._begin()
        if self._state.stage != "ready":
            raise self._unavailable()
        misfit = self._fits(task)
        began = time.monotonic()
        await self._recognise()
        said = await self._said(path, body)
        output, problem = _output(said, task)
        if output is not None and (wrong := misfit(output)):
            output, problem = None, f"the answer does not fit the schema: {wrong}"
        sure = await self._sure(task, input, said, output) if output is not None else None
        return Answer(
            output=output,
            text=readable(said.text),
            model=readable(said.model) or self._speaker.name,
            usage=said.usage,
            finish=said.finish,
            latency=time.monotonic() - began,
            confidence=sure,
            problem=problem,
        )

    async def _recognise(self) -> None:
        """Identify an attached server again where the last time is too long ago: somebody may have restarted it."""
        if not self._attached or time.monotonic() - self._identified_at <= self._settings.recheck:
            return
        async with self._checking:
            if time.monotonic() - self._identified_at <= self._settings.recheck:
                return
            try:
                await self._identify()
            except ModelRejected as error:
                self._become("failed", str(error), final=True)
                raise self._unavailable() from error
            except ModelUnavailable:
                self._doubt()
                raise
        if self._state.stage != "ready":  # found out by another call that waited here
            raise self._unavailable()

    async def _said(self, path: str, body: Json) -> Said:
        async with self._turn():
            outcome = await self._api.post(path, body)
        if outcome.kind == "answered" and outcome.body is not None:
            said = self._speaker.read(outcome.body)
            problem = self._speaker.unread(body, said)
            return said if problem is None else said._replace(problem=problem)
        if outcome.status is None:
            self._doubt()
        elif outcome.status >= 500:
            self._suspect.set()  # it is there; whether it still works is looked at meanwhile
        if (error := self._speaker.failure(outcome)) is not None:
            if isinstance(error, ModelUnavailable):
                self._doubt()
            raise error
        body_of(outcome, self._speaker.name)
        raise AssertionError("a failure has no body")

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """A place among those who may ask at once. Raises ModelUnavailable where none comes within `timeout`."""
        if self._turns is None:
            yield
            return
        try:
            async with asyncio.timeout(self._settings.timeout):
                await self._turns.acquire()
        except TimeoutError:
            why = f"{self._speaker.name}: {self._settings.concurrency} questions at once kept it busy"
            raise ModelUnavailable(f"{why} for {self._settings.timeout:g} s", outcome="not_sent") from None
        try:
            if self._state.stage in ("failed", "closed"):  # meanwhile
                raise self._unavailable()
            yield
        finally:
            self._turns.release()

    def _doubt(self) -> None:
        """Ask nothing more of the server until it has been looked at."""
        if self._state.stage == "ready":
            self._become("failed", "it stopped answering, and is looked at")
            self._suspect.set()

    async def _sure(self, task: Task, input: Json, said: Said, output: Json) -> float | None:
        rule, fields = self._settings.rule, self._settings.fields
        if rule == "samples":
            asked = [self._speaker.request(task, input, seed=seed) for seed in range(1, self._settings.samples + 1)]
            others = await asyncio.gather(*(self._said(*one) for one in asked))
            same = [_chosen(_output(other, task)[0], fields) == _chosen(output, fields) for other in others]
            raw: float | None = sum(same) / len(same)
        else:
            raw = confidence(said.tokens, said.text, fields, rule)
        table = self._student.table if self._student is not None else SAME
        return None if raw is None else round(calibrate(table, raw), 6)

    def _fits(self, task: Task) -> Misfit:
        """How outputs of this task are checked. Raises ModelRejected when another schema was learned."""
        schema, misfit = self._checked
        if task.output_schema is schema:
            return misfit
        if self._student is not None and task.output_schema != self._student.task.output_schema:
            raise another_schema(self._speaker.name, task)
        misfit = misfit_of(task)
        self._checked = task.output_schema, misfit
        return misfit


def _is_this_machine(url: str) -> bool:
    """Whether an address is this machine's own, which needs no permission to be asked."""
    return url.startswith(("http://127.0.0.1:", "http://localhost:", "http://[::1]:"))


def messages(task: Task, input: Json) -> list[Json]:
    """The conversation as OpenAI's format and those who follow it have it."""
    wrap = shape(task.output_schema).wrap
    said = [
        {"role": role, "content": as_json(wrap(value) if role == "assistant" else value)}
        for role, value in turns(task, input)
    ]
    return [{"role": "system", "content": system(task)}, *said]


def read_chat(body: dict[str, Json]) -> Said:
    """What an answer in the format of OpenAI's chat completions says."""
    choice = next(iter(mappings(body.get("choices"))), {})
    reason = text_of(choice.get("finish_reason"))
    cut = None if reason in ("stop", "length", "eos") else f"the answer was cut off: {reason or 'no reason given'}"
    return Said(
        text=text_of(mapping(choice.get("message")).get("content")),
        model=text_of(body.get("model")),
        usage=usage_of(
            body.get("usage"),
            lambda found: {
                "input_tokens": found["prompt_tokens"],
                "output_tokens": found["completion_tokens"],
                "cached_tokens": (found.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            },
        ),
        finish="truncated" if reason != "stop" else "complete",
        tokens=tokens_of(mapping(choice.get("logprobs")).get("content")),
        problem=cut,
    )


def _output(said: Said, task: Task) -> tuple[Json, str | None]:
    if said.problem is not None:
        return None, said.problem
    if said.finish == "truncated":  # half an answer may still be valid JSON
        return None, "the answer was cut off at max_tokens"
    value, problem = parse(said.text)
    value = shape(task.output_schema).unwrap(value)
    return value, "the answer is null" if value is None and problem is None else problem


def _chosen(value: Json, fields: Sequence[str] | None) -> Json:
    return {name: value.get(name) for name in fields} if fields is not None and isinstance(value, dict) else value


def _differences(before: Mapping[str, Json], after: Mapping[str, Json]) -> str:
    """Which parts of an identity changed, empty for none."""
    changed = [name for name in sorted(before.keys() | after.keys()) if not _same(before.get(name), after.get(name))]
    return ", ".join(f"{name}: {str(before.get(name))[:80]} -> {str(after.get(name))[:80]}" for name in changed)


def _same(one: Json, other: Json) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= _SAME
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
