"""Tunings from scratch: real commands, a final of their winners, and what the page says of both."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tilewise.bench import landscape, report_file, tunings
from tilewise.bench.tunings import Compared, Report, Row, Tuning, optima_of, page, tuned
from tilewise.domain.config import Candidate, Config
from tilewise.domain.errors import TuningError
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement
from tilewise.tuner.progress import Spent

PROBLEM = Problem.parse("inference.fp32.b1.h2.kv2.q64.k64.d16.causal.window8")
SDPA, PLAIN = Candidate("sdpa"), Candidate("plain")


def tuning(seed: int, winner: Candidate, seconds: float = 10.0) -> Tuning:
    spent = Spent(start=1.0, prepare=2.0, search=seconds / 2, final=0.5)
    return Tuning(seed=seed, seconds=seconds, spent=spent, outcomes=(), winner=winner, noise=0.0, reason="")


def entry(candidate: Candidate, ratio: float, *, default: bool = False, optimum: bool = False) -> Compared:
    measured = Measurement(median_ms=ratio, p20_ms=ratio, p80_ms=ratio, samples=9, ratio=ratio)
    return Compared(candidate=candidate, measurement=measured, default=default, optimum=optimum)


def tiled(block: int) -> Candidate:
    return Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=block, block_k=64, heads_per_chunk=1))


def row(*winners: Candidate) -> Row:
    return Row(
        problem=PROBLEM,
        budget="quick",
        software=Software(),
        tunings=tuple(tuning(seed, winner, 10.0 + seed) for seed, winner in enumerate(winners)),
        noise=0.001,
        compared=(
            entry(SDPA, 1.0, default=True),
            entry(PLAIN, 0.9, default=True),
            entry(tiled(16), 0.5),
            entry(tiled(32), 0.6),
            entry(tiled(64), 0.48, optimum=True),
        ),
    )


def test_winners_are_compared_inside_one_final() -> None:
    found = row(tiled(16), tiled(32), tiled(16))
    assert found.of_optimum == pytest.approx(0.48 / 0.6)  # the slowest winner's
    assert found.over_defaults == pytest.approx(0.9 / 0.5)  # the median winner's, over the faster default
    assert found.apart == pytest.approx(0.2)
    before = replace(found, compared=())
    assert (before.of_optimum, before.over_defaults, before.over_others, before.apart) == (None, None, None, None)
    assert replace(found, compared=found.compared[:4]).of_optimum is None
    failed = replace(row(tiled(128)), compared=found.compared)  # its winner was not right in the final
    assert (failed.of_optimum, failed.over_defaults, failed.apart) == (None, None, None)
    ours = replace(found, compared=(*found.compared, entry(tiled(8), 0.45, default=True)))
    assert ours.over_defaults == pytest.approx(0.45 / 0.5)
    assert ours.over_others == pytest.approx(0.9 / 0.5)
    shown = page(Report(command="c", device_key="d", rows=(ours, replace(found, compared=(), budget="normal"))))
    assert (
        "Inference, quick, 1 of 1 problems, over the best default: geometric mean 0.900, worst 0.900; over the others' "
        "best default: 1.800, worst 1.800."
    ) in shown
    assert "normal, 0 of 1" not in shown
    lines = page(Report(command="c", device_key="d", rows=(found,))).splitlines()
    line = next(each for each in lines if each.startswith(f"| {PROBLEM.key}"))
    assert line.split(" | ")[2:] == [
        "3",
        "11.0",
        "12.0",
        "1.0, 2.0, 5.5, 0.5, 2.0",
        "80.0%",
        "1.800",
        "1.800",
        "20.0%",
        "0.1% |",
    ]


def test_the_optimum_is_of_the_same_problem_and_device() -> None:
    (path,) = landscape.FOLDER.glob("*b1.h64.kv64.q1100*")
    recorded = landscape.load(path)
    problem, key = recorded.header.problem, recorded.header.device_key
    found = optima_of(problem, key, [recorded])
    best = min((p for p in recorded.points if p.ratio is not None), key=lambda p: p.ratio or 0.0)
    assert len(found) == tunings.OPTIMA
    assert found[0].config("forward") == best.config
    assert optima_of(problem, "another", [recorded]) == optima_of(PROBLEM, key, [recorded]) == ()


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(TuningError, match=r"no_such_backend(.|\n)*expected one of"):
        tuned(PROBLEM, "quick", 0, ["--backends", "no_such_backend"])


def test_whole_commands_are_timed_and_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tunings.json"
    arguments = ["--problem", PROBLEM.key, "--budget", "quick", "--device", "cpu", "--output", str(output)]
    arguments += ["--tune", "--trials 4 --backends cpu_tiled"]
    monkeypatch.setattr(sys, "argv", ["tunings", *arguments])
    tunings.main()
    report = report_file.load(Report, output, command=tunings.COMMAND)
    (found,) = report.rows
    (one,) = found.tunings
    spent = one.spent
    assert min(spent.start, spent.prepare, spent.search, spent.final) > 0
    # all of the command's seconds but those that its processes take to end, and a machine with other work longer
    assert 0 < one.seconds - (spent.start + spent.prepare + spent.search + spent.final) < 3
    assert 0 < dict(one.outcomes)["ok"] <= 4
    candidates = [each.candidate for each in found.compared]
    assert candidates[0] == SDPA
    assert one.winner in candidates
    assert found.over_defaults is not None
    assert PROBLEM.key in capsys.readouterr().out
    before = output.read_bytes()
    tunings.main()
    assert output.read_bytes() == before
