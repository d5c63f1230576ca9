"""The processes of one device: one that measures, and those that compile ahead of it."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.errors import TuningError
from tilewise.domain.matching import default_candidate
from tilewise.domain.peaks import moved_bytes
from tilewise.domain.problem import Problem
from tilewise.domain.trial import Measurement, Outcome, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.ahead import Footprint, compiles_ahead
from tilewise.kernels.backend import Backend
from tilewise.kernels.backends import backend_named, supporting

from .compile_pool import CompilePool, slow
from .compiling import Compiled, Compiling
from .known import KNOWN_FIRST, known
from .limits import Limits
from .measuring import Attempting, Judging, Preparation, Readying, Setup, Soaking, no_setup
from .processes import Ended, Worker, nothing, stop_all, wait_for
from .trying import Judged, stage_of

PATIENCE = 10.0  # times the longest of the right candidates, before one is said to hang
TRIAL_CALLS = 12  # of a candidate or the reference that one trial takes, about
FINAL_TRIALS = 3.0  # a final calls each finalist half as often again as a trial does; on a machine that may be busy
COMPILATIONS = 3.0  # times Backend.compile_seconds, on a busy machine
NICE = 5  # of those that compile: who measures calls the device in time, and who searches comes to it
MEMORY_SHARE = 0.8  # of the machine, for the process that measures
# Two processes prepare a problem whose tensors take this share of the device at most: in float64 it is many times that.
HEIR_SHARE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A finished trial; whether it was compiled ahead, what that found, and how long it took."""

    trial: Trial
    compiled: bool = False
    footprints: tuple[Footprint, ...] = ()
    compile_seconds: float = 0.0


class Crew:
    """Workers that stay warm from one problem to the next; close it, or use it as a context manager.

    - device: that is measured.
    - compilers: processes that compile ahead; by default one per core but one for a GPU. On a CPU nothing compiles
      while it measures: the cores are what is measured.
    - setup: called first in every worker for every problem, importable by its name.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        compilers: int | None = None,
        limits: Limits | None = None,
        setup: Setup = no_setup,
    ) -> None:
        self.device, self.limits, self.setup = device, limits or Limits(), setup
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        self._memory = min(self.limits.memory_gib, MEMORY_SHARE * machine)
        self.measurer = self._one_that_measures()
        self._heir: Worker | None = None
        self._heritage: frozenset[str] = frozenset()  # backends that the heir imports
        self._imported: tuple[int | None, frozenset[str]] = None, frozenset()  # process that measures, backends
        count = max(1, len(os.sched_getaffinity(0)) - 1) if compilers is None else compilers
        each = min(self.limits.compile_memory_gib, machine / (count + 1))
        self.pool = CompilePool([Worker(self.limits, memory_gib=each, strict=True, nice=NICE) for _ in range(count)])
        self._begun: tuple[Problem, int, tuple[str, ...]] | None = None

    def _one_that_measures(self) -> Worker:
        return Worker(self.limits, memory_gib=self._memory, strict=self.device.type == "cpu")

    def begin(self, problem: Problem, *, seed: int, backends: Sequence[str] = ()) -> None:
        """Have all processes started, and what a tuning of `problem` does first done, while others go on.

        The process that measures makes tensors and float64 results, and its heir too; the others compile the default
        and the known configs of `backends`, all where empty. A tuning of that problem and seed finds it there.
        """
        if self._begun == (problem, seed, tuple(backends)):
            return
        self._begun = problem, seed, tuple(backends)
        described = devices.describe(self.device)
        ahead = [
            backend
            for backend in supporting(problem, described)
            if compiles_ahead(backend.name) and (not backends or backend.name in backends)
        ]
        preparation = self.preparation(problem, default_candidate(problem), seed=seed)
        self.part_with_heir()  # it has another problem's tensors
        self.measurer.begin(Readying(preparation=preparation, limits=self.limits))
        if self.device.type == "cpu":  # there, nothing of ours compiles
            return
        if moved_bytes(problem) <= HEIR_SHARE * described.memory_gib * 2**30:
            self.bring_up(preparation, [backend.name for backend in ahead if slow(backend.name)])
        first = _foreseen(problem, described, ahead)
        self.pool.begin({candidate: self.compiling(problem, candidate, described) for candidate in first})

    def bring_up(self, preparation: Preparation, backends: Sequence[str]) -> None:
        """Have an heir to the process that measures: one that makes the tensors and imports what is slow to import.

        Meanwhile the other measures what needs none of that; `succeed` lets the heir take its place.
        """
        missing = frozenset(backends) - self._has_imported
        if not missing:
            return
        self.part_with_heir()
        self._heritage, self._heir = missing, self._one_that_measures()
        self._heir.begin(Readying(preparation=preparation, limits=self.limits, imports=tuple(missing)))

    def awaits(self, backend: str) -> bool:
        """Whether an heir is to come that imports `backend`."""
        return self._heir is not None and backend in self._heritage

    def succeed(self) -> None:
        """Let the heir, where there is one and it is ready, take the place of the process that measures, if that rests.

        An heir that ended leaves things as they were: a trial imports what it needs.
        """
        if self._heir is None or self.measurer.busy:
            return
        if not self._heir.busy:
            self._heir.start(nothing)  # which it does once it is ready
        ended = self._heir.poll()
        if ended is None:
            return
        heir, self._heir = self._heir, None
        if ended.outcome is Outcome.OK and heir.started == 1:  # else it died, and a fresh process answered
            heir, self.measurer = self.measurer, heir
            self._imported = self.measurer.pid, self._heritage
        heir.stop()

    def part_with_heir(self) -> None:
        """Have one process on the device from now on: the heir, if it is ready, else the one that measures."""
        self.succeed()
        if self._heir is not None:
            self._heir.stop()
            self._heir = None

    def has_run(self, backend: str) -> None:
        """Note that the process that measures has imported what `backend` needs."""
        self._imported = self.measurer.pid, self._has_imported | {backend}

    @property
    def _has_imported(self) -> frozenset[str]:
        """Of the process that measures now; one that comes has imported nothing."""
        process, backends = self._imported
        return backends if process is not None and process == self.measurer.pid else frozenset()

    @property
    def measuring(self) -> tuple[Worker, ...]:
        """The processes that may have something to tell: the one that measures or, while it rests, its heir too."""
        return (self.measurer,) if self._heir is None or self.measurer.busy else (self.measurer, self._heir)

    def preparation(
        self, problem: Problem, reference: Candidate, *, seed: int, job: str = "", attempt: int = 1
    ) -> Preparation:
        """Return what the candidates of a problem share when this crew tries them."""
        return Preparation(
            problem=problem,
            device=str(self.device),
            reference=reference,
            seed=seed,
            threads=torch.get_num_threads(),
            job=job,
            attempt=attempt,
            setup=self.setup,
        )

    def compiling(self, problem: Problem, candidate: Candidate, device: Device) -> Compiling:
        """Return the task of a process that compiles a candidate."""
        return Compiling(problem=problem, candidate=candidate, device=device, limits=self.limits, setup=self.setup)

    def close(self) -> None:
        heirs = [] if self._heir is None else [self._heir]
        stop_all([self.measurer, *heirs, *self.pool.workers])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _foreseen(problem: Problem, device: Device, backends: Sequence[Backend]) -> list[Candidate]:
    """Return what a search of these backends tries first: their defaults, then what is known of their kernels."""
    defaults = [backend.default(problem, device) for backend in backends]
    first = [
        default.with_config(role, config)
        for backend, default in zip(backends, defaults, strict=True)
        for role, space in backend.spaces(problem, device).items()
        for kernel in space.by_kernel
        for config in known(kernel, problem)[:KNOWN_FIRST]
    ]
    return list(dict.fromkeys([*defaults, *first]))


@dataclass(slots=True)
class _Waiting:
    candidate: Candidate
    must: bool = False  # be tried, even if the search ends
    ahead: bool = False
    since: float = 0.0
    compiled: bool = False
    footprints: tuple[Footprint, ...] = ()
    compile_seconds: float = 0.0


@dataclass(slots=True)
class _Queues:
    to_compile: deque[_Waiting] = field(default_factory=deque)
    compiling: dict[Worker, _Waiting] = field(default_factory=dict)
    to_measure: deque[_Waiting] = field(default_factory=deque)
    slow: deque[_Waiting] = field(default_factory=deque)  # compile in the process that measures
    measuring: _Waiting | None = None
    finished: deque[Tried] = field(default_factory=deque)


class Pipeline:
    """Candidates of one problem on their way through a crew: compiled ahead where possible, then measured in turn.

        pipeline.submit(candidate)
        tried = pipeline.take(best_ratio=0.9)  # waits for the next one to finish

    What takes long to compile and does it where it is measured waits until there is nothing else, but not for ever
    (`defer`): meanwhile nothing could be measured.

    A process that dies or is ended costs the trial it was at; the next one is for a fresh process, and so is the same
    one where it had not begun. Raises TuningError where the tensors and their references cannot be prepared.
    """

    def __init__(self, crew: Crew, preparation: Preparation) -> None:
        self._crew, self._preparation = crew, preparation
        self._described = devices.describe(crew.device)
        self._alone = self._described.kind is DeviceKind.CPU  # compiling and measuring share the cores
        self._queues = _Queues()
        self._longest = 0.0  # seconds of a right candidate
        self._died = False  # whether the last process did, before it had prepared the problem
        self._best_ratio = float("inf")
        self._deferred, self._patience = 0.0, float("inf")
        self._mixed = False  # whether any compile ahead that import nothing slow

    def compare_with(self, reference: Candidate) -> None:
        """Take the ratios of what is tried from now on against `reference`."""
        self._preparation = replace(self._preparation, reference=reference, mode=None)

    def time_as(self, measured: Measurement | None) -> None:
        """Time from now on as the reference was timed, whichever process does it."""
        if measured is not None:
            self._preparation = replace(self._preparation, mode=measured.mode)

    def heed(self, trials: Iterable[Trial]) -> None:
        """Let limits be as long as what was right in these trials takes, though it was tried by another run."""
        measured = [trial.measurement.median_ms for trial in trials if trial.measurement is not None]
        self._longest = max([self._longest, *(TRIAL_CALLS * median / 1e3 for median in measured)])

    def defer(self, seconds: float) -> None:
        """Let what compiles where it is measured wait behind all else, at most so long from now or its submission."""
        self._deferred, self._patience = time.monotonic(), seconds

    def submit(self, candidate: Candidate, *, must: bool = False) -> None:
        """Let a candidate be tried; one that `must` be is tried even if the search ends meanwhile (`finish`)."""
        q, ahead = self._queues, self.compiles_ahead(candidate.backend)
        slow_ones = q.slow if slow(candidate.backend) else q.to_measure
        queue = q.to_compile if ahead else slow_ones
        self._mixed |= ahead and not slow(candidate.backend)
        queue.append(_Waiting(candidate, must=must, ahead=ahead, since=time.monotonic()))

    def compiles_ahead(self, backend: str) -> bool:
        """Whether candidates of a backend are compiled by other processes than the one that measures."""
        return bool(self._crew.pool.workers) and compiles_ahead(backend)

    @property
    def pending(self) -> int:
        """How many candidates were submitted and not taken yet."""
        q = self._queues
        measuring = q.measuring is not None
        return sum(map(len, (q.to_compile, q.compiling, q.to_measure, q.slow, q.finished))) + measuring

    def wants(self, backend: str) -> bool:
        """Whether another candidate of `backend` would keep a process from waiting.

        One that compiles ahead is wanted while fewer are on their way than there are processes for it, and what is
        compiled does not wait in numbers; another only when nothing waits to be measured, so that it can be chosen by
        all that is known.
        """
        q, pool = self._queues, self._crew.pool
        if self.compiles_ahead(backend):
            compiling = [each.candidate.backend for each in (*q.to_compile, *q.compiling.values())]
            awaiting = [each.candidate.backend for each in q.to_measure if not self._runs(each)]
            if slow(backend) and sum(map(slow, (*compiling, *awaiting))) > pool.slots(mixed=self._mixed):
                return False
            compiled, processes = sum(each.ahead for each in q.to_measure), len(pool.workers)
            return len(compiling) + max(0, compiled - processes) < processes + 1
        if q.slow and slow(backend):
            return False
        return q.measuring is None and not any(map(self._runs, q.to_measure))

    def take(self, *, best_ratio: float) -> Tried:
        """Return the next finished trial; there must be one pending."""
        self._best_ratio = best_ratio
        assert self.pending, "nothing was submitted"
        while not self._queues.finished:
            self._go_on()
        return self._queues.finished.popleft()

    def finish(self, *, grace: float) -> Iterator[Tried]:
        """Forget what need not be tried, and yield the rest, and what is being measured, as it finishes.

        What must be tried and is not compiled, or waits for an heir, `grace` seconds from now is skipped.
        """
        q, until = self._queues, time.monotonic() + grace
        self._forget(lambda each: not each.must)
        while self.pending:
            if q.finished:
                yield q.finished.popleft()
                continue
            if time.monotonic() >= until:
                for each in self._forget(lambda each: each.ahead and not (each.compiled and self._runs(each))):
                    what = "its package was not imported" if each.compiled else "not compiled"
                    message = f"{what} {grace:g} s after the end of the search; allow more seconds"
                    self._finish(each, self.trial(each.candidate, Outcome.SKIPPED, message))
            self._go_on()

    def abandon(self) -> None:
        """Forget and end everything that is on its way."""
        if self._queues.measuring is not None or self._crew.measurer.busy:
            self._crew.measurer.stop()
            self._queues.measuring = None
        self._forget(lambda _: True)
        self._queues.finished.clear()

    def judge(self, candidates: tuple[Candidate, ...], *, rounds: int, seconds: float) -> Judged:
        """Hold the final of `candidates`, the first being the reference.

        A final in which a process dies does not say whose fault it was: then each is called alone, and who dies or
        fails is named. Raises TuningError where nobody does.
        """
        self._crew.part_with_heir()
        limits = self._limits(max((self._compile_seconds(each) for each in candidates), default=0.0))
        longest = FINAL_TRIALS * self._longest * (len(candidates) + 1)
        limits = replace(limits, measure=max(limits.measure, longest))
        task = Judging(
            preparation=self._preparation, candidates=candidates, limits=limits, rounds=rounds, seconds=seconds
        )
        ended = self._run(task)
        if ended.outcome is Outcome.OK:
            assert isinstance(ended.result, Judged)
            return ended.result
        failures = [
            trial
            for each in candidates
            if (trial := self._soaked(each, rounds, seconds, limits)).outcome is not Outcome.OK
        ]
        if not failures:
            raise TuningError(f"the final could not be held, though every finalist runs alone: {ended.message}")
        return Judged(None, tuple(failures))

    # compiling and measuring

    def _forget(self, which: Callable[[_Waiting], bool]) -> list[_Waiting]:
        """Take what waits or compiles out of the queues, end what compiles it, and return it."""
        q = self._queues
        forgotten = [each for queue in (q.to_compile, q.to_measure, q.slow) for each in queue if which(each)]
        q.to_compile, q.to_measure, q.slow = (
            deque(each for each in queue if not which(each)) for queue in (q.to_compile, q.to_measure, q.slow)
        )
        for worker, each in [*q.compiling.items()]:
            if which(each):
                worker.stop()
                forgotten.append(q.compiling.pop(worker))
        return forgotten

    def _go_on(self) -> None:
        """Start what can start; wait, for a moment, where nothing has finished."""
        self._advance()
        if not self._queues.finished:
            wait_for([*self._crew.measuring, *self._queues.compiling])

    def _advance(self) -> None:
        q, crew = self._queues, self._crew
        for worker, waiting in [*q.compiling.items()]:
            ended = worker.poll()
            if ended is not None:
                del q.compiling[worker]
                self._compiled(waiting, ended)
        if q.measuring is not None:
            ended = crew.measurer.poll()
            if ended is not None:
                waiting, q.measuring = q.measuring, None
                self._measured(waiting, ended)
        for worker in crew.pool.workers:
            if q.to_compile and worker not in q.compiling and not (self._alone and q.measuring):
                place = crew.pool.choose(worker, [each.candidate for each in q.to_compile], mixed=self._mixed)
                if place is None:
                    continue
                q.compiling[worker] = waiting = q.to_compile[place]
                del q.to_compile[place]
                worker.start(crew.compiling(self._preparation.problem, waiting.candidate, self._described))
        if q.measuring is None and not (self._alone and q.compiling):
            crew.succeed()
            q.measuring = self._next()
            if q.measuring is not None:
                crew.measurer.start(self._attempt(q.measuring))

    def _next(self) -> _Waiting | None:
        """Return what is measured next. What is slow waits for its turn, and until whoever submits had a chance to."""
        q = self._queues
        if q.slow and time.monotonic() >= max(self._deferred, q.slow[0].since) + self._patience:
            return q.slow.popleft()
        for each in q.to_measure:
            if self._runs(each):
                q.to_measure.remove(each)
                return each
        return q.slow.popleft() if q.slow and not (q.to_compile or q.compiling or q.finished) else None

    def _runs(self, waiting: _Waiting) -> bool:
        """Whether the process that measures has what a candidate needs, or will have to import it."""
        return not self._crew.awaits(waiting.candidate.backend)

    def _attempt(self, waiting: _Waiting) -> Attempting:
        candidate = waiting.candidate
        limits = self._limits(0.0 if waiting.ahead else self._compile_seconds(candidate))
        if candidate == self._preparation.reference:
            limits = replace(limits, check=limits.prepare, measure=limits.prepare)
        return Attempting(
            preparation=self._preparation, candidate=candidate, limits=limits, best_ratio=self._best_ratio
        )

    def _compile_seconds(self, candidate: Candidate) -> float:
        return COMPILATIONS * backend_named(candidate.backend).compile_seconds

    def _limits(self, compile_seconds: float) -> Limits:
        limits, patience = self._crew.limits, PATIENCE * self._longest
        check = max(limits.check, patience) + compile_seconds
        return replace(limits, check=check, measure=max(limits.measure, patience))

    def _compiled(self, waiting: _Waiting, ended: Ended) -> None:
        waiting.compile_seconds = ended.seconds
        found = ended.result if ended.outcome is Outcome.OK else Compiled(ended.outcome, ended.message)
        assert isinstance(found, Compiled)
        waiting.footprints = found.footprints
        if found.outcome is Outcome.OK:
            waiting.compiled = True
            self._queues.to_measure.append(waiting)
            return
        outcome = Outcome.COMPILE_FAILED if found.outcome is Outcome.FAILED else found.outcome
        self._finish(waiting, self.trial(waiting.candidate, outcome, found.message))

    def _measured(self, waiting: _Waiting, ended: Ended) -> None:
        if ended.outcome is Outcome.OK:
            assert isinstance(ended.result, Trial)
            self._died = False
            if ended.result.outcome is Outcome.OK:
                self._longest = max(self._longest, ended.result.seconds)
                self._crew.has_run(waiting.candidate.backend)
                if waiting.candidate == self._preparation.reference:
                    self.time_as(ended.result.measurement)
            self._finish(waiting, ended.result)
            return
        if self._again(ended):
            self._queues.to_measure.appendleft(waiting)
        else:
            self._finish(waiting, self.trial(waiting.candidate, ended.outcome, ended.message, ended.seconds))

    def _again(self, ended: Ended) -> bool:
        """Whether a task that ended badly is for a fresh process: the one it had died before it came to the candidate.

        Raises TuningError where that happens twice in a row, or where it could not prepare the problem.
        """
        unprepared = ended.phase in ("start", "prepare")
        died = unprepared and ended.outcome is Outcome.WORKER_DIED
        if unprepared and (self._died or not died):
            key = self._preparation.problem.key
            raise TuningError(f"{key}: its tensors and their references cannot be computed: {ended.message}")
        self._died = died
        return died

    def _finish(self, waiting: _Waiting, trial: Trial) -> None:
        trial = replace(trial, seconds=trial.seconds + waiting.compile_seconds)
        self._queues.finished.append(
            Tried(
                trial=trial,
                compiled=waiting.compiled,
                footprints=waiting.footprints,
                compile_seconds=waiting.compile_seconds,
            )
        )

    def trial(self, candidate: Candidate, outcome: Outcome, message: str, seconds: float = 0.0) -> Trial:
        """Return the trial of a candidate that did not run, or not to its end."""
        return Trial(
            candidate=candidate,
            stage=stage_of(self._preparation.problem),
            outcome=outcome,
            message=message,
            seconds=seconds,
            job=self._preparation.job,
            attempt=self._preparation.attempt,
        )

    # the final

    def _soaked(self, candidate: Candidate, calls: int, seconds: float, limits: Limits) -> Trial:
        ended = self._run(
            Soaking(preparation=self._preparation, candidate=candidate, limits=limits, calls=calls, seconds=seconds)
        )
        if ended.outcome is Outcome.OK:
            assert isinstance(ended.result, Trial)
            return ended.result
        return self.trial(candidate, ended.outcome, ended.message, ended.seconds)

    def _run(self, task: Judging | Soaking) -> Ended:
        worker = self._crew.measurer
        while True:
            worker.start(task)
            while (ended := worker.poll()) is None:
                wait_for([worker])
            if ended.outcome is Outcome.OK or not self._again(ended):
                return ended
