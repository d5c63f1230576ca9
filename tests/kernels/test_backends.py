"""Every backend that a CPU has, in every cell and dtype it says it supports, against the float64 reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.errors import ConfigError
from tilewise.domain.problem import Dtype, Layout, Pass, Problem
from tilewise.kernels import reference
from tilewise.kernels.backends import BACKENDS, backend_named, supporting
from tilewise.kernels.backends.tiled_cpu import KERNEL, TiledCpu
from tilewise.kernels.call import Call
from tilewise.kernels.run import run

from .cells import CELLS, PLAIN_FILE, TOLERANCE, assert_right, call_of, cells, problem_of, this_cpu

ON_CPU = ("sdpa", "sdpa_math", "plain", "cpu_tiled")
H200 = Device(kind=DeviceKind.CUDA, name="NVIDIA H200", arch="sm_90", units=132, memory_gib=141, shared_memory=232448)


def cases() -> list[tuple[str, str]]:
    return [
        (name, cell)
        for name in ON_CPU
        for cell in CELLS
        if BACKENDS[name].supports(problem_of(cell), this_cpu()) is None
    ]


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize(("name", "cell"), cases())
def test_right_in_every_cell(name: str, cell: str, dtype: Dtype) -> None:
    call = call_of(problem_of(cell, dtype=dtype))
    out, lse = run(call, Candidate(name))
    assert_right(call, out, lse)
    assert (lse is not None) == BACKENDS[name].gives_lse


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize(("name", "cell"), cases())
def test_gradients_in_every_cell(name: str, cell: str, dtype: Dtype) -> None:
    call = call_of(problem_of(cell, dtype=dtype, pass_=Pass.TRAINING))
    leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
    out, _ = run(call.with_tensors(*leaves), Candidate(name))
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    found = torch.autograd.grad(out, leaves, grad_out)
    for gradient, expected in zip(found, reference.gradients(call, grad_out), strict=True):
        # a gradient sums over rows, and with that their errors
        largest = max(1.0, float(expected.abs().max()))
        error = float((gradient.double() - expected).abs().max())
        assert error <= 2 * TOLERANCE[gradient.dtype] * largest, f"off by {error}"


def test_what_the_backends_support_is_what_the_cells_are_for() -> None:
    """The cases above are those that `supports` leaves: none may fall out unseen."""
    found = {name: [cell for other, cell in cases() if other == name] for name in ON_CPU}
    assert set(found["plain"]) == set(CELLS)
    assert set(found["sdpa"]) == set(found["sdpa_math"]) == {cell for cell in CELLS if "softcap" not in CELLS[cell]}
    assert set(found["cpu_tiled"]) == {cell for cell in CELLS if not {"mask", "alibi", "softcap"} & CELLS[cell].keys()}


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("cell", ["causal, more queries", "gqa", "window"])
def test_any_strides(name: str, cell: str) -> None:
    problem = problem_of(cell)
    call = call_of(problem)
    wide = [torch.full((*tensor.shape[:3], 2 * tensor.shape[3]), torch.nan) for tensor in (call.query, call.key)]
    for target, tensor in zip(wide, (call.query, call.key), strict=True):
        target[..., ::2] = tensor  # every other element: the last stride is 2
    value = torch.full((call.value.shape[1], call.value.shape[0], *call.value.shape[2:]), torch.nan).transpose(0, 1)
    value.copy_(call.value)  # batch and sequence changed places
    call = call.with_tensors(wide[0][..., ::2], wide[1][..., ::2], value)
    assert not call.query.is_contiguous()
    out, lse = run(call, Candidate(name))
    assert_right(call, out, lse)


@pytest.mark.parametrize("name", ON_CPU)
def test_one_key_for_the_whole_batch(name: str) -> None:
    """Tensors that are expanded have strides of 0."""
    call = call_of(problem_of("causal"))
    call = call.with_tensors(call.query, call.key[:1].expand_as(call.key), call.value[:, :, :1].expand_as(call.value))
    assert_right(call, *run(call, Candidate(name)))


@pytest.mark.parametrize("name", ON_CPU)
def test_inputs_stay_what_they_were(name: str) -> None:
    call = call_of(problem_of("causal"))
    before = [tensor.clone() for tensor in (call.query, call.key, call.value)]
    run(replace(call, scale=1.0), Candidate(name))
    assert all(torch.equal(*pair) for pair in zip(before, (call.query, call.key, call.value), strict=True))


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.7])
def test_any_scale(name: str, scale: float) -> None:
    call = replace(call_of(problem_of("causal, more queries")), scale=scale)
    assert_right(call, *run(call, Candidate(name)))


@pytest.mark.parametrize("name", ["sdpa", "sdpa_math", "plain"])
@pytest.mark.parametrize("shape", [(), (19,), (19, 19), (2, 1, 19), (1, 2, 19, 1)])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_masks_of_fewer_dimensions(name: str, shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = torch.randn(shape, generator=generator)
    call = replace(call_of(problem_of(f"{kind}.b1", causal=True)), mask=mask > -0.5 if kind == "bool" else mask)
    assert_right(call, *run(call, Candidate(name)))


@pytest.mark.parametrize("name", ["sdpa", "sdpa_math", "plain"])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_minus_infinity_in_a_bias_masks(name: str, dtype: Dtype) -> None:
    call = call_of(problem_of("bias", dtype=dtype))
    assert call.mask is not None
    mask = call.mask.clone()
    mask[0, :, 3] = -torch.inf
    mask[:, :, 5:9, 2:] = -torch.inf
    call = replace(call, mask=mask)
    out, lse = run(call, Candidate(name))
    assert_right(call, out, lse)
    assert bool((out[0, 3] == 0).all())


@pytest.mark.parametrize("name", ["sdpa", "sdpa_math", "plain"])
def test_a_float32_bias_on_half_precision(name: str) -> None:
    call = call_of(problem_of("bias", dtype=Dtype.BF16, causal=True))
    assert call.mask is not None
    call = replace(call, mask=call.mask.float())
    assert_right(call, *run(call, Candidate(name)))


@pytest.mark.parametrize("cell", ["bias", "bias.b1h1", "bias, more queries, causal", "bias and alibi and window"])
@pytest.mark.parametrize("name", ["sdpa", "sdpa_math", "plain"])
def test_the_gradient_of_a_bias(name: str, cell: str) -> None:
    call = call_of(problem_of(cell, pass_=Pass.TRAINING, bias_grad=True))
    assert call.mask is not None
    mask = call.mask.clone().requires_grad_()
    exact = call.mask.double().requires_grad_()
    out, _ = run(replace(call, mask=mask), Candidate(name))
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(out, mask, grad_out)
    expected_out, _ = reference.attention(replace(call, mask=exact), needs_grad=True)
    (expected,) = torch.autograd.grad(expected_out, exact, grad_out.double())
    assert found.shape == call.mask.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


# the tiled kernel and its space


def exhaustive() -> list[Problem]:
    small: dict[str, Any] = {"q_len": 40, "kv_len": 150, "head_dim": 8, "dtype": Dtype.FP32, "batch": 1}
    return [
        Problem(**{**small, "heads": 3, "causal": True}),
        Problem(**{**small, "heads": 6, "kv_heads": 3, "window": (20, 3), "q_len": 150, "kv_len": 40}),
        Problem(**{**small, "heads": 4, "kv_heads": 2, "q_len": 1, "kv_len": 300}),
        Problem(**{**small, "heads": 1, "q_len": 1, "kv_len": 1}),
    ]


@pytest.mark.parametrize("problem", exhaustive(), ids=lambda problem: problem.key)
def test_every_config_of_the_tiled_kernel(problem: Problem) -> None:
    call = call_of(problem)
    space = TiledCpu().spaces(problem, this_cpu())["forward"]
    assert space is not None
    configs = list(space)
    assert len(configs) >= 1
    assert space.default in configs
    for config in configs:
        assert_right(call, *TiledCpu().forward(call, config))


@given(
    q_len=st.integers(1, 70),
    kv_len=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    reach=st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
    causal=st.booleans(),
    layout=st.sampled_from(Layout),
    block_q=st.sampled_from([1, 3, 16, 64, 2048]),
    block_k=st.sampled_from([1, 5, 64, 256, 2048]),
    heads_per_chunk=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_the_tiled_kernel_at_any_size(
    q_len: int,
    kv_len: int,
    kv_heads: int,
    group: int,
    head_dims: tuple[int, int],
    reach: tuple[int, int],
    causal: bool,
    layout: Layout,
    block_q: int,
    block_k: int,
    heads_per_chunk: int,
) -> None:
    problem = Problem(
        batch=2,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dims[0],
        v_head_dim=head_dims[1],
        dtype=Dtype.FP32,
        causal=causal,
        window=None if reach == (-1, -1) else reach,
        layout=layout,
    )
    config = Config.of(KERNEL, block_q=block_q, block_k=block_k, heads_per_chunk=heads_per_chunk)
    call = call_of(problem)
    assert_right(call, *TiledCpu().forward(call, config))


def test_the_tiled_kernel_writes_everything() -> None:
    filled: list[torch.Tensor] = []

    class Poisoned(torch.Tensor):
        def new_empty(self, *shape: int, **options: object) -> torch.Tensor:  # type: ignore[override]
            dtype = options.get("dtype", self.dtype)
            filled.append(torch.full(shape, torch.nan, dtype=dtype))  # type: ignore[call-overload]
            return filled[-1]

    call = call_of(problem_of("causal, more queries"))
    poisoned = call.query.as_subclass(Poisoned)
    out, lse = TiledCpu().forward(call.with_tensors(poisoned, call.key, call.value), None)
    assert len(filled) == 2
    assert_right(call, out.as_subclass(torch.Tensor), None if lse is None else lse.as_subclass(torch.Tensor))


@pytest.mark.parametrize("heads", [1, 8, 128])
@pytest.mark.parametrize("kv_len", [1, 63, 4096, 131072])
def test_the_tiled_kernels_default_lies_in_its_space(heads: int, kv_len: int) -> None:
    problem = Problem(batch=1, heads=heads, kv_heads=1, q_len=2048, kv_len=kv_len, head_dim=128)
    space = TiledCpu().spaces(problem, this_cpu())["forward"]
    assert space is not None
    assert space.default in space
    block_q, block_k = (max(config[name] for config in space) for name in ("block_q", "block_k"))
    assert block_q <= 2048
    assert block_k <= max(64, 2 * kv_len)


# what backends refuse


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "changes", [{"page_size": 16}, {"page_size": 16, "varlen": True}, {"mask": "bool", "varlen": True}], ids=str
)
def test_nothing_computes_what_no_call_can_hold(name: str, changes: dict[str, Any]) -> None:
    problem = problem_of("full", dtype=Dtype.FP16, **changes)
    assert all(BACKENDS[name].supports(problem, device) is not None for device in (this_cpu(), H200))


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "triton"])
def test_cuda_backends_refuse_a_cpu(name: str) -> None:
    problem = problem_of("full", dtype=Dtype.FP16)
    assert BACKENDS[name].supports(problem, this_cpu()) == "needs a CUDA device"
    assert BACKENDS[name].supports(problem, H200) is None


def test_the_tiled_kernel_refuses_a_gpu() -> None:
    assert BACKENDS["cpu_tiled"].supports(problem_of("full"), H200) == "needs a CPU"


@pytest.mark.parametrize(
    ("name", "cell", "changes", "reason"),
    [
        ("triton", "full", {"head_dim": 264}, "at most 256"),
        ("triton", "full", {"v_head_dim": 264}, "at most 256"),
        ("triton", "full", {"page_size": 16}, "no page size"),
        ("sdpa_flash", "full", {"dtype": Dtype.FP32}, "fp16 or bf16"),
        ("sdpa_flash", "causal, fewer queries", {}, "takes no mask"),
        ("sdpa_flash", "window", {}, "takes no mask"),
        ("sdpa_flash", "other value head_dim", {}, "one head_dim"),
        ("sdpa_cudnn", "full", {"head_dim": 20}, "multiples of 8"),
        ("sdpa_efficient", "gqa", {}, "kv_heads = heads"),
        ("sdpa", "softcap", {}, "no softcap"),
    ],
)
def test_the_reason_says_what_is_missing(name: str, cell: str, changes: dict[str, object], reason: str) -> None:
    problem = problem_of(cell, **{"dtype": Dtype.FP16, **changes})
    found = BACKENDS[name].supports(problem, H200)
    assert found is not None
    assert reason in found


def test_an_older_gpu_is_refused_by_triton() -> None:
    old = replace(H200, arch="sm_75")
    assert (
        BACKENDS["triton"].supports(problem_of("full", dtype=Dtype.FP16), old) == "needs sm_80 or newer, this is sm_75"
    )


def test_supporting_lists_torchs_own_choice_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", PLAIN_FILE)
    assert [backend.name for backend in supporting(problem_of("causal"), this_cpu())] == [
        "sdpa",
        "sdpa_math",
        "cpu_tiled",
        "plain",
        "flex_cpu",
    ]
    assert [backend.name for backend in supporting(problem_of("softcap"), this_cpu())] == ["plain", "flex_cpu"]


def test_an_unknown_backend_is_a_config_error_that_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown backend 'nope'; expected one of sdpa, .*plain"):
        backend_named("nope")


@cells("mask", "alibi", "softcap")
def test_a_kept_window_mask_is_not_written(cell: str) -> None:
    """SDPA's window masks are kept between calls: the second call must see the same."""
    call: Call = call_of(problem_of(cell))
    first, _ = run(call, Candidate("sdpa"))
    second, _ = run(call, Candidate("sdpa"))
    assert torch.equal(first, second)
