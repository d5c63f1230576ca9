"""Tries candidates in other processes first: what they compile lies in the caches on disk then, and a candidate that
crashes or hangs costs one of those processes, not the one that measures.

Nothing is timed here, so all cores compile at once.
"""

import functools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.problem import Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels.compilers import share_caches
from tilewise.kernels.inputs import random_call
from tilewise.tuner.correctness import Checker, poisoned_empty
from tilewise.tuner.steps import results
from tilewise.tuner.trying import classify

JOB_SECONDS = 150.0  # one that takes longer hangs
SMALL_LEN = 512  # divides by all that a real length does, so that kernels specialise alike
MESSAGE_LIMIT = 500


@dataclass(frozen=True, slots=True)
class Job:
    """A candidate to try: checked on small tensors of the problem's kind or, `whole`, run on the problem itself."""

    problem: Problem
    candidate: Candidate
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Vetted:
    outcome: Outcome
    message: str = ""


Task = Callable[[Job, torch.device], Vetted]


def small(problem: Problem) -> Problem:
    """Return the problem with few heads, a batch of two at most and at most 512 queries and keys."""
    group, kv_heads = problem.heads // problem.kv_heads, min(problem.kv_heads, 2)
    return replace(
        problem,
        batch=min(problem.batch, 2),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=min(problem.q_len, SMALL_LEN),
        kv_len=min(problem.kv_len, SMALL_LEN),
    )


def attempt(job: Job, device: torch.device) -> Vetted:
    """Check the candidate against float64 on small tensors, or run it once as the checker and once as the clock do."""
    try:
        if job.whole:
            call = random_call(job.problem, device, seed=0)
            shape = (*call.query.shape[:3], job.problem.v_head_dim)
            grad_out = torch.zeros(shape, dtype=call.query.dtype, device=device)
            with poisoned_empty():
                results(call, job.candidate, grad_out)
            results(call, job.candidate, grad_out)
        else:
            error = _checker(small(job.problem), device).check(job.candidate)
            if error.worst > 1:
                reason = f"{error.tensor} of the case '{error.case}' is off by {error.worst:.3g} times the bound"
                return Vetted(Outcome.WRONG_RESULT, f"at {SMALL_LEN} keys, {reason}")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except Exception as raised:  # whatever a candidate does is its own failure
        return Vetted(classify(raised), f"{type(raised).__name__}: {raised}"[:MESSAGE_LIMIT])
    return Vetted(Outcome.OK)


@functools.lru_cache(maxsize=2)
def _checker(problem: Problem, device: torch.device) -> Checker:
    return Checker(problem, device, seed=0)


def vet(
    jobs: Sequence[Job],
    device: torch.device,
    *,
    workers: int,
    seconds: float,
    job_seconds: float = JOB_SECONDS,
    task: Task = attempt,
) -> dict[Job, Vetted]:
    """Return what came of every job; of those that were not done within `seconds`, that they were skipped."""
    waiting, until = deque(jobs), time.monotonic() + seconds
    done: dict[Job, Vetted] = {}
    pool = [_Worker(device, task, job_seconds) for _ in range(min(workers, len(jobs)))]
    try:
        while time.monotonic() < until:
            for worker in pool:
                if waiting and worker.job is None:
                    worker.start(waiting.popleft())
            busy = {worker: worker.job for worker in pool if worker.job is not None}
            if not busy:
                break
            wait([worker.connection for worker in busy], timeout=0.2)
            done.update((job, found) for worker, job in busy.items() if (found := worker.poll()) is not None)
    finally:
        for worker in pool:
            worker.stop()
    skipped = Vetted(Outcome.SKIPPED, f"not done when the {seconds:.0f} s for compiling ahead were over")
    return {job: done.get(job, skipped) for job in jobs}


class _Worker:
    """One process, replaced where it died, hangs, or may have been left with a broken device."""

    def __init__(self, device: torch.device, task: Task, job_seconds: float) -> None:
        self._device, self._task, self._job_seconds = device, task, job_seconds
        self._process: SpawnProcess | None = None
        self.connection: Connection
        self.job: Job | None = None
        self._deadline = 0.0

    def start(self, job: Job) -> None:
        if self._process is not None and not self._process.is_alive():
            self.stop()
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._device, self._task), daemon=True)
            self._process.start()
            theirs.close()
        self.connection.send(job)
        self.job, self._deadline = job, time.monotonic() + self._job_seconds

    def poll(self) -> Vetted | None:
        """Return what came of the job where it has ended or its time is over."""
        if not self.connection.poll():
            if time.monotonic() < self._deadline:
                return None
            self.stop()
            return Vetted(Outcome.TIMED_OUT, f"not done after {self._job_seconds:.0f} s")
        self.job = None
        try:
            found: Vetted = self.connection.recv()
        except (EOFError, ConnectionResetError):
            assert self._process is not None
            self._process.join()
            code = self._process.exitcode
            self.stop()
            return Vetted(Outcome.WORKER_DIED, f"its process ended with exit code {code}")
        if found.outcome is Outcome.FAILED:
            self.stop()
        return found

    def stop(self) -> None:
        self.job = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.connection.close()
            self._process = None


def _serve(connection: Connection, device: torch.device, task: Task) -> None:
    """Try jobs until the connection ends. Compilers print megabytes where they fail: nobody reads them."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    share_caches()
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        connection.send(task(job, device))
