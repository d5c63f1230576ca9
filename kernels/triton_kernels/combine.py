"""The second kernel of decoding: combine the partial results of splits of the keys (FlashDecoding, Dao et al. 2023)."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["kv_heads", "q_len", "num_splits"])
def combine_splits(
    part_out,  # float32 (B * kv_heads, num_splits, rows, DV), rows of LSE -inf not written
    part_lse,  # (B * kv_heads, num_splits, rows) in units of log2
    out,  # (B, Q, H, DV)
    lse,  # (B, H, Q) in natural log
    kv_heads,
    q_len,
    num_splits,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits at a time
    BLOCK_SPLITS: tl.constexpr,  # at least num_splits
):
    """Grid (batch * kv_heads * rows): weigh the partial results of one row by their LSE and add them up."""
    rows = q_len * GROUP
    place = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    o_part = place.to(tl.int64) * num_splits * rows + row  # that of the first split
    o_all = tl.arange(0, BLOCK_SPLITS)
    b_lse = tl.load(part_lse + o_part + o_all * rows, mask=o_all < num_splits, other=-float("inf"))
    peak = tl.max(b_lse, 0)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp2(b_lse - shift), 0)

    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < DV
    b_out = tl.zeros((BLOCK_DV,), tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        o_split = first + tl.arange(0, BLOCK_S)
        o_row = o_part + o_split * rows
        b_some = tl.load(part_lse + o_row, mask=o_split < num_splits, other=-float("inf"))
        m_seen = b_some > -float("inf")
        b_part = tl.load(
            part_out + o_row[:, None] * DV + o_dv[None, :], mask=m_seen[:, None] & m_dv[None, :], other=0.0
        )
        b_out += tl.sum(b_part * tl.exp2(b_some - shift)[:, None], 0)
    seen = total > 0.0
    b_out = b_out / tl.where(seen, total, 1.0)

    o_entry = (place // kv_heads).to(tl.int64)
    o_head = (place % kv_heads) * GROUP + row % GROUP
    o_query = row // GROUP
    p_out = out + ((o_entry * q_len + o_query) * kv_heads * GROUP + o_head) * DV + o_dv
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_dv)
    ln2: tl.constexpr = 0.6931471805599453
    b_total = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * ln2, -float("inf"))
    tl.store(lse + (o_entry * kv_heads * GROUP + o_head) * q_len + o_query, b_total)
