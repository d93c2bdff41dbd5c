"""What a person does with Apprentice, from installing it to taking a version back, step by step as it is typed and clicked.

    python -m benches.path [--quick] [--json]

In a fresh folder with a fresh environment: install the wheel, `init`, `keys create`, `serve`, 300 requests of the openai SDK
(a simulator on loopback is the paid API), look at the dashboard, correct five answers, replay recorded traffic until a
second version serves, roll it back. Each step is printed with its seconds and what came of it. The quick form takes the
dependencies from the environment that runs it instead of a package index.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx2

from apprentice.testing.servers import Server, asked, serve_openai
from apprentice.types import Json
from benches import Figure, Options, at_least, run, shown

ROOT = Path(__file__).parents[1]
SORTS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "melon"],
    "animal": ["horse", "otter", "badger", "heron", "weasel", "tiger"],
    "tool": ["hammer", "chisel", "wrench", "pliers", "spanner", "drill"],
}
REQUESTS, CORRECTED, MOST = 300, 5, 6_000
KEY = "sk-simulated-0000000000000000"

CLIENT = """
import asyncio, json, sys
import openai

url, key = sys.argv[1:]
texts = json.load(sys.stdin)

async def main():
    slots = asyncio.Semaphore(8)
    async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
        async def ask(text):
            async with slots:
                raw = await client.chat.completions.with_raw_response.create(
                    model="task:sort", messages=[{"role": "user", "content": text}]
                )
                said = raw.parse().choices[0].message.content
                return [raw.headers["x-apprentice-request-id"], json.loads(said)["kind"], raw.headers["x-apprentice-source"]]
        print(json.dumps(await asyncio.gather(*map(ask, texts))))

asyncio.run(main())
"""


def texts(number: int, seed: int) -> list[str]:
    dice = Random(seed)
    things = [thing for words in SORTS.values() for thing in words]
    return [f"please look at the {dice.choice(things)} number {one}" for one in range(number)]


def kind(text: str) -> str:
    return next(name for name, words in SORTS.items() if any(re.search(rf"\b{word}\b", text) for word in words))


def answer(body: dict[str, Json]) -> Json:
    """The remote: right but for one in twenty, always the same ones."""
    text: str = asked(body)["text"]
    names = list(SORTS)
    return {"kind": names[(names.index(kind(text)) + 1) % 3] if text.endswith("7") and "drill" in text else kind(text)}


class Person:
    """Who sits in a folder with an environment, types commands and reads what they say."""

    def __init__(self, folder: Path, say: Callable[[str], None], *, quick: bool) -> None:
        self.folder, self.say, self.quick = folder, say, quick
        self.bin = folder / "venv" / "bin"
        self.figures: list[Figure] = []
        self.url = self.key = ""

    @contextlib.contextmanager
    def step(self, name: str) -> Any:
        """A step, and in the list that it yields what came of it."""
        found: list[str] = []
        started = time.perf_counter()
        yield found
        seconds = time.perf_counter() - started
        self.say(f"{name:<42} {seconds:7.1f} s  {'; '.join(found)}")
        self.figures.append(shown(name, seconds, "s"))

    async def types(self, *command: str, given: str | None = None) -> str:
        """What a command prints. Raises RuntimeError with all that it said when it fails."""
        process = await asyncio.create_subprocess_exec(
            str(self.bin / command[0]), *command[1:], cwd=self.folder, env=self.environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        said, told = await process.communicate((given or "").encode())
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {told.decode()[-2_000:]}")
        return said.decode()

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return kept | {"PATH": f"{self.bin}:{os.environ['PATH']}", "OPENAI_API_KEY": KEY}

    async def installs(self, found: list[str]) -> None:
        built = self.folder / "dist"
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
        await asyncio.to_thread(subprocess.run, command, cwd=ROOT, check=True, capture_output=True)
        [wheel] = built.glob("*.whl")
        await asyncio.to_thread(venv.create, self.folder / "venv", with_pip=not self.quick, symlinks=True)
        if self.quick:
            [site] = (self.folder / "venv" / "lib").glob("python*/site-packages")
            (site / "around.pth").write_text(sysconfig.get_path("purelib"))
            pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python")]
            command = [*pip, "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
            await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
        else:
            await self.types(
                "pip", "install", "-q", "--disable-pip-version-check", f"{wheel}[embedded,gateway]", "openai"
            )
        place = await self.types("python", "-c", "import apprentice; print(apprentice.__file__)")
        if not Path(place.strip()).is_relative_to(self.folder):
            raise RuntimeError(f"{place.strip()} is not what was installed")
        found.append(wheel.name)

    async def begins(self, upstream: Server, found: list[str]) -> None:
        """`init`, and what a person changes in the file: where the simulator is, and that its answers may teach."""
        await self.types(
            "apprentice", "init", "--task", "sort", "--description", "Say what kind of thing is meant",
            "--input", "{text: str}", "--output", "{kind: [fruit, animal, tool]}",
            "--provider", "openai", "--model", "gpt-4o-mini",
        )  # fmt: skip
        file = self.folder / "apprentice.yaml"
        permission = '{basis: "a simulator", by: "benches/path.py", date: "1970-01-01", scope: "*"}'
        ours = f"remote:\n  base_url: {upstream.url}\n  allow_internal: true\n  permission: {permission}\n"
        text = file.read_text().replace("remote:\n", ours, 1)
        text = re.sub(r"^(\s*)fine_tune_batch_size:.*$", r"\1fine_tune_batch_size: 100", text, flags=re.MULTILINE)
        file.write_text(text)
        found.append((await self.types("apprentice", "check")).strip().splitlines()[-1])

    @contextlib.asynccontextmanager
    async def serves(self) -> AsyncIterator[httpx2.AsyncClient]:
        roles = [word for role in ("call", "feedback", "operate") for word in ("--role", role)]
        self.key = (await self.types("apprentice", "keys", "create", "me", *roles)).strip()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with (self.folder / "serve.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                str(self.bin / "apprentice"), "serve", "--port", str(port), cwd=self.folder, env=self.environment(),
                stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            headers = {"authorization": f"Bearer {self.key}"}
            async with httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=60, trust_env=False) as client:
                async with asyncio.timeout(120):
                    while not await _ready(client):  # noqa: ASYNC110 - it is another process
                        await asyncio.sleep(0.05)
                yield client
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), 60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def asks(self, wanted: list[str]) -> list[list[str]]:
        """Request id, answer and who gave it, for each text, of the openai SDK."""
        said = await self.types("python", "-c", CLIENT, f"{self.url}/v1", self.key, given=json.dumps(wanted))
        answers: list[list[str]] = json.loads(said)
        return answers


async def _ready(client: httpx2.AsyncClient) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return (await client.get("/readyz")).status_code == 200
    return False


async def _looks(person: Person, number: str) -> int:
    """How many pages of the dashboard a browser gets after the login."""
    async with httpx2.AsyncClient(base_url=person.url, timeout=60, trust_env=False) as browser:
        await browser.post("/dashboard/login", data={"key": person.key}, headers={"origin": person.url})
        task = "/dashboard/tasks/sort"
        pages = ["/dashboard", task, f"{task}/review", f"{task}/versions", f"/dashboard/requests/{number}"]
        return sum([(await browser.get(page)).status_code == 200 for page in pages])


async def _champion(client: httpx2.AsyncClient) -> str | None:
    found = (await client.get("/v1/tasks/sort/versions")).json()["versions"]
    return next((one["id"] for one in found if one["state"] == "champion"), None)


async def _replays(person: Person, client: httpx2.AsyncClient, recorded: list[str], found: list[str]) -> list[str]:
    """The versions that became champion while the recorded traffic came: two, or as many as there were."""
    seen: list[str] = []
    sent, local = 0, 0
    while len(seen) < 2 and sent < len(recorded):
        answers = await person.asks(recorded[sent : sent + REQUESTS])
        sent, local = sent + len(answers), sum(source == "local" for _, _, source in answers)
        now = await _champion(client)
        seen += [now] if now is not None and now not in seen else []
    found.append(f"{sent} requests, {local} of the last {REQUESTS} answered locally; champions {', '.join(seen)}")
    return seen


async def path(folder: Path, options: Options) -> list[Figure]:
    person = Person(folder, options.say, quick=options.quick)
    recorded = texts(REQUESTS + MOST, 0)
    wanted = recorded[:REQUESTS]
    async with serve_openai(answer, price=(150_000, 600_000), api_key=KEY) as upstream:
        with person.step("pip install, into a new environment") as found:
            await person.installs(found)
        with person.step("apprentice init, and a look at the file") as found:
            await person.begins(upstream, found)
        with person.step("apprentice keys create, apprentice serve") as found:
            serving = person.serves()
            client = await serving.__aenter__()
            found.append(person.url)
        try:
            with person.step(f"{REQUESTS} requests of the openai SDK") as found:
                answers = await person.asks(wanted)
                found.append(f"{len(answers)} answers, {len(upstream.requests)} paid calls")
            with person.step("the dashboard") as found:
                pages = await _looks(person, answers[0][0])
                found.append(f"{pages} pages")
            with person.step(f"{CORRECTED} corrections") as found:
                wrong = [(one, text) for one, text in zip(answers, wanted, strict=True) if one[1] != kind(text)]
                wrong += [(one, text) for one, text in zip(answers, wanted, strict=True) if one[1] == kind(text)]
                taken = 0
                for (number, _, _), text in wrong[:CORRECTED]:
                    body = {"request_id": number, "metric_name": "demonstration", "value": {"kind": kind(text)}}
                    taken += (await client.post("/v1/feedback", json=body)).status_code == 200
                found.append(f"{taken} taken")
            with person.step("recorded traffic, until v2 serves") as found:
                champions = await _replays(person, client, recorded[REQUESTS:], found)
            with person.step("rolled back") as found:
                back = await client.post("/v1/tasks/sort/rollback", json={"why": "to see that it can be"})
                serves = await _champion(client)
                after = await person.asks(wanted[:20])
                found.append(f"{back.status_code}, {serves} serves, {len(after)} answers")
        finally:
            await serving.__aexit__(None, None, None)
    rolled = back.status_code == 200 and len(champions) == 2 and serves == champions[0]
    return [
        *person.figures,
        at_least("requests of the SDK that were answered", len(answers) + len(after), REQUESTS + 20),
        at_least("pages of the dashboard", pages, 5),
        at_least("corrections taken", taken, CORRECTED),
        at_least("versions that became champion", len(champions), 2),
        at_least("rolled back to the one before", float(rolled), 1),
    ]


def measure(options: Options) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="apprentice-path-") as folder:
        return asyncio.run(path(Path(folder), options))


if __name__ == "__main__":
    sys.exit(run("path", measure))
