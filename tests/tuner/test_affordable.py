"""A backend that compiles for longer than the budget allows is skipped, and tried when there is more time."""

from pathlib import Path

import pytest
import torch

from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.job import Budget
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.backends.plain import Plain
from tilewise.tuner.crew import Crew
from tilewise.tuner.tune import tune

from ..kernels.cells import PLAIN_FILE

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
