"""What our launches compile to for sm_80 and sm_90, without a GPU: it compiles, it fits, and we knew its shared memory.

Everything is compiled once, in processes of their own in which Triton does not interpret.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tilewise.bench.matrix import DEVICES, Job, Row, compile_all, jobs, predicted, spaces, winning
from tilewise.domain import codec
from tilewise.domain.config import Config
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels import offline
from tilewise.kernels.backends.triton import Triton

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90")
BASE = Problem(pass_=Pass.TRAINING, batch=1, heads=8, kv_heads=2, q_len=1024, head_dim=64, causal=True)
DECODE = Problem(batch=4, heads=64, kv_heads=8, q_len=1, kv_len=8192, head_dim=128)
DEFAULTS = (
    BASE,
    replace(BASE, head_dim=128, v_head_dim=128, causal=False, mask="bias.b1h1", bias_grad=True),
    DECODE,
    replace(DECODE, page_size=64, head_dim=56, v_head_dim=56),
)


def corner(problem: Problem, role: str, arch: str) -> Job:
    """Return the config of the largest predicted shared memory, of eight warps: fewer spill, and compile for long."""
    space = spaces(problem, DEVICES[arch])[role]
    assert space is not None
    wide = [config for config in space if config["num_warps"] == 8]
    config = max(wide, key=lambda config: predicted(problem, role, DEVICES[arch], config))
    return Job(problem=problem, role=role, arch=arch, config=config, why="corner")


def wanted() -> list[Job]:
    defaults = [job for job in jobs(DEFAULTS, ARCHS, limit=0) if job.why == "default"]
    combined = {job.arch: job for job in jobs([DECODE], ARCHS, limit=0) if job.role == "combine"}
    tight = [corner(BASE, role, arch) for arch in ARCHS for role in ("forward", "dkdv", "dq")]
    return [*defaults, *combined.values(), *winning(ARCHS), *tight]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Compile defaults, corners and committed winners; two at a time, as the smallest machine has cores."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return compile_all(wanted(), file, processes=2, seconds=120, report=lambda _: None)


def test_defaults_corners_and_winners_compile_and_fit(rows: list[Row]) -> None:
    assert {(row.job.role, row.job.arch) for row in rows} == {
        (role, arch) for role in offline.KERNELS for arch in ARCHS if arch == "sm_90" or "hopper" not in role
    }
    assert "winner" in {row.job.why for row in rows}
    for row in rows:
        assert row.outcome is Outcome.OK, f"{row.job}: {row.message}"
        assert row.fits, f"{row.job}: {row.shared_memory} bytes of shared memory"
        assert 0 < row.registers <= 255
        assert row.overwritten == 0, f"{row.job}: ptxas overwrites an operand"


def test_shared_memory_is_what_the_space_counts_with(rows: list[Row]) -> None:
    exact = 0
    for row in rows:
        if row.job.config is None or row.job.role == "combine":
            continue
        counted = predicted(row.job.problem, row.job.role, DEVICES[row.job.arch], row.job.config)
        assert row.shared_memory <= counted, f"{row.job}: {counted} counted, {row.shared_memory} used"
        assert counted <= 1.6 * row.shared_memory, f"{row.job}: {counted} counted, {row.shared_memory} used"
        exact += counted == row.shared_memory
    assert exact >= 10


def test_operands_that_ptxas_overwrites_are_found(tmp_path: Path) -> None:
    """dK and dV of the first were wrong on an H200; the second takes keys and values from shared memory."""
    problem = Problem(pass_=Pass.TRAINING, batch=1, heads=4, q_len=512, head_dim=64)
    tiles = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2, "tma": True}
    both = [
        Job(problem=problem, role="dkdv", arch="sm_90", why="space",
            config=Config.of("triton_dkdv", **tiles, in_registers=in_registers))
        for in_registers in (True, False)
    ]  # fmt: skip
    wrong, right = compile_all(both, tmp_path / "rows", processes=2, seconds=120, report=lambda _: None)
    assert (wrong.outcome, right.outcome) == (Outcome.OK, Outcome.OK)
    assert wrong.overwritten == 16  # a thread's share of 64 x 64 keys
    assert right.overwritten == 0


def test_queries_in_one_loop_are_overwritten_by_weights_that_need_as_many_registers(tmp_path: Path) -> None:
    """On an H200 the checker refused tiles of 64 keys and passed tiles of 128; the space has what is spared."""
    problem = Problem(batch=1, heads=4, q_len=512, head_dim=64, causal=True)
    space = Triton().spaces(problem, DEVICES["sm_90"])["forward"]
    tiles = {"block_m": 64, "num_warps": 4, "num_stages": 2, "tma": True, "in_registers": True, "one_loop": True}
    configs = [Config.of("triton_forward", **tiles, block_n=block_n) for block_n in (32, 64, 128)]
    jobs = [Job(problem=problem, role="forward", arch="sm_90", why="space", config=config) for config in configs]
    rows = compile_all(jobs, tmp_path / "rows", processes=2, seconds=120, report=lambda _: None)
    assert [row.overwritten for row in rows] == [0, 16, 0]
    assert [config in space for config in configs] == [True, False, True]


# one process, for what does not come with a Row


@dataclass(frozen=True, slots=True)
class Case:
    role: str
    problem: Problem
    config: Config | None
    capability: int = 80
    available: int = offline.UNLIMITED


TILE = Config.of("triton_forward", block_m=64, block_n=64, num_warps=4, num_stages=3, tma=False)
DECODING = Config.of("triton_decode", block_n=64, num_splits=4, num_warps=4, num_stages=3)
HOPPER = {"block_n": 64, "num_stages": 2, "persistent": False, "q_stages": 1, "swizzle": 0}
HALF, SINGLE = replace(DECODE, dtype=Dtype.BF16), replace(DECODE, dtype=Dtype.FP32, heads=16, kv_heads=4, head_dim=64)
CASES = {
    "fits": Case("forward", BASE, TILE, available=40960),
    "one byte too few": Case("forward", BASE, TILE, available=40959),
    "one consumer": Case(
        "hopper_forward", BASE, Config.of("hopper_forward", **HOPPER, num_warps=4, pingpong=False), 90
    ),
    "two in turn": Case("hopper_forward", BASE, Config.of("hopper_forward", **HOPPER, num_warps=8, pingpong=True), 90),
    "decode": Case("decode", HALF, DECODING),
    "decode, sm_90": Case("decode", replace(DECODE, head_dim=56, v_head_dim=56), DECODING, 90),
    "decode, float32": Case("decode", SINGLE, Config.of("triton_decode", **{**DECODING.as_dict(), "block_n": 32})),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = [(case.role, case.problem.key, case.config, case.capability, case.available) for case in CASES.values()]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline.py"))],
        input=codec.canonical(given).decode(),
        env={**environment, "PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


def test_what_does_not_fit_is_infeasible_and_never_launched(results: dict[str, dict[str, Any]]) -> None:
    assert results["fits"]["outcome"] == "ok"
    assert results["fits"]["shared"] == 40960
    assert results["one byte too few"]["outcome"] == Outcome.INFEASIBLE
    assert "Required: 40960, Hardware limit: 40959" in results["one byte too few"]["message"]


def test_no_barrier_is_there_that_nobody_waits_at(results: dict[str, dict[str, Any]]) -> None:
    """Its memory would hold something else, which a GPU that starts another program beside overwrites."""
    rings = 2 * (1 + 2 + 2)  # a full and a free one for each slot of queries, keys and values
    assert results["one consumer"]["barriers"] == rings
    assert results["two in turn"]["barriers"] == rings + 2 + 2


def test_decoding_copies_16_bytes_at_a_time(results: dict[str, dict[str, Any]]) -> None:
    for name in ("decode", "decode, sm_90", "decode, float32"):
        copies = results[name]["copies"]
        assert copies["16"] > 0, name
        assert set(copies) == {"16"}, name


def test_kernels_that_are_interpreted_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewise.domain.errors import DeviceError
    from tilewise.kernels.triton_kernels import forward

    monkeypatch.setattr(forward, "attention_forward", lambda: None)  # as TRITON_INTERPRET makes it
    with pytest.raises(DeviceError, match="unset TRITON_INTERPRET"), offline.compiling(80):
        pass


def test_tensors_without_data_are_those_of_a_real_call() -> None:
    import torch

    from tilewise.kernels.inputs import random_call

    for problem in (
        replace(BASE, mask="bool.h1", alibi=True, softcap=True),
        replace(DECODE, batch=2, kv_len=200, page_size=16, varlen=True),
    ):
        real, empty = random_call(problem, torch.device("cpu"), seed=0), offline.call_without_data(problem)
        assert (empty.scale, empty.softcap, empty.window) == (real.scale, real.softcap, real.window)
        for name in ("query", "key", "value", "mask", "alibi_slopes", "kv_lengths", "block_table"):
            one, other = getattr(real, name), getattr(empty, name)
            assert (one is None) == (other is None), name
            if one is not None:
                assert other.dtype == one.dtype, name
                assert other.shape[1:] == one.shape[1:], name
                assert other.stride() == one.stride(), name


def test_packed_tensors_without_data_are_those_of_a_real_call() -> None:
    import torch

    from tilewise.kernels.inputs import random_call

    problem = replace(BASE, batch=3, varlen=True)
    real, empty = random_call(problem, torch.device("cpu"), seed=0), offline.call_without_data(problem)
    pairs = [(getattr(real, name), getattr(empty, name)) for name in ("query", "key", "value")]
    for one, other in pairs:
        assert (other.dtype, other.shape[1:], other.stride()) == (one.dtype, one.shape[1:], one.stride())
    assert real.cu_seqlens is not None
    assert empty.cu_seqlens is not None
    for one, other in zip(real.cu_seqlens, empty.cu_seqlens, strict=True):
        assert (other.dtype, other.shape) == (one.dtype, one.shape)
    assert empty.kv_lengths is None
