"""From an answer to what really runs here: validated, supported, and demoted where it fails."""

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from tilewise.client.usage import Used
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.errors import ConfigError, DeviceError, SettingsError, UnsupportedError
from tilewise.domain.matching import PLAIN, default_candidate
from tilewise.domain.problem import Problem
from tilewise.domain.space import SearchSpace
from tilewise.kernels import device as devices
from tilewise.kernels.backends import BACKENDS, backend_named

from . import session

log = logging.getLogger("tilewise")

# A name that stands for several backends: the first that supports the problem here runs.
FAMILIES = {"any_flash": ("flash_cute", "flash", "sdpa_flash")}
# What a layer's kernel_type means, as a name that `resolve` takes.
KERNEL_TYPES = {"auto": "auto", "flash": "any_flash", "triton": "triton", "sdpa": "sdpa", "pytorch": "plain"}

# What failed here when it ran, for the life of the process: a growing cache must not fail, and warn, at every length.
_demoted: set[tuple[torch.device, Candidate, Problem]] = set()
_warned: set[Hashable] = set()


@dataclass(slots=True)
class Resolved:
    """What runs for one problem: `candidate`, and once that failed `fallback`, torch's own choice."""

    problem: Problem
    candidate: Candidate
    fallback: Candidate
    used: Used = field(default_factory=Used.nobodys)  # counts the calls of an answer


def resolve(
    problem: Problem, device: torch.device, backend: str | Candidate, *, return_lse: bool, strict: bool
) -> Resolved:
    """Return what runs for `problem`: the answer's plan for `auto`, else the named backend, one of a family, or a given
    candidate.

    A plan or backend that cannot run here gives torch's own choice and one warning, or raises with `strict`.
    """
    # torch's own choice keeps the LSE to itself; its plain form gives it
    fallback = PLAIN if return_lse else default_candidate(problem)
    if isinstance(backend, Candidate) or (backend != "auto" and backend not in FAMILIES):
        backend_named(backend.backend if isinstance(backend, Candidate) else backend)
    try:
        described = devices.describe(device)
        candidate = _wanted(backend, problem, device, described)
    except (DeviceError, SettingsError) as error:  # no device to ask about, or no client to ask
        if strict:
            raise
        _warn(f"{error}; torch's own choice runs instead")
        return Resolved(problem, fallback, fallback)
    reason = _why_not(candidate, problem, described, return_lse=return_lse and backend != "auto")
    if reason is not None:
        if strict:
            raise UnsupportedError(
                f"{candidate} cannot run {problem.key} on {described.key}: {reason}; "
                "leave out strict=True to run torch's own choice"
            )
        _warn(
            f"{candidate} cannot run {problem.key} on {described.key}: {reason}; torch's own choice runs instead",
            once=(candidate.backend, reason),  # not for every length of a growing cache
        )
        candidate = default_candidate(problem)
    if return_lse and not backend_named(candidate.backend).gives_lse:
        candidate = _with_lse(problem, described)
    if not strict and (device, candidate, problem.bucket()) in _demoted:
        candidate = fallback
    return Resolved(problem, candidate, fallback)


def _wanted(backend: str | Candidate, problem: Problem, device: torch.device, described: Device) -> Candidate:
    """Return what was asked for, with the best known config where the caller names none."""
    if isinstance(backend, Candidate):
        return backend
    name = member(backend, problem, described)
    answer = session.client_for(device).answer(problem)
    return answer.plan.forward if name == "auto" else best_known(answer, name)


def demote(resolved: Resolved, device: torch.device, error: Exception) -> None:
    """Let `fallback` run from now on, here and for all problems of the same bucket, because of `error`."""
    log.warning("%s failed on %s, torch's own choice runs instead: %s", resolved.candidate, resolved.problem.key, error)
    _demoted.add((device, resolved.candidate, resolved.problem.bucket()))
    resolved.candidate = resolved.fallback


def warn_of_transforms(candidate: Candidate, error: Exception) -> None:
    """Say once that `candidate` stood back in a transform of torch.func because of `error`; it runs elsewhere."""
    _warn(
        f"{candidate} failed inside a transform of torch.func, where torch's own choice runs instead: {error}",
        once=(candidate.backend, "transforms"),
    )


def forget() -> None:
    """Forget what failed and what was warned of; for tests."""
    _demoted.clear()
    _warned.clear()


def _warn(message: str, once: Hashable = None) -> None:
    """Log `message`, but only the first one of what is the same: `once`, the message itself where that is None."""
    same = message if once is None else once
    if same not in _warned:
        _warned.add(same)
        log.warning("%s", message)


def member(name: str, problem: Problem, device: Device) -> str:
    """Return the backend that runs for `name`, itself unless it is a family; the last where none supports `problem`."""
    members = FAMILIES.get(name)
    if members is None:
        return name
    return next((each for each in members if backend_named(each).supports(problem, device) is None), members[-1])


def best_known(answer: Answer, backend: str) -> Candidate:
    """Return the best known config of `backend`: the answer's own, else the best of its final, else the default."""
    finalists = answer.evidence.finalists if answer.evidence else ()
    known = [answer.plan.forward, *(finalist.candidate for finalist in finalists)]
    return next((candidate for candidate in known if candidate.backend == backend), Candidate(backend))


def _why_not(candidate: Candidate, problem: Problem, device: Device, *, return_lse: bool) -> str | None:
    try:
        backend = backend_named(candidate.backend)
    except ConfigError as error:
        return str(error)
    if return_lse and not backend.gives_lse:
        return "it does not return the LSE"
    reason = backend.supports(problem, device)
    if reason is not None:
        return reason
    # an answer may have been measured for the bucket, whose longer lengths allow larger tiles
    spaces = [backend.spaces(size, device) for size in (problem, problem.bucket())]
    for role, config in candidate.configs:
        reasons = [_outside(of_size.get(role), role, config) for of_size in spaces]
        if None not in reasons:
            return reasons[0]
    return None


def _outside(space: SearchSpace | None, role: str, config: Config) -> str | None:
    return f"it has no parameters for {role}" if space is None else space.why_not(config)


def _with_lse(problem: Problem, device: Device) -> Candidate:
    for backend in BACKENDS.values():
        if backend.gives_lse and backend.supports(problem, device) is None:
            return Candidate(backend.name)
    raise UnsupportedError(f"no backend returns the LSE for {problem.key}; call without return_lse")
