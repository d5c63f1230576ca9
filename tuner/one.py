"""One candidate, checked and timed beside torch's own choice, with nothing kept: what a single trial was, again."""

from dataclasses import dataclass

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.errors import TuningError
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Problem
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.backends import backend_named

from .crew import Crew, Pipeline
from .measuring import Preparation
from .timing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempted:
    """What came of a candidate: its trial, and where it was right the final of `finalists`, the reference first."""

    trial: Trial
    finalists: tuple[Candidate, ...] = ()
    final: Final | None = None


def try_one(problem: Problem, candidate: Candidate, *, crew: Crew, rounds: int, seconds: float, seed: int) -> Attempted:
    """Check and screen `candidate`, and hold a final of it and torch's own choice of so many rounds or seconds.

    Raises ConfigError for an unknown backend, and TuningError where torch's own choice, to be compared with, fails.
    """
    reference = default_candidate(problem)
    preparation = Preparation(
        problem=problem,
        device=str(crew.device),
        reference=reference,
        seed=seed,
        threads=torch.get_num_threads(),
        setup=crew.setup,
    )
    pipeline = Pipeline(crew, preparation)
    reason = backend_named(candidate.backend).supports(problem, devices.describe(crew.device))
    if reason is not None:
        return Attempted(trial=pipeline.trial(candidate, Outcome.UNSUPPORTED, reason))
    try:
        trials = {each: _tried(pipeline, each) for each in (reference, candidate)}
        if trials[candidate].outcome is not Outcome.OK:
            return Attempted(trial=trials[candidate])
        if trials[reference].outcome is not Outcome.OK:
            raise TuningError(f"torch's own choice fails here, to be compared with: {trials[reference].message}")
        finalists = tuple(dict.fromkeys((reference, candidate)))
        judged = pipeline.judge(finalists, rounds=rounds, seconds=seconds)
    finally:
        pipeline.abandon()
    failed = next((trial for trial in judged.failures if trial.candidate == candidate), None)
    if judged.final is None and failed is None:
        raise TuningError(f"torch's own choice fails in the final: {judged.failures[0].message}")
    return Attempted(trial=failed or trials[candidate], finalists=finalists, final=judged.final)


def _tried(pipeline: Pipeline, candidate: Candidate) -> Trial:
    pipeline.submit(candidate)
    return pipeline.take(best_ratio=float("inf")).trial
