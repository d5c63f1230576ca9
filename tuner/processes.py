"""Processes that may crash, hang or eat memory: each such task is one failure, and a fresh process goes on.

A worker is forked from a server process that has imported torch and never touched a device, so a fresh one is there
within a tenth of a second and takes a GPU like a process of its own. It says which phase it is in, with the seconds
that it may take, and beats; what it prints is read all the time, and its end kept.

This file imports no torch: `prestart` can be called first of all.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tilewise.domain.trial import Outcome

from .limits import Limits
from .printed import Printed
from .serving import Ahead, Beat, Finished, Phase, Raised, Room, Task, serve

PRELOADED = ["triton", "tilewise.tuner.preloaded"]  # triton, where it is installed
POLL_SECONDS = 0.1  # between two looks at memory and deadlines
_CHUNK = 1 << 16
_CHUNKS = 64  # read at once: a worker that prints without end must not keep us here
_NO_MEMORY = ("bad_alloc", "MemoryError", "annot allocate memory", "can't allocate memory")
_context = multiprocessing.get_context("forkserver")


def prestart() -> None:
    """Start the process that workers are forked from; it imports torch while the caller does other things."""
    _context.set_forkserver_preload(PRELOADED)
    with _environment():
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Within, a new interpreter finds the modules that this one finds, and imports a triton that compiles.

    Python's resource tracker, started with the first of them, clears up what killed processes leave without a word.
    """
    names = ("PYTHONPATH", "PYTHONWARNINGS", "TRITON_INTERPRET")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before["PYTHONWARNINGS"], "ignore:resource_tracker")))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Ended:
    """How a task ended: `result` where the outcome is ok, else why, in which phase, with the end of what was printed.

    The outcome is `failed` where the task raised, and one of timed_out, out_of_resources and worker_died where its
    process is gone.
    """

    outcome: Outcome
    result: object = None
    phase: str = ""
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Live:
    """A process, with this side's ends of its pipes: its tasks and answers, what it prints, what it dies with."""

    process: ForkServerProcess
    connection: "Connection[Any, Any]"
    out: "Connection[Any, Any]"
    lifeline: "Connection[Any, Any]"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        for end in (self.connection, self.out, self.lifeline):
            end.close()


class Worker:
    """One process at a time, started when there is a task and replaced when it is gone.

    - memory_gib: what it may have; checked against its resident memory, and with `strict` a limit on its data, too,
      which lets an allocation fail cleanly but which a CUDA driver does not bear.
    - nice: how much it gives way to other processes where there are more than cores.
    """

    def __init__(self, limits: Limits, *, memory_gib: float, strict: bool, nice: int = 0) -> None:
        self._limits, self._memory, self._strict, self._nice = limits, int(memory_gib * 2**30), strict, nice
        self._live: _Live | None = None
        self._coming: Future[_Live] | None = None  # a process that is being started
        self._printed = Printed()
        self.phase, self._deadline, self._heard, self._began = "", 0.0, 0.0, 0.0
        self.busy = False
        self.started = 0  # processes so far

    @property
    def pid(self) -> int | None:
        return None if self._live is None else self._live.process.pid

    def begin(self, task: Task) -> None:
        """Have a process, a fresh one where there is none, do `task` before the first that `start` gives it.

        Returns at once; there must be no task. What `task` returns or raises is dropped: whoever needs what it has made
        ready makes it where it is not there.
        """
        assert not self.busy, "a worker does one task at a time"
        self._arrived()
        ahead = Ahead(pickle.dumps(task))
        if self._live is not None:
            with contextlib.suppress(OSError):  # it died: `start` has another
                self._live.connection.send(ahead)
            return
        prestart()
        self._coming = Future()
        threading.Thread(target=self._come, args=(self._coming, ahead), daemon=True).start()

    def start(self, task: Task) -> None:
        """Begin a task; there must be none."""
        assert not self.busy, "a worker does one task at a time"
        self._arrived()
        self._pump()
        self._printed = Printed()
        now = time.monotonic()
        self.busy, self._began, self._heard = True, now, now
        self.phase, self._deadline = "start", now + self._limits.start
        if self._live is not None and not self._live.process.is_alive():
            self.stop()
            self.busy = True
        if self._live is None:
            prestart()
            self._live = self._spawned()
        with contextlib.suppress(OSError):  # it died: the next poll says so
            self._live.connection.send(task)

    def poll(self) -> Ended | None:
        """Return how the task ended, None while it goes on."""
        if not self.busy or self._live is None:
            return None
        self._pump()
        try:
            while self._live.connection.poll():
                message = self._live.connection.recv()
                self._heard = time.monotonic()
                if isinstance(message, Phase):
                    self.phase, self._deadline = message.name, self._heard + message.seconds
                elif not isinstance(message, Beat):
                    return self._answered(message)
        except (EOFError, OSError):
            return self._died()
        now = time.monotonic()
        if self._resident() > self._memory:
            return self._killed(Outcome.OUT_OF_RESOURCES, f"more than {self._memory / 2**30:g} GiB of memory")
        if now > self._deadline:
            return self._killed(Outcome.TIMED_OUT, "no end within its time limit")
        if now - self._heard > self._limits.silence:
            return self._killed(Outcome.TIMED_OUT, f"no sign of life for {self._limits.silence:g} s")
        return None

    def stop(self) -> None:
        """End the process, whatever it does; the next task starts another."""
        self.busy = False
        if self._coming is not None:
            self._coming.add_done_callback(_end_unwanted)
            self._coming = None
        if self._live is not None:
            self._live.end()
            self._live = None

    def kill(self) -> None:
        """Begin to end the process: several end sooner together. `stop` does the rest."""
        if self._live is not None:
            self._live.process.kill()

    @property
    def ends(self) -> tuple["Connection[Any, Any]", ...]:
        """What becomes readable when there is something to poll for."""
        return (self._live.connection, self._live.out) if self.busy and self._live is not None else ()

    def _spawned(self) -> _Live:
        """Return a fresh process, as soon as the one that it is forked from has imported what it preloads."""
        connection, theirs = _context.Pipe()
        out, printed = _context.Pipe(duplex=False)
        lifeline, ours = _context.Pipe(duplex=False)
        os.set_blocking(out.fileno(), False)
        data = self._memory if self._strict else None
        process = _context.Process(target=serve, args=(theirs, printed, lifeline, data, self._nice), daemon=True)
        process.start()
        self.started += 1
        for end in (theirs, printed, lifeline):
            end.close()
        return _Live(process, connection, out, ours)

    def _come(self, coming: "Future[_Live]", ahead: Ahead) -> None:
        try:
            live = self._spawned()
            with contextlib.suppress(OSError):
                live.connection.send(ahead)
            coming.set_result(live)
        except Exception as error:  # `start` tries again, and raises it
            coming.set_exception(error)

    def _arrived(self) -> None:
        """Wait for a process that is being started; where that failed, whoever needs one tries again."""
        if self._coming is not None:
            with contextlib.suppress(Exception):
                self._live = self._coming.result()
            self._coming = None  # not where Ctrl-C ended the wait: `stop` is to know of it

    def _answered(self, message: object) -> Ended:
        self.busy = False
        if isinstance(message, Finished):
            if message.broken:
                self.stop()
            return Ended(Outcome.OK, message.result, self.phase, seconds=time.monotonic() - self._began)
        assert isinstance(message, Raised)
        return self._ended(Outcome.FAILED, message.message)

    def _died(self) -> Ended:
        assert self._live is not None
        self._live.process.join()
        code = self._live.process.exitcode or 0
        self._pump()
        said = str(self._printed)
        outcome = Outcome.OUT_OF_RESOURCES if any(word in said for word in _NO_MEMORY) else Outcome.WORKER_DIED
        return self._killed(outcome, f"killed by {_signal(-code)}" if code < 0 else f"ended with exit code {code}")

    def _killed(self, outcome: Outcome, why: str) -> Ended:
        ended = self._ended(outcome, f"the process that ran it: {why}")
        self.stop()
        return ended

    def _ended(self, outcome: Outcome, why: str) -> Ended:
        message = "\n".join(filter(None, (f"{why} (phase {self.phase})", str(self._printed))))
        return Ended(outcome, None, self.phase, message, time.monotonic() - self._began)

    def _pump(self) -> None:
        if self._live is None:
            return
        with contextlib.suppress(BlockingIOError):
            for _ in range(_CHUNKS):
                chunk = os.read(self._live.out.fileno(), _CHUNK)
                if not chunk:
                    return
                self._printed.feed(chunk)

    def _resident(self) -> int:
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")


def nothing(_room: Room) -> None:
    """Do nothing: for a process that is to be there."""


def stop_all(workers: Sequence[Worker]) -> None:
    """End the processes of `workers`, all at once."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.stop()


def _end_unwanted(coming: "Future[_Live]") -> None:
    if coming.exception() is None:
        coming.result().end()


def wait_for(workers: Sequence[Worker], seconds: float = POLL_SECONDS) -> None:
    """Return when one of `workers` may have something to tell, after `seconds` at the latest."""
    ends = [end for worker in workers for end in worker.ends]
    if ends:
        wait(ends, timeout=seconds)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
