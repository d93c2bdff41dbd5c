from __future__ import annotations

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError
from apprentice.types import Evaluator


@pytest.fixture(scope="module")
def meaning() -> Evaluator:
    built: Evaluator = plugins.build("evaluators", "semantic_similarity")
    return built


async def test_texts_of_like_meaning_score_above_texts_of_like_words(meaning: Evaluator) -> None:
    paraphrase = await meaning("I want my money back", "Please refund my order")
    unrelated = await meaning("I want my money back", "The weather on the coast is mild")
    assert paraphrase.value > 0.5 > 0.25 > unrelated.value


async def test_each_field_has_its_score_and_what_is_no_text_is_compared_exactly(meaning: Evaluator) -> None:
    score = await meaning(
        {"summary": "The cat sat on the mat", "stars": 4, "topic": "cats"},
        {"summary": "A cat was sitting on a rug", "stars": 5, "topic": "cats"},
    )
    assert 0.5 < score.fields["summary"] < 1.0
    assert score.fields["stars"] == 0.0
    assert score.fields["topic"] == 1.0
    assert score.value == pytest.approx(sum(score.fields.values()) / 3)


async def test_only_the_fields_count() -> None:
    evaluate = plugins.build("evaluators", "semantic_similarity", fields=["a.text"], encoder="tfidf")
    score = await evaluate({"a": {"text": "red fox"}, "b": 1}, {"a": {"text": "red fox"}, "b": 2})
    assert score.value == 1.0
    assert score.fields == {"a.text": 1.0}


async def test_an_empty_text_is_like_nothing_but_another_one(meaning: Evaluator) -> None:
    assert (await meaning({"text": ""}, {"text": "The cat sat"})).value == 0.0
    assert (await meaning({"text": ""}, {"text": ""})).value == 1.0
    assert (await meaning({"text": None}, {"text": "The cat sat"})).value == 0.0


def test_an_unknown_encoder_and_no_fields_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="minilm"):
        plugins.build("evaluators", "semantic_similarity", encoder="minilmm")
    with pytest.raises(ConfigError, match="fields"):
        plugins.build("evaluators", "semantic_similarity", fields=[])
