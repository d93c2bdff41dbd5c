"""How near two texts are in meaning."""

from __future__ import annotations

import asyncio

from apprentice import plugins
from apprentice.errors import ConfigError
from apprentice.evaluators import field, fields_of, same
from apprentice.types import Encoder, Evaluator, Json, Score


def build(fields: list[str] | None = None, encoder: str = "minilm") -> Evaluator:
    """The mean over the fields of the cosine between the texts' embeddings, with each field's in `fields`. Symmetric.

    A negative cosine counts as 0, so that unrelated texts score about 0 and not a half. Equal values score 1; what is
    not text on both sides scores 1 when it is the same and 0 when not.

    `fields`: the paths that count (`a.b` is b within a); without them, all keys that either side has. An answer that is
    itself a text is compared whole. `encoder`: an encoder plugin; of a text longer than it reads, the start counts.
    Raises MissingExtra when the encoder's packages are not installed, ConfigError when there is no such encoder.
    """
    if fields is not None and not fields:
        raise ConfigError("evaluator 'semantic_similarity': fields should name at least one field")
    embedder: Encoder = plugins.build("encoders", encoder)

    async def evaluate(answer: Json, reference: Json) -> Score:
        if not isinstance(answer, dict) or not isinstance(reference, dict):
            return Score(value=(await _similarities(embedder, [(answer, reference)]))[0])
        paths = fields_of(answer, reference, fields)
        values = await _similarities(embedder, [(field(answer, path), field(reference, path)) for path in paths])
        scores = dict(zip(paths, values, strict=True))
        return Score(value=min(1.0, sum(values) / len(values)) if values else 1.0, fields=scores)

    return evaluate


async def _similarities(encoder: Encoder, pairs: list[tuple[Json, Json]]) -> list[float]:
    scores = [1.0 if same(left, right) else 0.0 for left, right in pairs]
    unlike = [
        index
        for index, (left, right) in enumerate(pairs)
        if not scores[index] and _has_words(left) and _has_words(right)
    ]
    if unlike:
        texts = [side for index in unlike for side in pairs[index]]
        vectors = await asyncio.to_thread(encoder.encode, texts)  # milliseconds of computing, off the event loop
        for row, index in enumerate(unlike):
            scores[index] = min(1.0, max(0.0, float(vectors[2 * row] @ vectors[2 * row + 1])))
    return scores


def _has_words(value: Json) -> bool:
    return isinstance(value, str) and bool(value.strip())
