"""What a benchmark of cores keeps of every problem it measured."""

import math
from dataclasses import dataclass
from datetime import datetime

from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement, NumericError, Outcome, Trial

BACKWARD_FLOPS = 2.5  # of the forward's: five products instead of two


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One invocation: where, with what, by which command, and when."""

    device: Device
    device_key: str
    software: Software
    command: str
    started: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One candidate of a final. Its ratio to the row's reference is in the measurement, with the half-width of the 95%
    interval (`spread`, a share of the ratio); `rate` is in TFLOP/s, for decoding in 10^9 bytes per second.
    """

    candidate: Candidate
    measurement: Measurement
    rate: float
    error: NumericError | None

    @property
    def ratio(self) -> float:
        return self.measurement.ratio or math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The final of one problem, fastest first, and everything that was tried for it.

    - ours: the backend of this project that is measured against the others.
    - noise: half-width of the final's ratio of the reference to itself.
    - copy_gbps: 10^9 bytes per second, read and written, of a large copy; for decoding only.
    """

    problem: Problem
    ours: str
    reference: Candidate
    entries: tuple[Entry, ...]
    noise: float
    trials: tuple[Trial, ...]
    seconds: float
    run: Run
    copy_gbps: float | None = None

    def best(self, *backends: str) -> Entry | None:
        """Return the fastest entry of any of `backends`, None where none of them is in the final."""
        found = [entry for entry in self.entries if entry.candidate.backend in backends]
        return min(found, key=lambda entry: entry.ratio, default=None)

    @property
    def others(self) -> tuple[str, ...]:
        """The backends of the final that are not ours, the fastest first."""
        names = (entry.candidate.backend for entry in self.entries)
        return tuple(dict.fromkeys(name for name in names if name != self.ours))

    def why_absent(self, backend: str) -> str | None:
        """Return why `backend` has no right result here; None where it has one."""
        trials = [trial for trial in self.trials if trial.candidate.backend == backend]
        if any(trial.outcome is Outcome.OK for trial in trials):
            return None
        return f"{trials[0].outcome}: {trials[0].message}" if trials else "not tried"


def teraflops(problem: Problem, milliseconds: float) -> float:
    """Return TFLOP/s, counting the pairs that causality and the window leave; backward 2.5 times the forward."""
    factor = 1 + BACKWARD_FLOPS if problem.pass_ is Pass.TRAINING else 1.0
    return factor * problem.forward_flops / milliseconds / 1e9
