"""Tries one candidate: checks it, times it, and turns whatever happens into a Trial."""

import time

from tilewise.domain.config import Candidate
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Pass
from tilewise.domain.trial import Outcome, Stage, Trial

from .correctness import Checker
from .steps import Step, make_step
from .timing import Clock, screen

MESSAGE_LIMIT = 2000
SCREEN_SECONDS = 0.6
# Triton's, and those of torch.compile and the CuTe DSL
COMPILER_ERRORS = {
    "CompilationError",
    "PTXASError",
    "TorchDynamoException",
    "InductorError",
    "DSLBaseError",
    "MLIRError",
}


class Bench:
    """The tensors, the clock and the reference candidate that all trials of one tuning share."""

    def __init__(self, checker: Checker, clock: Clock, reference: Candidate, *, job: str, attempt: int) -> None:
        self.checker = checker
        self.clock = clock
        self.reference = reference
        self._job, self._attempt = job, attempt
        self._stage = Stage.BOTH if checker.main.call.problem.pass_ is Pass.TRAINING else Stage.FORWARD

    def step(self, candidate: Candidate) -> Step:
        return make_step(self.checker.main.call, candidate, self.checker.main.grad_out)

    def attempt(self, candidate: Candidate, *, best_ratio: float) -> Trial:
        """Check `candidate` and, if it is right, screen it against the reference. Never raises for what it does."""
        start = time.perf_counter()
        error = measurement = None
        try:
            error = self.checker.check(candidate)
            if error.worst <= 1:
                outcome, message = Outcome.OK, ""
                measurement = screen(
                    self.clock,
                    self.step(candidate),
                    self.step(self.reference),
                    best_ratio=best_ratio,
                    seconds=SCREEN_SECONDS,
                )
            else:
                outcome = Outcome.WRONG_RESULT
                message = f"{error.tensor} of the case '{error.case}' is off by {error.worst:.3g} times the bound"
        except Exception as raised:  # whatever a candidate does costs one trial, not the search
            outcome, message = classify(raised), _shortened(raised)
        return Trial(
            candidate=candidate,
            stage=self._stage,
            outcome=outcome,
            measurement=measurement,
            error=error,
            message=message,
            seconds=time.perf_counter() - start,
            job=self._job,
            attempt=self._attempt,
        )

    def refused(self, candidate: Candidate, reason: str, outcome: Outcome = Outcome.UNSUPPORTED) -> Trial:
        """Return the trial of a candidate that is not run, for `reason`."""
        return Trial(
            candidate=candidate,
            stage=self._stage,
            outcome=outcome,
            message=reason,
            job=self._job,
            attempt=self._attempt,
        )


def classify(raised: Exception) -> Outcome:
    """Return what kind of failure an exception is. Triton's classes are known by name: triton may be absent."""
    kinds = {kind.__name__ for kind in type(raised).__mro__}
    # Triton compares what it compiled with the device, and launches nothing; inductor passes that on as text
    if "OutOfResources" in kinds or (kinds & COMPILER_ERRORS and "out of resource" in str(raised)):
        return Outcome.INFEASIBLE
    if "OutOfMemoryError" in kinds or isinstance(raised, MemoryError):
        return Outcome.OUT_OF_RESOURCES
    if kinds & COMPILER_ERRORS or "PassManager::run failed" in str(raised):
        return Outcome.COMPILE_FAILED
    if isinstance(raised, UnsupportedError | NotImplementedError) or "No available kernel" in str(raised):
        return Outcome.UNSUPPORTED
    return Outcome.FAILED


def _shortened(raised: Exception) -> str:
    text = f"{type(raised).__name__}: {raised}".strip()
    if len(text) <= MESSAGE_LIMIT:
        return text
    half = MESSAGE_LIMIT // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
