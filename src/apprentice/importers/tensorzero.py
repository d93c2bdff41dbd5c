"""TensorZero's tables of inferences: ChatInference, JsonInference and ModelInference, exported as rows of JSON.

Source: https://www.tensorzero.com/docs/gateway/data-model. In ClickHouse:
`SELECT * FROM JsonInference WHERE function_name = 'sort' INTO OUTFILE 'sort.jsonl' FORMAT JSONEachRow`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping

from apprentice.importers import (
    Imported,
    Importer,
    Log,
    Unusable,
    answered,
    asked,
    count,
    finished,
    moment,
    place_of,
    text_of,
    written,
)
from apprentice.types import Json, Seconds, Usage


def build(function: str | None = None, variant: str | None = None) -> Importer:
    """An importer of rows of one function and one variant, or of all. Only rows of ModelInference tell the model.

    A prompt made by a template of TensorZero is asked by its arguments: they are the input.
    """

    def read(row: Mapping[str, Json]) -> Iterator[Imported]:
        for name, wanted in (("function_name", function), ("variant_name", variant)):
            if wanted is not None and name in row and row[name] != wanted:
                raise Unusable("is of another function or variant")
        finished(row.get("finish_reason"))
        prompt = written(row.get("input", row.get("input_messages")))
        input, turns = asked(prompt)
        model, provider = _model(text_of(row.get("model_name")), text_of(row.get("model_provider_name")))
        counts = count(row.get("input_tokens")), count(row.get("output_tokens"))
        yield Imported(
            input=input,
            turns=turns,
            output=_answer(written(row.get("output"))),
            model=model,
            provider=place_of(provider),
            at=moment(row.get("timestamp")) or _made(row.get("id", row.get("inference_id"))),
            usage=None if None in counts else Usage(input_tokens=counts[0] or 0, output_tokens=counts[1] or 0),
            id=text_of(row.get("inference_id"), row.get("id")),
        )

    return Log(read)


def _answer(found: Json) -> Json:
    if isinstance(found, dict):
        value = found.get("parsed")
        value = found.get("raw") if value is None else value
        if value in (None, ""):
            raise Unusable("has no answer")
        return value
    return answered({"content": found})


def _model(model: str, provider: str) -> tuple[str, str]:
    """The provider's name of a model, and the provider: "openai::gpt-5-mini" is short for both."""
    first, sign, rest = model.partition("::")
    return (rest, provider or first) if sign else (model, provider)


def _made(id: Json) -> Seconds:
    """The moment in a UUID of version 7 (RFC 9562, 5.7); 0 where there is none."""
    try:
        made = uuid.UUID(text_of(id))
    except ValueError:
        return 0.0
    return moment((made.int >> 80) / 1000) if made.version == 7 else 0.0
