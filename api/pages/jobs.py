"""/jobs: the queue, one job as it goes on, and the form that asks for a new one."""

from datetime import datetime

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from tilewise.db.devices import DeviceRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.trials import TrialRepository
from tilewise.domain.errors import NotFoundError
from tilewise.domain.job import BUDGETS, JobState
from tilewise.domain.problem import Problem
from tilewise.domain.trial import Outcome

from .. import documents
from ..dependencies import DatabaseOfApp
from ..errors import ParameterError, responses
from ..jobs import JobId
from .listing import Address, address
from .templating import News, page

PATH = "/jobs"
PAGE_SIZE = 50
LOG_LINES = 500

router = APIRouter(include_in_schema=False)


@router.get(PATH, response_class=HTMLResponse, responses=responses(500, 503))
def jobs(request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """The jobs, the newest first; what makes no sense in the query string is read as if it were not there."""
    at = address(PATH, request, ("state", "device", "problem", "after"))
    states = tuple(state for state in JobState if state == at.get("state"))
    with database.read() as session:
        repository = JobRepository(session)
        found = repository.page(
            states=states,
            device_key=at.get("device") or None,
            problem=_problem(at.get("problem")),
            after=_position(at),
            limit=PAGE_SIZE,
        )
        counts = repository.counts()
        mark = _mark(repository)
        devices = DeviceRepository(session).keys()
    return page(
        "jobs.html",
        path=PATH,
        news=News("/jobs/news", mark),
        at=at,
        jobs=found.items,
        next=documents.cursor_behind(found),
        states=[(state, f"{state} ({number:,})") for state, number in counts.items()],
        total=sum(counts.values()),
        devices=[(key, key) for key in devices],
    )


@router.get("/jobs/news")
def news(database: DatabaseOfApp) -> Response:
    """Whether there are other jobs, or other states, than a page of the list shows."""
    with database.read() as session:
        return documents.written({"mark": _mark(JobRepository(session))})


@router.get("/jobs/new", response_class=HTMLResponse, responses=responses(500, 503))
def new(request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """The form; the query string may fill it in."""
    at = address("/jobs/new", request, ("device", "problem"))
    with database.read() as session:
        devices = DeviceRepository(session).keys()
    return page("job_new.html", path=PATH, at=at, devices=devices, budgets=tuple(BUDGETS.values()))


@router.get("/jobs/{job_id}", response_class=HTMLResponse, responses=responses(404, 500, 503))
def job(job_id: JobId, database: DatabaseOfApp) -> HTMLResponse:
    """One job, which goes on in the browser as it goes on here."""
    with database.read() as session:
        repository = JobRepository(session)
        record = repository.get(job_id)
        if record is None:
            raise NotFoundError(f"no job {job_id}")
        events = repository.latest(job_id, limit=LOG_LINES)
        outcomes = TrialRepository(session).outcomes_of_job(job_id)
    return page(
        "job.html",
        path=PATH,
        record=record,
        job=record.job,
        events=events,
        whole=len(events) < LOG_LINES,
        outcomes=outcomes,
        ok=outcomes.get(Outcome.OK, 0),
        trials=sum(outcomes.values()),
    )


def _mark(repository: JobRepository) -> str:
    newest = repository.page(limit=1).items
    counts = ".".join(str(number) for number in repository.counts().values())
    return f"{newest[0].job.id if newest else ''}.{counts}"


def _problem(key: str) -> Problem | None:
    try:
        return Problem.parse(key) if key else None
    except ValueError:
        return None


def _position(at: Address) -> tuple[object, ...] | None:
    try:
        return documents.read_cursor(at.get("after") or None, (datetime, str))
    except ParameterError:
        return None
