"""Attention layers whose queries, keys and values are projected heads."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import nn

from tilewise.domain.errors import InputError

from .base import Asked, FastAttention
from .options import Options, SourceOptions, check_sizes


class FastGroupedQueryAttention(FastAttention):
    """Attention in which num_heads / num_kv_heads heads share a key and a value (Ainslie et al. 2023).

    - num_kv_heads: a divisor of num_heads.
    - kdim, vdim: widths of what keys and values are made of, embed_dim by default.
    - Everything else as of FastAttention.

    Parameters are named q_proj, k_proj, v_proj and o_proj, with qk_norm q_norm and k_norm. The cache holds keys and
    values (batch, length, num_kv_heads, head_dim). Raises InputError for sizes that do not fit together.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_sizes(embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, kdim=kdim, vdim=vdim)
        if num_heads % num_kv_heads:
            raise InputError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        super().__init__(embed_dim, num_heads, **options)
        self.num_kv_heads = num_kv_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        inner, kv_inner = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = self._projection(embed_dim, inner)
        self.k_proj = self._projection(self.kdim, kv_inner)
        self.v_proj = self._projection(self.vdim, kv_inner)
        self.o_proj = self._projection(inner, embed_dim)
        self.reset_parameters()

    def _widths(self) -> tuple[int, int, int]:
        return self.embed_dim, self.kdim, self.vdim

    def _project(self, asked: Asked) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            self.q_proj(asked.query).unflatten(-1, (self.num_heads, self.head_dim)),
            self.k_proj(asked.key).unflatten(-1, (self.num_kv_heads, self.head_dim)),
            self.v_proj(asked.value).unflatten(-1, (self.num_kv_heads, self.head_dim)),
        )


class FastMultiHeadAttention(FastGroupedQueryAttention):
    """Attention with a key and a value for every head (Vaswani et al. 2017), of one, two or three inputs.

    Arguments, parameters, cache and errors are those of FastGroupedQueryAttention, without num_kv_heads.
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Unpack[SourceOptions]) -> None:
        super().__init__(embed_dim, num_heads, num_heads, **options)


class FastMultiQueryAttention(FastGroupedQueryAttention):
    """Attention in which all heads share one key and one value (Shazeer 2019).

    Arguments, parameters, cache and errors are those of FastGroupedQueryAttention, without num_kv_heads.
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Unpack[SourceOptions]) -> None:
        super().__init__(embed_dim, num_heads, 1, **options)


class FastMultiHeadSelfAttention(FastAttention):
    """Multi-head attention with one fused projection to query, key and value; everything else as of FastAttention.

    Parameters are named qkv_proj, the rows of queries first, then those of keys and values, and o_proj; with qk_norm
    q_norm and k_norm. Of two or three inputs each takes its rows of qkv_proj. The cache holds keys and values
    (batch, length, num_heads, head_dim). Raises InputError for sizes that do not fit together.
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Unpack[Options]) -> None:
        super().__init__(embed_dim, num_heads, **options)
        inner = num_heads * self.head_dim
        self.qkv_proj = self._projection(embed_dim, 3 * inner)
        self.o_proj = self._projection(inner, embed_dim)
        self.reset_parameters()

    def _project(self, asked: Asked) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = (self.num_heads, self.head_dim)
        if asked.key is asked.query and asked.value is asked.query:
            query, key, value = self.qkv_proj(asked.query).unflatten(-1, (3, *heads)).unbind(2)
            return query, key, value
        sources = (asked.query, asked.key, asked.value)
        if type(self.qkv_proj) is not nn.Linear:  # an adapter or a quantised layer, which cannot be taken apart
            parts = [self.qkv_proj(source).chunk(3, -1)[place] for place, source in enumerate(sources)]
        else:
            weights = self.qkv_proj.weight.chunk(3)
            biases = (None,) * 3 if self.qkv_proj.bias is None else self.qkv_proj.bias.chunk(3)
            parts = [F.linear(*each) for each in zip(sources, weights, biases, strict=True)]
        query, key, value = (part.unflatten(-1, heads) for part in parts)
        return query, key, value
