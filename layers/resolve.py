"""From an answer to what really runs here: validated, supported, and demoted where it fails."""

import logging
from dataclasses import dataclass

import torch

from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate
from tilewise.domain.errors import ConfigError, UnsupportedError
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Problem
from tilewise.kernels import device as devices
from tilewise.kernels.backends import BACKENDS, backend_named

from . import session

log = logging.getLogger("tilewise")

# A name that stands for several backends: the first that supports the problem here runs.
FAMILIES = {"any_flash": ("flash_cute", "flash", "sdpa_flash")}
# What a layer's kernel_type means, as a name that `resolve` takes.
KERNEL_TYPES = {"auto": "auto", "flash": "any_flash", "triton": "triton", "sdpa": "sdpa", "pytorch": "plain"}


@dataclass(slots=True)
class Resolved:
    """What runs for one problem. `candidate` changes only when it fails and is demoted to torch's own choice."""

    problem: Problem
    candidate: Candidate


def resolve(problem: Problem, device: torch.device, backend: str, *, return_lse: bool, strict: bool) -> Resolved:
    """Return what runs for `problem`: the answer's plan for `auto`, else the named backend or one of a family.

    A plan or backend that cannot run here gives torch's own choice and one warning, or raises with `strict`.
    """
    answer = session.client_for(device).answer(problem)
    backend = _member(backend, problem, device)
    if backend == "auto":
        candidate = answer.plan.forward
    else:
        candidate = _of_backend(answer, backend)
    reason = _why_not(candidate, problem, device)
    if reason is not None:
        message = f"{candidate} cannot run {problem.key} on {devices.describe(device).key}: {reason}"
        if strict:
            raise UnsupportedError(f"{message}; leave out strict=True to run torch's own choice")
        log.warning("%s; torch's own choice runs instead", message)
        candidate = default_candidate(problem)
    if return_lse and not backend_named(candidate.backend).gives_lse:
        candidate = _with_lse(problem, device)
    return Resolved(problem, candidate)


def _member(name: str, problem: Problem, device: torch.device) -> str:
    """Return the backend that runs for `name`, itself unless it is a family; the last where none supports `problem`."""
    members = FAMILIES.get(name)
    if members is None:
        return name
    described = devices.describe(device)
    return next((each for each in members if backend_named(each).supports(problem, described) is None), members[-1])


def _of_backend(answer: Answer, backend: str) -> Candidate:
    """Return the best known config of `backend`: the answer's own, else the best of its final, else the default."""
    backend_named(backend)
    finalists = answer.evidence.finalists if answer.evidence else ()
    known = [answer.plan.forward, *(finalist.candidate for finalist in finalists)]
    return next((candidate for candidate in known if candidate.backend == backend), Candidate(backend))


def _why_not(candidate: Candidate, problem: Problem, device: torch.device) -> str | None:
    described = devices.describe(device)
    try:
        backend = backend_named(candidate.backend)
    except ConfigError as error:
        return str(error)
    reason = backend.supports(problem, described)
    config = candidate.config()
    if reason is not None or config is None:
        return reason
    space = backend.space(problem, described)
    return "it has no parameters" if space is None else space.why_not(config)


def _with_lse(problem: Problem, device: torch.device) -> Candidate:
    described = devices.describe(device)
    for backend in BACKENDS.values():
        if backend.gives_lse and backend.supports(problem, described) is None:
            return Candidate(backend.name)
    raise UnsupportedError(f"no backend returns the LSE for {problem.key}; call without return_lse")
