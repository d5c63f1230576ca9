"""Pages from templates: one environment, the words and figures that templates ask for, and `page`, which every route
of the dashboard returns."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse, JSONResponse

import tilewise
from tilewise.domain.software import Software
from tilewise.domain.trial import now

from .. import assets, describe
from ..access import current_caller
from ..landscape import spelled

# Every page that exists, in the order of the bar at the top.
NAVIGATION = (
    ("Overview", "/"),
    ("Problems", "/problems"),
    ("Compare", "/compare"),
    ("Jobs", "/jobs"),
    ("Devices", "/devices"),
    ("Snapshots", "/snapshots"),
    ("Demand", "/demand"),
    ("Tokens", "/tokens"),
)
_AGES = ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute"))


@dataclass(frozen=True, slots=True)
class News:
    """What tells a page that it is out of date: `mark` is what the page shows, `url` says what there is by now.

    `url` answers {"mark": "..."}; where that differs, a notice offers to load the page again.
    """

    url: str
    mark: str


def page(
    template: str, *, path: str, status: int = 200, news: News | None = None, charts: bool = False, **values: object
) -> HTMLResponse:
    """Return a page.

    - path: which entry of NAVIGATION it belongs to; empty for none.
    - charts: whether it draws any, and so needs plotly's bundle.
    - values: what its template is about.
    """
    html = _environment.get_template(template).render(
        path=path, news=news, charts=charts, visitor=current_caller.get(), **values
    )
    return HTMLResponse(html, status_code=status, headers={"Cache-Control": "no-cache"})


def marked(mark: object) -> JSONResponse:
    """Return what the `url` of a News answers."""
    return JSONResponse({"mark": str(mark)}, headers={"Cache-Control": "no-cache"})


def moment(when: datetime) -> Markup:
    """Return a time element in UTC; times.js turns it into local time, with UTC as its title."""
    utc = when.astimezone(UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(
        utc.isoformat(timespec="seconds"), utc.strftime("%Y-%m-%d %H:%M")
    )


def age(when: datetime) -> Markup:
    """Return how long ago something was, as a time element whose title is the moment itself."""
    seconds = (now() - when).total_seconds()
    text = "just now"
    for length, name in _AGES:
        if seconds >= length:
            count = int(seconds // length)
            text = f"{count} {name}{'' if count == 1 else 's'} ago"
            break
    utc = when.astimezone(UTC)
    return Markup('<time datetime="{}" data-age title="{} UTC">{}</time>').format(
        utc.isoformat(timespec="seconds"), utc.strftime("%Y-%m-%d %H:%M"), text
    )


def breakable(text: str) -> Markup:
    """Return a key that may break after its dots, and nowhere else."""
    return Markup(".<wbr>").join(text.split("."))


def tokens(values: Iterable[tuple[str, object]]) -> Markup:
    """Return parameters as a row of small labels: `block_m 128`, `num_warps 8`."""
    label = Markup('<span class="token"><span>{}</span> <b>{}</b></span>')
    return Markup(" ").join(label.format(name, escape(value)) for name, value in values)


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{describe.figure(number)} {unit}"
        number /= 1024
    return f"{describe.figure(number)} TiB"


def _versions(software: Software) -> str:
    """Return versions in one line: `torch 2.11.0, triton 3.6.0`; hashes of kernels are left to the API."""
    names = ("torch", "triton", "cuda", "driver", "cudnn", "flash_attn", "cute_dsl")
    found = [f"{name} {version}" for name in names if (version := getattr(software, name)) is not None]
    return ", ".join(found) or "software that was not recorded"


def hours(milliseconds: float) -> str:
    """Return a long time of a device in the unit that suits it: `3.4 h`, `12 min`, `8 s`."""
    seconds = milliseconds / 1000
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{describe.figure(seconds / length)} {unit}"
    return f"{describe.figure(seconds)} s" if seconds else "0 s"


def short(number: int) -> str:
    """Return a large count in few characters: `1.2 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _make() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        moment=moment,
        age=age,
        breakable=breakable,
        tokens=tokens,
        figure=describe.figure,
        ms=describe.milliseconds,
        factor=describe.factor,
        count=lambda number: f"{number:,}",
        counted=_counted,
        percent=describe.percent,
        words=lambda name: name.replace("_", " "),
        bytes=_bytes,
        tera=lambda number: describe.figure(number / 1e12),
        versions=_versions,
        space_options=lambda spaces: [(space.name, f"{space.label}: {number:,}") for space, number in spaces],
        parameter_options=lambda parameters: [(each.name, each.name) for each in parameters],
        value_options=lambda values: [(spelled(value), spelled(value)) for value in values],
        hours=hours,
        short=short,
        link_of=lambda final: describe.link(final.device_key, final.problem),
        answer_link=lambda answer: describe.link(answer.device_key, answer.problem),
        title_of=describe.title,
        sizes_of=describe.sizes,
        backend_class=describe.backend_class,
    )
    made.globals.update(
        version=tilewise.__version__, navigation=NAVIGATION, asset=assets.asset_url, guarded=assets.guarded_styles
    )
    return made


_environment = _make()
