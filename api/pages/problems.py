"""GET /problems: the tuned problems in a table, and the same list as CSV and JSON."""

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from tilewise.db.answer_lists import AnswerFilter, AnswerListRepository, Facets, Masking, Sort
from tilewise.db.answers import AnswerRepository

from .. import describe
from ..dependencies import DatabaseOfApp
from ..errors import responses
from . import export
from .listing import Address, Choice, Column, address, asked_page, headings, pages
from .templating import News, page

PATH = "/problems"
PAGE_SIZE = 50
COLUMNS = (
    Column("Problem", Sort.PROBLEM),
    Column("Device", Sort.DEVICE),
    Column("Fastest", Sort.BACKEND),
    Column("Time", Sort.EXPECTED, number=True, unit="ms"),
    Column("TFLOP/s", Sort.TFLOPS, "descending", number=True),
    Column("Over torch", Sort.SPEEDUP, "descending", number=True),
    Column("Over default", Sort.DEFAULT, "descending", number=True),
    Column("Match"),
    Column("Evidence", Sort.TRIALS, "descending", number=True, unit="trials"),
    Column("Age", Sort.MEASURED, "descending", number=True),
)
MASKING = (
    (Masking.FULL, "full"),
    (Masking.CAUSAL, "causal"),
    (Masking.WINDOW, "window"),
    (Masking.BOOL, "bool mask"),
    (Masking.BIAS, "additive bias"),
    (Masking.ALIBI, "ALiBi"),
)
_DEFAULT_ORDER = "-measured"
_ORDERS = {f"{sign}{sort}" for sort in Sort for sign in ("", "-")}
_MATCHES = ("exact", "stale")
_FILTERS = ("device", "backend", "pass", "dtype", "mask", "head_dim", "match")

router = APIRouter(include_in_schema=False)


@router.get(PATH, response_class=HTMLResponse, responses=responses(500, 503))
def problems(request: Request, database: DatabaseOfApp) -> Response:
    """The table; what makes no sense in its query string is read as if it were not there."""
    at = _address(request)
    sort, descending = _order(at)
    number = asked_page(at)
    with database.read() as session:
        lists = AnswerListRepository(session)
        found = lists.page(
            _wanted(at), sort=sort, descending=descending, offset=(number - 1) * PAGE_SIZE, limit=PAGE_SIZE
        )
        facets = lists.facets()
        mark = AnswerRepository(session).newest()
    shown = pages(at, size=PAGE_SIZE, total=found.total)
    if shown.page != number:
        return RedirectResponse(at.to(page=shown.page if shown.page > 1 else None), 302)
    order = at.get("sort", _DEFAULT_ORDER)
    return page(
        "problems.html",
        path=PATH,
        news=News("/news", str(mark)),
        at=at,
        narrowed=[(name, at.get(name)) for name in ("q", *_FILTERS) if at.get(name)],
        choices=_choices(facets),
        headings=headings(COLUMNS, at, order, _DEFAULT_ORDER),
        rows=[describe.row(listed) for listed in found.answers],
        pages=shown,
    )


@router.get(f"{PATH}.csv")
def as_csv(request: Request, database: DatabaseOfApp) -> Response:
    """Every row of the filtered list, not only those of one page."""
    at = _address(request)
    sort, descending = _order(at)
    return export.csv(database, _wanted(at), sort=sort, descending=descending)


@router.get(f"{PATH}.json")
def as_json(request: Request, database: DatabaseOfApp) -> Response:
    """The same as a JSON list of objects."""
    at = _address(request)
    sort, descending = _order(at)
    return export.json(database, _wanted(at), sort=sort, descending=descending)


def _address(request: Request) -> Address:
    at = address(PATH, request, ("q", *_FILTERS, "sort", "page"))
    known = {
        "sort": _ORDERS,
        "mask": {str(kind) for kind, _ in MASKING},
        "match": _MATCHES,
    }
    dim = at.get("head_dim")
    sensible = [
        (name, value)
        for name, value in at.query
        if value in known.get(name, (value,)) and (name != "head_dim" or (dim.isdecimal() and len(dim) < 7))
    ]
    return Address(at.path, tuple(sensible))


def _order(at: Address) -> tuple[Sort, bool]:
    order = at.get("sort", _DEFAULT_ORDER)
    return Sort(order.removeprefix("-")), order.startswith("-")


def _wanted(at: Address) -> AnswerFilter:
    given = dict(at.query)
    return AnswerFilter(
        search=at.get("q"),
        device_key=given.get("device"),
        backend=given.get("backend"),
        pass_=given.get("pass"),
        dtype=given.get("dtype"),
        masking=Masking(given["mask"]) if "mask" in given else None,
        head_dim=int(given["head_dim"]) if "head_dim" in given else None,
        stale=given["match"] == "stale" if "match" in given else None,
    )


def _choices(facets: Facets) -> tuple[Choice, ...]:
    """Return the filters."""

    def counted(values: tuple[tuple[object, int], ...]) -> tuple[tuple[str, str], ...]:
        return tuple((str(value), f"{value} ({number:,})") for value, number in values)

    return (
        Choice("device", "Device", counted(facets.devices)),
        Choice("backend", "Backend", counted(facets.backends)),
        Choice("pass", "Pass", counted(facets.passes)),
        Choice("dtype", "Dtype", counted(facets.dtypes)),
        Choice("mask", "Mask", tuple((str(kind), label) for kind, label in MASKING)),
        Choice("head_dim", "head_dim", counted(facets.head_dims)),
        Choice("match", "Match", tuple((name, name) for name in _MATCHES)),
    )
