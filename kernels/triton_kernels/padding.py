"""Copies whose rows are as wide as a tile: TMA fills what lies outside a tensor slowly (docs/notes/triton.md)."""

import torch
import triton
import triton.language as tl

from ..tiles import padded

ROWS = 64


@triton.jit(do_not_specialize=["length", "heads", "rows"])
def _copy(
    source,
    target,  # dense
    stride_b,
    stride_s,
    stride_h,
    length,
    heads,
    rows,  # batch * length * heads
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_flat = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = (o_flat < rows)[:, None]
    o_column = tl.arange(0, BLOCK)
    o_source = o_flat // heads // length * stride_b + o_flat // heads % length * stride_s + o_flat % heads * stride_h
    p_source = source + o_source[:, None] + o_column[None, :]
    b_tile = tl.load(p_source, mask=m_row & (o_column < COLUMNS)[None, :], other=0.0)
    tl.store(target + o_flat[:, None] * BLOCK + o_column[None, :], b_tile, mask=m_row)


def pad_columns(tensor: torch.Tensor) -> torch.Tensor:
    """Return a BSHD tensor, whose last stride is 1, with columns of zeros up to a power of two."""
    batch, length, heads, columns = tensor.shape
    block = padded(columns)
    out = tensor.new_empty(batch, length, heads, block)
    rows = batch * length * heads
    with torch.cuda.device_of(tensor):
        _copy[(triton.cdiv(rows, ROWS),)](
            tensor, out, *tensor.stride()[:3], length, heads, rows, COLUMNS=columns, BLOCK=block, ROWS=ROWS
        )
    return out
