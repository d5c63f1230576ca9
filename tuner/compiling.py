"""The task of the workers that compile ahead."""

from dataclasses import dataclass

from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels.ahead import COMPILERS, Footprint
from tilewise.kernels.backends import backend_named

from .correctness import cases_of
from .limits import Limits
from .measuring import Setup
from .serving import Room
from .trying import classify, said


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came of compiling one candidate for the problem and the checker's other cases."""

    outcome: Outcome
    message: str = ""
    footprints: tuple[Footprint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiling:
    """Compile all that checking and timing a candidate will launch; the footprints are those of the problem itself."""

    problem: Problem
    candidate: Candidate
    device: Device
    limits: Limits
    setup: Setup

    def __call__(self, room: Room) -> Compiled:
        self.setup()
        room.enter("compile", self.limits.compile)
        compiler = COMPILERS[self.candidate.backend]
        footprints: tuple[Footprint, ...] = ()
        try:
            backend = backend_named(self.candidate.backend)
            for case in cases_of(self.problem).values():
                if backend.supports(case, self.device) is not None:
                    continue
                found = compiler(case, self.candidate, self.device)
                footprints = footprints or found
        except Exception as raised:  # a candidate that does not compile is a result
            outcome = classify(raised)
            outcome = Outcome.COMPILE_FAILED if outcome is Outcome.FAILED else outcome
            return Compiled(outcome, said(raised))
        return Compiled(Outcome.OK, footprints=footprints)
