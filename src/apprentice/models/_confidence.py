"""How sure a generative model was of an answer, from what its server tells of each token."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from apprentice.types import Json

type Rule = Literal["logprob", "margin", "samples"]


class Token(NamedTuple):
    """One token of an answer, with the log-probability that the model gave it, and what it might have said instead."""

    text: bytes
    logprob: float
    others: tuple[tuple[bytes, float], ...] = ()


def tokens_of(found: Json) -> tuple[Token, ...]:
    """The tokens of a list as OpenAI's chat completions, llama.cpp, vLLM and Ollama write it; none, if one is odd."""

    def one(entry: dict[str, Json]) -> tuple[bytes, float]:
        raw, logprob = entry.get("bytes"), float(entry["logprob"])
        return (bytes(raw) if raw is not None else entry["token"].encode("utf-8", "surrogatepass")), min(logprob, 0.0)

    try:
        return tuple(
            Token(*one(entry), tuple(one(other) for other in entry.get("top_logprobs") or ())) for entry in found or ()
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def confidence(tokens: Sequence[Token], text: str, fields: Sequence[str] | None, rule: Rule) -> float | None:
    """How sure the model was of an answer's fields, in [0, 1]; None where that cannot be told.

    `logprob`: for each field the geometric mean of its tokens' probabilities, which does not punish length; their
    product over the fields, because all have to be right. `margin`: the smallest difference between the probability of
    a token and that of the best other one. Tokens outside the fields' values (names, braces, quotes) do not count.
    """
    said = b"".join(token.text for token in tokens)
    spans = _spans(text, fields)
    if not spans or not said.startswith(text.encode("utf-8", "surrogatepass")):
        return None
    result, ends, start = 1.0, [], 0
    for token in tokens:
        ends.append((start, start + len(token.text)))
        start += len(token.text)
    for first, last in spans:
        inside = [token for token, (a, b) in zip(tokens, ends, strict=True) if a < last and b > first]
        if not inside:
            continue
        if rule == "margin":
            result = min(result, *map(_margin, inside))
        else:
            result *= math.exp(math.fsum(token.logprob for token in inside) / len(inside))
    return min(max(result, 0.0), 1.0)


def _margin(token: Token) -> float:
    best = max((logprob for text, logprob in token.others if text != token.text), default=-math.inf)
    return max(0.0, math.exp(token.logprob) - math.exp(best))


def _spans(text: str, fields: Sequence[str] | None) -> list[tuple[int, int]]:
    """Where the values of an object's fields stand, in bytes, texts without their quotes; empty for what is no object."""
    decoder, found = json.JSONDecoder(), []
    blank = " \t\r\n,:"
    at = text.find("{") + 1
    try:
        while at and text[at:].strip(blank + "}"):
            at += len(text[at:]) - len(text[at:].lstrip(blank))
            name, at = decoder.raw_decode(text, at)
            at += len(text[at:]) - len(text[at:].lstrip(blank))
            begin = at
            value, at = decoder.raw_decode(text, at)
            if fields is None or name in fields or name == "value":
                quote = int(isinstance(value, str) and at - begin > 2)
                found.append((len(text[: begin + quote].encode()), len(text[: at - quote].encode())))
    except (ValueError, UnicodeError):
        return []
    return found
