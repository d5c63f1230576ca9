"""SealedTable: the answers that one run uses, which do not move."""

from collections.abc import Callable, Hashable

from tilewise.domain.answer import Answer
from tilewise.domain.matching import KeptAnswers, by_device, match, predictors
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.software import Software

MEMO_LIMIT = 65_536


class SealedTable:
    """The answers of a snapshot for one device and one set of software versions.

    Looking up the same problem twice gives the same Answer object. The memo only saves time: where it is full it is
    emptied, and the next lookups find the same answers again.
    """

    def __init__(self, snapshot: Snapshot, device_key: str, software: Software, *, origin: str) -> None:
        self.snapshot, self.device_key, self.software, self.origin = snapshot, device_key, software, origin
        devices = by_device(snapshot.answers)
        self._kept = devices.get(device_key, KeptAnswers({}))
        self._others = predictors(device_key, devices)
        for kept in (self._kept, *(other.kept for other in self._others)):
            kept.prepare()
        self._memo: dict[Hashable, Answer] = {}

    @property
    def snapshot_id(self) -> str:
        """The id of the whole snapshot that was sealed: what a restart pins to get the same configs."""
        return self.snapshot.id

    def __len__(self) -> int:
        """Number of answers for this device."""
        return len(self._kept)

    def __repr__(self) -> str:
        return f"SealedTable({len(self)} answers for {self.device_key} from {self.origin}, {self.snapshot_id[:12]})"

    def lookup(self, problem: Problem) -> Answer:
        """Return the answer for `problem`, the default where the table has none. Never raises."""
        answer = self._memo.get(problem)
        return self._find(problem, problem) if answer is None else answer

    def lookup_key(self, key: tuple[Hashable, ...], build: Callable[[], Problem]) -> Answer:
        """Return the answer of the problem that `build` makes, which is built only when `key` is new.

        Building a Problem costs 10 microseconds, a small tuple of shapes and flags none: `key` must decide the problem.
        """
        answer = self._memo.get(key)
        return self._find(key, build()) if answer is None else answer

    def _find(self, key: Hashable, problem: Problem) -> Answer:
        answer = match(problem, self.device_key, self.software, self._kept, self._others)
        if len(self._memo) >= MEMO_LIMIT:
            self._memo.clear()
        # the first of two threads that got here at once wins, so that everybody holds the same object
        return self._memo.setdefault(key, answer)
