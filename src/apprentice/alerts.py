"""Delivers recorded events to whoever `alerts:` names: at least once, each once a period, and also when it is over.

Each sink has a place among the store's events, kept in the store. The place is put forward after a notice was taken, so
what a process was sending when it died is sent again, under the same id. A lease lets one process at a time serve a
sink; a sink that fails is tried again with growing pauses, and keeps no other sink waiting. Webhooks are signed as
Standard Webhooks say (https://github.com/standard-webhooks/standard-webhooks, specification 1.0.0).

A notice has the event's message, and of its evidence the numbers and the names: never an input, an output or a secret.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import signal
import stat
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from apprentice import process, wire
from apprentice.config import Config
from apprentice.errors import ConfigError
from apprentice.sections import EVENTS, Command, File, Severity, Sink, Webhook
from apprentice.types import Event, Json, Lease, Seconds, Store, Value

_DRIFTED = frozenset({"ALARM", "ANTI_CORRELATED", "COACHING", "EMERGENCY", "INPUT_SHIFT", "TIGHTEN", "UNVERIFIED"})
_NOT_TAUGHT = frozenset({"CANARY_ABORTED", "TRAINING_FAILED", "VERSION_UNUSABLE"})
ENDS: Mapping[str, frozenset[str]] = {
    "ALERTS_RESUMED": frozenset({"ALERTS_STUCK"}),
    "BATCH_ENDED": frozenset({"BATCH_NOT_COLLECTED"}),
    "BUDGET_CHANGED": frozenset({"CONFIG_INVALID"}),
    "CANARY_PROMOTED": _NOT_TAUGHT,
    "CANARY_STARTED": frozenset({"TRAINING_FAILED"}),
    "CERTIFIED": _DRIFTED,
    "LABELLED": frozenset({"LABELLING_STOPPED"}),
    "LOOSEN": frozenset({"COACHING", "INPUT_SHIFT", "TIGHTEN", "UNVERIFIED"}),
    "MODEL_RESUMED": frozenset({"CONTRACT_BROKEN"}),
    "PROMOTED": _NOT_TAUGHT,
    "REJECTED": frozenset({"TRAINING_FAILED"}),
}
"""Which alerts of the same task are over when an event happens."""
_ENDABLE = frozenset[str]().union(*ENDS.values())

# What else makes two events of one name and task different: their evidence under these names.
_ABOUT: Mapping[str, tuple[str, ...]] = {
    "ALERTS_DROPPED": ("sink",),
    "ALERTS_RESUMED": ("sink",),
    "ALERTS_STUCK": ("sink",),
    "BUDGET_EXHAUSTED": ("window", "limit"),
    "BUDGET_WARNING": ("window", "limit", "reason"),
    "CONTRACT_BROKEN": ("model",),
    "INFEASIBLE": ("window",),
    "MODEL_RESUMED": ("model",),
}
_NAMES = frozenset({"batch", "before", "model", "reason", "remote_id", "request", "sink", "version", "window"})

_PAGE = 256  # events read at a time
_LOOK_BACK: Seconds = 3600.0  # a sink that is new begins with the events of the last hour
_FORGET: Seconds = 30 * 86_400.0  # after so long, an alert that nothing ended is forgotten
_SPELL: Seconds = 30.0  # of sending in one go, so that a long queue ends a pass some time
_LEASE: Seconds = 30.0
_FIRST_WAIT: Seconds = 5.0
_LONGEST_WAIT: Seconds = 3600.0
_DAY: Seconds = 86_400.0
_STUCK = 5  # failures in a row, after which the other sinks are told
_KEEP: Seconds = 3 * _DAY  # a notice that fails at this age is given up, so that those behind it have their turn
_ANSWER = 65_536  # bytes of a receiver's answer, which is read for its status only
_LONGEST_TEXT = 2_000
_SHORTEST_KEY, _LONGEST_KEY = 24, 64  # bytes, by the specification


class Notice(Value):
    """What one sink is told. `id` is the same for each try, also after a crash."""

    id: str
    name: str
    severity: Severity
    task: str
    at: Seconds
    message: str
    evidence: dict[str, Json] = Field(default_factory=dict)
    recovered: tuple[str, ...] = ()  # alerts told before that are over now
    repeated: int = 0  # how often the same happened since it was told last


class Told(NamedTuple):
    """When something was told last, and how often it happened since."""

    at: Seconds
    again: int = 0


class Place(Value):
    """How far one sink has come among the events."""

    number: int = 0  # of the last event that it was told of, or need not be
    told: dict[str, Told] = Field(default_factory=dict)
    failed: int = 0  # tries in a row
    since: Seconds | None = None  # when the first of them failed
    retry_at: Seconds = 0.0
    problem: str | None = None
    delivered: int = 0
    delivered_at: Seconds | None = None
    dropped: int = 0


class Standing(Value):
    """How one sink does. `waiting`: notices that it is still to be told, at most a thousand events ahead."""

    sink: str
    kind: str
    waiting: int
    place: Place


class Failure(NamedTuple):
    """Why a notice was not taken, in words without an address or a secret. `wait`: seconds that the receiver asks for."""

    problem: str
    wait: Seconds = 0.0


class Courier:
    """Brings a store's events to the sinks of a configuration."""

    def __init__(self, config: Config, store: Store, *, clock: Callable[[], Seconds], owner: str, dice: Random) -> None:
        self._sinks = config.alerts.sinks
        self._period = config.alerts.period
        self._store = store
        self._clock = clock
        self._owner = owner
        self._dice = dice

    @contextlib.asynccontextmanager
    async def at_work(self, *, every: Seconds = 5.0) -> AsyncIterator[asyncio.Task[None]]:
        """Deliver in the background, looking again every so many seconds; the task ends only by an error of the store."""
        work = asyncio.create_task(self._forever(every))
        try:
            yield work
        finally:
            work.cancel()
            await asyncio.wait([work])
        if not work.cancelled():
            work.result()

    async def _forever(self, every: Seconds) -> None:
        async def serve(sink: Sink) -> None:
            while True:
                await self._serve(sink)
                await asyncio.sleep(every)

        loops = [asyncio.create_task(serve(sink)) for sink in self._sinks]
        try:
            # Each has its own loop: one that takes its time keeps no other waiting. Without sinks, there is only waiting.
            await asyncio.gather(*loops, *([] if loops else [asyncio.get_running_loop().create_future()]))
        finally:
            for loop in loops:
                loop.cancel()
            if loops:
                await asyncio.wait(loops)

    async def deliver(self) -> None:
        """Tell each sink once what is due, for half a minute each at most. Raises StoreError."""
        done = await asyncio.gather(*map(self._serve, self._sinks), return_exceptions=True)
        for error in done:
            if error is not None:
                raise error

    async def look(self) -> list[Standing]:
        """How each sink does; nothing is changed."""
        found = []
        for sink in self._sinks:
            place = await self._place(sink)
            waiting, now = 0, place
            for number, event in await self._store.events_after(place.number, limit=1000):
                notice, now = consider(now, sink, number, event, self._period)
                waiting += notice is not None
            found.append(Standing(sink=sink.label, kind=sink.kind, waiting=waiting, place=place))
        return found

    async def tell(
        self, name: str, task: str, message: str, evidence: Mapping[str, Json], *, kind: str | None = None
    ) -> dict[str, str | None]:
        """Tell each sink (of that kind) something that is no event, once: what was in the way, by sink; None: nothing was."""
        notice = Notice(
            id=f"msg_{uuid.uuid4().hex}",
            name=name,
            severity="info",
            task=task,
            at=self._clock(),
            message=message,
            evidence=dict(evidence),
        )
        sinks = [sink for sink in self._sinks if kind in (None, sink.kind)]
        found = await asyncio.gather(*(send(sink, notice, self._clock()) for sink in sinks))
        return {sink.label: failure.problem if failure else None for sink, failure in zip(sinks, found, strict=True)}

    # --- one sink -----------------------------------------------------------------------------------------------------

    async def _serve(self, sink: Sink) -> None:
        place = await self._place(sink, keep=True)
        pause = place.retry_at - self._clock()
        if 0 < pause <= _DAY or not await self._store.events_after(place.number, limit=1):
            return  # a longer pause than any comes from a clock that was wrong
        name, seconds = _key(sink), _LEASE + sink.timeout
        lease = await self._store.acquire(name, self._owner, self._clock(), seconds)
        if lease is None:
            return  # another process is at it
        try:
            await self._tell(sink, lease, await self._place(sink))
        finally:
            await self._store.release(lease)

    async def _tell(self, sink: Sink, lease: Lease, place: Place) -> None:
        end = self._clock() + _SPELL
        while page := await self._store.events_after(place.number, limit=_PAGE):
            for number, event in page:
                notice, after = consider(place, sink, number, event, self._period)
                if notice is None:
                    place = after
                    continue
                now = self._clock()
                if now > end or await self._store.renew(lease, now, _LEASE + sink.timeout) is None:
                    return
                failure = await send(sink, notice, now)
                place = await self._after(sink, event, place, after, failure)
                await self._keep(sink, place)
                if failure is not None:
                    return
            await self._keep(sink, place)

    async def _after(self, sink: Sink, event: Event, before: Place, after: Place, failure: Failure | None) -> Place:
        """The place after a try. Whoever waits for others to be told of it is told by an event."""
        now = self._clock()
        if failure is None:
            if before.failed >= _STUCK:
                await self._say("ALERTS_RESUMED", sink, f"{before.since}", "takes alerts again")
            done = {"delivered": before.delivered + 1, "delivered_at": now}
            return after.model_copy(update=done | {"failed": 0, "since": None, "problem": None, "retry_at": 0.0})
        failed, since = before.failed + 1, now if before.since is None else before.since
        wait = min(_FIRST_WAIT * 2.0 ** min(before.failed, 20), _LONGEST_WAIT) * self._dice.uniform(0.5, 1.0)
        place, dropped = before, before.dropped
        if failed >= _STUCK and now - event.at > _KEEP:
            place, dropped = after, dropped + 1
            message = f"has not taken {event.name} of {event.task or 'no task'} for days; it is given up"
            await self._say("ALERTS_DROPPED", sink, f"{now // _DAY:.0f}", message)
        elif failed == _STUCK:
            await self._say(
                "ALERTS_STUCK", sink, f"{since}", f"has not taken an alert {failed} times: {failure.problem}"
            )
        tried = {"failed": failed, "since": since, "problem": failure.problem, "dropped": dropped}
        return place.model_copy(update=tried | {"retry_at": now + min(max(wait, failure.wait), _DAY)})

    async def _say(self, name: str, sink: Sink, key: str, message: str) -> None:
        await self._store.add_event(
            Event(
                name=name,
                task="",
                at=self._clock(),
                message=f"{sink.label} {message}",
                evidence={"sink": sink.label},
                key=f"{name}/{sink.label}/{key}",
            )
        )

    async def _place(self, sink: Sink, *, keep: bool = False) -> Place:
        """Where the sink is. A new one begins with the events of the last hour; with `keep`, from now on in any case."""
        if (saved := await self._store.load_state(_key(sink))) is not None:
            try:
                return Place.model_validate_json(saved[1])
            except ValidationError:  # of another format; its number is what nothing may be lost for
                return Place(number=saved[0])
        number, since = 0, self._clock() - _LOOK_BACK
        while page := await self._store.events_after(number, limit=_PAGE):
            old = [seen for seen, event in page if event.at < since]
            number = old[-1] if old else number
            if number < page[-1][0]:
                break
        place = Place(number=number)
        if keep:
            await self._keep(sink, place)
        return place

    async def _keep(self, sink: Sink, place: Place) -> None:
        await self._store.save_state(_key(sink), place.number, place.model_dump_json())


def _key(sink: Sink) -> str:
    """Under which a sink's place and lease are kept: no task can be called so."""
    return f"alerts:{sink.label}"


# --- what a sink is told ----------------------------------------------------------------------------------------------


def consider(place: Place, sink: Sink, number: int, event: Event, period: Seconds) -> tuple[Notice | None, Place]:
    """What the sink is to be told of the event, if anything, and its place once it was.

    The same event of the same task within `period` seconds is told once. What ends an alert that was told is told, too,
    whatever its severity; after it, the alert is news again.
    """
    if sink.tasks is not None and event.task not in sink.tasks:
        return None, place.model_copy(update={"number": number})
    told = {key: seen for key, seen in place.told.items() if event.at - seen.at < max(_FORGET, period)}
    ended = [key for key in told if _is_over(key, event)]
    for key in ended:
        del told[key]
    severity = EVENTS.get(event.name, "info")
    wanted = severity in sink.events or event.name in sink.events
    before = told.get(what := _what(event))
    if wanted and before is not None and abs(event.at - before.at) < period:
        told[what] = Told(before.at, before.again + 1)
        wanted = False
    elif wanted:
        told[what] = Told(event.at)
    after = place.model_copy(update={"number": number, "told": told})
    if not wanted and not ended:
        return None, after
    notice = Notice(
        id=_id(sink, number, event),
        name=event.name,
        severity=severity,
        task=event.task,
        at=event.at,
        message=event.message[:_LONGEST_TEXT],
        evidence={name: value for name, value in event.evidence.items() if _may_be_told(name, value)},
        recovered=tuple(key.split("/", 2)[1] for key in ended),
        repeated=0 if before is None else before.again,
    )
    return notice, after


def _what(event: Event) -> str:
    """The same for events that are told once."""
    about = (str(event.evidence.get(name, "")) for name in _ABOUT.get(event.name, ()))
    return f"{event.task}/{event.name}/{' '.join(about)}"


def _is_over(key: str, event: Event) -> bool:
    task, name, about = key.split("/", 2)
    end, of = event.name, _what(event).split("/", 2)[2]
    return task == event.task and name in ENDS.get(end, ()) and (not of or of == about)


def standing(event: Event, later: Iterable[Event]) -> Literal["open", "over"] | None:
    """Whether the alert is over, given every later event of its task; None where no event ever ends such a one."""
    if event.name not in _ENDABLE:
        return None
    what = _what(event)
    return "over" if any(_is_over(what, one) for one in later) else "open"


def _id(sink: Sink, number: int, event: Event) -> str:
    """The same whenever this event is sent to this sink, and for nothing else: receivers throw away what they know."""
    what = [sink.label, number, event.name, event.task, event.at, event.message, event.key]
    return f"msg_{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}"


def _may_be_told(name: str, value: Json) -> bool:
    """Numbers, counts by name, and names of ours; a text may be a customer's."""
    if isinstance(value, str):
        return name in _NAMES and len(value) <= 200
    if isinstance(value, dict):
        return name == "refused" and all(isinstance(count, int) for count in value.values())
    return value is None or isinstance(value, bool | int | float)


def generic(notice: Notice) -> dict[str, Json]:
    """The payload as Standard Webhooks recommend it: type, timestamp, data."""
    return {
        "type": f"apprentice.{notice.name.lower()}",
        "timestamp": datetime.fromtimestamp(notice.at, UTC).isoformat().replace("+00:00", "Z"),
        "data": notice.model_dump(mode="json", exclude={"id", "at"}),
    }


def slack(notice: Notice) -> dict[str, Json]:
    """The payload of Slack's incoming webhooks: one line of text, in which nothing is a link or a mention."""
    line = f"[{notice.severity}] {notice.name}" + (f" {notice.task}" if notice.task else "") + f": {notice.message}"
    if notice.recovered:
        line += f" (over: {', '.join(notice.recovered)})"
    if notice.repeated:
        line += f" ({notice.repeated} more since it was told last)"
    line = "".join(character if character.isprintable() else " " for character in line)
    return {"text": line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}


# --- telling it -------------------------------------------------------------------------------------------------------


async def send(sink: Sink, notice: Notice, now: Seconds) -> Failure | None:
    """Tell the sink once: None when it took the notice."""
    if isinstance(sink, Webhook):
        return await _post(sink, notice, now)
    line = json.dumps({"id": notice.id} | generic(notice)).encode() + b"\n"
    if isinstance(sink, File):
        return await asyncio.to_thread(_append, sink.path, line)
    assert isinstance(sink, Command)
    return await _run(sink, line)


async def _post(sink: Webhook, notice: Notice, now: Seconds) -> Failure | None:
    url = os.environ.get(sink.url_env, "")
    if problem := _wrong_address(url, sink):
        return Failure(problem)
    body = json.dumps(slack(notice) if sink.shape == "slack" else generic(notice)).encode()
    headers = {"content-type": "application/json", "webhook-id": notice.id, "webhook-timestamp": f"{now:.0f}"}
    if sink.secret_env is not None:
        try:
            secrets = os.environ.get(sink.secret_env, "").split()
            headers["webhook-signature"] = signature(secrets, notice.id, round(now), body)
        except ValueError as error:
            return Failure(f"the environment variable {sink.secret_env} {error}")
    client = wire.client(allow_internal=sink.allow_internal, connections=1)
    try:
        outcome = await wire.send(client, wire.Request(url, headers, body, sink.timeout, limit=_ANSWER))
    finally:
        await client.close()
    if outcome.status is None:
        return Failure(outcome.problem or "no answer")
    if 200 <= outcome.status < 300:
        return None
    # What the receiver says beside its status may be anything: it is neither kept nor shown.
    gone = _DAY if outcome.status == 410 else 0.0
    return Failure(f"the receiver answered {outcome.status}", max(gone, outcome.retry_after or 0.0))


def _wrong_address(url: str, sink: Webhook) -> str | None:
    """What is wrong with the address, without repeating it. Its host is checked where it is connected to."""
    if not url:
        return f"the environment variable {sink.url_env} is not set"
    try:
        parts = urlsplit(url)
        _ = parts.port
        wire.check_url(f"{parts.scheme}://{parts.netloc}", allow_internal=sink.allow_internal)
    except (ValueError, ConfigError):
        parts = None
    if parts is None or not url.isascii() or not url.isprintable() or " " in url or "\\" in url or parts.fragment:
        return f"what the environment variable {sink.url_env} holds is no address such as https://hooks.example.com/x"
    return None


def signature(secrets: Sequence[str], id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature`: one `v1,…` for each secret, so that a receiver that knows any of them is content.

    A secret is base64 of 24 to 64 bytes, usually with `whsec_` before it. Raises ValueError that does not repeat it.
    """
    found = []
    for secret in secrets:
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except ValueError:
            key = b""
        if not _SHORTEST_KEY <= len(key) <= _LONGEST_KEY:
            raise ValueError(f"holds no secret such as whsec_… with {_SHORTEST_KEY} to {_LONGEST_KEY} bytes in base64")
        mac = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, "sha256")
        found.append(f"v1,{base64.b64encode(mac).decode()}")
    if not found:
        raise ValueError("is not set")
    return " ".join(found)


def _append(path: Path, line: bytes) -> Failure | None:
    """Add a line to the file, on the disk when this returns. Half a line, left by a full disk, is closed first."""
    try:
        # Not waiting for a reader, should it be a pipe: that is refused below.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        file = os.open(path, flags, 0o600)
        try:
            state = os.fstat(file)
            if not stat.S_ISREG(state.st_mode):
                return Failure("it is no regular file")
            whole = state.st_size == 0 or os.pread(file, 1, state.st_size - 1) == b"\n"
            data = line if whole else b"\n" + line
            if os.write(file, data) < len(data):
                return Failure("the disk is full")
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        return Failure(f"cannot be written: {error.strerror}")
    return None


async def _run(sink: Command, line: bytes) -> Failure | None:
    """Run the command with the line on its standard input. It learns nothing of our environment but paths and language."""
    try:
        running = await asyncio.create_subprocess_exec(
            *sink.run,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=process.environment({}),
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return Failure(f"cannot be started: {getattr(error, 'strerror', None) or 'its arguments cannot be passed on'}")
    try:
        async with asyncio.timeout(sink.timeout):
            await running.communicate(line)
    except TimeoutError:
        return Failure(f"was not done within {sink.timeout:g} s")
    finally:
        if running.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            await running.wait()
    return Failure(f"ended with status {running.returncode}") if running.returncode else None
