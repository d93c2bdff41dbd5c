"""What every verifier promises, as checks that a third party runs over its own.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_contract(check):
        await check(Case(my_verifier.build(), verified=[{"label": "spam"}], refuted=[{"label": 5}]))

A broken promise raises AssertionError.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from apprentice.errors import ApprenticeError
from apprentice.testing.evaluators import hostile
from apprentice.types import Json, Verdict, Verifier


class Case(NamedTuple):
    """A verifier, with answers that it must verify and answers that it must refute."""

    verifier: Verifier
    verified: Sequence[Json]
    refuted: Sequence[Json]


type Check = Callable[[Case], Awaitable[None]]


async def good_answers_are_verified(case: Case) -> None:
    for answer in case.verified:
        verdict = await case.verifier(answer)
        assert verdict.state == "verified", f"{answer!r}: {verdict}"


async def bad_answers_are_refuted_with_evidence(case: Case) -> None:
    for answer in case.refuted:
        verdict = await case.verifier(answer)
        assert verdict.state == "refuted", f"{answer!r}: {verdict}"
        assert verdict.evidence, f"{answer!r} is refuted without a reason"


async def hostile_answers_get_a_verdict_or_an_error_of_ours(case: Case) -> None:
    for answer in hostile(case.verified):
        try:
            verdict = await case.verifier(answer)
        except ApprenticeError:
            continue
        assert isinstance(verdict, Verdict)
        assert len(verdict.evidence) < 10_000, "the evidence repeats the answer"


async def answers_are_left_as_they_are(case: Case) -> None:
    answers = [*case.verified, *case.refuted]
    before = copy.deepcopy(answers)
    for answer in answers:
        await case.verifier(answer)
    assert answers == before, "the verifier changed an answer"


CHECKS: tuple[Check, ...] = (
    good_answers_are_verified,
    bad_answers_are_refuted_with_evidence,
    hostile_answers_get_a_verdict_or_an_error_of_ours,
    answers_are_left_as_they_are,
)
