"""The layers by name, small, and what each computes, written out in float64 from nothing but its weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tilewise import (
    FastGroupedQueryAttention,
    FastMultiHeadAttention,
    FastMultiHeadLatentAttention,
    FastMultiHeadSelfAttention,
    FastMultiQueryAttention,
)
from tilewise.layers.base import FastAttention

EMBED, HEADS = 48, 4
DECOUPLED = {"kv_rank": 16, "q_rank": 20, "nope_head_dim": 16, "rope_head_dim": 8, "v_head_dim": 24}
FORMS: dict[str, Callable[..., FastAttention]] = {
    "multi-head": lambda **options: FastMultiHeadAttention(EMBED, HEADS, **options),
    "self": lambda **options: FastMultiHeadSelfAttention(EMBED, HEADS, **options),
    "grouped": lambda **options: FastGroupedQueryAttention(EMBED, HEADS, 2, **options),
    "multi-query": lambda **options: FastMultiQueryAttention(EMBED, HEADS, **options),
    "latent": lambda **options: FastMultiHeadLatentAttention(EMBED, HEADS, latent_dim=16, **options),
    "decoupled": lambda **options: FastMultiHeadLatentAttention(EMBED, HEADS, **{**DECOUPLED, **options}),
}
HEADED = [name for name in FORMS if name != "decoupled"]  # those whose positions are of the whole head


def layer_of(form: str, **options: Any) -> FastAttention:
    """Return a layer whose biases and norms are not those of a new one, so that leaving one out shows."""
    torch.manual_seed(0)
    layer = FORMS[form](**options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else -0.5))
    return layer


def rows(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, EMBED, generator=torch.Generator().manual_seed(seed))


Weights = Mapping[str, torch.Tensor]


def doubled(layer: FastAttention) -> dict[str, torch.Tensor]:
    return {name: weight.detach().double().requires_grad_() for name, weight in layer.state_dict().items()}


@dataclass(frozen=True, kw_only=True)
class Attends:
    """How queries attend keys: a mask (B or 1, H or 1, Q, K), places of queries and keys, rotary base, zero key."""

    mask: torch.Tensor | None = None
    of_query: torch.Tensor | None = None
    of_key: torch.Tensor | None = None
    rope: bool = False
    base: float = 10000.0
    zero: bool = False
    keep: torch.Tensor | None = None


PLAIN = Attends()


def expected(layer: FastAttention, weights: Weights, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
             how: Attends = PLAIN) -> torch.Tensor:  # fmt: skip
    """Return what `layer` gives with `weights`, (B, Q, embed_dim) float64."""
    q, k, v, turned = _heads(layer, weights, query.double(), key.double(), value.double())
    if how.rope:
        of_query = torch.arange(q.shape[1]) + k.shape[1] - q.shape[1] if how.of_query is None else how.of_query
        of_key = torch.arange(k.shape[1]) if how.of_key is None else how.of_key
        paired = isinstance(layer, FastMultiHeadLatentAttention) and layer.decoupled
        q = torch.cat((q[..., :-turned], turn(q[..., -turned:], of_query, how.base, paired)), -1)
        k = torch.cat((k[..., :-turned], turn(k[..., -turned:], of_key, how.base, paired)), -1)
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if how.mask is not None:
        hidden = scores.masked_fill(~how.mask, -torch.inf) if how.mask.dtype is torch.bool else scores + how.mask
        scores = hidden
    if how.zero:
        scores = torch.cat((scores, torch.zeros_like(scores[..., :1])), -1)
        v = torch.cat((v, torch.zeros_like(v[:, :1])), 1)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    weight = torch.softmax(torch.where(seen, scores, torch.zeros_like(scores)), -1) * seen
    if how.keep is not None:
        weight = weight * how.keep
    out = torch.einsum("bhqk,bkhd->bqhd", weight, v)
    return linear(weights, "o_proj", out.flatten(2))


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    bias = weights.get(f"{name}.bias")
    out = x @ weights[f"{name}.weight"].T
    return out if bias is None else out + bias


def _heads(
    layer: FastAttention, weights: Weights, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Return queries, keys and values with their heads, and how many elements at a head's end are rotated."""
    if isinstance(layer, FastMultiHeadLatentAttention):
        return _latent_heads(layer, weights, query, key)
    if isinstance(layer, FastMultiHeadSelfAttention):
        part = HEADS * layer.head_dim
        fused = [linear(weights, "qkv_proj", each)[..., i * part : (i + 1) * part] for i, each in
                 enumerate((query, key, value))]  # fmt: skip
        q, k, v = (each.unflatten(-1, (HEADS, -1)) for each in fused)
    else:
        q = linear(weights, "q_proj", query).unflatten(-1, (HEADS, -1))
        k, v = (linear(weights, name, each).unflatten(-1, (layer.num_kv_heads, -1)) for name, each in
                (("k_proj", key), ("v_proj", value)))  # fmt: skip
    return normed(weights, "q_norm", q), normed(weights, "k_norm", k), v, layer.head_dim


def _latent_heads(
    layer: FastMultiHeadLatentAttention, weights: Weights, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    dims = layer.dims
    latent = linear(weights, "kv_down_proj", key)
    shared = latent[..., dims.rank :]
    latent = normed(weights, "kv_latent_norm", latent[..., : dims.rank])
    k = linear(weights, "k_up_proj", latent).unflatten(-1, (HEADS, -1))
    v = linear(weights, "v_up_proj", latent).unflatten(-1, (HEADS, -1))
    if "q_proj.weight" in weights:
        q = linear(weights, "q_proj", query)
    else:
        q = linear(weights, "q_up_proj", normed(weights, "q_latent_norm", linear(weights, "q_down_proj", query)))
    q = normed(weights, "q_norm", q.unflatten(-1, (HEADS, -1)))
    k = torch.cat((normed(weights, "k_norm", k), shared[:, :, None].expand(-1, -1, HEADS, -1)), -1)
    return q, k, v, dims.rope or layer.head_dim


def normed(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    weight = weights.get(f"{name}.weight")
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x: torch.Tensor, places: torch.Tensor, base: float, paired: bool) -> torch.Tensor:
    """Return rotary positions by complex numbers; places (S,) or (B, S), x (B, S, H, D)."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if paired else x.unflatten(-1, (2, half)).transpose(-1, -2)
    angles = places.double()[..., None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[..., None, :]
    return torch.cat((turned.real, turned.imag), -1)


def reach(q_len: int, kv_len: int, left: int = -1, right: int = -1) -> torch.Tensor:
    """Return which keys a window around the diagonal, which ends at the last key, leaves: bool (1, 1, Q, K)."""
    distance = torch.arange(kv_len) - (torch.arange(q_len) + kv_len - q_len)[:, None]
    kept = torch.ones(q_len, kv_len, dtype=torch.bool)
    if left >= 0:
        kept &= distance >= -left
    if right >= 0:
        kept &= distance <= right
    return kept[None, None]


def alibi(q_len: int, kv_len: int, heads: int = HEADS) -> torch.Tensor:
    """Return ALiBi's bias for a power of two of heads, (1, H, Q, K)."""
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)], dtype=torch.float64)
    distance = (torch.arange(kv_len) - (torch.arange(q_len) + kv_len - q_len)[:, None]).abs()
    return -(slopes[:, None, None] * distance)[None]
