"""GET /problems: the tuned problems in a table."""

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from tilewise.db.answers import AnswerPage, AnswerRepository, Sort

from .. import describe
from ..dependencies import DatabaseOfApp
from ..errors import responses
from .listing import Address, Column, address, asked_page, headings, pages
from .templating import page

PATH = "/problems"
PAGE_SIZE = 50
DEFAULT_ORDER = "-measured"
COLUMNS = (
    Column("Problem", Sort.PROBLEM),
    Column("Device", Sort.DEVICE),
    Column("Fastest", Sort.BACKEND),
    Column("Time", Sort.EXPECTED, number=True, unit="ms"),
    Column("torch", Sort.BASELINE, number=True, unit="ms"),
    Column("Speed-up", Sort.SPEEDUP, "descending", number=True),
    Column("TFLOP/s", Sort.TFLOPS, "descending", number=True),
    Column("Trials", Sort.TRIALS, "descending", number=True),
    Column("Measured", Sort.MEASURED, "descending", number=True),
)
_ORDERS = {f"{sign}{sort}" for sort in Sort for sign in ("", "-")}

router = APIRouter(include_in_schema=False)


@router.get(PATH, response_class=HTMLResponse, responses=responses(500, 503))
def problems(request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """The table; what makes no sense in its query string is read as if it were not there."""
    at = address(PATH, request, ("q", "sort", "page"))
    order = at.get("sort", DEFAULT_ORDER)
    if order not in _ORDERS:
        order, at = DEFAULT_ORDER, Address(at.path, tuple(pair for pair in at.query if pair[0] != "sort"))
    with database.read() as session:
        found = _fetch(AnswerRepository(session), at, order, asked_page(at))
        shown = pages(at, size=PAGE_SIZE, total=found.total)
        if shown.page != asked_page(at):
            found = _fetch(AnswerRepository(session), at, order, shown.page)
    return page(
        "problems.html",
        path=PATH,
        at=at,
        order=order,
        headings=headings(COLUMNS, at, order, DEFAULT_ORDER),
        rows=[describe.row(listed) for listed in found.answers],
        pages=shown,
    )


def _fetch(answers: AnswerRepository, at: Address, order: str, number: int) -> AnswerPage:
    return answers.page(
        search=at.get("q"),
        sort=Sort(order.removeprefix("-")),
        descending=order.startswith("-"),
        offset=(number - 1) * PAGE_SIZE,
        limit=PAGE_SIZE,
    )
