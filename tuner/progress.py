"""What a running tuning tells whoever watches it."""

from collections.abc import Callable
from dataclasses import dataclass

from tilewise.domain.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A moment of a tuning.

    - phase: `prepare`, `search`, `final` or `done`.
    - trials, failed: tried so far, resumed ones included, and how many of them ended badly; total: the limit.
    - best: the fastest trial so far; baseline: the one of torch's own choice.
    - seconds_left: wall time until the search ends at the latest.
    """

    phase: str
    trials: int
    failed: int
    total: int
    seconds_left: float
    best: Trial | None = None
    baseline: Trial | None = None


Reporter = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Report to nobody."""
