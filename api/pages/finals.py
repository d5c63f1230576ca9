"""What a problem's page tells of finals: who was in the last one, who was not and why, and how answers followed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest

from tilewise.db.answers import AnswerChange
from tilewise.db.trial_points import Failure, TrialPoint
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate
from tilewise.domain.matching import default_candidate
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalistRow:
    """One finalist, fastest first.

    - over: how many times faster than torch's own choice in the same final.
    - best: whether it is the fastest of its backend; winner: whether the answer runs it.
    """

    candidate: Candidate
    measurement: Measurement
    over: float | None
    best: bool
    winner: bool
    default: bool
    reference: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A backend that was tried and not in the final, with the reason."""

    backend: str
    reason: str
    trial: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of an answer: what it replaced and what of its software had changed since, if anything.

    - over: speed-up over torch's own choice in its own final.
    - slower: by which share that speed-up fell against the version before; None where it did not, or is not known.
    """

    answer: Answer
    reason: str
    changed: datetime
    replaced: Candidate | None
    software: tuple[str, ...]
    over: float | None
    slower: float | None

    @property
    def measured(self) -> datetime:
        return self.answer.evidence.measured if self.answer.evidence else self.changed


def rows(answer: Answer) -> tuple[FinalistRow, ...]:
    """Return who was in the final that an answer rests on, fastest first; nobody where it rests on none."""
    if answer.evidence is None:
        return ()
    finalists = sorted(answer.evidence.finalists, key=lambda each: each.measurement.ratio or 1.0)
    baseline = _baseline_ratio(answer)
    seen: set[str] = set()
    made = []
    for each in finalists:
        backend, ratio = each.candidate.backend, each.measurement.ratio
        made.append(
            FinalistRow(
                candidate=each.candidate,
                measurement=each.measurement,
                over=baseline / ratio if ratio else None,
                best=backend not in seen,
                winner=each.candidate in answer.plan.candidates,
                default=each.default,
                reference=each.candidate == answer.evidence.reference,
            )
        )
        seen.add(backend)
    return tuple(made)


def absent(points: Iterable[TrialPoint], failures: Sequence[Failure], answer: Answer | None) -> tuple[Absent, ...]:
    """Return the backends that were tried, and not in the final."""
    evidence = answer.evidence if answer else None
    there = {each.candidate.backend for each in evidence.finalists} if evidence else set()
    best: dict[str, TrialPoint] = {}
    for point in points:
        name = point.candidate.backend
        if point.outcome is Outcome.OK and (name not in best or (point.ratio or 9e9) < (best[name].ratio or 9e9)):
            best[name] = point
    made = [
        Absent(backend=name, reason=_why_out(point), trial=point.id)
        for name, point in sorted(best.items())
        if name not in there
    ]
    named = there | set(best)
    for failure in failures:
        if failure.backend not in named:
            named.add(failure.backend)
            reason = f"{failure.outcome.replace('_', ' ')}: {failure.message}"
            made.append(Absent(backend=failure.backend, reason=reason, trial=failure.newest))
    return tuple(made)


def history(changes: Sequence[AnswerChange]) -> tuple[Version, ...]:
    """Return the versions of an answer, the newest first, each with what came before it."""
    made = []
    for change, before in zip_longest(changes, changes[1:]):
        over, over_before = change.answer.speedup, before.answer.speedup if before else None
        fell = 1 - over / over_before if over and over_before else 0.0
        noise = change.answer.evidence.noise if change.answer.evidence else 0.0
        made.append(
            Version(
                answer=change.answer,
                reason=change.reason,
                changed=change.changed,
                replaced=before.answer.plan.forward if before else None,
                software=_differences(before.answer, change.answer) if before else (),
                over=over,
                slower=fell if fell > max(noise, 0.005) else None,
            )
        )
    return tuple(made)


def _differences(before: Answer, after: Answer) -> tuple[str, ...]:
    """Return what of the software that either plan depends on had changed."""
    candidates = (*before.plan.candidates, *after.plan.candidates)
    old: Software = before.software.for_candidates(*candidates)
    return old.differences(after.software.for_candidates(*candidates))


def _baseline_ratio(answer: Answer) -> float:
    """Return the ratio of torch's own choice, which nearly always is the reference, or of what stood in for it."""
    if answer.evidence is None:
        return 1.0
    ratios = {each.candidate: each.measurement.ratio for each in answer.evidence.finalists}
    return ratios.get(default_candidate(answer.problem)) or 1.0


def _why_out(point: TrialPoint) -> str:
    if point.ratio is None:
        return "right, and not among the fastest"
    return f"not among the fastest: {point.ratio:.2f} of the reference's time when it was screened"
