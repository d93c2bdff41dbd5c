"""What every importer promises, as checks that a third party runs over its own.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check, tmp_path):
        check(Case(my_importer.build(), sample, inputs, outputs), tmp_path)

`sample` is the text of a file as the other tool writes it, one row a line. A broken promise raises AssertionError.
"""

from __future__ import annotations

import gzip
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from apprentice.errors import ConfigError
from apprentice.importers import LONGEST, Imported, Importer
from apprentice.types import Json


class Case(NamedTuple):
    """An importer, and a file for it with what its usable rows ask and answer, in order."""

    importer: Importer
    sample: str
    inputs: Sequence[Json]
    outputs: Sequence[Json]
    suffix: str = ".jsonl"
    table: str = ""  # the sign between the cells of a table with a header; empty where each line is an object
    model: str = ""  # of every row, where the format tells one
    provider: str = ""


type Check = Callable[[Case, Path], None]

_CANARY = "canary-7c1e"
_PADDING = "x" * 40_000
_DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000
# Lines that are no row of any log. Each is refused by itself.
HOSTILE: tuple[bytes, ...] = (
    b"{",
    f"{_CANARY} is no JSON".encode(),
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b"null",
    b"true",
    b'"text"',
    b"17",
    b"[]",
    b"[{}]",
    b"{}",
    b'{"messages": 1, "request": 2, "resourceSpans": {}, "response": -1}',
    b'{"a": "\xff\xfe"}',
    b"\x00\x01",
    _DEEP.encode(),
    b"[" * 100_000,
    b'{"a": ' + b"9" * 5_000 + b"}",
)
# What may stand in the place of any value of a row.
VALUES: tuple[Json, ...] = (
    None,
    True,
    -1,
    0.5,
    10**400,
    "",
    " ",
    "\0",
    "half a pair: \ud800",
    "word " * 1_000,
    "9999-99-99T99:99:99Z",
    "http://[::1",
    [],
    [[]],
    [None, 1, "a", {}],
    {},
    {"role": "user"},
    {"a": {"b": [{"c": None}]}},
)


def the_sample_tells_what_was_asked_and_answered(case: Case, folder: Path) -> None:
    found = _usable(case, _write(case, folder, case.sample.encode()))
    assert [row.input for row in found] == list(case.inputs)
    assert [row.output for row in found] == list(case.outputs)
    for row in found:
        assert (row.model, row.provider) == (case.model, case.provider or "?@?"), (
            f"{row.place}: who answered, and where"
        )
        assert row.place, "a row has no place"
        assert math.isfinite(row.at) and row.at >= 0


def a_file_may_be_packed_or_begin_with_a_mark(case: Case, folder: Path) -> None:
    plain = _usable(case, _write(case, folder, case.sample.encode()))
    assert _usable(case, _write(case, folder, b"\xef\xbb\xbf" + case.sample.encode())) == plain
    assert _usable(case, _write(case, folder, gzip.compress(case.sample.encode()), ".gz")) == plain
    assert _usable(case, _write(case, folder, case.sample.replace("\n", "\r\n").encode())) == plain


def rows_that_cannot_be_read_are_refused_one_by_one(case: Case, folder: Path) -> None:
    if case.table:
        return  # a table has other faults
    good = case.sample.rstrip("\n").encode().split(b"\n")
    lines = [line for hostile in HOSTILE for line in (*good, hostile)]
    lines += [*good, b'{"a": "' + b"x" * LONGEST + b'"}', *good]
    found = list(case.importer.rows(_write(case, folder, b"\n".join(lines))))
    assert [row.input for row in found if not row.problem] == list(case.inputs) * (len(HOSTILE) + 2)
    refused = [row for row in found if row.problem and row.place.split(",")[0].removeprefix("line ").isdigit()]
    bad = {len(good) + 1 + number * (len(good) + 1) for number in range(len(HOSTILE) + 1)}
    assert bad <= {int(row.place.split(",")[0].removeprefix("line ")) for row in refused}, (
        "a row was passed over in silence"
    )
    _say_little(found)


def odd_values_make_a_row_or_a_reason(case: Case, folder: Path) -> None:
    if case.table:
        return
    lines = [json.loads(line) for line in case.sample.splitlines()]
    changed = [json.dumps(row) for line in lines[:3] for row in _changed(line)]
    _say_little(list(case.importer.rows(_write(case, folder, "\n".join(changed).encode()))))


def a_row_is_there_before_the_next_is_read(case: Case, folder: Path) -> None:
    """A file of many rows needs no more memory than one of few."""
    times = 40
    lines = case.sample.splitlines()
    if case.table:
        rest = [f"{line}{case.table}{_PADDING}" for line in lines[1:]]
        text = "\n".join([f"{lines[0]}{case.table}padding", *rest * times])
    else:
        text = "\n".join([json.dumps(json.loads(line) | {"padding": _PADDING}) for line in lines] * times)
    path = _write(case, folder, text.encode())
    tracemalloc.start()
    try:
        usable = sum(not row.problem for row in case.importer.rows(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert usable == times * len(case.inputs)
    assert peak < len(text) / 4, f"{peak:,} bytes for a file of {len(text):,}"


def a_file_that_was_cut_tells_what_came_before(case: Case, folder: Path) -> None:
    whole = gzip.compress(case.sample.encode() * (1 if case.table else 50), compresslevel=1)
    found = list(case.importer.rows(_write(case, folder, whole[: len(whole) - 9], ".gz")))
    assert found[-1].problem, "nobody was told"
    _say_little(found)


def a_file_that_is_not_there_is_an_error_of_ours(case: Case, folder: Path) -> None:
    for path in (folder / "missing.jsonl", folder):
        try:
            list(case.importer.rows(path))
        except ConfigError as error:
            assert str(path) in str(error)
        else:
            raise AssertionError(f"{path} was read")


def an_empty_file_has_no_rows(case: Case, folder: Path) -> None:
    for content in (b"", b"\n\n \r\n", b"\xef\xbb\xbf"):
        assert not [row for row in case.importer.rows(_write(case, folder, content)) if not row.problem]


CHECKS: tuple[Check, ...] = (
    the_sample_tells_what_was_asked_and_answered,
    a_file_may_be_packed_or_begin_with_a_mark,
    rows_that_cannot_be_read_are_refused_one_by_one,
    odd_values_make_a_row_or_a_reason,
    a_row_is_there_before_the_next_is_read,
    a_file_that_was_cut_tells_what_came_before,
    a_file_that_is_not_there_is_an_error_of_ours,
    an_empty_file_has_no_rows,
)


def _write(case: Case, folder: Path, content: bytes, packed: str = "") -> Path:
    path = folder / f"log{case.suffix}{packed}"
    path.write_bytes(content)
    return path


def _usable(case: Case, path: Path) -> list[Imported]:
    return [row for row in case.importer.rows(path) if not row.problem]


def _say_little(rows: Sequence[Imported]) -> None:
    """Reasons are few sentences, and repeat nothing of a row: they are counted, and shown."""
    reasons = {row.problem for row in rows if row.problem}
    assert len(reasons) <= 25, reasons
    assert not [reason for reason in reasons if len(reason) > 150 or _CANARY in reason]
    for row in rows:
        assert math.isfinite(row.at)
        assert row.cost is None or row.cost >= 0


def _changed(value: Json, depth: int = 0) -> Iterator[Json]:
    """The value with each part of it, down to a depth, left out and replaced by each odd value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        others = [*VALUES, *(_changed(part, depth + 1) if depth < 3 else ())]
        for other in others:
            copied = value.copy()
            copied[key] = other
            yield copied
    if isinstance(value, dict):
        for key in value:
            yield {name: part for name, part in value.items() if name != key}
