"""Where Records, Versions, Events, leases and the ledger are kept: the schema, and what every store shares.

`Books` is the arithmetic of the ledger: a store loads the rows that one transaction touches, lets `Books` decide, and
writes back what changed. The tables are created by `MIGRATIONS`, each applied in one transaction.
"""

from __future__ import annotations

import json
import math
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, Literal

import apsw

from apprentice.errors import BudgetExhausted, BudgetHeld, StoreCorrupt, StoreError, StoreTooNew
from apprentice.types import (
    Batch,
    Cap,
    Correction,
    Event,
    Evidence,
    Example,
    Hold,
    Json,
    Label,
    Micros,
    Mode,
    Promotion,
    Record,
    Seconds,
    Value,
    Version,
)

type EndState = Literal["settled", "assumed", "released"]

APPLICATION_ID = 0x41505054  # "APPT" in the header of the file: tells our file from another program's database
LARGEST = 2**63 - 1  # what an INTEGER column holds
MAX_FLOAT = sys.float_info.max

_VERDICT = (
    "seq, request_id, task, at, version, level, p, audit, confidence, score, served, local_number, remote_number, reason, "
    "cost, repeat, rival, rival_version, rival_confidence"
)


def _of(row: str, columns: str) -> str:
    return ", ".join(f"{row}.{column}" for column in columns.split(", "))


# Append only: a store that has applied number n never sees it change. Written for SQLite.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        f"PRAGMA application_id = {APPLICATION_ID}",
        """CREATE TABLE records (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            request_id TEXT NOT NULL UNIQUE,
            task TEXT NOT NULL,
            at REAL NOT NULL,
            version TEXT,
            level REAL NOT NULL,
            p REAL NOT NULL,
            audit INTEGER NOT NULL,
            confidence REAL,
            score REAL,
            served TEXT,
            local_number REAL,
            remote_number REAL,
            reason TEXT NOT NULL,
            cost INTEGER NOT NULL,
            has_remote INTEGER NOT NULL,
            idempotency_key TEXT,
            body TEXT NOT NULL
        )""",
        "CREATE INDEX records_of_task ON records (task)",
        "CREATE INDEX records_labelled ON records (task) WHERE has_remote",
        "CREATE UNIQUE INDEX records_key ON records (task, idempotency_key) WHERE idempotency_key IS NOT NULL",
        """CREATE TRIGGER records_no_update BEFORE UPDATE ON records
            BEGIN SELECT RAISE(ABORT, 'records are append-only'); END""",
        """CREATE TRIGGER records_no_delete BEFORE DELETE ON records
            BEGIN SELECT RAISE(ABORT, 'records are append-only'); END""",
        """CREATE TABLE versions (
            task TEXT NOT NULL,
            number INTEGER NOT NULL,
            id TEXT NOT NULL,
            checkpoint TEXT NOT NULL,
            path TEXT NOT NULL,
            state TEXT NOT NULL,
            trained_on INTEGER NOT NULL,
            created_at REAL NOT NULL,
            promoted_at REAL,
            certified_at REAL,
            metrics TEXT NOT NULL,
            PRIMARY KEY (task, id)
        )""",
        "CREATE UNIQUE INDEX versions_champion ON versions (task) WHERE state = 'champion'",
        """CREATE TABLE events (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL,
            task TEXT NOT NULL,
            at REAL NOT NULL,
            message TEXT NOT NULL,
            evidence TEXT NOT NULL,
            key TEXT
        )""",
        "CREATE INDEX events_of_task ON events (task)",
        "CREATE UNIQUE INDEX events_key ON events (task, key) WHERE key IS NOT NULL",
        """CREATE TABLE leases (
            name TEXT PRIMARY KEY,
            owner TEXT,
            token INTEGER NOT NULL,
            until REAL NOT NULL
        ) WITHOUT ROWID""",
        "CREATE TABLE states (task TEXT PRIMARY KEY, seq INTEGER NOT NULL, state TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE ledger (
            attempt_id TEXT PRIMARY KEY,
            task TEXT NOT NULL,
            purpose TEXT NOT NULL,
            model TEXT NOT NULL,
            windows TEXT NOT NULL,
            day TEXT NOT NULL,
            worst INTEGER NOT NULL CHECK (worst >= 0),
            state TEXT NOT NULL CHECK (state IN ('held', 'settled', 'assumed', 'released')),
            cost INTEGER NOT NULL CHECK (cost >= 0),
            at REAL NOT NULL,
            seal INTEGER NOT NULL
        )""",
        "CREATE INDEX ledger_at ON ledger (at)",
        "CREATE INDEX ledger_held ON ledger (at) WHERE state = 'held'",
        """CREATE TRIGGER ledger_final BEFORE UPDATE ON ledger WHEN old.state <> 'held'
            BEGIN SELECT RAISE(ABORT, 'a closed attempt does not change'); END""",
        """CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger
            BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
        """CREATE TABLE windows (
            key TEXT PRIMARY KEY,
            spent INTEGER NOT NULL CHECK (spent >= 0),
            held INTEGER NOT NULL CHECK (held >= 0),
            seal INTEGER NOT NULL
        ) WITHOUT ROWID""",
    ),
    ("CREATE TABLE modes (task TEXT PRIMARY KEY, mode TEXT NOT NULL, until REAL, at REAL NOT NULL) WITHOUT ROWID",),
    (
        "ALTER TABLE records ADD COLUMN repeat REAL",
        """CREATE TABLE promotions (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            task TEXT NOT NULL,
            version TEXT NOT NULL,
            after INTEGER NOT NULL,
            at REAL NOT NULL
        )""",
        """INSERT INTO promotions (task, version, after, at)
            SELECT task, id, COALESCE((SELECT MAX(seq) FROM records WHERE records.at <= promoted_at), 0), promoted_at
            FROM versions WHERE promoted_at IS NOT NULL ORDER BY promoted_at""",
    ),
    ("CREATE INDEX events_named ON events (name, task)",),
    (
        """CREATE TABLE corrections (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            request_id TEXT NOT NULL,
            task TEXT NOT NULL,
            at REAL NOT NULL,
            action TEXT NOT NULL,
            target TEXT NOT NULL,
            by TEXT NOT NULL,
            comment TEXT NOT NULL
        )""",
        "CREATE INDEX corrections_of ON corrections (task, request_id)",
        """CREATE TRIGGER corrections_no_update BEFORE UPDATE ON corrections
            BEGIN SELECT RAISE(ABORT, 'corrections are append-only'); END""",
    ),
    (
        """CREATE TABLE batches (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            task TEXT NOT NULL,
            open INTEGER NOT NULL,
            body TEXT NOT NULL,
            inputs TEXT NOT NULL
        )""",
        "CREATE INDEX batches_open ON batches (number) WHERE open",
        """CREATE TRIGGER batches_final BEFORE UPDATE ON batches WHEN NOT old.open
            BEGIN SELECT RAISE(ABORT, 'a batch that is done does not change'); END""",
    ),
    (
        "ALTER TABLE records ADD COLUMN rival REAL",
        "ALTER TABLE records ADD COLUMN rival_version TEXT",
        "ALTER TABLE promotions ADD COLUMN state TEXT NOT NULL DEFAULT 'champion'",
        "ALTER TABLE promotions ADD COLUMN by TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE promotions ADD COLUMN why TEXT NOT NULL DEFAULT ''",
        "CREATE INDEX promotions_of_task ON promotions (task, number)",
        "CREATE UNIQUE INDEX versions_canary ON versions (task) WHERE state = 'canary'",
    ),
    (
        """CREATE TABLE labels (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            request_id TEXT NOT NULL UNIQUE,
            task TEXT NOT NULL,
            body TEXT NOT NULL
        )""",
        "CREATE INDEX labels_of_task ON labels (task)",
        """CREATE TRIGGER labels_no_update BEFORE UPDATE ON labels
            BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END""",
    ),
    (
        """CREATE TABLE examples (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            task TEXT NOT NULL,
            id TEXT NOT NULL,
            body TEXT NOT NULL
        )""",
        "CREATE UNIQUE INDEX examples_id ON examples (task, id)",
        """CREATE TRIGGER examples_no_update BEFORE UPDATE ON examples
            BEGIN SELECT RAISE(ABORT, 'an imported example does not change'); END""",
    ),
    ("ALTER TABLE records ADD COLUMN rival_confidence REAL",),
    (
        "DROP TRIGGER records_no_update",
        "DROP TRIGGER batches_final",
        "ALTER TABLE records ADD COLUMN words INTEGER NOT NULL DEFAULT 1",  # whether the body says what was asked
        "ALTER TABLE records ADD COLUMN subject TEXT",
        "ALTER TABLE batches ADD COLUMN words INTEGER NOT NULL DEFAULT 1",
        """UPDATE records SET words = words_of(body), subject = subject_of(body)
            WHERE body LIKE '%"input":null%' OR body LIKE '%"subject":%'""",
        "CREATE INDEX records_words ON records (task, at) WHERE words",
        "CREATE INDEX records_subject ON records (subject) WHERE subject IS NOT NULL",
        f"""CREATE TRIGGER records_no_update BEFORE UPDATE ON records
            WHEN new.words OR ({_of("old", _VERDICT)}) IS NOT ({_of("new", _VERDICT)})
            BEGIN SELECT RAISE(ABORT, 'records are append-only'); END""",
        """CREATE TRIGGER batches_final BEFORE UPDATE ON batches
            WHEN NOT old.open AND (new.words OR (old.id, old.task, old.open, old.body)
                IS NOT (new.id, new.task, new.open, new.body))
            BEGIN SELECT RAISE(ABORT, 'a batch that is done does not change'); END""",
        """CREATE TABLE erased (
            subject TEXT NOT NULL,
            task TEXT NOT NULL,
            at REAL NOT NULL,
            PRIMARY KEY (subject, task)
        ) WITHOUT ROWID""",
        "CREATE TABLE taints (task TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
    ),
)
FIXED = (3, 51, 3)  # before it, a WAL database could be corrupted: https://sqlite.org/wal.html#walresetbug


def check_sqlite(version: str) -> None:
    """Raise StoreError for a SQLite that can damage what it keeps."""
    if tuple(int(part) for part in version.split(".")) < FIXED:
        raise StoreError(f"SQLite {version} can corrupt a write-ahead log", hint="pip install --upgrade apsw")


def migrate(connection: apsw.Connection, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Bring the schema up to date, each step in one transaction, so that a kill leaves whole steps behind.

    Raises StoreTooNew, and StoreCorrupt for a database that is another program's.
    """
    name = connection.filename
    connection.create_scalar_function("subject_of", _subject_of, 1)
    connection.create_scalar_function("words_of", _words_of, 1)
    while True:
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = int(connection.pragma("user_version"))
            ours = connection.pragma("application_id") == APPLICATION_ID
            if not ours and (version or connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()):
                raise StoreCorrupt(f"{name} is the database of another program", hint="name another file")
            if version > len(migrations):
                raise StoreTooNew(f"{name} has schema {version}, this apprentice knows {len(migrations)}")
            if version == len(migrations):
                return
            for statement in migrations[version]:
                connection.execute(statement)
            connection.pragma("user_version", version + 1)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


_ODD = re.compile("[\\\\\0\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u([0-9a-f]{4})")


def to_text(text: str) -> str:
    r"""The text as every database can keep it: NUL, lone surrogates and the backslash as `\uXXXX`, the rest as it is.

    >>> to_text("a\0b")
    'a\\u0000b'
    """
    if text.isascii() and text.isprintable() and "\\" not in text:  # nearly every id, name and window
        return text
    return _ODD.sub(lambda odd: f"\\u{ord(odd[0]):04x}", text)


def from_text(text: str) -> str:
    """The inverse of `to_text`.

    >>> from_text(to_text("\\ud800 and a \\\\ in one name")) == "\\ud800 and a \\\\ in one name"
    True
    """
    return _ESCAPED.sub(lambda odd: chr(int(odd[1], 16)), text) if "\\" in text else text


def _plain(value: object) -> dict[str, Json]:
    """The fields of a value, for JSON: whole trees of them are written without a copy."""
    if isinstance(value, Value):
        return value.__dict__
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


_encode = json.JSONEncoder(separators=(",", ":"), default=_plain, check_circular=False).encode


def to_json(value: Any, what: str) -> str:
    """The value, or its fields, as ASCII JSON, lone surrogates and NUL included. Raises StoreError when it is no JSON."""
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{what} cannot be written as JSON: {error}", hint="store JSON values only") from error


RECORD_COLUMNS = (
    "request_id, task, at, version, level, p, audit, confidence, score, served, local_number, remote_number, reason, "
    "cost, has_remote, idempotency_key, body, repeat, rival, rival_version, "
    "rival_confidence, words, subject"
)

EVIDENCE_COLUMNS = (
    "seq, task, at, version, level, p, audit, confidence, score, served, local_number, remote_number, repeat, "
    "rival, rival_version, rival_confidence"
)

PROMOTION_COLUMNS = "number, task, version, after, state, at, by, why"


def record_row(record: Record) -> tuple[str | int | float | None, ...]:
    """What a store writes for a Record, in the order of `RECORD_COLUMNS`. Raises StoreError when it is not JSON."""
    decision, key = record.decision, record.idempotency_key
    if not 0 <= record.cost <= LARGEST:
        raise StoreError(f"record {record.request_id!r}: cost {record.cost} is not in [0, 2^63)")
    return (
        to_text(record.request_id),
        to_text(record.task),
        record.at,
        None if record.version is None else to_text(record.version),
        decision.level,
        decision.p,
        int(decision.audit),
        record.local.confidence if record.local else None,
        record.score.value if record.score else None,
        record.served,
        *(_numbers(record) or (None, None)),
        decision.reason,
        record.cost,
        int(record.remote is not None and record.remote.output is not None),
        None if key is None else to_text(key),
        to_json(record, f"record {record.request_id!r}"),
        None if record.repeat is None else record.repeat.value,
        None if record.rival is None else record.rival.value,
        None if record.rival_version is None else to_text(record.rival_version),
        record.rival_confidence,
        int(record.input is not None),
        None if (subject := record.tags.get("subject")) is None else to_text(subject),
    )


def digest(subject: str) -> str:
    """As what a subject is kept: nobody can read it there, but who knows the subject finds its rows.

    >>> digest("ann")[:8], len(digest("ann"))
    ('5ed52945', 64)
    """
    return sha256(b"apprentice subject " + subject.encode("utf-8", "surrogatepass")).hexdigest()


def _subject_of(*body: Any) -> str | None:
    """Of a Record from before subjects were kept as their digests."""
    subject = json.loads(body[0]).get("tags", {}).get("subject")
    return None if subject is None else digest(subject)


def _words_of(*body: Any) -> bool:
    return json.loads(body[0])["input"] is not None


def _numbers(record: Record) -> tuple[float, float] | None:
    """The numbers that (local, remote) answered, if both outputs are one number or have exactly one, under one name."""
    if record.local is None or record.remote is None:
        return None
    local, remote = _only_number(record.local.output), _only_number(record.remote.output)
    if local is None or remote is None or local[0] != remote[0]:
        return None
    return local[1], remote[1]


def _only_number(output: Json) -> tuple[str | None, float] | None:
    fields = output if isinstance(output, dict) else {None: output}
    found = [(name, value) for name, value in fields.items() if type(value) in (int, float)]
    if len(found) != 1 or not abs(found[0][1]) <= MAX_FLOAT:
        return None
    return found[0][0], float(found[0][1])


def read_evidence(row: Sequence[Any]) -> Evidence:
    """The Evidence of a row of `EVIDENCE_COLUMNS`."""
    seq, task, at, version, level, p, audit, confidence, score, served, local, remote, repeat, rival, of, sure = row
    pair = None if local is None else (local, remote)
    version = None if version is None else from_text(version)
    decided = (seq, from_text(task), at, version, level, p, bool(audit), confidence)
    return Evidence(*decided, score, served, pair, repeat, rival, None if of is None else from_text(of), sure)


def read_promotion(row: Sequence[Any]) -> Promotion:
    """The Promotion of a row of `PROMOTION_COLUMNS`."""
    number, task, version, after, state, at, by, why = row
    return Promotion(number, from_text(task), from_text(version), after, state, at, from_text(by), from_text(why))


def read_record(body: str) -> Record:
    """The Record of a `body`. pydantic's own JSON reader refuses lone surrogates, Python's does not."""
    return Record.model_validate(json.loads(body))


def forgotten(body: str) -> Record:
    """The Record of a `body` without its words, and with no name of whom it is about or by whom it is asked again."""
    return read_record(body).without_words().model_copy(update={"tags": {}, "idempotency_key": None})


def _seal(*values: object) -> int:
    return zlib.crc32(repr(values).encode())


@dataclass(slots=True)
class Entry:
    """One attempt in the ledger: what was held for it, in which windows, and how it ended."""

    hold: Hold
    state: Literal["held", "settled", "assumed", "released"] = "held"
    cost: Micros = 0

    @property
    def seal(self) -> int:
        """A checksum of what matters for money: a damaged row must be an error, never another amount."""
        hold = self.hold
        return _seal(hold.attempt_id, hold.task, hold.purpose, hold.worst, hold.windows, self.state, self.cost)


@dataclass(slots=True)
class Amount:
    """What one window has taken so far. Open holds are apart, because they may come back."""

    spent: Micros = 0
    held: Micros = 0

    def seal(self, window: str) -> int:
        """A checksum that names the window as well, so that a damaged key cannot re-open money."""
        return _seal(window, self.spent, self.held)


_EMPTY = Amount()  # of a window without a row; nobody changes it


@dataclass(slots=True)
class Books:
    """The rows of the ledger that a transaction touches, and the rules for changing them.

    All or none: an operation that raises has changed nothing. The store loads every entry and window that the
    operations name (a window without a row is left out, and counts as empty), and afterwards writes
    `changed_entries` and `changed_windows`.
    """

    entries: dict[str, Entry]
    amounts: dict[str, Amount]
    changed_entries: set[str] = field(default_factory=set)
    changed_windows: set[str] = field(default_factory=set)

    def reserve(self, hold: Hold, caps: Sequence[Cap]) -> None:
        """Book the worst case in all windows of the hold, if every cap has room for it.

        Raises BudgetExhausted when what is spent leaves no room, BudgetHeld when only open holds of others stand in
        the way, StoreError when the attempt is there already or a cap limits a window that the hold is not booked in.
        """
        if hold.attempt_id in self.entries:
            raise StoreError(f"attempt {hold.attempt_id!r} is in the ledger already", hint="give each attempt a new id")
        if not (math.isfinite(hold.at) and 0 <= hold.worst <= LARGEST and all(hold.windows)):
            raise StoreError(f"attempt {hold.attempt_id!r} has no moment, no amount, or a window without a name")
        held_up: BudgetHeld | None = None
        for cap in caps:
            if cap.window not in hold.windows:
                raise StoreError(f"the cap on {cap.window!r} cannot hold: the attempt is not booked in that window")
            amount = self.amounts.get(cap.window, _EMPTY)
            if amount.spent + amount.held + hold.worst <= cap.limit:
                continue
            text = (
                f"{cap.window}: limit {cap.limit}, spent {amount.spent}, held {amount.held}, "
                f"worst case of this call {hold.worst} micro-dollars"
            )
            if amount.spent + hold.worst > cap.limit:
                raise BudgetExhausted(text)
            held_up = held_up or BudgetHeld(text)
        if held_up is not None:
            raise held_up
        windows = dict.fromkeys(hold.windows)
        self._check_room(windows, hold.worst)
        self.entries[hold.attempt_id] = Entry(hold)
        self.changed_entries.add(hold.attempt_id)
        for window in windows:
            amount = self.amounts.get(window) or self.amounts.setdefault(window, Amount())
            amount.held += hold.worst
        self.changed_windows.update(windows)

    def settle(self, attempt_id: str, cost: Micros, state: EndState) -> None:
        """Replace the hold of an attempt by what it cost, in the windows in which it was reserved.

        "settled" books `cost`, also when it is more than was held (the truth is booked); "assumed" books the worst
        case, or `cost` if that is more; "released" books nothing. A second settle of an attempt changes nothing.
        Raises StoreError for an attempt that was never reserved, or an amount that cannot be.
        """
        entry = self.entries.get(attempt_id)
        if entry is None:
            raise StoreError(f"attempt {attempt_id!r} was never reserved", hint="reserve before the call is sent")
        if not 0 <= cost <= LARGEST or (state == "released" and cost):
            raise StoreError(f"attempt {attempt_id!r} cannot be {state} at {cost} micro-dollars")
        if entry.state != "held":
            return
        worst = entry.hold.worst
        booked = max(cost, worst) if state == "assumed" else cost
        windows = dict.fromkeys(entry.hold.windows)
        self._check_room(windows, booked)
        for window in windows:
            if self.amounts.get(window, _EMPTY).held < worst:
                raise StoreCorrupt(f"window {window!r} holds less than the open attempt {attempt_id!r}")
        entry.state, entry.cost = state, booked
        self.changed_entries.add(attempt_id)
        for window in windows:
            amount = self.amounts[window]
            amount.held -= worst
            amount.spent += booked
        self.changed_windows.update(windows)

    def _check_room(self, windows: Iterable[str], amount: Micros) -> None:
        for window in windows:
            there = self.amounts.get(window, _EMPTY)
            if there.spent + there.held + amount > LARGEST:
                raise StoreError(f"window {window!r} cannot count {amount} micro-dollars more (2^63 is the end)")


LEDGER_COLUMNS = "attempt_id, task, purpose, model, windows, day, worst, state, cost, at, seal"


@lru_cache(maxsize=1024)  # the windows of a task are the same all day
def _windows_row(windows: tuple[str, ...]) -> tuple[str, str]:
    """How the windows of a hold are written, and the day among them."""
    return to_json(windows, "windows"), next((window[4:] for window in windows if window.startswith("day:")), "")


@lru_cache(maxsize=1024)
def _read_windows(windows: str) -> tuple[str, ...]:
    return tuple(json.loads(windows))


def entry_row(entry: Entry) -> tuple[str | int | float, ...]:
    """What a store writes for an Entry, in the order of `LEDGER_COLUMNS`."""
    hold = entry.hold
    windows, day = _windows_row(hold.windows)
    return (
        to_text(hold.attempt_id),
        to_text(hold.task),
        hold.purpose,
        to_text(hold.model),
        windows,
        day,
        hold.worst,
        entry.state,
        entry.cost,
        hold.at,
        entry.seal,
    )


def read_entry(row: Sequence[Any]) -> Entry:
    """The Entry of a row of `LEDGER_COLUMNS`. Raises StoreCorrupt when its seal does not fit."""
    attempt_id, task, purpose, model, windows, _, worst, state, cost, at, seal = row
    hold = Hold(
        attempt_id=from_text(attempt_id),
        task=from_text(task),
        purpose=purpose,
        model=from_text(model),
        worst=worst,
        windows=_read_windows(windows),
        at=at,
    )
    entry = Entry(hold, state, cost)
    if entry.seal != seal:
        raise StoreCorrupt(f"the ledger's row of attempt {hold.attempt_id!r} is damaged")
    return entry


def read_amount(key: str, spent: Micros, held: Micros, seal: int) -> tuple[str, Amount]:
    """The window and its Amount. Raises StoreCorrupt when the seal does not fit."""
    window, amount = from_text(key), Amount(spent, held)
    if amount.seal(window) != seal:
        raise StoreCorrupt(f"the ledger's row of window {window!r} is damaged")
    return window, amount


VERSION_COLUMNS = "id, task, checkpoint, path, state, trained_on, created_at, promoted_at, certified_at, metrics"


def version_row(version: Version) -> tuple[str | int | float | None, ...]:
    """What a store writes for a Version, in the order of `VERSION_COLUMNS`."""
    return (
        to_text(version.id),
        to_text(version.task),
        to_text(version.checkpoint),
        to_text(version.path),
        version.state,
        version.trained_on,
        version.created_at,
        version.promoted_at,
        version.certified_at,
        to_json(version.metrics, f"version {version.id!r} of {version.task!r}: metrics"),
    )


def read_version(row: Sequence[Any]) -> Version:
    """The Version of a row of `VERSION_COLUMNS`."""
    values = dict(zip(VERSION_COLUMNS.split(", "), row, strict=True))
    for name in ("id", "task", "checkpoint", "path"):
        values[name] = from_text(values[name])
    return Version(**values | {"metrics": json.loads(values["metrics"])})


def next_version_id(taken: Sequence[str]) -> str:
    """The first id after all that were given: "v1", "v2", …

    >>> next_version_id(["v1", "v7", "imported"])
    'v8'
    """
    numbers = [int(name[1:]) for name in taken if re.fullmatch("v[0-9]{1,9}", name)]
    return f"v{max(numbers, default=0) + 1}"


EVENT_COLUMNS = "name, task, at, message, evidence, key"


def event_row(event: Event) -> tuple[str | float | None, ...]:
    """What a store writes for an Event, in the order of `EVENT_COLUMNS`."""
    return (
        to_text(event.name),
        to_text(event.task),
        event.at,
        to_text(event.message),
        to_json(event.evidence, f"event {event.name!r}: evidence"),
        None if event.key is None else to_text(event.key),
    )


def read_event(row: Sequence[Any]) -> Event:
    """The Event of a row of `EVENT_COLUMNS`."""
    name, task, at, message, evidence, key = row
    return Event(
        name=from_text(name),
        task=from_text(task),
        at=at,
        message=from_text(message),
        evidence=json.loads(evidence),
        key=None if key is None else from_text(key),
    )


CORRECTION_COLUMNS = "request_id, task, at, action, target, by, comment"


def correction_row(made: Correction) -> tuple[str | float, ...]:
    """What a store writes for a Correction, in the order of `CORRECTION_COLUMNS`."""
    target = to_json(made.target, f"correction of request {made.request_id!r}: target")
    texts = to_text(made.by), to_text(made.comment)
    return (to_text(made.request_id), to_text(made.task), made.at, made.action, target, *texts)


def read_correction(row: Sequence[Any]) -> Correction:
    """The Correction of a row of `CORRECTION_COLUMNS`."""
    request_id, task, at, action, target, by, comment = row
    return Correction(
        request_id=from_text(request_id),
        task=from_text(task),
        at=at,
        action=action,
        target=json.loads(target),
        by=from_text(by),
        comment=from_text(comment),
    )


LABEL_COLUMNS = "request_id, task, body"


def label_row(label: Label) -> tuple[str, str, str]:
    """What a store writes for a Label, in the order of `LABEL_COLUMNS`."""
    body = to_json(label, f"label of request {label.request_id!r}")
    return to_text(label.request_id), to_text(label.task), body


def read_label(body: str) -> Label:
    """The Label of a `body`."""
    return Label.model_validate(json.loads(body))


EXAMPLE_COLUMNS = "task, id, body"


def example_row(task: str, example: Example) -> tuple[str, str, str]:
    """What a store writes for an imported Example, in the order of `EXAMPLE_COLUMNS`. Raises StoreError for one without id."""
    if not example.request_id:
        raise StoreError(f"an example of task {task!r} has no id", hint="name it by its content, as `request_id`")
    body = to_json(example, f"example {example.request_id!r}")
    return to_text(task), to_text(example.request_id), body


def read_example(body: str) -> Example:
    """The Example of a `body`."""
    return Example.model_validate(json.loads(body))


def read_mode(task: str, mode: Literal["remote", "auto"], until: Seconds | None, at: Seconds) -> tuple[str, Mode]:
    """The task and its Mode, of a row."""
    return from_text(task), Mode(mode=mode, until=until, at=at)


BATCH_COLUMNS = "id, task, open, body, inputs"


def batch_row(batch: Batch) -> tuple[str | int, ...]:
    """What a store writes for a Batch, in the order of `BATCH_COLUMNS`. The inputs, which never change, are apart."""
    what = f"batch {batch.id!r}"
    body = to_json(batch.model_dump(mode="python", exclude={"inputs"}), what)
    return to_text(batch.id), to_text(batch.task), int(batch.open), body, to_json(batch.inputs, what)


def read_batch(row: Sequence[Any]) -> Batch:
    """The Batch of a row of (body, inputs)."""
    body, inputs = row
    return Batch.model_validate(json.loads(body) | {"inputs": json.loads(inputs)})


def runs[T](rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """The rows in runs of 64, 32, 16, … 1: seven statements to prepare and keep, instead of one for each number."""
    start, size = 0, 64
    while start < len(rows):
        if size <= len(rows) - start:
            yield rows[start : start + size]
            start += size
        else:
            size //= 2
