"""The masks that a layer takes, in the form that `tilewise.attention` takes: (batch, heads, q_len, kv_len)."""

import torch

from tilewise.domain.errors import InputError
from tilewise.kernels.call import FLOATING, allowed

from .checks import check_dense, is_one_of


def layer_mask(mask: torch.Tensor, *, batch: int, heads: int, q_len: int, kv_len: int) -> torch.Tensor:
    """Return `mask` with four dimensions, bool or additive as it was.

    (q_len, kv_len), (batch, kv_len), (batch, q_len, kv_len) and (batch, heads, q_len, kv_len) are taken, a size of 1
    standing for all but the last. Raises InputError for every other shape or dtype, and for two dimensions that may be
    either where batch and q_len are the same.
    """
    check_dense("attn_mask", mask)
    shape = tuple(mask.shape)
    if mask.dtype is not torch.bool and mask.dtype not in FLOATING:
        raise InputError(
            f"attn_mask: expected bool (True = attend) or additive floating point, got {mask.dtype} {shape}; "
            "of a mask of ones and zeros use attn_mask.bool()"
        )
    if mask.dim() == 2 and shape[0] == batch == q_len > 1 and shape[1] == kv_len:
        raise InputError(
            f"attn_mask: {shape} may be (q_len, kv_len) or (batch, kv_len), for both are {batch}; give it as "
            f"(1, {q_len}, {kv_len}) or as ({batch}, 1, {kv_len})"
        )
    forms = {2: ((q_len, kv_len), (batch, kv_len)), 3: ((batch, q_len, kv_len),), 4: ((batch, heads, q_len, kv_len),)}
    for full in forms.get(mask.dim(), ()):
        if shape[-1] == kv_len and all(is_one_of(have, 1, want) for have, want in zip(shape, full, strict=True)):
            return _four(mask, full == (batch, kv_len) and shape[0] == batch)
    raise InputError(
        f"attn_mask: expected (q_len, kv_len) = ({q_len}, {kv_len}), (batch, kv_len) = ({batch}, {kv_len}), "
        f"(batch, q_len, kv_len) = ({batch}, {q_len}, {kv_len}) or (batch, heads, q_len, kv_len) = "
        f"({batch}, {heads}, {q_len}, {kv_len}), got {shape}; keys of a cache count in kv_len"
    )


def _four(mask: torch.Tensor, of_batch: bool) -> torch.Tensor:
    if mask.dim() == 4:
        return mask
    if mask.dim() == 3:
        return mask[:, None]
    return mask[:, None, None] if of_batch else mask[None, None]


def merged(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """Return two masks as one; what a bool mask hides is -inf in a bias, never a number that is added."""
    if one is None or other is None:
        return other if one is None else one
    if other.dtype is torch.bool:
        one, other = other, one
    if one.dtype is not torch.bool:
        return one + other
    return one & other if other.dtype is torch.bool else other.masked_fill(~one, -torch.inf)


def spelled_out(
    mask: torch.Tensor | None,
    q_len: int,
    kv_len: int,
    window: tuple[int, int],
    slopes: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """Return `mask` with a window and ALiBi's slopes (heads,) written into it; None where all attend all."""
    rows, columns = torch.arange(q_len, device=device), torch.arange(kv_len, device=device)
    reach = allowed(rows, columns, kv_len - q_len, window)
    mask = merged(mask, None if reach is None else reach[None, None])
    if slopes is None:
        return mask
    distance = (rows[:, None] + kv_len - q_len - columns).abs()
    return merged(mask, (-slopes[:, None, None] * distance)[None])


def with_zero_key(
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    q_len: int,
    window: tuple[int, int],
    slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[int, int]]:
    """Return keys, values and mask with a key of zeros before the first, and the window that is left to the kernel.

    All queries see that key, and ALiBi adds nothing to it. Without a limit to the left it is in reach by itself,
    unless there are more queries than keys. Elsewhere it would be the farthest key, so there, and only there, window
    and slopes are written into the mask.
    """
    kv_len = key.shape[1]
    if window[0] != -1 or slopes is not None or (window[1] != -1 and q_len > kv_len + 1):
        mask, window = spelled_out(mask, q_len, kv_len, window, slopes, key.device), (-1, -1)
    if mask is not None:
        seen = mask.new_full((), True) if mask.dtype is torch.bool else mask.new_zeros(())
        mask = torch.cat((seen.expand(*mask.shape[:-1], 1), mask), -1)
    key, value = (torch.cat((torch.zeros_like(heads[:, :1]), heads), 1) for heads in (key, value))
    return key, value, mask, window
