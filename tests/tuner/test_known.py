"""What is tried first of our kernels is in their spaces, with TMA and without."""

from dataclasses import replace

import pytest

from tilewise.domain.device import Device
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels.backends.triton import Triton
from tilewise.tuner.known import known

from ..kernels.test_backends import H200

A100 = replace(H200, name="NVIDIA A100", arch="sm_80", units=108, memory_gib=80, shared_memory=166912)


@pytest.mark.parametrize("mask", ["none", "bias.b1"])
@pytest.mark.parametrize("head_dim", [56, 64, 128])
@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_every_kernel_of_half_precision_has_some(device: Device, head_dim: int, mask: str) -> None:
    problem = Problem(
        pass_=Pass.TRAINING, batch=2, heads=16, q_len=4096, head_dim=head_dim, dtype=Dtype.BF16, causal=True, mask=mask
    )
    for space in Triton().spaces(problem, device).values():
        for kernel in space.by_kernel:
            found = known(kernel, problem)
            assert found, kernel.kernel
            assert all(config in kernel for config in found)
            assert kernel.default not in found
            assert len(set(found)) == len(found)


def test_tiles_meant_for_pointers_come_before_those_of_tma() -> None:
    problem = Problem(pass_=Pass.TRAINING, batch=2, heads=16, q_len=4096, head_dim=128, causal=True)
    space = Triton().spaces(problem, A100)["dkdv"]
    first = known(space, problem)[0].as_dict()
    assert (first["block_m"], first["block_n"], first["num_warps"], first["num_stages"]) == (64, 64, 4, 2)


def test_large_tiles_of_float32_are_left_to_the_search() -> None:
    problem = Problem(batch=2, heads=16, q_len=4096, head_dim=128, dtype=Dtype.FP32)
    assert not [c for c in known(Triton().spaces(problem, A100)["forward"], problem) if int(c["block_m"]) > 32]
