"""What the pages of comparisons share: their parts, filters, and what is chosen where the reader has not said."""

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlencode

from starlette.responses import HTMLResponse

from tilewise.db.devices import DeviceRepository, DeviceSummary
from tilewise.db.finals import Final
from tilewise.db.session import Database
from tilewise.domain.problem import Dtype, Pass

from .listing import Address
from .templating import page

PATH = "/compare"
FILTERS = ("device", "pass", "dtype")
_PARTS = (
    ("Sizes", PATH),
    ("Two backends", "/compare/backends"),
    ("Two devices", "/compare/devices"),
    ("Two versions", "/compare/software"),
)


def view(
    template: str, at: Address, part: str, *, devices: Sequence[DeviceSummary] = (), **values: Any
) -> HTMLResponse:
    """Return one of the pages; `part` is its address, `devices` are those that it offers."""
    return page(
        template,
        path=PATH,
        charts=True,
        at=at,
        part=part,
        parts=_PARTS,
        devices=[(one.key, one.key) for one in devices],
        passes=[(each, each) for each in Pass],
        dtypes=[(each, each) for each in Dtype],
        **values,
    )


def measured_devices(database: Database) -> tuple[DeviceSummary, ...]:
    """Return the devices that have answers, those with most first."""
    with database.read() as session:
        return tuple(one for one in DeviceRepository(session).summaries() if one.answers)


def chosen(asked: str, devices: Sequence[DeviceSummary]) -> str:
    """Return the key that was asked for where it is one of `devices`, else the first; empty where there is none."""
    keys = [one.key for one in devices]
    return asked if asked in keys else next(iter(keys), "")


def two(at: Address, names: Sequence[str], *, prefer: tuple[str, ...] = ()) -> tuple[str, str]:
    """Return the names that were asked for as `a` and `b`; what was not is one of `prefer`, then of `names`."""
    rest = [name for name in (*prefer, *names) if name in names and name not in (at.get("a"), at.get("b"))]
    rest = list(dict.fromkeys(rest))
    first = at.get("a") or (rest.pop(0) if rest else "")
    return first, at.get("b") or (rest.pop(0) if rest else "")


def filtered(finals: Iterable[Final], at: Address) -> tuple[Final, ...]:
    """Return the finals of the pass and dtype that were asked for."""
    return tuple(
        final
        for final in finals
        if at.get("pass") in ("", final.problem.pass_) and at.get("dtype") in ("", final.problem.dtype)
    )


def query(**values: str) -> str:
    """Return a query string of the values that are not empty; `pass_` is `pass`."""
    return urlencode({name.rstrip("_"): value for name, value in values.items() if value})
