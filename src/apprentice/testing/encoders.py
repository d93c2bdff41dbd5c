"""What every encoder promises, as checks that a third party runs over its own.

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(my_encoder.build)

Each check is given `build`, which makes the encoder. A broken promise raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from apprentice.errors import ApprenticeError
from apprentice.types import Encoder

type Build = Callable[[], Encoder]
type Check = Callable[[Build], None]

TEXTS = ("my card has not arrived", "where is my card?", "the exchange rate was wrong", "Wo bleibt meine Karte?")
ODD_TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "half \ud83d",
    "\U0001f600",
    "\u202e",
    "\ufdfa" * 10_000,
    "x" * 1_000_000,
    "word " * 200_000,
)
NOISE = 1e-6


def a_text_is_a_row_of_unit_length(build: Build) -> None:
    """float32, `dimension` numbers, length 1; no texts, no rows."""
    encoder = build()
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.dimension)
    assert str(vectors.dtype) == "float32"
    assert abs((vectors * vectors).sum(axis=1) - 1).max() < 1e-5
    assert encoder.encode([]).shape == (0, encoder.dimension)


def a_vector_does_not_depend_on_its_company(build: Build) -> None:
    """Alone, in a batch, in another order, twice: what was trained on is what is served."""
    together = build().encode([*TEXTS, *TEXTS[::-1]])
    for place, text in enumerate(TEXTS):
        alone = build().encode([text])[0]
        assert abs(together[place] - alone).max() < NOISE, text
        assert abs(together[-1 - place] - alone).max() < NOISE, text


def odd_texts_have_vectors_too(build: Build) -> None:
    """Empty, NUL, half a surrogate pair, a character that is spelled out as eighteen, a megabyte: all are of unit length."""
    vectors = build().encode(ODD_TEXTS)
    assert abs((vectors * vectors).sum(axis=1) - 1).max() < 1e-5


def like_texts_are_nearer_than_unlike_ones(build: Build) -> None:
    """The least that a student needs."""
    here, near, far, _ = build().encode(TEXTS)
    assert here @ near > here @ far


def a_lone_text_is_refused(build: Build) -> None:
    """`encode("text")` would be read letter by letter."""
    try:
        build().encode("text")
    except ApprenticeError:
        return
    raise AssertionError("encode took one text for a list of letters")


def threads_may_share_it(build: Build) -> None:
    """Requests are answered in threads."""
    encoder = build()
    texts = [f"{text} {number}" for number in range(20) for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda text: encoder.encode([text])[0], texts))
    alone = build().encode(texts)
    assert max(abs(row - other).max() for row, other in zip(rows, alone, strict=True)) < NOISE


def its_name_says_what_made_the_vectors(build: Build) -> None:
    """A student refuses vectors of another name, so the name has to be there and to stay."""
    assert build().name
    assert build().name == build().name


CHECKS: tuple[Check, ...] = (
    a_text_is_a_row_of_unit_length,
    a_vector_does_not_depend_on_its_company,
    odd_texts_have_vectors_too,
    like_texts_are_nearer_than_unlike_ones,
    a_lone_text_is_refused,
    threads_may_share_it,
    its_name_says_what_made_the_vectors,
)
