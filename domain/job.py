"""Job and Budget: a tuning that was asked for, and how much of it is allowed."""

import enum
from dataclasses import dataclass, field, replace
from datetime import datetime

from .errors import SettingsError
from .problem import Problem
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
    - seconds: wall time of the search; the final comes on top.
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

    def __post_init__(self) -> None:
        for name in ("trials", "seconds", "patience", "finalists", "rounds"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"budget {name}: expected more than 0, got {getattr(self, name)}")


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(name="quick", trials=24, seconds=20, patience=12, finalists=3, rounds=60),
        Budget(name="normal", trials=80, seconds=60, patience=30, finalists=4, rounds=100),
        Budget(name="full", trials=1000, seconds=1800, patience=1000, finalists=6, rounds=200),
    )
}


def budget_named(name: str, *, trials: int | None = None, seconds: float | None = None) -> Budget:
    """Return the budget of that name, with the limits that are given. Raises SettingsError for an unknown name."""
    budget = BUDGETS.get(name)
    if budget is None:
        raise SettingsError(f"budget: expected one of {', '.join(BUDGETS)}, got {name!r}")
    if trials is not None:
        budget = replace(budget, trials=trials, patience=max(budget.patience, trials))
    return budget if seconds is None else replace(budget, seconds=seconds)


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
