"""The operators on a GPU: beside Triton and SDPA's fused kernels, and in CUDA graphs."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tilewise import decode
from tilewise.domain.config import Candidate
from tilewise.kernels import run
from tilewise.kernels.call import Call
from tilewise.layers.attention import attention

from .graphs import (
    CASES,
    CUDA,
    assert_same,
    compiled,
    first,
    gradients,
    inductor,
    inference_is_a_proper_operator,
    training_is_a_proper_operator,
)
from .test_attention import QKV

ON_GPU = [
    *(("triton", case) for case in CASES),
    *(("auto", case) for case in ("plain", "lse", "mask with a gradient", "dropout")),
    *((name, "causal") for name in ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient")),
]
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo")]


@pytest.mark.parametrize(("backend", "case"), ON_GPU)
def test_what_torch_demands_on_a_gpu(backend: str, case: str) -> None:
    inference_is_a_proper_operator(backend, case, CUDA)
    training_is_a_proper_operator(backend, case, CUDA)


def half(*, learn: bool = False, heads: tuple[int, int] = (8, 2)) -> QKV:
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(2, 500, n, 64, generator=generator, device=CUDA, dtype=torch.float16).requires_grad_(learn)
        for n in (heads[0], heads[1], heads[1])
    )
    return query, key, value


@inductor
@pytest.mark.parametrize("name", ["triton", "auto", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math", "flex"])
def test_training_equals_eager_on_a_gpu(name: str) -> None:
    given = half(heads=(4, 4) if name == "sdpa_efficient" else (8, 2))
    call = functools.partial(attention, causal=True, backend=name, strict=True)
    found, expected = gradients(compiled(call, "inductor"), *given), gradients(call, *given)
    assert_same(found, expected, 4e-3)


def test_a_fused_kernel_of_sdpa_is_not_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own choice has a kernel with a backward here: nothing is computed again."""

    def again(*_: object) -> Any:
        raise AssertionError("the backward computed the forward again")

    monkeypatch.setattr(run, "_recomputed", again)
    for name in ("auto", "sdpa_flash", "sdpa_cudnn"):
        call = functools.partial(attention, causal=True, backend=name)
        assert_same(gradients(compiled(call), *half()), gradients(call, *half()), 4e-3)


@pytest.mark.parametrize("name", ["triton", "auto"])
def test_dropout_and_checkpointing_on_a_gpu(name: str) -> None:
    def call(*given: torch.Tensor) -> Any:
        return attention(2 * given[0], *given[1:], dropout=0.5, backend=name)

    def seeded_here(function: Callable[..., Any]) -> list[torch.Tensor]:
        torch.manual_seed(5)
        return gradients(function, *half())

    expected = seeded_here(call)
    assert_same(seeded_here(compiled(call)), expected, 4e-3)
    inside = compiled(lambda *given: checkpoint(call, *given, use_reentrant=False))
    assert_same(seeded_here(inside), expected, 4e-3)


@inductor
@pytest.mark.parametrize("name", ["triton", "auto"])
def test_cuda_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured inference replays on new inputs; training runs outside of captured graphs."""
    ran: list[Candidate] = []
    inner = run.run

    def counted(call: Call, candidate: Candidate) -> Any:
        ran.append(candidate)
        return inner(call, candidate)

    monkeypatch.setattr(run, "run", counted)
    call = functools.partial(attention, causal=True, backend=name)
    step = compiled(call, "inductor", mode="reduce-overhead")
    query, key, value = half()
    for factor in (1.0, 0.5, 2.0, -1.0, 3.0, 4.0):
        torch.compiler.cudagraph_mark_step_begin()
        found = first(step(factor * query, key, value)).clone()
        torch.testing.assert_close(found, first(call(factor * query, key, value)), rtol=4e-3, atol=4e-3)
    assert 0 < len(ran) < 6
    trained = compiled(lambda *given: first(call(2 * given[0], *given[1:])).cos(), "inductor", mode="reduce-overhead")
    expected = gradients(lambda *given: first(call(2 * given[0], *given[1:])).cos(), *half())
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(gradients(trained, *half()), expected, 4e-3)


@inductor
def test_decode_in_a_cuda_graph() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    query, keys, values = (
        torch.randn(3, seq, heads, 64, generator=generator, device=CUDA, dtype=torch.float16)
        for seq, heads in ((1, 8), (256, 2), (256, 2))
    )
    call: Callable[..., Any] = functools.partial(decode, backend="triton_decode", strict=True)
    step = compiled(call, "inductor", mode="reduce-overhead")
    for given in ((1, 100, 256), (2, 101, 256), (3, 102, 0), (4, 103, 7)):
        lengths = torch.tensor(given, dtype=torch.int32, device=CUDA)
        torch.compiler.cudagraph_mark_step_begin()
        found = step(query, keys, values, lengths=lengths).clone()
        torch.testing.assert_close(found, call(query, keys, values, lengths=lengths))
