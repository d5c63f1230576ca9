"""The inside of a worker process: it takes tasks from a pipe, and says what it does and that it is alive.

This file imports no torch: whoever starts a worker need not have it yet.
"""

import contextlib
import fcntl
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from .printed import shortened

BEAT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Beat:
    """The process is alive."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What the process does from now on, in at most so many seconds."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """What a task returned. `broken`: the process must not be used again."""

    result: object
    broken: bool


@dataclass(frozen=True, slots=True)
class Ahead:
    """A pickled task to do before the next is asked for; nothing is answered of it, but that it is over."""

    task: bytes


@dataclass(frozen=True, slots=True)
class Readied:
    """A task that was to be done ahead is over, whatever came of it."""


@dataclass(frozen=True, slots=True)
class Raised:
    """What a task raised; whatever its candidate does, a task catches."""

    message: str


class Room:
    """What a task sees of its worker."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection, self._lock = connection, threading.Lock()
        self.broken = False

    def enter(self, phase: str, seconds: float) -> None:
        """Say what begins now; whoever waits outside kills the process when it takes longer."""
        self.send(Phase(phase, seconds))

    def send(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)


Task = Callable[[Room], object]


def serve(
    connection: "Connection[Any, Any]",
    printed: "Connection[Any, Any]",
    lifeline: "Connection[Any, Any]",
    data_bytes: int | None,
    nice: int,
) -> None:
    """Do tasks until the other end is closed.

    - printed: where stdout and stderr go.
    - lifeline: closed by the death of whoever started this process, which ends it at once, even in a hang.
    - data_bytes: of memory that this process and those it starts may each have; None for no limit.
    - nice: how much it gives way to other processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started this one decides
    _die_with(lifeline)
    for stream in (1, 2):
        os.dup2(printed.fileno(), stream)
    os.nice(nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if data_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))
    room = Room(connection)
    threading.Thread(target=_beat, args=(room,), daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # no clean-up of a device that has none to do, or hangs in it
        except Exception as error:  # a task of a module that cannot be imported here
            room.send(Raised(shortened(f"{type(error).__name__}: {error}", 600)))
            continue
        if isinstance(task, Ahead):
            with contextlib.suppress(Exception):
                pickle.loads(task.task)(room)
            room.send(Readied())
            continue
        room.send(_done(task, room))


def _done(task: Task, room: Room) -> Finished | Raised:
    try:
        finished = Finished(task(room), room.broken)
        pickle.dumps(finished)
    except Exception as error:
        return Raised(shortened(f"{type(error).__name__}: {error}", 600))
    return finished


def _beat(room: Room) -> None:
    waits = threading.Event()
    while True:
        try:
            room.send(Beat())
        except OSError:
            os._exit(0)
        waits.wait(BEAT_SECONDS)


def _die_with(lifeline: "Connection[Any, Any]") -> None:
    """Have the kernel kill this process when the other end of `lifeline` is closed, whatever it is doing then."""
    descriptor = lifeline.fileno()
    with contextlib.suppress(OSError):  # a system without it has the heartbeat, which fails then
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
