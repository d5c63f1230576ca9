"""The Triton forward: small and odd sizes in the interpreter, real sizes on a GPU, and its compilation without one."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.problem import Dtype, Layout, Pass, Precision, Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels import device as devices
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.backends.triton import Triton
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import random_call
from tilewise.kernels.run import run
from tilewise.kernels.triton_kernels import forward
from tilewise.tuner.correctness import Checker, poisoned_empty
from tilewise.tuner.timing import clock_for
from tilewise.tuner.trying import Bench

from .cells import assert_right
from .test_backends import H200

# A GPU compiles the kernel; without one the interpreter runs it on CPU tensors (tests/conftest.py).
KERNEL = "triton_forward"
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


HEADS: dict[str, dict[str, Any]] = {
    "mha": {"heads": 2},
    "gqa": {"heads": 4, "kv_heads": 2},
    "mqa": {"heads": 3, "kv_heads": 1},
    "wide values": {"heads": 2, "v_head_dim": 72},
    "narrow values": {"heads": 2, "v_head_dim": 16},
}
REACH: dict[str, dict[str, Any]] = {
    "full": {"q_len": 37, "kv_len": 53},
    "causal": {"q_len": 37, "causal": True},
    "causal, fewer queries": {"q_len": 21, "kv_len": 53, "causal": True},
    "causal, more queries": {"q_len": 53, "kv_len": 21, "causal": True},
    "window": {"q_len": 53, "window": (18, 0)},
    "window, more queries": {"q_len": 53, "kv_len": 21, "window": (7, 0)},
    "window to both sides": {"q_len": 53, "kv_len": 45, "window": (17, 9)},
    "window, open to the left": {"q_len": 41, "kv_len": 29, "window": (-1, 3)},
    "window, open to the right": {"q_len": 29, "kv_len": 41, "window": (5, -1)},
    "one query": {"q_len": 1, "kv_len": 53, "causal": True},
    "lengths of one": {"q_len": 1, "kv_len": 1},
}
HEAD_DIMS = (16, 40, 56, 64, 72, 80, 96, 128, 160, 256)
BLOCKS = ((16, 16), (16, 32), (32, 16), (64, 64))  # the last is longer than every length


def covering() -> list[tuple[str, str, int, Dtype, tuple[int, int]]]:
    """Return each pair of heads and reach once, and with them every head_dim, dtype and pair of blocks in turn."""
    pairs = itertools.product(HEADS, REACH)
    return [
        (heads, reach, HEAD_DIMS[n % 10], (Dtype.FP16, Dtype.BF16)[n // 2 % 2], BLOCKS[n // 3 % 4])
        for n, (heads, reach) in enumerate(pairs)
    ]


def config_of(blocks: tuple[int, int], *, tma: bool = False) -> Config:
    warps = 1 if blocks[0] < 64 else 4
    return Config.of(KERNEL, block_m=blocks[0], block_n=blocks[1], num_warps=warps, num_stages=2, tma=tma)


def can_use_tma() -> bool:
    return HERE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)


def forward_of(call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel on outputs full of NaN, so that what it forgets to write shows."""
    with poisoned_empty():
        out, lse = Triton().forward(call, config)
    assert lse is not None
    return out, lse


def problem_of(heads: str, reach: str, **changes: Any) -> Problem:
    return Problem(**{"batch": 2, **HEADS[heads], **REACH[reach], **changes})


@pytest.mark.parametrize(("heads", "reach", "head_dim", "dtype", "blocks"), covering())
def test_right_in_every_cell(heads: str, reach: str, head_dim: int, dtype: Dtype, blocks: tuple[int, int]) -> None:
    call = random_call(problem_of(heads, reach, head_dim=head_dim, dtype=dtype), HERE, seed=0)
    for tma in (False, *([True] if can_use_tma() else [])):
        assert_right(call, *forward_of(call, config_of(blocks, tma=tma)))


@given(
    q_len=st.integers(1, 40),
    kv_len=st.integers(1, 40),
    reach=st.tuples(st.integers(-1, 30), st.integers(-1, 30)),
    causal=st.booleans(),
    blocks=st.sampled_from(BLOCKS),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_right_for_any_window(
    q_len: int, kv_len: int, reach: tuple[int, int], causal: bool, blocks: tuple[int, int]
) -> None:
    window = None if reach == (-1, -1) else reach
    problem = Problem(batch=1, heads=1, q_len=q_len, kv_len=kv_len, head_dim=16, causal=causal, window=window)
    call = random_call(problem, HERE, seed=2)
    assert_right(call, *forward_of(call, config_of(blocks)))


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("reach", ["causal", "window to both sides"])
def test_any_strides(layout: Layout, reach: str) -> None:
    call = random_call(problem_of("gqa", reach, head_dim=40, layout=layout), HERE, seed=3)
    wide = torch.full((*call.query.shape[:3], 80), torch.nan, dtype=call.query.dtype, device=HERE)
    wide[..., ::2] = call.query  # every other element: the last stride is 2
    fused = torch.full((*call.key.shape[:2], 3, *call.key.shape[2:]), torch.nan, dtype=call.key.dtype, device=HERE)
    fused[:, :, 1], fused[:, :, 2] = call.key, call.value  # parts of one projection
    call = call.with_tensors(wide[..., ::2], fused[:, :, 1], fused[:, :, 2])
    assert call.query.stride(-1) == 2
    assert not call.key.is_contiguous()
    assert_right(call, *forward_of(call, config_of((16, 16))))


def test_more_programs_than_a_second_grid_dimension_holds() -> None:
    """Batch times heads may exceed 65535; the interpreter shows that every pair has its program, a GPU that it runs."""
    batch = 70_000 if HERE.type == "cuda" else 3
    call = random_call(Problem(batch=batch, heads=2, kv_heads=1, q_len=20, head_dim=16, causal=True), HERE, seed=4)
    out, lse = forward_of(call, config_of((16, 16)))
    last = Call(
        Problem(batch=2, heads=2, kv_heads=1, q_len=20, head_dim=16, causal=True),
        call.query[-2:], call.key[-2:], call.value[-2:], call.scale,
    )  # fmt: skip
    assert bool(out.isfinite().all())
    assert_right(last, out[-2:], lse[-2:])


def test_the_grid_is_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(forward, "attention_forward", Recorded())
    call = random_call(Problem(batch=2, heads=3, q_len=33, head_dim=16), torch.device("cpu"), seed=0)
    Triton().forward(call, config_of((16, 16)))
    assert launched == [(2 * 3 * 3,)]


# its space


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 192])
@pytest.mark.parametrize("v_head_dim", [16, 128, 256])
@pytest.mark.parametrize("mask", ["none", "bool", "bias"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(Dtype.FP16, "ieee"), (Dtype.FP32, "ieee"), (Dtype.FP32, "tf32")], ids=str
)
def test_the_default_lies_in_the_space_of_every_card(
    head_dim: int, v_head_dim: int, dtype: Dtype, precision: str, mask: str
) -> None:
    problem = Problem(
        pass_=Pass.TRAINING, dtype=dtype, batch=1, heads=1, q_len=1024, head_dim=head_dim, v_head_dim=v_head_dim,
        precision=Precision(precision), mask=mask,
    )  # fmt: skip
    for capability, available in ((86, 101376), (80, 166912), (90, 232448), (120, 101376)):
        for space in Triton().spaces(problem, card(available, capability)).values():
            assert space.default in space


def card(shared: int, capability: int = 90) -> Device:
    return replace(H200, arch=f"sm_{capability}", shared_memory=shared)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "sdpa_cudnn", "sdpa_efficient", "sdpa_flash", "sdpa_math", "plain"])
@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        (Dtype.BF16, {"causal": True}),
        (Dtype.BF16, {"causal": True, "q_len": 300, "kv_len": 200}),
        (Dtype.FP16, {"window": (64, 0)}),
        (Dtype.FP16, {"mask": "bool"}),
        (Dtype.FP16, {"mask": "bias.b1h1", "causal": True}),
        (Dtype.FP32, {"causal": True, "q_len": 300, "kv_len": 200}),
        (Dtype.BF16, {"pass_": Pass.TRAINING, "mask": "bool"}),
        (Dtype.FP16, {"pass_": Pass.TRAINING, "mask": "bias.b1h1", "bias_grad": True}),
        (Dtype.FP16, {"pass_": Pass.TRAINING, "mask": "bias.h1q1", "causal": True, "q_len": 300, "kv_len": 200}),
        (Dtype.BF16, {"pass_": Pass.TRAINING, "dropout": True, "causal": True}),
        (Dtype.FP32, {"pass_": Pass.TRAINING, "dropout": True, "mask": "bool", "kv_heads": 2}),
        (Dtype.FP16, {"dropout": True}),
    ],
    ids=str,
)
def test_torchs_backends_are_right_where_they_say_so(name: str, dtype: Dtype, fields: dict[str, Any]) -> None:
    """A backend of one kernel may find that it has none; what is computed is right, wholly masked rows included.

    But for the masks of cuDNN's dropout, which are no fair draws along the queries: docs/notes/backends.md.
    """
    device = devices.select("cuda")
    problem = Problem(**{"batch": 2, "heads": 4, "q_len": 256, "head_dim": 64, "dtype": dtype, **fields})
    if BACKENDS[name].supports(problem, devices.describe(device)) is not None:
        return
    always = name in ("sdpa", "sdpa_math", "plain")
    clock = clock_for(device)
    bench = Bench(Checker(problem, device, seed=0), clock, Candidate("sdpa"), job="", attempt=1)
    trial = bench.attempt(Candidate(name), best_ratio=math.inf)
    expected = [Outcome.OK] if always else [Outcome.OK, Outcome.UNSUPPORTED]
    if problem.dropout and name in ("sdpa", "sdpa_cudnn") and trial.error and trial.error.tensor == "dropout by query":
        expected.append(Outcome.WRONG_RESULT)
    assert trial.outcome in expected, f"{trial.error} {trial.message}"


@pytest.mark.gpu
def test_offsets_are_64_bit() -> None:
    """Query and result have 2**31 elements and some: an offset of 32 bits would come out negative."""
    device = devices.select("cuda")
    q_len = 262_144 + 128
    problem = Problem(batch=1, heads=64, kv_heads=1, q_len=q_len, kv_len=64, head_dim=128)
    query = torch.empty(1, q_len, 64, 128, dtype=torch.float16, device=device)
    for first in range(0, q_len, 65_536):
        query[:, first : first + 65_536].normal_()
    key, value = (torch.randn(1, 64, 1, 128, dtype=torch.float16, device=device) for _ in range(2))
    assert query.numel() > 2**31
    out, lse = run(Call(problem, query, key, value, 128**-0.5), Candidate("triton"))
    assert lse is not None
    for rows in (slice(0, 64), slice(131_072, 131_136), slice(q_len - 64, q_len)):
        part = Problem(batch=1, heads=64, kv_heads=1, q_len=64, kv_len=64, head_dim=128)
        assert_right(Call(part, query[:, rows], key, value, 128**-0.5), out[:, rows], lse[:, :, rows])
