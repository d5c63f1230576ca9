"""Which kept answer fits a question: the one rule that the service and the client share.

The order is exact, stale, near, default. An answer is exact when it was measured for the problem itself or for its
bucket, with the software that its plan depends on; near when it was measured for a problem that differs in lengths,
batch or heads, and even the worst case of what that may cost beats torch's own choice (domain/near.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from .answer import Answer, Match
from .config import Candidate, Plan
from .near import MODELS, NearIndex, bounded
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


class KeptAnswers(Mapping[str, Answer]):
    """The answers of one device by problem key, with the index that finds near ones; never changed once made."""

    def __init__(self, kept: Mapping[str, Answer]) -> None:
        self._kept = kept

    def __getitem__(self, key: str) -> Answer:
        return self._kept[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @cached_property
    def index(self) -> NearIndex:
        return NearIndex(self._kept)


def match(problem: Problem, device_key: str, software: Software | None, kept: Mapping[str, Answer]) -> Answer:
    """Return the best answer that `kept` (problem key to answer, of one device) holds for `problem`.

    `software` is what the asker runs; None skips the comparison, for a reader who only wants to look. Where `kept` is a
    KeptAnswers, its index is made once and not at every question.
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
        # what a plan loses under other software nobody measured: no bound is better than a made-up one
        stale = stale or replace(answer, match=Match.STALE, missed=f"software: {', '.join(differences)}", regret=None)
    missed = f"problem: {bucket.key} was not measured on {device_key}"
    return stale or _near(bucket, problem, software, kept, missed) or default_answer(problem, device_key, missed)


def _near(
    bucket: Problem, problem: Problem, software: Software | None, kept: Mapping[str, Answer], missed: str
) -> Answer | None:
    """Return the nearest answer of today's software whose worst case for `problem` still beats torch's own choice."""
    index = kept.index if isinstance(kept, KeptAnswers) else NearIndex(kept)
    for far, measured in index.nearest(bucket):
        found = kept[measured.key]
        answer = None if _differences(found, software) else bounded(found, problem, far, MODELS)
        if answer is not None:
            return replace(answer, match=Match.NEAR, missed=f"{missed}; {measured.key} was")
    return None


def _differences(found: Answer, software: Software | None) -> tuple[str, ...]:
    if software is None:
        return ()
    candidates = found.plan.candidates
    return found.software.for_candidates(*candidates).differences(software.for_candidates(*candidates))
