"""What would go wrong is found before it does: on real stores, damaged files, servers on loopback and programs on a PATH."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from apprentice import cli, doctor
from apprentice.doctor import ADVISORIES, Address, Around, Finding, State, examine
from apprentice.errors import StoreError
from apprentice.stores import MIGRATIONS
from apprentice.stores.sqlite import build
from apprentice.testing.stores import a_hold, a_record
from apprentice.types import Event, Json

from .conftest import YAML

NOON = 1_795_176_000.0  # 2026-11-20 12:00 UTC
WINDOWS = ("total", "day:2026-11-20", "task:sort/total")
GB = 10**9
NOWHERE = Around(path="", servers=())  # no program, no server
PLAIN = YAML.replace("BASE_URL", "http://127.0.0.1:9") + "budget: {daily: 10}\n"


@pytest.fixture(scope="module")
def spent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a store in which something was spent."""
    path = tmp_path_factory.mktemp("spent") / "apprentice.db"

    async def fill() -> None:
        store = build(path)
        names = [f"a{number}" for number in range(40)]
        days = [f"day:2026-10-{number % 31 + 1:02}" for number in range(40)]
        await asyncio.gather(
            *(store.reserve(a_hold(name, 10, [*WINDOWS, day]), []) for name, day in zip(names, days, strict=True))
        )
        await asyncio.gather(*(store.settle(name, 7, state="settled") for name in names))
        await asyncio.gather(*(store.append(a_record(name)) for name in names))
        await store.close()

    asyncio.run(fill())
    return path


@pytest.fixture
def folder(tmp_path: Path, spent: Path) -> Path:
    """A folder with a configuration and that store."""
    (tmp_path / "apprentice.yaml").write_text(PLAIN)
    (tmp_path / ".apprentice").mkdir(mode=0o700)
    shutil.copy(spent, db(tmp_path))
    return tmp_path


def db(folder: Path) -> Path:
    return folder / ".apprentice" / "apprentice.db"


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the empty one whose lock whoever opens the store takes."""
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files.pop("apprentice.db-lock", b"") == b""
    return files


def found(folder: Path, around: Around = NOWHERE) -> list[Finding]:
    return asyncio.run(examine(folder / "apprentice.yaml", now=NOON, around=around))


def one(findings: list[Finding], subject: str) -> Finding:
    [match] = [finding for finding in findings if finding.subject == subject]
    return match


def grave(findings: list[Finding]) -> list[str]:
    return [f"{finding.subject}: {finding.message}" for finding in findings if finding.state == "problem"]


def configured(folder: Path, text: str) -> list[Finding]:
    (folder / "apprentice.yaml").write_text(text)
    return found(folder)


# --- the store --------------------------------------------------------------------------------------------------------


def test_a_sound_store_has_no_problem_and_is_left_as_it_was(folder: Path) -> None:
    before = content(folder)
    findings = found(folder)
    assert grave(findings) == []
    assert "the ledger adds up" in one(findings, "store").message
    assert one(findings, "locks").state == "ok"
    assert one(findings, "clock").message == "2026-11-20 in UTC"
    assert content(folder) == before


def test_a_store_that_is_not_there_yet_is_no_problem_and_is_not_made(folder: Path) -> None:
    shutil.rmtree(folder / ".apprentice")
    findings = found(folder)
    assert grave(findings) == []
    assert "not there yet" in one(findings, "store").message
    assert not (folder / ".apprentice").exists()


def test_whatever_page_is_overwritten_the_damage_is_found(folder: Path, tmp_path: Path) -> None:  # F40
    sound = db(folder).read_bytes()
    size = int.from_bytes(sound[16:18], "big")
    dice = random.Random(40)
    for page in range(len(sound) // size):
        damaged = bytearray(sound)
        damaged[page * size : (page + 1) * size] = dice.randbytes(size)
        path = tmp_path / f"{page}.db"
        path.write_bytes(damaged)
        assert [finding.state for finding in doctor.inside(path)] == ["problem"], page


async def test_a_flipped_byte_is_found_or_changes_no_amount(folder: Path, tmp_path: Path) -> None:  # F40
    sound = db(folder).read_bytes()
    places = [place for place, byte in enumerate(sound) if byte]  # most of the file is empty
    dice = random.Random(7)
    noticed = 0
    for turn in range(200):
        damaged = bytearray(sound)
        damaged[dice.choice(places)] ^= dice.randint(1, 255)
        path = tmp_path / f"{turn}.db"
        path.write_bytes(damaged)
        path.chmod(0o600)
        if any(finding.state == "problem" for finding in doctor.inside(path)):
            noticed += 1
            continue
        store = build(path)
        assert await store.spent(WINDOWS) == dict.fromkeys(WINDOWS, 280)
        assert sum(line.cost for line in await store.spending()) == 280
        await store.close()
    assert noticed > 20


def test_a_flipped_byte_in_the_schema_is_found(folder: Path, tmp_path: Path) -> None:  # F40
    sound = db(folder).read_bytes()
    dice = random.Random(41)
    with contextlib.closing(apsw.Connection(str(db(folder)))) as connection:
        statements = [sql.encode() for (sql,) in connection.execute("SELECT sql FROM sqlite_schema WHERE sql != ''")]
    letters = [(sql, match.start()) for sql in statements for match in re.finditer(rb"\w", sql)]
    for turn, (sql, place) in enumerate(dice.sample(letters, 100)):
        damaged = sql[:place] + bytes([sql[place] ^ 1 << dice.randrange(8)]) + sql[place + 1 :]
        path = tmp_path / f"{turn}.db"
        path.write_bytes(sound.replace(sql, damaged))
        assert [finding.state for finding in doctor.inside(path)] == ["problem"], damaged


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE windows SET spent = 0 WHERE key = 'total'",
        "DELETE FROM windows WHERE key = 'task:sort/total'",
        "DROP TRIGGER ledger_final; UPDATE ledger SET cost = 1 WHERE attempt_id = 'a3'",
        "DROP TRIGGER ledger_no_delete; DELETE FROM ledger WHERE attempt_id = 'a3'",
    ],
)
def test_money_that_does_not_add_up_is_found_where_the_database_itself_is_sound(folder: Path, statement: str) -> None:
    connection = apsw.Connection(str(db(folder)))
    connection.execute(statement)
    connection.close()
    [damage] = grave(found(folder))
    assert "ledger" in damage or "not the sum of its attempts" in damage


def test_a_schema_of_a_newer_apprentice_and_another_programs_database_are_refused(folder: Path) -> None:  # F39
    connection = apsw.Connection(str(db(folder)))
    connection.pragma("user_version", len(MIGRATIONS) + 1)
    connection.close()
    assert one(found(folder), "store").fix == "upgrade apprentice"
    db(folder).unlink()
    connection = apsw.Connection(str(db(folder)))
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    db(folder).chmod(0o600)
    [problem] = grave(found(folder))
    assert "another program" in problem
    db(folder).write_bytes(b"no database at all" * 500)
    [problem] = grave(found(folder))
    assert "damaged" in problem


def test_what_others_may_read_or_replace_is_a_problem(folder: Path) -> None:  # F43
    db(folder).chmod(0o644)
    db(folder).parent.chmod(0o777)
    fixes = [finding.fix for finding in found(folder) if finding.subject == "permissions"]
    assert fixes == [f"chmod 600 {db(folder)}", f"chmod 700 {db(folder).parent}"]
    for fix in fixes:
        _, mode, path = fix.split(" ", 2)
        Path(path).chmod(int(mode, 8))
    assert [finding for finding in found(folder) if finding.subject == "permissions"] == []
    assert stat.S_IMODE(db(folder).stat().st_mode) == 0o600


def test_holds_of_the_dead_a_clock_that_is_behind_and_suspended_models_are_told(folder: Path) -> None:
    async def leave() -> None:
        store = build(db(folder))
        old = a_hold("dead", 500, ["day:2026-11-20"]).model_copy(update={"at": NOON - 3600})
        await store.reserve(old, [])
        await store.reserve(old.model_copy(update={"attempt_id": "job", "purpose": "train"}), [])
        await store.reserve(old.model_copy(update={"attempt_id": "young", "at": NOON - 1}), [])
        ahead = {"attempt_id": "ahead", "at": NOON + 90_000, "windows": ("day:2026-11-21",)}
        await store.reserve(old.model_copy(update=ahead), [])
        broken = {"model": "openai/gpt-4o-mini"}
        await store.add_event(
            Event(name="CONTRACT_BROKEN", task="sort", at=NOON, message="billed more", evidence=broken)
        )
        await store.close()

    asyncio.run(leave())
    findings = found(folder)
    assert one(findings, "holds").message.startswith("1 calls of processes that died hold $0.000500")
    assert "2026-11-21" in one(findings, "clock").message
    assert one(findings, "models").fix.endswith("apprentice resume openai/gpt-4o-mini")
    assert len(grave(findings)) == 2


def test_a_log_that_nobody_writes_back_is_a_warning(folder: Path) -> None:
    log = Path(f"{db(folder)}-wal")
    log.touch(mode=0o600)
    os.truncate(log, 100 * 2**20)
    assert one(found(folder), "write-ahead log").state == "warning"


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        *(
            (kind, "problem")
            for kind in ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ceph", "glusterfs", "lustre")
        ),
        ("overlay", "warning"),
        ("tmpfs", "warning"),
        ("ext4", "ok"),
        ("xfs", "ok"),
    ],
)
def test_the_file_system_of_the_store_is_judged(folder: Path, kind: str, state: State) -> None:  # F37
    root = "1 0 8:1 / / rw,relatime - ext4 /dev/root rw"
    mounts = f"{root}\n2 1 0:5 / {str(folder).replace(' ', chr(92) + '040')} rw shared:7 - {kind} where rw,x=1\n"
    finding = one(found(folder, Around(mounts=mounts, path="", servers=())), "store's file system")
    assert (finding.state, kind in finding.message) == (state, True)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/a.db", "ext4"),
        ("/data/a.db", "nfs4"),
        ("/data/local/a.db", "xfs"),
        ("/database/a.db", "ext4"),  # not below /data
        ("/my disk/a.db", "fuse.sshfs"),
        ("/twice/a.db", "tmpfs"),  # mounted over
    ],
)
def test_the_mount_that_a_path_is_on_is_the_innermost_and_last_one(path: str, kind: str) -> None:
    mounts = (
        "25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 25 0:44 /export /data rw,relatime shared:9 master:2 - nfs4 host:/export rw,vers=4.2\n"
        "41 40 8:3 / /data/local rw - xfs /dev/sdb rw\n"
        "42 25 0:45 / /my\\040disk rw - fuse.sshfs me@host:/ rw\n"
        "43 25 8:9 / /twice rw - ext4 /dev/sdc rw\n"
        "44 25 0:50 / /twice rw - tmpfs tmpfs rw\n"
        "nonsense\n"
    )
    assert doctor.file_system(Path(path), mounts) == kind
    assert doctor.file_system(Path(path), "") is None


def test_a_system_without_a_list_of_mounts_is_not_checked(folder: Path) -> None:
    assert "not checked" in one(found(folder), "store's file system").message


# --- configuration and money --------------------------------------------------------------------------------------------


def test_a_configuration_that_cannot_be_used_is_a_finding_beside_the_machine(folder: Path) -> None:
    findings = configured(folder, "tasks: 7")
    assert "apprentice.yaml:1" in one(findings, "configuration").message
    assert one(findings, "python").state == one(findings, "cpu").state == "ok"
    (folder / "apprentice.yaml").unlink()
    assert one(found(folder), "configuration").fix == "`apprentice init` writes a new one"


def test_what_is_missing_to_serve_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    text = PLAIN.replace("provider: openai", "provider: openai\n  api_key_env: NO_SUCH_KEY")
    [problem] = grave(configured(folder, text))
    assert "NO_SUCH_KEY is not set" in problem
    monkeypatch.setenv("NO_SUCH_KEY", "sk-CANARY-4711")
    findings = found(folder)
    assert grave(findings) == []
    assert "CANARY" not in str(findings)


def test_a_remote_or_a_teacher_without_a_price_is_a_problem(folder: Path) -> None:
    text = PLAIN + "teachers:\n  - {provider: openai, model: mystery-9000}\n"
    findings = configured(folder, text)
    assert one(findings, "price of openai/gpt-4o-mini").state == "ok"
    assert one(findings, "price of openai/mystery-9000").state == "problem"
    assert "price: {input" in one(findings, "price of openai/mystery-9000").fix


@pytest.mark.parametrize(
    ("budget", "state"),
    [("{daily: 0.00001}", "problem"), ("{total: 0}", "problem"), ("{daily: 0.0001}", "ok"), ("{}", "warning")],
)
def test_a_cap_that_has_no_room_for_one_call_is_a_problem(folder: Path, budget: str, state: State) -> None:
    findings = configured(folder, PLAIN.replace("{daily: 10}", budget))
    assert one(findings, "caps of sort").state == state


def test_a_cap_with_room_for_the_cheaper_remote_alone_is_a_warning(folder: Path) -> None:
    text = PLAIN.replace("model: gpt-4o-mini", "model: gpt-4o").replace("{daily: 10}", "{daily: 0.0003}")
    assert one(configured(folder, text), "caps of sort").state == "problem"
    text = text.replace(
        "  retries: 1", "  additional_providers: [{provider: openai, model: gpt-4o-mini, max_tokens: 64}]"
    )
    assert one(configured(folder, text), "caps of sort").state == "warning"


# --- memory and models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "left", "bytes_"),
    [
        ("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:       5 kB\n", None, 5120),
        ("MemAvailable: 5 kB\n", 1000, 1000),  # a container may take less than the machine has
        ("MemAvailable: 5 kB\n", 10**9, 5120),
        ("MemAvailable: 5 kB\n", -4, 0),
        (None, 1000, 1000),
        ("nothing of the kind", None, None),
        (None, None, None),
    ],
)
def test_what_a_new_program_may_take_is_what_both_machine_and_container_leave(
    memory: str | None, left: int | None, bytes_: int | None
) -> None:
    assert doctor.available(memory, left) == bytes_


@pytest.mark.parametrize(
    ("name", "file", "low", "high"),
    [
        ("llama3.1:8b", None, 5.5, 6.5),  # Q4_K_M: a file of 4.9 GB
        ("llama3.1:8b", 4_920_000_000, 5.8, 6.3),
        ("meta-llama/Llama-3.1-8B-Instruct-bf16", None, 16.5, 17.5),
        ("llama3.1:8b-instruct-q8_0", None, 9.0, 10.0),
        ("qwen2.5:0.5b", None, 0.8, 1.2),
        ("SmolLM2-135M-Instruct-Q4_K_M", None, 0.6, 0.8),
        ("mixtral-8x7b-awq", None, 32.0, 34.0),
        ("llama3.3:70b", None, 44.0, 47.0),
        ("unnamed", 2_000_000_000, 2.6, 3.2),
    ],
)
def test_memory_is_estimated_from_name_and_file(name: str, file: int | None, low: float, high: float) -> None:
    need = doctor.needs(name, file_bytes=file)
    assert need is not None
    assert low * GB <= need <= high * GB


@pytest.mark.parametrize("name", ["mystery", "gpt-4o", "b8", "v2.5-large", ""])
def test_a_name_without_a_size_says_nothing(name: str) -> None:
    assert doctor.needs(name) is None


# --- programs and servers -------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], Around]:
    """A program on the PATH that says this."""

    def make(name: str, text: str) -> Around:
        place = tmp_path / "bin"
        place.mkdir(exist_ok=True)
        script = place / name
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        script.chmod(0o755)
        return Around(path=str(place), servers=())

    return make


@pytest.mark.parametrize(
    ("name", "said", "state", "cited"),
    [
        ("ollama", "ollama version is 0.17.0", "warning", ["CVE-2026-7482"]),
        (
            "ollama",
            "Warning: could not connect\nclient version is 0.1.30",
            "warning",
            ["CVE-2026-7482", "CVE-2024-45436"],
        ),
        ("ollama", "ollama version is 0.17.1", "ok", []),
        ("ollama", "nothing to say", "ok", []),
        ("llama-server", "version: 8940 (abcdef0)\nbuilt with cc 13.2.0", "warning", ["CVE-2026-21869"]),
        ("llama-server", "version: 9100 (abcdef0)", "ok", []),
        ("vllm", "0.11.0", "warning", ["CVE-2026-22778", "CVE-2025-62164"]),
        ("vllm", "0.14.1", "ok", []),
        ("vllm", "0.8.2", "ok", []),  # before the fault came in
    ],
)
def test_programs_on_the_path_are_named_with_what_is_known_against_their_version(
    folder: Path, program: Any, name: str, said: str, state: State, cited: list[str]
) -> None:
    findings = [f for f in found(folder, program(name, said)) if f.subject == f"program {name}"]
    assert {finding.state for finding in findings} == {state}
    for cve, finding in zip(cited, findings, strict=False):
        assert cve in finding.message and "https://" in finding.message and "upgrade to" in finding.fix
    assert len(findings) == max(1, len(cited))


def test_every_advisory_has_a_date_a_source_and_a_range() -> None:
    assert {advisory.product for advisory in ADVISORIES} == {"ollama", "vllm", "llama.cpp"}
    for advisory in ADVISORIES:
        assert advisory.first < advisory.fixed
        assert advisory.source.startswith("https://") and advisory.about.startswith("CVE-")
        assert len(advisory.published) == len("2026-11")


def test_gpus_are_listed_with_their_free_memory(folder: Path, program: Any) -> None:
    assert one(found(folder), "gpu").message.startswith("none")
    around = program("nvidia-smi", "NVIDIA H100 80GB HBM3, 81559, 81079, 550.54.15\nNVIDIA L4, 23034, 100, 550.54.15")
    gpus = [finding.message for finding in found(folder, around) if finding.subject == "gpu"]
    assert gpus == [
        "NVIDIA H100 80GB HBM3: 85.0 GB of 81559 MiB free, driver 550.54.15",
        "NVIDIA L4: 104.9 MB of 23034 MiB free, driver 550.54.15",
    ]
    assert one(found(folder, program("nvidia-smi", "No devices were found")), "gpu").state == "warning"


@asynccontextmanager
async def serving(routes: Mapping[str, Json | bytes]) -> AsyncIterator[str]:
    """A server on loopback that answers GETs of these paths; None: it never answers."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
        assert method == b"GET"
        said = routes.get(path.decode(), b"404")
        if said is None:
            await reader.read()
        elif said == b"404":
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        else:
            body = said if isinstance(said, bytes) else json.dumps(said).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1")
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


LOCAL = PLAIN.replace("backend: embedded", "backend: openai\n  base_model: llama3.1:8b")
TAGS: Json = {"models": [{"name": "llama3.1:8b", "size": 4_920_000_000}, {"name": "qwen2.5:0.5b", "size": 400_000_000}]}


@pytest.mark.parametrize(("memory", "state"), [(5 * GB, "problem"), (20 * GB, "ok")])
async def test_a_running_ollama_is_found_and_its_models_are_measured_against_the_memory(
    folder: Path, memory: int, state: State
) -> None:
    (folder / "apprentice.yaml").write_text(LOCAL)
    async with serving({"/api/version": {"version": "0.17.0"}, "/api/tags": TAGS}) as url:
        around = Around(memory=f"MemAvailable: {memory // 1024} kB", path="", servers=(Address("ollama", url),))
        findings = await examine(folder / "apprentice.yaml", now=NOON, around=around)
    assert one(findings, "server ollama").state == "warning"
    assert f"runs at {url}, version 0.17.0" in one(findings, "server ollama").message
    wanted = one(findings, "model llama3.1:8b")
    assert wanted.state == state
    assert f"needs about 6.0 GB, you have {memory / GB:.1f} GB" in wanted.message
    assert one(findings, "model qwen2.5:0.5b").message.startswith("fits:")


async def test_a_model_that_does_not_fit_the_memory_fits_a_gpu_that_has_room(folder: Path, program: Any) -> None:
    (folder / "apprentice.yaml").write_text(LOCAL)
    bin_path = program("nvidia-smi", "NVIDIA L4, 23034, 22000, 550.54.15").path
    around = Around(memory="MemAvailable: 1000000 kB", path=bin_path, servers=())
    findings = await examine(folder / "apprentice.yaml", now=NOON, around=around)
    assert one(findings, "model llama3.1:8b").message.startswith("fits:")


async def test_llama_cpp_and_vllm_are_known_by_what_only_they_answer(folder: Path) -> None:
    llama = {
        "/health": {"status": "ok"},
        "/props": {"build_info": "b5000-abc", "model_path": "/m/qwen2.5-0.5b-q8_0.gguf"},
    }
    async with serving(llama) as first, serving({"/version": {"version": "0.20.0"}}) as second:
        around = Around(
            memory="MemAvailable: 9000000 kB", path="", servers=(Address("llama.cpp", first), Address("vllm", second))
        )
        findings = await examine(folder / "apprentice.yaml", now=NOON, around=around)
    cited = [finding.message for finding in findings if finding.subject == "server llama.cpp"]
    assert ["CVE-2026-21869" in cited[0], "CVE-2025-52566" in cited[1], "b5000" in cited[0]] == [True] * 3
    assert one(findings, "server vllm").message == f"runs at {second}, version 0.20.0"
    assert one(findings, "model qwen2.5-0.5b-q8_0.gguf").state == "ok"


@pytest.mark.parametrize("said", [None, b"<html>", [1], {}, {"version": 7}, {"version": None}, b"\xff" * 5000])
async def test_whatever_else_listens_there_is_no_local_server_and_does_not_hold_up(folder: Path, said: Any) -> None:
    routes = dict.fromkeys(("/api/version", "/api/tags", "/health", "/props", "/version"), said)
    async with serving(routes) as url, asyncio.timeout(20):
        servers = (Address("ollama", url), Address("llama.cpp", url), Address("vllm", url))
        findings = await examine(folder / "apprentice.yaml", now=NOON, around=Around(path="", servers=servers))
    assert one(findings, "local servers").message.startswith("none at")


def test_an_extra_that_is_not_installed_names_the_command(folder: Path) -> None:
    extras = {f.subject: f for f in found(folder) if f.subject.startswith("extra ")}
    assert {"extra embedded", "extra jsonschema"} <= extras.keys()
    for finding in extras.values():
        assert finding.state == "ok"
        assert finding.message == "installed" or "pip install 'apprentice[" in finding.fix


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No program of this machine is asked."""
    monkeypatch.setenv("PATH", "")
    yield
    assert os.environ["PATH"] == ""


@pytest.mark.usefixtures("elsewhere")
def test_the_command_says_what_is_wrong_and_exits_with_1_for_a_problem(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(folder / "apprentice.yaml")
    assert cli.main(["doctor", "--config", file]) == 0
    assert "0 problems" in capsys.readouterr().out
    db(folder).write_bytes(db(folder).read_bytes()[:4096])
    assert cli.main(["doctor", "--config", file]) == 1
    said = capsys.readouterr().out
    assert "problem  store: " in said and "\n         -> keep the damaged file" in said
    assert cli.main(["doctor", "--config", file, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["subject"] for row in rows if row["state"] == "problem"] == ["store"]
    assert set(rows[0]) == {"subject", "state", "message", "fix"}
    with pytest.raises(StoreError):
        build(db(folder))
