"""Attention backward for sm_90, warp-specialised (see hopper_common): one kernel for dK and dV, one for dQ.

As in backward.py weights are recomputed from the LSE, nothing is added atomically, and the gradients are the same bits
every time. dkdv works on transposed tiles, keys by queries, so that weights and gradients of scores go from registers
into the next product.
"""

import torch
import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise.domain.config import Config

from .backward import Prepared, lse_rows, weights_and_gradient
from .common import mask_tile
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
    descriptor,
    fill,
    fill_both,
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
    slots,
    take_mask,
    warp_options,
    write,
)
from .padding import pad_columns
from .ranges import query_range


@gluon.jit
def _query_tiles(block, extent, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, OPTIONS: gl.constexpr):
    """Return (low, inside_low, inside_high, high): the tiles of queries that reach a block of keys, maybe none."""
    first_row = block * BLOCK_N - (extent.kv_len - extent.q_len)
    start, inside_start, inside_stop, stop = query_range(
        first_row, first_row + BLOCK_N - 1, extent.q_len, extent.left, extent.right, BLOCK_M, OPTIONS.left,
        OPTIONS.right, False,
    )  # fmt: skip
    high = (stop + BLOCK_M - 1) // BLOCK_M
    low = gl.minimum(start // BLOCK_M, high)
    inside_low = gl.minimum(gl.maximum((inside_start + BLOCK_M - 1) // BLOCK_M, low), high)
    inside_high = gl.maximum(gl.minimum(inside_stop // BLOCK_M, high), inside_low)
    return low, inside_low, inside_high, high


@gluon.jit
def _produce_queries(
    sources,  # descriptors of query, key, value, grad_out, lse2, delta and mask
    tiles,  # in shared memory, as are LSE and delta
    work,
    extent,
    OPTIONS: gl.constexpr,
):
    query, key, value, grad_out, lse2, delta, mask = sources
    keys, values, queries, gradients, lses, deltas, masks = tiles
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    ROWS: gl.constexpr = key.block_type.shape[2]
    BLOCK_M: gl.constexpr = query.block_type.shape[2]
    STAGES: gl.constexpr = OPTIONS.stages
    kv_count = 0
    count = 0
    for tile in range(gl.program_id(0), work.blocks * work.places, gl.num_programs(0)):
        block, place = assigned(tile, work, OPTIONS.swizzle, False)
        low, _, _, high = _query_tiles(block, extent, BLOCK_M, CONSUMERS * ROWS, OPTIONS)
        entry = place // work.heads
        kv_head = place % work.heads
        for me in gl.static_range(CONSUMERS):
            where = [entry, kv_head, (block * CONSUMERS + me) * ROWS, 0]
            fill_both(keys, kv_count, key, where, values, value, where, CONSUMERS)
            kv_count += 1
        for member in range(OPTIONS.group):
            head = kv_head * OPTIONS.group + member
            row = place * OPTIONS.group + member
            for i in range(low, high):
                first = i * BLOCK_M
                where = [entry, head, first, 0]
                fill_both(queries, count, query, where, lses, lse2, [row, first], STAGES)
                if OPTIONS.mask_stages:
                    for me in gl.static_range(CONSUMERS):
                        column = (block * CONSUMERS + me) * ROWS
                        fill_mask(masks, count, mask, entry, head, first, column, me, OPTIONS)
                fill_both(gradients, count, grad_out, where, deltas, delta, [row, first], STAGES)
                count += 1


@gluon.jit
def _visit_queries(
    b_dk,  # (ROWS, BLOCK_D) float32
    b_dv,  # (ROWS, BLOCK_DV) float32
    count,
    low,
    high,
    b_k,  # in shared memory, as b_v
    b_v,
    visited,  # queries, gradients, LSE, delta and mask
    o_key,
    by,  # Scoring
    extent,
    ME: gl.constexpr,
    OPTIONS: gl.constexpr,
    BORDER: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """Add what tiles low up to high of queries give; BORDER: compare with the window."""
    queries, gradients, lses, deltas, masks = visited
    KIND: gl.constexpr = 0 if OPTIONS.mask_stages else OPTIONS.mask
    STAGES: gl.constexpr = OPTIONS.stages
    BLOCK_M: gl.constexpr = queries.tiles.shape[3]
    BLOCK_D: gl.constexpr = queries.tiles.shape[4]
    BLOCK_DV: gl.constexpr = gradients.tiles.shape[4]
    factor = by.scale * 1.4426950408889634
    b_zero = gl.full((o_key.shape[0], BLOCK_M), 0.0, gl.float32, S_LAYOUT)
    for i in range(low, high):
        slot = count % STAGES
        o_row = gl.multiple_of(i * BLOCK_M, BLOCK_M) + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_LAYOUT))
        b_mask = mask_tile(o_row[None, :], o_key[:, None], by, KIND)
        b_q = queries.tiles.index(slot).reshape((BLOCK_M, BLOCK_D))
        b_do = gradients.tiles.index(slot).reshape((BLOCK_M, BLOCK_DV))
        await_full(queries, count, STAGES)
        b_s = warpgroup_mma(b_k, b_q.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        await_full(gradients, count, STAGES)
        b_dp = warpgroup_mma(b_v, b_do.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        if OPTIONS.direct:
            b_s = warpgroup_mma_wait(1, deps=[b_s])
            if BORDER:
                o_diagonal = o_row + (extent.kv_len - extent.q_len)
                if OPTIONS.right:
                    b_s = gl.where(o_key[:, None] <= (o_diagonal + extent.right)[None, :], b_s, -float("inf"))
                if OPTIONS.left:
                    b_s = gl.where(o_key[:, None] >= (o_diagonal - extent.left)[None, :], b_s, -float("inf"))
            b_p = gl.exp2(b_s * factor - lses.index(slot).load(S_LAYOUT))
            b_weights = gl.convert_layout(b_p.to(queries.tiles.dtype), gl.DotOperandLayout(0, b_dv.type.layout, 2))
            b_dp = warpgroup_mma_wait(0, deps=[b_dp])
            b_dv = warpgroup_mma(b_weights, b_do, b_dv, is_async=True)
            b_ds = b_p * (b_dp - deltas.index(slot).load(S_LAYOUT))
        else:
            b_s, b_dp = warpgroup_mma_wait(0, deps=[b_s, b_dp])
            if OPTIONS.mask_stages:
                b_mask = take_mask(masks, count, ME, OPTIONS, True, S_LAYOUT)
            b_p, _, b_ds = weights_and_gradient(
                b_s, b_dp, lses.index(slot).load(S_LAYOUT), deltas.index(slot).load(S_LAYOUT), b_mask, o_row[None, :],
                o_key[:, None], by, BORDER, OPTIONS.mask, OPTIONS.alibi, OPTIONS.softcap, OPTIONS.dropout,
            )  # fmt: skip
            b_weights = gl.convert_layout(b_p.to(queries.tiles.dtype), gl.DotOperandLayout(0, b_dv.type.layout, 2))
            b_dv = warpgroup_mma(b_weights, b_do, b_dv, is_async=True)
        b_ds = gl.convert_layout(b_ds.to(queries.tiles.dtype), gl.DotOperandLayout(0, b_dk.type.layout, 2))
        b_dk = warpgroup_mma(b_ds, b_q, b_dk, is_async=True)
        b_dv = warpgroup_mma_wait(1, deps=[b_dv])
        release(gradients, count, STAGES)
        b_dk = warpgroup_mma_wait(0, deps=[b_dk])
        release(queries, count, STAGES)
        count += 1
    return b_dk, b_dv, count


@gluon.jit
def _consume_queries(
    results,  # gradients of key and value
    tiles,
    modifiers,
    work,
    extent,
    ME: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    OPTIONS: gl.constexpr,
):
    grad_key, grad_value = results
    keys, values, queries, gradients, lses, deltas, masks = tiles
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    ROWS: gl.constexpr = keys.tiles.shape[3]
    BLOCK_M: gl.constexpr = queries.tiles.shape[3]
    BLOCK_D: gl.constexpr = keys.tiles.shape[4]
    BLOCK_DV: gl.constexpr = values.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    visited = (queries, gradients, lses, deltas, masks)
    b_k = keys.tiles.index(ME).reshape((ROWS, BLOCK_D))
    b_v = values.index(ME).reshape((ROWS, BLOCK_DV))
    kv_count = ME
    count = 0
    for tile in range(gl.program_id(0), work.blocks * work.places, gl.num_programs(0)):
        block, place = assigned(tile, work, OPTIONS.swizzle, False)
        low, inside_low, inside_high, high = _query_tiles(block, extent, BLOCK_M, CONSUMERS * ROWS, OPTIONS)
        first_key = (block * CONSUMERS + ME) * ROWS
        o_key = first_key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
        await_full(keys, kv_count, CONSUMERS)
        b_dk = gl.full((ROWS, BLOCK_D), 0.0, gl.float32, DK_LAYOUT)
        b_dv = gl.full((ROWS, BLOCK_DV), 0.0, gl.float32, DV_LAYOUT)
        for member in range(OPTIONS.group):
            head = place % work.heads * OPTIONS.group + member
            by = scoring(modifiers, place // work.heads, head, work.heads * OPTIONS.group, extent, OPTIONS)
            if OPTIONS.right:
                b_dk, b_dv, count = _visit_queries(
                    b_dk, b_dv, count, low, inside_low, b_k, b_v, visited, o_key, by,
                    extent, ME, OPTIONS, True, S_LAYOUT,
                )  # fmt: skip
            b_dk, b_dv, count = _visit_queries(
                b_dk, b_dv, count, inside_low, inside_high, b_k, b_v, visited, o_key, by,
                extent, ME, OPTIONS, False, S_LAYOUT,
            )  # fmt: skip
            if OPTIONS.left:
                b_dk, b_dv, count = _visit_queries(
                    b_dk, b_dv, count, inside_high, high, b_k, b_v, visited, o_key, by,
                    extent, ME, OPTIONS, True, S_LAYOUT,
                )  # fmt: skip
        release(keys, kv_count, CONSUMERS)
        kv_count += CONSUMERS
        o_base = (place // work.heads).to(gl.int64) * extent.kv_len * work.heads + place % work.heads
        write(b_dk * modifiers.scale, grad_key + o_base * D, work.heads * D, first_key, extent.kv_len, D)
        write(b_dv, grad_value + o_base * DV, work.heads * DV, first_key, extent.kv_len, DV)


@gluon.jit(do_not_specialize=["kv_heads", "places", "q_len", "kv_len", "left", "right", "seed"])
def hopper_dkdv(
    query,
    key,
    value,
    grad_out,
    lse2,
    delta,
    mask_tiles,
    grad_key,
    grad_value,
    places,
    kv_heads,
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
    D: gl.constexpr,
    DV: gl.constexpr,
    OPTIONS: gl.constexpr,
):
    """Grid: any number of programs. grad_key (B, K, Hkv, D) and grad_value (B, K, Hkv, Dv) are dense; places counts
    batch * kv_heads. All other tensors are descriptors, lse2 and delta of (B * H, rows)."""
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    extent = Extent(q_len, kv_len, left, right)
    modifiers = Modifiers(
        mask, slopes, seed, scale, softcap, dropout, stride_mb, stride_mh, stride_mq, stride_mk, stride_ab, stride_ah
    )
    work = Work(gl.cdiv(kv_len, CONSUMERS * key.block_type.shape[2]), places, kv_heads)
    keys = ring(key, CONSUMERS, 1)
    values = slots(value, CONSUMERS)
    queries = ring(query, OPTIONS.stages, CONSUMERS)
    gradients = ring(grad_out, OPTIONS.stages, CONSUMERS)
    lses = slots(lse2, OPTIONS.stages)
    deltas = slots(delta, OPTIONS.stages)
    masks = mask_ring(mask_tiles, queries, OPTIONS)
    fence_async_shared()
    sources = (query, key, value, grad_out, lse2, delta, mask_tiles)
    tiles = (keys, values, queries, gradients, lses, deltas, masks)
    results = (grad_key, grad_value)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume_queries, (results, tiles, modifiers, work, extent, FIRST, D, DV, OPTIONS)),
                (_produce_queries, (sources, tiles, work, extent, OPTIONS)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume_queries, (results, tiles, modifiers, work, extent, FIRST, D, DV, OPTIONS)),
                (_consume_queries, (results, tiles, modifiers, work, extent, SECOND, D, DV, OPTIONS)),
                (_produce_queries, (sources, tiles, work, extent, OPTIONS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS[2], PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume_queries, (results, tiles, modifiers, work, extent, FIRST, D, DV, OPTIONS)),
                (_consume_queries, (results, tiles, modifiers, work, extent, SECOND, D, DV, OPTIONS)),
                (_consume_queries, (results, tiles, modifiers, work, extent, THIRD, D, DV, OPTIONS)),
                (_produce_queries, (sources, tiles, work, extent, OPTIONS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS[3], CONSUMER_REGISTERS[3], PRODUCER_REGISTERS],
        )


@gluon.jit
def _produce_keys(
    sources,  # descriptors of query, key, value, grad_out and mask
    tiles,  # in shared memory
    work,
    extent,
    OPTIONS: gl.constexpr,
):
    query, key, value, grad_out, mask = sources
    queries, gradients, keys, values, masks = tiles
    CONSUMERS: gl.constexpr = OPTIONS.consumers
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
            where = [entry, head, (block * CONSUMERS + me) * ROWS, 0]
            fill_both(queries, q_count, query, where, gradients, grad_out, where, CONSUMERS)
            q_count += 1
        for i in range(high - low):
            first = (high - 1 - i) * BLOCK_N
            where = [entry, head // OPTIONS.group, first, 0]
            fill(keys, count, key, where, OPTIONS.stages)
            if OPTIONS.mask_stages:
                for me in gl.static_range(CONSUMERS):
                    row = (block * CONSUMERS + me) * ROWS
                    fill_mask(masks, count, mask, entry, head, row, first, me, OPTIONS)
            fill(values, count, value, where, OPTIONS.stages)
            count += 1


@gluon.jit
def _write_scores(b_ds, grad_scores, row, column, by, OPTIONS: gl.constexpr):
    """Store the gradient of the scores from `row` and `column` on at its place of (batch * heads, Q, K)."""
    stride, columns = by.kv_len, by.kv_len
    p_tile = grad_scores + by.o_place * by.q_len * by.kv_len + column
    if OPTIONS.mask > 2:  # what is known of a number's divisors does not reach a partition
        stride, columns = stride // 16 * 16, columns // 16 * 16
        p_tile = gl.multiple_of(p_tile, 16)
    write(b_ds, p_tile, stride, row, by.q_len, columns - column)


@gluon.jit
def _visit_keys(
    b_dq,  # (ROWS, BLOCK_D) float32
    count,
    high,
    low,
    b_q,  # in shared memory, as b_do
    b_do,
    b_lse,
    b_delta,
    keys,
    values,
    masks,
    grad_scores,  # (batch * heads, Q, K), or unused
    o_row,
    first_row,
    by,  # Scoring
    extent,
    ME: gl.constexpr,
    OPTIONS: gl.constexpr,
    BORDER: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """Add what tiles high - 1 down to low of keys give; BORDER: compare with window and length."""
    STAGES: gl.constexpr = OPTIONS.stages
    BLOCK_N: gl.constexpr = keys.tiles.shape[3]
    BLOCK_D: gl.constexpr = keys.tiles.shape[4]
    BLOCK_DV: gl.constexpr = values.tiles.shape[4]
    KIND: gl.constexpr = 0 if OPTIONS.mask_stages else OPTIONS.mask
    factor = by.scale * 1.4426950408889634
    b_zero = gl.full((o_row.shape[0], BLOCK_N), 0.0, gl.float32, S_LAYOUT)
    for i in range(high - low):
        slot = count % STAGES
        first = gl.multiple_of((high - 1 - i) * BLOCK_N, BLOCK_N)
        o_key = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        b_mask = mask_tile(o_row[:, None], o_key[None, :], by, KIND)
        b_k = keys.tiles.index(slot).reshape((BLOCK_N, BLOCK_D))
        b_v = values.tiles.index(slot).reshape((BLOCK_N, BLOCK_DV))
        await_full(keys, count, STAGES)
        b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        await_full(values, count, STAGES)
        b_dp = warpgroup_mma(b_do, b_v.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        if OPTIONS.direct:
            b_s = warpgroup_mma_wait(1, deps=[b_s])
            if BORDER:
                b_s = mask_keys(b_s, first, o_row, extent, OPTIONS)
            b_p = gl.exp2(b_s * factor - b_lse[:, None])
            b_dp = warpgroup_mma_wait(0, deps=[b_dp])
            release(values, count, STAGES)
            b_ds = b_p * (b_dp - b_delta[:, None])
        else:
            b_s, b_dp = warpgroup_mma_wait(0, deps=[b_s, b_dp])
            release(values, count, STAGES)
            if OPTIONS.mask_stages:
                b_mask = take_mask(masks, count, ME, OPTIONS, False, S_LAYOUT)
            _, b_dbias, b_ds = weights_and_gradient(
                b_s, b_dp, b_lse[:, None], b_delta[:, None], b_mask, o_row[:, None], o_key[None, :], by, BORDER,
                OPTIONS.mask, OPTIONS.alibi, OPTIONS.softcap, OPTIONS.dropout,
            )  # fmt: skip
            if OPTIONS.dbias:
                _write_scores(b_dbias, grad_scores, first_row, first, by, OPTIONS)
        b_ds = gl.convert_layout(b_ds.to(keys.tiles.dtype), gl.DotOperandLayout(0, b_dq.type.layout, 2))
        b_dq = warpgroup_mma(b_ds, b_k, b_dq, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=[b_dq])
        release(keys, count, STAGES)
        count += 1
    return b_dq, count


@gluon.jit
def _consume_keys(
    rows,  # LSE (in log2) and delta
    results,  # gradients of query and of scores
    tiles,
    modifiers,
    work,
    extent,
    ME: gl.constexpr,
    D: gl.constexpr,
    OPTIONS: gl.constexpr,
):
    lse2, delta = rows
    grad_query, grad_scores = results
    queries, gradients, keys, values, masks = tiles
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    ROWS: gl.constexpr = queries.tiles.shape[3]
    BLOCK_N: gl.constexpr = keys.tiles.shape[3]
    BLOCK_D: gl.constexpr = keys.tiles.shape[4]
    BLOCK_DV: gl.constexpr = values.tiles.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    b_q = queries.tiles.index(ME).reshape((ROWS, BLOCK_D))
    b_do = gradients.index(ME).reshape((ROWS, BLOCK_DV))
    q_count = ME
    count = 0
    for tile in range(gl.program_id(0), work.blocks * work.places, gl.num_programs(0)):
        block, place = assigned(tile, work, OPTIONS.swizzle, OPTIONS.right)
        low, inside_low, inside_high, high = key_tiles(block, extent, CONSUMERS * ROWS, BLOCK_N, OPTIONS)
        first_row = (block * CONSUMERS + ME) * ROWS
        o_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
        m_row = o_row < extent.q_len
        o_flat = place.to(gl.int64) * lse_rows(extent.q_len) + o_row
        b_lse = gl.load(lse2 + o_flat, mask=m_row, other=float("inf"))
        b_delta = gl.load(delta + o_flat, mask=m_row, other=0.0)
        by = scoring(modifiers, place // work.heads, place % work.heads, work.heads, extent, OPTIONS)
        await_full(queries, q_count, CONSUMERS)
        b_dq = gl.full((ROWS, BLOCK_D), 0.0, gl.float32, DQ_LAYOUT)
        b_dq, count = _visit_keys(
            b_dq, count, high, inside_high, b_q, b_do, b_lse, b_delta, keys, values, masks, grad_scores,
            o_row, first_row, by, extent,
            ME, OPTIONS, True, S_LAYOUT,
        )  # fmt: skip
        b_dq, count = _visit_keys(
            b_dq, count, inside_high, inside_low, b_q, b_do, b_lse, b_delta, keys, values, masks, grad_scores,
            o_row, first_row, by, extent,
            ME, OPTIONS, False, S_LAYOUT,
        )  # fmt: skip
        if OPTIONS.left:
            b_dq, count = _visit_keys(
                b_dq, count, inside_low, low, b_q, b_do, b_lse, b_delta, keys, values, masks,
                grad_scores, o_row, first_row, by, extent, ME, OPTIONS, True, S_LAYOUT,
            )  # fmt: skip
        release(queries, q_count, CONSUMERS)
        q_count += CONSUMERS
        o_base = (place // work.heads).to(gl.int64) * extent.q_len * work.heads + place % work.heads
        write(b_dq * modifiers.scale, grad_query + o_base * D, work.heads * D, first_row, extent.q_len, D)


@gluon.jit(do_not_specialize=["heads", "places", "q_len", "kv_len", "left", "right", "seed"])
def hopper_dq(
    query,
    key,
    value,
    grad_out,
    mask_tiles,
    lse2,
    delta,
    grad_query,
    grad_scores,
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
    D: gl.constexpr,
    OPTIONS: gl.constexpr,
):
    """Grid: any number of programs. grad_query (B, Q, H, D) is dense, lse2 and delta are (B, H, lse_rows).

    grad_scores (B, H, Q, K) is written where OPTIONS.dbias: tiles out of the window's reach are not.
    """
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    extent = Extent(q_len, kv_len, left, right)
    modifiers = Modifiers(
        mask, slopes, seed, scale, softcap, dropout, stride_mb, stride_mh, stride_mq, stride_mk, stride_ab, stride_ah
    )
    work = Work(gl.cdiv(q_len, CONSUMERS * query.block_type.shape[2]), places, heads)
    queries = ring(query, CONSUMERS, 1)
    gradients = slots(grad_out, CONSUMERS)
    keys = ring(key, OPTIONS.stages, CONSUMERS)
    values = ring(value, OPTIONS.stages, CONSUMERS)
    masks = mask_ring(mask_tiles, keys, OPTIONS)
    fence_async_shared()
    sources, rows, results = (query, key, value, grad_out, mask_tiles), (lse2, delta), (grad_query, grad_scores)
    tiles = (queries, gradients, keys, values, masks)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume_keys, (rows, results, tiles, modifiers, work, extent, FIRST, D, OPTIONS)),
                (_produce_keys, (sources, tiles, work, extent, OPTIONS)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume_keys, (rows, results, tiles, modifiers, work, extent, FIRST, D, OPTIONS)),
                (_consume_keys, (rows, results, tiles, modifiers, work, extent, SECOND, D, OPTIONS)),
                (_produce_keys, (sources, tiles, work, extent, OPTIONS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS[2], PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume_keys, (rows, results, tiles, modifiers, work, extent, FIRST, D, OPTIONS)),
                (_consume_keys, (rows, results, tiles, modifiers, work, extent, SECOND, D, OPTIONS)),
                (_consume_keys, (rows, results, tiles, modifiers, work, extent, THIRD, D, OPTIONS)),
                (_produce_keys, (sources, tiles, work, extent, OPTIONS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS[3], CONSUMER_REGISTERS[3], PRODUCER_REGISTERS],
        )


def _rows(tensor: torch.Tensor, count: int) -> TensorDescriptor:
    """Return a TMA descriptor of (B, H, rows) float32 in tiles of `count`."""
    flat = tensor.flatten(0, 1)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, count], layout)


def launch_dkdv(prepared: Prepared, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of key and value, in their shapes, dense."""
    call, chosen = prepared.call, options(prepared.call, config)
    tensors = (call.query, call.key, call.value, prepared.grad_out)
    query, key, value, grad_out = (describable(tensor) for tensor in tensors)
    batch, kv_len, kv_heads, head_dim = key.shape
    grad_key = key.new_empty(batch, kv_len, kv_heads, head_dim)
    grad_value = value.new_empty(batch, kv_len, kv_heads, value.shape[-1])
    if config.as_dict().get("padded"):
        query, grad_out = pad_columns(query), pad_columns(grad_out)
    tiles = triton.cdiv(kv_len, ROWS * chosen.consumers) * batch * kv_heads
    block_m, keys = config["block_m"], descriptor(key, ROWS)
    with torch.cuda.device_of(query):
        hopper_dkdv[grid(tiles, chosen.consumers, config["persistent"], query.device)](
            descriptor(query, block_m),
            keys,
            descriptor(value, ROWS),
            descriptor(grad_out, block_m),
            _rows(prepared.lse2, block_m),
            _rows(prepared.delta, block_m),
            mask_descriptor(call, block_m, ROWS, chosen, keys),
            grad_key,
            grad_value,
            batch * kv_heads,
            kv_heads,
            **modifiers(call, prepared.delta),
            D=head_dim,
            DV=value.shape[-1],
            OPTIONS=chosen,
            **warp_options(chosen.consumers),
        )
    return grad_key, grad_value


def launch_dq(prepared: Prepared, config: Config) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradient of query, in its shape, dense, and that of the mask, in its own, if the config says so."""
    call, chosen = prepared.call, options(prepared.call, config)
    tensors = (call.query, call.key, call.value, prepared.grad_out)
    query, key, value, grad_out = (describable(tensor) for tensor in tensors)
    batch, q_len, heads, head_dim = query.shape
    grad_query = query.new_empty(batch, q_len, heads, head_dim)
    grad_scores = None
    if chosen.dbias:
        visited_whole = not (chosen.left or chosen.right)
        new = query.new_empty if visited_whole else query.new_zeros
        grad_scores = new(batch, heads, q_len, key.shape[1])
    if config.as_dict().get("padded"):
        key, value = pad_columns(key), pad_columns(value)
    tiles = triton.cdiv(q_len, ROWS * chosen.consumers) * batch * heads
    block_n, queries = config["block_n"], descriptor(query, ROWS)
    with torch.cuda.device_of(query):
        hopper_dq[grid(tiles, chosen.consumers, config["persistent"], query.device)](
            queries,
            descriptor(key, block_n),
            descriptor(value, block_n),
            descriptor(grad_out, ROWS),
            mask_descriptor(call, ROWS, block_n, chosen, queries),
            prepared.lse2,
            prepared.delta,
            grad_query,
            grad_query if grad_scores is None else grad_scores,
            batch * heads,
            heads,
            **modifiers(call, prepared.delta),
            D=head_dim,
            OPTIONS=chosen,
            **warp_options(chosen.consumers),
        )
    if grad_scores is None or call.mask is None:
        return grad_query, None
    return grad_query, grad_scores.sum_to_size((1,) * (4 - call.mask.dim()) + call.mask.shape).view(call.mask.shape)
