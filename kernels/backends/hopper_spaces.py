"""The search spaces of the warp-specialised kernels for sm_90 (triton_kernels.hopper_common)."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from tilewise.domain.config import Config, Value
from tilewise.domain.device import Device
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.space import Constraint, Parameter, SearchSpace

from ..backend import unsupported_feature
from ..tiles import padded

FORWARD, DKDV, DQ = KERNELS = ("hopper_forward", "hopper_dkdv", "hopper_dq")
ROLES = dict(zip(KERNELS, ("forward", "dkdv", "dq"), strict=True))
ROWS = 64  # of a consumer
DBIAS_SHARE = 1 / 32  # of a device's memory, at most, for the gradient of all scores
# Registers of a consumer's thread, by warps of all consumers, less what addresses and barriers need.
_REGISTERS = {4: 232 - 16, 8: 240 - 16, 12: 160 - 16}


@dataclass(frozen=True, slots=True)
class Widths:
    """What decides which tiles fit: padded head dims, and the shared memory of a block in bytes.

    - narrow: a head dim is less than its padded one.
    - mask_bytes: of an element of a mask whose tiles a ring can hold, else 0.
    - dbias: dq can write the gradient of all scores, which is then summed up to that of the mask.
    """

    head_dim: int
    v_head_dim: int
    shared_memory: int
    narrow: bool
    mask_bytes: int = 0
    dbias: bool = False

    @property
    def sum(self) -> int:
        return self.head_dim + self.v_head_dim


def space(role: str, problem: Problem, device: Device) -> SearchSpace | None:
    """Return the space of a role (forward, dkdv, dq), or None where its kernel cannot compute `problem` on `device`.

    The kernels know everything but packed sequences, in half precision.
    """
    if device.capability != 90 or problem.dtype is Dtype.FP32 or unsupported_feature(problem, "varlen", "page_size"):
        return None
    return _space(role, _widths(problem, device))


def predicted(kernel: str, problem: Problem, device: Device, values: Mapping[str, Value]) -> int:
    """Return the shared memory of a block in bytes of a config of `kernel`, an upper bound."""
    return shared_memory(ROLES[kernel], _widths(problem, device), values)


def _widths(problem: Problem, device: Device) -> Widths:
    widths = padded(problem.head_dim), padded(problem.v_head_dim)
    whole = problem.mask != "none" and "q1" not in problem.mask and "k1" not in problem.mask
    scores = 2 * problem.batch * problem.heads * problem.q_len * problem.kv_len
    return Widths(
        *widths,
        device.shared_memory,
        narrow=widths != (problem.head_dim, problem.v_head_dim),
        mask_bytes=(1 if problem.mask.startswith("bool") else 2) if whole and problem.kv_len % 16 == 0 else 0,
        dbias=whole and problem.bias_grad and scores <= DBIAS_SHARE * device.memory_gib * 2**30,
    )


def shared_memory(role: str, widths: Widths, values: Mapping[str, Value]) -> int:
    """Return the shared memory of a block in bytes: rings of half-precision tiles, and room to rearrange results."""
    consumers, stages = int(values["num_warps"]) // 4, int(values["num_stages"])
    if role == "forward":
        kept, block = int(values["q_stages"]) * consumers * ROWS * widths.head_dim, int(values["block_n"])
        results, extra = widths.v_head_dim, 0
    elif role == "dkdv":
        kept, block = consumers * ROWS * widths.sum, int(values["block_m"])
        results, extra = max(widths.head_dim, widths.v_head_dim), stages * block * 8  # LSE and delta
    else:
        kept, block = consumers * ROWS * widths.sum, int(values["block_n"])
        results, extra = widths.head_dim, 0
    rearranging = consumers * (max(8192, ROWS * results) + (4096 if values.get("dbias") else 0))
    extra += int(values.get("mask_stages", 0)) * consumers * ROWS * block * widths.mask_bytes
    return 2 * (kept + stages * block * widths.sum) + extra + rearranging + 512


def registers(role: str, widths: Widths, values: Mapping[str, Value]) -> int:
    """Return the 32-bit registers of a consumer's thread for accumulators, scores and weights."""
    if role == "forward":
        return widths.v_head_dim // 2 + int(values["block_n"]) * 3 // 4
    if role == "dkdv":
        return widths.sum // 2 + int(values["block_m"]) * 5 // 4
    return widths.head_dim // 2 + int(values["block_n"]) * 5 // 4


# What was best at the benchmark's shapes on an H200 (docs/notes/triton.md); the first that fits is the default.
_DEFAULTS: dict[str, tuple[dict[str, Value], ...]] = {
    "forward": (
        {"block_n": 128, "num_warps": 8, "num_stages": 2, "q_stages": 1, "pingpong": False},
        {"block_n": 64, "num_warps": 8, "num_stages": 2, "q_stages": 1, "pingpong": False},
        {"block_n": 32, "num_warps": 8, "num_stages": 1, "q_stages": 1, "pingpong": False},
    ),
    "dkdv": (
        {"block_m": 128, "num_warps": 8, "num_stages": 2},
        {"block_m": 64, "num_warps": 4, "num_stages": 2},
        {"block_m": 32, "num_warps": 8, "num_stages": 1},
    ),
    "dq": (
        {"block_n": 128, "num_warps": 8, "num_stages": 3},
        {"block_n": 64, "num_warps": 8, "num_stages": 3},
        {"block_n": 64, "num_warps": 8, "num_stages": 1},
        {"block_n": 32, "num_warps": 8, "num_stages": 1},
    ),
}


@functools.lru_cache(maxsize=1024)
def _space(role: str, widths: Widths) -> SearchSpace | None:
    def fits(values: Mapping[str, Value]) -> bool:
        return shared_memory(role, widths, values) <= widths.shared_memory

    def fits_registers(values: Mapping[str, Value]) -> bool:
        return registers(role, widths, values) <= _REGISTERS[int(values["num_warps"])]

    def assembles(values: Mapping[str, Value]) -> bool:
        # a program of one consumer starts with 128 registers a thread, which ptxas finds too few for such a product
        return int(values["num_warps"]) > 4 or results <= 128

    results = {"forward": widths.v_head_dim, "dkdv": max(widths.head_dim, widths.v_head_dim), "dq": widths.head_dim}[
        role
    ]
    constraints = [
        Constraint("its rings exceed the shared memory of a block", fits),
        Constraint("accumulators and scores exceed the registers of a consumer", fits_registers),
        Constraint("one consumer has too few registers for 256 columns", assembles),
    ]
    parameters = [
        Parameter("block_m" if role == "dkdv" else "block_n", (32, 64, 128)),
        Parameter("num_warps", (4, 8, 12)),
        Parameter("num_stages", (1, 2, 3, 4)),
        Parameter("persistent", (False, True), ordered=False),
        Parameter("swizzle", (0, 16, 64), ordered=False),
        *([Parameter("padded", (False, True), ordered=False)] if widths.narrow else []),
        *([Parameter("mask_stages", (0, 1, 2))] if widths.mask_bytes else []),
        *([Parameter("dbias", (False, True), ordered=False)] if role == "dq" and widths.dbias else []),
    ]
    if role == "forward":
        parameters += [Parameter("q_stages", (1, 2)), Parameter("pingpong", (False, True), ordered=False)]
        constraints += [
            Constraint("only two consumers take turns", lambda v: not v["pingpong"] or v["num_warps"] == 8),
            Constraint("only a persistent program loads ahead", lambda v: v["q_stages"] == 1 or bool(v["persistent"])),
        ]
    kernel = next(name for name, its in ROLES.items() if its == role)
    common: dict[str, Value] = {"swizzle": 0}
    # a persistent dkdv leaves multiprocessors idle where it has hardly more tiles than there are
    common["persistent"] = role != "dkdv"
    names = {parameter.name for parameter in parameters}
    common |= {name: value for name, value in {"padded": False, "dbias": True}.items() if name in names}
    rings: tuple[dict[str, Value], ...] = ({"mask_stages": 1}, {"mask_stages": 0}) if widths.mask_bytes else ({},)
    for values, ring in itertools.product(_DEFAULTS[role], rings):
        default = {**values, **common, **ring}
        if all(rule.holds(default) for rule in constraints):
            return SearchSpace(kernel, tuple(parameters), Config.of(kernel, **default), tuple(constraints))
    return None
