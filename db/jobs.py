"""Jobs: tunings that were asked for, from the queue to their end."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.config import Candidate
from tilewise.domain.job import Budget, Job, JobState
from tilewise.domain.problem import Problem
from tilewise.domain.trial import now

from . import references
from .models import JobRow

ENDED = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
_OPEN = (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job with what the database knows beside it.

    - attempt: how often it was started; 0 while it waits for the first time.
    - best, best_ms: the fastest candidate of the search so far and its median in milliseconds.
    """

    job: Job
    attempt: int
    started: datetime | None
    finished: datetime | None
    best: Candidate | None
    best_ms: float | None


class JobRepository:
    """Jobs in one session: queued -> running -> succeeded, failed or cancelled.

    A start hands out an attempt number, and every later write names it: a worker that lost its job, because it was
    cancelled or started again elsewhere, is told False and writes nothing.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def create(self, problem: Problem, device_key: str, budget: Budget) -> Job:
        """Queue a job and return it. Raises DeviceError where `device_key` is no device key."""
        job = Job(id=uuid.uuid4().hex, problem=problem, device_key=device_key, budget=budget)
        self._session.add(
            JobRow(
                id=job.id,
                problem_key=references.problem(self._session, problem),
                device_key=references.device(self._session, device_key),
                budget=codec.to_json(budget),
                state=job.state,
                progress=job.progress,
                message=job.message,
                attempt=0,
                created=job.created,
            )
        )
        self._session.flush()
        return job

    def start(self, job_id: str) -> int | None:
        """Move a queued job to running and return its attempt number; None when it is not queued (any more)."""
        changed = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.state == JobState.QUEUED)
            .values(state=JobState.RUNNING, attempt=JobRow.attempt + 1, started=now(), message="")
            .returning(JobRow.attempt)
        )
        return self._session.scalar(changed)

    def progress(
        self,
        job_id: str,
        attempt: int,
        *,
        progress: float,
        message: str = "",
        best: Candidate | None = None,
        best_ms: float | None = None,
    ) -> bool:
        """Note how far the search is, `progress` from 0 to 1; a best of None keeps the one noted before.

        Returns False, and notes nothing, when this attempt no longer runs: stop working.
        """
        values: dict[str, Any] = {"progress": min(max(progress, 0.0), 1.0), "message": references.clean(message)}
        if best is not None:
            values |= {"best_candidate": codec.to_json(best), "best_ms": best_ms}
        return self._change(job_id, attempt, values)

    def finish(self, job_id: str, attempt: int, state: JobState, *, message: str = "") -> bool:
        """End a running job as succeeded, failed or cancelled; False when this attempt no longer runs."""
        if state not in ENDED:
            raise ValueError(f"a job ends as {', '.join(ENDED)}, not as {state}")
        values: dict[str, Any] = {"state": state, "finished": now(), "message": references.clean(message)}
        if state is JobState.SUCCEEDED:
            values["progress"] = 1.0
        return self._change(job_id, attempt, values)

    def cancel(self, job_id: str, *, message: str = "cancelled") -> bool:
        """Cancel a job that waits or runs; False when it has ended already or does not exist."""
        changed = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.state.in_(_OPEN))
            .values(state=JobState.CANCELLED, finished=now(), message=references.clean(message))
            .returning(JobRow.id)
        )
        return self._session.scalar(changed) is not None

    def get(self, job_id: str) -> JobRecord | None:
        """Return the job, or None where there is none of that id."""
        found = self._session.execute(_select().where(JobRow.id == job_id)).one_or_none()
        return None if found is None else _record(found)

    def list(
        self, *, states: Sequence[JobState] = (), device_key: str | None = None, limit: int = 100
    ) -> tuple[JobRecord, ...]:
        """Return the newest jobs first, of some states and one device if asked."""
        query = _select().order_by(JobRow.created.desc(), JobRow.id).limit(limit)
        if states:
            query = query.where(JobRow.state.in_(states))
        if device_key is not None:
            query = query.where(JobRow.device_key == device_key)
        return tuple(_record(row) for row in self._session.execute(query))

    def _change(self, job_id: str, attempt: int, values: dict[str, Any]) -> bool:
        changed = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.state == JobState.RUNNING, JobRow.attempt == attempt)
            .values(values)
            .returning(JobRow.id)
        )
        return self._session.scalar(changed) is not None


def _select() -> Select[Any]:
    # columns, not the entity: a session's cached entity would not show what an update statement changed
    return select(*JobRow.__table__.columns)


def _record(row: Any) -> JobRecord:
    return JobRecord(
        job=Job(
            id=row.id,
            problem=Problem.parse(row.problem_key),
            device_key=row.device_key,
            budget=codec.from_json(Budget, row.budget),
            state=JobState(row.state),
            progress=row.progress,
            message=row.message,
            created=row.created,
        ),
        attempt=row.attempt,
        started=row.started,
        finished=row.finished,
        best=None if row.best_candidate is None else Candidate.from_json(row.best_candidate),
        best_ms=row.best_ms,
    )
