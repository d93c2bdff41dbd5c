"""apprentice.yaml -> Config.

`reading` says which YAML the file may hold, `schemas` how schemas are written in it. Unknown keys are errors. Relative
paths are relative to the file's folder. `${NAME}` in any text outside `tasks:` stands for an environment variable; what
is said to a model is never touched. The keys of providers are reached by `api_key_env` only, the name of a variable, so
that no secret is ever part of a Config.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, to_json

from apprentice import plugins, reading, schemas
from apprentice.errors import CannotLearn, ConfigError, InvalidAnswer, InvalidInput, MissingExtra, UnknownTask
from apprentice.schemas import Check, Place, Problem, did_you_mean, with_hint
from apprentice.sections import NO_REDACTION, Alerts, ChosenRedaction, Retention, Section, Telemetry
from apprentice.sections import FilePath as _FilePath
from apprentice.types import Gate, Json, Permission, Task

_USUAL_MODELS = {"openai": "gpt-4o", "anthropic": "claude-sonnet-4-5-20250929"}
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


# --- sections of the file ---------------------------------------------------------------------------------------------


class _Section(Section, BaseModel):
    pass


_Dollars = Annotated[Decimal, Field(ge=0, decimal_places=6, max_digits=15)]


class Price(_Section):
    """US dollars per million tokens."""

    input: _Dollars
    output: _Dollars
    cached: _Dollars | None = None
    """For input tokens read from the provider's cache; the price of input when left out."""


class Remote(_Section):
    """An expensive model behind an interface of somebody else."""

    provider: str
    """The name of a model plugin, such as anthropic or openai."""
    model: str
    """As the provider names it."""
    api_key_env: str | None = None
    """The NAME of the environment variable that holds the key; never the key itself."""
    base_url: str | None = None
    """Where the provider's interface is, when not at its usual place."""
    allow_internal: bool = False
    """Whether base_url may be a loopback or private address."""
    price: Price | None = None
    """Overrides the price table; necessary for models that are not in it."""
    batch_price: Decimal = Field(default=Decimal("0.5"), gt=0, le=1)
    """The share of the price that a batch costs; OpenAI, Anthropic and Google charge half."""
    max_tokens: int = Field(default=1024, ge=1, le=10_000_000)
    """The most tokens of one answer; the worst case of a call is reserved for that many."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one attempt."""
    temperature: float | None = Field(default=0.0, ge=0, le=2)
    """null sends none, as reasoning models require."""
    retries: int = Field(default=2, ge=0, le=10)
    """Further attempts after one that failed in a way that may pass."""
    concurrency: int = Field(default=16, ge=1)
    """Calls in flight at the same time."""
    weight: float | None = Field(default=None, gt=0)
    """How often an additional provider is asked first, relative to the main one (1 unless told): so that the answers,
    and what is learned from them, are several models'. Without it the provider is asked only when others do not answer."""
    permission: Permission | None = None
    """A right to train on its answers beyond its terms: {basis, by, date, scope}; nothing else opens a closed provider."""
    settings: dict[str, Json] = {}
    """Further settings of the model plugin."""
    additional_providers: tuple[Remote, ...] = ()
    """Asked in this order when the ones before do not answer."""

    @property
    def host(self) -> str | None:
        """The host of base_url; None where the provider's usual address is used."""
        return urlsplit(self.base_url).hostname if self.base_url is not None else None

    @property
    def teacher(self) -> str:
        """Where it is asked, as an Answer has it: "provider@host"."""
        return f"{self.provider}@{self.host or ''}"

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("should be the NAME of an environment variable, never the key itself")
        return value

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is None or _REFERENCE.search(value):
            return value
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("should be an address such as https://api.example.com/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError("should not carry a user name or a password; use api_key_env")
        return value

    @field_validator("settings")
    @classmethod
    def _leave_the_rest_to_its_place(cls, value: dict[str, Json]) -> dict[str, Json]:
        own = ("model", "max_tokens", "timeout", "temperature", "base_url", "allow_internal", "api_key")
        found: list[Problem] = [
            ((name,), f"does not belong here; use `{'api_key_env' if name == 'api_key' else name}` beside `settings`")
            for name in own
            if name in value
        ]
        if found:
            _refuse(found)
        return value

    @model_validator(mode="after")
    def _is_flat(self) -> Remote:
        if any(other.additional_providers for other in self.additional_providers):
            _refuse([(("additional_providers",), "one of these should not have additional_providers itself")])
        return self


def _own_trainer(data: Mapping[str, Any]) -> str | None:
    backend = data.get("backend")
    return backend if backend in ("embedded", "ensemble", "mixed") else None


def _schedule(text: str) -> str:
    if not re.fullmatch(r"monthly|quarterly|every [1-9][0-9]{0,3}d", text, re.ASCII):
        raise ValueError(f"{text!r} is no schedule such as 'monthly', 'quarterly' or 'every 30d'")
    return text


class Local(_Section):
    """The model that learns."""

    backend: str = "embedded"
    """The name of a model plugin: embedded, llama_cpp, vllm, ollama, mixed, ensemble."""
    base_model: str | None = None
    """What is fine-tuned, as the backend names it."""
    fine_tune_backend: str | None = Field(default_factory=_own_trainer)
    """The name of a trainer plugin; `embedded` for the backend `embedded`."""
    fine_tune_batch_size: int = Field(default=100, ge=1)
    """New examples before another teaching cycle."""
    model_dir: _FilePath = Field(default="./models/", validate_default=True)
    """Where checkpoints are kept."""
    cost_per_hour: _Dollars = Decimal(0)
    """US dollars of an hour of local computing, for the report of what was saved."""
    gold_weight: float = Field(default=5.0, gt=0, le=1000)
    """How much more than a model's label a person's correction weighs in teaching."""
    near_duplicates: float = Field(default=0.8, ge=0.5, le=1)
    """Inputs with this share of their words and pairs of words in common are taught or held out together."""
    holdout_frozen: int = Field(default=200, ge=0)
    """The first so many rows held out are examined for the life of the task; 0: none is frozen."""
    holdout_rolling: int = Field(default=1000, ge=10)
    """The newest so many rows held out are what a version is examined on."""
    teacher_labels: int = Field(default=0, ge=0, le=100_000)
    """Before a cycle, `teachers` label so many requests at most from whose answers nobody may learn; 0: none."""
    schedule: Annotated[str, AfterValidator(_schedule)] | None = None
    """monthly, quarterly, or every 30d: a cycle once so long has passed and anything is new, beside the batch."""
    learn: Literal["background", "worker", "off"] = "background"
    """background: the engine starts teaching by itself; worker: only `apprentice worker` teaches; off: nobody does."""
    settings: dict[str, Json] = {}
    """Further settings of the backend's model plugin."""
    fine_tune_settings: dict[str, Json] = {}
    """Further settings of the trainer plugin, such as the encoder."""


class Sampling(_Section):
    """How often a local answer is compared with a remote one."""

    decay_function: Literal["exponential", "linear", "step"] = "exponential"
    """How the rate falls from 1 to min_floor as the agreement is proven."""
    min_floor: float = Field(default=0.02, gt=0, le=1)
    """The share of requests that is always compared."""
    window_size: int = Field(default=100, ge=2)
    """Comparisons in the rolling window."""
    trend_sensitivity: float = Field(default=0.05, gt=0, lt=1)
    """A change of agreement that changes the rate."""
    repeat_share: float = Field(default=0.05, ge=0, le=1)
    """The share of comparisons for which the remote is asked a second time, to learn how far it agrees with itself."""
    probe_prompts: int = Field(default=20, ge=0)
    """The first so many inputs are put to the remote again and again, to notice that it has changed; 0 asks none."""
    probe_hours: float = Field(default=24.0, gt=0)
    """Hours between two rounds of those."""


class Budget(_Section):
    """Caps in US dollars; a call that might break one is not made."""

    total: _Dollars | None = None
    daily: _Dollars | None = None
    weekly: _Dollars | None = None
    monthly: _Dollars | None = None
    currency: str = "USD"
    timezone: str = "UTC"
    """Where a day begins: an IANA name such as Europe/Berlin."""
    on_exhausted: Literal["degrade", "refuse", "queue"] = "degrade"
    """degrade: local serving goes on without the remote; refuse: requests fail; queue: they wait, then fail."""
    wait: float = Field(default=5.0, ge=0, le=86_400)
    """Seconds that a request waits for money: for calls in flight to settle, with `queue` also for a new window."""

    @field_validator("currency")
    @classmethod
    def _is_dollars(cls, value: str) -> str:
        if value != "USD":
            raise ValueError(f"should be USD, not {value}: providers state their prices in US dollars")
        return value

    @field_validator("timezone")
    @classmethod
    def _is_a_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"no time zone {value!r}; should be an IANA name such as Europe/Berlin") from error
        return value

    @property
    def limits(self) -> dict[str, Decimal]:
        """The caps that are set, in US dollars, by window: total, daily, weekly, monthly."""
        caps = {"total": self.total, "daily": self.daily, "weekly": self.weekly, "monthly": self.monthly}
        return {window: cap for window, cap in caps.items() if cap is not None}


class StoreConfig(_Section):
    """Where Records, versions and the ledger are kept."""

    backend: str = "sqlite"
    path: _FilePath = Field(default="./.apprentice/apprentice.db", validate_default=True)


class Thresholds(_Section):
    """When a task changes its phase."""

    phase1_to_phase2: int = Field(default=50, ge=1)
    """Training examples before the local model is tried."""
    phase2_to_phase3: float = Field(default=0.85, gt=0, lt=1)
    """Agreement that must be proven before the local model serves alone."""
    coaching_trigger: float = Field(default=0.70, gt=0, lt=1)
    """Agreement below this asks the remote more often."""
    emergency_threshold: float = Field(default=0.50, gt=0, lt=1)
    """Agreement below this withdraws the local model."""

    @model_validator(mode="after")
    def _in_order(self) -> Thresholds:
        if self.coaching_trigger > self.phase2_to_phase3:
            _refuse([(("coaching_trigger",), f"should not be above phase2_to_phase3 ({self.phase2_to_phase3})")])
        if self.emergency_threshold > self.coaching_trigger:
            _refuse([(("emergency_threshold",), f"should not be above coaching_trigger ({self.coaching_trigger})")])
        return self


# --- tasks ------------------------------------------------------------------------------------------------------------


def _shape(given: Json, *, output: bool) -> Json:
    _, problems = schemas.compiled(given, output=output)
    if problems:
        _refuse(problems)
    return given


def _evaluator_choice(given: Json) -> Json:
    if isinstance(given, str) or (isinstance(given, dict) and isinstance(given.get("name"), str)):
        return given
    raise ValueError("should be the name of an evaluator, or a mapping with `name` and the evaluator's settings")


_SHAPE = WithJsonSchema({"description": "see json_schema, which refers to the definition of all shapes"})
_EVALUATOR = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        ]
    }
)
# Evaluators that compare a field exactly, or in a way that only their author knows. What no such evaluator looks at is
# judged by its meaning, so it may be free text.
_EXACT = ("exact_match", "structured_match", "custom")


def _gate(text: str) -> str:
    Gate.parse(text)
    return text


def _benchmark(path: Path) -> Path:
    if path.suffix not in (".jsonl", ".csv", ".txt"):
        raise ValueError(f"should be a .jsonl, .csv or .txt file, not {path.name}")
    return path


class TaskConfig(_Section):
    """What is asked, and how good an answer must be."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")
    description: str = Field(min_length=1)
    instructions: str = ""
    """Said to the remote, beyond the description."""
    input_schema: Annotated[dict[str, Json] | str, PlainValidator(partial(_shape, output=False)), _SHAPE]
    output_schema: Annotated[dict[str, Json] | str, PlainValidator(partial(_shape, output=True)), _SHAPE]
    examples: tuple[dict[str, Json], ...] = ()
    """Shown to the remote: a list of {input: …, output: …}."""
    evaluator: Annotated[str | dict[str, Json], PlainValidator(_evaluator_choice), _EVALUATOR] = "structured_match"
    """How a local answer is compared with a remote one: a name, or {name: …} with its settings."""
    match_fields: tuple[str, ...] | None = None
    """For structured_match: the fields that are compared; all when left out. `a.b` is b within a."""
    gates: tuple[Annotated[str, AfterValidator(_gate)], ...] = ()
    """What every version must measure to be promoted, such as "agreement >= 0.88" or "p95_latency_ms <= 50"."""
    slices: tuple[str, ...] = ()
    """Fields of the input: no version is promoted that is worse for one of their values. `a.b` is b within a."""
    benchmarks: tuple[Annotated[_FilePath, AfterValidator(_benchmark)], ...] = ()
    """Files of benchmark rows (.jsonl, .csv, .txt): nothing is taught that is nearly the same as one of them."""
    confidence_thresholds: Thresholds = Thresholds()
    budget: Budget | None = None
    """Caps for this task alone, next to the overall ones."""
    sampling: Sampling | None = None
    """Replaces the overall section as a whole."""
    local: Local | None = None
    """Replaces the overall section as a whole."""
    redaction: ChosenRedaction | None = None
    """Replaces the overall section; false: nothing is redacted."""
    retention: Retention | None = None
    """Replaces the overall section as a whole."""
    max_input_bytes: int = Field(default=2_000_000, ge=1)
    """A larger input, as JSON in UTF-8, is refused."""

    @model_validator(mode="after")
    def _is_consistent(self) -> TaskConfig:
        problems = [*self._evaluator_problems(), *self._example_problems()]
        for index, field in enumerate(self.slices):
            if wrong := schemas.no_such_field(self._input_schema, field):
                problems.append((("slices", index), wrong))
        if problems:
            _refuse(problems)
        return self

    def _evaluator_problems(self) -> Iterator[Problem]:
        name, settings = self.evaluator_settings
        try:
            plugins.check("evaluators", name, settings)
        except MissingExtra:
            pass  # `missing` lists it
        except ConfigError as error:
            yield ("evaluator",), with_hint(error)
        for place, field in self._fields_named(settings):
            wrong = schemas.no_such_field(self._output_schema, field)
            if wrong:
                yield place, wrong

    def _fields_named(self, settings: Mapping[str, Json]) -> Iterator[tuple[Place, str]]:
        for index, field in enumerate(self.match_fields or ()):
            yield ("match_fields", index), field
        if isinstance(self.evaluator, dict):
            for key in ("match_fields", "fields", "field"):
                fields = settings.get(key) or []
                for field in [fields] if isinstance(fields, str) else fields:
                    yield ("evaluator", key), str(field)

    def _example_problems(self) -> Iterator[Problem]:
        for index, example in enumerate(self.examples):
            if set(example) != {"input", "output"}:
                yield ("examples", index), "should have `input` and `output`, and nothing else"
                continue
            try:
                wrong = {
                    side: check(example[side]) for side, check in zip(("input", "output"), self._checks, strict=True)
                }
            except MissingExtra:
                return  # `missing` lists it
            yield from ((("examples", index, side), problem) for side, problem in wrong.items() if problem)

    def __copy__(self) -> Self:
        copied = super().__copy__()
        for name in copied.__dict__.keys() - type(self).model_fields:
            del copied.__dict__[name]  # a cached value would outlive the update that `model_copy` makes
        return copied

    @cached_property
    def _input_schema(self) -> dict[str, Json]:
        return schemas.compiled(self.input_schema, output=False)[0]

    @cached_property
    def _output_schema(self) -> dict[str, Json]:
        return schemas.compiled(self.output_schema, output=True)[0]

    @cached_property
    def _checks(self) -> tuple[Check, Check]:
        return (
            schemas.whole_check(self.input_schema, self._input_schema, texts=True),
            schemas.whole_check(self.output_schema, self._output_schema),
        )

    @cached_property
    def task(self) -> Task:
        """The task as a model sees it, with JSON Schemas."""
        return Task(
            name=self.name,
            description=self.description,
            instructions=self.instructions,
            input_schema=self._input_schema,
            output_schema=self._output_schema,
            examples=self.examples,
        )

    @cached_property
    def learnable_task(self) -> Task:
        """The task as a trainer sees it, with marks that `task` lacks, because providers refuse them.

        `"x-free-text": true` at a string, or a list of strings, without an enumeration, that no exact comparison covers: it
        can be judged by its meaning only, so it is no category. `"x-compared": false` at a field of the output that the
        evaluator does not look at: how sure a student is of it does not matter.
        """
        marked = schemas.mark_free_text(self._output_schema, self._exact)
        settings = self.evaluator_settings[1]
        compared = settings.get("match_fields") or settings.get("fields") or settings.get("field")
        if compared and isinstance(marked.get("properties"), dict):
            names = {path.split(".")[0] for path in ([compared] if isinstance(compared, str) else compared)}
            ignored = {
                name: field | {"x-compared": False} for name, field in marked["properties"].items() if name not in names
            }
            marked = marked | {"properties": marked["properties"] | ignored}
        return self.task.model_copy(update={"output_schema": marked})

    def _exact(self, field: str) -> bool:
        name, settings = self.evaluator_settings
        fields = settings.get("match_fields") if name == "structured_match" else None
        return name in _EXACT and (fields is None or any(f"{field}.".startswith(f"{covers}.") for covers in fields))

    @property
    def evaluator_settings(self) -> tuple[str, dict[str, Json]]:
        """The evaluator's name, and its settings as `plugins.build` takes them."""
        if isinstance(self.evaluator, str):
            name, settings = self.evaluator, {}
        else:
            settings = {key: value for key, value in self.evaluator.items() if key != "name"}
            name = self.evaluator["name"]
        if self.match_fields is not None:
            settings = settings | {"match_fields": list(self.match_fields)}
        return name, settings

    def validate_input(self, value: Json) -> Json:
        """The value itself, if the task can be asked with it.

        Raises InvalidInput that names the field: it does not fit the schema, is no JSON, is larger than
        `max_input_bytes`, or all of its texts are empty.
        """
        wrong = self._checks[0](value)
        if wrong:
            raise InvalidInput(f"task {self.name!r}: input: {wrong}")
        # Without white space it is more than half as long; what is far from the limit is measured in that quicker way.
        if 2 * len(to_json(value)) <= self.max_input_bytes:
            return value
        size = len(json.dumps(value, ensure_ascii=False).encode())
        if size > self.max_input_bytes:
            raise InvalidInput(
                f"task {self.name!r}: input: is {size:,} bytes; max_input_bytes is {self.max_input_bytes:,}",
                hint="shorten the input, or raise max_input_bytes of the task",
            )
        return value

    def validate_output(self, value: Json) -> Json:
        """The value itself, if it fits the output schema. Raises InvalidAnswer that names the field."""
        wrong = self._checks[1](value)
        if wrong:
            raise InvalidAnswer(f"task {self.name!r}: output: {wrong}")
        return value


# --- the whole --------------------------------------------------------------------------------------------------------


class Config(_Section):
    """Everything that apprentice.yaml says. `Config.model_validate_json(config.model_dump_json())` is an equal one."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    remote: Remote
    local: Local = Local()
    sampling: Sampling = Sampling()
    budget: Budget = Budget()
    store: StoreConfig = StoreConfig()
    teachers: tuple[Remote, ...] = ()
    """Further models that may label training data."""
    alerts: Alerts = Alerts()
    telemetry: Telemetry | None = None
    """Left out, OpenTelemetry is told nothing."""
    redaction: ChosenRedaction = NO_REDACTION
    """What is taken out before anything is kept: the name of a redactor, such as patterns, or false."""
    retention: Retention = Retention()

    @cached_property  # not a field, because it is no part of the value: neither dumped nor compared
    def source(self) -> Path | None:
        """The file that this came from, if it came from one."""
        return None

    @model_validator(mode="after")
    def _names_differ(self) -> Config:
        seen: set[str] = set()
        for index, task in enumerate(self.tasks):
            if task.name in seen:
                _refuse([(("tasks", index, "name"), f"there is another task named {task.name!r}")])
            seen.add(task.name)
        for name in {name for sink in self.alerts.sinks for name in sink.tasks or ()} - seen:
            _refuse([(("alerts",), f"no task is named {name!r}{did_you_mean(name, sorted(seen))}")])
        return self

    def task(self, name: str) -> TaskConfig:
        """The task of that name. Raises UnknownTask with the nearest names."""
        for task in self.tasks:
            if task.name == name:
                return task
        known = [task.name for task in self.tasks]
        raise UnknownTask(f"no task named {name!r}{did_you_mean(name, known)}", hint=f"configured: {', '.join(known)}")


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Config:
    """The configuration in a file. Raises ConfigError that lists everything wrong, each with file, line and field."""
    source = Path(path)
    try:
        with source.open("rb") as file:
            raw = file.read(reading.MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{source}: cannot be read: {error.strerror}", hint="`apprentice init` writes a new one"
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from error
    return parse(text, source)


def parse(text: str, source: Path | None = None) -> Config:
    """The configuration in a text; `source` is where it came from, and relative paths are relative to its folder."""
    name = str(source) if source is not None else "configuration"
    data, lines = reading.read(text, name)
    if not isinstance(data, dict):
        reading.give_up(name, lines, [((), "should be a mapping with `tasks` and `remote`")])
    data = {key: value if key == "tasks" else _resolved(value) for key, value in data.items()}
    for section in ("local", "store"):  # so that the paths in their defaults are beside the file, too
        data.setdefault(section, {})
    try:
        # By way of JSON, whose strict mode takes a list for a tuple and a text for a path, but no "5" for an int.
        config = Config.model_validate_json(
            json.dumps(data), strict=True, context={"folder": str(source.absolute().parent)} if source else None
        )
    except ValidationError as error:
        reading.give_up(name, lines, _wrong(error.errors(include_url=False)))
    config.__dict__["source"] = source  # where the cached property looks first
    return config


def _resolved(value: Json) -> Json:
    """The value with the environment's variables in place of references; one that is not set stays for `missing`."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: os.environ.get(match[1], match[0]), value)
    if isinstance(value, dict):
        return {key: _resolved(item) for key, item in value.items()}
    return [_resolved(item) for item in value] if isinstance(value, list) else value


# --- what to say when something is wrong ------------------------------------------------------------------------------


def _refuse(problems: list[Problem]) -> NoReturn:
    """Raise the problems in a form that pydantic merges into its own, each below the place that is being validated."""
    raise ValidationError.from_exception_data(
        "configuration",
        [
            InitErrorDetails(type=PydanticCustomError("own", "{said}", {"said": m}), loc=at, input=None)
            for at, m in problems
        ],
    )


def _wrong(found: list[ErrorDetails]) -> list[Problem]:
    """What pydantic found, without what is only a consequence: a list is "too short" when one of its items is wrong."""
    problems: list[Problem] = []
    for error in found:
        at = error["loc"]
        inside = any(other["loc"][: len(at)] == at and other["loc"] != at for other in found)
        if error["type"] != "too_short" or not inside:
            unknown = error["type"] == "extra_forbidden"
            problems.append((at, schemas.message(error) + (_meant(at) if unknown else "")))
    return problems


def _meant(place: Place) -> str:
    """What an unknown key may have been meant to be, among the keys of the section that it stands in."""
    section: type[BaseModel] = Config
    for part in place[:-1]:
        inside = [section.model_fields[part].annotation] if part in section.model_fields else []
        for kind in inside:  # grows on the way: a section may be within a tuple or a union
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                section = kind
            inside.extend(getattr(kind, "__args__", ()))
    return did_you_mean(str(place[-1]), section.model_fields)


# --- what else the command line asks ----------------------------------------------------------------------------------


def missing(config: Config) -> list[str]:
    """What is not there yet to serve with this configuration: variables, plugins, packages. Empty when nothing is."""
    remotes = {"remote": config.remote}
    remotes |= {f"remote.additional_providers[{i}]": r for i, r in enumerate(config.remote.additional_providers)}
    remotes |= {f"teachers[{i}]": remote for i, remote in enumerate(config.teachers)}
    students = {"local": config.local} | {f"tasks[{i}].local": t.local for i, t in enumerate(config.tasks) if t.local}
    found: list[str | None] = []
    for at, remote in remotes.items():
        found.append(_unset(remote.api_key_env, f"{at}.api_key_env"))
        found.append(_uninstalled("models", remote.provider, f"{at}.provider", remote.settings))
    for at, local in students.items():
        found.append(_uninstalled("models", local.backend, f"{at}.backend", local.settings))
        trainer, settings = local.fine_tune_backend, local.fine_tune_settings
        found.append(_uninstalled("trainers", trainer, f"{at}.fine_tune_backend", settings))
    found.append(_uninstalled("stores", config.store.backend, "store.backend", {}))
    for index, task in enumerate(config.tasks):
        name, settings = task.evaluator_settings
        found.append(_uninstalled("evaluators", name, f"tasks[{index}].evaluator", settings))
        for number, path in enumerate(task.benchmarks):
            found.append(None if path.is_file() else f"tasks[{index}].benchmarks[{number}]: there is no file {path}")
        try:
            _ = task._checks
        except ConfigError as error:
            found.append(f"tasks[{index}]: {with_hint(error)}")
    found.extend(_unset(variable, "alerts.webhooks") for variable in config.alerts.variables)
    redactions = (config.redaction, *(task.redaction for task in config.tasks))
    found.extend(_uninstalled("redactors", chosen.name, "redaction", {}) for chosen in redactions if chosen)
    if config.telemetry is not None and (package := config.telemetry.lacking) is not None:
        found.append(f"telemetry: {with_hint(MissingExtra(package, 'otel'))}")
    references = _REFERENCE.findall(config.model_dump_json(exclude={"tasks"}))
    found.extend(_unset(variable, f"referred to as ${{{variable}}}") for variable in references)
    return list(dict.fromkeys(problem for problem in found if problem))


def check_learnable(config: Config) -> None:
    """Raise ConfigError for a task that its trainer can never learn, naming the field and the way out.

    A trainer that is not installed is not asked: `missing` lists it.
    """
    for index, task in enumerate(config.tasks):
        local = task.local or config.local
        if local.fine_tune_backend is None or _uninstalled("trainers", local.fine_tune_backend, "", {}) is not None:
            continue
        try:
            plugins.build("trainers", local.fine_tune_backend, **local.fine_tune_settings).check(task.learnable_task)
        except CannotLearn as error:
            raise ConfigError(f"tasks[{index}] ({task.name}): {error}", hint=error.hint) from error


def _unset(variable: str | None, at: str) -> str | None:
    if variable is None or os.environ.get(variable):
        return None
    return f"the environment variable {variable} is not set ({at})"


def _uninstalled(kind: plugins.Kind, name: str | None, at: str, settings: Mapping[str, Json]) -> str | None:
    if name is None:
        return None
    try:
        parameters = inspect.signature(plugins.find(kind, name).build).parameters
        if "encoder" in parameters:  # what turns text into vectors is a plugin, too, with packages of its own
            plugins.find("encoders", settings.get("encoder", parameters["encoder"].default))
    except ConfigError as error:
        return f"{at}: {with_hint(error)}"
    except ImportError as error:
        return f"{at}: {kind[:-1]} {name!r} cannot be imported: {error}"
    return None


def json_schema() -> dict[str, Json]:
    """The JSON Schema of apprentice.yaml, with which editors complete and check it."""
    schema = Config.model_json_schema()
    schema["$defs"] |= schemas.DEFINITIONS
    for side in ("input_schema", "output_schema"):
        schema["$defs"]["TaskConfig"]["properties"][side] = {"$ref": "#/$defs/Shape"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "apprentice.yaml"}


def init_text(
    name: str,
    description: str,
    *,
    input_schema: str = "{text: str}",
    output_schema: str = "{category: str}",
    provider: str = "openai",
    model: str | None = None,
) -> str:
    """A commented apprentice.yaml for one task. The schemas are YAML, such as `{label: [spam, ham]}`.

    Raises ConfigError that says what is wrong when it would not load.
    """
    model = model or _USUAL_MODELS.get(provider)
    if model is None:
        raise ConfigError(f"no usual model is known for {provider!r}", hint="name one with --model")
    text = f"""\
# What is asked of a remote model until a local one has learned it. `apprentice check` says what is wrong or missing.
tasks:
  - name: {_quoted(name)}
    description: {_quoted(description)}
    # instructions: "what the remote should know beyond that"
    # Types: str, int, float, bool, dict, list, list[str], dict[str, int], enum[a, b]; with a ? behind it may be null.
    input_schema:{_block(reading.read(input_schema, "input_schema")[0])}
    output_schema:{_block(reading.read(output_schema, "output_schema")[0])}
    evaluator: structured_match  # or: exact_match, semantic_similarity, numeric, custom
    # match_fields: [a, b]  # compare these fields only
    confidence_thresholds:
      phase1_to_phase2: 50  # examples before the local model is tried
      phase2_to_phase3: 0.85  # agreement that must be proven before it serves alone
      coaching_trigger: 0.70  # agreement below this asks the remote more often
      emergency_threshold: 0.50  # agreement below this withdraws the local model

remote:
  provider: {_quoted(provider)}
  model: {_quoted(model)}
  api_key_env: {re.sub("[^A-Z0-9]", "_", provider.upper())}_API_KEY  # the NAME of the variable, never the key
  # Where its terms do not let answers teach (`apprentice licence` says), state your right:
  # permission: {{basis: "…", by: "…", date: "2026-11-21", scope: "*"}}

local:
  backend: embedded  # learns on the CPU, in this process's own background worker
  model_dir: ./models/

sampling:
  min_floor: 0.02  # never compare less than 2 % of the requests

budget:
  daily: 10.00  # US dollars; a call that might break a cap is not made
  currency: USD
"""
    parse(text)
    return text


def _block(schema: Json) -> str:
    if not isinstance(schema, dict):
        return f" {_quoted(schema)}"
    return "".join(f"\n      {_quoted(name)}: {_quoted(kind)}" for name, kind in schema.items())


def _quoted(value: Json) -> str:
    """The value as YAML on one line: plain where it is a word or a type, else JSON, which YAML 1.2 includes."""
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z_][\w.-]*(\[[\w ,]+\])?\??", value)
        and reading.read(value, "")[0] == value
    ):
        return value
    # What YAML takes for a line break or refuses, while JSON lets it stand.
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff]", lambda m: f"\\u{ord(m[0]):04x}", json.dumps(value, ensure_ascii=False)
    )
