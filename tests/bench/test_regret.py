"""Verdicts in turn and interleaved, on a device that gets slower while it works."""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tilewise.bench import regret
from tilewise.bench.regret import compare, table
from tilewise.domain.errors import TuningError
from tilewise.domain.problem import Problem
from tilewise.kernels.backends import backend_named
from tilewise.tuner.steps import Step
from tilewise.tuner.timing import CpuClock

CPU = torch.device("cpu")
PROBLEM = Problem.parse("inference.fp32.b1.h4.kv4.q96.k96.d16.causal.window16")


class Heating(CpuClock):
    """A device that is a tenth slower after each run, and cool again after ten; between single calls all are alike."""

    def __init__(self) -> None:
        super().__init__()
        self._runs = itertools.count()
        self._speeds: dict[int, float] = {}

    def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
        heat = 1 + 0.1 * (next(self._runs) % 10)
        return [[heat * self._speed(step)] * rounds for step in steps]

    def _speed(self, step: Step) -> float:
        """A per cent apart, in the order in which they are first seen; the same candidate has the same."""
        cells = [cell.cell_contents for cell in getattr(step, "__closure__", None) or ()]
        key = next(hash(str(content)) for content in cells if type(content).__name__ == "Candidate")
        return self._speeds.setdefault(key, 1 + 0.01 * len(self._speeds))


class Even(Heating):
    """The same without the heat."""

    def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
        return [[self._speed(step)] * rounds for step in steps]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuClock, "_CACHE_BYTES", 1 << 20)
    monkeypatch.setattr(CpuClock, "settle", lambda _, __: "settled")
    quick = [backend_named(name) for name in ("sdpa", "sdpa_math", "cpu_tiled", "plain")]  # others compile for long
    monkeypatch.setattr(regret, "supporting", lambda _, __: quick)


def test_interleaved_verdicts_do_not_err_where_those_in_turn_do() -> None:
    found = compare(PROBLEM, CPU, Heating(), repeats=4, most=5, configs=2)
    assert len(found.candidates) >= 3
    assert found.interleaved.regrets == (0.0,) * 4
    assert set(found.interleaved.chosen) == {found.candidates[0]}
    number = len(found.candidates)
    assert len(found.sequential.pairs) == len(found.interleaved.pairs) == number * (number - 1) // 2
    assert max(pair.spread for pair in found.interleaved.pairs) == pytest.approx(0)
    assert max(found.sequential.regrets) > 0
    assert max(pair.spread for pair in found.sequential.pairs) > 0.1
    # one of the pair is timed a tenth hotter in most repeats
    assert found.bias > 0.05
    lines = table([found]).splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:4]] == ["in turn", "interleaved"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:4]]
    assert {len(row) for row in cells} == {9}
    assert (cells[3][6:], cells[2][8]) == (["0.00%", "0.00%", "-"], f"{found.bias:.2%}")


@pytest.mark.parametrize(("close", "furthest", "number"), [(1.0, 1.5, 2), (1.0, 1.005, 0), (1.5, 1.5, 4)])
def test_where_few_are_close_the_next_are_taken(
    close: float, furthest: float, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regret, "CLOSE", close)
    monkeypatch.setattr(regret, "FURTHEST", furthest)
    monkeypatch.setattr(regret, "ENOUGH", 2)
    if number:
        assert len(compare(PROBLEM, CPU, Even(), repeats=3, most=7, configs=4).candidates) == number
    else:
        with pytest.raises(TuningError, match=r"no other candidate is within 1.005 times of the best"):
            compare(PROBLEM, CPU, Even(), repeats=3, most=7, configs=4)


def test_the_command_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(regret, "clock_for", lambda _: Heating())
    output = tmp_path / "regret.json"
    arguments = ["regret", "--problem", PROBLEM.key, "--device", "cpu", "--repeats", "3", "--configs", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(output)])
    regret.main()
    assert f"| {PROBLEM.key} |" in capsys.readouterr().out
    (result,) = json.loads(output.read_text())["results"]
    assert len(result["sequential"]["regrets"]) == 3
