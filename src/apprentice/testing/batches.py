"""What providers do with work that can wait: the three batch interfaces, over jobs that a test drives.

Nothing happens by the clock: a batch ends after so many looks at it. Its requests are answered, and billed, when it ends.

Sources: https://platform.openai.com/docs/api-reference/batch and …/files, …/en/api/creating-message-batches of
https://docs.anthropic.com, https://ai.google.dev/api/batch-api, and the types of the official SDKs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from email.parser import BytesParser
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from apprentice.testing.formats import Format
from apprentice.types import Json


@dataclass(slots=True)
class Batching:
    """How a server treats batches. A test sets it as `server.batching`, or changes it.

    `looks`: how many looks at a batch find it under way. `end`: how it ends then; an expired one has `answered` of its
    requests answered, one that was cancelled, too. `lost`: creations from now on whose answer is lost after the batch is
    made. `refused`: statuses and codes with which creations from now on are turned away. `unlisted`: how many of its
    last requests the results leave out.
    """

    looks: int = 1
    end: Literal["completed", "failed", "expired"] = "completed"
    answered: int = 0
    lost: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)
    unlisted: int = 0


class Worked(NamedTuple):
    """What became of one request in a batch: its status, and the body that it would have had on its own."""

    status: int
    body: dict[str, Json]


type Work = Callable[[dict[str, Json]], Awaitable[Worked]]  # answers one request, and puts it on the bill


class Told(NamedTuple):
    """An answer of the counter. `lost`: the connection is cut before it."""

    status: int
    body: bytes
    code: str = ""
    lost: bool = False


@dataclass(slots=True)
class Job:
    """One batch at the provider."""

    id: str
    name: str
    requests: list[tuple[str, dict[str, Json]]]
    created: float = field(default_factory=time.time)
    looks: int = 0
    cancelled: bool = False
    state: str = "running"
    problem: str = ""
    model: str = ""
    file: str = ""
    url: str = ""
    results: list[tuple[str, Worked | None]] = field(default_factory=list)  # None: not answered before the end


class Counter:
    """Where one provider takes batches. `jobs` grows with each batch that was made."""

    paths: re.Pattern[str]

    def __init__(self, wire: Format, work: Work) -> None:
        self.jobs: list[Job] = []
        self._wire = wire
        self._work = work

    def takes(self, target: str) -> bool:
        """Whether this is an address of the batch interface."""
        return self.paths.fullmatch(urlsplit(target).path) is not None

    async def serve(
        self, batching: Batching, method: str, target: str, headers: Mapping[str, str], raw: bytes, host: str
    ) -> Told:
        """The answer to one request at such an address. `host`: where the server is, for addresses that it tells."""
        raise LookupError(target)

    def _made(self, batching: Batching, job: Job, told: dict[str, Json]) -> Told:
        if batching.refused:
            status, code = batching.refused.pop(0)
            return Told(status, b"", code)
        self.jobs.append(job)
        lost = batching.lost > 0
        batching.lost -= lost
        return Told(200, _json(told), lost=lost)

    def _job(self, id: str) -> Job | None:
        return next((job for job in self.jobs if job.id == unquote(id)), None)

    def _unknown(self) -> Told:
        return Told(self._wire.unknown_path[0], b"", self._wire.unknown_path[1])

    def _malformed(self) -> Told:
        return Told(self._wire.malformed[0], b"", self._wire.malformed[1])

    def _page(self, target: str, cursor: str, size: str) -> tuple[list[Job], bool]:
        """The newest jobs after the one that the cursor names, and whether there are more."""
        query = parse_qs(urlsplit(target).query)
        newest = self.jobs[::-1]
        names = [job.id for job in newest]
        after = query.get(cursor, [""])[0]
        start = names.index(after) + 1 if after in names else 0
        end = start + int(query.get(size, ["20"])[0])
        return newest[start:end], end < len(newest)

    async def _look(self, batching: Batching, job: Job) -> None:
        """One more look at a job, which may be the one that finds it ended."""
        job.looks += 1
        if job.state != "running" or (job.looks <= batching.looks and not job.cancelled):
            return
        job.state = "cancelled" if job.cancelled else batching.end
        if job.problem:
            job.state = "failed"
        most = len(job.requests) if job.state == "completed" else batching.answered if job.state != "failed" else 0
        for number, (key, body) in enumerate(job.requests):
            job.results.append((key, await self._work(body) if number < most else None))
        if batching.unlisted:
            del job.results[-batching.unlisted :]
        job.results.reverse()  # results are in no order that anybody promises


class _OpenAI(Counter):
    """A file, a batch of it, and two files with what came of it."""

    paths = re.compile(r"/v1/(files|batches)(/[^/]+)?(/content|/cancel)?")
    own = "/v1/chat/completions"

    def __init__(self, wire: Format, work: Work) -> None:
        super().__init__(wire, work)
        self._files: dict[str, bytes] = {}

    async def serve(
        self, batching: Batching, method: str, target: str, headers: Mapping[str, str], raw: bytes, host: str
    ) -> Told:
        parts = urlsplit(target).path.split("/")[2:]
        match method, parts:
            case "POST", ["files"]:
                return self._upload(headers, raw)
            case "GET", ["files", id, "content"] if id in self._files:
                return Told(200, self._files[id])
            case "POST", ["batches"]:
                return self._create(batching, raw)
            case "GET", ["batches"]:
                page, more = self._page(target, "after", "limit")
                told = {"object": "list", "data": [self._told(job) for job in page], "has_more": more}
                ends = {"first_id": page[0].id, "last_id": page[-1].id} if page else {}
                return Told(200, _json(told | ends))
            case "GET", ["batches", id] if job := self._job(id):
                await self._look(batching, job)
                return Told(200, _json(self._told(job)))
            case "POST", ["batches", id, "cancel"] if job := self._job(id):
                job.cancelled = True
                return Told(200, _json(self._told(job)))
        return self._unknown()

    def _upload(self, headers: Mapping[str, str], raw: bytes) -> Told:
        head = f"content-type: {headers.get('content-type', '')}\r\n\r\n".encode()
        form = BytesParser().parsebytes(head + raw)
        given = {part.get_param("name", header="content-disposition"): part for part in form.walk()}
        file = given.get("file")
        if not form.is_multipart() or file is None or _text(given.get("purpose")) != b"batch":
            return self._malformed()
        id = f"file-{len(self._files)}"
        self._files[id] = _text(file)
        told = {"id": id, "object": "file", "bytes": len(self._files[id]), "created_at": 0, "purpose": "batch"}
        return Told(200, _json(told | {"filename": file.get_filename(), "status": "processed"}))

    def _create(self, batching: Batching, raw: bytes) -> Told:
        asked = _object(raw)
        file, url = asked.get("input_file_id"), asked.get("endpoint")
        if file not in self._files or url != self.own or asked.get("completion_window") != "24h":
            return self._malformed()
        metadata = asked.get("metadata") or {}
        job = Job(f"batch_{len(self.jobs)}", metadata.get("apprentice", ""), [], file=file, url=url)
        for number, text in enumerate(self._files[file].splitlines(), start=1):
            line = _object(text)
            key, body = line.get("custom_id", ""), line.get("body", {})
            fits = line.get("method") == "POST" and line.get("url") == url and self._is_request(body)
            if not fits or not key or key in dict(job.requests):
                job.problem = f"line {number} is no request"  # found when it is validated, not before
                break
            job.requests.append((key, body))
        return self._made(batching, job, self._told(job))

    def _is_request(self, body: dict[str, Json]) -> bool:
        return self._wire.is_valid(body) and bool(self._wire.limit(body)) and not body.get("stream")

    def _told(self, job: Job) -> dict[str, Json]:
        status = {"running": "validating" if job.looks == 0 else "in_progress"}.get(job.state, job.state)
        if job.cancelled and job.state == "running":
            status = "cancelling"
        good = [line for key, line in job.results if line is not None and line.status < 300]
        told: dict[str, Json] = {
            "id": job.id,
            "object": "batch",
            "endpoint": job.url,
            "input_file_id": job.file,
            "completion_window": "24h",
            "created_at": int(job.created),
            "status": status,
            "metadata": {"apprentice": job.name} if job.name else None,
            "request_counts": {"total": len(job.requests), "completed": len(good), "failed": 0},
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
        }
        if job.problem and job.state == "failed":
            error = {"code": "invalid_request", "message": job.problem, "line": None, "param": None}
            told["errors"] = {"object": "list", "data": [error]}
        elif job.state not in ("running", "failed"):
            told |= self._written(job)
        return told

    def _written(self, job: Job) -> dict[str, Json]:
        """The names of the two files of a job that has ended; one without a line does not exist."""
        output: list[Json] = []
        errors: list[Json] = []
        why = {"cancelled": "batch_cancelled"}.get(job.state, "batch_expired")
        for number, (key, worked) in enumerate(job.results):
            line: dict[str, Json] = {"id": f"batch_req_{number}", "custom_id": key, "response": None, "error": None}
            if worked is None:
                errors.append(line | {"error": {"code": why, "message": "not answered in time"}})
                continue
            response = {"status_code": worked.status, "request_id": f"req_{number}", "body": worked.body}
            (output if worked.status < 300 else errors).append(line | {"response": response})
        names: dict[str, Json] = {}
        for kind, lines in (("output", output), ("error", errors)):
            if lines:
                names[f"{kind}_file_id"] = f"file-{job.id}-{kind}"
                self._files[f"file-{job.id}-{kind}"] = b"\n".join(map(_json, lines)) + b"\n"
        return names


class _Responses(_OpenAI):
    own = "/v1/responses"


class _Anthropic(Counter):
    """Requests in the body, results in a file of their own. Batches have no names."""

    paths = re.compile(r"/v1/messages/batches(/[^/]+)?(/results|/cancel)?")

    async def serve(
        self, batching: Batching, method: str, target: str, headers: Mapping[str, str], raw: bytes, host: str
    ) -> Told:
        parts = urlsplit(target).path.split("/")[4:]
        match method, parts:
            case "POST", []:
                return self._create(batching, raw, host)
            case "GET", []:
                page, more = self._page(target, "after_id", "limit")
                told = {"data": [self._told(job, host) for job in page], "has_more": more}
                ends = {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
                return Told(200, _json(told | ends))
            case "GET", [id] if job := self._job(id):
                await self._look(batching, job)
                return Told(200, _json(self._told(job, host)))
            case "GET", [id, "results"] if (job := self._job(id)) and job.state != "running":
                return Told(200, b"".join(_json(self._line(job, *result)) + b"\n" for result in job.results))
            case "POST", [id, "cancel"] if job := self._job(id):
                job.cancelled = True
                return Told(200, _json(self._told(job, host)))
        return self._unknown()

    def _create(self, batching: Batching, raw: bytes, host: str) -> Told:
        requests = _object(raw).get("requests")
        if not isinstance(requests, list) or not requests:
            return self._malformed()
        job = Job(f"msgbatch_{len(self.jobs)}", "", [])
        for one in requests:
            key, body = one.get("custom_id", ""), one.get("params", {})
            fits = self._wire.is_valid(body) and self._wire.limit(body) and not body.get("stream")
            if not re.fullmatch("[a-zA-Z0-9_-]{1,64}", key) or key in dict(job.requests) or not fits:
                return self._malformed()
            job.requests.append((key, body))
        return self._made(batching, job, self._told(job, host))

    def _line(self, job: Job, key: str, worked: Worked | None) -> dict[str, Json]:
        if worked is None:
            result: dict[str, Json] = {"type": "canceled" if job.state == "cancelled" else "expired"}
        elif worked.status < 300:
            result = {"type": "succeeded", "message": worked.body}
        else:
            result = {"type": "errored", "error": worked.body}
        return {"custom_id": key, "result": result}

    def _told(self, job: Job, host: str) -> dict[str, Json]:
        ended = job.state != "running"
        kinds = [self._line(job, *result)["result"]["type"] for result in job.results]
        counts = {kind: kinds.count(kind) for kind in ("succeeded", "errored", "canceled", "expired")}
        return {
            "id": job.id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "canceling" if job.cancelled else "in_progress",
            "request_counts": counts | {"processing": len(job.requests) - len(job.results)},
            "created_at": _moment(job.created),
            "expires_at": _moment(job.created + 86_400),
            "ended_at": _moment(job.created) if ended else None,
            "archived_at": None,
            "cancel_initiated_at": _moment(job.created) if job.cancelled else None,
            "results_url": f"{host}/v1/messages/batches/{job.id}/results" if ended else None,
        }


class _Google(Counter):
    """An operation that holds the requests, and then the answers. One that did not succeed holds none."""

    paths = re.compile(r"/v1(?:beta)?/(models/[^/:]+:batchGenerateContent|batches(/[^/:]+(:cancel)?)?)")

    async def serve(
        self, batching: Batching, method: str, target: str, headers: Mapping[str, str], raw: bytes, host: str
    ) -> Told:
        kind, *rest = urlsplit(target).path.split("/")[2:]
        match method, kind, rest:
            case "POST", "models", [name]:
                return self._create(batching, raw, unquote(name.partition(":")[0]))
            case "GET", "batches", []:
                page, more = self._page(target, "pageToken", "pageSize")
                told: dict[str, Json] = {"operations": [self._told(job) for job in page]} if page else {}
                return Told(200, _json(told | ({"nextPageToken": page[-1].id} if more else {})))
            case "GET", "batches", [id] if job := self._job(f"batches/{id}"):
                await self._look(batching, job)
                return Told(200, _json(self._told(job)))
            case "POST", "batches", [id] if job := self._job(f"batches/{id.removesuffix(':cancel')}"):
                job.cancelled = True
                return Told(200, b"{}")
        return self._unknown()

    def _create(self, batching: Batching, raw: bytes, model: str) -> Told:
        batch = _object(raw).get("batch")
        given = batch if isinstance(batch, dict) else {}
        inlined = given.get("inputConfig", {}).get("requests", {}).get("requests", [])
        job = Job(f"batches/{len(self.jobs)}", given.get("displayName", ""), [], model=model)
        for number, one in enumerate(inlined):
            body = one.get("request", {})
            if not self._wire.is_valid(body) or not self._wire.limit(body):
                return self._malformed()
            job.requests.append((one.get("metadata", {}).get("key", str(number)), body))
        return self._made(batching, job, self._told(job)) if inlined and job.name else self._malformed()

    def _told(self, job: Job) -> dict[str, Json]:
        state = {"running": "PENDING" if job.looks == 0 else "RUNNING", "completed": "SUCCEEDED"}
        metadata: dict[str, Json] = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "model": f"models/{job.model}",
            "displayName": job.name,
            "createTime": _moment(job.created),
            "state": f"BATCH_STATE_{state.get(job.state, job.state.upper())}",
            "name": job.id,
        }
        told: dict[str, Json] = {"name": job.id, "metadata": metadata}
        if job.state == "completed":
            answers = {"inlinedResponses": {"inlinedResponses": [self._line(*one) for one in job.results[::-1]]}}
            metadata["output"] = answers
            told |= {"done": True, "response": answers}
        elif job.state != "running":
            told |= {"done": True, "error": {"code": 13, "message": f"the batch is {job.state}"}}
        return told

    def _line(self, key: str, worked: Worked | None) -> dict[str, Json]:
        assert worked is not None  # only a batch that succeeded is told line by line
        metadata = {"metadata": {"key": key}}
        return metadata | ({"response": worked.body} if worked.status < 300 else {"error": worked.body["error"]})


COUNTERS: Mapping[str, type[Counter]] = {
    "openai": _OpenAI,
    "responses": _Responses,
    "anthropic": _Anthropic,
    "google": _Google,
}


def _text(part: Message | None) -> bytes:
    content = None if part is None else part.get_payload(decode=True)
    return content if isinstance(content, bytes) else b""


def _json(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _object(raw: bytes) -> dict[str, Json]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()
