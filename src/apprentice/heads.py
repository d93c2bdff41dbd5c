"""What the embedded student learns on top of vectors: one head a field of the output.

A category (a string, a truth value, an enumeration, an integer that takes few values) is learned by multinomial
logistic regression, a number by ridge regression, a list of categories by one logistic regression a category. Two things
help a category with few examples, and each is used only where it does no harm out of fold. Its weights start at, and
are drawn towards, the vector of its name: a label that says what it means ("card_arrival") is half learned before the
first example. And how often a category was seen is taken out of the scores, in whole or half (A. Menon et al.,
Long-tail learning via logit adjustment, ICLR 2021): three examples or six are chance where there are 77 categories.

Confidence of a field, from four signs: how far the answer stands before the second best (the margin of probability),
how near the input lies to the middle of the answer's examples, by how much nearer than to the middle of any other
category's, and how frequent the answer is. The last three are for categories only; an input unlike all examples is near
no middle. A logistic regression on out-of-fold answers weighs them (with the margin alone it is Platt scaling: J. Platt,
Probabilistic outputs for support vector machines, 1999), so that a field which cannot be known does not hide one which
can. Raw confidence of an answer: the product over its fields. The table `calibration` in the manifest turns it into a
chance of agreement. What each of these brings: docs/log.md.

Nothing here reads a clock or throws dice. A label that was never seen is never predicted.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from apprentice.errors import CannotLearn, ConfigError, MissingExtra, TrainingError
from apprentice.fields import ABSENT, Field, symbol_of, text_of
from apprentice.types import Json

try:
    import numpy as np
    from scipy.optimize import minimize
except ModuleNotFoundError as error:
    raise MissingExtra("scikit-learn" if error.name == "scipy" else "numpy", "embedded") from error

type Vectors = Any  # a float32 array of n rows
type Encode = Callable[[Sequence[str]], Vectors]

_VALUE = "*"  # symbol of a field that another head fills in; no JSON text either
_PULL = 12.0  # how far a category's weights start out along its name; 10 to 15 did best on banking77, 30 worse
_EVEN = (1.0, 0.5, 0.0)  # how much of the categories' frequency is taken out of the scores
_BESIDE, _STEEP = 3, 10.0  # what a choice says beside its margin; cosines are small beside log-odds
_FEW = 10  # integers with at most so many distinct values are learned as categories
_FREE_DISTINCT, _FREE_SHARE, _FREE_ROWS = 200, 0.5, 100  # a string more varied than this is no category
_NEAR = 0.05  # a number agrees with another within this share of the range seen; an integer when it is equal

# --- linear models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """Scores: one column a class. float32, as it is saved, so that a loaded one answers alike."""

    weights: Any
    bias: Any

    def scores(self, vectors: Vectors) -> Any:
        return (vectors @ self.weights + self.bias).astype(np.float64)


type Loss = Callable[[Any], tuple[float, Any]]  # scores (changed in place) -> loss, gradient of the scores


def _descend(
    vectors: Vectors, weights: Any, columns: int, c: float, loss: Loss, start: Any = None, begin: Linear | None = None
) -> Linear:
    """Least of the weighted loss + |W - start|^2 / 2c. Products in float32: twice as fast and as good (measured).

    `begin`: where to look first; the loss is convex, so a good guess saves time and changes little else.
    """
    shape = (vectors.shape[1], columns)
    size = shape[0] * shape[1]
    first = np.zeros(shape) if start is None else start.astype(np.float64)
    across = np.ascontiguousarray(vectors.T)
    total = float(weights.sum())

    def objective(flat: Any) -> tuple[float, Any]:
        matrix = flat[:size].reshape(shape)
        scores = vectors @ matrix.astype(np.float32) + flat[size:].astype(np.float32)
        value, gradient = loss(scores)
        distance = matrix - first
        slope = np.concatenate([(across @ gradient + distance / c).ravel(), gradient.sum(axis=0)])
        return (value + 0.5 / c * float((distance * distance).sum())) / total, slope / total

    guess = Linear(first, np.zeros(columns)) if begin is None else begin
    flat = np.concatenate([guess.weights.ravel(), guess.bias]).astype(np.float64)
    # A gradient of 1e-4 gives the same answers as 1e-5 in half the time (banking77, 2,000 rows: 0.3 s).
    found = minimize(objective, flat, jac=True, method="L-BFGS-B", options={"maxiter": 200, "gtol": 1e-4}).x
    return Linear(found[:size].reshape(shape).astype(np.float32), found[size:].astype(np.float32))


def _one_of(
    vectors: Vectors, which: Any, weights: Any, columns: int, c: float, start: Any = None, begin: Linear | None = None
) -> Linear:
    rows, light = np.arange(len(which)), weights.astype(np.float32)

    def loss(scores: Any) -> tuple[float, Any]:
        scores -= scores.max(axis=1, keepdims=True)
        chosen = scores[rows, which].copy()
        np.exp(scores, out=scores)
        sums = scores.sum(axis=1, keepdims=True)
        value = float((weights * (np.log(sums[:, 0]) - chosen)).sum())
        scores /= sums
        scores[rows, which] -= 1
        scores *= light[:, None]
        return value, scores

    return _descend(vectors, weights, columns, c, loss, start, begin)


def _each_of(vectors: Vectors, members: Any, weights: Any, c: float, begin: Linear | None = None) -> Linear:
    light, members = weights.astype(np.float32)[:, None], members.astype(np.float32)

    def loss(scores: Any) -> tuple[float, Any]:
        value = float((weights[:, None] * (np.logaddexp(0, scores) - members * scores)).sum())
        return value, (_sigmoid(scores) - members) * light

    return _descend(vectors, weights, members.shape[1], c, loss, None, begin)


def _softmax(scores: Any) -> Any:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _sigmoid(scores: Any) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * scores))  # does not overflow


# --- heads ------------------------------------------------------------------------------------------------------------


class Guess(NamedTuple):
    """A field's symbols, and how sure the head is of each, in [0, 1], not yet weighed."""

    symbols: list[str]
    sure: Any
    beside: Any = 0.0  # what else speaks for it: three numbers a row, or nothing

    def evidence(self) -> Any:
        """Four numbers a row, of which the first is the log-odds of `sure`."""
        rows = np.empty((len(self.sure), 1 + _BESIDE))
        rows[:, 0], rows[:, 1:] = _odds(self.sure), self.beside
        return rows


@dataclass(frozen=True)
class Choice:
    """One of the symbols seen. With a single one there are no weights, and n examples make it sure to n / (n + 1).

    `centres`: the direction in which a symbol's examples lie, and as bias how frequent it is (log; 0 is the average).
    """

    symbols: tuple[str, ...]
    linear: Linear | None
    seen: float
    centres: Linear | None = None

    def guess(self, vectors: Vectors) -> Guess:
        if self.linear is None:
            return Guess([self.symbols[0]] * len(vectors), np.full(len(vectors), self.seen / (self.seen + 1)))
        chances = _softmax(self.linear.scores(vectors))
        ordered, best = np.partition(chances, -2, axis=1), chances.argmax(axis=1)
        said, margins = [self.symbols[place] for place in best], ordered[:, -1] - ordered[:, -2]
        return Guess(said, margins) if self.centres is None else Guess(said, margins, self._beside(vectors, best))

    def _beside(self, vectors: Vectors, best: Any) -> Any:
        """How frequent the answer is, how near its centre lies, and by how much nearer than that of any other."""
        assert self.centres is not None
        near, rows = vectors @ self.centres.weights, np.arange(len(best))
        own = near[rows, best]
        near[rows, best] = -np.inf
        signs = np.empty((len(best), _BESIDE), near.dtype)
        signs[:, 0], signs[:, 1], signs[:, 2] = self.centres.bias[best], _STEEP * own, _STEEP * (own - near.max(axis=1))
        return signs

    def evened(self, share: float) -> Choice:
        """The same with so much of the symbols' frequency taken out of the scores."""
        if self.linear is None or self.centres is None or not share:
            return self
        bias = self.linear.bias - np.float32(share) * self.centres.bias
        return replace(self, linear=Linear(self.linear.weights, bias))


@dataclass(frozen=True)
class Number:
    """A number within the range seen. `near` says, from out-of-sample residuals, how likely it is near enough."""

    linear: Linear
    near: Choice
    low: float
    high: float
    digits: int
    step: float | None

    def values(self, vectors: Vectors) -> list[float]:
        raw = np.clip(self.linear.scores(vectors)[:, 0], self.low, self.high)
        return [_rounded(float(value), self.digits, self.step, self.low, self.high) for value in raw]

    def guess(self, vectors: Vectors) -> Guess:
        symbols, sure, _ = self.near.guess(vectors)
        towards = np.where(np.array(symbols) == "true", 1.0, -1.0)
        values = [int(value) if self.digits == 0 else value for value in self.values(vectors)]
        return Guess([text_of(value) for value in values], 0.5 + 0.5 * towards * sure)


@dataclass(frozen=True)
class Several:
    """The list of those symbols that are more likely in than out, as many as the schema allows."""

    symbols: tuple[str, ...]
    linear: Linear
    bounds: tuple[int, int]

    def guess(self, vectors: Vectors) -> Guess:
        chances = _sigmoid(self.linear.scores(vectors))
        texts = []
        for row in chances:
            count = int(min(max((row > 0.5).sum(), self.bounds[0]), self.bounds[1]))
            chosen = np.sort(np.argsort(-row, kind="stable")[:count])
            texts.append("[" + ",".join(self.symbols[place] for place in chosen) + "]")
        return Guess(texts, np.abs(2 * chances - 1).min(axis=1) if self.symbols else np.ones(len(vectors)))


@dataclass(frozen=True)
class Head:
    """What answers one field: a choice of symbols, and for a number or a list what fills in the value."""

    field: Field
    choice: Choice
    value: Number | Several | None
    weighing: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 0.0)  # of its evidence; the last is the offset
    grown: tuple[float, float] | None = None  # how far along the names it started, how much frequency was taken out

    def guess(self, vectors: Vectors) -> Guess:
        guess = self.choice.guess(vectors)
        if self.value is None:
            return guess
        filled = self.value.guess(vectors)
        open_ = [symbol == _VALUE for symbol in guess.symbols]
        symbols = [b if o else a for a, b, o in zip(guess.symbols, filled.symbols, open_, strict=True)]
        return Guess(symbols, np.where(open_, _both(self.choice, guess.sure, filled.sure), guess.sure))

    def near(self, symbol: str, other: str) -> bool:
        """Whether two symbols agree: equal categories, the same list in any order, numbers that are near enough."""
        if symbol == other or not isinstance(self.value, Number | Several) or {symbol, other} & {ABSENT, "null"}:
            return symbol == other
        if isinstance(self.value, Several):
            return sorted(map(symbol_of, json.loads(symbol))) == sorted(map(symbol_of, json.loads(other)))
        away = abs(json.loads(symbol) - json.loads(other))
        return bool(away <= _tolerance(self.field, self.value.low, self.value.high) + 1e-9)

    def confidence(self, evidence: Any) -> Any:
        return _sigmoid(evidence @ np.array(self.weighing[:-1]) + self.weighing[-1])

    def evened(self, share: float) -> Head:
        return replace(self, choice=self.choice.evened(share))


def _both(choice: Choice, presence: Any, filled: Any) -> Any:
    return filled if choice.linear is None else presence * filled


def _odds(sure: Any) -> Any:
    """log((1 + m) / (1 - m)): for two classes the log-odds of the more likely one; 0 for no margin at all."""
    sure = np.minimum(np.maximum(sure, 0), 1 - 1e-6)
    return np.log1p(sure) - np.log1p(-sure)


def _tolerance(field: Field, low: float, high: float) -> float:
    return 0.5 if field.kind == "integer" else _NEAR * (high - low)


def _rounded(value: float, digits: int, step: float | None, low: float, high: float) -> float:
    if step:
        value = round(value / step) * step
    return min(max(round(value, digits), low), high)


# --- fitting ----------------------------------------------------------------------------------------------------------


def fit(
    field: Field,
    vectors: Vectors,
    symbols: Sequence[str],
    weights: Any,
    *,
    encode: Encode,
    c: float,
    pull: float,
    before: Head | None = None,
) -> Head:
    """A head that is not weighed yet. `pull`: how far categories start out along their names, 0 for not at all.

    `before`: a head that knows most of it; it saves time.
    """
    known = None if before is None else before.choice
    same = len(set(symbols)) == 1
    if field.kind == "category" or same or (field.kind == "integer" and _few(symbols)):
        choice = _choice(vectors, symbols, weights, encode, c, pull, known)
        return Head(field, replace(choice, centres=_centres(choice, vectors, symbols, weights, encode, pull)), None)
    kept = [symbol if symbol in (ABSENT, "null") else _VALUE for symbol in symbols]
    choice = _choice(vectors, kept, weights, encode, c, 0.0, known)
    full = np.array([symbol == _VALUE for symbol in kept])
    if not full.any():
        return Head(field, choice, None)
    values = [json.loads(symbol) for symbol, is_full in zip(symbols, full, strict=True) if is_full]
    if field.kind != "list":
        return Head(field, choice, _number(field, vectors[full], values, weights[full], c))
    several = before.value if before is not None and isinstance(before.value, Several) else None
    return Head(field, choice, _several(field, vectors[full], values, weights[full], c, several))


def _few(symbols: Sequence[str]) -> bool:
    return len(set(symbols) - {ABSENT, "null"}) <= _FEW


def _choice(
    vectors: Vectors,
    symbols: Sequence[str],
    weights: Any,
    encode: Encode,
    c: float,
    pull: float,
    before: Choice | None = None,
) -> Choice:
    known = tuple(sorted(set(symbols)))
    seen = float(weights.sum())
    if len(known) == 1:
        return Choice(known, None, seen)
    place = {symbol: index for index, symbol in enumerate(known)}
    which = np.array([place[symbol] for symbol in symbols])
    start = pull * _name_vectors(known, encode).T if pull else None
    begin = None
    if before is not None and before.linear is not None:
        begin = _carried(before.linear, before.symbols, known, start)
    return Choice(known, _one_of(vectors, which, weights, len(known), c, start, begin), seen)


def _carried(linear: Linear, symbols: Sequence[str], known: Sequence[str], start: Any = None) -> Linear:
    """Its columns in another order; one that it lacks begins where it would without it, one too many is left behind."""
    weights = np.zeros((linear.weights.shape[0], len(known))) if start is None else start.astype(np.float64)
    bias = np.zeros(len(known))
    place = {symbol: index for index, symbol in enumerate(symbols)}
    for column, symbol in enumerate(known):
        if symbol in place:
            weights[:, column] = linear.weights[:, place[symbol]]
            bias[column] = linear.bias[place[symbol]]
    return Linear(weights, bias)


def _centres(
    choice: Choice, vectors: Vectors, symbols: Sequence[str], weights: Any, encode: Encode, pull: float
) -> Linear | None:
    """The name of a symbol, where names are believed, counts as one example of it."""
    if choice.linear is None:
        return None
    place = {symbol: index for index, symbol in enumerate(choice.symbols)}
    member = np.zeros((len(symbols), len(place)), np.float32)
    member[np.arange(len(symbols)), [place[symbol] for symbol in symbols]] = weights
    middle = vectors.T @ member + (_name_vectors(choice.symbols, encode).T if pull else np.float32(0))
    often = np.maximum(member.sum(axis=0), 1)
    lengths = np.maximum(np.linalg.norm(middle, axis=0), 1e-9)
    return Linear((middle / lengths).astype(np.float32), np.log(often / often.mean()).astype(np.float32))


def _name_vectors(symbols: Sequence[str], encode: Encode) -> Any:
    """Vectors of what the labels say: `card_arrival` and `CardArrival` are read as card arrival."""
    names = [json.loads(symbol) if symbol.startswith('"') else symbol for symbol in symbols]
    words = [re.sub(r"(?<=[a-z])(?=[A-Z])|[_\W]+", " ", name) for name in names]
    return encode(words)


def _number(field: Field, vectors: Vectors, values: Sequence[float], weights: Any, c: float) -> Number:
    target = np.array(values, np.float64)
    low, high = float(target.min()), float(target.max())
    digits = 0 if all(isinstance(value, int) for value in values) else max(1, *map(_decimals, values))
    linear, errors = _ridge(vectors, target, weights)
    hits = ["true" if abs(error) <= _tolerance(field, low, high) + 1e-9 else "false" for error in errors]
    near = _choice(vectors, hits, weights, _no_names, c / 10, 0.0)
    return Number(linear, near, low, high, digits, field.step)


def _no_names(_: Sequence[str]) -> Vectors:
    raise TrainingError("hits and misses have no names")


def _decimals(value: float) -> int:
    return min(6, len(f"{value:.6f}".rstrip("0").partition(".")[2]))


def _ridge(vectors: Vectors, target: Any, weights: Any) -> tuple[Linear, Any]:
    """Ridge regression at the best of three strengths, and the residual of each row had it not been seen (exact)."""
    share = weights / weights.sum()
    middle, mean = share @ vectors, float(share @ target)
    root = np.sqrt(weights)[:, None]
    inner = (vectors - middle).astype(np.float64) * root
    aim = (target - mean) * root[:, 0]
    gram = inner.T @ inner
    best: tuple[float, Any, Any] | None = None
    for strength in (0.1, 1.0, 10.0):
        solved = np.linalg.solve(gram + strength * np.eye(len(gram)), np.column_stack([inner.T @ aim, inner.T]))
        slope = solved[:, 0]
        leverage = np.einsum("ij,ji->i", inner, solved[:, 1:]) + share
        errors = (aim - inner @ slope) / np.maximum(1 - leverage, 1e-6) / root[:, 0]
        loss = float(share @ errors**2)
        if best is None or loss < best[0]:
            best = (loss, slope, errors)
    assert best is not None
    _, slope, errors = best
    bias = np.array([mean - middle @ slope], np.float32)
    return Linear(slope.astype(np.float32)[:, None], bias), errors


def _several(
    field: Field, vectors: Vectors, values: Sequence[list[Json]], weights: Any, c: float, before: Several | None
) -> Several:
    seen = {symbol_of(item) for value in values for item in value}
    known = tuple(symbol for symbol in field.choices or sorted(seen) if symbol in seen)
    if not known:  # all lists are empty
        return Several((), Linear(np.empty((vectors.shape[1], 0), np.float32), np.empty(0, np.float32)), field.bounds)
    members = np.array([[symbol in set(map(symbol_of, value)) for symbol in known] for value in values])
    begin = None if before is None else _carried(before.linear, before.symbols, known)
    linear = _each_of(vectors, members, weights, c, begin)
    return Several(known, linear, field.bounds)


def weigh(evidence: Any, right: Any, weights: Any) -> tuple[float, ...]:
    """Weights of the evidence (a row of log-odds first, of which more is never worse), then the offset.

    Logistic regression; few rows move it little from trusting the log-odds as they are. With one column it is Platt's.
    """
    full = np.column_stack([evidence, np.ones(len(evidence))])
    trust = np.eye(full.shape[1])[0]

    def objective(found: Any) -> tuple[float, Any]:
        scores = full @ found
        error = (_sigmoid(scores) - right) * weights
        away = found - trust
        value = float((weights * (np.logaddexp(0, scores) - right * scores)).sum() + 0.5 * (away @ away))
        return value, error @ full + away

    bounds = [(0.05, 20.0)] + [(-10.0, 10.0)] * (full.shape[1] - 1)
    return tuple(map(float, minimize(objective, trust, jac=True, method="L-BFGS-B", bounds=bounds).x))


# --- the student: all heads together ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Student:
    """One head a field, in the schema's order."""

    heads: tuple[Head, ...]

    def answers(self, vectors: Vectors) -> list[tuple[Json, float]]:
        """An output that fits the schema, and a raw confidence in [0, 1], a row."""
        guesses = [head.guess(vectors) for head in self.heads]
        sure = np.ones(len(vectors))
        for head, guess in zip(self.heads, guesses, strict=True):
            if head.field.counts:
                sure = sure * head.confidence(guess.evidence())
        outputs = []
        for row in range(len(vectors)):
            filled = [(head.field.name, guess.symbols[row]) for head, guess in zip(self.heads, guesses, strict=True)]
            if filled[0][0] is None:
                outputs.append(json.loads(filled[0][1]))
            else:
                outputs.append({name: json.loads(symbol) for name, symbol in filled if symbol != ABSENT})
        # Six digits: what is left of the last bits depends on how many rows were computed at once.
        return [(output, round(float(value), 6)) for output, value in zip(outputs, sure, strict=True)]


class OutOfFold(NamedTuple):
    """What students said about rows that they had not learned from."""

    confidence: Any  # a number in [0, 1] a row; raw, but for the weighing of fields, which saw the row
    right: Any  # whether all fields that count agreed
    agreement: dict[str, float]  # share of rows, a field; "" for an output that is no object


def learn(
    fields: Sequence[Field],
    vectors: Vectors,
    symbols: Sequence[Sequence[str]],
    weights: Sequence[float],
    folds: Sequence[int],
    *,
    encode: Encode,
    c: float,
) -> tuple[Student, OutOfFold | None]:
    """The student that these rows make, and what k-fold found out about it (None with fewer than two folds).

    `symbols`: a row's `Field.symbol` of each field; `folds`: a number a row; rows of one number are held out together;
    `encode`: text to vectors, for the names of labels; `c`: inverse strength of the regularisation.
    Raises CannotLearn for a field that turns out to be free text, TrainingError when there are no rows.
    """
    if not len(vectors):
        raise TrainingError("there is no example to learn from")
    heads, right = [], np.ones(len(vectors), bool)
    confidence, agreement = np.ones(len(vectors)), {}
    for place, field in enumerate(fields):
        column = [row[place] for row in symbols]
        _refuse_free_text(field, column)
        head, evidence, agrees = _learned(field, vectors, column, np.array(weights, float), np.array(folds), encode, c)
        heads.append(head)
        if evidence is not None:
            agreement[field.name or ""] = float(agrees.mean())
            if field.counts:
                right &= agrees
                confidence = confidence * head.confidence(evidence)
    return Student(tuple(heads)), OutOfFold(confidence, right, agreement) if agreement else None


def _learned(
    field: Field, vectors: Vectors, symbols: list[str], weights: Any, folds: Any, encode: Encode, c: float
) -> tuple[Head, Any, Any]:
    named = field.kind == "category" and any(symbol.startswith('"') for symbol in symbols)
    pulls = (_PULL, 0.0) if named else (0.0,)
    parts = sorted(set(folds.tolist()))
    if len(parts) < 2:
        head = fit(field, vectors, symbols, weights, encode=encode, c=c, pull=pulls[0])
        return replace(head, grown=(pulls[0], 0.0)), None, None

    def without(part: int, pull: float) -> Head:
        inside = [symbol for symbol, of in zip(symbols, folds, strict=True) if of != part]
        kept = folds != part
        return fit(field, vectors[kept], inside, weights[kept], encode=encode, c=c, pull=pull)

    def said(heads: Mapping[int, Head], share: float) -> tuple[Any, Any]:
        evidence, right = np.zeros((len(symbols), 1 + _BESIDE)), np.zeros(len(symbols), bool)
        for part, head in heads.items():
            out = folds == part
            guess = head.evened(share).guess(vectors[out])
            evidence[out] = guess.evidence()
            truth = [symbol for symbol, is_out in zip(symbols, out, strict=True) if is_out]
            right[out] = [head.near(a, b) for a, b in zip(guess.symbols, truth, strict=True)]
        return evidence, right

    # Whether the labels' names help is found out on all folds while that is cheap, and later on one.
    tried = parts if len(symbols) <= 1000 else parts[:1]
    grown = {pull: {part: without(part, pull) for part in tried} for pull in pulls}
    pull = max(pulls, key=lambda pull: float(said(grown[pull], 0.0)[1] @ weights))
    heads = grown[pull] | {part: without(part, pull) for part in parts if part not in tried}
    found = {share: said(heads, share) for share in (_EVEN if field.kind == "category" else (0.0,))}
    share = max(found, key=lambda share: float(found[share][1] @ weights))
    evidence, right = found[share]
    head = fit(field, vectors, symbols, weights, encode=encode, c=c, pull=pull).evened(share)
    return replace(head, weighing=weigh(evidence, right, weights), grown=(pull, share)), evidence, right


def update(
    student: Student,
    vectors: Vectors,
    symbols: Sequence[Sequence[str]],
    weights: Sequence[float],
    *,
    encode: Encode,
    c: float,
) -> Student:
    """The student that these rows make, from one that learned most of them: one short fit a head instead of many.

    What is found out on folds (how the evidence is weighed, whether the names help) is taken over. Arguments as in
    `learn`. Raises CannotLearn as there, TrainingError where a head has to become one of another kind.
    """
    heads = []
    for place, head in enumerate(student.heads):
        column = [row[place] for row in symbols]
        _refuse_free_text(head.field, column)
        if head.grown is None:
            raise TrainingError(f"{head.field.title} was learned by a version that did not keep how", hint=_IN_FULL)
        pull, share = head.grown
        # The scores to begin with are those before the frequency was taken out.
        grown = fit(
            head.field,
            vectors,
            column,
            np.array(weights, float),
            encode=encode,
            c=c,
            pull=pull,
            before=head.evened(-share),
        ).evened(share)
        if _kind(grown) != _kind(head):
            raise TrainingError(f"{head.field.title} now takes other kinds of values than before", hint=_IN_FULL)
        heads.append(replace(grown, weighing=head.weighing, grown=head.grown))
    return Student(tuple(heads))


_IN_FULL = "teach it in full"


def _kind(head: Head) -> tuple[bool, type]:
    """What its evidence looks like, and so what its weighing is for."""
    return head.choice.linear is None, type(head.value)


def examined(student: Student, vectors: Vectors, symbols: Sequence[Sequence[str]]) -> OutOfFold:
    """What the student says about rows that it has not learned from. `symbols` as in `learn`."""
    right, confidence, agreement = np.ones(len(vectors), bool), np.ones(len(vectors)), {}
    for place, head in enumerate(student.heads):
        guess = head.guess(vectors)
        agrees = np.array([head.near(a, row[place]) for a, row in zip(guess.symbols, symbols, strict=True)], bool)
        agreement[head.field.name or ""] = float(agrees.mean()) if len(agrees) else 0.0
        if head.field.counts:
            right &= agrees
            confidence = confidence * head.confidence(guess.evidence())
    return OutOfFold(confidence, right, agreement)


def _refuse_free_text(field: Field, symbols: Sequence[str]) -> None:
    if kinds := varied(field, symbols):
        raise CannotLearn(
            f"{field.title} has {kinds} different values in {len(symbols)} examples: it is free text, which the embedded "
            "student cannot learn",
            hint="drop the field, make it an enumeration, or name a trainer that writes text",
        )


def varied(field: Field, symbols: Sequence[str]) -> int:
    """How many different texts a field holds, where they are so many that it is free text and no category; else 0."""
    if field.choices or field.kind not in ("category", "list"):
        return 0
    texts = [symbol for symbol in symbols if symbol.startswith('"')]
    if field.kind == "list":
        texts = [item for symbol in symbols if symbol.startswith("[") for item in json.loads(symbol)]
    kinds = len(set(texts))
    return kinds if len(texts) >= _FREE_ROWS and kinds > _FREE_DISTINCT and kinds > _FREE_SHARE * len(texts) else 0


# --- files ------------------------------------------------------------------------------------------------------------

FORMAT, MIXED = "apprentice-embedded-3", "apprentice-mixed-1"  # the second holds a folder of the first
_WEIGHTS, _MANIFEST = "weights.npy", "manifest.json"


def files(student: Student, about: Mapping[str, Json], beside: Mapping[str, bytes]) -> tuple[str, dict[str, bytes]]:
    """The checkpoint's id and its files by name: the same student and words give the same bytes.

    `about`: what else the manifest says; `beside`: further files. The manifest holds the hash of every file, and the id
    is the hash of the manifest.
    """
    linears: list[Linear] = []
    heads = [_packed(head, linears) for head in student.heads]
    flat = [array.ravel() for linear in linears for array in (linear.weights, linear.bias)]
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(flat) if flat else np.empty(0, np.float32), allow_pickle=False)
    contents = {_WEIGHTS: buffer.getvalue(), **beside}
    hashes = {name: sha256(content).hexdigest() for name, content in sorted(contents.items())}
    manifest = {"format": FORMAT, **about, "heads": heads, "files": hashes}
    contents[_MANIFEST] = json.dumps(manifest, indent=1).encode()
    return f"sha256-{sha256(contents[_MANIFEST]).hexdigest()}", contents


def manifest_of(path: Path, format: str) -> dict[str, Json]:
    """The manifest in a checkpoint's folder, which has the hash of it as its name.

    Raises ConfigError when the folder is missing, its manifest was changed after it was written, or is of another format.
    """
    try:
        written = (path / _MANIFEST).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} is no checkpoint: {error.strerror or error}", hint=_AGAIN) from error
    if path.resolve().name != f"sha256-{sha256(written).hexdigest()}":
        raise damaged(path, "its manifest does not have the hash that names it")
    try:
        manifest = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "its manifest is no JSON") from error
    if not isinstance(manifest, dict):
        raise damaged(path, "its manifest is no object")
    if manifest.get("format") != format:
        raise ConfigError(
            f"{path} is a checkpoint of the format {manifest.get('format')!r}, not {format!r}", hint=_AGAIN
        )
    return manifest


def load(path: Path) -> tuple[Student, dict[str, Json]]:
    """The student in a checkpoint's folder, and its manifest.

    Raises ConfigError when the folder is missing, was changed after it was written, or is of another format.
    """
    manifest = manifest_of(path, FORMAT)
    contents = {}
    for name, digest in manifest["files"].items():
        if Path(name).name != name:
            raise damaged(path, f"{name!r} is no file of its own")
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise damaged(path, f"{name}: {error.strerror or error}") from error
        if sha256(contents[name]).hexdigest() != digest:
            raise damaged(path, f"{name} does not have the hash in the manifest")
    try:
        flat = np.load(io.BytesIO(contents[_WEIGHTS]), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:  # no array, one that only pickle could open, one too large
        raise damaged(path, f"{_WEIGHTS}: {error}") from error
    if flat.dtype != np.float32 or flat.ndim != 1 or not np.isfinite(flat).all():
        raise damaged(path, f"{_WEIGHTS} is no list of finite float32 numbers")
    cursor = _Cursor(flat, int(manifest["encoder"]["dimension"]))
    student = Student(tuple(_unpacked(head, cursor) for head in manifest["heads"]))
    if cursor.at != len(flat):
        raise damaged(path, f"{_WEIGHTS} has {len(flat)} numbers, the manifest asks for {cursor.at}")
    return student, manifest


_AGAIN = "teach the task again, or go back to another version"


def damaged(path: Path, why: str) -> ConfigError:
    """The error for a checkpoint whose content cannot be used."""
    return ConfigError(f"the checkpoint {path} is damaged: {why}", hint=_AGAIN)


def _packed(head: Head, linears: list[Linear]) -> dict[str, Json]:
    packed: dict[str, Json] = {"field": asdict(head.field), "choice": _choice_packed(head.choice, linears)}
    packed["weighing"] = list(head.weighing)
    packed["grown"] = None if head.grown is None else list(head.grown)
    if isinstance(head.value, Several):
        packed["several"] = {"symbols": list(head.value.symbols)}
        linears.append(head.value.linear)
    elif head.value is not None:
        number = head.value
        linears.append(number.linear)
        packed["number"] = {"low": number.low, "high": number.high, "digits": number.digits}
        packed["number"]["near"] = _choice_packed(number.near, linears)
    return packed


def _choice_packed(choice: Choice, linears: list[Linear]) -> dict[str, Json]:
    if choice.linear is not None:
        linears.append(choice.linear)
    if choice.centres is not None:
        linears.append(choice.centres)
    return {"symbols": list(choice.symbols), "seen": choice.seen, "centres": choice.centres is not None}


class _Cursor:
    """Reads linear models from the flat array, in the order in which `_packed` wrote them."""

    def __init__(self, flat: Any, dimension: int) -> None:
        self.flat, self.dimension, self.at = flat, dimension, 0

    def linear(self, columns: int) -> Linear:
        end = self.at + self.dimension * columns
        weights, bias = self.flat[self.at : end], self.flat[end : end + columns]
        self.at = end + columns
        if self.at > len(self.flat):
            raise ConfigError(f"{_WEIGHTS} has too few numbers for its manifest", hint=_AGAIN)
        return Linear(weights.reshape(self.dimension, columns), bias)


def _unpacked(packed: Mapping[str, Json], cursor: _Cursor) -> Head:
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in packed["field"].items()
    }
    field = Field(**given)
    choice = _choice_unpacked(packed["choice"], cursor)
    value: Number | Several | None = None
    if "several" in packed:
        symbols = tuple(packed["several"]["symbols"])
        value = Several(symbols, cursor.linear(len(symbols)), field.bounds)
    elif "number" in packed:
        said = packed["number"]
        linear, near = cursor.linear(1), _choice_unpacked(said["near"], cursor)
        value = Number(linear, near, said["low"], said["high"], said["digits"], field.step)
    grown = packed.get("grown")
    return Head(field, choice, value, tuple(packed["weighing"]), None if grown is None else (grown[0], grown[1]))


def _choice_unpacked(packed: Mapping[str, Json], cursor: _Cursor) -> Choice:
    symbols = tuple(packed["symbols"])
    linear = cursor.linear(len(symbols)) if len(symbols) > 1 else None
    return Choice(symbols, linear, packed["seen"], cursor.linear(len(symbols)) if packed["centres"] else None)
