"""/compare/devices and /compare/software: the problems that two devices, or two softwares of one, have in common."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from tilewise.db.finals import Final, FinalRepository, SoftwareUse
from tilewise.db.session import Database

from .. import comparison
from ..comparison import Pair
from ..dependencies import DatabaseOfApp
from ..errors import responses
from . import compare_charts
from .compare_view import PATH, chosen, filtered, measured_devices, query, two, view
from .final_book import FinalBookOfApp
from .listing import Address, address, pages

PAGE_SIZE = 50
SHORT = 12  # characters of a digest that name a software in a URL

router = APIRouter(include_in_schema=False)
_errors = responses(500, 503)


@router.get("/compare/devices", response_class=HTMLResponse, responses=_errors)
def devices(request: Request, database: DatabaseOfApp, book: FinalBookOfApp) -> HTMLResponse:
    """Two devices over the problems that were tuned on both."""
    at = address("/compare/devices", request, ("a", "b", "pass", "dtype", "page"))
    known = measured_devices(database)
    first, second = two(at, [one.key for one in known])
    found = _pairs(book.standing(first), book.standing(second), at) if first and second else ()
    return _sides(at, found, first=first, second=second, choices=[(d.key, d.key) for d in known])


@router.get("/compare/devices/chart", responses=_errors)
def devices_chart(request: Request, book: FinalBookOfApp) -> Response:
    """Time on the one against time on the other."""
    at = address(PATH, request, ("a", "b", "pass", "dtype"))
    found = _pairs(book.standing(at.get("a")), book.standing(at.get("b")), at)
    return compare_charts.sides(found, at.get("a"), at.get("b")).response()


@router.get("/compare/software", response_class=HTMLResponse, responses=_errors)
def software(request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """Two softwares of one device, over the problems that a final was held of with both."""
    at = address("/compare/software", request, ("device", "a", "b", "pass", "dtype", "page"))
    known = measured_devices(database)
    device = chosen(at.get("device"), known)
    with database.read() as session:
        used = FinalRepository(session).softwares(device) if device else ()
    first, second = _two_softwares(at, used)
    found = _software_pairs(database, device, first, second, at)
    return _sides(
        at,
        found,
        first=first.digest[:SHORT] if first else "",
        second=second.digest[:SHORT] if second else "",
        choices=[(one.digest[:SHORT], _name(one)) for one in used],
        device=device,
        devices=known,
        changed=first.software.differences(second.software) if first and second else (),
    )


@router.get("/compare/software/chart", responses=_errors)
def software_chart(request: Request, database: DatabaseOfApp) -> Response:
    """Time with the one against time with the other."""
    at = address(PATH, request, ("device", "a", "b", "pass", "dtype"))
    with database.read() as session:
        first, second = _two_softwares(at, FinalRepository(session).softwares(at.get("device")))
    found = _software_pairs(database, at.get("device"), first, second, at)
    return compare_charts.sides(found, at.get("a"), at.get("b")).response()


def _sides(
    at: Address, found: tuple[Pair, ...], *, first: str, second: str, choices: list[tuple[str, str]], **values: Any
) -> HTMLResponse:
    shown = pages(at, size=PAGE_SIZE, total=len(found))
    return view(
        "compare_sides.html",
        at,
        at.path,
        first=first,
        second=second,
        choices=choices,
        pairs=found[shown.first_row - 1 : shown.last_row],
        pages=shown,
        geomean=comparison.geomean([pair.ratio for pair in found]),
        chart=query(device=values.get("device", ""), a=first, b=second, pass_=at.get("pass"), dtype=at.get("dtype")),
        **values,
    )


def _pairs(a: tuple[Final, ...], b: tuple[Final, ...], at: Address) -> tuple[Pair, ...]:
    return comparison.pairs(filtered(a, at), filtered(b, at))


def _two_softwares(at: Address, used: tuple[SoftwareUse, ...]) -> tuple[SoftwareUse | None, SoftwareUse | None]:
    """Return the softwares that were asked for, by the beginnings of their digests; else the last two in use."""
    first, second = two(at, [one.digest[:SHORT] for one in reversed(used[:2])] if not at.get("a") else [])
    by_name = {one.digest[:SHORT]: one for one in used}
    return by_name.get(first), by_name.get(second)


def _software_pairs(
    database: Database, device: str, first: SoftwareUse | None, second: SoftwareUse | None, at: Address
) -> tuple[Pair, ...]:
    if first is None or second is None:
        return ()
    with database.read() as session:
        finals = FinalRepository(session)
        return _pairs(finals.with_software(device, first.digest), finals.with_software(device, second.digest), at)


def _name(use: SoftwareUse) -> str:
    torch, triton = use.software.torch or "no torch", use.software.triton or "none"
    return f"torch {torch}, triton {triton}, {use.last:%Y-%m-%d} ({use.digest[:8]})"
