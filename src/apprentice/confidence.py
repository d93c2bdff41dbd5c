"""How good the local model is, from scores, with bounds that may be looked at after every request.

Two streams of labels are kept apart. *Audits* are requests that joined a comparison by a coin thrown before the request
was read; only they feed certificates, monitors and sampling. *Deferrals* are requests the local model was unsure of;
they feed reports, with the weight 1/probability, and training. What is bounded is the disagreement that is *served*:
V = (1 - deferred)(1 - score), and the contract is E[V | past] <= 1 - theta.

- Certificate: for each level of deferral a betting supermartingale; it exceeds 1/alpha with probability at most alpha,
  however often it is looked at (Ville; Waudby-Smith & Ramdas, arXiv 2010.09686). Losses are nested over the levels, so
  the most liberal certified level may be taken without a correction.
- Monitors: e-detectors in CUSUM form, with an average run length of at least their threshold in audits (Shin, Ramdas &
  Rinaldo, E-detectors, NEJSDS). M contract, G guard, R trend, E emergency, C coaching, K concordance of numeric
  answers, Q concordance of confidence and score.
- Sampling follows the evidence for and against (after Banerjee & Veeravalli, arXiv 1211.3729), never a rolling mean.

Everything is a function of the sequence of records: no clock, no dice, no input or output.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

from apprentice.bounds import CELLS, interval, middle, tally
from apprentice.config import Sampling, Thresholds
from apprentice.types import Confidence, Evidence, Json, Promotion

type Decay = Literal["exponential", "linear", "step"]
type Name = Literal[
    "ALARM",
    "TIGHTEN",
    "LOOSEN",
    "CERTIFIED",
    "COACHING",
    "EMERGENCY",
    "ANTI_CORRELATED",
    "INPUT_SHIFT",
    "UNVERIFIED",
    "INFEASIBLE",
]

WEALTH_BETS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the certificate; at most 1, so that no factor is negative
MONITOR_BETS = (0.3, 0.7, 1.5, 3.0, 5.0)
CONCORDANCE_BETS = (0.2, 0.5, 1.0, 1.6)
LARGEST = 1e6  # wealth is cut here: smaller wealth is always valid, and no float overflows
STATE_FORMAT = 3


class Observation(NamedTuple):
    """Something that a person may want to know; the engine records it as an Event."""

    name: Name
    message: str
    evidence: dict[str, Json]


@dataclass(slots=True)
class Settings:
    """Everything the controller needs, as plain numbers.

    Raises ValueError, with the name of the field and what it takes, when a number cannot be used.
    """

    theta: float = 0.85  # phase2_to_phase3: agreement that is promised of what is served
    coaching: float = 0.70  # coaching_trigger: agreement of the student below this asks for training and more audits
    emergency: float = 0.50  # emergency_threshold: agreement of the student below this gives everything to the remote
    floor: float = 0.02  # min_floor: no request is audited with a smaller probability
    decay: Decay = "exponential"  # decay_function: how audits thin out while nothing is suspected
    window_size: int = 100  # comparisons in the rolling mean that is shown, and only shown
    trend_sensitivity: float = 0.05  # a drop of 0.4 times this against the version's own mean raises the sampling
    alpha: float = 0.05  # chance that a version is ever certified wrongly; also of the confidence sequence
    levels: tuple[float, ...] = (0.0, 0.05, 0.10, 0.15, 0.20, 0.30, 0.40, 0.50, 0.60, 1.0)
    half_life: float = 60.0  # audits that halve the sampling rate
    carried: float = 360.0  # audits of its predecessor that a new version is credited with in the sampling law, at most
    alarm_at: float = 500.0  # average audits between two false alarms, at least
    guard_at: float = 20.0  # the same for a tightening
    page_at: float = 100.0  # the same for coaching, emergency and anti-correlation
    guard_margin: float = 0.01  # the guard acts this much before the contract is broken
    trend_after: int = 40  # audits before the version has a mean of its own
    trend_memory: float = 300.0  # audits that this mean remembers
    shift_baseline: int = 400  # requests that say what a usual confidence is
    shift_allowance: float = 0.25  # standard deviations that are not counted as a shift
    shift_at: float = 18.0
    burst_rate: float = 0.30  # sampling after a shift of the input, for the next `burst_audits` audits
    burst_audits: int = 80
    expiry_audits: int = 20  # fewer audits than this within the expiry: nothing is known any more
    expiry_requests: float = 1000.0  # or 30/floor, whichever is more
    expiry_days: float = 7.0
    ceiling_margin: float = 0.05  # the remote must agree with itself this much more than is promised
    audits_per_day: float = 5.0  # a slow task is audited at least this often
    wealth_bets: tuple[float, ...] = field(init=False, repr=False)
    contract_bets: tuple[float, ...] = field(init=False, repr=False)
    emergency_bets: tuple[float, ...] = field(init=False, repr=False)
    coaching_bets: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _require(0 < self.theta < 1, "theta (phase2_to_phase3)", self.theta, "between 0 and 1, both excluded")
        _require(0 < self.coaching <= self.theta, "coaching (coaching_trigger)", self.coaching, "in (0, theta]")
        _require(
            0 < self.emergency <= self.coaching, "emergency (emergency_threshold)", self.emergency, "in (0, coaching]"
        )
        _require(0 < self.floor <= 1, "floor (min_floor)", self.floor, "in (0, 1]: without audits nothing is known")
        _require(self.decay in ("exponential", "linear", "step"), "decay", self.decay, "exponential, linear or step")
        _require(self.window_size >= 1, "window_size", self.window_size, "at least 1")
        _require(0 < self.trend_sensitivity < 1, "trend_sensitivity", self.trend_sensitivity, "between 0 and 1")
        _require(0 < self.alpha < 1, "alpha", self.alpha, "between 0 and 1")
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        ends = len(self.levels) >= 2 and self.levels[0] == 0.0 and self.levels[-1] == 1.0
        _require(rising and ends, "levels", self.levels, "rising from 0.0 to 1.0")
        for name in ("half_life", "alarm_at", "guard_at", "page_at", "trend_memory", "shift_at", "expiry_requests"):
            value = getattr(self, name)
            _require(value > 0, name, value, "above 0")
        eps = 1 - self.theta
        self.wealth_bets = WEALTH_BETS
        self.contract_bets = _capped(MONITOR_BETS, eps)
        self.emergency_bets = _capped(MONITOR_BETS, 1 - self.emergency)
        self.coaching_bets = _capped(MONITOR_BETS, 1 - self.coaching)

    @property
    def eps(self) -> float:
        """The served disagreement that the contract allows."""
        return 1 - self.theta

    @property
    def guard_eps(self) -> float:
        """The served disagreement at which the guard acts; never less than half of what is allowed."""
        return max(self.eps - self.guard_margin, self.eps / 2)

    @property
    def expiry(self) -> float:
        """Requests within which `expiry_audits` audits must have arrived."""
        return max(self.expiry_requests, 30 / self.floor)


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def _capped(bets: Sequence[float], eps: float) -> tuple[float, ...]:
    """Bets small enough that no factor 1 + bet (loss - eps) can reach zero."""
    return tuple(min(bet, 0.95 / eps) for bet in bets)


@dataclass(slots=True)
class State:
    """What is known of one task. Small, mutable, and a function of the records folded into it.

    `rung` is the level in force, as an index into `Settings.levels`; the last rung gives everything to the remote.
    """

    version: str | None = None
    promotion: int = 0  # number of the promotion that made it champion
    rung: int = -1
    ranked: bool = False  # the version's confidences rank its answers; without that only levels 0 and 1 can be used
    thresholds: list[float] = field(default_factory=list)  # tau of each level: a confidence below it defers
    certified: bool = False
    verified: bool = True
    drift: Literal["none", "suspected", "alarm"] = "none"
    named: list[str] = field(default_factory=list)  # what was said of this version and is not said again
    requests: int = 0
    labels: int = 0
    audits: int = 0  # of this version
    decayed: float = 0.0  # audits as the sampling law counts them (n_v)
    at: float = 0.0
    gap: float = 0.0  # discounted mean seconds between requests
    recent: list[tuple[int, float]] = field(default_factory=list)  # request number and time of the last audits
    window: list[float] = field(default_factory=list)
    surety: list[float] = field(default_factory=list)  # the confidences that go with `window`
    numbers: list[tuple[float, float]] = field(default_factory=list)  # the last numeric answers (local, remote)
    wealth: list[list[float]] = field(default_factory=list)  # W: a row of bets for each level
    contract: list[float] = field(default_factory=list)  # M
    guard: list[float] = field(default_factory=list)  # G
    trend: list[float] = field(default_factory=list)  # R
    emergency: list[float] = field(default_factory=list)  # E
    coaching: list[float] = field(default_factory=list)  # C
    answers: list[float] = field(default_factory=list)  # K
    ranking: list[float] = field(default_factory=list)  # Q
    answer_pair: tuple[float, float] | None = None  # the audit that waits for its partner in K
    ranking_pair: tuple[float, float] | None = None  # the same in Q
    trend_weight: float = 0.0
    trend_loss: float = 0.0
    trend_audits: int = 0
    low: list[int] = field(default_factory=list)  # audits by score, rounded down
    high: list[int] = field(default_factory=list)  # and up
    shift: float = 0.0
    shift_seen: int = 0
    shift_mean: float = 0.0
    shift_square: float = 0.0
    repeats_low: list[int] = field(default_factory=lambda: [0] * (CELLS + 1))  # the remote against itself, as `low`
    repeats_high: list[int] = field(default_factory=lambda: [0] * (CELLS + 1))  # of all versions: it is about the task
    infeasible: bool = False  # it was said that the remote agrees with itself too little
    burst: int = 0  # audits that are still taken at the burst rate
    seen: list[int] = field(default_factory=list)  # requests by band of confidence
    weight: list[float] = field(default_factory=list)  # their labels, weighted by 1/probability
    hits: list[float] = field(default_factory=list)  # their scores, weighted likewise
    canary: str | None = None  # what is tried out beside it
    trial: list[tuple[float, float]] = field(default_factory=list)  # (rank, score) of its audits

    def to_json(self) -> str:
        """The state as text; `from_json` gives back an equal one, to the last bit of each float."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return json.dumps({"format": STATE_FORMAT, **values}, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> State:
        """The state that `to_json` wrote. Raises ValueError for another format or another shape."""
        found = json.loads(text)
        if not isinstance(found, dict) or found.pop("format", None) != STATE_FORMAT:
            raise ValueError(f"not a controller state of format {STATE_FORMAT}; rebuild it from the records")
        unknown = found.keys() ^ {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"controller state with unexpected or missing fields {sorted(unknown)}")
        found["recent"] = [(int(n), float(t)) for n, t in found["recent"]]
        for name in ("numbers", "trial"):
            found[name] = [(float(one), float(other)) for one, other in found[name]]
        for name in ("answer_pair", "ranking_pair"):
            found[name] = None if found[name] is None else (float(found[name][0]), float(found[name][1]))
        return cls(**found)


# --- a new version ---------------------------------------------------------------------------------------------------


def start_version(state: State, settings: Settings, version: str, confidences: Sequence[float]) -> None:
    """A version became champion: its thresholds are fixed, and evidence about it starts from nothing.

    `confidences` are its confidences on recent requests, in any order, without outcomes; their quantiles are the
    thresholds of the levels. None at all means that the version cannot rank its answers: levels 0 and 1 remain. The
    level in force is kept, because the examination found the version at least as good as the one before; the first
    version starts at level 1.
    """
    last = len(settings.levels) - 1
    first = state.version is None
    state.version = version
    ordered = sorted(confidences)
    state.ranked = bool(ordered)
    middle = [_quantile(ordered, level) if ordered else 2.0 for level in settings.levels[1:-1]]
    state.thresholds = [-1.0, *middle, 2.0]
    if first or (not state.ranked and state.rung != 0):
        state.rung = last
    state.certified = False
    state.verified = True
    state.drift = "none"
    state.named = []
    state.audits = 0
    level = settings.levels[state.rung]
    state.decayed = 0.0 if level >= 1 else min(state.decayed, settings.carried)
    state.recent = [(state.requests, state.at)]
    state.window, state.surety, state.numbers = [], [], []
    _restart(state, settings)
    state.emergency = [1.0] * len(settings.emergency_bets)
    state.coaching = [1.0] * len(settings.coaching_bets)
    state.answers = [1.0] * len(CONCORDANCE_BETS)
    state.ranking = [1.0] * len(CONCORDANCE_BETS)
    state.answer_pair = state.ranking_pair = None
    state.low = [0] * (CELLS + 1)
    state.high = [0] * (CELLS + 1)
    state.burst = 0
    _rebase(state)
    state.seen = [0] * last
    state.weight = [0.0] * last
    state.hits = [0.0] * last


def _quantile(ordered: Sequence[float], level: float) -> float:
    return ordered[min(int(level * len(ordered)), len(ordered) - 1)]


def _restart(state: State, settings: Settings) -> None:
    """Forget the evidence for and against the level: it was about something else."""
    state.wealth = [[1.0] * len(WEALTH_BETS) for _ in settings.levels[:-1]]
    state.contract = [1.0] * len(settings.contract_bets)
    state.guard = [1.0] * len(settings.contract_bets)
    _forget_trend(state, settings)


def _forget_trend(state: State, settings: Settings) -> None:
    state.trend = [1.0] * len(settings.contract_bets)
    state.trend_weight = state.trend_loss = 0.0
    state.trend_audits = 0


def _rebase(state: State) -> None:
    """Learn anew what a usual confidence is."""
    state.shift = state.shift_mean = state.shift_square = 0.0
    state.shift_seen = 0


# --- one record ------------------------------------------------------------------------------------------------------


def observe(state: State, settings: Settings, evidence: Evidence) -> list[Observation]:
    """Fold one record into the state; the same records in the same order give the same state.

    Only audits of the version in force count as evidence; labels of another version are counted and otherwise left to
    training. Returns what became true by this record, each thing once.
    """
    state.requests += 1
    elapsed = evidence.at - state.at
    if elapsed > 0:
        if state.at > 0:
            state.gap += (elapsed - state.gap) / min(state.requests, 200)
        else:
            state.recent = [(number, evidence.at) for number, _ in state.recent]  # nobody knew the time before
        state.at = evidence.at
    score = evidence.score
    if score is not None:
        state.labels += 1
    found: list[Observation] = []
    if evidence.repeat is not None:
        _hear_twice(state, settings, evidence.repeat, found)
    if evidence.audit and evidence.rival is not None and evidence.rival_version == state.canary:
        state.trial.append((_rank(evidence.rival_confidence), evidence.rival))
    if state.version is None or evidence.version != state.version:
        return found
    confidence = evidence.confidence
    rank = _rank(confidence)
    if state.ranked:
        band = bisect_right(state.thresholds, rank) - 1
        state.seen[band] += 1
        if score is not None:
            _report(state, settings, evidence, band, score)
        if confidence is not None:
            _watch_input(state, settings, confidence, found)
    if evidence.audit and score is not None:
        _audit(state, settings, evidence, rank, score, found)
    elif state.rung < len(settings.levels) - 1:
        _expire(state, settings, found)
    return found


def _rank(confidence: float | None) -> float:
    """An answer without a confidence is the least sure, where others have one."""
    return -0.5 if confidence is None else confidence


def _hear_twice(state: State, settings: Settings, repeat: float, found: list[Observation]) -> None:
    """The remote's agreement with itself bounds what any student can reach: nobody agrees better with a noisy remote."""
    tally(state.repeats_low, state.repeats_high, repeat)
    if state.infeasible:
        return
    upper = interval(state.repeats_low, state.repeats_high, settings.alpha)[1]
    if upper < settings.theta + settings.ceiling_margin:
        state.infeasible = True
        ceiling = middle(state.repeats_low, state.repeats_high)
        message = (
            f"the remote agrees with itself on {ceiling:.0%} of the requests, too little for a promise of "
            f"{settings.theta:.0%}: a phase2_to_phase3 of {settings.theta * ceiling:.2f} can be kept"
        )
        found.append(Observation("INFEASIBLE", message, {"ceiling": ceiling, "upper": upper, "theta": settings.theta}))


def _report(state: State, settings: Settings, evidence: Evidence, band: int, score: float) -> None:
    """Count a label for the dashboard, weighted by one over the probability that it was asked for."""
    deferred = band < bisect_right(settings.levels, evidence.level) - 1
    if deferred or evidence.level >= 1:
        share = 1.0
    elif evidence.audit and evidence.p > 0:
        share = 1 / evidence.p
    else:
        return  # asked for by somebody, with a probability that nobody knows
    state.weight[band] += share
    state.hits[band] += share * score


def _watch_input(state: State, settings: Settings, confidence: float, found: list[Observation]) -> None:
    """One-sided CUSUM of the standardised confidence. It needs no label, so it may raise sampling and nothing else."""
    if state.shift_seen < settings.shift_baseline:
        state.shift_seen += 1
        delta = confidence - state.shift_mean
        state.shift_mean += delta / state.shift_seen
        state.shift_square += delta * (confidence - state.shift_mean)
        return
    spread = math.sqrt(state.shift_square / state.shift_seen)
    if spread <= 0:
        return
    state.shift += (state.shift_mean - confidence) / spread - settings.shift_allowance
    if state.shift < 0:
        state.shift = 0.0
    elif state.shift > settings.shift_at:
        state.burst = settings.burst_audits
        detail = {"usual_confidence": state.shift_mean, "version": state.version, "request": state.requests}
        found.append(Observation("INPUT_SHIFT", "the local model is less sure than usual; more is audited", detail))
        _rebase(state)


def _audit(
    state: State, settings: Settings, evidence: Evidence, rank: float, score: float, found: list[Observation]
) -> None:
    """Fold one audit into certificate, monitors and sampling, then act on what they say."""
    state.decayed += 1
    state.burst = max(state.burst - 1, 0)
    state.recent.append((state.requests, state.at))
    if len(state.recent) > settings.expiry_audits:
        del state.recent[0]
        state.verified = True
    if evidence.pair is not None:
        state.numbers.append(evidence.pair)
        del state.numbers[: -settings.window_size]
    _count(state, settings, rank, score)
    if state.rung < len(settings.levels) - 1:
        emergency, contract, guard = _mean(state.emergency), _mean(state.contract), _mean(state.guard)
        if emergency >= settings.page_at and "EMERGENCY" not in state.named:
            _give_back(state, settings, "EMERGENCY", "agreement is below the emergency threshold", emergency, found)
        elif contract >= settings.alarm_at:
            _give_back(state, settings, "ALARM", "served agreement fell below what is promised", contract, found)
        elif guard >= settings.guard_at:
            _tighten(state, settings, "TIGHTEN", "served agreement is close to what is promised", guard, found)
        if (coaching := _mean(state.coaching)) >= settings.page_at and "COACHING" not in state.named:
            state.named.append("COACHING")
            state.burst = settings.burst_audits
            detail = _detail(state, settings, coaching)
            found.append(Observation("COACHING", "agreement is below the coaching trigger; training is due", detail))
    _concord(state, settings, evidence, rank, score, found)
    _grant(state, settings, found)


def _count(state: State, settings: Settings, rank: float, score: float) -> None:
    """Fold what one audit says of the version in force into certificate and monitors; nothing is decided here."""
    loss = min(max(1 - score, 0.0), 1.0)
    state.audits += 1
    state.window.append(1 - loss)
    state.surety.append(rank)
    for shown in (state.window, state.surety):
        del shown[: -settings.window_size]
    tally(state.low, state.high, 1 - loss)
    _fold(state.emergency, settings.emergency_bets, loss - (1 - settings.emergency))
    _fold(state.coaching, settings.coaching_bets, loss - (1 - settings.coaching))
    _bet(state, settings, rank, loss)
    if state.rung < len(settings.levels) - 1:
        served = loss if rank >= state.thresholds[state.rung] else 0.0
        _fold(state.contract, settings.contract_bets, served - settings.eps)
        _fold(state.guard, settings.contract_bets, served - settings.guard_eps)
        _follow(state, settings, served)


def _fold(wealth: list[float], bets: Sequence[float], excess: float) -> float:
    """One step of an e-detector in CUSUM form; its value afterwards, the mean over the bets."""
    total = 0.0
    for i, bet in enumerate(bets):
        value = wealth[i]
        value = (value if value > 1.0 else 1.0) * (1.0 + bet * excess)
        if value > LARGEST:
            value = LARGEST
        wealth[i] = value
        total += value
    return total / len(wealth)


def _bet(state: State, settings: Settings, rank: float, loss: float) -> None:
    """One factor of the certificate for each level that is not in force for certain already."""
    eps = 1 - settings.theta
    last = len(settings.levels) - 1
    highest = min(state.rung + (not state.certified), last)
    if not state.ranked:
        highest = min(highest, 1)
    kept = [1 + bet * eps for bet in WEALTH_BETS]
    lost = [1 + bet * (eps - loss) for bet in WEALTH_BETS]
    thresholds = state.thresholds
    for level in range(highest):
        row = state.wealth[level]
        factors = lost if rank >= thresholds[level] else kept
        for i, factor in enumerate(factors):
            value = row[i] * factor
            row[i] = value if value < LARGEST else LARGEST


def _follow(state: State, settings: Settings, served: float) -> None:
    """The trend: has this version become worse than it was at this level? It raises sampling and nothing else."""
    if state.trend_audits >= settings.trend_after:
        usual = state.trend_loss / state.trend_weight
        error = math.sqrt(usual * (1 - usual) / state.trend_weight)
        limit = min(max(usual + max(0.4 * settings.trend_sensitivity, error), 0.01), settings.eps)
        _fold(state.trend, settings.contract_bets, served - limit)
    keep = 1 - 1 / settings.trend_memory
    state.trend_weight = state.trend_weight * keep + 1
    state.trend_loss = state.trend_loss * keep + served
    state.trend_audits += 1


def _concord(
    state: State, settings: Settings, evidence: Evidence, rank: float, score: float, found: list[Observation]
) -> None:
    """Do numeric answers, and confidence and score, rise together? Pairs do not overlap, so each audit counts once."""
    if evidence.pair is not None:
        if state.answer_pair is None:
            state.answer_pair = evidence.pair
        else:
            against = _against(state.answer_pair, evidence.pair)
            state.answer_pair = None
            value = _fold(state.answers, CONCORDANCE_BETS, against - 0.5)
            if value >= settings.page_at and "answers" not in state.named:
                state.named.append("answers")
                message = "local answers fall where remote ones rise"
                _give_back(state, settings, "ANTI_CORRELATED", message, value, found)
    if state.ranked and evidence.confidence is not None:
        if state.ranking_pair is None:
            state.ranking_pair = (rank, score)
            return
        against = _against(state.ranking_pair, (rank, score))
        state.ranking_pair = None
        value = _fold(state.ranking, CONCORDANCE_BETS, against - 0.5)
        if value >= settings.page_at:
            message = "the local model is surest where it is wrong; deferral is switched off for this version"
            state.ranked = False
            if state.rung > 0:
                _give_back(state, settings, "ANTI_CORRELATED", message, value, found)
            else:
                found.append(Observation("ANTI_CORRELATED", message, _detail(state, settings, value)))


def _against(one: tuple[float, float], other: tuple[float, float]) -> float:
    """1 when the two pairs order their members in opposite ways, 0 when in the same way, 1/2 for a tie."""
    product = (one[0] - other[0]) * (one[1] - other[1])
    return 0.5 if product == 0 else float(product < 0)


def _grant(state: State, settings: Settings, found: list[Observation]) -> None:
    """Take the most liberal level whose certificate is reached, while nothing speaks against it."""
    wanted = len(WEALTH_BETS) / settings.alpha
    top = min(state.rung + (not state.certified), len(settings.levels) - 1)
    if not state.ranked:
        top = min(top, 1)
    for level in range(top):
        if sum(state.wealth[level]) >= wanted:
            break
    else:
        return
    if _mean(state.guard) >= 5 or _mean(state.emergency) >= 5:
        return
    new = not state.certified
    loosened = level < state.rung
    state.certified = True
    state.drift = "none"
    if loosened:
        state.rung = level
        _forget_trend(state, settings)
    share = settings.levels[level]
    name: Name = "CERTIFIED" if new else "LOOSEN"
    message = f"agreement of what is served is certified with {share:.0%} of the requests deferred"
    found.append(Observation(name, message, _detail(state, settings, sum(state.wealth[level]) / len(WEALTH_BETS))))


def _give_back(
    state: State, settings: Settings, name: Name, message: str, value: float, found: list[Observation]
) -> None:
    """Everything goes to the remote again, and evidence starts anew."""
    found.append(Observation(name, message, _detail(state, settings, value)))
    if name == "EMERGENCY":
        state.named.append(name)
    state.rung = len(settings.levels) - 1
    state.certified = False
    state.drift = "alarm"
    state.decayed = 0.0
    _restart(state, settings)


def _tighten(
    state: State, settings: Settings, name: Name, message: str, value: float, found: list[Observation]
) -> None:
    """One level up; without a ranking the only one is the last. Certificate and guard start anew."""
    found.append(Observation(name, message, _detail(state, settings, value)))
    last = len(settings.levels) - 1
    state.rung = min(state.rung + 1, last) if state.ranked else last
    state.certified = False
    state.drift = "suspected"
    state.decayed = min(state.decayed, 120.0) if state.rung < last else 0.0
    contract = state.contract
    _restart(state, settings)
    if state.rung < last:
        state.contract = contract  # whether the contract holds is still the same question


def _expire(state: State, settings: Settings, found: list[Observation]) -> None:
    """A certificate without fresh audits is none: an outage of the remote must not look like health."""
    if not state.verified:
        return
    number, at = state.recent[0]
    if state.requests - number <= settings.expiry and state.at - at <= settings.expiry_days * 86400:
        return
    missing = len(state.recent)
    state.verified = False
    state.recent = [(state.requests, state.at)]
    message = f"only {missing} comparisons of late; the quality of what is served is not verified"
    _tighten(state, settings, "UNVERIFIED", message, float(missing), found)


def _detail(state: State, settings: Settings, value: float) -> dict[str, Json]:
    return {
        "version": state.version,
        "level": settings.levels[state.rung],
        "audits": state.audits,
        "value": round(value, 3),
        "request": state.requests,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- what is read off the state --------------------------------------------------------------------------------------


def sampling_rate(
    *, audits: float, level: float, evidence: float, floor: float, decay: Decay = "exponential", half_life: float = 60.0
) -> float:
    """Probability of an audit of the next request, in [floor, 1], from what is known before it is read.

    `audits` of this version thin it out, `evidence` brings it back: the largest of contract monitor, trend monitor and
    the certificate of the next level. Where one of them is about to decide, audits are worth most: a suspicion is settled
    soon, and a level that is nearly certified is not waited for.

    >>> sampling_rate(audits=0, level=0.0, evidence=1.0, floor=0.02)
    1.0
    >>> sampling_rate(audits=10_000, level=0.0, evidence=5.0, floor=0.02)
    0.5
    """
    if level >= 1:
        return 1.0
    if decay == "exponential":
        thinned = floor + (1 - floor) * 2 ** (-audits / half_life)
    elif decay == "linear":
        thinned = 1 - audits / (6 * half_life)
    else:
        thinned = 2 ** -float(int(audits / half_life))
    doubt = floor * max(1.0, evidence) ** 2
    return min(max(thinned, doubt, floor), 1.0)


def _sampling(state: State, settings: Settings) -> float:
    last = len(settings.levels) - 1
    if state.version is None or state.rung == last:
        return 1.0
    nearly = _mean(state.wealth[state.rung - 1]) if state.rung > 0 else 1.0
    rate = sampling_rate(
        audits=state.decayed,
        level=settings.levels[state.rung],
        evidence=max(_mean(state.contract), _mean(state.trend), nearly),
        floor=settings.floor,
        decay=settings.decay,
        half_life=settings.half_life,
    )
    if state.burst and rate < settings.burst_rate:
        rate = settings.burst_rate
    if rate < 10 * settings.floor and state.requests - state.recent[0][0] > 0.85 * settings.expiry:
        rate = min(10 * settings.floor, 1.0)  # by bad luck alone the certificate must not expire
    slow = settings.audits_per_day * state.gap / 86400  # a share of few requests a day would be next to nothing
    return min(max(rate, slow), 1.0)


def standing(state: State, settings: Settings, before: Confidence | None = None) -> Confidence:
    """What `decide` needs, at the price of a request: no bounds, no detail.

    `before` is what this function said last; most requests change nothing, and then it is said again.
    """
    last = len(settings.levels) - 1
    rate = _sampling(state, settings)
    level = settings.levels[state.rung]
    if before is not None and (before.sampling_rate, before.labels, before.level, before.verified, before.version) == (
        rate,
        state.labels,
        level,
        state.verified,
        state.version,
    ):
        return before  # all the rest changes with a label only
    inner = state.ranked and 0 < state.rung < last
    return Confidence(
        phase="cold_start" if state.version is None else "reinforcement" if state.rung == last else "steady",
        version=state.version,
        level=level,
        threshold=state.thresholds[state.rung] if inner else None,
        sampling_rate=rate,
        certified=state.certified,
        verified=state.verified,
        drift=state.drift,
        audits=state.audits,
        labels=state.labels,
    )


def beside(now: Confidence, version: str, share: float, confidences: Sequence[float]) -> Confidence:
    """The standing while a canary runs. One that cannot rank its answers, where that is needed, serves none alone."""
    inner = now.threshold is not None
    threshold = _quantile(sorted(confidences), now.level) if inner and confidences else None
    able = 0.0 if inner and threshold is None else share
    return now.model_copy(update={"canary": version, "canary_share": able, "canary_threshold": threshold})


# --- for engine and reports ------------------------------------------------------------------------------------------


def settings(thresholds: Thresholds, sampling: Sampling) -> Settings:
    """What a task's configuration means for its controller."""
    return Settings(
        theta=thresholds.phase2_to_phase3,
        coaching=thresholds.coaching_trigger,
        emergency=thresholds.emergency_threshold,
        floor=sampling.min_floor,
        decay=sampling.decay_function,
        window_size=sampling.window_size,
        trend_sensitivity=sampling.trend_sensitivity,
    )


def fold(
    state: State,
    settings: Settings,
    rows: Iterable[Evidence],
    promotions: Sequence[Promotion],
    known: Mapping[str, Sequence[float]],
) -> Iterator[tuple[Evidence, Observation]]:
    """Fold records and promotions of one task, in the order of the store, into its state; yield what became true by each.

    A version starts right after the record that it was promoted after, so that whoever folds the same history has the
    same state. `known`: the confidences of each version on recent inputs (see `start_version`). Promotions that the
    state has seen are passed over.
    """
    waiting = deque(promotion for promotion in promotions if promotion.number > state.promotion)
    for row in rows:
        while waiting and waiting[0].after < row.seq:
            _start(state, settings, waiting.popleft(), known)
        for seen in observe(state, settings, row):
            yield row, seen
    for promotion in waiting:
        _start(state, settings, promotion, known)


def _start(state: State, settings: Settings, made: Promotion, known: Mapping[str, Sequence[float]]) -> None:
    """A version became champion or canary, or is no longer tried out; the champion's evidence is untouched by a trial.

    A canary that becomes champion brings the audits of its trial. They were drawn before anybody read the request, and its
    thresholds were fixed before the first of them, so its certificate holds from there on, whenever the trial ended.
    """
    if made.state == "champion":
        shown = state.trial if state.canary == made.version else []
        start_version(state, settings, made.version, known[made.version])
        for rank, score in shown:
            _count(state, settings, rank, score)
        state.decayed = max(state.decayed, float(len(shown))) if state.rung < len(settings.levels) - 1 else 0.0
    state.canary = made.version if made.state == "canary" else None
    state.trial = []
    state.promotion = made.number
