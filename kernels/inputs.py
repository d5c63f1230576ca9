"""Random tensors for a problem: what checks, timings and benchmarks run on."""

import itertools
import random

import torch

from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import MAX_DECODE_Q_LEN, Layout, Problem

from .call import TORCH_DTYPES, Call

SOFTCAP = 30.0
DROPOUT = 0.1
DROPOUT_SEED = 1 << 61  # seeds count from here: they must not be cut to 32 bits
WIDE_TILE = 128  # keys: no kernel's default tile is wider
SPARE_PAGES = 3  # of a paged cache: held by no row
NO_PAGE = 2**31 - 1  # a table entry that must not be followed


def random_call(problem: Problem, device: torch.device, *, seed: int, empty: bool = False) -> Call:
    """Return a Call for `problem` with standard normal tensors, the same for the same seed and device.

    A bool mask leaves 4 of 5 pairs, a bias is standard normal; both mask every eighth row of queries wholly, and the
    first keys, tiles of them where there are many, for another eighth and for the third quarter of the queries. A mask
    of one row hides the first keys, and all keys from the last batch entry or head where there are several. Slopes are
    those of the ALiBi paper (Press et al. 2022, section 3); softcap is 30; dropout is 0.1.

    Decoding: lengths are full, 0 and 1 for the first rows and random for the others; pages are shuffled; places of a
    cache that are never read hold NaN, and table entries of such pages do not exist.

    Packed sequences: the first is the longest, the lengths of the others lie uniformly between a quarter of that and
    all of it. They depend on nothing but the problem, so that it is always timed on the same, and are the same for
    queries and keys where q_len and kv_len are. With `empty` the second has no queries, the third no keys, and the
    fourth neither.

    Raises UnsupportedError for packed sequences with a mask, and pages with more than 16 queries.
    """
    if problem.page_size and problem.q_len > MAX_DECODE_Q_LEN:
        raise UnsupportedError(f"{problem.key}: inputs with pages can be made for q_len up to 16 only")
    if problem.packed:
        return _packed_call(problem, device, seed, empty)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = TORCH_DTYPES[problem.dtype]

    def normal(length: int, heads: int, dim: int, batch: int = problem.batch) -> torch.Tensor:
        if problem.layout is Layout.BHSD:
            shape = (batch, heads, length, dim)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        return torch.randn((batch, length, heads, dim), generator=generator, device=device, dtype=dtype)

    table = _table(problem, generator, device) if problem.page_size else None
    lengths = _lengths(problem, generator, device) if problem.varlen else None
    rows = problem.batch if table is None else table.numel() + SPARE_PAGES
    length = problem.page_size or problem.kv_len
    query = normal(problem.q_len, problem.heads, problem.head_dim)
    key = normal(length, problem.kv_heads, problem.head_dim, rows)
    value = normal(length, problem.kv_heads, problem.v_head_dim, rows)
    if table is not None or lengths is not None:
        _poison(problem, key, value, lengths, table)
    return Call(
        problem=problem,
        query=query,
        key=key,
        value=value,
        scale=problem.head_dim**-0.5,
        mask=_mask(problem, generator, device),
        alibi_slopes=_slopes(problem.heads, device) if problem.alibi else None,
        softcap=SOFTCAP if problem.softcap else 0.0,
        dropout=DROPOUT if problem.dropout else 0.0,
        seed=DROPOUT_SEED + seed,
        kv_lengths=lengths,
        block_table=table,
    )


def _packed_call(problem: Problem, device: torch.device, seed: int, empty: bool) -> Call:
    if problem.mask != "none":
        raise UnsupportedError(f"{problem.key}: packed sequences have no mask; tune the same problem without")
    generator = torch.Generator(device).manual_seed(seed)
    q_lengths, kv_lengths = (_packed_lengths(problem, longest) for longest in (problem.q_len, problem.kv_len))
    if empty:
        for lengths, entry in ((q_lengths, 1), (kv_lengths, 2), (q_lengths, 3), (kv_lengths, 3)):
            if entry < problem.batch:
                lengths[entry] = 0
    cu_q, cu_kv = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (q_lengths, kv_lengths)
    )

    def normal(length: int, heads: int, dim: int) -> torch.Tensor:
        dtype = TORCH_DTYPES[problem.dtype]
        return torch.randn((length, heads, dim), generator=generator, device=device, dtype=dtype)

    return Call(
        problem=problem,
        query=normal(sum(q_lengths), problem.heads, problem.head_dim),
        key=normal(sum(kv_lengths), problem.kv_heads, problem.head_dim),
        value=normal(sum(kv_lengths), problem.kv_heads, problem.v_head_dim),
        scale=problem.head_dim**-0.5,
        alibi_slopes=_slopes(problem.heads, device) if problem.alibi else None,
        softcap=SOFTCAP if problem.softcap else 0.0,
        dropout=DROPOUT if problem.dropout else 0.0,
        seed=DROPOUT_SEED + seed,
        cu_seqlens=(cu_q, cu_kv),
    )


def _packed_lengths(problem: Problem, longest: int) -> list[int]:
    drawn = random.Random(f"{problem.key} {longest}")  # the same in every process
    return [longest, *(drawn.randint(-(-longest // 4), longest) for _ in range(problem.batch - 1))]


def _table(problem: Problem, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    each = -(-problem.kv_len // problem.page_size)
    shuffled = torch.randperm(problem.batch * each + SPARE_PAGES, generator=generator, device=device)
    return shuffled[: problem.batch * each].view(problem.batch, each).to(torch.int32)


def _lengths(problem: Problem, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    shape = (problem.batch,)
    lengths = torch.randint(problem.kv_len + 1, shape, generator=generator, device=device, dtype=torch.int32)
    for row, length in enumerate((problem.kv_len, 0, 1)[: problem.batch]):
        lengths[row] = length
    return lengths


def _poison(
    problem: Problem,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    table: torch.Tensor | None,
) -> None:
    """Fill what no query attends with NaN, and the table entries of pages without a key in reach with nonsense."""
    columns = torch.arange(problem.kv_len, device=key.device)
    held = torch.full((problem.batch,), problem.kv_len, device=key.device) if lengths is None else lengths
    left = (problem.window or (-1, -1))[0]
    first = torch.zeros_like(held) if left == -1 else held - problem.q_len - left
    read = (columns < held[:, None]) & (columns >= first[:, None])
    if table is not None:
        slots = table.long()[:, columns // problem.page_size] * problem.page_size + columns % problem.page_size
        reached = torch.zeros(key.shape[0] * problem.page_size, dtype=torch.bool, device=key.device)
        reached[slots[read]] = True
        in_reach = torch.zeros_like(table, dtype=torch.bool)
        rows, places = read.nonzero(as_tuple=True)
        in_reach[rows, places // problem.page_size] = True
        table.masked_fill_(~in_reach, NO_PAGE)
        read = reached.view(-1, problem.page_size)
    for tensor in (key, value):
        tensor.masked_fill_(~read[:, :, None, None], torch.nan)


def _mask(problem: Problem, generator: torch.Generator, device: torch.device) -> torch.Tensor | None:
    if problem.mask == "none":
        return None
    kind, _, broadcast = problem.mask.partition(".")
    full = (("b1", problem.batch), ("h1", problem.heads), ("q1", problem.q_len), ("k1", problem.kv_len))
    shape = [1 if name in broadcast else size for name, size in full]
    if kind == "bias":
        mask = torch.randn(shape, generator=generator, device=device, dtype=TORCH_DTYPES[problem.dtype])
        _hide(mask, -torch.inf)
    else:
        mask = torch.rand(shape, generator=generator, device=device) < 0.8
        _hide(mask, False)
    return mask


def _hide(mask: torch.Tensor, nothing: float) -> None:
    """Write `nothing`, which no query attends, over whole rows of `mask` and over the first keys of others."""
    rows, keys = mask.shape[2:]
    first = max(WIDE_TILE, keys // 2) if keys > WIDE_TILE else keys // 2
    if rows == 1:  # a mask of the keys, as of a padded batch
        planes = mask.view(-1, keys)
        planes[0, :first] = nothing
        planes[1:][-1:] = nothing
        return
    mask[:, :, rows // 2 : rows * 3 // 4, :first] = nothing
    mask[:, :, 3::8, :first] = nothing
    mask[:, :, 7::8] = nothing


def _slopes(heads: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)], device=device)
