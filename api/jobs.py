"""/v1/jobs: queue a tuning, list, look, cancel, and watch."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from tilewise.db.jobs import JobRecord, JobRepository
from tilewise.db.session import Database
from tilewise.db.tokens import AuditRepository
from tilewise.domain import codec
from tilewise.domain.errors import ConflictError, NotFoundError
from tilewise.domain.job import JobEvent, JobState, budget_named

from . import documents
from .dependencies import Actor, DatabaseOfApp, OfDevice, OfProblem, checked_device, checked_problem
from .errors import ParameterError, responses

POLL_SECONDS = 0.5
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
JobId = Annotated[str, Path(max_length=64, pattern=r"^[0-9a-f]+$", examples=["0b5a7e9c3d1f4a6b8c0d2e4f6a8b0c1d"])]


@router.post(
    "", status_code=201, response_model=documents.JobRecord, responses=responses(422, 500, 503), summary="Queue a job"
)
def submit(wanted: documents.NewJob, database: DatabaseOfApp, actor: Actor) -> Response:
    """A worker on that device will take it: `tilewise worker`."""
    problem = checked_problem(wanted.problem, "problem")
    device_key = checked_device(wanted.device, "device")
    budget = budget_named(wanted.budget, trials=wanted.trials, seconds=wanted.seconds)
    with database.write() as session:
        jobs = JobRepository(session)
        job = jobs.create(problem, device_key, budget)
        AuditRepository(session).add(actor, "job.submit", job.id, f"{problem.key} on {device_key}")
        record = jobs.get(job.id)
    return documents.written(record, status=201, headers={"Location": f"/v1/jobs/{job.id}"})


@router.get(
    "", response_model=documents.Listed[documents.JobRecord], responses=responses(422, 500, 503), summary="All jobs"
)
def list_jobs(
    database: DatabaseOfApp,
    device: OfDevice,
    problem: OfProblem,
    state: Annotated[list[JobState] | None, Query(description="Only in one of these states.")] = None,
    order: Annotated[str, Query(pattern="^-?created$", description="`-created`: the newest first.")] = "-created",
    cursor: documents.Cursor = None,
    limit: documents.Limit = 50,
) -> Response:
    """The jobs by the time they were made."""
    after = documents.read_cursor(cursor, (datetime, str))
    with database.read() as session:
        page = JobRepository(session).page(
            states=state or (),
            device_key=device,
            problem=problem,
            descending=order.startswith("-"),
            after=after,
            limit=limit,
        )
    return documents.listed(page)


@router.get("/{job_id}", response_model=documents.JobRecord, responses=responses(404, 422, 500, 503), summary="A job")
def one_job(job_id: JobId, database: DatabaseOfApp) -> Response:
    """The job as it is now."""
    return documents.written(_job(database, job_id))


@router.delete(
    "/{job_id}", response_model=documents.JobRecord, responses=responses(404, 409, 422, 500, 503), summary="Cancel"
)
def cancel(job_id: JobId, database: DatabaseOfApp, actor: Actor) -> Response:
    """A job that waits will not start; the worker of one that runs stops within seconds. What was measured is kept."""
    _job(database, job_id)
    with database.write() as session:
        jobs = JobRepository(session)
        if not jobs.cancel(job_id, message=f"cancelled by {actor}"):
            raise ConflictError(f"job {job_id} has ended already; there is nothing to cancel")
        AuditRepository(session).add(actor, "job.cancel", job_id)
        record = jobs.get(job_id)
    return documents.written(record)


def _job(database: Database, job_id: str) -> JobRecord:
    with database.read() as session:
        record = JobRepository(session).get(job_id)
    if record is None:
        raise NotFoundError(f"no job {job_id}")
    return record


def _watched(
    job_id: JobId,
    database: DatabaseOfApp,
    last_event_id: Annotated[
        str | None, Header(max_length=20, description="The id of the last event that arrived: go on behind it.")
    ] = None,
    after: Annotated[
        int, Query(ge=0, lt=2**63, description="The same, for who cannot send the header; that one goes first.")
    ] = 0,
) -> tuple[str, int]:
    """Look before the stream begins: later there is no status to answer with."""
    if last_event_id is not None and not (last_event_id.isascii() and last_event_id.isdigit()):
        raise ParameterError("last-event-id", "expected the id of an event, a whole number")
    after = int(last_event_id or after)
    if after >= 2**63:
        raise ParameterError("last-event-id", "expected the id of an event, a whole number below 2**63")
    _job(database, job_id)
    return job_id, after


@router.get(
    "/{job_id}/events",
    response_class=EventSourceResponse,
    responses=responses(404, 422, 500, 503),
    summary="What happens to a job, as it happens",
)
async def events(
    watched: Annotated[tuple[str, int], Depends(_watched)], database: DatabaseOfApp
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events from the first one, or from behind Last-Event-ID, until the job has ended. The name of each is
    the job's state, its data the event as JSON."""
    job_id, after = watched
    while True:
        found = await run_in_threadpool(_events, database, job_id, after)
        for event in found:
            after = event.id
            yield ServerSentEvent(id=str(event.id), event=event.state, data=codec.to_json(event))
        if found and found[-1].state.ended:
            return
        if not found:
            if (await run_in_threadpool(_job, database, job_id)).job.state.ended and not await run_in_threadpool(
                _events, database, job_id, after
            ):
                return
            await asyncio.sleep(POLL_SECONDS)


def _events(database: Database, job_id: str, after: int) -> tuple[JobEvent, ...]:
    with database.read() as session:
        return JobRepository(session).events(job_id, after=after)
