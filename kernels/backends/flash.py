"""flash_attn 2.x, FlashAttention 2, where a user has built it.

Untested against the real package: PyPI has only its source, and neither this project's machines nor its measuring GPU
have built it. What is tested is that its arguments are those of its documented interface. SDPA's flash path stands for
FlashAttention 2 in our tables.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
from typing import Any

import torch

from tilewise.domain.config import Config
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Dtype, Problem

from ..backend import Backend, unsupported_feature, unsupported_varlen
from ..call import Call
from ..packed import flash_arguments

_ARGUMENTS = {"softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs"}


class Flash(Backend):
    """fp16 and bf16, GQA, causal and window (bottom-right since 2.1), ALiBi, softcap, with its own backward."""

    name = "flash"
    differentiable = True
    gives_lse = True

    def supports(self, problem: Problem, device: Device) -> str | None:
        if device.kind is not DeviceKind.CUDA:
            return "needs a CUDA device"
        reason = absent()
        if reason is not None:
            return reason
        if device.capability < 80:
            return f"needs sm_80 or newer, this is {device.arch}"
        if problem.dtype is Dtype.FP32:
            return "needs fp16 or bf16"
        if problem.head_dim > 256 or problem.v_head_dim != problem.head_dim:
            return "needs one head_dim of at most 256"
        return unsupported_feature(problem, "mask", "dropout") or unsupported_varlen(problem)

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ARG002
        packed = flash_arguments(call)
        function = _function("flash_attn_varlen_func", *packed) if packed else _function("flash_attn_func")
        out, lse, _ = function(
            call.query,
            call.key,
            call.value,
            **packed,
            softmax_scale=call.scale,
            causal=call.problem.causal,
            window_size=call.window,
            softcap=call.softcap,
            alibi_slopes=call.alibi_slopes,
            deterministic=call.problem.deterministic,
            return_attn_probs=True,
        )
        if packed and lse.dim() != 2:
            raise UnsupportedError(
                f"this flash_attn is too old: its LSE of packed sequences is {tuple(lse.shape)}, not (heads, total); "
                "build 2.6.2 or newer"
            )
        # its LSE of a row with nothing to attend is +inf
        return out, lse.masked_fill(lse == torch.inf, -torch.inf)


def absent() -> str | None:
    """Return why flash_attn 2 cannot be imported, or None; nothing is imported to find out.

    flash-attn-4 has the same top-level name, and no flash_attn_interface.
    """
    parent = importlib.util.find_spec("flash_attn")
    places = list(parent.submodule_search_locations or ()) if parent else []
    if not places or importlib.machinery.PathFinder.find_spec("flash_attn.flash_attn_interface", places) is None:
        return "flash_attn 2 is not installed; it is built from source: pip install flash-attn --no-build-isolation"
    return None


@functools.cache
def _function(name: str, *arguments: str) -> Any:
    """Return its function of that name. Raises UnsupportedError where it cannot be imported or is too old."""
    try:
        function = getattr(importlib.import_module("flash_attn.flash_attn_interface"), name)
    except (ImportError, OSError) as error:  # OSError: built against another torch
        raise UnsupportedError(f"flash_attn cannot be imported: {error}; build it again for this torch") from error
    lacks = sorted({*_ARGUMENTS, *arguments} - {*inspect.signature(function).parameters})
    if lacks:
        raise UnsupportedError(f"this flash_attn is too old, it takes no {', '.join(lacks)}; build 2.6 or newer")
    return function
