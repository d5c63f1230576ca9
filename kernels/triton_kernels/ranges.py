"""Which keys a block of queries visits, and which queries a block of keys: the blocks outside a window are skipped.

A range is (start, inside_start, inside_stop, stop), visited in up to three stretches: the left border, the inside and
the right border. Every pair of an inside tile attends; only tiles of the borders need to be compared with the window.
start, inside_start and inside_stop are multiples of the visited block unless they equal stop. Distances count from the
diagonal, key = query + kv_len - q_len; `left` and `right` are NO_LIMIT where the window is unbounded.
"""

import triton
import triton.language as tl

NO_LIMIT = 1 << 30


@triton.jit
def key_range(
    first_diagonal,  # the key on the diagonal of the block's first query
    last_diagonal,  # and of its last
    kv_len,
    left,
    right,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,  # whether the window has a left side
    RIGHT: tl.constexpr,
):
    """Return the range of keys that a block of queries visits; the inside is in reach of every query of the block."""
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
    return start, inside_start, inside_stop, stop


@triton.jit
def query_range(
    first_row,  # the query on the diagonal of the block's first key
    last_row,  # and of its last
    q_len,
    left,
    right,
    BLOCK_M: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Return the range of queries that reach a block of keys; those of the inside reach every key of the block.

    The inside may end beyond q_len, at a whole block: rows there weigh nothing, for their LSE is +inf. With WHOLE it
    ends before, where rows behind q_len are loaded as they are: a border tile clears them.
    """
    start = 0
    stop = q_len
    inside_start = 0
    inside_stop = q_len // BLOCK_M * BLOCK_M if WHOLE else tl.cdiv(q_len, BLOCK_M) * BLOCK_M
    if RIGHT:
        start = tl.maximum(first_row - right, 0) // BLOCK_M * BLOCK_M
        inside_start = tl.cdiv(tl.maximum(last_row - right, 0), BLOCK_M) * BLOCK_M
    if LEFT:
        stop = tl.minimum(tl.maximum(last_row + left + 1, 0), q_len)
        reached_by_all = tl.maximum(first_row + left + 1, 0) // BLOCK_M * BLOCK_M
        inside_stop = tl.minimum(inside_stop, reached_by_all) if WHOLE else reached_by_all
    inside_start = tl.minimum(inside_start, tl.cdiv(stop, BLOCK_M) * BLOCK_M)
    inside_stop = tl.maximum(tl.minimum(inside_stop, tl.cdiv(stop, BLOCK_M) * BLOCK_M), inside_start)
    return start, inside_start, inside_stop, stop
