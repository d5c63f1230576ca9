"""Devices: what is known about each device that was tuned or has answers."""

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.device import Device

from . import references
from .models import DeviceRow


class DeviceRepository:
    """Devices by their key, in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def save(self, device: Device) -> None:
        """Keep what is known about `device`; a later save of the same key replaces it."""
        key = references.device(self._session, device.key)
        self._session.execute(update(DeviceRow).where(DeviceRow.key == key).values(document=codec.to_json(device)))

    def get(self, key: str) -> Device | None:
        """Return the device of `key`; None for an unknown one, and for one that is known by its key alone."""
        document = self._session.scalar(select(DeviceRow.document).where(DeviceRow.key == key))
        return None if document is None else codec.from_json(Device, document)

    def keys(self) -> tuple[str, ...]:
        """Return the keys of all devices, sorted."""
        return tuple(self._session.scalars(select(DeviceRow.key).order_by(DeviceRow.key)))
