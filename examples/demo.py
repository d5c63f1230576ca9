"""The whole path once: tune two problems on this machine, keep them, serve them, and run a layer with the answers.

    python examples/demo.py                          about two minutes on two CPU cores
    python examples/demo.py --seq-len 256 --seconds 3

Everything goes to .demo/ beside this repository; a second run takes the trials over and only holds the finals again.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import tilewise
from tilewise.cli.console import out, print_table
from tilewise.cli.progress import watching
from tilewise.db.session import Database
from tilewise.domain.answer import Answer
from tilewise.domain.device import DeviceKind
from tilewise.domain.job import BUDGETS
from tilewise.domain.models import ModelShape
from tilewise.domain.problem import Dtype, Problem
from tilewise.kernels import device as devices
from tilewise.kernels import reference
from tilewise.kernels.call import Call
from tilewise.tuner.tune import tune

CPU = (ModelShape(name="demo", hidden=512, heads=8, kv_heads=8, seq_len=2048, batch=1), Dtype.FP32, 256)
GPU = (ModelShape(name="demo", hidden=4096, heads=32, kv_heads=32, seq_len=4096, batch=1), Dtype.FP16, 1024)
TORCH_DTYPES = {Dtype.FP32: torch.float32, Dtype.FP16: torch.float16}


def main() -> None:
    arguments = parse()
    where = devices.select(arguments.device)
    kind = devices.describe(where).kind
    shape, dtype, window = GPU if kind is DeviceKind.CUDA else CPU
    if arguments.seq_len:
        shape = replace(shape, seq_len=arguments.seq_len)
        window = min(window, arguments.seq_len // 8)
    causal = shape.problem(dtype=dtype)
    problems = [causal, replace(causal, window=(window, 0))]
    budget = replace(BUDGETS["quick"], trials=40, seconds=arguments.seconds)

    arguments.folder.mkdir(parents=True, exist_ok=True)
    url = f"sqlite:///{arguments.folder / 'tilewise.db'}"
    with Database.open(url, upgrade=True) as database:
        for number, problem in enumerate(problems, 1):
            with watching(f"[{number}/{len(problems)}] {problem.key}") as report:
                tune(problem, device=where, database=database, budget=budget, report=report)

    with service(url) as address:
        out.print(f"the service at {address} has the answers; asking it as a training job does", markup=False)
        tilewise.configure(source=address)
        tilewise.ready(timeout=10, device=where)
        answers = [tilewise.answer(problem, where) for problem in problems]
    rows = [row(answer, layer_errors(shape, answer.problem, where)) for answer in answers]
    print_table("", ("problem", "default ms", "best ms", "speed-up", "backend", "config", "trials", "error"), rows)
    for answer in answers:
        if answer.evidence is not None:
            out.print(f"{answer.problem.key}: {answer.evidence.reason}", markup=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--seconds", type=float, default=25.0, help="seconds of search per problem")
    parser.add_argument("--seq-len", type=int, default=0, help="a shorter sequence, for a quick look")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / ".demo")
    return parser.parse_args()


@contextmanager
def service(url: str) -> Iterator[str]:
    """Run `tilewise serve` on a free port; yield its address."""
    command = [sys.executable, "-m", "tilewise.cli.main", "serve", "--port", "0", "--db", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            address = next((word for word in said if word.startswith("http")), None)
            if address is None:
                raise SystemExit("the service did not start; its own message stands above")
            yield address
        finally:
            process.terminate()


def layer_errors(shape: ModelShape, problem: Problem, device: torch.device) -> tuple[float, float]:
    """Return the largest error of the layer against float64, with torch's default and with the answer."""
    torch.manual_seed(0)
    window = problem.window[0] + 1 if problem.window else None
    dtype = TORCH_DTYPES[problem.dtype]
    layer = tilewise.FastMultiHeadSelfAttention(
        shape.hidden, shape.heads, causal=True, sliding_window=window, device=device, dtype=dtype
    )
    x = torch.randn(shape.batch, shape.seq_len, shape.hidden, device=device, dtype=dtype)
    with torch.no_grad():
        expected = exact(layer, x, problem)
        found = []
        for kernel_type in ("sdpa", "auto"):
            layer.kernel_type = kernel_type
            found.append(float((layer(x).double() - expected).abs().max()))
    return found[0], found[1]


def exact(layer: tilewise.FastMultiHeadSelfAttention, x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Return what the layer computes, in float64."""
    qkv = torch.nn.functional.linear(x.double(), layer.qkv_proj.weight.double(), layer.qkv_proj.bias.double())
    query, key, value = qkv.view(*x.shape[:2], 3, layer.num_heads, layer.head_dim).unbind(2)
    out, _ = reference.attention(Call(problem, query, key, value, scale=layer.head_dim**-0.5))
    return torch.nn.functional.linear(out.flatten(2), layer.o_proj.weight.double(), layer.o_proj.bias.double())


def row(answer: Answer, errors: tuple[float, float]) -> tuple[str, ...]:
    return (
        answer.problem.key,
        f"{answer.baseline_ms:.2f}",
        f"{answer.expected_ms:.2f}",
        f"{answer.speedup:.2f}x",
        answer.plan.forward.backend,
        str(answer.plan.forward.config() or "-"),
        str(answer.evidence.trials if answer.evidence else 0),
        f"{errors[1]:.1e} (default {errors[0]:.1e})",
    )


if __name__ == "__main__":
    main()
