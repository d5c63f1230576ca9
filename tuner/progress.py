"""What a running tuning tells whoever watches it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tilewise.domain.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Where the seconds of a tuning went.

    - start: wall time before the tuning began: of the command, or since its tuning before this one.
    - prepare: wall time until torch's own choice was measured: processes, tensors, float64 results.
    - search, final: wall time of these. So the four are all but what the command takes to end.
    - compile, measure: of all candidates of this run together, within the search; compiling goes on in parallel.
    """

    start: float = 0.0
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


def process_began() -> float:
    """Return when this process began, on the clock of time.monotonic; now, where the system does not tell."""
    now = time.monotonic()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # proc(5): since the boot
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return now


Reporter = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Report to nobody."""
