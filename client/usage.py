"""Counts what a process used and missed, in numbers that the hot path only adds to."""

import threading
from collections.abc import Iterator
from typing import Self

from tilewise.domain.answer import Answer, Match
from tilewise.domain.problem import Problem
from tilewise.domain.usage import Usage, Use

MAX_KINDS = 4096
BATCH = 1000


_NOTHING = Problem(batch=1, heads=1, q_len=1, head_dim=1)


class Used:
    """How often one answer was used; whoever uses it does `used.calls += 1`.

    Two threads that add at the same moment may count once: a number that is a little low is worth more than a lock.
    """

    __slots__ = ("calls", "match", "problem", "told")

    def __init__(self, problem: Problem, match: Match) -> None:
        self.problem, self.match = problem, match
        self.calls = self.told = 0

    @classmethod
    def nobodys(cls) -> Self:
        """Return a counter that nobody reads: of calls that no answer decided."""
        return cls(_NOTHING, Match.DEFAULT)


class Recorder:
    """The counters of one client, by bucket and match; bounded: what comes when there are MAX_KINDS is not told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: dict[tuple[Problem, Match], Used] = {}

    def of(self, answer: Answer) -> Used:
        """Return the counter of an answer."""
        key = (answer.problem.bucket(), answer.match)
        with self._lock:
            found = self._used.get(key)
            if found is None:
                found = Used(*key)
                if len(self._used) < MAX_KINDS:
                    self._used[key] = found
            return found

    def batches(self, device_key: str, snapshot: str | None) -> Iterator[tuple[Usage, list[tuple[Used, int]]]]:
        """Yield what was not told yet, as reports, each with the counts to mark as told once it arrived."""
        with self._lock:
            waiting = [(used, used.calls - used.told) for used in self._used.values() if used.calls > used.told]
        for start in range(0, len(waiting), BATCH):
            some = waiting[start : start + BATCH]
            uses = tuple(Use(problem=used.problem, match=used.match, calls=calls) for used, calls in some)
            yield Usage(device_key=device_key, snapshot=snapshot, uses=uses), some

    @staticmethod
    def told(counts: list[tuple[Used, int]]) -> None:
        for used, calls in counts:
            used.told += calls

    def forget(self) -> None:
        """Start from nothing, in a forked child: its parent tells of what was counted before. Uses no lock."""
        self._lock = threading.Lock()
        for used in self._used.values():
            used.told = used.calls
