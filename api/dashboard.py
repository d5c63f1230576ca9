"""GET /: the tuned problems, as a page for people."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import jinja2
from fastapi import APIRouter, Query
from starlette.responses import HTMLResponse

import tilewise
from tilewise.db.answers import AnswerPage, AnswerRepository, Sort

from . import describe
from .dependencies import DatabaseOfApp
from .errors import responses

PAGE_SIZE = 50
MAX_SEARCH = 200

router = APIRouter(include_in_schema=False)
_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

# What a click on a heading sorts by first: names from A, numbers from the interesting end.
_COLUMNS = (
    ("Problem", Sort.PROBLEM, False),
    ("Device", Sort.DEVICE, False),
    ("Fastest", Sort.BACKEND, False),
    ("Expected", Sort.EXPECTED, False),
    ("torch", Sort.BASELINE, False),
    ("Speed-up", Sort.SPEEDUP, True),
    ("TFLOP/s", Sort.TFLOPS, True),
    ("Trials", Sort.TRIALS, True),
    ("Measured", Sort.MEASURED, True),
)
_ORDERS = (
    ("-measured", "Newest first"),
    ("measured", "Oldest first"),
    ("-speedup", "Largest speed-up"),
    ("speedup", "Smallest speed-up"),
    ("expected", "Shortest time"),
    ("-expected", "Longest time"),
    ("baseline", "Shortest time of torch"),
    ("-baseline", "Longest time of torch"),
    ("-tflops", "Most TFLOP/s"),
    ("tflops", "Fewest TFLOP/s"),
    ("-trials", "Most trials"),
    ("trials", "Fewest trials"),
    ("problem", "Problem, A to Z"),
    ("-problem", "Problem, Z to A"),
    ("device", "Device, A to Z"),
    ("-device", "Device, Z to A"),
    ("backend", "Backend, A to Z"),
    ("-backend", "Backend, Z to A"),
)
_DEFAULT_ORDER = "-measured"


@dataclass(frozen=True, slots=True)
class View:
    """Which part of the list is looked at; all of it is in the URL, so that a view can be kept and sent."""

    search: str
    order: str
    page: int

    @property
    def sort(self) -> Sort:
        return Sort(self.order.removeprefix("-"))

    @property
    def descending(self) -> bool:
        return self.order.startswith("-")

    def link(self, *, order: str | None = None, page: int = 1) -> str:
        """Return the query string of this view in another order or at another page."""
        order = order or self.order
        parts = {"q": self.search, "sort": order if order != _DEFAULT_ORDER else "", "page": page if page > 1 else ""}
        return "?" + urlencode({name: value for name, value in parts.items() if value})


@dataclass(frozen=True, slots=True)
class Heading:
    """One heading of the table: a click on it opens `link`; `direction` is its aria-sort, None where not sorted."""

    label: str
    link: str
    direction: str | None


@router.get("/", response_class=HTMLResponse, responses=responses(500, 503))
def dashboard(
    database: DatabaseOfApp,
    q: str = "",
    sort: str = _DEFAULT_ORDER,
    page: Annotated[str, Query()] = "1",
) -> HTMLResponse:
    """The page; what makes no sense in its query string is read as if it were not there."""
    order = sort if sort in dict(_ORDERS) else _DEFAULT_ORDER
    view = View(" ".join(q.split())[:MAX_SEARCH], order, int(page) if page.isdecimal() and len(page) < 7 else 1)
    with database.read() as session:
        found = _fetch(AnswerRepository(session), view)
        last = max(1, math.ceil(found.total / PAGE_SIZE))
        if view.page > last or view.page < 1:
            view = View(view.search, view.order, min(max(view.page, 1), last))
            found = _fetch(AnswerRepository(session), view)
    html = _templates.get_template("answers.html").render(
        version=tilewise.__version__,
        view=view,
        orders=_ORDERS,
        headings=_headings(view),
        rows=[describe.row(listed) for listed in found.answers],
        total=found.total,
        first=(view.page - 1) * PAGE_SIZE + 1,
        last_page=last,
    )
    return HTMLResponse(html, headers={"Cache-Control": "no-cache"})


def _fetch(answers: AnswerRepository, view: View) -> AnswerPage:
    return answers.page(
        search=view.search,
        sort=view.sort,
        descending=view.descending,
        offset=max(view.page - 1, 0) * PAGE_SIZE,
        limit=PAGE_SIZE,
    )


def _headings(view: View) -> list[Heading]:
    made = []
    for label, sort, descending_first in _COLUMNS:
        chosen = view.sort is sort
        descending = not view.descending if chosen else descending_first
        direction = ("descending" if view.descending else "ascending") if chosen else None
        made.append(Heading(label, view.link(order=f"-{sort}" if descending else str(sort)), direction))
    return made
