"""The whole lifecycle on recorded answers of a real LLM, in about a minute.

The remote is an HTTP server on loopback that speaks OpenAI's wire format and answers from the recording; the engine
reaches it as it would reach OpenAI. The student learns in the background worker. One thing is not as in life: a stream
of months is played in a minute, so the play waits whenever a teaching cycle runs.

What is served, learned and decided comes from answers that were paid for. The recording is looked at again only when
everything is over, to say how good it was.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple, TextIO

from apprentice import config as configuration
from apprentice import plugins
from apprentice.config import Config
from apprentice.engine import Apprentice
from apprentice.errors import ConfigError
from apprentice.report import TaskReport, asked_remote, report
from apprentice.testing.servers import serve_recorded
from apprentice.types import Answer, Confidence, Result, Store, Value

_EVERY = 20  # requests between two pictures of the live view
_LINE_EVERY = 500  # the same where the output is no terminal
_RECENT = 200  # requests in "who answers"
_WIDTH = 60  # columns of bars and plots
_BLOCKS = " ▁▂▃▄▅▆▇█"


class Row(NamedTuple):
    """One recorded request: what was asked, what the remote answered, and what is true (None: nobody knows)."""

    text: str
    teacher: str
    gold: str | None


class PhaseStart(Value):
    phase: str
    from_request: int  # counted from 1


class VersionLine(Value):
    version: str
    trained_on: int
    certified_at: int | None  # request at which its served quality was certified; None: it never was


class Summary(Value):
    """What `apprentice demo --json` prints. Shares and accuracies in [0, 1], money in US dollars."""

    task: str
    requests: int
    remote_calls: int
    remote_share: float
    remote_share_last_quarter: float
    served_agreement: float  # of what was served with what the remote would have said
    served_accuracy: float | None
    remote_accuracy: float | None
    always_local_accuracy: float | None  # of the local model's answers since there was one, served or not
    spend_usd: float
    all_remote_usd: float
    phases: list[PhaseStart]
    versions: list[VersionLine]
    wall_s: float


def recording(task: str, folder: Path | None) -> list[Row]:
    """The rows of one recording: ours, or `TASK.jsonl.gz` (or `*_TASK.jsonl.gz`) in a folder of the user's.

    Raises ConfigError when there is none, or when it has no `text` and `teacher`.
    """
    if folder is None:
        if task != "banking77":
            raise ConfigError(f"no recording named {task!r} ships", hint="banking77, or name a folder with --data-dir")
        with as_file(files("apprentice") / "data" / "banking77.jsonl.gz") as path:
            return _rows(path)
    for pattern in (f"{task}.jsonl.gz", f"{task}.jsonl", f"*_{task}.jsonl.gz", f"*_{task}.jsonl"):
        if found := sorted(folder.glob(pattern)):
            return _rows(found[0])
    raise ConfigError(f"no recording {task}.jsonl.gz in {folder}", hint="--data-dir: the folder that has it, or none")


def _rows(path: Path) -> list[Row]:
    packed = path.read_bytes()
    text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode("utf-8")
    raw = [json.loads(line) for line in text.split("\n") if line.strip()]  # splitlines() would split in texts, too
    kept = [row for row in raw if isinstance(row.get("text"), str) and isinstance(row.get("teacher"), str)]
    if not kept:
        raise ConfigError(f"{path}: no row has `text` and a recorded answer `teacher` that is a text")
    kept.sort(key=lambda row: row.get("shuffled_order", row.get("order", 0)))  # stable: ours is in its order already
    return [Row(row["text"], row["teacher"], row.get("gold")) for row in kept]


def settings(task: str, *, base_url: str, folder: Path) -> Config:
    """The shipped demo.yaml for this task, with the remote at `base_url` and everything kept under `folder`."""
    shipped = (files("apprentice") / "data" / "demo.yaml").read_text(encoding="utf-8")
    config = configuration.parse(shipped)
    first = config.tasks[0].model_copy(update={"name": task})
    return config.model_copy(
        update={
            "tasks": (first,),
            "remote": config.remote.model_copy(update={"base_url": base_url}),
            "local": config.local.model_copy(update={"model_dir": folder / "models"}),
            "store": config.store.model_copy(update={"path": folder / "apprentice.db"}),
        }
    )


async def play(task: str, rows: Sequence[Row], *, seed: int, folder: Path, view: View | None = None) -> Config:
    """Ask every row in order, one at a time; the store under `folder` then holds the whole history."""
    answers = [{"text": row.text, "teacher": row.teacher} for row in rows]
    model = plugins.build("models", "recorded", rows=answers, answer_field="intent")
    asked = settings(task, base_url="http://127.0.0.1", folder=folder).tasks[0].task
    async with serve_recorded(model, asked) as server:
        config = settings(task, base_url=server.url, folder=folder)
        async with Apprentice(config, seed=seed) as app:
            for number, row in enumerate(rows, 1):
                result = await app.arun(task, {"text": row.text})
                await app.idle()
                if view is not None:
                    view.saw(result)
                    if number % _EVERY == 0 or number == len(rows):
                        view.draw(await app.confidence(task))
    return config


async def summarise(task: str, rows: Sequence[Row], config: Config, wall: float) -> tuple[Summary, TaskReport]:
    """How good it was, once it is over: here, and only here, the whole recording and the gold labels are read."""
    store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
    try:
        records = [record for _, record in await store.records(task)]
        events = await store.events(task, limit=10_000)
        told = (await report(config, store))[0]
    finally:
        await store.close()
    asked = [asked_remote(record) for record in records]
    quarter = asked[-max(1, len(asked) // 4) :]
    served = [_intent(record.remote if record.served == "remote" else record.local) for record in records]
    local = [(_intent(record.local), row.gold) for record, row in zip(records, rows, strict=True) if record.local]
    certified = {
        str(event.evidence["version"]): int(event.evidence["request"]) for event in events if event.name == "CERTIFIED"
    }
    phases: list[PhaseStart] = []
    for number, record in enumerate(records, 1):
        if not phases or phases[-1].phase != record.decision.phase:
            phases.append(PhaseStart(phase=record.decision.phase, from_request=number))
    return Summary(
        task=task,
        requests=len(records),
        remote_calls=sum(asked),
        remote_share=_mean(asked),
        remote_share_last_quarter=_mean(quarter),
        served_agreement=_mean([said == row.teacher for said, row in zip(served, rows, strict=True)]),
        served_accuracy=_accuracy([(said, row.gold) for said, row in zip(served, rows, strict=True)]),
        remote_accuracy=_accuracy([(row.teacher, row.gold) for row in rows]),
        always_local_accuracy=_accuracy(local),
        spend_usd=told.cost / 1e6,
        all_remote_usd=told.all_remote_cost / 1e6,
        phases=phases,
        versions=[
            VersionLine(version=v.id, trained_on=v.trained_on, certified_at=certified.get(v.id)) for v in told.versions
        ],
        wall_s=round(wall, 1),
    ), told


async def demo(
    task: str, *, requests: int | None, seed: int, data: Path | None, keep: Path | None, out: TextIO | None
) -> Summary:
    """Play a recording and return the summary; with `out`, show a live view and a closing screen on it.

    `keep` is a folder that keeps the store and the models; without it they are gone afterwards. Raises ConfigError.
    """
    rows = recording(task, data)[:requests]
    if not rows:
        raise ConfigError("--requests must be at least 1")
    with tempfile.TemporaryDirectory(prefix="apprentice-demo-") as temporary:
        folder = keep if keep is not None else Path(temporary)
        if (folder / "apprentice.db").exists():
            raise ConfigError(f"{folder} holds the store of an earlier demo", hint="name another folder with --keep")
        started = time.perf_counter()
        config = await play(
            task, rows, seed=seed, folder=folder, view=None if out is None else View(task, len(rows), out)
        )
        summary, told = await summarise(task, rows, config, time.perf_counter() - started)
    if out is not None:
        print(closing(summary, told), file=out)
    return summary


class View:
    """Four lines that are drawn again and again on a terminal; elsewhere one line now and then."""

    def __init__(self, task: str, total: int, out: TextIO) -> None:
        self.task, self.total, self.out = task, total, out
        self.number = self.cost = self.paid = 0
        self.recent: deque[bool] = deque(maxlen=_RECENT)
        self.drawn = False

    def saw(self, result: Result) -> None:
        self.number += 1
        self.cost += result.cost
        self.paid += result.cost > 0
        self.recent.append(result.cost > 0)

    def draw(self, now: Confidence) -> None:
        if not self.out.isatty():
            if self.number % _LINE_EVERY == 0 or self.number == self.total:
                print(f"{self.number:>6}  " + " · ".join(self._facts(now)), file=self.out, flush=True)
            return
        share = _mean(self.recent)
        filled = round(share * _WIDTH)
        lines = [
            f"{self.task}: request {self.number:,} of {self.total:,}",
            f"  remote [{'█' * filled}{'·' * (_WIDTH - filled)}] local",
            *(f"  {fact}" for fact in self._facts(now)),
        ]
        back = f"\x1b[{len(lines)}F" if self.drawn else ""
        print(back + "\n".join(f"\x1b[2K{line}" for line in lines), file=self.out, flush=True)
        self.drawn = True

    def _facts(self, now: Confidence) -> list[str]:
        saved = self.cost / self.paid * (self.number - self.paid) if self.paid else 0.0
        agreement = "agreement not known yet"
        if now.agreement is not None:
            agreement = f"student agrees {now.agreement:.0%} [{now.lower:.0%}, {now.upper:.0%}]"
        return [
            f"phase {now.phase}" + (f", student {now.version}" if now.version else ""),
            f"{_mean(self.recent):.0%} of the last {len(self.recent)} asked the remote",
            agreement,
            f"${self.cost / 1e6:.2f} spent, ${saved / 1e6:.2f} saved",
        ]


def closing(summary: Summary, told: TaskReport) -> str:
    """One screen: what happened, what it cost, how good it was."""
    plot = _plot([point.remote_share for point in told.trajectory])
    saved = 1 - summary.spend_usd / summary.all_remote_usd if summary.all_remote_usd else 0.0
    phases = ", ".join(f"{start.phase} from request {start.from_request}" for start in summary.phases)
    last = summary.remote_share_last_quarter
    accuracy = []
    if summary.served_accuracy is not None and summary.remote_accuracy is not None:
        accuracy = [
            f"served right     {summary.served_accuracy:.1%}  (the remote alone: {summary.remote_accuracy:.1%})"
        ]
    return "\n".join(
        [
            "",
            f"{summary.task}: {summary.requests:,} requests in {summary.wall_s:.0f} s",
            "",
            "asked the remote, share of requests over time",
            *plot,
            "",
            f"remote calls     {summary.remote_calls:,} ({summary.remote_share:.1%}; last quarter {last:.1%})",
            f"spent            ${summary.spend_usd:.2f} instead of ${summary.all_remote_usd:.2f} (saved {saved:.0%})",
            f"served agreement {summary.served_agreement:.1%}  (with the remote; agreement is not accuracy)",
            *accuracy,
            f"versions         {', '.join(f'{v.version} ({v.trained_on})' for v in summary.versions) or 'none'}",
            f"phases           {phases}",
        ]
    )


def _plot(shares: Sequence[float], height: int = 5) -> list[str]:
    """Columns of blocks, the top line is 100 %."""
    wide = max(1, _WIDTH // max(1, len(shares)))
    lines = []
    for level in reversed(range(height)):
        cells = [_BLOCKS[round(min(max(share * height - level, 0.0), 1.0) * 8)] * wide for share in shares]
        mark = {height - 1: "100 %", 0: "  0 %"}.get(level, "     ")
        lines.append(f"  {mark} │{''.join(cells)}")
    return lines


def _intent(answer: Answer | None) -> str | None:
    return None if answer is None or answer.output is None else str(answer.output["intent"])


def _accuracy(pairs: Sequence[tuple[str | None, str | None]]) -> float | None:
    known = [said == gold for said, gold in pairs if gold is not None]
    return _mean(known) if known else None


def _mean(values: Sequence[bool] | deque[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
