"""Fireworks' supervised fine-tuning. The adapter is fetched, checked and kept; the model can be deployed there, too.

Dataset, job and model have ids of ours, so that making one a second time is answered with "exists". Sources:
https://docs.fireworks.ai/api-reference/create-supervised-fine-tuning-job, …/create-dataset, …/upload-dataset-files,
…/get-model-download-endpoint.
"""

from __future__ import annotations

import json
import re
from typing import Literal
from urllib.parse import quote

from apprentice.errors import ConfigError, ModelError, ModelUnavailable, UnsafeFile
from apprentice.trainers._remote import Look, Remote, Row, Wire, mapping, multipart, text
from apprentice.types import Json, Seconds

_ENDS: dict[str, Literal["succeeded", "failed", "cancelled"]] = {
    "JOB_STATE_COMPLETED": "succeeded",
    "JOB_STATE_EARLY_STOPPED": "succeeded",
    "JOB_STATE_FAILED": "failed",
    "JOB_STATE_EXPIRED": "failed",
    "JOB_STATE_CANCELLED": "cancelled",
    "JOB_STATE_DELETING": "cancelled",
    "JOB_STATE_DELETED": "cancelled",
}
_LARGEST = 150 * 2**20  # bytes that one upload may have
_MOST_FILES = 64


def build(
    model: str,
    account: str,
    api_key_env: str | None = "FIREWORKS_API_KEY",
    price_per_million: float | str | None = None,
    epochs: int = 1,
    lora_rank: int = 8,
    learning_rate: float | None = None,
    base_url: str = "https://api.fireworks.ai",
    allow_internal: bool = False,
    timeout: float = 60.0,
    poll: float = 30.0,
    patience: float = 3600.0,
) -> Remote:
    """A trainer that has Fireworks train an adapter for `model`, such as accounts/fireworks/models/qwen3-8b.

    `account`: the account's id. `price_per_million`: US dollars per million tokens trained; nothing is trained without it.
    `lora_rank`: 1 to 64. The other settings are those of the trainer `openai`. Raises ConfigError.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", account):
        raise ConfigError("trainer 'fireworks': account should be an account's id, such as my-team")
    if not 1 <= lora_rank <= 64:
        raise ConfigError("trainer 'fireworks': lora_rank should be 1 to 64")
    settings: dict[str, Json] = {"loraRank": lora_rank}
    if learning_rate is not None:
        settings["learningRate"] = learning_rate
    return Remote(
        _Fireworks(f"accounts/{account}", settings),
        base_url=base_url,
        key_env=api_key_env,
        allow_internal=allow_internal,
        model=model,
        epochs=epochs,
        price=price_per_million,
        poll=poll,
        patience=patience,
        timeout=timeout,
        settings=settings | {"account": account},
    )


class _Fireworks:
    kind: Literal["reference", "adapter"] = "adapter"
    provider = "fireworks"
    hint: str | None = None
    least = 3
    hidden: Seconds = 0.0  # an id of ours is there or not

    def __init__(self, account: str, settings: dict[str, Json]) -> None:
        self._account = account
        self._settings = settings

    async def upload(self, wire: Wire, row: Row, data: bytes) -> str:
        if len(data) > _LARGEST:
            raise ModelError(
                f"{wire.name}: the dataset has {len(data):,} bytes, of at most {_LARGEST:,}", outcome="not_sent"
            )
        dataset = {"displayName": row.name, "exampleCount": str(row.rows), "userUploaded": {}, "format": "CHAT"}
        asked = json.dumps({"datasetId": row.name, "dataset": dataset}).encode()
        made = await self._made(wire, f"/v1/{self._account}/datasets", asked)
        if not made and (await self._dataset(wire, row)).get("state") == "READY":
            return row.name
        form, media = multipart(row.name, {}, f"{row.name}.jsonl", data)
        await wire.call(f"/v1/{self._account}/datasets/{row.name}:upload", form, media=media)
        return row.name

    async def find(self, wire: Wire, row: Row) -> str | None:
        outcome = await wire.ask(self._job(row))
        if outcome.status == 404:
            return None
        wire.told(outcome)
        return row.name

    async def create(self, wire: Wire, row: Row) -> str:
        state = (await self._dataset(wire, row)).get("state")
        if state != "READY":
            raise ModelUnavailable(f"{wire.name}: the dataset is {state}", outcome="not_sent")
        asked = {
            "displayName": row.name,
            "dataset": f"{self._account}/datasets/{row.name}",
            "baseModel": row.base,
            "outputModel": f"{self._account}/models/{row.name}",
            "epochs": row.epochs,
            "evalAutoCarveout": False,  # every row is trained on, and only what is trained on is paid for
            **self._settings,
        }
        path = f"/v1/{self._account}/supervisedFineTuningJobs?supervisedFineTuningJobId={quote(row.name, safe='')}"
        await self._made(wire, path, json.dumps(asked).encode())
        return row.name

    async def look(self, wire: Wire, row: Row) -> Look:
        job = await wire.call(self._job(row))
        state = text(job.get("state"), "state")
        status = mapping(job.get("status"))
        end = _ENDS.get(state)
        tokens: int | None = None
        result = job.get("outputModel")
        if end == "succeeded":
            counted = str((await self._dataset(wire, row)).get("estimatedTokenCount") or "")
            tokens = int(counted) * row.epochs if counted.isascii() and counted.isdigit() else None
        return Look(
            state=state,
            end=end,
            result=result if isinstance(result, str) and result else f"{self._account}/models/{row.name}",
            tokens=tokens,
            # The dataset or a setting was found to be wrong, so that nothing was trained.
            free=state == "JOB_STATE_FAILED" and status.get("code") == "INVALID_ARGUMENT",
            problem=str(status.get("message") or "")[:400],
        )

    async def cancel(self, wire: Wire, row: Row) -> None:
        await wire.call(f"{self._job(row)}:cancel", b"{}")

    async def files(self, wire: Wire, row: Row) -> dict[str, bytes]:
        told = await wire.call(f"/v1/{self._account}/models/{row.name}:getDownloadEndpoint")
        addresses = mapping(told.get("filenameToSignedUrls"))
        if not addresses:
            raise ModelUnavailable(f"{wire.name}: the model has no files yet")
        if len(addresses) > _MOST_FILES:
            raise UnsafeFile(f"{wire.name}: the model has {len(addresses):,} files")
        return {name: await wire.download(text(url, "address")) for name, url in sorted(addresses.items())}

    async def _made(self, wire: Wire, path: str, asked: bytes) -> bool:
        """False where there was one of that id already, which is ours."""
        outcome = await wire.ask(path, asked)
        if outcome.status != 409:
            wire.told(outcome)
        return outcome.status != 409

    async def _dataset(self, wire: Wire, row: Row) -> dict[str, Json]:
        return await wire.call(f"/v1/{self._account}/datasets/{row.name}")

    def _job(self, row: Row) -> str:
        return f"/v1/{self._account}/supervisedFineTuningJobs/{quote(row.name, safe='')}"
