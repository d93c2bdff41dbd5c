"""Importers: other tools' logs -> rows of what was asked, what was answered, by whom, when and at what price.

An importer is one file with `build(**settings)` that gives an `Importer`. What they share is here: files that are read row
by row, and what conversations, token counts, moments and names of providers look like in logs. Nobody trusts a log: a row
that is of no use is told with its place and the reason, and the next one is read.
"""

from __future__ import annotations

import codecs
import csv as tables  # a file of ours is called csv, and would take the name
import gzip
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from apprentice.errors import ConfigError
from apprentice.types import Json, Micros, Seconds, Usage

LONGEST = 16 * 2**20  # bytes of one row
_DOCUMENT = 4 * LONGEST  # bytes of a file that is one JSON value over several lines
_CHUNK = 2**16
_GROWN = 2**26  # bytes from which a compressed file is looked at for what it grows to
_GROWTH = 300  # times its size: logs that repeat themselves stay far below
_DAMAGED = "the file is damaged from here on"
_BOMB = f"the file grows to more than {_GROWTH} times its size: it is read no further"
_DAMAGE = (OSError, EOFError, zlib.error)  # what reading a gzip file that is no whole one raises
_GZIP = b"\x1f\x8b"
_BOM = codecs.BOM_UTF8
_NEVER = 4_102_444_800.0  # 2100-01-01: a later moment is a mistake


@dataclass(frozen=True, slots=True)
class Imported:
    """What one row of a log tells. Empty, 0 or None is what it does not tell.

    `input`: what was asked: the text of the last message of the user, or a value. `output`: the answer: its text, or a value.
    """

    place: str = ""  # in the file: "line 12"
    input: Json = None
    output: Json = None
    turns: int = 0  # messages of user and assistant before the last one
    cells: bool = False  # every value in input and output is the text of a cell
    model: str = ""  # that answered
    provider: str = ""  # where it was asked: "provider@host", as `place_of` gives it
    at: Seconds = 0.0
    usage: Usage | None = None
    cost: Micros | None = None
    id: str = ""  # as the log calls it
    problem: str = ""  # why the row is of no use: one of few sentences, without a word of the row


class Unusable(Exception):
    """Why a row is of no use: one of few sentences, without a word of the row."""


@runtime_checkable
class Importer(Protocol):
    """Rows of a file, in its order, one at a time. Raises ConfigError for a file that cannot be opened."""

    def rows(self, path: Path) -> Iterable[Imported]: ...


type Row = tuple[str, Json | Unusable]  # where it is, and what it says or why it cannot be read
type Read = Callable[[Mapping[str, Json]], Iterable[Imported]]


class Log:
    """The importer of files whose rows are objects. `read` gives what an object tells, or raises Unusable."""

    def __init__(self, read: Read, files: Callable[[Path], Iterator[Row]] | None = None) -> None:
        self._read = read
        self._files = files or json_rows

    def rows(self, path: Path) -> Iterator[Imported]:
        for place, value in self._files(path):
            number = 0
            try:
                if isinstance(value, Unusable):
                    raise value
                if not isinstance(value, dict):
                    raise Unusable("is no object")
                for found in self._read(value):
                    number += 1
                    yield replace(found, place=place if number == 1 else f"{place}, {number}")
            except Unusable as problem:
                yield Imported(place=place, problem=str(problem))


# --- files ------------------------------------------------------------------------------------------------------------


def json_rows(path: Path) -> Iterator[Row]:
    """The values in a file, plain or gzip: one a line, or the elements of one array, or one over several lines.

    No more than one row is held. Empty lines are passed over.
    """
    start = _start(path)
    if start[:1] == b"[":
        yield from _elements(path)
    elif start == b"{":
        yield "the document", _document(path)
    else:
        for number, line in _lines(path):
            if isinstance(line, Unusable) or line.strip():
                yield f"line {number}", _value(line)


def csv_rows(path: Path, delimiter: str = ",") -> Iterator[Row]:
    """The rows of a table with a header, each as an object of texts. Raises ConfigError for a column that is there twice."""
    tables.field_size_limit(LONGEST)  # of the whole process: Python's 128 kB are less than a prompt may have
    broken: list[Unusable] = []

    def texts() -> Iterator[str]:
        for _, line in _lines(path):
            if isinstance(line, Unusable):
                broken.append(line)
            else:
                yield line.decode(errors="surrogateescape")

    reader = tables.reader(texts(), delimiter=delimiter)
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader, None)
        except tables.Error:
            yield f"line {reader.line_num}", Unusable("is no row of a table")
            continue
        yield from ((f"about line {reader.line_num}", problem) for problem in broken)
        broken.clear()
        if cells is None:
            return
        if header is None:
            header = [name.strip() for name in cells]
            if twice := next((name for name in header if header.count(name) > 1), None):
                raise ConfigError(f"{path}: the column {twice!r} is there twice")
        elif cells:
            yield f"line {reader.line_num}", _cells(header, cells)


def _cells(header: list[str], cells: list[str]) -> dict[str, str] | Unusable:
    if len(cells) != len(header):
        return Unusable("has more or fewer cells than the header")
    if any("\udc80" <= letter <= "\udcff" for cell in cells if not cell.isascii() for letter in cell):
        return Unusable("is not UTF-8 text")
    return dict(zip(header, cells, strict=True))


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The file, unpacked, and how many bytes of it are read at most. Raises ConfigError."""
    try:
        file = path.open("rb")
        start = file.read(2)
        file.seek(0)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="name a file that can be read") from error
    with file:
        if start == _GZIP:
            unpacked: Any = gzip.GzipFile(fileobj=file)  # an IO[bytes] in all that is used here
            yield unpacked, max(_GROWN, _GROWTH * os.fstat(file.fileno()).st_size)
        else:
            yield file, sys.maxsize


def openable(path: Path) -> None:
    """Nothing for a file that can be opened. Raises ConfigError."""
    with _open(path):
        pass


def _start(path: Path) -> bytes:
    """The first line with something in it, as far as the first chunk has it."""
    with _open(path) as (file, _):
        try:
            lines = file.read(_CHUNK).removeprefix(_BOM).strip().splitlines()
        except _DAMAGE:
            return b""
    return lines[0].strip() if lines else b""


def _lines(path: Path) -> Iterator[tuple[int, bytes | Unusable]]:
    """The lines of a file with their numbers, or why one cannot be had."""
    with _open(path) as (file, limit):
        number = 0
        while True:
            number += 1
            try:
                line = piece = file.readline(LONGEST + 1)
                while len(piece) > LONGEST and not piece.endswith(b"\n") and file.tell() <= limit:
                    piece = file.readline(LONGEST + 1)
                grown = file.tell() > limit
            except _DAMAGE:
                yield number, Unusable(_DAMAGED)
                return
            if not line:
                return
            if grown:
                yield number, Unusable(_BOMB)
                return
            if number == 1:
                line = line.removeprefix(_BOM)
            yield number, line if len(line) <= LONGEST else Unusable(f"is longer than {LONGEST:,} bytes")


def _value(line: bytes | Unusable) -> Json | Unusable:
    if isinstance(line, Unusable):
        return line
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError:
        return Unusable("is not UTF-8 text")
    except ValueError:
        return Unusable("is not JSON")
    except RecursionError:
        return Unusable("is nested too deeply")


def _no_constant(name: str) -> Json:
    raise ValueError(name)  # NaN and Infinity are no JSON


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _document(path: Path) -> Json | Unusable:
    with _open(path) as (file, _):
        try:
            text = file.read(_DOCUMENT + 1)
        except _DAMAGE:
            return Unusable("the file is damaged")
    if len(text) > _DOCUMENT:
        return Unusable(f"one value over several lines is longer than {_DOCUMENT:,} bytes: write one value a line")
    return _value(text.removeprefix(_BOM))


def _elements(path: Path) -> Iterator[Row]:
    """The elements of the array in a file. Behind one that cannot be read nobody knows where the next one begins."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, number, ended = "", 0, False
    with _open(path) as (file, limit):
        while True:
            number += 1
            rest = rest.lstrip(" \t\r\n,[" if number == 1 else " \t\r\n,")
            try:
                value, end = _DECODER.raw_decode(rest)
                if ended or end < len(rest):
                    yield f"row {number}", value
                    rest = rest[end:]
                    continue
                raise ValueError  # a number may go on in the next chunk
            except RecursionError:
                yield f"row {number}", Unusable("is nested too deeply: the rest of the array is not read")
                return
            except ValueError:
                number -= 1
                if rest[:1] == "]":
                    return
                if ended or len(rest) > LONGEST:
                    yield f"row {number + 1}", Unusable("is not JSON: the rest of the array is not read")
                    return
            try:
                more = file.read(max(_CHUNK, len(rest)))  # doubled, so that a long row is not read again and again
                ended = not more
                rest += decoder.decode(more, final=ended)
            except (*_DAMAGE, UnicodeDecodeError):
                yield f"row {number + 1}", Unusable(_DAMAGED)
                return
            if file.tell() > limit:
                yield f"row {number + 1}", Unusable(_BOMB)
                return


# --- what logs look like ----------------------------------------------------------------------------------------------


def mapping(value: Json) -> dict[str, Json]:
    """The object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def mappings(value: Json) -> list[dict[str, Json]]:
    """The objects in a list; none for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text_of(*values: Json) -> str:
    """The first of the values that is a text with something in it; an empty one if none is."""
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


def written(value: Json) -> Json:
    """The value that a column holds as JSON text; the value itself if it is no such text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "[", '"'):
        return value
    found = _value(value.encode(errors="replace"))
    return value if isinstance(found, Unusable) else found


def asked(value: Json) -> tuple[Json, int]:
    """What was asked, and how many messages of user and assistant came before it.

    `value`: messages, in a list or under `messages`; or a prompt, or a value without messages. Raises Unusable for a
    conversation that does not end with the user, or asks with more than text.
    """
    messages = value
    if isinstance(value, dict) and ("messages" in value or "model" in value):  # otherwise it was itself what was asked
        messages = value.get("messages", value.get("input", value))
    roles = [one.get("role") for one in mappings(messages)]
    if not any(roles):
        if (prompt := messages if isinstance(messages, str) else value) in (None, "", [], {}):
            raise Unusable("has no prompt")
        return prompt, 0
    said = [one for one in mappings(messages) if one.get("role") not in ("system", "developer", None)]
    if not said or said[-1].get("role") != "user":
        raise Unusable("does not end with a message of the user")
    if (found := content(said[-1])) in (None, "", [], {}):
        raise Unusable("has no prompt")
    return found, len(said) - 1


def content(message: Mapping[str, Json]) -> Json:
    """The text of a message, or the value that it holds. Raises Unusable for pictures, sounds and files."""
    value = message.get("content", message.get("parts"))
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        found = part if isinstance(part, str) else _part(mapping(part))
        if not isinstance(found, str):
            return found  # the arguments of a template
        texts.append(found)
    return "".join(texts)


def _part(part: Mapping[str, Json]) -> Json:
    kind = part.get("type")
    if kind in ("thinking", "reasoning", "thought", "redacted_thinking"):
        return ""
    for key in ("text", "content", "arguments", "value"):
        if key in part and kind in ("text", "input_text", "output_text", "raw_text", None):
            return part[key]
    raise Unusable("holds more than text")


def answered(message: Mapping[str, Json]) -> Json:
    """What a message of the assistant answers: its text, or the arguments of its one call of a tool.

    Raises Unusable for a refusal, for several calls, and for none of it.
    """
    if message.get("refusal"):
        raise Unusable("the model refused to answer")
    calls = mappings(message.get("tool_calls"))
    parts = mappings(message.get("content")) + mappings(message.get("parts"))
    calls += [part for part in parts if part.get("type") in ("tool_call", "tool_use", "function_call")]
    if isinstance(message.get("function_call"), dict):
        calls.append(message["function_call"])
    if len(calls) > 1:
        raise Unusable("answers with several calls of tools")
    if calls:
        call = mapping(calls[0].get("function")) or calls[0]
        value = next((call[key] for key in ("arguments", "raw_arguments", "input") if call.get(key) is not None), None)
    else:
        value = content(message)
    if value is None or value == "":
        raise Unusable("has no answer")
    return value


_FINISHED: dict[Json, str] = {
    "length": "was cut off before its end",
    "max_tokens": "was cut off before its end",
    "content_filter": "was filtered by the provider",
    "refusal": "the model refused to answer",
    "error": "failed at the provider",
}


def finished(reason: Json) -> None:
    """Raise Unusable for an answer that did not come to its own end."""
    if isinstance(reason, str) and reason.lower() in _FINISHED:
        raise Unusable(_FINISHED[reason.lower()])


def completion(body: Mapping[str, Json]) -> Json:
    """What the body of a provider's answer says: chat completions and responses of OpenAI, messages of Anthropic.

    Raises Unusable.
    """
    if body.get("error"):
        raise Unusable("failed at the provider")
    choices = mappings(body.get("choices"))
    if choices:
        finished(choices[0].get("finish_reason"))
        message = mapping(choices[0].get("message"))
        return answered(message or {"content": choices[0].get("text")})
    if isinstance(body.get("output"), list):
        if body.get("status") == "incomplete":
            raise Unusable(_FINISHED["length"])
        items = mappings(body["output"])
        said = [one for one in items if one.get("type") in ("message", None)]
        calls = [one for one in items if one.get("type") == "function_call"]
        parts = [part for one in said for part in mappings(one.get("content"))]
        refused = any(part.get("type") == "refusal" for part in parts)
        return answered({"content": parts, "tool_calls": calls, "refusal": refused})
    finished(body.get("stop_reason"))
    return answered(body)


_INPUT = ("prompt_tokens", "input_tokens", "promptTokens", "inputTokens", "input")
_OUTPUT = ("completion_tokens", "output_tokens", "completionTokens", "outputTokens", "output")


def usage_of(found: Json) -> Usage | None:
    """Token counts under the names that logs have for them; None where one of the two is missing or is no count."""
    counts = mapping(found)
    input, output = (
        next((counts[key] for key in keys if counts.get(key) is not None), None) for keys in (_INPUT, _OUTPUT)
    )
    input, output = count(input), count(output)
    if input is None or output is None:
        return None
    details = mapping(counts.get("prompt_tokens_details", counts.get("input_tokens_details")))
    thoughts = mapping(counts.get("completion_tokens_details", counts.get("output_tokens_details")))
    cached = count(details.get("cached_tokens", counts.get("input_cached_tokens"))) or 0
    return Usage(
        input_tokens=input,
        output_tokens=output,
        cached_tokens=min(cached, input),
        reasoning_tokens=min(count(thoughts.get("reasoning_tokens")) or 0, output),
    )


def count(value: Json) -> int | None:
    """The whole number of at least 0 that a log holds, also as text; None for anything else."""
    if isinstance(value, str) and len(value) <= 18 and value.isascii() and value.isdigit():
        value = int(value)
    return value if type(value) is int and 0 <= value < 10**12 else None


def dollars(value: Json) -> Micros | None:
    """Micro-dollars of an amount in US dollars, rounded up; None for what is no amount."""
    try:
        amount = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return math.ceil(amount * 1e6 - 1e-6) if 0 <= amount < 1e6 else None


def moment(value: Json) -> Seconds:
    """Seconds since 1970 of a moment: a number (of seconds, milli- or nanoseconds) or ISO 8601, UTC where no zone is said.

    0 for what is no moment of our time.

    >>> moment("2026-03-01T10:00:00Z") == moment(1772359200000) == moment("2026-03-01 10:00:00")
    True
    """
    if isinstance(value, str):
        try:
            value = float(value) if value.strip().replace(".", "", 1).isdigit() else _instant(value)
        except (ValueError, OverflowError):
            return 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e20:
        return 0.0
    seconds = float(value)
    if seconds > 1e17:
        seconds /= 1e9
    elif seconds > 1e11:
        seconds /= 1e3
    return seconds if seconds < _NEVER else 0.0


def _instant(text: str) -> float:
    found = datetime.fromisoformat(text.strip())
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


# What logs call a provider -> the plugin that speaks to it, and its public host. Names: litellm's `custom_llm_provider`
# (https://docs.litellm.ai/docs/providers) and OpenTelemetry's `gen_ai.provider.name`
# (https://opentelemetry.io/docs/specs/semconv/registry/attributes/gen-ai/).
_PLACES: dict[str, tuple[str, str]] = {
    "openai": ("openai", "api.openai.com"),
    "anthropic": ("anthropic", "api.anthropic.com"),
    "google": ("google", "generativelanguage.googleapis.com"),
    "gemini": ("google", "generativelanguage.googleapis.com"),
    "gcp.gemini": ("google", "generativelanguage.googleapis.com"),
    "google_ai_studio_gemini": ("google", "generativelanguage.googleapis.com"),
    "google_genai": ("google", "generativelanguage.googleapis.com"),
    "vertex_ai": ("google", "aiplatform.googleapis.com"),
    "gcp.vertex_ai": ("google", "aiplatform.googleapis.com"),
    "gcp_vertex_gemini": ("google", "aiplatform.googleapis.com"),
    "azure": ("openai", "?"),  # each customer has a host of their own
    "azure.ai.openai": ("openai", "?"),
    "azure.ai.inference": ("openai", "models.inference.ai.azure.com"),
    "mistral": ("openai", "api.mistral.ai"),
    "mistral_ai": ("openai", "api.mistral.ai"),
    "mistralai": ("openai", "api.mistral.ai"),
    "deepseek": ("openai", "api.deepseek.com"),
    "xai": ("openai", "api.x.ai"),
    "x_ai": ("openai", "api.x.ai"),
    "groq": ("openai", "api.groq.com"),
    "together": ("openai", "api.together.xyz"),
    "together_ai": ("openai", "api.together.xyz"),
    "fireworks": ("openai", "api.fireworks.ai"),
    "fireworks_ai": ("openai", "api.fireworks.ai"),
    "openrouter": ("openai", "openrouter.ai"),
    "cohere": ("openai", "api.cohere.com"),
    "ollama": ("ollama", "localhost"),
    "ollama_chat": ("ollama", "localhost"),
    "vllm": ("vllm", "localhost"),
    "hosted_vllm": ("vllm", "localhost"),
    "llama_cpp": ("llama_cpp", "localhost"),
}
_USUAL = {"openai@api.openai.com", "anthropic@api.anthropic.com", "google@generativelanguage.googleapis.com"}
_OWN = ("ollama", "vllm", "llama_cpp")
_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]{0,63}")
_HOST = re.compile(r"[a-z0-9_.:-]{1,253}|\?")


def place_of(provider: str, address: str = "") -> str:
    """Where it was asked, as an Answer has it: "provider@host", with "?" for what the log does not tell.

    `provider`: as a log names it, or "provider@host". `address`: the base URL or the host, where the log has one. The host of
    a provider's usual address is left out, as a configuration without `base_url` does.

    >>> place_of("openai", "https://api.openai.com/v1/"), place_of("deepseek"), place_of("azure"), place_of("")
    ('openai@', 'openai@api.deepseek.com', 'openai@?', '?@?')
    """
    name, _, host = provider.strip().lower().partition("@")
    plugin, usual = _PLACES.get(name, (name if _NAME.fullmatch(name) else "?", "?"))
    try:
        host = host or (urlsplit(address if "//" in address else f"//{address}").hostname or "")
    except ValueError:
        host = "?"
    if not host and plugin in _OWN:
        return f"{plugin}@"
    place = f"{plugin}@{(host if _HOST.fullmatch(host) else '?') if host else usual}"
    return f"{plugin}@" if place in _USUAL else place
