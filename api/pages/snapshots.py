"""/snapshots: what was frozen, the channels that point at it, what differs between two, and who runs which."""

from datetime import datetime

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from tilewise.db.devices import DeviceRepository
from tilewise.db.pins import PinRepository
from tilewise.db.snapshots import ChannelRepository, DifferencePage, SnapshotRepository
from tilewise.domain.errors import NotFoundError
from tilewise.domain.snapshot import is_snapshot_id

from .. import documents
from ..dependencies import DatabaseOfApp
from ..errors import ParameterError, responses
from ..snapshots import SnapshotId
from .listing import address, asked_page, pages
from .templating import page

PATH = "/snapshots"
PAGE_SIZE = 50
HISTORY = 50  # moves of a channel that are shown
CHOICES = 200  # snapshots that the form of a comparison offers

router = APIRouter(include_in_schema=False)


@router.get(PATH, response_class=HTMLResponse, responses=responses(500, 503))
def snapshots(request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """The channels with their history, and the snapshots, the newest first."""
    at = address(PATH, request, ("after",))
    with database.read() as session:
        repository, channels = SnapshotRepository(session), ChannelRepository(session)
        found = repository.page(after=_position(at.get("after")), limit=PAGE_SIZE)
        moved = {name: channels.history(name, limit=HISTORY) for name in channels.names()}
        points: dict[str, list[str]] = {}
        for name, history in moved.items():
            points.setdefault(history[0].snapshot, []).append(name)
        devices = DeviceRepository(session).keys()
        return page(
            "snapshots.html",
            path=PATH,
            at=at,
            snapshots=found.items,
            next=documents.cursor_behind(found),
            choices=repository.page(limit=CHOICES).items,
            channels=moved,
            points=points,
            pins=PinRepository(session).summaries([one.id for one in found.items]),
            devices=[(key, key) for key in devices],
        )


@router.get("/snapshots/diff", response_class=HTMLResponse, responses=responses(404, 422, 500, 503))
def diff(request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """What runs differently under another snapshot; `before` and `after` are ids or channels."""
    at = address("/snapshots/diff", request, ("before", "after", "page"))
    names = at.get("before"), at.get("after")
    with database.read() as session:
        repository, channels = SnapshotRepository(session), ChannelRepository(session)
        ids = [channels.get(name) or name for name in names]
        known = {name: channels.get(name) for name in channels.names()}
        choices = repository.page(limit=CHOICES).items
        both = ids if all(at.get(name) for name in ("before", "after")) else None
        page_of = asked_page(at)
        found = _differences(repository, ids, page_of) if both else DifferencePage(items=(), total=0)
        shown = pages(at, size=PAGE_SIZE, total=found.total)
        if both and shown.page != page_of:
            found = _differences(repository, ids, shown.page)
    return page(
        "snapshot_diff.html",
        path=PATH,
        at=at,
        both=both,
        differences=found.items,
        pages=shown,
        choices=choices,
        channels=known,
    )


@router.get("/snapshots/{snapshot_id}", response_class=HTMLResponse, responses=responses(404, 422, 500, 503))
def snapshot(snapshot_id: SnapshotId, request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """One snapshot: its answers, the channels that point at it, who reported that it runs."""
    at = address(f"/snapshots/{snapshot_id}", request, ("page",))
    with database.read() as session:
        repository = SnapshotRepository(session)
        frozen = repository.get(snapshot_id)
        if frozen is None:
            raise NotFoundError(f"no snapshot {snapshot_id} is kept here; clients may hold it all the same")
        shown = pages(at, size=PAGE_SIZE, total=frozen.answers)
        answers = repository.answers(snapshot_id, offset=shown.first_row - 1, limit=PAGE_SIZE)
        channels = ChannelRepository(session)
        points = [name for name in channels.names() if channels.get(name) == snapshot_id]
        pins = PinRepository(session).of_snapshot(snapshot_id)
    return page(
        "snapshot.html",
        path=PATH,
        at=at,
        frozen=frozen,
        answers=answers,
        pages=shown,
        points=points,
        pins=pins,
    )


def _differences(snapshots: SnapshotRepository, ids: list[str], number: int) -> DifferencePage:
    for each in ids:
        if not is_snapshot_id(each):
            raise NotFoundError(f"no snapshot or channel {each!r}")
    offset = (number - 1) * PAGE_SIZE
    return snapshots.differences(ids[0], ids[1], offset=offset, limit=PAGE_SIZE)


def _position(cursor: str) -> tuple[object, ...] | None:
    try:
        return documents.read_cursor(cursor or None, (datetime, str))
    except ParameterError:
        return None
