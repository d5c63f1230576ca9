"""Keeps what `tilewise bench core` measured in a database: `tilewise db import`.

Everything of a report goes in, in one transaction, or nothing does: its devices, the software of each row, every trial,
and the answer that the tuner's rule gives for each final. A trial is known by candidate, stage and moment, a final by
when it was held, so that importing a report twice changes nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy.orm import Session

from tilewise.db.answers import AnswerRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.embedded import refresh_snapshot
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.answer import Answer
from tilewise.domain.errors import ConflictError, SettingsError
from tilewise.domain.problem import Problem

from . import core_report
from .core_answers import answer_of, held
from .core_report import Report
from .records import Row

MAX_SWAPS = 5


@dataclass(frozen=True, slots=True)
class Left:
    """A row whose final changed no answer, with the reason."""

    problem: Problem
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What came of it: trials that are new to the database, answers that are new or changed, and rows without one."""

    device_key: str
    rows: int
    trials: int
    answers: int
    left: tuple[Left, ...]


def judgeable(path: Path) -> Report:
    """Return the report at `path`.

    Raises SettingsError where it is no such report, contradicts itself on whose figures it holds, or has a final that
    cannot be judged.
    """
    report = core_report.read(path)
    for fault in _faults(report):
        raise SettingsError(f"{path}: {fault}; nothing was imported")
    return report


def import_report(report: Report, database: Database) -> Imported:
    """Keep a judgeable report. Nothing newer is overwritten, and no answer that a final of the report did not hold.

    Raises ConflictError, and keeps nothing, where answers change all the time.
    """
    trials, left = 0, []
    with database.write() as session:
        devices = {row.run.device_key: row.run.device for row in report.rows}
        for device in devices.values():
            DeviceRepository(session).save(device)
        for row in report.rows:
            trials += _keep_trials(session, row)
            reason = _keep_answer(session, row)
            if reason:
                left.append(Left(row.problem, reason))
    refresh_snapshot(database)
    answers = len(report.rows) - len(left)
    return Imported(
        device_key=report.device_key, rows=len(report.rows), trials=trials, answers=answers, left=tuple(left)
    )


def _faults(report: Report) -> Iterator[str]:
    if not report.rows:
        yield "it holds no row"
    seen: set[Problem] = set()
    for row in report.rows:
        name, keys = row.problem.key, {row.run.device.key, row.run.device_key, report.device.key, report.device_key}
        candidates = [entry.candidate for entry in row.entries]
        if len(keys) > 1:
            yield f"{name} is said to be of {' and of '.join(sorted(keys))}"
        if row.problem in seen:
            yield f"{name} is there twice"
        seen.add(row.problem)
        if row.reference not in candidates or len(set(candidates)) < len(candidates):
            yield f"the final of {name} needs its reference {row.reference} and every other candidate once"
        numbers = [
            number
            for entry in row.entries
            for number in (entry.ratio, entry.measurement.median_ms, entry.measurement.p20_ms, entry.measurement.p80_ms)
        ]
        if not all(math.isfinite(number) and number > 0 for number in numbers) or not 0 <= row.noise < 1:
            yield f"the final of {name} has a ratio or a time that is not above 0, or no noise between 0 and 1"
        if any(moment.tzinfo is None for moment in (row.run.started, *(trial.when for trial in row.trials))):
            yield f"{name} has a time without its zone"


def _keep_trials(session: Session, row: Row) -> int:
    trials, device_key = TrialRepository(session), row.run.device_key
    known = {(trial.candidate, trial.stage, trial.when) for trial in trials.list(row.problem, device_key)}
    new = [trial for trial in row.trials if (trial.candidate, trial.stage, trial.when) not in known]
    for trial in new:
        # the report's jobs, if any, are of no database
        kept = replace(trial, job=None)
        trials.add(kept, problem=row.problem, device_key=device_key, software=row.run.software)
    return len(new)


def _keep_answer(session: Session, row: Row) -> str:
    """Let the final of `row` decide the standing answer; return why it did not, or nothing."""
    answers = AnswerRepository(session)
    for _ in range(MAX_SWAPS):
        standing = answers.get(row.run.device_key, row.problem)
        reason = "" if standing is None else _why_left(standing, row)
        if reason:
            return reason
        answer = answer_of(row, standing=standing.plan.forward if standing else None)
        assert answer.evidence is not None
        version = standing.version if standing else 0
        if answers.replace(answer, expected_version=version, reason=f"imported: {answer.evidence.reason}"):
            return ""
    raise ConflictError(
        f"the answer of {row.problem.key} changes all the time: let its tuner finish, and run this again"
    )


def _why_left(standing: Answer, row: Row) -> str:
    measured = standing.evidence.measured if standing.evidence else None
    if measured == held(row):
        return "this final is kept already"
    if measured is not None and measured > held(row):
        return f"the standing answer was measured later, {measured:%Y-%m-%d %H:%M} UTC"
    if standing.plan.forward not in [entry.candidate for entry in row.entries] or standing.plan.backward:
        return f"its final did not hold the standing answer, {standing.plan}"
    return ""
