"""What to do when a task's targets are missed: a ladder of remedies, each measured on the task's own answers where it can be.

The student is taught with nested subsets of the rows that may train and asked about rows that it was not shown. Through its
agreements a curve a - b / n^c is laid, the inverse power law that learning curves follow in text classification (Figueroa,
Zeng-Treitler, Kandula & Ngo, BMC Medical Informatics and Decision Making 12:8, 2012; "Predicting sample size required for
classification performance"); resampled rows say how far to believe it. Nothing is spent, and nothing is kept.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from apprentice import learn, licence, lineage, nearness, plugins, promotion, report, voting
from apprentice.config import Config, Local, TaskConfig
from apprentice.errors import ApprenticeError, ConfigError, TrainingError
from apprentice.request import validated
from apprentice.selection import choose, gold, lawful
from apprentice.shelf import load, ready
from apprentice.types import Answer, Evaluator, Example, Gate, Json, ManyModel, Micros, Seconds, Store, Trainer, Value

ENOUGH = 100  # labels below which a curve says nothing
ROWS = 2000
_SHARES = (0.25, 0.5, 0.75, 1.0)
_FOLDS = 3
_LEAST = 200  # rows that are measured however slow the machine is
_DRAWS = 200  # of the bootstrap
_POWERS = [step / 20 for step in range(2, 41)]  # of n, that the curve may have
_FAR = 100  # times the rows there are: a target beyond is out of reach
_TRIED = 20  # texts that tell how long an encoder would take
_DAY = 86_400.0

State = Literal["reaches", "misses", "unknown"]


class Share(Value):
    """A mean score in [0, 1] with its 95 % interval."""

    value: float
    lower: float
    upper: float


class Point(Value):
    """The student's agreement on rows that it was not shown, after so many examples."""

    examples: int
    agreement: Share


class Curve(Value):
    """agreement = asymptote - b / n^c, through the points."""

    asymptote: Share
    b: float
    c: float
    expected: Share  # with all rows that may train now
    needed: (
        int | None
    )  # examples, all in all, at which the target is reached; None: not within 100 times those there are
    needed_lower: int | None  # of the interval
    needed_upper: int | None


class Rung(Value):
    """One remedy: what it is expected to bring and to cost."""

    remedy: Literal["more data", "another encoder", "full fine-tuning", "an ensemble", "stay with the remote"]
    state: State  # whether the target is expected to be reached
    expected: Share | None  # None: that was not measured here
    change: str  # in the configuration, or what to do
    examples: int = 0  # more of them
    cost: Micros = 0  # of those, at the mean price of an answer
    days: float | None = None  # until they are there, at the pace so far
    seconds: float = 0.0  # of teaching with the rows measured, on this machine
    note: str = ""


class Advice(Value):
    """The ladder of a task, the cheapest rung that reaches the target first named in `take`."""

    task: str
    labels: int
    rows: int  # of them, what may train and was measured
    target: float
    ceiling: float | None  # agreement of the remote with itself, where it was asked twice
    majority: float | None  # agreement of always giving the commonest answer
    curve: Curve | None
    points: list[Point]
    ladder: list[Rung]
    take: str
    why: str


class _Fit(NamedTuple):
    a: float
    b: float
    c: float

    def at(self, n: float) -> float:
        return self.a - self.b / math.pow(n, self.c)

    def needs(self, target: float) -> float:
        """Examples at which the target is reached; infinite where it never is."""
        if self.a <= target:
            return math.inf
        return math.pow(self.b / (self.a - target), 1 / self.c) if self.b > 0 else 1.0


class _Said(NamedTuple):
    """What one student said about each row, by a student that was not shown it, and what that scores."""

    ballots: list[voting.Ballot | None]
    scores: list[float]
    seconds: float  # of the trainings


async def advise(
    config: Config,
    task_name: str,
    store: Store,
    *,
    now: Seconds,
    target: float | None = None,
    rows: int = ROWS,
    limit: Seconds = 60.0,
    seed: int = 0,
) -> Advice:
    """The ladder of a task. Nothing is spent and nothing is written: what is taught here is thrown away.

    `target`: the agreement to reach; without one, the most that the task's gates and thresholds ask for. `rows`: how many
    are measured at most, drawn by their hash. `limit`: seconds after which no further student is tried; where the first
    trainings say that it would be exceeded, fewer rows are measured.
    Raises TrainingError where there is nothing that may train, or the trainer cannot learn it without cost.
    """
    task = config.task(task_name)
    if target is None:
        asked = [gate.bound for gate in map(Gate.parse, task.gates) if gate.metric == "agreement" and gate.at_least]
        target = max([task.confidence_thresholds.phase2_to_phase3, *asked])
    chosen = await choose(config, task, store, await gold(store, task_name))
    permitted, sifted = lawful(config, task, chosen, licence.day(now))
    if not permitted.training:
        reasons = "; ".join(sifted.reasons) or "nothing was recorded yet"
        raise TrainingError(f"task {task_name!r} has no row that may train: {reasons}", hint="`apprentice licence`")
    examples = sorted(permitted.training, key=lambda example: promotion.fingerprint(example.input))
    money = await report.mean_cost(store, task_name)
    known = _Known(
        config=config,
        task=task,
        labels=chosen.labels,
        target=target,
        available=len(examples),
        price=money or 0.0,
        pace=_pace(examples),
        ceiling=(await lineage.standing(config, task, store)).ceiling,
    )
    if chosen.labels < ENOUGH or len(examples) < ENOUGH // 2:
        return _too_few(known)
    return await _Measuring(known, examples[:rows], limit, seed).advice()


class _Known(NamedTuple):
    """What the ladder is computed from, before anything is measured."""

    config: Config
    task: TaskConfig
    labels: int
    target: float
    available: int  # rows that may train
    price: float  # micro-dollars of an answer
    pace: float | None  # examples a day
    ceiling: float | None

    def state(self, expected: float) -> State:
        return "reaches" if expected >= self.target else "misses"

    def more(self, examples: int) -> dict[str, Any]:
        """What so many further examples cost."""
        days = round(examples / self.pace, 2) if self.pace else None
        return {"examples": examples, "cost": round(examples * self.price), "days": days}


def _pace(examples: Sequence[Example]) -> float | None:
    """Examples a day, from the first one to the last; None where that says nothing."""
    moments = [example.at for example in examples]
    over = max(moments) - min(moments)
    return len(examples) / (over / _DAY) if over > 0 else None


def _too_few(known: _Known) -> Advice:
    why = f"{known.labels} answers are recorded; below {ENOUGH} a learning curve says nothing"
    more = Rung(
        remedy="more data",
        state="unknown",
        expected=None,
        change="go on: requests are recorded as they come",
        note=why,
        **known.more(max(ENOUGH - known.labels, ENOUGH // 2 - known.available)),
    )
    return Advice(
        task=known.task.name,
        labels=known.labels,
        rows=known.available,
        target=known.target,
        ceiling=known.ceiling,
        majority=None,
        curve=None,
        points=[],
        ladder=[more, _remote(why)],
        take="more data",
        why=why,
    )


def _remote(note: str = "") -> Rung:
    whole = Share(value=1.0, lower=1.0, upper=1.0)
    change = "nothing: what the local model is not sure of goes on being asked"
    return Rung(remedy="stay with the remote", state="reaches", expected=whole, change=change, note=note)


class _Measuring:
    """Teaches and asks students on a task's rows, in a folder that is gone afterwards."""

    def __init__(self, known: _Known, examples: Sequence[Example], limit: Seconds, seed: int) -> None:
        self._known = known
        self._task = known.task
        self._local = known.task.local or known.config.local
        self._examples = list(examples)
        self._limit = limit
        self._seed = seed
        self._began = time.monotonic()
        name, settings = self._task.evaluator_settings
        self._evaluate: Evaluator = plugins.build("evaluators", name, **settings)

    async def advice(self) -> Advice:
        """Everything that time allows, as a ladder."""
        with tempfile.TemporaryDirectory(prefix="apprentice-advise-") as folder:
            into = Path(folder)
            usual = _settings_of(self._local)
            await self._fit_to_time(usual, into)
            sizes = {share: await self._said(usual, into, share) for share in _SHARES}
            own = sizes[1.0]
            others, skipped = await self._others(into, own)
        points = [Point(examples=self._shown(share), agreement=_share(said.scores)) for share, said in sizes.items()]
        curve = _curve([p.examples for p in points], [s.scores for s in sizes.values()], self._known, self._seed)
        best = max(others.items(), key=lambda other: sum(other[1].scores), default=None)
        voters = {usual.encoder or self._local.fine_tune_backend or "": own, **others}
        together = await self._together(voters)
        ladder = [
            _more_data(curve, self._known),
            self._another(best, own, skipped),
            self._full(),
            *self._voting(together, voters),
            _remote(),
        ]
        first = next(rung for rung in ladder if rung.state == "reaches")
        return Advice(
            task=self._task.name,
            labels=self._known.labels,
            rows=len(self._examples),
            target=self._known.target,
            ceiling=self._known.ceiling,
            majority=await self._majority(),
            curve=curve,
            points=points,
            ladder=ladder,
            take=first.remedy,
            why=_why(first, curve, self._known),
        )

    def _shown(self, share: float) -> int:
        """Rows that a student is taught with."""
        return max(1, round(share * len(self._examples) * (_FOLDS - 1) / _FOLDS))

    async def _fit_to_time(self, usual: _Student, into: Path) -> None:
        """Fewer rows, where a first training says that the whole would take too long."""
        began = time.monotonic()
        shown = self._shown(_SHARES[0])
        await self._answers(usual, into / "first", self._examples[:shown], self._examples[shown : 2 * shown])
        taken = time.monotonic() - began
        whole = taken * _FOLDS * sum(_SHARES) / _SHARES[0]
        if whole > self._limit:
            count = max(_LEAST, int(len(self._examples) * self._limit / whole))
            self._examples = self._examples[:count]

    async def _said(self, student: _Student, into: Path, share: float = 1.0) -> _Said:
        """What the student says about every row, each time after so large a share of the rows of the other folds."""
        ballots: list[voting.Ballot | None] = [None] * len(self._examples)
        scores = [0.0] * len(self._examples)
        began = time.monotonic()
        folds = [group % _FOLDS for group in nearness.groups([row.input for row in self._examples])]
        if len(set(folds)) < _FOLDS:
            raise TrainingError(
                f"the answers of task {self._task.name!r} are nearly all to one and the same input",
                hint="a student can be measured on inputs that it was not taught: ask again when others have come",
            )
        for fold in range(_FOLDS):  # what is nearly the same is in one fold: nobody is asked what he was taught
            asked = [place for place, own in enumerate(folds) if own == fold]
            others = [row for row, own in zip(self._examples, folds, strict=True) if own != fold]
            rows = [self._examples[place] for place in asked]
            answers = await self._answers(student, into / student.name, others[: self._shown(share)], rows)
            for place, answer in zip(asked, answers, strict=True):
                if answer.output is not None:
                    ballots[place] = voting.Ballot(answer.output, answer.confidence)
                scores[place] = await self._score(answer.output, self._examples[place])
        return _Said(ballots, scores, (time.monotonic() - began) / _FOLDS)

    async def _answers(
        self, student: _Student, into: Path, shown: Sequence[Example], asked: Sequence[Example]
    ) -> list[Answer]:
        trainer: Trainer = plugins.build("trainers", student.trainer, **student.settings)
        if hasattr(trainer, "quote") or getattr(trainer, "kind", None) == "reference":
            raise TrainingError(
                f"what {student.trainer!r} trains costs money, and advice spends none",
                hint="ask for advice with a trainer of your own machine configured, such as embedded",
            )
        checkpoint = await asyncio.to_thread(
            trainer.train, self._task.learnable_task, shown, into=into, seed=self._seed
        )
        model = load(self._local, checkpoint.path)
        try:
            await ready(model)
            inputs = [example.input for example in asked]
            if isinstance(model, ManyModel):
                answers = await asyncio.to_thread(model.answer_many, self._task.task, inputs)
            else:
                answers = [await model.answer(self._task.task, given) for given in inputs]
        finally:
            await model.close()
        return [validated(self._task, answer) for answer in answers]

    async def _score(self, output: Json, example: Example) -> float:
        return 0.0 if output is None else (await self._evaluate(output, example.target)).value

    async def _others(self, into: Path, own: _Said) -> tuple[dict[str, _Said], dict[str, str]]:
        """The same student with each other encoder that there is time for; and why others were left out."""
        usual = _settings_of(self._local)
        found: dict[str, _Said] = {}
        skipped: dict[str, str] = {}
        if usual.encoder is None:
            return found, skipped
        texts = [str(example.input) for example in self._examples]
        for name in [name for name in plugins.names("encoders") if name != usual.encoder]:
            try:
                encoder = plugins.build("encoders", name)
                began = time.monotonic()
                await asyncio.to_thread(encoder.encode, texts[:_TRIED])
            except (ConfigError, ImportError):
                skipped[name] = "not installed"
                continue
            takes = (time.monotonic() - began) / len(texts[:_TRIED]) * len(texts) + own.seconds * _FOLDS
            if time.monotonic() - self._began + takes > self._limit:
                skipped[name] = f"would take about {takes:.0f} s"
                continue
            student = usual._replace(name=name, encoder=name, settings={**usual.settings, "encoder": name})
            try:
                found[name] = await self._said(student, into)
            except ApprenticeError as error:
                skipped[name] = str(error)
        return found, skipped

    def _another(self, best: tuple[str, _Said] | None, own: _Said, skipped: Mapping[str, str]) -> Rung:
        left = "; ".join(f"{name} was not measured: {why}" for name, why in skipped.items())
        if best is None:
            change = "local.base_model, or local.fine_tune_settings.encoder"
            return Rung(remedy="another encoder", state="unknown", expected=None, change=change, note=left)
        name, said = best
        expected = _share(said.scores)
        gain = _share([a - b for a, b in zip(said.scores, own.scores, strict=True)], low=-1.0)
        note = f"{gain.value:+.3f} against the present one ({gain.lower:+.3f} to {gain.upper:+.3f}) on the same rows"
        return Rung(
            remedy="another encoder",
            state=self._known.state(expected.value),
            expected=expected,
            change=f"local.fine_tune_settings: {{encoder: {name}}}",
            seconds=round(said.seconds, 2),
            note="; ".join(part for part in (note, left) if part),
        )

    def _full(self) -> Rung:
        """Nobody knows before it was tried; what could do it here is named."""
        generative = [
            name for name in ("huggingface", "unsloth", "axolotl", "mlx") if name in plugins.names("trainers")
        ]
        note = f"trainers here: {', '.join(generative)}" if generative else "no trainer for it is installed here"
        change = (
            "local.backend: llama_cpp, local.base_model of a language model, local.fine_tune_backend: huggingface,"
            " local.fine_tune_settings: {full: true}"
        )
        return Rung(
            remedy="full fine-tuning",
            state="unknown",
            expected=None,
            change=change,
            note=f"not measured: it takes hours and mostly a GPU; {note}",
        )

    async def _together(self, voters: Mapping[str, _Said]) -> tuple[list[str], list[float]] | None:
        """The best two or three students as voters, and what their elections score; None with fewer than two."""
        ranked = sorted(voters, key=lambda name: -sum(voters[name].scores))
        best: tuple[list[str], list[float]] | None = None
        for count in (2, 3):
            names = ranked[:count]
            if len(names) < count:
                break
            scores = []
            for place, example in enumerate(self._examples):
                found = voting.vote([voters[name].ballots[place] for name in names])
                scores.append(await self._score(None if found is None else found.output, example))
            if best is None or sum(scores) > sum(best[1]):
                best = names, scores
        return best

    def _voting(self, together: tuple[list[str], list[float]] | None, voters: Mapping[str, _Said]) -> list[Rung]:
        if together is None:
            return []
        names, scores = together
        best = voters[max(names, key=lambda name: sum(voters[name].scores))]
        gain = _share([a - b for a, b in zip(scores, best.scores, strict=True)], low=-1.0)
        members = ", ".join(f"{{settings: {{encoder: {name}}}}}" for name in names)
        expected = _share(scores)
        return [
            Rung(
                remedy="an ensemble",
                state=self._known.state(expected.value),
                expected=expected,
                change=f"local: {{backend: ensemble, fine_tune_settings: {{members: [{members}]}}}}",
                seconds=round(4 * sum(voters[name].seconds for name in names), 2),  # three folds and the whole
                note=f"{gain.value:+.3f} against its best member ({gain.lower:+.3f} to {gain.upper:+.3f}) on the same rows",
            )
        ]

    async def _majority(self) -> float:
        counts = Counter(learn.canonical(example.target) for example in self._examples)
        usual = next(e.target for e in self._examples if learn.canonical(e.target) == counts.most_common(1)[0][0])
        scores = [await self._score(usual, example) for example in self._examples]
        return sum(scores) / len(scores)


class _Student(NamedTuple):
    """A way to teach. `encoder`: None where the trainer reads no vectors."""

    name: str
    trainer: str
    settings: dict[str, Json]
    encoder: str | None


def _settings_of(local: Local) -> _Student:
    """The configured way. Raises TrainingError where there is none."""
    if local.fine_tune_backend is None:
        raise TrainingError(
            "nothing is configured to train a local model", hint="name one in `local.fine_tune_backend`"
        )
    known = inspect.signature(plugins.find("trainers", local.fine_tune_backend).build).parameters
    encoder = None
    if "encoder" in known:
        encoder = str(local.fine_tune_settings.get("encoder", known["encoder"].default))
    return _Student("usual", local.fine_tune_backend, dict(local.fine_tune_settings), encoder)


# --- curves -----------------------------------------------------------------------------------------------------------


def fitted(sizes: Sequence[float], means: Sequence[float], error: float) -> _Fit:
    """The curve through the points, a within [0, 1] and b never below 0, so that it never falls.

    Least squares for each power of n, rows that lie further off than 1.5 standard errors (`error`) weighing less (P. Huber,
    Robust estimation of a location parameter, 1964); of the powers the one that lies nearest.
    """
    best: tuple[float, _Fit] | None = None
    for c in _POWERS:
        powers = [n**-c for n in sizes]
        weights = [1.0] * len(means)
        for _ in range(3):
            a, b = _line(powers, means, weights)
            off = [abs(y - a + b * x) for x, y in zip(powers, means, strict=True)]
            weights = [1.0 if d <= 1.5 * error else 1.5 * error / d for d in off]
        loss = math.fsum(d * d if d <= 1.5 * error else 1.5 * error * (2 * d - 1.5 * error) for d in off)
        if best is None or loss < best[0] - 1e-12:
            best = loss, _Fit(a, b, c)
    assert best is not None
    return best[1]


def _line(powers: Sequence[float], means: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """a and b of y = a - b x by weighted least squares, within their bounds."""
    total = math.fsum(weights)
    x = math.fsum(w * p for w, p in zip(weights, powers, strict=True)) / total
    y = math.fsum(w * m for w, m in zip(weights, means, strict=True)) / total
    spread = math.fsum(w * (p - x) ** 2 for w, p in zip(weights, powers, strict=True))
    slope = math.fsum(w * (p - x) * (m - y) for w, p, m in zip(weights, powers, means, strict=True)) / spread
    b = max(-slope, 0.0)
    a = y + b * x
    if a > 1:  # through 1 at the far end, and as near to the points as that allows
        a = 1.0
        products = math.fsum(w * p * (a - m) for w, p, m in zip(weights, powers, means, strict=True))
        b = max(products / math.fsum(w * p * p for w, p in zip(weights, powers, strict=True)), 0.0)
    return a, b


def _curve(sizes: Sequence[int], scores: Sequence[Sequence[float]], known: _Known, seed: int) -> Curve:
    """The fitted curve, with intervals from rows drawn again with replacement: the same rows at every size."""
    count = len(scores[0])
    error = max(math.sqrt(_variance(column) / count) for column in scores) or 1e-3

    def fit(places: Sequence[int]) -> _Fit:
        means = [math.fsum(column[place] for place in places) / len(places) for column in scores]
        return fitted(sizes, means, error)

    whole = fit(range(count))
    dice = Random(seed)  # noqa: S311 - a bootstrap keeps no secret
    drawn = [fit(dice.choices(range(count), k=count)) for _ in range(_DRAWS)]
    needs = sorted(found.needs(known.target) for found in drawn)
    return Curve(
        asymptote=_interval(whole.a, [found.a for found in drawn]),
        b=whole.b,
        c=whole.c,
        expected=_interval(whole.at(known.available), [found.at(known.available) for found in drawn]),
        needed=_whole(whole.needs(known.target), known),
        needed_lower=_whole(_quantile(needs, 0.025), known),
        needed_upper=_whole(_quantile(needs, 0.975), known),
    )


def _whole(examples: float, known: _Known) -> int | None:
    return math.ceil(examples) if examples <= _FAR * known.available else None


def _interval(value: float, drawn: Sequence[float]) -> Share:
    ordered = sorted(min(max(found, 0.0), 1.0) for found in drawn)
    value = min(max(value, 0.0), 1.0)
    lower, upper = _quantile(ordered, 0.025), _quantile(ordered, 0.975)
    return Share(value=value, lower=min(lower, value), upper=max(upper, value))


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / len(values)


def _share(values: Sequence[float], low: float = 0.0) -> Share:
    """The mean, with the normal interval of 95 %."""
    mean, away = math.fsum(values) / len(values), 1.96 * math.sqrt(_variance(values) / len(values))
    return Share(value=mean, lower=max(mean - away, low), upper=min(mean + away, 1.0))


def _more_data(curve: Curve, known: _Known) -> Rung:
    if curve.expected.value >= known.target:
        change = "teach again with all that is recorded: `apprentice learn`"
        return Rung(remedy="more data", state="reaches", expected=curve.expected, change=change, note="there is enough")
    if curve.needed is None:
        note = f"the curve ends at {curve.asymptote.value:.3f}, or reaches the target only after {_FAR} times as many"
        change = "no number of examples that is within reach"
        return Rung(remedy="more data", state="misses", expected=curve.asymptote, change=change, note=note)
    most = "it may never" if curve.needed_upper is None else f"{curve.needed_upper:,}"
    note = f"all in all {curve.needed:,} (95 %: {curve.needed_lower or curve.needed:,} to {most})"
    expected = curve.expected.model_copy(
        update={"value": known.target, "upper": max(known.target, curve.expected.upper)}
    )
    more = known.more(curve.needed - known.available)
    return Rung(remedy="more data", state="reaches", expected=expected, change="go on recording", note=note, **more)


def _why(rung: Rung, curve: Curve, known: _Known) -> str:
    now = f"{curve.expected.value:.3f} is expected with the {known.available:,} rows there are; the target is {known.target:g}"
    if rung.remedy == "stay with the remote":
        return f"{now}: nothing that was measured reaches it"
    if rung.remedy == "more data" and rung.examples:
        return f"{now}: {rung.examples:,} more examples reach it"
    return now
