"""What a worker runs for a job: the same tuning as `tilewise tune`."""

import torch

from tilewise.db.jobs import JobRecord
from tilewise.db.session import Database

from .progress import Progress
from .tune import tune
from .worker import Run, Step, Tell


def tuning(database: Database, device: torch.device) -> Run:
    """Return what runs the jobs of `device`: each goes on from the trials that were finished before."""

    def run(record: JobRecord, tell: Tell) -> str:
        verdict = tune(
            record.job.problem,
            device=device,
            database=database,
            budget=record.job.budget,
            report=lambda progress: tell(_step(progress)),
            claim=(record.job.id, record.attempt),
        )
        return verdict.answer.evidence.reason if verdict.answer.evidence else ""

    return run


def _step(progress: Progress) -> Step:
    share = 0.95 if progress.phase in ("final", "done") else 0.9 * progress.trials / max(1, progress.total)
    measured = progress.best.measurement if progress.best else None
    message = f"{progress.phase}: {progress.trials} of {progress.total} trials, {progress.failed} failed"
    return Step(
        progress=min(share, 0.95),
        message=message,
        best=progress.best.candidate if progress.best else None,
        best_ms=measured.median_ms if measured else None,
    )
