"""Devices and problems: what is known about each that was tuned, has answers or was asked about."""

from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem

from . import paging, references
from .models import DeviceRow, ProblemRow
from .paging import Page, Position


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedDevice:
    """A device in a list; None where only its key is known."""

    key: str
    device: Device | None


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

    def page(self, *, search: str = "", after: Position | None = None, limit: int = 50) -> Page[ListedDevice]:
        """Return a page of the devices by their keys, those whose key holds `search`."""
        query = select(DeviceRow.document).where(DeviceRow.key.contains(references.clean(search), autoescape=True))
        return paging.page(
            self._session,
            query,
            (DeviceRow.key.expression,),
            lambda row: ListedDevice(key=row[1], device=None if row[0] is None else codec.from_json(Device, row[0])),
            descending=False,
            after=after,
            limit=limit,
        )


class ProblemRepository:
    """Problems by their key, in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def page(
        self,
        *,
        search: str = "",
        pass_: str | None = None,
        dtype: str | None = None,
        head_dim: int | None = None,
        causal: bool | None = None,
        descending: bool = False,
        after: Position | None = None,
        limit: int = 50,
    ) -> Page[Problem]:
        """Return a page of the problems by their keys, those whose key holds `search`; each filter narrows it."""
        query = select(ProblemRow.key).where(ProblemRow.key.contains(references.clean(search), autoescape=True))
        wanted = {
            ProblemRow.pass_: pass_,
            ProblemRow.dtype: dtype,
            ProblemRow.head_dim: head_dim,
            ProblemRow.causal: causal,
        }
        for column, value in wanted.items():
            if value is not None:
                query = query.where(column == value)
        return paging.page(
            self._session,
            query,
            (ProblemRow.key.expression,),
            lambda row: Problem.parse(row[0]),
            descending=descending,
            after=after,
            limit=limit,
        )
