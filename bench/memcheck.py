"""Runs one small case per kernel, at lengths and head_dims that divide by nothing, and checks what comes out.

    make memcheck

runs it under compute-sanitizer, which reports every access outside an allocation. PYTORCH_NO_CUDA_MEMORY_CACHING=1
gives every tensor an allocation of its own; torch's caching allocator would hide a read behind its end. By itself,
python -m tilewise.bench.memcheck, it only compares with the reference.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Pass, Problem
from tilewise.kernels import device as devices
from tilewise.kernels import reference
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import random_call
from tilewise.kernels.triton_kernels.common import dropout_mask
from tilewise.tuner.steps import GRADIENTS, results

TOLERANCE = 1e-2  # of the largest element, at least of 1: float16 after sums over 50 keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A candidate on one problem, and the kernels that it runs."""

    kernels: str
    problem: Problem
    candidate: Candidate
    dropout: float = 0.0


def cases(device: torch.device) -> Iterator[Case]:
    """Yield the cases that a device can run: those through TMA from sm_90 on, and in Triton's interpreter."""
    small = Problem(pass_=Pass.TRAINING, batch=2, heads=4, kv_heads=2, q_len=37, kv_len=53, head_dim=40, causal=True)
    described = devices.describe(device)
    for tma in (False, True) if described.capability == 0 or described.capability >= 90 else (False,):
        path = "TMA" if tma else "pointers"
        ours = _ours(tma, dkdv_tma=tma)
        yield Case(kernels=f"forward, delta, dkdv, dq by {path}", problem=small, candidate=ours)
        full = replace(small, causal=False)
        yield Case(kernels=f"keep_mask, dropout by {path}", problem=full, candidate=ours, dropout=0.25)
        for mask in ("bool", "bias.b1h1", "bias.h1q1", "bias.b1k1"):
            problem = replace(full, window=(20, 7), mask=mask, bias_grad=mask != "bool")
            kernels = f"{'mask' if mask == 'bool' else 'dbias'}: {mask} by {path}"
            # with a mask, dkdv has only the pointer path: backends.triton.tiles_of
            yield Case(kernels=kernels, problem=problem, candidate=_ours(tma, dkdv_tma=False))
    decoding = Problem(batch=3, heads=4, kv_heads=2, q_len=3, kv_len=173, head_dim=40, varlen=True)
    for page_size in (0, 16, 64):
        for splits in (1, 3):
            problem = replace(decoding, page_size=page_size)
            config = Config.of("triton_decode", block_n=32, num_splits=splits, num_warps=2, num_stages=3)
            kernels = (
                f"decode{', combine' if splits > 1 else ''}: {f'pages of {page_size}' if page_size else 'contiguous'}"
            )
            yield Case(kernels=kernels, problem=problem, candidate=Candidate.of("triton_decode", forward=config))


def _ours(tma: bool, *, dkdv_tma: bool) -> Candidate:
    values: dict[str, Any] = {"block_m": 32, "block_n": 32, "num_warps": 2, "num_stages": 2}
    paths = {"forward": tma, "dkdv": dkdv_tma, "dq": tma}
    return Candidate.of(
        "triton", **{role: Config.of(f"triton_{role}", **values, tma=path) for role, path in paths.items()}
    )


def worst(case: Case, device: torch.device) -> float:
    """Run a case; return its largest error as a share of the largest element (at least 1), infinity for NaN."""
    call: Call = replace(random_call(case.problem, device, seed=0), dropout=case.dropout, seed=7)
    generator = torch.Generator(device).manual_seed(1)
    shape = (*call.query.shape[:3], call.value.shape[-1])
    grad_out = torch.randn(shape, generator=generator, device=device, dtype=call.query.dtype)
    keep = dropout_mask(call) if case.dropout else None
    out, lse = reference.attention(call, keep=keep)
    expected = {"out": out, "lse": lse}
    if case.problem.pass_ is Pass.TRAINING:
        expected |= zip(GRADIENTS, reference.gradients(call, grad_out, keep=keep), strict=False)
    found = results(call, case.candidate, grad_out)
    return max(_error(found[name], expected[name]) for name in expected)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    difference = (found.double() - expected).masked_fill(~finite, 0).abs().max()
    return float(difference / expected.masked_fill(~finite, 0).abs().max().clamp(min=1))


def main() -> None:
    device = devices.select()
    failed = 0
    for case in cases(device):
        error = worst(case, device)
        failed += not error <= TOLERANCE
        print(f"{'ok' if error <= TOLERANCE else 'WRONG'}  {error:.1e}  {case.kernels}  {case.problem.key}", flush=True)
    if failed:
        sys.exit(f"{failed} cases are off by more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
