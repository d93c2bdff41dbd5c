"""PURE: inputs that are nearly the same -> which go to the same side of a split, which one is most like another.

Two inputs are near when their words and pairs of neighbouring words are the same to a share of at least `near` (Jaccard).
Every such pair is found: the rarest words decide where to look (prefix and positional filters, Xiao et al., WWW 2008).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import Literal

from apprentice.types import Json

Side = Literal["training", "held_out", "between"]
type _Row = tuple[int, ...]  # an input's marks

NEAR = 0.8  # of the words and pairs: another word in fourteen, one more at the end of five
FORM_ROWS = 100  # inputs from which it is told what is only the form of an input
FORM_SHARE = 0.75  # what more of them have in common than this
FORM_FEWEST = 20  # inputs; fewer have no form
WORDS = 3  # a text of fewer is a label or a name, and no copy of another because it is equal

_SCRIPTS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # no spaces between words
_WORD = re.compile(rf"[{_SCRIPTS}]|[^\W_{_SCRIPTS}]+")
_EPSILON = 1e-9  # what rounding may add to a whole number


def words(text: str) -> list[str]:
    """The words of a text without case and punctuation; a letter each where a script writes none apart.

    >>> words("Where's my CARD?"), words("你好 ok")
    (['where', 's', 'my', 'card'], ['你', '好', 'ok'])
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def texts(value: Json) -> Iterator[str]:
    """The texts in a value, without the names of its fields."""
    for _, leaf in _leaves(value, ""):
        if isinstance(leaf, str):
            yield leaf


def _leaves(value: Json, path: str) -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict):
        for name in sorted(value):
            yield from _leaves(value[name], f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, path)
    elif value is not None:
        yield path, value


def marks(value: Json) -> set[Hashable]:
    """The words and the pairs of neighbouring words of an input's texts, and its other values by name."""
    found: set[Hashable] = set()
    for path, leaf in _leaves(value, ""):
        if isinstance(leaf, str):
            said = words(leaf)
            found.update(said)
            found.update(pairwise(said))
        else:
            found.add((path, isinstance(leaf, bool), leaf))  # for Python, True is 1
    return found


def split(
    keys: Sequence[str],
    inputs: Sequence[Json],
    *,
    held_out: Callable[[str], bool],
    fixed: Collection[str] = (),
    near: float = NEAR,
) -> list[Side]:
    """The side of each of these different inputs, given in the order in which they became known. It never changes later.

    An input goes where those go that it is near to; near to none, where its key says. One that is near to both sides
    goes to neither, so that nothing in training is near anything held out. `fixed`: keys that are held out whatever else.
    """
    rows = _rarest_first(_without_form(_numbered(inputs)))
    sides: dict[int, Side] = {}
    kept: dict[Side, _Index] = {"training": _Index(near), "held_out": _Index(near)}
    first = [row for row, key in enumerate(keys) if key in fixed]
    for row in [*first, *(row for row, key in enumerate(keys) if key not in fixed)]:
        side: Side = "held_out" if keys[row] in fixed or held_out(keys[row]) else "training"
        if keys[row] not in fixed:
            beside = [name for name, index in kept.items() if index.has_near(rows[row])]
            side = "between" if len(beside) == 2 else beside[0] if beside else side
        sides[row] = side
        if side != "between":
            kept[side].add(rows[row])
    return [sides[row] for row in range(len(keys))]


def groups(inputs: Sequence[Json], near: float = NEAR) -> list[int]:
    """A number for each input, counted from 0: the same one for inputs that are near, directly or over others in between."""
    rows = _rarest_first(_without_form(_numbered(inputs)))
    index = _Index(near)
    leader: list[int] = []  # of each row the first row of its group, or one that knows it better

    def first(row: int) -> int:
        while leader[row] != row:
            leader[row] = row = leader[leader[row]]
        return row

    for number, row in enumerate(rows):
        leader.append(number)
        for other in index.near(row):
            one, two = sorted((first(other), first(number)))
            leader[two] = one
        index.add(row)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(first(row), len(numbers)) for row in range(len(rows))]


def alike(inputs: Sequence[Json], others: Iterable[Json], near: float = NEAR) -> list[bool]:
    """Whether each input, or one of its texts of WORDS words and more, is near one of the others."""
    pieces = [[value, *(text for text in texts(value) if len(words(text)) >= WORDS)] for value in inputs]
    rows = _rarest_first(_numbered([*(piece for some in pieces for piece in some), *others]))
    index = _Index(near)
    for other in rows[sum(map(len, pieces)) :]:
        index.add(other)
    each = iter(rows)
    return [any(list(map(index.has_near, islice(each, len(some))))) for some in pieces]


def nearest(known: Sequence[Json], asked: Sequence[Json]) -> list[int | None]:
    """For each input asked the number of the known one that is most like it: cosine of words and pairs, by tf-idf.

    None where the two have nothing in common.
    """
    sets = [marks(value) for value in known]
    seen = Counter(mark for row in sets for mark in row)
    weigh = {mark: math.log((1 + len(sets)) / (1 + count)) + 1.0 for mark, count in seen.items()}
    places: dict[Hashable, list[int]] = defaultdict(list)
    lengths = []
    for number, row in enumerate(sets):
        lengths.append(math.sqrt(sum(weigh[mark] ** 2 for mark in row)))
        for mark in row:
            places[mark].append(number)
    found: list[int | None] = []
    for value in asked:
        scores: dict[int, float] = {}
        for mark in marks(value) & places.keys():
            gain = weigh[mark] ** 2
            for number in places[mark]:
                scores[number] = scores.get(number, 0.0) + gain
        ranked = [(score / lengths[number], number) for number, score in scores.items()]
        # The sums are made in any order, so that they differ in the last place: of equals the first one, each time.
        least = max(ranked, default=(0.0, 0))[0] - _EPSILON
        found.append(min((number for score, number in ranked if score >= least), default=None))
    return found


def _numbered(inputs: Iterable[Json]) -> list[_Row]:
    """The marks of each input, as numbers."""
    numbers: dict[Hashable, int] = {}
    return [tuple(numbers.setdefault(mark, len(numbers)) for mark in marks(value)) for value in inputs]


def _without_form(rows: list[_Row]) -> list[_Row]:
    """The rows without what nearly all have in common: inputs that are written into one form are no copies.

    What is form is told by the FORM_ROWS before a row's own, so that no later row changes it.
    """
    forms: list[set[int]] = []
    for start in range(0, len(rows), FORM_ROWS):
        some = rows[start : start + FORM_ROWS]
        counts = Counter(chain.from_iterable(some)) if len(some) >= FORM_FEWEST else Counter()
        forms.append({mark for mark, count in counts.items() if count > FORM_SHARE * len(some)})
    return [
        tuple(mark for mark in row if mark not in forms[max(place // FORM_ROWS - 1, 0)])
        for place, row in enumerate(rows)
    ]


def _rarest_first(rows: Sequence[_Row]) -> list[_Row]:
    """The rows, each with its rarest mark first; how rare changes how long a search takes, and no more."""
    seen = Counter(chain.from_iterable(rows))
    places = dict(zip(sorted(seen, key=seen.__getitem__), range(len(seen)), strict=True))
    return [tuple(sorted(map(places.__getitem__, row))) for row in rows]


class _Index:
    """Rows, rarest first, that can be asked for one that is near another."""

    def __init__(self, near: float) -> None:
        self._share = near
        self._rows: list[_Row] = []
        self._places: dict[int, dict[tuple[int, int], list[int]]] = {}  # mark -> its row's size and its place in it

    def add(self, row: _Row) -> None:
        for place in range(self._prefix(len(row))):
            self._places.setdefault(row[place], {}).setdefault((len(row), place), []).append(len(self._rows))
        self._rows.append(row)

    def has_near(self, row: _Row) -> bool:
        """Whether one is near; a row without marks is near to none."""
        return next(self.near(row), None) is not None

    def near(self, row: _Row) -> Iterator[int]:
        """The places of those that are near, in no order."""
        size, whole = len(row), set(row)
        seen: set[int] = set()
        for place in range(self._prefix(size)):
            for (other_size, other_place), others in self._places.get(row[place], {}).items():
                common = math.ceil((size + other_size) * self._share / (1 + self._share) - _EPSILON)
                if min(size - place, other_size - other_place) < common:
                    continue  # the rest of the shorter one would not do
                for other in others:
                    if other not in seen:
                        seen.add(other)
                        if len(whole.intersection(self._rows[other])) >= common:
                            yield other

    def _prefix(self, size: int) -> int:
        """How many of a row's rarest marks to look at: near rows have one of them in common."""
        return size - math.ceil(size * self._share - _EPSILON) + 1 if size else 0
