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
from .common import Scoring, features, in_reach, kept, scores, strides, unit_stride
from .ranges import key_range


class Rows(NamedTuple):
    """Rows (seq, columns) of one head of one batch entry, by pointers or through TMA."""

    tensor: Any  # a pointer at (row 0, column 0), or a descriptor of (batch, seq, heads, columns)
    entry: Any  # of the descriptor
    head: Any
    stride: Any  # from one row to the next, of the pointer
    length: Any


@triton.jit
def load_tile(
    rows,  # Rows
    first,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Return rows first..first + BLOCK (BLOCK, BLOCK_COLUMNS), 0 beyond COLUMNS and, where RAGGED, beyond length."""
    if TMA:
        b_tile = rows.tensor.load([rows.entry, first, rows.head, 0]).reshape(BLOCK, BLOCK_COLUMNS)
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
    stop,
    o_m,
    by,  # Scoring
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BORDER: tl.constexpr,
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    FOLD: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys start..stop into the accumulator; BORDER: mask by window and length."""
    log2e: tl.constexpr = 1.4426950408889634
    o_row = o_m[:, None]
    for first in range(start, stop, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        o_key = (first + tl.arange(0, BLOCK_N))[None, :]
        b_k = load_tile(keys, first, BLOCK_N, BLOCK_D, D, BORDER, TMA)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if FOLD:
            # nothing but a positive scale: it goes into the exponent, one fused multiply-add per score
            if BORDER:
                b_s = tl.where(in_reach(o_row, o_key, by), b_s, -float("inf"))
            factor = by.scale * log2e
            b_new = tl.maximum(b_peak, tl.max(b_s, 1) * factor)
        else:
            b_s, _ = scores(b_s, o_row, o_key, by, MASK, ALIBI, SOFTCAP, BORDER)
            factor = 1.0
            b_new = tl.maximum(b_peak, tl.max(b_s, 1))
        # a row that has seen no key yet has the peak -inf: subtract 0 there, so that exp2 gives 0 and not NaN
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new) if BORDER or MASK != 0 else b_new
        b_p = tl.exp2(b_s * factor - b_shift[:, None]) if FOLD else tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_peak - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None]
        if DROPOUT:
            m_keep = kept(by.seed, by.o_place, o_row, o_key, by.q_len, by.kv_len, by.dropout)
            b_p = tl.where(m_keep, b_p, 0.0)
        b_v = load_tile(values, first, BLOCK_N, BLOCK_DV, DV, BORDER, TMA)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_peak = b_new
    return b_acc, b_sum, b_peak


# One compilation serves all lengths: a length that happens to divide by 16 is worth nothing to this kernel.
@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "left", "right", "seed"])
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
    q_len,
    kv_len,
    left,  # NO_LIMIT where unbounded
    right,
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

    o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < q_len
    p_mask = mask + o_entry * stride_mb + o_head * stride_mh if MASK != 0 else mask
    slope = tl.load(slopes + o_entry * stride_ab + o_head * stride_ah) if ALIBI else 0.0
    if TMA:
        p_q, p_k, p_v = query, key, value
    else:
        p_q = query + o_entry * stride_qb + o_head * stride_qh
        p_k = key + o_entry * stride_kb + kv_head.to(tl.int64) * stride_kh
        p_v = value + o_entry * stride_vb + kv_head.to(tl.int64) * stride_vh
    by = Scoring(
        p_mask, stride_mq, stride_mk, slope, seed, o_place, scale, softcap, dropout, q_len, kv_len, left, right
    )
    queries = Rows(p_q, entry, head, stride_qs, q_len)
    keys = Rows(p_k, entry, kv_head, stride_ks, kv_len)
    values = Rows(p_v, entry, kv_head, stride_vs, kv_len)
    b_q = load_tile(queries, block * BLOCK_M, BLOCK_M, BLOCK_D, D, True, TMA)

    first_diagonal = block * BLOCK_M + kv_len - q_len
    start, inside_start, inside_stop, stop = key_range(
        first_diagonal, first_diagonal + BLOCK_M - 1, kv_len, left, right, BLOCK_N, LEFT, RIGHT
    )
    b_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if LEFT:
        b_acc, b_sum, b_peak = _visit(
            b_acc, b_sum, b_peak, b_q, keys, values, start, inside_start, o_m, by, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            True, MASK, ALIBI, SOFTCAP, DROPOUT, FOLD, TMA, PRECISION,
        )  # fmt: skip
    b_acc, b_sum, b_peak = _visit(
        b_acc, b_sum, b_peak, b_q, keys, values, inside_start, inside_stop, o_m, by, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
        False, MASK, ALIBI, SOFTCAP, DROPOUT, FOLD, TMA, PRECISION,
    )  # fmt: skip
    b_acc, b_sum, b_peak = _visit(
        b_acc, b_sum, b_peak, b_q, keys, values, inside_stop, stop, o_m, by, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
        True, MASK, ALIBI, SOFTCAP, DROPOUT, FOLD, TMA, PRECISION,
    )  # fmt: skip

    m_seen = b_sum > 0.0
    b_norm = 1.0 / tl.where(m_seen, b_sum, 1.0)
    if DROPOUT:
        b_norm = b_norm / (1.0 - dropout)
    b_out = b_acc * b_norm[:, None]
    p_out = out + o_entry * stride_ob + o_head * stride_oh + o_m.to(tl.int64)[:, None] * stride_os + o_dv[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & (o_dv < DV)[None, :])
    ln2: tl.constexpr = 0.6931471805599453
    b_lse = tl.where(m_seen, (b_peak + tl.log2(tl.where(m_seen, b_sum, 1.0))) * ln2, -float("inf"))
    tl.store(lse + o_place * q_len + o_m, b_lse, mask=m_m)


def descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """Return a TMA descriptor of a BSHD tensor whose tiles are `rows` of one head, padded to a power of two."""
    block = [1, rows, 1, padded(tensor.shape[-1])]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def describable(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` as TMA takes it: rows and base at multiples of 16 bytes; copied only where they are not."""
    size = tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    return tensor if aligned and tensor.stride(-1) == 1 else tensor.contiguous()


def launch(call: Call, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; return the result (B, Q, H, Dv) and the LSE (B, H, Q) float32.

    With `tma` head_dim and v_head_dim times the element size must be multiples of 16 bytes.
    """
    block_m, block_n, tma = config["block_m"], config["block_n"], config["tma"]
    prepare = describable if tma else unit_stride
    query, key, value = (prepare(tensor) for tensor in (call.query, call.key, call.value))
    batch, q_len, heads, _ = query.shape
    out = query.new_empty(batch, q_len, heads, value.shape[-1])
    lse = query.new_empty(batch, heads, q_len, dtype=torch.float32)
    given = features(call)
    plain = call.mask is None and call.alibi_slopes is None and call.softcap == 0
    tensors: tuple[object, ...] = (query, key, value)
    if tma:
        tensors = (descriptor(query, block_m), descriptor(key, block_n), descriptor(value, block_n))
    with torch.cuda.device_of(query):  # Triton launches on the current device, whatever the tensors are on
        attention_forward[(triton.cdiv(q_len, block_m) * batch * heads,)](
            *tensors,
            out,
            lse,
            **strides(q=query, k=key, v=value, o=out),
            **given.dynamic,
            **given.static,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            FOLD=plain and call.scale > 0,
            TMA=tma,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
    return out, lse
