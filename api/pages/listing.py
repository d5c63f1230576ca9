"""Lists whose whole state is in the URL, so that a view can be kept and sent: filters, order, page."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from starlette.requests import Request

MAX_VALUE = 200  # characters of one filter


@dataclass(frozen=True, slots=True)
class Address:
    """A page with the query string that it is looked at by; what has its default value is not in it."""

    path: str
    query: tuple[tuple[str, str], ...] = ()

    def get(self, name: str, default: str = "") -> str:
        return dict(self.query).get(name, default)

    def to(self, changes: Mapping[str, object] | None = None, /, **more: object) -> str:
        """Return the link to the same page with some values changed; None or an empty one leaves a value out.

        Whatever else changes, the list begins at its first page again.
        """
        changed = {"page": None, **(changes or {}), **more}
        values = {name: value for name, value in self.query if name not in changed}
        values |= {name: str(value) for name, value in changed.items() if value not in (None, "")}
        return self.path + ("?" + urlencode(values) if values else "")

    def without(self, *names: str) -> str:
        return self.to(dict.fromkeys(names))

    @property
    def query_string(self) -> str:
        """What stands behind the path, its question mark included; nothing where all is as by default."""
        return "?" + urlencode(self.query) if self.query else ""


@dataclass(frozen=True, slots=True)
class Heading:
    """One heading of a table: a click on it opens `link`, where it can be sorted by; `direction` is its aria-sort."""

    label: str
    number: bool = False
    unit: str = ""
    link: str | None = None
    direction: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A column as a page declares it. `first` is how a first click sorts: names from A, numbers from the best end."""

    label: str
    sort: str = ""
    first: str = "ascending"
    number: bool = False
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A filter: the parameter's name, what people call it, and its values with their labels."""

    name: str
    label: str
    options: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Pages:
    """Where in a list one is. Rows are counted from 1."""

    page: int
    size: int
    total: int

    @property
    def last(self) -> int:
        return max(1, math.ceil(self.total / self.size))

    @property
    def first_row(self) -> int:
        return (self.page - 1) * self.size + 1

    @property
    def last_row(self) -> int:
        return min(self.page * self.size, self.total)


def address(path: str, request: Request, known: Iterable[str]) -> Address:
    """Return how `request` looks at a page: the values of the known parameters, white space tidied, none of them empty.

    `path` is quoted here: a page about something has its key in its path.
    """
    found = []
    for name in known:
        # PostgreSQL takes no NUL in a text
        value = " ".join(request.query_params.get(name, "").replace("\0", " ").split())[:MAX_VALUE]
        if value:
            found.append((name, value))
    return Address(quote(path), tuple(found))


def asked_page(where: Address) -> int:
    """Return the number of the page that was asked for, 1 where it is no number."""
    asked = where.get("page")
    return max(1, int(asked)) if asked.isascii() and asked.isdecimal() and len(asked) < 7 else 1


def pages(where: Address, *, size: int, total: int) -> Pages:
    """Return the page that was asked for, or the last one where the list ends before."""
    found = Pages(asked_page(where), size, total)
    return Pages(min(found.page, found.last), size, total)


def headings(columns: Iterable[Column], where: Address, order: str, default: str) -> tuple[Heading, ...]:
    """Return the headings of a table; `order` is a name that is sorted by, with a minus where it descends."""
    made = []
    for column in columns:
        if not column.sort:
            made.append(Heading(column.label, column.number, column.unit))
            continue
        chosen = order.removeprefix("-") == column.sort
        descending = not order.startswith("-") if chosen else column.first == "descending"
        following = f"-{column.sort}" if descending else column.sort
        direction = ("descending" if order.startswith("-") else "ascending") if chosen else None
        link = where.to(sort=None if following == default else following)
        made.append(Heading(column.label, column.number, column.unit, link, direction))
    return tuple(made)
