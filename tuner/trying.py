"""Tries candidates: checks them, times them, holds the final, and turns whatever happens into Trials."""

import errno
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.trial import Measurement, Mode, NumericError, Outcome, Stage, Trial

from .correctness import Checker
from .limits import Limits
from .printed import shortened
from .steps import Step, make_step
from .timing import LEAST_ROUNDS, Clock, Final, final, screen

SCREEN_SECONDS = 0.6
VERIFIED = 4  # times that a finalist's results are looked at again
FINAL_PATIENCE = 8.0  # times its seconds: with one thread these are of the process, on a machine that may be busy
ALONE = 15  # calls of the fastest of a final, without the others between
ALONE_TRIES = 3
SUSPICIOUS = 1.5  # times as long alone, beside the reference alone: clocks under a power cap make up to 1.3
# Triton's, and those of torch.compile and the CuTe DSL
COMPILER_ERRORS = {
    "CompilationError",
    "PTXASError",
    "TorchDynamoException",
    "InductorError",
    "DSLBaseError",
    "MLIRError",
}
UNLIMITED = Limits()
Enter = Callable[[str, float], None]  # says which phase begins, and how many seconds it may last


def unwatched(_phase: str, _seconds: float) -> None:
    """Tell nobody which phase begins: where nobody can end it."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A final with every finalist right after it; or none, and who has to leave before it is held again, and why."""

    final: Final | None
    failures: tuple[Trial, ...] = ()


class Bench:
    """The tensors, the clock and the reference candidate that all candidates of one problem share.

    `broken` becomes true where a candidate may have left something behind that makes later ones fail: an error that
    the device keeps, or tensors that are no longer what they were.
    """

    def __init__(
        self,
        checker: Checker,
        clock: Clock,
        reference: Candidate,
        *,
        job: str,
        attempt: int,
        mode: Mode | None = None,
    ) -> None:
        self.checker = checker
        self.clock = clock
        self.reference = reference
        self.broken = False
        self._replays = None if mode is None else mode is Mode.GRAPH  # not known before the reference was called
        self._job, self._attempt = job, attempt
        self._stage = stage_of(checker.main.call.problem)

    def step(self, candidate: Candidate) -> Step:
        return make_step(self.checker.main.call, candidate, self.checker.main.grad_out)

    def attempt(
        self, candidate: Candidate, *, best_ratio: float, enter: Enter = unwatched, limits: Limits = UNLIMITED
    ) -> Trial:
        """Check `candidate` and, if it is right, screen it against the reference. Never raises for what it does."""

        def checked_and_screened() -> _Found:
            enter("check", limits.check)
            found = _checked(self.checker.check(candidate))
            if found.outcome is not Outcome.OK:
                return found
            enter("measure", limits.measure)
            (step, mode), (reference, _) = self._timed(candidate), self._timed(self.reference)
            measurement = screen(self.clock, step, reference, best_ratio=best_ratio, seconds=SCREEN_SECONDS)
            return replace(found, measurement=replace(measurement, mode=mode))

        return self._guarded(candidate, checked_and_screened)

    def soak(self, candidate: Candidate, *, calls: int, seconds: float, enter: Enter, limits: Limits) -> Trial:
        """Call a candidate alone as often as a final of so many rounds or seconds: who kills finals is found so."""

        def called() -> _Found:
            enter("measure", limits.measure + seconds)
            step, until = self.step(candidate), time.monotonic() + seconds
            for number in range(calls):
                if number >= LEAST_ROUNDS and time.monotonic() > until:
                    break
                step()
            return _Found(Outcome.OK)

        return self._guarded(candidate, called)

    def judge(
        self, candidates: Sequence[Candidate], *, rounds: int, seconds: float, enter: Enter, limits: Limits
    ) -> Judged:
        """Hold the final, then check every finalist again: after all these calls it must still be right."""
        running = candidates[0]

        def watched(candidate: Candidate, step: Step) -> Step:
            def call() -> object:
                nonlocal running
                running = candidate
                return step()

            return call

        held: list[Final] = []

        def hold() -> _Found:
            nonlocal running
            enter("final", limits.measure + FINAL_PATIENCE * seconds)
            steps, modes = [], []
            for running in candidates:  # making a step may fail too
                step, mode = self._timed(running)
                steps.append(watched(running, step))
                modes.append(mode)
            found = final(self.clock, steps, rounds=rounds, seconds=seconds, device=self.checker.device)
            measured = zip(found.measurements, modes, strict=True)
            held.append(replace(found, measurements=tuple(replace(each, mode=mode) for each, mode in measured)))
            return _Found(Outcome.OK)

        found = self._guarded(self.reference, hold)
        if found.outcome is not Outcome.OK:
            return Judged(None, (replace(found, candidate=running),))
        verified = [self._verify(candidate, enter, limits) for candidate in candidates]
        verified.append(self._alone(candidates, held[0], enter, limits))
        failures = tuple(trial for trial in verified if trial.outcome is not Outcome.OK)
        return Judged(None if failures else held[0], failures)

    def refused(self, candidate: Candidate, reason: str, outcome: Outcome = Outcome.UNSUPPORTED) -> Trial:
        """Return the trial of a candidate that is not run, for `reason`."""
        return self._trial(candidate, _Found(outcome, message=reason), 0.0)

    def _verify(self, candidate: Candidate, enter: Enter, limits: Limits) -> Trial:
        def right() -> _Found:
            enter("check", limits.check)
            checks = (_checked(self.checker.recheck(candidate)) for _ in range(VERIFIED))
            return next((each for each in checks if each.outcome is not Outcome.OK), _Found(Outcome.OK))

        return self._guarded(candidate, right)

    def _alone(self, candidates: Sequence[Candidate], held: Final, enter: Enter, limits: Limits) -> Trial:
        """Look at the fastest alone: it must not owe its time to what the calls of the others leave behind."""
        timed = zip(candidates, held.measurements, strict=True)
        candidate, among = min(timed, key=lambda pair: pair[1].ratio or math.inf)

        def looked_at() -> _Found:
            enter("measure", limits.measure)
            slower = math.inf
            for _ in range(ALONE_TRIES):  # the machine may have been busy with something else
                mine, reference = (self._median_alone(each) for each in (candidate, self.reference))
                slower = min(slower, mine / reference / (among.ratio or 1.0))
                if slower <= SUSPICIOUS:
                    return _Found(Outcome.OK)
            return _Found(Outcome.FAILED, message=f"alone it takes {slower:.2f} times as long as between others")

        return self._guarded(candidate, looked_at)

    def _median_alone(self, candidate: Candidate) -> float:
        (times,) = self.clock.interleave([self._timed(candidate)[0]], ALONE)
        return statistics.median(times)

    def _timed(self, candidate: Candidate) -> tuple[Step, Mode]:
        """Return what is timed: a call, or its replay where calls of the reference wait for the host.

        A training step is timed as it runs, and so is what cannot be captured.
        """
        step = self.step(candidate)
        if self._replays is None:
            inference = self.checker.main.call.problem.pass_ is Pass.INFERENCE
            self._replays = inference and self.clock.launch_bound(self.step(self.reference))
        replay = self.clock.captured(step) if self._replays else None
        return (step, Mode.EAGER) if replay is None else (replay, Mode.GRAPH)

    def _guarded(self, candidate: Candidate, run: "Callable[[], _Found]") -> Trial:
        """Return what `run` gives or why it did not, timed; notes what may be broken since."""
        start = time.perf_counter()
        try:
            found = run()
            self._synchronize()
        except Exception as raised:  # whatever a candidate does costs one trial, not the search
            found = _Found(classify(raised), message=said(raised))
            found = self._after(found)
        if not self.broken and not self.checker.intact():
            self.broken = True
            message = "\n".join(filter(None, (found.message, "it wrote over its inputs")))
            found = _Found(Outcome.WRONG_RESULT, error=found.error, message=message)
        return self._trial(candidate, found, time.perf_counter() - start)

    def _after(self, found: "_Found") -> "_Found":
        try:
            self._synchronize()
        except Exception as kept:  # a poisoned context raises at every call from now on
            self.broken = True
            return replace(found, message=f"{found.message}\nthe device keeps the error: {said(kept)[:500]}")
        return found

    def _trial(self, candidate: Candidate, found: "_Found", seconds: float) -> Trial:
        return Trial(
            candidate=candidate,
            stage=self._stage,
            outcome=found.outcome,
            measurement=found.measurement,
            error=found.error,
            message=found.message,
            seconds=seconds,
            job=self._job,
            attempt=self._attempt,
        )

    def _synchronize(self) -> None:
        if self.checker.device.type == "cuda":
            torch.cuda.synchronize(self.checker.device)


@dataclass(frozen=True, slots=True)
class _Found:
    outcome: Outcome
    measurement: Measurement | None = None
    error: NumericError | None = None
    message: str = ""


def stage_of(problem: Problem) -> Stage:
    """Return what a trial of `problem` measures: training is judged by forward and backward together."""
    return Stage.BOTH if problem.pass_ is Pass.TRAINING else Stage.FORWARD


def _checked(error: NumericError) -> _Found:
    if error.worst <= 1:
        return _Found(Outcome.OK, error=error)
    message = f"{error.tensor} of the case '{error.case}' is off by {error.worst:.3g} times the bound"
    return _Found(Outcome.WRONG_RESULT, error=error, message=message)


def classify(raised: Exception) -> Outcome:
    """Return what kind of failure an exception is. Triton's classes are known by name: triton may be absent."""
    kinds = {kind.__name__ for kind in type(raised).__mro__}
    # Triton compares what it compiled with the device, and launches nothing; inductor passes that on as text
    if "OutOfResources" in kinds or (kinds & COMPILER_ERRORS and "out of resource" in str(raised)):
        return Outcome.INFEASIBLE
    # torch's allocator on a CPU raises a RuntimeError, the system an OSError
    full = "can't allocate memory" in str(raised) or (isinstance(raised, OSError) and raised.errno == errno.ENOMEM)
    if "OutOfMemoryError" in kinds or isinstance(raised, MemoryError) or full:
        return Outcome.OUT_OF_RESOURCES
    if kinds & COMPILER_ERRORS or "PassManager::run failed" in str(raised):
        return Outcome.COMPILE_FAILED
    if isinstance(raised, UnsupportedError | NotImplementedError) or "No available kernel" in str(raised):
        return Outcome.UNSUPPORTED
    return Outcome.FAILED


def said(raised: Exception) -> str:
    """Return what a trial keeps of an exception."""
    return shortened(f"{type(raised).__name__}: {raised}")
