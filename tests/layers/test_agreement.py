"""Ranks agree: processes with gloo or NCCL, each with answers of its own on disk."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import tilewise
from tilewise.client.background import background
from tilewise.domain import transfer
from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.device import Device
from tilewise.domain.device_gap import DeviceGap
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.space import SearchSpace
from tilewise.domain.transfer import Bound, CostModel, Models
from tilewise.kernels import device as devices
from tilewise.kernels.backends import BACKENDS
from tilewise.layers import agreement

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PROBLEM = Problem(dtype=Dtype.FP32, batch=1, heads=2, q_len=64, head_dim=16, causal=True)
TRAINING = replace(PROBLEM, pass_=Pass.TRAINING)
PLAIN, SDPA = Candidate("plain"), Candidate("sdpa")


def known(problem: Problem, candidate: Candidate) -> Answer:
    device = devices.describe(CPU)
    return Answer(
        problem=problem,
        device_key=device.key,
        plan=Plan(candidate),
        match=Match.EXACT,
        software=devices.software(device.kind),
    )


def ranks(number: int, report: Path) -> dict[str, Any]:
    """Run bench/ranks.py on as many ranks and return its report."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    done = subprocess.run(
        [*command, "-m", "tilewise.bench.ranks", "--output", str(report)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["right"]
    return found


def test_4_ranks_with_different_answers_run_those_of_the_first_and_fail_alike(tmp_path: Path) -> None:
    found = ranks(4, tmp_path / "report.json")
    assert (found["ranks"], found["backend"]) == (4, "nccl" if torch.cuda.device_count() >= 4 else "gloo")
    assert len(found["slowest_s"]) == 8
    assert max(found["slowest_s"].values()) < 30  # nobody waited for who had left


@pytest.mark.gpu
def test_2_ranks_with_a_gpu_each_agree_through_nccl(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert ranks(2, tmp_path / "report.json")["backend"] == "nccl"


def test_a_group_that_moves_tensors_of_gpus_alone_is_sent_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL's; one that has a backend for each kind is sent what lies on the CPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for config, bound, where in (
        ("cuda:nccl", None, "cuda:3"),
        ("cuda:nccl", torch.device("cuda:1"), "cuda:1"),
        ("cpu:gloo,cuda:nccl", torch.device("cuda:1"), "cpu"),
        ("cpu:gloo", None, "cpu"),
        ("cpu:mpi", None, "cpu"),
    ):
        monkeypatch.setattr(dist, "get_backend_config", lambda _group, config=config: config)
        group = SimpleNamespace(bound_device_id=bound)
        assert agreement._device(group) == torch.device(where)  # type: ignore[arg-type]


def test_a_refresh_between_forward_and_recomputation_changes_neither(
    configured: Callable[..., Path], ran: list[Candidate]
) -> None:
    shape = (1, 64, 2, 16)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def step() -> torch.Tensor:
        result: torch.Tensor = checkpoint(
            lambda *tensors: tilewise.attention(*tensors, causal=True), query, key, value, use_reentrant=False
        )
        return result

    path = configured(known(TRAINING, PLAIN))
    tilewise.ready(device="cpu")
    before = step()
    path.write_bytes(Snapshot.of([known(TRAINING, SDPA)]).dumps())
    tilewise.refresh(device="cpu")
    with torch.no_grad():
        tilewise.attention(query, key, value, causal=True)  # another problem is resolved under the new answers
    before.sum().backward()
    assert [candidate.backend for candidate in ran] == ["plain", "sdpa", "plain"]
    ran.clear()
    step().sum().backward()
    assert [candidate.backend for candidate in ran] == ["sdpa", "sdpa"]


def test_warmup_demotes_what_fails_here_and_says_why(
    configured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(PROBLEM, head_dim=32)
    configured(known(PROBLEM, PLAIN), known(TRAINING, PLAIN), known(other, Candidate("no_such_backend")))
    good, learned, unknown = tilewise.warmup([PROBLEM, TRAINING, other], device="cpu")
    assert (good.candidate, good.match, good.demoted) == (PLAIN, Match.EXACT, "")
    assert (learned.candidate, learned.demoted) == (PLAIN, "")
    assert unknown.candidate == SDPA

    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction here")

    monkeypatch.setattr(BACKENDS["plain"], "forward", broken)
    (bad,) = tilewise.warmup([PROBLEM], device="cpu")
    assert (bad.candidate, bad.demoted) == (SDPA, "no such instruction here")
    query = torch.randn(1, 64, 2, 16)
    with torch.no_grad():
        tilewise.attention(query, query, query, causal=True)  # torch's own choice, without trying again


def test_warmup_of_an_invalid_config_launches_nothing(configured: Callable[..., Path], ran: list[Candidate]) -> None:
    config = Config.of("cpu_tiled", block_q=3, block_k=5, heads_per_chunk=7)
    configured(known(PROBLEM, Candidate.of("cpu_tiled", forward=config)))
    (found,) = tilewise.warmup([PROBLEM], device="cpu")
    assert found.candidate == SDPA
    assert [candidate.backend for candidate in ran] == ["sdpa"]


def test_a_predicted_plan_runs_only_where_its_config_is_valid_here(
    configured: Callable[..., Path], ran: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another device measured is not known to be possible here: it is held against the space of this one."""
    sure = Bound(base=0.0, problem=0.0)
    model = CostModel(regret=sure, drift=sure, reach=DeviceGap(size=9))
    monkeypatch.setattr(transfer, "shipped", lambda: {"cpu_tiled.cpu_tiled.inference": Models(predicted=model)})
    described = devices.describe(CPU)
    other = replace(described, units=described.units * 2).key
    long = replace(PROBLEM, q_len=256, kv_len=256)
    good = devices_space(long, described).default
    bad = Config.of("cpu_tiled", block_q=3, block_k=5, heads_per_chunk=7)
    configured(
        *(
            replace(
                known(problem, Candidate.of("cpu_tiled", forward=config)),
                device_key=other, expected_ms=1.0, baseline_ms=2.0, interval=(0.9, 1.1),
            )
            for problem, config in ((long, good), (PROBLEM, bad))
        )
    )  # fmt: skip
    assert [tilewise.answer(problem, "cpu").match for problem in (long, PROBLEM)] == [Match.PREDICTED] * 2
    right, wrong = tilewise.warmup([long, PROBLEM], device="cpu")
    assert (right.candidate, right.match) == (Candidate.of("cpu_tiled", forward=good), Match.PREDICTED)
    assert wrong.candidate == SDPA
    assert [candidate.backend for candidate in ran] == ["cpu_tiled", "sdpa"]


def devices_space(problem: Problem, device: Device) -> SearchSpace:
    return BACKENDS["cpu_tiled"].spaces(problem, device)["forward"]


def test_calls_are_counted_by_answer(configured: Callable[..., Path]) -> None:
    configured(known(PROBLEM, PLAIN))
    query, longer = torch.randn(1, 64, 2, 16), torch.randn(1, 128, 2, 16)
    with torch.no_grad():
        for _ in range(3):
            tilewise.attention(query, query, query, causal=True)
        tilewise.attention(longer, longer, longer, causal=True)
        tilewise.attention(longer, longer, longer, causal=True, backend="plain")  # no answer decided that
    client = tilewise.layers.session.client_for(CPU)
    ((usage, counts),) = client._usage.batches("any.device", None)
    assert {(use.problem, use.match): use.calls for use in usage.uses} == {
        (PROBLEM, Match.EXACT): 3,
        (replace(PROBLEM, q_len=128, kv_len=128), Match.DEFAULT): 1,
    }
    client._usage.told(counts)
    assert list(client._usage.batches("any.device", None)) == []
    tilewise.ready(device="cpu")
    assert client not in background._turns  # a file is neither followed nor told
