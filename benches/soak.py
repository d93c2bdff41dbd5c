"""Does anything grow? Twenty thousand requests on the embedded student, with memory, descriptors, threads and tasks counted.

    python -m benches.soak [--quick] [--json]

The shipped recording is asked again and again, each time with another number in the text, so that no two requests are
equal; the remote answers from a process of its own, so that its account of the calls is not counted as ours. Memory is what
Python has allocated (tracemalloc), after a collection; the slope is fitted over what follows the first third, with the
upper end of its 95 % interval. `--quick` asks 200, of a few intents that are soon
learned, and its slope informs only: what is remembered on purpose still fills.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from apprentice import Apprentice
from apprentice.config import Config
from apprentice.demo import Row, recording, settings
from apprentice.types import Json
from benches import Figure, Options, at_least, at_most, run, shown

REQUESTS, WARM, EVERY = 20_000, 1_200, 200
TASK = "banking77"
QUICK = 200  # requests; a student after half as many before them
FEW = {"atm_support", "card_acceptance", "change_pin", "exchange_rate"}  # intents of the quick form


def remote(folder: Path, rows: list[Row]) -> tuple[subprocess.Popen[str], str]:
    """A remote in a process of its own, which knows the recorded answer to each text, and its address."""
    file = folder / "recording.jsonl"
    file.write_text("".join(json.dumps({"text": text, "teacher": answer}) + "\n" for text, answer in _answers(rows)))
    command = [sys.executable, "-m", "apprentice.testing", str(file)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().split()[-1]


def _answers(rows: list[Row]) -> Iterator[tuple[str, Json]]:
    """Texts without an end, with the answers that the remote gives: `{"intent": …}`."""
    for number in range(WARM + REQUESTS):
        row = rows[number % len(rows)]
        yield f"{row.text} ({number})", {"intent": row.teacher}


async def soak(config: Config, rows: list[Row], requests: int, options: Options) -> list[Figure]:
    texts = (text for text, _ in _answers(rows))
    async with Apprentice(config, seed=0) as app:
        for _ in range(QUICK if options.quick else WARM):
            await app.arun(TASK, {"text": next(texts)})
            await app.idle()
        tracemalloc.start()
        points: list[tuple[int, int]] = []
        gc.collect()  # what nobody has a hold on any more is not ours
        before, local, started = _open(), 0, time.perf_counter()
        for number in range(requests):
            local += (await app.arun(TASK, {"text": next(texts)})).source == "local"
            if number % (EVERY // 10 if options.quick else EVERY) == 0:
                gc.collect()
                points.append((number, tracemalloc.get_traced_memory()[0]))
            if number % 2000 == 0:
                options.say(
                    f"{number} requests, {points[-1][1] / 2**20:.2f} MiB, resident {_resident() / 2**20:.0f} MiB"
                )
        seconds = time.perf_counter() - started
        await app.idle()
        gc.collect()
        after = _open()
        tracemalloc.stop()
    slope, upper = trend([point for point in points if point[0] >= requests / 3])
    return [
        at_least("answered locally", local / requests, 0.3 if options.quick else 0.5, "share"),
        shown("memory a request", slope, "bytes"),
        shown("memory a request, upper end", upper, "bytes")
        if options.quick
        else at_most("memory a request, upper end", upper, 16, "bytes"),
        *(
            at_most(f"more {name}", now - then, 0)
            for (name, then), now in zip(before.items(), after.values(), strict=True)
        ),
        shown("requests a second, tracing on", requests / seconds, "1/s"),
    ]


def trend(points: list[tuple[int, int]]) -> tuple[float, float]:
    """The slope of the least-squares line, and the upper end of its 95 % interval (normal approximation)."""
    x_mean, y_mean = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    left = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in points)
    return slope, slope + 1.96 * (left / max(1, len(points) - 2) / spread) ** 0.5


def _open() -> dict[str, int]:
    """What a process can leak beside memory."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        # asyncio's own pool grows to the cores and four, and no further.
        "threads": sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate()),
        "tasks": len(asyncio.all_tasks()),
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(options: Options) -> list[Figure]:
    """One long run."""
    rows = [row for row in recording(TASK, None) if row.teacher in FEW or not options.quick]
    with tempfile.TemporaryDirectory() as folder:
        server, url = remote(Path(folder), rows)
        try:
            config = settings(TASK, base_url=url, folder=Path(folder))
            task = config.tasks[0]
            # A student that is served at once: the soak is about memory, not about promises.
            easy = task.confidence_thresholds.model_copy(
                update={"phase2_to_phase3": 0.4, "coaching_trigger": 0.2, "emergency_threshold": 0.1}
                | ({"phase1_to_phase2": QUICK // 2} if options.quick else {})
            )
            task = task.model_copy(update={"confidence_thresholds": easy})
            local = config.local.model_copy(update={"fine_tune_batch_size": 10**6})
            config = config.model_copy(update={"tasks": (task,), "local": local})
            return asyncio.run(soak(config, rows, QUICK if options.quick else REQUESTS, options))
        finally:
            server.terminate()
            server.communicate()


if __name__ == "__main__":
    sys.exit(run("soak", measure))
