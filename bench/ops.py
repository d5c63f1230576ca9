"""What a call costs beside its kernel, on the host: eager against the operators that compiled graphs hold.

python -m tilewise.bench.ops --output bench/results/ops_NAME.json

The backend here computes nothing: `kernel` is what it takes to make its results, which is what dispatch is measured
over. The cells of a row are called once a round, in random order, and in the last row after a matrix product that takes
the host's caches; the medians are in microseconds. `operator` is called by itself and arranges for its gradients; a
compiled graph has done that before, and `graph` is left.
"""

import argparse
import contextlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import tilewise.layers.ops  # noqa: F401
from tilewise.domain import codec
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.kernels import device as devices
from tilewise.kernels.backend import Backend, Gradients
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.call import Call
from tilewise.layers.attention import attention, prepare

SHAPE = (1, 8, 2, 16)
COLUMNS = ("kernel", "eager", "operator", "graph")
COLD = "inference, cold caches"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Median microseconds of one call by each of COLUMNS."""

    name: str
    medians: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `measure` found, and where."""

    device: Device
    software: Software
    rounds: int
    rows: tuple[Row, ...]


class _Nothing(Backend):
    """Results of the right shapes, and gradients, that nobody computed."""

    name = "nothing"
    has_backward = True
    gives_lse = True

    def supports(self, problem: Problem, device: Device) -> str | None:  # noqa: ARG002
        return None

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        batch, q_len, heads, _ = call.query.shape
        out = call.query.new_empty(batch, q_len, heads, call.value.shape[3])
        return out, call.query.new_empty((batch, heads, q_len), dtype=torch.float32)

    def backward(
        self,
        call: Call,
        out: torch.Tensor,  # noqa: ARG002
        lse: torch.Tensor,  # noqa: ARG002
        grad_out: torch.Tensor,  # noqa: ARG002
        candidate: Candidate,  # noqa: ARG002
    ) -> Gradients:
        return Gradients(torch.empty_like(call.query), torch.empty_like(call.key), torch.empty_like(call.value))


@contextlib.contextmanager
def _backend() -> Iterator[_Nothing]:
    backend = BACKENDS[_Nothing.name] = _Nothing()
    yield backend
    del BACKENDS[_Nothing.name]


def _cells(backend: _Nothing) -> dict[str, tuple[Callable[[], object], ...]]:
    """Return the calls of each row in the order of COLUMNS."""
    ops = torch.ops.tilewise
    query, key, value, grad_out = (torch.randn(SHAPE) for _ in range(4))
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    options = (True, None, "bshd", "ieee", False, backend.name, False, False)
    given = (*(None,) * 7, 0.0, 0.0, None, *options)
    call, _ = prepare(query, key, value, None, None, None, 0, 0.0, 0.0, None, options, False, False)

    def kernel() -> tuple[torch.Tensor, torch.Tensor]:
        return backend.forward(call, None)

    def kernels() -> object:
        return backend.backward(call, *kernel(), grad_out, Candidate(backend.name))

    def eager() -> torch.Tensor:
        out = attention(*leaves, causal=True, backend=backend.name)
        assert isinstance(out, torch.Tensor)
        return out

    def operator() -> torch.Tensor:
        out: torch.Tensor = ops.attention_forward(*leaves, *given, True, False)[0]
        return out

    @torch.no_grad()
    def graph() -> object:
        return ops.attention_forward(*leaves, *given, True, False)

    @torch.no_grad()
    def graphs() -> None:
        saved = ops.attention_forward(*leaves, *given, True, False)
        ops.attention_backward(grad_out, *saved, (True, True, True, False), *leaves, *given, True, False)

    def inference() -> object:
        return attention(query, key, value, causal=True, backend=backend.name)

    def inference_operator() -> object:
        return ops.attention(query, key, value, *given)

    inferences = (kernel, inference, inference_operator, inference_operator)
    return {
        "inference": inferences,
        "forward of training": (kernel, eager, operator, graph),
        "forward and backward": (
            kernels,
            lambda: torch.autograd.grad(eager(), leaves, grad_out),
            lambda: torch.autograd.grad(operator(), leaves, grad_out),
            graphs,
        ),
        COLD: inferences,
    }


def measure(rounds: int) -> Report:
    """Time every cell once a round, on the CPU with one thread, after a tenth of the rounds for warming up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with _backend() as backend:
        rows = tuple(
            Row(name=name, medians=_medians(calls, rounds, cold=name == COLD))
            for name, calls in _cells(backend).items()
        )
    torch.set_num_threads(before)
    described = devices.describe(torch.device("cpu"))
    return Report(
        device=described,
        software=devices.software(described.kind),
        rounds=rounds,
        rows=rows,
    )


def _medians(calls: Sequence[Callable[[], object]], rounds: int, *, cold: bool) -> tuple[float, ...]:
    """Return the median microseconds of each of `calls`; `cold`: each comes after a matrix product."""
    square = torch.randn(256, 256)
    times: list[list[int]] = [[] for _ in calls]
    cells = list(zip(calls, times, strict=True))
    order = random.Random(0)
    for round_ in range(-(rounds // 10), rounds):
        order.shuffle(cells)
        for call, taken in cells:
            if cold:
                torch.mm(square, square)
            start = time.perf_counter_ns()
            call()
            end = time.perf_counter_ns()
            if round_ >= 0:
                taken.append(end - start)
    return tuple(round(statistics.median(each) / 1000, 1) for each in times)


def table(report: Report) -> str:
    """Return the rows as text."""
    head = f"{'microseconds':22}" + "".join(f"{column:>10}" for column in COLUMNS)
    return "\n".join(
        [head, *(f"{row.name:22}" + "".join(f"{each:10.1f}" for each in row.medians) for row in report.rows)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=5000, help="calls of every cell (5000)")
    arguments = parser.parse_args()
    report = measure(arguments.rounds)
    arguments.output.write_text(json.dumps(codec.to_json(report), indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
