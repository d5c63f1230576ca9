"""Compiles candidates in parallel on the CPU, ahead of the GPU that will run them."""

import functools
import os
import time
from collections.abc import Iterable

from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels.ahead import COMPILERS, compiles_ahead

from .workers import run_each

Job = tuple[Problem, Candidate]
WORKERS = 16
JOB_SECONDS = 150.0  # one that takes longer hangs


def compilable(jobs: Iterable[Job]) -> list[Job]:
    """Return the distinct jobs whose backend can be compiled where it does not run."""
    return list(dict.fromkeys(job for job in jobs if compiles_ahead(job[1].backend)))


def compile_ahead(
    jobs: Iterable[Job], device: Device, *, workers: int | None = None, seconds: float | None = None
) -> list[str]:
    """Compile what is `compilable` of `jobs` for `device` into the caches on disk; return what failed, a line each.

    - workers: processes, by default one per core. They do not touch the device.
    - seconds: wall time after which what is left is left: whoever runs it compiles it, and meets a failure again.
    """
    wanted = compilable(jobs)
    until = None if seconds is None else time.monotonic() + seconds
    failed: list[str] = []
    processes = min(WORKERS, len(os.sched_getaffinity(0))) if workers is None else workers
    compiling = run_each(functools.partial(compile_one, device), wanted, processes=processes, seconds=JOB_SECONDS)
    for done in compiling:
        if done.outcome is not Outcome.OK:
            problem, candidate = done.job
            failed.append(f"{candidate} of {problem.key}: {done.outcome}, {done.message}")
        if until is not None and time.monotonic() > until:
            compiling.close()
    return failed


def compile_one(device: Device, job: Job) -> None:
    problem, candidate = job
    COMPILERS[candidate.backend](problem, candidate, device)
