"""How far a problem is from a measured one, and what running that one's plan may cost.

The model says, for a distance, what share of time is lost at most in nine cases of ten against the best plan of the
problem itself (`regret`), and by how much at most the plan's ratio to torch's own choice is worse there than where it
was measured (`drift`). Both grow in a line with the distance; `python -m tilewise.bench.near` fits them on measured
landscapes. A kernel that no landscape was measured of has no model, and its plans are never served for another problem.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from .answer import Answer
from .problem import MAX_DECODE_Q_LEN, Problem

# Beyond it nothing was fitted: a factor of 8 in one size, or of 2 in three.
MAX_DISTANCE = 3.0
_SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len")


@dataclass(frozen=True, slots=True)
class Line:
    """An upper bound: base + slope * distance."""

    base: float
    slope: float

    def at(self, distance: float) -> float:
        return self.base + self.slope * distance


@dataclass(frozen=True, slots=True, kw_only=True)
class NearModel:
    """regret: share of time lost at most; drift: natural logarithm of how much worse the ratio gets at most."""

    regret: Line
    drift: Line


# By the backend of the plan; bench/results/near_cpu.json has the landscapes and the fit.
MODELS: Mapping[str, NearModel] = {
    "cpu_tiled": NearModel(
        regret=Line(0.37906697960353136, 0.0),
        drift=Line(0.6302487764237176, 0.0787810970529647),
    )
}


def group(problem: Problem) -> Hashable:
    """Return what must be the same of two problems for one to be near the other: all but batch, heads and lengths."""
    same = tuple(getattr(problem, field.name) for field in fields(problem) if field.name not in _SIZES)
    return *same, problem.q_len <= MAX_DECODE_Q_LEN


def distance(one: Problem, other: Problem) -> float:
    """Return how many doublings lie between two problems of a group: of queries, keys, rows of heads, and sharing."""
    pairs = (
        (one.q_len, other.q_len),
        (one.kv_len, other.kv_len),
        (one.batch * one.heads, other.batch * other.heads),
        (one.heads // one.kv_heads, other.heads // other.kv_heads),
    )
    return sum(abs(math.log2(a / b)) for a, b in pairs)


class NearIndex:
    """The problems of a device's answers by group, to find the nearest without looking at all."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._groups: dict[Hashable, list[Problem]] = {}
        for key in keys:
            problem = _parsed(key)
            self._groups.setdefault(group(problem), []).append(problem)

    def nearest(self, problem: Problem) -> list[tuple[float, Problem]]:
        """Return the problems within MAX_DISTANCE with their distance, the nearest first."""
        found = [(distance(problem, other), other) for other in self._groups.get(group(problem), ())]
        return sorted((pair for pair in found if pair[0] <= MAX_DISTANCE), key=lambda pair: (pair[0], pair[1].key))


def bounded(found: Answer, problem: Problem, far: float, models: Mapping[str, NearModel]) -> Answer | None:
    """Return what `found`, measured `far` away, says for `problem`; None if its worst case does not beat the default.

    Times are scaled by the operations of both, and the interval is as wide as the ratio may drift.
    """
    model = models.get(found.plan.forward.backend)
    if model is None or not found.expected_ms or not found.baseline_ms or found.interval is None:
        return None
    drift = model.drift.at(far)
    if found.expected_ms / found.baseline_ms * math.exp(drift) >= 1:
        return None
    scale = problem.forward_flops / max(1, found.problem.forward_flops)
    return replace(
        found,
        problem=problem,
        measured=found.measured or found.problem,
        expected_ms=found.expected_ms * scale,
        baseline_ms=found.baseline_ms * scale,
        interval=(found.interval[0] * scale * math.exp(-drift), found.interval[1] * scale * math.exp(drift)),
        regret=model.regret.at(far),
    )


@lru_cache(65_536)
def _parsed(key: str) -> Problem:
    return Problem.parse(key)
