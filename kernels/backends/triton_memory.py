"""Shared memory of a block of our kernels, as Triton 3.6 and 3.7 allocate it from sm_80 to sm_90.

Found by compiling, not by reading Triton: `tilewise bench compile` compares it with what the compiler says. In half
precision without a mask and with more than one stage it is that number, nearly always; elsewhere it is an upper bound,
so that no config is called feasible that does not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tilewise.domain.config import Value

BARRIER = 8  # bytes of one; a pipelined loop through TMA has two per stage
ALIGNMENT = 1024  # bytes, of the tiles that a warpgroup reads
WARPGROUP = 4


@dataclass(frozen=True, slots=True)
class Tiles:
    """What decides which tiles fit: padded head dims, bytes of an element, whether TMA can be used, and the device.

    - tensor_cores: half precision, or float32 as TF32; without them both sides of a product lie in shared memory.
    - mask_bytes: of an element of the mask, 0 without one.
    - mask_along_keys: it has a column per key; where one serves all, its tile takes more to change its layout.
    - packed: sequences behind one another, whose ends a tile may run over.
    - narrow: a head dim is less than its padded one.
    - aligned: rows lie at multiples of 16 elements; where they do not, Triton may load by pointers without a pipeline.
    """

    head_dim: int
    v_head_dim: int
    element_bytes: int
    describable: bool
    capability: int
    shared_memory: int
    tensor_cores: bool = True
    mask_bytes: int = 0
    mask_along_keys: bool = True
    aligned: bool = True
    packed: bool = False
    narrow: bool = False

    @property
    def tma(self) -> bool:
        return self.describable and self.capability >= 90


def by_warpgroup(capability: int, warps: int, rows: int) -> bool:
    """Return whether four warps at a time compute one product, reading both sides from shared memory: sm_90's wgmma.

    sm_100 is taken for it, untried; sm_120 has the products of sm_80.
    """
    return 90 <= capability < 120 and warps % WARPGROUP == 0 and rows >= 64


def shared_memory(role: str, tiles: Tiles, values: Mapping[str, Value]) -> int:
    """Return the bytes of shared memory of one block: those that Triton allocates, or an upper bound of them."""
    held = _while_visiting(role, tiles, values)
    # a result changes its layout on its way out, when the tiles are gone; only the forward's may be larger than they
    return max(held, int(values["block_m"]) * tiles.v_head_dim * tiles.element_bytes) if role == "forward" else held


def _while_visiting(role: str, tiles: Tiles, values: Mapping[str, Value]) -> int:
    rows, columns = int(values["block_m"]), int(values["block_n"])
    warps, stages, tma = int(values["num_warps"]), int(values["num_stages"]), bool(values["tma"])
    d, dv, size = tiles.head_dim, tiles.v_head_dim, tiles.element_bytes
    wide = max(d, dv)
    # of the scores, a program keeps `height` rows, or columns, and visits tiles of `visited`
    height, visited = (columns, rows) if role == "dkdv" else (rows, columns)
    warpgroup = tiles.tensor_cores and by_warpgroup(tiles.capability, warps, height)
    # the warps share the rows of a product, or its columns where it is wider than high; then weights change hands
    product = {"forward": dv, "dkdv": wide, "dq": d}[role]
    # so they do behind the comparison of one loop
    stays_put = height >= product and not values.get("one_loop")
    exchanged = 0 if warpgroup or warps == 1 or stays_put else rows * columns * size
    if not tiles.tensor_cores:
        exchanged = (2 if role == "dkdv" else 1) * rows * columns * size
    if tiles.mask_bytes:  # the mask's tile takes the layout of the scores
        changing = (tiles.mask_bytes if tiles.mask_along_keys else 4) * rows * columns
        if role == "dkdv":  # its scores are transposed
            narrow = tiles.mask_bytes > 1 and tiles.mask_along_keys
            changing = 1024 * warps if narrow else min(tiles.mask_bytes, 2) * rows * columns
        exchanged += changing
    # a tile that changes its layout passes through this, a few rows of a warp at a time
    tf32 = size == 4 and tiles.tensor_cores
    passing = min(visited * wide, (32 if tf32 or not tiles.aligned else 8) * warps * max(wide, 32)) * size
    if size == 4:
        crossed = passing if tf32 and role != "forward" else 0
        exchanged += 4 * rows * warps + (visited * (d + dv) * size if tma else crossed)

    if tiles.packed and tma and not warpgroup:  # rows of the next sequence are cleared, behind the load
        exchanged += visited * (dv if role == "forward" else d + dv) * size
    kept = height * (d if role == "forward" else d + dv) * size
    each = visited * (d + dv) * size
    once = {
        "forward": visited * wide * size + exchanged,
        "dkdv": each + max(passing, exchanged),
        "dq": max(each, visited * d * size + passing) + exchanged,
    }[role]
    stays = tma and not values.get("in_registers") and (warpgroup or role == "dkdv")  # what is kept, in shared memory
    if stages == 1:
        return kept + once + ALIGNMENT if stays else max(kept, once) + BARRIER if tma else kept + once
    buffers = stages if warpgroup else stages - 1
    # a TF32 product reads a tile in one direction only: what two products read across is not pipelined
    piped = buffers * each
    if tf32 and not tma and role != "forward":
        piped = each if role == "dkdv" else visited * (d + buffers * dv) * size
    if role == "dkdv":  # LSE and delta come with the queries
        statistics = (stages - 1) * 2 * visited * 4
        piped += -(-statistics // ALIGNMENT) * ALIGNMENT if warpgroup else statistics
        once += statistics
    if tiles.mask_bytes in (1, 4) or (tiles.mask_bytes and values.get("one_loop")):  # bool not always; half never else
        piped += buffers * rows * columns * tiles.mask_bytes
    if values.get("one_loop") and tma and not warpgroup:  # a tile more is held across the comparison
        piped += visited * wide * size
    piped += exchanged
    if stays:
        return kept + piped + ALIGNMENT
    if tma:
        first = kept if size == 4 else height * (d if role == "forward" else wide) * size
        return max(first, piped) + (2 * buffers + 1) * BARRIER
    return kept + (piped if tiles.aligned else max(piped, once))
