"""The names and labels of the metrics are promises: documents, dashboards and other people's alerts stand on them."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from apprentice.testing.servers import serve_openai

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
        config = configured(provider.url, local={"learn": "off"}, budget={"daily": Decimal(5)})
        await versions(config, 1)
        async with running(config, provider) as live:
            told(live.gateway.app, {"v1": Told()})
            live.gateway.app._tasks["sort"].champion = None  # it was looked for before the model was told
            for text in texts(8):  # the first ones bring the news of the version
                assert (await live.client.post("/v1/chat/completions", json=chat(text))).status_code == 200
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
    assert len(shown) > 15
    for name, labels in shown:
        kind, has = known[name.removesuffix("_bucket")]
        assert name.endswith("_bucket") == (kind == "histogram")
        assert set(re.findall(r"(\w+)\s*[=!]", labels)) <= has
    for said in asked:
        _, has = known[re.findall(r"apprentice_\w+", said)[0].removesuffix("_bucket")]
        assert set(re.findall(r"by \((\w+)\)", said)) - {"le"} <= has
