"""The names and labels of the metrics are promises: documents, dashboards and other people's alerts stand on them."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from apprentice.gateway.meters import Meters
from apprentice.report import TaskStatus
from apprentice.testing.servers import serve_openai
from apprentice.types import Confidence, Mode

from ..conftest import honest, texts
from ..test_canary import Configured, Told, told, versions
from .conftest import Live, chat, running

DOCS = Path(__file__).parents[2] / "docs"


async def exposed(live: Live) -> dict[str, tuple[str, frozenset[str]]]:
    """By name as Prometheus keeps it: the type and the labels."""
    answer = await live.client.get("/metrics")
    assert answer.status_code == 200
    found = {}
    for family in text_string_to_metric_families(answer.text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        if not family.name.endswith("_created"):  # when a series began, which the client library adds
            found[name] = (family.type, frozenset(labels))
    return found


async def test_documents_and_dashboard_name_exactly_the_metrics_and_labels_that_there_are(
    configured: Configured,
) -> None:
    async with serve_openai(honest, price=(150_000, 600_000)) as provider:
        sampling = {"repeat_share": 1.0}  # so that it is known how far the remote agrees with itself
        config = configured(provider.url, local={"learn": "off"}, budget={"daily": Decimal(5)}, sampling=sampling)
        await versions(config)
        async with running(config, provider) as live:
            told(live.gateway.app, {"v1": Told(), "v2": Told()})
            task = live.gateway.app._tasks["sort"]
            task.champion = None  # it was looked for before the model was told
            waiting = iter(texts(400))
            while task.standing.level == 1:  # until the local model answers some alone
                answer = await live.client.post("/v1/chat/completions", json=chat(next(waiting)))
                assert answer.status_code == 200
            await live.store.promote("sort", "v2", 2.0, state="canary")
            known = await exposed(live)
    table = (
        (DOCS / "operate.md").read_text().partition("| metric | type | labels | what it is |")[2].partition("\n\n")[0]
    )
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.strip().splitlines()[1:]]
    documented = {row[0].strip("`"): (row[1], frozenset(re.findall(r"\w+", row[2]))) for row in rows}
    assert documented == known
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    shown = [(name, labels) for said in asked for name, labels in re.findall(r"(apprentice_\w+)(?:\{([^}]*)\})?", said)]
    assert {name.removesuffix("_bucket") for name, _ in shown} == set(known) - {"apprentice_http_in_flight"}
    for name, labels in shown:
        kind, has = known[name.removesuffix("_bucket")]
        assert name.endswith("_bucket") == (kind == "histogram")
        assert set(re.findall(r"(\w+)\s*[=!]", labels)) <= has
    for said in asked:
        _, has = known[re.findall(r"apprentice_\w+", said)[0].removesuffix("_bucket")]
        assert set(re.findall(r"by \((\w+)\)", said)) - {"le"} <= has


def samples(*tasks: TaskStatus) -> dict[str, dict[tuple[str, ...], float]]:
    """By name: what the series with these labels, the task's left out, says."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(Meters().text(list(tasks)).decode()):
        for sample in family.samples:
            labels = tuple(value for name, value in sample.labels.items() if name != "task")
            found.setdefault(sample.name.removeprefix("apprentice_"), {})[labels] = sample.value
    return found


def standing(confidence: Confidence, *, requests: int = 10, labels: int = 10, mode: Mode | None = None) -> TaskStatus:
    return TaskStatus(
        task="sort", requests=requests, labels=labels, confidence=confidence, mode=mode, spend=[], events=[]
    )


@pytest.mark.parametrize("drift", ["none", "suspected", "alarm"])
def test_exactly_one_state_of_drift_is_in_force(drift: str) -> None:
    found = samples(standing(Confidence(drift=drift)))
    assert found["drift"] == {(state,): float(state == drift) for state in ("none", "suspected", "alarm")}


def test_the_share_of_a_version_on_trial_is_there_while_it_is_tried_out() -> None:
    assert "canary_share" not in samples(standing(Confidence()))
    assert samples(standing(Confidence(canary="v2", canary_share=0.25)))["canary_share"] == {("v2",): 0.25}


def test_what_is_not_known_has_no_series_and_is_not_zero() -> None:
    young, old = samples(standing(Confidence())), samples(standing(Confidence(served_agreement=0.0, ceiling=0.75)))
    assert not {"agreement", "lower", "upper", "served_agreement", "ceiling"} & set(young)
    assert (old["served_agreement"], old["ceiling"]) == ({(): 0.0}, {(): 0.75})


def test_an_operators_wish_and_silent_audits_are_seen() -> None:
    calm = samples(standing(Confidence()))
    assert (calm["remote_forced"], calm["verified"]) == ({(): 0.0}, {(): 1.0})
    worried = samples(standing(Confidence(verified=False), mode=Mode(mode="remote", at=1.0)))
    assert (worried["remote_forced"], worried["verified"]) == ({(): 1.0}, {(): 0.0})


def test_remote_share_and_saved_calls_follow_from_two_counters() -> None:
    found = samples(standing(Confidence(), requests=40, labels=10))
    assert (found["requests_total"], found["labels_total"]) == ({(): 40.0}, {(): 10.0})


async def test_what_is_scraped_is_what_the_status_says(configured: Configured) -> None:
    async with serve_openai(honest, price=(150_000, 600_000)) as provider:
        config = configured(provider.url, local={"learn": "off"})
        await versions(config)
        async with running(config, provider) as live:
            told(live.gateway.app, {"v1": Told(wrong="037"), "v2": Told()})
            await live.store.promote("sort", "v2", 2.0, state="canary")
            live.gateway.app._tasks["sort"].champion = None  # it was looked for before the model was told
            for text in texts(12):
                assert (await live.client.post("/v1/chat/completions", json=chat(text))).status_code == 200
            await live.client.post("/v1/tasks/sort/mode", json={"mode": "remote"})
            status = TaskStatus.model_validate((await live.client.get("/v1/tasks/sort/status")).json())
            scraped = (await live.client.get("/metrics")).text
    assert status.confidence.canary == "v2" and status.confidence.agreement is not None and status.mode is not None
    own = {
        line for line in Meters().text([status]).decode().splitlines() if not line.startswith(("#", "apprentice_http_"))
    }
    assert len(own) > 20 and own <= set(scraped.splitlines())
