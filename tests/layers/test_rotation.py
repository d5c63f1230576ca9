"""Rotary positions and shared parts of keys by kernels, against the same in torch's operators.

Without a GPU the kernels run in Triton's interpreter, which cuts what it rounds to bfloat16.
"""

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from tilewise import FastMultiHeadLatentAttention
from tilewise.layers import rope_kernel, rotation
from tilewise.layers.base import FastAttention
from tilewise.layers.rotation import joined, turned

from .forms import layer_of, rows
from .graphs import assert_same, compiled, first, gradients

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ULP = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-12}
# heads, what stands before the turned part, half of what is turned
SIZES = [(4, 0, 8), (3, 0, 28), (7, 5, 1), (20, 24, 4), (1, 50, 8)]
Ran = list[bool]  # for each turn by a kernel whether it was in place


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    assert rotation._runs_on(torch.empty(0, device=DEVICE).device)
    found: Ran = []
    inner = rope_kernel.turn

    def turn(source: torch.Tensor, result: torch.Tensor, *given: Any, **options: Any) -> None:
        found.append(result is source)
        inner(source, result, *given, **options)

    monkeypatch.setattr(rope_kernel, "turn", turn)
    return found


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rotation._runs_on(torch.empty(0, device=DEVICE).device)

    def failing(*_: object, **__: object) -> None:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(rope_kernel, "turn", failing)
    monkeypatch.setattr(rope_kernel, "join", failing)


def in_torch(call: Callable[[], Any]) -> Any:
    """Return what a call gives with torch's operators instead of the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "_runs_on", lambda _: False)
        return call()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def table(batch: int, seq: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 3 * normal(batch, seq, half, seed=1)
    return angles.cos(), angles.sin()


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    within = min(ULP[dtype], ULP[torch.float32])  # of the products, which may cancel
    torch.testing.assert_close(found, wanted, rtol=ULP[dtype], atol=within)


@pytest.mark.parametrize("dtype", rotation.DTYPES)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("heads", "rest", "half"), SIZES)
@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.usefixtures("ran")
def test_heads_are_turned(dtype: torch.dtype, pairs: bool, heads: int, rest: int, half: int, entries: int) -> None:
    cos, sin = table(entries, 5, half)
    given = normal(2, 5, heads, rest + 2 * half, dtype=dtype)
    wanted = in_torch(lambda: turned(given, cos, sin, pairs=pairs))
    found = turned(given, cos, sin, pairs=pairs)
    assert found.dtype is dtype
    close(found, wanted, dtype)
    assert torch.equal(found[..., :rest], given[..., :rest])
    back = rotation._turned(found, cos, sin, rotation._How(True, False, pairs))
    within = max(ULP[dtype], ULP[torch.float32])  # tables are float32
    torch.testing.assert_close(back, given, rtol=2 * within, atol=8 * within)


def strided(layout: str, heads: torch.Tensor) -> torch.Tensor:
    """Return the same heads (batch, seq, heads, width) in other places of memory."""
    if layout == "heads first":
        return heads.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "part of a row":
        wide = torch.full((*heads.shape[:3], heads.shape[3] + 11), 7.0, dtype=heads.dtype, device=heads.device)
        wide[..., 3:-8] = heads
        return wide[..., 3:-8]
    if layout == "columns":
        return heads.transpose(2, 3).contiguous().transpose(2, 3)
    return heads[:, :1].expand(-1, heads.shape[1], -1, -1)


@pytest.mark.parametrize("layout", ["heads first", "part of a row", "columns", "expanded"])
@pytest.mark.parametrize("pairs", [False, True])
def test_heads_of_any_strides(layout: str, pairs: bool, ran: Ran) -> None:
    cos, sin = (part[:, 2:] for part in table(2, 7, 4))
    given = strided(layout, normal(2, 5, 6, 12))
    before = given.clone()
    close(turned(given, cos, sin, pairs=pairs), in_torch(lambda: turned(before, cos, sin, pairs=pairs)), torch.float32)
    assert torch.equal(given, before)
    assert ran == [False]


@pytest.mark.parametrize("pairs", [False, True])
def test_in_place_nothing_else_changes(pairs: bool, ran: Ran) -> None:
    cos, sin = table(1, 5, 4)
    given = strided("part of a row", normal(2, 5, 6, 12))
    wanted = in_torch(lambda: turned(given.clone(), cos, sin, pairs=pairs))
    assert turned(given, cos, sin, pairs=pairs, in_place=True) is given
    close(given, wanted, torch.float32)
    whole = given._base
    assert whole is not None
    assert bool((whole[..., :3] == 7).all() and (whole[..., -8:] == 7).all())
    assert ran == [True]


def test_offsets_beyond_32_bits(ran: Ran) -> None:
    step = 2**30
    memory = torch.empty(2 * step + 8, dtype=torch.float16, device=DEVICE)  # only what is touched takes memory of a CPU
    given = memory.as_strided((1, 1, 3, 8), (8, 8, step, 1))
    given.copy_(normal(1, 1, 3, 8))
    cos, sin = table(1, 1, 4)
    wanted = in_torch(lambda: turned(given, cos, sin, pairs=True))
    close(turned(given, cos, sin, pairs=True, in_place=True), wanted, torch.float16)
    assert torch.equal(joined(given, given[:, :, 0]), in_torch(lambda: joined(given, given[:, :, 0])))
    assert ran == [True]


@pytest.mark.parametrize("dtype", rotation.DTYPES)
@pytest.mark.parametrize(("heads", "own", "width"), [(4, 16, 8), (5, 3, 7), (20, 24, 4), (1, 1, 1)])
def test_keys_get_their_shared_part(dtype: torch.dtype, heads: int, own: int, width: int) -> None:
    parts = normal(2, 5, heads, own, dtype=dtype), normal(2, 5, own + width, dtype=dtype, seed=1)[..., own:]
    assert torch.equal(joined(*parts), in_torch(lambda: joined(*parts)))
    parts = strided("heads first", parts[0]), parts[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(joined(*parts), in_torch(lambda: joined(*parts)))


def test_they_compile_without_spills_and_with_wide_accesses(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("rope_offline.py"))],
        env={**environment, "PYTHONPATH": source, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * 3 * 5
    for name, stack, widths in found:
        assert stack == 0, name
        assert set(widths) <= {8, 16}, name


# gradients


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("rest", [0, 3])
def test_first_and_second_derivatives(pairs: bool, rest: int, ran: Ran) -> None:
    cos, sin = table(2, 2, 2)
    given = normal(2, 2, 2, rest + 4, dtype=torch.float64).requires_grad_()
    call = functools.partial(turned, cos=cos, sin=sin, pairs=pairs)
    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)
    assert ran
    assert not any(ran)


def test_derivatives_of_joined_keys() -> None:
    parts = normal(2, 2, 3, 4, dtype=torch.float64).requires_grad_(), normal(2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(joined, parts, fast_mode=True)
    both = parts[0], parts[1].requires_grad_()
    assert torch.autograd.gradcheck(joined, both, fast_mode=True)
    assert torch.autograd.gradgradcheck(joined, both, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("of_result", ["expanded", "heads first"])
def test_gradients_of_any_strides(dtype: torch.dtype, of_result: str) -> None:
    cos, sin = table(1, 5, 4)
    given = normal(2, 5, 6, 12, dtype=dtype), normal(2, 5, 4, dtype=dtype, seed=1)
    grad = torch.ones((), dtype=dtype, device=DEVICE).expand(2, 5, 6, 16)
    if of_result == "heads first":
        grad = strided(of_result, normal(2, 5, 6, 16, dtype=dtype, seed=2))

    def step() -> tuple[torch.Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in given]
        keys = joined(turned(leaves[0], cos, sin, pairs=True), leaves[1])
        return torch.autograd.grad(turned(keys, cos, sin, pairs=False), leaves, grad)

    for found, wanted in zip(step(), in_torch(step), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2 * ULP[dtype], atol=4 * ULP[dtype])


def test_tables_and_heads_that_do_not_learn_get_no_gradient() -> None:
    cos, sin = table(1, 5, 4)
    assert not turned(normal(2, 5, 6, 8), cos, sin, pairs=True).requires_grad
    leaf = normal(2, 5, 6, 8).requires_grad_()
    turned(leaf, cos, sin, pairs=True).sum().backward()
    assert cos.grad is None
    assert leaf.grad is not None
    learned = cos.clone().requires_grad_()
    turned(leaf, learned, sin, pairs=True).sum().backward()
    assert learned.grad is not None


# what the kernels would not be seen by


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by which torch itself makes some derivatives
def test_transforms_get_the_operators_of_torch() -> None:
    cos, sin = table(1, 5, 4)
    given, shared = normal(3, 2, 5, 6, 8), normal(3, 2, 5, 4)
    call = functools.partial(turned, cos=cos, sin=sin, pairs=True)
    wanted = in_torch(lambda: torch.stack([call(each) for each in given]))
    close(torch.func.vmap(call)(given), wanted, torch.float32)
    assert torch.func.vmap(joined)(given, shared).shape == (3, 2, 5, 6, 12)
    close(torch.func.jvp(call, (given[0],), (given[1],))[1], wanted[1], torch.float32)
    squares = torch.func.grad(lambda x: call(x).square().sum())(given[0])
    torch.testing.assert_close(squares, 2 * given[0], rtol=1e-5, atol=1e-5)
    leaf = given[0].clone().requires_grad_()  # of another gradient than the transform's
    scaled = torch.func.vmap(lambda factor: factor * call(leaf))(torch.ones(3, device=DEVICE))
    close(scaled[1], wanted[0], torch.float32)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(given[0], given[1]))).tangent
    assert tangent is not None
    close(tangent, wanted[1], torch.float32)
    traced = make_fx(call)(given[0])
    close(traced(given[1]), wanted[1], torch.float32)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.filterwarnings("ignore")  # of torch.jit, that it is old and that shapes become constants
def test_so_do_traces() -> None:
    cos, sin = table(1, 5, 4)
    given = normal(2, 2, 5, 6, 8)

    def call(heads: torch.Tensor) -> torch.Tensor:
        return turned(heads, cos, sin, pairs=True)

    traced = torch.jit.trace(call, given[0], check_trace=False)
    close(traced(given[1]), in_torch(lambda: call(given[1])), torch.float32)


def test_many_gradients_at_once(ran: Ran) -> None:
    cos, sin = table(1, 5, 4)
    leaf, many = normal(2, 5, 6, 8).requires_grad_(), normal(3, 2, 5, 6, 8, seed=1)
    out = turned(leaf, cos, sin, pairs=True)
    assert ran == [False]
    (found,) = torch.autograd.grad(out, leaf, many, is_grads_batched=True, retain_graph=True)
    for each, grad in zip(found, many, strict=True):
        close(each, torch.autograd.grad(out, leaf, grad, retain_graph=True)[0], torch.float32)


@pytest.fixture
def tried_anew() -> Iterator[None]:
    rotation._runs_on.cache_clear()
    yield
    rotation._runs_on.cache_clear()


@pytest.mark.usefixtures("tried_anew")
def test_where_the_kernel_fails_torch_runs_after_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    cos, sin = table(1, 5, 4)
    given = normal(2, 5, 6, 8)
    wanted = in_torch(lambda: turned(given, cos, sin, pairs=True))
    monkeypatch.setattr(rope_kernel, "turn", failing)
    with caplog.at_level(logging.WARNING, "tilewise"):
        for _ in range(3):
            assert torch.equal(turned(given, cos, sin, pairs=True), wanted)
    assert [record.getMessage().count("Failed to find C compiler") for record in caplog.records] == [1]


# layers

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
def test_the_latent_layer_is_the_same_by_either(case: str, learns: bool, ran: Ran) -> None:
    layer, x = latent(case)

    def step() -> list[torch.Tensor]:
        if not learns:
            with torch.inference_mode():
                return [first(layer(x))]
        out = first(layer(x))
        return [out, *torch.autograd.grad(out.square().sum(), tuple(layer.parameters()))]

    found = step()
    by_kernel = tuple(ran)
    assert_same(found, in_torch(step))
    assert (True in by_kernel) is (case != "none" and not learns)
    assert (False in by_kernel) is (case != "none")
    assert len(ran) == len(by_kernel)


@pytest.mark.parametrize("case", LATENT)
def test_the_latent_layer_decodes_the_same_by_either(case: str, ran: Ran) -> None:
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
    assert bool(ran) is (case != "none")


class Remembering(torch.nn.Module):
    """An adapter that keeps what it gives."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.given = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = self.inner(x)
        return self.given


@pytest.mark.parametrize("how", ["hook", "adapter", "replaced", "global hook"])
def test_queries_that_others_hold_stay_as_they_were(how: str, ran: Ran) -> None:
    layer, x = latent("paired")
    with torch.inference_mode():
        plain = first(layer(x))
        assert True in ran
        ran.clear()
        up: Any = layer.q_up_proj
        wanted = up(layer.q_latent_norm(layer.q_down_proj(x)))  # type: ignore[operator]
        held: list[torch.Tensor] = []
        adapter, removed = Remembering(up), None
        if how == "hook":
            removed = up.register_forward_hook(lambda _, __, out: held.append(out))
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
    assert ran
    assert True not in ran


def test_under_autocast(ran: Ran) -> None:
    layer, x = latent("paired")

    def step() -> list[torch.Tensor]:
        layer.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            out = first(layer(x))
        out.float().square().sum().backward()
        return [out.detach(), *(each.grad for each in layer.parameters() if each.grad is not None)]

    found = step()
    assert ran
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


# real sizes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 2048, 128, 192, 32), (1, 4096, 8, 128, 64), (2, 3000, 1, 576, 32)])
@pytest.mark.parametrize("pairs", [False, True])
def test_heads_of_real_sizes(dtype: torch.dtype, shape: tuple[int, int, int, int, int], pairs: bool) -> None:
    batch, seq, heads, width, half = shape
    cos, sin = table(1, seq, half)
    given = normal(batch, seq, heads, width, dtype=dtype)
    wanted = in_torch(lambda: turned(given, cos, sin, pairs=pairs))
    close(turned(given, cos, sin, pairs=pairs), wanted, dtype)
    for _ in range(20):  # threads that write what others have yet to read would show in some
        again = given.clone()
        close(turned(again, cos, sin, pairs=pairs, in_place=True), wanted, dtype)
    back = rotation._turned(wanted, cos, sin, rotation._How(True, False, pairs))
    torch.testing.assert_close(back, given, rtol=2 * ULP[dtype], atol=8 * ULP[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_latent_layer_of_real_sizes(dtype: torch.dtype, ran: Ran) -> None:
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
    assert True in ran
    assert False in ran
    for mine, wanted in zip(found, in_torch(step), strict=True):
        bound = 16 * torch.finfo(dtype).eps * float(wanted.abs().max())
        torch.testing.assert_close(mine, wanted, rtol=0, atol=bound)
