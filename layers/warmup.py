"""tilewise.warmup: compile and try what will run, before the first step."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tilewise.domain.answer import Match
from tilewise.domain.config import Candidate
from tilewise.domain.errors import AgreementError
from tilewise.domain.problem import Pass, Problem
from tilewise.kernels import device as devices
from tilewise.kernels.inputs import random_call
from tilewise.kernels.run import run

from . import session
from .agreement import Group, any_rank, group_of, same_everywhere, together
from .resolve import Resolved, demote, resolve

log = logging.getLogger("tilewise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """What runs for a problem from now on: `candidate`. `demoted` says why the answer's does not; empty if it does."""

    problem: Problem
    match: Match
    candidate: Candidate
    demoted: str


class FailedElsewhereError(Exception):
    """The plan failed on another rank."""


def warmup(
    problems: Iterable[Problem], group: Group = None, *, device: torch.device | str = "auto"
) -> tuple[Warmed, ...]:
    """Run the plan of every problem once on random tensors, so that it is compiled, and demote what fails here.

    Where torch.distributed runs, this is collective over `group`, with the same problems in the same order on every
    rank: what fails on one rank is demoted to torch's own choice on all. Needs the memory of one call at a time; what
    does not fit is not tried, and keeps its plan. Never raises for what a plan does; where a rank has other problems
    AgreementError on all.
    """
    ranks, problems = group_of(group), tuple(problems)
    if ranks is None:
        where = _selected(device)
    else:
        where = together(ranks, lambda: _selected(device))
        if not same_everywhere(ranks, "\n".join(problem.key for problem in problems).encode()):
            raise AgreementError(
                f"warmup: expected the same problems in the same order on every rank, this one has {len(problems)} and "
                "another one others; give all ranks the same"
            )
    tried = [_try(problem, where) for problem in problems]
    failed = [error is not None for _, error in tried]
    if ranks is not None:
        failed = any_rank(ranks, failed)
    found = []
    for (resolved, error), bad in zip(tried, failed, strict=True):
        if bad:
            error = error or FailedElsewhereError("it failed on another rank")
            demote(resolved, where, error)
        match = session.answer(resolved.problem, where).match
        reason = str(error) if bad else ""
        found.append(Warmed(problem=resolved.problem, match=match, candidate=resolved.candidate, demoted=reason))
    if any(failed):
        session._changed()
    return tuple(found)


def _selected(device: torch.device | str) -> torch.device:
    return devices.select(device) if isinstance(device, str) else device


def _try(problem: Problem, device: torch.device) -> tuple[Resolved, Exception | None]:
    resolved = resolve(problem, device, "auto", return_lse=False, strict=False)
    try:
        call = random_call(problem, device, seed=0)
        if problem.pass_ is Pass.TRAINING:
            tensors = [tensor.requires_grad_() for tensor in (call.query, call.key, call.value)]
            call = call.with_tensors(*tensors)
            out, _ = run(call, resolved.candidate)
            torch.autograd.backward(out, torch.ones_like(out))
        else:
            with torch.inference_mode():
                run(call, resolved.candidate)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        log.info("%s is not warmed up: %s", problem.key, error)
    except Exception as error:  # whatever a plan does here must not stop the job
        return resolved, error if resolved.candidate != resolved.fallback else None
    return resolved, None
