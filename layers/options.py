"""The keyword arguments of the layers, and what is refused of them."""

import math
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import nn

from tilewise.domain.config import Candidate
from tilewise.domain.errors import InputError
from tilewise.domain.problem import MAX_WINDOW

from .resolve import KERNEL_TYPES
from .rope_scaling import Scaling


class Options(TypedDict, total=False):
    """The keyword arguments that every layer takes: see FastAttention."""

    head_dim: int | None
    dropout: float
    bias: bool
    kernel_type: str | Candidate
    causal: bool
    position_method: str | nn.Module
    max_seq_len: int
    rope_base: float
    rope_scaling: Scaling | Mapping[str, Any] | None
    sliding_window: int | None
    qk_norm: bool
    qk_norm_eps: float
    add_zero_attn: bool
    batch_first: bool
    strict: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class SourceOptions(Options, total=False):
    """Those of the layers that project keys and values each by itself."""

    kdim: int | None
    vdim: int | None


def check_sizes(**sizes: int | None) -> None:
    """Raise InputError unless each is None or a whole number of at least 1."""
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 1):
            raise InputError(f"{name}: expected a whole number of at least 1, got {size!r}")


def backend_of(kernel_type: object) -> str | Candidate:
    """Return what `tilewise.attention` calls a kernel_type. Raises InputError for an unknown one."""
    if isinstance(kernel_type, Candidate):
        return kernel_type
    if type(kernel_type) is not str or kernel_type not in KERNEL_TYPES:
        raise InputError(f"kernel_type: expected one of {', '.join(KERNEL_TYPES)}, got {kernel_type!r}")
    return KERNEL_TYPES[kernel_type]


def check_epsilon(name: str, epsilon: object) -> None:
    """Raise InputError unless it is a number that a mean of squares may be raised by."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < math.inf:
        raise InputError(f"{name}: expected a number of at least 0, got {epsilon!r}")


def check_options(kernel_type: object, dropout: object, sliding_window: object) -> None:
    backend_of(kernel_type)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"dropout: expected a share of at least 0 and below 1, got {dropout!r}")
    if sliding_window is not None and not (type(sliding_window) is int and 1 <= sliding_window <= MAX_WINDOW):
        raise InputError(
            f"sliding_window: expected a whole number from 1 (the position itself) to {MAX_WINDOW}, "
            f"got {sliding_window!r}"
        )
