"""PURE: hold-out results -> promote, try out or reject; the trial of a canary; how a task's rows are split.

The hold-out screens: it is used again and again, so it certifies nothing. A trial certifies: a paired e-test on audits that
both versions answered, valid at every moment (Ville; bets as in Waudby-Smith & Ramdas, arXiv 2010.09686).
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from apprentice.types import Evidence, Gate, Json, Promotion, Seconds

HOLDOUT_SHARE = 10  # one input in ten is held out
MARGIN = 0.02  # quality that a version may lose against the champion
PART_MARGIN = 0.05  # the same on the gold rows, in one slice, or in one field
PART_ROWS = 10  # fewer rows than this say nothing about such a part
SLOWER = 2.0  # times the champion's latency, at p50 and at p95
SLOWER_BY: Seconds = 0.010  # and at least this much more
DEARER = 1.1  # times what the champion's answers cost
NARROW = 0.8  # of the diversity of the expected answers
MODE_MARGIN = 0.15  # by which the commonest answer may be commoner than it is among the expected ones
DIVERSITY_ROWS = 200  # fewer held-out rows than this decide nothing about diversity
TWICE = 2  # times the champion's Examples: the hold-out decides

TRIAL_BETS = (0.05, 0.1, 0.2, 0.4, 0.7)
VERDICT_AT = 20.0  # wealth at which a trial ends: wrong with probability 1/20 at most, however often it is looked at
RAMP = ((5.0, 0.50), (2.0, 0.25), (0.0, 0.05))  # from this wealth on the canary has this share
PATIENCE = 3000  # audits after which a trial without a verdict ends


class Screening(NamedTuple):
    """Whether a candidate may take the champion's place, and why, with the numbers that decided it."""

    promote: bool
    reason: str
    candidate: float
    champion: float | None
    n: int
    canary: bool = False  # it may, but has to prove itself beside the champion first


def screen(candidate: Sequence[float], champion: Sequence[float] | None) -> Screening:
    """Promote unless the candidate is worse than the champion by more than two standard errors.

    Both are scores in [0, 1] on the same held-out inputs, in the same order. This only screens: the hold-out is used again
    and again, so it certifies nothing. Quality is certified on the stream, by the new version's own certificate.

    >>> screen([1.0, 1.0, 0.0, 1.0], None).promote
    True
    >>> screen([0.0] * 50, [1.0] * 50).promote
    False
    """
    mean = fmean(candidate) if candidate else 0.0
    if champion is None:
        return Screening(True, "there is no version before it", mean, None, len(candidate))
    if len(candidate) != len(champion):
        raise ValueError("both need a score for each held-out input")
    before = fmean(champion) if champion else 0.0
    differences = [new - old for new, old in zip(candidate, champion, strict=True)]
    if len(differences) < 2:
        return Screening(True, "too few held-out rows to tell them apart", mean, before, len(differences))
    error = stdev(differences) / math.sqrt(len(differences))
    loss = -fmean(differences)
    if loss > 2 * error and loss > 0:
        reason = f"worse than the champion by {loss:.3f} on {len(differences)} held-out rows (allowed: {2 * error:.3f})"
        return Screening(False, reason, mean, before, len(differences))
    return Screening(True, "not worse than the champion on the held-out rows", mean, before, len(differences))


# --- what was measured -----------------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """The held-out rows: what was expected of each, as canonical text, and which of them belong together."""

    expected: Sequence[str]
    slices: Mapping[str, Sequence[int]] = {}  # "channel=mail" -> its rows
    gold: Sequence[int] = ()  # the rows about which a person spoke


class Measured(NamedTuple):
    """What a version did on the held-out rows, in their order."""

    scores: Sequence[float]  # 0 where the answer was invalid
    said: Sequence[str | None]  # the answers as canonical text; None: invalid
    fields: Mapping[str, Sequence[float]] = {}
    latencies: Sequence[Seconds] = ()  # of single answers, on some of the rows
    cost: float = 0.0  # mean, in micro-dollars
    size: int = 0  # bytes


def on(found: Measured, which: Sequence[int]) -> Measured:
    """The same of some of the rows; latencies, cost and size stay those of all."""
    return found._replace(
        scores=[found.scores[row] for row in which],
        said=[found.said[row] for row in which],
        fields={name: [scores[row] for row in which] for name, scores in found.fields.items()},
    )


def measures(found: Measured, rows: HeldOut) -> dict[str, Json]:
    """Everything that was measured, by name; each of METRICS that could be is among them."""
    slices = {name: _mean_of(found.scores, which) for name, which in rows.slices.items()}
    return {
        "n": len(found.scores),
        "agreement": _mean_of(found.scores, range(len(found.scores))),
        "gold_agreement": _mean_of(found.scores, rows.gold),
        "fields": {name: fmean(scores) for name, scores in found.fields.items() if scores},
        "slices": {name: {"n": len(rows.slices[name]), "agreement": mean} for name, mean in slices.items()},
        "json_validity": _mean_of([float(text is not None) for text in found.said], range(len(found.said))),
        **{f"p{share}_latency_ms": _quantile_ms(found.latencies, share / 100) for share in (50, 95, 99)},
        "cost": found.cost,
        "size_mb": found.size / 1e6,
        **diversity([text for text in found.said if text is not None], rows.expected),
    }


def _mean_of(scores: Sequence[float], which: Sequence[int]) -> float | None:
    return fmean(scores[row] for row in which) if which else None


def _quantile_ms(latencies: Sequence[Seconds], share: float) -> float | None:
    ordered = sorted(latencies)
    return 1000 * ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


def diversity(said: Sequence[str], expected: Sequence[str]) -> dict[str, Json]:
    """`diversity` as a ratio to that of what was expected, and the shares of the commonest answers. Empty without rows.

    The effective number of different answers is the Vendi score exp(-sum w ln w) with the identity as its kernel (arXiv
    2210.02410). Where most of what was expected is different, near-copies count, too: then the smaller ratio counts,
    and the other one is the score of order 2, n^2 / sum K_ij^2, with K the share of letter trigrams in common.
    """
    if not said or not expected:
        return {}
    wanted = _effective(expected)
    ratio = _effective(said) / wanted
    if wanted > len(expected) / 2:
        n = min(len(said), len(expected), DIVERSITY_ROWS)  # the score grows with the rows: the same number of both
        ratio = min(ratio, _unlike(said[:n]) / _unlike(expected[:n]))
    return {"diversity": ratio, "mode_share": _mode_share(said), "expected_mode_share": _mode_share(expected)}


def _effective(texts: Sequence[str]) -> float:
    shares = [count / len(texts) for count in Counter(texts).values()]
    return math.exp(-sum(share * math.log(share) for share in shares))


def _unlike(texts: Sequence[str]) -> float:
    grams = [{text[i : i + 3] for i in range(max(len(text) - 2, 1))} for text in texts]
    total = float(len(texts))
    for i, one in enumerate(grams):
        for other in grams[:i]:
            total += 2 * (len(one & other) ** 2 / (len(one) * len(other)))
    return len(texts) ** 2 / total


def _mode_share(texts: Sequence[str]) -> float:
    return Counter(texts).most_common(1)[0][1] / len(texts)


# --- may it be promoted? ---------------------------------------------------------------------------------------------


def judge(
    candidate: Measured,
    champion: Measured | None,
    rows: HeldOut,
    *,
    gates: Iterable[Gate] = (),
    holdout_decides: bool = True,
    frozen: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Screening:
    """Whether the candidate is promoted, tried out beside the champion, or rejected; a refusal names gate and gap.

    What people said comes first: where PART_ROWS rows or more are gold, a candidate that is worse on them by more than a
    part's margin is refused, however much better it is at what models answered.

    `champion`: None where none can answer. `holdout_decides`: little is at stake, or the candidate has seen twice as
    much; otherwise what passes becomes a canary. `frozen`: the scores of both on the frozen hold-out, where the candidate
    may not be worse by more than a part's margin either.
    """
    found = screen(candidate.scores, None if champion is None else champion.scores)
    refusals = [] if champion is None else list(_rows_lost("gold", rows.gold, candidate, champion))
    refusals += [] if found.promote else [found.reason]
    refusals += _gates_missed(measures(candidate, rows), gates)
    refusals += _collapsed(candidate, rows)
    if champion is not None:
        refusals += _parts_lost(candidate, champion, rows)
        refusals += [] if frozen is None else _part_lost("the frozen hold-out", *frozen)
        refusals += _slower_or_dearer(candidate, champion)
    if refusals:
        return found._replace(promote=False, reason="; ".join(refusals))
    return found._replace(canary=champion is not None and not holdout_decides)


def _gates_missed(measured: Mapping[str, Json], gates: Iterable[Gate]) -> Iterator[str]:
    for gate in gates:
        wanted = f"gate {gate.metric} {'>=' if gate.at_least else '<='} {gate.bound:g}"
        value = measured.get(gate.metric)
        if value is None:
            yield f"{wanted}: not measured, for want of held-out rows"
        elif (value < gate.bound) if gate.at_least else (value > gate.bound):
            yield f"{wanted}: it is {value:.4g}, {abs(value - gate.bound):.3g} {'less' if gate.at_least else 'more'}"


def _collapsed(candidate: Measured, rows: HeldOut) -> Iterator[str]:
    said = [text for text in candidate.said if text is not None]
    if min(len(said), len(rows.expected)) < DIVERSITY_ROWS:
        return
    found = diversity(said, rows.expected)
    if found["diversity"] < NARROW:
        yield f"diversity of answers is {found['diversity']:.2f} of what was expected (at least {NARROW:g})"
    more = found["mode_share"] - found["expected_mode_share"]
    if more > MODE_MARGIN:
        yield f"the commonest answer is given {more:.0%} more often than expected (allowed: {MODE_MARGIN:.0%})"


def _parts_lost(candidate: Measured, champion: Measured, rows: HeldOut) -> Iterator[str]:
    for name, which in rows.slices.items():
        yield from _rows_lost(f"slice {name}", which, candidate, champion)
    for name, scores in candidate.fields.items():
        if len(before := champion.fields.get(name, ())) == len(scores):
            yield from _part_lost(f"field {name}", scores, before)


def _rows_lost(part: str, which: Sequence[int], candidate: Measured, champion: Measured) -> Iterator[str]:
    new, old = ([found.scores[row] for row in which] for found in (candidate, champion))
    return _part_lost(part, new, old)


def _part_lost(part: str, new: Sequence[float], old: Sequence[float]) -> Iterator[str]:
    if len(new) < PART_ROWS:
        return
    differences = [after - before for after, before in zip(new, old, strict=True)]
    allowed = max(PART_MARGIN, 2 * stdev(differences) / math.sqrt(len(differences)))
    loss = -fmean(differences)
    if loss > allowed:
        yield f"{part}: worse than the champion by {loss:.3f} on {len(new)} held-out rows (allowed: {allowed:.3f})"


def _slower_or_dearer(candidate: Measured, champion: Measured) -> Iterator[str]:
    new, old = ([_quantile_ms(found.latencies, at) for at in (0.50, 0.95)] for found in (candidate, champion))
    pairs = [
        (after, before) for after, before in zip(new, old, strict=True) if after is not None and before is not None
    ]
    allowed = [max(SLOWER * before, before + 1000 * SLOWER_BY) for _, before in pairs]
    if pairs and all(after > most for (after, _), most in zip(pairs, allowed, strict=True)):
        yield f"latency: p95 is {pairs[1][0]:.1f} ms, the champion's {pairs[1][1]:.1f} (allowed: {allowed[1]:.1f})"
    if candidate.cost > DEARER * champion.cost:
        yield f"cost: {candidate.cost:.1f} micro-dollars an answer, the champion's {champion.cost:.1f}"


def outgrown(labels: int, before: int, champion: int) -> bool:
    """Whether a candidate made now would be the first with twice the champion's Examples, so that the hold-out decides.

    `labels` and `before`: how many there are, and were at the last cycle. A few of them repeat an input.

    >>> outgrown(620, 480, 300), outgrown(620, 615, 300)
    (True, False)
    """
    enough = 1.02 * TWICE * champion
    return before < enough <= labels


# --- a canary --------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Something that a person may want to know of a canary; the engine records it as an Event."""

    name: Literal["CANARY_STEP", "CANARY_PROMOTED", "CANARY_ABORTED"]
    message: str
    evidence: dict[str, Json]


@dataclass(slots=True)
class Trial:
    """A canary beside the champion: is it worse by more than MARGIN?

    With d the canary's score minus the champion's on one audit, `gain` grows while E[d | past] > -MARGIN, and `loss`
    while it is below. Under the contrary each is a supermartingale: the chance that it ever reaches VERDICT_AT is 1/20.
    """

    version: str
    number: int  # of the promotion that began it
    after: int = 0  # the Record after which it began
    audits: int = 0
    difference: float = 0.0  # sum of d
    share: float = RAMP[-1][1]  # of what is served alone
    verdict: Literal["promote", "drop"] | None = None
    gains: list[float] = field(default_factory=lambda: [1.0] * len(TRIAL_BETS))
    losses: list[float] = field(default_factory=lambda: [1.0] * len(TRIAL_BETS))

    @property
    def gain(self) -> float:
        """N, the evidence that it is not worse."""
        return sum(self.gains) / len(self.gains)

    @property
    def loss(self) -> float:
        """H, the evidence that it is."""
        return sum(self.losses) / len(self.losses)

    def observe(self, difference: float) -> Step | None:
        """Fold one audit that both answered, in [-1, 1]; what became true by it. After the verdict nothing changes."""
        if self.verdict is not None:
            return None
        self.audits += 1
        self.difference += difference
        better = difference + MARGIN
        self.gains = [wealth * (1 + bet * better) for wealth, bet in zip(self.gains, TRIAL_BETS, strict=True)]
        self.losses = [wealth * (1 - bet * better) for wealth, bet in zip(self.losses, TRIAL_BETS, strict=True)]
        if self.gain >= VERDICT_AT:
            self.verdict, self.share = "promote", 1.0
            return self._said("CANARY_PROMOTED", f"it is not worse than the champion by more than {MARGIN:g}")
        if self.loss >= VERDICT_AT or self.audits >= PATIENCE:
            self.verdict, self.share = "drop", 0.0
            why = "worse than the champion" if self.loss >= VERDICT_AT else f"no verdict after {PATIENCE} audits"
            return self._said("CANARY_ABORTED", why)
        share = max(self.share, next(share for wealth, share in RAMP if self.gain >= wealth or wealth == 0))
        if share == self.share:
            return None
        self.share = share
        return self._said("CANARY_STEP", f"it answers {share:.0%} of what is served locally")

    def _said(self, name: Literal["CANARY_STEP", "CANARY_PROMOTED", "CANARY_ABORTED"], why: str) -> Step:
        return Step(name, f"{self.version}: {why}", self.numbers())

    def numbers(self) -> dict[str, Json]:
        """As they are shown and recorded."""
        return {
            "version": self.version,
            "audits": self.audits,
            "difference": round(self.difference / self.audits, 4) if self.audits else None,
            "gain": round(self.gain, 3),
            "loss": round(self.loss, 3),
            "share": self.share,
        }


@dataclass(slots=True)
class Ramp:
    """What is tried out in one task: like the controller's state, a function of its records and promotions."""

    trial: Trial | None = None
    number: int = 0  # of the last promotion that was folded

    def fold(self, rows: Iterable[Evidence], promotions: Sequence[Promotion]) -> Iterator[tuple[Evidence, Step]]:
        """Fold records and promotions of one task, in the order of the store; yield what became true by each."""
        waiting = [made for made in promotions if made.number > self.number]
        for row in rows:
            while waiting and waiting[0].after < row.seq:
                self._turn(waiting.pop(0))
            trial = self.trial
            if trial is None or row.seq <= trial.after or row.rival_version != trial.version:
                continue
            if not row.audit or row.rival is None:
                continue
            said = trial.observe(row.rival - (row.score or 0.0))  # a champion without a valid answer scores 0, too
            if said is not None:
                yield row, said
        for made in waiting:
            self._turn(made)

    def _turn(self, made: Promotion) -> None:
        self.number = made.number
        self.trial = Trial(made.version, made.number, made.after) if made.state == "canary" else None


# --- how rows are split ----------------------------------------------------------------------------------------------


def fingerprint(input: Json) -> str:
    """The same for inputs that differ only in case, white space or Unicode form; 64 hex digits.

    >>> fingerprint({"text": "Where is  my card?"}) == fingerprint({"text": "where is my card?"})
    True
    """
    text = json.dumps(_normal(input), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _normal(value: Json) -> Json:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    return [_normal(item) for item in value] if isinstance(value, list) else value


def held_out(print_of_input: str) -> bool:
    """Whether an input of this fingerprint is kept from training: one in ten, for ever, however the data grows."""
    return int(print_of_input[:8], 16) % HOLDOUT_SHARE == 0
