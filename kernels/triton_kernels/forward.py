"""Attention forward in Triton, pointer path: FlashAttention-2's loop order (Dao 2023, algorithm 1).

One program computes block_m queries of one head over all keys they reach. Keys are visited in up to three stretches:
the left border of the window, the inside, and the right border with the causal diagonal and the ragged end. Only
tiles of the two borders pay for masking. Names: p_ pointer, b_ block in registers, o_ offset, m_ mask.
"""

import math

import torch
import triton
import triton.language as tl

NO_LIMIT = 1 << 30


@triton.jit
def _visit(
    b_acc,  # (BLOCK_M, BLOCK_DV) float32
    b_sum,  # (BLOCK_M,) float32
    b_peak,  # (BLOCK_M,) float32, in units of log2
    b_q,  # (BLOCK_M, BLOCK_D)
    p_k,  # (BLOCK_D, BLOCK_N), at key 0
    p_v,  # (BLOCK_N, BLOCK_DV), at key 0
    stride_k,
    stride_v,
    start,
    stop,
    o_diagonal,  # (BLOCK_M,): the key on each query's diagonal
    kv_len,
    scale_log2,
    left,
    right,
    m_d,  # (BLOCK_D,)
    m_dv,  # (BLOCK_DV,)
    BLOCK_N: tl.constexpr,
    BORDER: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys start..stop into the accumulator; BORDER: mask by window and length."""
    o_n = tl.arange(0, BLOCK_N)
    for first in range(start, stop, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        o_key = first + o_n
        p_key = p_k + first.to(tl.int64) * stride_k
        p_value = p_v + first.to(tl.int64) * stride_v
        if BORDER:
            b_k = tl.load(p_key, mask=(o_key < kv_len)[None, :] & m_d[:, None], other=0.0)
        elif WHOLE_D:
            b_k = tl.load(p_key)
        else:
            b_k = tl.load(p_key, mask=m_d[:, None], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale_log2
        if BORDER:
            o_distance = o_key[None, :] - o_diagonal[:, None]
            m_reach = (o_key < kv_len)[None, :] & (o_distance <= right) & (o_distance >= -left)
            b_s = tl.where(m_reach, b_s, -float("inf"))
        b_new = tl.maximum(b_peak, tl.max(b_s, 1))
        # a row that has seen no key yet has the peak -inf: subtract 0 there, so that exp2 gives 0 and not NaN
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new) if BORDER else b_new
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_peak - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None]
        if BORDER:
            b_v = tl.load(p_value, mask=(o_key < kv_len)[:, None] & m_dv[None, :], other=0.0)
        elif WHOLE_DV:
            b_v = tl.load(p_value)
        else:
            b_v = tl.load(p_value, mask=m_dv[None, :], other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_peak = b_new
    return b_acc, b_sum, b_peak


# One compilation serves all lengths: a length that happens to divide by 16 is worth nothing to this kernel.
@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "left", "right"])
def attention_forward(
    query,
    key,
    value,
    out,
    lse,
    scale_log2,
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
    o_entry = entry.to(tl.int64)
    o_head = head.to(tl.int64)
    o_kv_head = (head // GROUP).to(tl.int64)

    o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < q_len
    m_d = o_d < D
    m_dv = o_dv < DV

    p_q = query + o_entry * stride_qb + o_head * stride_qh + o_m.to(tl.int64)[:, None] * stride_qs + o_d[None, :]
    p_k = key + o_entry * stride_kb + o_kv_head * stride_kh + o_n.to(tl.int64)[None, :] * stride_ks + o_d[:, None]
    p_v = value + o_entry * stride_vb + o_kv_head * stride_vh + o_n.to(tl.int64)[:, None] * stride_vs + o_dv[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)

    # keys are visited in [start, stop); of these, [inside_start, inside_stop) are in reach of every query of the block
    offset = kv_len - q_len
    first_diagonal = block * BLOCK_M + offset
    last_diagonal = first_diagonal + BLOCK_M - 1
    start = 0
    stop = kv_len
    inside_start = 0
    inside_stop = kv_len
    if LEFT:
        start = tl.maximum(first_diagonal - left, 0) // BLOCK_N * BLOCK_N
        inside_start = tl.cdiv(tl.maximum(last_diagonal - left, 0), BLOCK_N) * BLOCK_N
    if RIGHT:
        stop = tl.minimum(tl.maximum(last_diagonal + right + 1, 0), kv_len)
        inside_stop = tl.minimum(tl.maximum(first_diagonal + right + 1, 0), kv_len)
    inside_stop = inside_stop // BLOCK_N * BLOCK_N
    inside_start = tl.minimum(inside_start, stop)
    inside_stop = tl.maximum(inside_stop, inside_start)

    b_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    o_diagonal = o_m + offset
    if LEFT:
        b_acc, b_sum, b_peak = _visit(
            b_acc, b_sum, b_peak, b_q, p_k, p_v, stride_ks, stride_vs, start, inside_start, o_diagonal, kv_len,
            scale_log2, left, right, m_d, m_dv, BLOCK_N, True, D == BLOCK_D, DV == BLOCK_DV, PRECISION,
        )  # fmt: skip
    b_acc, b_sum, b_peak = _visit(
        b_acc, b_sum, b_peak, b_q, p_k, p_v, stride_ks, stride_vs, inside_start, inside_stop, o_diagonal, kv_len,
        scale_log2, left, right, m_d, m_dv, BLOCK_N, False, D == BLOCK_D, DV == BLOCK_DV, PRECISION,
    )  # fmt: skip
    b_acc, b_sum, b_peak = _visit(
        b_acc, b_sum, b_peak, b_q, p_k, p_v, stride_ks, stride_vs, inside_stop, stop, o_diagonal, kv_len,
        scale_log2, left, right, m_d, m_dv, BLOCK_N, True, D == BLOCK_D, DV == BLOCK_DV, PRECISION,
    )  # fmt: skip

    m_seen = b_sum > 0.0
    b_out = b_acc / tl.where(m_seen, b_sum, 1.0)[:, None]
    p_out = out + o_entry * stride_ob + o_head * stride_oh + o_m.to(tl.int64)[:, None] * stride_os + o_dv[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_dv[None, :])
    ln2: tl.constexpr = 0.6931471805599453
    b_lse = tl.where(m_seen, (b_peak + tl.log2(tl.where(m_seen, b_sum, 1.0))) * ln2, -float("inf"))
    tl.store(lse + (o_entry * heads + o_head) * q_len + o_m, b_lse, mask=m_m)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    window: tuple[int, int],
    precision: str,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel on BSHD tensors of any strides; return the result (B, Q, H, Dv) and the LSE (B, H, Q)."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    batch, q_len, heads, head_dim = query.shape
    kv_len, kv_heads, v_head_dim = value.shape[1:]
    out = query.new_empty(batch, q_len, heads, v_head_dim)
    lse = query.new_empty(batch, heads, q_len, dtype=torch.float32)
    left, right = window
    with torch.cuda.device_of(query):  # Triton launches on the current device, whatever the tensors are on
        attention_forward[(triton.cdiv(q_len, block_m) * batch * heads,)](
            query,
            key,
            value,
            out,
            lse,
            scale * math.log2(math.e),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *out.stride()[:3],
            heads,
            q_len,
            kv_len,
            NO_LIMIT if left == -1 else left,
            NO_LIMIT if right == -1 else right,
            GROUP=heads // kv_heads,
            D=head_dim,
            DV=v_head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_DV=max(16, triton.next_power_of_2(v_head_dim)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            LEFT=left != -1,
            RIGHT=right != -1,
            PRECISION=precision,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out, lse
