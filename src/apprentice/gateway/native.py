"""The interface of our own: everything that `Apprentice` can do, one request each."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from apprentice import lineage
from apprentice.errors import ApprenticeError
from apprentice.gateway import HEADER
from apprentice.gateway.answers import as_json
from apprentice.gateway.conversation import Body, Number
from apprentice.gateway.desk import WORDS_A_MINUTE, Answered, Call, Gateway, Operation
from apprentice.gateway.refusals import Refusal
from apprentice.report import TaskStatus, status
from apprentice.types import Event, Forgotten, Json, Phase, Promotion, Reason, Seconds, Source, Version

_AT_ONCE = 16  # inputs of a batch that are worked on at the same time

type Tags = Annotated[dict[str, str], Field(max_length=32)]


class Run(Body):
    input: Any
    tags: Tags | None = None


class Ran(BaseModel):
    """An answer. `confidence` is the local model's; `cost_usd` is what the request cost, whoever answered."""

    output: Any
    source: Source
    request_id: str
    version: str | None
    confidence: float | None
    phase: Phase
    reason: Reason
    cost_usd: float


class Batch(Body):
    inputs: list[Any] = Field(min_length=1, max_length=1_000)
    tags: Tags | None = None


class Failed(BaseModel):
    code: str
    message: str
    param: str | None = None
    hint: str | None = None


class Item(BaseModel):
    """What became of one input: a result or an error."""

    result: Ran | None = None
    error: Failed | None = None


class Items(BaseModel):
    results: list[Item]


class Said(Body):
    """What is said about a request.

    `demonstration`: `value` is the output that would have been right. `approved`, `withdrawn`: `value` is true. `comment`:
    a text. Any other name is a metric of your own, with a number, a truth value or a text; it is kept, and decides nothing.
    """

    request_id: str = Field(min_length=1, max_length=100)
    metric_name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$")
    value: Any
    comment: str = Field(default="", max_length=10_000)


class Heard(BaseModel):
    """The same word twice is said once, and has the same `feedback_id`."""

    feedback_id: str
    request_id: str
    task: str
    metric_name: str


class Offered(BaseModel):
    name: str
    description: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]


class Tasks(BaseModel):
    tasks: list[Offered]


class Statuses(BaseModel):
    tasks: list[TaskStatus]


class Made(Version):
    """A version without the table of its confidences; `tainted`: it learned from what was taken back since."""

    tainted: bool = False


class Change(BaseModel):
    number: int
    version: str
    state: str
    after: int
    at: Seconds
    by: str
    why: str


class Versions(BaseModel):
    versions: list[Made]
    history: list[Change]


class Wanted(Body):
    version: str = Field(min_length=1, max_length=64)
    why: str = Field(default="", max_length=1_000)


class Back(Body):
    version: str | None = Field(default=None, min_length=1, max_length=64)
    why: str = Field(default="", max_length=1_000)


class ModeWanted(Body):
    mode: Literal["remote", "auto"]
    seconds: Annotated[Number, Field(gt=0, le=10 * 365 * 86_400)] | None = None


class ModeSet(BaseModel):
    task: str
    mode: Literal["remote", "auto"]
    seconds: float | None


class Whom(Body):
    """Of one task, or of all. `dry_run`: nothing is erased, only counted."""

    subject: Annotated[str, Field(min_length=1, max_length=1000)]
    task: str | None = None
    dry_run: bool = False


class Erased(BaseModel):
    dry_run: bool
    erased: list[Forgotten]


async def run(gateway: Gateway, call: Call) -> Response:
    answered = await gateway.answer(_tagged(call), call.path["name"], call.body.input, param="input")
    lines = [*answered.lines, (b"x-request-id", answered.request_id.encode())]
    return as_json(_ran(answered).model_dump(), lines)


def _tagged(call: Call) -> Call:
    """The call with the tags of its body besides those of its headers."""
    return call._replace(tags={**(call.body.tags or {}), **call.tags})


def _ran(answered: Answered) -> Ran:
    result = answered.result
    assert result is not None  # it was a task's
    return Ran(
        output=result.output,
        source=result.source,
        request_id=result.request_id,
        version=result.version,
        confidence=result.confidence,
        phase=result.decision.phase,
        reason=result.decision.reason,
        cost_usd=result.cost / 1e6,
    )


async def batch(gateway: Gateway, call: Call) -> Response:
    """Each input is a request of its own; one that fails leaves the others alone."""
    task = gateway.config.task(call.path["name"]).name
    call = _tagged(call)
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int, input: Json) -> Item:
        async with slots:
            try:
                answered = await gateway.answer(call, task, input, param=f"inputs[{number}]", name=str(number))
            except Refusal as refusal:
                error = Failed(code=refusal.code, message=refusal.message, param=refusal.param, hint=refusal.hint)
                return Item(error=error)
            return Item(result=_ran(answered))

    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(one(number, input)) for number, input in enumerate(call.body.inputs)]
    items = Items(results=[task.result() for task in asked])
    cost = sum(item.result.cost_usd for item in items.results if item.result is not None)
    return JSONResponse(items.model_dump(), headers={f"{HEADER}cost-usd": f"{cost:.6f}"})


async def feedback(gateway: Gateway, call: Call) -> Response:
    body: Said = call.body
    if not gateway.pace.take(call.key.id, time.monotonic()):
        message = f"a key may give feedback {WORDS_A_MINUTE} times a minute"
        raise Refusal(429, "too_much_feedback", message, wait=1.0, retryable=True)
    if body.metric_name in ("approved", "withdrawn") and body.value is not True:
        raise Refusal(400, "invalid_request", f"value: should be true for {body.metric_name}", param="value")
    by, comment = f"key:{call.key.name}", body.comment
    try:
        match body.metric_name:
            case "demonstration":
                if body.value is None:
                    raise Refusal(400, "invalid_request", "value: should be the output that is right", param="value")
                said = await gateway.app.afeedback(body.request_id, corrected=body.value, by=by, comment=comment)
                task = said.task
            case "approved":
                task = (await gateway.app.afeedback(body.request_id, by=by, comment=comment)).task
            case "withdrawn":
                said = await gateway.app.afeedback(body.request_id, withdrawn=True, by=by, comment=comment)
                task = said.task
            case _:
                task = await _note(gateway, body, by)
    except ApprenticeError as error:
        raise gateway.refusal(error, "", param="value") from error
    heard = Heard(feedback_id=_id(body), request_id=body.request_id, task=task, metric_name=body.metric_name)
    return JSONResponse(heard.model_dump())


async def _note(gateway: Gateway, body: Said, by: str) -> str:
    """Keep a comment or a metric of the client's as an Event, once; the task that the request was about."""
    wanted = str if body.metric_name == "comment" else (str, int, float, bool)
    if not isinstance(body.value, wanted) or len(str(body.value)) > 10_000:
        kinds = "a text" if body.metric_name == "comment" else "a number, true, false or a text"
        raise Refusal(400, "invalid_request", f"value: should be {kinds} of at most 10,000 characters", param="value")
    record = await gateway.store.record(body.request_id)
    if record is None:
        raise Refusal(404, "request_not_found", f"no request {body.request_id!r} is recorded", param="request_id")
    event = Event(
        name="FEEDBACK",
        task=record.task,
        at=time.time(),
        message=f"{body.metric_name} about request {record.request_id}, by {by}",
        evidence={"request": record.request_id, "metric": body.metric_name, "value": body.value, "by": by},
        key=f"FEEDBACK/{_id(body)}",
    )
    await gateway.store.add_event(event)
    return record.task


def _id(body: Said) -> str:
    said = json.dumps([body.request_id, body.metric_name, body.value, body.comment], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:24]


async def tasks(gateway: Gateway, call: Call) -> Response:
    offered = [
        Offered(
            name=task.name,
            description=task.description,
            input_schema=task.task.input_schema,
            output_schema=task.task.output_schema,
        )
        for task in gateway.config.tasks
    ]
    return JSONResponse(Tasks(tasks=offered).model_dump())


async def all_status(gateway: Gateway, call: Call) -> Response:
    found = await status(gateway.config, gateway.store, now=time.time())
    return JSONResponse({"tasks": [_shown(task) for task in found]})


async def one_status(gateway: Gateway, call: Call) -> Response:
    name = gateway.config.task(call.path["name"]).name
    found = await status(gateway.config, gateway.store, now=time.time())
    return JSONResponse(next(_shown(task) for task in found if task.task == name))


def _shown(task: TaskStatus) -> dict[str, Any]:
    return task.model_dump(mode="json", exclude={"version": {"metrics": {"confidences"}}})


async def versions(gateway: Gateway, call: Call) -> Response:
    found = await lineage.read(gateway.store, gateway.config.task(call.path["name"]).name)
    made = [_made(version, tainted=version.id in found.tainted) for version in found.versions]
    history = [_change(promotion) for promotion in found.history]
    return JSONResponse(Versions(versions=made, history=history).model_dump(mode="json"))


def _made(version: Version, *, tainted: bool = False) -> Made:
    metrics = {name: value for name, value in version.metrics.items() if name != "confidences"}
    return Made(**version.model_dump(exclude={"metrics"}), metrics=metrics, tainted=tainted)


def _change(promotion: Promotion) -> Change:
    return Change(**{name: value for name, value in promotion._asdict().items() if name != "task"})


async def promote(gateway: Gateway, call: Call) -> Response:
    return await _changed(gateway, call, "apromote")


async def rollback(gateway: Gateway, call: Call) -> Response:
    return await _changed(gateway, call, "arollback")


async def _changed(gateway: Gateway, call: Call, how: Literal["apromote", "arollback"]) -> Response:
    """The champion after the change. 404 for a version that there is not, 409 for one that cannot serve."""
    task, version = gateway.config.task(call.path["name"]).name, call.body.version
    known = [one.id for one in await gateway.app.aversions(task)]
    if version is not None and version not in known:
        message = f"task {task!r} has no version {version!r}; it has {', '.join(known) or 'none'}"
        raise Refusal(404, "version_not_found", message, param="version")
    change = getattr(gateway.app, how)
    made = await change(task, version, by=f"key:{call.key.name}", why=call.body.why)
    return JSONResponse(_made(made).model_dump(mode="json"))


async def mode(gateway: Gateway, call: Call) -> Response:
    body: ModeWanted = call.body
    if body.mode == "auto" and body.seconds is not None:
        raise Refusal(400, "invalid_request", "seconds: is for remote only", param="seconds")
    task = gateway.config.task(call.path["name"]).name
    seconds = None if body.seconds is None else float(body.seconds)
    await gateway.app.mode(task, body.mode, seconds=seconds)
    return JSONResponse(ModeSet(task=task, mode=body.mode, seconds=seconds).model_dump())


async def erase(gateway: Gateway, call: Call) -> Response:
    body: Whom = call.body
    found = await gateway.app.aerase(body.subject, task=body.task, dry_run=body.dry_run)
    return JSONResponse(Erased(dry_run=body.dry_run, erased=found).model_dump(mode="json"))


def _empty(gateway: Gateway) -> Json:
    return dict.fromkeys(gateway.config.tasks[0].task.input_schema.get("properties", {}), "…")


OPERATIONS = (
    Operation("GET", "/v1/tasks", "any", tasks, "The tasks and their schemas", gives=Tasks),
    Operation(
        "POST", "/v1/tasks/{name}/run", "call", run, "Answer one input", takes=Run, gives=Ran,
        examples=lambda gateway: {"input": _empty(gateway)},
    ),
    Operation(
        "POST", "/v1/tasks/{name}/batch", "call", batch, "Answer many inputs", takes=Batch, gives=Items,
        examples=lambda gateway: {"inputs": [_empty(gateway)]},
    ),
    Operation("POST", "/v1/feedback", "feedback", feedback, "Say what is right", takes=Said, gives=Heard),
    Operation("GET", "/v1/status", "operate", all_status, "Where each task stands", gives=Statuses),
    Operation("GET", "/v1/tasks/{name}/status", "operate", one_status, "Where one task stands", gives=TaskStatus),
    Operation("GET", "/v1/tasks/{name}/versions", "operate", versions, "Versions and their history", gives=Versions),
    Operation(
        "POST", "/v1/tasks/{name}/promote", "operate", promote, "Serve this version", takes=Wanted, gives=Made
    ),
    Operation(
        "POST", "/v1/tasks/{name}/rollback", "operate", rollback, "Serve a former version", takes=Back, gives=Made
    ),
    Operation(
        "POST", "/v1/tasks/{name}/mode", "operate", mode, "Let the remote alone answer", takes=ModeWanted, gives=ModeSet
    ),
    Operation("POST", "/v1/erase", "operate", erase, "Erase what a subject said", takes=Whom, gives=Erased),
)  # fmt: skip
