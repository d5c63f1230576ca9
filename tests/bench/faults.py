"""Tasks that end a process or never end: what a compiler can do to the process that calls it."""

import os

import torch

from tilewise.bench.vet import Job, Vetted, attempt


def dies(job: Job, device: torch.device) -> Vetted:
    """Abort, as a compiler's assertion does, where a candidate of SDPA is tried."""
    if job.candidate.backend == "sdpa":
        os.abort()
    return attempt(job, device)


def hangs(job: Job, device: torch.device) -> Vetted:  # noqa: ARG001
    while True:
        pass
