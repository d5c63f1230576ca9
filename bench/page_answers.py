"""Answers from finals that `tilewise bench core` held: what a machine without a database can run its layers with."""

from tilewise.domain.answer import Answer, Evidence, Finalist, Match
from tilewise.domain.config import Plan
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.trial import Outcome

from .core_report import Report
from .records import Row


def answers_of(report: Report) -> Snapshot:
    """Return an answer for every row: its fastest, or the reference unless that is beaten by more than the noise."""
    return Snapshot.of(_answer(row) for row in report.rows if row.entries)


def _answer(row: Row) -> Answer:
    ordered = sorted(row.entries, key=lambda entry: entry.ratio)
    standing = next((entry for entry in ordered if entry.candidate == row.reference), ordered[0])
    best = ordered[0] if ordered[0].ratio < standing.ratio * (1 - row.noise) else standing
    others = [entry for entry in ordered if entry is not best]
    measured = best.measurement
    return Answer(
        problem=row.problem,
        device_key=row.run.device_key,
        plan=Plan(best.candidate),
        match=Match.EXACT,
        version=1,
        measured=row.problem,
        software=row.run.software,
        expected_ms=measured.median_ms,
        interval=(measured.p20_ms, measured.p80_ms),
        regret=0.0,
        runner_up=others[0].candidate if others else None,
        baseline_ms=standing.measurement.median_ms,
        evidence=Evidence(
            job=None,
            measured=row.run.started,
            reference=row.reference,
            finalists=tuple(Finalist(candidate=each.candidate, measurement=each.measurement) for each in ordered),
            noise=row.noise,
            trials=len(row.trials),
            failed=sum(trial.outcome is not Outcome.OK for trial in row.trials),
            seconds=row.seconds,
            reason=f"the fastest of a final of {len(ordered)} held by `tilewise bench core`",
        ),
    )
