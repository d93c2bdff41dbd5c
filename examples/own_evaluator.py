"""An extraction task with several fields, and an evaluator of one's own that forgives a small error in the amount."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from apprentice import Apprentice
from apprentice.testing.servers import asked, serve_openai

CONFIGURATION = """
tasks:
  - name: invoice
    description: "Read the currency and the amount of an invoice line"
    input_schema: {line: str}
    output_schema: {currency: [EUR, USD], amount: float}
    evaluator: {name: custom, function: "__main__:close_enough"}
    confidence_thresholds: {phase1_to_phase2: 500}
remote:
  provider: openai
  model: gpt-4o-mini
  base_url: "BASE_URL"
  allow_internal: true
  permission: {basis: "answers made up by this example", by: "its reader", date: "2026-11-21", scope: "*"}
budget: {daily: 1.00}
"""


def close_enough(answer: dict[str, Any], reference: dict[str, Any]) -> float:
    """1 for the same currency and an amount within one per cent, 0.5 for the currency alone."""
    if answer["currency"] != reference["currency"]:
        return 0.0
    return 1.0 if abs(answer["amount"] - reference["amount"]) <= 0.01 * abs(reference["amount"]) else 0.5


def remote(body: dict[str, Any]) -> dict[str, Any]:
    """What the expensive model would say."""
    amount, currency = asked(body)["line"].split()[-2:]
    return {"currency": currency, "amount": float(amount)}


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with serve_openai(remote) as server:
            path = Path(folder, "apprentice.yaml")
            path.write_text(CONFIGURATION.replace("BASE_URL", server.url))
            async with Apprentice(path) as app:
                for line in ("Paper 12.50 EUR", "Ink 30 USD"):
                    result = await app.arun("invoice", {"line": line})
                    print(result.output, f"for ${result.cost / 1e6:.6f}, request {result.request_id[:8]}…")


asyncio.run(main())
