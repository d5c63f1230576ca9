"""attention() with cu_seqlens: what it computes, what it refuses, and what it asks for."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

import tilewise
from tilewise.domain.answer import Answer
from tilewise.domain.errors import InputError
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels import reference
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import random_call
from tilewise.layers import session

from ..kernels.test_packed import CELLS, problem_of
from .conftest import Ran

CPU = torch.device("cpu")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def call_of(cell: str, **changes: Any) -> Call:
    return random_call(problem_of(cell, **changes), CPU, seed=0, empty=True)


def attend(call: Call, *tensors: torch.Tensor, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "cu_seqlens": call.cu_seqlens,
        "max_q": call.problem.q_len,
        "max_kv": call.problem.kv_len,
        "causal": call.problem.causal,
        "window": call.problem.window,
        "alibi_slopes": call.alibi_slopes,
        "softcap": call.softcap,
        **changes,
    }
    return tilewise.attention(*(tensors or (call.query, call.key, call.value)), **given)


@pytest.mark.parametrize("backend", ["auto", "plain", "cpu_tiled"])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_reference(cell: str, backend: str) -> None:
    call = call_of(cell)
    expected, expected_lse = reference.attention(call)
    out = attend(call, backend=backend)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    out, lse = attend(call, backend=backend, return_lse=True)
    assert (tuple(lse.shape), lse.dtype) == (tuple(expected_lse.shape), torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["auto", "plain", "cpu_tiled"])
@pytest.mark.parametrize("cell", ["causal", "causal, more queries", "gqa", "window to both sides", "alibi", "softcap"])
def test_gradients_equal_the_references(cell: str, backend: str) -> None:
    call = call_of(cell)
    leaves = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value)]
    out = attend(call, *leaves, backend=backend)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(out, leaves, grad_out)
    for gradient, expected in zip(found, reference.gradients(call, grad_out), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)


def test_slopes_of_each_sequence() -> None:
    call = call_of("alibi")
    slopes = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    expected, _ = reference.attention(Call(**{**_fields(call), "alibi_slopes": slopes}))
    torch.testing.assert_close(attend(call, alibi_slopes=slopes).double(), expected, rtol=2e-5, atol=2e-5)


def _fields(call: Call) -> dict[str, Any]:
    return {name: getattr(call, name) for name in Call.__slots__}


def test_dropout_is_the_same_for_the_same_seed() -> None:
    call = call_of("causal")
    first, again, other = (attend(call, dropout=0.3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_longest_may_be_left_to_look_up() -> None:
    call = call_of("causal, fewer queries")
    expected = attend(call)
    assert torch.equal(attend(call, max_q=None, max_kv=None), expected)
    assert torch.equal(attend(call, max_kv=None), expected)
    torch.testing.assert_close(attend(call, max_q=100, max_kv=200), expected)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that answers are looked up for."""
    found: list[Problem] = []
    client = session.client_for(CPU)
    answer = type(client).answer

    def recorded(self: Any, problem: Problem) -> Answer:
        found.append(problem)
        return answer(self, problem)

    monkeypatch.setattr(type(client), "answer", recorded)
    return found


def test_the_problem_that_is_looked_up(asked: list[Problem], ran: Ran) -> None:
    call = call_of("gqa")
    attend(call)
    assert asked == [call.problem]
    attend(call_of("gqa", q_len=37), scale=0.5)
    shorter = [tensor[: tensor.shape[0] - 3] for tensor in (call.query, call.key, call.value)]
    assert call.cu_seqlens is not None
    fewer = tuple(cu.clamp_max(tensor.shape[0]) for cu, tensor in zip(call.cu_seqlens, shorter[:2], strict=True))
    attend(call, *shorter, cu_seqlens=fewer)
    assert len(asked) == 1, "another number of rows is the same problem"
    leaves = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value)]
    attend(call, *leaves, max_q=50)
    assert (asked[1].pass_, asked[1].q_len) == (Pass.TRAINING, 50)
    assert [candidate.backend for candidate in ran] == ["sdpa"] * 4


@pytest.mark.parametrize("max_q", [1, 5, 16])
def test_few_queries_are_not_decoding(max_q: int, asked: list[Problem]) -> None:
    """Up to 16 queries, varlen would mean a number of keys per row of a batch."""
    query, key = torch.randn(2 * max_q, 2, 16), torch.randn(70, 2, 16)
    cu_seqlens = tuple(torch.tensor(edges, dtype=torch.int32) for edges in ([0, max_q, 2 * max_q], [0, 40, 70]))
    out = tilewise.attention(query, key, key, cu_seqlens=cu_seqlens, max_q=max_q, max_kv=40, causal=True)  # type: ignore[arg-type]
    assert isinstance(out, torch.Tensor)
    alone = tilewise.attention(query[None, max_q:], key[None, 40:], key[None, 40:], causal=True)
    assert isinstance(alone, torch.Tensor)
    torch.testing.assert_close(out[max_q:], alone[0], rtol=1e-5, atol=1e-5)
    assert asked[0].packed
    assert (asked[0].q_len, asked[0].kv_len) == (17, 40)


@pytest.mark.parametrize(
    ("q_lengths", "kv_lengths"), [([0], [0]), ([5], [0]), ([0, 0], [7, 0]), ([3, 0, 4], [0, 5, 4])]
)
def test_sequences_without_anything(q_lengths: list[int], kv_lengths: list[int]) -> None:
    cu_q, cu_kv = (torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (q_lengths, kv_lengths))
    query, key = torch.randn(sum(q_lengths), 2, 16), torch.randn(sum(kv_lengths), 2, 16)
    leaves = [tensor.requires_grad_() for tensor in (query, key, key.clone())]
    out = tilewise.attention(*leaves, cu_seqlens=(cu_q, cu_kv), max_q=max(q_lengths), max_kv=max(kv_lengths))
    assert isinstance(out, torch.Tensor)
    assert out.shape == query.shape
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert bool(gradient.isfinite().all())
    if kv_lengths[0] == 0:
        assert bool((out[: q_lengths[0]] == 0).all())


# what is refused


def malformed() -> list[tuple[str, dict[str, Any], str]]:
    def cu(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    good = cu(0, 3, 8)
    return [
        ("four dimensions", {"query": torch.ones(1, 8, 4, 16)}, r"3 dimensions \(total, heads, head_dim\), got query"),
        ("two dimensions", {"value": torch.ones(8, 2)}, r"3 dimensions .* value \(8, 2\)"),
        ("rows of value", {"value": torch.ones(7, 2, 16)}, r"same length and heads, got .* value \(7, 2, 16\)"),
        ("heads", {"query": torch.ones(8, 3, 16)}, r"of key heads, got 3 and 2 \(query \(8, 3, 16\)"),
        ("head_dim", {"query": torch.ones(8, 4, 8)}, r"same head_dim, got query \(8, 4, 8\)"),
        ("no heads", {"query": torch.ones(8, 0, 16)}, r"no empty dimension, got query \(8, 0, 16\)"),
        ("float64", {name: torch.ones(8, 2, 16).double() for name in ("query", "key", "value")}, "float32, got"),
        ("one tensor", {"cu_seqlens": good}, r"expected a tuple of two tensors \(cu_q, cu_kv\), got tensor"),
        ("three tensors", {"cu_seqlens": (good, good, good)}, r"cu_seqlens: expected a tuple of two tensors"),
        ("lists", {"cu_seqlens": ([0, 8], [0, 8])}, r"expected a tuple of two tensors .* got \(\[0, 8\], \[0, 8\]\)"),
        ("two batches", {"cu_seqlens": (good, cu(0, 8))}, r"one shape \(batch \+ 1,\) .* got \(3,\) and \(2,\)"),
        ("no sequence", {"cu_seqlens": (cu(0), cu(0))}, r"at least \(2,\), got \(1,\) and \(1,\)"),
        ("a matrix", {"cu_seqlens": (good[None], good[None])}, r"got \(1, 3\) and \(1, 3\)"),
        ("int64", {"cu_seqlens": (good, good.long())}, "cu_seqlens: expected int32 on cpu like query, got torch.int64"),
        ("another device", {"cu_seqlens": (good, good.to("meta"))}, "expected int32 on cpu .* on meta"),
        ("falling", {"cu_seqlens": (cu(0, 9, 8), good)}, r"of query: .* end at 8, .*, got \[0, 9, 8\]"),
        ("not from 0", {"cu_seqlens": (good, cu(1, 3, 8))}, r"of key and value: .* start at 0.*\[1, 3, 8\]"),
        ("short", {"cu_seqlens": (good, cu(0, 3, 7))}, r"of key and value: .* end at 8, .* got \[0, 3, 7\]"),
        ("longer", {"max_kv": 4}, r"no sequence longer than max_kv = 4, got one of 5; pass a larger max_kv"),
        ("falling, no max", {"max_q": None, "cu_seqlens": (cu(0, 9, 8), good)}, r"of query: .* got \[0, 9, 8\]"),
        ("negative max", {"max_q": -1}, r"max_q: expected the longest length of 2 sequences with 8 rows .* got -1"),
        ("too small for the rows", {"max_q": 3}, r"max_q: expected .* got 3"),
        ("max of another type", {"max_kv": 5.0}, r"max_kv: expected .* got 5.0"),
        ("mask", {"mask": torch.ones(8, 8, dtype=torch.bool)}, r"mask: expected none with cu_seqlens, got \(8, 8\)"),
        ("bhsd", {"layout": "bhsd"}, "layout: expected 'bshd' with cu_seqlens"),
        ("another layout", {"layout": "sbhd"}, "layout: expected 'bshd' with cu_seqlens"),
        ("slopes", {"alibi_slopes": torch.ones(3, 4)}, r"shape \(4,\) or \(2, 4\), got \(3, 4\)"),
        ("max alone", {"cu_seqlens": None, "max_kv": None}, "belong to cu_seqlens, got 5 and None without"),
        ("dtypes", {"key": torch.ones(8, 2, 16).half()}, "one dtype, got query torch.float32, key torch.float16"),
    ]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in malformed()], ids=[c[0] for c in malformed()])
def test_malformed_input(arguments: dict[str, Any], message: str, ran: Ran) -> None:
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    good: dict[str, Any] = {name: torch.ones(8, heads, 16) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    good |= {"cu_seqlens": (cu, cu), "max_q": 5, "max_kv": 5}
    tilewise.attention(**good)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            tilewise.attention(**{**good, **arguments})
    assert len(ran) == 1, "nothing is launched"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_values_on_a_gpu_are_looked_at_in_debug_mode_only(
    backend: str, monkeypatch: pytest.MonkeyPatch, no_waiting: Callable[[], AbstractContextManager[None]]
) -> None:
    problem = Problem(batch=3, heads=4, q_len=200, head_dim=64, dtype=Dtype.FP16, causal=True, varlen=True)
    call = random_call(problem, HERE, seed=0)
    expected, _ = reference.attention(call)
    out = attend(call, backend=backend, strict=True)
    with no_waiting():
        out = attend(call, backend=backend, strict=True)
    torch.testing.assert_close(out.double(), expected, rtol=6e-3, atol=6e-3)
    assert call.cu_seqlens is not None
    wrong = call.cu_seqlens[0].flip(0)
    monkeypatch.setenv("TILEWISE_DEBUG", "1")
    with pytest.raises(InputError, match="cu_seqlens of query: expected values that start at 0"):
        attend(call, cu_seqlens=(wrong, wrong))
