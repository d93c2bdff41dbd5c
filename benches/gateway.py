"""What the gateway costs, beside raw access to its upstream and beside other gateways, with everything recorded.

    python -m benches.gateway [--quick] [--json] [--seconds N] [--rounds N] [--port PORT] [--model NAME]
                              [--peer LABEL=URL]... [--interpreter PYTHON]... [--no-local]

One upstream that answers at once, `apprentice serve` in front of it (one worker, keys, caps, a Record of each request on
the disk before its answer), and every peer that is named: an OpenAI-compatible base URL that has the same upstream behind
it. Each round asks all of them in turn; the medians of the rounds count. Every process is real, and its own. A peer's CPU is
that of the local process that listens at its port.

LiteLLM's proxy as a peer, in an environment of its own (`pip install "litellm[proxy]" httpx2 aiohttp`): a file lite.yaml

    model_list:
      - model_name: bench
        litellm_params: {model: openai/bench, api_base: "http://127.0.0.1:8490/v1", api_key: none}

then `litellm --config lite.yaml --host 127.0.0.1 --port 8491 --num_workers 1`, and here `--port 8490
--peer LiteLLM=http://127.0.0.1:8491/v1`. The bars against LiteLLM need a peer of that name; the bars in the process need an
`--interpreter` that has litellm, aiohttp or httpx2. `--quick` counts, and times nothing that is held to a bar.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx2
import yaml

from apprentice import Apprentice, config, plugins
from apprentice.demo import recording
from apprentice.process import free_port
from apprentice.types import Store
from benches import Figure, Options, at_least, at_most, run, shown
from benches.soak import remote as recorded
from benches.traffic import TEXT, spin

TRAFFIC = str(Path(__file__).with_name("traffic.py"))
WIDE = 64
DELAY = 50  # milliseconds of the slow upstream
CLIENTS = ("aiohttp", "httpx2", "litellm")
ENCODERS = ("minilm", "wordllama")  # the accurate one, which is the default, and the fast one
CONFIG = """
tasks:
  - name: sort
    description: "Say what kind of thing is meant"
    input_schema: {text: str}
    output_schema: {kind: [fruit, animal, tool]}
    evaluator: exact_match
remote:
  provider: openai
  model: bench
  base_url: BASE_URL
  allow_internal: true
  price: {input: 0.15, output: 0.6}
  max_tokens: 64
  concurrency: 64
budget: {daily: 100000, monthly: 1000000}
local: {backend: embedded, learn: 'off'}
"""


class Asked(NamedTuple):
    """Options of this bench alone."""

    seconds: float
    rounds: int
    port: int
    model: str
    peers: list[tuple[str, str]]
    interpreters: list[str]
    local: bool


class Target(NamedTuple):
    """Something that speaks OpenAI's format. `pid` 0: nobody knows whose CPU it takes."""

    label: str
    url: str
    key: str
    model: str
    pid: int


type Results = dict[tuple[str, str], list[float]]  # (label, measure) -> one value a round


@contextlib.contextmanager
def upstream(port: int) -> Iterator[str]:
    """The base URL of an upstream in a process of its own."""
    command = [sys.executable, TRAFFIC, "upstream", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


def tell(url: str, path: str) -> int:
    """Ask the upstream for something; how many calls it has had."""
    with urllib.request.urlopen(url.removesuffix("v1") + path, timeout=30) as answer:
        calls: int = json.load(answer)["calls"]
        return calls


@contextlib.contextmanager
def gateway(file: Path) -> Iterator[Target]:
    """`apprentice serve` with this configuration, once it answers; asked for its first task."""
    cli = [sys.executable, "-m", "apprentice.cli"]
    command = [*cli, "keys", "create", "bench", "--json", "--config", str(file)]
    key = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["key"]
    port = free_port()
    with subprocess.Popen(
        [*cli, "serve", "--config", str(file), "--port", str(port)], stderr=subprocess.DEVNULL
    ) as served:
        try:
            while True:
                assert served.poll() is None, "the gateway ended"
                with contextlib.suppress(httpx2.TransportError):
                    if httpx2.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200:
                        break
            task = config.load(file).tasks[0].name
            yield Target("apprentice", f"http://127.0.0.1:{port}/v1", key, f"task:{task}", served.pid)
        finally:
            served.terminate()
            served.wait(60)


def load(target: Target, width: int, seconds: float, says: Sequence[str] = ()) -> tuple[dict[str, Any], float]:
    """What the load was told, and the microseconds of CPU that the target took for a request (nan: unknown)."""
    before = cpu(target.pid)
    command = [sys.executable, TRAFFIC, "load", target.url, target.key, target.model, str(width), str(seconds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, input="\n".join(says))
    found: dict[str, Any] = json.loads(done.stdout)
    if found["bad"]:
        raise SystemExit(f"{target.label}: {found['bad']} requests failed: {found['first_bad']}")
    return found, (cpu(target.pid) - before) / max(1, found["count"]) * 1e6


def cpu(pid: int) -> float:
    """Seconds of CPU that a process and its threads have taken; nan for none."""
    if not pid:
        return float("nan")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def listener(url: str) -> int:
    """The process of this machine that listens at the URL's port; 0 where nobody can be found."""
    port = httpx2.URL(url).port
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].partition(":")[2], 16) == port}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            if any(str(descriptor.readlink()) in sockets for descriptor in folder.iterdir()):
                return int(folder.parent.name)
    return 0


def one_round(targets: Sequence[Target], url: str, seconds: float, results: Results) -> None:
    for target in targets:
        found, _ = load(target, 1, seconds)
        results[target.label, "p50 at 1"].append(found["p50"])
    for target in targets:
        found, used = load(target, WIDE, seconds)
        results[target.label, "rps at 64"].append(found["count"] / found["seconds"])
        results[target.label, "p99 at 64"].append(found["p99"])
        results[target.label, "cpu at 64"].append(used)
    tell(url, f"delay/{DELAY}")
    for target in targets:
        for width in (1, WIDE):
            results[target.label, f"slow at {width}"].append(load(target, width, seconds)[0]["p50"])
    tell(url, "delay/0")


async def inside(file: Path, seconds: float) -> dict[str, Any]:
    """`run()` in this process."""
    async with Apprentice(config.load(file)) as app:
        return await spin(lambda: app.arun("sort", {"text": TEXT}), WIDE, seconds)


def clients(url: str, asked: Asked, file: Path, results: Results) -> None:
    """CPU of a call at 64 at once: `run()`, and each client library that one of the interpreters has."""

    def note(label: str, found: dict[str, Any]) -> None:
        results[label, "inside"].append(found["cpu"] / found["count"] * 1e6)
        results[label, "inside rps"].append(found["count"] / found["seconds"])

    command = [sys.executable, "-m", "benches.gateway", "--inside", str(file), "--seconds", str(asked.seconds)]
    note("run()", json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    for kind in CLIENTS:
        for python in dict.fromkeys([*asked.interpreters, sys.executable]):
            command = [python, "-W", "ignore", TRAFFIC, "client", kind, url, str(WIDE), str(asked.seconds)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode == 0:
                note(kind, json.loads(done.stdout.splitlines()[-1]))
                break


async def recorded_of(file: Path) -> tuple[int, set[str]]:
    """How many Records there are, and the states in the ledger."""
    kept = config.load(file).store
    store: Store = plugins.build("stores", kept.backend, path=kept.path)
    try:
        count = await store.count("sort") + await store.count("passthrough")
        return count, {line.state for line in await store.spending()}
    finally:
        await store.close()


def between(asked: Asked, url: str, folder: Path, say: Any) -> tuple[Results, list[Figure]]:
    """The rounds, and whether everything that was asked is recorded."""
    results: Results = defaultdict(list)
    file = folder / "apprentice.yaml"
    file.write_text(CONFIG.replace("BASE_URL", url))
    with gateway(file) as ours:
        relayed = ours._replace(label="apprentice, model by name", model="bench")
        others = [Target(label, base, "none", asked.model, listener(base)) for label, base in asked.peers]
        before = tell(url, "calls")
        for target in (ours, relayed):
            load(target, 4, asked.seconds / 4)  # warm
        own = tell(url, "calls") - before
        for number in range(asked.rounds):
            say(f"round {number + 1} of {asked.rounds}")
            before = tell(url, "calls")
            one_round([ours, relayed], url, asked.seconds, results)
            own += tell(url, "calls") - before
            one_round([Target("upstream itself", url, "none", asked.model, 0), *others], url, asked.seconds, results)
    rows, states = asyncio.run(recorded_of(file))
    return results, [
        at_most("apprentice: calls without a Record, or the reverse", abs(own - rows), 0),
        at_most("apprentice: states in the ledger besides settled", len(states - {"settled"}), 0),
    ]


def local(asked: Asked, folder: Path, encoder: str, say: Any) -> list[Figure]:
    """An embedded student on the shipped recording: taught by 600 answers, then asked through the gateway."""
    rows = recording("banking77", None)
    server, url = recorded(folder, rows)
    try:
        data = yaml.safe_load((Path(config.__file__).parent / "data" / "demo.yaml").read_text())
        data["tasks"][0]["confidence_thresholds"] |= {
            "phase2_to_phase3": 0.4, "coaching_trigger": 0.2, "emergency_threshold": 0.1,
        }  # fmt: skip
        data["remote"]["base_url"] = url
        data["local"] = data.get("local", {}) | {
            "fine_tune_batch_size": 10**6,
            "fine_tune_settings": {"encoder": encoder},
            "model_dir": str(folder / "models"),
        }
        data["store"] = {"path": str(folder / "apprentice.db")}
        file = folder / "apprentice.yaml"
        file.write_text(yaml.safe_dump(data, allow_unicode=True))
        texts = [f"{row.text} ({number})" for number, row in enumerate(rows)]
        say(f"teaching a student with {encoder}")
        name = asyncio.run(taught(file, texts[:600]))
        with gateway(file) as target:
            load(target, 4, asked.seconds / 2, texts[600:900])
            found = [load(target, 8, asked.seconds, texts[900:4000]) for _ in range(asked.rounds)]
        share = asyncio.run(share_of(file, name, sum(one["count"] for one, _ in found)))
        used = median(used for _, used in found)
        return [
            shown(f"local, {encoder}: share that the student answered", share, "share"),
            shown(f"local, {encoder}: p50 at 8", median(one["p50"] for one, _ in found), "ms"),
            shown(f"local, {encoder}: CPU", used, "us/request"),
            at_least(f"local, {encoder}: requests a second and core", 1e6 / used, 400, "1/s"),
        ]
    finally:
        server.terminate()
        server.wait()


async def taught(file: Path, texts: Sequence[str]) -> str:
    """The name of the task, after its student was asked and taught."""
    async with Apprentice(file, seed=0) as app:
        name = app.config.tasks[0].name
        for text in texts:
            await app.arun(name, {"text": text})
            await app.idle()
    return name


async def share_of(file: Path, name: str, newest: int) -> float:
    kept = config.load(file).store
    store: Store = plugins.build("stores", kept.backend, path=kept.path)
    try:
        found = await store.records(name, newest=True, limit=newest)
        return sum(record.served == "local" and record.remote is None for _, record in found) / len(found)
    finally:
        await store.close()


def figures(results: Results, *, bars: bool) -> list[Figure]:
    """Everything that was measured, and, with `bars`, the targets where what they compare with was measured."""
    middle = {place: median(values) for place, values in results.items() if not math.isnan(values[0])}
    units = {"rps at 64": "1/s", "cpu at 64": "us/request", "inside": "us/request", "inside rps": "1/s"}
    found = [shown(f"{label}: {name}", value, units.get(name, "ms")) for (label, name), value in middle.items()]
    if not bars:
        return found
    for ours in ("apprentice", "apprentice, model by name"):
        slow = middle["upstream itself", "slow at 1"]
        found.append(
            at_most(f"{ours}: p50 over {DELAY} ms, times the upstream's", middle[ours, "slow at 1"] / slow, 1.06)
        )
        slow = middle["upstream itself", f"slow at {WIDE}"]
        found.append(shown(f"{ours}: added over {DELAY} ms at {WIDE}", middle[ours, f"slow at {WIDE}"] - slow, "ms"))
        if ("LiteLLM", "rps at 64") in middle:
            times = middle[ours, "rps at 64"] / middle["LiteLLM", "rps at 64"]
            found.append(at_least(f"{ours}: requests at 64, times LiteLLM's", times, 30))
            share = middle[ours, "p50 at 1"] / middle["LiteLLM", "p50 at 1"]
            found.append(at_most(f"{ours}: p50 at 1, times LiteLLM's", share, 0.12))
    bare = [middle[kind, "inside"] for kind in CLIENTS[:2] if (kind, "inside") in middle]
    if bare:
        found.append(
            at_most("run(): CPU, times the cheapest bare client's", middle["run()", "inside"] / min(bare), 2.0)
        )
    if ("litellm", "inside") in middle:
        share = middle["run()", "inside"] / middle["litellm", "inside"]
        found.append(at_most("run(): CPU, times litellm.acompletion's", share, 0.08))
    return found


def measure(asked: Asked, options: Options) -> list[Figure]:
    """All rounds; the short form is one of a few moments."""
    if options.quick:
        asked = asked._replace(seconds=0.2, rounds=1, local=False)
    with tempfile.TemporaryDirectory() as folder, upstream(asked.port) as url:
        results, counted = between(asked, url, Path(folder), options.say)
        if not options.quick:
            for number in range(asked.rounds):
                options.say(f"in the process, {number + 1} of {asked.rounds}")
                clients(url, asked, Path(folder) / "apprentice.yaml", results)
    found = figures(results, bars=not options.quick) + counted
    if asked.local:
        for encoder in ENCODERS:
            with tempfile.TemporaryDirectory() as folder:
                found += local(asked, Path(folder), encoder, options.say)
    return found


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="bench")
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--interpreter", action="append", default=[])
    parser.add_argument("--no-local", action="store_true")
    parser.add_argument("--inside", type=Path)
    own, rest = parser.parse_known_args(words)
    if own.inside is not None:
        print(json.dumps(asyncio.run(inside(own.inside, own.seconds))))
        return 0
    peers = [(label, url) for label, _, url in (peer.partition("=") for peer in own.peer)]
    asked = Asked(own.seconds, own.rounds, own.port, own.model, peers, own.interpreter, not own.no_local)
    return run("gateway", partial(measure, asked), rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
