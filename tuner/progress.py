"""What a running tuning tells whoever watches it."""

from collections.abc import Callable
from dataclasses import dataclass

from tilewise.domain.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Where the seconds of a tuning went.

    - prepare: wall time until torch's own choice was measured: processes, tensors, float64 results.
    - search, final: wall time of these.
    - compile, measure: of all candidates of this run together, within the search; compiling goes on in parallel.
    """

    prepare: float = 0.0
    search: float = 0.0
    final: float = 0.0
    compile: float = 0.0
    measure: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A moment of a tuning.

    - phase: `prepare`, `search`, `final` or `done`.
    - trials: tried so far, resumed ones included; of them `infeasible` ones that the device has not room for, and
      `failed` ones that ended badly otherwise; total: the limit.
    - compiled, waiting: compiled ahead so far; on their way now.
    - best: the fastest trial so far; baseline: the one of torch's own choice; default: that of the best's backend
      with its default configs.
    - seconds_left: wall time until the search ends at the latest.
    """

    phase: str
    trials: int
    failed: int
    total: int
    seconds_left: float
    infeasible: int = 0
    compiled: int = 0
    waiting: int = 0
    best: Trial | None = None
    baseline: Trial | None = None
    default: Trial | None = None


Reporter = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Report to nobody."""
