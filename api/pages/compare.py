"""/compare and /compare/backends: speed-up over sizes, and two backends over all finals that both were in."""

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from tilewise.domain.errors import NotFoundError

from .. import comparison
from ..comparison import Size
from ..dependencies import DatabaseOfApp
from ..errors import responses
from . import compare_charts
from .compare_view import FILTERS, PATH, chosen, filtered, measured_devices, query, two, view
from .final_book import FinalBookOfApp
from .listing import address, pages

FAMILIES = 12  # charts of one page
PAGE_SIZE = 50

router = APIRouter(include_in_schema=False)
_errors = responses(500, 503)


@router.get(PATH, response_class=HTMLResponse, responses=_errors)
def sizes(request: Request, database: DatabaseOfApp, book: FinalBookOfApp) -> HTMLResponse:
    """Speed-up over torch's own choice against the number of tokens, or the hidden size, per backend."""
    at = address(PATH, request, (*FILTERS, "size", "page"))
    devices = measured_devices(database)
    device = chosen(at.get("device"), devices)
    finals = filtered(book.standing(device), at) if device else ()
    found = {size: comparison.families(finals, size) for size in Size}
    # without a word of the reader's, the size that more was measured of
    asked = at.get("size")
    size = Size(asked) if asked in list(Size) else max(Size, key=lambda each: sum(len(f.finals) for f in found[each]))
    shown = pages(at, size=FAMILIES, total=len(found[size]))
    return view(
        "compare_sizes.html",
        at,
        PATH,
        device=device,
        devices=devices,
        size=size,
        sizes=list(Size),
        families=found[size][shown.first_row - 1 : shown.last_row],
        pages=shown,
        measured=len(finals),
    )


@router.get("/compare/sizes/chart", responses=responses(404, 500, 503))
def sizes_chart(request: Request, book: FinalBookOfApp) -> Response:
    """The chart of one family."""
    at = address(PATH, request, ("device", "size", "family"))
    if at.get("size") in list(Size):
        for family in comparison.families(book.standing(at.get("device")), Size(at.get("size"))):
            if family.key == at.get("family"):
                return compare_charts.family(family).response()
    raise NotFoundError("these problems are not tuned any more; load the page again")


@router.get("/compare/backends", response_class=HTMLResponse, responses=_errors)
def backends(request: Request, database: DatabaseOfApp, book: FinalBookOfApp) -> HTMLResponse:
    """Two backends over all problems that both were measured on in one final."""
    at = address("/compare/backends", request, (*FILTERS, "a", "b", "page"))
    devices = measured_devices(database)
    device = chosen(at.get("device"), devices)
    finals = filtered(book.standing(device), at) if device else ()
    names = comparison.common_backends(finals)
    first, second = two(at, names, prefer=("triton", "cpu_tiled", "sdpa"))
    found = comparison.duel(finals, first, second)
    shown = pages(at, size=PAGE_SIZE, total=len(found.meetings))
    return view(
        "compare_backends.html",
        at,
        "/compare/backends",
        device=device,
        devices=devices,
        backends=[(name, name) for name in names],
        duel=found,
        meetings=found.meetings[shown.first_row - 1 : shown.last_row],
        pages=shown,
        bins=compare_charts.bins(found),
        chart=query(device=device, a=first, b=second, pass_=at.get("pass"), dtype=at.get("dtype")),
    )


@router.get("/compare/backends/chart", responses=_errors)
def backends_chart(request: Request, book: FinalBookOfApp) -> Response:
    """How often the first was how much faster."""
    at = address(PATH, request, (*FILTERS, "a", "b"))
    finals = filtered(book.standing(at.get("device")), at)
    return compare_charts.distribution(comparison.duel(finals, at.get("a"), at.get("b"))).response()
