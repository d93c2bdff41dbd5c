"""What the two chat formats share: which model is meant, how a task's input is found in a message, how a stream is cut."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictBool, StrictFloat, StrictInt
from pydantic_core import to_json

from apprentice.config import TaskConfig
from apprentice.errors import UnknownTask
from apprentice.gateway.desk import Gateway
from apprentice.gateway.reading import parsed
from apprentice.gateway.refusals import Refusal
from apprentice.gateway.relay import Format, Relay
from apprentice.types import Json

TASK = "task:"  # before a task's name, in the place of a model's
PIECE = 24  # characters in one event of a stream
MOST_MESSAGES = 2_000
_NAME = re.compile(r"[A-Za-z0-9][\w.:@/-]{0,199}", re.ASCII)
_SPACE = " \t\n\r"  # which may stand before a value of JSON

type Number = StrictInt | StrictFloat


class Body(BaseModel):
    """A part of a request: an unknown field is an error, because nobody would notice that it does nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Text(Body):
    """A part of a message. Others (images, sound, files) have no bound on what they cost."""

    type: Literal["text"]
    text: str


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


def choose(gateway: Gateway, model: str, format: Format) -> TaskConfig | Relay:
    """Who answers: a task, or a configured remote that speaks the format. Raises Refusal: 400, 404."""
    if model.startswith(TASK):
        try:
            return gateway.config.task(model.removeprefix(TASK))
        except UnknownTask as error:
            raise Refusal(404, "model_not_found", str(error), param="model") from error
    if not _NAME.fullmatch(model) or ".." in model or "//" in model:
        raise Refusal(400, "invalid_request", "model: is no name of a model; addresses are configured", param="model")
    found = gateway.relays.find(model, format)
    if isinstance(found, Relay):
        return found
    if found is not None:
        message = f"model: {model!r} is {found}'s, and is asked in its format"
        raise Refusal(400, "invalid_request", message, param="model")
    known = [f"{TASK}{task.name}" for task in gateway.config.tasks] + [name for name, _ in gateway.relays.names()]
    raise Refusal(404, "model_not_found", f"no model {model!r}; configured: {', '.join(known)}", param="model")


def input_of(task: TaskConfig, said: Iterable[str | Iterable[Text] | None]) -> Json:
    """The input that the last message of the user is: JSON, or the plain text of a task whose input is one text.

    Raises Refusal that names `messages`; whether it fits the schema is checked where it is asked.
    """
    *_, last = [None, *said]
    if last is None:
        raise Refusal(400, "invalid_request", "messages: there is no message of the user", param="messages")
    text = last if isinstance(last, str) else "".join(part.text for part in last)
    only = _only_text(task.task.input_schema)
    if only is not None and not text.lstrip(_SPACE).startswith("{"):
        return {only: text}
    try:
        value = parsed(text.encode(errors="surrogatepass"))
    except Refusal:
        if only is not None:
            return {only: text}
        fields = ", ".join(task.task.input_schema.get("properties", {}))
        message = f"messages: the last one of the user should be the input as JSON, with the fields {fields}"
        raise Refusal(400, "invalid_request", message, param="messages") from None
    if only is not None and not (isinstance(value, dict) and only in value):
        return {only: text}  # a text that happens to be JSON
    return value


def _only_text(schema: dict[str, Any]) -> str | None:
    """The name of the schema's only field, if that is a text."""
    properties = schema.get("properties") or {}
    if len(properties) != 1:
        return None
    [(name, field)] = properties.items()
    return str(name) if isinstance(field, dict) and field.get("type") == "string" else None


def pieces(text: str) -> Iterator[str]:
    """The text in pieces that make it again."""
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def as_text(output: Json) -> str:
    return to_json(output).decode()


def event(data: Json, name: str | None = None) -> str:
    """One server-sent event. JSON has no line break of its own, so one line of data is enough."""
    head = f"event: {name}\n" if name is not None else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n"


def mapping(value: Json) -> dict[str, Json]:
    return value if isinstance(value, dict) else {}
