"""Every file in importers/ keeps the promises of an importer; a new file is found by itself and needs a row here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apprentice import plugins
from apprentice.importers import Imported, Importer
from apprentice.testing.importers import (
    CHECKS,
    Case,
    Check,
    a_file_that_was_cut_tells_what_came_before,
    a_row_is_there_before_the_next_is_read,
    odd_values_make_a_row_or_a_reason,
    rows_that_cannot_be_read_are_refused_one_by_one,
    the_sample_tells_what_was_asked_and_answered,
)

from . import samples
from .samples import Sample

SAMPLES: dict[str, list[Callable[[], Sample]]] = {
    "openai_jsonl": [samples.openai_pairs, samples.openai_finetuning, samples.openai_responses],
    "litellm": [samples.litellm_payload, samples.litellm_spend],
    "langfuse": [samples.langfuse_api, samples.langfuse_blob, samples.langfuse_table],
    "tensorzero": [samples.tensorzero_json, samples.tensorzero_model],
    "otel": [samples.otel_spans, samples.otel_events],
    "csv": [samples.csv_mapped, samples.csv_named],
}


def case(name: str, sample: Sample) -> Case:
    return Case(
        plugins.build("importers", name, **sample.settings),
        sample.text,
        sample.inputs,
        sample.outputs,
        sample.suffix,
        table=sample.settings.get("delimiter", ",") if sample.suffix == ".csv" else "",
        model=sample.model,
        provider=sample.provider,
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", plugins.names("importers"))
def test_contract(name: str, check: Check, tmp_path: Path) -> None:
    assert name in SAMPLES, f"add a row for {name!r}: a sample of its files"
    for make in SAMPLES[name]:
        check(case(name, make()), tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_results_of_a_batch_keep_the_contract_too(check: Check, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text(samples.openai_batch_requests())
    check(case("openai_jsonl", samples.openai_batch(str(requests))), tmp_path)


class Broken:
    """An importer with a fault of its own."""

    def __init__(self, fault: Callable[[Importer, Path], Iterator[Imported]]) -> None:
        self._inner = plugins.build("importers", "litellm")
        self._fault = fault

    def rows(self, path: Path) -> Iterator[Imported]:
        return self._fault(self._inner, path)


def silent(inner: Importer, path: Path) -> Iterator[Imported]:
    return (row for row in inner.rows(path) if not row.problem)


def at_once(inner: Importer, path: Path) -> Iterator[Imported]:
    path.read_bytes()
    return iter(list(inner.rows(path)))


def talkative(inner: Importer, path: Path) -> Iterator[Imported]:
    for row in inner.rows(path):
        yield Imported(place=row.place, problem=f"{row.place}: {row.problem}") if row.problem else row


def swapped(inner: Importer, path: Path) -> Iterator[Imported]:
    return (
        Imported(place=row.place, input=row.output, output=row.input) for row in inner.rows(path) if not row.problem
    )


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (silent, rows_that_cannot_be_read_are_refused_one_by_one),
        (silent, a_file_that_was_cut_tells_what_came_before),
        (at_once, a_row_is_there_before_the_next_is_read),
        (talkative, odd_values_make_a_row_or_a_reason),
        (swapped, the_sample_tells_what_was_asked_and_answered),
    ],
)
def test_an_importer_that_breaks_a_promise_is_caught(
    fault: Callable[[Importer, Path], Iterator[Imported]], check: Check, tmp_path: Path
) -> None:
    whole = case("litellm", samples.litellm_payload())
    with pytest.raises(AssertionError):
        check(whole._replace(importer=Broken(fault)), tmp_path)
