"""/compare/devices and /compare/software: what two devices, or two versions of software, have in common."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from tilewise.db.devices import DeviceRepository
from tilewise.db.finals import Final, FinalRepository, SoftwareUse, with_software
from tilewise.db.session import Database

from .. import comparison
from ..dependencies import DatabaseOfApp
from ..errors import responses
from . import compare_charts
from .compare_view import chosen, filtered, measured_devices, query, two, view
from .final_book import FinalBook, FinalBookOfApp
from .listing import Address, address, pages

PAGE_SIZE = 50
SHORT = 12  # characters of a digest that name a software in a URL
DEVICES, SOFTWARE = "/compare/devices", "/compare/software"
_FILTERS = ("a", "b", "backend", "pass", "dtype")

router = APIRouter(include_in_schema=False)
_errors = responses(500, 503)
Finals = tuple[Final, ...]


@router.get(DEVICES, response_class=HTMLResponse, responses=_errors)
def devices(request: Request, database: DatabaseOfApp, book: FinalBookOfApp) -> HTMLResponse:
    """Two devices over the problems that were tuned on both."""
    at = address(DEVICES, request, (*_FILTERS, "page"))
    keys = [one.key for one in measured_devices(database)]
    likely: tuple[str, ...] = ()
    if not (at.get("a") and at.get("b")):
        with database.read() as session:
            likely = DeviceRepository(session).most_in_common(at.get("a") or at.get("b"))
    first, second = two(at, keys, prefer=likely)
    return _page(at, _of_devices(book, first, second), first, second, choices=[(key, key) for key in keys])


@router.get(f"{DEVICES}/chart", responses=_errors)
def devices_chart(request: Request, book: FinalBookOfApp) -> Response:
    """How many times faster the second is."""
    at = address(DEVICES, request, _FILTERS)
    return _chart(at, _of_devices(book, at.get("a"), at.get("b")))


@router.get(SOFTWARE, response_class=HTMLResponse, responses=_errors)
def software(request: Request, database: DatabaseOfApp, book: FinalBookOfApp) -> HTMLResponse:
    """Two versions of the software of one device, over the problems that a final was held of with both."""
    at = address(SOFTWARE, request, ("device", *_FILTERS, "page"))
    known = measured_devices(database)
    device = chosen(at.get("device"), known)
    finals = book.every(device)
    used, first, second = _two_versions(database, finals, at)
    return _page(
        at,
        _of_versions(finals, first, second),
        first.digest[:SHORT] if first else "",
        second.digest[:SHORT] if second else "",
        choices=[(one.digest[:SHORT], _name(one)) for one in used],
        device=device,
        devices=known,
        changed=first.software.differences(second.software) if first and second else (),
    )


@router.get(f"{SOFTWARE}/chart", responses=_errors)
def software_chart(request: Request, database: DatabaseOfApp, book: FinalBookOfApp) -> Response:
    """How many times faster the second is."""
    at = address(SOFTWARE, request, ("device", *_FILTERS))
    finals = book.every(at.get("device"))
    _, first, second = _two_versions(database, finals, at)
    return _chart(at, _of_versions(finals, first, second))


def _page(at: Address, sides: tuple[Finals, Finals], first: str, second: str, **values: Any) -> HTMLResponse:
    a, b = (filtered(finals, at) for finals in sides)
    found = comparison.pairs(a, b, at.get("backend"))
    shown = pages(at, size=PAGE_SIZE, total=len(found))
    names = ("backend", "pass", "dtype")
    return view(
        "compare_sides.html",
        at,
        at.path,
        first=first,
        second=second,
        backends=[(name, name) for name in comparison.common_backends((*a, *b))],
        pairs=found[shown.first_row - 1 : shown.last_row],
        pages=shown,
        geomean=comparison.geomean([pair.ratio for pair in found]),
        chart=query(a=first, b=second, device=values.get("device", ""), **{name: at.get(name) for name in names}),
        **values,
    )


def _chart(at: Address, sides: tuple[Finals, Finals]) -> Response:
    a, b = (filtered(finals, at) for finals in sides)
    found = comparison.pairs(a, b, at.get("backend"))
    return compare_charts.sides(found, at.get("a"), at.get("b")).response()


def _of_devices(book: FinalBook, first: str, second: str) -> tuple[Finals, Finals]:
    return book.standing(first), book.standing(second)


def _of_versions(finals: Finals, first: SoftwareUse | None, second: SoftwareUse | None) -> tuple[Finals, Finals]:
    if first is None or second is None:
        return (), ()
    return with_software(finals, first.digest), with_software(finals, second.digest)


def _two_versions(
    database: Database, finals: Finals, at: Address
) -> tuple[tuple[SoftwareUse, ...], SoftwareUse | None, SoftwareUse | None]:
    """Return the software of a device by version, and the two that were asked for, by the beginnings of their digests.

    Without a word of the reader's it is the last one in use, and before it the one with most problems in common.
    """
    with database.read() as session:
        used = FinalRepository(session).softwares(finals)
    by_name = {one.digest[:SHORT]: one for one in used}
    second = by_name.get(at.get("b"), used[0] if used else None)
    others = [one for one in used if one is not second]
    likely = max(others, key=lambda one: len(one.problems & second.problems), default=None) if second else None
    return used, by_name.get(at.get("a"), likely), second


def _name(use: SoftwareUse) -> str:
    torch, triton = use.software.torch or "no torch", use.software.triton or "none"
    return f"torch {torch}, triton {triton}, {use.last:%Y-%m-%d} ({use.digest[:8]})"
