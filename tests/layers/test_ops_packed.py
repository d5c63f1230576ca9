"""Packed sequences under torch.compile."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tilewise.domain.errors import InputError
from tilewise.layers.attention import attention

from .graphs import (
    CPU,
    CUDA,
    assert_same,
    compiled,
    first,
    gradients,
    ops,
    tolerance,
)
from .test_attention import QKV

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def packed(device: torch.device = CPU, totals: tuple[int, int] = (29, 40)) -> tuple[QKV, dict[str, Any]]:
    """Query, key and value of three sequences, one of which has no keys, and what `attention` takes with them."""
    q_len, kv_len = totals
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(rows, heads, 16, generator=generator).to(device, dtype)
        for rows, heads in ((q_len, 4), (kv_len, 2), (kv_len, 2))
    )
    cu_q, cu_kv = (
        torch.tensor(edges, dtype=torch.int32, device=device) for edges in ((0, 7, 9, q_len), (0, 20, 20, kv_len))
    )
    return (query, key, value), {"cu_seqlens": (cu_q, cu_kv), "max_q": 64, "max_kv": 64}


def packed_is_a_proper_operator(backend: str, device: torch.device, **options: Any) -> None:
    (query, key, value), given = packed(device)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    dropout = options.get("dropout", 0.0)
    seed = torch.tensor(3) if dropout else None
    tail = (0.0, dropout, None, True, None, "bshd", "ieee", False, backend, True, True)
    call = (*leaves, None, None, *given["cu_seqlens"], seed, given["max_q"], given["max_kv"], *tail)
    torch.library.opcheck(ops.attention_forward.default, (*call, True, False), **tolerance(call))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_what_torch_demands_of_packed_sequences(backend: str, dropout: float) -> None:
    packed_is_a_proper_operator(backend, CPU, dropout=dropout)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_torch_demands_of_packed_sequences_on_a_gpu(backend: str, dropout: float) -> None:
    packed_is_a_proper_operator(backend, CUDA, dropout=dropout)


@pytest.mark.parametrize("longest", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "plain", "cpu_tiled"])
def test_packed_sequences_equal_eager(backend: str, longest: bool) -> None:
    tensors_, given = packed()
    if not longest:
        del given["max_q"], given["max_kv"]
    call: Callable[..., Any] = functools.partial(attention, causal=True, backend=backend, **given)
    assert_same(gradients(compiled(call), *tensors_), gradients(call, *tensors_))
    with_lse = functools.partial(call, backend="plain", return_lse=True)
    torch.testing.assert_close(compiled(with_lse)(*tensors_), with_lse(*tensors_))


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_packed_sequences_with_dropout(backend: str) -> None:
    tensors_, given = packed()
    call: Callable[..., Any] = functools.partial(attention, backend=backend, dropout=0.5, seed=3, **given)
    assert_same(gradients(compiled(call), *tensors_), gradients(call, *tensors_))


def test_one_graph_for_all_totals() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(functools.partial(attention, causal=True), counter)
    for totals in ((29, 40), (33, 41), (60, 57)):
        tensors_, given = packed(totals=totals)
        for tensor in tensors_:
            torch._dynamo.mark_dynamic(tensor, 0)
        leaf = tensors_[0].requires_grad_()
        step(*tensors_, **given).sum().backward()
        (expected,) = torch.autograd.grad(first(attention(*tensors_, causal=True, **given)).sum(), leaf)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, expected)
    assert counter.frame_count == 1


def test_packed_sequences_that_are_refused() -> None:
    tensors_, given = packed()
    with pytest.raises(RuntimeError, match="mask: expected none with cu_seqlens"):
        compiled(functools.partial(attention, mask=torch.ones(1, 1), **given))(*tensors_)
    with pytest.raises(InputError, match="cu_seqlens of query: expected no sequence longer than max_q = 16"):
        compiled(functools.partial(attention, **{**given, "max_q": 16}))(*tensors_)
