"""Attention backward in Triton, after FlashAttention-2 (Dao 2023, algorithm 2), split in kernels without atomics.

    delta    row sums of result times its gradient
    dkdv     one program per block of keys and key head: visits the queries of its whole group that reach it
    dq       one program per block of queries and head: visits the keys it reaches

The gradient of an additive mask is in bias.py. Each kernel writes its own tensor once, so the gradients are the same
bits every time. Weights are recomputed from the LSE.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tilewise.domain.config import Config

from ..call import Call
from ..tiles import padded
from .common import Scoring, batched, features, in_reach, kept, mask_tile, packing, scores, strides, unit_stride
from .forward import describable, descriptor, load_tile, rows_of, span
from .padding import pad_columns
from .ranges import key_range, query_range

LSE_ROWS = tl.constexpr(128)  # the longest tile of queries that a backward kernel visits


@triton.jit
def lse_rows(q_len):
    """Return how many rows of lse2 and delta a head has: whole tiles of queries, whose loads need no mask."""
    return tl.cdiv(q_len, LSE_ROWS) * LSE_ROWS


@triton.jit
def weights_and_gradient(
    b_s,  # query @ key.T, or its transpose
    b_dp,  # grad_out @ value.T, or its transpose
    b_lse,  # broadcast over the keys, in units of log2; +inf where there is nothing to attend
    b_delta,  # broadcast over the keys
    b_mask,  # mask_tile
    o_row,
    o_key,
    by,  # Scoring
    BORDER: tl.constexpr,
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Return the weights that multiply the values, the gradient of the scores, and that of query @ key.T / scale."""
    log2e: tl.constexpr = 1.4426950408889634
    if MASK == 0 and not ALIBI and not SOFTCAP:
        factor = by.scale * log2e
        b_tanh = b_s
        if BORDER:
            b_s = tl.where(in_reach(o_row, o_key, by), b_s, -float("inf"))
    else:
        factor = log2e
        b_s, b_tanh = scores(b_s, b_mask, o_row, o_key, by, MASK, ALIBI, SOFTCAP, BORDER)
    b_p = tl.exp2(b_s * factor - b_lse)
    b_dropped = b_p
    if DROPOUT:
        m_keep = kept(by.seed, by.o_place, o_row, o_key, by.max_q, by.max_kv, by.dropout)
        b_dropped = tl.where(m_keep, b_p / (1.0 - by.dropout), 0.0)
        b_dp = tl.where(m_keep, b_dp / (1.0 - by.dropout), 0.0)
    b_ds = b_p * (b_dp - b_delta)
    b_draw = b_ds
    if SOFTCAP:
        b_draw = b_ds * (1.0 - b_tanh * b_tanh)
    return b_dropped, b_ds, b_draw


@triton.jit(do_not_specialize=["heads", "q_len"])
def delta_rows(
    out,
    grad_out,
    lse,
    delta,
    lse2,
    stride_ob,
    stride_os,
    stride_oh,
    stride_gb,
    stride_gs,
    stride_gh,
    heads,
    q_len,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta = sum(out * grad_out); lse2 = lse in units of log2, +inf for rows with nothing to attend.

    Grid (batch * heads * blocks of rows). lse is dense (batch, heads, q_len), delta and lse2 are (batch, heads,
    lse_rows), 0 and +inf behind q_len.
    """
    blocks = lse_rows(q_len) // BLOCK
    place = tl.program_id(0) // blocks
    o_row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    o_dv = tl.arange(0, BLOCK_DV)
    m_row = o_row < q_len
    m_tile = m_row[:, None] & (o_dv < DV)[None, :]
    o_entry = (place // heads).to(tl.int64)
    o_head = (place % heads).to(tl.int64)
    o_long = o_row.to(tl.int64)[:, None]
    p_out = out + o_entry * stride_ob + o_head * stride_oh + o_long * stride_os + o_dv[None, :]
    p_grad = grad_out + o_entry * stride_gb + o_head * stride_gh + o_long * stride_gs + o_dv[None, :]
    b_out = tl.load(p_out, mask=m_tile, other=0.0).to(tl.float32)
    b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
    o_first = place.to(tl.int64) * lse_rows(q_len) + o_row
    tl.store(delta + o_first, tl.sum(b_out * b_grad, 1))
    b_lse = tl.load(lse + place.to(tl.int64) * q_len + o_row, mask=m_row, other=-float("inf"))
    log2e: tl.constexpr = 1.4426950408889634
    tl.store(lse2 + o_first, tl.where(b_lse == -float("inf"), float("inf"), b_lse * log2e))


@triton.jit
def _visit_queries(
    b_dk,  # (BLOCK_N, BLOCK_D) float32
    b_dv,  # (BLOCK_N, BLOCK_DV) float32
    b_k,
    b_v,
    queries,  # Rows
    grads_out,  # Rows
    p_lse,
    p_delta,
    start,
    stop,
    o_key,  # (BLOCK_N, 1)
    by,  # Scoring
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BORDER: tl.constexpr,
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what queries start..stop give to the gradients of one block of keys; tiles are transposed (N, M)."""
    for first in range(start, stop, BLOCK_M):
        first = tl.multiple_of(first, BLOCK_M)
        o_m = first + tl.arange(0, BLOCK_M)
        b_q = load_tile(queries, first, BLOCK_M, BLOCK_D, D, True, TMA, VARLEN and BORDER)
        if VARLEN:
            b_lse = tl.load(p_lse + o_m, mask=o_m < by.q_len, other=float("inf"))
        else:
            b_lse = tl.load(p_lse + o_m)
        b_mask = mask_tile(o_m[None, :], o_key, by, MASK)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_do = load_tile(grads_out, first, BLOCK_M, BLOCK_DV, DV, True, TMA, VARLEN and BORDER)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        if VARLEN:
            b_delta = tl.load(p_delta + o_m, mask=o_m < by.q_len, other=0.0)
        else:
            b_delta = tl.load(p_delta + o_m)
        b_p, _, b_draw = weights_and_gradient(
            b_s,
            b_dp,
            b_lse[None, :],
            b_delta[None, :],
            b_mask,
            o_m[None, :],
            o_key,
            by,
            BORDER,
            MASK,
            ALIBI,
            SOFTCAP,
            DROPOUT,
        )
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(b_draw.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "left", "right", "seed", "q_total", "kv_total"])
def dkdv_kernel(
    query,
    key,
    value,
    grad_out,
    lse2,
    delta,
    grad_key,
    grad_value,
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
    stride_gb,
    stride_gs,
    stride_gh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_ab,
    stride_ah,
    heads,
    q_len,
    kv_len,
    left,
    right,
    cu_q,
    cu_kv,
    q_total,
    kv_total,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    IN_REGISTERS: tl.constexpr,  # whether the tiles that a program keeps are to stay there
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (batch * kv_heads * blocks of keys). grad_key (B, K, Hkv, D) and grad_value (B, K, Hkv, Dv) are dense."""
    blocks = tl.cdiv(kv_len, BLOCK_N)
    kv_heads = heads // GROUP
    block = tl.program_id(0) % blocks  # the first keys of a causal problem have the most queries, and come first
    entry = tl.program_id(0) // blocks // kv_heads
    kv_head = tl.program_id(0) // blocks % kv_heads
    o_entry = entry.to(tl.int64)
    max_q, max_kv = q_len, kv_len
    batch, q_first, q_len, kv_first, kv_len = span(entry, cu_q, cu_kv, q_len, kv_len, q_total, kv_total, VARLEN)
    if VARLEN:  # noqa: SIM102  compiled away without
        if block * BLOCK_N >= kv_len:
            return
    o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = rows_of(key, batch, kv_first, kv_head, stride_kb, stride_ks, stride_kh, kv_len, TMA)
    values = rows_of(value, batch, kv_first, kv_head, stride_vb, stride_vs, stride_vh, kv_len, TMA)
    b_k = load_tile(keys, block * BLOCK_N, BLOCK_N, BLOCK_D, D, True, TMA, False, IN_REGISTERS)
    b_v = load_tile(values, block * BLOCK_N, BLOCK_N, BLOCK_DV, DV, True, TMA, False, IN_REGISTERS)

    # rows beyond q_len weigh nothing (their LSE is +inf), and gradients of keys beyond kv_len are not stored
    first_row = block * BLOCK_N - (kv_len - q_len)
    start, inside_start, inside_stop, stop = query_range(
        first_row, first_row + BLOCK_N - 1, q_len, left, right, BLOCK_M, LEFT, RIGHT, VARLEN and TMA
    )
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    o_key = o_n[:, None]
    for member in range(GROUP):
        head = kv_head * GROUP + member
        o_head = head.to(tl.int64)
        o_place = o_entry * heads + o_head
        p_mask = mask + o_entry * stride_mb + o_head * stride_mh if MASK != 0 else mask
        slope = tl.load(slopes + o_entry * stride_ab + o_head * stride_ah) if ALIBI else 0.0
        o_lse = o_head * lse_rows(q_total) + q_first if VARLEN else o_place * lse_rows(q_len)
        p_lse = lse2 + o_lse
        p_delta = delta + o_lse
        by = Scoring(
            p_mask, stride_mq, stride_mk, slope, seed, o_place, scale, softcap, dropout, q_len, kv_len, max_q, max_kv,
            left, right,
        )  # fmt: skip
        queries = rows_of(query, batch, q_first, head, stride_qb, stride_qs, stride_qh, q_len, TMA)
        grads_out = rows_of(grad_out, batch, q_first, head, stride_gb, stride_gs, stride_gh, q_len, TMA)
        if RIGHT:
            b_dk, b_dv = _visit_queries(
                b_dk, b_dv, b_k, b_v, queries, grads_out, p_lse, p_delta, start, inside_start, o_key, by,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, True, MASK, ALIBI, SOFTCAP, DROPOUT, TMA, VARLEN, PRECISION,
            )  # fmt: skip
        b_dk, b_dv = _visit_queries(
            b_dk, b_dv, b_k, b_v, queries, grads_out, p_lse, p_delta, inside_start, inside_stop, o_key, by,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, False, MASK, ALIBI, SOFTCAP, DROPOUT, TMA, VARLEN, PRECISION,
        )  # fmt: skip
        if LEFT or (VARLEN and TMA):
            b_dk, b_dv = _visit_queries(
                b_dk, b_dv, b_k, b_v, queries, grads_out, p_lse, p_delta, inside_stop, stop, o_key, by,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, True, MASK, ALIBI, SOFTCAP, DROPOUT, TMA, VARLEN, PRECISION,
            )  # fmt: skip

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_first = kv_first if VARLEN else o_entry * kv_len
    o_row = ((o_first + o_n.to(tl.int64)) * kv_heads + kv_head)[:, None]
    m_row = (o_n < kv_len)[:, None]
    p_dk = grad_key + o_row * D + o_d[None, :]
    p_dv = grad_value + o_row * DV + o_dv[None, :]
    tl.store(p_dk, (b_dk * scale).to(grad_key.dtype.element_ty), mask=m_row & (o_d < D)[None, :])
    tl.store(p_dv, b_dv.to(grad_value.dtype.element_ty), mask=m_row & (o_dv < DV)[None, :])


@triton.jit
def _visit_keys(
    b_dq,  # (BLOCK_M, BLOCK_D) float32
    b_q,
    b_do,
    b_lse,
    b_delta,
    keys,  # Rows
    values,  # Rows
    start,
    stop,
    o_row,  # (BLOCK_M, 1)
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
    TMA: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what keys start..stop give to the gradient of one block of queries."""
    for first in range(start, stop, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        o_key = (first + tl.arange(0, BLOCK_N))[None, :]
        b_k = load_tile(keys, first, BLOCK_N, BLOCK_D, D, BORDER, TMA, VARLEN and BORDER)
        b_mask = mask_tile(o_row, o_key, by, MASK)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_v = load_tile(values, first, BLOCK_N, BLOCK_DV, DV, BORDER, TMA, VARLEN and BORDER)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        _, _, b_draw = weights_and_gradient(
            b_s, b_dp, b_lse[:, None], b_delta[:, None], b_mask, o_row, o_key, by, BORDER, MASK, ALIBI, SOFTCAP, DROPOUT
        )
        b_dq = tl.dot(b_draw.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "left", "right", "seed", "q_total", "kv_total"])
def dq_kernel(
    query,
    key,
    value,
    grad_out,
    lse2,
    delta,
    grad_query,
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
    stride_gb,
    stride_gs,
    stride_gh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_ab,
    stride_ah,
    heads,
    q_len,
    kv_len,
    left,
    right,
    cu_q,
    cu_kv,
    q_total,
    kv_total,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    IN_REGISTERS: tl.constexpr,  # whether the tiles that a program keeps are to stay there
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (batch * heads * blocks of queries). grad_query (B, Q, H, D) is dense. The visits are the forward's."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    place = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if RIGHT:
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
    m_m = o_m < q_len
    p_mask = mask + o_entry * stride_mb + o_head * stride_mh if MASK != 0 else mask
    slope = tl.load(slopes + o_entry * stride_ab + o_head * stride_ah) if ALIBI else 0.0
    by = Scoring(
        p_mask, stride_mq, stride_mk, slope, seed, o_place, scale, softcap, dropout, q_len, kv_len, max_q, max_kv,
        left, right,
    )  # fmt: skip
    queries = rows_of(query, batch, q_first, head, stride_qb, stride_qs, stride_qh, q_len, TMA)
    grads_out = rows_of(grad_out, batch, q_first, head, stride_gb, stride_gs, stride_gh, q_len, TMA)
    keys = rows_of(key, batch, kv_first, kv_head, stride_kb, stride_ks, stride_kh, kv_len, TMA)
    values = rows_of(value, batch, kv_first, kv_head, stride_vb, stride_vs, stride_vh, kv_len, TMA)
    b_q = load_tile(queries, block * BLOCK_M, BLOCK_M, BLOCK_D, D, True, TMA, False, IN_REGISTERS)
    b_do = load_tile(grads_out, block * BLOCK_M, BLOCK_M, BLOCK_DV, DV, True, TMA, False, IN_REGISTERS)
    o_lse = o_head * lse_rows(q_total) + q_first if VARLEN else o_place * lse_rows(q_len)
    b_lse = tl.load(lse2 + o_lse + o_m, mask=m_m, other=float("inf"))
    b_delta = tl.load(delta + o_lse + o_m, mask=m_m, other=0.0)

    first_diagonal = block * BLOCK_M + kv_len - q_len
    start, inside_start, inside_stop, stop = key_range(
        first_diagonal, first_diagonal + BLOCK_M - 1, kv_len, left, right, BLOCK_N, LEFT, RIGHT
    )
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    o_row = o_m[:, None]
    if LEFT:
        b_dq = _visit_keys(
            b_dq, b_q, b_do, b_lse, b_delta, keys, values, start, inside_start, o_row, by,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, MASK, ALIBI, SOFTCAP, DROPOUT, TMA, VARLEN, PRECISION,
        )  # fmt: skip
    b_dq = _visit_keys(
        b_dq, b_q, b_do, b_lse, b_delta, keys, values, inside_start, inside_stop, o_row, by,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, False, MASK, ALIBI, SOFTCAP, DROPOUT, TMA, VARLEN, PRECISION,
    )  # fmt: skip
    b_dq = _visit_keys(
        b_dq, b_q, b_do, b_lse, b_delta, keys, values, inside_stop, stop, o_row, by,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, MASK, ALIBI, SOFTCAP, DROPOUT, TMA, VARLEN, PRECISION,
    )  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    o_first = q_first if VARLEN else o_entry * q_len
    p_dq = grad_query + ((o_first + o_m.to(tl.int64)) * heads + head)[:, None] * D + o_d[None, :]
    tl.store(p_dq, (b_dq * scale).to(grad_query.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the backward kernels share: the result's gradient (B, Q, H, Dv), and LSE (in log2) and delta, float32.

    The last two are (B, H, Q), or (1, H, total_q) of a packed call, whose gradient is then a batch of one, with rows
    up to a multiple of LSE_ROWS.
    """

    call: Call
    grad_out: torch.Tensor
    lse2: torch.Tensor
    delta: torch.Tensor


def prepare(call: Call, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor) -> Prepared:
    """Compute delta once for all kernels; `lse` is the forward's."""
    out, grad_out = (unit_stride(batched(tensor)) for tensor in (out, grad_out))
    batch, q_len, heads, v_head_dim = out.shape
    rows, block = triton.cdiv(q_len, LSE_ROWS.value) * LSE_ROWS.value, 64
    delta, lse2 = (lse.new_empty(batch, heads, rows) for _ in range(2))
    with torch.cuda.device_of(out):
        delta_rows[(rows // block * batch * heads,)](
            out,
            grad_out,
            lse,
            delta,
            lse2,
            *out.stride()[:3],
            *grad_out.stride()[:3],
            heads,
            q_len,
            DV=v_head_dim,
            BLOCK_DV=padded(v_head_dim),
            BLOCK=block,
        )
    return Prepared(call, grad_out, lse2, delta)


def launch_dkdv(prepared: Prepared, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of key and value, in their shapes, dense."""
    call, problem = prepared.call, prepared.call.problem
    grad_key, grad_value = (tensor.new_empty(tensor.shape) for tensor in (call.key, call.value))
    grid = (triton.cdiv(problem.kv_len, config["block_n"]) * problem.batch * problem.kv_heads,)
    _launch(dkdv_kernel, grid, prepared, (grad_key, grad_value), config)
    return grad_key, grad_value


def launch_dq(prepared: Prepared, config: Config) -> torch.Tensor:
    """Return the gradient of query, in its shape, dense."""
    call, problem = prepared.call, prepared.call.problem
    grad_query = call.query.new_empty(call.query.shape)
    grid = (triton.cdiv(problem.q_len, config["block_m"]) * problem.batch * problem.heads,)
    _launch(dq_kernel, grid, prepared, (grad_query,), config)
    return grad_query


def _launch(
    kernel: triton.JITFunction,
    grid: tuple[int],
    prepared: Prepared,
    outputs: tuple[torch.Tensor, ...],
    config: Config,
) -> None:
    call, tma, chosen = prepared.call, bool(config["tma"]), config.as_dict()
    ready = describable if tma else unit_stride
    query, key, value, grad_out = (
        ready(batched(tensor)) for tensor in (call.query, call.key, call.value, prepared.grad_out)
    )
    keeps_keys = kernel is dkdv_kernel
    if chosen.get("padded") and keeps_keys:
        query, grad_out = pad_columns(query), pad_columns(grad_out)
    elif chosen.get("padded"):
        key, value = pad_columns(key), pad_columns(value)
    tensors: tuple[object, ...] = (query, key, value, grad_out)
    in_registers = bool(chosen.get("in_registers"))
    if tma:
        block_m, block_n = config["block_m"], config["block_n"]
        of_queries, of_keys = in_registers and not keeps_keys, in_registers and keeps_keys
        tensors = (
            descriptor(query, block_m, in_registers=of_queries),
            descriptor(key, block_n, in_registers=of_keys),
            descriptor(value, block_n, in_registers=of_keys),
            descriptor(grad_out, block_m, in_registers=of_queries),
        )
    given = features(call)
    with torch.cuda.device_of(query):
        kernel[grid](
            *tensors,
            prepared.lse2,
            prepared.delta,
            *outputs,
            **strides(q=query, k=key, v=value, g=grad_out),
            **given.dynamic,
            **given.static,
            **packing(call),
            BLOCK_M=config["block_m"],
            BLOCK_N=config["block_n"],
            TMA=tma,
            IN_REGISTERS=in_registers,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
