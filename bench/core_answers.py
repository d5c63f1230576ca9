"""Answers from finals that `tilewise bench core` held, by the tuner's own rule of verdict.

They are what a machine without a database runs its layers with, and what `tilewise db import` keeps in one.
"""

from dataclasses import replace
from datetime import datetime

from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.trial import Outcome
from tilewise.kernels.backends import backend_named
from tilewise.tuner.timing import Final
from tilewise.tuner.verdict import Searched, decide

from .core_report import Report
from .records import Row


def answers_of(report: Report) -> Snapshot:
    """Return an answer for every row: its fastest, or torch's own choice unless that is beaten by more than noise."""
    return Snapshot.of(answer_of(row) for row in report.rows if row.entries)


def answer_of(row: Row, *, standing: Candidate | None = None) -> Answer:
    """Return what the final of `row` says, `standing` being the answer that it has to beat, if there is one.

    The row's reference must be among its entries.
    """
    measured = {entry.candidate: entry.measurement for entry in row.entries}
    candidates = tuple(dict.fromkeys((row.reference, *measured)))
    answer = decide(
        row.problem,
        row.run.device_key,
        row.run.software,
        candidates,
        Final(measurements=tuple(measured[candidate] for candidate in candidates), noise=row.noise),
        standing=standing,
        searched=Searched(
            job=None,
            trials=len(row.trials),
            failed=sum(trial.outcome is not Outcome.OK for trial in row.trials),
            seconds=row.seconds,
        ),
        measured=held(row),
        defaults=[candidate for candidate in candidates if _is_default(candidate, row)],
    )
    assert answer.evidence is not None
    reason = f"{answer.evidence.reason}; a final of `tilewise bench core`"
    return replace(answer, version=1, evidence=replace(answer.evidence, reason=reason))


def _is_default(candidate: Candidate, row: Row) -> bool:
    if not candidate.configs:
        return False
    return candidate == backend_named(candidate.backend).default(row.problem, row.run.device)


def held(row: Row) -> datetime:
    """Return when the final of `row` began: right behind its last trial."""
    return max((trial.when for trial in row.trials), default=row.run.started)
