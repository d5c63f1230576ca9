"""Answer: which plan to run for a problem, and how much that can be trusted."""

import enum
from dataclasses import dataclass, field
from datetime import datetime

from .config import Candidate, Plan
from .problem import Problem
from .software import Software
from .trial import Measurement


class Match(enum.StrEnum):
    """How well the evidence fits the question, best first."""

    EXACT = "exact"
    STALE = "stale"
    NEAR = "near"
    PREDICTED = "predicted"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """One candidate's result in an interleaved final; `default` where it is the config that its backend has unasked."""

    candidate: Candidate
    measurement: Measurement
    default: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The interleaved final an answer rests on.

    - noise: half-width of the final's ratio of a candidate to itself, as a share; differences below it mean nothing.
    - trials, failed: how much was searched, and how much of that failed.
    - reference: the candidate every ratio is taken against.
    - reason: one sentence that says why this plan was chosen.
    """

    job: str | None
    measured: datetime
    reference: Candidate
    finalists: tuple[Finalist, ...]
    noise: float
    trials: int
    failed: int
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to run for `problem` on `device_key`.

    - match: how the answer was found; `missed` names the field that kept a better match away, empty for exact.
    - measured: the problem the evidence is about: `problem` itself, or its bucket, or a near one; None for default.
    - measured_on: the device the evidence is about, where that is another one: only for predicted.
    - expected_ms, interval: time of the plan with its 20th and 80th percentile; None for predicted and default.
    - regret: share of time lost against the best plan that holds 9 times in 10; None where nothing says.
      exact: 0. near and predicted: from models fitted on measured landscapes (domain/transfer.py).
      stale: of the device's answers that replaced or confirmed one of other software, what that one lost
      (`stale_loss`). default: what torch's own choice lost of the device's tuned problems of the same pass.
      Both are the order statistic that a further one of the same kind stays below 9 times in 10
      (domain/experience.py), which takes nine of them: with fewer it is None.
    - baseline_ms: time of torch's own choice in the same final.
    - stale_loss: what share of time the answer before this one, measured with other software, was seen to lose in the
      final of this one; None where there was none, or it was of the same software.
    - version: counts the changes of this answer; a write names the version it replaces.
    """

    problem: Problem
    device_key: str
    plan: Plan
    match: Match
    version: int = 0
    measured: Problem | None = None
    measured_on: str | None = None
    software: Software = field(default_factory=Software)
    expected_ms: float | None = None
    interval: tuple[float, float] | None = None
    regret: float | None = None
    runner_up: Candidate | None = None
    baseline_ms: float | None = None
    stale_loss: float | None = None
    evidence: Evidence | None = None
    missed: str = ""

    @property
    def speedup(self) -> float | None:
        """How many times faster than torch's own choice in the final; None where nothing was measured."""
        if self.evidence is None or self.expected_ms is None or self.baseline_ms is None:
            return None
        return self.baseline_ms / self.expected_ms

    @property
    def default_speedup(self) -> float | None:
        """How many times faster than the default config of the forward's own backend in the same final.

        None where that has no parameters, or its default was not in the final.
        """
        finalists = self.evidence.finalists if self.evidence else ()
        forward = self.plan.forward
        won = next((each.measurement.ratio for each in finalists if each.candidate == forward), None)
        defaults = [
            each.measurement.ratio for each in finalists if each.default and each.candidate.backend == forward.backend
        ]
        return defaults[0] / won if won and defaults and defaults[0] else None
