from __future__ import annotations

import pytest

from apprentice import plugins
from apprentice.errors import ConfigError
from apprentice.types import Score

JUDGES = "tests.evaluators.judges"


@pytest.mark.parametrize(
    ("function", "score"),
    [
        ("overlap", Score(value=0.5)),
        ("patient", Score(value=0.25, fields={"tone": 0.25})),
        ("exact", Score(value=0.0)),
    ],
)
async def test_a_function_gives_a_number_or_a_score_sync_or_async(function: str, score: Score) -> None:
    evaluate = plugins.build("evaluators", "custom", function=f"{JUDGES}:{function}")
    assert await evaluate({"a": 1, "b": 2}, {"a": 1, "b": 3}) == score


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("tests.nowhere:f", "'tests.nowhere' cannot be imported"),
        (f"{JUDGES}:overlop", "did you mean 'overlap'"),
        (f"{JUDGES}:NOT_A_FUNCTION", "is not a function"),
        (JUDGES, "module:name"),
        ("os.path; import x:f", "module:name"),
    ],
)
def test_a_function_that_is_not_there_is_a_config_error_that_names_it(function: str, said: str) -> None:
    with pytest.raises(ConfigError, match="function") as caught:
        plugins.build("evaluators", "custom", function=function)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("function", "said"),
    [("percent", "returned 85.0"), ("words", "returned 'good'"), ("unnumbered", "nan"), ("failing", "KeyError")],
)
async def test_a_result_that_is_no_score_is_a_clear_error(function: str, said: str) -> None:
    evaluate = plugins.build("evaluators", "custom", function=f"{JUDGES}:{function}")
    with pytest.raises(ConfigError, match=said):
        await evaluate({"a": 1}, {"a": 1})
