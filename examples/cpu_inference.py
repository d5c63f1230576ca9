"""Inference on a CPU: the same layers, with what was found to be fastest on this CPU.

    python examples/cpu_inference.py
    tilewise tune --device cpu --budget quick --problem \\
        inference.fp32.b1.h8.kv8.q2048.k2048.d64.causal.window256 && python examples/cpu_inference.py

Until something was tuned here, "auto" is torch's own choice; the first line says which it is.
"""

import argparse
import time

import torch

import tilewise
from tilewise.domain.problem import Dtype, Problem


@torch.inference_mode()
def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    head_dim = arguments.embed_dim // arguments.heads
    problem = Problem(
        batch=1, heads=arguments.heads, q_len=arguments.seq_len, head_dim=head_dim, dtype=Dtype.FP32, causal=True,
        window=(arguments.window, 0),
    )  # fmt: skip
    answer = tilewise.answer(problem, "cpu")
    print(f"auto runs {answer.plan} ({answer.match}) for {problem.key}")
    x = torch.randn(1, arguments.seq_len, arguments.embed_dim)
    results = []
    for kernel_type in ("pytorch", "sdpa", "auto"):
        torch.manual_seed(0)
        layer = tilewise.FastMultiHeadSelfAttention(
            arguments.embed_dim, arguments.heads, causal=True, sliding_window=arguments.window + 1,
            kernel_type=kernel_type,
        ).eval()  # fmt: skip
        results.append(layer(x))
        times = []
        for _ in range(arguments.runs):
            start = time.perf_counter()
            layer(x)
            times.append((time.perf_counter() - start) * 1e3)
        print(f"{kernel_type}: {sorted(times)[len(times) // 2]:.1f} ms")
    print(f"largest difference: {max(float((each - results[0]).abs().max()) for each in results):.1e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256, help="earlier positions that each position sees")
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
