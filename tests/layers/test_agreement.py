"""Ranks agree: 4 processes with gloo, each with answers of its own on disk."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tilewise
from tilewise.client.background import background
from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.kernels import device as devices
from tilewise.kernels.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PROBLEM = Problem(dtype=Dtype.FP32, batch=1, heads=2, q_len=64, head_dim=16, causal=True)
TRAINING = replace(PROBLEM, pass_=Pass.TRAINING)
PLAIN, SDPA = Candidate("plain"), Candidate("sdpa")

RANK = """
import json, logging, os, sys
import torch
import torch.distributed as dist

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=4)
logging.basicConfig(level=logging.WARNING)
import tilewise
from tests.layers.test_agreement import PROBLEM
from tilewise.kernels.backends import BACKENDS

said = {}
tilewise.configure(source=f"{sys.argv[1]}/source{rank}.json")
said["ready"] = tilewise.ready().snapshot_id
said["answer"] = str(tilewise.answer(PROBLEM, "cpu").plan)
if rank == 0:
    os.replace(f"{sys.argv[1]}/next.json", f"{sys.argv[1]}/source0.json")
said["refresh"] = tilewise.refresh().snapshot_id
if rank == 2:
    def broken(call, config):
        raise RuntimeError("no such instruction here")
    BACKENDS["plain"].forward = broken
warmed = tilewise.warmup([PROBLEM])
said["warmup"] = [str(warmed[0].candidate), warmed[0].demoted]
tilewise.configure(source=f"{sys.argv[1]}/source{rank}.json", snapshot="a" * 64)
try:
    tilewise.ready()
except tilewise.TilewiseError as error:
    said["pinned"] = type(error).__name__
with open(f"{sys.argv[1]}/said{rank}.json", "w") as file:
    json.dump(said, file)
print("done", flush=True)
sys.stdin.read()
"""


def known(problem: Problem, candidate: Candidate) -> Answer:
    device = devices.describe(CPU)
    return Answer(
        problem=problem,
        device_key=device.key,
        plan=Plan(candidate),
        match=Match.EXACT,
        software=devices.software(device.kind),
    )


def test_4_ranks_with_different_answers_run_those_of_the_first(tmp_path: Path) -> None:
    own = [known(PROBLEM, Candidate("plain")), None, known(PROBLEM, SDPA), known(replace(PROBLEM, batch=3), SDPA)]
    for rank, answer in enumerate(own):
        path = tmp_path / f"source{rank}.json"
        path.write_bytes(b"damaged" if answer is None else Snapshot.of([answer]).dumps())
    newer = Snapshot.of([known(PROBLEM, PLAIN), known(replace(PROBLEM, batch=5), SDPA)])
    (tmp_path / "next.json").write_bytes(newer.dumps())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            env={**environment, "RANK": str(rank), "TILEWISE_HOME": str(tmp_path / f"home{rank}")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n", process.communicate()[1]
    finally:
        for process in ranks:  # all are there to the end: one that hangs up early can take its neighbours along
            process.kill()
            process.communicate()
    said = [json.loads((tmp_path / f"said{rank}.json").read_text()) for rank in range(4)]
    first = own[0]
    assert first is not None
    assert [each["ready"] for each in said] == [Snapshot.of([first]).id] * 4
    assert [each["answer"] for each in said] == ["plain"] * 4
    assert [each["refresh"] for each in said] == [newer.id] * 4
    assert [each["warmup"][0] for each in said] == ["sdpa"] * 4
    assert [each["warmup"][1] for each in said] == [
        *["it failed on another rank"] * 2, "no such instruction here", "it failed on another rank"
    ]  # fmt: skip
    assert [each["pinned"] for each in said] == ["SnapshotError"] * 4


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
