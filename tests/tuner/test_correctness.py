"""The checker accepts what is right and catches every planted mistake."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tilewise.domain import codec
from tilewise.domain.config import Candidate
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels.backends import supporting
from tilewise.kernels.call import Call
from tilewise.kernels.device import describe
from tilewise.kernels.inputs import random_call
from tilewise.tuner.correctness import HOPELESS, Checker, poisoned_empty

from .fakes import CPU, register, right

FAKE = Candidate("fake")
CAUSAL = Problem(batch=2, heads=4, kv_heads=2, q_len=48, head_dim=16, dtype=Dtype.FP32, causal=True)
Result = tuple[torch.Tensor, torch.Tensor | None]


def worst(problem: Problem) -> float:
    return Checker(problem, CPU, seed=0).check(FAKE).worst


# what must be caught


def one_wrong_element(call: Call) -> Result:
    out, lse = right(call)
    wrong = out.clone()
    wrong[-1, -1, -1, -1] += 1e-3
    return wrong, lse


def without_the_last_key(call: Call) -> Result:
    # the score of the last key is -inf wherever there is another
    mask = torch.ones(call.problem.kv_len, dtype=torch.bool)
    mask[-1] = False
    return right(replace(call, mask=mask))


def unwritten_rows(call: Call) -> Result:
    out, lse = right(call)
    written = out.new_empty(out.shape)
    written[:, :-1] = out[:, :-1]
    return written, lse


def unwritten_lse(call: Call) -> Result:
    out, lse = right(call)
    return out, lse.new_empty(lse.shape)


def nan(call: Call) -> Result:
    out, lse = right(call)
    return torch.where(torch.arange(out.shape[-1]) == 3, torch.nan, out), lse


def infinite(call: Call) -> Result:
    out, lse = right(call)
    return torch.where(torch.arange(out.shape[-1]) == 3, torch.inf, out), lse


def another_scale(call: Call) -> Result:
    return right(replace(call, scale=call.scale * 1.001))


def stale_by_address(call: Call) -> Result:
    """What was given for tensors in the same place, whatever they hold by now."""
    return _kept.setdefault((call.query.data_ptr(), call.value.data_ptr()), right(call))


_kept: dict[tuple[int, int], Result] = {}


def in_another_dtype(call: Call) -> Result:
    out, lse = right(call)
    return out.double(), lse


def not_causal(call: Call) -> Result:
    return right(replace(call, problem=replace(call.problem, causal=False, window=None)))


def aligned_top_left(call: Call) -> Result:
    rows, columns = torch.arange(call.problem.q_len), torch.arange(call.problem.kv_len)
    problem = replace(call.problem, causal=False, window=None)
    return right(replace(call, problem=problem, mask=columns <= rows[:, None]))


def lse_in_base_two(call: Call) -> Result:
    out, lse = right(call)
    return out, lse * 1.4427


def lse_off_in_one_row(call: Call) -> Result:
    out, lse = right(call)
    wrong = lse.clone()
    wrong[0, 0, -1] += 1e-3
    return out, wrong


def lse_nan_where_nothing_is_attended(call: Call) -> Result:
    out, lse = right(call)
    return out, lse.masked_fill(lse == -torch.inf, torch.nan)


def lse_positive_infinity(call: Call) -> Result:
    out, lse = right(call)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def lse_finite_where_nothing_is_attended(call: Call) -> Result:
    out, lse = right(call)
    return out, lse.masked_fill(lse == -torch.inf, -1e30)


def average_where_nothing_is_attended(call: Call) -> Result:
    out, lse = right(call)
    empty = (lse == -torch.inf).transpose(1, 2).unsqueeze(-1)
    return torch.where(empty, call.value.mean(), out), lse


def heads_swapped(call: Call) -> Result:
    out, lse = right(call)
    return out.flip(2), lse


def another_shape(call: Call) -> Result:
    out, lse = right(call)
    return out[:, :, :, :-1], lse


@pytest.mark.parametrize(
    "planted",
    [
        one_wrong_element, without_the_last_key, unwritten_rows, unwritten_lse, nan, infinite, another_scale,
        not_causal, stale_by_address, in_another_dtype,
        aligned_top_left, lse_in_base_two, lse_off_in_one_row, lse_nan_where_nothing_is_attended, lse_positive_infinity,
        lse_finite_where_nothing_is_attended, average_where_nothing_is_attended, heads_swapped, another_shape,
    ],
)  # fmt: skip
def test_catches(planted: Callable[[Call], Result], monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, planted)
    error = Checker(CAUSAL, CPU, seed=0).check(FAKE)
    assert error.worst > 1, error
    # the database takes no infinity and no NaN
    assert codec.canonical(error)


@pytest.mark.parametrize("dtype", [Dtype.FP16, Dtype.BF16])
@pytest.mark.parametrize("planted", [without_the_last_key, not_causal, nan, heads_swapped])
def test_catches_in_half_precision(
    planted: Callable[[Call], Result], dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, planted)
    assert worst(replace(CAUSAL, dtype=dtype)) > 1


def test_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, lse_nan_where_nothing_is_attended)
    error = Checker(CAUSAL, CPU, seed=0).check(FAKE)
    assert (error.worst, error.tensor, error.case) == (HOPELESS, "lse", "masked rows")


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is 1% too large."""

    @staticmethod
    def forward(ctx: object, tensor: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return tensor.clone()

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return grads[0] * 1.01


@pytest.mark.parametrize("wrong", ["query", "key", "value"])
def test_catches_a_wrong_gradient(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(call: Call) -> Result:
        tensors = {"query": call.query, "key": call.key, "value": call.value}
        changed: torch.Tensor = WrongGradient.apply(tensors[wrong])
        return right(call.with_tensors(**{**tensors, wrong: changed}))

    register(monkeypatch, planted)
    error = Checker(replace(CAUSAL, pass_=Pass.TRAINING), CPU, seed=0).check(FAKE)
    assert error.worst > 1
    assert error.tensor == f"d_{wrong}"


def test_catches_a_wrong_gradient_of_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(call: Call) -> Result:
        return right(replace(call, mask=WrongGradient.apply(call.mask)))

    problem = replace(CAUSAL, pass_=Pass.TRAINING, mask="bias.b1h1", bias_grad=True)
    register(monkeypatch, right)
    assert worst(problem) <= 1
    register(monkeypatch, planted)
    error = Checker(problem, CPU, seed=0).check(FAKE)
    assert error.worst > 1
    assert error.tensor == "d_mask"


# what must be accepted

KINDS = [
    CAUSAL,
    replace(CAUSAL, causal=False),
    replace(CAUSAL, causal=False, window=(5, 3)),
    replace(CAUSAL, window=(7, 0), q_len=20),
    replace(CAUSAL, q_len=1, kv_len=40),
    replace(CAUSAL, q_len=300, kv_len=300, heads=2, batch=1),
    replace(CAUSAL, mask="bool"),
    replace(CAUSAL, mask="bias.h1", causal=False),
    replace(CAUSAL, alibi=True),
    replace(CAUSAL, softcap=True),
    replace(CAUSAL, v_head_dim=8),
]


@pytest.mark.parametrize("pass_", list(Pass))
@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("problem", KINDS, ids=lambda problem: problem.key)
def test_accepts_every_backend_of_a_cpu(problem: Problem, dtype: Dtype, pass_: Pass) -> None:
    problem = replace(problem, dtype=dtype, pass_=pass_)
    checker = Checker(problem, CPU, seed=0)
    for backend in supporting(problem, describe(CPU)):
        error = checker.check(Candidate(backend.name))
        assert error.worst <= 1, f"{backend.name}: {error}"


PACKED = replace(CAUSAL, varlen=True, batch=3, q_len=40)


@pytest.mark.parametrize("pass_", list(Pass))
@pytest.mark.parametrize("problem", [PACKED, replace(PACKED, causal=False, window=(5, 3), alibi=True, kv_len=60)])
def test_accepts_packed_sequences(problem: Problem, pass_: Pass) -> None:
    problem = replace(problem, pass_=pass_)
    checker = Checker(problem, CPU, seed=0)
    named = [backend.name for backend in supporting(problem, describe(CPU)) if not backend.compile_seconds]
    assert {"sdpa", "sdpa_math", "plain"} <= set(named)
    for name in named:
        error = checker.check(Candidate(name))
        assert error.worst <= 1, f"{name}: {error}"


def another_sequences_keys(call: Call) -> Result:
    assert call.cu_seqlens is not None
    cu_q, cu_kv = call.cu_seqlens
    return right(replace(call, cu_seqlens=(cu_q, (cu_kv + 1).clamp_max(int(cu_kv[-1])))))


def one_diagonal_for_all(call: Call) -> Result:
    assert call.cu_seqlens is not None
    cu_q, _ = call.cu_seqlens
    return right(replace(call, cu_seqlens=(cu_q, cu_q.clamp_max(call.key.shape[0]))))


def unwritten_empty_sequences(call: Call) -> Result:
    out, lse = right(call)
    return torch.where((lse == -torch.inf).T[..., None], out.new_empty(out.shape), out), lse


@pytest.mark.parametrize("planted", [another_sequences_keys, one_diagonal_for_all, unwritten_empty_sequences])
def test_catches_in_packed_sequences(planted: Callable[[Call], Result], monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, planted)
    assert worst(replace(PACKED, causal=False, kv_len=30)) > 1


def test_accepts_a_backend_without_an_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, lambda call: (right(call)[0], None))
    assert worst(CAUSAL) <= 1


# its cases


def lengths(problem: Problem) -> dict[str, tuple[int, int]]:
    cases = Checker(problem, CPU, seed=0).cases
    return {case.name: (case.call.problem.q_len, case.call.problem.kv_len) for case in cases}


def test_the_cases() -> None:
    long = replace(CAUSAL, batch=1, heads=1, kv_heads=1, q_len=256, kv_len=256)
    assert lengths(long) == {"problem": (256, 256), "ragged": (211, 173), "equal": (173, 173)}
    assert lengths(CAUSAL) == {"problem": (48, 48), "masked rows": (48, 38)}
    assert lengths(replace(CAUSAL, causal=False)) == {"problem": (48, 48)}
    assert lengths(replace(CAUSAL, q_len=1, kv_len=200)) == {"problem": (1, 200), "ragged": (1, 173)}
    assert lengths(replace(CAUSAL, q_len=16, kv_len=200)) == {
        "problem": (16, 200),
        "ragged": (16, 173),
        "masked rows": (16, 12),
    }


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_some_case_has_sequences_without_queries_or_keys(batch: int) -> None:
    first, *small = Checker(replace(PACKED, batch=batch), CPU, seed=0).cases
    assert first.call.cu_seqlens is not None
    assert all(bool((cu.diff() >= 10).all()) for cu in first.call.cu_seqlens), "what is timed has none"
    for case in small:
        assert case.call.cu_seqlens is not None
        lengths = {
            tuple(bool(length) for length in pair)
            for pair in zip(*(cu.diff() for cu in case.call.cu_seqlens), strict=True)
        }
        assert lengths == {(True, True), (False, True), (True, False), (False, False)}
    assert small


@pytest.mark.parametrize("problem", [CAUSAL, replace(CAUSAL, window=(4, 0)), replace(CAUSAL, q_len=16, kv_len=200)])
def test_some_case_has_wholly_masked_rows(problem: Problem) -> None:
    cases = Checker(problem, CPU, seed=0).cases
    assert any(bool((case.bounds["lse"].reference == -torch.inf).any()) for case in cases)


@pytest.mark.parametrize("mask", ["bool", "bool.b1h1", "bias", "bias.b1h1"])
def test_masks_hide_whole_rows_and_first_tiles(mask: str) -> None:
    """In every case; the first tile of 128 keys, where there are so many, for a whole tile of queries too."""
    problem = replace(CAUSAL, causal=False, mask=mask, batch=1, heads=2, kv_heads=2, q_len=300, kv_len=300)
    cases = Checker(problem, CPU, seed=0).cases
    assert [case.call.problem.kv_len for case in cases] == [300, 173, 173]
    for case in cases:
        assert case.call.mask is not None
        attends = case.call.mask if case.call.mask_is_bool else case.call.mask > -torch.inf
        empty, first = (~attends).all(-1), (~attends[..., :128]).all(-1)
        assert bool(empty[:, :, 7::8].all())
        assert not bool(empty.all())
        block = slice(case.call.problem.q_len // 2, case.call.problem.q_len * 3 // 4)
        assert bool(first[:, :, block].all())
        assert bool((first & ~empty)[:, :, block].any())
        assert bool((first & ~empty)[:, :, 3].all())


@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_a_mask_of_the_keys_hides_first_tiles_and_a_whole_entry(kind: str) -> None:
    problem = replace(CAUSAL, causal=False, mask=f"{kind}.h1q1", kv_len=300)
    mask = random_call(problem, CPU, seed=0).mask
    assert mask is not None
    attends = mask if kind == "bool" else mask > -torch.inf
    assert not bool(attends[0, ..., :150].any())
    assert bool(attends[0, ..., 150:].any())
    assert not bool(attends[1].any())


@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_a_mask_of_one_element_attends(kind: str) -> None:
    mask = random_call(replace(CAUSAL, mask=f"{kind}.b1h1q1k1"), CPU, seed=0).mask
    assert mask is not None
    assert bool((mask if kind == "bool" else mask.isfinite()).all())


@pytest.mark.parametrize("mask", ["bool", "bias.b1h1", "bias.h1q1"])
def test_what_nothing_attends_has_no_gradient(mask: str) -> None:
    problem = replace(CAUSAL, pass_=Pass.TRAINING, mask=mask, bias_grad=mask.startswith("bias"))
    for case in Checker(problem, CPU, seed=0).cases:
        expected = {name: bound.reference for name, bound in case.bounds.items()}
        assert all(bool(expected[name].isfinite().all()) for name in expected if name != "lse")
        empty = (expected["lse"] == -torch.inf).transpose(1, 2)
        assert bool(empty.any())
        assert bool((expected["d_query"][empty] == 0).all())
        if problem.bias_grad:
            assert case.call.mask is not None
            assert bool((expected["d_mask"][case.call.mask == -torch.inf] == 0).all())


def test_a_case_that_a_backend_does_not_support_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's flash kernel takes causal problems of equal lengths only, and must still be measured on them."""
    backend = register(monkeypatch, right)
    seen: list[tuple[int, int]] = []

    def equal_only(problem: Problem, _: object) -> str | None:
        return None if problem.q_len == problem.kv_len else "takes equal lengths"

    def spy(call: Call) -> Result:
        seen.append((call.problem.q_len, call.problem.kv_len))
        return right(call)

    monkeypatch.setattr(backend, "supports", equal_only)
    monkeypatch.setattr(backend, "computes", spy)
    problem = replace(CAUSAL, batch=1, heads=1, kv_heads=1, q_len=256, kv_len=256)
    assert worst(problem) <= 1
    assert seen == [(256, 256), (256, 256), (173, 173)]  # the problem itself with values of both signs


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, same, other = (Checker(CAUSAL, CPU, seed=seed).main.call for seed in (0, 0, 1))
    assert torch.equal(first.query, same.query)
    assert not torch.equal(first.query, other.query)


# poisoned memory


def test_poisoned_memory_is_full_of_nan_and_only_within() -> None:
    filling: Any = torch.utils.deterministic

    def state() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            filling.fill_uninitialized_memory,
        )

    before = state()
    with poisoned_empty():
        assert bool(torch.empty(100).isnan().all())
        assert bool(torch.ones(2).new_empty(3, 4).isnan().all())
        assert bool(torch.empty_like(torch.ones(5, dtype=torch.bfloat16)).isnan().all())
    assert state() == before


@pytest.mark.parametrize("warn_only", [True, False])
def test_the_callers_determinism_comes_back_after_an_error(warn_only: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with pytest.raises(ZeroDivisionError), poisoned_empty():
            raise ZeroDivisionError
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
