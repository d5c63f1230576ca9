"""SDPA's fused kernels by themselves: a forward that gives the LSE, and a backward that takes it.

scaled_dot_product_attention leaves what its backward needs to autograd. These are the operators that it calls (torch
2.11 to 2.13), for use where autograd does not look, with neither mask nor dropout. Tensors are (B, H, Q or K, D), the
LSE is (B, H, Q) float32, natural log.
"""

from typing import Any

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend

_CAN_USE = {
    SDPBackend.FLASH_ATTENTION: can_use_flash_attention,
    SDPBackend.CUDNN_ATTENTION: can_use_cudnn_attention,
    SDPBackend.EFFICIENT_ATTENTION: can_use_efficient_attention,
}
_aten: Any = torch.ops.aten
_LSE_ROWS = 32  # the efficient kernel's LSE is padded to a multiple of these with +inf


def is_fused(
    choice: SDPBackend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool
) -> bool:
    """Return whether SDPA would run `choice` for the gradients of these, and that is such a kernel.

    Flash pads a head_dim that 8 does not divide: that is left to SDPA.
    """
    if query.device.type == "cpu":
        return choice is SDPBackend.FLASH_ATTENTION
    if choice not in _CAN_USE or query.shape[-1] % 8 or value.shape[-1] % 8:
        return False
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        return _CAN_USE[choice](SDPAParams(query, key, value, None, 0.0, is_causal, query.shape[1] != key.shape[1]))


def forward(
    choice: SDPBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result and the LSE."""
    qkv = (query, key, value)
    if query.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*qkv, 0.0, is_causal, scale=scale)
    elif choice is SDPBackend.FLASH_ATTENTION:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(*qkv, 0.0, is_causal, False, scale=scale)
    elif choice is SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(*qkv, None, True, 0.0, is_causal, False, scale=scale)
        lse = lse.squeeze(-1)
    else:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(*qkv, None, True, 0.0, is_causal, scale=scale)
        lse = lse[..., : query.shape[2]]
    return out, lse


def backward(
    choice: SDPBackend,
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value for what `forward` gave."""
    qkv, lengths = (query, key, value), (query.shape[2], key.shape[2])
    no_seed = (query.new_empty((), dtype=torch.int64),) * 2  # of the dropout that there is not
    if query.device.type == "cpu":
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, *qkv, out, lse, 0.0, is_causal, scale=scale
        )
    elif choice is SDPBackend.FLASH_ATTENTION:
        found = _aten._scaled_dot_product_flash_attention_backward(
            grad_out, *qkv, out, lse, None, None, *lengths, 0.0, is_causal, *no_seed, scale=scale
        )
    elif choice is SDPBackend.CUDNN_ATTENTION:
        found = _aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, *qkv, out, lse.unsqueeze(-1), *no_seed, None, None, None, *lengths, 0.0, is_causal, scale=scale
        )
    else:
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % _LSE_ROWS), value=torch.inf)
        *found, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad_out, *qkv, None, out, padded, *no_seed, 0.0, (True, True, True, False), is_causal, scale=scale
        )
    d_query, d_key, d_value = found
    return d_query, d_key, d_value
