"""/devices: what was measured where."""

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from tilewise.db.devices import DeviceRepository
from tilewise.db.finals import FinalRepository

from ..dependencies import DatabaseOfApp, DeviceKey
from ..errors import responses
from .final_book import FinalBookOfApp
from .listing import address, pages
from .templating import page

PATH = "/devices"
PAGE_SIZE = 50

router = APIRouter(include_in_schema=False)


@router.get(PATH, response_class=HTMLResponse, responses=responses(500, 503))
def devices(request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """All devices, those with most answers first; `q` is what the key must hold."""
    at = address(PATH, request, ("q", "page"))
    words = at.get("q").lower().split()
    with database.read() as session:
        every = DeviceRepository(session).summaries()
    found = [one for one in every if all(word in one.key for word in words)]
    shown = pages(at, size=PAGE_SIZE, total=len(found))
    return page(
        "devices.html",
        path=PATH,
        at=at,
        devices=found[shown.first_row - 1 : shown.last_row],
        pages=shown,
        total=len(every),
    )


@router.get("/devices/{device_key}/software", response_class=HTMLResponse, responses=responses(422, 500, 503))
def softwares(device_key: DeviceKey, database: DatabaseOfApp, book: FinalBookOfApp) -> HTMLResponse:
    """What software the finals of a device were held with."""
    finals = book.every(device_key)
    with database.read() as session:
        found = FinalRepository(session).softwares(finals)
    return page("softwares.html", path=PATH, device_key=device_key, softwares=found)
