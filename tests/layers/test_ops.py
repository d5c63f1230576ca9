"""The operators behind torch.compile: what torch demands of them, and that a compiled call is the eager call."""

import functools
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tilewise import FastMultiHeadSelfAttention, decode
from tilewise.domain.config import Candidate
from tilewise.domain.errors import UnsupportedError
from tilewise.kernels import run
from tilewise.kernels.backends.flex import plain_path
from tilewise.kernels.backends.triton import Triton
from tilewise.kernels.call import Call
from tilewise.layers.attention import attention

from .conftest import Ran
from .graphs import (
    CASES,
    CPU,
    CUDA,
    arguments,
    assert_same,
    compiled,
    first,
    gradients,
    inductor,
    inference_is_a_proper_operator,
    ops,
    tensors,
    training_is_a_proper_operator,
)
from .test_attention import OPTIONS, answered, failing, name_of, problem_of, tiled

__all__ = ["failing"]  # a fixture

Configured = Callable[..., Path]
ON_CPU = [
    *((name, case) for name in ("auto", "plain") for case in CASES),
    *(("cpu_tiled", case) for case in ("plain", "causal", "window", "lse")),
]
INTERPRETED = ("lse", "mask with a gradient", "dropout")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def triton_here(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where `triton` runs: on the GPU, else in its interpreter, on CPU tensors that it says it does not support."""
    if torch.cuda.is_available():
        return CUDA
    monkeypatch.setattr(Triton, "supports", lambda *_: None)
    monkeypatch.setattr(Triton, "spaces", lambda *_: {})
    return CPU


@pytest.mark.parametrize(("backend", "case"), ON_CPU)
def test_what_torch_demands(backend: str, case: str) -> None:
    inference_is_a_proper_operator(backend, case, CPU)
    training_is_a_proper_operator(backend, case, CPU)


@pytest.mark.parametrize("case", INTERPRETED)
def test_what_torch_demands_with_triton(case: str, triton_here: torch.device) -> None:
    training_is_a_proper_operator("triton", case, triton_here)


# a compiled call is the eager call


@pytest.mark.parametrize("without_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_inference_equals_eager(options: dict[str, Any], without_grad: Callable[[], Any]) -> None:
    call: Callable[..., Any] = functools.partial(attention, **{**options, "return_lse": True})
    with without_grad():
        for found, expected in zip(compiled(call)(*tensors(learn=True)), call(*tensors()), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_training_equals_eager(options: dict[str, Any]) -> None:
    options = {**options}
    mask = options.pop("mask", None)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        return attention(query, key, value, mask=mask, **options)

    given = tensors() if mask is None else (*tensors(), mask)
    assert_same(gradients(compiled(call), *given), gradients(call, *given))


@pytest.mark.parametrize("backend", ["plain", "cpu_tiled", "sdpa"])
def test_bhsd_through_each_kind_of_backward(backend: str) -> None:
    def call(*given: torch.Tensor) -> Any:
        query, key, value = (tensor.transpose(1, 2) for tensor in given)
        return attention(query, key, value, layout="bhsd", causal=True, backend=backend)

    assert compiled(call)(*tensors()).shape == (2, 4, 24, 16)
    assert_same(gradients(compiled(call), *tensors()), gradients(call, *tensors()))


def test_through_tritons_own_backward(triton_here: torch.device) -> None:
    call = functools.partial(attention, causal=True, backend="triton", strict=True)
    small = tensors(triton_here, seq=9)
    expected = gradients(functools.partial(attention, causal=True, backend="plain"), *small)
    assert_same(gradients(compiled(call), *small), expected, 1e-5 if triton_here == CPU else 1e-2)


def test_only_the_gradients_that_are_needed() -> None:
    query, key, value = tensors()
    key.requires_grad_()
    attended = compiled(functools.partial(attention, causal=True))(query, key, value)
    attended.square().sum().backward()
    assert query.grad is None
    assert value.grad is None
    (expected,) = torch.autograd.grad(first(attention(query, key, value, causal=True)).square().sum(), key)
    assert key.grad is not None
    torch.testing.assert_close(key.grad, expected)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number() -> None:
    call = arguments("plain", "sdpa", learn=True)
    out, *_ = ops.attention_forward(*call, True, False)
    (gradient,) = torch.autograd.grad(out.square().sum(), call[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_layer() -> None:
    layer = FastMultiHeadSelfAttention(32, 4, causal=True)
    x = torch.randn(2, 9, 32)
    parameters = tuple(layer.parameters())

    def losses(step: Callable[..., Any]) -> list[torch.Tensor]:
        out = step(x)
        return [out, *torch.autograd.grad(out.square().sum(), parameters)]

    assert_same(losses(compiled(layer)), losses(layer))


def test_autocast_does_not_change_what_is_computed() -> None:
    call = functools.partial(attention, causal=True, backend="plain")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(compiled(call), *tensors())
    assert found[0].dtype is torch.float32
    assert_same(found, gradients(call, *tensors()))


@inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++")
@pytest.mark.skipif(not plain_path(torch.__file__), reason="inductor cannot link from the folder that torch lies in")
def test_through_inductor() -> None:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return first(attention(2 * query, key, value.sin(), causal=True, backend="sdpa")).cos()

    assert_same(gradients(compiled(call, "inductor"), *tensors()), gradients(call, *tensors()))


def test_decode() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 4, 16, generator=generator)
    lengths = torch.tensor([0, 5, 48], dtype=torch.int32)
    keys, values = (torch.randn(3, 48, 2, 16, generator=generator) for _ in range(2))
    pages, page_values = (torch.randn(12, 16, 2, 16, generator=generator) for _ in range(2))
    table = torch.arange(9, dtype=torch.int32).view(3, 3)
    for return_lse in (False, True):
        contiguous = functools.partial(decode, window=(7, 0), return_lse=return_lse)
        torch.testing.assert_close(
            compiled(contiguous)(query, keys, values, lengths=lengths), contiguous(query, keys, values, lengths=lengths)
        )
        paged = functools.partial(decode, lengths=lengths, block_table=table, softcap=5.0, return_lse=return_lse)
        torch.testing.assert_close(compiled(paged)(query, pages, page_values), paged(query, pages, page_values))
    call = (query, pages, page_values, lengths, table, None, 0.0, None, True, "auto", False)
    torch.library.opcheck(ops.decode.default, call)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's own, of what it loads
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    layer = FastMultiHeadSelfAttention(32, 4, causal=True)
    lengths = ({1: torch.export.Dim("seq", min=2, max=512)},)
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(2, 9, 32),), dynamic_shapes=lengths, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    x = torch.randn(2, 13, 32)
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))
    assert ops.attention.default in [node.target for node in exported.graph.nodes]


# one graph, and the look-up inside


class Calls(TorchDispatchMode):
    """What reached the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_only_graphs_hold_operators() -> None:
    targets: list[str] = []

    def collect(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    assert first(compiled(attention, collect)(*tensors(learn=True))).requires_grad
    assert "tilewise.attention_forward" in targets
    with Calls() as calls:
        gradients(attention, *tensors())
    assert calls.names
    assert not [name for name in calls.names if "tilewise" in name]


@pytest.mark.parametrize("backend", ["plain", "sdpa", "cpu_tiled"])
def test_behind_a_dispatch_mode(backend: str) -> None:
    """Autograd is out of reach in there, and a backward that computes the forward again must still find it."""
    call = arguments("causal", backend, learn=True)
    expected = gradients(functools.partial(attention, causal=True), *tensors())
    with Calls() as calls:
        out, *_ = ops.attention_forward(*call, True, False)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad(out, call[:3], weights)
    assert "tilewise.attention_backward.default" in calls.names
    assert_same([out, *found], expected)


@pytest.mark.parametrize("learn", [False, True])
def test_one_graph_for_all_lengths(learn: bool, ran: Ran, configured: Configured) -> None:
    """And each length gets its own answer."""
    pass_ = "training" if learn else "inference"
    answers = [answered(problem_of(tensors(seq=seq), pass_=pass_, causal=True), tiled(rows, 64, 2))
               for rows, seq in ((16, 33), (32, 48), (64, 65))]  # fmt: skip
    configured(*answers)
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(functools.partial(attention, causal=True), counter)
    for seq in (33, 48, 65):
        given = tensors(seq=seq, learn=learn)
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, 1)
        step(*given)
    assert counter.frame_count == 1
    assert ran == [answer.plan.forward for answer in answers]


def test_one_graph_for_a_growing_cache() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(decode, counter)
    query = torch.randn(3, 1, 4, 16)
    for held in (32, 48, 65):
        keys, values = torch.randn(3, held, 2, 16), torch.randn(3, held, 2, 16)
        lengths = torch.tensor([held, 1, 0], dtype=torch.int32)
        for cache in (keys, values):
            torch._dynamo.mark_dynamic(cache, 1)
        torch.testing.assert_close(
            step(query, keys, values, lengths=lengths), decode(query, keys, values, lengths=lengths)
        )
    assert counter.frame_count == 1


def test_dynamic_shapes_compile_no_more_after_the_first_length() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(functools.partial(attention, return_lse=True), counter, dynamic=True)
    counts = []
    for seq in (33, 48, 65, 64):
        given = tensors(seq=seq, learn=True)
        torch.testing.assert_close(step(*given), attention(*given, return_lse=True))
        counts.append(counter.frame_count)
    assert len({*counts}) == 1


def test_refresh_needs_no_new_graph(ran: Ran, configured: Configured) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(attention, counter)
    step(*tensors())
    configured(answered(problem_of(tensors()), tiled()))
    step(*tensors())
    assert ran == [Candidate("sdpa"), tiled()]
    assert counter.frame_count == 1


def test_the_backward_is_that_of_what_ran(configured: Configured) -> None:
    """Answers change between forward and backward: dropout's mask must still be the forward's."""
    call = functools.partial(attention, dropout=0.5, seed=3)
    problem = problem_of(tensors(), pass_="training", dropout=True)
    expected = gradients(functools.partial(call, backend="plain"), *tensors())
    configured(answered(problem, Candidate("plain")))
    step = compiled(call)

    def refreshed(*given: torch.Tensor) -> torch.Tensor:
        out = first(step(*given))
        configured(answered(problem, Candidate("sdpa_math")), name="other.json")
        return out

    assert_same(gradients(refreshed, *tensors()), expected)
    other = gradients(step, *tensors())
    assert not torch.allclose(other[1], expected[1])


@pytest.mark.parametrize("learn", [False, True])
def test_a_plan_that_fails_is_demoted(
    learn: bool, failing: list[int], configured: Configured, caplog: pytest.LogCaptureFixture
) -> None:
    configured(answered(problem_of(tensors(), pass_="training" if learn else "inference"), tiled()))
    step = compiled(attention)
    for _ in range(2):
        torch.testing.assert_close(step(*tensors(learn=learn)), attention(*tensors(learn=learn)))
    assert len(failing) == 1
    (message,) = [record.getMessage() for record in caplog.records if record.name == "tilewise"]
    assert "it does not launch" in message
    with pytest.raises(RuntimeError, match="it does not launch"):
        compiled(functools.partial(attention, backend="cpu_tiled", strict=True))(*tensors(learn=learn))


def test_what_is_refused() -> None:
    query, key, value = tensors()
    with pytest.raises(RuntimeError, match=r"expected one batch size, got query \(2, 24, 4, 16\)"):
        compiled(attention)(query, key[:1], value[:1])
    with pytest.raises(RuntimeError, match="dropout: expected a share of at least 0 and below 1, got 2"):
        compiled(functools.partial(attention, dropout=2.0))(query, key, value)
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        compiled(functools.partial(attention, backend="triton_decode", strict=True))(query, key, value)


# dropout and checkpointing


def seeded(function: Callable[..., Any]) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return gradients(function, *tensors())


def dropped(*given: torch.Tensor) -> Any:
    return attention(2 * given[0], *given[1:], dropout=0.5, causal=True)


def test_dropout_is_eagers_for_the_same_seed() -> None:
    step = compiled(dropped)
    expected = seeded(dropped)
    assert_same(seeded(step), expected)
    assert not torch.equal(gradients(step, *tensors())[0], expected[0])


@pytest.mark.parametrize("options", [{}, {"window": (5, 0)}, {"mask": CASES["mask with a gradient"]["mask"]}])
@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_dropout_with_a_seed(backend: str, options: dict[str, Any]) -> None:
    call: Callable[..., Any] = functools.partial(attention, dropout=0.5, seed=3, backend=backend, **options)
    step = compiled(call)
    assert_same(gradients(step, *tensors()), gradients(call, *tensors()))
    torch.testing.assert_close(step(*tensors()), call(*tensors()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_compiled_call(reentrant: bool) -> None:
    step = compiled(dropped)
    assert_same(seeded(lambda *given: checkpoint(step, *given, use_reentrant=reentrant)), seeded(step))


def save_attention(_: object, op: object, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    keep = op == ops.attention_forward.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_in_a_compiled_call(selective: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, save_attention)
    options: dict[str, Any] = {"context_fn": contexts} if selective else {}
    forwards: list[Candidate] = []
    forward = run.forward

    def counted(call: Call, candidate: Candidate) -> Any:
        forwards.append(candidate)
        return forward(call, candidate)

    monkeypatch.setattr(run, "forward", counted)
    expected = seeded(compiled(dropped))
    assert len(forwards) == 1
    forwards.clear()
    assert_same(seeded(compiled(lambda *given: checkpoint(dropped, *given, use_reentrant=False, **options))), expected)
    assert len(forwards) == (1 if selective else 2)
