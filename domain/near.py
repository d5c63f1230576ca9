"""How far a problem is from a measured one, and which measured ones are near."""

import math
from collections.abc import Hashable, Iterable
from dataclasses import fields
from functools import lru_cache

from .problem import MAX_DECODE_Q_LEN, Problem

# Beyond it nothing was fitted: a factor of 8 in one size, or of 2 in three.
MAX_DISTANCE = 3.0
_SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len")


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


@lru_cache(65_536)
def _parsed(key: str) -> Problem:
    return Problem.parse(key)
