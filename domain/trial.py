"""Trial, Measurement and Outcome: what was tried and what came of it."""

import enum
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .config import Candidate


class Outcome(enum.StrEnum):
    """How a trial ended. Everything but `ok` keeps the candidate out of the final."""

    OK = "ok"
    UNSUPPORTED = "unsupported"
    INFEASIBLE = "infeasible"
    COMPILE_FAILED = "compile_failed"
    OUT_OF_RESOURCES = "out_of_resources"
    WRONG_RESULT = "wrong_result"
    TIMED_OUT = "timed_out"
    WORKER_DIED = "worker_died"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Stage(enum.StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"
    BOTH = "both"


class Mode(enum.StrEnum):
    """Eager counts host time; graph replays a captured CUDA graph and does not."""

    EAGER = "eager"
    GRAPH = "graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Times of one candidate in milliseconds, with what is needed to judge them.

    - ratio: median of this candidate over the median of the run's reference candidate, calls interleaved; below 1 is
      faster. None where nothing else ran beside it.
    - spread: half-width of the central 95% of the ratio over repeats of the same run, as a share of the ratio.
    - clock_mhz, power_w, temperature_c: read during the run where the device tells, never set.
    - power_state: `settled` (after a warm-up under load), `shared` (another process computed on the device
      meanwhile), `burst` (cold), or `unknown`.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    ratio: float | None = None
    spread: float | None = None
    mode: Mode = Mode.EAGER
    peak_memory_bytes: int | None = None
    clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    power_state: str = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericError:
    """Errors against float64, as a share of the allowed bound: at most 1 passes."""

    worst: float
    tensor: str
    case: str


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate tried once for one problem on one device. `seconds` is its cost in wall time."""

    candidate: Candidate
    stage: Stage
    outcome: Outcome
    measurement: Measurement | None = None
    error: NumericError | None = None
    message: str = ""
    seconds: float = 0.0
    when: datetime = field(default_factory=now)
    job: str | None = None
    attempt: int = 1
