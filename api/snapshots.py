"""/v1/snapshots and /v1/channels: frozen answers, and the names that point at them."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request
from starlette.responses import Response

from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.db.snapshots import ChannelRepository, SnapshotRepository
from tilewise.db.tokens import AuditRepository
from tilewise.domain.errors import NotFoundError

from . import documents, schemas
from .conditional import not_modified
from .dependencies import Actor, AnswerBookOfApp, DatabaseOfApp, SignerOfApp, checked_device
from .errors import responses

router = APIRouter(prefix="/v1", tags=["snapshots"])
IfNoneMatch = Annotated[str | None, Header(description="ETags of what the asker has already.")]
SnapshotId = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
ChannelName = Annotated[str, Path(pattern=r"^[a-z][a-z0-9-]{0,62}$", examples=["stable"])]


@router.get(
    "/snapshots",
    response_model=documents.Listed[documents.FrozenSnapshot],
    responses=responses(422, 500, 503),
    summary="All snapshots",
)
def list_snapshots(database: DatabaseOfApp, cursor: documents.Cursor = None, limit: documents.Limit = 50) -> Response:
    """What was frozen, the newest first."""
    after = documents.read_cursor(cursor, (datetime, str))
    with database.read() as session:
        return documents.listed(SnapshotRepository(session).page(after=after, limit=limit))


@router.post(
    "/snapshots",
    status_code=201,
    response_model=documents.FrozenSnapshot,
    responses=responses(422, 500, 503),
    summary="Freeze the standing answers",
)
def freeze(wanted: documents.NewSnapshot, database: DatabaseOfApp, actor: Actor) -> Response:
    """Freezing equal answers twice gives the same snapshot."""
    device_key = None if wanted.device is None else checked_device(wanted.device, "device")
    with database.write() as session:
        snapshot = AnswerRepository(session).snapshot(device_key)
        frozen = SnapshotRepository(session).freeze(snapshot, note=wanted.note)
        AuditRepository(session).add(actor, "snapshot.freeze", frozen.id, wanted.note)
    return documents.written(frozen, status=201, headers={"Location": f"/v1/snapshots/{frozen.id}"})


@router.get(
    "/snapshots/{snapshot_id}",
    response_model=schemas.Snapshot,
    responses={**not_modified, **responses(404, 422, 500, 503)},
    summary="A snapshot",
)
def one_snapshot(
    request: Request,
    snapshot_id: SnapshotId,
    database: DatabaseOfApp,
    book: AnswerBookOfApp,
    signer: SignerOfApp,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The file of a frozen snapshot, or of the answers that a device was last sent."""
    current = book.snapshot_with_id(snapshot_id)
    file = _file(database, snapshot_id) if current is None else current.gzipped
    return documents.snapshot(request, signer, snapshot_id, file, if_none_match)


@router.get("/channels", response_model=documents.Channels, responses=responses(500, 503), summary="All channels")
def list_channels(database: DatabaseOfApp) -> Response:
    """The names of all channels."""
    with database.read() as session:
        return documents.written({"names": ChannelRepository(session).names()})


@router.get(
    "/channels/{name}",
    response_model=documents.Channel,
    responses=responses(404, 422, 500, 503),
    summary="A channel and its history",
)
def one_channel(name: ChannelName, database: DatabaseOfApp) -> Response:
    """What the channel points at."""
    with database.read() as session:
        return _channel(ChannelRepository(session), name)


@router.get(
    "/channels/{name}/snapshot",
    response_model=schemas.Snapshot,
    responses={**not_modified, **responses(404, 422, 500, 503)},
    summary="The snapshot of a channel",
)
def channel_snapshot(
    request: Request,
    name: ChannelName,
    database: DatabaseOfApp,
    signer: SignerOfApp,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The file of the snapshot that the channel points at now."""
    with database.read() as session:
        snapshot_id = ChannelRepository(session).get(name)
    if snapshot_id is None:
        raise NotFoundError(f"no channel {name}")
    return documents.snapshot(request, signer, snapshot_id, _file(database, snapshot_id), if_none_match)


@router.put(
    "/channels/{name}",
    response_model=documents.Channel,
    responses=responses(404, 422, 500, 503),
    summary="Let a channel point at a snapshot",
)
def move_channel(name: ChannelName, move: documents.MoveChannel, database: DatabaseOfApp, actor: Actor) -> Response:
    """A new name makes a new channel."""
    with database.write() as session:
        channels = ChannelRepository(session)
        channels.move(name, move.snapshot, reason=move.reason, actor=actor)
        AuditRepository(session).add(actor, "channel.move", name, f"{move.snapshot}: {move.reason}")
        return _channel(channels, name)


@router.post(
    "/channels/{name}/rollback",
    response_model=documents.Channel,
    responses=responses(404, 422, 500, 503),
    summary="Go back to an earlier snapshot",
)
def roll_back(name: ChannelName, back: documents.RollBack, database: DatabaseOfApp, actor: Actor) -> Response:
    """To the snapshot before, or to one of the history."""
    with database.write() as session:
        channels = ChannelRepository(session)
        change = channels.rollback(name, to=back.to, reason=back.reason, actor=actor)
        AuditRepository(session).add(actor, "channel.rollback", name, f"{change.snapshot}: {back.reason}")
        return _channel(channels, name)


def _channel(channels: ChannelRepository, name: str) -> Response:
    snapshot_id = channels.get(name)
    if snapshot_id is None:
        raise NotFoundError(f"no channel {name}")
    return documents.written({"name": name, "snapshot": snapshot_id, "history": channels.history(name)})


def _file(database: Database, snapshot_id: str) -> bytes:
    with database.read() as session:
        file = SnapshotRepository(session).file(snapshot_id)
    if file is None:
        raise NotFoundError(f"no snapshot {snapshot_id}")
    return file
