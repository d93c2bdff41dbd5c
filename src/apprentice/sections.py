"""What every section of apprentice.yaml shares, and the sections `alerts` and `telemetry`: who is told of what."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from apprentice import plugins
from apprentice.errors import ConfigError, MissingExtra
from apprentice.schemas import did_you_mean, with_hint

type Severity = Literal["page", "warn", "info"]

_BY_SEVERITY: dict[Severity, frozenset[str]] = {
    # Answers are wrong or money is gone: somebody should look now.
    "page": frozenset({"ALARM", "ANTI_CORRELATED", "BUDGET_EXHAUSTED", "CONTRACT_BROKEN", "EMERGENCY"}),
    # Somebody should look today.
    "warn": frozenset(
        {
            "ALERTS_DROPPED",
            "ALERTS_STUCK",
            "BATCH_FAILED",
            "BATCH_NOT_COLLECTED",
            "BUDGET_WARNING",
            "CANARY_ABORTED",
            "COACHING",
            "CONFIG_INVALID",
            "EVALUATION_FAILED",
            "INFEASIBLE",
            "INPUT_SHIFT",
            "LABELLING_STOPPED",
            "MODEL_CHANGED",
            "ROWS_REFUSED",
            "TEACHER_CHANGED",
            "TEACHER_SWITCH_PROPOSED",
            "TIGHTEN",
            "TRAINING_FAILED",
            "UNVERIFIED",
            "VERSION_TAINTED",
            "VERSION_UNUSABLE",
        }
    ),
    "info": frozenset(
        {
            "ALERTS_RESUMED",
            "BATCH_ENDED",
            "BUDGET_CHANGED",
            "CANARY_PROMOTED",
            "CANARY_STARTED",
            "CANARY_STEP",
            "CERTIFIED",
            "ERASED",
            "FEEDBACK",
            "KEY_CREATED",
            "KEY_REVOKED",
            "LABELLED",
            "LOOSEN",
            "MODE",
            "MODEL_RESUMED",
            "PROBED",
            "PROMOTED",
            "REJECTED",
            "ROLLED_BACK",
            "TEACHERS_COMPARED",
        }
    ),
}
EVENTS: dict[str, Severity] = {name: severity for severity, names in _BY_SEVERITY.items() for name in names}
"""Every event, by its severity. One that is not here is "info"."""


class Section(BaseModel):
    """Unknown keys are errors, and nothing is changed after it was read."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    return Path(info.context["folder"], path) if info.context else path


FilePath = Annotated[Path, AfterValidator(_beside_the_file)]


def _period(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if (found := re.fullmatch(r"([1-9][0-9]{0,4})d", value)) is None:
        raise ValueError("should be days, such as 90d")
    return int(found[1])


_Days = Annotated[int, BeforeValidator(_period, json_schema_input_type=str), Field(ge=1, le=99_999)]


class Redaction(Section):
    """What is taken out of texts before they are kept, and before anything is learned from them."""

    name: str = "patterns"
    """The name of a redactor plugin; false in place of the section: none."""
    settings: dict[str, Any] = {}
    """The plugin's settings, such as the kinds that it looks for."""

    def __bool__(self) -> bool:
        return bool(self.name)

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if not self:
            return self
        try:
            plugins.check("redactors", self.name, self.settings)
        except MissingExtra:
            pass  # `missing` lists it
        except ConfigError as error:
            raise ValueError(with_hint(error)) from error
        return self


NO_REDACTION = Redaction(name="")


def _chosen(value: Any) -> Any:
    if value is False:
        return NO_REDACTION
    return Redaction.model_validate({"name": value}) if isinstance(value, str) else value


ChosenRedaction = Annotated[
    Redaction, BeforeValidator(_chosen, json_schema_input_type=str | Redaction | Literal[False])
]


class Retention(Section):
    """For how long what was said is kept: "90d". What the contract and the ledger need is kept for ever."""

    inputs: _Days | None = None
    """Inputs and answers of requests, with what people and teachers said about them; for ever when left out."""
    imported: _Days | None = None
    """Imported rows, from the day of the answer on; those without a day stay."""


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("should be the NAME of an environment variable, never the address or the secret itself")
    return name


def _event(name: str) -> str:
    if name not in EVENTS and name not in _BY_SEVERITY:
        raise ValueError(
            f"{name!r} is neither page, warn, info nor the name of an event{did_you_mean(name, list(EVENTS))}"
        )
    return name


_Variable = Annotated[str, AfterValidator(_variable)]
_Events = tuple[Annotated[str, AfterValidator(_event)], ...]


class Sink(Section):
    """One place where notices go."""

    name: str = Field(default="", pattern=r"^[A-Za-z0-9 ._-]{0,100}$")
    """By which its place among the events is remembered, so keep it; made of what it is when left out."""
    events: _Events = ("page", "warn")
    """Which events: severities (page, warn, info) and names such as PROMOTED."""
    tasks: tuple[str, ...] | None = None
    """Of which tasks; of all when left out."""
    timeout: float = Field(default=10.0, gt=0, le=60)
    """Seconds for one try."""

    @property
    def kind(self) -> str:
        """webhook, file or command."""
        return type(self).__name__.lower()

    @property
    def label(self) -> str:
        """What it is called, in no word of which there is a secret."""
        return self.name or re.sub(r"[^A-Za-z0-9 ._-]", "_", f"{self.kind} {self._what}")[:100]

    @property
    def _what(self) -> str:
        raise TypeError(f"a {self.kind} says by itself what it is")


class Webhook(Sink):
    """An address that is sent each notice with a POST; signed as Standard Webhooks say where there is a secret."""

    url_env: _Variable
    """The NAME of the environment variable that holds the address, because such an address is a secret."""
    secret_env: _Variable | None = None
    """The NAME of the variable with the signing secret (whsec_…); two, separated by a space, while it is being changed."""
    shape: Literal["generic", "slack"] = "generic"
    """generic: {type, timestamp, data}; slack: {text}."""
    allow_internal: bool = False
    """Whether the address may be a loopback or private one, or http without TLS."""

    @property
    def _what(self) -> str:
        return self.url_env


class File(Sink):
    """A file to which each notice is appended as a line of JSON."""

    path: FilePath

    @property
    def _what(self) -> str:
        return self.path.name


class Command(Sink):
    """A command that is run for each notice, which it finds as JSON on its standard input; 0 means that it was told."""

    run: tuple[str, ...] = Field(min_length=1)
    """The command and its arguments, handed over as they are: no shell reads them."""

    @property
    def _what(self) -> str:
        return Path(self.run[0]).name


def _short(key: str, model: type[Sink]) -> BeforeValidator:
    """A text alone stands for a mapping with that key."""

    def spread(value: Any, info: ValidationInfo) -> Any:
        given = {key: value} if isinstance(value, str) else value
        # By way of JSON, like all of the file: what a function was given is no longer JSON, where a list is a tuple.
        return (
            model.model_validate_json(json.dumps(given), strict=True, context=info.context)
            if isinstance(given, dict)
            else given
        )

    return BeforeValidator(spread, json_schema_input_type=str | model)


class Alerts(Section):
    """Who is told about events."""

    webhooks: tuple[Annotated[Webhook, _short("url_env", Webhook)], ...] = ()
    """A text alone is the NAME of the variable that holds the address."""
    files: tuple[Annotated[File, _short("path", File)], ...] = ()
    """A text alone is the path."""
    commands: tuple[Command, ...] = ()
    period: float = Field(default=3600.0, ge=0)
    """Seconds within which the same event of the same task is told once."""

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """All of them, in the order in which they are listed."""
        return (*self.webhooks, *self.files, *self.commands)

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that the sinks need."""
        return tuple(name for hook in self.webhooks for name in (hook.url_env, hook.secret_env) if name is not None)

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        labels = [sink.label for sink in self.sinks]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two sinks are called {twice!r}; give each a `name` of its own")
        return self


class Telemetry(Section):
    """What OpenTelemetry is told of each request; needs the extra `otel`."""

    export: bool = False
    """Whether this process sends it, by OTLP over HTTP as the OTEL_* variables say; else the program around it does."""
    capture_content: bool = False
    """Whether inputs and outputs are told, too, as they are kept: without what is redacted, and not with capture off."""

    @property
    def lacking(self) -> str | None:
        """A package that it needs and that is not installed."""
        needed = ["opentelemetry-api"]
        if self.export:
            needed += ["opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"]
        return next((package for package in needed if not any(metadata.Distribution.discover(name=package))), None)
