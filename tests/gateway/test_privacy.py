"""What the gateway hands on is redacted before it is kept, like any request; the client does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apprentice.sections import Redaction
from apprentice.stores import digest
from apprentice.testing.servers import serve_openai
from apprentice.types import Json

from .conftest import running

MAIL = "ann.kumquat@example.com"


def echo(body: dict[str, Json]) -> Json:
    return f"you wrote: {body['messages'][-1]['content']}"


async def test_a_relayed_body_is_sent_as_it_is_kept_without_and_repeated_with_its_words(
    configured: Any, tmp_path: Path
) -> None:
    async with serve_openai(echo, price=(150_000, 600_000)) as provider:
        config = configured(provider.url, local={"learn": "off"}).model_copy(update={"redaction": Redaction()})
        async with running(config, provider) as live:
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"write to {MAIL}"}]}
            marks = {"idempotency-key": "k", "x-apprentice-tag-subject": MAIL}
            first = await live.client.post("/v1/chat/completions", json=body, headers=marks)
            again = await live.client.post("/v1/chat/completions", json=body, headers=marks)
            other = body | {"messages": [{"role": "user", "content": "write to bob, and not to her"}]}
            reused = await live.client.post("/v1/chat/completions", json=other, headers=marks)
            [record] = await live.records("passthrough")
            files = [path.name for path in tmp_path.rglob("*") if path.is_file() and MAIL.encode() in path.read_bytes()]
    assert first.json()["choices"][0]["message"]["content"] == f"you wrote: write to {MAIL}"
    assert again.json() == first.json() and reused.status_code == 422 and len(provider.requests) == 1
    assert MAIL in json.dumps(provider.requests[0].body)
    assert record.input["messages"][0]["content"] == "write to <EMAIL_1>" and record.tags["subject"] == digest(MAIL)
    assert files == []
