"""FlexAttention: compiled for real on this CPU at a few small sizes, its programs and block masks, and a GPU's."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import FailOnRecompileLimitHit

from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import DeviceKind
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Dtype, Layout, Pass, Precision, Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels import device as devices
from tilewise.kernels import reference
from tilewise.kernels.backends import BACKENDS, flex
from tilewise.kernels.backends.flex import KERNEL, Flex, block_mask
from tilewise.kernels.call import allowed
from tilewise.kernels.inputs import random_call
from tilewise.kernels.run import run
from tilewise.tuner.correctness import Checker
from tilewise.tuner.trying import classify

from .cells import CELLS, CPU, PLAIN_FILE, assert_right, call_of, problem_of, this_cpu
from .test_backends import H200
from .test_packed import CELLS as PACKED
from .test_packed import problem_of as packed_problem

OWN = Config.of(KERNEL, block_m=0, block_n=0, num_warps=0, num_stages=0, tma=False)


# compiled by inductor on this machine: some seconds each


def refused_here(problem: Problem) -> bool:
    """Whether this environment's own folder is one that inductor cannot link from; any other refusal is a failure."""
    reason = BACKENDS["flex_cpu"].supports(problem, this_cpu())
    assert reason is None or "folder whose name" in reason, reason
    return reason is not None


@pytest.mark.parametrize(
    ("path", "plain"),
    [("/usr/lib/python3.11/torch/__init__.py", True), ("/home/näme/x", True), ("/a b/x", False), ("/a&b", False)],
)
def test_a_folder_that_inductor_cannot_link_from(path: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", path)
    reason = BACKENDS["flex_cpu"].supports(problem_of("causal"), this_cpu())
    assert (reason is None) == plain


def test_compiled_it_keeps_the_checkers_bounds() -> None:
    """Several blocks of queries and keys, heads of 20 elements, and more queries than keys."""
    problem = Problem(batch=1, heads=4, kv_heads=2, q_len=300, kv_len=260, head_dim=20, v_head_dim=12, causal=True)
    if refused_here(problem):
        return
    error = Checker(problem, CPU, seed=0).check(Candidate("flex_cpu"))
    assert error.worst <= 1, str(error)


@pytest.mark.parametrize(
    ("cell", "changes"),
    [
        ("everything", {}),
        ("bool, more queries, causal", {"dtype": Dtype.BF16}),
        ("bias.b1h1", {"q_len": 150, "window": (40, -1), "layout": Layout.BHSD}),
    ],
)
def test_compiled_it_is_right(cell: str, changes: dict[str, Any]) -> None:
    call = call_of(problem_of(cell, **changes))
    if refused_here(call.problem):
        return
    out, lse = run(call, Candidate("flex_cpu"))
    assert_right(call, out, lse)


# programs: what dynamo does, without inductor's compilation


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Run the graphs that dynamo makes as they are, and list them."""
    found: list[torch.fx.GraphModule] = []

    def compiler() -> Callable[..., Any]:
        def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
            found.append(graph)
            return graph

        return keep

    monkeypatch.setattr(flex, "compiler", compiler)
    flex.program.cache_clear()
    yield found
    flex.program.cache_clear()


@pytest.mark.parametrize("cell", CELLS)
def test_right_in_every_cell(cell: str, graphs: list[torch.fx.GraphModule]) -> None:
    call = call_of(problem_of(cell))
    refused_here(call.problem)  # dynamo alone runs anywhere; a refusal for another reason fails
    out, lse = run(call, Candidate("flex_cpu"))
    assert_right(call, out, lse)
    assert lse is None
    assert len(graphs) == 1


@pytest.mark.parametrize("cell", PACKED)
def test_packed_sequences_in_every_cell(cell: str, graphs: list[torch.fx.GraphModule]) -> None:
    call = random_call(packed_problem(cell), CPU, seed=0, empty=True)
    refused_here(call.problem)
    with torch.no_grad():
        out, lse = Flex().forward(call, OWN)
    assert lse is not None
    assert_right(call, out, lse)
    assert_right(call, *run(call, Candidate("flex_cpu")))
    assert len(graphs) == 2


@pytest.mark.parametrize("cell", ["causal, more queries", "alibi, more queries", "bool", "gqa"])
def test_the_lse(cell: str, graphs: list[torch.fx.GraphModule]) -> None:
    call = call_of(problem_of(cell))
    with torch.no_grad():
        out, lse = Flex().forward(call, OWN)
    assert lse is not None
    assert_right(call, out, lse)
    assert len(graphs) == 1


@pytest.mark.parametrize("shape", [(), (19,), (19, 19), (2, 1, 19), (1, 2, 19, 1)])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_masks_of_fewer_dimensions(shape: tuple[int, ...], kind: str, graphs: list[torch.fx.GraphModule]) -> None:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    call = replace(call_of(problem_of(f"{kind}.b1", causal=True)), mask=mask > -0.5 if kind == "bool" else mask)
    assert_right(call, *run(call, Candidate("flex_cpu")))
    assert len(graphs) == 1


def test_slopes_of_each_batch_entry(graphs: list[torch.fx.GraphModule]) -> None:
    call = call_of(problem_of("alibi"))
    call = replace(call, alibi_slopes=torch.tensor([[0.5, 0.25], [0.125, 1.0]]))
    assert_right(call, *run(call, Candidate("flex_cpu")))
    assert len(graphs) == 1


def test_minus_infinity_in_a_bias_masks(graphs: list[torch.fx.GraphModule]) -> None:
    call = call_of(problem_of("bias"))
    assert call.mask is not None
    mask = call.mask.clone()
    mask[0, :, 3] = -torch.inf
    call = replace(call, mask=mask)
    out, lse = run(call, Candidate("flex_cpu"))
    assert_right(call, out, lse)
    assert bool((out[0, 3] == 0).all())
    assert len(graphs) == 1


def test_inputs_that_require_grad_where_none_is_computed(graphs: list[torch.fx.GraphModule]) -> None:
    call = call_of(problem_of("causal"))
    leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
    out, _ = run(call.with_tensors(*leaves), Candidate("flex_cpu"))
    assert not out.requires_grad
    assert len(graphs) == 1


def test_many_problems_in_one_process_are_all_compiled(graphs: list[torch.fx.GraphModule]) -> None:
    """With room for a single compilation of each code object, as if the limit of 8 were reached at once."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for count, length in enumerate(range(20, 60, 4), 1):
            call = call_of(problem_of("alibi", q_len=length, kv_len=length + count % 3))
            assert_right(call, *run(call, Candidate("flex_cpu")))
            assert len(graphs) == count
        for length in range(20, 60, 8):  # back and forth: nothing is compiled again
            problem = problem_of("alibi", q_len=length, kv_len=length + ((length - 20) // 4 + 1) % 3)
            run(call_of(problem, seed=1), Candidate("flex_cpu"))
        assert len(graphs) == count


def test_what_dynamo_would_compile_anew_for_is_another_program(graphs: list[torch.fx.GraphModule]) -> None:
    call = call_of(problem_of("softcap"))
    strided = call.key.transpose(1, 2).contiguous().transpose(1, 2)
    variants = [call, replace(call, scale=0.3), replace(call, softcap=20.0), replace(call, key=strided)]
    with torch._dynamo.config.patch(recompile_limit=1):
        for variant in variants:
            assert_right(variant, *run(variant, Candidate("flex_cpu")))
        with torch.inference_mode():
            assert_right(call, *run(call, Candidate("flex_cpu")))
    assert len(graphs) == 5


def test_a_reached_limit_is_an_error(graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """If programs shared their code object, dynamo would say so instead of running plain torch."""
    monkeypatch.setattr(flex, "_unshared", lambda function: function)
    with torch._dynamo.config.patch(recompile_limit=1):
        run(call_of(problem_of("causal", q_len=30)), Candidate("flex_cpu"))
        with pytest.raises(FailOnRecompileLimitHit):
            run(call_of(problem_of("causal", q_len=34)), Candidate("flex_cpu"))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_ran_without_being_compiled_is_an_error(graphs: list[torch.fx.GraphModule]) -> None:
    with torch.compiler.set_stance("force_eager"), pytest.raises(UnsupportedError, match="without being compiled"):
        run(call_of(problem_of("causal")), Candidate("flex_cpu"))
    assert not graphs


# block masks


@given(
    q_len=st.integers(1, 700),
    kv_len=st.integers(1, 700),
    reach=st.tuples(st.integers(-1, 300), st.integers(-1, 300)),
    group=st.sampled_from([1, 3, 8]),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_blocks_are_those_that_the_window_leaves(q_len: int, kv_len: int, reach: tuple[int, int], group: int) -> None:
    blocks = block_mask(q_len, kv_len, reach, group, CPU)
    rows, columns = blocks.BLOCK_SIZE
    assert rows % flex.SPARSE_BLOCK == columns % flex.SPARSE_BLOCK == 0
    assert q_len >= flex.SHORT or rows >= min(group * q_len, flex.SPARSE_BLOCK)
    found = allowed(torch.arange(q_len), torch.arange(kv_len), kv_len - q_len, reach)
    pairs = torch.ones(q_len, kv_len, dtype=torch.bool) if found is None else found
    listed = _listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = _listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not listed & full
    for row in range(-(-q_len // rows)):
        for column in range(-(-kv_len // columns)):
            block = pairs[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            assert ((row, column) in listed | full) == bool(block.any()), (row, column)
            if (row, column) in full:
                assert block.shape == (rows, columns)
                assert bool(block.all())


def _listed(counts: torch.Tensor | None, indices: torch.Tensor | None) -> set[tuple[int, int]]:
    if counts is None or indices is None:
        return set()
    return {
        (row, int(column)) for row, count in enumerate(counts[0, 0].tolist()) for column in indices[0, 0, row, :count]
    }


# the space


@pytest.mark.parametrize("head_dim", [16, 56, 128, 256])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_space(head_dim: int, arch: str) -> None:
    card = replace(H200, arch=arch, shared_memory=232448 if arch == "sm_90" else 166912)
    problem = Problem(batch=1, heads=8, q_len=1024, head_dim=head_dim, causal=True)
    space = Flex().spaces(problem, card).get("forward")
    assert space is not None
    configs = list(space)
    assert len(configs) > 20
    assert configs.count(space.default) == 1
    assert {config.as_dict()["block_m"] for config in configs} <= {0, 32, 64, 128}
    assert flex._kernel_options(problem, space.default) == ()
    for config in configs:
        options = dict(flex._kernel_options(problem, config))
        assert config == space.default or {"fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_warps", "fwd_num_stages"} <= {
            *options
        }
    assert any(config.as_dict().get("tma") for config in configs) == (arch == "sm_90")


def test_a_size_beside_flex_s_own_choice_is_refused() -> None:
    space = Flex().spaces(Problem(batch=1, heads=8, q_len=1024, head_dim=64), H200).get("forward")
    assert space is not None
    half = Config.of(KERNEL, **{**OWN.as_dict(), "block_m": 64})
    assert space.why_not(half) == "0 stands for FlexAttention's own choice, of all parameters together"


def test_few_queries_choose_their_own_rows() -> None:
    space = Flex().spaces(Problem(batch=1, heads=8, q_len=1, kv_len=1024, head_dim=64), H200).get("forward")
    assert space is not None
    assert {config["block_m"] for config in space} == {0}
    assert len({config["block_n"] for config in space}) > 3


@pytest.mark.parametrize("precision", list(Precision))
def test_float32_products_are_as_precise_as_asked(precision: Precision) -> None:
    problem = Problem(batch=1, heads=8, q_len=1024, head_dim=64, dtype=Dtype.FP32, precision=precision)
    assert dict(flex._kernel_options(problem, None)) == {"FLOAT32_PRECISION": f"'{precision}'"}


# what it refuses


@pytest.mark.parametrize(
    ("changes", "card", "reason"),
    [
        ({}, {"arch": "sm_75"}, "needs sm_80 or newer, this is sm_75"),
        ({"head_dim": 8}, {}, "needs head_dim of at least 16"),
        ({"v_head_dim": 8}, {}, "needs head_dim of at least 16"),
        ({"deterministic": True}, {}, "no deterministic"),
        ({}, {"kind": DeviceKind.CPU, "arch": "x86_64.avx512"}, "needs a CUDA device"),
    ],
)
def test_the_reason_on_a_gpu(changes: dict[str, Any], card: dict[str, Any], reason: str) -> None:
    problem = Problem(**{"batch": 1, "heads": 2, "q_len": 64, "head_dim": 64, **changes})
    assert Flex().supports(problem, replace(H200, **card)) == reason


def test_the_reason_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", PLAIN_FILE)
    problem, backend = problem_of("causal"), BACKENDS["flex_cpu"]
    assert backend.supports(problem, H200) == "needs a CPU"
    assert backend.supports(problem, replace(this_cpu(), arch="aarch64.neon")) == (
        "needs a CPU with AVX2, this is aarch64.neon"
    )
    training = replace(problem, pass_=Pass.TRAINING)
    assert backend.supports(training, this_cpu()) == "computes no gradients on a CPU"
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = backend.supports(problem, this_cpu())
    assert reason is not None
    assert "no-such-compiler is not on the path" in reason


def test_errors_of_the_compiler_are_told_apart() -> None:
    from torch._inductor.exc import InductorError

    def raised(text: str) -> Exception:
        return InductorError(RuntimeError(text), None)

    assert classify(raised("out of resource: triton_tem_fused Required: 262144")) is Outcome.INFEASIBLE
    assert classify(raised("LoweringException: ...")) is Outcome.COMPILE_FAILED
    assert classify(UnsupportedError("ran without being compiled")) is Outcome.UNSUPPORTED


# on a GPU

PROBLEMS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "more queries": {"causal": True, "q_len": 300, "kv_len": 200},
    "fewer queries": {"causal": True, "q_len": 200, "kv_len": 300},
    "few queries": {"causal": True, "q_len": 5, "kv_len": 700, "heads": 16, "kv_heads": 2},
    "window": {"window": (70, 30)},
    "softcap": {"softcap": True, "causal": True},
    "alibi": {"alibi": True, "causal": True},
    "bool": {"mask": "bool"},
    "bias": {"mask": "bias.b1h1", "causal": True},
    "everything": {"mask": "bias.h1", "alibi": True, "softcap": True, "window": (60, 20)},
    "head_dim 56": {"causal": True, "head_dim": 56},
    "192 and 128": {"causal": True, "head_dim": 192, "v_head_dim": 128},
    "float32": {"dtype": Dtype.FP32, "causal": True},
    "bhsd": {"layout": Layout.BHSD, "causal": True, "dtype": Dtype.BF16},
    "packed": {"varlen": True, "causal": True},
}


# each is compiled for three cases, and these in both directions
TRAINED = ("more queries", "window", "bool", "everything", "192 and 128", "packed")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "pass_"), [(name, Pass.INFERENCE) for name in PROBLEMS] + [(name, Pass.TRAINING) for name in TRAINED]
)
def test_on_a_gpu(name: str, pass_: Pass) -> None:
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 384, "head_dim": 64, "dtype": Dtype.FP16}
    problem = Problem(**{**sizes, **PROBLEMS[name], "pass_": pass_})
    device = devices.select("cuda")
    assert Flex().supports(problem, devices.describe(device)) is None
    error = Checker(problem, device, seed=0).check(Candidate("flex"))
    assert error.worst <= 1, str(error)


@pytest.mark.gpu
@pytest.mark.parametrize("q_len", [1, 500])
@pytest.mark.parametrize("tma", [False, True])
def test_a_chosen_config_on_a_gpu(q_len: int, tma: bool) -> None:
    device = devices.select("cuda")
    problem = Problem(batch=2, heads=4, kv_heads=2, q_len=q_len, kv_len=500, head_dim=64, causal=True)
    space = Flex().spaces(problem, devices.describe(device)).get("forward")
    assert space is not None
    config = Config.of(KERNEL, block_m=64 if q_len > 1 else 0, block_n=64, num_warps=4, num_stages=2, **({"tma": tma}))
    assert config in space
    error = Checker(problem, device, seed=0).check(Candidate.of("flex", forward=config))
    assert error.worst <= 1, str(error)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["bias", "bias.b1", "bias.b1h1"])
def test_the_gradient_of_a_bias_on_a_gpu(mask: str) -> None:
    problem = Problem(
        pass_=Pass.TRAINING, batch=2, heads=4, kv_heads=2, q_len=200, head_dim=64, causal=True, mask=mask,
        bias_grad=True, dtype=Dtype.FP32,
    )  # fmt: skip
    call = random_call(problem, devices.select("cuda"), seed=0)
    assert call.mask is not None
    bias, exact = call.mask.clone().requires_grad_(), call.mask.double().requires_grad_()
    out, _ = run(replace(call, mask=bias), Candidate("flex"))
    grad_out = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, bias, grad_out)
    expected_out, _ = reference.attention(replace(call, mask=exact), needs_grad=True)
    (expected,) = torch.autograd.grad(expected_out, exact, grad_out.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
