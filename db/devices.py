"""Devices and problems: what is known about each that was tuned, has answers or was asked about."""

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, aliased

from tilewise.domain import codec
from tilewise.domain.device import Device
from tilewise.domain.job import JobState
from tilewise.domain.problem import Problem

from . import paging, references
from .models import AnswerRow, DeviceRow, JobRow, ProblemRow
from .paging import Page, Position


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedDevice:
    """A device in a list; None where only its key is known."""

    key: str
    device: Device | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSummary:
    """What is known of a device, and what was done on it.

    - answers, trials: its tuned problems, and the trials that their evidence rests on.
    - speedup: geometric mean over the answers of torch's own time over the plan's, in the same final; None without any.
    - measured: when its latest final was held.
    - queued, running: its jobs.
    """

    key: str
    device: Device | None
    answers: int
    trials: int
    speedup: float | None
    measured: datetime | None
    queued: int
    running: int


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

    def most_in_common(self, key: str = "") -> tuple[str, ...]:
        """Return the two devices that have most tuned problems in common, one of them `key` where it is not empty.

        The one with the smaller key comes first, but `key` before the other. Empty where no two have any in common.
        """
        one, other = aliased(AnswerRow), aliased(AnswerRow)
        wanted = (one.device_key == key) & (other.device_key != key) if key else one.device_key < other.device_key
        query = (
            select(one.device_key, other.device_key)
            .join(other, other.problem_key == one.problem_key)
            .where(wanted)
            .group_by(one.device_key, other.device_key)
            .order_by(func.count().desc(), one.device_key, other.device_key)
            .limit(1)
        )
        return tuple(self._session.execute(query).one_or_none() or ())

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

    def summaries(self) -> tuple[DeviceSummary, ...]:
        """Return all devices, those with most answers first."""
        answers = self._session.execute(
            select(
                AnswerRow.device_key,
                AnswerRow.baseline_ms,
                AnswerRow.expected_ms,
                AnswerRow.trials,
                AnswerRow.measured,
            )
        )
        found: dict[str, list[Any]] = {}
        for row in answers:
            found.setdefault(row.device_key, []).append(row)
        open_jobs = select(JobRow.device_key, JobRow.state, func.count().label("number")).where(
            JobRow.state.in_((JobState.QUEUED, JobState.RUNNING))
        )
        jobs = {
            (row.device_key, row.state): row.number
            for row in self._session.execute(open_jobs.group_by(JobRow.device_key, JobRow.state))
        }
        made = [
            _summary(row.key, row.document, found.get(row.key, []), jobs)
            for row in self._session.execute(select(DeviceRow.key, DeviceRow.document))
        ]
        return tuple(sorted(made, key=lambda one: (-one.answers, one.key)))


def _summary(key: str, document: Any, answers: list[Any], jobs: dict[tuple[str, str], int]) -> DeviceSummary:
    wins = [math.log(row.baseline_ms / row.expected_ms) for row in answers if row.baseline_ms and row.expected_ms]
    return DeviceSummary(
        key=key,
        device=None if document is None else codec.from_json(Device, document),
        answers=len(answers),
        trials=sum(row.trials for row in answers),
        speedup=math.exp(sum(wins) / len(wins)) if wins else None,
        measured=max((row.measured for row in answers if row.measured), default=None),
        queued=jobs.get((key, JobState.QUEUED), 0),
        running=jobs.get((key, JobState.RUNNING), 0),
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
