"""The benchmark of other backends at small sizes on this CPU: what fails is a row, and the report is one document."""

import json

import pytest
import torch

from tilewise.bench import peers
from tilewise.domain import codec
from tilewise.domain.config import Candidate
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels.backends import backend_named, flash_cute
from tilewise.kernels.backends.flex import Flex
from tilewise.kernels.backends.plain import Plain
from tilewise.tuner.timing import clock_for

CPU = torch.device("cpu")
SMALL = Problem(batch=1, heads=2, q_len=64, head_dim=16, causal=True, dtype=Dtype.FP32)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SHAPES", {"llama70": SMALL, "dsv3": SMALL})
    monkeypatch.setattr(peers, "PEERS", ("sdpa", "sdpa_math", "plain", "flash_cute"))


def test_every_backend_is_timed_or_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(Plain, "forward", broken)
    report = peers.measure(CPU, 20)
    assert [held.name for held in report.defaults] == ["llama70", "dsv3"]
    assert report.searches == ()
    trials = {trial.candidate.backend: trial for trial in report.defaults[0].trials}
    assert {name: trial.outcome for name, trial in trials.items()} == {
        "sdpa": Outcome.OK,
        "sdpa_math": Outcome.OK,
        "plain": Outcome.FAILED,
        "flash_cute": Outcome.UNSUPPORTED,
    }
    assert trials["sdpa"].measurement is not None
    assert trials["sdpa"].measurement.ratio == 1
    text = "\n".join(peers.lines(report.defaults[0]))
    assert text.count(" ms ") == 2
    assert "unsupported: flash_cute: needs a CUDA device" in text
    assert codec.from_json(peers.Report, json.loads(json.dumps(codec.to_json(report)))) == report


def test_a_search_ends_on_time_and_holds_a_final(monkeypatch: pytest.MonkeyPatch) -> None:
    table = peers.Table("llama70", CPU, clock_for(CPU))
    space = backend_named("cpu_tiled").spaces(SMALL, table.device).get("forward")
    assert space is not None
    monkeypatch.setattr(peers, "configs", lambda _: iter(space))
    late = peers.search(table, "cpu_tiled", until=0.0)
    assert late is not None
    assert len(late.trials) == 3
    held = peers.search(table, "cpu_tiled", until=float("inf"))
    assert held is not None
    assert {trial.candidate for trial in held.trials} >= {
        Candidate.of("cpu_tiled", forward=config) for config in (space.default, *list(space)[:3])
    }
    settled = [trial for trial in held.trials if trial.measurement and trial.measurement.power_state == "settled"]
    assert 3 <= len(settled) <= 3 + peers.FINALISTS + 1


@pytest.mark.parametrize("backend", ["flex", "flash_cute"])
def test_the_listed_configs_are_distinct_and_feasible(backend: str) -> None:
    card = Device(kind=DeviceKind.CUDA, name="H200", arch="sm_90", units=132, memory_gib=141, shared_memory=232448)
    problem = Problem(batch=1, heads=64, kv_heads=8, q_len=4096, head_dim=128, causal=True)
    space = (
        Flex().spaces(problem, card).get("forward")
        if backend == "flex"
        else flash_cute._space(128, 128, True, 9, 232448)
    )
    assert space is not None
    listed = list(peers.configs(backend))
    assert len(listed) == len(set(listed)) == 20
    assert [str(config) for config in listed if config not in space] == []
    assert space.default not in listed
