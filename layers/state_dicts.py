"""Weights of other people's attention layers under this project's names.

    layer.load_state_dict(trinix_layer.state_dict())                       # the names are the same
    layer.load_state_dict(weights_from_torch(mha.state_dict()))            # torch.nn.MultiheadAttention
    layer.load_state_dict(weights_from_llama(model.state_dict(), "model.layers.0.self_attn"))
    layer.load_state_dict(weights_from_deepseek(model.state_dict(), "model.layers.0.self_attn", nope_head_dim=128,
                                                v_head_dim=128))

With fused=True the names are those of FastMultiHeadSelfAttention (qkv_proj), else of the layers with q_proj, k_proj and
v_proj. The same arguments make the same layer:

- Llama: FastGroupedQueryAttention(hidden_size, num_attention_heads, num_key_value_heads, head_dim=head_dim,
  bias=attention_bias, causal=True, position_method="rope", rope_base=rope_theta, rope_scaling=rope_scaling,
  max_seq_len=max_position_embeddings).
- DeepSeek V3: FastMultiHeadLatentAttention(hidden_size, num_attention_heads, q_rank=q_lora_rank, kv_rank=kv_lora_rank,
  nope_head_dim=qk_nope_head_dim, rope_head_dim=qk_rope_head_dim, v_head_dim=v_head_dim,
  rope_interleave=rope_interleave, bias=attention_bias, causal=True), with Llama's rotary arguments.

Two things differ in meaning. A bool mask of torch.nn.MultiheadAttention is True where nothing is attended. trinix
rotates before qk_norm and this project after it, which is the same while all weights of a norm are equal.
"""

from collections.abc import Mapping, Sequence

import torch

from tilewise.domain.errors import InputError

Weights = Mapping[str, torch.Tensor]
_PARTS = ("q_proj", "k_proj", "v_proj")


def weights_from_torch(state: Weights, prefix: str = "", *, fused: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights of torch.nn.MultiheadAttention, with or without kdim and vdim.

    Raises InputError where something is missing, for add_bias_kv, which has no counterpart here, and for kdim or vdim
    with fused=True.
    """
    own = _below(state, prefix)
    _no_more_than(
        own,
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight",
         "out_proj.bias"),
        "torch.nn.MultiheadAttention without add_bias_kv",
    )  # fmt: skip
    found: dict[str, torch.Tensor] = {}
    if "in_proj_weight" in own:
        weights = own["in_proj_weight"].chunk(3)
    else:
        weights = tuple(_needed(own, f"{part}_weight", prefix) for part in _PARTS)
    for part, weight in zip(_PARTS, weights, strict=True):
        found[f"{part}.weight"] = weight
    if "in_proj_bias" in own:
        for part, bias in zip(_PARTS, own["in_proj_bias"].chunk(3), strict=True):
            found[f"{part}.bias"] = bias
    found["o_proj.weight"] = _needed(own, "out_proj.weight", prefix)
    if "out_proj.bias" in own:
        found["o_proj.bias"] = own["out_proj.bias"]
    return _fused(found) if fused else found


def weights_from_llama(state: Weights, prefix: str = "", *, fused: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights of a Hugging Face Llama attention (also Mistral's, and Qwen3's with its norms).

    Their rotary pairs are ours, so nothing is permuted. Raises InputError where something is missing or unknown, and
    for grouped keys with fused=True.
    """
    own = _below(state, prefix)
    names = [f"{part}.{kind}" for part in (*_PARTS, "o_proj") for kind in ("weight", "bias")]
    _no_more_than(own, [*names, "q_norm.weight", "k_norm.weight"], "a Llama attention")
    for part in (*_PARTS, "o_proj"):
        _needed(own, f"{part}.weight", prefix)
    return _fused(own) if fused else own


def weights_from_deepseek(
    state: Weights, prefix: str = "", *, nope_head_dim: int, v_head_dim: int
) -> dict[str, torch.Tensor]:
    """Return the weights of a Hugging Face DeepSeek V2 or V3 attention; the head sizes part kv_b_proj.

    Raises InputError where something is missing or unknown, and for sizes that do not divide kv_b_proj.
    """
    own = _below(state, prefix)
    names = {
        "q_proj": "q_proj", "q_a_proj": "q_down_proj", "q_a_layernorm": "q_latent_norm", "q_b_proj": "q_up_proj",
        "kv_a_proj_with_mqa": "kv_down_proj", "kv_a_layernorm": "kv_latent_norm", "o_proj": "o_proj",
    }  # fmt: skip
    known = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    _no_more_than(own, [*known, "kv_b_proj.weight"], "a DeepSeek attention")
    for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
        _needed(own, f"{name}.weight", prefix)
    up = own.pop("kv_b_proj.weight")
    if up.shape[0] % (nope_head_dim + v_head_dim):
        raise InputError(
            f"kv_b_proj: expected rows in multiples of nope_head_dim + v_head_dim = {nope_head_dim + v_head_dim}, got "
            f"{tuple(up.shape)}"
        )
    heads = up.unflatten(0, (-1, nope_head_dim + v_head_dim))
    found = {f"{names[name.partition('.')[0]]}.{name.partition('.')[2]}": weight for name, weight in own.items()}
    found["k_up_proj.weight"] = heads[:, :nope_head_dim].flatten(0, 1)
    found["v_up_proj.weight"] = heads[:, nope_head_dim:].flatten(0, 1)
    return found


def _below(state: Weights, prefix: str) -> dict[str, torch.Tensor]:
    start = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    own = {name[len(start) :]: weight for name, weight in state.items() if name.startswith(start)}
    if not own:
        raise InputError(f"expected weights below {start!r}, got names like {', '.join(list(state)[:3]) or 'none'}")
    return own


def _needed(own: Weights, name: str, prefix: str) -> torch.Tensor:
    if name not in own:
        raise InputError(f"expected {name} below {prefix!r}, got {', '.join(own)}")
    return own[name]


def _no_more_than(own: Weights, names: Sequence[str], whose: str) -> None:
    unknown = [name for name in own if name not in names]
    if unknown:
        raise InputError(f"expected the weights of {whose}, got {', '.join(unknown)} besides; name the layer's prefix")


def _fused(weights: Weights) -> dict[str, torch.Tensor]:
    """Return weights with those of queries, keys and values in one, as FastMultiHeadSelfAttention has them."""
    found = {name: weight for name, weight in weights.items() if name.partition(".")[0] not in _PARTS}
    for kind in ("weight", "bias"):
        parts = [weights[name] for part in _PARTS if (name := f"{part}.{kind}") in weights]
        if not parts:
            continue
        if len({part.shape for part in parts}) != 1 or len(parts) != len(_PARTS):
            raise InputError(
                f"fused: expected queries, keys and values of one shape, got {[tuple(part.shape) for part in parts]}; "
                "leave out fused=True, and use a layer with q_proj, k_proj and v_proj"
            )
        found[f"qkv_proj.{kind}"] = torch.cat(parts)
    return found
