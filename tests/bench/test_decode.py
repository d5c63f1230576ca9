"""The benchmark of decoding at tiny sizes: the kernel in Triton's interpreter, SDPA on the CPU, a clock that counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tilewise.bench import ahead, decode
from tilewise.bench.workers import run_each
from tilewise.domain import codec
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.space import SearchSpace
from tilewise.domain.trial import Outcome
from tilewise.kernels import device as devices
from tilewise.kernels.backends.triton_decode import KERNEL, TritonDecode
from tilewise.kernels.inputs import random_call
from tilewise.tuner.timing import CpuClock

from .clock import CallClock

CPU = torch.device("cpu")
H200 = Device(kind=DeviceKind.CUDA, name="NVIDIA H200", arch="sm_90", units=132, memory_gib=141, shared_memory=232448)
SDPA = Candidate("sdpa")
TINY = Problem(batch=1, heads=4, kv_heads=2, q_len=1, kv_len=256, head_dim=16)


def two_tiles(_: Problem, space: SearchSpace) -> list[Config]:
    splits = space.default["num_splits"]
    return [Config.of(KERNEL, block_n=block_n, num_splits=splits, num_warps=1, num_stages=3) for block_n in (32, 64)]


def measured(problem: Problem, costs: dict[str, float]) -> decode.Result:
    return decode.measure(
        decode.Cell(name="tiny", problem=problem), CPU, H200, CallClock(costs), rivals=(SDPA,), chosen=two_tiles,
        screen_seconds=60.0,
    )  # fmt: skip


@pytest.mark.parametrize("page_size", [0, 16])
def test_the_best_of_tiles_and_splits_is_found(page_size: int) -> None:
    result = measured(replace(TINY, page_size=page_size), {"block_n=32 num_splits=2": 0.25, "block_n=32": 0.5})
    assert result.best == Candidate.of(
        KERNEL, forward=Config.of(KERNEL, block_n=32, num_splits=2, num_warps=1, num_stages=3)
    )
    assert {trial.outcome for trial in result.trials} == {Outcome.OK}
    assert len(result.trials) == len({trial.candidate for trial in result.trials}) == 3 * 3
    space = TritonDecode().spaces(result.problem, H200)["forward"]
    assert space is not None
    default = Candidate.of(KERNEL, forward=space.default)
    assert [finalist.candidate for finalist in result.finalists] == [SDPA, result.best, default]
    best = result.finalist(result.best)
    assert best is not None
    assert best.measurement.ratio == 0.25
    assert result.bytes_read == 256 * 2 * 16 * 2 * 2
    assert result.gbps(best) == pytest.approx(result.bytes_read / 0.25e-3 / 1e9)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TritonDecode.forward

    def wrong(self: TritonDecode, call: object, config: Config) -> object:
        out, lse = right(self, call, config)  # type: ignore[arg-type]
        assert lse is not None
        return (out * 1.5, lse) if config["block_n"] == 32 else (out, lse)

    monkeypatch.setattr(TritonDecode, "forward", wrong)
    result = measured(TINY, {"block_n=32": 0.1, "block_n=64": 0.5})
    assert result.best.config() is not None
    assert "block_n=64" in str(result.best)
    spoilt = [trial for trial in result.trials if "block_n=32" in str(trial.candidate)]
    assert spoilt
    assert all(trial.outcome is Outcome.WRONG_RESULT and trial.measurement is None for trial in spoilt)


def test_the_report_is_read_back_and_printed() -> None:
    result = measured(TINY, {"triton_decode": 0.5})
    report = decode.Report(device=H200, software=Software(), copy_gbps=1.0, results=(result,), failed=(), seconds=12.0)
    document = json.loads(json.dumps(codec.to_json(report)))
    assert codec.from_json(decode.Report, document) == report
    lines = decode.table(report).split("\n")
    assert len(lines) == 3
    assert "a copy moves 1 GB/s" in lines[0]
    # 32 KiB in half a millisecond; no cuDNN on a CPU; twice as fast as SDPA; the default is the best
    assert lines[2].split("  best")[0].split()[:9] == [
        "tiny", "0.5000", "0", "6.6%", "-", "-", "-", "2.000x", "1.000x",
    ]  # fmt: skip


def test_the_cells_are_within_reach() -> None:
    cells = decode.cells()
    assert len({cell.name for cell in cells}) == len(cells) == 8
    for cell in cells:
        assert TritonDecode().supports(cell.problem, H200) is None
        configs = decode.configs_of(cell, H200)
        space = TritonDecode().spaces(cell.problem, H200)["forward"]
        assert space is not None
        assert configs[0] == space.default
        assert all(config in space for config in configs)
        assert len({config["num_splits"] for config in configs}) == len(space.parameters[1].values)
        assert 10 <= len(decode.tiles(cell.problem, space)) <= 50
        assert cell.bytes_read > 3e7
        assert cell.rival.page_size == 0


def test_one_compilation_serves_all_batches_and_lengths() -> None:
    base = decode.cells()[0]
    long, short = (replace(base.problem, batch=b, kv_len=k) for b, k in ((1, 8192), (32, 131072)))
    config = Config.of(KERNEL, block_n=64, num_splits=4, num_warps=4, num_stages=3)
    assert decode.kernel_of(long, config) == decode.kernel_of(short, config)
    one = Config.of(KERNEL, block_n=64, num_splits=1, num_warps=4, num_stages=3)
    assert decode.kernel_of(long, config) != decode.kernel_of(long, one)
    assert decode.kernel_of(long, config) != decode.kernel_of(replace(long, page_size=64), config)
    assert decode.kernel_of(long, config) != decode.kernel_of(replace(long, kv_heads=1), config)
    alone = decode.jobs_of([base], H200)
    assert len(alone) < len(decode.configs_of(base, H200))
    assert decode.jobs_of([base, replace(base, problem=replace(base.problem, batch=4))], H200) == alone


def test_compilation_needs_neither_device_nor_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """17 TB of cache, for a GPU that is not here; a config that it has no room for is one line."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    problem = Problem(
        batch=4096, heads=64, kv_heads=8, q_len=1, kv_len=1 << 20, head_dim=128, varlen=True, page_size=48
    )
    config = Config.of(KERNEL, block_n=64, num_splits=4, num_warps=4, num_stages=3)
    candidate, other = Candidate.of(KERNEL, forward=config), Candidate("sdpa")
    small = replace(H200, shared_memory=1024)
    (line,) = ahead.compile_ahead([(problem, candidate), (problem, other)], small, workers=1)
    assert "OutOfResources" in line
    assert problem.key in line
    # no time at all: the first that ends is the last
    later = Candidate.of(KERNEL, forward=Config.of(KERNEL, **{**config.as_dict(), "block_n": 32}))
    jobs = [(problem, candidate), (problem, candidate), (problem, later)]
    assert ahead.compile_ahead(jobs, H200, workers=1, seconds=0) == []
    assert sorted(path.stem for path in tmp_path.rglob("*.cubin")) == ["attention_decode", "combine_splits"]


def test_the_bandwidth_of_a_copy() -> None:
    assert 0.01 < decode.copy_gbps(CpuClock(), CPU, 1 << 22) < 1e4


def compiled_in(folder: Path) -> dict[str, str]:
    """Return what is said of each compiled kernel, by its place in the cache."""
    return {str(path.relative_to(folder)): path.with_suffix(".json").read_text() for path in folder.rglob("*.cubin")}


def run_decode(job: tuple[Problem, Config]) -> None:
    problem, config = job
    TritonDecode().forward(random_call(problem, torch.device("cuda"), seed=0), config)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_kernels_compiled_ahead_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processes compiled lies in Triton's cache under the key that the real launch asks for."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = torch.device("cuda")
    problem = Problem(batch=2, heads=16, kv_heads=2, q_len=1, kv_len=4096, head_dim=64, varlen=True, page_size=32)
    config = Config.of(KERNEL, block_n=32, num_splits=8, num_warps=2, num_stages=3)
    job = problem, Candidate.of(KERNEL, forward=config)
    assert ahead.compile_ahead([job], devices.describe(device)) == []
    before = compiled_in(tmp_path)
    assert sorted(Path(place).stem for place in before) == ["attention_decode", "combine_splits"]
    # in a process of its own: what other tests compiled in this one may have settled which ptxas Triton takes here
    (done,) = run_each(run_decode, [(problem, config)], processes=1, seconds=120.0, memory_gib=64.0)
    assert done.outcome is Outcome.OK, done.message
    after = compiled_in(tmp_path)
    assert after == before, "\n".join(f"{place}: {said}" for place, said in sorted(after.items()))
