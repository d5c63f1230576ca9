"""Lengths and pages: reference and torch's backends against one plain problem per row, and the inputs themselves."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tilewise.domain.config import Candidate
from tilewise.domain.errors import InputError, UnsupportedError
from tilewise.domain.problem import Dtype, Layout, Pass, Problem
from tilewise.kernels import reference
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.cache import flattened
from tilewise.kernels.call import Call, check_cache, check_cache_values
from tilewise.kernels.inputs import NO_PAGE, SPARE_PAGES, random_call
from tilewise.kernels.run import run

from .cells import CPU, TOLERANCE, assert_right, this_cpu
from .test_backends import H200

CACHES: dict[str, dict[str, Any]] = {
    "lengths": {"varlen": True},
    "lengths, several queries": {"varlen": True, "q_len": 5, "causal": True},
    "lengths, window": {"varlen": True, "q_len": 5, "window": (6, 0)},
    "lengths, window to both sides": {"varlen": True, "q_len": 4, "window": (6, 1)},
    "lengths, all of them": {"varlen": True, "q_len": 4},
    "lengths, strided": {"varlen": True, "layout": Layout.BHSD},
    "full pages": {"page_size": 16, "kv_len": 48},
    "pages": {"page_size": 16, "varlen": True, "q_len": 3, "causal": True},
    "pages, not full": {"page_size": 16, "q_len": 3, "causal": True},
    "pages, window": {"page_size": 16, "varlen": True, "q_len": 3, "window": (9, 0)},
    "pages, softcap": {"page_size": 32, "varlen": True, "softcap": True},
    "pages, strided": {"page_size": 16, "varlen": True, "layout": Layout.BHSD},
}


def problem_of(cache: str, **changes: Any) -> Problem:
    sizes = {"batch": 5, "heads": 4, "kv_heads": 2, "q_len": 1, "kv_len": 45, "head_dim": 16, "dtype": Dtype.FP32}
    return Problem(**{**sizes, **CACHES[cache], **changes})


def rows_of(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Return result and LSE, computed for each row of the batch as a problem that has neither lengths nor pages."""
    problem, outs, lses = call.problem, [], []
    for row in range(problem.batch):
        length = problem.kv_len if call.kv_lengths is None else int(call.kv_lengths[row])
        query = call.query[row : row + 1]
        if length == 0:
            outs.append(torch.zeros(*query.shape[:3], problem.v_head_dim, dtype=torch.float64))
            lses.append(torch.full((1, problem.heads, problem.q_len), -torch.inf, dtype=torch.float64))
            continue
        key, value = (tensor_of(cache, call, row, length) for cache in (call.key, call.value))
        one = replace(problem, batch=1, kv_len=length, varlen=False, page_size=0)
        plain = replace(call, problem=one, query=query, key=key, value=value, kv_lengths=None, block_table=None)
        out, lse = reference.attention(plain)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def tensor_of(cache: torch.Tensor, call: Call, row: int, length: int) -> torch.Tensor:
    """Return the keys or values of one row (1, length, Hkv, D), those out of every query's reach as zeros."""
    left = call.window[0]
    first = 0 if left == -1 else max(0, length - call.problem.q_len - left)
    found = torch.zeros(1, length, *cache.shape[2:], dtype=cache.dtype)
    for place in range(first, length):
        if call.block_table is None:
            found[0, place] = cache[row, place]
        else:
            page = int(call.block_table[row, place // cache.shape[1]])
            found[0, place] = cache[page, place % cache.shape[1]]
    return found


@pytest.mark.parametrize("cache", CACHES)
def test_a_row_with_a_length_is_the_problem_of_that_length(cache: str) -> None:
    call = random_call(problem_of(cache), CPU, seed=0)
    found = reference.attention(call)
    torch.testing.assert_close(found, rows_of(call), rtol=1e-12, atol=1e-12)
    assert bool(found[0].isfinite().all())


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["plain", "sdpa", "sdpa_math"])
def test_torchs_backends_know_lengths_and_pages(name: str, cache: str, dtype: Dtype) -> None:
    problem = problem_of(cache, dtype=dtype)
    reason = BACKENDS[name].supports(problem, this_cpu())
    if name != "plain" and (problem.page_size or problem.softcap):
        assert reason in ("no page size", "no softcap")
        return
    assert reason is None
    call = random_call(problem, CPU, seed=1)
    out, lse = run(call, Candidate(name))
    expected, expected_lse = rows_of(call)
    allowed = TOLERANCE[call.query.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=allowed, atol=allowed)
    if lse is not None:
        torch.testing.assert_close(lse.double(), expected_lse, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("cache", "changes"),
    [
        ("pages", {"q_len": 17}),  # without pages that would be packed sequences
        *itertools.product(["lengths", "pages"], [{"mask": "bool"}, {"alibi": True}, {"pass_": Pass.TRAINING}]),
    ],
    ids=str,
)
def test_what_nothing_computes_with_lengths_and_pages(name: str, changes: dict[str, Any], cache: str) -> None:
    problem = problem_of(cache, dtype=Dtype.FP16, **changes)
    assert all(BACKENDS[name].supports(problem, device) is not None for device in (this_cpu(), H200))


def test_flattening_leaves_other_calls_alone() -> None:
    call = random_call(Problem(batch=1, heads=1, q_len=1, kv_len=9, head_dim=8), CPU, seed=0)
    assert flattened(call) is call


@pytest.mark.parametrize("cache", ["lengths, window", "pages, window"])
def test_flattening_leaves_the_cache_alone(cache: str) -> None:
    call = random_call(problem_of(cache), CPU, seed=0)
    before = call.key.clone()
    plain = flattened(call)
    assert torch.equal(before.nan_to_num(nan=7.0), call.key.nan_to_num(nan=7.0))
    assert plain.key.shape == (5, 45, 2, 16)
    assert not plain.problem.varlen
    assert plain.problem.page_size == 0
    assert bool(plain.key.isfinite().all())


# the inputs


def test_lengths_are_full_zero_one_and_random() -> None:
    for seed in range(20):
        lengths = random_call(problem_of("lengths", batch=40), CPU, seed=seed).kv_lengths
        assert lengths is not None
        assert lengths.dtype is torch.int32
        assert lengths[:3].tolist() == [45, 0, 1]
        assert len(set(lengths.tolist())) > 10
        assert 0 <= int(lengths.min()) <= int(lengths.max()) <= 45
    one = random_call(problem_of("lengths", batch=1), CPU, seed=0).kv_lengths
    assert one is not None
    assert one.tolist() == [45]


@pytest.mark.parametrize("cache", ["pages", "pages, not full", "pages, window", "full pages"])
def test_what_is_not_read_is_nonsense(cache: str) -> None:
    problem = problem_of(cache)
    call = random_call(problem, CPU, seed=0)
    table = call.block_table
    assert table is not None
    assert call.key.shape[0] == call.value.shape[0] == table.numel() + SPARE_PAGES
    pages = table[table != NO_PAGE].tolist()
    assert len(set(pages)) == len(pages)
    assert pages != sorted(pages)
    read = sum(int(tensor_of(call.key, call, row, length).any(-1).any(-1).sum()) for row, length in held(call))
    assert int(call.key.isfinite().all(-1).all(-1).sum()) == read
    assert int(call.value.isfinite().all(-1).all(-1).sum()) == read


def held(call: Call) -> list[tuple[int, int]]:
    lengths = [call.problem.kv_len] * call.problem.batch if call.kv_lengths is None else call.kv_lengths.tolist()
    return list(enumerate(lengths))


def test_the_same_seed_gives_the_same_cache() -> None:
    first, second = (random_call(problem_of("pages"), CPU, seed=4) for _ in range(2))
    assert first.block_table is not None
    assert second.block_table is not None
    assert torch.equal(first.block_table, second.block_table)
    torch.testing.assert_close(first.key, second.key, rtol=0, atol=0, equal_nan=True)


def test_no_inputs_for_pages_with_more_queries_than_decoding_has() -> None:
    with pytest.raises(UnsupportedError, match="q_len up to 16"):
        random_call(problem_of("pages", q_len=17), CPU, seed=0)


# what is refused


def good() -> dict[str, torch.Tensor | None]:
    return {
        "query": torch.zeros(3, 2, 4, 16),
        "key_cache": torch.zeros(7, 16, 2, 16),
        "value_cache": torch.zeros(7, 16, 2, 8),
        "kv_lengths": torch.zeros(3, dtype=torch.int32),
        "block_table": torch.zeros(3, 5, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(3, 17, 4, 16)}, r"at most 16 queries a row, got query \(3, 17, 4, 16\)"),
        ({"query": torch.zeros(3, 4, 16)}, r"4 dimensions.* query \(3, 4, 16\)"),
        ({"query": torch.zeros(3, 2, 3, 16)}, "multiple of key heads, got 3 and 2"),
        ({"value_cache": torch.zeros(6, 16, 2, 8)}, r"one number of pages, got .*key \(7, 16, 2, 16\)"),
        ({"value_cache": torch.zeros(7, 8, 2, 8)}, "same length and heads"),
        ({"key_cache": torch.zeros(7, 16, 2, 24)}, "same head_dim"),
        ({"kv_lengths": torch.zeros(2, dtype=torch.int32)}, r"lengths: expected shape \(batch,\) = \(3,\), got \(2,\)"),
        ({"kv_lengths": torch.zeros(3, 1, dtype=torch.int32)}, r"lengths: expected shape.*got \(3, 1\)"),
        ({"kv_lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths: expected int32 on cpu.*got torch.int64"),
        ({"block_table": torch.zeros(4, 5, dtype=torch.int32)}, r"block_table: .*\(3, 1 or more\), got \(4, 5\)"),
        ({"block_table": torch.zeros(3, 0, dtype=torch.int32)}, r"block_table: .*got \(3, 0\)"),
        ({"block_table": torch.zeros(3, 5)}, r"block_table: expected int32 on cpu.*got torch.float32"),
        ({"block_table": torch.zeros(3, 5, dtype=torch.int32, device="meta")}, "block_table: expected int32 on cpu"),
        ({"block_table": None}, r"one batch size, got query \(3, 2, 4, 16\), key \(7, 16, 2, 16\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_together(changes: dict[str, Any], message: str) -> None:
    check_cache(**good())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        check_cache(**{**good(), **changes})


@pytest.mark.parametrize(
    ("lengths", "entry", "message"),
    [
        ([3, 46, 0, 1, 2], None, r"lengths: expected 0 to 45, what the cache holds, got 0 to 46"),
        ([3, -1, 0, 1, 2], None, r"lengths: expected 0 to 45.*got -1 to 3"),
        ([45, 0, 1, 2, 3], (0, 2, 18), r"block_table: expected pages 0 to 17 .*got 18 at \(0, 2\)"),
        ([45, 0, 1, 2, 3], (4, 0, -1), r"block_table: expected pages 0 to 17 .*got -1 at \(4, 0\)"),
        ([45, 0, 1, 2, 3], (1, 0, -1), None),
        ([45, 0, 1, 2, 16], (4, 1, -1), None),
    ],
)
def test_values_that_the_cache_cannot_hold(
    lengths: list[int], entry: tuple[int, int, int] | None, message: str | None
) -> None:
    call = random_call(problem_of("pages"), CPU, seed=0)
    table = torch.arange(15, dtype=torch.int32).view(5, 3)
    if entry is not None:
        table[entry[:2]] = entry[2]
    call = replace(call, kv_lengths=torch.tensor(lengths, dtype=torch.int32), block_table=table)
    if message is None:
        check_cache_values(call)
        return
    with pytest.raises(InputError, match=message):
        check_cache_values(call)


def test_pages_that_the_window_has_left_need_not_exist() -> None:
    call = random_call(problem_of("pages, window"), CPU, seed=0)
    check_cache_values(call)
    assert call.block_table is not None
    assert int(call.block_table[0, 0]) == NO_PAGE
    assert_right(call, *run(call, Candidate("plain")))
