"""The space of the decoding kernel, what it refuses, and its compilation without a GPU."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from tilewise.domain.device import Device
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels.backends.triton_decode import TritonDecode, registers, shared_memory

from .cells import this_cpu
from .test_backends import H200
from .test_decode import DIMS


def card(shared: int, capability: int) -> Device:
    return replace(H200, shared_memory=shared, arch=f"sm_{capability}")


@pytest.mark.parametrize("dims", [*DIMS, (64, 64), (192, 192), (16, 16), (256, 16)])
@pytest.mark.parametrize("page_size", [0, 16, 256])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_the_default_lies_in_the_space_of_every_card(dims: tuple[int, int], page_size: int, dtype: Dtype) -> None:
    for rows, batch, kv_len in itertools.product((1, 16, 64, 128), (1, 32, 500), (1, 8192, 131072)):
        problem = Problem(
            batch=batch, heads=rows, kv_heads=1, q_len=1, kv_len=kv_len, dtype=dtype,
            head_dim=dims[0], v_head_dim=dims[1], page_size=page_size,
        )  # fmt: skip
        if TritonDecode().supports(problem, H200) is not None:
            continue
        for capability, available in ((86, 101376), (80, 166912), (90, 232448), (120, 101376)):
            space = TritonDecode().spaces(problem, card(available, capability))["forward"]
            assert space.default in space


@pytest.mark.parametrize("page_size", [0, 64])
def test_what_is_in_the_space(page_size: int) -> None:
    problem = Problem(batch=8, heads=64, kv_heads=8, q_len=1, kv_len=8192, head_dim=128, page_size=page_size)
    space = TritonDecode().spaces(problem, H200)["forward"]
    assert space is not None
    configs = list(space)
    assert 50 < len(configs) < 1000
    for config in configs:
        assert shared_memory(problem, 90, config.as_dict()) <= H200.shared_memory
        assert registers(problem, config.as_dict()) <= 256
        assert config["block_n"] >= 8 * config["num_warps"]
    assert sorted({config["num_splits"] for config in configs}) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("batch", "kv_heads", "kv_len", "window", "splits"),
    [
        (1, 8, 8192, None, 32),
        (8, 8, 8192, None, 4),
        (32, 8, 8192, None, 1),
        (500, 8, 8192, None, 1),
        (1, 1, 131072, None, 256),
        (1, 1, 128, None, 2),
        (1, 1, 1, None, 1),
        (1, 8, 131072, (1000, 0), 8),
    ],
)
def test_the_default_fills_the_device_twice(
    batch: int, kv_heads: int, kv_len: int, window: tuple[int, int] | None, splits: int
) -> None:
    problem = Problem(
        batch=batch, heads=kv_heads, kv_heads=kv_heads, q_len=1, kv_len=kv_len, head_dim=128, window=window
    )
    space = TritonDecode().spaces(problem, H200)["forward"]
    assert space is not None
    assert space.default["num_splits"] == splits


def test_a_config_of_a_bucket_is_one_of_all_its_problems() -> None:
    for batch, kv_len in ((1, 4097), (5, 130), (33, 5000)):
        problem = Problem(batch=batch, heads=64, kv_heads=8, q_len=1, kv_len=kv_len, head_dim=128, varlen=True)
        space, bucket = (TritonDecode().spaces(each, H200)["forward"] for each in (problem, problem.bucket()))
        assert space is not None
        assert bucket is not None
        assert set(space) == set(bucket)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pass_": Pass.TRAINING}, "inference only"),
        ({"q_len": 17, "kv_len": 70}, "q_len of at most 16"),
        ({"heads": 129, "kv_heads": 1}, "q_len * heads / kv_heads of at most 128 (fp16), this is 129"),
        ({"heads": 64, "kv_heads": 4, "q_len": 9}, "at most 128 (fp16), this is 144"),
        ({"heads": 17, "kv_heads": 1, "dtype": Dtype.FP32}, "at most 16 (fp32), this is 17"),
        ({"head_dim": 264}, "head_dim of at most 256"),
        ({"v_head_dim": 512}, "head_dim of at most 256"),
        ({"page_size": 24}, "page_size in multiples of 16"),
        ({"mask": "bool"}, "no mask"),
        ({"alibi": True}, "no alibi"),
        ({"dropout": True}, "no dropout"),
    ],
    ids=str,
)
def test_the_reason_says_what_is_missing(changes: dict[str, Any], reason: str) -> None:
    base: dict[str, Any] = {"batch": 2, "heads": 8, "q_len": 1, "kv_len": 70, "head_dim": 64, "varlen": True}
    assert TritonDecode().supports(Problem(**base), H200) is None
    found = TritonDecode().supports(Problem(**{**base, **changes}), H200)
    assert found is not None
    assert reason in found


def test_the_devices_it_runs_on() -> None:
    problem = Problem(batch=4, heads=16, kv_heads=2, q_len=1, kv_len=70, head_dim=16, varlen=True)
    assert TritonDecode().supports(problem, this_cpu()) == "needs a CUDA device"
    assert TritonDecode().supports(problem, replace(H200, arch="sm_75")) == "needs sm_80 or newer, this is sm_75"
    assert TritonDecode().supports(problem, replace(H200, arch="sm_80")) is None
