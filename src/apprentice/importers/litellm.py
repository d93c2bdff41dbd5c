"""LiteLLM's logs: the standard logging payload, and rows of the proxy's spend logs.

Sources: https://docs.litellm.ai/docs/proxy/logging_spec (what callbacks write, to S3 or a file, say), and the table
LiteLLM_SpendLogs in https://github.com/BerriAI/litellm/blob/main/schema.prisma (`store_prompts_in_spend_logs` has to be on).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from apprentice.importers import (
    Imported,
    Importer,
    Log,
    Unusable,
    asked,
    completion,
    dollars,
    mapping,
    moment,
    place_of,
    text_of,
    usage_of,
    written,
)
from apprentice.types import Json

_CALLS = ("completion", "text_completion", "responses", "anthropic_messages")


def build() -> Importer:
    """An importer of both kinds of rows. A call of another type (embeddings, say) and one that failed are of no use."""
    return Log(_read)


def _read(row: Mapping[str, Json]) -> Iterator[Imported]:
    if isinstance(row.get("standard_logging_object"), dict):
        row = row["standard_logging_object"]
    call = text_of(row.get("call_type")).removeprefix("a") if row.get("call_type") != "anthropic_messages" else ""
    if call and not any(call.endswith(known) for known in _CALLS):
        raise Unusable("is no completion")
    if row.get("status") == "failure" or row.get("error_str"):
        raise Unusable("failed at the provider")
    prompt = written(row.get("messages"))
    if not (isinstance(prompt, list | dict | str) and prompt):
        prompt = written(row.get("proxy_server_request"))
        if not (isinstance(prompt, dict) and ("messages" in prompt or "input" in prompt)):
            raise Unusable("its prompt was not logged")
    response = written(row.get("response"))
    if not (isinstance(response, dict | str) and response):
        raise Unusable("its answer was not logged")
    input, turns = asked(prompt)
    body = mapping(response)
    model, provider = text_of(row.get("model")), text_of(row.get("custom_llm_provider"))
    yield Imported(
        input=input,
        turns=turns,
        output=completion(body) if body else response,
        model=model.removeprefix(f"{provider}/") if provider else model,
        provider=place_of(provider, text_of(row.get("api_base"))),
        at=moment(row.get("startTime")),
        usage=usage_of(row) or usage_of(body.get("usage")),
        cost=dollars(row.get("response_cost", row.get("spend"))),
        id=text_of(row.get("id"), row.get("request_id")),
    )
