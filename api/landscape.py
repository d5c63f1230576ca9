"""A landscape: every config of one kernel that was tried, by its parameters. All of it is arithmetic on points.

Trials of different hours ran at different clocks, so they are compared by their ratio to the reference candidate that
ran beside each; a `level` is that ratio times the reference's median, in milliseconds.
"""

import functools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tilewise.db.trial_points import TrialPoint
from tilewise.domain.config import Value
from tilewise.domain.trial import Outcome

MOST_VALUES = 24  # of a parameter, in a grid; more are put together
# How much slower than the best a level is, at most, to have each of the nine shades.
SHADES = (1.02, 1.05, 1.1, 1.2, 1.35, 1.6, 2.0, 3.0, math.inf)


@dataclass(frozen=True, slots=True, order=True)
class Space:
    """The configs of one kernel in one role of a backend."""

    backend: str
    role: str
    kernel: str

    @property
    def name(self) -> str:
        return f"{self.backend}.{self.role}.{self.kernel}"

    @property
    def label(self) -> str:
        shown = [self.backend, *([] if self.role == "forward" else [self.role])]
        return " ".join(shown) + ("" if self.kernel == self.backend else f" ({self.kernel})")


@dataclass(frozen=True, slots=True)
class Spot:
    """A trial of a space: its parameters, and its level in ms where it was right and timed."""

    trial: int
    values: Mapping[str, Value]
    level: float | None
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter and the values that were tried, in order. `effect` is the share of the spread of log levels that its
    values explain by themselves, from 0 to 1."""

    name: str
    values: tuple[Value, ...]
    effect: float


@dataclass(frozen=True, slots=True)
class Step:
    """One row or column of a grid: one value, or where there are many all from one to another."""

    label: str
    values: frozenset[Value]


@dataclass(frozen=True, slots=True)
class Cell:
    """All trials of two values: the fastest, how many there were and how many failed; shade is 0 for the best level."""

    best: Spot | None
    trials: int
    failed: int
    shade: int | None


@dataclass(frozen=True, slots=True)
class Grid:
    columns: tuple[Step, ...]
    rows: tuple[tuple[Step, tuple[Cell, ...]], ...]


class Landscape:
    """All trials of a problem on a device in their order, and what is made of them once, not once a page."""

    def __init__(self, points: tuple[TrialPoint, ...]) -> None:
        self.points = points
        self._spots: dict[Space, tuple[Spot, ...]] = {}
        self._parameters: dict[Space, tuple[Parameter, ...]] = {}

    @functools.cached_property
    def reference(self) -> float:
        """The median of the reference's time over all trials, in ms; 1 where no trial has a ratio."""
        times = [point.median_ms / point.ratio for point in self.points if point.median_ms and point.ratio]
        return statistics.median(times) if times else 1.0

    @functools.cached_property
    def levels(self) -> tuple[float | None, ...]:
        """The level of each trial in ms; None where it was not right, or not timed."""
        return tuple(self._level(point) for point in self.points)

    @functools.cached_property
    def spaces(self) -> tuple[tuple[Space, int], ...]:
        """The spaces with the number of their trials: forwards before gradients, the most tried first."""
        kinds: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        for point in self.points:
            roles = tuple((role, config.kernel) for role, config in point.candidate.configs if config.values)
            kinds[point.candidate.backend, roles] += 1
        found: Counter[Space] = Counter()
        for (backend, roles), number in kinds.items():
            for role, kernel in roles:
                found[Space(backend, role, kernel)] += number
        return tuple(sorted(found.items(), key=lambda pair: (pair[0].role != "forward", -pair[1], pair[0])))

    def spots(self, space: Space) -> tuple[Spot, ...]:
        """Return the trials of a space."""
        if space not in self._spots:
            self._spots[space] = tuple(self._spots_of(space))
        return self._spots[space]

    def parameters(self, space: Space) -> tuple[Parameter, ...]:
        """Return the parameters of a space, as `parameters` does."""
        if space not in self._parameters:
            self._parameters[space] = parameters(self.spots(space))
        return self._parameters[space]

    def _level(self, point: TrialPoint) -> float | None:
        if point.outcome is not Outcome.OK or point.median_ms is None:
            return None
        return point.ratio * self.reference if point.ratio else point.median_ms

    def _spots_of(self, space: Space) -> Iterator[Spot]:
        for point, level in zip(self.points, self.levels, strict=True):
            if point.candidate.backend == space.backend:
                config = point.candidate.config(space.role)
                if config is not None and config.kernel == space.kernel:
                    yield Spot(point.id, dict(config.values), level, point.outcome)


def parameters(found: Sequence[Spot]) -> tuple[Parameter, ...]:
    """Return the parameters of which more than one value was tried, what matters most first."""
    # by parameter and value: how many levels, and the sum of their logarithms
    sums: dict[str, dict[Value, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    squares = total = 0.0
    for spot in found:
        log = math.log(spot.level) if spot.level else None
        if log is not None:
            squares += log * log
            total += log
        for name, value in spot.values.items():
            kept = sums[name][value]
            if log is not None:
                kept[0] += 1
                kept[1] += log
    made = [
        Parameter(name, tuple(sorted(values, key=_rank)), _effect(list(values.values()), squares, total))
        for name, values in sums.items()
        if len(values) > 1
    ]
    return tuple(sorted(made, key=lambda each: (-each.effect, each.name)))


def narrowed(found: Iterable[Spot], wanted: Mapping[str, str]) -> tuple[Spot, ...]:
    """Return the spots whose parameters have the wanted values, which are spelled as `spelled` does."""
    return tuple(
        spot for spot in found if all(spelled(spot.values.get(name)) == value for name, value in wanted.items())
    )


def spelled(value: Value | None) -> str:
    """Return a value as it stands in a URL and on the page."""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def best(found: Iterable[Spot]) -> Spot | None:
    timed = [spot for spot in found if spot.level is not None]
    return min(timed, key=lambda spot: spot.level or math.inf) if timed else None


def shade(slower: float) -> int:
    """Return which of the nine shades a level has that is so many times the best one."""
    return next(index for index, most in enumerate(SHADES) if slower <= most)


def grid(found: Sequence[Spot], across: Parameter, down: Parameter) -> Grid:
    """Return the best of each pair of values of two parameters."""
    columns, rows = _steps(across.values), _steps(down.values)
    column_of = {value: index for index, step in enumerate(columns) for value in step.values}
    row_of = {value: index for index, step in enumerate(rows) for value in step.values}
    groups: dict[tuple[int, int], list[Spot]] = defaultdict(list)
    for spot in found:
        x, y = spot.values.get(across.name), spot.values.get(down.name)
        if x is not None and y is not None:
            groups[row_of[y], column_of[x]].append(spot)
    top = best(found)
    fastest = top.level if top and top.level else 1.0
    return Grid(
        columns,
        tuple(
            (step, tuple(_cell(groups.get((row, column), []), fastest) for column in range(len(columns))))
            for row, step in enumerate(rows)
        ),
    )


def sample(found: Sequence[Spot], most: int) -> tuple[Spot, ...]:
    """Return up to `most` timed spots, fastest first: the fastest third, and of the others every so many."""
    ranked = sorted((spot for spot in found if spot.level is not None), key=lambda spot: spot.level or math.inf)
    if len(ranked) <= most:
        return tuple(ranked)
    kept = most // 3
    rest, wanted = ranked[kept:], most - kept
    return tuple(ranked[:kept] + [rest[index * len(rest) // wanted] for index in range(wanted)])


def _cell(group: Sequence[Spot], fastest: float) -> Cell:
    top = best(group)
    failed = sum(spot.outcome is not Outcome.OK for spot in group)
    slower = top.level / fastest if top and top.level else None
    return Cell(top, len(group), failed, None if slower is None else shade(slower))


def _steps(values: Sequence[Value]) -> tuple[Step, ...]:
    if len(values) <= MOST_VALUES:
        return tuple(Step(spelled(value), frozenset((value,))) for value in values)
    edges = [index * len(values) // MOST_VALUES for index in range(MOST_VALUES + 1)]
    parts = [values[start:end] for start, end in pairwise(edges)]
    return tuple(Step(f"{spelled(part[0])} to {spelled(part[-1])}", frozenset(part)) for part in parts)


def _effect(groups: Sequence[Sequence[float]], squares: float, total: float) -> float:
    """Return the correlation ratio (eta squared): the share of squares that lies between groups of (number, sum)."""
    number = sum(count for count, _ in groups)
    if not number:
        return 0.0
    whole = squares - total * total / number
    between = sum(part * part / count for count, part in groups if count) - total * total / number
    return min(max(between / whole, 0.0), 1.0) if whole > 1e-12 else 0.0


def _rank(value: Value) -> tuple[bool, float, str]:
    """Numbers by size before words; false before true."""
    return isinstance(value, str), 0.0 if isinstance(value, str) else float(value), str(value)
