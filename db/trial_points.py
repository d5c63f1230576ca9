"""Trials as points of a landscape: what thousands of them have in common is read in one go, single ones whole."""

import json
from dataclasses import dataclass

from sqlalchemy import Text, cast, func, select
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.config import Candidate
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Outcome

from .models import SoftwareRow, TrialRow
from .trials import ListedTrial, listed_trial

MESSAGE_BEGIN = 400  # characters by which messages count as the same


@dataclass(frozen=True, slots=True)
class TrialPoint:
    """A trial without its message and the details of its measurement. Times in milliseconds."""

    id: int
    candidate: Candidate
    stage: str
    outcome: Outcome
    median_ms: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One way in which trials failed: how many of a backend did, what the message begins with, and the newest one."""

    outcome: Outcome
    backend: str
    message: str
    trials: int
    newest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTrial:
    """A trial with all that is known about it."""

    listed: ListedTrial
    software: Software


class TrialPointRepository:
    """The trials of one problem on one device, in one session."""

    def __init__(self, session: Session, device_key: str, problem: Problem) -> None:
        self._session, self.device_key, self.problem = session, device_key, problem
        self._about = TrialRow.device_key == device_key, TrialRow.problem_key == problem.key

    def state(self) -> tuple[int, int]:
        """Return how many trials there are and the greatest number among them; both 0 where there is none."""
        count, newest = self._session.execute(select(func.count(), func.max(TrialRow.id)).where(*self._about)).one()
        return count, newest or 0

    def points(self, *, after: int = 0, known: dict[str, Candidate] | None = None) -> tuple[TrialPoint, ...]:
        """Return the trials with greater numbers than `after`, in their order.

        `known` keeps candidates by their digest between calls: the same one is read, and held, only once.
        """
        known = {} if known is None else known
        columns = TrialRow.id, TrialRow.candidate_digest, TrialRow.stage, TrialRow.outcome, TrialRow.median_ms
        query = select(*columns, TrialRow.ratio, cast(TrialRow.candidate, Text)).where(
            *self._about, TrialRow.id > after
        )
        found = []
        for number, digest, stage, outcome, median, ratio, text in self._session.execute(query.order_by(TrialRow.id)):
            candidate = known.get(digest)
            if candidate is None:
                candidate = known[digest] = Candidate.from_json(json.loads(text))
            found.append(TrialPoint(number, candidate, stage, Outcome(outcome), median, ratio))
        return tuple(found)

    def failures(self, *, limit: int = 50) -> tuple[Failure, ...]:
        """Return how trials failed, what happened most first."""
        begin = func.substr(TrialRow.message, 1, MESSAGE_BEGIN)
        columns = TrialRow.outcome, TrialRow.backend, begin
        number = func.count()
        query = (
            select(*columns, number, func.max(TrialRow.id))
            .where(*self._about, TrialRow.outcome != Outcome.OK)
            .group_by(*columns)
            .order_by(number.desc(), func.max(TrialRow.id).desc())
            .limit(limit)
        )
        return tuple(
            Failure(outcome=Outcome(outcome), backend=backend, message=message, trials=trials, newest=newest)
            for outcome, backend, message, trials, newest in self._session.execute(query)
        )


def kept_trial(session: Session, number: int) -> KeptTrial | None:
    """Return the trial of that number, of whatever problem; None where there is none."""
    query = (
        select(*TrialRow.__table__.columns, SoftwareRow.document.label("software"))
        .join(SoftwareRow, SoftwareRow.digest == TrialRow.software_digest)
        .where(TrialRow.id == number)
    )
    row = session.execute(query).one_or_none()
    if row is None:
        return None
    return KeptTrial(listed=listed_trial(row), software=codec.from_json(Software, row.software))
