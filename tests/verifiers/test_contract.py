"""Every file in verifiers/ keeps the promises of a verifier; a new file is found by itself and needs a row here."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from apprentice import plugins
from apprentice.testing.verifiers import CHECKS, Case, Check
from apprentice.types import Json

TICKET = {
    "type": "object",
    "properties": {"label": {"enum": ["spam", "ham"]}, "score": {"type": "integer", "minimum": 0}},
    "required": ["label"],
    "additionalProperties": False,
}


class Row(NamedTuple):
    settings: dict[str, Any]
    verified: list[Json]
    refuted: list[Json]


ROWS = {
    "schema": Row(
        {"schema": TICKET},
        verified=[{"label": "spam", "score": 3}, {"label": "ham"}],
        refuted=[{}, {"label": "eggs"}, {"label": "spam", "score": -1}, {"label": "spam", "more": 1}, [], None, "spam"],
    )
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", plugins.names("verifiers"))
async def test_contract(name: str, check: Check) -> None:
    assert name in ROWS, f"add a row for {name!r}: settings, and answers that it verifies and refutes"
    settings, verified, refuted = ROWS[name]
    await check(Case(plugins.build("verifiers", name, **settings), verified, refuted))
