"""OpenAI's chat format: fine-tuning files, logged pairs of request and response, and results of batches.

Sources: https://platform.openai.com/docs/guides/supervised-fine-tuning (`messages`), …/guides/batch (`custom_id`, `body`,
`response`), …/api-reference/chat and …/api-reference/responses (bodies). One row a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from apprentice.errors import ConfigError
from apprentice.importers import (
    Imported,
    Importer,
    Log,
    Unusable,
    answered,
    asked,
    completion,
    json_rows,
    mapping,
    mappings,
    moment,
    place_of,
    text_of,
    usage_of,
)
from apprentice.types import Json


def build(requests: str | None = None) -> Importer:
    """An importer of rows {messages: […, the answer]}, {request, response} and, with `requests`, of a batch's results.

    `requests`: the file with which the batch was made; results name their request by `custom_id`. What it asks is held in
    memory. Raises ConfigError for a file that cannot be read or has no requests.
    """
    sent = None if requests is None else _sent(Path(requests))

    def read(row: Mapping[str, Json]) -> Iterator[Imported]:
        if isinstance(row.get("messages"), list) and "response" not in row:
            yield _taught(row)
            return
        result = mapping(row.get("response"))
        body = mapping(result.get("body")) or result
        if not body:
            raise Unusable("failed at the provider" if row.get("error") else "has no answer")
        status = result.get("status_code", 200)
        if row.get("error") or not (isinstance(status, int) and 200 <= status < 300):
            raise Unusable("failed at the provider")
        if sent is None or "request" in row:
            input, turns, wanted = _asked(row)
        elif (name := text_of(row.get("custom_id"))) in sent:
            input, turns, wanted = sent[name]
        else:
            raise Unusable("its request is not in the file of requests")
        yield Imported(
            input=input,
            turns=turns,
            output=completion(body),
            model=text_of(body.get("model"), wanted),
            provider=place_of(text_of(row.get("provider")), text_of(row.get("base_url"), row.get("api_base"))),
            at=moment(body.get("created", body.get("created_at"))) or _when(row),
            usage=usage_of(body.get("usage")),
            id=text_of(body.get("id"), row.get("id"), row.get("custom_id")),
        )

    return Log(read)


def _taught(row: Mapping[str, Json]) -> Imported:
    """A conversation whose last message is the answer."""
    *before, last = row["messages"] or [None]
    if not before or mapping(last).get("role") != "assistant":
        raise Unusable("does not end with an answer")
    input, turns = asked(before)
    return Imported(
        input=input,
        turns=turns,
        output=answered(mapping(last)),
        model=text_of(row.get("model")),
        provider=place_of(text_of(row.get("provider"))),
        at=_when(row),
        usage=usage_of(row.get("usage")),
        id=text_of(row.get("id")),
    )


def _asked(row: Mapping[str, Json]) -> tuple[Json, int, str]:
    """What a request asks, after how many turns, and of which model."""
    request = mapping(row.get("request")) or row
    body = mapping(request.get("body")) or request
    if "messages" not in body and "input" not in body and "prompt" not in body:
        raise Unusable("has no request: results of a batch need the file of its requests")
    prompt = body.get("messages", body.get("input", body.get("prompt")))
    input, turns = asked([one for one in mappings(prompt) if one.get("type") in ("message", None)] or prompt)
    return input, turns, text_of(body.get("model"))


def _when(row: Mapping[str, Json]) -> float:
    named = (row[key] for key in ("timestamp", "created_at", "created", "time") if row.get(key) is not None)
    return moment(next(named, None))


def _sent(path: Path) -> dict[str, tuple[Json, int, str]]:
    found: dict[str, tuple[Json, int, str]] = {}
    for _, row in json_rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
            continue
        try:
            found[row["custom_id"]] = _asked(row)
        except Unusable:  # its result is then one without a request, and told as that
            continue
    if not found:
        raise ConfigError(f"{path}: has no request of a batch", hint="name the file that was uploaded for the batch")
    return found
