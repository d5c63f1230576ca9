"""What plans cost elsewhere: what ships is fitted on the committed landscapes, and any kernel's are taken."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tilewise.bench import near, near_fit
from tilewise.bench.landscape import Header, Landscape, Point, load_all, save
from tilewise.domain import codec, transfer
from tilewise.domain.answer import Match
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.device_gap import DeviceGap
from tilewise.domain.errors import SettingsError
from tilewise.domain.matching import by_device, match, predictors
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.software import Software
from tilewise.domain.space import Parameter
from tilewise.domain.trial import Outcome, now
from tilewise.kernels.device import describe

from ..domain.examples import answer

ROOT = Path(__file__).resolve().parents[2]
A40, A80, H200 = (
    Device(
        kind=DeviceKind.CUDA, name=name, arch=arch, units=100, memory_gib=memory, power_limit_w=watts,
        shared_memory=166912,
    )
    for name, arch, memory, watts in (
        ("NVIDIA A100", "sm_80", 40, 400), ("NVIDIA A100", "sm_80", 80, 400), ("NVIDIA H200", "sm_90", 141, 700),
    )
)  # fmt: skip
BLOCKS = (32, 64, 128, 256)
SIZES = list(itertools.product(BLOCKS, BLOCKS))
CONFIGS = [Config.of("triton_forward", block_m=m, block_n=n) for m, n in SIZES]


def recorded(problem: Problem, device: Device, *, torch_ratio: float | None = 2.0) -> Landscape:
    """What `tilewise landscape record` keeps of a GPU: ratios to the default config; here the best moves a little."""
    shift = math.log2(problem.q_len / 1024) / 8 + device.capability / 300
    noise = random.Random(f"{problem.key} {device.key}")
    points = tuple(
        Point(
            config=config,
            outcome=Outcome.OK,
            ratio=1 + 0.1 * (math.log2(m) - 6 - shift) ** 2 + noise.uniform(0, 0.05),
        )
        for (m, _), config in zip(SIZES, CONFIGS, strict=True)
    )
    base = Candidate.of("triton", forward=CONFIGS[5])
    header = Header(
        problem=problem, device=device, device_key=device.key, software=Software(triton="3.6.0"), role="forward",
        kernel="triton_forward", base=base, reference=base, torch_ratio=torch_ratio,
        parameters=(Parameter("block_m", BLOCKS), Parameter("block_n", BLOCKS)), default=CONFIGS[5], seed=0,
        noise=0.001, load=(0.0, 0.0), seconds=1.0, command="tilewise landscape record", started=now(),
    )  # fmt: skip
    return Landscape(header, points)


PROBLEMS = [
    Problem(batch=batch, heads=8, q_len=length, head_dim=dim, causal=True)
    for batch in (1, 2)
    for length in (1024, 2048, 4096)
    for dim in (64, 128)
]


class TestShipped:
    def test_the_models_and_the_report_are_those_of_the_committed_landscapes(self, tmp_path: Path) -> None:
        output, models = tmp_path / "near.json", tmp_path / "models.json"
        near.fit([ROOT / near.FOLDER], output, models)
        made, kept = (
            codec.from_json(near_fit.Report, json.loads(path.read_text()))
            for path in (output, ROOT / "bench" / "results" / "near_cpu.json")
        )
        assert [fit.near.pairs for fit in made.fits] == [fit.near.pairs for fit in kept.fits]
        assert (made.devices, made.recorded, made.left_out) == (kept.devices, kept.recorded, kept.left_out)
        shipped = transfer.read(transfer.PATH)
        for fit in made.fits:
            assert_same(fit.models, shipped[fit.kernels])
            assert_same(fit.models, next(each.models for each in kept.fits if each.kernels == fit.kernels))

    def test_what_is_stated_holds_9_times_in_10_on_problems_and_devices_that_were_not_seen(self) -> None:
        report = near_fit.report_of(load_all([ROOT / near.FOLDER]), command="")
        (fit,) = report.fits
        assert {device.arch for device in report.devices} == {"x86_64.avx512", "x86_64.avx2", "x86_64.sse2"}
        for held in (fit.near, fit.predicted):
            assert held.pairs > 500
            assert held.regret_coverage is not None
            assert held.drift_coverage is not None
            assert min(held.regret_coverage, held.drift_coverage) >= 0.9


def assert_same(one: transfer.Models, other: transfer.Models) -> None:
    """Compare models whose numbers another version of the solver may round otherwise."""
    for mine, theirs in ((one.near, other.near), (one.predicted, other.predicted)):
        assert mine is not None
        assert theirs is not None
        assert mine.reach == theirs.reach
        for here, there in ((mine.regret, theirs.regret), (mine.drift, theirs.drift)):
            assert codec.to_json(here) == pytest.approx(codec.to_json(there), abs=1e-6)


def test_landscapes_of_gpus_give_models_that_answers_are_served_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem in PROBLEMS:
        for device in (A40, A80, H200):
            save(recorded(problem, device), tmp_path / "landscapes")
    models = tmp_path / "models.json"
    transfer.write(models, {"other.kernel.inference": transfer.Models()})
    near.fit([tmp_path / "landscapes"], tmp_path / "report.json", models)
    assert set(transfer.read(models)) == {"other.kernel.inference", "triton.triton_forward.inference"}
    report = codec.from_json(near_fit.Report, json.loads((tmp_path / "report.json").read_text()))
    (fit,) = report.fits
    assert fit.devices == tuple(sorted(device.key for device in (A40, A80, H200)))
    assert fit.models.near is not None
    assert fit.models.predicted is not None
    assert fit.models.predicted.reach.arch == 1.0

    monkeypatch.setattr(transfer, "shipped", lambda: transfer.read(models))
    software = Software(triton="3.6.0")
    plan = Plan(Candidate.of("triton", forward=CONFIGS[6]))
    kept = by_device([replace(answer(PROBLEMS[0], device_key=H200.key, software=software), plan=plan)])
    there = match(PROBLEMS[0], A80.key, software, kept.get(A80.key, {}), predictors(A80.key, kept))
    assert (there.match, there.plan, there.measured_on) == (Match.PREDICTED, plan, H200.key)
    here = match(PROBLEMS[2], H200.key, software, kept[H200.key], predictors(H200.key, kept))
    assert (here.match, here.measured) == (Match.NEAR, PROBLEMS[0])


def test_what_says_nothing_is_left_out_with_the_reason() -> None:
    whole = [recorded(problem, device) for problem in PROBLEMS for device in (A40, A80)]
    old = recorded(PROBLEMS[0], H200, torch_ratio=None)
    training = recorded(replace(PROBLEMS[0], pass_=Pass.TRAINING), H200)
    roles = training.header.base.with_config("dq", Config.of("triton_dq", block_m=64))
    training = Landscape(replace(training.header, base=roles), training.points)
    report = near_fit.report_of([*whole, old, training], command="")
    assert [reason for _, reason in report.left_out] == [
        "torch's own choice was not measured beside it: record it again",
        "its plans have configs for several roles, of which one was varied",
    ]
    (fit,) = report.fits
    assert fit.near.regret_coverage is not None
    # with two devices no pair of them can be left out: nothing shows that it would hold for others
    assert (fit.models.predicted, fit.predicted.regret_coverage) == (None, None)
    with pytest.raises(SettingsError, match="nothing to fit: torch's own choice was not measured"):
        near_fit.report_of([old], command="")


def test_a_plan_that_does_not_run_there_is_counted_apart() -> None:
    one, other = (near_fit.Seen(recorded(problem, A40)) for problem in (PROBLEMS[0], PROBLEMS[2]))
    without = tuple(point for point in other.landscape.points if point.config != one.best[0])
    found, _, unsuited, _ = near_fit.pairs([one, near_fit.Seen(Landscape(other.landscape.header, without))])
    assert (len(found), unsuited) == (1, 1)


def test_a_bound_is_a_plane_that_few_lie_above() -> None:
    chance = random.Random(0)
    pairs = [
        near_fit.Pair(
            measured=PROBLEMS[0], asked=PROBLEMS[1], devices=("a", "b"), problem_distance=chance.uniform(0, 3),
            gap=DeviceGap(arch=chance.choice([0.0, 1.0, 2.0])), regret=0.0, drift=0.0,
        )
        for _ in range(2000)
    ]  # fmt: skip
    value = {id(pair): 0.2 + 0.1 * pair.problem_distance + 0.3 * pair.gap.arch + chance.random() for pair in pairs}
    found = near_fit.bound(pairs, lambda pair: value[id(pair)])
    assert (found.base, found.problem, found.device) == pytest.approx((1.15, 0.1, 0.3), abs=0.05)
    above = sum(value[id(pair)] > found.at(pair.problem_distance, pair.gap.distance) for pair in pairs)
    assert above / len(pairs) == pytest.approx(0.05, abs=0.01)
    falling = near_fit.bound(pairs, lambda pair: -pair.problem_distance)
    assert (falling.base, falling.problem, falling.device) == (0.0, 0.0, 0.0)


def test_a_sample_is_measured_beside_torchs_own_choice() -> None:
    problem = Problem(dtype=Dtype.FP32, batch=1, heads=2, q_len=128, head_dim=16, causal=True, window=(16, 0))
    configs = [Config.of("cpu_tiled", block_q=block, block_k=64, heads_per_chunk=1) for block in (32, 64)]
    found = near.landscape(problem, configs, rounds=3)
    assert [point.config for point in found.points] == configs
    assert found.header.reference == Candidate("sdpa")
    assert near_fit.torch_ratio(found) == 1.0
    assert near_fit.why_not(found) is None
    assert all(point.ratio is not None and point.ratio > 0 for point in found.points)
    sampled = near.sample(describe(torch.device("cpu")), 16)
    assert len(sampled) == 16
