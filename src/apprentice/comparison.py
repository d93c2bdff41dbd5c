"""How good the configured teachers are beside each other: all of them answer the rows about which a person spoke.

Each answers each row twice, so that its agreement with itself is known, and that of every two with each other: no student
agrees better with a teacher than the teacher does. What is found is one event. A switch is proposed, and never made.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, median
from typing import NamedTuple

from pydantic import ValidationError

from apprentice import bounds, feedback, plugins, promotion
from apprentice.calls import Calls
from apprentice.config import Remote, TaskConfig
from apprentice.errors import (
    BudgetError,
    ConfigError,
    DeadlineExceeded,
    InvalidAnswer,
    ModelError,
    ModelRefused,
    PriceUnknown,
    TrainingError,
)
from apprentice.teachers import Ranked, Teachers, fits, worst
from apprentice.types import (
    Answer,
    Attempt,
    Evaluator,
    Hold,
    Json,
    Micros,
    Seconds,
    Store,
    TermsClass,
    Value,
)

LEAST = 30  # rows of gold: fewer tell no two teachers apart
REPEATS = 2  # answers of each teacher to each row
_AT_ONCE = 4  # rows that a teacher has at the same time
_AWAY = 3  # calls one after the other that did not reach a teacher: it is not asked any more
_ALPHA = 0.05


class Measured(Value):
    """One teacher in a comparison. Scores are in [0, 1], by the task's evaluator."""

    role: str
    model: str
    terms: TermsClass
    may_train: bool
    rows: int  # that it answered twice, invalid answers included: they score 0
    quality: float | None = None  # against what people said, with bounds that hold at every moment (95 %)
    lower: float | None = None
    upper: float | None = None
    itself: float | None = None  # agreement of its two answers: nobody can agree better with it
    per_1000: float | None = None  # micro-dollars, retries included
    p50: Seconds | None = None
    cost: Micros = 0
    problem: str | None = None


class Pair(Value):
    """How far two teachers agree: nobody agrees better with both than they do."""

    one: str
    other: str
    rows: int
    agreement: float


class Comparison(Value):
    """All teachers on the same rows. It is kept as the evidence of the event TEACHERS_COMPARED."""

    task: str
    at: Seconds
    rows: int
    teachers: tuple[Measured, ...]
    pairs: tuple[Pair, ...] = ()
    cost: Micros = 0
    proposal: str | None = None  # who should be asked first, instead of `instead_of`
    instead_of: str | None = None
    reason: str = ""
    problem: str | None = None

    @property
    def ceiling(self) -> float | None:
        """The mean agreement of two teachers: what a student of one can reach in the eyes of another. None for one."""
        return fmean(pair.agreement for pair in self.pairs) if self.pairs else None


class Prepared(NamedTuple):
    """A comparison before it is paid for."""

    task: TaskConfig
    gold: list[tuple[Json, Json]]  # inputs, and what people said
    teachers: list[tuple[Ranked, Remote]]
    evaluate: Evaluator
    worst: Micros  # of all calls, without retries


async def last(store: Store, task: str) -> Comparison | None:
    """The last comparison of the task; None where there was none, or one of another version of apprentice."""
    events = await store.events(task, names=["TEACHERS_COMPARED"], limit=1)
    try:
        return Comparison.model_validate(events[0].evidence) if events else None
    except ValidationError:
        return None


def evidence(differences: Sequence[float]) -> float:
    """How much paired differences, each in [-1, 1], speak for a mean above 0: from 20 on it is no noise.

    Where the mean is 0 or less, the chance of 20 and more is 1/20 at most, for any number of rows: the wealth of bets on
    the differences (Ville's inequality; betting as in Waudby-Smith & Ramdas, arXiv 2010.09686).

    >>> evidence([1.0] * 9 + [0.0] * 20) > 20 > evidence([1.0, -1.0] * 50)
    True
    """
    wealth = [math.prod(1 + bet * difference for difference in differences) for bet in promotion.TRIAL_BETS]
    return fmean(wealth)


def propose(
    found: Sequence[Measured], proof: Callable[[Measured, Measured], float]
) -> tuple[Measured, Measured] | None:
    """Who should be asked first, and instead of whom; None where the order is right as far as is known.

    `found` in the configured order; `proof(new, old)`: the evidence that the one's quality is above the other's, which
    has to reach 20 for each rival. The new one has to be better in quality, self-consistency (or be perfect in it) and
    price, all three, and its answers have to be allowed to train.
    """
    able = [one for one in found if one.may_train and one.rows >= LEAST and one.quality is not None]
    first = next((one for one in found if one.may_train), None)
    if first is None or first not in able:
        return None  # there is nothing to compare with
    rivals = [one for one in able if one is not first]
    better = [
        one
        for one in rivals
        if (one.itself or 0.0) > (first.itself or 0.0) or one.itself == 1.0
        if one.per_1000 is not None and first.per_1000 is not None and one.per_1000 < first.per_1000
        if proof(one, first) >= promotion.VERDICT_AT * len(rivals)
    ]
    return (max(better, key=lambda one: one.quality or 0.0), first) if better else None


# --- a comparison -----------------------------------------------------------------------------------------------------


async def prepare(teachers: Teachers, task_name: str, *, rows: int) -> Prepared:
    """A comparison on so many of the rows about which a person spoke, ready to be paid for. Spends nothing.

    The same rows are drawn each time, however many there are. Raises ConfigError with too little gold, without
    teachers, for one whose price is not known, and for an evaluator that cannot compare.
    """
    task = teachers.config.task(task_name)
    ranked = await teachers.listed(task_name)
    if not ranked:
        raise ConfigError("no teacher is configured", hint="name them under `teachers:`, in their order")
    for one in ranked:
        if one.problem:
            raise ConfigError(f"{one.role} teacher {one.model}: {one.problem}", hint=PriceUnknown.hint)
    gold = await _gold(teachers, task)
    if min(len(gold), rows) < LEAST:
        raise ConfigError(
            f"task {task_name!r} has {len(gold)} rows about which a person spoke, and {rows} are wanted; "
            f"fewer than {LEAST} tell no teachers apart",
            hint="correct or approve more answers: apprentice feedback REQUEST_ID --corrected JSON",
        )
    name, settings = task.evaluator_settings
    evaluate: Evaluator = plugins.build("evaluators", name, **settings)
    chosen = gold[:rows]
    for _, target in chosen:
        await _score(evaluate, target, target)  # before anything is spent
    asked = list(zip(ranked, teachers.config.teachers, strict=True))
    async with teachers.asking([remote for _, remote in asked]) as calls:
        inputs = [input for input, _ in chosen]
        most = REPEATS * sum(worst(provider, task, inputs) for provider in calls.providers)
    return Prepared(task, chosen, asked, evaluate, most)


async def compare(teachers: Teachers, prepared: Prepared) -> Comparison:
    """All teachers on the prepared rows, twice each, recorded as TEACHERS_COMPARED; TEACHER_SWITCH_PROPOSED where one
    is better than the first that may label. Nothing is switched.

    The worst case has to fit the caps as a whole before the first call, each call then has its own hold. Raises
    BudgetError before anything is sent; what others take meanwhile cuts it short, and `problem` says so.
    """
    heard = [_Heard() for _ in prepared.teachers]
    stop: list[str] = []
    async with contextlib.AsyncExitStack() as opened:
        asked = [await opened.enter_async_context(teachers.asking([remote])) for _, remote in prepared.teachers]
        await _check_room(teachers, asked[0], prepared)
        each = zip(asked, heard, prepared.teachers, strict=True)
        await _all(_hear(calls, one, remote, prepared, stop) for calls, one, (_, remote) in each)
    found = await _compared(prepared, heard, teachers.clock())
    found = found.model_copy(update={"problem": stop[0] if stop else None})
    await _say_compared(teachers, found)
    return found


async def _gold(teachers: Teachers, task: TaskConfig) -> list[tuple[Json, Json]]:
    """Inputs and what people said of them, in an order that has nothing to do with either."""
    found: dict[str, tuple[Json, Json]] = {}
    for request_id, word in feedback.current(await teachers.store.corrections(task.name)).items():
        record = await teachers.store.record(request_id)
        if record is not None and fits(task, record.input) and _fits_output(task, word.target):
            found[promotion.fingerprint(record.input)] = (record.input, word.target)
    return [found[key] for key in sorted(found)]


async def _check_room(teachers: Teachers, calls: Calls, prepared: Prepared) -> None:
    """Raise BudgetError unless the caps have room for the worst case of the whole: booked in one hold, and given back."""

    def hold_of(at: Seconds, windows: tuple[str, ...]) -> Hold:
        return Hold(
            attempt_id=teachers.new_id(),
            task=prepared.task.name,
            purpose="judge",
            model="all teachers",
            worst=prepared.worst,
            windows=windows,
            at=at,
        )

    hold = await calls.purse.reserve(prepared.task, hold_of)
    await calls.purse.settle(hold, 0, state="released")


async def _hear(calls: Calls, heard: _Heard, remote: Remote, prepared: Prepared, stop: list[str]) -> None:
    """One teacher's answers to all rows, some rows at a time, until it is away or the money is gone."""
    rows = iter(enumerate(prepared.gold))

    async def some() -> None:
        for number, (input, _) in rows:
            given: list[Answer | None] = []
            while len(given) < REPEATS and not stop and heard.problem is None:
                until = asyncio.get_running_loop().time() + 2 * remote.timeout
                try:
                    given.append(
                        await calls.ask(prepared.task, input, purpose="judge", deadline=until, attempts=heard.attempts)
                    )
                    heard.away = 0
                except BudgetError as error:
                    stop.append(str(error))
                except (InvalidAnswer, ModelRefused):
                    given.append(None)
                    heard.away = 0
                except (ModelError, DeadlineExceeded) as error:
                    heard.away += 1
                    if heard.away >= _AWAY:
                        heard.problem = f"{type(error).__name__}: {error}"
                    break
            if len(given) == REPEATS:
                heard.answers[number] = (given[0], given[1])

    await _all(some() for _ in range(_AT_ONCE))


async def _all(work: Iterable[Coroutine[None, None, None]]) -> None:
    """Do all of it at the same time; what one raises is raised when the others have ended, and so settled their calls."""
    for failed in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(failed, BaseException):
            raise failed


async def _say_compared(teachers: Teachers, found: Comparison) -> None:
    ceiling = f"; they agree with each other on {found.ceiling:.1%}" if found.ceiling is not None else ""
    each = ", ".join(f"{one.model} {one.quality:.1%}" for one in found.teachers if one.quality is not None)
    message = f"on {found.rows:,} rows of gold: {each or 'nobody answered'}{ceiling}"
    await teachers.say("TEACHERS_COMPARED", found.task, message, found.model_dump(mode="json"))
    if found.proposal is not None:
        told: dict[str, Json] = {"proposal": found.proposal, "instead_of": found.instead_of}
        await teachers.say("TEACHER_SWITCH_PROPOSED", found.task, found.reason, told)


@dataclass(slots=True)
class _Heard:
    """What one teacher said in a comparison: two answers a row, None where one was of no use."""

    answers: dict[int, tuple[Answer | None, Answer | None]] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    away: int = 0  # rows in a row that it could not be reached for
    problem: str | None = None


def _fits_output(task: TaskConfig, output: Json) -> bool:
    try:
        task.validate_output(output)
    except InvalidAnswer:
        return False
    return True


# --- what a comparison comes to ---------------------------------------------------------------------------------------


async def _score(evaluate: Evaluator, one: Json, other: Json) -> float:
    try:
        return (await evaluate(one, other)).value
    except Exception as error:  # an evaluator may be anybody's
        raise TrainingError(
            f"the task's evaluator cannot compare: {type(error).__name__}: {error}", hint="correct the evaluator"
        ) from error


async def _agreement(evaluate: Evaluator, one: Answer | None, other: Answer | None) -> float:
    return 0.0 if one is None or other is None else await _score(evaluate, one.output, other.output)


async def _compared(prepared: Prepared, heard: Sequence[_Heard], at: Seconds) -> Comparison:
    """What the answers come to."""
    scores: list[dict[int, float]] = []
    found: list[Measured] = []
    for (ranked, _), one in zip(prepared.teachers, heard, strict=True):
        of_rows = {
            number: fmean(
                [
                    0.0 if answer is None else await _score(prepared.evaluate, answer.output, prepared.gold[number][1])
                    for answer in both
                ]
            )
            for number, both in one.answers.items()
        }
        itself = [await _agreement(prepared.evaluate, *both) for both in one.answers.values()]
        scores.append(of_rows)
        found.append(_measured(ranked, one, list(of_rows.values()), itself))
    pairs = []
    for here, there in combinations(range(len(found)), 2):
        common = sorted(heard[here].answers.keys() & heard[there].answers.keys())
        firsts = [(heard[here].answers[row][0], heard[there].answers[row][0]) for row in common]
        if agreed := [await _agreement(prepared.evaluate, *both) for both in firsts]:
            pair = {"one": found[here].model, "other": found[there].model}
            pairs.append(Pair(**pair, rows=len(agreed), agreement=fmean(agreed)))

    def proof(new: Measured, old: Measured) -> float:
        ours, theirs = (scores[next(n for n, one in enumerate(found) if one is which)] for which in (new, old))
        common = sorted(ours.keys() & theirs.keys())
        return evidence([ours[row] - theirs[row] for row in common]) if len(common) >= LEAST else 0.0

    comparison = Comparison(
        task=prepared.task.name,
        at=at,
        rows=len(prepared.gold),
        teachers=tuple(found),
        pairs=tuple(pairs),
        cost=sum(one.cost for one in found),
        reason="no teacher is better than the first one that may label in quality, self-consistency and price, all three",
    )
    if (better := propose(found, proof)) is None:
        return comparison
    return comparison.model_copy(
        update={"proposal": better[0].model, "instead_of": better[1].model, "reason": _reason(*better)}
    )


def _measured(ranked: Ranked, heard: _Heard, scores: list[float], itself: list[float]) -> Measured:
    cost = sum(attempt.cost for attempt in heard.attempts)
    known = Measured(
        role=ranked.role,
        model=ranked.model,
        terms=ranked.terms,
        may_train=ranked.may_train,
        rows=len(scores),
        cost=cost,
        problem=heard.problem,
    )
    if not scores:
        return known
    low, high = [0] * (bounds.CELLS + 1), [0] * (bounds.CELLS + 1)
    for score in scores:
        bounds.tally(low, high, score)
    lower, upper = bounds.interval(low, high, _ALPHA)
    latencies = [answer.latency for both in heard.answers.values() for answer in both if answer is not None]
    return known.model_copy(
        update={
            "quality": fmean(scores),
            "lower": lower,
            "upper": upper,
            "itself": fmean(itself),
            "per_1000": 1000 * cost / (REPEATS * len(scores)),
            "p50": median(latencies) if latencies else None,
        }
    )


def _reason(new: Measured, old: Measured) -> str:
    def told(one: Measured) -> str:
        price = (one.per_1000 or 0.0) / 1e6
        return f"{one.quality:.1%} right, {one.itself:.1%} with itself, ${price:.4f} a thousand"

    return (
        f"{new.model} ({told(new)}) is better than {old.model} ({told(old)}) in all three on {new.rows:,} rows of gold: "
        "put it first under `teachers:` if you agree"
    )
