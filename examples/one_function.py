"""A function that an expensive model answers today and a local student tomorrow.

The remote here is a server on this machine that answers by rule, so that the example needs no key; in life, take out
`base_url` and `allow_internal` and name your key in `api_key_env`.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from apprentice import Apprentice
from apprentice.testing.servers import asked, serve_openai

CONFIGURATION = """
tasks:
  - name: urgency
    description: "How urgent is this ticket?"
    input_schema: {text: str}
    output_schema: {urgency: [low, high]}
    evaluator: exact_match
    confidence_thresholds: {phase1_to_phase2: 30}
remote:
  provider: openai
  model: gpt-4o-mini
  base_url: "BASE_URL"
  allow_internal: true
  permission: {basis: "answers made up by this example", by: "its reader", date: "2026-11-21", scope: "*"}
local: {backend: embedded, fine_tune_batch_size: 200}
"""

SYMPTOMS = ["the server is on fire", "the database is down", "a typo on the page", "the colour of a button"]


def remote(body: dict[str, Any]) -> dict[str, Any]:
    """What the expensive model would say."""
    text = asked(body)["text"]
    return {"urgency": "high" if "fire" in text or "down" in text else "low"}


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with serve_openai(remote) as server:
            path = Path(folder, "apprentice.yaml")
            path.write_text(CONFIGURATION.replace("BASE_URL", server.url))
            async with Apprentice(path, seed=1) as app:

                @app.task("urgency")
                async def urgency(text: str) -> Any:
                    """The arguments are the task's input; the body is never run."""

                for number in range(150):
                    await urgency(f"Ticket {number}: {SYMPTOMS[number % 4]}")
                    await app.idle()  # only so that a short example sees its student
                result = await app.arun("urgency", {"text": "Ticket 151: the server is on fire"})
                print(result.output, "answered by the", result.source, "in phase", result.decision.phase)
            print(f"{len(server.requests)} of 151 requests reached the remote")


asyncio.run(main())
