"""Job and Budget: a tuning that was asked for, and how much of it is allowed."""

import enum
from dataclasses import dataclass, field, replace
from datetime import datetime

from .device import DeviceKind
from .errors import SettingsError
from .problem import Pass, Problem
from .trial import now


class JobState(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long a search may go on: it stops at the first limit it meets.

    - trials: configs tried, over all backends, defaults included.
    - seconds: wall time of the search; start and final come on top.
    - stretch: a training problem, which has three roles, and a CPU, which compiles nothing ahead, get so many times the
      seconds.
    - patience: trials without a better one before the search counts as settled.
    - finalists: candidates in the interleaved final, beside the default and the standing answer.
    - rounds: interleaved calls of each finalist.
    """

    name: str
    trials: int
    seconds: float
    patience: int
    finalists: int
    rounds: int
    stretch: float = 1.0

    def __post_init__(self) -> None:
        for name in ("trials", "seconds", "patience", "finalists", "rounds", "stretch"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"budget {name}: expected more than 0, got {getattr(self, name)}")

    def seconds_for(self, problem: Problem, kind: DeviceKind) -> float:
        """Return the wall time of a search of `problem` on a device of that kind."""
        longer = problem.pass_ is Pass.TRAINING or kind is DeviceKind.CPU
        return self.seconds * (self.stretch if longer else 1.0)


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(name="quick", trials=64, seconds=8, stretch=2.5, patience=40, finalists=4, rounds=60),
        Budget(name="normal", trials=320, seconds=34, stretch=2.5, patience=120, finalists=6, rounds=100),
        Budget(name="full", trials=4000, seconds=1800, patience=4000, finalists=8, rounds=200),
    )
}


def budget_named(name: str, *, trials: int | None = None, seconds: float | None = None) -> Budget:
    """Return the budget of that name, with the limits that are given: these seconds are not stretched.

    Raises SettingsError for an unknown name.
    """
    budget = BUDGETS.get(name)
    if budget is None:
        raise SettingsError(f"budget: expected one of {', '.join(BUDGETS)}, got {name!r}")
    if trials is not None:
        budget = replace(budget, trials=trials, patience=max(budget.patience, trials))
    return budget if seconds is None else replace(budget, seconds=seconds, stretch=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Which worker holds a job, until when; `attempt` guards its writes against a worker that came back late."""

    owner: str
    attempt: int
    expires: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    id: str
    problem: Problem
    device_key: str
    budget: Budget
    state: JobState = JobState.QUEUED
    progress: float = 0.0
    message: str = ""
    lease: Lease | None = None
    created: datetime = field(default_factory=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that happened to a job. `id` grows with time; `progress` is from 0 to 1."""

    id: int
    attempt: int
    state: JobState
    progress: float
    message: str
    at: datetime
