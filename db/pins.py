"""Pins: which snapshots run where, as clients report it with what they used."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from tilewise.domain.trial import now
from tilewise.domain.usage import Pin

from . import references
from .models import PinRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """Of one snapshot: how many tokens reported it, from how many devices, and when the last did."""

    reporters: int
    devices: int
    last: datetime


class PinRepository:
    """Pins in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, snapshot_id: str, device_key: str, reporter: str) -> None:
        """Count one report of a snapshot. Raises DeviceError where `device_key` is no device key."""
        moment = now()
        kind = postgresql if self._session.get_bind().dialect.name == "postgresql" else sqlite
        statement = kind.insert(PinRow).values(
            snapshot_id=snapshot_id,
            device_key=references.device(self._session, device_key),
            reporter=references.clean(reporter)[:255],
            reports=1,
            first=moment,
            last=moment,
        )
        again = {"reports": PinRow.reports + 1, "last": statement.excluded.last}
        keys = (PinRow.snapshot_id, PinRow.device_key, PinRow.reporter)
        self._session.execute(statement.on_conflict_do_update(index_elements=keys, set_=again))

    def of_snapshot(self, snapshot_id: str, *, limit: int = 200) -> tuple[Pin, ...]:
        """Return who reported a snapshot, the latest first."""
        query = select(PinRow).where(PinRow.snapshot_id == snapshot_id)
        order = (PinRow.last.desc(), PinRow.reporter, PinRow.device_key)
        return tuple(
            Pin(
                snapshot=row.snapshot_id,
                device_key=row.device_key,
                reporter=row.reporter,
                reports=row.reports,
                first=row.first,
                last=row.last,
            )
            for row in self._session.scalars(query.order_by(*order).limit(limit))
        )

    def summaries(self, snapshot_ids: Collection[str]) -> dict[str, Pins]:
        """Return those of `snapshot_ids` that were reported at all."""
        query = (
            select(
                PinRow.snapshot_id,
                func.count(PinRow.reporter.distinct()).label("reporters"),
                func.count(PinRow.device_key.distinct()).label("devices"),
                func.max(PinRow.last).label("last"),
            )
            .where(PinRow.snapshot_id.in_(snapshot_ids))
            .group_by(PinRow.snapshot_id)
        )
        return {
            row.snapshot_id: Pins(reporters=row.reporters, devices=row.devices, last=row.last)
            for row in self._session.execute(query)
        }
