"""Lists that are read page by page: a page says where the next one begins, whatever is written in between."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, tuple_
from sqlalchemy.orm import Session

T = TypeVar("T")
Position = tuple[Any, ...]  # the values of the columns that a list is sorted by, in its last row


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some of a list, and the position after which the next page begins; None at the end."""

    items: tuple[T, ...]
    next: Position | None


def page(
    session: Session,
    query: Select[*tuple[Any, ...]],
    columns: tuple[ColumnElement[Any], ...],
    build: Callable[[Any], T],
    *,
    descending: bool,
    after: Position | None,
    limit: int,
) -> Page[T]:
    """Return up to `limit` rows of `query` after a position, sorted by `columns`, which together are unique.

    Comparing a row value with the position lets the index of the columns answer, at any depth of the list.
    """
    if after is not None:
        place = tuple_(*after)
        query = query.where(tuple_(*columns) < place if descending else tuple_(*columns) > place)
    query = query.order_by(*(column.desc() if descending else column.asc() for column in columns))
    rows = session.execute(query.add_columns(*columns).limit(limit + 1)).all()
    kept = rows[:limit]
    position = tuple(kept[-1][-len(columns) :]) if len(rows) > limit else None
    return Page(tuple(build(row) for row in kept), position)
