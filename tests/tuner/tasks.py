"""Tasks for workers, importable by their names."""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from tilewise.domain.trial import Outcome
from tilewise.tuner import measuring, processes
from tilewise.tuner.compiling import Compiled, Compiling
from tilewise.tuner.limits import Limits
from tilewise.tuner.processes import Ended, Worker, wait_for
from tilewise.tuner.serving import Room, Task

from . import fakes

_held: list[Any] = []


@dataclass(frozen=True)
class Calls:
    """Do what one of the fakes does, in a phase of some seconds."""

    fake: str
    seconds: float = 30.0

    def __call__(self, room: Room) -> object:
        room.enter(self.fake, self.seconds)
        return getattr(fakes, self.fake)(None)


@dataclass(frozen=True)
class Says:
    """Return what it is given, in the process that it runs in."""

    what: object

    def __call__(self, room: Room) -> tuple[object, int]:
        room.enter("say", 10)
        return self.what, os.getpid()


@dataclass(frozen=True)
class Behind:
    """Do what one of the fakes does, once a file is there."""

    gate: str
    fake: str

    def __call__(self, room: Room) -> object:
        room.enter("behind", 0.5)
        while not os.path.exists(self.gate):
            time.sleep(0.005)
        return getattr(fakes, self.fake)(None)


def state(_: Room) -> tuple[int, str, bool]:
    """Return how many threads of the system and of Python's there are, whether kernels are interpreted, and if torch
    is there already."""
    tasks = len(os.listdir("/proc/self/task")) - threading.active_count()
    return tasks, os.environ.get("TRITON_INTERPRET", "unset"), "torch" in sys.modules


def holds(_: Room) -> None:
    """Hold a semaphore of the system for the life of the process."""
    _held.append(multiprocessing.get_context("spawn").Lock())


def remembers(room: Room) -> None:
    """Keep one thing more, in a phase of its own."""
    room.enter("remember", 10)
    _held.append(1)


def remembered(_: Room) -> int:
    return len(_held)


def prepared(_: Room) -> measuring.Preparation | None:
    """Return what the tensors that are there depend on."""
    return None if measuring._ready is None else measuring._ready[0].tensors


class _Absent:
    """A task that is pickled by a name which nobody finds."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return importlib.import_module, ("tilewise.no_such_module",)

    def __call__(self, room: Room) -> None: ...


absent = _Absent()


def breaks(room: Room) -> int:
    room.broken = True
    return os.getpid()


def sleeps(room: Room) -> None:
    room.enter("sleep", 600)
    time.sleep(600)


def unpicklable(_: Room) -> object:
    return lambda: None


def two_phases(room: Room) -> str:
    """Stay within the limit of each phase, but not of the first."""
    for name in ("one", "two", "three"):
        room.enter(name, 0.6)
        until = time.monotonic() + 0.35
        while time.monotonic() < until:
            pass
    return "done"


def run(worker: Worker, task: Task) -> Ended:
    """Have a worker do `task`, and return how it ended."""
    worker.start(task)
    while (ended := worker.poll()) is None:
        wait_for([worker])
    return ended


def compiled_by(worker: Worker, task: Compiling) -> Compiled:
    """Have a worker compile, and return what came of it."""
    ended = run(worker, task)
    assert ended.outcome is Outcome.OK, ended.message
    assert isinstance(ended.result, Compiled)
    return ended.result


def orphans(pids: "Connection[Any, Any]") -> None:
    """Start a worker that hangs with the interpreter's lock held, tell its process, and wait to be killed."""
    worker = Worker(Limits(), memory_gib=4, strict=True)
    worker.start(Calls("hangs_in_native_code", 600))
    while worker.phase != "hangs_in_native_code":
        worker.poll()
        wait_for([worker])
    pids.send(worker.pid)
    time.sleep(600)


def ends(task: Task) -> None:
    """Have a worker do `task`, and end it."""
    worker = Worker(Limits(), memory_gib=2, strict=False)
    run(worker, task)
    worker.stop()


def interrupts() -> None:
    """Send Ctrl-C to the process that workers are forked from as soon as there is one, and have a worker do a task."""
    processes.prestart()
    server: Any = forkserver._forkserver
    os.kill(server._forkserver_pid, signal.SIGINT)
    before = server._forkserver_pid
    ends(Says(1))
    assert server._forkserver_pid == before
