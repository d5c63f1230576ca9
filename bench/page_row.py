"""One row of the benchmark page: every backend checked against float64, then all timed together, layer and core."""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tilewise.domain.config import Candidate
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.trial import NumericError, Outcome
from tilewise.kernels import reference
from tilewise.kernels.backends import backend_named
from tilewise.kernels.call import TORCH_DTYPES, Call
from tilewise.layers import session
from tilewise.layers.base import FastAttention
from tilewise.layers.positions import Placed
from tilewise.layers.resolve import KERNEL_TYPES, best_known, member
from tilewise.tuner.correctness import Bound, bound_of
from tilewise.tuner.steps import Step
from tilewise.tuner.timing import Clock
from tilewise.tuner.trying import classify

from . import baseline
from .core_row import usable
from .page_records import BASELINE, Cell, PageRow, Spent, Timing
from .page_specs import Spec
from .records import Run
from .trinix_layers import TRINIX, Trinix

MESSAGE_LIMIT = 300
CORE_ROUNDS = 30  # at most: without projections little moves their times
LEAST_ROUNDS = 30  # of a row whose time is limited
MATMUL = "matmul"
PLAIN_FORMS = (BASELINE, "trinix_pytorch")  # which hold whole score matrices
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
Tensors = dict[str, torch.Tensor]
Result = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all rows of an invocation have in common; `row_seconds`: see `page.Options`."""

    device: torch.device
    run: Run
    clock: Clock
    backends: tuple[str, ...]
    num_runs: int
    warmup: int
    row_seconds: float | None = None
    trinix: Trinix | None = None


class SpoiltError(Exception):
    """The device cannot be used by this process any more, since `backend` ran on the row of `spec`."""

    def __init__(self, spec: Spec, backend: str, message: str) -> None:
        super().__init__(message)
        self.spec, self.backend = spec, backend


def measure(spec: Spec, shared: Shared, spoilt: Mapping[str, str]) -> PageRow:
    """Return the row of `spec`; a cell that cannot be, is wrong, or is in `spoilt` has its reason in it.

    Raises SpoiltError where a backend leaves the device unusable, and torch.OutOfMemoryError where not even the layer
    itself fits.
    """
    start = time.monotonic()
    subject = Subject(spec, shared.device)
    bounds = subject.bounds()
    cells: dict[str, Cell] = {}
    for name in shared.backends:
        cells[name] = _checked(subject, name, bounds, shared, spoilt.get(name))
    del bounds
    _give_back(shared.device)
    right = {name: subject.twins[name] for name, cell in cells.items() if cell.outcome is Outcome.OK}
    layers = {name: subject.step(twin) for name, twin in right.items()}
    for name, step in layers.items():
        peak = shared.clock.peak_memory(step)
        if peak is not None:
            cells[name] = replace(cells[name], peak_bytes=peak + subject.resident_bytes)
        _give_back(shared.device)
    product = _product(spec, shared.device)
    checked = time.monotonic()
    times = _interleaved({**layers, MATMUL: product}, shared)
    timed = time.monotonic()
    # another library's layer has no core that could be called alone
    cores = {name: subject.core_step(twin) for name, twin in right.items() if isinstance(twin, FastAttention)}
    core_times = _interleaved({**cores, MATMUL: product}, shared, cores=True)
    end = time.monotonic()
    against = BASELINE if BASELINE in right else next(iter(right), MATMUL)
    for name in right:
        core = Timing.of(core_times[name], core_times[against]) if name in cores else None
        cells[name] = replace(cells[name], layer=Timing.of(times[name], times[against]), core=core)
    return PageRow(
        spec=spec,
        cells=tuple(cells.values()),
        reference=against,
        projection_flops=subject.projection_flops,
        matmul_tflops=_rate(shared.device, times[MATMUL]),
        core_matmul_tflops=_rate(shared.device, core_times[MATMUL]),
        seconds=end - start,
        run=shared.run,
        spent=Spent(checks=checked - start, layers=timed - checked, cores=end - timed),
    )


def without_room(spec: Spec, shared: Shared, reason: str, needed: int) -> PageRow:
    """Return the row of a layer that does not fit at all: every cell says why, the plain form's with its scores."""
    sizes = {name: needed + (_plain_needs(spec) if name in PLAIN_FORMS else 0) for name in shared.backends}
    cells = tuple(
        Cell(backend=name, outcome=Outcome.SKIPPED, message=reason, needed_bytes=size) for name, size in sizes.items()
    )
    return PageRow(
        spec=spec, cells=cells, reference=BASELINE, projection_flops=0, matmul_tflops=0.0, core_matmul_tflops=0.0,
        seconds=0.0, run=shared.run,
    )  # fmt: skip


def needed_bytes(spec: Spec) -> int:
    """Return about what checking and timing a row needs, without score matrices: weights in float64 beside their own.

    Training holds a gradient of each. The largest of the reference's score matrices, one group of heads at a time, and
    the tensors of the rows count too.
    """
    weights = sum(parameter.numel() for parameter in spec.build(torch.device("meta")).parameters())
    element = TORCH_DTYPES[spec.dtype].itemsize
    tokens = spec.batch * spec.seq_len
    copies = 2 if spec.pass_ is Pass.TRAINING else 1
    scores = spec.heads // spec.kv_heads * spec.seq_len**2 * 8 * (9 if spec.pass_ is Pass.TRAINING else 6)
    heads = spec.heads * sum(spec.head_dims) * 4
    return copies * (weights + tokens * (2 * spec.hidden + heads)) * (element + 8) + scores


class Subject:
    """The layer of a row on its device, its input, and a twin for every backend that shares its weights."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.layer = spec.build(device)
        generator = torch.Generator(device).manual_seed(1)
        shape, dtype = (spec.batch, spec.seq_len, spec.hidden), TORCH_DTYPES[spec.dtype]
        self.x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        self.grad_out = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        self.training = spec.pass_ is Pass.TRAINING
        self.x.requires_grad_(self.training)
        self.twins: dict[str, torch.nn.Module] = {}
        self._core: tuple[Placed, torch.Tensor] | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights, input and the result's gradient."""
        tensors = [*self.layer.parameters(), self.x, *([self.grad_out] if self.training else [])]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def projection_flops(self) -> int:
        tokens = self.spec.batch * self.spec.seq_len
        weights = sum(parameter.numel() for parameter in self.layer.parameters() if parameter.dim() == 2)
        return 2 * tokens * weights * (3 if self.training else 1)

    def twin(self, kernel_type: str | Candidate) -> FastAttention:
        """Return a layer with the same weights and another kernel."""
        twin = copy.copy(self.layer)
        twin.kernel_type = kernel_type
        return twin

    def with_core(self, layer: FastAttention, core: Callable[..., Result]) -> FastAttention:
        """Return `layer` with `core` in the place of its own."""
        twin = copy.copy(layer)
        twin.__dict__["core"] = core
        return twin

    def results(self, layer: torch.nn.Module, dtype: torch.dtype | None = None) -> Tensors:
        """Return the result and, in training, the gradients of the input and of every weight."""
        if not self.training:
            with torch.inference_mode():
                return {"out": layer(self.x if dtype is None else self.x.to(dtype))}
        x = self.x.detach() if dtype is None else self.x.detach().to(dtype)
        leaves = [x.requires_grad_(), *layer.parameters()]
        out = layer(leaves[0])
        grads = torch.autograd.grad(out, leaves, self.grad_out.to(out.dtype))
        names = ["d_x", *(f"d_{name.removeprefix('layer.')}" for name, _ in layer.named_parameters())]
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    def step(self, layer: torch.nn.Module) -> Step:
        if self.training:
            return lambda: self.results(layer)

        def forward() -> object:
            with torch.inference_mode():
                return layer(self.x)

        return forward

    def core_step(self, layer: FastAttention) -> Step:
        """Return the core alone, on the queries, keys and values that the layer makes of the input."""
        placed, value = self._core_inputs()
        if not self.training:

            def forward() -> object:
                with torch.inference_mode():
                    return layer.core(placed, value)

            return forward
        leaves = [each.detach().requires_grad_() for each in (placed.query, placed.key, value)]
        grad_out = value.new_empty(*placed.query.shape[:-1], value.shape[-1]).normal_()

        def both() -> object:
            out, _ = layer.core(Placed(leaves[0], leaves[1]), leaves[2])
            return torch.autograd.grad(out, leaves, grad_out)

        return both

    def _core_inputs(self) -> tuple[Placed, torch.Tensor]:
        if self._core is None:

            def keep(placed: Placed, value: torch.Tensor, *_: object, **__: object) -> Result:
                self._core = placed, value
                return value.new_zeros(*placed.query.shape[:-1], value.shape[-1]), None

            with torch.no_grad():
                self.with_core(self.layer, keep)(self.x)
        assert self._core is not None, "the layer calls its core"
        return self._core

    def bounds(self) -> dict[str, Bound]:
        """Return what is right, in float64, with the errors that plain products in the row's dtype may have."""
        plain = self.results(self.with_core(self.layer, self._reference))
        exact = self.with_core(copy.deepcopy(self.layer).double(), self._reference)
        wanted = self.results(exact, torch.float64)
        return {name: bound_of(wanted[name], plain[name], self.x.dtype) for name in wanted}

    def _reference(self, placed: Placed, value: torch.Tensor, *_: object, **__: object) -> Result:
        found = _Reference.apply(  # type: ignore[no-untyped-call]
            placed.query, placed.key, value, self.spec.problem, self.layer.scale
        )
        return found, None


class _Reference(torch.autograd.Function):
    """The core one group of heads at a time, in its inputs' dtype; scores are made again for the backward."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, problem: Problem, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.problem, ctx.scale = problem, scale
        return reference.attention(Call(problem, query, key, value, scale), dtype=query.dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        call = Call(ctx.problem, query, key, value, ctx.scale)
        return (*reference.gradients(call, grad_out, dtype=grad_out.dtype), None, None)


def _checked(subject: Subject, name: str, bounds: dict[str, Bound], shared: Shared, spoilt: str | None) -> Cell:
    """Run a backend once and compare; whatever goes wrong is in the cell."""
    cell, needed = Cell(backend=name, outcome=Outcome.OK), None
    if spoilt is not None:
        return replace(cell, outcome=Outcome.WORKER_DIED, message=f"it left the device unusable: {spoilt}")
    if name in PLAIN_FORMS:
        more, free = _plain_needs(subject.spec), free_bytes(shared.device)
        needed = more + subject.resident_bytes
        if more > free:
            reason = f"needs about {gib(more)}, of which {gib(free)} are free"
            return replace(cell, outcome=Outcome.SKIPPED, message=reason, needed_bytes=needed)
    try:
        twin, ran = _twin(subject, name, shared)
        found = subject.results(twin)
        shares = {each: bounds[each].share(tensor) for each, tensor in found.items()}
    except Exception as raised:  # whatever a backend does costs its cell
        lines = f"{type(raised).__name__}: {raised}".strip().splitlines()
        message = (str(raised) if isinstance(raised, UnsupportedError) else lines[0])[:MESSAGE_LIMIT]
        if not usable(shared.device):
            raise SpoiltError(subject.spec, name, message) from raised
        outcome = classify(raised)
        short = needed if outcome is Outcome.OUT_OF_RESOURCES else None
        return replace(cell, outcome=outcome, message=message, needed_bytes=short)
    worst = max(shares, key=shares.__getitem__)
    error = NumericError(worst=shares[worst], tensor=worst, case="the row")
    if error.worst > 1:
        message = f"{worst} is off by {error.worst:.3g} times the bound"
        return replace(cell, ran=ran, outcome=Outcome.WRONG_RESULT, message=message, error=error)
    subject.twins[name] = twin
    return replace(cell, ran=ran, error=error)


def _twin(subject: Subject, name: str, shared: Shared) -> tuple[torch.nn.Module, str]:
    """Return the layer of a column and what it runs. Raises UnsupportedError for one that cannot be here."""
    if name in TRINIX:
        if shared.trinix is None:
            raise UnsupportedError("name the folder of its wheel with --trinix")
        return shared.trinix.layer(subject.spec, subject.layer, name), name
    if name == BASELINE:

        def core(placed: Placed, value: torch.Tensor, *_: object, **__: object) -> Result:
            scale, causal = subject.layer.scale, subject.spec.causal
            return baseline.attend(placed.query, placed.key, value, scale=scale, causal=causal), None

        return subject.with_core(subject.layer, core), "bench/baseline.py"
    candidate = _candidate(name, subject.spec.problem, shared)
    if name in ("auto", "flash"):  # as a user would say it; the layer looks the rest up
        match = session.answer(subject.spec.problem, shared.device).match
        return subject.twin(name), f"{candidate} ({match})" if name == "auto" else str(candidate)
    return subject.twin(candidate), str(candidate)


def candidates(spec: Spec, shared: Shared) -> list[Candidate]:
    """Return what the columns of a row run, apart from the plain form and other libraries."""
    found = []
    for name in shared.backends:
        if name != BASELINE and name not in TRINIX:
            with contextlib.suppress(UnsupportedError):
                found.append(_candidate(name, spec.problem, shared))
    return found


def _candidate(name: str, problem: Problem, shared: Shared) -> Candidate:
    """Return what a column runs. Raises UnsupportedError for Triton where it cannot, or nothing of it is tuned."""
    if name == "sdpa":
        return Candidate("sdpa")
    answer, described = session.answer(problem, shared.device), shared.run.device
    if name == "auto":
        return answer.plan.forward
    if name == "flash":
        return best_known(answer, member(KERNEL_TYPES["flash"], problem, described))
    triton = backend_named("triton")
    reason = triton.supports(problem, described)
    if reason is not None:
        raise UnsupportedError(reason)
    if name == "triton_default":
        return triton.default(problem, described)
    candidate = best_known(answer, "triton")
    if not candidate.configs:
        raise UnsupportedError(f"nothing tuned is known of it: tilewise tune --problem {problem.key}")
    return candidate


def _plain_needs(spec: Spec) -> int:
    """Return about what the plain form allocates in a step: its scores, and copies of its heads."""
    element, training = TORCH_DTYPES[spec.dtype].itemsize, spec.pass_ is Pass.TRAINING
    tokens, dims = spec.batch * spec.seq_len, sum(spec.head_dims)
    copies = 3 * tokens * spec.heads * dims * element * (2 if training else 1)
    scores = baseline.needed_bytes(spec.batch, spec.heads, spec.seq_len, spec.seq_len, element, training=training)
    return scores + copies


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on `device`."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _product(spec: Spec, device: torch.device) -> Step:
    size, dtype = MATMUL_SIZE[device.type], TORCH_DTYPES[spec.dtype]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def step() -> object:
        with torch.inference_mode():
            return left @ right

    return step


def _rate(device: torch.device, times: list[float]) -> float:
    """Return TFLOP/s of the large product, by its median."""
    return 2 * MATMUL_SIZE[device.type] ** 3 / sorted(times)[len(times) // 2] / 1e9


def _interleaved(steps: dict[str, Step], shared: Shared, *, cores: bool = False) -> dict[str, list[float]]:
    """Return the times of each step. Cores come right after the layers, whose power state has settled."""
    order, clock, wanted = list(steps.values()), shared.clock, shared.num_runs
    if cores:
        wanted = min(wanted, CORE_ROUNDS)
    else:
        clock.settle(order)
    warm = clock.interleave(order, shared.warmup)
    if shared.row_seconds is not None and not cores:
        warm = warm if shared.warmup else clock.interleave(order, 1)
        once = sum(statistics.median(times) for times in warm) / 1e3
        wanted = min(wanted, max(LEAST_ROUNDS, int(shared.row_seconds / once)))
    return dict(zip(steps, clock.interleave(order, wanted), strict=True))


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
