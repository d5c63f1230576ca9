"""Attention layers: projections around `tilewise.attention`."""

import torch
from torch import nn

from tilewise.domain.errors import InputError
from tilewise.domain.problem import MAX_WINDOW

from .attention import attention
from .checks import check_dense
from .resolve import KERNEL_TYPES


class FastMultiHeadSelfAttention(nn.Module):
    """Multi-head self-attention: one fused projection to query, key and value, attention, one projection back.

    - embed_dim: width of input and output. num_heads: heads of head_dim each (embed_dim / num_heads by default).
    - causal: each position sees itself and what came before. sliding_window: it sees that many positions at most,
      itself included (to each side where not causal).
    - kernel_type: "auto" (what was measured to be fastest, torch's own choice where nothing was), "flash", "triton",
      "sdpa" (torch's own choice) or "pytorch" (matmul, softmax, matmul); strict: raise where that kernel cannot run,
      instead of one warning and torch's own choice.

    Parameters are named qkv_proj and o_proj. Raises InputError for sizes that do not fit together.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        kernel_type: str = "auto",
        causal: bool = False,
        sliding_window: int | None = None,
        strict: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("head_dim", head_dim)):
            if size is not None and (type(size) is not int or size < 1):
                raise InputError(f"{name}: expected a whole number of at least 1, got {size!r}")
        if head_dim is None and embed_dim % num_heads:
            raise InputError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if kernel_type not in KERNEL_TYPES:
            raise InputError(f"kernel_type: expected one of {', '.join(KERNEL_TYPES)}, got {kernel_type!r}")
        if sliding_window is not None and not (type(sliding_window) is int and 1 <= sliding_window <= MAX_WINDOW):
            raise InputError(
                f"sliding_window: expected a whole number from 1 (the position itself) to {MAX_WINDOW}, "
                f"got {sliding_window!r}"
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        self.causal, self.kernel_type, self.strict = causal, kernel_type, strict
        self.window = None
        if sliding_window is not None:
            self.window = (sliding_window - 1, 0 if causal else sliding_window - 1)
        inner = num_heads * self.head_dim
        self.qkv_proj = nn.Linear(embed_dim, 3 * inner, bias=bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(inner, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, query: torch.Tensor, *, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return (batch, seq, embed_dim) for `query` of that shape; attn_mask as the mask of tilewise.attention.

        Raises InputError for a query that is not dense, or of another shape, dtype or device than the layer's.
        """
        check_dense("query", query)
        if query.dim() != 3 or query.shape[-1] != self.embed_dim:
            raise InputError(f"expected query (batch, seq, {self.embed_dim}), got {tuple(query.shape)}")
        self._check_weights(query)
        q, k, v = self.qkv_proj(query).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        out = attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            mask=attn_mask,
            backend=KERNEL_TYPES[self.kernel_type],
            strict=self.strict,
        )
        assert isinstance(out, torch.Tensor)
        result: torch.Tensor = self.o_proj(out.flatten(2))
        return result

    def _check_weights(self, query: torch.Tensor) -> None:
        if type(self.qkv_proj) is not nn.Linear:  # an adapter or a quantised layer says by itself what it takes
            return
        weight, kind = self.qkv_proj.weight, query.device.type
        if query.device != weight.device or (query.dtype != weight.dtype and not torch.is_autocast_enabled(kind)):
            raise InputError(
                f"expected query {weight.dtype} on {weight.device} like the layer's weights, got {query.dtype} "
                f"{tuple(query.shape)} on {query.device}"
            )
