"""The list of figures that need a GPU: its commands exist, run within their time, and are not run again."""

import re
import sys
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tilewise.bench import figures, landscape, regret, tunings
from tilewise.bench.figures import TILEWISE, Step, run, steps
from tilewise.cli.main import app
from tilewise.domain.problem import Problem
from tilewise.kernels.backends import backend_named

from .test_decode import H200


@cache
def options_of(command: tuple[str, ...]) -> set[str]:
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0, shown.output
    return set(re.findall(r"--[a-z_-]+", shown.output))


def test_every_command_has_its_options() -> None:
    every = steps("h200", "trinix")
    assert len({step.command for step in every}) == len(every)
    for step in every:
        if step.command[: len(TILEWISE)] == TILEWISE:
            words = step.command[len(TILEWISE) :]
            path = words[: next(at for at, word in enumerate(words) if word.startswith("--"))]
            known = options_of(path)
        else:
            module = {"tilewise.bench.tunings": tunings, "tilewise.bench.regret": regret}[step.command[0]]
            known = set(re.findall(r'add_argument\("(--[a-z]+)"', Path(str(module.__file__)).read_text()))
        given = {word for word in step.command if word.startswith("--")} | ({"--seconds"} if step.limited else set())
        assert given <= known, step.command


def test_landscapes_are_of_spaces_of_at_least_300_configs() -> None:
    for backend, kernel, role, key in figures.LANDSCAPES:
        space = backend_named(backend).spaces(Problem.parse(key), H200)[role]
        (of_kernel,) = (each for each in space.by_kernel if each.kernel == kernel)
        assert len(list(of_kernel)) >= 300, (kernel, key)


def test_a_landscape_is_not_recorded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landscape, "FOLDER", tmp_path)
    _, kernel, _, key = figures.LANDSCAPES[0]
    first, second = steps("h200", None)[:2]
    assert not first.made()
    (tmp_path / f"{kernel}.{key}.nvidia-h200.sm90.141g.700w.jsonl.gz").touch()
    assert first.made()
    assert not second.made()


def test_steps_are_run_while_there_is_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def step(name: str, code: str, *, made: bool = False, limited: bool = False) -> Step:
        (tmp_path / f"{name}.py").write_text(code)
        return Step("g", (name,), lambda: made, limited=limited)

    argument = "import sys; assert sys.argv[1] == '--seconds' and 0 < float(sys.argv[2]) < 5"
    wanted = [
        step("tw_made", "raise SystemExit(9)", made=True),
        step("tw_limited", argument, limited=True),
        step("tw_fails", "raise SystemExit(3)"),
        step("tw_hangs", "import time; time.sleep(60)"),
        step("tw_late", ""),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        patch.setattr(figures, "GRACE", 0.5)
        done = run(wanted, 4.0)
    assert [(step.command[0], code) for step, code, _ in done] == [
        ("tw_limited", 0), ("tw_fails", 3), ("tw_hangs", None)
    ]  # fmt: skip
    assert sum(seconds for *_, seconds in done) < 6
    assert "python -m tw_fails" in capsys.readouterr().out


def test_the_list_is_printed_and_a_wrong_name_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["figures", "--card", "h200", "--list", "regret"])
    figures.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("python -m tilewise.bench.regret --problem ")
    monkeypatch.setattr(sys, "argv", ["figures", "--card", "h200", "nothing"])
    with pytest.raises(SystemExit):
        figures.main()
    assert "expected landscapes, tunings" in capsys.readouterr().err
