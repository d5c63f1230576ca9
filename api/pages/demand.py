"""/demand: where clients lose GPU time for want of a tuning, and the way to one."""

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from tilewise.db.demand import DemandRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.jobs import JobRepository
from tilewise.domain.job import JobState

from ..dependencies import DatabaseOfApp
from ..errors import responses
from .listing import address, pages
from .templating import page

PATH = "/demand"
PAGE_SIZE = 50
MOST = 5000  # problems that are ranked

router = APIRouter(include_in_schema=False)


@router.get(PATH, response_class=HTMLResponse, responses=responses(500, 503))
def demand(request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """What was asked and not answered exactly, what costs most first."""
    at = address(PATH, request, ("device", "page"))
    with database.read() as session:
        repository = DemandRepository(session)
        found = repository.list(device_key=at.get("device") or None, limit=MOST)
        totals = repository.totals()
        devices = DeviceRepository(session).keys()
        waiting = {
            (one.job.device_key, one.job.problem.key): one.job.id
            for one in JobRepository(session).list(states=(JobState.RUNNING, JobState.QUEUED), limit=MOST)
        }
    shown = pages(at, size=PAGE_SIZE, total=len(found))
    return page(
        "demand.html",
        path=PATH,
        at=at,
        pages=shown,
        demands=found[shown.first_row - 1 : shown.last_row],
        lost_ms=sum(one.lost_ms for one in found),
        totals=totals,
        calls=sum(totals.values()),
        devices=[(key, key) for key in devices],
        waiting=waiting,
        base_url=str(request.base_url).rstrip("/"),
    )
