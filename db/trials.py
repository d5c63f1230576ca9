"""Trials: everything that was tried, the one truth a search is rebuilt from."""

import enum
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.config import Candidate
from tilewise.domain.errors import SettingsError
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement, NumericError, Outcome, Stage, Trial

from . import paging, references
from .models import SoftwareRow, TrialRow
from .paging import Page, Position

# Neither says anything about the candidate: a search that resumes tries it again.
UNFINISHED = (Outcome.SKIPPED, Outcome.CANCELLED)


class TrialSort(enum.StrEnum):
    """What a list of trials can be sorted by. Only trials that were timed have a median."""

    ID = "id"
    MEDIAN = "median_ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedTrial:
    """A trial in a list, with its number and what it is about."""

    id: int
    problem: Problem
    device_key: str
    trial: Trial


class TrialRepository:
    """Trials in one session; `device_key` and `problem` say what they are about."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, trial: Trial, *, problem: Problem, device_key: str, software: Software) -> int:
        """Keep a trial and return its number; later ones have greater numbers.

        `trial.job` must be the id of a kept job or None. Raises DeviceError where `device_key` is no device key.
        """
        median, ratio = (trial.measurement.median_ms, trial.measurement.ratio) if trial.measurement else (None, None)
        row = TrialRow(
            device_key=references.device(self._session, device_key),
            problem_key=references.problem(self._session, problem),
            software_digest=references.software(self._session, software),
            job_id=trial.job,
            attempt=trial.attempt,
            backend=trial.candidate.backend,
            candidate=codec.to_json(trial.candidate),
            candidate_digest=codec.digest(trial.candidate),
            stage=trial.stage,
            outcome=trial.outcome,
            median_ms=median,
            ratio=ratio,
            measurement=codec.to_json(trial.measurement),
            error=codec.to_json(trial.error),
            message=references.clean(trial.message),
            seconds=trial.seconds,
            tried=trial.when,
        )
        self._session.add(row)
        self._session.flush()
        return row.id

    def list(
        self,
        problem: Problem,
        device_key: str,
        *,
        backend: str | None = None,
        stage: Stage | None = None,
        outcomes: Collection[Outcome] = (),
        job_id: str | None = None,
    ) -> tuple[Trial, ...]:
        """Return the trials of `problem` on a device in the order they were kept; each filter narrows it."""
        query = select(*TrialRow.__table__.columns).where(*_about(problem, device_key)).order_by(TrialRow.id)
        for column, value in ((TrialRow.backend, backend), (TrialRow.stage, stage), (TrialRow.job_id, job_id)):
            if value is not None:
                query = query.where(column == value)
        if outcomes:
            query = query.where(TrialRow.outcome.in_(list(outcomes)))
        return tuple(_trial(row) for row in self._session.execute(query))

    def newest(self, problem: Problem, device_key: str) -> int:
        """Return the number of the newest trial of `problem` on a device; 0 where there is none."""
        query = select(func.max(TrialRow.id)).where(*_about(problem, device_key))
        return self._session.scalar(query) or 0

    def tuned(self) -> tuple[tuple[str, Problem], ...]:
        """Return each device key with each problem that something was right for, in the order of the keys."""
        columns = TrialRow.device_key, TrialRow.problem_key
        query = select(*columns).where(TrialRow.outcome == Outcome.OK).distinct().order_by(*columns)
        return tuple((device_key, Problem.parse(key)) for device_key, key in self._session.execute(query))

    def page(
        self,
        *,
        problem: Problem | None = None,
        device_key: str | None = None,
        backend: str | None = None,
        outcome: Outcome | None = None,
        job_id: str | None = None,
        sort: TrialSort = TrialSort.ID,
        descending: bool = True,
        after: Position | None = None,
        limit: int = 50,
    ) -> Page[ListedTrial]:
        """Return a page of all trials; each filter narrows it.

        Raises SettingsError for a list of all problems by their medians, which say nothing beside each other.
        """
        if sort is TrialSort.MEDIAN and problem is None:
            raise SettingsError("order: medians are compared within one problem only; name it, or order by id")
        query = select(*TrialRow.__table__.columns)
        wanted = {
            TrialRow.problem_key: None if problem is None else problem.key,
            TrialRow.device_key: device_key,
            TrialRow.backend: backend,
            TrialRow.outcome: outcome,
            TrialRow.job_id: job_id,
        }
        for column, value in wanted.items():
            if value is not None:
                query = query.where(column == value)
        columns: tuple[ColumnElement[Any], ...] = (TrialRow.id.expression,)
        if sort is TrialSort.MEDIAN:
            query = query.where(TrialRow.median_ms.is_not(None))
            columns = (TrialRow.median_ms.expression, *columns)
        return paging.page(self._session, query, columns, listed_trial, descending=descending, after=after, limit=limit)

    def count(self, problem: Problem, device_key: str) -> dict[Outcome, int]:
        """Return how many trials ended in each outcome; an outcome that never came is left out."""
        query = select(TrialRow.outcome, func.count()).where(*_about(problem, device_key)).group_by(TrialRow.outcome)
        return {Outcome(outcome): number for outcome, number in self._session.execute(query)}

    def outcomes_of_job(self, job_id: str) -> dict[Outcome, int]:
        """Return how many trials of a job ended in each outcome; an outcome that never came is left out."""
        query = select(TrialRow.outcome, func.count()).where(TrialRow.job_id == job_id).group_by(TrialRow.outcome)
        return {Outcome(outcome): number for outcome, number in self._session.execute(query)}

    def finished(self, problem: Problem, device_key: str, software: Software) -> tuple[Trial, ...]:
        """Return what a resumed search need not try again: the newest trial of each candidate and stage.

        Only trials whose candidate would run the same code under `software` count, and none that was skipped or
        cancelled. The order is that of the trials.
        """
        query = (
            select(*TrialRow.__table__.columns, SoftwareRow.document.label("software"))
            .join(SoftwareRow, SoftwareRow.digest == TrialRow.software_digest)
            .where(*_about(problem, device_key), TrialRow.outcome.not_in(UNFINISHED))
            .order_by(TrialRow.id)
        )
        newest: dict[tuple[str, str], Any] = {}
        for row in self._session.execute(query):
            ran = codec.from_json(Software, row.software)
            candidate = Candidate.from_json(row.candidate)
            if ran.for_candidates(candidate) == software.for_candidates(candidate):
                newest[row.candidate_digest, row.stage] = row
        return tuple(_trial(row) for row in sorted(newest.values(), key=lambda row: row.id))


def _about(problem: Problem, device_key: str) -> tuple[Any, Any]:
    return TrialRow.device_key == device_key, TrialRow.problem_key == problem.key


def listed_trial(row: Any) -> ListedTrial:
    return ListedTrial(id=row.id, problem=Problem.parse(row.problem_key), device_key=row.device_key, trial=_trial(row))


def _trial(row: Any) -> Trial:
    return Trial(
        candidate=Candidate.from_json(row.candidate),
        stage=Stage(row.stage),
        outcome=Outcome(row.outcome),
        measurement=None if row.measurement is None else codec.from_json(Measurement, row.measurement),
        error=None if row.error is None else codec.from_json(NumericError, row.error),
        message=row.message,
        seconds=row.seconds,
        when=row.tried,
        job=row.job_id,
        attempt=row.attempt,
    )
