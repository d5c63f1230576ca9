"""A backend that compiles for longer than the budget allows is skipped, and tried when there is more time."""

from pathlib import Path

import pytest
import torch

from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.config import Candidate, Config
from tilewise.domain.job import Budget
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.space import Parameter, SearchSpace
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.backends.flash_cute import FlashCute
from tilewise.kernels.backends.plain import Plain
from tilewise.tuner import allowance
from tilewise.tuner.crew import Crew
from tilewise.tuner.tune import tune

from ..kernels.cells import PLAIN_FILE
from .fakes import FAKES, TINY, seen

CPU = torch.device("cpu")
PROBLEM = Problem(batch=1, heads=2, q_len=40, head_dim=16, dtype=Dtype.FP32, causal=True, mask="bias")


@pytest.fixture(autouse=True)
def slow_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """plain, as if each of its configs took 20 s to compile; flex_cpu, which really does, is out of every budget."""
    monkeypatch.setattr(Plain, "compile_seconds", 20.0)


def trials(database: Database, crew: Crew, seconds: float, *backends: str) -> dict[str, Trial]:
    budget = Budget(name="test", trials=6, seconds=seconds, patience=1, finalists=1, rounds=15)
    tune(PROBLEM, device=CPU, database=database, budget=budget, backends=backends, crew=crew)
    with database.read() as session:
        kept = TrialRepository(session).list(PROBLEM, devices.describe(CPU).key)
    return {trial.candidate.backend: trial for trial in kept}


def test_skipped_with_its_reason_and_tried_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crew: Crew) -> None:
    monkeypatch.setattr(torch, "__file__", PLAIN_FILE)  # not one that flex_cpu refuses
    with Database.open(f"sqlite:///{tmp_path / 'tilewise.db'}", upgrade=True) as database:
        first = trials(database, crew, 10)
        assert first["plain"].outcome is first["flex_cpu"].outcome is Outcome.SKIPPED
        assert first["plain"].message == (
            "compiling it takes about 20 s, and a search of 10 s spends at most 5 s on that; "
            "allow more seconds or name it with --backends"
        )
        assert first["sdpa"].outcome is Outcome.OK
        later = trials(database, crew, 50)
        assert (later["plain"].outcome, later["flex_cpu"].outcome) == (Outcome.OK, Outcome.SKIPPED)


def test_tried_when_it_is_named(tmp_path: Path, crew: Crew) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'tilewise.db'}", upgrade=True) as database:
        assert trials(database, crew, 10, "plain")["plain"].outcome is Outcome.OK


@pytest.mark.parametrize(("seconds", "ahead", "alone"), [(8, True, False), (16, True, True), (5, False, False)])
def test_what_other_processes_compile_need_only_be_done_in_time(seconds: float, ahead: bool, alone: bool) -> None:
    backend, budget = FlashCute(), Budget(name="test", trials=6, seconds=seconds, patience=1, finalists=1, rounds=15)
    found = [allowance.why_skipped(backend, budget, ahead=each) for each in (True, False)]
    assert [reason is None for reason in found] == [ahead, alone]
    if not ahead:
        assert found[0] == (
            "compiling it takes about 8 s, and a search of 5 s waits for it 2 s more; "
            "allow more seconds or name it with --backends"
        )


def test_a_slow_default_holds_up_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crew: Crew) -> None:
    def order(share: float) -> list[str]:
        monkeypatch.setattr(allowance, "DEFERRED", share)
        with Database.open(f"sqlite:///{tmp_path / str(share)}.db", upgrade=True) as database:
            budget = Budget(name="test", trials=8, seconds=60, patience=8, finalists=1, rounds=15)
            tune(TINY, device=CPU, database=database, budget=budget, backends=("plain", "cpu_tiled"), crew=crew)
            with database.read() as session:
                return [t.candidate.backend for t in TrialRepository(session).list(TINY, devices.describe(CPU).key)]

    assert order(0.5) == ["sdpa", *["cpu_tiled"] * 6, "plain"], "it is tried when there is nothing else"
    assert order(0.0)[:3] == ["sdpa", "cpu_tiled", "plain"], "and when it has waited for long enough"


def test_a_backend_whose_default_cannot_run_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crew: Crew
) -> None:
    space = SearchSpace("k", (Parameter("block", (1, 2, 3, 4)),), Config.of("k", block=1))
    (name,) = seen(monkeypatch, "no_kernel")
    monkeypatch.setattr(FAKES[name], "spaces", lambda *_: {"forward": space})
    with Database.open(f"sqlite:///{tmp_path / 'tilewise.db'}", upgrade=True) as database:
        budget = Budget(name="test", trials=8, seconds=60, patience=8, finalists=1, rounds=15)
        tune(TINY, device=CPU, database=database, budget=budget, backends=(name,), crew=crew)
        with database.read() as session:
            kept = TrialRepository(session).list(TINY, devices.describe(CPU).key)
    assert [trial.candidate for trial in kept if trial.candidate.backend == name] == [
        Candidate.of(name, forward=space.default)
    ]
