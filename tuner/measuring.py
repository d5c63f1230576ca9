"""The tasks of the measuring worker. Each brings all it needs, so that a fresh process goes on where another died."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.problem import Problem
from tilewise.domain.trial import Mode, Trial
from tilewise.kernels.backend import Backend
from tilewise.kernels.backends import backend_named
from tilewise.kernels.compilers import share_caches

from .correctness import Checker
from .limits import Limits
from .serving import Room
from .timing import clock_for
from .trying import Bench, Judged

Setup = Callable[[], None]


def no_setup() -> None:
    """Prepare nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """The tensors and the reference that all candidates of a problem share.

    - device: as torch spells it; threads: of torch, on a CPU part of what the device is.
    - job, attempt: what the trials are of.
    - mode: how calls are timed, None for as the reference's calls say: a process that goes on where another ended, or
      prepares while others compute, must not come to another conclusion.
    - setup: called first in every process that takes part, and importable by its name; it may register backends.
    """

    problem: Problem
    device: str
    reference: Candidate
    seed: int
    threads: int
    job: str = ""
    attempt: int = 1
    mode: Mode | None = None
    setup: Setup = no_setup

    @property
    def tensors(self) -> "Preparation":
        """What the tensors depend on: the same for all jobs, references and modes."""
        return replace(self, reference=_NO_REFERENCE, job="", attempt=1, mode=None)


_NO_REFERENCE = Candidate("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Readying:
    """Make the tensors and their float64 results, and import what backends need, before anything is to be tried."""

    preparation: Preparation
    limits: Limits
    imports: tuple[str, ...] = ()

    def __call__(self, room: Room) -> None:
        _bench(room, self.preparation, self.limits)
        _load(room, self.imports, self.limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempting:
    """Check a candidate and, if it is right, screen it; `best_ratio` tells what is too slow to be timed well."""

    preparation: Preparation
    candidate: Candidate
    limits: Limits
    best_ratio: float

    def __call__(self, room: Room) -> Trial:
        with _at_bench(room, self.preparation, self.limits) as bench:
            _load(room, [self.candidate.backend], self.limits)
            return bench.attempt(self.candidate, best_ratio=self.best_ratio, enter=room.enter, limits=self.limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaking:
    """Call a candidate alone as a final would: many times, or for so many seconds."""

    preparation: Preparation
    candidate: Candidate
    limits: Limits
    calls: int
    seconds: float

    def __call__(self, room: Room) -> Trial:
        with _at_bench(room, self.preparation, self.limits) as bench:
            _load(room, [self.candidate.backend], self.limits)
            return bench.soak(
                self.candidate, calls=self.calls, seconds=self.seconds, enter=room.enter, limits=self.limits
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """Hold the final of `candidates`, the first being the reference."""

    preparation: Preparation
    candidates: tuple[Candidate, ...]
    limits: Limits
    rounds: int
    seconds: float

    def __call__(self, room: Room) -> Judged:
        with _at_bench(room, self.preparation, self.limits) as bench:
            _load(room, [candidate.backend for candidate in self.candidates], self.limits)
            return bench.judge(
                self.candidates, rounds=self.rounds, seconds=self.seconds, enter=room.enter, limits=self.limits
            )


_ready: tuple[Preparation, Bench] | None = None  # of one problem at a time: its tensors may fill half a device


@contextmanager
def _at_bench(room: Room, preparation: Preparation, limits: Limits) -> Iterator[Bench]:
    """Give the bench of a problem, and let the worker know afterwards whether the device is still usable."""
    bench = _bench(room, preparation, limits)
    try:
        yield bench
    finally:
        room.broken = bench.broken


def _load(room: Room, backends: Iterable[str], limits: Limits) -> None:
    """Import what the calls of backends need, in a phase of its own: it may take longer than a check."""
    for backend in map(backend_named, dict.fromkeys(backends)):
        if type(backend).load is not Backend.load:
            room.enter("load", limits.load)
            backend.load()


def _bench(room: Room, preparation: Preparation, limits: Limits) -> Bench:
    global _ready
    if _ready is not None and _ready[0] == preparation:
        return _ready[1]
    if _ready is not None and _ready[0].tensors == preparation.tensors:
        checker, clock = _ready[1].checker, _ready[1].clock
    else:
        room.enter("prepare", limits.prepare)
        _ready = None
        share_caches()
        preparation.setup()
        device = torch.device(preparation.device)
        torch.set_num_threads(preparation.threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.empty_cache()
        checker, clock = Checker(preparation.problem, device, seed=preparation.seed), clock_for(device)
    bench = Bench(
        checker, clock, preparation.reference, job=preparation.job, attempt=preparation.attempt, mode=preparation.mode
    )
    _ready = preparation, bench
    return bench
