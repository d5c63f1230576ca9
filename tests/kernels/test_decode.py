"""The decoding kernel: small and odd sizes in the interpreter, real sizes on a GPU."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Dtype, Layout, Precision, Problem
from tilewise.kernels import device as devices
from tilewise.kernels.backends.triton_decode import KERNEL, TritonDecode
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import NO_PAGE, random_call
from tilewise.kernels.run import run
from tilewise.kernels.triton_kernels import decode
from tilewise.tuner.correctness import Checker, poisoned_empty

from .cells import assert_right

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

QUERIES = (1, 2, 5, 16)
HEADS: dict[str, dict[str, Any]] = {
    "mha": {"heads": 2},
    "gqa": {"heads": 16, "kv_heads": 2},
    "mqa": {"heads": 4, "kv_heads": 1},
}
DIMS = ((40, 40), (56, 56), (80, 80), (128, 128), (192, 128), (256, 256), (16, 72))
CACHES: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "lengths": {"varlen": True},
    "small pages": {"page_size": 16, "varlen": True},
    "odd pages": {"page_size": 48, "varlen": True},
    "large pages, full": {"page_size": 64},
}
REACH: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "window": {"window": (18, 0)},
    "window to both sides, softcap": {"window": (7, 2), "softcap": True},
}
# block_n and splits: of one tile, of several, and more splits than tiles
PIECES = ((16, 1), (32, 2), (16, 3), (64, 1), (16, 8), (32, 5))


def covering() -> list[tuple[int, str, tuple[int, int], str, str, Dtype, tuple[int, int]]]:
    """Return each pair of q_len and heads three times, and with them all else in turn."""
    pairs = list(itertools.product(QUERIES, HEADS)) * 3
    caches, reach = list(CACHES), list(REACH)
    return [
        (
            q_len, heads, DIMS[n % 7], caches[n % 5], reach[(n + n // 12) % 4],
            (Dtype.FP16, Dtype.BF16)[n // 2 % 2], PIECES[(n + n // 6) % 6],
        )
        for n, (q_len, heads) in enumerate(pairs)
    ]  # fmt: skip


def config_of(pieces: tuple[int, int], rows: int = 16) -> Config:
    """Return a config for a tile of `rows` queries that also a GPU can run: tall tiles need threads and memory."""
    block_n = pieces[0] if rows < 64 else min(pieces[0], 32)
    warps = 8 if rows > 64 else 4 if rows > 16 else 1
    return Config.of(KERNEL, block_n=block_n, num_splits=pieces[1], num_warps=warps, num_stages=2)


def forward_of(call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernels on tensors full of NaN, so that what they forget to write, or read too early, shows."""
    with poisoned_empty():
        out, lse = TritonDecode().forward(call, config)
    assert lse is not None
    return out, lse


def problem_of(heads: str = "gqa", cache: str = "lengths", reach: str = "causal", **changes: Any) -> Problem:
    sizes: dict[str, Any] = {"batch": 4, "q_len": 1, "kv_len": 70, "head_dim": 16}
    return Problem(**{**sizes, **HEADS[heads], **CACHES[cache], **REACH[reach], **changes})


@pytest.mark.parametrize(("q_len", "heads", "dims", "cache", "reach", "dtype", "pieces"), covering())
def test_right_in_every_cell(
    q_len: int, heads: str, dims: tuple[int, int], cache: str, reach: str, dtype: Dtype, pieces: tuple[int, int]
) -> None:
    problem = problem_of(heads, cache, reach, q_len=q_len, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype)
    call = random_call(problem, HERE, seed=0)
    rows = q_len * problem.heads // problem.kv_heads
    assert_right(call, *forward_of(call, config_of(pieces, rows)))


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("cache", ["lengths", "small pages"])
def test_the_default_is_right(dims: tuple[int, int], cache: str) -> None:
    call = random_call(problem_of("mqa", cache, head_dim=dims[0], v_head_dim=dims[1]), HERE, seed=1)
    assert_right(call, *forward_of(call, None))


@pytest.mark.parametrize("splits", [1, 3])
def test_float32(splits: int) -> None:
    call = random_call(problem_of("gqa", "lengths", q_len=2, dtype=Dtype.FP32), HERE, seed=2)
    assert_right(call, *forward_of(call, config_of((16, splits))))


@given(
    q_len=st.integers(1, 16),
    lengths=st.lists(st.integers(0, 60), min_size=2, max_size=2),
    reach=st.tuples(st.integers(-1, 40), st.integers(-1, 20)),
    page_size=st.sampled_from([0, 16, 32]),
    pieces=st.sampled_from(PIECES),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_right_for_any_window_and_length(
    q_len: int, lengths: list[int], reach: tuple[int, int], page_size: int, pieces: tuple[int, int]
) -> None:
    window = None if reach == (-1, -1) else reach
    problem = Problem(
        batch=2, heads=1, q_len=q_len, kv_len=60, head_dim=16, window=window, page_size=page_size, varlen=True
    )
    call = random_call(replace(problem, varlen=False, causal=False, window=None), HERE, seed=3)
    call = replace(call, problem=problem, kv_lengths=torch.tensor(lengths, dtype=torch.int32, device=HERE))
    for row, length in enumerate(lengths):
        if call.block_table is not None:
            call.block_table[row, -(-length // page_size) :] = NO_PAGE
        else:
            call.key[row, length:], call.value[row, length:] = torch.nan, torch.nan
    assert_right(call, *forward_of(call, config_of(pieces)))


@pytest.mark.parametrize("splits", [1, 2, 4, 7, 64])
def test_any_number_of_splits_gives_the_same(splits: int) -> None:
    call = random_call(problem_of("mqa", "lengths", batch=3, kv_len=80), HERE, seed=4)
    out, lse = forward_of(call, config_of((16, splits)))
    assert_right(call, out, lse)
    once, _ = forward_of(call, config_of((16, 1)))
    torch.testing.assert_close(out, once, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("length", [-5, 0, 1, 15, 16, 17, 69, 70, 1000])
def test_lengths_at_the_edges(length: int, splits: int) -> None:
    """A length that the cache cannot hold is cut to what it holds: nothing outside is ever read."""
    problem = Problem(batch=1, heads=2, q_len=2, kv_len=70, head_dim=16, causal=True, varlen=True)
    call = random_call(problem, HERE, seed=5)
    out, lse = forward_of(
        replace(call, kv_lengths=torch.tensor([length], dtype=torch.int32, device=HERE)), config_of((16, splits))
    )
    cut = torch.tensor([min(max(length, 0), 70)], dtype=torch.int32, device=HERE)
    assert_right(replace(call, kv_lengths=cut), out, lse)
    if length <= 0:
        assert bool((out == 0).all())
        assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("cache", ["lengths", "small pages"])
def test_any_strides(layout: Layout, cache: str) -> None:
    call = random_call(problem_of("gqa", cache, layout=layout, head_dim=40), HERE, seed=6)
    wide = torch.full((*call.query.shape[:3], 80), torch.nan, dtype=call.query.dtype, device=HERE)
    wide[..., ::2] = call.query  # every other element: the last stride is 2
    fused = torch.full((*call.key.shape[:2], 3, *call.key.shape[2:]), torch.nan, dtype=call.key.dtype, device=HERE)
    fused[:, :, 1], fused[:, :, 2] = call.key, call.value  # keys and values in one cache
    call = call.with_tensors(wide[..., ::2], fused[:, :, 1], fused[:, :, 2])
    assert not call.key.is_contiguous()
    assert_right(call, *forward_of(call, config_of((16, 2))))
    # a last stride of 2 in the cache, and head strides that are no multiple of 16 bytes
    odd = torch.full((*call.key.shape[:3], 82), torch.nan, dtype=call.key.dtype, device=HERE)[..., :80]
    odd[..., ::2] = call.key
    call = call.with_tensors(call.query, odd[..., ::2], call.value)
    assert_right(call, *forward_of(call, config_of((16, 2))))
    narrow = torch.full((*call.key.shape[:3], 43), torch.nan, dtype=call.key.dtype, device=HERE)
    narrow[..., :40] = call.value
    call = call.with_tensors(call.query, call.key, narrow[..., :40])
    assert_right(call, *forward_of(call, config_of((16, 2))))


def test_lengths_and_tables_of_any_strides() -> None:
    """A column of a matrix of lengths, and a table that was transposed."""
    call = random_call(problem_of("gqa", "small pages"), HERE, seed=6)
    assert call.kv_lengths is not None
    assert call.block_table is not None
    lengths = torch.stack([call.kv_lengths, call.kv_lengths.flip(0)], 1)[:, 0]
    table = call.block_table.T.contiguous().T
    assert (lengths.stride(), table.stride(0)) == ((2,), 1)
    call = replace(call, kv_lengths=lengths, block_table=table)
    assert_right(call, *forward_of(call, config_of((16, 2))))


def test_a_wide_table_and_a_shared_page() -> None:
    """Tables are cut out of wider ones, and rows with a common beginning share its pages."""
    call = random_call(problem_of("mqa", "small pages", batch=3, varlen=False, kv_len=64), HERE, seed=7)
    assert call.block_table is not None
    wide = torch.full((3, 9), NO_PAGE, dtype=torch.int32, device=HERE)
    wide[:, :4] = call.block_table
    wide[1:, :2] = wide[0, :2]
    call = replace(call, block_table=wide[:, :4])
    assert_right(call, *forward_of(call, config_of((16, 2))))


@pytest.mark.parametrize("scale", [1.0, -0.7])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_any_scale_and_softcap(scale: float, softcap: float) -> None:
    problem = problem_of("mqa", "lengths", softcap=softcap > 0)
    call = replace(random_call(problem, HERE, seed=8), scale=scale, softcap=softcap)
    assert_right(call, *forward_of(call, config_of((32, 2))))


def test_one_split_needs_no_second_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[str, tuple[int, ...]]] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append((self.name, grid))
            return lambda *_, **__: None

    for name in ("attention_decode", "combine_splits"):
        monkeypatch.setattr(decode, name, Recorded(name))
    call = random_call(problem_of("gqa", q_len=3), torch.device("cpu"), seed=0)
    TritonDecode().forward(call, config_of((16, 1)))
    assert launched == [("attention_decode", (4 * 2,))]
    launched.clear()
    TritonDecode().forward(call, config_of((16, 5)))
    assert launched == [("attention_decode", (4 * 2 * 5,)), ("combine_splits", (4 * 2 * 3 * 8,))]


# on a GPU

REAL: dict[str, dict[str, Any]] = {
    "one row": {"batch": 1, "kv_len": 8192},
    "lengths": {"batch": 16, "kv_len": 5000, "varlen": True},
    "lengths, several queries": {"batch": 7, "kv_len": 3001, "varlen": True, "q_len": 5, "causal": True},
    "lengths, 16 queries": {"batch": 7, "kv_len": 3001, "varlen": True, "q_len": 16, "causal": True},
    "window": {"batch": 4, "kv_len": 10000, "varlen": True, "q_len": 2, "window": (1023, 0)},
    "pages of 16": {"batch": 9, "kv_len": 4000, "varlen": True, "page_size": 16, "q_len": 3, "causal": True},
    "pages of 48": {"batch": 9, "kv_len": 4000, "varlen": True, "page_size": 48},
    "pages of 256, window": {"batch": 9, "kv_len": 4000, "page_size": 256, "window": (500, 0), "softcap": True},
}
REAL_DIMS = ((128, 128), (64, 64), (56, 56), (80, 80), (192, 128), (256, 256), (40, 40), (128, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (32, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("number", range(len(REAL)), ids=list(REAL))
def test_right_at_real_sizes(number: int, heads: tuple[int, int]) -> None:
    """The default and three other configs, in both dtypes over the cells."""
    dims = REAL_DIMS[number]
    sizes = {"heads": heads[0], "kv_heads": heads[1], "head_dim": dims[0], "v_head_dim": dims[1]}
    fields = {"q_len": 1, "dtype": (Dtype.FP16, Dtype.BF16)[number % 2], **sizes, **list(REAL.values())[number]}
    problem = Problem(**fields)
    device = devices.select("cuda")
    space = TritonDecode().spaces(problem, devices.describe(device))["forward"]
    assert space is not None
    default = space.default
    splits = max(space.parameters[1].values, key=int)
    others = [
        Config.of(KERNEL, **{**default.as_dict(), **change})
        for change in ({"num_splits": 1}, {"num_splits": splits}, {"block_n": 32, "num_warps": 2})
    ]
    checker = Checker(problem, device, seed=0)
    for config in (default, *(config for config in others if config in space)):
        error = checker.check(Candidate.of(KERNEL, forward=config))
        assert error.worst <= 1, f"{config}: {error}"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("dim", [64, 256])
def test_float32_at_real_sizes(precision: Precision, dim: int) -> None:
    problem = Problem(
        batch=3, heads=16, kv_heads=2, q_len=2, kv_len=3000, head_dim=dim, dtype=Dtype.FP32,
        precision=precision, varlen=True, causal=True,
    )  # fmt: skip
    call = random_call(problem, HERE, seed=0)
    out, lse = run(call, Candidate(KERNEL))
    if precision is Precision.IEEE:
        assert_right(call, out, lse)
    else:
        expected, _ = run(call, Candidate("plain"))
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
def test_offsets_are_64_bit(paged: bool) -> None:
    """The caches have 2**31 elements and some: an offset of 32 bits would come out negative."""
    heads, dim, page = 8, 128, 64
    if paged:
        pages = 2**31 // (page * heads * dim) + 40
        problem = Problem(batch=2, heads=64, kv_heads=8, q_len=1, kv_len=1000, head_dim=dim, page_size=page)
        shape: tuple[int, ...] = (pages, page, heads, dim)
        table = torch.stack([torch.arange(pages - 16, pages), torch.arange(16)]).int().to(HERE)
    else:
        batch = 2**31 // (4096 * heads * dim) + 1
        problem = Problem(batch=batch, heads=64, kv_heads=8, q_len=1, kv_len=4096, head_dim=dim, varlen=True)
        shape, table = (batch, 4096, heads, dim), None
    key, value = (torch.full(shape, torch.nan, dtype=torch.float16, device=HERE) for _ in range(2))
    assert key.numel() > 2**31
    rows = slice(-40, None)  # only the end is read, by its first keys
    for cache in (key, value):
        cache[rows].normal_()
        if paged:
            cache[:16].normal_()
    query = torch.randn(problem.batch, 1, 64, dim, dtype=torch.float16, device=HERE)
    lengths = None
    if not paged:
        lengths = torch.zeros(problem.batch, dtype=torch.int32, device=HERE)
        lengths[-2:] = 4096
    call = Call(problem, query, key, value, dim**-0.5, kv_lengths=lengths, block_table=table)
    out, lse = run(call, Candidate(KERNEL))
    assert lse is not None
    if paged:
        assert_right(call, out, lse)
        return
    assert lengths is not None
    last = replace(problem, batch=2)
    part = Call(last, query[-2:], key[-2:], value[-2:], dim**-0.5, kv_lengths=lengths[-2:])
    assert_right(part, out[-2:], lse[-2:])
    assert bool((out[:-2] == 0).all())
