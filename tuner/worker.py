"""A worker: claims the jobs of one device, one after another, and keeps each alive by heartbeats while it runs.

What a job runs is given: this file knows nothing of measuring, and starts fast.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tilewise.db.jobs import JobRecord, JobRepository
from tilewise.db.session import Database
from tilewise.domain.config import Candidate
from tilewise.domain.errors import ConflictError, DatabaseError, TilewiseError
from tilewise.domain.job import JobState

LEASE_SECONDS = 30.0
WAIT_SECONDS = 2.0
PROGRESS_SECONDS = 1.0
_log = logging.getLogger("tilewise.worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far a job is: `progress` from 0 to 1, and the fastest candidate so far with its median in milliseconds."""

    progress: float
    message: str
    best: Candidate | None = None
    best_ms: float | None = None


Tell = Callable[[Step], None]
# Runs a job and returns in a sentence what came of it. It calls Tell between its steps, and lets what that raises pass.
Run = Callable[[JobRecord, Tell], str]


class Worker:
    """Works for `device_key` until it is told to stop.

    A job is claimed with a lease, which a thread renews three times in its time. Where the lease was lost, or the job
    cancelled, `run` is stopped at its next step by a ConflictError, and nothing more of it is written.
    """

    def __init__(
        self, database: Database, device_key: str, owner: str, run: Run, *, lease: float = LEASE_SECONDS
    ) -> None:
        self._database, self._device_key, self._owner, self._run, self._lease = database, device_key, owner, run, lease

    def work(self, stop: threading.Event, *, jobs: int | None = None, drain: bool = False) -> int:
        """Run jobs until `stop`, or `jobs` of them, or with `drain` until none waits; return how many were run.

        A database that is away is waited for. KeyboardInterrupt puts the job back into the queue and is raised again.
        """
        done = 0
        while not stop.is_set() and done != jobs:
            try:
                with self._database.write() as session:
                    record = JobRepository(session).claim(self._device_key, self._owner, lease=self._lease)
            except DatabaseError as error:
                _log.warning("no job can be claimed: %s", error)
                record = None
            if record is not None:
                self._one(record)
                done += 1
            elif drain and not self._open_jobs():
                break
            else:
                stop.wait(WAIT_SECONDS if not drain else self._lease / 10)
        return done

    def _open_jobs(self) -> bool:
        """Whether anything of this device waits or runs: what runs elsewhere may yet be lost."""
        with self._database.read() as session:
            states = (JobState.QUEUED, JobState.RUNNING)
            return bool(JobRepository(session).list(states=states, device_key=self._device_key, limit=1))

    def _one(self, record: JobRecord) -> None:
        job, attempt = record.job, record.attempt
        _log.info("job %s, attempt %d: %s", job.id, attempt, job.problem.key)
        pulse = _Pulse(self._database, job.id, attempt, self._lease)
        state, message = JobState.SUCCEEDED, ""
        try:
            message = self._run(record, pulse.tell)
        except ConflictError as error:  # cancelled, or somebody else's by now: not ours to end
            _log.info("job %s, attempt %d, is given up: %s", job.id, attempt, error)
            return
        except (KeyboardInterrupt, SystemExit):
            self._end(lambda jobs: jobs.release(job.id, attempt, message=f"given back by {self._owner}"))
            raise
        except DatabaseError as error:  # the lease runs out, and the job goes on when the database is back
            _log.warning("job %s, attempt %d, stops: %s", job.id, attempt, error)
            return
        except Exception as error:
            level = logging.WARNING if isinstance(error, TilewiseError) else logging.ERROR
            _log.log(level, "job %s, attempt %d, failed", job.id, attempt, exc_info=level == logging.ERROR)
            state, message = JobState.FAILED, f"{type(error).__name__}: {error}"
        finally:
            pulse.stop()
        self._end(lambda jobs: jobs.finish(job.id, attempt, state, message=message))
        _log.info("job %s, attempt %d: %s, %s", job.id, attempt, state, message)

    def _end(self, end: Callable[[JobRepository], bool]) -> None:
        try:
            with self._database.write() as session:
                end(JobRepository(session))
        except DatabaseError as error:
            _log.warning("the end of a job could not be kept, it will be run again: %s", error)


class _Pulse:
    """Renews the lease of one attempt, and passes on how far it is."""

    def __init__(self, database: Database, job_id: str, attempt: int, lease: float) -> None:
        self._database, self._job_id, self._attempt, self._lease = database, job_id, attempt, lease
        self._stopped = threading.Event()
        self._lost = threading.Event()
        self._told = 0.0
        self._thread = threading.Thread(target=self._beat, name=f"tilewise-lease-{job_id[:8]}", daemon=True)
        self._thread.start()

    def tell(self, step: Step) -> None:
        """Keep `step`, at most once a second. Raises ConflictError where this attempt runs no longer."""
        if self._lost.is_set():
            self._raise()
        moment = time.monotonic()
        if moment - self._told < PROGRESS_SECONDS:
            return
        self._told = moment
        with self._database.write() as session:
            kept = JobRepository(session).progress(
                self._job_id,
                self._attempt,
                progress=step.progress,
                message=step.message,
                best=step.best,
                best_ms=step.best_ms,
            )
        if not kept:
            self._raise()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _raise(self) -> None:
        raise ConflictError(f"job {self._job_id} was cancelled, or goes on elsewhere under a later attempt")

    def _beat(self) -> None:
        while not self._stopped.wait(self._lease / 3):
            try:
                with self._database.write() as session:
                    alive = JobRepository(session).heartbeat(self._job_id, self._attempt, lease=self._lease)
            except DatabaseError as error:  # until it is back nobody else can claim the job either
                _log.warning("the lease of job %s could not be renewed: %s", self._job_id, error)
                continue
            if not alive:
                self._lost.set()
                return
