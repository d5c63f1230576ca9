"""Records a landscape: every config of one kernel's space, compiled ahead, checked, screened, and the best again."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.errors import SettingsError, TuningError
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Problem
from tilewise.domain.space import SearchSpace
from tilewise.domain.trial import Measurement, Outcome, now
from tilewise.kernels import device as devices
from tilewise.kernels.backends import backend_named
from tilewise.tuner.crew import Crew, Pipeline, Tried

from .landscape import Header, Landscape, Point

AGAIN_SHARE = 0.05
LEAST_AGAIN = 12
FINAL_ROUNDS = 60
MESSAGE_LIMIT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Whose space is recorded: a kernel of a backend's role; without a name, the role's own kernel."""

    problem: Problem
    backend: str
    role: str = "forward"
    kernel: str | None = None


Told = Callable[[int, int, Point], None]  # how many are done, of how many, and the last one


def record(
    subject: Subject,
    crew: Crew,
    *,
    seed: int = 0,
    final_seconds: float = 60.0,
    command: str = "",
    tell: Told = lambda _done, _every, _point: None,
) -> Landscape:
    """Measure every config of the space on the crew's device.

    The reference of all ratios is the backend's default. The best 5% are measured again, in one interleaved final that
    torch's own choice is in too, where it is right.
    Raises SettingsError for a role or kernel that is not there, TuningError where the reference fails.
    """
    start, began = time.monotonic(), now()
    load = _load()
    described = devices.describe(crew.device)
    space, base = _space(subject, crew.device)
    pipeline = Pipeline(crew, crew.preparation(subject.problem, base, seed=seed))
    configs = list(space)
    found: dict[Candidate, Tried] = {}
    try:
        for candidate in dict.fromkeys([base, *(base.with_config(subject.role, config) for config in configs)]):
            pipeline.submit(candidate)
        while pipeline.pending:
            best = min((_ratio(tried) for tried in found.values()), default=float("inf"))
            tried = pipeline.take(best_ratio=best)
            found[tried.trial.candidate] = tried
            if tried.trial.candidate == base and tried.trial.outcome is not Outcome.OK:
                raise TuningError(f"the reference {base} fails on {subject.problem.key}: {tried.trial.message}")
            tell(len(found), len(configs), _point(tried, subject.role))
        torchs = default_candidate(subject.problem)
        pipeline.submit(torchs)
        right = pipeline.take(best_ratio=float("inf")).trial.outcome is Outcome.OK
        noise, again = _again(pipeline, base, found, final_seconds, torchs if right else None)
    finally:
        pipeline.abandon()
    points = [_point(tried, subject.role, again.get(each)) for each, tried in found.items()]
    header = Header(
        problem=subject.problem,
        device=described,
        device_key=described.key,
        software=devices.software(described.kind),
        role=subject.role,
        kernel=space.kernel,
        base=base,
        reference=base,
        torch_ratio=again[torchs].ratio if torchs in again else None,
        parameters=space.parameters,
        default=space.default,
        seed=seed,
        noise=noise,
        load=(load, _load()),
        seconds=round(time.monotonic() - start, 1),
        command=command,
        started=began,
    )
    inside = {point.config: point for point in points if point.config.kernel == space.kernel}
    return Landscape(header, tuple(inside[config] for config in configs if config in inside))


def _space(subject: Subject, device: torch.device) -> tuple[SearchSpace, Candidate]:
    backend, described = backend_named(subject.backend), devices.describe(device)
    reason = backend.supports(subject.problem, described)
    if reason is not None:
        raise SettingsError(f"{subject.backend} cannot compute {subject.problem.key} here: {reason}")
    spaces = backend.spaces(subject.problem, described)
    if subject.role not in spaces:
        raise SettingsError(f"{subject.backend} has the roles {', '.join(spaces) or 'none'}, not {subject.role!r}")
    kernels = {each.kernel: each for each in spaces[subject.role].by_kernel}
    name = subject.kernel or spaces[subject.role].kernel
    if name not in kernels:
        raise SettingsError(f"the role {subject.role} has the kernels {', '.join(kernels)}, not {name!r}")
    return kernels[name], backend.default(subject.problem, described)


def _again(
    pipeline: Pipeline, base: Candidate, found: dict[Candidate, Tried], seconds: float, torchs: Candidate | None
) -> tuple[float, dict[Candidate, Measurement]]:
    """Return the noise, and what the best 5% and torch's own choice had in a final beside the reference."""
    right = sorted((each for each in found if found[each].trial.outcome is Outcome.OK), key=lambda c: _ratio(found[c]))
    count = max(LEAST_AGAIN, round(AGAIN_SHARE * len(found)))
    while True:
        finalists = tuple(dict.fromkeys([base, *([] if torchs is None else [torchs]), *right[:count]]))
        judged = pipeline.judge(finalists, rounds=FINAL_ROUNDS, seconds=seconds)
        if judged.final is not None:
            return judged.final.noise, dict(zip(finalists, judged.final.measurements, strict=True))
        for trial in judged.failures:
            if trial.candidate == base:
                raise TuningError(f"the reference {base} fails in the final: {trial.message}")
            if trial.candidate == torchs:
                torchs = None
            else:
                found[trial.candidate] = replace(found[trial.candidate], trial=trial)
                right.remove(trial.candidate)


def _point(tried: Tried, role: str, again: Measurement | None = None) -> Point:
    trial, config = tried.trial, tried.trial.candidate.config(role)
    assert config is not None, "what is recorded has a config for its role"
    measurement = again or (trial.measurement if trial.outcome is Outcome.OK else None)
    return Point(
        config=config,
        outcome=trial.outcome,
        ratio=measurement.ratio if measurement else None,
        spread=measurement.spread if measurement else None,
        samples=measurement.samples if measurement else 0,
        again=again is not None,
        compile_seconds=round(tried.compile_seconds, 3),
        seconds=round(trial.seconds - tried.compile_seconds, 3),
        footprints=tried.footprints,
        message=trial.message.strip().partition("\n")[0][:MESSAGE_LIMIT],
    )


def _ratio(tried: Tried) -> float:
    measurement = tried.trial.measurement
    return float("inf") if measurement is None or measurement.ratio is None else measurement.ratio


def _load() -> float:
    return round(os.getloadavg()[0] / len(os.sched_getaffinity(0)), 2)
