"""Jobs: tunings that were asked for, from the queue to their end."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, or_, select, update
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.config import Candidate
from tilewise.domain.job import Budget, Job, JobEvent, JobState, Lease
from tilewise.domain.problem import Problem
from tilewise.domain.trial import now

from . import paging, references
from .clock import database_now
from .models import JobEventRow, JobRow, TrialRow
from .paging import Page, Position

ENDED = tuple(state for state in JobState if state.ended)
_OPEN = tuple(state for state in JobState if not state.ended)
# Workers that a job may lose before it counts as the one that kills them.
MAX_ATTEMPTS = 5
SILENCE = timedelta(hours=1)  # without a trial, after which a tuning without a lease counts as killed


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
    cancelled or started again elsewhere, is told False and writes nothing. A job that was claimed has a lease; once
    that ran out, the next claim of the device goes on with it under a new attempt number. What happens is kept as
    events.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def create(self, problem: Problem, device_key: str, budget: Budget) -> Job:
        """Queue a job and return it; those of its device that nobody can be running any more are failed.

        Raises DeviceError where `device_key` is no device key.
        """
        self._fail_silent(device_key)
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
        self._note(job.id)
        return job

    def claim(self, device_key: str, owner: str, *, lease: float) -> JobRecord | None:
        """Start the oldest job of a device that waits, or whose worker was lost, with a lease of so many seconds.

        Of several that claim at once each gets another job: PostgreSQL skips rows that another claim holds, SQLite
        lets one writer in at a time. Returns None where nothing waits. A job that lost MAX_ATTEMPTS workers is failed.
        """
        while True:
            moment = database_now(self._session)
            lost = and_(JobRow.state == JobState.RUNNING, JobRow.lease_expires < moment)
            query = (
                select(JobRow.id, JobRow.attempt, JobRow.state)
                .where(JobRow.device_key == device_key, or_(JobRow.state == JobState.QUEUED, lost))
                .order_by(JobRow.created, JobRow.id)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            found = self._session.execute(query).one_or_none()
            if found is None:
                return None
            this = JobRow.id == found.id
            if found.state == JobState.RUNNING and found.attempt >= MAX_ATTEMPTS:
                message = f"{found.attempt} workers were lost with it; look at their logs, and submit it again"
                ended = {"state": JobState.FAILED, "finished": moment, "message": message, **_NO_LEASE}
                self._session.execute(update(JobRow).where(this).values(ended))
                self._note(found.id)
                continue
            started = {
                "state": JobState.RUNNING,
                "attempt": found.attempt + 1,
                "started": moment,
                "message": f"claimed by {owner}"[:255],
                "lease_owner": owner[:255],
                "lease_expires": moment + timedelta(seconds=lease),
            }
            self._session.execute(update(JobRow).where(this).values(started))
            self._note(found.id)
            return self.get(found.id)

    def heartbeat(self, job_id: str, attempt: int, *, lease: float) -> bool:
        """Let the lease of this attempt run for so many seconds from now; False when the attempt runs no longer."""
        expires = database_now(self._session) + timedelta(seconds=lease)
        return self._change(job_id, attempt, {"lease_expires": expires})

    def holds(self, job_id: str, attempt: int) -> bool:
        """Return whether this attempt still runs, and keep it from being claimed until this transaction ends.

        What a worker writes of a job is written behind this guard, in the same transaction.
        """
        query = select(JobRow.id).where(*_attempt(job_id, attempt)).with_for_update(read=True)
        return self._session.scalar(query) is not None

    def start(self, job_id: str) -> int | None:
        """Move a queued job to running and return its attempt number; None when it is not queued (any more)."""
        changed = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.state == JobState.QUEUED)
            .values(state=JobState.RUNNING, attempt=JobRow.attempt + 1, started=now(), message="")
            .returning(JobRow.attempt)
        )
        attempt = self._session.scalar(changed)
        if attempt is not None:
            self._note(job_id)
        return attempt

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
        changed = self._change(job_id, attempt, values)
        if changed:
            self._note(job_id)
        return changed

    def finish(self, job_id: str, attempt: int, state: JobState, *, message: str = "") -> bool:
        """End a running job as succeeded, failed or cancelled; False when this attempt no longer runs."""
        if state not in ENDED:
            raise ValueError(f"a job ends as {', '.join(ENDED)}, not as {state}")
        values: dict[str, Any] = {"state": state, "finished": now(), "message": references.clean(message)}
        if state is JobState.SUCCEEDED:
            values["progress"] = 1.0
        changed = self._change(job_id, attempt, values | _NO_LEASE)
        if changed:
            self._note(job_id)
        return changed

    def release(self, job_id: str, attempt: int, *, message: str) -> bool:
        """Put a running job back into the queue; False when this attempt no longer runs."""
        values = {"state": JobState.QUEUED, "message": references.clean(message), **_NO_LEASE}
        changed = self._change(job_id, attempt, values)
        if changed:
            self._note(job_id)
        return changed

    def cancel(self, job_id: str, *, message: str = "cancelled") -> bool:
        """Cancel a job that waits or runs; False when it has ended already or does not exist."""
        changed = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.state.in_(_OPEN))
            .values(state=JobState.CANCELLED, finished=now(), message=references.clean(message), **_NO_LEASE)
            .returning(JobRow.id)
        )
        if self._session.scalar(changed) is None:
            return False
        self._note(job_id)
        return True

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

    def page(
        self,
        *,
        states: Sequence[JobState] = (),
        device_key: str | None = None,
        problem: Problem | None = None,
        descending: bool = True,
        after: Position | None = None,
        limit: int = 50,
    ) -> Page[JobRecord]:
        """Return a page of the jobs by the time they were made, of some states, one device, one problem if asked."""
        query = _select()
        if states:
            query = query.where(JobRow.state.in_(states))
        if device_key is not None:
            query = query.where(JobRow.device_key == device_key)
        if problem is not None:
            query = query.where(JobRow.problem_key == problem.key)
        order = (JobRow.created.expression, JobRow.id.expression)
        return paging.page(self._session, query, order, _record, descending=descending, after=after, limit=limit)

    def counts(self) -> dict[JobState, int]:
        """Return how many jobs are in each state."""
        found = dict.fromkeys(JobState, 0)
        for state, number in self._session.execute(select(JobRow.state, func.count()).group_by(JobRow.state)):
            found[JobState(state)] = number
        return found

    def events(self, job_id: str, *, after: int = 0, limit: int = 500) -> tuple[JobEvent, ...]:
        """Return what happened to a job after the event of that id, in order."""
        query = select(JobEventRow).where(JobEventRow.job_id == job_id, JobEventRow.id > after)
        return tuple(_event(row) for row in self._session.scalars(query.order_by(JobEventRow.id).limit(limit)))

    def latest(self, job_id: str, *, limit: int = 500) -> tuple[JobEvent, ...]:
        """Return what happened to a job last, the newest first."""
        query = select(JobEventRow).where(JobEventRow.job_id == job_id).order_by(JobEventRow.id.desc())
        return tuple(_event(row) for row in self._session.scalars(query.limit(limit)))

    def _fail_silent(self, device_key: str) -> None:
        """End the tunings of a device that were killed: `tilewise tune` has no lease that would say so."""
        moment = database_now(self._session)
        heard = select(TrialRow.id).where(TrialRow.job_id == JobRow.id, TrialRow.tried > moment - SILENCE).exists()
        message = "nothing was heard of it for an hour; the same command goes on from its finished trials"
        silent = (
            update(JobRow)
            .where(JobRow.device_key == device_key, JobRow.state == JobState.RUNNING, JobRow.lease_owner.is_(None))
            .where(JobRow.started < moment - SILENCE, ~heard)
            .values(state=JobState.FAILED, finished=moment, message=message)
            .returning(JobRow.id)
        )
        for job_id in self._session.scalars(silent).all():
            self._note(job_id)

    def _note(self, job_id: str) -> None:
        """Keep as an event what the job is now."""
        row = self._session.execute(
            select(JobRow.attempt, JobRow.state, JobRow.progress, JobRow.message).where(JobRow.id == job_id)
        ).one()
        self._session.add(
            JobEventRow(job_id=job_id, attempt=row[0], state=row[1], progress=row[2], message=row[3], at=now())
        )
        self._session.flush()

    def _change(self, job_id: str, attempt: int, values: dict[str, Any]) -> bool:
        changed = update(JobRow).where(*_attempt(job_id, attempt)).values(values).returning(JobRow.id)
        return self._session.scalar(changed) is not None


_NO_LEASE = {"lease_owner": None, "lease_expires": None}


def _attempt(job_id: str, attempt: int) -> tuple[ColumnElement[bool], ...]:
    return JobRow.id == job_id, JobRow.state == JobState.RUNNING, JobRow.attempt == attempt


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
            lease=None
            if row.lease_owner is None
            else Lease(owner=row.lease_owner, attempt=row.attempt, expires=row.lease_expires),
            created=row.created,
        ),
        attempt=row.attempt,
        started=row.started,
        finished=row.finished,
        best=None if row.best_candidate is None else Candidate.from_json(row.best_candidate),
        best_ms=row.best_ms,
    )


def _event(row: JobEventRow) -> JobEvent:
    return JobEvent(
        id=row.id,
        attempt=row.attempt,
        state=JobState(row.state),
        progress=row.progress,
        message=row.message,
        at=row.at,
    )
