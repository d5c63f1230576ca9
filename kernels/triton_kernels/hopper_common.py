"""What the warp-specialised kernels for sm_90 share: tiles in flight, the order of work, masks and results.

A program is a producer, one warp that loads tiles through TMA into rings of shared memory, and one to three consumers,
a warpgroup each, that compute on 64 rows of their own (FlashAttention-3, Shah et al. 2024). They meet at mbarriers: a
slot of a ring is `full` when its bytes have arrived, and `free` when every consumer has read it. Written in Gluon,
Triton's language with explicit layouts, which has no interpreter: these kernels run on a GPU only.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise.domain.config import Config

from ..call import Call
from ..tiles import padded
from .common import Scoring, features
from .forward import adjacent_heads
from .ranges import key_range

ROWS = 64  # of a consumer: what one warpgroup's matrix instruction takes
PRODUCER_REGISTERS = gl.constexpr(24)
# of a consumer's thread, by the number of consumers: what is left of the 65,536 of a multiprocessor
CONSUMER_REGISTERS = gl.constexpr({2: 240, 3: 160})
GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.uint8: gl.uint8}


class Ring(NamedTuple):
    """Slots of shared memory with their barriers."""

    tiles: Any
    full: Any
    free: Any


class Extent(NamedTuple):
    """Lengths and window of a problem; left and right are NO_LIMIT where unbounded."""

    q_len: Any
    kv_len: Any
    left: Any
    right: Any


class Modifiers(NamedTuple):
    """What turns products into weights: the arguments of `common.features`, by its names."""

    mask: Any
    slopes: Any
    seed: Any
    scale: Any
    softcap: Any
    dropout: Any
    stride_mb: Any
    stride_mh: Any
    stride_mq: Any
    stride_mk: Any
    stride_ab: Any
    stride_ah: Any


class Work(NamedTuple):
    """The tiles of the result: `blocks` of rows for each of `places` = batch * heads."""

    blocks: Any
    places: Any
    heads: Any


@dataclass(frozen=True, slots=True)
class Options:
    """What is compiled in: everything but tensors and lengths."""

    consumers: int
    stages: int  # slots of the rings that are visited
    q_stages: int  # and of the ring of what a consumer keeps, for each consumer
    swizzle: int
    pingpong: bool  # whether two consumers issue their products in turn
    group: int  # query heads per key head
    left: bool  # whether the window has a left side
    right: bool  # whether it has a right side; causal is right = 0
    wide: bool  # whether value is a wide descriptor
    mask: int  # its kind, as in common
    mask_stages: int  # slots of the ring of its tiles, for each consumer; 0: consumers load them by pointers
    dbias: bool  # whether dq writes the gradient of the scores
    alibi: bool
    softcap: bool
    dropout: bool

    @property
    def plain(self) -> bool:
        """Whether scores are the scaled products, but for window and length."""
        return self.mask == 0 and not self.alibi and not self.softcap

    @property
    def direct(self) -> bool:
        """Whether, besides, no weight is dropped."""
        return self.plain and not self.dropout


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return COUNT mbarriers that complete a phase after ARRIVALS arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def slots(descriptor, SLOTS: gl.constexpr):
    """Return shared memory for SLOTS tiles of `descriptor`."""
    shape: gl.constexpr = [SLOTS] + descriptor.block_type.shape  # noqa: RUF005 - Gluon knows no unpacking here
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def ring(descriptor, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Return a ring of SLOTS tiles of `descriptor`, each read by READERS consumers."""
    return Ring(slots(descriptor, SLOTS), barriers(SLOTS, 1), barriers(SLOTS, READERS))


@gluon.jit
def fill(into, count, descriptor, where, SLOTS: gl.constexpr):
    """Load the tile at `where` into slot count % SLOTS, as soon as that slot is free."""
    slot = count % SLOTS
    mbarrier.wait(into.free.index(slot), ((count // SLOTS) & 1) ^ 1)
    mbarrier.expect(into.full.index(slot), descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(descriptor, where, into.full.index(slot), into.tiles.index(slot))


@gluon.jit
def fill_both(into, count, descriptor, where, beside, descriptor2, where2, SLOTS: gl.constexpr):
    """Load two tiles that are read together: the slot's barriers are those of `into`, `beside` has only tiles."""
    slot = count % SLOTS
    mbarrier.wait(into.free.index(slot), ((count // SLOTS) & 1) ^ 1)
    mbarrier.expect(into.full.index(slot), descriptor.block_type.nbytes + descriptor2.block_type.nbytes)
    tma.async_copy_global_to_shared(descriptor, where, into.full.index(slot), into.tiles.index(slot))
    tma.async_copy_global_to_shared(descriptor2, where2, into.full.index(slot), beside.index(slot))


@gluon.jit
def await_full(of, count, SLOTS: gl.constexpr):
    """Wait for the tile of use `count`."""
    mbarrier.wait(of.full.index(count % SLOTS), (count // SLOTS) & 1)


@gluon.jit
def release(of, count, SLOTS: gl.constexpr):
    """Give the slot of use `count` back to the producer."""
    mbarrier.arrive(of.free.index(count % SLOTS), count=1)


@gluon.jit
def mask_ring(descriptor, unused, OPTIONS: gl.constexpr):
    """Return the ring of the mask's tiles, each read by one consumer; `unused` where there is none."""
    masks = unused
    if OPTIONS.mask_stages:
        masks = ring(descriptor, OPTIONS.mask_stages * OPTIONS.consumers, 1)
    return masks


@gluon.jit
def fill_mask(into, count, descriptor, entry, head, row, column, ME: gl.constexpr, OPTIONS: gl.constexpr):
    """Load the mask of consumer ME's part of tile `count`, from `row` and `column` on."""
    SLOTS: gl.constexpr = OPTIONS.mask_stages * OPTIONS.consumers
    where = [gl.minimum(entry, descriptor.shape[0] - 1), gl.minimum(head, descriptor.shape[1] - 1), row, column]
    fill(into, count * OPTIONS.consumers + ME, descriptor, where, SLOTS)


@gluon.jit
def take_mask(masks, count, ME: gl.constexpr, OPTIONS: gl.constexpr, TRANSPOSED: gl.constexpr, LAYOUT: gl.constexpr):
    """Return consumer ME's part of tile `count` of the mask."""
    SLOTS: gl.constexpr = OPTIONS.mask_stages * OPTIONS.consumers
    use = count * OPTIONS.consumers + ME
    await_full(masks, use, SLOTS)
    tile = masks.tiles.index(use % SLOTS).reshape((masks.tiles.shape[3], masks.tiles.shape[4]))
    if TRANSPOSED:
        tile = tile.permute((1, 0))
    b_mask = tile.load(LAYOUT)
    fence_async_shared()  # TMA writes the slot next, and is ordered with ordinary reads by a fence only
    release(masks, use, SLOTS)
    return b_mask


@gluon.jit
def assigned(tile, work, SWIZZLE: gl.constexpr, DESCENDING: gl.constexpr):
    """Return the (block, place) of a tile: block by block over SWIZZLE places, so that their keys stay in L2.

    SWIZZLE = 0 takes all places together. DESCENDING: from the last block, which has the most keys where causal.
    """
    if SWIZZLE == 0:
        block = tile // work.places
        place = tile % work.places
    else:
        section = tile // (SWIZZLE * work.blocks)
        width = gl.minimum(work.places - section * SWIZZLE, SWIZZLE)
        rest = tile - section * (SWIZZLE * work.blocks)
        block = rest // width
        place = section * SWIZZLE + rest % width
    if DESCENDING:
        block = work.blocks - 1 - block
    return block, place


@gluon.jit
def key_tiles(block, extent, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, OPTIONS: gl.constexpr):
    """Return (low, inside_low, inside_high, high): a block of queries visits tiles high - 1 down to low.

    There is at least one, and tile high - 1 never counts as inside: the ragged end and the diagonal are in it.
    """
    first_diagonal = block * BLOCK_M + extent.kv_len - extent.q_len
    start, inside_start, inside_stop, stop = key_range(
        first_diagonal,
        first_diagonal + BLOCK_M - 1,
        extent.kv_len,
        extent.left,
        extent.right,
        BLOCK_N,
        OPTIONS.left,
        OPTIONS.right,
    )
    low = start // BLOCK_N
    high = gl.maximum((stop + BLOCK_N - 1) // BLOCK_N, low + 1)
    inside_high = gl.maximum(gl.minimum(inside_stop // BLOCK_N, high - 1), low)
    inside_low = gl.minimum(gl.maximum((inside_start + BLOCK_N - 1) // BLOCK_N, low), inside_high)
    return low, inside_low, inside_high, high


@gluon.jit
def scoring(modifiers, entry, head, heads, extent, OPTIONS: gl.constexpr):
    """Return the Scoring of one batch entry and query head."""
    o_entry = entry.to(gl.int64)
    o_head = head.to(gl.int64)
    p_mask = modifiers.mask
    stride_mq, stride_mk = modifiers.stride_mq, modifiers.stride_mk
    if OPTIONS.mask != 0:
        p_mask = p_mask + o_entry * modifiers.stride_mb + o_head * modifiers.stride_mh
    if OPTIONS.mask > 2:  # what is known of a number's divisors does not reach a partition
        p_mask = gl.multiple_of(p_mask, 16)
        stride_mq, stride_mk = stride_mq // 16 * 16, 1
    slope = 0.0
    if OPTIONS.alibi:
        slope = gl.load(modifiers.slopes + o_entry * modifiers.stride_ab + o_head * modifiers.stride_ah)
    return Scoring(
        p_mask, stride_mq, stride_mk, slope, modifiers.seed, o_entry * heads + o_head,
        modifiers.scale, modifiers.softcap, modifiers.dropout, extent.q_len, extent.kv_len, extent.q_len,
        extent.kv_len, extent.left, extent.right,
    )  # fmt: skip


@gluon.jit
def mask_keys(b_s, first, o_row, extent, OPTIONS: gl.constexpr):
    """Return the scores of queries o_row and the keys from `first` on, -inf outside the window and the length."""
    o_key = first + gl.arange(0, b_s.shape[1], layout=gl.SliceLayout(0, b_s.type.layout))
    o_diagonal = o_row + (extent.kv_len - extent.q_len)
    if OPTIONS.right:
        o_last = gl.minimum(o_diagonal + extent.right, extent.kv_len - 1)
        b_s = gl.where(o_key[None, :] <= o_last[:, None], b_s, -float("inf"))
    else:
        b_s = gl.where((o_key < extent.kv_len)[None, :], b_s, -float("inf"))
    if OPTIONS.left:
        b_s = gl.where(o_key[None, :] >= (o_diagonal - extent.left)[:, None], b_s, -float("inf"))
    return b_s


@gluon.jit
def write(b_tile, pointer, stride, first, length, columns):
    """Store rows first.. of a tile at `pointer`, which is at row 0, up to `length` rows and `columns` columns."""
    WIDTH: gl.constexpr = b_tile.shape[1]
    LANES: gl.constexpr = 32 if WIDTH >= 256 else WIDTH // 8  # eight elements a thread
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    b_out = gl.convert_layout(b_tile.to(pointer.dtype.element_ty), LAYOUT)
    o_row = first + gl.arange(0, b_tile.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    o_column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    p_tile = pointer + o_row.to(gl.int64)[:, None] * stride + o_column[None, :]
    gl.store(p_tile, b_out, mask=(o_row < length)[:, None] & (o_column < columns)[None, :])


def descriptor(tensor: torch.Tensor, rows: int, *, wide: bool = False) -> TensorDescriptor:
    """Return a TMA descriptor of a BSHD tensor whose tiles are `rows` of one head, padded to a power of two.

    `wide`: all heads in one row, as forward.wide_descriptor says.
    """
    block = [1, 1, rows, padded(tensor.shape[-1])]
    tensor = tensor.flatten(2).unsqueeze(1) if wide else tensor.permute(0, 2, 1, 3)
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def mask_descriptor(call: Call, rows: int, columns: int, chosen: Options, unused: TensorDescriptor) -> TensorDescriptor:
    """Return a TMA descriptor of the mask (B|1, H|1, Q, K) in tiles of (rows, columns), `unused` without a ring."""
    if chosen.mask_stages == 0:
        return unused
    mask: Any = features(call).dynamic["mask"]
    block, (*_, q_len, kv_len), (*outer, stride_mq, _) = [1, 1, rows, columns], mask.shape, mask.stride()
    shape = [1 if stride == 0 else size for stride, size in zip(outer, mask.shape, strict=False)]
    outer = [stride or q_len * stride_mq for stride in outer]
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPES[mask.dtype])
    return TensorDescriptor(mask, [*shape, q_len, kv_len], [*outer, stride_mq, 1], block, layout)


# The names of Modifiers and Extent among the dynamic arguments of `common.features`.
MODIFIERS = (*Modifiers._fields, *Extent._fields)


def modifiers(call: Call, unused: torch.Tensor) -> dict[str, object]:
    """Return the arguments of Modifiers and Extent for `call`; a tensor that it has not is `unused`, for None is no
    member of a tuple in a kernel."""
    given = features(call).dynamic
    return {name: unused if given[name] is None else given[name] for name in MODIFIERS}


def options(call: Call, config: Config) -> Options:
    """Return the options of a config; a kernel without one of its parameters has none of what it stands for."""
    left, right = call.window
    chosen = config.as_dict()
    return Options(
        consumers=config["num_warps"] // 4,
        stages=config["num_stages"],
        q_stages=int(chosen.get("q_stages", 1)),
        swizzle=config["swizzle"],
        pingpong=bool(chosen.get("pingpong", False)),
        group=call.query.shape[2] // call.key.shape[2],
        left=left != -1,
        right=right != -1,
        wide=adjacent_heads(call.value),
        dbias=bool(chosen.get("dbias", False)) and call.problem.bias_grad,
        **_selected(call, int(chosen.get("mask_stages", 0))),
    )


def _selected(call: Call, mask_stages: int) -> dict[str, Any]:
    """Return what `call` selects. A float32 mask, or one with rows off multiples of 16, is loaded by pointers."""
    given = features(call)
    selected: dict[str, Any] = {name: given.static[name.upper()] for name in ("mask", "alibi", "softcap", "dropout")}
    mask: Any = given.dynamic["mask"]
    if selected["mask"] > 2:
        *strides, stride_mk = mask.stride()
        if mask.data_ptr() % 16 or any(stride % 16 for stride in strides) or stride_mk != 1:
            selected["mask"] -= 2
    rows = selected["mask"] > 2 and mask.stride(2) != 0 and mask.dtype in GLUON_DTYPES
    return selected | {"mask_stages": mask_stages if rows else 0}


def warp_options(consumers: int) -> dict[str, int]:
    """Return the launch's options that share a multiprocessor's registers out among the warps.

    With one consumer two programs fit side by side. The default partition gets what the others leave.
    """
    return {"num_warps": 4, **({"maxnreg": 128} if consumers == 1 else {})}


def grid(tiles: int, consumers: int, persistent: bool, device: torch.device) -> tuple[int]:
    """Return a program for each tile, or as many as run at once, each taking every so many-th tile."""
    if not persistent or device.type != "cuda":  # what is compiled only runs nowhere
        return (tiles,)
    return (min(tiles, _multiprocessors(device) * (2 if consumers == 1 else 1)),)


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
