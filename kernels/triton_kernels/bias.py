"""Gradient of an additive mask in Triton: one program per tile of the mask, no atomics.

A program sums over the batch entries, heads, rows and columns along which the mask broadcasts, recomputing the weights
of each from the LSE: twice the products of a forward, and nothing of the size of the scores in memory.
"""

import torch
import triton
import triton.language as tl

from ..call import Call
from .backward import Prepared, lse_rows, weights_and_gradient
from .common import ALIGNED_BIAS, BIAS, Scoring, features, mask_tile, strides, unit_stride
from .forward import load_tile, rows_of

BLOCK_M, BLOCK_N = 64, 64


@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "left", "right", "seed", "batch"])
def dbias_kernel(
    query,
    key,
    value,
    grad_out,
    lse2,
    delta,
    grad_mask,
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
    batch,
    heads,
    q_len,
    kv_len,
    left,
    right,
    ONE_B: tl.constexpr,  # the mask broadcasts over the batch
    ONE_H: tl.constexpr,
    ONE_Q: tl.constexpr,
    ONE_K: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,  # noqa: ARG001  every tile is compared with the window here
    RIGHT: tl.constexpr,  # noqa: ARG001
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles of the mask): its batch entries, heads, blocks of rows, blocks of columns, the last fastest."""
    q_blocks = tl.cdiv(q_len, BLOCK_M)
    k_blocks = tl.cdiv(kv_len, BLOCK_N)
    mask_q_blocks = 1 if ONE_Q else q_blocks
    mask_k_blocks = 1 if ONE_K else k_blocks
    mask_heads = 1 if ONE_H else heads
    tile = tl.program_id(0)
    k_tile = tile % mask_k_blocks
    q_tile = tile // mask_k_blocks % mask_q_blocks
    mask_head = tile // mask_k_blocks // mask_q_blocks % mask_heads
    mask_entry = tile // mask_k_blocks // mask_q_blocks // mask_heads

    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for place in range((batch if ONE_B else 1) * (heads if ONE_H else 1)):
        entry = place // heads if ONE_B and ONE_H else place if ONE_B else mask_entry
        head = place % heads if ONE_B and ONE_H else place if ONE_H else mask_head
        o_entry = tl.cast(entry, tl.int64)
        o_head = tl.cast(head, tl.int64)
        o_place = o_entry * heads + o_head
        p_mask = mask + o_entry * stride_mb + o_head * stride_mh
        slope = tl.load(slopes + o_entry * stride_ab + o_head * stride_ah) if ALIBI else 0.0
        queries = rows_of(query, entry, 0, head, stride_qb, stride_qs, stride_qh, q_len, False)
        keys = rows_of(key, entry, 0, head // GROUP, stride_kb, stride_ks, stride_kh, kv_len, False)
        values = rows_of(value, entry, 0, head // GROUP, stride_vb, stride_vs, stride_vh, kv_len, False)
        grads_out = rows_of(grad_out, entry, 0, head, stride_gb, stride_gs, stride_gh, q_len, False)
        by = Scoring(
            p_mask, stride_mq, stride_mk, slope, seed, o_place, scale, softcap, dropout, q_len, kv_len, q_len, kv_len,
            left, right,
        )  # fmt: skip
        for q_block in range(0 if ONE_Q else q_tile, q_blocks if ONE_Q else q_tile + 1):
            o_m = q_block * BLOCK_M + tl.arange(0, BLOCK_M)
            first_diagonal = q_block * BLOCK_M + kv_len - q_len
            for k_block in range(0 if ONE_K else k_tile, k_blocks if ONE_K else k_tile + 1):
                o_n = k_block * BLOCK_N + tl.arange(0, BLOCK_N)
                reached = (k_block * BLOCK_N <= first_diagonal + BLOCK_M - 1 + right) & (
                    k_block * BLOCK_N + BLOCK_N - 1 >= first_diagonal - left
                )
                if reached:
                    b_q = load_tile(queries, q_block * BLOCK_M, BLOCK_M, BLOCK_D, D, True, False, False)
                    b_k = load_tile(keys, k_block * BLOCK_N, BLOCK_N, BLOCK_D, D, True, False, False)
                    b_mask = mask_tile(o_m[:, None], o_n[None, :], by, MASK)
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
                    b_do = load_tile(grads_out, q_block * BLOCK_M, BLOCK_M, BLOCK_DV, DV, True, False, False)
                    b_v = load_tile(values, k_block * BLOCK_N, BLOCK_N, BLOCK_DV, DV, True, False, False)
                    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
                    b_lse = tl.load(lse2 + o_place * lse_rows(q_len) + o_m, mask=o_m < q_len, other=float("inf"))
                    b_delta = tl.load(delta + o_place * lse_rows(q_len) + o_m, mask=o_m < q_len, other=0.0)
                    _, b_ds, _ = weights_and_gradient(
                        b_s, b_dp, b_lse[:, None], b_delta[:, None], b_mask, o_m[:, None], o_n[None, :], by, True,
                        MASK, ALIBI, SOFTCAP, DROPOUT,
                    )  # fmt: skip
                    b_sum += b_ds

    # grad_mask is dense in the mask's own shape
    rows = 1 if ONE_Q else q_len
    columns = 1 if ONE_K else kv_len
    o_row = (0 if ONE_Q else q_tile * BLOCK_M) + tl.arange(0, BLOCK_M)
    o_column = (0 if ONE_K else k_tile * BLOCK_N) + tl.arange(0, BLOCK_N)
    if ONE_Q:
        b_sum = tl.broadcast_to(tl.sum(b_sum, 0)[None, :], (BLOCK_M, BLOCK_N))
    if ONE_K:
        b_sum = tl.broadcast_to(tl.sum(b_sum, 1)[:, None], (BLOCK_M, BLOCK_N))
    o_tile = (mask_entry * mask_heads + mask_head).to(tl.int64) * rows * columns
    p_tile = grad_mask + o_tile + o_row.to(tl.int64)[:, None] * columns + o_column[None, :]
    m_tile = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    tl.store(p_tile, b_sum.to(grad_mask.dtype.element_ty), mask=m_tile)


def launch_dbias(prepared: Prepared) -> torch.Tensor:
    """Return the gradient of `call.mask`, an additive mask, in its own shape."""
    call: Call = prepared.call
    mask = call.mask
    assert mask is not None, "only an additive mask has a gradient"
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    ones = [size == 1 for size in shape]
    query, key, value, grad_out = (
        unit_stride(tensor) for tensor in (call.query, call.key, call.value, prepared.grad_out)
    )
    grad_mask = torch.empty(shape, dtype=mask.dtype, device=mask.device)
    tiles = shape[0] * shape[1] * triton.cdiv(shape[2], BLOCK_M) * triton.cdiv(shape[3], BLOCK_N)
    given = features(call)
    assert given.static["MASK"] in (BIAS, ALIGNED_BIAS)
    with torch.cuda.device_of(query):
        dbias_kernel[(tiles,)](
            query,
            key,
            value,
            grad_out,
            prepared.lse2,
            prepared.delta,
            grad_mask,
            **strides(q=query, k=key, v=value, g=grad_out),
            **given.dynamic,
            **given.static,
            batch=call.query.shape[0],
            ONE_B=ones[0],
            ONE_H=ones[1],
            ONE_Q=ones[2],
            ONE_K=ones[3],
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=4,
            num_stages=2,
        )
    return grad_mask.view(mask.shape)
