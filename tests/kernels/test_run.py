"""run(): gradients of backends that have a forward only, and what autograd sees of them."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tilewise.domain.config import Candidate, Config
from tilewise.domain.errors import ConfigError
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels import reference
from tilewise.kernels.backend import Gradients
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import random_call
from tilewise.kernels.run import Ran, backward, forward, run

from .cells import call_of, problem_of

TILED = Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=16, block_k=64, heads_per_chunk=1))


def training_call(cell: str = "causal, more queries", **changes: Any) -> Call:
    return call_of(problem_of(cell, pass_=Pass.TRAINING, **changes))


def leaves_of(call: Call, *needs: bool) -> list[torch.Tensor]:
    tensors = (call.query, call.key, call.value)
    return [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]


def grad_of(call: Call) -> torch.Tensor:
    shape = (*call.query.shape[:3], call.value.shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_the_gradients_that_are_needed(needs: tuple[bool, bool, bool]) -> None:
    call = training_call()
    leaves = leaves_of(call, *needs)
    out, lse = run(call.with_tensors(*leaves), TILED)
    assert out.requires_grad
    assert lse is not None
    assert not lse.requires_grad
    grad_out = grad_of(call)
    out.backward(grad_out)
    for leaf, need, expected in zip(leaves, needs, reference.gradients(call, grad_out), strict=True):
        assert (leaf.grad is not None) == need
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "plain", "cpu_tiled"])
def test_wholly_masked_rows_have_no_gradient(name: str) -> None:
    call = training_call()
    leaves = leaves_of(call, True, True, True)
    out, _ = run(call.with_tensors(*leaves), Candidate(name))
    out.backward(grad_of(call))
    masked = call.problem.q_len - call.problem.kv_len
    assert leaves[0].grad is not None
    assert bool((leaves[0].grad[:, :masked] == 0).all())
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves)


def test_one_tensor_as_query_key_and_value() -> None:
    call = training_call("causal")
    (leaf,) = leaves_of(call.with_tensors(call.query, call.query, call.query), True, True, True)[:1]
    out, _ = run(call.with_tensors(leaf, leaf, leaf), TILED)
    grad_out = grad_of(call)
    (found,) = torch.autograd.grad(out, leaf, grad_out)
    expected = sum(reference.gradients(call.with_tensors(leaf, leaf, leaf), grad_out))
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_backward_twice_gives_the_same() -> None:
    call = training_call()
    leaves = leaves_of(call, True, True, True)
    out, _ = run(call.with_tensors(*leaves), TILED)
    first = torch.autograd.grad(out, leaves, grad_of(call), retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad_of(call))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_second_derivative_is_an_error_and_not_a_wrong_number() -> None:
    call = training_call()
    leaves = leaves_of(call, True, True, True)
    out, _ = run(call.with_tensors(*leaves), TILED)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_graph_under_no_grad() -> None:
    call = training_call()
    with torch.no_grad():
        out, _ = run(call.with_tensors(*leaves_of(call, True, True, True)), TILED)
    assert not out.requires_grad


@pytest.mark.parametrize("name", ["plain", "cpu_tiled"])
def test_no_backend_gives_a_gradient_through_the_lse(name: str) -> None:
    call = training_call()
    _, lse = run(call.with_tensors(*leaves_of(call, True, True, True)), Candidate(name))
    assert lse is not None
    assert not lse.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    call = training_call()
    leaves, plain = leaves_of(call, True, True, True), leaves_of(call, True, True, True)

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        return run(call.with_tensors(*(2 * tensor for tensor in tensors)), TILED)[0]

    checkpoint(forward, *leaves, use_reentrant=reentrant).backward(grad_of(call))
    forward(*plain).backward(grad_of(call))
    for leaf, expected in zip(leaves, plain, strict=True):
        assert leaf.grad is not None
        assert expected.grad is not None
        assert torch.equal(leaf.grad, expected.grad)


def test_saved_tensors_are_all_that_is_kept() -> None:
    """Offloading and checkpointing replace what autograd saves: nothing else may hold the activations."""
    call = training_call("causal")
    leaves = leaves_of(call, True, True, True)
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        out, _ = run(call.with_tensors(*leaves), TILED)
    assert len(packed) == 3
    assert out.grad_fn is not None
    assert not [kept for kept in vars(out.grad_fn).values() if isinstance(kept, torch.Tensor | Call)]
    out.backward(grad_of(call))
    assert all(leaf.grad is not None for leaf in leaves)


def test_an_input_changed_before_backward_is_noticed() -> None:
    call = training_call("causal")
    leaves = [2 * leaf for leaf in leaves_of(call, True, True, True)]
    out, _ = run(call.with_tensors(*leaves), TILED)
    leaves[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_kernels_get_the_values_that_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the imaginary part of a conjugate as a view of what it is the negative of; kernels read memory."""
    call = training_call("causal")
    query, key, value, grad_out = (
        torch.complex(tensor, -tensor).conj().imag for tensor in (call.query, call.key, call.value, grad_of(call))
    )
    assert all(tensor.is_neg() for tensor in (query, key, value, grad_out))
    backend, seen = BACKENDS["cpu_tiled"], []
    computed = backend.forward

    def watched(call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen.extend([call.query, call.key, call.value])
        return computed(call, config)

    def gradients(call: Call, out: object, lse: object, grad_out: torch.Tensor, candidate: object) -> Gradients:  # noqa: ARG001
        seen.append(grad_out)
        return Gradients(call.query, call.key, call.value)

    monkeypatch.setattr(type(backend), "has_backward", True)
    monkeypatch.setattr(backend, "forward", watched)
    monkeypatch.setattr(backend, "backward", gradients)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out, _ = run(call.with_tensors(*leaves), TILED)
    torch.autograd.grad(out, leaves, grad_out)
    assert not any(tensor.is_neg() for tensor in seen)
    for tensor, expected in zip(seen, (call.query, call.key, call.value, grad_of(call)), strict=True):
        assert torch.equal(tensor, expected)


# without a graph

FUSED = ("causal", "full", "gqa")


@pytest.mark.parametrize("needs", [(True, True, True, False), (False, True, False, False)])
@pytest.mark.parametrize("name", ["sdpa", "sdpa_flash", "sdpa_math", "plain", "cpu_tiled"])
@pytest.mark.parametrize("cell", [*FUSED, "causal, more queries", "window"])
def test_forward_and_backward_without_a_graph(cell: str, name: str, needs: tuple[bool, ...]) -> None:
    call = training_call(cell)
    grad_out = grad_of(call)
    out, lse, ran = forward(call, Candidate(name))
    assert not out.requires_grad
    assert ran.saved == (name in ("sdpa", "sdpa_flash") and cell in FUSED)
    expected, expected_lse = reference.attention(call)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    if ran.saved:
        assert lse is not None
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-5)
    found = backward(call, ran, out, out if lse is None else lse, grad_out, needs)
    gradients = (found.query, found.key, found.value)
    for need, gradient, wanted in zip(needs, gradients, reference.gradients(call, grad_out), strict=False):
        if need:
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


def test_what_only_chooses_says_what_it_chose() -> None:
    *_, ran = forward(training_call("causal"), Candidate("sdpa"))
    assert ran == Ran(Candidate("sdpa_flash"), saved=True)
    *_, ran = forward(training_call("window"), Candidate("sdpa"))
    assert ran == Ran(Candidate("sdpa"), saved=False)
    with sdpa_kernel(SDPBackend.MATH):
        *_, ran = forward(training_call("causal"), Candidate("sdpa"))
    assert ran == Ran(Candidate("sdpa_math"), saved=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"])
@pytest.mark.parametrize("sizes", [{"head_dim": 64}, {"head_dim": 56, "q_len": 333}, {"head_dim": 128, "batch": 1}])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpas_fused_kernels_without_a_graph(causal: bool, sizes: dict[str, int], name: str) -> None:
    given: dict[str, Any] = {
        "batch": 2,
        "q_len": 500,
        "heads": 8,
        "kv_heads": 8 if name == "sdpa_efficient" else 2,
        **sizes,
    }
    problem = Problem(pass_=Pass.TRAINING, dtype=Dtype.FP16, causal=causal, **given)
    call = random_call(problem, torch.device("cuda"), seed=0)
    out, lse, ran = forward(call, Candidate(name))
    assert ran.saved
    assert lse is not None
    expected, expected_lse = reference.attention(call)
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=1e-3)
    grad_out = torch.randn_like(out)
    found = backward(call, ran, out, lse, grad_out, (True, True, True, False))
    gradients = (found.query, found.key, found.value)
    for gradient, wanted in zip(gradients, reference.gradients(call, grad_out), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=2e-2, atol=2e-2)


def test_an_unknown_backend() -> None:
    with pytest.raises(ConfigError, match="unknown backend"):
        run(call_of(problem_of("full")), Candidate("nope"))
