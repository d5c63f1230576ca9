"""Trials of the problems that people look at, in memory: fifty thousand take a second to read, so that is done once."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from tilewise.db.trial_points import TrialPointRepository
from tilewise.domain.config import Candidate

from .landscape import Landscape

MOST_POINTS = 100_000  # of all problems together; with what is made of them about 100 MB


@dataclass(slots=True)
class _Kept:
    landscape: Landscape = field(default_factory=lambda: Landscape(()))
    known: dict[str, Candidate] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class PointBook:
    """Landscapes by device and problem; those that were looked at last are kept, and follow the database."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, repository: TrialPointRepository) -> Landscape:
        """Return all trials of a repository's problem and device as its session sees them."""
        key = repository.device_key, repository.problem.key
        with self._lock:
            kept = self._kept.setdefault(key, _Kept())
            self._kept.move_to_end(key)
        with kept.lock:
            count, newest = repository.state()
            points = kept.landscape.points
            last = points[-1].id if points else 0
            if (len(points), last) != (count, newest):
                points += repository.points(after=last, known=kept.known)
                if len(points) != count:
                    # numbers are given before transactions end: one may have become visible behind a greater one
                    points = repository.points(known=kept.known)
                kept.landscape = Landscape(points)
            found = kept.landscape
        self._forget()
        return found

    def _forget(self) -> None:
        with self._lock:
            while len(self._kept) > 1 and sum(len(each.landscape.points) for each in self._kept.values()) > MOST_POINTS:
                self._kept.popitem(last=False)
