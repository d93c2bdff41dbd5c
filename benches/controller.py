"""The controller against a student that learns, drifts and fails: false promotions, delays, cost and debt.

Request t has a latent difficulty z ~ N(m_t, 1); the served version agrees with probability sigmoid(a + 2 z) and reports
the confidence 0.7 z + sqrt(0.51) e, squeezed into (0, 1) (AUROC about .78). Remote answers agree by definition. A fresh
pair moves what a new version would reach by 1/150 of the way to `limit`; versions are cut when a learning episode has
50, 100, 200 … pairs. 20,000 requests; something changes at 8,000. The naive rule beside it is a rolling mean of 100.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from apprentice import agreement, bounds
from apprentice import confidence as controller
from apprentice.decide import decide, defer
from apprentice.promotion import PATIENCE, Trial
from apprentice.types import Evidence, Source
from benches import Figure, Options, at_least, at_most, run, shown

REQUESTS, CHANGE, THETA = 20_000, 8_000, 0.85
CUTS = (50, 100, 200, 400, 800, 1600, 3200)
NOTICED = {"ALARM", "EMERGENCY", "ANTI_CORRELATED", "TIGHTEN", "COACHING"}

type Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scenario:
    """What changes at CHANGE. `drop` of agreement, at once or over `over` requests; `shift` of the difficulty."""

    limit: float = 0.93
    drop: float = 0.0
    over: int = 0
    shift: float = 0.0
    dim: float = 0.0  # the confidence alone drops, by so many standard deviations
    anti: bool = False


SCENARIOS = {
    "steady_good": Scenario(),
    "drift": Scenario(drop=0.33, over=8000),
    "severe": Scenario(drop=0.33),
    "moderate": Scenario(drop=0.15),
    "visible": Scenario(shift=-2.6),
    "anti": Scenario(anti=True),
    "just_below": Scenario(limit=0.83),
    "just_above": Scenario(limit=0.865),
    "benign": Scenario(dim=1.0),
}


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)), dtype=np.float64)


_POINTS = np.random.default_rng(12).standard_normal((2, 8000))
_INTERCEPTS = np.linspace(-8, 10, 361)
_MEANS = np.array([float(_sigmoid(a + 2 * _POINTS[0]).mean()) for a in _INTERCEPTS])


def _intercept(agreement: float) -> float:
    return float(np.interp(agreement, _MEANS, _INTERCEPTS))


@dataclass
class World:
    """Requests, the student that learns from pairs, and what is true of it."""

    scenario: Scenario
    seed: int
    knowledge: float = 0.40  # agreement of a version that would be trained now
    agreement: float = 0.0  # of the version in force, before `lost`
    lost: float = 0.0
    inverted: bool = False
    born: int = 0
    pairs: int = 0
    cuts: int = 0
    now: int = -1
    difficulty: float = 0.0
    dim: float = 0.0
    _known: dict[tuple[float, float], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng((7, self.seed))
        self.z, noise = rng.standard_normal((2, REQUESTS))
        self.z[CHANGE:] += self.scenario.shift
        self.s = 0.7 * self.z + np.sqrt(0.51) * noise
        self.s[CHANGE:] -= self.scenario.dim
        self.fate, self.coins = rng.random((2, REQUESTS))
        self.confidences = _sigmoid(1.7 * self.s)
        self.intercept = 0.0

    def step(self, now: int) -> None:
        """Go on to request `now`."""
        self.now = now
        scenario = self.scenario
        if now == CHANGE:
            self.dim = scenario.dim
            if scenario.shift:
                self.difficulty = scenario.shift
                self.knowledge = self.agreement = self._reached(self.intercept)
            if scenario.anti:
                self.agreement = self.knowledge = 0.25
                self.inverted = True
            if not scenario.over:
                self._lose(scenario.drop)
            self._place()
        elif scenario.over and CHANGE < now <= CHANGE + scenario.over:
            self._lose(scenario.drop / scenario.over)
            if now % 50 == 0:
                self._place()

    def _lose(self, share: float) -> None:
        self.lost += share
        self.knowledge = max(self.knowledge - share, 0.02)

    def _reached(self, intercept: float) -> float:
        return float(_sigmoid(intercept + 2 * (_POINTS[0] + self.difficulty)).mean())

    def _place(self) -> None:
        self.intercept = _intercept(max(self.agreement - self.lost, 0.02)) - 2 * self.difficulty
        self._known.clear()

    def confidence(self) -> float:
        s = float(self.confidences[self.now])
        return 1 - s if self.inverted else s

    def agrees(self) -> bool:
        chance = 1 / (1 + np.exp(-self.intercept - 2 * self.z[self.now]))
        return bool(self.fate[self.now] < chance)

    def learn(self) -> bool:
        """Another pair; whether a version is due."""
        self.knowledge += (self.scenario.limit - self.knowledge) / 150
        self.pairs += 1
        return self.cuts < len(CUTS) and self.pairs >= CUTS[self.cuts]

    def cut(self) -> list[float]:
        """A new version; its confidences on the last requests."""
        self.cuts += 1
        self.born += 1
        self.agreement, self.lost = self.knowledge, 0.0
        if self.inverted and self.knowledge > 0.5:
            self.inverted = False
        self._place()
        recent = self.confidences[max(0, self.now - 399) : self.now + 1]
        return [float(s) for s in (1 - recent if self.inverted else recent)]

    def episode(self) -> None:
        """A fresh learning episode: versions are cut often again."""
        self.pairs = self.cuts = 0

    def false(self, name: str, quality: float) -> bool:
        """Whether an alarm speaks of something that is not so; `quality` is the true one of what is served."""
        if name == "ANTI_CORRELATED":
            return not self.inverted
        if name == "EMERGENCY":
            return self.agreement - self.lost >= 0.5
        return name == "ALARM" and quality >= THETA

    def quality(self, threshold: float, level: float) -> float:
        """The true agreement of what is served."""
        if level >= 1:
            return 1.0
        key = (threshold, level)
        if key not in self._known:
            z = _POINTS[0] + self.difficulty
            s = _sigmoid(1.7 * (0.7 * z + np.sqrt(0.51) * _POINTS[1] - self.dim))
            s = 1 - s if self.inverted else s
            wrong = 1 - _sigmoid(self.intercept + 2 * z)
            self._known[key] = 1 - float(np.where(s >= threshold, wrong, 0.0).mean())
        return self._known[key]


class Rule(Protocol):
    """Something that decides who answers: the product, or the naive rule."""

    def start(self, version: str, confidences: list[float]) -> None: ...
    def ask(self, has_local: bool, confidence: float, coin: float) -> tuple[bool, Evidence]: ...
    def observe(self, evidence: Evidence) -> list[str]: ...
    def standing(self) -> tuple[float, float]: ...


class Product:
    """The product's own controller, called as the engine calls it."""

    def __init__(self, settings: controller.Settings) -> None:
        self.settings, self.state = settings, controller.State()
        self.now = controller.standing(self.state, settings)

    def start(self, version: str, confidences: list[float]) -> None:
        controller.start_version(self.state, self.settings, version, confidences)
        self.now = controller.standing(self.state, self.settings)

    def ask(self, has_local: bool, confidence: float, coin: float) -> tuple[bool, Evidence]:
        decision = decide(self.now, has_local=has_local, coin=coin)
        decision = defer(decision, confidence, valid=True)
        version = self.now.version if has_local else None
        remote = decision.route != "local"
        served: Source = "remote" if remote else "local"
        return remote, Evidence(
            0, "t", 0.0, version, decision.level, decision.p, decision.audit, confidence, None, served
        )

    def observe(self, evidence: Evidence) -> list[str]:
        names = [seen.name for seen in controller.observe(self.state, self.settings, evidence)]
        self.now = controller.standing(self.state, self.settings, self.now)
        return [str(name) for name in names]

    def standing(self) -> tuple[float, float]:
        return self.now.threshold if self.now.threshold is not None else -1.0, self.now.level


class Naive:
    """The rolling mean of 100 comparisons, as configurations usually have it."""

    def __init__(self, floor: float) -> None:
        self.floor, self.p, self.version, self.serving = floor, 1.0, "", False
        self.window: deque[float] = deque(maxlen=100)

    def start(self, version: str, confidences: list[float]) -> None:
        self.version = version

    def ask(self, has_local: bool, confidence: float, coin: float) -> tuple[bool, Evidence]:
        remote = not self.serving or coin < self.p
        version = self.version if has_local else None
        return remote, Evidence(0, "t", 0.0, version, 0.0, self.p, remote, confidence, None, "remote")

    def observe(self, evidence: Evidence) -> list[str]:
        if evidence.score is None:
            return []
        self.window.append(evidence.score)
        mean = statistics.fmean(self.window)
        if not self.serving:
            if len(self.window) == 100 and mean >= THETA:
                self.serving = True
                return ["CERTIFIED"]
            return []
        self.p = min(max(self.p * (0.97 if mean >= THETA else 1.1), self.floor), 1.0)
        if mean < 0.70:
            self.serving, self.p = False, 1.0
            self.window.clear()
            return ["ALARM"]
        return []

    def standing(self) -> tuple[float, float]:
        return -1.0, 0.0 if self.serving else 1.0


@dataclass
class Outcome:
    """What one simulated run amounted to."""

    remote: float = 0.0
    remote_last_quarter: float = 0.0
    quality: float = 0.0
    below: float = 0.0  # share of the time that the true served quality was below theta
    far_below: float = 0.0  # and below 0.80
    debt: float = 0.0  # disagreements beyond the contract per 10,000 requests
    false_alarms: float = 0.0  # per 10,000
    false_tightens: float = 0.0
    first_false: bool = False
    exposed: bool = False  # the change made what was served fall below theta
    delay: float | None = None


def simulate(rule: Rule, world: World, delay: int) -> Outcome:
    """One run of REQUESTS requests; labels arrive `delay` requests late."""
    out = Outcome()
    due: deque[tuple[int, Evidence, bool]] = deque()
    asked: list[bool] = []
    crossed: int | None = None
    certified = has_local = False
    for now in range(REQUESTS):
        world.step(now)
        threshold, level = rule.standing()
        quality = world.quality(threshold, level) if has_local else 1.0
        out.quality += quality
        if quality < THETA:
            out.below += 1
            out.far_below += quality < 0.80
            out.debt += THETA - quality
            if now >= CHANGE and crossed is None:
                crossed = now
        sure = world.confidence()
        remote, evidence = rule.ask(has_local, sure, float(world.coins[now]))
        asked.append(remote)
        if remote and has_local:
            evidence = evidence._replace(score=float(world.agrees()))
        late = delay if remote else 0
        if late:
            due.append((now + late, evidence, remote))
        arrived: list[tuple[Evidence, bool]] = [] if late else [(evidence, remote)]
        while due and due[0][0] <= now:
            arrived.append(due.popleft()[1:])
        for evidence, pair in arrived:
            for name in rule.observe(evidence):
                truth = world.quality(threshold, level) if has_local else 1.0
                out.false_alarms += world.false(name, truth)
                if name == "TIGHTEN":
                    out.false_tightens += truth >= THETA
                if name in NOTICED:
                    world.episode()
                    if crossed is not None and out.delay is None:
                        out.delay = float(now - crossed)
                if name == "CERTIFIED" and not certified:
                    certified = True
                    out.first_false = world.quality(*rule.standing()) < THETA
                threshold, level = rule.standing()
            if pair and world.learn():
                rule.start(f"v{world.born + 1}", world.cut())
                has_local = True
                threshold, level = rule.standing()
    out.exposed = crossed is not None and crossed < CHANGE + 8500
    tens = REQUESTS / 10_000
    out.remote = sum(asked) / REQUESTS
    out.remote_last_quarter = sum(asked[-REQUESTS // 4 :]) / (REQUESTS // 4)
    out.quality, out.below, out.far_below = (x / REQUESTS for x in (out.quality, out.below, out.far_below))
    out.debt, out.false_alarms, out.false_tightens = (
        x / tens for x in (out.debt, out.false_alarms, out.false_tightens)
    )
    return out


type Job = tuple[str, int, float, int, bool]


def _one(job: Job) -> Outcome:
    name, seed, floor, delay, naive = job
    rule: Rule = Naive(floor) if naive else Product(controller.Settings(theta=THETA, floor=floor))
    return simulate(rule, World(SCENARIOS[name], seed), delay)


@dataclass
class Row:
    """All seeds of one scenario."""

    outcomes: list[Outcome]

    def mean(self, read: Callable[[Outcome], float]) -> float:
        return statistics.fmean(read(outcome) for outcome in self.outcomes)

    @property
    def delays(self) -> list[float]:
        """Requests until what fell below the contract was noticed, sorted; over the runs in which it was."""
        return sorted(o.delay for o in self.outcomes if o.exposed and o.delay is not None)

    def quantile(self, share: float) -> float:
        return _middle(self.delays, share)

    @property
    def detected(self) -> float:
        exposed = sum(o.exposed for o in self.outcomes)
        return len(self.delays) / exposed if exposed else float("nan")


def _rows(jobs: Iterable[tuple[str, float, int, bool]], seeds: int, options: Options) -> list[Row]:
    rows = []
    with ProcessPoolExecutor(max_workers=2) as pool:
        for name, floor, delay, naive in jobs:
            started = time.perf_counter()
            work = [(name, seed, floor, delay, naive) for seed in range(seeds)]
            row = Row(list(pool.map(_one, work, chunksize=max(1, seeds // 8))))
            rows.append(row)
            options.say(_line(f"{'naive' if naive else 'product'} {name} floor {floor:g} delay {delay}", row, started))
    return rows


def _line(title: str, row: Row, started: float) -> str:
    numbers = (
        f"remote {row.mean(lambda o: o.remote):.3f} last {row.mean(lambda o: o.remote_last_quarter):.3f} "
        f"served {row.mean(lambda o: o.quality):.3f} below {row.mean(lambda o: o.below):.4f} "
        f"<.80 {row.mean(lambda o: o.far_below):.4f} debt {row.mean(lambda o: o.debt):.1f} "
        f"delay {row.quantile(0.5):.0f}/{row.quantile(0.95):.0f} ({row.detected:.2f}) "
        f"false {row.mean(lambda o: o.false_alarms):.3f}+{row.mean(lambda o: o.false_tightens):.2f} "
        f"first false {row.mean(lambda o: o.first_false):.3f}"
    )
    return f"{title:<40} {numbers}  [{time.perf_counter() - started:.0f} s]"


# --- figures without a world ------------------------------------------------------------------------------------------


def _audit(score: float, p: float = 1.0, level: float = 1.0) -> Evidence:
    return Evidence(0, "t", 0.0, "v1", level, p, True, None, score, "remote")


def promotion(mean: float, seeds: int) -> list[float]:
    """Audits to the certificate without deferral, of a student that agrees with probability `mean`; inf: over 3000."""
    settings = controller.Settings(theta=THETA)
    found = []
    for seed in range(seeds):
        state = controller.State()
        controller.start_version(state, settings, "v1", [])
        took = float("inf")
        for n, score in enumerate(np.random.default_rng((1, seed)).random(3000) < mean, start=1):
            if controller.observe(state, settings, _audit(float(score))):
                took = float(n)
                break
        found.append(took)
    return sorted(found)


def trials(change: float, seeds: int, together: float) -> list[float]:
    """Audits until a canary that agrees more often by `change` than a champion at .93 is promoted; inf: never.

    Both meet the same difficulty; on a share `together` of the requests they have the same luck, too, as versions have that
    learned mostly from the same rows.
    """
    old, new = _intercept(0.93), _intercept(0.93 + change)
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng((4, seed))
        z = rng.standard_normal(PATIENCE)
        luck, mine, same = rng.random((3, PATIENCE))
        before = luck < _sigmoid(old + 2 * z)
        after = np.where(same < together, luck, mine) < _sigmoid(new + 2 * z)
        trial = Trial("v2", 1)
        for difference in after.astype(float) - before.astype(float):
            if trial.observe(float(difference)) is not None and trial.verdict is not None:
                break
        found.append(float(trial.audits) if trial.verdict == "promote" else float("inf"))
    return sorted(found)


def estimates(seeds: int) -> tuple[float, float, float]:
    """(bias of the audits' mean, bias and rmse of the weighted estimate) at 2 % of 20,000 requests, 20 % deferred."""
    settings = controller.Settings(theta=THETA)
    plain, weighted = [], []
    for seed in range(seeds):
        world = World(SCENARIOS["steady_good"], seed)
        world.agreement = 0.88
        world._place()
        truth = world.quality(-1.0, 0.0)
        state = controller.State()
        controller.start_version(state, settings, "v1", [float(s) for s in _sigmoid(1.7 * _POINTS[1])])
        state.rung = settings.levels.index(0.20)
        tau, audits = state.thresholds[state.rung], []
        for now in range(REQUESTS):
            world.now = now
            sure, audit = world.confidence(), bool(world.coins[now] < 0.02)
            score = float(world.agrees()) if audit or sure < tau else None
            if audit and score is not None:
                audits.append(score)
            row = Evidence(0, "t", 0.0, "v1", 0.20, 0.02, audit, sure, score, "local")
            controller.observe(state, settings, row)
        estimate = agreement.summary(state, settings).detail["agreement_all"]
        plain.append(statistics.fmean(audits) - truth)
        weighted.append(estimate - truth)
    rmse = statistics.fmean(error * error for error in weighted) ** 0.5
    return statistics.fmean(plain), statistics.fmean(weighted), rmse


def missed(seeds: int, audits: int) -> float:
    """Share of runs in which the 95 % bounds miss the mean at any of many looks."""
    wrong = 0
    for seed in range(seeds):
        mean = (0.93, 0.85, 0.60)[seed % 3]
        counts = [0] * (bounds.CELLS + 1)
        for n, hit in enumerate(np.random.default_rng((2, seed)).random(audits) < mean, start=1):
            counts[bounds.CELLS if hit else 0] += 1
            if n < 50 or n % 10 == 0:
                low, high = bounds.interval(counts, counts, 0.05)
                if not low <= mean <= high:
                    wrong += 1
                    break
    return wrong / seeds


def concordance(rho: float, seeds: int, audits: int) -> list[float]:
    """Audits until local and remote numbers, correlated by `rho`, are called anti-correlated; inf: never."""
    settings = controller.Settings(theta=THETA)
    found = []
    for seed in range(seeds):
        one, other = np.random.default_rng((3, seed)).standard_normal((2, audits))
        other = rho * one + np.sqrt(1 - rho * rho) * other
        state = controller.State()
        controller.start_version(state, settings, "v1", [])
        took = float("inf")
        for n in range(audits):
            row = _audit(1.0)._replace(pair=(float(one[n]), float(other[n])))
            if any(seen.name == "ANTI_CORRELATED" for seen in controller.observe(state, settings, row)):
                took = float(n + 1)
                break
        found.append(took)
    return sorted(found)


def hot_path(requests: int) -> float:
    """Microseconds a request spends in observe, standing, decide and defer, in the steady phase."""
    product = Product(controller.Settings(theta=THETA))
    product.start("v1", [i / 400 for i in range(400)])
    rng = np.random.default_rng(5)
    sure, coins = ([float(x) for x in rng.random(requests)] for _ in range(2))
    for _ in range(400):
        product.observe(_audit(1.0)._replace(confidence=0.9))
    spent = []
    for _ in range(5):
        started = time.process_time()
        for s, coin in zip(sure, coins, strict=True):
            remote, evidence = product.ask(True, s, coin)
            product.observe(evidence._replace(score=1.0) if remote else evidence)
        spent.append(time.process_time() - started)
    return min(spent) / requests * 1e6


def _middle(values: Sequence[float], share: float = 0.5) -> float:
    if not values:
        return float("nan")
    return values[min(int(share * len(values)), len(values) - 1)]


def _tests(quick: bool) -> list[Figure]:
    seeds = 25 if quick else 1000
    slack = 1.6 if quick else 1.0
    almost, below = (statistics.fmean(took < float("inf") for took in promotion(mean, seeds)) for mean in (0.849, 0.83))
    good = promotion(0.93, 100 if quick else seeds)
    audit_bias, weighted_bias, rmse = estimates(10 if quick else 200)
    worse, better = (trials(change, 40 if quick else 400, 0.5) for change in (-0.02, 0.02))
    stranger = trials(0.02, 20 if quick else 400, 0.0)
    false = concordance(0.6, 1 if quick else 100, 10_000)
    inverse = concordance(-0.9, 100 if quick else 1000, 1000)
    return [
        at_most("1 promoted at .849 within 3000 peeks", almost, 0.05 * slack, "share"),
        at_most("1 promoted at .83", below, 0.02 * slack, "share"),
        at_most("1 audits to promotion at .93, median", _middle(good), 120, "audits"),
        at_most("1 audits to promotion at .93, p95", _middle(good, 0.95), 300 * (1.1 if quick else 1), "audits"),
        at_most("9 bias of the audits' mean", abs(audit_bias), 0.005 * (1.6 if quick else 1), "score"),
        at_most("9 bias of the weighted estimate", abs(weighted_bias), 0.005 * slack, "score"),
        at_most("9 rmse of the weighted estimate", rmse, 0.013 * (1.2 if quick else 1), "score"),
        at_most("9 anytime miss of the 95 % bounds", missed(15 if quick else 600, 1000), 0.05 * slack, "share"),
        at_most("10 canary promoted although worse by the margin", statistics.fmean(took < float("inf") for took in worse),
                0.05 * slack, "share"),
        at_most("10 audits to promotion of a canary better by .02, p95", _middle(better, 0.95), 700 * slack, "audits"),
        shown("10 the same, of versions that share no luck", _middle(stranger, 0.95), "audits"),
        at_most("11 false anti-correlation per 10k audits at +.6", sum(x < float("inf") for x in false) / len(false),
                0.1 if not quick else 0.25, "events"),
        at_most("11 audits to anti-correlation at -.9, median", _middle(inverse), 45, "audits"),
        shown("time of a request in the controller", hot_path(5_000), "us") if quick
        else at_most("time of a request in the controller", hot_path(100_000), 15, "us"),
    ]  # fmt: skip


QUICK = ("steady_good", "severe", "anti", "just_below")


def measure(options: Options) -> list[Figure]:
    """Every acceptance figure that the controller can be held to by itself."""
    quick = options.quick
    seeds = 3 if quick else 200
    names = QUICK if quick else tuple(SCENARIOS)
    figures = _tests(quick)
    for figure in figures:
        options.say(f"{figure.name}: {figure.value:.4g} {figure.unit} ({figure.bar}) {figure.holds}")
    rows = dict(zip(names, _rows([(name, 0.02, 0, False) for name in names], seeds, options), strict=True))
    figures += _figures(rows, quick)
    if not quick:
        delayed = ("severe", "anti", "visible")
        late = _rows([(name, 0.02, 50, False) for name in delayed], seeds, options)
        figures += [
            at_most(f"8 p95 delay of {name} added by labels 50 late", row.quantile(0.95) - rows[name].quantile(0.95),
                    120, "requests")
            for name, row in zip(delayed, late, strict=True)
        ]  # fmt: skip
        low = _rows([("steady_good", 0.005, 0, False)], seeds, options)[0]
        share = low.mean(lambda o: o.remote_last_quarter)
        figures.append(at_most("3 steady_good, floor .005: remote share of the last quarter", share, 0.025, "share"))
    naive = _rows([(name, 0.02, 0, True) for name in names], 1 if quick else seeds // 4, options)
    for name, row in zip(names, naive, strict=True):
        figures.append(shown(f"naive rule, {name}: remote share", row.mean(lambda o: o.remote), "share"))
        figures.append(shown(f"naive rule, {name}: debt", row.mean(lambda o: o.debt), "per 10k"))
    return figures


def _figures(rows: dict[str, Row], quick: bool) -> list[Figure]:
    wide = 1.8 if quick else 1.0
    figures = []
    for name, row in rows.items():
        near = name.startswith("just")
        first = row.mean(lambda o: o.first_false)
        figures += [
            shown(f"  {name}: remote share", row.mean(lambda o: o.remote), "share"),
            at_most(f"2 {name}: first promotion false", first, 0.09 if quick else 0.03, "share"),
            at_most(f"4 {name}: false alarms", row.mean(lambda o: o.false_alarms), 0.1 * wide, "per 10k"),
        ]
        if near or name == "steady_good":
            tightens = row.mean(lambda o: o.false_tightens)
            figures.append(at_most(f"4 {name}: false tightens", tightens, (5 if near else 1) * wide, "per 10k"))
    steady = rows["steady_good"]
    figures += [
        at_most("3 steady_good: remote share", steady.mean(lambda o: o.remote), 0.10 * (1.1 if quick else 1), "share"),
        at_most("3 steady_good: remote share of the last quarter", steady.mean(lambda o: o.remote_last_quarter),
                0.05 * (1.2 if quick else 1), "share"),
    ]  # fmt: skip
    bars = {"severe": (150, 500), "moderate": (600, 3000), "anti": (60, 220), "visible": (40, 100)}
    for name, (median, late) in bars.items():
        if name in rows:
            figures.append(at_most(f"5 {name}: median delay", rows[name].quantile(0.5), median * wide, "requests"))
            figures.append(at_most(f"5 {name}: p95 delay", rows[name].quantile(0.95), late * wide, "requests"))
    for name in ("severe", "anti"):
        figures.append(at_least(f"5 {name}: detected", rows[name].detected, 0.90 if quick else 0.99, "share"))
    for name, debt in {"severe": 28, "moderate": 33, "anti": 25, "drift": 45, "just_below": 5}.items():
        if name in rows:
            figures.append(at_most(f"6 {name}: debt", rows[name].mean(lambda o: o.debt), debt * wide, "per 10k"))
    if "drift" in rows:
        figures.append(at_most("6 drift: time below .80", rows["drift"].mean(lambda o: o.far_below), 0.035, "share"))
    below = rows["just_below"]
    figures += [
        at_most("7 just_below: remote share", below.mean(lambda o: o.remote), 0.40 * (1.15 if quick else 1), "share"),
        at_least("7 just_below: served quality", below.mean(lambda o: o.quality), 0.88, "score"),
        at_most("7 just_below: time below contract", below.mean(lambda o: o.below), 0.03 * wide, "share"),
    ]
    return figures


if __name__ == "__main__":
    sys.exit(run("controller", measure))
