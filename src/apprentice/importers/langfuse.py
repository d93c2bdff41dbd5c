"""Langfuse's observations: exports from its pages (CSV, JSON), its blob storage export (CSV, JSONL) and its API.

Sources: https://langfuse.com/docs/api-and-data-platform/features/blob-storage-export-fields (names with "_") and
https://api.reference.langfuse.com (the same in camel case). Parquet is not read: choose JSONL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from apprentice.importers import (
    Imported,
    Importer,
    Log,
    Row,
    Unusable,
    answered,
    asked,
    completion,
    csv_rows,
    dollars,
    json_rows,
    mapping,
    mappings,
    moment,
    place_of,
    text_of,
    usage_of,
    written,
)
from apprentice.types import Json


def build() -> Importer:
    """An importer of generations; observations of other types are of no use. A file called .csv or .csv.gz is a table."""
    return Log(_read, _files)


def _files(path: Path) -> Iterator[Row]:
    return csv_rows(path) if path.name.lower().endswith((".csv", ".csv.gz")) else json_rows(path)


def _read(row: Mapping[str, Json]) -> Iterator[Imported]:
    if text_of(row.get("type")).upper() not in ("GENERATION", ""):
        raise Unusable("is no generation")
    if text_of(row.get("level")).upper() == "ERROR":
        raise Unusable("failed at the provider")
    input, turns = asked(written(row.get("input")))
    counts = written(_first(row, "usageDetails", "usage_details", "usage"))
    costs = mapping(written(_first(row, "costDetails", "cost_details")))
    about = mapping(written(row.get("metadata")))
    yield Imported(
        input=input,
        turns=turns,
        output=_answer(row.get("output")),
        model=text_of(_first(row, "providedModelName", "provided_model_name", "model")),
        # Langfuse keeps no provider; its integration of LangChain writes this into the metadata.
        provider=place_of(text_of(about.get("ls_provider"), about.get("provider"))),
        at=moment(_first(row, "startTime", "start_time")),
        usage=usage_of(counts),
        cost=dollars(_first(row, "totalCost", "total_cost", "calculatedTotalCost") or costs.get("total")),
        id=text_of(row.get("id")),
    )


def _first(row: Mapping[str, Json], *names: str) -> Json:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _answer(logged: Json) -> Json:
    """An answer is logged as text, as a message, as several of one message, as the body of a response, or as it was parsed."""
    found = written(logged)
    messages = mappings(found)
    if len(messages) == 1 and "role" in messages[0]:
        found = messages[0]
    if found in (None, "", [], {}):
        raise Unusable("has no answer")
    if isinstance(found, dict) and ("choices" in found or isinstance(found.get("output"), list)):
        return completion(found)
    if isinstance(found, dict) and ("role" in found or "tool_calls" in found):
        return answered(found)
    return logged
