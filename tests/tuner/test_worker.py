"""Workers: no job runs twice at once, and none is lost, whatever happens to who runs it."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.domain.examples import DEVICE, PROBLEM, SOFTWARE, TILED

from tilewise.db.jobs import JobRecord, JobRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.errors import ConflictError
from tilewise.domain.job import BUDGETS, JobState
from tilewise.domain.trial import Outcome, Stage, Trial
from tilewise.tuner import worker as worker_module
from tilewise.tuner.worker import Step, Tell, Worker

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
# A worker as a process: jobs of a few steps, each keeping a trial behind the guard of its attempt, as a tuning does.
# A lock per job, which the system takes back from the dead, finds two that run one job at the same time.
PROCESS = """
import fcntl, os, sys, threading, time
from pathlib import Path
from tests.tuner.test_worker import steps
from tilewise.db import jobs
from tilewise.db.session import Database
from tilewise.tuner.worker import Worker

jobs.MAX_ATTEMPTS = 100  # so many kills may hit one job
url, folder, pause = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

def run(record, tell):
    with (folder / record.job.id).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            (folder / "twice").touch()
            raise
        return steps(database, record, tell, lambda: time.sleep(pause))

with Database.open(url, upgrade=False) as database:
    Worker(database, "amd-epyc-9b14.avx512.2t", str(os.getpid()), run, lease=float(sys.argv[4])).work(
        threading.Event(), drain=True
    )
"""


def steps(database: Database, record: JobRecord, tell: Tell, between: Callable[[], None]) -> str:
    """Run a job of STEPS steps, going on behind those that an earlier attempt kept."""
    with database.read() as session:
        done = len(TrialRepository(session).list(PROBLEM, DEVICE, job_id=record.job.id))
    for number in range(done, STEPS):
        between()
        trial = Trial(
            candidate=TILED, stage=Stage.FORWARD, outcome=Outcome.OK, message=str(number), job=record.job.id,
            attempt=record.attempt,
        )  # fmt: skip
        with database.write() as session:
            if not JobRepository(session).holds(record.job.id, record.attempt):
                raise ConflictError("not ours")
            TrialRepository(session).add(trial, problem=PROBLEM, device_key=DEVICE, software=SOFTWARE)
        tell(Step(progress=number / STEPS, message=f"step {number}"))
    return f"done by attempt {record.attempt}"


def queue(database: Database, number: int = 1) -> list[str]:
    with database.write() as session:
        return [JobRepository(session).create(PROBLEM, DEVICE, BUDGETS["quick"]).id for _ in range(number)]


def job(database: Database, job_id: str) -> JobRecord:
    with database.read() as session:
        record = JobRepository(session).get(job_id)
    assert record is not None
    return record


def start(url: str, folder: Path, *, pause: float = 0.005, lease: float = 5.0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-c", PROCESS, url, str(folder), str(pause), str(lease)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_8_workers_that_are_killed_at_random_run_200_jobs_once(database_url: str, tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    chance = random.Random(0)
    with Database.open(database_url, upgrade=True) as database:
        jobs = queue(database, 200)
        workers = {process.pid: process for process in (start(database_url, locks) for _ in range(8))}
        killed = 0
        while any(process.poll() is None for process in workers.values()):
            time.sleep(chance.uniform(0.05, 0.3))
            with database.read() as session:
                running = JobRepository(session).list(states=[JobState.RUNNING])
            owners = [int(record.job.lease.owner) for record in running if record.job.lease]
            alive = sorted(pid for pid in owners if pid in workers and workers[pid].poll() is None)
            if killed < 12 and alive:  # in the middle of a job, or just behind it
                victim = workers.pop(chance.choice(alive))
                victim.kill()
                victim.wait()
                new = start(database_url, locks)
                workers[new.pid] = new
                killed += 1
        assert killed == 12
        assert not (locks / "twice").exists()
        attempts = 0
        for each in jobs:
            record = job(database, each)
            attempts += record.attempt
            assert record.job.state is JobState.SUCCEEDED
            with database.read() as session:
                trials = TrialRepository(session).list(PROBLEM, DEVICE, job_id=each)
            # every step once, in its order, and the attempts only grow
            assert [trial.message for trial in trials] == [str(number) for number in range(STEPS)]
            assert sorted(trial.attempt for trial in trials) == [trial.attempt for trial in trials]
        assert attempts > 200  # some were killed in the middle of a job


def test_a_worker_that_slept_through_its_lease_writes_nothing(sqlite: Database, tmp_path: Path) -> None:
    (one,) = queue(sqlite)
    url = f"sqlite:///{sqlite.file}"
    slow = start(url, tmp_path, pause=1.5, lease=2)
    while job(sqlite, one).job.state is JobState.QUEUED:
        assert slow.poll() is None
        time.sleep(0.02)
    slow.send_signal(signal.SIGSTOP)

    def run(record: JobRecord, tell: Tell) -> str:
        return steps(sqlite, record, tell, lambda: None)

    Worker(sqlite, DEVICE, "second", run, lease=60).work(threading.Event(), jobs=1)
    slow.send_signal(signal.SIGCONT)
    slow.wait(timeout=30)
    record = job(sqlite, one)
    assert (record.job.state, record.attempt, record.job.message) == (JobState.SUCCEEDED, 2, "done by attempt 2")
    with sqlite.read() as session:
        trials = TrialRepository(session).list(PROBLEM, DEVICE, job_id=one)
    assert len(trials) == STEPS


def test_a_cancelled_job_stops_at_its_next_step(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "PROGRESS_SECONDS", 0.0)
    first, second = queue(sqlite, 2)

    def run(record: JobRecord, tell: Tell) -> str:
        if record.job.id == first:
            with sqlite.write() as session:
                assert JobRepository(session).cancel(first)
        return steps(sqlite, record, tell, lambda: None)

    assert Worker(sqlite, DEVICE, "w", run).work(threading.Event(), drain=True) == 2
    assert [job(sqlite, each).job.state for each in (first, second)] == [JobState.CANCELLED, JobState.SUCCEEDED]
    with sqlite.read() as session:
        assert TrialRepository(session).list(PROBLEM, DEVICE, job_id=first) == ()


def test_a_lease_is_renewed_while_a_job_runs(sqlite: Database) -> None:
    (one,) = queue(sqlite)
    first = threading.Event()

    def run(record: JobRecord, tell: Tell) -> str:  # noqa: ARG001 - silent for far longer than its lease
        first.set()
        assert record.job.lease is not None
        expires = record.job.lease.expires
        while True:
            lease = job(sqlite, one).job.lease
            if lease is not None and (lease.expires - expires).total_seconds() > 0.6:
                return "outlived its lease twice"

    Worker(sqlite, DEVICE, "w", run, lease=0.3).work(threading.Event(), jobs=1)
    assert (job(sqlite, one).job.message, job(sqlite, one).attempt) == ("outlived its lease twice", 1)


def test_a_job_that_fails_says_why_and_the_worker_goes_on(sqlite: Database) -> None:
    first, second = queue(sqlite, 2)

    def run(record: JobRecord, tell: Tell) -> str:
        if record.job.id == first:
            raise RuntimeError("no such tile")
        return steps(sqlite, record, tell, lambda: None)

    assert Worker(sqlite, DEVICE, "w", run).work(threading.Event(), drain=True) == 2
    assert (job(sqlite, first).job.state, job(sqlite, first).job.message) == (
        JobState.FAILED,
        "RuntimeError: no such tile",
    )
    assert job(sqlite, second).job.state is JobState.SUCCEEDED


def test_an_interrupted_worker_gives_its_job_back(sqlite: Database) -> None:
    (one,) = queue(sqlite)

    def interrupted(record: JobRecord, tell: Tell) -> str:  # noqa: ARG001
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Worker(sqlite, DEVICE, "w", interrupted).work(threading.Event())
    record = job(sqlite, one)
    assert (record.job.state, record.job.lease) == (JobState.QUEUED, None)
