"""The layers with other libraries' weights give what those libraries give, positions and caches included."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, DynamicCache, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from tilewise import (
    FastGroupedQueryAttention,
    FastMultiHeadAttention,
    FastMultiHeadLatentAttention,
    FastMultiHeadSelfAttention,
    FastMultiQueryAttention,
    weights_from_deepseek,
    weights_from_llama,
    weights_from_torch,
)
from tilewise.domain.errors import InputError
from tilewise.layers.positions import Span, rope_of
from tilewise.layers.rope_scaling import scaling_of

from .forms import EMBED, HEADS, rows

Shapes = dict[str, tuple[int, ...]]
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn, all of it": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2,
        "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False,
    },
    "yarn, given": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                    "attention_factor": 1.25},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
}  # fmt: skip


def llama(scaling: dict[str, Any] | None = None, **changes: Any) -> LlamaConfig:
    return LlamaConfig(**{
        "hidden_size": EMBED, "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "rope_parameters": {"rope_theta": 500.0, **(scaling or SCALINGS["default"])},
        "attention_bias": True, "attn_implementation": "eager", **changes,
    })  # fmt: skip


@pytest.mark.parametrize("length", [100, 1000])
@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_tables(name: str, length: int) -> None:
    """Theirs are float32 throughout, so that an angle is off by a few 1e-7 of itself."""
    config = llama(SCALINGS[name])
    theirs = LlamaRotaryEmbedding(config)
    cos, sin = theirs(torch.empty(1, dtype=torch.float64), torch.arange(length)[None])
    ours = rope_of(16, base=500.0, max_seq_len=128, scaling=scaling_of(SCALINGS[name]))
    reached = torch.tensor(length) if ours.scaling.by_length else None
    for found, wanted in zip(ours.table(Span(0, length), torch.device("cpu"), reached), (cos, sin), strict=True):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), wanted[..., :8], rtol=0, atol=2e-7 * length)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_frequencies(name: str) -> None:
    config, scaling = llama(SCALINGS[name]), scaling_of(SCALINGS[name])
    if name == "default":
        wanted, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        wanted, factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](config, torch.device("cpu"), seq_len=300)
    found = scaling.frequencies(16, 500.0, 128, torch.tensor(300))
    torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=0)
    assert scaling.attention_factor_ == pytest.approx(factor)


@pytest.mark.parametrize("name", SCALINGS)
def test_llama(name: str) -> None:
    config = llama(SCALINGS[name])
    torch.manual_seed(0)
    theirs = LlamaAttention(config, 0).eval()
    ours = FastGroupedQueryAttention(
        EMBED, HEADS, 2, head_dim=16, causal=True, position_method="rope", rope_base=500.0, max_seq_len=128,
        rope_scaling=SCALINGS[name],
    )  # fmt: skip
    state = {f"model.layers.3.self_attn.{key}": weight for key, weight in theirs.state_dict().items()}
    ours.load_state_dict(weights_from_llama(state, "model.layers.3.self_attn"))
    x, places = rows(150), torch.arange(150)[None]
    mask = torch.full((150, 150), -torch.inf).triu(1)[None, None]
    wanted, _ = theirs(x, LlamaRotaryEmbedding(config)(x, places), mask)
    torch.testing.assert_close(ours(x), wanted, rtol=1e-4, atol=2e-5)


def deepseek(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**{
        "hidden_size": EMBED, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": 20,
        "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "max_position_embeddings": 128, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        "attn_implementation": "eager", **changes,
    })  # fmt: skip


def of_deepseek(config: DeepseekV3Config, **options: Any) -> tuple[DeepseekV3Attention, FastMultiHeadLatentAttention]:
    torch.manual_seed(0)
    theirs = DeepseekV3Attention(config, 0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    assert config.rope_parameters is not None
    ours = FastMultiHeadLatentAttention(
        EMBED, HEADS, q_rank=config.q_lora_rank, kv_rank=24, nope_head_dim=16, rope_head_dim=8, v_head_dim=12,
        rope_interleave=bool(config.rope_interleave), bias=config.attention_bias, causal=True, rope_base=500.0,
        rope_scaling=config.rope_parameters, max_seq_len=128, **options,
    ).eval()  # fmt: skip
    ours.load_state_dict(weights_from_deepseek(theirs.state_dict(), nope_head_dim=16, v_head_dim=12))
    return theirs, ours


DEEPSEEKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True},
    "halves": {"rope_interleave": False},
    "queries of no rank": {"q_lora_rank": None},
    "yarn": {"rope_parameters": {"rope_theta": 500.0, **SCALINGS["yarn, all of it"]}},
}


@pytest.mark.parametrize("absorb", [None, True, False])
@pytest.mark.parametrize("name", DEEPSEEKS)
def test_deepseek_v3_and_its_decoding(name: str, absorb: bool | None) -> None:
    config = deepseek(**DEEPSEEKS[name])
    theirs, ours = of_deepseek(config, absorb=absorb)
    x, places = rows(14), torch.arange(14)[None]
    rotary = DeepseekV3RotaryEmbedding(config)
    mask = torch.full((14, 14), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        wanted, _ = theirs(x, rotary(x, places), mask)
        torch.testing.assert_close(ours(x), wanted, rtol=1e-4, atol=1e-5)
        kept = DynamicCache()
        theirs(x[:, :10], rotary(x, places[:, :10]), mask[..., :10, :10], kept)
        _, cache = ours(x[:, :10], use_cache=True)
        assert [tuple(each.shape) for each in cache.tensors] == [(2, 10, 24 + 8)]
        for last in range(10, 14):
            step = x[:, last : last + 1]
            wanted, _ = theirs(step, rotary(x, places[:, last : last + 1]), None, kept)
            out, cache = ours(step, past_key_value=cache, use_cache=True)
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_deepseek_v3s_gradients() -> None:
    theirs, ours = of_deepseek(deepseek())
    x, places = rows(9), torch.arange(9)[None]
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    out, _ = theirs(x, DeepseekV3RotaryEmbedding(theirs.config)(x, places), mask)
    out.square().sum().backward()
    ours(x).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    wanted = weights_from_deepseek(gradients, nope_head_dim=16, v_head_dim=12)
    found = dict(ours.named_parameters())
    assert set(wanted) == set(found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name].grad, gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 20, "vdim": 28}])
def test_torchs_layer(bias: bool, widths: dict[str, int]) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, bias=bias, batch_first=True, **widths)
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
    ours = FastMultiHeadAttention(EMBED, HEADS, bias=bias, kdim=widths.get("kdim"), vdim=widths.get("vdim"))
    ours.load_state_dict(weights_from_torch(theirs.state_dict()))
    key, value = torch.randn(2, 9, widths.get("kdim", EMBED)), torch.randn(2, 9, widths.get("vdim", EMBED))
    hidden = torch.rand(5, 9) < 0.4
    wanted, _ = theirs(rows(5), key, value, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(ours(rows(5), key, value, attn_mask=~hidden), wanted, rtol=1e-4, atol=1e-5)
    if not widths:
        fused = FastMultiHeadSelfAttention(EMBED, HEADS, bias=bias)
        fused.load_state_dict(weights_from_torch(theirs.state_dict(), fused=True))
        wanted, _ = theirs(rows(5), rows(5), rows(5), need_weights=False)
        torch.testing.assert_close(fused(rows(5)), wanted, rtol=1e-4, atol=1e-5)


def test_torchs_zero_key() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, add_zero_attn=True)
    ours = FastMultiHeadAttention(EMBED, HEADS, add_zero_attn=True)
    ours.load_state_dict(weights_from_torch(theirs.state_dict()))
    wanted, _ = theirs(rows(5), rows(9, seed=1), rows(9, seed=1), need_weights=False)
    torch.testing.assert_close(ours(rows(5), rows(9, seed=1)), wanted, rtol=1e-4, atol=1e-5)


def test_trinixs_names() -> None:
    """What the state_dict of each layer of trinix 0.1.4 holds, with their shapes for 48 wide and 4 heads."""
    square: Shapes = {"weight": (EMBED, EMBED), "bias": (EMBED,)}
    shared: Shapes = {"weight": (12, EMBED), "bias": (12,)}
    down: Shapes = {"weight": (16, EMBED), "bias": (16,)}
    up: Shapes = {"weight": (EMBED, 16), "bias": (EMBED,)}
    norms: dict[str, Shapes] = {"q_norm": {"weight": (12,)}, "k_norm": {"weight": (12,)}}
    layers: list[tuple[nn.Module, dict[str, Shapes]]] = [
        (
            FastMultiHeadAttention(EMBED, HEADS, qk_norm=True, position_method="rope"),
            {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), square), **norms},
        ),
        (
            FastMultiHeadSelfAttention(EMBED, HEADS, position_method="alibi"),
            {"qkv_proj": {"weight": (3 * EMBED, EMBED), "bias": (3 * EMBED,)}, "o_proj": square},
        ),
        (
            FastMultiQueryAttention(EMBED, HEADS),
            {"q_proj": square, "k_proj": shared, "v_proj": shared, "o_proj": square},
        ),
        (
            FastMultiHeadLatentAttention(EMBED, HEADS),
            {"q_down_proj": down, "q_up_proj": up, "kv_down_proj": down, "k_up_proj": up, "v_up_proj": up,
             "o_proj": square},
        ),
    ]  # fmt: skip
    for layer, names in layers:
        found = {name: tuple(weight.shape) for name, weight in layer.state_dict().items()}
        assert found == {f"{name}.{kind}": shape for name, kinds in names.items() for kind, shape in kinds.items()}


def missing(*names: str) -> dict[str, torch.Tensor]:
    state = LlamaAttention(llama(), 0).state_dict()
    return {name: weight for name, weight in state.items() if name not in names}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights_from_llama(missing("v_proj.weight")), "expected v_proj.weight below '', got q_proj.weight"),
        (lambda: weights_from_llama({**missing(), "rotary.x": torch.ones(1)}), "got rotary.x besides"),
        (lambda: weights_from_llama(missing(), "model"), "expected weights below 'model.', got names like q_proj"),
        (lambda: weights_from_llama(missing(), fused=True), r"fused: .*got \[\(64, 48\), \(32, 48\), \(32, 48\)\]"),
        (
            lambda: weights_from_torch(nn.MultiheadAttention(8, 2, add_bias_kv=True).state_dict()),
            "without add_bias_kv, got bias_k, bias_v besides",
        ),
        (
            lambda: weights_from_deepseek(
                DeepseekV3Attention(deepseek(), 0).state_dict(), nope_head_dim=16, v_head_dim=16
            ),
            r"kv_b_proj: expected rows in multiples of .* = 32, got \(112, 24\)",
        ),
    ],
)
def test_weights_that_are_of_something_else(call: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert re.search(message, str(caught.value))


def test_a_model_of_hugging_face_gives_its_own_scaling() -> None:
    """A configuration as it is written today, base included, is what the layer takes."""
    parameters = LlamaConfig(rope_parameters={"rope_theta": 5e5, **SCALINGS["llama3"]}).rope_parameters
    assert scaling_of(parameters) == scaling_of(SCALINGS["llama3"])
