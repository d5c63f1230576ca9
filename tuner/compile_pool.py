"""The processes that compile ahead, and which of them compiles what."""

from collections.abc import Mapping, Sequence

from tilewise.domain.config import Candidate
from tilewise.kernels.backends import backend_named

from .processes import Worker, nothing
from .serving import Task

SLOW_SHARE = 3  # one process in so many imports what takes seconds to import


def slow(backend: str) -> bool:
    """Whether a process that compiles the first candidate of a backend imports for seconds before."""
    return backend_named(backend).compile_seconds > 0


class CompilePool:
    """Workers, and what they have begun with or imported.

    A backend that is slow to import is compiled by a share of them: else all would import it, one after another as
    their turns come, and the others' candidates would wait for that. Where nothing else compiles, all do.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = tuple(workers)
        self._foreseen: dict[Worker, Candidate] = {}
        self._importing: set[Worker] = set()

    def slots(self, *, mixed: bool) -> int:
        """Return how many workers compile slow backends: all, unless others compile too."""
        return max(1, len(self.workers) // SLOW_SHARE) if mixed else len(self.workers)

    def begin(self, wanted: Mapping[Candidate, Task]) -> None:
        """Have a process for every worker, each busy with one of `wanted`, as far as they go; returns at once.

        Whoever has begun with a candidate is given it when it is to be compiled, and finds it done or goes on with it.
        """
        heavy = [each for each in wanted if slow(each.backend)]
        light = [each for each in wanted if not slow(each.backend)]
        first = [*heavy[: self.slots(mixed=bool(light))], *light]
        self._foreseen = dict(zip(self.workers, first, strict=False))
        for worker in self.workers:
            candidate = self._foreseen.get(worker)
            if candidate is not None:
                self._note(worker, candidate)
            worker.begin(nothing if candidate is None else wanted[candidate])

    def choose(self, worker: Worker, waiting: Sequence[Candidate], *, mixed: bool) -> int | None:
        """Return the place among `waiting` of what a free worker compiles next, None where all that is for others."""
        mine = self._foreseen.get(worker)
        others = {candidate for each, candidate in self._foreseen.items() if each is not worker}
        imports = worker in self._importing or len(self._importing) < self.slots(mixed=mixed)
        allowed = (
            place
            for place, candidate in enumerate(waiting)
            if candidate not in others and (imports or not slow(candidate.backend))
        )
        place = waiting.index(mine) if mine is not None and mine in waiting else next(allowed, None)
        if place is not None:
            self._foreseen.pop(worker, None)  # it is done before
            self._note(worker, waiting[place])
        return place

    def _note(self, worker: Worker, candidate: Candidate) -> None:
        if slow(candidate.backend):
            self._importing.add(worker)
