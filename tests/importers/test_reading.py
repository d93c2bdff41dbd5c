"""What importers share: files of any kind, row by row, and what logs call moments, amounts, tokens and providers."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.errors import ConfigError
from apprentice.importers import (
    LONGEST,
    Unusable,
    asked,
    count,
    csv_rows,
    dollars,
    json_rows,
    moment,
    place_of,
    usage_of,
)
from apprentice.types import Json, Usage

ROWS: list[Json] = [{"a": 1}, {"text": 'Grüße, ] } "quoted" \\', "b": [{"c": []}]}, {"x": "y" * 200_000}, {"z": None}]


def values(path: Path) -> list[Json]:
    return [str(value) if isinstance(value, Unusable) else value for _, value in json_rows(path)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_array_is_read_like_lines_however_it_is_laid_out(
    tmp_path: Path, mark: bytes, indent: int | None, pack: type[bytes]
) -> None:
    path = tmp_path / "log.json"
    path.write_bytes(pack(mark + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode()))
    assert values(path) == ROWS
    assert [place for place, _ in json_rows(path)] == ["row 1", "row 2", "row 3", "row 4"]


def test_one_value_over_several_lines_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"rows": ROWS}, indent=2))
    assert values(path) == [{"rows": ROWS}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, {"a": 2', "is not JSON: the rest of the array is not read"),
        ('[{"a": 1}, {oops}, {"a": 2}]', "is not JSON: the rest of the array is not read"),
        ('[{"a": 1}, {"b": NaN}]', "is not JSON: the rest of the array is not read"),
        ('[{"a": 1}, ' + "[" * 100_000, "is nested too deeply: the rest of the array is not read"),
        ('[{"a": 1}', "is not JSON: the rest of the array is not read"),
    ],
)
def test_an_array_that_breaks_tells_where(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "log.json"
    path.write_text(text)
    assert values(path) == [{"a": 1}, said]


def test_an_array_of_bytes_that_are_no_text_tells_where(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_bytes(b'[{"a": 1},' + b" " * 100_000 + b'{"a": "\xff"}]')
    assert values(path) == [{"a": 1}, "the file is damaged from here on"]


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.text())), max_size=5))
def test_lines_and_arrays_hold_the_same(tmp_path_factory: pytest.TempPathFactory, rows: list[Json]) -> None:
    folder = tmp_path_factory.mktemp("logs")
    (folder / "lines").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "array").write_text(json.dumps(rows))
    assert values(folder / "lines") == values(folder / "array") == rows


@pytest.mark.parametrize("start", [b"", b'{"a": 1}\n', b"[1,"])
def test_a_file_that_grows_without_end_is_read_no_further(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb") as file:
        file.write(start)
        for _ in range(70):
            file.write((b" " if start else b"0") * 2**20)
    assert values(path)[-1] == "the file grows to more than 300 times its size: it is read no further"


def rows_of(path: Path, delimiter: str = ",") -> list[Json]:
    return [str(row) if isinstance(row, Unusable) else row for _, row in csv_rows(path, delimiter)]


def test_a_table_tells_what_is_wrong_with_a_row_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(
        b'\xef\xbb\xbftext, kind\r\n"two\r\nlines",a\r\none cell\r\n\r\na,b,c\r\n\xff\xfe,x\r\n'
        + b'"'
        + b"x" * (LONGEST + 10)
        + b'",y\r\n'
        + b"last,z\r\n"
    )
    assert rows_of(path) == [
        {"text": "two\r\nlines", "kind": "a"},
        "has more or fewer cells than the header",
        "has more or fewer cells than the header",
        "is not UTF-8 text",
        f"is longer than {LONGEST:,} bytes",
        {"text": "last", "kind": "z"},
    ]


def test_a_column_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ConfigError, match="the column 'a' is there twice"):
        rows_of(tmp_path / "log.csv")


def test_a_quote_without_an_end_is_told(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('a,b\n1,2\n"3,4\n' + "5,6\n" * 3)
    assert rows_of(tmp_path / "log.csv")[0] == {"a": "1", "b": "2"}
    assert rows_of(tmp_path / "log.csv")[1:] == ["has more or fewer cells than the header"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1772359200, 1772359200.0),
        (1772359200.25, 1772359200.25),
        ("1772359200", 1772359200.0),
        (1772359200000, 1772359200.0),
        ("1772359200000000000", 1772359200.0),
        ("2026-03-01T10:00:00Z", 1772359200.0),
        ("2026-03-01T12:00:00+02:00", 1772359200.0),
        ("2026-03-01 10:00:00.500000", 1772359200.5),
        ("2026-03-01", 1772323200.0),
        ("yesterday", 0.0),
        ("", 0.0),
        (None, 0.0),
        (True, 0.0),
        (-5, 0.0),
        (math.nan, 0.0),
        (math.inf, 0.0),
        (10**400, 0.0),
        (5_000_000_000, 0.0),  # in 2128
        ("0001-01-01T00:00:00+23:59", 0.0),
        ({"seconds": 1}, 0.0),
    ],
)
def test_moments(value: Json, expected: float) -> None:
    assert moment(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0000285, 29), (0, 0), ("0.002", 2000), (1e-9, 1), (0.1, 100_000), (-1, None), ("free", None), (1e12, None)],
)
def test_amounts_are_whole_micro_dollars_and_never_less_than_told(value: Json, expected: int | None) -> None:
    assert dollars(value) == expected


@pytest.mark.parametrize("value", [None, True, math.nan, math.inf, 10**400, "1e400", [], "NaN"])
def test_what_is_no_amount_is_none(value: Json) -> None:
    assert dollars(value) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), ("12", 12), (0, 0), (-1, None), (1.5, None), (True, None), ("²", None), (10**20, None)],
)
def test_counts(value: Json, expected: int | None) -> None:
    assert count(value) == expected


def test_tokens_are_read_under_any_of_their_names() -> None:
    assert usage_of({"prompt_tokens": 9, "completion_tokens": 2}) == Usage(input_tokens=9, output_tokens=2)
    assert usage_of({"input": "9", "output": 2, "input_cached_tokens": 4}) == Usage(
        input_tokens=9, output_tokens=2, cached_tokens=4
    )
    told = {"input_tokens": 9, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 99}}
    assert usage_of(told) == Usage(input_tokens=9, output_tokens=2, cached_tokens=9)
    nothing: list[Json] = [None, [], {}, {"prompt_tokens": 9}, {"prompt_tokens": -1, "completion_tokens": 2}]
    for useless in nothing:
        assert usage_of(useless) is None


@pytest.mark.parametrize(
    ("provider", "address", "expected"),
    [
        ("openai", "", "openai@"),
        ("OpenAI", "https://api.openai.com/v1", "openai@"),
        ("openai", "http://127.0.0.1:8000/v1", "openai@127.0.0.1"),
        ("gcp.gemini", "", "google@"),
        ("aws.bedrock", "", "aws.bedrock@?"),
        ("azure", "https://acme.openai.azure.com/", "openai@acme.openai.azure.com"),
        ("ollama", "", "ollama@"),
        ("vllm", "gpu.example.com:8000", "vllm@gpu.example.com"),
        ("openai@api.deepseek.com", "", "openai@api.deepseek.com"),
        ("", "https://api.deepseek.com", "?@api.deepseek.com"),
        ("", "", "?@?"),
        ("no such thing\n", "http://[::1", "?@?"),
        ("x" * 100, "evil host", "?@?"),
    ],
)
def test_places(provider: str, address: str, expected: str) -> None:
    assert place_of(provider, address) == expected


def test_a_prompt_is_the_last_message_of_the_user() -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    said = {"role": "assistant", "content": "a"}
    assert asked([system, user]) == ("u", 0)
    assert asked({"messages": [user, said, user]}) == ("u", 2)
    assert asked({"model": "m", "input": "u"}) == ("u", 0)
    assert asked("u") == ("u", 0)
    assert asked({"text": "u", "messages": 3}) == ({"text": "u", "messages": 3}, 0)
    assert asked([{"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]}]) == (
        "uv",
        0,
    )
    assert asked([{"role": "user", "content": [{"type": "text", "arguments": {"a": 1}}]}]) == ({"a": 1}, 0)
    nothing: list[Json] = [[system], [user, said], [], None, "", [{"role": "user", "content": ""}]]
    for useless in nothing:
        with pytest.raises(Unusable):
            asked(useless)
    with pytest.raises(Unusable, match="more than text"):
        asked([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
