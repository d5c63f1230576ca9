"""The configs of our kernels that are worth trying before anything is known of a problem.

The first of each list won measurements (docs/notes/triton.md says which), the others lie around it. A config here names
only the parameters it is about: the others keep the space's default, so a new parameter of a kernel needs no change
here. A config that a space does not have is left out. Where nothing goes through TMA, on an A100 for instance, the same
tiles are tried by pointers, where a list has none for those: in the causal landscape of an H200 the first three of the
forward take 1.01 to 1.04 times as long so as the best of 306 by pointers, whose median takes 2.2 times as long.
"""

from collections.abc import Mapping

from tilewise.domain.config import Config, Value
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.space import SearchSpace

Known = tuple[Mapping[str, Value], ...]
KNOWN_FIRST = 4  # of a kernel's that a search tries first


def _tiles(*configs: tuple[int, int, int, int, bool]) -> Known:
    names = ("block_m", "block_n", "num_warps", "num_stages", "tma")
    return tuple(dict(zip(names, config, strict=True)) for config in configs)


def _hopper(block: str, *configs: tuple[Value, ...]) -> Known:
    names = (block, "num_warps", "num_stages", "persistent", "swizzle", "q_stages", "pingpong")
    return tuple(dict(zip(names, config, strict=False)) for config in configs)


OTHER_WAY = (
    "padded",
    "mask_stages",
    "dbias",
    "in_registers",
    "pack_gqa",
)  # tried both ways with the most promising config
ONE_LOOP: Known = ({"one_loop": True, "in_registers": False}, {"one_loop": True})
# By kernel, then by the widest head_dim; the most promising first.
# block_m, block_n, num_warps, num_stages, tma
KNOWN: dict[str, dict[int, Known]] = {
    "triton_forward": {
        64: _tiles(
            (64, 64, 4, 3, True), (128, 64, 4, 3, True), (64, 128, 4, 2, True), (128, 128, 8, 2, True),
            (64, 128, 4, 3, True), (128, 64, 8, 3, True), (64, 64, 4, 2, True), (128, 64, 4, 2, True),
        ),
        128: _tiles(
            (64, 64, 4, 3, True), (128, 64, 4, 2, True), (128, 64, 8, 3, True), (64, 64, 4, 2, True),
            (128, 128, 8, 2, True), (64, 128, 4, 2, True), (128, 64, 8, 2, True), (64, 32, 4, 4, True),
        ),
        256: _tiles((64, 32, 4, 2, True), (128, 32, 8, 2, True), (64, 64, 8, 2, True)),
    },
    "triton_dkdv": {
        64: _tiles(
            (64, 64, 4, 2, True), (64, 64, 4, 3, True), (32, 64, 4, 3, True), (64, 128, 8, 2, True),
            (64, 64, 4, 2, False), (32, 64, 4, 2, False),
        ),
        128: _tiles(
            (32, 64, 4, 3, True), (64, 64, 4, 2, True), (64, 128, 8, 2, True), (32, 128, 8, 3, True),
            (32, 64, 4, 2, False), (64, 64, 4, 2, False), (64, 128, 8, 2, False),
            (32, 64, 4, 3, False), (64, 64, 8, 2, False), (32, 128, 8, 2, False),
        ),
    },
    "triton_dq": {
        64: _tiles(
            (64, 64, 4, 3, True), (64, 64, 4, 2, True), (128, 64, 8, 3, True), (128, 64, 4, 3, True),
            (64, 32, 4, 3, True),
        ),
        128: _tiles(
            (64, 64, 4, 3, True), (64, 64, 4, 2, True), (128, 64, 8, 2, True), (128, 64, 8, 3, True),
            (64, 32, 4, 3, True),
        ),
    },
    "hopper_forward": {
        64: _hopper(
            "block_n",
            (128, 8, 4, True, 0, 2, False), (128, 12, 3, True, 16, 2, False), (128, 8, 4, True, 16, 2, True),
            (128, 8, 2, True, 64, 2, False), (128, 12, 3, True, 64, 2, False),
        ),
        128: _hopper(
            "block_n",
            (128, 8, 2, True, 0, 2, False), (128, 8, 2, True, 0, 1, True), (128, 8, 2, True, 16, 2, True),
            (128, 8, 2, False, 0, 1, False),
        ),
    },
    "hopper_dkdv": {
        64: _hopper(
            "block_m", (128, 8, 2, False, 16), (64, 4, 2, False, 0), (128, 8, 2, True, 0), (128, 8, 3, False, 0)
        ),
        128: _hopper(
            "block_m", (64, 4, 2, False, 16), (64, 8, 3, False, 0), (64, 8, 2, True, 0), (64, 4, 2, True, 0)
        ),
    },
    "hopper_dq": {
        64: _hopper("block_n", (128, 8, 3, True, 16), (128, 8, 3, True, 64), (64, 8, 3, True, 0), (64, 12, 2, True, 0)),
        128: _hopper(
            "block_n", (64, 12, 2, False, 0), (64, 8, 3, True, 16), (64, 8, 2, False, 0), (128, 8, 2, True, 0)
        ),
    },
    "flash_cute_forward": {
        64: (
            {"tile_m": 192, "tile_n": 128}, {"tile_m": 192, "tile_n": 96},
            {"tile_m": 192, "tile_n": 192, "mma_pv_is_rs": False},
        ),
        128: (
            {"tile_m": 192, "tile_n": 128, "mma_pv_is_rs": False},
            {"tile_m": 192, "tile_n": 112, "mma_pv_is_rs": False},
            {"tile_m": 192, "tile_n": 80},
        ),
    },
    "cpu_tiled": {
        256: (
            {"block_q": 64, "block_k": 512, "heads_per_chunk": 8},
            {"block_q": 128, "block_k": 512, "heads_per_chunk": 4},
            {"block_q": 256, "block_k": 512, "heads_per_chunk": 8},
        ),
    },
}  # fmt: skip


def known(space: SearchSpace, problem: Problem) -> list[Config]:
    """Return the known configs of a kernel for the width of `problem`, the most promising first, its default not."""
    width = max(problem.head_dim, problem.v_head_dim)
    by_width = KNOWN.get(space.kernel, {})
    values = next((found for widest, found in sorted(by_width.items()) if width <= widest), ({},))
    no_tma = any(parameter.name == "tma" and True not in parameter.values for parameter in space.parameters)
    if no_tma and problem.dtype is not Dtype.FP32:  # whose large tiles take a minute to compile
        values = _by_pointers(values)
    default = space.default.as_dict()
    others = [{**values[0], name: type(default[name])(not default[name])} for name in OTHER_WAY if name in default]
    one_loop = [{**values[0], **each} for each in ONE_LOOP if "one_loop" in default]
    if problem.mask == "none":
        others += one_loop
    else:  # whose tiles one loop loads ahead
        others = one_loop + others
    tried = [*values[:1], *others, *values[1:]]
    found = dict.fromkeys(Config.of(space.kernel, **{**default, **each}) for each in tried)
    return [config for config in found if config in space and config != space.default]


def _by_pointers(values: Known) -> Known:
    """Return those that load by pointers or, where none does, all with their tiles loaded so."""
    meant = tuple(each for each in values if each.get("tma") is False)
    return meant or tuple({**each, "tma": False} for each in values)
