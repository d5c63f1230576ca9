"""What forward and backward share: scores from products, the dropout mask, and the arguments of a launch.

The helpers take row and key indices already
broadcast to the tile ((M, 1) and (1, N), or (1, M) and (N, 1) for a transposed tile), so one text serves both.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..call import Call
from ..tiles import padded
from .ranges import NO_LIMIT

# The kinds of masks; with a kv_len that is a multiple of 16, tiles are loaded 16 bytes at a time.
NO_MASK, BOOL_MASK, BIAS, ALIGNED_BOOL_MASK, ALIGNED_BIAS = range(5)


@triton.jit
def tanh(b_x):
    """Hyperbolic tangent by one exp2, and by its series near 0, where the other form cancels."""
    b_far = 1.0 - 2.0 / (tl.exp2(b_x * 2.8853900817779268) + 1.0)
    b_x2 = b_x * b_x
    b_near = b_x * (1.0 + b_x2 * (-1 / 3 + b_x2 * (2 / 15 + b_x2 * (-17 / 315 + b_x2 * (62 / 2835)))))
    return tl.where(tl.abs(b_x) < 0.25, b_near, b_far)


class Scoring(NamedTuple):
    """What turns the products of query and key of one batch entry and head into weights, but for the constexpr."""

    p_mask: Any  # at row 0, key 0
    stride_mq: Any
    stride_mk: Any
    slope: Any
    seed: Any
    o_place: Any  # entry * heads + head
    scale: Any
    softcap: Any
    dropout: Any
    q_len: Any
    kv_len: Any
    max_q: Any  # with max_kv: what places of weights are counted by, the lengths themselves unless they vary
    max_kv: Any
    left: Any
    right: Any


@triton.jit
def in_reach(o_row, o_key, by):
    """Return which pairs the window and kv_len leave."""
    o_distance = o_key - (o_row + (by.kv_len - by.q_len))
    return (o_key < by.kv_len) & (o_distance <= by.right) & (o_distance >= -by.left)


@triton.jit
def mask_tile(o_row, o_key, by, MASK: tl.constexpr):
    """Return a tile of the mask as `scores` takes it, the scalar 0 where there is none.

    To be called before the product of query and key: of a load and a product whose results meet, Triton 3.6 keeps the
    layout of the one that comes first, and softmax in a load's layout takes several times as long.
    """
    b_mask = 0
    if MASK != 0:
        stop = by.kv_len // 16 * 16 if MASK > 2 else by.kv_len
        m_inside = (o_row < by.q_len) & (o_key < stop)
        p_tile = by.p_mask + o_row.to(tl.int64) * by.stride_mq + o_key.to(tl.int64) * by.stride_mk
        b_mask = tl.load(p_tile, mask=m_inside, other=0)
    return b_mask


@triton.jit
def scores(
    b_s,  # query @ key.T
    b_mask,  # mask_tile
    o_row,
    o_key,
    by,  # Scoring
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BORDER: tl.constexpr,
):
    """Return scores, -inf where masked, and tanh of the capped scores (b_s itself without softcap).

    The order is that of kernels.reference: scale, softcap, ALiBi, mask, window.
    Tiles inside the window pass BORDER=False and are not compared with it.
    """
    b_tanh = b_s
    if SOFTCAP:
        b_tanh = tanh(b_s * (by.scale / by.softcap))
        b_s = b_tanh * by.softcap
    else:
        b_s = b_s * by.scale
    if ALIBI:
        o_distance = o_key - (o_row + (by.kv_len - by.q_len))
        b_s -= by.slope * tl.abs(o_distance).to(tl.float32)
    if MASK % 2 == 1:
        b_s = tl.where(b_mask != 0, b_s, -float("inf"))
    elif MASK != 0:
        b_s += b_mask.to(tl.float32)
    if BORDER:
        b_s = tl.where(in_reach(o_row, o_key, by), b_s, -float("inf"))
    return b_s, b_tanh


@triton.jit
def kept(seed, o_place, o_row, o_key, max_q, max_kv, dropout):
    """Return which weights dropout keeps, from Philox at the weight's own place: the same in every kernel.

    The place of a packed sequence's weight is that in (batch, heads, max_q, max_kv), wherever the sequence lies.
    """
    o_weight = (o_place * max_q + o_row) * max_kv + o_key
    return tl.rand(seed, o_weight) >= dropout


@triton.jit
def keep_mask(out, seed, q_len, kv_len, dropout, BLOCK: tl.constexpr):
    """Write `kept` of all weights (batch * heads, q_len, kv_len). Grid (batch * heads, blocks of a head's weights)."""
    o_place = tl.program_id(0).to(tl.int64)
    o_weight = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = q_len.to(tl.int64) * kv_len
    m_keep = kept(seed, o_place, o_weight // kv_len, o_weight % kv_len, q_len, kv_len, dropout)
    tl.store(out + o_place * size + o_weight, m_keep, mask=o_weight < size)


def dropout_mask(call: Call) -> torch.Tensor:
    """Return the weights (B, H, Q, K), bool, that the kernels keep for the dropout and seed of `call`.

    Of a packed call Q and K are problem.q_len and kv_len; a sequence has the first rows and columns of its entry.
    """
    problem = call.problem
    size = problem.q_len * problem.kv_len
    out = torch.empty(
        problem.batch, problem.heads, problem.q_len, problem.kv_len, dtype=torch.bool, device=call.query.device
    )
    grid = (problem.batch * problem.heads, triton.cdiv(size, 1024))
    with torch.cuda.device_of(out):
        keep_mask[grid](out, call.seed, problem.q_len, problem.kv_len, call.dropout, BLOCK=1024)
    return out


@dataclass(frozen=True, slots=True)
class Features:
    """The arguments of a launch that say what is computed, apart from the tensors' own.

    `dynamic` are passed by value; `static` are constexpr and select the code that is compiled.
    """

    dynamic: dict[str, object]
    static: dict[str, object]


def features(call: Call) -> Features:
    """Return the arguments for the masks, biases, dropout and window of `call`."""
    left, right = call.window
    problem, mask = call.problem, call.mask
    heads, head_dim, v_head_dim = problem.heads, problem.head_dim, problem.v_head_dim
    if mask is not None:
        mask = mask.expand(
            problem.batch, heads, problem.q_len, problem.kv_len
        )  # a view: strides of 0 along broadcast dimensions
        mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    slopes = call.alibi_slopes
    if slopes is not None:
        slopes = slopes.float().expand(problem.batch, heads)
    return Features(
        dynamic={
            "mask": mask,
            "slopes": slopes,
            "seed": call.seed,
            "scale": call.scale,
            "softcap": call.softcap,
            "dropout": call.dropout,
            "stride_mb": 0 if mask is None else mask.stride(0),
            "stride_mh": 0 if mask is None else mask.stride(1),
            "stride_mq": 0 if mask is None else mask.stride(2),
            "stride_mk": 0 if mask is None else mask.stride(3),
            "stride_ab": 0 if slopes is None else slopes.stride(0),
            "stride_ah": 0 if slopes is None else slopes.stride(1),
            "heads": heads,
            "q_len": problem.q_len,
            "kv_len": problem.kv_len,
            "left": NO_LIMIT if left == -1 else left,
            "right": NO_LIMIT if right == -1 else right,
        },
        static={
            "GROUP": heads // problem.kv_heads,
            "D": head_dim,
            "DV": v_head_dim,
            "BLOCK_D": padded(head_dim),
            "BLOCK_DV": padded(v_head_dim),
            "LEFT": left != -1,
            "RIGHT": right != -1,
            "MASK": _kind(mask),
            "ALIBI": slopes is not None,
            "SOFTCAP": call.softcap > 0,
            "DROPOUT": call.dropout > 0,
            "PRECISION": str(problem.precision),
        },
    )


def packing(call: Call) -> dict[str, object]:
    """Return the arguments of a launch that say where packed sequences lie."""
    cu_q, cu_kv = call.cu_seqlens or (None, None)
    return {
        "cu_q": cu_q,
        "cu_kv": cu_kv,
        "q_total": 0 if cu_q is None else call.query.shape[0],
        "kv_total": 0 if cu_kv is None else call.key.shape[0],
        "VARLEN": cu_q is not None,
    }


def batched(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` (B, S, H, D), a packed one (total, H, D) as a batch of one."""
    return tensor if tensor.dim() == 4 else tensor[None]


def _kind(mask: torch.Tensor | None) -> int:
    if mask is None:
        return NO_MASK
    aligned = mask.shape[-1] % 16 == 0
    if mask.dtype is torch.uint8:
        return ALIGNED_BOOL_MASK if aligned else BOOL_MASK
    return ALIGNED_BIAS if aligned else BIAS


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Return the arguments stride_qb, stride_qs and stride_qh for q=query (B, Q, H, D), and so on."""
    return {
        f"stride_{name}{dim}": stride
        for name, tensor in tensors.items()
        for dim, stride in zip("bsh", tensor.stride(), strict=False)
    }


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` with its last dimension dense, copied only where it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
