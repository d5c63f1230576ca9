"""torch's FlexAttention, compiled anew for each problem.

Dynamo keeps what it compiled per code object, gives up after 8 recompilations of one, and from then on FlexAttention
runs as plain torch with the whole score matrix in memory, many times slower. So every program here has a code object
of its own, is compiled for one set of shapes, strides and scalars with fullgraph=True (which makes a reached limit an
error), and counts its compilations: one that ran without being compiled raises UnsupportedError.

Tuned is the forward. Its backward (BLOCK_M1, BLOCK_N1, BLOCK_M2, BLOCK_N2 of its kernel_options) keeps FlexAttention's
own sizes: it can become configs of the roles dkdv and dq.
"""

import functools
import importlib.util
import os
import re
import shutil
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from tilewise.domain.config import Config, Value
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Dtype, Pass, Precision, Problem
from tilewise.domain.space import Constraint, Parameter, SearchSpace

from ..backend import Backend, unsupported_feature, unsupported_varlen
from ..call import Call
from ..packed import on_padded

KERNEL = "flex_forward"
SPARSE_BLOCK = 128  # a tile must divide a block of the block mask
SHORT = 128  # fewer queries than this run in FlexAttention's own decoding kernel, which chooses its block_m itself
_MAX_REGISTERS = 256
_flex_attention: Any = flex_attention  # its overloads know no argument that may be None or not
_OPTIONS = {"block_m": "BLOCK_M", "block_n": "BLOCK_N", "num_warps": "num_warps", "num_stages": "num_stages"}


class Flex(Backend):
    """Every mask and score modification, with gradients, also of a bias; head_dim from 16, padded to a power of two."""

    name = "flex"
    differentiable = True
    gives_lse = True
    compile_seconds: ClassVar[float] = 15.0

    def supports(self, problem: Problem, device: Device) -> str | None:
        if device.kind is not DeviceKind.CUDA:
            return "needs a CUDA device"
        if device.capability < 80:
            return f"needs sm_80 or newer, this is {device.arch}"
        if importlib.util.find_spec("triton") is None:
            return "needs triton, which is not installed: pip install triton"
        if min(problem.head_dim, problem.v_head_dim) < 16:
            return "needs head_dim of at least 16"
        return unsupported_feature(problem, "dropout", "deterministic") or unsupported_varlen(problem)

    def spaces(self, problem: Problem, device: Device) -> Mapping[str, SearchSpace]:
        size = 4 if problem.dtype is Dtype.FP32 else 2
        tma = device.capability >= 90 and not (problem.head_dim * size % 16 or problem.v_head_dim * size % 16)
        short = problem.q_len < SHORT
        return {"forward": _space(problem.head_dim, problem.v_head_dim, size, short, tma, device.shared_memory)}

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        options = _kernel_options(call.problem, config)
        return on_padded(call, lambda padded: _forward(padded, options, with_lse=True))


def plain_path(path: str) -> bool:
    """Whether a shell takes `path` as one word: inductor does not quote the paths it compiles and links with."""
    return re.fullmatch(r"[\w./+@:,=-]+", path) is not None


class FlexCpu(Flex):
    """FlexAttention through inductor's C++: inference only, and without the LSE."""

    name = "flex_cpu"
    differentiable = False
    gives_lse = False
    compile_seconds = 40.0

    def supports(self, problem: Problem, device: Device) -> str | None:
        if device.kind is not DeviceKind.CPU:
            return "needs a CPU"
        if device.arch.rpartition(".")[2] not in ("avx2", "avx512"):
            return f"needs a CPU with AVX2, this is {device.arch}"
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"needs a C++ compiler, and {compiler} is not on the path: install g++ or set CXX"
        if not plain_path(torch.__file__):
            return "torch is installed in a folder whose name has spaces or signs, from which inductor cannot link"
        if problem.pass_ is Pass.TRAINING:
            return "computes no gradients on a CPU"
        return unsupported_feature(problem, "dropout", "deterministic") or unsupported_varlen(problem)

    def spaces(self, problem: Problem, device: Device) -> Mapping[str, SearchSpace]:  # noqa: ARG002
        return {}

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ARG002
        with torch.no_grad():  # FlexAttention refuses CPU tensors that require grad, even where none is computed
            detached = call.with_tensors(call.query.detach(), call.key.detach(), call.value.detach())
            return on_padded(detached, lambda padded: _forward(padded, (), with_lse=False))


FLEX_BACKENDS: tuple[Backend, ...] = (Flex(), FlexCpu())


# parameters


@functools.lru_cache(maxsize=256)
def _space(head_dim: int, v_head_dim: int, size: int, short: bool, tma: bool, available: int) -> SearchSpace:
    rows, columns = (1 << (dim - 1).bit_length() for dim in (head_dim, v_head_dim))

    def all_or_none(values: Mapping[str, Value]) -> bool:
        given = [values[name] != 0 for name in _OPTIONS if not (short and name == "block_m")]
        return all(given) or not (any(given) or values.get("tma"))

    def fits(values: Mapping[str, Value]) -> bool:
        stages = max(1, int(values["num_stages"]) - 1)
        query = int(values["block_m"]) * rows * size if values.get("tma") else 0
        return query + stages * int(values["block_n"]) * (rows + columns) * size <= available

    def fits_registers(values: Mapping[str, Value]) -> bool:
        elements = int(values["block_m"]) * (columns + int(values["block_n"]))
        return elements <= _MAX_REGISTERS * 32 * max(1, int(values["num_warps"]))

    default = Config.of(KERNEL, **dict.fromkeys(_OPTIONS, 0), **({"tma": False} if tma else {}))
    return SearchSpace(
        kernel=KERNEL,
        parameters=(
            Parameter("block_m", (0,) if short else (0, 32, 64, 128)),
            Parameter("block_n", (0, 16, 32, 64, 128)),
            Parameter("num_warps", (0, 4, 8)),
            Parameter("num_stages", (0, 1, 2, 3, 4)),
            *((Parameter("tma", (False, True), ordered=False),) if tma else ()),
        ),
        constraints=(
            Constraint("0 stands for FlexAttention's own choice, of all parameters together", all_or_none),
            Constraint("its tiles exceed the shared memory of a block", fits),
            Constraint("accumulator and scores exceed the registers of its threads", fits_registers),
        ),
        default=default,
    )


def _kernel_options(problem: Problem, config: Config | None) -> tuple[tuple[str, int | str | bool], ...]:
    """Return FlexAttention's kernel_options for a config; the default leaves every size to FlexAttention."""
    options: dict[str, int | str | bool] = {}
    if problem.dtype is Dtype.FP32:
        options["FLOAT32_PRECISION"] = "'tf32'" if problem.precision is Precision.TF32 else "'ieee'"
    values = config.as_dict() if config else {}
    options |= {f"fwd_{option}": int(values[name]) for name, option in _OPTIONS.items() if values.get(name)}
    if values.get("tma"):
        options["fwd_USE_TMA"] = True
    return tuple(options.items())


# block masks


def _pairs(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many blocks each row of blocks has, (1, 1, rows) int32, and which, first, (1, 1, rows, columns)."""
    order = torch.argsort(mask.to(torch.int32), dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@functools.lru_cache(maxsize=32)
def block_mask(q_len: int, kv_len: int, window: tuple[int, int], group: int, device: torch.device) -> BlockMask:
    """Return the blocks that the window leaves, computed from their corners: no mask of (Q, K) is ever made.

    Kept, as a training loop would keep it. `group` query heads of one key head share a block where queries are few.
    """
    q_block = SPARSE_BLOCK if q_len >= SHORT else max(SPARSE_BLOCK, 1 << (q_len * group - 1).bit_length())
    with torch.inference_mode(mode=False):
        if window == (-1, -1):
            blocks = tuple(max(q_block, 1 << (length - 1).bit_length()) for length in (q_len, kv_len))
            count = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
            which = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
            return BlockMask.from_kv_blocks(
                count, which, BLOCK_SIZE=(blocks[0], blocks[1]), seq_lengths=(q_len, kv_len)
            )
        offset, far = kv_len - q_len, q_len + kv_len
        left, right = (far if side == -1 else side for side in window)
        top = torch.arange(0, q_len, q_block, device=device)[:, None] + offset
        bottom = (top + q_block - 1).clamp_max(kv_len - 1)
        first = torch.arange(0, kv_len, SPARSE_BLOCK, device=device)[None]
        last = (first + SPARSE_BLOCK - 1).clamp_max(kv_len - 1)
        some = (first - bottom <= right) & (last - top >= -left)
        inside = (first + SPARSE_BLOCK <= kv_len) & (top - offset + q_block <= q_len)
        full = inside & (first - bottom >= -left) & (last - top <= right)

        def reach(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
            distance = column - row - offset
            return (distance <= right) & (distance >= -left)

        return BlockMask.from_kv_blocks(
            *_pairs(some & ~full),
            *_pairs(full),
            BLOCK_SIZE=(q_block, SPARSE_BLOCK),
            mask_mod=reach,
            seq_lengths=(q_len, kv_len),
        )


# programs


@dataclass(frozen=True, slots=True)
class _Key:
    """All that dynamo would compile anew for."""

    window: tuple[int, int]
    scale: float
    softcap: float
    options: tuple[tuple[str, int | str | bool], ...]
    with_lse: bool
    device: torch.device
    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, bool] | None, ...]
    modes: tuple[bool, bool, bool]


class Program:
    """One compiled FlexAttention. `compilations` counts how often torch.compile called its compiler for it."""

    def __init__(self, key: _Key) -> None:
        self.key, self.compilations = key, 0
        self._run = torch.compile(_unshared(_attend(key)), fullgraph=True, dynamic=False, backend=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.compilations += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # inductor's own, of other parts of torch
            return compiler()(graph, inputs)

    def __call__(self, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        found: tuple[torch.Tensor, torch.Tensor | None] = self._run(*tensors)
        if not self.compilations:
            raise UnsupportedError(
                "FlexAttention ran without being compiled, which is many times slower: torch.compile is switched off "
                "(TORCHDYNAMO_DISABLE, torch.compiler.set_stance or disable); switch it on or use another backend"
            )
        return found


def compiler() -> Callable[..., Any]:
    """Return what compiles the graphs: inductor."""
    import torch._dynamo  # not on import: seconds that nobody without FlexAttention should wait

    found: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")
    return found


program = functools.lru_cache(maxsize=512)(Program)


def _forward(
    call: Call, options: tuple[tuple[str, int | str | bool], ...], *, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    mask = call.mask
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    tensors = (*(t.transpose(1, 2) for t in (call.query, call.key, call.value)), mask, call.alibi_slopes)
    key = _Key(
        window=call.window,
        scale=call.scale,
        softcap=call.softcap,
        options=options,
        with_lse=with_lse,
        device=call.query.device,
        tensors=tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors),
        modes=(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        ),
    )
    out, lse = program(key)(*tensors)
    return out.transpose(1, 2), lse


def _unshared(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function with a code object that it shares with no other: dynamo's limits count per object."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )


def _attend(key: _Key) -> Callable[..., Any]:
    """Return the function to compile; everything but the tensors is a constant of it."""
    query, keys, _, mask, slopes = key.tensors
    assert query is not None
    assert keys is not None
    heads, q_len, kv_heads, kv_len = query[0][1], query[0][2], keys[0][1], keys[0][2]
    blocks = block_mask(q_len, kv_len, key.window, heads // kv_heads, key.device)
    scale, softcap, offset = key.scale, key.softcap, kv_len - q_len
    has_bool, has_bias = (mask is not None and (mask[2] is torch.bool) is kind for kind in (True, False))
    # where a mask broadcasts it has one element, and every index is 0
    spread = tuple(size > 1 for size in mask[0]) if mask is not None else ()
    slopes_per_batch = slopes is not None and len(slopes[0]) == 2
    modified = softcap > 0 or mask is not None or slopes is not None
    options, with_lse, gqa = dict(key.options), key.with_lse, heads != kv_heads

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        slopes: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def modify(
            score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor
        ) -> torch.Tensor:
            if softcap > 0:
                score = softcap * torch.tanh(score / softcap)
            if slopes is not None:
                slope = slopes[batch, head] if slopes_per_batch else slopes[head]
                score = score - slope * (row + offset - column).abs()
            if mask is not None:
                at = [
                    index if spreads else 0 for index, spreads in zip((batch, head, row, column), spread, strict=True)
                ]
                given = mask[at[0], at[1], at[2], at[3]]
                if has_bool:
                    score = torch.where(given, score, -float("inf"))
                if has_bias:
                    score = score + given
            return score

        found = _flex_attention(
            query,
            key,
            value,
            score_mod=modify if modified else None,
            block_mask=blocks,
            scale=scale,
            enable_gqa=gqa,
            kernel_options=options or None,
            return_aux=AuxRequest(lse=True) if with_lse else None,
        )
        return (found[0], found[1].lse) if with_lse else (found, None)

    return attend
