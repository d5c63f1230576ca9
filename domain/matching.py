"""Which kept answer fits a question: the one rule that the service and the client share.

The order is exact, stale, default; an answer is exact when it was measured for the problem itself or for its bucket,
with the software that its plan depends on.
"""

from collections.abc import Mapping
from dataclasses import replace

from .answer import Answer, Match
from .config import Candidate, Plan
from .problem import Problem
from .software import Software

SDPA = Candidate("sdpa")
PLAIN = Candidate("plain")


def default_candidate(problem: Problem) -> Candidate:
    """Return what runs when nothing was measured: torch SDPA's own choice wherever SDPA can compute the problem.

    Softcap, paged caches and the promise of the same bits are outside SDPA; the plain torch form takes what it can of
    them.
    """
    return PLAIN if problem.softcap or problem.page_size or problem.deterministic else SDPA


def default_answer(problem: Problem, device_key: str, missed: str) -> Answer:
    """Return the answer for a problem that nothing is known about; `missed` says why."""
    return Answer(
        problem=problem,
        device_key=device_key,
        plan=Plan(default_candidate(problem)),
        match=Match.DEFAULT,
        measured=None,
        missed=missed,
    )


def match(problem: Problem, device_key: str, software: Software | None, kept: Mapping[str, Answer]) -> Answer:
    """Return the best answer that `kept` (problem key to answer, of one device) holds for `problem`.

    `software` is what the asker runs; None skips the comparison, for a reader who only wants to look.
    """
    bucket = problem.bucket()
    stale: Answer | None = None
    for key in dict.fromkeys((problem.key, bucket.key)):
        found = kept.get(key)
        if found is None:
            continue
        answer = replace(found, problem=problem, device_key=device_key, measured=found.measured or found.problem)
        differences = _differences(found, software)
        if not differences:
            return replace(answer, match=Match.EXACT, missed="", regret=0.0)
        stale = stale or replace(answer, match=Match.STALE, missed=f"software: {', '.join(differences)}")
    return stale or default_answer(problem, device_key, f"problem: {bucket.key} was not measured on {device_key}")


def _differences(found: Answer, software: Software | None) -> tuple[str, ...]:
    if software is None:
        return ()
    candidates = found.plan.candidates
    return found.software.for_candidates(*candidates).differences(software.for_candidates(*candidates))
