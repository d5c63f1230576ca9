"""Frozen snapshots and the channels that point at them."""

import gzip
import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.answer import Answer
from tilewise.domain.errors import NotFoundError, SettingsError
from tilewise.domain.snapshot import ChannelChange, Difference, FrozenSnapshot, Snapshot, is_channel_name
from tilewise.domain.trial import now

from . import paging, references
from .models import ChannelChangeRow, ChannelRow, SentSnapshotRow, SnapshotEntryRow, SnapshotRow
from .paging import Page, Position

MAX_SENT = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferencePage:
    """Some of what differs between two snapshots; `total` counts all of it."""

    items: tuple[Difference, ...]
    total: int


class SnapshotRepository:
    """Snapshots by their id, in one session. What an id names never changes."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def freeze(self, snapshot: Snapshot, *, note: str = "") -> FrozenSnapshot:
        """Keep `snapshot`; where it is kept already, that one is returned and nothing changes."""
        found = self.get(snapshot.id)
        if found is not None:
            return found
        values = {
            "id": snapshot.id,
            "created": now(),
            "answers": len(snapshot.answers),
            "note": references.clean(note),
            "file": gzip.compress(snapshot.dumps(), mtime=0),
        }
        new = references.insert_new(self._session, SnapshotRow, values).returning(SnapshotRow.id)
        if self._session.scalar(new) is not None:
            entries = [
                {
                    "snapshot_id": snapshot.id,
                    "device_key": references.device(self._session, answer.device_key),
                    "problem_key": references.problem(self._session, answer.problem),
                    "version": answer.version,
                }
                for answer in snapshot.answers
            ]
            if entries:
                self._session.execute(insert(SnapshotEntryRow), entries)
        kept = self.get(snapshot.id)
        assert kept is not None, "it was kept in this transaction, or by another before it"
        return kept

    def get(self, snapshot_id: str) -> FrozenSnapshot | None:
        """Return what is known of a snapshot without its answers; None where there is none of that id."""
        query = select(SnapshotRow.id, SnapshotRow.created, SnapshotRow.answers, SnapshotRow.note)
        row = self._session.execute(query.where(SnapshotRow.id == snapshot_id)).one_or_none()
        return None if row is None else FrozenSnapshot(id=row.id, created=row.created, answers=row[2], note=row.note)

    def file(self, snapshot_id: str) -> bytes | None:
        """Return the file form of a snapshot that was frozen or sent, gzipped; None where there is none of that id."""
        frozen = self._session.scalar(select(SnapshotRow.file).where(SnapshotRow.id == snapshot_id))
        if frozen is not None:
            return frozen
        return self._session.scalar(select(SentSnapshotRow.file).where(SentSnapshotRow.id == snapshot_id))

    def keep_sent(self, snapshot_id: str, gzipped: bytes) -> None:
        """Keep the file of a snapshot that is sent, so that its id can be pinned when other answers stand.

        Of those that were not frozen the MAX_SENT that were sent or used last are kept.
        """
        values = {"id": snapshot_id, "used": now(), "file": gzipped}
        new = references.insert_new(self._session, SentSnapshotRow, values).returning(SentSnapshotRow.id)
        if self._session.scalar(new) is None:
            self.note_use(snapshot_id)
            return
        last = (SentSnapshotRow.used.desc(), SentSnapshotRow.id)
        beyond = select(SentSnapshotRow.id).order_by(*last).offset(MAX_SENT)
        self._session.execute(delete(SentSnapshotRow).where(SentSnapshotRow.id.in_(beyond)))

    def note_use(self, snapshot_id: str) -> None:
        """Note that a job uses a snapshot: of those that were sent, it is not the next to go."""
        changed = update(SentSnapshotRow).where(SentSnapshotRow.id == snapshot_id)
        self._session.execute(changed.values(used=now()))

    def load(self, snapshot_id: str) -> Snapshot:
        """Return a snapshot, verified. Raises NotFoundError where there is none of that id."""
        file = self.file(snapshot_id)
        if file is None:
            raise NotFoundError(f"no snapshot {snapshot_id}; `tilewise snapshot list` shows those that there are")
        return Snapshot.loads(gzip.decompress(file), name=f"snapshot {snapshot_id[:12]}")

    def answers(self, snapshot_id: str, *, offset: int = 0, limit: int = 50) -> tuple[Answer, ...]:
        """Return some answers of a snapshot, which is not verified: to look at. Raises NotFoundError."""
        documents = self._documents(snapshot_id)
        return tuple(codec.from_json(Answer, each) for each in documents[offset : offset + limit])

    def differences(self, before: str, after: str, *, offset: int = 0, limit: int = 50) -> DifferencePage:
        """Return some of what runs differently under another snapshot, by device and problem. Raises NotFoundError.

        Of thousands of answers only those that are returned are built.
        """
        old, new = ({_about(each): each for each in self._documents(id_)} for id_ in (before, after))
        keys = [
            key
            for key in sorted(old.keys() | new.keys())
            if old.get(key, {}).get("plan") != new.get(key, {}).get("plan")
        ]
        return DifferencePage(
            items=tuple(_difference(old.get(key), new.get(key)) for key in keys[offset : offset + limit]),
            total=len(keys),
        )

    def _documents(self, snapshot_id: str) -> list[Any]:
        file = self.file(snapshot_id)
        if file is None:
            raise NotFoundError(f"no snapshot {snapshot_id} is kept here; clients may hold it all the same")
        found: list[Any] = json.loads(gzip.decompress(file))["answers"]
        return found

    def page(self, *, after: Position | None = None, limit: int = 50) -> Page[FrozenSnapshot]:
        """Return a page of the snapshots, the newest first."""
        return paging.page(
            self._session,
            select(SnapshotRow.id, SnapshotRow.created, SnapshotRow.answers, SnapshotRow.note),
            (SnapshotRow.created.expression, SnapshotRow.id.expression),
            lambda row: FrozenSnapshot(id=row[0], created=row[1], answers=row[2], note=row[3]),
            descending=True,
            after=after,
            limit=limit,
        )


class ChannelRepository:
    """Channels by their name, in one session. A channel is never without a snapshot, and its history is kept."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, name: str) -> str | None:
        """Return the id of the snapshot that a channel points at; None where there is no such channel."""
        return self._session.scalar(select(ChannelRow.snapshot_id).where(ChannelRow.name == name))

    def names(self) -> tuple[str, ...]:
        return tuple(self._session.scalars(select(ChannelRow.name).order_by(ChannelRow.name)))

    def move(self, name: str, snapshot_id: str, *, reason: str, actor: str) -> ChannelChange:
        """Let a channel point at a snapshot, which is frozen by that; a new name makes a new channel.

        Raises NotFoundError where there is no such snapshot, SettingsError where the name can be none.
        """
        if not is_channel_name(name):
            raise SettingsError(
                f"channel: expected lower-case letters, digits and dashes, at most 63, a letter first, got {name!r}"
            )
        snapshots = SnapshotRepository(self._session)
        if snapshots.file(snapshot_id) is None:
            raise NotFoundError(f"no snapshot {snapshot_id} to let {name} point at; freeze or import it first")
        if snapshots.get(snapshot_id) is None:
            snapshots.freeze(snapshots.load(snapshot_id), note=f"sent before, frozen for {name}")
        moment = now()
        values = {"name": name, "snapshot_id": snapshot_id, "changed": moment}
        new = references.insert_new(self._session, ChannelRow, values).returning(ChannelRow.name)
        previous = None
        if self._session.scalar(new) is None:
            # the row's lock orders those who move one channel at once
            held = select(ChannelRow.snapshot_id).where(ChannelRow.name == name).with_for_update()
            previous = self._session.scalar(held)
            self._session.execute(update(ChannelRow).where(ChannelRow.name == name).values(values))
        row = ChannelChangeRow(
            name=name,
            snapshot_id=snapshot_id,
            previous_id=previous,
            reason=references.clean(reason),
            actor=references.clean(actor)[:255],
            changed=moment,
        )
        self._session.add(row)
        self._session.flush()
        return _change(row)

    def rollback(self, name: str, *, to: str | None = None, reason: str, actor: str) -> ChannelChange:
        """Let a channel point at what it pointed at before, or at `to`, which must be in its history.

        Raises NotFoundError where there is no such channel, and nothing before to go back to.
        """
        history = self.history(name)
        if not history:
            raise NotFoundError(f"no channel {name!r}")
        before = [change.snapshot for change in history if change.snapshot != history[0].snapshot]
        if to is None:
            target = history[0].previous or (before[0] if before else None)
        else:
            target = to if to in before else None
        if target is None:
            raise NotFoundError(f"channel {name} never pointed at {to or 'anything else'}; nothing to go back to")
        return self.move(name, target, reason=reason, actor=actor)

    def history(self, name: str, *, limit: int = 200) -> tuple[ChannelChange, ...]:
        """Return what a channel pointed at, the newest first; empty where there is no such channel."""
        query = select(ChannelChangeRow).where(ChannelChangeRow.name == name).order_by(ChannelChangeRow.id.desc())
        return tuple(_change(row) for row in self._session.scalars(query.limit(limit)))


def _change(row: ChannelChangeRow) -> ChannelChange:
    return ChannelChange(
        id=row.id,
        name=row.name,
        snapshot=row.snapshot_id,
        previous=row.previous_id,
        reason=row.reason,
        actor=row.actor,
        changed=row.changed,
    )


def _about(document: Any) -> tuple[str, str]:
    return document["device_key"], document["problem"]


def _difference(before: Any | None, after: Any | None) -> Difference:
    old, new = (None if each is None else codec.from_json(Answer, each) for each in (before, after))
    one = old or new
    assert one is not None, "what differs is in one of them"
    return Difference(device_key=one.device_key, problem=one.problem, before=old, after=new)
