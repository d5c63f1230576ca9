"""Layers by the kernels of rotary positions against the same layers by torch's operators."""

import contextlib
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tilewise import FastMultiHeadLatentAttention
from tilewise.layers.base import FastAttention

from .forms import layer_of, rows
from .graphs import assert_same, compiled, first, gradients
from .turning import DEVICE, Turns, in_torch, normal

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LATENT: dict[str, dict[str, Any]] = {
    "paired": {},
    "halves": {"rope_interleave": False},
    "direct": {"q_rank": None},
    "late": {"rope_scaling": DYNAMIC, "max_seq_len": 4},
    "none": {"position_method": "none"},
}


def latent(case: str) -> tuple[FastAttention, torch.Tensor]:
    return layer_of("decoupled", causal=True, kernel_type="pytorch", **LATENT[case]).to(DEVICE), rows(9).to(DEVICE)


@pytest.mark.parametrize("case", LATENT)
@pytest.mark.parametrize("learns", [False, True])
def test_the_latent_layer_is_the_same_by_either(case: str, learns: bool, turns: Turns) -> None:
    layer, x = latent(case)

    def step() -> list[torch.Tensor]:
        if not learns:
            with torch.inference_mode():
                return [first(layer(x))]
        out = first(layer(x))
        return [out, *torch.autograd.grad(out.square().sum(), tuple(layer.parameters()))]

    found = step()
    by_kernel = tuple(turns)
    assert_same(found, in_torch(step))
    assert (True in by_kernel) is (case != "none" and not learns)
    assert (False in by_kernel) is (case != "none")
    assert len(turns) == len(by_kernel)


@pytest.mark.parametrize("case", LATENT)
def test_the_latent_layer_decodes_the_same_by_either(case: str, turns: Turns) -> None:
    layer, x = latent(case)

    def step() -> list[torch.Tensor]:
        with torch.no_grad():
            out, cache = layer(x[:, :6], use_cache=True)
            parts, held = [out], cache.tensors[0].clone()
            for end in (7, 9):
                out, cache = layer(x[:, end - 1 : end], past_key_value=cache, use_cache=True)
                parts.append(out)
        assert torch.equal(cache.tensors[0][:, :6], held)
        return [*parts, *cache.tensors]

    assert_same(step(), in_torch(step))
    assert bool(turns) is (case != "none")


class Remembering(torch.nn.Module):
    """An adapter that keeps what it gives."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.given = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = self.inner(x)
        return self.given


@pytest.mark.parametrize("how", ["hook", "hook for once", "adapter", "replaced", "replaced class", "global hook"])
def test_queries_that_others_hold_stay_as_they_were(how: str, turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = latent("paired")
    with torch.inference_mode():
        plain = first(layer(x))
        assert True in turns
        turns.clear()
        up: Any = layer.q_up_proj
        wanted = up(layer.q_latent_norm(layer.q_down_proj(x)))  # type: ignore[operator]
        held: list[torch.Tensor] = []
        adapter, removed = Remembering(up), None
        if how == "hook":
            removed = up.register_forward_hook(lambda _, __, out: held.append(out))
        elif how == "hook for once":
            handles: list[Any] = []

            def once(_: object, __: object, out: torch.Tensor) -> None:
                held.append(out)
                handles[0].remove()

            handles.append(up.register_forward_hook(once))
        elif how == "replaced class":
            of_class = torch.nn.Linear.forward

            def recording(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
                out = of_class(module, x)
                if module is up:
                    held.append(out)
                return out

            monkeypatch.setattr(torch.nn.Linear, "forward", recording)
        elif how == "global hook":
            removed = torch.nn.modules.module.register_module_forward_hook(
                lambda module, __, out: held.append(out) if module is up else None
            )
        elif how == "replaced":
            inner = up.forward
            up.forward = lambda x: held.append(inner(x)) or held[0]  # type: ignore[func-returns-value]
        else:
            layer.q_up_proj = adapter
        out = first(layer(x))
        if removed is not None:
            removed.remove()
        (kept,) = held or [adapter.given]
    assert torch.equal(kept, wanted)
    torch.testing.assert_close(out, plain)
    assert turns
    assert True not in turns


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_checkpoint_with_a_mode_around_one_half_of_it(where: str, turns: Turns) -> None:
    layer, x = latent("paired")

    def gradients_of(out: torch.Tensor) -> list[torch.Tensor]:
        return [*torch.autograd.grad(out.square().sum(), tuple(layer.parameters()))]

    def mode(half: str) -> contextlib.AbstractContextManager[object]:
        return FlopCounterMode(display=False) if half == where else contextlib.nullcontext()

    wanted = gradients_of(first(layer(x)))
    assert turns
    with mode("forward"):
        out = checkpoint(lambda given: first(layer(given)), x, use_reentrant=False)
    with mode("backward"):
        found = gradients_of(out)
    assert_same(found, wanted)


def test_under_autocast(turns: Turns) -> None:
    layer, x = latent("paired")

    def step() -> list[torch.Tensor]:
        layer.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            out = first(layer(x))
        out.float().square().sum().backward()
        return [out.detach(), *(each.grad for each in layer.parameters() if each.grad is not None)]

    found = step()
    assert turns
    for mine, wanted in zip(found, in_torch(step), strict=True):
        bound = 4e-3 * float(wanted.abs().max())
        torch.testing.assert_close(mine, wanted, rtol=0, atol=bound)


@pytest.mark.usefixtures("no_kernel", "fresh_dynamo")
@pytest.mark.parametrize("form", ["grouped", "decoupled"])
def test_a_compiled_layer_is_the_layer(form: str) -> None:
    layer = layer_of(form, causal=True, position_method="rope").to(DEVICE)
    x = rows(9).to(DEVICE)
    wanted = in_torch(lambda: gradients(layer, x))
    assert_same(gradients(compiled(layer), x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer)(x), wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_latent_layer_of_real_sizes(dtype: torch.dtype, turns: Turns) -> None:
    torch.manual_seed(0)
    placed: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    layer = FastMultiHeadLatentAttention(1024, 128, q_rank=1536, kv_rank=512, causal=True, bias=False, **placed)
    x, grad = normal(2, 1000, 1024, dtype=dtype), normal(2, 1000, 1024, dtype=dtype, seed=1) / 16

    def step() -> list[torch.Tensor]:
        with torch.inference_mode():
            inferred, cache = layer(x, use_cache=True)
            decoded = first(layer(x[:, :1], past_key_value=cache))
        out = first(layer(x))
        return [inferred, decoded, out.detach(), *torch.autograd.grad(out, tuple(layer.parameters()), grad)]

    found = step()
    assert True in turns
    assert False in turns
    for mine, wanted in zip(found, in_torch(step), strict=True):
        bound = 16 * torch.finfo(dtype).eps * float(wanted.abs().max())
        torch.testing.assert_close(mine, wanted, rtol=0, atol=bound)
