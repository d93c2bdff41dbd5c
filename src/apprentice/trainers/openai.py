"""OpenAI's fine-tuning service, supervised. The weights stay there: the checkpoint refers to the model.

OpenAI takes new jobs until 6 January 2027, and since 2 July 2026 only from organisations that still use a fine-tuned model;
models that exist answer until their base model is retired (https://developers.openai.com/api/docs/deprecations). Sources:
https://developers.openai.com/api/docs/api-reference/fine-tuning and …/files.
"""

from __future__ import annotations

import json
import re
from typing import Literal
from urllib.parse import quote

from apprentice.errors import OutcomeUnknown
from apprentice.trainers._remote import Look, Remote, Row, Wire, mapping, multipart, text
from apprentice.types import Json, Seconds

_NAME = "apprentice"  # the key of our name in a job's metadata
_PAGES = 50
_ENDS: dict[str, Literal["succeeded", "failed", "cancelled"]] = {
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}


def build(
    model: str,
    api_key_env: str | None = "OPENAI_API_KEY",
    price_per_million: float | str | None = None,
    epochs: int = 3,
    base_url: str = "https://api.openai.com/v1",
    allow_internal: bool = False,
    timeout: float = 60.0,
    poll: float = 30.0,
    patience: float = 3600.0,
    hidden: float = 60.0,
) -> Remote:
    """A trainer that has OpenAI train `model`, a dated name such as gpt-4.1-mini-2025-04-14.

    `api_key_env`: the NAME of the variable that holds the key. `price_per_million`: US dollars per million tokens trained;
    nothing is trained without it. `poll`: seconds between two looks at the job; `patience`: seconds of failed looks before
    a cycle gives up waiting; `hidden`: seconds after which a job that was created shows in the provider's list.
    Raises ConfigError.
    """
    return Remote(
        _OpenAI(hidden),
        base_url=base_url,
        key_env=api_key_env,
        allow_internal=allow_internal,
        model=model,
        epochs=epochs,
        price=price_per_million,
        poll=poll,
        patience=patience,
        timeout=timeout,
    )


class _OpenAI:
    kind: Literal["reference", "adapter"] = "reference"
    provider = "openai"
    hint: str | None = (
        "OpenAI takes new fine-tuning jobs until 6 January 2027, and only from organisations that use such models; "
        "`apprentice export` writes the same data for others"
    )
    least = 10

    def __init__(self, hidden: Seconds) -> None:
        self.hidden = hidden

    async def upload(self, wire: Wire, row: Row, data: bytes) -> str:
        name = f"{row.name}.jsonl"
        for file in _objects(await wire.call("/files?purpose=fine-tune&limit=10000")):
            if file.get("filename") == name and file.get("bytes") == len(data) and file.get("status") != "error":
                return text(file.get("id"), "id of the file")
        form, media = multipart(row.name, {"purpose": "fine-tune"}, name, data)
        return text((await wire.call("/files", form, media=media)).get("id"), "id of the file")

    async def find(self, wire: Wire, row: Row) -> str | None:
        after = ""
        for _ in range(_PAGES):
            page = await wire.call(f"/fine_tuning/jobs?limit=100&metadata[{_NAME}]={quote(row.name, safe='')}{after}")
            jobs = _objects(page)
            for job in jobs:  # not every server of this format heeds the filter
                if mapping(job.get("metadata")).get(_NAME) == row.name:
                    return text(job.get("id"), "id of the job")
            if not jobs or page.get("has_more") is not True:
                return None
            after = f"&after={quote(text(jobs[-1].get('id'), 'id of the job'), safe='')}"
        raise OutcomeUnknown(f"{wire.name}: the list of jobs has no end", retryable=False)

    async def create(self, wire: Wire, row: Row) -> str:
        asked = {
            "model": row.base,
            "training_file": row.dataset,
            "seed": row.seed,
            "suffix": re.sub(r"[^a-z0-9-]", "-", row.task.lower())[:18],
            "metadata": {_NAME: row.name},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": row.epochs}}},
        }
        return text((await wire.call("/fine_tuning/jobs", json.dumps(asked).encode())).get("id"), "id of the job")

    async def look(self, wire: Wire, row: Row) -> Look:
        job = await wire.call(f"/fine_tuning/jobs/{quote(row.remote_id or '', safe='')}")
        state = text(job.get("status"), "status")
        error = mapping(job.get("error"))
        tokens = job.get("trained_tokens")
        result = job.get("fine_tuned_model")
        return Look(
            state=state,
            end=_ENDS.get(state),
            result=result if isinstance(result, str) else "",
            tokens=tokens if isinstance(tokens, int) and tokens >= 0 else None,
            # The file was found to be wrong, so that nothing was trained on it.
            free=state == "failed" and error.get("param") in ("training_file", "validation_file"),
            problem=str(error.get("message") or "")[:400],
        )

    async def cancel(self, wire: Wire, row: Row) -> None:
        await wire.call(f"/fine_tuning/jobs/{quote(row.remote_id or '', safe='')}/cancel", b"{}")

    async def files(self, wire: Wire, row: Row) -> dict[str, bytes]:
        return {}  # the weights are not given away


def _objects(page: dict[str, Json]) -> list[dict[str, Json]]:
    data = page.get("data")
    return [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []
