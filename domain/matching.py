"""Which kept answer fits a question: the one rule that the service and the client share.

The order is exact, stale, near, predicted, default. An answer is exact when it was measured for the problem itself or
for its bucket, with the software that its plan depends on; near when it was measured for a problem that differs in
lengths, batch or heads; predicted when it was measured on another device of the kind, for the problem or one that is
near. Near and predicted answers are of the same software, and served only where even the worst case of what that may
cost beats torch's own choice (domain/transfer.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from . import experience, transfer
from .answer import Answer, Match
from .config import Candidate, Plan
from .device_gap import DeviceGap, device_gap
from .near import NearIndex
from .problem import Pass, Problem
from .software import Software

SDPA = Candidate("sdpa")
PLAIN = Candidate("plain")


def default_candidate(problem: Problem) -> Candidate:
    """Return what runs when nothing was measured: torch SDPA's own choice wherever SDPA can compute the problem.

    Softcap, paged caches and the promise of the same bits are outside SDPA; the plain torch form takes what it can of
    them.
    """
    return PLAIN if problem.softcap or problem.page_size or problem.deterministic else SDPA


def default_answer(problem: Problem, device_key: str, missed: str, *, regret: float | None = None) -> Answer:
    """Return the answer for a problem that nothing is known about; `missed` says why."""
    return Answer(
        problem=problem,
        device_key=device_key,
        plan=Plan(default_candidate(problem)),
        match=Match.DEFAULT,
        regret=regret,
        missed=missed,
    )


class KeptAnswers(Mapping[str, Answer]):
    """The answers of one device by problem key, with what is made of all of them; never changed once made.

    That is made when it is first needed, or by `prepare`: of thousands it takes longer than a step may be delayed.
    """

    def __init__(self, kept: Mapping[str, Answer]) -> None:
        self._kept = kept
        self._lost_by_default: dict[Pass, float | None] = {}

    def __getitem__(self, key: str) -> Answer:
        return self._kept[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @cached_property
    def index(self) -> NearIndex:
        return NearIndex(self._kept)

    @cached_property
    def lost_when_stale(self) -> float | None:
        return experience.lost_when_stale(self._kept.values())

    def prepare(self) -> None:
        _ = self.index
        _ = self.lost_when_stale
        for pass_ in Pass:
            self.lost_by_default(pass_)

    def lost_by_default(self, pass_: Pass) -> float | None:
        if pass_ not in self._lost_by_default:
            alike = (self._kept[key] for key in self._kept if key.startswith(f"{pass_}."))
            self._lost_by_default[pass_] = experience.lost_by_default(alike)
        return self._lost_by_default[pass_]


@dataclass(frozen=True, slots=True)
class Predictor:
    """The answers of another device, `gap` away."""

    device_key: str
    gap: DeviceGap
    kept: KeptAnswers

    def useful(self) -> Iterator[str]:
        """Yield the keys of those of its answers that can be served where the asker is."""
        models = transfer.shipped()
        return (key for key in self.kept if transfer.may_predict(self.kept[key], self.gap, models))


def by_device(answers: Iterable[Answer]) -> dict[str, KeptAnswers]:
    """Return answers of any devices, those of each together."""
    found: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        found.setdefault(answer.device_key, {})[answer.problem.key] = answer
    return {device_key: KeptAnswers(kept) for device_key, kept in found.items()}


def predictors(device_key: str, devices: Mapping[str, KeptAnswers]) -> tuple[Predictor, ...]:
    """Return which devices' answers can say something of another one: those of its kind, the nearest first."""
    gaps = {key: device_gap(key, device_key) for key in devices if key != device_key}
    found = [Predictor(key, gap, devices[key]) for key, gap in gaps.items() if gap is not None]
    return tuple(sorted(found, key=lambda each: (each.gap.distance, each.device_key)))


def match(
    problem: Problem,
    device_key: str,
    software: Software | None,
    kept: Mapping[str, Answer],
    others: Iterable[Predictor] = (),
) -> Answer:
    """Return the best answer for `problem` that `kept` (problem key to answer, of one device) and `others` hold.

    `software` is what the asker runs; None skips the comparison, for a reader who only wants to look. Where `kept` is a
    KeptAnswers, what is found out about all of it is not found out again at every question.
    """
    own = kept if isinstance(kept, KeptAnswers) else KeptAnswers(kept)
    bucket = problem.bucket()
    stale: Answer | None = None
    for key in dict.fromkeys((problem.key, bucket.key)):
        found = own.get(key)
        if found is None:
            continue
        answer = replace(found, problem=problem, device_key=device_key, measured=found.measured or found.problem)
        changed = differences(found, software)
        if not changed:
            return replace(answer, match=Match.EXACT, missed="", regret=0.0)
        missed = f"software: {', '.join(changed)}"
        stale = stale or replace(answer, match=Match.STALE, missed=missed, regret=own.lost_when_stale)
    if stale is not None:
        return stale
    unmeasured = f"{bucket.key} was not measured on {device_key}"
    return (
        _near(bucket, problem, software, own, unmeasured)
        or _predicted(bucket, problem, device_key, software, others, unmeasured)
        or default_answer(problem, device_key, f"problem: {unmeasured}", regret=own.lost_by_default(problem.pass_))
    )


def _near(
    bucket: Problem, problem: Problem, software: Software | None, kept: KeptAnswers, unmeasured: str
) -> Answer | None:
    """Return the nearest answer of today's software whose worst case for `problem` still beats torch's own choice."""
    for far, measured in kept.index.nearest(bucket):
        found = kept[measured.key]
        answer = None if differences(found, software) else transfer.near(found, problem, far, transfer.shipped())
        if answer is not None:
            return replace(answer, missed=f"problem: {unmeasured}; {measured.key} was")
    return None


def _predicted(
    bucket: Problem,
    problem: Problem,
    device_key: str,
    software: Software | None,
    others: Iterable[Predictor],
    unmeasured: str,
) -> Answer | None:
    """Return what the nearest device says of the nearest problem where even its worst case beats torch's own choice."""
    for other in others:
        for far, measured in other.kept.index.nearest(bucket):
            found = other.kept[measured.key]
            if differences(found, software):
                continue
            answer = transfer.predicted(found, problem, device_key, far, other.gap, transfer.shipped())
            if answer is not None:
                return replace(answer, missed=f"device: {unmeasured}; {measured.key} was on {other.device_key}")
    return None


def differences(found: Answer, software: Software | None) -> tuple[str, ...]:
    """Return how `software` differs from what `found` was measured with, as far as its plan depends on it."""
    if software is None:
        return ()
    candidates = found.plan.candidates
    return found.software.for_candidates(*candidates).differences(software.for_candidates(*candidates))
