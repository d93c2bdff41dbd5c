"""What is kept of a request: its words without what must not be kept, and its tags.

The redactor, a plugin, says where something is. A `Veil` puts placeholders there, one veil a request: `<EMAIL_1>` is the same
address in the input and in both answers, and nothing outside this request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping

from apprentice import plugins
from apprentice.config import Config, TaskConfig
from apprentice.stores import digest
from apprentice.types import Answer, Json, Record, Redactor, Score

SUBJECT = "subject"  # the tag that says whom a request is about
_PLACEHOLDER = re.compile(r"<[A-Z][A-Z0-9_]*_[0-9]+>")


def redactor(config: Config, task: TaskConfig | None = None) -> Redactor | None:
    """What is configured for the task, or (None) for requests of no task; None where nothing is. Raises ConfigError."""
    chosen = config.redaction if task is None or task.redaction is None else task.redaction
    if not chosen:
        return None
    built: Redactor = plugins.build("redactors", chosen.name, **chosen.settings)
    return built


class Veil:
    """Placeholders for what must not be kept of one request, and what they stand for. Without a redactor it does nothing."""

    def __init__(self, redactor: Redactor | None) -> None:
        self._redactor = redactor
        self._names: dict[str, str] = {}  # placeholder by value
        self._values: dict[str, str] = {}  # the other way round
        self._counts: dict[str, int] = {}
        self._typed: set[str] = set()  # placeholders that somebody wrote: they stand for nothing
        self._read: set[str] = set()  # texts that the redactor has seen

    def __bool__(self) -> bool:
        return self._redactor is not None

    def hide(self, value: Json) -> Json:
        """The value with placeholders in its texts, the keys of objects included; numbers stay.

        What an earlier value had keeps its placeholder, wherever it occurs.
        """
        if self._redactor is None:
            return value
        texts = [text for text in _texts(value) if text not in self._read]
        self._read.update(texts)
        self._typed.update(name for text in texts for name in _PLACEHOLDER.findall(text) if name not in self._values)
        for text in texts:
            for finding in self._redactor(text):
                self._name(text[finding.start : finding.end], finding.kind)
        if not self._names:
            return value
        longest_first = sorted(self._names, key=len, reverse=True)
        anything = re.compile("|".join(map(re.escape, longest_first)))
        return _mapped(value, lambda text: anything.sub(lambda match: self._names[match[0]], text))

    def show(self, value: Json) -> Json:
        """The value with what the placeholders stand for. One that stands for nothing stays."""
        if not self._values:
            return value
        return _mapped(value, lambda text: _PLACEHOLDER.sub(lambda match: self._values.get(match[0], match[0]), text))

    def _name(self, words: str, kind: str) -> None:
        if words in self._names:
            return
        while True:
            self._counts[kind] = number = self._counts.get(kind, 0) + 1
            name = f"<{kind}_{number}>"
            if name not in self._typed:
                break
        self._names[words], self._values[name] = name, words

    def kept(self, record: Record) -> Record:
        """The Record as it may be stored. The input comes first, so that equal inputs have equal placeholders."""
        if self._redactor is None:
            return record.model_copy(update={"tags": self.tags(record.tags)}) if SUBJECT in record.tags else record
        return record.model_copy(
            update={
                "input": self.hide(record.input),
                "remote": self._answer(record.remote),
                "local": self._answer(record.local),
                "score": self._score(record.score),
                "repeat": self._score(record.repeat),
                "rival": self._score(record.rival),
                "error": self.hide(record.error),
                "tags": self.tags(record.tags),
                "attempts": tuple(
                    attempt.model_copy(update={"problem": self.hide(attempt.problem)}) for attempt in record.attempts
                ),
            }
        )

    def tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        """The tags as they may be stored: the subject as its digest."""
        return {name: digest(text) if name == SUBJECT else self.hide(text) for name, text in tags.items()}

    def _answer(self, answer: Answer | None) -> Answer | None:
        if answer is None:
            return None
        hidden = {"output": self.hide(answer.output), "text": "", "problem": self.hide(answer.problem)}
        return answer.model_copy(update=hidden)

    def _score(self, score: Score | None) -> Score | None:
        return None if score is None else score.model_copy(update={"fields": self.hide(score.fields)})


NO_VEIL = Veil(None)


async def veil_for(redactor: Redactor | None, input: Json) -> Veil:
    """For one request, with its input in it. It is read in a thread, so that others are answered meanwhile: how long a redactor
    takes is its own affair, and thousands of short texts take as long as one that is long."""
    if redactor is None:
        return NO_VEIL
    veil = Veil(redactor)
    await asyncio.to_thread(veil.hide, input)
    return veil


def _texts(value: Json) -> Iterator[str]:
    """Every text in a JSON value, keys included; objects in the order of their keys, which says nothing."""
    waiting = [value]  # a stack of its own, because a value may be nested deeper than Python recurses
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, dict):
            for key in sorted(found, reverse=True):
                waiting += [found[key], key]
        elif isinstance(found, list | tuple):
            waiting += reversed(found)


def _mapped(value: Json, change: Callable[[str], str]) -> Json:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list | tuple) else value
