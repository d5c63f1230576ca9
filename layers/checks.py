"""What a caller may give: refused at every call, before anything is looked up, remembered or launched.

What is wrong with shapes, dtypes and devices is in `kernels.call`: those are part of what is remembered, and so are
looked at only once.
"""

import math

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.errors import InputError
from tilewise.domain.problem import MAX_WINDOW
from tilewise.kernels.backends import BACKENDS

_NUMBER = int | float  # made once: every call asks


def check_numbers(
    softcap: float,
    dropout: float,
    scale: float | None,
    seed: int | None,
    window: tuple[int, int] | None,
) -> None:
    """Raise InputError unless each is a Python number in its range, and window a pair of them."""
    if not (isinstance(softcap, _NUMBER) and 0 <= softcap < math.inf):
        raise InputError(f"softcap: expected 0 (none) or more, got {softcap!r}")
    if not (isinstance(dropout, _NUMBER) and 0 <= dropout < 1):
        raise InputError(f"dropout: expected a share of at least 0 and below 1, got {dropout!r}")
    if scale is not None and not (isinstance(scale, _NUMBER) and -math.inf < scale < math.inf):
        raise InputError(f"scale: expected a finite number, or None for head_dim ** -0.5, got {scale!r}")
    if seed is not None and not (type(seed) is int and 0 <= seed < 1 << 63):
        raise InputError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed!r}")
    if window is not None:
        check_window(window)


def check_flags(**flags: object) -> None:
    """Raise InputError unless each is True or False."""
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise InputError(f"{name}: expected True or False, got {flag!r}")


def check_window(window: tuple[int, int]) -> None:
    """Raise InputError unless `window` is a pair of whole numbers in their range."""
    if type(window) is not tuple:
        raise InputError(f"window: expected a tuple (left, right), got {window!r}")
    if len(window) != 2 or not all(type(side) is int and -1 <= side <= MAX_WINDOW for side in window):
        raise InputError(
            f"window: expected (left, right), each -1 (unbounded) or from 0 to {MAX_WINDOW}, got {window!r}"
        )


def is_one_of(size: int, *sizes: int) -> bool:
    """Whether `size` is one of `sizes`, also in a compiled graph, where `in` takes a symbol for none of the numbers."""
    return any(size == each for each in sizes)


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise InputError unless `tensor` is one block of memory that a kernel can read."""
    if type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_nested:
        return
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise InputError(
            f"{name}: expected a dense tensor, got a nested one of {tensor.size(0)} parts; pad it "
            "(torch.nested.to_padded_tensor) and mask the padding"
        )
    shape = tuple(tensor.shape)
    if tensor.layout is not torch.strided:
        raise InputError(f"{name}: expected a dense tensor, got {tensor.layout} {shape}; use {name}.to_dense()")
    if hasattr(tensor, "__tensor_flatten__"):  # a wrapper around other tensors, as DTensor is
        raise InputError(
            f"{name}: expected a plain tensor, got a {type(tensor).__name__} {shape}, which holds its elements in "
            "other tensors; give those (of a DTensor: to_local(), with whole heads on every rank)"
        )


def check_learning(**tensors: torch.Tensor | None) -> None:
    """Raise InputError for a tensor that autograd cannot keep for the backward; dynamo cannot trace the question."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_inference():
            raise InputError(
                f"{name}: {tuple(tensor.shape)} was made in inference mode, and autograd cannot keep it for the "
                f"backward; use {name}.clone() outside inference mode, or torch.no_grad() here"
            )


def check_choice(backend: str | Candidate, query: torch.Tensor, value: torch.Tensor, **flags: bool) -> None:
    """Raise InputError for a flag that is not a bool, or a named backend whose kernels end below the head_dim."""
    check_flags(**flags)
    name = backend.backend if isinstance(backend, Candidate) else backend
    if type(name) is not str:
        raise InputError(f"backend: expected a name or a Candidate, got {backend!r}")
    most = BACKENDS[name].max_head_dim if name in BACKENDS else None
    if most is not None and max(query.shape[-1], value.shape[-1]) > most:
        raise InputError(
            f"backend {name!r} takes a head_dim of at most {most}, got query {tuple(query.shape)} and value "
            f"{tuple(value.shape)}; leave the choice to backend='auto'"
        )
