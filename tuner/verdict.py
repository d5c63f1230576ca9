"""From the interleaved final to the answer: who won, by how much more than noise, and why."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from tilewise.domain.answer import Answer, Evidence, Finalist, Match
from tilewise.domain.config import Candidate, Plan
from tilewise.domain.matching import default_candidate, differences
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import now

from .timing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What the evidence says of the search before the final; `job` is None where no job of the database ran it."""

    job: str | None
    trials: int
    failed: int
    seconds: float


def decide(
    problem: Problem,
    device_key: str,
    software: Software,
    candidates: tuple[Candidate, ...],
    final: Final,
    *,
    standing: Candidate | None,
    searched: Searched,
    previous: Answer | None = None,
    measured: datetime | None = None,
    defaults: Collection[Candidate] = (),
) -> Answer:
    """Return the answer that a final gives, which was held at `measured` (None: now).

    `candidates[0]` is the reference of all ratios. Torch's own choice is among the candidates; where it is wrong, the
    reference stands in for it. The incumbent (the standing answer, else torch's own choice) stays unless the fastest
    beats it by more than the final's noise. `previous` is the answer that this one follows: what it lost by now is
    kept where it is of other software. `defaults` are the candidates that their backends would run unasked.
    """
    ratios = {c: m.ratio or 1.0 for c, m in zip(candidates, final.measurements, strict=True)}
    results = dict(zip(candidates, final.measurements, strict=True))
    default = default_candidate(problem)
    baseline = default if default in results else candidates[0]
    incumbent = standing if standing in results else baseline
    ranked = sorted(candidates, key=lambda candidate: ratios[candidate])
    fastest = ranked[0]
    margin = max(final.noise, results[fastest].spread or 0.0, results[incumbent].spread or 0.0)
    gain = 1 - ratios[fastest] / ratios[incumbent]
    winner = fastest if gain > margin else incumbent
    won = results[winner]
    return Answer(
        problem=problem,
        device_key=device_key,
        plan=Plan(winner),
        match=Match.EXACT,
        measured=problem,
        software=software,
        expected_ms=won.median_ms,
        interval=(won.p20_ms, won.p80_ms),
        regret=0.0,
        runner_up=next((candidate for candidate in ranked if candidate != winner), None),
        baseline_ms=results[baseline].median_ms,
        stale_loss=None if previous is None else _stale_loss(previous, software, ratios, winner),
        evidence=Evidence(
            job=searched.job,
            measured=measured or now(),
            reference=candidates[0],
            finalists=tuple(
                Finalist(candidate=candidate, measurement=results[candidate], default=candidate in defaults)
                for candidate in ranked
            ),
            noise=final.noise,
            trials=searched.trials,
            failed=searched.failed,
            seconds=searched.seconds,
            reason=_reason(winner, fastest, incumbent, gain, margin, title=_title(problem, incumbent, standing))
            + ("; another process used the device meanwhile" if won.power_state == "shared" else ""),
        ),
    )


def _stale_loss(
    previous: Answer, software: Software, ratios: dict[Candidate, float], winner: Candidate
) -> float | None:
    """Return the share of time that `previous` loses under `software`, or what was seen of the one before it."""
    if not differences(previous, software):
        return previous.stale_loss
    stood = ratios.get(previous.plan.forward)
    return None if stood is None else max(0.0, stood / ratios[winner] - 1)


def _title(problem: Problem, incumbent: Candidate, standing: Candidate | None) -> str:
    if incumbent == standing:
        return "the standing answer"
    own = incumbent == default_candidate(problem)
    return "torch's own choice" if own else "what stands in for torch's own choice, which is wrong here"


def _reason(
    winner: Candidate, fastest: Candidate, incumbent: Candidate, gain: float, margin: float, *, title: str
) -> str:
    if fastest == incumbent:
        return f"{title}, {winner}, is the fastest of the final"
    if winner == incumbent:
        return f"{title}, {winner}, stays: {fastest} is {gain:.2%} faster, within the noise of {margin:.2%}"
    return f"{winner} beats {title}, {incumbent}, by {gain:.2%}, more than the noise of {margin:.2%}"
