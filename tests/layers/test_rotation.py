"""The kernels of rotary positions and of keys' shared parts, against the same in torch's operators."""

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from tilewise.layers import rope_kernel, rotation
from tilewise.layers.rotation import joined, turned

from .turning import DEVICE, ULP, Turns, close, in_torch, normal, table

# heads, what stands before the turned part, half of what is turned
SIZES = [(4, 0, 8), (3, 0, 28), (7, 5, 1), (20, 24, 4), (1, 50, 8)]


@pytest.mark.parametrize("dtype", rotation.DTYPES)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("heads", "rest", "half"), SIZES)
@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.usefixtures("turns")
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
def test_heads_of_any_strides(layout: str, pairs: bool, turns: Turns) -> None:
    cos, sin = (part[:, 2:] for part in table(2, 7, 4))
    given = strided(layout, normal(2, 5, 6, 12))
    before = given.clone()
    close(turned(given, cos, sin, pairs=pairs), in_torch(lambda: turned(before, cos, sin, pairs=pairs)), torch.float32)
    assert torch.equal(given, before)
    assert turns == [False]


@pytest.mark.parametrize("pairs", [False, True])
def test_in_place_nothing_else_changes(pairs: bool, turns: Turns) -> None:
    cos, sin = table(1, 5, 4)
    given = strided("part of a row", normal(2, 5, 6, 12))
    wanted = in_torch(lambda: turned(given.clone(), cos, sin, pairs=pairs))
    assert turned(given, cos, sin, pairs=pairs, in_place=True) is given
    close(given, wanted, torch.float32)
    whole = given._base
    assert whole is not None
    assert bool((whole[..., :3] == 7).all() and (whole[..., -8:] == 7).all())
    assert turns == [True]


def test_offsets_beyond_32_bits(turns: Turns) -> None:
    step = 2**30
    memory = torch.empty(2 * step + 8, dtype=torch.float16, device=DEVICE)  # only what is touched takes memory of a CPU
    given = memory.as_strided((1, 1, 3, 8), (8, 8, step, 1))
    given.copy_(normal(1, 1, 3, 8))
    cos, sin = table(1, 1, 4)
    wanted = in_torch(lambda: turned(given, cos, sin, pairs=True))
    close(turned(given, cos, sin, pairs=True, in_place=True), wanted, torch.float16)
    assert torch.equal(joined(given, given[:, :, 0]), in_torch(lambda: joined(given, given[:, :, 0])))
    assert turns == [True]


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
def test_first_and_second_derivatives(pairs: bool, rest: int, turns: Turns) -> None:
    cos, sin = table(2, 2, 2)
    given = normal(2, 2, 2, rest + 4, dtype=torch.float64).requires_grad_()
    call = functools.partial(turned, cos=cos, sin=sin, pairs=pairs)
    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)
    assert turns
    assert not any(turns)


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


def test_many_gradients_at_once(turns: Turns) -> None:
    cos, sin = table(1, 5, 4)
    leaf, many = normal(2, 5, 6, 8).requires_grad_(), normal(3, 2, 5, 6, 8, seed=1)
    out = turned(leaf, cos, sin, pairs=True)
    assert turns == [False]
    (found,) = torch.autograd.grad(out, leaf, many, is_grads_batched=True, retain_graph=True)
    for each, grad in zip(found, many, strict=True):
        close(each, torch.autograd.grad(out, leaf, grad, retain_graph=True)[0], torch.float32)


@pytest.fixture
def tried_anew() -> Iterator[None]:
    rotation._known.clear()
    yield
    rotation._known.clear()


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


@pytest.mark.usefixtures("tried_anew")
def test_a_trial_without_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch, turns: Turns) -> None:
    cos, sin = table(1, 5, 4)
    heads = normal(2, 5, 6, 8)

    def without_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("none is free")

    with monkeypatch.context() as patch:
        rotation._known.clear()
        patch.setattr(rope_kernel, "turn", without_memory)
        first = turned(heads, cos, sin, pairs=True)
    assert turns == []
    close(turned(heads, cos, sin, pairs=True), first, torch.float32)
    assert turns == [False, False], "the trial, and the call"


@pytest.mark.parametrize("kind", ["negatives", "zeros"])
def test_views_that_stand_for_other_elements(kind: str) -> None:
    cos, sin = table(1, 5, 4)
    heads = normal(2, 5, 6, 8)
    if kind == "negatives":
        view, same = torch._neg_view(heads), -heads
    else:
        view, same = torch._efficientzerotensor(heads.shape, device=DEVICE), torch.zeros_like(heads)
    assert torch.equal(turned(view, cos, sin, pairs=True), turned(same, cos, sin, pairs=True))
    assert torch.equal(joined(view, heads[:, :, 0]), joined(same, heads[:, :, 0]))
