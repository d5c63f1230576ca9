"""Ledger: what was tried for one problem so far, and what it says."""

import itertools
import time
from collections.abc import Callable, Iterable

from tilewise.domain.config import Candidate
from tilewise.domain.trial import Outcome, Trial

from .crew import Tried
from .progress import Progress, Spent

NOT_TRIED = (Outcome.UNSUPPORTED, Outcome.SKIPPED)  # of what was not run


class Ledger:
    """The newest trial of every candidate, and where the seconds went.

    - baseline: what every ratio is to: torch's own choice where it is right.
    - default_of: gives a backend's candidate without any search.
    - since: from when on seconds count, on the clock of time.monotonic.
    """

    def __init__(self, baseline: Candidate, default_of: Callable[[str], Candidate], *, since: float) -> None:
        self.trials: dict[Candidate, Trial] = {}
        self.baseline, self._default_of = baseline, default_of
        self._compiled, self._compile_seconds, self._seconds = 0, 0.0, 0.0
        self._began = {"start": since, "prepare": time.monotonic()}

    def begin(self, phase: str) -> None:
        """Note that a phase of the tuning begins."""
        self._began.setdefault(phase, time.monotonic())

    def add(self, trials: Iterable[Trial]) -> None:
        """Note trials that this tuning did not make itself, or did not run."""
        self.trials.update((trial.candidate, trial) for trial in trials)

    def note(self, tried: Tried) -> None:
        """Note a trial with what it cost."""
        self.add([tried.trial])
        self._compiled += tried.compiled
        self._compile_seconds += tried.compile_seconds
        self._seconds += tried.trial.seconds - tried.compile_seconds

    @property
    def right(self) -> list[Trial]:
        """Trials that were right, the fastest first."""
        return sorted((trial for trial in self.trials.values() if trial.outcome is Outcome.OK), key=ratio_of)

    @property
    def count(self) -> int:
        return sum(trial.outcome not in NOT_TRIED for trial in self.trials.values())

    @property
    def infeasible(self) -> int:
        return sum(trial.outcome is Outcome.INFEASIBLE for trial in self.trials.values())

    @property
    def failed(self) -> int:
        """How many ended badly, those that the device has not room for included."""
        return sum(trial.outcome not in (Outcome.OK, *NOT_TRIED) for trial in self.trials.values())

    @property
    def best_ratio(self) -> float:
        return min(map(ratio_of, self.trials.values()), default=float("inf"))

    def best_of(self, backend: str) -> Candidate:
        """Return the fastest candidate of a backend so far, its default where nothing of it was right yet."""
        right = (trial.candidate for trial in self.right if trial.candidate.backend == backend)
        return next(right, None) or self._default_of(backend)

    @property
    def spent(self) -> Spent:
        """Where the seconds went, up to now."""
        begun = [*self._began.items(), ("", time.monotonic())]
        took = {name: later - since for (name, since), (_, later) in itertools.pairwise(begun)}
        return Spent(
            start=took["start"],
            prepare=took.get("prepare", 0.0),
            search=took.get("search", 0.0),
            final=took.get("final", 0.0),
            compile=self._compile_seconds,
            measure=self._seconds,
        )

    def progress(self, phase: str, *, total: int, seconds_left: float, waiting: int) -> Progress:
        best = next(iter(self.right), None)
        default = None if best is None else self.trials.get(self._default_of(best.candidate.backend))
        return Progress(
            phase=phase,
            trials=self.count,
            failed=self.failed - self.infeasible,
            infeasible=self.infeasible,
            compiled=self._compiled,
            waiting=waiting,
            total=total,
            seconds_left=max(0.0, seconds_left),
            best=best,
            baseline=self.trials.get(self.baseline),
            default=default,
        )


def ratio_of(trial: Trial) -> float:
    """Return the ratio to the baseline; infinite where there is none."""
    ratio = trial.measurement.ratio if trial.measurement else None
    return float("inf") if ratio is None else ratio
