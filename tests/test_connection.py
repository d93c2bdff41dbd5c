"""Both readers find the same answer in the same bytes, or none, however the bytes come; heads hold what they were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.connection import LONGEST_HEAD, Careful, Head, Reader, Unreadable, head_of
from apprentice.models import _httptools

READERS: list[Callable[[], Reader]] = [Careful, _httptools.Reader]
both = pytest.mark.parametrize("make", READERS, ids=["h11", "httptools"])
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


class Found(NamedTuple):
    head: Head
    body: bytes
    ready: bool


def read(reader: Reader, said: bytes, *, step: int = 2**20, closes: bool = False) -> Found | None:
    """What was found in the bytes that came step by step; None while the answer is not complete, or for none."""
    reader.begin()
    try:
        for place in range(0, len(said), step):
            reader.feed(said[place : place + step])
        if closes:
            reader.end()
    except Unreadable:
        return None
    if not reader.complete:
        return None
    assert reader.head is not None
    return Found(reader.head, b"".join(reader.pieces), reader.is_ready() and not closes)


GOOD: dict[str, tuple[bytes, int, bytes, bool]] = {
    "a length": (OK + b"content-length: 2\r\n\r\n{}", 200, b"{}", True),
    "no body": (OK + b"content-length: 0\r\n\r\n", 200, b"", True),
    "chunks": (CHUNKED + b"1\r\n{\r\n1;x=y\r\n}\r\n0\r\n\r\n", 200, b"{}", True),
    "chunks and trailers": (CHUNKED + b"2\r\n{}\r\n0\r\nx: y\r\n\r\n", 200, b"{}", True),
    "no reason": (b"HTTP/1.1 404 \r\ncontent-length: 2\r\n\r\n{}", 404, b"{}", True),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    "304 with a length": (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", 304, b"", True),
    "after 100": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 2\r\n\r\n{}", 200, b"{}", True),
    "after 103": (b"HTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + OK + b"content-length: 2\r\n\r\n{}", 200, b"{}", True),
    "that closes": (OK + b"connection: close\r\ncontent-length: 2\r\n\r\n{}", 200, b"{}", False),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\n{}", 200, b"{}", False),
    "with more after it": (OK + b"content-length: 2\r\n\r\n{}" + OK, 200, b"{}", False),
    "with a letter after it": (OK + b"content-length: 2\r\n\r\n{}H", 200, b"{}", False),
    "with rubbish after it": (OK + b"content-length: 2\r\n\r\n{}\x00", 200, b"{}", False),
    "with a second one after it": (2 * (OK + b"content-length: 2\r\n\r\n{}"), 200, b"{}", False),
    "with a chunk too many": (CHUNKED + b"2\r\n{}\r\n0\r\n\r\n2\r\n{}\r\n", 200, b"{}", False),
}
BAD: dict[str, bytes] = {
    "two lengths": OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "two lengths in one": OK + b"content-length: 2, 3\r\n\r\n{}",
    "a length with a sign": OK + b"content-length: +2\r\n\r\n{}",
    "a negative length": OK + b"content-length: -2\r\n\r\n{}",
    "a length in hex": OK + b"content-length: 0x2\r\n\r\n{}",
    "a length beyond all": OK + b"content-length: 99999999999999999999999\r\n\r\n{}",
    "a length and chunks": OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks and a length": OK + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "another coding": OK + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "no coding": OK + b"transfer-encoding: identity\r\n\r\n{}",
    "chunked, and not": OK + b"transfer-encoding: chunked, identity\r\n\r\n{}",
    "chunked twice": OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a bad chunk": CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "a chunk that is longer": CHUNKED + b"2\r\n{}X\r\n0\r\n\r\n",
    "a name with a space": OK + b"content-length : 2\r\n\r\n{}",
    "no name": OK + b": x\r\ncontent-length: 2\r\n\r\n{}",
    "no colon": OK + b"x\r\ncontent-length: 2\r\n\r\n{}",
    "a zero byte": OK + b"x: a\x00b\r\ncontent-length: 2\r\n\r\n{}",
    "a lone carriage return": OK + b"x: a\rb\r\ncontent-length: 2\r\n\r\n{}",
    "another protocol": b"SMTP 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    "a protocol that nobody asked for": b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n{}",
    "101 alone": b"HTTP/1.1 101 Switching\r\n\r\n" + OK + b"content-length: 2\r\n\r\n{}",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\ncontent-length: 2\r\n\r\n{}",
    "a status of two digits": b"HTTP/1.1 20 OK\r\ncontent-length: 2\r\n\r\n{}",
    "HTTP/2": b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "TLS": b"\x15\x03\x03\x00\x02\x02\x28",
}


@both
@pytest.mark.parametrize("step", [1, 7, 2**20])
@pytest.mark.parametrize("case", GOOD)
def test_an_answer_is_found_however_it_comes(make: Callable[[], Reader], case: str, step: int) -> None:
    said, status, body, ready = GOOD[case]
    found = read(make(), said, step=step)
    assert found is not None
    assert (found.head.status, found.body, found.ready) == (status, body, ready)


@both
@pytest.mark.parametrize("step", [1, 2**20])
@pytest.mark.parametrize("case", BAD)
def test_what_can_be_read_in_two_ways_is_no_answer(make: Callable[[], Reader], case: str, step: int) -> None:
    assert read(make(), BAD[case], step=step) is None
    assert read(make(), BAD[case], step=step, closes=True) is None


@both
@pytest.mark.parametrize("case", [case for case, good in GOOD.items() if good[3]])
def test_an_answer_cut_anywhere_is_none_and_the_next_one_is_read_from_its_start(
    make: Callable[[], Reader], case: str
) -> None:
    said, status, body, _ = GOOD[case]
    for cut in range(len(said)):
        assert read(make(), said[:cut], closes=True) is None, said[:cut]
    reader = make()
    for _ in range(3):
        found = read(reader, said)
        assert found is not None
        assert (found.head.status, found.body, found.ready) == (status, body, True)


@both
def test_an_answer_without_a_length_ends_with_its_connection(make: Callable[[], Reader]) -> None:
    assert read(make(), OK + b"\r\n{}") is None
    found = read(make(), OK + b"\r\n{}", closes=True)
    assert found is not None
    assert found.body == b"{}"


@both
@pytest.mark.parametrize(
    "endless",
    [
        OK + b"x: " + b"y" * 3 * LONGEST_HEAD,
        OK + b"x: y\r\n" * LONGEST_HEAD,
        CHUNKED + b"2;x=" + b"y" * 3 * LONGEST_HEAD,
        CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * LONGEST_HEAD,
    ],
    ids=["a header", "headers", "a chunk's extension", "trailers"],
)
def test_what_belongs_to_no_body_has_a_longest_length(make: Callable[[], Reader], endless: bytes) -> None:
    reader = make()
    reader.begin()
    with pytest.raises(Unreadable):
        for place in range(0, len(endless), 2**16):
            reader.feed(endless[place : place + 2**16])


@pytest.mark.parametrize("coding", [b"chunked\t", b"chunked \t", b"chunked\t ", b"Chunked\t"])
def test_a_coding_that_one_reader_would_not_see_is_no_answer(coding: bytes) -> None:
    said = OK + b"x: chunked\r\ntransfer-encoding: " + coding + b"\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    for closes in (False, True):
        assert read(_httptools.Reader(), said, closes=closes) is None


@both
def test_headers_are_named_in_lower_case_joined_and_without_space_around(make: Callable[[], Reader]) -> None:
    said = OK + b"X-A:  1\t \r\nx-b:\r\nX-a: \xe9 2\r\nContent-Length: 0\r\n\r\n"
    found = read(make(), said)
    assert found is not None
    assert found.head.headers == {"x-a": "1, é 2", "x-b": "", "content-length": "0"}


@given(st.binary(max_size=200), st.integers(1, 50))
def test_no_bytes_are_an_answer_to_one_reader_and_another_to_the_other(noise: bytes, step: int) -> None:
    for said in (noise, OK + noise, OK + b"content-length: 3\r\n" + noise, CHUNKED + noise):
        found = [read(make(), said, step=step) for make in READERS]
        if None not in found:
            assert found[0] == found[1]


def test_a_head_says_what_it_was_given() -> None:
    head = head_of("POST", "/v1?x=%20", (("host", "a:1"), ("authorization", "Bearer a b"), ("x", "")))
    assert head == b"POST /v1?x=%20 HTTP/1.1\r\nhost: a:1\r\nauthorization: Bearer a b\r\nx: \r\n"


@pytest.mark.parametrize(
    "bad", ["a\r\nx: y", "a\nb", "a\rb", "a\0b", " a", "a ", "a\tb\t", "\x7f", "ü", "a\x85b", "\u2028"]
)
def test_nothing_that_is_given_ends_a_line_of_the_head(bad: str) -> None:
    for method, target, headers in (
        ("GET", "/", (("x", bad),)),
        ("GET", "/", ((bad, "x"),)),
        ("GET", f"/{bad}", ()),
        (bad, "/", ()),
    ):
        with pytest.raises((Unreadable, UnicodeEncodeError)):
            head_of(method, target, headers)
