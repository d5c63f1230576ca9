"""The self-attention layer, beside torch's own."""

from typing import Any

import pytest
import torch
from torch import nn

from tilewise import FastMultiHeadSelfAttention
from tilewise.domain.config import Candidate
from tilewise.domain.errors import UnsupportedError

from .conftest import Ran


def inputs(seq: int = 12, embed: int = 32) -> torch.Tensor:
    return torch.randn(2, seq, embed, generator=torch.Generator().manual_seed(0))


def layer_of(**options: Any) -> FastMultiHeadSelfAttention:
    torch.manual_seed(0)
    return FastMultiHeadSelfAttention(32, 4, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel_type", ["auto", "pytorch"])
def test_equals_torchs_layer_with_the_same_weights(bias: bool, causal: bool, kernel_type: str) -> None:
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)
    ours = layer_of(bias=bias, causal=causal, kernel_type=kernel_type)
    weights = {"qkv_proj.weight": theirs.in_proj_weight, "o_proj.weight": theirs.out_proj.weight}
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
        weights |= {"qkv_proj.bias": theirs.in_proj_bias, "o_proj.bias": theirs.out_proj.bias}
    ours.load_state_dict(weights)
    x, mask = inputs(), nn.Transformer.generate_square_subsequent_mask(12) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter_and_the_input() -> None:
    layer, x = layer_of(causal=True), inputs().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        # a bias of the keys moves all scores of a row alike, and softmax does not see it
        blocks = parameter.grad.unflatten(0, (-1, 32)) if name.startswith("qkv") else parameter.grad[None]
        seen = [float(block.abs().max()) > 1e-4 for block in blocks]
        assert seen == ([True, False, True] if name == "qkv_proj.bias" else [True] * len(blocks)), name


def test_an_attention_mask_is_true_where_it_attends() -> None:
    layer = layer_of()
    x = inputs()
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, attn_mask=mask), _with(layer, causal=True)(x), rtol=1e-5, atol=1e-5)


def _with(layer: FastMultiHeadSelfAttention, **options: Any) -> FastMultiHeadSelfAttention:
    other = FastMultiHeadSelfAttention(32, 4, **options)
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reach", [1, 3, 12, 100])
def test_a_sliding_window_counts_the_position_itself(causal: bool, reach: int) -> None:
    layer = layer_of()
    places = torch.arange(12)
    behind = places[:, None] - places
    mask = (behind < reach) & (behind > -reach)
    mask = mask & (behind >= 0) if causal else mask
    x = inputs()
    windowed = _with(layer, causal=causal, sliding_window=reach)
    torch.testing.assert_close(windowed(x), layer(x, attn_mask=mask), rtol=1e-5, atol=1e-5)


def test_head_dim_may_differ_from_the_embeddings_share() -> None:
    layer = layer_of(head_dim=24)
    assert layer.qkv_proj.weight.shape == (3 * 4 * 24, 32)
    assert layer(inputs()).shape == (2, 12, 32)


def test_dtype_and_device_are_those_asked_for() -> None:
    layer = layer_of(dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert layer(inputs().bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("kernel_type", "backend"),
    [("auto", "sdpa"), ("sdpa", "sdpa"), ("pytorch", "plain"), ("flash", "sdpa"), ("triton", "sdpa")],
)
def test_kernel_types(kernel_type: str, backend: str, ran: Ran, caplog: pytest.LogCaptureFixture) -> None:
    layer = layer_of(kernel_type=kernel_type)
    for _ in range(2):
        layer(inputs())
    assert ran == [Candidate(backend)] * 2
    # a kernel that is not here is replaced with one warning
    assert len(caplog.records) == (kernel_type in ("flash", "triton"))


@pytest.mark.parametrize("kernel_type", ["flash", "triton"])
def test_strict_raises_where_the_kernel_cannot_run(kernel_type: str) -> None:
    with pytest.raises(UnsupportedError, match="needs"):
        layer_of(kernel_type=kernel_type, strict=True)(inputs())
