"""The layers in half precision on a GPU, with the kernels that need one."""

from typing import Any

import pytest
import torch

from tilewise.domain.errors import UnsupportedError
from tilewise.layers.base import FastAttention

from .forms import FORMS, Attends, doubled, expected, layer_of, reach, rows

pytestmark = pytest.mark.gpu
LENGTH = 200
SIZES = {"decoupled": {"nope_head_dim": 16, "rope_head_dim": 16, "v_head_dim": 32}}


def on_gpu(form: str, dtype: torch.dtype, **options: Any) -> tuple[FastAttention, torch.Tensor]:
    """Return a layer with heads of 32, which every kernel takes, and its input."""
    sizes = SIZES.get(form, {"head_dim": 32})
    layer = layer_of(form, causal=True, position_method="rope", **sizes, **options).to("cuda", dtype)
    return layer, rows(LENGTH).to("cuda", dtype)


def close(found: torch.Tensor, wanted: torch.Tensor | None, dtype: torch.dtype, name: str) -> None:
    assert wanted is not None
    bound = 16 * torch.finfo(dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel_type", ["auto", "sdpa", "flash", "triton", "pytorch"])
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients(form: str, kernel_type: str, dtype: torch.dtype) -> None:
    layer, x = on_gpu(form, dtype, kernel_type=kernel_type, strict=True)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out = layer(leaf)
    weights = doubled(layer)
    with torch.device("cuda"):
        how = Attends(mask=reach(LENGTH, LENGTH, right=0), rope=True)
        wanted = expected(layer, weights, exact, exact, exact, how)
    close(out, wanted, dtype, "out")
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad.double())
    assert leaf.grad is not None
    close(leaf.grad, exact.grad, dtype, "x")
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        if "bias" not in name:  # sums that mostly cancel
            close(parameter.grad, weights[name].grad, dtype, name)


@pytest.mark.parametrize("kernel_type", ["auto", "triton", "flash"])
@pytest.mark.parametrize("form", FORMS)
def test_decoding_with_a_cache(form: str, kernel_type: str) -> None:
    layer, x = on_gpu(form, torch.float16, kernel_type=kernel_type)
    with torch.inference_mode():
        out, cache = layer(x[:, :100], use_cache=True)
        parts = [out]
        for first, last in ((100, 101), (101, 109), (109, LENGTH)):
            out, cache = layer(x[:, first:last], past_key_value=cache, use_cache=True)
            parts.append(out)
        whole = layer(x)
        close(torch.cat(parts, 1), whole.double(), torch.float16, "decoded")


def test_a_mask_that_flash_does_not_take_falls_back_or_raises() -> None:
    mask = torch.rand(LENGTH, LENGTH, device="cuda") < 0.8
    layer, x = on_gpu("grouped", torch.float16, kernel_type="flash")
    plain, _ = on_gpu("grouped", torch.float16, kernel_type="pytorch")
    close(layer(x, attn_mask=mask), plain(x, attn_mask=mask).double(), torch.float16, "out")
    strict, _ = on_gpu("grouped", torch.float16, kernel_type="flash", strict=True)
    with pytest.raises(UnsupportedError, match="cannot run"):
        strict(x, attn_mask=mask)
