"""What the tests of operators share: their arguments, and compiled calls beside eager ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tilewise.layers.ops  # noqa: F401

from .test_attention import QKV

ops = torch.ops.tilewise
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "half precision": {"dtype": torch.float16},
    "causal": {"causal": True},
    "window": {"window": (5, 2)},
    "lse": {"causal": True, "return_lse": True},
    "bool mask": {"mask": torch.rand(24, 24, generator=torch.Generator().manual_seed(1)) < 0.7},
    "mask with a gradient": {"mask": torch.randn(4, 1, 24, generator=torch.Generator().manual_seed(1)), "learns": True},
    "slopes and softcap": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]), "softcap": 7.0},
    "dropout": {"dropout": 0.4, "seed": torch.tensor(7)},
}
# inductor's own, of other parts of torch
inductor = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def tensors(
    device: torch.device = CPU, *, group: int = 2, learn: bool = False, seq: int = 24, dtype: torch.dtype | None = None
) -> QKV:
    """Query (2, seq, 4, 16), key and value, as views of wider tensors: their strides are not dense."""
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(2, seq, heads, 32, generator=generator) for heads in (4, 4 // group, 4 // group)]
    query, key, value = (tensor.to(device, dtype)[..., :16].requires_grad_(learn) for tensor in wide)
    return query, key, value


def arguments(case: str, backend: str, device: torch.device = CPU, *, learn: bool = False) -> tuple[Any, ...]:
    """Return what the operators take for one of CASES."""
    options = {**CASES[case]}
    mask = options.get("mask")
    group = 1 if backend == "sdpa_efficient" else 2
    query, key, value = tensors(device, learn=learn, group=group, dtype=options.get("dtype"))
    if mask is not None:
        mask = mask.to(device) if mask.dtype is torch.bool else mask.to(device, query.dtype)
        mask = mask.requires_grad_(learn and options.get("learns", False))
    slopes = options.get("alibi_slopes")
    return (
        query, key, value, mask, None if slopes is None else slopes.to(device), None, None, options.get("seed"), None,
        None, options.get("softcap", 0.0), options.get("dropout", 0.0), None, options.get("causal", False),
        options.get("window"), "bshd", "ieee", False, backend, options.get("return_lse", False), True,
    )  # fmt: skip


def tolerance(call: tuple[Any, ...]) -> dict[str, Any]:
    """Fused kernels add up in any order on a GPU."""
    return {} if call[0].dtype is torch.float32 else {"rtol": 4e-3, "atol": 4e-3}


def inference_is_a_proper_operator(backend: str, case: str, device: torch.device) -> None:
    call = arguments(case, backend, device)
    torch.library.opcheck(ops.attention.default, call, **tolerance(call))


def training_is_a_proper_operator(backend: str, case: str, device: torch.device) -> None:
    call = arguments(case, backend, device, learn=True)
    bias_grad = CASES[case].get("learns", False)
    torch.library.opcheck(ops.attention_forward.default, (*call, True, bias_grad), **tolerance(call))
    with torch.no_grad():
        out, lse, plan = ops.attention_forward(*call, True, bias_grad)
        needs = [True, True, True, bias_grad]
        # a sum's gradient: stride 0 in every dimension
        grad_out = torch.ones((), dtype=out.dtype, device=device).expand_as(out)
        again = (grad_out, out, lse, plan, needs, *call, True, bias_grad)
        torch.library.opcheck(ops.attention_backward.default, again, **tolerance(call))


def compiled(function: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=backend, **options)
    return found


def first(found: Any) -> torch.Tensor:
    out = found[0] if isinstance(found, tuple) else found
    assert isinstance(out, torch.Tensor)
    return out


def gradients(function: Callable[..., Any], *given: torch.Tensor) -> list[torch.Tensor]:
    """Return the result and the gradients of a call, from leaves that hold what `given` holds."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in given]
    out = first(function(*leaves))
    learns = [leaf for leaf in leaves if leaf.requires_grad]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device, out.dtype)
    out.backward(weights)
    return [out.detach(), *(leaf.grad for leaf in learns if leaf.grad is not None)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
