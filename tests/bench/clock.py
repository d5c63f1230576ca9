"""A clock whose times are given."""

from collections.abc import Sequence

from tilewise.domain.config import Candidate
from tilewise.tuner.steps import Step
from tilewise.tuner.timing import CpuClock


class CallClock(CpuClock):
    """Says that a step took as many milliseconds as the order of `costs` says, after really running it once."""

    def __init__(self, costs: dict[str, float]) -> None:
        super().__init__()
        self._costs = costs
        self.ran: list[str] = []

    def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
        return [[self._cost(step)] * rounds for step in steps]

    def _cost(self, step: Step) -> float:
        cells = [cell.cell_contents for cell in (getattr(step, "__closure__", None) or ())]
        candidate = next(content for content in cells if isinstance(content, Candidate))
        self.ran.append(str(candidate))
        step()
        return next((cost for part, cost in self._costs.items() if part in str(candidate)), 1.0)
