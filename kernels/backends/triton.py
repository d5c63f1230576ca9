"""Our Triton kernels as a backend."""

import functools
from collections.abc import Mapping

import torch

from tilewise.domain.config import Config, Value
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.space import Constraint, Parameter, SearchSpace

from ..backend import Backend, unsupported_feature
from ..call import Call

KERNEL = "triton_forward"
MAX_REGISTERS = 256  # a thread has 255; one more would spill even if nothing else were held


class Triton(Backend):
    """The pointer-path forward: sm_80 and up, fp16 and bf16, head_dim up to 256, GQA, causal and sliding window."""

    name = "triton"
    gives_lse = True

    def supports(self, problem: Problem, device: Device) -> str | None:
        if device.kind is not DeviceKind.CUDA:
            return "needs a CUDA device"
        if device.capability < 80:
            return f"needs sm_80 or newer, this is {device.arch}"
        if problem.dtype is Dtype.FP32:
            return "needs fp16 or bf16"
        if max(problem.head_dim, problem.v_head_dim) > 256:
            return "needs head_dim of at most 256"
        return unsupported_feature(problem, "mask", "alibi", "softcap", "dropout", "varlen", "page_size")

    def space(self, problem: Problem, device: Device) -> SearchSpace | None:
        return _space(problem.head_dim, problem.v_head_dim, device.shared_memory)

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Imported here: triton is absent where there is no GPU, and this file must still list its backend.
        from ..triton_kernels.forward import launch

        config = config or _default(call.problem.head_dim, call.problem.v_head_dim)
        return launch(
            call.query,
            call.key,
            call.value,
            scale=call.scale,
            window=call.window,
            precision=str(call.problem.precision),
            block_m=config["block_m"],
            block_n=config["block_n"],
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )


def _padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.lru_cache(maxsize=256)
def _default(head_dim: int, v_head_dim: int) -> Config:
    wide = max(_padded(head_dim), _padded(v_head_dim)) > 128
    return Config.of(KERNEL, block_m=64 if wide else 128, block_n=32 if wide else 64, num_warps=4, num_stages=2)


def shared_memory(head_dim: int, v_head_dim: int, values: Mapping[str, Value]) -> int:
    """Return a lower bound of the shared memory in bytes of one block: the pipelined tiles of key and value."""
    stages = max(1, int(values["num_stages"]) - 1)
    return stages * int(values["block_n"]) * (_padded(head_dim) + _padded(v_head_dim)) * 2


def registers(v_head_dim: int, values: Mapping[str, Value]) -> int:
    """Return the 32-bit registers a thread needs for its share of the accumulator and of one tile of scores."""
    columns = _padded(v_head_dim) + int(values["block_n"])
    return int(values["block_m"]) * columns // (32 * int(values["num_warps"]))


@functools.lru_cache(maxsize=256)
def _space(head_dim: int, v_head_dim: int, available: int) -> SearchSpace:
    def fits(values: Mapping[str, Value]) -> bool:
        return shared_memory(head_dim, v_head_dim, values) <= available

    def fits_registers(values: Mapping[str, Value]) -> bool:
        return registers(v_head_dim, values) <= MAX_REGISTERS

    def enough_rows(values: Mapping[str, Value]) -> bool:
        return int(values["block_m"]) >= 16 * int(values["num_warps"])

    return SearchSpace(
        kernel=KERNEL,
        parameters=(
            Parameter("block_m", (16, 32, 64, 128, 256)),
            Parameter("block_n", (16, 32, 64, 128, 256)),
            Parameter("num_warps", (1, 2, 4, 8)),
            Parameter("num_stages", (1, 2, 3, 4, 5)),
        ),
        constraints=(
            Constraint("its tiles of key and value exceed the shared memory of a block", fits),
            Constraint("accumulator and scores exceed the registers of its threads", fits_registers),
            Constraint("a warp would have fewer than 16 rows of queries", enough_rows),
        ),
        default=_default(head_dim, v_head_dim),
    )
