"""The warp-specialised kernels for sm_90: what their spaces offer, and on an H100 or H200, their results."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.space import SearchSpace
from tilewise.kernels import device as devices
from tilewise.kernels.backends import hopper_spaces
from tilewise.kernels.backends.triton import ROLES, Triton
from tilewise.kernels.inputs import random_call
from tilewise.tuner.correctness import Checker
from tilewise.tuner.steps import results

from .test_backends import H200

PLAIN = Problem(pass_=Pass.TRAINING, batch=1, heads=8, kv_heads=2, q_len=1024, head_dim=128, causal=True)


def by_kernel(problem: Problem, capability: int = 90) -> dict[str, SearchSpace]:
    card = replace(H200, arch=f"sm_{capability}")
    return {each.kernel: each for space in Triton().spaces(problem, card).values() for each in space.by_kernel}


def test_both_kernels_of_each_role_are_offered_on_sm_90_only() -> None:
    tiled = {f"triton_{role}" for role in ROLES}
    assert set(by_kernel(PLAIN)) == tiled | set(hopper_spaces.KERNELS)
    for capability in (80, 86, 89, 100):
        assert set(by_kernel(PLAIN, capability)) == tiled


@pytest.mark.parametrize(
    "changes",
    [{"dtype": Dtype.FP32}, {"head_dim": 36}, {"varlen": True}],
    ids=str,
)
def test_what_the_kernels_do_not_know_is_not_theirs(changes: dict[str, Any]) -> None:
    changes = {**changes, **({"v_head_dim": 0} if "head_dim" in changes else {})}
    assert not set(by_kernel(replace(PLAIN, **changes))) & set(hopper_spaces.KERNELS)


@pytest.mark.parametrize("head_dim", [16, 40, 56, 64, 72, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("v_head_dim", [16, 64, 128, 256])
def test_what_is_offered_fits_by_count(head_dim: int, v_head_dim: int) -> None:
    spaces = by_kernel(replace(PLAIN, head_dim=head_dim, v_head_dim=v_head_dim))
    for role, kernel in zip(ROLES, hopper_spaces.KERNELS, strict=True):
        if kernel not in spaces:  # two wide accumulators leave dkdv no registers
            assert role == "dkdv"
            assert head_dim + v_head_dim > 256
            continue
        space = spaces[kernel]
        assert space.default in space
        widths = hopper_spaces.Widths(
            1 << max(4, (head_dim - 1).bit_length()),
            1 << max(4, (v_head_dim - 1).bit_length()),
            H200.shared_memory,
            False,
        )
        for config in space:
            assert hopper_spaces.shared_memory(role, widths, config.as_dict()) <= H200.shared_memory


# on a GPU

REACHES: dict[str, dict[str, Any]] = {
    "full": {"q_len": 1024},
    "ragged": {"q_len": 1000, "kv_len": 777},
    "causal": {"q_len": 1024, "causal": True},
    "causal, fewer queries": {"q_len": 333, "kv_len": 1111, "causal": True},
    "causal, more queries": {"q_len": 1111, "kv_len": 333, "causal": True},
    "window": {"q_len": 1500, "window": (256, 0)},
    "window to both sides": {"q_len": 1100, "window": (100, 33)},
    "window, fewer queries": {"q_len": 300, "kv_len": 900, "window": (70, -1)},
}
HEADS: dict[str, dict[str, Any]] = {
    "mha": {"heads": 4},
    "gqa": {"heads": 8, "kv_heads": 2},
    "mqa": {"heads": 5, "kv_heads": 1},
}
WIDTHS = [(16, 16), (40, 40), (56, 56), (64, 64), (72, 72), (96, 96), (128, 128), (192, 128), (64, 256), (256, 256)]


def cases() -> list[tuple[str, str, tuple[int, int], Dtype, int]]:
    """Return 20 cells: every width twice, each reach with each kind of heads at least once; and a seed for configs."""
    reaches, heads = list(REACHES), list(HEADS)
    return [
        (heads[n % 3], reaches[(n + n // 8) % 8], WIDTHS[n % 10], (Dtype.FP16, Dtype.BF16)[(n + n // 10) % 2], n)
        for n in range(20)
    ]


FEATURES: list[dict[str, Any]] = [
    {"mask": "bool"},
    {"mask": "bool.b1h1", "q_len": 1000, "kv_len": 777},
    {"mask": "bool.q1", "causal": True, "head_dim": 56},
    {"mask": "bool.k1", "head_dim": 128},
    {"mask": "bias", "head_dim": 128},
    {"mask": "bias.b1", "bias_grad": True, "causal": True, "head_dim": 128},
    {"mask": "bias", "bias_grad": True, "q_len": 1000, "kv_len": 777},
    {"mask": "bias.h1", "bias_grad": True, "q_len": 1000, "softcap": True, "dropout": True},
    {"mask": "bias.h1q1", "q_len": 333, "kv_len": 1111, "head_dim": 96},
    {"mask": "bias", "window": (200, 50), "alibi": True},
    {"alibi": True, "causal": True, "head_dim": 128},
    {"alibi": True, "q_len": 1111, "kv_len": 333, "causal": True},
    {"softcap": True, "causal": True, "head_dim": 128},
    {"softcap": True, "window": (300, 0), "dtype": Dtype.BF16},
    {"dropout": True, "causal": True},
    {"dropout": True, "head_dim": 128, "q_len": 700, "kv_len": 900},
    {"mask": "bias", "alibi": True, "softcap": True, "dropout": True, "window": (400, 100), "dtype": Dtype.BF16},
]


@pytest.mark.gpu
@pytest.mark.parametrize("fields", FEATURES, ids=str)
def test_features_at_real_sizes(fields: dict[str, Any]) -> None:
    """Result and gradients of the default of each kernel, with GQA; and with the mask read the other ways."""
    device = devices.select("cuda")
    sizes = {"batch": 2, "heads": 6, "kv_heads": 2, "q_len": 1024, "head_dim": 64}
    problem = Problem(**{"pass_": Pass.TRAINING, **sizes, **fields})
    described = devices.describe(device)
    if described.capability != 90:
        pytest.skip(f"needs sm_90, this is {described.arch}")
    configs = {
        role: next(each.default for each in whole.by_kernel if each.kernel in hopper_spaces.KERNELS)
        for role, whole in Triton().spaces(problem, described).items()
    }
    checker = Checker(problem, device, seed=0)
    ways: list[dict[str, Any]] = [{}]
    if "mask_stages" in configs["dq"].as_dict() and not problem.dropout:  # whose kernels compile for half a minute each
        ways += [{"mask_stages": 0}, {"mask_stages": 2, "block_n": 32, "block_m": 32}]
    if "dbias" in configs["dq"].as_dict():
        ways += [{"dbias": False}]
    for way in ways:
        changed = {role: replaced(config, way) for role, config in configs.items()}
        error = checker.check(Candidate.of("triton", **changed))
        assert error.worst <= 1, f"{changed}: {error}"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fields", [{"mask": "bool.h1"}, {"mask": "bias.b1", "bias_grad": True}, {"mask": "bias", "causal": True}], ids=str
)
def test_masks_give_the_same_bits_every_time(fields: dict[str, Any]) -> None:
    """Readers of the mask's ring that are not waited for see the next tile, a few times in thousands of tiles."""
    device = devices.select("cuda")
    problem = Problem(**{"pass_": Pass.TRAINING, "batch": 2, "heads": 16, "q_len": 4096, "head_dim": 128, **fields})
    described = devices.describe(device)
    if described.capability != 90:
        pytest.skip(f"needs sm_90, this is {described.arch}")
    configs = {
        role: next(each.default for each in whole.by_kernel if each.kernel in hopper_spaces.KERNELS)
        for role, whole in Triton().spaces(problem, described).items()
    }
    call = random_call(problem, device, seed=0)
    grad_out = torch.randn_like(call.query)
    for way in ({}, {"num_warps": 8, "num_stages": 2, "block_m": 64, "block_n": 64, "mask_stages": 2}):
        candidate = Candidate.of("triton", **{role: replaced(config, way) for role, config in configs.items()})
        first = results(call, candidate, grad_out)
        for _ in range(10):
            again = results(call, candidate, grad_out)
            different = [name for name in first if not torch.equal(first[name], again[name])]
            assert not different, f"{candidate}: {different}"


@pytest.mark.gpu
@pytest.mark.parametrize(("block_n", "num_stages"), [(32, 1), (32, 4), (64, 2), (128, 1)])
def test_programs_that_start_beside_others_change_nothing_of_theirs(block_n: int, num_stages: int) -> None:
    """With one consumer two programs share a multiprocessor; here each ends after one tile, and another starts."""
    device = devices.select("cuda")
    problem = Problem(batch=1, heads=64, kv_heads=8, q_len=4096, head_dim=128, causal=True)
    described = devices.describe(device)
    if described.capability != 90:
        pytest.skip(f"needs sm_90, this is {described.arch}")
    whole = Triton().spaces(problem, described)["forward"]
    default = next(each.default for each in whole.by_kernel if each.kernel == hopper_spaces.FORWARD)
    way = {"block_n": block_n, "num_stages": num_stages, "num_warps": 4, "q_stages": 1, "pingpong": False}
    call = random_call(problem, device, seed=0)

    def out(*, persistent: bool) -> torch.Tensor:
        config = replaced(default, {**way, "persistent": persistent})
        return results(call, Candidate.of("triton", forward=config), None)["out"]

    expected = out(persistent=True)
    for _ in range(8):
        assert torch.equal(out(persistent=False), expected)


def replaced(config: Config, changes: dict[str, Any]) -> Config:
    """Return the config with those changes that are about its parameters."""
    return Config.of(config.kernel, **{name: changes.get(name, value) for name, value in config.as_dict().items()})


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "reach", "widths", "dtype", "n"), cases())
def test_right_at_real_sizes(heads: str, reach: str, widths: tuple[int, int], dtype: Dtype, n: int) -> None:
    """Result and gradients of the default, and of a config from elsewhere in each space."""
    device = devices.select("cuda")
    problem = Problem(
        **{
            "pass_": Pass.TRAINING,
            "batch": 2,
            "dtype": dtype,
            "head_dim": widths[0],
            "v_head_dim": widths[1],
            **HEADS[heads],
            **REACHES[reach],
        }
    )
    described = devices.describe(device)
    if described.capability != 90:
        pytest.skip(f"needs sm_90, this is {described.arch}")
    checker = Checker(problem, device, seed=0)
    spaces = {
        role: space
        for role, whole in Triton().spaces(problem, described).items()
        for space in whole.by_kernel
        if space.kernel in hopper_spaces.KERNELS
    }
    elsewhere = {role: list(space)[n * 37 % len(list(space))] for role, space in spaces.items()}
    for configs in ({role: space.default for role, space in spaces.items()}, elsewhere):
        error = checker.check(Candidate.of("triton", **configs))
        assert error.worst <= 1, f"{configs}: {error}"
