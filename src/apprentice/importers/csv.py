"""Tables as text: one row a request, with a header (RFC 4180)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from apprentice.errors import ConfigError
from apprentice.importers import Imported, Importer, Log, Row, Unusable, count, csv_rows, dollars, moment, place_of
from apprentice.types import Json, Usage

_ABOUT = ("model", "provider", "base_url", "at", "cost", "id", "input_tokens", "output_tokens")


def build(map: dict[str, str] | None = None, delimiter: str = ",") -> Importer:
    """An importer of a table. `map`: what is in which column: {"input.text": "question", "output.label": "answer"}.

    What can be mapped: `input` and `output` (the whole, as text or JSON) or `input.FIELD` and `output.FIELD` (a field; `a.b` is
    b within a), and model, provider, base_url, at, cost (US dollars), id, input_tokens, output_tokens. Without a mapping,
    the columns that have such a name themselves. Raises ConfigError for a mapping of anything else, and, when it reads, for
    a column that is not there.
    """
    wanted = map or {}
    for target in wanted:
        if not _known(target):
            known = f"input, input.FIELD, output, output.FIELD, {', '.join(_ABOUT)}"
            raise ConfigError(f"importer 'csv': map: there is no {target!r}", hint=f"one of: {known}")
    for target in wanted:
        if within := next((other for other in wanted if other.startswith(f"{target}.")), None):
            raise ConfigError(f"importer 'csv': map: {within!r} is within {target!r}", hint="map one of the two")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ConfigError("importer 'csv': delimiter should be one character")

    def files(path: Path) -> Iterator[Row]:
        columns: dict[str, str] | None = None
        for place, row in csv_rows(path, delimiter):
            if columns is None and isinstance(row, dict):
                columns = _columns(path, wanted, row)
            if columns is not None and isinstance(row, dict):
                yield place, {target: row[column] for target, column in columns.items()}
            else:
                yield place, row

    return Log(_read, files)


def _known(name: str) -> bool:
    side, dot, field = name.partition(".")
    return name in _ABOUT or (side in ("input", "output") and bool(field) == bool(dot))


def _columns(path: Path, wanted: Mapping[str, str], row: Mapping[str, str]) -> dict[str, str]:
    """The column of each target. Raises ConfigError."""
    for column in wanted.values():
        if column not in row:
            raise ConfigError(f"{path}: there is no column {column!r}", hint=f"one of: {', '.join(row)}")
    columns = dict(wanted) or {name: name for name in row if _known(name)}
    for side in ("input", "output"):
        if not any(target.partition(".")[0] == side for target in columns):
            raise ConfigError(
                f"{path}: no column is the {side}", hint=f"--map {side}.FIELD=COLUMN; columns: {', '.join(row)}"
            )
    return columns


def _read(row: Mapping[str, Json]) -> Iterator[Imported]:
    counts = count(row.get("input_tokens")), count(row.get("output_tokens"))
    yield Imported(
        input=_side(row, "input"),
        output=_side(row, "output"),
        cells=True,
        model=row.get("model", "").strip(),
        provider=place_of(row.get("provider", ""), row.get("base_url", "").strip()),
        at=moment(row.get("at")),
        usage=None if None in counts else Usage(input_tokens=counts[0] or 0, output_tokens=counts[1] or 0),
        cost=dollars(row.get("cost")),
        id=row.get("id", ""),
    )


def _side(row: Mapping[str, Json], side: str) -> Json:
    if side in row:
        if not row[side].strip():
            raise Unusable("has no prompt" if side == "input" else "has no answer")
        return row[side]
    value: dict[str, Json] = {}
    for target, text in row.items():
        if target.startswith(f"{side}.") and text.strip():  # an empty cell is a field that is not there
            *parents, last = target.split(".")[1:]
            inside = value
            for name in parents:
                inside = inside.setdefault(name, {})
            inside[last] = text
    if not value:
        raise Unusable("has no prompt" if side == "input" else "has no answer")
    return value
