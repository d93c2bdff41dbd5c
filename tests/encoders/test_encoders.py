from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from apprentice import plugins
from apprentice.encoders import LONGEST, Memory
from apprentice.errors import ConfigError, InvalidInput


class Counting:
    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[int]:
        self.read += texts
        return [len(text) for text in texts]


def test_a_text_is_encoded_once_even_within_one_call() -> None:
    encode, memory = Counting(), Memory(10)
    assert memory.rows(["a", "bb", "a"], encode) == [1, 2, 1]
    assert memory.rows(["bb", "ccc"], encode) == [2, 3]
    assert encode.read == ["a", "bb", "ccc"]


def test_memory_is_bounded_and_forgets_what_was_used_least_recently() -> None:
    encode, memory = Counting(), Memory(2)
    for text in ("a", "b", "a", "c", "a", "b"):
        memory.rows([text], encode)
    assert encode.read == ["a", "b", "c", "b"]


def test_a_call_with_more_texts_than_are_remembered_is_answered_in_full() -> None:
    assert Memory(2).rows(["a", "bb", "ccc", "dddd"], Counting()) == [1, 2, 3, 4]


def test_memory_keeps_no_text() -> None:
    memory = Memory(2)
    memory.rows(["a secret"], Counting())
    assert "secret" not in repr(vars(memory))


def test_one_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(InvalidInput, match="list of texts"):
        Memory(2).rows("text", Counting())


def test_a_text_is_read_up_to_the_limit() -> None:
    encode = Counting()
    assert Memory(2).rows(["x" * (LONGEST + 5)], encode) == [LONGEST]


def test_minilm_is_one_instance_a_process_and_knows_meaning() -> None:
    encoder = plugins.build("encoders", "minilm")
    assert encoder is plugins.build("encoders", "minilm", threads=1)
    car, automobile, soup = encoder.encode(["a car", "an automobile", "tomato soup"])
    assert car @ automobile > 0.7 > 0.4 > car @ soup


def test_minilm_agrees_with_the_published_similarities() -> None:
    """The example on the model's page, within what int8 weights change."""
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    first, *others = plugins.build("encoders", "minilm").encode(texts)
    assert np.allclose([first @ other for other in others], [0.695, 0.943, 0.257], atol=0.03)


def test_minilm_reads_no_more_than_its_256_tokens() -> None:
    encoder = plugins.build("encoders", "minilm")
    short, long = encoder.encode(["word " * 254, "word " * 300 + "something else"])
    assert np.abs(short - long).max() < 1e-6


def test_tfidf_knows_spelling_in_any_script() -> None:
    encoder = plugins.build("encoders", "tfidf", dimension=512)
    here, near, far = encoder.encode(["платёж не прошёл", "платежи не прошли", "où est ma carte"])
    assert encoder.dimension == len(here) == 512
    assert here @ near > here @ far + 0.2


@pytest.mark.parametrize(("name", "settings"), [("minilm", {"threads": 0}), ("tfidf", {"dimension": 1})])
def test_settings_out_of_range_are_named(name: str, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        plugins.build("encoders", name, **settings)
