"""flash_attn.cute, the CuTe DSL kernels of the PyPI package flash-attn-4 (written against 4.0.0b36).

Its own choice of tiles runs through its public flash_attn_func. Other tiles go through its internal _flash_attn_fwd and
_flash_attn_bwd, whose parameters are looked up first: a version without them keeps its own choice and has no space.
causal and window are aligned bottom-right there too, and rows with nothing to attend give 0 and LSE -inf.
"""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch.autograd.function import once_differentiable

from tilewise.domain.config import Candidate, Config, Value
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.space import Constraint, Parameter, SearchSpace

from ..backend import Backend, Gradients, unsupported_feature, unsupported_varlen
from ..call import Call
from ..packed import flash_arguments
from .flash_cute_package import Internals, absent, interface, internals, tunable, version

KERNEL = "flash_cute_forward"
KNOWN_VERSION = "4.0.0b36"
# Registers of a thread for scores, their half-precision copy and the accumulator, by tile_m (64 rows a warp group).
# Measured on an H200: above these a config spills and is 2 to 3 times slower than the best.
_REGISTERS = {64: 240, 128: 216, 192: 140}
_TILING = ("tile_m", "tile_n", "mma_pv_is_rs", "intra_wg_overlap")
_OLDER = ((0, 64, 128), (0, 32, 48, 64, 80, 96, 112, 128))  # sm_8x and sm_12x run the same kernel
_HOPPER = ((0, 64, 128, 192), (0, 64, 80, 96, 112, 128, 144, 160, 176, 192))
_FIXED = ((0,), (0,))  # on sm_10x and sm_11x its tiles are 128 by 128
# tile_m and tile_n to try, by the tens of the compute capability; split-KV it has on sm_10x and sm_11x only
_TILES = {8: _OLDER, 9: _HOPPER, 10: _FIXED, 11: _FIXED, 12: _OLDER}


class FlashCute(Backend):
    """FlashAttention 4: fp16 and bf16, GQA, causal and sliding window, softcap, its own backward from sm_90 on."""

    name = "flash_cute"
    differentiable = True
    gives_lse = True
    compile_seconds: ClassVar[float] = 8.0

    def supports(self, problem: Problem, device: Device) -> str | None:
        if device.kind is not DeviceKind.CUDA:
            return "needs a CUDA device"
        reason = absent()
        if reason is not None:
            return reason
        if problem.dtype is Dtype.FP32:
            return "needs fp16 or bf16"
        reason = _why_not_arch(problem, device) or _why_not_head_dim(problem, device.capability // 10)
        return reason or unsupported_feature(problem, "mask", "alibi", "dropout") or unsupported_varlen(problem)

    def spaces(self, problem: Problem, device: Device) -> Mapping[str, SearchSpace]:
        if not tunable():
            return {}
        family = device.capability // 10
        group = problem.heads > problem.kv_heads
        return {"forward": _space(problem.head_dim, problem.v_head_dim, group, family, device.shared_memory)}

    def load(self) -> None:
        with contextlib.suppress(ImportError):  # a call says so
            interface()

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.cuda.device_of(call.query):  # it launches on the current device, whatever the tensors are on
            return self.compute(call, config)

    def compute(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what `forward` returns; on tensors without data only compile what it launches."""
        try:
            package = interface()
        except ImportError as error:
            raise UnsupportedError(f"flash_attn.cute cannot be imported: {error}; install it again") from error
        options, packed = _options(call.problem, config), flash_arguments(call)
        if not options:
            own = package.flash_attn_varlen_func if packed else package.flash_attn_func
            out, lse = own(
                call.query,
                call.key,
                call.value,
                **packed,
                softmax_scale=call.scale,
                causal=call.problem.causal,
                window_size=_sides(call),
                softcap=call.softcap,
                deterministic=call.problem.deterministic,
                return_lse=True,
            )
            return out, lse
        inside = internals()
        if inside is None:
            raise UnsupportedError(
                f"{config} cannot be told to flash-attn-4 {version()}: its _flash_attn_fwd and _flash_attn_bwd take "
                f"other parameters than those of {KNOWN_VERSION}; install that version or use the default config"
            )
        out, lse = _Attend.apply(call.query, call.key, call.value, _Tuned.of(inside, call), options)
        return out, lse

    def saves(self, call: Call) -> bool:  # noqa: ARG002
        return internals() is not None

    def backward(
        self,
        call: Call,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_out: torch.Tensor,
        candidate: Candidate,  # noqa: ARG002
    ) -> Gradients:
        inside = internals()
        assert inside is not None, "it saved"
        found = _Tuned.of(inside, call).backward(call.query, call.key, call.value, out, lse, grad_out)
        return Gradients(*found)


def _why_not_arch(problem: Problem, device: Device) -> str | None:
    family = device.capability // 10
    if family not in (8, 9, 10, 11, 12):
        return f"needs sm_80 to sm_12x, this is {device.arch}"
    if problem.pass_ is Pass.TRAINING:
        if family == 8:
            return f"its backward needs sm_90 or newer, this is {device.arch}"
        if problem.heads != problem.kv_heads and problem.head_dim != problem.v_head_dim:
            return "its backward for grouped heads needs one head_dim"
        if family == 12 and (problem.softcap or problem.deterministic):
            return f"its backward on {device.arch} has no softcap and is not deterministic"
    return None


def _why_not_head_dim(problem: Problem, family: int) -> str | None:
    dims = problem.head_dim, problem.v_head_dim
    if any(dim % 8 for dim in dims):
        return "needs head_dim in multiples of 8"
    if family in (8, 9):
        return "needs head_dim of at most 256" if max(dims) > 256 else None
    if family in (10, 11) and dims in ((192, 128), (256, 256)):
        return None
    return "needs head_dim of at most 128 on this device" if max(dims) > 128 else None


# parameters


def shared_memory(head_dim: int, v_head_dim: int, values: Mapping[str, Value], *, stages: int = 2) -> int:
    """Return the bytes of shared memory: query or result, the stages of key and value, weights unless in registers.

    On sm_90, with two stages, it separates the configs that ran on an H200 from those that did not.
    """
    tile_m, tile_n = int(values["tile_m"]), int(values["tile_n"])
    weights = 0 if values["mma_pv_is_rs"] else tile_m * tile_n
    return 2 * (tile_m * max(head_dim, v_head_dim) + stages * tile_n * (head_dim + v_head_dim) + weights)


def registers(v_head_dim: int, values: Mapping[str, Value]) -> int:
    """Return the registers of a thread on sm_90: scores, weights in half precision where they are kept, accumulator."""
    tile_n = int(values["tile_n"])
    return tile_n // 2 + (tile_n // 4 if values["mma_pv_is_rs"] else 0) + v_head_dim // 2


@functools.lru_cache(maxsize=256)
def _space(head_dim: int, v_head_dim: int, group: bool, family: int, available: int) -> SearchSpace:
    dims = [-(-dim // 16) * 16 for dim in (head_dim, v_head_dim)]
    hopper = family == 9
    default = Config.of(
        KERNEL, tile_m=0, tile_n=0, mma_pv_is_rs=True, intra_wg_overlap=True, pack_gqa=group, num_splits=1
    )

    def all_or_none(values: Mapping[str, Value]) -> bool:
        if values["tile_m"] == 0 or values["tile_n"] == 0:
            return all(values[name] == default[name] for name in _TILING)
        return True

    def fits(values: Mapping[str, Value]) -> bool:
        return shared_memory(dims[0], dims[1], values, stages=2 if hopper else 1) <= available

    def fits_registers(values: Mapping[str, Value]) -> bool:
        rows = int(values["tile_m"])
        if hopper:
            return rows == 0 or registers(dims[1], values) <= _REGISTERS[rows]
        return rows * (int(values["tile_n"]) + dims[1]) <= 255 * 128  # the threads of a block there

    return SearchSpace(
        kernel=KERNEL,
        parameters=(
            *(Parameter(name, sizes) for name, sizes in zip(("tile_m", "tile_n"), _TILES[family], strict=True)),
            Parameter("mma_pv_is_rs", (True, False) if hopper else (True,), ordered=False),
            Parameter("intra_wg_overlap", (True, False) if hopper else (True,), ordered=False),
            Parameter("pack_gqa", (True, False) if group else (False,), ordered=False),
            Parameter("num_splits", (1, 2, 4, 8, 16) if family in (10, 11) else (1,)),
        ),
        constraints=(
            Constraint("0 stands for its own choice of tile_m and tile_n, and the flags go with them", all_or_none),
            Constraint("its tiles exceed the shared memory of a block", fits),
            Constraint("scores and accumulator exceed the registers of its threads", fits_registers),
        ),
        default=default,
    )


def _options(problem: Problem, config: Config | None) -> dict[str, Any]:
    """Return the arguments of _flash_attn_fwd that a config sets; none for the package's own choice."""
    if config is None:
        return {}
    options: dict[str, Any] = {}
    if config["tile_m"]:
        options["tile_mn"] = config["tile_m"], config["tile_n"]
        options["mma_pv_is_rs"], options["intra_wg_overlap"] = config["mma_pv_is_rs"], config["intra_wg_overlap"]
    if config["pack_gqa"] != (problem.heads > problem.kv_heads):
        options["pack_gqa"] = config["pack_gqa"]
    if config["num_splits"] != 1:
        options["num_splits"] = config["num_splits"]
    return options


def _sides(call: Call) -> tuple[int | None, int | None]:
    left, right = call.window
    return None if left == -1 else left, None if right == -1 else right


# other tiles than its own


@dataclass(frozen=True, slots=True)
class _Tuned:
    """What forward and backward of one call share."""

    internals: Internals
    scale: float
    causal: bool
    window: tuple[int | None, int | None]
    softcap: float
    deterministic: bool
    packed: dict[str, Any]

    @classmethod
    def of(cls, internals: Internals, call: Call) -> Self:
        problem = call.problem
        return cls(
            internals,
            call.scale,
            problem.causal,
            _sides(call),
            call.softcap,
            problem.deterministic,
            flash_arguments(call),
        )

    @property
    def shared(self) -> dict[str, Any]:
        return {
            "softmax_scale": self.scale,
            "causal": self.causal,
            "softcap": self.softcap,
            "window_size_left": self.window[0],
            "window_size_right": self.window[1],
            **self.packed,
        }

    def backward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        d_query, d_key, d_value, *_ = self.internals.backward(
            query, key, value, out, grad_out, lse, deterministic=self.deterministic, **self.shared
        )
        return d_query, d_key, d_value


class _Attend(torch.autograd.Function):
    """The package's internal forward with chosen parameters, and its internal backward with its own."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tuned: _Tuned, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = tuned.internals.forward(query, key, value, return_lse=True, **tuned.shared, **options)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tuned = tuned
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
        return *ctx.tuned.backward(*ctx.saved_tensors, grad_out), None, None
