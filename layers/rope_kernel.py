"""Rotary positions and shared parts of keys on the device, each tensor read once and written once.

Heads are (batch, seq, heads, rest + 2 * half), by strides, the last dimension contiguous. A program has TOKENS of the
batch * seq rows and BLOCK_HEADS heads of each. Import this file only where a kernel is to run: Triton may be absent.
"""

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of a program's tile at most, 32 a thread


@triton.jit
def _rows(batch, seq, heads, TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """Return entry and place int64 (rows or 1, 1), head int64 and whether it is one (rows, 1)."""
    o_row = tl.arange(0, TOKENS * BLOCK_HEADS)[:, None]
    o_head = tl.program_id(1) * BLOCK_HEADS + o_row % BLOCK_HEADS
    m_row = o_head < heads
    if TOKENS == 1:  # its cosines are loaded once for all heads
        o_token = tl.program_id(0) + tl.zeros((1, 1), tl.int32)
    else:
        o_token = tl.program_id(0) * TOKENS + o_row // BLOCK_HEADS
        m_row = m_row & (o_token < batch * seq)
    return (o_token // seq).to(tl.int64), (o_token % seq).to(tl.int64), o_head.to(tl.int64), m_row


@triton.jit(do_not_specialize=["batch", "seq", "heads"])
def turn_heads(
    source,  # (batch, seq, heads, REST + 2 HALF)
    result,  # the same shape; the same tensor to turn it in place
    cos,  # float32 (batch or 1, seq, HALF)
    sin,
    batch,
    seq,
    heads,
    source_batch,  # strides
    source_seq,
    source_head,
    result_batch,
    result_seq,
    result_head,
    table_batch,  # 0 where the table is of all entries
    table_seq,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,  # turn the other way
    FROM_PAIRS: tl.constexpr,  # pair i is (2 i, 2 i + 1) of the source's turned part, else (i, HALF + i)
    TO_PAIRS: tl.constexpr,  # and of the result's
    COPY: tl.constexpr,  # the REST too
    FLOAT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    entry, place, o_head, m_row = _rows(batch, seq, heads, TOKENS, BLOCK_HEADS)
    p_source = source + entry * source_batch + place * source_seq + o_head * source_head
    p_result = result + entry * result_batch + place * result_seq + o_head * result_head
    o_half = tl.arange(0, BLOCK_HALF)[None, :]
    o_both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
    m_half = m_row & (o_half < HALF)
    m_both = m_row & (o_both < 2 * HALF)
    if FROM_PAIRS:  # neighbours come in one run and part in registers
        b_both = tl.load(p_source + REST + o_both, mask=m_both, other=0.0)
        b_first, b_second = tl.split(tl.reshape(b_both, (TOKENS * BLOCK_HEADS, BLOCK_HALF, 2)))
    else:
        b_first = tl.load(p_source + REST + o_half, mask=m_half, other=0.0)
        b_second = tl.load(p_source + REST + HALF + o_half, mask=m_half, other=0.0)
    o_table = entry * table_batch + place * table_seq + o_half
    m_table = (entry < batch) & (o_half < HALF)
    b_cos = tl.load(cos + o_table, mask=m_table, other=0.0).to(FLOAT)
    b_sin = tl.load(sin + o_table, mask=m_table, other=0.0).to(FLOAT)
    if BACK:
        b_sin = -b_sin
    b_first = b_first.to(FLOAT)
    b_second = b_second.to(FLOAT)
    b_real = (b_first * b_cos - b_second * b_sin).to(result.dtype.element_ty)
    b_imaginary = (b_second * b_cos + b_first * b_sin).to(result.dtype.element_ty)
    if COPY:
        if REST > 0:
            o_rest = tl.arange(0, BLOCK_REST)[None, :]
            m_rest = m_row & (o_rest < REST)
            tl.store(p_result + o_rest, tl.load(p_source + o_rest, mask=m_rest), mask=m_rest)
    else:
        tl.debug_barrier()  # other threads of this program have read what is written now
    if TO_PAIRS:
        b_turned = tl.reshape(tl.join(b_real, b_imaginary), (TOKENS * BLOCK_HEADS, 2 * BLOCK_HALF))
        tl.store(p_result + REST + o_both, b_turned, mask=m_both)
    else:
        tl.store(p_result + REST + o_half, b_real, mask=m_half)
        tl.store(p_result + REST + HALF + o_half, b_imaginary, mask=m_half)


@triton.jit(do_not_specialize=["batch", "seq", "heads"])
def join_heads(
    own,  # (batch, seq, heads, OWN)
    shared,  # (batch, seq, SHARED)
    result,  # (batch, seq, heads, OWN + SHARED), contiguous
    batch,
    seq,
    heads,
    own_batch,  # strides
    own_seq,
    own_head,
    shared_batch,
    shared_seq,
    OWN: tl.constexpr,
    SHARED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
):
    entry, place, o_head, m_row = _rows(batch, seq, heads, TOKENS, BLOCK_HEADS)
    p_own = own + entry * own_batch + place * own_seq + o_head * own_head
    p_result = result + ((entry * seq + place) * heads + o_head) * (OWN + SHARED)
    o_own = tl.arange(0, BLOCK_OWN)[None, :]
    m_own = m_row & (o_own < OWN)
    b_own = tl.load(p_own + o_own, mask=m_own)
    o_shared = tl.arange(0, BLOCK_SHARED)[None, :]
    m_shared = (entry < batch) & (o_shared < SHARED)
    b_shared = tl.load(shared + entry * shared_batch + place * shared_seq + o_shared, mask=m_shared)
    tl.store(p_result + o_own, b_own, mask=m_own)
    b_shared = tl.broadcast_to(b_shared, (TOKENS * BLOCK_HEADS, BLOCK_SHARED))
    tl.store(p_result + OWN + o_shared, b_shared, mask=m_row & (o_shared < SHARED))


def turn(
    source: torch.Tensor,
    result: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    back: bool,
    from_pairs: bool,
    to_pairs: bool,
) -> None:
    """Turn the last 2 * half elements of `source` (batch, seq, heads, rest + 2 * half) into `result`, of its shape.

    cos and sin are float32 (1 or batch, seq, half) of equal strides. `result` may be `source`, whose rest then stays as
    it is, but must not overlap it otherwise. The last dimension of all is contiguous.
    """
    batch, seq, heads, width = source.shape
    half = cos.shape[-1]
    rest, copies = width - 2 * half, result is not source
    block_rest, block_half = _power(rest), _power(half)
    tokens, block_heads = _tile(batch * seq, heads, 2 * block_half + (block_rest if copies and rest else 0))
    grid = (triton.cdiv(batch * seq, tokens), triton.cdiv(heads, block_heads))
    with torch.cuda.device_of(source):
        turn_heads[grid](
            source, result, cos, sin, batch, seq, heads, *source.stride()[:3], *result.stride()[:3],
            cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
            REST=rest, HALF=half, BACK=back, FROM_PAIRS=from_pairs, TO_PAIRS=to_pairs, COPY=copies,
            FLOAT=tl.float64 if source.dtype is torch.float64 else tl.float32,
            TOKENS=tokens, BLOCK_HEADS=block_heads, BLOCK_REST=block_rest, BLOCK_HALF=block_half, num_warps=4,
        )  # fmt: skip


def join(own: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Return heads (batch, seq, heads, own + shared) of (batch, seq, heads, own) and (batch, seq, shared).

    The last dimension of both is contiguous.
    """
    batch, seq, heads, width = own.shape
    behind = shared.shape[-1]
    result = own.new_empty(batch, seq, heads, width + behind)
    block_own, block_shared = _power(width), _power(behind)
    tokens, block_heads = _tile(batch * seq, heads, block_own + block_shared)
    grid = (triton.cdiv(batch * seq, tokens), triton.cdiv(heads, block_heads))
    with torch.cuda.device_of(own):
        join_heads[grid](
            own, shared, result, batch, seq, heads, *own.stride()[:3], *shared.stride()[:2],
            OWN=width, SHARED=behind, TOKENS=tokens, BLOCK_HEADS=block_heads, BLOCK_OWN=block_own,
            BLOCK_SHARED=block_shared, num_warps=4,
        )  # fmt: skip
    return result


def _tile(tokens: int, heads: int, width: int) -> tuple[int, int]:
    """Return how many tokens and heads of `width` elements, a sum of powers of two, a program has; powers of two."""
    rows = max(1, 1 << (ELEMENTS // width).bit_length() - 1) if width <= ELEMENTS else 1
    block_heads = min(rows, _power(heads))
    return min(rows // block_heads, _power(tokens)), block_heads


def _power(size: int) -> int:
    """Return the next power of two."""
    return 1 << max(0, size - 1).bit_length()
