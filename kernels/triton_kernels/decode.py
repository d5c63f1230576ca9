"""Decoding in Triton: a few queries against a long cache of keys and values (FlashDecoding, Dao et al. 2023).

The cache is read once. All queries of one key head, q_len * heads / kv_heads rows, are one tile (GQA-packed), and the
keys of a row of the batch are cut into num_splits pieces, so that a small batch fills the device too. A program visits
one piece and writes a partial result with its LSE; a second kernel weighs the partial results by these. With one split
the first kernel writes the result itself, and there is no second.

Decoding is bound by memory: what counts is that enough bytes are on their way at any time (num_stages tiles of block_n
keys each), that they come 16 at a time, and that whole tiles pay for no mask. Only tiles with the ragged end, the
causal diagonal or the left border of the window do. Names: p_ pointer, b_ block in registers, o_ offset, m_ mask.
"""

import math

import torch
import triton
import triton.language as tl

from ..tiles import padded
from .combine import combine_splits
from .ranges import NO_LIMIT, key_range

LAZY_ROWS = 32  # up to so many rows, sums of weights are kept per column and added up once, at the end


@triton.jit
def _softcapped(b_s, cap_log2):
    """Return cap * tanh(b_s) in units of log2; tanh by the exponential that cannot overflow."""
    b_small = tl.exp2(tl.abs(b_s) * -2.8853900817779268)  # exp(-2 |x|)
    b_tanh = (1.0 - b_small) / (1.0 + b_small)
    return tl.where(b_s < 0.0, -b_tanh, b_tanh) * cap_log2


@triton.jit
def _visit(
    b_acc,  # (BLOCK_M, BLOCK_DV) float32
    b_sum,  # (BLOCK_M, BLOCK_N) float32 where LAZY, else (BLOCK_M,)
    b_peak,  # (BLOCK_M,) float32, in units of log2
    b_q,  # (BLOCK_M, BLOCK_D)
    p_k,  # (BLOCK_D, BLOCK_N), at the first place of the row, or of page 0
    p_v,  # (BLOCK_N, BLOCK_DV), likewise
    p_table,  # the row's first page
    stride_kb,  # from one page to the next where PAGE
    stride_ks,
    stride_vb,
    stride_vs,
    start,
    stop,
    o_diagonal,  # (BLOCK_M,): the key on each query's diagonal
    first_key,  # keys before this and from kv_len on must not be read
    kv_len,
    scale,
    cap_log2,
    left,
    right,
    m_d,  # (BLOCK_D,)
    m_dv,  # (BLOCK_DV,)
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    BORDER: tl.constexpr,
    LAZY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys start..stop into the accumulator; BORDER: mask by window and length."""
    o_n = tl.arange(0, BLOCK_N)
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        first = tl.multiple_of(first, BLOCK_N)
        o_key = first + o_n
        m_key = (o_key >= first_key) & (o_key < kv_len)
        if PAGE == 0:
            o_k = first.to(tl.int64) * stride_ks
            o_v = first.to(tl.int64) * stride_vs
            p_key = p_k + tl.multiple_of(o_k, ALIGN)
            p_value = p_v + tl.multiple_of(o_v, ALIGN)
        elif PAGE % BLOCK_N == 0:  # a tile lies in one page
            page = tl.load(p_table + first // PAGE).to(tl.int64)
            o_k = page * stride_kb + (first % PAGE) * stride_ks
            o_v = page * stride_vb + (first % PAGE) * stride_vs
            p_key = p_k + tl.multiple_of(o_k, ALIGN)
            p_value = p_v + tl.multiple_of(o_v, ALIGN)
        else:
            if BORDER:
                b_page = tl.load(p_table + o_key // PAGE, mask=m_key, other=0).to(tl.int64)
            else:
                b_page = tl.load(p_table + o_key // PAGE).to(tl.int64)
            o_k = b_page[None, :] * stride_kb + (o_key % PAGE)[None, :] * stride_ks
            o_v = b_page[:, None] * stride_vb + (o_key % PAGE)[:, None] * stride_vs
            p_key = p_k + tl.multiple_of(o_k, (ALIGN, ALIGN))
            p_value = p_v + tl.multiple_of(o_v, (ALIGN, ALIGN))
        if BORDER:
            b_k = tl.load(p_key, mask=m_key[None, :] & m_d[:, None], other=0.0)
            b_v = tl.load(p_value, mask=m_key[:, None] & m_dv[None, :], other=0.0)
        else:
            b_k = tl.load(p_key) if WHOLE_D else tl.load(p_key, mask=m_d[:, None], other=0.0)
            b_v = tl.load(p_value) if WHOLE_DV else tl.load(p_value, mask=m_dv[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        if SOFTCAP:
            b_s = _softcapped(b_s, cap_log2)
        if BORDER:
            o_distance = o_key[None, :] - o_diagonal[:, None]
            m_reach = m_key[None, :] & (o_distance <= right) & (o_distance >= -left)
            b_s = tl.where(m_reach, b_s, -float("inf"))
        b_new = tl.maximum(b_peak, tl.max(b_s, 1))
        # a row that has seen no key yet has the peak -inf: subtract 0 there, so that exp2 gives 0 and not NaN
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new) if BORDER else b_new
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_peak - b_shift)
        if LAZY:  # spares a sum over all warps per tile
            b_sum = b_sum * b_decay[:, None] + b_p
        else:
            b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_peak = b_new
    return b_acc, b_sum, b_peak


# One compilation serves all lengths and batches: that they happen to divide by 16 is worth nothing to this kernel.
@triton.jit(do_not_specialize=["stride_table", "kv_heads", "q_len", "kv_len", "left", "right", "num_splits"])
def attention_decode(
    query,
    key,
    value,
    out,  # (B, Q, H, DV), or where SPLIT float32 (B * kv_heads, num_splits, rows, DV)
    lse,  # (B, H, Q) in natural log, or where SPLIT (B * kv_heads, num_splits, rows) in units of log2
    kv_lengths,  # (B,) where LENGTHS
    block_table,  # (B, max_pages) where PAGE
    scale,
    cap_log2,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_table,
    kv_heads,
    q_len,
    kv_len,
    left,  # NO_LIMIT where unbounded
    right,
    num_splits,
    GROUP: tl.constexpr,  # query heads per key head
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least q_len * GROUP
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,  # keys in a page, 0 for a contiguous cache
    LENGTHS: tl.constexpr,
    LEFT: tl.constexpr,  # whether the window has a left side
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    LAZY: tl.constexpr,
    ALIGN: tl.constexpr,  # elements: every offset of a key and of a value is a multiple
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (batch * kv_heads * num_splits). The last dimension of query and caches has stride 1."""
    # one dimension: the others end at 65535 programs
    place = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    o_entry = (place // kv_heads).to(tl.int64)
    o_kv_head = (place % kv_heads).to(tl.int64)
    if LENGTHS:
        kv_len = tl.minimum(tl.maximum(tl.load(kv_lengths + o_entry), 0), kv_len)

    rows = q_len * GROUP
    o_m = tl.arange(0, BLOCK_M)  # a row is a query and one of the heads of the group
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_query = o_m // GROUP
    o_head = o_kv_head * GROUP + o_m % GROUP
    m_m = o_m < rows
    m_d = o_d < D
    m_dv = o_dv < DV
    p_q = query + o_entry * stride_qb + (o_query.to(tl.int64) * stride_qs + o_head * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)

    o_k = o_kv_head * stride_kh
    o_v = o_kv_head * stride_vh
    if PAGE == 0:
        o_k += o_entry * stride_kb
        o_v += o_entry * stride_vb
    p_k = key + tl.multiple_of(o_k, ALIGN) + o_d[:, None]
    p_v = value + tl.multiple_of(o_v, ALIGN) + o_dv[None, :]
    if PAGE % BLOCK_N == 0:  # contiguous too; else the place of each key is looked up
        p_k += tl.multiple_of(o_n.to(tl.int64)[None, :] * stride_ks, (ALIGN, ALIGN))
        p_v += tl.multiple_of(o_n.to(tl.int64)[:, None] * stride_vs, (ALIGN, ALIGN))
    p_table = block_table
    if PAGE > 0:
        p_table += o_entry * stride_table

    offset = kv_len - q_len
    start, inside_start, inside_stop, _ = key_range(offset, kv_len - 1, kv_len, left, right, BLOCK_N, LEFT, True)
    first_key = tl.maximum(offset - left, 0) if LEFT else 0
    # the whole tiles of this split; where there are fewer tiles than splits, some have none
    tiles = tl.cdiv(kv_len - start, BLOCK_N)
    stop = tl.minimum(start + (tiles * (split + 1)) // num_splits * BLOCK_N, kv_len)
    start += (tiles * split) // num_splits * BLOCK_N

    b_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    if LAZY:
        b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    o_diagonal = o_query + offset
    if LEFT:
        b_acc, b_sum, b_peak = _visit(
            b_acc, b_sum, b_peak, b_q, p_k, p_v, p_table, stride_kb, stride_ks, stride_vb, stride_vs,
            start, tl.minimum(stop, inside_start), o_diagonal, first_key, kv_len, scale, cap_log2,
            left, right, m_d, m_dv,
            BLOCK_N, PAGE, True, LAZY, SOFTCAP, D == BLOCK_D, DV == BLOCK_DV, ALIGN, 1, PRECISION,
        )  # fmt: skip
    b_acc, b_sum, b_peak = _visit(
        b_acc, b_sum, b_peak, b_q, p_k, p_v, p_table, stride_kb, stride_ks, stride_vb, stride_vs,
        tl.maximum(start, inside_start), tl.minimum(stop, inside_stop), o_diagonal, first_key, kv_len, scale, cap_log2,
        left, right, m_d, m_dv,
        BLOCK_N, PAGE, False, LAZY, SOFTCAP, D == BLOCK_D, DV == BLOCK_DV, ALIGN, STAGES, PRECISION,
    )  # fmt: skip
    b_acc, b_sum, b_peak = _visit(
        b_acc, b_sum, b_peak, b_q, p_k, p_v, p_table, stride_kb, stride_ks, stride_vb, stride_vs,
        tl.maximum(start, inside_stop), stop, o_diagonal, first_key, kv_len, scale, cap_log2, left, right, m_d, m_dv,
        BLOCK_N, PAGE, True, LAZY, SOFTCAP, D == BLOCK_D, DV == BLOCK_DV, ALIGN, 1, PRECISION,
    )  # fmt: skip

    if LAZY:
        b_sum = tl.sum(b_sum, 1)
    m_seen = b_sum > 0.0
    b_out = b_acc / tl.where(m_seen, b_sum, 1.0)[:, None]
    b_lse = tl.where(m_seen, b_peak + tl.log2(tl.where(m_seen, b_sum, 1.0)), -float("inf"))
    if SPLIT:  # a row that has seen nothing has the weight 0 later: only its LSE is read
        o_row = (place.to(tl.int64) * num_splits + split) * rows + o_m
        tl.store(out + o_row[:, None] * DV + o_dv[None, :], b_out, mask=(m_m & m_seen)[:, None] & m_dv[None, :])
        tl.store(lse + o_row, b_lse, mask=m_m)
    else:
        o_row = (o_entry * q_len + o_query) * kv_heads * GROUP + o_head
        b_out = b_out.to(out.dtype.element_ty)
        tl.store(out + o_row[:, None] * DV + o_dv[None, :], b_out, mask=m_m[:, None] & m_dv[None, :])
        ln2: tl.constexpr = 0.6931471805599453
        tl.store(lse + (o_entry * kv_heads * GROUP + o_head) * q_len + o_query, b_lse * ln2, mask=m_m)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    *,
    kv_len: int,
    scale: float,
    window: tuple[int, int],
    softcap: float,
    precision: str,
    block_n: int,
    num_splits: int,
    num_warps: int,
    num_stages: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernels; return the result (B, Q, H, Dv) and the LSE (B, H, Q).

    - query (B, Q, H, D), key and value (B, kv_len, Hkv, D or Dv), or (pages, page_size, Hkv, D or Dv) with a
      block_table (B, max_pages); kv_lengths (B,) or None for kv_len keys in every row. Any strides.
    """
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    batch, q_len, heads, head_dim = query.shape
    kv_heads, v_head_dim = value.shape[2:]
    group = heads // kv_heads
    rows = q_len * group
    left, right = window
    if q_len == 1:
        right = -1  # there is nothing to the right of the last key
    out = query.new_empty(batch, q_len, heads, v_head_dim)
    lse = query.new_empty(batch, heads, q_len, dtype=torch.float32)
    if num_splits > 1:
        part_out = query.new_empty(batch * kv_heads, num_splits, rows, v_head_dim, dtype=torch.float32)
        part_lse = query.new_empty(batch * kv_heads, num_splits, rows, dtype=torch.float32)
    else:
        part_out, part_lse = out, lse
    block_m = padded(rows)
    block_dv = padded(v_head_dim)
    wide = 16 // key.element_size()
    aligned = not any(stride % wide for stride in (*key.stride()[:3], *value.stride()[:3]))
    with torch.cuda.device_of(query):  # Triton launches on the current device, whatever the tensors are on
        attention_decode[(batch * kv_heads * num_splits,)](
            query,
            key,
            value,
            part_out,
            part_lse,
            kv_lengths,
            block_table,
            scale / softcap if softcap > 0 else scale * math.log2(math.e),
            softcap * math.log2(math.e),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            0 if block_table is None else block_table.stride(0),
            kv_heads,
            q_len,
            kv_len,
            NO_LIMIT if left == -1 else left,
            NO_LIMIT if right == -1 else right,
            num_splits,
            GROUP=group,
            D=head_dim,
            DV=v_head_dim,
            BLOCK_D=padded(head_dim),
            BLOCK_DV=block_dv,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            PAGE=0 if block_table is None else key.shape[1],
            LENGTHS=kv_lengths is not None,
            LEFT=left != -1,
            SOFTCAP=softcap > 0,
            SPLIT=num_splits > 1,
            LAZY=block_m <= LAZY_ROWS,
            ALIGN=wide if aligned else 1,
            STAGES=num_stages,
            PRECISION=precision,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        if num_splits > 1:
            block_s = min(16, triton.next_power_of_2(num_splits))
            combine_splits[(batch * kv_heads * rows,)](
                part_out,
                part_lse,
                out,
                lse,
                kv_heads,
                q_len,
                num_splits,
                GROUP=group,
                DV=v_head_dim,
                BLOCK_DV=block_dv,
                BLOCK_S=block_s,
                BLOCK_SPLITS=triton.next_power_of_2(num_splits),
                num_warps=max(1, min(4, block_s * block_dv // 512)),
            )
    return out, lse
