"""What the benchmark of layers keeps of every row."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tilewise.domain.trial import NumericError, Outcome

from .page_specs import Spec
from .records import BACKWARD_FLOPS, Run

# column -> its heading, in the order of the page, ours behind
BACKENDS = {
    "pytorch": "PyTorch",
    "triton": "Triton",
    "flash": "Flash",
    "sdpa": "SDPA",
    "triton_default": "Triton default",
    "auto": "auto",
    "trinix_pytorch": "trinix PyTorch",
    "trinix_triton": "trinix Triton",
}
BASELINE = "pytorch"
EXPLICIT = ("pytorch", "triton", "flash", "sdpa", "triton_default")  # those that `auto` may not be slower than


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Times of one step in milliseconds, its calls interleaved with those of the row's other steps.

    ratio: the median over rounds of its time over that of the row's reference in the same round.
    """

    mean_ms: float
    std_ms: float
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    ratio: float

    @classmethod
    def of(cls, times: Sequence[float], reference: Sequence[float]) -> "Timing":
        ordered = sorted(times)
        last = len(ordered) - 1
        return cls(
            mean_ms=statistics.fmean(ordered),
            std_ms=statistics.stdev(ordered) if last else 0.0,
            median_ms=statistics.median(ordered),
            p20_ms=ordered[round(0.2 * last)],
            p80_ms=ordered[round(0.8 * last)],
            samples=len(ordered),
            ratio=statistics.median(mine / theirs for mine, theirs in zip(times, reference, strict=True)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One backend of a row: the whole layer, and its core alone.

    - ran: what was run: a candidate, or the answer's plan and how well it matches.
    - peak_bytes: what the layer's step allocates at its peak, with weights and input; None where the device does not
      tell. needed_bytes: about what it would, where it did not fit.
    - core is None for layers of another library, of which only the whole is timed.
    """

    backend: str
    outcome: Outcome
    ran: str = ""
    message: str = ""
    layer: Timing | None = None
    core: Timing | None = None
    peak_bytes: int | None = None
    needed_bytes: int | None = None
    error: NumericError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds of a row: until all cells were checked, with what compiles at its first call, for layers, for cores."""

    checks: float
    layers: float
    cores: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRow:
    """All cells of a spec, measured in one run.

    - projection_flops: of all projections, in training with their gradients. matmul_tflops: the rate of a large matrix
      product in the dtype, its calls interleaved with those of the layers.
    - core_matmul_tflops: the same beside the cores.
    """

    spec: Spec
    cells: tuple[Cell, ...]
    reference: str
    projection_flops: int
    matmul_tflops: float
    core_matmul_tflops: float
    seconds: float
    run: Run
    spent: Spent | None = None

    def cell(self, backend: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.backend == backend), None)

    def timing(self, backend: str, *, core: bool = False) -> Timing | None:
        cell = self.cell(backend)
        return None if cell is None else (cell.core if core else cell.layer)

    def speedup(self, backend: str, over: str = BASELINE, *, core: bool = False) -> float | None:
        """Return how many times faster `backend` is than `over`, None where one of them was not timed."""
        fast, slow = self.timing(backend, core=core), self.timing(over, core=core)
        return None if fast is None or slow is None else slow.ratio / fast.ratio

    def fastest(self, backends: Sequence[str] = tuple(BACKENDS), *, core: bool = False) -> str | None:
        """Return the backend with the smallest ratio."""
        timed = {name: timing.ratio for name in backends if (timing := self.timing(name, core=core)) is not None}
        return min(timed, key=timed.__getitem__, default=None)

    @property
    def ceiling_ms(self) -> float | None:
        """The projections at the measured matmul rate plus the fastest core of any backend."""
        name = self.fastest(core=True)
        core = None if name is None else self.timing(name, core=True)
        return None if core is None else self.projection_flops / self.matmul_tflops / 1e9 + core.median_ms

    @property
    def of_ceiling(self) -> float | None:
        """The ceiling's time over that of `auto`."""
        auto, ceiling = self.timing("auto"), self.ceiling_ms
        return None if auto is None or ceiling is None else ceiling / auto.median_ms

    @property
    def core_share(self) -> float | None:
        """The share of the core in the layer, of `auto`."""
        layer, core = self.timing("auto"), self.timing("auto", core=True)
        return None if layer is None or core is None else core.median_ms / layer.median_ms

    def core_tflops(self, backend: str) -> float | None:
        """TFLOP/s of a core, counting the pairs that causality leaves; a backward 2.5 times the forward."""
        core = self.timing(backend, core=True)
        if core is None:
            return None
        factor = 1 + BACKWARD_FLOPS if self.spec.pass_ == "training" else 1.0
        return factor * self.spec.problem.forward_flops / core.median_ms / 1e9


def geomean(values: Sequence[float]) -> float | None:
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else None
