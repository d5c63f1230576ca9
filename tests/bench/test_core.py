"""The benchmark of cores: bars judged on made-up rows, and the command from end to end on this CPU."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from tilewise.bench import ahead, bars, core, core_plot, core_report, core_row, portfolio
from tilewise.bench.records import teraflops
from tilewise.bench.vet import Job, Vetted, small, vet
from tilewise.cli import main as cli
from tilewise.cli.commands.bench import _standing
from tilewise.domain import codec
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import DeviceKind
from tilewise.domain.errors import SettingsError, TuningError
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.trial import Outcome, Stage, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.ahead import COMPILERS
from tilewise.kernels.backends import backend_named
from tilewise.kernels.backends.plain import Plain
from tilewise.kernels.backends.sdpa import SdpaMath
from tilewise.kernels.backends.tiled_cpu import TiledCpu
from tilewise.tuner.timing import CpuClock

from . import faults, made
from .clock import CallClock

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
KEY = "inference.fp32.b1.h2.kv2.q64.k64.d16.causal"
TINY = Problem.parse(KEY)
FORWARD, TRAINING, MASKS, D56, DECODE = bars.bars(DeviceKind.CUDA, Dtype.FP16)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how long a call takes: small sweeps between calls, short finals."""
    monkeypatch.setattr(CpuClock, "_CACHE_BYTES", 1 << 20)
    monkeypatch.setattr(core_row, "FINAL_SECONDS", 0.1)


# bars


def test_the_bars_are_those_of_the_issue() -> None:
    assert [len(bar.cells) for bar in (FORWARD, TRAINING, MASKS, D56, DECODE)] == [10, 10, 9, 1, 1]
    assert (FORWARD.geomean, FORWARD.each, TRAINING.geomean, TRAINING.each) == (0.86, 0.75, 1.2, 1.0)
    assert (MASKS.each, D56.each, DECODE.each) == (1.2, 0.9, 0.85)
    assert D56.cells[0].problem == FORWARD.cells[0].problem
    assert {cell.problem.pass_ for cell in TRAINING.cells} == {Pass.TRAINING}
    assert sum(cell.problem.bias_grad for cell in MASKS.cells) == 1
    for bar in (FORWARD, TRAINING, MASKS, D56):
        assert len({cell.name for cell in bar.cells}) == len(bar.cells)
        assert [cell for cell in bar.cells if backend_named("triton").supports(cell.problem, made.CARD)] == []
    assert bars.peers(DECODE.cells[0].problem, DeviceKind.CUDA) == ("sdpa_cudnn",)
    assert set(bars.peers(D56.cells[0].problem, DeviceKind.CUDA)) == {"sdpa_cudnn", "flash_cute", "sdpa_flash", "flex"}
    assert not {"flash_cute", "triton"} & {*bars.peers(MASKS.cells[0].problem, DeviceKind.CUDA)}
    assert "flash_cute" in bars.peers(replace(TINY, head_dim=32, v_head_dim=32), DeviceKind.CUDA)


def test_a_share_is_the_fastest_rivals_time_over_ours() -> None:
    ratios = {cell.problem: 1.0 + place / 10 for place, cell in enumerate(FORWARD.cells)}
    judged = {verdict.bar: verdict for verdict in bars.judge(made.row(p, r) for p, r in ratios.items())}
    forward = judged["forward"]
    shares = [0.9 / ratio for ratio in ratios.values()]  # FA4 is the fastest peer, at 0.9
    assert [share.share for share in forward.shares] == pytest.approx(shares)
    assert {share.rival for share in forward.shares} == {"flash_cute"}
    assert forward.shares[0].spread == pytest.approx(0.01)
    assert forward.geomean == pytest.approx(math.prod(shares) ** 0.1)
    assert forward.worst == pytest.approx(0.9 / 1.9)
    assert (forward.worst_cell, forward.met, forward.missing) == (FORWARD.cells[9].name, False, ())
    flex = next(each for each in forward.against if each.backend == "flex")
    assert flex.cells == 10
    assert flex.worst == pytest.approx(1.4 / 1.9)
    assert judged["d56"].worst == pytest.approx(1.0)  # cuDNN alone
    assert judged["d56"].met


@pytest.mark.parametrize(
    ("ours", "met"),
    [(0.9 / 0.87, True), (0.9 / 0.85, False), (0.9 / 0.70, False)],
)
def test_a_bar_is_met_by_geomean_and_by_every_cell(ours: float, met: bool) -> None:
    found = [made.row(cell.problem, ours) for cell in FORWARD.cells]
    assert bars.judge(found)[0].met is met
    # of nine cells only a broken bar can be told
    assert bars.judge(found[:9])[0].met is (None if 0.9 / ours >= 0.75 else False)
    one = [*found[:9], made.row(FORWARD.cells[9].problem, 0.9 / 0.74)]
    assert bars.judge(one)[0].met is False


def test_decoding_is_compared_with_a_copy() -> None:
    (verdict,) = bars.judge([made.row(DECODE.cells[0].problem, 0.5)])
    assert verdict.shares[0].share == pytest.approx(2000 / 2200)
    assert verdict.shares[0].rival_ms == pytest.approx(0.25 * 2000 / 2200)
    assert (verdict.shares[0].rival, verdict.met, verdict.against[0].backend) == (bars.COPY, True, "sdpa_cudnn")


def test_masks_are_compared_with_the_paths_of_torch_alone() -> None:
    (verdict,) = bars.judge([made.row(MASKS.cells[0].problem, 0.5)])
    assert verdict.shares[0].rival in ("sdpa", "sdpa_cudnn")
    assert verdict.shares[0].share == pytest.approx(2.0)
    assert verdict.met is None


def test_who_is_absent_is_said() -> None:
    peers = {name: ratio for name, ratio in made.PEERS.items() if name != "flash_cute"}
    absent = Trial(
        candidate=Candidate("flash_cute"), stage=Stage.FORWARD, outcome=Outcome.UNSUPPORTED, message="not installed"
    )
    (verdict,) = bars.judge([made.row(FORWARD.cells[1].problem, 1.0, peers, failed=(absent,))])
    assert verdict.without == ("FA4: unsupported: not installed (in every cell that was measured)",)
    assert verdict.shares[0].share == pytest.approx(1.0)
    everything = [made.row(cell.problem, 0.9, peers, failed=(absent,)) for cell in FORWARD.cells]
    verdict = bars.judge(everything)[0]
    assert (verdict.met, verdict.missing) == (None, ())
    assert core_report.standing(verdict) == "open, some rivals absent"
    wrong = Trial(candidate=made.OURS, stage=Stage.FORWARD, outcome=Outcome.WRONG_RESULT, message="off by 3")
    row = made.row(FORWARD.cells[1].problem, 1.0, failed=())
    entries = tuple(entry for entry in row.entries if entry.candidate != made.OURS)
    (verdict,) = bars.judge([replace(row, entries=entries, trials=(wrong, *row.trials[1:]))])
    assert verdict.shares == ()
    assert verdict.missing[1] == "dsv3 (2 x 2048, 128/128 heads, d 56), full: Triton wrong_result: off by 3"
    assert core_report.summary(verdict) == "nothing to compare in any of 10 cells"


# candidates


@pytest.mark.parametrize("bar", [FORWARD, TRAINING, MASKS], ids=lambda bar: str(bar.name))
def test_the_portfolio_is_feasible_and_takes_turns(bar: bars.Bar) -> None:
    for cell in bar.cells:
        spaces = backend_named("triton").spaces(cell.problem, made.CARD)
        found = portfolio.candidates(cell.problem, made.CARD, "triton", configs=3, explore=2)
        default = backend_named("triton").default(cell.problem, made.CARD)
        assert found[0] == default
        kernels = [(role, each) for role, space in spaces.items() for each in space.by_kernel]
        others = len(kernels) - len(spaces)  # their defaults are not the backend's
        assert len(found) == len(set(found)) == 1 + 5 * len(kernels) + others
        for role, space in kernels:
            of_kernel = [config for each in found[1:] if (config := config_of(each, role)).kernel == space.kernel]
            assert len(set(of_kernel) - {space.default}) == 5
            assert all(config in space for config in of_kernel)
        changed = {role for each in found[1:5] for role, config in each.configs if config != default.config(role)}
        assert changed == {*spaces}


def test_the_best_so_far_are_tried_where_they_fit() -> None:
    problem = FORWARD.cells[0].problem
    space = backend_named("triton").spaces(problem, made.CARD)["forward"]
    other = next(config for config in space if config != space.default)
    fits = Candidate.of("triton", forward=other)
    found = portfolio.candidates(
        problem, made.CARD, "triton", configs=0, best=[fits, made.OURS, Candidate("sdpa"), Candidate("triton")]
    )
    first, *others = (Candidate.of("triton", forward=each.default) for each in space.by_kernel)
    assert found == (first, fits, *others)


def test_the_best_of_each_role_are_combined() -> None:
    def candidate(**sizes: int) -> Candidate:
        return Candidate.of("triton", **{role: Config.of(role, block_m=size) for role, size in sizes.items()})

    def trial(ratio: float, **sizes: int) -> Trial:
        return Trial(
            candidate=candidate(**sizes), stage=Stage.BOTH, outcome=Outcome.OK, measurement=made.measured(ratio)
        )

    default = trial(1.0, forward=64, dkdv=64, dq=64)
    trials = [
        default,
        trial(0.9, forward=128, dkdv=64, dq=64),
        trial(1.1, forward=64, dkdv=32, dq=64),
        trial(0.8, forward=64, dkdv=64, dq=32),
        trial(0.1, forward=16, dkdv=16, dq=16),  # of an earlier run: its roles were not tried alone
    ]
    assert core_row.combined(default.candidate, trials) == candidate(forward=128, dkdv=64, dq=32)
    assert core_row.combined(default.candidate, []) == default.candidate


# other processes


def test_a_candidate_that_ends_its_process_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    default = backend_named("cpu_tiled").default(TINY, devices.describe(CPU))
    jobs = [
        Job(TINY, Candidate("sdpa")),
        Job(TINY, default),
        Job(TINY, Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled"))),
        Job(TINY, default, whole=True),
    ]
    found = vet(jobs, CPU, workers=1, seconds=120, task=faults.dies)
    assert [found[job].outcome for job in jobs] == [
        Outcome.WORKER_DIED, Outcome.OK, Outcome.FAILED, Outcome.OK,
    ]  # fmt: skip
    assert "ended with exit code -6" in found[jobs[0]].message
    assert "ConfigError" in found[jobs[2]].message


def test_a_candidate_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    job, other = (Job(TINY, Candidate(name)) for name in ("sdpa", "plain"))
    hung = vet([job], CPU, workers=1, seconds=60, job_seconds=0.5, task=faults.hangs)
    assert hung[job].outcome is Outcome.TIMED_OUT
    late = vet([job, other], CPU, workers=1, seconds=0.5, task=faults.hangs)
    assert [each.outcome for each in late.values()] == [Outcome.SKIPPED, Outcome.SKIPPED]


def test_what_compiles_without_its_device_is_not_run_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the peers; ours are looked at on small tensors all the same."""
    vetted: list[Job] = []
    compiled: list[tuple[Problem, Candidate]] = []

    def compiling(jobs: list[tuple[Problem, Candidate]], *_: object, **__: object) -> list[str]:
        compiled.extend(jobs)
        return ["sdpa_math of it: compile_failed, no luck"]

    def vetting(jobs: list[Job], *_: object, **__: object) -> dict[Job, Vetted]:
        vetted.extend(jobs)
        return {job: Vetted(Outcome.OK) for job in jobs}

    monkeypatch.setitem(COMPILERS, "sdpa_math", lambda *_: ())
    monkeypatch.setattr(ahead, "compile_ahead", compiling)
    monkeypatch.setattr(core, "vet", vetting)
    chosen, described, said = options(workers=1, configs=0), devices.describe(CPU), list[str]()
    this = replace(made.RUN, device=described)
    core._vet([bars.Cell("", "", TINY)], {TINY: ()}, chosen, CPU, this, said.append)
    assert compiled == [(TINY, Candidate("sdpa_math"))]
    assert {job.candidate.backend for job in vetted} == {"cpu_tiled"}
    assert re.match(r"compiled ahead: (\d+) of (\d+) in ", said[0])
    assert said[1] == "  sdpa_math of it: compile_failed, no luck"


def test_small_problems_are_of_the_same_kind() -> None:
    for bar in (FORWARD, TRAINING, MASKS):
        for cell in bar.cells:
            less = small(cell.problem)
            assert (less.batch, less.kv_heads, less.q_len, less.kv_len) == (min(cell.problem.batch, 2), 2, 512, 512)
            assert less.heads // less.kv_heads == cell.problem.heads // cell.problem.kv_heads
            assert less.mask == cell.problem.mask


# a run


def options(**given: object) -> core_row.Options:
    return replace(core_row.Options(only=(TINY,), backends=("sdpa", "sdpa_math", "plain"), configs=2), **given)  # type: ignore[arg-type]


def run(output: Path, **given: object) -> core.Result:
    return core.run(options(**given), CPU, output, command="tilewise bench core", tell=lambda _: None)


@pytest.mark.parametrize("named", [(), ("plain",)])
def test_rivals_of_a_bar_are_in_the_final_however_slow(
    named: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bars.judging(FORWARD.cells[0].problem, DeviceKind.CUDA) == FORWARD.rivals
    assert bars.judging(DECODE.cells[0].problem, DeviceKind.CUDA) == ()
    monkeypatch.setattr(core, "clock_for", lambda _: CallClock({"plain": 100.0}))
    monkeypatch.setattr(core_row, "judging", lambda *_: named)
    (row,) = run(tmp_path / "core.json").report.rows
    assert ("plain" in {entry.candidate.backend for entry in row.entries}) == bool(named)


def test_a_candidate_that_fails_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TiledCpu.forward

    def sometimes(self: TiledCpu, call: object, config: Config | None) -> object:
        if config is not None and config["heads_per_chunk"] == 1:
            raise RuntimeError("first line\nsecond line")
        out, lse = right(self, call, config)  # type: ignore[arg-type]
        return (out * 2, lse) if config is not None and config["block_q"] == 32 else (out, lse)

    def refuses(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(TiledCpu, "forward", sometimes)
    monkeypatch.setattr(SdpaMath, "forward", refuses)
    result = run(tmp_path / "core.json", explore=20)
    (row,) = result.report.rows
    outcomes = {str(trial.candidate): trial.outcome for trial in row.trials}
    assert outcomes["sdpa_math"] is Outcome.FAILED
    assert outcomes["cpu_tiled(block_k=64 block_q=64 heads_per_chunk=1)"] is Outcome.FAILED
    assert outcomes["cpu_tiled(block_k=64 block_q=32 heads_per_chunk=2)"] is Outcome.WRONG_RESULT
    assert "second line" not in "".join(trial.message for trial in row.trials)
    finalists = {str(entry.candidate) for entry in row.entries}
    assert finalists >= {"sdpa", "cpu_tiled(block_k=64 block_q=64 heads_per_chunk=2)"}
    assert not finalists & {name for name, outcome in outcomes.items() if outcome is not Outcome.OK}
    page = (tmp_path / "core.md").read_text()
    assert "| sdpa_math | failed | RuntimeError: out of luck | 1 | 1 |" in page


def test_the_next_reference_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(backend_named("sdpa").__class__, "forward", refuses)  # sdpa_math's too
    (row,) = run(tmp_path / "core.json").report.rows
    assert row.reference == Candidate("plain")
    monkeypatch.setattr(Plain, "forward", refuses)
    result = run(tmp_path / "core.json", again=True)
    assert len(result.failed) == 1
    assert "nothing that ratios could be taken against runs on" in result.failed[0]
    assert core_report.read(tmp_path / "core.json").rows == (row,)


def test_a_candidate_that_spoils_the_device_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(_: SdpaMath, call: object, config: Config | None) -> None:  # noqa: ARG001
        calls.append(config)
        raise RuntimeError("illegal access")

    monkeypatch.setattr(SdpaMath, "forward", fails)
    monkeypatch.setattr(core_row, "usable", lambda _: False)
    with pytest.raises(TuningError, match=r"sdpa_math left .* unusable on inference.*run the same command again"):
        run(tmp_path / "core.json")
    assert len(calls) == 1
    result = run(tmp_path / "core.json")
    assert len(calls) == 1
    (trial,) = [t for t in result.report.rows[0].trials if t.candidate.backend == "sdpa_math"]
    assert (trial.outcome, trial.message) == (Outcome.WORKER_DIED, "it left the device unusable")


def test_every_role_is_tried_alone_and_the_best_together() -> None:
    """Our kernels in Triton's interpreter, forward and backward, on tensors of the CPU."""
    card = replace(made.CARD, arch="sm_100")  # the interpreter knows no warp-specialised kernels
    problem = Problem.parse("training.fp16.b1.h2.kv1.q32.k32.d16.causal")
    default = backend_named("triton").default(problem, card)
    tried = portfolio.candidates(problem, card, "triton", configs=1)[1:]
    forward, dkdv, dq = (
        next(each for each in tried if each.config(role) != default.config(role)) for role in ("forward", "dkdv", "dq")
    )
    best = default.with_config("forward", config_of(forward, "forward")).with_config("dq", config_of(dq, "dq"))
    costs = {str(best): 0.3, str(forward): 0.6, str(dq): 0.7, str(dkdv): 0.9, str(default): 0.8, "sdpa": 1.0}
    shared = core_row.Shared(
        device=CPU,
        run=replace(made.RUN, device=card),
        options=options(backends=("sdpa", "sdpa_math", "flex"), configs=1),
        clock=CallClock(costs),
        vetted={Job(problem, dkdv): Vetted(Outcome.TIMED_OUT, "not done")},
        until=math.inf,
    )
    row = core_row.Table(problem, shared, ()).row()
    assert row.entries[0].candidate == best
    assert [entry.candidate for entry in row.entries[:4]] == [best, forward, dq, default]
    assert row.entries[0].ratio == pytest.approx(0.3)
    kept = {trial.candidate: trial for trial in row.trials}
    assert (kept[dkdv].outcome, kept[dkdv].message) == (Outcome.TIMED_OUT, "not done")
    assert all(kept[each].error is not None for each in (best, forward, dq, default))
    assert row.why_absent("flex") is not None  # on no GPU it cannot run
    assert row.entries[0].rate == pytest.approx(teraflops(problem, 0.3))


def config_of(candidate: Candidate, role: str) -> Config:
    config = candidate.config(role)
    assert config is not None
    return config


@pytest.mark.gpu
def test_a_row_on_a_gpu(tmp_path: Path) -> None:
    problem = Problem.parse("training.fp16.b1.h4.kv2.q256.k256.d64.causal")
    chosen = core_row.Options(only=(problem,), backends=("sdpa_cudnn", "flex"), configs=2, workers=4)
    said: list[str] = []
    result = core.run(chosen, torch.device("cuda"), tmp_path / "core.json", command="test", tell=said.append)
    assert result.failed == ()
    (row,) = result.report.rows
    assert {"triton", "flex", "sdpa_cudnn"} <= {entry.candidate.backend for entry in row.entries}
    assert {trial.outcome for trial in row.trials} == {Outcome.OK}
    assert row.entries[0].measurement.clock_mhz
    assert re.match(r"compiled ahead: (\d+) of \1 in ", said[1])


def test_rows_are_kept_added_and_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "core.json"
    other = replace(TINY, causal=False)
    first = run(output, only=(TINY, other), seconds=1e-9)  # the first row always starts
    assert (len(first.report.rows), first.left) == (1, 1)
    second = run(output, only=(TINY, other))
    assert [row.problem for row in second.report.rows] == [TINY, other]
    assert second.report.rows[0] == first.report.rows[0]
    third = run(output, only=(TINY, other))
    assert (third.report.rows, third.left, third.failed) == (second.report.rows, 0, ())
    again = run(output, again=True)
    assert again.report.rows[1] == second.report.rows[1]
    assert again.report.rows[0] != second.report.rows[0]
    assert core_report.read(output) == again.report

    software = replace(devices.software(DeviceKind.CPU), torch="another")
    monkeypatch.setattr(devices, "software", lambda _: software)
    newer = run(output)
    assert newer.report.rows[0].run.software.torch == "another"
    assert "more than one version of the software" in (tmp_path / "core.md").read_text()


def test_a_standing_answer_is_tried(tmp_path: Path) -> None:
    space = backend_named("cpu_tiled").spaces(TINY, devices.describe(CPU))["forward"]
    standing = Candidate.of("cpu_tiled", forward=next(iter(space)))
    assert standing not in portfolio.candidates(TINY, devices.describe(CPU), "cpu_tiled", configs=0)
    chosen = options(configs=0)
    result = core.run(chosen, CPU, tmp_path / "core.json", command="test", standing={TINY: standing}, tell=print)
    assert standing in [trial.candidate for trial in result.report.rows[0].trials]


def test_a_report_of_another_device_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "core.json"
    core_report.write(core_report.opened(output, made.RUN).with_row(made.row(FORWARD.cells[0].problem, 1.0)), output)
    before = output.read_bytes()
    with pytest.raises(SettingsError, match=r"holds rows of made-up\.sm90.*; name another file with --output"):
        run(output)
    output.with_name("no.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"no\.json is no report of `tilewise bench core`"):
        run(output.with_name("no.json"))
    assert output.read_bytes() == before


def test_the_rows_of_a_gpu_are_chosen_by_bar() -> None:
    def problems(*groups: str, dtype: Dtype = Dtype.FP16) -> list[Problem]:
        return [c.problem for c in core.chosen(core_row.Options(groups=groups, dtype=dtype), DeviceKind.CUDA)]

    assert len(problems()) == 10 + 10 + 9 + 1  # head_dim 56 is a row of the forward
    assert problems("d56") == problems("forward")[:1]
    assert {problem.dtype for problem in problems("forward", "masks", dtype=Dtype.BF16)} == {Dtype.BF16}
    only = core_row.Options(only=(MASKS.cells[3].problem, TINY))
    assert [c.name for c in core.chosen(only, DeviceKind.CUDA)] == ["bool mask (B, 1, Q, K), forward", KEY]
    with pytest.raises(SettingsError, match=r"no rows masks on a cpu device; expected some of forward"):
        core.chosen(core_row.Options(groups=("masks",)), DeviceKind.CPU)


# the plot and the command


def whole_report() -> core_report.Report:
    speeds = {"forward": 1.0, "forward and backward": 0.6, "with the bias's gradient": 0.75, "full": 1.1}
    report = core_report.opened(Path("nowhere.json"), made.RUN)
    for row in made.rows(lambda cell: speeds.get(cell.variant, 1.05)):
        report = report.with_row(row)
    return report


def test_the_plot_has_a_panel_per_bar(tmp_path: Path) -> None:
    report = whole_report()
    figure = core_plot.figure(report)
    assert figure is not None
    assert [len(panel.patches) for panel in figure.axes] == [10, 10, 9, 1, 1]
    for panel, verdict in zip(figure.axes, report.verdicts, strict=True):
        widths = [patch.get_width() for patch in panel.patches if isinstance(patch, Rectangle)]
        assert widths == [share.share for share in verdict.shares]
        drawn = {float(np.asarray(line.get_xdata())[0]) for line in panel.lines}
        assert drawn == {1.0, verdict.geomean_bar or 1.0, verdict.each_bar or 1.0}
        assert [label.get_text() for label in panel.get_yticklabels()] == [share.cell.name for share in verdict.shares]
    core_plot.draw(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert core_plot.figure(core_report.opened(Path("nowhere.json"), made.RUN)) is None


def test_the_page_has_a_table_per_bar() -> None:
    report = whole_report()
    text = core_report.page(report)
    assert text.count("\n## ") == 5
    assert (
        "| dsv3 (2 x 2048, 128/128 heads, d 56), causal | 0.5250 | 229 | 0.4500 | 0.5000 | 0.5000 | 0.7000 | 0.9500 "
        "| 0.857 ± 0.010 | FA4 | 0.20% | 2026-01-02 03:04 | triton(block_m=64 block_n=64) |"
    ) in text
    assert "Against cuDNN: geomean " in text
    assert "**0.909 (bar 0.85): met.**" in text
    assert json.loads(json.dumps(codec.to_json(report))) == codec.to_json(
        codec.from_json(core_report.Report, codec.to_json(report))
    )


def test_the_command_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tilewise(*arguments: str, command: tuple[str, ...] = ("bench", "core")) -> int:
        where = ["--output", str(output)] if command == ("bench", "core") else []
        monkeypatch.setattr(sys, "argv", ["tilewise", *command, *where, *arguments])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    output = tmp_path / "core.json"
    assert tilewise("--problem", KEY, "--device", "cpu", "--trials", "3", command=("tune",)) == 0
    (standing,) = _standing(devices.describe(CPU).key, None).items()
    assert standing[0] == TINY
    assert _standing("another.device", None) == {}

    tiny = replace(TINY, causal=False, window=(16, 0))
    chosen = ["--device", "cpu", "--only", KEY, "--only", tiny.key, "--backends", "sdpa,sdpa_math", "--configs", "1"]
    assert tilewise(*chosen) == 0
    printed = capsys.readouterr()
    assert "2 of 2 rows to measure" in printed.err
    assert "other  2/2" in printed.out
    assert sorted(path.name for path in tmp_path.glob("core.*")) == ["core.json", "core.md", "core.png"]

    document = json.loads(output.read_text())
    (verdict,) = document["verdicts"]
    shares = []
    for row in document["rows"]:
        ratios = {entry["candidate"]["backend"]: entry["measurement"]["ratio"] for entry in reversed(row["entries"])}
        mine = ratios.pop("cpu_tiled")
        shares.append(min(ratios.values()) / mine)
        assert row["run"]["device_key"] == document["device_key"]
        assert row["run"]["command"].startswith(f"tilewise bench core --only {KEY} --only {tiny.key} --device cpu")
        assert str(tmp_path) not in row["run"]["command"]
    assert verdict["geomean"] == pytest.approx(math.sqrt(shares[0] * shares[1]))
    assert verdict["worst"] == pytest.approx(min(shares))
    assert f"geomean {verdict['geomean']:.3f}, worst {verdict['worst']:.3f}" in (tmp_path / "core.md").read_text()

    assert tilewise(*chosen, "--json") == 0
    printed = capsys.readouterr()
    assert "0 of 2 rows to measure" in printed.err
    assert json.loads(printed.out)["verdicts"] == document["verdicts"]
    (tmp_path / "core.md").unlink()
    (tmp_path / "core.png").unlink()
    assert tilewise("--render") == 0
    assert (tmp_path / "core.md").exists()
    assert (tmp_path / "core.png").exists()
    assert json.loads(output.read_text())["rows"] == document["rows"]

    assert tilewise("--rows", "masks", "--device", "cpu") == 2
    assert "no rows masks on a cpu device" in capsys.readouterr().err
    assert tilewise("--dtype", "fp32") == 2
    assert tilewise("--only", "nonsense") == 2
    assert tilewise("--only", KEY, "--backends", "magic", "--device", "cpu") == 2
    assert "unknown backend 'magic'" in capsys.readouterr().err
