"""What the layers refuse: early, in one line, with the shapes that were expected and that came."""

from typing import Any

import pytest
import torch

from tilewise import (
    FastGroupedQueryAttention,
    FastMultiHeadAttention,
    FastMultiHeadLatentAttention,
    FastMultiQueryAttention,
    KeyValueCache,
)
from tilewise.domain.errors import InputError
from tilewise.layers.rope_scaling import Yarn

from .conftest import Ran
from .forms import EMBED, FORMS, HEADS, layer_of, rows

MASKS: list[tuple[tuple[int, ...], torch.dtype, str]] = [
    ((5, 8), torch.bool, r"expected \(q_len, kv_len\) = \(5, 9\), \(batch, kv_len\) = \(2, 9\), .*got \(5, 8\)"),
    ((9, 5), torch.bool, r"\(batch, q_len, kv_len\) = \(2, 5, 9\) or .*got \(9, 5\)"),
    ((9,), torch.bool, r"got \(9,\)"),
    ((3, 5, 9), torch.bool, r"got \(3, 5, 9\)"),
    ((HEADS, 5, 9), torch.bool, r"got \(4, 5, 9\)"),
    ((2, 3, 5, 9), torch.bool, r"\(batch, heads, q_len, kv_len\) = \(2, 4, 5, 9\), got \(2, 3, 5, 9\)"),
    ((2, HEADS, 5, 1), torch.bool, r"got \(2, 4, 5, 1\)"),
    ((1, 2, HEADS, 5, 9), torch.bool, r"got \(1, 2, 4, 5, 9\)"),
    ((5, 9), torch.int64, r"expected bool \(True = attend\) or additive floating point, got torch.int64 \(5, 9\)"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "dtype", "message"), MASKS)
def test_masks(form: str, shape: tuple[int, ...], dtype: torch.dtype, message: str, ran: Ran) -> None:
    with pytest.raises(InputError, match=f"attn_mask: .*{message}"):
        layer_of(form)(rows(5), rows(9), attn_mask=torch.ones(shape, dtype=dtype))
    assert not ran


def test_a_mask_of_queries_or_of_the_batch() -> None:
    layer = layer_of("self")
    with pytest.raises(InputError, match=r"\(2, 2\) may be .* give it as \(1, 2, 2\) or as \(2, 1, 2\)"):
        layer(rows(2), attn_mask=torch.ones(2, 2, dtype=torch.bool))
    layer(rows(2), attn_mask=torch.ones(1, 2, 2, dtype=torch.bool))


def test_a_mask_must_cover_the_cache() -> None:
    layer = layer_of("grouped", causal=True)
    _, cache = layer(rows(5), use_cache=True)
    with pytest.raises(InputError, match=r"\(q_len, kv_len\) = \(3, 8\), .*, got \(3, 3\); keys of a cache count"):
        layer(rows(3), attn_mask=torch.ones(3, 3, dtype=torch.bool), past_key_value=cache)


CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("value alone", {"value": rows(9)}, r"expected a key with the value \(2, 9, 48\)"),
    ("batch", {"key": rows(9, batch=3)}, r"one batch, .*got \(2, 5, 48\), \(3, 9, 48\), \(3, 9, 48\)"),
    ("width", {"key": rows(9)[..., :40]}, r"expected key \(batch, seq, 48\), got \(2, 9, 40\)"),
    ("dtype", {"key": rows(9).half()}, r"expected key torch.float32 .* got torch.float16 \(2, 9, 48\)"),
    ("past", {"past_key_value": (rows(3), rows(3))}, "past_key_value: expected a KeyValueCache, got tuple"),
    ("past batch", {"past_key_value": KeyValueCache((rows(3, batch=1),))}, "expected a batch of 2 like query, got 1"),
    ("past parts", {"past_key_value": KeyValueCache((rows(3)[..., :2],))}, "expected a cache like .*got .2, 3, 2"),
    ("mask device", {"attn_mask": torch.ones(5, 5, device="meta")}, r"expected it on cpu like query, got .* on meta"),
    ("ids shape", {"position_ids": torch.arange(4)}, r"position_ids: expected integers \(5,\) or \(2, 5\), got \(4,\)"),
    ("ids dtype", {"position_ids": torch.ones(5)}, "position_ids: expected int64 or int32 .* got torch.float32"),
    ("ids of three", {"position_ids": (torch.arange(5),) * 3}, "expected those of queries, or a pair .* got 3"),
    ("ids list", {"position_ids": [1, 2]}, r"position_ids: expected integers \(5,\) or \(2, 5\), got list"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("changes", "message"), [call[1:] for call in CALLS], ids=[call[0] for call in CALLS])
def test_inputs(form: str, changes: dict[str, Any], message: str, ran: Ran) -> None:
    with pytest.raises(InputError, match=message):
        layer_of(form)(rows(5), **changes)
    assert not ran


def test_lengths_of_key_and_value() -> None:
    with pytest.raises(InputError, match=r"key and value of one length, got .*\(2, 9, 48\), \(2, 8, 48\)"):
        layer_of("multi-head")(rows(5), rows(9), rows(8))


@pytest.mark.parametrize("form", ["latent", "decoupled"])
def test_latent_attention_has_no_values_of_its_own(form: str) -> None:
    layer = layer_of(form)
    with pytest.raises(InputError, match=r"one latent, got a value \(2, 9, 48\) besides the key"):
        layer(rows(5), rows(9), rows(9))
    key = rows(9)
    torch.testing.assert_close(layer(rows(5), key, key), layer(rows(5), key))


def test_alibi_counts_places_itself() -> None:
    with pytest.raises(InputError, match="position_ids: ALiBi counts places"):
        layer_of("self", position_method="alibi")(rows(5), position_ids=torch.arange(5))


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"dropout": 1.0}, "dropout: expected a share of at least 0 and below 1, got 1.0"),
    ({"dropout": True}, "dropout: expected a share .* got True"),
    *(
        ({name: "no"}, f"{name}: expected True or False, got 'no'")
        for name in ("bias", "causal", "qk_norm", "add_zero_attn", "batch_first", "strict")
    ),
    ({"causal": 1}, "causal: expected True or False, got 1"),
    ({"qk_norm_eps": -1e-6}, "qk_norm_eps: expected a number of at least 0, got -1e-06"),
    ({"position_method": "RoPE"}, "position_method: expected one of none, rope, alibi or an nn.Module, got 'RoPE'"),
    ({"position_method": "rope", "head_dim": 7}, "'rope' needs an even head_dim .* got 7"),
    ({"position_method": "rope", "rope_base": 0}, "rope_base: expected a number above 1, got 0"),
    ({"max_seq_len": 0}, "max_seq_len: expected a whole number of at least 1, got 0"),
    ({"rope_scaling": 2.0}, "rope_scaling: expected None or .*, got 2.0"),
    ({"rope_scaling": {"factor": 2.0}}, "expected a rope_type of default, linear, dynamic, yarn, llama3, got None"),
    ({"rope_scaling": {"type": "ntk"}}, "expected a rope_type of .* got 'ntk'"),
    ({"rope_scaling": {"type": "linear"}}, "linear has the fields factor, needs factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, "does not take mscale"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor: expected a number of at least 1, got 0.5"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2}},
        "rope_scaling: linear belongs to position_method 'rope', got 'none'",
    ),
    (
        {"rope_scaling": Yarn(factor=2.0), "position_method": torch.nn.Identity()},
        "rope_scaling: yarn belongs to position_method 'rope', got 'Identity'",
    ),
    ({"rope_scaling": Yarn(factor=2.0, beta_slow=0)}, "expected beta_slow above 0 .* beta_fast, got 0 and 32"),
    ({"rope_scaling": Yarn(factor=2.0, beta_fast=0.5)}, "expected beta_slow above 0 .*, got 1.0 and 0.5"),
    ({"rope_scaling": Yarn(factor=float("nan"))}, "factor: expected a number of at least 1, got nan"),
    (
        {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4,
                          "original_max_position_embeddings": 64}},
        "expected low_freq_factor below high_freq_factor, got 4 and 4",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FastMultiHeadAttention(EMBED, HEADS, **options)


def latent(**options: Any) -> FastMultiHeadLatentAttention:
    return FastMultiHeadLatentAttention(EMBED, HEADS, **options)


def test_sizes() -> None:
    with pytest.raises(InputError, match="num_heads must be a multiple of num_kv_heads, got 4 and 3"):
        FastGroupedQueryAttention(EMBED, HEADS, 3)
    with pytest.raises(InputError, match="kdim: expected a whole number of at least 1, got 0"):
        FastMultiHeadAttention(EMBED, HEADS, kdim=0)
    for layer in (FastMultiHeadAttention, FastMultiQueryAttention):
        with pytest.raises(InputError, match=r"^num_heads: expected a whole number of at least 1, got 0"):
            layer(EMBED, 0)
    for options, message in (
        ({"latent_dim": 0}, "latent_dim: expected a whole number of at least 1, got 0"),
        ({"q_rank": 8}, "q_rank 8 belongs to kv_rank"),
        ({"kv_rank": 8, "latent_dim": 8}, "latent_dim 8 belongs to the simple form"),
        ({"kv_rank": 8, "head_dim": 8}, "head_dim: expected none with kv_rank, got 8"),
        ({"kv_rank": 8, "qk_norm": True}, "qk_norm: expected none with kv_rank, got True"),
        ({"kv_rank": 8, "position_method": "alibi"}, "expected 'rope' or 'none' with kv_rank, got 'alibi'"),
        (
            {"kv_rank": 8, "position_method": "none", "rope_scaling": Yarn(factor=2.0)},
            "yarn belongs to .*'rope', got 'none'",
        ),
        ({"kv_rank": 8, "absorb": "yes"}, "absorb: expected True or False, got 'yes'"),
        ({"kv_rank": 8, "rope_interleave": 1}, "rope_interleave: expected True or False, got 1"),
        ({"kv_rank": 8, "norm_eps": "small"}, "norm_eps: expected a number of at least 0, got 'small'"),
        ({"kv_rank": 8, "rope_head_dim": 5}, "needs an even head_dim .* got 5"),
    ):
        with pytest.raises(InputError, match=message):
            latent(**options)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "grouped"])
def test_only_the_grouped_layer_takes_heads_of_keys(form: str) -> None:
    with pytest.raises(TypeError, match="num_kv_heads"):
        FORMS[form](num_kv_heads=2)


@pytest.mark.filterwarnings("ignore")  # of torch.jit, that it is old and that shapes become constants
@pytest.mark.parametrize("form", FORMS)
def test_a_trace_points_to_what_keeps_lengths_open(form: str, ran: Ran) -> None:
    with pytest.raises(InputError, match=r"inside torch\.jit\.trace; use torch\.export or torch\.compile"):
        torch.jit.trace(layer_of(form, causal=True), (rows(5),))
    assert not ran
