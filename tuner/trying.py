"""Tries candidates: checks them, times them, holds the final, and turns whatever happens into Trials."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.trial import Measurement, NumericError, Outcome, Stage, Trial

from .correctness import Checker
from .limits import Limits
from .printed import shortened
from .steps import Step, make_step
from .timing import Clock, Final, final, screen

SCREEN_SECONDS = 0.6
VERIFIED = 4  # times that a finalist's results are looked at again
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

    def __init__(self, checker: Checker, clock: Clock, reference: Candidate, *, job: str, attempt: int) -> None:
        self.checker = checker
        self.clock = clock
        self.reference = reference
        self.broken = False
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
            steps = self.step(candidate), self.step(self.reference)
            measurement = screen(self.clock, *steps, best_ratio=best_ratio, seconds=SCREEN_SECONDS)
            return replace(found, measurement=measurement)

        return self._guarded(candidate, checked_and_screened)

    def soak(self, candidate: Candidate, *, calls: int, enter: Enter, limits: Limits) -> Trial:
        """Call a candidate alone as often as a final does: who kills finals is found so."""

        def called() -> _Found:
            enter("measure", limits.measure)
            step = self.step(candidate)
            for _ in range(calls):
                step()
            return _Found(Outcome.OK)

        return self._guarded(candidate, called)

    def judge(
        self, candidates: Sequence[Candidate], *, rounds: int, seconds: float, enter: Enter, limits: Limits
    ) -> Judged:
        """Hold the final, then check every finalist again: after all these calls it must still be right."""
        running = candidates[0]

        def watched(candidate: Candidate) -> Step:
            step = self.step(candidate)

            def call() -> object:
                nonlocal running
                running = candidate
                return step()

            return call

        held: list[Final] = []

        def hold() -> _Found:
            enter("final", limits.measure + 4 * seconds)
            steps = [watched(candidate) for candidate in candidates]
            held.append(final(self.clock, steps, rounds=rounds, seconds=seconds, device=self.checker.device))
            return _Found(Outcome.OK)

        found = self._guarded(self.reference, hold)
        if found.outcome is not Outcome.OK:
            return Judged(None, (replace(found, candidate=running),))
        verified = [self._verify(candidate, enter, limits) for candidate in candidates]
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
    # torch's allocator on a CPU raises a RuntimeError
    if "OutOfMemoryError" in kinds or isinstance(raised, MemoryError) or "can't allocate memory" in str(raised):
        return Outcome.OUT_OF_RESOURCES
    if kinds & COMPILER_ERRORS or "PassManager::run failed" in str(raised):
        return Outcome.COMPILE_FAILED
    if isinstance(raised, UnsupportedError | NotImplementedError) or "No available kernel" in str(raised):
        return Outcome.UNSUPPORTED
    return Outcome.FAILED


def said(raised: Exception) -> str:
    """Return what a trial keeps of an exception."""
    return shortened(f"{type(raised).__name__}: {raised}")
