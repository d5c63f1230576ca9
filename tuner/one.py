"""One candidate, checked and timed beside torch's own choice, with nothing kept: what a single trial was, again."""

from collections.abc import Mapping
from dataclasses import dataclass

from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.errors import ConfigError, TuningError
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Problem
from tilewise.domain.space import SearchSpace
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.backends import backend_named

from .crew import Crew, Pipeline
from .timing import Final
from .tune import STAND_INS


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempted:
    """What came of a candidate: its trial, and where it was right the final of `finalists`, the reference first."""

    trial: Trial
    finalists: tuple[Candidate, ...] = ()
    final: Final | None = None


def try_one(problem: Problem, candidate: Candidate, *, crew: Crew, rounds: int, seconds: float, seed: int) -> Attempted:
    """Check and screen `candidate`, and hold a final of it and torch's own choice of so many rounds or seconds.

    As in a tuning, another path stands in where torch's own choice is wrong. Raises ConfigError for an unknown backend,
    role, kernel or parameter, and TuningError where none of torch's paths is right.
    """
    preparation = crew.preparation(problem, default_candidate(problem), seed=seed)
    pipeline, device = Pipeline(crew, preparation), devices.describe(crew.device)
    reason = backend_named(candidate.backend).supports(problem, device)
    if reason is not None:
        return Attempted(trial=pipeline.trial(candidate, Outcome.UNSUPPORTED, reason))
    _refuse_unknown(candidate, backend_named(candidate.backend).spaces(problem, device))
    try:
        reference = _reference(pipeline, problem, device)
        trial = _tried(pipeline, candidate)
        if trial.outcome is not Outcome.OK:
            return Attempted(trial=trial)
        finalists = tuple(dict.fromkeys((reference, candidate)))
        judged = pipeline.judge(finalists, rounds=rounds, seconds=seconds)
    finally:
        pipeline.abandon()
    failed = next((each for each in judged.failures if each.candidate == candidate), None)
    if judged.final is None and failed is None:
        raise TuningError(f"{reference}, to be compared with, fails in the final: {judged.failures[0].message}")
    return Attempted(trial=failed or trial, finalists=finalists, final=judged.final)


def _refuse_unknown(candidate: Candidate, spaces: Mapping[str, SearchSpace]) -> None:
    """Raise ConfigError where the backend would run something else than `candidate` says; any values may be tried."""
    for role, config in candidate.configs:
        if role not in spaces:
            raise ConfigError(f"{candidate.backend} has the roles {', '.join(spaces) or 'none'} here, not {role!r}")
        kernels = {each.kernel: {parameter.name for parameter in each.parameters} for each in spaces[role].by_kernel}
        if kernels.get(config.kernel) != config.as_dict().keys():
            known = " or ".join(f"{kernel} with {', '.join(sorted(names))}" for kernel, names in kernels.items())
            raise ConfigError(
                f"expected for {role} a config of {known}; got {config.kernel} with {str(config) or 'none'}"
            )


def _reference(pipeline: Pipeline, problem: Problem, device: Device) -> Candidate:
    """Return the first of torch's own choice and its stand-ins that is right here, and compare with it."""
    wrong = []
    for candidate in (default_candidate(problem), *map(Candidate, STAND_INS)):
        if backend_named(candidate.backend).supports(problem, device) is not None:
            continue
        pipeline.compare_with(candidate)
        trial = _tried(pipeline, candidate)
        if trial.outcome is Outcome.OK:
            return candidate
        wrong.append(f"{candidate} fails: {trial.message}")
    raise TuningError(f"{problem.key}: nothing can be compared: {'; '.join(wrong)}")


def _tried(pipeline: Pipeline, candidate: Candidate) -> Trial:
    pipeline.submit(candidate)
    return pipeline.take(best_ratio=float("inf")).trial
