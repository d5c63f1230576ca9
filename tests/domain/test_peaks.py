"""The roofline: what a device could do at most with a problem."""

import dataclasses

import pytest

from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.peaks import moved_bytes, peaks_of, roof_of
from tilewise.domain.problem import Dtype, Pass, Precision, Problem

H200 = Device(kind=DeviceKind.CUDA, name="NVIDIA H200", arch="sm_90", units=132, memory_gib=141, power_limit_w=700)
LONG = Problem(batch=1, heads=64, kv_heads=8, q_len=4096, head_dim=128)


def test_a_long_sequence_is_bound_by_compute_and_decoding_by_memory() -> None:
    long = roof_of(LONG, H200)
    assert long is not None
    assert (long.bound, long.roof, long.peak) == ("compute", 989, 989)
    decoding = roof_of(Problem(batch=32, heads=32, q_len=1, kv_len=8192, head_dim=128), H200)
    assert decoding is not None
    assert decoding.bound == "memory"
    # two operations per element of the keys, of two bytes: about 1 FLOP a byte
    assert decoding.intensity == pytest.approx(1, rel=0.01)
    assert decoding.roof == pytest.approx(4.8, rel=0.01)


def test_every_tensor_is_moved_once() -> None:
    assert moved_bytes(LONG) == 2 * 4096 * 128 * (2 * 64 + 2 * 8)
    wide = dataclasses.replace(LONG, v_head_dim=64, dtype=Dtype.FP32)
    assert moved_bytes(wide) == 4 * 4096 * (128 + 64) * (64 + 8)
    bias = dataclasses.replace(LONG, mask="bias.b1h1")
    assert moved_bytes(bias) - moved_bytes(LONG) == 2 * 4096 * 4096
    assert moved_bytes(dataclasses.replace(LONG, mask="bool.b1h1q1")) - moved_bytes(LONG) == 4096


def test_the_dtype_has_its_own_peak() -> None:
    exact = dataclasses.replace(LONG, dtype=Dtype.FP32)
    tf32 = dataclasses.replace(exact, precision=Precision.TF32)
    found = [roof_of(each, H200) for each in (exact, tf32, dataclasses.replace(LONG, dtype=Dtype.BF16))]
    assert [roof.peak for roof in found if roof] == [67, 494, 989]


def test_what_is_not_known_has_no_roof() -> None:
    assert peaks_of(None) is None
    assert peaks_of(dataclasses.replace(H200, mig="3g.71gb")) is None
    assert peaks_of(dataclasses.replace(H200, name="NVIDIA H200 NVL")) is None
    for problem in (
        dataclasses.replace(LONG, pass_=Pass.TRAINING),
        dataclasses.replace(LONG, varlen=True),
        Problem(batch=1, heads=8, q_len=1, kv_len=8192, head_dim=64, window=(256, 0)),
    ):
        assert roof_of(problem, H200) is None
