"""Attention forward in Triton: FlashAttention-2's loop order (Dao 2023, algorithm 1).

One program computes block_m queries of one head over all keys they reach. Keys are visited in up to three stretches:
the left border of the window, the inside, and the right border with the causal diagonal and the ragged end. Only
tiles of the two borders are compared with the window. Names: p_ pointer, b_ block in registers, o_ offset, m_ mask.

Two ways to load a tile: by pointers (sm_80 and up), or through TMA descriptors (sm_90 and up), which pad by themselves.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tilewise.domain.config import Config

from ..call import Call
from ..tiles import padded
from .common import Scoring, batched, features, in_reach, kept, mask_tile, packing, scores, strides, unit_stride
from .padding import pad_columns
from .ranges import key_range


class Rows(NamedTuple):
    """Rows (seq, columns) of one head of one batch entry, by pointers or through TMA."""

    tensor: Any  # a pointer at (row 0, column 0), or a descriptor
    entry: Any  # of the descriptor
    origin: Any  # row 0 in the descriptor's seq
    head: Any
    column: Any  # of the descriptor
    stride: Any  # from one row to the next, of the pointer
    length: Any


@triton.jit
def span(entry, cu_q, cu_kv, q_len, kv_len, q_total, kv_total, VARLEN: tl.constexpr):
    """Return where a batch entry lies in the tensors: their entry, first query, queries, first key and keys.

    With VARLEN all sequences lie in entry 0. Whatever cu_q and cu_kv say, no row outside the tensors is named.
    """
    q_first = 0
    kv_first = 0
    if VARLEN:
        q_first = tl.minimum(tl.maximum(tl.load(cu_q + entry), 0), q_total)
        kv_first = tl.minimum(tl.maximum(tl.load(cu_kv + entry), 0), kv_total)
        q_len = tl.minimum(tl.maximum(tl.load(cu_q + entry + 1), q_first), q_total) - q_first
        kv_len = tl.minimum(tl.maximum(tl.load(cu_kv + entry + 1), kv_first), kv_total) - kv_first
        entry = 0
    return entry, q_first, q_len, kv_first, kv_len


@triton.jit
def rows_of(tensor, entry, origin, head, stride_b, stride_s, stride_h, length, TMA: tl.constexpr):
    """Return the Rows of one head from row `origin` of a batch entry on."""
    if not TMA:
        tensor += tl.cast(entry, tl.int64) * stride_b + tl.cast(origin, tl.int64) * stride_s
        tensor += tl.cast(head, tl.int64) * stride_h
    return Rows(tensor, entry, origin, head, 0, stride_s, length)


@triton.jit
def wide_rows_of(tensor, entry, origin, head, length, COLUMNS: tl.constexpr):
    """Return the Rows of one head in a `wide_descriptor`; behind the head's columns lie the next head's."""
    return Rows(tensor, entry, origin, 0, head * COLUMNS, 0, length)


@triton.jit
def load_tile(
    rows,  # Rows
    first,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    CLEAR: tl.constexpr,
    IN_REGISTERS: tl.constexpr = False,
):
    """Return rows first..first + BLOCK (BLOCK, BLOCK_COLUMNS), 0 beyond COLUMNS and, where RAGGED, beyond length.

    Through TMA rows beyond length are 0 where the tensor ends. Where another sequence follows they may be anything:
    CLEAR sets them to 0, for a product that sums over the rows. IN_REGISTERS is the descriptor's.
    """
    if TMA:
        if IN_REGISTERS:
            b_tile = rows.tensor.load([rows.entry, rows.origin + first, rows.head, rows.column])
        else:
            b_tile = rows.tensor.load([rows.entry, rows.head, rows.origin + first, rows.column])
        b_tile = b_tile.reshape(BLOCK, BLOCK_COLUMNS)
        if CLEAR:
            b_tile = tl.where((first + tl.arange(0, BLOCK) < rows.length)[:, None], b_tile, 0.0)
    else:
        o_row = first + tl.arange(0, BLOCK)
        o_column = tl.arange(0, BLOCK_COLUMNS)
        p_tile = rows.tensor + o_row.to(tl.int64)[:, None] * rows.stride + o_column[None, :]
        m_row = (o_row < rows.length)[:, None]
        m_column = (o_column < COLUMNS)[None, :]
        if RAGGED and COLUMNS != BLOCK_COLUMNS:
            b_tile = tl.load(p_tile, mask=m_row & m_column, other=0.0)
        elif RAGGED:
            b_tile = tl.load(p_tile, mask=m_row, other=0.0)
        elif COLUMNS != BLOCK_COLUMNS:
            b_tile = tl.load(p_tile, mask=m_column, other=0.0)
        else:
            b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def _visit(
    b_acc,  # (BLOCK_M, BLOCK_DV) float32
    b_sum,  # (BLOCK_M,) float32
    b_peak,  # (BLOCK_M,) float32, in units of log2
    b_q,  # (BLOCK_M, BLOCK_D)
    keys,  # Rows
    values,  # Rows
    start,
    inside_start,
    inside_stop,
    stop,
    o_m,
    by,  # Scoring
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BORDER: tl.constexpr,
    ASK: tl.constexpr,
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    FOLD: tl.constexpr,
    TMA: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys start..stop into the accumulator.

    BORDER: a tile may need to be compared with window and length. ASK: but only if it lies outside
    inside_start..inside_stop.
    """
    log2e: tl.constexpr = 1.4426950408889634
    o_row = o_m[:, None]
    for first in range(start, stop, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        o_key = (first + tl.arange(0, BLOCK_N))[None, :]
        b_mask = mask_tile(o_row, o_key, by, MASK)
        b_k = load_tile(keys, first, BLOCK_N, BLOCK_D, D, BORDER, TMA, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if FOLD:  # nothing but a positive scale
            factor = by.scale * log2e
        else:
            factor = log2e
            b_s, _ = scores(b_s, b_mask, o_row, o_key, by, MASK, ALIBI, SOFTCAP, False)
        if ASK:
            if (first < inside_start) | (first >= inside_stop):
                b_s = tl.where(in_reach(o_row, o_key, by), b_s, -float("inf"))
        elif BORDER:
            b_s = tl.where(in_reach(o_row, o_key, by), b_s, -float("inf"))
        # the factor goes into the exponent, one fused multiply-add per score
        b_new = tl.maximum(b_peak, tl.max(b_s, 1) * factor)
        # a row that has seen no key yet has the peak -inf: subtract 0 there, so that exp2 gives 0 and not NaN
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new) if BORDER or MASK != 0 else b_new
        b_p = tl.exp2(b_s * factor - b_shift[:, None])
        b_decay = tl.exp2(b_peak - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None]
        if DROPOUT:
            m_keep = kept(by.seed, by.o_place, o_row, o_key, by.max_q, by.max_kv, by.dropout)
            b_p = tl.where(m_keep, b_p, 0.0)
        b_v = load_tile(values, first, BLOCK_N, BLOCK_DV, DV, BORDER, TMA, VARLEN and BORDER)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_peak = b_new
    return b_acc, b_sum, b_peak


# One compilation serves all lengths: a length that happens to divide by 16 is worth nothing to this kernel.
@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "left", "right", "seed", "q_total", "kv_total"])
def attention_forward(
    query,
    key,
    value,
    out,
    lse,
    mask,
    slopes,
    seed,
    scale,
    softcap,
    dropout,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_ab,
    stride_ah,
    heads,
    q_len,  # with VARLEN, and kv_len too: the longest
    kv_len,
    left,  # NO_LIMIT where unbounded
    right,
    cu_q,  # (B + 1,) int32 with VARLEN
    cu_kv,
    q_total,
    kv_total,
    GROUP: tl.constexpr,  # query heads per key head
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,  # whether the window has a left side
    RIGHT: tl.constexpr,  # whether it has a right side; causal is right = 0
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    FOLD: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,  # whether value is a wide_descriptor
    IN_REGISTERS: tl.constexpr,  # whether query is to stay there
    VARLEN: tl.constexpr,
    ONE_LOOP: tl.constexpr,  # whether borders and inside are visited in one
    PRECISION: tl.constexpr,
):
    """Grid (batch * heads * blocks of queries). The last dimension of every tensor has stride 1."""
    # one dimension: the others end at 65535 programs, which batch * heads may exceed
    blocks = tl.cdiv(q_len, BLOCK_M)
    place = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if RIGHT:  # the last block of a causal problem has the most keys: start with it
        block = blocks - 1 - block
    entry = place // heads
    head = place % heads
    kv_head = head // GROUP
    o_place = place.to(tl.int64)
    o_entry = entry.to(tl.int64)
    o_head = head.to(tl.int64)
    max_q, max_kv = q_len, kv_len
    batch, q_first, q_len, kv_first, kv_len = span(entry, cu_q, cu_kv, q_len, kv_len, q_total, kv_total, VARLEN)
    if VARLEN:  # noqa: SIM102  compiled away without
        if block * BLOCK_M >= q_len:
            return

    o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < q_len
    p_mask = mask + o_entry * stride_mb + o_head * stride_mh if MASK != 0 else mask
    slope = tl.load(slopes + o_entry * stride_ab + o_head * stride_ah) if ALIBI else 0.0
    by = Scoring(
        p_mask, stride_mq, stride_mk, slope, seed, o_place, scale, softcap, dropout, q_len, kv_len, max_q, max_kv,
        left, right,
    )  # fmt: skip
    queries = rows_of(query, batch, q_first, head, stride_qb, stride_qs, stride_qh, q_len, TMA)
    keys = rows_of(key, batch, kv_first, kv_head, stride_kb, stride_ks, stride_kh, kv_len, TMA)
    if WIDE:
        values = wide_rows_of(value, batch, kv_first, kv_head, kv_len, DV)
    else:
        values = rows_of(value, batch, kv_first, kv_head, stride_vb, stride_vs, stride_vh, kv_len, TMA)
    b_q = load_tile(queries, block * BLOCK_M, BLOCK_M, BLOCK_D, D, True, TMA, False, IN_REGISTERS)

    first_diagonal = block * BLOCK_M + kv_len - q_len
    start, inside_start, inside_stop, stop = key_range(
        first_diagonal, first_diagonal + BLOCK_M - 1, kv_len, left, right, BLOCK_N, LEFT, RIGHT
    )
    b_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if ONE_LOOP:
        b_acc, b_sum, b_peak = _visit(
            b_acc, b_sum, b_peak, b_q, keys, values, start, inside_start, inside_stop, stop, o_m, by, D, DV, BLOCK_D,
            BLOCK_DV, BLOCK_N, True, True, MASK, ALIBI, SOFTCAP, DROPOUT, FOLD, TMA, VARLEN, PRECISION,
        )  # fmt: skip
    else:
        if LEFT:
            b_acc, b_sum, b_peak = _visit(
                b_acc, b_sum, b_peak, b_q, keys, values, start, 0, 0, inside_start, o_m, by, D, DV, BLOCK_D,
                BLOCK_DV, BLOCK_N, True, False, MASK, ALIBI, SOFTCAP, DROPOUT, FOLD, TMA, VARLEN, PRECISION,
            )  # fmt: skip
        b_acc, b_sum, b_peak = _visit(
            b_acc, b_sum, b_peak, b_q, keys, values, inside_start, 0, 0, inside_stop, o_m, by, D, DV, BLOCK_D,
            BLOCK_DV, BLOCK_N, False, False, MASK, ALIBI, SOFTCAP, DROPOUT, FOLD, TMA, VARLEN, PRECISION,
        )  # fmt: skip
        b_acc, b_sum, b_peak = _visit(
            b_acc, b_sum, b_peak, b_q, keys, values, inside_stop, 0, 0, stop, o_m, by, D, DV, BLOCK_D,
            BLOCK_DV, BLOCK_N, True, False, MASK, ALIBI, SOFTCAP, DROPOUT, FOLD, TMA, VARLEN, PRECISION,
        )  # fmt: skip

    m_seen = b_sum > 0.0
    b_norm = 1.0 / tl.where(m_seen, b_sum, 1.0)
    if DROPOUT:
        b_norm = b_norm / (1.0 - dropout)
    b_out = b_acc * b_norm[:, None]
    outs = rows_of(out, batch, q_first, head, stride_ob, stride_os, stride_oh, q_len, False)
    p_out = outs.tensor + o_m.to(tl.int64)[:, None] * stride_os + o_dv[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & (o_dv < DV)[None, :])
    ln2: tl.constexpr = 0.6931471805599453
    b_lse = tl.where(m_seen, (b_peak + tl.log2(tl.where(m_seen, b_sum, 1.0))) * ln2, -float("inf"))
    o_lse = o_head * q_total + q_first if VARLEN else o_place * q_len
    tl.store(lse + o_lse + o_m, b_lse, mask=m_m)


def descriptor(tensor: torch.Tensor, rows: int, *, in_registers: bool = False) -> TensorDescriptor:
    """Return a TMA descriptor of a BSHD tensor whose tiles are `rows` of one head, padded to a power of two.

    Where a tile's dimensions of 1 come first, they vanish in the load, and a product takes its left side from shared
    memory; in the order of the tensor it takes it from registers.
    """
    columns = padded(tensor.shape[-1])
    tensor = tensor if in_registers else tensor.transpose(1, 2)
    block = [1, rows, 1, columns] if in_registers else [1, 1, rows, columns]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def adjacent_heads(tensor: torch.Tensor) -> bool:
    """Whether a tile of a BSHD tensor is narrower than its block and runs into the next head."""
    columns = tensor.shape[-1]
    return columns != padded(columns) and tensor.stride(2) == columns


def wide_descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """Return a TMA descriptor of a BSHD tensor with `adjacent_heads`, all heads in one row.

    A tile has the columns of the next head where `descriptor` has zeros, which take L2 twice the requests to fill in
    (docs/notes/triton.md). It serves values, whose columns do not meet in the product.
    """
    batch, length, heads, columns = tensor.shape
    stride_b, stride_s = tensor.stride()[:2]
    shape, steps = [batch, 1, length, heads * columns], [stride_b, stride_b, stride_s, 1]
    return TensorDescriptor(tensor, shape, steps, [1, 1, rows, padded(columns)])


def describable(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` as TMA takes it: rows and base at multiples of 16 bytes; copied only where they are not."""
    size = tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    return tensor if aligned and tensor.stride(-1) == 1 else tensor.contiguous()


def launch(call: Call, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; return the result (B, Q, H, Dv) and the LSE (B, H, Q) float32, packed as the call is.

    With `tma` head_dim and v_head_dim times the element size must be multiples of 16 bytes; with `in_registers` the
    queries stay there; with `padded` what is visited through TMA is copied to the width of a tile first.
    """
    in_registers = bool(config.as_dict().get("in_registers"))
    problem, block_m, block_n, tma = call.problem, config["block_m"], config["block_n"], config["tma"]
    prepare = describable if tma else unit_stride
    query, key, value = (prepare(batched(tensor)) for tensor in (call.query, call.key, call.value))
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=torch.float32)
    given = features(call)
    plain = call.mask is None and call.alibi_slopes is None and call.softcap == 0
    tensors: tuple[object, ...] = (query, key, value)
    wide = tma and adjacent_heads(value)
    if config.as_dict().get("padded"):
        key, value = pad_columns(key), value if wide else pad_columns(value)
    if tma:
        values = wide_descriptor(value, block_n) if wide else descriptor(value, block_n)
        tensors = (descriptor(query, block_m, in_registers=in_registers), descriptor(key, block_n), values)
    with torch.cuda.device_of(query):  # Triton launches on the current device, whatever the tensors are on
        attention_forward[(triton.cdiv(problem.q_len, block_m) * problem.batch * problem.heads,)](
            *tensors,
            out,
            lse,
            **strides(q=query, k=key, v=value, o=out),
            **given.dynamic,
            **given.static,
            **packing(call),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            FOLD=plain and call.scale > 0,
            TMA=tma,
            WIDE=wide,
            IN_REGISTERS=in_registers,
            ONE_LOOP=bool(config.as_dict().get("one_loop")),
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
    return (out, lse) if call.cu_seqlens is None else (out[0], lse[0])
