"""Runs jobs in spawned processes that may crash, hang or eat memory: each such job is one failure, not the end.

A compiler's assertion aborts its process, and some inputs make it hang. Every job has a time limit; a worker that dies
or is killed is replaced. What a worker prints, megabytes for some failures, goes to a file of its own.
"""

import contextlib
import multiprocessing
import os
import queue
import resource
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tilewise.domain.errors import TuningError
from tilewise.domain.trial import Outcome

Job = TypeVar("Job")
Result = TypeVar("Result")
MESSAGE_LIMIT = 300
STARTING_SECONDS = 300.0  # a worker imports torch and triton, on a machine that may be busy
JOBS_PER_WORKER = 200  # Triton keeps what it compiled in memory
_TELLING = (b"error: ", b"Assertion ", b"LLVM ERROR", b"std::bad_alloc")


@dataclass(frozen=True, slots=True)
class Done(Generic[Job, Result]):
    """What came of one job: `result` where the outcome is ok, else a short message; wall seconds."""

    job: Job
    outcome: Outcome
    result: Result | None
    message: str
    seconds: float


def run_each(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    processes: int,
    seconds: float,
    memory_gib: float = 8.0,
) -> Generator[Done[Job, Result], None, None]:
    """Yield what came of `function(job)` for each job, in the order in which they end.

    `function` must be importable by its name. A job that takes longer than `seconds` is timed_out, one whose process
    dies worker_died, one that raises compile_failed. A process may have `memory_gib` of data.
    """
    todo = list(jobs)
    idle: queue.SimpleQueue[_Worker[Job, Result]] = queue.SimpleQueue()
    workers = [_Worker(function, memory_gib) for _ in range(min(processes, len(todo)))]
    for worker in workers:
        idle.put(worker)

    def one(job: Job) -> Done[Job, Result]:
        worker = idle.get()
        try:
            return worker.run(job, seconds)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(max(1, len(workers)))
    try:
        for done in as_completed([threads.submit(one, job) for job in todo]):
            yield done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        threads.shutdown()
        for worker in workers:
            worker.close()


class _Worker(Generic[Job, Result]):
    """One process at a time, started when there is a job."""

    def __init__(self, function: Callable[[Job], Result], memory_gib: float) -> None:
        self._function, self._memory = function, int(memory_gib * 2**30)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._jobs = 0
        self._printed = -1  # a file without a name

    def run(self, job: Job, seconds: float) -> Done[Job, Result]:
        if self._jobs == JOBS_PER_WORKER:
            self.close()
        if self._process is None:
            self._start()
        os.ftruncate(self._printed, 0)
        self._jobs += 1
        start = time.perf_counter()
        outcome, result, message = Outcome.WORKER_DIED, None, ""
        try:
            self._pipe.send(job)
            if self._pipe.poll(seconds):
                result, message = self._pipe.recv()
                outcome = Outcome.COMPILE_FAILED if message else Outcome.OK
            else:
                outcome, message = Outcome.TIMED_OUT, f"more than {seconds:g} s"
        except (EOFError, OSError):
            assert self._process is not None
            self._process.join()
            message = f"exit code {self._process.exitcode}"
        took = time.perf_counter() - start
        if outcome is not Outcome.OK:
            message = shortened(message, self._said())
        if outcome in (Outcome.WORKER_DIED, Outcome.TIMED_OUT):
            self.close()
        return Done(job, outcome, result, message, took)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process; the next job starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None
            os.close(self._printed)

    def _said(self) -> bytes:
        return os.pread(self._printed, os.fstat(self._printed).st_size, 0)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._printed, name = tempfile.mkstemp(prefix="tilewise-worker-")
        try:
            self._pipe, theirs = context.Pipe()
            arguments = (theirs, self._function, self._memory, name)
            self._process = context.Process(target=_serve, args=arguments, daemon=True)
            self._process.start()
            theirs.close()
            self._jobs = 0
            with contextlib.suppress(EOFError):
                if self._pipe.poll(STARTING_SECONDS):
                    self._pipe.recv()
                    return
        finally:
            os.unlink(name)
        said = self._said()[-MESSAGE_LIMIT:].decode(errors="replace")
        self.close()
        raise TuningError(f"a worker process did not start within {STARTING_SECONDS:g} s: {said}")


def _serve(pipe: Any, function: Callable[[Any], Any], memory: int, printed: str) -> None:
    out = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))  # handed on to the assembler it starts
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here, also under the tests of a machine without GPU
    pipe.send(None)
    while True:
        job = pipe.recv()
        try:
            answer = function(job), ""
        except Exception as error:  # what a job raises is its outcome
            answer = None, f"{type(error).__name__}: {error}"[:2000]
        pipe.send(answer)


def shortened(message: str, printed: bytes) -> str:
    """Return the message, then the first line printed that tells of an error, in at most MESSAGE_LIMIT characters."""
    told = next((line for line in printed.splitlines() if any(word in line for word in _TELLING)), b"")
    lines = [message.strip().partition("\n")[0], told.decode(errors="replace").strip()]
    return "; ".join(filter(None, lines))[:MESSAGE_LIMIT]
