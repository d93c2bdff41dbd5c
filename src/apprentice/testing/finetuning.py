"""Fine-tuning services on loopback: OpenAI's and Fireworks' wires, and what goes wrong on them, scripted.

    with serve_openai_tuning() as service:
        trainer = plugins.build("trainers", "openai", model="m", base_url=service.url, allow_internal=True, …)

It runs in threads of its own, because trainers block. A job ends after so many looks, nothing happens by the clock. The
model that comes of it has learned: it answers chat completions with the target whose inputs share most words with what is
asked. Shapes follow the providers' API references (see the trainers `openai` and `fireworks`).
"""

from __future__ import annotations

import json
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from apprentice.types import Json, Micros

__all__ = ["Asked", "Service", "TunedJob", "serve_fireworks_tuning", "serve_openai_tuning"]


class Asked(NamedTuple):
    """One request that arrived whole."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class TunedJob:
    """One job at the provider."""

    id: str
    name: str
    asked: dict[str, Json]
    rows: list[dict[str, Json]]
    looks: int = 0
    state: str = "running"
    cancelled: bool = False

    @property
    def tokens(self) -> int:
        """Four bytes a token, rounded up, of every epoch: what is trained on, and paid for."""
        return sum(-(-len(json.dumps(row, ensure_ascii=False).encode()) // 4) for row in self.rows) * self.epochs

    @property
    def epochs(self) -> int:
        hyper = self.asked.get("method", {}).get("supervised", {}).get("hyperparameters", {})
        return int(self.asked.get("epochs") or hyper.get("n_epochs") or 1)


@dataclass(slots=True)
class Service:
    """A running service. A test reads and changes it.

    `looks`: how many looks at a job find it under way. `end`: how it ends then. `lost`: parts of a path, each with how
    many answers to a POST there are lost after the work was done. `refused`: statuses with which the next requests are
    turned away. `hidden`: so many searches do not show the jobs yet. `uncounted`: tokens are not told. `broken`: the
    error that a failed job tells. `told_files`: what the adapter's addresses are said to be, instead of true ones;
    `adapter`: its files. `before` and `after` are called with the number of each request, when it has arrived and when
    it was worked on, before the answer leaves.
    """

    price: Micros = 3_000_000  # micro-dollars for a million tokens
    key: str = ""
    looks: int = 1
    end: Literal["succeeded", "failed", "cancelled"] = "succeeded"
    lost: Counter[str] = field(default_factory=Counter)
    refused: list[int] = field(default_factory=list)
    hidden: int = 0
    uncounted: bool = False
    broken: dict[str, Json] = field(
        default_factory=lambda: {"code": "server_error", "message": "it broke", "param": None}
    )
    told_files: dict[str, str] | None = None
    adapter: dict[str, bytes] = field(default_factory=dict)
    before: Callable[[int], None] = lambda number: None
    after: Callable[[int], None] = lambda number: None
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    jobs: list[TunedJob] = field(default_factory=list)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # by id: name and content
    creations: int = 0  # that arrived, also those that made nothing
    faults: list[str] = field(default_factory=list)  # of the service itself: requests that it did not understand

    @property
    def bill(self) -> Micros:
        """What the provider charges for the jobs that trained, in micro-dollars, rounded up a job."""
        return sum(math.ceil(job.tokens * self.price / 1_000_000) for job in self.jobs if job.state == "succeeded")

    def posts(self, part: str) -> int:
        """How many POST requests had that in their path."""
        return sum(asked.method == "POST" and part in asked.path for asked in self.asked)


class _Told(NamedTuple):
    status: int
    body: bytes


class _Wire:
    """One provider's words. Requests are worked on one at a time."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.lock = threading.Lock()

    def respond(self, asked: Asked) -> _Told | None:
        """The answer; None: it is lost."""
        with self.lock:
            service = self.service
            service.asked.append(asked)
            number = len(service.asked)
            service.before(number)
            signed = asked.path.startswith("/signed/")
            if service.key and not signed and asked.headers.get("authorization") != f"Bearer {service.key}":
                return _error(401, "invalid_api_key", f"wrong key: {asked.headers.get('authorization', '')}")
            if service.refused and not signed:
                return _error(service.refused.pop(0), "scripted", "turned away")
            told = self.serve(asked)
            service.after(number)
            for part in service.lost:
                if asked.method == "POST" and part in asked.path and service.lost[part] > 0:
                    service.lost[part] -= 1
                    return None
            return told

    def serve(self, asked: Asked) -> _Told:
        raise LookupError(asked.path)

    def look(self, job: TunedJob) -> None:
        """One more look at a job, which may be the one that finds it ended."""
        job.looks += 1
        if job.state == "running" and (job.cancelled or job.looks > self.service.looks):
            job.state = "cancelled" if job.cancelled else self.service.end

    def completed(self, body: dict[str, Json]) -> _Told:
        job = next(
            (job for job in self.service.jobs if job.state == "succeeded" and self.name_of(job) == body["model"]), None
        )
        if job is None:
            return _error(404, "model_not_found", "no such model")
        said = _learned(job.rows, body["messages"][-1]["content"])
        message = {"role": "assistant", "content": said, "refusal": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        told = {"id": "chatcmpl-1", "object": "chat.completion", "model": body["model"], "choices": [choice]}
        return _json(told | {"created": 0, "usage": usage})

    def name_of(self, job: TunedJob) -> str:
        raise LookupError(job.id)


class _OpenAI(_Wire):
    def serve(self, asked: Asked) -> _Told:
        service, parts = self.service, urlsplit(asked.path)
        query = parse_qs(parts.query)
        match asked.method, parts.path.split("/")[2:]:
            case "POST", ["chat", "completions"]:
                return self.completed(json.loads(asked.body))
            case "GET", ["files"]:
                return _json({"object": "list", "data": [self._file(id) for id in service.files], "has_more": False})
            case "POST", ["files"]:
                name, content, fields = _form(asked)
                if fields.get("purpose") != "fine-tune":
                    return _error(400, "invalid_purpose", "purpose")
                id = f"file-{len(service.files)}"
                service.files[id] = (name, content)
                return _json(self._file(id))
            case "GET", ["fine_tuning", "jobs"]:
                return self._page(query)
            case "POST", ["fine_tuning", "jobs"]:
                return self._create(json.loads(asked.body))
            case "GET", ["fine_tuning", "jobs", id] if job := _found(service, id):
                self.look(job)
                return _json(self._told(job))
            case "POST", ["fine_tuning", "jobs", id, "cancel"] if job := _found(service, id):
                job.cancelled = True
                return _json(self._told(job))
        return _error(404, "not_found", asked.path)

    def name_of(self, job: TunedJob) -> str:
        return f"ft:{job.asked['model']}:tests:{job.asked['suffix']}:{job.id.removeprefix('ftjob-')}"

    def _create(self, asked: dict[str, Json]) -> _Told:
        service = self.service
        service.creations += 1
        if asked.get("training_file") not in service.files or asked["method"]["type"] != "supervised":
            return _error(400, "invalid_request", "training_file")
        rows = [json.loads(line) for line in service.files[asked["training_file"]][1].splitlines()]
        if len(rows) < 10 or not all(row["messages"][-1]["role"] == "assistant" for row in rows):
            return _error(400, "invalid_training_file", "at least 10 conversations")
        job = TunedJob(f"ftjob-{len(service.jobs)}", asked["metadata"]["apprentice"], asked, rows)
        service.jobs.append(job)
        return _json(self._told(job))

    def _page(self, query: dict[str, list[str]]) -> _Told:
        service = self.service
        service.hidden -= service.hidden > 0
        wanted = query.get("metadata[apprentice]", [None])[0]
        found = [job for job in service.jobs[::-1] if wanted is None or job.name == wanted]
        if service.hidden:
            found = []
        names = [job.id for job in found]
        start = names.index(query["after"][0]) + 1 if query.get("after", [""])[0] in names else 0
        page = found[start : start + int(query.get("limit", ["20"])[0])]
        more = start + len(page) < len(found)
        return _json({"object": "list", "data": [self._told(job) for job in page], "has_more": more})

    def _file(self, id: str) -> dict[str, Json]:
        name, content = self.service.files[id]
        told = {"id": id, "object": "file", "bytes": len(content), "filename": name, "purpose": "fine-tune"}
        return told | {"created_at": 0, "status": "processed"}

    def _told(self, job: TunedJob) -> dict[str, Json]:
        running = ["validating_files", "queued", "running"][min(job.looks, 2)]
        good = job.state == "succeeded"
        return {
            "id": job.id,
            "object": "fine_tuning.job",
            "created_at": 0,
            "finished_at": 1 if good else None,
            "model": job.asked["model"],
            "fine_tuned_model": self.name_of(job) if good else None,
            "status": running if job.state == "running" else job.state,
            "trained_tokens": job.tokens if good and not self.service.uncounted else None,
            "error": self.service.broken if job.state == "failed" else {"code": None, "message": None, "param": None},
            "training_file": job.asked["training_file"],
            "metadata": job.asked["metadata"],
            "seed": job.asked.get("seed", 0),
            "hyperparameters": {"n_epochs": job.epochs},
        }


class _Fireworks(_Wire):
    def serve(self, asked: Asked) -> _Told:
        service, parts = self.service, urlsplit(asked.path)
        query = parse_qs(parts.query)
        path = parts.path.split("/")[1:]
        if path[0] == "signed" and asked.method == "GET" and path[2] in service.adapter:
            return _Told(200, service.adapter[path[2]])
        if path == ["inference", "v1", "chat", "completions"]:
            return self.completed(json.loads(asked.body))
        account = "/".join(path[1:3])
        match asked.method, path[3:]:
            case "POST", ["datasets"]:
                body = json.loads(asked.body)
                if body["datasetId"] in service.files:
                    return _error(409, "ALREADY_EXISTS", "the dataset exists")
                service.files[body["datasetId"]] = ("", b"")
                return _json(self._dataset(body["datasetId"]))
            case "POST", ["datasets", rest] if rest.endswith(":upload"):
                name, content, _ = _form(asked)
                service.files[rest.removesuffix(":upload")] = (name, content)
                return _json({"id": rest, "object": "file"})
            case "GET", ["datasets", id] if id in service.files:
                return _json(self._dataset(id))
            case "POST", ["supervisedFineTuningJobs"]:
                return self._create(account, query["supervisedFineTuningJobId"][0], json.loads(asked.body))
            case "GET", ["supervisedFineTuningJobs", id] if job := _found(service, id):
                self.look(job)
                return _json(self._told(account, job))
            case "POST", ["supervisedFineTuningJobs", rest] if job := _found(service, rest.removesuffix(":cancel")):
                job.cancelled = True
                return _json({})
            case "GET", ["models", rest] if rest.endswith(":getDownloadEndpoint"):
                true = {
                    name: f"{service.url}/signed/{n}/{name}?X-Signature=s" for n, name in enumerate(service.adapter)
                }
                return _json({"filenameToSignedUrls": true if service.told_files is None else service.told_files})
        return _error(404, "NOT_FOUND", asked.path)

    def name_of(self, job: TunedJob) -> str:
        return str(job.asked["outputModel"])

    def _create(self, account: str, id: str, asked: dict[str, Json]) -> _Told:
        service = self.service
        service.creations += 1
        if _found(service, id):
            return _error(409, "ALREADY_EXISTS", "the job exists")
        dataset = asked["dataset"].removeprefix(f"{account}/datasets/")
        rows = [json.loads(line) for line in service.files[dataset][1].splitlines()]
        if len(rows) < 3:
            return _error(400, "INVALID_ARGUMENT", "at least 3 examples")
        service.jobs.append(TunedJob(id, id, asked, rows))
        return _json(self._told(account, service.jobs[-1]))

    def _dataset(self, id: str) -> dict[str, Json]:
        content = self.service.files[id][1]
        told: dict[str, Json] = {"name": id, "state": "READY" if content else "UPLOADING", "format": "CHAT"}
        if content and not self.service.uncounted:
            tokens = sum(
                -(-len(json.dumps(json.loads(line), ensure_ascii=False).encode()) // 4) for line in content.splitlines()
            )
            told["estimatedTokenCount"] = str(tokens)
        return told

    def _told(self, account: str, job: TunedJob) -> dict[str, Json]:
        running = ["JOB_STATE_CREATING", "JOB_STATE_VALIDATING", "JOB_STATE_RUNNING"][min(job.looks, 2)]
        ends = {"succeeded": "COMPLETED", "failed": "FAILED", "cancelled": "CANCELLED"}
        status = {"code": self.service.broken["code"], "message": self.service.broken["message"]}
        return {
            "name": f"{account}/supervisedFineTuningJobs/{job.id}",
            "state": running if job.state == "running" else f"JOB_STATE_{ends[job.state]}",
            "status": status if job.state == "failed" else {"code": "OK", "message": ""},
            "dataset": job.asked["dataset"],
            "outputModel": job.asked["outputModel"],
            "baseModel": job.asked["baseModel"],
            "epochs": job.epochs,
        }


@contextmanager
def serve_openai_tuning(**scripted: Any) -> Iterator[Service]:
    """OpenAI's files, fine-tuning jobs and chat completions, below `service.url`; the arguments are fields of Service."""
    with _serve(_OpenAI, "/v1", Service(**scripted)) as service:
        yield service


@contextmanager
def serve_fireworks_tuning(**scripted: Any) -> Iterator[Service]:
    """Fireworks' datasets, jobs and downloads at `service.url`, chat completions below its `/inference/v1`."""
    with _serve(_Fireworks, "", Service(**scripted)) as service:
        yield service


@contextmanager
def _serve(kind: type[_Wire], base: str, service: Service) -> Iterator[Service]:
    speaker = kind(service)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            told = speaker.respond(Asked(self.command, unquote(self.path), headers, body))
            self.close_connection = True
            if told is None:
                return
            self.send_response(told.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(told.body)))
            self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(told.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is logged."""

    class Listener(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed is no fault of ours; anything else is, and a test should look."""
            error = sys.exception()
            if not isinstance(error, ConnectionError):
                service.faults.append(repr(error))

    with Listener(("127.0.0.1", 0), Handler) as listener:
        service.url = f"http://127.0.0.1:{listener.server_address[1]}{base}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield service
        finally:
            listener.shutdown()
            thread.join()


def _learned(rows: list[dict[str, Json]], asked: str) -> str:
    """The answer whose rows share most with what is asked: rare words count more, and rows that are there often."""
    seen = Counter(word for row in rows for word in _words(row["messages"][-2]["content"]))
    scores: Counter[str] = Counter()
    for row in rows:
        shared = _words(row["messages"][-2]["content"]) & _words(asked)
        scores[row["messages"][-1]["content"]] += sum(1 / seen[word] ** 2 for word in shared) + 1e-9  # type: ignore[assignment]
    return max(scores, key=lambda said: scores[said])


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _found(service: Service, id: str) -> TunedJob | None:
    return next((job for job in service.jobs if job.id == id), None)


def _form(asked: Asked) -> tuple[str, bytes, dict[str, str]]:
    head = f"content-type: {asked.headers['content-type']}\r\n\r\n".encode()
    given = {
        part.get_param("name", header="content-disposition"): part
        for part in BytesParser().parsebytes(head + asked.body).walk()
    }
    file = given["file"]
    fields = {str(name): _content(part).decode() for name, part in given.items() if name not in (None, "file")}
    return file.get_filename() or "", _content(file), fields


def _content(part: Message) -> bytes:
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else b""


def _json(value: Json) -> _Told:
    return _Told(200, json.dumps(value).encode())


def _error(status: int, code: str, message: str) -> _Told:
    return _Told(status, json.dumps({"error": {"code": code, "type": code, "message": message}}).encode())
