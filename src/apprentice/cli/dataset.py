"""Commands about training data: export."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from apprentice import dialogues, licence
from apprentice.cli.terminal import Command, print_json, with_store
from apprentice.config import Config, TaskConfig
from apprentice.errors import ConfigError, TrainingError
from apprentice.selection import about, choose, gold, lawful
from apprentice.trainers import replace_file
from apprentice.types import Example, Json, Store

_SPLITS = ("train", "test")


class _Found(NamedTuple):
    """Examples by split, what else is known of their requests, how many rows were refused or left out for each reason,
    and how those in training are balanced."""

    task: TaskConfig
    splits: Mapping[str, Sequence[Example]]
    refused: Mapping[str, int]
    about: Mapping[str, Json]
    day: str


def _export(parsed: argparse.Namespace) -> int:
    """Write what a task has recorded as files for fine-tuning elsewhere: only rows that may train, with a card about them."""

    async def find(config: Config, store: Store) -> _Found:
        return await _found(config, store, parsed.task)

    found = with_store(parsed, find)
    texts = {split: _text(found, rows, parsed.format) for split, rows in found.splits.items()}
    if not any(texts.values()):
        reasons = "; ".join(f"{rows} rows because {why}" for why, rows in found.refused.items())
        kind = "pair of a right and a wrong answer" if parsed.format == "dpo" else "row"
        raise TrainingError(
            f"task {parsed.task!r} has no {kind} that may train" + (f": {reasons}" if reasons else ""),
            hint="`apprentice licence` explains",
        )
    card = _card(found, texts, parsed.format)
    try:
        for split, text in texts.items():
            replace_file(parsed.out / f"{split}.jsonl", text.encode())
        replace_file(parsed.out / "README.md", _markdown(card).encode())
    except OSError as error:
        raise ConfigError(
            f"{parsed.out} cannot be written: {error.strerror}", hint="--out DIR: another place"
        ) from error
    if parsed.json:
        print_json(card)
    else:
        counts = ", ".join(f"{card['splits'][split]['rows']} {split}" for split in _SPLITS)
        print(f"{parsed.out}: {counts}; {sum(found.refused.values())} rows refused (README.md there says what is what)")
    return 0


async def _found(config: Config, store: Store, task_name: str) -> _Found:
    task = config.task(task_name)
    selection = await choose(config, task, store, await gold(store, task_name))
    today = licence.day(time.time())
    refused: Counter[str] = Counter()
    splits: dict[str, Sequence[Example]] = {}
    described: dict[str, Json] = {}
    # The rows that teaching holds out stay apart here, too: under the terms of the gate, which examining does not need.
    for split, rows in zip(_SPLITS, (selection.training, selection.held_out), strict=True):
        permitted, sifted = lawful(config, task, selection._replace(training=rows), today)
        splits[split] = permitted.training
        refused.update(sifted.reasons)
        described = described or about(permitted)
    return _Found(task, splits, refused, described, today.isoformat())


def _text(found: _Found, rows: Sequence[Example], format: dialogues.Format) -> str:
    task = found.task.task
    writers: dict[str, Callable[[], str]] = {
        "chat": lambda: dialogues.chat(task, rows),
        "completion": lambda: dialogues.completion(task, rows),
        "dpo": lambda: dialogues.preferences(task, dialogues.pairs(rows)),
    }
    return writers[format]()


def _card(found: _Found, texts: Mapping[str, str], format: dialogues.Format) -> dict[str, Json]:
    rows = {
        split: [row for row in rows if format != "dpo" or dialogues.is_pair(row)]
        for split, rows in found.splits.items()
    }
    every = [row for some in rows.values() for row in some]

    def counted(said: Callable[[Example], str]) -> dict[str, int]:
        return dict(Counter(map(said, every)).most_common())

    return {
        "task": found.task.name,
        "description": found.task.description,
        "format": format,
        "date": found.day,
        "splits": {
            split: {
                "file": f"{split}.jsonl",
                "rows": len(rows[split]),
                "bytes": len(text.encode()),
                "sha256": sha256(text.encode()).hexdigest(),
            }
            for split, text in texts.items()
        },
        "source": counted(lambda row: row.source),
        "teacher": counted(
            lambda row: "a person" if not row.model else f"{row.teacher or 'nobody said where'}: {row.model}"
        ),
        "terms": counted(lambda row: row.terms),
        "basis": counted(lambda row: row.basis),
        "refused": dict(found.refused),
        "left_out": dict(found.about["left_out"]),
        "set": {key: value for key, value in found.about.items() if key != "left_out"},
        "output_schema": found.task.task.output_schema,
    }


def _markdown(card: Mapping[str, Json]) -> str:
    def table(title: str, counts: Mapping[str, int]) -> list[str]:
        lines = [f"| {_cell(name)} | {rows:,} |" for name, rows in counts.items()]
        return ["", f"| {title} | rows |", "|---|---:|", *(lines or ["| none | 0 |"])]

    splits = [
        f"| {split} | `{told['file']}` | {told['rows']:,} | {told['bytes']:,} | `{told['sha256']}` |"
        for split, told in card["splits"].items()
    ]
    formats = {
        "chat": "One conversation a line, as OpenAI's supervised fine-tuning takes it.",
        "completion": "A prompt and its completion a line, both as messages.",
        "dpo": "One input with a preferred and a non-preferred answer a line, as OpenAI's preference fine-tuning takes it.",
    }
    return "\n".join(
        [
            f"# {_line(card['task'])}",
            "",
            _line(card["description"]),
            "",
            f"{formats[card['format']]} Made on {card['date']}. `test` holds the tenth of the inputs that teaching holds out;"
            " inputs that are nearly the same are on one side.",
            "",
            "| split | file | rows | bytes | SHA-256 |",
            "|---|---|---:|---:|---|",
            *splits,
            *table("source", card["source"]),
            *table("teacher", card["teacher"]),
            *table("terms", card["terms"]),
            *table("basis: why the row may train", card["basis"]),
            *table("refused, and not in the files", card["refused"]),
            *table("left out: on neither side", card["left_out"]),
            *(
                line
                for name, field in card["set"]["fields"].items()
                for line in table(f"{name or 'output'} of train, the commonest", field["counts"])
            ),
            "",
            "Answers are JSON of this schema:",
            "",
            "```json",
            json.dumps(card["output_schema"], indent=2, ensure_ascii=False),
            "```",
            "",
        ]
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|") or "none told"


COMMANDS = (
    Command(
        "export",
        _export,
        "apprentice export classify --format chat --out ./classify-data",
        (
            ("task", {}),
            ("--format", {"choices": ("chat", "completion", "dpo"), "default": "chat", "help": "default: %(default)s"}),
            (
                "--out",
                {"type": Path, "required": True, "metavar": "DIR", "help": "train.jsonl, test.jsonl and README.md"},
            ),
        ),
    ),
)
