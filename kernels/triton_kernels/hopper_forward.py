"""Attention forward for sm_90, warp-specialised (see hopper_common).

Keys are visited from the last to the first. The scores of a tile and the values of the one before are multiplied
together, so that a consumer's softmax runs beside the products of the others.
"""

import torch
import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tilewise.domain.config import Config

from ..call import Call
from .common import kept, mask_tile, scores
from .forward import describable
from .hopper_common import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    ROWS,
    Extent,
    Modifiers,
    Work,
    assigned,
    await_full,
    barriers,
    descriptor,
    fill,
    fill_mask,
    grid,
    key_tiles,
    mask_descriptor,
    mask_keys,
    mask_ring,
    modifiers,
    options,
    release,
    ring,
    scoring,
    take_mask,
    warp_options,
    write,
)
from .padding import pad_columns


@gluon.jit
def _produce(
    sources,  # descriptors of query, key, value and mask
    tiles,  # their rings
    work,
    extent,
    DV: gl.constexpr,
    OPTIONS: gl.constexpr,
):
    query, key, value, mask = sources
    queries, keys, values, masks = tiles
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    SLOTS: gl.constexpr = OPTIONS.q_stages * OPTIONS.consumers
    ROWS: gl.constexpr = query.block_type.shape[2]
    BLOCK_N: gl.constexpr = key.block_type.shape[2]
    q_count = 0
    count = 0
    for tile in range(gl.program_id(0), work.blocks * work.places, gl.num_programs(0)):
        block, place = assigned(tile, work, OPTIONS.swizzle, OPTIONS.right)
        low, _, _, high = key_tiles(block, extent, CONSUMERS * ROWS, BLOCK_N, OPTIONS)
        entry = place // work.heads
        head = place % work.heads
        for me in gl.static_range(CONSUMERS):
            fill(queries, q_count, query, [entry, head, (block * CONSUMERS + me) * ROWS, 0], SLOTS)
            q_count += 1
        for i in range(high - low):
            first = gl.multiple_of((high - 1 - i) * BLOCK_N, BLOCK_N)
            fill(keys, count, key, [entry, head // OPTIONS.group, first, 0], OPTIONS.stages)
            if OPTIONS.mask_stages:
                for me in gl.static_range(CONSUMERS):
                    row = (block * CONSUMERS + me) * ROWS
                    fill_mask(masks, count, mask, entry, head, row, first, me, OPTIONS)
            if OPTIONS.wide:
                fill(values, count, value, [entry, 0, first, head // OPTIONS.group * DV], OPTIONS.stages)
            else:
                fill(values, count, value, [entry, head // OPTIONS.group, first, 0], OPTIONS.stages)
            count += 1


@gluon.jit
def _mask(first, o_row, by, OPTIONS: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Return the mask of queries o_row and the keys of the tile from `first` on, in the layout of the scores.

    0 where there is none, or where it comes through a ring.
    """
    BLOCK_N: gl.constexpr = S_LAYOUT.instr_shape[1]
    KIND: gl.constexpr = 0 if OPTIONS.mask_stages else OPTIONS.mask
    o_key = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    return mask_tile(o_row[:, None], o_key[None, :], by, KIND)


@gluon.jit
def _scores(b_s, b_mask, first, o_row, by, extent, OPTIONS: gl.constexpr, BORDER: gl.constexpr):
    """Return the scores, and the factor that brings them to log2 units."""
    log2e: gl.constexpr = 1.4426950408889634
    if OPTIONS.plain:
        if BORDER:
            b_s = mask_keys(b_s, first, o_row, extent, OPTIONS)
        factor = by.scale * log2e
    else:
        o_key = first + gl.arange(0, b_s.shape[1], layout=gl.SliceLayout(0, b_s.type.layout))
        b_s, _ = scores(
            b_s, b_mask, o_row[:, None], o_key[None, :], by, OPTIONS.mask, OPTIONS.alibi, OPTIONS.softcap, BORDER
        )
        factor = by.scale * 0.0 + log2e
    return b_s, factor


@gluon.jit
def _dropped(b_p, first, o_row, by, OPTIONS: gl.constexpr):
    """Return the weights that dropout keeps, 0 for the others; the sum of a row is that of all."""
    if OPTIONS.dropout:
        o_key = first + gl.arange(0, b_p.shape[1], layout=gl.SliceLayout(0, b_p.type.layout))
        m_keep = kept(by.seed, by.o_place, o_row[:, None], o_key[None, :], by.max_q, by.max_kv, by.dropout)
        b_p = gl.where(m_keep, b_p, 0.0)
    return b_p


@gluon.jit
def _softmax(b_s, b_peak, b_sum, factor, GUARD: gl.constexpr):
    """Return weights, the factor on what was summed before, and the new peak (in log2) and sum of each row."""
    b_new = gl.maximum(b_peak, gl.max(b_s, 1) * factor)
    # a row that has seen no key yet has the peak -inf: subtract 0 there, so that exp2 gives 0 and not NaN
    b_shift = gl.where(b_new == -float("inf"), 0.0, b_new) if GUARD else b_new
    b_p = gl.exp2(b_s * factor - b_shift[:, None])
    b_decay = gl.exp2(b_peak - b_shift)
    return b_p, b_decay, b_new, b_sum * b_decay + gl.sum(b_p, 1)


@gluon.jit
def _turns(unused, OPTIONS: gl.constexpr):
    """Return the barriers of two consumers that take turns, the first's open; `unused` where they do not.

    A barrier that nobody waits at must not be there: its memory is given to something else, and a GPU that starts
    another program beside may write the barrier back over it.
    """
    turns = unused
    if OPTIONS.pingpong:
        turns = barriers(OPTIONS.consumers, 1)
        mbarrier.arrive(turns.index(0), count=1)
    return turns


@gluon.jit
def _take_turn(turns, count, ME: gl.constexpr, OPTIONS: gl.constexpr):
    if OPTIONS.pingpong:
        mbarrier.wait(turns.index(ME), count & 1)


@gluon.jit
def _pass_turn(turns, ME: gl.constexpr, OPTIONS: gl.constexpr):
    if OPTIONS.pingpong:
        mbarrier.arrive(turns.index(1 - ME), count=1)


@gluon.jit
def _visit(
    b_acc,  # (ROWS, BLOCK_DV) float32
    b_sum,  # (ROWS,) float32
    b_peak,  # (ROWS,) float32, in log2
    b_p,  # (ROWS, BLOCK_N), the weights of the tile before: their values are not added yet
    count,
    high,
    low,
    b_q,  # in shared memory
    keys,
    values,
    masks,
    turns,
    o_row,
    by,  # Scoring
    extent,
    ME: gl.constexpr,
    OPTIONS: gl.constexpr,
    BORDER: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """Visit tiles high - 1 down to low; BORDER: compare with window and length."""
    STAGES: gl.constexpr = OPTIONS.stages
    BLOCK_N: gl.constexpr = keys.tiles.shape[3]
    BLOCK_D: gl.constexpr = keys.tiles.shape[4]
    BLOCK_DV: gl.constexpr = values.tiles.shape[4]
    b_zero = gl.full((o_row.shape[0], BLOCK_N), 0.0, gl.float32, S_LAYOUT)
    for i in range(high - low):
        before = count - 1
        first = gl.multiple_of((high - 1 - i) * BLOCK_N, BLOCK_N)
        b_mask = _mask(first, o_row, by, OPTIONS, S_LAYOUT)
        await_full(keys, count, STAGES)
        _take_turn(turns, count, ME, OPTIONS)
        b_k = keys.tiles.index(count % STAGES).reshape((BLOCK_N, BLOCK_D)).permute((1, 0))
        b_s = warpgroup_mma(b_q, b_k, b_zero, use_acc=False, is_async=True)
        await_full(values, before, STAGES)
        b_v = values.tiles.index(before % STAGES).reshape((BLOCK_N, BLOCK_DV))
        b_acc = warpgroup_mma(b_p, b_v, b_acc, is_async=True)
        _pass_turn(turns, ME, OPTIONS)
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        release(keys, count, STAGES)
        if OPTIONS.mask_stages:
            b_mask = take_mask(masks, count, ME, OPTIONS, False, S_LAYOUT)
        b_s, factor = _scores(b_s, b_mask, first, o_row, by, extent, OPTIONS, BORDER)
        b_weights, b_decay, b_peak, b_sum = _softmax(b_s, b_peak, b_sum, factor, BORDER or OPTIONS.mask != 0)
        b_weights = _dropped(b_weights, first, o_row, by, OPTIONS)
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        release(values, before, STAGES)
        b_acc = b_acc * gl.convert_layout(b_decay, gl.SliceLayout(1, b_acc.type.layout))[:, None]
        b_p = gl.convert_layout(b_weights.to(b_p.dtype), b_p.type.layout)
        count += 1
    return b_acc, b_sum, b_peak, b_p, count


@gluon.jit
def _consume(
    results,  # result and LSE
    strides,  # of the result
    tiles,
    turns,
    modifiers,
    work,
    extent,
    ME: gl.constexpr,
    DV: gl.constexpr,
    OPTIONS: gl.constexpr,
):
    out, lse = results
    queries, keys, values, masks = tiles
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    SLOTS: gl.constexpr = OPTIONS.q_stages * OPTIONS.consumers
    STAGES: gl.constexpr = OPTIONS.stages
    ROWS: gl.constexpr = queries.tiles.shape[3]
    BLOCK_N: gl.constexpr = keys.tiles.shape[3]
    BLOCK_D: gl.constexpr = keys.tiles.shape[4]
    BLOCK_DV: gl.constexpr = values.tiles.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ln2: gl.constexpr = 0.6931471805599453
    q_count = ME
    count = 0
    for tile in range(gl.program_id(0), work.blocks * work.places, gl.num_programs(0)):
        block, place = assigned(tile, work, OPTIONS.swizzle, OPTIONS.right)
        low, inside_low, inside_high, high = key_tiles(block, extent, CONSUMERS * ROWS, BLOCK_N, OPTIONS)
        first_row = (block * CONSUMERS + ME) * ROWS
        o_row = first_row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        b_q = queries.tiles.index(q_count % SLOTS).reshape((ROWS, BLOCK_D))
        await_full(queries, q_count, SLOTS)
        by = scoring(modifiers, place // work.heads, place % work.heads, work.heads, extent, OPTIONS)
        first = (high - 1) * BLOCK_N
        b_mask = _mask(first, o_row, by, OPTIONS, S_LAYOUT)

        await_full(keys, count, STAGES)
        _take_turn(turns, count, ME, OPTIONS)
        b_k = keys.tiles.index(count % STAGES).reshape((BLOCK_N, BLOCK_D)).permute((1, 0))
        b_zero = gl.full((ROWS, BLOCK_N), 0.0, gl.float32, S_LAYOUT)
        b_s = warpgroup_mma(b_q, b_k, b_zero, use_acc=False, is_async=True)
        _pass_turn(turns, ME, OPTIONS)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        release(keys, count, STAGES)
        if OPTIONS.mask_stages:
            b_mask = take_mask(masks, count, ME, OPTIONS, False, S_LAYOUT)
        b_s, factor = _scores(b_s, b_mask, first, o_row, by, extent, OPTIONS, True)
        b_peak = gl.full((ROWS,), -float("inf"), gl.float32, ROW_LAYOUT)
        b_sum = gl.full((ROWS,), 0.0, gl.float32, ROW_LAYOUT)
        b_weights, _, b_peak, b_sum = _softmax(b_s, b_peak, b_sum, factor, True)
        b_weights = _dropped(b_weights, first, o_row, by, OPTIONS)
        b_p = gl.convert_layout(b_weights.to(keys.tiles.dtype), P_LAYOUT)
        b_acc = gl.full((ROWS, BLOCK_DV), 0.0, gl.float32, O_LAYOUT)
        count += 1

        seen = high - 1
        if OPTIONS.right:
            b_acc, b_sum, b_peak, b_p, count = _visit(
                b_acc, b_sum, b_peak, b_p, count, seen, inside_high, b_q, keys, values, masks, turns, o_row, by,
                extent, ME, OPTIONS, True, S_LAYOUT,
            )  # fmt: skip
            seen = inside_high
        b_acc, b_sum, b_peak, b_p, count = _visit(
            b_acc, b_sum, b_peak, b_p, count, seen, inside_low, b_q, keys, values, masks, turns, o_row, by,
                extent, ME, OPTIONS, False, S_LAYOUT,
        )  # fmt: skip
        if OPTIONS.left:
            b_acc, b_sum, b_peak, b_p, count = _visit(
                b_acc, b_sum, b_peak, b_p, count, inside_low, low, b_q, keys, values, masks, turns, o_row, by,
                extent, ME, OPTIONS, True, S_LAYOUT,
            )  # fmt: skip
        release(queries, q_count, SLOTS)
        q_count += CONSUMERS
        last = count - 1
        await_full(values, last, STAGES)
        b_v = values.tiles.index(last % STAGES).reshape((BLOCK_N, BLOCK_DV))
        b_acc = warpgroup_mma(b_p, b_v, b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        release(values, last, STAGES)

        m_seen = b_sum > 0.0
        b_norm = 1.0 / gl.where(m_seen, b_sum, 1.0)
        if OPTIONS.dropout:
            b_norm = b_norm / (1.0 - modifiers.dropout)
        b_lse = gl.where(m_seen, (b_peak + gl.log2(gl.where(m_seen, b_sum, 1.0))) * ln2, -float("inf"))
        gl.store(lse + place.to(gl.int64) * extent.q_len + o_row, b_lse, mask=o_row < extent.q_len)
        b_acc = b_acc * gl.convert_layout(b_norm, gl.SliceLayout(1, O_LAYOUT))[:, None]
        p_out = out + (place // work.heads).to(gl.int64) * strides[0] + (place % work.heads).to(gl.int64) * strides[2]
        write(b_acc, p_out, strides[1], first_row, extent.q_len, DV)


# One compilation serves all lengths, as for the other kernels.
@gluon.jit(do_not_specialize=["heads", "places", "q_len", "kv_len", "left", "right", "seed"])
def hopper_forward(
    query,
    key,
    value,
    mask_tiles,
    out,
    lse,
    stride_ob,
    stride_os,
    stride_oh,
    places,
    heads,
    mask,
    slopes,
    seed,
    scale,
    softcap,
    dropout,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_ab,
    stride_ah,
    q_len,
    kv_len,
    left,
    right,
    DV: gl.constexpr,
    OPTIONS: gl.constexpr,
):
    """Grid: any number of programs; they share the tiles out. query, key, value and mask_tiles are descriptors."""
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    extent = Extent(q_len, kv_len, left, right)
    modifiers = Modifiers(
        mask, slopes, seed, scale, softcap, dropout, stride_mb, stride_mh, stride_mq, stride_mk, stride_ab, stride_ah
    )
    work = Work(gl.cdiv(q_len, CONSUMERS * query.block_type.shape[2]), places, heads)
    queries = ring(query, OPTIONS.q_stages * CONSUMERS, 1)
    keys = ring(key, OPTIONS.stages, CONSUMERS)
    values = ring(value, OPTIONS.stages, CONSUMERS)
    masks = mask_ring(mask_tiles, keys, OPTIONS)
    turns = _turns(queries.full, OPTIONS)
    strides = (stride_ob, stride_os, stride_oh)
    fence_async_shared()
    sources, tiles, results = (query, key, value, mask_tiles), (queries, keys, values, masks), (out, lse)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (results, strides, tiles, turns, modifiers, work, extent, FIRST, DV, OPTIONS)),
                (_produce, (sources, tiles, work, extent, DV, OPTIONS)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (results, strides, tiles, turns, modifiers, work, extent, FIRST, DV, OPTIONS)),
                (_consume, (results, strides, tiles, turns, modifiers, work, extent, SECOND, DV, OPTIONS)),
                (_produce, (sources, tiles, work, extent, DV, OPTIONS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS[2], PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (results, strides, tiles, turns, modifiers, work, extent, FIRST, DV, OPTIONS)),
                (_consume, (results, strides, tiles, turns, modifiers, work, extent, SECOND, DV, OPTIONS)),
                (_consume, (results, strides, tiles, turns, modifiers, work, extent, THIRD, DV, OPTIONS)),
                (_produce, (sources, tiles, work, extent, DV, OPTIONS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS[3], CONSUMER_REGISTERS[3], PRODUCER_REGISTERS],
        )


def launch(call: Call, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; return the result (B, Q, H, Dv) and the LSE (B, H, Q) float32. The scale must be above 0."""
    query, key, value = (describable(tensor) for tensor in (call.query, call.key, call.value))
    chosen = options(call.with_tensors(query, key, value), config)
    if config.as_dict().get("padded"):
        key, value = pad_columns(key), value if chosen.wide else pad_columns(value)
    batch, q_len, heads, _ = query.shape
    out = query.new_empty(batch, q_len, heads, call.value.shape[-1])
    lse = query.new_empty(batch, heads, q_len, dtype=torch.float32)
    tiles = triton.cdiv(q_len, ROWS * chosen.consumers) * batch * heads
    block_n, queries = config["block_n"], descriptor(query, ROWS)
    with torch.cuda.device_of(query):
        hopper_forward[grid(tiles, chosen.consumers, config["persistent"], query.device)](
            queries,
            descriptor(key, block_n),
            descriptor(value, block_n, wide=chosen.wide),
            mask_descriptor(call, ROWS, block_n, chosen, queries),
            out,
            lse,
            *out.stride()[:3],
            batch * heads,
            heads,
            **modifiers(call, lse),
            DV=call.value.shape[-1],
            OPTIONS=chosen,
            **warp_options(chosen.consumers),
        )
    return out, lse
