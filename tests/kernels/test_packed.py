"""Packed sequences (cu_seqlens) in every backend: results, all gradients, and who sees whom."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.domain.config import Candidate
from tilewise.domain.errors import InputError, UnsupportedError
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels import device as devices
from tilewise.kernels import reference
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.backends.triton_decode import TritonDecode
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import random_call
from tilewise.kernels.packed import check_lengths
from tilewise.kernels.run import run
from tilewise.kernels.triton_kernels.common import dropout_mask
from tilewise.tuner.correctness import Checker, poisoned_empty

from .cells import TOLERANCE, assert_right, doubled, this_cpu
from .test_reference import naive
from .test_triton import HERE, card
from .test_triton_cells import PATHS, candidate

CELLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal, fewer queries": {"causal": True, "kv_len": 49},
    "causal, more queries": {"causal": True, "kv_len": 18},
    "window": {"window": (9, 0)},
    "window to both sides": {"window": (5, 3), "kv_len": 45},
    "window, open to the right": {"window": (4, -1), "kv_len": 45},
    "window, open to the left": {"window": (-1, 3), "kv_len": 20},
    "gqa": {"heads": 4, "kv_heads": 2, "causal": True},
    "mqa": {"heads": 3, "kv_heads": 1},
    "other value head_dim": {"v_head_dim": 24, "causal": True},
    "alibi": {"alibi": True, "causal": True},
    "softcap": {"softcap": True, "causal": True, "kv_len": 26},
    "alibi and window and softcap": {"alibi": True, "softcap": True, "window": (6, 2), "heads": 4, "kv_heads": 2},
}
ON_CPU = ("sdpa", "sdpa_math", "plain", "cpu_tiled")
TILES = candidate(16, 16, tma=False)


def problem_of(cell: str, **changes: Any) -> Problem:
    sizes: dict[str, Any] = {"batch": 6, "heads": 2, "q_len": 37, "head_dim": 16, "dtype": Dtype.FP32, "varlen": True}
    return Problem(**{**sizes, **CELLS[cell], **changes})


def call_of(problem: Problem, *, seed: int = 0, device: torch.device = HERE) -> Call:
    return random_call(problem, device, seed=seed, empty=True)


def packed_call(problem: Problem, q_lengths: list[int], kv_lengths: list[int]) -> Call:
    """Return a call with the given lengths, `problem` saying all else."""
    problem = replace(
        problem, batch=len(q_lengths), q_len=max(17, *q_lengths), kv_len=max(1, *kv_lengths), varlen=True
    )  # fmt: skip
    call = random_call(replace(problem, varlen=False, batch=1), HERE, seed=3)
    cu_q, cu_kv = (
        torch.tensor([0, *lengths], device=HERE).cumsum(0, dtype=torch.int32) for lengths in (q_lengths, kv_lengths)
    )
    generator = torch.Generator(HERE).manual_seed(4)
    query, key, value = (
        torch.randn(total, *tensor.shape[2:], generator=generator, device=HERE, dtype=tensor.dtype)
        for tensor, total in zip(
            (call.query, call.key, call.value), (sum(q_lengths), sum(kv_lengths), sum(kv_lengths)), strict=True
        )
    )
    return replace(call, problem=problem, query=query, key=key, value=value, cu_seqlens=(cu_q, cu_kv))


def results_of(call: Call, chosen: Candidate) -> tuple[torch.Tensor, ...]:
    """Return the result and the gradients of query, key and value for a gradient of random numbers."""
    leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
    with poisoned_empty():
        out, _ = run(call.with_tensors(*leaves), chosen)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_of(call))


def grad_of(call: Call) -> torch.Tensor:
    shape = (*call.query.shape[:2], call.value.shape[2])
    return torch.randn(shape, generator=torch.Generator(HERE).manual_seed(9), device=HERE, dtype=call.query.dtype)


def assert_gradients(call: Call, chosen: Candidate, *, keep: torch.Tensor | None = None) -> None:
    expected = reference.attention(call, keep=keep)[0], *reference.gradients(call, grad_of(call), keep=keep)
    allowed = TOLERANCE[call.query.dtype]
    for mine, theirs in zip(results_of(call, chosen), expected, strict=True):
        scale = max(1.0, float(theirs.abs().max()) if theirs.numel() else 0.0)
        torch.testing.assert_close(mine.double(), theirs, rtol=allowed, atol=allowed * scale)


# the reference


@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_is_the_definition_for_each_sequence(cell: str) -> None:
    call = doubled(call_of(problem_of(cell, head_dim=4, v_head_dim=3, q_len=19, kv_len=14), device=torch.device("cpu")))
    if call.alibi_slopes is not None:
        slopes = torch.rand(6, call.problem.heads, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        call = replace(call, alibi_slopes=slopes)
    out, lse = reference.attention(call)
    assert call.cu_seqlens is not None
    edges = [cu.tolist() for cu in call.cu_seqlens]
    seen = 0
    for entry in range(call.problem.batch):
        q, kv = (slice(*edge[entry : entry + 2]) for edge in edges)
        one = call.with_tensors(call.query[None, q], call.key[None, kv], call.value[None, kv])
        own = None if call.alibi_slopes is None else call.alibi_slopes[entry : entry + 1]
        expected, expected_lse = naive(replace(one, alibi_slopes=own))
        torch.testing.assert_close(out[q], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[:, q], expected_lse[0], rtol=1e-12, atol=1e-12)
        seen += out[q].shape[0]
    assert seen == out.shape[0]


def test_the_references_gradients_are_those_of_its_result() -> None:
    call = doubled(call_of(problem_of("alibi and window and softcap", pass_=Pass.TRAINING), device=torch.device("cpu")))
    leaves = [tensor.clone().requires_grad_() for tensor in (call.query, call.key, call.value)]
    out, _ = reference.attention(call.with_tensors(*leaves), needs_grad=True)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(out, leaves, grad_out)
    for found, wanted in zip(reference.gradients(call, grad_out), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# what every backend computes


def cases() -> list[tuple[str, str]]:
    return [
        (name, cell)
        for name in ON_CPU
        for cell in CELLS
        if BACKENDS[name].supports(problem_of(cell), this_cpu()) is None
    ]


def test_what_the_backends_of_a_cpu_support() -> None:
    found = {name: {cell for other, cell in cases() if other == name} for name in ON_CPU}
    assert found["plain"] == set(CELLS)
    assert found["sdpa"] == found["sdpa_math"] == {cell for cell in CELLS if "softcap" not in CELLS[cell]}
    assert found["cpu_tiled"] == {cell for cell in CELLS if not {"alibi", "softcap"} & CELLS[cell].keys()}


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
@pytest.mark.parametrize(("name", "cell"), cases())
def test_right_on_a_cpu(name: str, cell: str, dtype: Dtype) -> None:
    call = call_of(problem_of(cell, dtype=dtype), device=torch.device("cpu"))
    out, lse = run(call, Candidate(name))
    assert_right(call, out, lse)
    assert (lse is not None) == BACKENDS[name].gives_lse


@pytest.mark.parametrize(("name", "cell"), cases())
def test_gradients_on_a_cpu(name: str, cell: str) -> None:
    call = call_of(problem_of(cell, pass_=Pass.TRAINING), device=torch.device("cpu"))
    leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
    out, _ = run(call.with_tensors(*leaves), Candidate(name))
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, leaves, grad_out)
    for gradient, expected in zip(found, reference.gradients(call, grad_out), strict=True):
        largest = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=4e-5 * largest)


@pytest.mark.parametrize("tma", PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_tritons_forward(cell: str, tma: bool) -> None:
    call = call_of(problem_of(cell), seed=1)
    with poisoned_empty():
        assert_right(call, *run(call, candidate(16, 16, tma=tma)))


@pytest.mark.parametrize("tma", PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_tritons_gradients(cell: str, tma: bool) -> None:
    assert_gradients(call_of(problem_of(cell, pass_=Pass.TRAINING), seed=2), candidate(16, 16, tma=tma))


@pytest.mark.parametrize("cell", ["causal, fewer queries", "gqa", "window to both sides", "softcap"])
@pytest.mark.parametrize(("blocks", "dtype"), [((16, 32), Dtype.FP16), ((32, 16), Dtype.BF16), ((64, 64), Dtype.FP16)])
def test_other_tiles_in_half_precision(cell: str, blocks: tuple[int, int], dtype: Dtype) -> None:
    problem = problem_of(cell, pass_=Pass.TRAINING, dtype=dtype, head_dim=40, v_head_dim=24, q_len=50)
    assert_gradients(call_of(problem, seed=3), candidate(*blocks, tma=PATHS[-1]))


@pytest.mark.parametrize("dims", [(56, 56), (72, 72), (96, 96), (160, 160), (192, 128), (256, 256)])
def test_every_width(dims: tuple[int, int]) -> None:
    problem = problem_of(
        "causal", pass_=Pass.TRAINING, dtype=Dtype.FP16, head_dim=dims[0], v_head_dim=dims[1], q_len=20
    )
    assert_gradients(call_of(problem, seed=3), candidate(16, 16, tma=PATHS[-1]))


@pytest.mark.parametrize("tma", PATHS)
@pytest.mark.parametrize("cell", ["causal", "gqa", "window to both sides", "alibi and window and softcap"])
def test_dropout(cell: str, tma: bool) -> None:
    problem = problem_of(cell, pass_=Pass.TRAINING, q_len=20, kv_len=25)
    call = replace(call_of(problem, seed=4), problem=replace(problem, dropout=True), dropout=0.25, seed=2**61 + 3)
    assert_gradients(call, candidate(16, 32, tma=tma), keep=dropout_mask(call))


def test_dropout_does_not_depend_on_how_sequences_are_packed() -> None:
    """A padded batch of the same lengths drops the same weights of every sequence."""
    call = replace(packed_call(problem_of("full"), [20, 7, 0], [31, 12, 5]), dropout=0.4, seed=7)
    out, _ = run(call, TILES)
    for entry, (q, kv) in enumerate(((slice(0, 20), slice(0, 31)), (slice(20, 27), slice(31, 43)))):
        tensors = []
        for tensor, rows, length in ((call.query, q, 20), (call.key, kv, 31), (call.value, kv, 31)):
            tensors.append(torch.zeros(3, length, *tensor.shape[1:], device=HERE))
            tensors[-1][entry, : rows.stop - rows.start] = tensor[rows]
        mask = (torch.arange(31, device=HERE) < kv.stop - kv.start)[None, None, None]
        problem = replace(call.problem, varlen=False, mask="bool.b1h1q1")
        one = replace(call.with_tensors(*tensors), problem=problem, mask=mask, cu_seqlens=None)
        torch.testing.assert_close(out[q], run(one, TILES)[0][entry, : q.stop - q.start], rtol=1e-5, atol=1e-5)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    reach=st.tuples(st.integers(-1, 30), st.integers(-1, 30)),
    causal=st.booleans(),
    blocks=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
    tma=st.sampled_from(PATHS),
)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_any_lengths(
    lengths: list[tuple[int, int]], reach: tuple[int, int], causal: bool, blocks: tuple[int, int], tma: bool
) -> None:
    window = None if reach == (-1, -1) else reach
    problem = problem_of("full", heads=1, pass_=Pass.TRAINING, window=window, causal=causal)
    q_lengths, kv_lengths = ([pair[side] for pair in lengths] for side in (0, 1))
    call = packed_call(problem, q_lengths, kv_lengths)
    assert_right(
        call, *run(replace(call, problem=replace(call.problem, pass_=Pass.INFERENCE)), candidate(*blocks, tma=tma))
    )
    assert_gradients(call, candidate(*blocks, tma=tma))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5), causal=st.booleans()
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_any_lengths_padded(lengths: list[tuple[int, int]], causal: bool) -> None:
    q_lengths, kv_lengths = ([pair[side] for pair in lengths] for side in (0, 1))
    call = packed_call(problem_of("full", heads=1, causal=causal), q_lengths, kv_lengths)
    for name in ("sdpa", "plain", *(["cpu_tiled"] if HERE.type == "cpu" else [])):
        assert_right(call, *run(call, Candidate(name)))


@pytest.mark.parametrize(("q_lengths", "kv_lengths"), [([0, 0], [0, 0]), ([3, 0], [0, 0]), ([0, 0], [0, 20])])
@pytest.mark.parametrize("name", ["triton", "sdpa", "plain", *(["cpu_tiled"] if HERE.type == "cpu" else [])])
def test_nothing_at_all(name: str, q_lengths: list[int], kv_lengths: list[int]) -> None:
    call = packed_call(problem_of("causal", pass_=Pass.TRAINING), q_lengths, kv_lengths)
    for tensor, like in zip(
        results_of(call, Candidate(name)), (grad_of(call), call.query, call.key, call.value), strict=True
    ):
        assert torch.equal(tensor, torch.zeros_like(like))
    _, lse = run(replace(call, problem=replace(call.problem, pass_=Pass.INFERENCE)), Candidate(name))
    assert lse is None or torch.equal(lse, torch.full((2, sum(q_lengths)), -torch.inf, device=HERE))


def test_any_strides() -> None:
    call = call_of(problem_of("gqa", head_dim=24), seed=5)
    wide = torch.full((*call.query.shape[:2], 48), torch.nan, device=HERE)
    wide[..., ::2] = call.query  # every other element: the last stride is 2
    fused = torch.full((call.key.shape[0], 3, *call.key.shape[1:]), torch.nan, device=HERE)
    fused[:, 1], fused[:, 2] = call.key, call.value  # parts of one projection
    call = call.with_tensors(wide[..., ::2], fused[:, 1], fused[:, 2])
    for tma in PATHS:
        assert_right(call, *run(call, candidate(16, 16, tma=tma)))


def test_gradients_are_the_same_bits_every_time() -> None:
    call = call_of(problem_of("alibi and window and softcap", pass_=Pass.TRAINING, deterministic=True), seed=6)
    first, second = (results_of(call, TILES) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# who sees whom


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of the poisoned sequences
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("cell", ["full", "causal", "window to both sides", "gqa"])
@pytest.mark.parametrize(
    "chosen",
    [*(candidate(16, 32, tma=tma) for tma in PATHS), candidate(32, 16, tma=PATHS[-1]),
     Candidate("sdpa"), Candidate("plain"), *([Candidate("cpu_tiled")] if HERE.type == "cpu" else [])],
    ids=str,
)  # fmt: skip
def test_what_one_sequence_holds_is_nothing_to_another(chosen: Candidate, cell: str, poison: float) -> None:
    """NaN and infinity in every second sequence, gradient of the result included, leave the others as they were."""
    lengths = [21, 10, 35, 3, 18]
    problem = problem_of(cell, pass_=Pass.TRAINING)
    call = packed_call(problem, lengths, [length + 2 for length in lengths])
    assert call.cu_seqlens is not None
    bad = torch.tensor([False, True, False, True, False], device=HERE)
    tensors, sides = (call.query, call.key, call.value, grad_of(call)), (0, 1, 1, 0)
    rows = [bad.repeat_interleave(cu.diff()) for cu in call.cu_seqlens]
    *poisoned, grad_out = (
        tensor.masked_fill(rows[side][:, None, None], poison) for tensor, side in zip(tensors, sides, strict=True)
    )
    leaves = [tensor.requires_grad_() for tensor in poisoned]
    with poisoned_empty():
        out, _ = run(call.with_tensors(*leaves), chosen)
        found = (out.detach(), *torch.autograd.grad(out, leaves, grad_out))
    expected = (reference.attention(call)[0], *reference.gradients(call, grad_of(call)))
    for mine, theirs, side in zip(found, expected, (0, 0, 1, 1), strict=True):
        largest = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(mine[~rows[side]].double(), theirs[~rows[side]], rtol=2e-5, atol=2e-5 * largest)


@pytest.mark.parametrize("tma", PATHS)
def test_wrong_edges_stay_inside_the_tensors(tma: bool) -> None:
    """A kernel reads and writes rows 0..total only, whatever cu_seqlens says: behind them lie other tensors."""
    call = packed_call(problem_of("causal", pass_=Pass.TRAINING), [37, 0], [37, 0])
    guarded = [torch.full((80, *t.shape[1:]), torch.nan, device=HERE) for t in (call.query, call.key, call.value)]
    for room, tensor in zip(guarded, (call.query, call.key, call.value), strict=True):
        room[20:57] = tensor
    wrong = torch.tensor([-5, 90, 60], dtype=torch.int32, device=HERE)
    inside = replace(call.with_tensors(*(room[20:57] for room in guarded)), cu_seqlens=(wrong, wrong))
    chosen = candidate(16, 16, tma=tma)
    for found, expected in zip(results_of(inside, chosen), results_of(call, chosen), strict=True):
        assert torch.equal(found, expected)


# what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 20, 37], r"cu_seqlens of query: expected values that start at 0, .* end at 37, .*, got \[1, 20, 37\]"),
        ([0, 25, 20, 37], r"got \[0, 25, 20, 37\]"),
        ([0, 20, 36], r"end at 37, the rows of query, got \[0, 20, 36\]"),
        ([0, 20, 37], r"expected no sequence longer than max_q = 19, got one of 20; pass a larger max_q"),
        ([0, *[1] * 20, 36], r"got \[0, 1, 1, 1, 1, 1, \.\.\., 1, 1, 1, 1, 36\]"),
    ],
)
def test_lengths_that_make_no_sense(values: list[int], message: str) -> None:
    cu = torch.tensor(values, dtype=torch.int32)
    good = torch.tensor([0, *[37] * (len(values) - 1)], dtype=torch.int32)
    with pytest.raises(InputError, match=message):
        check_lengths((cu, good), (37, 37), (19, 37))
    assert check_lengths((good, good), (37, 37), (None, 37)) == (37, 37)


@pytest.mark.parametrize("name", ["triton", "sdpa", "plain", "cpu_tiled", "flex"])
def test_no_mask_and_no_pages(name: str) -> None:
    device = this_cpu() if name in ON_CPU else card(232448)
    backend, problem = BACKENDS[name], problem_of("causal", dtype=Dtype.FP16)
    assert backend.supports(problem, device) is None
    for changes in ({"mask": "bool"}, {"mask": "bias.b1"}, {"page_size": 16}):
        assert backend.supports(replace(problem, **changes), device) is not None
    with pytest.raises(UnsupportedError, match="packed sequences have no mask"):
        random_call(replace(problem, mask="bool"), HERE, seed=0)


def test_packed_is_not_decoding() -> None:
    """With up to 16 queries varlen is a number of keys per row of a batch: kernels for it cannot do with cu_seqlens."""
    decoding = Problem(batch=2, heads=2, q_len=16, kv_len=64, head_dim=16, varlen=True)
    packed = replace(decoding, q_len=17)
    assert (decoding.packed, packed.packed) == (False, True)
    assert BACKENDS["triton"].supports(decoding, card(232448)) is not None
    assert BACKENDS["triton"].supports(packed, card(232448)) is None
    assert TritonDecode().supports(decoding, card(232448)) is None
    assert TritonDecode().supports(packed, card(232448)) is not None
    assert not replace(packed, varlen=False).packed


# the calls that are made for a problem


def test_lengths_are_those_of_the_problem() -> None:
    problem = problem_of("causal", batch=40, q_len=200, kv_len=200)
    calls = [random_call(problem, HERE, seed=seed) for seed in (0, 1)]
    (cu_q, cu_kv), (other, _) = (call.cu_seqlens for call in calls if call.cu_seqlens is not None)
    assert torch.equal(cu_q, cu_kv)
    assert torch.equal(cu_q, other), "the same for every seed"
    assert not torch.equal(calls[0].query, calls[1].query)
    lengths = cu_q.diff()
    assert (int(lengths[0]), int(lengths.max())) == (200, 200)
    assert 50 <= int(lengths.min()) < 80
    uneven = random_call(replace(problem, kv_len=300), HERE, seed=0).cu_seqlens
    assert uneven is not None
    assert int(uneven[1].diff().max()) == 300
    emptied = random_call(problem, HERE, seed=0, empty=True).cu_seqlens
    assert emptied is not None
    assert [(int(q), int(kv)) for q, kv in zip(*(cu.diff()[1:4] for cu in emptied), strict=True)] == [
        (0, int(lengths[1])), (int(lengths[2]), 0), (0, 0)
    ]  # fmt: skip


# on a GPU, at real sizes

REAL: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal gqa": {"causal": True, "kv_heads": 2},
    "causal, fewer queries": {"causal": True, "q_len": 500, "kv_len": 1111},
    "window": {"window": (256, 0)},
    "window to both sides": {"window": (100, 33), "kv_len": 777},
    "alibi": {"alibi": True, "causal": True},
    "softcap": {"softcap": True, "causal": True},
    "latent attention": {"head_dim": 192, "v_head_dim": 128, "causal": True},
    "D=56": {"head_dim": 56, "causal": True},
    "D=256": {"head_dim": 256},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "sdpa", "plain"])
@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("cell", REAL)
def test_a_training_step_is_right_at_real_sizes(cell: str, dtype: Dtype, name: str) -> None:
    fields: dict[str, Any] = {"batch": 5, "heads": 4, "q_len": 1000, "head_dim": 64, "varlen": True, **REAL[cell]}
    problem = Problem(pass_=Pass.TRAINING, dtype=dtype, **fields)
    device = devices.select("cuda")
    described = devices.describe(device)
    if BACKENDS[name].supports(problem, described) is not None:
        assert name == "sdpa"
        return
    error = Checker(problem, device, seed=0).check(BACKENDS[name].default(problem, described))
    assert error.worst <= 1, str(error)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "sdpa", "plain"])
def test_nothing_waits_for_the_device(name: str, no_waiting: Callable[[], AbstractContextManager[None]]) -> None:
    call = random_call(problem_of("causal", dtype=Dtype.FP16, pass_=Pass.TRAINING), HERE, seed=0)
    results_of(call, Candidate(name))  # compile
    leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
    grad_out = grad_of(call)
    with no_waiting():
        out, _ = run(call.with_tensors(*leaves), Candidate(name))
        torch.autograd.grad(out, leaves, grad_out)
