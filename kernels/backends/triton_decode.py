"""Our decoding kernel as a backend."""

import functools
from collections.abc import Mapping

import torch

from tilewise.domain.config import Config, Value
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import MAX_DECODE_Q_LEN, Dtype, Pass, Precision, Problem
from tilewise.domain.space import Constraint, Parameter, SearchSpace

from .. import device as devices
from ..backend import Backend, unsupported_feature
from ..call import Call
from ..tiles import padded
from .triton_memory import by_warpgroup

KERNEL = "triton_decode"
MAX_ROWS = 128  # queries * heads of one key head: one tile
MAX_ROWS_FP32 = 16  # without tensor cores more would not fit the registers
MAX_REGISTERS = 256  # a thread has 255; one more would spill even if nothing else were held
MAX_SPLITS = 512
KEYS_PER_SPLIT = 64  # a split of fewer keys costs more to combine than to compute
PROGRAMS_PER_UNIT = 16  # more splits than fill the device so many times are not worth trying
TILE_BYTES = 32 << 10  # of keys and values, in the default: 32 KiB on their way per multiprocessor are enough
DEFAULT_SHARED = 96 << 10  # what the default may need: every card from sm_80 on has more


class TritonDecode(Backend):
    """Split-KV decoding: sm_80 and up, up to 16 queries, lengths, pages, GQA, window, softcap, head_dim up to 256."""

    name = KERNEL
    gives_lse = True
    max_head_dim = 256

    def supports(self, problem: Problem, device: Device) -> str | None:
        if device.kind is not DeviceKind.CUDA:
            return "needs a CUDA device"
        if device.capability < 80:
            return f"needs sm_80 or newer, this is {device.arch}"
        return _why_not(problem)

    def spaces(self, problem: Problem, device: Device) -> Mapping[str, SearchSpace]:
        # that of the bucket: a config measured there must be in the space of every problem of the bucket
        return {"forward": _space(problem.bucket(), device.units, device.capability, device.shared_memory)}

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Imported here: triton is absent where there is no GPU, and this file must still list its backend.
        from ..triton_kernels.decode import launch

        config = config or _default(call.problem, devices.describe(call.query.device).units)
        lengths, table = call.kv_lengths, call.block_table
        return launch(
            call.query,
            call.key,
            call.value,
            None if lengths is None else lengths.contiguous(),
            table if table is None or table.stride(1) == 1 else table.contiguous(),
            kv_len=call.problem.kv_len,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            precision=str(call.problem.precision),
            block_n=config["block_n"],
            num_splits=config["num_splits"],
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )


def _why_not(problem: Problem) -> str | None:
    rows = problem.q_len * (problem.heads // problem.kv_heads)
    most = MAX_ROWS_FP32 if problem.dtype is Dtype.FP32 else MAX_ROWS
    if problem.pass_ is not Pass.INFERENCE:
        return "inference only"
    if problem.q_len > MAX_DECODE_Q_LEN:
        return f"needs q_len of at most {MAX_DECODE_Q_LEN}"
    if rows > most:
        return f"needs q_len * heads / kv_heads of at most {most} ({problem.dtype}), this is {rows}"
    if max(problem.head_dim, problem.v_head_dim) > TritonDecode.max_head_dim:
        return f"needs head_dim of at most {TritonDecode.max_head_dim}"
    if problem.page_size % 16:
        return "needs a page_size in multiples of 16"
    return unsupported_feature(problem, "mask", "alibi", "dropout")


def _rows(problem: Problem) -> int:
    """Return the height of the tile of queries."""
    return padded(problem.q_len * (problem.heads // problem.kv_heads))


def _key_bytes(problem: Problem) -> int:
    """Return the bytes of one key with its value, as a tile holds them."""
    return (padded(problem.head_dim) + padded(problem.v_head_dim)) * (4 if problem.dtype is Dtype.FP32 else 2)


def _keys(problem: Problem) -> int:
    """Return how many keys a query row reaches at most."""
    left = (problem.window or (-1, -1))[0]
    return problem.kv_len if left == -1 else min(problem.kv_len, left + problem.q_len)


def in_flight(problem: Problem, values: Mapping[str, Value]) -> int:
    """Return the bytes of key and value that one program has on their way.

    With pages, every second stage is taken by the look-up of the page.
    """
    stages = int(values["num_stages"]) - 1
    tiles = max(1, stages // 2 if problem.page_size else stages)
    return tiles * int(values["block_n"]) * _key_bytes(problem)


def shared_memory(problem: Problem, capability: int, values: Mapping[str, Value]) -> int:
    """Return the bytes of shared memory of one program: those that Triton allocates, or an upper bound of them.

    Found by compiling, as in triton_memory: queries, the tiles on their way, and weights that change hands.
    """
    block_n, warps, stages = (int(values[name]) for name in ("block_n", "num_warps", "num_stages"))
    rows, d, dv = _rows(problem), padded(problem.head_dim), padded(problem.v_head_dim)
    size = 4 if problem.dtype is Dtype.FP32 else 2
    tensor_cores = size == 2 or problem.precision is Precision.TF32
    warpgroup = tensor_cores and by_warpgroup(capability, warps, rows)
    tiles = in_flight(problem, values)
    if warpgroup and stages > 1:
        tiles += block_n * _key_bytes(problem)
    lookups = 0
    if problem.page_size:
        lookups = (stages - 1) * 4 * (block_n if problem.page_size % block_n else 4)
    alone = warpgroup or warps == 1 or rows >= dv
    exchanged = 0 if tensor_cores and alone else rows * block_n * size
    if size == 4:
        exchanged += 4 * rows * warps
    # partial results are float32, and change their layout where a warp has but one tile of rows
    partial = int(values["num_splits"]) > 1 and (warpgroup or rows >= dv) and 16 * warps >= rows
    result = rows * dv * 4 if partial else 0
    return max(rows * d * size + tiles + lookups + exchanged, result)


def registers(problem: Problem, values: Mapping[str, Value]) -> int:
    """Return the 32-bit registers a thread needs for its share of the accumulator and of one tile of scores."""
    columns = padded(problem.v_head_dim) + int(values["block_n"])
    return _rows(problem) * columns // (32 * int(values["num_warps"]))


@functools.lru_cache(maxsize=4096)
def _default(problem: Problem, units: int) -> Config:
    """Return tiles of 32 KiB, three stages of them, and splits that fill the device twice."""
    rows, key_bytes = _rows(problem), _key_bytes(problem)
    block_n = min(128, max(16, 1 << (TILE_BYTES // key_bytes).bit_length() - 1))
    stages = 3
    # tall tiles of queries lie in shared memory too, beside one more tile of keys and values
    query_bytes = rows * key_bytes if rows >= 64 else 8 << 10
    while query_bytes + (stages if rows >= 64 else stages - 1) * block_n * key_bytes > DEFAULT_SHARED:
        if stages > 2:
            stages -= 1
        elif block_n > 16:
            block_n //= 2
        else:
            break
    tall = rows == MAX_ROWS or (rows >= 64 and max(problem.head_dim, problem.v_head_dim) > 128)
    return Config.of(
        KERNEL,
        block_n=block_n,
        num_splits=_splits(problem, 2 * units),
        num_warps=min(8 if tall else 4, block_n * rows // 128),
        num_stages=2 * stages - 1 if problem.page_size else stages,
    )


def _splits(problem: Problem, programs: int) -> int:
    """Return the largest power of two of splits that starts no more than `programs`, each with enough keys."""
    fill = programs // (problem.batch * problem.kv_heads)
    most = max(1, min(fill, _keys(problem) // KEYS_PER_SPLIT, MAX_SPLITS))
    return 1 << most.bit_length() - 1


@functools.lru_cache(maxsize=256)
def _space(problem: Problem, units: int, capability: int, available: int) -> SearchSpace:
    def fits(values: Mapping[str, Value]) -> bool:
        return shared_memory(problem, capability, values) <= available

    def fits_registers(values: Mapping[str, Value]) -> bool:
        return registers(problem, values) <= MAX_REGISTERS

    def enough_scores(values: Mapping[str, Value]) -> bool:
        return int(values["block_n"]) * _rows(problem) >= 128 * int(values["num_warps"])

    most = _splits(problem, PROGRAMS_PER_UNIT * units)
    return SearchSpace(
        kernel=KERNEL,
        parameters=(
            Parameter("block_n", (16, 32, 64, 128, 256)),
            Parameter("num_splits", tuple(1 << n for n in range(most.bit_length()))),
            Parameter("num_warps", (1, 2, 4, 8)),
            Parameter("num_stages", (1, 3, 5, 7, 9) if problem.page_size else (1, 2, 3, 4, 5, 6)),
        ),
        constraints=(
            Constraint("its tiles exceed the shared memory of a block", fits),
            Constraint("accumulator and scores exceed the registers of its threads", fits_registers),
            Constraint("a warp would have fewer scores than a tensor core computes at once", enough_scores),
        ),
        default=_default(problem, units),
    )
