"""Comparisons of finals: over sizes, of two backends, of two devices or versions of software. No SQL and no HTML.

Two backends meet in one final, so their ratio is measured. Two devices or two versions never do: what stands side by
side then are milliseconds of different runs, which decide nothing, and speed-ups, each over torch in its own final.
"""

import enum
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tilewise.db.finals import Final
from tilewise.domain.problem import Problem

# Ends of the bins of a distribution of ratios, the middle one for what is within 2%.
EDGES = (0.5, 0.67, 0.8, 0.9, 0.95, 0.98, 1.02, 1.05, 1.11, 1.25, 1.5, 2.0)
_LENGTH = re.compile(r"[qk]\d+")
_WIDTH = re.compile(r"(h|kv|d|dv)\d+")


class Size(enum.StrEnum):
    """What a family of problems differs in: the number of tokens, or the hidden size (heads times head_dim)."""

    LENGTH = "length"
    HIDDEN = "hidden"

    def of(self, problem: Problem) -> int:
        return problem.q_len if self is Size.LENGTH else problem.heads * problem.head_dim

    def family(self, problem: Problem) -> str | None:
        """Return what a problem has in common with those that differ in this size alone; None where it has none."""
        if self is Size.LENGTH:
            return None if problem.q_len != problem.kv_len else _without(problem, _LENGTH)
        sharing = problem.heads // problem.kv_heads
        return f"{_without(problem, _WIDTH)}.{sharing}q.{problem.v_head_dim / problem.head_dim:g}v"


def _without(problem: Problem, tokens: re.Pattern[str]) -> str:
    return ".".join(token for token in problem.key.split(".") if not tokens.fullmatch(token))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Finals of problems that differ in one size alone, by that size."""

    key: str
    size: Size
    finals: tuple[Final, ...]

    @property
    def common(self) -> str:
        """What the problems have in common, as their keys spell it."""
        return _without(self.finals[0].problem, _LENGTH if self.size is Size.LENGTH else _WIDTH)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.size.of(final.problem) for final in self.finals)

    @property
    def backends(self) -> tuple[str, ...]:
        """Those of any of the finals, the one that is fastest most often first."""
        places = Counter[str]()
        for final in self.finals:
            for place, standing in enumerate(final.standings):
                places[standing.backend] += len(final.standings) - place
        return tuple(name for name, _ in places.most_common())


def families(finals: Iterable[Final], size: Size) -> tuple[Family, ...]:
    """Return the families of at least two sizes, the largest first."""
    found: dict[str, dict[int, Final]] = {}
    for final in finals:
        key = size.family(final.problem)
        if key is not None:
            found.setdefault(key, {})[size.of(final.problem)] = final
    made = [
        Family(key=key, size=size, finals=tuple(each[one] for one in sorted(each)))
        for key, each in found.items()
        if len(each) > 1
    ]
    return tuple(sorted(made, key=lambda family: (-len(family.finals), family.key)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Two backends in one final: how many times faster the first is, and by what margin that says anything.

    The margin is the tuner's: the largest of the final's noise and the half-widths of both ratios.
    """

    final: Final
    share: float
    margin: float

    @property
    def won(self) -> int:
        """1 where the first is faster by more than the margin, -1 where the second is, 0 where neither is."""
        if 1 - 1 / self.share > self.margin:
            return 1
        return -1 if 1 - self.share > self.margin else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Duel:
    """Two backends over all finals that both were in, where the first does worst first."""

    first: str
    second: str
    meetings: tuple[Meeting, ...]

    def count(self, won: int) -> int:
        return sum(meeting.won == won for meeting in self.meetings)

    @property
    def geomean(self) -> float:
        return geomean([meeting.share for meeting in self.meetings])

    @property
    def distribution(self) -> tuple[int, ...]:
        """How many meetings fall below the first of EDGES, between each two, and above the last."""
        bins = [0] * (len(EDGES) + 1)
        for meeting in self.meetings:
            bins[sum(meeting.share >= edge for edge in EDGES)] += 1
        return tuple(bins)


def duel(finals: Iterable[Final], first: str, second: str) -> Duel:
    """Return how two backends did against each other."""
    met = []
    for final in finals:
        one, other = final.of(first), final.of(second)
        if one and other:
            margin = max(final.noise, one.spread, other.spread)
            met.append(Meeting(final=final, share=other.ratio / one.ratio, margin=margin))
    return Duel(first=first, second=second, meetings=tuple(sorted(met, key=lambda meeting: meeting.share)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One problem on one device with one software: which backend, its time in ms, how many times faster than torch."""

    final: Final
    backend: str
    ms: float
    speedup: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One problem on two devices, or with two versions of the software."""

    a: Side
    b: Side

    @property
    def ratio(self) -> float:
        """Time on the first over time on the second: above 1 the second is faster."""
        return self.a.ms / self.b.ms


def pairs(a: Iterable[Final], b: Iterable[Final], backend: str = "") -> tuple[Pair, ...]:
    """Return the problems that both sides have, what got slowest from the first to the second first.

    What is compared is the plan of each, or one backend, where both finals held it.
    """
    others = {final.problem_key: side for final in b if (side := _side(final, backend))}
    found = [
        Pair(a=side, b=others[final.problem_key])
        for final in a
        if final.problem_key in others and (side := _side(final, backend))
    ]
    return tuple(sorted(found, key=lambda pair: (pair.ratio, pair.a.final.problem_key)))


def _side(final: Final, backend: str) -> Side | None:
    name = backend or final.winner
    found = final.of(name)
    if found is None:
        return None
    ms = found.median_ms if backend else final.winner_ms
    return Side(final=final, backend=name, ms=ms, speedup=final.speedup(name))


def geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def common_backends(finals: Iterable[Final]) -> tuple[str, ...]:
    """Return the backends of the finals, those in most of them first."""
    counts = Counter(standing.backend for final in finals for standing in final.standings)
    return tuple(name for name, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
