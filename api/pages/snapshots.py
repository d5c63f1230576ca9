"""/snapshots: what was frozen, the channels that point at it, what differs between two, and who runs which."""

import functools
import gzip
from datetime import datetime

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from tilewise.db.devices import DeviceRepository
from tilewise.db.pins import PinRepository
from tilewise.db.session import Database
from tilewise.db.snapshots import ChannelRepository, SnapshotRepository
from tilewise.domain.errors import NotFoundError
from tilewise.domain.snapshot import Snapshot, differences, is_snapshot_id

from .. import documents
from ..dependencies import DatabaseOfApp
from ..errors import ParameterError, responses
from ..snapshots import SnapshotId
from .listing import address, pages
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
        channels = ChannelRepository(session)
        ids = [channels.get(name) or name for name in names]
        known = {name: channels.get(name) for name in channels.names()}
        choices = SnapshotRepository(session).page(limit=CHOICES).items
    both = [_loaded(database, each) if each else None for each in ids]
    found = differences(both[0], both[1]) if both[0] and both[1] else ()
    shown = pages(at, size=PAGE_SIZE, total=len(found))
    return page(
        "snapshot_diff.html",
        path=PATH,
        at=at,
        both=both,
        differences=found[shown.first_row - 1 : shown.last_row],
        pages=shown,
        choices=choices,
        channels=known,
    )


@router.get("/snapshots/{snapshot_id}", response_class=HTMLResponse, responses=responses(404, 422, 500, 503))
def snapshot(snapshot_id: SnapshotId, request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """One snapshot: its answers, the channels that point at it, who reported that it runs."""
    at = address(f"/snapshots/{snapshot_id}", request, ("page",))
    with database.read() as session:
        frozen = SnapshotRepository(session).get(snapshot_id)
        channels = ChannelRepository(session)
        points = [name for name in channels.names() if channels.get(name) == snapshot_id]
        pins = PinRepository(session).of_snapshot(snapshot_id)
    if frozen is None:
        raise NotFoundError(f"no snapshot {snapshot_id} is kept here; clients may hold it all the same")
    answers = _loaded(database, snapshot_id).answers
    shown = pages(at, size=PAGE_SIZE, total=len(answers))
    return page(
        "snapshot.html",
        path=PATH,
        at=at,
        frozen=frozen,
        answers=answers[shown.first_row - 1 : shown.last_row],
        pages=shown,
        points=points,
        pins=pins,
    )


def _loaded(database: Database, snapshot_id: str) -> Snapshot:
    if not is_snapshot_id(snapshot_id):
        raise NotFoundError(f"no snapshot or channel {snapshot_id!r}")
    with database.read() as session:
        file = SnapshotRepository(session).file(snapshot_id)
    if file is None:
        raise NotFoundError(f"no snapshot {snapshot_id} is kept here")
    return _read(snapshot_id, file)


@functools.lru_cache(maxsize=8)
def _read(snapshot_id: str, file: bytes) -> Snapshot:
    """An id names the same answers for ever: who turns pages does not read them again."""
    return Snapshot.loads(gzip.decompress(file), name=f"snapshot {snapshot_id[:12]}")


def _position(cursor: str) -> tuple[object, ...] | None:
    try:
        return documents.read_cursor(cursor or None, (datetime, str))
    except ParameterError:
        return None
