"""Our Triton kernels as a backend: every mask and score modification, forward and backward."""

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

from tilewise.domain.config import Candidate, Config, Value
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import Dtype, Pass, Precision, Problem
from tilewise.domain.space import Constraint, Parameter, SearchSpace

from ..backend import Backend, Gradients, unsupported_varlen
from ..call import Call
from ..tiles import padded
from . import hopper_spaces
from .triton_memory import Tiles, by_warpgroup, shared_memory

MAX_REGISTERS = 256  # a thread has 255; one more would spill even if nothing else were held
_ELEMENT_BYTES = {Dtype.FP16: 2, Dtype.BF16: 2, Dtype.FP32: 4}
ROLES = ("forward", "dkdv", "dq")


class Triton(Backend):
    """sm_80 and up by pointers, sm_90 and up through TMA too, warp-specialised on sm_90; head_dim up to 256."""

    name = "triton"
    has_backward = True
    gives_lse = True
    max_head_dim = 256

    def supports(self, problem: Problem, device: Device) -> str | None:
        if device.kind is not DeviceKind.CUDA:
            return "needs a CUDA device"
        if device.capability < 80:
            return f"needs sm_80 or newer, this is {device.arch}"
        if max(problem.head_dim, problem.v_head_dim) > self.max_head_dim:
            return f"needs head_dim of at most {self.max_head_dim}"
        return unsupported_varlen(problem)

    def spaces(self, problem: Problem, device: Device) -> Mapping[str, SearchSpace]:
        roles = ROLES if problem.pass_ is Pass.TRAINING else ROLES[:1]
        return {role: _with_hopper(role, problem, device) for role in roles}

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Imported here: triton is absent where there is no GPU, and this file must still list its backend.
        from ..triton_kernels.forward import launch

        if _nothing_packed(call):
            total, heads = call.query.shape[:2]
            lse = call.query.new_full((heads, total), -torch.inf, dtype=torch.float32)
            return call.query.new_zeros(total, heads, call.value.shape[-1]), lse
        config = config or self._config(call, "forward")
        if config.kernel != hopper_spaces.FORWARD:
            return launch(call, config)
        if call.scale <= 0:  # it folds the scale into the exponent, after the maximum
            return launch(call, self._config(call, "forward"))
        from ..triton_kernels import hopper_forward

        return hopper_forward.launch(call, config)

    def backward(
        self, call: Call, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor, candidate: Candidate
    ) -> Gradients:
        from ..triton_kernels.backward import launch_dkdv, launch_dq, prepare
        from ..triton_kernels.bias import launch_dbias

        if _nothing_packed(call):
            return Gradients(*(torch.zeros_like(tensor) for tensor in (call.query, call.key, call.value)))
        prepared = prepare(call, out, lse, grad_out)
        dkdv, dq = (candidate.config(role) or self._config(call, role) for role in ROLES[1:])
        if {dkdv.kernel, dq.kernel} & {hopper_spaces.DKDV, hopper_spaces.DQ}:
            from ..triton_kernels import hopper_backward
        by_dkdv = hopper_backward.launch_dkdv if dkdv.kernel == hopper_spaces.DKDV else launch_dkdv
        grad_key, grad_value = by_dkdv(prepared, dkdv)
        grad_mask = None
        if dq.kernel == hopper_spaces.DQ:
            grad_query, grad_mask = hopper_backward.launch_dq(prepared, dq)
        else:
            grad_query = launch_dq(prepared, dq)
        if call.problem.bias_grad and grad_mask is None:
            grad_mask = launch_dbias(prepared)
        return Gradients(grad_query, grad_key, grad_value, grad_mask)

    def kept_weights(self, call: Call, config: Config | None) -> torch.Tensor:  # noqa: ARG002
        from ..triton_kernels.common import dropout_mask

        return dropout_mask(call)

    def _config(self, call: Call, role: str) -> Config:
        """Return the default for a call whose candidate names no config: small enough for any sm_80 device."""
        problem = call.problem
        tiles = Tiles(padded(problem.head_dim), padded(problem.v_head_dim), _ELEMENT_BYTES[problem.dtype], False, 80, 0)
        return _default(role, tiles)


def _with_hopper(role: str, problem: Problem, device: Device) -> SearchSpace:
    """Return the space of a role, with that of the warp-specialised kernel where there is one.

    The first one's default is the backend's. The warp-specialised forward has one program on a multiprocessor, whose
    start and end nothing hides: with narrow heads, whose tiles are soon done, the other is the better guess. So it is
    where dropout needs registers that the warp-specialised kernels have not.
    """
    space = _space(role, tiles_of(problem, device))
    hopper = hopper_spaces.space(role, problem, device) if describable(problem) else None
    if hopper is None:
        return space
    if problem.dropout or (role == "forward" and max(problem.head_dim, problem.v_head_dim) <= 64):
        return replace(space, alternatives=(hopper,))
    return replace(hopper, alternatives=(space,))


def _nothing_packed(call: Call) -> bool:
    """Whether a packed call has no queries, or no keys, at all: there is no memory that a kernel could be given."""
    return call.cu_seqlens is not None and 0 in (call.query.shape[0], call.key.shape[0])


def tiles_of(problem: Problem, device: Device) -> Tiles:
    """Return what limits the tiles of a problem."""
    size = _ELEMENT_BYTES[problem.dtype]
    return Tiles(
        padded(problem.head_dim),
        padded(problem.v_head_dim),
        size,
        describable(problem),
        device.capability,
        device.shared_memory,
        tensor_cores=size == 2 or problem.precision is Precision.TF32,
        mask_bytes=0 if problem.mask == "none" else 1 if problem.mask.startswith("bool") else size,
        mask_along_keys="k1" not in problem.mask,
        aligned=problem.head_dim % 16 == 0 and problem.v_head_dim % 16 == 0,
        packed=problem.packed,
        narrow=problem.head_dim != padded(problem.head_dim) or problem.v_head_dim != padded(problem.v_head_dim),
    )


def describable(problem: Problem) -> bool:
    """Whether rows of the tensors can lie at multiples of 16 bytes, as TMA takes them."""
    size = _ELEMENT_BYTES[problem.dtype]
    return problem.head_dim * size % 16 == 0 and problem.v_head_dim * size % 16 == 0


def registers(role: str, tiles: Tiles, values: Mapping[str, Value]) -> int:
    """Return the 32-bit registers a thread needs for its share of the accumulators and of one tile of scores."""
    rows, columns = int(values["block_m"]), int(values["block_n"])
    scores = rows * columns
    accumulators = {
        "forward": rows * tiles.v_head_dim,
        "dkdv": columns * (tiles.head_dim + tiles.v_head_dim),
        "dq": rows * tiles.head_dim,
    }[role]
    return (scores + accumulators) // (32 * int(values["num_warps"]))


@functools.lru_cache(maxsize=1024)
def _space(role: str, tiles: Tiles) -> SearchSpace:
    def fits(values: Mapping[str, Value]) -> bool:
        return shared_memory(role, tiles, values) <= tiles.shared_memory

    def fits_registers(values: Mapping[str, Value]) -> bool:
        return registers(role, tiles, values) <= MAX_REGISTERS

    def enough_rows(values: Mapping[str, Value]) -> bool:
        return int(values["block_n" if role == "dkdv" else "block_m"]) >= least_rows * int(values["num_warps"])

    def may_stay(values: Mapping[str, Value]) -> bool:
        height = int(values["block_n" if role == "dkdv" else "block_m"])
        chosen = tiles.tensor_cores and by_warpgroup(tiles.capability, int(values["num_warps"]), height)
        return not values.get("in_registers") or (chosen and bool(values["tma"]))

    # the gradients' accumulators are wide: there the warps may share the rows of one dot
    largest, least_rows = (256, 16) if role == "forward" else (128, 8)
    blocks = tuple(size for size in (16, 32, 64, 128, 256) if size <= largest)
    return SearchSpace(
        kernel=f"triton_{role}",
        parameters=(
            Parameter("block_m", blocks),
            Parameter("block_n", blocks),
            Parameter("num_warps", (1, 2, 4, 8)),
            Parameter("num_stages", (1, 2, 3, 4, 5) if role == "forward" else (1, 2, 3, 4)),
            Parameter("tma", (False, True) if tiles.tma else (False,), ordered=False),
            *([Parameter("in_registers", (False, True), ordered=False)] if tiles.tma else []),
            *([Parameter("padded", (False, True), ordered=False)] if tiles.narrow and tiles.tma else []),
            *([Parameter("one_loop", (False, True), ordered=False)] if _may_visit_at_once(role, tiles) else []),
        ),
        constraints=(
            Constraint("its tiles exceed the shared memory of a block", fits),
            Constraint("accumulators and scores exceed the registers of its threads", fits_registers),
            Constraint(f"a warp would have fewer than {least_rows} rows", enough_rows),
            Constraint("only tiles through TMA are padded before", lambda v: not v.get("padded") or bool(v["tma"])),
            Constraint("only a warpgroup has the choice to keep tiles in registers", may_stay),
            Constraint(  # kernels/sass.py finds that it does; narrower and wider tiles are spared
                "in one loop ptxas overwrites queries in registers by weights that need as many",
                lambda v: not (v.get("one_loop") and v.get("in_registers")) or v["block_n"] != tiles.head_dim,
            ),
        ),
        default=_default(role, tiles),
    )


def _may_visit_at_once(role: str, tiles: Tiles) -> bool:
    """Whether borders and inside may be one loop; of packed sequences it would have to clear every tile."""
    return role == "forward" and not tiles.packed


# (block_m, block_n, num_warps, num_stages) by role, for rows of at most so many bytes.
_DEFAULTS: dict[str, dict[int, dict[str, tuple[int, int, int, int]]]] = {
    # the best of a handful at the benchmark's shapes on an H200: docs/notes/triton.md
    "tma": {
        128: {"forward": (64, 64, 4, 3), "dkdv": (64, 64, 4, 2), "dq": (64, 64, 4, 3)},
        256: {"forward": (64, 64, 4, 3), "dkdv": (32, 64, 4, 3), "dq": (64, 64, 4, 3)},
    },
    # float32 has no tensor cores at full precision: each dot is unrolled, and large tiles take a minute to compile
    "single": {
        512: {"forward": (64, 32, 4, 2), "dkdv": (32, 32, 4, 1), "dq": (32, 32, 4, 1)},
        1024: {"forward": (32, 16, 2, 2), "dkdv": (16, 16, 2, 1), "dq": (16, 16, 2, 1)},
    },
    "pointers": {
        256: {"forward": (128, 64, 4, 2), "dkdv": (32, 64, 4, 2), "dq": (64, 32, 4, 2)},
        512: {"forward": (64, 32, 4, 2), "dkdv": (32, 32, 4, 1), "dq": (32, 32, 4, 1)},
    },
}


@functools.lru_cache(maxsize=1024)
def _default(role: str, tiles: Tiles) -> Config:
    row_bytes = max(tiles.head_dim, tiles.v_head_dim) * tiles.element_bytes
    tma = tiles.tma and tiles.element_bytes == 2 and row_bytes <= max(_DEFAULTS["tma"])
    by_width = _DEFAULTS["tma" if tma else "pointers" if tiles.element_bytes == 2 else "single"]
    width = min(width for width in by_width if width >= row_bytes)
    block_m, block_n, num_warps, num_stages = by_width[width][role]
    sizes: dict[str, Value] = {"block_m": block_m, "block_n": block_n, "num_warps": num_warps, "num_stages": num_stages}
    if tiles.tma:  # dkdv keeps keys and values, which ptxas overwrites in registers here and there
        sizes["in_registers"] = tma and role != "dkdv" and by_warpgroup(tiles.capability, num_warps, block_m)
    if tiles.narrow and tiles.tma:
        sizes["padded"] = False
    if _may_visit_at_once(role, tiles):  # of half-precision masks the default's tiles take 58% of the time in one loop
        sizes["one_loop"] = (
            tma
            and tiles.mask_bytes == 2
            and block_n != tiles.head_dim
            and shared_memory(role, tiles, {**sizes, "tma": tma, "one_loop": True}) <= tiles.shared_memory
        )
    return Config.of(f"triton_{role}", tma=tma, **sizes)
