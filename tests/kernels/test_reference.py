"""The reference against loops over single numbers in float64, and its gradients against torch's numerical ones."""

import math
from dataclasses import replace

import pytest
import torch

from tilewise.domain.problem import Pass, Problem
from tilewise.kernels import reference
from tilewise.kernels.call import Call

from .cells import CELLS, call_of, doubled, problem_of

GRADIENT_CELLS = [
    "full", "causal, more queries", "gqa", "other value head_dim", "window to both sides, more queries",
    "alibi", "softcap", "bool", "bias.b1h1", "everything",
]  # fmt: skip


def naive(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of the operation, one score at a time, with Python's own arithmetic."""
    batch, q_len, heads, head_dim = call.query.shape
    kv_len, kv_heads, v_head_dim = call.value.shape[1:]
    left, right = call.problem.window or (-1, -1)
    out = torch.zeros(batch, q_len, heads, v_head_dim, dtype=torch.float64)
    lse = torch.full((batch, heads, q_len), -math.inf, dtype=torch.float64)
    query, key, value = call.query.tolist(), call.key.tolist(), call.value.tolist()
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            for i in range(q_len):
                scores = {}
                for j in range(kv_len):
                    gap = j - (i + kv_len - q_len)
                    if (call.problem.causal and gap > 0) or (left >= 0 and gap < -left) or (right >= 0 and gap > right):
                        continue
                    score = call.scale * math.fsum(query[b][i][h][d] * key[b][j][kv][d] for d in range(head_dim))
                    if call.softcap > 0:
                        score = call.softcap * math.tanh(score / call.softcap)
                    if call.alibi_slopes is not None:
                        slopes = call.alibi_slopes
                        slope = slopes[b, h] if slopes.dim() == 2 else slopes[h]
                        score -= float(slope) * abs(gap)
                    if call.mask is not None:
                        shape = (1,) * (4 - call.mask.dim()) + tuple(call.mask.shape)
                        at = tuple(min(index, size - 1) for index, size in zip((b, h, i, j), shape, strict=True))
                        element = call.mask.reshape(shape)[at]
                        if call.mask.dtype is torch.bool and not element:
                            continue
                        score += 0 if call.mask.dtype is torch.bool else float(element)
                    if score > -math.inf:
                        scores[j] = score
                if not scores:
                    continue
                peak = max(scores.values())
                total = math.fsum(math.exp(score - peak) for score in scores.values())
                lse[b, h, i] = peak + math.log(total)
                for d in range(v_head_dim):
                    out[b, i, h, d] = math.fsum(
                        math.exp(score - peak) * value[b][j][kv][d] / total for j, score in scores.items()
                    )
    return out, lse


def small(cell: str) -> Problem:
    """Return the cell's problem at sizes that loops in Python can do: half the lengths, head_dim 4."""
    problem = problem_of(cell)
    return replace(
        problem,
        q_len=(problem.q_len + 1) // 2,
        kv_len=(problem.kv_len + 1) // 2,
        head_dim=4,
        v_head_dim=4 if problem.v_head_dim == problem.head_dim else 3,
    )


@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_definition(cell: str) -> None:
    call = doubled(call_of(small(cell)))
    out, lse = reference.attention(call)
    expected, expected_lse = naive(call)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_cells_with_more_queries_than_keys_have_wholly_masked_rows() -> None:
    for cell in ("causal, more queries", "window to both sides, more queries", "bool"):
        _, lse = reference.attention(call_of(small(cell)))
        assert bool((lse == -torch.inf).any()), cell


def test_slopes_per_batch_entry() -> None:
    call = doubled(call_of(small("alibi")))
    slopes = torch.tensor([[0.5, 0.25], [0.125, 1.5]], dtype=torch.float64)
    call = replace(call, alibi_slopes=slopes)
    out, lse = reference.attention(call)
    expected, expected_lse = naive(call)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (10,), (10, 10), (2, 1, 10), (1, 2, 1, 10)])
def test_masks_of_fewer_dimensions(shape: tuple[int, ...]) -> None:
    call = replace(doubled(call_of(small("full"))), mask=torch.linspace(-1, 1, math.prod(shape)).reshape(shape))
    torch.testing.assert_close(reference.attention(call), naive(call), rtol=1e-12, atol=1e-12)


def test_minus_infinity_in_a_bias_masks() -> None:
    call = doubled(call_of(small("bias")))
    assert call.mask is not None
    mask = call.mask.clone()
    mask[0, :, 3] = -torch.inf
    mask[:, :, 5, 2:] = -torch.inf
    call = replace(call, mask=mask)
    out, lse = reference.attention(call)
    torch.testing.assert_close((out, lse), naive(call), rtol=1e-12, atol=1e-12)
    assert bool((out[0, 3] == 0).all())
    assert bool((lse[0, :, 3] == -torch.inf).all())


def test_half_precision_keeps_far_alibi_distances() -> None:
    # 1000 and 1001 are one number in bfloat16: the distance must not be rounded before it meets its slope
    problem = Problem(batch=1, heads=1, q_len=1, kv_len=1002, head_dim=16, alibi=True)
    call = call_of(problem)
    call = call.with_tensors(torch.zeros_like(call.query), call.key, call.value)
    _, lse = reference.attention(replace(call, alibi_slopes=torch.tensor([1.0])))
    assert float(lse) == pytest.approx(math.log((1 - math.exp(-1002)) / (1 - math.exp(-1))), abs=1e-12)


@pytest.mark.parametrize("cell", GRADIENT_CELLS)
def test_gradients_are_those_of_the_result(cell: str) -> None:
    problem = replace(small(cell), q_len=min(5, small(cell).q_len), kv_len=min(4, small(cell).kv_len))
    call = doubled(call_of(replace(problem, pass_=Pass.TRAINING)))
    leaves = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value)]

    def result(*tensors: torch.Tensor) -> torch.Tensor:
        return reference.attention(call.with_tensors(*tensors), needs_grad=True)[0]

    assert torch.autograd.gradcheck(result, leaves)
    out = result(*leaves)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(out, leaves, grad_out)
    for found, wanted in zip(reference.gradients(call, grad_out), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_leave_the_tensors_of_the_call_alone() -> None:
    call = doubled(call_of(small("causal")))
    reference.gradients(call, torch.ones_like(call.query))
    for tensor in (call.query, call.key, call.value):
        assert tensor.grad is None
        assert not tensor.requires_grad


def test_no_graph_without_needs_grad() -> None:
    call = doubled(call_of(small("full")))
    call = call.with_tensors(call.query.requires_grad_(), call.key, call.value)
    assert not reference.attention(call)[0].requires_grad
    assert reference.attention(call, needs_grad=True)[0].requires_grad
