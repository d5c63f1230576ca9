"""Demand: what clients used and missed, added up, and where GPU time is lost by it."""

from typing import Any

from sqlalchemy import BigInteger, case, func, select, type_coerce
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from tilewise.domain.answer import Match
from tilewise.domain.device_gap import device_gap
from tilewise.domain.problem import Problem
from tilewise.domain.trial import now
from tilewise.domain.usage import NEAR_LOSS, STALE_LOSS, UNKNOWN_LOSS, Demand, Saved, Usage

from . import references
from .models import AnswerRow, DemandRow, JobRow, ProblemRow

MAX_CALLS = 2**53  # of one report and one problem: a sum of a thousand such still fits


class DemandRepository:
    """What clients reported, by device, bucket and match, in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, usage: Usage) -> None:
        """Add one report. Problems are counted by their bucket, and in a fixed order, so that reports do not wait for
        one another in a circle."""
        counts: dict[tuple[str, Match], int] = {}
        buckets: dict[str, Problem] = {}
        for use in usage.uses:
            bucket = use.problem.bucket()
            buckets[bucket.key] = bucket
            counts[bucket.key, use.match] = min(MAX_CALLS, counts.get((bucket.key, use.match), 0) + use.calls)
        moment = now()
        if counts:
            references.device(self._session, usage.device_key)
        for key, match in sorted(counts):
            references.problem(self._session, buckets[key])
            values = {
                "device_key": usage.device_key,
                "problem_key": key,
                "match": match,
                "calls": counts[key, match],
                "reports": 1,
                "snapshot_id": usage.snapshot,
                "first": moment,
                "last": moment,
            }
            self._session.execute(self._upsert(values))

    def _upsert(self, values: dict[str, Any]) -> Any:
        kind = postgresql if self._session.get_bind().dialect.name == "postgresql" else sqlite
        statement = kind.insert(DemandRow).values(values)
        return statement.on_conflict_do_update(
            index_elements=[DemandRow.device_key, DemandRow.problem_key, DemandRow.match],
            set_={
                "calls": func.least(DemandRow.calls + statement.excluded.calls, type_coerce(2**62, BigInteger))
                if kind is postgresql
                else func.min(DemandRow.calls + statement.excluded.calls, type_coerce(2**62, BigInteger)),
                "reports": DemandRow.reports + 1,
                "snapshot_id": statement.excluded.snapshot_id,
                "last": statement.excluded.last,
            },
        )

    def list(self, *, device_key: str | None = None, limit: int = 50) -> tuple[Demand, ...]:
        """Return where most GPU time is lost, the worst first.

        Of a problem without an answer the time of a call is estimated by the operations per millisecond of the
        device's answers, of one without any by those of the device that is most like it, and the loss by what those
        answers won over torch's own choice.
        """
        calls = func.sum(DemandRow.calls)
        missed = func.sum(case((DemandRow.match == Match.EXACT, 0), else_=DemandRow.calls))
        stale = func.sum(case((DemandRow.match == Match.STALE, DemandRow.calls), else_=0))
        near = func.sum(case((DemandRow.match.in_((Match.NEAR, Match.PREDICTED)), DemandRow.calls), else_=0))
        query = (
            select(
                DemandRow.device_key,
                DemandRow.problem_key,
                calls.label("calls"),
                missed.label("missed"),
                stale.label("stale"),
                near.label("near"),
                func.min(DemandRow.first).label("first"),
                func.max(DemandRow.last).label("last"),
                func.max(ProblemRow.forward_flops).label("flops"),
                func.max(AnswerRow.expected_ms).label("expected"),
                func.max(AnswerRow.baseline_ms).label("baseline"),
                func.count(AnswerRow.version).label("standing"),
            )
            .join(ProblemRow, ProblemRow.key == DemandRow.problem_key)
            .outerjoin(
                AnswerRow,
                (AnswerRow.device_key == DemandRow.device_key) & (AnswerRow.problem_key == DemandRow.problem_key),
            )
            .group_by(DemandRow.device_key, DemandRow.problem_key)
        )
        if device_key is not None:
            query = query.where(DemandRow.device_key == device_key)
        devices = self._devices()
        found = [_demand(row, *_of_device(row.device_key, devices)) for row in self._session.execute(query)]
        found.sort(key=lambda demand: (-demand.lost_ms, -demand.missed, demand.problem.key))
        return tuple(found[:limit])

    def proposals(self, *, device_key: str | None = None, limit: int = 10) -> tuple[Demand, ...]:
        """Return what is worth a tuning, the worst first: missed, and neither queued nor running already."""
        waiting = select(JobRow.device_key, JobRow.problem_key).where(JobRow.state.in_(("queued", "running")))
        asked = {(device, problem) for device, problem in self._session.execute(waiting)}
        return tuple(
            one
            for one in self.list(device_key=device_key, limit=limit + len(asked))
            if one.lost_ms > 0 and (one.device_key, one.problem.key) not in asked
        )[:limit]

    def saved(self) -> Saved:
        """Return what standing answers saved against torch's own choice, by the calls that clients reported."""
        won = DemandRow.calls * (AnswerRow.baseline_ms - AnswerRow.expected_ms)
        query = (
            select(func.sum(won), func.sum(DemandRow.calls), func.min(DemandRow.first))
            .join(
                AnswerRow,
                (AnswerRow.device_key == DemandRow.device_key) & (AnswerRow.problem_key == DemandRow.problem_key),
            )
            .where(
                DemandRow.match.in_((Match.EXACT, Match.STALE)),
                AnswerRow.baseline_ms.is_not(None),
                AnswerRow.expected_ms.is_not(None),
            )
        )
        milliseconds, calls, since = self._session.execute(query).one()
        return Saved(ms=float(milliseconds or 0), calls=int(calls or 0), since=since)

    def totals(self) -> dict[Match, int]:
        """Return all calls that were reported, by match."""
        found = dict.fromkeys(Match, 0)
        query = select(DemandRow.match, func.sum(DemandRow.calls)).group_by(DemandRow.match)
        for match, calls in self._session.execute(query):
            found[Match(match)] = int(calls)
        return found

    def _devices(self) -> dict[str, tuple[float | None, float]]:
        """Return operations per millisecond and the mean share of time won, by device."""
        query = (
            select(
                AnswerRow.device_key,
                func.sum(ProblemRow.forward_flops) / func.sum(AnswerRow.expected_ms),
                1 - func.sum(AnswerRow.expected_ms) / func.sum(AnswerRow.baseline_ms),
            )
            .join(ProblemRow, ProblemRow.key == AnswerRow.problem_key)
            .where(AnswerRow.expected_ms > 0, AnswerRow.baseline_ms > 0)
            .group_by(AnswerRow.device_key)
        )
        found: dict[str, tuple[float | None, float]] = {}
        for key, rate, won in self._session.execute(query):
            found[key] = (rate, min(max(won or 0.0, 0.0), 1.0))
        return found


def _of_device(device_key: str, devices: dict[str, tuple[float | None, float]]) -> tuple[float | None, float]:
    """Return what `_devices` knows of a device, or of the one that is most like it."""
    if device_key in devices:
        return devices[device_key]
    gaps = {key: device_gap(key, device_key) for key in devices}
    alike = [(gap.distance, key) for key, gap in gaps.items() if gap is not None]
    return (devices[min(alike)[1]][0], UNKNOWN_LOSS) if alike else (None, UNKNOWN_LOSS)


def _demand(row: Any, rate: float | None, won: float) -> Demand:
    missed, stale, near = int(row.missed), int(row.stale), int(row.near)
    if row.expected and row.baseline:
        expected, loss = row.baseline, min(max(1 - row.expected / row.baseline, 0.0), 1.0)
    else:
        expected, loss = (None if rate is None else row.flops / rate), won
    if missed:  # what an older kernel, or a neighbour's plan, still does well is lost only in small part
        loss = (loss * (missed - stale - near) + STALE_LOSS * stale + NEAR_LOSS * near) / missed
    return Demand(
        device_key=row.device_key,
        problem=Problem.parse(row.problem_key),
        calls=int(row.calls),
        missed=missed,
        first=row.first,
        last=row.last,
        expected_ms=expected,
        loss=loss,
        standing=bool(row.standing),
    )
