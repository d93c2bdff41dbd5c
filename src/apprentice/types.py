"""The vocabulary: frozen values and the contracts of plugins.

Values are pydantic models that cannot be changed after they are made. Money is an integer number of micro-dollars
(`Micros`), moments are seconds since 1970 (`Seconds`), shares and scores lie in [0, 1].
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

type Json = Any  # what `json.loads` returns; spelling it out recursively helps no reader and slows pydantic down
type Micros = int
type Seconds = float

Phase = Literal["cold_start", "reinforcement", "steady"]
Source = Literal["local", "remote"]
Route = Literal["local", "remote", "both"]
Purpose = Literal["serve", "shadow", "judge", "label", "train", "repeat", "probe", "batch"]
FinishState = Literal["complete", "truncated", "refused", "filtered"]
VersionState = Literal["candidate", "canary", "champion", "retired", "rejected"]
PromotionState = Literal["champion", "canary", "rejected"]
Reason = Literal[
    "no_local_model",  # cold start: there is nobody else to ask
    "learning",  # reinforcement: both are asked, the remote is served
    "audit",  # the coin of the sampling law came up: both are asked
    "deferred",  # the local model was not sure enough: the remote is asked as well
    "certified",  # the local answer is served alone
    "canary",  # the same, by the version that is tried out beside the champion
    "forced",  # an operator asked for the remote
    "local_invalid",  # the local answer did not fit the schema: the remote is asked
    "local_failed",  # the local model did not answer: the remote is asked
    "remote_failed",  # the remote did not answer: the local answer is served
    "budget",  # the caps left no room for the remote: the local answer is served
    "batch",  # nobody waited: the remote answered it in a batch
]


TermsClass = Literal["own", "permissive", "conditional", "forbidden", "unknown"]
type _Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Value(BaseModel):
    """A frozen value; unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Task(Value):
    """What is asked, as a model sees it. Schemas are JSON Schema objects."""

    name: str
    description: str
    instructions: str = ""
    input_schema: dict[str, Json]
    output_schema: dict[str, Json]
    examples: tuple[dict[str, Json], ...] = ()  # few-shot pairs: {"input": …, "output": …}


class Usage(Value):
    """Tokens as the provider counted them. `input_tokens` includes cached ones, `output_tokens` includes reasoning."""

    input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)
    cached_tokens: int = Field(default=0, ge=0)
    reasoning_tokens: int = Field(default=0, ge=0)


class Answer(Value):
    """What a model said. `output` is None unless it is valid JSON that fits the task's output schema."""

    output: Json = None
    text: str = ""
    model: str = ""  # the model that really answered, as the provider names it
    provider: str = ""  # where it was asked: "provider@host"
    usage: Usage | None = None  # None: the provider did not say
    cost: Micros = 0
    latency: Seconds = 0.0
    provider_request_id: str = ""  # what the provider calls this call, for questions to its support
    finish: FinishState = "complete"
    confidence: float | None = Field(default=None, ge=0, le=1)
    problem: str | None = None  # why `output` is None


class Score(Value):
    """How well an answer matches a reference, 0 to 1, with the detail per field."""

    value: float = Field(ge=0, le=1)
    fields: dict[str, float] = {}


class Verdict(Value):
    """What a verifier found about an answer alone."""

    state: Literal["verified", "refuted", "unverified"]
    evidence: str = ""


class Confidence(Value):
    """The state of one task's quality estimate, as `decide` and `status` read it.

    `agreement` is the score of the local answer against the remote one on audited requests. It is not accuracy.
    """

    phase: Phase = "cold_start"
    version: str | None = None
    level: float = Field(default=1.0, ge=0, le=1)  # share of least confident traffic that goes to the remote
    threshold: float | None = None  # local confidence below this defers; None at level 1.0
    sampling_rate: float = Field(default=1.0, ge=0, le=1)  # probability of an audit for the next request
    agreement: float | None = None  # point estimate on audits of this version
    lower: float | None = None  # anytime-valid 95 % bounds of the same
    upper: float | None = None
    window: float | None = None  # rolling mean over `window_size` comparisons, for display only
    served_agreement: float | None = None  # estimate of the agreement of what was served locally
    ceiling: float | None = None  # agreement of the remote with itself, from requests that it was asked twice
    certified: bool = False
    verified: bool = True  # False: too few audits of late to say anything
    drift: Literal["none", "suspected", "alarm"] = "none"
    canary: str | None = None  # the version that is tried out beside `version`
    canary_share: float = Field(default=0.0, ge=0, le=1)  # of what is served alone, its share
    canary_threshold: float | None = None  # of its own confidence
    audits: int = 0
    labels: int = 0
    detail: dict[str, float] = {}  # detectors and certificates by name, for display


class Decision(Value):
    """Who answers this request, who else is asked, why, and with what probability that was drawn."""

    route: Route
    reason: Reason
    p: float = Field(ge=0, le=1)  # probability of an audit, computed before the request was read
    audit: bool = False  # the coin came up (or p is 1): this comparison may feed tests
    level: float = Field(default=1.0, ge=0, le=1)
    threshold: float | None = None
    phase: Phase = "cold_start"


class Attempt(Value):
    """One paid call: its own hold in the ledger, and what became of it."""

    attempt_id: str
    model: str
    purpose: Purpose
    outcome: Literal["not_sent", "rejected", "answered", "answered_no_usage", "unknown"]
    cost: Micros
    problem: str | None = None


class Record(Value):
    """One request with its Decision, Answers, Score and cost. Written once, before the caller has the answer."""

    request_id: str
    task: str
    at: Seconds
    input: Json
    decision: Decision
    version: str | None = None
    local: Answer | None = None
    remote: Answer | None = None
    served: Source | None = None  # None: nobody answered; `error` says why
    score: Score | None = None
    repeat: Score | None = None  # of a second answer of the remote against its first: how far it agrees with itself
    rival: Score | None = None  # of the canary's answer, on an audit that both answered; 0 where it had none to serve
    rival_version: str | None = None
    rival_confidence: float | None = None
    attempts: tuple[Attempt, ...] = ()
    cost: Micros = 0
    latency: Seconds = 0.0
    idempotency_key: str | None = None
    tags: dict[str, str] = {}  # `subject`, if there is one, as its digest
    error: str | None = None

    def without_words(self) -> Record:
        """The Record without a word of what was asked and answered, and of whom: decision, scores in sum, tokens, money."""

        def blank(answer: Answer | None) -> Answer | None:
            return None if answer is None else answer.model_copy(update={"output": None, "text": "", "problem": None})

        def in_sum(score: Score | None) -> Score | None:
            return None if score is None else Score(value=score.value)

        return self.model_copy(
            update={
                "input": None,
                "local": blank(self.local),
                "remote": blank(self.remote),
                "score": in_sum(self.score),
                "repeat": in_sum(self.repeat),
                "rival": in_sum(self.rival),
                "error": None if self.error is None else self.error.partition(":")[0],
                "attempts": tuple(attempt.model_copy(update={"problem": None}) for attempt in self.attempts),
                "tags": {name: text for name, text in self.tags.items() if name != "subject"},
            }
        )


class Evidence(NamedTuple):
    """What the controller needs of one Record, and nothing else. A plain tuple because it is made for each request."""

    seq: int
    task: str
    at: Seconds
    version: str | None
    level: float  # in force when the request was decided
    p: float
    audit: bool
    confidence: float | None  # of the local answer
    score: float | None  # None: there was no pair to compare
    served: Source | None
    pair: tuple[float, float] | None = None  # numeric answers (local, remote), where the task has one number to compare
    repeat: float | None = None  # the remote's agreement with itself, where it was asked twice
    rival: float | None = None  # score of the canary on the same audit, and which version that was
    rival_version: str | None = None
    rival_confidence: float | None = None


class Correction(Value):
    """What a person said about a request: the right output, that the served one is right, or that neither was meant.

    The last word about a request counts. Nothing is ever overwritten.
    """

    request_id: str
    task: str
    at: Seconds
    action: Literal["corrected", "approved", "withdrawn"]
    target: Json = None  # the right output; None where it was withdrawn
    by: str = ""
    comment: str = ""


class Label(Value):
    """What a teacher said about a request from whose answers nobody may learn, or that the local model answered alone.

    One a request. It is no Record: nobody was served with it, and nothing is tested by it.
    """

    request_id: str
    task: str
    at: Seconds
    input: Json
    answer: Answer | None = None  # None: no teacher had one of use, and the request is not put to them again
    attempts: tuple[Attempt, ...] = ()

    @property
    def cost(self) -> Micros:
        return sum(attempt.cost for attempt in self.attempts)


class Permission(Value):
    """What an operator was permitted beyond a provider's terms: on what basis, by whom, when, and for which tasks."""

    basis: _Text  # what the right rests on: a contract, a letter, a licence, or how the conditions are met
    by: _Text  # who answers for it
    date: datetime.date
    scope: tuple[_Text, ...] = Field(min_length=1)  # names of tasks, or "*" for all
    until: datetime.date | None = None  # the last day on which it holds

    @field_validator("scope", mode="before")
    @classmethod
    def _one_or_many(cls, value: Json) -> Json:
        return (value,) if isinstance(value, str) else value

    def problem(self, task: str, today: datetime.date) -> str | None:
        """Why it does not hold for a task on a day; None if it does."""
        if task not in self.scope and "*" not in self.scope:
            return f"the permission is for {', '.join(self.scope)}"
        if self.date > today:
            return f"the permission is dated {self.date}, which is still to come"
        if self.until is not None and today > self.until:
            return f"the permission ended on {self.until}"
        return None

    def text(self) -> str:
        """As it is kept with what it opened."""
        end = f" until {self.until}" if self.until is not None else ""
        return f"permission by {self.by} of {self.date} for {', '.join(self.scope)}{end}: {self.basis}"


class Example(Value):
    """One training row, with where it came from and why it may be used."""

    input: Json
    target: Json
    source: Literal["gold", "teacher", "remote"]
    weight: float = Field(default=1.0, gt=0)
    request_id: str | None = None
    model: str = ""  # who produced the target
    at: Seconds = 0.0
    basis: str = ""  # why this row may train
    teacher: str = ""  # whose service was asked: "provider@host", or "a person"
    terms: TermsClass = "unknown"  # when it was selected
    rejected: Json = None  # what the local model had answered, where a person or the remote corrected it


class Checkpoint(Value):
    """Weights plus manifest, named by the hash of their content."""

    id: str  # "sha256-" + 64 hex digits
    path: Path
    manifest: dict[str, Json]


class Version(Value):
    """A Checkpoint's place in a task's history."""

    id: str  # "v1", "v2", … within a task
    task: str
    checkpoint: str
    path: str
    state: VersionState
    trained_on: int
    created_at: Seconds
    promoted_at: Seconds | None = None
    certified_at: Seconds | None = None
    metrics: dict[str, Json] = {}  # hold-out results; "confidences": quantiles of the confidence on recent inputs


METRICS = (
    "agreement",  # with the remote, on held-out rows
    "gold_agreement",  # with people, on held-out rows about which one spoke
    "json_validity",  # share of answers that fit the output schema
    "diversity",  # effective number of different answers, divided by that of the expected ones
    "p50_latency_ms",
    "p95_latency_ms",
    "p99_latency_ms",
    "size_mb",
)


class Gate(NamedTuple):
    """What a version must measure, whatever the champion does."""

    metric: str
    at_least: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """The gate that is written as "agreement >= 0.88". Raises ValueError that names what is known.

        >>> Gate.parse("p95_latency_ms <= 50")
        Gate(metric='p95_latency_ms', at_least=False, bound=50.0)
        """
        found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(\d+(?:\.\d+)?)\s*", text, re.ASCII)
        if found is None:
            raise ValueError(f"{text!r} is no gate such as 'agreement >= 0.88' or 'p95_latency_ms <= 50'")
        if found[1] not in METRICS:
            raise ValueError(f"{found[1]!r} is not measured; known: {', '.join(METRICS)}")
        return cls(found[1], found[2] == ">=", float(found[3]))


class Event(Value):
    """Something that happened to a task and that a person may want to know."""

    name: str
    task: str
    at: Seconds
    message: str
    evidence: dict[str, Json] = {}
    key: str | None = None  # a second Event of the same task and key is the same Event: it is kept once


class Mode(Value):
    """What an operator wants for a task: "remote" asks the remote alone, until a moment or (None) until "auto"."""

    mode: Literal["remote", "auto"]
    until: Seconds | None = None
    at: Seconds  # when it was asked for

    def forces_remote(self, now: Seconds) -> bool:
        """Whether it is in force and keeps the local model from answering.

        >>> Mode(mode="remote", until=20.0, at=10.0).forces_remote(20.0)
        False
        """
        return self.mode == "remote" and (self.until is None or now < self.until)


class Cap(Value):
    """An upper limit on what one window may cost."""

    window: str  # "total", "month:2026-11", "week:2026-W47", "day:2026-11-21", with "task:NAME/" before it for one task
    limit: Micros = Field(ge=0)


class Hold(Value):
    """Money reserved for one attempt before a byte leaves. `windows` are the ones it is booked in, capped or not."""

    attempt_id: str
    task: str
    purpose: Purpose
    model: str
    worst: Micros = Field(ge=0)
    windows: tuple[str, ...]
    at: Seconds


class Batch(Value):
    """Inputs of one task that a provider answers when it has time, and how far that has come."""

    id: str  # the hold's attempt_id, and the name under which the provider is asked for it
    task: str
    model: str  # as in the ledger
    at: Seconds
    inputs: tuple[Json, ...]
    worsts: tuple[Micros, ...]  # the most that each input can cost; the hold is their sum
    state: Literal["prepared", "submitted", "ended", "failed"] = "prepared"
    sent_at: Seconds | None = None  # when its creation was begun: from then on the provider may have it
    remote_id: str | None = None  # as the provider names it
    end: Literal["settled", "assumed", "released"] | None = None  # how its hold ends, and at what cost
    cost: Micros = Field(default=0, ge=0)
    problem: str | None = None
    open: bool = True  # something is still to be done: at the end, the hold is to be settled

    @property
    def request_ids(self) -> list[str]:
        """What each request is called at the provider, and then its Record."""
        return [f"{self.id}-{number}" for number in range(len(self.inputs))]

    @property
    def worst(self) -> Micros:
        return sum(self.worsts)


class Spending(NamedTuple):
    """The attempts of one day, task, purpose, model and state, added up. What is still held counts with its worst case."""

    day: str  # "2026-11-21"; empty if the holds were booked in no window of a day
    task: str
    purpose: Purpose
    model: str
    state: Literal["held", "settled", "assumed", "released"]
    attempts: int
    cost: Micros


class Result(Value):
    """What the caller gets. `output` fits the task's output schema, whoever answered."""

    output: Json
    source: Source
    request_id: str
    version: str | None
    confidence: float | None
    cost: Micros
    decision: Decision
    at: Seconds = 0.0  # when the request began, as in its Record
    usage: Usage | None = None  # of the answer that was served; None: nobody counted


# --- contracts of plugins ----------------------------------------------------------------------------------------------


@runtime_checkable
class Model(Protocol):
    """Anything that answers. Raises ModelError; never returns an `output` that does not fit the schema it was given."""

    async def answer(self, task: Task, input: Json) -> Answer: ...

    async def close(self) -> None: ...


@runtime_checkable
class ManyModel(Model, Protocol):
    """A model that answers several inputs at once for less than one at a time; blocking, for a thread."""

    def answer_many(self, task: Task, inputs: Sequence[Json]) -> list[Answer]: ...


type Evaluator = Callable[[Json, Json], Awaitable[Score]]
"""(answer, reference) -> Score. Symmetric unless the evaluator says otherwise; 1.0 for equal outputs."""

type Verifier = Callable[[Json], Awaitable[Verdict]]


class Finding(NamedTuple):
    """Characters of a text, from `start` to before `end`, that must not be kept. `kind` in capitals: "EMAIL", "CARD"."""

    start: int
    end: int
    kind: str


type Redactor = Callable[[str], Sequence[Finding]]
"""text -> findings, in the order of the text, none over another; the same for the same text."""


class Encoder(Protocol):
    """Text to vectors: one float32 row of length `dimension` a text, of unit length."""

    name: str
    dimension: int

    def encode(self, texts: Sequence[str]) -> Any: ...


class Trainer(Protocol):
    """Examples -> Checkpoint, written under `into`. The same examples and seed give the same checkpoint id."""

    def check(self, task: Task) -> None:
        """Raise CannotLearn if this task can never be learned by this trainer."""
        ...

    def train(
        self, task: Task, examples: Sequence[Example], *, into: Path, seed: int, licence: Mapping[str, Json] = ...
    ) -> Checkpoint:
        """`licence`: the proof that every example may train, kept in the manifest under that name."""
        ...


class Promotion(NamedTuple):
    """What became of a version after the Record `after`: as champion, from the next one on evidence is about it.

    As canary it is tried out beside the champion from then on, and as rejected it no longer is.
    """

    number: int  # rises with each promotion
    task: str
    version: str
    after: int
    state: PromotionState = "champion"
    at: Seconds = 0.0
    by: str = ""
    why: str = ""


class Changes(NamedTuple):
    """What happened in a store since a sequence number: enough to bring a live state up to date."""

    evidence: list[Evidence]
    promotions: list[Promotion]
    champions: Mapping[str, Version]
    modes: Mapping[str, Mode]  # what was asked for last, also when its time is over
    canaries: Mapping[str, Version] = {}


class Forgotten(Value):
    """What was erased of one task. `versions` may have learned from it; `teaching`: so may the next one."""

    task: str
    records: int = 0
    corrections: int = 0
    labels: int = 0
    versions: tuple[str, ...] = ()
    teaching: bool = False


class Lease(NamedTuple):
    """The right to do a job, until `until`. `token` grows with each grant; a write with an old token is refused."""

    name: str
    owner: str
    token: int
    until: Seconds


class Store(Protocol):
    """Keeps Records, Versions, Events, leases and the ledger. Every write is durable when its call returns."""

    async def append(self, record: Record) -> int: ...
    async def changes(self, after: int) -> Changes: ...
    async def record(self, request_id: str) -> Record | None: ...
    async def record_by_key(self, task: str, idempotency_key: str) -> Record | None: ...
    async def records(
        self, task: str, *, after: int = 0, limit: int | None = None, labelled: bool = False, newest: bool = False
    ) -> list[tuple[int, Record]]: ...
    async def count(self, task: str, *, labelled: bool = False) -> int: ...

    async def save_state(self, task: str, seq: int, state: str) -> None: ...
    async def load_state(self, task: str) -> tuple[int, str] | None: ...

    async def add_version(self, version: Version) -> Version: ...
    async def versions(self, task: str) -> list[Version]: ...
    async def promote(
        self,
        task: str,
        version: str,
        at: Seconds,
        *,
        state: PromotionState = "champion",
        by: str = "",
        why: str = "",
        expects: int | None = None,
        lease: Lease | None = None,
    ) -> bool: ...
    async def promotions(self, task: str) -> list[Promotion]: ...
    async def certify(self, task: str, version: str, at: Seconds) -> None: ...

    async def add_correction(self, correction: Correction) -> None: ...
    async def corrections(self, task: str, *, request_id: str | None = None) -> list[Correction]: ...

    async def add_examples(self, task: str, examples: Sequence[Example]) -> int: ...
    async def examples(self, task: str) -> list[Example]: ...
    async def count_examples(self, task: str) -> int: ...
    async def remove_examples(self, task: str, ids: Sequence[str]) -> int: ...

    async def add_label(self, label: Label) -> bool: ...
    async def labels(self, task: str) -> list[Label]: ...

    async def add_event(self, event: Event) -> None: ...
    async def events(
        self, task: str | None = None, *, names: Sequence[str] | None = None, limit: int = 100
    ) -> list[Event]: ...
    async def events_after(self, number: int, *, limit: int = 100) -> list[tuple[int, Event]]: ...
    async def set_mode(
        self, task: str, mode: Literal["remote", "auto"], until: Seconds | None, at: Seconds
    ) -> None: ...

    async def keep_batch(self, batch: Batch, *, lease: Lease | None = None) -> None: ...
    async def batches(self, task: str | None = None, *, open: bool = False) -> list[Batch]: ...

    async def forget(
        self, subject: str, at: Seconds, *, task: str | None = None, dry_run: bool = False
    ) -> list[Forgotten]: ...
    async def expire(self, task: str, before: Seconds, *, imported: bool = False) -> int: ...
    async def scrub(self, *, rebuild: bool = True) -> None: ...

    async def acquire(self, name: str, owner: str, now: Seconds, seconds: Seconds) -> Lease | None: ...
    async def renew(self, lease: Lease, now: Seconds, seconds: Seconds) -> Lease | None: ...
    async def release(self, lease: Lease) -> None: ...

    async def reserve(self, hold: Hold, caps: Sequence[Cap]) -> None: ...

    # One that is called after a `reserve` comes after it, also where the caller of that was cancelled meanwhile.
    async def settle(
        self, attempt_id: str, cost: Micros, *, state: Literal["settled", "assumed", "released"]
    ) -> None: ...
    async def spent(self, windows: Sequence[str]) -> dict[str, Micros]: ...
    async def spending(self, *, since: Seconds = 0.0) -> list[Spending]: ...
    async def holds(self, before: Seconds) -> list[Hold]: ...

    async def close(self) -> None: ...
