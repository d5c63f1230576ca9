"""Forward and backward of the Triton kernels in every cell of masks and score modifications, against float64.

Interpreted on a CPU, compiled on a GPU; the pointer path and TMA, float32 and float16.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels import reference
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import random_call
from tilewise.kernels.run import run
from tilewise.kernels.triton_kernels.common import dropout_mask
from tilewise.tuner.correctness import poisoned_empty

from .cells import CELLS, TOLERANCE, assert_right, cells, problem_of
from .test_triton import HERE, can_use_tma

PATHS = [False, True] if can_use_tma() else [False]


def candidate(
    block_m: int, block_n: int, *, tma: bool, in_registers: bool = False, one_loop: bool = False
) -> Candidate:
    """Return one config for all roles; tiles of 16 see every border at these sizes."""
    values: dict[str, Any] = {"block_m": block_m, "block_n": block_n, "num_warps": 1, "num_stages": 1}
    values |= {"tma": tma, "in_registers": in_registers}
    gradients = {role: Config.of(f"triton_{role}", **values) for role in ("dkdv", "dq")}
    return Candidate.of("triton", forward=Config.of("triton_forward", **values, one_loop=one_loop), **gradients)


def gradients_of(call: Call, chosen: Candidate, grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return result, then gradients as reference.gradients does, on memory full of NaN."""
    leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
    call = call.with_tensors(*leaves)
    if call.problem.bias_grad:
        assert call.mask is not None
        leaves.append(call.mask.detach().requires_grad_())
        call = replace(call, mask=leaves[-1])
    with poisoned_empty():
        out, _ = run(call, chosen)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def assert_gradients(call: Call, chosen: Candidate, *, keep: torch.Tensor | None = None) -> None:
    generator = torch.Generator(HERE).manual_seed(9)
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    grad_out = torch.randn(shape, generator=generator, device=HERE, dtype=call.query.dtype)
    out, *found = gradients_of(call, chosen, grad_out)
    expected_out, _ = reference.attention(call, keep=keep)
    expected = reference.gradients(call, grad_out, keep=keep)
    assert len(found) == len(expected)
    allowed = TOLERANCE[call.query.dtype] * (2 if call.problem.bias_grad else 1)
    for mine, theirs in zip((out, *found), (expected_out, *expected), strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(mine.double(), theirs, rtol=allowed, atol=allowed * scale)


@pytest.mark.parametrize("tma", PATHS)
@cells()
def test_forward(cell: str, tma: bool) -> None:
    call = random_call(problem_of(cell), HERE, seed=1)
    chosen = candidate(16, 16, tma=tma)
    with poisoned_empty():
        assert_right(call, *run(call, chosen))


@pytest.mark.parametrize("tma", PATHS)
@cells()
def test_gradients(cell: str, tma: bool) -> None:
    problem = problem_of(cell, pass_=Pass.TRAINING, bias_grad=str(CELLS[cell].get("mask", "")).startswith("bias"))
    assert_gradients(random_call(problem, HERE, seed=2), candidate(16, 16, tma=tma))


@pytest.mark.parametrize("cell", ["causal, fewer queries", "gqa", "window to both sides", "everything", "bias.b1h1"])
@pytest.mark.parametrize("blocks", [(16, 32), (32, 16), (64, 64)])
def test_gradients_with_other_tiles_in_half_precision(cell: str, blocks: tuple[int, int]) -> None:
    problem = problem_of(
        cell,
        pass_=Pass.TRAINING,
        dtype=Dtype.FP16,
        head_dim=40,
        v_head_dim=24,
        bias_grad="mask" in CELLS[cell],
        **{"q_len": 45, "kv_len": 37},
    )
    assert_gradients(random_call(problem, HERE, seed=3), candidate(*blocks, tma=PATHS[-1]))


@pytest.mark.parametrize("tma", PATHS)
def test_dropout_drops_the_same_weights_forward_and_backward(tma: bool) -> None:
    problem = problem_of("gqa", pass_=Pass.TRAINING, dropout=False, q_len=37, kv_len=45)
    call = replace(random_call(problem, HERE, seed=4), dropout=0.25, seed=2**61 + 3)
    assert_gradients(call, candidate(16, 32, tma=tma), keep=dropout_mask(call))


def test_the_dropout_mask_is_as_random_as_it_should_be() -> None:
    problem = Problem(batch=2, heads=2, q_len=96, head_dim=16)
    call = replace(random_call(problem, HERE, seed=5), dropout=0.3, seed=7)
    keep = dropout_mask(call)
    assert torch.equal(keep, dropout_mask(call))
    other = dropout_mask(replace(call, seed=8))
    count = keep.numel()
    # five standard deviations of a binomial
    assert abs(float(keep.double().mean()) - 0.7) < 5 * (0.21 / count) ** 0.5
    assert abs(float((keep & other).double().mean()) - 0.49) < 5 * (0.25 / count) ** 0.5
    for dimension in range(4):
        shifted = keep & keep.roll(1, dimension)
        assert abs(float(shifted.double().mean()) - 0.49) < 5 * (0.25 / count) ** 0.5


def test_gradients_are_the_same_bits_every_time() -> None:
    call = random_call(problem_of("everything", pass_=Pass.TRAINING, bias_grad=True), HERE, seed=6)
    grad_out = torch.ones(*call.query.shape[:3], call.value.shape[-1], device=HERE)
    first, second = (gradients_of(call, candidate(16, 16, tma=False), grad_out) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
