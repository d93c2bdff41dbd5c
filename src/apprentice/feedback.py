"""What people say about answers: corrections and approvals, which become gold, and can be taken back.

The last word about a request counts. A correction replaces the target that a model gave for that input, weighs more than
any model's label, and is what a candidate is examined against. Nothing is overwritten: the store keeps every word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal

from apprentice import privacy
from apprentice.config import Config, TaskConfig
from apprentice.errors import InvalidAnswer, InvalidInput, InvalidRequest, UnknownRequest
from apprentice.types import Correction, Event, Json, Record, Seconds, Store

_LONGEST = 10_000  # characters of a comment, or of a name
_LARGEST = 1_000_000  # bytes of a correction, as JSON


async def give(
    config: Config,
    store: Store,
    request_id: str,
    action: Literal["corrected", "approved", "withdrawn"],
    *,
    at: Seconds,
    target: Json = None,
    by: str = "",
    comment: str = "",
) -> Correction:
    """What is now said about the request, durable. The same word twice is said once.

    "corrected" needs the right output as `target`; "approved" makes the served output gold; "withdrawn" takes back what
    was said before. Versions that learned from a word that is no longer true are marked by the event VERSION_TAINTED.
    Raises UnknownRequest, InvalidInput that names the field, InvalidRequest where there is nothing to approve or withdraw.
    """
    record = await store.record(request_id)
    if record is None:
        raise UnknownRequest(f"no request {request_id[:80]!r} is recorded")
    task = config.task(record.task)
    if record.input is None:
        raise InvalidRequest(f"request {request_id!r} was not captured: there is nothing that could be learned from it")
    for name, text in (("by", by), ("comment", comment)):
        if len(text) > _LONGEST:
            raise InvalidInput(f"{name}: has {len(text):,} characters; {_LONGEST:,} are allowed")
    before = current(await store.corrections(task.name, request_id=request_id)).get(request_id)
    if action == "withdrawn":
        if before is None:
            raise InvalidRequest(f"nobody has corrected or approved request {request_id!r}")
        target = None
    else:
        target = _target(task, record, target, approved=action == "approved")
        veil = privacy.Veil(privacy.redactor(config, task))
        target, comment = veil.hide(target), veil.hide(comment)
        if before is not None and (before.action, before.target) == (action, target):
            return before
    made = Correction(
        request_id=request_id, task=task.name, at=at, action=action, target=target, by=by, comment=comment
    )
    await store.add_correction(made)
    if before is not None and before.target != target:
        await _taint(store, made)
    return made


def current(said: Iterable[Correction]) -> dict[str, Correction]:
    """What stands, by request: the last word, unless it took back what was said.

    >>> one = Correction(request_id="r", task="t", at=1.0, action="corrected", target="a")
    >>> list(current([one])), list(current([one, one.model_copy(update={"action": "withdrawn"})]))
    (['r'], [])
    """
    last = {correction.request_id: correction for correction in said}
    return {request: word for request, word in last.items() if word.action != "withdrawn"}


async def known(store: Store, task: str) -> int:
    """From how many labels a task could learn: the remote's, people's, teachers', and those that were imported."""
    labels = sum(label.answer is not None for label in await store.labels(task))
    recorded = await store.count(task, labelled=True) + await store.count_examples(task)
    return recorded + len(current(await store.corrections(task))) + labels


def _target(task: TaskConfig, record: Record, target: Json, *, approved: bool) -> Json:
    if approved:
        answer = record.remote if record.served == "remote" else record.local
        if record.served is None or answer is None:
            raise InvalidRequest(f"request {record.request_id!r} was not answered: there is nothing to approve")
        return answer.output
    try:
        size = len(json.dumps(target, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"corrected: is not JSON: {type(error).__name__}") from error
    if size > _LARGEST:
        raise InvalidInput(f"corrected: is {size:,} bytes; {_LARGEST:,} are allowed")
    try:
        return task.validate_output(target)
    except InvalidAnswer as error:
        raise InvalidInput(f"corrected: {error}", hint="give the whole output, as the output_schema has it") from error


async def _taint(store: Store, said: Correction) -> None:
    """Mark the versions that learned what is no longer said."""
    for version in await store.versions(said.task):
        if said.request_id not in version.metrics.get("gold", []):
            continue
        event = Event(
            name="VERSION_TAINTED",
            task=said.task,
            at=said.at,
            message=f"{version.id} learned from a correction of request {said.request_id} that was changed or withdrawn since",
            evidence={"version": version.id, "request": said.request_id},
            key=f"VERSION_TAINTED/{version.id}/{said.request_id}/{said.at}",
        )
        await store.add_event(event)
