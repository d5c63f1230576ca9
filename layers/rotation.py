"""Turn rotary parts of heads, and give heads of keys a shared part: one pass over memory each where Triton runs.

Graphs being compiled, traced or transformed (torch.func, forward-mode gradients, dispatch modes), tensors of other
classes, and devices without Triton get the same in torch's operators.
"""

import importlib.util
import logging
import os
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger("tilewise")
_LINEAR = nn.Linear.forward  # torch's own
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _How(NamedTuple):
    """Which way angles go, and whether pairs are neighbours in what is turned and in the result."""

    back: bool
    from_pairs: bool
    to_pairs: bool


def turned(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: bool, in_place: bool = False
) -> torch.Tensor:
    """Return heads (batch, seq, heads, rest + dim) whose last dim elements are turned, in their own dtype.

    - cos, sin: float32 (1 or batch, seq, dim / 2).
    - pairs: pair i is (2 i, 2 i + 1) of what is turned, else (i, i + dim / 2), which it is in the result either way.
    - in_place: `heads` may be overwritten, which is done where no gradient is recorded.
    """
    return _turned(heads, cos, sin, _How(False, pairs, False), in_place)


def turned_by_torch(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: bool) -> torch.Tensor:
    """Return what `turned` returns, by torch's operators wherever it runs."""
    return _turned_plainly(heads, cos, sin, _How(False, pairs, False))


def joined(own: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Return heads (batch, seq, heads, n + m): each one's own part (..., n), and behind it `shared` (batch, seq, m)."""
    if not (_ours(own, shared) and own.dtype is shared.dtype and own.device == shared.device):
        return _joined_plainly(own, shared)
    if torch.is_grad_enabled() and (own.requires_grad or shared.requires_grad):
        found: torch.Tensor = _Join.apply(own, shared)
        return found
    return _join(own, shared)


def gives_fresh(module: nn.Module) -> bool:
    """Whether what the next call of `module` gives is held by nobody else, so that it may be overwritten.

    So it is where the module is torch's Linear with nothing around it that sees results. To be asked before the call:
    a hook may remove itself in it.
    """
    return not (
        torch.compiler.is_compiling()
        or type(module) is not nn.Linear
        or nn.Linear.forward is not _LINEAR
        or type(module.weight) is not nn.Parameter
        or module._forward_hooks
        or nn.modules.module._global_forward_hooks
        or module._compiled_call_impl is not None
        or "forward" in vars(module)
        or torch._C._is_torch_function_mode_enabled()
    )


def _turned(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, how: _How, in_place: bool = False
) -> torch.Tensor:
    if not _ours(heads, cos, sin) or cos.requires_grad or sin.requires_grad:
        return _turned_plainly(heads, cos, sin, how)
    if torch.is_grad_enabled() and heads.requires_grad:
        found: torch.Tensor = _Turn.apply(heads, cos, sin, how)
        return found
    return _turn(heads, cos, sin, how, in_place)


def _turned_plainly(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, how: _How) -> torch.Tensor:
    rest = heads.shape[-1] - 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    sin = -sin if how.back else sin
    part = heads[..., rest:] if rest else heads
    first, second = (part[..., ::2], part[..., 1::2]) if how.from_pairs else part.chunk(2, -1)
    both = (first * cos - second * sin, second * cos + first * sin)
    made = (torch.stack(both, -1).reshape(part.shape) if how.to_pairs else torch.cat(both, -1)).to(heads.dtype)
    return torch.cat((heads[..., :rest], made), -1) if rest else made


def _joined_plainly(own: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    return torch.cat((own, shared.unsqueeze(-2).expand(*own.shape[:-1], -1)), -1)


class _Turn(torch.autograd.Function):
    """What it does backwards is to turn the gradient the other way."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, how: _How) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.how = how
        return _turn(heads, cos, sin, how)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (cos, sin), how = ctx.saved_tensors, ctx.how
        return _turned(grad, cos, sin, _How(not how.back, how.to_pairs, how.from_pairs)), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        ctx.width = own.shape[-1]
        return _join(own, shared)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        of_own, of_shared = ctx.needs_input_grad
        own = grad[..., : ctx.width] if of_own else None
        return own, grad[..., ctx.width :].sum(-2) if of_shared else None


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, how: _How, in_place: bool = False) -> torch.Tensor:
    if _watched():
        return _turned_plainly(heads, cos, sin, how)
    from .rope_kernel import turn

    heads = _in_runs(heads)
    result = heads if in_place else torch.empty_like(heads, memory_format=torch.contiguous_format)
    turn(heads, result, cos.contiguous(), sin.contiguous(), **how._asdict())
    return result


def _join(own: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    if _watched():
        return _joined_plainly(own, shared)
    from .rope_kernel import join

    return join(_in_runs(own), _in_runs(shared))


def _in_runs(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _watched() -> bool:
    """Whether a dispatch mode looks on, which would not see a kernel.

    What autograd keeps is the same either way: a checkpoint may be computed again without the mode.
    """
    return bool(torch._C._len_torch_dispatch_stack())


def _ours(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these tensors, all on a device that runs them, and nothing is traced or transformed."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not all(map(_is_plain, tensors))
    ) and _runs_on(tensors[0].device)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has elements of a kind that kernels take, as they stand in memory of its own.

    One of many gradients has no memory; a view may stand for its elements' negatives or for zeros.
    """
    plain = type(tensor) is torch.Tensor and tensor.dtype in DTYPES and tensor.numel() > 0
    return plain and not (tensor.is_neg() or tensor._is_zerotensor()) and torch._C._has_storage(tensor)


_known: dict[torch.device, bool] = {}


def _runs_on(device: torch.device) -> bool:
    """Whether the kernels run here, by trying them once; not now if now is a bad moment for that."""
    known = _known.get(device)
    if known is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        try:
            known = _known[device] = _tried_on(device)
        except torch.OutOfMemoryError:
            return False
    return known


def _tried_on(device: torch.device) -> bool:
    """Whether the kernels run here: on a CPU in Triton's interpreter. A warning says where they should and do not."""
    if device.type == "cuda":
        old = torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0)
        if old or importlib.util.find_spec("triton") is None:
            return False
    elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        with _disable_current_modes(), torch.inference_mode(mode=False), torch.no_grad():
            heads, table = torch.zeros(1, 1, 1, 2, device=device), torch.ones(1, 1, 1, device=device)
            _turn(heads, table, table, _How(False, True, False))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler for Triton's launchers, no ptxas, a driver that is too old
        log.warning("the kernel of rotary positions failed on %s, torch's operators run instead: %s", device, error)
        return False
    return True
