"""A model that answers from a recording: for tests, demos and replays, without a key and without a cent."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from apprentice.errors import ConfigError, ModelRejected
from apprentice.types import Answer, Json, Task, Usage

_NOTHING = Usage(input_tokens=0, output_tokens=0)


def build(
    path: str | Path | None = None,
    rows: list[dict[str, Json]] | None = None,
    input_key: str = "text",
    answer_key: str = "teacher",
    answer_field: str | None = None,
    model: str = "recorded",
    max_tokens: int = 0,
    timeout: float = 0,
    temperature: float | None = None,
    allow_internal: bool = False,
) -> Recorded:
    """A model that gives the recorded answer to a recorded input.

    `path`: JSON Lines, also compressed (.gz); or `rows` themselves. `input_key` and `answer_key` name the two fields of
    a row. `answer_field`: the output is an object with the answer in this field. An answer of null stands for one that
    could not be read; it is given as an Answer without output. Of several rows with one input, the first readable one
    counts. The last four settings are those that every remote is given; nothing is sent here, so they change nothing.

    Raises ConfigError that names the line, for a file that cannot be read and for rows without those fields.
    """
    if (path is None) == (rows is None):
        raise ConfigError("model 'recorded' needs either `path` or `rows`")
    source = str(path) if path is not None else "rows"
    pairs = _pairs(_read(Path(path)) if path is not None else enumerate(rows or (), 1), source, input_key, answer_key)
    answers: dict[str, Json] = {}
    for key, answer in pairs:
        if answers.get(key) is None:
            answers[key] = answer
    return Recorded(answers, input_key, answer_field, model)


class Recorded:
    """Answers from a recording. It costs nothing: it reports a usage of zero tokens."""

    max_tokens = 0

    def __init__(self, answers: dict[str, Json], input_key: str, answer_field: str | None, model: str) -> None:
        self.model = model
        self._answers = answers
        self._input_key = input_key
        self._field = answer_field

    def request_bytes(self, task: Task, input: Json) -> int:
        """0: nothing is sent."""
        return 0

    async def answer(self, task: Task, input: Json) -> Answer:
        """The recorded answer. Raises ModelRejected for an input that is not in the recording."""
        key = _key(input)
        if key not in self._answers and isinstance(input, dict) and self._input_key in input:
            key = _key(input[self._input_key])
        if key not in self._answers:
            raise ModelRejected("recorded: the input is not in the recording", outcome="rejected")
        answer = self._answers[key]
        if answer is None:
            return Answer(model=self.model, usage=_NOTHING, problem="the recorded answer could not be read")
        output = answer if self._field is None else {self._field: answer}
        text = json.dumps(output, ensure_ascii=False)
        return Answer(output=output, text=text, model=self.model, usage=_NOTHING)

    async def close(self) -> None:
        return None


def _key(value: Json) -> str:
    """One text for one input: a text stands for itself, anything else for its JSON with sorted keys."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))


def _read(path: Path) -> Iterator[tuple[int, Json]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, EOFError) as error:
        raise ConfigError(f"the recording {path} cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"the recording {path} is not JSON Lines: {error}") from error


def _pairs(
    rows: Iterable[tuple[int, Json]], source: str, input_key: str, answer_key: str
) -> Iterator[tuple[str, Json]]:
    for number, row in rows:
        for name in (input_key, answer_key):
            if not isinstance(row, dict) or name not in row:
                raise ConfigError(f"{source}, line {number}: there is no field {name!r}")
        yield _key(row[input_key]), row[answer_key]
