"""PURE: Examples as the conversations that they were, in the formats that fine-tuning takes, and read back from them.

The messages are those that a provider is sent when it answers: a model is taught on what it will be asked. Sources:
https://platform.openai.com/docs/guides/supervised-fine-tuning, …/direct-preference-optimization (chat, and pairs), and
https://huggingface.co/docs/trl/dataset_formats (prompt and completion).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from apprentice.errors import InvalidInput, TrainingError
from apprentice.schemas import is_utf8
from apprentice.types import Example, Json, Task

FORM = "Answer with one JSON value that fits the given schema, and with nothing else."
_MOST_REPEATS = 10
_PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_ESCAPED = json.JSONEncoder(separators=(",", ":"))

type Format = Literal["chat", "completion", "dpo"]
type Message = dict[str, str]  # {"role": …, "content": …}


class Pair(NamedTuple):
    """An input with the answer that is wanted, and one that is not."""

    input: Json
    preferred: Json
    rejected: Json


class Row(NamedTuple):
    """One line that was read back. `messages` end before the answer; `rejected` is None where there is no such answer."""

    messages: list[Message]
    answer: Json
    rejected: Json = None


def system(task: Task) -> str:
    """The system message: what is asked, how, and in which form."""
    return "\n\n".join(part for part in (task.description, task.instructions, FORM) if part)


def prompt(task: Task, input: Json) -> list[Message]:
    """The messages before the answer: the system message, the task's examples as turns, and the input.

    Raises InvalidInput for what JSON cannot say.
    """
    messages = [{"role": "system", "content": system(task)}]
    for example in task.examples:
        messages.append({"role": "user", "content": as_json(example["input"])})
        messages.append({"role": "assistant", "content": answer(task, example["output"])})
    return [*messages, {"role": "user", "content": as_json(input)}]


def answer(task: Task, value: Json) -> str:
    """An answer as a provider gives it: JSON, and an object: any other value is wrapped as {"value": …}."""
    return as_json(value if is_object(task.output_schema) else {"value": value})


def unwrapped(task: Task, value: Json) -> Json:
    """The value of an answer that `answer` wrote.

    >>> task = Task(name="t", description="d", input_schema={}, output_schema={"type": "integer"})
    >>> unwrapped(task, json.loads(answer(task, 3)))
    3
    """
    wrapped = not is_object(task.output_schema) and isinstance(value, dict) and set(value) == {"value"}
    return value["value"] if wrapped else value


def chat(task: Task, examples: Iterable[Example]) -> str:
    """OpenAI's chat format, one conversation a line; Fireworks, Together and TRL read the same."""
    return _lines({"messages": [*prompt(task, example.input), _said(task, example.target)]} for example in examples)


def completion(task: Task, examples: Iterable[Example], *, rejected: bool = False) -> str:
    """A prompt and its completion a line, both as messages.

    `rejected`: beside it, under that name, the answer that the local model gave and should not have, where one is known.
    """
    return _lines(
        {"prompt": prompt(task, example.input), "completion": [_said(task, example.target)]}
        | ({"rejected": [_said(task, example.rejected)]} if rejected and is_pair(example) else {})
        for example in examples
    )


def is_pair(example: Example) -> bool:
    """Whether an example has an answer that is not wanted, beside another one that is."""
    return example.rejected is not None and _key(example.rejected) != _key(example.target)


def pairs(examples: Iterable[Example]) -> list[Pair]:
    """Those of the examples that have both answers."""
    return [Pair(example.input, example.target, example.rejected) for example in examples if is_pair(example)]


def preferences(task: Task, pairs: Iterable[Pair]) -> str:
    """OpenAI's format for direct preference optimisation: one input with two answers a line."""
    return _lines(
        {
            "input": {"messages": prompt(task, pair.input)},
            "preferred_output": [_said(task, pair.preferred)],
            "non_preferred_output": [_said(task, pair.rejected)],
        }
        for pair in pairs
    )


def read(task: Task, text: str, format: Format) -> list[Row]:
    """The rows of a file of that format. Raises TrainingError that names the line, for one that is not of it."""
    rows = []
    for number, line in enumerate(text.rstrip("\n").split("\n") if text else [], start=1):
        try:
            rows.append(_row(task, json.loads(line), format))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise TrainingError(f"line {number} is no row of the format {format!r}: {type(error).__name__}") from error
    return rows


def input_of(row: Row) -> Json:
    """The input that a row asks about: the last message before the answer, as JSON."""
    return json.loads(row.messages[-1]["content"])


def weighed(examples: Sequence[Example]) -> list[Example]:
    """The examples with their weights said in the only way that providers understand, in an order of their own.

    Of several targets for one input, the heaviest stays (of equal ones the one that sorts first), with an answer that was
    rejected for it if any was; a row of weight w is there round(w) times, at most ten times and at least once. The order of
    the examples does not matter.
    """
    targets: dict[str, dict[str, tuple[float, Example]]] = {}
    for example in sorted(examples, key=_place):
        known = targets.setdefault(_key(example.input), {})
        weight, before = known.get(_key(example.target), (0.0, example))
        if example.rejected is None and before.rejected is not None:
            example = example.model_copy(update={"rejected": before.rejected})
        known[_key(example.target)] = (example.weight + weight, example)
    found: list[Example] = []
    for known in targets.values():
        _, best = max(known.values(), key=lambda one: one[0])  # the first of equal ones
        found += [best] * min(_MOST_REPEATS, max(1, round(best.weight)))
    return found


def as_json(value: Json) -> str:
    """The value as JSON text on one line, with as few bytes as JSON allows, that UTF-8 can carry.

    Raises InvalidInput for what JSON cannot say (NaN, objects of Python).
    """
    try:
        text = _PLAIN.encode(value)
        # Half of a surrogate pair has no UTF-8; escaped, it travels as it is.
        return text if is_utf8(text) else _ESCAPED.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"the value is not JSON: {type(error).__name__}") from error


def _said(task: Task, value: Json) -> Message:
    return {"role": "assistant", "content": answer(task, value)}


def _lines(rows: Iterable[Json]) -> str:
    # U+2028 and its like end a line for some readers.
    return "".join(_one_line(as_json(row)) + "\n" for row in rows)


def _one_line(text: str) -> str:
    for mark in ("\x85", "\u2028", "\u2029"):
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _row(task: Task, line: Json, format: Format) -> Row:
    def value(message: Json) -> Json:
        if message["role"] != "assistant":
            raise ValueError(message["role"])
        return unwrapped(task, json.loads(message["content"]))

    rejected: Json = None
    if format == "chat":
        *before, last = line["messages"]
    elif format == "completion":
        before, [last] = line["prompt"], line["completion"]
        if "rejected" in line:
            [other] = line["rejected"]
            rejected = value(other)
    else:
        before, [last] = line["input"]["messages"], line["preferred_output"]
        [other] = line["non_preferred_output"]
        rejected = value(other)
    messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in before]
    if messages[-1]["role"] != "user":
        raise ValueError(messages[-1]["role"])
    json.loads(messages[-1]["content"])
    return Row(messages, value(last), rejected)


def _place(example: Example) -> tuple[str, str, float, str, str]:
    return _key(example.input), _key(example.target), example.weight, example.request_id or "", _key(example.rejected)


def _key(value: Json) -> str:
    return json.dumps(value, sort_keys=True)


def is_object(schema: dict[str, Json]) -> bool:
    """Whether the root is an object, also through one reference into its own definitions (pydantic writes such)."""
    reference = schema.get("$ref")
    if isinstance(reference, str):
        target: Json = schema
        for part in reference.removeprefix("#/").split("/"):
            target = target.get(part) if isinstance(target, dict) else None
        return isinstance(target, dict) and target.get("type") == "object"
    return schema.get("type") == "object"
